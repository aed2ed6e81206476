"""`gendr upscale`: many pictures, one after the other, each written as soon as it is done.

A picture that cannot be read, restored or written costs only itself. Ctrl-C, and whatever else asks
the process to end, keeps what is finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from .. import devices, loading, pictures
from ..files import checkpoint
from ..model import GenDR
from ..pictures.placing import sweep
from ..report import OnProgress, Report
from ..settings import Settings
from ..steady import Steady
from . import jobs, masks, stopping, team, video
from .jobs import Job, expect_room, expect_sides, result_pixels
from .journal import Journal, key
from .progress import Bar, clock_time
from .trouble import FULL_DISK, blame, disk_full, plain, reason, unexpected

STOPPED = 130  # what shells report for a program that Ctrl-C ended


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `gendr upscale` was asked for, besides how a picture is restored.

    settings: of a clip; pictures are no frames, and `steady` is not for them.
    """

    settings: Settings
    output: Path | None
    model: Path | None
    base: Path | None
    device: str
    dtype: str
    speed: str
    form: str | None
    quality: int | None
    suffix: str
    recursive: bool
    truncated: bool
    max_pixels: int
    mask: Path | None
    strip: bool
    resume: bool
    overwrite: bool
    plan: bool
    json: bool
    quiet: bool
    command: list[str]  # as it was typed, to be shown with --resume


def run(words: list[str], options: Options) -> int:
    """Restore the pictures that `words` name. 0 = all done, 1 = some were not, 130 = interrupted."""
    try:
        with stopping.as_interrupts(), warnings.catch_warnings():
            batch = Batch(words, options, team.join(options.device))
            warnings.showwarning = batch.warn
            return batch.run()
    except (ValueError, OSError) as error:  # of the model or the team, so of every picture
        if isinstance(error, BrokenPipeError):
            raise
        if options.json:
            print(as_json({"status": "failed", "reason": reason(error)}))
        print(f"gendr: {plain(reason(error))}", file=sys.stderr)
        return 1


class Batch:
    """One run: the jobs of this process, the bar, and what became of each picture."""

    def __init__(self, words: list[str], options: Options, crew: team.Team) -> None:
        self.options, self.crew = options, crew
        self.started = time.monotonic()
        self.entries: list[dict[str, Any]] = []
        self.journal = Journal()
        self.folders: dict[Path, str | None] = {}
        self.stopping = False  # Ctrl-C came while a picture was being written
        self.untold = False  # standard output takes no more words
        self.full = False  # the disk was full once: look first, do not work for nothing
        header = checkpoint.describe(options.model or checkpoint.EMBEDDED)
        self.facts = {
            "settings": asked(dataclasses.replace(options.settings, steady=False)),
            "model": header.get("sha256") or str(header),
            "base": str(options.base),
            "dtype": options.dtype,
            "quality": options.quality,
        }
        self.reading = {"truncated": options.truncated, "max_pixels": options.max_pixels}
        self.mask: Tensor | None = None
        # What is not asked for is not part of a key, which is the same then as before it existed.
        if options.mask is not None:
            self.mask = masks.read(options.mask, **self.reading)
            self.facts["mask"] = hashlib.sha256(self.mask.numpy().tobytes()).hexdigest()
        if options.strip:
            self.facts["strip"] = True
        inputs = jobs.collect(words, options.recursive)
        self.notes = inputs.notes + jobs.assign(
            inputs, options.output, options.suffix, options.form, self.journal.owns
        )
        # Names are given over all pictures first, so two processes never choose the same one.
        self.jobs = crew.share(inputs.jobs)
        for job in self.jobs:
            job.pixels = result_pixels(job, options.settings)
        self.bar = Bar(
            pictures=len(self.jobs),
            pixels=sum(job.pixels for job in self.jobs),
            shown=crew.index == 0 and not (options.quiet or options.plan),
        )

    @cached_property
    def model(self) -> GenDR:
        options, device = self.options, self.crew.device
        return loading.load(
            options.model,
            device=device,
            dtype=options.dtype,
            base=options.base,
            speed=options.speed,
        )

    def run(self) -> int:
        if self.crew.index == 0:
            for note in self.notes:
                self.say(f"note: {plain(note)}")
        try:
            for job in self.jobs:
                self.finish(job, self.attempt(job))
                if self.stopping:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            return self.interrupted()
        finally:
            self.bar.clear()
        self.entries = self.crew.gather(self.entries)
        self.crew.leave()
        return self.summary()

    # ---- one picture ----

    def attempt(self, job: Job) -> dict[str, Any]:
        """What became of one picture: its status, and the report or the reason."""
        try:
            problem = job.problem or self.obstacle(job)
            if problem:
                return {"status": "failed", "reason": problem}
            if self.options.resume and self.journal.finished(job.target, self.key(job)):
                return {"status": "skipped", "reason": "was done before"}
        except OSError as error:  # the picture went away meanwhile
            return {"status": "failed", "reason": reason(error)}
        model = self.model
        try:
            if self.options.plan:
                height, width, frames = jobs.measure(job, self.options.max_pixels)
                if not video.is_clip(job.source):
                    expect_sides(job.target, height, width, self.options.settings)
                plan = model.plan(height, width, self.options.settings)
                text = f"{frames} frames, each:\n{plan}" if frames > 1 else str(plan)
                return {"status": "planned", "text": text, **plan.as_dict()}
            clip = video.is_clip(job.source)
            report = self.restore_clip(model, job) if clip else self.restore(model, job)
            return {"status": "done", **report.as_dict()}
        except Exception as error:  # one picture must not stop the others
            self.full = self.full or disk_full(error)
            if unexpected(error):
                self.bar.clear()
                traceback.print_exc()
            return {"status": "failed", "reason": reason(error)}

    def obstacle(self, job: Job) -> str | None:
        """What is known to be in the way before the model runs."""
        options, target = self.options, job.target
        if target.is_dir():
            return f"{target} is a folder"
        if target.exists() and not options.overwrite:
            if not options.resume:
                return f"{target} exists; --overwrite replaces it, --resume goes on with a run"
            if not self.journal.finished(target, self.key(job)):
                return (
                    f"{target} exists and is not this picture with these settings; --overwrite "
                    "replaces it"
                )
        if options.plan:
            return None
        problem = self.folder_problem(target.parent)
        # A compressed result takes about a byte per pixel.
        if problem is None and self.full and shutil.disk_usage(target.parent).free < job.pixels:
            return FULL_DISK
        return problem

    def folder_problem(self, folder: Path) -> str | None:
        """Why nothing can be written to `folder`, found out by trying."""
        if self.folders.get(folder, "") is None and not folder.is_dir():
            # A disk that was taken away, say: what is made in its place would go to another.
            return f"the folder {folder} is gone; bring it back, or choose another with --output"
        if folder not in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                sweep(folder)
                with tempfile.TemporaryFile(dir=folder):
                    self.folders[folder] = None
            except OSError as error:
                self.folders[folder] = (
                    f"the folder {folder} cannot be written to ({error.strerror}); choose another "
                    "with --output"
                )
        return self.folders[folder]

    def restore(self, model: GenDR, job: Job) -> Report:
        options = self.options
        self.bar.begin(job.source.name, job.pixels)
        identity = self.key(job)  # of the file as it is read, in case it changes meanwhile
        # By its header: what cannot be held must not be decoded first.
        height, width, _ = jobs.measure(job, options.max_pixels)
        expect_sides(job.target, height, width, options.settings)
        model.expect_memory(height, width, options.settings, masked=self.mask is not None)
        picture = pictures.read(job.source, **self.reading)
        for note in picture.notes:
            self.say(f"note: {plain(job.source)}: {plain(note)}")
        expect_room(job.target, picture, options.settings)
        output, report = self.restored(
            model, picture.pixels, lambda p: self.bar.tile(p.done, p.total, p.share)
        )
        quality = {} if options.quality is None else {"quality": options.quality}

        def record(part: Path) -> None:
            self.record(job, identity, part)

        # Delays Ctrl-C until this picture is written and reported.
        with stopping.delayed(self.stop):
            pictures.write(
                job.target,
                output,
                picture,
                overwrite=options.overwrite,
                keep_metadata=not options.strip,
                before=record,
                **quality,
            )
        return report

    def restore_clip(self, model: GenDR, job: Job) -> Report:
        """A video, frame by frame. Ctrl-C takes effect between two passes; pieces are kept."""
        identity = self.key(job)
        height, width, frames = jobs.measure(job)
        plan = model.plan(height, width, self.options.settings)
        self.bar.begin(job.source.name, job.pixels, unit="frame")
        clip = video.Clip(job.source, job.target, identity, self.options.quality)
        if clip.pieces():
            count = len(clip.pieces()) * video.PIECE
            self.say(f"note: {plain(job.source)}: goes on after {count} frames")
        size = tuple(side // 2 * 2 for side in plan.output_size)
        events: dict[str, None] = {}
        if size != plan.output_size:
            events["the last row or column is left out: H.264 needs even sides"] = None
        started = time.monotonic()
        # One plan for all frames: other tiles would round otherwise.
        whole = {"clip": Steady(), "steady": self.options.settings.steady}
        whole["free_bytes"] = devices.free_bytes(model.device)

        def frame(pixels: Tensor) -> Tensor:
            output, report = self.restored(model, pixels, lambda p: None, **whole)
            events.update(dict.fromkeys(report.events))
            return output

        def told(number: int) -> None:
            total = max(frames, number)
            self.bar.tile(number, total, number / total)

        done = clip.restore(
            frame, told, lambda part: self.record(job, identity, part), whole["clip"]
        )
        return Report(
            model=model.name,
            settings=self.options.settings,
            plan=plan,
            dtype=model.dtype,
            input_size=(height, width),
            output_size=size,
            seconds=time.monotonic() - started,
            events=[f"{done} frames", *events],
        )

    def restored(
        self, model: GenDR, pixels: Tensor, told: OnProgress, **others: Any
    ) -> tuple[Tensor, Report]:
        """others: what a frame of a clip has besides; a picture on its own is none."""
        if self.mask is not None:
            others["mask"] = masks.fitted(self.mask, *pixels.shape[-2:])
        settings = dataclasses.asdict(self.options.settings) | {"steady": False}
        return model.restore_with_report(pixels, progress=told, **(settings | others))

    def record(self, job: Job, identity: str, part: Path) -> None:
        with contextlib.suppress(OSError):  # without its record a picture is still a picture
            self.journal.add(job.target, identity, part)

    def stop(self) -> None:
        self.stopping = True

    def key(self, job: Job) -> str:
        facts = {**self.facts, "target": job.target.name}
        if video.is_clip(job.source):
            facts["steady"] = self.options.settings.steady
        return key(job.source, facts)

    # ---- words ----

    def finish(self, job: Job, entry: dict[str, Any]) -> None:
        status = entry["status"]
        text = entry.pop("text", None)
        entry = {"input": str(job.source), "output": str(job.target or ""), **entry}
        self.entries.append(entry)
        self.bar.picture(job.pixels, worked=status == "done")
        if self.options.json:
            self.tell(as_json(entry))
        if status == "failed":
            self.complain(f"failed: {plain(blame(entry))}")
        elif status == "skipped":
            self.say(f"{plain(job.source)}: {entry['reason']} ({plain(job.target)})")
        elif status == "planned":
            self.say(f"{plain(job.source)} -> {plain(job.target)}\n{indent(text)}")
        else:
            sizes = " -> ".join(f"{w}x{h}" for h, w in (entry["input_size"], entry["output_size"]))
            way = f"{plain(job.source)} -> {plain(job.target)}"
            self.say(f"{way}  {sizes}  {entry['seconds']:.1f} s")
            for event in entry["events"]:
                self.say(f"  {event}")

    def interrupted(self) -> int:
        self.bar.clear()
        done = sum(entry["status"] in ("done", "skipped") for entry in self.entries)
        again = f"{os.environ.get('GENDR_PROG', 'gendr')} {resuming(self.options.command)}"
        if self.options.json:
            self.tell(as_json({"summary": {"interrupted": True, "done": done}}))
        self.complain(
            f"Stopped: {done} of {len(self.jobs)} pictures are done and kept. Go on with\n  "
            f"{plain(again)}"
        )
        return STOPPED

    def summary(self) -> int:
        """The last lines, from one process alone; returns the exit code."""
        counts = Counter(entry["status"] for entry in self.entries)
        failed = [entry for entry in self.entries if entry["status"] == "failed"]
        seconds = time.monotonic() - self.started
        if self.crew.index == 0:
            if self.options.json:
                facts = {**counts, "pictures": len(self.entries), "seconds": round(seconds, 2)}
                self.tell(as_json({"summary": facts}))
            told = ", ".join(f"{count} {status}" for status, count in counts.items())
            if not self.entries:
                self.complain("nothing to restore")
            if len(self.entries) > 1:
                self.say(f"{told} in {clock_time(seconds)}")
            if failed and len(self.entries) > 1:
                self.complain(f"{len(failed)} of {len(self.entries)} pictures failed:")
                reasons: dict[str, list[dict[str, Any]]] = {}
                for entry in failed:
                    reasons.setdefault(entry["reason"], []).append(entry)
                for why, entries in reasons.items():
                    several = f"{len(entries)} pictures: {why}"
                    one = len(entries) == 1
                    self.complain(f"  {plain(blame(entries[0]) if one else several)}")
        return 1 if failed or self.untold or not self.entries else 0

    def say(self, text: str) -> None:
        """To stdout, or nowhere where stdout carries JSON."""
        if not (self.options.quiet or self.options.json):
            self.tell(text)

    def tell(self, text: str) -> None:
        """A line to stdout. Where that is full, the work goes on, and the exit code tells."""
        if self.untold:
            return
        self.bar.clear()
        try:
            # One write: of several processes on one pipe each keeps its lines whole.
            print(f"{text}\n", end="", flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            self.untold = True
            quiet(sys.stdout)
            self.complain(f"nothing more is told on standard output: {plain(reason(error))}")

    def complain(self, text: str) -> None:
        # The last place for words: where it takes none, the work goes on without them.
        try:
            self.bar.clear()
            print(f"{text}\n", end="", file=sys.stderr, flush=True)
        except OSError:
            quiet(sys.stderr)

    def warn(self, message: Warning | str, *_: Any) -> None:
        if not self.options.quiet:
            self.complain(f"warning: {plain(message)}")


def asked(settings: Settings) -> dict[str, Any]:
    """The settings without what is off: a switch that a later version brings changes no key."""
    values = dataclasses.asdict(settings)
    return {name: v for name, v in values.items() if v is not None and v is not False}


def resuming(typed: list[str]) -> str:
    """The command line as it was typed, with --resume where it is an option and no file's name."""
    end = typed.index("--") if "--" in typed else len(typed)
    options = [word for word in typed[:end] if word != "--resume"]
    words = [*options[:1], "--resume", *options[1:], *typed[end:]]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def quiet(stream: TextIO) -> None:
    """Let what waits in a stream that takes nothing more go nowhere: it would fail again at the end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def as_json(entry: dict[str, Any]) -> str:
    """One line; what is not finite (the dB of equal pictures) is null, for JSON has no word for it."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in entry.items()
    }
    return json.dumps(finite, default=str)


def indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
