"""Which pictures a command is about, and where each result goes. Decided before any work begins."""

from __future__ import annotations

import glob
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from .. import pictures
from ..settings import Settings

ORIENTATION, ROTATED = 0x0112, (5, 6, 7, 8)  # EXIF; these values swap width and height
# What a folder or a pattern is searched for; a file named by itself is tried whatever it is called.
PICTURES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pnm", ".tga", ".avif", ".jp2"),
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


def collect(words: list[str], recursive: bool = False) -> Inputs:
    """The pictures that `words` (files, folders, patterns) name, each once, in a natural order.

    Patterns are expanded here as well: the shell of Windows leaves them as they are.
    """
    jobs: list[Job] = []
    for word in words:
        path = Path(word).expanduser()
        if os.path.isdir(path):
            found = folder_pictures(path, recursive)
            jobs += [Job(p, base=path) for p in found]
            if not found:
                deeper = "" if recursive else " (--recursive looks into its folders)"
                jobs.append(Job(path, problem=f"there are no pictures in this folder{deeper}"))
        elif os.path.exists(path) or not re.search(r"[*?\[]", word):
            missing = None if os.path.exists(path) else "there is no such file"
            jobs.append(Job(path, named=True, problem=missing))
        else:
            found = sorted(map(Path, glob.glob(str(path), recursive=True)), key=natural)
            found = [p for p in found if p.is_file() and p.suffix.lower() in PICTURES]
            jobs += [Job(p) for p in found] or [Job(path, problem="no picture fits this pattern")]
    unique: dict[str, Job] = {}
    for job in jobs:
        unique.setdefault(same(job.source), job)
    return Inputs(list(unique.values()), single=len(jobs) == 1 and jobs[0].named)


def folder_pictures(folder: Path, recursive: bool) -> list[Path]:
    found = []
    for top, folders, names in os.walk(folder):
        folders[:] = sorted((f for f in folders if not f.startswith(".")), key=natural)
        shown = (n for n in names if not n.startswith("."))
        pictures = (Path(top, n) for n in shown if Path(n).suffix.lower() in PICTURES)
        found += sorted(pictures, key=natural)
        if not recursive:
            break
    return found


def assign(
    inputs: Inputs, output: Path | None, suffix: str, form: str | None, owned=lambda target: False
) -> list[str]:
    """Give every job its target; returns what was decided on the way, for people.

    Results of different pictures never share a name, also not where capitals do not count, and a
    result never has the name of an input. Earlier results (`owned` says so of their paths) are left
    out unless they are named by themselves: a folder can be restored again and again.
    """
    notes: list[str] = []
    earlier = {same(job.source) for job in inputs.jobs if not job.named and owned(job.source)}
    to_file = inputs.single and is_file_name(output)
    groups: dict[str, list[Job]] = {}
    for job in inputs.jobs:
        if job.problem or same(job.source) in earlier:
            continue
        if to_file:
            job.target = output
        else:
            job.target = folder_of(job, output) / (job.source.stem + suffix + ending(job, form))
        groups.setdefault(same(job.target), []).append(job)

    taken = set(groups)
    for group in (g for g in groups.values() if len(g) > 1):
        wanted = group[0].target
        taken.discard(same(wanted))
        for job in group:
            tag = "_" + job.source.suffix[1:].lower() if job.source.suffix else ""
            base = f"{job.source.stem}{tag}"
            candidate, count = wanted.with_name(base + suffix + wanted.suffix), 1
            while same(candidate) in taken:
                count += 1
                candidate = wanted.with_name(f"{base}-{count}{suffix}{wanted.suffix}")
            taken.add(same(candidate))
            job.target = candidate
            notes.append(
                f"{job.source} goes to {candidate.name}: {wanted.name} has several sources"
            )

    sources = {same(job.source): job for job in inputs.jobs if not job.problem}
    for job in inputs.jobs:
        other = sources.get(same(job.target)) if job.target else None
        if other is None:
            continue
        if other is not job and owned(job.target):
            earlier.add(same(other.source))  # the shell made a folder's pattern into names
        else:
            which = "itself" if other is job else f"the input {other.source}"
            job.problem = f"its result would replace {which}; choose another --output or --suffix"
    if earlier:
        notes.append(f"{len(earlier)} earlier results among the pictures are not restored again")
    inputs.jobs = [job for job in inputs.jobs if same(job.source) not in earlier]
    return notes


def is_file_name(output: Path | None) -> bool:
    """Does `--output` name a picture, not a folder?"""
    return output is not None and output.suffix.lower() in PICTURES and not output.is_dir()


def folder_of(job: Job, output: Path | None) -> Path:
    if output is None:
        return job.source.parent
    if job.base is None:
        return output
    return output / job.source.parent.relative_to(job.base)


def ending(job: Job, form: str | None) -> str:
    """`.png` unless told otherwise; "same" keeps the source's where it can be written."""
    if form == "same" and job.source.suffix.lower() in WRITABLE:
        return job.source.suffix
    return FORMATS.get(form or "png", ".png")


def same(path: Path) -> str:
    """Equal for paths that may name the same file, links resolved and capitals ignored."""
    return os.path.realpath(path).casefold()


def natural(path: str | Path) -> list:
    """Sorting key that puts page 9 before page 10."""
    return [
        (1, int(part), "") if part.isdigit() else (0, 0, part.casefold())
        for part in re.split(r"(\d+)", str(path))
    ]


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width as the picture is shown, from its header alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
                rotated = image.getexif().get(ORIENTATION) in ROTATED
    except Exception:  # Pillow's readers raise whatever a broken file leads them to
        height, width = pictures.read(path).pixels.shape[-2:]
        return height, width
    return (width, height) if rotated else (height, width)


def expect_room(target: Path, pixels: Tensor, settings: Settings) -> None:
    """ValueError where the result would not fit into its format: known now, not after the work."""
    height, width = settings.target_size(*pixels.shape[-2:])
    for name, known in pictures.FORMATS.items():
        if target.suffix.lower() not in known.suffixes:
            continue
        if max(height, width) > known.side:
            raise ValueError(
                f"{name} ends at {known.side} pixels a side, the result has {width}x{height}: choose "
                "--format png"
            )
        if not known.alpha and pixels.shape[1] in (2, 4) and bool((pixels[:, -1] < 1).any()):
            raise ValueError(f"{name} has no transparency and the picture has: choose --format png")


def result_pixels(job: Job, settings: Settings) -> int:
    """How much work a picture is; 0 where it will fail anyway."""
    if job.problem:
        return 0
    try:
        height, width = settings.target_size(*picture_size(job.source))
    except (ValueError, OSError):
        return 0
    return height * width
