"""Skipped where there is no GPU, and beside other tests; the table at the end."""

import os
from pathlib import Path

import pytest

from gpu import card

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items) -> None:
    beside = os.environ.get("PYTEST_XDIST_WORKER") and not card.DRY
    reason = ("needs CUDA" if not card.HERE
              else "the card must be free: make test-gpu" if beside else "")
    if reason:
        for item in items:
            if item.path.parent == FOLDER:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def memory_given_back():
    "No test finds the memory that another one held."
    yield
    card.free()


def pytest_terminal_summary(terminalreporter) -> None:
    if card.ROWS:
        terminalreporter.section("on the card")
        for line in card.table():
            terminalreporter.write_line(line)
        if path := os.environ.get("ADAPTLAB_RECORD"):
            card.record(path)
