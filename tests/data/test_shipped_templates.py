"""The templates of this package with every kind of conversation: exact or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import training_hub
from tests.data.test_published_templates import num_exact
from training_hub.data.templates import NAMED

FOLDER = Path(training_hub.__file__).parent / "data" / "templates"
# Of nine kinds. All refuse answers that say nothing or come in parts, and have no place for tool calls.
EXACT = {"alpaca": 6, "chatml": 6, "llama": 6, "mistral": 6, "vicuna": 6, "zephyr": 6}


@pytest.mark.parametrize("name", NAMED)
def test_a_shipped_template_is_exact_or_refused(name: str):
    assert num_exact(FOLDER / f"{name}.jinja") == EXACT[name]
