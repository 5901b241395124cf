"""FSDP 2 by configuration alone: one process on the card trains, resumes, merges and saves."""

import json
import os
import subprocess
import sys

import pytest

from gpu import card

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}  # as `accelerate config` writes it
JOB = """
import json, os, sys
from functools import partial
from pathlib import Path
import torch
from adaptlab import adapter_files, adapters, recipes, train

folder = Path(sys.argv[1])
ids = torch.randint(4, 250, (16, 24), generator=torch.Generator().manual_seed(0))
rows = {"input_ids": ids, "labels": ids}

def base():
    torch.manual_seed(0)
    return recipes.tiny_llama(layers=2)

def adapted():
    return adapters.attach(base(), partial(adapters.LoraAdapter, rank=4), ["q_proj", "up_proj"])

class Dead(Exception): pass

def die(state):
    if state.step == 5:
        raise Dead

def fit(model, **more):
    return train.fit(model, rows, steps=8, batch_size=4, lr=1e-2, precision="bf16", log_every=1,
                     progress=False, **more).history["loss"].tolist()

model, found = adapted(), {}
found["losses"] = fit(model)
found["kinds"] = sorted({type(p).__name__ for p in adapters.trainable_parameters(model)})
adapter_files.save(model, folder / "adapter.safetensors")
with torch.no_grad():
    before = model.eval()(ids.cuda()).logits.float()
    adapters.merge(model)
    after = model(ids.cuda()).logits.float()
    again = adapter_files.load(base().cuda(), folder / "adapter.safetensors").eval()
    loaded = again(ids.cuda()).logits.float()
found["merged"] = float((after - before).norm() / before.norm())
found["loaded"] = float((loaded - before).norm() / before.norm())
kept = dict(checkpoint_dir=folder / "steps", checkpoint_every=4)
try:
    fit(adapted(), callbacks=[die], **kept)
except Dead:
    found["resumed"] = fit(adapted(), **kept)
Path(sys.argv[2]).write_text(json.dumps(found))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def job(folder, settings):
    folder.mkdir()
    script, said = folder / "job.py", folder / "found.json"
    script.write_text(JOB)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1",
         str(script), str(folder), str(said)], env=os.environ | settings,
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(said.read_text())


@pytest.mark.skipif(card.DRY, reason="FSDP shards over GPUs")
def test_trains_as_without(tmp_path):
    plain, sharded = job(tmp_path / "plain", {}), job(tmp_path / "fsdp", FSDP)
    assert plain["kinds"] == ["Parameter"] and sharded["kinds"] == ["DTensor"]
    assert sharded["losses"] == pytest.approx(plain["losses"], rel=2e-2)
    assert sharded["losses"][-1] < sharded["losses"][0]
    assert any(x * 32 % 1 for x in sharded["losses"])  # not in the steps of bfloat16
    for found in (plain, sharded):
        assert max(found["merged"], found["loaded"]) < 3e-2
        assert found["resumed"] == pytest.approx(found["losses"], rel=1e-2)
