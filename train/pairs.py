"""Ready pairs for training on a CPU: crops, their degraded copies, and optionally a frozen
teacher's results.

    python -m train.pairs --data DIR --out DIR --count N --crop 192 --mix tiny --seed 0
        [--teacher MODEL] [--workers 1] [--weights cid22=1.5,budgie=.5] [--drawn .05] [--flat .03]

A shard is `pairs-00000.json` (written last: without it a shard does not count) beside uint8 arrays
that can be memory mapped: `.hr.npy` (n h w 3), `.lr.npy` (n h/4 w/4 3), `.teacher.npy` (n h w 3).
Pair i depends on the options, the pictures and i alone; complete shards are skipped, so a run can
be broken off and extended.

Where the folder holds a `manifest.csv` with the columns `file` and `source`, --weights multiplies
the chance of each source's pictures (default 1).
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from train import degrade, peers
from train.atomic import replacing
from train.data import pictures as data

SHARD = 1024
SHRINK = (0.5, 1.0)  # now and then a source is made smaller first, so that scales vary
SHRINK_SHARE = 0.35
FLAT = 4.0  # standard deviation in 1/255 below which a crop is drawn anew (twice at most)


@dataclass(frozen=True, kw_only=True)
class Options:
    """All that decides what pair i is, apart from the pictures."""

    crop: int = 192
    mix: str = "tiny"
    seed: int = 0
    scale: int = 4
    drawn: float = 0.05
    flat: float = 0.0
    weights: tuple[tuple[str, float], ...] = ()


class Source:
    """The pictures of a folder, drawn by weight. Bad ones are named once and not drawn again."""

    def __init__(self, folder: Path, weights: dict[str, float]):
        self.entries = data.find(folder)
        sources = {}
        if (folder / "manifest.csv").exists():
            with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
                sources = {row["file"]: row["source"] for row in csv.DictReader(file)}
        unknown = sorted(set(weights) - set(sources.values()))
        if unknown:
            known = ", ".join(sorted(set(sources.values()))) or "no sources"
            raise data.DataError(f"--weights names {', '.join(unknown)}: manifest.csv has {known}")
        shares = [weights.get(sources.get(entry.name, ""), 1.0) for entry in self.entries]
        self.edges = np.cumsum(np.asarray(shares, np.float64))
        if not self.edges[-1]:
            raise data.DataError("--weights leaves no picture: give one source a factor above 0")
        self.bad: set[int] = set()

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """A whole picture, `h w 3` uint8."""
        for _ in range(data.TRIES):
            i = int(np.searchsorted(self.edges, rng.random() * self.edges[-1], "right"))
            i = min(i, len(self.entries) - 1)
            if i in self.bad:
                continue
            try:
                return _decoded(self.entries[i])
            except (data.BadPicture, OSError) as error:
                self.bad.add(i)
                warnings.warn(f"skipped {self.entries[i].name}: {error}", stacklevel=2)
        raise data.DataError(f"{data.TRIES} pictures in a row could not be used: look at --data")


@functools.lru_cache(maxsize=1200)  # 0.6 MB each at 512 px; decoding costs more than degrading
def _decoded(entry: data.Entry) -> np.ndarray:
    return data.decode(entry.read())


_LETTERS = "abcdefghijklmnopqrstuvwxyz" * 3 + "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;-!?&%()/"


@functools.cache
def _font(size: int):
    return ImageFont.load_default(size)  # Pillow carries one outline font


def drawn_crop(side: int, rng: np.random.Generator) -> np.ndarray:
    """Random words, or lines and shapes, `side side 3` uint8; drawn at twice the size."""
    big = 2 * side
    paper = rng.integers(0, 256, 3)
    if rng.random() < 0.5:
        paper = np.full(3, rng.choice([0, 16, 235, 255]))
    ink = np.where(paper.mean() > 127, rng.integers(0, 90, 3), rng.integers(165, 256, 3))
    page = Image.new("RGB", (big, big), tuple(int(v) for v in paper))
    pen = ImageDraw.Draw(page)
    if rng.random() < 0.6:
        y = -int(rng.integers(0, 30))
        while y < big:
            size = int(rng.integers(16, 80))
            words = "".join(
                " " if rng.random() < 0.17 else _LETTERS[int(rng.integers(len(_LETTERS)))]
                for _ in range(2 * big // size + 8)
            )
            pen.text(
                (int(rng.integers(-40, 20)), y),
                words,
                fill=tuple(int(v) for v in ink),
                font=_font(size),
            )
            y += int(size * rng.uniform(1.0, 1.5))
        angle = rng.normal(0, 4) if rng.random() < 0.3 else 0.0
    else:
        for _ in range(int(rng.integers(6, 24))):
            box = rng.integers(-big // 4, big * 5 // 4, 4)
            colour = tuple(int(v) for v in (ink if rng.random() < 0.7 else rng.integers(0, 256, 3)))
            width = int(rng.integers(1, 9))
            shape = int(rng.integers(4))
            corners = [int(v) for v in (*np.sort(box[::2]), *np.sort(box[1::2]))]
            corners = [corners[0], corners[2], corners[1], corners[3]]
            if shape == 0:
                pen.line([int(v) for v in box], fill=colour, width=width)
            elif shape == 1:
                pen.ellipse(corners, outline=colour, width=width)
            elif shape == 2:
                pen.rectangle(corners, outline=colour, width=width)
            else:
                points = rng.integers(0, big, (int(rng.integers(3, 6)), 2))
                pen.polygon([tuple(int(v) for v in p) for p in points], fill=colour)
        angle = 0.0
    if angle:
        page = page.rotate(angle, Image.Resampling.BICUBIC, fillcolor=tuple(int(v) for v in paper))
    return np.asarray(page.resize((side, side), Image.Resampling.BOX))


def flat_crop(side: int, rng: np.random.Generator) -> np.ndarray:
    """Paper: one colour, often white or black, or a slow change from one colour to another,
    `side side 3` uint8. Whoever has never seen it tints it."""
    pure = rng.random() < 0.6
    ends = rng.integers(0, 256, (2, 3)) if not pure else np.full((2, 3), rng.choice([0, 255]))
    if pure or rng.random() < 0.4:
        return np.broadcast_to(ends[0].astype(np.uint8), (side, side, 3)).copy()
    place = np.linspace(0, 1, side)
    ramp = (place[:, None] * rng.random() + place[None, :] * rng.random())[..., None]
    return (ends[0] + (ends[1] - ends[0]) * ramp / 2).round().clip(0, 255).astype(np.uint8)


def crop(source: Source, options: Options, rng: np.random.Generator) -> np.ndarray:
    """One high-resolution crop, `side side 3` uint8."""
    side = options.crop
    drawn = rng.random()
    if drawn < options.drawn:
        return drawn_crop(side, rng)
    if drawn < options.drawn + options.flat:
        return flat_crop(side, rng)
    for _ in range(3):
        pixels = source.draw(rng)
        factor = float(rng.uniform(*SHRINK)) if rng.random() < SHRINK_SHARE else 1.0
        h, w = pixels.shape[:2]
        factor = max(
            factor, side / min(h, w)
        )  # never below the crop; small pictures are made larger
        if factor != 1.0:
            size = (max(side, round(w * factor)), max(side, round(h * factor)))
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
            h, w = pixels.shape[:2]
        top, left = int(rng.integers(h - side + 1)), int(rng.integers(w - side + 1))
        found = pixels[top : top + side, left : left + side]
        if rng.random() < 0.5:
            found = found[:, ::-1]
        if found[::4, ::4].std() >= FLAT:
            break
    return np.ascontiguousarray(found)


def pair(source: Source, options: Options, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Pair `index`: crop `h w 3` and degraded copy `h/4 w/4 3`, uint8."""
    rng = np.random.default_rng([options.seed, index])
    hr = crop(source, options, rng)
    seed = int(rng.integers(2**63))
    lr = degrade.degrade(hr, kind="mixed", mix=options.mix, seed=seed, scale=options.scale)
    return hr, lr


_worker: tuple[Source, Options] | None = None


def _start(folder: Path, options: Options) -> None:
    global _worker
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "codecs not available")  # the parent has said so
    _worker = (Source(folder, dict(options.weights)), options)


def _work(index: int) -> tuple[np.ndarray, np.ndarray]:
    return pair(*_worker, index)


def _write(path: Path, write) -> None:
    with replacing(path, flush=True) as part, open(part, "wb") as file:
        write(file)


def make(
    folder: Path,
    out: Path,
    count: int,
    options: Options,
    *,
    model: peers.Teacher | None = None,
    workers: int = 1,
    batch: int = 16,
    shard: int = SHARD,
) -> Iterator[str]:
    """Write the missing shards, a line about each. ValueError when `out` holds others."""
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "format": 1,
        "options": json.loads(json.dumps(asdict(options))),
        "codecs": degrade.report(),
        "teacher": model.digest if model else None,
    }
    pool = None
    if workers > 1:
        pool = get_context("spawn").Pool(workers, _start, (folder, options))
    else:
        source = Source(folder, dict(options.weights))
    try:
        for number in range(-(-count // shard)):
            n = min(shard, count - number * shard)
            stem = out / f"pairs-{number:05d}"
            done = stem.with_suffix(".json")
            if done.exists():
                old = json.loads(done.read_text())
                if {k: old.get(k) for k in about} != about:
                    raise ValueError(f"{done} was made with other options: choose another --out")
                if old["count"] >= n:
                    yield f"{done.name}: there already"
                    continue
            start = time.perf_counter()
            side, low = options.crop, options.crop // options.scale
            hr = np.empty((n, side, side, 3), np.uint8)
            lr = np.empty((n, low, low, 3), np.uint8)
            taught = np.empty_like(hr) if model else None
            first = number * shard
            indices = range(first, first + n)
            made = (
                pool.imap(_work, indices, 16)
                if pool
                else (pair(source, options, i) for i in indices)
            )
            for i, (crop_i, low_i) in enumerate(made):
                hr[i], lr[i] = crop_i, low_i
            if model:
                for at in range(0, n, batch):
                    taught[at : at + batch] = model.restore(lr[at : at + batch], side)
            for name, array in (("lr", lr), ("teacher", taught), ("hr", hr)):
                if array is not None:
                    path = out / f"{stem.name}.{name}.npy"
                    _write(path, lambda file, array=array: np.save(file, array))
            record = json.dumps(about | {"first": first, "count": n}, indent=1)
            _write(done, lambda file, record=record: file.write(record.encode()))
            seconds = time.perf_counter() - start
            yield f"{done.name}: {n} pairs in {seconds:.0f} s, {n / seconds:.1f} per second"
    finally:
        if pool:
            pool.terminate()


def parse_weights(text: str) -> tuple[tuple[str, float], ...]:
    """`source=factor,source=factor` of a command line. ValueError says what is wrong."""
    try:
        found = [(k, float(v)) for k, v in (part.split("=") for part in text.split(",") if part)]
    except ValueError as error:
        raise ValueError(f"--weights {text}: write source=factor,source=factor") from error
    if any(v < 0 for _, v in found):
        raise ValueError(f"--weights {text}: factors must not be negative")
    return tuple(sorted(found))


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m train.pairs", description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of pictures")
    p.add_argument("--out", type=Path, required=True, help="folder for the shards")
    p.add_argument("--count", type=int, required=True, help="pairs in all")
    p.add_argument("--crop", type=int, default=192, help="side of the high-resolution crop (192)")
    p.add_argument("--mix", choices=tuple(degrade.MIXES), default="tiny")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--drawn", type=float, default=0.05, help="share of rendered text and line art (0.05)"
    )
    p.add_argument("--weights", default="", metavar="SOURCE=FACTOR,...")
    p.add_argument(
        "--flat", type=float, default=0.0, help="share of empty paper and slow gradients (0)"
    )
    p.add_argument(
        "--teacher", type=Path, metavar="MODEL", help="any restorer that spandrel can read"
    )
    p.add_argument(
        "--fp32",
        action="store_true",
        help="run the teacher in float32; bfloat16 is slower on CPUs that only emulate it",
    )
    p.add_argument("--device", default="cpu", help="where the teacher runs (cpu)")
    p.add_argument("--workers", type=int, default=1, help="processes that degrade (1)")
    p.add_argument("--threads", type=int, default=0, help="torch threads (its own choice)")
    args = p.parse_args(argv)
    if args.crop < 4 or args.crop % 4:
        p.error(f"--crop {args.crop} is not a multiple of 4")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        options = Options(
            crop=args.crop,
            mix=args.mix,
            seed=args.seed,
            drawn=args.drawn,
            flat=args.flat,
            weights=parse_weights(args.weights),
        )
        model = None
        if args.teacher:
            model = peers.teacher(args.teacher, device=args.device, half=not args.fp32)
        for line in make(
            args.data, args.out, args.count, options, model=model, workers=args.workers
        ):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
