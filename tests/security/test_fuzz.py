"""Broken model files end in one of our errors: no crash of Python, no bare error of a library, no hang."""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.invariants.run import recipe
from training_hub.backends.torch_engine.loading.model import load_model
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import HubError

SLOWEST_SECONDS = 5.0
NUMBERS = (-1, 0, 1, 2**31, 2**63, 2**64, -(2**63), 1e400, 1e-400, "1", None, [], {}, True, float("nan"))


def flipped(content: bytes, rng: random.Random, upto: int) -> bytes:
    """The content with up to eight of its first bytes changed, cut or put in."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(min(upto, len(changed)) or 1)
        kind = rng.randrange(3)
        if kind == 0:
            changed[place] = rng.randrange(256)
        elif kind == 1:
            del changed[place : place + rng.randint(1, 16)]
        else:
            changed[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 16)))
    return bytes(changed)


def with_another_value(tree: Any, rng: random.Random) -> Any:
    """The tree with one of its values, keys or entries replaced."""
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree))
        changed = {name: value for name, value in tree.items() if name != key}
        return changed if rng.random() < 0.1 else {**changed, key: with_another_value(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        place = rng.randrange(len(tree))
        return [*tree[:place], with_another_value(tree[place], rng), *tree[place + 1 :]]
    return rng.choice(NUMBERS)


def fuzzed_weights(content: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.randrange(5)
    if kind == 0:
        return flipped(content, rng, 8 + length)
    if kind == 1:
        return (
            struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, len(content), 2**32, 2**63, 2**64 - 1)))
            + content[8:]
        )
    if kind == 2:
        return content[: rng.randrange(len(content))]
    tree = json.loads(header)
    if kind == 3:
        changed = with_another_value(tree, rng)
    else:
        name = rng.choice([key for key in tree if key != "__metadata__"])
        begin, end = tree[name]["data_offsets"]
        entry = rng.choice(
            (
                {"data_offsets": [begin - 4, end - 4]},
                {"data_offsets": [end, begin]},
                {"data_offsets": [begin, end + 2**40]},
                {"data_offsets": [0, end - begin]},
                {"dtype": "F64"},
                {"dtype": "I8"},
                {"dtype": "Q4"},
                {"shape": [2**62, 4]},
                {"shape": []},
            )
        )
        changed = {**tree, name: {**tree[name], **entry}}
    made = json.dumps(changed).encode()
    return struct.pack("<Q", len(made)) + made + data


def fuzzed_json(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return flipped(content, rng, len(content))
    return json.dumps(with_another_value(json.loads(content), rng)).encode()


def load_weights(folder: Path) -> None:
    made = recipe(folder, folder / "none.jsonl", folder / "run")
    load_model(made, torch.device("cpu"), torch.float32)


def load_tokenizer(folder: Path) -> None:
    tokenizer = ChatTokenizer.load(str(folder))
    tokenizer.encode_batch(["Hello <|im_end|> \u00e9"])
    assert tokenizer.fingerprint


FILES: dict[str, tuple[Callable[[bytes, random.Random], bytes], Callable[[Path], None]]] = {
    "model.safetensors": (fuzzed_weights, load_weights),
    "config.json": (fuzzed_json, load_weights),
    "tokenizer.json": (fuzzed_json, load_tokenizer),
    "tokenizer_config.json": (fuzzed_json, load_tokenizer),
}


def findings(name: str, model: Path, tmp_path: Path, seeds: range) -> tuple[dict[int, str], int]:
    """What went wrong by seed, and how many files were refused."""
    fuzz, load = FILES[name]
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    content = (folder / name).read_bytes()
    wrong: dict[int, str] = {}
    refused = 0
    for seed in seeds:
        (folder / name).write_bytes(fuzz(content, random.Random(f"{name} {seed}")))
        began = time.process_time()
        try:
            load(folder)
        except HubError:
            refused += 1
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong[seed] = f"{type(error).__name__}: {str(error)[:200]}"
        if (spent := time.process_time() - began) > SLOWEST_SECONDS:
            wrong[seed] = f"took {spent:.1f} s of processor time"
    return wrong, refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_ends_in_our_error(name: str, tiny_model_folder: Path, tmp_path: Path):
    wrong, refused = findings(name, tiny_model_folder, tmp_path, range(75))
    assert wrong == {}
    assert refused > 15


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_many_broken_files_end_in_our_error(name: str, tiny_model_folder: Path, tmp_path: Path):
    wrong, _ = findings(name, tiny_model_folder, tmp_path, range(1000, 1500))
    assert wrong == {}
