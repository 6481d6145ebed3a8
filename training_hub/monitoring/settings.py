"""A recipe as it may be shown to others: without secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from training_hub.recipe import Recipe
from training_hub.recipe.secrets import SECRET_PARAMETER

REDACTED = "[redacted]"

_SECRET_WORDS = frozenset(
    (
        *("apikey", "auth", "authorization", "bearer", "cookie", "credential", "credentials", "key", "passphrase"),
        *("passwd", "password", "pwd", "secret", "secrets", "token"),
    )
)
# user:password@ in an address.
_USER_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+@")
# Shapes of tokens of Hugging Face, OpenAI-like services, GitHub and AWS.
_KNOWN_TOKEN = re.compile(r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16})")


def public_settings(recipe: Recipe) -> dict[str, Any]:
    """All settings of `recipe` as plain nested data, with what looks like a secret replaced by '[redacted]'."""
    shown: dict[str, Any] = redacted(recipe.model_dump(mode="json"))
    return shown


def redacted(value: Any) -> Any:
    """`value` with secrets replaced: entries with a name such as `api_key`, passwords in addresses, known tokens."""
    if isinstance(value, Mapping):
        return {key: _redacted_entry(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    if isinstance(value, str):
        text = _USER_IN_ADDRESS.sub(f"{REDACTED}@", value)
        return _KNOWN_TOKEN.sub(REDACTED, SECRET_PARAMETER.sub(rf"\1{REDACTED}", text))
    return value


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: {'training': {'epochs': 1}} as {'training.epochs': 1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _redacted_entry(name: str, value: Any) -> Any:
    return redacted(value) if value is None or isinstance(value, bool) or not _is_secret(name) else REDACTED


def _is_secret(name: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    # Whole words, so that max_tokens_per_gpu and keep_last are not taken for secrets.
    return not _SECRET_WORDS.isdisjoint(re.split(r"[^a-z0-9]+", words))
