"""Packaging: every fact is read from settings.ini, the one place where nbdev also looks."""
import configparser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
_parser = configparser.ConfigParser(delimiters=["="])
_parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = _parser["DEFAULT"]


def requirements(key: str) -> list[str]:
    "Requirements under `key`, separated by blanks in settings.ini."
    return cfg.get(key, "").split()


extras = {name: requirements(f"{name}_requirements") for name in ("lab", "dev", "full")}
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    license="Apache-2.0",
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    packages=find_packages(include=["adaptlab", "adaptlab.*"]),
    package_data={"adaptlab": ["*.json"], "adaptlab.bench": ["*.csv"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
    ],
    zip_safe=False,
)
