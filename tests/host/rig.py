"""A real ComfyUI as a subprocess, with the pack among its custom nodes and a base folder of its own."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from gendr.files import checkpoint
from gendr.files.header import Header
from gendr.networks.onestep import StepConfig, Unfolded
from gendr.networks.unet import UNet, UNetConfig
from gendr.networks.vae import TINY_VAE, VAE, VAEConfig

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
API_COPIES = sorted((ROOT / "tests" / "api").glob("*.json"))
SAVED = sorted((ROOT / "tests" / "saved").glob("*.json"))
# The templates of earlier releases, each in a folder of its own, as graphs and in API format.
OLD_TEMPLATES = sorted((ROOT / "tests" / "saved").glob("*/workflows/*.json"))
OLD_API_COPIES = sorted((ROOT / "tests" / "saved").glob("*/api/*.json"))
MODEL, SECOND = "random.safetensors", "second.safetensors"
# What is in a checkout but not in a pack, and is large or would be loaded for nothing.
NOT_INSTALLED = shutil.ignore_patterns(".*", "__pycache__", "runs", "datasets", "*.egg-info")
# Side of the example picture that the templates load; the real one would take minutes here.
EXAMPLE = 72
START_SECONDS = 600
RUN_SECONDS = 300


class ComfyUI:
    """One server. `base` is its input, output, models and custom nodes; nothing else is touched."""

    def __init__(self, base: Path, *, packs: tuple[str, ...] = ("gendr",), copy: bool = False):
        """packs: folder names to install the pack under. copy: files instead of a link."""
        self.base = base
        for folder in ("input", "output", "temp", "models", "custom_nodes", "user/default"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        for name in packs:
            place = base / "custom_nodes" / name
            if copy:
                shutil.copytree(ROOT, place, ignore=NOT_INSTALLED)
            else:
                place.symlink_to(ROOT, target_is_directory=True)
        # Without this the first visit opens a dialog over the graph.
        settings = base / "user/default/comfy.settings.json"
        settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
        self.port = _free_port()
        self.log_path = base / "server.log"
        self.process: subprocess.Popen | None = None
        self.greeting = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    def start(self, *arguments: str) -> ComfyUI:
        """Start, and wait until it answers. `greeting` is the log up to there."""
        home = Path(os.environ["COMFYUI_PATH"])
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        command = [python, "main.py", "--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--user-directory", str(self.base / "user"), "--disable-api-nodes"]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}"]
        if not torch.cuda.is_available():
            command.append("--cpu")
        command += shlex.split(os.environ.get("COMFYUI_ARGUMENTS", ""))
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"}
        environment.pop("PYTHONPATH", None)
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], cwd=home, env=environment, stdout=log, stderr=log
            )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended while starting:\n{self.log[-4000:]}")
            try:
                self.get("/system_stats")
                self.greeting = self.log
                return self
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI did not answer:\n{self.log[-4000:]}")

    def stop(self) -> None:
        """End the server."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def get(self, path: str) -> Any:
        """JSON, or bytes where it is none."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            body = answer.read()
            return json.loads(body) if "json" in answer.headers.get_content_type() else body

    def post(self, path: str, data: dict) -> tuple[int, Any]:
        """Status and answer; an error status is an answer too."""
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, body = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode(errors="replace")

    def queue(self, prompt: dict, client: str = "tests") -> str:
        """Queue a graph in API format that the server is expected to take; its prompt id."""
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": client})
        assert status == 200, answer
        return answer["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = RUN_SECONDS) -> Result:
        """What became of a queued graph."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log[-4000:]
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return Result(self, history[prompt_id])
            time.sleep(0.1)
        raise AssertionError(f"no result after {seconds} s:\n{self.log[-4000:]}")

    def run(self, prompt: dict) -> Result:
        """Queue and wait."""
        return self.wait(self.queue(prompt))

    def put(self, name: str, pixels: Tensor) -> str:
        """Write a picture h w c in [0, 1] to the input folder; its name for Load Image."""
        array = (pixels * 255).round().to(torch.uint8).numpy()
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[array.shape[-1]]
        array = array[..., 0] if mode == "L" else array
        Image.fromarray(np.ascontiguousarray(array), mode).save(self.base / "input" / name)
        return name

    def resident_bytes(self) -> int:
        """Main memory of the server."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Result:
    """The history entry of one prompt."""

    def __init__(self, server: ComfyUI, entry: dict):
        self.server = server
        self.entry = entry
        self.status: str = entry["status"]["status_str"]
        self.messages = dict(entry["status"]["messages"])

    @property
    def error(self) -> str:
        """First line of the message a person sees; empty where there was none."""
        facts = self.messages.get("execution_error")
        return facts["exception_message"].splitlines()[0] if facts else ""

    def text(self, node: str) -> str:
        """What a Preview Any node showed."""
        return "".join(self.entry["outputs"][node]["text"])

    def pictures(self, node: str) -> list[np.ndarray]:
        """What a Save or Preview Image node wrote, h w c uint8."""
        found = []
        for image in self.entry["outputs"][node]["images"]:
            query = urllib.parse.urlencode({k: image[k] for k in ("filename", "subfolder", "type")})
            found.append(np.asarray(Image.open(io.BytesIO(self.server.get(f"/view?{query}")))))
        return found


def without_diffusion(prompt: dict) -> dict:
    """The same graph where an ordinary picture takes a decoded one's place: it needs no checkpoint."""
    picture = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
    return {k: picture if n["class_type"] == "VAEDecode" else n for k, n in prompt.items()}


def sizes(prompt: dict, result: Result) -> tuple[set, tuple]:
    """Shapes of the pictures that a template saved, and what its scale makes of the example."""
    savers = [k for k, n in prompt.items() if n["class_type"] == "SaveImage"]
    scale = next(n["inputs"]["scale"] for n in prompt.values() if "scale" in n["inputs"])
    shapes = {picture.shape for saver in savers for picture in result.pictures(saver)}
    return shapes, (int(EXAMPLE * scale), int(EXAMPLE * scale), 3)


def release_of(path: Path) -> str:
    """Of an old template, its release and its name."""
    return f"{path.parents[1].name} {path.stem}"


def write_models(folder: Path) -> None:
    """Two very small models with random weights, and files that are none."""
    folder.mkdir(parents=True, exist_ok=True)
    unet = UNetConfig(
        block_out_channels=(16, 32),
        attention=(False, True),
        layers_per_block=1,
        head_dim=16,
        cross_attention_dim=16,
        norm_num_groups=8,
        tokens=4,
    )
    normed = VAEConfig(block_out_channels=(16, 16, 32), norm_num_groups=8, patch_size=2)
    plain = replace(TINY_VAE, block_out_channels=(16, 32))
    for seed, (name, vae) in enumerate(((MODEL, normed), (SECOND, plain))):
        torch.manual_seed(seed)
        embeds = {"positive": torch.randn(1, unet.tokens, unet.cross_attention_dim)}
        network = Unfolded(StepConfig(unet=unet, vae=vae), VAE(vae), UNet(unet), embeds)
        header = Header(config=network.config, name="Random", licence="MIT", tile=128)
        checkpoint.save(folder / name, network, header, dtype="fp32")
    whole = (folder / MODEL).read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.safetensors").touch()
    (folder / "text.safetensors").write_text("this is no model")
    save_file({"model.0.weight": torch.zeros(3, 3)}, folder / "other.safetensors")
    torch.save(_Evil(), folder / "evil.pth")


def write_clip(path: Path) -> None:
    """Eight moving frames of 64x48 with a tone; nothing where PyAV is missing."""
    try:
        import av
    except ImportError:
        return
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=8)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = file.add_stream("aac", rate=44100)
        for n in range(8):
            frame = np.full((48, 64, 3), 60, np.uint8)
            frame[10:30, 4 * n : 4 * n + 20] = 220
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame)))
        tone = np.sin(np.arange(44100) * 0.05).astype(np.float32)[None]
        sound = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        sound.rate = 44100
        file.mux(audio.encode(sound))
        file.mux(video.encode())
        file.mux(audio.encode())


def video_facts(folder: Path) -> tuple[int, int, int, bool]:
    """Frames, height, width and whether there is sound, of the newest video in a folder."""
    import av

    newest = max(folder.glob("*.mp4"), key=lambda file: file.stat().st_mtime)
    with av.open(str(newest)) as file:
        frames = [frame.to_ndarray(format="rgb24").shape for frame in file.decode(video=0)]
        return len(frames), *frames[0][:2], bool(file.streams.audio)


class _Evil:
    """A pickle that would leave a trace if it were executed."""

    def __reduce__(self) -> tuple:
        return (open, ("evil", "w"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
