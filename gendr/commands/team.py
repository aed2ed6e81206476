"""Several processes that share the work, as a launcher starts them; usually just one.

`torchrun` and `accelerate launch` say in the environment how many there are and which this one is.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

# The usual ten minutes are too few where one process has the larger pictures.
PATIENCE = datetime.timedelta(days=7)


class TeamError(ValueError):
    """The processes cannot be brought together; the message says what is missing."""


@dataclass
class Team:
    """This process among `count`; `device` is its own."""

    device: str
    index: int = 0
    count: int = 1

    def share(self, items: list) -> list:
        """This process's part of `items`: in order, lengths differ by one at the most."""
        first, last = (len(items) * n // self.count for n in (self.index, self.index + 1))
        return items[first:last]

    def gather(self, items: list) -> list:
        """The items of all processes, in all processes; waits for the slowest."""
        if self.count == 1:
            return items
        parts: list[list] = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


def join(device: str) -> Team:
    """The team that the launcher's environment describes; "auto" becomes this process's own device."""
    try:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count <= 1:
            return Team(device)
        index = int(os.environ["RANK"])
        local = int(os.environ.get("LOCAL_RANK", index))
        # Only lists of words are exchanged, which any device can leave to the CPU.
        dist.init_process_group("gloo", timeout=PATIENCE, rank=index, world_size=count)
    except (KeyError, ValueError, RuntimeError, ImportError) as error:
        raise TeamError(
            f"several processes were announced (WORLD_SIZE is {os.environ.get('WORLD_SIZE')!r}) "
            f"and cannot be brought together ({error}): start them with `torchrun` or `accelerate "
            "launch`, or unset WORLD_SIZE for one process"
        ) from error
    own = device
    if device == "auto" and torch.cuda.is_available():
        own = f"cuda:{local % torch.cuda.device_count()}"
    return Team(own, index, count)
