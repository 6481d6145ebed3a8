"""What torchforge's keys say in a recipe: those that are one setting by the table, the others by a function each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from training_hub.frontends.forge.file import Wishes
from training_hub.frontends.forge.machines import launcher, processes, world_size
from training_hub.frontends.forge.reading import Reading
from training_hub.frontends.forge.rows import rows, validation
from training_hub.frontends.forge.schema import KEYS
from training_hub.frontends.forge.weights import saving, weights
from training_hub.recipe.check import RIVALS
from training_hub.recipe.load import Layer, merge
from training_hub.recipe.names import nearest
from training_hub.recipe.translate import shown

DECAYS = {"linear": "linear", "cosine": "cosine"}
TOGETHER = "parallelism.pipeline_parallel_microbatch_size"
CHECKPOINTING = ("none", "selective", "full", "memory_budget")


@dataclass(frozen=True)
class Asked:
    """A run as asked for in torchforge's words. notes: to be said when it begins. hides_gpus: processes.with_gpus is
    false. dataset: what training.dataset names, for the remedy where it cannot be had."""

    layer: Layer
    notes: tuple[str, ...] = ()
    hides_gpus: bool = False
    dataset: str = ""


def asked(
    wishes: Wishes, num_devices: Callable[[], int] = lambda: 0, environment: Mapping[str, str] | None = None
) -> Asked:
    """The settings that the keys stand for; what is wrong is in the layer's problems.

    num_devices: GPUs of this host, asked for only where it matters. environment: torchrun's, if not this process's.
    """
    reading = Reading(wishes.keys, wishes.own.values, num_devices)
    if environment is not None:
        reading.environment = environment
    reading.problems += [*wishes.problems, *reading.wrong_kinds()]
    _by_table(reading)
    for part in PARTS:
        reading.problems += part(reading)
    own = _beside(reading, wishes.own)
    layer = merge(Layer(reading.settings, reading.spelled, tuple(reading.problems)), own)
    hides = reading.is_given("processes.with_gpus") and not reading.value("processes.with_gpus")
    return Asked(layer, tuple(reading.notes), hides, str(reading.value("training.dataset")))


def _by_table(reading: Reading) -> None:
    for name, key in KEYS.items():
        if key.setting:
            _take(reading, name, key.setting)
        elif key.only and reading.is_given(name) and _is_of_kind(reading, name) and reading.given[name] not in key.only:
            allowed = ", ".join(shown(value) for value in key.only)
            reading.problems.append(
                f"{name}: found {shown(reading.given[name])}; allowed: {allowed}, since {key.reason}."
            )


def _take(reading: Reading, name: str, path: str) -> None:
    """Give a setting its value; a default does not take the place of another key that says the same."""
    if reading.is_given(name):
        if path in reading.spelled and reading.is_given(reading.spelled[path]):
            reading.problems.append(f"{path}: given twice, as {reading.spelled[path]} and as {name}. Keep one.")
        reading.give(path, reading.given[name], name)
    elif path not in reading.settings and KEYS[name].default is not None:
        reading.give(path, KEYS[name].default, name)


def _is_of_kind(reading: Reading, name: str) -> bool:
    return KEYS[name].takes(reading.given[name])


def _beside(reading: Reading, own: Layer) -> Layer:
    """The recipe's own settings beside the keys; defaults of keys give way to them, keys that were given do not."""
    problems = list(own.problems)
    for path in own.values:
        key = reading.spelled.get(path, "")
        if reading.is_given(key):
            problems.append(f"{path}: given twice, as {key} and as {own.spelled.get(path, path)}. Keep one.")
    for pair in RIVALS:
        for mine, other in (pair, pair[::-1]):
            if mine in own.values and not reading.is_given(reading.spelled.get(other, "")):
                reading.settings.pop(other, None)
    return Layer(own.values, own.spelled, tuple(problems))


def _batch(reading: Reading) -> Iterator[str]:
    local, wanted = reading.value("training.local_batch_size"), reading.value("training.global_batch_size")
    world, problem = world_size(reading)
    if problem or local < 1:
        yield problem or f"training.local_batch_size: found {local}; allowed: at least 1. Write 1"
        return
    divided = 1
    for kind in ("tensor", "context", "pipeline"):
        divided *= max(1, reading.value(f"parallelism.{kind}_parallel_degree"))
    copies = max(1, world // divided)
    if wanted == -1:
        reading.give("training.global_batch_size", local * copies, "training.local_batch_size")
    elif wanted < 1 or wanted % (local * copies):
        many = local * copies
        yield (
            f"training.global_batch_size: found {wanted}; allowed: -1, or a multiple of {many}, which is "
            f"training.local_batch_size {local} x {copies} processes that see different data. Write "
            f"training.global_batch_size: {max(1, round(wanted / many)) * many}"
        )
    else:
        reading.give("training.global_batch_size", wanted, "training.global_batch_size")
    stages, together = reading.value("parallelism.pipeline_parallel_degree"), reading.value(TOGETHER)
    if stages == 1 and together != 1:
        yield f"{TOGETHER}: found {together}; would change nothing in one stage. Leave it out"
    elif together < 1 or local % together:
        fitting = ", ".join(str(number) for number in range(1, local + 1) if local % number == 0)
        yield f"{TOGETHER}: found {together}; allowed: {fitting}, which divide training.local_batch_size. Write 1"
    length = reading.value("training.seq_len")
    if length >= 1:  # else the recipe says what is wrong with it
        rows = local if stages == 1 else together
        reading.give("training.max_tokens_per_gpu", rows * length, "training.local_batch_size")


def _schedule(reading: Reading) -> Iterator[str]:
    kind, ratio = reading.value("lr_scheduler.decay_type"), reading.value("lr_scheduler.decay_ratio")
    if kind not in DECAYS:
        near = nearest(str(kind), DECAYS) or "linear"
        yield (
            f"lr_scheduler.decay_type: found {shown(kind)}; allowed: linear, cosine (and constant, inverse_sqrt and "
            f"wsd as lr_scheduler.name). Write lr_scheduler.decay_type: {near}"
        )
    elif ratio is None:
        reading.give("lr_scheduler.name", DECAYS[kind], "lr_scheduler.decay_type")
    elif kind != "linear":
        yield (
            f"lr_scheduler.decay_ratio: {ratio} with decay_type {kind}: after a stable phase the rate falls along a "
            "line here. Write lr_scheduler.decay_type: linear, or leave decay_ratio out."
        )
    else:
        reading.give("lr_scheduler.name", "wsd", "lr_scheduler.decay_ratio")
        reading.give("lr_scheduler.decay_ratio", ratio, "lr_scheduler.decay_ratio")
    factor = reading.value("lr_scheduler.min_lr_factor")
    rate = reading.given.get("optimizer.lr", reading.own.get("optimizer.lr", reading.value("optimizer.lr")))
    if not 0 <= factor <= 1:
        yield f"lr_scheduler.min_lr_factor: found {factor}; allowed: 0 to 1, a share of optimizer.lr. Write 0.1"
    elif factor and isinstance(rate, (int, float)):
        reading.give("lr_scheduler.min_lr", factor * rate, "lr_scheduler.min_lr_factor")


def _optimizer(reading: Reading) -> Iterator[str]:
    for name in ("beta1", "beta2", "eps"):  # not every optimizer has them, so a default is not handed on
        key = f"optimizer.{name}"
        if reading.is_given(key):
            reading.give(key, reading.value(key), key)
    yield from ()


def _seed(reading: Reading) -> Iterator[str]:
    given = [key for key in ("training.seed", "debug.seed") if reading.value(key) is not None]
    if len(given) > 1:
        yield "seed: given twice, as training.seed and as debug.seed. Keep one."
    for key in given[:1]:
        reading.give("seed", reading.value(key), key)


def _numbers(reading: Reading) -> Iterator[str]:
    key = "training.mixed_precision_param"
    wanted = reading.value(key)
    if wanted in ("bfloat16", "float32"):
        reading.give("model.dtype", wanted, key)
    elif wanted is not None:
        yield f"{key}: found {shown(wanted)}; allowed: bfloat16, float32. Write {key}: bfloat16"
    converters = reading.value("model.converters")
    if converters == ["float8"]:
        reading.give("training.fp8", True, "model.converters")
    elif converters:
        yield f"model.converters: found {shown(converters)}; allowed: [], [float8]. Write model.converters: []"


def _activations(reading: Reading) -> Iterator[str]:
    key = "activation_checkpoint.mode"
    mode = reading.value(key)
    if mode in CHECKPOINTING:
        reading.give("training.activation_checkpointing", mode, key)
    else:
        near = nearest(str(mode), CHECKPOINTING) or "selective"
        yield f"{key}: found {shown(mode)}; allowed: {', '.join(CHECKPOINTING)}. Write {key}: {near}"
    budget = "activation_checkpoint.memory_budget"
    if mode == "memory_budget" or reading.is_given(budget):
        reading.give("training.activation_memory_budget", reading.value(budget), budget)


def _reports(reading: Reading) -> Iterator[str]:
    reading.give("monitoring.console", "titan", "metric_logging.console.logging_mode")
    mode = "metric_logging.wandb.logging_mode"
    if reading.value(mode) not in (None, "global_reduce"):
        yield f"{mode}: found {shown(reading.value(mode))}; allowed: global_reduce. Write {mode}: global_reduce"
    project = "metric_logging.wandb.project"
    if reading.value(mode) is not None or reading.value(project) is not None or reading.value("metrics.enable_wandb"):
        reading.give("monitoring.wandb", True, mode)
    if reading.value(project) is not None:
        reading.give("monitoring.wandb_project", reading.value(project), project)
    folder = "metrics.save_tb_folder"
    if reading.value("metrics.enable_tensorboard"):
        place = reading.value(folder) if reading.is_given(folder) else True
        reading.give("monitoring.tensorboard", place, "metrics.enable_tensorboard")
    elif reading.is_given(folder):
        yield f"{folder}: would change nothing. Write metrics.enable_tensorboard: true, or leave it out."


PARTS: tuple[Callable[[Reading], Iterator[str]], ...] = (
    weights,
    processes,
    launcher,
    rows,
    validation,
    _batch,
    _schedule,
    _optimizer,
    _seed,
    _numbers,
    _activations,
    saving,
    _reports,
)
"""Each gives settings and yields what is wrong."""
