"""The invented experiment, as a fixture of this room."""

from invented import invented  # noqa: F401
