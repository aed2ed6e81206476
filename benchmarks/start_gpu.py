"""Starts benchmarks.gpu with carried packages behind the installed ones, or says what is missing."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

NEEDED = ("torch", "numpy", "PIL", "einops", "safetensors", "pytest")

root = Path(__file__).resolve().parents[1]
carried = os.environ.get("GENDR_PACKAGES", "")
later = [str(Path(carried).resolve())] if carried else []
sys.path[:] = [str(root), *(p for p in sys.path if p != str(root / "benchmarks")), *later]
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(
        f"benchmarks/gpu.sh: {', '.join(missing)} missing for {sys.executable}; on a machine with "
        "a network `pip install --target FOLDER einops safetensors numpy pillow pytest diffusers`, "
        "then --packages FOLDER"
    )
# For the processes that are started from here: PYTHONPATH would put carried packages in front.
os.environ["GENDR_PATH"] = os.pathsep.join(sys.path)

from benchmarks import gpu  # noqa: E402

sys.exit(gpu.main())
