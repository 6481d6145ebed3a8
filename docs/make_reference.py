"""Writes docs/reference/recipe.md and docs/reference/cli.md from the recipe itself: python docs/make_reference.py"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from training_hub import errors
from training_hub.algorithms import ALGORITHMS
from training_hub.frontends.autotrain.command import GROUPS, flag_of, is_boolean
from training_hub.frontends.autotrain.params import LLMTrainingParams
from training_hub.frontends.cli import SHORTCUTS
from training_hub.frontends.commands import COMMANDS
from training_hub.frontends.dialects import KEYWORDS, KEYWORDS_OF
from training_hub.frontends.forge.schema import doc_lines
from training_hub.frontends.trainer.fields import FIELDS
from training_hub.frontends.trainer.refused import REFUSED
from training_hub.recipe import Recipe
from training_hub.recipe.names import REQUIRED, Setting, all_settings, sections

FOLDER = Path(__file__).parent / "reference"
TRAINER = Path(__file__).parent / "guides" / "trainer.md"
MARKS = ("<!-- table: written by docs/make_reference.py -->\n", "<!-- end of table -->")
NOTE = "<!-- Written by docs/make_reference.py; change the docstrings in training_hub instead. -->\n"

RECIPE_HEAD = """# The recipe

Every setting of a run. A setting is written in YAML by section, as a flag `--section.field VALUE`, as
`section.field=VALUE` behind the other flags, and in Python as a keyword of `sft()` where one is named below, else as
`sft(..., overrides={"section.field": VALUE})`. An unknown setting is an error that names the nearest one.
"""

CLI_HEAD = """# The command line

    training-hub sft --model M --data D --output O [--section.field VALUE ...] [section.field=VALUE ...]
    training-hub sft --config FILE.yaml [--section.field VALUE ...] [section.field=VALUE ...]
    training-hub llm           # the flags and defaults of AutoTrain's guide; below
    training-hub --config FILE.yml      # AutoTrain's file
    training-hub forge --config FILE.yaml     # torchforge's SFT app: its file and its defaults; below
    training-hub preview       # rows as they will be trained, token by token; takes the same settings
    training-hub plan          # what a run will do and take, without loading weights; takes the same settings
    training-hub eval          # saved models on rows: scores side by side, and what each said
    training-hub chat          # talk to a saved model, beside another if you like
    training-hub continual     # tasks one after the other by several methods, and what each forgets
    training-hub schema        # the JSON Schema of a recipe file, for editors
    training-hub algorithms    # algorithms and their backends
    training-hub version       # versions of this package and of those that matter to a run

`python -m training_hub` is the same command. Flags win over the file, `section.field=VALUE` over flags. A value is
read as YAML; where a setting takes text, the text is taken as it is. A boolean is switched by `--section.field` and
`--no-section.field`. `--debug` shows the traceback of an error.

In an editor that uses the YAML language server, `training-hub schema > recipe.schema.json` and a first line
`# yaml-language-server: $schema=recipe.schema.json` complete and check a recipe file.
"""


def recipe_page() -> str:
    """The page with every section and setting."""
    return "\n".join([NOTE, RECIPE_HEAD, *_contracts(), *_run(), *_sections()])


def cli_page() -> str:
    """The page with commands, flags and exit codes."""
    return "\n".join([NOTE, CLI_HEAD, *_shortcuts(), *_commands(), *_exit_codes(), *_flags(), *_autotrain(), *_forge()])


def trainer_page(page: str) -> str:
    """The guide to SFTTrainer with its table of fields as they are."""
    before, _, rest = page.partition(MARKS[0])
    return before + MARKS[0] + "\n".join(_trainer_fields()) + "\n" + MARKS[1] + rest.partition(MARKS[1])[2]


def write(folder: Path = FOLDER) -> None:
    TRAINER.write_text(trainer_page(TRAINER.read_text(encoding="utf-8")), encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.md").write_text(recipe_page(), encoding="utf-8")
    (folder / "cli.md").write_text(cli_page(), encoding="utf-8")


def _contracts() -> Iterator[str]:
    yield "## Backends and their defaults\n"
    yield "A backend may be the name of a package whose defaults hold then; the defaults below are those of `torch`.\n"
    for algorithm in ALGORITHMS.values():
        for contract in algorithm.contracts:
            defaults = ", ".join(f"`{path}: {json.dumps(value)}`" for path, value in contract.defaults.items())
            yield f"- `{algorithm.name}`, `{contract.name}`: {defaults or 'the defaults below'}"
    yield ""


def _run() -> Iterator[str]:
    yield f"## Run\n\n{_one_line(Recipe.__doc__)}\n"
    yield from (line for setting in all_settings().values() if "." not in setting.path for line in _entry(setting))


def _sections() -> Iterator[str]:
    for name, section in sections().items():
        yield f"## {name}\n\n{_one_line(section.__doc__)}\n"
        inside = (setting for path, setting in all_settings().items() if path.startswith(f"{name}."))
        yield from (line for setting in inside for line in _entry(setting))


def _entry(setting: Setting) -> Iterator[str]:
    keywords = [keyword.name for keyword in KEYWORDS.values() if keyword.path == setting.path]
    facts = [
        f"takes {setting.allowed}",
        "required" if setting.default is REQUIRED else f"default `{_default(setting)}`",
    ]
    if setting.spellings:
        facts.append("also written " + ", ".join(f"`{name}`" for name in setting.spellings))
    if keywords:
        facts.append("in `sft()` " + ", ".join(f"`{name}`" for name in keywords))
    own = [one.name for one in KEYWORDS_OF["osft"].values() if one.path == setting.path and one.name not in KEYWORDS]
    if own:
        facts.append("in `osft()` " + ", ".join(f"`{name}`" for name in own))
    yield f"### `{setting.path}`\n\n{setting.doc}\n\n*{'; '.join(facts)}*\n"


def _shortcuts() -> Iterator[str]:
    yield "## Short flags\n"
    yield from (f"- `{flag}`: `--{path}`" for flag, path in SHORTCUTS.items())
    yield ""


def _commands() -> Iterator[str]:
    yield "## Options of single commands\n"
    for name, command in COMMANDS.items():
        parser = ArgumentParser(add_help=False)
        command.add_options(parser)
        yield f"`training-hub {name}`: {command.help}.\n"
        for action in parser._actions:
            named = action.metavar
            value = f" {' '.join(named) if isinstance(named, tuple) else named}" if named else ""
            yield f"- `{' '.join([*action.option_strings[:1], value.strip()]).strip()}`: {action.help}"
        yield ""


def _exit_codes() -> Iterator[str]:
    yield "## Exit codes\n\n- `0`: done"
    kinds = [getattr(errors, name) for name in dir(errors)]
    found = {kind.exit_code: kind for kind in kinds if isinstance(kind, type) and errors.HubError in kind.__bases__}
    for code, kind in sorted(found.items()):
        if kind is not errors.Interrupted:
            yield f"- `{code}`: {kind.__name__}. {_one_line(kind.__doc__)}"
    yield f"- `128 + N`: Interrupted by signal N. {_one_line(errors.Interrupted.__doc__).partition(';')[0]}."
    yield "- `1`: anything else, which is a bug: the traceback is shown\n"


def _flags() -> Iterator[str]:
    yield "## All flags\n\nWhat each one does is in [the recipe](recipe.md).\n"
    yield "| flag | takes | default |\n|---|---|---|"
    for setting in all_settings().values():
        if setting.path == "algorithm":
            continue  # the command says it
        flag = f"`--{setting.path}`" + (f", `--no-{setting.path}`" if setting.is_boolean else "")
        default = "required" if setting.default is REQUIRED else f"`{_default(setting)}`"
        yield f"| {flag} | {setting.allowed} | {default} |"
    yield ""


def _autotrain() -> Iterator[str]:
    yield "## Flags of `training-hub llm`\n"
    yield "Those of AutoTrain; [the guide](../guides/autotrain.md) says what they become in a recipe.\n"
    for title, names in GROUPS.items():
        yield f"{title[0].upper()}{title[1:]}:\n"
        for name in names:
            field, flag = LLMTrainingParams.model_fields[name], flag_of(name)
            both = f"`{flag}`" + (f", `--no-{flag[2:]}`" if is_boolean(name) else "")
            yield f"- {both} (`{json.dumps(field.default)}`): {_one_line(field.description)}"
        yield ""


def _forge() -> Iterator[str]:
    yield "## Keys of `training-hub forge`\n"
    yield "Those of torchforge, with the defaults of torchtitan 0.2; [the guide](../guides/torchforge.md) says more."
    yield "What is a setting of the recipe is named behind its meaning.\n"
    yield from doc_lines()
    yield ""


def _trainer_fields() -> Iterator[str]:
    yield "| field | of | default | recipe | what it says |\n|---|---|---|---|---|"
    for field in FIELDS:
        path = f"`{field.path}`" if field.path else ""
        default = "" if field.default is None else f"`{field.default!r}`"
        facts = (f"`{field.name}`", field.of, default, path, _one_line(field.meaning()))
        yield f"| {' | '.join(facts)} |".replace("  ", " ")
    yield "\nNot here; a value that asks for nothing is taken, of all others an error says:\n"
    by_reason: dict[str, list[str]] = {}
    for one in REFUSED.values():
        by_reason.setdefault(one.why, []).append(f"`{one.name}`")
    yield from (f"- {', '.join(names)}: {why}" for why, names in by_reason.items())


def _default(setting: Setting) -> str:
    return json.dumps(setting.default)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    write()
