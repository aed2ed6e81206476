"""How fast GenDR-Tiny trains in pixels here: crops per second of its steps, pairs per second of its processes.

    python -m benchmarks.restorer --pictures PICTURES --teacher FILE --device cuda --workers 14 --profile
    python -m benchmarks.restorer --pictures PICTURES --teacher FILE --device cpu --batch 2 --crop 64

Settings are those of `train/recipes/card.toml`; a row for each --batch, --crop and --features, without
and with the discriminators. The loss after the last step stands in the same row: one that is not finite,
or far from the others, was fast for nothing. `pairs` is what `--reuse` should make up for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train import recipe
from train.restorer import Training
from train.run import Run
from train.tiny.recorded import SIGHTS
from train.tiny.settings import Settings

from .tables import GIB, figure, table


def settings(args: argparse.Namespace, **more: Any) -> Settings:
    """The recipe's, with what is measured here."""
    precision = {"precision": "fp32"} if args.device == "cpu" else {}
    return recipe.build(
        Settings,
        recipe.read_recipe("card", "restorer"),
        {"pictures": str(args.pictures), "teacher": str(args.teacher), "init": str(args.init)},
        {"schedule": "constant_with_warmup", "workers": args.workers, **precision, **more},
    )


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device: torch.device, seconds: float, work: Any, warm: int = 1) -> tuple[float, int]:
    """Seconds of each call, and how often it was called; warm: calls that don't count."""
    for _ in range(warm):
        work()
    wait(device)
    began, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - began < seconds:
        work()
        count += 1
    wait(device)
    return (time.perf_counter() - began) / count, count


class Case:
    """A training that is not fed: the same batch again and again."""

    def __init__(self, args: argparse.Namespace, folder: Path, **more: Any):
        self.settings, self.device = settings(args, **more), torch.device(args.device)
        self.training = Training(self.settings, Run(folder, {}), self.device)
        data = self.training.data
        self.made: dict[str, Tensor] = next(data.pairs.batches(0, self.settings.batch))
        self.batch = data.whole(self.made)
        self.number = 0

    def teach(self) -> dict[str, Tensor]:
        return self.training.data.whole(self.made)

    def step(self) -> dict[str, float]:
        self.number += 1
        return self.training.accept(self.training.take(self.number, self.batch))


def steps(args: argparse.Namespace, batch: int, crop: int, features: str) -> list[list[Any]]:
    """Rows of one size: the teacher, and steps without and with discriminators."""
    rows = []
    device, shape = torch.device(args.device), {"batch": batch, "crop": crop}
    for name, more in (
        ("regression", {"adversarial_from": 1.1}),
        ("with discriminators", {"adversarial_from": 0.0, "alone": 0}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            case = Case(args, Path(folder), **shape, precision_features=features, **more)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            warm = SIGHTS + 2 if device.type == "cuda" else 1
            each, count = timed(device, args.seconds, case.step, warm)
            loss = case.step()["loss"]
            peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
            how = "recorded" if case.training.recorded.kept else "launched"
            words = [f"{batch} of {crop} px, features in {features}, {name}, {how}"]
            rows.append([*words, each * 1e3, batch / each, peak, loss, count])
            if name == "regression":
                each, count = timed(device, args.seconds / 4, case.teach)
                rows.append(
                    [f"{batch} of {crop} px, the teacher's results", each * 1e3, batch / each]
                )
            elif args.profile:
                profiled(case, args.profile)
                args.profile = None
    return rows


def profiled(case: Case, path: Path) -> None:
    """The kernels of three steps, longest first, into a file."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if case.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(3):
            case.step()
        wait(case.device)
    order = "self_cuda_time_total" if case.device.type == "cuda" else "self_cpu_time_total"
    path.write_text(found.key_averages().table(sort_by=order, row_limit=40), encoding="utf-8")


def pairs(args: argparse.Namespace, crop: int) -> float:
    """Pairs per second of all processes, after their start."""
    s = settings(args, crop=crop)
    with tempfile.TemporaryDirectory() as folder:
        data = Training(s, Run(Path(folder), {}), torch.device("cpu")).data.pairs
    batches = data.batches(0, s.batch, workers=args.workers)
    # Pictures are decoded once in each process.
    for _ in range(2 * max(1, args.workers)):
        next(batches)
    began, made = time.perf_counter(), 0
    while time.perf_counter() - began < max(args.seconds, 2.0):
        made += len(next(batches)["hr"])
    return made / (time.perf_counter() - began)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.restorer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pictures", type=Path, required=True, help="folder of pictures")
    parser.add_argument(
        "--teacher", type=Path, required=True, help="a restorer that spandrel reads"
    )
    embedded = Path("gendr/weights/gendr-tiny.safetensors")
    parser.add_argument("--init", type=Path, default=embedded, help="a GenDR-Tiny checkpoint")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", default="64", help="crops per step, separated by commas")
    parser.add_argument("--crop", default="192", help="pixels, separated by commas")
    parser.add_argument("--features", default="fp32", help="fp32,bf16")
    parser.add_argument("--workers", type=int, default=0, help="processes that make pairs")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--profile", type=Path, help="write the kernels of a step to this file")
    parser.add_argument("--json", type=Path, help="keep the numbers here")
    args = parser.parse_args(argv)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    head = [name, "ms", "crops per second", "peak GiB", "loss at the end", "times"]
    rows: list[list[Any]] = []
    sizes = ([int(word) for word in words.split(",")] for words in (args.batch, args.crop))
    for batch, crop, features in itertools.product(*sizes, args.features.split(",")):
        rows += steps(args, batch, crop, features)
        print(table(head, [shown(row, len(head)) for row in rows]), flush=True)
    for crop in (int(word) for word in args.crop.split(",")) if args.workers else ():
        rows.append([f"pairs of {crop} px, {args.workers} processes", None, pairs(args, crop)])
    print(table(head, [shown(row, len(head)) for row in rows]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"head": head, "rows": rows}, indent=1), encoding="utf-8")
    return 0


def shown(row: list[Any], width: int) -> list[str]:
    cells = ["-" if v is None else figure(v) if isinstance(v, float) else str(v) for v in row]
    return cells + ["-"] * (width - len(cells))


if __name__ == "__main__":
    sys.exit(main())
