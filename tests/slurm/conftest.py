"""A two-node Slurm for the tests of this folder; they are skipped, in words, where it is not installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if absent := missing():
        pytest.skip(f"Slurm is not installed ({', '.join(absent)}): apt-get install slurm-wlm munge")
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("the two nodes need names of their own, which takes root: slurmd gets its own /etc/hosts")
    one = Cluster(tmp_path_factory.mktemp("slurm"))
    before = {name: os.environ.get(name) for name in one.environment}
    os.environ |= one.environment
    try:
        one.start()
        yield one
    finally:
        one.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, of a name that every word of a script must be quoted for."""
    folder = tmp_path / 'it\'s $HOME "here"'
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
