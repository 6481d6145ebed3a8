"""`python -m training_hub.scripts.finetune.sft`: the flags of EasyDeL's script. Each is a field of SFTConfig, or says
how the model is loaded and which rows are trained on.

A flag may be written with - or _, a boolean alone (--do_last_save), with a value (--packing True) or off
(--no-packing).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from training_hub.errors import RecipeError
from training_hub.frontends.cli import Parser
from training_hub.frontends.cli import main as told
from training_hub.frontends.trainer.config import SFTConfig
from training_hub.frontends.trainer.fields import FIELDS, KNOWN
from training_hub.frontends.trainer.refused import REFUSED
from training_hub.recipe.names import nearest
from training_hub.recipe.translate import shown
from training_hub.recipe.yaml_text import read_yaml

PROGRAM = "python -m training_hub.scripts.finetune.sft"

RUNTIME = {
    "repo_id": "Model folder in Hugging Face format, or a name on the hub.",
    "dataset_name": "File, folder or hub name of the rows (trl-lib/Capybara).",
    "dataset_split": "Split of a hub data set (train).",
    "processor_repo_id": "Folder or hub name of the tokenizer, where it is not beside the model.",
    "sharding_axis": "Lengths of the axes dp, fsdp, ep, tp, sp, with commas between (1, -1, 1, 1, 1).",
    "attn_mechanism": "auto, vanilla, sdpa or flash_attn2 (auto).",
    "dtype": "Format of forward and backward: float32, bfloat16 (auto).",
    "param_dtype": "Format in which the trained weights are saved (as they came).",
    "attn_dtype": "That of dtype.",
    "attn_softmax_dtype": "float32.",
}
"""Flags that are no field of SFTConfig, with their help."""

DATASET = "trl-lib/Capybara"
"""EasyDeL's default of dataset_name."""

OF_MODEL = ("attn_mechanism", "attn_dtype", "attn_softmax_dtype")
SWITCHES = tuple(field.name for field in FIELDS if field.type_or_none() is bool)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the flags say; the exit code. Errors of this package are one message."""
    return told(arguments, run)


def run(words: Sequence[str]) -> int:
    """Train as the flags say. Raises RecipeError and all that a run raises."""
    from training_hub.frontends.trainer.trainer import SFTTrainer

    result = SFTTrainer(**trainer_arguments(words)).train().result
    where = f"model in {result.model_path}" if result.model_path else f"run in {result.output_dir}"
    print(f"{result.status}: {where}")
    return 0


def trainer_arguments(words: Sequence[str]) -> dict[str, Any]:
    """The arguments of SFTTrainer that flags stand for. Raises RecipeError listing all that is wrong."""
    from training_hub.frontends.trainer.loading import AutoEasyDeLModelForCausalLM

    parsed, rest = flag_parser().parse_known_args([_with_underscores(word) for word in words])
    given, problems = dict(parsed.given), [*_not_understood(rest)]
    fields = {name: _value(name, text, problems) for name, text in given.items() if name not in RUNTIME}
    runtime = {name: text for name, text in given.items() if name in RUNTIME}
    if "repo_id" not in runtime:
        problems.append("--repo_id: not given. Write --repo_id MODEL_FOLDER")
    try:
        arguments: Any = SFTConfig(**_with_split(fields, runtime))
    except RecipeError as error:
        problems += [f"--{line}" for line in error.problems]
    try:
        model = AutoEasyDeLModelForCausalLM.from_pretrained(runtime.get("repo_id", "?"), **_loading(runtime, problems))
    except RecipeError as error:
        problems += [f"--{line}".replace("--sharding_axis_dims", "--sharding_axis") for line in error.problems]
    if problems:
        raise RecipeError(problems)
    return {
        "arguments": arguments,
        "model": model,
        "train_dataset": runtime.get("dataset_name", DATASET),
        "processing_class": runtime.get("processor_repo_id"),
    }


class _Take(argparse.Action):
    """Collects the text of a flag by its name; the last one counts."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        is_off = str(option_string).startswith("--no_")
        if is_off and values is not None:
            raise RecipeError(f"{option_string}: takes no value; found {values!r}.")
        text = values if values is not None else "false" if is_off else "true"
        namespace.given = {**namespace.given, self.dest: text}


def flag_parser() -> Parser:
    """The parser of the script."""
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} --repo_id MODEL --dataset_name ROWS [--FLAG VALUE ...]",
        description="Supervised fine-tuning with the flags of EasyDeL's script; TRL's names are flags too.",
    )
    parser.set_defaults(given={})
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group = parser.add_argument_group("model and rows")
    for name, text in RUNTIME.items():
        group.add_argument(f"--{name}", metavar="VALUE", dest=name, action=_Take, default=argparse.SUPPRESS, help=text)
    titles = {"both": "fields of EasyDeL and TRL", "EasyDeL": "fields of EasyDeL", "TRL": "fields of TRL"}
    for of in dict.fromkeys(field.of for field in FIELDS):
        group = parser.add_argument_group(titles.get(of, "fields of our own"))
        for field in (one for one in FIELDS if one.of == of and one.name != "overrides"):
            _add_flag(group, field)
    for name in (one for one in REFUSED if one != "debug"):  # so that each is answered by its own line
        parser.add_argument(f"--{name}", nargs="?", dest=name, action=_Take, default=argparse.SUPPRESS,
                            help=argparse.SUPPRESS)  # fmt: skip
    return parser


def _add_flag(group: Any, field: Any) -> None:
    text = f"{field.meaning()} ({shown(field.default)})".replace("%", "%%")
    shared = {"dest": field.name, "action": _Take, "default": argparse.SUPPRESS, "help": text}
    if field.name in SWITCHES:
        group.add_argument(f"--{field.name}", f"--no_{field.name}", nargs="?", metavar="BOOL", **shared)
    else:
        group.add_argument(f"--{field.name}", metavar="VALUE", **shared)


def _with_underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def _value(name: str, text: str, problems: list[str]) -> Any:
    """The value that a flag's text stands for; of a field that takes text, the text."""
    kind = KNOWN[name].type_or_none() if name in KNOWN else None
    if name in SWITCHES or text in ("True", "False", "None"):
        text = text.lower().replace("none", "null")
    elif kind is str:
        return text
    try:
        return read_yaml(text, f"--{name}")
    except RecipeError as error:
        problems += error.problems
        return None


def _with_split(fields: dict[str, Any], runtime: dict[str, str]) -> dict[str, Any]:
    split = runtime.get("dataset_split")
    return fields if split is None else {**fields, "overrides": {"data.split": split}}


def _loading(runtime: dict[str, str], problems: list[str]) -> dict[str, Any]:
    """What flags say of how the model is loaded."""
    found: dict[str, Any] = {name: runtime[name] for name in ("dtype", "param_dtype") if name in runtime}
    own = {name: runtime[name] for name in OF_MODEL if name in runtime}
    if "sharding_axis" in runtime:
        try:
            found["sharding_axis_dims"] = tuple(int(one) for one in runtime["sharding_axis"].strip("()[]").split(","))
        except ValueError:
            problems.append(f"--sharding_axis: found {shown(runtime['sharding_axis'])}; allowed: 1,-1,1,1,1.")
    return {**found, **({"config_kwargs": own} if own else {})}


def _not_understood(words: list[str]) -> list[str]:
    """The lines for flags that are none; the values behind them are passed over."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    if not flags:
        return [f"{word}: not understood; a flag is written --name VALUE." for word in words]
    near = {flag: nearest(flag[2:], [*KNOWN, *RUNTIME]) for flag in flags}
    return [
        f"{flag}: not a flag.{f' Did you mean --{one}?' if one else f' `{PROGRAM} --help` lists all.'}"
        for flag, one in near.items()
    ]
