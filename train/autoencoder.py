"""Trains a small VAE16 from pictures: stage 0 of GenDR-Tiny, where no public autoencoder fits.

    python -m train.autoencoder --data PAIRS --out runs/autoencoder --steps 3000

Run the same command again to resume. The linear path starts as block PCA (whitened) and stays
fixed, the networks beside it start nearly silent: the run begins at PCA's quality with latents of unit
variance, and can't collapse.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gendr.devices import choose_device
from gendr.networks.vae import TINY_VAE, VAE
from train import layers, memory, recipe
from train.atomic import program
from train.data.shards import Pairs
from train.pixels import pixel_loss, psnr
from train.run import Average, Run, TrainingError, rate, step_generator
from train.tiny.networks import autocast, save_weights
from train.tiny.settings import FREE, AutoencoderSettings

# Weights of edges and of the latent's size; crops that the linear path starts from, and that the
# run is looked at with.
GRADIENT, LATENT = 0.25, 1e-4
FIRST, LOOKED_AT = 512, 32
LOG_EVERY = 50


def principal_components(patches: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whitened PCA of rows n d: encoder weight k d and bias k, decoder weight d k and bias d."""
    patches = patches.double()
    mean = patches.mean(0)
    covariance = (patches - mean).T @ (patches - mean) / (len(patches) - 1)
    values, vectors = torch.linalg.eigh(covariance)
    scale = values[-count:].flip(0).clamp_min(1e-12).sqrt()
    basis = vectors[:, -count:].flip(1)
    # A fixed sign, so that the same pictures give the same latent on every machine.
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    weight = (basis / scale).T
    return weight.float(), (-weight @ mean).float(), (basis * scale).float(), mean.float()


def start(vae: VAE, pictures: Tensor) -> None:
    """Set the linear path from pictures b 3 h w in [-1, 1], and the networks beside it nearly silent."""
    f, c = vae.config.factor, vae.config.latent_channels
    patches = F.unfold(pictures, f, stride=f).transpose(1, 2).reshape(-1, 3 * f * f)
    encode, bias, decode, mean = principal_components(patches, c)
    with torch.no_grad():
        vae.encoder.linear.weight.copy_(encode.reshape(c, 3, f, f))
        vae.encoder.linear.bias.copy_(bias)
        vae.decoder.linear.weight.copy_(decode[:, :, None, None])
        vae.decoder.linear.bias.copy_(mean)
        for last in (vae.encoder.conv_out, vae.decoder.conv_out):
            last.weight.mul_(0.01)
            last.bias.zero_()
    vae.encoder.linear.requires_grad_(False)
    vae.decoder.linear.requires_grad_(False)


def train(
    settings: AutoencoderSettings,
    out: Path,
    device: str = "auto",
    *,
    state: Path | None = None,
    accept: Sequence[str] = (),
) -> Path:
    """Run or resume; the file of weights. TrainingError and others say why they stop it.

    state: to go on from, if not the last one; accept: settings that may differ from the run's own.
    """
    s, place = settings, choose_device(device)
    config = {**dataclasses.asdict(s), "vae": dataclasses.asdict(TINY_VAE)}
    run = Run(out, config, free=FREE, accept=accept)
    run.catch_signals()
    torch.manual_seed(s.seed)
    pairs = Pairs(s.data)

    vae = VAE(TINY_VAE, operations=layers)
    start(vae, pairs.batch(step_generator(s.seed, 0), FIRST, s.crop)["hr"])
    vae.to(place, memory_format=torch.channels_last)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.lr)
    average = Average(vae, s.ema)
    parts = {"vae": vae, "optimizer": optimizer, "average": average}
    first = run.load_parts(state, **parts)
    check = pairs.batch(step_generator(s.seed, -1), LOOKED_AT, s.crop)["hr"].to(place)
    step = first
    for step in run.steps(first, s.steps, images=s.batch):
        for group in optimizer.param_groups:
            group["lr"] = rate(s.lr, step - 1, kind="cosine", warmup=s.warmup, steps=s.steps)
        x = pairs.batch(step_generator(s.seed, step), s.batch, s.crop)["hr"].to(place)
        with autocast(place, s.precision):
            z = vae.encode(x)
            y = vae.decode(z)
        loss = pixel_loss(y, x, gradient=GRADIENT) + LATENT * z.float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        if run.accept(loss):
            optimizer.step()
            average.update()
        if step % LOG_EVERY == 0:
            run.log(step, loss=float(loss.detach()))
        if step % s.save_every == 0 or step == s.steps:
            with average.swapped(), torch.no_grad():
                z = vae.encode(check)
                value, spread = psnr(vae.decode(z), check), float(z.std())
            run.log(step, psnr=value, latent_std=spread)
            run.say(f"step {step}: psnr {value:.2f} dB")
            run.save_parts(step, **parts)
    run.save_parts(step, **parts)
    with average.swapped():
        save_weights(run.folder / "vae.safetensors", vae)
    return run.folder / "vae.safetensors"


def main(argv: list[str] | None = None) -> int:
    chosen = recipe.parse(AutoencoderSettings, "autoencoder", __doc__, argv)
    s = chosen.settings
    try:
        if chosen.dry_run:
            with torch.device("meta"):
                networks = {"autoencoder": VAE(TINY_VAE)}
            print(memory.plan(networks, steps=s.steps, batch=s.batch, crop=s.crop))
            return 0
        more = {"state": chosen.state, "accept": chosen.accept}
        print(train(s, chosen.out, chosen.device, **more))
    except (TrainingError, FileNotFoundError, ValueError) as error:
        print(f"train.autoencoder: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(program("train.autoencoder", main))
