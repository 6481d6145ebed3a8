"""Processes that wait for runs, and uneven rows for them, for all modules of this folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.backends.torch_engine.tiny_models import tiny_model
from tests.distributed.crew import Crew


@pytest.fixture(scope="package")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    crew = Crew(2, tmp_path_factory.mktemp("crew") / "two.log")
    yield crew
    crew.close()


@pytest.fixture(scope="package")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    crew = Crew(3, tmp_path_factory.mktemp("crew") / "three.log")
    yield crew
    crew.close()


@pytest.fixture(scope="package")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    crew = Crew(4, tmp_path_factory.mktemp("crew") / "four.log")
    yield crew
    crew.close()


@pytest.fixture(scope="package")
def uneven_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very different lengths, trained shares and weights, some of them trained in one word of hundreds."""
    rows = [
        {
            "weight": 1 + number % 5,
            "messages": [
                {"role": "user", "content": "Say it. " * (1 if number % 3 else 12)},
                {"role": "assistant", "content": "It. " * (1 + number * number % 17)},
            ],
        }
        for number in range(40)
    ]
    path = tmp_path_factory.mktemp("uneven") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folders(tiny_model_folder, tmp_path_factory) -> Any:
    """A folder for each family of tiny models, made once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(family: str, **changes: Any) -> Path:
        key = json.dumps([family, changes])
        if key not in made:
            made[key] = root / str(len(made))
            tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
            changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, **changes}
            tiny_model(family, **changes).save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return folder
