"""The id under which a tracker knows a run, kept in the run folder so that a resumed run goes on in the same place."""

from __future__ import annotations

from pathlib import Path


def known_id(run_folder: Path, tracker: str) -> str | None:
    """The id that `tracker` gave this run before; None for a new one."""
    file = _file(run_folder, tracker)
    return file.read_text(encoding="utf-8").strip() or None if file.exists() else None


def remember_id(run_folder: Path, tracker: str, identity: str) -> None:
    """Keep `identity` for the processes that go on with this run."""
    _file(run_folder, tracker).write_text(identity + "\n", encoding="utf-8")


def _file(run_folder: Path, tracker: str) -> Path:
    return run_folder / f"{tracker}_run_id"
