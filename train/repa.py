"""Stage 1: moves SD2.1 to a 16-channel latent, aligned with DINOv2, and teaches it quality terms.

    python -m train.repa --recipe single_gpu --data PICTURES --out runs/repa
    accelerate launch -m train.repa --recipe paper ...      # several processes
    accelerate launch --config_file train/recipes/fsdp2.yaml -m train.repa ...   # weights split among cards
    accelerate launch --config_file train/recipes/zero2_offload.yaml -m train.repa ...   # DeepSpeed

A run goes through phases one after another: `adapt` trains only the new convolutions and the
normalisations, `full` everything, `refine` everything on pictures with quality terms, damaged ones
among them. `sizes`, `steps`, `micro_batch` and `lr` give one value for each phase, or one for all.

Pictures are folders or tars with captions (train.data.pictures), or one folder of ready pairs (train.pairs).
SD2.1 and the VAE come from the hub, a folder or a file (train/README.md names the copies that there
are); --base "" trains GenDR-Tiny's UNet from nothing. Run the same command again to resume. The run
folder holds model.safetensors (averaged weights; the base of train.cida, and `gendr upscale` and
Load GenDR take it as well), projector.safetensors, a copy of the model at the end of every phase,
samples.png, step.png, log.jsonl, tensorboard/ and the state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from gendr.files import checkpoint
from gendr.files.header import Header
from gendr.networks.onestep import Unfolded
from train import recipe
from train.atomic import replacing
from train.data.index import DataError, Sources, cache_folder, find
from train.data.pictures import Degradation
from train.data.stream import Batch, Stream, codec_shares, look_once, ready_pairs
from train.embeddings import EmbeddingsError
from train.features import FeaturesError
from train.processes import Processes
from train.recipe import SettingsError
from train.run import Average, Meter, Run, TrainingError, numbered, rate
from train.stage1.engines import DeepSpeed, Plain, Sharded
from train.stage1.networks import Foundation
from train.stage1.plan import plan
from train.stage1.previews import Preview
from train.stage1.settings import FREE, Phase, Settings
from train.stage1.step import DAMAGED

# Tiles of the exported model, pixels, where crops are smaller (measured for GenDR-Tiny).
TILE = 512


class Training:
    """A stage 1 run: what is trained, and everything that a resumed one needs back."""

    def __init__(self, settings: Settings, foundation: Foundation, processes: Processes, run: Run):
        self.settings, self.foundation = settings, foundation
        self.processes, self.run = processes, run
        s, phases = settings, settings.plan()
        options = {
            "lr": phases[0].lr, "betas": (s.beta1, s.beta2), "weight_decay": s.weight_decay,
        }  # fmt: skip
        if processes.deepspeed:
            if len({p.micro_batch for p in phases}) > 1 or "adapt" in s.phases:
                raise SettingsError(
                    "DeepSpeed keeps one size of micro-batches and one set of trained weights: give "
                    "micro_batch one value and leave out adapt, or run each phase by itself"
                )
            micro = phases[0].micro_batch
            # Before DeepSpeed cuts the optimiser's state into pieces.
            self.average = self.averaging()
            self.engine: Plain | DeepSpeed = DeepSpeed(
                foundation.denoiser, options, s.clip, processes,
                micro_batch=micro, accumulation=s.batch // (micro * processes.count),
            )  # fmt: skip
        else:
            kind = Sharded if processes.sharded else Plain
            self.engine = kind(foundation.denoiser, options, s.clip, processes)
            # Of the pieces, where the network is split now.
            self.average = self.averaging()
        self.phase: Phase | None = None
        self.batches: Iterator[list[Batch]] = iter(())
        self.preview: Preview | None = None

    def averaging(self) -> Average | None:
        """The average of what is trained."""
        s = self.settings
        if not s.ema:
            return None
        place = "cpu" if s.ema_on_cpu else None
        return Average(self.foundation.denoiser, s.ema, device=place, every=s.ema_every)

    def parts(self) -> dict[str, Any]:
        """What a state holds beside the engine's own."""
        return {} if self.average is None else {"average": self.average}

    def enter(self, phase: Phase, number: int) -> None:
        """Get ready for a phase, at step `number` (from 0) of the run."""
        s, self.phase = self.settings, phase
        trained = adapted(self.foundation.denoiser) if phase.kind == "adapt" else None
        for p in self.foundation.denoiser.parameters():
            p.requires_grad_(trained is None or id(p) in trained)
        # In refinement the share is drawn with the picture, so that workers damage no others.
        share = DAMAGED if phase.refine else None
        stream = self.stream(s.data, phase, share)
        self.batches, self.meter = stream.batches(number), Meter(stream)
        self.preview = self.run.alone(lambda: self.look(phase))

    def look(self, phase: Phase) -> Preview:
        """The pictures that a phase is looked at by."""
        s = self.settings
        data = (s.validate,) if s.validate else s.data
        return Preview(self.foundation, self.stream(data, phase, 1.0).fixed(s.samples))

    def stream(self, data: tuple[str, ...], phase: Phase, share: float | None) -> Stream:
        """share: of the pictures that get a damaged copy; None = none does, nor is one needed."""
        s = self.settings
        damage = None if share is None else Degradation("mixed", s.mix, s.scale, share)
        return Stream(
            data,
            batch=s.batch,
            micro=phase.micro_batch,
            crop=phase.size,
            degradation=damage,
            seed=s.seed,
            workers=s.workers,
            rank=self.processes.index,
            world=self.processes.count,
            span=s.span or None,
            weights=s.weights if data == s.data else (),
            device=self.processes.device,
            cache=cache_folder(),
        )

    def step(self, number: int) -> dict[str, float]:
        """Step `number` (from 0); what was measured. TrainingError when the run is lost."""
        s, objective = self.settings, self.foundation.objective
        for phase in s.plan():
            if phase.first <= number < phase.last and phase != self.phase:
                self.enter(phase, number)
        micro = next(self.batches)
        samples = (objective.sample(b, refine=self.phase.refine) for b in micro)
        phase = self.phase
        lr = rate(
            phase.lr, number - phase.first, kind="constant_with_warmup", warmup=s.warmup,
            steps=phase.last - phase.first,
        )  # fmt: skip
        taken = self.engine.take(objective, samples, len(micro), lr)
        values = objective.halves(taken.values)
        # Not the whole loss: the alignment is negative, and a sum near zero has no scale.
        self.run.accept(values["diffusion"] if taken.finite else float("nan"))
        if taken.finite and self.average is not None:
            self.average.update()
        return {**values, "gradient": taken.norm, "lr": lr}

    # ---- what it yields ----

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the foundation's network is a whole one with the averaged weights; all
        processes enter it, the first looks."""
        trained = self.foundation.denoiser
        with self.engine.whole(self.average) as self.foundation.denoiser:
            try:
                yield
            finally:
                self.foundation.denoiser = trained

    def finish(self, step: int, *, look: bool) -> str:
        """Save, and with the averaged weights look and export; what was seen, in words."""
        self.engine.save(self.run, step, **self.parts())
        with self.averaged():
            return self.run.alone(lambda: self._finish(step, look=look)) or ""

    @torch.no_grad()
    def _finish(self, step: int, *, look: bool) -> str:
        text = ""
        if look and self.preview is not None:
            values, sheets = self.preview.look(self.run.folder)
            for sheet in sheets:
                numbered(sheet, self.run.folder / "sheets", step)
            self.run.show(step, *sheets)
            self.run.log(step, **{f"val_{k}": v for k, v in values.items()})
            text = "  ".join(f"{k} {v:.3f}" for k, v in values.items())
        self.export(step)
        return text

    def export(self, step: int) -> None:
        """model.safetensors and projector.safetensors; a copy where a phase ends here."""
        s, f, folder = self.settings, self.foundation, self.run.folder
        phase = next((p for p in s.plan() if p.last == step), None)
        facts = {
            "tile": max(TILE, *(p.size for p in s.plan() if p.first < step or not step)),
            "scale": s.scale,
            "licence": s.licence or f.licence,
            "bases": f.facts,
            "training_step": step,
            "prompts": f.prompts.fixed.texts,
        }
        unet = f.denoiser.unet
        network = Unfolded(f.config, f.vae, unet, f.prompts.fixed.embeds)
        path = folder / "model.safetensors"
        checkpoint.save(path, network, Header(config=f.config, name=s.name, **facts))
        if phase is not None and len(s.phases) > 1:
            n = s.plan().index(phase) + 1
            copy = folder / f"model-{n}-{phase.kind}-{phase.size}.safetensors"
            with replacing(copy) as part:
                shutil.copyfile(path, part)
        if s.export_every and step and step % s.export_every == 0:
            numbered(path, folder / "models", step)
        if f.denoiser.projector is not None:
            state = {k: v.detach().cpu() for k, v in f.denoiser.projector.state_dict().items()}
            with replacing(folder / "projector.safetensors") as part:
                save_file(state, part)


def adapted(denoiser: nn.Module) -> set[int]:
    """Parameters that `adapt` trains, by id: first and last convolution, GroupNorms, projector."""
    unet = denoiser.unet
    modules = [
        unet.conv_in,
        unet.conv_out,
        *(m for m in unet.modules() if isinstance(m, nn.GroupNorm)),
    ]
    if denoiser.projector is not None:
        modules.append(denoiser.projector)
    return {id(p) for m in modules for p in m.parameters()}


def check_captions(settings: Settings) -> str:
    """A sentence about captions that are missing; SettingsError where too many are."""
    if settings.prompts != "captions" or ready_pairs(settings.data):
        return ""
    found = Sources([find(source, cache_folder()) for source in settings.data])
    count, have = len(found), found.captioned()
    share = have / max(1, count)
    if share < settings.captioned:
        raise SettingsError(
            f"{have:,} of {count:,} pictures have a caption ({100 * share:.0f} %), and the run takes its "
            "prompts from them: add captions (NAME.txt beside each, or lines of a .jsonl), give "
            "--prompts a file of train.embeddings, or lower --captioned, and the others will be told "
            "quality terms"
        )
    if have == count:
        return ""
    return f"{count - have:,} of {count:,} pictures have no caption: they are told quality terms"


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
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with processes.one_first():
        look_once(settings.data)
    shares = codec_shares(settings.data, settings.mix, settings.codecs) if settings.refines else {}
    captions = check_captions(settings)
    foundation = Foundation.load(settings, processes.device)
    processes.same(foundation.denoiser)
    facts = {"sources": foundation.facts, "codec_shares": shares}
    config = {**dataclasses.asdict(settings), **facts}
    run = Run(out, config, free=(*FREE, "sources"), accept=accept, processes=processes)
    run.catch_signals(settings.hours)
    training = Training(settings, foundation, processes, run)
    first = training.engine.load(run, state, **training.parts())
    if captions:
        run.say(captions)
    last = settings.plan()[-1].last
    ends = {p.last for p in settings.plan()}
    step = finished = first
    for step in run.steps(first, last, images=settings.batch):
        started = time.perf_counter()
        values = training.step(step - 1)
        if step == 1 and training.preview is not None and (doubt := training.preview.doubt()):
            run.say(doubt)
        if step % settings.log_every == 0 or step == 1:
            seconds = time.perf_counter() - started
            if processes.device.type == "cuda":
                values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            values["waiting"] = training.meter.share()
            run.log(step, **values, images_per_second=settings.batch / seconds, skipped=run.skipped)
        numbers = [n for n in (settings.validate_every, settings.export_every) if n]
        if step in ends or any(step % n == 0 for n in numbers):
            run.say(f"step {step}: {training.finish(step, look=True)}")
            finished = step
        elif run.due(step, settings.save_every, settings.save_minutes):
            training.engine.save(run, step, **training.parts())
    if step != finished:
        run.say(f"step {step}: {training.finish(step, look=True)}")
    elif step == first:
        training.finish(step, look=False)
    return out / "model.safetensors"


def main(argv: list[str] | None = None) -> int:
    chosen = recipe.parse(Settings, "repa", __doc__, argv)
    try:
        if chosen.dry_run:
            print(plan(chosen.settings))
            return 0
        more = {"state": chosen.state, "accept": chosen.accept}
        print(train(chosen.settings, chosen.out, chosen.device, **more))
    except (
        TrainingError, DataError, SettingsError, FeaturesError, EmbeddingsError,
        checkpoint.CheckpointError, FileNotFoundError, ValueError,
    ) as error:  # fmt: skip
        print(f"train.repa: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
