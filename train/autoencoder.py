"""Trains a small VAE16 from pictures: stage 0 of GenDR-Tiny, where no public autoencoder fits.

    python -m train.autoencoder --data PAIRS --out runs/autoencoder --steps 3000

Run the same command again to resume. The linear path starts as block PCA (whitened) and stays
fixed, the networks beside it start nearly silent: the run begins at PCA's quality with latents of unit
variance, and can't collapse.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from gendr.networks.vae import TINY_VAE, VAE
from train import layers
from train.atomic import program, replacing
from train.data.shards import Pairs
from train.memory import plan
from train.pixels import pixel_loss, psnr
from train.run import Average, Run, step_generator

GRADIENT, LATENT = 0.25, 1e-4


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of shards made by train.pairs")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=128, help="pixels, a multiple of 8")
    # Without normalisation 1e-3 drove the activations to 1e5 and the networks silent.
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--warmup", type=int, default=250)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    args = parser.parse_args(argv)
    if args.dry_run:
        with torch.device("meta"):
            networks = {"autoencoder": VAE(TINY_VAE)}
        print(plan(networks, steps=args.steps, batch=args.batch, crop=args.crop))
        return
    del args.dry_run
    config: dict[str, Any] = {**vars(args), "vae": dataclasses.asdict(TINY_VAE)}
    run = Run(args.out, config, free=("data", "device", "save_every"))
    run.catch_signals()
    torch.manual_seed(args.seed)
    pairs = Pairs(args.data)
    device = torch.device(args.device)

    vae = VAE(TINY_VAE, operations=layers)
    start(vae, pairs.batch(step_generator(args.seed, 0), 512, args.crop)["hr"])
    vae.to(device, memory_format=torch.channels_last)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.warmup, num_training_steps=args.steps
    )
    average = Average(vae, args.ema)
    parts = {"vae": vae, "optimizer": optimizer, "schedule": schedule, "average": average}
    first = run.load_parts(**parts)
    check = pairs.batch(step_generator(args.seed, -1), 32, args.crop)["hr"].to(device)
    step = first
    for step in run.steps(first, args.steps, images=args.batch):
        generator = step_generator(args.seed, step)
        x = pairs.batch(generator, args.batch, args.crop)["hr"].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            z = vae.encode(x)
            y = vae.decode(z)
        loss = pixel_loss(y, x, gradient=GRADIENT) + LATENT * z.float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        if run.accept(loss):
            optimizer.step()
            average.update()
        schedule.step()
        if step % 50 == 0:
            run.log(step, loss=float(loss.detach()))
        if step % args.save_every == 0 or step == args.steps:
            with average.swapped(), torch.no_grad():
                z = vae.encode(check)
                value, spread = psnr(vae.decode(z), check), float(z.std())
            run.log(step, psnr=value, latent_std=spread)
            run.say(f"step {step}: psnr {value:.2f} dB")
            run.save_parts(step, **parts)
    run.save_parts(step, **parts)
    with average.swapped():
        tensors = {k: v.detach().float().contiguous().cpu() for k, v in vae.state_dict().items()}
        with replacing(Path(args.out) / "vae.safetensors") as part:
            save_file(tensors, part)


if __name__ == "__main__":
    raise SystemExit(program("train.autoencoder", main))
