"""Files of adapters: round trips, damaged files, agreement with PEFT."""

import copy
import json
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from adapter_models import (
    IDS,
    METHODS,
    Scale,
    Split,
    gpt2,
    llama,
    logits,
    same,
    shake,
    snapshot,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptlab.adapter_files import from_peft, load, save, to_peft
from adaptlab.adapters import (
    Adapter,
    LoraAdapter,
    adapters,
    attach,
    count_parameters,
    detach,
    merge,
    merge_and_unload,
    trainable_parameters,
)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(METHODS), st.integers(0, 99))
def test_save_load_round_trip(tmp_path_factory, make, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), Conv1D(3, 4), nn.LayerNorm(3))
    fresh, x = copy.deepcopy(net), torch.randn(6, 5)
    attach(net, make, ["0", "2"], also_train=["3"])
    shake(net, seed)
    tuned = net(x)
    path = save(net, tmp_path_factory.mktemp("a") / "task.safetensors")
    assert set(load_file(path)) <= set(net.state_dict())
    load(fresh, path)
    assert torch.equal(fresh(x), tuned)
    assert count_parameters(fresh) == count_parameters(net)
    merge_and_unload(fresh)
    torch.testing.assert_close(fresh(x), tuned, rtol=1e-4, atol=1e-4)
    assert not adapters(fresh) and all(p.requires_grad for p in fresh.parameters())


def test_parameter_shared_by_adapters(tmp_path):
    def tie(model):
        first, *others = adapters(model).values()
        for other in others:
            other.A = first.A

    model, fresh = llama(), llama()
    attach(model, LoraAdapter, ["q_proj"])
    tie(model)
    shake(model)
    load(fresh, save(model, tmp_path / "x.safetensors"))
    assert torch.equal(logits(fresh), logits(model))
    assert count_parameters(fresh) == count_parameters(model)
    first, second = adapters(fresh).values()
    assert first.A is second.A and first.B is not second.B


def test_header(tmp_path):
    model = llama()
    model.config.name_or_path = "someone/base"
    attach(model, partial(LoraAdapter, rank=3), ["q_proj"])
    with safe_open(save(model, tmp_path / "x.safetensors"), "pt") as file:
        header = json.loads(file.metadata()["adaptlab"])
    assert header["base_model"] == "someone/base" and header["version"] == 2
    assert header["base_shapes"]["model.layers.*.mlp.up_proj.weight"] == {"24x16": 2}
    first = header["layers"]["model.layers.0.self_attn.q_proj"]
    assert first["method"] == "LoraAdapter" and first["config"]["rank"] == 3


def test_also_train_is_loaded_by_whole_names(tmp_path):
    "A top-level `norm` is the end of the name of every block's norm."
    def net():
        torch.manual_seed(0)
        block = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        return nn.ModuleDict({"block": block, "norm": nn.LayerNorm(4)})

    model = attach(net(), LoraAdapter, ["fc"], also_train=lambda n, p: n.startswith("norm."))
    shake(model)
    fresh = load(net(), save(model, tmp_path / "x.safetensors"))
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())
    assert count_parameters(fresh) == count_parameters(model)


def test_load_refuses_another_base(tmp_path):
    path = save(attach(llama(), LoraAdapter, ["q_proj"]), tmp_path / "x.safetensors")
    for other in (llama(num_hidden_layers=3), llama(intermediate_size=32), gpt2()):
        before = snapshot(other)
        with pytest.raises(ValueError, match="parameters.*differ"):
            load(other, path)
        assert same(other, before) and not adapters(other)
    row = "mlp.up_proj.weight: {'24x16': 2} in the file's base, {'32x16': 2} here"
    with pytest.raises(ValueError, match=row):
        load(llama(intermediate_size=32), path)


def rewrite(path, change):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["adaptlab"])
    change(tensors, header)
    save_file(tensors, path, {"adaptlab": json.dumps(header)})


def test_load_bad_files(tmp_path):
    model = llama()
    before = snapshot(model)

    def bad(change, message):
        path = save(attach(llama(), LoraAdapter, ["q_proj"]), tmp_path / "x.safetensors")
        rewrite(path, change)
        with pytest.raises(ValueError, match=message):
            load(model, path)
        assert same(model, before) and not adapters(model)

    q = "model.layers.0.self_attn.q_proj"
    bad(lambda t, h: t[f"{q}.adaptlab.A"].fill_(float("nan")), "NaN or infinity in model.layers")
    bad(lambda t, h: t.pop(f"{q}.adaptlab.A"), "Missing key")
    bad(lambda t, h: t.update({f"{q}.adaptlab.A": torch.zeros(3, 3)}), "size mismatch")
    bad(lambda t, h: h.update(version=9), "upgrade")
    bad(lambda t, h: h.pop("layers"), "incomplete: it lacks layers")
    bad(lambda t, h: h["also_train"].append("lm_head.weight"), "incomplete: it lacks lm_head")
    bad(lambda t, h: (h["also_train"].append("score"), t.update(score=torch.ones(1))), "score")
    bad(lambda t, h: h["layers"][q].update(module="adaptlab.gone", method="Gone"), "'Gone'")
    bad(lambda t, h: h["layers"][q].update(method="Unheard"), "unknown method 'Unheard'.*make=")
    (tmp_path / "x.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="no readable safetensors"):
        load(model, tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="header"):
        load(model, tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        load(model, tmp_path / "nowhere.safetensors")


def test_load_with_make(tmp_path):
    def local():
        class Local(Adapter):
            def __init__(self, layer, gain):
                super().__init__(layer)
                self.gain = nn.Parameter(torch.tensor(gain))

            def config(self):
                return {}

            def forward(self, x, base_output):
                return base_output * self.gain

        return Local

    model, cls = llama(), local()
    path = save(attach(model, partial(cls, gain=2.0), ["q_proj"]), tmp_path / "x.safetensors")
    Adapter.registry.pop("Local")
    with pytest.raises(ValueError, match="unknown method 'Local'"):
        load(llama(), path)
    fresh = load(llama(), path, make=partial(cls, gain=1.0))
    assert torch.equal(logits(fresh), logits(model))


def test_save_failures_write_nothing(tmp_path):
    model, path = llama(), tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="no adapters"):
        save(model, path)
    attach(model, LoraAdapter, ["q_proj"])
    adapters(model)["model.layers.0.self_attn.q_proj"].B.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        save(model, path)
    with pytest.raises(ValueError, match="NaN or infinity"):
        to_peft(model, path)
    with pytest.raises(ValueError, match="NaN or infinity"):
        merge(model)
    assert not any(a.merged for a in adapters(model).values())

    class Forgetful(Adapter):
        def __init__(self, layer, size=3):
            super().__init__(layer)

    with pytest.raises(TypeError, match="no attribute \\['size'\\]"):
        save(attach(llama(), Forgetful, ["q_proj"]), path)
    assert not list(tmp_path.iterdir())


def test_a_lesson_method_is_found_by_its_module(tmp_path):
    "Another process that has not imported the method's module (of this package) loads the file."
    path = save(attach(llama(), LoraAdapter, ["q_proj"]), tmp_path / "x.safetensors")
    rewrite(path, lambda t, h: [v.update(module="adaptlab.cache", method="Unheard")
                                for v in h["layers"].values()])
    with pytest.raises(ValueError, match="unknown method"):
        load(llama(), path)


def test_files_of_version_1_are_read(tmp_path):
    model = attach(llama(), LoraAdapter, ["q_proj"])
    shake(model)
    path = save(model, tmp_path / "x.safetensors")

    def old(tensors, header):
        header.update(version=1)
        header.pop("ties")
        for key in list(tensors):
            tensors[key.replace(".adaptlab.", ".adapter.")] = tensors.pop(key)

    rewrite(path, old)
    assert torch.equal(logits(load(llama(), path)), logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_tie_is_loaded_on_the_same_tie_only(tmp_path, tied):
    model = attach(llama(tie_word_embeddings=tied), LoraAdapter, ["q_proj"],
                   also_train=["embed_tokens"])
    shake(model)
    path = save(model, tmp_path / "x.safetensors")
    other = llama(tie_word_embeddings=not tied)
    before = snapshot(other)
    with pytest.raises(ValueError, match="same tie_word_embeddings"):
        load(other, path)
    assert same(other, before)
    assert torch.equal(logits(load(llama(tie_word_embeddings=tied), path)), logits(model))


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_trained_beside_codes_load_on_the_full_base(tmp_path, packed):
    class Codes(nn.Linear):
        "A quantised layer, of one or two codes a byte."

        def __init__(self, n_in, n_out):
            super().__init__(n_in, n_out)
            shape = (n_in * n_out // 2, 1) if packed else (n_out, n_in)
            codes = torch.randint(0, 99, shape, dtype=torch.uint8)
            self.weight = nn.Parameter(codes, requires_grad=False)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x @ torch.zeros(self.in_features, self.out_features)

    quantised, full = nn.Sequential(Codes(4, 6)), nn.Sequential(nn.Linear(4, 6))
    attach(quantised, LoraAdapter, ["0"])
    shake(quantised)
    x, plain = torch.randn(2, 4), full(torch.zeros(2, 4))
    path = save(quantised, tmp_path / "x.safetensors")
    load(full, path)
    torch.testing.assert_close(full(x) - full[0].bias, quantised(x) + x @ full[0].weight.T)
    with pytest.raises(ValueError, match="differ"):
        load(nn.Sequential(nn.Linear(4, 7)), path)
    assert torch.equal(detach(full)(torch.zeros(2, 4)), plain)


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_bitsandbytes(tmp_path, kind):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    full, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {
        "compute_dtype": torch.float32}
    quantised = nn.Sequential(getattr(bnb.nn, kind)(64, 64, **options))
    quantised.load_state_dict(full.state_dict())
    plain = quantised.to("cpu")(x)
    attach(quantised, LoraAdapter, ["0"])
    shake(quantised)
    tuned = quantised(x)
    with pytest.raises(TypeError, match="quantised"):
        merge_and_unload(quantised)
    torch.testing.assert_close(quantised(x), tuned)
    base = full(x)
    load(full, save(quantised, tmp_path / "x.safetensors"))
    torch.testing.assert_close(full(x) - base, tuned - plain, rtol=1e-4, atol=1e-3)


FSDP = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, sys.argv[1])
from adapter_models import IDS, Scale, Split, llama, logits
from functools import partial
from adaptlab.adapter_files import from_peft, load, save, to_peft
from adaptlab.adapters import *
from adaptlab.processes import leave
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
for number, make in enumerate((partial(LoraAdapter, rank=3), Scale, Split)):
    def adapted():
        model = llama().train()
        torch.manual_seed(0)
        attach(model, make, ["q_proj", "down_proj"], also_train=["norm"])
        return model
    def step(model):
        optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        return model.eval()
    alone, model, base = adapted(), adapted(), logits(llama())
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(alone), step(model)
    tuned = logits(alone)
    close(logits(model), tuned)
    file = save(model, f"{sys.argv[2]}/{number}.safetensors")
    dist.barrier()
    close(logits(load(llama(), file)), tuned)
    if number == 0:
        folder = to_peft(model, f"{sys.argv[2]}/peft")
        dist.barrier()
        close(logits(from_peft(llama(), folder)), tuned)
    merge(model)
    close(logits(model), tuned)
    with enabled(model, False):
        close(logits(model), base)
    close(logits(model), tuned)
    unmerge(model)
    close(logits(model), tuned)
    merge_and_unload(model)
    close(logits(model), tuned)
    assert not adapters(model)
    again = adapted()
    for block in again.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(again, mesh=mesh)
    logits(again)
    detach(again)
    close(logits(again.eval()), base)
try:
    attach(again, LoraAdapter, ["q_proj"])
except ValueError as error:
    assert "before the model is sharded" in str(error)
else:
    raise AssertionError
leave()
"""


def test_fsdp_2(tmp_path):
    "Two processes agree with one; save, to_peft, merge, unmerge, detach work on sharded models."
    script = tmp_path / "job.py"
    script.write_text(FSDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
               str(script), str(Path(__file__).parent), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


# ---------------------------------------------------------------- PEFT

peft = pytest.importorskip("peft")


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def through_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)  # e.g. missing keys, wrong layout
        for advice in (".*tie_word_embeddings", "fan_in_fan_out"):  # ties; both layouts at once
            warnings.filterwarnings("ignore", message=advice)
        return peft.PeftModel.from_pretrained(model, folder).eval()


CASES = {
    "llama": (llama, {"q_proj": 3, "v_proj": 3, "down_proj": 5}),
    "tied": (partial(llama, tie_word_embeddings=True), {"embed_tokens": 2, "o_proj": 4}),
    "gpt2": (gpt2, {"c_attn": 3, "c_fc": 2, "lm_head": 4}),
    "part": (llama, {"0.self_attn.q_proj": 2, "1.mlp.up_proj": 4}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_ours_and_we_theirs(tmp_path, case, rslora):
    build, ranks = CASES[case]
    model = build()
    for i, (target, rank) in enumerate(ranks.items()):
        dropout = 0.0 if target == "embed_tokens" else 0.1
        make = partial(LoraAdapter, rank=rank, alpha=4 + i, rslora=rslora, dropout=dropout)
        attach(model, make, [target])
    shake(model, std=0.2)
    tuned = logits(model)
    to_peft(model, tmp_path / "ours", base_model_name="some/base")
    theirs = through_peft(build(), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), tuned, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    for folder in ("ours", "theirs"):
        back = from_peft(build(), tmp_path / folder)
        torch.testing.assert_close(logits(back), tuned, rtol=1e-5, atol=1e-5)


def test_peft_conv(tmp_path):
    model, x = Vision().eval(), torch.randn(2, 3, 8, 8)
    attach(model, partial(LoraAdapter, rank=2), ["conv"], also_train=["head"])
    shake(model, std=0.2)
    tuned = model(x)
    theirs = through_peft(Vision(), to_peft(model, tmp_path / "p"))
    torch.testing.assert_close(theirs(x), tuned, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "q")
    back = from_peft(Vision().eval(), tmp_path / "q")
    torch.testing.assert_close(back(x), tuned, rtol=1e-5, atol=1e-5)
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {
        "conv.adaptlab.A", "conv.adaptlab.B", "head.weight", "head.bias"}


@pytest.mark.parametrize("tie", [False, True])
def test_peft_modules_to_save(tmp_path, tie):
    model = llama(tie_word_embeddings=tie)
    attach(model, LoraAdapter, ["q_proj"], also_train=["lm_head"])
    shake(model, std=0.2)
    tuned = logits(model)
    to_peft(model, tmp_path / "p")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tie), tmp_path / "p")
    torch.testing.assert_close(logits(theirs.eval()), tuned, rtol=1e-5, atol=1e-5)
    back = from_peft(llama(tie_word_embeddings=tie), tmp_path / "p")
    torch.testing.assert_close(logits(back), tuned, rtol=1e-5, atol=1e-5)


def test_peft_gets_a_residual_method_as_plain_lora(tmp_path):
    model = attach(llama(), Split, ["q_proj", "up_proj"])
    shake(model, std=0.2)
    tuned = logits(model)
    theirs = through_peft(llama(), to_peft(model, tmp_path / "p"))
    torch.testing.assert_close(logits(theirs), tuned, rtol=1e-5, atol=1e-5)


def test_from_peft_own_folder_with_patterns(tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"], use_rslora=True,
        rank_pattern={"up_proj": 2, "0.self_attn.v_proj": 3}, alpha_pattern={"up_proj": 9},
        init_lora_weights=False, modules_to_save=["norm"],
    )
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path / "p")
    ours = from_peft(llama(), tmp_path / "p")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    v = adapters(ours)["model.layers.0.self_attn.v_proj"]
    assert (v.rank, v.alpha, v.rslora) == (3, 6, True)


def test_same_gradients_as_peft():
    "One step from the same A and B: the same loss and gradients."
    ours = attach(llama().train(), partial(LoraAdapter, rank=3, alpha=5), ["q_proj", "down_proj"])
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(llama().train(), config)
    shake(ours)
    modules = dict(theirs.base_model.model.named_modules())
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (ours, theirs)]
    for name, lora in adapters(ours).items():
        modules[name].lora_A["default"].weight.data.copy_(lora.A)
        modules[name].lora_B["default"].weight.data.copy_(lora.B)
    losses[1] = theirs(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(losses[0], losses[1])
    sum(losses).backward()
    for name, lora in adapters(ours).items():
        torch.testing.assert_close(lora.A.grad, modules[name].lora_A["default"].weight.grad)
        torch.testing.assert_close(lora.B.grad, modules[name].lora_B["default"].weight.grad)


@pytest.mark.parametrize("option", [
    dict(use_dora=True), dict(bias="lora_only"), dict(init_lora_weights="pissa"),
    dict(lora_bias=True),
])
def test_from_peft_refuses_other_formulas(tmp_path, option):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **option)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "p")
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=next(iter(option))):
        from_peft(model, tmp_path / "p")
    assert same(model, before)


def test_from_peft_bad_folders(tmp_path):
    ia3 = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(llama(), ia3).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="IA3"):
        from_peft(llama(), tmp_path / "ia3")
    with pytest.raises(ValueError, match="adapter_config.json"):
        from_peft(llama(), tmp_path)
    folder = to_peft(attach(llama(), LoraAdapter, ["q_proj"]), tmp_path / "p")
    with pytest.raises(ValueError, match="does not fit"):
        from_peft(gpt2(), folder)
    with pytest.raises(ValueError, match="size mismatch"):
        from_peft(llama(hidden_size=32), folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickles"):
        from_peft(llama(), folder)


def test_to_peft_refuses_what_is_no_lora(tmp_path):
    with pytest.raises(ValueError, match="Scale"):
        to_peft(attach(llama(), Scale, ["q_proj"]), tmp_path / "p")
    model = attach(gpt2(), LoraAdapter, ["c_attn"], also_train=["ln_f.bias"])
    with pytest.raises(ValueError, match="whole modules"):
        to_peft(model, tmp_path / "p")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what must not be lost

def test_a_folder_is_never_replaced(tmp_path):
    model = attach(llama(), LoraAdapter, ["q_proj"])
    (tmp_path / "data.txt").write_text("mine")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save(model, tmp_path)
    for _ in range(2):  # as PEFT does it: beside what is there; a second time over the first
        to_peft(model, tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "data.txt"]
    assert from_peft(llama(), tmp_path)
    with pytest.raises(ValueError, match="is a folder"):
        load(llama(), tmp_path)


def test_an_adapter_of_another_model_of_the_same_shape_is_said(tmp_path):
    model = llama()
    model.config.name_or_path = "first/model"
    path = save(attach(model, LoraAdapter, ["q_proj"]), tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(detach(model), path)
        load(llama(), path)  # a model without a name
    other = llama()
    other.config.name_or_path = "second/model"
    with pytest.warns(UserWarning, match="first/model.*second/model"):
        load(other, path)


def test_load_with_make_for_an_unknown_layer(tmp_path):
    path = save(attach(llama(), LoraAdapter, ["q_proj"]), tmp_path / "a.safetensors")
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no module is named model.layers.\*.q_proj"):
        load(model, path, make={"model.layers.7.q_proj": LoraAdapter})
    assert same(model, before)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_from_peft_with_the_base_that_peft_saves_beside_an_embedding(tmp_path, target):
    model = llama(tie_word_embeddings=False)
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["q_proj", target]))
    for name, p in theirs.named_parameters():
        if "lora" in name:
            nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path)
    assert any(k.endswith("base_layer.weight") for k in load_file(
        tmp_path / "adapter_model.safetensors"))
    before = snapshot(model)
    with torch.no_grad():
        torch.testing.assert_close(logits(from_peft(model, tmp_path)), logits(theirs.eval()))
        detach(model)
        assert same(model, before)
        getattr(model, "lm_head" if target == "lm_head" else "model").get_parameter(
            "weight" if target == "lm_head" else "embed_tokens.weight").add_(1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="other base weights"):
        from_peft(model, tmp_path)
    assert same(model, before)


@pytest.mark.parametrize("tie", [False, True])
def test_from_peft_of_a_head_that_peft_has_untied(tmp_path, tie):
    "PEFT trains a copy of the tied head: right on an untied base, refused on a tied one."
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    theirs = peft.get_peft_model(llama(tie_word_embeddings=True), config).eval()
    with torch.no_grad():
        for p in trainable_parameters(theirs):
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    base = llama(tie_word_embeddings=True)
    if not tie:  # what from_pretrained(..., tie_word_embeddings=False) gives
        base.lm_head.weight = nn.Parameter(torch.zeros_like(base.lm_head.weight))
        torch.testing.assert_close(logits(from_peft(base, tmp_path)), logits(theirs))
        return
    before = snapshot(base)
    with pytest.raises(ValueError, match="lm_head.weight.*tied here to model.embed_tokens.weight"):
        from_peft(base, tmp_path)
    assert same(base, before)


def test_from_peft_of_ends_that_are_adapted_together(tmp_path):
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    theirs = peft.get_peft_model(llama(tie_word_embeddings=True), peft.LoraConfig(**options))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        from_peft(llama(tie_word_embeddings=True), tmp_path)


def test_to_peft_of_a_layer_that_is_adapted_and_trained(tmp_path):
    model = attach(llama(tie_word_embeddings=True), LoraAdapter, ["lm_head"],
                   also_train=["embed_tokens"])
    with pytest.raises(ValueError, match="lm_head are both"):
        to_peft(model, tmp_path / "p")
