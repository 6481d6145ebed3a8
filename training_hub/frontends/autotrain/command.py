"""`training-hub llm --trainer sft ...` and `training-hub --config FILE.yml`: AutoTrain's command line and its file.

Every parameter is a flag, in either spelling (--batch-size, --batch_size); every boolean can be turned off (--no-peft).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from training_hub.errors import RecipeError
from training_hub.frontends.autotrain.file import params_of_file
from training_hub.frontends.autotrain.params import TOKENS, LLMTrainingParams, nearest_parameter, unknown_parameter
from training_hub.frontends.autotrain.train import train
from training_hub.frontends.parser import Parser
from training_hub.recipe.load import overrides
from training_hub.recipe.translate import shown

USAGE = """training-hub llm --trainer sft --model M --data-path D --project-name P [--FLAG VALUE ...]
       training-hub --config FILE.yml"""

GROUPS = {
    "what is trained, on what": ("model", "data_path", "text_column", "prompt_text_column", "project_name", "trainer",
                                 "train_split", "valid_split", "valid_path", "max_samples"),
    "training": ("epochs", "batch_size", "gradient_accumulation", "lr", "warmup_ratio", "optimizer", "scheduler",
                 "weight_decay", "max_grad_norm", "seed"),
    "model and text": ("max_seq_length", "model_max_length", "block_size", "padding", "chat_template", "add_eos_token",
                       "response_only_loss"),
    "PEFT and LoRA": ("peft", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "merge_adapter"),
    "memory and speed": ("quantization", "mixed_precision", "use_flash_attention_2", "disable_gradient_checkpointing",
                         "gradient_checkpointing", "unsloth", "packing", "auto_find_batch_size",
                         "distributed_backend"),
    "distillation": ("use_distillation", "teacher_model", "distill_temperature", "distill_alpha",
                     "distill_max_teacher_length"),
    "evaluation": ("use_enhanced_eval", "eval_metrics", "eval_save_predictions", "eval_strategy", "eval_steps",
                   "early_stopping_patience"),
    "checkpoints": ("save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint"),
    "reports": ("logging_steps", "log", "wandb_run_id", "wandb_visualizer"),
    "sweeps": ("use_sweep", "sweep_backend", "sweep_n_trials", "sweep_metric", "sweep_direction", "sweep_params"),
    "the hub": ("push_to_hub", "username", "repo_id", "hub_private"),
}  # fmt: skip
"""Flags of the help page."""


def main(words: Sequence[str]) -> int:
    """Run what stands behind `training-hub llm`; the exit code. Raises RecipeError and all that a run raises."""
    config, _ = config_of(words)
    result = train(config, flag_of).result
    where = f"model in {result.model_path}" if result.model_path else f"run in {result.output_dir}"
    print(f"{result.status}: {where}")
    return 0


def flag_of(name: str) -> str:
    """A parameter as it is written on a command line."""
    return "--" + name.replace("_", "-")


def config_of(words: Sequence[str]) -> tuple[LLMTrainingParams, argparse.Namespace]:
    """The parameters that flags and file give, flags before the file. Raises RecipeError listing all that is wrong."""
    parsed, rest = flag_parser().parse_known_args([_with_dashes(word) for word in words])
    values = params_of_file(parsed.config) if parsed.config else {}
    problems: list[str] = []
    values |= {name: _value(name, text, problems) for name, text in parsed.given.items()}
    assigned = [word for word in rest if "=" in word and not word.startswith("-")]
    problems += _not_understood([word for word in rest if word not in assigned])
    extra = overrides(assigned)
    problems += extra.problems
    if extra.values:
        values["overrides"] = {**values.get("overrides", {}), **extra.values}
    if problems:
        raise RecipeError(problems)
    return LLMTrainingParams(**values), parsed


class _Take(argparse.Action):
    """Collects the text of a flag by the name of its parameter; the last one counts."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        text = values if values is not None else "false" if str(option_string).startswith("--no-") else "true"
        if values is not None and str(option_string).startswith("--no-"):
            raise RecipeError(f"{option_string}: takes no value; found {values!r}.")
        namespace.given = {**namespace.given, self.dest: text}


def flag_parser() -> Parser:
    """The parser of `training-hub llm`."""
    parser = Parser(
        prog="training-hub llm",
        usage=USAGE,
        description="The flags and defaults of AutoTrain's SFT guide.",
    )
    parser.set_defaults(given={})
    parser.add_argument("--train", action="store_true", help="not needed: this command trains, with it and without it")
    parser.add_argument("--config", metavar="FILE.yml", help="AutoTrain's YAML file; flags win over it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_flag(group, name)
    return parser


def _add_flag(group: Any, name: str) -> None:
    field, flag = LLMTrainingParams.model_fields[name], flag_of(name)
    default = "required" if name in ("model", "data_path", "project_name") else f"default: {shown(field.default)}"
    text = f"{' '.join((field.description or '').split())} ({default})".replace("%", "%%")
    shared = {"dest": name, "action": _Take, "default": argparse.SUPPRESS, "help": text}
    if is_boolean(name):
        group.add_argument(flag, f"--no-{flag[2:]}", nargs="?", metavar="BOOL", **shared)
    else:
        choices = [str(choice) for part in (field.annotation, *get_args(field.annotation)) for choice in get_args(part)]
        words = [choice for choice in choices if not choice.startswith("<class")]
        group.add_argument(flag, metavar="{" + ",".join(words) + "}" if words else "VALUE", **shared)


def _with_dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and "." not in name else word


def is_boolean(name: str) -> bool:
    annotation = LLMTrainingParams.model_fields[name].annotation
    return bool in (annotation, *get_args(annotation))


def _kinds(name: str) -> tuple[Any, ...]:
    annotation = LLMTrainingParams.model_fields[name].annotation
    return get_args(annotation) or (annotation,)


def _value(name: str, text: str, problems: list[str]) -> Any:
    """The value that a flag's text stands for; what is not understood goes to `problems`."""
    if is_boolean(name):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        problems.append(f"{flag_of(name)}: found {text!r}; allowed: true or false, or {flag_of('no_' + name)}.")
        return None
    kinds = _kinds(name)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                noun = "a whole number" if kind is int else "a number"
                hint = " Lists of lengths are not here; give one." if name == "block_size" and "," in text else ""
                problems.append(f"{flag_of(name)}: found {text!r}; allowed: {noun}.{hint}")
                return None
    return text


def _not_understood(words: list[str]) -> list[str]:
    """The lines for flags that are none; the values behind them are passed over."""
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not flags:
        return [f"{word}: not understood; a flag is written --name VALUE." for word in words]
    return [_unknown_flag(flag) for flag in flags]


def _unknown_flag(flag: str) -> str:
    name = flag.lstrip("-").replace("-", "_")
    if name in TOKENS:
        return unknown_parameter(name).replace(name, flag, 1)
    near = nearest_parameter(name.removeprefix("no_"))
    hint = f" Did you mean {flag_of(near)}?" if near else " `training-hub llm --help` lists all."
    return f"{flag}: not a flag.{hint}"
