"""LoLDU: the factors, the layer against the dense formula, files, bad input, full scale."""

import copy
from functools import partial

import pytest
import tiny_models
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptlab import adapter_files, adapters, recipes
from adaptlab.bench.runs import start_run
from adaptlab.experiments import loldu as told
from adaptlab.experiments.loldu import FULL, PHOTOS, SMALL, experiment
from adaptlab.lowrank.loldu import LoLDUConfig, LoLDULinear, get_loldu_model, ldu
from adaptlab.train import Training
from one_seed import UNDECIDED, goes_on


def attached(layer, **options):
    net = nn.Sequential(layer)
    adapters.attach(net, partial(LoLDULinear, **options), ["0"])
    return net, adapters.adapters(net)["0"]


def dense(W, b, r, z, sigma, start):
    "The paper's formula, with the permutation matrix and both diagonal matrices written out."
    P, L, U = torch.linalg.lu(W)
    d, U = U.diagonal()[:r], U[:r] / U.diagonal()[:r, None]
    residual = W - start * P @ L[:, :r] @ d.diag() @ U
    changed = residual + sigma * P @ L[:, :r] @ z.diag() @ U
    return lambda x: x @ changed.T + b


# factors


@pytest.mark.parametrize("shape", [(7, 7), (3, 9), (9, 3), (1, 5)])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_factors_rebuild_the_weight(shape, dtype, near):
    torch.manual_seed(0)
    W = torch.randn(shape, dtype=dtype)
    perm, L, d, U = ldu(W)
    assert ((L * d) @ U - W[perm]).norm() <= near * W.norm() and L.abs().max() <= 1
    k = min(shape)
    assert torch.equal(L[:k].diagonal(), torch.ones(k, dtype=dtype))
    torch.testing.assert_close(U.diagonal(), torch.ones(k, dtype=dtype))
    assert torch.equal(L, L.tril()) and torch.equal(U, U.triu())
    again = ldu(W)
    assert all(torch.equal(a, b) for a, b in zip(again, (perm, L, d, U), strict=True))


def test_a_weight_without_full_rank_keeps_its_product():
    W = torch.outer(torch.tensor([1.0, 2, 4, 8]), torch.ones(4))  # exact in binary
    with pytest.warns(UserWarning, match="3 of 4 pivots are zero, or rounding noise"):
        perm, L, d, U = ldu(W)
    torch.testing.assert_close((L * d) @ U, W[perm])
    assert torch.isfinite(U).all() and torch.equal(d[1:], torch.zeros(3))


def test_pivots_of_rounding_noise_are_warned_of():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(64, 32, generator=g) @ torch.randn(32, 64, generator=g)
    with pytest.warns(UserWarning, match="rounding noise"):
        perm, L, d, U = ldu(W)
    assert ((L * d) @ U - W[perm]).norm() <= 1e-5 * W.norm()


def test_half_precision_is_factored_in_float32():
    W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = ldu(W)
    assert parts.d.dtype == torch.float32
    torch.testing.assert_close((parts.L * parts.d) @ parts.U, W.float()[parts.perm])


@pytest.mark.parametrize("W, error, words", [
    (torch.ones(3), TypeError, "shape"), (torch.ones(2, 2, dtype=torch.int8), TypeError, "int8"),
    (torch.tensor([[1.0, float("nan")]]), ValueError, "NaN"),
    (torch.tensor([[1.0, float("inf")]]), ValueError, "infinity"),
    (torch.zeros(0, 3), ValueError, "empty"),
])
def test_what_has_no_factors_is_refused(W, error, words):
    with pytest.raises(error, match=words):
        ldu(W)


# the layer


@pytest.mark.parametrize("tokens", [1, 400])  # two thin products; one product by the changed weight
@pytest.mark.parametrize("rank, alpha", [(2, None), (8, 16.0)])
def test_the_papers_formula_either_way(tokens, rank, alpha):
    torch.manual_seed(1)
    layer = nn.Linear(12, 8, dtype=torch.float64)
    net, own = attached(layer, rank=rank, alpha=alpha)
    with torch.no_grad():
        own.z.add_(torch.randn(rank))
        own.sigma.mul_(0.7)
    x = torch.randn(2, tokens, 12, dtype=torch.float64)
    start = 1.0 if alpha is None else alpha / rank
    expected = dense(layer.weight, layer.bias, rank, own.z, own.sigma, start)(x)
    y = net(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    grads = torch.autograd.grad(y.square().sum(), [own.z, own.sigma])
    wanted = torch.autograd.grad(expected.square().sum(), [own.z, own.sigma])
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-8)
    assert layer.weight.grad is None


def test_few_tokens_and_many_take_different_ways(monkeypatch):
    net, own = attached(nn.Linear(16, 16), rank=16)
    calls = []
    monkeypatch.setattr(LoLDULinear, "forward", lambda self, x, y: calls.append(len(x)) or y)
    net(torch.ones(1, 16))
    net(torch.ones(500, 16))
    assert calls == [1]


@pytest.mark.parametrize("layer", [nn.Linear(6, 9), nn.Linear(9, 6, bias=False), Conv1D(6, 9)])
def test_merge_switch_off_and_detach(layer):
    torch.manual_seed(0)
    net, own = attached(layer, rank=4)
    x = torch.randn(5, own.in_features)
    y0 = net(x).detach()
    with adapters.enabled(net, False):
        torch.testing.assert_close(net(x), y0)
    with torch.no_grad():
        own.z.mul_(3)
    y = net(x).detach()
    assert not torch.allclose(y, y0, atol=1e-3)
    torch.testing.assert_close(adapters.merge(net)(x), y, rtol=1e-4, atol=1e-5)
    adapters.unmerge(net)
    with adapters.enabled(net, False):
        assert torch.equal(net(x), y0)
    adapters.detach(net)
    assert torch.equal(net(x), y0)


def test_full_rank_scales_the_weight_and_pivots_make_its_determinant():
    torch.manual_seed(2)
    layer = nn.Linear(5, 5, dtype=torch.float64)
    _, own = attached(layer, rank=5)
    with torch.no_grad():
        own.z.mul_(2.5)
    torch.testing.assert_close(layer.weight + own.change(), 2.5 * layer.weight)
    with torch.no_grad():
        own.z.copy_(torch.tensor([1.0, -2, 3, 0.5, 2]))
    ratio = torch.linalg.det(layer.weight + own.change()) / torch.linalg.det(layer.weight)
    torch.testing.assert_close(ratio, own.z.prod() / own.pivots.prod())


def test_starts_come_from_the_pivots():
    layer = nn.Linear(400, 300)
    own = {name: LoLDULinear(layer, rank=300, init=name) for name in (
        "ldu", "uniform", "normal", "constant", "zeros", "ones", "s_uniform", "s_normal")}
    d = own["ldu"].pivots
    assert torch.equal(own["ldu"].z, d) and not own["zeros"].z.any() and (own["ones"].z == 1).all()
    torch.testing.assert_close(own["constant"].z, d.mean().expand(300))
    assert own["uniform"].z.abs().max() <= d.mean().abs() / 2
    assert abs(own["normal"].z.std() / d.std() - 1) < 0.15
    assert own["s_uniform"].z.abs().max() <= 1 and abs(own["s_normal"].z.std() - 1) < 0.15
    again = LoLDULinear(layer, rank=300, init="normal")
    other = LoLDULinear(layer, rank=300, init="normal", seed=1)
    assert torch.equal(again.z, own["normal"].z) and not torch.equal(other.z, again.z)


def test_what_is_trained_and_what_a_file_holds(tmp_path):
    llama = recipes.tiny_llama()
    get_loldu_model(llama, LoLDUConfig(rank=3, train_sigma=False))
    count = 2 * llama.config.num_hidden_layers
    assert adapters.count_parameters(llama)[0] == 3 * count
    file = adapter_files.save(llama, tmp_path / "pivots.safetensors")
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        names = {k.rpartition(".")[2] for k in f.keys()}
    assert names == {"z", "pivots"}
    other = recipes.tiny_llama()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    with pytest.raises(ValueError, match="not those of this weight"):
        adapter_files.load(other, file)
    assert not adapters.adapters(other)


@pytest.mark.parametrize("options, words", [
    ({"rank": 0}, "1 to 4 pivots"), ({"rank": 5}, "1 to 4 pivots"), ({"rank": 2.0}, "rank = 2.0"),
    ({"init": "best"}, "give one of ldu"), ({"alpha": float("nan")}, "finite"),
    ({"alpha": 0.0}, "not 0"),
])
def test_settings_that_no_layer_can_have(options, words):
    with pytest.raises(ValueError, match=words):
        LoLDULinear(nn.Linear(4, 6), **{"rank": 2} | options)


def test_a_model_without_the_layers_or_with_adapters_is_refused():
    llama = recipes.tiny_llama()
    with pytest.raises(ValueError, match="nowhere"):
        get_loldu_model(llama, LoLDUConfig(rank=2, target_modules=("nowhere",)))
    get_loldu_model(llama, LoLDUConfig(rank=2))
    with pytest.raises(ValueError, match="already"):
        get_loldu_model(llama, LoLDUConfig(rank=2))
    with pytest.raises(ValueError, match="nowhere"):  # a name that the user gave must be found
        get_loldu_model(recipes.tiny_llama(), LoLDUConfig(
            rank=2, target_modules=("q_proj", "nowhere")))


def test_training_moves_pivots_only():
    torch.manual_seed(0)
    net, own = attached(nn.Linear(6, 4), rank=4)
    before = copy.deepcopy({k: v for k, v in net.state_dict().items() if "adaptlab" not in k})
    x = torch.randn(64, 6)
    data = torch.utils.data.TensorDataset(x, x @ torch.randn(6, 4))
    before_loss = (net(x) - data.tensors[1]).square().mean().item()
    Training(steps=60, batch_size=16, lr=3e-2).fit(
        net, data, lambda m, b: (m(b[0]) - b[1]).square().mean(), device="cpu", progress=False)
    after = (net(x) - data.tensors[1]).square().mean().item()
    assert after < 0.9 * before_loss
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert not torch.equal(own.z, own.pivots)


# the experiment


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(seeds=(0,), images=(32, 32), lrs=(1e-2,),
                        training=Training(steps=1, batch_size=8))
    report = goes_on(told, cfg, tmp_path, monkeypatch)
    assert {c.verdict for c in report.claims} == UNDECIDED


def test_controls_train_as_many_numbers():
    layer = nn.Linear(20, 10)
    kinds = (LoLDULinear, told.UnitLinear, told.SingularLinear, told.StrangerLinear)
    own = [kind(layer, rank=10) for kind in kinds]
    assert len({sum(p.numel() for p in a.parameters()) for a in own}) == 1
    for a in own:
        assert not a.change().any()


@pytest.fixture
def tiny(tmp_path):
    "A ViT and a RoBERTa of the paper's architecture, small."
    return {"vit": tiny_models.vit(tmp_path / "vit"),
            "model": tiny_models.roberta(tmp_path / "roberta")}


def test_full_scale_path_with_tiny_models(tmp_path, tiny, recorded, monkeypatch):
    "All sets and tasks, from data of the hub's form to tables."
    monkeypatch.setattr(told.rivals, "lora", partial(_small_lora, told.rivals.lora))
    short = Training(steps=1, batch_size=2)
    cfg = FULL.replace(**tiny, device="cpu", seeds=(0,), ranks=(16,), photo_lrs=(1e-3,),
                       photo_lora_lrs=(1e-3,), glue_lrs=(1e-3,), max_length=16,
                       photo_training=short, glue_training=short)
    report = experiment(cfg, start_run("loldu", cfg, "full", root=tmp_path / "runs"))
    photos, glue = report.tables["photos"], report.tables["glue"]
    assert sorted(photos["task"].unique()) == sorted(FULL.photos) == sorted(PHOTOS)
    assert sorted(glue["task"].unique()) == sorted(FULL.glue) and len(photos) == 4 * len(PHOTOS)
    assert {PHOTOS[t][0] for t in PHOTOS} <= set(map(str, recorded.asked))


def _small_lora(real, rank, targets, **more):
    return real(min(rank, 4), targets, **more)
