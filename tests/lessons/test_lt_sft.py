"""LT-SFT: selection, both phases, deltas that add and revert, files, bad input, full scale."""

import copy
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import schemas
import tiny_models
import torch
from torch import nn

from adaptlab import modules, recipes, weights
from adaptlab.bench.runs import start_run
from adaptlab.experiments import lt_sft as told
from adaptlab.experiments.lt_sft import FULL, SMALL, experiment
from adaptlab.sparse.lt_sft import (
    SftArguments, SparseDelta, SparseFineTuner, VectorPhase, base_digests, fitting,
    movements, phase_steps, select, tune,
)
from adaptlab.train import Training
from one_seed import UNDECIDED, goes_on

torch.manual_seed(0)
X, Y = torch.randn(64, 6), torch.randint(3, (64,), generator=torch.Generator().manual_seed(0))


def mlp(seed=0):
    torch.manual_seed(seed)
    return recipes.MLP((6, 8, 3))


def loop(optimizer=torch.optim.SGD, **options):
    "A train_fn that uses plain PyTorch."
    def train_fn(model, steps, grad_hook):
        made = optimizer([p for p in model.parameters() if p.requires_grad], **options)
        for _ in range(steps):
            made.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            grad_hook()
            made.step()

    return train_fn


SGD = loop(lr=0.3)
ROOT = Path(__file__).parents[2]
TWO = """
import sys
import torch
from adaptlab import modules, processes, recipes
from adaptlab.sparse.lt_sft import SparseFineTuner, fitting
from adaptlab.train import Training

torch.manual_seed(0)
net = recipes.MLP((6, 8, 3))
x, y = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3
run = fitting(Training(steps=1, batch_size=8, lr=0.01), (x, y), modules.cross_entropy, seed=0,
              device="cpu", progress=False)
delta = SparseFineTuner(net, 9, maskable=["layers"]).fit(run, dense_steps=6, sparse_steps=6)
if processes.is_main():
    delta.save_pretrained(sys.argv[1])
"""


def fit(model, k, steps=6, **options):
    sft = SparseFineTuner(model, k, **{"maskable": ["layers"]} | options)
    return sft, sft.fit(SGD, dense_steps=steps, sparse_steps=steps)


# selection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_is_the_global_top_k_and_exact_in_ties(dtype):
    g = torch.Generator().manual_seed(0)
    sizes = {"a": (40, 30), "b": 500}
    moved = {n: torch.rand(size, generator=g).to(dtype) for n, size in sizes.items()}
    flat = torch.cat([m.flatten() for m in moved.values()]).float()
    for k in (1, 13, 800, 1700):
        chosen = select(moved, k)
        assert sum(map(len, chosen.values())) == k
        found = torch.cat([moved[n].flatten()[i] for n, i in chosen.items()]).float()
        assert torch.equal(found.sort().values, flat.topk(k).values.sort().values)
    same = select({"a": torch.ones(5), "b": torch.ones(5)}, 7)  # the first ones
    assert same["a"].tolist() == [0, 1, 2, 3, 4] and same["b"].tolist() == [0, 1]


def test_one_tensor_that_moves_more_takes_the_budget():
    moved = {n: torch.rand(100, generator=torch.Generator().manual_seed(i)) + 0.01
             for i, n in enumerate("abc")}
    counts = {n: len(i) for n, i in select(moved | {"b": 100 * moved["b"]}, 90).items()}
    assert counts.get("b", 0) == 90


@pytest.mark.parametrize("k", [-1, 11])
def test_more_than_there_is(k):
    with pytest.raises(ValueError, match="10 entries"):
        select({"a": torch.ones(10)}, k)
    with pytest.raises(ValueError, match="diverged"):
        select({"a": torch.tensor([1.0, float("nan")])}, 1)


# phases


@pytest.mark.parametrize("optimizer, options", [
    (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0, "fused": True}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0, "foreach": True}),
])
def test_both_phases_train_what_masks_do(optimizer, options):
    "Against dense gradients, masked by hand; a new optimiser, nothing left of phase 1."
    net, names = mlp(), ["layers.0.weight", "layers.0.bias"]
    chosen = select(movements(net, names, loop(optimizer, **options), 5), 20)
    delta = tune(net, names, chosen, loop(optimizer, **options), 8)
    by_hand = copy.deepcopy(net)
    masks = {n: torch.zeros_like(p) for n, p in by_hand.layers.named_parameters("layers")}
    for n, i in chosen.items():
        masks[n].view(-1)[i] = 1
    made = optimizer(by_hand.parameters(), **options)
    for _ in range(8):
        made.zero_grad()
        nn.functional.cross_entropy(by_hand(X), Y).backward()
        for n, p in by_hand.layers.named_parameters("layers"):
            p.grad.mul_(masks[n])
        made.step()
    with delta.applied(net):
        torch.testing.assert_close(net.state_dict(), by_hand.state_dict(), rtol=1e-5, atol=1e-6)
    assert not hasattr(net, "sft_values")


def test_others_stay_bit_for_bit_and_the_model_is_left_as_found():
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    sft, delta = fit(net, 17)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert sum(map(len, sft.chosen.values())) == 17 and delta.count == 17
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    with delta.applied(net):
        moved = {n: (v != before[n]).flatten().nonzero()[:, 0] for n, v in net.state_dict().items()
                 if "layers" in n}
    assert {n: i.tolist() for n, i in moved.items() if len(i)} == {
        n: i.tolist() for n, i in sft.chosen.items()}


def test_all_is_dense_and_none_is_the_head():
    net = mlp()
    dense = copy.deepcopy(net)
    SGD(dense, 6, lambda: None)
    _, everything = fit(net, 56)
    with everything.applied(net):
        torch.testing.assert_close(net.state_dict(), dense.state_dict(), rtol=1e-5, atol=1e-6)
    _, nothing = fit(net, 0)
    assert nothing.count == 0 and sorted(nothing.abs) == ["head.bias", "head.weight"]
    assert not torch.equal(nothing.abs["head.weight"], net.head.weight)


def test_weight_decay_does_not_move_what_the_vector_leaves_out():
    net, decay = mlp(), loop(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    chosen = {"layers.0.weight": torch.tensor([3, 7])}
    before = net.layers[0].weight.detach().clone()
    with VectorPhase(net, chosen, ["layers.0.weight", "layers.0.bias"]) as hook:
        decay(net, 3, hook)
    assert (net.layers[0].weight != before).flatten().nonzero()[:, 0].tolist() == [3, 7]


def test_l1_adds_the_sign_and_nothing_at_the_start():
    net, chosen = mlp(), {"layers.0.weight": torch.tensor([3, 7])}
    with VectorPhase(net, chosen, ["layers.0.weight", "layers.0.bias"], strength=0.25) as hook:
        for shift, sign in ((0.0, 0.0), (1.0, 1.0), (-2.0, -1.0)):
            hook.v.data, hook.v.grad = hook.first + shift, torch.zeros(2)
            head = net.head.bias
            head.data, head.grad = hook.starts[-1] + shift, torch.zeros(3)
            hook()
            assert hook.v.grad.tolist() == [0.25 * sign] * 2
            assert head.grad.tolist() == [0.25 * sign] * 3


def test_a_loop_that_forgets_the_hook():
    net = mlp()

    def forgetful(model, steps, grad_hook):
        SGD(model, steps, lambda: None)

    assert SparseFineTuner(net, 5, maskable=["layers"]).fit(
        forgetful, dense_steps=2, sparse_steps=2).count == 5
    with pytest.raises(RuntimeError, match="never called"):
        SparseFineTuner(net, 5, maskable=["layers"], l1=0.1).fit(
            forgetful, dense_steps=2, sparse_steps=2)


def test_an_optimiser_from_outside():
    "It does not hold the chosen entries: an empty delta would come out."
    net = mlp()
    made = torch.optim.SGD(net.parameters(), lr=0.3)
    before = copy.deepcopy(net.state_dict())

    def train_fn(model, steps, grad_hook):
        for _ in range(steps):
            made.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            made.step()

    with pytest.raises(RuntimeError, match="make its own"):
        SparseFineTuner(net, 9, maskable=["layers"]).fit(train_fn, dense_steps=2, sparse_steps=2)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    with VectorPhase(net, {"layers.0.weight": torch.tensor([1])}, ["layers.0.weight"]):
        torch.optim.SGD(mlp().parameters(), lr=0.3).step()  # of another model


@pytest.mark.parametrize("k", [0, 9])
def test_a_phase_2_that_diverges(k):
    net, rates = mlp(), iter([0.1, float("inf")])
    before = copy.deepcopy(net.state_dict())

    def train_fn(model, steps, grad_hook):
        loop(lr=next(rates))(model, steps, grad_hook)

    with pytest.raises(ValueError, match="phase 2 diverged"):
        SparseFineTuner(net, k, maskable=["layers"]).fit(train_fn, dense_steps=3, sparse_steps=9)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())


def test_positions_that_cannot_be_trained():
    net, weight = mlp(), "layers.0.weight"
    for chosen, words in [({"head.weight": torch.tensor([1])}, "head.weight is no maskable"),
                          ({weight: torch.tensor([48])}, "from 0 to 47"),
                          ({weight: torch.ones(48, dtype=torch.bool)}, "int64")]:
        with pytest.raises(ValueError, match=words):
            tune(net, [weight], chosen, SGD, 2)
    with pytest.raises(ValueError, match="layers.9 is no trainable"):
        movements(net, ["layers.9"], SGD, 2)
    with pytest.raises(ValueError, match="negative"):
        select({"a": torch.tensor([1.0, -3.0])}, 1)
    delta = some_delta(net, 0)
    net.layers[0].weight.data = net.layers[0].weight.data.t().contiguous().t()
    for work in (lambda: delta.apply(net),
                 lambda: tune(net, [weight], {weight: torch.tensor([1])}, SGD, 2)):
        with pytest.raises(ValueError, match="not contiguous"):
            work()


def test_a_copy_of_a_model_has_the_same_deltas_on_it():
    net = mlp()
    before, a, b = copy.deepcopy(net.state_dict()), some_delta(net, 0), some_delta(net, 1)
    with a.applied(net):
        other = copy.deepcopy(net)
        with pytest.warns(UserWarning, match="added twice"):
            a.apply(other)
        b.apply(other)
        for delta in (a, a, b):
            delta.revert(other)
    for model in (net, other):
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_rounds_share_the_budget_and_keep_earlier_entries():
    net = mlp()
    sft, delta = fit(net, 10, n_iterations=3)
    assert sum(map(len, sft.chosen.values())) == 10 and 0 < delta.count <= 10
    random, made = fit(net, 10, selection="random", seed=3)
    again, _ = fit(net, 10, selection="random", seed=3)
    assert made.count == 10 and all(
        torch.equal(random.chosen[n], again.chosen[n]) for n in random.chosen)


def test_half_precision_keeps_the_vector_in_float32():
    net = mlp().bfloat16()

    def train_fn(model, steps, grad_hook):
        made = torch.optim.SGD(model.parameters(), lr=1e-4)
        for _ in range(steps):
            made.zero_grad()
            nn.functional.cross_entropy(model(X.bfloat16()), Y).backward()
            grad_hook()
            made.step()

    delta = tune(net, ["layers.0.weight"], {"layers.0.weight": torch.arange(9)}, train_fn, 3)
    values = delta.diffs["layers.0.weight"].values
    assert values.dtype == torch.float32 and 0 < values.abs().max() < 1e-2


# deltas


def some_delta(net, seed, names=("layers.0.weight",), k=7):
    g = torch.Generator().manual_seed(seed)
    params = dict(net.named_parameters())
    chosen = select({n: torch.rand(params[n].shape, generator=g) for n in names}, k)
    return SparseDelta({n: weights.SparseDelta(i, torch.randn(len(i), generator=g),
                                               tuple(params[n].shape)) for n, i in chosen.items()},
                       base=base_digests(net, chosen), total=48)


def test_order_does_not_matter_and_revert_is_exact():
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    a, b = some_delta(net, 0, k=30), some_delta(net, 1, k=30)
    found = []
    for first, second in ((a, b), (b, a)):
        first.apply(net)
        second.apply(net)
        found.append(net.layers[0].weight.detach().clone())
        first.revert(net)
        second.revert(net)
        assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    with (a + b).applied(net):
        found.append(net.layers[0].weight.detach().clone())
        assert list(net.state_dict()) == list(before)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-6)
    assert not any(t.abs().max() > 1e-6 for t in (a + -a).dense().values())
    torch.testing.assert_close(a.scale(2.0).dense(), (a + a).dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_comes_off_a_model_that_was_moved(dtype):
    "Training puts the model on a GPU while a delta is applied: its tensors are others then."
    net = mlp()
    heads = {"head.bias": torch.ones_like(net.head.bias)}
    before = {n: v.to(dtype) for n, v in copy.deepcopy(net.state_dict()).items()}
    delta = replace(some_delta(net, 0), abs=heads)
    with delta.applied(net):
        for p in net.parameters():
            p.data = p.data.to(dtype, copy=True)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())


def test_disjoint_deltas_leave_each_other_intact():
    net = mlp()
    start = net.layers[0].weight.detach().clone().view(-1)
    at = {"a": torch.arange(0, 48, 2), "b": torch.arange(1, 48, 2)}
    made = {n: SparseDelta({"layers.0.weight": weights.SparseDelta(i, torch.ones(24), (8, 6))},
                           total=48) for n, i in at.items()}
    assert made["a"].overlap(made["b"]) == 0 and made["a"].overlap(made["a"]) == 0.5
    with (made["a"] + made["b"]).applied(net):
        now = net.layers[0].weight.view(-1)
        assert torch.equal(now, start + 1)


def test_overlap_of_random_masks_is_the_product_of_densities():
    def delta(seed, k):
        g = torch.Generator().manual_seed(seed)
        i = select({"w": torch.rand(100_000, generator=g)}, k)["w"]
        return SparseDelta({"w": weights.SparseDelta(i, torch.ones(k), (100_000,))}, total=100_000)

    assert delta(0, 20_000).overlap(delta(1, 30_000)) == pytest.approx(0.06, abs=0.002)


def test_what_cannot_be_applied(tmp_path):
    net = mlp()
    a = some_delta(net, 0)
    with pytest.raises(ValueError, match="not those that the delta was made for"):
        a.apply(mlp(seed=1))
    with pytest.raises(ValueError, match="no such tensor"):
        a.apply(nn.Linear(6, 8))
    with pytest.raises(ValueError, match=r"\(8, 6\) in the delta"):
        a.apply(recipes.MLP((7, 8, 3)))
    with pytest.raises(RuntimeError, match="not applied"):
        a.revert(net)
    with a.applied(net), pytest.warns(UserWarning, match="added twice"):
        a.apply(net)
        a.revert(net)
    with pytest.raises(ValueError, match="finite"):
        weights.SparseDelta(torch.tensor([0]), torch.tensor([float("inf")]), (3,))
    head = replace(a, abs={"head.weight": torch.zeros(4, 8)})
    with pytest.raises(ValueError, match="with_abs=False"):
        head.apply(net)
    with head.applied(net, with_abs=False):
        pass
    with pytest.raises(ValueError, match="both have a head.weight"):
        head + head
    with pytest.raises(ValueError, match="bases differ"):
        a + some_delta(mlp(seed=1), 0)
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        SparseDelta.from_pretrained(tmp_path)


def test_a_task_is_learnt_on_top_of_a_language_and_moved_to_another():
    net = mlp()
    english, other = some_delta(net, 1, k=9), some_delta(net, 2, k=9)
    with english.applied(net):
        _, task = fit(net, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with (other + task).applied(net):  # the same base, whatever was on it
            pass
        with other.applied(net), task.applied(net):
            pass
    assert not torch.equal(task.abs["head.bias"], net.head.bias)


def test_files_are_exact_and_grow_with_k(tmp_path):
    net = mlp()
    _, delta = fit(net, 20)
    size = delta.save_pretrained(tmp_path).stat().st_size
    again = SparseDelta.from_pretrained(tmp_path)
    with delta.applied(net):
        wanted = copy.deepcopy(net.state_dict())
    with again.applied(net):
        assert all(torch.equal(v, wanted[n]) for n, v in net.state_dict().items())
    assert again.total == delta.total == 56 and again.base == delta.base
    large, small = (SparseDelta({"w": weights.SparseDelta(
        torch.arange(n), torch.ones(n), (2000, 2000))}) for n in (1020, 20))
    grown = large.save_pretrained(tmp_path / "a").stat().st_size - small.save_pretrained(
        tmp_path / "b").stat().st_size
    assert 12_000 <= grown <= 12_100 and size < 4000  # int64 positions, float32 values


def test_half_precision_copy_is_the_same_base():
    net = mlp()
    a = some_delta(net, 0)
    half = copy.deepcopy(net).bfloat16()
    before = half.layers[0].weight.detach().clone()
    with a.applied(half):
        assert not torch.equal(half.layers[0].weight, before)
    assert torch.equal(half.layers[0].weight, before)


# bad input


@pytest.mark.parametrize("options, error, words", [
    ({"num_params": 57}, ValueError, "num_params = 57: there are 56"),
    ({"num_params": -1}, ValueError, "num_params = -1: there are 56"),
    ({"density": 1.5}, ValueError, "density = 1.5: a share of the 56"),
    ({"density": -0.1}, ValueError, "density = -0.1"),
    ({"num_params": 3, "density": 0.1}, ValueError, "give one"),
    ({"maskable": ["nowhere"]}, KeyError, "nowhere"),
    ({"maskable": "layers"}, TypeError, "list of names"),
    ({"selection": "best"}, ValueError, "magnitude_change"),
    ({"n_iterations": 0}, ValueError, "n_iterations = 0"),
    ({"l1": -1.0}, ValueError, "l1 = -1.0"),
])
def test_settings_that_cannot_be(options, error, words):
    with pytest.raises(error, match=words):
        SparseFineTuner(mlp(), **{"maskable": ["layers"]} | options)


def test_frozen_and_quantised_weights():
    net = mlp()
    net.layers[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="is frozen"):
        SparseFineTuner(net, 3, maskable=["layers.0.weight"])
    net.layers[0].weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="int8"):
        SparseFineTuner(net, 3)


def test_lengths_of_phases():
    with pytest.raises(ValueError, match="give max_epochs or max_steps"):
        phase_steps(100, 10)
    with pytest.raises(ValueError, match="min_steps = 9 > max_steps = 8"):
        phase_steps(100, 10, 1, 9, 8)
    for numbers in ((100, 0, 1), (100, 10, -1), (100, 10, None, None, 0)):
        with pytest.raises(ValueError, match="must be positive"):
            phase_steps(*numbers)
    for steps in ({"sparse_steps": 3}, {"dense_steps": 3, "sparse_steps": 0}):
        with pytest.raises(ValueError, match="length of each phase"):
            SparseFineTuner(mlp(), 3, maskable=["layers"]).fit(SGD, **steps)


def test_trainer_equals_the_fine_tuner(tmp_path):
    "The Trainer's phases train what SparseFineTuner's do, by the same steps."
    from transformers import TrainingArguments

    from adaptlab.sparse.lt_sft import LotteryTicketTrainer

    torch.manual_seed(0)
    bert = recipes.tiny_bert(n_classes=2, hidden_size=16, layers=1).eval()
    for p in bert.modules():
        if isinstance(p, nn.Dropout):
            p.p = 0.0
    rows = [{"input_ids": [2, 7, 9, i % 5 + 4, 3], "attention_mask": [1] * 5, "labels": i % 2}
            for i in range(8)]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, log_level="error",
        logging_strategy="no", max_grad_norm=0.0)
    limits = SftArguments(ft_params_num=200, full_ft_max_steps_per_iteration=3,
                          sparse_ft_max_epochs_per_iteration=4)
    assert (limits.steps("full", 8, 8), limits.steps("sparse", 8, 8)) == (3, 4)
    found = LotteryTicketTrainer(bert, arguments, train_dataset=rows, sft_args=limits).train()
    batch = {k: torch.tensor([row[k] for row in rows]) for k in rows[0]}

    def train_fn(model, steps, grad_hook):
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3,
                                 weight_decay=0.0)
        linear = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: 1 - t / steps)
        for _ in range(steps):
            adam.zero_grad()
            model(**batch).loss.backward()
            grad_hook()
            adam.step()
            linear.step()

    wanted = SparseFineTuner(bert, 200).fit(train_fn, dense_steps=3, sparse_steps=4)
    assert sorted(found.abs) == ["classifier.bias", "classifier.weight"]
    torch.testing.assert_close(found.dense(), wanted.dense(), rtol=1e-3, atol=1e-6)


def test_masks_by_random_draw_from_what_moves():
    "Entries that never move (of pixels that are always black) are not drawn."
    bed = told.skills(0, (40, 8, 8))
    arms = told.Arms(SMALL.replace(training=Training(steps=2, batch_size=8), device="cpu"))
    _, dense = arms.make(bed.model, bed, 0, kind="dense", share=1.0, lr=1e-3)
    _, made = arms.make(bed.model, bed, 0, kind="random", share=0.1, lr=1e-3)
    for skill, d in made.items():
        moved = {n: m != 0 for n, m in dense[skill].dense().items()}
        assert d.count > 0.99 * round(0.1 * d.total)
        assert all(moved[n].flatten()[c.indices].all() for n, c in d.diffs.items())


def test_two_processes_train_the_same_deltas(tmp_path):
    "Each process reads half of a batch; gradients are gathered after they were averaged."
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", str(script), str(tmp_path / "two")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    delta = SparseDelta.from_pretrained(tmp_path / "two")
    net = mlp()
    x, y = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3
    run = fitting(Training(steps=1, batch_size=8, lr=0.01), (x, y), modules.cross_entropy, seed=0,
                  device="cpu", progress=False)
    alone = SparseFineTuner(net, 9, maskable=["layers"]).fit(run, dense_steps=6, sparse_steps=6)
    torch.testing.assert_close(delta.dense(), alone.dense(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(delta.abs, alone.abs, rtol=1e-4, atol=1e-6)


# the experiment


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(images=(32, 20, 20), seeds=(0,), lrs=(1e-3,), shares=(0.01, 0.1),
                        rand=(0.1,), scales=(0.5,), training=Training(steps=2, batch_size=8))
    report = goes_on(told, cfg, tmp_path, monkeypatch)
    assert {c.verdict for c in report.claims} == UNDECIDED


def test_dense_is_phase_one():
    "What the experiment remembers as phase 1 is what `movements` gives."
    bed = told.skills(0, (40, 8, 8))
    arms = told.Arms(SMALL.replace(training=Training(steps=3, batch_size=8), device="cpu"))
    _, made = arms.make(bed.model, bed, 0, kind="dense", share=1.0, lr=1e-3)
    names = [f"layers.{n}" for n, _ in bed.model.layers.named_parameters()]
    run = fitting(Training(steps=3, batch_size=8, lr=1e-3), bed.train["turned"],
                  modules.cross_entropy, seed=0, device="cpu", progress=False)
    moved = movements(bed.model, names, run, 3)
    for name, d in made["turned"].dense().items():
        torch.testing.assert_close(d.abs(), moved[name], rtol=1e-4, atol=2e-6)


def _on_the_hub(monkeypatch):
    "Columns and splits of the two sources that no other lesson reads (rows: of the stand-in)."
    def text(i):
        return {"id": str(i), "url": "https://x", "title": schemas.prose(i, 2),
                "text": schemas.prose(i, 60)}

    def pair(i):
        return {"premise": schemas.prose(i, 9), "hypothesis": schemas.prose(i + 1, 5),
                "label": i % 3}

    for code in ("ay", "gn", "nah", "qu", "simple"):
        monkeypatch.setitem(schemas.SCHEMAS, f"wikimedia/wikipedia@20231101.{code}",
                            schemas.Schema({"train": 1000}, text))
    for code in FULL.languages:
        monkeypatch.setitem(schemas.SCHEMAS, f"nala-cub/americas_nli@{code}",
                            schemas.Schema({"validation": 300, "test": 738}, pair))


def test_full_scale_path_with_a_tiny_model(tmp_path, recorded, monkeypatch):
    "Languages, the task on top of English, and the transfer, from data of the hub's form."
    _on_the_hub(monkeypatch)
    xlmr = tiny_models.roberta(tmp_path / "xlmr", kind="XLMRoberta")
    short = {"steps": 1, "epochs": None, "batch_size": 2}
    cfg = FULL.replace(model=xlmr, device="cpu", seeds=(0,), language_k=50,
                       task_k=60, window=16, max_length=16, language_training=short,
                       task_training={"epochs": 0.5, "batch_size": 4})
    report = experiment(cfg, start_run("lt_sft", cfg, "full", root=tmp_path / "runs"))
    table = report.tables["languages"]
    assert sorted(table["language"].unique()) == sorted(FULL.languages) and len(table) == 12
    assert told.TASK in map(str, recorded.asked)
