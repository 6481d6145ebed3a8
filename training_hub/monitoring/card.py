"""The model card of a final model: README.md with metadata that the hub reads, and loss.svg beside it.

Made from what the run measured and decided. Paths of this machine are shortened to their last part; secrets are masked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training_hub.monitoring.base_model import BaseModel
from training_hub.monitoring.charts import Curve, line_chart
from training_hub.monitoring.settings import redacted
from training_hub.monitoring.words import duration, printable
from training_hub.recipe import Recipe
from training_hub.recipe.findings import value_at
from training_hub.recipe.names import REQUIRED, all_settings
from training_hub.recipe.yaml_text import write_yaml
from training_hub.version import VERSION

CARD, CURVE = "README.md", "loss.svg"
SAMPLES = 3
SHOWN_CHARACTERS = 600
ROWS_OF_CURVE = 10

NOT_SHOWN = ("output", "hub.", "monitoring.", "processes.", "checkpoint.", "data.cache", "data.workers", "model.path")
"""Settings that say where a run took place, not what came out."""

# The page's own colours are not there when a picture stands alone.
STYLE = (
    "<style>svg{background:#fff;font-family:sans-serif}.grid{stroke:#e3e5e8}.axis{stroke:#646b73}"
    ".tick{fill:#646b73;font-size:12px}.curve{fill:none;stroke-width:1.8}.curve.first{stroke:#2f6fde}"
    ".curve.second{stroke:#d9622b}.dot.first{fill:#2f6fde}.dot.second{fill:#d9622b}</style>"
)


@dataclass(frozen=True)
class CardFacts:
    """All that a card tells. step: which the model is of. data: counts and fingerprint. samples: rows of
    predictions.jsonl. seconds: how long the steps took."""

    recipe: Recipe
    base: BaseModel
    step: int
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any]
    versions: Mapping[str, str]
    parameters: int
    trained_parameters: int
    dtype: str
    samples: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


def card_files(facts: CardFacts) -> dict[str, bytes]:
    """The files of the card by name: README.md, loss.svg, and the base's licence and notices as they are."""
    own = {CARD: model_card(facts).encode("utf-8"), CURVE: loss_curve(facts.history).encode("utf-8")}
    return {**facts.base.files, **own}


def model_card(facts: CardFacts) -> str:
    """The text of README.md."""
    parts = [
        f"---\n{write_yaml(metadata(facts))}---\n",
        f"# {_plain(name_of(facts.recipe))}\n",
        *_about(facts),
        *_results(facts),
        *_curve(facts),
        *_data(facts),
        *_samples(facts),
        *_use(facts.recipe),
        *_settings(facts),
        *_versions(facts),
        *_licence(facts.base),
    ]
    return "\n".join(parts)


def metadata(facts: CardFacts) -> dict[str, Any]:
    """What the hub reads. A licence is stated only where the base's card states one: it is then the base's."""
    base = facts.base
    stated = {"license": base.licence, "license_name": base.licence_name, "license_link": base.licence_link}
    relation = "adapter" if _is_adapter(facts.recipe) else "finetune"
    sources = [name for name in _source_paths(facts.recipe) if _is_hub_name(name)]
    return {
        **{key: value for key, value in stated.items() if value},
        **({"base_model": base.name, "base_model_relation": relation} if base.is_on_hub else {}),
        **({"datasets": sources} if sources else {}),
        "library_name": "peft" if _is_adapter(facts.recipe) else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["training-hub", facts.recipe.algorithm],
    }


def name_of(recipe: Recipe) -> str:
    """What the model is called: as on the hub, else as the folder of the run."""
    return (recipe.hub.repo_id or "").rpartition("/")[2] or Path(recipe.output).resolve().name


def loss_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """The losses of the run as an SVG picture that stands alone."""
    curves = []
    for key, name, style in (("loss", "training", "first"), ("validation_loss", "validation", "second")):
        points = [(float(row["step"]), math.nan if row[key] is None else row[key]) for row in history if key in row]
        if points:
            curves.append(Curve(name, points, style))
    drawn = line_chart(curves, "loss by step")
    if not drawn.startswith("<svg "):  # nothing was measured
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 40">{STYLE}</svg>\n'
    head, _, rest = drawn.removeprefix("<svg ").partition(">")
    return f'<svg xmlns="http://www.w3.org/2000/svg" {head}>{STYLE}{rest}\n'


def _about(facts: CardFacts) -> Iterator[str]:
    base = f"[{facts.base.name}](https://huggingface.co/{facts.base.name})" if facts.base.is_on_hub else facts.base.name
    share = "" if facts.trained_parameters == facts.parameters else f"{facts.trained_parameters:,} of "
    yield (
        f"Fine-tuned from {base} with training_hub {VERSION}: `{facts.recipe.algorithm}`, {facts.step:,} steps, "
        f"{share}{facts.parameters:,} parameters, saved as {facts.dtype}.\n"
    )


def _results(facts: CardFacts) -> Iterator[str]:
    rows = list(results(facts.metrics))
    if rows:
        yield "## Results\n\nOn validation rows that were not trained.\n"
        yield _table(("", "before", "after"), rows)


def results(metrics: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
    """(metric, before training, after) of everything that was measured on validation rows."""
    prefix = "validation_"
    for key, value in metrics.items():
        if key.startswith(prefix) and not key.endswith("_before"):
            before = metrics.get(f"{key}_before")
            if key == "validation_perplexity" and "validation_loss_before" in metrics:
                before = math.exp(min(metrics["validation_loss_before"], 700))
            yield key.removeprefix(prefix), "" if before is None else _number(before), _number(value)
    if "watch_loss" in metrics:
        yield "loss on watched rows", _number(metrics["watch_loss_before"]), _number(metrics["watch_loss"])


def _curve(facts: CardFacts) -> Iterator[str]:
    steps = [row for row in facts.history if row.get("loss") is not None]
    if not steps:
        return
    places = sorted({round(number * (len(steps) - 1) / max(1, ROWS_OF_CURVE - 1)) for number in range(ROWS_OF_CURVE)})
    chosen = sorted({*places, *(place for place, row in enumerate(steps) if row["step"] == facts.step)})
    yield f"## Loss\n\n![loss by step]({CURVE})\n"
    shown_rows = [steps[place] for place in chosen]
    rows = [(f"{row['step']:,}", _number(row["loss"]), _number(row.get("validation_loss"))) for row in shown_rows]
    yield _table(("step", "training", "validation"), rows)


def _data(facts: CardFacts) -> Iterator[str]:
    told = {key: f"{value:,}" if isinstance(value, int) else str(value) for key, value in facts.data.items()}
    counts = [(key.replace("_", " "), value) for key, value in told.items()]
    names = ", ".join(f"`{_plain(shown(name))}`" for name in _source_paths(facts.recipe)) or "rows in memory"
    yield f"## Data\n\n{names}\n"
    yield _table(("", ""), counts)


def _samples(facts: CardFacts) -> Iterator[str]:
    if not facts.samples:
        return
    yield "## Samples\n\nThe first validation rows, greedily answered unless the settings say otherwise.\n"
    for row in facts.samples[:SAMPLES]:
        said = [(side, row[side]["answer"]) for side in ("base", "tuned") if side in row]
        for title, text in (("prompt", row["prompt"]), ("reference", row["reference"]), *said):
            yield f"**{title}**\n\n{_fenced(text)}\n"
        yield "---\n"


def _is_adapter(recipe: Recipe) -> bool:
    return recipe.algorithm == "lora_sft"


def _use(recipe: Recipe) -> Iterator[str]:
    yield "## Use\n"
    if _is_adapter(recipe):
        yield "An adapter: transformers loads its base and puts it in where `peft` is installed.\n"
    rounding = recipe.qat
    if rounding.weight_dtype is not None:
        what = "Its base" if _is_adapter(recipe) else "It"
        inputs = f", inputs as {rounding.activation_dtype}" if rounding.activation_dtype else ""
        yield (
            f"{what} is to be quantised by torchao: weights of linear layers, head aside, as {rounding.weight_dtype} "
            f"in groups of {rounding.group_size}{inputs}. The metrics are those of a model that rounds so.\n"
        )
    yield (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or the name of the repository\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "```\n"
    )


def _settings(facts: CardFacts) -> Iterator[str]:
    yield "## Settings\n\nThose that are not the defaults of training_hub.\n"
    yield f"```yaml\n{write_yaml(settings(facts.recipe))}```\n"


def settings(recipe: Recipe) -> dict[str, Any]:
    """Settings by path that are not defaults and decide what came out; without secrets and without folders."""
    found: dict[str, Any] = {}
    for path, setting in all_settings().items():
        value = value_at(recipe, path)
        if not path.startswith(NOT_SHOWN) and (setting.default is REQUIRED or value != setting.default):
            found[path] = value
    plain = json.loads(json.dumps(found, default=lambda one: one.model_dump()))
    masked: dict[str, Any] = redacted(plain)
    return {path: _without_folders(value) for path, value in masked.items()}


def _versions(facts: CardFacts) -> Iterator[str]:
    yield "## Versions\n"
    yield ", ".join(f"{name} {version}" for name, version in facts.versions.items()) + "\n"
    seconds = sum(row.get("step_seconds") or 0 for row in facts.history)
    yield f"Steps took {duration(seconds)}.\n"


def _licence(base: BaseModel) -> Iterator[str]:
    yield "## Licence\n"
    if base.licence:
        name = f" ({base.licence_name})" if base.licence_name else ""
        yield f"The base model states `{_plain(base.licence)}`{_plain(name)}; this model is derived from it.\n"
    else:
        yield (
            "The base model states no licence in its card or config. Whoever shares this model has to find out what "
            "its base allows.\n"
        )
    if base.files:
        yield f"Of the base, as they came: {', '.join(f'[{name}]({name})' for name in base.files)}.\n"


def shown(path: str) -> str:
    """A path as others may read it: the last part of one that begins at a root or at home."""
    return Path(path).name if Path(path).is_absolute() or path.startswith("~") else path


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return shown(value) if isinstance(value, str) else value


def _source_paths(recipe: Recipe) -> list[str]:
    paths = recipe.data.path
    listed = [] if paths is None else paths if isinstance(paths, list) else [paths]
    return [redacted(one if isinstance(one, str) else one.path) for one in listed]


def _is_hub_name(path: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not Path(path).exists()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_plain(cell) for cell in line)} |\n" for line in lines)


def _plain(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def _fenced(text: str) -> str:
    """The text in a fence that nothing in it closes."""
    masked = redacted(text)
    cut = masked if len(masked) <= SHOWN_CHARACTERS else f"{masked[:SHOWN_CHARACTERS]} … ({len(masked):,} characters)"
    lines = "\n".join(printable(line) for line in cut.split("\n"))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", lines)), default=0))
    return f"{fence}text\n{lines}\n{fence}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
