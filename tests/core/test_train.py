"""The training loop: equal to the plain loop, to two processes, and to itself after a kill."""

import copy
import json
import math
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    DataLoader, IterableDataset, Subset, TensorDataset, WeightedRandomSampler,
)

import train_jobs as jobs
from adaptlab import recipes, train
from adaptlab.train import fit

JOBS = Path(jobs.__file__)
QUICK = dict(steps=6, batch_size=8, progress=False)


@pytest.fixture(autouse=True)
def one_thread():
    "As in the processes that are compared with: sums are added in the same order."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def environment():
    paths = [str(Path(train.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def quick(model=None, data=None, loss_fn=jobs.cross_entropy, **kwargs):
    model = jobs.mlp() if model is None else model
    data = jobs.digits_like() if data is None else data
    return model, fit(model, data, loss_fn, **(QUICK | kwargs))


class Dead(Exception):
    pass


def die_at(step):
    def callback(state):
        if state.step == step:
            raise Dead

    return callback


# --- killed and run again -------------------------------------------------------------------------

@pytest.mark.parametrize("job", ["kill", "kill-save"])
def test_sigkill_and_resume_is_bit_for_bit(tmp_path, job):
    whole, straight = jobs.run_resumable(None)
    draw = random.Random(20240501)
    # two micro-batches per step: a kill falls into the middle of an accumulation half of the time
    moment = draw.randrange(18, 2 * jobs.STEPS) if job == "kill" else draw.randrange(2, 4)
    done = subprocess.run([sys.executable, JOBS, job, tmp_path / "run", str(moment)],
                          env=environment(), capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    resumed, result = jobs.run_resumable(tmp_path / "run")
    assert 0 < result.resumed_from < jobs.STEPS
    assert same(whole, resumed)
    assert result.history.equals(straight.history)
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["step-000000028", "step-000000030"]  # the last two, and no rests


def test_every_step_can_be_resumed(tmp_path):
    whole, _ = jobs.run_resumable(None)
    folder = tmp_path / "run"
    for step in (1, 2, 3, 9, 16, 17, 29):  # killed again and again
        with pytest.raises(Dead):
            jobs.run_resumable(folder, checkpoint_every=1, callbacks=[die_at(step)])
    resumed, result = jobs.run_resumable(folder, checkpoint_every=1)
    assert result.resumed_from == 28 and same(whole, resumed)


def test_loader_is_resumed_in_the_middle_of_an_epoch(tmp_path):
    dataset = TensorDataset(*jobs.digits_like())
    runs = []
    for folder in (None, tmp_path):
        for callbacks in [[]] if folder is None else [[die_at(13)], []]:
            model = jobs.mlp(dropout=0.2)
            sampler = WeightedRandomSampler(torch.rand(70, generator=torch.Generator()), 70)
            loader = DataLoader(dataset, batch_size=16, sampler=sampler)
            sampler.weights = torch.linspace(1, 2, 70)
            try:
                quick(model, loader, steps=17, batch_size=None, checkpoint_dir=folder,
                      checkpoint_every=6 if folder else None, callbacks=callbacks)
            except Dead:
                continue
            runs.append(model)
    assert same(*runs)


def test_finished_run_returns_at_once_and_can_be_extended(tmp_path):
    model, first = quick(checkpoint_dir=tmp_path)
    again, second = quick(checkpoint_dir=tmp_path, callbacks=[die_at(1)])
    assert same(model, again) and second.resumed_from == second.steps == 6
    assert second.history.equals(first.history)
    longer, third = quick(checkpoint_dir=tmp_path, steps=9)  # allowed: the rate is constant
    direct, _ = quick(steps=9)
    assert third.resumed_from == 6 and same(longer, direct)
    with pytest.raises(ValueError, match="beyond the 5 steps"):
        quick(checkpoint_dir=tmp_path, steps=5)


@pytest.mark.parametrize("change, named", [
    (dict(batch_size=4), "batch_size: 8 there, 4 now"), (dict(seed=1), "seed"),
    (dict(lr=0.5), "lr: '0.001' there, '0.5' now"), (dict(accumulate=2), "accumulate"),
    (dict(schedule="linear"), "schedule"), (dict(clip=1.0), "clip"),
    (dict(precision="bf16"), "precision"),
    (dict(optimizer=torch.optim.SGD), "optimizer: 'AdamW' there, 'SGD' now"),
    (dict(model=recipes.MLP((12, 7, 5))), "trainable parameters"),
    (dict(data=jobs.digits_like(60)), "samples"),
])
def test_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    quick(checkpoint_dir=tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="other settings") as error:
        quick(checkpoint_dir=tmp_path, **change)
    assert named in str(error.value) and sorted(tmp_path.rglob("*")) == before


def test_resume_false_starts_over_and_removes_checkpoints_only(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    quick(checkpoint_dir=tmp_path, steps=8)
    (tmp_path / ".step-000000009.partial").mkdir()
    _, result = quick(checkpoint_dir=tmp_path, seed=4, resume=False)
    assert result.resumed_from == 0 and result.steps == 6
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["notes.txt", "step-000000005", "step-000000006"]


def test_unreadable_checkpoint_is_named(tmp_path):
    quick(checkpoint_dir=tmp_path)
    (tmp_path / "step-000000006" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="step-000000006 cannot be read"):
        quick(checkpoint_dir=tmp_path)
    (tmp_path / "step-000000006" / "progress.json").unlink()
    model, result = quick(checkpoint_dir=tmp_path)
    assert result.resumed_from == 5 and same(model, quick()[0])


def test_a_folder_that_can_not_be_made_is_said_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("in the way")
    steps = []
    with pytest.raises(OSError, match="checkpoint_dir"):
        quick(checkpoint_dir=tmp_path / "file" / "run", callbacks=[steps.append])
    assert not steps


def test_failed_save_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    from accelerate import Accelerator

    save, calls = Accelerator.save_state, []

    def full_disk(self, folder, **kwargs):
        calls.append(folder)
        if len(calls) == 3:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError("No space left on device")
        return save(self, folder, **kwargs)

    monkeypatch.setattr(Accelerator, "save_state", full_disk)
    with pytest.raises(OSError, match="No space"):
        quick(checkpoint_dir=tmp_path, checkpoint_every=2)
    monkeypatch.undo()
    model, result = quick(checkpoint_dir=tmp_path, checkpoint_every=2)
    assert result.resumed_from == 4 and same(model, quick()[0])


def test_checkpoint_holds_what_moves_only(tmp_path):
    from safetensors.torch import load_file

    def build(shift=0.0):
        model = jobs.mlp(norm=True)
        model[0].weight.data += shift
        model[0].requires_grad_(False)
        return model

    model, _ = quick(build(), checkpoint_dir=tmp_path)
    saved = load_file(tmp_path / "step-000000006" / "model.safetensors")
    assert {k.removeprefix("model.") for k in saved} == {
        k for k in model.state_dict() if not k.startswith("0.")}
    assert same(quick(build(), checkpoint_dir=tmp_path)[0], model)
    with pytest.raises(ValueError, match="frozen weights"):
        quick(build(shift=0.1), checkpoint_dir=tmp_path)


def test_tied_weights_are_saved_once_and_resumed(tmp_path, caplog):
    def run(folder, **kwargs):
        torch.manual_seed(0)
        model = recipes.tiny_llama(hidden_size=16, layers=1)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        ids = torch.arange(64).reshape(8, 8)
        rows = {"input_ids": ids, "labels": ids}
        quick(model, rows, None, steps=4, batch_size=4, checkpoint_dir=folder, **kwargs)
        return model

    whole = run(None)
    with pytest.raises(Dead):
        run(tmp_path, callbacks=[die_at(3)])
    resumed = run(tmp_path)
    assert same(whole, resumed) and resumed.lm_head.weight is resumed.model.embed_tokens.weight
    assert "shared" not in caplog.text


def test_stateful_callback_is_resumed(tmp_path):
    class Average(train.Callback):
        def __init__(self, model):
            self.mean = {k: v.clone() for k, v in model.state_dict().items()}

        def after_step(self, state):
            for name, value in state.model.state_dict().items():
                self.mean[name].lerp_(value, 0.1)

        def state_dict(self):
            return self.mean

        def load_state_dict(self, state):
            self.mean = state

    def run(folder, *more, checkpoint_every=None):
        model = jobs.mlp()
        average = Average(model)
        quick(model, callbacks=[average, *more], checkpoint_dir=folder, schedule="linear",
              checkpoint_every=checkpoint_every)
        return average.mean

    whole = run(None)
    with pytest.raises(Dead):
        run(tmp_path, die_at(5), checkpoint_every=2)
    resumed = run(tmp_path, checkpoint_every=2)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


# --- loaders with chance of their own -------------------------------------------------------------

class Shuffled(torch.utils.data.Sampler):
    "A sampler that draws its order from a generator of its own, of whatever kind."

    def __init__(self, n, rng):
        self.n, self.rng = n, rng

    def __len__(self):
        return self.n

    def __iter__(self):
        order = list(range(self.n))
        self.rng.shuffle(order)
        yield from order


class Lazy(Shuffled):
    "Draws row by row from the global generators."

    def __iter__(self):
        for _ in range(self.n):
            row = random.randrange(self.n) + np.random.randint(3) + int(torch.randint(3, ()))
            yield row % self.n


class Counting(Shuffled):
    "Another order in each epoch, by counting them."

    def __iter__(self):
        self.rng = random.Random(getattr(self, "count", 0))
        self.count = getattr(self, "count", 0) + 1
        yield from super().__iter__()


class Unsteady(Shuffled):
    "An order that nobody can know."

    def __iter__(self):
        self.rng = random.Random(os.urandom(8))
        self.__dict__.pop("rng").shuffle(order := list(range(self.n)))
        yield from order


class Noisy(TensorDataset):
    "Adds noise from a generator of its own and from torch's."

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.rng = np.random.default_rng(1)

    def __getitem__(self, i):
        (x,) = super().__getitem__(i)
        return (x + int(self.rng.integers(100)) * 1000 + torch.randint(9, ()) * 100,)


def ordered(kind):
    "A loader of the numbers 0 to 11, in batches of 4."
    from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler

    rows = TensorDataset(torch.arange(12.0)[:, None])
    seeded = torch.Generator().manual_seed(7)
    if kind == "generator":
        return DataLoader(rows, 4, shuffle=True, generator=seeded)
    if kind == "batch sampler":
        batches = BatchSampler(RandomSampler(rows, generator=seeded), 4, False)
        return DataLoader(rows, batch_sampler=batches)
    if kind == "replacement":
        return DataLoader(rows, 4, sampler=RandomSampler(rows, True, 12, generator=seeded))
    if kind == "set_epoch":
        return DataLoader(rows, 4, sampler=DistributedSampler(rows, 1, 0))
    if kind == "noisy dataset":
        return DataLoader(Noisy(rows.tensors[0]), 4, shuffle=True)
    if kind == "workers":
        return DataLoader(rows, 4, shuffle=True, generator=seeded, num_workers=1)
    samplers = {
        "random": lambda: Shuffled(12, random.Random(3)),
        "numpy": lambda: Shuffled(12, np.random.default_rng(3)),
        "old numpy": lambda: Shuffled(12, np.random.RandomState(3)),
        "lazy": lambda: Lazy(12, None), "counting": lambda: Counting(12, None),
        "unsteady": lambda: Unsteady(12, None),
    }
    return DataLoader(rows, 4, sampler=samplers[kind]())


def rows_seen(loader, folder=None, end=None, epochs=3):
    "The rows of every step of a run that may be ended in the middle."
    seen, model = [], nn.Linear(1, 1)

    def loss(model, batch):
        seen.append(batch[0].flatten().int().tolist())
        torch.rand(3), random.random()  # the model's own chance
        return model(batch[0]).square().mean() * 1e-9

    try:
        fit(model, loader, loss, epochs=epochs, checkpoint_dir=folder, device="cpu",
            checkpoint_every=1 if folder else None, callbacks=[die_at(end)], progress=False)
    except Dead:
        pass
    return seen


KINDS = ["generator", "batch sampler", "replacement", "set_epoch", "noisy dataset", "random",
         "numpy", "old numpy", "lazy", "counting"]


@pytest.mark.parametrize("kind, end", [
    # the last step was in epoch 0, the first of epoch 1, in epoch 2
    *((kind, end) for kind in KINDS for end in (2, 4, 8)), ("workers", 4)])
def test_a_loader_gives_the_same_rows_after_resume(tmp_path, kind, end):
    straight = rows_seen(ordered(kind))
    assert rows_seen(ordered(kind), tmp_path, end) == straight[:end]
    assert rows_seen(ordered(kind), tmp_path) == straight[end - 1 :]
    epochs = [sum(straight[i : i + 3], []) for i in (0, 3, 6)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_loader_is_left_as_it_was_found():
    for kind in ("generator", "random", "numpy", "old numpy"):
        loader = ordered(kind)
        assert rows_seen(loader) == rows_seen(loader)  # nothing is left of the first run
    loader = ordered("generator")
    rows_seen(loader)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.rand(3, generator=loader.generator), expected)


def test_the_seed_of_a_generator_counts():
    rows = TensorDataset(torch.arange(12.0)[:, None])
    first, second = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    assert (rows_seen(DataLoader(rows, 4, shuffle=True, generator=first))
            != rows_seen(DataLoader(rows, 4, shuffle=True, generator=second)))


def test_a_loader_that_does_not_repeat_itself_is_refused_on_resume(tmp_path):
    rows_seen(ordered("unsteady"), tmp_path, 3)  # the checkpoint is in the middle of an epoch
    with pytest.raises(ValueError, match="does not give the same batches"):
        rows_seen(ordered("unsteady"), tmp_path)
    other = DataLoader(TensorDataset(torch.arange(12.0, 24)[:, None]), 4, shuffle=True)
    rows_seen(ordered("generator"), tmp_path / "b", 3)
    with pytest.raises(ValueError, match="does not give the same batches"):
        rows_seen(other, tmp_path / "b")


def test_other_data_of_the_same_length_is_refused_on_resume(tmp_path):
    x, y = jobs.digits_like()
    quick(data=(x, y), checkpoint_dir=tmp_path)
    for other in ((x + 1, y), [(x[i] + 1, y[i]) for i in range(len(x))]):
        with pytest.raises(ValueError, match="data: "):
            quick(data=other, checkpoint_dir=tmp_path)


@pytest.mark.parametrize("change", [dict(max_lr=0.2), dict(pct_start=0.5)])
def test_another_schedule_of_the_same_name_is_refused(tmp_path, change):
    def one_cycle(**kwargs):
        return partial(torch.optim.lr_scheduler.OneCycleLR,
                       **(dict(max_lr=0.1, total_steps=9) | kwargs))

    quick(schedule=one_cycle(), checkpoint_dir=tmp_path)
    quick(schedule=one_cycle(), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="rates"):
        quick(schedule=one_cycle(**change), checkpoint_dir=tmp_path)


def test_every_group_of_the_optimiser_is_compared(tmp_path):
    def groups(second):
        return lambda params: torch.optim.SGD([
            {"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": second}])

    quick(optimizer=groups(0.1), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"lr: '\[0.1, 0.1\]' there, '\[0.1, 0.2\]' now"):
        quick(optimizer=groups(0.2), checkpoint_dir=tmp_path)


def test_a_loader_that_is_shared_out_already_is_refused():
    import datasets
    from datasets.distributed import split_dataset_by_node
    from torch.utils.data import DistributedSampler

    rows = TensorDataset(torch.arange(16.0)[:, None])
    stream = datasets.Dataset.from_dict({"x": list(range(16))}).to_iterable_dataset(2)
    for loader in (DataLoader(rows, 4, sampler=DistributedSampler(rows, 2, 0)),
                   DataLoader(split_dataset_by_node(stream, 0, 2), 4)):
        with pytest.raises(ValueError, match="gives each process a part"):
            rows_seen(loader, epochs=1)


# --- two processes --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("pair") / "results.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", JOBS, "pair", out]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("name", jobs.cases())
def test_two_processes_match_one(two_processes, name):
    weights, losses = two_processes[name]
    model, history = jobs.cases()[name]()
    tolerance = 2**-8 if name.startswith("bf16") else 1e-5  # the precision of bf16
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=tolerance)
    np.testing.assert_allclose(losses, history["loss"], atol=tolerance)


def test_two_processes_resume_bit_for_bit(two_processes):
    assert two_processes["resume"] == (True, 14)


@pytest.mark.parametrize("kind", ["sampler", "own sampler", "tensors", "list", "table"])
def test_data_that_was_shared_out_before_is_refused(two_processes, kind):
    for error in two_processes["shared out"][kind]:  # in both processes
        assert "gives each process a part" in error or "given different data" in error


def test_a_generator_of_each_process_gives_all_the_same_rows(two_processes):
    first, second = two_processes["generators"]
    assert sorted(first + second) == list(range(16)) and not set(first) & set(second)


# --- the loop -------------------------------------------------------------------------------------

def test_equals_the_plain_loop_bit_for_bit():
    model, result = quick(steps=40, log_every=1, lr=1e-2, weight_decay=0.1, clip=0.5)
    x, y = jobs.digits_like()
    plain, stream, losses = jobs.mlp(), train.IndexStream(70, 8, 0), []
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(40):
        rows = stream.step(step)
        loss = F.cross_entropy(plain(x[rows]), y[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert same(model, plain) and result.history["loss"].tolist() == losses


@pytest.mark.parametrize("name", ["plain", "language", "loader"])
def test_accumulation_changes_nothing(name):
    cases = jobs.cases()
    a, b = cases[f"{name}-1"]()[0], cases[f"{name}-2"]()[0]
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_accumulation_of_gpt2():
    "transformers knows no `loss_type` of GPT-2, which predicts the next token all the same."
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0,
                        resid_pdrop=0, embd_pdrop=0, bos_token_id=1, eos_token_id=2)
    ids = torch.randint(3, 40, (8, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(8) > torch.arange(8)[:, None], -100)  # unequal numbers
    trained = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        trained.append(GPT2LMHeadModel(config))
        fit(trained[-1], {"input_ids": ids, "labels": labels}, accumulate=accumulate, steps=3,
            batch_size=8, optimizer=partial(torch.optim.SGD, lr=1.0), progress=False)
    for p, q in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, shifted", [
    ("GPT2LMHeadModel", True), ("LlamaForCausalLM", True), ("BertForMaskedLM", False),
    ("BertForTokenClassification", False), ("T5ForConditionalGeneration", False),
])
def test_labels_are_counted_as_the_model_reads_them(name, shifted):
    import transformers

    kind = getattr(transformers, name)
    small = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                 intermediate_size=8, n_embd=8, n_layer=1, n_head=2, d_model=8, d_ff=8, d_kv=4,
                 num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0)
    model = kind(kind.config_class(**small)).eval()
    labels = torch.ones(2, 5, dtype=torch.long)
    _, count = train._default_loss(model, {"input_ids": labels + 1, "labels": labels})
    assert int(count) == (8 if shifted else 10)


def test_micro_batch_without_a_label_counts_nothing():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3},
            {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    a, b = jobs.tiny_lm(), jobs.tiny_lm()
    kwargs = dict(collate_fn=jobs.collate, steps=3, progress=False)
    fit(a, rows, accumulate=2, batch_size=2, **kwargs)
    fit(b, rows, batch_size=2, **kwargs)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    with pytest.raises(FloatingPointError, match="step 1"):
        fit(a, rows[:1], batch_size=1, **kwargs)


def test_schedule_is_that_of_transformers():
    from transformers import get_scheduler

    _, result = quick(steps=20, schedule="cosine", warmup=0.25, log_every=1)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule, expected = get_scheduler("cosine", optimizer, 5, 20), []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert result.history["lr"].tolist() == expected
    _, by_steps = quick(steps=20, schedule="cosine", warmup=5, log_every=1)
    assert by_steps.history["lr"].tolist() == expected
    one_cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20)
    _, cycle = quick(steps=20, schedule=one_cycle, log_every=1)
    assert cycle.history["lr"].max() == pytest.approx(0.1)


def test_precision_may_change_in_one_process_and_foreign_state_survives():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test's Trainer left one
    mine = Accelerator(cpu=True, mixed_precision="bf16")
    dtypes = []

    def loss_fn(model, batch):
        out = model(batch[0])
        dtypes.append(out.dtype)
        return F.cross_entropy(out, batch[1])

    for precision in ("no", "bf16", "no"):
        model, _ = quick(loss_fn=loss_fn, precision=precision, steps=1)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert "forward" not in vars(model)  # nothing was patched in
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    assert mine.mixed_precision == "bf16" and mine.device.type == "cpu"


def test_leaves_everything_else_as_it_was():
    model = jobs.mlp(dropout=0.5, norm=True).train()
    model[1].eval()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    quick(model)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert [m.training for m in model] == [True, False, True, True, True] and model.training
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(model, nn.Sequential)


def test_only_parameters_that_require_gradients_move():
    model, start = jobs.mlp(), jobs.mlp()
    model[0].requires_grad_(False)
    quick(model, weight_decay=0.5)
    assert torch.equal(model[0].weight, start[0].weight)
    assert not torch.equal(model[4].weight, start[4].weight)
    with pytest.raises(ValueError, match="no trainable parameter"):
        quick(jobs.mlp().requires_grad_(False))


def test_eval_does_not_change_training():
    def nosy(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(10), random.random(), np.random.rand(3)
        return {"a": 1, "b": torch.tensor(2.0)}

    plain, _ = quick(jobs.mlp(dropout=0.4), log_every=2)
    watched, result = quick(jobs.mlp(dropout=0.4), log_every=2, eval_fn=nosy, eval_every=4)
    assert same(plain, watched)
    frame = result.history.set_index("step")
    assert frame["a"].dropna().index.tolist() == [4, 6] and frame.loc[6, "b"] == 2


def test_history_means_lose_no_step():
    _, each = quick(steps=25, log_every=1)
    _, some = quick(steps=25, log_every=10)
    assert some.history["step"].tolist() == [10, 20, 25]
    values = each.history["loss"].to_numpy()
    expected = [values[:10].mean(), values[10:20].mean(), values[20:].mean()]
    np.testing.assert_allclose(some.history["loss"], expected, rtol=1e-12)
    assert isinstance(some.history, pd.DataFrame) and some.seconds > 0


def test_loss_may_use_any_method_of_the_model():
    model = recipes.MLP((12, 8, 5))
    quick(model, loss_fn=lambda m, b: m.features(b[0]).square().mean() + m.head.weight.norm())


def test_accelerates_wrappers_do_the_same(monkeypatch):
    "The path of fp16 and FSDP, which cannot run on a CPU, with the wrappers that it goes through."
    run = train._run

    def wrapped(loop):
        loop.plain, loop.optimizer = False, loop.accelerator._optimizers[0]
        return run(loop)

    settings = dict(steps=12, accumulate=2, clip=0.5, schedule="linear", log_every=1)
    plain, first = quick(**settings)
    monkeypatch.setattr(train, "_run", wrapped)
    model, second = quick(**settings)
    assert same(plain, model) and first.history.equals(second.history)


def test_quiet(capfd):
    quick()
    quick(progress=True)  # shorter than the delay of the bar
    assert capfd.readouterr() == ("", "")


# --- precision, devices, FSDP ---------------------------------------------------------------------

def scaled(monkeypatch, overflows=()):
    "fp16's scaler, which accelerate knows on GPUs only; the loss overflows at these calls."
    make = train._new_accelerator

    def with_scaler(*args, **kwargs):
        accelerator = make(*args, **kwargs)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        return accelerator

    calls = []

    def loss_fn(model, batch):
        calls.append(batch[1].tolist())
        loss = jobs.cross_entropy(model, batch)
        if len(calls) in overflows:
            loss = loss + (model[0].bias * math.inf).sum().nan_to_num(0.0, 0.0, 0.0)
        return loss

    monkeypatch.setattr(train, "_new_accelerator", with_scaler)
    return loss_fn, calls


@pytest.mark.parametrize("clip", [None, 0.5])
def test_updates_that_fp16_leaves_out_do_not_count(monkeypatch, clip):
    settings = dict(steps=9, log_every=1, schedule="linear", clip=clip)
    plain, first = quick(**settings)
    overflows = (1, 2, 3, 8)
    loss_fn, calls = scaled(monkeypatch, overflows)
    seen = []

    class Watch(train.Callback):
        def before_step(self, state):
            seen.append([state.model[0].bias.grad.isfinite().all().item(), state.step])

        def after_step(self, state):
            seen.append(state.step)

    model, second = quick(loss_fn=loss_fn, callbacks=[Watch()], **settings)
    assert second.steps == 9 and len(calls) == 9 + len(overflows)
    assert calls[0] == calls[1] == calls[2] == calls[3] != calls[4]  # the same rows again
    assert [s for s in seen if isinstance(s, int)] == list(range(1, 10))
    assert second.history["lr"].tolist() == first.history["lr"].tolist()
    np.testing.assert_allclose(second.history["loss"], first.history["loss"], rtol=1e-5)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_gradients_that_no_scale_makes_finite_are_said(monkeypatch):
    loss_fn, _ = scaled(monkeypatch, range(1, 999))
    with pytest.raises(FloatingPointError, match="at step 1, however small"):
        quick(loss_fn=loss_fn)


def test_callbacks_see_gradients_of_their_true_size(monkeypatch):
    sizes = []

    class Watch(train.Callback):
        def before_step(self, state):
            sizes.append(state.model[4].weight.grad.norm().item())

    quick(steps=1, callbacks=[Watch()])
    loss_fn, _ = scaled(monkeypatch)
    quick(steps=1, callbacks=[Watch()], loss_fn=loss_fn)
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-5)


def test_a_gpu_is_chosen_by_its_number(monkeypatch):
    chosen = []

    class Current:
        def __init__(self, device):
            chosen.append(device)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            chosen.append("left")

    monkeypatch.setattr(torch.cuda, "device", Current)
    with train._this_gpu(torch.device("cuda:1")):
        assert chosen == [torch.device("cuda:1")]
    assert chosen[1:] == ["left"]
    for other in ("cpu", "cuda"):
        with train._this_gpu(torch.device(other)):
            assert len(chosen) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="each of several processes"), \
            train._this_gpu(torch.device("cuda:1")):
        pass


def test_fsdp_1_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version in (None, "1"):
        if version:
            monkeypatch.setenv("FSDP_VERSION", version)
        with pytest.raises(ValueError, match="use FSDP 2"):
            quick()
    monkeypatch.setenv("FSDP_VERSION", "2")
    train._check_fsdp()


def test_fsdp_2_by_configuration(tmp_path):
    "Two processes that shard agree with one that does not, in all that an adapter goes through."
    import fsdp_job

    folder = tmp_path / "sharded"
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", fsdp_job.__file__, str(folder), "cpu", "sharded", "no"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    sharded, whole = json.loads((folder / "found.json").read_text()), fsdp_job.run(
        tmp_path, "cpu", "no")
    assert whole["kinds"] == ["Parameter"] and sharded["kinds"] == ["DTensor"]
    for name in ("losses", "trained on", "norms", "resumed"):
        assert sharded[name] == pytest.approx(whole[name], rel=1e-5)
    assert sharded["resumed"] == sharded["losses"]
    assert max(sharded["merged"], sharded["loaded"]) < 1e-5


def test_fsdp_2_does_not_round_the_loss(tmp_path):
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    train._keep_loss_exact(plugin)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        module = train._LossModule(jobs.mlp(), lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]))
        fully_shard(module, mesh=DeviceMesh("cpu", [0]), mp_policy=plugin.mixed_precision_policy)
        loss, _ = module(jobs.digits_like())
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() != loss.bfloat16().item()
    finally:
        torch.distributed.destroy_process_group()


def test_offloaded_weights_are_refused():
    model = jobs.mlp()
    model[0].to("meta")
    with pytest.raises(ValueError, match="offloaded"):
        quick(model)


def test_no_cache_of_keys_and_values_is_kept():
    model, seen = recipes.tiny_llama(hidden_size=16, layers=1), []
    forward = model.forward

    def watched(*args, **kwargs):
        out = forward(*args, **kwargs)
        seen.append(out.past_key_values)
        return out

    model.forward = watched
    ids = torch.arange(64).reshape(8, 8)
    fit(model, {"input_ids": ids, "labels": ids}, steps=2, batch_size=4, progress=False)
    assert seen == [None, None] and model.config.use_cache


# --- settings and the best weights ----------------------------------------------------------------

def test_training_is_fit_with_its_settings():
    settings = dict(steps=12, batch_size=8, lr=3e-3, schedule="cosine", warmup=0.2, clip=1.0,
                    weight_decay=0.1, accumulate=2)
    direct, first = quick(**settings, seed=3)
    training, model = train.Training(**settings), jobs.mlp()
    second = training.fit(model, jobs.digits_like(), jobs.cross_entropy, seed=3, progress=False)
    assert same(direct, model) and first.history.equals(second.history)


def test_what_is_given_to_training_goes_first():
    training, data = train.Training(epochs=9, lr=0.5, weight_decay=0.1), jobs.digits_like()
    model = jobs.mlp()
    result = training.fit(model, data, jobs.cross_entropy, steps=3, lr=1e-3, progress=False)
    assert result.steps == 3 and result.history["lr"].iloc[-1] == 1e-3
    made = []

    class Momentum(torch.optim.SGD):
        def __init__(self, params, **kwargs):
            made.append(kwargs)
            super().__init__(params, **kwargs)

    training.fit(model, data, jobs.cross_entropy, steps=1, progress=False,
                 optimizer=partial(Momentum, momentum=0.9))
    assert made == [dict(momentum=0.9, lr=0.5, weight_decay=0.1)]
    with pytest.raises(ValueError, match="default optimiser"):
        training.fit(model, data, jobs.cross_entropy, steps=1, progress=False,
                     optimizer=lambda params: torch.optim.SGD(params))


@pytest.mark.parametrize("change", [
    dict(steps=0), dict(steps=True), dict(epochs=1), dict(steps=None), dict(lr=0),
    dict(lr=math.nan), dict(lr=math.inf), dict(warmup=-0.1), dict(warmup=0.1), dict(clip=0),
    dict(weight_decay=-1), dict(accumulate=0), dict(batch_size=1.5), dict(precision="int4"),
])
def test_settings_that_no_run_can_have(change):
    with pytest.raises(ValueError):
        train.Training(**({"steps": 5} | change))


def test_best_weights_come_back(tmp_path):
    "The score is the largest at step 6; everything that moves is as it was then."
    def wanted(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(5)
        return -abs(int(model[1].num_batches_tracked) - 6)

    until, _ = quick(jobs.mlp(norm=True), steps=6)
    for every, lower, score in ((3, False, wanted), (2, True, lambda m: -wanted(m))):
        best, model = train.KeepBest(score, every, lower=lower), jobs.mlp(norm=True)
        _, result = quick(model, steps=13, callbacks=[best])
        assert result.steps == 13 and best.step == 6 and best.scored == 13
        assert same(model, until)


def test_best_weights_survive_a_kill(tmp_path):
    def wanted(model):
        return -abs(int(model[1].num_batches_tracked) - 4)

    def run(folder, end=None):
        model = jobs.mlp(norm=True)
        try:
            quick(model, steps=10, checkpoint_dir=folder, checkpoint_every=3 if folder else None,
                  callbacks=[train.KeepBest(wanted, 2), die_at(end)])
        except Dead:
            return None
        return model

    run(tmp_path, 8)
    resumed = run(tmp_path)
    assert same(resumed, run(None)) and same(run(tmp_path), resumed)  # finished: the best again
    assert int(resumed[1].num_batches_tracked) == 4


def test_patience_ends_a_run():
    best = train.KeepBest(lambda m: -float(m[4].weight.norm() * 0 + 1), 2, patience=3)
    _, result = quick(steps=50, callbacks=[best])
    assert result.steps == 2 + 3 * 2 and best.step == 2
    with pytest.raises(ValueError, match="NaN at step 2"):
        quick(callbacks=[train.KeepBest(lambda m: math.nan, 2)])
    with pytest.raises(ValueError, match="every must be"):
        train.KeepBest(wrong := len, 0) and wrong


def test_pandas_is_loaded_for_the_history_alone():
    code = ("import sys; from adaptlab import train, text, modules, processes; import torch; "
            "r = train.fit(torch.nn.Linear(2, 1), torch.randn(9, 2), lambda m, b: m(b).mean(), "
            "steps=2, progress=False); before = 'pandas' in sys.modules; r.rows; "
            "print(before, 'matplotlib' in sys.modules, len(r.history))")
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True,
                          text=True)
    assert done.stdout.split() == ["False", "False", "1"], done.stdout + done.stderr


# --- bad input ------------------------------------------------------------------------------------

def test_not_finite_loss_names_the_step_and_keeps_the_checkpoint(tmp_path):
    def poisoned(model, batch):
        poisoned.calls += 1
        return jobs.cross_entropy(model, batch) / (0.0 if poisoned.calls == 15 else 1.0)

    poisoned.calls = 0
    with pytest.raises(FloatingPointError, match="loss is inf at step 15"):
        quick(loss_fn=poisoned, steps=30, checkpoint_dir=tmp_path, checkpoint_every=5)
    kept = [p.name for p in train._checkpoints(tmp_path)]
    assert kept == ["step-000000005", "step-000000010"]


def test_not_finite_weight_is_not_saved(tmp_path):
    def finite_loss_infinite_slope(model, batch):
        return jobs.cross_entropy(model, batch) + (model[0].bias * 0).sqrt().sum()

    with pytest.raises(FloatingPointError, match="weight is NaN or infinite after step 1"):
        quick(loss_fn=finite_loss_infinite_slope, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert not train._checkpoints(tmp_path)


@pytest.mark.parametrize("kwargs, message", [
    (dict(steps=None), "either steps or epochs"), (dict(epochs=1), "either steps or epochs"),
    (dict(steps=0), "steps must be"), (dict(steps=None, epochs=0), "epochs must be > 0"),
    (dict(batch_size=0), "batch_size must be"), (dict(batch_size=2.5), "batch_size must be"),
    (dict(batch_size=9, accumulate=2), "cannot be split evenly"),
    (dict(accumulate=0), "accumulate must be"), (dict(log_every=0), "log_every must be"),
    (dict(data=[]), "data is empty"), (dict(data=(torch.zeros(0, 12), torch.zeros(0))), "empty"),
    (dict(data=(torch.zeros(3, 12), torch.zeros(2))), "differ in length"),
    (dict(precision="fp16"), "needs a GPU"), (dict(precision="half"), "precision must be"),
    (dict(device="cuda"), "0 cuda devices|not available"),
    (dict(tracker="mlflow"), "tracker must be"),
    (dict(lr=0.0), "lr must be > 0"),
    (dict(optimizer=torch.optim.SGD, lr=0.1), "default optimiser"),
    (dict(optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)), "holds no trainable"),
    (dict(warmup=0.1), "constant_with_warmup"), (dict(schedule="linear", warmup=-1), "warmup"),
    (dict(schedule="reduce_lr_on_plateau"), "measured score"),
    (dict(schedule="greedy"), "measured score"), (dict(schedule="zigzag"), "one of linear"),
    (dict(schedule="warmup_stable_decay"), "settings of its own.*optimizer -> LRScheduler"),
    (dict(schedule="cosine_with_min_lr"), "settings of its own"),
    (dict(schedule=torch.optim.lr_scheduler.ReduceLROnPlateau), "measured score"),
    (dict(clip=-1.0), "clip"), (dict(seed=-1), "seed must be"), (dict(eval_every=2), "eval_fn"),
    (dict(checkpoint_every=2), "checkpoint_dir"),
    (dict(loss_fn=lambda m, b: m(b[0])), "scalar tensor"),
    (dict(loss_fn=lambda m, b: 1.0), "scalar tensor"),
    (dict(loss_fn=lambda m, b: torch.tensor(1.0)), "does not depend"),
])
def test_bad_settings(kwargs, message):
    if torch.cuda.is_available() and ("fp16" in kwargs.values() or "cuda" in kwargs.values()):
        pytest.skip("valid on this machine")
    with pytest.raises(ValueError, match=message):
        quick(**kwargs)


def test_bad_types():
    with pytest.raises(TypeError, match="wrap an iterable in a DataLoader"):
        quick(data=iter([1, 2]))
    with pytest.raises(TypeError, match="column 'y'.*list"):
        quick(data={"x": torch.zeros(3, 12), "y": [0, 1, 0]})
    with pytest.raises(ValueError, match="batch with labels"):
        quick(data=torch.zeros(9, 12), loss_fn=None)
    with pytest.raises(TypeError, match="params -> Optimizer"):
        quick(optimizer=lambda params: 3)
    with pytest.raises(ValueError, match="no loss"):
        quick(jobs.tiny_lm(), {"input_ids": torch.ones(8, 4, dtype=torch.long)}, None)


# --- data -----------------------------------------------------------------------------------------

def test_all_kinds_of_data_give_the_same_run():
    import datasets

    x, y = jobs.digits_like()
    samples = [(x[i], y[i]) for i in range(len(x))]
    tuples = [(x, y), TensorDataset(x, y), samples, Subset(TensorDataset(x, y), range(70))]
    runs = [quick(data=d)[0] for d in tuples]

    def named(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    table = datasets.Dataset.from_dict({"x": x.tolist(), "y": y.tolist()})
    arrays = {"x": x.numpy(), "y": y.numpy()}
    runs += [quick(data=d, loss_fn=named)[0] for d in ({"x": x, "y": y}, table, arrays)]
    runs.append(quick(data=(x.numpy(), y.numpy()))[0])
    assert all(same(runs[0], run) for run in runs[1:])


def test_a_dataset_that_makes_whole_batches():
    x, y = jobs.digits_like()
    expected, _ = quick(data=(x, y))
    calls = []

    class Whole:
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            raise AssertionError("never sample by sample")

        def __getitems__(self, rows):
            calls.append(len(rows))
            return x[rows], y[rows]

    class OnDevice(Whole):
        __getitems__ = None

        def fetch_batch(self, rows, device):
            calls.append(torch.device(device).type)
            return x[rows], y[rows]

    assert same(quick(data=Whole())[0], expected) and calls == [8] * 6
    calls.clear()
    assert same(quick(data=OnDevice(), accumulate=2)[0], quick(accumulate=2)[0])
    assert calls == [train.resolve_device("auto").type] * 12
    with pytest.raises(ValueError, match="leave it out"):
        quick(data=OnDevice(), collate_fn=list)
    samples = [(x[i], y[i]) for i in range(len(x))]

    class Samples(Whole):
        def __getitems__(self, rows):
            return [samples[i] for i in rows]

    assert same(quick(data=Samples())[0], expected)


def test_messages_name_the_column():
    import datasets

    x, y = jobs.digits_like(9)
    with pytest.raises(ValueError, match="'x': 9, 'y': 8"):
        quick(data={"x": x, "y": y[:8]})
    table = datasets.Dataset.from_dict({"x": x.tolist(), "name": ["a"] * 9})
    with pytest.raises(TypeError, match="column 'name'"):
        quick(data=table)
    ragged = datasets.Dataset.from_dict({"ids": [[1] * (i + 1) for i in range(9)]})
    with pytest.raises(TypeError, match="column 'ids'"):
        quick(data=ragged)


def test_pairs_need_no_loss_function():
    expected, _ = quick()
    model, _ = quick(loss_fn=None)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_order_does_not_depend_on_the_split():
    whole = train._Rows(torch.arange(50), None, 12, 3, 0, 1, 1)
    for world, accumulate in ((1, 3), (2, 1), (2, 3), (4, 3)):
        shares = [train._Rows(torch.arange(50), None, 12, 3, rank, world, accumulate)
                  for rank in range(world)]
        for step in (0, 4, 9):
            parts = [b for share in shares for b in share.micro_batches(step)]
            assert torch.equal(torch.cat(parts), next(whole.micro_batches(step)))


def test_order_depends_on_seed_and_epoch():
    orders = {tuple(train.IndexStream(20, 4, seed).epoch(e).tolist())
              for seed in (0, 1, 2**31 - 1) for e in range(5)}
    assert len(orders) == 15
    loader = DataLoader(torch.arange(20), batch_size=20, shuffle=True)
    orders = set()
    for seed in (0, 1):
        batches = train._Batches(loader, seed, 0, 1, 1)
        orders |= {tuple(next(batches.micro_batches(step)).tolist()) for step in range(5)}
    assert len(orders) == 10


def test_more_batch_than_data():
    stream = train.IndexStream(3, 8, 0)
    counts = torch.bincount(torch.cat([stream.step(s) for s in range(3)]), minlength=3)
    assert counts.tolist() == [8, 8, 8]
    assert quick(data=jobs.digits_like(3), steps=None, epochs=8)[1].steps == 3


def test_epochs_of_a_loader_and_of_rows():
    dataset = TensorDataset(*jobs.digits_like())
    loader = DataLoader(dataset, batch_size=16)
    assert quick(data=loader, batch_size=None, steps=None, epochs=2)[1].steps == 10
    assert quick(data=dataset, batch_size=14, steps=None, epochs=3)[1].steps == 15
    with pytest.raises(ValueError, match="brings its own batch_size"):
        quick(data=DataLoader(dataset, batch_size=16))
    with pytest.raises(ValueError, match="cannot be split evenly"):
        quick(data=DataLoader(dataset, batch_size=16), batch_size=None, accumulate=4, steps=9)


def test_stream_without_length():
    class Stream(IterableDataset):
        def __iter__(self):
            x, y = jobs.digits_like()
            yield from zip(x, y, strict=True)

    loader = DataLoader(Stream(), batch_size=20)
    assert quick(data=loader, batch_size=None, steps=9)[1].steps == 9
    with pytest.raises(ValueError, match="give steps"):
        quick(data=loader, batch_size=None, steps=None, epochs=1)


# --- trackers -------------------------------------------------------------------------------------

def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result = quick(tracker="tensorboard", log_dir=tmp_path, log_every=2)
    events = EventAccumulator(str(tmp_path / "adaptlab")).Reload()
    points = events.Scalars("loss")
    assert [p.step for p in points] == [2, 4, 6]
    np.testing.assert_allclose([p.value for p in points], result.history["loss"], rtol=1e-6)


def test_a_failed_run_closes_its_tracker(tmp_path, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    closed = []
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: closed.append(True))
    with pytest.raises(FloatingPointError):
        quick(tracker="tensorboard", log_dir=tmp_path,
              loss_fn=lambda m, b: jobs.cross_entropy(m, b) * math.nan)
    assert closed == [True]


def test_missing_tracker_is_said(monkeypatch):
    find = train.importlib.util.find_spec
    monkeypatch.setattr(train.importlib.util, "find_spec",
                        lambda name, *a: None if name == "wandb" else find(name, *a))
    with pytest.raises(ImportError, match="pip install wandb"):
        quick(tracker="wandb")


def test_settings_in_a_checkpoint_are_readable(tmp_path):
    quick(checkpoint_dir=tmp_path, schedule="linear")
    progress = json.loads((tmp_path / "step-000000006" / "progress.json").read_text())
    assert progress["step"] == 6 and progress["settings"]["steps"] == 6
    assert math.isclose(progress["rows"][-1]["loss"], progress["rows"][-1]["loss"])


def test_gradients_from_before_are_not_counted():
    torch.manual_seed(0)
    fresh = nn.Linear(4, 3)
    stale = copy.deepcopy(fresh)
    data = torch.randn(32, 4), torch.randint(3, (32,))
    (1000 * stale(data[0])).square().mean().backward()
    for model in (fresh, stale):
        train.fit(model, data, steps=2, batch_size=8, device="cpu", progress=False)
    assert torch.equal(fresh.weight, stale.weight)
