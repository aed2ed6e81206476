"""Which pictures a command is about, and where each result goes. Decided before any work begins."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .. import pictures
from ..settings import Settings
from . import video
from .finding import (
    MAGIC,
    PICTURES,
    Found,
    by_pattern,
    expand,
    folded,
    identity,
    in_folder,
    other_endings,
)

FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tiff": ".tif"}
WRITABLE = tuple(suffix for known in pictures.FORMATS.values() for suffix in known.suffixes)


@dataclass
class Job:
    """One picture to restore. `problem` says why it cannot be, `note` what was decided for it."""

    source: Path
    target: Path | None = None
    base: Path | None = None  # the folder that it was found in
    named: bool = False  # a file named by itself, not found in a folder or by a pattern
    problem: str | None = None
    note: str | None = None
    pixels: int = 0  # of the result, for the progress bar


@dataclass
class Inputs:
    jobs: list[Job] = field(default_factory=list)
    single: bool = False  # one file, named by itself: only then may --output be a file
    notes: list[str] = field(default_factory=list)  # what was passed over


def collect(words: list[str], recursive: bool = False) -> Inputs:
    """The pictures that `words` (files, folders, patterns) name, each once, in a natural order.

    Patterns are expanded here as well: the shell of Windows leaves them as they are.
    """
    jobs: list[Job] = []
    notes: list[str] = []
    for word in words:
        path = expand(word)
        if problem := no_path(word):
            jobs.append(Job(path, named=True, problem=problem))
            continue
        if os.path.isdir(path):
            found = in_folder(path, recursive)
            jobs += [Job(file, base=path) for file in found.files]
            if not found.files and not found.unread:
                deeper = "" if recursive else " (--recursive looks into its folders)"
                problem = f"there are no pictures in this folder{deeper}{passed_over(found)}"
                jobs.append(Job(path, problem=problem))
        elif os.path.lexists(path) or not MAGIC.search(word):
            missing = None if os.path.exists(path) else "there is no such file"
            if missing and os.path.islink(path):
                missing = "is a link that leads nowhere; link it anew, or name the file itself"
            jobs.append(Job(path, named=True, problem=missing))
            continue
        else:
            found = by_pattern(path)
            jobs += [Job(file) for file in found.files]
            if not found.files and not found.unread:
                problem = f"no picture fits this pattern{passed_over(found)}"
                jobs.append(Job(path, problem=problem))
        jobs += [Job(p, problem=f"cannot be read: {why}") for p, why in found.unread]
        if found.files and found.skipped:
            notes.append(f"{word}{passed_over(found)}")
    unique: dict[object, Job] = {}
    for job in jobs:
        unique.setdefault(identity(job.source), job)
    return Inputs(list(unique.values()), single=len(jobs) == 1 and jobs[0].named, notes=notes)


def no_path(word: str) -> str | None:
    """What to do about a word that stands for no file."""
    if not word:  # Path takes it for the folder that one is in
        return "a name is empty, perhaps a variable that is not set; give a file or a folder"
    if os.path.lexists(word):
        return None
    if word == "-":
        return "pictures are read from files, not from standard input; save it first"
    if re.match(r"(https?|ftp|s3|data):", word, re.IGNORECASE):
        return "is an address; download the picture first"
    if word.lower().startswith("file:"):
        return "is an address; give the file's name without file://"
    return None


def passed_over(found: Found) -> str:
    """How many pictures and videos of other kinds there are, and of which; empty where there are none."""
    if not found.skipped:
        return ""
    kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(found.skipped.items()))
    count = sum(found.skipped.values())
    what = f"{count} file{'s' if count > 1 else ''} of other kinds passed over"
    return f": {what} ({kinds}); convert them, or name them one by one to try"


def assign(
    inputs: Inputs, output: Path | None, suffix: str, form: str | None, owned=lambda target: False
) -> list[str]:
    """Give every job its target; returns what was decided on the way, for people.

    Results of different pictures never share a name, also not where capitals do not count, and a
    result never has the name of an input. Earlier results (`owned` says so of their paths) that lie
    where this run's results go are left out unless they are named by themselves: a folder can be
    restored again and again, and results of one folder can go to another in a second pass.
    """
    notes: list[str] = []
    to_file = inputs.single and is_file_name(output)
    earlier = {
        identity(job.source)
        for job in inputs.jobs
        if not job.named and _among_results(job, output) and owned(job.source)
    }
    groups: dict[str, list[Job]] = {}
    for job in inputs.jobs:
        if job.problem or identity(job.source) in earlier:
            continue
        if to_file:
            job.target = output
        else:
            job.target = folder_of(job, output) / (job.source.stem + suffix + ending(job, form))
        groups.setdefault(folded(job.target.absolute()), []).append(job)

    taken = set(groups)
    for group in (g for g in groups.values() if len(g) > 1):
        wanted = group[0].target
        taken.discard(folded(wanted.absolute()))
        for job in group:
            tag = "_" + job.source.suffix[1:].lower() if job.source.suffix else ""
            base = f"{job.source.stem}{tag}"
            candidate, count = wanted.with_name(base + suffix + wanted.suffix), 1
            while folded(candidate.absolute()) in taken:
                count += 1
                candidate = wanted.with_name(f"{base}-{count}{suffix}{wanted.suffix}")
            taken.add(folded(candidate.absolute()))
            job.target = candidate
            notes.append(
                f"{job.source} goes to {candidate.name}: {wanted.name} has several sources"
            )

    sources = {identity(job.source): job for job in inputs.jobs if not job.problem}
    for job in inputs.jobs:
        other = sources.get(identity(job.target)) if job.target else None
        if other is None:
            continue
        if other is not job and owned(job.target):
            earlier.add(identity(other.source))  # the shell made a folder's pattern into names
        else:
            which = "itself" if other is job else f"the input {other.source}"
            job.problem = f"its result would replace {which}; choose another --output or --suffix"
    if earlier:
        count = Counter(identity(job.source) in earlier for job in inputs.jobs)[True]
        notes.append(
            f"{count} earlier results among the pictures are not restored again (name them one by "
            "one, or choose another --output, if they should be)"
        )
    inputs.jobs = [job for job in inputs.jobs if identity(job.source) not in earlier]
    return notes


def _among_results(job: Job, output: Path | None) -> bool:
    """Whether a picture lies where this run's results go."""
    if output is None:
        return True
    place, source = Path(output).resolve(), job.source.resolve()
    return place in source.parents


def is_file_name(output: Path | None) -> bool:
    """Does `--output` name a picture, not a folder?"""
    # Of kinds that cannot be written too: nobody means a folder by `out.heic`.
    known = (*PICTURES, *video.SUFFIXES, *other_endings())
    return output is not None and output.suffix.lower() in known and not output.is_dir()


def folder_of(job: Job, output: Path | None) -> Path:
    if output is None:
        return job.source.parent
    if job.base is None:
        return output
    return output / job.source.parent.relative_to(job.base)


def ending(job: Job, form: str | None) -> str:
    """`.png` unless told otherwise; "same" keeps the source's where it can be written."""
    if video.is_clip(job.source):
        return video.ending(job.source)
    if form == "same" and job.source.suffix.lower() in WRITABLE:
        return job.source.suffix
    return FORMATS.get(form or "png", ".png")


def expect_sides(target: Path, height: int, width: int, settings: Settings) -> None:
    """ValueError where a picture of this size gives a larger result than its format can hold."""
    height, width = settings.target_size(height, width)
    name, known = format_of(target)
    if max(height, width) > known.side:
        raise ValueError(
            f"{name} ends at {known.side} pixels a side, the result has {width}x{height}: choose "
            "--format png"
        )


def expect_room(target: Path, picture: pictures.Picture, settings: Settings) -> None:
    """ValueError where the result would not fit into its format: known now, not after the work."""
    pixels = picture.pixels
    expect_sides(target, *pixels.shape[-2:], settings)
    name, known = format_of(target)
    if not known.alpha and pixels.shape[1] in (2, 4) and bool((pixels[:, -1] < 1).any()):
        raise ValueError(f"{name} has no transparency and the picture has: choose --format png")
    each = pixels.shape[1] * (min(picture.bits, known.bits) // 8)
    if math.prod(settings.target_size(*pixels.shape[-2:])) * each > known.size:
        raise ValueError(f"{name} ends at 4 GB, which the result exceeds: choose --format png")


def format_of(target: Path) -> tuple[str, pictures.Format]:
    """The format that a result's name means."""
    ending = target.suffix.lower()
    return next(item for item in pictures.FORMATS.items() if ending in item[1].suffixes)


def result_pixels(job: Job, settings: Settings) -> int:
    """How much work a picture is; 0 where it will fail anyway."""
    if job.problem:
        return 0
    try:
        h, w, frames = measure(job)
        height, width = settings.target_size(h, w)
    except (ValueError, OSError):
        return 0
    return height * width * frames


def measure(job: Job, max_pixels: int | None = None) -> tuple[int, int, int]:
    """Height, width and number of frames of what a job restores. Raises PictureError."""
    if video.is_clip(job.source):
        return video.measure(job.source)
    return *pictures.measure(job.source, max_pixels=max_pixels), 1
