"""`python -m training_hub.apps.sft.main --config FILE.yaml [section.key=VALUE ...]`."""

from __future__ import annotations

import sys

from training_hub.frontends.cli import FORGE, main

if __name__ == "__main__":
    sys.exit(main([FORGE, *sys.argv[1:]]))
