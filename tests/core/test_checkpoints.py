"""Weights on disk: layouts, round trips, what is carried along, what is refused, memory."""

import gc
import json
import math
import os
import subprocess
import sys
import textwrap
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model, save_file, save_model

from adaptlab import checkpoints, recipes, weights
from adaptlab.checkpoints import (
    average_checkpoints,
    check_compatible,
    load_state,
    open_state,
    save_state,
)
from adaptlab.weights import SparseDelta, add, average, linear_combination, pack, scale, unpack
from states import FLOATS, Tied, fast, layouts, make, near, same, small_pieces  # noqa: F401


def test_a_state_is_freed_when_it_is_dropped(tmp_path):
    "No reference cycle: with large models one cannot wait for the garbage collector."
    save_file({"w": torch.randn(9)}, tmp_path / "a.safetensors")
    gc.collect()
    gc.disable()
    try:
        for source in ({"w": torch.randn(9)}, open_state(tmp_path / "a.safetensors")):
            lazy = linear_combination([source, source], [0.5, 0.5], lazy=True)
            gone = [weakref.ref(lazy)]
            load_state(lazy)
            del lazy
            assert all(r() is None for r in gone)
    finally:
        gc.enable()


def test_ties_are_saved(tmp_path):
    a, b = Tied(), Tied()
    save_state(average([a, b], lazy=True), tmp_path / "out.safetensors")
    back = open_state(tmp_path / "out.safetensors")
    assert back.aliases == {"head.weight": "embed.weight"}
    assert "head.weight" not in load_file(tmp_path / "out.safetensors")
    state = load_state(back)
    assert state["head.weight"] is state["embed.weight"]
    missing, unexpected = load_model(Tied(), tmp_path / "out.safetensors")
    assert not missing and not unexpected


def test_a_tied_tensor_fits_a_file_that_has_it_once(tmp_path):
    a, b = Tied(), Tied()
    save_model(b, tmp_path / "b.safetensors")  # notes the alias
    once = {n: t for n, t in b.state_dict().items() if n != "head.weight"}
    save_file(once, tmp_path / "once.safetensors")  # does not
    expected = average([a, b])
    assert same(average([a, open_state(tmp_path / "b.safetensors")]), expected)
    assert same(average([a, open_state(tmp_path / "once.safetensors")]), expected)
    from_file = average([open_state(tmp_path / "once.safetensors"), a])
    assert "head.weight" not in from_file
    assert torch.allclose(from_file["embed.weight"], expected["embed.weight"])
    moved = add(a, {"head.weight": torch.ones(6, 4)}, allow_missing=True)
    assert torch.equal(moved["embed.weight"], a.embed.weight + 1)
    assert moved["head.weight"] is moved["embed.weight"]


# ------------------------------------------------------------------ files


SAVED = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
         torch.float8_e4m3fn, torch.float8_e5m2]


@fast
@given(layouts(tuple(SAVED)), st.integers(0, 99), st.sampled_from([1, 100, "1KB", "5GB"]))
def test_round_trip(tmp_path_factory, layout, seed, size):
    folder = tmp_path_factory.mktemp("round")
    state = make(layout, seed)
    save_state(state, folder / "ours", max_shard_size=size)
    back = load_state(folder / "ours")
    assert list(back) and all(_bits(back[n]) == _bits(state[n]) for n in state)
    theirs = {}
    for file in (folder / "ours").glob("*.safetensors"):
        theirs |= load_file(file)
    assert all(_bits(theirs[n]) == _bits(state[n]) for n in state)
    save_file(state, folder / "theirs.safetensors")
    lazy = open_state(folder / "theirs.safetensors")
    assert all(_bits(lazy[n]) == _bits(state[n]) for n in state)
    assert all(torch.cat([torch.empty(0, dtype=state[n].dtype), *lazy.pieces(n)]).shape
               == (state[n].numel(),) for n in state if state[n].dtype.itemsize > 1)


def _bits(t):
    return t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("alignment", [torch.int8, torch.bool])
def test_tensors_are_aligned_in_the_file(tmp_path, alignment):
    state = {"a": torch.ones(3).to(alignment), "b": torch.ones(5), "c": torch.ones(3).half(),
             "d": torch.ones(2).double()}
    save_state(state, tmp_path / "x.safetensors")
    header = (tmp_path / "x.safetensors").read_bytes()
    n = int.from_bytes(header[:8], "little")
    assert (8 + n) % 8 == 0
    for name, entry in json.loads(header[8 : 8 + n]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % state[name].element_size() == 0


def test_non_contiguous_tensors_are_written_as_they_look(tmp_path):
    state = {"t": torch.arange(60.0).reshape(6, 10).T, "s": torch.arange(40.0)[::3],
             "e": torch.ones(1).expand(9)}
    save_state(state, tmp_path / "x.safetensors")
    assert same(load_state(tmp_path / "x.safetensors"), state)
    assert near(average([state, state]), state)


def test_streamed_equals_in_memory(tmp_path):
    layout = {"w": ((11, 13), torch.bfloat16), "b": ((5,), torch.float32), "s": ((), torch.float16)}
    states = [make(layout, i) for i in range(3)]
    paths = [save_state(s, tmp_path / f"{i}", max_shard_size=200) for i, s in enumerate(states)]
    share = [0.5, 0.25, 0.25]
    out = average_checkpoints(paths, tmp_path / "mean", share, max_shard_size=100)
    assert same(load_state(out), {n: average(states, share)[n] for n in load_state(out)})
    assert len(list(out.glob("*.safetensors"))) > 1
    single = average_checkpoints(paths, tmp_path / "mean.safetensors", share)
    assert {n: t.tolist() for n, t in load_file(single).items()} == {
        n: t.tolist() for n, t in average(states, share).items()
    }


def test_hugging_face_layout(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    nets = [recipes.tiny_llama(hidden_size=32, vocab_size=260).bfloat16() for _ in range(2)]
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / f"{i}", max_shard_size="20KB")
    recipes.byte_tokenizer().save_pretrained(tmp_path / "0")
    (tmp_path / "0" / "trainer_state.json").write_text("{}")
    (tmp_path / "0" / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "0" / "README.md").write_text("another model's card")
    out = average_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "soup",
                              max_shard_size="30KB")
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer_config.json"} <= names
    assert not {"trainer_state.json", "optimizer.pt", "README.md"} & names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = [os.path.getsize(out / f) for f in set(index["weight_map"].values())]
    biggest = max(t.nbytes for t in nets[0].state_dict().values())
    assert len(sizes) > 2 and max(sizes) < max(30_000, biggest) + 4000
    assert index["metadata"]["total_size"] == open_state(out).nbytes

    soup = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert soup.dtype == torch.bfloat16 and len(AutoTokenizer.from_pretrained(out))
    assert soup.lm_head.weight is soup.model.embed_tokens.weight
    for name, p in soup.named_parameters():
        a, b = (dict(n.named_parameters())[name].double() for n in nets)
        assert torch.equal(p, ((a + b) / 2).bfloat16())


def test_name_of_the_weights_follows_the_folder(tmp_path):
    (tmp_path / "a").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    out = average_checkpoints([tmp_path / "a"], tmp_path / "b")
    assert {p.name for p in out.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}


# ------------------------------------------------------------------ all or nothing


def test_a_failure_leaves_nothing(tmp_path):
    bad = {"a": torch.ones(50), "b": torch.tensor([math.nan])}
    for i in range(2):
        save_state(bad if i else {**bad, "b": torch.zeros(1)}, tmp_path / f"{i}")
    for out in ("out", "out.safetensors"):
        with pytest.raises(ValueError, match="1 entries of b in state 1"):
            average_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / out, max_shard_size=10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_state({"w": torch.ones(3)}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unless_asked(tmp_path):
    save_state({"w": torch.ones(3)}, tmp_path / "a")
    save_state({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    for out in ("a", "a.safetensors"):
        with pytest.raises(FileExistsError, match="overwrite=True"):
            save_state({"w": torch.zeros(3)}, tmp_path / out)
        save_state(scale(open_state(tmp_path / out), 5, lazy=True), tmp_path / out, overwrite=True)
        assert load_state(tmp_path / out)["w"].tolist() == [5, 5, 5]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(FileExistsError, match="no checkpoint"):
        save_state({"w": torch.ones(3)}, tmp_path / "thesis", overwrite=True)
    (tmp_path / "empty").mkdir()
    save_state({"w": torch.ones(3)}, tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="can't take its place"):
        save_state({"w": torch.ones(3)}, tmp_path / "file", overwrite=True)


def test_a_file_that_changed_meanwhile_is_noticed(tmp_path):
    path = save_state({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    state = open_state(path)
    save_state({"v": torch.ones(900), "w": torch.zeros(3)}, path, overwrite=True)
    with pytest.raises(ValueError, match="was changed after it was opened"):
        state["w"]


def test_sparse_deltas_round_trip(tmp_path):
    signs = torch.tensor([1, -1], dtype=torch.int8)
    deltas = {"a": SparseDelta(torch.tensor([1, 5]), signs, (2, 3), scale=0.5),
              "b": SparseDelta.from_dense(torch.eye(4))}
    for size in ("5GB", 10):
        path = save_state(pack(deltas), tmp_path / f"{size}", max_shard_size=size)
        back = unpack(load_state(path))
        assert back["a"].scale == 0.5 and back["a"].values.dtype == torch.int8
        assert all(torch.equal(back[n].to_dense(), d.to_dense()) for n, d in deltas.items())


# ------------------------------------------------------------------ which file is read


def folder_with(folder, *files, **indices):
    "A folder of files that hold w = 1, 2, ... in this order, and of indices of shards."
    folder.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(files, start=1):
        save_file({"w": torch.full((2,), float(i))}, folder / file)
    for stem, shards in indices.items():
        weight_map = {"w": shards} if isinstance(shards, str) else shards
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map}))
    return folder


SHARD = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    "files, indices, read, warning",
    [
        (["model.safetensors"], {}, 1, None),
        (["model.safetensors", SHARD], {"model": SHARD}, 1, "holds two models"),  # a second save
        (["model.safetensors"], {"model": SHARD}, 1, None),  # the index is a leftover
        (["adapter_model.safetensors"], {"model": SHARD}, 1, None),
        (["consolidated.safetensors", "model.safetensors"], {}, 2, None),
        (["consolidated.safetensors", SHARD], {"model": SHARD}, 2, None),
        (["model.fp16.safetensors", "model.safetensors"], {}, 2, None),
        (["soup.safetensors"], {}, 1, None),
        (["odd.safetensors"], {"model": "odd.safetensors"}, 1, None),  # an index may name it so
    ],
)
def test_the_file_that_from_pretrained_would_read(tmp_path, files, indices, read, warning):
    folder = folder_with(tmp_path / "a", *files, **indices)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_state(folder)["w"].tolist() == [read, read]
    assert [warning in str(w.message) for w in caught] == ([True] if warning else [])


@pytest.mark.parametrize(
    "files, indices, match",
    [
        (["model.safetensors", "adapter_model.safetensors"], {}, "more than one model"),
        (["a.safetensors", "b.safetensors"], {}, "more than one model"),
        ([SHARD], {}, "but not their index"),
        ([], {"model": SHARD}, "names files that are not there"),
        ([SHARD], {"model": {"w": SHARD, "v": "model-00002-of-00002.safetensors"}},
         "names files that are not there: model-00002"),
        ([], {}, "no safetensors weights"),
    ],
)
def test_folders_that_do_not_say_what_to_read(tmp_path, files, indices, match):
    with pytest.raises(ValueError, match=match):
        open_state(folder_with(tmp_path / "a", *files, **indices))


def test_a_second_save_is_read_like_transformers_reads_it(tmp_path):
    from transformers import AutoModelForCausalLM

    net = recipes.tiny_llama(hidden_size=32, vocab_size=260)
    net.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    net.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "a" / "model.safetensors")
    with pytest.warns(UserWarning, match="holds two models"):
        ours = load_state(tmp_path / "a")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert all(torch.equal(ours[n], p) for n, p in theirs.named_parameters())


def test_an_index_can_be_opened_by_its_name(tmp_path):
    folder = folder_with(tmp_path / "a", SHARD, "model.safetensors", model=SHARD)
    assert load_state(folder / "model.safetensors.index.json")["w"].tolist() == [1, 1]


SIGNS = ["run[1]", "a*b", "me@host", "12:30", "what?", "last.ckpt", "x.bin"]


@pytest.mark.parametrize("name", SIGNS)
def test_signs_in_paths(tmp_path, name):
    folder = folder_with(tmp_path / name, "model.safetensors")
    folder_with(tmp_path / "run1", "model.safetensors", "other.safetensors")
    out = average_checkpoints([folder, folder], tmp_path / f"out-{name}" / "soup")
    assert load_state(out)["w"].tolist() == [1, 1]
    single = average_checkpoints([folder, folder], tmp_path / name / "soup.safetensors")
    assert load_state(single)["w"].tolist() == [1, 1]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_state({"w": torch.ones(2)}, "~/a")
    average_checkpoints(["~/a"], "~/b")
    assert load_state("~/b")["w"].tolist() == [1, 1] and (tmp_path / "b").is_dir()


# ------------------------------------------------------------------ links


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    for value in (1.0, 2.0):
        save_state({"w": torch.full((2,), value)}, tmp_path / "out", overwrite=value > 1)
        assert (tmp_path / "out").is_symlink()
        assert load_state(tmp_path / "big")["w"].tolist() == [value, value]


def test_links_that_lead_nowhere_and_links_to_files_are_named(tmp_path):
    state = {"w": torch.ones(2)}
    (tmp_path / "out").symlink_to(tmp_path / "not-mounted")
    for call in (lambda: save_state(state, tmp_path / "out"), lambda: open_state(tmp_path / "out"),
                 lambda: save_state(state, tmp_path / "out" / "soup")):
        with pytest.raises(FileNotFoundError, match="is a link to .*not-mounted, which is not"):
            call()
    blob = save_state(state, tmp_path / "blob.safetensors")
    (tmp_path / "a.safetensors").symlink_to(blob)
    with pytest.raises(FileExistsError, match="is a link to .*blob"):
        save_state({"w": torch.zeros(2)}, tmp_path / "a.safetensors", overwrite=True)
    assert load_state(tmp_path / "a.safetensors")["w"].tolist() == [1, 1]


def test_a_file_behind_a_link_in_a_folder_is_left_alone(tmp_path):
    "As in the cache of a hub: the folder holds links to files that are shared."
    blob = save_state({"w": torch.ones(2)}, tmp_path / "blob.safetensors")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    save_state({"w": torch.zeros(2)}, tmp_path / "snapshot", overwrite=True)
    assert load_state(tmp_path / "snapshot")["w"].tolist() == [0, 0]
    assert load_state(blob)["w"].tolist() == [1, 1]


# ------------------------------------------------------------------ nothing of the user is lost


def all_files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def checkpoint(folder, value=1.0, size="5GB", **files):
    "A folder with weights, a config, and more files."
    save_state({"w": torch.full((4,), value), "v": torch.full((4,), value)}, folder,
               max_shard_size=size)
    for name, text in {"config.json": '{"a": 1}', **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("old", ["5GB", 16])
@pytest.mark.parametrize("new", ["5GB", 16])
def test_the_average_goes_to_the_root_of_its_checkpoints(tmp_path, old, new):
    root = checkpoint(tmp_path / "run", 9.0, old, **{
        "notes.md": "mine", "README.md": "mine", "trainer_state.json": "{}", "logs/a.txt": "mine",
        "optimizer.pt": "x", "tokenizer.json": '{"old": 1}', "added_tokens.json": "{}",
    })
    inputs = [checkpoint(root / f"checkpoint-{i}", float(i), **{
        "config.json": '{"a": 2}', "tokenizer.json": '{"new": 1}', "README.md": "another"
    }) for i in (1, 3)]
    before = all_files(root)
    average_checkpoints(inputs, root, max_shard_size=new, overwrite=True)
    after = all_files(root)
    assert load_state(root)["v"].tolist() == [2, 2, 2, 2]
    weights_ = {n for n in after if ".safetensors" in n and "/" not in n}
    assert len(weights_) == (1 if new == "5GB" else 3)  # two shards and an index; nothing old
    assert after["config.json"] == b'{"a": 2}' and after["tokenizer.json"] == b'{"new": 1}'
    assert "added_tokens.json" not in after  # of the tokenizer that was replaced
    changed = {n for n in before | after if before.get(n) != after.get(n)}
    assert {n for n in changed if ".safetensors" not in n} == {
        "config.json", "tokenizer.json", "added_tokens.json"}
    assert not any("/" in n for n in changed)  # the inputs and all other folders


def test_without_like_only_weights_are_replaced(tmp_path):
    folder = checkpoint(tmp_path / "a", 1.0, 16, **{"tokenizer.json": "{}", "thesis.txt": "mine"})
    before = all_files(folder)
    save_state(scale(open_state(folder), 2, lazy=True), folder, overwrite=True)
    after = all_files(folder)
    assert load_state(folder)["w"].tolist() == [2, 2, 2, 2]
    assert {n: t for n, t in after.items() if "safetensors" not in n} == {
        n: t for n, t in before.items() if "safetensors" not in n}


def test_files_in_the_way_are_a_reason_to_refuse(tmp_path):
    a = checkpoint(tmp_path / "a", **{"notes.txt": "of a"})
    b = checkpoint(tmp_path / "b", **{"notes.txt": "mine"})
    c = tmp_path / "c"
    save_file({"x": torch.ones(2)}, checkpoint(c) / "data.safetensors")
    os.rename(c / "model.safetensors", c / "weights.safetensors")
    before = all_files(tmp_path)
    with pytest.raises(FileExistsError, match=r"notes.txt is in the way"):
        average_checkpoints([a], b, overwrite=True)
    with pytest.raises(FileExistsError, match="would be a second model"):
        average_checkpoints([a], c, overwrite=True)
    assert all_files(tmp_path) == before


def test_a_failure_leaves_a_full_folder_as_it_was(tmp_path):
    root = checkpoint(tmp_path / "run", 9.0, 16)
    bad = save_state({"w": torch.full((4,), math.nan), "v": torch.ones(4)}, root / "bad")
    before = all_files(tmp_path)
    with pytest.raises(ValueError, match="NaN"):
        average_checkpoints([bad], root, overwrite=True)
    assert all_files(tmp_path) == before
    assert sorted(p.name for p in root.iterdir() if p.name.startswith(".")) == []


def test_an_interrupted_replacement_is_never_another_model(tmp_path, monkeypatch):
    "At every step the folder can be read as the old or the new model, or is refused."
    for old, new in (("5GB", 16), (16, "5GB"), (16, 16), ("5GB", "5GB")):
        for stop in range(8):
            folder = checkpoint(tmp_path / f"{old}-{new}-{stop}", 1.0, old)
            steps = []

            def counted(action, steps=steps, stop=stop):
                def run(*args, **kwargs):
                    if args[0] and len(steps) == stop:
                        raise KeyboardInterrupt
                    steps.append(args)
                    return action(*args, **kwargs)
                return run

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", counted(os.replace))
                patch.setattr(Path, "unlink", counted(Path.unlink))
                try:
                    save_state({"w": torch.zeros(4), "v": torch.zeros(4)}, folder, overwrite=True,
                               max_shard_size=new)
                except KeyboardInterrupt:
                    pass
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = load_state(folder)
            except ValueError:
                continue
            assert {float(t.mean()) for t in found.values()} in ({0.0}, {1.0})


# ------------------------------------------------------------------ what is carried along


def test_tokenizers_of_all_kinds_are_carried_along(tmp_path):
    needed = {
        "bpe.codes": "a b", "vocab.txt": "a", "source.spm": "s", "target.spm": "t", "dict.txt": "d",
        "spiece.model": "m", "qwen.tiktoken": "q", "prophetnet.tokenizer": "p", "vocab": "v",
        "tokenization_mine.py": "code", "chat_template.jinja": "{{ x }}", "LICENSE": "free",
        "preprocessor_config.json": "{}", "processor_config.json": "{}", "emoji.json": "{}",
        "additional_chat_templates/rag.jinja": "{{ y }}", "language_model/5gram.bin": "lm",
        "speaker_embeddings/a.npy": "e",
    }
    left = {
        "README.md": "card", "trainer_state.json": "{}", "optimizer.pt": "x", "rng_state.pth": "x",
        "pytorch_model.bin": "x", "training_args.bin": "x", "eval_results.json": "{}",
        "pytorch_model.bin.index.json": "{}", "model.onnx": "x", "latest": "global_step1",
        "events.out.tfevents.1": "x", "global_step1/x.pt": "x", ".gitattributes": "x",
        "train.log": "x",
    }
    a = checkpoint(tmp_path / "a", **needed, **left)
    out = average_checkpoints([a, a], tmp_path / "out")
    assert all_files(out).keys() == {*needed, "config.json", "model.safetensors"}
    assert all(all_files(out)[n] == text.encode() for n, text in needed.items())


def test_a_tokenizer_with_bpe_codes_loads(tmp_path):
    from transformers import AutoTokenizer, PhobertTokenizer

    (tmp_path / "vocab.txt").write_text("a 1\nb 1\n")
    (tmp_path / "bpe.codes").write_text("#version: 0.2\na b 1\n")
    for name in "ab":
        recipes.tiny_bert().save_pretrained(tmp_path / name)
        tokenizer = PhobertTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "bpe.codes"))
        tokenizer.save_pretrained(tmp_path / name)
    out = average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    ids = [AutoTokenizer.from_pretrained(f)("a b a")["input_ids"] for f in (tmp_path / "a", out)]
    assert ids[0] == ids[1]


def test_modules_with_weights_of_their_own(tmp_path):
    "A sentence encoder with a dense layer behind the model: carried if equal, refused if not."
    modules = json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}])
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        checkpoint(tmp_path / name, **{"modules.json": modules, "1_Pooling/config.json": "{}"})
        (tmp_path / name / "2_Dense").mkdir()
        save_file({"w": torch.full((2,), value)}, tmp_path / name / "2_Dense" / "model.safetensors")
    out = average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert load_state(out / "2_Dense")["w"].tolist() == [1, 1]
    assert (out / "1_Pooling" / "config.json").exists()
    with pytest.raises(ValueError, match="2_Dense.*holds weights of its own, and differs"):
        average_checkpoints([tmp_path / "a", tmp_path / "c"], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


# ------------------------------------------------------------------ the same shapes, another model


def tokenizer_json(ids, **more):
    return json.dumps({"model": {"vocab": ids, "merges": []}, "added_tokens": [
        {"id": 5, "content": "<pad>"}], "truncation": None, **more})


DIFFERENT = [
    ({"config.json": '{"num_attention_heads": 4}'}, {"config.json": '{"num_attention_heads": 8}'},
     r"config.num_attention_heads \(4 and 8\)"),
    ({"config.json": '{"id2label": {"0": "neg", "1": "pos"}}'},
     {"config.json": '{"id2label": {"0": "pos", "1": "neg"}}'}, "id2label.0"),
    ({"config.json": '{"rope_theta": 10000.0}'}, {"config.json": '{"rope_theta": 500000.0}'},
     "rope theta"),
    ({"config.json": '{"rope_theta": 10000.0, "rope_scaling": null}'},
     {"config.json": '{"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear"}}'},
     "rope type"),
    ({"config.json": '{"text_config": {"hidden_act": "silu"}}'},
     {"config.json": '{"text_config": {"hidden_act": "gelu"}}'}, "text_config.hidden_act"),
    ({"tokenizer.json": tokenizer_json({"a": 0, "b": 1})},
     {"tokenizer.json": tokenizer_json({"a": 1, "b": 0})}, "tokenizer.vocab"),
    ({"vocab.txt": "a\nb\n"}, {"vocab.txt": "b\na\n"}, "tokenizer.vocab.txt"),
    ({"spiece.model": "x"}, {"spiece.model": "y"}, "tokenizer.spiece.model"),
    ({"tokenizer_config.json": '{"do_lower_case": true}'},
     {"tokenizer_config.json": '{"do_lower_case": false}'}, "do_lower_case"),
    ({"adapter_config.json": '{"lora_alpha": 8}'}, {"adapter_config.json": '{"lora_alpha": 16}'},
     "lora_alpha"),
    ({"preprocessor_config.json": '{"image_mean": [0.5]}'},
     {"preprocessor_config.json": '{"image_mean": [0.4]}'}, "image_mean"),
    ({"1_Pooling/config.json": '{"pooling_mode": "cls"}'},
     {"1_Pooling/config.json": '{"pooling_mode": "mean"}'}, "1_Pooling.pooling_mode"),
]


@pytest.mark.parametrize("mine, other, match", DIFFERENT)
def test_models_that_differ_are_warned_about(tmp_path, mine, other, match):
    a, b = checkpoint(tmp_path / "a", **mine), checkpoint(tmp_path / "b", **other)
    for call in (
        lambda: average_checkpoints([a, b], tmp_path / "out", overwrite=True),
        lambda: average_checkpoints([f / "model.safetensors" for f in (a, b)],
                                    tmp_path / "o.safetensors", overwrite=True),
        lambda: check_compatible(a, b),
        lambda: average([open_state(a), open_state(b)]),
    ):
        with pytest.warns(UserWarning, match=match):
            call()


ALIKE = [
    ({"config.json": '{"_name_or_path": "x", "torch_dtype": "float32", "attention_dropout": 0.1}'},
     {"config.json": '{"_name_or_path": "y", "torch_dtype": "bfloat16", "attention_dropout": 0}'}),
    ({"config.json": '{"id2label": {"0": "LABEL_0"}, "transformers_version": "4"}'},
     {"config.json": '{"id2label": {"0": "neg"}, "transformers_version": "5"}'}),
    ({"config.json": '{"rope_theta": 10000.0}'},
     {"config.json": '{"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}'}),
    ({"tokenizer.json": tokenizer_json({"a": 0, "b": 1})},
     {"tokenizer.json": tokenizer_json({"b": 1, "a": 0}, truncation={"max_length": 9})}),
    ({"config.json": '{"eos_token_id": 1}'}, {"config.json": '{"eos_token_id": [1, 2]}'}),
    ({"adapter_config.json": '{"target_modules": ["q", "k"]}'},
     {"adapter_config.json": '{"target_modules": ["k", "q"]}'}),
    ({"tokenizer.json": tokenizer_json({"a": 0})}, {"vocab.txt": "a"}),
]


@pytest.mark.parametrize("mine, other", ALIKE)
def test_harmless_differences_are_not_mentioned(tmp_path, mine, other):
    a, b = checkpoint(tmp_path / "a", **mine), checkpoint(tmp_path / "b", **other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average_checkpoints([a, b], tmp_path / "out")


# ------------------------------------------------------------------ refusals


def test_broken_checkpoints(tmp_path):
    folder = save_state({"a": torch.ones(9), "b": torch.ones(9)}, tmp_path / "ok", max_shard_size=1)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())

    def write(**changes):
        weight_map = {**content["weight_map"], **changes}
        index.write_text(json.dumps({**content, "weight_map": weight_map}))

    write(c="model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="lacks tensors of the index: c"):
        open_state(folder)
    for file in ("model-00003-of-00002.safetensors", "../secret.safetensors"):
        write(a=file)
        with pytest.raises(ValueError, match="files that are not there"):
            open_state(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match="is no index of shards"):
        open_state(folder)
    index.unlink()
    with pytest.raises(ValueError, match="but not their index"):
        open_state(folder)
    data = (folder / "model-00001-of-00002.safetensors").read_bytes()
    for broken in (data[:-3], data[:5], b"", data + b"xx"):
        (tmp_path / "x.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="damaged"):
            open_state(tmp_path / "x.safetensors")
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="pickled"):
        open_state(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: open_state("/no/such/file"), FileNotFoundError, "does not exist"),
        (lambda: save_state({"w": torch.ones(2)}, "x", max_shard_size="5 apples"), ValueError,
         "200MB"),
        (lambda: save_state({"w": torch.ones(2)}, "x", max_shard_size=0), ValueError, "positive"),
        (lambda: save_state({"w": torch.ones(2)}, "x", like="/no/such"), ValueError,
         "checkpoint folder"),
        (lambda: check_compatible({"w": torch.ones(2)}, {"v": torch.ones(2)}), ValueError,
         "v is only in state 1"),
    ],
)
def test_wrong_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ------------------------------------------------------------------ memory

MEMORY = """
import json, sys
import torch
from adaptlab.checkpoints import *
from adaptlab.weights import *

def status(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024

def peak(work):  # bytes of anonymous, file and shared pages together, above what was there
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
    work()
    return status("VmHWM") - before

k = int(sys.argv[1])
save_state({"w": torch.ones(9)}, "tiny.safetensors", overwrite=True)
average_checkpoints(["tiny.safetensors"] * 2, "tiny.safetensors", overwrite=True)  # libraries
ways = {
    "average": lambda: average_checkpoints(map(str, range(k)), "out", max_shard_size="20MB"),
    "transfer": lambda: save_state(
        add(open_state("0"), task_vector(open_state("1"), open_state("0"), lazy=True), lazy=True),
        "t"),
    "cosine": lambda: cosine(open_state("0"), open_state("1")),
}
print(json.dumps({name: peak(work) for name, work in ways.items()}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_of_streams(tmp_path, dtype):
    "At most k + 2 times the largest tensor; in truth far less than one, for any k."
    entries = 4_000_000
    weights.PIECE, old = 1 << 20, weights.PIECE
    for i in range(4):
        save_state({f"w{j}": torch.full((entries,), i + j / 7, dtype=dtype) for j in range(4)},
                   tmp_path / f"{i}", max_shard_size="20MB")
    weights.PIECE = old
    largest = entries * dtype.itemsize
    for k in (2, 4):
        subprocess.run(["rm", "-rf", "out", "t"], cwd=tmp_path, check=True)
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEMORY), str(k)], cwd=tmp_path,
            capture_output=True, text=True, check=True,
        )
        for name, peak in json.loads(run.stdout).items():
            operands = k if name == "average" else 2
            assert peak <= (operands + 2) * largest, (name, peak / largest)
            assert peak <= 32e6, (name, peak)  # whatever the size: pieces, and what malloc keeps
    mean = open_state(tmp_path / "out")["w3"]
    assert torch.allclose(mean.float(), torch.tensor(1.5 + 3 / 7), atol=1e-2)
