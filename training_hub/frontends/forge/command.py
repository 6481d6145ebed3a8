"""`training-hub forge --config FILE.yaml ...` and `python -m training_hub.apps.sft.main --config ...`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training_hub.errors import RecipeError
from training_hub.folders import write_text
from training_hub.frontends.forge.file import Wishes, presets, read_config, wishes
from training_hub.frontends.forge.meaning import asked
from training_hub.frontends.forge.run import num_gpus, recipe_of, run
from training_hub.frontends.forge.schema import doc_lines
from training_hub.recipe.load import dump

USAGE = """usage: training-hub forge --config FILE.yaml [--section.key=VALUE ...] [section.key=VALUE ...]
       python -m training_hub.apps.sft.main --config FILE.yaml ...
       training-hub forge --config FILE.yaml --recipe RECIPE.yaml     write the recipe, for any other command

Train with the YAML of torchforge's SFT app: its names, and the defaults of torchtitan 0.2. FILE.yaml is a file, or a
configuration that comes with this package: {presets}.
Settings of the recipe (data.format, evaluation.generate, ...) may stand beside torchforge's keys.
"""

FILES = {"--config": "a file or one of {presets}", "--recipe": "the name of a file to write"}
"""Flags that name a file, and what they want."""

ONLY_HERE = ("model.flavor", "training.local_batch_size")
"""Keys that every configuration of torchforge has, and no recipe."""


def main(words: Sequence[str]) -> int:
    """Run what stands behind `training-hub forge`; the exit code. Raises RecipeError and all that a run raises."""
    if not words or "--help" in words or "-h" in words:
        print(USAGE.format(presets=", ".join(presets())))
        print("\n".join(doc_lines()))
        return 0 if words else 2
    named, assigned, recipe_file = parsed(words)
    config = read_config(named) if named is not None else {}
    if recipe_file is not None:
        return _write_recipe(wishes(config, assigned), Path(recipe_file))
    result = run(asked(wishes(config, assigned), num_gpus))
    where = f"model in {result.model_path}" if result.model_path else f"run in {result.output_dir}"
    print(f"{result.status}: {where}")
    return 0


def _write_recipe(wanted: Wishes, file: Path) -> int:
    """Write the recipe that a configuration stands for, for a run on machines that are not this one."""
    found = asked(wanted, num_gpus, {"SLURM_JOB_ID": "that of the job to come"})
    write_text(file, dump(recipe_of(found)))
    for note in found.notes:
        print(f"recipe: {note}")
    print(f"recipe in {file}: training-hub sft --config {file}")
    return 0


def parsed(words: Sequence[str]) -> tuple[str | None, list[str], str | None]:
    """The file of --config, the assignments (--a.b=c, a.b=c, --a.b c), the file of --recipe. Raises RecipeError."""
    given: dict[str, str] = {}
    assigned: list[str] = []
    queue = [word for word in words if word != "--debug"]
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=")
        is_behind = name.startswith("--") and not equals and queue and not queue[0].startswith("--")
        if is_behind and ("." in name or name in FILES):
            value, equals = queue.pop(0), "="
        if name in FILES:
            if not equals or not value:
                raise RecipeError(f"{name}: {FILES[name].format(presets=', '.join(presets()))} is wanted.")
            given[name] = value
        else:
            assigned.append(f"{name}={value}" if equals else word)
    return given.get("--config"), assigned, given.get("--recipe")


def is_configuration(tree: Any) -> bool:
    """Whether this is torchforge's configuration rather than a recipe."""
    if not isinstance(tree, Mapping):
        return False
    found = {f"{name}.{key}" for name, inner in tree.items() if isinstance(inner, Mapping) for key in inner}
    return any(key in found for key in ONLY_HERE)
