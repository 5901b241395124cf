"""A training step with each change against LoRA at equal count, and against PEFT's own prefixes."""

import copy
from functools import partial

import peft
import torch
from clock import in_turn, row
from steps import four_blocks, training_step

from adaptlab.evaluate import peak_memory
from adaptlab.modular import unified_view as uv


def test_train_step_against_lora():
    "About 37,000 numbers for a block. Prefixes make attention longer: they meet PEFT's, below."
    model, ids = four_blocks()
    step = partial(training_step, model, ids)
    lora = step(partial(uv.apply_delta, configs=uv.lora(26, 26)))
    for name, preset in {
        "parallel adapter": uv.scaled_parallel_adapter(32),
        "sequential adapter": uv.DeltaConfig(insertion="sequential", dim=32, init="lora"),
        "MAM": uv.mam_adapter(24, 24, 4.0, None),
    }.items():
        ours = step(partial(uv.apply_delta, configs=preset))
        row(f"{name} against LoRA, step", *in_turn(ours, lora, rounds=5), bound=1.0)
        row(f"{name} against LoRA, memory", peak_memory(ours, "cpu") / 2**20,
            peak_memory(lora, "cpu") / 2**20, unit="MiB",
            bound=1.05 if name == "MAM" else 1.0)  # a prefix makes keys longer, and needs a mask


def test_prefix_and_lora_against_peft():
    model, ids = four_blocks()
    for name, preset, config in (
        ("prefix l = 30", uv.prefix_tuning(30, None),
         peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30)),
        ("LoRA r = 16", uv.lora(16, 32), peft.LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])),
    ):
        ours = training_step(model, ids, partial(uv.apply_delta, configs=preset))
        theirs = _peft_step(model, ids, config)
        row(f"{name} against PEFT, step", *in_turn(ours, theirs, rounds=5), bound=1.0)
        row(f"{name} against PEFT, memory", peak_memory(ours, "cpu") / 2**20,
            peak_memory(theirs, "cpu") / 2**20, bound=1.0, unit="MiB")


def _peft_step(model, ids, config):
    "The same step of PEFT's model."
    net = peft.get_peft_model(copy.deepcopy(model), config)
    adam = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.0)

    def work():
        adam.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        adam.step()

    return work
