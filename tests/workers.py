"""The worker processes that a run of this process has started, and what befalls them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.moments import act_in

ROOT = Path(__file__).parents[1]


def workers() -> dict[int, int]:
    """Rank -> process id of the workers that this process has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or somebody else's
            continue
        told = dict(one.decode().split("=", 1) for one in variables if b"=" in one)
        if told.get("TRAINING_HUB_PARENT") == str(os.getpid()):
            found[int(told["RANK"])] = int(folder.name)
    return found


SITE = """
import os
from pathlib import Path

if os.environ.get("RANK") == "0":
    from tests.moments import hold, when_named

    when_named(Path({checkpoint!r}), lambda: hold(Path({moment!r})))
"""


@contextmanager
def acting_at(checkpoint: Path, act: Callable[[], object]) -> Iterator[None]:
    """Within, processes that are started for a run hold before `checkpoint` gets its name, once, until `act` is done.

    Python imports sitecustomize, where it finds one, before anything else.
    """
    output = checkpoint.parents[1]
    site = output.parent / f"{output.name}-site"
    site.mkdir(parents=True)
    moment = site / "moment"
    (site / "sitecustomize.py").write_text(SITE.format(checkpoint=str(checkpoint), moment=str(moment)))
    path = os.pathsep.join([str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    actor = threading.Thread(target=act_in, args=(moment, act), daemon=True)
    actor.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        yield
    actor.join()
