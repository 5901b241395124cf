"""Parts that share nothing, a model that nobody changes, pairs that are scored one by one."""

from functools import partial

import numpy as np
import pytest
import torch

from adaptlab import adapters, modules, recipes
from adaptlab.bench.testbeds import Bed, Pairs, digits, questions, swapped, windows


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return recipes.tiny_llama(hidden_size=16, heads=2, kv_heads=1), recipes.byte_tokenizer()


def rows(part):
    return set(map(tuple, part[0].flatten(1).tolist()))


def test_digits_have_parts_without_a_common_image():
    bed = digits(3, sizes=(60, 40), wrong=0.5)
    assert len(bed.train[1]) == 60 and len(bed.choose[1]) == 40 and len(bed.test[1]) == 1000
    assert not rows(bed.train) & rows(bed.choose) and not rows(bed.train) & rows(bed.test)
    clean = digits(3, sizes=(60, 40))
    assert torch.equal(clean.train[0], bed.train[0]) and not clean.wrong.any()
    assert torch.equal(bed.wrong, clean.train[1] != bed.train[1]) and 15 <= bed.wrong.sum() <= 45
    assert torch.equal(bed.test[1], bed.old[1]) and not torch.equal(bed.test[0], bed.old[0])
    assert not torch.equal(digits(4, sizes=(60, 40)).train[0], clean.train[0])


@pytest.mark.parametrize("wrong, words", [
    ({"sizes": (3000, 2000)}, "sum of at most 4000"), ({"sizes": (0, 5)}, ">= 1"),
    ({"wrong": 1.0}, "share of wrong labels"),
])
def test_digits_refuse_what_there_is_not(wrong, words):
    with pytest.raises(ValueError, match=words):
        digits(0, **wrong)


def test_a_copy_may_be_changed_and_a_lent_model_not(tiny):
    model, _ = tiny
    before = {n: p.clone() for n, p in model.named_parameters()}
    with Bed(model, None, None, None).fresh() as copied, torch.no_grad():
        copied.lm_head.weight.zero_()
    bed = Bed(model, None, None, None, lend=True)
    with bed.fresh() as lent:
        assert lent is model
        adapters.attach(lent, partial(adapters.LoraAdapter, rank=2), ["q_proj"])
        lent.train()
    assert not adapters.adapters(model) and not model.training
    with bed.fresh() as lent:  # a merged change is taken out again
        adapters.attach(lent, partial(adapters.LoraAdapter, rank=2), ["q_proj"])
        for adapter in adapters.adapters(lent).values():
            torch.nn.init.normal_(adapter.B)
        adapters.merge(lent)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(RuntimeError, match="lend=False"), bed.fresh() as lent:
        lent.model.norm.weight.data.add_(1.0)
    for n, p in model.named_parameters():
        p.data.copy_(before[n])


def test_pairs_score_what_the_model_says(tiny):
    model, tokenizer = tiny
    pairs = Pairs(("ab", "xyz: ", "q"), ("c", " long answer", "?"))
    likely, greedy = pairs.log_likelihood(model, tokenizer, batch_size=2)
    for i, (prompt, answer) in enumerate(pairs):
        ids = torch.tensor([tokenizer(prompt + answer).input_ids])
        n = len(tokenizer(answer).input_ids)
        with torch.no_grad():
            log_p = model(ids).logits[0, -n - 1 : -1].log_softmax(-1)
        at = log_p.gather(1, ids[0, -n:, None])
        assert likely[i] == pytest.approx(float(at.mean()), abs=1e-4)
        assert greedy[i] == bool((log_p.argmax(-1) == ids[0, -n:]).all())
    assert not model.training


def test_pairs_match_any_accepted_answer(monkeypatch):
    from adaptlab.bench import testbeds

    monkeypatch.setattr(testbeds.evaluate, "generate", lambda *a: ["Paris\nand", "1,200", "no"])
    pairs = Pairs(("a", "b", "c"), (" Rome", " 1200", " yes"), accepted=(("Rome", "paris"),
                                                                       ("1200.0",), ("yes",)))
    assert pairs.exact_match(None, None).tolist() == [True, True, False]


def test_pairs_are_loaded_by_the_names_of_columns(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "one", "a": ["1", "I"]}\n{"q": "two", "a": ["2", "II"]}\n')
    pairs = Pairs.load(str(file), "Q: {q}\nA:", " {a}", accepted="a")
    assert pairs[1] == ("Q: two\nA:", " 2") and pairs.accepted == (("1", "I"), ("2", "II"))
    assert len(pairs[:1]) == 1 and pairs[[1]].prompts == ("Q: two\nA:",)
    with pytest.raises(ValueError, match="no prompt of its own"):
        Pairs.load(str(file))
    with pytest.raises(ValueError, match="no column 'b'"):
        Pairs.load(str(file), "{q}", "{b}")


def test_swapping_answers_keeps_them_all():
    pairs = Pairs(tuple("abcdefghij"), tuple("0123456789"))
    damaged, wrong = swapped(pairs, 0.5, seed=1)
    assert sorted(damaged.answers) == sorted(pairs.answers) and int(wrong.sum()) == 5
    assert [a != b for a, b in zip(damaged.answers, pairs.answers, strict=True)] == wrong.tolist()
    assert not swapped(pairs, 0.0)[1].any()
    with pytest.raises(ValueError, match="share"):
        swapped(pairs, 1.5)


def test_questions_share_no_pair(tiny):
    train = Pairs(tuple(map(str, range(20))), tuple(map(str, range(20))), "numbers")
    bed = questions(train, train, 0, n_test=4, n_choose=3, n_train=10, swap=0.3, model=tiny)
    parts = [set(p.prompts) for p in (bed.train, bed.choose, bed.test)]
    assert [len(p) for p in parts] == [10, 3, 4] and len(set.union(*parts)) == 17
    assert int(bed.wrong.sum()) == 3 and bed.lend and len(bed.old) == 4
    with pytest.raises(ValueError, match="must be >= 1 and fit"):
        questions(train, train, 0, n_test=9, n_train=4, model=tiny)


def test_windows_are_spread_over_their_part(tiny):
    _, tokenizer = tiny
    train, test = (windows("pydoc", tokenizer, 32, part=p) for p in ("train", "test"))
    assert 3 < len(train) / len(test) < 5
    some = windows("pydoc", tokenizer, 32, n=5)
    assert torch.equal(some[0], test[0]) and torch.equal(some[-1], test[-1]) and len(some) == 5
    with pytest.raises(ValueError, match="'train' or 'test'"):
        windows("pydoc", tokenizer, 32, part="dev")


def test_training_on_pairs(tiny):
    from adaptlab import text
    from adaptlab.train import Training

    model, tokenizer = tiny
    pairs = Pairs(tuple("abcdefgh"), ("x",) * 8)
    bed = questions(pairs, pairs, 0, n_test=2, n_train=4, model=tiny)
    with bed.fresh() as lent:
        adapters.attach(lent, partial(adapters.LoraAdapter, rank=4), ["q_proj", "down_proj"])
        before = bed.test.log_likelihood(lent, tokenizer)[0]
        Training(steps=20, batch_size=4, lr=1e-2).fit(
            lent, bed.train, collate_fn=text.causal_lm_collate(tokenizer, add_eos=False),
            device="cpu", progress=False)
        assert (bed.test.log_likelihood(lent, tokenizer)[0] > before).all()
    assert np.isfinite(before).all() and modules.device_of(model).type == "cpu"
