"""The index of a large set of pictures: seconds to make it, bytes for each, and what a second process pays.

    python -m benchmarks.index --entries 1000000

Writes tars of synthetic members (a picture's name and its caption in turn, nothing that could be decoded)
into a temporary folder: about 1.5 GB for a million pictures. Times are of the processor, so that other
work on the machine does not count, and of the wall beside them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

PER_TAR = 10_000
# A child that finds the pictures of a folder, looks at one, and says what that cost.
CHILD = """
import json, sys, time
from pathlib import Path
import resource, numpy
from train.data import index
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wall, cpu = time.perf_counter(), time.process_time()
found = index.find(sys.argv[1], Path(sys.argv[2]))
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
assert found[len(found) - 1].words() == "a caption"
began = time.process_time()
for at in range(0, len(found), max(1, len(found) // 1000)):
    found[at]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"pictures": len(found), "wall_s": wall, "cpu_s": cpu, "more_mib": (peak - base) / 1024,
                  "us_per_entry": (time.process_time() - began) * 1e3}))
"""


def write_tars(folder: Path, entries: int) -> None:
    """Tars of `entries` pictures with a caption each; all hold the same names."""
    content = bytearray()
    for n in range(min(PER_TAR, entries)):
        for ending, text in ((".jpg", b""), (".txt", b"a caption")):
            member = tarfile.TarInfo(f"{n:09d}{ending}")
            member.size = len(text)
            content += member.tobuf(tarfile.USTAR_FORMAT)
            content += text.ljust(512 * bool(text), b"\0")
    for number in range(entries // PER_TAR):
        (folder / f"shard-{number:05d}.tar").write_bytes(content + bytes(1024))


def measure(folder: Path, cache: Path) -> dict[str, float]:
    """One process that needs the index."""
    command = [sys.executable, "-c", CHILD, str(folder), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--entries", type=int, default=1_000_000, help="pictures, by tens of thousands (1000000)"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place) / "data", Path(place) / "cache"
        folder.mkdir()
        began = time.perf_counter()
        write_tars(folder, args.entries)
        print(f"wrote {args.entries:,} pictures in {time.perf_counter() - began:.0f} s", flush=True)
        found = {"first": measure(folder, cache), "second": measure(folder, cache)}
        size = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file())
    for name, values in found.items():
        print(
            f"{name} process: {values['cpu_s']:.2f} s of processor ({values['wall_s']:.2f} s), "
            f"{values['more_mib']:.0f} MiB more, {values['us_per_entry']:.0f} us an entry"
        )
    print(f"on disk: {size / args.entries:.1f} bytes a picture")
    if args.json:
        facts = {"entries": args.entries, "bytes_each": size / args.entries, **found}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
