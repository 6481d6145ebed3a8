"""A model folder is data: what its configs name is neither imported nor fetched, whatever they say about trust."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

EVIL = "evil_code"
REFERENCES = {
    "AutoConfig": f"{EVIL}.Config",
    "AutoModel": f"{EVIL}.Model",
    "AutoModelForCausalLM": f"{EVIL}.Model",
    "AutoTokenizer": [f"{EVIL}.Tokenizer", f"{EVIL}.Tokenizer"],
}
KERNEL = "someone/kernel"

# What is changed in which file, and whether the model can be used all the same (as what we know it to be).
FOLDERS: tuple[tuple[str, Mapping[str, Any], bool], ...] = (
    ("config.json", {"model_type": "homemade", "auto_map": REFERENCES}, False),
    ("config.json", {"model_type": "homemade", "auto_map": REFERENCES, "trust_remote_code": True}, False),
    ("config.json", {"model_type": "homemade", "auto_map": {"AutoConfig": f"{EVIL}.Config"}}, False),
    ("config.json", {"model_type": "homemade", "auto_map": {"AutoConfig": f"someone/repo--{EVIL}.Config"}}, False),
    ("config.json", {"model_type": None, "auto_map": REFERENCES}, False),
    ("config.json", {"model_type": "homemade"}, False),
    ("config.json", {"model_type": "os.system"}, False),
    ("config.json", {"auto_map": REFERENCES}, True),
    ("config.json", {"auto_map": REFERENCES, "trust_remote_code": True}, True),
    ("config.json", {"auto_map": {"AutoModelForCausalLM": f"someone/repo--{EVIL}.Model"}}, True),
    ("config.json", {"architectures": [f"{EVIL}.Model"]}, True),
    ("config.json", {"_attn_implementation_internal": KERNEL}, False),
    ("config.json", {"_attn_implementation_internal": f"{KERNEL}:attention"}, False),
    ("config.json", {"_experts_implementation_internal": KERNEL}, False),
    ("config.json", {"text_config": {"_attn_implementation_internal": KERNEL}}, False),
    ("config.json", {"backbone_config": {"deep": {"_attn_implementation_internal": KERNEL}}}, False),
    ("config.json", {"_attn_implementation": KERNEL}, True),
    ("config.json", {"attn_implementation": f"kernels-community/{KERNEL}"}, True),
    ("config.json", {"experts_implementation": KERNEL}, True),
    ("config.json", {"use_kernels": True, "kernel_config": {"RMSNorm": KERNEL}}, True),
    ("config.json", {"custom_pipelines": {"text": {"impl": f"{EVIL}.Pipe", "pt": ["AutoModel"]}}}, True),
    ("config.json", {"keypoint_detector_config": {"auto_map": REFERENCES, "trust_remote_code": True}}, True),
    ("generation_config.json", {"custom_generate": "."}, True),
    ("generation_config.json", {"custom_generate": "someone/generate", "trust_remote_code": True}, True),
    ("tokenizer_config.json", {"auto_map": REFERENCES}, True),
    ("tokenizer_config.json", {"auto_map": REFERENCES, "tokenizer_class": "EvilTokenizer"}, None),
    ("tokenizer_config.json", {"tokenizer_class": f"{EVIL}.Tokenizer"}, None),
    ("tokenizer_config.json", {"tokenizer_class": "os.system"}, None),
)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def model(tiny_model_folder: Path, tmp_path: Path, canary: Path) -> Path:
    """A copy of the tiny model with Python code beside it that makes the canary when it is imported."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    code = f"import os\nos.mkdir({str(canary)!r})\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    (folder / "custom_generate").mkdir()
    for place in (
        f"{EVIL}.py",
        "__init__.py",
        "modeling_llama.py",
        "configuration_llama.py",
        "custom_generate/generate.py",
    ):
        (folder / place).write_text(code)
    return folder


def change(file: Path, changes: Mapping[str, Any]) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    "file, changes, is_usable", FOLDERS, ids=[f"{n}-{next(iter(f[1]))}" for n, f in enumerate(FOLDERS)]
)
def test_nothing_a_config_names_is_imported_or_fetched(
    file: str,
    changes: Mapping[str, Any],
    is_usable: bool | None,
    model: Path,
    canary: Path,
    watched: Any,
    words: Any,
    call: Any,
):
    change(model / file, changes)
    with watched() as record:
        said = call(*words("--no-checkpoint.final", model=model))
    assert not canary.exists()
    assert record.network == []
    assert record.programs == []
    assert not [source for source in record.sources if str(model) in source or EVIL in source]
    assert said.code in ((0,) if is_usable else (2, 3) if is_usable is False else (0, 2, 3)), said.text
    if is_usable is False:
        assert "model.path" in said.text


def test_the_code_runs_once_it_is_trusted(
    model: Path, canary: Path, words: Any, call: Any, tmp_path: Path, monkeypatch: Any
):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    change(model / "config.json", {"model_type": "homemade", "auto_map": REFERENCES})
    with pytest.raises(Exception):  # noqa: B017  its classes are empty, and fail in ways of their own
        call(*words("--model.trust_remote_code=true", "--debug", model=model))
    assert canary.exists()


def test_without_the_offline_switch_a_local_folder_still_asks_nobody(
    model: Path, canary: Path, chat_file: Path, tmp_path: Path
):
    change(model / "generation_config.json", {"custom_generate": "someone/generate"})
    change(model / "config.json", {"_attn_implementation": KERNEL, "auto_map": REFERENCES})
    program = (
        "import sys\n"
        "def refuse(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        "        print('NETWORK', event, arguments, flush=True)\n"
        "        raise OSError('no network')\n"
        "sys.addaudithook(refuse)\n"
        "from training_hub.frontends.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ran = subprocess.run(
        [sys.executable, "-c", program, "sft", f"--model={model}", f"--data={chat_file}",
         f"--output={tmp_path / 'run'}",
         "--training.steps=1", "--training.max_seq_len=256", "--data.cache=false"],
        capture_output=True, text=True, check=False, timeout=120, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "NETWORK" not in ran.stdout
    assert not canary.exists()
