"""SignSym's trie against a naive scan over all synonyms, and how its time grows with a note."""

from clock import in_turn, row

from adaptlab.domain.signsym import (
    ContextMatcher,
    PatternRecognizer,
    SignSymPipeline,
    SymptomLexicon,
    stem,
    tokenize,
)

SENTENCE = "Patient denies fever, chills or dry cough, but reports fatigue since Monday.\n"


def naive(lexicon, text):
    "Every synonym at every word; the longest stays."
    words, found, i = [stem(t.text) for t in tokenize(text)], [], 0
    while i < len(words):
        fits = [s for s in lexicon.words if tuple(words[i : i + len(s)]) == s]
        best = max(fits, key=len, default=())
        if best:
            found.append(lexicon.words[best])
        i += max(len(best), 1)
    return found


def test_against_a_naive_scan():
    lexicon, text = SymptomLexicon.default(), SENTENCE * 60
    assert [m.concept.concept_id for m in lexicon.recognize([text])[0]] == naive(lexicon, text)
    ours, plain = in_turn(lambda: lexicon.recognize([text]), lambda: naive(lexicon, text))
    row("SignSym, trie of 168 synonyms against a scan", ours, plain, bound=1.0)


def test_time_grows_with_the_length_alone():
    "Ten times the text in at most thirteen times the time: 10,000 tokens, rules and all."
    lexicon = SymptomLexicon.default()
    pipeline = SignSymPipeline([lexicon, PatternRecognizer(lexicon)], ContextMatcher())
    long, short = in_turn(lambda: pipeline(SENTENCE * 670),
                          lambda: [pipeline(SENTENCE * 67) for _ in range(10)])
    row("SignSym, 10,000 tokens against ten times 1,000", long, short, bound=1.3)


def test_one_endless_sentence():
    "No full stop, all triggers in one scope: still linear."
    lexicon = SymptomLexicon.default()
    pipeline = SignSymPipeline([lexicon, PatternRecognizer(lexicon)], ContextMatcher())
    text = "no fever, denies cough, "
    long, short = in_turn(lambda: pipeline(text * 1600),
                          lambda: [pipeline(text * 160) for _ in range(10)])
    row("SignSym, a sentence of 9,600 tokens against ten of 960", long, short, bound=1.3)
