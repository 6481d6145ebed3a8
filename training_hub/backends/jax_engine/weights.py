"""Weights from safetensors and back, byte for byte: under the files' names, each in the format it came in.

In memory every weight is a float32 master, which holds 16-bit numbers exactly; so what no step has moved is saved as
it was read (float64, which it does not hold, is read again for that). A head that shares the table of embeddings is
neither read twice nor saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from training_hub.backends.jax_engine.shapes import Shape
from training_hub.backends.jax_engine.table import Leaf, leaves, tensors
from training_hub.errors import RecipeError
from training_hub.types import Console

SHARD_BYTES = 5 * 10**9
"""Largest file of weights: transformers' own limit in version 4; one of 50 GB cannot be fetched in parts."""


WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

FORMATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What safetensors calls number formats."""


def number_format(name: str) -> Any:
    """numpy's type of the number format so called; bfloat16 comes with JAX."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return ml_dtypes.bfloat16


@dataclass(frozen=True)
class Loaded:
    """Weights by name in memory, the format each came in, and what a user should be told."""

    weights: dict[str, np.ndarray]
    formats: dict[str, str]
    notes: tuple[str, ...] = ()


def load(folder: Path, shape: Shape, console: Console) -> Loaded:
    """The weights of a model folder in float32. Raises RecipeError naming each that is missing or of another shape."""
    where = _places(folder)
    prefix = _missing_prefix(where, shape)
    wanted = [(key, leaf, tensors(key, leaf, shape)) for key, leaf in leaves(shape)]
    missing = [name for _, _, names in wanted for name in names if name.removeprefix(prefix) not in where]
    if missing:
        raise RecipeError(
            f"model.path {folder}: {len(missing)} weights are not in the files and would start at random: "
            f"{_some(missing)}. Use a folder that holds the whole model."
        )
    used = {name.removeprefix(prefix) for _, _, names in wanted for name in names}
    weights: dict[str, np.ndarray] = {}
    formats: dict[str, str] = {}
    with _Files(where) as files, console.progress("loading weights", total=len(wanted), unit="weights") as advance:
        for key, leaf, names in wanted:
            parts = [files.read(name.removeprefix(prefix)) for name in names]
            formats[key] = parts[0].dtype.name
            exact = [part.astype(np.float32) for part in parts]
            weights[key] = np.stack(exact) if leaf.is_of_experts else exact[0]
            advance(1)
    problems = list(_wrong_shapes(weights, shape, folder))
    if problems:
        raise RecipeError(problems)
    return Loaded(weights, formats, tuple(_unused(sorted(set(where) - used), shape)))


def formats(folder: Path, shape: Shape) -> dict[str, str]:
    """The format in which each weight lies in the files, by their headers; {} where there are no files."""
    if not any((folder / name).exists() for name in (WHOLE, INDEX)):
        return {}
    where = _places(folder)
    if not all(path.exists() for path in where.values()):
        return {}
    prefix = _missing_prefix(where, shape)
    with _Files(where) as files:
        return {
            key: FORMATS[files.format(name)]
            for key, leaf in leaves(shape)
            if (name := tensors(key, leaf, shape)[0].removeprefix(prefix)) in where
        }


def named(weights: Mapping[str, np.ndarray], formats: Mapping[str, str], shape: Shape) -> dict[str, np.ndarray]:
    """The tensors to be written, by their names in the files, each in its format."""
    found: dict[str, np.ndarray] = {}
    for key, leaf in leaves(shape):
        each = np.asarray(weights[key]).astype(number_format(formats[key]))
        parts = list(each) if leaf.is_of_experts else [each]
        found |= dict(zip(tensors(key, leaf, shape), map(np.ascontiguousarray, parts), strict=True))
    return found


def as_they_came(written: Mapping[str, np.ndarray], shape: Shape, folder: Path) -> dict[str, np.ndarray]:
    """`written` with the numbers of the model in `folder` where these are float64 and no step has moved them: the
    masters are their rounding."""
    found = dict(written)
    wide = [name for name, tensor in written.items() if tensor.dtype == np.float64]
    if not wide:
        return found
    where = _places(folder)
    prefix = _missing_prefix(where, shape)
    with _Files(where) as files:
        for name in wide:
            came = files.read(name.removeprefix(prefix))
            if came.dtype == np.float64 and np.array_equal(came.astype(np.float32), written[name].astype(np.float32)):
                found[name] = came
    return found


def save(written: Mapping[str, np.ndarray], folder: Path) -> None:
    """Write tensors as transformers does: one file, or several with an index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in written.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / WHOLE, metadata={"format": "pt"})
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in written.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_configs(source: Path, folder: Path, dtype: str | None) -> None:
    """Copy the configs of the model that was read; `dtype` is put into config.json, None leaves it as it is."""
    for name in ("config.json", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    if dtype is not None:
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("torch_dtype", None)
        content["dtype"] = dtype
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_all(folder: Path, file: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the folder's model, or of one `file` in it, one at a time."""
    where = _places(folder) if file is None else _tensors_of(folder / file)
    with _Files(where) as files:
        for name in where:
            yield name, files.read(name)


class _Files:
    """The safetensors files of a folder, opened as they are needed."""

    def __init__(self, where: Mapping[str, Path]):
        self._where = where
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def read(self, name: str) -> np.ndarray:
        return self._file(name).get_tensor(name)

    def format(self, name: str) -> str:
        """What safetensors calls the format of a tensor."""
        return str(self._file(name).get_slice(name).get_dtype())

    def _file(self, name: str) -> Any:
        path = self._where[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="numpy")
        return self._open[path]


def _places(folder: Path) -> dict[str, Path]:
    """The file in which each tensor lies."""
    index = folder / INDEX
    if not (folder / WHOLE).exists() and index.exists():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in listed.items()}
    return _tensors_of(folder / WHOLE)


def _tensors_of(path: Path) -> dict[str, Path]:
    with safe_open(path, framework="numpy") as file:
        return dict.fromkeys(file.keys(), path)


def _missing_prefix(where: Mapping[str, Path], shape: Shape) -> str:
    """What the files leave out before every name: GPT-2 as its makers saved it has no `transformer.`."""
    first, _ = next(leaves(shape))
    prefix = first.partition(".")[0] + "."
    return prefix if first not in where and first.removeprefix(prefix) in where else ""


def _wrong_shapes(weights: Mapping[str, np.ndarray], shape: Shape, folder: Path) -> Iterator[str]:
    for key, leaf in leaves(shape):
        wanted = size_of(leaf, key, shape)
        if weights[key].shape != wanted:
            yield (
                f"model.path {folder}: {key} has shape {weights[key].shape} in the files, but config.json makes it "
                f"{wanted}. Use the config.json that was saved with these weights."
            )


def size_of(leaf: Leaf, key: str, shape: Shape) -> tuple[int, ...]:
    """The shape that the config makes of a weight."""
    if leaf.name.endswith(("q_norm.weight", "k_norm.weight")):
        return (shape.head_dim,)
    if shape.is_gpt2 and ".c_attn." in key:
        return (shape.width, 3 * shape.width)[-len(leaf.axes) :]
    if key.endswith("wpe.weight"):
        return (shape.positions or 0, shape.width)
    is_shared = ".k_proj." in key or ".v_proj." in key
    sizes = {
        "vocabulary": shape.vocabulary,
        "width": shape.width,
        "heads": (shape.kv_heads if is_shared else shape.heads) * shape.head_dim,
        "hidden": shape.expert_hidden if leaf.is_of_experts else shape.hidden,
        "experts": shape.experts,
        "": shape.experts if len(leaf.axes) == 2 else shape.width,
    }
    return tuple(sizes[axis] for axis in leaf.axes)


def count(shape: Shape) -> int:
    """The numbers of the model's weights."""
    return sum(prod(size_of(leaf, key, shape)) for key, leaf in leaves(shape))


def _unused(names: list[str], shape: Shape) -> Iterator[str]:
    own = [name for name in names if not (shape.is_tied and name == "lm_head.weight")]
    own = [name for name in own if not name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))]
    if own:
        yield (
            f"{len(own)} weights in the files belong to no part of the model that is trained and will not be in the "
            f"result: {_some(own)}"
        )


def _some(names: list[str], shown: int = 8) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
