"""What was made from what, with which settings: the record behind `--resume`.

One line of JSON per finished picture in `.gendr-resume.jsonl`, in the folder of the results. Lines are
appended in one write, so several processes can share a folder. Losing the file loses no picture.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

NAME = ".gendr-resume.jsonl"


def key(source: Path, facts: dict) -> str:
    """Names a result: the source as it is now, and everything that shapes the pixels."""
    status = source.stat()
    whole = {"source": source.name, "bytes": status.st_size, "changed": status.st_mtime_ns, **facts}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """The records of all folders that results go to, read when first asked for."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, dict]] = {}

    def owns(self, target: Path) -> bool:
        """Is the file at `target`, as it is now, one that was made here?"""
        return self._entry(target) is not None

    def finished(self, target: Path, key: str) -> bool:
        """Does `target` hold the whole result that `key` names?"""
        entry = self._entry(target)
        return entry is not None and entry.get("key") == key

    def add(self, target: Path, key: str) -> None:
        entry = {"target": target.name, "bytes": target.stat().st_size, "key": key}
        line = json.dumps(entry) + "\n"
        descriptor = os.open(target.parent / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
        self._records(target.parent)[target.name] = entry

    def _entry(self, target: Path) -> dict | None:
        entry = self._records(target.parent).get(target.name)
        try:
            whole = entry is not None and target.stat().st_size == entry.get("bytes")
        except OSError:
            return None
        return entry if whole else None

    def _records(self, folder: Path) -> dict[str, dict]:
        if folder not in self._folders:
            records: dict[str, dict] = {}
            try:
                text = (folder / NAME).read_text(encoding="utf-8", errors="replace")
            except OSError:
                text = ""
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                    records[entry["target"]] = entry
                except (ValueError, TypeError, KeyError):
                    continue  # a line cut by a full disk: that picture is simply not known
            self._folders[folder] = records
        return self._folders[folder]
