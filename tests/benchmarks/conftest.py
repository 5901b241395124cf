"""The table at the end of `make bench` and of `make bench-lessons`."""

import clock


def pytest_terminal_summary(terminalreporter) -> None:
    if clock.ROWS:
        terminalreporter.section("what was measured")
        for line in clock.table(clock.ROWS):
            terminalreporter.write_line(line)
