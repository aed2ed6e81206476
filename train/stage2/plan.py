"""What a stage 2 run would take, before it starts: networks, memory, pictures per step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch

from gendr.files import checkpoint
from gendr.networks.blocks import Unset
from gendr.networks.onestep import StepConfig
from gendr.networks.unet import TINY_UNET, UNet
from gendr.networks.vae import TINY_VAE, VAE
from train import memory
from train.checkpointing import recompute_blocks
from train.features import ENCODER_SIZES, ENCODERS, Projector
from train.memory import gib, parameters
from train.stage2.discriminator import Discriminator
from train.stage2.scores import Scores
from train.stage2.settings import Settings


def step_config(path: str, like: Literal["sd21", "tiny"]) -> StepConfig:
    """Of a checkpoint, by its header alone; where no path is given, of the full or the tiny size."""
    if not path:
        return StepConfig() if like == "sd21" else StepConfig(unet=TINY_UNET, vae=TINY_VAE)
    return checkpoint.read_header(Path(path)).config


def plan(settings: Settings) -> str:
    """The plan in words and tables; nothing is loaded but headers, nothing computed."""
    s, need = settings, settings.rules
    config = step_config(s.generator or s.base, s.like)
    base_config = step_config(s.base, s.like)
    width, size = ENCODER_SIZES.get(s.encoder, ENCODER_SIZES["dinov2-b"])
    with torch.device("meta"):
        generator = UNet(config.unet, operations=Unset)
        vae = VAE(config.vae, operations=Unset)
        base = UNet(base_config.unet, operations=Unset)
        count_base = parameters(base)
        projector = Projector(config.unet.block_out_channels[0], width) if s.lambda3 else None
        heads = None
        if need.judge:
            groups = math.gcd(32, s.head_width)
            heads = Discriminator(base.config, at=s.heads, width=s.head_width, groups=groups)
        scores = (
            Scores(
                base,
                lora_rank=s.lora_rank,
                lora_alpha=s.lora_alpha,
                prediction=base_config.prediction_type,
            )
            if need.scores or need.judge
            else None
        )
    adapters = {
        name: sum(p.numel() for p in scores.parameters_of(name)) if scores and need.scores else 0
        for name in ("real", "fake")
    }
    trained = adapters["fake"] + (adapters["real"] if s.train_real else 0)
    bf16 = s.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32

    own = parameters(generator, projector)
    rows = [("network", "parameters", "weights, gradients, Adam", "")]
    rows.append(
        (
            "generator",
            f"{parameters(generator):,}",
            gib(memory.training_bytes(own, ema=False)),
            "",
        )
    )
    if projector is not None:
        rows.append(("  its projector", f"{parameters(projector):,}", "(within)", ""))
    average = memory.frozen_bytes(own) if s.ema else 0
    rows.append(("averaged weights", "", gib(average), "CPU" if s.ema_on_cpu else ""))
    fixed = memory.training_bytes(own, ema=False) + (0 if s.ema_on_cpu else average)
    if bf16:
        copies = memory.frozen_bytes(own, torch.bfloat16)
        rows.append(("autocast's copies in bf16", "", gib(copies), ""))
        fixed += copies
    if scores is not None:
        frozen = memory.frozen_bytes(count_base, dtype)
        rows.append(("frozen base of the scores", f"{count_base:,}", gib(frozen), s.precision))
        fixed += frozen
        for name in ("fake", "real"):
            learns = name == "fake" or s.train_real
            cost = (memory.training_bytes if learns else memory.frozen_bytes)(
                adapters[name], **({"ema": False} if learns else {})
            )
            rows.append(
                (f"  adapter {name}", f"{adapters[name]:,}", gib(cost), "" if learns else "frozen")
            )
            fixed += cost
    if heads is not None:
        cost = memory.training_bytes(parameters(heads), ema=False)
        rows.append(("discriminator's heads", f"{parameters(heads):,}", gib(cost), ""))
        fixed += cost
    for name, count in (("autoencoder", parameters(vae)), ("DINOv2", size if s.lambda3 else 0)):
        if count:
            rows.append((name, f"{count:,}", gib(memory.frozen_bytes(count)), "frozen"))
            fixed += memory.frozen_bytes(count)

    each = generator_bytes(config, s, bf16), score_bytes(base_config, s, bf16)
    peak = fixed + s.micro_batch * max(each)
    world = max(1, s.batch // s.micro_batch)
    lines = [
        f"{s.steps:,} generator steps of {s.batch} pictures of {s.crop} px "
        f"({s.steps * s.batch:,} in all), {s.micro_batch} at a time: {world} micro-batches per step, "
        "shared by the processes",
        "",
        memory.table(rows),
        "",
        f"fixed                        {gib(fixed)}",
        f"activations of one picture   generator {gib(each[0])}, score {gib(each[1])} "
        f"({'with' if s.recompute else 'without'} gradient checkpointing)",
        f"peak                         about {gib(peak)}, and 1 to 2 GiB that the device takes itself",
        f"trained by the scores        {trained:,} parameters",
        f"form                         target {s.target}, xi {s.xi:g}, kappa {s.kappa_real:g}/"
        f"{s.kappa_fake:g}, lambda {s.lambda1:g} then {s.lambda1_late:g} / {s.lambda2:g} / "
        f"{s.lambda3:g}, mse {s.lambda_mse:g}",
    ]
    if not s.base:
        what = "SD2.1 with 16 channels" if s.like == "sd21" else "GenDR-Tiny's networks"
        lines.insert(0, f"no --base yet: counted as {what}\n")
    if s.encoder and s.encoder not in ENCODERS and s.lambda3:
        lines.append(f"DINOv2 of {s.encoder} is counted as dinov2-b")
    return "\n".join(lines)


def fresh(config: StepConfig, recompute: bool) -> UNet:
    """A UNet on the meta device, with or without gradient checkpointing."""
    with torch.device("meta"):
        unet = UNet(config.unet, operations=Unset)
    if recompute:
        recompute_blocks(unet)
    return unet


def generator_bytes(config: StepConfig, s: Settings, bf16: bool) -> int:
    """Activations of one picture in the generator's backward pass."""
    z, context = memory.sample(config.unet, s.crop, factor=config.vae.factor)
    found = memory.activation_bytes(
        fresh(config, s.recompute), z, config.t_start, context, autocast=bf16
    )
    if s.recompute:
        plain = fresh(config, False)
        found += memory.block_bytes(plain, z, config.t_start, context, autocast=bf16)
    return found


def score_bytes(config: StepConfig, s: Settings, bf16: bool) -> int:
    """Activations of one picture in a score's backward pass, at z_t, beside the generator's graph.

    With gradient checkpointing the graphs of both scores are kept at a time, one block recomputed.
    """
    need = s.rules
    if not need.scores:
        return 0
    guided = 2 if (s.kappa_real != 1 or s.kappa_fake != 1) else 1
    unet = fresh(config, s.recompute).requires_grad_(False)
    z, context = memory.sample(config.unet, s.crop, batch=guided, factor=config.vae.factor)
    z = z.requires_grad_()
    found = memory.activation_bytes(unet, z, config.t_start, context, autocast=bf16)
    if s.recompute:
        if "fake" in need.distillation.through:
            found *= 2
        plain = fresh(config, False).requires_grad_(False)
        found += memory.block_bytes(plain, z, config.t_start, context, autocast=bf16)
    return found + generator_bytes(config, s, bf16)
