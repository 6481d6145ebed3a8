"""`training-hub continual`: a sequence of tasks under several methods and seeds, and what each method forgets."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from training_hub.recipe.load import overrides
from training_hub.recipe.recipe import Recipe

if TYPE_CHECKING:
    from training_hub.experiments.continual import Method

DEFAULT_METHODS = ("full", "osft", "osft-core", "replay")

USAGE = """training-hub continual --model M --output O --task NAME TRAIN TEST --task NAME TRAIN TEST ...
                              [--methods full osft ...] [--seeds 0 1 2] [--for METHOD SETTING=VALUE ...]
                              [--section.field VALUE ...] [section.field=VALUE ...]"""


def add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("continual")
    group.add_argument(
        "--task",
        nargs=3,
        action="append",
        metavar=("NAME", "TRAIN", "TEST"),
        help="a task: a name, the rows that train it and those that test it; once for each, in the order of learning",
    )
    group.add_argument(
        "--methods",
        nargs="+",
        default=list(DEFAULT_METHODS),
        metavar="METHOD",
        help="full, osft, osft-core, osft-frozen, osft-carry, replay, lora (default: full osft osft-core replay)",
    )
    group.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="each runs all (default: 0)")
    group.add_argument(
        "--for",
        dest="settings_for",
        nargs=2,
        action="append",
        default=[],
        metavar=("METHOD", "SETTING=VALUE"),
        help="a setting of one method alone, such as --for osft optimizer.lr=1e-4; may be given again",
    )
    group.add_argument(
        "--score",
        choices=("exact_match", "loss"),
        default="exact_match",
        help="what is compared: the share of answers that are right letter by letter, or minus the loss on the "
        "answers, which is cheaper (default: exact_match)",
    )


def run(recipe: Recipe, options: Namespace) -> int:
    """Run the study, print its table, and say where its files are."""
    from training_hub.experiments.continual import Study, Task, continual
    from training_hub.experiments.continual_files import table, write_files

    tasks = tuple(Task(*three) for three in options.task or ())
    study = Study(recipe, tasks, _methods(options), tuple(options.seeds), options.score)
    result = continual(study)
    paths = write_files(result)
    print("\n".join(table(result)))
    print("\nwritten: " + ", ".join(str(path) for path in paths))
    return 0


def _methods(options: Namespace) -> tuple[Method, ...]:
    """The methods with their own settings. Raises RecipeError listing what is wrong."""
    from training_hub.errors import RecipeError
    from training_hub.experiments.continual import method_of

    problems = []
    settings: dict[str, list[str]] = {name: [] for name in options.methods}
    for name, text in options.settings_for:
        if name in settings:
            settings[name].append(text)
        else:
            problems.append(f"--for {name} {text}: {name!r} is not among --methods {' '.join(options.methods)}.")
    layers = {name: overrides(texts) for name, texts in settings.items()}
    problems += [f"--for {name}: {line}" for name, layer in layers.items() for line in layer.problems]
    if problems:
        raise RecipeError(problems)
    return tuple(method_of(name, layers[name].values) for name in options.methods)
