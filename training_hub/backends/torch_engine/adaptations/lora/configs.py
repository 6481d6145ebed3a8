"""From the section `lora` to a configuration of PEFT, and what is wrong with the section before a weight is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from training_hub.backends.torch_engine.adaptations.lora import library
from training_hub.backends.torch_engine.loading.quantization import NONE
from training_hub.backends.torch_engine.loading.quantization import problems as quantization_problems
from training_hub.errors import RecipeError
from training_hub.recipe import Recipe
from training_hub.recipe.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, said_in
from training_hub.recipe.lora import STARTING_IN_WEIGHTS
from training_hub.recipe.lora import Lora as Settings
from training_hub.recipe.names import nearest

KINDS_OF_LORA: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "lora": {},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"},
    }
)
"""Tuners that are PEFT's LoRA with a field of its configuration set."""

CHOOSING_MODULES = ("ia3", "ln_tuning")
"""Tuners for which PEFT knows the modules of each architecture, and all linear layers would be wrong."""

RANK, ALPHA = 16, 32
"""Defaults of the kinds of LoRA."""

SEEN = (
    *("r", "lora_alpha", "lora_dropout", "lora_bias", "bias", "use_rslora", "use_dora", "init_lora_weights"),
    *("rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices", "fan_in_fan_out"),
    "ensure_weight_tying",
)
"""Fields of PEFT's LoRA with which it begins alike beside weights that are read one by one, whatever they say; the
others as usual. So do TUNERS. A test begins each so, and beside whole weights."""

DRAWN = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that are random numbers and zeros."""

BEGINNINGS = (*DRAWN, "pissa", "olora", "mica")
"""Values of init_lora_weights with which it does, and "pissa_niter_" with a number."""

TUNERS = (
    *("adalora", "beft", "boft", "c3a", "deft", "delora", "fourierft", "gralora", "hira", "hra", "ia3", "ln_tuning"),
    *("loha", "lokr", "miss", "oft", "peanut", "psoft", "pvera", "randlora", "road", "supertuning", "tinylora"),
    *("unilora", "vblora", "vera", "waveft"),
)

MULTIPLYING: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "int4": ("hira", "hra", "loha", "lokr", "peanut", "supertuning"),
        "int8": ("hira", "hra", "peanut", "supertuning"),
    }
)
"""TUNERS that compute in forward with what lies in the place of the weights, or want its shape, by what that is."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "poly": "it needs a task for each row",
        "xlora": "it mixes adapters that were trained before",
        "adamss": "it regroups its parts by a call in the training loop that only PEFT's own trainer makes",
        "shadow": "it hands another object than a tensor from layer to layer",
        "frod": "its weights cannot be laid out before those of the model are read",
        "shira": "its weights cannot be laid out before those of the model are read",
        "lily": "its gradients depend on how a step is cut into packs",
        "trainable_tokens": "it is a setting here: lora.trainable_tokens, beside any tuner",
        "osf": "it is an algorithm here: training-hub osft",
    }
)
"""Tuners of PEFT that cannot be trained here, and why."""

ADALORA = "adalora"
OF_THE_RUN = ("total_step", "rank_pattern")
"""Fields of AdaLoRA that follow from the run."""

UNKNOWN_STEPS = 2**31
"""Stands for the number of steps until it is known."""

OF_DATA = ("eva", "corda", "lora_ga", "loftq")
"""Values of init_lora_weights that need rows, or quantise the base on their own."""

LOST = ("corda", "lora_ga")
"""Values of init_lora_weights that take out of the weights what follows from rows."""

OWN_FIELDS = ("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping",
              "peft_version")  # fmt: skip


def problems(recipe: Recipe) -> list[str]:
    """Why the section cannot be had from the installed PEFT, each with its remedy; no weight is read."""
    unmet = quantization_problems(recipe.model)
    if not library.is_installed():
        return [library.MISSING, *unmet]
    found = [*unmet, *_section_problems(recipe)]
    return found or list(_low_problems(recipe))


def _section_problems(recipe: Recipe) -> list[str]:
    if recipe.lora.adapter is not None:
        return list(_folder_problems(Path(recipe.lora.adapter).expanduser(), recipe.model.quantization))
    found = list(_tuner_problems(recipe.lora.tuner))
    return found or list(_field_problems(recipe.lora))


def make_config(recipe: Recipe, token_ids: list[int] | None) -> Any:
    """PEFT's configuration for the section, or that of the adapter that the run goes on with.

    Raises RecipeError where a field or its value is wrong.
    """
    found = problems(recipe)
    if found:
        raise RecipeError(found)
    settings = recipe.lora
    if settings.adapter is not None:
        config = library.load().PeftConfig.from_pretrained(str(Path(settings.adapter).expanduser()))
        config.inference_mode = False
        return config
    kind = _kind(settings.tuner)
    given = {**_given(settings, kind), **({"trainable_token_indices": token_ids} if token_ids else {})}
    try:
        with library.quiet():
            return kind(task_type="CAUSAL_LM", **given)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"lora.options: {error}") from error


def is_changing_its_base(config: Any) -> bool:
    """Whether the adapter starts from a part of the weights, which is taken out of them (PiSSA, OLoRA)."""
    kind = getattr(config, "init_lora_weights", True)
    return isinstance(kind, str) and _takes_a_part(kind)


def _takes_a_part(init_lora_weights: str) -> bool:
    return init_lora_weights.startswith("pissa") or init_lora_weights == "olora"


def begins_beside(config: Any) -> str:
    """Why an adapter must be made beside whole weights; "" where it begins alike beside those read one by one."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        is_known = kind.lower() in TUNERS
        return "" if is_known else f"it is not known whether an adapter of {kind} begins alike beside less of it"
    usual = type(config)()
    found = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in (*OWN_FIELDS, *SEEN) and getattr(config, field.name) != getattr(usual, field.name)
    ]
    begun = config.init_lora_weights
    is_seen = begun in BEGINNINGS or str(begun).startswith("pissa_niter_")
    if begun not in DRAWN and not is_seen:
        found.append("init_lora_weights")
    return f"an adapter with {', '.join(found)} may want all of it" if found else ""


def refuse_unrounded(config: Any, tuner: str) -> None:
    """Raise RecipeError for an adapter that reads weights past the layer that rounds them."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA" or config.use_dora or is_changing_its_base(config):
        raise RecipeError(
            f"lora.tuner: {tuner} ({kind}) computes with the weights themselves, and qat.weight_dtype has them rounded "
            "in their own layer. Write lora.tuner: lora or rslora, without DoRA, PiSSA or OLoRA; or leave qat out."
        )


def _kinds() -> dict[str, Any]:
    """The classes of configurations of every tuner that adapts modules, by name."""
    with library.quiet():
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
        from peft.tuners.tuners_utils import BaseTuner
    found = {}
    for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(name)
        if isinstance(tuner, type) and issubclass(tuner, BaseTuner):
            found[str(getattr(name, "value", name)).lower()] = kind
    return found


def _kind(tuner: str) -> Any:
    return _kinds()["lora" if tuner in KINDS_OF_LORA else tuner]


def _tuner_problems(tuner: str) -> Iterator[str]:
    known = [*KINDS_OF_LORA, *(name for name in _kinds() if name not in (*REFUSED, *KINDS_OF_LORA))]
    if tuner in REFUSED:
        yield f"lora.tuner: {tuner} cannot be trained here: {REFUSED[tuner]}. Known: {', '.join(known)}."
    elif tuner not in known:
        near = nearest(tuner, known)
        hint = f" Write lora.tuner: {near}" if near else ""
        yield f"lora.tuner: found {tuner!r}; known: {', '.join(known)}.{hint}"


def _given(settings: Settings, kind: Any) -> dict[str, Any]:
    """The fields of PEFT's configuration that the section sets, by name."""
    is_lora = settings.tuner in KINDS_OF_LORA
    targets = None if settings.tuner in CHOOSING_MODULES else "all-linear"
    own = {
        "r": RANK if settings.r is None and is_lora else settings.r,
        "alpha": ALPHA if settings.alpha is None and is_lora else settings.alpha,
        "dropout": settings.dropout,
        "target_modules": targets if settings.target_modules is None else settings.target_modules,
        "modules_to_save": settings.modules_to_save,
    }
    named: dict[str | None, Any] = {_field(kind, name): value for name, value in own.items() if value is not None}
    if settings.tuner == ADALORA:
        named["total_step"] = UNKNOWN_STEPS
        if settings.r is not None:
            named["init_r"] = -(-3 * settings.r // 2)  # in proportion to PEFT's defaults, 12 and 8
    return {name: value for name, value in named.items() if name} | dict(_preset(settings.tuner)) | settings.options


def _preset(tuner: str) -> Mapping[str, Any]:
    return KINDS_OF_LORA.get(tuner, {})


def _field(kind: Any, name: str) -> str | None:
    """What the tuner calls a setting of ours; None where it has no such thing."""
    fields = [each.name for each in dataclasses.fields(kind)]
    if name == "alpha":
        wanted = ["lora_alpha", "alpha"]
    elif name == "r":
        wanted = ["target_r", "r"]  # of AdaLoRA, which has both, what is left in the end; its r does nothing
    elif name == "dropout":
        own = [field for field in fields if field.endswith("_dropout") and field not in ("rank_dropout",)]
        wanted = ["lora_dropout", *(field for field in own if field != "module_dropout"), "module_dropout"]
    else:
        wanted = [name]
    return next((field for field in wanted if field in fields), None)


def _field_problems(settings: Settings) -> Iterator[str]:
    kind = _kind(settings.tuner)
    fields = [each.name for each in dataclasses.fields(kind) if each.name not in OWN_FIELDS]
    ours = {_field(kind, name): name for name in ("r", "alpha", "dropout", "target_modules", "modules_to_save")}
    for name in ("r", "alpha", "dropout", "target_modules", "modules_to_save"):
        if getattr(settings, name) is not None and _field(kind, name) is None:
            yield f"lora.{name}: the tuner {settings.tuner} has none in PEFT. Leave it out."
    if settings.trainable_tokens and "trainable_token_indices" not in fields:
        yield f"lora.trainable_tokens: the tuner {settings.tuner} cannot train rows of a table. Write lora.tuner: lora"
    for name, value in settings.options.items():
        if name in ours:
            yield f"lora.options: {name} is a setting of its own: lora.{ours[name]}. Write it there."
        elif settings.tuner == ADALORA and name in OF_THE_RUN:
            yield f"lora.options: {name} is the run's to say, from training.steps or epochs. Leave it out."
        elif name in _preset(settings.tuner):
            yield f"lora.options: {name} is what lora.tuner: {settings.tuner} sets. Leave one out."
        elif name not in fields:
            near = nearest(name, fields)
            hint = f" Did you mean {near}?" if near else ""
            yield f"lora.options: PEFT's {kind.__name__} has no field {name!r}.{hint} It has: {', '.join(fields)}."
        elif name == "init_lora_weights" and value in OF_DATA:
            yield (
                f"lora.options: init_lora_weights {value} needs rows or another base before training, which is not "
                "done here. Write pissa, olora, gaussian or true."
            )


def _low_problems(recipe: Recipe) -> Iterator[str]:
    """Why the adapter cannot be put beside weights of 4 or 8 bits; what makes it is known to be right otherwise."""
    kept = recipe.model.quantization
    if kept == NONE:
        return
    where, tuner, begun = "lora.tuner", recipe.lora.tuner, recipe.lora.options.get("init_lora_weights")
    remedy = "Write lora.tuner: lora, or model.quantization: none."
    if recipe.lora.adapter is not None:  # how it began has been looked at
        folder = Path(recipe.lora.adapter).expanduser()
        where, tuner, begun = f"lora.adapter: {folder}", str(said_in(folder).get("peft_type")).lower(), None
        remedy = "Write model.quantization: none."
    if isinstance(begun, str) and _takes_a_part(begun):
        yield f"{where}: {begun} takes its start out of the weights, which {kept} numbers do not allow. {remedy}"
    if tuner not in KINDS_OF_LORA and (tuner not in TUNERS or tuner in MULTIPLYING[kept]):
        yield f"{where}: {tuner} computes with the weights themselves, of which {kept} keeps bytes. {remedy}"


def _folder_problems(folder: Path, quantization: str) -> Iterator[str]:
    where = f"lora.adapter: {folder}"
    if not folder.is_dir():
        yield f"{where} is not a folder. Give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}."
        return
    if not (folder / CONFIG_FILE).is_file():
        yield f"{where} holds no {CONFIG_FILE}. Give a folder that PEFT's save_pretrained or a run of ours wrote."
        return
    if not (folder / WEIGHTS_FILE).is_file():
        yield f"{where} holds no {WEIGHTS_FILE}; pickle files (.bin) are not read. Save the adapter as safetensors."
    try:
        said = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tuner = str(said.get("peft_type", "")).lower()
    except (ValueError, AttributeError) as error:
        yield f"{where}: {CONFIG_FILE} is not valid JSON ({error}). Fetch the file again."
        return
    found = list(_tuner_problems(tuner)) or list(_start_problems(said, quantization))
    yield from (f"{where}: {line}" for line in found)


def _start_problems(said: Mapping[str, Any], quantization: str) -> Iterator[str]:
    """Why what an adapter took out of the weights when it began cannot be taken out of them again."""
    begun = str(said.get("init_lora_weights"))
    if begun.startswith("pissa_niter_") or begun in LOST:
        yield (
            f"init_lora_weights is {begun}: what it took out of the weights was drawn at random, or made of rows, and "
            "is not in the folder. Have PEFT write it as a LoRA beside the weights as they were: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...)."
        )
    elif begun in STARTING_IN_WEIGHTS and quantization != NONE:
        yield (
            f"init_lora_weights is {begun}: it stands beside weights of which it took a part out, which {quantization} "
            "numbers do not allow. Write model.quantization: none."
        )
