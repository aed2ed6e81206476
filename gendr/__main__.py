"""The command `gendr`, `python -m gendr`, and `python path/to/gendr`."""

from __future__ import annotations

import os
import signal
import sys

if not __package__:
    # Started by the folder's path, as it must be with the Python of ComfyUI's portable version, which
    # looks for no modules in the current folder. This folder's own modules are found through the package.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.path.dirname(here), *(p for p in sys.path if os.path.abspath(p) != here)]
    __package__ = "gendr"

STOPPED = 130  # what shells report for a program that Ctrl-C ended


def main() -> int:
    """The command line; what is imported for it can be interrupted without a traceback."""
    before = {
        number: signal.signal(number, leave)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    # torch takes seconds, and turns an interruption into whatever error it meets first.
    from .cli import main as command

    for number, handler in before.items():
        signal.signal(number, handler)
    return command()


def leave(*_: object) -> None:
    """End at once: nothing has been begun."""
    try:
        os.write(2, b"gendr: stopped\n")
    finally:
        os._exit(STOPPED)


if __name__ == "__main__":
    sys.exit(main())
