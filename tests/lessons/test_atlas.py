"""aTLAS: vectors, composition, gradients, learning, selection, bad input, full scale."""

import copy
import json
import math
from functools import partial

import pytest
import torch
import two_processes
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptlab import adapter_files, adapters, evaluate, modules, recipes
from adaptlab.arithmetic import atlas
from adaptlab.arithmetic.atlas import (
    AnisotropicComposer, ComposedLora, LowRank, TaskVector, attach_composition, block_gradients,
    compose, disentanglement_error, learn_addition, learn_composition, learn_negation,
    learn_test_time, select_task_vectors)
from adaptlab.bench import pictures
from adaptlab.bench.runs import launch, start_run
from adaptlab.experiments import atlas as told
from adaptlab.experiments.atlas import CLIP_TASKS, FULL, SMALL, experiment
from adaptlab.train import Training


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def tuned(model, size=0.1, seed=1):
    "The same network with other weights."
    other, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * torch.randn(p.shape, generator=g).to(p))
    return other


def data(n=60, seed=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


@pytest.fixture
def three():
    model = net()
    return model, [TaskVector(model, tuned(model, seed=s), f"t{s}") for s in (1, 2, 3)]


# task vectors


def test_vectors_from_modules_dicts_and_files_are_the_same(tmp_path):
    base, other = net(), tuned(net())
    for name, m in (("a", base), ("b", other)):
        save_file(m.state_dict(), tmp_path / f"{name}.safetensors")
    found = [TaskVector(base, other), TaskVector(base.state_dict(), other.state_dict()),
             TaskVector(tmp_path / "a.safetensors", str(tmp_path / "b.safetensors"))]
    for vector in found:
        assert set(vector) == set(base.state_dict()) and len(vector) == 4
        for k, p in other.state_dict().items():
            torch.testing.assert_close(vector[k], p - base.state_dict()[k])


def test_integers_are_left_out_and_must_agree():
    a, b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    assert "num_batches_tracked" not in TaskVector(a, b)
    one, two = {"w": torch.ones(2), "n": torch.tensor([1])}, {"w": torch.ones(2), "n": torch.ones(
        1, dtype=torch.int64) * 2}
    with pytest.raises(ValueError, match="n is torch.int64 and differs"):
        TaskVector(one, two)
    with pytest.raises(ValueError, match="do not match"):
        TaskVector(net(), nn.Linear(2, 2))


def test_arithmetic_keeps_low_rank():
    torch.manual_seed(0)
    low = [TaskVector.of({"w": LowRank(torch.randn(r, 5), torch.randn(4, r))}) for r in (2, 3)]
    whole = [v["w"].dense() for v in low]
    made = 2 * low[0] - low[1]
    assert isinstance(made["w"], LowRank) and made["w"].A.shape == (5, 5)
    torch.testing.assert_close(made["w"].dense(), 2 * whole[0] - whole[1])
    assert math.isclose(made.norm(), float((2 * whole[0] - whole[1]).norm()), rel_tol=1e-4)
    mixed = low[0] + TaskVector.of({"w": whole[1], "x": torch.ones(2)})
    torch.testing.assert_close(mixed["w"], whole[0] + whole[1])
    assert torch.equal(mixed["x"], torch.ones(2))
    cosine = torch.cosine_similarity(whole[0].flatten(), whole[1].flatten(), 0)
    assert abs(low[0].cosine(low[1]) - float(cosine)) < 1e-5
    with pytest.raises(ValueError, match="norm 0"):
        low[0].cosine(0.0 * low[0])


# composition


def test_one_expert_in_double_precision_exactly(three):
    model = net(dtype=torch.float64)
    expert, x = tuned(model), data()[0].double()
    made = AnisotropicComposer(model, [TaskVector.of(
        {k: expert.state_dict()[k] - p for k, p in model.state_dict().items()})])
    assert made.coef.dtype == torch.float64 and torch.equal(made(x), model(x))
    with torch.no_grad():
        made.coef.fill_(1)
    torch.testing.assert_close(made(x), expert(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["block", "isotropic", 3])
def test_gradients_by_finite_differences(kind):
    model, (x, y) = net(dtype=torch.float64), data()
    vectors = [TaskVector.of({k: torch.randn_like(p) for k, p in model.named_parameters()})
               for _ in range(2)]
    made = AnisotropicComposer(model, vectors, kind)

    def loss(coef):
        with torch.no_grad():
            made.coef.copy_(coef)
        return nn.functional.cross_entropy(made(x.double()), y)

    at = 0.1 * torch.randn_like(made.coef.detach())
    (grad,) = torch.autograd.grad(loss(at), made.coef)
    for _ in range(3):
        way = torch.randn_like(at)
        slope = (loss(at + 1e-5 * way) - loss(at - 1e-5 * way)).item() / 2e-5
        assert abs(slope - float((grad * way).sum())) < 1e-6


def test_nothing_else_is_trained_and_the_model_stays_as_it_was(three):
    model, vectors = three
    before = {k: p.clone() for k, p in model.state_dict().items()}
    made = AnisotropicComposer(model, vectors)
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["coef"]
    assert list(made.state_dict()) == ["coef"]
    learn_composition(made, data(), epochs=2)
    assert made.coef.detach().any() and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], p) for k, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_weights_are_shared_and_not_copied(three):
    model, vectors = three
    size = 512
    big = nn.Linear(size, size)
    many = [TaskVector.of({"weight": torch.randn(size, size)}) for _ in range(8)]
    with pytest.warns(UserWarning, match="longer than the base"):
        made = AnisotropicComposer(big, many)
    x, one = torch.randn(2, size), 4 * size * size
    made(x).sum().backward()  # the optimiser's and autograd's own

    def step():
        made.coef.grad = None
        made(x).sum().backward()

    assert evaluate.peak_memory(step, "cpu") < 4 * one  # eight products would take 8
    assert made._network[0].weight.data_ptr() == big.weight.data_ptr()
    assert made.bake()["bias"].data_ptr() == big.bias.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_in_half_precision(three, dtype):
    model, vectors = three
    x = data()[0]
    exact, half = AnisotropicComposer(model, vectors), AnisotropicComposer(
        model, vectors, dtype=dtype)
    for made in (exact, half):
        with torch.no_grad():
            made.coef.fill_(0.4)
        made(x).square().sum().backward()
    assert half._stacks["0.weight"].dtype == dtype and half.coef.grad.dtype == torch.float32
    torch.testing.assert_close(half(x), exact(x), rtol=0.05, atol=0.02)
    torch.testing.assert_close(half.coef.grad, exact.coef.grad, rtol=0.05, atol=0.2)


def test_a_model_in_bfloat16_sums_in_float32():
    base = torch.ones(4, dtype=torch.bfloat16)
    stack = torch.full((3, 4), 0.001)
    out = compose(base, stack, torch.full((3,), 1.5))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.full((4,), 1.0045).bfloat16())


def test_autocast_does_not_round_the_sum(three):
    model, vectors = three
    made = AnisotropicComposer(model, vectors)
    with torch.no_grad():
        made.coef.fill_(0.3)
    plain = made.composed()
    with torch.autocast("cpu", torch.bfloat16):
        inside = made.composed()
    assert all(torch.equal(plain[k], inside[k]) for k in plain)


def test_buffers_are_those_of_the_base_and_stay():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    other = tuned(model)
    other[1].running_mean.fill_(5)
    made = AnisotropicComposer(model, [TaskVector(model, other)])
    assert "1.running_mean" not in made.blocks and "1.weight" in made.blocks
    with torch.no_grad():
        made.coef.fill_(1)
    made.train()(torch.randn(4, 1, 4, 4))
    baked = made.bake()
    assert not baked["1.running_mean"].any() and baked["1.num_batches_tracked"] == 0
    torch.testing.assert_close(baked["0.weight"], other[0].weight)


def test_tied_weights_stay_tied_and_labels_are_shifted():
    llama, ids = recipes.tiny_llama(), torch.randint(0, 260, (2, 12))
    llama.lm_head.weight = llama.model.embed_tokens.weight
    change = {"model.embed_tokens.weight": 0.1 * torch.randn_like(llama.lm_head.weight)}
    made = AnisotropicComposer(llama, [TaskVector.of(change)])
    batch = {"input_ids": ids, "labels": ids}
    torch.testing.assert_close(modules.cross_entropy(made, batch),
                               modules.cross_entropy(llama, batch))
    with torch.no_grad():
        made.coef.fill_(1)
        expected = copy.deepcopy(llama)
        expected.lm_head.weight.add_(change["model.embed_tokens.weight"])
    torch.testing.assert_close(made(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    baked = made.bake()
    assert baked["lm_head.weight"] is baked["model.embed_tokens.weight"]


def test_blocks_by_name_and_only_matrices(three):
    model, vectors = three
    assert AnisotropicComposer(model, vectors, blocks=r"^2\.").blocks == ["2.weight", "2.bias"]
    made = AnisotropicComposer(model, vectors, only_matrices=True)
    assert made.blocks == ["0.weight", "2.weight"] and made.coef.shape == (3, 2)


def test_parts_are_the_same_for_all_vectors_and_from_the_seed():
    g = torch.Generator().manual_seed(0)
    stack, coef = torch.randn(3, 50, generator=g), torch.randn(3, 7, generator=g)
    rows, place = atlas._in_parts(stack, "block", 7, 0)
    assert torch.equal(rows.transpose(0, 1).reshape(3, -1)[:, place.long()], stack)
    assert int((rows != 0).sum()) == stack.numel()  # each entry once, else zeros
    part = place.long() // rows.shape[2]
    assert part.unique().tolist() == list(range(7))
    expected = (coef[:, part] * stack).sum(0)
    torch.testing.assert_close(compose(torch.zeros(50), rows, coef, place), expected)
    model = net()
    vectors = [TaskVector(model, tuned(model))]
    places = [AnisotropicComposer(model, vectors, 3, seed=s)._places["0.weight"]
              for s in (0, 0, 1)]
    assert torch.equal(places[0], places[1]) and not torch.equal(places[0], places[2])


def test_gradients_of_parts_sum_to_the_blocks_and_of_blocks_to_the_isotropic(three):
    grads = []
    for kind in (3, "block", "isotropic"):
        made = AnisotropicComposer(*three, kind, only_matrices=True)
        nn.init.constant_(made.coef, 0.3)
        modules.cross_entropy(made, data()).backward()
        grads.append(made.coef.grad)
    torch.testing.assert_close(grads[0].sum(2), grads[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads[1].sum(1, keepdim=True), grads[2], rtol=1e-4, atol=1e-6)


def test_permuted_vectors_permute_coefficients(three):
    model, vectors = three
    made, turned = AnisotropicComposer(model, vectors), AnisotropicComposer(model, vectors[::-1])
    with torch.no_grad():
        turned.coef.copy_(made.coef.normal_().flip(0))
    torch.testing.assert_close(turned(data()[0]), made(data()[0]), rtol=1e-4, atol=1e-5)


def test_least_squares():
    torch.manual_seed(0)
    line, pairs = nn.Linear(6, 1, bias=False), (torch.randn(80, 6), torch.randn(80, 1))
    vectors = [TaskVector.of({"weight": 0.1 * torch.randn(1, 6)}) for _ in range(3)]
    made = AnisotropicComposer(line, vectors)
    learn_composition(made, pairs, lambda m, b: (m(b[0]) - b[1]).square().mean(), lr=0.3,
                      weight_decay=0, epochs=60, max_grad_norm=None)
    columns = torch.cat([pairs[0] @ v["weight"].T for v in vectors], 1)
    exact = torch.linalg.lstsq(columns, pairs[1] - line(pairs[0]).detach()).solution
    torch.testing.assert_close(made.coef.detach(), exact, rtol=0.02, atol=0.02)


def test_one_part_is_the_block(three):
    model, vectors = three
    one, block = AnisotropicComposer(model, vectors, 1), AnisotropicComposer(model, vectors)
    assert one.coef.shape == block.coef.shape
    with torch.no_grad():
        one.coef.copy_(block.coef.normal_())
    assert torch.equal(one(data()[0]), block(data()[0]))


def test_linearised_is_exact_for_a_linear_model_and_trains():
    model, x = nn.Linear(6, 3), data()[0]
    vectors = [TaskVector(model, tuned(model, seed=s)) for s in (1, 2)]
    pair = [AnisotropicComposer(model, vectors, linearized=kind) for kind in (True, False)]
    for made in pair:
        with torch.no_grad():
            made.coef.fill_(0.7)
        made(x).square().sum().backward()
    torch.testing.assert_close(pair[0](x), pair[1](x))
    torch.testing.assert_close(pair[0].coef.grad, pair[1].coef.grad, rtol=1e-3, atol=1e-4)


def test_the_error_of_the_first_order_shrinks_by_four():
    model, x = net(dtype=torch.float64), data()[0].double()
    vectors = [TaskVector.of({k: 0.1 * torch.randn_like(p) for k, p in model.named_parameters()})
               for _ in "ab"]
    pair = [AnisotropicComposer(model, vectors, linearized=kind) for kind in (True, False)]
    way, gaps = torch.randn(2, 4), []
    for size in (0.02, 0.01):
        for made in pair:
            made.coef.data.copy_(size * way)
        gaps.append((pair[0](x) - pair[1](x)).norm().item())
    assert 3 < gaps[0] / gaps[1] < 5


def test_a_linearised_transformer_at_zero_is_the_base():
    vit = recipes.TinyViT(28, 7, 16, 1, 2)
    made = AnisotropicComposer(vit, [TaskVector(vit, tuned(vit, 0.02))], linearized=True)
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(made(x), vit.eval()(x), rtol=1e-4, atol=1e-5)
    made(x).sum().backward()
    assert made.coef.grad.any()


def test_the_network_may_be_changed_afterwards(three):
    model, vectors = three
    made, x = AnisotropicComposer(model, vectors), data()[0]
    before = made(x)
    adapters.attach(model.train(), partial(adapters.LoraAdapter, rank=1), ["0"])
    model[1] = nn.ReLU()
    assert torch.equal(made(x), before) and model.training


def test_moves_and_copies(three):
    model, vectors = three
    made = AnisotropicComposer(model, vectors).double()
    assert made(data()[0].double()).dtype == torch.float64
    assert model[0].weight.dtype == torch.float32
    again = copy.deepcopy(made)
    with torch.no_grad():
        again.coef.fill_(1)
    assert not made.coef.any()


# bad input


@pytest.mark.parametrize("options, words", [
    ({"granularity": 0}, "granularity = 0"), ({"granularity": "layer"}, "granularity = 'layer'"),
    ({"granularity": True}, "granularity = True"), ({"granularity": 4}, "0?2?.bias has 3 entries"),
    ({"blocks": "nowhere"}, "no block matches"),
])
def test_settings_that_are_refused(three, options, words):
    with pytest.raises(ValueError, match=words):
        AnisotropicComposer(*three, **options)


def test_vectors_that_are_refused(three):
    model, vectors = three
    for given, error, words in (
            ([], ValueError, "task_vectors is empty"), (vectors[0], TypeError, "must be a list"),
            ([model.state_dict()], TypeError, "make TaskVector"),
            ([TaskVector.of({"other": torch.ones(1)})], ValueError, "the model has not"),
            ([TaskVector.of({"0.weight": torch.ones(2, 2)})], ValueError, "another model"),
            ([TaskVector.of({"0.bias": torch.full((8,), math.nan)})], ValueError, "NaN")):
        with pytest.raises(error, match=words):
            AnisotropicComposer(model, given)
    with pytest.raises(ValueError, match="NaN or infinity in 0.bias"):
        AnisotropicComposer(model, [TaskVector.of({"0.bias": torch.full((8,), 1e6)})],
                            dtype=torch.float16)
    with pytest.raises(ValueError, match="at least one block"):
        TaskVector.of({})
    far = TaskVector.of({k: 100 * torch.ones_like(p) for k, p in model.state_dict().items()}, "far")
    with pytest.warns(UserWarning, match="'far' is longer than the base"):
        AnisotropicComposer(model, [far])


def test_what_cannot_be_baked(three):
    made = AnisotropicComposer(*three)
    with torch.no_grad():
        made.coef[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        made.bake()
    with pytest.raises(ValueError, match="linearised"):
        AnisotropicComposer(*three, linearized=True).bake()
    adapters.attach(three[0], partial(adapters.LoraAdapter, rank=1), ["0"])
    with pytest.raises(ValueError, match="merge them first"):
        AnisotropicComposer(*three)


def test_labels_outside_of_the_head(three):
    x, y = data()
    with pytest.raises((IndexError, RuntimeError)):
        learn_composition(AnisotropicComposer(*three), (x, y + 5), epochs=1)


# learning


def test_never_below_the_start_on_what_selects(three):
    made, seen = AnisotropicComposer(*three), []

    def score(model):
        seen.append(1.0 if not model.coef.detach().any() else 0.0)
        return seen[-1]

    learn_composition(made, data(), epochs=3, select_on=score)
    assert not made.coef.any() and len(seen) == 4  # the start, and three passes


def test_steps_of_a_pass(three):
    assert learn_composition(AnisotropicComposer(*three), data(8), epochs=2).steps == 20
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), 4)
    assert learn_composition(AnisotropicComposer(*three), loader, epochs=2).steps == 30


def test_addition_from_tensors_and_data_sets(three):
    model, vectors = three
    parts = [data(20, 1), data(33, 2)]
    sets = [torch.utils.data.TensorDataset(*p) for p in parts]
    results = []
    longer = torch.utils.data.TensorDataset(*(torch.cat([t, t]) for t in parts[1]))
    for given in (parts, [sets[0], torch.utils.data.DataLoader(sets[1], 5)],
                  [sets[0], torch.utils.data.Subset(longer, range(33))], [_Rows(p) for p in parts]):
        made = AnisotropicComposer(model, vectors)
        found = learn_addition(made, given, lr=0.05, epochs=2, batch_size=8, references=[0.5, 0.5])
        results.append((found.steps, made.coef.detach()))
    assert [steps for steps, _ in results] == [10] * 4  # 20 images in steps of four
    for _, coef in results:
        torch.testing.assert_close(coef, results[0][1])
    with pytest.raises(ValueError, match="2 tasks, 1 heads"):
        learn_addition(made, parts, heads=[nn.Identity()])


class _Rows(torch.utils.data.Dataset):
    def __init__(self, pair):
        self.pair = pair

    def __len__(self):
        return len(self.pair[0])

    def __getitem__(self, i):
        return self.pair[0][i], self.pair[1][i]


def test_heads_turn_features_into_logits():
    model, head = net(), nn.Linear(3, 4)
    made = AnisotropicComposer(model, [TaskVector(model, tuned(model))])
    x, y = data()
    learn_addition(made, [(x, y), (x, y)], [head, modules.logits_of], epochs=1)
    assert all(p.grad is None for p in head.parameters()) or not made.coef.grad


def test_negation_stops_at_the_control(monkeypatch):
    model = net()
    made = AnisotropicComposer(model, [TaskVector(model, tuned(model))])
    values = iter([0.9, 0.8, 0.6, 0.79, 0.3, 0.77, 0.1, 0.7, 0.0, 0.9])  # target, control, ...
    kept = []

    def accuracy(model, part, head):
        kept.append(model.coef.detach().clone())
        return next(values)

    monkeypatch.setattr(atlas, "_accuracy", accuracy)
    found = learn_negation(made, data(), data(seed=5), lr=0.1, epochs=9, batch_size=20)
    assert found.steps == 3 * 6  # the third pass went below 95 % of 0.8
    assert torch.equal(made.coef.detach(), kept[4]) and made.coef.detach().any()
    with pytest.raises(ValueError, match="control_ratio"):
        learn_negation(made, data(), data(), control_ratio=1.5)


def test_test_time_shares_and_threshold(three, monkeypatch):
    made, seen = AnisotropicComposer(*three), []

    def loss(weak, strong, labels, trusted, threshold, exponent):
        seen.append((len(weak), int(trusted.sum()), round(threshold, 3)))
        return strong.sum()

    monkeypatch.setattr(atlas, "ufm_loss", loss)
    learn_test_time(made, data()[0], lambda x: x + 0.1, epochs=2, batch_size=32)
    assert seen == [(32, 8, t) for t in (0.9, 0.933, 0.967, 1.0)]
    with pytest.raises(ValueError, match="fewer than 4"):
        learn_test_time(made, data(3)[0], lambda x: x)


def test_fewer_images_than_classes_are_refused():
    model = recipes.MLP((6, 8, 10))
    made = AnisotropicComposer(model, [TaskVector(model, tuned(model))])
    with pytest.raises(ValueError, match="5 images, more classes"):
        learn_test_time(made, data(5)[0], lambda x: x)


def test_trusted_set_is_limited_by_an_equal_share():
    logits = torch.zeros(9, 3)
    logits[:, 0] = torch.arange(9.0) + 1
    rows, labels = atlas._trusted(logits, 100)
    assert rows.tolist() == [8, 7, 6] and not labels.any()
    assert len(atlas._trusted(logits, 2)[0]) == 2


# selection


def test_scores_over_batches_and_for_low_rank():
    model = net()
    torch.manual_seed(0)
    low = TaskVector.of({"0.weight": LowRank(torch.randn(2, 6), torch.randn(8, 2))})
    whole = TaskVector.of({k: torch.randn_like(p) for k, p in model.named_parameters()})
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), 7)
    model[0].weight.requires_grad_(False)
    scores, blocks = block_gradients(model, [low, whole], loader)
    assert not model[0].weight.requires_grad and blocks[0] == "0.weight"
    made = AnisotropicComposer(model, [low, whole])
    modules.cross_entropy(made, data()).backward()
    torch.testing.assert_close(scores.float(), made.coef.grad, rtol=1e-3, atol=1e-5)
    assert not scores[0, 1:].any()


@pytest.mark.parametrize("by", ["block_grad", "grad", "features", "random"])
def test_rules_of_selection(three, by):
    model, vectors = three
    features = torch.tensor([1.0, 0]), torch.tensor([[0.0, 1], [1, 0.1], [1, 1]])
    found = select_task_vectors(model, vectors, data(), budget=2, by=by, features=features)
    assert len(found.vectors) == 2 and all(len(set(c)) == 2 for c in found.chosen.values())
    scores, blocks = block_gradients(model, vectors, data())
    if by == "features":
        assert [v.name for v in found.vectors] == ["t2", "t3"]
    if by == "grad":
        assert set(found.chosen["0.bias"]) == set(scores.abs().sum(1).topk(2).indices.tolist())
    if by == "block_grad":
        for j, name in enumerate(blocks):
            assert set(found.chosen[name]) == set(scores[:, j].abs().topk(2).indices.tolist())
            assert torch.equal(found.vectors[1][name], vectors[found.chosen[name][1]][name])
    every = select_task_vectors(model, vectors, data(), budget=3, by=by, features=features)
    assert [v["0.bias"].tolist() for v in every.vectors] == [v["0.bias"].tolist() for v in vectors]


@pytest.mark.parametrize("options, words", [
    ({"budget": 4}, "budget = 4"), ({"budget": 0}, "budget = 0"), ({"by": "luck"}, "by = 'luck'"),
    ({"by": "features"}, "mean features"),
])
def test_selections_that_are_refused(three, options, words):
    with pytest.raises(ValueError, match=words):
        select_task_vectors(*three, data(), **options)


@pytest.mark.parametrize("by, how, words", [
    ("features", {"features": (torch.ones(5), torch.ones(1, 5))}, "all 3 sources"),
    ("features", {"features": (torch.ones(5), torch.full((3, 5), torch.nan))}, "NaN"),
    ("block_grad", {"factor": torch.nan}, "NaN"), ("grad", {"factor": torch.nan}, "NaN"),
    ("block_grad", {"rows": 0}, "no samples"),
])
def test_scores_that_say_nothing_are_refused(three, by, how, words):
    x, y = data()
    part = x[: how.get("rows")] * how.get("factor", 1.0), y[: how.get("rows")]
    with pytest.raises(ValueError, match=words):
        select_task_vectors(*three, part, by=by, features=how.get("features"))


def test_changes_of_other_shapes_are_refused(three):
    model, vectors = three
    turned = TaskVector.of({"0.weight": torch.randn(6, 8)})  # as many entries
    row = TaskVector.of({"0.weight": torch.randn(1, 6)})  # could be broadcast
    for action in (lambda: vectors[0].dot(turned), lambda: vectors[0] + row,
                   lambda: select_task_vectors(model, [turned], data())):
        with pytest.raises(ValueError, match="different models"):
            action()


def test_references_are_above_zero(three):
    with pytest.raises(ValueError, match="above 0"):
        learn_addition(AnisotropicComposer(*three), [data()], references=[0.0])


def test_disentanglement_of_vectors_in_different_blocks():
    model = net()
    a = TaskVector.of({"0.weight": torch.randn(8, 6)})
    none = TaskVector.of({"2.bias": torch.zeros(3)})
    made = AnisotropicComposer(model, [a, none])
    with torch.no_grad():
        made.coef.fill_(1)
    assert disentanglement_error(made, data()[0], 0, 1) == 0


def test_rows_of_coefficients(three):
    for kind, n in (("block", 12), ("isotropic", 3), (2, 24)):
        rows = AnisotropicComposer(*three, kind).coefficients()
        assert len(rows) == n and {r["vector"] for r in rows} == {"t1", "t2", "t3"}


# LoRA


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), Conv1D(4, 6)])
def test_loras_as_an_adapter(layer, tmp_path):
    torch.manual_seed(0)
    model, vectors, outputs = nn.Sequential(layer), [], []
    x = torch.randn(2, 5, 6)
    for rank in (1, 2):
        adapters.attach(model, partial(adapters.LoraAdapter, rank=rank, alpha=3.0), ["0"])
        with torch.no_grad():
            for p in adapters.trainable_parameters(model):
                p.normal_()
        vectors.append(TaskVector.from_lora(model))
        outputs.append(model(x).detach())
        adapters.detach(model)
    base = model(x).detach()
    dense = AnisotropicComposer(model, vectors)
    attach_composition(model, vectors)
    assert torch.equal(model(x), base) and adapters.count_parameters(model)[0] == 2
    adapter = adapters.adapters(model)["0"]
    for made, coef in ((model, adapter.coef), (dense, dense.coef)):
        with torch.no_grad():
            coef.copy_(torch.tensor([0.5, -2.0]).view_as(coef))
        expected = base + 0.5 * (outputs[0] - base) - 2 * (outputs[1] - base)
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)
    file = adapter_files.save(model, tmp_path / "composed.safetensors")
    torch.testing.assert_close(adapters.merge(model)(x), expected, rtol=1e-4, atol=1e-4)
    adapters.unmerge(model)
    adapters.detach(model)
    torch.testing.assert_close(adapter_files.load(model, file)(x), expected, rtol=1e-4, atol=1e-4)


def test_loras_on_different_layers_and_refusals():
    model = net()
    vectors = [TaskVector.of({f"{i}.weight": LowRank(torch.randn(2, m[1]), torch.randn(m[0], 2))})
               for i, m in ((0, (8, 6)), (2, (3, 8)))]
    attach_composition(model, vectors)
    assert adapters.adapters(model)["0"].ranks == [2, 0]
    with pytest.raises(ValueError, match="no product of finite factors"):
        attach_composition(net(), [TaskVector(net(), tuned(net()))])
    small = LowRank(torch.randn(2, 5), torch.randn(8, 2))
    for name, block, words in (("0.weight", small, "another shape"), ("q.weight", small, "no such"),
                               ("0.weight", vectors[0]["0.weight"]._replace(
                                   A=torch.full((2, 6), torch.nan)), "finite")):
        with pytest.raises(ValueError, match=words):
            attach_composition(refused := net(), [TaskVector.of({name: block})])
        assert not adapters.adapters(refused)
    for ranks in ([], [0], [-1, 2]):
        with pytest.raises(ValueError, match="ranks"):
            ComposedLora(nn.Linear(2, 2), ranks)


# the experiment


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(seeds=(0,), targets=SMALL.targets[:1], shots=(1, 2), lrs=(0.1,),
                        full_lrs=(1e-3,), slow_lrs=(0.03,), images=16, passes=1,
                        forget=("dark",), training=Training(steps=1, batch_size=8))
    monkeypatch.setattr(told, "_plot", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch("atlas", cfg.replace(tracks=("fewshot",)), root=tmp_path)
    monkeypatch.undo()
    with monkeypatch.context() as m:
        m.setattr(Training, "fit", lambda *a, **k: 1 / 0)  # nothing is trained again
        launch("atlas", cfg.replace(tracks=("fewshot",)), root=tmp_path, resume=True)
    report = launch("atlas", cfg, root=tmp_path)
    assert {c.verdict for c in report.claims} == {"not decided at this scale"}
    assert json.loads((report.folder / "report.json").read_text())["paper"] == "atlas"


@pytest.fixture
def tiny(tmp_path):
    "A small CLIP, and fine-tunes of its image encoder for all tasks."
    from transformers import (
        CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionModel)

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32}
    clip = CLIPModel(CLIPConfig(
        text_config=sizes | {"vocab_size": 260, "max_position_embeddings": 128, "eos_token_id": 2},
        vision_config=sizes | {"image_size": 32, "patch_size": 16}, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
                       ).save_pretrained(tmp_path / "clip")
    tokenizer = recipes.byte_tokenizer()
    for _, _, name in CLIP_TASKS.values():
        expert = CLIPVisionModel(clip.config.vision_config)
        expert.load_state_dict(tuned(clip.vision_model, 0.01).state_dict())
        expert.save_pretrained(tmp_path / f"expert_{name}")
    return tmp_path, tokenizer, CLIPProcessor


def test_full_scale_path_with_tiny_models(tmp_path, tiny, recorded, monkeypatch):
    "All sets, from data of the hub's form to tables."
    from types import SimpleNamespace

    from transformers import CLIPImageProcessor

    folder, tokenizer, kind = tiny
    processor = CLIPImageProcessor.from_pretrained(folder / "clip")
    monkeypatch.setattr(kind, "from_pretrained", lambda *a, **k: SimpleNamespace(
        image_processor=processor, tokenizer=partial(tokenizer, truncation=True, max_length=40)))
    pictures._clip.cache_clear()
    cfg = FULL.replace(device="cpu", seeds=(0,), shots=(1,), passes=1, clip=str(folder / "clip"),
                       experts=str(folder / "expert_{}"), training=Training(steps=1, batch_size=2))
    report = experiment(cfg, start_run("atlas", cfg, "full", root=tmp_path / "runs"))
    pictures._clip.cache_clear()
    table = report.tables["fewshot"]
    assert sorted(table["target"].unique()) == sorted(CLIP_TASKS) and len(table) == 3 * 8
    assert {s.partition("@")[0] for s, *_ in CLIP_TASKS.values()} <= {
        a.partition("#")[0].partition("@")[0] for a in map(str, recorded.asked)}


# two processes

TRAIN = """
import torch

from adaptlab import processes, recipes
from adaptlab.arithmetic.atlas import (
    AnisotropicComposer, TaskVector, learn_addition, learn_composition, learn_negation,
    learn_test_time)

torch.manual_seed(0)
model = recipes.MLP((8, 16, 4)).eval()
x, y = torch.randn(32, 8), torch.arange(32) % 4
parts = (x, y), (x.flip(1), y.flip(0))
vectors = [TaskVector.of({k: 0.4 * torch.randn_like(p) for k, p in model.named_parameters()})
           for _ in range(2)]
few = {"epochs": 2, "batch_size": 16, "lr": 0.05}
LEARN = {
    "few": lambda made: learn_composition(made, (x, y), **few),
    "addition": lambda made: learn_addition(made, parts, **few),
    "negation": lambda made: learn_negation(made, *parts, control_ratio=0.01, **few | {"lr": 0.3}),
    "alone": lambda made: learn_test_time(made, x, lambda z: 0.8 * z, **few)}
for name, learn in LEARN.items():
    made = AnisotropicComposer(model, vectors[: 1 + (name != "negation")])
    learn(made)
    if processes.is_main():
        print(name, *made.coef.detach().flatten().tolist())
"""


def test_two_processes_learn_alike(tmp_path, capsys):
    "Negation keeps whole passes, the test-time loss deals its trusted images out."
    found = two_processes.assert_alike(TRAIN, tmp_path, capsys)
    assert len(found) == 4 and all(v.any() for v in found.values())
