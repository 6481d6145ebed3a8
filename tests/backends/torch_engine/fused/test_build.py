"""Building the kernels: kept once built, and done without where there is no compiler."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from training_hub.backends.torch_engine.fused.build import built

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="needs a C compiler on Linux"
)

LOSS = """
import sys
sys.path.insert(0, {root!r})
from tests.backends.torch_engine.tiny_models import random_pack, tiny_model
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.fused.swap import run_on_kernels
from training_hub.backends.torch_engine.objectives.cross_entropy import cross_entropy
from training_hub.backends.torch_engine.tensors import to_device
register_attention()
model = tiny_model("llama")
model.set_attn_implementation(DOCUMENTS)
print(run_on_kernels(model))
print(float(cross_entropy(model)[0](model, to_device(random_pack(), "cpu")).total.detach()))
"""


@needs_compiler
def test_a_library_is_built_once(tmp_path: Path) -> None:
    assert COMPILER is not None
    first = built(COMPILER, tmp_path)
    made = first.stat().st_mtime_ns
    assert built(COMPILER, tmp_path) == first and first.stat().st_mtime_ns == made
    assert list(tmp_path.iterdir()) == [first]


def loss(environment: dict[str, str]) -> tuple[str, float]:
    """The note about kernels and the loss of a tiny model, in a new process."""
    root = str(Path(__file__).parents[4])
    done = subprocess.run(
        [sys.executable, "-c", LOSS.format(root=root)], env={**os.environ, **environment}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    note, value = done.stdout.strip().splitlines()[-2:]
    return note, float(value)


@needs_compiler
def test_without_a_compiler_the_loss_is_the_same_and_the_user_is_told(tmp_path: Path) -> None:
    with_kernels = loss({"XDG_CACHE_HOME": str(tmp_path / "one")})
    without = loss({"XDG_CACHE_HOME": str(tmp_path / "two"), "CC": "no-such-compiler"})
    assert with_kernels[0] == "None"
    assert "no C compiler here" in without[0]
    assert with_kernels[1] == pytest.approx(without[1], rel=1e-5)


@needs_compiler
def test_a_compiler_that_fails_is_told_too(tmp_path: Path) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho this cannot be compiled >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    note, _ = loss({"XDG_CACHE_HOME": str(tmp_path), "CC": str(broken)})
    assert "did not build them: this cannot be compiled" in note


@needs_compiler
def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "training_hub" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777
    assert loss({"XDG_CACHE_HOME": str(tmp_path)})[0] == "None"
    assert list(folder.iterdir()) == []
