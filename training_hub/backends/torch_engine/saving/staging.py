"""Copies of a state in the host's memory, from which a checkpoint is written while training changes the state."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Staging:
    """Copies of tensors in the host's memory.

    keeps: in buffers that stay for the next copies, so that memory is asked for once; beside a GPU they are
    page-locked, and copying goes on while the host has turned to the next step. Else copies go with their last user.
    """

    def __init__(self, device: torch.device, *, keeps: bool):
        self.keeps = keeps
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._sources: list[Tensor] = []  # held until they are copied, so that their memory is not given to others
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: Any = None

    @torch.no_grad()
    def copy(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of each, in its own format; those of this part the time before are overwritten where buffers are kept.

        Beside a GPU, read none before `wait`, and change no tensor before `hold_device`.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with self._beside():
            copies = {
                name: self._room((part, name), tensor).copy_(tensor, non_blocking=True)
                for name, tensor in tensors.items()
            }
        if self._stream is not None:
            self._sources += tensors.values()
            self._copied = self._stream.record_event()
            if not self.keeps:
                self.wait()
        return copies

    def hold_device(self) -> None:
        """Let the device change no tensor before it is copied; the host does not wait."""
        if self._stream is not None and self._copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def wait(self) -> None:
        """Wait until what was asked for is copied."""
        if self._copied is not None:
            self._copied.synchronize()
        self._sources.clear()

    def _beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def _room(self, name: tuple[str, str], like: Tensor) -> Tensor:
        kept = self._buffers.get(name)
        if kept is not None and kept.shape == like.shape and kept.dtype == like.dtype:
            return kept
        is_locked = self.keeps and self._stream is not None
        room = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=is_locked)
        if self.keeps:
            self._buffers[name] = room
        return room


def staging_of(mode: str, device: torch.device) -> Staging | None:
    """What checkpoint.async_mode asks for; None where checkpoints are written from the state itself."""
    return None if mode == "disabled" else Staging(device, keeps=mode == "async_with_pinned_mem")
