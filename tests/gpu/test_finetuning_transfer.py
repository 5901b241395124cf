"""Fine-tuning transfer on a GPU: every function, SMALL, FULL's step, a transfer of a whole 7B."""

from functools import partial

import pytest
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from adaptlab import checkpoints, modules
from adaptlab.arithmetic.finetuning_transfer import (
    DiffVector, TransferInit, apply_diff, diff_vector, iterative_recycling, linear_barrier,
    transfer_finetuning, transfer_matrix)
from adaptlab.bench.runs import launch
from adaptlab.experiments.finetuning_transfer import FULL, SMALL
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, clock, full, llama, peak, row, token_ids

OLMO = {"vocab_size": 100352}  # and the other defaults: OLMo 2 7B
if DRY:
    OLMO = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
            "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_as_on_the_cpu(dtype, tmp_path):
    g = torch.Generator().manual_seed(0)
    here = [{"w": torch.randn(300, 200, generator=g).to(dtype)} for _ in range(3)]
    there = [{"w": s["w"].to(DEVICE)} for s in here]
    diff = diff_vector(*there[:2])
    ours = apply_diff(there[2], diff, 0.7)["w"]
    wanted = apply_diff(here[2], diff_vector(*here[:2]), 0.7)["w"]
    assert ours.device.type == DEVICE and ours.dtype == dtype
    torch.testing.assert_close(ours.cpu(), wanted)
    with pytest.warns(UserWarning, match="as long as"):
        made = transfer_finetuning(*there)
        cpu = transfer_finetuning(*here)
    assert made.relative == pytest.approx(cpu.relative, rel=1e-4)
    assert (2 * diff - diff).cosine(diff) == pytest.approx(1)
    saved = DiffVector.load(diff.save(tmp_path / "diff.safetensors"))
    assert torch.equal(saved.tensors()["w"], diff.tensors()["w"].cpu())

    names = {"a": there[0], "b": there[1]}
    scores = transfer_matrix(names, {"a": there[1], "b": there[2]}, lambda s: s["w"].double().sum())
    assert scores.recovered[0][0] == 1
    chain = iterative_recycling(there, lambda start: {"w": start["w"] + 1})
    assert all(torch.equal(c["w"], s["w"] + 1) for c, s in zip(chain[:1], there, strict=False))


def test_models_on_the_card(tmp_path):
    base, tuned = (llama("smollm2", layers=2, seed=s) for s in range(2))
    for p, q in zip(tuned.parameters(), base.parameters(), strict=True):
        p.data = q.data + 0.1 * p.data
    new = llama("smollm2", layers=2, seed=2)
    made = transfer_finetuning(base, tuned, new).weights
    out = tmp_path / "out"
    row("memory above three models, written to disk", gib=peak(
        lambda: transfer_finetuning(base, tuned, new, out, overwrite=True)))
    found = checkpoints.load_state(out)
    assert all(torch.equal(found[n], made[n].cpu()) for n in found)
    ids = token_ids(2, 32)
    barrier = linear_barrier(new, tuned.state_dict(), made,
                             lambda m: m(input_ids=ids, labels=ids).loss, n=3)
    assert torch.isfinite(torch.tensor(barrier.losses)).all()
    start = TransferInit(partial(llama, "smollm2", layers=2, seed=2), diff_vector(base, tuned))()
    assert all(torch.equal(t, made[n]) for n, t in start.state_dict().items())


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), lrs=(5e-3,), device=DEVICE, steps=(5, 10, 15, 20, 25),
                        width=32, training=Training(steps=10, batch_size=50))
    assert launch("finetuning_transfer", cfg, root=tmp_path).claims


def test_step_of_full():
    "All weights in float32 are trained, as FULL does; the lesson counts with 700 tokens a sample."
    with torch.device(DEVICE):
        model = Olmo2ForCausalLM(Olmo2Config(**{**OLMO, "num_hidden_layers": 4})).train()
    ids = token_ids(FULL.language.batch_size, 700)
    batch = {"input_ids": ids, "labels": ids}
    adam = torch.optim.AdamW(model.parameters(), lr=FULL.language.lr, fused=True)

    def step():
        adam.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = modules.cross_entropy(model, batch)
        loss.backward()
        adam.step()

    full("OLMo 2 7B, 4 of 32 layers, 8 x 700 tokens", model, batch, step,
         autocast=torch.bfloat16, rounds=3)


def versions():
    "Old base, old fine-tune, new base: state dicts of OLMo 2 7B's shapes in bfloat16."
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in Olmo2ForCausalLM(Olmo2Config(**OLMO)).state_dict().items()}
    place = {"device": DEVICE, "dtype": torch.bfloat16}
    base = {n: torch.empty(s, **place).normal_(std=0.02) for n, s in shapes.items()}
    return [base, *({n: t + size * torch.randn_like(t) for n, t in base.items()}
                    for size in (1e-3, 3e-3))]


def plain(base, tuned, new):
    "As the official script does it, the norms of the diff left out."
    return {n: (t.double() + (tuned[n].double() - base[n].double())).to(t.dtype)
            for n, t in new.items()}


def test_transfer_of_full():
    "Three models and the result in memory, on the card; a part of a layer on the host."
    states = versions()
    numbers = [t.numel() for t in states[0].values()]
    held = (4 * 2 * sum(numbers) + 2 * 8 * max(numbers)) / 2**30  # and two tensors in float64
    made, name = transfer_finetuning(*states).weights, next(iter(states[0]))
    assert torch.equal(made[name], plain(*({name: s[name]} for s in states))[name])
    del made
    reference, _ = clock(partial(plain, *states), rounds=2, warm=1)
    seconds, gib = clock(partial(transfer_finetuning, *states), rounds=2, warm=1)
    row(f"transfer of {sum(numbers) / 1e9:.1f} billion weights", seconds, gib,
        reference=reference, against="a plain sum, without checks", counted=(None, held))
    host = [{n: t.cpu() for n, t in s.items() if "layers.0.self_attn" in n} for s in states]
    del states
    numbers = sum(t.numel() for t in host[0].values())
    reference, _ = clock(partial(plain, *host), rounds=1, warm=1)
    seconds, _ = clock(partial(transfer_finetuning, *host), rounds=1, warm=1)
    row(f"transfer of {numbers / 1e6:.0f} million weights, on the host", seconds,
        reference=reference, against="a plain sum, without checks")
