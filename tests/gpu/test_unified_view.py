"""The unified view on a GPU: the identity, every preset in both precisions, steps, SMALL."""

import pytest
import torch

from adaptlab import adapters
from adaptlab.bench.runs import launch
from adaptlab.experiments.unified_view import SMALL
from adaptlab.modular import unified_view as uv
from gpu.card import DEVICE, DRY, clock, in_turn, llama, row, token_ids

PRESETS = {
    "Houlsby": uv.houlsby(16), "Pfeiffer": uv.pfeiffer(32),
    "PA attn": uv.parallel_adapter(32, "attn"),
    "scaled PA": uv.scaled_parallel_adapter(32), "prefix": uv.prefix_tuning(30, 64),
    "multi-head": uv.multihead_parallel_adapter(30), "LoRA": uv.lora(16, 32),
    "MAM": uv.mam_adapter(30, 32, 4.0, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_preset_trains(dtype):
    model, ids = llama("smollm2", layers=4, dtype=dtype), token_ids(4, 256)
    with torch.no_grad():
        base = model(input_ids=ids).logits
    for name, preset in PRESETS.items():
        uv.apply_delta(model, preset)
        adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)

        def step(adam=adam):
            adam.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            adam.step()
            return loss.item()

        losses = [step() for _ in range(4)]
        assert losses[-1] < losses[0], name
        row(f"{name}, step, {dtype}", *clock(step))
        with torch.no_grad():
            moved = model(input_ids=ids).logits
            same = uv.materialize_prefix(model)(input_ids=ids).logits
            gap = (same - moved).float().norm() / moved.float().norm()
            assert gap <= (1e-5 if dtype == torch.float32 else 1e-2)
            assert torch.equal(adapters.detach(model)(input_ids=ids).logits, base)


def test_the_gate_on_the_card():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 8, 64, 32, device=DEVICE)
    prefix = uv.Prefix(uv.prefix_tuning(30, None)[0], 8, 32, 256, device=DEVICE)
    torch.nn.init.normal_(prefix.table)
    pk, pv = prefix()
    mask = torch.ones(64, 64, dtype=torch.bool, device=DEVICE).tril()[None, None]

    def run(_, q, k, v, mask, **options):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2), None

    both = uv.attend_with([prefix], run, None, q, k, v, mask, {})[0]
    gate = uv.prefix_gate(q, k, pk, mask).transpose(1, 2)[..., None]
    h = run(None, q, k, v, mask)[0]
    change = ((q @ pk.mT / 32**0.5).softmax(-1) @ pv).transpose(1, 2)
    torch.testing.assert_close(both, (1 - gate) * h + gate * change, rtol=1e-3, atol=1e-3)


def test_step_against_lora():
    model, ids = llama("smollm2", layers=4 if DRY else 12), token_ids(8, 512)
    steps = {}
    for name in ("LoRA", "scaled PA", "MAM"):
        preset = {"LoRA": uv.lora(26, 26), "scaled PA": uv.scaled_parallel_adapter(32),
                  "MAM": uv.mam_adapter(24, 24, 4.0, None)}[name]

        def step(preset=preset):
            uv.apply_delta(model, preset)
            try:
                model(input_ids=ids, labels=ids).loss.backward()
            finally:
                adapters.detach(model)

        steps[name] = step
    lora, *others = in_turn(*steps.values())
    for name, seconds in zip(("scaled PA", "MAM"), others, strict=True):
        row(f"{name} against LoRA, forward and backward", seconds, reference=lora, bound=1.1)


def test_mam_on_the_shape_of_bart_large():
    from transformers import BartConfig, BartForConditionalGeneration

    size = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 512,
            "encoder_ffn_dim": 128, "decoder_ffn_dim": 128} if DRY else {}
    with torch.device(DEVICE):
        model = BartForConditionalGeneration(BartConfig(**size)).to(torch.bfloat16)
    uv.apply_delta(model, uv.mam_adapter())
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=5e-5)
    source, target = token_ids(4, 512), token_ids(4, 128, seed=1)

    def step():
        adam.zero_grad()
        model(input_ids=source, labels=target).loss.backward()
        adam.step()

    row("MAM on BART-large, bf16, step of 4", *clock(step, rounds=5))
    assert all(torch.isfinite(p).all() for p in adapters.trainable_parameters(model))


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE)
    assert launch("unified_view", cfg, root=tmp_path).claims
