"""LQ-LoRA: packed codes, the split, Fisher weights, the integer program, layers, full scale."""

import copy
import itertools
import json
import math
from functools import partial

import pytest
import tiny_models
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from adaptlab import adapter_files, adapters, modules, recipes
from adaptlab.bench.runs import launch, start_run
from adaptlab.experiments import lq_lora as told
from adaptlab.experiments.lq_lora import FULL, SMALL, experiment
from adaptlab.lowrank.lq_lora import (
    CostTable, LQConfig, LQLoRALinear, QuantConfig, QuantizedLinear, assign_bits, block_linears,
    dequantize, empirical_fisher, get_lq_lora_model, lq_decompose, normal_float_codebook,
    pack_codes, paper_grid, quantization_table, quantize, quantize_layers, quantized_layers,
    round_factors, storage, unpack_codes, weighted_svd)
from adaptlab.train import Training

SMALL_BLOCKS = QuantConfig(3, 8, "bf16", 16, 16)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(lq):
    return lq.Q.dequantize() + lq.L1 @ lq.L2


# codes


def test_code_books_of_the_paper():
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)
    close(normal_float_codebook(2), torch.tensor([-1, 0, 0.33792, 1]))
    close(normal_float_codebook(3), torch.tensor(
        [-1, -0.47863, -0.21714, 0, 0.16093, 0.33792, 0.56262, 1]))


@pytest.mark.parametrize("config, bits", [
    ((4, 8, "fp32", 64, 256), 4.126953125), ((4, 8, "fp32", 64, 16), 4.15625),
    ((3, 8, "bf16", 32, 16), 3.28125), ((2, 8, "bf16", 64, 64), 2.12890625)])
def test_bits_are_bytes(config, bits):
    config = QuantConfig(*config)
    assert config.bits_per_param == bits
    Q = quantize(noise(256, 512), config)  # divides into blocks and superblocks
    assert 8 * (Q.nbytes - 4) == bits * 256 * 512


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 7, 8, 1001])
def test_packing_is_lossless(bits, n):
    codes = torch.randint(0, 2**bits, (n,), generator=torch.Generator().manual_seed(n))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) - n * bits / 8 < 3
    assert torch.equal(unpack_codes(packed, bits)[:n].long(), codes)
    book = normal_float_codebook(bits)
    assert torch.equal(unpack_codes(packed, bits, normal=True)[:n], book[codes])


def reference(W, config):
    "The card's steps, block by block, in loops."
    book, top = normal_float_codebook(config.bits), 2**config.scale_bits - 1
    flat = W.flatten()
    blocks = [flat[i : i + config.block_size] for i in range(0, len(flat), config.block_size)]
    scales = [b.abs().max() for b in blocks]
    offset, out = min(scales), []
    for start in range(0, len(blocks), config.superblock_size):
        rest = [s - offset for s in scales[start : start + config.superblock_size]]
        state = max(rest).bfloat16().float()
        for block, r in zip(blocks[start : start + config.superblock_size], rest, strict=True):
            code = (r * top / state).round().clamp(0, top) if state > 0 else torch.tensor(0.0)
            scale = offset + code * (state / top)
            x = block / scale if scale > 0 else block * 0
            out.append(book[(x[:, None] - book).abs().argmin(1)] * scale)
    return torch.cat(out).view(W.shape)


@pytest.mark.parametrize("bits, scale_bits", list(itertools.product((2, 3, 4, 8), (2, 8))))
def test_against_loops_with_a_short_last_block(bits, scale_bits):
    W, config = noise(9, 31), QuantConfig(bits, scale_bits, "bf16", 16, 4)
    torch.testing.assert_close(quantize(W, config).dequantize(), reference(W, config))


def test_ties_go_down():
    book = normal_float_codebook(2)
    middles = (book[1:] + book[:-1]) / 2
    W = torch.cat([torch.tensor([1.0]), middles]).view(2, 2)  # scale 1
    found = quantize(W, QuantConfig(2, 8, "fp32", 4, 1)).dequantize().flatten()
    torch.testing.assert_close(found, torch.cat([torch.ones(1), book[:-1]]))


@pytest.mark.parametrize("W", [torch.zeros(4, 8), torch.ones(4, 8), torch.eye(8),
                               torch.cat([torch.zeros(2, 8), noise(2, 8)])])
def test_zeros_and_equal_scales(W):
    found = quantize(W, QuantConfig(4, 8, "bf16", 8, 2)).dequantize()
    assert torch.isfinite(found).all() and not found[W == 0].any()
    assert (found - W).abs().max() <= 0.15 * W.abs().max()


def test_a_second_time_changes_nothing_and_more_bits_are_better():
    W, last = noise(64, 128), math.inf
    for bits in (2, 3, 4, 8):
        config = QuantConfig(bits, 8, "fp32", 64, 16)
        found = quantize(W, config).dequantize()
        if bits < 8:
            torch.testing.assert_close(quantize(found, config).dequantize(), found,
                                       atol=1e-6, rtol=1e-5)
        error = (W - found).norm()
        assert error < last
        last = error


@pytest.mark.parametrize("W, error, words", [
    (torch.ones(3), TypeError, "shape"), (torch.ones(2, 2, dtype=torch.int8), TypeError, "int8"),
    ([[1.0]], TypeError, "list"), (torch.tensor([[float("nan")]]), ValueError, "NaN"),
    (torch.tensor([[1e6, 1.0]]), ValueError, "overflow"),
])
def test_what_cannot_be_quantised(W, error, words):
    with pytest.raises(error, match=words):
        quantize(W, QuantConfig(4, 8, "fp16", 1, 2))


@pytest.mark.parametrize("options, words", [
    ({"bits": 5}, "bits=5"), ({"scale_bits": 1}, "scale_bits=1"), ({"block_size": 0}, "block"),
    ({"superblock_size": 0}, "superblock"), ({"state_dtype": "fp8"}, "fp8")])
def test_layouts_that_do_not_exist(options, words):
    with pytest.raises(ValueError, match=words):
        QuantConfig(**options)
    with pytest.raises(ValueError, match="bits = 5"):
        normal_float_codebook(5)


# the split


def test_each_product_is_the_best_for_its_codes():
    W, before = noise(32, 64), None
    for n in (1, 2, 3):
        lq = lq_decompose(W, 8, QuantConfig(2, 8, "bf16", 16, 16), num_iter=n, exact_svd=True)
        if before is not None:  # a half-step: codes of the last round, product of this one
            L1, L2 = weighted_svd(W - before.Q.dequantize(), None, 8)
            half = (W - before.Q.dequantize() - L1 @ L2).norm()
            assert half <= (W - dense(before)).norm() + 1e-5
        before = lq
    assert min(lq.errors) <= lq.errors[0]
    torch.testing.assert_close((W - dense(lq)).norm().item(), min(lq.errors))


@pytest.mark.parametrize("bits", [2, 4])
def test_better_than_codes_alone_and_better_with_rank(bits):
    config = QuantConfig(bits, 8, "bf16", 16, 16)
    W = noise(32, 64) + 2 * noise(32, 1) * noise(1, 64)
    errors = [min(lq_decompose(W, r, config, exact_svd=True).errors) for r in (0, 2, 8, 16)]
    torch.testing.assert_close(errors[0], (W - quantize(W, config).dequantize()).norm().item())
    assert errors == sorted(errors, reverse=True)


def test_the_sketch_is_near_the_whole_svd_and_repeats():
    W = noise(100, 150) + 3 * noise(100, 4) @ noise(4, 150, seed=1)
    exact, sketch, again = (weighted_svd(W, None, 4, exact_svd=e) for e in (True, False, False))
    misses = [(W - a @ b).norm() for a, b in (exact, sketch)]
    assert misses[1] < 1.001 * misses[0]
    assert all(torch.equal(a, b) for a, b in zip(sketch, again, strict=True))
    torch.testing.assert_close(exact[0].T @ exact[0], exact[1] @ exact[1].T, rtol=1e-3, atol=1e-3)


def test_weights_that_are_no_product_and_dead_neurons():
    A, fisher = noise(12, 20), noise(12, 20).abs() * torch.linspace(0.1, 3, 12)[:, None] ** 2

    def missed(mode):
        L1, L2 = weighted_svd(A, fisher, 4, mode)
        return (fisher.sqrt() * (A - L1 @ L2)).norm()

    assert missed("two-sided") < missed("none") and missed("row") < missed("none")
    fisher[3], fisher[:, 5] = 0, 0
    assert all(torch.isfinite(m).all() for m in weighted_svd(A, fisher, 4))
    assert all(torch.isfinite(m).all() for m in lq_decompose(A, 4, SMALL_BLOCKS, fisher)[1:3])


@pytest.mark.parametrize("options, words", [
    ({"rank": -1}, "rank = -1"), ({"rank": 5}, "0 to 4"), ({"rank": True}, "rank = True"),
    ({"fisher": torch.ones(2, 4)}, "fisher has shape"), ({"num_iter": 0}, "num_iter = 0"),
    ({"fisher": -torch.ones(4, 6)}, "not negative"), ({"fisher": torch.zeros(4, 6)}, "not zero"),
    ({"fisher": torch.full((4, 6), float("nan"))}, "finite"),
])
def test_settings_that_no_split_can_have(options, words):
    with pytest.raises(ValueError, match=words):
        lq_decompose(noise(4, 6), **{"rank": 2, "config": SMALL_BLOCKS} | options)
    with pytest.raises(ValueError, match="mode = 'both'"):
        weighted_svd(noise(4, 6), None, 2, "both")


# Fisher, and the integer program


def test_fisher_of_a_language_model_is_per_sample():
    llama, ids = recipes.tiny_llama(), torch.randint(4, 260, (3, 9))
    before = copy.deepcopy(llama.state_dict())
    rows = [{"input_ids": r[None], "labels": r[None]} for r in ids]
    fisher = empirical_fisher(llama, rows)
    assert set(fisher) == set(adapters.match_layers(llama, block_linears))
    assert not llama.training and all(p.grad is None for p in llama.parameters())
    assert all(torch.equal(v, llama.state_dict()[k]) for k, v in before.items())
    name = "model.layers.1.mlp.up_proj"

    def one(weight, row):
        logits = torch.func.functional_call(
            llama, {f"{name}.weight": weight}, kwargs={"input_ids": row[None], "use_cache": False})
        return F.cross_entropy(logits.logits[0, :-1], row[1:])

    weight = llama.get_submodule(name).weight.detach()
    each = torch.stack([torch.func.grad(one)(weight, row) for row in ids])
    torch.testing.assert_close(fisher[name], each.square().sum(0), rtol=1e-3, atol=1e-9)
    assert not torch.allclose(each.mean(0).square() * 9, each.square().sum(0), rtol=0.1)


def test_fisher_refuses_batches_and_what_has_no_loss():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="2 samples"):
        empirical_fisher(net, [(noise(2, 4), torch.tensor([0, 1]))])
    with pytest.raises(ValueError, match="label"):
        empirical_fisher(recipes.tiny_llama(), [{"input_ids": torch.ones(1, 4).long()}])
    one = (noise(1, 4), torch.tensor([0]))
    for samples in (iter([]), [(one[0] * math.nan, one[1])]):
        with pytest.raises(ValueError, match="no gradients, or NaN"):
            empirical_fisher(net, samples)


@pytest.mark.parametrize("call, words", [
    (lambda: pack_codes(torch.tensor([1, 4]), 2), "bits = 2.*from 0"),
    (lambda: pack_codes(torch.tensor([-1]), 8), "bits = 8.*from 0"),
    (lambda: pack_codes(torch.tensor([1]), 5), "give one of")])
def test_codes_that_cannot_be_packed(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def brute(costs, bits, numel, budget):
    rows = range(len(numel))
    fit = [c for c in itertools.product(range(len(bits)), repeat=len(numel))
           if sum(numel[i] * bits[c[i]] for i in rows) <= budget * sum(numel) + 1e-9]
    return min(sum(costs[i, c[i]].item() for i in rows) for c in fit)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_the_program_equals_brute_force(scale):
    costs = scale * torch.rand(6, 4, generator=torch.Generator().manual_seed(1)).double()
    costs, bits = costs.sort(1, descending=True)[0], [2.129, 3.129, 4.129, 8.129]
    numel, last = [331776, 110592, 110592, 331776, 884736, 884736], math.inf
    for budget in (2.129, 2.5, 3.0, 4.0, 9.0):
        chosen = assign_bits(costs, bits, numel, budget)
        spent = sum(n * bits[j] for n, j in zip(numel, chosen, strict=True)) / sum(numel)
        total = costs[torch.arange(6), chosen].sum().item()
        assert spent <= budget + 1e-12 and total <= last
        assert total <= brute(costs, bits, numel, budget) * (1 + 1e-5)
        last = total


def test_the_program_refuses():
    with pytest.raises(ValueError, match="below the cheapest"):
        assign_bits(torch.ones(2, 2), [2, 3], [10, 10], 1.9)
    with pytest.raises(ValueError, match="shape"):
        assign_bits(torch.ones(2, 3), [2, 3], [10, 10], 2.5)
    with pytest.raises(ValueError, match="finite"):
        assign_bits(torch.full((2, 2), float("inf")), [2, 3], [10, 10], 2.5)


def test_grid_and_table():
    grid = paper_grid()
    assert len(grid) == len(set(grid)) == 432
    net = nn.Sequential(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8)), nn.Linear(8, 4))
    few = [QuantConfig(b, 8, "bf16", 16, 16) for b in (2, 4)]
    table = quantization_table(net, 2, few)
    assert table.names == ["0.0", "0.1"] and table.numel == [512, 128]
    assert (table.costs[:, 0] > table.costs[:, 1]).all()
    lq = lq_decompose(net[0][0].weight, 2, few[0])
    torch.testing.assert_close(table.costs[0, 0].item(), min(lq.errors) ** 2)
    with pytest.raises(ValueError, match="fisher has nothing"):
        quantization_table(net, 2, few, {"0.0": torch.ones(16, 32)})


# layers and models


@pytest.mark.parametrize("layer", [
    nn.Linear(24, 12), nn.Linear(24, 12, bias=False), Conv1D(12, 24)])
def test_the_layer_is_its_dense_equivalent(layer):
    net, x = nn.Sequential(nn.Sequential(layer)), noise(5, 3, 24).requires_grad_(True)
    base = net(x).detach()
    get_lq_lora_model(net, LQConfig(rank=3, alpha=7.0, configs=(SMALL_BLOCKS,)))
    own, a = quantized_layers(net)["0.0"], adapters.adapters(net)["0.0"]
    W = (own.quantized.dequantize() + a.scaling * a.B @ a.A).detach().requires_grad_(True)
    expected = F.linear(x, W, own.bias)
    y = net(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert (y - base).norm() < 0.3 * base.norm()
    gA, gB, gx = torch.autograd.grad(y.square().sum(), (a.A, a.B, x))
    gW, gx_ = torch.autograd.grad(expected.square().sum(), (W, x))
    for found, wanted in ((gA, a.scaling * a.B.T @ gW), (gB, a.scaling * gW @ a.A.T), (gx, gx_)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {
        "0.0.adaptlab.A", "0.0.adaptlab.B"}
    torch.testing.assert_close(dequantize(net)(x), y, rtol=1e-4, atol=1e-5)
    assert not adapters.adapters(net)


def test_no_dense_copy_waits_for_the_backward_pass():
    net = nn.Sequential(QuantizedLinear(quantize(noise(64, 256), QuantConfig())))
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks
    with keep(lambda t: kept.append(t.numel()) or t, lambda t: t):
        net(noise(2, 256).requires_grad_(True))
    assert 64 * 256 not in kept


def test_other_dtypes_leave_the_codes_alone():
    net = nn.Sequential(QuantizedLinear(quantize(noise(64, 128), QuantConfig()), None))
    before = net[0].quantized.dequantize()
    assert torch.equal(net.half()[0].quantized.dequantize(), before)
    x = noise(3, 128).bfloat16()
    assert net(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x.float().requires_grad_(True))
    assert y.dtype == torch.bfloat16
    y.sum().backward()


def test_trains_and_nothing_but_the_factors_moves():
    llama, ids = recipes.tiny_llama(), torch.randint(4, 260, (16, 12))
    get_lq_lora_model(llama, LQConfig(rank=4, configs=(SMALL_BLOCKS,)))
    before = {k: v.clone() for k, v in llama.state_dict().items() if "adaptlab" not in k}
    data = {"input_ids": ids, "labels": ids}
    start = modules.cross_entropy(llama, data).item()
    Training(steps=30, batch_size=8, lr=1e-2).fit(llama, data, modules.cross_entropy, device="cpu",
                                                  progress=False)
    assert modules.cross_entropy(llama, data).item() < 0.9 * start
    assert all(torch.equal(v, llama.state_dict()[k]) for k, v in before.items())
    factors = sum(p.numel() for p in adapters.trainable_parameters(llama))
    assert storage(llama).factors == factors and round_factors(llama) < 1.4 * factors
    assert modules.cross_entropy(llama, data).item() < 0.95 * start


def test_files(tmp_path):
    config = LQConfig(rank=2, configs=(SMALL_BLOCKS,))
    llama, ids = get_lq_lora_model(recipes.tiny_llama(), config), torch.randint(4, 260, (1, 7))
    logits = llama(ids).logits
    file = adapter_files.save(llama, tmp_path / "factors.safetensors")
    adapters.detach(llama)
    torch.testing.assert_close(adapter_files.load(llama, file)(ids).logits, logits)
    other = quantize_layers(recipes.tiny_llama(), {
        n: m.config for n, m in quantized_layers(llama).items()})
    with pytest.raises(ValueError, match="other codes"):  # those of W, not of W - L1 L2
        adapter_files.load(other, file)
    with pytest.raises(TypeError, match="QuantizedLinear"):
        adapter_files.load(recipes.tiny_llama(), file)
    with pytest.raises(ValueError, match="LoRA format"):
        adapter_files.to_peft(llama, tmp_path / "peft")
    with pytest.raises(TypeError, match=r"quantised.*dequantize\(model\)"):
        adapters.merge(llama)
    adapters.attach(other, partial(LQLoRALinear, rank=2), list(quantized_layers(other)))
    other.load_state_dict(llama.state_dict())  # codes and factors: the way to a whole model
    torch.testing.assert_close(other(ids).logits, logits)
    wrong = quantize_layers(recipes.tiny_llama(), {
        n: QuantConfig(3, 8, "fp16", 16, 16) for n in quantized_layers(llama)})
    with pytest.raises(ValueError, match="layout"):
        wrong.load_state_dict(adapters.detach(llama).state_dict())


def test_models_that_are_refused():
    llama = recipes.tiny_llama()
    few = (SMALL_BLOCKS, QuantConfig(2))
    with pytest.raises(ValueError, match="2 layouts and no budget"):
        get_lq_lora_model(llama, LQConfig(rank=2, configs=few))
    with pytest.raises(ValueError, match="below the cheapest"):
        get_lq_lora_model(llama, LQConfig(rank=2, configs=few, budget=2.0))
    with pytest.raises(ValueError, match="nowhere"):
        get_lq_lora_model(llama, LQConfig(rank=2, target_modules=("nowhere",)))
    table = CostTable(["a"], [4], [3.0], torch.ones(1, 1))
    with pytest.raises(ValueError, match="other layers"):
        get_lq_lora_model(llama, LQConfig(rank=2, configs=few, budget=4.0), table=table)
    table = quantization_table(llama, 1, few[::-1], num_iter=1)  # as many layouts, but others
    with pytest.raises(ValueError, match="or layouts"):
        get_lq_lora_model(llama, LQConfig(rank=2, configs=few, budget=4.0), table=table)
    for bad in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"configs": ()}):
        with pytest.raises(ValueError, match="rank >= 1|no budget"):
            LQConfig(**bad)
    for fisher in ({}, {"model.layers.0.mlp.up_proj": torch.ones(1)}):
        with pytest.raises(ValueError, match="fisher has nothing for"):
            get_lq_lora_model(llama, LQConfig(rank=2), fisher)
    assert not quantized_layers(llama)  # refused before anything was changed
    with pytest.raises(ValueError, match="no quantised layers"):
        storage(llama)
    get_lq_lora_model(llama, LQConfig(rank=2, configs=few[:1]))
    with pytest.raises(TypeError, match="quantised"):
        quantize_layers(llama, {"model.layers.0.mlp.up_proj": QuantConfig()})
    with pytest.raises((TypeError, ValueError), match="quantised|adapters"):
        get_lq_lora_model(llama, LQConfig(rank=2, configs=few[:1]))
    net = nn.Sequential(QuantizedLinear(quantize(noise(4, 6), SMALL_BLOCKS)))
    for bad in ({"rank": 0}, {"rank": 2, "alpha": 0.0}, {"rank": 2, "dropout": 1.0}, {}):
        with pytest.raises(ValueError, match="rank"):
            LQLoRALinear(net[0], **bad)
    with pytest.raises(ValueError, match="other codes"):
        LQLoRALinear(net[0], lq_decompose(noise(4, 6, seed=1), 2, SMALL_BLOCKS))


def test_what_was_also_trained_survives_and_other_adapters_are_kept():
    llama = get_lq_lora_model(recipes.tiny_llama(), LQConfig(
        rank=2, configs=(SMALL_BLOCKS,), target_modules=("q_proj",)))
    adapters.attach(llama, {}, also_train=("norm",))
    with torch.no_grad():
        llama.model.norm.weight.fill_(2.0)
    adapters.attach(llama, partial(adapters.LoraAdapter, rank=2), ["v_proj"])
    with pytest.raises(ValueError, match="v_proj"):
        dequantize(llama)
    other = get_lq_lora_model(recipes.tiny_llama(), LQConfig(
        rank=2, configs=(SMALL_BLOCKS,), target_modules=("q_proj",)))
    adapters.attach(other, {}, also_train=("norm",))
    with torch.no_grad():
        other.model.norm.weight.fill_(2.0)
    assert (dequantize(other).model.norm.weight == 2).all() and not quantized_layers(other)


# the experiment


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(tracks=("tune",), seeds=(0,), held=4, tuned_fisher=1, lrs=(1e-2,),
                        training=Training(steps=1, batch_size=4))
    real = told.versus
    monkeypatch.setattr(told, "versus", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch("lq_lora", cfg, root=tmp_path)
    monkeypatch.setattr(told, "versus", real)
    monkeypatch.setattr(Training, "fit", lambda *a, **k: 1 / 0)  # nothing is trained again
    report = launch("lq_lora", cfg, root=tmp_path, resume=True)
    assert {c.verdict for c in report.claims} == {"not decided at this scale"}
    assert json.loads((report.folder / "report.json").read_text())["paper"] == "lq_lora"


@pytest.fixture
def tiny(tmp_path):
    "A Llama and a RoBERTa of the paper's architecture, small."
    llama = tiny_models.llama(tmp_path / "llama")
    return {"model": llama, "tuned": llama, "roberta": tiny_models.roberta(tmp_path / "roberta")}


def test_full_scale_path_with_tiny_models(tmp_path, tiny, recorded, monkeypatch):
    "All tracks, from data of the hub's form to tables; the grid is cut to the experiment's own."
    monkeypatch.setattr(told, "paper_grid", lambda: list(told.LAYOUTS.values()))
    short = Training(steps=1, batch_size=2)
    cfg = FULL.replace(**tiny, device="cpu", dtype="float32", seeds=(0,), window=24, windows=2,
                       fisher=2, tuned_fisher=2, rank=4, rounds=2, tuned_window=24, tuned_rank=4,
                       held=2,
                       training=short, lrs=(1e-3,), glue_training=short, glue_lrs=(1e-3,),
                       glue_rank=4, max_length=16, glue=("mrpc", "stsb"), budgets=(2.75, 3.25))
    report = experiment(cfg, start_run("lq_lora", cfg, "full", root=tmp_path / "runs"))
    assert len(report.tables["start"]) == 2 * 17 and len(report.tables["tune"]) == 4
    layouts = report.tables["layouts"].groupby(["method", "budget"])["bits"]
    assert len(layouts) == 3 and layouts.size().eq(14).all()
    assert sorted(report.tables["glue"]["task"].unique()) == ["mrpc", "stsb"]
    assert "Salesforce/wikitext@wikitext-103-raw-v1#train" in recorded.asked
