"""Large pictures made smaller once, as tar shards with their captions: loading them costs a fraction.

    python -m train.shrink --data LSDIR,PHOTOS --out SHARDS --short 768 --workers 8

For stage 1, which reduces pictures before it crops them anyway (--short = the largest crop times --span).
Stage 2 crops pictures as they are: give it the originals. A picture whose short side is longer is
reduced (Lanczos) and written as JPEG without chroma subsampling; a smaller one is copied byte by byte.
Finished shards are skipped, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from train.atomic import replacing, write_text
from train.data.index import DataError, Entry, Sources, cache_folder, find
from train.data.pictures import BadPicture, decode

PER_SHARD = 2000


def shrunk(entry: Entry, short: int, quality: int) -> tuple[bytes, str]:
    """A picture's bytes with a short side of at most `short` pixels, and the ending of their kind.

    BadPicture where training could not use it.
    """
    data = entry.read()
    pixels = decode(data, least=short)
    h, w = pixels.shape[:2]
    with Image.open(io.BytesIO(data)) as image:
        own = min(image.size)
    if own <= short:
        return data, os.path.splitext(entry.name)[1].lower()
    factor = short / min(h, w)
    size = (max(short, round(w * factor)), max(short, round(h * factor)))
    held = io.BytesIO()
    reduced = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    reduced.save(held, "JPEG", quality=quality, subsampling=0)
    return held.getvalue(), ".jpg"


def write_shard(
    number: int, sources: Sequence[Path], out: Path, short: int, quality: int, per_shard: int
) -> str:
    """Shard `number` of all; a line about it."""
    path = out / f"shard-{number:05d}.tar"
    if path.exists():
        return f"{path.name}: there already"
    entries = Sources([find(source, cache_folder()) for source in sources])
    first = number * per_shard
    count, bad, size = 0, [], 0
    with replacing(path) as part, tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as tar:
        for at in range(first, min(first + per_shard, len(entries))):
            entry = entries[at]
            try:
                data, ending = shrunk(entry, short, quality)
            except (BadPicture, OSError) as error:
                bad.append(f"{entry.name}: {error}")
                continue
            add(tar, f"{at:09d}{ending}", data)
            if words := entry.words():
                add(tar, f"{at:09d}.txt", words.encode("utf-8"))
            count, size = count + 1, size + len(data)
    lines = [f"{path.name}: {count} pictures, {size / max(count, 1) / 1000:.0f} kB each"]
    return "\n".join([*lines, *(f"  skipped {line}" for line in bad)])


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """One file of a tar, the same whenever it is made."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def make(
    sources: Sequence[Path], out: Path, *, short: int, quality: int, workers: int, per_shard: int
) -> Iterator[str]:
    """Write the missing shards, a line about each. DataError when `out` holds others."""
    entries = Sources([find(source, cache_folder()) for source in sources])
    about = {
        "pictures": len(entries), "short": short, "quality": quality, "per_shard": per_shard,
        "sources": [source.resolve().name for source in sources],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    record = out / "about.json"
    if record.exists():
        if json.loads(record.read_text(encoding="utf-8")) != about:
            raise DataError(
                f"{out} holds shards of other pictures or options: choose another --out"
            )
    elif any(out.iterdir()):
        raise DataError(f"{out} holds something else: choose an empty folder for --out")
    write_text(record, json.dumps(about, indent=1) + "\n")
    work = partial(
        write_shard, sources=sources, out=out, short=short, quality=quality, per_shard=per_shard
    )
    numbers = range(-(-len(entries) // per_shard))
    if workers <= 1:
        yield from map(work, numbers)
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(work, numbers)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.shrink",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="A,B", help="folders or tars of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--short", type=int, default=768, help="pixels of the short side (768)")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs (95)")
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    parser.add_argument("--per-shard", type=int, default=PER_SHARD, help=f"pictures ({PER_SHARD})")
    args = parser.parse_args(argv)
    try:
        lines = make(
            [Path(name) for name in args.data.split(",") if name],
            args.out,
            short=args.short,
            quality=args.quality,
            workers=args.workers,
            per_shard=args.per_shard,
        )
        for line in lines:
            print(line, flush=True)
    except (DataError, OSError) as error:
        print(f"train.shrink: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
