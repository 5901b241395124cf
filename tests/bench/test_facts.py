"""Edits of facts: parts without a country in common, questions with the answers that they need."""

import pytest
import torch

from adaptlab import recipes
from adaptlab.bench import facts
from adaptlab.text import causal_lm_collate

COLLATE = causal_lm_collate(recipes.byte_tokenizer(), add_eos=False)


@pytest.fixture
def all_stated(monkeypatch):
    "A model that states every fact."
    monkeypatch.setattr(facts, "stated", lambda tail, rows, collate: rows)


def countries(items):
    "Those that are edited."
    pairs = (item["edit"] for item in items)
    return {(p if isinstance(p, tuple) else p[0])[0] for p in pairs}


def test_parts_have_no_country_in_common(all_stated):
    parts = facts.languages(None, None, (6, 3, 20), lessons=60, split=1)
    assert [len(parts[p]) for p in ("test", "choose", "train", "held_out")] == [6, 3, 60, 3]
    test, choose, train, held_out = (countries(parts[p]) for p in (
        "test", "choose", "train", "held_out"))
    assert not test & choose and not (test | choose) & train and held_out <= choose
    assert len(train) == 20 and len(test) == 6
    again = facts.languages(None, None, (6, 3, 20), lessons=60, split=1)
    other = facts.languages(None, None, (6, 3, 20), lessons=60, split=2)
    assert parts == again and parts != other


def test_questions_have_the_answers_that_they_need(all_stated):
    parts = facts.languages(None, None, (6, 3, 20), lessons=60)
    for probe in parts["test"]:
        assert set(probe) == {*facts.SUCCESS, *facts.KEPT}
        assert len({probe[part][0][1] for part in facts.SUCCESS}) == 1  # one target
        assert len({probe[part][0][0] for part in facts.SUCCESS}) == 3  # in three wordings
        others = {prompt for prompt, _ in probe["neighbours"]}
        assert len(others) == 3 and probe["edit"][0][0] not in others
    for lesson in parts["train"]:
        assert lesson["edit"][1] == lesson["rephrase"][1]
        assert lesson["locality"] != lesson["edit"]


def test_only_what_the_model_says_is_stated():
    torch.manual_seed(0)
    model = recipes.tiny_llama(hidden_size=16, layers=3, heads=2, kv_heads=1).eval()
    rows = [{"country": c, "language": ""} for c in "abcd"]  # the target is a space
    asked = COLLATE([(facts.FORMS["edit"].format(r["country"]), " ") for r in rows])
    with torch.no_grad():  # it says a space of some of them
        states = model.model(input_ids=asked["input_ids"]).last_hidden_state[:, -2]
        head = torch.zeros_like(model.lm_head.weight)
        head[asked["input_ids"][0, -1]] = states[0] - states.mean(0)
        model.lm_head.weight = torch.nn.Parameter(head)
    tail = facts.Tail(model, "model.layers", 1)
    logits = model(**{k: v for k, v in asked.items() if k != "labels"}).logits
    at = asked["attention_mask"].sum(1) - 2
    says = logits[torch.arange(4), at].argmax(-1) == asked["input_ids"][torch.arange(4), at + 1]
    found = facts.stated(tail, rows, COLLATE)
    assert found == [r for r, ok in zip(rows, says.tolist(), strict=True) if ok]
    assert rows[0] in found and len(found) < 4
    assert facts.stated(tail, [rows[0], {"country": "e", "language": "long"}], COLLATE) == rows[:1]


def test_states_are_kept_or_not():
    model = recipes.tiny_llama(hidden_size=16, layers=3, heads=2, kv_heads=1).eval()
    texts = COLLATE([("one", "two"), ("three", "four")])
    kept, fresh = (facts.Tail(model, "model.layers", 2, cached) for cached in (True, False))
    first = kept.batch(texts)
    assert len(kept.kept) == 2 and fresh.kept is None
    for tail in (kept, fresh):
        assert all(v.equal(first[k]) for k, v in tail.batch(texts).items())


def test_what_is_missing_is_said(all_stated, monkeypatch):
    with pytest.raises(ValueError, match="too few for 900 test"):
        facts.languages(None, None, (900, 3, 20), lessons=1)
    monkeypatch.setattr(facts.data, "load", lambda *a, **k: {"text": ["word " * 60] * 2})
    with pytest.raises(ValueError, match="2 long texts; 3 are needed"):
        facts.continuations((1, 1, 1), "some texts", "no model", ["text"])
    assert facts.unrelated("some texts", 5, 1) == ["word word word word word"]
    assert facts.unrelated("some texts", 61, 1) == []
