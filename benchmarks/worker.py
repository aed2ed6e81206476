"""One process of a measurement: one variant, driven line by line by benchmarks.pipeline.

Not for hand use. The first argument is a JSON object that says what to load; then every line of the
input is a JSON request, and every line of the output its JSON answer.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import gendr
from gendr import devices
from gendr.files import checkpoint
from gendr.networks.onestep import StepConfig
from gendr.networks.strips import Strips
from gendr.speed.runners import Graphed, Speed

from .compositions import Ours, Plain, plain_unet, plain_vae
from .memory import Watch
from .rerun import Rerun
from .weights import load_text

# Passes before the first that is timed: kernels are loaded and chosen, graphs recorded.
WARM = 3

Answer = dict[str, Any]
Distance = dict[str, float | None]


class Variant:
    """One composition of the step with its weights, run stage by stage."""

    def __init__(self, spec: dict[str, Any]):
        self.device = torch.device(spec["device"])
        self.made = ours(spec).made if spec["letter"] in "CDE" else plain(spec, self.device)

    @torch.inference_mode()
    def run(self, size: int, watch: bool, save: str | None) -> Answer:
        """One pass: seconds of wall and process time per stage; memory only where it is watched.

        save: a file for the result, which the parent compares.
        """
        x = (2 * picture(size) - 1).to(self.device)
        memory = Watch(self.device)
        stages = {}
        if watch:
            memory.__enter__()
        for name, run in self.made.stages():
            started = clock(self.device)
            x = run(x)
            stages[name] = [b - a for a, b in zip(started, clock(self.device), strict=True)]
        answer: Answer = {"stages": stages}
        if watch:
            memory.__exit__()
            answer |= {"peak": memory.bytes, "before": memory.before}
        if save:
            save_file({"result": x.float().cpu().contiguous()}, save)
        return answer

    @torch.inference_mode()
    def time(self, size: int, repeats: int, warm: int = WARM) -> Answer:
        """Milliseconds of every stage and of the whole pass, by the device's own clock.

        The device is idle before each pass, so that launches count. Each pass has another input.
        warm: passes before the first that is timed.
        """
        inputs = [(2 * picture(size, seed) - 1).to(self.device) for seed in range(3)]
        times: dict[str, list[float]] = {"pass": []}
        whole = self.made.whole()
        for repeat in range(-warm, repeats):
            x = inputs[repeat % len(inputs)]
            row = {"pass": Span(self.device).of(whole, x)[1]}
            for name, run in self.made.stages():
                x, row[name] = Span(self.device).of(run, x)
            for name, span in row.items():
                if repeat >= 0:
                    times.setdefault(name, []).append(span.milliseconds())
        answer: Answer = {"ms": times, "told": sorted(set(getattr(self.made, "told", [])))}
        if self.device.type == "cuda":
            answer["reserved"] = torch.cuda.max_memory_reserved(self.device)
        return answer


class Span:
    """Time on the device between two points, without waiting for it there."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"

    def of(self, run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Span]:
        """run(x), timed."""
        devices.synchronize(self.device)
        self.start = self.now()
        y = run(x)
        self.end = self.now()
        return y, self

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> float:
        if not self.cuda:
            return 1000 * (self.end - self.start)
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


class Model:
    """The model as `gendr` loads it: for restoring whole pictures and for decoding by strips."""

    def __init__(self, spec: dict[str, Any]):
        self.spec, self.device = spec, torch.device(spec["device"])
        memory, started = Watch(self.device), clock(self.device)
        wanted = spec.get("speed", "graph") if spec["letter"] == "D" else "eager"
        with memory:
            self.loaded = gendr.load(
                spec["file"], device=spec["device"], dtype=spec["dtype"], speed=wanted
            )
        wall, cpu = (b - a for a, b in zip(started, clock(self.device), strict=True))
        self.took: Answer = {"wall": wall, "cpu": cpu, "peak": memory.bytes}
        if spec.get("order") == "contiguous":
            self.loaded.network.to(memory_format=torch.contiguous_format)
        if wanted == "graph" and spec.get("rerun"):
            # A dry run: everything but the card.
            model = self.loaded
            model.runner = Graphed(model.network, self.device, recorder=Rerun())
            model.speed = Speed("graph")
        self.made = Ours(self.loaded.network, self.loaded.runner)

    def loading(self) -> Answer:
        """Seconds and peak memory of `gendr.load`."""
        return self.took

    def restore(
        self,
        size: int,
        scale: float,
        reference: bool,
        watch: bool,
        tile: int = 0,
        limit: float | None = None,
        warm: bool = True,
    ) -> Answer:
        """`GenDR.restore` to size x size; reference: also in float32 and one pass, to compare.

        warm: a small picture first, which is no small one for a model with a least size.
        limit: GiB that weights and everything else may take; None = what is free.
        """
        image = picture(round(size / scale))
        options: dict[str, Any] = {"tile": tile}
        if limit is not None:
            weights = sum(p.numel() * p.element_size() for p in self.loaded.network.parameters())
            options["free_bytes"] = max(0, int(limit * 2**30) - weights)
        if warm:
            self.loaded.restore(image[..., :16, :16], scale)
        memory = Watch(self.device)
        if watch:
            memory.__enter__()
        started = clock(self.device)
        y, report = self.loaded.restore_with_report(image, scale, **options)
        wall, cpu = (b - a for a, b in zip(started, clock(self.device), strict=True))
        answer = {"wall": wall, "cpu": cpu, **report.as_dict()}
        if watch:
            memory.__exit__()
            answer |= {"peak": memory.bytes, "before": memory.before}
        if reference:
            exact = gendr.load(self.spec["file"], device=self.spec["device"], dtype="fp32")
            answer |= distance(y, exact.restore(image, scale, tile=size), span=1.0)
        return answer

    @torch.inference_mode()
    def strips(self, size: int, repeats: int) -> Answer:
        """Encode and decode, whole and by strips in turn, against the whole in float32."""
        network = self.loaded.network
        x = (2 * picture(size) - 1).to(self.device)
        z = network.encode(x)
        strips = Strips(network)
        ways: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
            "encode": {"whole": network.encode, "strips": strips.encode},
            "decode": {"whole": network.decode, "strips": strips.decode},
        }
        exact = gendr.load(self.spec["file"], device=self.spec["device"], dtype="fp32").network
        answer: Answer = {}
        for stage, both in ways.items():
            given = x if stage == "encode" else z
            reference = getattr(exact, stage)(given)
            for way, run in both.items():
                with Watch(self.device) as memory:
                    result = run(given)
                answer[f"{stage}, {way}"] = {
                    "peak": memory.bytes - memory.before,
                    "wall": [],
                    "cpu": [],
                    **distance(result, reference),
                }
            for repeat in range(repeats):
                order = list(both.items())
                for way, run in reversed(order) if repeat % 2 else order:
                    started = clock(self.device)
                    run(given)
                    times = (b - a for a, b in zip(started, clock(self.device), strict=True))
                    row = answer[f"{stage}, {way}"]
                    for key, value in zip(("wall", "cpu"), times, strict=True):
                        row[key].append(value)
        return answer


def ours(spec: dict[str, Any]) -> Model:
    """Variants C, D and E."""
    return Model({**spec, "dtype": "fp32"} if spec["letter"] == "E" else spec)


def plain(spec: dict[str, Any], device: torch.device) -> Plain:
    """Variants A and B, from the same file."""
    config = StepConfig.from_dict(checkpoint.describe(spec["file"])["config"])
    users = spec["letter"] == "A"
    wanted = devices.choose_precision(device, "fp32" if users else spec["dtype"])
    parts = checkpoint.split(checkpoint.read(Path(spec["file"]))[1])
    networks = []
    for make, state, dtype in (
        (lambda: plain_unet(config.unet), parts["unet"], wanted.unet),
        (lambda: plain_vae(config.vae), parts["vae"], wanted.vae),
    ):
        with torch.device("meta"):
            network = make()
        state = {k: v.to(device, dtype) for k, v in state.items()}
        network.load_state_dict(state, strict=True, assign=True)
        networks.append(network.requires_grad_(False).eval())
    text = load_text(Path(spec["text"])).to(device) if users and spec["text"] else None
    return Plain(
        config,
        *networks,
        parts["embeds"]["positive"].to(device, wanted.unet),
        dtypes=(wanted.vae, wanted.unet),
        by_scheduler=users,
        text=text,
        own_prompt=spec["own_prompt"],
    )


def picture(size: int, seed: int = 0) -> Tensor:
    """A picture 1 3 size size in [0, 1], the same every time: noise at every scale."""
    generator = torch.Generator().manual_seed(size + 65537 * seed)
    total = torch.full((1, 3, size, size), 0.5)
    for edge in (4, 16, 64, 256, 1024):
        if edge <= size:
            noise = torch.randn(1, 3, edge, edge, generator=generator)
            total += 0.1 * F.interpolate(noise, (size, size), mode="bicubic")
    return total.clamp(0, 1)


def clock(device: torch.device) -> tuple[float, float]:
    """Wall time and this process's time, when the device is done."""
    devices.synchronize(device)
    return time.perf_counter(), time.process_time()


def distance(y: Tensor, reference: Tensor, *, span: float = 2.0) -> Distance:
    """Relative L2 error, and PSNR in dB for values that span this much (None: nothing differs)."""
    y, reference = y.double().cpu(), reference.double().cpu()
    mse = float((y - reference).square().mean())
    return {
        "rel_l2": float((y - reference).norm() / reference.norm()),
        "psnr": 10 * math.log10(span**2 / mse) if mse else None,
    }


def compare(a: Path, b: Path) -> Distance:
    """`distance` of two saved results."""
    return distance(load_file(a)["result"], load_file(b)["result"])


def serve(spec: dict[str, Any], requests: Iterable[str]) -> Iterator[Answer]:
    """An answer for every request; what fails is answered with its reason."""
    target: Any = None
    for line in requests:
        request = json.loads(line)
        try:
            if target is None:
                target = (Variant if spec["kind"] == "variant" else Model)(spec)
            name = request.pop("do")
            yield {"ready": True} if name == "load" else getattr(target, name)(**request)
        except Exception as error:
            traceback.print_exc()
            yield {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    # Answers have the output to themselves; what libraries print goes to the errors.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    if spec.get("threads"):
        torch.set_num_threads(spec["threads"])
    for answer in serve(spec, sys.stdin):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
