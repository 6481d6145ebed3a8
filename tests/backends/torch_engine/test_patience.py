"""Calls of the store come back, also when the one that keeps it was stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.moments import PATIENCE_SECONDS
from training_hub.backends.torch_engine.patience import PatientStore

KEEPER = """
import sys
from datetime import timedelta
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=300), wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="a process is stopped as on Unix")
def test_a_keeper_that_is_stopped_is_given_up():
    words = [sys.executable, "-c", KEEPER]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as keeper:
        try:
            assert keeper.stdout is not None
            asked = dist.TCPStore("127.0.0.1", int(keeper.stdout.readline()), None, False, timedelta(seconds=300))
            store = PatientStore(asked, seconds=PATIENCE_SECONDS)
            store.set("word", "here")
            assert store.get("word") == b"here" and store.check(["word"]) and not store.check(["other"])
            with pytest.raises(RuntimeError, match="timeout"):
                store.wait(["other"], timedelta(seconds=0.2))
            store = PatientStore(asked, seconds=1)
            keeper.send_signal(signal.SIGSTOP)
            os.waitpid(keeper.pid, os.WUNTRACED)  # it may go on for a moment, and answer
            began = time.monotonic()
            with pytest.raises(RuntimeError, match="rank 0, which keeps what the others say, did not answer for 1 s"):
                store.get("word")
            with pytest.raises(RuntimeError, match="has stopped answering"):
                store.set("word", "again")
            assert 1 <= time.monotonic() - began < 100, "and not for as long as the store itself would wait"
        finally:
            keeper.kill()  # to leave the block is to wait for it, also where it was stopped
