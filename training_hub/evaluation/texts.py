"""Scores of answers against references, as pure functions: texts in, numbers out.

Each gives the score of the whole and one for each row. Shares are from 0 to 1; BLEU and chrF are from 0 to 100, as
sacrebleu gives them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from training_hub.errors import DataError

ARTICLES = re.compile(r"\b(a|an|the)\b")
WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Texts:
    """What was said, and what should have been: one entry each for every row.

    prompts and origins (where a row stands) serve a function of the user's and its errors.
    """

    answers: Sequence[str]
    references: Sequence[str]
    prompts: Sequence[str] = ()
    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.answers) != len(self.references):
            raise DataError(f"{len(self.answers)} answers for {len(self.references)} references; one for each.")
        if not self.references:
            raise DataError("no answers; a score needs at least one.")


Scored = tuple[float, list[float]]
"""The score of the whole, and that of each row."""

Score = Callable[[Texts], Scored]


def normalized(text: str) -> str:
    """The text as SQuAD compares it: lower case, no punctuation, no articles (a, an, the), single spaces.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1. Punctuation is every Unicode category P and S here, so
    "-5" and "5" are the same and "3.5" is "35": for numbers take exact_match, or a function of your own.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    plain = "".join(character for character in folded if unicodedata.category(character)[0] not in "PS")
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact_match(texts: Texts) -> Scored:
    """The share of answers that are their reference, letter by letter.

    Unicode is composed (NFC) first, and white space around either does not count.
    """
    return _mean([_composed(said) == _composed(wanted) for said, wanted in _pairs(texts)])


def normalized_match(texts: Texts) -> Scored:
    """The share of answers that are their reference once both are `normalized`."""
    return _mean([normalized(said) == normalized(wanted) for said, wanted in _pairs(texts)])


def token_f1(texts: Texts) -> Scored:
    """The words that answer and reference share, as F1 on average: 2 x shared / (words of both), both `normalized`.

    Two empty texts are alike: 1. Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1.
    """
    return _mean([_f1(normalized(said).split(), normalized(wanted).split()) for said, wanted in _pairs(texts)])


def accuracy(texts: Texts) -> Scored:
    """The share of answers that choose their reference's label, for choices and classes.

    The labels are all references, without case and without punctuation around them. An answer chooses the one that
    stands first in it as whole words, the longer one where two begin together: "The answer is (B)." chooses B.
    """
    labels = {_label(wanted) for wanted in texts.references} - {""}
    longest_first = sorted(labels, key=lambda label: (-len(label), label))
    found = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})(?!\w)")

    def chosen(said: str) -> str | None:
        match = found.search(_folded(said))
        return match.group() if match else None

    return _mean([chosen(said) == _label(wanted) for said, wanted in _pairs(texts)])


def bleu(texts: Texts) -> Scored:
    """BLEU of the corpus by sacrebleu (its defaults: 13a tokens, 4-grams), 0 to 100.

    A row's is that of the sentence with effective order, and the whole is not their mean.
    """
    from sacrebleu.metrics import BLEU

    one = BLEU(effective_order=True)
    whole = BLEU().corpus_score(list(texts.answers), [list(texts.references)]).score
    return whole, [one.sentence_score(said, [wanted]).score for said, wanted in _pairs(texts)]


def chrf(texts: Texts) -> Scored:
    """chrF of the corpus by sacrebleu (its defaults: 6-grams of characters, beta 2), 0 to 100."""
    from sacrebleu.metrics import CHRF

    judge = CHRF()
    whole = judge.corpus_score(list(texts.answers), [list(texts.references)]).score
    return whole, [judge.sentence_score(said, [wanted]).score for said, wanted in _pairs(texts)]


def rouge(kind: str) -> Score:
    """The F-measure of rouge-score on average: `kind` is rouge1, rouge2 or rougeL; no stemming.

    Words are runs of letters and digits of any script. On ASCII these are rouge-score's own, which finds no word in
    others at all.
    """

    def score(texts: Texts) -> Scored:
        from rouge_score.rouge_scorer import RougeScorer

        judge: Any = RougeScorer([kind], tokenizer=_Words())
        return _mean([judge.score(wanted, said)[kind].fmeasure for said, wanted in _pairs(texts)])

    return score


class _Words:
    """The tokenizer that rouge-score is handed."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


def _pairs(texts: Texts) -> zip[tuple[str, str]]:
    return zip(texts.answers, texts.references, strict=True)


def _mean(rows: Sequence[float]) -> Scored:
    return sum(rows) / len(rows), [float(row) for row in rows]


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _label(text: str) -> str:
    folded = _folded(text)
    start, end = 0, len(folded)
    while start < end and not folded[start].isalnum():
        start += 1
    while end > start and not folded[end - 1].isalnum():
        end -= 1
    return folded[start:end] or folded


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))
