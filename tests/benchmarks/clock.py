"""Seconds of a piece of work, for the benchmarks that compare two."""

import timeit


def seconds(work, repeats=3, pick=min):
    "Of some calls, after one that does not count; the fastest is disturbed least by other work."
    work()
    return float(pick(timeit.repeat(work, number=1, repeat=repeats)))
