"""`python -m training_hub` is the command `training-hub`."""

from __future__ import annotations

import sys

from training_hub.frontends.cli import main

if __name__ == "__main__":
    sys.exit(main())
