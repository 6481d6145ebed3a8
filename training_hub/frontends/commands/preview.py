"""`training-hub preview`: rows as they will be trained, in the terminal, as a page, or as JSON lines."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_hub.errors import DataError, RecipeError
from training_hub.recipe import Recipe

if TYPE_CHECKING:
    from training_hub.data.preview import Preview, ShownRow


def add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("preview")
    group.add_argument("--rows", type=int, default=3, metavar="N", help="show the first N rows (default: 3)")
    group.add_argument(
        "--row", type=int, action="append", default=[], metavar="LINE", help="show the row at LINE; may be repeated"
    )
    group.add_argument("--html", metavar="FILE", help="write a page that needs nothing but a browser")
    group.add_argument("--json", action="store_true", help="print one JSON object for each sample, then the counts")


def run(recipe: Recipe, options: Namespace) -> int:
    """Show the rows that the options name, and what happens to all rows. Nothing of a model is loaded."""
    if options.rows < 0 or any(line < 1 for line in options.row):
        raise RecipeError("--rows takes a whole number of at least 0, --row one of at least 1.")
    found = _found(recipe, options)
    if options.html:
        _write_page(Path(options.html), found)
    if options.json:
        for entry in json_rows(found):
            print(json.dumps(entry))
    elif not options.html:
        from training_hub.frontends.commands.preview_text import print_preview

        print_preview(found, sys.stdout)
    return 0


def json_rows(found: Preview) -> Iterator[dict[str, Any]]:
    """One object for each sample, one for a row without samples, and the counts at the end."""
    for row in found.rows:
        yield from _samples_of(row)
    yield {"counts": found.counts}


def _samples_of(row: ShownRow) -> Iterator[dict[str, Any]]:
    about = {"problems": list(row.problems), "notes": list(row.notes)}
    if not row.samples:
        yield {"row": str(row.origin), "text": "", "ids": [], "tokens": [], "weights": [], **about, "raw": row.raw}
    for number, sample in enumerate(row.samples, start=1):
        yield {
            "row": str(row.origin),
            "sample": number,
            "samples": len(row.samples),
            "text": sample.text,
            "ids": list(sample.ids),
            "tokens": list(sample.tokens),
            "weights": list(sample.weights),
            **about,
        }


def _found(recipe: Recipe, options: Namespace) -> Preview:
    from training_hub.data.preview import preview
    from training_hub.data.templates import resolve_template
    from training_hub.data.tokenizer import ChatTokenizer
    from training_hub.monitoring.console import open_console

    model = recipe.model
    tokenizer = ChatTokenizer.load(
        model.tokenizer or model.path, trust_remote_code=model.trust_remote_code, revision=model.revision
    )
    return preview(
        recipe,
        tokenizer=tokenizer,
        template=resolve_template(recipe.data.chat_template, tokenizer),
        console=open_console(recipe.monitoring.console, sys.stderr),
        num_rows=options.rows,
        lines=options.row,
    )


def _write_page(path: Path, found: Preview) -> None:
    from training_hub.folders import write_text
    from training_hub.frontends.commands.preview_page import preview_page

    try:
        write_text(path, preview_page(found))
    except OSError as error:
        raise DataError(
            f"--html: {path} cannot be written: {error}. Name a file in a folder you may write to."
        ) from error
    print(f"preview: written to {path}", file=sys.stderr)
