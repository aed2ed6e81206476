"""Two processes that train together on this machine, as `accelerate launch` would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Who is who; nothing that has threads has been called yet.
RANKS = """
import os
other = 0
if os.environ["RANK"] == "fork":
    other = os.fork()
    os.environ["RANK"] = "0" if other else "1"
os.environ["LOCAL_RANK"] = os.environ["RANK"]
"""
END = """
if other and os.waitpid(other, 0)[1]:
    sys.exit("the other process failed")
"""


def run_two(imports: str, code: str, words: Sequence[object]) -> None:
    """Python code with these arguments, as ranks 0 and 1 over gloo. AssertionError with what they said.

    imports: what the code begins with, done once for both where a process can be forked: libraries
    take longer to import than what is tested takes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }  # fmt: skip
    ranks = ["fork"] if hasattr(os, "fork") else ["0", "1"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"{imports}\n{RANKS}\n{code}\n{END}", *map(str, words)],
            cwd=ROOT,
            env={**os.environ, **team, "RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ranks
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * len(ranks), said
