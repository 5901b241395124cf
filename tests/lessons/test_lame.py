"""LAME: what must hold, what must be refused, and the full-scale path on tiny models."""

import copy
import warnings
from functools import partial

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptlab import recipes
from adaptlab.bench import cost
from adaptlab.bench.runs import launch, start_run
from adaptlab.bench.streams import prepare
from adaptlab.bench.suites import Photos, image_data
from adaptlab.experiments import lame as told
from adaptlab.experiments.lame import (
    FULL,
    SMALL,
    AveragingOnly,
    Config,
    Scenarios,
    adapt,
    candidates,
    chosen,
    cross_scenarios,
    random_neighbors,
)
from adaptlab.testtime.lame import (
    LAME,
    AdaBN,
    PseudoLabel,
    ShotIM,
    Tent,
    knn_affinity,
    lame,
    lame_energy,
    laplacian_optimization,
    linear_affinity,
    logits_and_features,
    nearest_neighbors,
    rbf_affinity,
)

AFFINITIES = {"knn": knn_affinity, "rbf": rbf_affinity, "linear": linear_affinity}


def batch(n=24, classes=5, dim=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=g, dtype=dtype)
    return logits, torch.randn(n, dim, generator=g, dtype=dtype)


def psd(n, seed):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / n


def reference(logits, w, weight=1.0, max_steps=100):
    "The iteration written down as the formulas stand, energy included."
    q = logits.softmax(1)
    unary, old = -(q + 1e-10).log(), float("inf")
    y = q
    for step in range(max_steps):
        pairwise = weight * w @ y
        y = (-unary + pairwise).softmax(1)
        energy = float((unary * y - pairwise * y + y * y.clip(1e-20).log()).sum())
        if step > 1 and abs(energy - old) <= 1e-8 * abs(old):
            break
        old = energy
    return y


# --- what must hold -----------------------------------------------------------------------------


@pytest.mark.parametrize("weight, w", [(1.0, torch.zeros(24, 24)), (0.0, torch.ones(24, 24))])
def test_no_affinity_means_softmax(weight, w):
    logits, _ = batch()
    out = laplacian_optimization(logits, w.double(), weight)
    torch.testing.assert_close(out, logits.softmax(1), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:k =")
def test_a_batch_of_one_has_no_neighbours():
    logits, x = batch(1)
    for out in (lame(logits, x), laplacian_optimization(logits, knn_affinity(x))):
        torch.testing.assert_close(out, logits.softmax(1), atol=1e-6, rtol=0)
    assert nearest_neighbors(x).shape == (1, 0)
    for name in ("rbf", "linear"):
        assert torch.isfinite(lame(logits, x, name)).all()


@pytest.mark.parametrize("name", AFFINITIES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_distributions(name, scale, dtype):
    logits, x = batch(dtype=dtype)
    z = lame(scale * logits, x, name)
    assert torch.isfinite(z).all() and (z >= 0).all()
    torch.testing.assert_close(z.sum(1), torch.ones(24, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_worked_in_float32(dtype):
    logits, x = (t.to(dtype) for t in batch())
    z = lame(logits, x)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, lame(logits.float(), x.float()))


@pytest.mark.parametrize("name", AFFINITIES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_symmetries(name, seed):
    logits, x = batch(seed=seed)
    z = lame(logits, x, name)
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(24, generator=g), torch.randperm(5, generator=g)
    torch.testing.assert_close(lame(logits[rows], x[rows], name), z[rows])
    torch.testing.assert_close(lame(logits[:, columns], x, name), z[:, columns])
    shift = 100 * torch.randn(24, 1, generator=g, dtype=torch.float64)
    torch.testing.assert_close(lame(logits + shift, x, name), z)
    factor = 10 ** torch.randn(24, 1, generator=g, dtype=torch.float64)
    torch.testing.assert_close(lame(logits, factor * x, name), z)


@pytest.mark.parametrize("logits", [torch.zeros(4, 2), torch.randn(4, 2), 1e4 * torch.randn(4, 3)])
def test_weight_zero_stops_as_soon_as_it_may(logits):
    z, info = laplacian_optimization(logits, torch.ones(4, 4), weight=0.0, return_info=True)
    assert info.converged and info.steps == 3
    torch.testing.assert_close(z, logits.softmax(1))


def test_the_stopping_quantity_is_not_the_energy():
    "The lesson: S lacks a term that moves with Z. Both stand still at the end."
    logits, x = batch()
    w, log_q = rbf_affinity(x), logits.log_softmax(1)
    path = [log_q.exp()]
    for _ in range(40):
        path.append((log_q + w @ path[-1]).softmax(1))
    s = [-float((log_q + w @ z).logsumexp(1).sum()) for z in path]
    rest = [0.5 * float(((w @ z) * z).sum()) for z in path]
    bound = [a + b for a, b in zip(s, rest, strict=True)]
    energy = [float(lame_energy(z, log_q, w)) for z in path]
    # the bound at Z(n) is touched by E there, and its minimum lies between E(n+1) and E(n)
    assert all(b <= a + 1e-9 for a, b in zip(energy, bound, strict=True))
    assert all(b >= a - 1e-9 for a, b in zip(energy[1:], bound, strict=False))
    assert abs(rest[1] - rest[0]) > 0.1 and abs(s[-1] - s[-2]) < 1e-8


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_laplacian_and_the_reward_for_certainty(seed):
    "-1/2 sum w z.z = 1/4 sum w |z-z'|^2 - 1/2 sum d |z|^2 for a symmetric W."
    logits, x = batch(seed=seed)
    w, z = knn_affinity(x, symmetric=True), logits.softmax(1)
    pull = -0.5 * (w * (z @ z.T)).sum()
    laplacian = 0.25 * (w * torch.cdist(z, z) ** 2).sum()
    certainty = 0.5 * (w.sum(1) * (z**2).sum(1)).sum()
    torch.testing.assert_close(pull, laplacian - certainty)


def test_three_weak_votes_become_a_decision():
    "The lesson: three samples with 0.6 each end at 0.87, where logit x = logit 0.6 + 2 (2x - 1)."
    z = laplacian_optimization(torch.tensor([[0.6, 0.4]]).log().repeat(3, 1), 1 - torch.eye(3))
    x = z[:, 0].double()
    torch.testing.assert_close(x.logit(), torch.tensor(0.6).double().logit() + 2 * (2 * x - 1),
                               atol=1e-4, rtol=0)
    assert (x - 0.87).abs().max() < 0.005


def test_one_step_is_the_formula():
    logits, x = batch()
    w = rbf_affinity(x)
    for weight in (0.3, 1.0, 4.0):
        one = laplacian_optimization(logits, w, weight, max_steps=1)
        q = logits.softmax(1)
        torch.testing.assert_close(one, (q.log() + weight * w @ q).softmax(1), atol=1e-14, rtol=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), weight=st.floats(0.01, 10))
def test_energy_falls_and_ends_at_a_fixed_point(seed, weight):
    logits, _ = batch(seed=seed)
    w = psd(24, seed)
    z, info = laplacian_optimization(logits, w, weight, 5000, 1e-13, return_info=True)
    energies = torch.tensor(info.energies, dtype=torch.float64)
    assert (energies.diff() <= 1e-9).all()
    assert len(info.energies) == info.steps + 1
    again = (logits.log_softmax(1) + weight * w @ z).softmax(1)
    assert info.converged
    torch.testing.assert_close(again, z, atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), weight=st.floats(0.01, 3))
def test_descent_identity(seed, weight):
    "E(z) - E(z') = KL(z|z') + weight/2 <W(z'-z), z'-z>, for any symmetric W."
    logits, x = batch(seed=seed)
    w, log_q = knn_affinity(x, symmetric=True), logits.log_softmax(1)
    z = torch.rand(24, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = z / z.sum(1, keepdim=True)
    new = (log_q + weight * w @ z).softmax(1)
    fall = lame_energy(z, log_q, w, weight) - lame_energy(new, log_q, w, weight)
    step = new - z
    kl = (z * (z.log() - new.log())).sum()
    torch.testing.assert_close(fall, kl + 0.5 * weight * ((w @ step) * step).sum())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), weight=st.floats(0.1, 5))
def test_energy_falls_when_no_eigenvalue_is_below_minus_one_over_lambda(seed, weight):
    logits, _ = batch(seed=seed)
    values, vectors = torch.linalg.eigh(psd(24, seed) - 1.5 * torch.eye(24).double())
    w = (vectors * values.clamp_min(-1 / weight)) @ vectors.T
    assert torch.linalg.eigvalsh(w)[0] < -0.1
    info = laplacian_optimization(logits, (w + w.T) / 2, weight, return_info=True)[1]
    assert (torch.tensor(info.energies, dtype=torch.float64).diff() <= 1e-9).all()


@pytest.mark.parametrize("name", ["rbf", "linear"])
def test_twins_agree(name):
    logits, x = batch()
    x[7], logits[7] = x[3], logits[3]
    z = lame(logits, x, name)
    torch.testing.assert_close(z[7], z[3])


@pytest.mark.parametrize("n, k", [(2, 1), (6, 5), (6, 9), (30, 5)])
@pytest.mark.parametrize("kind", ["random", "duplicates", "all the same", "zeros"])
@pytest.mark.filterwarnings("ignore:k =")
def test_knn_rows(n, k, kind):
    x = torch.randn(n, 4)
    same = {"duplicates": x[torch.arange(n) // 3], "all the same": x[:1].repeat(n, 1)}
    x = {"random": x, "zeros": torch.zeros(n, 4), **same}[kind]
    w = knn_affinity(x, k)
    assert (w.sum(1) == min(k, n - 1)).all() and set(w.unique().tolist()) <= {0.0, 1.0}
    assert (w.diagonal() == 0).all()
    near = nearest_neighbors(x, k)
    torch.testing.assert_close(torch.zeros(n, n).scatter_(1, near, 1.0), w)
    symmetric = knn_affinity(x, k, symmetric=True)
    torch.testing.assert_close(symmetric, (w + w.T) / 2)


def test_blocks_of_rows_give_the_same_neighbours():
    x = torch.randn(4100, 6, dtype=torch.float64)
    near = nearest_neighbors(x, 3)
    for i in (0, 2047, 2048, 4099):
        cosine = nn.functional.cosine_similarity(x[i], x, dim=1)
        cosine[i] = -2
        assert set(near[i].tolist()) == set(cosine.topk(3).indices.tolist())


def test_rbf_is_the_formula():
    x = torch.randn(20, 4, dtype=torch.float64)
    d = torch.cdist(nn.functional.normalize(x), nn.functional.normalize(x))
    sigma = d.sort(1).values[:, 2].mean()  # k = 3, self counted as the first
    torch.testing.assert_close(rbf_affinity(x, 3), torch.exp(-(d**2) / (2 * sigma**2)))
    torch.testing.assert_close(rbf_affinity(torch.ones(5, 3), 2), torch.ones(5, 5))


def test_linear_is_the_cosine():
    x = torch.randn(9, 4, dtype=torch.float64)
    expected = nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    torch.testing.assert_close(linear_affinity(x), expected)
    assert torch.linalg.eigvalsh(linear_affinity(x)).min() > -1e-12


def test_blocks_are_independent():
    logits, x = batch(30)
    w = torch.block_diag(rbf_affinity(x[:12]), rbf_affinity(x[12:]))
    z = laplacian_optimization(logits, w, tol=0.0)
    a, b = slice(12), slice(12, 30)
    parts = [laplacian_optimization(logits[s], w[s, s], tol=0.0) for s in (a, b)]
    torch.testing.assert_close(z, torch.cat(parts))


def test_a_strong_full_affinity_makes_all_agree():
    logits, _ = batch()
    z = laplacian_optimization(logits, torch.ones(24, 24).double(), weight=50.0)
    assert (z.argmax(1) == z.argmax(1)[0]).all()
    assert z.argmax(1)[0] == logits.softmax(1).mean(0).argmax()


def test_lists_and_matrix_agree():
    logits, x = batch(200, 7, 16)
    from_lists = laplacian_optimization(logits, nearest_neighbors(x))
    torch.testing.assert_close(from_lists, laplacian_optimization(logits, knn_affinity(x)))


@pytest.mark.parametrize("name", AFFINITIES)
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-7), (torch.float32, 1e-4)])
def test_same_numbers_as_the_formulas(name, dtype, atol):
    for seed in range(5):
        logits, x = batch(64, 10, 32, seed, dtype)
        expected = reference(logits, AFFINITIES[name](x))
        torch.testing.assert_close(lame(logits, x, name), expected, atol=atol, rtol=0)


def test_asymmetric_neighbours_may_cycle_and_the_iteration_stops():
    logits, _ = batch(2, 2)
    push_apart = torch.tensor([[0.0, -50.0], [-50.0, 0.0]]).double()
    z, info = laplacian_optimization(0 * logits + 1e-3 * logits, push_apart, return_info=True)
    assert torch.isfinite(z).all() and info.steps <= 100


# --- the wrappers -------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def state(model):
    return copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]


def same_state(a, b):
    return a[1] == b[1] and all(torch.equal(v, b[0][k]) for k, v in a[0].items())


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_left_alone_and_nothing_is_remembered(mode):
    torch.manual_seed(0)
    model, x, other = Net().train(mode), torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 8)
    model.body[0].eval()  # mixed modes stay mixed
    before, adapted = state(model), LAME(model)
    first = adapted(x)
    adapted(other)
    torch.testing.assert_close(adapted(x) + 0, first + 0)
    assert same_state(before, state(model))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_wrapper_is_the_function_on_the_heads_input():
    model, x = Net().eval(), torch.randn(16, 1, 8, 8)
    logits, features = logits_and_features(model, None, x)
    torch.testing.assert_close(features, model.body(x).flatten(1))
    for layer in (None, "head", model.head):
        z = LAME(model, layer, "rbf", 3)(x)
        torch.testing.assert_close(z + 0, lame(logits, features, "rbf", 3))
    torch.testing.assert_close(z.logits.softmax(1), z + 0)
    assert type(z + 0) is torch.Tensor and z.argmax(1).shape == (16,)


def test_a_head_that_is_called_with_a_keyword():
    class Keyword(Net):
        def forward(self, x):
            return self.head(input=self.body(x).flatten(1))

    model, x = Keyword().eval(), torch.randn(8, 1, 8, 8)
    features = logits_and_features(model, None, x)[1]
    torch.testing.assert_close(features, model.body(x).flatten(1))


def test_a_hook_is_removed_when_the_model_fails():
    model = Net()
    with pytest.raises(RuntimeError):
        LAME(model)(torch.randn(4, 3, 8, 8))
    assert not any(m._forward_pre_hooks for m in model.modules()) and model.training


def test_an_own_affinity():
    model, x = Net().eval(), torch.randn(16, 1, 8, 8)
    own = LAME(model, affinity=partial(nearest_neighbors, k=3))(x)
    built_in = LAME(model, k=3)(x)
    torch.testing.assert_close(own.logits, built_in.logits)


def tiny_hf_models():
    t = transformers
    torch.manual_seed(0)
    pixels = {"pixel_values": torch.randn(6, 3, 32, 32)}
    words = {"input_ids": torch.randint(0, 50, (6, 9))}
    resnet = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4)
    vit = t.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8, num_labels=4,
    )
    small = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, num_labels=4,
    )
    return [
        (t.ResNetForImageClassification(resnet), pixels, 16),
        (t.ViTForImageClassification(vit), pixels, 16),
        (t.BertForSequenceClassification(t.BertConfig(**small)), words, 16),
        (t.RobertaForSequenceClassification(t.RobertaConfig(**small)), words, 16),
    ]


@pytest.mark.parametrize("which", range(4), ids=["resnet", "vit", "bert", "roberta"])
def test_hugging_face_classifiers(which):
    model, inputs, dim = tiny_hf_models()[which]
    logits, features = logits_and_features(model, None, **inputs)
    assert features.shape == (6, dim) and logits.shape == (6, 4)
    z = LAME(model, k=2)(**inputs)
    torch.testing.assert_close(z + 0, lame(logits, features, k=2))
    if which < 2:
        assert LAME(model, k=2)(inputs["pixel_values"]).shape == (6, 4)
        assert Tent(model)(**inputs).logits.shape == (6, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_distances(dtype):
    logits, x = batch(64, 7, 32, dtype=torch.float32)
    for name in AFFINITIES:
        expected = lame(logits, x, name)
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(lame(logits, x, name), expected)


class Scaled(Net):
    "Logits that are a multiple of the head's output: the head is still the head."

    def forward(self, x):
        return 3 * super().forward(x)


class Adapted(Net):
    "A head with a low-rank branch, whose last nn.Linear also has one output per class."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x):
        features = self.body(x).flatten(1)
        return self.head(features) + 0.1 * self.b(self.a(features))


def test_a_wrong_guess_of_the_head_is_noticed():
    torch.manual_seed(0)
    x = torch.randn(16, 1, 8, 8)
    assert LAME(Scaled().eval())(x).shape == (16, 5)
    model = Adapted().eval()
    with pytest.raises(ValueError, match="'b' takes .* does not give the logits"):
        LAME(model)(x)
    assert LAME(model, "head")(x).shape == (16, 5)


@pytest.mark.parametrize("method", [AdaBN, Tent, ShotIM, PseudoLabel])
def test_online_methods_change_a_copy_and_can_be_reset(method):
    torch.manual_seed(0)
    model, x = Net().train(), 2 + 3 * torch.randn(32, 1, 8, 8)
    before = state(model)
    adapted = method(model, bn_momentum=0.5, **({} if method is AdaBN else {"lr": 0.5}))
    if method is PseudoLabel:
        adapted.threshold = 0.21  # an untrained net is never sure
    first = adapted(x) + 0
    second = adapted(x) + 0
    assert not torch.allclose(first, second)  # it remembers
    adapted.reset()
    torch.testing.assert_close(adapted(x) + 0, first)
    assert same_state(before, state(model))
    torch.testing.assert_close(first.sum(1), torch.ones(32))


def test_adabn_with_momentum_one_uses_the_batch_statistics():
    model, x = Net().eval(), 2 + 3 * torch.randn(64, 1, 12, 12)
    reference = copy.deepcopy(model)
    reference.body[1].train()
    expected = reference(x).softmax(1)
    torch.testing.assert_close(AdaBN(model)(x) + 0, expected, atol=1e-4, rtol=0)
    still = AdaBN(model, bn_momentum=0.0)(x) + 0
    torch.testing.assert_close(still, model(x).softmax(1))


ONLINE = [AdaBN, Tent, ShotIM, PseudoLabel, partial(Tent, momentum=0.9)]


def online(kind, model, **more):
    more |= {} if kind is AdaBN else {"lr": 0.5}
    return kind(model, bn_momentum=0.3, **more)


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
def test_a_damaged_batch_teaches_nothing(kind, damage):
    "Later answers are those of a method that never saw it; see also the step after it."
    torch.manual_seed(0)
    model, x = Net().eval(), torch.rand(16, 1, 8, 8)
    bad = x.clone()
    bad[0, 0, 0, 0] = damage
    spoilt, clean = online(kind, model), online(kind, model)
    for adapted in (spoilt, clean):
        adapted(x)
    with pytest.raises(ValueError, match="NaN or infinity"):
        spoilt(bad)
    for _ in range(2):
        assert torch.equal(spoilt(x) + 0, clean(x) + 0)


def test_statistics_that_the_logits_do_not_show_are_guarded_too():
    "A branch of the network with BatchNorm, which is not part of the answer."

    class Branch(Net):
        def __init__(self):
            super().__init__()
            self.beside = nn.BatchNorm2d(1)

        def forward(self, x):
            self.beside(x)
            return super().forward(x.nan_to_num(0))

    adapted, x = AdaBN(Branch(), bn_momentum=0.5), torch.rand(8, 1, 8, 8)
    before = adapted.state()[0]
    with pytest.raises(ValueError, match="nothing was learned"):
        adapted(x.index_fill(0, torch.tensor([2]), torch.nan))
    after = adapted.state()[0]
    assert all(torch.equal(v, b[k]) for a, b in zip(after, before, strict=True)
               for k, v in a.items())


def test_a_step_that_explodes_is_taken_back():
    class Explodes(Tent):
        def loss(self, log_p):
            return 1e30 * log_p.sum()

    torch.manual_seed(0)
    adapted, x = Explodes(Net(), lr=1e30, momentum=0.9), 2 + 3 * torch.rand(16, 1, 8, 8)
    before = adapted.state()
    with pytest.raises(ValueError, match="nothing was learned from it.*lower lr"):
        adapted(x)
    assert adapted.state()[1]["state"] == before[1]["state"]
    assert all(torch.equal(v, b[k]) for a, b in zip(adapted.state()[0], before[0], strict=True)
               for k, v in a.items())


def test_an_interrupted_batch_teaches_nothing():
    torch.manual_seed(0)
    adapted, x = AdaBN(Net(), bn_momentum=0.5), torch.rand(8, 1, 8, 8)
    before = adapted.state()[0]

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = adapted.model.head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapted(x)
    hook.remove()
    assert all(torch.equal(v, b[k]) for a, b in zip(adapted.state()[0], before, strict=True)
               for k, v in a.items())
    assert not any(m.training for m in adapted.model.modules())


def dense(**norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, **norm), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("kind", ONLINE)
def test_inference_mode(kind):
    "Inputs, models and wrappers made inside or outside of it: the same answers, still learning."
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    outside = online(kind, dense())
    expected = [outside(x) + 0 for _ in range(2)]
    with torch.inference_mode():
        inside, around = x.clone(), online(kind, dense())
        found = [around(inside) + 0 for _ in range(2)]
        around.reset()
        again = around(inside) + 0
    for a, b in zip([*found, again], [*expected, expected[0]], strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(online(kind, dense())(inside) + 0, expected[0])

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = dense()

        def forward(self, batch, scale):
            return {"logits": scale * self.inner(batch["x"])}

    with torch.inference_mode():
        nested = {"x": x.clone()}, torch.ones(1)
        assert online(kind, Words())(nested[0], scale=nested[1]).shape == (8, 3)


@pytest.mark.parametrize("kind", ONLINE)
def test_a_batch_of_one_is_predicted_without_learning(kind):
    x = torch.randn(8, 4)
    adapted, twin = online(kind, dense()), online(kind, dense())
    adapted(x)
    twin(x)
    found = adapted(x[:1]) + 0
    with torch.no_grad():
        torch.testing.assert_close(found, twin.model.eval()(x[:1]).softmax(1))
    assert torch.equal(adapted(x) + 0, twin(x) + 0)
    with pytest.raises(ValueError, match="N >= 1"):
        adapted(x[:0])
    if kind is not AdaBN:  # a model that stores no statistics can't predict one sample either
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            online(kind, dense(track_running_stats=False))(x[:1])


def test_nothing_to_adapt():
    for kind in (Tent, ShotIM, PseudoLabel):
        with pytest.raises(ValueError, match="nothing to adapt.*affine"):
            kind(dense(affine=False))
    assert AdaBN(dense(affine=False))(torch.randn(8, 4)).shape == (8, 3)
    with pytest.raises(ValueError, match="nothing to adapt.*track_running_stats"):
        AdaBN(dense(track_running_stats=False))
    with pytest.raises(ValueError, match="no BatchNorm or LayerNorm.*nothing to adapt"):
        Tent(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="K >= 2"):
        Tent(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 1)))(torch.randn(8, 4))


def test_half_precision_networks():
    torch.manual_seed(0)
    x = torch.randn(16, 4).bfloat16()
    for kind in ONLINE:
        found = online(kind, dense().bfloat16())(x) + 0
        assert found.dtype == torch.float32 and torch.isfinite(found).all()
    assert LAME(dense().bfloat16().eval(), k=3)(x).dtype == torch.float32


def test_losses_are_the_formulas():
    p = torch.tensor([[0.95, 0.04, 0.01], [0.3, 0.3, 0.4], [0.02, 0.93, 0.05]])
    model, log_p = Net(), p.log()
    entropy = -(p * p.log()).sum(1).mean()
    m = p.mean(0)
    torch.testing.assert_close(Tent(model).loss(log_p), entropy)
    torch.testing.assert_close(ShotIM(model).loss(log_p), entropy + (m * m.log()).sum())
    expected = -(torch.tensor([0.95, 0.93]).log()).mean()
    torch.testing.assert_close(PseudoLabel(model).loss(log_p), expected)
    assert PseudoLabel(model, threshold=0.99).loss(log_p) is None


# --- streams, images, the experiment ------------------------------------------------------------


@pytest.fixture(scope="module")
def full_scale(tmp_path_factory):
    "What the paper's set-up is made of, tiny: hub-style folders of networks, folders of images."
    root, g = tmp_path_factory.mktemp("full"), np.random.default_rng(0)
    torch.manual_seed(0)
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4
    )
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=24, patch_size=8, num_labels=4,
    )
    side = {"height": 24, "width": 24}
    for name, model in (
        ("resnet", transformers.ResNetForImageClassification(resnet)),
        ("vit", transformers.ViTForImageClassification(vit)),
    ):
        model.save_pretrained(root / name)
        transformers.ViTImageProcessor(size=side).save_pretrained(root / name)
    for part, per_class in (("validation", 8), ("test", 10)):
        for label in range(3):
            folder = root / part / str(label)
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = g.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def tiny_full(root, **changes):
    "`FULL`, with the tiny stand-ins."
    stand_ins = {
        "model": str(root / "resnet"),
        "validation_data": f"{root / 'validation'}#train",
        "test_data": f"{root / 'test'}#train", "seeds": (0, 1),
        "validation_seeds": (100,), "batch_size": 8, "workers": 2,
        "validation_streams": ("iid", "class"), "lrs": (0.1,), "adabn_momenta": (0.3,),
    }
    return FULL.replace(**stand_ins | {"device": "cpu"} | changes)


def test_full_scale_path(full_scale, tmp_path, monkeypatch):
    cfg = tiny_full(full_scale, methods=("LAME", "LAME-rbf", "AdaBN", "Tent"), n_test=16)
    run = start_run("lame", cfg, "full", root=tmp_path)
    report = told.experiment(cfg, run)
    tested = report.tables["tested"]
    assert len(tested) == 2 * 4 * 2 * (1 + len(cfg.methods))  # shifts, streams, seeds, methods
    assert tested["accuracy"].between(0, 100).all()
    assert set(report.tables) == {"tuning", "cross", "tested", "change", "ablation"}
    assert set(report.figures) == {"main"} and len(report.claims) == 6
    run.close()
    monkeypatch.setattr(Scenarios, "accuracy", None)  # a resumed run measures nothing again
    again = told.experiment(cfg, start_run("lame", cfg, "full", root=tmp_path, resume=True))
    assert again.tables["tested"].equals(tested)
    assert [c.to_dict() for c in again.claims] == [c.to_dict() for c in report.claims]


def test_full_scale_by_corruption_and_with_a_transformer(full_scale, tmp_path):
    cfg = tiny_full(
        full_scale, streams=("corruption",), shifts=("blur-2+shot_noise-3",),
        methods=("LAME", "Tent"), seeds=(0,), model=str(full_scale / "vit"),
    )
    report = told.experiment(cfg, start_run("lame", cfg, "full", root=tmp_path))
    assert set(report.tables["tested"]["stream"]) == {"corruption"}
    order = Scenarios(cfg, "test").order(cfg.shifts[0], "corruption", 0)
    assert ((order % 2).diff() != 0).sum() == 1  # one corruption after the other


def test_one_seed_and_few_methods(tmp_path):
    "No interval, no crash, and no verdict that needs one."
    cfg = SMALL.replace(
        seeds=(0,), methods=("LAME", "AdaBN"), shifts=("clean",),
        streams=("iid", "class"), validation_shifts=("clean",), n_test=128, n_validation=128,
        adabn_momenta=(1.0,), neighbors=(3,),
    )
    report = launch("lame", cfg, root=tmp_path, progress=False)
    verdicts = {c.text: c.verdict for c in report.claims}
    grouped = next(v for k, v in verdicts.items() if "far better than the source" in k)
    assert grouped == "not decided at this scale" and len(report.claims) == 6
    lame_rows = report.tables["tested"].query("method == 'LAME'")
    assert set(lame_rows["setting"]) == {"affinity=knn, k=3"}


def test_full_builds_its_data(recorded, tmp_path):
    "As on the hub: names, splits, columns, and the true numbers of rows."
    import schemas

    folder = recorded.write("imagenetv2", tmp_path)
    cfg = FULL.replace(test_data=f"{folder}#train")
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    for part in ("validation", "test"):
        scenarios = Scenarios(cfg, part, processor=processor)
        shift, stream = scenarios.names[-1]
        assert scenarios.images(shift, torch.arange(3)).shape == (3, 3, 8, 8)
        assert len(scenarios.order(shift, stream, 0)) <= len(scenarios.labels)
        assert int(scenarios.labels.max()) > 100  # class numbers, not positions in a sorted list
    assert recorded.asked == [FULL.validation_data]
    assert schemas.rows(FULL.validation_data) == FULL.n_validation
    assert FULL.model in schemas.MODELS


def test_images_go_through_the_processor(full_scale):
    dataset, labels = image_data(f"{full_scale / 'test'}#train")
    processor = told.load_network(str(full_scale / "resnet"), device="cpu")[1]
    some = torch.tensor([4, 0, 11, 7])
    expected = processor([dataset[i]["image"] for i in some.tolist()], return_tensors="pt")
    found = prepare(Photos(dataset, labels, processor), "clean", some)
    torch.testing.assert_close(found, expected["pixel_values"], atol=1e-5, rtol=0)
    assert labels.bincount().tolist() == [10, 10, 10]


@pytest.mark.parametrize("mode, value", [
    ("1", 1), ("L", 255), ("P", None), ("RGB", (255,) * 3), ("RGBA", (255,) * 4),
    ("I;16", 65535), ("I", 65535), ("LA", (255, 255)),
])
def test_white_is_white_in_every_mode(mode, value):
    "Through an image processor, whatever the picture's mode: no value is cut off or misread."
    picture = (PIL.Image.new("RGB", (8, 8), "white").quantize(4) if mode == "P"
               else PIL.Image.new(mode, (8, 8), value))
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    rows = datasets.Dataset.from_dict(
        {"image": [datasets.Image().encode_example(picture)], "label": [0]}, features=features)
    found = prepare(Photos(rows, torch.tensor([0]), processor), "clean", torch.tensor([0]))
    assert found.shape == (1, 3, 8, 8) and found.min() == 1


def test_averaging_only_minimises_the_laplacian_energy():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(24, 1, 8, 8)
    z = AveragingOnly(model, "head", k=4)(x)
    logits, features = logits_and_features(model, "head", x)
    w, log_q = knn_affinity(features, 4, symmetric=True), logits.log_softmax(1)
    laplacian = w - torch.diag(w.sum(1))
    at = lame_energy(z, log_q, laplacian)
    for _ in range(20):
        other = (z.log() + 0.05 * torch.randn_like(z)).softmax(1)
        assert lame_energy(other, log_q, laplacian) > at
    assert at < lame_energy(log_q.exp(), log_q, laplacian)
    near = random_neighbors(features, 4)
    assert near.shape == (24, 4) and (near != torch.arange(24)[:, None]).all()


def test_choosing():
    import pandas as pd

    cfg = SMALL.replace(methods=("LAME",), neighbors=(1, 5))
    rows = [("source", 0, "a", 50.0), ("source", 0, "b", 50.0), ("LAME", 0, "a", 60.0),
            ("LAME", 0, "b", 40.0), ("LAME", 1, "a", 55.0), ("LAME", 1, "b", 52.0)]
    tuning = pd.DataFrame([(m, c, "", "clean", s, a) for m, c, s, a in rows],
                          columns=["method", "choice", "setting", "shift", "stream", "accuracy"])
    assert chosen(cfg, tuning) == {"source": {}, "LAME": {"affinity": "knn", "k": 5}}
    cross = cross_scenarios(tuning).pivot(index="tuned_on", columns="scenario", values="change")
    assert cross.loc["clean, a"].tolist() == [10, -10] and cross.loc["clean, b"].tolist() == [5, 2]


def test_a_method_that_learns_starts_anew_in_every_stream():
    cfg = SMALL.replace(shifts=("rotation-3",), streams=("iid",), n_test=128)
    adapted = adapt(recipes.SmallCNN().eval(), None, 0, "Tent", lr=1.0, bn_momentum=1.0)
    once, twice = (Scenarios(cfg, "test").accuracy(adapted) for _ in range(2))
    assert once == twice == Scenarios(cfg, "test", [0, 0]).accuracy(adapted)


def test_full_is_the_papers_set_up():
    assert FULL.batch_size == 64 and len(FULL.seeds) == 10 and len(FULL.streams) == 4
    assert FULL.neighbors == (1, 3, 5)
    assert all(len(candidates(FULL)[m]) >= 3 for m in ("LAME", "AdaBN", "Tent", "pseudo-label"))
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4
    )
    model = transformers.ResNetForImageClassification(config)
    first_stage = AdaBN(model, layers=FULL.adabn_layers).norms
    assert 0 < len(first_stage) < len(AdaBN(model).norms)
    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=10))
        x = torch.empty(2, 3, 224, 224)
    assert cost.forward_flops(model, x, 2) == pytest.approx(8.2e9, rel=0.02)


# --- what must be refused -----------------------------------------------------------------------

L, X = batch(8, 3, 4)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (ValueError, "same batch", lambda: lame(L, X[:7])),
        (ValueError, "N, d", lambda: lame(L, X[:, 0])),
        (ValueError, "N >= 1", lambda: lame(L[:0], X[:0], "linear")),
        (ValueError, "N >= 1", lambda: laplacian_optimization(L[:0], torch.zeros(0, 0))),
        (ValueError, "K >= 2", lambda: lame(L[:, :1], X)),
        (ValueError, "NaN", lambda: lame(L.index_fill(0, torch.tensor([1]), torch.nan), X)),
        (ValueError, "1 of 8", lambda: lame(L, X.index_fill(0, torch.tensor([1]), torch.inf))),
        (ValueError, "at least one", lambda: lame(L, X, k=0)),
        (ValueError, "at least one", lambda: knn_affinity(X, -1)),
        (TypeError, "int", lambda: knn_affinity(X, 2.5)),
        (ValueError, "k >= 2", lambda: rbf_affinity(X, 1)),
        (ValueError, "'knn'", lambda: lame(L, X, "cosine")),
        (ValueError, ">= 0", lambda: lame(L, X, weight=-1.0)),
        (ValueError, ">= 0", lambda: lame(L, X, weight=float("nan"))),
        (ValueError, "at least one update", lambda: lame(L, X, max_steps=0)),
        (TypeError, "tensor", lambda: lame(L.numpy(), X)),
        (TypeError, "tensor", lambda: knn_affinity([[1.0]])),
        (TypeError, "tensor", lambda: laplacian_optimization([[1.0]], X)),
        (ValueError, r"\[8, 8\]", lambda: laplacian_optimization(L, X)),
        (ValueError, "device|meta", lambda: laplacian_optimization(L, X.to("meta")[:, :1])),
        (ValueError, "NaN", lambda: laplacian_optimization(L, torch.full((8, 8), torch.nan))),
        (TypeError, "int64", lambda: laplacian_optimization(L, torch.zeros(8, 2).int())),
        (TypeError, "float tensor", lambda: laplacian_optimization(L, None)),
        (ValueError, "0 to 7", lambda: laplacian_optimization(L, torch.full((8, 2), 8))),
        (ValueError, "8 neighbour", lambda: laplacian_optimization(L, torch.zeros(3, 2).long())),
        (ValueError, "W as float", lambda: laplacian_optimization(L, torch.eye(8).long())),
        (ValueError, "no nn.Linear", lambda: LAME(nn.Conv2d(1, 1, 1))),
        (ValueError, "is not a layer", lambda: LAME(Net(), "fc")),
        (ValueError, "could be any", lambda: LAME(nn.ModuleDict({"a": Net(), "b": Net()}), "head")),
        (ValueError, "'knn'", lambda: LAME(Net(), affinity="cosine")),
        (ValueError, "give the layer", lambda: LAME(Net(), "body.0")(torch.randn(4, 1, 8, 8))),
        (ValueError, "no BatchNorm", lambda: AdaBN(nn.Linear(2, 2))),
        (ValueError, "LAME must be one", lambda: Config(methods=("Tent",))),
        ((TypeError, ValueError), "methods", lambda: SMALL.replace(methods=("LAME", "TENT"))),
        (ValueError, "out of range", lambda: Config(neighbors=(0, 3))),
        (ValueError, "corruptions are", lambda: Config(shifts=("fog-2",))),
        (ValueError, "corruptions are", lambda: Config(validation_shifts=("blur-6",))),
        (ValueError, "add one of", lambda: Scenarios(Config(test_data="mnist5k#dev"), "test")),
        (ValueError, "bn_momentum", lambda: AdaBN(Net(), bn_momentum=-0.1)),
        (ValueError, "stem", lambda: Tent(Net(), layers="stem")),
        (ValueError, "share", lambda: AdaBN(Net(), bn_momentum=2.0)),
        (ValueError, "step size", lambda: Tent(Net(), lr=0.0)),
        (ValueError, "between 0 and 1", lambda: PseudoLabel(Net(), threshold=1.5)),
    ],
)
def test_bad_input(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_warnings():
    with pytest.warns(UserWarning, match="7 at most"):
        assert (knn_affinity(X, 8).sum(1) == 7).all()
    with pytest.warns(UserWarning, match="probabilities"):
        laplacian_optimization(L.softmax(1), knn_affinity(X))
    with warnings.catch_warnings():  # short last batches and log-probabilities are normal
        warnings.simplefilter("error")
        lame(L[:3].log_softmax(1), X[:3])


def test_a_layer_that_is_not_run_is_named():
    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(6, 5)

    with pytest.raises(ValueError, match="'spare' was not run"):
        LAME(Unused())(torch.randn(4, 1, 8, 8))
    assert LAME(Unused(), "head")(torch.randn(4, 1, 8, 8)).shape == (4, 5)
