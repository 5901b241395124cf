"""SignSym on a GPU: the CRF's numbers, SMALL with a stand-in model, FULL's encoder."""

import pytest
import tiny_models
import torch
import transformers

from adaptlab import models, recipes
from adaptlab.bench.runs import launch
from adaptlab.domain.signsym import CRFTagger, crf_log_z, crf_score, viterbi, word_states
from adaptlab.experiments.signsym import FULL, SMALL, made_sentences
from gpu.card import DEVICE, DRY, clock, row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_crf_agrees_with_float64(dtype):
    g = torch.Generator().manual_seed(0)
    u, A, s = (torch.randn(*shape, generator=g).to(dtype) for shape in ((8, 30, 5), (5, 5), (5,)))
    n = torch.randint(1, 31, (8,), generator=g)
    exact = crf_log_z(u.double(), A.double(), s.double(), n)
    there = [t.to(DEVICE) for t in (u, A, s, n)]
    found = crf_log_z(*there)
    assert found.device.type == DEVICE
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found.double().cpu(), exact, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        best = viterbi(*there)
        assert torch.equal(best.cpu(), viterbi(u.double(), A.double(), s.double(), n))
        assert (crf_score(there[0], best, *there[1:]) <= found + 1e-3).all()


def test_small_with_a_stand_in(tmp_path):
    name = tiny_models.roberta(tmp_path / "model")
    small = SMALL.replace(encoder=name, neighbor=name, seeds=(0,), sentences=20, steps=2,
                          device=DEVICE)
    assert launch("signsym", small, root=tmp_path, progress=False).claims


def test_tagger_of_a_model_on_the_card(tmp_path):
    "The encoder works there, the head here: the same spans as on the CPU."
    folder = tiny_models.roberta(tmp_path / "model")
    texts, spans = made_sentences(["fever", "dry cough", "rash"], ["I have {}"], 20, 0)
    said = [CRFTagger(tuple(models.load(folder, device=device, dtype="float32",
                                        task="feature-extraction"))).fit(
        texts, spans, steps=100, lr=0.05).predict(texts) for device in ("cpu", DEVICE)]
    same = sum(a == b for a, b in zip(*said, strict=True))
    assert same >= 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_shape(dtype):
    "BERT-base with random weights reads FULL's sentences."
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64} if DRY else {}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=28996, **sizes))
    encoder = (model.to(DEVICE, dtype).eval(), recipes.byte_tokenizer())
    texts, spans = made_sentences(["fever", "cough", "rash"], ["I have {}."],
                                  20 if DRY else FULL.sentences // 10, 0)
    row(f"FULL: {len(texts)} sentences, {dtype}", *clock(lambda: word_states(encoder, texts),
                                                       rounds=2, warm=1))
    assert CRFTagger(encoder).fit(texts, spans, steps=3).fitted
