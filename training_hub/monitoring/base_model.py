"""What is known of the model that a run begins from: its name, and the licence its own folder states."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training_hub.errors import RecipeError
from training_hub.recipe.yaml_text import read_yaml

CARD, CONFIG = "README.md", "config.json"
LICENCE_FILES = re.compile(r"(licen[cs]e|notice|use_policy|acceptable_use)[\w.-]*", re.IGNORECASE)
ASKED_OF_THE_HUB = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
MOST_BYTES = 1 << 20
CACHED = re.compile(r"models--(.+)--(.+)")
"""The folder of a repository in the hub's cache, above its snapshots: owner and name."""
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class BaseModel:
    """A base model. name: of the hub, or that of its folder, never where that lies. licence, licence_name,
    licence_link: as its card states them, else its config; None where neither does. files: its licence and notices, by
    name."""

    name: str
    is_on_hub: bool
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)


def read_base(path: str, revision: str | None = None) -> BaseModel:
    """The base model at `path`, a folder or a name on the hub. Missing and broken cards are none."""
    folder = Path(path).expanduser()
    if path.startswith("("):  # a model that was handed over
        return BaseModel("a model in memory", False)
    if not folder.is_dir():
        return _stated(path, True, dict(_of_the_hub(path, revision)))
    found = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    wanted = {name: file for name, file in found.items() if name in (CARD, CONFIG) or LICENCE_FILES.fullmatch(name)}
    name = cached_name(folder.resolve())
    return _stated(name or folder.resolve().name, name is not None, wanted)


def cached_name(folder: Path) -> str | None:
    """OWNER/NAME of a folder in the hub's cache; None for any other."""
    match = CACHED.fullmatch(folder.parents[1].name) if folder.parent.name == "snapshots" else None
    return f"{match[1]}/{match[2]}" if match else None


def _of_the_hub(name: str, revision: str | None) -> Iterator[tuple[str, Path]]:
    from transformers.utils import cached_file

    for file in (CARD, CONFIG, *ASKED_OF_THE_HUB):
        try:
            found = cached_file(
                name,
                file,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except OSError:  # a repository may be closed to us by now; the model itself was had
            return
        if found:
            yield file, Path(found)


def _stated(name: str, is_on_hub: bool, found: dict[str, Path]) -> BaseModel:
    content = {file: path.read_bytes() for file, path in found.items() if path.stat().st_size <= MOST_BYTES}
    stated = {**_config(content.pop(CONFIG, b"")), **front_matter(content.pop(CARD, b"").decode("utf-8", "replace"))}
    texts = {key: value for key in ("license", "license_name", "license_link") if (value := _text(stated.get(key)))}
    return BaseModel(
        name, is_on_hub, texts.get("license"), texts.get("license_name"), texts.get("license_link"), content
    )


def front_matter(card: str) -> dict[str, Any]:
    """The metadata at the head of a card; empty where there is none that can be read."""
    match = FRONT_MATTER.match(card[: 1 << 16])
    try:
        found = read_yaml(match[1], CARD) if match else None
    except RecipeError:
        return {}
    return found if isinstance(found, dict) else {}


def _config(content: bytes) -> dict[str, Any]:
    """What config.json says; empty where it says nothing that can be read."""
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str | None:
    # Some cards state several licences as a list.
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    return str(value) if value else None
