"""A whole Forge with this folder among its extensions, started as a process and asked through its API.

Needs WEBUI_PATH, a checkout of Forge with its `repositories`, and WEBUI_PYTHON, a Python with Forge's
packages; without a graphics card it computes on the CPU. tests/test_webui.py is the quick part.
"""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gendr

ROOT = Path(__file__).resolve().parents[1]
HOME, PYTHON = os.environ.get("WEBUI_PATH"), os.environ.get("WEBUI_PYTHON")
START_SECONDS, RUN_SECONDS = 600, 300
pytestmark = pytest.mark.skipif(
    not (HOME and PYTHON), reason="set WEBUI_PATH to Forge and WEBUI_PYTHON to its Python"
)


class WebUI:
    """One server with a data folder of its own: nothing in the checkout of Forge is written."""

    def __init__(self, data: Path):
        (data / "extensions").mkdir()
        (data / "extensions" / "gendr").symlink_to(ROOT, target_is_directory=True)
        # A file of the person's, beside the model that comes with the extension.
        (data / "models" / "GenDR").mkdir(parents=True)
        (data / "models" / "GenDR" / "mine.safetensors").symlink_to(gendr.EMBEDDED)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = data / "server.log"
        command = [PYTHON, "launch.py", "--api", "--port", str(port), "--data-dir", str(data)]
        command += ["--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-version-check"]
        if not torch.cuda.is_available():
            command.append("--always-cpu")
        quiet = {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
        environment = {**os.environ, **quiet, "HF_HOME": str(data / "hub")}
        environment.pop("PYTHONPATH", None)
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                command, cwd=HOME, env=environment, stdout=log, stderr=log
            )

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    def ask(self, path: str, data: dict | None = None, seconds: float = RUN_SECONDS):
        """JSON of a GET, or of a POST where there is something to send."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(
            self.url + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return json.loads(answer.read())

    def wait(self) -> list[dict]:
        """Until it answers; its upscalers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log[-4000:]
            try:
                return self.ask("/sdapi/v1/upscalers", seconds=30)
            except (OSError, urllib.error.HTTPError):
                time.sleep(1)
        raise AssertionError(f"Forge did not answer:\n{self.log[-4000:]}")

    def stop(self) -> None:
        """End the server."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    server = WebUI(tmp_path_factory.mktemp("webui"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def picture() -> Image.Image:
    """A soft gradient with a square in it, 64 by 48 pixels."""
    rows, columns = np.mgrid[:48, :64]
    colours = np.stack([4 * columns, 5 * rows, 255 - 2 * (rows + columns)], -1).clip(0, 255)
    colours[12:30, 20:44] = (200, 30, 60)
    return Image.fromarray(colours.astype(np.uint8))


def upscaled(webui: WebUI, **asked) -> np.ndarray:
    """The result of one picture in Extras, h w c."""
    file = io.BytesIO()
    picture().save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    answer = webui.ask("/sdapi/v1/extra-single-image", {"image": image, **asked})
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["image"]))).convert("RGB"))


def test_the_whole_webui_offers_its_models_as_upscalers(webui):
    names = [one["name"] for one in webui.ask("/sdapi/v1/upscalers")]
    assert names.count("GenDR-Tiny") == names.count("GenDR mine") == 1


def test_the_extension_loads_without_a_word(webui):
    # Forge itself has words about folders whose Git repository has no remote.
    assert "gendr_upscaler" not in webui.log


def test_its_extras_tab_has_the_models_and_their_settings(webui):
    labels = {one.get("props", {}).get("elem_id") for one in webui.ask("/config")["components"]}
    wanted = {f"extras_gendr_{name}" for name in ("model", "scale", "detail", "fidelity", "preset")}
    assert wanted <= labels


@pytest.mark.parametrize("name", ["GenDR-Tiny", "GenDR mine"])
def test_a_picture_through_the_whole_webui_has_the_library_s_pixels(webui, name):
    result = upscaled(webui, upscaling_resize=2, upscaler_1=name)
    pixels = torch.from_numpy(np.array(picture())).movedim(-1, 0)[None].float() / 255
    restored = gendr.load(device="cpu").restore(pixels, scale=2.0)[0].movedim(0, -1)
    assert result.shape == (96, 128, 3)
    # Another version of torch there, and rounding: a level at most.
    assert np.abs((restored * 255).numpy() - result).max() <= 1
