"""The questions of the demo: right answers, disjoint halves, the same on every machine."""

from __future__ import annotations

import random

import pytest

from training_hub.demo.tasks import TASKS, draw_prose, draw_questions, is_held_out

ANSWERS = {
    "reverse": (("stone",), "enots"),
    "spell": (("stone",), "s-t-o-n-e"),
    "capitals": (("stone",), "STONE"),
    "first letter": (("stone",), "s"),
    "last letter": (("stone",), "e"),
    "length": (("stone",), "5"),
    "vowels": (("stone",), "o e"),
    "twice": (("stone",), "stone stone"),
    "after": (("399",), "400"),
    "before": (("400",), "399"),
    "larger": (("9", "12"), "12"),
}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_each_task_has_the_right_answer(task):
    operands, answer = ANSWERS[task.name]
    assert task.answer(*operands) == answer


def test_trained_and_held_out_questions_share_no_word_and_no_number():
    trained = {operand for question in draw_questions(500, seed=5, held_out=False) for operand in question.operands}
    scored = {operand for question in draw_questions(220, seed=7, held_out=True) for operand in question.operands}
    assert not trained & scored
    assert all(is_held_out(operand) for operand in scored)


def test_all_tasks_are_asked_equally_often():
    questions = draw_questions(220, seed=7, held_out=True)
    counts = [sum(question.task == task.name for question in questions) for task in TASKS]
    assert counts == [20] * len(TASKS)
    assert len({question.prompt for question in questions}) == 220


def test_questions_are_a_function_of_the_seed():
    assert draw_questions(30, seed=1, held_out=True) == draw_questions(30, seed=1, held_out=True)
    assert draw_questions(30, seed=1, held_out=True) != draw_questions(30, seed=2, held_out=True)


def test_the_base_model_reads_no_question():
    rng = random.Random(0)
    prose = " ".join(draw_prose(rng) for _ in range(2_000))
    assert "?" not in prose
    asked = {instruction.split("{")[0].strip() for task in TASKS for instruction in task.instructions}
    assert not [start for start in asked if start in prose]


def test_a_question_is_a_row_in_the_messages_format():
    question = draw_questions(1, seed=0, held_out=False)[0]
    user, assistant = question.as_conversation()["messages"]
    assert user == {"role": "user", "content": question.prompt}
    assert assistant == {"role": "assistant", "content": question.answer}


def test_more_held_out_questions_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="ask for fewer"):
        draw_questions(5_000, seed=0, held_out=True)
