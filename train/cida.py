"""Stage 2: distils a diffusion base into a restorer of one step (CiDA, Eqs. 4 to 11).

    python -m train.cida --recipe single_gpu --base runs/repa/model.safetensors \\
        --data PICTURES --out runs/cida
    accelerate launch -m train.cida --recipe paper ...      # several processes

The base is a GenDR checkpoint (stage 1's model.safetensors), with 16 or 4 latent channels. Pictures
are damaged on the fly; a folder of ready pairs (train.pairs) is taken as it is. --preset chooses
the form of the distillation (the paper's Table 4), every other option is a setting of a recipe as well.
Run the same command again to resume. The run folder holds model.safetensors (averaged weights, for
`gendr upscale` and Load GenDR), models/ (numbered copies of it), adapters/ (both scores, as peft's
folders), log.jsonl, tensorboard/, sheet.png, sheets/, the state and the one before it.

The default departs from the paper's Eq. 8: printed, it pushes z_g away from the data (train/README.md
says why). --preset paper_literal is the equation as printed, with a stop when the run drifts off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gendr.devices import Precision
from gendr.files import checkpoint
from gendr.model import GenDR
from gendr.networks.onestep import Unfolded
from gendr.restoration import NotFinite
from train import recipe
from train.data.index import DataError, cache_folder
from train.data.pictures import Degradation
from train.data.stream import Batch, Stream, codec_shares, look_once
from train.embeddings import EmbeddingsError, encode_all
from train.evaluation.niqe import Niqe
from train.evaluation.testset import InputError
from train.features import FeaturesError
from train.pixels import enlarge, in_parts
from train.processes import Processes
from train.recipe import SettingsError
from train.run import Average, Meter, Run, TrainingError, numbered, rate
from train.stage2.networks import Networks
from train.stage2.plan import plan
from train.stage2.settings import FREE, Settings
from train.stage2.step import Iteration, Sample
from train.stage2.validation import Validation

# Pictures to validate on where no folder is given.
HELD_OUT = 8
# What ends a run with a sentence instead of a traceback.
ERRORS = (
    TrainingError, DataError, SettingsError, InputError, FeaturesError, EmbeddingsError,
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
        s = settings
        self.parameters = self.iteration.trained()
        self.optimizers = {
            name: torch.optim.AdamW(
                parameters,
                betas=(s.beta1, s.beta2),
                weight_decay=s.weight_decay if name == "generator" else 0.0,
                # Without it the step makes copies of all moments: 3 GiB at full size.
                fused=processes.device.type == "cuda",
            )
            for name, parameters in self.parameters.items()
        }
        place = "cpu" if s.ema_on_cpu else None
        self.average = None
        if s.ema:
            self.average = Average(networks.generator, s.ema, device=place, every=s.ema_every)
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
        n, features, context = self.networks, None, None
        both = torch.cat([enlarge(batch.lr, self.settings.scale), batch.hr])
        with self.iteration.autocast():
            z = torch.cat([n.vae.encode(part) for part in in_parts(both)])
            if n.encoder is not None:
                features = torch.cat([n.encoder(part) for part in in_parts(batch.hr)])
        z_l, z_h = z.float().chunk(2)
        if n.text is not None:
            # Those without a caption are told what all are told otherwise.
            said = torch.tensor([bool(c) for c in batch.captions], device=z.device)[:, None, None]
            context = torch.where(said, encode_all(n.text, batch.captions), n.prompt)
        return Sample(z_l, z_h, features, batch.keys, context)

    def step(self, batches: Iterator[list[Batch]], number: int) -> dict[str, float]:
        """Generator step `number` (from 0) with its score steps; what was measured."""
        values: dict[str, float] = {}
        for _ in range(self.settings.score_steps):
            samples = [self.sample(b) for b in next(batches)]
            values |= self.iteration.score_step(samples)
            values |= self.apply([n for n in self.parameters if n != "generator"], number)
        values |= self.iteration.generator_step(samples, number)
        values |= self.apply(["generator"], number)
        self.watch(values, number)
        if self.average is not None:
            self.average.update()
        return {**values, "lr": self.optimizers["generator"].param_groups[0]["lr"]}

    def rate(self, name: str, number: int) -> float:
        """Learning rate of a network at step `number` (from 0)."""
        s = self.settings
        peak = {"generator": s.lr, "heads": s.lr_heads}.get(name, s.lr_scores)
        kind = s.schedule if name == "generator" else "constant_with_warmup"
        return rate(peak, number, kind=kind, warmup=s.warmup, steps=s.steps)

    def apply(self, names: list[str], number: int) -> dict[str, float]:
        """Clip and step; all of them or, where a gradient isn't finite, none. Gradient norms."""
        norms = {
            f"gradient_{name}": nn.utils.clip_grad_norm_(self.parameters[name], self.settings.clip)
            for name in names
        }
        values = {name: float(norm) for name, norm in norms.items()}
        finite = all(math.isfinite(v) for v in values.values())
        for name in names:
            for group in self.optimizers[name].param_groups:
                group["lr"] = self.rate(name, number)
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
                "raise lambda_mse (--accept lambda_mse --lambda-mse 1), take target sr, or lower lr"
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
        """model.safetensors and both adapters; a numbered copy of the model now and then."""
        model, folder = self.model(), self.run.folder
        header = dataclasses.replace(
            self.networks.header, name=self.settings.name, training_step=step
        )
        checkpoint.save(folder / "model.safetensors", model.network, header)
        if self.networks.scores is not None:
            self.networks.scores.save(folder / "adapters")
        every = self.settings.export_every
        if every and (step % every == 0 or step == self.settings.steps):
            numbered(folder / "model.safetensors", folder / "models", step)

    def finish(self, step: int, validation: Validation | None) -> str:
        """Validate, save and export with the averaged weights in place; the scores in words."""
        self.run.save_parts(step, **self.parts())
        return self.run.alone(lambda: self._finish(step, validation)) or ""

    @torch.no_grad()
    def _finish(self, step: int, validation: Validation | None) -> str:
        text = ""
        with self.average.swapped() if self.average is not None else contextlib.nullcontext():
            if validation is not None:
                sheet = self.run.folder / "sheet.png"
                try:
                    values = validation.scores(self.model(), sheet)
                except NotFinite as error:
                    raise TrainingError(
                        f"diverged: at step {step} the averaged generator gives NaN; lower lr"
                    ) from error
                numbered(sheet, self.run.folder / "sheets", step)
                self.run.show(step, sheet)
                self.run.log(step, **{f"val_{k}": v for k, v in values.items()})
                text = "  ".join(f"{k} {v:.3f}" for k, v in values.items())
            self.export(step)
        return text


def train(
    settings: Settings,
    out: Path,
    device: str = "auto",
    *,
    state: Path | None = None,
    accept: Sequence[str] = (),
) -> Path:
    """Run or resume; the exported file. TrainingError, DataError and others say why they stop it.

    state: to go on from, if not the last one; accept: settings that may differ from the run's own.
    """
    processes = Processes(device)
    if processes.deepspeed:
        raise SettingsError(
            "stage 2 trains four sets of weights in one step, which DeepSpeed can't: launch with "
            "train/recipes/ddp.yaml"
        )
    if processes.sharded:
        raise SettingsError(
            "stage 2 can't be split by FSDP: generator and scores take their gradients one after "
            "another from passes of their own, the scores on one frozen base, which FSDP would put "
            "together and throw away for each of them. Launch with train/recipes/ddp.yaml; where a "
            "card is too small: --ema-on-cpu --recompute --micro-batch 1, as single_gpu has it"
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(settings.seed)
    with processes.one_first():
        look_once(settings.data)
    shares = codec_shares(settings.data, settings.mix, settings.codecs)
    networks = Networks.load(settings, processes.device)
    processes.same(*networks.trained())
    stream = stream_of(settings, processes)
    facts = {"base_sha256": networks.sha256, "codec_shares": shares}
    config = {**dataclasses.asdict(settings), **facts}
    run = Run(out, config, free=FREE, accept=accept, processes=processes)
    run.catch_signals(settings.hours)
    training = Training(settings, networks, processes, run)
    first = run.load_parts(state, **training.parts())
    validation = run.alone(lambda: held_out(settings, stream))
    batches = stream.batches(first * settings.score_steps)
    if settings.target == "hr" and not settings.lambda_mse:
        run.say(
            "target hr without lambda_mse is Eq. 8 as printed: in closed form and in toys it drives "
            "z_g away from the data; the run stops by itself when it does"
        )
    if not settings.validate:
        run.say(
            "validating on crops of the training pictures: give --validate (and --originals) a folder "
            "of pictures that are not trained on"
        )
    meter = Meter(stream)
    step = finished = first
    for step in run.steps(first, settings.steps, images=settings.batch):
        started = time.perf_counter()
        values = training.step(batches, step - 1)
        if step % settings.log_every == 0 or step == 1:
            seconds = time.perf_counter() - started
            if processes.device.type == "cuda":
                values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            values |= {"lora": networks.adapter_size(), "waiting": meter.share()}
            run.log(step, **values, images_per_second=settings.batch / seconds, skipped=run.skipped)
        numbers = [n for n in (settings.validate_every, settings.export_every) if n]
        if step == settings.steps or any(step % n == 0 for n in numbers):
            run.say(f"step {step}: {training.finish(step, validation)}")
            finished = step
        elif run.due(step, settings.save_every, settings.save_minutes):
            run.save_parts(step, **training.parts())
    if step != finished:
        run.say(f"step {step}: {training.finish(step, validation)}")
    elif step == first:
        training.finish(step, None)
    return out / "model.safetensors"


def stream_of(settings: Settings, processes: Processes) -> Stream:
    """The pictures of a run."""
    return Stream(
        settings.data,
        batch=settings.batch,
        micro=settings.micro_batch,
        crop=settings.crop,
        degradation=Degradation("mixed", settings.mix, settings.scale),
        seed=settings.seed,
        workers=settings.workers,
        rank=processes.index,
        world=processes.count,
        weights=settings.weights,
        device=processes.device,
        cache=cache_folder(),
    )


def held_out(settings: Settings, stream: Stream | None) -> Validation:
    """The pictures to validate on: a folder's, or fixed crops of the training pictures (stream)."""
    niqe = Niqe(Path(settings.niqe)) if settings.niqe else None
    if settings.validate:
        found = Validation.from_folders(settings.validate, settings.originals or None, niqe)
    else:
        batch = stream.fixed(HELD_OUT)
        found = Validation.from_batch(batch.lr, batch.hr, niqe)
    found.check(settings.scale)
    return found


def main(argv: list[str] | None = None) -> int:
    chosen = recipe.parse(Settings, "cida", __doc__, argv, with_presets=True)
    try:
        if chosen.dry_run:
            print(plan(chosen.settings))
            return 0
        more = {"state": chosen.state, "accept": chosen.accept}
        print(train(chosen.settings, chosen.out, chosen.device, **more))
    except ERRORS as error:
        print(f"train.cida: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
