"""Text that looks like a secret: a recipe is saved with the run and shown, so none may be in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_PASSWORD_IN_ADDRESS = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
# Tokens of Hugging Face, OpenAI-like services, GitHub and AWS; without separators, which names of folders have.
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})")


def secret_in(text: str) -> str | None:
    """What kind of secret `text` holds; None where it looks like none."""
    if _PASSWORD_IN_ADDRESS.search(text):
        return "a password in an address"
    return "an access token" if _TOKEN.search(text) else None


def texts_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path of the setting, text) for each text in nested settings, names of entries too."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield path, str(key)
            yield from texts_in(inner, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner, path)
