"""The unified view on a GPU: the identity, every preset in both precisions, SMALL, FULL's steps."""

import pytest
import torch

from adaptlab import adapters, recipes
from adaptlab.bench import suites
from adaptlab.bench.runs import launch
from adaptlab.experiments import unified_view as told
from adaptlab.experiments.unified_view import FULL, SMALL
from adaptlab.modular import unified_view as uv
from gpu.card import DEVICE, DRY, full, in_turn, llama, row, token_ids

PRESETS = {
    "Houlsby": uv.houlsby(16), "Pfeiffer": uv.pfeiffer(32),
    "PA attn": uv.parallel_adapter(32, "attn"),
    "scaled PA": uv.scaled_parallel_adapter(32), "prefix": uv.prefix_tuning(30, 64),
    "multi-head": uv.multihead_parallel_adapter(30), "LoRA": uv.lora(16, 32),
    "MAM": uv.mam_adapter(30, 32, 4.0, None),
}


def stepper(model, loss, **options):
    "A step of training on what is trainable; it returns the loss, still on the card."
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), fused=True, **options)

    def step():
        adam.zero_grad()
        found = loss()
        found.backward()
        adam.step()
        return found.detach()

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_preset_trains(dtype):
    model, ids = llama("smollm2", layers=2, dtype=dtype), token_ids(2, 64)
    with torch.no_grad():
        base = model(input_ids=ids).logits
    for name, preset in PRESETS.items():
        count = uv.count_delta_parameters(preset, model)
        uv.apply_delta(model, preset)
        step = stepper(model, lambda: model(input_ids=ids, labels=ids).loss, lr=1e-2)
        losses = [step() for _ in range(4)]
        assert losses[-1] < losses[0], name
        with torch.no_grad():
            moved = model(input_ids=ids).logits
            same = uv.materialize_prefix(model)(input_ids=ids).logits
            gap = (same - moved).float().norm() / moved.float().norm()
            assert gap <= (1e-5 if dtype == torch.float32 else 1e-2)
            assert adapters.count_parameters(model)[0] == count
            if name in ("prefix", "MAM"):
                gates = uv.prefix_gates(model, {"input_ids": ids}).values()
                assert all(0 < gate.float().mean() < 1 for gate in gates)
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
    "At equal count, about 37,000 numbers for a block; each on a model of its own."
    ids, steps = token_ids(8, 512), []
    for preset in (uv.lora(26, 26), uv.scaled_parallel_adapter(32),
                   uv.mam_adapter(24, 24, 4.0, None)):
        model = llama("smollm2", layers=4 if DRY else 12)
        uv.apply_delta(model, preset)
        steps.append(stepper(model, lambda model=model: model(input_ids=ids, labels=ids).loss,
                             lr=1e-4))
    lora, *others = in_turn(*steps, rounds=7)
    for name, seconds in zip(("scaled PA", "MAM"), others, strict=True):
        row(f"{name}, a step, 4,096 tokens", seconds, reference=lora, against="LoRA, r = 26",
            bound=1.1)


def test_full_step_of_roberta():
    "GLUE: MAM at half a percent, texts of 128 tokens, in float32 as FULL says."
    from transformers import RobertaConfig, RobertaForSequenceClassification

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 128, "vocab_size": 512} if DRY else {"vocab_size": 50265}
    t = FULL.glue_training
    with torch.device(DEVICE):
        model = RobertaForSequenceClassification(RobertaConfig(
            num_labels=3, max_position_embeddings=514, type_vocab_size=1, **size)).train()
    uv.apply_delta(model, told.SMALL_SHARE["MAM"], also_train=("classifier",))
    ids = token_ids(t.batch_size, 128)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
             "labels": torch.arange(len(ids), device=DEVICE) % 3}
    step = stepper(model, lambda: suites.model_loss(model, batch), lr=1e-4)
    full("RoBERTa-base, MAM, 32 x 128 tokens", model, batch, step)
    assert all(torch.isfinite(p).all() for p in adapters.trainable_parameters(model))


def test_full_step_of_bart():
    "XSum: MAM, 64 articles of 512 tokens with summaries of 128."
    from transformers import BartConfig, BartForConditionalGeneration

    size = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 512,
            "encoder_ffn_dim": 128, "decoder_ffn_dim": 128} if DRY else {}
    with torch.device(DEVICE):
        model = BartForConditionalGeneration(BartConfig(**size)).train()
    uv.apply_delta(model, told.LARGE_SHARE["MAM"])
    texts = FULL.xsum.batch_size if not DRY else 2
    source, target = (token_ids(texts, n, seed=n) for n in told.TEXTS["xsum"].lengths)
    batch = {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": target}

    def loss():
        with torch.autocast(DEVICE, torch.bfloat16):
            return told.smoothed(model, batch)

    full("BART-large, MAM, 64 x (512 + 128) tokens", model, batch,
         stepper(model, loss, lr=5e-5, weight_decay=0.01), autocast=torch.bfloat16, rounds=3)
    assert all(torch.isfinite(p).all() for p in adapters.trainable_parameters(model))


def test_small_experiment(tmp_path, monkeypatch):
    "Every choice of SMALL in two steps; an untrained model and random bytes."
    ids = token_ids(48, told.LENGTH).cpu() % 250
    monkeypatch.setattr(told, "small_translator", lambda: recipes.tiny_llama(
        layers=2, kv_heads=4, max_length=64))
    monkeypatch.setattr(told, "pairs", lambda languages: {"input_ids": ids, "labels": ids})
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, names=(32, 8), lrs=(1e-2,),
                        training={"steps": 2, "batch_size": 8})
    assert launch("unified_view", cfg, root=tmp_path).claims
