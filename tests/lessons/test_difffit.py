"""DiffFit: scales, what is trained, folding, files, positions, bad input, full scale."""

import copy
import json
import math
from contextlib import nullcontext
from functools import partial

import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptlab import adapter_files, adapters, recipes
from adaptlab.bench.diffusion import XL_2, ddpm_loss
from adaptlab.bench.runs import launch, start_run
from adaptlab.experiments import difffit as told
from adaptlab.experiments.difffit import FULL, SMALL, make_dit
from adaptlab.sparse.difffit import (
    DiffFit, DiffFitConfig, ScaledBranch, branch_ends, interpolate_sincos_pos_embed, param_groups,
    trainable_summary)
from adaptlab.train import Training
from tiny_models import noisy_pictures as batch

EVERY = ("attn", "mlp", "q", "k", "v", "o", "fc2")


def alive(classes=10, **shape):
    "A small DiT whose gates and last layer are not zero, as after training."
    torch.manual_seed(0)
    return tiny_models.alive(make_dit(
        **{"dim": 32, "depth": 2, "heads": 2, "classes": classes} | shape))


def shaken(model):
    with torch.no_grad():
        for p in adapters.trainable_parameters(model):
            p.add_(0.3 * torch.randn_like(p))
    return model


# what is wrapped


@pytest.mark.parametrize("locations", [(), ("attn", "mlp"), ("q", "v"), EVERY])
def test_starts_as_the_base_folds_and_comes_back(locations):
    model, inputs = alive(), batch()
    y0 = model(*inputs)
    DiffFit.wrap(model, DiffFitConfig(gamma_locations=locations))
    assert torch.equal(model(*inputs), y0)
    shaken(model)
    y = model(*inputs)
    assert not torch.allclose(y, y0, atol=1e-2)
    torch.testing.assert_close(adapters.merge(model)(*inputs), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapters.unmerge(model)(*inputs), y)
    adapters.detach(model)
    assert torch.equal(model(*inputs), y0)


def test_the_trainable_set_is_the_papers_rule():
    model = DiffFit.wrap(alive())
    rule = {n for n, _ in model.named_parameters()
            if any(part in n for part in ("bias", "norm", "gamma", "y_embed"))}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == rule
    found = trainable_summary(model)
    assert found["gamma"] == 2 * 2 * 32 and found["extra"] == 11 * 32 and found["norm"] == 0
    assert found["all"] == sum(p.numel() for n, p in model.named_parameters() if n in rule)


@pytest.mark.parametrize("locations, gamma, total", [
    ((), 0, 607_136), (("attn", "mlp"), 64_512, 671_648), (EVERY, 225_792, 832_928)])
def test_counts_at_the_papers_size(locations, gamma, total):
    with torch.device("meta"):
        model = make_dit(*XL_2[:5], 101, *XL_2[6:])
        DiffFit.wrap(model, DiffFitConfig(gamma_locations=locations))
    found = trainable_summary(model)
    assert (found["bias"], found["extra"], found["gamma"]) == (489_632, 117_504, gamma)
    assert found["all"] == total
    assert round(sum(p.numel() for p in adapters.base_parameters(model).values()) / 1e6) == 674


def test_norms_by_type_and_models_of_transformers():
    vit = recipes.TinyViT()
    DiffFit.wrap(vit, DiffFitConfig(extra_trainable=()))
    assert trainable_summary(vit)["norm"] == 7 * 2 * 64
    names = set(adapters.also_trained(vit))
    assert "norm.weight" in names and not any(n.endswith("fc1.weight") for n in names)
    bert = recipes.tiny_bert(n_classes=2)
    DiffFit.wrap(bert, DiffFitConfig(extra_trainable=("classifier",)))
    assert set(adapters.adapters(bert)) == {
        f"bert.encoder.layer.{i}.{end}" for i in range(2)
        for end in ("attention.output.dense", "output.dense")}
    assert "classifier.weight" in adapters.also_trained(bert)


def test_new_biases_where_there_are_none(tmp_path):
    llama, ids = recipes.tiny_llama(), torch.randint(0, 260, (2, 7))
    config = DiffFitConfig(gamma_locations=("q", "k", "v", "o"), gamma_layers=(0,), add_bias=True,
                           extra_trainable=())
    y0 = llama(ids).logits
    DiffFit.wrap(llama, config)
    assert torch.equal(llama(ids).logits, y0)
    own = adapters.adapters(llama)
    assert len(own) == 14 and all(a.bias is not None for a in own.values())  # seven per block
    assert sum(a.gamma.numel() > 0 for a in own.values()) == 4
    y = shaken(llama)(ids).logits
    file = adapter_files.save(llama, tmp_path / "d.safetensors")
    torch.testing.assert_close(adapters.merge(llama)(ids).logits, y, rtol=1e-3, atol=1e-3)
    adapters.detach(llama)
    torch.testing.assert_close(adapter_files.load(llama, file)(ids).logits, y)


# scales


def test_gradient_of_a_scale():
    "The sum over batch and tokens of dL/dh * gate * branch, against autograd in float64."
    model = DiffFit.wrap(alive()).double()
    block, scale = model.blocks[0], adapters.adapters(model)["blocks.0.attn.proj"]
    h, c = torch.randn(2, 16, 32).double(), torch.randn(2, 32).double()
    seen = []
    hook = block.attn.register_forward_hook(lambda m, i, o: seen.append(o))
    out = block(h, c)
    hook.remove()
    gate = block.adaLN_modulation(c)[:, None].chunk(6, -1)[2]
    G = torch.randn_like(out)
    attn = seen[0].detach()
    middle = (h + gate * attn).detach().requires_grad_()  # what the MLP's half of the block sees
    s, k, g = block.adaLN_modulation(c)[:, None].chunk(6, -1)[3:]
    rest = middle + g * block.mlp(block.norm2(middle) * (1 + k) + s)
    into = torch.autograd.grad(rest, middle, G)[0]
    found = torch.autograd.grad(out, scale.gamma, G)[0][0]
    torch.testing.assert_close(found, (into * gate * attn).sum((0, 1)))


def test_a_scale_is_a_diagonal_left_multiplier_and_bitfit_is_scale_one():
    base, (x, t, y) = alive(), batch()
    scaled = DiffFit.wrap(copy.deepcopy(base), DiffFitConfig(gamma_locations=("attn",)))
    with torch.no_grad():
        for own in adapters.adapters(scaled).values():
            own.gamma.mul_(torch.rand_like(own.gamma) + 0.5)
        for i, block in enumerate(base.blocks):
            gamma = adapters.adapters(scaled)[f"blocks.{i}.attn.proj"].gamma[0]
            block.attn.proj.weight.copy_(gamma.diag() @ block.attn.proj.weight)
            block.attn.proj.bias.mul_(gamma)
    torch.testing.assert_close(scaled(x, t, y), base(x, t, y))
    nets = []
    for locations in ((), ("attn", "mlp")):
        net = DiffFit.wrap(alive(), DiffFitConfig(gamma_locations=locations))
        for own in adapters.adapters(net).values():
            own.gamma.requires_grad_(False)
        torch.manual_seed(0)
        sgd = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            ddpm_loss(net, (x, y)).backward()
            sgd.step()
            sgd.zero_grad()
        nets.append(net(x, t, y))
    assert torch.equal(*nets)


def test_a_whole_branch_with_a_tuple_and_dropout_that_commutes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x)

    net, x = Net(), torch.randn(2, 3, 8)
    adapters.attach(net, partial(ScaledBranch, width=8), ["mha"])
    y, weights = net(x)
    with torch.no_grad():
        adapters.adapters(net)["mha"].gamma.fill_(2)
    z, same = net(x)
    torch.testing.assert_close(z, 2 * y)
    assert torch.equal(same, weights)
    with pytest.raises(NotImplementedError, match="last linear layer"):
        adapters.merge(net)
    gamma, a = torch.rand(8), torch.randn(5, 8)
    torch.manual_seed(0)
    first = gamma * nn.functional.dropout(a, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(nn.functional.dropout(gamma * a, 0.5), first)


def test_half_precision_keeps_small_steps_and_conv1d_folds():
    net = nn.Sequential(Conv1D(6, 4))
    adapters.attach(net, partial(ScaledBranch, rows=[[2, 4]]), ["0"])
    with torch.no_grad():
        adapters.adapters(net)["0"].gamma.fill_(3)
    x = torch.randn(5, 4)
    y = net(x)
    torch.testing.assert_close(adapters.merge(net)(x), y)
    low = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    adapters.attach(low, ScaledBranch, ["0"])
    own = adapters.adapters(low)["0"]
    assert own.gamma.dtype == torch.float32
    with torch.no_grad():
        for _ in range(200):
            own.gamma.add_(1e-4)  # each one would be lost in bfloat16
    x = torch.randn(4000, 64).bfloat16()
    base = nn.functional.linear(x, low[0].weight, low[0].bias).float()
    made = low(x)
    assert made.dtype == torch.bfloat16
    grown = (made.detach().float() * base.sign()).mean() / base.abs().mean()
    assert abs(float(grown) - 1.02) < 2e-3
    with pytest.warns(UserWarning, match="half precision"):
        DiffFit.wrap(alive().bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_pass_in_half_precision_gives_what_autograd_gives(dtype):
    layer = nn.Linear(8, 6).to(dtype)
    own, x, G = ScaledBranch(layer), torch.randn(2, 5, 8, dtype=dtype), torch.randn(2, 5, 6)
    with torch.no_grad():
        own.gamma.add_(0.1 * torch.randn_like(own.gamma))
    y = layer(x).detach().requires_grad_()
    G = G.to(dtype)
    plain = (y * own.scale()).to(dtype)
    expected = torch.autograd.grad(plain, (y, own.gamma), G)
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            made = own(x, y)
        assert made.dtype == dtype and torch.equal(made, plain)
        for a, b in zip(torch.autograd.grad(made, (y, own.gamma), G), expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


def test_training_moves_only_what_it_should(tmp_path):
    model = alive()
    before = copy.deepcopy(model.state_dict())
    x, _, y = batch(16)
    DiffFit.wrap(model)
    Training(steps=3, batch_size=8, lr=1e-2).fit(model, (x, y), ddpm_loss, device="cpu",
                                                 progress=False)
    moved = {n for n, p in model.named_parameters()
             if n in before and not torch.equal(p, before[n])}
    assert moved and all("bias" in n or "y_embed" in n for n in moved)
    file = adapter_files.save(model, tmp_path / "d.safetensors")
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        assert all("bias" in k or "gamma" in k or "y_embed" in k for k in f.keys())
    inputs = batch()
    with torch.no_grad():
        torch.testing.assert_close(adapter_files.load(alive(), file)(*inputs), model(*inputs))
    with pytest.raises(ValueError, match="y_embed"):
        adapter_files.load(alive(classes=7), file)


def test_no_decay_on_scales():
    model = DiffFit.wrap(alive())
    plain, tables = param_groups(model, 1e-3, weight_decay=0.1)
    assert plain["weight_decay"] == 0 and tables["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in tables["params"]] == [(11, 32)]
    with pytest.raises(ValueError, match="nothing is trainable"):
        param_groups(alive().requires_grad_(False), 1e-3)


# positions


@pytest.mark.parametrize("dim, grid", [(8, 2), (64, 5)])
def test_every_other_position_is_one_of_the_coarse_grid(dim, grid):
    fine = interpolate_sincos_pos_embed(dim, 2 * grid).view(2 * grid, 2 * grid, dim)
    coarse = interpolate_sincos_pos_embed(dim, grid, scale=1.0)
    assert torch.equal(fine[::2, ::2].reshape(-1, dim), coarse)
    third = coarse[2]  # row 0, column 2 (or row 1, column 0, on the smallest grid)
    column = 2 % grid
    assert math.isclose(float(third[0]), math.sin(column), abs_tol=1e-6)


# bad input


@pytest.mark.parametrize("options, error, words", [
    ({"gamma_layers": (2,)}, IndexError, "no block 2"),
    ({"gamma_layers": (-1,)}, IndexError, "no block -1"),
    ({"extra_trainable": ("nowhere",)}, ValueError, "nowhere"),
    ({"names": {"attn": ("nowhere",), "mlp": ("mlp.fc2",)}}, ValueError, "no layer for 'attn'"),
])
def test_what_the_model_does_not_have(options, error, words):
    with pytest.raises(error, match=words):
        DiffFit.wrap(alive(), DiffFitConfig(**options))


@pytest.mark.parametrize("options, words", [
    ({"gamma_init": 0}, "gamma_init = 0"), ({"gamma_init": float("nan")}, "finite"),
    ({"gamma_init": -1.0}, "> 0"), ({"gamma_locations": ("head",)}, "give some of"),
    ({"gamma_layers": (1, 1)}, "each once"), ({"gamma_locations": ("attn", "attn")}, "each once"),
    ({"gamma_layers": "some"}, "'all' or a tuple"), ({"gamma_layers": 1}, "'all' or a tuple"),
    ({"gamma_layers": ()}, "gamma_locations"), ({"gamma_layers": (True,)}, "'all' or a tuple"),
    ({"extra_trainable": ("",)}, "at least one letter"),
    ({"names": {"attn": "attn.proj"}, "gamma_locations": ("attn",)}, "tuple of names"),
])
def test_settings_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        DiffFitConfig(**options)


@pytest.mark.parametrize("options, words", [
    ({"rows": [[0, 4], [2, 6]]}, "overlap"), ({"rows": [[2, 6], [0, 3]]}, "overlap"),
    ({"rows": []}, "at least one"), ({"rows": [0, 2]}, "pairs"), ({"rows": [[2, 2]]}, "outputs 0"),
    ({"factors": -1}, "factors = -1"), ({"factors": 1.5}, "factors = 1.5"),
    ({"factors": 0}, "nothing is left"), ({"width": 0}, "6 outputs"), ({"width": 1}, "6 outputs"),
])
def test_scales_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        ScaledBranch(nn.Linear(3, 6), **options)


def test_ranges_of_outputs_may_touch_and_come_in_any_order():
    own = ScaledBranch(nn.Linear(3, 6), rows=[[4, 6], [0, 2], [2, 3]])
    with torch.no_grad():
        own.gamma.copy_(torch.arange(2.0, 7)[None])
    assert own.scale().tolist() == [4, 5, 6, 1, 2, 3]


def test_a_fused_layer_with_fewer_keys_is_not_cut_into_thirds():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.Module()
            self.attn.qkv = nn.Linear(8, 8 + 2 * 2)  # 12 outputs: thirds would be 4 each

    with pytest.raises(ValueError, match="not q, k, v of one size"):
        DiffFit.wrap(Attention(), DiffFitConfig(gamma_locations=("q",), extra_trainable=()))


@pytest.mark.parametrize("options", [{"lr": -1}, {"lr": 0}, {"lr": math.nan},
                                     {"lr": 1e-3, "weight_decay": -0.1}])
def test_rates_that_make_no_sense(options):
    with pytest.raises(ValueError, match="must be above 0"):
        param_groups(DiffFit.wrap(alive()), **options)


def test_refusals():
    model = DiffFit.wrap(alive())
    with pytest.raises(RuntimeError, match="already"):
        DiffFit.wrap(model)
    bare = nn.Sequential(nn.Linear(3, 3, bias=False))
    with pytest.raises(ValueError, match="no bias, norm or branch"):
        DiffFit.wrap(bare, DiffFitConfig(gamma_locations=(), extra_trainable=()))
    assert branch_ends(bare) == []
    with pytest.raises(TypeError, match="scale its last"):
        ScaledBranch(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match="scale its last"):
        ScaledBranch(nn.Sequential(nn.Linear(3, 3)), width=3)
    with pytest.raises(TypeError, match="channels first"):  # silently wrong where sides agree
        ScaledBranch(nn.Conv2d(3, 3, 1), width=3)
    with pytest.raises(TypeError, match="no linear layer"):
        ScaledBranch(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="outputs 0 to 3"):
        ScaledBranch(nn.Linear(3, 3), rows=[[1, 4]])
    quantised = nn.Linear(3, 3, bias=False)
    quantised.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="add_bias=True"):
        ScaledBranch(quantised)
    assert ScaledBranch(quantised, add_bias=True).bias.dtype == torch.float32
    for wrong in ((6, 2, 0.5), (8, 0, 0.5), (8, 2, 0.0)):
        with pytest.raises(ValueError, match="embed_dim"):
            interpolate_sincos_pos_embed(*wrong)
    with pytest.raises(ValueError, match="grid = 2.5"):
        interpolate_sincos_pos_embed(8, 2.5)


# the model and the experiment


@pytest.fixture
def tiny(monkeypatch):
    "An untrained net in the place of the trained one."
    monkeypatch.setattr(told, "small_dit", lambda: alive(dim=16, depth=2))
    return SMALL.replace(seeds=(0,), images=(32, 32), lrs=(1e-2,),
                         training=Training(steps=1, batch_size=8))


def test_one_seed_and_a_run_that_goes_on(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(told, "_plot", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch("difffit", tiny, root=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(told, "small_dit", lambda: alive(dim=16, depth=2))
    real, calls = Training.fit, []
    monkeypatch.setattr(Training, "fit", lambda *a, **k: calls.append(1) or real(*a, **k))
    report = launch("difffit", tiny, root=tmp_path, resume=True)
    assert len(calls) == 2  # the finer grid's; nothing on digits is trained again
    assert {c.verdict for c in report.claims} == {"not decided at this scale"}
    assert json.loads((report.folder / "report.json").read_text())["paper"] == "difffit"


def test_full_scale_path_with_a_tiny_model(tmp_path):
    shape = (8, 4, 16, 2, 2, 1000, 2, 1000, 1)
    made = make_dit(*shape[:5], 5, *shape[6:])
    save_file(made.state_dict(), tmp_path / "dit.safetensors")
    g = torch.Generator().manual_seed(0)
    parts = {f"{p}.{k}": v for p in ("train", "test") for k, v in {
        "x": torch.randn(20, 4, 8, 8, generator=g), "y": torch.arange(20) % 3}.items()}
    save_file(parts, tmp_path / "latents.safetensors")
    cfg = FULL.replace(shape=shape, weights=str(tmp_path / "dit.safetensors"), device="cpu",
                       latents=str(tmp_path / "latents.safetensors"), seeds=(0,),
                       photo_lrs=(1e-3,), photo_full_lrs=(1e-4,),
                       photo_training=Training(steps=1, batch_size=4))
    report = told.experiment(cfg, start_run("difffit", cfg, "full", root=tmp_path / "runs"))
    assert list(report.tables["photos"]["method"]) == ["DiffFit", "BitFit", "LoRA", "full"]
    assert report.tables["photos"]["error"].notna().all()
    for lacking, words in (({"latents": ""}, "latents"), ({"weights": ""}, "weights")):
        with pytest.raises(ValueError, match=words):
            told._flowers(0, cfg.replace(**lacking))


@pytest.mark.parametrize("field", ["gamma_locations", "extra_trainable"])
def test_one_name_is_no_tuple_of_letters(field):
    with pytest.raises(ValueError, match="tuple of names"):
        DiffFitConfig(**{field: "attn"})
