"""`training-hub merge`: an adapter and its base as one model, in a folder of its own, compared with the two."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from training_hub.recipe.recipe import Recipe

USAGE = """training-hub merge --adapter FOLDER --output O [--model BASE] [--data ROWS]
                          [--section.field VALUE ...] [section.field=VALUE ...]"""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="FOLDER", required=True, help="folder of the adapter, as PEFT writes it")


def run(recipe: Recipe, options: Namespace) -> int:
    """Write the merged model, and print how far its logits lie from those of base and adapter."""
    from training_hub.backends import Given
    from training_hub.frontends.merging import merged

    merged(recipe, Given(), options.adapter)
    print(f"merged: model in {recipe.output}")
    return 0
