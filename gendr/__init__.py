"""GenDR: one-step generative restoration and enlargement of pictures.

import gendr
model = gendr.load()                       # GenDR-Tiny, or load("some.safetensors")
result = model.restore(image, scale=4)     # b c h w in [0, 1]
"""

from .fidelity import difference
from .files.checkpoint import EMBEDDED, EXTENSIONS, CheckpointError, describe, load, save
from .model import GenDR
from .pictures import Picture, PictureError
from .plan import Plan
from .report import Cancelled, Progress, Report
from .resize import resize
from .restoration import NotFinite
from .settings import BOUNDS, COLOR_FIXES, DTYPES, PRESETS, SPEEDS, Settings

__version__ = "0.1.0"

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
