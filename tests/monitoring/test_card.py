"""The model card: what a run measured, what its base demands, and nothing of the machine it ran on."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.invariants.run import train
from training_hub.folders import damage
from training_hub.monitoring.base_model import BaseModel, front_matter, read_base
from training_hub.monitoring.card import CardFacts, loss_curve, model_card, settings
from training_hub.recipe.load import build
from training_hub.types import TrainResult

LICENCE = b"You may use this as long as you are kind.\n"
BASE_CARD = """---
license: other
license_name: kindness-1.0
license_link: LICENSE
tags: [tiny]
---
# The base
"""


@pytest.fixture(scope="module")
def carded(tiny_model_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run from a base with a licence, with answers and a validation."""
    place = tmp_path_factory.mktemp("carded")
    base = place / "kind-base"
    shutil.copytree(tiny_model_folder, base)
    (base / "README.md").write_text(BASE_CARD)
    (base / "LICENSE").write_bytes(LICENCE)
    (base / "NOTICE.txt").write_bytes(b"made by somebody")
    return train(
        *(base, chat_file, place / "run"),
        data={"validation_fraction": 0.25},
        training={"steps": 4, "preflight": False},
        evaluation={"interval": 2, "generate": 4, "metrics": ["exact_match", "f1"]},
        optimizer={"lr": 3e-3},
    )


def card(result: TrainResult) -> str:
    assert result.model_path is not None
    return (result.model_path / "README.md").read_text()


def test_the_licence_of_the_base_is_stated_and_its_files_go_along(carded: TrainResult):
    from huggingface_hub import ModelCard

    assert carded.model_path is not None
    stated = ModelCard.load(carded.model_path / "README.md").data.to_dict()
    assert stated["license"] == "other" and stated["license_name"] == "kindness-1.0"
    assert stated["license_link"] == "LICENSE" and stated["pipeline_tag"] == "text-generation"
    assert "base_model" not in stated, "a folder of this machine is no name that the hub knows"
    assert (carded.model_path / "LICENSE").read_bytes() == LICENCE
    assert (carded.model_path / "NOTICE.txt").read_bytes() == b"made by somebody"
    assert "The base model states `other` (kindness-1.0)" in card(carded)
    assert damage(carded.model_path) == []


def test_an_unknown_licence_is_said_and_none_is_made_up(tiny_model_folder: Path, chat_file: Path, tmp_path: Path):
    result = train(tiny_model_folder, chat_file, tmp_path / "run", training={"steps": 1, "preflight": False})
    assert "license" not in front_matter(card(result))
    assert "states no licence" in card(result)
    assert result.base == {"name": "model", "licence": ""}


def test_metrics_stand_before_and_after(carded: TrainResult):
    text = card(carded)
    for name in ("loss", "exact_match", "f1", "unfinished", "answer_tokens"):
        before, after = (carded.metrics[f"validation_{name}{end}"] for end in ("_before", ""))
        assert f"| {name} | {before:.4g} | {after:.4g} |" in text
    assert f"| 4 | {carded.history[-1]['loss']:.4g} | {carded.metrics['validation_loss']:.4g} |" in text


def test_samples_settings_data_and_versions_are_told(carded: TrainResult):
    text = card(carded)
    rows = [json.loads(line) for line in (carded.output_dir / "predictions.jsonl").read_text().splitlines()]
    assert rows[0]["reference"] in text and "**base**" in text and "**tuned**" in text
    assert carded.data["fingerprint"] in text and "| samples | 48 |" in text
    assert "optimizer.lr: 0.003" in text and f"transformers {carded.versions['transformers']}" in text
    assert carded.base == {"name": "kind-base", "licence": "other"}
    assert carded.predictions == carded.output_dir / "predictions.jsonl"


def test_nothing_of_the_machine_is_told(carded: TrainResult, chat_file: Path):
    text = card(carded)
    for folder in (carded.output_dir.parent, chat_file.parent, Path.home()):
        assert str(folder) not in text
    assert "chat.jsonl" in text and "kind-base" in text


def test_the_curve_is_a_picture_that_stands_alone(carded: TrainResult):
    assert carded.model_path is not None
    root = ElementTree.fromstring((carded.model_path / "loss.svg").read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    drawn = [element.get("class") for element in root.iter() if "polyline" in element.tag]
    assert drawn == ["curve first", "curve second"]
    ElementTree.fromstring(loss_curve([]))


def test_the_result_of_a_finished_run_is_read_back_whole(carded: TrainResult, chat_file: Path):
    again = train(
        *(carded.output_dir.parent / "kind-base", chat_file, carded.output_dir),
        data={"validation_fraction": 0.25},
        training={"steps": 4, "preflight": False},
        evaluation={"interval": 2, "generate": 4, "metrics": ["exact_match", "f1"]},
        optimizer={"lr": 3e-3},
    )
    assert (again.base, again.data, again.predictions) == (carded.base, carded.data, carded.predictions)


def facts(samples: list[dict], base: BaseModel | None = None, **changed: object) -> CardFacts:
    recipe = build({"model.path": "org/base", "data.path": "org/rows", "output": "/home/me/out/run", **changed})
    base = base or BaseModel("org/base", True, "apache-2.0")
    return CardFacts(recipe, base, 1, {}, [{"step": 1, "loss": 1.0}], {}, {}, 10, 4, "float32", samples)


def test_names_on_the_hub_are_told_to_the_hub():
    stated = front_matter(model_card(facts([])))
    assert stated["base_model"] == "org/base" and stated["datasets"] == ["org/rows"]
    assert stated["license"] == "apache-2.0" and "4 of 10 parameters" in model_card(facts([]))


def test_what_a_row_says_can_neither_close_its_fence_nor_hold_a_token():
    token = "hf_" + "A" * 24
    said = {"answer": f"```\n# A heading\n````\n\x1b[2J {token}"}
    text = model_card(facts([{"prompt": "p", "reference": "r", "tuned": said}]))
    assert "`````text\n```\n# A heading\n````\n\\x1b[2J [redacted]\n`````" in text
    assert token not in text


def test_settings_are_those_that_are_not_defaults_without_folders_or_secrets():
    given = {
        "data.path": ["/home/me/private/a.jsonl", {"path": "~/b.jsonl", "weight": 0.5}],
        "data.chat_template": "/home/me/own.jinja",
        "optimizer.lr": 2e-5,
        "monitoring.wandb": True,
        "output": "/home/me/out",
    }
    told = settings(build({"model.path": "/home/me/base", **given}))
    assert told["optimizer.lr"] == 2e-5 and told["data.chat_template"] == "own.jinja"
    assert [one if isinstance(one, str) else one["path"] for one in told["data.path"]] == ["a.jsonl", "b.jsonl"]
    assert not any(path.startswith(("monitoring", "output", "model.path")) for path in told)
    assert "/home" not in str(told)


@pytest.mark.parametrize("text", ["", "no metadata", "---\n: : :\n---\n", "---\n- a list\n---\n", "---\nlicense: x\n"])
def test_a_card_without_metadata_that_can_be_read_states_nothing(text: str):
    assert front_matter(text) == {}


def test_a_base_with_a_broken_card_or_a_huge_licence_is_read_all_the_same(tmp_path: Path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: [mit, apache-2.0]\n---\n\xff\xfe")
    (tmp_path / "LICENSE").write_bytes(b"x" * (2 << 20))
    (tmp_path / "license-more.md").write_bytes(b"y")
    (tmp_path / "LICENSES").mkdir()
    base = read_base(str(tmp_path))
    assert base.licence == "mit apache-2.0" and list(base.files) == ["license-more.md"]
    (tmp_path / "README.md").unlink()
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert read_base(str(tmp_path)).licence == "mit"
    (tmp_path / "config.json").write_text("[broken")
    assert read_base(str(tmp_path)).licence is None
    assert read_base("(a live model)") == BaseModel("a model in memory", False)
