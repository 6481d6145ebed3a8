"""YAML and overrides become the recipe they say, or an error that lists everything that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training_hub.errors import RecipeError
from training_hub.recipe import Recipe
from training_hub.recipe.check import NEEDS, RIVALS
from training_hub.recipe.load import build, collect, dump, layer_of, load, load_file, merge, overrides
from training_hub.recipe.names import REQUIRED, SPELLINGS, Setting, all_settings, nearest_setting, sections
from training_hub.recipe.yaml_text import MAX_CHARACTERS, read_yaml, write_yaml

MINIMAL = {"model": {"path": "m"}, "output": "o"}


def problems_of(tree: Any, **arguments: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        build(tree, **arguments)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0", 0),
        ("010", "010"),
        ("0x10", "0x10"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("1.2.3", "1.2.3"),
        ("no", False),
        ("null", None),
        ("'1e-5'", "1e-5"),
    ],
)
def test_yaml_values_are_what_they_look_like(text: str, value: Any):
    found = read_yaml(f"key: {text}")["key"]
    assert (type(found), found) == (type(value), value)


def test_a_key_given_twice_is_an_error_with_its_line():
    with pytest.raises(RecipeError, match=r"mine\.yaml line 4: key 'epochs' is given twice \(first in line 3\)"):
        read_yaml("output: o\ntraining:\n  epochs: 1\n  epochs: 2\n", "mine.yaml")


def test_python_tags_are_refused_and_run_nothing(tmp_path: Path):
    canary = tmp_path / "canary"
    for tag in ("!!python/object/apply:os.mkdir", "!!python/name:os.mkdir", "!!python/object/new:os.mkdir"):
        with pytest.raises(RecipeError, match="the tag '!!python/"):
            read_yaml(f"output: {tag} [{canary}]")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "x" * MAX_CHARACTERS, "at most 65,536"),
        ("[" * 5000, "nested deeper"),
        ("a: &a [*a]", "an alias holds itself"),
        (
            "- &b0 [x]\n" + "".join(f"- &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 10)),
            "more than 20,000",
        ),
        ("a: [", "line 1"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \x00", "not YAML"),
        ("? [x]\n: 1", "unhashable key"),
    ],
    ids=["long", "deep", "circle", "laughs", "broken", "two documents", "zero byte", "list as key"],
)
def test_texts_that_are_no_recipe_are_refused(text: str, said: str):
    with pytest.raises(RecipeError, match=said):
        read_yaml(text)


def test_a_recipe_is_a_mapping():
    assert "a recipe is a mapping" in layer_of(read_yaml("- a\n- b")).problems[0]


def texts():
    """Any text but one with a NUL, which no recipe may hold, or one that would be a path in the home of nobody."""
    return st.text(st.characters(codec="utf-8", exclude_characters="\0")).filter(lambda text: text[:1] != "~")


def values_of(setting: Setting) -> st.SearchStrategy[Any]:
    """Any value that a setting takes."""
    kinds = [st.none()] if setting.takes_null else []
    if setting.choices:
        kinds.append(st.sampled_from(setting.choices))
    if setting.takes_boolean:
        kinds.append(st.booleans())
    if setting.takes_mapping:
        inner = texts() if setting.annotation == dict[str, str] else json_values()
        kinds.append(st.dictionaries(texts(), inner, max_size=3))
    if setting.takes_list:
        source = st.fixed_dictionaries({"path": texts()}, optional={"weight": st.floats(0.01, 9), "split": texts()})
        kinds.append(st.lists(texts() | source, max_size=3))
    if setting.takes_text:
        kinds.append(
            texts() | st.sampled_from(["1e-5", "2024-01-01", "no", "null", "~", "1", "a: b", "\x85", "<<", "=", ""])
        )
    elif setting.takes_number and not setting.choices:
        whole = "whole" in setting.allowed
        kinds.append(st.integers(1, 10**12) if whole else st.floats(0, 1, exclude_min=True, exclude_max=True))
    return st.one_of(kinds)


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts()
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=3))


# Settings that any other setting may forbid are left out: what is shown here is that values survive.
FREE = [
    setting
    for path, setting in all_settings().items()
    if path
    not in {
        *NEEDS,
        *(one for pair in RIVALS for one in pair),
        "data.unmask",
        "data.streaming",
        "data.validation_samples",
        "training.max_tokens_per_gpu",
        "model.quantization",
        "training.compile",
        "training.cuda_graphs",
        "training.activation_checkpointing",  # some need a compiler
        "optimizer.name",  # a schedule-free one forbids schedules
    }
    and path not in {"processes.node_rank", "processes.master_port"}
    and (not path.startswith("evaluation.") or path.endswith(("interval", "at_epoch", "at_start", ".watch")))
    and path not in {"evaluation.watch_interval", "hub.push"}
    and not path.startswith(("distillation.", "parallelism."))
]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_recipe_survives_its_yaml_exactly(data: st.DataObject):
    chosen = data.draw(st.lists(st.sampled_from(FREE), max_size=8, unique_by=lambda setting: setting.path))
    recipe = build(
        {"model.path": "m", "output": "o"} | {setting.path: data.draw(values_of(setting)) for setting in chosen},
        live=("data.path", "data.validation"),
    )
    assert load(dump(recipe)) == recipe


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(json_values())
def test_any_plain_value_survives_yaml(value: Any):
    found = read_yaml(write_yaml({"key": value}))["key"]
    assert found == value
    assert repr(found) == repr(value)  # 1 is not 1.0


def test_every_spelling_gives_its_setting():
    for other, path in SPELLINGS.items():
        setting = all_settings()[path]
        value = "given" if setting.takes_text else True if setting.is_boolean else 3
        layer = collect([(other, value)])
        assert layer.values == {path: value}
        assert layer.spelled == {path: other}


def test_no_spelling_hides_a_setting_of_its_own():
    assert not set(SPELLINGS) & {*all_settings(), *sections()}


def test_one_setting_in_two_spellings_is_an_error():
    found = problems_of({**MINIMAL, "training": {"epochs": 1, "num_epochs": 2}})
    assert found == ["training.epochs: given twice, as training.epochs and as training.num_epochs. Keep one."]


def test_keys_may_be_nested_or_dotted():
    nested = build({**MINIMAL, "training": {"epochs": 2}})
    assert build({"model.path": "m", "output": "o", "training.epochs": 2}) == nested


def test_an_empty_section_is_as_if_it_were_not_there():
    assert build({**MINIMAL, "training": None}) == build(MINIMAL)


def test_null_is_a_value():
    assert build({**MINIMAL, "checkpoint": {"keep_last": None}}).checkpoint.keep_last is None


def test_off_is_a_word_where_it_is_a_choice():
    assert load("output: o\nmodel: {path: m}\nmonitoring: {console: off}").monitoring.console == "off"


def test_paths_tuples_and_numpy_numbers_are_taken_as_what_they_are():
    recipe = build(
        {
            "model.path": Path("m"),
            "output": "o",
            "optimizer.lr": np.float32(0.5),
            "training.epochs": np.int64(2),
            "data.path": (Path("a.jsonl"), "b.jsonl"),
        }
    )
    assert recipe.optimizer.lr == 0.5
    assert recipe.data.path == ["a.jsonl", "b.jsonl"]
    assert load(dump(recipe)) == recipe


def test_everything_wrong_is_said_at_once():
    found = problems_of(
        {
            "trainig": {"epochs": 1},
            "training": {"epochs": -1, "global_batch_size": 2.5, "max_seq_len": True},
            "optimizer": {"name": "adamw", "lr": "1e-5"},
            "model": {"path": 7},
            "data": {"path": [{"path": "a", "wieght": 1}, 3], "roles": {"bot": 1}},
            "lr_scheduler": {"warmup_steps": 1, "warmup_ratio": 0.1},
        }
    )
    assert found == [
        "trainig: not a setting of the recipe. Did you mean training?",
        "output: not given. Write output: OUTPUT_FOLDER",
        "model.path: found 7; allowed: text. Write model.path: '7'",
        "data.path[0].wieght: not a key of a source; known: path, weight, split, format. Did you mean weight?",
        "data.path[1]: found 3; allowed: text, or {path, weight, split, format}.",
        "data.roles bot: found 1; allowed: a mapping of names to text.",
        "training.epochs: found -1; allowed: a number greater than 0, or null. Write training.epochs: 1",
        "training.global_batch_size: found 2.5; allowed: a whole number of at least 1. "
        "Write training.global_batch_size: 32",
        "training.max_seq_len: found true; allowed: a whole number of at least 1. Write training.max_seq_len: 4096",
        "optimizer.name: found 'adamw'; allowed: one of AdamW, Adam, SGD, Adafactor, NAdam, RAdam, Adagrad, RMSprop, "
        "Lion, Muon, AdamWScheduleFree, GaLoreAdamW, AdamW8bit, Lion8bit, PagedAdamW, PagedAdamW8bit, PagedLion, "
        "PagedLion8bit. Write optimizer.name: AdamW",
        "optimizer.lr: found '1e-5'; allowed: a number greater than 0. Write optimizer.lr: 1.0e-05",
        "lr_scheduler.warmup_steps and lr_scheduler.warmup_ratio: both are given, and one excludes the other. "
        "Leave one out.",
    ]


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ("num_epochs", "training.epochs (num_epochs): found 0; .* Write num_epochs=1"),
        ("--epochs", "training.epochs (--epochs): found 0; .* Write --epochs 1"),
        ("training.num_epochs", "training.epochs (training.num_epochs): found 0; .* Write training.num_epochs: 1"),
    ],
)
def test_an_error_uses_the_callers_own_name(spelled: str, said: str):
    pattern = said.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(RecipeError, match=pattern):
        build({**MINIMAL, "training.epochs": 0}, spelled={"training.epochs": spelled})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1e-5])
def test_a_learning_rate_is_a_number_above_zero(value: float):
    assert problems_of({**MINIMAL, "optimizer.lr": value})[0].startswith("optimizer.lr: found")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("training.epoch", "training.epochs"),
        ("num_epochs", "training.epochs"),
        ("trainig", "training"),
        ("data.unmsk", "data.unmask"),
        ("lr", "optimizer.lr"),
        ("optimizer.max_norm", "training.max_norm"),
        ("qqqq", None),
    ],
)
def test_the_nearest_setting_is_the_one_that_was_meant(name: str, meant: str | None):
    assert nearest_setting(name) == meant


def test_a_setting_that_is_required_here_is_asked_for_unless_rows_are_at_hand():
    assert problems_of(MINIMAL, required=["data.path"]) == ["data.path: not given. Write data.path: FILE.jsonl"]
    assert problems_of({**MINIMAL, "data.path": []}, required=["data.path"])
    assert problems_of({**MINIMAL, "output": ""}, required=["output"])
    assert build(MINIMAL, required=["data.path"], live=["data.path"]).data.path is None


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("training.seq_len=10", "training.max_seq_len", 10),
        ("--optimizer.lr=1e-5", "optimizer.lr", 1e-5),
        ("output=runs/a #1: b", "output", "runs/a #1: b"),
        ("output=$(touch x); 'q' --y", "output", "$(touch x); 'q' --y"),
        ("output=2024", "output", "2024"),
        ("model.tokenizer=null", "model.tokenizer", None),
        ("data.path=*.jsonl", "data.path", "*.jsonl"),
        ("data.path=[ab]*.jsonl", "data.path", "[ab]*.jsonl"),
        ("data.path=[a.jsonl, b.jsonl]", "data.path", ["a.jsonl", "b.jsonl"]),
        ("monitoring.tensorboard=no", "monitoring.tensorboard", False),
        ("monitoring.tensorboard=logs", "monitoring.tensorboard", "logs"),
        ("processes.rdzv_id=12", "processes.rdzv_id", 12),
        ("data.roles={bot: assistant}", "data.roles", {"bot": "assistant"}),
        ("data.roles.bot=no", "data.roles.bot", "no"),
        ("data.template_arguments.thinking=no", "data.template_arguments.thinking", False),
    ],
)
def test_an_override_is_read_as_its_setting_takes_it(text: str, path: str, value: Any):
    layer = overrides([text])
    assert not layer.problems
    assert layer.values == {path: value}


def test_overrides_that_cannot_be_read_are_all_named():
    found = overrides(["training.epochs", "x.y=1", "training.steps=[1"]).problems
    assert len(found) == 3
    assert found[0] == "training.epochs: not an override; write it as training.epochs=VALUE."
    assert found[1].startswith("training.steps line 1: ")
    assert found[2].startswith("x.y: not a setting of the recipe.")


def test_later_layers_win_and_keys_are_added_to_mappings():
    first = layer_of({"training": {"epochs": 1}, "data": {"roles": {"bot": "assistant"}}})
    second = overrides(["data.roles.human=user", "training.epochs=2"])
    both = merge(first, second)
    recipe = build({**MINIMAL, **both.values})
    assert recipe.training.epochs == 2
    assert recipe.data.roles == {"bot": "assistant", "human": "user"}
    whole = merge(both, layer_of({"data.roles": {"gpt": "assistant"}}))
    assert build({**MINIMAL, **whole.values}).data.roles == {"gpt": "assistant"}


def test_a_file_is_read_with_or_without_a_byte_order_mark(tmp_path: Path):
    recipe = build({**MINIMAL, "output": "größe"})
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "r.yaml").write_text(dump(recipe), encoding=encoding)
        assert load_file(tmp_path / "r.yaml") == recipe


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes(b"output: gr\xf6\xdfe")
    for name in ("absent.yaml", "latin.yaml"):
        with pytest.raises(RecipeError, match=name):
            load_file(tmp_path / name)


def test_defaults_are_those_of_the_sections():
    recipe = build(MINIMAL)
    assert recipe == Recipe.model_validate(MINIMAL)
    assert [path for path, setting in all_settings().items() if setting.default is REQUIRED] == ["output", "model.path"]
