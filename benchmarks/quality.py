"""How good results are on every kind of input: clean, noisy, compressed, blurred; one table.

    python -m benchmarks.quality --out FOLDER --originals HR
    python -m benchmarks.quality --out FOLDER --originals HR --pairs "clean x4=LR_CLEAN:HR" \\
        --pairs "damaged x4=LR:HR" --alone "real=PHOTOS" --niqe-params niqe_pris_params.npz
    python -m benchmarks.quality --out FOLDER --originals HR --as "" --as fidelity=0 --as preset=photo

From the originals of at least `--least` pixels a side it makes: halves (Pillow's bicubic), clean, and
with JPEG, noise and blur, to be restored twice as large; and the originals themselves, clean and
damaged, to be restored at scale 1. `--pairs` adds folders of inputs with originals, `--alone`
folders without. Every row is one set of settings (`--as`, by default as it comes, and `fidelity=0`,
the network alone), beside a plain enlargement by Lanczos.

OUT/<set>/<row>/ keeps the results, 8 bits, OUT/<set>/input/ and original/ what belongs to them: any
other tool can score them, and the same command again only makes what is missing. Delete OUT after
the code or the model has changed. `--judge FILE.py:NAME` adds a perceptual distance: NAME() gives a
function of two uint8 pictures h w 3. Scores are those of train.evaluation.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

import gendr
from gendr import pictures
from train.evaluation import metrics
from train.evaluation.methods import named, rgb8
from train.evaluation.niqe import Niqe
from train.evaluation.testset import EXTENSIONS

from .tables import table

JPEG = (30, 50, 70, 80, 90, 95)
NOISE = (2, 5, 10, 15, 25)
BLUR = (1, 2)
AT_SCALE_1 = ("clean", "JPEG 30", "JPEG 60", "JPEG 90", "noise 5", "noise 15")
PLAIN = "Lanczos"


@dataclass(frozen=True)
class Case:
    """One picture to restore: its input uint8 h w 3, and the original where there is one."""

    group: str
    stem: str
    scale: float
    source: np.ndarray
    original: np.ndarray | None


def jpeg(picture: np.ndarray, quality: float) -> np.ndarray:
    """Compressed and decoded by Pillow, colours halved as it does by default."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file).convert("RGB"))


def noise(picture: np.ndarray, levels: float) -> np.ndarray:
    """White noise of this deviation, the same in every run."""
    seed = zlib.crc32(picture.tobytes()) ^ int(levels)
    values = picture + np.random.default_rng(seed).normal(0, levels, picture.shape)
    return values.round().clip(0, 255).astype(np.uint8)


def blur(picture: np.ndarray, pixels: float) -> np.ndarray:
    """Pillow's approximation of a Gaussian."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(pixels)))


DAMAGES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "JPEG": jpeg,
    "noise": noise,
    "blur": blur,
}
KINDS = (
    "clean",
    *(f"JPEG {q}" for q in JPEG),
    *(f"noise {s}" for s in NOISE),
    *(f"blur {s}" for s in BLUR),
)


def damaged(picture: np.ndarray, kind: str) -> np.ndarray:
    """A picture with one of `KINDS`."""
    name, _, amount = kind.partition(" ")
    return DAMAGES[name](picture, float(amount)) if amount else picture


def read(path: Path) -> np.ndarray:
    """Any file as 8 bits, h w 3; transparency is left out."""
    pixels = pictures.read(path).pixels
    return rgb8(pixels[:, :-1] if pixels.shape[1] in (2, 4) else pixels)


def files(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by name."""
    found = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in EXTENSIONS}
    if not found:
        raise ValueError(f"no pictures in {folder}: give a folder that holds some")
    return found


def made(originals: Path, least: int, only: str) -> Iterator[Case]:
    """Everything that is made from originals."""
    for stem, path in files(originals).items():
        original = read(path)
        if min(original.shape[:2]) < least:
            continue
        height, width = (side // 2 * 2 for side in original.shape[:2])
        original = original[:height, :width]
        half = np.asarray(
            Image.fromarray(original).resize((width // 2, height // 2), Image.Resampling.BICUBIC)
        )
        for kind in KINDS:
            if only in f"{kind} x2":
                yield Case(f"{kind} x2", stem, 2.0, damaged(half, kind), original)
        for kind in AT_SCALE_1:
            if only in f"{kind} x1":
                yield Case(f"{kind} x1", stem, 1.0, damaged(original, kind), original)


def given(text: str, alone: bool) -> Iterator[Case]:
    """NAME=FOLDER, or NAME=FOLDER:ORIGINALS."""
    name, _, folders = text.partition("=")
    inputs, _, originals = folders.partition(":")
    if not name or not inputs or bool(originals) == alone:
        wanted = "NAME=FOLDER" if alone else "NAME=FOLDER:ORIGINALS"
        raise ValueError(f"{text!r} is not {wanted}")
    others = {} if alone else files(Path(originals))
    for stem, path in files(Path(inputs)).items():
        source = read(path)
        if alone:
            yield Case(name, stem, 4.0, source, None)
        elif stem in others:
            original = read(others[stem])
            yield Case(name, stem, original.shape[0] / source.shape[0], source, original)


def plain(case: Case) -> np.ndarray:
    """Enlarged by Lanczos."""
    height, width = (round(side * case.scale) for side in case.source.shape[:2])
    return np.asarray(
        Image.fromarray(case.source).resize((width, height), Image.Resampling.LANCZOS)
    )


def scores(result: np.ndarray, case: Case, judge: Any, niqe: Any) -> dict[str, float]:
    """What can be said of one result."""
    found: dict[str, Any] = {}
    if case.original is not None:
        found |= metrics.against_reference(result, case.original)[0]
        if judge is not None:
            found["distance"] = judge(*metrics.crop_common(result, case.original))
    if niqe is not None:
        found["niqe"] = niqe(result)
    return {name: value for name, value in found.items() if value is not None}


def judge_of(text: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """FILE.py:NAME -> NAME() of that file."""
    path, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location("judge", path)
    if not path or spec is None or spec.loader is None:
        raise ValueError(f"{text!r} is not FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


class Results:
    """The folder of results: makes what is missing."""

    def __init__(self, out: Path, model: gendr.GenDR, rows: dict[str, dict[str, Any]]):
        self.out, self.model, self.rows = out, model, rows
        self.seconds: dict[tuple[str, str], list[float]] = {}

    def of(self, case: Case, row: str) -> np.ndarray:
        """One result, uint8 H W 3."""
        path = self.out / case.group / row / f"{case.stem}.png"
        if path.is_file():
            return np.asarray(Image.open(path))
        if row == PLAIN:
            result = plain(case)
        else:
            image = metrics.as_tensor(case.source)
            started = time.perf_counter()
            result = rgb8(self.model.restore(image, case.scale, **self.rows[row]))
            spent = self.seconds.setdefault((case.group, row), [])
            spent.append(time.perf_counter() - started)
        save(path, result)
        return result


def save(path: Path, picture: np.ndarray) -> None:
    """As PNG, under its name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    Image.fromarray(picture).save(part, "PNG")
    part.replace(path)


def summary(values: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """group -> row -> stem -> score -> value, as a table."""
    lines = []
    for group, rows in values.items():
        base = rows[PLAIN]
        for row, by_stem in rows.items():
            psnr = [v["psnr"] for v in by_stem.values() if "psnr" in v]
            gains = {s: v["psnr"] - base[s]["psnr"] for s, v in by_stem.items() if "psnr" in v}
            worst = min(gains, key=gains.get) if gains and row != PLAIN else None
            lines.append(
                [
                    f"{group}, {row}",
                    f"{mean(psnr):.2f}" if psnr else "",
                    f"{median(psnr):.2f}" if psnr else "",
                    f"{gains[worst]:+.2f} {worst}" if worst else "",
                    *middle(by_stem, "distance", 4),
                    f"{max(worst_of(by_stem, 'distance')):.4f}" if judged(by_stem) else "",
                    *middle(by_stem, "niqe", 2)[:1],
                    *middle(by_stem, "sharp", 2)[:1],
                ]
            )
    return table(
        (
            *("input, restored", "psnr mean", "median", "worst against Lanczos"),
            *("distance mean", "median", "worst", "niqe", "sharp"),
        ),
        lines,
    )


def worst_of(by_stem: dict[str, dict[str, float]], name: str) -> list[float]:
    return [v[name] for v in by_stem.values() if name in v]


def judged(by_stem: dict[str, dict[str, float]]) -> bool:
    return bool(worst_of(by_stem, "distance"))


def middle(by_stem: dict[str, dict[str, float]], name: str, digits: int) -> tuple[str, str]:
    """Mean and median of a score, as text."""
    values = worst_of(by_stem, name)
    if not values:
        return "", ""
    return f"{mean(values):.{digits}f}", f"{median(values):.{digits}f}"


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for results, scores.json and table.md")
    add("--originals", type=Path, help="sharp pictures, to be damaged here")
    add("--least", type=int, default=512, metavar="N", help="smaller originals are left out")
    add("--pairs", action="append", default=[], metavar="NAME=FOLDER:ORIGINALS")
    add("--alone", action="append", default=[], metavar="NAME=FOLDER")
    add("--only", default="", metavar="TEXT", help="of what is made here, names that hold this")
    add("--take", choices=("all", "even", "odd"), default="all", help="pictures, by their place")
    add(
        "--as",
        dest="rows",
        action="append",
        metavar="SETTINGS",
        help="such as detail=.5&fidelity=1",
    )
    add("--model", type=Path, help="model file (default: the embedded one)")
    add("--dtype", choices=gendr.DTYPES, default=gendr.DTYPES[0])
    add("--niqe-params", type=Path, metavar="FILE", help="as in train.evaluate")
    add("--judge", metavar="FILE.py:NAME", help="a perceptual distance")
    add("--threads", type=int, help="of torch")
    return parser.parse_args(argv)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """All pictures that were asked for."""
    sources = [made(args.originals, args.least, args.only)] if args.originals else []
    sources += [given(text, alone=False) for text in args.pairs]
    sources += [given(text, alone=True) for text in args.alone]
    if not sources:
        raise ValueError("nothing to measure: give --originals, --pairs or --alone")
    for source in sources:
        order: list[str] = []
        for case in source:
            if case.stem not in order:
                order.append(case.stem)
            if args.take == "all" or (order.index(case.stem) % 2 == 0) == (args.take == "even"):
                yield case


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        judge = judge_of(args.judge) if args.judge else None
        niqe = Niqe(args.niqe_params) if args.niqe_params else None
        texts = ["", "fidelity=0"] if args.rows is None else args.rows
        rows = {text or "as it comes": named(f"row=model?{text}")[2] for text in texts}
        for settings in rows.values():
            gendr.Settings(**settings)
        results = Results(args.out, gendr.load(args.model, dtype=args.dtype), rows)
        values: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        for case in cases(args):
            save(args.out / case.group / "input" / f"{case.stem}.png", case.source)
            if case.original is not None:
                save(args.out / case.group / "original" / f"{case.stem}.png", case.original)
            group = values.setdefault(case.group, {name: {} for name in (PLAIN, *rows)})
            for row, by_stem in group.items():
                by_stem[case.stem] = scores(results.of(case, row), case, judge, niqe)
            # As it goes: a run that is stopped leaves what it has.
            (args.out / "scores.json").write_text(json.dumps(values, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = summary(values)
    (args.out / "table.md").write_text(text)
    print(text)
    for (group, row), spent in results.seconds.items():
        print(f"{group}, {row}: {median(spent):.2f} s a picture (median)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
