"""Several processes that share the work, as `accelerate launch` starts them; usually just one."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field
from typing import Any


class TeamError(ValueError):
    """The processes cannot be brought together; the message says what is missing."""


@dataclass
class Team:
    """This process among `count`; `device` is its own."""

    device: str
    index: int = 0
    count: int = 1
    state: Any = field(default=None, repr=False)

    def share(self, items: list) -> list:
        """This process's part of `items`."""
        if self.state is None:
            return items
        with self.state.split_between_processes(items) as part:
            return part

    def gather(self, items: list) -> list:
        """The items of all processes, in all processes; waits for the slowest."""
        if self.state is None:
            return items
        from accelerate.utils import gather_object  # noqa: TID251  only under accelerate's launcher

        return gather_object(items)

    def leave(self) -> None:
        if self.state is not None:
            self.state.destroy_process_group()


def join(device: str) -> Team:
    """The team that the launcher's environment describes; "auto" becomes this process's own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Team(device)
    try:
        from accelerate import PartialState  # noqa: TID251  only under accelerate's launcher
    except ImportError:
        raise TeamError(
            "several processes were started (WORLD_SIZE is set), and sharing the pictures needs "
            "accelerate: `pip install accelerate`, or start one process"
        ) from None
    # The launcher stops everybody when one process ends with an error, so all end together; the
    # usual ten minutes of patience are too few where one process has the larger pictures.
    state = PartialState(cpu=device == "cpu", timeout=datetime.timedelta(days=7))
    own = str(state.device) if device == "auto" else device
    return Team(own, state.process_index, state.num_processes, state)
