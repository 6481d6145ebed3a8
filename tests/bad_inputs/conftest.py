"""The desk that every case works at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_inputs.desk import Desk


@pytest.fixture
def desk(tmp_path: Path, tiny_model_folder: Path) -> Desk:
    return Desk(tmp_path, tiny_model_folder)
