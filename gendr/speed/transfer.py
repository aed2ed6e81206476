"""Tiles to the device and results back, beside the computing.

Where a device works on its own, tiles pass through page-locked memory and a stream of their own:
while one tile is computed, the one before is blended and the next one is on its way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..devices import exact


class Transfer:
    """Carries tiles for one run.

    ahead: tiles that may be under way when one is asked for; 0 = all copies are waited for.
    staged: copy through memory of our own even where nothing is gained, for tests.
    """

    def __init__(self, device: torch.device, *, ahead: int = 0, staged: bool = False):
        self.device, self.slots = exact(device), ahead + 1
        self.cuda = device.type == "cuda" and ahead > 0
        self.staged = self.cuda or staged
        self.side = torch.cuda.Stream(device) if self.cuda else None
        self.rooms: dict[str, list[Tensor | None]] = {}
        self.turns: dict[str, int] = {}
        self.events: dict[tuple[str, int], Any] = {}

    def bring(self, x: Tensor) -> Tensor:
        """x on the device. x may be changed by the caller at once."""
        if x.device == self.device and not (self.staged and x.device.type == "cpu"):
            return x
        if not self.staged:
            return x.to(self.device)
        room, slot = self.room("in", x)
        room.copy_(x)
        with self.beside():
            # On a CPU `.to` would give the room itself, which the next tile but one overwrites.
            here = room.to(self.device, non_blocking=True, copy=True)
        self.mark("in", slot)
        if self.side is not None:
            main = torch.cuda.current_stream(self.device)
            main.wait_stream(self.side)
            here.record_stream(main)
        return here

    def take(self, y: Tensor, fine: Tensor, to: torch.device) -> Callable[[], tuple[Tensor, bool]]:
        """What waits for y on device `to` and for the truth of `fine`, and gives both.

        y is good until `ahead` + 1 further tiles were taken. Copies are on their way already.
        """
        if not self.staged:
            return lambda: (y.to(to), bool(fine))
        back = to.type == "cpu"
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        truth, slot = self.room("fine", fine)
        result = y
        with self.beside():
            truth.copy_(fine, non_blocking=True)
            if back:
                result, _ = self.room("out", y, slot)
                result.copy_(y, non_blocking=True)
        if self.side is not None:
            for tensor in (fine, y) if back else (fine,):
                tensor.record_stream(self.side)
        self.mark("fine", slot)

        def wait() -> tuple[Tensor, bool]:
            self.wait("fine", slot)
            return result, bool(truth)

        return wait

    def room(self, kind: str, like: Tensor, slot: int | None = None) -> tuple[Tensor, int]:
        """Host memory for a tensor like this one, that nothing is being copied into or out of."""
        rooms = self.rooms.setdefault(kind, [None] * self.slots)
        if slot is None:
            slot = self.turns.get(kind, 0)
            self.turns[kind] = (slot + 1) % self.slots
            self.wait(kind, slot)
        room = rooms[slot]
        if room is None or room.shape != like.shape or room.dtype != like.dtype:
            room = rooms[slot] = torch.empty(
                like.shape, dtype=like.dtype, device="cpu", pin_memory=self.cuda
            )
        return room, slot

    def beside(self) -> contextlib.AbstractContextManager:
        """On the stream of the copies, where there is one."""
        return torch.cuda.stream(self.side) if self.side is not None else contextlib.nullcontext()

    def mark(self, kind: str, slot: int) -> None:
        if self.side is not None:
            event = torch.cuda.Event()
            event.record(self.side)
            self.events[kind, slot] = event

    def wait(self, kind: str, slot: int) -> None:
        """Until the copy that was last marked with this slot is done."""
        event = self.events.pop((kind, slot), None)
        if event is not None:
            event.synchronize()
