"""A LoRA run under FSDP 2, or without: trained, looked at, trained on, merged, saved, resumed.

    torchrun --nproc_per_node 2 fsdp_job.py FOLDER cpu sharded|whole
    torchrun --nproc_per_node 1 fsdp_job.py FOLDER cuda sharded|whole

What it saw is in FOLDER/found.json. On GPUs accelerate shards as its environment says; on CPUs it
would not, so there the job sets its state as `accelerate config` does for GPUs. The code that
shards, trains and saves is the same.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from adaptlab import adapter_files, adapters, processes, recipes, train

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}  # as `accelerate config` writes it
IDS = torch.randint(4, 250, (16, 24), generator=torch.Generator().manual_seed(0))


class Dead(Exception):
    pass


def die(state):
    if state.step == 5:
        raise Dead


def sharded_on_cpus(make, *args, **kwargs):
    "An `Accelerator` on CPUs that takes itself for one of FSDP 2."
    accelerator = make(*args, **kwargs)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"], state_dict_type="SHARDED_STATE_DICT")
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    train._keep_loss_exact(plugin)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def base():
    torch.manual_seed(0)
    return recipes.tiny_llama(layers=2)


def adapted():
    return adapters.attach(base(), partial(adapters.LoraAdapter, rank=4), ["q_proj", "up_proj"])


def run(folder: Path, device: str, precision: str) -> dict:
    "The life of an adapter; what was seen of it."
    ids, found = IDS.to(device), {"norms": []}

    def look(model):
        found["norms"].append(float(model(ids).logits.float().norm()))
        return {"norm": found["norms"][-1]}

    def fit(model, **more):
        return train.fit(
            model, {"input_ids": IDS, "labels": IDS}, steps=8, batch_size=4, accumulate=2, lr=1e-2,
            precision=precision, log_every=1, progress=False, device=device,
            **more).history["loss"].tolist()

    model = adapted()
    found["losses"] = fit(model, eval_fn=look, eval_every=4)
    found["kinds"] = sorted({type(p).__name__ for p in adapters.trainable_parameters(model)})
    file = adapter_files.save(model, folder / "adapter.safetensors")
    processes.wait()
    with torch.no_grad():
        before = model.eval()(ids).logits.float()
        after = adapters.merge(model)(ids).logits.float()
        adapters.unmerge(model)
        loaded = adapter_files.load(base().to(device), file).eval()(ids).logits.float()
    for name, logits in (("merged", after), ("loaded", loaded)):
        found[name] = float((logits - before).norm() / before.norm())
    found["trained on"] = fit(model)
    kept = dict(checkpoint_dir=folder / "steps", checkpoint_every=4)
    try:
        fit(adapted(), callbacks=[die], **kept)
    except Dead:
        found["resumed"] = fit(adapted(), **kept)
    return found


if __name__ == "__main__":
    place, device, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if how == "sharded" and device == "cpu":
        train._new_accelerator = partial(sharded_on_cpus, train._new_accelerator)
    elif how == "sharded":
        os.environ.update(FSDP)
    seen = run(place, device, sys.argv[4])
    if processes.is_main():
        (place / "found.json").write_text(json.dumps(seen))
    processes.leave()
