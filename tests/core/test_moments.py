"""Second moments: what is counted, which layers share one, and that no trace is left."""

import warnings

import pytest
import torch
import transformers
from calibration import inputs, llama, token_batches
from torch import nn

from adaptlab import recipes
from adaptlab.moments import Covariance, collect_covariance, linear_layers


def test_covariance_is_a_running_mean_and_leaves_padding_out():
    x = inputs(6 * 10, 8).view(6, 10, 8)
    keep = torch.arange(10) >= torch.tensor([0, 3, 7, 0, 5, 9])[:, None]  # padding on the left
    once = Covariance.zeros(8).add(x, keep)
    stream = Covariance.zeros(8)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        stream.add(x[rows], keep[rows])
    torch.testing.assert_close(once.matrix, stream.matrix, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(once.abs_total, stream.abs_total, rtol=1e-5, atol=1e-6)
    rows = x[keep].double()
    torch.testing.assert_close(once.matrix, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert once.tokens == int(keep.sum()) and once.samples == 6
    assert torch.equal(once.matrix, once.matrix.T) or torch.allclose(once.matrix, once.matrix.T)
    assert torch.linalg.eigvalsh(once.matrix).min() > -1e-6
    single = Covariance.zeros(8).add(x[0, 0])
    assert single.tokens == single.samples == 1


@pytest.mark.filterwarnings("ignore:.*rank-deficient")
def test_collection_ignores_padding_whatever_stands_there():
    model, ids = llama(), token_batches(1, 20)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    other = torch.where(mask.bool(), ids, 7)
    a, b = (collect_covariance(model, [{"input_ids": i, "attention_mask": mask}])
            for i in (ids, other))
    for name in a:
        torch.testing.assert_close(a[name].matrix, b[name].matrix)
        assert a[name].tokens == 32


def test_layers_that_share_an_input_share_a_covariance():
    model = llama()
    found = collect_covariance(model, token_batches())
    assert len(found) == 14 and len({id(c) for c in found.values()}) == 8
    block = "model.layers.0."
    assert found[block + "self_attn.q_proj"] is found[block + "self_attn.v_proj"]
    assert found[block + "mlp.gate_proj"] is found[block + "mlp.up_proj"]
    assert found[block + "self_attn.o_proj"] is not found[block + "self_attn.q_proj"]


class Fork(nn.Module):
    "Two layers on one input, on two inputs, or with a change in between."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        first = self.a(x)
        if self.calls == 2:
            x = 2 * x
        if self.calls == 3:
            x.mul_(3)
        return first + self.b(x)


def test_sharing_is_given_up_when_the_inputs_part():
    batches = [torch.randn(5, 6) for _ in range(4)]
    total = {"a": 0, "b": 0}
    for i, x in enumerate(batches):
        x = x.double()
        total["a"] = total["a"] + x.T @ x
        total["b"] = total["b"] + {1: 4.0, 2: 9.0}.get(i, 1.0) * x.T @ x
    found = collect_covariance(Fork(), [x.clone() for x in batches])
    for name in "ab":
        torch.testing.assert_close(found[name].total, total[name], rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="rank-deficient"):
        shared = collect_covariance(Fork(), batches[:1])
    assert shared["a"] is shared["b"]


def test_a_module_that_runs_twice_counts_twice():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(10, 4)
    found = collect_covariance(model, [x])["0"]
    rows = torch.cat([x, layer(x).relu()]).double()
    torch.testing.assert_close(found.total, (rows.T @ rows).detach(), rtol=1e-4, atol=1e-5)


def test_collection_leaves_no_trace_even_when_it_fails():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    model[2].eval()
    x = torch.randn(30, 4)
    dropped = collect_covariance(model, [x])
    still = collect_covariance(model.eval(), [x])
    torch.testing.assert_close(dropped["2"].matrix, still["2"].matrix)
    model.train()
    model[2].eval()
    bad = x.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match="'0'.*NaN"):
        collect_covariance(model, [x, bad])
    assert [m.training for m in model] == [True, True, False]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled() and model[0].weight.requires_grad


def test_blocks_behind_the_last_layer_run_in_the_first_batch_only():
    model, ran = llama(layers=3, tie=False), []
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    found = collect_covariance(model, token_batches(3), ["layers.1.mlp.up_proj"])
    assert ran == [0, 1, 2, 0, 0]  # the last layer stands in block 1, which does not end
    everywhere = collect_covariance(model, token_batches(3))
    for name, one in found.items():
        torch.testing.assert_close(one.matrix, everywhere[name].matrix)
        assert one.tokens == 3 * 48


def test_a_layer_that_runs_twice_is_never_cut_short():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    batches = [torch.randn(10, 4) for _ in range(3)]
    found = collect_covariance(model, batches)["0"]
    assert found.tokens == 60


def relative(a, b):
    return float((a.matrix - b.matrix).norm() / b.matrix.norm())


def test_sample_max_does_not_depend_on_the_batching():
    "OPT hands its fc1 the tokens of all sequences as one long list."
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32)).eval()
    ids = torch.randint(5, 64, (3, 40))
    for layer in ("layers.0.self_attn.q_proj", "layers.0.fc1"):
        one, three = (next(iter(collect_covariance(model, b, [layer], "sample_max").values()))
                      for b in ([{"input_ids": r[None]} for r in ids], [{"input_ids": ids}]))
        assert one.samples == three.samples == 3
        assert relative(one, three) < 1e-5


def seq2seq(kind, ids, decoder_length=6):
    torch.manual_seed(0)
    if kind == "t5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
            decoder_start_token_id=0))
    else:
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_position_embeddings=64))
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]]),
             "decoder_input_ids": ids[:, :1].expand(2, decoder_length).contiguous()}
    return model.eval(), batch


@pytest.mark.filterwarnings("ignore:.*rank-deficient")
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_takes_sequences_of_one_length(kind):
    model, batch = seq2seq(kind, torch.randint(5, 64, (2, 6)), 5)
    with pytest.raises(ValueError, match="without padding"):
        collect_covariance(model, [batch])
    batch["attention_mask"] = torch.ones(2, 6).long()
    for name, c in collect_covariance(model, [batch]).items():
        cross = "EncDecAttention.k" in name or "EncDecAttention.v" in name or (
            "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name)
        decodes = name.startswith(("decoder", "model.decoder")) and not cross
        assert c.tokens == (10 if decodes else 12), name


@pytest.mark.filterwarnings("ignore:.*rank-deficient")
def test_inputs_that_are_no_tokens_count_whole_and_are_named():
    torch.manual_seed(0)
    model = transformers.DebertaModel(transformers.DebertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, relative_attention=True, pos_att_type=["c2p", "p2c"],
        max_relative_positions=8, max_position_embeddings=32, type_vocab_size=0)).eval()
    ids = torch.randint(3, 64, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])}
    with pytest.warns(UserWarning, match="pos_.*take in no tokens of the attention mask"):
        found = collect_covariance(model, [batch])
    by = {name.rpartition(".")[2]: c.tokens for name, c in found.items()}
    assert by["in_proj"] == 8 and by["pos_proj"] > 0


def test_first_blocks_of_models_that_run_them_all():
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4)).eval()
    ids = torch.randint(5, 64, (2, 40))
    seen = []
    layer = model.gpt_neox.layers[0].attention.query_key_value
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    found = collect_covariance(model, [{"input_ids": ids}], ["layers.0.attention.query_key_value"])
    handle.remove()
    rows = seen[0].flatten(0, 1).double()
    (c,) = found.values()
    torch.testing.assert_close(c.matrix, rows.T @ rows / 80, rtol=1e-4, atol=1e-5)


def test_masks_that_do_not_fit():
    model, ids = llama(), token_batches(1)[0]["input_ids"]
    with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
        collect_covariance(model, [{"input_ids": ids, "attention_mask": torch.ones(2, 1, 24, 24)}])
    bert = recipes.tiny_bert(hidden_size=16, layers=1, n_classes=2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, 9:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_covariance(bert, [batch])
    assert found["bert.pooler.dense"].tokens == 2  # one vector per sequence
    assert found["bert.encoder.layer.0.intermediate.dense"].tokens == 33


def test_all_linear_layers_but_the_head_unless_named():
    names = list(linear_layers(llama(tie=False), None))
    assert len(names) == 14 and not any("lm_head" in name for name in names)
    assert list(linear_layers(llama(tie=False), ["lm_head"])) == ["lm_head"]


@pytest.mark.parametrize("call, says", [
    (lambda: Covariance.zeros(8).add(torch.randn(3, 7)), "7 channels"),
    (lambda: Covariance.zeros(8).add(torch.full((3, 8), torch.inf)), "inf"),
    (lambda: Covariance.zeros(8, "cpu", True).add(torch.zeros(3, 8)), "max"),
    (lambda: Covariance.zeros(8).matrix, "no tokens"),
    (lambda: collect_covariance(llama(), token_batches(), normalize="max"), "normalize"),
    (lambda: collect_covariance(llama(), []), "no calibration batches"),
])
def test_what_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
