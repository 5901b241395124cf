"""DEFT on a GPU: count and slope, recorder, Trainer, gates, RoBERTa-large, the small experiment."""

from functools import partial

import pytest
import torch
import transformers

from adaptlab import adapters, modules, recipes
from adaptlab.bench import suites
from adaptlab.bench.runs import launch
from adaptlab.experiments.deft import FULL, SMALL
from adaptlab.sparse import deft
from adaptlab.sparse.deft import (
    ActivationRecorder,
    MLPGate,
    activation_density,
    activation_modules,
    deft_loss,
    density_loss,
    density_report,
)
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, full, in_turn, llama, row, token_ids

HALF = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
def test_count_and_slope(dtype):
    torch.manual_seed(0)
    a = torch.randn(2, 64, 128, device=DEVICE).relu().to(dtype)
    sharp = (a * (a > 0.1)).requires_grad_()
    mask = torch.ones(2, 64)  # from a data loader: on the CPU
    for found in (density_loss([sharp]), density_loss([sharp], mask=mask)):
        assert abs(found.item() - activation_density([sharp], mask=mask).item()) < 1e-4
    small = torch.full((1, 1, 4), 2e-4, device=DEVICE, dtype=dtype, requires_grad=True)
    density_loss([small]).backward()
    assert (small.grad > 100).all() and small.grad.isfinite().all()


@pytest.mark.parametrize("dtype", HALF[:2])
def test_on_a_language_model(dtype):
    "The loss through `fit`, the report, and gates that fold."
    model, ids = llama("smollm2", layers=2, dtype=dtype), token_ids(4, 64)
    adapters.attach(model, partial(adapters.LoraAdapter, rank=8), ["q_proj", "v_proj"])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids).cpu()}
    Training(steps=2, batch_size=2).fit(model, batch, deft_loss(eps=1e-3, masked=True),
                                        device=DEVICE, progress=False)
    with ActivationRecorder(model, eps=1e-3) as recorder:
        modules.call(model, batch)
        assert 0 < recorder.loss().item() < 1 and "" in recorder.sides()
    with pytest.warns(UserWarning, match="never exactly zero"):  # SiLU
        assert len(density_report(model, [batch], masked=True)) == len(activation_modules(model))
    adapters.detach(model)
    gates = adapters.adapters(adapters.attach(model, MLPGate, ["down_proj"]))
    with torch.no_grad():
        for gate in gates.values():
            gate.g.sub_(0.5)
        before = modules.logits_of(model(ids)).float()
        after = modules.logits_of(adapters.merge(model)(ids)).float()
    assert (after - before).norm() <= (1e-4 if dtype == torch.float32 else 0.05) * before.norm()


def test_trainer(tmp_path):
    rows = [{"input_ids": [2, 7, 9, i % 5 + 4, 3], "attention_mask": [1] * 5, "labels": i % 2}
            for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, report_to=[], save_strategy="no",
        use_cpu=DRY, disable_tqdm=True, log_level="error")
    trainer = deft.DeftTrainer(recipes.tiny_bert(n_classes=2), arguments, train_dataset=rows)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["density"] <= 1


def roberta_large(training):
    "FULL's model, adapter and batch."
    sizes = dict(vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                 intermediate_size=4096, max_position_embeddings=514, type_vocab_size=1)
    if DRY:
        sizes |= dict(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                      intermediate_size=128)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))
    adapters.attach(model, partial(adapters.LoraAdapter, rank=8, alpha=16, dropout=0.1),
                    ("query", "value"), also_train=("classifier",))
    ids = token_ids(4 if DRY else training.batch_size, FULL.max_length)
    labels = torch.arange(len(ids), device=DEVICE) % 2
    return model.train(), {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                           "labels": labels}


def by_autograd(model, batch):
    "The term written out; autograd keeps what it needs."
    seen = []
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(o))
             for m in activation_modules(model).values()]
    loss = suites.model_loss(model, batch)
    for hook in hooks:
        hook.remove()
    count = [(a.float() ** 2 / (a.float() ** 2 + FULL.eps)).mean() for a in seen]
    return loss + torch.stack(count).mean()


def test_full_shape():
    "A step of FULL, and the same without the term and with the term written out."
    training = FULL.glue_training
    model, batch = roberta_large(training)
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=training.lr, fused=True)

    def step(loss):
        adam.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=training.precision == "bf16"):
            found = loss(model, batch)
        found.backward()
        adam.step()

    ours = partial(step, deft_loss(suites.model_loss))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    full("RoBERTa-large, density loss, 64 x 128", model, inputs, ours, rounds=3,
         autocast=torch.bfloat16 if training.precision == "bf16" else None)
    assert all(p.grad.isfinite().all() for p in adapters.trainable_parameters(model))
    term, plain, naive = in_turn(ours, partial(step, suites.model_loss),
                                 partial(step, by_autograd), rounds=3, warm=1)
    row("the same step", term, reference=plain, against="the step without the term")
    row("the same step", term, reference=naive, against="the term by autograd", bound=1.0)


def test_small_experiment(tmp_path, monkeypatch):
    "All of it, on untrained nets."
    monkeypatch.setattr(recipes, "pretrained_small", lambda name, **options: recipes.TinyViT(
        dim=16, depth=1, act="relu" if "relu" in name else "gelu"))
    few = Training(steps=2, batch_size=16)
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, turn=7.0, images=(32, 32), training=few,
                        lrs=(3e-3,), full_lrs=(1e-3,), weights=(1.0,), cuts=(0.0, 0.1))
    assert launch("deft", cfg, root=tmp_path, progress=False).claims
