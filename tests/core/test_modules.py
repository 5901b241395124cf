"""Small truths about modules, on plain networks and on those of transformers."""

import copy
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptlab.modules import (
    call,
    cross_entropy,
    device_of,
    frozen,
    labels_of,
    layer_inputs,
    logits_of,
    modes_kept,
    replace,
    resolve_device,
    shifts_labels,
    to_device,
    untouched,
)

SMALL = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=8, n_embd=8, n_layer=2, n_head=2, d_model=8, d_ff=8, d_kv=4,
             num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0, num_labels=3)


def build(name):
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**SMALL)).eval()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(),
                         nn.Linear(8, 3))


# --- devices --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:1", 3.5, "xpu:7"])
def test_unknown_device_is_refused(name):
    with pytest.raises(ValueError, match="device = "):
        resolve_device(name)


def test_device_of_what_is_there():
    assert resolve_device("cpu") == device_of(net()) == device_of(nn.ReLU()) == torch.device("cpu")
    half = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))  # offloaded, and here
    assert device_of(half).type == "cpu"
    only_buffers = nn.BatchNorm1d(3, affine=False).to("meta")
    assert device_of(only_buffers).type == "meta"  # shapes only


def test_to_device_keeps_the_nesting():
    from transformers import BatchEncoding

    Pair = namedtuple("Pair", "a b")
    x = torch.ones(2)
    moved = to_device({"a": [x, (x, "s")], "b": Pair(x, None), "c": 3}, "meta")
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["a"][1][1] == "s"
    assert isinstance(moved["b"], Pair) and moved["b"].a.is_meta and moved["c"] == 3
    assert to_device(BatchEncoding({"input_ids": x}), "meta")["input_ids"].is_meta


# --- left as it was -------------------------------------------------------------------------------

def test_untouched_brings_everything_back():
    model = net().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = kept = torch.ones_like(model[4].weight)
    before = copy.deepcopy(model)
    buffer = model[1].running_mean
    with pytest.raises(KeyError), untouched(model):
        assert model[4].weight.grad is None
        model.train().requires_grad_(True)
        model(torch.randn(6, 4)).sum().backward()
        model[1].running_mean = torch.full((8,), 7.0)  # another tensor in its place
        assert int(model[1].num_batches_tracked) == 1
        raise KeyError
    assert model[4].weight.grad is kept and torch.equal(kept, torch.ones(3, 8))
    assert model[0].weight.grad is None and not model[0].weight.requires_grad
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert model[1].running_mean is buffer
    for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_frozen_puts_back_what_was_trained():
    model = net()
    model[0].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == flags


def test_modes_are_kept_one_by_one():
    model = net().train()
    model[3].eval()
    with modes_kept(model):
        model.eval()
    assert [m.training for m in model] == [True, True, True, False, True]


# --- running --------------------------------------------------------------------------------------

def test_call_takes_every_kind_of_batch():
    model, x, y = net().eval(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    expected = model(x)
    for batch in (x, (x, y), [x, y], (x,), {"input": x}, {"input": x, "labels": y}):
        assert torch.equal(call(model, batch), expected)
    with pytest.raises(ValueError, match="empty"):
        call(model, ())


def test_labels_are_given_only_where_inputs_come_from_them():
    ids = torch.randint(1, 20, (2, 5))
    causal, both = build("LlamaForCausalLM"), build("T5ForConditionalGeneration")
    assert call(causal, {"input_ids": ids, "labels": ids}).loss is None
    assert logits_of(call(both, {"input_ids": ids, "labels": ids})).shape == (2, 5, 20)
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :3], "labels": ids[:, :3]}
    assert call(both, given).loss is None


def test_logits_of_what_models_return():
    model, ids = build("GPT2LMHeadModel"), torch.randint(1, 20, (2, 5))
    expected = model(ids).logits
    for out in (expected, model(ids), {"logits": expected}, (expected, "cache"), [expected],
                model(ids, labels=ids, return_dict=False)):  # a loss comes first
        assert torch.equal(logits_of(out), expected)
    for out in ({"loss": 1}, build("BertModel")(ids), None, ()):
        with pytest.raises(TypeError, match="without logits"):
            logits_of(out)


def test_labels_of():
    y = torch.tensor([1])
    for batch in ({"labels": y}, (0, y), [0, y]):
        assert labels_of(batch) is y
    for batch in ({"x": y}, {"labels": [1]}, (y,), (1, 2, 3), y, "text"):
        with pytest.raises(ValueError, match="labels"):
            labels_of(batch)


@pytest.mark.parametrize("name", [
    "GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM", "BertForTokenClassification",
    "T5ForConditionalGeneration", "BertForSequenceClassification",
])
def test_loss_is_that_of_transformers(name):
    model, ids = build(name), torch.randint(1, 20, (3, 5))
    labels = torch.tensor([0, 1, 2])
    if "Sequence" not in name:
        labels = (ids % 3).index_fill(1, torch.tensor([2]), -100)
    batch = {"input_ids": ids, "labels": labels}
    torch.testing.assert_close(cross_entropy(model, batch), model(**batch).loss)


def test_loss_of_pairs():
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    model = net().eval()
    assert torch.equal(cross_entropy(model, (x, y)), F.cross_entropy(model(x), y))
    pixels, marks = torch.randn(2, 4, 3, 3), torch.randint(0, 5, (2, 3, 3))
    segment = nn.Conv2d(4, 5, 1)  # classes come second
    assert torch.equal(cross_entropy(segment, (pixels, marks)),
                       F.cross_entropy(segment(pixels), marks))
    half = copy.deepcopy(model).bfloat16()
    assert cross_entropy(half, (x.bfloat16(), y)).dtype == torch.float32


def test_shifts_labels_of_a_plain_module():
    assert not shifts_labels(net()) and shifts_labels(build("GPT2LMHeadModel"))


# --- what layers take in --------------------------------------------------------------------------

def test_layer_inputs_are_those_of_hidden_states():
    model, ids = build("LlamaForCausalLM"), torch.randint(1, 20, (2, 5))
    states = model(ids, output_hidden_states=True).hidden_states
    seen = layer_inputs(model, ["model.layers.1", "lm_head"], {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(seen["model.layers.1"], states[1])
    torch.testing.assert_close(seen["lm_head"], states[-1])
    assert list(seen) == ["model.layers.1", "lm_head"]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_nothing_behind_the_last_layer_runs():
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("must not be reached")

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Never())
    assert layer_inputs(model, "1", torch.ones(1, 4))["1"].shape == (1, 4)
    with pytest.raises(AssertionError):  # an error of the model is not swallowed
        layer_inputs(nn.Sequential(Never(), nn.ReLU()), "1", torch.ones(1, 4))


def test_layers_that_are_not_there():
    model = net()
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential.forward(net(), x)
    with pytest.raises(ValueError, match="'spare' is not run"):
        layer_inputs(model, "spare", torch.ones(2, 4))
    with pytest.raises(ValueError, match="no layer 'spar'.*spare"):
        layer_inputs(model, "spar", torch.ones(2, 4))
    with pytest.raises(ValueError, match="at least one"):
        layer_inputs(model, [], torch.ones(2, 4))


def test_a_module_is_replaced_wherever_it_hangs():
    shared, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, other)})
    other.eval()
    new, newer = nn.Linear(2, 2), nn.Linear(2, 2)
    replace(model, {shared: new, other: newer})
    assert model["a"] is new and list(model["b"]) == [new, newer]
    assert new.training and not newer.training
    with pytest.raises(ValueError, match="Linear.*inside"):
        replace(model, {new: shared, other: shared})  # `other` is gone: nothing changes
    assert model["a"] is new
    with pytest.raises(ValueError, match="inside"):
        replace(model, {model: shared})
