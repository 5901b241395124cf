"""LAME: what must hold, what must be refused, and the full-scale path on tiny models."""

import copy
import json
import warnings
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptlab import experiment as core
from adaptlab.testtime import lame as lesson
from adaptlab.testtime.lame import (
    LAME,
    SMALL,
    AdaBN,
    Config,
    MergedClasses,
    PseudoLabel,
    ShotIM,
    Tent,
    estimate,
    knn_affinity,
    lame,
    lame_energy,
    laplacian_optimization,
    linear_affinity,
    logits_and_features,
    nearest_neighbors,
    rbf_affinity,
    stream_order,
    zipf_shares,
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
    z, info = laplacian_optimization(logits, w, weight, 5000, 1e-15, return_info=True)
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


def test_a_hook_is_removed_when_the_model_fails():
    model = Net()
    with pytest.raises(RuntimeError):
        LAME(model)(torch.randn(4, 3, 8, 8))
    assert not any(m._forward_pre_hooks for m in model.modules()) and model.training


def test_an_own_affinity():
    model, x = Net().eval(), torch.randn(16, 1, 8, 8)
    own = LAME(model, affinity=partial(knn_affinity, k=3, symmetric=True))(x)
    built_in = LAME(model, k=3, symmetric=True)(x)
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


@pytest.mark.parametrize("seed", range(5))
def test_zipf_shares(seed):
    for n_classes in (2, 10, 1000):
        shares = zipf_shares(n_classes, seed=seed)
        assert shares.shape == (n_classes,) and (shares > 0).all()
        torch.testing.assert_close(shares.sum(), torch.tensor(1.0, dtype=torch.float64))
        assert shares.sort().values[-max(1, n_classes // 10) :].sum() < 0.9
    assert torch.equal(zipf_shares(10, seed=seed), zipf_shares(10, seed=seed))
    strict = zipf_shares(100, top=0.2, most=0.8, seed=seed)  # the paper's rule at validation
    assert strict.sort().values[-20:].sum() < 0.8


def test_streams():
    labels = torch.arange(6).repeat(20)
    for n in (None, 50):
        iid = stream_order(labels, "iid", n, seed=1)
        grouped = stream_order(labels, "class", n, seed=1)
        assert set(iid.tolist()) == set(grouped.tolist()) and len(iid) == (n or 120)
        assert (labels[grouped].diff() != 0).sum() == 5
    video = torch.arange(120) // 30
    by_video = stream_order(labels, "video", seed=2, groups={"video": video})
    assert (video[by_video].diff() != 0).sum() == 3
    shifted = stream_order(labels, "iid+zipf", seed=3)
    assert labels[shifted].bincount(minlength=6).max() > 2 * 20
    sparse = torch.tensor([0, 7] * 20)  # classes that do not occur get no share
    assert set(sparse[stream_order(sparse, "class+zipf")].tolist()) <= {0, 7}


def test_merged_classes_and_their_wrappers():
    torch.manual_seed(0)
    model, x = Net(6).eval(), torch.randn(8, 1, 8, 8)
    merged = MergedClasses(model, [0, 0, 1, 2, -1, 1])
    p = model(x)[:, [0, 1, 2, 3, 5]].softmax(1)
    expected = torch.stack([p[:, :2].sum(1), p[:, 2] + p[:, 4], p[:, 3]], 1)
    torch.testing.assert_close(merged(x).exp(), expected)
    assert LAME(merged, "model.head", k=2)(x).shape == (8, 3)
    assert Tent(merged)(x).shape == (8, 3)


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
    rows = [f"{i}.png,{i % 3},clip{i // 8}" for i in range(24)]
    (root / "videos").mkdir()
    for i in range(24):
        PIL.Image.fromarray(g.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(
            root / "videos" / f"{i}.png"
        )
    (root / "videos" / "metadata.csv").write_text("\n".join(["file_name,label,video", *rows]))
    (root / "map.json").write_text(json.dumps([0, 1, 2, 2]))
    return root


def tiny_full(root, **changes):
    "`FULL`, with the tiny stand-ins."
    stand_ins = {
        "model": str(root / "resnet"), "networks": (str(root / "vit"),),
        "class_map": str(root / "map.json"), "validation_data": str(root / "validation"),
        "validation_split": "train", "test_data": str(root / "test"), "seeds": (0, 1),
        "validation_seeds": (100,), "batch_size": 8, "batch_sizes": (4, 8), "workers": 2,
        "validation_streams": ("iid", "class"), "lrs": (0.1,), "adabn_momenta": (0.3,),
    }
    return lesson.FULL.replace(**stand_ins | {"device": "cpu"} | changes)


def test_full_scale_path(full_scale, tmp_path, monkeypatch):
    cfg = tiny_full(full_scale)
    run = core.start_run("lame", cfg, "full", root=tmp_path)
    report = lesson.experiment(cfg, run)
    tested = report.tables["tested"]
    assert len(tested) == 2 * 4 * 2 * (1 + len(cfg.methods))  # shifts, streams, seeds, methods
    assert tested["accuracy"].between(0, 100).all()
    assert set(report.tables["networks"]["network"]) == {cfg.model, *cfg.networks}
    assert {"change", "cross", "affinities", "batch_size", "energy"} == set(report.figures)
    assert len(report.claims) >= 8
    monkeypatch.setattr(lesson, "stream_accuracy", None)  # a resumed run computes nothing again
    bench = lesson.Bench(cfg, core.Run(run.folder, "lame", "full"), "test")
    again = lesson.run_scenarios(dict.fromkeys(cfg.seeds, bench), cfg.shifts, cfg.streams, {})
    assert again.equals(tested)


def test_full_scale_on_videos_and_with_a_transformer(full_scale, tmp_path):
    cfg = tiny_full(
        full_scale, test_data=str(full_scale / "videos"), streams=("video", "corruption"),
        shifts=("blur-2+shot_noise-3",), methods=("LAME", "Tent"),
        model=str(full_scale / "vit"), networks=(),
    )
    report = lesson.experiment(cfg, core.start_run("lame", cfg, "full", root=tmp_path))
    assert set(report.tables["tested"]["stream"]) == {"video", "corruption"}
    bench = lesson.Bench(cfg, core.Run(tmp_path, "lame"), "test")
    order = bench.order(cfg.shifts[0], "corruption", 0)
    assert ((order % 2).diff() != 0).sum() == 1  # one corruption after the other


def test_images_go_through_the_processor(full_scale):
    dataset = lesson.image_data(str(full_scale / "test"), "train")
    processor = lesson.load_network(str(full_scale / "resnet"), device="cpu")[1]
    images = lesson.ShiftedImages(dataset, processor=processor, in_memory=False, workers=3)
    some = torch.tensor([4, 0, 11, 7])
    expected = processor([dataset[i]["image"] for i in some.tolist()], return_tensors="pt")
    torch.testing.assert_close(images[some], expected["pixel_values"], atol=1e-5, rtol=0)
    labels, groups = lesson.labels_and_groups(dataset)
    assert labels.bincount().tolist() == [10, 10, 10] and not groups


def test_estimate_counts_what_is_run():
    with torch.device("meta"):
        config = transformers.ResNetConfig(num_labels=1000)
        model = transformers.ResNetForImageClassification(config)
    n = {"validation": 50_000, "test": 10_000}
    everything = estimate(lesson.FULL, model, n)
    alone = estimate(lesson.FULL.replace(methods=("LAME",)), model, n)
    assert alone["forward passes, millions"] == pytest.approx(2 * 0.05 + 2 * 0.01)
    assert everything["forward passes, millions"] > 100 * alone["forward passes, millions"]
    assert everything["GFLOPs per image"] == pytest.approx(8.2, abs=0.1)
    assert alone["memory of the device, GB"] < 1 < everything["memory of the device, GB"]
    doubled = estimate(lesson.FULL.replace(batch_size=128), model, n)
    assert doubled["memory of the device, GB"] > everything["memory of the device, GB"] + 4


def test_full_is_the_papers_set_up():
    full = lesson.FULL
    assert full.batch_size == 64 and len(full.seeds) == 10 and len(full.streams) == 4
    assert len(full.networks) + 1 == 5 and full.neighbors == (1, 3, 5)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4
    )
    model = transformers.ResNetForImageClassification(config)
    first_stage = AdaBN(model, layers=full.adabn_layers).norms
    every_stage = AdaBN(model).norms
    assert 0 < len(first_stage) < len(every_stage)


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
        (ValueError, "NaN", lambda: laplacian_optimization(L, torch.full((8, 8), torch.nan))),
        (TypeError, "int64", lambda: laplacian_optimization(L, torch.zeros(8, 2).int())),
        (TypeError, "float tensor", lambda: laplacian_optimization(L, None)),
        (ValueError, "0 to 7", lambda: laplacian_optimization(L, torch.full((8, 2), 8))),
        (ValueError, "3 neighbour", lambda: laplacian_optimization(L, torch.zeros(3, 2).long())),
        (ValueError, "no nn.Linear", lambda: LAME(nn.Conv2d(1, 1, 1))),
        (ValueError, "is not a layer", lambda: LAME(Net(), "fc")),
        (ValueError, "could be any", lambda: LAME(nn.ModuleDict({"a": Net(), "b": Net()}), "head")),
        (ValueError, "'knn'", lambda: LAME(Net(), affinity="cosine")),
        (ValueError, "give the layer", lambda: LAME(Net(), "body.0")(torch.randn(4, 1, 8, 8))),
        (ValueError, "no BatchNorm", lambda: AdaBN(nn.Linear(2, 2))),
        (ValueError, "LAME must be one", lambda: Config(methods=("Tent",))),
        ((TypeError, ValueError), "methods", lambda: SMALL.replace(methods=("LAME", "TENT"))),
        (ValueError, "out of range", lambda: Config(neighbors=(0, 3))),
        (ValueError, "corruptions are", lambda: lesson.ShiftedImages([], "fog-2")),
        (ValueError, "corruptions are", lambda: lesson.ShiftedImages([], "blur-6")),
        (ValueError, "stream 'sorted'", lambda: stream_order(torch.arange(4), "sorted")),
        (ValueError, "stream 'iid.pareto'", lambda: stream_order(torch.arange(4), "iid+pareto")),
        (ValueError, "choose one of", lambda: lesson.image_data("mnist5k", "dev")),
        (ValueError, "raise `most`", lambda: zipf_shares(10, most=0.1)),
        (ValueError, "-1", lambda: MergedClasses(Net(), [0, -2, 1])),
        (ValueError, "3 entries", lambda: MergedClasses(Net(), [0, 1, 1])(torch.ones(2, 1, 8, 8))),
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
