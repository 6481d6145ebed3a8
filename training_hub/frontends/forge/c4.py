"""The data sets that torchforge knows by name: C4 on the hub, and a small stand-in for it that needs no network.

C4 is "Colossal Clean Crawled Corpus" (Raffel et al. 2020, arXiv:1910.10683), allenai/c4 on the hub. torchtitan's
c4_test is a file of 2,000 of its rows; ours has as many rows of made-up sentences.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from training_hub.folders import write_text

ROWS = 2000
SEED = 0
FILE = f"c4_test-{ROWS}.jsonl"


@dataclass(frozen=True)
class Named:
    """A data set by name. hub: where it lies, "" for the stand-in. split: the part of it."""

    hub: str
    split: str = "train"


NAMED: Mapping[str, Named] = MappingProxyType(
    {
        "c4": Named("allenai/c4:en"),
        "c4_validation": Named("allenai/c4:en", "validation"),
        "c4_test": Named(""),
    }
)

_WHO = "the gardener|a clerk|our neighbour|the captain|my aunt|a student|the baker|one visitor|the engineer".split("|")
_DID = "found|repaired|described|painted|carried|measured|forgot|borrowed|counted|sold".split("|")
_WHAT = (
    "the old map|a wooden bridge|two letters|the broken clock|a basket of pears|the northern road|a small boat".split(
        "|"
    )
)
_WHEN = (
    "before noon|after the storm|in late autumn|on a quiet street|for the third time|without a word|by lamplight".split(
        "|"
    )
)
_LINKS = "Later|Meanwhile|Even so|As it turned out|According to the report|For this reason|A year after that".split("|")


def stand_in(folder: Path) -> Path:
    """The file of the stand-in in `folder`, written there the first time: the same bytes everywhere."""
    path = folder / FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": text, "url": f"https://example.org/{n}"}) + "\n" for n, text in enumerate(texts()))
        mine = path.with_name(f"{os.getpid()}-{FILE}")  # of several processes each may be the first
        write_text(mine, "".join(lines))
        mine.replace(path)
    return path


def texts() -> Iterator[str]:
    """The documents of the stand-in: 3 to 12 sentences each."""
    draw = random.Random(SEED)
    for _ in range(ROWS):
        yield " ".join(_sentence(draw) for _ in range(draw.randint(3, 12)))


def _sentence(draw: random.Random) -> str:
    said = f"{draw.choice(_WHO)} {draw.choice(_DID)} {draw.choice(_WHAT)} {draw.choice(_WHEN)}"
    if draw.random() < 0.4:
        return f"{draw.choice(_LINKS)}, {said}."
    return f"{said[0].upper()}{said[1:]}."
