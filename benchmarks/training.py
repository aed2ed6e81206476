"""One iteration of stage 2 at full size with random weights: seconds and peak memory of each phase.

    python -m benchmarks.training --side 512 --device cuda
    python -m benchmarks.training --side 256 --device cpu --no-optimizers      # 12 GiB

Networks are those of `train.cida --recipe single_gpu`: generator with gradient checkpointing, frozen base in
bf16 with both adapters, heads; without DINOv2. Beside each figure stands what `train.cida --dry-run`
predicts from shapes. Weights don't matter for either.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.memory import Watch
from gendr.networks.onestep import StepConfig
from gendr.networks.unet import UNet
from train import cida, memory, recipe
from train.checkpointing import recompute_blocks
from train.processes import Processes
from train.stage2 import plan
from train.stage2.discriminator import Discriminator
from train.stage2.scores import Scores
from train.stage2.step import Generator, Iteration, Sample

GIB = 2**30


def networks(settings: cida.Settings, device: torch.device) -> Iteration:
    """The iteration of a full-size run, with random weights."""
    config = StepConfig()
    prompt, null = torch.randn(2, 1, 77, 1024, device=device)
    with device:
        unet = UNet(config.unet)
        base = UNet(config.unet).to(torch.bfloat16)
    base.load_state_dict(unet.state_dict())
    recompute_blocks(unet)
    generator = Generator(unet, config, prompt)
    scores = Scores(
        base,
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        prediction=config.prediction_type,
        recompute=True,
    ).to(device)
    heads = Discriminator(config.unet, at=settings.heads, width=settings.head_width).to(device)
    return Iteration(
        generator, scores, heads, prompt, null, settings.rules, Processes(str(device)),
        dtype=torch.bfloat16,
    )  # fmt: skip


def phase(device: torch.device, run: object) -> dict[str, float]:
    """Seconds and peak GiB of one call."""
    with Watch(device) as watch:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "peak_gib": round(watch.bytes / GIB, 2)}


def predicted(settings: cida.Settings, optimizers: bool) -> float:
    """GiB of weights, gradients, moments and activations in the generator phase, from shapes."""
    config = StepConfig()
    with torch.device("meta"):
        unet = UNet(config.unet)
        count = memory.parameters(unet)
        scores = Scores(
            unet,
            lora_rank=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            prediction=config.prediction_type,
        )
    lora = sum(p.numel() for name in ("real", "fake") for p in scores.parameters_of(name))
    trained = count * 4 * (4 if optimizers else 2) + count * 2
    frozen = count * 2 + lora * 4 * (4 if optimizers else 1)
    return (trained + frozen + plan.score_bytes(config, settings, True)) / GIB


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--side", type=int, default=512, help="pixels of the clean crop (512)")
    parser.add_argument("--batch", type=int, default=1, help="pictures at a time (1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=1, help="iterations; the last one counts")
    parser.add_argument(
        "--no-optimizers", action="store_true", help="gradients only: 7 GiB less, no step is taken"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    settings = recipe.build(
        cida.Settings,
        recipe.read_recipe("single_gpu", "cida"),
        {"crop": args.side, "lambda3": 0.0, "encoder": "", "micro_batch": args.batch},
    )
    torch.manual_seed(0)
    it = networks(settings, device)
    z = torch.randn(2, args.batch, 16, args.side // 8, args.side // 8, device=device)
    sample = Sample(z[0], z[1], None, list(range(args.batch)))
    parameters = it.trained()
    optimizers = {}
    if not args.no_optimizers:
        optimizers = {n: torch.optim.AdamW(p, lr=1e-5) for n, p in parameters.items()}

    def step(names: list[str]) -> None:
        for name in names:
            if optimizers:
                optimizers[name].step()
            for p in parameters[name]:
                p.grad = None

    found: dict[str, dict[str, float]] = {}
    others = [n for n in parameters if n != "generator"]
    for _ in range(args.repeat):
        found = {
            "score phase": phase(device, lambda: (it.score_step([sample]), step(others))),
            "generator phase": phase(
                device, lambda: (it.generator_step([sample], 0), step(["generator"]))
            ),
        }
    rows = [("phase", "seconds", "peak GiB")]
    rows += [(name, str(v["seconds"]), str(v["peak_gib"])) for name, v in found.items()]
    print(memory.table(rows))
    want = predicted(settings, bool(optimizers))
    print(f"predicted for the generator phase, from shapes: {want:.2f} GiB")
    if args.json:
        facts = {"side": args.side, "batch": args.batch, "device": str(device), "predicted": want}
        args.json.write_text(json.dumps({**facts, **found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
