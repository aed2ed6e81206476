"""Large files of tensors, one tensor at a time: neither reading nor writing holds them all in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .header import METADATA, Header
from .reading import finite, outline
from .shapes import CheckpointError

# Pages of a mapped file count as memory in use until the mapping goes; it is renewed this often.
MAPPED = 256 * 2**20
# How the format spells the dtypes that GenDR writes.
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
# Stands in the header until the last tensor has been written.
NO_DIGEST = "0" * 64


class Stored:
    """The tensors of one file by name, each read when it is asked for.

    open: gives all tensors of the file, mapped. shapes: of every tensor.
    """

    def __init__(self, path: Path, open: Callable[[], Mapping[str, Tensor]] | None = None):
        self.path = path
        self._open = open
        self._mapped: Mapping[str, Tensor] | safe_open | None = None
        self._given = 0
        if open is None:
            tensors: Mapping[str, Tensor] = outline(path)[1]
        else:
            tensors = self._mapped = open()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        if self._mapped is None or self._given > MAPPED:
            self._mapped, self._given = None, 0
            self._mapped = self._open() if self._open else safe_open(self.path, framework="pt")
        tensor = self._mapped.get_tensor(name) if self._open is None else self._mapped[name]
        self._given += tensor.numel() * tensor.element_size()
        # A copy: a part of the file in use would keep all of it mapped.
        return tensor.clone()


def write(
    path: Path,
    shapes: Mapping[str, Iterable[int]],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    header: Header,
    *,
    done: Callable[[int], None] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor: complete at `path`, or not at all.

    shapes: of every tensor. read: gives one by its name, in any dtype. header: to which the tensors'
    SHA-256 is added, as `checkpoint.digest` computes it.
    done: called with the bytes written so far. CheckpointError when the disk is full, or when a value
    is not finite in `dtype`.
    """
    entries: dict[str, Any] = {}
    position = 0
    # In the order of the digest.
    for name in sorted(shapes):
        size = torch.Size(shapes[name])
        end = position + size.numel() * dtype.itemsize
        entries[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(size),
            "data_offsets": [position, end],
        }
        position = end
    values = replace(header, sha256=NO_DIGEST).as_dict()
    metadata = {"format": "pt", METADATA: json.dumps(values, sort_keys=True)}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert text.count(NO_DIGEST.encode()) == 1
    need = 8 + len(text) + position
    with said(path):
        room = shutil.disk_usage(path.parent).free
    if room < need:
        raise CheckpointError(
            f"{path.name} needs {need / 1e9:.2f} GB, {path.parent} has {room / 1e9:.2f} GB free: "
            "choose another place or make room"
        )
    temporary = path.with_name(f".gendr-{secrets.token_hex(8)}.part")
    sha = hashlib.sha256()
    try:
        with said(path), open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            tensor = read(name).detach().to(dtype).contiguous()
            if not finite(tensor):
                raise CheckpointError(
                    f"{path.name} can't be written: {name} holds values that are not finite in "
                    f"{str(dtype).removeprefix('torch.')}; choose fp32 or bf16, or an earlier file"
                )
            data = tensor.flatten().view(torch.uint8).numpy().data
            sha.update(f"{name} {dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(data)
            with said(path), open(temporary, "ab") as file:
                file.write(data)
            if done is not None:
                done(entry["data_offsets"][1])
        with said(path):
            with open(temporary, "r+b") as file:
                file.seek(8 + text.index(NO_DIGEST.encode()))
                file.write(sha.hexdigest().encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def said(path: Path) -> Iterator[None]:
    """Turns the system's words for a full disk or a closed folder into a sentence."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be written ({error.strerror or error}): choose another place or make room"
        ) from error
