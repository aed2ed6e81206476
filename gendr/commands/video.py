"""`gendr upscale clip.mp4`: frame by frame, sound copied, in pieces that `--resume` finds again.

Through PyAV, an optional extra. Frames are decoded, restored and encoded one at a time; every `PIECE`
of them are a file in a hidden folder beside the result, and the pieces are joined without encoding
them again.
"""

from __future__ import annotations

import contextlib
import heapq
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..pictures import PictureError
from ..pictures.placing import replacing
from ..steady import Steady

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts")
# What results are written as: MP4's family stays, everything else becomes Matroska, which can hold
# any sound.
FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
PIECE = 48  # frames
# H.264's constant rate factor: 16 is hard to tell from the frames.
CRF = 16
UNSPECIFIED, BT709, BT601 = 2, 1, 6  # of ITU-T H.273, matrix coefficients
HD = 720  # lines from which an unspecified matrix is BT.709


def is_clip(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def ending(path: Path) -> str:
    """The ending of the result of a clip."""
    return path.suffix if path.suffix.lower() in FORMATS else ".mkv"


def library() -> Any:
    """PyAV. PictureError with a remedy where it is not installed."""
    try:
        import av
    except ImportError:
        raise PictureError(
            "videos need PyAV: `pip install av`, or `pip install gendr[video]`"
        ) from None
    return av


@contextlib.contextmanager
def _told(path: Path) -> Iterator[Any]:
    """PyAV, whose errors become PictureErrors about `path`."""
    av = library()
    try:
        yield av
    except av.error.FFmpegError as error:
        raise PictureError(
            f"{path}: cannot be read or written as a video ({error.strerror or error})"
        ) from error


def _picture_stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise PictureError(f"{path}: has no pictures, only sound")
    return container.streams.video[0]


def measure(path: Path) -> tuple[int, int, int]:
    """Height and width as the clip is shown, and about how many frames it has. Raises PictureError."""
    with _told(path) as av, av.open(str(path)) as container:
        stream = _picture_stream(container, path)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise PictureError(f"{path}: has no frame that can be decoded")
        count = stream.frames
        if not count and container.duration and stream.average_rate:
            count = round(container.duration / av.time_base * stream.average_rate)
        height, width = frame.height, frame.width
        turned = _quarter_turns(frame) % 2
        return (width, height, count or 1) if turned else (height, width, count or 1)


def _quarter_turns(frame: Any) -> int:
    """Counterclockwise, to see the frame as it is meant."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _deep(frame: Any) -> bool:
    return max(component.bits for component in frame.format.components) > 8


def _matrix(frame: Any) -> int:
    known = int(frame.colorspace)
    if known != UNSPECIFIED:
        return known
    return BT709 if frame.height >= HD else BT601


def pixels_of(frame: Any) -> Tensor:
    """1 3 h w in [0, 1], upright."""
    kind = "rgb48le" if _deep(frame) else "rgb24"
    made = frame.reformat(format=kind, src_colorspace=_matrix(frame))
    values = np.rot90(made.to_ndarray(), _quarter_turns(frame)).astype(np.float32)
    values /= 65535 if kind == "rgb48le" else 255
    return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()


@dataclass
class Clip:
    """One clip to restore.

    key: names source and settings; what was done under another one is not gone on with.
    quality: 1 to 100, or None for the default.
    """

    source: Path
    target: Path
    key: str
    quality: int | None = None

    @property
    def folder(self) -> Path:
        """Where the pieces are."""
        return self.target.parent / f".gendr-{self.key[:16]}.frames"

    def pieces(self) -> list[Path]:
        """Those that are finished, in order."""
        found = []
        while (piece := self.folder / f"{len(found):06}.nut").exists():
            found.append(piece)
        return found

    def restore(
        self,
        restored: Callable[[Tensor], Tensor],
        told: Callable[[int], None],
        before: Callable[[Path], None] | None = None,
        steady: Steady | None = None,
    ) -> int:
        """Restore what is missing and join it; how many frames there are. Raises PictureError.

        Pieces that an earlier run has finished under the same key are not restored again.

        restored: one frame, 1 3 h w -> 1 3 H W. told: called with the number of frames done.
        before: called with the finished file before it takes its place. steady: what `restored` knows
        of earlier frames; it is kept beside each piece, so that frames after a stop are as without.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self.pieces()
        frames = len(done) * PIECE
        if steady is not None and done and self.memory(done[-1]).exists():
            steady.resume(load_file(self.memory(done[-1])))
        with _told(self.source) as av, av.open(str(self.source)) as container:
            stream = _picture_stream(container, self.source)
            stream.thread_type = "AUTO"
            piece: _Piece | None = None
            number = 0
            try:
                for number, frame in enumerate(container.decode(stream), 1):
                    if number <= frames:
                        told(number)
                        continue
                    pixels = restored(pixels_of(frame))
                    if piece is None:
                        place = self.folder / f"{(number - 1) // PIECE:06}.nut"
                        piece = _Piece(av, place, stream, frame, pixels, self.crf)
                    piece.add(pixels, frame, number)
                    if number % PIECE == 0:
                        if steady is not None:
                            self.keep(steady, piece.path)
                        piece.finish()
                        piece = None
                    told(number)
                if piece is not None:
                    piece.finish()
            finally:
                if piece is not None:
                    piece.close()
            if not number:
                raise PictureError(f"{self.source}: has no frame that can be decoded")
            self._join(av, before)
        shutil.rmtree(self.folder, ignore_errors=True)
        return number

    def memory(self, piece: Path) -> Path:
        """Where is kept what is known after a piece."""
        return piece.with_suffix(".safetensors")

    def keep(self, steady: Steady, piece: Path) -> None:
        """What is known after a piece, written before the piece has its name; of those before it only
        the last is kept, for a stop between the two.
        """
        target = self.memory(piece)
        earlier = sorted(self.folder.glob("*.safetensors"))
        part = target.with_suffix(".known")
        save_file({name: x.contiguous() for name, x in steady.state().items()}, part)
        part.replace(target)
        for file in earlier[:-1]:
            file.unlink(missing_ok=True)

    @property
    def crf(self) -> int:
        return CRF if self.quality is None else round(51 * (100 - self.quality) / 100)

    def _join(self, av: Any, before: Callable[[Path], None] | None) -> None:
        """Pieces, and the source's sound and subtitles, packet by packet into the result."""
        kind = FORMATS[self.target.suffix.lower()]
        with (
            replacing(self.target, before) as file,
            av.open(file, "w", format=kind) as out,
            av.open(str(self.source)) as source,
            av.open(str(self.pieces()[0])) as first,
        ):
            out.metadata.update(source.metadata)
            pictures = out.add_stream_from_template(first.streams.video[0])
            copies = {}
            for stream in source.streams:
                text = stream.type == "subtitle" and kind == "matroska"
                if stream.type == "audio" or text:
                    copies[stream.index] = out.add_stream_from_template(stream)

            def of_pictures() -> Iterator[tuple[Fraction, int, Any]]:
                for piece in self.pieces():
                    with av.open(str(piece)) as container:
                        for packet in container.demux(video=0):
                            if packet.dts is not None:
                                yield packet.dts * packet.time_base, 0, (packet, pictures)

            def of_sound() -> Iterator[tuple[Fraction, int, Any]]:
                streams = [source.streams[index] for index in copies]
                for packet in source.demux(streams) if streams else ():
                    if packet.dts is not None:
                        to = copies[packet.stream_index]
                        yield packet.dts * packet.time_base, 1, (packet, to)

            merged = heapq.merge(of_pictures(), of_sound(), key=lambda item: item[:2])
            for _, _, (packet, stream) in merged:
                packet.stream = stream
                out.mux(packet)


class _Piece:
    """Some frames in a file of their own, which has its name when all of them are in it."""

    def __init__(self, av: Any, path: Path, source: Any, frame: Any, pixels: Tensor, crf: int):
        self.av, self.path, self.part = av, path, path.with_suffix(".part")
        # H.264 as every player knows it halves the colour's sides, which have to be even.
        self.height, self.width = (side // 2 * 2 for side in pixels.shape[-2:])
        if not self.height or not self.width:
            raise PictureError(f"{path}: a video needs 2x2 pixels at least")
        self.deep, self.matrix = _deep(frame), _matrix(frame)
        self.container = av.open(str(self.part), "w", format="nut")
        self.base = source.time_base or Fraction(1, 1000)
        self.rate = source.average_rate or Fraction(25)
        # Without frames that refer to later ones, a piece ends where it ends.
        options = {"crf": str(crf), "bf": "0"}
        self.stream = self.container.add_stream("libx264", rate=self.rate, options=options)
        context = self.stream.codec_context
        context.width, context.height = self.width, self.height
        context.pix_fmt = "yuv420p10le" if self.deep else "yuv420p"
        context.time_base = self.base
        context.colorspace, context.color_range = self.matrix, 1  # of television, as is usual
        for name in ("color_primaries", "color_trc"):
            with contextlib.suppress(AttributeError, ValueError):
                setattr(context, name, int(getattr(frame, name)))
        self.open = True

    def add(self, pixels: Tensor, like: Any, number: int) -> None:
        white = 65535 if self.deep else 255
        values = pixels[0, :, : self.height, : self.width].permute(1, 2, 0).numpy()
        values = np.ascontiguousarray((values * white + 0.5).clip(0, white))
        kind = ("rgb48le", np.uint16) if self.deep else ("rgb24", np.uint8)
        frame = self.av.VideoFrame.from_ndarray(values.astype(kind[1]), format=kind[0])
        pix_fmt = self.stream.codec_context.pix_fmt
        frame = frame.reformat(format=pix_fmt, dst_colorspace=self.matrix, dst_color_range=1)
        frame.time_base = self.base
        frame.pts = like.pts
        if frame.pts is None:
            frame.pts = round((number - 1) / self.rate / self.base)
        for packet in self.stream.encode(frame):
            self.container.mux(packet)

    def finish(self) -> None:
        for packet in self.stream.encode():
            self.container.mux(packet)
        self.close()
        self.part.replace(self.path)

    def close(self) -> None:
        if self.open:
            self.open = False
            self.container.close()
