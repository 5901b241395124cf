"""Decoders: chains of layers of different widths, by cache, by file, and no trace left."""

import pytest
import torch

from adaptlab import recipes
from adaptlab.decoders import (
    check_path,
    find_layers,
    layer_path,
    layer_shapes,
    layers_swapped,
    load_pruned,
    prune_kv_groups_,
    prune_mlp_,
    save_pruned,
)

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def ragged():
    torch.manual_seed(0)
    model = recipes.tiny_llama(vocab_size=64, hidden_size=48, heads=6, kv_heads=3, layers=3)
    prune_kv_groups_(model.model.layers[0].self_attn, [1])
    prune_mlp_(model.model.layers[2].mlp, range(7))
    return model


@pytest.mark.parametrize("path", [(0, 1, 2), (0, 0, 2, 1, 0), (2,)])
def test_narrow_layers_are_called_in_any_order(path, tmp_path):
    model = ragged()
    again = load_pruned(save_pruned(model, tmp_path / "m"), "cpu")
    assert layer_shapes(again) == layer_shapes(model) == [(1, 128), (3, 128), (3, 7)]
    before = model.config.to_dict()
    with layer_path(model, path), layer_path(again, path), torch.no_grad():
        whole = model(IDS, use_cache=False).logits
        assert torch.equal(again(IDS, use_cache=False).logits, whole)
        start = again(IDS[:, :5], use_cache=True)
        end = again(IDS[:, 5:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(end, whole[:, 5:], atol=1e-5, rtol=1e-5)
    assert model.config.to_dict() == before and len(find_layers(model).layers) == 3


def test_an_error_inside_puts_the_layers_back():
    model = ragged()
    stack = find_layers(model)
    with pytest.raises(RuntimeError), layers_swapped(model, stack, stack.layers[:1], (0,)):
        assert model.config.num_hidden_layers == 1
        raise RuntimeError
    assert model.model.layers is stack.layers and model.config.num_hidden_layers == 3


@pytest.mark.parametrize("path, kind, words", [
    ((), ValueError, "empty"), ((0, 3), ValueError, r"in 0\.\.2"), ((0, True), TypeError, "True"),
    ((0.0,), TypeError, "integers")])
def test_bad_paths_are_refused(path, kind, words):
    with pytest.raises(kind, match=words):
        check_path(path, 3)
