"""The table at the end of the demo."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_hub.demo.scoring import Answered, Score
from training_hub.types import TrainResult

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = 4


@dataclass(frozen=True)
class Shown:
    """What the table is made from; `seconds` is the whole demo, `data` the file that was trained on."""

    before: Score
    after: Score
    result: TrainResult
    base: Path
    data: Path
    seconds: float


def show(shown: Shown) -> None:
    """Print scores by task, the facts of the run, and what to do next."""
    from rich.console import Console

    console = Console(highlight=False)
    for title, table in (
        ("Right answers on held-out questions", scores(shown.before, shown.after)),
        ("What it says now", examples(shown.after)),
        ("The run", facts(shown)),
    ):
        console.print(f"\n[bold]{title}[/bold]")  # not the table's own title, which is cut to the table's width
        console.print(table)
    for line in next_steps(shown):
        # Printed plain, so that a narrow terminal does not break a command that is to be copied.
        console.print(line, soft_wrap=True, markup=False)


def scores(before: Score, after: Score) -> Table:
    """Share of held-out questions answered exactly, by task and over all."""
    table = _table("task", "before", "after")
    earlier, later = before.by_task(), after.by_task()
    for task in later:
        table.add_row(task, f"{earlier[task]:.0%}", f"{later[task]:.0%}")
    table.add_section()
    table.add_row(f"all {len(after.answers)}", f"{before.share_right:.1%}", f"{after.share_right:.1%}", style="bold")
    return table


def examples(after: Score) -> Table:
    """A few questions with the answers of the trained model, one of each of the first tasks."""
    first: dict[str, Answered] = {}
    for answer in after.answers:
        first.setdefault(answer.question.task, answer)
    table = _table("question", "answer", "")
    for answer in list(first.values())[:EXAMPLES]:
        table.add_row(answer.question.prompt, answer.said, "right" if answer.is_right else "wrong")
    return table


def facts(shown: Shown) -> Table:
    """Losses, speed, seconds and the place of the model."""
    table = _table("", "")
    history, metrics = shown.result.history, shown.result.metrics
    table.add_row("loss, first and last step", f"{history[0]['loss']:.4f}  ->  {history[-1]['loss']:.4f}")
    validation = f"{metrics['validation_loss_before']:.4f}  ->  {metrics['validation_loss']:.4f}"
    table.add_row("validation loss, before and after", validation)
    table.add_row("tokens per second", f"{statistics.median(_column(history, 'tokens_per_second')):,.0f}")
    table.add_row("optimizer steps", f"{history[-1]['step']:,}")
    table.add_row("seconds, training and all", f"{shown.result.seconds:.0f} of {shown.seconds:.0f}")
    table.add_row("model", str(shown.result.model_path))
    return table


def next_steps(shown: Shown) -> list[str]:
    """Lines to copy: load the model, and fine-tune another."""
    program = Path(sys.executable).parent / "training-hub"
    command = _short(program) if program.is_file() else f"{_short(Path(sys.executable))} -m training_hub"
    return [
        "",
        "Load it with transformers:",
        f'    transformers.AutoModelForCausalLM.from_pretrained("{shown.result.model_path}")',
        "The same kind of run on your own model and file:",
        f"    {command} sft --model path/to/model --data chat.jsonl --output out",
        f"What a file looks like: {shown.data}",
    ]


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _column(history: tuple[dict[str, Any], ...], name: str) -> list[float]:
    return [line[name] for line in history]


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(show_header=any(columns))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 or len(columns) == 2 else "right")
    return table
