"""Uploading the final model to the hub: only when asked, only its files, with a token that is never written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training_hub.errors import BackendError
from training_hub.folders import damage, manifest
from training_hub.monitoring.base_model import read_base
from training_hub.monitoring.settings import redacted
from training_hub.recipe import Recipe
from training_hub.recipe.adapter_folder import BASE, CONFIG_FILE
from training_hub.types import Console

NO_TOKEN = (
    "hub.push: there is no token. Set HF_TOKEN in the environment, or run `hf auth login`, or leave hub.push out."
)


def objections(recipe: Recipe) -> list[str]:
    """Why the final model could not be uploaded; asks the hub who the token belongs to, before anything is trained."""
    if not recipe.hub.push:
        return []
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return ["hub.push: HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, or leave hub.push out."]
    if get_token() is None:
        return [NO_TOKEN]
    try:
        HfApi().whoami()
    except Exception as error:  # the library's errors, and those of whatever carries its requests
        return [f"hub.push: the hub does not take the token or cannot be reached: {_told(error)}"]
    return []


def push(folder: Path, recipe: Recipe, console: Console) -> str:
    """Upload the files that the manifest of `folder` lists; the address of what was made there.

    The repository is made where there is none. Raises BackendError where the hub refuses; the model here is as it was.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    problems = damage(folder)
    if problems:
        raise BackendError([*problems, "hub.push: such a model is not uploaded."])
    repo_id = str(recipe.hub.repo_id)
    files = sorted(manifest(folder)["files"])
    console.say(f"hub: uploading {len(files)} files of {folder} to {repo_id}")
    api = HfApi()
    try:
        api.create_repo(repo_id, private=recipe.hub.private, exist_ok=True)
        made: Any = api.create_commit(
            repo_id=repo_id,
            operations=[CommitOperationAdd(name, _published(folder / name, recipe)) for name in files],
            commit_message=f"Model trained with training_hub ({recipe.algorithm})",
        )
    except Exception as error:  # the library's errors, and those of whatever carries its requests
        raise BackendError(
            f"hub.push: {repo_id}: {_told(error)}. The model is whole in {folder}; run the same command again to "
            "upload it."
        ) from error
    console.say(f"hub: {made.commit_url}")
    return str(made.commit_url)


def _published(file: Path, recipe: Recipe) -> str | bytes:
    """What is uploaded of a file: the file, by its path; of an adapter's configuration one that names its base as
    others know it, where the file here says in which folder of this machine it lies."""
    if file.name != CONFIG_FILE:
        return str(file)
    said = json.loads(file.read_text(encoding="utf-8"))
    said[BASE] = read_base(recipe.model.path, recipe.model.revision).name
    return (json.dumps(said, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _told(error: BaseException) -> str:
    """The error and what it came from, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = f"{type(error).__name__}: {redacted(' '.join(lines[:3])).rstrip('.')}"
    return told if error.__cause__ is None else f"{told}, from {_told(error.__cause__)}"
