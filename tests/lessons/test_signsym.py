"""SignSym: offsets, scopes, the CRF, what must be refused, and the full-scale path on a tiny model.

`negspacy` and `medspacy` are no dependencies: what is expected of plain sentences below are NegEx's
and ConText's published rules, written down by hand.
"""

from itertools import product

import numpy as np
import pytest
import schemas
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptlab import models
from adaptlab.bench.runs import launch
from adaptlab.domain.signsym import (
    CATEGORIES,
    DEFAULTS,
    ConceptNormalizer,
    ContextMatcher,
    ContextRule,
    CRFTagger,
    Document,
    Mention,
    OMOPConcept,
    PatternRecognizer,
    SignSymPipeline,
    SymptomLexicon,
    bio,
    crf_log_z,
    crf_score,
    default_rules,
    evaluate_spans,
    merge,
    sentences,
    to_note_nlp,
    tokenize,
    viterbi,
)
from adaptlab.experiments.signsym import (
    FULL,
    SMALL,
    all_notes,
    held_out,
    made_sentences,
    read_notes,
    share,
)

LEXICON = SymptomLexicon.default()
CONTEXT = ContextMatcher()
PIPELINE = SignSymPipeline([LEXICON, PatternRecognizer(LEXICON)], CONTEXT)


def say(text, attribute="negation"):
    return {m.text: m.attributes[attribute] for m in PIPELINE(text).mentions}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tiny_models.roberta(tmp_path_factory.mktemp("tiny"))
    return tuple(models.load(folder, device="cpu", task="feature-extraction"))


# ------------------------------------------------------------------ offsets

PIECES = st.lists(st.sampled_from([
    "fever", "dry cough", "no ", "denies", "but", ". ", "\n", "\x00", "N/V/D", "T 39.5", " ", "é",
    "SOB", "(-)", "[x]", "mother", "?", "’", "loss of\n smell", ";", "ﬁ", "😷"]), max_size=25)


@settings(max_examples=80, deadline=None)
@given(PIECES)
def test_offsets_are_true_and_spans_apart(pieces):
    text = "".join(pieces)
    found = PIPELINE(text).mentions
    assert all(text[m.start : m.end] == m.text for m in found)
    assert all(a.end <= b.start for a, b in zip(found, found[1:], strict=False))
    assert PIPELINE(text).mentions == found
    assert all(m.concept.concept_id in LEXICON.concepts for m in found)
    assert "".join(text[a:b] for a, b in sentences(text)) == text


@pytest.mark.parametrize("text", [
    "LOSS  OF\n SMELL", "loss of smell", "Loss\tof\r\nSmell", "loss of\x00smell"])
def test_case_and_spaces_do_not_matter(text):
    (found,) = PIPELINE(text).mentions
    assert found.concept.name == "Loss of sense of smell" and found.text == text


def test_longest_match():
    assert [m.concept.name for m in PIPELINE("dry cough, cough").mentions] == ["Dry cough", "Cough"]


def test_abbreviations_and_numbers_do_not_end_a_sentence():
    assert len(sentences("Dr. Lee saw 38.5 vs. 39. Then home.")) == 2


# ------------------------------------------------------------------ rules


@pytest.mark.parametrize("text, negated", [
    ("denies fever, cough or nausea", {"fever", "cough", "nausea"}),
    ("fever but no cough", {"cough"}),
    ("no evidence of pneumonia", {"pneumonia"}),
    ("pneumonia was ruled out", {"pneumonia"}),
    ("not only fever but also cough", set()),
    ("no increase in cough", set()),
    ("denies fever but reports cough", {"fever"}),
    ("No fever. Cough.", {"fever"}),
    ("fever: no; cough: yes", {"fever"}),
    ("[ ] fever [x] cough", {"fever"}),
    ("(+) cough, (-) fever", {"fever"}),
    ("no appetite, fever", set()),
    ("cough, however no fever although rash", {"fever"}),
    ("no worsening of cough", set()),
    ("pneumonia has not been ruled out", set()),
])
def test_negation_as_published(text, negated):
    assert {w for w, value in say(text).items() if value == "negated"} == negated


@pytest.mark.parametrize("text, attribute, value", [
    ("pneumonia has not been ruled out", "uncertainty", "uncertain"),
    ("r/o pneumonia", "uncertainty", "uncertain"),
    ("? pneumonia", "uncertainty", "uncertain"),
    ("return if fever", "condition", "conditional"),
    ("mother has fever", "subject", "family"),
    ("exposed to coworker with fever", "subject", "other"),
    ("history of seizures", "temporal", "past"),
    ("severe headache", "severity", "severe"),
    ("worsening cough", "course", "increased"),
    ("rash in the left arm", "location", "in the left arm"),
    ("cough for 3 days", "temporal", "for 3 days"),
])
def test_other_attributes(text, attribute, value):
    assert list(say(text, attribute).values()) == [value]


def test_without_triggers_all_is_default_and_sentences_do_not_leak():
    assert all(dict(m.attributes) == DEFAULTS for m in PIPELINE("fever cough and rash").mentions)
    alone = PIPELINE("Denies fever, mother has cough.").mentions
    more = PIPELINE("Denies fever, mother has cough. No rash if possible.").mentions
    assert more[: len(alone)] == alone
    bare = SignSymPipeline([LEXICON])("denies fever").mentions[0]
    assert dict(bare.attributes) == DEFAULTS


def test_scope_allowed_and_excluded():
    fever, text = 437663, "no one two fever, cough"
    mentions = LEXICON.recognize([text])[0]
    for more, expected in (({}, 2), ({"max_scope": 2}, 0), ({"max_scope": 3}, 1),
                           ({"allowed": frozenset({fever})}, 1),
                           ({"excluded": frozenset({fever})}, 1)):
        found = ContextMatcher([ContextRule("no", **more)])(text, mentions)
        assert sum(m.attributes["negation"] == "negated" for m in found) == expected


def test_truth_table_of_term_exists():
    keys = ("negation", "uncertainty", "condition", "subject")
    values = [[DEFAULTS[k], next(v for v, a in CATEGORIES.items() if a == k)] for k in keys]
    for row in product(*values):
        m = Mention("x", 0, 1, attributes={**DEFAULTS, **dict(zip(keys, row, strict=True))})
        assert m.term_exists == ("Y" if all(v == DEFAULTS[k] for k, v in
                                            zip(keys, row, strict=True)) else "N")


@pytest.mark.parametrize("bad", [
    {}, {"literal": "no", "pattern": "no"}, {"literal": " "}, {"literal": "no", "category": "x"},
    {"literal": "no", "direction": "up"}, {"literal": "no", "max_scope": 0},
    {"literal": "no", "max_scope": 2.5}, {"literal": "no", "max_scope": 10**9}, {"pattern": "("},
])
def test_rules_that_cannot_be(bad):
    with pytest.raises(ValueError, match="."):
        ContextRule(**bad)


# ------------------------------------------------------------------ lexicon, normaliser, merging


@pytest.mark.parametrize("rows, message", [
    ([{"term": " ", "concept_id": 437663}], "no word"),
    ([{"term": "x", "concept_id": 1}], "not in the concept table"),
    ([{"term": "x", "concept_id": 437663}, {"term": "x", "concept_id": 254761}], "two concepts"),
    ([{"term": "ache", "concept_id": 437663}, {"term": "aches", "concept_id": 254761}], "has one"),
])
def test_lexicons_that_cannot_be(rows, message):
    with pytest.raises(ValueError, match=message):
        SymptomLexicon.from_records(rows)


def test_own_concepts():
    own = OMOPConcept(1, "Covid toes")
    lexicon = SymptomLexicon.from_records([{"term": "covid toes", "concept_id": 1}], [own])
    assert lexicon.recognize(["COVID-toe"])[0][0].concept == own


@pytest.mark.parametrize("bad", [b"fever", None, 3])
def test_only_text(bad):
    with pytest.raises(TypeError, match="str"):
        PIPELINE(bad)


def test_empty_text():
    assert PIPELINE("") == Document("", []) and tokenize("\x00") == []


def test_normalizer(encoder):
    with pytest.raises(ValueError, match="threshold"):
        ConceptNormalizer(LEXICON, threshold=1.5)
    exact = ConceptNormalizer(LEXICON)
    assert [c.name for c, _ in exact(["pain in my chest", "COUGHS", "a new job", ""])] == [
        "Chest pain", "Cough", "No matching concept", "No matching concept"]
    near = ConceptNormalizer(LEXICON, encoder, threshold=0.0)
    assert all(c.concept_id for c, _ in near(["qqq", "some words"])) and near([]) == []


def test_known_beats_guessed_and_longer_beats_shorter():
    guess = Mention("no dry cough", 0, 12, source="tagger")
    known = Mention("dry cough", 3, 12)
    assert merge([guess, known, Mention("cough", 7, 12)]) == [known]
    assert merge([Mention("b", 5, 6), Mention("a", 1, 2)])[0].start == 1


def test_patterns():
    words = {m.text: m.concept.name for m in
             PIPELINE("temp 38.9, T 98.6 F, SpO2 85 %, sat 97%, sob, SOB, N/V").mentions}
    assert words == {"temp 38.9": "Fever", "SpO2 85 %": "Hypoxemia", "SOB": "Dyspnea",
                     "N": "Nausea", "V": "Vomiting"}


# ------------------------------------------------------------------ CRF and tagger


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_crf_against_brute_force(seed):
    g = torch.Generator().manual_seed(seed)
    u, A, s = (torch.randn(*shape, generator=g, dtype=torch.float64)
               for shape in ((3, 5, 4), (4, 4), (4,)))
    n = torch.tensor([5, 1, 3])
    z, best = crf_log_z(u, A, s, n), viterbi(u, A, s, n)
    for b in range(3):
        rows = torch.tensor(list(product(range(4), repeat=int(n[b]))))
        one = u[b : b + 1, : n[b]].expand(len(rows), -1, -1)
        scores = crf_score(one, rows, A, s, n[b].expand(len(rows)))
        torch.testing.assert_close(z[b], scores.logsumexp(0))
        assert best[b, : n[b]].tolist() == rows[scores.argmax()].tolist()
        assert not best[b, n[b] :].any()


def test_crf_shapes_are_checked():
    u, A, s = torch.zeros(2, 3, 4), torch.zeros(4, 4), torch.zeros(4)
    for bad in ((u[0], A, s, torch.tensor([3, 3])), (u, A[:1], s, torch.tensor([3, 3])),
                (u, A, s[:1], torch.tensor([3, 3])), (u, A, s, torch.tensor([3])),
                (u, A, s, torch.tensor([0, 3])), (u, A, s, torch.tensor([3, 4]))):
        with pytest.raises(ValueError, match="lengths"):
            crf_log_z(*bad)


def test_decoded_tags_are_valid(encoder):
    tagger = CRFTagger(encoder, ["problem", "drug"])
    parts = [(0, tokenize("a b c d e f"), 9 * torch.randn(6, 16)) for _ in range(50)]
    for row in viterbi(*tagger.scores(parts)).tolist():
        for before, tag in zip([0, *row], row, strict=False):
            name = tagger.tags[tag]
            assert name[0] != "I" or tagger.tags[before][2:] == name[2:]


def test_tagger_learns_and_refuses(encoder):
    tagger = CRFTagger(encoder)
    with pytest.raises(RuntimeError, match="fit"):
        tagger.predict(["x"])
    with pytest.raises(ValueError, match="one for each"):
        tagger.fit(["x"], [])
    texts, spans = made_sentences(["fever", "dry cough", "rash"], ["I have {} today"], 30, 0)
    before = [p.clone() for p in encoder[0].parameters()]
    tagger.fit(texts, spans, steps=150, lr=0.05)
    assert all(torch.equal(a, b) for a, b in zip(before, encoder[0].parameters(), strict=True))
    said = [[s[:2] for s in row] for row in tagger.predict(texts)]
    assert evaluate_spans(spans, said).f1 > 0.8
    again = CRFTagger(encoder).fit(texts, spans, steps=150, lr=0.05)
    assert again.predict(texts) == tagger.predict(texts)
    assert tagger.predict(["", "\x00"]) == [[], []]
    with pytest.raises(ValueError, match="normalizer"):
        SignSymPipeline([tagger])("I have fever today")


def test_bio_refuses():
    words, tags = tokenize("a b c"), ["O", "B-problem", "I-problem"]
    for bad in ([(0, 3), (2, 5)], [(2, 2)], [(0, 1, "drug")]):
        with pytest.raises(ValueError, match="overlap|label"):
            bio(words, bad, tags)


# ------------------------------------------------------------------ evaluation and output


def test_evaluate_spans():
    gold = [[(0, 5, 1)], [(0, 2, 1), (4, 9, 2)]]
    found = evaluate_spans(gold, [[(0, 5, 1), (6, 7, 1)], [(5, 7, 2)]], "relaxed")
    assert found.counts.tolist() == [[1, 2, 1], [1, 1, 2]]
    assert (found.precision, found.recall) == (2 / 3, 2 / 3)
    twice = evaluate_spans([[(0, 9, 1)]], [[(0, 3, 1), (4, 9, 1)]], "relaxed")
    assert twice.counts.tolist() == [[1, 2, 1]]
    with pytest.raises(ValueError, match="overlap"):
        evaluate_spans([[(0, 5), (4, 6)]], [[]])
    with pytest.raises(ValueError, match="as many"):
        evaluate_spans([[]], [])
    with pytest.raises(ValueError, match="mode"):
        evaluate_spans([], [], "near")


def test_rows_of_note_nlp():
    rows = to_note_nlp([PIPELINE("Denies fever."), PIPELINE("cough for 2 days")], ["a", "b"])
    assert [(r["note_id"], r["term_exists"], r["note_nlp_concept_id"]) for r in rows] == [
        ("a", "N", 437663), ("b", "Y", 254761)]
    assert rows[1]["term_temporal"] == "for 2 days"
    with pytest.raises(ValueError, match="zip"):
        to_note_nlp([PIPELINE("fever")], ["a", "b"])


def test_pipe_is_the_pipeline_for_any_batch():
    texts = ["Denies fever.", "", "SOB and dry cough"]
    assert list(PIPELINE.pipe(texts, batch_size=2)) == [PIPELINE(t) for t in texts]


# ------------------------------------------------------------------ experiment


def test_notes_and_made_sentences():
    for (_, part), docs in all_notes(LEXICON).items():
        assert len(docs) == (20 if part == "test" else 15)
        for d in docs:
            assert all(d.text[m.start : m.end] == m.text for m in d.mentions)
    (note,) = read_notes("no [SOB|Dyspnea|n] but [cough] and [tummy ache|Abdo|f slight]", LEXICON)
    assert note.text == "no SOB but cough and tummy ache"
    assert [m.concept.name for m in note.mentions] == ["Dyspnea", "Cough", "Abdominal pain"]
    assert [m.term_exists for m in note.mentions] == ["N", "Y", "N"]
    for bad in ("[x|Nothing]", "[x|Loss of]", "[fever||q]"):
        with pytest.raises(ValueError, match="unknown"):
            read_notes(bad, LEXICON)
    deal = held_out(LEXICON, 0)
    assert not set(deal["terms"][0]) & set(deal["terms"][1])
    texts, spans = made_sentences(deal["terms"][0], deal["frames"][0], 50, 1)
    assert all(t[a:b] in deal["terms"][0] for t, row in zip(texts, spans, strict=True)
               for a, b in row)


def test_no_note_is_a_frame():
    "The tagger's sentences hold none of the notes."
    texts, _ = made_sentences(list(LEXICON.terms), sum(held_out(LEXICON, 0)["frames"], []), 300, 0)
    notes = {d.text for part in all_notes(LEXICON).values() for d in part}
    assert not notes & set(texts)


def test_share_keeps_pairs_together():
    a = np.array([[1, 2], [3, 3], [0, 1]])
    assert share(*a.T).value == pytest.approx(4 / 6)
    both = share(np.stack([a[:, 0]] * 2, 1), np.stack([a[:, 1]] * 2, 1), (1, -1))
    assert (both.value, both.low, both.high) == (0, 0, 0)


def test_full_on_a_tiny_model(encoder, tmp_path):
    name = tiny_models.roberta(tmp_path / "model")
    small = {"sentences": 20, "steps": 2, "seeds": (0,), "encoder": name, "neighbor": name}
    report = launch("signsym", FULL.replace(**small), root=tmp_path, progress=False)
    assert len(report.claims) == 7 and set(report.tables) == {
        "notes", "tagger", "rules", "systems", "old systems", "protocols"}
    assert {FULL.encoder, FULL.neighbor} <= schemas.MODELS and SMALL.seeds == (0, 1, 2, 3, 4)


def test_rules_are_about_200():
    assert 120 < len(default_rules()) < 260
