"""The score: exact, finished answers only, and the same in any batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from training_hub.demo.base import CHAT_TEMPLATE, byte_tokenizer, save_untrained
from training_hub.demo.scoring import LONGEST_ANSWER, Answered, Score, score
from training_hub.demo.tasks import MOST_LETTERS, draw_questions
from training_hub.monitoring.console import SilentConsole


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "untrained"
    save_untrained(folder, seed=0)
    return folder


def test_an_answer_counts_only_where_it_is_exact_and_the_turn_is_ended():
    question = draw_questions(1, seed=0, held_out=True)[0]
    assert Answered(question, question.answer, finished=True).is_right
    assert not Answered(question, question.answer, finished=False).is_right
    assert not Answered(question, question.answer + " ", finished=True).is_right


def test_shares_are_counted_by_task_and_over_all():
    questions = draw_questions(22, seed=0, held_out=True)
    answers = tuple(Answered(question, question.answer, question.task == "spell") for question in questions)
    assert Score(answers).share_right == pytest.approx(2 / 22)
    by_task = Score(answers).by_task()
    assert by_task.pop("spell") == 1.0
    assert set(by_task.values()) == {0.0}


def test_a_model_answers_alike_in_small_and_large_batches(untrained: Path):
    questions = draw_questions(11, seed=0, held_out=True)
    alone = score(untrained, questions, SilentConsole(), batch_size=1)
    together = score(untrained, questions, SilentConsole(), batch_size=11)
    assert [answer.said for answer in alone.answers] == [answer.said for answer in together.answers]
    assert alone.share_right == 0.0


def test_the_longest_answer_fits():
    words = draw_questions(3_000, seed=3, held_out=False)
    assert max(len(question.answer) for question in words) == 2 * MOST_LETTERS + 1 < LONGEST_ANSWER


def test_the_byte_tokenizer_gives_any_text_back():
    tokenizer = byte_tokenizer()
    text = "<|im_start|>user\nSäg  hej. \n\t€<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode()) - len("<|im_start|>") - len("<|im_end|>") + 2


def test_the_template_lets_the_assistant_begin_behind_its_name():
    tokenizer = byte_tokenizer()
    assert tokenizer.chat_template == CHAT_TEMPLATE
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert shown == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
