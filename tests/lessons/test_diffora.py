"""DiffoRA: the gates, the search, rounding, sharing, the kernel, bad input, full scale."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from adaptlab import adapter_files, adapters, modules, recipes
from adaptlab.bench.runs import start_run
from adaptlab.experiments import diffora as told
from adaptlab.experiments.diffora import FULL, SMALL, experiment, plant
from adaptlab.lowrank.diffora import (
    Batches, DifferentialAdaptationMatrix, DiffoRAConfig, GatedLoRALinear, attach_supernet,
    build_adapted_model, discretize, gated, halves, hyper_gradient, module_grams,
    module_grid, ntk_min_eigenvalue, relu_gram, search, super_weights, top_gates)
from adaptlab.train import Training
from one_seed import goes_on


class Block(nn.Module):
    "Two linear layers, the second one narrow at its end."

    def __init__(self, d=6):
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.Sequential(*(Block() for _ in range(depth))), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.blocks(x))


def batches(count=4, n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g))
            for _ in range(count)]


def supernet(**options):
    net = Net()
    torch.manual_seed(1)
    return net, attach_supernet(net, DiffoRAConfig(r=2, alpha=4, **options))


# the grid and the gates


def test_the_grid_of_models_with_numbered_blocks():
    assert module_grid(Net()) == {kind: [f"blocks.{i}.{kind}" for i in range(3)]
                                  for kind in ("up", "down")}
    llama = module_grid(recipes.tiny_llama(), ("q_proj", "k_proj"))
    assert list(llama) == ["self_attn.q_proj", "self_attn.k_proj"]  # of different shapes: GQA


@pytest.mark.parametrize("change, targets, words", [
    (lambda net: delattr(net.blocks[1], "up"), None, r"no blocks.1.up"),
    (lambda net: None, ("head",), "numbered block"),
    (lambda net: None, ("nowhere",), "nowhere"),
])
def test_grids_that_do_not_exist(change, targets, words):
    net = Net()
    change(net)
    with pytest.raises(ValueError, match=words):
        attach_supernet(net, DiffoRAConfig(target_modules=targets))
    assert not adapters.adapters(net)


def test_top_gates_by_hand():
    gates = torch.tensor([[.9, .2], [.9, .8], [.1, .3]])
    assert top_gates(gates, 0.3).tolist() == [[True, False], [False, True], [False, False]]  # tie
    assert top_gates(gates, 0.5).sum(0).tolist() == [2, 2]  # round(1.5)
    assert top_gates(gates, 0.5, "global").tolist() == [[True, False], [True, True],
                                                        [False, False]]
    assert top_gates(gates, 1.0).all() and top_gates(gates, 0.01, "global").sum() == 1


@pytest.mark.parametrize("seed", range(5))
def test_counts_of_masks(seed):
    g = torch.Generator().manual_seed(seed)
    n, depth = int(torch.randint(1, 9, (1,), generator=g)), 4
    gates = torch.rand(n, depth, generator=g)
    for rho in (0.1, 0.5, 0.77, 1.0):
        keep = max(1, math.floor(rho * n + 0.5))
        assert (top_gates(gates, rho).sum(0) == keep).all()
        assert top_gates(gates, rho, "global").sum() == max(1, math.floor(rho * n * depth + 0.5))


@pytest.mark.parametrize("relaxation", ["sigmoid", "softmax"])
def test_gates_relaxed_and_rounded(relaxation):
    dam = DifferentialAdaptationMatrix(["a", "b", "c"], 2, relaxation)
    with torch.no_grad():
        dam.logits.normal_()
    wanted = dam.logits.sigmoid() if relaxation == "sigmoid" else dam.logits.softmax(0)
    torch.testing.assert_close(dam.gates(), wanted)
    dam.mask = dam.discretize(0.3)
    assert dam.gates().sum(0).tolist() == [1, 1] and torch.equal(dam.relaxed(), wanted)


@pytest.mark.parametrize("options, words", [
    ({"rho": 0.0}, "rho"), ({"rho": 1.2}, "rho"), ({"r": 0}, "r = 0"), ({"r": 2.0}, "r = 2.0"),
    ({"relaxation": "gumbel"}, "sigmoid, softmax"), ({"sharing": "all"}, "type, none"),
    ({"scope": "model"}, "layer, global"),
])
def test_settings_that_do_not_exist(options, words):
    with pytest.raises(ValueError, match=words):
        DiffoRAConfig(**options)


def test_matrices_and_selections_that_do_not_exist():
    with pytest.raises(ValueError, match="nothing to gate"):
        DifferentialAdaptationMatrix([], 3)
    with pytest.raises(ValueError, match="rho"):
        top_gates(torch.rand(2, 2), 0.0)
    with pytest.raises(ValueError, match="scope"):
        top_gates(torch.rand(2, 2), 0.5, "all")


# the super-net


def test_gradient_of_a_gate_is_zero_then_the_inner_product():
    net, dam = supernet()
    x, y = batches(1)[0]
    loss = modules.cross_entropy(net, (x, y))
    assert not torch.autograd.grad(loss, dam.logits)[0].any()
    with torch.no_grad():
        for a in gated(net, dam).values():
            a.B.normal_()
    seen = []

    def keep(layer, given, out):
        out.retain_grad()
        seen.append((given, out))

    net.blocks[1].up.register_forward_hook(keep)
    loss = modules.cross_entropy(net, (x, y))
    loss.backward()
    grad = dam.logits.grad
    (given,), out = seen[0]
    a = adapters.adapters(net)["blocks.1.up"]
    change = a.scaling * given @ a.A.T @ a.B.T
    gate = dam.gates()[0, 1]
    torch.testing.assert_close(grad[0, 1], (out.grad * change).sum() * gate * (1 - gate))


def test_merging_saving_and_factors_of_gated_pairs(tmp_path):
    net, dam = supernet()
    x, _ = batches(1)[0]
    with torch.no_grad():
        dam.logits.normal_()
        for a in gated(net, dam).values():
            a.B.normal_()
    y = net(x).detach()
    file = adapter_files.save(net, tmp_path / "gated.safetensors")
    again = adapter_files.load(Net(), file)
    torch.testing.assert_close(again(x), y, rtol=1e-5, atol=1e-6)
    a = adapters.adapters(net)["blocks.0.down"]
    A, B, s = a.lora_factors()
    torch.testing.assert_close(s * B @ A, a.delta_weight())
    torch.testing.assert_close(adapters.merge(net)(x), y, rtol=1e-5, atol=1e-5)


def test_a_copy_has_gates_of_its_own():
    net, dam = supernet()
    twin = copy.deepcopy(net)
    other = next(iter(adapters.adapters(twin).values())).place[0]
    assert other is not dam and all(
        a.place[0] is other for a in adapters.adapters(twin).values())
    with pytest.raises(ValueError, match="0 of 6"):
        gated(twin, dam)


# the search


@pytest.mark.parametrize("relaxation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("second_order", [False, True])
def test_who_moves_when(relaxation, second_order):
    net, dam = supernet(relaxation=relaxation)
    base = {n: p.clone() for n, p in adapters.base_parameters(net).items()}
    history = search(net, dam, batches(seed=1), batches(seed=2), steps=5, warmup=2,
                     second_order=second_order)
    path = history.gates
    assert torch.equal(path[0], path[2]) and not torch.equal(path[2], path[3])
    assert len(history.train_loss) == 5 and len(history.val_loss) == 3
    assert all(torch.equal(p, base[n]) for n, p in adapters.base_parameters(net).items())
    assert all(a.B.any() for a in gated(net, dam).values())
    assert all(p.grad is None for p in (*net.parameters(), dam.logits))


def test_gate_steps_leave_the_weights_alone():
    "The weights of a search in which gates can't matter are those of plain training."
    net, dam = supernet()
    search(net, dam, batches(seed=1), batches(seed=2), steps=3, warmup=2, gate_lr=1e-12)
    twin, other = supernet()
    adam = torch.optim.AdamW(adapters.trainable_parameters(twin), lr=1e-2, weight_decay=0.0)
    for batch in batches(seed=1)[:3]:
        adam.zero_grad()
        modules.cross_entropy(twin, batch).backward()
        adam.step()
    for a, b in zip(adapters.trainable_parameters(net), adapters.trainable_parameters(twin),
                    strict=True):
        torch.testing.assert_close(a, b)


def test_second_order_of_a_quadratic_in_two_variables():
    "Against the gradient through an unrolled step, by autograd."
    torch.manual_seed(0)
    M, v = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 1, dtype=torch.float64, requires_grad=True)

    def train(t=None):
        t = theta if t is None else t
        return ((M @ t - a.sum() * v) ** 2).sum()

    def val(t=None):
        t = theta if t is None else t
        return ((t - 1) ** 2).sum() + a[0, 0] ** 2

    xi, start = 0.05, theta.detach().clone()
    g, = torch.autograd.grad(train(), theta, create_graph=True)
    wanted, = torch.autograd.grad(val(theta - xi * g), a)
    loss, found = hyper_gradient(train, val, [theta], a, xi)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(loss, val(start - xi * g).detach())
    torch.testing.assert_close(theta.detach(), start)


def test_searches_that_can_not_be():
    net, dam = supernet()
    data = batches()
    for warmup in (5, 6, -1):
        with pytest.raises(ValueError, match="warmup"):
            search(net, dam, data, data, steps=5, warmup=warmup)
    with pytest.raises(ValueError, match="train_loader is empty"):
        search(net, dam, [], data, steps=2, warmup=1)
    with pytest.raises(ValueError, match="val_loader is empty"):
        search(net, dam, data, [], steps=2, warmup=1)
    with pytest.raises(ValueError, match="read only once"):
        search(net, dam, iter(data[:1]), data, steps=2, warmup=1)
    with pytest.raises(FloatingPointError, match="training loss is nan at step 1"):
        bad = (data[1][0] * float("nan"), data[1][1])
        search(net, dam, [data[0], bad], data, steps=3, warmup=2)
    search(net, dam, data, data, steps=2, warmup=1)
    with pytest.raises(ValueError, match="searched already"):
        search(net, dam, data, data, steps=2, warmup=1)
    discretize(net, dam)
    with pytest.raises(ValueError, match="discrete already"):
        search(net, dam, data, data, steps=2, warmup=1)
    with pytest.raises(ValueError, match="discrete already"):
        discretize(net, dam)
    net, dam = supernet()
    with pytest.warns(UserWarning, match="at their start"):
        discretize(net, dam)
    with pytest.raises(ValueError, match="belong to this model"):
        search(Net(), dam, data, data, steps=2, warmup=1)


def test_a_loader_of_torch_and_a_dict_of_tensors():
    net, dam = supernet()
    x, y = (torch.cat(t) for t in zip(*batches(), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    assert search(net, dam, loader, loader, steps=3, warmup=1).val_loss
    first, second = halves({"x": x, "labels": y}, 4)
    assert set(next(iter(first))) == {"x", "labels"} and len(second.rows) == 16


def test_halves_are_disjoint_stratified_and_not_empty():
    y = torch.tensor([0] * 40 + [1] * 20)
    one, two = halves((torch.arange(60), y), 8, seed=3)
    assert sorted([*one.rows.tolist(), *two.rows.tolist()]) == list(range(60))
    assert y[one.rows].sum() == y[two.rows].sum() == 10
    seen = torch.cat([b[0] for b in one])
    assert len(seen) == len(set(seen.tolist())) == 24 and set(seen.tolist()) <= set(
        one.rows.tolist())
    rare = halves((torch.arange(5), torch.arange(5)), 2)  # classes of one: no strata
    assert len(rare[0].rows) + len(rare[1].rows) == 5
    for columns, share in (((y[:1], y[:1]), 0.5), ((y, y), 0.001), ((y, y), 1.0)):
        with pytest.raises(ValueError, match="both halves"):
            halves(columns, 2, share=share)
    with pytest.raises(ValueError, match="0 rows"):
        Batches((y,), torch.tensor([], dtype=torch.long))


# the adapted model


MASK = torch.tensor([[True, False, False], [False, False, True]])


@pytest.mark.parametrize("sharing, count", [
    ("none", 2 * 2 * 18), ("type", 4 * 2 * 18),
    ("A", 2 * 2 * 18 + 2 * (6 + 2 * 12) + 2 * (12 + 2 * 6)),
    ("B", 2 * 2 * 18 + 2 * (12 + 2 * 6) + 2 * (6 + 2 * 12)),
])
def test_what_is_shared_is_counted_saved_and_merged(sharing, count, tmp_path):
    net, config = Net(), DiffoRAConfig(r=2, sharing=sharing)
    build_adapted_model(net, MASK, config)
    assert adapters.count_parameters(net)[0] == count
    found = adapters.adapters(net)
    assert len(found) == (2 if sharing == "none" else 6)
    for factor in "AB" if sharing != "none" else "":
        same = getattr(found["blocks.1.up"], factor) is getattr(found["blocks.2.up"], factor)
        assert same == (sharing in ("type", factor))
        assert getattr(found["blocks.0.up"], factor) is not getattr(found["blocks.1.up"], factor)
    x, y = batches(1)[0]
    adam = torch.optim.AdamW(adapters.trainable_parameters(net), lr=0.1)
    assert len(adam.param_groups[0]["params"]) == len({id(p) for p in net.parameters()
                                                       if p.requires_grad})
    for _ in range(2):
        modules.cross_entropy(net, (x, y)).backward()
        adam.step()
    out = net(x).detach()
    file = adapter_files.save(net, tmp_path / "pairs.safetensors")
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        assert sum(f.get_tensor(k).numel() for k in f.keys()) == count
    twin = adapter_files.load(Net(), file)
    torch.testing.assert_close(twin(x), out)
    if sharing == "type":
        both = adapters.adapters(copy.deepcopy(twin).double())
        assert both["blocks.1.up"].B is both["blocks.2.up"].B
    torch.testing.assert_close(adapters.merge_and_unload(net)(x), out, rtol=1e-5, atol=1e-5)


def test_all_modules_are_plain_lora_and_pefts():
    from peft import LoraConfig, get_peft_model

    ours = build_adapted_model(Net(), torch.ones(2, 3, dtype=torch.bool),
                               DiffoRAConfig(r=2, alpha=6))
    plain = adapters.attach(Net(), partial(adapters.LoraAdapter, rank=2, alpha=6), ["up", "down"])
    theirs = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=6, target_modules=["up", "down"]))
    state = theirs.state_dict()
    with torch.no_grad():
        for name, a in adapters.adapters(ours).items():
            a.B.normal_()
            twin = adapters.adapters(plain)[name]
            twin.A.copy_(a.A)
            twin.B.copy_(a.B)
            state[f"base_model.model.{name}.lora_A.default.weight"].copy_(a.A)
            state[f"base_model.model.{name}.lora_B.default.weight"].copy_(a.B)
    x, _ = batches(1)[0]
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_pairs_as_plain_lora():
    def seeded(attach):
        net = Net()
        torch.manual_seed(5)
        attach(net)
        return {n: a.A for n, a in adapters.adapters(net).items()}

    ours = seeded(lambda net: build_adapted_model(
        net, torch.ones(2, 3, dtype=torch.bool), DiffoRAConfig(r=2)))
    lora = seeded(lambda net: adapters.attach(
        net, partial(adapters.LoraAdapter, rank=2), ["up", "down"]))
    assert ours.keys() == lora.keys() and all(torch.equal(ours[n], lora[n]) for n in ours)


def test_inherited_pairs_keep_what_the_search_had():
    net, dam = supernet()
    search(net, dam, batches(seed=1), batches(seed=2), steps=6, warmup=2)
    x, _ = batches(1)[0]
    relaxed, pairs = net(x).detach(), super_weights(net, dam)
    discretize(net, dam, 1.0)
    adapters.detach(net)
    every = torch.ones(2, 3, dtype=torch.bool)
    build_adapted_model(net, every, DiffoRAConfig(r=2, alpha=4), inherit=pairs)
    torch.testing.assert_close(net(x), relaxed, rtol=1e-5, atol=1e-6)
    adapters.detach(net)
    with pytest.raises(ValueError, match="another rank"):
        build_adapted_model(net, every, DiffoRAConfig(r=3), inherit=pairs)


def test_inherited_changes_do_not_depend_on_alpha():
    x = torch.randn(3, 1, 28, 28)
    net = recipes.pretrained_small("vit-mnist")
    dam = attach_supernet(net, DiffoRAConfig(r=2, alpha=4))
    with torch.no_grad():
        for a in adapters.adapters(net).values():
            a.B.normal_(0, 0.1)
    relaxed, pairs = net(x).detach(), super_weights(net, dam)
    every = torch.ones(6, 3, dtype=torch.bool)
    build_adapted_model(adapters.detach(net), every, DiffoRAConfig(r=2, alpha=1), inherit=pairs)
    torch.testing.assert_close(net(x), relaxed, rtol=1e-4, atol=1e-4)
    adapters.detach(net)
    with pytest.raises(ValueError, match="lacks a selected module"):
        build_adapted_model(net, every, DiffoRAConfig(r=2), inherit={})


def test_second_order_of_the_config_is_what_the_search_does():
    batches, logits = [(torch.randn(4, 1, 28, 28), torch.arange(4)) for _ in range(2)], {}
    for config, given in ((False, None), (True, None), (False, True)):
        torch.manual_seed(0)
        net = recipes.pretrained_small("vit-mnist")
        dam = attach_supernet(net, DiffoRAConfig(r=2, second_order=config))
        search(net, dam, batches[:1], batches[1:], steps=4, warmup=2, second_order=given)
        logits[config, given] = dam.logits.detach()
    torch.testing.assert_close(logits[True, None], logits[False, True])
    assert not torch.equal(logits[True, None], logits[False, None])


@pytest.mark.parametrize("call, words", [
    (lambda: top_gates(torch.tensor([[float("nan")], [0.2]])), "without NaN"),
    (lambda: top_gates(torch.rand(4)), "N, L"),
    (lambda: DiffoRAConfig(alpha=0), "positive"),
    (lambda: halves((torch.rand(8, 2), torch.arange(8) % 2), 0), "batches of 0"),
    (lambda: relu_gram(torch.ones(3)), "matrix")])
def test_numbers_that_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("mask", [torch.ones(3, 3, dtype=torch.bool), torch.ones(2, 3)])
def test_masks_of_another_model(mask):
    with pytest.raises(ValueError, match=r"needs bool of shape \(2, 3\)"):
        build_adapted_model(Net(), mask, DiffoRAConfig(r=2))


def test_a_discrete_supernet_is_the_selected_half():
    net, dam = supernet(sharing="none")
    search(net, dam, batches(seed=1), batches(seed=2), steps=6, warmup=2)
    mask, x = discretize(net, dam, 0.5), batches(1)[0][0]
    y = net(x).detach()
    pairs = {n: (a.A.detach(), a.scaling * a.B.detach()) for n, a in gated(net, dam).items()}
    twin = build_adapted_model(Net(), mask, DiffoRAConfig(r=2, alpha=4, sharing="none"),
                               inherit=pairs)
    torch.testing.assert_close(twin(x), y, rtol=1e-5, atol=1e-6)


# the kernel


def test_kernels_against_jacobians_and_order():
    net = build_adapted_model(Net(), torch.ones(2, 3, dtype=torch.bool), DiffoRAConfig(r=2))
    x, y = batches(1, n=6)[0]
    with torch.no_grad():
        for a in adapters.adapters(net).values():
            a.B.normal_()
    grams = module_grams(net, (x, y))
    a = adapters.adapters(net)["blocks.1.down"]
    rows = []
    for i in range(6):
        one = net(x[i : i + 1])[0, y[i]]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(one, [a.A, a.B])]))
    J = torch.stack(rows).double()
    torch.testing.assert_close(grams["blocks.1.down"], J @ J.T, rtol=1e-4, atol=1e-5)
    names = list(grams)
    S, T = names[:2], names[2:5]
    low = {k: ntk_min_eigenvalue(net, (x, y), v) for k, v in (("S", S), ("T", T), ("ST", S + T))}
    assert low["ST"] >= max(low["S"], low["T"]) - 1e-6
    with pytest.raises(ValueError, match="no adapter on"):
        ntk_min_eigenvalue(net, (x, y), ["head"])
    with pytest.raises(ValueError, match="at most 64"):
        module_grams(net, (torch.randn(65, 6), torch.zeros(65, dtype=torch.long)))


def test_relu_gram_by_hand_and_its_convergence():
    X = torch.tensor([[1.0, 0], [0, 1], [-1, 0]], dtype=torch.float64)
    wanted = torch.diag(torch.full((3,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(relu_gram(X), wanted)  # right angles, and opposite: zero
    X = F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double())
    H = relu_gram(X)
    assert torch.linalg.eigvalsh(H)[0] > 0
    g = torch.Generator().manual_seed(1)
    on = (X @ torch.randn(4, 200_000, generator=g, dtype=torch.float64) >= 0).double()
    torch.testing.assert_close(X @ X.T * (on @ on.T) / 200_000, H, rtol=0, atol=5e-3)
    torch.testing.assert_close(relu_gram(3 * X), 9 * H)
    with pytest.raises(ValueError, match="zero rows"):
        relu_gram(torch.zeros(2, 2))


# planted truth, and the experiment


def test_gates_name_planted_modules():
    "Three pilot teachers: four of nine are far above chance, which is 1.5."
    cfg, hits = SMALL, 0
    for seed in (103, 105, 106):
        bed = told.digits(seed, turn=0.0, sizes=(500, 1))
        teacher, truth = plant(bed.model, seed)
        x = bed.train[0]
        with torch.no_grad():
            columns = x, teacher(x)
        found = told._scores(cfg, bed.model, columns, told._squares, seed, kinds=("gates",))
        hits += int((top_gates(found["gates"], 1e-3) & truth).sum())
    assert hits >= 4


TINY = {"images": (40, 40), "planted": 40, "teachers": 2, "seeds": (0,), "steps": 3, "warmup": 1,
        "training": Training(steps=1, batch_size=8)}


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(**TINY)
    report = goes_on(told, cfg, tmp_path, monkeypatch, stop="_draw_digits")
    assert {c.verdict for c in report.claims if c.unit == "powers of ten"} == {
        "not decided at this scale"}


@pytest.fixture
def deberta(tmp_path):
    "A DeBERTa of the architecture of FULL, small."
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    DebertaV2Model(DebertaV2Config(
        vocab_size=260, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, relative_attention=True,
        position_buckets=8, share_att_key=True, pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0,
        pad_token_id=0)).save_pretrained(tmp_path / "deberta")
    recipes.byte_tokenizer().save_pretrained(tmp_path / "deberta")
    return str(tmp_path / "deberta")


def test_full_scale_path_with_a_tiny_model(tmp_path, deberta, recorded):
    "Classes and a score, from data of the hub's form to claims."
    cfg = FULL.replace(model=deberta, device="cpu", seeds=(0,), glue=("mrpc", "stsb"), r=2,
                       glue_lrs=(1e-3,), max_length=16, steps=2, warmup=1, batch_size=4,
                       glue_training=Training(steps=1, batch_size=2))
    report = experiment(cfg, start_run("diffora", cfg, "full", root=tmp_path / "runs"))
    table = report.tables["glue"]
    assert set(table["task"]) == {"mrpc", "stsb"} and len(table) == 2 * 5
    assert len(report.claims) == 4
    assert set(FULL.glue) <= set(told.suites.GLUE)


def test_a_gated_layer_takes_linear_layers_only():
    with pytest.raises(TypeError, match="supports Linear"):
        GatedLoRALinear(nn.Conv2d(1, 1, 1))
