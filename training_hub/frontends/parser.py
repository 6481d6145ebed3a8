"""The parser of every command line here."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from training_hub.errors import RecipeError


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are RecipeErrors, so that all errors look alike."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        # argparse takes -1e-5 for a flag
        hint = (
            ". A value that begins with - is written FLAG=VALUE." if message.endswith("expected one argument") else ""
        )
        raise RecipeError(message + hint)
