"""LT-SFT on a GPU: both phases, models that move, the Trainer, FULL's step, the experiment."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptlab import recipes
from adaptlab.bench import cost
from adaptlab.bench.runs import launch
from adaptlab.experiments import lt_sft as experiment
from adaptlab.experiments.lt_sft import FULL, SMALL
from adaptlab.sparse.lt_sft import (
    SftArguments, SparseDelta, SparseFineTuner, VectorPhase, movements, prepare_body, select, tune)
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, clock, full, machine, once, peak, row, token_ids


def training(batch, device=None):
    "A `train_fn` on one batch; `device`: it moves the model there, as `fitting` does."
    def train_fn(model, steps, grad_hook):
        model.to(device)
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3,
                                 weight_decay=0.0)
        for _ in range(steps):
            adam.zero_grad()
            model(**batch).loss.backward()
            grad_hook()
            adam.step()
    return train_fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_phases_and_a_delta(dtype, tmp_path):
    torch.manual_seed(0)
    model = recipes.tiny_llama(hidden_size=64, layers=2).to(DEVICE, dtype)
    ids = token_ids(4, 16) % 260
    batch, before = {"input_ids": ids, "labels": ids}, [p.clone() for p in model.parameters()]

    def same():
        return all(map(torch.equal, model.parameters(), before))

    found = {}
    for kind, options in {"LT": {"l1": 0.1}, "random": {"selection": "random", "n_iterations": 2},
                          "rounds": {"n_iterations": 2}}.items():
        sft = SparseFineTuner(model, density=0.02, **options)
        found[kind] = sft.fit(training(batch), dense_steps=3, sparse_steps=3)
        assert same() and sum(map(len, sft.chosen.values())) == sft.k
    with torch.no_grad(), found["LT"].applied(model):
        changed = model(**batch).loss
    assert same() and changed < model(**batch).loss
    both = found["LT"] + found["random"].scale(0.5)
    both.save_pretrained(tmp_path)
    with SparseDelta.from_pretrained(tmp_path).applied(model), (-both).applied(model):
        assert not same()
    assert same() and 0 < found["LT"].overlap(found["rounds"]) <= both.density


def test_a_model_that_training_moves():
    "It starts on the CPU; training brings it to the card in the middle of either phase."
    torch.manual_seed(0)
    x, y = torch.randn(32, 8, device=DEVICE), torch.arange(32, device=DEVICE) % 4

    class Net(recipes.MLP):
        def forward(self, x, y):
            return SimpleNamespace(loss=F.cross_entropy(super().forward(x), y))

    for options in ({"l1": 0.1}, {"selection": "random"}):
        model = Net((8, 16, 4))
        before = [p.clone() for p in model.parameters()]
        delta = SparseFineTuner(model, 40, maskable=["layers"], **options).fit(
            training({"x": x, "y": y}, DEVICE), dense_steps=2, sparse_steps=2)
        assert all(p.device.type == DEVICE and torch.equal(p.cpu(), b)
                   for p, b in zip(model.parameters(), before, strict=True))
        with delta.applied(model.cpu()):
            assert delta.count > 0


def test_trainer(tmp_path):
    from transformers import TrainingArguments

    from adaptlab.sparse.lt_sft import LotteryTicketTrainer

    model = recipes.tiny_llama(hidden_size=32, layers=1)
    rows = [{"input_ids": [5, 7, 9, i + 4], "labels": [5, 7, 9, i + 4]} for i in range(8)]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=DRY,
        disable_tqdm=True, logging_strategy="no")
    limits = SftArguments(ft_params_num=50, full_ft_max_steps_per_iteration=2,
                          sparse_ft_max_steps_per_iteration=2)
    found = LotteryTicketTrainer(model, arguments, train_dataset=rows, sft_args=limits).train()
    assert 0 < found.count <= 50


class WithLoss(nn.Module):
    "So that what the loss keeps is counted, too."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, tags):
        return self.model(input_ids=input_ids, labels=tags).loss


def counted(net, batch, trainable):
    "Seconds and GiB of a step that has gradients of all weights, and AdamW for `trainable`."
    flops = cost.forward_flops(net, batch, 1)
    found = cost.needs(net, flops=flops, trained=1, machine=machine(half=False)).set_index("what")
    held = (sum(4 * p.numel() for p in net.parameters()) + 12 * trainable
            + cost.activation_bytes(net, batch))
    return 3600 * found.loc["time", "amount"], held / 2**30


def test_full_shape():
    "XLM-R base fills in words: both phases of a language, at FULL's batch, window and K."
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "vocab_size": 512} if DRY else {
        "vocab_size": 250002}
    with torch.device(DEVICE):
        torch.manual_seed(0)
        model = prepare_body(XLMRobertaForMaskedLM(XLMRobertaConfig(
            max_position_embeddings=514, type_vocab_size=1, **sizes)))
    ids = token_ids(2 if DRY else FULL.language_training.batch_size, FULL.window)
    labels = ids.masked_fill(torch.rand(ids.shape, device=DEVICE) > 0.15, -100)
    batch, net = {"input_ids": ids, "labels": labels}, WithLoss(model)
    told = {"input_ids": ids, "tags": labels}
    sft = SparseFineTuner(model, 1000 if DRY else FULL.language_k, l1=FULL.language_l1)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)

    def step(hook=lambda: None):
        adam.zero_grad()
        model(**batch).loss.backward()
        hook()
        adam.step()

    full(f"phase 1, a step of {len(ids)} x {ids.shape[1]}", net, told, step, rounds=3)
    adam = model.zero_grad()  # None: its moments and all gradients are freed
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds, gib = counted(net, told, trainable)
    train_fn, found = training(batch), []
    base = sum(4 * p.numel() for p in model.parameters()) / 2**30
    held = peak(lambda: found.append(movements(model, sft.maskable, train_fn, 2, sft.strength)))
    row("phase 1, with the weights to go back to", gib=held + base,
        counted=(None, gib + 4 * trainable / 2**30))
    chosen = []
    row("choosing K entries", once(lambda: chosen.append(select(found.pop(), sft.k))))
    with VectorPhase(model, chosen[0], sft.maskable, sft.strength) as hook:
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
        heads = trainable - sum(sft.sizes.values())
        row(f"phase 2, a step: K of {sum(sft.sizes.values()) / 1e6:.0f} M",
            *clock(lambda: step(hook), rounds=3, warm=2),
            counted=(seconds, counted(net, told, sft.k + heads)[1]))
    adam = model.zero_grad()
    delta = tune(model, sft.maskable, chosen[0], train_fn, 2, sft.strength)
    row("a delta applied and taken off", *clock(
        lambda: (delta.apply(model), delta.revert(model)), rounds=1, warm=0))


def test_small_experiment(tmp_path, monkeypatch):
    monkeypatch.setitem(experiment.RECIPE, "epochs", 1)
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, images=(64, 32, 64), lrs=(1e-3,),
                        training=Training(steps=3, batch_size=16), shares=(0.1, 0.3),
                        rand=(0.1,), scales=(0.5,))
    assert launch("lt_sft", cfg, root=tmp_path, progress=False).claims
