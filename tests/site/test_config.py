"""`_quarto.yml` is a valid Quarto configuration, and everything that it names exists."""

from pathlib import Path

import pytest
import yaml

from adaptlab import catalog, site

ROOT = Path(__file__).parents[2]
# The part of Quarto's schema that a website uses (Quarto 1.4 to 1.8).
KNOWN = {
    "": {"project", "website", "format", "metadata-files", "execute", "lang", "filters"},
    "project": {"type", "output-dir", "resources", "render", "pre-render", "post-render"},
    "website": {
        "title", "description", "site-url", "repo-url", "repo-branch", "repo-actions", "favicon",
        "page-navigation", "back-to-top-navigation", "search", "navbar", "sidebar", "page-footer",
        "open-graph", "twitter-card", "bread-crumbs", "image",
    },
    "website.search": {"location", "type", "limit", "keyboard-shortcut"},
    "website.navbar": {
        "title", "logo", "background", "foreground", "left", "right", "search", "collapse",
        "collapse-below", "pinned",
    },
    "website.sidebar": {
        "id", "title", "style", "contents", "search", "collapse-level", "background", "pinned",
        "alignment", "border",
    },
    "format": {"html"},
    "format.html": {
        "theme", "css", "toc", "toc-depth", "toc-title", "code-copy", "code-fold", "lang",
        "html-math-method", "html-table-processing", "include-after-body", "grid",
        "smooth-scroll", "number-sections", "page-layout", "anchor-sections", "highlight-style",
    },
    "format.html.theme": {"light", "dark"},
    "format.html.html-math-method": {"method", "url"},
    "format.html.grid": {"sidebar-width", "body-width", "margin-width", "gutter-width"},
}  # fmt: skip


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> Path:
    "The project as a renderer gets it."
    return site.stage(tmp_path_factory.mktemp("staged") / "_proc", ROOT)


def _config() -> dict:
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def _items(entries: list):
    "All entries of a navigation list, at any depth."
    for entry in entries:
        yield entry
        if isinstance(entry, dict):
            yield from _items(entry.get("contents", entry.get("menu", [])))


@pytest.mark.parametrize("path", KNOWN)
def test_keys_are_quarto_keys(path: str) -> None:
    "No key is misspelt or in the wrong place."
    part = _config()
    for name in path.split(".") if path else []:
        part = part[name]
    assert set(part) <= KNOWN[path], f"{path}: {set(part) - KNOWN[path]}"


def test_values_are_of_the_right_kind() -> None:
    "The values that Quarto's schema restricts."
    config = _config()
    assert config["project"]["type"] == "website"
    assert config["project"]["output-dir"] == "_docs"
    assert config["website"]["sidebar"]["style"] in ("docked", "floating")
    assert config["website"]["search"]["type"] in ("overlay", "textbox")
    assert config["website"]["site-url"].startswith("https://")
    assert config["format"]["html"]["html-math-method"]["method"] == "katex"
    assert "link-external-newwindow" not in config["format"]["html"], "opens pages of the site anew"
    facts = site.settings(ROOT)
    assert config["website"]["repo-url"] == facts["git_url"]
    assert config["website"]["site-url"] == facts["doc_host"] + facts["doc_baseurl"]


def test_files_that_it_names_exist(staged: Path) -> None:
    "Every page, style sheet and picture in `_quarto.yml` and in the sidebar is there."
    config, bar = _config(), yaml.safe_load((staged / "sidebar.yml").read_text(encoding="utf-8"))
    navbar = config["website"]["navbar"]
    entries = [*navbar["left"], *navbar["right"], *bar["website"]["sidebar"]["contents"]]
    links = [e if isinstance(e, str) else e.get("href", "") for e in _items(entries)]
    links += [config["format"]["html"]["css"], config["website"]["favicon"]]
    links += [config["format"]["html"]["include-after-body"]]
    missing = [x for x in links if x and "://" not in x and not (staged / x).is_file()]
    assert not missing
    for pattern in config["project"]["resources"]:
        assert list(staged.glob(pattern)), f"nothing matches {pattern}"


def test_the_configuration_is_used_as_it_is(staged: Path) -> None:
    "One truth: what renders the site is the file at the top of the repository."
    assert (staged / "_quarto.yml").read_bytes() == (ROOT / "_quarto.yml").read_bytes()


def test_every_page_finds_katex_without_a_network(staged: Path) -> None:
    "Quarto puts the address of KaTeX into a page as it is, so each folder says its own way to it."
    for page in staged.rglob("*.qmd"):
        own = page.parent / ("_quarto.yml" if page.parent == staged else "_metadata.yml")
        math = yaml.safe_load(own.read_text(encoding="utf-8"))["format"]["html"]["html-math-method"]
        assert math["method"] == "katex" and math["url"].endswith("/"), own
        assert (page.parent / math["url"] / "katex.min.js").is_file(), page


def test_every_page_is_in_the_sidebar(staged: Path) -> None:
    "No page is out of reach of the previous and next links; lessons follow the catalogue."
    bar = yaml.safe_load((staged / "sidebar.yml").read_text(encoding="utf-8"))
    entries = _items(bar["website"]["sidebar"]["contents"])
    listed = [e if isinstance(e, str) else e.get("href") for e in entries]
    pages = {p.relative_to(staged).as_posix() for p in staged.rglob("*.qmd")}
    assert pages == {x for x in listed if x}
    lessons = [p.page.replace(".html", ".qmd") for p in catalog.papers()]
    assert [x for x in listed if x in lessons] == [x for x in lessons if x in pages]


def test_folders_carry_no_digits() -> None:
    "Folder names are part of addresses: the order lives in the catalogue, not in them."
    folders = [p for p in (ROOT / "nbs").iterdir() if p.is_dir() and not p.name.startswith(".")]
    assert not [p.name for p in folders if any(c.isdigit() for c in p.name)]
