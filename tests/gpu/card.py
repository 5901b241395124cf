"""What the tests on a GPU share: where they run, random models of real shapes, clocks, the table.

A test builds what it needs on `DEVICE`, from random weights, and downloads nothing. What it
measures becomes a row of the table that `make test-gpu` ends with (card, what, seconds, GiB,
counted, measured, ratio, bound):

    from gpu.card import DEVICE, clock, in_turn, llama, row, token_ids

    def test_step_against_lora():
        ours, lora = in_turn(step, lora_step)  # seconds per call, in turn
        row("NeuroAda k = 1, step", ours, reference=lora, bound=1.1)
        row("FULL, one step", *clock(step), counted="31 GiB", measured="29.8 GiB")

Bounds are ratios, with 5 % for noise. With ADAPTLAB_TEST_GPU=cpu the tests run on the CPU, with
toy shapes and without bounds: so a test can be written where there is no GPU.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DRY = os.environ.get("ADAPTLAB_TEST_GPU") == "cpu"  # the code is tried, nothing is measured
DEVICE = "cpu" if DRY else "cuda"
HERE = DRY or torch.cuda.is_available()
NOISE = 0.05
ROWS: list["Row"] = []
SHAPES = {  # vocabulary, width, feed-forward, layers, heads, shared keys, tied embeddings
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8, False),
    "llama2-7b": (32000, 4096, 11008, 32, 32, 32, False),
    "llama3.2-1b": (128256, 2048, 8192, 16, 32, 8, True),
    "llama3.2-3b": (128256, 3072, 8192, 28, 24, 8, True),
    "smollm2": (49152, 576, 1536, 30, 9, 3, True),
}


class Row(NamedTuple):
    "One line of the table."

    what: str
    seconds: float | None
    gib: float | None
    counted: str
    measured: str
    ratio: float | None
    bound: float | None


def row(
    what: str,  # what was done, in a few words
    seconds: float | None = None,  # that it took
    gib: float | None = None,  # most memory that it held
    *,
    reference: float | None = None,  # seconds (or GiB, without seconds) of what it is compared with
    bound: float | None = None,  # largest ratio to the reference
    counted: str = "",  # what `bench.cost` says beforehand, with its unit
    measured: str = "",  # the same, measured
) -> None:
    "Record a row; AssertionError if the ratio is above its bound by more than noise."
    ours = seconds if seconds is not None else gib
    ratio = None if reference is None else ours / reference
    ROWS.append(Row(what, seconds, gib, counted, measured, ratio, bound))
    if not DRY and bound is not None:
        assert ratio <= bound * (1 + NOISE), f"{what}: {ratio:.3f} times, bound {bound}"


def table() -> list[str]:
    "The rows as lines of text, with the card's name on top."
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [("what", "seconds", "GiB", "counted", "measured", "ratio", "bound")]
    lines += [(r.what, number(r.seconds, ".4g"), number(r.gib, ".2f"), r.counted, r.measured,
               number(r.ratio, ".2f"), number(r.bound, ".2f")) for r in ROWS]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    name = "the CPU in its place" if DRY else torch.cuda.get_device_name()
    return [f"card: {name}; torch {torch.__version__}",
            *("  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                        for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
              for line in lines)]


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    "Give unused memory back; the peak is counted from here."
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def once(work: Callable[[], Any]) -> float:
    "Seconds of one call, on the card too."
    sync()
    start = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - start


def clock(work: Callable[[], Any], rounds: int = 10, warm: int = 3) -> tuple[float, float]:
    "Median seconds of a call, and the most GiB that were held (0 on the CPU)."
    if DRY:
        rounds, warm = 1, 0
    free()
    for _ in range(warm):
        once(work)
    times = [once(work) for _ in range(rounds)]
    held = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
    return statistics.median(times), held


def in_turn(*works: Callable[[], Any], rounds: int = 10, warm: int = 3) -> list[float]:
    "Median seconds of each, measured in turn: a card that slows down is slow for all of them."
    if DRY:
        rounds, warm = 1, 0
    for work in works:
        for _ in range(warm):
            once(work)
    times = [[once(work) for work in works] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def peak(work: Callable[[], Any]) -> float:
    "Most GiB that torch held during a call, above what it held before."
    from adaptlab.evaluate import peak_memory

    free()
    return peak_memory(work, DEVICE) / 2**30


def llama(
    shape: str,  # one of SHAPES
    layers: int | None = None,  # fewer than it has
    dtype: torch.dtype = torch.bfloat16,  # of the weights
    seed: int = 0,  # of the weights
) -> nn.Module:  # on DEVICE, in eval mode
    "A Llama of a real shape with random weights."
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, width, inner, depth, heads, shared, tied = SHAPES[shape]
    if DRY:
        vocabulary, width, inner, depth = 512, 64, 160, min(depth, 4)
        heads, shared = 4, 2 if shared < heads else 4
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner,
        num_hidden_layers=min(layers or depth, depth), num_attention_heads=heads,
        num_key_value_heads=shared, max_position_embeddings=8192, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=2)
    default = torch.get_default_dtype()
    torch.manual_seed(seed)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(DEVICE):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    "Random token ids [batch, length] on DEVICE, the same on each machine."
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 500, (batch, length if not DRY else min(length, 16)),
                         generator=generator).to(DEVICE)
