"""What an evaluation has found so far: one JSON line per picture and method, flat in memory.

`records/METHOD.jsonl` is only ever appended to, so a kill loses at most the line being written,
and the same command goes on where it stopped. In memory a value is eight bytes in an array;
thousands of pictures stay small. A value is stored under its metric's name and version, so adding
a metric computes only that metric, and a changed definition never mixes with older numbers.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

ABSENT, VALUE, UNDEFINED = 0, 1, 2
# Fewer pictures than this have a mean difference, but no interval.
FEWEST = 6


@dataclass
class Column:
    """One metric of one method: a value or its absence for every picture."""

    values: np.ndarray
    state: np.ndarray
    reasons: Counter[str] = field(default_factory=Counter)

    @classmethod
    def empty(cls, count: int) -> Column:
        return cls(np.full(count, np.nan), np.zeros(count, np.uint8))


class Records:
    """The records of one method.

    line: {"stem", "signature": of how the result was made and what it was compared with, "size":
    [w, h], "sha256", "values": {key: number or null}, "why": {key: reason}, "notes": [...]} or
    {"stem", "error"}. A line without "signature" adds values to the last.
    """

    def __init__(self, path: Path, stems: list[str]):
        self.path, self.stems = path, stems
        self.index = {stem: i for i, stem in enumerate(stems)}
        self.columns: dict[str, Column] = {}
        self.signatures: list[str | None] = [None] * len(stems)
        self.sha256: list[str | None] = [None] * len(stems)
        self.sizes = np.zeros((len(stems), 2), np.int32)
        self.notes: dict[str, list[str]] = {}
        self.errors: dict[str, str] = {}
        self._file: TextIO | None = None
        for line in _lines(path):
            self._apply(line)

    def column(self, key: str) -> Column:
        if key not in self.columns:
            self.columns[key] = Column.empty(len(self.stems))
        return self.columns[key]

    def measured(self, stem: str) -> bool:
        """Whether there is a result at all."""
        return self.signatures[self.index[stem]] is not None

    def has(self, stem: str, key: str) -> bool:
        """Whether this metric was computed for the picture, or found to be undefined."""
        return key in self.columns and self.columns[key].state[self.index[stem]] != ABSENT

    def done(self, stem: str, signature: str, keys: Iterable[str]) -> bool:
        """Whether all these metrics are known for exactly this result and reference."""
        same = self.signatures[self.index[stem]] == signature
        return same and all(self.has(stem, key) for key in keys)

    def add(self, line: dict[str, Any]) -> None:
        """Write one line, whole or not at all for every later reader, and take it in."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _end_torn_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        self._apply(line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _apply(self, line: dict[str, Any]) -> None:
        at = self.index.get(line.get("stem"))
        if at is None:
            return  # a picture of an earlier, larger run
        stem = self.stems[at]
        if "error" in line:
            self._forget(at)
            self.errors[stem] = line["error"]
            return
        if "signature" in line:
            if line["signature"] != self.signatures[at]:
                self._forget(at)
            self.errors.pop(stem, None)
            self.signatures[at] = line["signature"]
            self.sizes[at] = line["size"]
            self.sha256[at] = line["sha256"]
            self.notes.pop(stem, None)
            if line.get("notes"):
                self.notes[stem] = line["notes"]
        why = line.get("why", {})
        for key, value in line["values"].items():
            column = self.column(key)
            column.values[at] = np.nan if value is None else value
            column.state[at] = UNDEFINED if value is None else VALUE
            if value is None:
                column.reasons[why.get(key, "undefined")] += 1

    def _forget(self, at: int) -> None:
        self.signatures[at] = self.sha256[at] = None
        self.notes.pop(self.stems[at], None)
        for column in self.columns.values():
            column.values[at], column.state[at] = np.nan, ABSENT


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Complete records of a file; a torn line, left by a kill, is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def _end_torn_line(path: Path) -> None:
    """Put a newline after a line that a kill left without one, so that the next one is readable."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def write_csv(path: Path, records: dict[str, Records], keys: dict[str, str]) -> None:
    """One row per picture and method. keys: column title -> metric key; empty = n/a."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        head = ("picture", "method", "width", "height", *keys, "sha256", "notes", "error")
        writer.writerow(head)
        stems = next(iter(records.values())).stems if records else []
        for at, stem in enumerate(stems):
            for method, found in records.items():
                columns = [found.columns.get(key) for key in keys.values()]
                values = [
                    "" if c is None or c.state[at] != VALUE else f"{c.values[at]:.6g}"
                    for c in columns
                ]
                width, height = found.sizes[at] if found.signatures[at] else ("", "")
                writer.writerow(
                    (stem, method, width, height, *values, found.sha256[at] or "",
                     "; ".join(found.notes.get(stem, ())), found.errors.get(stem, ""))
                )  # fmt: skip
    os.replace(temporary, path)


@dataclass(frozen=True)
class Summary:
    """Mean of one metric over the pictures that every method has, and the paired difference.

    difference: mean (this method - baseline), with `low`, `high` its 95 % interval (bootstrap over
    pictures), None for the baseline itself. better: pictures on which this method is the better.
    """

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float
    median: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    better: int | None = None


def summarise(
    records: dict[str, Records], key: str, better: str, baseline: str
) -> dict[str, Summary]:
    """{method: Summary} of one metric; methods without any value are left out.

    Means are taken over the common pictures, so that a method is never ahead for having failed on
    the difficult ones.
    """
    values = {
        name: found.columns[key].values
        for name, found in records.items()
        if key in found.columns and not np.isnan(found.columns[key].values).all()
    }
    if not values:
        return {}
    common = ~np.isnan(np.stack(list(values.values()))).any(axis=0)
    if not common.any():
        return {}
    result = {}
    for name, column in values.items():
        own = column[common]
        paired: dict[str, Any] = {}
        if name != baseline and baseline in values:
            other = values[baseline][common]
            low, high = interval(own - other) or (None, None)
            gain = cost(own, better) < cost(other, better)
            paired = {
                "difference": float((own - other).mean()),
                "low": low,
                "high": high,
                "better": int(gain.sum()),
            }
        result[name] = Summary(
            int(common.sum()), float(own.mean()), float(own.std()), float(own.min()),
            float(own.max()), float(np.median(own)), **paired,
        )  # fmt: skip
    return result


def cost(values: np.ndarray | float, better: str) -> np.ndarray | float:
    """Values turned so that less is better, whatever the metric's direction."""
    if better == "one":
        # Twice too blurred is as far from 1 as twice too sharp.
        return np.abs(np.log(np.maximum(values, 1e-6)))
    return values if better == "lower" else -values


def interval(differences: np.ndarray, draws: int = 1000) -> tuple[float, float] | None:
    """95 % interval of the mean: percentile bootstrap; the normal one above 1000 pictures.

    None below FEWEST pictures, where a resample knows next to nothing of the spread.
    """
    n, mean = len(differences), float(differences.mean())
    if n < FEWEST:
        return None
    if n > 1000:
        half = 1.96 * float(differences.std(ddof=1)) / n**0.5
        return mean - half, mean + half
    rng = np.random.default_rng(0)
    means = differences[rng.integers(n, size=(draws, n))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
