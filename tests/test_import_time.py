"""What a first look costs: neither importing the package nor asking for help loads a library that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SLOW_TO_IMPORT = ("torch", "jax", "transformers", "numpy", "pandas", "pyarrow", "datasets")


def modules_loaded_by(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after it has run `code`."""
    report = "import sys, json; sys.stderr.write('LOADED' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    program = f"import sys\ntry:\n    {code}\nexcept SystemExit as end:\n    assert not end.code, end.code\n{report}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.split("LOADED")[1]))


@pytest.mark.parametrize(
    "code",
    [
        "import training_hub",
        "import training_hub.frontends.cli as cli; cli.main(['--help'])",
        "import training_hub.frontends.cli as cli; cli.main(['sft', '--help'])",
        "import training_hub.frontends.cli as cli; cli.main(['llm', '--help'])",
        "import training_hub.trainers.clm, training_hub.trainers.clm.train_clm_sft",
        "import training_hub.frontends.cli as cli; cli.main(['preview', '--help'])",
        "import training_hub.frontends.cli as cli; cli.main(['plan', '--help'])",
    ],
    ids=["import", "help", "sft help", "llm help", "AutoTrain's paths", "preview help", "plan help"],
)
def test_a_first_look_loads_nothing_slow(code: str):
    assert not modules_loaded_by(code) & set(SLOW_TO_IMPORT)


def test_slow_libraries_would_be_seen():
    assert "numpy" in modules_loaded_by("import numpy")
