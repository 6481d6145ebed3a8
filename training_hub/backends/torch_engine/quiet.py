"""transformers' own progress bars: shown on a terminal, silent in a log, where each redraw would be a line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def library_bars() -> Iterator[None]:
    """Within the block transformers draws its bars only if stderr is a terminal; afterwards it is as before."""
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
