"""PEFT, imported where it is used, without what it and the packages that it looks for say when they are loaded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

MISSING = "peft is not installed, and adapters are trained by it: pip install 'training-hub[peft]'"

LOUD = ("torchao", "bitsandbytes", "peft", "torch.utils._pytree")
"""Loggers that warn at import of kernels that a CPU does not have."""


def is_installed() -> bool:
    return find_spec("peft") is not None


def load() -> Any:
    """The module peft."""
    with quiet():
        import peft

        return peft


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block LOUD loggers tell errors only, and no warning is shown."""
    loggers = [logging.getLogger(name) for name in LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
