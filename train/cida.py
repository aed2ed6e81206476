"""Stage 2: distils a diffusion base into a restorer of one step (CiDA, Eqs. 4 to 11).

    python -m train.cida --recipe single_gpu --base runs/repa/model.safetensors \\
        --data PICTURES --out runs/cida
    accelerate launch -m train.cida --recipe paper ...      # several processes

The base is a GenDR checkpoint (stage 1's model.safetensors), with 16 or 4 latent channels. Pictures
are damaged on the fly; a folder of ready pairs (train.pairs) is taken as it is. --preset chooses
the form of the distillation (the paper's Table 4), every other option is a setting of a recipe as well.
Run the same command again to resume. The run folder holds model.safetensors (averaged weights, for
`gendr upscale` and Load GenDR), adapters/ (both scores, as peft's folders), log.jsonl, tensorboard/,
sheet.png and the state.

The default departs from the paper's Eq. 8: printed, it pushes z_g away from the data (train/README.md
says why). --preset paper_literal is the equation as printed, with a stop when the run drifts off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from gendr.devices import Precision
from gendr.files import checkpoint
from gendr.model import GenDR
from gendr.networks.onestep import Unfolded
from gendr.restoration import NotFinite
from train import recipe
from train.data.pictures import DataError, Degradation
from train.data.stream import Batch, Stream
from train.evaluation.testset import InputError
from train.features import FeaturesError
from train.pixels import enlarge
from train.processes import Processes
from train.recipe import SettingsError
from train.run import Average, Run, TrainingError
from train.stage2.networks import Networks
from train.stage2.plan import plan
from train.stage2.settings import FREE, Settings
from train.stage2.step import Iteration, Sample
from train.stage2.validation import Validation

# Pictures to validate on where no folder is given.
HELD_OUT = 8
# What ends a run with a sentence instead of a traceback.
ERRORS = (
    TrainingError, DataError, SettingsError, InputError, FeaturesError,
    checkpoint.CheckpointError, FileNotFoundError, ValueError,
)  # fmt: skip


class Training:
    """A stage 2 run: networks, optimisers, and everything that a resumed one needs back."""

    def __init__(self, settings: Settings, networks: Networks, processes: Processes, run: Run):
        self.settings, self.networks = settings, networks
        self.processes, self.run = processes, run
        dtype = torch.bfloat16 if settings.precision == "bf16" else None
        self.iteration = Iteration(
            networks.generator,
            networks.scores,
            networks.heads,
            networks.prompt,
            networks.null,
            settings.rules,
            processes,
            seed=settings.seed,
            dtype=dtype,
        )
        s, rates = settings, {"generator": settings.lr, "heads": settings.lr_heads}
        self.parameters = self.iteration.trained()
        self.optimizers = {
            name: torch.optim.AdamW(
                parameters,
                lr=rates.get(name, s.lr_scores),
                betas=(s.beta1, s.beta2),
                weight_decay=s.weight_decay if name == "generator" else 0.0,
            )
            for name, parameters in self.parameters.items()
        }
        kinds = dict.fromkeys(self.optimizers, "constant_with_warmup")
        kinds["generator"] = s.schedule
        self.schedules = {
            name: get_scheduler(
                kinds[name], optimizer, num_warmup_steps=s.warmup, num_training_steps=s.steps
            )
            for name, optimizer in self.optimizers.items()
        }
        place = "cpu" if s.ema_on_cpu else None
        self.average = Average(networks.generator, s.ema, device=place) if s.ema else None
        self.start_distance = 0.0

    def parts(self) -> dict[str, Any]:
        """What a state consists of."""
        found: dict[str, Any] = {"generator": self.networks.generator, "guard": self}
        for adapter in ("real", "fake"):
            if adapter in self.parameters:
                found[adapter] = self.networks.adapter(adapter)
        if "heads" in self.parameters:
            found["heads"] = self.networks.heads
        if self.average is not None:
            found["average"] = self.average
        for name in self.optimizers:
            found[f"optimizer_{name}"] = self.optimizers[name]
            found[f"schedule_{name}"] = self.schedules[name]
        return found

    def state_dict(self) -> dict[str, float]:
        """The guard's own state."""
        return {"start_distance": self.start_distance}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.start_distance = state["start_distance"]

    # ---- steps ----

    @torch.no_grad()
    def sample(self, batch: Batch) -> Sample:
        """Pictures to latents (and features): what the iteration works on."""
        n, device = self.networks, self.processes.device
        hr = batch.hr.to(device)
        x = enlarge(batch.lr.to(device), self.settings.scale)
        with self.iteration.autocast():
            z_l, z_h = n.vae.encode(torch.cat([x, hr])).float().chunk(2)
            features = n.encoder(hr) if n.encoder is not None else None
        return Sample(z_l, z_h, features, batch.keys)

    def step(self, batches: Iterator[list[Batch]], number: int) -> dict[str, float]:
        """Generator step `number` (from 0) with its score steps; what was measured."""
        values: dict[str, float] = {}
        for _ in range(self.settings.score_steps):
            samples = [self.sample(b) for b in next(batches)]
            values |= self.iteration.score_step(samples)
            values |= self.apply([n for n in self.parameters if n != "generator"])
        values |= self.iteration.generator_step(samples, number)
        values |= self.apply(["generator"])
        self.watch(values, number)
        if self.average is not None:
            self.average.update()
        for schedule in self.schedules.values():
            schedule.step()
        return values

    def apply(self, names: list[str]) -> dict[str, float]:
        """Clip and step; all of them or, where a gradient isn't finite, none. Gradient norms."""
        norms = {
            f"gradient_{name}": nn.utils.clip_grad_norm_(self.parameters[name], self.settings.clip)
            for name in names
        }
        values = {name: float(norm) for name, norm in norms.items()}
        finite = all(math.isfinite(v) for v in values.values())
        for name in names:
            if finite:
                self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)
        return values

    def watch(self, values: dict[str, float], number: int) -> None:
        """Stop a run that is lost. TrainingError with the reason."""
        if number == 0:
            self.start_distance = values["distance"]
        limit = self.settings.drift * self.start_distance
        if values["distance"] > limit > 0:
            raise TrainingError(
                f"diverged: mean|z_g - z_h| is {values['distance']:.3g}, it was "
                f"{self.start_distance:.3g} at the first step (limit x{self.settings.drift:g}): "
                "raise lambda_mse, take target sr, or lower lr"
            )
        matched = [values[k] for k in ("score_fake", "score_real") if k in values]
        norms = [v for k, v in values.items() if k.startswith("gradient_")]
        finite = all(map(math.isfinite, norms))
        self.run.accept((sum(matched) if matched else values["mse"]) if finite else math.nan)

    # ---- what it yields ----

    def model(self) -> GenDR:
        """The restorer as it stands, in float32; holds the generator's own parameters."""
        n = self.networks
        network = Unfolded(n.config, n.vae, n.generator.unet, n.embeds())
        precision = Precision("fp32", torch.float32, torch.float32, "in training")
        return GenDR(network, header=n.header, precision=precision, device=self.processes.device)

    def export(self, step: int) -> None:
        """model.safetensors and both adapters, with the averaged weights."""
        if not self.run.writes:
            return
        model = self.model()
        header = {**self.networks.header, "name": self.settings.name, "training_step": step}
        checkpoint.save(self.run.folder / "model.safetensors", model.network, header)
        if self.networks.scores is not None:
            self.networks.scores.save(self.run.folder / "adapters")

    def finish(self, step: int, validation: Validation | None) -> str:
        """Validate, save and export with the averaged weights in place; the scores in words."""
        self.run.save_parts(step, **self.parts())
        text = ""
        context = self.average.swapped() if self.average is not None else contextlib.nullcontext()
        with context, torch.no_grad():
            if validation is not None and self.run.writes:
                try:
                    values = validation.scores(self.model(), self.run.folder / "sheet.png")
                except NotFinite as error:
                    raise TrainingError(
                        f"diverged: at step {step} the averaged generator gives NaN; lower lr"
                    ) from error
                self.run.log(step, **{f"val_{k}": v for k, v in values.items()})
                text = "  ".join(f"{k} {v:.3f}" for k, v in values.items())
            self.export(step)
        self.processes.wait()
        return text


def train(settings: Settings, out: Path, device: str = "auto") -> Path:
    """Run or resume; the exported file. TrainingError, DataError and others say why they stop it."""
    processes = Processes(device)
    torch.manual_seed(settings.seed)
    networks = Networks.load(settings, processes.device)
    processes.same(*networks.trained())
    stream = Stream(
        settings.data,
        batch=settings.batch,
        micro=settings.micro_batch,
        crop=settings.crop,
        degradation=Degradation("mixed", settings.mix, settings.scale),
        seed=settings.seed,
        workers=settings.workers,
        rank=processes.index,
        world=processes.count,
    )
    config = {**dataclasses.asdict(settings), "base_sha256": networks.sha256}
    run = Run(out, config, free=FREE, processes=processes)
    run.catch_signals()
    training = Training(settings, networks, processes, run)
    first = run.load_parts(**training.parts())
    validation = held_out(settings, stream)
    batches = stream.batches(first * settings.score_steps)
    if settings.target == "hr" and not settings.lambda_mse:
        run.say(
            "target hr without lambda_mse is Eq. 8 as printed: in closed form and in toys it drives "
            "z_g away from the data; the run stops by itself when it does"
        )
    step = finished = first
    for step in run.steps(first, settings.steps, images=settings.batch):
        started = time.perf_counter()
        values = training.step(batches, step - 1)
        if step % settings.log_every == 0 or step == 1:
            seconds = time.perf_counter() - started
            if processes.device.type == "cuda":
                values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            values["lora"] = networks.adapter_size()
            run.log(step, **values, images_per_second=settings.batch / seconds, skipped=run.skipped)
        if step % settings.validate_every == 0 or step == settings.steps:
            run.say(f"step {step}: {training.finish(step, validation)}")
            finished = step
        elif step % settings.save_every == 0:
            run.save_parts(step, **training.parts())
    if step != finished:
        run.say(f"step {step}: {training.finish(step, validation)}")
    elif step == first:
        training.finish(step, None)
    return out / "model.safetensors"


def held_out(settings: Settings, stream: Stream) -> Validation:
    """The pictures to validate on: a folder's, or fixed crops of the training pictures."""
    if settings.validate:
        return Validation.from_folders(settings.validate, settings.originals or None)
    batch = stream.fixed(HELD_OUT)
    return Validation.from_batch(batch.lr, batch.hr)


def main(argv: list[str] | None = None) -> int:
    chosen = recipe.parse(Settings, "cida", __doc__, argv, with_presets=True)
    try:
        if chosen.dry_run:
            print(plan(chosen.settings))
            return 0
        print(train(chosen.settings, chosen.out, chosen.device))
    except ERRORS as error:
        print(f"train.cida: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
