"""Text that looks like a secret: a recipe is saved with the run and shown, so none may be in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_PASSWORD_IN_ADDRESS = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
# Tokens of Hugging Face, OpenAI-like services, GitHub and AWS; without separators, which names of folders have.
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})")
SECRET_PARAMETER = re.compile(
    r"([?&;][^=&\s]*(?:token|key|secret|password|signature|credential|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE
)
"""What stands behind the question mark of an address and is called a secret; group 1 is all but its value."""
# Names of entries. `token` alone says nothing: a chat template is given its bos_token.
_SECRET_NAME = re.compile(
    r"(?:api_?key|access_?key|(?:access|auth|hf|api)_?token|password|passwd|secret)$", re.IGNORECASE
)


def secret_in(text: str, name: str = "") -> str | None:
    """What kind of secret `text`, the value of an entry called `name`, is or holds; None where it looks like none."""
    if _PASSWORD_IN_ADDRESS.search(text) or ("://" in text and SECRET_PARAMETER.search(text)):
        return "a password in an address"
    if _TOKEN.search(text):
        return "an access token"
    return "what its name calls a secret" if _SECRET_NAME.search(name) else None


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
