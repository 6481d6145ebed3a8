"""How many questions a model answers exactly: greedy generation in batches, compared letter by letter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_hub.demo.tasks import Question
from training_hub.types import Console

# The longest answer says a word of six letters twice, 13 characters, and one token ends the turn.
LONGEST_ANSWER = 18


@dataclass(frozen=True)
class Answered:
    """A question and what the model said to it; `finished` is whether it also ended its turn."""

    question: Question
    said: str
    finished: bool

    @property
    def is_right(self) -> bool:
        return self.finished and self.said == self.question.answer


@dataclass(frozen=True)
class Score:
    """All answers of one model."""

    answers: tuple[Answered, ...]

    @property
    def share_right(self) -> float:
        return sum(answer.is_right for answer in self.answers) / len(self.answers)

    def by_task(self) -> dict[str, float]:
        """Share of right answers for each task, in the order of the questions."""
        tasks = dict.fromkeys(answer.question.task for answer in self.answers)
        return {task: self._share(task) for task in tasks}

    def _share(self, task: str) -> float:
        rights = [answer.is_right for answer in self.answers if answer.question.task == task]
        return sum(rights) / len(rights)


def score(model_folder: Path, questions: Sequence[Question], console: Console, batch_size: int = 64) -> Score:
    """Ask every question once, as a chat, and keep what the model says when it always takes the likeliest token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a bar for a file of a megabyte only hides ours
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32").eval()
    answers: list[Answered] = []
    with console.progress(f"asking {model_folder.name}", total=len(questions), unit="questions") as advance:
        for start in range(0, len(questions), batch_size):
            asked = questions[start : start + batch_size]
            answers += _answer(model, tokenizer, asked)
            advance(len(asked))
    return Score(tuple(answers))


def _answer(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[Answered]:
    chats = [[question.as_conversation()["messages"][0]] for question in questions]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    # Padded on the left, so that every row's answer starts in the same column.
    rows = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    made = model.generate(
        **rows,
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = made[:, rows["input_ids"].shape[1] :].tolist()
    return [_read(question, ids, tokenizer) for question, ids in zip(questions, new, strict=True)]


def _read(question: Question, ids: list[int], tokenizer: Any) -> Answered:
    finished = tokenizer.eos_token_id in ids
    said = ids[: ids.index(tokenizer.eos_token_id)] if finished else ids
    return Answered(question, tokenizer.decode(said), finished)
