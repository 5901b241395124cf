"""How the benchmarks measure and what they promise: `seconds`, `in_turn`, and `row`.

A benchmark is a test that measures something and records it as one row of the table that
`make bench` ends with:

    from clock import in_turn, row

    def test_step_against_peft():
        ours, theirs = in_turn(step, peft_step)  # seconds, the one after the other, in this run
        row("LoRA step", ours, theirs, bound=1.0)  # ours may take at most 1.0 times as long
        row("LoRA step, memory", peak(step), peak(peft_step), bound=1.0, unit="MiB")
        row("import adaptlab", seconds(start), bound=0.3)  # without a reference: an absolute bound

The bound is on the ratio `ours / reference`, or on `ours` where there is no reference. Less is
better, always: turn a speed into a time. Each bound is granted what its measurement wavers by,
1 % for memory and 5 % for time; what is counted (FLOPs, numbers of things) is granted nothing. A
row beyond that fails its test. Without a bound a row only informs.
"""

import timeit
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

NOISE = {"s": 0.05, "MiB": 0.01, "GiB": 0.01}  # share of a bound that a unit may miss it by
ROWS: list["Row"] = []  # what this session measured


class Row(NamedTuple):
    "One line of the table."

    what: str
    ours: float
    reference: float | None
    bound: float | None
    unit: str

    @property
    def ratio(self) -> float | None:
        return None if self.reference is None else self.ours / self.reference

    @property
    def ok(self) -> bool:
        if self.bound is None:
            return True
        value = self.ours if self.ratio is None else self.ratio
        return value <= self.bound * (1 + NOISE.get(self.unit, 0.0))

    def cells(self) -> list[str]:
        "The row as text: what, ours, reference, ratio, bound, ok."
        def number(value, unit=""):
            return "" if value is None else f"{value:.3g} {unit}".strip()

        bound = number(self.bound, self.unit if self.ratio is None else "")
        said = "" if self.bound is None else "ok" if self.ok else "TOO MUCH"
        return [self.what, number(self.ours, self.unit), number(self.reference, self.unit),
                number(self.ratio), bound, said]


def row(
    what: str,  # what was measured, in a few words
    ours: float,  # the measurement; less is better
    reference: float | None = None,  # the same of what it is compared with, in the same run
    bound: float | None = None,  # largest ratio, or without a reference the largest value
    unit: str = "s",  # "s", "MiB", "GiB", or what was counted
) -> float:  # the ratio, or `ours`
    "Record a row of the table; AssertionError if it misses its bound by more than its noise."
    found = Row(what, float(ours), None if reference is None else float(reference), bound, unit)
    ROWS.append(found)
    assert found.ok, " | ".join(found.cells())
    return found.ours if found.ratio is None else found.ratio


def table(rows: list[Row]) -> list[str]:
    "Lines of text: what, ours, reference, ratio, bound, ok."
    lines = [["what", "ours", "reference", "ratio", "bound", ""], *(r.cells() for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return ["  ".join(c.ljust(w) if i in (0, 5) else c.rjust(w)
                      for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines]


def seconds(work: Callable, repeats: int = 3, pick: Callable = min) -> float:
    "Of some calls, after one that does not count; the fastest is disturbed least by other work."
    work()
    return float(pick(timeit.repeat(work, number=1, repeat=repeats)))


def in_turn(
    ours: Callable,  # the work to measure
    *others: Callable,  # what it is compared with
    rounds: int = 7,  # of one call each, after one that does not count
    number: int = 1,  # calls per measurement, for work of microseconds
) -> list[float]:  # seconds per call, `ours` first; ratios are the median of the rounds' ratios
    """Time several pieces of work in turn, so that a slow moment of the machine hits all alike.

    What is returned keeps the medians of the ratios: `ours` is its own median, and each other one
    is `ours` divided by the median ratio to it.
    """
    works = [ours, *others]
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for turn in range(rounds):
        order = range(len(works)) if turn % 2 == 0 else reversed(range(len(works)))
        for i in order:
            times[i].append(timeit.timeit(works[i], number=number) / number)
    first = median(times[0])
    rest = [first / median(a / b for a, b in zip(times[0], other, strict=True))
            for other in times[1:]]
    return [first, *rest]
