"""recipes: small models, what they refuse, trained once and the same each time."""
import json

import pytest
import torch
from torch import nn

from adaptlab import cache, data, recipes

# small models

@pytest.mark.parametrize("make, shape", [
    (recipes.MLP, (3, 1, 28, 28)),
    (lambda: recipes.MLP((64, 10)), (3, 1, 8, 8)),
    (recipes.SmallCNN, (3, 1, 28, 28)),
    (recipes.SmallCNN, (3, 1, 8, 8)),
    (lambda: recipes.SmallCNN((4,), 3, 3), (3, 3, 32, 24)),
    (recipes.TinyViT, (3, 1, 28, 28)),
    (lambda: recipes.TinyViT(8, 2, 16, 1, 2, 5, 3), (3, 3, 8, 8)),
])
def test_classifiers(make, shape):
    torch.manual_seed(0)
    model = make().eval()
    x = torch.rand(shape)
    logits = model(x)
    assert logits.shape == (3, model.head.out_features)
    assert torch.equal(logits, model.head(model.features(x)))
    assert model.features(x).shape == (3, model.head.in_features)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("call, match", [
    (lambda: recipes.MLP((5,)), "sizes"),
    (lambda: recipes.MLP((5, 0)), "sizes"),
    (lambda: recipes.SmallCNN(()), "channels"),
    (lambda: recipes.SmallCNN((8, 1.5)), "channels"),
    (lambda: recipes.SmallCNN(n_classes=0), "n_classes"),
    (lambda: recipes.SmallCNN()(torch.rand(1, 1, 4, 4)), "sides >= 8"),
    (lambda: recipes.TinyViT(patch_size=5), "must divide"),
    (lambda: recipes.TinyViT(dim=65), "multiple of heads"),
    (lambda: recipes.TinyViT()(torch.rand(1, 1, 14, 14)), "images must be"),
    (lambda: recipes.tiny_llama(kv_heads=3), "must divide"),
    (lambda: recipes.tiny_llama(hidden_size=66), "multiple of heads"),
    (lambda: recipes.tiny_llama(layers=0), "layers"),
    (lambda: recipes.tiny_bert(hidden_size=65), "multiple of heads"),
    (lambda: recipes.tiny_bert(n_classes=0), "n_classes"),
])
def test_builders_refuse(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_byte_tokenizer_takes_any_text(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = recipes.byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("plain", "  two  blanks ", "naïve 東京 🙂\n\t", ""):
            ids = each(text).input_ids
            assert len(ids) == len(text.encode()) and each.decode(ids) == text


# trained once

def test_cached_is_deterministic_private_and_keyed_by_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path))
    calls = []

    def fit(model):
        calls.append(1)
        assert torch.is_grad_enabled() and torch.get_num_threads() == 1
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for _ in range(5):
            loss = (model(torch.randn(8, 3)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def make(recipe):
        return recipes.cached(recipe, lambda: nn.Linear(3, 2), fit)

    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        first = make({"lr": 0.1})
    with torch.inference_mode():
        again = make({"lr": 0.1})
    assert torch.equal(first.weight, again.weight) and len(calls) == 1 and not first.training
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
    for folder in (tmp_path / "small").glob("model-*"):
        cache._remove(folder)
    assert torch.equal(first.weight, make({"lr": 0.1}).weight) and len(calls) == 2
    assert not torch.equal(first.weight, make({"lr": 0.1, "seed": 1}).weight)
    saved = next((tmp_path / "small").glob("*/recipe.json"))
    assert json.loads(saved.read_text())["lr"] == 0.1
    for bad in ({"f": print}, {}, [1]):
        with pytest.raises(TypeError, match="recipe"):
            make(bad)


def test_cached_keeps_ties_and_buffers(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path))
    llama = recipes.cached({"name": "tied"}, recipes.tiny_llama, lambda m: None)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight

    def fit(model):
        model(torch.rand(16, 1, 8, 8))

    cnn = recipes.cached({"name": "cnn"}, recipes.SmallCNN, fit)
    again = recipes.cached({"name": "cnn"}, recipes.SmallCNN, None)
    assert cnn.blocks[0][1].num_batches_tracked == 1
    assert torch.equal(cnn.blocks[0][1].running_mean, again.blocks[0][1].running_mean)


def test_a_failed_fit_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path))

    def fit(model):
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        recipes.cached({"name": "x"}, lambda: nn.Linear(1, 1), fit)
    assert not list((tmp_path / "small").glob("x-*"))


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_recipes_learn_what_they_say(name):
    model = recipes.pretrained_small(name)
    train, held_out = (d.tensors for d in recipes.recipe_data(name))
    assert not model.training
    with torch.no_grad():
        assert recipes._loss(model, held_out).isfinite()
        if name == "charlm":
            assert recipes._loss(model, held_out).exp() < 6
        else:
            logits = model(*held_out[:-1])
            logits = getattr(logits, "logits", logits)
            assert (logits.argmax(-1) == held_out[-1]).float().mean() > 0.7
    seen = {tuple(t.flatten().tolist()) for t in train[0]}
    if name != "bert-languages":  # there a country may have the same name in two languages
        assert not any(tuple(t.flatten().tolist()) in seen for t in held_out[0][:200])


def test_recipe_trains_the_same_twice(tmp_path, monkeypatch):
    data.load("mnist5k")
    small = {"epochs": 1, "n_train": 640, "channels": (4, 4)}
    weights = []
    for place in ("a", "b"):
        with monkeypatch.context() as patch:
            patch.setenv("ADAPTLAB_CACHE", str(tmp_path / place))
            weights.append(recipes.pretrained_small("cnn-mnist", **small).state_dict())
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key])


def test_recipe_refuses():
    with pytest.raises(ValueError, match="did you mean 'cnn-mnist'"):
        recipes.pretrained_small("cnn-mnits")
    with pytest.raises(ValueError, match="'depth' can't be changed in 'cnn-mnist'"):
        recipes.pretrained_small("cnn-mnist", depth=3)
    with pytest.raises(ValueError, match="can't be changed"):
        recipes.pretrained_small("cnn-mnist", data="digits")
    with pytest.raises(TypeError, match="must be of type int"):
        recipes.recipe_data("cnn-mnist", n_train=0.5)
    with pytest.raises(ValueError, match="n_train"):
        recipes.recipe_data("cnn-mnist", n_train=5000)


def test_cached_leaves_every_generator_alone(tmp_path, monkeypatch):
    "GPUs have generators of their own, which `torch.manual_seed` would reseed."
    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path))
    seeded = []
    for module in (torch.cuda, torch.mps, torch.xpu):
        for name in ("manual_seed", "manual_seed_all"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda seed, where=module: seeded.append(where))
    state = torch.get_rng_state()
    recipes.cached({"name": "quiet"}, lambda: nn.Linear(2, 2), lambda model: torch.rand(3))
    recipes.cached({"name": "quiet"}, lambda: nn.Linear(2, 2), None)
    assert seeded == [] and torch.equal(torch.get_rng_state(), state)


def test_cached_trains_on_the_cpu_whatever_the_default_device_is(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path))
    with torch.device("meta"):
        model = recipes.cached({"name": "here"}, lambda: nn.Linear(2, 2), lambda model: None)
    assert model.weight.device.type == "cpu" and model.weight.isfinite().all()


def test_the_activation_of_a_vit_is_a_module_that_can_be_chosen():
    torch.manual_seed(0)
    smooth, sharp = recipes.TinyViT(dim=16, depth=1), recipes.TinyViT(dim=16, depth=1, act="relu")
    sharp.load_state_dict(smooth.state_dict())
    seen = {}
    for name, model in (("gelu", smooth), ("relu", sharp)):
        model.blocks[0].act.register_forward_hook(lambda m, i, o, n=name: seen.update({n: o}))
        model(torch.rand(2, 1, 28, 28))
    assert (seen["relu"] == 0).any() and (seen["relu"] >= 0).all() and (seen["gelu"] < 0).any()
    with pytest.raises(ValueError, match="act = 'elu'"):
        recipes.TinyViT(act="elu")
