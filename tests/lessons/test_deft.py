"""DEFT: the smooth count and its slope, the recorder, the Trainer, gates, bad input, full scale."""

import copy
import warnings

import pytest
import tiny_models
import torch
import two_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaptlab import adapters, modules, recipes
from adaptlab.bench.runs import start_run
from adaptlab.experiments import deft as told
from adaptlab.experiments.deft import FULL, SMALL, experiment
from adaptlab.sparse import deft
from adaptlab.sparse.deft import (
    ActivationRecorder, MLPGate, activation_density, activation_modules, deft_loss, density_loss,
    density_report)
from adaptlab.train import Training
from one_seed import UNDECIDED, goes_on


class Block(nn.Module):
    "An MLP with its activation as a module."

    def __init__(self, act=None, width=8):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, width), act or nn.ReLU(), nn.Linear(width, 4)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


def net(depth=3, **options):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(**options) for _ in range(depth)))


def acts(*widths, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, w, generator=g, dtype=dtype).relu() for w in widths]


# the smooth count


def test_limits_range_and_scale():
    a = acts(6, 11)
    exact = activation_density(a).mean()
    values = [density_loss(a, eps) for eps in (1e-12, 1e-7, 1e-3, 1, 1e6)]
    assert all(x > y for x, y in zip(values, values[1:], strict=False))
    assert abs(values[0] - exact) < 1e-4 and values[-1] < 1e-5 and 0 <= values[1] < 1
    torch.testing.assert_close(density_loss([3 * x for x in a], 9e-3), density_loss(a, 1e-3))
    large = [x * (x > 0.1) for x in a]
    gap = (density_loss(large, 1e-7) - activation_density(large).mean()).abs()
    assert gap <= 1e-7 / 0.1**2


def test_slope_is_the_formula_also_with_a_mask_and_in_half_precision():
    a = [x.requires_grad_() for x in acts(4, 7)]
    assert torch.autograd.gradcheck(lambda *x: density_loss(x, 1e-2), a)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert torch.autograd.gradcheck(lambda *x: density_loss(x, 1e-2, mask=mask), a)
    (g,) = torch.autograd.grad(density_loss(a[:1], 1e-2), a[:1])
    x = a[0].detach()
    torch.testing.assert_close(g, 2 * x * 1e-2 / (x**2 + 1e-2) ** 2 / x.numel())
    half = torch.tensor([[300.0, 1e-4, 0.0]], dtype=torch.float16, requires_grad=True)
    found = density_loss([half])
    found.backward()  # squares of these over- and underflow in float16
    assert found.dtype == torch.float32 and abs(float(found.detach()) - (1 + 1 / 11) / 3) < 1e-3
    assert half.grad.isfinite().all() and half.grad[0, 1] > 0


def test_layers_weigh_alike_and_padding_counts_for_nothing():
    a = acts(4, 400)
    per_layer = activation_density(a)
    torch.testing.assert_close(density_loss(a, 1e-14), per_layer.mean().double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(density_loss(a, weights=torch.tensor([2.0, 0.0])),
                               density_loss(a[:1]))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    each = torch.stack([density_loss([a[0][i : i + 1, : int(n)]]) for i, n in enumerate(
        mask.sum(1))])
    torch.testing.assert_close(density_loss(a[:1], mask=mask), each.mean())
    torch.testing.assert_close(activation_density(a, mask=torch.ones(3, 5)), per_layer)


def test_what_rounds_to_zero():
    z = torch.linspace(-9, 1, 100_001)
    off = nn.functional.gelu(z) == 0
    assert -5.8 < float(z[off & (z < -1)].max()) < -5.3  # of float32
    assert (nn.functional.silu(z[z != 0]) != 0).all()
    g = torch.Generator().manual_seed(0)
    relu = torch.randn(10**5, 1, generator=g).relu()
    assert abs(float(activation_density([relu])) - 0.5) < 0.01


@pytest.mark.parametrize("call, error, words", [
    (lambda: density_loss(acts(3), eps=0), ValueError, "eps = 0"),
    (lambda: density_loss([]), ValueError, "no activations"),
    (lambda: density_loss([torch.ones(3)]), ValueError, "neurons"),
    (lambda: density_loss(acts(3), mask=torch.ones(3, 4)), ValueError, "does not fit"),
    (lambda: deft_loss(weight=-1), ValueError, "weight = -1"),
    (lambda: deft_loss(eps=-1), ValueError, "eps = -1"),
    (lambda: ActivationRecorder(nn.Linear(2, 2)), ValueError, "no module called act"),
    (lambda: ActivationRecorder(net(), mode="both"), ValueError, "mode = 'both'"),
    (lambda: MLPGate(nn.Linear(2, 2), skip=1.5), ValueError, "skip = 1.5"),
    (lambda: density_loss(acts(3), weights=torch.ones(len(acts(3)) + 1)), ValueError, "per layer"),
    (lambda: activation_density(acts(3), -1), ValueError, "threshold = -1"),
    (lambda: density_report(net(), [torch.full((2, 4), torch.nan)]), RuntimeError, "0.act are not"),
    (lambda: density_report(net(), [torch.ones(2, 4)], masked=True), ValueError, "attention_mask"),
])
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


# the recorder


def test_every_activation_once_per_pass_and_nothing_left_behind():
    model, x = net(), torch.randn(2, 5, 4)
    y = model(x)
    with ActivationRecorder(model) as recorder:
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            recorder.loss()
        for _ in range(2):
            assert torch.equal(model(x), y) and len(recorder.found) == 3
        recorder.clear()
        assert not recorder.found
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ZeroDivisionError), ActivationRecorder(model) as recorder:
        model(x)
        1 / 0
    assert not recorder.found and not any(m._forward_hooks for m in model.modules())


def test_a_shared_activation_counts_at_every_call():
    shared = nn.ReLU()
    model, x = net(act=shared), torch.randn(2, 5, 4)
    alone = net()
    alone.load_state_dict(model.state_dict())
    found = []
    for one in (model, alone):
        with ActivationRecorder(one) as recorder:
            one(x)
            found.append(recorder.loss())
            assert len(recorder.found) == 3
    torch.testing.assert_close(*found)


def test_nothing_that_learns_is_an_error_and_so_are_infinite_activations():
    model, x = net().requires_grad_(False), torch.randn(2, 5, 4)
    with ActivationRecorder(model) as recorder, pytest.raises(RuntimeError, match="depends on"):
        model(x)
        recorder.loss()
    with torch.no_grad():
        model[1].fc1.bias.fill_(float("inf"))
    with ActivationRecorder(model) as recorder, pytest.raises(RuntimeError, match="1.act are not"):
        model(x)
        recorder.loss()


def test_checkpointed_blocks_give_the_same_gradients():
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            for block in self.inner:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    grads, x = [], torch.randn(2, 5, 4)
    for wrap in (nn.Sequential, lambda *m: Checkpointed(*m)):
        model = wrap(net())
        with ActivationRecorder(model, eps=1e-2) as recorder:
            (model(x).square().mean() + recorder.loss()).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_sides_of_an_encoder_decoder_are_added():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0))
    ids = torch.randint(1, 50, (2, 6))
    assert len(activation_modules(t5)) == 3
    with ActivationRecorder(t5) as recorder:
        t5(input_ids=ids, labels=ids)
        sides = recorder.sides()
        assert set(sides) == {"encoder", "decoder"}
        torch.testing.assert_close(recorder.loss(), sides["encoder"] + sides["decoder"])
        rows = dict(recorder.found)
        encoder = [v for n, v in rows.items() if n.startswith("encoder")]
        torch.testing.assert_close(sides["encoder"], torch.stack(encoder).mean())


def test_an_adapters_own_activation_is_not_counted():
    class WithAct(adapters.Adapter):
        def __init__(self, layer):
            super().__init__(layer)
            self.act, self.up = nn.ReLU(), nn.Parameter(torch.zeros(()))

        def forward(self, x, base_output):
            return base_output + self.up * self.act(base_output)

    model = net()
    adapters.attach(model, WithAct, ["fc2"])
    assert list(activation_modules(model)) == ["0.act", "1.act", "2.act"]


def test_the_exact_density_is_reported_whatever_the_thresholds():
    model, x = net(), torch.randn(5, 4)
    ours, usual = density_report(model, [x], thresholds=(0.5,)), density_report(model, [x])
    assert [r["density"] for r in ours] == [r["density"] for r in usual]
    assert list(ours[0]) == ["layer", "density", "density@0.5", "mac_fraction"]


def test_a_recorder_is_opened_once_and_wants_every_weight():
    model = net()
    with ActivationRecorder(model) as recorder:
        with pytest.raises(RuntimeError, match="open already"), recorder:
            pass
        model(torch.randn(5, 4))
        with pytest.raises(ValueError, match="no weight for"):
            recorder.loss(weights={"0.act": torch.ones(())})
    assert not any(m._forward_hooks for m in model.modules())


def test_report_adds_up_over_batches_and_warns_of_silu():
    model, x = net(), torch.randn(9, 5, 4)
    whole = density_report(model, [x])
    parts = density_report(model, [x[:2], x[2:]])
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b) and a["mac_fraction"] == pytest.approx((1 + a["density"]) / 2)
        assert a["density"] >= a["density@0.001"] >= a["density@0.1"]
    with pytest.warns(UserWarning, match="never exactly zero"):
        density_report(net(act=nn.SiLU()), [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density_report(model, [x])


# training


def _fit(model, loss, steps=30):
    torch.manual_seed(0)
    x = torch.randn(64, 5, 4)
    adapters.attach(model, lambda m: adapters.LoraAdapter(m, rank=2), ["fc1", "fc2"])
    data = torch.utils.data.TensorDataset(x, x.flip(-1))
    Training(steps=steps, batch_size=16, lr=3e-2).fit(
        model, data, loss, device="cpu", progress=False, seed=0)
    return model, x


def task(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def test_weight_zero_is_plain_training_and_more_weight_leaves_less():
    base = net(width=64)
    plain, x = _fit(copy.deepcopy(base), task)
    zero, _ = _fit(copy.deepcopy(base), deft_loss(task, weight=0))
    heavy, _ = _fit(copy.deepcopy(base), deft_loss(task, weight=5, eps=1e-3))
    for a, b in zip(plain.parameters(), zero.parameters(), strict=True):
        assert torch.equal(a, b)
    low, high = (sum(r["density"] for r in density_report(m, [x])) for m in (heavy, plain))
    assert low < 0.8 * high
    for name, p in base.named_parameters():
        assert torch.equal(p, heavy.get_parameter(name))


def test_gradient_reaches_what_is_below_a_hook_only():
    model, x = net(2), torch.randn(2, 5, 4)
    adapters.attach(model, lambda m: adapters.LoraAdapter(m, rank=2), ["fc1", "fc2"])
    with torch.no_grad():
        for a in adapters.adapters(model).values():
            a.B.normal_()
    with ActivationRecorder(model, eps=1e-1) as recorder:
        model(x)
        recorder.loss().backward()
    found = {n: a.B.grad for n, a in adapters.adapters(model).items()}
    assert found["1.fc2"] is None and all(
        found[n].abs().sum() > 0 for n in ("0.fc1", "0.fc2", "1.fc1"))


def test_masked_loss_needs_the_mask():
    bert = recipes.tiny_bert(n_classes=2)
    ids = torch.randint(5, 40, (2, 6))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    other = batch | {"input_ids": torch.where(mask.bool(), ids, 7)}
    bert.eval()
    masked, unmasked = deft_loss(masked=True, eps=1e-2), deft_loss(eps=1e-2)
    torch.testing.assert_close(masked(bert, batch), masked(bert, other))
    assert abs(unmasked(bert, batch) - unmasked(bert, other)).item() > 1e-6


def test_trainer_adds_the_term_once_per_step(tmp_path):
    from transformers import TrainingArguments

    rows = [{"input_ids": [2, 7, 9, i % 5 + 4, 3], "attention_mask": [1] * 5, "labels": i % 2}
            for i in range(8)]

    def train(weight, accumulate):
        torch.manual_seed(0)
        bert = recipes.tiny_bert(n_classes=2)
        bert.config.hidden_dropout_prob = 0.0
        for m in bert.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        args = TrainingArguments(
            str(tmp_path), max_steps=1, logging_steps=1, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, log_level="error", optim="sgd", learning_rate=1.0,
            max_grad_norm=0.0, per_device_train_batch_size=8 // accumulate, weight_decay=0.0,
            gradient_accumulation_steps=accumulate, lr_scheduler_type="constant")
        trainer = deft.DeftTrainer(bert, args, train_dataset=rows, density_weight=weight, eps=1e-2)
        trainer.train()
        logged = [log for log in trainer.state.log_history if "density" in log]
        assert len(logged) == 1 and 0 < logged[0]["density"] < 1
        return [p.detach() for p in bert.parameters()]

    moved = {}  # what the term alone does in a step of SGD
    for accumulate in (1, 2):
        pairs = zip(train(3.0, accumulate), train(0.0, accumulate), strict=True)
        moved[accumulate] = [a - b for a, b in pairs]
    for a, b in zip(moved[1], moved[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert max(a.abs().max() for a in moved[1]) > 1e-3
    with pytest.raises(ValueError, match="weight = -1"):
        train(-1, 1)
    with pytest.raises(AttributeError, match="DeftTrainers"):
        _ = deft.DeftTrainers


TRAIN = """
import torch

from adaptlab import adapters, processes, recipes
from adaptlab.sparse.deft import ActivationRecorder, deft_loss
from adaptlab.train import Training, set_seed

x, y = torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10
for weight in (0.0, 3.0):
    set_seed(0)
    model = recipes.TinyViT(act="relu")
    adapters.attach(model, lambda m: adapters.LoraAdapter(m, rank=2), ["q_proj", "fc1"])
    Training(steps=4, batch_size=8, lr=1e-2).fit(
        model, (x, y), deft_loss(weight=weight, eps=1e-2), device="cpu", progress=False)
    if processes.is_main():
        with ActivationRecorder(model, eps=1e-2) as recorder:
            print(f"logits-{weight:g}", *model.eval()(x[:1]).flatten().tolist())
            print(f"density-{weight:g}", recorder.loss().item())
"""


def test_two_processes_train_alike(tmp_path, capsys):
    "The mean over each half of a batch is the mean over it, and its gradient is, too."
    found = two_processes.assert_alike(TRAIN, tmp_path, capsys)
    assert found["density-3"] < found["density-0"] - 1e-3


def test_gates_merge_and_skip():
    model, x = net(), torch.randn(2, 5, 4)
    adapters.attach(model, lambda m: MLPGate(m, skip=0.2), ["fc2"])
    gate = adapters.adapters(model)["1.fc2"]
    with torch.no_grad():
        gate.g.fill_(0.5)
    y = model(x)
    torch.testing.assert_close(adapters.merge(model)(x), y)
    adapters.unmerge(model)
    with torch.no_grad():
        gate.g.fill_(-4)
    without = copy.deepcopy(model)
    with torch.no_grad():
        adapters.adapters(without)["1.fc2"].g.fill_(-100)
    torch.testing.assert_close(model.eval()(x), without.train()(x))


# the experiment


def test_cutting_sets_small_activations_to_zero():
    from adaptlab.bench.testbeds import accuracy, digits

    bed = digits(0, base="vit-mnist-relu", sizes=(20, 20))
    part = tuple(t[:300] for t in bed.test)
    none, some, every = (told.cut(bed.model, part, t) for t in (0.0, 0.2, 1e9))
    assert none["accuracy"] == accuracy(bed.model, part) and every["density"] == 0
    rows = density_report(bed.model, [part[0]], thresholds=(0.0,))
    assert none["density"] == pytest.approx(100 * sum(r["density"] for r in rows) / 3, rel=1e-4)
    assert 0 < some["density"] < none["density"]
    assert not any(m._forward_hooks for m in bed.model.modules())


def test_the_size_loss_is_a_mean_of_sizes():
    model = net()
    batch = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        task = modules.cross_entropy(model, batch)
        x, sizes = batch[0], []
        for block in model:
            sizes.append(torch.relu(block.fc1(x)).mean())
            x = block(x)
        torch.testing.assert_close(told.size_loss(model, batch, 2.0), task + 2 * torch.stack(
            sizes).mean())


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(seeds=(0,), images=(32, 32), lrs=(1e-2,), full_lrs=(1e-3,), cuts=(0.0, 0.2),
                        training=Training(steps=1, batch_size=8))
    report = goes_on(told, cfg, tmp_path, monkeypatch)
    assert {c.verdict for c in report.claims} == UNDECIDED


def test_full_scale_path_with_a_tiny_model(tmp_path, recorded, monkeypatch):
    cfg = FULL.replace(model=tiny_models.roberta(tmp_path / "model"), device="cpu", seeds=(0,),
                       glue_lrs=(1e-3,), max_length=16,
                       glue_training=Training(steps=1, batch_size=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tiny GELU model is never exactly zero
        report = experiment(cfg, start_run("deft", cfg, "full", root=tmp_path / "runs"))
    table = report.tables["glue"]
    assert sorted(table["task"].unique()) == sorted(FULL.glue) and len(table) == 16
    assert table["density@0.1"].between(0, 100).all()
