"""`training-hub merge`: an adapter and its base as one model, in a folder of its own, compared with the two."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from training_hub.errors import RecipeError
from training_hub.recipe.recipe import Recipe

USAGE = """training-hub merge ADAPTER --output O [--model BASE] [--data ROWS]
                          [--section.field VALUE ...] [section.field=VALUE ...]"""


class Folder(argparse.Action):
    """Takes the first word that is no flag: the adapter, unless it is a setting as section.field=VALUE."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is not None and "=" in values and not Path(values).expanduser().exists():
            namespace.settings = (*namespace.settings, values)
        elif values is not None:
            namespace.folder = values


def add_options(parser: ArgumentParser) -> None:
    told = "folder of the adapter, as PEFT writes it"
    parser.add_argument("folder", metavar="ADAPTER", nargs="?", action=Folder, help=told)
    parser.add_argument("--adapter", metavar="ADAPTER", help="the same, as a flag")


def run(recipe: Recipe, options: Namespace) -> int:
    """Write the merged model, and print how far its logits lie from those of base and adapter."""
    from training_hub.backends import Given
    from training_hub.frontends.merging import merged

    given = [one for one in (options.folder, options.adapter) if one is not None]
    if len(given) != 1:
        found = f"given twice, {' and '.join(given)}" if given else "not given"
        raise RecipeError(f"ADAPTER: {found}. Write training-hub merge out-lora/final --output {recipe.output}")
    merged(recipe, Given(), given[0])
    print(f"merged: model in {recipe.output}")
    return 0
