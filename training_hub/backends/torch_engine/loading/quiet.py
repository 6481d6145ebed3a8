"""What libraries say on their own: bars shown on a terminal only, and nothing about kernels that a machine lacks."""

from __future__ import annotations

import logging as python_logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

LOUD = ("torchao", "bitsandbytes", "peft", "torch.utils._pytree")
"""Loggers that warn at import of kernels that a CPU does not have."""


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


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block LOUD loggers tell errors only, and no warning is shown."""
    loggers = [python_logging.getLogger(name) for name in LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(python_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
