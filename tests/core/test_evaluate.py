"""Evaluation against scikit-learn, scipy and plain loops; padding, batching and bad input."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import nn

from adaptlab import evaluate, recipes, stats

TOKENIZER = recipes.byte_tokenizer()


def make_llama(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return recipes.tiny_llama(hidden_size=32, layers=2)


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


# --- classification -------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_f1_and_accuracy_agree_with_sklearn(pairs):
    preds, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))
    expected = f1_score(labels, preds, average="macro", zero_division=0)
    found = evaluate.macro_f1(preds, labels, n_resamples=20)
    assert found.value == pytest.approx(expected)
    assert evaluate.accuracy(preds, labels).value == pytest.approx(
        (preds == labels).double().mean().item())


def test_f1_interval_is_that_of_a_plain_loop():
    logits, labels = random_logits()
    preds = logits.argmax(1).numpy()
    rng = np.random.default_rng(0)
    loop = [f1_score(labels.numpy()[rows], preds[rows], average="macro")
            for rows in rng.integers(0, 300, (200, 300))]
    found = evaluate.macro_f1(logits, labels, n_resamples=200)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(loop, [0.025, 0.975])))


def test_nll_and_its_items():
    logits, labels = random_logits(2000)
    found = evaluate.nll(logits, labels)
    assert found.value == pytest.approx(F.cross_entropy(logits.double(), labels).item())
    np.testing.assert_allclose(
        found.items, F.cross_entropy(logits.double(), labels, reduction="none"))
    assert evaluate.nll(logits.bfloat16(), labels).value == pytest.approx(found.value, rel=0.01)


def test_scores_come_with_their_items():
    "Accuracy per sample, so that two models are compared pair by pair."
    logits, labels = random_logits()
    found = evaluate.accuracy(logits, labels)
    assert found.items.tolist() == (logits.argmax(1) == labels).tolist()
    assert found == stats.wilson(found.items)
    worse = evaluate.accuracy(torch.zeros_like(labels), labels)
    gap = stats.paired_difference(found.items, worse.items)
    assert gap.value == pytest.approx(found.value - worse.value) and gap.low > 0
    perfect = evaluate.accuracy(labels, labels)
    assert perfect.value == perfect.high == 1 and 0.95 < perfect.low < 1


@pytest.mark.parametrize("function", [
    evaluate.accuracy, evaluate.macro_f1, evaluate.nll])
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
    bert = recipes.tiny_bert(n_classes=3).to(torch.bfloat16)
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
    said = ["\n Paris.\nAnd so on", "the Hague", "lima", "no", "75 %"]
    monkeypatch.setattr(evaluate, "generate", lambda *args: said)
    answers = ["paris", ["Den Haag", "The Hague!"], "Quito", ["No", "never"], "3/4"]
    estimate = evaluate.exact_match(None, None, list("abcde"), answers)
    assert estimate.value == 0.8 and estimate.n == 5
    assert estimate.items.tolist() == [1, 1, 0, 1, 1]
    with pytest.raises(ValueError, match="one answer per prompt"):
        evaluate.exact_match(None, None, ["a"], [])


SAME = [
    ("75%", "0.75"), ("75 \\%", "3/4"), (r"\frac{3}{4}", "0.75"), (r"\dfrac{-3}{4}", "-0.75"),
    ("1,000", "1000.0"), ("$1,234.50.", "1234.5"), (r"\$18", "18"), ("1e3", "1000"), ("−5", "-5"),
    (" Paris", "paris"), ("the Hague!", "Hague"), ("No.", "no"), ("A", "a."), ("x ^ 2", "x^2"),
    (r"\left(1, 2\right)", "(1,2)"), ("", ""), ("New York, NY", "new york NY"),
]
DIFFERENT = [
    ("x", "y"), ("1.5 m", "15 m"), ("-x", "x"), ("1,2", "12"), ("the", "a"), ("", "Rome"),
    ("75", "75%"), ("0.1", "0.10001"), ("x - y", "xy"), ("1/0", "0"), ("(1,2)", "(12)"),
]


@pytest.mark.parametrize("said, right", SAME)
def test_same_answer(said, right):
    assert evaluate.same_answer(said, right) is True
    assert evaluate.same_answer(right, said) is True


@pytest.mark.parametrize("said, right", DIFFERENT)
def test_not_the_same_answer(said, right):
    assert evaluate.same_answer(said, right) is False
    assert evaluate.same_answer(right, said) is False


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_same_answer_is_reflexive_and_symmetric(a, b):
    assert evaluate.same_answer(a, a)
    assert evaluate.same_answer(a, b) == evaluate.same_answer(b, a)


@pytest.mark.parametrize("text, after, number", [
    ("so 3 + 4. The answer is: 7", "The answer is:", 7),
    ("The answer is: 1. No: The answer is: -1,234.50 dollars", "The answer is:", -1234.5),
    ("7", "The answer is:", None), ("The answer is: seven", "The answer is:", None),
    ("12 - 4 = 8, and 8*2 = 16 in all", None, 16), ("10-4", None, 4), ("#### 1,000", "####", 1000),
    ("a .5 share", None, 0.5), ("−3", None, -3), ("none", None, None), ("in v2.1: 5.", None, 5)])
def test_final_number(text, after, number):
    assert evaluate.final_number(text, after) == number


def test_greedy_is_greedy_whatever_the_model_brings_along():
    "Penalties, bans, forced tokens and sampling of the model's own settings change nothing."
    lm, prompts = make_llama(), ["a prompt", "another, longer one"]
    plain = evaluate.generate(lm, TOKENIZER, prompts, 12)
    ids = torch.tensor([TOKENIZER(prompts[0])["input_ids"]])
    start = ids.shape[1]
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, lm(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert plain[0] == TOKENIZER.decode(ids[0, start:], skip_special_tokens=True)
    said = ids[0, start:].tolist()
    for own in (dict(repetition_penalty=1.5), dict(no_repeat_ngram_size=1), dict(min_new_tokens=3),
                dict(suppress_tokens=said), dict(bad_words_ids=[[said[0]]]), dict(num_beams=3),
                dict(begin_suppress_tokens=[said[0]]), dict(forced_eos_token_id=5),
                dict(do_sample=True, temperature=5.0), dict(guidance_scale=3.0), dict(max_length=2),
                dict(exponential_decay_length_penalty=(1, 9.0)),
                dict(encoder_repetition_penalty=2.0), dict(sequence_bias=[[[said[0]], -50.0]])):
        for name, value in own.items():
            setattr(lm.generation_config, name, value)
        config = lm.generation_config
        assert evaluate.generate(lm, TOKENIZER, prompts, 12) == plain, own
        assert lm.generation_config is config
        lm.generation_config = type(config)(eos_token_id=config.eos_token_id)


def test_greedy_settings_come_back_after_an_error(monkeypatch):
    lm = make_llama()
    lm.generation_config.repetition_penalty, config = 1.5, lm.generation_config
    monkeypatch.setattr(lm, "generate", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.generate(lm, TOKENIZER, ["a"])
    assert lm.generation_config is config


def test_answers_end_at_the_models_own_ends():
    "A model may know several tokens that end an answer: they come along."
    lm = make_llama()
    text = evaluate.generate(lm, TOKENIZER, ["a prompt"], 8)[0]
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    lm.generation_config.eos_token_id = [TOKENIZER.eos_token_id, ids[2]]
    assert len(evaluate.generate(lm, TOKENIZER, ["a prompt"], 8)[0]) < len(text)


def test_greedy_through_peft():
    peft = pytest.importorskip("peft")
    lm = make_llama()
    plain = evaluate.generate(lm, TOKENIZER, ["a prompt"], 8)
    lm.generation_config.repetition_penalty, config = 1.8, lm.generation_config
    wrapped = peft.get_peft_model(lm, peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert evaluate.generate(wrapped, TOKENIZER, ["a prompt"], 8) == plain
    assert lm.generation_config is config and config.repetition_penalty == 1.8


def test_generate_bad_input():
    for prompts in ([], ["a", ""]):
        with pytest.raises(ValueError):
            evaluate.generate(make_llama(), TOKENIZER, prompts)


# --- what is no causal language model, padding, and other people's formats ------------------------

def other_models():
    import transformers as T

    small = dict(vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                 intermediate_size=16)
    t5 = dict(vocab_size=260, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return {
        "masked": lambda: T.BertForMaskedLM(T.BertConfig(**small)),
        "bert that is not told to decode": lambda: T.BertLMHeadModel(T.BertConfig(**small)),
        "roberta": lambda: T.RobertaForCausalLM(T.RobertaConfig(**small)),
        "seq2seq": lambda: T.T5ForConditionalGeneration(T.T5Config(**t5)),
        "no head": lambda: T.LlamaModel(T.LlamaConfig(**small)),
        "classifier": lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**small)),
    }


@pytest.mark.parametrize("kind", other_models())
def test_only_causal_language_models_are_scored(kind):
    model = other_models()[kind]().eval()
    items = [{"context": "a", "choices": ["b", "c"], "answer": 0}]
    for call in (lambda: evaluate.perplexity(model, "some text", TOKENIZER),
                 lambda: evaluate.multiple_choice(model, TOKENIZER, items),
                 lambda: evaluate.continuation_log_probs(model, TOKENIZER, ["a"], ["b"]),
                 lambda: evaluate.generate(model, TOKENIZER, ["a"])):
        with pytest.raises(ValueError, match="causal language model is needed"):
            call()


def test_bert_as_a_decoder_is_scored():
    import transformers as T

    config = T.BertConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1,
                          num_attention_heads=2, intermediate_size=16, is_decoder=True)
    ids = torch.randint(3, 260, (12,))
    model = T.BertLMHeadModel(config).eval()
    (found,) = evaluate.token_losses(model, ids)
    torch.testing.assert_close(found, -token_log_probs(model, ids), rtol=1e-4, atol=1e-4)


def test_a_model_without_logits_is_said():
    class Silent(nn.Module):
        def forward(self, input_ids, attention_mask=None):
            return {"hidden": input_ids}

    with pytest.raises(TypeError, match="without logits"):
        evaluate.perplexity(Silent(), torch.arange(9))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_never_scored(lm, side):
    "A tokenizer's output is scored by its mask; padded ids without one are refused."
    texts = ["short", "a text of some more words", "x y"]
    alone = evaluate.token_losses(lm, texts, TOKENIZER)
    tokenizer = recipes.byte_tokenizer()
    tokenizer.padding_side = side
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    for form in (batch, dict(batch), {k: v.tolist() for k, v in batch.items()}):
        for a, b in zip(evaluate.token_losses(lm, form), alone, strict=True):
            torch.testing.assert_close(a, b)
    for form in (batch["input_ids"], batch["input_ids"].numpy()):
        with pytest.raises(ValueError, match="padding"):
            evaluate.perplexity(lm, form)


def test_padding_is_seen_where_its_token_stands_in_the_text_too():
    "The model's own padding token, and a run that takes a third of a row."
    lm = make_llama()
    for pad, ids in ((9, [[9, 5, 6, 9, 8, 7], [5, 6, 7, 8, 9, 9]]),
                     (None, [[5, 6, 0, 8, 0], [5, 6, 0, 0, 0]]),
                     (None, [[0, 8, 0, 5, 6], [0, 0, 0, 5, 6]])):
        lm.config.pad_token_id = pad
        with pytest.raises(ValueError, match="padding"):
            evaluate.token_losses(lm, torch.tensor(ids))
    ids = [[9, 5, 6, 9, 8, 7], [5, 6, 7, 8, 9, 9]]  # no padding token is known any more
    assert len(evaluate.token_losses(lm, torch.tensor(ids))) == 2


def test_what_only_looks_like_padding_is_text(lm):
    "Rows that all end alike, tokens that stand elsewhere too, one row, a list of rows."
    for ids in ([[5, 6, 7, 7], [8, 9, 7, 7]], [[5, 6, 7, 7], [7, 9, 8, 6]], [[5, 6, 7, 7]],
                [[3, 3, 3], [3, 3, 3]], [[5, 6, 2], [7, 8, 9]]):
        assert len(evaluate.token_losses(lm, torch.tensor(ids))) == len(ids)
    rows = [torch.tensor([5, 6, 8, 9]), torch.tensor([5, 7, 7, 7])]
    assert sum(len(x) for x in evaluate.token_losses(lm, rows)) == 6


@pytest.mark.parametrize("ids, match", [
    ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "attention_mask"),
    (torch.tensor([[1, 2, -100]]), "labels")])
def test_ids_that_are_none(ids, match):
    with pytest.raises(ValueError, match=match):
        evaluate.perplexity(make_llama(), ids)


@pytest.mark.parametrize("item, match", [
    ({"context": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answer": 0}, "dict"),
    ({"context": "a", "choices": "bc", "answer": 0}, "list of at least two"),
    ({"context": "a", "choices": ["b", 7], "answer": 0}, "must be texts"),
    ({"context": ["a"], "choices": ["b", "c"], "answer": 0}, "must be texts"),
    ("a text", "needs a 'context'")])
def test_choices_in_other_formats_are_refused(item, match):
    for call in (evaluate.choice_scores, evaluate.multiple_choice):
        with pytest.raises(ValueError, match=match):
            call(make_llama(), TOKENIZER, [item])


@pytest.mark.parametrize("answer", ["A", "0", True, -1, 2, 0.0, None])
def test_answers_are_numbers_of_choices(answer):
    item = {"context": "a", "choices": ["b", "c"], "answer": answer}
    with pytest.raises(ValueError, match="number of the right choice"):
        evaluate.multiple_choice(make_llama(), TOKENIZER, [item])


# --- cost -----------------------------------------------------------------------------------------

def test_flops_of_a_transformer():
    lm = make_llama()
    ids = torch.randint(0, 260, (2, 16))
    linear = 2 * 2 * 16 * sum(m.weight.numel() for m in lm.modules() if isinstance(m, nn.Linear))
    attention = 2 * (2 * 2 * 4 * 16 * 16 * 8) * 2  # scores, values; batch, heads, T, T, d; layers
    rotary = evaluate.count_flops(lambda: lm(input_ids=ids)) - linear - attention
    assert 0 <= rotary < 0.01 * linear  # a small product of positions and frequencies


@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2), (4, 1)])
def test_flops_of_grouped_queries(heads, shared):
    "Keys that several heads share cost as much: forward 2, backward 5 products of each head."
    q = torch.randn(2, heads, 16, 8, requires_grad=True)
    k, v = (torch.randn(2, shared, 24, 8, requires_grad=True) for _ in "kv")

    def attend():
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    product = 2 * 2 * heads * 16 * 24 * 8
    assert evaluate.count_flops(attend) == 2 * product
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert evaluate.count_flops(attend) == 2 * product
    both = evaluate.count_flops(lambda: attend().sum().backward())
    assert both == 7 * product  # 5 backward: the scores again, and four gradients


def test_flops_of_fused_attention_do_not_depend_on_the_torch_release():
    "Our formulas are used for every fused kernel there is, those of GPUs as well."
    formulas = {str(op): formula for op, formula in evaluate._attention().items()}
    query, key = torch.Size([2, 4, 16, 8]), torch.Size([2, 1, 24, 8])
    product = 2 * 2 * 4 * 16 * 24 * 8
    assert len(formulas) >= 6
    for name, formula in formulas.items():
        shapes = [query, key, key]
        wanted = 5 if "backward" in name else 2
        found = formula(*([query] if "backward" in name else []), *shapes)
        assert found == wanted * product, name


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

    tokenizer = recipes.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)])
    items = [{"context": "one", "choices": [" two", " three"]}]
    plain = evaluate.choice_scores(make_llama(), TOKENIZER, items)
    torch.testing.assert_close(evaluate.choice_scores(make_llama(), tokenizer, items), plain)


def test_predict_takes_arrays():
    model, x = nn.Linear(3, 2), np.ones((4, 3), dtype=np.float32)
    assert torch.equal(evaluate.predict(model, x), evaluate.predict(model, torch.ones(4, 3)))


def _writes(template: str):
    "A tokenizer that puts special tokens around every text."
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {"<s>": 0, "</s>": 1, "hi": 2, "yes": 3}, unk_token="hi"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def test_special_tokens_once_and_no_end_behind_a_prompt(monkeypatch):
    "A chat template has written <s> already; and a prompt that ends in </s> is over."
    tok = _writes("<s> $A </s>")
    ids, count = evaluate._encode_continuation(tok, "<s> hi", " yes")
    assert ids.tolist() == [0, 2, 3] and count == 1
    assert [d.tolist() for d in evaluate._documents(["<s> hi", "hi"], tok)] == [[0, 2, 1]] * 2
    model, seen = recipes.tiny_llama(vocab_size=4, hidden_size=8, heads=2, kv_heads=1), []
    run = model.generate
    monkeypatch.setattr(model, "generate", lambda **k: seen.append(k["input_ids"]) or run(**k))
    evaluate.generate(model, tok, ["<s> hi", "hi"], max_new_tokens=1)
    assert torch.cat(seen).tolist() == [[0, 2]] * 2
