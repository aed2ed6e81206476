"""Where every picture of a folder or of its tars is: found once, kept as arrays, shared by all.

Millions of pictures fit: about 40 bytes and the name for each, in arrays that the processes of a run
map from one file instead of holding a copy each. Large indexes are kept in a folder (`cache_folder`)
and made again when a folder, a tar or a list of captions has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"}
# Pictures from which on an index is worth a file: below that looking again takes no second.
KEPT_FROM = 20_000
VERSION = 1
# Where a caption is: nowhere; a member of the tar; words of a .jsonl; a .txt beside the picture.
NONE, MEMBER_TXT, MEMBER_JSON, WORDS, BESIDE = range(5)
COLUMNS = {
    "container": "i", "offset": "q", "size": "q", "kind": "b", "caption": "q", "length": "q",
    "name": "q",
}  # fmt: skip
BLOCK = 512


class DataError(ValueError):
    """The data as a whole cannot be used."""


@dataclass(frozen=True)
class Entry:
    """Where a picture and its caption are: a file, or `size` bytes at `offset` of a tar."""

    path: Path
    name: str
    offset: int = -1
    size: int = 0
    caption: tuple[str, int, int] | str = ""  # the words, or (ending, offset, size) inside the tar

    def read(self) -> bytes:
        if self.offset < 0:
            return self.path.read_bytes()
        return _slice(self.path, self.offset, self.size)

    def words(self) -> str:
        """The caption, read late; empty when there is none or it cannot be read."""
        try:
            if isinstance(self.caption, tuple):
                ending, offset, size = self.caption
                if offset < 0:
                    beside = self.path.with_suffix(ending)
                    return caption_words(beside.read_text(encoding="utf-8"), ending)
                return caption_words(_slice(self.path, offset, size).decode("utf-8"), ending)
        except (OSError, ValueError):
            return ""
        return self.caption


class Index(Sequence[Entry]):
    """The pictures of one source, by name.

    root: the folder, or the one tar. tars: paths below it (or itself). columns: one array each, see
    `COLUMNS`; names and words: UTF-8, end to end.
    """

    def __init__(
        self,
        root: Path,
        tars: Sequence[str],
        columns: dict[str, np.ndarray],
        names: np.ndarray,
        words: np.ndarray,
    ):
        self.root, self.tars = root, tars
        self.columns, self.names, self.words = columns, names, words

    def __len__(self) -> int:
        return len(self.columns["offset"])

    def __getitem__(self, at: int) -> Entry:
        if not 0 <= at < len(self):
            raise IndexError(at)
        row = {name: int(column[at]) for name, column in self.columns.items() if name != "name"}
        start = int(self.columns["name"][at - 1]) if at else 0
        name = self.names[start : int(self.columns["name"][at])].tobytes()
        name = name.decode("utf-8", "surrogateescape")
        caption: tuple[str, int, int] | str = ""
        if row["kind"] == WORDS:
            text = self.words[row["caption"] : row["caption"] + row["length"]]
            caption = text.tobytes().decode("utf-8")
        elif row["kind"] != NONE:
            ending = ".json" if row["kind"] == MEMBER_JSON else ".txt"
            caption = (ending, row["caption"], row["length"])
        if row["container"] < 0:
            return Entry(self.root / name, name, caption=caption)
        tar = self.root / self.tars[row["container"]] if self.tars[0] else self.root
        return Entry(tar, f"{tar.name}/{name}", row["offset"], row["size"], caption)

    def captioned(self) -> int:
        """How many pictures have a caption, as far as can be told without reading them."""
        return int(np.count_nonzero(self.columns["kind"]))


class Sources(Sequence[Entry]):
    """Several indexes one behind the other."""

    def __init__(self, parts: Sequence[Index]):
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in self.parts])

    @property
    def sizes(self) -> list[int]:
        """Pictures of each."""
        return [len(part) for part in self.parts]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, at: int) -> Entry:
        if not 0 <= at < len(self):
            raise IndexError(at)
        part = int(np.searchsorted(self.ends, at, side="right"))
        return self.parts[part][at - (int(self.ends[part - 1]) if part else 0)]

    def captioned(self) -> int:
        return sum(part.captioned() for part in self.parts)


def cache_folder() -> Path:
    """Where large indexes are kept: $GENDR_CACHE, or gendr in the person's folder of caches."""
    if chosen := os.environ.get("GENDR_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gendr"


def find(source: str | Path, cache: Path | None = None) -> Index:
    """Every picture below a folder (recursively, by name), inside its tars, or inside one tar.

    Captions: `name.txt` beside the picture; lines {"file": ..., "caption" or "text": ...} of any
    .jsonl in the folder, with paths relative to it; in a tar `key.txt` or `key.json` beside
    `key.jpg`. DataError when there is no picture at all.

    cache: folder to keep a large index in, and to take it from while nothing has changed.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"no such folder or tar: {source}")
    kept = None
    if cache is not None:
        kept = cache / f"index-{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:20]}"
        if (found := _load(kept, source)) is not None:
            return found
    found, stamps = _scan(source)
    if not len(found):
        raise DataError(
            f"no pictures in {source}: expected {', '.join(sorted(ENDINGS))} or .tar shards"
        )
    if kept is not None and len(found) >= KEPT_FROM:
        _save(kept, found, stamps)
        return _load(kept, source) or found
    return found


# ---- looking ----


class _Columns:
    """An index in the making."""

    def __init__(self) -> None:
        self.columns = {name: array(code) for name, code in COLUMNS.items()}
        self.names, self.words = bytearray(), bytearray()

    def add(
        self,
        name: str,
        container: int = -1,
        offset: int = -1,
        size: int = 0,
        kind: int = NONE,
        caption: int = -1,
        length: int = 0,
    ) -> None:
        self.names += name.encode("utf-8", "surrogateescape")
        row = (container, offset, size, kind, caption, length, len(self.names))
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)

    def done(self, root: Path, tars: Sequence[str]) -> Index:
        columns = {name: np.array(column) for name, column in self.columns.items()}
        names, words = (np.frombuffer(bytes(b), np.uint8) for b in (self.names, self.words))
        return Index(root, tars, columns, names, words)


def _scan(source: Path) -> tuple[Index, dict[str, list[int]]]:
    """The index, and the state of everything that it depends on."""
    found, stamps = _Columns(), {}
    if source.is_file():
        stamps[""] = _stamp(source)
        _add_tar(found, source, 0)
        return found.done(source, [""]), stamps
    names: list[str] = []
    for folder, inner, files in os.walk(source):
        inner[:] = sorted(d for d in inner if not d.startswith("."))
        place = Path(folder).relative_to(source)
        stamps[place.as_posix()] = _stamp(Path(folder))
        names += [(place / f).as_posix() for f in files if not f.startswith(".")]
    captions = {}
    for name in sorted(n for n in names if n.endswith(".jsonl")):
        stamps[name] = _stamp(source / name)
        captions |= _jsonl_captions(source / name, source)
    texts = {n for n in names if n.endswith(".txt")}
    tars: list[str] = []
    for name in sorted(names, key=lambda n: n.split("/")):
        stem, ending = os.path.splitext(name)
        if ending.lower() == ".tar":
            stamps[name] = _stamp(source / name)
            _add_tar(found, source / name, len(tars))
            tars.append(name)
        elif ending.lower() in ENDINGS:
            words = captions.get(name, "").encode("utf-8")
            if words:
                found.add(name, kind=WORDS, caption=len(found.words), length=len(words))
                found.words += words
            else:
                found.add(name, kind=BESIDE if f"{stem}.txt" in texts else NONE)
    return found.done(source, tars), stamps


def _jsonl_captions(path: Path, folder: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            words = record.get("caption") or record.get("text") or ""
            file = (path.parent / record["file"]).relative_to(folder).as_posix()
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(
                f"{path.name}, line {number}: needs an object with file and caption ({error})"
            ) from error
        found[file] = " ".join(str(words).split())
    return found


def caption_words(text: str, ending: str) -> str:
    """The caption that a .txt or .json file holds."""
    if ending == ".json":
        record = json.loads(text)
        text = record.get("caption") or record.get("text") or ""
    return " ".join(text.split())


def _slice(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _add_tar(found: _Columns, path: Path, container: int) -> None:
    """Pictures of a tar by their place in it; of a cut tar, those before the cut."""
    inside: dict[str, tuple[int, int]] = {}
    try:
        for name, offset, size in members(path):
            inside[name.removeprefix("./")] = (offset, size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        warnings.warn(f"{path.name} is damaged after {len(inside)} members: {error}", stacklevel=4)
    end = path.stat().st_size
    for name, (offset, size) in inside.items():
        stem, ending = os.path.splitext(name)
        if ending.lower() not in ENDINGS or offset + size > end:
            continue
        caption = (NONE, -1, 0)
        for kind, beside in ((MEMBER_TXT, ".txt"), (MEMBER_JSON, ".json")):
            if stem + beside in inside:
                caption = (kind, *inside[stem + beside])
                break
        found.add(name, container, offset, size, *caption)


# ---- tars ----


class _Unusual(Exception):
    """A kind of member that only `tarfile` knows."""


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every file in a tar, in order.

    By the headers alone, several times as fast as `tarfile`, which takes over where a tar holds
    what shards never do (sparse files, for example). ValueError or tarfile's errors where it is
    damaged, after the members before that.
    """
    seen = 0
    try:
        for member in _headers(path):
            yield member
            seen += 1
    except _Unusual:
        with tarfile.open(path, "r:") as tar:
            for number, member in enumerate(m for m in tar if m.isfile()):
                if number >= seen:
                    yield member.name, member.offset_data, member.size


def _headers(path: Path) -> Iterator[tuple[str, int, int]]:
    with open(path, "rb", buffering=0) as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        special: dict[str, str] = {}
        while at < end:
            file.seek(at)
            head = file.read(BLOCK)
            if head[:1] == b"\0" and not any(head):
                return
            if len(head) < BLOCK:
                raise ValueError("the last header is cut")
            # The sum of all bytes with the field of the sum itself as spaces.
            if sum(head) - sum(head[148:156]) + 256 != _number(head[148:156]):
                raise ValueError(f"bad header at {at}")
            size, kind = _number(head[124:136]), head[156:157]
            data = at + BLOCK
            at = data + -(-size // BLOCK) * BLOCK
            if kind in b"LxgK":
                if size > 2**20:
                    raise _Unusual
                content = file.read(size)
                if kind == b"L":
                    special["path"] = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif kind == b"x":
                    special |= _records(content)
                elif kind == b"g" and _records(content).keys() & {"path", "size"}:
                    raise _Unusual
                continue
            if kind in (b"0", b"\0", b"7"):
                if special.keys() & {"GNU.sparse.major", "GNU.sparse.map", "GNU.sparse.size"}:
                    raise _Unusual
                if "size" in special:
                    size = int(special["size"])
                    at = data + -(-size // BLOCK) * BLOCK
                name = special.get("path") or _name(head)
                # Old tars mark a folder by the slash alone.
                if not name.endswith("/"):
                    yield name, data, size
            elif kind not in b"123456":
                raise _Unusual
            special = {}


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, for sizes that octal digits can't hold
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _name(head: bytes) -> str:
    name = head[:100].split(b"\0", 1)[0]
    if head[257:263] == b"ustar\0" and (prefix := head[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _records(content: bytes) -> dict[str, str]:
    """pax: lines "length key=value"."""
    found = {}
    while content[:1].isdigit():
        length = int(content.split(b" ", 1)[0])
        key, value = content[:length].split(b" ", 1)[1].rstrip(b"\n").split(b"=", 1)
        found[key.decode("utf-8")] = value.decode("utf-8", "surrogateescape")
        content = content[length:]
    return found


# ---- keeping ----


def _stamp(path: Path) -> list[int]:
    """What changes with a file's content or a folder's list of names."""
    facts = path.stat()
    return [facts.st_mtime_ns, facts.st_size if path.is_file() else 0]


def _save(folder: Path, index: Index, stamps: dict[str, list[int]]) -> None:
    """Write an index, as a whole or not at all."""
    about = {
        "version": VERSION, "source": str(index.root.resolve()), "tars": list(index.tars),
        "stamps": stamps,
    }  # fmt: skip
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        for name, column in (*index.columns.items(), *_blobs(index)):
            np.save(part / f"{name}.npy", column)
        (part / "about.json").write_text(json.dumps(about), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
    except OSError as error:
        # Another process may have been quicker; a full disk only costs the time of looking again.
        shutil.rmtree(part, ignore_errors=True)
        if not (folder / "about.json").exists():
            warnings.warn(f"the index of {index.root} can't be kept: {error}", stacklevel=3)


def _array(path: Path) -> np.ndarray:
    # An empty array can't be mapped.
    return np.load(path, mmap_mode="r" if path.stat().st_size > 4096 else None)


def _blobs(index: Index) -> Iterable[tuple[str, np.ndarray]]:
    return ("names", index.names), ("words", index.words)


def _load(folder: Path, source: Path) -> Index | None:
    """A kept index, None where there is none or something has changed since."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if about["version"] != VERSION or about["source"] != str(source.resolve()):
            return None
        for name, stamp in about["stamps"].items():
            if _stamp(source / name if name else source) != stamp:
                return None
        arrays = {name: _array(folder / f"{name}.npy") for name in (*COLUMNS, "names", "words")}
    except (OSError, ValueError, KeyError):
        return None
    names, words = arrays.pop("names"), arrays.pop("words")
    return Index(source, about["tars"], arrays, names, words)
