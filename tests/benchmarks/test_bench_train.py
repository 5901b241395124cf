"""What `fit` adds to the bare loop, per step, on a model so small that it shows."""

import torch
import torch.nn.functional as F
from torch import nn

from adaptlab.train import fit

STEPS, BATCH = 1000, 32


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x = torch.randn(1797, 64)
    return model, x, x[:, :10].argmax(1)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def bare():
    "Five lines; the same fused optimiser."
    model, x, y = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    done = 0
    while done < STEPS:
        for rows in torch.randperm(len(x)).split(BATCH)[: STEPS - done]:
            loss_fn(model, (x[rows], y[rows])).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1


def ours():
    model, x, y = make()
    fit(model, (x, y), loss_fn, steps=STEPS, batch_size=BATCH, progress=False)


def loader():
    "The same through torch's DataLoader."
    model, x, y = make()
    data = torch.utils.data.TensorDataset(x, y)
    batches = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
    fit(model, batches, loss_fn, steps=STEPS, progress=False)


def test_step_overhead(benchmark, capsys):
    "Time of this process, the fastest of several rounds: other work on the machine counts little."
    import time

    torch.set_num_threads(1)
    seconds = {run.__name__: [] for run in (bare, ours, loader)}
    for run in (bare, ours, loader) * 7:  # interleaved: a busy machine slows all alike
        start = time.process_time()
        run()
        seconds[run.__name__].append(time.process_time() - start)
    best = {name: min(times) / STEPS * 1e6 for name, times in seconds.items()}
    benchmark.pedantic(ours, rounds=3)
    benchmark.extra_info |= {"bound": 1.03, "ratio": best["ours"] / best["bare"]}
    with capsys.disabled():
        print(f"\nper step: bare {best['bare']:.0f} us, fit {best['ours']:.0f} us "
              f"(x {best['ours'] / best['bare']:.2f}, to be at most 1.03 where a step takes "
              f"milliseconds), fit with DataLoader {best['loader']:.0f} us")
