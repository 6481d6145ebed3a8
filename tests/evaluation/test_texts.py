"""Scores of answers: worked examples, and the libraries' own numbers."""

from __future__ import annotations

import pytest

from training_hub.errors import DataError
from training_hub.evaluation.texts import (
    Texts,
    accuracy,
    bleu,
    chrf,
    exact_match,
    normalized,
    normalized_match,
    rouge,
    token_f1,
)

SAID = ["the cat sat on the mat", "a dog", "nothing"]
WANTED = ["the cat is on the mat", "A dog.", "a horse ran home"]


def test_exact_match_counts_letters_case_and_punctuation_but_not_outer_white_space():
    whole, rows = exact_match(Texts([" 42\n", "4 2", "Dog", "e\u0301"], ["42", "42", "dog", "\u00e9"]))
    assert rows == [1, 0, 0, 1] and whole == 0.5


def test_normalized_drops_case_punctuation_articles_and_extra_spaces():
    assert normalized("The  Answer,\nis: a 'CAT'!") == "answer is cat"
    assert normalized("-5") == normalized("5") and normalized("3.5") == "35"
    assert normalized("theory") == "theory"
    assert normalized_match(Texts(SAID, WANTED)) == (1 / 3, [0, 1, 0])


def test_f1_is_the_words_shared_over_the_words_of_both():
    whole, rows = token_f1(Texts(SAID, WANTED))
    # cat, on, mat are shared by cat sat on mat and cat is on mat.
    assert rows == pytest.approx([2 * 3 / 8, 1.0, 0.0])
    assert whole == pytest.approx(sum(rows) / 3)
    assert token_f1(Texts(["", "word"], ["", ""]))[1] == [1.0, 0.0]
    assert token_f1(Texts(["no no no"], ["no yes"]))[1] == pytest.approx([2 / 5])  # a word counts as often as in both


@pytest.mark.parametrize(
    "said, right",
    [
        ("B", True),
        ("(b).", True),
        ("The answer is (B).", True),
        ("Bingo", False),
        ("C, not B", False),
        ("", False),
        ("none of them", False),
    ],
)
def test_accuracy_takes_the_label_that_stands_first(said: str, right: bool):
    whole, rows = accuracy(Texts([said, "c"], ["B", "C"]))
    assert rows == [float(right), 1.0] and whole == (right + 1) / 2


def test_of_two_labels_that_begin_together_the_longer_is_chosen():
    labels = ["new", "new york", "?!"]
    assert accuracy(Texts(["It is New York", "new", "?!"], ["new york", "new", "?!"]))[1] == [1, 1, 1]
    assert accuracy(Texts(["New York", "New York", "-"], labels))[1] == [0, 1, 0]


def test_bleu_is_sacrebleus_with_references_the_right_way_round():
    import sacrebleu

    whole, rows = bleu(Texts(SAID, WANTED))
    assert whole == pytest.approx(sacrebleu.corpus_bleu(SAID, [WANTED]).score)
    assert 0 < whole < 100 and rows[0] > rows[2]
    assert bleu(Texts(WANTED, WANTED))[0] == pytest.approx(100)


def test_chrf_is_sacrebleus():
    import sacrebleu

    whole, rows = chrf(Texts(SAID, WANTED))
    assert whole == pytest.approx(sacrebleu.corpus_chrf(SAID, [WANTED]).score)
    assert rows[0] == pytest.approx(sacrebleu.sentence_chrf(SAID[0], [WANTED[0]]).score)


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_rouge_score_on_ascii(kind: str):
    from rouge_score.rouge_scorer import RougeScorer

    said = ["The cat_sat on the mat, didn't it?", "x1 y2", ""]
    wanted = ["the cat sat: on THE mat", "y2 x1 z3", "word"]
    own = RougeScorer([kind])
    expected = [own.score(right, one)[kind].fmeasure for one, right in zip(said, wanted, strict=True)]
    whole, rows = rouge(kind)(Texts(said, wanted))
    assert rows == pytest.approx(expected) and whole == pytest.approx(sum(expected) / 3)


def test_rouge_finds_words_of_other_scripts():
    assert rouge("rouge1")(Texts(["кошка спит"], ["кошка ест"]))[0] == pytest.approx(0.5)


def test_lists_of_different_length_and_nothing_at_all_are_refused():
    with pytest.raises(DataError, match="1 answers for 2 references"):
        Texts(["a"], ["a", "b"])
    with pytest.raises(DataError, match="at least one"):
        Texts([], [])
