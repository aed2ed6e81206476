"""Who takes a step: this project's own loop in one or several processes, the same on a network that
FSDP2 splits among them, or DeepSpeed.

All sum the micro-batches of a step, average over processes, clip, and step once.
"""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gendr.networks.blocks import ResnetBlock
from gendr.networks.unet import Transformer
from train.processes import Processes
from train.run import Average, Run, TrainingError
from train.split import cut, gather
from train.stage1.step import Denoiser, Objective, Sample


class Taken(NamedTuple):
    """What a step measured: means over all processes, and the gradient's norm before clipping."""

    values: dict[str, float]
    norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm) and math.isfinite(self.values["loss"])


class Plain:
    """AdamW over gradients that the processes average by hand."""

    def __init__(
        self, denoiser: Denoiser, options: dict[str, Any], clip: float, processes: Processes
    ):
        self.denoiser, self.clip, self.processes = denoiser, clip, processes
        self.optimizer = torch.optim.AdamW(
            denoiser.parameters(), fused=processes.device.type == "cuda", **options
        )

    def take(
        self, objective: Objective, samples: Iterable[Sample], count: int, rate: float
    ) -> Taken:
        """One step of `count` micro-batches; none where a loss or gradient isn't finite."""
        trained = [p for p in self.denoiser.parameters() if p.requires_grad]
        values = objective.gradients(self.denoiser, samples, count)
        self.average(trained)
        means = self.processes.mean(values)
        norm = gather(nn.utils.clip_grad_norm_(trained, self.clip), "cpu")
        taken = Taken(means, float(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if taken.finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return taken

    def average(self, trained: list[nn.Parameter]) -> None:
        """Make each process's gradients those of the whole batch."""
        self.processes.average(trained)

    def save(self, run: Run, step: int, **parts: Any) -> None:
        """Write the run's state."""
        run.save_parts(step, network=self.denoiser, optimizer=self.optimizer, **parts)

    def load(self, run: Run, path: Path | None, **parts: Any) -> int:
        """Put back the last complete state, or a file's; the step it was saved at."""
        return run.load_parts(path, network=self.denoiser, optimizer=self.optimizer, **parts)

    def whole(self, average: Average | None) -> AbstractContextManager[Denoiser]:
        """Context with the averaged weights in the network that it gives. All processes enter it; the
        first alone may look at the network."""
        return in_place(self, average)


class Sharded(Plain):
    """FSDP2: every process keeps its piece of the weights, gradients and moments; a block's weights
    are put together when it is passed.

    States are those of `Plain`, of whole networks: any number of processes goes on with them, split
    or not.
    """

    def __init__(
        self, denoiser: Denoiser, options: dict[str, Any], clip: float, processes: Processes
    ):
        # A second that other runs need not spend.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.twin = hollow(denoiser)
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        # FSDP2 takes no other layout of weights.
        denoiser.to(memory_format=torch.contiguous_format)
        for module in denoiser.unet.modules():
            if isinstance(module, (ResnetBlock, Transformer)):
                fully_shard(module, mesh=mesh, reshard_after_forward=processes.reshard)
        fully_shard(denoiser, mesh=mesh)
        # It warns of changing what a block gives back in place, which nothing here does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        super().__init__(denoiser, options, clip, processes)

    def average(self, trained: list[nn.Parameter]) -> None:
        """Nothing is left to do: gradients come averaged from the backward pass."""

    @contextlib.contextmanager
    def whole(self, average: Average | None) -> Iterator[Denoiser]:
        """Context with the averaged weights in a network that the first process has to itself; the
        others' has none."""
        device = self.processes.device if self.processes.first else None
        with averaged(average):
            state = gather(self.denoiser.state_dict(), device)
        if self.processes.first:
            self.twin.load_state_dict(state, assign=True)
        try:
            yield self.twin
        finally:
            self.twin.to("meta")

    def save(self, run: Run, step: int, **parts: Any) -> None:
        """Write the run's state, put together in the first process's memory."""
        device = "cpu" if self.processes.first else None
        whole = {"network": self.denoiser, "optimizer": self.optimizer, **parts}
        whole = {name: Ready(gather(part.state_dict(), device)) for name, part in whole.items()}
        run.save_parts(step, **whole)

    def load(self, run: Run, path: Path | None, **parts: Any) -> int:
        """Put back the last complete state, or a file's; the step it was saved at."""
        return run.load_parts(path, network=self, optimizer=Moments(self.optimizer), **parts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of the whole network: this process's piece of it."""
        own = self.denoiser.state_dict()
        cuts = {k: cut(v, own[k]) if k in own else v for k, v in state.items()}
        self.denoiser.load_state_dict(cuts)


class Moments:
    """An optimiser whose state is read whole and kept in pieces."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        found = {
            n: {k: cut(v, parameters[n]) if k != "step" else v for k, v in moments.items()}
            for n, moments in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": found})


class Ready:
    """Something with a `state_dict`: one that is there already."""

    def __init__(self, state: dict[str, Any]):
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state


def hollow(denoiser: Denoiser) -> Denoiser:
    """The same network without weights or memory for them."""
    tensors = (*denoiser.parameters(), *denoiser.buffers())
    # What deepcopy finds here it takes instead of a copy.
    empty: dict[int, Any] = {id(t): t.detach().to("meta") for t in tensors}
    for p in denoiser.parameters():
        empty[id(p)] = nn.Parameter(empty[id(p)], requires_grad=p.requires_grad)
    return copy.deepcopy(denoiser, empty)


@contextlib.contextmanager
def in_place(engine: Plain | DeepSpeed, average: Average | None) -> Iterator[Denoiser]:
    """Context with the averaged weights in the trained network itself, in the first process."""
    with averaged(average if engine.processes.first else None):
        yield engine.denoiser


def averaged(average: Average | None) -> AbstractContextManager[None]:
    """Context in which the trained network holds the averaged weights, where there are any."""
    return contextlib.nullcontext() if average is None else average.swapped()


class DeepSpeed:
    """ZeRO by DeepSpeed: it accumulates, averages, clips, steps and saves by itself.

    One size of micro-batches for the whole run. The network stays in float32 there, with this
    project's own autocast inside its forward pass.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        options: dict[str, Any],
        clip: float,
        processes: Processes,
        *,
        micro_batch: int,
        accumulation: int,
    ):
        self.denoiser, self.processes = denoiser, processes
        self.accelerator = a = processes.accelerator
        a.gradient_accumulation_steps = accumulation
        a.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=micro_batch,
            gradient_accumulation_steps=accumulation,
            gradient_clipping=clip,
        )
        optimizer = torch.optim.AdamW(denoiser.parameters(), **options)
        self.engine, self.optimizer = a.prepare(denoiser, optimizer)

    def take(
        self, objective: Objective, samples: Iterable[Sample], count: int, rate: float
    ) -> Taken:
        """One step of `count` micro-batches. TrainingError where a loss isn't finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, Any] = {}
        for s in samples:
            with self.accelerator.accumulate(self.engine):
                loss, values = objective.loss(self.engine, s)
                # DeepSpeed would take the step; the weights of all processes would be lost.
                if not math.isfinite(self.processes.mean({"loss": loss})["loss"]):
                    raise TrainingError(
                        "the loss isn't finite, and under DeepSpeed a step can't be skipped: "
                        "resume from the last state with a lower learning rate"
                    )
                self.accelerator.backward(loss)
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value / count
        means = self.processes.mean(sums)
        return Taken(means, float(self.engine.get_global_grad_norm() or 0.0))

    def save(self, run: Run, step: int, **parts: Any) -> None:
        """DeepSpeed's own folder of all processes, then the run's state, which names it."""
        folder = run.folder / f"deepspeed-{step}"
        self.engine.save_checkpoint(str(folder), tag="state")
        run.save_parts(step, **parts)

        def tidy() -> None:
            # The newest two, as there are two states.
            found = sorted(run.folder.glob("deepspeed-*"), key=lambda f: int(f.name.split("-")[1]))
            for old in found[:-2]:
                shutil.rmtree(old)

        run.alone(tidy)

    def load(self, run: Run, path: Path | None, **parts: Any) -> int:
        """Put back the last complete state, or a file's; the step it was saved at.

        TrainingError where it was saved by another number of processes.
        """
        step = run.load_parts(path, **parts)
        if step and run.saved_with != self.processes.count:
            raise TrainingError(
                f"the state was saved by {run.saved_with} processes and this run has "
                f"{self.processes.count}: DeepSpeed's states belong to their number; launch as many, "
                "or begin another run from model.safetensors (--base)"
            )
        if step:
            self.engine.load_checkpoint(str(run.folder / f"deepspeed-{step}"), tag="state")
        return step

    def whole(self, average: Average | None) -> AbstractContextManager[Denoiser]:
        """As `Plain.whole`: every process has the whole network."""
        return in_place(self, average)
