"""Looks at the degradations: a sheet of crops and their damaged copies, a folder of them to validate on, or
the codecs that work here.

python -m train.degrade sheet --data DIR --out sheet.png [--kind KIND] [--mix MIX] [--seed N]
python -m train.degrade pairs --data DIR --out VAL [--count N] [--crop N] ...
python -m train.degrade codecs

`pairs` writes VAL/hr and VAL/lr, for --originals and --validate of train.cida. Take pictures that are not
trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from train.atomic import replacing
from train.data.degradations import KINDS, MIXES, degrade, report
from train.data.pictures import Order, Pictures


def sheet(
    crops: list[np.ndarray],
    *,
    kind: str = "mixed",
    mix: str = "paper",
    seed: int = 0,
    columns: int = 4,
) -> Image.Image:
    """Pairs of equal square crops, `side side 3` uint8, and their enlarged degraded copies, with
    the steps in words below; crop i has seed + i."""
    side = crops[0].shape[0]
    wide, high = 2 * side, side + 34
    columns = min(columns, len(crops))
    whole = Image.new("RGB", (columns * wide, -(-len(crops) // columns) * high), "white")
    pen = ImageDraw.Draw(whole)
    for i, hr in enumerate(crops):
        trace: list[str] = []
        low = Image.fromarray(degrade(hr, kind=kind, mix=mix, seed=seed + i, trace=trace))
        x, y, half = i % columns * wide, i // columns * high, (len(trace) + 1) // 2
        whole.paste(Image.fromarray(hr), (x, y))
        whole.paste(low.resize((side, side), Image.Resampling.NEAREST), (x + side, y))
        for line, words in enumerate((trace[:half], trace[half:])):
            text = ", ".join(words)[: wide // 6]
            pen.text((x + 2, y + side + 2 + 15 * line), text, fill="black")
    return whole


def write_pairs(
    crops: list[np.ndarray], out: Path, *, kind: str = "mixed", mix: str = "paper", seed: int = 0
) -> None:
    """OUT/hr/0000.png ... and damaged copies of the same names in OUT/lr, a quarter as wide; crop i has
    seed + i. ValueError where one of the folders has something in it."""
    folders = [out / "hr", out / "lr"]
    for folder in folders:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty: give another --out")
        folder.mkdir(parents=True, exist_ok=True)
    for i, hr in enumerate(crops):
        low = degrade(hr, kind=kind, mix=mix, seed=seed + i)
        for folder, pixels in zip(folders, (hr, low), strict=True):
            with replacing(folder / f"{i:04d}.png") as part:
                Image.fromarray(pixels).save(part, "PNG")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.degrade", description="Look at degradations."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "sheet": ("a contact sheet of crops and their degraded copies", "PNG to write", 256),
        "pairs": ("crops and their degraded copies as files", "folder for hr and lr", 512),
    }
    for name, (what, out, crop) in helps.items():
        p = commands.add_parser(name, help=what)
        p.add_argument("--data", type=Path, required=True, help="folder of pictures")
        p.add_argument("--out", type=Path, required=True, help=out)
        p.add_argument("--kind", choices=KINDS, default="mixed")
        p.add_argument("--mix", choices=tuple(MIXES), default="paper")
        p.add_argument("--count", type=int, default=16)
        p.add_argument("--crop", type=int, default=crop, help="pixels (%(default)s)")
        p.add_argument("--seed", type=int, default=0)
    commands.add_parser("codecs", help="the codecs that work here, and their probabilities")
    args = parser.parse_args(argv)
    if args.command == "codecs":
        print(json.dumps(report(), indent=1))
        return 0
    if args.count < 1 or args.crop < 4 or args.crop % 4:
        parser.error("--count must be at least 1 and --crop a multiple of 4")
    try:
        pairs = args.command == "pairs"
        dataset = Pictures(args.data, crop=args.crop, seed=args.seed, flip=not pairs)
        keys = Order(len(dataset), seed=args.seed)
        # A sheet may show a picture again; on a pair more than once nothing is to be measured.
        count = min(args.count, len(dataset)) if pairs else args.count
        items = [dataset[key] for key, _ in zip(keys, range(count), strict=False)]
        dataset.name_bad()
        crops = [np.ascontiguousarray(item["hr"].permute(1, 2, 0).numpy()) for item in items]
        how = {"kind": args.kind, "mix": args.mix, "seed": args.seed}
        if pairs:
            write_pairs(crops, args.out, **how)
        else:
            with replacing(args.out) as part:
                sheet(crops, **how).save(part, "PNG")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(crops)} pairs, {args.kind}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
