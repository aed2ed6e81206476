"""`gendr convert`: a public one-step restorer and its base become one GenDR file."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from ..files import convert
from .progress import clock_time


class Line:
    """One line on a terminal that says what is done and how much of it; silent elsewhere."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stream = stream or sys.stderr
        self.shown = self.stream.isatty()
        self.clock = clock
        self.drawn = self.started = 0.0
        self.what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        now = self.clock()
        if what != self.what:
            self.what, self.started, self.drawn = what, now, 0.0
        if not self.shown or (now - self.drawn < 0.1 and done < total):
            return
        self.drawn = now
        share = done / max(total, 1)
        text = f"[{'#' * round(20 * share):<20}] {share:4.0%} | {what}"
        if done > 0:
            text += f" | {clock_time((now - self.started) * (total - done) / done)} left"
        columns = shutil.get_terminal_size().columns - 1
        self.stream.write("\r" + text[:columns].ljust(min(columns, 79)))
        self.stream.flush()

    def clear(self) -> None:
        if self.shown and self.what:
            self.stream.write("\r" + " " * 79 + "\r")
            self.stream.flush()


def run(args: argparse.Namespace) -> int:
    output = args.output
    if output.suffix.lower() not in (".safetensors", ".sft"):
        args.parser.error(f"--output {output} must end in .safetensors")
    for read in (args.source, args.base):
        if output.resolve() == read.resolve():
            args.parser.error(f"--output {output} is what is read: choose another name")
    if output.exists() and not args.overwrite:
        args.parser.error(f"{output} exists; --overwrite replaces it")
    if not output.parent.is_dir():
        args.parser.error(f"there is no folder {output.parent}: make it first")
    line = Line()

    def accepted(name: str, terms: str) -> bool:
        line.clear()
        print(f"Terms of {name}: {terms}", file=sys.stderr)
        return args.accept_licence

    try:
        header = convert.convert(
            args.source,
            args.base,
            output,
            prompt=args.prompt,
            embeds=args.embeds,
            semantic=bool(args.semantic),
            coeff_t=args.coeff_t,
            dtype=args.dtype,
            accepted=accepted,
            progress=line,
        )
    finally:
        line.clear()
    print(
        f"{output}: {header.name}, {header.dtype}, {output.stat().st_size / 1e9:.2f} GB, "
        f"{header.licence}"
    )
    return 0
