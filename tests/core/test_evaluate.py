"""Evaluation against scikit-learn, scipy and plain loops; padding, batching and bad input."""

import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import nn

from adaptlab import evaluate, models
from adaptlab.evaluate import Estimate

TOKENIZER = models.byte_tokenizer()


def make_llama(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.tiny_llama(hidden_size=32, layers=2)


def make_gpt2(seed=0):
    "Absolute positions: padding in the wrong place would shift them."
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=260, n_positions=128, n_embd=32, n_layer=2, n_head=2,
                        bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


class Plain(nn.Module):
    "A model whose forward knows nothing of `logits_to_keep`; counts its rows."

    def __init__(self, model):
        super().__init__()
        self.model, self.rows = model, 0

    def forward(self, input_ids, attention_mask=None):
        self.rows += len(input_ids)
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.fixture(params=[make_llama, make_gpt2, lambda: Plain(make_llama())],
                ids=["llama", "gpt2", "plain"])
def lm(request):
    return request.param()


def token_log_probs(model, ids):
    "The plain way: one row, all positions. [length - 1]"
    with torch.no_grad():
        logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
    return logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def random_logits(n=300, classes=7, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator)
    labels = torch.distributions.Categorical(logits=logits / scale).probs.multinomial(
        1, generator=generator)[:, 0]
    return logits, labels


# --- estimates ------------------------------------------------------------------------------------

def test_estimate_prints_and_scales():
    e = Estimate(0.9123, 0.88, 0.94, 10)
    assert f"{e}" == str(e) == repr(e) == "0.912 [0.880, 0.940]"
    assert f"{100 * e:.1f}" == "91.2 [88.0, 94.0]" and str(100 * e) == "91.2 [88.0, 94.0]"
    flipped = -1 * e
    assert flipped.low == -0.94 < flipped.value < flipped.high == -0.88 and float(e) == 0.9123


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=200)
    for statistic in (np.mean, np.median, np.std):
        ours = evaluate.bootstrap(values, statistic, n_resamples=4000)
        theirs = scipy.stats.bootstrap((values,), statistic, n_resamples=4000, method="percentile",
                                       rng=np.random.default_rng(1)).confidence_interval
        assert ours.value == pytest.approx(statistic(values)) and ours.n == 200
        assert ours.low == pytest.approx(theirs.low, abs=0.02)
        assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_bootstrap_of_rows_large_input_and_seed():
    ratio = lambda pairs, axis: pairs.sum(axis)[..., 0] / pairs.sum(axis)[..., 1]  # noqa: E731
    pairs = np.stack([np.full(50, 3.0), np.full(50, 2.0)], 1)
    assert vars(evaluate.bootstrap(pairs, ratio)) == dict(value=1.5, low=1.5, high=1.5, n=50)
    big = torch.arange(300_000) % 2  # chunks of a few resamples
    estimate = evaluate.bootstrap(big, n_resamples=50)
    assert estimate.low < 0.5 < estimate.high and estimate.high - estimate.low < 0.01
    a, b, c = (evaluate.bootstrap(np.arange(9), seed=s) for s in (0, 0, 1))
    assert a == b != c
    one = evaluate.bootstrap([4.0])
    assert one.low == one.value == one.high == 4.0


def test_over_seeds_is_the_t_interval():
    values = [0.7, 0.8, 0.75, 0.71]
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    estimate = evaluate.over_seeds(values)
    assert (estimate.low, estimate.high) == pytest.approx((low, high)) and estimate.n == 4


def test_paired_difference_is_tighter_than_two_intervals():
    rng = np.random.default_rng(0)
    common = rng.normal(size=300)
    a, b = common + 0.2 + 0.1 * rng.normal(size=300), common
    difference = evaluate.paired_difference(torch.tensor(a), b)
    assert difference.low > 0.15 and difference.high < 0.25
    assert evaluate.bootstrap(a).low < evaluate.bootstrap(b).high
    assert evaluate.paired_difference([True, False], [True, False]).value == 0.0


@pytest.mark.parametrize("call", [
    lambda: evaluate.bootstrap([]), lambda: evaluate.bootstrap(3.0),
    lambda: evaluate.bootstrap([1.0, np.inf]), lambda: evaluate.bootstrap([1.0], n_resamples=0),
    lambda: evaluate.paired_difference([1.0, 2.0], [1.0]),
    lambda: evaluate.paired_difference([[1.0]], [[1.0]]),
    lambda: evaluate.over_seeds([1.0]), lambda: evaluate.over_seeds([1.0, np.nan]),
])
def test_bad_values(call):
    with pytest.raises(ValueError):
        call()


# --- classification -------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_f1_and_accuracy_agree_with_sklearn(pairs):
    preds, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))
    expected = f1_score(labels, preds, average="macro", zero_division=0)
    found = evaluate.macro_f1(preds, labels, n_resamples=20)
    assert found.value == pytest.approx(expected)
    assert evaluate.accuracy(preds, labels, n_resamples=20).value == pytest.approx(
        (preds == labels).double().mean().item())


def test_f1_interval_is_that_of_a_plain_loop():
    logits, labels = random_logits()
    preds = logits.argmax(1).numpy()
    rng = np.random.default_rng(0)
    loop = [f1_score(labels.numpy()[rows], preds[rows], average="macro")
            for rows in rng.integers(0, 300, (200, 300))]
    found = evaluate.macro_f1(logits, labels, n_resamples=200)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(loop, [0.025, 0.975])))


@pytest.mark.parametrize("n_bins", [1, 10, 15])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_ece_is_that_of_a_plain_loop(n_bins, temperature):
    logits, labels = random_logits()
    confidence, preds = (logits.double() / temperature).softmax(1).max(1)
    expected = 0.0
    for i in range(n_bins):
        inside = (confidence > i / n_bins) & (confidence <= (i + 1) / n_bins)
        if inside.any():
            gap = (preds == labels)[inside].double().mean() - confidence[inside].mean()
            expected += inside.double().mean().item() * abs(gap.item())
    found = evaluate.expected_calibration_error(logits, labels, n_bins, temperature)
    assert found.value == pytest.approx(expected) and 0 <= found.low <= found.value <= found.high
    table = evaluate.reliability(logits, labels, n_bins, temperature)
    assert table["n"].sum() == 300 and (table["confidence"] <= table["high"] + 1e-12).all()
    assert (table["confidence"] >= table["low"]).all()


def test_ece_interval_is_honest_for_a_calibrated_model():
    "True labels are drawn from the stated probabilities: the error is noise, the interval near 0."
    probs = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.5
    labels = (torch.rand(2000, generator=torch.Generator().manual_seed(1)) > probs[:, 0]).long()
    logits = torch.cat([probs, 1 - probs], 1).log()
    assert evaluate.expected_calibration_error(logits, labels, 10).low < 0.01


def test_nll_and_temperature():
    logits, labels = random_logits(2000)
    assert evaluate.nll(logits, labels, 2.0).value == pytest.approx(
        F.cross_entropy(logits.double() / 2, labels).item())
    best = evaluate.fit_temperature(logits, labels)
    assert best == pytest.approx(2.0, rel=0.1)  # the labels were drawn at temperature 2
    below, at, above = (evaluate.nll(logits, labels, best * f).value for f in (0.99, 1.0, 1.01))
    assert at < min(below, above)
    assert evaluate.fit_temperature(logits.bfloat16(), labels) == pytest.approx(best, rel=0.01)
    with pytest.warns(UserWarning, match="no finite temperature"):
        assert evaluate.fit_temperature(10 * torch.eye(3), torch.arange(3)) == pytest.approx(0.001)


@pytest.mark.parametrize("function", [
    evaluate.accuracy, evaluate.macro_f1, evaluate.nll, evaluate.expected_calibration_error,
    evaluate.fit_temperature, evaluate.reliability])
@pytest.mark.parametrize("logits, labels, error", [
    (torch.randn(4, 3), [0, 1, 2], ValueError), (torch.randn(4, 3), [0, 1, 2, 3], ValueError),
    (torch.randn(4, 3), [0, 1, -1, 2], ValueError),
    (torch.randn(0, 3), [], (ValueError, TypeError)),
    (torch.full((2, 3), torch.nan), [0, 1], ValueError), (torch.randn(2, 3, 4), [0, 1], ValueError),
    (torch.randn(2, 3) / 0, [0, 1], ValueError), (torch.randn(2, 3), [0.0, 1.0], TypeError),
    (torch.randn(2), [0, 1], ValueError), (torch.randn(2, 3), [[0], [1]], ValueError),
])
def test_bad_predictions(function, logits, labels, error):
    with pytest.raises(error):
        function(logits, labels)


def test_bad_temperature_and_bins():
    logits, labels = random_logits()
    for t in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            evaluate.nll(logits, labels, t)
    with pytest.raises(ValueError, match="n_bins"):
        evaluate.reliability(logits, labels, 0)


# --- predict --------------------------------------------------------------------------------------

def test_predict_batches_and_restores_modes():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.9), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[2].eval()
    x = torch.randn(50, 4)
    modes = [m.training for m in model.modules()]
    out = evaluate.predict(model, x, batch_size=7)
    assert [m.training for m in model.modules()] == modes == [True, True, True, False, True]
    assert torch.allclose(out, evaluate.predict(model, x, batch_size=50), atol=1e-6)
    assert out.dtype == torch.float32 and not out.is_inference()
    with pytest.raises(RuntimeError):
        evaluate.predict(model, torch.randn(5, 9))
    assert [m.training for m in model.modules()] == modes


def test_predict_with_a_dict_and_bf16():
    bert = models.tiny_bert(n_classes=3).to(torch.bfloat16)
    ids = torch.randint(4, 260, (9, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out = evaluate.predict(bert, batch, batch_size=4)
    assert out.shape == (9, 3) and out.dtype == torch.float32


@pytest.mark.parametrize("x, kwargs", [
    (torch.zeros(0, 4), {}), ({"a": torch.zeros(3), "b": torch.zeros(2)}, {}),
    (torch.zeros(3, 4), {"batch_size": 0})])
def test_predict_bad_input(x, kwargs):
    with pytest.raises(ValueError):
        evaluate.predict(nn.Linear(4, 2), x, **kwargs)


# --- perplexity -----------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(st.integers(2, 200), st.integers(2, 50), st.data())
def test_windows_score_each_token_once(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    spans = evaluate.windows(length, window, stride)
    scored = [t for _, end, n in spans for t in range(end - n, end)]
    assert scored == list(range(1, length))
    assert all(0 <= start and 0 < n < end - start <= window for start, end, n in spans)
    assert all(end - n - start >= window - stride for start, end, n in spans[1:])  # context


def test_perplexity_is_that_of_a_plain_loop(lm):
    ids = torch.randint(0, 260, (101,), generator=torch.Generator().manual_seed(0))
    losses, done = [], 0
    for end in range(24, 101 + 9, 9):  # every token with at least 15 tokens of context
        end = min(end, 101)
        log_probs = token_log_probs(lm, ids[max(0, end - 24) : end])
        losses.append(-log_probs[-(end - done) :] if done else -log_probs)
        done = end
    expected = torch.cat(losses).double().mean().exp().item()
    assert sum(map(len, losses)) == 100
    for batch_size in (1, 3, 16):
        found = evaluate.perplexity(lm, ids, window=24, stride=9, batch_size=batch_size)
        assert found.value == pytest.approx(expected, rel=1e-5)
        assert found.low <= found.value <= found.high


def test_perplexity_within_one_window_is_the_models_own_loss():
    lm = make_llama()
    ids = torch.randint(0, 260, (3, 20))
    with torch.no_grad():
        expected = math.exp(lm(input_ids=ids, labels=ids).loss)
    assert evaluate.perplexity(lm, ids).value == pytest.approx(expected, rel=1e-5)


def test_padding_and_order_do_not_change_losses(lm):
    texts = ["short", "a text of some more words", "mid length", "x y"]
    together = evaluate.token_losses(lm, texts, TOKENIZER, batch_size=4)
    for text, losses in zip(texts, together, strict=True):
        ids = torch.tensor(TOKENIZER(text)["input_ids"])
        torch.testing.assert_close(losses, -token_log_probs(lm, ids), rtol=1e-4, atol=1e-5)
    assert [len(x) for x in together] == [len(t.encode()) - 1 for t in texts]
    alone = evaluate.perplexity(lm, texts[1], TOKENIZER)
    assert alone.value == pytest.approx(together[1].double().mean().exp().item(), rel=1e-5)


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    lm = make_llama()
    nn.init.zeros_(lm.lm_head.weight)
    estimate = evaluate.perplexity(lm, torch.randint(0, 260, (400,)), window=50)
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((260, 260, 260), rel=1e-4)


@pytest.mark.parametrize("ids, kwargs", [
    ([], {}), (torch.zeros(0, dtype=torch.long), {}), (torch.zeros(1, dtype=torch.long), {}),
    (torch.zeros(9, dtype=torch.long), {"window": 4, "stride": 4}),
    (torch.zeros(9, dtype=torch.long), {"window": 4, "stride": 0}),
    (torch.zeros(9, dtype=torch.long), {"window": 1}), ("a text", {}), (["a text"], {}),
    (torch.zeros(9, dtype=torch.long), {"batch_size": 0})])
def test_perplexity_bad_input(ids, kwargs):
    with pytest.raises(ValueError):
        evaluate.perplexity(make_llama(), ids, **kwargs)


# --- multiple choice and generation ---------------------------------------------------------------

ITEMS = [
    {"context": "The sky is", "choices": [" blue", " green as grass", " a"], "answer": 0},
    {"context": "Two plus two is ", "choices": ["four", "five"], "answer": 0},
    {"context": "", "choices": ["no context", "at all"], "answer": 1},
]


def test_choice_scores_are_those_of_a_plain_loop(lm):
    expected = []
    for item in ITEMS:
        row = []
        for choice in item["choices"]:
            ids = TOKENIZER(item["context"] + choice)["input_ids"]
            n = len(choice.encode()) + item["context"].endswith(" ")
            ids = ids if item["context"] else [TOKENIZER.bos_token_id, *ids]
            row.append(token_log_probs(lm, torch.tensor(ids))[-n:].sum())
        expected.append(torch.stack(row))
    for batch_size in (1, 2, 16):
        found = evaluate.choice_scores(lm, TOKENIZER, ITEMS, batch_size=batch_size)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    by_character = evaluate.choice_scores(lm, TOKENIZER, ITEMS, "character")
    torch.testing.assert_close(by_character[0] * torch.tensor([4, 14, 1]), expected[0])
    by_token = evaluate.choice_scores(lm, TOKENIZER, ITEMS, "token")
    torch.testing.assert_close(by_token[1] * torch.tensor([5, 5]), expected[1])
    right = [int(e.argmax()) == item["answer"] for e, item in zip(expected, ITEMS, strict=True)]
    assert evaluate.multiple_choice(lm, TOKENIZER, ITEMS).value == pytest.approx(np.mean(right))


def test_answers_of_one_token_share_a_forward_pass():
    lm = Plain(make_llama())
    item = {"context": "Answer:", "choices": ["A", "B", "C", "D"]}
    scores = evaluate.choice_scores(lm, TOKENIZER, [item])[0]
    assert lm.rows == 1
    ids = torch.tensor(TOKENIZER("Answer:A")["input_ids"])
    assert scores[0].item() == pytest.approx(token_log_probs(lm, ids)[-1].item(), rel=1e-4)


def test_tokens_across_the_border_belong_to_the_continuation():
    "A tokenizer that merges 'is' and 'n't' parts: the border falls inside a token."
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "it": 1, "is": 2, "isnt": 3, "nt": 4, "<unk>": 5}
    core = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    ids, count = evaluate._encode_continuation(tokenizer, "it is", "nt")
    assert ids.tolist() == [1, 3] and count == 1
    ids, count = evaluate._encode_continuation(tokenizer, "it is ", "nt")
    assert ids.tolist() == [1, 2, 4] and count == 1
    ids, count = evaluate._encode_continuation(tokenizer, "", "it is")
    assert ids.tolist() == [0, 1, 2] and count == 2


@pytest.mark.parametrize("items, normalize", [
    ([], "none"), ([{"context": "a", "choices": ["b"], "answer": 0}], "none"),
    ([{"choices": ["b", "c"], "answer": 0}], "none"),
    ([{"context": "a", "choices": ["b", "c"], "answer": 2}], "none"),
    ([{"context": "a", "choices": ["b", "c"]}], "none"),
    ([{"context": "a", "choices": ["b", ""], "answer": 0}], "none"),
    ([{"context": "a", "choices": ["b", "c"], "answer": 0}], "length")])
def test_multiple_choice_bad_input(items, normalize):
    with pytest.raises(ValueError):
        evaluate.multiple_choice(make_llama(), TOKENIZER, items, normalize)


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_generation_in_batches_is_generation_alone(make):
    lm = make()
    lm.generation_config.temperature = 0.3  # sampling settings of a model must not matter
    prompts = ["a", "a much longer prompt than the first", "mid prompt", "zz"]
    alone = []
    for prompt in prompts:
        ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
        for _ in range(8):  # the plain way: append the likeliest token
            with torch.no_grad():
                token = lm(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token.reshape(1, 1)], 1)
            if token == TOKENIZER.eos_token_id:
                break
        new = ids[0, len(TOKENIZER(prompt)["input_ids"]) :]
        alone.append(TOKENIZER.decode(new, skip_special_tokens=True))
    for batch_size in (1, 3, 4):
        assert evaluate.generate(lm, TOKENIZER, prompts, 8, batch_size) == alone


def test_exact_match(monkeypatch):
    said = ["\n Paris.\nAnd so on", "the Hague", "lima", "no"]
    monkeypatch.setattr(evaluate, "generate", lambda *args: said)
    answers = ["paris", ["Den Haag", "The Hague!"], "Quito", ["No", "never"]]
    estimate = evaluate.exact_match(None, None, list("abcd"), answers)
    assert estimate.value == 0.75 and estimate.n == 4
    with pytest.raises(ValueError, match="one answer per prompt"):
        evaluate.exact_match(None, None, ["a"], [])


def test_generate_bad_input():
    for prompts in ([], ["a", ""]):
        with pytest.raises(ValueError):
            evaluate.generate(make_llama(), TOKENIZER, prompts)


# --- cost -----------------------------------------------------------------------------------------

def test_flops_of_a_transformer():
    lm = make_llama()
    ids = torch.randint(0, 260, (2, 16))
    linear = 2 * 2 * 16 * sum(m.weight.numel() for m in lm.modules() if isinstance(m, nn.Linear))
    attention = 2 * (2 * 2 * 4 * 16 * 16 * 8) * 2  # scores, values; batch, heads, T, T, d; layers
    rotary = evaluate.count_flops(lambda: lm(input_ids=ids)) - linear - attention
    assert 0 <= rotary < 0.01 * linear  # a small product of positions and frequencies


def test_peak_memory():
    x = torch.randn(500, 500)
    assert evaluate.peak_memory(lambda: x @ x, "cpu") == 1_000_000
    assert evaluate.peak_memory(lambda: [x @ x for _ in range(3)], "cpu") == 3_000_000

    def drop():
        for _ in range(3):
            x @ x

    assert evaluate.peak_memory(drop, "cpu") <= 2_000_000
    with pytest.raises(ZeroDivisionError):
        evaluate.peak_memory(lambda: 1 / 0, "cpu")
    assert evaluate.peak_memory(lambda: None, "cpu") == 0


def test_peak_memory_is_quiet(capfd):
    evaluate.peak_memory(lambda: torch.zeros(10), "cpu")
    print("still here")
    out, err = capfd.readouterr()
    assert out == "still here\n" and err == ""


def test_throughput():
    calls = []
    estimate = evaluate.throughput(lambda: calls.append(1), 10, repeats=3)
    assert len(calls) == 4 and estimate.low <= estimate.value <= estimate.high and estimate.n == 3
    for bad in (dict(n_items=0), dict(n_items=1, repeats=0)):
        with pytest.raises(ValueError):
            evaluate.throughput(lambda: None, **bad)


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits, labels = random_logits()
        evaluate.accuracy(logits, labels), evaluate.macro_f1(logits, labels)
        evaluate.expected_calibration_error(logits, labels)
        evaluate.perplexity(make_llama(), torch.randint(0, 260, (60,)), window=20)


# --- input as it comes ----------------------------------------------------------------------------

def test_one_document_in_any_form_is_the_same(lm):
    ids = torch.randint(4, 260, (40,), generator=torch.Generator().manual_seed(0))
    forms = [ids, ids[None], ids.tolist(), [ids.tolist()], ids.numpy(), ids[None].numpy(),
             (ids.tolist(),), iter([ids])]
    values = {evaluate.perplexity(lm, form, window=16).value for form in forms}
    assert len(values) == 1


def test_iterators_are_read_once(lm):
    texts, items = ["one two", "three"], [{"context": "a", "choices": ["b", "cd"], "answer": 1}]
    assert evaluate.generate(lm, TOKENIZER, iter(texts), 2) == evaluate.generate(
        lm, TOKENIZER, texts, 2) if hasattr(lm, "generate") else True
    assert evaluate.perplexity(lm, iter(texts), TOKENIZER) == evaluate.perplexity(
        lm, texts, TOKENIZER)
    found = evaluate.multiple_choice(lm, TOKENIZER, iter(items))
    assert found == evaluate.multiple_choice(lm, TOKENIZER, items)
    scores = evaluate.choice_scores(lm, TOKENIZER, iter(items))
    assert len(scores) == 1 and len(scores[0]) == 2


def test_one_prompt_is_not_many():
    for call in (lambda: evaluate.generate(make_llama(), TOKENIZER, "hello"),
                 lambda: evaluate.exact_match(make_llama(), TOKENIZER, "hello", list("hello"))):
        with pytest.raises(TypeError, match="not one string"):
            call()


def test_a_model_that_gives_nan_is_never_scored():
    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    items = [{"context": "a", "choices": ["b", "c"], "answer": 0}]
    for call in (lambda: evaluate.multiple_choice(model, TOKENIZER, items),
                 lambda: evaluate.choice_scores(model, TOKENIZER, items),
                 lambda: evaluate.perplexity(model, "hello", TOKENIZER)):
        with pytest.raises(ValueError, match="NaN"):
            call()


def test_text_beyond_absolute_positions_is_said():
    items = [{"context": "a" * 200, "choices": ["b", "c"], "answer": 0}]
    with pytest.raises(ValueError, match="128"):
        evaluate.choice_scores(make_gpt2(), TOKENIZER, items)
    with pytest.raises(ValueError, match="128"):
        evaluate.generate(make_gpt2(), TOKENIZER, ["a" * 126], 8)
    assert len(evaluate.generate(make_gpt2(), TOKENIZER, ["a" * 120], 8)) == 1


def test_special_tokens_at_the_end_are_not_scored():
    from tokenizers import processors

    tokenizer = models.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)])
    items = [{"context": "one", "choices": [" two", " three"]}]
    plain = evaluate.choice_scores(make_llama(), TOKENIZER, items)
    torch.testing.assert_close(evaluate.choice_scores(make_llama(), tokenizer, items), plain)


def test_predict_takes_arrays():
    model, x = nn.Linear(3, 2), np.ones((4, 3), dtype=np.float32)
    assert torch.equal(evaluate.predict(model, x), evaluate.predict(model, torch.ones(4, 3)))
