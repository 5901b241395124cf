"""Every adapter of the chapters on low rank, sparse changes and arithmetic trains alike under DDP.

One start of two processes for all of them; lessons with a loop of their own have their own test.
"""

import two_processes

TRAIN = """
import copy
from functools import partial

import torch

from adaptlab import adapters, modules, processes, recipes
from adaptlab.arithmetic.orthogonal_adaptation import (
    OrthogonalAdapterConfig, add_orthogonal_adapter)
from adaptlab.lowrank.diffora import DiffoRAConfig, build_adapted_model, module_grid
from adaptlab.lowrank.hydra import HydraConfig, inject_hydra
from adaptlab.lowrank.loldu import LoLDULinear
from adaptlab.lowrank.lq_lora import LQConfig, QuantConfig, get_lq_lora_model
from adaptlab.sparse.difffit import DiffFit, DiffFitConfig
from adaptlab.sparse.sketchtune import SketchConfig, sketch_model
from adaptlab.train import Training, set_seed

LAYERS = ("q_proj", "v_proj", "fc1", "fc2")


def diffora(model):
    config = DiffoRAConfig(r=2)
    grid = module_grid(model)
    mask = torch.tensor([[(i + j) % 2 == 0 for j in range(len(row))]
                         for i, row in enumerate(grid.values())])
    build_adapted_model(model, mask, config)


METHODS = {
    "hydra": partial(inject_hydra, config=HydraConfig(target_modules=LAYERS)),
    "loldu": partial(adapters.attach, make=partial(LoLDULinear, rank=4), targets=LAYERS),
    "lq_lora": partial(get_lq_lora_model, config=LQConfig(
        rank=2, configs=(QuantConfig(3, 8, "bf16", 16, 16),), num_iter=2)),
    "diffora": diffora,
    "sketchtune": partial(sketch_model, batches=None, config=SketchConfig(
        bits=2, compensate=False, target_modules=LAYERS)),
    "difffit": partial(DiffFit.wrap, config=DiffFitConfig(extra_trainable=())),
    "orthogonal": partial(add_orthogonal_adapter, config=OrthogonalAdapterConfig(
        concept="one", r=2, target_modules=LAYERS)),
}
torch.manual_seed(0)
base, x = recipes.TinyViT(), torch.randn(32, 1, 28, 28)
if processes.is_main():
    print("base", *base.eval()(x[:1]).flatten().tolist())
for name, prepare in METHODS.items():
    set_seed(0)
    model = copy.deepcopy(base)
    prepare(model)
    Training(steps=3, batch_size=8, lr=1e-2).fit(
        model, (x, torch.arange(32) % 10), modules.cross_entropy, device="cpu", progress=False)
    if processes.is_main():
        with torch.no_grad():
            print(name, *model.eval()(x[:1]).flatten().tolist())
"""


def test_adapters_train_alike_in_two_processes(tmp_path, capsys):
    found = two_processes.assert_alike(TRAIN, tmp_path, capsys)
    base = found.pop("base")
    assert len(found) == 7 and all((v - base).abs().max() > 1e-2 for v in found.values())
