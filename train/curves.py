"""Curves of one or several runs as a picture, from their log.jsonl. Needs matplotlib.

    python -m train.curves runs/cida --values distance,score_fake,score_real --out curves.png
    python -m train.curves runs/ablation/* --values distance,val_psnr --out ablation.png

One panel per value, one line per run. Without --values it says what there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.atomic import program, replacing


class CurvesError(ValueError):
    """Nothing to draw; the message says why."""


def read(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values by name; what a resumed run logged twice counts once, the later one."""
    path = folder / "log.jsonl"
    if not path.exists():
        raise CurvesError(f"{folder} is no run folder: it has no log.jsonl")
    found: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                found.setdefault(name, {})[row["step"]] = value
    return {
        name: (sorted(values), [values[step] for step in sorted(values)])
        for name, values in found.items()
    }


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential average, corrected for its start."""
    out, average, share = [], 0.0, 0.0
    for value in values:
        average, share = weight * average + (1 - weight) * value, weight * share + 1 - weight
        out.append(average / share)
    return out


def draw(runs: dict[str, dict], names: Sequence[str], smooth: float, out: Path) -> None:
    """One panel per name, atomically written."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise CurvesError("curves are drawn by matplotlib: pip install matplotlib") from error
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 2.8 * rows), squeeze=False
    )
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        for n, (run, values) in enumerate(runs.items()):
            if name in values:
                steps, y = values[name]
                # One colour per run, also where another run has no such value.
                axis.plot(steps, smoothed(y, smooth), f"C{n}", label=run, linewidth=1.1)
    if len(runs) > 1:
        axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    with replacing(out) as part:
        figure.savefig(part, format="png", dpi=100)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--values", default="", metavar="A,B", help="names of the log")
    parser.add_argument("--out", type=Path, help="PNG to write")
    parser.add_argument("--smooth", type=float, default=0.8, help="0 = none, up to 0.99 (0.8)")
    args = parser.parse_args(argv)
    try:
        runs: dict[str, dict[str, Any]] = {folder.name: read(folder) for folder in args.runs}
        known = list(dict.fromkeys(name for values in runs.values() for name in values))
        names = [name for name in args.values.split(",") if name]
        if not names or args.out is None:
            print("\n".join(known))
            return 0
        if unknown := [name for name in names if name not in known]:
            raise CurvesError(f"no run has logged {unknown[0]}: there are {', '.join(known)}")
        draw(runs, names, args.smooth, args.out)
    except CurvesError as error:
        print(f"train.curves: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(program("train.curves", main))
