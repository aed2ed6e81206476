"""The pictures of the report: which ones, which part of them, and as what."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from train.evaluation import methods, testset
from train.evaluation.measure import Run, obtain

# Larger pictures are shown as their middle at full resolution: reducing them would hide the result.
LONGEST = 1024
QUALITY = 90
THUMB = 168
# Factor that makes small differences between two results visible.
AMPLIFY = 8


def choose(run: Run, count: int, first: list[str]) -> list[str]:
    """Names of the pictures to embed: those asked for, then evenly spaced ranks, worst to best.

    Ranked by what the last method gains over the first in PSNR (reduced PSNR without references),
    so that the selection can't flatter anybody.
    """
    stems = [item.stem for item in run.items]
    there = {s for s in stems if any(found.measured(s) for found in run.records.values())}
    chosen = [stem for stem in dict.fromkeys(first) if stem in there][:count]
    last, base = run.records[run.methods[-1].name], run.records[run.baseline]
    name = "psnr" if run.paired else "lr_psnr"
    key = next(m.key for m in run.native if m.name == name)
    rank = last.column(key).values.copy()
    if last is not base:
        rank -= base.column(key).values
    usable = np.flatnonzero(~np.isnan(rank))
    order = usable[np.argsort(rank[usable], kind="stable")]
    if not len(order):  # the last method failed on everything
        order = np.array([i for i, stem in enumerate(stems) if stem in there], dtype=int)
    left = min(count - len(chosen), len(order))
    for at in np.linspace(0, len(order) - 1, max(left, 0)).round().astype(int):
        if (stem := stems[order[at]]) not in chosen:
            chosen.append(stem)
    return chosen


def window(height: int, width: int, factor: float) -> tuple[float, float, float, float]:
    """The shown part as shares of the sides (top, left, bottom, right), on whole input pixels."""
    shares = []
    for side in (height, width):
        most = max(1, int(LONGEST / factor))
        start = max(0, (side - most) // 2)
        shares.append((start / side, min(side, start + most) / side))
    (top, bottom), (left, right) = shares
    return top, left, bottom, right


def cut(picture: np.ndarray, part: tuple[float, float, float, float]) -> np.ndarray:
    height, width = picture.shape[:2]
    top, left, bottom, right = part
    rows = slice(round(top * height), max(round(bottom * height), round(top * height) + 1))
    columns = slice(round(left * width), max(round(right * width), round(left * width) + 1))
    return picture[rows, columns]


def data_uri(picture: np.ndarray, *, lossless: bool = False) -> str:
    """A WebP data URI of a uint8 picture."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(
        file, "WEBP", quality=QUALITY, lossless=lossless, method=4
    )
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def embedded(run: Run, item: testset.Item) -> dict[str, Any]:
    """One picture with all its results as data URIs, in the order input, reference, methods."""
    source = methods.read_rgb(item.source)
    found: list[np.ndarray | None] = [source, None]
    if item.reference:
        found[1] = _readable(lambda: methods.read_rgb(item.reference))
    for method in run.methods:
        there = run.records[method.name].measured(item.stem)
        found.append(_readable(lambda m=method: obtain(run, m, item).pixels) if there else None)
    largest = max(p.shape[1] for p in found if p is not None)
    part = window(*source.shape[:2], largest / source.shape[1])
    parts = [None if p is None else cut(p, part) for p in found]
    # Where the last method and the first (or the reference) disagree there is something to see.
    ends = [p for p in (parts[-1], parts[2] if len(parts) > 3 else parts[1]) if p is not None]
    return {
        "images": [
            None if p is None else data_uri(p, lossless=i == 0) for i, p in enumerate(parts)
        ],
        "thumb": data_uri(thumbnail(next(p for p in (*parts[1:], parts[0]) if p is not None))),
        "focus": liveliest(*ends) if len(ends) == 2 else [0.5, 0.5],
        "part": None if part == (0, 0, 1, 1) else [round(100 * share) for share in part],
        "size": [largest, max(p.shape[0] for p in found if p is not None)],
    }


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """The middle square, small: decoding a row of large pictures would keep the page waiting."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(picture[top : top + side, left : left + side]))
    return np.asarray(square.resize((THUMB, THUMB), Image.Resampling.LANCZOS))


def liveliest(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Centre (x, y, as shares) of the cell of an 8x8 grid where two pictures differ most."""
    h, w = min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1])
    change = np.abs(a[:h, :w].astype(np.int16) - b[:h, :w]).sum(axis=2)
    rows, columns = (np.array_split(np.arange(side), min(8, side)) for side in (h, w))
    cells = [
        (change[np.ix_(r, c)].mean(), c.mean() / w, r.mean() / h) for r in rows for c in columns
    ]
    _, x, y = max(cells)
    return [round(float(x), 3), round(float(y), 3)]


def _readable(read: Any) -> np.ndarray | None:
    """A picture, None where it can't be read any more: its failure is already in the records."""
    try:
        return read()
    except (OSError, ValueError, RuntimeError):
        return None


def link(run: Run, path: Path | None) -> str | None:
    """A file as seen from the report; None where there is none."""
    if path is None or not path.exists():
        return None
    try:
        return quote(Path(os.path.relpath(path, run.out)).as_posix())
    except ValueError:  # another drive
        return path.resolve().as_uri()


def tile_figures(run: Run, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(caption, data URI) of the results with every tile size, and of what the tiles changed."""
    figures, first = [], None
    for row in rows:
        with Image.open(run.out / row["file"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        first = pixels if first is None else first
        height, width = pixels.shape[:2]
        part = window(height, width, 1.0)
        name = f"tile edge {row['tile']}"
        figures.append((name, data_uri(cut(pixels, part))))
        if pixels is not first:
            change = np.abs(pixels.astype(np.int16) - first).max(axis=2) * AMPLIFY
            figures.append(
                (
                    f"{name}: difference to the largest tile, x{AMPLIFY}",
                    data_uri(cut(change.clip(0, 255).astype(np.uint8), part)),
                )
            )
    return figures
