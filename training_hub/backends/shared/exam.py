"""Evaluation by generation: rows asked as training shows them, answers compared, and the files that show both.

How a model is asked is the engines' own.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training_hub.backends.shared.answers import Advance, Answer, Decoding, Prompt
from training_hub.backends.shared.materials import Limits
from training_hub.data.questions import Question, questions_of
from training_hub.data.store import TokenStore
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.evaluation.judging import Metric, judge, metrics_of
from training_hub.evaluation.metrics import exact_match
from training_hub.evaluation.predictions import (
    FILE_NAME,
    Prediction,
    Sitting,
    read_predictions,
    side_by_side,
    write_predictions,
    write_rows,
)
from training_hub.evaluation.texts import Texts
from training_hub.recipe.evaluation import Evaluation
from training_hub.types import Console

Answering = Callable[[Sequence[Prompt], Decoding, Advance], list[Answer]]
"""How an engine lets its model answer prompts; the last is told of each that is done."""

LEAST_TOKENS, MOST_TOKENS = 16, 512
ROOM = 1.25
"""How much longer than the longest reference an answer may get where evaluation.max_new_tokens does not say."""

FEW_END = 0.5
"""Share of answers that do not end from which a run says so."""


def limit_of(asked: Evaluation, questions: Sequence[Question]) -> int:
    """Most tokens of an answer."""
    longest = max(len(one.answer) for one in questions)
    return asked.max_new_tokens or min(MOST_TOKENS, max(LEAST_TOKENS, math.ceil(ROOM * longest)))


@dataclass(frozen=True)
class Examiner:
    """What asks and judges: questions, how to answer them, by what the answers are compared.

    text: from token ids to what they say.
    """

    questions: Sequence[Question]
    decoding: Decoding
    limit: int
    batch_tokens: int
    metrics: Sequence[Metric]
    text: Callable[[Sequence[int]], str]

    def prompts(self, limits: Limits) -> list[Prompt]:
        """The questions as a model with these limits can be asked them."""
        hard = limits.positions if limits.is_hard else None
        rooms = [self.limit if hard is None else min(self.limit, hard - len(one.prompt)) for one in self.questions]
        return [Prompt(one.prompt, room) for one, room in zip(self.questions, rooms, strict=True)]

    def judge(self, given: Sequence[Answer]) -> Sitting:
        """What the answers are worth. Raises DataError where a metric of the user's fails, naming the rows."""
        asked = [self.text(one.prompt) for one in self.questions]
        wanted = [self.text(self._until_stop(one.answer)) for one in self.questions]
        said = [self.text(one.ids) for one in given]
        origins = [one.origin for one in self.questions]
        scores, rows = judge(Texts(said, wanted, asked, origins), self.metrics)
        scores["unfinished"] = sum(one.finish_reason == "length" for one in given) / len(given)
        scores["answer_tokens"] = sum(len(one.ids) for one in given) / len(given)
        columns = zip(origins, asked, wanted, said, given, rows, strict=True)
        predictions = tuple(
            Prediction(origin, prompt, reference, answer, one.finish_reason, len(one.ids), row)
            for origin, prompt, reference, answer, one, row in columns
        )
        return Sitting(predictions, scores)

    def _until_stop(self, ids: Sequence[int]) -> Sequence[int]:
        end = next((place for place, token in enumerate(ids) if token in self.decoding.stop_ids), len(ids))
        return ids[:end]


def examiner_of(
    asked: Evaluation,
    seed: int,
    tokenizer: ChatTokenizer,
    stop_ids: Sequence[int],
    store: TokenStore,
    most: int | None,
    own: Sequence[Callable[..., Any]] = (),
) -> Examiner:
    """The examiner for rows of `store`, all or `most` of them. own: metrics of the user's, as functions."""
    questions, hf = questions_of(store, most), tokenizer.hf
    return Examiner(
        questions,
        Decoding(tuple(stop_ids), asked.temperature, asked.top_p, seed),
        limit_of(asked, questions),
        asked.batch_tokens,
        metrics_of(asked.metrics, own),
        lambda ids: hf.decode(list(ids)),
    )


@dataclass
class Exam:
    """The same questions during a run, and what was said at each step.

    before: scores before the first step, empty where none were taken. last: those of the last time.
    """

    examiner: Examiner
    folder: Path
    before: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def clear(self) -> None:
        """Remove what another run left in the folder."""
        shutil.rmtree(self._file(0).parent, ignore_errors=True)
        (self.folder / FILE_NAME).unlink(missing_ok=True)

    def note(self, given: Sequence[Answer], step: int, console: Console) -> dict[str, float]:
        """Judge and write down what was said at `step`; the scores. Step 0 is before the first."""
        sitting = self.examiner.judge(given)
        self.last = sitting.scores
        write_predictions(self._file(step), sitting.predictions)
        self.show(step)
        if step and self.last["unfinished"] > FEW_END:
            console.say(self._few_end(step))
        return dict(self.last)

    def show(self, step: int) -> Path | None:
        """Write predictions.jsonl: the answers of the last time up to `step`, beside those before training."""
        steps = [int(path.stem.removeprefix("step-")) for path in self._file(0).parent.glob("step-*.jsonl")]
        taken = max((one for one in steps if one <= step), default=None)
        if taken is None:
            return None
        before = read_predictions(self._file(0)) if self._file(0).is_file() and taken else None
        tuned = read_predictions(self._file(taken))
        sides: Mapping[str, Sequence[Prediction]] = {"base": before, "tuned": tuned} if before else {"tuned": tuned}
        if taken == 0:
            sides = {"base": tuned}
        path = self.folder / FILE_NAME
        write_rows(path, ({**row, "step": taken} for row in side_by_side(sides)))
        return path

    def metrics(self) -> dict[str, float]:
        """The last scores and those before training, for the result."""
        before = {f"validation_{name}_before": value for name, value in self.before.items()}
        return before | {f"validation_{name}": value for name, value in self.last.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint notes of it."""
        return {"before": self.before, "last": self.last}

    def load(self, state: Mapping[str, Any]) -> None:
        self.before, self.last = dict(state.get("before") or {}), dict(state.get("last") or {})

    def _file(self, step: int) -> Path:
        return self.folder / "predictions" / f"step-{step}.jsonl"

    def _few_end(self, step: int) -> str:
        longest = max(len(one.answer) for one in self.examiner.questions)
        share, limit = self.last["unfinished"], self.examiner.limit
        if longest > limit:
            return (
                f"answers at step {step}: {share:.0%} were cut at {limit} tokens, and the rows' own are up to {longest}"
                f" long. Write evaluation.max_new_tokens: {longest + 16}"
            )
        return (
            f"answers at step {step}: {share:.0%} did not end within {limit} tokens, the rows' own within {longest}. "
            "Where training does not change that, look whether the token that ends a turn is trained: training-hub "
            "preview"
        )


def told(scores: Mapping[str, float]) -> str:
    """'exact_match 0.41, unfinished 0.03, answer_tokens 12.3'."""
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def share_right(
    store: TokenStore, stop_ids: Sequence[int], tokenizer: ChatTokenizer, answer: Answering, console: Console
) -> float:
    """The share of rows whose likeliest answer is the reference's, letter by letter but for white space around it, and
    ends where it does."""
    questions = questions_of(store)
    # One token more than is wanted tells an answer that ends from one that goes on.
    prompts = [Prompt(one.prompt, len(one.answer) + 1) for one in questions]
    with console.progress("answering", total=len(questions), unit="rows") as advance:
        given = answer(prompts, Decoding(tuple(stop_ids)), advance)
    said = [_marked(one.ids, one.finish_reason == "stop", tokenizer) for one in given]
    return exact_match(said, [_wanted(one.answer, stop_ids, tokenizer) for one in questions])


def _wanted(ids: Sequence[int], stops: Sequence[int], tokenizer: ChatTokenizer) -> str:
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return _marked(ids[:end], end < len(ids), tokenizer)


def _marked(ids: Sequence[int], ends: bool, tokenizer: ChatTokenizer) -> str:
    """The text, with a mark behind it where it ends, so that an answer that goes on is not taken for one that ends."""
    text = tokenizer.hf.decode(list(ids)).strip()
    return f"{text}\N{END OF TRANSMISSION}" if ends else text
