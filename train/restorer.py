"""Trains the first one-step generator of a small GenDR in pixels: encoder, UNet and decoder together.

    python -m train.pairs --data PICTURES --out PAIRS --count 24576 --mix tiny [--teacher ...]
    python -m train.autoencoder --data PAIRS --out runs/autoencoder
    python -m train.restorer --data PAIRS --autoencoder runs/autoencoder --out runs/restorer

or, from an existing model, with pairs of all scales made as training goes:

    python -m train.restorer --pictures PICTURES --init gendr/weights/gendr-tiny.safetensors \\
        --out runs/finer --teacher-share 0 --perceptual 1

Run the same command again to resume. The target is the clean crop, the result of a frozen teacher
on the damaged one (where the shards hold it), or a mixture of both. A share of every batch goes
through the autoencoder alone, so that the latent stays one: `detail` 0 must give the input back,
and distillation (train.cida) needs latents of clean pictures.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gendr.devices import choose_device
from gendr.files import checkpoint
from gendr.networks.onestep import Unfolded
from gendr.networks.unet import TINY_UNET, UNet
from gendr.networks.vae import TINY_VAE, VAE
from train import memory, pairs, peers, recipe
from train.atomic import program
from train.data.index import DataError
from train.data.shards import Pairs
from train.pixels import enlarge, psnr
from train.recipe import SettingsError
from train.run import Average, Run, TrainingError, rate, step_generator
from train.sheets import eight_bit, write_sheet
from train.tiny.adversary import Adversary, Discriminator, FeatureDiscriminator
from train.tiny.fresh import Fresh, Scales, moved, reused, taught
from train.tiny.networks import export, initial, new_network, save_weights, tiny_config
from train.tiny.perceptual import Perceptual, efficientnet_lite0
from train.tiny.recorded import Recorded
from train.tiny.settings import FREE, Settings
from train.tiny.step import Objective, Taken

# Pairs that a run is looked at with, and how many of them a sheet shows.
LOOKED_AT, SHOWN = 16, 6
LOG_EVERY = 25


# ---- data ----


def enlarged(batch: dict[str, Tensor], scale: int) -> dict[str, Tensor]:
    """A batch of shards with the network's `input` beside the low-resolution picture."""
    return {**batch, "input": enlarge(batch["lr"], scale)}


class ShardData:
    """Ready pairs."""

    def __init__(self, settings: Settings):
        self.settings = settings
        parts = ("hr", "lr", "teacher") if settings.taught else ("hr", "lr")
        self.shards = Pairs(settings.data, parts)

    def fixed(self) -> dict[str, dict[str, Tensor]]:
        """Batches that a run is looked at with, by name."""
        side = self.shards.size // 64 * 64
        batch = self.shards.batch(step_generator(self.settings.seed, -1), LOOKED_AT, side)
        return {"": enlarged(batch, self.shards.scale)}

    def batches(self, first: int) -> Iterator[dict[str, Tensor]]:
        """Batches of the steps after `first`."""
        s, step = self.settings, first
        while True:
            step += 1
            batch = self.shards.batch(step_generator(s.seed, step), s.batch, s.crop)
            yield enlarged(batch, self.shards.scale)


class FreshData:
    """Pairs made as training goes; a deferred teacher runs on the device, a batch at a time."""

    def __init__(self, settings: Settings, device: torch.device):
        self.settings, self.device = settings, device
        self.teacher = self.later = None
        if settings.teacher and settings.teacher_later:
            half = settings.precision != "fp32"
            self.later = peers.teacher(Path(settings.teacher), device=device.type, half=half)
        elif settings.teacher:
            self.teacher = peers.teacher(Path(settings.teacher))
        self.pairs = self.fresh(settings.scales, settings.clean, settings.seed)

    def fresh(self, scales: str, clean: float, seed: int) -> Fresh:
        s = self.settings
        options = pairs.Options(
            crop=s.crop,
            mix=s.mix,
            seed=seed,
            drawn=s.drawn,
            flat=s.flat,
            weights=pairs.parse_weights(s.weights),
        )
        return Fresh(
            s.pictures,
            options,
            Scales.parse(scales),
            clean,
            teacher=self.teacher,
            deferred=self.later is not None,
        )

    def fixed(self) -> dict[str, dict[str, Tensor]]:
        """Batches that a run is looked at with and not trained on, by name."""
        found = {}
        for name, scales, clean in (("damaged_x4", "4=1", 0.0), ("clean_x2", "2=1", 1.0)):
            data = self.fresh(scales, clean, self.settings.seed + 1_000_000)
            found[name] = self.whole(next(data.batches(0, LOOKED_AT)))
        return found

    def whole(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch with the deferred teacher's results."""
        return batch if self.later is None else taught(batch, self.later)

    def batches(self, first: int) -> Iterator[dict[str, Tensor]]:
        """Batches of the steps after `first`."""
        s = self.settings
        made = self.pairs.batches(first // s.reuse * s.batch, s.batch, workers=s.workers)
        whole = (moved(self.whole(batch), self.device) for batch in made)
        if s.reuse == 1:
            return whole
        return reused(whole, reuse=s.reuse, held=s.held, seed=s.seed, first=first)


# ---- the run ----


def beginning(settings: Settings) -> Unfolded:
    """The network that the run starts from."""
    if settings.init:
        return initial(Path(settings.init), tiny_config(), settings.seed)
    vae = load_file(Path(settings.autoencoder) / "vae.safetensors")
    return new_network(tiny_config(), vae, settings.seed)


def adversaries(
    settings: Settings, perceptual: Perceptual | None, device: torch.device
) -> dict[str, Adversary]:
    """The discriminators that the settings ask for, with the weights of `init`'s where it has one."""
    s, found, earlier = settings, {}, {}
    if s.init and s.judges and (path := Path(s.init) / "state.pt").exists():
        earlier = torch.load(path, map_location="cpu", weights_only=True)
    for kind in s.judges:
        torch.manual_seed(s.seed)
        if kind == "features":
            maps = perceptual.maps(torch.zeros(1, 3, 64, 64, device=device))
            judge: nn.Module = FeatureDiscriminator([m.shape[1] for m in maps], s.judge_width)
        else:
            judge = Discriminator(s.judge_width)
        judge.to(device)
        if state := earlier.get(f"adversary_{kind}"):
            judge.load_state_dict(state["discriminator"])
        found[kind] = Adversary(judge)
    return found


class Training:
    """What is trained, and everything that a resumed run needs back."""

    def __init__(self, settings: Settings, run: Run, device: torch.device):
        s = self.settings = settings
        self.run, self.device = run, device
        self.data = ShardData(s) if s.data else FreshData(s, device)
        self.fixed = self.data.fixed()
        perceptual = None
        if s.perceptual:
            perceptual = efficientnet_lite0().to(device)
            if device.type == "cuda" and s.precision_features == "bf16":
                perceptual.order = torch.channels_last
                perceptual.to(memory_format=torch.channels_last)
        self.network = beginning(s).to(device, memory_format=torch.channels_last)
        groups = self.trained()
        self.parameters = [p for group in groups for p in group]
        groups = [{"params": group} for group in groups]
        options = {"betas": (0.9, 0.99), "weight_decay": 1e-3, "fused": device.type == "cuda"}
        self.optimizer = torch.optim.AdamW(groups, **options)
        self.average = Average(self.network, s.ema)
        self.adversaries = adversaries(s, perceptual, device)
        self.objective = Objective(s, self.network, perceptual, self.adversaries)
        self.recorded = Recorded(
            self.objective.take,
            self.parameters,
            lambda: [t for adversary in self.adversaries.values() for t in adversary.tensors()],
        )

    def trained(self) -> list[list[nn.Parameter]]:
        """Parameters of the autoencoder, and of the UNet."""
        s, network = self.settings, self.network.requires_grad_(True)
        fixed = [network.vae.encoder.linear, network.vae.decoder.linear]
        if s.freeze_encoder:
            fixed.append(network.vae.encoder)
        for part in fixed:
            part.requires_grad_(False)
        own = {id(p) for p in network.vae.parameters()}
        parameters = [p for p in network.parameters() if p.requires_grad]
        return [[p for p in parameters if (id(p) in own) == inside] for inside in (True, False)]

    def parts(self) -> dict[str, Any]:
        """What a state holds."""
        return {
            "network": self.network,
            "optimizer": self.optimizer,
            "average": self.average,
            **{f"adversary_{kind}": found for kind, found in self.adversaries.items()},
        }

    def take(self, number: int, batch: dict[str, Tensor]) -> Taken:
        """Loss and gradients of step `number` (from 1). A card works on while this returns."""
        s = self.settings
        timed = s.schedule == "cosine_by_time"
        spent = self.run.spent()
        for group, peak in zip(self.optimizer.param_groups, (s.lr_vae, s.lr), strict=True):
            group["lr"] = rate(
                peak,
                number - 1,
                kind="cosine" if timed else s.schedule,
                warmup=s.warmup,
                steps=s.steps,
                done=spent if timed else None,
            )
        phase = self.objective.phase(spent if timed else (number - 1) / s.steps)
        batch = self.objective.prepared(moved(batch, self.device), number)
        taken = self.recorded.take(batch, phase)
        if phase != "regression":
            for adversary in self.adversaries.values():
                adversary.learned += 1
        return taken

    def accept(self, taken: Taken) -> dict[str, float]:
        """Let the weights follow a step's gradients; what was measured."""
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        found = {"loss": taken.loss, "gradient": norm, "spread": taken.spread, **taken.terms}
        # A card is waited for once a step.
        values = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
        if self.run.accept(values["loss"]):
            self.optimizer.step()
            self.average.update()
        return values

    # ---- what it yields ----

    def save(self, step: int) -> None:
        """The state, the averaged weights, and the model that `gendr.load` takes."""
        folder = self.run.folder
        self.run.save_parts(step, **self.parts())
        with self.average.swapped():
            save_weights(folder / "network.safetensors", self.network)
            export(folder / "model.safetensors", self.network, self.settings.name, step)

    @torch.no_grad()
    def look(self, step: int) -> str:
        """Measure on the fixed batches and write their sheets; what was seen, in words."""
        values = {}
        with self.average.swapped():
            for name, batch in self.fixed.items():
                prefix = f"{name}_" if name else ""
                seen, rows = self.seen(batch)
                values |= {f"{prefix}{key}": value for key, value in seen.items()}
                write_sheet(self.run.folder / f"{prefix}sheet.png", rows)
        self.run.log(step, **values)
        return "  ".join(f"{k} {v:.3f}" for k, v in values.items())

    def seen(self, batch: dict[str, Tensor]) -> tuple[dict[str, float], list[Any]]:
        """Values of one fixed batch, and the rows of its sheet."""
        perceptual, network = self.objective.perceptual, self.network
        x, hr = batch["input"].to(self.device), batch["hr"].to(self.device)
        y, z = network(x), network.vae.encode(hr)
        values = {} if perceptual is None else {"perceptual": float(perceptual(y, hr))}
        values |= {
            "psnr": psnr(y, hr),
            "psnr_input": psnr(x, hr),
            "psnr_autoencoder": psnr(network.vae.decode(z), hr),
            "latent_std": float(z.std()),
        }
        rows = [x, y, hr]
        if "teacher" in batch:
            target = batch["teacher"].to(self.device)
            values["psnr_to_teacher"] = psnr(y, target)
            rows.insert(2, target)
        return values, [eight_bit(row[:SHOWN]) for row in rows]


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
    config = {**dataclasses.asdict(settings), "step": dataclasses.asdict(tiny_config())}
    run = Run(out, config, free=FREE, accept=accept)
    run.catch_signals(settings.hours)
    training = Training(settings, run, choose_device(device))
    step = first = run.load_parts(state, **training.parts())
    batches = training.data.batches(first)
    batch = next(batches)
    waited, at = 0.0, time.perf_counter()
    for step in run.steps(first, settings.steps, images=settings.batch):
        taken = training.take(step, batch)
        # Before the step's end is waited for: a card computes it while the next pairs are fetched.
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        values = training.accept(taken)
        if step % LOG_EVERY == 0:
            now = time.perf_counter()
            run.log(step, **values, waiting=waited / (now - at))
            waited, at = 0.0, now
        if step % settings.save_every == 0 or step == settings.steps:
            run.say(f"step {step}: {training.look(step)}")
            training.save(step)
    training.save(step)
    return run.folder / "model.safetensors"


def plan(settings: Settings) -> str:
    """What the run trains, without reading anything."""
    s = settings
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {"autoencoder": VAE(TINY_VAE), "UNet": UNet(TINY_UNET)}
        if "patch" in s.judges:
            networks["discriminator"] = Discriminator(s.judge_width)
    return memory.plan(networks, steps=s.steps, batch=s.batch, crop=s.crop)


def main(argv: list[str] | None = None) -> int:
    chosen = recipe.parse(Settings, "restorer", __doc__, argv)
    try:
        if chosen.dry_run:
            print(plan(chosen.settings))
            return 0
        more = {"state": chosen.state, "accept": chosen.accept}
        print(train(chosen.settings, chosen.out, chosen.device, **more))
    except (
        TrainingError, DataError, SettingsError, checkpoint.CheckpointError, ImportError,
        FileNotFoundError, ValueError,
    ) as error:  # fmt: skip
        print(f"train.restorer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(program("train.restorer", main))
