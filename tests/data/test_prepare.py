"""Files become token stores: what is trained, left out, cut, set aside and kept, and that it is the same every time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.tiny import CHATML, chat_tokenizer, template
from training_hub.data.feed import Feed, FeedSettings
from training_hub.data.prepare import Prepared, prepare
from training_hub.data.store import TokenStore
from training_hub.data.templates import ChatTemplate
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError
from training_hub.recipe import Recipe


class Heard:
    """A console that remembers what was said and how far each progress came."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.progressed: dict[str, tuple[float | None, float]] = {}

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def progress(self, what: str, total: float | None = None, unit: str = "rows") -> Iterator[Callable[[float], None]]:
        self.progressed[what] = (total, 0.0)

        def advance(amount: float) -> None:
            self.progressed[what] = (total, self.progressed[what][1] + amount)

        yield advance

    def __contains__(self, words: str) -> bool:
        return any(words in line for line in self.lines)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return chat_tokenizer()


def talk(number: int, words: int = 3) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"What is {number}?"},
            {"role": "assistant", "content": " ".join([f"It is {number}."] * words)},
        ]
    }


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_of(path: Any, folder: Path, max_seq_len: int = 256, seed: int = 42, **data: Any) -> Recipe:
    chosen = {"path": str(path) if isinstance(path, Path) else path, "cache_dir": str(folder / "cache"), **data}
    described = {"output": "out", "seed": seed, "model": {"path": "m"}, "training": {"max_seq_len": max_seq_len}}
    return Recipe.model_validate({**described, "data": chosen})


def run(
    recipe: Recipe,
    tokenizer: ChatTokenizer,
    heard: Heard | None = None,
    chosen: ChatTemplate | None = None,
    **given: Any,
) -> Prepared:
    chosen = chosen or template(CHATML)
    return prepare(recipe, tokenizer=tokenizer, template=chosen, console=heard or Heard(), **given)


def shown(store: TokenStore) -> list[tuple[list[int], list[float], str]]:
    return [(s.ids.tolist(), s.weights.tolist(), str(s.origin)) for s in (store[i] for i in range(len(store)))]


def test_rows_of_a_file_become_samples_in_order_with_only_the_answer_trained(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    heard = Heard()
    path = jsonl(tmp_path / "chat.jsonl", [talk(number) for number in range(10)])
    prepared = run(recipe_of(path, tmp_path), tokenizer, heard)
    assert [prepared.train.origin(i).line for i in range(10)] == list(range(1, 11))
    for number in range(10):
        sample = prepared.train[number]
        trained = tokenizer.hf.decode(sample.ids[sample.weights > 0])
        assert trained == " ".join([f"It is {number}."] * 3) + "<|im_end|>"
    assert prepared.report["rows"] == prepared.report["samples"] == 10
    assert prepared.report["tokens"] == prepared.train.lengths.sum()
    assert f"data: {path}: messages rows" in heard
    total, done = heard.progressed["tokenising"]
    assert total == pytest.approx(done) == path.stat().st_size / 1e6


def test_files_objects_and_every_format_can_be_mixed_and_are_counted_by_source(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    chat = jsonl(tmp_path / "chat.jsonl", [talk(1), talk(2)])
    text = jsonl(tmp_path / "text.jsonl", [{"text": "Hello there."}])
    recipe = recipe_of([{"path": str(chat), "weight": 2}, {"path": str(text), "weight": 0.5}], tmp_path)
    prepared = run(recipe, tokenizer)
    assert prepared.train.source_index.tolist() == [0, 0, 1]
    assert prepared.train.source_weights == (2.0, 0.5)
    assert [entry["samples"] for entry in prepared.report["sources"]] == [2, 1]
    feed = Feed(prepared.train, FeedSettings(samples_per_step=1, token_budget=1024, seed=1))
    assert feed.samples_per_epoch == 5  # both of two rows twice, and of one half a row at least that one


def test_all_problems_are_collected_shown_up_to_twenty_and_counted(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [talk(0), *({"messages": [{"role": "user", "content": "Hi"}]} for _ in range(600)), talk(1)]
    with pytest.raises(DataError) as caught:
        run(recipe_of(jsonl(tmp_path / "chat.jsonl", rows), tmp_path), tokenizer)
    *first, last = caught.value.problems
    assert len(first) == 20 and "chat.jsonl line 2: nothing to train on" in first[0]
    assert "580" in last
    assert not list((tmp_path / "cache").glob("*/*/ids.bin"))


def test_conversations_without_a_template_are_one_problem_not_one_per_row(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = jsonl(tmp_path / "chat.jsonl", [talk(number) for number in range(30)])
    recipe = recipe_of(path, tmp_path)
    with pytest.raises(DataError, match="no chat template") as caught:
        prepare(recipe, tokenizer=tokenizer, template=None, console=Heard())
    assert len(caught.value.problems) == 1


def test_a_source_without_rows_and_wrong_settings_are_problems(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match=r"rows: 0 rows"):
        run(recipe_of(None, tmp_path), tokenizer, rows=[])
    with pytest.raises(DataError, match=r"data\.format: 'chatml' is not known"):
        run(recipe_of(None, tmp_path, format="chatml"), tokenizer, rows=[talk(1)])


def long_and_short(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "chat.jsonl", [talk(1), talk(2, words=60), talk(3)])


def test_rows_that_are_too_long_refuse_the_run_with_their_length_and_what_to_write(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    with pytest.raises(DataError) as caught:
        run(recipe_of(long_and_short(tmp_path), tmp_path, max_seq_len=128), tokenizer)
    (problem,) = caught.value.problems
    assert "chat.jsonl line 2" in problem and "tokens, more than training.max_seq_len 128" in problem
    assert "drop, truncate or split" in problem


@pytest.mark.parametrize(("policy", "lines"), [("drop", {1, 3}), ("truncate", {1, 2, 3}), ("split", {1, 2, 3})])
def test_what_happens_to_rows_that_are_too_long_is_counted_and_said(
    tmp_path: Path, tokenizer: ChatTokenizer, policy: str, lines: set[int]
) -> None:
    heard = Heard()
    recipe = recipe_of(long_and_short(tmp_path), tmp_path, max_seq_len=128, overlong=policy)
    prepared = run(recipe, tokenizer, heard)
    whole = run(recipe_of(long_and_short(tmp_path), tmp_path, max_seq_len=4096), tokenizer)
    assert prepared.train.lengths.max() <= 128
    assert {prepared.train.origin(i).line for i in range(len(prepared.train))} == lines
    assert prepared.report[{"drop": "dropped", "truncate": "truncated", "split": "split"}[policy]] == 1
    assert "1 rows" in heard
    if policy == "split":
        assert prepared.report["trained_tokens"] == whole.report["trained_tokens"]


def test_dropping_everything_is_an_error_that_says_so(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="all 3 rows are longer"):
        run(recipe_of(long_and_short(tmp_path), tmp_path, max_seq_len=4, overlong="drop"), tokenizer)


def test_a_second_run_takes_the_kept_tokens_and_gets_the_same(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = jsonl(tmp_path / "chat.jsonl", [talk(number % 15) for number in range(20)])
    recipe = recipe_of(path, tmp_path, validation_fraction=0.2)
    first, heard = run(recipe, tokenizer), Heard()
    second = run(recipe, tokenizer, heard)
    assert "tokenised before" in heard and "tokenising" not in heard.progressed
    assert second.report == first.report
    assert second.validation is not None and first.validation is not None
    assert shown(second.train) == shown(first.train) and shown(second.validation) == shown(first.validation)
    assert second.train.fingerprint == first.train.fingerprint
    fresh = run(recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": False})}), tokenizer)
    assert shown(fresh.train) == shown(first.train) and fresh.train.fingerprint == first.train.fingerprint


@pytest.mark.parametrize(
    "change",
    [{"unmask": True}, {"turns": "last"}, {"max_rows": 5}, {"roles": {"user": "system"}}, {"max_seq_len": 200}],
)
def test_a_setting_that_decides_tokens_or_weights_makes_them_anew(
    tmp_path: Path, tokenizer: ChatTokenizer, change: dict[str, Any]
) -> None:
    path = jsonl(tmp_path / "chat.jsonl", [talk(number) for number in range(8)])
    run(recipe_of(path, tmp_path), tokenizer)
    heard = Heard()
    run(recipe_of(path, tmp_path, **change), tokenizer, heard)
    assert "tokenised before" not in heard


def test_another_file_tokenizer_or_template_makes_tokens_anew(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = jsonl(tmp_path / "chat.jsonl", [talk(number) for number in range(8)])
    recipe = recipe_of(path, tmp_path)
    run(recipe, tokenizer)
    for other, chosen in ((chat_tokenizer(plain=("weather",)), CHATML), (tokenizer, CHATML + " ")):
        heard = Heard()
        run(recipe, other, heard, template(chosen))
        assert "tokenised before" not in heard
    jsonl(path, [talk(number) for number in range(9)])
    assert len(run(recipe, tokenizer).train) == 9


def test_seed_and_split_share_the_kept_tokens(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = jsonl(tmp_path / "chat.jsonl", [talk(number) for number in range(20)])
    run(recipe_of(path, tmp_path), tokenizer)
    heard = Heard()
    run(recipe_of(path, tmp_path, seed=7, validation_fraction=0.1, deduplicate=True), tokenizer, heard)
    assert "tokenised before" in heard


def test_damaged_kept_tokens_are_said_and_made_again(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = jsonl(tmp_path / "chat.jsonl", [talk(number) for number in range(8)])
    first = shown(run(recipe_of(path, tmp_path), tokenizer).train)
    (ids,) = (tmp_path / "cache").glob("*/*/ids.bin")
    content = bytearray(ids.read_bytes())
    content[8] ^= 255
    ids.write_bytes(content)
    heard = Heard()
    again = run(recipe_of(path, tmp_path), tokenizer, heard)
    assert "damaged and made again" in heard
    assert shown(again.train) == first


def test_two_processes_that_want_the_same_tokens_both_get_them(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "chat.jsonl", [talk(number) for number in range(300)])
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.data.test_prepare import *\n"
        "print(run(recipe_of(Path(sys.argv[1]), Path(sys.argv[2])), chat_tokenizer()).train.fingerprint)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(path), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    fingerprints = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert fingerprints[0] == fingerprints[1] != ""


def test_duplicates_are_counted_and_left_out_only_when_asked(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = jsonl(tmp_path / "chat.jsonl", [talk(number % 4) for number in range(12)])
    heard = Heard()
    kept = run(recipe_of(path, tmp_path), tokenizer, heard)
    assert (len(kept.train), kept.report["duplicates"]) == (12, 8)
    assert "8 rows (66.7%) are exact duplicates" in heard
    once = run(recipe_of(path, tmp_path, deduplicate=True), tokenizer)
    assert [once.train.origin(i).line for i in range(len(once.train))] == [1, 2, 3, 4]


def test_a_validation_file_is_read_the_same_way_and_rows_in_both_are_counted(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = jsonl(tmp_path / "chat.jsonl", [talk(number) for number in range(6)])
    held = jsonl(tmp_path / "held.jsonl", [talk(number) for number in range(5, 9)])
    heard = Heard()
    prepared = run(recipe_of(path, tmp_path, validation=str(held)), tokenizer, heard)
    assert prepared.validation is not None and len(prepared.validation) == 4
    assert prepared.report["validation"]["samples"] == 4
    assert "1 validation samples that are also trained on" in heard


def test_live_rows_stand_in_for_files_with_the_recipes_format(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    both = [{**talk(number), "text": "Hello."} for number in range(3)]
    recipe = recipe_of(None, tmp_path, format="text")
    prepared = run(recipe, tokenizer, rows=both, validation_rows=both[:1])
    assert prepared.validation is not None and len(prepared.validation) == 1
    assert tokenizer.hf.decode(prepared.train[0].ids) == "Hello.<|im_end|>"
    streamed = run(recipe, tokenizer, rows=iter(both))
    assert shown(streamed.train) == shown(prepared.train)


def test_only_the_first_rows_are_used_when_so_many_are_asked_for(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    parts = [jsonl(tmp_path / f"{name}.jsonl", [talk(number) for number in range(300)]) for name in "ab"]
    prepared = run(recipe_of([str(part) for part in parts], tmp_path, max_rows=310), tokenizer)
    assert len(prepared.train) == prepared.report["rows"] == 310
    assert str(prepared.train.origin(309)) == f"{parts[1]} line 10"


def documents(tmp_path: Path, texts: Sequence[str]) -> Path:
    return jsonl(tmp_path / "text.jsonl", [{"document": text} for text in texts])


def test_pretraining_joins_documents_with_the_end_token_and_cuts_full_blocks(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    texts = [f"The answer is {'very ' * number}four." for number in range(12)]
    recipe = recipe_of(documents(tmp_path, texts), tmp_path, pretraining=True, block_size=16)
    train = run(recipe, tokenizer).train
    stream = np.concatenate([train[i].ids for i in range(len(train))])
    assert tokenizer.hf.decode(stream) == "".join(f"{text}<|im_end|>" for text in texts)
    assert set(train.lengths[:-1].tolist()) == {16} and 1 < train.lengths[-1] <= 16
    assert (train.trained_tokens == train.lengths - 1).all()


def test_pretraining_leaves_out_duplicate_documents_and_sets_documents_aside(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    texts = [f"Hello {number % 10} there." for number in range(40)]
    path = documents(tmp_path, texts)
    once = run(recipe_of(path, tmp_path, pretraining=True, block_size=32, deduplicate=True), tokenizer)
    stream = np.concatenate([once.train[i].ids for i in range(len(once.train))])
    assert tokenizer.hf.decode(stream) == "".join(f"{text}<|im_end|>" for text in texts[:10])
    split = run(recipe_of(path, tmp_path, pretraining=True, block_size=32, validation_fraction=0.2), tokenizer)
    sides = [
        set(tokenizer.hf.decode(np.concatenate([s[i].ids for i in range(len(s))])).split("<|im_end|>"))
        for s in (split.train, split.validation)
        if s is not None
    ]
    assert sides[0] & sides[1] == {""} and len(sides[1]) == 3  # two of ten contents, and what is after the last end


def test_blocks_are_kept_like_samples_and_another_size_cuts_the_kept_documents(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = documents(tmp_path, ["Hello there."] * 30)
    first = run(recipe_of(path, tmp_path, pretraining=True, block_size=16), tokenizer)
    heard = Heard()
    again = run(recipe_of(path, tmp_path, pretraining=True, block_size=16), tokenizer, heard)
    assert not {"tokenising", "cutting blocks"} & heard.progressed.keys()
    assert shown(again.train) == shown(first.train)
    run(recipe_of(path, tmp_path, pretraining=True, block_size=8), tokenizer, heard)
    assert list(heard.progressed)[-1] == "cutting blocks" and "tokenising" not in heard.progressed


def test_conversations_cannot_be_pretraining_documents(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = jsonl(tmp_path / "chat.jsonl", [talk(1)])
    with pytest.raises(DataError, match=r"data\.pretraining joins plain text"):
        run(recipe_of(path, tmp_path, pretraining=True), tokenizer)


def test_real_files_are_read_whole(test_data: Path, tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    expected = {"gsm8k/test.jsonl": (1_319, 0), "tools/sdft_openfunction_train.json": (2_211, 522)}
    for name, (count, duplicates) in expected.items():
        report = run(recipe_of(test_data / "sft" / name, tmp_path, max_seq_len=100_000), tokenizer).report
        assert (report["rows"], report["samples"], report["duplicates"]) == (count, count, duplicates)
