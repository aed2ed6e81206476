"""What the training scripts share: run folder, log, checkpoints, exact resume, averaged weights."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from tqdm import tqdm

# A loss this many times its slow average, for this many steps, is a run that will not come back.
DIVERGED_FACTOR, DIVERGED_STEPS = 5.0, 200


class TrainingError(RuntimeError):
    """A run that can't go on; the message says why and what to change."""


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


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
        writes: bool = True,
    ):
        """free: names of settings that may change on resuming (where data lies, how often to log)."""
        self.folder, self.writes = Path(folder), writes
        self.state_path = self.folder / "state.pt"
        self.average: float | None = None
        self.bad = self.skipped = 0
        self.stop = self.asked = False
        # Several processes must agree on the step after which they stop: a script sets this to
        # False, makes `asked` common to all, and then sets `stop`.
        self.alone = True
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
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(config, indent=1, sort_keys=True) + "\n")
            self.log_file = (self.folder / "log.jsonl").open("a", encoding="utf-8")
            self.board = SummaryWriter(str(self.folder / "tensorboard"))

    def catch_signals(self) -> None:
        """Let Ctrl-C and a polite kill finish the step in hand and save."""

        def handler(*_: Any) -> None:
            self.asked = True
            self.stop = self.stop or self.alone

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
        temporary = self.state_path.with_name("state.pt.part")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.state_path)

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
        """Step numbers first+1..last behind a progress bar of images; a signal ends them early."""
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
                if self.stop:
                    return
        finally:
            self.bar.close()
            self.bar = None

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

    def swapped(self) -> _Swapped:
        """Context in which the module holds the averaged weights."""
        return _Swapped(self)

    def state_dict(self) -> dict[str, Any]:
        return self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ema.load_state_dict(state)


class _Swapped:
    def __init__(self, average: Average):
        self.average = average

    def __enter__(self) -> None:
        self.average.ema.store(self.average.parameters)
        self.average.ema.copy_to(self.average.parameters)

    def __exit__(self, *_: object) -> None:
        self.average.ema.restore(self.average.parameters)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one step, the same however the run got there."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF)
