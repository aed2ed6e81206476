"""`gendr doctor`: what is installed, what the device can do, and whether a known run comes out right.

Two checks of the arithmetic, on a small picture made of formulas:
golden      the embedded model against numbers stored beside its weights when they were made:
            finds damaged weights and code that changed what the model does.
reference   this device and dtype against float32 on the CPU, in the same process:
            finds a driver or a dtype that computes something else. For any model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import devices, loading
from ..files import checkpoint
from ..model import GenDR
from ..settings import SPEEDS

PACKAGES = ("torch", "einops", "safetensors", "numpy", "pillow")
# Largest difference of a mean over a 16th of the picture's side, in units of the range [0, 1].
TOLERANCE = {"fp32": 0.002, "fp16": 0.01, "bf16": 0.01}
GRID = 16


@dataclasses.dataclass
class Check:
    """One thing that was looked at; `ok` None = for information."""

    name: str
    told: str
    ok: bool | None = None


def run(
    model: Path | None,
    base: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    as_json: bool = False,
    speed: str = SPEEDS[0],
) -> int:
    """Print all checks; 0 when none failed."""
    checks = [
        *installation(),
        *hardware(device),
        *folders(),
        *model_checks(model, base, device, dtype, speed),
    ]
    failed = [check for check in checks if check.ok is False]
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(c) for c in checks]}))
        return 1 if failed else 0
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = {True: "ok  ", False: "FAIL", None: "    "}[check.ok]
        print(f"{mark} {check.name:<{width}}  {check.told}")
    print("all is well" if not failed else f"{len(failed)} of the checks failed")
    return 1 if failed else 0


def installation() -> list[Check]:
    package = Path(__file__).resolve().parent.parent
    checks = [
        Check("gendr", f"{version('gendr')} in {package}"),
        Check("python", f"{platform.python_version()} ({sys.executable})"),
        Check("system", f"{platform.platform()}"),
    ]
    for name in PACKAGES:
        found = version(name)
        checks.append(Check(name, found, None if found != "missing" else False))
    return checks


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout" if name == "gendr" else "missing"


def hardware(wanted: str) -> list[Check]:
    checks = [
        Check(
            "processor",
            f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}",
        ),
    ]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        told = f"{card.name}, {card.total_memory / 2**30:.1f} GB"
        checks.append(Check(f"cuda:{index}", f"{told}, CUDA {torch.version.cuda or 'none'}"))
    if torch.cuda.device_count() and not torch.cuda.is_available():
        checks.append(Check("cuda", "there is a card, and torch cannot use it", False))
    try:
        device = devices.choose_device(wanted)
    except ValueError as error:
        return [*checks, Check("device", str(error), False)]
    checks.append(Check("device", f"{device}, {devices.free_bytes(device) / 2**30:.1f} GB free"))
    # CPUs emulate fp16, which takes long and which nothing chooses.
    for name in ("bf16",) if device.type == "cpu" else ("bf16", "fp16"):
        works, gain = devices.probe(str(device), name)
        checks.append(Check(name, f"right, {gain:.1f} x fp32" if works else "not usable here"))
    return checks


def folders() -> list[Check]:
    checks = []
    for name, folder in (("here", Path.cwd()), ("temporary", Path(tempfile.gettempdir()))):
        try:
            with tempfile.TemporaryFile(dir=folder):
                checks.append(Check(name, f"{folder} can be written to"))
        except OSError as error:
            checks.append(Check(name, f"{folder} cannot be written to ({error.strerror})"))
    return checks


def model_checks(
    path: Path | None, base: Path | None, device: str, dtype: str, speed: str
) -> list[Check]:
    file = Path(path or checkpoint.EMBEDDED)
    try:
        # With fold=True a model is checked in the form in which it works.
        model = loading.load(path, base=base, device=device, dtype=dtype, speed=speed)
        told = f"{file}, a folder"
        if file.is_file():
            size = file.stat().st_size / 1e6
            told = f"{file}, {size:.1f} MB, SHA-256 {file_digest(file)}"
        checks = [Check("file", told, True)]
        reference = loading.load(path, base=base, device="cpu", dtype="fp32")
    except (ValueError, OSError) as error:
        return [Check("model", str(error), False)]
    checks.append(Check("model", repr(model)))
    checks.append(Check("speed", str(model.speed)))
    ours, exact = fingerprint(model), fingerprint(reference)
    limit = TOLERANCE[model.dtype]
    remedy = "choose another --dtype, update the driver"
    checks.append(compared("reference", ours, exact, limit, "float32 on the CPU", remedy))
    stored = golden(model)
    if stored is None:
        checks.append(Check("golden", "nothing is stored for this model"))
    else:
        remedy = "the weights or the code are not those that were released"
        checks.append(compared("golden", ours, stored, limit, "the stored run", remedy))
    return checks


def compared(
    name: str, ours: list[float], other: list[float], limit: float, what: str, remedy: str
) -> Check:
    worst = max((abs(a - b) for a, b in zip(ours, other, strict=True)), default=0.0)
    told = f"differs from {what} by at most {worst:.5f} (allowed: {limit:g})"
    return Check(name, told if worst <= limit else f"{told}: {remedy}", worst <= limit)


def picture() -> Tensor:
    """1 3 48 48 in [0, 1]: waves, a disc with a hard edge, and a ramp; the same everywhere."""
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, 48, dtype=torch.float64)], indexing="ij")
    waves = 0.5 + 0.3 * torch.sin(9 * x + 4 * y * y)
    disc = ((x - 0.2) ** 2 + (y + 0.1) ** 2 < 0.3).double()
    ramp = 0.5 + 0.25 * x - 0.2 * y
    return torch.stack([0.7 * waves + 0.3 * disc, 0.5 * ramp + 0.4 * disc, ramp])[None].float()


def fingerprint(model: GenDR) -> list[float]:
    """Means over a grid of the restored test picture, and of what it adds to its coarse copy."""
    # Twice: graphs are recorded in the second pass, and it is them that should be checked.
    for _ in range(1 if model.speed.name == "eager" else 2):
        # What the network makes of it, without what is taken from the input afterwards.
        output = model.restore(picture(), 4.0, fidelity=0.0).float()
    coarse = F.adaptive_avg_pool2d(output, GRID)
    smooth = F.interpolate(F.avg_pool2d(output, 4), scale_factor=4.0)
    added = F.adaptive_avg_pool2d((output - smooth).abs(), GRID)
    return torch.cat([coarse, added]).flatten().tolist()


def golden(model: GenDR) -> list[float] | None:
    """The stored fingerprint of these very weights, if there is one."""
    try:
        record = json.loads(golden_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record["values"] if record.get("sha256") == model.header.sha256 else None


def store_golden() -> Path:
    """After new weights were put in: `python -m gendr.commands.doctor`."""
    model = loading.load(device="cpu", dtype="fp32")
    values = [round(value, 5) for value in fingerprint(model)]
    record = {"sha256": model.header.sha256, "values": values}
    golden_path().write_text(json.dumps(record) + "\n", encoding="utf-8")
    return golden_path()


def golden_path() -> Path:
    return Path(checkpoint.EMBEDDED).parent / "golden.json"


def file_digest(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


if __name__ == "__main__":
    print(store_golden())
