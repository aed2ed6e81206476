"""Who takes a step: this project's own loop in one or several processes, or DeepSpeed.

Both sum the micro-batches of a step, average over processes, clip, and step once.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from train.processes import Processes
from train.run import Run, TrainingError
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
        self.processes.average(trained)
        means = self.processes.mean(values)
        norm = nn.utils.clip_grad_norm_(trained, self.clip)
        taken = Taken(means, float(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if taken.finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return taken

    def save(self, run: Run, step: int, **parts: Any) -> None:
        """Write the run's state."""
        run.save_parts(step, network=self.denoiser, optimizer=self.optimizer, **parts)

    def load(self, run: Run, path: Path | None, **parts: Any) -> int:
        """Put back the last complete state, or a file's; the step it was saved at."""
        return run.load_parts(path, network=self.denoiser, optimizer=self.optimizer, **parts)


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
