"""A server for all tests of this folder; without one they are skipped and say why."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import rig
from PIL import Image

WHY = "set COMFYUI_PATH to a ComfyUI checkout (and run in its environment) for the host tests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.comfy)
            if not os.environ.get("COMFYUI_PATH"):
                item.add_marker(pytest.mark.skip(reason=WHY))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not os.environ.get("COMFYUI_PATH"):
        terminalreporter.write_line(f"tests/host skipped: {WHY}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rig.ComfyUI]:
    """ComfyUI with the pack, the probe nodes, an example picture and two models."""
    base = tmp_path_factory.mktemp("comfyui")
    host = rig.ComfyUI(base)
    shutil.copy(Path(__file__).parent / "probe_nodes.py", base / "custom_nodes")
    # Under the name that the templates have, but small.
    example = Path(os.environ["COMFYUI_PATH"]) / "input" / "example.png"
    with Image.open(example) as picture:
        side = (rig.EXAMPLE, rig.EXAMPLE)
        small = picture.convert("RGB").resize(side, Image.Resampling.LANCZOS)
    small.save(base / "input" / "example.png")
    rig.write_clip(base / "input" / "clip.mp4")
    rig.write_models(base / "models" / "gendr")
    try:
        yield host.start()
    finally:
        host.stop()
