"""The website, built as `make site` does without Quarto, and read in headless Chromium."""

import functools
import json
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from adaptlab import catalog, site

ROOT = Path(__file__).parents[2]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)
WRITTEN = site.lessons_written(ROOT)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    "The site, built from scratch; the build must have nothing to complain about."
    pytest.importorskip("smalldocs", reason="smalldocs (Python 3.11 or newer) is not installed")
    return site.build(tmp_path_factory.mktemp("site") / "_docs", "smalldocs", ROOT)


@pytest.fixture(scope="module")
def address(built: Path):
    "Where the site is served, on this machine only."

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            "Say nothing."

    handler = functools.partial(Quiet, directory=str(built))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    "Headless Chromium; skipped where there is none, unless ADAPTLAB_NEED_BROWSER is set."
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None and not os.environ.get("ADAPTLAB_NEED_BROWSER"):
        pytest.skip("Chromium is missing: install it (Debian: apt-get install chromium)")
    assert CHROMIUM, "Chromium is missing: install it (Debian: apt-get install chromium)"
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture()
def page(browser):
    "A fresh wide window."
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    yield page
    page.close()


def _pages(built: Path) -> list[str]:
    return sorted(p.relative_to(built).as_posix() for p in built.rglob("*.html"))


# ------------------------------------------------------------------ without a browser


class _Links(HTMLParser):
    "The links and the anchors of a page."

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors, self.sources = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.anchors |= {found[k] for k in ("id", "name") if found.get(k)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("img", "script", "iframe", "source") and found.get("src"):
            self.sources.append(found["src"])
        elif tag == "link" and found.get("href"):
            self.sources.append(found["href"])


def test_no_broken_internal_link(built: Path) -> None:
    "Every local link leads to a file, and every fragment to a place in it."
    parsed = {p: _Links((built / p).read_text(encoding="utf-8")) for p in _pages(built)}
    broken = []
    for name, links in parsed.items():
        for link in [*links.links, *links.sources]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = (built / name).parent / unquote(parts.path) if parts.path else built / name
            path = path / "index.html" if path.is_dir() else path
            if not path.is_file():
                broken.append(f"{name} -> {link}")
                continue
            target = path.resolve().relative_to(built.resolve()).as_posix()
            anchors = parsed[target].anchors if target in parsed else set()
            if parts.fragment and unquote(parts.fragment) not in {*anchors, "top"}:
                broken.append(f"{name} -> {link}: no such place")
    assert not broken


def test_nothing_is_loaded_from_another_host(built: Path) -> None:
    "No script, style sheet, picture or font has a foreign address."
    foreign = []
    for name in _pages(built):
        sources = _Links((built / name).read_text(encoding="utf-8")).sources
        foreign += [f"{name}: {s}" for s in sources if urlsplit(s).netloc]
    for css in built.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import )[\"']?https?:", css.read_text(encoding="utf-8"))
        foreign += [f"{css.name}: {address}" for address in found]
    assert not foreign


def test_every_lesson_and_module_has_a_page(built: Path) -> None:
    "Lessons, the notebooks of the library, the reference and the scoreboard."
    pages = set(_pages(built))
    wanted = {"index.html", "scoreboard.html", "api/index.html"}
    wanted |= {p.page for p in WRITTEN}
    wanted |= {f"experiments/{p.slug}.html" for p in site.experiments_written(ROOT)}
    for room in site.ROOMS:
        names = [site.page_name(p.name) for p in site.room_notebooks(ROOT, room)]
        wanted |= {f"{room}/{name}.html" for name in names}
    wanted |= {f"api/{name}.html" for name in site.module_files(ROOT)}
    assert wanted <= pages
    text = (built / "api" / "cache.html").read_text(encoding="utf-8")
    assert 'id="atomic_path"' in text  # an entry made from docments


# ------------------------------------------------------------------ in the browser


def test_home_page_tells_what_one_can_do(page, address: str) -> None:
    "Three rows, each with text at the left and something to see at the right; stacked on a phone."
    page.goto(address)
    rows = page.locator(".story")
    assert rows.count() == 3
    for i, kind in enumerate(("img", "div.sourceCode", "p, .verdict-bar")):
        left = rows.nth(i).locator(".story-text").bounding_box()
        shown = rows.nth(i).locator(".story-picture")
        assert shown.locator(kind).count(), f"row {i + 1} shows no {kind}"
        assert shown.bounding_box()["x"] > left["x"] + left["width"] - 1
    page.set_viewport_size({"width": 390, "height": 844})
    below = rows.first.locator(".story-picture").bounding_box()["y"]
    assert below > rows.first.locator(".story-text").bounding_box()["y"]


def test_cards_stand_side_by_side_and_say_how_long_a_lesson_takes(page, address: str) -> None:
    page.goto(address)
    for chapter in page.locator(".lesson-cards").all():
        boxes = [card.bounding_box() for card in chapter.locator(".lesson-card").all()]
        assert len({round(b["y"]) for b in boxes[:2]}) == 1
    for paper in WRITTEN:
        text = page.locator(f'[data-paper="{paper.slug}"] .card-minutes').inner_text()
        assert re.fullmatch(r"\d+ min", text)


def test_home_page_lists_all_papers(page, address: str) -> None:
    "44 cards; those of written lessons are links with a picture, the others say `planned`."
    page.goto(address)
    for paper in catalog.papers():
        card = page.locator(f'[data-paper="{paper.slug}"]')
        assert card.count() == 1 and card.is_visible(), paper.slug
        assert paper.short_title in card.inner_text()
        if paper in WRITTEN:
            assert card.get_attribute("href") == paper.page
            assert card.locator("img").count() == 1, f"{paper.slug}: no picture"
        else:
            assert card.get_attribute("href") is None and "planned" in card.inner_text()
    for chapter in catalog.chapters():
        assert page.get_by_text(chapter.question, exact=True).is_visible()


def _rare_word(built: Path, lesson: str) -> str:
    "A word that the text of one page has, and no other page."
    words = {}
    for entry in json.loads((built / "search.json").read_text(encoding="utf-8")):
        found = re.findall(r"\b[a-z]{7,12}\b", entry["text"])
        words.setdefault(entry["href"].partition("#")[0], set()).update(found)
    others = set().union(*(found for name, found in words.items() if name != lesson))
    return max(sorted(words[lesson] - others), key=len)


@pytest.mark.parametrize("paper", WRITTEN, ids=lambda p: p.slug)
def test_search_finds_a_lesson_by_a_word_of_its_text(
    page, address: str, built: Path, paper
) -> None:
    "Typing the word shows the lesson, and a click goes there."
    word = _rare_word(built, paper.page)
    page.goto(address)
    page.locator(".smalldocs-search input").first.fill(word)
    hits = page.locator(f'.search-result[href*="{paper.page}"]')
    hits.first.wait_for(timeout=10_000)
    hits.first.click()
    page.wait_for_url(f"**/{paper.page}*")


RAW_TEX = """() => {
  const main = document.querySelector("main").cloneNode(true);
  main.querySelectorAll("pre, code, .katex, script, style").forEach(e => e.remove());
  const tex = /\\\\[a-zA-Z]{2,}|\\$\\$|\\\\[\\(\\[]|\\$[^$\\s][^$\\n]*\\$/g;
  return main.textContent.match(tex) || [];
}"""
# the widest part of the page, the size of its text, formulas that were and were not drawn
STATE = """wide => ({
  width: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth),
  font: Math.min(...[...document.querySelectorAll("main p")].slice(0, 20)
    .filter(e => !e.closest(".lesson-card, .cell-output"))
    .map(e => parseFloat(getComputedStyle(e).fontSize)), 99),
  formulas: document.querySelectorAll(".math").length,
  drawn: document.querySelectorAll(".math .katex").length,
  errors: document.querySelectorAll(".katex-error").length,
  cut: !wide ? [] : [...document.querySelectorAll("main pre")]
    .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)
    .flatMap(e => e.textContent.split("\\n")).filter(line => line.length > 80 && line.length <= 100)
    .filter(line => /^ *(def |class |[a-z_*]+: )/.test(line)),
  images: [...document.images].filter(i => i.loading !== "lazy" && i.naturalWidth === 0)
    .map(i => i.src),
})"""


def test_every_page_is_readable(browser, address: str, built: Path) -> None:
    "On a wide and a narrow window: no console error, no foreign request, no raw TeX, no overflow."
    page, wrong, formulas, name = browser.new_page(), [], 0, ""

    def note(what: str) -> None:
        wrong.append(f"{name}: {what}")

    page.on("console", lambda m: note(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda e: note(f"script: {e}"))
    page.on(
        "request",
        lambda r: None if r.url.startswith((address, "data:")) else note(f"asks {r.url}"),
    )
    for name in _pages(built):
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(address + name, wait_until="load")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            state = page.evaluate(STATE, width == 1280)
            if state["width"] > width:
                note(f"{state['width']} px wide in a window of {width} px")
            if state["font"] < 15:
                note(f"text of {state['font']} px")
        formulas += state["drawn"]
        if state["drawn"] < state["formulas"] or state["errors"]:
            note(f"{state['drawn']} of {state['formulas']} formulas, {state['errors']} errors")
        if state["cut"]:
            note(f"code that is cut off at 1280 px: {state['cut'][:2]}")
        if state["images"]:
            note(f"pictures that do not load: {state['images']}")
        if raw := page.evaluate(RAW_TEX):
            note(f"raw TeX: {raw[:3]}")
    page.close()
    assert not wrong, "\n".join(wrong)
    assert formulas or not WRITTEN, "no formula anywhere"


NEXT = re.compile(r'nav-page-next">\s*<a href="([^"]+)"')


def test_previous_and_next_lead_through_the_course(page, address: str, built: Path) -> None:
    "From the home page, `next` visits every page once, in reading order; `previous` returns."
    seen = ["index.html"]
    while match := NEXT.search((built / seen[-1]).read_text(encoding="utf-8")):
        target = (built / seen[-1]).parent / match[1]
        seen.append(target.resolve().relative_to(built.resolve()).as_posix())
        assert len(seen) <= len(_pages(built)), "the links run in a circle"
    assert sorted(seen) == _pages(built)
    lessons = [p.page for p in WRITTEN]
    assert [s for s in seen if s in lessons] == lessons
    page.goto(address + seen[1])
    page.locator(".nav-page-next a").click()
    page.wait_for_url(address + seen[2])
    page.locator(".nav-page-previous a").click()
    page.wait_for_url(address + seen[1])


@pytest.mark.parametrize("paper", WRITTEN, ids=lambda p: p.slug)
def test_solutions_are_folded(page, address: str, paper) -> None:
    "Solutions are closed at first, and open on a click."
    page.goto(address + paper.page)
    solutions = page.locator("main details:not(.al-slider details)")
    assert solutions.count() >= 3
    for i in range(solutions.count()):
        assert solutions.nth(i).get_attribute("open") is None
    solutions.last.locator("summary").click()
    assert solutions.last.get_attribute("open") is not None


@pytest.mark.parametrize("paper", WRITTEN, ids=lambda p: p.slug)
def test_a_lesson_opens_in_colab_and_can_be_taken_away(page, address: str, paper) -> None:
    "The link to Colab names the notebook; the download is the notebook under its own name."
    page.goto(address + paper.page)
    colab = page.get_by_role("link", name="Open in Colab")
    assert colab.get_attribute("href") == (
        "https://colab.research.google.com/github/adaptlab/adaptlab/blob/main/nbs/" + paper.notebook
    )
    with page.expect_download() as got:
        page.get_by_role("link", name="Download the notebook").click()
    assert got.value.suggested_filename == Path(paper.notebook).name
    cells = json.loads(Path(got.value.path()).read_text(encoding="utf-8"))["cells"]
    assert len(cells) == len(site.read_notebook(ROOT / "nbs" / paper.notebook)["cells"])
    texts = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    assert not [t for t in texts if "../assets/" in t], "a picture is not packed into the notebook"


def test_figures_open_large_on_a_phone(browser, address: str) -> None:
    "A tap shows the figure in full size; Escape, or another tap, closes it. Enter does the same."
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True)
    page.goto(address + "bench/plots.html", wait_until="load")
    figure, box = page.locator("main img.al-small").first, page.locator("dialog.al-large")
    figure.tap()
    assert box.is_visible()
    assert box.locator("img").bounding_box()["width"] > 1.5 * figure.bounding_box()["width"]
    box.locator("img").tap()
    assert not box.is_visible()
    figure.focus()
    page.keyboard.press("Enter")
    assert box.is_visible()
    page.keyboard.press("Escape")
    assert not box.is_visible()
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_slider_is_moved_by_keyboard(browser, address: str, width: int) -> None:
    "One figure is seen, with its value beside the label; arrow keys change both."
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.goto(address + "bench/plots.html")
    slider = page.locator(".al-slider").first
    handle = slider.get_by_role("slider", name="step size")
    assert slider.locator("img:visible").count() == 1
    assert slider.locator("output").inner_text() == handle.get_attribute("aria-valuetext") == "1.5"
    before = slider.locator("img:visible").get_attribute("src")
    handle.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.locator("output").inner_text() == handle.get_attribute("aria-valuetext") == "1"
    assert slider.locator("img:visible").count() == 1
    assert slider.locator("img:visible").get_attribute("src") != before
    assert slider.locator("img:visible").get_attribute("alt") == "step size: 1"
    page.emulate_media(media="print")
    assert slider.locator("img:visible").get_attribute("alt") == "step size: 1.5"
    assert slider.locator("summary:visible").inner_text() == "step size: 1.5"
    assert not handle.is_visible()
    page.close()


def test_a_slider_without_scripts_is_a_list_that_unfolds(browser, address: str) -> None:
    "The middle figure is open; the others open on a click, one at a time."
    page = browser.new_page(java_script_enabled=False)
    page.goto(address + "bench/plots.html")
    slider = page.locator(".al-slider").first
    assert slider.locator("img:visible").get_attribute("alt") == "step size: 1.5"
    assert not slider.get_by_role("slider").count()
    slider.locator("summary").first.click()
    assert slider.locator("img:visible").get_attribute("alt") == "step size: 0.1"
    page.close()


@pytest.mark.parametrize(
    ("name", "part"),
    [("index.html", "Lessons"), ("bench/plots.html", "The library"), ("api/cache.html", "API"),
     ("scoreboard.html", "Scoreboard"), *[(p.page, "Lessons") for p in WRITTEN[:1]]],
)  # fmt: skip
def test_the_bar_at_the_top_says_where_one_is(page, address: str, name: str, part: str) -> None:
    page.goto(address + name)
    active = page.locator(".navbar .nav-link.active")
    assert [text.strip() for text in active.all_inner_texts()] == [part]


CONTRAST = """() => {
  const light = c => {
    const [r, g, b] = c.match(/[\\d.]+/g).map(Number)
      .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const text = light(getComputedStyle(document.querySelector("main p")).color);
  const back = light(getComputedStyle(document.body).backgroundColor);
  return [back, (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_are_readable(browser, address: str, scheme: str) -> None:
    "The page follows the reader's preference, with a contrast of at least 7 to 1."
    page = browser.new_page(color_scheme=scheme)
    page.goto(address)
    back, contrast = page.evaluate(CONTRAST)
    page.close()
    assert (back > 0.5) == (scheme == "light") and contrast >= 7
