"""Adapters: exact round trips, and other libraries' mechanisms."""

import copy
import gc
import pickle
import re
import subprocess
import sys
import weakref
from functools import partial

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from adapter_models import (
    IDS,
    METHODS,
    Bottleneck,
    Scale,
    Shift,
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
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from adaptlab.adapter_files import load, save
from adaptlab.adapters import (
    LoraAdapter,
    adapters,
    attach,
    count_parameters,
    detach,
    enabled,
    is_adapter_key,
    match_layers,
    merge,
    merge_and_unload,
    trainable_parameters,
    unmerge,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}


# ---------------------------------------------------------------- round trips


@st.composite
def nets(draw):
    "A small net with one layer of each drawn kind, and an input for it."
    kind = draw(st.sampled_from(["linear", "conv1d", "conv2d", "embedding"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    n_in, n_out = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    shape = draw(st.lists(st.integers(1, 3), min_size=0, max_size=2))
    torch.manual_seed(draw(st.integers(0, 99)))
    if kind == "linear":
        layer = nn.Linear(n_in, n_out, bias=draw(st.booleans()))
        x = torch.randn(*shape, n_in, dtype=dtype)
    elif kind == "conv1d":
        layer, x = Conv1D(n_out, n_in), torch.randn(*shape, n_in, dtype=dtype)
    elif kind == "conv2d":
        kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        layer = nn.Conv2d(n_in, n_out, kernel, stride, draw(st.integers(0, 1)))
        x = torch.randn(2, n_in, 5, 6, dtype=dtype)
    else:
        layer, x = nn.Embedding(n_in, n_out), torch.randint(0, n_in, shape)
    return nn.Sequential(layer.to(dtype)), x, dtype


@st.composite
def lora_makers(draw):
    return partial(
        LoraAdapter,
        rank=draw(st.integers(1, 4)),
        alpha=draw(st.floats(0.5, 4)),
        rslora=draw(st.booleans()),
        init=draw(st.sampled_from(["kaiming", "gaussian"])),
    )


@settings(max_examples=60, deadline=None)
@given(nets(), lora_makers())
def test_lora_round_trip(net_and_input, make):
    net, x, dtype = net_and_input
    before, plain = snapshot(net), net(x)
    attach(net, make, ["0"])
    assert torch.equal(net(x), plain)
    shake(net)
    lora = net[0].adaptlab
    assert lora.A.dtype == lora.B.dtype == torch.promote_types(dtype, torch.float32)
    tuned = net(x)
    assert tuned.dtype == plain.dtype and tuned.shape == plain.shape
    close = partial(torch.testing.assert_close, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    merge(net)
    close(net(x), tuned)
    with enabled(net, False):
        assert torch.equal(net(x), plain)
    unmerge(net)
    assert torch.equal(net(x), tuned)
    with enabled(net, False):
        assert torch.equal(net(x), plain)
        with enabled(net, True):
            assert torch.equal(net(x), tuned)
        assert torch.equal(net(x), plain)
    detach(net)
    assert torch.equal(net(x), plain) and same(net, before)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(METHODS), st.booleans(), st.booleans(), st.integers(0, 99))
def test_any_method_round_trip(make, bias, merged, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.Tanh(), Conv1D(3, 4))
    net[2].bias.requires_grad_(False)
    x, before = torch.randn(6, 5), snapshot(net)
    plain = net(x)
    attach(net, make, ["0", "2"])
    torch.testing.assert_close(net(x), plain)
    shake(net, seed)
    tuned = net(x)
    if merged:
        merge(net)
        torch.testing.assert_close(net(x), tuned, rtol=1e-4, atol=1e-4)
    with enabled(net, False):
        assert torch.equal(net(x), plain)
    if merged and seed % 2:
        unmerge(net)
        assert torch.equal(net(x), tuned)
    detach(net)
    assert torch.equal(net(x), plain) and same(net, before)


def test_formula_and_gradient():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    attach(nn.Sequential(layer), partial(LoraAdapter, rank=2, alpha=3), ["0"])
    lora = layer.adaptlab

    def run(A, B):
        return torch.func.functional_call(layer, {"adaptlab.A": A, "adaptlab.B": B}, (x,))

    A, B = torch.randn_like(lora.A), torch.randn_like(lora.B)
    expected = x @ (layer.weight + 1.5 * B @ A).T + layer.bias
    torch.testing.assert_close(run(A, B), expected)
    assert torch.autograd.gradcheck(run, (A.requires_grad_(), B.requires_grad_()))
    jacobian = torch.func.jacrev(lambda a: run(a, B))(A)  # works under torch.func
    assert jacobian.shape == (2, 3, 5, 2, 6)


def test_rslora_scaling_and_dropout():
    layer = nn.Linear(8, 8)
    assert LoraAdapter(layer, rank=4, alpha=8).scaling == 2
    assert LoraAdapter(layer, rank=4, alpha=8, rslora=True).scaling == 4
    net = nn.Sequential(layer)
    attach(net, partial(LoraAdapter, dropout=0.5), ["0"])
    shake(net)
    x = torch.randn(64, 8)
    net.train()
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    detach(net)
    attach(net.eval(), partial(LoraAdapter, dropout=0.5), ["0"])
    assert not net[0].adaptlab.training  # an evaluating layer gets an evaluating adapter


# ---------------------------------------------------------------- attach


def test_targets():
    model = llama()
    assert len(match_layers(model, ["q_proj", "v_proj"])) == 4
    assert len(match_layers(model, "0.self_attn.q_proj")) == 1
    assert len(match_layers(model, re.compile(r"model\.layers\.\d\.mlp\..*_proj"))) == 6
    assert len(match_layers(model, lambda n, m: isinstance(m, nn.Linear))) == 15
    for wrong in (["proj"], ["q_proj", "qproj"], re.compile("q_proj"), lambda n, m: False, []):
        with pytest.raises(ValueError, match=r"model\.layers\.\*\.self_attn\.q_proj \(2\)"):
            match_layers(model, wrong)
    with pytest.raises(TypeError, match="names"):
        match_layers(model, [1, 2])


def test_attach_is_atomic():
    model = llama()
    model.lm_head.requires_grad_(False)
    before = snapshot(model)

    def third_fails(layer, calls=[]):  # noqa: B006
        calls.append(layer)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return LoraAdapter(layer)

    class BadPrepare(LoraAdapter):
        def prepare(self):
            self.replace_base(self.base_weight() * 0)
            if self.out_features == 8:
                raise RuntimeError("no statistics for this layer")

    class EarlyReplacement(LoraAdapter):
        def __init__(self, layer):
            super().__init__(layer)
            self.replace_base(self.base_weight() * 0)
            if self.out_features == 8:
                raise RuntimeError("no statistics for this layer")

    for make, error in ((third_fails, RuntimeError), (BadPrepare, RuntimeError),
                        (EarlyReplacement, RuntimeError),
                        (lambda layer: nn.Identity(), TypeError),
                        (lambda layer: LoraAdapter(nn.Linear(2, 2)), TypeError),
                        (partial(LoraAdapter, rank=0), ValueError)):
        with pytest.raises(error):
            attach(model, make, ["q_proj", "v_proj"])
        assert same(model, before) and not adapters(model)
        assert not any("forward" in m.__dict__ for m in model.modules())
    with pytest.raises(TypeError, match="'model.norm'.*supports Linear"):
        attach(model, LoraAdapter, ["q_proj", "norm"])
    with pytest.raises(ValueError, match="also_train"):
        attach(model, LoraAdapter, ["q_proj"], also_train=["score"])
    with pytest.raises(ValueError, match="also_train"):  # after the adapters were made
        attach(model, EarlyReplacement, ["o_proj"], also_train=["score"])
    with pytest.raises(TypeError, match="targets"):
        attach(model, LoraAdapter)
    assert same(model, before) and not adapters(model)


def test_attach_twice_and_to_other_layers():
    model, plain = llama(), logits(llama())
    before = snapshot(model)
    attach(model, LoraAdapter, ["q_proj"])
    with pytest.raises(ValueError, match="has an adapter already"):
        attach(model, LoraAdapter, ["q_proj", "v_proj"])
    assert len(adapters(model)) == 2
    attach(model, Scale, ["up_proj"], also_train="norm")
    attach(model, partial(Bottleneck, width=16), ["mlp"])  # around the module, adapters inside
    attach(model, partial(Bottleneck, width=16), ["self_attn"])  # tuple outputs, keyword input
    assert len(adapters(model)) == 8
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(".adaptlab." in n or n == "model.norm.weight" for n in trained)
    shake(model)
    assert not torch.allclose(logits(model), plain)
    with enabled(model, False):
        assert torch.equal(logits(model), plain)
    with pytest.raises(NotImplementedError, match="Bottleneck can't be folded"):
        merge(model)
    assert not any(a.merged for a in adapters(model).values())
    detach(model)
    assert same(model, before)


def test_attach_to_a_part_then_to_the_whole():
    model = llama()
    before = snapshot(model)
    attach(model.model, LoraAdapter, ["q_proj"], also_train=["norm"])
    shake(model.model)
    attach(model, LoraAdapter, ["lm_head"])
    shake(model)
    detach(model)
    assert same(model, before)


def test_mapping_gives_each_layer_its_own():
    model = llama()
    makers = {f"model.layers.{i}.self_attn.q_proj": partial(LoraAdapter, rank=i + 1)
              for i in range(2)}
    attach(model, makers)
    assert [a.rank for a in adapters(model).values()] == [1, 2]
    with pytest.raises(ValueError, match="no module is named q_proj"):
        attach(llama(), {"q_proj": LoraAdapter})


def test_bitfit_needs_no_adapter(tmp_path):
    model = gpt2()
    before, plain = snapshot(model), logits(model)
    attach(model, {}, also_train=re.compile(r".*\.bias"))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(n.endswith(".bias") for n in trained)
    shake(model)
    tuned = logits(model)
    with enabled(model, False):
        assert torch.equal(logits(model), plain)
        save(model, tmp_path / "bias.safetensors")  # the trained values, also while switched off
    assert torch.equal(logits(model), tuned)
    with enabled(model, False):
        detach(model)
    assert same(model, before)
    load(model, tmp_path / "bias.safetensors")
    assert torch.equal(logits(model), tuned)
    with pytest.raises(ValueError, match="nothing to train"):
        attach(gpt2(), {})


# ---------------------------------------------------------------- other mechanisms


def test_tied_weights():
    model = llama(tie_word_embeddings=True)
    before, plain = snapshot(model), logits(model)
    attach(model, LoraAdapter, ["lm_head"])
    shake(model)
    tuned, embedding = logits(model), model.model.embed_tokens.weight.clone()
    merge(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    detach(model)
    assert same(model, before) and torch.equal(logits(model), plain)


def test_merge_and_unload_keeps_an_untied_head(tmp_path):
    model = llama(tie_word_embeddings=True)
    attach(model, LoraAdapter, ["lm_head", "q_proj"])
    shake(model)
    tuned = logits(model)
    merge_and_unload(model).save_pretrained(tmp_path / "m")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(back), tuned, rtol=1e-4, atol=1e-4)


def test_shared_module_gets_one_adapter(tmp_path):
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Linear(4, 4))})

    def run(x):
        return net["b"](net["a"](x))

    x, plain, fresh = torch.randn(3, 4), run(torch.ones(1, 4)), copy.deepcopy(net)
    attach(net, LoraAdapter, ["b.0"])  # its second name
    assert list(adapters(net)) == ["a.0"] and count_parameters(net)[0] == 64
    shake(net)
    assert not torch.allclose(run(torch.ones(1, 4)), plain)
    tuned = run(x)
    load(fresh, save(net, tmp_path / "x.safetensors"))
    assert torch.equal(fresh["b"](fresh["a"](x)), tuned)
    merge(net)
    torch.testing.assert_close(run(x), tuned, rtol=1e-4, atol=1e-4)
    detach(net)
    assert torch.equal(run(torch.ones(1, 4)), plain)


@pytest.mark.parametrize("make", METHODS)
def test_deepcopy_and_pickle_are_independent(make):
    model = llama()
    plain = logits(model)
    attach(model, make, ["q_proj"], also_train=["lm_head"])
    shake(model)
    tuned = logits(model)
    copies = [copy.deepcopy(model), copy.deepcopy(merge(model))]
    unmerge(model)
    if make is not Split:
        copies.append(pickle.loads(pickle.dumps(model)))
    detach(model)
    assert torch.equal(logits(model), plain)
    for twin in copies:
        torch.testing.assert_close(logits(twin), tuned, rtol=1e-4, atol=1e-4)
        if adapters(twin)["model.layers.0.self_attn.q_proj"].merged:
            unmerge(twin)
        assert torch.equal(logits(twin), tuned)
        assert torch.equal(logits(detach(twin)), plain)


@pytest.mark.parametrize("state", ["attached", "merged", "copied", "detached"])
def test_a_deleted_model_is_freed_at_once(state):
    "No reference cycles: memory must not wait for the garbage collector."
    gc.collect()
    gc.disable()
    try:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        attach(net, Split, ["0"])
        net = copy.deepcopy(net) if state == "copied" else net
        net = merge(net) if state == "merged" else detach(net) if state == "detached" else net
        alive = weakref.ref(net[0])
        del net
        assert alive() is None
    finally:
        gc.enable()


def test_compile_sees_the_switches():
    model = llama()
    plain = logits(model)
    attach(model, LoraAdapter, ["q_proj", "lm_head"])
    shake(model)
    tuned = logits(model)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(logits(fast), tuned)
    with enabled(fast, False):
        close(logits(fast), plain)
    close(logits(fast), tuned)
    merge(fast)
    close(logits(fast), tuned)
    unmerge(fast)
    assert list(adapters(fast)) == list(adapters(model))
    loss = fast(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in trainable_parameters(model))
    close(logits(detach(fast)), plain)


def gradients(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [p.grad.clone() for p in trainable_parameters(model)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing(reentrant):
    model = llama().train()
    attach(model, LoraAdapter, ["q_proj", "up_proj"])
    shake(model)
    expected = gradients(model)
    if reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for got, want in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_keeps_float32_adapters(dtype):
    model = llama().to(dtype)
    plain = logits(model)
    attach(model, LoraAdapter, ["q_proj", "up_proj", "embed_tokens"])
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    assert torch.equal(logits(model), plain)
    shake(model)
    tuned = logits(model)
    assert tuned.dtype == dtype
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model))
    merge(model)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    scale = tuned.abs().max().item()
    torch.testing.assert_close(logits(model), tuned, rtol=0.1, atol=0.1 * scale)
    assert torch.equal(logits(detach(model)), plain)


def test_autocast():
    model = llama()
    attach(model, LoraAdapter, ["q_proj", "up_proj"])
    shake(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    torch.testing.assert_close(out.logits.float(), logits(model), rtol=0.1, atol=0.1)
    assert {p.grad.dtype for p in trainable_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("merged", [False, True])
def test_conversion_of_an_adapted_model(merged):
    "`.to` reaches the weights that are set aside too."
    model = llama()
    attach(model, Split, ["q_proj"], also_train=["lm_head"])
    if merged:
        merge(model)
    model.double()
    with enabled(model, False):
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        logits(model)
    assert logits(model).dtype == torch.float64
    if merged:
        unmerge(model)
    assert {p.dtype for p in detach(model).parameters()} == {torch.float64}


def test_save_pretrained_keeps_the_base_names(tmp_path):
    model = llama()
    plain, names = logits(model), set(model.state_dict())
    attach(model, LoraAdapter, ["q_proj"])
    assert names < set(model.state_dict())
    model.save_pretrained(tmp_path / "m")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(logits(back), plain)


class Double(ModelHook):
    "A hook of accelerate that changes the output."

    def post_forward(self, module, output):
        return 2 * output


def shifted(layer):
    net = nn.Sequential(layer)
    attach(net, Shift, ["0"])
    nn.init.ones_(adapters(net)["0"].shift)
    return net


def test_a_hook_before_attach_goes_around_the_adapter():
    "So that merging, which changes the weight inside the hook, changes no answer."
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    add_hook_to_module(layer, Double())
    plain = layer(x)
    net = shifted(layer)
    torch.testing.assert_close(net(x), plain + 2)
    torch.testing.assert_close(merge(net)(x), plain + 2)
    unmerge(net)
    remove_hook_from_module(layer)  # the adapter stays
    torch.testing.assert_close(net(x), plain / 2 + 1)
    detach(net)
    assert torch.equal(net(x), plain / 2) and not adapters(net)


def test_a_hook_after_attach_does_not_bring_the_adapter_back():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    plain = layer(x)
    net = shifted(layer)
    add_hook_to_module(layer, Double())
    torch.testing.assert_close(net(x), 2 * (plain + 1))
    detach(net)
    assert torch.equal(net(x), 2 * plain)
    remove_hook_from_module(layer)
    assert torch.equal(net(x), plain)
    torch.testing.assert_close(shifted(layer)(x), plain + 1)


def test_a_wrapper_around_our_forward_may_outlive_the_adapter():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    plain = layer(x)
    net = shifted(layer)
    ours = layer.forward
    layer.forward = lambda *args: 2 * ours(*args)
    torch.testing.assert_close(net(x), 2 * (plain + 1))
    detach(net)
    assert torch.equal(net(x), 2 * plain)
    again = shifted(layer)
    torch.testing.assert_close(again(x), 2 * plain + 1)
    assert torch.equal(detach(again)(x), 2 * plain)


@pytest.mark.parametrize("offload", ["disk", "cpu"])
def test_offloaded_layers_are_refused(tmp_path, offload):
    model = llama()
    plain = logits(model)
    if offload == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for also in ((), "norm"):
        with pytest.raises(ValueError, match="offloaded"):
            attach(model, {} if also else LoraAdapter, None if also else ["q_proj"], also)
    assert not adapters(model) and torch.equal(logits(model), plain)


def test_a_model_without_weights_can_be_counted_but_not_merged():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6))
    assert count_parameters(attach(model, partial(LoraAdapter, rank=2), ["0"])) == (20, 50)
    with pytest.raises(TypeError, match="meta device"):
        merge(model)


def test_layers_that_are_not_called_are_refused():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with pytest.raises(TypeError, match="MultiheadAttention"):
        attach(block, LoraAdapter, ["out_proj"])
    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        attach(block, LoraAdapter, ["linear1"])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        x = torch.randn(2, 3, 8)
        attach(block, LoraAdapter, ["linear1"])
        plain = block(x)
        shake(block)
        with torch.no_grad():
            assert not torch.allclose(block(x), plain)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class Reads(nn.Module):
    """Runs `b`, computes with the weight of `a` (and with what `helper` does)."""

    def __init__(self, read=lambda self, x: x @ self.a.weight.T):
        super().__init__()
        self.a, self.b, self.read = nn.Linear(4, 4), nn.Linear(4, 4), read

    def forward(self, x):
        return self.b(self.read(self, x))


class ReadsInSource(nn.Module):
    "The same, written out."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        bias = self.a.bias.float() if hasattr(self.a, "bias") else None
        return self.b(nn.functional.linear(x, self.a.weight.float(), bias))


class Processor:
    "Runs the layers of the module that is handed to it, as diffusers' attention processors do."

    def __call__(self, owner, x):
        return owner.a(x)


class HandsOver(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.processor = nn.Linear(4, 4), Processor()

    def fuse(self):
        self.fused = torch.cat([self.a.weight.data, self.a.weight.data])

    def forward(self, x):
        return self.processor(self, x)


def test_a_module_that_hands_itself_over_is_judged_by_its_first_pass():
    model, x = nn.Sequential(HandsOver()), torch.randn(2, 4)
    attach(model, partial(LoraAdapter, rank=1), ["a"])
    assert model(x).shape == (2, 4) and not adapters(model)["0.a"].bypassed


def test_a_weight_that_is_read_is_refused_at_attach():
    model = ReadsInSource()
    before = snapshot(model)
    with pytest.raises(TypeError, match="'a': ReadsInSource reads this weight without calling"):
        attach(model, LoraAdapter, ["a", "b"])
    assert same(model, before)
    assert torch.isfinite(attach(model, LoraAdapter, ["b"])(torch.ones(1, 4))).all()


@pytest.mark.parametrize("train", [True, False])
def test_a_weight_that_is_read_is_refused_at_the_first_pass(train):
    "Where the source does not tell: by a helper, on another module's layer."
    model, x = Reads().train(train), torch.randn(2, 4)
    plain = model(x)
    attach(model, LoraAdapter, ["a", "b"])
    with pytest.raises(TypeError, match="layer 'a'.*does nothing"):
        model(x)
    with pytest.raises(TypeError, match="layer 'a'.*reads its weight"):
        merge(model)
    assert torch.equal(detach(model)(x), plain)
    attach(model, LoraAdapter, ["b"])
    shake(model)
    tuned = model(x)
    torch.testing.assert_close(merge(model)(x), tuned, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_called_and_read_is_not_merged():
    model = Reads(lambda self, x: self.a(x) @ self.a.weight)
    attach(model, LoraAdapter, ["a"])
    shake(model)
    tuned = model(torch.ones(1, 4))
    with pytest.raises(TypeError, match="merged model would answer otherwise"):
        merge(model)
    assert torch.equal(model(torch.ones(1, 4)), tuned)


def test_a_layer_that_is_not_run_is_no_fault():
    "An expert that is not chosen, a weight of which only the type is asked."
    model = Reads(lambda self, x: x.to(self.a.weight.dtype))
    attach(model, LoraAdapter, ["a", "b"])
    for _ in range(5):
        model(torch.ones(1, 4))
    merge(model)


def test_the_watch_ends_by_itself():
    model = attach(llama(), LoraAdapter, ["q_proj"])
    logits(model)
    watch = next(iter(model._forward_pre_hooks.values())).__self__
    assert watch.left == {(False, False): 0}
    detach(model)
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not model._forward_hooks_always_called


def tiny(kind, **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return config, lambda head: getattr(transformers, f"{kind}{head}")(config).eval()


BART = dict(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_position_embeddings=32)
T5 = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
BERT = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2)
SPEECH = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
              conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1,
              num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=40)
BYPASSED = {
    "mamba": ("Mamba", dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4),
              "ForCausalLM", "dt_proj"),
    "wavlm": ("WavLM", SPEECH, "ForCTC", "q_proj"),
    "t5": ("T5", T5, "ForConditionalGeneration", "shared"),
    "bart": ("Bart", BART, "ForConditionalGeneration", "shared"),
    "mobilebert": ("MobileBert", dict(BERT, embedding_size=8, intra_bottleneck_size=8,
                                      true_hidden_size=8), "ForMaskedLM", "dense.*decoder"),
    "deberta": ("DebertaV2", dict(BERT, relative_attention=True), "Model", "rel_embeddings"),
}


@pytest.mark.parametrize("case", BYPASSED)
def test_bypassed_layers_of_transformers(case):
    kind, sizes, head, target = BYPASSED[case]
    model = tiny(kind, **sizes)[1](head)
    names = ["predictions.decoder"] if case == "mobilebert" else [target]
    make = Bottleneck if target == "shared" else LoraAdapter
    make = partial(make, width=16) if target == "shared" else make
    with pytest.raises(TypeError, match="would be ignored"):
        attach(model, make, names)


SEVERAL = {  # models with ties, and whether their settings give up the tie
    "bart": ("Bart", BART, "ForConditionalGeneration", False),
    "t5": ("T5", T5, "ForConditionalGeneration", False),
    "umt5": ("UMT5", dict(T5, tie_word_embeddings=True), "ForConditionalGeneration", True),
    "bert": ("Bert", BERT, "ForMaskedLM", False),
    "gpt2": ("GPT2", dict(vocab_size=40, n_embd=16, n_layer=1, n_head=2), "LMHeadModel", False),
}


@pytest.mark.parametrize("case", SEVERAL)
@pytest.mark.parametrize("also", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_tied_weights_merged_saved_and_loaded(tmp_path, case, also):
    kind, sizes, head, stays = SEVERAL[case]
    config, build = tiny(kind, **sizes)
    model = build(head)
    ids = dict(input_ids=IDS, decoder_input_ids=IDS) if "For" in head and "Cond" in head else {
        "input_ids": IDS}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    assert ends[0].weight is ends[1].weight
    plain = model(**ids).logits
    makers = {n: LoraAdapter for n, m in model.named_modules() if m is ends[1]}
    attach(model, makers, also_train=(lambda n, p: p is ends[0].weight) if also else ())
    shake(model)
    tuned = model(**ids).logits
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(merge(model)(**ids).logits, tuned)
    with enabled(model, False):
        close(model(**ids).logits, plain)
    close(model(**ids).logits, tuned)
    unmerge(model)
    twin = detach(copy.deepcopy(model))
    close(twin(**ids).logits, plain)
    merge_and_unload(model)
    assert model.config.tie_word_embeddings is stays
    close(model(**ids).logits, tuned)
    model.save_pretrained(tmp_path)
    back, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    close(back.eval()(**ids).logits, tuned)


@pytest.mark.parametrize("adapted", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_end_of_a_trained_tie(adapted):
    model = llama(tie_word_embeddings=True)
    plain = logits(model)
    attach(model, LoraAdapter, [adapted], also_train=["lm_head"])
    shake(model)
    tuned = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-4)
    with enabled(model, False):
        assert torch.equal(logits(model), plain)
    torch.testing.assert_close(logits(merge_and_unload(copy.deepcopy(model))), tuned,
                               rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(detach(model)), plain)


class Rounded(nn.Linear):
    "Its forward is not linear in the weight."

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


class Codes(nn.Linear):
    "A quantised layer: codes and a scale."

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        codes = (self.weight.data * 200).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 200, self.bias)


@pytest.mark.parametrize("layer", [Rounded, Codes])
@pytest.mark.parametrize("action", [merge, merge_and_unload])
def test_a_merge_that_would_change_the_answer_is_refused(layer, action):
    model, x = nn.Sequential(layer(4, 3)), torch.randn(2, 4)
    plain, before = model(x), snapshot(model)
    attach(model, partial(LoraAdapter, dropout=0.5), ["0"]).eval()
    shake(model)
    tuned = model(x)
    with pytest.raises(TypeError, match="layer '0'.*(not linear in its weight|quantised)"):
        action(model)
    assert torch.equal(model(x), tuned)
    assert torch.equal(detach(model.train())(x), plain) and same(model, before)


def test_a_method_that_needs_the_weight_says_that_it_is_quantised():
    with pytest.raises(TypeError, match="layer '0'.*quantised"):
        attach(nn.Sequential(Codes(4, 3)), Split, ["0"])


def test_a_module_called_adapter_is_not_ours():
    model = nn.ModuleDict({"adapter": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    attach(model, LoraAdapter, ["adapter"])
    keys = [k for k in model.state_dict() if is_adapter_key(k)]
    assert keys == ["adapter.adaptlab.A", "adapter.adaptlab.B"]
    assert not is_adapter_key("wav2vec2.adapter.layers.0.conv.weight")


@pytest.mark.parametrize("shape", [(6,), (0, 6), (5, 6), (2, 3, 6), (2, 2, 3, 6), (2, 0, 6)])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_inputs_of_any_shape(shape, kind):
    net = nn.Sequential(kind(6, 5) if kind is nn.Linear else kind(5, 6))
    attach(net, partial(LoraAdapter, rank=2, alpha=3), ["0"])
    shake(net)
    lora, x = adapters(net)["0"], torch.randn(shape)
    with enabled(net, False):
        expected = net(x) + 1.5 * x @ lora.A.T @ lora.B.T
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_fsdp_1_is_refused_in_one_sentence():
    class FullyShardedDataParallel(nn.Module):  # as torch's, which needs processes
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = attach(nn.Sequential(nn.Linear(3, 3)), LoraAdapter, ["0"])
    with pytest.raises(ValueError, match="use FSDP 2"):
        merge(FullyShardedDataParallel(model))
    with pytest.raises(ValueError, match="use FSDP 2"):
        attach(FullyShardedDataParallel(nn.Sequential(nn.Linear(3, 3))), LoraAdapter, ["0"])


DDP = """
import torch, torch.distributed as dist, os
from torch.nn.parallel import DistributedDataParallel as DDP
import sys
sys.path.insert(0, sys.argv[2])
from adapter_models import IDS, llama, shake
from adaptlab.adapter_files import save
from adaptlab.adapters import *
from adaptlab.processes import leave
dist.init_process_group("gloo")
rank = dist.get_rank()
model = llama().train()
torch.manual_seed(rank)  # another random A on each process: DDP must send out the first
attach(model, LoraAdapter, ["q_proj", "up_proj"])
wrapped = DDP(model)
shake(wrapped)
optimizer = torch.optim.SGD(trainable_parameters(wrapped), lr=0.5)
for _ in range(3):
    optimizer.zero_grad()
    wrapped(input_ids=IDS[rank:rank + 1], labels=IDS[rank:rank + 1]).loss.backward()
    optimizer.step()
assert len(adapters(wrapped)) == 4
if rank == 0:
    save(wrapped, sys.argv[1])
leave()
"""


def test_two_processes_match_one(tmp_path):
    from pathlib import Path

    script, path = tmp_path / "ddp.py", tmp_path / "ddp.safetensors"
    script.write_text(DDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
               str(script), str(path), str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    model = llama().train()
    torch.manual_seed(0)
    attach(model, LoraAdapter, ["q_proj", "up_proj"])
    shake(model)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    for name, value in load_file(path).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_states_are_checked():
    model = llama()
    for action in (merge, unmerge, detach, merge_and_unload):
        with pytest.raises(ValueError, match="no adapters"):
            action(model)
    with pytest.raises(ValueError, match="no adapters"), enabled(model, False):
        pass
    attach(model, LoraAdapter, ["q_proj"])
    with pytest.raises(ValueError, match="not merged"):
        unmerge(model)
    with pytest.raises(ValueError, match="already merged"):
        merge(merge(model))
    with pytest.raises(RuntimeError, match="stop"), enabled(model, False):
        raise RuntimeError("stop")
    assert all(a.enabled for a in adapters(model).values())


@pytest.mark.parametrize("wrong", [
    dict(rank=0), dict(rank=2.5), dict(rank=True), dict(alpha=float("nan")), dict(dropout=1.0),
    dict(dropout=-0.1), dict(init="pissa"),
])
def test_lora_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoraAdapter(nn.Linear(2, 2), **wrong)


def test_lora_layers():
    for layer in (nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(2, 2, 1, padding_mode="circular"),
                  nn.Embedding(4, 4, max_norm=1.0), nn.LayerNorm(4), nn.Conv1d(2, 2, 1)):
        with pytest.raises(TypeError):
            LoraAdapter(layer)
    with pytest.raises(ValueError, match="dropout"):
        LoraAdapter(nn.Embedding(4, 4), dropout=0.1)


def test_a_pruned_layer_is_adapted_and_its_merge_refused():
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(4, 3))
    prune.random_unstructured(model[0], "weight", 0.5)
    x = torch.randn(2, 4)
    plain = model(x)
    attach(model, LoraAdapter, ["0"])
    shake(model)
    adapted = model(x)
    assert not torch.allclose(adapted, plain)
    with pytest.raises(NotImplementedError, match="no weight"):
        merge(model)
    torch.testing.assert_close(model(x), adapted)
    torch.testing.assert_close(detach(model)(x), plain)


def test_attach_inside_ddp_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1,
                                         init_method=f"file://{tmp_path / 'meet'}")
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4)))
        with pytest.raises(ValueError, match="before DistributedDataParallel"):
            attach(model, LoraAdapter, ["0"])
        assert not adapters(model) and all(p.requires_grad for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_a_bare_layer_is_refused_with_advice():
    with pytest.raises(ValueError, match="Sequential"):
        attach(nn.Linear(4, 4), LoraAdapter, lambda name, module: True)
