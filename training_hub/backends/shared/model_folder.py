"""What can be said about a model folder from its small files and the first bytes of its large ones."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from training_hub.folders import near

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

LFS_MARK = b"version https://git-lfs.github.com/spec"

OTHER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForMultipleChoice",
)
"""Endings of architectures whose weights lack a head that predicts the next token."""

PRIVATE_KEYS = ("_attn_implementation_internal", "_experts_implementation_internal")
"""Config keys that transformers keeps for itself. An implementation may name a kernel on the hub, that is: code."""

STORED_AS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_folder(path: str) -> bool:
    """Whether `path` is a folder here, as against a name on the hub."""
    return Path(path).expanduser().is_dir()


def fetched(path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder `path`; of a name on the hub the one in the hub's cache, where what is called so has been fetched."""
    if is_folder(path):
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns)))


def folder_problems(path: str, *, trust_remote_code: bool = False, with_weights: bool = True) -> list[str]:
    """Why the model in this folder cannot be loaded, each with its remedy; [] where nothing speaks against it.

    Reads config.json, the index and the headers of the weights, never a weight; with_weights=False: config.json alone.
    A name on the hub has no problems here.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if HUB_NAME.fullmatch(path):
            return []
        return [
            f"model.path: there is no folder {path}.{_hint_near(folder)} Give a folder in Hugging Face format or a "
            "name on the hub."
        ]
    if not folder.is_dir():
        return [f"model.path: {path} is a file. Give the folder that holds config.json and *.safetensors."]
    lines = [*_config_problems(folder, trust_remote_code), *(_weight_problems(folder) if with_weights else ())]
    return [f"model.path {path}: {line}" for line in lines]


def hub_problem(path: str, revision: str | None) -> str | None:
    """Why `path`, which is no folder here, is no name on the hub either; None where its config can be had.

    Looks into the hub's cache, and asks the hub unless HF_HUB_OFFLINE is set.
    """
    from transformers.utils import cached_file

    try:
        cached_file(path, "config.json", revision=revision)
    except OSError as error:
        return (
            f"model.path: {path}: there is no such folder here.{_hint_near(Path(path))} Taken as a name on the hub, it "
            f"cannot be had: {str(error).strip().splitlines()[0]} Write the folder's path, or a name that the hub has."
        )
    return None


def _hint_near(path: Path) -> str:
    folders = [place for place in near(path) if place.is_dir()]
    return f" Near it: {', '.join(map(str, folders))}." if folders else ""


def stored_dtype(folder: Path) -> str | None:
    """The number format that most weights of the folder are stored in, as torch names it; None where it is another."""
    numbers: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        for entry in _read_header(file)[0].values():
            numbers[entry["dtype"]] += prod(entry["shape"])
    return STORED_AS.get(numbers.most_common(1)[0][0]) if numbers else None


def _config_problems(folder: Path, trust_remote_code: bool) -> Iterator[str]:
    file = folder / "config.json"
    if not file.exists():
        yield f"config.json is missing. {_hint_without_config(folder)}"
        return
    if _is_lfs_pointer(file):
        yield f"config.json {_LFS_REMEDY}"
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        yield f"config.json is not valid JSON ({error}). Fetch the file again."
        return
    if not isinstance(config, dict):
        yield "config.json does not hold an object. Fetch the file again."
        return
    yield from _private_key_problems(config)
    yield from _architecture_problems(config, trust_remote_code)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        yield f"the weights are quantized ({method}) and cannot be trained. Use the folder of the unquantized model."


def _hint_without_config(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return (
            "The folder holds an adapter: give its base as model.path and the folder as lora.adapter to go on with it, "
            "or the folder that `training-hub merge` makes of the two."
        )
    if (folder / "params.json").exists():
        return "The folder is in the maker's own format: convert it to Hugging Face format, or fetch the -hf version."
    if any(folder.glob("*.gguf")):
        return "GGUF files are for inference: use the safetensors version of the model."
    inside = sorted(entry.parent.name for entry in folder.glob("*/config.json"))
    if inside:
        return f"Did you mean {folder / inside[-1]}?"
    return "Give the folder that holds config.json, tokenizer.json and *.safetensors."


def _private_key_problems(config: Mapping[str, Any], place: str = "config.json") -> Iterator[str]:
    for key, value in config.items():
        if key in PRIVATE_KEYS:
            yield f"{place} sets {key}, which can make transformers fetch and run code. Remove the key."
        if isinstance(value, dict):
            yield from _private_key_problems(value, f"{place} {key}")


def _architecture_problems(config: Mapping[str, Any], trust_remote_code: bool) -> Iterator[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if not isinstance(kind, str | None):
        yield f"model_type is {kind!r}; a name is wanted, for example llama. Fetch config.json again."
    elif kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        yield from _wrong_head_problems(config)
    elif "auto_map" in config:
        if not trust_remote_code:
            yield (
                f"model_type {kind!r} needs Python code that comes with the model (auto_map). Read that code, then set "
                "model.trust_remote_code to true."
            )
    elif kind is None:
        yield "config.json has no model_type. Add the one of the architecture, for example llama."
    else:
        yield (
            f"model_type {kind!r} has no causal language model in the installed transformers. Use a decoder model, or "
            "a newer transformers if the model is newer."
        )


def _wrong_head_problems(config: Mapping[str, Any]) -> Iterator[str]:
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        yield f"architectures is {named!r}; a list of names is wanted. Fetch config.json again."
    elif named and all(name.endswith(OTHER_HEADS) for name in named):
        yield f"architecture {', '.join(named)} does not predict next tokens. Use the causal model it came from."


_LFS_REMEDY = (
    "is a Git LFS pointer, not the file itself. Run `git lfs pull` in the folder, or download the model again."
)


def _weight_problems(folder: Path) -> Iterator[str]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        yield from _file_problems(single)
    elif index.exists():
        yield from _index_problems(index)
    elif any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:3])
        yield f"found {found}, but neither model.safetensors nor model.safetensors.index.json. Fetch the missing index."
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pth")) or any(folder.glob("*.pt")):
        yield (
            "the weights are pickle files (.bin, .pt), which run code when they are read. Use the model's safetensors "
            "version, or load it once where you trust it and call save_pretrained."
        )
    else:
        yield "there are no weights: model.safetensors, or model.safetensors.index.json and its shards."


def _index_problems(index: Path) -> Iterator[str]:
    if _is_lfs_pointer(index):
        yield f"{index.name} {_LFS_REMEDY}"
        return
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{index.name} does not hold a weight_map ({type(error).__name__}: {error}). Fetch the file again."
        return
    for name in shards:
        if Path(name).is_absolute() or not (index.parent / name).resolve().is_relative_to(_root(index.parent)):
            yield f"{name}, named in {index.name}, lies outside the folder. Put the file beside the index."
        elif (index.parent / name).exists():
            yield from _file_problems(index.parent / name)
        else:
            yield f"{name}, named in {index.name}, is missing. Fetch the file, or the whole model, again."


def _root(folder: Path) -> Path:
    """The folder below which weights may lie: in the hub's cache they are links from snapshots/ to blobs/."""
    real = folder.resolve()
    return real.parents[1] if real.parent.name == "snapshots" else real


def _file_problems(file: Path) -> Iterator[str]:
    if _is_lfs_pointer(file):
        yield f"{file.name} {_LFS_REMEDY}"
        return
    try:
        header, start = _read_header(file)
        expected = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if not all(isinstance(entry["dtype"], str) and prod(entry["shape"]) >= 0 for entry in header.values()):
            raise ValueError("a tensor without a number format or a shape")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        yield f"{file.name} is not a safetensors file ({error}). Fetch it again."
        return
    size = file.stat().st_size
    if size < expected:
        yield f"{file.name} is cut short: {size:,} of {expected:,} bytes. Fetch it again."


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The entries of a safetensors file by name, and the byte at which their data begins."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > file.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(LFS_MARK)) == LFS_MARK


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(names)]
