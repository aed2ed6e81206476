"""GenDR: one-step generative restoration and enlargement of pictures.

import gendr
model = gendr.load()                       # GenDR-Tiny, or load("some.safetensors")
result = model.restore(image, scale=4)     # b c h w in [0, 1]
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as `typing` has it, which takes its time to import
if TYPE_CHECKING:
    from .fidelity import difference
    from .files.checkpoint import EMBEDDED, EXTENSIONS, CheckpointError, describe, save
    from .loading import load
    from .model import GenDR
    from .pictures import Picture, PictureError
    from .plan import NotEnoughMemory, Plan
    from .report import Cancelled, Progress, Report
    from .resizing import resize
    from .restoration import NotFinite
    from .settings import BOUNDS, COLOR_FIXES, DTYPES, PRESETS, SPEEDS, Settings

__version__ = "0.1.0"

# Where each public name lives. They are imported when they are asked for: torch takes seconds, and
# the command line has to answer Ctrl-C before that.
HOMES = {
    "BOUNDS": "settings",
    "COLOR_FIXES": "settings",
    "DTYPES": "settings",
    "EMBEDDED": "files.checkpoint",
    "EXTENSIONS": "files.checkpoint",
    "PRESETS": "settings",
    "SPEEDS": "settings",
    "Cancelled": "report",
    "CheckpointError": "files.checkpoint",
    "GenDR": "model",
    "NotEnoughMemory": "plan",
    "NotFinite": "restoration",
    "Picture": "pictures",
    "PictureError": "pictures",
    "Plan": "plan",
    "Progress": "report",
    "Report": "report",
    "Settings": "settings",
    "describe": "files.checkpoint",
    "difference": "fidelity",
    "load": "loading",
    "resize": "resizing",
    "save": "files.checkpoint",
}
__all__ = [
    "BOUNDS",
    "COLOR_FIXES",
    "DTYPES",
    "EMBEDDED",
    "EXTENSIONS",
    "PRESETS",
    "SPEEDS",
    "Cancelled",
    "CheckpointError",
    "GenDR",
    "NotEnoughMemory",
    "NotFinite",
    "Picture",
    "PictureError",
    "Plan",
    "Progress",
    "Report",
    "Settings",
    "describe",
    "difference",
    "load",
    "resize",
    "save",
]


def __getattr__(name: str) -> object:
    home = HOMES.get(name)
    if home is not None:
        value = globals()[name] = getattr(import_module(f".{home}", __name__), name)
        return value
    if not name.startswith("_"):
        try:
            return import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
