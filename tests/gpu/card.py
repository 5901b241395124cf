"""What the tests on a GPU share: where they run, random models of real shapes, clocks, the table.

A test builds what it needs on `DEVICE`, from random weights, and downloads nothing. What it
measures becomes a row of the table that `make test-gpu` ends with, under the test's lesson:

    from gpu.card import DEVICE, clock, full, in_turn, llama, row, token_ids

    def test_step_against_lora():
        ours, lora = in_turn(step, lora_step)  # seconds per call, in turn
        row("step, k = 1", ours, reference=lora, against="LoRA, r = 16", bound=1.1)

    def test_full_shape():
        full("a step, 16 x 512 tokens", model, batch, step)  # counted by bench.cost, and measured

Bounds are ratios, with 5 % for noise. With ADAPTLAB_TEST_GPU=cpu the tests run on the CPU, with
toy shapes and without bounds: so a test can be written where there is no GPU. ADAPTLAB_RECORD
names a CSV file for the rows: `adaptlab/bench/card.csv` is what the lessons show.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptlab import adapters
from adaptlab.bench import cost

DRY = os.environ.get("ADAPTLAB_TEST_GPU") == "cpu"  # the code is tried, nothing is measured
DEVICE = "cpu" if DRY else "cuda"
HERE = DRY or torch.cuda.is_available()
NOISE = 0.05
ROWS: list["Row"] = []
FLOAT32 = {"A100": 19.5, "H100": 67, "H200": 67}  # 10^12 operations per second, no TF32
SHAPES = {  # vocabulary, width, feed-forward, layers, heads, shared keys, tied embeddings
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8, False),
    "llama2-7b": (32000, 4096, 11008, 32, 32, 32, False),
    "llama3.2-1b": (128256, 2048, 8192, 16, 32, 8, True),
    "llama3.2-3b": (128256, 3072, 8192, 28, 24, 8, True),
    "smollm2": (49152, 576, 1536, 30, 9, 3, True),
}


class Row(NamedTuple):
    "One line of the table."

    paper: str  # the lesson
    what: str
    seconds: float | None = None
    counted_seconds: float | None = None
    gib: float | None = None
    counted_gib: float | None = None
    against: str = ""
    ratio: float | None = None
    bound: float | None = None


def row(
    what: str,  # what was done, in a few words; the lesson's name is added
    seconds: float | None = None,  # that it took
    gib: float | None = None,  # most memory that was held
    *,
    reference: float | None = None,  # seconds (or GiB, without seconds) of what it is compared with
    against: str = "",  # what that is
    bound: float | None = None,  # largest ratio to the reference
    counted: tuple[float | None, float | None] = (None, None),  # seconds and GiB, beforehand
) -> None:
    "Record a row; AssertionError if the ratio is above its bound by more than noise."
    test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[0]
    ours = seconds if seconds is not None else gib
    ratio = None if reference is None else ours / reference
    ROWS.append(Row(Path(test).stem.removeprefix("test_"), what, seconds, counted[0], gib,
                    counted[1], against, ratio, bound))
    if not DRY and bound is not None:
        assert ratio <= bound * (1 + NOISE), f"{what}: {ratio:.3f} times, bound {bound}"


def name() -> str:
    "Of the card, as its driver says it."
    return "the CPU in its place" if DRY else torch.cuda.get_device_name()


def machine(half: bool = True) -> cost.Machine:
    "What `bench.cost` knows of this card (or an H100), for products in half or single precision."
    known = next((m for m in (cost.H200, cost.A100) if m.name in name()), cost.H100)
    return known if half else replace(known, tflops=FLOAT32[known.name])


def full(
    what: str,  # what a step is: its shape in a few words
    model: nn.Module,  # on DEVICE, as FULL trains it: what is trained requires gradients
    batch: Any,  # what `modules.call` takes: the inputs of one step
    step: Callable[[], Any],  # forward, backward, update
    *,
    autocast: torch.dtype | None = None,  # that the step uses: activations are counted under it
    rounds: int = 5,
) -> None:
    "A row with the seconds and GiB of a step of FULL, counted by `bench.cost` beside measured."
    half = autocast is not None or next(model.parameters()).dtype != torch.float32
    trainable = sum(p.numel() for p in adapters.trainable_parameters(model))
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        found = cost.needs(model, flops=cost.forward_flops(model, batch, 1), trained=1,
                           trainable=trainable, machine=machine(half),
                           activations=cost.activation_bytes(model, batch)).set_index("what")
    amount, unit = found.loc["memory, together", ["amount", "unit"]]
    gib = amount / 1024 if unit == "MiB" else amount
    row(f"FULL: {what}", *clock(step, rounds=rounds, warm=2),
        counted=(3600 * found.loc["time", "amount"], gib))


def frame() -> "pd.DataFrame":  # noqa: F821
    "The rows, with the card and the version of torch."
    import pandas as pd

    return pd.DataFrame(ROWS, columns=Row._fields).assign(card=name(), torch=torch.__version__)


def table() -> list[str]:
    "The rows as lines of text, with the card's name on top."
    found = frame().drop(columns=["card", "torch"]).sort_values("paper", kind="stable")
    short = {c: lambda v: "" if v != v else f"{v:.4g}" for c in found.select_dtypes(float)}
    text = found.to_string(index=False, formatters=short, justify="left")
    return [f"card: {name()}; torch {torch.__version__}", *text.splitlines()]


def record(path: str) -> None:
    "Write the rows as CSV, whole or not at all."
    unfinished = Path(path).with_suffix(".part")
    frame().to_csv(unfinished, index=False, float_format="%.4g")
    os.replace(unfinished, path)


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


def language_step(
    model: nn.Module,  # causal language model, as it is trained
    ids: Tensor,  # [B, L] that it learns
    lr: float,  # of AdamW
) -> Callable[[], None]:
    "A step in bfloat16 by autocast, as `fit` makes it."
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=lr)

    def step() -> None:
        adam.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        adam.step()

    return step


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    "Random token ids [batch, length] on DEVICE, the same on each machine."
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 500, (batch, length if not DRY else min(length, 16)),
                         generator=generator).to(DEVICE)
