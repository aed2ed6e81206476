"""Trains the first one-step generator of a small GenDR in pixels: encoder, UNet and decoder together.

    python -m train.pairs --data PICTURES --out PAIRS --count 24576 --mix tiny [--teacher ...]
    python -m train.autoencoder --data PAIRS --out runs/autoencoder
    python -m train.restorer --data PAIRS --autoencoder runs/autoencoder --out runs/restorer

or, from an existing model, with pairs of all scales made as training goes:

    python -m train.restorer --pictures PICTURES --init gendr/weights/gendr-tiny.safetensors \
        --out runs/finer --perceptual 1

Run the same command again to resume. The target is the clean crop, the result of a frozen teacher
on the damaged one (where the shards hold it), or a mixture of both. A share of every batch goes
through the autoencoder alone, so that the latent stays one: `detail` 0 must give the input back,
and distillation (train.cida) needs latents of clean pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gendr.files import checkpoint
from gendr.files.header import Header
from gendr.networks.onestep import StepConfig, Unfolded
from gendr.networks.unet import TINY_UNET, UNet
from gendr.networks.vae import TINY_VAE, VAE
from gendr.schedule import beta_bar
from train import degrade, layers, pairs, peers
from train.atomic import program, replacing
from train.data.shards import Pairs
from train.memory import plan
from train.pixels import enlarge, pixel_loss, psnr
from train.run import Average, Run, step_generator
from train.tiny.adversary import (
    Discriminator,
    FeatureDiscriminator,
    balanced,
    discriminator_loss,
    feature_matching,
    generator_loss,
)
from train.tiny.fresh import Fresh, Scales, taught
from train.tiny.perceptual import efficientnet_lite0

# Tiles of the exported model, pixels. Larger than the crops it is trained on: the autoencoder has
# no normalisation and the UNet's attention is local enough (measured at 256, 512 and 1024).
TILE = 512


def tiny_config() -> StepConfig:
    """GenDR-Tiny: velocity prediction, and the alpha = beta at which a silent network is identity.

    With eps = abar v + bbar z in Eq. 2, v = 0 gives z_g = z (1 - beta bbar) / alpha.
    """
    constant = 1 / (1 + float(beta_bar(500)))
    return StepConfig(
        unet=TINY_UNET,
        vae=TINY_VAE,
        prediction_type="v_prediction",
        alpha=constant,
        beta=constant,
    )


def new_network(config: StepConfig, vae: dict[str, Tensor], seed: int) -> Unfolded:
    """A network whose UNet is silent and whose autoencoder is trained."""
    torch.manual_seed(seed)
    network = Unfolded(
        config,
        VAE(config.vae, operations=layers),
        UNet(config.unet, operations=layers),
        {"positive": torch.randn(1, config.unet.tokens, config.unet.cross_attention_dim)},
    )
    network.vae.load_state_dict(vae)
    nn.init.zeros_(network.unet.conv_out.weight)
    nn.init.zeros_(network.unet.conv_out.bias)
    return network


def initial(path: Path, config: StepConfig, seed: int) -> Unfolded:
    """A network with the weights of a run folder of this script, or of a GenDR checkpoint."""
    if path.is_dir():
        network = new_network(config, VAE(config.vae).state_dict(), seed)
        network.load_state_dict(load_file(path / "network.safetensors"))
        return network
    header, tensors = checkpoint.read(path)
    checkpoint.check_full(header, path, "can't be trained")
    if header.config != config:
        raise ValueError(f"{path} is not of GenDR-Tiny's structure: --init can't go on from it")
    network = checkpoint.unfolded(config, tensors, operations=layers)
    return network.float()


def enlarged(batch: dict[str, Tensor], scale: int) -> dict[str, Tensor]:
    """A batch of shards with the network's `input` beside the low-resolution picture."""
    return {**batch, "input": enlarge(batch["lr"], scale)}


def from_shards(data: Pairs, seed: int, first: int, batch: int, crop: int) -> Iterator[dict]:
    """Batches of the steps after `first`."""
    step = first
    while True:
        step += 1
        yield enlarged(data.batch(step_generator(seed, step), batch, crop), data.scale)


def fresh(args: argparse.Namespace, *, scales: str, clean: float, seed: int) -> Fresh:
    """Pairs of --pictures with the run's crop and mix."""
    options = pairs.Options(
        crop=args.crop,
        mix=args.mix,
        seed=seed,
        drawn=args.drawn,
        flat=args.flat,
        weights=args.weights,
    )
    now = args.teacher and not args.teacher_later
    teacher = peers.teacher(Path(args.teacher)) if now else None
    later = bool(args.teacher and args.teacher_later)
    return Fresh(
        args.pictures, options, Scales.parse(scales), clean, teacher=teacher, deferred=later
    )


def checks(
    args: argparse.Namespace, count: int, teacher: peers.Teacher | None
) -> dict[str, dict[str, Tensor]]:
    """What a run on fresh pairs is looked at with: fixed batches that it is not trained on.

    teacher: of deferred pairs.
    """
    found = {}
    for name, scales, clean in (("damaged_x4", "4=1", 0.0), ("clean_x2", "2=1", 1.0)):
        data = fresh(args, scales=scales, clean=clean, seed=args.seed + 1_000_000)
        batch = next(data.batches(0, count))
        found[name] = batch if teacher is None else taught(batch, teacher)
    return found


def export(path: Path, network: Unfolded, name: str, step: int) -> None:
    """Write what `gendr.load` and Load GenDR take as it is."""
    facts = {
        "tile": TILE,
        "licence": "Apache-2.0",
        "training_step": step,
        "prompts": {"positive": "learned, not made from words"},
    }
    header = Header(config=network.config, name=name, **facts)
    checkpoint.save(path, network, header, dtype="fp16")


def sheet(path: Path, *rows: Tensor) -> None:
    """Pictures b 3 h w in [-1, 1], one row each, as a PNG."""
    image = torch.cat([torch.cat(list(r.float().cpu()), dim=2) for r in rows], dim=1)
    array = (image.clamp(-1, 1) * 127.5 + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of shards made by train.pairs")
    parser.add_argument(
        "--pictures", help="folder of pictures instead: pairs are made as training goes"
    )
    parser.add_argument(
        "--scales",
        default="4=.5,2=.2,1-4=.3",
        help="of fresh pairs: scale=weight or low-high=weight, separated by commas",
    )
    parser.add_argument(
        "--clean", type=float, default=0.35, help="share of fresh pairs that are only reduced"
    )
    parser.add_argument(
        "--teacher",
        help="a restorer that spandrel can read, for damaged fresh pairs of large scales",
    )
    parser.add_argument(
        "--teacher-later",
        action="store_true",
        help="run the teacher on --device, a batch at a time, for fresh pairs of x4 alone: where a "
        "graphics card trains and processes make the pairs",
    )
    parser.add_argument("--mix", choices=tuple(degrade.MIXES), default="tiny", help="of the others")
    parser.add_argument("--drawn", type=float, default=0.06, help="share of text and line art")
    parser.add_argument("--flat", type=float, default=0.03, help="share of empty paper")
    parser.add_argument(
        "--weights", type=pairs.parse_weights, default=(), metavar="SOURCE=FACTOR,..."
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that make fresh pairs")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--autoencoder", help="run folder of train.autoencoder to begin from")
    parser.add_argument(
        "--init",
        help="run folder of train.restorer to begin from instead, its discriminator included, or "
        "a GenDR-Tiny checkpoint",
    )
    parser.add_argument("--name", default="GenDR-Tiny", help="written into the exported file")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=128, help="pixels of the result")
    parser.add_argument("--lr", type=float, default=5e-4, help="of the UNet")
    parser.add_argument(
        "--lr-vae",
        type=float,
        default=3e-4,
        help="of the autoencoder, which has no normalisation: 6e-4 drove its activations to 1e5",
    )
    parser.add_argument(
        "--freeze-encoder",
        action="store_true",
        help="keep the latent: a base that was trained in it still fits",
    )
    parser.add_argument("--warmup", type=int, default=250)
    parser.add_argument(
        "--schedule",
        choices=("cosine", "constant_with_warmup"),
        default="cosine",
        help="constant for a stretch whose end is not known yet",
    )
    parser.add_argument(
        "--fp32",
        action="store_true",
        help="no bf16, for CPUs that only emulate it (without avx512_bf16)",
    )
    parser.add_argument(
        "--teacher-share", type=float, default=0.85, help="the rest is the clean crop"
    )
    parser.add_argument("--gradient", type=float, default=0.5, help="weight of the edge term")
    parser.add_argument(
        "--perceptual",
        type=float,
        default=0.0,
        help="weight of the distance of EfficientNet-Lite0's features: 1",
    )
    parser.add_argument(
        "--perceptual-to",
        choices=("hr", "teacher", "both"),
        default="hr",
        help="what that distance is measured to; both: the mean of the two",
    )
    parser.add_argument("--autoencode", type=float, default=0.25, help="share of the batch")
    parser.add_argument(
        "--adversarial",
        type=float,
        default=0.0,
        help="pull of the discriminator relative to the regression, for the last stretch: 0.3",
    )
    parser.add_argument(
        "--real",
        choices=("teacher", "hr"),
        help="what the discriminator takes for real (the teacher's results, where they are targets)",
    )
    parser.add_argument(
        "--matching", type=float, default=0.0, help="weight of the discriminator's features: 1"
    )
    parser.add_argument(
        "--judge",
        choices=("patch", "features"),
        default="patch",
        help="the discriminator sees pixels, or the features of --perceptual",
    )
    parser.add_argument("--judge-width", type=int, default=32, help="of the discriminator")
    parser.add_argument(
        "--alone", type=int, default=100, help="steps that the discriminator learns alone first"
    )
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--hours", type=float, default=0.0, help="stop and save after so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    args = parser.parse_args(argv)
    step_config = tiny_config()
    if args.dry_run:
        with torch.device("meta"):
            networks = {"autoencoder": VAE(step_config.vae), "UNet": UNet(step_config.unet)}
            if args.adversarial:
                networks["discriminator"] = Discriminator(args.judge_width)
        print(plan(networks, steps=args.steps, batch=args.batch, crop=args.crop))
        return
    del args.dry_run
    config: dict[str, Any] = {**vars(args), "step": dataclasses.asdict(step_config)}
    if bool(args.data) == bool(args.pictures):
        parser.error("give --data (shards) or --pictures (fresh pairs), one of the two")
    with_teacher = bool(args.teacher_share) or args.real == "teacher"
    if args.pictures and with_teacher != bool(args.teacher):
        parser.error("fresh pairs need --teacher for --teacher-share above 0 or --real teacher")
    if args.judge == "features" and args.adversarial and not args.perceptual:
        parser.error("--judge features looks at what --perceptual computes: give it a weight")
    if args.judge == "features" and args.matching:
        parser.error("--matching compares features of --judge patch; --perceptual does it here")
    run = Run(
        args.out,
        config,
        free=(
            *("data", "pictures", "device", "save_every", "autoencoder", "init", "workers"),
            "hours",
        ),
    )
    run.catch_signals(args.hours)
    device, later = torch.device(args.device), None
    if args.teacher and args.teacher_later:
        later = peers.teacher(Path(args.teacher), device=args.device, half=not args.fp32)
    if args.data:
        shards = Pairs(args.data, ("hr", "lr", "teacher") if with_teacher else ("hr", "lr"))
        whole = shards.batch(step_generator(args.seed, -1), 16, shards.size // 64 * 64)
        fixed_batches = {"": enlarged(whole, shards.scale)}
    else:
        made = fresh(args, scales=args.scales, clean=args.clean, seed=args.seed)
        fixed_batches = checks(args, 16, later)
    perceptual = efficientnet_lite0().to(device) if args.perceptual else None

    if args.init:
        network = initial(Path(args.init), step_config, args.seed)
    elif args.autoencoder:
        vae = load_file(Path(args.autoencoder) / "vae.safetensors")
        network = new_network(step_config, vae, args.seed)
    else:
        parser.error("give --autoencoder or --init: the latent must come from somewhere")
    network.to(device, memory_format=torch.channels_last).requires_grad_(True)
    fixed = [network.vae.encoder.linear, network.vae.decoder.linear]
    if args.freeze_encoder:
        fixed.append(network.vae.encoder)
    for part in fixed:
        part.requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    own = {id(p) for p in network.vae.parameters()}
    groups = [
        {"params": [p for p in trained if id(p) in own], "lr": args.lr_vae},
        {"params": [p for p in trained if id(p) not in own], "lr": args.lr},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = get_scheduler(
        args.schedule, optimizer, num_warmup_steps=args.warmup, num_training_steps=args.steps
    )
    average = Average(network, args.ema)
    state = {
        "network": network,
        "optimizer": optimizer,
        "schedule": schedule,
        "average": average,
    }
    discriminator = None
    if args.adversarial:
        if args.judge == "features":
            maps = perceptual.maps(torch.zeros(1, 3, 64, 64, device=device))
            discriminator = FeatureDiscriminator([m.shape[1] for m in maps], args.judge_width)
        else:
            discriminator = Discriminator(args.judge_width)
        discriminator.to(device)
        judge = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.99))
        state |= {"discriminator": discriminator, "judge": judge}
        if args.init and (earlier := Path(args.init) / "state.pt").exists():
            found = torch.load(earlier, map_location="cpu", weights_only=True).get("discriminator")
            if found is not None:
                discriminator.load_state_dict(found)
    first = run.load_parts(**state)

    def save(step: int) -> None:
        run.save_parts(step, **state)
        with average.swapped():
            tensors = {k: v.detach().float().cpu() for k, v in network.state_dict().items()}
            with replacing(run.folder / "network.safetensors") as part:
                save_file({k: v.contiguous() for k, v in tensors.items()}, part)
            export(run.folder / "model.safetensors", network, args.name, step)

    def validate(step: int) -> str:
        values = {}
        for name, batch in fixed_batches.items():
            x, hr = batch["input"].to(device), batch["hr"].to(device)
            prefix = f"{name}_" if name else ""
            with average.swapped(), torch.no_grad():
                y = network(x)
                z = network.vae.encode(hr)
                plain = network.vae.decode(z)
                if perceptual is not None:
                    values[f"{prefix}perceptual"] = float(perceptual(y, hr))
            values |= {
                f"{prefix}psnr": psnr(y, hr),
                f"{prefix}psnr_input": psnr(x, hr),
                f"{prefix}psnr_autoencoder": psnr(plain, hr),
                f"{prefix}latent_std": float(z.std()),
            }
            rows = [x[:6], y[:6], hr[:6]]
            if "teacher" in batch:
                target = batch["teacher"].to(device)
                values[f"{prefix}psnr_to_teacher"] = psnr(y, target)
                rows.insert(2, target[:6])
            sheet(run.folder / f"{prefix}sheet.png", *rows)
        run.log(step, **values)
        return "  ".join(f"{k} {v:.3f}" for k, v in values.items())

    if args.data:
        batches = from_shards(shards, args.seed, first, args.batch, args.crop)
    else:
        batches = made.batches(first * args.batch, args.batch, workers=args.workers)
    if args.fp32:
        precision = contextlib.nullcontext()
    else:
        precision = torch.autocast(device.type, torch.bfloat16)
    step = first
    for step in run.steps(first, args.steps, images=args.batch):
        batch = {k: v.to(device, non_blocking=True) for k, v in next(batches).items()}
        if later is not None:
            batch = taught(batch, later)
        x = batch["input"]
        share = max(1, round(args.batch * args.autoencode)) if args.autoencode else 0
        # Clean and damaged pictures in turn: the latent must hold both.
        plain = (batch["hr"] if step % 2 else x)[:share]
        with precision:
            z = network.encode(torch.cat([x, plain]))
            z_l, z_plain = z[: args.batch], z[args.batch :]
            y = network.decode(torch.cat([network.step(z_l), z_plain]))
        y, y_plain = y[: args.batch], y[args.batch :]
        loss = (1 - args.teacher_share) * pixel_loss(y, batch["hr"], gradient=args.gradient)
        if args.teacher_share:
            term = pixel_loss(y, batch["teacher"], gradient=args.gradient)
            loss = loss + args.teacher_share * term
        extra = {"pixel": float(loss.detach())}
        real = batch[args.real or ("teacher" if args.teacher_share else "hr")]
        shown: Any = y
        if perceptual is not None:
            shown = perceptual.maps(y)
            targets = ("hr", "teacher") if args.perceptual_to == "both" else (args.perceptual_to,)
            with torch.no_grad():
                wanted = [perceptual.maps(batch[target]) for target in targets]
            term = torch.stack([perceptual.distance(shown, maps) for maps in wanted]).mean()
            extra["perceptual"] = float(term.detach())
            loss = loss + args.perceptual * term
        pull = None
        if discriminator is not None:
            if args.judge == "features":
                with torch.no_grad():
                    source, true = perceptual.maps(x), perceptual.maps(real)
                told = (
                    discriminator(true, source),
                    discriminator([m.detach() for m in shown], source),
                )
                verdict = torch.stack(
                    [discriminator_loss(*pair) for pair in zip(*told, strict=True)]
                ).mean()
            else:
                verdict = discriminator_loss(
                    discriminator(real, x), discriminator(y.detach().float(), x)
                )
            judge.zero_grad(set_to_none=True)
            verdict.backward()
            judge.step()
            extra["discriminator"] = float(verdict.detach())
            if step > args.alone:
                if args.judge == "features":
                    logits = discriminator(shown, source)
                    fooled = torch.stack([generator_loss(v) for v in logits]).mean()
                else:
                    seen = discriminator.features(y.float(), x)
                    fooled = generator_loss(seen[-1])
                    if args.matching:
                        with torch.no_grad():
                            wanted = discriminator.features(real, x)
                        fooled = fooled + args.matching * feature_matching(wanted, seen)
                pull = balanced(loss, fooled, y, args.adversarial)
        rest = y.new_zeros(())
        if share:
            rest = args.autoencode * pixel_loss(y_plain, plain, gradient=args.gradient)
        optimizer.zero_grad(set_to_none=True)
        if pull is None:
            (loss + rest).backward()
        elif share:
            torch.autograd.backward([y, rest], [pull, None])
        else:
            y.backward(pull)
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        if run.accept(loss):
            optimizer.step()
            average.update()
        schedule.step()
        if step % 25 == 0:
            with torch.no_grad():
                spread = float(y.detach().float().std())
            run.log(step, loss=float(loss.detach()), gradient=float(norm), spread=spread, **extra)
        if step % args.save_every == 0 or step == args.steps:
            run.say(f"step {step}: {validate(step)}")
            save(step)
    save(step)


if __name__ == "__main__":
    try:
        raise SystemExit(program("train.restorer", main))
    except checkpoint.CheckpointError as error:
        raise SystemExit(f"train.restorer: {error}") from error
