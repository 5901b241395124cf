"""Fine-tuning transfer: sums, rows of tokens, folders, the command, diagnostics, full scale."""

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
import two_processes
from safetensors.torch import load_file, save_file
from torch import nn

from adaptlab import adapter_files, adapters, checkpoints, evaluate, recipes, weights
from adaptlab.arithmetic import finetuning_transfer as method
from adaptlab.arithmetic.finetuning_transfer import (
    Barrier,
    DiffVector,
    TransferInit,
    apply_diff,
    diff_vector,
    iterative_recycling,
    linear_barrier,
    main,
    padded,
    put_in,
    read_vocabulary,
    recovered_fraction,
    transfer_finetuning,
    transfer_matrix,
    unmatched,
)
from adaptlab.bench.runs import start_run
from adaptlab.experiments import finetuning_transfer as told
from adaptlab.experiments.finetuning_transfer import FULL, SMALL, experiment
from adaptlab.train import Training
from one_seed import goes_on

E = "model.embed_tokens.weight"
pytestmark = [pytest.mark.filterwarnings("ignore:the diff is .* as long as the old base"),
              pytest.mark.filterwarnings("ignore:the new base is nearer to the fine-tune")]


def draw(seed, dtype=torch.float32, rows=6, size=1.0):
    g = torch.Generator().manual_seed(seed)
    made = {E: torch.randn(rows, 4, generator=g), "w": torch.randn(5, 4, generator=g),
            "norm": torch.rand(4, generator=g)}
    return {n: (size * t).to(dtype) for n, t in made.items()}


def summed(base, tuned, target, scale=1.0):
    return {n: (t.double() + scale * (tuned[n].double() - base[n].double())).to(t.dtype)
            for n, t in target.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in b)


def save(folder, seed, more=0, tie=True, vocab=260, **config):
    "A small Llama in bfloat16 with its tokenizer, on disk."
    torch.manual_seed(seed)
    model = recipes.tiny_llama(hidden_size=16, layers=1, tie=tie, vocab_size=vocab)
    model = model.to(torch.bfloat16)
    if more:
        model.resize_token_embeddings(vocab + more, mean_resizing=False)
    model.config.update(config)
    model.save_pretrained(folder)
    recipes.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def three(tmp_path):
    "Old base, old fine-tune with two more tokens, new base with other positions."
    return [save(tmp_path / "old", 0), save(tmp_path / "tuned", 1, more=2, eos_token_id=9),
            save(tmp_path / "new", 2, max_position_embeddings=4096)]


# sums


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
def test_the_formula_rounded_once(dtype, scale):
    base, tuned, target = (draw(i, dtype) for i in range(3))
    wanted = summed(base, tuned, target, scale)
    made = transfer_finetuning(base, tuned, target, scale=scale)
    for found in (apply_diff(target, diff_vector(base, tuned), scale), made.weights):
        if dtype == torch.float64:  # the last bit depends on how the machine multiplies and adds
            for n, t in wanted.items():
                torch.testing.assert_close(found[n], t, rtol=1e-15, atol=1e-15)
        else:
            assert same(found, wanted)
    assert made.folder is None


def test_what_must_come_back():
    for dtype in (torch.float32, torch.bfloat16):
        base, tuned, target = (draw(i, dtype) for i in range(3))
        diff = diff_vector(base, tuned)
        assert same(apply_diff(base, diff), tuned)
        assert same(apply_diff(target, diff, 0.0), target)
        assert same(apply_diff(target, diff_vector(base, {n: t.clone() for n, t in base.items()})),
                target)


def test_a_chain_of_bfloat16_operations_is_another_result():
    base = draw(0, torch.bfloat16)
    tuned = {n: (t.float() * 1.004).bfloat16() for n, t in base.items()}
    target = draw(2, torch.bfloat16, size=3.0)
    chain = {n: t + (tuned[n] - base[n]) for n, t in target.items()}
    ours = apply_diff(target, diff_vector(base, tuned))
    assert same(ours, summed(base, tuned, target))
    twice = {n: t + t * 0.37 * (tuned[n] - base[n]) for n, t in target.items()}
    assert not same(apply_diff(target, diff_vector(base, tuned), 0.37), twice) and chain.keys()


def test_it_is_linear_and_can_be_taken_back():
    base, tuned, target = (draw(i, torch.float64) for i in range(3))
    diff = diff_vector(base, tuned)
    halves = apply_diff(apply_diff(target, diff, 0.5), diff, 0.5)
    whole = apply_diff(target, diff)
    back = apply_diff(whole, diff, -1.0)
    for n, t in target.items():
        torch.testing.assert_close(halves[n], whole[n], rtol=0, atol=1e-14)
        torch.testing.assert_close(back[n], t, rtol=0, atol=1e-14)


def test_task_arithmetic_with_one_vector():
    base, tuned = draw(0), draw(1)
    tau = weights.task_vector(tuned, base)
    added = weights.add(base, tau, 0.4)
    ours = apply_diff(base, diff_vector(base, tuned), 0.4)
    for n, t in added.items():
        torch.testing.assert_close(ours[n], t)


def test_diffs_are_vectors(tmp_path):
    a, b = diff_vector(draw(0), draw(1)), diff_vector(draw(0), draw(2))
    flat = [torch.cat([t.flatten() for t in d.tensors().values()]) for d in (a, b)]
    mixed = torch.cat([t.flatten() for t in (2 * a - b * 0.5 + b).tensors().values()])
    torch.testing.assert_close(mixed, 2 * flat[0] + 0.5 * flat[1])
    assert a.norm() == pytest.approx(float(flat[0].norm()))
    assert a.cosine(b) == pytest.approx(float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()))
    a.save(tmp_path / "diff", max_shard_size=100)
    assert len(list((tmp_path / "diff").glob("*.safetensors"))) > 1
    again = DiffVector.load(tmp_path / "diff")
    assert same(again.tensors(), a.tensors()) and again.state.specs["w"].dtype == torch.float64


def test_gradient_descent_on_least_squares():
    "The closed form of the lesson, through the exported functions."
    torch.manual_seed(0)
    X, y, eta, k = torch.randn(30, 4).double(), torch.randn(30).double(), 0.1, 25
    X[:, 3] *= 1e-3  # a flat direction
    H = X.T @ X / 30

    def tune(w):
        m = w["m"]
        for _ in range(k):
            m = m - eta * X.T @ (X @ m - y) / 30
        return {"m": m}

    m_s = {"m": torch.randn(4).double()}
    eye = torch.eye(4).double()
    P = eye - torch.linalg.matrix_power(eye - eta * H, k)
    errors = []
    for size in (1.0, 2.0):
        gap = size * torch.ones(4).double()
        m_t = {"m": m_s["m"] + gap}
        error = apply_diff(m_t, diff_vector(m_s, tune(m_s)))["m"] - tune(m_t)["m"]
        torch.testing.assert_close(error, P @ gap)
        errors.append(error)
    torch.testing.assert_close(errors[1], 2 * errors[0])
    assert abs(errors[0][3]) < 1e-3 < abs(errors[0][0])


def test_fine_tunes_in_another_precision():
    base, tuned, target = draw(0, torch.float32), draw(1, torch.bfloat16), draw(2, torch.float16)
    assert same(apply_diff(target, diff_vector(base, tuned)), summed(base, tuned, target))
    for d, s in ((torch.float8_e4m3fn, base), (torch.float32, draw(0) | {
            "w": base["w"].to(torch.float8_e4m3fn)})):
        with pytest.raises(ValueError, match="float8"):
            diff_vector(s, draw(1, d)).tensors()


# rows of tokens


def test_rows_are_padded_piece_by_piece():
    t = torch.randn(4, 3)
    state = padded(weights.as_state({"a": t, "b": t, "c": torch.ones(4)}), {"a": 7, "c": 4})
    wanted = torch.cat([t, torch.zeros(3, 3)])
    for size in (1, 2, 5, 100):
        assert torch.equal(torch.cat(list(state.pieces("b", size))), wanted.flatten())
    assert torch.equal(state["c"], torch.ones(4)) and state.specs["a"].shape == (7, 3)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_new_rows_are_those_of_the_fine_tune(scale):
    base, tuned, target = draw(0), draw(1, rows=9), draw(2)
    made = transfer_finetuning(base, tuned, target, scale=scale).weights[E]
    torch.testing.assert_close(made[6:], scale * tuned[E][6:])
    assert torch.equal(made[:6], summed({E: base[E]}, {E: tuned[E][:6]}, {E: target[E]}, scale)[E])


def test_a_target_that_was_grown_already():
    base, tuned, target = draw(0), draw(1, rows=9), draw(2, rows=8)
    made = transfer_finetuning(base, tuned, target).weights[E]
    torch.testing.assert_close(made[6:8], target[E][6:] + tuned[E][6:8])


def test_more_rows_than_the_fine_tune_are_refused():
    with pytest.raises(ValueError, match="more than the fine-tune"):
        transfer_finetuning(draw(0), draw(1), draw(2, rows=7))
    with pytest.raises(ValueError, match="9, 4"):
        transfer_finetuning(draw(0), draw(1, rows=9), draw(2), vocab="error")
    wide = draw(2) | {"w": torch.zeros(6, 4)}  # not a row per token: never padded
    with pytest.raises(ValueError, match=r"w is \[6, 4\]"):
        apply_diff(wide, diff_vector(draw(0), draw(1)))


def spoken(folder, tokens):
    "Another vocabulary in a folder."
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {t: i for i, t in enumerate(tokens)}
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in tokens]
    for t in content["added_tokens"]:
        t["id"] = tokens.index(t["content"])
    path.write_text(json.dumps(content))


def test_ids_of_other_tokens_are_refused(three):
    words = sorted(read_vocabulary(three[0]), key=read_vocabulary(three[0]).get)
    spoken(three[2], words[::-1])
    with pytest.raises(ValueError, match="260 ids mean another token in the new base"):
        transfer_finetuning(*three)


def test_few_renamed_tokens_give_a_warning(three):
    words = sorted(read_vocabulary(three[0]), key=read_vocabulary(three[0]).get)
    spoken(three[2], [*words[:-1], "<renamed>"])
    with pytest.warns(UserWarning, match="1 of 260 ids mean another token in the new base"):
        transfer_finetuning(*three)


# folders


def test_a_folder_from_three(three, tmp_path):
    (three[1] / "chat_template.jinja").write_text("{{ messages }}")
    (three[1] / "tokenizer_config.json").write_text('{"tokenizer_class": "Tuned"}')
    done = transfer_finetuning(*three, tmp_path / "out", max_shard_size="4KB")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (262, 9)
    assert config["max_position_embeddings"] == 4096  # positions of the target
    assert (out / "chat_template.jinja").is_file() and len(list(out.glob("*.safetensors"))) > 2
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "Tuned"
    b, f, t = (checkpoints.load_state(p) for p in three)
    rows = {n: torch.cat([x[E], torch.zeros(2, 16, dtype=x[E].dtype)]) for n, x in (
        ("b", b), ("t", t))}
    wanted = summed(b | {E: rows["b"]}, f, t | {E: rows["t"]})
    assert same(done.weights.load(), wanted)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, wanted[E])
    measured = DiffVector(weights.as_state(weights.task_vector(f, b | {E: rows["b"]})))
    assert done.relative == pytest.approx(measured.norm() / weights.norm(b), rel=1e-4)
    assert done.moved[E] == pytest.approx(float((f[E].double() - rows["b"].double()).norm()), 1e-4)


def test_a_fine_tune_with_positions_of_its_own(three):
    config = json.loads((three[1] / "config.json").read_text()) | {"max_position_embeddings": 9000}
    (three[1] / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="max_position_embeddings"):
        transfer_finetuning(*three)


def test_all_or_nothing(three, tmp_path):
    bad = load_file(three[2] / "model.safetensors")
    bad[E][5, 5] = float("nan")
    save_file(bad, three[2] / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 entries of .* NaN"):
        transfer_finetuning(*three, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        transfer_finetuning(*[*three[:2], three[0]], tmp_path / "taken")


def test_single_files_and_modules(tmp_path):
    states = [draw(i) for i in range(3)]
    for n, s in zip("bft", states, strict=True):
        save_file(s, tmp_path / f"{n}.safetensors")
    done = transfer_finetuning(*(tmp_path / f"{n}.safetensors" for n in "bft"),
                               tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), summed(*states))
    assert done.folder == tmp_path / "out.safetensors"
    nets = [recipes.tiny_llama(hidden_size=16, layers=1) for _ in range(3)]
    made = transfer_finetuning(*nets).weights
    assert made["lm_head.weight"] is made[E]  # tied: one tensor
    assert torch.equal(made[E], summed(*({E: n.state_dict()[E]} for n in nets))[E])


MB = int(os.environ.get("ADAPTLAB_TEST_CHECKPOINT_MB", "24"))  # of each of the four checkpoints


def test_a_few_pieces_in_memory(tmp_path):
    "The peak does not grow with the checkpoint."
    entries, peaks = MB * 10**6 // 2 // 6, []
    for count in (3, 6):
        for n, size in (("b", 1.0), ("f", 1.0), ("t", 0.5)):
            state = {f"w{i}": torch.full((entries,), size).bfloat16() for i in range(count)}
            save_file(state, tmp_path / f"{n}.safetensors")
        files = [tmp_path / f"{n}.safetensors" for n in "bft"]
        peaks.append(evaluate.peak_memory(lambda files=files: transfer_finetuning(
            *files, tmp_path / "out.safetensors", overwrite=True), "cpu"))
    assert peaks[1] < 1.5 * peaks[0] + 2**20 and peaks[1] < MB * 10**6


# the command


def test_the_command(three, tmp_path):
    words = [*map(str, three), str(tmp_path / "out"), "--scale", "0.5"]
    command = [sys.executable, "-m", "adaptlab", "transfer", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "tensors; the diff is" in done.stdout, done.stderr
    assert same(checkpoints.load_state(tmp_path / "out"),
                dict(transfer_finetuning(*three, scale=0.5).weights))


def test_the_command_refuses(three, tmp_path, capsys):
    words = list(map(str, three))
    assert main([*words[:2], str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(words)
    assert "Required options" in capsys.readouterr().err
    assert main([*words[:2], str(save(tmp_path / "wide", 3, vocab=300)), str(tmp_path / "o"),
                 "--no-strict"]) == 0
    assert f"kept as in the new base: {E}" in capsys.readouterr().out


def test_a_name_on_the_hub(monkeypatch, three):
    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(three[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    transfer_finetuning("org/base@stage1-step3", three[1], three[2])
    assert asked == [("org/base", "stage1-step3")]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: open("/nowhere/x"))
    with pytest.raises(FileNotFoundError, match="org/base is no folder here"):
        transfer_finetuning("org/base", three[1], three[2])


# bad input


@pytest.mark.parametrize("change, words", [
    ({"extra": torch.ones(2)}, "extra"),
    ({"w": torch.ones(5, 5)}, r"w is \[5, 5\], in state 1 \[5, 4\]"),
    ({"w": torch.full((5, 4), float("inf"))}, "infinite"),
    ({"w": torch.ones(5, 4, dtype=torch.int8)}, "int8"),
])
def test_fine_tunes_that_do_not_fit(change, words):
    base = draw(0)
    if change.get("w") is not None and change["w"].dtype == torch.int8:
        base["w"] = torch.zeros(5, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match=words):
        diff_vector(base, draw(1) | change).tensors()


def test_other_bad_input(three, tmp_path):
    base, tuned = draw(0), draw(1)
    diff = diff_vector(base, tuned)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            apply_diff(base, diff, scale)
    with pytest.warns(UserWarning, match="same tensors"):
        diff_vector(base, base)
    net = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="copy it before"):
        diff_vector(net.state_dict(), net)  # it was no copy
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diff_vector({n: t.clone() for n, t in net.state_dict().items()}, net)
    with pytest.raises(TypeError, match="diff_vector"):
        apply_diff(base, base)
    with pytest.warns(UserWarning, match="the same"):
        transfer_finetuning(three[0], three[0], three[2])
    with pytest.raises(ValueError, match="zero-pad"):
        diff_vector(base, tuned, vocab="by-token")
    with pytest.raises(ValueError, match="dequantise"):
        diff_vector({"w": torch.ones(2, dtype=torch.uint8)}, {"w": torch.ones(2).byte()})
    with pytest.raises(FileNotFoundError):
        transfer_finetuning(tmp_path / "none", three[1], three[2])
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        transfer_finetuning(three[0], three[1], save(tmp_path / "untied", 4, tie=False))
    other = save(tmp_path / "other", 2)
    config = json.loads((other / "config.json").read_text()) | {"model_type": "mistral"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model_type"):
        transfer_finetuning(three[0], three[1], other)


def test_a_wrong_pair_is_noticed():
    with pytest.warns(UserWarning, match="as long as the old base"):
        done = transfer_finetuning(draw(0), draw(1), draw(2))
    assert done.relative > 1


def test_a_swap_is_noticed():
    "Of the two orders exactly one is warned of, whatever the scale."
    bed = told.task(0, SMALL)
    old, new, _ = (dict(m.state_dict()) for m in list(bed.model)[3:])
    tuned = told.finetune(old, bed, SMALL, 0, 5e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transfer_finetuning(old, tuned, new)
        transfer_finetuning(old, tuned, old)
    for scale in (1.0, 0.1):
        with pytest.warns(UserWarning, match="were they swapped"):
            transfer_finetuning(tuned, old, new, scale=scale)
    first = dict(bed.model[0].state_dict())  # no proof: far versions, a short fine-tuning
    with pytest.warns(UserWarning, match="too far apart"):
        transfer_finetuning(first, told.finetune(first, bed, SMALL, 0, 5e-4), new)


def test_the_same_function_in_another_order_gets_nothing():
    "The target's hidden units permuted: its function stays, the transfer does nothing good."
    bed = told.task(0, SMALL)
    old, new, _ = (dict(m.state_dict()) for m in list(bed.model)[3:])
    diff = diff_vector(old, told.finetune(old, bed, SMALL, 0, 5e-3))
    p, q = (torch.randperm(128, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    moved = new | {"layers.0.weight": new["layers.0.weight"][p],
                   "layers.0.bias": new["layers.0.bias"][p],
                   "layers.1.weight": new["layers.1.weight"][q][:, p],
                   "layers.1.bias": new["layers.1.bias"][q],
                   "head.weight": new["head.weight"][:, q]}
    x = bed.test[0]
    torch.testing.assert_close(put_in(told.network(128), moved)(x),
                               put_in(told.network(128), new)(x))
    base, there, permuted = (told.score(w, bed.choose, SMALL) for w in (
        new, apply_diff(new, diff), apply_diff(moved, diff)))
    assert recovered_fraction(permuted, base, there) < 0.1 < 1 < there - base


def test_not_strict_lists_what_it_leaves():
    target = {E: draw(2)[E], "w": torch.ones(7, 4), "only": torch.ones(3)}
    made = transfer_finetuning(draw(0), draw(1), target, strict=False)
    assert set(made.skipped) == {"w", "norm", "only"} and set(made.weights) == set(target)
    assert torch.equal(made.weights["w"], target["w"])
    assert torch.equal(made.weights[E], summed({E: draw(0)[E]}, {E: draw(1)[E]},
                                               {E: target[E]})[E])


def test_buffers_of_other_library_versions():
    freq = {"layers.0.rotary_emb.inv_freq": torch.ones(2)}
    made = transfer_finetuning(draw(0) | freq, draw(1), draw(2))
    assert same(made.weights, summed(draw(0), draw(1), draw(2)))
    ids = {"position_ids": torch.arange(4)}
    made = transfer_finetuning(draw(0) | ids, draw(1) | ids, draw(2) | ids)
    assert torch.equal(made.weights["position_ids"], ids["position_ids"])
    assert unmatched([weights.as_state(draw(0) | ids), weights.as_state(draw(1))]) == {}


# diagnostics


def test_recovered_fraction():
    assert recovered_fraction(51.2, 36.8, 55.2) == pytest.approx(0.783, abs=1e-3)
    with pytest.raises(ValueError, match="no gain"):
        recovered_fraction(1.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="finite"):
        recovered_fraction(float("nan"), 1.0, 2.0)


def test_barrier():
    torch.manual_seed(0)
    net, x, y = recipes.MLP((6, 16, 3)).eval(), torch.randn(80, 6), torch.randint(0, 3, (80,))
    ends = [recipes.MLP((6, 16, 3)).state_dict() for _ in range(2)]
    before = {n: t.clone() for n, t in net.state_dict().items()}

    def loss(m):
        return nn.functional.cross_entropy(20 * m(x), y)

    there = linear_barrier(net, *ends, loss, n=7)
    back = linear_barrier(net, *ends[::-1], loss, n=7)
    assert there.losses == pytest.approx(back.losses[::-1], rel=1e-5)
    assert there.value == pytest.approx(back.value, rel=1e-4)
    put_in(net, ends[0])
    assert there.losses[0] == loss(net).item() and len(there.gammas) == 7
    chord = [there.losses[0] + t * (there.losses[-1] - there.losses[0]) for t in there.gammas]
    assert there.value == pytest.approx(max(0, *(a - b for a, b in zip(
        there.losses[1:-1], chord[1:-1], strict=True))))
    put_in(net, before)
    with pytest.raises(ZeroDivisionError):
        linear_barrier(net, *ends, lambda m: 1 / 0)
    assert same(net.state_dict(), before)
    with pytest.raises(ValueError, match="two ends"):
        linear_barrier(net, *ends, loss, n=1)
    with pytest.raises(ValueError, match="not finite"):
        print(linear_barrier(net, *ends, lambda m: float("nan")).value)
    with pytest.raises(ValueError, match="not finite"):
        print(Barrier([0.0, 0.5, 1.0], [1.0, float("nan"), 1.0]).value)
    name, wide = next((n, t) for n, t in before.items() if t.dim() == 2)
    with pytest.raises(ValueError, match="in the model"):
        put_in(net, before | {name: wide[:1]})  # would be spread over all rows
    with pytest.raises(ValueError, match="lack head"):
        put_in(net, {n: t for n, t in before.items() if "head" not in n})


def test_matrix():
    bases = {n: {"w": torch.tensor([float(i)])} for i, n in enumerate("abc")}
    tuned = {n: {"w": torch.tensor([10.0])} for n in bases}
    found = transfer_matrix(bases, tuned, lambda w: float(w["w"]))
    assert found.names == ["a", "b", "c"] and found.base == [0, 1, 2] and found.tuned == [10] * 3
    assert found.transferred[0] == [10, 11, 12] and found.recovered[2] == [0.8, 8 / 9, 1.0]
    assert transfer_matrix(bases, tuned, lambda w: float(w["w"]), 0.0).transferred[1] == [0, 1, 2]
    with pytest.raises(ValueError, match="one of each"):
        transfer_matrix(bases, {}, float)
    with pytest.raises(ValueError, match="in one order"):
        transfer_matrix({}, {}, float)
    with pytest.raises(ValueError, match="one of each"):
        transfer_matrix(["a"], ["a"], float)
    with pytest.raises(ValueError, match="in one order"):
        transfer_matrix(bases, dict(reversed(tuned.items())), float)


# at every release


def versions(n):
    return [{"w": torch.randn(3, generator=torch.Generator().manual_seed(i))} for i in range(n)]


def tune(w):
    return {"w": w["w"] - 0.3 * (w["w"] - 1).sin()}


@pytest.mark.parametrize("mode", ["iterative", "direct"])
def test_recycling_by_the_algorithm(mode):
    bases, results = versions(4), []
    for i, base in enumerate(bases):
        if not i:
            results.append(tune(base))
            continue
        before = results[-1] if mode == "iterative" else tune(bases[i - 1])
        results.append(tune(summed(bases[i - 1], before, base)))
    found = iterative_recycling(bases, tune, mode)
    assert all(same(a, b) for a, b in zip(found, results, strict=True))
    assert all(torch.equal(a["w"], b["w"]) for a, b in zip(bases, versions(4), strict=True))
    assert same(iterative_recycling(bases[:1], tune, mode)[0], tune(bases[0]))
    assert same(iterative_recycling(bases[:2], tune)[1],
                iterative_recycling(bases[:2], tune, "direct")[1])
    still = iterative_recycling(bases, dict, mode)
    assert all(same(a, b) for a, b in zip(still, bases, strict=True))


@pytest.mark.parametrize("mode", ["iterative", "direct"])
def test_recycling_with_one_model_that_is_trained_again(mode):
    net = nn.Linear(3, 1, bias=False)

    def again(start):
        with torch.no_grad():
            put_in(net, start).weight.copy_(tune({"w": start["weight"]})["w"])
        return net.state_dict()  # not a copy

    bases = [{"weight": b["w"][None]} for b in versions(3)]
    found = iterative_recycling(bases, again, mode)
    wanted = iterative_recycling(versions(3), tune, mode)
    assert all(torch.equal(a["weight"][0], b["w"]) for a, b in zip(found, wanted, strict=True))


def test_recycling_refuses():
    for bases in ([], versions(1)[0]):
        with pytest.raises(ValueError, match="list of versions"):
            iterative_recycling(bases, tune)
    with pytest.raises(ValueError, match="mode"):
        iterative_recycling(versions(2), tune, "both")
    with pytest.raises(ValueError, match="w is"):
        iterative_recycling(versions(2), lambda w: {"w": torch.ones(4)})
    with pytest.raises(ValueError, match="w is"):  # also where no other version follows
        iterative_recycling(versions(1), lambda w: {"w": torch.ones(4)})


def test_an_adapter_on_the_new_base(tmp_path):
    "LoRA is a diff: on the new base it is what the merged fine-tune's diff makes of it."
    def llama(seed):
        torch.manual_seed(seed)
        return recipes.tiny_llama()

    tuned = adapters.attach(llama(0), partial(adapters.LoraAdapter, rank=2), ["q_proj", "v_proj"])
    for layer in adapters.adapters(tuned).values():
        nn.init.normal_(layer.B, std=0.1)
    file = adapter_files.save(tuned, tmp_path / "lora.safetensors")
    moved = adapters.merge_and_unload(adapter_files.load(llama(1), file))
    diff = diff_vector(llama(0), adapters.merge_and_unload(tuned))
    made = TransferInit(partial(llama, 1), diff)().state_dict()
    for n, w in moved.state_dict().items():
        torch.testing.assert_close(made[n], w)


def test_a_start_for_the_trainer():
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    base, tuned = recipes.tiny_llama(), recipes.tiny_llama(vocab_size=262)

    def load():
        torch.manual_seed(5)
        return recipes.tiny_llama()

    start = TransferInit(load, diff_vector(base, tuned))
    model = start()
    assert model.get_input_embeddings().weight.shape[0] == 262
    assert torch.equal(model.lm_head.weight[260:], tuned.lm_head.weight[260:])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    trainer = Trainer(model_init=start, args=TrainingArguments(report_to=[], use_cpu=True))
    assert torch.equal(trainer.model.lm_head.weight, model.lm_head.weight)


# the experiment


@pytest.fixture
def short():
    return SMALL.replace(seeds=(0,), lrs=(1e-3, 5e-3), steps=(5, 10, 15), width=16,
                         training=Training(steps=2, batch_size=20))


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch, short):
    short = short.replace(lrs=(5e-3,), steps=(5, 10, 15, 20, 25))  # claims are about five versions
    report = goes_on(told, short, tmp_path, monkeypatch, stop="_main_figure")
    assert {c.verdict for c in report.claims} <= {"not decided at this scale"}
    assert len(report.tables["matrix"]) == 36


def test_arms_are_what_they_are_called(short):
    bed, lr = told.task(0, short), 5e-3
    bases = [dict(m.state_dict()) for m in bed.model[:-1]]
    train = partial(told.finetune, bed=bed, cfg=short, seed=0, lr=lr)
    tuned = [train(m.state_dict()) for m in bed.model]
    arms = told._arms(short, 0, lr, tuned, False)
    found = arms[arms["version"] == 3].set_index("method")["accuracy"]
    direct = iterative_recycling(bases, train, "direct")[-1]
    assert found["direct"] == told.score(direct, bed.test, short)
    assert found["standard"] == told.score(tuned[2], bed.test, short)
    five = told._arms(short, 0, lr, tuned, True).set_index("method")["accuracy"]["standard x 5"]
    plain = train(bases[-1], steps=3 * short.training.steps)  # as many as there are versions
    assert five == told.score(plain, bed.test, short)


def test_the_claims_barrier_and_matrix(short):
    bed = told.task(0, short)
    tuned = [told.finetune(m.state_dict(), bed, short, 0, 5e-3) for m in bed.model]
    table = told._matrix(short, 0, tuned).set_index(["source", "target"])
    assert table.loc[("M1", "M1"), "recovered"] == 1 and table.loc[("M1", "M1"), "barrier"] == 0
    assert table.loc[("M1", "M2"), "barrier"] == table.loc[("M2", "M1"), "barrier"]
    made = summed(bed.model[0].state_dict(), tuned[0], bed.model[2].state_dict())
    assert table.loc[("M1", "M3"), "accuracy"] == told.score(made, bed.test, short)


TRAIN = """
from adaptlab import processes
from adaptlab.arithmetic.finetuning_transfer import apply_diff, diff_vector, put_in
from adaptlab.experiments import finetuning_transfer as told
from adaptlab.train import Training

cfg = told.SMALL.replace(steps=(5, 10), width=16, device="cpu",
                         training=Training(steps=3, batch_size=20))
bed = told.task(0, cfg)
old, new = (dict(m.state_dict()) for m in list(bed.model)[:2])
carried = apply_diff(new, diff_vector(old, told.finetune(old, bed, cfg, 0, 1e-2)))
made = told.finetune(carried, bed, cfg, 0, 1e-2)
if processes.is_main():
    for name, weights in (("new", new), ("carried", carried), ("made", made)):
        logits = put_in(told.network(16), weights).eval()(bed.test[0][:2])
        print(name, *logits.flatten().tolist())
"""


def test_two_processes_tune_and_carry_as_one(tmp_path, capsys):
    found = two_processes.assert_alike(TRAIN, tmp_path, capsys)
    assert (found["carried"] - found["new"]).abs().max() > 1e-2
    assert (found["made"] - found["carried"]).abs().max() > 1e-2


def test_answers_are_read():
    read = told.read_number
    assert read("3 + 4 = 7\n#### 1,007\n\nQuestion: next\nAnswer: #### 5") == "1007.0"
    assert read("The answer is 12 apples.") == "12.0" and read("no idea") == "None"


def test_full_scale_path_with_tiny_models(tmp_path, recorded, monkeypatch):
    "Both tracks of FULL, from data of the hub's form to claims; then nothing is done twice."
    names = ["old", "old-tuned", "new", "new-tuned", "base", "base@r1", "base@r2",
             "base@r3"]
    place = {n: str(save(tmp_path / n, i)) for i, n in enumerate(names)}
    cfg = FULL.replace(
        device="cpu", dtype="float32", old=(place["old"], place["old-tuned"]),
        new=(place["new"], place["new-tuned"]), base=place["base"], revisions=("r1", "r2", "r3"),
        shots=1, n_questions=3, max_new_tokens=2, max_length=200,
        language=Training(steps=1, batch_size=2, lr=1e-3))
    run = start_run("finetuning_transfer", cfg, "full", root=tmp_path / "runs")
    report = experiment(cfg, run)
    for way in ("recycling", "backporting"):
        assert set(report.tables[way]["method"]) == {"base", "diff", "own fine-tune",
                                                     "old fine-tune"}
    assert set(report.tables["controlled"]["method"]) == {
        *(f"{ft}M{i}" for i in (1, 2, 3) for ft in ("", "FT ")), "direct", "iterative",
        *(f"M{i} + M{j}" for i in (1, 2, 3) for j in (1, 2, 3) if i != j)}
    assert len(report.claims) == 8
    assert set(FULL.chats) <= set(map(str, recorded.asked))
    assert "openai/gsm8k@main#test" in recorded.asked
    assert sum(recorded_rows(s) for s in FULL.chats) == pytest.approx(220_000, rel=0.01)
    monkeypatch.setattr(Training, "fit", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(method, "transfer_finetuning", lambda *a, **k: 1 / 0)
    assert len(experiment(cfg, run).claims) == 8


def recorded_rows(source):
    import schemas

    return schemas.rows(source)


def test_full_is_the_papers():
    assert len(FULL.revisions) == 5 and FULL.language.steps == 30_000
    assert FULL.language.batch_size == 8 and FULL.language.lr == 5e-6
    assert all(a != b for a, b in pairwise(FULL.revisions))
