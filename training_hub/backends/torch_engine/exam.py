"""Evaluation by generation: rows asked as training shows them, answers compared, and the files that show both."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_hub.backends.shared.answers import Answer, Decoding, Prompt
from training_hub.backends.shared.materials import limits_of
from training_hub.backends.torch_engine.generate import answers
from training_hub.backends.torch_engine.layouts import WHOLE, Layout
from training_hub.backends.torch_engine.materials import Materials, stop_ids
from training_hub.data.questions import Question, questions_of
from training_hub.data.store import TokenStore
from training_hub.evaluation.judging import Metric, judge, metrics_of
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
from training_hub.recipe import Recipe
from training_hub.recipe.evaluation import Evaluation, rows_generated
from training_hub.types import Console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    def examine(self, model: PreTrainedModel, console: Console, what: str = "answering") -> Sitting:
        """Ask the model everything once. Raises DataError where a metric of the user's fails, naming the rows."""
        return self.judge(self.ask(model, console, what))

    def ask(self, model: PreTrainedModel, console: Console, what: str, layout: Layout = WHOLE) -> list[Answer]:
        """The answers to all questions. Of several processes each asks a part of them, and all must come here."""
        positions = limits_of(model.config)
        hard = positions.positions if positions.is_hard else None
        limits = [self.limit if hard is None else min(self.limit, hard - len(one.prompt)) for one in self.questions]
        prompts = [Prompt(one.prompt, limit) for one, limit in zip(self.questions, limits, strict=True)]
        order = sorted(range(len(prompts)), key=lambda number: (prompts[number].limit, len(prompts[number].ids)))
        mine = order[layout.asking_rank :: layout.asking_size]

        def said() -> list[Any]:
            with layout.in_step(model), console.progress(what, total=len(mine), unit="answers") as advance:
                own = [prompts[number] for number in mine]
                given = answers(model, own, self.decoding, self.batch_tokens, advance) if own else []
            return [[number, one.ids, one.finish_reason] for number, one in zip(mine, given, strict=True)]

        heard = {number: Answer(tuple(ids), why) for some in layout.group.each(what, said) for number, ids, why in some}
        return [heard[number] for number in range(len(prompts))]

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
    materials: Materials,
    store: TokenStore,
    most: int | None,
    own: Sequence[Callable[..., Any]] = (),
) -> Examiner:
    """The examiner for rows of `store`, all or `most` of them. own: metrics of the user's, as functions."""
    questions = questions_of(store, most)
    decoding = Decoding(tuple(stop_ids(materials)), asked.temperature, asked.top_p, seed)
    hf = materials.tokenizer.hf
    return Examiner(
        questions,
        decoding,
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

    def begin(self, model: PreTrainedModel, console: Console, layout: Layout = WHOLE) -> None:
        """Ask before the first step, once."""
        self.before = self.take(model, 0, console, layout)
        console.say(f"answers before training: {told(self.before)}")

    def take(self, model: PreTrainedModel, step: int, console: Console, layout: Layout = WHOLE) -> dict[str, float]:
        """Ask at `step`, write down what was said, and give the scores, to all processes of the run."""
        what = f"answers at step {step}"
        given = self.examiner.ask(model, console, what, layout)
        self.last = layout.group.on_main(what, lambda: self._note(given, step, console))
        return dict(self.last)

    def _note(self, given: Sequence[Answer], step: int, console: Console) -> dict[str, float]:
        sitting = self.examiner.judge(given)
        self.last = sitting.scores
        write_predictions(self._file(step), sitting.predictions)
        self.show(step)
        if step and self.last["unfinished"] > FEW_END:
            console.say(self._few_end(step))
        return self.last

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


def exam_of(recipe: Recipe, materials: Materials) -> Exam | None:
    """The exam of a run, None where the recipe asks for none."""
    if not recipe.evaluation.generate or materials.prepared.validation is None:
        return None
    most, store = rows_generated(recipe.evaluation), materials.prepared.validation
    return Exam(
        examiner_of(recipe.evaluation, recipe.seed, materials, store, most, materials.metrics), Path(recipe.output)
    )


def told(scores: Mapping[str, float]) -> str:
    """'exact_match 0.41, unfinished 0.03, answer_tokens 12.3'."""
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
