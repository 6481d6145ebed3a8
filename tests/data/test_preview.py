"""A preview shows what a run trains on: the same ids and weights, and every row that a run would refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny import CHATML, CHATML_TOKENS, chat_tokenizer, template
from training_hub.data.prepare import prepare
from training_hub.data.preview import DUPLICATE, SET_ASIDE, Preview, Unheard, num_problems, preview, token_texts
from training_hub.errors import DataError
from training_hub.recipe import Recipe

TOKENIZER = chat_tokenizer()
TEMPLATE = template(CHATML, TOKENIZER)


def row(answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi\tthere"}, {"role": "assistant", "content": answer, **more}]}


def recipe_for(folder: Path, rows: list[Any], /, **data: Any) -> Recipe:
    path = folder / "rows.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    sections = {"data": {"path": str(path), "cache": False, **data}, "training": {"max_seq_len": 200}}
    return Recipe.model_validate({"model": {"path": "none"}, "output": "none", **sections})


def shown(recipe: Recipe, **settings: Any) -> Preview:
    return preview(recipe, tokenizer=TOKENIZER, template=TEMPLATE, console=Unheard(), **settings)


def trained(recipe: Recipe):
    return prepare(recipe, tokenizer=TOKENIZER, template=TEMPLATE, console=Unheard()).train


@pytest.mark.parametrize(
    "data",
    [{}, {"unmask": True}, {"turns": "last"}, {"turns": "unroll"}, {"overlong": "split"}, {"overlong": "truncate"}],
    ids=str,
)
def test_shown_are_the_ids_and_weights_of_the_store_of_a_run(tmp_path: Path, data: dict[str, Any]):
    rows = [row("four"), row("five", train=0.25), row("è 漢字 " * 30), {"messages": row("a")["messages"] * 3}]
    recipe = recipe_for(tmp_path, rows, **{"overlong": "drop", **data})
    store = trained(recipe)
    found = [
        (str(one.origin), list(sample.ids), list(sample.weights))
        for one in shown(recipe, num_rows=10).rows
        for sample in one.samples
    ]
    wanted = [(str(s.origin), s.ids.tolist(), s.weights.tolist()) for s in (store[i] for i in range(len(store)))]
    assert found == wanted
    assert len(found) >= 3


def test_tokens_join_to_the_text_and_a_split_character_stands_at_its_last_token(tmp_path: Path):
    answer = "naïve 漢字 🙂  two spaces"
    sample = shown(recipe_for(tmp_path, [row(answer)])).rows[0].samples[0]
    wanted = f"<|im_start|>user\nHi\tthere<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    assert sample.text == wanted
    assert len(sample.tokens) == len(sample.ids) == len(sample.weights)
    assert "🙂" in sample.tokens
    assert sample.tokens[sample.tokens.index("🙂") - 3 : sample.tokens.index("🙂")] == ("", "", "")
    special = [token for token, is_special in zip(sample.tokens, sample.is_special, strict=True) if is_special]
    assert set(special) <= set(CHATML_TOKENS)
    assert len(special) == 4


def test_a_text_that_ends_within_a_character_is_shown_to_its_end():
    ids = TOKENIZER.encode_batch(["a🙂"])[0][0].tolist()
    assert token_texts(ids, TOKENIZER)[-1] == "🙂"
    assert "".join(token_texts(ids[:-1], TOKENIZER)).startswith("a\N{REPLACEMENT CHARACTER}")
    assert token_texts([], TOKENIZER) == []


def test_rows_with_problems_are_shown_with_them_and_the_others_are_counted(tmp_path: Path):
    rows = [
        row("four"),
        '{"messages": [',
        {"messages": [{"role": "user", "content": "only"}]},
        row("five"),
        row("x" * 900),
    ]
    found = shown(recipe_for(tmp_path, rows), num_rows=9)
    assert [len(one.samples) for one in found.rows] == [1, 0, 0, 1, 0]
    assert [len(one.problems) for one in found.rows] == [0, 1, 1, 0, 1]
    assert "line 2" in found.rows[1].problems[0]
    assert found.rows[1].raw == '{"messages": ['
    assert "more than training.max_seq_len 200" in found.rows[4].problems[0]
    assert found.counts["problems"] == 3
    assert found.counts["problem_lines"] == [problem for one in found.rows for problem in one.problems]
    assert (found.counts["rows"], found.counts["samples"]) == (5, 2)


def test_many_problems_are_counted_though_only_the_first_are_told(tmp_path: Path):
    found = shown(recipe_for(tmp_path, [row("a"), *["{"] * 45]), num_rows=1)
    assert found.counts["problems"] == 45
    assert len(found.counts["problem_lines"]) < 45
    assert num_problems(["a", "b"]) == 2
    both_long = shown(recipe_for(tmp_path, [row("a"), row("x" * 900), row("y" * 900)]))
    assert both_long.counts["problems"] == 2


def test_a_row_that_a_run_leaves_out_is_shown_with_the_reason(tmp_path: Path):
    recipe = recipe_for(tmp_path, [row("a"), "{", row("b")], on_bad_row="skip", max_bad_share=0.5)
    found = shown(recipe)
    assert [bool(one.problems) for one in found.rows] == [False, True, False]
    assert (found.counts["bad_rows"], found.counts["problems"], found.counts["samples"]) == (1, 0, 2)


def test_data_of_nothing_but_problems_is_shown(tmp_path: Path):
    question = {"messages": [{"role": "user", "content": "only"}]}
    found = shown(recipe_for(tmp_path, [question, question]))
    assert [bool(one.problems) for one in found.rows] == [True, True]
    assert found.counts["problems"] == 2


def test_what_becomes_of_a_row_is_said(tmp_path: Path):
    long = row("word " * 200)
    rows = [row("a"), row("a"), long]
    cut = shown(recipe_for(tmp_path, rows, overlong="truncate", deduplicate=True))
    assert DUPLICATE in cut.rows[1].notes
    assert [note for note in cut.rows[2].notes if "tokens lost" in note], cut.rows[2]
    assert cut.counts["truncated"] == 1
    assert cut.counts["duplicates"] == 1
    dropped = shown(recipe_for(tmp_path, rows, overlong="drop"))
    assert dropped.rows[2].samples == ()
    assert any("left out" in note for note in dropped.rows[2].notes)
    assert dropped.counts["dropped"] == 1
    aside = shown(recipe_for(tmp_path, [row(f"answer {n}") for n in range(8)], validation_fraction=0.5), num_rows=8)
    assert [SET_ASIDE in one.notes for one in aside.rows].count(True) == 4


def test_unrolled_rows_and_untrained_tokens_are_counted(tmp_path: Path):
    rows = [row("a"), {"messages": row("b")["messages"] * 3}]
    found = shown(recipe_for(tmp_path, rows, turns="unroll"))
    assert [len(one.samples) for one in found.rows] == [1, 3]
    assert (found.counts["unrolled"], found.counts["unrolled_samples"], found.counts["samples"]) == (1, 3, 4)
    assert found.counts["tokens"] == found.counts["trained_tokens"] + found.counts["untrained_tokens"]


def test_lines_are_chosen_by_number_and_absent_ones_refused(tmp_path: Path):
    recipe = recipe_for(tmp_path, [row(f"answer {n}") for n in range(1, 6)])
    assert [one.origin.line for one in shown(recipe, lines=[4, 2]).rows] == [2, 4]
    with pytest.raises(DataError, match="no row at line 9, 12; the last one is at line 5"):
        shown(recipe, lines=[2, 12, 9])


def test_documents_are_shown_as_the_blocks_they_become(tmp_path: Path):
    recipe = recipe_for(
        tmp_path, [{"text": "one two three " * 9}, {"text": "four five"}], pretraining=True, block_size=8
    )
    store = trained(recipe)
    found = shown(recipe, num_rows=2)
    assert [sample.ids for one in found.rows for sample in one.samples] == [
        tuple(store[i].ids.tolist()) for i in (0, 1)
    ]
    assert found.counts["samples"] == len(store)
