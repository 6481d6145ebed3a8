"""`training-hub forge --config FILE.yaml ...` and `python -m training_hub.apps.sft.main --config ...`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training_hub.errors import RecipeError
from training_hub.frontends.forge.file import presets, read_config, wishes
from training_hub.frontends.forge.meaning import asked
from training_hub.frontends.forge.run import num_gpus, run
from training_hub.frontends.forge.schema import doc_lines

USAGE = """usage: training-hub forge --config FILE.yaml [--section.key=VALUE ...] [section.key=VALUE ...]
       python -m training_hub.apps.sft.main --config FILE.yaml ...

Train with the YAML of torchforge's SFT app: its names, and the defaults of torchtitan 0.2. FILE.yaml is a file, or a
configuration that comes with this package: {presets}.
Settings of the recipe (data.format, evaluation.generate, ...) may stand beside torchforge's keys.
"""

ONLY_HERE = ("model.flavor", "training.local_batch_size")
"""Keys that every configuration of torchforge has, and no recipe."""


def main(words: Sequence[str]) -> int:
    """Run what stands behind `training-hub forge`; the exit code. Raises RecipeError and all that a run raises."""
    if not words or "--help" in words or "-h" in words:
        print(USAGE.format(presets=", ".join(presets())))
        print("\n".join(doc_lines()))
        return 0 if words else 2
    named, assigned = parsed(words)
    config = read_config(named) if named is not None else {}
    result = run(asked(wishes(config, assigned), num_gpus))
    where = f"model in {result.model_path}" if result.model_path else f"run in {result.output_dir}"
    print(f"{result.status}: {where}")
    return 0


def parsed(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file that --config names, and the assignments: --a.b=c, a.b=c or --a.b c. Raises RecipeError."""
    named: str | None = None
    assigned: list[str] = []
    queue = [word for word in words if word != "--debug"]
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=")
        is_behind = name.startswith("--") and not equals and queue and not queue[0].startswith("--")
        if is_behind and ("." in name or name == "--config"):
            value, equals = queue.pop(0), "="
        if name == "--config":
            if not equals or not value:
                raise RecipeError(f"--config: a file or one of {', '.join(presets())} is wanted.")
            named = value
        else:
            assigned.append(f"{name}={value}" if equals else word)
    return named, assigned


def is_configuration(tree: Any) -> bool:
    """Whether this is torchforge's configuration rather than a recipe."""
    if not isinstance(tree, Mapping):
        return False
    found = {f"{name}.{key}" for name, inner in tree.items() if isinstance(inner, Mapping) for key in inner}
    return any(key in found for key in ONLY_HERE)
