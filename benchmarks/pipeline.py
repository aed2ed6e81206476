"""Time, memory, operations and parity of one GenDR step, against what people would compose instead.

    python -m benchmarks.pipeline --model tiny --sizes 256,512 --repeats 5
    python -m benchmarks.pipeline --model full --sizes 256,512 --cache FOLDER --json result.json
    python -m benchmarks.pipeline --model full --dry-run

Every variant runs in a process of its own on the same weights; within a repeat the variants take
turns, in reversed order every second time, and ratios are taken within a repeat. See README.md
beside this file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gendr import devices

from . import tables
from .compositions import expressible, has_text_encoder, on_meta
from .macs import count_stages
from .weights import Model, choose
from .worker import compare

SECTIONS = ("pipeline", "strips", "growth")
# What kernels take for themselves, on top of the tensors that can be counted.
ROOM = 1.5
# Kinds of arithmetic that decide how fast half-size dtypes are on a CPU.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "i8mm")


# Carried packages lie behind the installed ones, which PYTHONPATH can't say (benchmarks/gpu.sh).
WORKER = (
    "import os, sys; path = os.environ.get('GENDR_PATH'); "
    "sys.path[:] = path.split(os.pathsep) if path else sys.path; "
    "from benchmarks import worker; worker.main()"
)


class Failed(RuntimeError):
    """A worker gave an error instead of numbers, or ended."""


class Worker:
    """A process of benchmarks.worker that is kept alive between requests."""

    def __init__(self, spec: dict[str, Any]):
        self.spec = spec
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One request and its answer. `Failed` with the worker's reason."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            raise Failed(f"the process ended with {code}; -9 means that memory ran out")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        """End the process and give its memory back."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


@dataclass
class Bench:
    """One run of this program: what was asked for, and the results so far."""

    args: argparse.Namespace
    model: Model
    precision: devices.Precision
    device: torch.device
    folder: Path
    result: dict[str, Any] = field(default_factory=dict)

    def spec(self, letter: str, kind: str) -> dict[str, Any]:
        """What a worker has to know."""
        return {
            "letter": letter,
            "kind": kind,
            "file": str(Path(self.model.file).resolve()),
            "text": self.model.text and str(Path(self.model.text).resolve()),
            "own_prompt": self.model.own_prompt,
            "device": str(self.device),
            "dtype": self.precision.name,
            "threads": self.args.threads,
        }

    def count(self) -> dict[str, Any]:
        """MACs, live tensors and weights of every variant at every size."""
        ours = (self.precision.vae, self.precision.unet)
        exact = (torch.float32, torch.float32)
        counted: dict[str, Any] = {}
        for letter in self.args.variants:
            made, weights = on_meta(
                letter, self.model.config, self.model.tokens, exact if letter in "AE" else ours
            )
            counted[letter] = {"weights": weights, "sizes": {}}
            for size in self.args.sizes:
                x = torch.empty(1, 3, size, size, device="meta")
                macs, peaks = count_stages(made.stages(), x)
                counted[letter]["sizes"][size] = {"macs": macs, "live": peaks}
        return counted

    def fits(self, size: int) -> str:
        """Empty, or why this size can't be measured here."""
        counted = [self.result["counts"][v] for v in self.args.variants]
        live = max(max(c["sizes"][size]["live"].values()) for c in counted)
        weights = sum(c["weights"] for c in counted)
        need, free = int(weights + ROOM * live), devices.free_bytes(self.device)
        if need > free:
            return f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return ""

    def pipeline(self) -> list[dict[str, Any]]:
        """Variants against each other, at every size that fits."""
        skipped = {size: self.fits(size) for size in self.args.sizes}
        rows: list[dict[str, Any]] = [
            {"size": size, "skipped": why} for size, why in skipped.items() if why
        ]
        workers = {v: Worker(self.spec(v, "variant")) for v in self.args.variants}
        try:
            for letter, worker in workers.items():
                said(f"loading variant {letter}")
                worker.ask("load")
            # The first pass ever pays for code and pages that come from the disk.
            first = min(self.args.sizes)
            for worker in workers.values():
                worker.ask("run", size=first, watch=False, save=None)
            for size in self.args.sizes:
                if not skipped[size]:
                    rows.append(self.compared(workers, size))
        finally:
            for worker in workers.values():
                worker.close()
        return sorted(rows, key=lambda row: row["size"])

    def compared(self, workers: dict[str, Worker], size: int) -> dict[str, Any]:
        """One size: a pass each for memory and the result, then the timed repeats."""
        row: dict[str, Any] = {"size": size, "variants": {}, "load": []}
        saved = {v: self.folder / f"{v}.safetensors" for v in workers}
        for letter, worker in workers.items():
            said(f"{size} px: variant {letter}, memory and result")
            answer = worker.ask("run", size=size, watch=True, save=str(saved[letter]))
            row["variants"][letter] = {**answer, "repeats": []}
        reference = "A" if "A" in workers else next(iter(workers))
        row["reference"] = reference
        for letter, path in saved.items():
            row["variants"][letter] |= compare(path, saved[reference])
        for path in saved.values():
            path.unlink()
        for repeat in range(self.args.repeats):
            said(f"{size} px: repeat {repeat + 1} of {self.args.repeats}")
            order = list(workers.items())
            for letter, worker in reversed(order) if repeat % 2 else order:
                answer = worker.ask("run", size=size, watch=False, save=None)
                row["variants"][letter]["repeats"].append(answer["stages"])
            row["load"].append(load())
        return row

    def strips(self) -> list[dict[str, Any]]:
        """The exact strips of the autoencoder against the whole."""
        worker = Worker(self.spec("C", "model"))
        try:
            rows = []
            for size in self.args.strips:
                said(f"{size} px: autoencoder whole and by strips")
                rows.append(
                    {
                        "size": size,
                        "ways": worker.ask("strips", size=size, repeats=self.args.repeats),
                        "load": [load()],
                    }
                )
            return rows
        finally:
            worker.close()

    def growth(self) -> list[dict[str, Any]]:
        """`GenDR.restore` of ever larger pictures, in a process of its own."""
        worker = Worker(self.spec("C", "model"))
        rows: list[dict[str, Any]] = []
        try:
            for size in self.args.growth:
                said(f"{size} px: restore")
                passes = [
                    worker.ask(
                        "restore",
                        size=size,
                        scale=self.args.scale,
                        reference=not n and size <= self.args.growth_parity,
                        # Watched once; reading the memory would take time from the others.
                        watch=not n,
                    )
                    for n in range(self.args.repeats + 1)
                ]
                rows.append({"size": size, **passes[0], "load": [load()]})
                rows[-1]["seconds"] = [p["wall"] for p in passes[1:]]
                rows[-1]["cpu_seconds"] = [p["cpu"] for p in passes[1:]]
            return rows
        finally:
            worker.close()


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def load() -> list[float] | None:
    """Load averages of the machine, where it tells."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def machine(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Facts that times depend on; nothing that names the machine."""
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": args.threads or torch.get_num_threads(),
        "load": load(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("diffusers", "transformers", "triton")},
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    if sys.platform.startswith("linux"):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        there = {word for line in text.splitlines() if ":" in line for word in line.split()}
        facts["flags"] = [flag for flag in CPU_FLAGS if flag in there]
    return facts


def notes(model: Model, variants: str) -> list[str]:
    """What a reader has to know about the variants of this model."""
    lines = []
    if not expressible(model.config.vae):
        lines.append(
            "Diffusers' AutoencoderKL has neither this autoencoder's patches nor its linear path "
            "nor a form without norms: A and B run our unfolded autoencoder plainly; their UNet is "
            "diffusers'."
        )
    if "A" in variants and not has_text_encoder(model.config.unet, model.tokens):
        lines.append("No public text encoder makes prompts of this shape: A runs none.")
    elif "A" in variants and not model.own_prompt:
        lines.append(
            "The file has no text encoder: A runs a random one of SD2.1's shape for its cost, and "
            "takes the file's prompt."
        )
    return lines


def said(text: str) -> None:
    """Progress, beside the tables."""
    print(text, file=sys.stderr, flush=True)


def sizes(text: str) -> list[int]:
    """'256,512' as numbers."""
    return [int(word) for word in text.split(",") if word]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="tiny", help="full, tiny, or a GenDR checkpoint")
    parser.add_argument("--sizes", type=sizes, default=[256, 512], help="edges of the output")
    parser.add_argument("--variants", default="ABC", help="of A, B, C, D, E, in any order")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="parts of the measurement")
    parser.add_argument("--strips", type=sizes, default=[1024], help="edges for the strips")
    parser.add_argument("--growth", type=sizes, help="edges for the growth; default by the model")
    parser.add_argument(
        "--growth-parity",
        type=int,
        default=1024,
        help="largest edge at which the growth is compared with one pass in float32",
    )
    parser.add_argument("--scale", type=float, default=4.0, help="enlargement of the growth")
    parser.add_argument("--dtype", default="auto", help="of B and C")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="per process; 0 = torch's choice")
    parser.add_argument("--cache", type=Path, help="folder that keeps random weights")
    parser.add_argument("--json", type=Path, help="file for every single number")
    parser.add_argument("--dry-run", action="store_true", help="the plan and the counts alone")
    args = parser.parse_args(argv)
    args.sections = [word for word in args.sections.split(",") if word]
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {unknown.pop()!r}: choose from {', '.join(SECTIONS)}")
    if not args.variants or set(args.variants) - set("ABCDE"):
        parser.error(f"variants are letters of ABCDE, got {args.variants!r}")
    if args.growth is None:
        args.growth = [512, 1024] if args.model == "full" else [512, 1024, 2048, 4096]
    if args.repeats < 1 or not args.sizes:
        parser.error("at least one size and one repeat are needed")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables as markdown, and return every number."""
    args = parse(argv)
    device = devices.choose_device(args.device)
    precision = devices.choose_precision(device, args.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = choose(args.model, None if args.dry_run else args.cache or folder)
        if off := [size for size in args.sizes if size % model.config.multiple]:
            raise SystemExit(
                f"sizes must be multiples of {model.config.multiple}, the variants take no others; "
                f"got {off[0]}"
            )
        bench = Bench(args, model, precision, device, folder)
        result = bench.result
        result |= {
            "model": model.title,
            "dtype": str(precision),
            "device": str(device),
            "machine": machine(args, device),
            "notes": notes(model, args.variants),
            "counts": bench.count(),
        }
        print(tables.header(result))
        print(tables.counts(result), flush=True)
        if args.dry_run:
            print(tables.plan(args, {size: bench.fits(size) for size in args.sizes}))
        else:
            for section in args.sections:
                result[section] = getattr(bench, section)()
                print(getattr(tables, section)(result), flush=True)
                save(result, args.json)
    if args.dry_run:
        save(result, args.json)
    return result


def save(result: dict[str, Any], path: Path | None) -> None:
    """Every number so far, as JSON."""
    if path is not None:
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


if __name__ == "__main__":
    main()
