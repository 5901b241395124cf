"""The limits of LoRA: gradients through attention, their cost, norms, and the full-scale path."""

import json
import math

import pandas as pd
import pytest
import torch
import two_processes
from torch.utils._python_dispatch import TorchDispatchMode

from adaptlab import recipes
from adaptlab.bench.runs import launch, start_run
from adaptlab.evaluate import count_flops
from adaptlab.experiments import lora_limits as told
from adaptlab.experiments.lora_limits import FULL, SMALL, experiment, random_problem
from adaptlab.lowrank import lora_limits as limits
from adaptlab.lowrank.lora_limits import (
    LowRankSoftmaxAttention,
    feature_count,
    feature_exponent,
    growth_exponent,
    hadamard_factors,
    lora_gradient_exact,
    lora_gradient_fast,
    lowrank_softmax,
    norm_bound,
    phase_report,
    required_degree,
    rotate,
    taylor_features,
    tight_radius,
    watch_attention,
)
from adaptlab.train import Training

attend = torch.nn.functional.scaled_dot_product_attention


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=g, dtype=torch.float64) - 0.5


def wide(lq=30, lk=30, batch=(), m=5, d=4, dv=3, r=2):
    "Inputs with every size of its own."
    lengths, widths = {"Q": lq, "K": lk, "V": lk}, {"Q": d, "K": d, "V": dv}
    X = [rand(*batch, n, m, seed=i) for i, n in enumerate(lengths.values())]
    W = {n: rand(m, w, seed=5) for n, w in widths.items()}
    A = {n: rand(r, w, seed=6 + i) for i, (n, w) in enumerate(widths.items())}
    B = {n: rand(m, r, seed=9) for n in widths}
    return dict(zip(("Xq", "Xk", "Xv"), X, strict=True), Y=rand(*batch, lq, dv, seed=12), W=W, A=A,
                B=B, alpha=1.5, beta=0.4)


def by_autograd(Xq, Xk, Xv, Y, W, A, B, alpha, beta, adapt, causal=False, rope=None):
    A, B = ({n: t.clone().requires_grad_() for n, t in g.items()} for g in (A, B))
    Q, K, H = (x @ (W[n] + (alpha / len(A[n]) * B[n] @ A[n] if n in A else 0))
               for n, x in zip("QKV", (Xq, Xk, Xv), strict=True))
    out = attend(rotate(Q, rope), rotate(K, rope), H, scale=beta, is_causal=causal)
    loss = 0.5 * (out - Y).square().sum((-1, -2)).mean()
    loss.backward()
    return {n: A[n].grad for n in adapt}, {n: B[n].grad for n in adapt}, float(loss.detach())


def taylor_exp(S, degree):
    return sum(S**t / float(math.factorial(t)) for t in range(degree + 1))


def rope_of(length, d):
    angle = torch.outer(torch.arange(length), 0.3 ** torch.arange(d // 2)).repeat(1, 2).double()
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("options", [
    {}, {"adapt": ("Q", "K", "V")}, {"adapt": ("K",)}, {"causal": True, "adapt": ("Q", "K", "V")},
    {"rope": rope_of(30, 4), "adapt": ("K", "Q")},
    {"rope": rope_of(30, 4), "causal": True, "adapt": ("Q", "K", "V")}], ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_both_gradients_are_those_of_autograd(options, batch):
    given = wide(batch=batch)
    options = {"adapt": ("Q", "V")} | options
    dA, dB, loss = by_autograd(**given, **options)
    exact = lora_gradient_exact(**given, **options)
    fast = lora_gradient_fast(**given, **options, degree=10, chunk=7)
    for found, tolerance in ((exact, 1e-12), (fast, 1e-9)):
        torch.testing.assert_close((found.dA, found.dB), (dA, dB), rtol=0, atol=tolerance)
        assert found.info["loss"] == pytest.approx(loss, rel=1e-6)


def test_at_the_start_only_b_has_a_gradient():
    start = wide()
    start["B"] = {n: torch.zeros_like(t) for n, t in start["B"].items()}
    for work in (lora_gradient_exact, lora_gradient_fast):
        found = work(**start, adapt=("Q", "K", "V"))
        assert all(t.any() for t in found.dB.values())
        assert not any(t.any() for t in found.dA.values())


def test_cross_attention_and_adapters_that_act_but_are_not_asked_for():
    given = wide(lq=12, lk=40)
    dA, dB, _ = by_autograd(**given, adapt=("K",))
    fast = lora_gradient_fast(**given, adapt=("K",), degree=10)
    torch.testing.assert_close((fast.dA, fast.dB), (dA, dB), rtol=0, atol=1e-9)
    for group in ("A", "B"):  # partial: the keys' weight is the frozen one
        given[group] = {n: t for n, t in given[group].items() if n != "K"}
    dA, dB, _ = by_autograd(**given, adapt=("Q", "V"))
    exact = lora_gradient_exact(**given)
    torch.testing.assert_close((exact.dA, exact.dB), (dA, dB), rtol=0, atol=1e-12)


def test_causal_over_many_blocks():
    given = random_problem(300, 2, 0.7)
    exact = lora_gradient_exact(**given, causal=True)
    fast = lora_gradient_fast(**given, causal=True, degree=10)
    assert told.relative_error(fast, exact) < 1e-9


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_lower_precision(dtype, tolerance):
    given = random_problem(64, 2, 0.7)
    low = {k: v.to(dtype) if isinstance(v, torch.Tensor) else
           {n: t.to(dtype) for n, t in v.items()} if isinstance(v, dict) else v
           for k, v in given.items()}
    exact, found = lora_gradient_exact(**given), lora_gradient_fast(**low, degree=6)
    assert all(t.dtype == dtype for t in (*found.dA.values(), *found.dB.values()))
    assert told.relative_error(found, exact) < tolerance


def test_autocast_does_not_round_the_sums():
    given = random_problem(64, 2, 0.7, dtype=torch.float32)
    q = (rand(2, 50, 3) * 2).float().requires_grad_()
    layer = LowRankSoftmaxAttention(8)
    found = [lora_gradient_exact(**given), lora_gradient_fast(**given, degree=6)]
    out = layer(q, q, q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = [lora_gradient_exact(**given), lora_gradient_fast(**given, degree=6)]
        same = layer(q, q, q)
        grad = torch.autograd.grad(same.square().sum(), q)
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close((one.dA, one.dB), (other.dA, other.dB), rtol=0, atol=0)
    torch.testing.assert_close(same, out, rtol=0, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(out.square().sum(), q), rtol=0, atol=0)


def test_parameters_and_gradients_are_left_alone():
    given = random_problem(20, 2, 0.5)
    for group in ("A", "B"):
        given[group] = {n: torch.nn.Parameter(t) for n, t in given[group].items()}
    for work in (lora_gradient_exact, lora_gradient_fast):
        found = work(**given)
        assert not found.dA["Q"].requires_grad and given["A"]["Q"].grad is None


class Largest(TorchDispatchMode):
    "The most numbers that any tensor had."

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_no_large_matrix_and_linear_work(causal):
    "Nothing of L x L, nothing of L x kd; operations grow like L."
    flops = []
    for length in (1024, 2048):
        given = random_problem(length, 3, 0.5, dtype=torch.float32)
        with Largest() as seen:
            lora_gradient_fast(**given, degree=4, causal=causal, chunk=256)
        assert seen.numel <= max(length * 3 * 6, 256 * 35) < length * feature_count(3, 4) * 3 / 4
        flops.append(count_flops(lambda g=given: lora_gradient_fast(**g, degree=4, causal=causal)))
        exact = count_flops(lambda g=given: lora_gradient_exact(**g))
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.01) and flops[1] < exact


@pytest.mark.parametrize("d, degree", [(1, 7), (2, 5), (3, 4), (6, 2), (4, 0)])
def test_features(d, degree):
    u, v = rand(5, d), rand(6, d, seed=1)
    U, V = taylor_features(u, degree), taylor_features(v, degree)
    assert U.shape == (5, math.comb(d + degree, degree))
    torch.testing.assert_close(U @ V.T, taylor_exp(u @ v.T, degree))


def test_even_degrees_are_positive_and_odd_ones_are_not():
    line, one = torch.linspace(-100, 100, 20_001).double()[:, None], torch.ones(1).double()
    for g in range(0, 12):
        values = taylor_features(line, g) @ taylor_features(one, g)
        assert bool((values > 0).all()) == (g % 2 == 0)


def test_softmax_factors():
    q, k = rand(9, 3), rand(11, 3, seed=1)
    for g in (0, 2, 4, 6):
        U, V = lowrank_softmax(q, k, g)
        torch.testing.assert_close((U @ V.T).sum(1), torch.ones(9).double())
    torch.testing.assert_close(U @ V.T, (q @ k.T).softmax(1), rtol=1e-5, atol=0)
    U, V = lowrank_softmax(q, k, 0)
    torch.testing.assert_close(U @ V.T, torch.full((9, 11), 1 / 11).double())
    # the chain of the paper: p from factors
    H, c = rand(11, 2, seed=2), rand(9, 2, seed=3)
    U, V = lowrank_softmax(q, k, 8)
    left, right = hadamard_factors(U, V, c, H)
    f = (q @ k.T).softmax(1)
    torch.testing.assert_close(left @ right.T, f * (c @ H.T), rtol=1e-6, atol=1e-9)
    assert left.shape == (9, feature_count(3, 8) * 2)


def test_a_constant_on_all_keys_changes_no_gradient():
    given = wide()
    given["Xk"] = torch.cat([given["Xk"], torch.ones(30, 1).double()], 1)
    given["B"]["K"] = torch.cat([given["B"]["K"], torch.zeros(1, 2).double()])
    frozen, found = given["W"]["K"], []
    for shift in (0.0, 3.0):
        given["W"] = given["W"] | {"K": torch.cat([frozen, torch.full((1, 4), shift).double()])}
        exact = lora_gradient_exact(**given, adapt=("Q", "V"))
        found.append((exact, lora_gradient_fast(**given, adapt=("Q", "V"), degree=4),
                      lora_gradient_fast(**given, adapt=("Q", "V"), degree=4, center_keys=False)))
    for one, other in list(zip(*found, strict=True))[:2]:
        assert told.relative_error(other, one) < 1e-10
    assert told.relative_error(found[1][2], found[0][2]) > 1e-3
    assert found[1][1].info["radius"] < found[1][2].info["radius"] / 2


def test_small_norms():
    "Gradients of Q and K shrink with Gamma; error with the degree."
    sizes = []
    for size in (1e-2, 1e-3):
        exact = lora_gradient_exact(**random_problem(40, 2, size))
        sizes.append(float(exact.dA["V"].abs().max() / exact.dB["Q"].abs().max()))
    assert sizes[1] == pytest.approx(10 * sizes[0], rel=0.05)
    given = random_problem(64, 2, 1.0)
    exact = lora_gradient_exact(**given)
    errors = [told.relative_error(lora_gradient_fast(**given, degree=g), exact)
              for g in (2, 4, 6, 8)]
    assert all(b < a / 10 for a, b in zip(errors, errors[1:], strict=False))


def test_the_tolerance_is_kept():
    q, k = rand(50, 3) * 3, rand(50, 3, seed=1) * 3
    for tol in (0.1, 1e-3, 1e-8):
        g = required_degree(tight_radius(q, k), tol)
        assert ((taylor_exp(q @ k.T, g) / (q @ k.T).exp() - 1).abs() <= tol).all()
        if g >= 2:  # and it is the smallest that the bound allows
            R = tight_radius(q, k)
            assert R ** (g - 1) / math.factorial(g - 1) * math.exp(R) > tol
    info = lora_gradient_fast(**random_problem(40, 2, 0.8), tol=1e-5).info
    assert info["error"] <= 1e-5 and info["features"] == feature_count(2, info["degree"])
    assert required_degree(0.0, 1e-9) == 0


def test_norm_bounds():
    X, W, A, B = rand(20, 5), rand(5, 4, seed=1), rand(2, 4, seed=2), rand(5, 2, seed=3)
    combined, split, operator = (norm_bound(X, W, A, B, 3.0, k)
                                 for k in ("combined", "split", "operator"))
    assert combined == pytest.approx(float((X @ (W + 1.5 * B @ A)).abs().max()))
    assert combined <= split and combined <= operator
    frozen = float((X @ W).abs().max())
    assert norm_bound(X, W, A, B, 6.0, "split") - frozen == pytest.approx(2 * (split - frozen))


def test_exponents():
    lengths = [2**8, 2**16, 2**30]
    assert growth_exponent(lengths, [3 * math.log(n) ** 0.7 for n in lengths]) == pytest.approx(0.7)
    far = [2**1000, 2**3000]
    for s, sign in ((0.0, -1), (0.25, -1), (0.75, 1)):
        low, high = feature_exponent(lambda n, s=s: math.log(n) ** s, far)
        assert (high - low) * sign > 0
    low, high = feature_exponent(lambda n: math.log(n) ** 0.5, far)
    assert abs(high - low) < 0.01


def test_attention_layer_against_torch():
    Q, K, V = (rand(2, 3, 150, 4, seed=i).requires_grad_() for i in range(3))
    for causal in (False, True):
        layer = LowRankSoftmaxAttention(degree=10, causal=causal)
        torch.testing.assert_close(layer(Q, K, V), attend(Q, K, V, is_causal=causal))
        ours = torch.autograd.grad(layer(Q, K, V).sin().sum(), (Q, K, V))
        theirs = torch.autograd.grad(attend(Q, K, V, is_causal=causal).sin().sum(), (Q, K, V))
        torch.testing.assert_close(ours, theirs)
    half = LowRankSoftmaxAttention()(Q.bfloat16(), K.bfloat16(), V.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), attend(Q, K, V), rtol=0.05, atol=0.02)


def test_report_of_matrices_and_of_a_model():
    Q, K, V = torch.zeros(2, 8, 4), torch.zeros(1, 8, 4), torch.ones(1, 8, 4)
    Q[0, 5, 1], Q[1, 2, 0], K[0, 0, 0] = -6.0, 3.0, 2.0
    rows = phase_report((Q, K, V), [2, 4, 8], beta=0.5)
    assert [r["gamma_q"] for r in rows] == [6, 3] and rows[0]["gamma_k"] == 2
    assert rows[0]["radius"] == 6 and rows[1]["radius"] == 3
    assert rows[1]["ratio"] == pytest.approx(3 / math.sqrt(math.log(8)))
    assert rows[0]["exponent"] == pytest.approx(growth_exponent([2, 4, 8], [2, 2, 6]))
    model, ids = recipes.tiny_llama(), torch.arange(40)[None]
    values = []
    hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(
        lambda m, i, o: values.append(o[0].detach()))
    rows = phase_report(model, [10, 20, 40], ids)
    hook.remove()
    heads = values[0].unflatten(-1, (2, -1)).abs().amax((0, 2))  # two heads of values, four queries
    found = [r["gamma_v"] for r in rows if r["layer"] == 1]
    assert found == pytest.approx([float(heads[i // 2]) for i in range(4)])
    assert not model.training and len(rows) == 8


def test_attention_that_cannot_be_watched():
    with pytest.raises(ValueError, match="never calls"):
        watch_attention(torch.nn.Linear(2, 2), torch.zeros(1, 2), lambda *seen: None)


given = wide()
q8 = torch.zeros(2, 8, 4)


@pytest.mark.parametrize("call, words", [
    (lambda: lora_gradient_fast(**given, degree=3), "even number"),
    (lambda: lora_gradient_fast(**given, degree=-2), "even number"),
    (lambda: lowrank_softmax(rand(3, 2), rand(3, 2), 5), "even number"),
    (lambda: taylor_features(rand(3, 2), -1), "degree"),
    (lambda: lora_gradient_fast(**given, degree=2, mask=torch.ones(30, 30)), "mask"),
    (lambda: LowRankSoftmaxAttention(2)(q8, q8, q8, mask=q8), "mask"),
    (lambda: LowRankSoftmaxAttention(2, causal=True)(q8, q8[:, :3], q8[:, :3]), "causal"),
    (lambda: LowRankSoftmaxAttention(2, beta=0.0), "beta"),
    (lambda: lora_gradient_fast(**given, degree=2, chunk=0), "chunk"),
    (lambda: lora_gradient_fast(**given, tol=0.0), "eps"),
    (lambda: required_degree(1.0, 1.0), "eps"),
    (lambda: required_degree(math.inf, 0.1), "radius"),
    (lambda: lowrank_softmax(rand(3, 64), rand(3, 64), 4), r"C\(68, 4\) = 814,385"),
    (lambda: lora_gradient_exact(**given | {"beta": 0.0}), "beta"),
    (lambda: lora_gradient_exact(**given | {"Xk": rand(30, 6)}), "widths"),
    (lambda: lora_gradient_exact(**given | {"Xk": rand(29, 5)}), "values"),
    (lambda: lora_gradient_exact(**wide(lq=9), causal=True), "causal"),
    (lambda: lora_gradient_exact(**given | {"Y": rand(30, 4)}), "Y"),
    (lambda: lora_gradient_exact(**given | {"Xq": given["Xq"] / 0}), "X of Q"),
    (lambda: lora_gradient_exact(**given | {"A": given["A"] | {"V": given["A"]["V"] * math.nan}}),
     "A of V"),
    (lambda: lora_gradient_exact(**given | {"alpha": math.nan}), "alpha"),
    (lambda: lora_gradient_fast(**given | {"W": {"Q": given["W"]["Q"]}}), "weights of Q, K and V"),
    (lambda: lora_gradient_fast(**given | {"Xq": given["Xq"][None].repeat(2, 1, 1)}), "leading"),
    (lambda: lora_gradient_exact(**given | {"Xk": rand(0, 5), "Xv": rand(0, 5)}), "empty"),
    (lambda: lora_gradient_exact(**given, rope=rope_of(29, 4)), "rope"),
    (lambda: rotate(rand(7, 3), (rand(7, 3), rand(7, 3))), "even d"),
    (lambda: lowrank_softmax(rand(3, 2), rand(3, 4), 2), "of the same width"),
    (lambda: lowrank_softmax(rand(3, 2) * 1e200, rand(3, 2) * 1e200, 8), "overflow"),
    (lambda: LowRankSoftmaxAttention(2)(q8, q8[:1], q8[:1]), "repeat keys"),
    (lambda: LowRankSoftmaxAttention(2)(q8, q8, q8[:, :4]), "of the same length"),
    (lambda: lora_gradient_exact(**given, adapt=("Q", "O")), "adapt"),
    (lambda: lora_gradient_exact(**given, adapt=()), "adapt"),
    (lambda: lora_gradient_exact(**given | {"A": given["A"] | {"Q": rand(0, 4)}, "B": given["B"]
                                            | {"Q": rand(5, 0)}}), "r >= 1"),
    (lambda: norm_bound(rand(3, 2), rand(2, 3), rand(1, 3), rand(2, 1), 1.0, "sum"), "kind"),
    (lambda: norm_bound(rand(3, 2) / 0, rand(2, 3), rand(1, 3), rand(2, 1), 1.0), "finite"),
    (lambda: growth_exponent([8, 16], [1.0, 2.0]), "three different"),
    (lambda: growth_exponent([1, 8, 16], [1.0, 2.0, 3.0]), "three different"),
    (lambda: feature_exponent(lambda n: 1.0, [1]), "L >= 2"),
    (lambda: phase_report((q8, q8, q8), [2, 4]), "three or more"),
    (lambda: phase_report((q8, q8, q8), [2, 4, 9]), "none above 8"),
    (lambda: phase_report(recipes.tiny_llama(), [2, 4, 8]), "ids"),
])
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_overflow_is_told():
    q = torch.full((3, 2), 300.0)
    with pytest.raises(ValueError, match="float64"):
        limits.LowRankSoftmaxAttention(16, beta=1.0, center_keys=False)(q, q, q)


def test_a_rank_that_is_not_low_is_warned_about():
    with pytest.warns(UserWarning, match="not low-rank"):
        lora_gradient_exact(**wide(r=4))


# ------------------------------------------------------------------ the experiment


def cut(cfg, **more):
    return cfg.replace(draws=1, exact_lengths=(256, 1024, 1536), fast_lengths=(256, 1024, 1536),
                       sizes=(0.5, 4.0), windows=2, device="cpu", **more)


def tiny(folder):
    recipes.tiny_llama(max_length=128).save_pretrained(folder)
    recipes.byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_full_scale_path_with_a_tiny_model(tmp_path, recorded):
    cfg = cut(FULL, model=tiny(tmp_path / "model"), seeds=(0,), lengths=(16, 32, 64),
              alphas=(8.0, 64.0), train_length=32, training=Training(steps=2, batch_size=2))
    report = experiment(cfg, start_run("lora_limits", cfg, "full", root=tmp_path / "runs"))
    assert {"error", "cost", "phase", "heads", "radii", "errors", "lora"} == set(report.tables)
    assert set(report.tables["lora"]["alpha"]) == {8.0, 64.0}
    assert {str(a) for a in recorded.asked} == {FULL.text, FULL.train_text}


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = cut(SMALL, model=tiny(tmp_path / "model"), seeds=(0,), lengths=(16, 32, 64),
              train_length=32, training=Training(steps=1, batch_size=1))
    monkeypatch.setattr(told, "_plot", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch("lora_limits", cfg, root=tmp_path / "runs")
    monkeypatch.undo()
    for part in ("_errors", "_costs", "_phases", "_look", "_stretched"):  # nothing is done again
        monkeypatch.setattr(told, part, lambda *a, **k: 1 / 0)
    report = launch("lora_limits", cfg, root=tmp_path / "runs", resume=True)
    timed = [c for c in report.claims if "seconds" in c.text]
    assert timed and {c.verdict for c in timed} == {"not decided at this scale"}
    assert json.loads((report.folder / "report.json").read_text())["paper"] == "lora_limits"
    assert isinstance(report.tables["heads"], pd.DataFrame)


TRAIN = """
from functools import partial

import torch
from torch import nn

from adaptlab import adapters, modules, processes
from adaptlab.lowrank.lora_limits import LowRankSoftmaxAttention
from adaptlab.train import Training


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.attend = LowRankSoftmaxAttention(degree=4, causal=True)

    def forward(self, x):
        return self.out(self.attend(self.q(x), self.k(x), self.v(x)).mean(1))


torch.manual_seed(0)
model, x = Reader(), torch.randn(32, 20, 4)
before = model(x[:2])
adapters.attach(model, partial(adapters.LoraAdapter, rank=2, alpha=4), ["q", "k", "v"])
Training(steps=4, batch_size=8, lr=5e-2).fit(
    model, (x, torch.arange(32) % 4), modules.cross_entropy, device="cpu", progress=False)
if processes.is_main():
    print("before", *before.flatten().tolist())
    print("after", *model.eval()(x[:2]).flatten().tolist())
"""


def test_two_processes_train_through_the_fast_attention_as_one(tmp_path, capsys):
    found = two_processes.assert_alike(TRAIN, tmp_path, capsys)
    assert (found["after"] - found["before"]).abs().max() > 1e-3
