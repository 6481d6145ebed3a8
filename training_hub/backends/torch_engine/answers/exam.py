"""How a torch model is asked what `shared.exam` compares and writes down."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_hub.backends.shared import exam as shared
from training_hub.backends.shared.answers import Answer
from training_hub.backends.shared.exam import Exam, Examiner, told
from training_hub.backends.shared.materials import limits_of
from training_hub.backends.torch_engine.answers.generate import share_of_answers
from training_hub.backends.torch_engine.compiling import uncompiled
from training_hub.backends.torch_engine.layouts import WHOLE, Layout
from training_hub.backends.torch_engine.materials import Materials, stop_ids
from training_hub.data.store import TokenStore
from training_hub.recipe import Recipe
from training_hub.recipe.evaluation import Evaluation, rows_generated
from training_hub.types import Console

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def ask(
    examiner: Examiner, model: PreTrainedModel, console: Console, what: str = "answering", layout: Layout = WHOLE
) -> list[Answer]:
    """The answers to all questions. Of several processes each asks a part of them, and all must come here."""
    prompts, size = examiner.prompts(limits_of(model.config)), layout.asking_size
    total = math.ceil(len(prompts) / size) if size == 1 or examiner.decoding.temperature == 0 else None

    def said() -> list[Any]:
        with uncompiled(model), layout.in_step(model), console.progress(what, total, "answers") as advance:
            own = share_of_answers(
                model, prompts, examiner.decoding, examiner.batch_tokens, advance, layout.asking_rank, size
            )
        return [[number, one.ids, one.finish_reason] for number, one in own.items()]

    heard = {number: Answer(tuple(ids), why) for some in layout.group.each(what, said) for number, ids, why in some}
    return [heard[number] for number in range(len(prompts))]


def begin(exam: Exam, model: PreTrainedModel, console: Console, layout: Layout = WHOLE) -> None:
    """Ask before the first step, once."""
    exam.before = take(exam, model, 0, console, layout)
    console.say(f"answers before training: {told(exam.before)}")


def take(exam: Exam, model: PreTrainedModel, step: int, console: Console, layout: Layout = WHOLE) -> dict[str, float]:
    """Ask at `step`, write down what was said, and give the scores, to all processes of the run."""
    what = f"answers at step {step}"
    given = ask(exam.examiner, model, console, what, layout)
    exam.last = layout.group.on_main(what, lambda: exam.note(given, step, console))
    return dict(exam.last)


def examiner_of(
    asked: Evaluation,
    seed: int,
    materials: Materials,
    store: TokenStore,
    most: int | None,
    own: Sequence[Callable[..., Any]] = (),
) -> Examiner:
    """The examiner for rows of `store`, all or `most` of them. own: metrics of the user's, as functions."""
    return shared.examiner_of(asked, seed, materials.tokenizer, stop_ids(materials), store, most, own)


def exam_of(recipe: Recipe, materials: Materials) -> Exam | None:
    """The exam of a run, None where the recipe asks for none."""
    if not recipe.evaluation.generate or materials.prepared.validation is None:
        return None
    most, store = rows_generated(recipe.evaluation), materials.prepared.validation
    return Exam(
        examiner_of(recipe.evaluation, recipe.seed, materials, store, most, materials.metrics), Path(recipe.output)
    )
