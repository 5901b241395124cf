"""VTrans on a GPU: masks and slices as on the CPU, in bf16 too; SMALL; a step at FULL's shape."""

import copy

import pytest
import torch

from adaptlab import recipes
from adaptlab.bench.runs import launch
from adaptlab.compression.vtrans import UNITS, VIBPruner, fit
from adaptlab.experiments.vtrans import SMALL
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, in_turn, row, token_ids


def chosen(model, **more):
    pruner = VIBPruner(model, **more).attach().eval()
    pruner.set_kept({m: torch.arange(k.size) < max(1, k.size // 2)
                     for m, k in pruner.masks.items()})
    for mask in pruner.masks.values():
        mask.mu.data = torch.linspace(0.5, 1.5, mask.size, device=DEVICE)
    return pruner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_sliced_is_masked(dtype):
    torch.manual_seed(0)
    ids = token_ids(2, 16) % 200
    for make in (recipes.tiny_llama, lambda: recipes.tiny_bert(n_classes=3)):
        model = make().to(DEVICE, dtype)
        pruner = chosen(model, units=UNITS)
        sliced = pruner.fold_and_slice()
        assert all(p.dtype is dtype and p.device.type == DEVICE for p in sliced.parameters())
        tolerance = 1e-4 if dtype is torch.float32 else 5e-2
        torch.testing.assert_close(sliced(input_ids=ids).logits, pruner({"input_ids": ids}).logits,
                                   atol=tolerance, rtol=tolerance)


def test_fit():
    torch.manual_seed(0)
    model = recipes.TinyViT(dim=24, depth=2, heads=4)
    found = fit(model, (torch.rand(64, 1, 28, 28), torch.arange(64) % 10), steps=4, batch_size=8,
                device=DEVICE, teacher=copy.deepcopy(model).to(DEVICE), target=0.3)
    assert next(found.model.parameters()).device.type == DEVICE


def test_small_through_the_same_code(tmp_path):
    cfg = SMALL.replace(seeds=(0,), steps=2, batch_size=4, images=(100, 10), n_test=50,
                        device=DEVICE, targets=(0.3, 0.4), init_mag=1.0, beta=0.1,
                        tuning=Training(steps=1, batch_size=4))
    report = launch("vtrans", cfg, root=tmp_path)
    table = report.tables["digits"]
    asked_for = (table["method"] != "random") & (table["like"] != "fast")
    assert (table["after"].notna() == asked_for).all() and table["before"].notna().all()


def test_full_shape():
    "A step of RoBERTa-base with masks, against one without."
    from transformers import RobertaConfig, RobertaForSequenceClassification

    toy = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
           "intermediate_size": 32} if DRY else {}
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **toy)
    model = RobertaForSequenceClassification(config).to(DEVICE)
    batch = {"input_ids": token_ids(32, 128) % 50_000 + 5,
             "attention_mask": torch.ones(32, 128, dtype=torch.long, device=DEVICE),
             "labels": torch.arange(32, device=DEVICE) % 2}
    plain = copy.deepcopy(model)
    pruner = VIBPruner(model, units=UNITS).attach()
    masks, adam = pruner.optimizer(), torch.optim.AdamW(
        plain.parameters(), lr=1e-5, fused=True)

    def masked():
        masks.zero_grad()
        pruner.loss(pruner(batch), batch, 1)["total"].backward()
        masks.step()

    def normal():
        adam.zero_grad()
        plain(**batch).loss.backward()
        adam.step()

    ours, reference = in_turn(masked, normal, rounds=5)
    row("FULL: a step with masks, 32 x 128", ours, reference=reference, against="without masks")
