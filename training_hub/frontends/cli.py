"""The command `training-hub`: a YAML file, flags and `a.b=c`, all turned into the one recipe.

Every setting of the recipe is a flag with its docstring as help. Nothing heavy is imported before a run begins.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from itertools import pairwise
from typing import Any

from training_hub.algorithms import ALGORITHMS
from training_hub.errors import HubError, RecipeError
from training_hub.frontends.commands import COMMANDS, GROUPS, PLAIN_COMMANDS
from training_hub.frontends.parser import Parser
from training_hub.recipe.load import Layer, layer_of, merge, overrides, read_text, read_value
from training_hub.recipe.names import REQUIRED, Setting, all_settings, nearest, resolve, sections
from training_hub.recipe.recipe import Recipe
from training_hub.recipe.yaml_text import read_yaml
from training_hub.version import VERSION

ALGORITHM = "sft"  # of a command that is not an algorithm's own
AUTOTRAIN = "llm"
FORGE = "forge"
NONE = "(none)"  # for what a command goes without
BACKEND = "torch"

# Short flags for what most runs set.
SHORTCUTS = {
    "--model": "model.path",
    "--data": "data.path",
    "--epochs": "training.epochs",
    "--steps": "training.steps",
    "--batch-size": "training.global_batch_size",
    "--learning-rate": "optimizer.lr",
    "--max-seq-len": "training.max_seq_len",
    "--chat-template": "data.chat_template",
    "--validation": "data.validation",
}

# What an error asks for where it is missing everywhere.
ASK_FOR = {"model.path": "--model", "data.path": "--data", "output": "--output"}

USAGE = """training-hub sft --model M --data D --output O [--section.field VALUE ...] [section.field=VALUE ...]
       training-hub sft --config FILE.yaml [--section.field VALUE ...] [section.field=VALUE ...]"""

SHOWN_VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "pyarrow")


class Assign(argparse.Action):
    """Collects (path, flag as typed, text) in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.assignments = (*namespace.assignments, (self.dest, option_string, values))


class Switch(argparse.Action):
    """The same for a boolean: --x, --no-x, or --x with true or false behind it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        is_off = str(option_string).startswith("--no-")
        if values is not None and "=" in values:
            namespace.settings = (*namespace.settings, values)  # `--data.packing training.steps=10`: two things
            values = None
        if is_off and values is not None:
            raise RecipeError(f"{option_string}: takes no value; found {values!r}.")
        text = values if values is not None else "false" if is_off else "true"
        namespace.assignments = (*namespace.assignments, (self.dest, option_string, text))


def main(arguments: Sequence[str] | None = None, run: Callable[[list[str]], int] | None = None) -> int:
    """Run the command line, or another `run` on it; the exit code. Errors of this package are one message, others are
    bugs."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return (run or _run)(words)
    except HubError as error:
        if "--debug" in words:
            raise
        from training_hub.monitoring.words import printable

        print(f"error: {error.told(printable)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `training-hub schema | head`; Python would complain once more when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def recipe_of(words: Sequence[str]) -> Recipe:
    """The recipe that the words behind `training-hub` describe, beginning with the algorithm. Raises RecipeError."""
    parsed, rest = _parser().parse_known_args(list(words))
    return _recipe(parsed, rest)


def _run(words: list[str]) -> int:
    first = next((word for word in words if word != "--debug"), "")
    if first == AUTOTRAIN or first.partition("=")[0] == "--config":  # AutoTrain's flags, and its file
        from training_hub.frontends.autotrain.command import main as autotrain

        return autotrain(words[words.index(AUTOTRAIN) + 1 :] if first == AUTOTRAIN else words)
    if first == FORGE or (first == ALGORITHM and _is_forge_file(words)):  # torchforge's file
        from training_hub.frontends.forge.command import main as forge

        return forge(words[words.index(first) + 1 :])
    parser = _parser()
    parsed, rest = parser.parse_known_args(words)
    if parsed.command is None:
        parser.print_help()
        return 2
    if parsed.command in ALGORITHMS:
        return _train(_recipe(parsed, rest))
    if parsed.command in COMMANDS:
        return COMMANDS[parsed.command].run(_recipe(parsed, rest), parsed)
    if rest:
        raise RecipeError([f"{word}: training-hub {parsed.command} takes no such argument." for word in rest])
    if parsed.command in PLAIN_COMMANDS:
        return PLAIN_COMMANDS[parsed.command].run(parsed)
    {"schema": _print_schema, "algorithms": _print_algorithms, "version": _print_versions}[parsed.command]()
    return 0


def _is_forge_file(words: list[str]) -> bool:
    """Whether the file behind --config is torchforge's rather than a recipe; what cannot be read is neither."""
    from training_hub.frontends.forge.command import is_configuration

    named = [after for word, after in pairwise(words) if word == "--config"]
    named += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    try:
        return any(is_configuration(read_yaml(read_text(path), path)) for path in named)
    except RecipeError:
        return False  # said where the recipe is read


def _train(recipe: Recipe) -> int:
    from training_hub.launch import is_first, run

    result = run(recipe)
    where = f"model in {result.model_path}" if result.model_path else f"run in {result.output_dir}"
    if is_first(recipe):
        print(f"{result.status}: {where}")
    return 0


def _recipe(parsed: argparse.Namespace, rest: list[str]) -> Recipe:
    from training_hub.frontends.dialects import recipe_from

    layers = [_config(parsed.config)] if parsed.config else []
    layers += [_flag_layer(*assignment) for assignment in parsed.assignments]
    assigned, problems = _rest(rest)
    layers.append(overrides([*parsed.settings, *assigned]))
    layer = merge(*layers, Layer(problems=tuple(problems)))
    not_given = {path: flag for path, flag in ASK_FOR.items() if path not in layer.values}
    layer = replace(layer, spelled={**layer.spelled, **not_given})
    if parsed.command in COMMANDS:
        return recipe_from(merge(_stand_ins(parsed, layer), layer), algorithm=ALGORITHM, backend=BACKEND)
    named = layer.values.get("algorithm", parsed.command)
    if named != parsed.command:
        wrong = f"algorithm: found {named!r} in {parsed.config}, but the command is `training-hub {parsed.command}`."
        raise RecipeError([*layer.problems, wrong])
    return recipe_from(layer, algorithm=parsed.command, backend=BACKEND)


def _stand_ins(parsed: argparse.Namespace, layer: Layer) -> Layer:
    """What stands for the settings that a command does without."""
    command = COMMANDS[parsed.command]
    tokenizer = layer.values.get("model.tokenizer") if command.takes_tokenizer else None
    without = dict.fromkeys(command.goes_without, NONE) | ({"data.path": NONE} if command.without_rows(parsed) else {})
    return Layer({**without, **({"model.path": tokenizer} if tokenizer else {})})


def _config(path: str) -> Layer:
    return layer_of(read_yaml(read_text(path), path), path)


def _flag_layer(path: str, flag: str, text: str) -> Layer:
    try:
        value = read_value(path, text)
    except RecipeError as error:
        return Layer(problems=tuple(error.problems))
    is_other_spelling = flag not in (f"--{path}", f"--no-{path}")
    spelled = (flag if flag in SHORTCUTS else flag.removeprefix("--")) if is_other_spelling else None
    return Layer({path: value}, {path: spelled} if spelled else {})


def _rest(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """What the parser did not know: `a.b=c` settings, and problems."""
    assigned: list[str] = []
    problems: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, _ = word.partition("=")
        is_flag = word.startswith("-")
        if is_flag and resolve(name.removeprefix("--")) is None:
            problems.append(_unknown_flag(name))
            if not equals and queue and not queue[0].startswith("-") and "=" not in queue[0]:
                queue.pop(0)  # its value
        elif equals:
            assigned.append(word)
        elif is_flag and queue:
            assigned.append(f"{word}={queue.pop(0)}")  # a key inside a mapping: --data.roles.bot assistant
        else:
            problems.append(
                f"{word}: not understood; a setting is written --section.field VALUE or section.field=VALUE."
            )
    return assigned, problems


def _unknown_flag(flag: str) -> str:
    names = [option.removeprefix("--") for option in (*SHORTCUTS, "--config", "--debug")]
    paths = [name for setting in all_settings().values() for name in (setting.path, *setting.spellings)]
    wanted = flag.removeprefix("--").removeprefix("no-")
    near = nearest(wanted.replace("_", "-"), names) if "." not in wanted else None
    near = near or nearest(wanted, [*paths, *names])
    hint = f" Did you mean --{near}?" if near else " `training-hub sft --help` lists them all."
    return f"{flag}: not a flag.{hint}"


def _parser() -> Parser:
    parser = Parser(prog="training-hub", description="Fine-tune language models.")
    parser.add_argument("--version", action="version", version=f"training-hub {VERSION}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, entry in ALGORITHMS.items():
        typed = name.replace("_", "-")  # lora-sft; lora_sft, as recipes write it, is taken too
        also = [name] if typed != name else []
        usage = USAGE.replace("training-hub sft", f"training-hub {typed}")
        parser_of = commands.add_parser(typed, aliases=also, help=entry.summary, description=entry.summary, usage=usage)
        _add_settings(parser_of)
        parser_of.set_defaults(command=name)
    below = {
        name: commands.add_parser(name, help=text, description=text).add_subparsers(
            metavar="ACTION", required=True, parser_class=Parser
        )
        for name, text in GROUPS.items()
    }
    for name, command in COMMANDS.items():
        usage = command.usage or USAGE.replace("sft", name).replace(" --output O", "")
        parser_of = _add_command(below, commands, name, command.help, usage=usage)
        command.add_options(parser_of)
        _add_settings(parser_of, names_algorithm=True)
    for name, plain in PLAIN_COMMANDS.items():
        plain.add_options(_add_command(below, commands, name, plain.help))
    commands.add_parser(AUTOTRAIN, help="train with the flags, the file and the defaults of AutoTrain's SFT guide")
    commands.add_parser(FORGE, help="train with the YAML file of torchforge's SFT app, its names and its defaults")
    commands.add_parser("schema", help="print the JSON Schema of a recipe file, for editors")
    commands.add_parser("algorithms", help="list algorithms and their backends")
    commands.add_parser("version", help="print the versions of this package and of those that matter to a run")
    found = [*commands.choices.values(), *(each for group in below.values() for each in group.choices.values())]
    for each in dict.fromkeys(found):  # a command stands there under each of its names
        each.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_command(below: Mapping[str, Any], commands: Any, name: str, text: str, **settings: Any) -> Parser:
    """The parser of a command; one of two words stands below the first."""
    group, _, word = name.rpartition(" ")
    parser = (below[group] if group else commands).add_parser(word, help=text, description=text, **settings)
    parser.set_defaults(command=name)
    return parser


def _add_settings(parser: Parser, names_algorithm: bool = False) -> None:
    parser.set_defaults(assignments=(), settings=())
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe file; flags and section.field=VALUE win over it")
    often = parser.add_argument_group("most used")
    for flag, path in SHORTCUTS.items():
        setting = all_settings()[path]
        often.add_argument(
            flag, dest=path, action=Assign, default=argparse.SUPPRESS, metavar=_metavar(setting), help=path
        )
    groups = {"": parser.add_argument_group("run", " ".join((Recipe.__doc__ or "").split()))}
    for name, section in sections().items():
        groups[name] = parser.add_argument_group(name, " ".join((section.__doc__ or "").split()))
    for setting in all_settings().values():
        if setting.path != "algorithm" or names_algorithm:  # else the command says it
            _add_setting(groups[setting.path.rpartition(".")[0]], setting)


def _add_setting(group: Any, setting: Setting) -> None:
    flags = [f"--{name}" for name in (setting.path, *setting.spellings)]
    shared = {"dest": setting.path, "default": argparse.SUPPRESS, "help": _help(setting)}
    if setting.is_boolean:
        group.add_argument(
            *flags, *(f"--no-{flag[2:]}" for flag in flags), action=Switch, nargs="?", metavar="BOOL", **shared
        )
    else:
        group.add_argument(*flags, action=Assign, metavar=_metavar(setting), **shared)


def _metavar(setting: Setting) -> str:
    if setting.choices:
        return "{" + ",".join(str(choice) for choice in setting.choices) + "}"
    return "NUMBER" if setting.takes_number and not setting.takes_text else "TEXT" if setting.takes_text else "YAML"


def _help(setting: Setting) -> str:
    default = "required" if setting.default is REQUIRED else f"default: {json.dumps(setting.default)}"
    return f"{setting.doc} ({default})".replace("%", "%%")


def _print_schema() -> None:
    from training_hub.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _print_algorithms() -> None:
    from training_hub.frontends.registry import AlgorithmRegistry

    for name in AlgorithmRegistry.list_algorithms():
        print(f"{name}: {', '.join(AlgorithmRegistry.list_backends(name))}")


def _print_versions() -> None:
    print(f"training-hub {VERSION}")
    for name in SHOWN_VERSIONS:
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} is not installed")


if __name__ == "__main__":
    sys.exit(main())
