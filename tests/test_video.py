"""`gendr upscale clip.mp4`: every frame restored, times and sound as they were, pieces kept."""

import json
import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image

from gendr import cli
from gendr.commands import jobs, video
from gendr.pictures import PictureError
from gendr.steady import Steady

try:
    import av
except ImportError:
    av = None
needs_av = pytest.mark.skipif(av is None, reason="needs PyAV: pip install av")
SIZE, RATE = (32, 24), 25


def clip(path, frames=60, size=SIZE, sound=True, times=None, pix_fmt="yuv420p"):
    """A small moving ramp with a tone."""
    with av.open(str(path), "w") as out:
        pictures = out.add_stream("libx264", rate=RATE, options={"crf": "5"})
        pictures.width, pictures.height, pictures.pix_fmt = *size, pix_fmt
        tone = out.add_stream("aac", rate=44100, layout="mono") if sound else None
        y, x = np.mgrid[: size[1], : size[0]]
        for n in range(frames):
            values = np.stack([x * 6 + n, y * 8, 255 - x * 5 - n], -1).clip(0, 255)
            frame = av.VideoFrame.from_ndarray(values.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = (times or range(frames))[n], Fraction(1, RATE)
            out.mux(pictures.encode(frame))
        out.mux(pictures.encode())
        for n in range(frames * 44100 // RATE // 1024) if sound else ():
            wave = np.sin((np.arange(1024) + n * 1024) * 0.05) * 8000
            frame = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 44100, n * 1024, Fraction(1, 44100)
            out.mux(tone.encode(frame))
        if sound:
            out.mux(tone.encode())
    return path


def decoded(path):
    """(seconds, h w 3) of every frame."""
    with av.open(str(path)) as file:
        return [
            (float(f.pts * f.time_base), f.to_ndarray(format="rgb24").astype(int))
            for f in file.decode(video=0)
        ]


def packets(path):
    """(seconds, bytes) of the sound."""
    with av.open(str(path)) as file:
        return [(float(p.pts * p.time_base), bytes(p)) for p in file.demux(audio=0) if p.size]


def doubled(pixels):
    return F.interpolate(pixels, scale_factor=2.0, mode="nearest")


def nothing(number):
    pass


@needs_av
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_frames_times_and_sound_come_out(tmp_path, suffix):
    source = clip(tmp_path / f"a{suffix}")
    target = tmp_path / f"b{suffix}"
    assert video.Clip(source, target, "k" * 64).restore(doubled, nothing) == 60
    before, after = decoded(source), decoded(target)
    assert [t for t, _ in after] == pytest.approx([t for t, _ in before], abs=1e-6)
    for (_, a), (_, b) in zip(before, after, strict=True):
        assert np.abs(a.repeat(2, 0).repeat(2, 1) - b).mean() < 6  # of 255, colour at half size
    assert packets(target) == packets(source)
    assert {p.name for p in tmp_path.iterdir()} == {source.name, target.name}


@needs_av
def test_times_that_differ_are_kept(tmp_path):
    times = [n * 2 + (n % 5 == 0) for n in range(60)]
    source = clip(tmp_path / "a.mp4", times=times, sound=False)
    target = tmp_path / "b.mp4"
    video.Clip(source, target, "k" * 64).restore(doubled, nothing)
    assert [t for t, _ in decoded(target)] == pytest.approx([t for t, _ in decoded(source)])


@needs_av
@pytest.mark.parametrize("stop", [10, 50, 96, 100])
def test_what_was_stopped_goes_on(tmp_path, stop):
    source = clip(tmp_path / "a.mp4", frames=100)
    whole, target = tmp_path / "whole.mp4", tmp_path / "b.mp4"
    video.Clip(source, whole, "k" * 64).restore(doubled, nothing)

    def stopped(number):
        if number == stop:
            raise KeyboardInterrupt

    half = video.Clip(source, target, "k" * 64)
    with pytest.raises(KeyboardInterrupt):
        half.restore(doubled, stopped)
    assert not target.exists()
    assert len(half.pieces()) == stop // video.PIECE
    seen = []

    def counted(pixels):
        seen.append(1)
        return doubled(pixels)

    assert half.restore(counted, nothing) == 100
    assert len(seen) == 100 - stop // video.PIECE * video.PIECE
    for (s, a), (t, b) in zip(decoded(whole), decoded(target), strict=True):
        assert s == t
        assert np.array_equal(a, b)
    # Under another key nothing of it would have counted.
    assert video.Clip(source, target, "x" * 64).pieces() == []


@needs_av
@pytest.mark.parametrize("stop", [4, 7])
def test_frames_after_a_stop_know_those_before(tmp_path, stop, monkeypatch):
    monkeypatch.setattr(video, "PIECE", 3)
    source = clip(tmp_path / "a.mp4", frames=8, sound=False)

    def steadied(steady):
        return lambda pixels: doubled(steady(pixels)[0])

    def stopped(number):
        if number == stop:
            raise KeyboardInterrupt

    steady, again = Steady(), Steady()
    whole, target = tmp_path / "whole.mkv", tmp_path / "b.mkv"
    video.Clip(source, whole, "w" * 64).restore(steadied(steady), nothing, steady=steady)
    half = video.Clip(source, target, "k" * 64)
    with pytest.raises(KeyboardInterrupt):
        half.restore(steadied(again), stopped, steady=again)
    kept = [path.name for path in half.folder.glob("*.safetensors")]
    assert f"{stop // video.PIECE - 1:06}.safetensors" in kept
    again = Steady()
    half.restore(steadied(again), nothing, steady=again)
    for (_, a), (_, b) in zip(decoded(whole), decoded(target), strict=True):
        assert np.array_equal(a, b)
    assert {p.name for p in tmp_path.iterdir()} == {source.name, whole.name, target.name}


@needs_av
def test_the_command_line_keeps_a_clip_steady_unless_told(tmp_path, tiny_checkpoint, capsys):
    source = clip(tmp_path / "a.mkv", 3, sound=False)
    options = [
        "--model",
        str(tiny_checkpoint),
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--scale",
        "1",
    ]
    seen = {}
    for words in ([], ["--no-steady"]):
        target = tmp_path / f"b{len(words)}.mkv"
        assert (
            cli.main(["upscale", str(source), "-o", str(target), "--json", *options, *words]) == 0
        )
        told = json.loads(capsys.readouterr().out.splitlines()[0])
        assert told["settings"]["steady"] == (not words)
        seen[len(words)] = [values for _, values in decoded(target)]
    assert np.array_equal(seen[0][0], seen[1][0])


@needs_av
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_clip_held_upright_is_upright(tmp_path, turns):
    source = clip(tmp_path / "a.mp4", frames=2, sound=False)
    data = bytearray(source.read_bytes())
    # The track's display matrix, in 16.16: clockwise quarter turns, as telephones write them.
    place = data.find(b"tkhd") + 4 + 40
    a, b = ((1, 0), (0, 1), (-1, 0), (0, -1))[turns]
    one = 2**16
    struct.pack_into(">9i", data, place, a * one, b * one, 0, -b * one, a * one, 0, 0, 0, 2**30)
    source.write_bytes(bytes(data))
    plain = clip(tmp_path / "plain.mp4", frames=2, sound=False)
    assert video.measure(source)[:2] == ((24, 32), (32, 24))[turns % 2]
    target = tmp_path / "b.mp4"
    video.Clip(source, target, "k" * 64).restore(doubled, nothing)
    for (_, values), (_, got) in zip(decoded(plain), decoded(target), strict=True):
        expected = np.rot90(values, -turns).repeat(2, 0).repeat(2, 1)
        assert np.abs(expected - got).mean() < 6


@needs_av
def test_ten_bits_stay_ten(tmp_path):
    source = clip(tmp_path / "a.mkv", frames=3, sound=False, pix_fmt="yuv420p10le")
    target = tmp_path / "b.mkv"
    video.Clip(source, target, "k" * 64).restore(doubled, nothing)
    with av.open(str(target)) as file:
        assert file.streams.video[0].codec_context.pix_fmt == "yuv420p10le"


@needs_av
def test_the_command_line_restores_a_clip(tmp_path, tiny_checkpoint, capsys):
    (tmp_path / "in").mkdir()
    source = clip(tmp_path / "in" / "a.mp4", 5)
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "p.png")
    options = ["--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "fp32"]
    words = ["upscale", str(source), "--scale", "1.2", "-o", str(tmp_path / "out"), *options]
    assert cli.main([*words, "--plan"]) == 0
    assert "5 frames" in capsys.readouterr().out
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "32x24 -> 38x28" in out
    assert "even sides" in out
    target = tmp_path / "out" / "a_x1.2.mp4"
    frames = decoded(target)
    assert len(frames) == 5
    assert frames[0][1].shape == (28, 38, 3)
    assert packets(target) == packets(source)
    assert cli.main([*words, "--resume"]) == 0
    assert "was done before" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["upscale", str(source), "-o", "x.png"])
    # In a folder a clip is counted, and asked for by name it is restored.
    inputs = jobs.collect([str(tmp_path / "in")])
    assert "1 .mp4" in inputs.notes[0]
    assert jobs.collect([str(tmp_path / "in" / "*.mp4")]).jobs[0].source == source


@needs_av
@pytest.mark.parametrize("content", [b"", b"no video", b"\0\0\0\x18ftypmp42" + bytes(100)])
def test_what_is_no_video_gets_a_sentence(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(PictureError, match=r"a\.mp4"):
        video.measure(tmp_path / "a.mp4")


def test_without_pyav_the_remedy_is_named(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    words = ["upscale", str(tmp_path / "a.mp4"), "--model", str(tiny_checkpoint)]
    assert cli.main([*words, "--device", "cpu", "--dtype", "fp32"]) == 1
    assert "pip install av" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.mp4", ".mp4"), ("a.MOV", ".MOV"), ("a.webm", ".mkv"), ("a.avi", ".mkv")],
)
def test_endings_of_clips(tmp_path, name, ending):
    assert jobs.ending(jobs.Job(tmp_path / name), None) == ending
