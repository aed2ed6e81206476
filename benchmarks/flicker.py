"""How much restored video flickers, beside its input and a plain enlargement, and at what fidelity.

    python -m benchmarks.flicker --originals PICTURES
    python -m benchmarks.flicker --originals PICTURES --as "" --as steady=true --as fidelity=0

Each clip is cut from a sharp picture, so that what every frame should be is known. Frames are halved
by Pillow's bicubic, damaged anew in each frame, and restored twice as large:

  still    nothing moves
  object   a square of another place goes over a still ground
  fade     a still picture grows darker by 2 levels a frame
  pan      the whole moves by 2 or 3 pixels of the original a frame, 1 or 1.5 of the input

with "noise N" (deviation in levels), "JPEG N" (quality, after noise of 1 level, without which every
frame would be compressed alike) or "clean". Flicker is in levels of 8 bits, the root of the mean
square over pixels and colours: where nothing moves, of the deviation over time; of a pan, of the
difference to the frame before, moved by the known shift, over sqrt(2). What the originals do
themselves (a fade) is taken off first. Beside it stands the share of the input's own flicker, PSNR
(RGB) of all frames and, where an object went, PSNR of what it has covered at any time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import gendr
from train.evaluation import metrics
from train.evaluation.methods import named

from .quality import damaged, files, read
from .tables import table

SCALE = 2
# Pixels at each edge that are not judged: a frame's own edge is not in the next one of a pan.
EDGE = 16
# Levels a frame of a fade, pixels of the original a frame of an object.
FADE, STEP = 2, 4
CLIPS = (
    *("still, noise 2", "still, noise 5", "still, JPEG 80", "still, JPEG 50"),
    *("object, noise 5", "object, JPEG 80", "fade, noise 5", "fade, JPEG 80"),
    *("pan 2, clean", "pan 3, clean", "pan 2, noise 5", "pan 2, JPEG 80"),
)


@dataclass(frozen=True)
class Clip:
    """Frames uint8 t h w 3, and what they should be, t H W 3.

    shift: pixels of the original that everything moves to the left from frame to frame.
    covered: H W, where an object has been at any time.
    """

    frames: np.ndarray
    originals: np.ndarray
    shift: int
    covered: np.ndarray


def originals_of(picture: np.ndarray, motion: str, side: int, frames: int) -> Clip:
    """The clip before its damage; `frames` of it are empty. ValueError where the picture is too small."""
    kind, _, step = motion.partition(" ")
    shift = int(step or 0)
    height, width = picture.shape[:2]
    if height < side or width < side + shift * (frames - 1):
        raise ValueError(f"{width}x{height} is too small for {motion} of {frames} frames")
    top, left = (height - side) // 2, (width - side - shift * (frames - 1)) // 2
    covered = np.zeros((side, side), bool)
    ground = picture[top : top + side, left : left + side]
    made = []
    for n in range(frames):
        frame = ground.copy()
        if kind == "pan":
            frame = picture[top : top + side, left + shift * n : left + shift * n + side].copy()
        if kind == "fade":
            frame = (frame.astype(int) - FADE * n).clip(0, 255).astype(np.uint8)
        if kind == "object":
            large, at = side // 4, side // 4 + STEP * n
            place = (slice(at // 2, at // 2 + large), slice(at, at + large))
            frame[place] = ground[-large:, -large:]
            covered[place] = True
        made.append(frame)
    return Clip(np.empty(0), np.stack(made), shift, covered)


def clip_of(picture: np.ndarray, name: str, side: int, frames: int) -> Clip:
    """One of `CLIPS`, the same in every run."""
    motion, _, damage = name.partition(", ")
    clip = originals_of(picture, motion, side, frames)
    inputs = []
    for n, original in enumerate(clip.originals):
        small = Image.fromarray(original).resize((side // SCALE,) * 2, Image.Resampling.BICUBIC)
        values = np.asarray(small)
        amount = (
            {"noise": float(damage.split()[-1]), "JPEG": 1.0}[damage.split()[0]]
            if damage != "clean"
            else 0.0
        )
        if amount:
            grain = np.random.default_rng(n).normal(0, amount, values.shape)
            values = (values + grain).round().clip(0, 255).astype(np.uint8)
        inputs.append(damaged(values, damage) if damage.startswith("JPEG") else values)
    return Clip(np.stack(inputs), clip.originals, clip.shift, clip.covered)


def flicker(frames: np.ndarray, clip: Clip) -> float | None:
    """Of frames t h w 3 of any size, in levels. None where the shift is no whole number of pixels."""
    side = frames.shape[1]
    edge = EDGE * side // clip.originals.shape[1]
    shift, rest = divmod(clip.shift * side, clip.originals.shape[1])
    if rest:
        return None
    values = frames.astype(np.float64)
    if not clip.shift:
        own = clip.originals.astype(np.float64)
        own = own.mean((1, 2, 3), keepdims=True) - own.mean()
        deviation = (values - own).var(axis=0, ddof=1).mean(-1)
        factor = clip.originals.shape[1] // side
        moved = clip.covered.reshape(side, factor, side, factor).any((1, 3))
        near = int(edge)
        still = ~_widened(moved, near)
        still[:edge], still[-edge:], still[:, :edge], still[:, -edge:] = False, False, False, False
        return float(np.sqrt(deviation[still].mean()))
    inner = slice(edge, -edge)
    before = values[:-1, inner, edge + shift : -edge]
    after = values[1:, inner, edge : -edge - shift]
    return float(np.sqrt(((after - before) ** 2).mean() / 2))


def _widened(mask: np.ndarray, reach: int) -> np.ndarray:
    """What lies within so many pixels of a mask."""
    grown = torch.from_numpy(mask)[None, None].float()
    return torch.nn.functional.max_pool2d(grown, 2 * reach + 1, 1, reach)[0, 0].numpy() > 0


def psnr(frames: np.ndarray, clip: Clip, where: np.ndarray | None = None) -> float:
    """Of all frames together, in dB. where: H W, the pixels that count."""
    error = (frames.astype(np.float64) - clip.originals) ** 2
    error = error[:, EDGE:-EDGE, EDGE:-EDGE] if where is None else error[:, where]
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-9)))


def restored(model: Any, clip: Clip, settings: dict[str, Any]) -> np.ndarray:
    """By the model, as frames of one clip; uint8 t H W 3."""
    images = torch.cat([metrics.as_tensor(frame) for frame in clip.frames])
    return eight_bits(model.restore(images, SCALE, **settings))


def plain(clip: Clip) -> np.ndarray:
    """By Lanczos."""
    size = clip.originals.shape[2], clip.originals.shape[1]
    return np.stack(
        [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.LANCZOS)) for f in clip.frames]
    )


def eight_bits(images: Tensor) -> np.ndarray:
    """t 3 h w in [0, 1] -> uint8 t h w 3."""
    return (images * 255).round().clamp(0, 255).byte().movedim(1, -1).numpy()


def scores(frames: np.ndarray, clip: Clip) -> dict[str, float]:
    """What can be said of one result."""
    own, of_input = flicker(frames, clip), flicker(clip.frames, clip)
    found = {"flicker": own, "psnr": psnr(frames, clip)}
    if of_input:
        found["share"] = own / of_input
    if clip.covered.any():
        found["trail"] = psnr(frames, clip, clip.covered)
    return found


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flicker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--originals", type=Path, required=True, help="a folder of sharp pictures")
    add("--pictures", type=int, default=4, metavar="N", help="how many of them (default: 4)")
    add("--side", type=int, default=256, help="of the originals' frames (default: 256)")
    add("--frames", type=int, default=16, help="of a clip (default: 16)")
    add("--only", default="", metavar="TEXT", help="clips whose names hold this")
    add("--as", dest="rows", action="append", metavar="SETTINGS", help="such as steady=true")
    add("--model", type=Path, help="model file (default: the embedded one)")
    add("--dtype", choices=gendr.DTYPES, default=gendr.DTYPES[0])
    add("--threads", type=int, help="of torch")
    return parser.parse_args(argv)


def pictures_of(args: argparse.Namespace) -> Iterator[np.ndarray]:
    """The first ones that are large enough for the longest pan."""
    count = 0
    for path in files(args.originals).values():
        picture = read(path)
        wide = args.side + 3 * (args.frames - 1)
        if count < args.pictures and picture.shape[0] >= args.side and picture.shape[1] >= wide:
            count += 1
            yield picture
    if not count:
        raise ValueError(
            f"no picture in {args.originals} is {wide}x{args.side} or larger: give others, a smaller "
            "--side or fewer --frames"
        )


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        texts = ["", "steady=true"] if args.rows is None else args.rows
        rows = {text or "as it comes": named(f"row=model?{text}")[2] for text in texts}
        for settings in rows.values():
            gendr.Settings(**settings)
        model = gendr.load(args.model, dtype=args.dtype)
        pictures = list(pictures_of(args))
    except (ValueError, OSError) as error:
        print(f"flicker: {error}", file=sys.stderr)
        return 1
    lines = []
    for name in (name for name in CLIPS if args.only in name):
        found: dict[str, list[dict[str, float]]] = {"Lanczos": [], **{row: [] for row in rows}}
        for picture in pictures:
            clip = clip_of(picture, name, args.side, args.frames)
            found["Lanczos"].append(scores(plain(clip), clip))
            for row, settings in rows.items():
                found[row].append(scores(restored(model, clip, settings), clip))
        for row, values in found.items():
            lines.append([f"{name}: {row}", *(middle(values, *column) for column in COLUMNS)])
            print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    print(
        table(("clip: restored", "flicker", "of the input's", "PSNR", "PSNR where covered"), lines)
    )
    return 0


COLUMNS = (("flicker", 2), ("share", 2), ("psnr", 2), ("trail", 2))


def middle(values: list[dict[str, float]], name: str, digits: int) -> str:
    """Mean over pictures of a score that all of them have."""
    there = [value[name] for value in values if name in value]
    return f"{mean(there):.{digits}f}" if there else ""


if __name__ == "__main__":
    sys.exit(main())
