"""What a converted public restorer takes: making the GenDR file, loading it, one restoration.

    python -m benchmarks.conversion --size 512

Weights are random, in the layouts that people download: Stable Diffusion 2.1-base as diffusers' folder in
fp16, text encoder included, and a PiSA-SR adapter. Converting is a process of its own; another one loads
the result and restores a picture. Full size needs 5 GB of the folder that is given or made, and 5 GB of
memory; the files are deleted in the end unless `--keep` names a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gendr import devices
from gendr.files.convert import inside
from gendr.files.shapes import wanted_shapes
from gendr.networks.onestep import StepConfig
from gendr.networks.unet import SD21
from gendr.networks.vae import SD_VAE
from gendr.schedule import BETA_END, BETA_START, STEPS

from . import tables
from .compositions import text_encoder
from .pipeline import Worker, load, machine, said, save
from .weights import random_state, random_step

GB = 1e9
SD21_BASE = StepConfig(unet=SD21, vae=SD_VAE)
# PiSA-SR's adapters: their rank, and the names peft gave them.
RANK, WHICH = 4, ("pix", "sem")
# A child that converts, and says what that took of the processor and of memory (the kernel's own peak).
CHILD = """
import json, sys, time
from gendr import cli
began = time.perf_counter(), time.process_time()
code = cli.main(["convert", *sys.argv[1:]])
wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
lines = open("/proc/self/status").read().splitlines() if sys.platform.startswith("linux") else []
peak = next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
print(json.dumps({"code": code, "wall": wall, "cpu": cpu, "peak": peak}))
"""


def write_base(folder: Path, config: StepConfig) -> Path:
    """Random weights of this shape as diffusers' folder, without a text encoder."""
    state = random_step(config)
    unet, vae = config.unet, config.vae
    heads = [width // unet.head_dim for width in unet.block_out_channels]
    settings = {
        "unet": {
            "attention_head_dim": heads,
            "use_linear_projection": True,
            "norm_num_groups": unet.norm_num_groups,
        },
        "vae": {"norm_num_groups": vae.norm_num_groups, "scaling_factor": vae.scaling_factor},
    }
    for part, values in settings.items():
        place = folder / part
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(values), encoding="utf-8")
        prefix = f"{part}."
        tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        save_file(tensors, place / "diffusion_pytorch_model.safetensors")
    schedule = {
        "beta_schedule": "scaled_linear",
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "num_train_timesteps": STEPS,
        "prediction_type": "epsilon",
    }
    (folder / "scheduler").mkdir()
    place = folder / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(schedule), encoding="utf-8")
    return folder


def write_text_encoder(folder: Path) -> None:
    """SD2.1's text encoder with random weights, in fp16; enough for the empty prompt."""
    with torch.device("meta"):
        text = text_encoder()
    text.load_state_dict(dict(random_state(text, "")), assign=True)
    text.save_pretrained(folder / "text_encoder")


def write_pisa(path: Path, shapes: dict[str, tuple[int, ...]], scale: float = 0.05) -> Path:
    """A PiSA-SR file with random adapters for a UNet of these shapes, as its program saves one.

    It adapts every convolution and projection but those of the timestep.
    """
    generator = torch.Generator().manual_seed(31)
    state: dict[str, Tensor] = {}
    lists: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or "time_emb" in name:
            continue
        module = name.removesuffix(".weight")
        side = "encoder" if module.startswith(("down_blocks", "conv_in")) else "others"
        if module.startswith(("up_blocks", "conv_out")):
            side = "decoder"
        for which in WHICH:
            lists.setdefault(f"unet_lora_{side}_modules_{which}", []).append(module)
            one = [1] * (len(shape) - 2)
            for factor, sides in (("A", (RANK, *shape[1:])), ("B", (shape[0], RANK, *one))):
                key = f"{module}.lora_{factor}.default_{side}_{which}.weight"
                state[key] = scale * torch.randn(sides, generator=generator)
    ranks = {f"lora_rank_unet_{which}": RANK for which in WHICH}
    torch.save({"state_dict_unet": state, **ranks, **lists}, path)
    return path


def unet_shapes(config: StepConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the UNet of a base, under diffusers' names."""
    return inside(wanted_shapes(config), "unet")


def convert(source: Path, base: Path, out: Path) -> dict[str, Any]:
    """`gendr convert` in a process of its own: seconds and peak memory."""
    words = [str(source), "--base", str(base), "-o", str(out), "--overwrite"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        raise SystemExit(f"converting ended with {done.returncode}; -9 means that memory ran out")
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["code"]:
        raise SystemExit("converting failed: the reason stands above")
    return {**answer, "bytes": out.stat().st_size}


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All three stages, in order; what is measured is said as it comes."""
    device = devices.choose_device(args.device)
    precision = devices.choose_precision(device, args.dtype)
    result: dict[str, Any] = {
        "model": "PiSA-SR's layout on SD2.1-base's, full size, random weights",
        "dtype": str(precision),
        "device": str(device),
        "machine": machine(args, device),
        "notes": [],
    }
    print(tables.header(result), flush=True)
    base = folder / "sd21-base"
    if not base.exists():
        said("writing a base with random weights")
        write_base(base, SD21_BASE)
        write_text_encoder(base)
    source = write_pisa(folder / "pisa_sr.pkl", unet_shapes(SD21_BASE))
    out = folder / "converted.safetensors"
    said("converting")
    result["convert"] = convert(source, base, out)
    print(f"converted: {shown(result['convert'])}", flush=True)
    worker = Worker(
        {
            "letter": "C",
            "kind": "model",
            "file": str(out.resolve()),
            "device": str(device),
            "dtype": precision.name,
            "threads": args.threads,
        }
    )
    try:
        said("loading")
        result["load"] = worker.ask("loading")
        print(f"loaded: {shown(result['load'])}", flush=True)
        said(f"restoring {args.size // 4} -> {args.size} px")
        asked = {"size": args.size, "scale": 4.0, "reference": False, "warm": False}
        result["restore"] = worker.ask("restore", **asked, watch=True)
        print(f"restored: {shown(result['restore'])}", flush=True)
    finally:
        worker.close()
    result["load_after"] = load()
    return result


def shown(facts: dict[str, Any]) -> str:
    text = f"{facts['wall']:.1f} s, of the processor {facts['cpu']:.1f} s"
    text += f", peak {facts['peak'] / GB:.2f} GB"
    return text + (f", file of {facts['bytes']:,} bytes" if "bytes" in facts else "")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512, help="pixels of the result (default: 512)")
    parser.add_argument("--dtype", default="fp32", help="of the restoration (default: fp32)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's choice")
    parser.add_argument("--keep", type=Path, help="folder for the files, which stay there")
    parser.add_argument("--json", type=Path, help="file for every single number")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        result = run(args, folder)
    result["minutes"] = (time.monotonic() - began) / 60
    save(result, args.json)
    return result


if __name__ == "__main__":
    main()
