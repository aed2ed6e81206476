"""What was made from what, with which settings: the record behind `--resume`.

One line of JSON per finished picture in `.gendr-resume.jsonl`, in the folder of the results. Lines are
appended in one write, so several processes can share a folder. Losing the file loses no picture.
A line is written just before its picture takes its place, and names it by its content, so that a
run that is killed at any moment leaves nothing that the next one does not know.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

NAME = ".gendr-resume.jsonl"
SAMPLE = 2**16  # bytes at either end and in the middle that a picture is known by


def key(source: Path, facts: dict) -> str:
    """Names a result: the source as it is now, and everything that shapes the pixels."""
    status = source.stat()
    whole = {"source": source.name, "bytes": status.st_size, "changed": status.st_mtime_ns, **facts}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(path: Path) -> tuple[int, str]:
    """A file's size, and a digest of its beginning, middle and end."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        for place in (0, max(0, (size - SAMPLE) // 2), max(0, size - SAMPLE)):
            file.seek(place)
            digest.update(file.read(SAMPLE))
    return size, digest.hexdigest()[:32]


class Journal:
    """The records of all folders that results go to, read when first asked for."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, list[dict]]] = {}

    def owns(self, target: Path) -> bool:
        """Is the file at `target`, as it is now, one that was made here?"""
        return self._entry(target) is not None

    def finished(self, target: Path, key: str) -> bool:
        """Does `target` hold the whole result that `key` names?"""
        entry = self._entry(target)
        return entry is not None and entry.get("key") == key

    def add(self, target: Path, key: str, written: Path | None = None) -> None:
        """Record the result at `target`, which for now lies at `written`."""
        size, content = fingerprint(written or target)
        entry = {"target": target.name, "bytes": size, "content": content, "key": key}
        line = json.dumps(entry) + "\n"
        descriptor = os.open(target.parent / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
        self._records(target.parent).setdefault(target.name, []).append(entry)

    def _entry(self, target: Path) -> dict | None:
        """The newest record of the file that is at `target` now."""
        entries = self._records(target.parent).get(target.name)
        if not entries:
            return None
        try:
            size, content = fingerprint(target)
        except OSError:
            return None
        # Records of 0.1.0 know the size alone.
        whole = (
            e for e in entries if e.get("bytes") == size and e.get("content") in (None, content)
        )
        return next(reversed(list(whole)), None)

    def _records(self, folder: Path) -> dict[str, list[dict]]:
        if folder not in self._folders:
            records: dict[str, list[dict]] = {}
            try:
                text = (folder / NAME).read_text(encoding="utf-8", errors="replace")
            except OSError:
                text = ""
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                    records.setdefault(entry["target"], []).append(entry)
                except (ValueError, TypeError, KeyError):
                    continue  # a line cut by a full disk: that picture is simply not known
            self._folders[folder] = records
        return self._folders[folder]
