"""Fixtures that tests of several rooms share."""
import pytest

import schemas


@pytest.fixture
def recorded(monkeypatch):
    "The hub's data sets as tiny stand-ins of their recorded schemas: see `tests/schemas.py`."
    return schemas.recorded(monkeypatch)
