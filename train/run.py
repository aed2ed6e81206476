"""What the training scripts share: run folder, log, checkpoints, exact resume, averaged weights."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from gendr.errors import first_line
from train.atomic import replacing, write_text, writing
from train.data.stream import Stream
from train.processes import Processes, TrainingError
from train.split import cut, own, piece_of

T = TypeVar("T")
# A loss this many times its slow average, for this many steps, is a run that will not come back.
DIVERGED_FACTOR, DIVERGED_STEPS = 5.0, 200


class Run:
    """A folder with `config.json`, `log.jsonl`, `tensorboard/` and `state.pt`; the same command
    again resumes it.

    The state is written to a temporary file and renamed, so a kill at any moment leaves the last
    complete one; the one before it, of a time when all was well, stays as `state-previous.pt`. A
    folder of another configuration is refused, never overwritten. Of several processes only the first
    writes; all of them read the state, and call every method together.
    """

    def __init__(
        self,
        folder: Path | str,
        config: dict[str, Any],
        *,
        free: Sequence[str] = (),
        accept: Sequence[str] = (),
        processes: Processes | None = None,
    ):
        """free: names of settings that may change on resuming (where data lies, how often to log);
        accept: others that this time shall. processes: of a run in several; None = this one alone.
        """
        self.folder, self.processes = Path(folder), processes
        self.writes = processes is None or processes.first
        self.state_path = self.folder / "state.pt"
        self.previous_path = self.folder / "state-previous.pt"
        self.average: float | None = None
        self.bad = self.skipped = 0
        # Whether the state on disk is of a time when no loss stood out.
        self.good = False
        self.world = 1 if processes is None else processes.count
        self.asked, self.began, self.until = False, time.monotonic(), math.inf
        self.saved_at = time.monotonic()
        self.bar: tqdm | None = None
        self.alone(lambda: self._open(json.loads(json.dumps(config)), {*free, *accept}))

    def alone(self, work: Callable[[], T]) -> T | None:
        """Do something in the process that writes; its error is the error of all."""
        return work() if self.processes is None else self.processes.alone(work)

    def _open(self, config: dict[str, Any], free: set[str]) -> None:
        path = self.folder / "config.json"
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            changed = [k for k in sorted({*old, *config} - free) if old.get(k) != config.get(k)]
            if changed:
                raise TrainingError(
                    f"{self.folder} holds a run with another {', '.join(changed)}: give another "
                    "--out, the run's own settings to resume it, or --accept "
                    f"{','.join(changed)} to go on with the new ones"
                )
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(config, indent=1, sort_keys=True) + "\n")
            self.log_file = (self.folder / "log.jsonl").open("a", encoding="utf-8")
            self.board = SummaryWriter(str(self.folder / "tensorboard"))

    def catch_signals(self, hours: float = 0.0) -> None:
        """Let Ctrl-C, a polite kill, and the end of so many hours finish the step in hand and save."""
        self.began = time.monotonic()
        self.until = self.began + 3600 * hours if hours else math.inf

        def handler(*_: Any) -> None:
            self.asked = True

        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, handler)

    def load(self, path: Path | None = None) -> dict[str, Any] | None:
        """The last complete state, or that of a file; None in a new folder.

        Its tensors are mapped, not read: processes of one machine share them, and what is copied
        into a network doesn't stay twice.
        """
        path = path or self.state_path
        if not path.exists():
            if path != self.state_path:
                raise TrainingError(f"there is no state {path}: give a state*.pt of a run folder")
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # torch raises many kinds here, all meaning the same.
        except Exception as error:
            raise TrainingError(
                f"{path} is no whole state of a run ({first_line(error)}): give an earlier "
                f"{path.stem}*.pt with --state, or another --out to begin anew"
            ) from error

    def save(self, state: dict[str, Any]) -> None:
        """Write the state atomically, and keep the one before it if all was well then."""

        def write() -> None:
            with replacing(self.state_path, flush=True) as part:
                torch.save(state, part)
                if self.good and self.state_path.exists():
                    self._keep()

        self.alone(write)
        self.good, self.saved_at = self.bad == 0, time.monotonic()

    def _keep(self) -> None:
        """The state in place under the other name, without a second copy where disks allow it."""
        with replacing(self.previous_path) as part:
            part.unlink(missing_ok=True)
            try:
                os.link(self.state_path, part)
            except OSError:
                shutil.copyfile(self.state_path, part)

    def save_parts(self, step: int, **parts: Any) -> None:
        """Save the states of everything that has a `state_dict`, by name."""
        watch = {"average": self.average, "bad": self.bad, "skipped": self.skipped}
        states: dict[str, Any] = {}
        if self.writes:
            states = {name: part.state_dict() for name, part in parts.items()}
        self.save({"step": step, "watch": watch, "world": self.world, **states})

    def load_parts(self, path: Path | None = None, **parts: Any) -> int:
        """Put back what `save_parts` saved; the step it was saved at, 0 in a new folder."""
        state = self.load(path)
        if state is None:
            return 0
        for name, part in parts.items():
            if name not in state:
                raise TrainingError(
                    f"{path or self.state_path} holds no {name}: it is of another version or kind of "
                    "run; give another --out"
                )
            try:
                part.load_state_dict(state[name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise TrainingError(
                    f"the {name} of {path or self.state_path} is of another version or of other networks "
                    f"than this run: give another --out ({first_line(error)})"
                ) from error
        for name, value in state.get("watch", {}).items():
            setattr(self, name, value)
        self.good, self.saved_with = self.bad == 0, state.get("world", 1)
        return state["step"]

    def due(self, step: int, every: int, minutes: float) -> bool:
        """Whether to save after this step: every so many steps, or when so many minutes are over."""
        late = minutes > 0 and self.writes and time.monotonic() - self.saved_at > 60 * minutes
        if minutes > 0 and self.processes is not None:
            late = self.processes.any(late)
        return late or step % every == 0

    def log(self, step: int, **values: float) -> None:
        """Append one JSON line, and the same values to TensorBoard."""
        if not self.writes:
            return
        # JSON knows no NaN: what isn't finite is null.
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 1), **finite})
        with writing(self.folder / "log.jsonl"):
            self.log_file.write(f"{line}\n")
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
                f"{self.bad} steps; go on from {self.previous_path.name} with a lower learning rate: "
                f"--state {self.previous_path} --accept lr --lr ..."
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
        """Whether any process was asked to stop or its time is over; all of them ask together."""
        asked = self.asked or time.monotonic() > self.until
        return asked if self.processes is None else self.processes.any(asked)

    def spent(self) -> float:
        """The part of its hours that is over, 0 to 1; 0 where it has no end."""
        return min(1.0, (time.monotonic() - self.began) / (self.until - self.began))

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.writes:
            tqdm.write(text, file=sys.stderr)


class Average:
    """Exponential moving average of a module's trained parameters, with warm-up: the decay of step n
    is 1 - n^-0.75 until that is more than `decay` (the form of diffusers and of earlier states).

    device: where it lies, if not beside the parameters; a CPU's memory is the larger one. every:
    steps between two updates, each with the decay of that many steps. Of parameters that are split
    over processes each averages its own piece.
    """

    POWER = 0.75

    def __init__(
        self, module: nn.Module, decay: float, *, device: str | None = None, every: int = 1
    ):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.decay, self.device, self.every = decay, device, every
        self.steps = 0
        self.shadow = [own(p).to(device, copy=True) for p in self.parameters]

    def keep(self) -> float:
        """The decay of the step in hand."""
        return min(self.decay, 1 - self.steps**-self.POWER)

    def update(self) -> None:
        """After every step; only every so many do something."""
        self.steps += 1
        if self.steps % self.every:
            return
        now = [own(p).to(self.device) for p in self.parameters]
        get_ema_multi_avg_fn(self.keep() ** self.every)(self.shadow, now, self.steps)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Context in which the module holds the averaged weights."""
        before = [own(p).to("cpu", copy=True) for p in self.parameters]
        self._put(self.shadow)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            own(p).copy_(value)

    def state_dict(self) -> dict[str, Any]:
        shadow = [piece_of(s, p) for s, p in zip(self.shadow, self.parameters, strict=True)]
        return {"optimization_step": self.steps, "shadow_params": shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, whole, p in zip(
            self.shadow, state["shadow_params"], self.parameters, strict=True
        ):
            mine.copy_(own(cut(whole, p)))
        self.steps = state["optimization_step"]


def rate(
    peak: float,
    number: int,
    *,
    kind: Literal["constant_with_warmup", "cosine"],
    warmup: int,
    steps: int,
    done: float | None = None,
) -> float:
    """Learning rate of step `number` (from 0) of `steps`: it rises linearly over the first `warmup`
    steps, none of which has none, then stays, or falls to zero like a cosine. done: part of the run
    that is over, where that is not counted in steps."""
    if number < warmup:
        return peak * ((number + 1) / warmup)
    if kind == "constant_with_warmup":
        return peak
    if done is None:
        done = (number - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Meter:
    """How much of the time since the last look was spent waiting for data."""

    def __init__(self, stream: Stream):
        self.stream, self.waited, self.at = stream, stream.waited, time.perf_counter()

    def share(self) -> float:
        waited, at = self.stream.waited, time.perf_counter()
        share = (waited - self.waited) / max(at - self.at, 1e-9)
        self.waited, self.at = waited, at
        return share


def numbered(path: Path, folder: Path, step: int) -> None:
    """A copy of a run's file under the number of its step."""
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"{path.stem}-{step:08d}{path.suffix}") as part:
        shutil.copyfile(path, part)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one step, the same however the run got there."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF)
