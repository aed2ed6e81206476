"""What turns an input into a result: resizing, a checkpoint, a ready folder, a spandrel model."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import gendr
from gendr import pictures
from gendr.devices import choose_device
from gendr.files import checkpoint
from gendr.settings import for_model
from train import peers
from train.evaluation.metrics import as_tensor

EMBEDDED = "embedded"
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
# A method's name is a folder name, a table heading and a CSV value.
NAME = re.compile(r"[\w .+()=,-]{1,60}")


@dataclass
class Result:
    """pixels: uint8 h w 3. seam: score at the tiles' borders, None when made in one piece.

    grid: the fields of the `gendr.tiles.Grid` whose borders these are, where it is known.
    """

    pixels: np.ndarray
    seconds: float | None = None
    peak: float | None = None
    seam: float | None = None
    no_seam: str = "made in one piece: no tile border"
    tiles: int = 1
    grid: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def save(self, path: Path, signature: str) -> None:
        """Write an 8-bit PNG that also says how it came about, atomically."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "pixels"}
        text = PngInfo()
        text.add_text("evaluation", json.dumps({"signature": signature, **facts}))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        Image.fromarray(self.pixels).save(temporary, "PNG", pnginfo=text, compress_level=4)
        os.replace(temporary, path)

    @classmethod
    def saved(cls, path: Path, signature: str) -> Result | None:
        """A result written before, None unless it was made in exactly the same way."""
        try:
            with Image.open(path) as image:
                facts = json.loads(image.text["evaluation"])
                if facts.pop("signature") != signature:
                    return None
                return cls(np.asarray(image), **facts)
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            return None  # missing, torn or somebody else's: it is made again


class NotLoaded(RuntimeError):
    """A method that can't do any picture; the message says why."""


class Method(Protocol):
    """One column of the report.

    name; kind; facts: what the report tells about it; identity: everything that decides its
    pixels, so that results of an earlier run are only reused when nothing changed; kept: whether
    results are worth writing to disk.
    """

    name: str
    kind: str
    kept: bool
    facts: dict[str, Any]
    identity: str

    def source(self, stem: str) -> Path | None:
        """The file a ready result is read from, None where results are made."""

    def make(self, stem: str, path: Path, rgb: np.ndarray) -> Result:
        """The result for the input at `path`, whose 8-bit RGB pixels are `rgb`."""

    def close(self) -> None:
        """Give the memory back."""


def read_rgb(path: Path) -> np.ndarray:
    """Any picture file as 8-bit RGB, `h w 3`; transparency is left out. Raises PictureError."""
    return rgb8(pictures.read(path).pixels)


def rgb8(pixels: torch.Tensor) -> np.ndarray:
    """1 c h w in [0, 1] with c = 1..4 (grey, grey + alpha, RGB, RGBA) -> uint8 h w 3."""
    colors = pixels[0, :3] if pixels.shape[1] >= 3 else pixels[0, :1].expand(3, -1, -1)
    # NumPy, not torch: on a busy machine torch's threads cost more than these few operations.
    values = colors.float().numpy().transpose(1, 2, 0) * 255.0
    return np.ascontiguousarray(values.round().clip(0, 255).astype(np.uint8))


def file_sha256(path: Path) -> str:
    """Hash of a file, or of all files of a folder in the order of their names."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for one in files:
        with one.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def pixels_sha256(pixels: np.ndarray) -> str:
    """First 16 digits of the hash of the pixels, whatever file format they came in."""
    shape = str(pixels.shape).encode()
    return hashlib.sha256(shape + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def identity(*parts: Any) -> str:
    """A short hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_sha256() -> str:
    """Hash of the sources that restore, without commands."""
    digest, package = hashlib.sha256(), Path(gendr.__file__).parent
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] not in ("commands", "cli.py", "__main__.py"):
            digest.update(name.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Resize:
    """Pillow's bicubic or Lanczos enlargement: what any method has to be better than."""

    kind, kept = "resampling", False

    def __init__(self, name: str, settings: gendr.Settings):
        self.name, self.settings = name, settings
        self.filter = FILTERS[name]
        self.facts = {"what": f"Pillow {name}, 8 bit"}
        self.identity = identity("resize", name, settings.scale)

    def source(self, stem: str) -> Path | None:
        return None

    def make(self, stem: str, path: Path, rgb: np.ndarray) -> Result:
        height, width = self.settings.target_size(*rgb.shape[:2])
        started = time.perf_counter()
        pixels = np.asarray(Image.fromarray(rgb).resize((width, height), self.filter))
        return Result(pixels, time.perf_counter() - started)

    def close(self) -> None:
        pass


class Folder:
    """Ready results of any program, one file per input, paired by name."""

    kind, kept = "ready results", False

    def __init__(self, name: str, folder: Path, files: dict[str, Path], facts: dict[str, Any]):
        self.name, self.files = name, files
        self.facts = {"what": f"folder {folder.name}", **facts}
        self.identity = identity("folder")

    def source(self, stem: str) -> Path | None:
        return self.files.get(stem)

    def make(self, stem: str, path: Path, rgb: np.ndarray) -> Result:
        if stem not in self.files:
            raise FileNotFoundError(f"no result of this name in the folder of {self.name}")
        return Result(
            read_rgb(self.files[stem]), no_seam="tile borders of ready results are not known"
        )

    def close(self) -> None:
        pass


class Checkpoint:
    """A GenDR checkpoint, loaded when the first picture needs it."""

    kind, kept = "GenDR", True

    def __init__(
        self, name: str, path: Path | None, settings: gendr.Settings, *, device: str, dtype: str
    ):
        """Raises CheckpointError when the file is no GenDR checkpoint, before any work is done."""
        self.name, self.path = name, path
        self.device, self.dtype = device, dtype
        file = Path(path or checkpoint.EMBEDDED)
        header = checkpoint.describe(file)
        sha256 = file_sha256(file)
        self._stamp = file, file.stat().st_mtime_ns
        self.settings = for_model(settings, header.get("color_fix"))
        chosen = {k: v for k, v in asdict(self.settings).items() if v is not None}
        self.facts = {
            "what": "GenDR checkpoint",
            "file": file.name,
            "sha256": sha256,
            "header": {k: v for k, v in header.items() if k not in ("path", "config")},
            "settings": chosen,
            "parameters": header.get("parameters"),
            "licence": header.get("licence"),
            "dtype": dtype,
            "device": device,
        }
        # The code and the kind of device are part of what makes a result, too.
        place = device if device != "auto" else f"auto, {torch.cuda.is_available()}"
        self.identity = identity("gendr", sha256, chosen, dtype, place, code_sha256())
        self._model: gendr.GenDR | None = None

    @property
    def model(self) -> gendr.GenDR:
        if self._model is None:
            file, written = self._stamp
            if not file.exists() or file.stat().st_mtime_ns != written:
                raise NotLoaded(f"{file.name} was changed since the run began: start it again")
            try:
                self._model = gendr.load(self.path, device=self.device, dtype=self.dtype)
            except ValueError as error:
                raise NotLoaded(str(error)) from error
            self.facts.update(
                parameters=self._model.parameters,
                licence=self._model.licence,
                dtype=self._model.dtype,
                device=str(self._model.device),
            )
        return self._model

    def source(self, stem: str) -> Path | None:
        return None

    def make(self, stem: str, path: Path, rgb: np.ndarray, **changes: Any) -> Result:
        """changes: settings that differ for this picture, as the comparison of tile sizes needs."""
        settings = {**asdict(self.settings), **changes}
        model = self.model  # loading is no part of the time
        image = pictures.read(path).pixels
        pixels, report = model.restore_with_report(image, **settings)
        result = Result(
            rgb8(pixels),
            report.seconds,
            report.peak_bytes / 2**30 if report.peak_bytes else None,
            report.seam_score,
            tiles=report.tiles,
            notes=list(report.events),
        )
        if result.seam is None and result.tiles > 1:
            result.no_seam = "a seamless picture: its grid lies elsewhere"
        if report.tiles > 1:
            result.grid = asdict(report.plan.grid)
        return result

    def close(self) -> None:
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Spandrel:
    """Any enlarging model that spandrel knows (ESRGAN, SwinIR, DAT and others), in one piece."""

    kind, kept = "spandrel", True

    def __init__(self, name: str, path: Path, settings: gendr.Settings, *, device: str):
        """Raises ValueError (PeerError) without spandrel, or for a file that it doesn't know."""
        model = peers.read(path)
        self.name, self.settings, self.device = name, settings, str(choose_device(device))
        self.model = model
        sha256 = file_sha256(path)
        self.facts = {
            "what": f"{model.architecture.name} by spandrel",
            "file": path.name,
            "sha256": sha256,
            "scale": model.scale,
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "device": device,
            "dtype": "float32",
        }
        self.identity = identity("spandrel", sha256, settings.scale, device)

    def source(self, stem: str) -> Path | None:
        return None

    def make(self, stem: str, path: Path, rgb: np.ndarray) -> Result:
        model = self.model.to(self.device)
        started = time.perf_counter()
        with torch.inference_mode():
            pixels = rgb8(model(as_tensor(rgb).to(self.device)).cpu())
        seconds = time.perf_counter() - started
        height, width = self.settings.target_size(*rgb.shape[:2])
        notes = []
        if pixels.shape[:2] != (height, width):
            notes.append(f"a x{self.model.scale} model: its result was resized to {width}x{height}")
            resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
            pixels = np.asarray(resized)
        return Result(pixels, seconds, notes=notes)

    def close(self) -> None:
        self.model.to("cpu")


def model_name(text: str) -> str | None:
    """What a checkpoint given without a name is called, None = its file's name."""
    return "GenDR-Tiny" if text.partition("?")[0] == EMBEDDED else None


def named(text: str, *, default: str | None = None) -> tuple[str, str, dict[str, Any]]:
    """NAME=PATH?setting=value&... -> (name, path, settings). Raises ValueError.

    Without NAME= the file's own name is taken.
    """
    head, _, query = text.partition("?")
    # A path may hold "=" too: only what comes before the first separator can be a name.
    name, equals, path = head.partition("=")
    if not equals or "/" in name or "\\" in name:
        name, path = default or Path(head).stem, head
    if not NAME.fullmatch(name) or not name.strip(" ."):
        raise ValueError(f"{name!r} can't name a method: use letters, digits, spaces and .+()-_")
    changes: dict[str, Any] = {}
    known = [f.name for f in fields(gendr.Settings)]
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in known:
            raise ValueError(f"{key!r} in {text!r} is no setting: one of {', '.join(known)}")
        changes[key] = _setting(value)
    return name, path, changes


def _setting(value: str) -> Any:
    """true, false, 3, 0.5 or a word, as `Settings` checks it next."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
