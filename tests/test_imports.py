"""Who imports whom: the directions in which the packages of the project depend on each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A folder, and what nothing inside it may import.
FORBIDDEN = {
    "gendr": ("train", "nodes", "tests", "benchmarks", "comfy", "diffusers"),
    "gendr/networks": (
        *("gendr.files", "gendr.speed", "gendr.pictures", "gendr.commands", "gendr.model"),
        *("gendr.plan", "gendr.tiles", "gendr.settings"),
    ),
    "gendr/files": (
        *("gendr.speed", "gendr.pictures", "gendr.commands", "gendr.model", "gendr.restoration"),
        *("gendr.plan", "gendr.loading"),
    ),
    "gendr/speed": ("gendr.files", "gendr.pictures", "gendr.commands", "gendr.model"),
    "gendr/pictures": ("gendr.networks", "gendr.files", "gendr.speed", "gendr.commands"),
    "nodes": ("train", "tests", "benchmarks", "diffusers", "transformers"),
    "train": ("nodes", "tests"),
    "train/stage1": ("train.stage2",),
    "train/stage2": ("train.stage1",),
}
# ComfyUI's own packages, known to one file alone.
HOST = ("comfy", "folder_paths", "nodes_", "comfy_extras", "server")


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it; names of their parts as well."""
    package = path.relative_to(ROOT).parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # The pack's own folder has no name: `..gendr` from nodes/ is gendr.
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            found |= {module} | {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
    return found


def offences(folder: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in sorted(imported(path))
        if any(name == one or name.startswith(f"{one}.") for one in forbidden)
    ]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_folders_import_in_their_direction(folder):
    assert list((ROOT / folder).rglob("*.py")), "the folder has moved"
    assert offences(folder, FORBIDDEN[folder]) == []


def test_one_file_alone_knows_comfyui():
    assert {line.split()[0] for line in offences("nodes", HOST)} <= {"nodes/host.py"}
    assert offences("gendr", HOST) == []


def test_there_is_no_circle_between_the_modules_of_gendr():
    """Imports inside functions and for types included."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / "gendr").rglob("*.py")
    }
    arrows = {name: imported(path) & files.keys() for name, path in files.items()}
    done: set[str] = set()
    while ready := {name for name in files.keys() - done if arrows[name] <= done}:
        done |= ready
    assert files.keys() - done == set()


def test_relative_imports_are_resolved_as_python_does():
    names = imported(ROOT / "gendr" / "networks" / "onestep.py")
    assert {"gendr.schedule", "gendr.networks.unet"} <= names
    assert "gendr.plan" in imported(ROOT / "nodes" / "upscale.py")
