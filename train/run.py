"""What the training scripts share: run folder, log, checkpoints, exact resume, averaged weights."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from tqdm import tqdm

from train.atomic import replacing, write_text
from train.processes import Processes

# A loss this many times its slow average, for this many steps, is a run that will not come back.
DIVERGED_FACTOR, DIVERGED_STEPS = 5.0, 200


class TrainingError(RuntimeError):
    """A run that can't go on; the message says why and what to change."""


class Run:
    """A folder with `config.json`, `log.jsonl`, `tensorboard/` and `state.pt`; the same command
    again resumes it.

    The state is written to a temporary file and renamed, so a kill at any moment leaves the last
    complete one. A folder of another configuration is refused, never overwritten. Of several
    processes only the one with `writes` touches the folder; all of them may read the state.
    """

    def __init__(
        self,
        folder: Path | str,
        config: dict[str, Any],
        *,
        free: tuple[str, ...] = (),
        processes: Processes | None = None,
    ):
        """free: names of settings that may change on resuming (where data lies, how often to log).

        processes: of a run in several; None = this one alone.
        """
        self.folder, self.processes = Path(folder), processes
        self.writes = processes is None or processes.first
        self.state_path = self.folder / "state.pt"
        self.average: float | None = None
        self.bad = self.skipped = 0
        self.asked = False
        self.bar: tqdm | None = None
        config = json.loads(json.dumps(config))
        path = self.folder / "config.json"
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            changed = [k for k in sorted({*old, *config} - {*free}) if old.get(k) != config.get(k)]
            if changed:
                raise TrainingError(
                    f"{self.folder} holds a run with another {', '.join(changed)}: give another "
                    "--out, or the run's own settings to resume it"
                )
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(config, indent=1, sort_keys=True) + "\n")
            self.log_file = (self.folder / "log.jsonl").open("a", encoding="utf-8")
            self.board = SummaryWriter(str(self.folder / "tensorboard"))

    def catch_signals(self) -> None:
        """Let Ctrl-C and a polite kill finish the step in hand and save."""

        def handler(*_: Any) -> None:
            self.asked = True

        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, handler)

    def load(self) -> dict[str, Any] | None:
        """The last complete state, or None in a new folder."""
        if not self.state_path.exists():
            return None
        return torch.load(self.state_path, map_location="cpu", weights_only=True)

    def save(self, state: dict[str, Any]) -> None:
        """Write the state atomically."""
        if not self.writes:
            return
        with replacing(self.state_path, flush=True) as part:
            torch.save(state, part)

    def save_parts(self, step: int, **parts: Any) -> None:
        """Save the states of everything that has a `state_dict`, by name."""
        if not self.writes:
            return
        watch = {"average": self.average, "bad": self.bad, "skipped": self.skipped}
        states = {name: part.state_dict() for name, part in parts.items()}
        self.save({"step": step, "watch": watch, **states})

    def load_parts(self, **parts: Any) -> int:
        """Put back what `save_parts` saved; the step it was saved at, 0 in a new folder."""
        state = self.load()
        if state is None:
            return 0
        for name, part in parts.items():
            part.load_state_dict(state[name])
        for name, value in state.get("watch", {}).items():
            setattr(self, name, value)
        return state["step"]

    def log(self, step: int, **values: float) -> None:
        """Append one JSON line, and the same values to TensorBoard."""
        if not self.writes:
            return
        # JSON knows no NaN: what isn't finite is null.
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self.log_file.write(json.dumps({"step": step, "time": round(time.time(), 1), **finite}))
        self.log_file.write("\n")
        self.log_file.flush()
        for name, value in finite.items():
            if value is not None:
                self.board.add_scalar(name, value, step)

    def show(self, step: int, *sheets: Path) -> None:
        """Pictures of the run folder in TensorBoard, by their names."""
        for path in sheets:
            with Image.open(path) as image:
                self.board.add_image(path.stem, np.asarray(image), step, dataformats="HWC")

    def accept(self, loss: Tensor | float) -> bool:
        """Whether a step with this loss may be taken; counts the others.

        Raises TrainingError when the run has diverged.
        """
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        finite = math.isfinite(value)
        if not finite:
            self.skipped += 1
        diverged = not finite or (
            self.average is not None and value > DIVERGED_FACTOR * max(self.average, 1e-8)
        )
        self.bad = self.bad + 1 if diverged else 0
        if self.bad >= DIVERGED_STEPS:
            raise TrainingError(
                f"diverged: the loss was {value:g} against an average of {self.average} for "
                f"{self.bad} steps; lower the learning rate or resume from an older state"
            )
        if not diverged:
            self.average = value if self.average is None else 0.99 * self.average + 0.01 * value
        return finite

    def steps(self, first: int, last: int, *, images: int) -> Iterator[int]:
        """Step numbers first+1..last behind a progress bar of images.

        Ends early, in all processes after the same step, when a signal has reached one of them: the
        caller saves what it has after the loop.
        """
        self.bar = tqdm(
            total=last * images,
            initial=first * images,
            unit=" images",
            disable=not self.writes,
            mininterval=0.5 if sys.stderr.isatty() else 60,
        )
        try:
            for step in range(first + 1, last + 1):
                yield step
                self.bar.update(images)
                if self.stopping():
                    return
        finally:
            self.bar.close()
            self.bar = None

    def stopping(self) -> bool:
        """Whether any process was asked to stop; all of them ask together."""
        return self.asked if self.processes is None else self.processes.any(self.asked)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.writes:
            tqdm.write(text, file=sys.stderr)


class Average:
    """Exponential moving average of a module's trained parameters, with warm-up (diffusers).

    device: where it lies, if not beside the parameters; a CPU's memory is the larger one.
    """

    def __init__(self, module: nn.Module, decay: float, *, device: str | None = None):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.ema = EMAModel(self.parameters, decay=decay, use_ema_warmup=True, power=0.75)
        self.device = device
        if device:
            self.ema.to(device=device)

    def update(self) -> None:
        if not self.device:
            self.ema.step(self.parameters)
            return
        # diffusers copies what takes no gradient instead of averaging it.
        self.ema.step([p.detach().to(self.device).requires_grad_() for p in self.parameters])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Context in which the module holds the averaged weights."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        return self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ema.load_state_dict(state)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one step, the same however the run got there."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF)
