"""One bar over all the work of a run, on stderr: pictures, tiles and the time left."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from .trouble import plain


class Bar:
    """Drawn on a terminal only; elsewhere it stays silent and the lines per picture tell the way.

    The work is counted in pixels of the results, so that large pictures weigh as much as they take.
    """

    def __init__(
        self,
        pictures: int,
        pixels: int,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream or sys.stderr
        self.shown = shown and self.stream.isatty()
        self.pictures, self.pixels = pictures, pixels
        self.finished = 0  # pictures
        self.done = 0  # pixels of pictures that are finished
        self.saved = 0  # of those, pixels that took no time
        self.unit = "tile"
        self.name, self.now = "", 0  # the present picture and its pixels
        self.clock = clock
        self.started: float | None = None
        self.drawn = 0.0
        self.width = 0

    def begin(self, name: str, pixels: int, unit: str = "tile") -> None:
        """A picture comes up whose result has `pixels` pixels, and which is made in these units."""
        self.unit = unit
        if self.started is None:
            self.started = self.clock()
        self.name, self.now = plain(name), pixels
        self.draw(0, 0)

    def tile(self, done: int, total: int, share: float) -> None:
        """`done` of `total` tiles of the present picture are there, and this share of its work."""
        if self.clock() - self.drawn >= 0.1 or share == 1:
            self.draw(done, total, share)

    def draw(self, done: int, total: int, share: float = 0.0) -> None:
        if not self.shown:
            return
        self.drawn = self.clock()
        part = self.done + self.now * share
        share = min(part / max(self.pixels, 1), 1.0)
        tiles = f" | {self.unit} {min(done + 1, total)}/{total}" if total else ""
        text = f"{share:4.0%} | picture {self.finished + 1}/{self.pictures}{tiles}"
        text += f" | {self.left(part)} | {self.name}"
        columns = shutil.get_terminal_size().columns - 1
        line = f"[{'#' * round(20 * share):<20}] {text}" if columns >= 60 else text
        self.write(line[:columns])

    def left(self, part: float) -> str:
        worked = part - self.saved
        elapsed = self.clock() - self.started if self.started is not None else 0.0
        if elapsed <= 0 or worked <= 0:
            return "--:-- left"
        return f"{clock_time(elapsed * (self.pixels - part) / worked)} left"

    def picture(self, pixels: int, worked: bool = True) -> None:
        """A picture is finished, one way or the other; `worked` where the model ran for it."""
        self.finished += 1
        self.done += pixels
        if not worked:
            self.saved += pixels

    def write(self, line: str) -> None:
        self.stream.write("\r" + line.ljust(self.width))
        self.stream.flush()
        self.width = len(line)

    def clear(self) -> None:
        """Make room for a line of text."""
        if self.shown and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()
            self.width = 0


def clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
