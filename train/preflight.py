"""What can be known before a run's first step: a table, and "ready" or what is not.

    python -m train.preflight --recipe single_gpu --data PICTURES --out runs/repa
    python -m train.preflight --stage cida --recipe single_gpu --base BASE --data PICTURES --out runs/cida

Takes the words of the training command itself, on the machine that will run it. Looks at codecs,
pictures, captions, the speed of loading, memory and the disk, and takes one real step at the chosen
size of micro-batches (in a folder that is deleted again). --no-step leaves the step out, for a
machine without the card. Ends with 0 where a run can begin.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gendr.networks.blocks import Unset
from gendr.networks.unet import UNet
from train import cida, memory, recipe, repa
from train.atomic import program
from train.data import degradations
from train.data.index import Sources, cache_folder, find
from train.data.pictures import Degradation, Pictures
from train.data.shards import Pairs
from train.data.stream import ready_pairs
from train.processes import Processes
from train.run import Run
from train.stage1.networks import Foundation
from train.stage1.plan import plan as plan_of_stage1
from train.stage1.plan import unet_config
from train.stage2.networks import Networks
from train.stage2.plan import plan as plan_of_stage2
from train.stage2.plan import step_config

# Pictures whose sizes are looked at, and seconds that loading is measured.
LOOKED_AT, SECONDS = 200, 5.0
# A state of each network, the one before it, and the one being written.
STATES = 3
Settings = repa.Settings | cida.Settings


@dataclass
class Table:
    """Lines of the report, and what stands in the way of the run."""

    rows: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    # Pictures per second of one worker, at the slowest size; None where nothing is loaded.
    speed: float | None = None

    def add(self, name: str, found: str, note: str = "", wrong: str = "") -> None:
        self.rows.append((name, found, note))
        if wrong:
            self.wrong.append(wrong)

    def check(self, name: str, look: Callable[[], None]) -> None:
        """A look that may fail: its sentence is a line like the others."""
        try:
            look()
        except (*cida.ERRORS, RuntimeError, OSError, MemoryError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.add(name, "failed", "", f"{name}: {first}")


def sizes_of(settings: Settings) -> list[int]:
    """Pixels of the crops of a run."""
    return [settings.crop] if isinstance(settings, cida.Settings) else list(settings.sizes)


def damages(settings: Settings) -> bool:
    """Whether a run damages pictures itself."""
    return isinstance(settings, cida.Settings) or settings.refines


def check_machine(table: Table, processes: Processes) -> None:
    """Processors, threads, the card."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    table.add("processes", str(processes.count), f"{cores} processor cores, torch takes "
              f"{torch.get_num_threads()} threads in each")  # fmt: skip
    if (
        processes.count * torch.get_num_threads() > 2 * (cores or 1)
        and processes.device.type == "cpu"
    ):
        table.add("threads", "too many", "", "several processes share these cores: set "
                  "OMP_NUM_THREADS, or steps take many times as long")  # fmt: skip
    if processes.device.type == "cuda":
        facts = torch.cuda.get_device_properties(processes.device)
        table.add("device", facts.name, f"{facts.total_memory / memory.GIB:.1f} GiB")
        if not torch.cuda.is_bf16_supported():
            table.add("bf16", "missing", "", "this card has no bf16: give --precision fp32")
    else:
        table.add("device", processes.device.type, "")


def check_codecs(table: Table, settings: Settings) -> None:
    """Whether the degradations can be what their names say."""
    if not damages(settings) or (settings.data and ready_pairs(settings.data)):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        missing = degradations.missing(settings.mix)
    wrong = ""
    if missing and settings.codecs == "all":
        wrong = (
            f"codecs {', '.join(missing)} don't work here: install PyAV (pip install av), or give "
            "--codecs present"
        )
    table.add("codecs", f"missing {', '.join(missing)}" if missing else "all", settings.mix, wrong)


def check_data(table: Table, settings: Settings) -> None:
    """Numbers, captions, sizes, and how fast pictures come."""
    if not settings.data:
        table.add("data", "none", "", "no pictures: name them with --data")
        return
    if ready_pairs(settings.data):
        pairs = Pairs(settings.data[0], ("hr", "lr"))
        table.add("ready pairs", f"{len(pairs):,}", f"{pairs.size} px, {pairs.scale} times smaller")
        if max(sizes_of(settings)) > pairs.size:
            table.add("crops", "too large", "", f"the pairs have {pairs.size} px: lower the crop")
        return
    began = time.perf_counter()
    found = Sources([find(source, cache_folder()) for source in settings.data])
    seconds = time.perf_counter() - began
    table.add("pictures", f"{len(found):,}", f"indexed in {seconds:.1f} s")
    for n, (source, size) in enumerate(zip(settings.data, found.sizes, strict=True)):
        chance = (
            settings.weights[n] / sum(settings.weights) if settings.weights else size / len(found)
        )
        table.add(f"  {Path(source).name}", f"{size:,}", f"{100 * chance:.0f} % of the samples")
    have = found.captioned()
    wrong = ""
    captions = settings.prompts == "captions" and isinstance(settings, repa.Settings)
    if captions and have < settings.captioned * len(found):
        wrong = (
            f"only {have:,} of {len(found):,} pictures have a caption: add some, give --prompts a "
            "file of train.embeddings, or lower --captioned"
        )
    table.add("captions", f"{100 * have / len(found):.0f} %", f"prompts: {settings.prompts}", wrong)
    check_sizes(table, settings, found)
    check_loading(table, settings)


def check_sizes(table: Table, settings: Settings, found: Sources) -> None:
    """Short sides of some pictures, from their headers."""
    places = np.unique(np.linspace(0, len(found) - 1, LOOKED_AT).astype(int))
    shorts, bad = [], 0
    for at in places:
        try:
            with Image.open(io.BytesIO(found[int(at)].read())) as image:
                shorts.append(min(image.size))
        except (OSError, ValueError, Image.DecompressionBombError):
            bad += 1
    if not shorts:
        table.add("sizes", "none", "", "not one of the pictures that were looked at can be read")
        return
    low, middle, high = np.percentile(shorts, (10, 50, 90))
    crop = max(sizes_of(settings))
    share = float(np.mean([s < crop for s in shorts]))
    table.add(
        "short sides", f"{middle:.0f} px", f"a tenth below {low:.0f}, a tenth above {high:.0f}"
    )
    table.add("enlarged", f"{100 * share:.0f} %", f"shorter than the crop of {crop} px",
              f"{100 * share:.0f} % of the pictures are smaller than the crop of {crop} px and would be "
              "enlarged: lower the crop, or leave them out" if share > 0.5 else "")  # fmt: skip
    if bad:
        table.add("unreadable", f"{bad} of {len(places)}", "skipped while training")


def check_loading(table: Table, settings: Settings) -> None:
    """Pictures per second and core, as the workers load them."""
    how = Degradation("mixed", settings.mix, settings.scale) if damages(settings) else None
    span = getattr(settings, "span", 0.0) or None
    for crop in sorted(set(sizes_of(settings))):
        dataset = Pictures(
            settings.data, crop=crop, degradation=how, seed=1, span=span, cache=cache_folder()
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        count, began = 0, time.perf_counter()
        rng = np.random.default_rng(0)
        try:
            while time.perf_counter() - began < SECONDS:
                dataset[int(rng.integers(len(dataset)))]
                count += 1
        finally:
            torch.set_num_threads(threads)
        rate = count / (time.perf_counter() - began)
        cores = os.cpu_count() or 1
        most = min(settings.workers or 1, cores)
        table.add(f"loading {crop} px", f"{rate:.1f} /s", f"by one worker; {most} of them about "
                  f"{rate * most:.0f} pictures/s")  # fmt: skip
        table.speed = rate if table.speed is None else min(table.speed, rate)


def check_disk(table: Table, settings: Settings, out: Path) -> None:
    """Room for states and exports."""
    if isinstance(settings, cida.Settings):
        config = step_config(settings.generator or settings.base, settings.like).unet
    else:
        config = unet_config(settings)
    with torch.device("meta"):
        parameters = memory.parameters(UNet(config, operations=Unset))
    # Adapters, heads and projectors are a tenth of it, or less.
    state = parameters * 4 * (4 if settings.ema else 3)
    copies = 0
    if settings.export_every:
        total = settings.steps if isinstance(settings, cida.Settings) else sum(settings.steps)
        copies = total // settings.export_every
    need = STATES * state + copies * parameters * 2
    place = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    wrong = ""
    if free < need:
        wrong = (
            f"{place} has {memory.gib(free)} free and the run will need about {memory.gib(need)}: "
            "choose another --out, or a larger --export-every"
        )
    note = f"{memory.gib(state)} a state, {STATES} at a time, {copies} numbered models"
    table.add("disk", f"{memory.gib(free)} free", f"{memory.gib(need)} needed: {note}", wrong)


def check_validation(table: Table, s: cida.Settings) -> None:
    """The folder that stage 2 validates on, where one is given."""
    found = cida.held_out(s, None)
    known = sum(clean is not None for clean in found.clean)
    table.add("validation", f"{len(found.damaged)} pictures", f"{known} with an original")


def peak() -> float:
    """GiB that this process has taken at most, or the card where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / memory.GIB
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / memory.GIB


def one_step(table: Table, name: str, pictures: int, step: Callable[[], Any], world: int) -> None:
    """Seconds and memory of a step, and how many workers would feed it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    step()  # the first one builds what later ones find
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    rate = pictures / seconds
    table.add(
        name,
        f"{seconds:.2f} s",
        f"{pictures} pictures, {rate:.1f} /s a process, peak {peak():.2f} GiB",
    )
    if table.speed:
        workers = rate / table.speed
        cores = (os.cpu_count() or 1) / world
        wrong = ""
        if workers > cores:
            wrong = (
                f"{name}: {workers:.0f} workers a process would keep up, and there are {cores:.0f} cores "
                "for each: the card will wait for pictures; make smaller ones with train.shrink "
                "(stage 1), or ready pairs with train.pairs"
            )
        table.add("  workers for that", f"{workers:.1f}", "", wrong)


def steps_of_stage1(table: Table, s: repa.Settings, processes: Processes) -> None:
    """A step of each kind of phase."""
    foundation = Foundation.load(s, processes.device)
    seen = set()
    for phase in s.plan():
        if (phase.size, phase.micro_batch, phase.refine) in seen:
            continue
        seen.add((phase.size, phase.micro_batch, phase.refine))
        one = dataclasses.replace(
            s, phases=(phase.kind,), sizes=(phase.size,), micro_batch=(phase.micro_batch,), steps=(9,),
            lr=(phase.lr,), batch=phase.micro_batch * processes.count, workers=0, samples=1,
        )  # fmt: skip
        if processes.sharded and len(seen) > 1:
            # What is split once can't be split again.
            foundation = Foundation.load(s, processes.device)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(folder, {}, processes=processes)
            training = repa.Training(one, foundation, processes, run)
            name = f"step, {phase.kind} {phase.size} px"
            one_step(table, name, phase.micro_batch, lambda t=training: t.step(0), processes.count)


def step_of_stage2(table: Table, s: cida.Settings, processes: Processes) -> None:
    """A step of both halves of an iteration."""
    networks = Networks.load(s, processes.device)
    one = dataclasses.replace(s, batch=s.micro_batch * processes.count, workers=0)
    stream = cida.stream_of(one, processes)
    with tempfile.TemporaryDirectory() as folder:
        training = cida.Training(one, networks, processes, Run(folder, {}, processes=processes))
        batches = stream.batches()
        step = lambda: training.step(batches, 0)  # noqa: E731
        one_step(table, f"step, {s.crop} px", s.micro_batch * s.score_steps, step, processes.count)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", choices=("repa", "cida"), default="repa")
    first.add_argument("--no-step", action="store_true")
    own, rest = first.parse_known_args(words)
    if not any(w == "--out" or w.startswith("--out=") for w in rest) and "--help" not in rest:
        rest += ["--out", "."]
    kind = {"repa": repa.Settings, "cida": cida.Settings}[own.stage]
    doc = f"{__doc__}\n--stage repa (default) or cida; --no-step; and the options of the script:"
    chosen = recipe.parse(kind, own.stage, doc, rest, with_presets=own.stage == "cida")
    s, table = chosen.settings, Table()
    processes = Processes(chosen.device)
    table.check("machine", lambda: check_machine(table, processes))
    table.check("codecs", lambda: check_codecs(table, s))
    table.check("data", lambda: check_data(table, s))
    if own.stage == "cida" and s.validate:
        table.check("validation", lambda: check_validation(table, s))
    plan = plan_of_stage1 if own.stage == "repa" else plan_of_stage2
    planned: list[str] = []
    table.check("plan", lambda: planned.append(plan(s)))
    if not own.no_step and not table.wrong:
        step = steps_of_stage1 if own.stage == "repa" else step_of_stage2
        table.check("step", lambda: step(table, s, processes))
    table.check("disk", lambda: check_disk(table, s, chosen.out))
    if processes.first:
        print("\n\n".join([*planned, memory.table(table.rows)]))
        print()
        print("ready" if not table.wrong else "not ready:")
        for line in table.wrong:
            print(f"  {line}")
    return 1 if table.wrong else 0


if __name__ == "__main__":
    raise SystemExit(program("train.preflight", main))
