"""Small training runs, started by test_train.py here and in processes of their own.

    python train_jobs.py kill FOLDER MICRO_BATCH    dies of SIGKILL inside that micro-batch
    python train_jobs.py kill-save FOLDER N         dies of SIGKILL inside the N-th checkpoint
    torchrun --nproc_per_node 2 train_jobs.py pair OUT
    torchrun --nproc_per_node 3 train_jobs.py talk OUT
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaptlab import text, train

STEPS = 30


def digits_like(n=70, classes=5, features=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, features, generator=generator)
    return x, (x @ torch.randn(features, classes, generator=generator)).argmax(1)


def mlp(dropout=0.0, norm=False, seed=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(12, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(16, 5))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def run_resumable(folder, loss_fn=cross_entropy, **kwargs):
    "Everything that must survive a kill: dropout, running statistics, schedule, clipping, order."
    model = mlp(dropout=0.3, norm=True)
    settings = dict(steps=STEPS, batch_size=16, accumulate=2, schedule="cosine", warmup=0.1,
                    clip=1.0, lr=1e-3, log_every=4, seed=5, progress=False,
                    checkpoint_dir=folder, checkpoint_every=7 if folder else None)
    result = train.fit(model, digits_like(), loss_fn, **(settings | kwargs))
    return model, result


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill(folder, micro_batch):
    seen = 0

    def loss_fn(model, batch):
        nonlocal seen
        seen += 1
        if seen == micro_batch:
            die()
        return cross_entropy(model, batch)

    run_resumable(folder, loss_fn)


def kill_save(folder, number):
    seen, replace = 0, os.replace

    def dying_replace(source, target):
        nonlocal seen
        seen += str(source).endswith(".partial")
        if seen == number:
            die()
        replace(source, target)

    train.os.replace = dying_replace
    run_resumable(folder)


def tiny_lm(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def token_rows(n=40):
    "Sequences of very different length and share of labels: a mean of means would be wrong."
    generator = torch.Generator().manual_seed(2)
    rows = []
    for i in range(n):
        length = int(torch.randint(4, 30, (1,), generator=generator))
        ids = torch.randint(0, 40, (length,), generator=generator).tolist()
        masked = length - 2 if i % 3 else 0
        rows.append({"input_ids": ids, "attention_mask": [1] * length,
                     "labels": [-100] * masked + ids[masked:]})
    return rows


def collate(rows):
    return text.pad_batch(rows, 0)


def cases():
    "name -> function that trains and returns (model, history)."
    quick = dict(steps=12, batch_size=8, lr=1e-2, progress=False, log_every=3, device="cpu")

    def plain(accumulate, **kwargs):
        model = mlp()
        return model, train.fit(model, digits_like(), cross_entropy, accumulate=accumulate,
                                **(quick | kwargs)).history

    def language(accumulate):
        model = tiny_lm()
        return model, train.fit(model, token_rows(), collate_fn=collate, accumulate=accumulate,
                                **quick).history

    def loader(accumulate):
        model, dataset = mlp(), TensorDataset(*digits_like(64))
        loader = DataLoader(dataset, batch_size=8, shuffle=True)
        return model, train.fit(model, loader, cross_entropy, accumulate=accumulate,
                                **(quick | {"batch_size": None})).history

    def unused(accumulate):  # a trainable parameter that has no part in the loss
        model = mlp()
        model.spare = nn.Linear(2, 2)
        for p in model.spare.parameters():
            nn.init.zeros_(p)
        return model, train.fit(model, digits_like(), lambda m, b: F.cross_entropy(
            nn.Sequential(*list(m)[:5])(b[0]), b[1]), accumulate=accumulate, **quick).history

    found = {}
    for accumulate in (1, 2):
        found[f"plain-{accumulate}"] = lambda a=accumulate: plain(a, clip=0.5, schedule="linear")
        found[f"language-{accumulate}"] = lambda a=accumulate: language(a)
        found[f"loader-{accumulate}"] = lambda a=accumulate: loader(a)
    # SGD: AdamW divides by the size of the gradient, and would turn rounding into whole steps
    found["bf16-1"] = lambda: plain(1, precision="bf16", lr=1e-3,
                                    optimizer=partial(torch.optim.SGD, lr=0.1))
    found["unused-1"] = lambda: unused(1)
    return found


def pair(out):
    "Run every case; the first process writes the weights. Also resume with two processes."
    results = {}
    for name, case in cases().items():
        model, history = case()
        results[name] = ({k: v.clone() for k, v in model.state_dict().items()},
                         history["loss"].tolist())
    folder = Path(out).with_suffix(".checkpoints")

    def stop(state):
        state.stop = state.step == 11

    class Dead(Exception):
        pass

    def fail(state):
        if state.step == 18:
            raise Dead

    whole, _ = run_resumable(None)
    try:
        run_resumable(folder, callbacks=[fail])
    except Dead:
        pass
    resumed, result = run_resumable(folder)
    same = all(torch.equal(a, b) for a, b in zip(
        whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    results["resume"] = (same, result.resumed_from)
    results["shared out"] = shared_out()
    results["generators"] = generators()
    if int(os.environ["RANK"]) == 0:
        torch.save(results, out)


def shared_out():
    "What `fit` says to data of which every process holds a part: kind -> both processes' errors."
    import datasets
    from torch.utils.data import DistributedSampler, SequentialSampler

    from adaptlab import processes

    rank, rows = processes.rank(), torch.arange(16.0)[:, None]
    mine, data = rows[rank::2], TensorDataset(rows)

    class Own(SequentialSampler):
        def __len__(self):
            return 8

        def __iter__(self):
            yield from range(rank, 16, 2)

    kinds = {
        "sampler": DataLoader(data, 4, sampler=DistributedSampler(data)),
        "own sampler": DataLoader(data, 4, sampler=Own(data)),
        "tensors": (mine,), "list": [(row,) for row in mine],
        "table": datasets.Dataset.from_dict({"x": mine.flatten().tolist()}),
    }
    said = {}
    for kind, given in kinds.items():
        size = None if isinstance(given, DataLoader) else 4
        try:
            train.fit(nn.Linear(1, 1), given, lambda m, b: m(torch.ones(1, 1)).mean(), steps=3,
                      batch_size=size, device="cpu", progress=False)
            error = "none"
        except ValueError as problem:
            error = str(problem)
        said[kind] = processes.gather([error])
    return said


def generators():
    "Rows of each process, from a loader whose generator was seeded by the process's number."
    from adaptlab import processes

    data, seen = TensorDataset(torch.arange(16.0)[:, None]), []
    own = torch.Generator().manual_seed(processes.rank())

    def loss_fn(model, batch):
        seen.extend(batch[0].flatten().int().tolist())
        return model(batch[0]).square().mean()

    train.fit(nn.Linear(1, 1), DataLoader(data, 4, shuffle=True, generator=own), loss_fn, epochs=1,
              device="cpu", progress=False)
    return processes.gather([seen])


def talk(out):
    "What the functions of `processes` say in each process."
    from adaptlab import processes

    class Local(Exception):  # can't be pickled by its name
        pass

    def failing():
        if processes.is_main():
            raise FileNotFoundError(2, "nothing there", "a.txt")
        raise AssertionError("only process 0 may be asked")

    def local():
        raise Local("odd")

    def work(item):
        if item == 5:
            raise ValueError("item 5 is bad")
        return item * 10

    said = {"before": (processes.rank(), processes.world_size())}  # from the environment
    said["value"] = processes.together(f"from {processes.rank()}")
    said["made"] = processes.together(lambda: f"made by {processes.rank()}")
    said["errors"] = []
    for bad in (partial(processes.together, failing), partial(processes.together, local),
                partial(processes.each, work, range(7))):
        try:
            bad()
        except Exception as error:
            said["errors"].append((type(error).__name__, str(error)))
    said["part"] = processes.share(range(7))
    said["all"] = processes.gather([n * 2 for n in processes.share(range(7))])
    said["few"] = processes.gather(processes.share(["one"]))
    said["each"] = processes.each(str, range(4))
    processes.wait()
    said["after"] = (processes.rank(), processes.world_size())  # from the group
    parts = processes.gather([said])
    if processes.is_main():
        torch.save(parts, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, target, *rest = sys.argv[1:]
    {"kill": kill, "kill-save": kill_save, "pair": pair, "talk": talk}[job](target, *map(int, rest))
    from adaptlab import processes

    processes.leave()
