"""One process or several, started by `accelerate launch`: who is who, and gradients in common.

Networks are not wrapped: a script trains three of them in one iteration, on one shared base, and
sums its own micro-batches. Each process takes its gradients, then `average` makes them those of the
whole batch, so that several processes take the very step that one would.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast,
    broadcast_object_list,
)
from torch import Tensor, nn

T = TypeVar("T")
# Gradients travel together in pieces of this many numbers; one by one they'd wait for each other.
BUCKET = 32 * 2**20


def told(name: str) -> bool:
    """Whether `accelerate launch` has said yes to something, in the environment."""
    return os.environ.get(name, "").lower() == "true"


class TrainingError(RuntimeError):
    """A run that can't go on; the message says why and what to change."""


class Processes:
    """This process among `count`."""

    def __init__(self, device: str = "auto"):
        """device: "auto" = the process's own card, or the CPU."""
        cpu = device == "cpu" or told("ACCELERATE_USE_CPU")
        if cpu and told("ACCELERATE_USE_DEEPSPEED"):
            # It would train without it, and say nothing.
            raise ValueError(
                "accelerate gives DeepSpeed to cards alone, and this run is one of the CPU: launch with "
                "train/recipes/ddp.yaml or fsdp2.yaml"
            )
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.device = self.accelerator.device if device in ("auto", "cpu") else torch.device(device)
        self.index = self.accelerator.process_index
        self.count = self.accelerator.num_processes
        self.first = self.accelerator.is_main_process
        # Whether `accelerate launch` was given a DeepSpeed configuration.
        self.deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if (started := int(os.environ.get("WORLD_SIZE", "1"))) != self.count:
            raise ValueError(
                f"started as one of {started} processes, but here they have no way to talk to each "
                "other: where there are no GPUs give --device cpu (and accelerate launch no --cpu, which "
                "starts one process)"
            )
        # Whether to split the network: an FSDP configuration, and more than one process to split among.
        self.sharded = told("ACCELERATE_USE_FSDP")
        self.reshard = True
        if self.sharded:
            self._read_fsdp()

    def _read_fsdp(self) -> None:
        """What the launch says about FSDP. accelerate itself looks at it on cards alone."""
        plugin = FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise ValueError(
                "FSDP's first version is not supported: launch with train/recipes/fsdp2.yaml, or set "
                "fsdp_version: 2"
            )
        if told("FSDP_OFFLOAD_PARAMS"):
            raise ValueError(
                "fsdp_offload_params is not supported: set it to false, or launch with "
                "train/recipes/zero2_offload.yaml, which keeps the optimiser in the CPU's memory"
            )
        self.sharded, self.reshard = self.count > 1, plugin.reshard_after_forward

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()

    def one_first(self) -> AbstractContextManager[None]:
        """Context that one process of each machine enters before the others: it makes what they take."""
        return self.accelerator.local_main_process_first()

    def alone(self, work: Callable[[], T]) -> T | None:
        """Do something in the first process alone; all of them call this, and wait for it.

        What it raises there ends all of them, as TrainingError in the others: one that went on alone
        would wait for the first one for ever.
        """
        result, error = None, None
        if self.first:
            try:
                result = work()
            except Exception as caught:
                error = caught
        if self.count > 1:
            said = [None if error is None else f"{error or type(error).__name__}"]
            broadcast_object_list(said)
            if error is None and said[0] is not None:
                raise TrainingError(f"the first process stopped: {said[0]}")
        if error is not None:
            raise error
        return result

    @torch.no_grad()
    def same(self, *modules: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        if self.count > 1:
            for module in modules:
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.copy_(broadcast(tensor.detach().contiguous()))

    @torch.no_grad()
    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their mean over the processes; a missing one counts as zero."""
        if self.count == 1:
            return
        bucket: list[nn.Parameter] = []
        size = 0
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if bucket and (size + p.numel() > BUCKET or p.dtype != bucket[0].dtype):
                self._average(bucket)
                bucket, size = [], 0
            bucket.append(p)
            size += p.numel()
        if bucket:
            self._average(bucket)

    def _average(self, bucket: list[nn.Parameter]) -> None:
        flat = torch.cat([p.grad.flatten() for p in bucket])
        flat = self.accelerator.reduce(flat, reduction="mean")
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad.copy_(part.view_as(p))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        return flag if self.count == 1 else self.mean({"flag": float(flag)})["flag"] > 0

    @torch.no_grad()
    def mean(self, values: dict[str, Tensor | float]) -> dict[str, float]:
        """Numbers averaged over the processes."""
        if not values:
            return {}
        names = sorted(values)
        found = [torch.as_tensor(values[n]).detach().float().to(self.device) for n in names]
        found = torch.stack(found)
        if self.count > 1:
            found = self.accelerator.reduce(found, reduction="mean")
        return dict(zip(names, found.tolist(), strict=True))
