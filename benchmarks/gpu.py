"""A graphics card in one short run: tests, then time and memory of plain, eager and fast, as tables.

    bash benchmarks/gpu.sh --out FOLDER
    bash benchmarks/gpu.sh --dry-run

Tests come first, and a failing one ends the run: no number without parity. Every table and the JSON
are written as soon as they exist. B is plain diffusers in bf16, C `gendr` run eagerly, D its fast
path; E, in float32, is what they are compared with. What is tried last, if time is left, is what
may go: torch.compile, and D with the other memory order. With --dry-run all of it runs on the CPU
with a small model, with a recorder that re-executes, and the plan of the real run is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gendr import devices

from . import tables
from .compositions import NAMES, on_meta
from .macs import count_stages
from .pipeline import Failed, Worker, machine, said, save
from .tables import GIB, figure, table
from .weights import Model, choose
from .worker import Span, compare

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
SIZES, DRY_SIZES = (512, 1024, 2048, 4096), (64, 128)
# From this edge on a pass takes so long that one round of few passes has to do.
LARGE = 4096
# (size, tile asked for or 0, GiB that a plan may use or None) of whole restorations.
RESTORED = [
    *((512, 0, None), (1024, 0, None), (2048, 0, None)),
    *((4096, 0, 8.0), (4096, 768, 8.0), (8192, 0, 12.0)),
]
DRY_RESTORED = [(64, 0, None), (128, 0, None), (256, 64, 0.5)]
# What the real run is estimated to take, for its plan.
MINUTES = {
    "tests": 0.8, "weights": 0.4, "stages": 1.8, "start": 0.3, "restored": 1.2, "extras": 0.5
}  # fmt: skip
# Other ways of D, tried last: what shows no gain here can go.
EXTRAS = (("compile", {"speed": "compile"}), ("contiguous", {"order": "contiguous"}))
# As the workers of benchmarks.pipeline: carried packages lie behind the installed ones.
PATH = """
import os, sys
path = os.environ.get("GENDR_PATH")
sys.path[:] = path.split(os.pathsep) if path else sys.path
"""
PYTEST = PATH + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
START = """
import sys, time
began = time.perf_counter()
import torch, gendr
imported = time.perf_counter()
model = gendr.load(sys.argv[1], device=sys.argv[2], dtype=sys.argv[3], speed=sys.argv[4])
loaded = time.perf_counter()
size = int(sys.argv[5])
model.restore(torch.rand(1, 3, size, size), 4)
done = time.perf_counter()
print(imported - began, loaded - imported, done - loaded)
"""


class Run:
    """One run: what is asked for, how long it may take, and the results so far."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.began = args, time.monotonic()
        self.dry = args.dry_run
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.dtype = "fp32" if self.dry else "bf16"
        self.folder = args.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.result: dict[str, Any] = {
            "dry_run": self.dry,
            "machine": machine(argparse.Namespace(threads=0), self.device),
        }
        self.text = self.folder / "gpu.md"
        self.text.write_text("", encoding="utf-8")
        self.variants = "BCD"
        if importlib.util.find_spec("diffusers") is None:
            self.variants = "CD"
            self.tell("B, plain diffusers, is left out: diffusers is not installed here.\n")

    def left(self) -> float:
        """Minutes that remain."""
        return self.args.minutes - (time.monotonic() - self.began) / 60

    def tell(self, text: str) -> None:
        """To the person and to the file."""
        print(text, flush=True)
        with self.text.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def keep(self) -> None:
        self.result["minutes"] = self.args.minutes - self.left()
        save(self.result, self.folder / "gpu.json")

    def go(self) -> int:
        """All sections, each only if its share of the time is left. 1 = a test failed."""
        self.tell(self.plan())
        self.keep()
        failed = self.tests()
        if failed and not self.args.go_on:
            self.tell("The tests failed: nothing was measured.")
            self.keep()
            return 1
        if failed:
            self.tell("**The tests failed**: no number below holds without its parity.\n")
        with tempfile.TemporaryDirectory() as temporary:
            cache = self.args.cache or Path(temporary)
            model = choose("tiny" if self.dry else "full", cache, texts=False)
            self.result["model"] = model.title
            for section in ("peak", "stages", "start", "restored", "extras"):
                if self.left() < MINUTES.get(section, 0.1) / 3 and not self.dry:
                    self.tell(f"{section}: left out, {self.left():.1f} minutes remain.\n")
                    continue
                try:
                    getattr(self, section)(model)
                except Failed as error:
                    self.tell(f"{section}: ended early, {error}\n")
                self.keep()
        self.tell(self.goals())
        self.keep()
        return 1 if failed else 0

    def plan(self) -> str:
        """What will be done, with the counts that need no card."""
        facts = self.result["machine"]
        lines = [
            f"## {facts.get('gpu', 'CPU, dry run')}\n",
            f"{facts['date']}; torch {facts['torch']}, Triton {facts['triton']}, diffusers "
            f"{facts['diffusers']}; {self.args.minutes:g} minutes.\n",
            "The real run: tests/test_gpu.py; a large bf16 product for the card's own peak; variants "
            f"{', '.join(f'{v} ({NAMES[v]})' for v in 'BCD')} in turn at "
            f"{', '.join(map(str, SIZES))} px, {ROUNDS} rounds; `restore` to "
            f"{', '.join(str(size) for size, tile, _ in RESTORED if not tile)} px; the time from "
            "start to the first picture. Estimated "
            f"{', '.join(f'{name} {minutes:g}' for name, minutes in MINUTES.items())} minutes.\n",
        ]
        if self.dry:
            full = choose("full", None, texts=False)
            rows = [
                [size, figure(sum(self.macs(full, size, "C").values()) / 1e9)] for size in SIZES
            ]
            lines.append(table(["output", "GMAC of ours, full size"], rows))
        return "\n".join(lines)

    def tests(self) -> int:
        """The GPU tests in a process of their own; their exit code."""
        said("tests")
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        if self.dry:
            environment["GENDR_GPU_TESTS"] = "cpu"
        command = [sys.executable, "-c", PYTEST]
        command += ["tests/test_gpu.py", "-m", "gpu", "-rs", "-p", "no:cacheprovider"]
        if not self.args.compile:
            command += ["-k", "not compile"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        self.result["tests"] = {"code": done.returncode, "output": done.stdout[-20000:]}
        self.tell(f"```\n{done.stdout[-6000:].strip()}\n{done.stderr[-2000:].strip()}\n```\n")
        return done.returncode

    def macs(self, model: Model, size: int, letter: str) -> dict[str, int]:
        """Operations of each stage of one pass."""
        dtypes = (torch.bfloat16, torch.bfloat16)
        made, _ = on_meta(letter, model.config, model.tokens, dtypes)
        return count_stages(made.stages(), torch.empty(1, 3, size, size, device="meta"))[0]

    def peak(self, model: Model) -> None:
        """What the card reaches in one large product: the floor is counted with this, not a table."""
        n, dtype = (256, torch.float32) if self.dry else (8192, torch.bfloat16)
        a = torch.randn(n, n, device=self.device, dtype=dtype)
        spans = [Span(self.device).of(lambda t: t @ t, a)[1].milliseconds() for _ in range(12)]
        best = median(sorted(spans)[:6])
        self.result["tflops"] = 2 * n**3 / best / 1e9
        self.tell(f"Product of {n} x {n}: {self.result['tflops']:.1f} TFLOP/s reached.\n")

    def worker(self, model: Model, letter: str, kind: str, **options: str) -> Worker:
        return Worker(
            {
                "letter": letter,
                "kind": kind,
                "file": str(Path(model.file).resolve()),
                "text": None,
                "own_prompt": False,
                "device": str(self.device),
                "dtype": self.dtype,
                "threads": 0,
                "speed": "graph",
                "rerun": self.dry,
                **options,
            }
        )

    def stages(self, model: Model) -> None:
        """One pass of every variant in turn: milliseconds, share of the floor, memory, parity."""
        rows: list[dict[str, Any]] = []
        self.result["stages"] = rows
        workers = {v: self.worker(model, v, "variant") for v in self.variants + "E"}
        try:
            for worker in workers.values():
                worker.ask("load")
            for size in self.args.sizes:
                if self.left() < 1.2 and not self.dry:
                    self.tell(f"{size} px: left out, {self.left():.1f} minutes remain.\n")
                    continue
                said(f"{size} px: stages")
                row = self.compared(model, workers, size)
                rows.append(row)
                self.tell(self.stage_table(row))
                self.keep()
        finally:
            for worker in workers.values():
                worker.close()

    def compared(self, model: Model, workers: dict[str, Worker], size: int) -> dict[str, Any]:
        """All variants at one size; one that fails is named and goes on at the next."""
        row: dict[str, Any] = {"size": size, "variants": {}, "failed": {}}
        row["macs"] = {v: self.macs(model, size, "C" if v == "D" else v) for v in self.variants}
        saved = {v: self.folder / f".{v}.safetensors" for v in workers}
        large = size >= LARGE
        repeats = 2 if large else max(3, self.args.repeats // (1 + size // 1024))
        timed = {"size": size, "repeats": repeats} | ({"warm": 1} if large else {})
        for number in range(1 if large else ROUNDS):
            order = list(self.variants)
            for v in reversed(order) if number % 2 else order:
                if v in row["failed"]:
                    continue
                try:
                    answer = workers[v].ask("time", **timed)
                except Failed as error:
                    row["failed"][v] = str(error)
                    continue
                kept = row["variants"].setdefault(v, {"ms": {}, "rounds": []})
                for name, times in answer.pop("ms").items():
                    kept["ms"].setdefault(name, []).extend(times)
                    if name == "pass":
                        kept["rounds"].append(median(times))
                kept |= answer
        try:
            for v, worker in workers.items():
                if v in row["failed"] or size > self.args.parity:
                    continue
                answer = worker.ask("run", size=size, watch=True, save=str(saved[v]))
                if v in row["variants"]:
                    row["variants"][v] |= {key: answer[key] for key in ("peak", "before")}
                    row["variants"][v] |= {"saved": True}
            for v, at in row["variants"].items():
                if at.pop("saved", False) and saved["E"].exists():
                    at |= compare(saved[v], saved["E"])
        except Failed as error:
            row["failed"]["E"] = str(error)
        finally:
            for path in saved.values():
                path.unlink(missing_ok=True)
        return row

    def stage_table(self, row: dict[str, Any]) -> str:
        """One size. The sum of stages has a wait behind each; the pass has none inside."""
        flops = self.result.get("tflops")
        lines = []
        base = row["variants"].get("B", {}).get("rounds")
        for v, at in row["variants"].items():
            whole = median(at["ms"]["pass"])
            floor = 2 * sum(row["macs"][v].values()) / flops / 1e9 if flops else None
            ratios = [b / a for a, b in zip(at["rounds"], base, strict=False)] if base else []
            lines.append(
                [
                    f"{row['size']} {v}: {NAMES[v]}",
                    *(figure(median(at["ms"][s])) for s in ("encode", "UNet", "decode")),
                    f"{figure(whole)} ({figure(min(at['ms']['pass']))})",
                    f"{floor / whole:.0%} of {figure(floor)}" if floor else "-",
                    f"{median(ratios):.2f}" if ratios else "-",
                    f"{at['peak'] / GIB:.2f}" if "peak" in at else "-",
                    f"{at['reserved'] / GIB:.2f}" if "reserved" in at else "-",
                    f"{at['rel_l2']:.1e}" if "rel_l2" in at else "-",
                    tables.decibels(at["psnr"]) if "psnr" in at else "-",
                ]
            )
        head = ["output, variant", "encode ms", "UNet ms", "decode ms", "pass ms (min)"]
        head += ["share of floor ms", "times faster than B", "peak GiB", "reserved GiB"]
        head += ["rel-L2 to fp32", "PSNR dB"]
        notes = [f"{v} at {row['size']} px: {why}" for v, why in row["failed"].items()]
        notes += [note for at in row["variants"].values() for note in at.get("told", [])]
        return "\n".join([table(head, lines), *notes, ""])

    def restored(self, model: Model) -> None:
        """`GenDR.restore` as a person calls it, C and D in turn."""
        rows: list[dict[str, Any]] = []
        self.result["restored"] = rows
        workers = {v: self.worker(model, v, "model") for v in "CD"}
        try:
            for size, tile, limit in DRY_RESTORED if self.dry else RESTORED:
                if self.left() < 0.5 and not self.dry:
                    self.tell(
                        f"restore to {size} px: left out, {self.left():.1f} minutes remain.\n"
                    )
                    continue
                said(f"{size} px: restore")
                rows += self.pictures(workers, size, tile, limit)
                self.keep()
        finally:
            for worker in workers.values():
                worker.close()
        self.tell(self.restored_table(rows))

    def pictures(
        self, workers: dict[str, Worker], size: int, tile: int, limit: float | None
    ) -> list[dict[str, Any]]:
        """One size with both variants."""
        rows: dict[str, dict[str, Any]] = {}
        asked = {"size": size, "scale": 4.0, "tile": tile, "limit": limit}
        # The second picture of a size is what records graphs; it isn't counted either.
        repeats = 1 if self.dry else 2 if size > 2048 else 5
        for number in range(2 + repeats):
            for v, worker in workers.items():
                first = number == 1
                try:
                    answer = worker.ask("restore", **asked, reference=False, watch=first)
                except Failed as error:
                    rows.setdefault(v, {"seconds": []})["failed"] = str(error)
                    continue
                row = rows.setdefault(v, {"seconds": []})
                if number < 2:
                    row |= {**answer, "seconds": []}
                else:
                    row["seconds"].append(answer["wall"])
                    row["events"] = answer["events"]
        settings = {"asked_tile": tile, "limit_gib": limit}
        return [{**row, "variant": v, "size": size, **settings} for v, row in rows.items()]

    def restored_table(self, rows: list[dict[str, Any]]) -> str:
        """Seconds, seconds per megapixel, memory."""
        lines, base = [], {}
        for row in rows:
            if not row["seconds"]:
                lines.append([f"{row['size']} {row['variant']}: {row.get('failed')}"])
                continue
            each = median(row["seconds"]) / row["size"] ** 2 * 1e6
            base.setdefault(row["variant"], each)
            mode = row["mode"] + (
                f", {row['tiles']} of {row['tile'][1]}" if row["tiles"] > 1 else ""
            )
            lines.append(
                [
                    f"{row['size']} {row['variant']}: {NAMES[row['variant']]}",
                    mode,
                    tables.seconds(row["seconds"]),
                    figure(each),
                    f"{each / base[row['variant']]:.2f}",
                    f"{row['peak'] / GIB:.2f}",
                    "; ".join(row["events"]) or "-",
                ]
            )
        head = [
            "output, variant",
            "mode",
            "s (min)",
            "s/MP",
            "over the first",
            "peak GiB",
            "events",
        ]
        return table(head, lines)

    def extras(self, model: Model) -> None:
        """torch.compile, and D in torch's usual memory order, each on the smallest size."""
        rows: list[dict[str, Any]] = []
        self.result["extras"] = rows
        size = self.args.sizes[0]
        for name, options in EXTRAS:
            if self.left() < 0.4 and not self.dry:
                self.tell(f"{name}: left out, {self.left():.1f} minutes remain.\n")
                continue
            said(f"{size} px: {name}")
            worker = self.worker(model, "D", "variant", **options)
            try:
                answer = worker.ask("time", size=size, repeats=3 if self.dry else 10)
            except Failed as error:
                self.tell(f"{name}: {error}\n")
                continue
            finally:
                worker.close()
            rows.append({"name": name, "size": size, **answer})
            self.keep()
        lines = [[f"{r['size']} D, {r['name']}", figure(median(r["ms"]["pass"]))] for r in rows]
        self.tell(table(["output, variant", "pass ms"], lines))

    def start(self, model: Model) -> None:
        """From the start of a process to its first picture, with the weights on disk."""
        rows = {}
        size = 16 if self.dry else 128
        for name in ("eager", "graph"):
            began = time.perf_counter()
            words = [str(model.file), str(self.device), self.dtype, name, str(size)]
            done = subprocess.run(
                [sys.executable, "-c", PATH + START, *words],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                self.tell(f"start, {name}: {done.stderr.strip()[-400:]}\n")
                continue
            parts = [float(word) for word in done.stdout.split()[-3:]]
            rows[name] = [time.perf_counter() - began, *parts]
        self.result["start"] = rows
        head = ["start to first picture", "s", "import s", "load s", "first picture s"]
        self.tell(table(head, [[name, *map(figure, row)] for name, row in rows.items()]))

    def goals(self) -> str:
        """Each goal with what was measured."""
        stages = {row["size"]: row["variants"] for row in self.result.get("stages", [])}
        restored = [
            r for r in self.result.get("restored", []) if r["variant"] == "D" and r["seconds"]
        ]

        def whole(size: int, v: str) -> float | None:
            at = stages.get(size, {}).get(v)
            return median(at["ms"]["pass"]) if at else None

        def best(size: int, key: Any) -> float | None:
            return min((key(r) for r in restored if r["size"] == size), default=None)

        def each(size: int) -> float | None:
            return best(size, lambda r: median(r["seconds"]) / size**2)

        plain, fast = whole(512, "B"), whole(512, "D")
        small, large = each(512), each(8192)
        facts = [
            ("512 px, ms", 7, fast),
            ("B / D at 512 px (at least)", 4, plain / fast if plain and fast else None),
            ("1024 px, ms", 30, whole(1024, "D")),
            ("4096 px restored, s", 0.6, best(4096, lambda r: median(r["seconds"]))),
            ("4096 px, GiB", 8, best(4096, lambda r: r["peak"] / GIB)),
            ("s/MP at 8192 over 512 px", 1.3, large / small if small and large else None),
            ("8192 px, GiB", 12, best(8192, lambda r: r["peak"] / GIB)),
            (
                "start to first picture, s",
                3,
                min((row[0] for row in self.result.get("start", {}).values()), default=None),
            ),
        ]
        self.result["goals"] = {name: {"goal": goal, "found": found} for name, goal, found in facts}
        rows = []
        for name, goal, found in facts:
            met = found is not None and (found >= goal if "at least" in name else found <= goal)
            told = "not measured" if found is None else figure(found)
            rows.append([name, goal, told, "yes" if met else "no"])
        return table(["goal", "goal", "measured", "met"], rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash benchmarks/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out = os.environ.get("OUT") or "output/gpu"
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for tables and JSON")
    parser.add_argument("--minutes", type=float, default=5.0, help="end before this is over")
    parser.add_argument("--sizes", help="edges of one pass; default 512,1024,2048,4096")
    parser.add_argument("--repeats", type=int, default=20, help="timed passes of 512 px per round")
    parser.add_argument("--parity", type=int, default=2048, help="largest edge compared with fp32")
    parser.add_argument("--cache", type=Path, help="folder that keeps the random weights")
    parser.add_argument("--packages", help="folder with packages that the machine lacks")
    parser.add_argument("--compile", action="store_true", help="test torch.compile too, a minute")
    parser.add_argument(
        "--go-on", action="store_true", help="measure although a test fails, and say so: for a loan"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with a small model")
    args = parser.parse_args(argv)
    usual = DRY_SIZES if args.dry_run else SIZES
    args.sizes = [int(word) for word in args.sizes.split(",")] if args.sizes else list(usual)
    if args.dry_run:
        args.repeats = min(args.repeats, 3)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print(
            "benchmarks/gpu.sh: torch finds no GPU here; --dry-run runs on the CPU", file=sys.stderr
        )
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    devices.release(torch.device("cpu" if args.dry_run else "cuda"))
    return Run(args).go()


if __name__ == "__main__":
    sys.exit(main())
