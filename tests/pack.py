"""The pack, loaded the way ComfyUI loads it: under its path as module name, dots replaced."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load(root: Path = ROOT) -> ModuleType:
    """The pack's door. Inside is what `nodes` of it holds, see `nodes`."""
    name = str(root).replace(".", "_x_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, root / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def nodes(part: str = "") -> ModuleType:
    """`nodes`, or `nodes.<part>`, of the pack; without ComfyUI the door itself stays shut."""
    return importlib.import_module(".".join(filter(None, (load().__name__, "nodes", part))))
