"""Texts as batches: what is learnt, what is padding, what is scored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptlab import recipes
from adaptlab.text import (
    causal_lm_collate, pad_batch, special_tokens, token_chunks, token_ids, windows,
)


# --- text -----------------------------------------------------------------------------------------

def test_collate_masks_prompt_and_padding():
    tokenizer = recipes.byte_tokenizer(add_bos=True)
    collate = causal_lm_collate(tokenizer, pad_to_multiple_of=8)
    batch = collate([("Q: é? A:", " ü"), ("", "only"), {"text": "text"}])
    assert batch["input_ids"].shape[1] % 8 == 0
    learnt = [tokenizer.decode(r[r != -100]) for r in batch["labels"]]
    assert learnt == [" ü<eos>", "<bos>only<eos>", "<bos>text<eos>"]
    assert torch.equal(batch["labels"] != -100, (batch["labels"] == batch["input_ids"]))
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == tokenizer.pad_token_id)
    cut = causal_lm_collate(tokenizer, max_length=5, mask_prompt=False, add_eos=False)
    assert cut([("abcdef", "gh")])["labels"].shape == (1, 5)


def test_collate_of_a_chat():
    tokenizer = recipes.byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")
    batch = causal_lm_collate(tokenizer)([{"messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}])
    row = batch["labels"][0]
    assert tokenizer.decode(row[row != -100]) == "Hello<eos>"
    assert tokenizer.decode(batch["input_ids"][0]) == "[user]Hi<eos>[assistant]Hello<eos>"


def test_collate_learns_every_answer_of_a_chat():
    tokenizer = recipes.byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")
    chat = [{"role": role, "content": text} for role, text in (
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"),
        ("user", "Bye"), ("assistant", "Bye, then"), ("user", "?"))]
    for count, answers in ((6, "Hello<eos>Bye, then<eos>"), (3, "Hello<eos>")):
        row = causal_lm_collate(tokenizer)([{"messages": chat[:count]}])["labels"][0]
        assert tokenizer.decode(row[row != -100]).replace("?", "") == answers
    tokenizer.chat_template = "{{ messages | length }}{{ messages[0].content }}"  # no prefix
    with pytest.raises(ValueError, match="chat template"):
        causal_lm_collate(tokenizer)([{"messages": chat}])


def test_collate_is_the_same_without_offsets():
    class Slow:
        is_fast = False

        def __init__(self, tokenizer):
            self.tokenizer, self.eos_token_id = tokenizer, tokenizer.eos_token_id
            self.pad_token_id = tokenizer.pad_token_id

        def __call__(self, text, return_offsets_mapping=False, **kwargs):
            assert not return_offsets_mapping
            return self.tokenizer(text, **kwargs)

        def apply_chat_template(self, *args, **kwargs):
            return self.tokenizer.apply_chat_template(*args, **kwargs)

    tokenizer = recipes.byte_tokenizer(add_bos=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" \
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    chat = [{"role": r, "content": c} for r, c in (("user", "é?"), ("assistant", "ü"))]
    examples = [("a question", "an answer"), ("", "all"), "text", {"messages": chat * 2}]
    fast, slow = (causal_lm_collate(t)(examples) for t in (tokenizer, Slow(tokenizer)))
    assert all(torch.equal(fast[k], slow[k]) for k in fast)


# --- special tokens -------------------------------------------------------------------------------

def words(template, **kwargs):
    "A tokenizer of four words and a template of special tokens."
    import tokenizers
    import transformers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {"<s>": 0, "</s>": 1, "hi": 2, "yes": 3}, unk_token="hi"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **kwargs)


@pytest.mark.parametrize("template, before, after", [
    ("$A", [], []), ("<s> $A", [0], []), ("$A </s>", [], [1]), ("<s> $A </s>", [0], [1]),
])
def test_every_special_token_once(template, before, after):
    tokenizer = words(template)
    assert special_tokens(tokenizer) == (before, after)
    for text in ("hi yes", "<s> hi yes", "hi yes </s>", "<s> hi yes </s>"):
        head, tail = text.startswith("<s>"), text.endswith("</s>")
        for prompt in (False, True):
            (row,) = token_ids(tokenizer, [text], prompt=prompt)
            begins = [0] if before or head else []
            ends = [1] if tail or (after and not prompt) else []  # what was written stays
            assert row.ids == begins + [2, 3] + ends
            assert len(row.spans) == len(row.ids)
        assert token_ids(tokenizer, [text], special=False)[0].ids == (
            [0] * head + [2, 3] + [1] * tail)
    assert token_ids(tokenizer, [""])[0].ids == before + after
    with pytest.raises(TypeError, match=r"give \[text\]"):
        token_ids(tokenizer, "hi")


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_collate_of_a_templated_prompt(template):
    begins = [0] if "<s>" in template else []
    for prompt, first in (("<s> hi", [0]), ("hi", begins)):
        batch = causal_lm_collate(words(template))([(prompt, " yes")])
        assert batch["input_ids"].tolist() == [first + [2, 3, 1]]  # one start, one end
        assert batch["labels"].tolist() == [[-100] * len(first) + [-100, 3, 1]]
        ended = causal_lm_collate(words(template))([(prompt, " yes </s>")])
        assert torch.equal(ended["input_ids"], batch["input_ids"])
        assert torch.equal(ended["labels"], batch["labels"])
        open_end = causal_lm_collate(words(template), add_eos=False)([(prompt, " yes")])
        assert open_end["input_ids"].tolist() == [first + [2, 3]]


def test_messages_name_what_is_missing():
    tokenizer = recipes.byte_tokenizer()
    collate = causal_lm_collate(tokenizer)
    with pytest.raises(ValueError, match=r"a dict with \['answer', 'question'\]"):
        collate([{"question": "?", "answer": "!"}])
    with pytest.raises(ValueError, match="'role' and 'content'"):
        collate([{"messages": [{"from": "user", "value": "hi"}]}])
    for wrong in ((1, 2), [["a"], "b"], 5):
        with pytest.raises(ValueError, match="an example must be"):
            collate([wrong])


def test_pad_batch_says_which_row():
    good = {"input_ids": [1, 2], "labels": [1, 2]}
    for wrong, said in (({"labels": [1]}, "row 1 has the columns"),
                        ({"input_ids": [1]}, "row 1 has the columns"),
                        ({"input_ids": [1, 2], "labels": [1]}, "row 1 differ in length")):
        with pytest.raises(ValueError, match=said):
            pad_batch([good, wrong], 0)
    with pytest.raises(ValueError, match="at least one row"):
        pad_batch([], 0)


# --- streams and windows --------------------------------------------------------------------------

class Bytes:
    "A tokenizer: one token per byte."

    def __call__(self, texts, **options):
        return {"input_ids": [list(text.encode()) for text in texts]}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.integers(1, 12))
def test_token_chunks(texts, length):
    stream = list("".join(t + "\n\n" for t in texts).encode())
    if len(stream) < length:
        with pytest.raises(ValueError, match="too few"):
            token_chunks(texts, Bytes(), length)
    else:
        chunks = token_chunks(texts, Bytes(), length)
        assert chunks.dtype == torch.int64 and chunks.shape[1] == length
        assert chunks.flatten().tolist() == stream[: chunks.numel()]
        assert len(stream) - chunks.numel() < length


def test_token_chunks_refuses():
    with pytest.raises(TypeError, match=r"give \[text\]"):
        token_chunks("one text", Bytes(), 4)
    with pytest.raises(ValueError, match="length"):
        token_chunks(["text"], Bytes(), 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 200), st.integers(2, 50), st.data())
def test_windows_score_each_token_once(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    spans = windows(length, window, stride)
    scored = [t for _, end, n in spans for t in range(end - n, end)]
    assert scored == list(range(1, length))
    assert all(0 <= start and 0 < n < end - start <= window for start, end, n in spans)
    assert all(end - n - start >= window - stride for start, end, n in spans[1:])  # context
