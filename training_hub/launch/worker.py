"""One process of a run that has several: `python -m training_hub.launch.worker recipe.yaml`; and what it has in common
with those that do other work together.

Started by the supervisor, which says in the environment which one it is. What it prints is its log.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from training_hub.algorithms import engine_of
from training_hub.backends import Given, find_backend
from training_hub.errors import HubError, Interrupted, LaunchError
from training_hub.launch import as_json
from training_hub.launch.endings import leave_error, leave_result
from training_hub.launch.stopping import Stop, interruption, stoppable
from training_hub.launch.supervisor import PARENT
from training_hub.recipe.folder import RunFolder
from training_hub.recipe.load import load_file

PR_SET_PDEATHSIG = 1  # sys/prctl.h


def main(path: str) -> int:
    """Run the recipe as the process that the environment says; leave the result or the error in the run folder."""
    begin()
    recipe = load_file(Path(path))
    folder = RunFolder(Path(recipe.output))

    def train() -> dict[str, Any]:
        return as_json(find_backend(engine_of(recipe)).train(recipe, Given()))

    return serve(folder.path, train, lambda number: interruption(number, folder.newest_checkpoint()))


def begin() -> None:
    """Let this process end with its parent, and write down where it hangs when it is asked to."""
    die_with(int(os.environ[PARENT]))
    if hasattr(faulthandler, "register"):  # not on Windows
        faulthandler.register(signal.SIGUSR1, all_threads=True)


def serve(folder: Path, work: Callable[[], dict[str, Any]], interrupted: Callable[[int], Interrupted]) -> int:
    """Leave in `folder` what the work gives, or the error that ends it; the code to end with. interrupted: the error of
    a signal."""
    rank, stop = int(os.environ["RANK"]), Stop()
    try:
        try:
            with stoppable(stop):
                result = work()
                stop.is_over = True
        except KeyboardInterrupt as error:
            raise interrupted(stop.number) from error
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, LaunchError):
            faulthandler.dump_traceback(all_threads=True)
        leave_error(folder, rank, error)
        return error.exit_code if isinstance(error, HubError) else 1
    leave_result(folder, rank, result)
    return 0


def die_with(parent: int) -> None:
    """End this process when `parent` does, however that ends, so that no training goes on unwatched."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    elif os.name == "posix":
        threading.Thread(target=_outlive, args=(parent,), daemon=True).start()
    if os.name == "posix" and os.getppid() != parent:  # it was gone before it could be watched
        os._exit(1)


def _outlive(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def end(code: int) -> NoReturn:
    """End this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # the library of the other processes would wait here for those that are gone
    sys.exit(code)


if __name__ == "__main__":
    end(main(sys.argv[1]))
