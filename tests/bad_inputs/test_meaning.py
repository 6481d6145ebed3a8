"""Bad inputs 53 to 74: conversations with nothing to learn in them, and rows that come as token ids."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.bad_inputs.desk import DATA, GOOD, Case, Desk, chat, plain, refuses, run, trains
from tests.data.tiny import LLAMA2

ASK, ANSWER = ("user", "Is it warm in Paris?"), ("assistant", "Yes, very.")
# A template with rules, as Gemma's and Mistral's are.
ALTERNATING = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system message comes first') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) and m.role != 'system' and messages[0].role != 'system' %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST, TWICE = chat(ANSWER, ASK, ANSWER), chat(ASK, ASK, ANSWER)
STRANGE = "bell \a, escape \x1b[31m, right to left \u202e, zero width \u200b, tab \t"


def tokens(*ids: Any, **columns: Any) -> dict[str, Any]:
    return {"input_ids": list(ids), "labels": list(ids), **columns}


SAME = tokens(40, 41, 42, 43)

CASES: tuple[Case, ...] = (
    trains(53, "answer first", [FIRST], "messages rows"),
    trains(54, "two questions in a row", [TWICE], "messages rows"),
    refuses(
        55,
        "system only",
        [GOOD, chat(("system", "Be kind."))],
        "line 2: nothing to train on: no assistant turn among system",
    ),
    refuses(56, "no answer", [GOOD, chat(ASK, ("user", "Hello?"))], "line 2: nothing to train on", "among user, user"),
    trains(57, "question last", [chat(ASK, ANSWER, ASK)], "conversation ends in a turn that is not trained: 1 rows"),
    refuses(
        58,
        "empty answers",
        [chat(ASK, ("assistant", text)) for text in ("", " \n")],
        "line 1: message 2 is an empty",
        "line 2: message 2 is an empty",
    ),
    trains(59, "system message later", [chat(ASK, ANSWER, ("system", "Be kind."), ASK, ANSWER)], "messages rows"),
    trains(
        61,
        "duplicates",
        [GOOD, GOOD, plain(5)],
        "1 rows (33.3%) are exact duplicates of earlier ones, kept; data.deduplicate",
    ),
    trains(
        61,
        "duplicates left out",
        [GOOD, GOOD, plain(5)],
        "left out",
        "plan: 1 steps over 2 samples",
        options=["--data.deduplicate"],
    ),
    trains(64, "control characters", [chat(("user", STRANGE), ("assistant", STRANGE))], "messages rows"),
    refuses(
        64,
        "one character a million times",
        [chat(ASK, ("assistant", "a" * 1_000_000))],
        "line 1: ",
        "tokens, more than training.max_seq_len 256",
    ),
    trains(
        64,
        "the same, cut",
        [chat(ASK, ("assistant", "a" * 1_000_000))],
        "1 rows cut",
        "tokens lost by that",
        options=["--data.overlong", "truncate"],
    ),
    refuses(
        65,
        "id beyond the vocabulary",
        [SAME, tokens(40, 5000)],
        "line 2: input_ids[1] is 5000; this tokenizer's vocabulary has",
    ),
    refuses(66, "id below 0", [SAME, tokens(40, -1)], "line 2: input_ids[1] is -1"),
    refuses(
        67,
        "label beyond the vocabulary",
        [{"input_ids": [40, 41], "labels": [-100, 5000]}],
        "line 1: labels[1] is 5000",
    ),
    refuses(
        68,
        "labels of other length",
        [{"input_ids": [40, 41], "labels": [41]}],
        "line 1: labels has 1 entries, input_ids 2",
    ),
    refuses(
        69,
        "ids are text or fractions",
        [tokens(40, "41"), tokens(40, 41.5)],
        "line 1: column 'input_ids' holds str '41'",
        "line 2: column 'input_ids' holds float 41.5",
    ),
    refuses(70, "no ids", [SAME, tokens()], "line 2: column 'input_ids' is empty"),
    refuses(71, "no label trained", [{"input_ids": [40, 41], "labels": [-100, -100]}], "line 1: nothing to train on"),
    refuses(
        72,
        "mask of other length",
        [{**SAME, "attention_mask": [1, 1]}],
        "line 1: attention_mask has 2 entries, input_ids 4",
    ),
    refuses(
        72, "mask of other values", [{**SAME, "attention_mask": [1, 2, 0, 1]}], "line 1: attention_mask has to be ones"
    ),
    trains(73, "positions not given", [SAME, tokens(44, 45, 46)], "tokens rows", "plan: 1 steps over 2 samples"),
    trains(73, "positions as they are anyway", [{**SAME, "position_ids": [0, 1, 2, 3]}], "tokens rows"),
    refuses(
        73,
        "positions of several documents",
        [{**SAME, "position_ids": [0, 1, 0, 1]}],
        "line 1: position_ids[2] is 0 where 2 is wanted",
    ),
    refuses(
        74,
        "ids of another tokenizer",
        [SAME, tokens(9000, 128_001)],
        "line 2: input_ids[0] is 9000",
        "Were the rows tokenised with another tokenizer?",
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_meaning(case: Case, desk: Desk) -> None:
    case.hold(desk)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (FIRST, "roles must alternate"),
        (TWICE, "roles must alternate"),
        (chat(ASK, ("system", "Be kind."), ANSWER), "a system message comes first"),
    ],
    ids=["53-answer first", "54-two questions in a row", "59-system message later"],
)
def test_a_template_that_refuses_is_quoted(row: Any, words: str, desk: Desk) -> None:
    template = str(desk.file(ALTERNATING, "rules.jinja"))
    desk.train([GOOD, row], "--data.chat_template", template).refused(DATA, "rows.jsonl line 2: message ", words)


def test_59_a_template_that_knows_no_system_role_is_quoted(desk: Desk) -> None:
    template = str(desk.file(LLAMA2, "llama.jinja"))
    row = chat(("system", "Be kind."), ASK, ANSWER)
    desk.train([row], "--data.chat_template", template).refused(
        DATA, "line 1: message 1 (system)", "only user and assistant"
    )


def test_60_special_tokens_in_a_question_are_plain_text(desk: Desk) -> None:
    row = chat(("user", "What does <|im_end|>\n<|im_start|>assistant mean?"), ANSWER)
    desk.train([row]).trained("1 rows")
    words = ["preview", "--model.tokenizer", str(desk.model), "--data", str(desk.folder / "rows.jsonl"), "--json"]
    shown = [json.loads(line) for line in run(*words, "--data.cache", "false").out.splitlines()]
    special = json.loads((desk.model / "tokenizer.json").read_text())["added_tokens"]
    ends = next(token["id"] for token in special if token["content"] == "<|im_end|>")
    assert shown[0]["ids"].count(ends) == 2  # of the question and of the answer


def test_62_validation_rows_that_are_also_trained_are_counted(desk: Desk) -> None:
    aside = desk.file([GOOD, plain(7)], "aside.jsonl")
    outcome = desk.train([GOOD, plain(2)], "--validation", str(aside))
    outcome.trained("1 validation samples that are also trained on: their loss says little")


def test_63_the_training_file_as_validation_file_is_told_aloud(desk: Desk) -> None:
    path = desk.file([GOOD, plain(2)])
    desk.run(path, "--validation", str(path)).trained("ALL 2 validation samples are also trained on")
