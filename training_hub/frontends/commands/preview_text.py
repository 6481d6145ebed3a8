"""A preview as text: coloured in a terminal, with brackets around what is trained everywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any, TextIO

from training_hub.monitoring.words import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from training_hub.data.preview import Preview, ShownRow, ShownSample

# A mark in place of white space that is not seen, or is taken for other white space.
WHITE_SPACE = {" ": "·", "\n": "↵\n", "\t": "⇥", "\r": "␍", "\N{NO-BREAK SPACE}": "⍽", "\N{IDEOGRAPHIC SPACE}": "□"}
# Two shades in turn, so that neighbours are told apart.
TRAINED = ("black on color(114)", "black on color(78)")
WEIGHTED = ("black on color(221)", "black on color(215)")
UNTRAINED = ("default", "color(245)")
LEGEND = (("trained", TRAINED[0]), ("weight other than 1", WEIGHTED[0]), ("not trained", UNTRAINED[1]))

COUNTED = (
    ("rows", "rows read"),
    ("samples", "samples to train on"),
    ("tokens", "tokens"),
    ("trained_tokens", "tokens trained"),
    ("untrained_tokens", "tokens not trained"),
    ("problems", "problems"),
    ("bad_rows", "rows left out, as they cannot be read or trained on"),
    ("bad_rows", "rows left out for problems"),
    ("dropped", "left out as longer than training.max_seq_len"),
    ("truncated", "cut at training.max_seq_len"),
    ("tokens_lost", "tokens lost by that"),
    ("trained_tokens_lost", "of these would have been trained"),
    ("split", "split at training.max_seq_len"),
    ("duplicates", "exact duplicates of earlier rows"),
    ("unrolled", "rows unrolled into several samples"),
    ("blank_lines", "blank lines passed over"),
    ("validation_rows_also_trained", "validation samples that are also trained on"),
)


def visible(token: str, number: int) -> str:
    """The token with white space made visible and control characters escaped; a token without text as its id."""
    return "".join(WHITE_SPACE.get(character) or printable(character) for character in token) or f"⟨{number}⟩"


def number_of(weight: float) -> str:
    """A weight as short as it can be told."""
    return f"{weight:.4g}"


def counted(counts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, how many) for a table: each count that there is, then notes and facts."""
    for key, what in COUNTED:
        if key in counts:
            yield what, f"{counts[key]:,}"
    if "validation" in counts:
        yield "validation samples", f"{counts['validation']['samples']:,}"
    for note, rows in counts.get("notes", {}).items():
        yield note, f"{rows:,} rows"
    for fact in counts.get("facts", ()):
        yield fact, ""


def title(row: ShownRow, number: int = 0) -> str:
    """Where the row stands, and the size of its sample `number`."""
    if not row.samples:
        return str(row.origin)
    sample = row.samples[number]
    which = f", sample {number + 1} of {len(row.samples)}" if len(row.samples) > 1 else ""
    trained = sum(1 for weight in sample.weights if weight)
    return f"{row.origin}{which}: {len(sample.ids):,} tokens, {trained:,} trained"


def print_preview(found: Preview, stream: TextIO) -> None:
    """Print rows and counts to `stream`."""
    from rich.console import Console
    from rich.text import Text

    from training_hub.monitoring.console import LastingStream

    lasting: Any = LastingStream(stream)
    console = Console(file=lasting, highlight=False)
    is_coloured = console.color_system is not None and not console.no_color
    console.print(_legend(is_coloured), soft_wrap=True)
    for row in found.rows:
        _print_row(row, console, is_coloured)
    console.print()
    table = list(counted(found.counts))
    width = max((len(value) for _, value in table), default=0)
    for what, value in table:
        console.print(Text(f"{value:>{width}}  {printable(what)}"), soft_wrap=True)
    for line in found.counts.get("problem_lines", ()):
        console.print(Text(f"problem: {printable(line)}", style="red"), soft_wrap=True)


def _print_row(row: ShownRow, console: Console, is_coloured: bool) -> None:
    from rich.text import Text

    for number in range(max(1, len(row.samples))):
        console.print()
        console.print(Text(printable(title(row, number)), style="bold"), soft_wrap=True)
        if row.samples:
            sample = row.samples[number]
            console.print(_coloured(sample) if is_coloured else Text(bracketed(sample)), soft_wrap=not is_coloured)
    for problem in row.problems:
        console.print(Text(f"problem: {printable(problem)}", style="red"), soft_wrap=True)
    for note in row.notes:
        console.print(Text(f"note: {printable(note)}", style="yellow"), soft_wrap=True)
    if row.raw:
        console.print(Text(f"the row: {printable(row.raw)}", style="dim"), soft_wrap=True)


def _legend(is_coloured: bool) -> Text:
    from rich.text import Text

    if not is_coloured:
        return Text("⟦trained⟧ ⟦0.5:trained with weight 0.5⟧ «special token» │ between tokens, · space, ↵ line break")
    legend = Text()
    for what, style in LEGEND:
        legend.append(f" {what} ", style)
        legend.append(" ")
    return legend.append(" special token ", "bold magenta").append("  · space, ↵ line break")


def _coloured(sample: ShownSample) -> Text:
    from rich.text import Text

    text = Text(overflow="fold")
    tokens = zip(sample.ids, sample.tokens, sample.weights, sample.is_special, strict=True)
    for number, (one, token, weight, is_special) in enumerate(tokens):
        shades = UNTRAINED if weight == 0 else TRAINED if weight == 1 else WEIGHTED
        special = "" if not is_special else "bold magenta" if weight == 0 else "bold underline"
        text.append(visible(token, one), f"{'' if special == 'bold magenta' else shades[number % 2]} {special}".strip())
        is_last = number + 1 == len(sample.ids) or sample.weights[number + 1] != weight
        if is_last and weight not in (0, 1):
            text.append(f"×{number_of(weight)}", "bold")
    return text


def bracketed(sample: ShownSample) -> str:
    """The sample without colour: ⟦trained⟧, ⟦0.5:weighted⟧, «special», and │ between tokens."""
    parts = []
    tokens = zip(sample.weights, sample.ids, sample.tokens, sample.is_special, strict=True)
    for weight, run in groupby(tokens, key=lambda entry: entry[0]):
        shown = [f"«{visible(token, one)}»" if special else visible(token, one) for _, one, token, special in run]
        opening = "" if weight == 0 else "⟦" if weight == 1 else f"⟦{number_of(weight)}:"
        parts.append(f"{opening}{'│'.join(shown)}{'⟧' if weight else ''}")
    return "".join(parts)
