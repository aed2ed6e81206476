"""The command line, with a tiny model: what a person types, gets back, and finds on the disk."""

import dataclasses
import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gendr import EMBEDDED, Settings, cli, load
from gendr.commands import doctor, jobs, team, upscale
from gendr.commands.journal import NAME, Journal, key
from gendr.commands.progress import Bar

ROOT = Path(__file__).resolve().parent.parent


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(values, "RGBA").convert("RGB").convert(mode)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Threads cost tiny networks more than they give, most of all on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path):
    """Three small pictures."""
    place = tmp_path / "in"
    place.mkdir()
    for name, size in (("p1.png", (12, 9)), ("p2.jpg", (10, 10)), ("p10.png", (7, 13))):
        noise(*size).save(place / name)
    return place


@pytest.fixture
def gendr(tiny_checkpoint, capsys):
    """Run the command line in this process: `gendr("upscale", ...)` -> exit code, stdout, stderr."""

    def command(*words, model=True):
        words = [str(word) for word in words]
        if words[0] == "upscale" and model:
            words += ["--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "fp32"]
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
        told = capsys.readouterr()
        return code, told.out, told.err

    return command


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def visible(place: Path) -> set[str]:
    return {p.name for p in place.iterdir() if not p.name.startswith(".")}


# ---- words ----


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["upscail"],
        ["upscale"],
        ["upscale", "a.png", "--scale", "9"],
        ["upscale", "a.png", "--scale", "2", "--long-side", "100"],
        ["upscale", "a.png", "--quality", "0"],
        ["upscale", "a.png", "--output", "b.gif"],
        ["upscale", "a.png", "b.png", "--output", "b.png"],
        ["upscale", "a.png", "--output", "b.png", "--format", "jpg"],
        ["compare", "a.png", "b.png", "--crop", "1,2"],
    ],
)
def test_wrong_use_is_2_and_one_sentence(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) <= 4


def test_defaults_are_those_of_settings():
    args = cli.parser().parse_args(["upscale", "a.png"])
    # Of a clip the command line knows that it is one.
    assert args.steady
    for field in dataclasses.fields(Settings):
        if field.name != "steady":
            assert getattr(args, field.name) == field.default, field.name


@pytest.mark.parametrize("command", ["upscale", "info", "doctor", "fold", "compare"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert "exit codes" in capsys.readouterr().out


# ---- names ----


def targets(words, output=None, suffix="_x4", form=None, recursive=False, owned=lambda p: False):
    inputs = jobs.collect([str(w) for w in words], recursive)
    notes = jobs.assign(inputs, output, suffix, form, owned)
    return {job.source.name: job.target.name for job in inputs.jobs if not job.problem}, notes


def test_natural_order_and_each_picture_once(folder):
    inputs = jobs.collect([str(folder), str(folder / "p1.png"), str(folder / "*.png")])
    assert [job.source.name for job in inputs.jobs] == ["p1.png", "p2.jpg", "p10.png"]


def test_patterns_are_expanded_without_a_shell(folder):
    (folder / "notes.txt").write_text("no picture")
    assert set(targets([folder / "p1*"])[0]) == {"p1.png", "p10.png"}
    odd = folder / "scan[1].png"
    noise(4, 4).save(odd)
    assert set(targets([odd])[0]) == {"scan[1].png"}


def test_missing_and_empty_inputs_have_reasons(tmp_path):
    (tmp_path / "empty").mkdir()
    inputs = jobs.collect([str(tmp_path / n) for n in ("empty", "gone.png", "*.webp")])
    assert all(job.problem for job in inputs.jobs)


def test_same_names_are_told_apart(folder):
    noise(5, 5).save(folder / "p1.jpg")
    noise(5, 5).save(folder / "P1.webp")
    names, notes = targets([folder])
    assert len({name.casefold() for name in names.values()}) == len(names) == 5
    assert names["p1.png"] == "p1_png_x4.png"
    assert len(notes) == 3


def test_same_names_from_different_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        noise(4, 4).save(tmp_path / name / "p.png")
    inputs = jobs.collect([str(tmp_path / "a" / "p.png"), str(tmp_path / "b" / "p.png")])
    jobs.assign(inputs, tmp_path / "out", "_x4", None)
    assert len({job.target for job in inputs.jobs}) == 2


def test_folders_are_mirrored(folder, tmp_path):
    (folder / "deep").mkdir()
    noise(4, 4).save(folder / "deep" / "q.webp")
    inputs = jobs.collect([str(folder)], recursive=True)
    jobs.assign(inputs, tmp_path / "out", "_x4", "same")
    assert tmp_path / "out" / "deep" / "q_x4.webp" in {job.target for job in inputs.jobs}


def test_a_result_never_replaces_an_input(folder):
    noise(4, 4).save(folder / "p1_x4.png")
    inputs = jobs.collect([str(folder)])
    jobs.assign(inputs, None, "_x4", None)
    problems = {job.source.name: job.problem for job in inputs.jobs}
    assert "would replace" in problems["p1.png"]
    assert problems["p1_x4.png"] is None
    inputs = jobs.collect([str(folder / "p1.png")])
    jobs.assign(inputs, None, "", None)
    assert "would replace itself" in inputs.jobs[0].problem


def test_links_to_an_input_are_seen(folder, tmp_path):
    link = tmp_path / "link.png"
    try:
        link.symlink_to(folder / "p1.png")
    except OSError:
        pytest.skip("no links here")
    inputs = jobs.collect([str(folder / "p1.png")])
    jobs.assign(inputs, link, "", None)
    assert "would replace" in inputs.jobs[0].problem


# ---- the record and the bar ----


def test_journal_knows_whole_results_only(folder):
    target = folder / "p1.png"
    journal = Journal()
    one = key(target, {"scale": 4})
    journal.add(target, one)
    again = Journal()
    assert again.finished(target, one)
    assert not again.finished(target, key(target, {"scale": 2}))
    target.write_bytes(target.read_bytes()[:-5])
    assert not Journal().finished(target, one)
    assert not Journal().owns(target)


def test_journal_survives_a_cut_line(folder):
    journal = Journal()
    journal.add(folder / "p1.png", "k")
    with open(folder / NAME, "a") as file:
        file.write('{"target": "p2.jpg", "by')
    assert Journal().finished(folder / "p1.png", "k")
    assert not Journal().owns(folder / "p2.jpg")


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_bar_counts_all_work_and_the_time_left():
    now = [0.0]
    bar = Bar(pictures=3, pixels=400, stream=Screen(), clock=lambda: now[0])
    bar.begin("a.png", 100)
    assert bar.left(0) == "--:-- left"
    bar.picture(100, worked=False)  # skipped: must not make the rest look quick
    bar.begin("b.png", 100)
    now[0] = 10.0
    bar.tile(1, 2, 0.5)
    assert bar.left(150) == "00:50 left"
    assert "picture 2/3 | tile 2/2 | 00:50 left | b.png" in bar.stream.getvalue()
    bar.clear()
    assert bar.stream.getvalue().endswith("\r")


def test_bar_is_silent_without_a_terminal():
    bar = Bar(pictures=1, pixels=10, stream=io.StringIO())
    bar.begin("a.png", 10)
    bar.tile(1, 1, 1.0)
    assert bar.stream.getvalue() == ""


# ---- upscale ----


def test_one_picture(gendr, folder):
    code, out, err = gendr("upscale", folder / "p1.png")
    assert (code, err) == (0, "")
    assert size(folder / "p1_x4.png") == (48, 36)
    assert "12x9 -> 48x36" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--scale", "1.5"], (18, 14)),
        (["--long-side", "30"], (30, 23)),
        (["--short-side", "18"], (24, 18)),
        (["--megapixels", "0.001"], (37, 27)),
    ],
)
def test_sizes(gendr, folder, tmp_path, words, expected):
    target = tmp_path / "out.png"
    assert gendr("upscale", folder / "p1.png", "-o", target, *words)[0] == 0
    assert size(target) == expected


def test_output_folder_with_a_dot(gendr, folder, tmp_path):
    assert gendr("upscale", folder / "p1.png", "-o", tmp_path / "out.v2")[0] == 0
    assert visible(tmp_path / "out.v2") == {"p1_x4.png"}


def test_folder_to_folder_with_formats(gendr, folder, tmp_path):
    code, _, _ = gendr("upscale", folder, "-o", tmp_path / "o", "-s", 2, "--format", "webp")
    assert code == 0
    assert visible(tmp_path / "o") == {"p1_x2.webp", "p2_x2.webp", "p10_x2.webp"}
    gendr("upscale", folder, "-o", tmp_path / "s", "--format", "same", "--suffix", "")
    assert visible(tmp_path / "s") == {"p1.png", "p2.jpg", "p10.png"}


BROKEN = {
    "zero.png": b"",
    "renamed.png": b"this is a letter, not a picture",
    "page.jpg": b"<html><body>404</body></html>",
}


def test_bad_files_cost_only_themselves(gendr, folder):
    for name, content in BROKEN.items():
        (folder / name).write_bytes(content)
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "PNG")
    (folder / "cut.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    code, _, err = gendr("upscale", folder, folder / "gone.png")
    assert code == 1
    assert "5 of 8 pictures failed" in err
    for name in (*BROKEN, "cut.png", "gone.png"):
        assert name in err
    assert "Traceback" not in err
    made = {name for name in visible(folder) if "_x4" in name}
    assert made == {"p1_x4.png", "p2_x4.png", "p10_x4.png"}
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_picture_too_large_for_the_memory_costs_only_itself(gendr, folder, monkeypatch):
    monkeypatch.setattr("gendr.devices.free_bytes", lambda device: 64 * 2**20)
    noise(400, 500).save(folder / "large.png")
    code, _, told = gendr("upscale", folder)
    assert code == 1
    assert "400x500 enlarged to 1600x2000 (3.2 MP) take about 0.2 GiB of main memory" in told
    assert "and 0.1 GiB are free: choose scale" in told
    assert "Traceback" not in told
    assert {p.stem for p in folder.glob("*_x4.*")} == {"p1_x4", "p2_x4", "p10_x4"}


def test_a_jpeg_called_png_is_restored(gendr, tmp_path):
    noise(8, 6).save(tmp_path / "a.png", "JPEG")
    assert gendr("upscale", tmp_path / "a.png")[0] == 0
    assert size(tmp_path / "a_x4.png") == (32, 24)


def odd_pictures(place: Path) -> dict[str, tuple[tuple[int, int], str]]:
    """Pictures of every unusual kind; name -> size and mode of the result at scale 2."""
    noise(1, 1).save(place / "one.png")
    noise(1, 400).save(place / "tall.png")
    noise(701, 3).save(place / "wide.png")
    noise(10, 8, "CMYK").save(place / "cmyk.jpg")
    noise(10, 8, "P").save(place / "palette.png")
    noise(10, 8, "P").save(place / "holes.png", transparency=3)
    noise(10, 8, "L").save(place / "grey.png")
    noise(10, 8, "1").save(place / "line.png")
    noise(10, 8, "LA").save(place / "ghost.png")
    noise(10, 8, "RGBA").save(place / "cut_out.png")
    deep = np.random.default_rng(0).integers(0, 65536, (8, 10), np.uint16)
    Image.fromarray(deep).save(place / "deep.png")
    frames = [noise(10, 8), noise(10, 8, "L").convert("RGB")]
    frames[0].save(place / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "Camera"
    noise(10, 8).save(place / "rotated.jpg", exif=exif)
    return {
        "one": ((2, 2), "RGB"),
        "tall": ((2, 800), "RGB"),
        "wide": ((1402, 6), "RGB"),
        "cmyk": ((20, 16), "RGB"),
        "palette": ((20, 16), "RGB"),
        "holes": ((20, 16), "RGBA"),
        "grey": ((20, 16), "L"),
        "line": ((20, 16), "L"),
        "ghost": ((20, 16), "LA"),
        "cut_out": ((20, 16), "RGBA"),
        "deep": ((20, 16), "I;16"),
        "moving": ((20, 16), "RGB"),
        "rotated": ((16, 20), "RGB"),
    }


def test_unusual_pictures(gendr, tmp_path):
    expected = odd_pictures(tmp_path)
    code, out, err = gendr("upscale", tmp_path, "--scale", 2, "-o", tmp_path / "out")
    assert code == 0, err
    for name, (shape, mode) in expected.items():
        with Image.open(tmp_path / "out" / f"{name}_x2.png") as image:
            assert (image.size, image.mode) == (shape, mode), name
    assert "2 frames" in out
    with Image.open(tmp_path / "out" / "rotated_x2.png") as image:
        assert image.getexif().get(0x010F) == "Camera"
        assert image.getexif().get(0x0112, 1) == 1


def test_existing_files_stay(gendr, folder):
    target = folder / "p1_x4.png"
    target.write_bytes(b"mine")
    code, _, err = gendr("upscale", folder / "p1.png")
    assert code == 1
    assert "--overwrite" in err
    assert target.read_bytes() == b"mine"
    assert gendr("upscale", folder / "p1.png", "--resume")[0] == 1
    assert target.read_bytes() == b"mine"
    assert gendr("upscale", folder / "p1.png", "--overwrite")[0] == 0
    assert size(target) == (48, 36)


def test_resume_skips_what_is_done_with_the_same_settings(gendr, folder, tmp_path):
    out = tmp_path / "out"
    assert gendr("upscale", folder, "-o", out)[0] == 0
    (out / "p2_x4.png").unlink()
    stamp = (out / "p1_x4.png").stat().st_mtime_ns
    code, told, _ = gendr("upscale", folder, "-o", out, "--resume")
    assert code == 0
    assert told.count("was done before") == 2
    assert (out / "p1_x4.png").stat().st_mtime_ns == stamp
    code, _, err = gendr("upscale", folder, "-o", out, "--resume", "--detail", "0.5")
    assert code == 1
    assert "--overwrite" in err
    code, told, _ = gendr("upscale", folder, "-o", out, "--resume", "--overwrite", "--detail", 0.5)
    assert (code, told.count("was done before")) == (0, 0)
    noise(20, 20).save(folder / "p1.png")
    code, told, _ = gendr("upscale", folder, "-o", out, "--resume", "--overwrite", "--detail", 0.5)
    assert (code, told.count("was done before")) == (0, 2)
    assert size(out / "p1_x4.png") == (80, 80)


def test_results_are_not_restored_again(gendr, folder):
    gendr("upscale", folder)
    names = visible(folder)
    assert gendr("upscale", folder, "--resume")[0] == 0
    shell = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    assert gendr("upscale", *shell, "--resume")[0] == 0
    assert visible(folder) == names
    assert gendr("upscale", folder / "p1_x4.png", "--scale", 1)[0] == 0


def test_json(gendr, folder):
    (folder / "zero.png").write_bytes(b"")
    code, out, _ = gendr("upscale", folder, "--json")
    *entries, last = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [e["status"] for e in entries] == ["done", "done", "done", "failed"]
    assert entries[0]["output_size"] == [36, 48]
    assert entries[3]["reason"]
    assert last["summary"]["done"] == 3


def test_json_of_what_is_not_finite():
    assert json.loads(upscale.as_json({"lr_psnr": float("inf"), "tiles": 2})) == {
        "lr_psnr": None,
        "tiles": 2,
    }


def test_quiet(gendr, folder):
    assert gendr("upscale", folder, "--quiet") == (0, "", "")


def test_plan_does_nothing(gendr, folder):
    names = visible(folder)
    code, out, _ = gendr("upscale", folder, "--plan", "--output", folder / "new")
    assert code == 0
    assert out.count("->") >= 3
    assert visible(folder) == names
    code, out, _ = gendr("upscale", folder, "--plan", "--json")
    assert json.loads(out.splitlines()[0])["status"] == "planned"


def test_folder_that_cannot_be_written_to(gendr, folder, tmp_path, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    if os.access(locked, os.W_OK):  # root may write everywhere

        def refuse(*args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(upscale.tempfile, "TemporaryFile", refuse)
    code, _, err = gendr("upscale", folder, "-o", locked)
    assert code == 1
    assert err.count("cannot be written to") == 4
    assert "Traceback" not in err
    assert list(locked.iterdir()) == []


def test_output_folder_below_a_file(gendr, folder):
    code, _, err = gendr("upscale", folder / "p1.png", "-o", folder / "p2.jpg" / "out")
    assert code == 1
    assert "cannot be written to" in err


def test_full_disk(gendr, folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    nothing = SimpleNamespace(free=0)
    monkeypatch.setattr(upscale.shutil, "disk_usage", lambda path: nothing)
    out = tmp_path / "out"
    code, _, err = gendr("upscale", folder, "-o", out)
    assert code == 1
    assert err.count("disk is full") == 4  # as they fail, and once for all at the end
    assert "3 pictures: the disk is full" in err
    assert "Traceback" not in err
    assert visible(out) == set()
    monkeypatch.undo()
    assert gendr("upscale", folder, "-o", out, "--resume")[0] == 0
    assert len(visible(out)) == 3


def test_an_unexpected_error_costs_one_picture_and_shows_itself(gendr, folder, monkeypatch):
    read = upscale.pictures.read

    def fault(path, **options):
        if Path(path).name == "p2.jpg":
            raise RuntimeError("a fault of ours")
        return read(path, **options)

    monkeypatch.setattr(upscale.pictures, "read", fault)
    code, _, err = gendr("upscale", folder)
    assert code == 1
    assert "Traceback" in err
    assert (folder / "p10_x4.png").exists()


def test_wrong_models_stop_before_anything_is_written(gendr, folder, tmp_path, tiny_checkpoint):
    whole = Path(tiny_checkpoint).read_bytes()
    wrong = {
        "zero.safetensors": b"",
        "cut.safetensors": whole[: len(whole) // 2],
        "letter.safetensors": b"Dear Sir or Madam, " * 20,
        "letter.pth": b"Dear Sir or Madam, " * 20,
    }
    names = visible(folder)
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    for name in (*wrong, "gone.safetensors"):
        code, _, err = gendr("upscale", folder, "--model", tmp_path / name, model=False)
        assert code == 1, name
        assert name in err
        assert "Traceback" not in err
    assert visible(folder) == names


def wait_for(condition, seconds: float = 90.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process there")
def test_ctrl_c_keeps_what_is_done_and_resume_goes_on(gendr, tmp_path, tiny_checkpoint):
    place, out = tmp_path / "in", tmp_path / "out"
    place.mkdir()
    for index in range(60):
        noise(96, 96).save(place / f"p{index}.png")
    common = ["upscale", str(place), "-o", str(out)]
    options = ["--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "fp32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gendr", *common, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background deaf to Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(lambda: process.poll() is not None or (out.is_dir() and len(visible(out)) >= 2))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    made = visible(out)
    assert 2 <= len(made) < 60
    assert all(size(out / name) == (384, 384) for name in made)
    for path in sorted(place.iterdir())[8:]:  # a short rest, for a short test
        if f"{path.stem}_x4.png" not in made:
            path.unlink()
    left = len(list(place.iterdir()))
    code, told, _ = gendr(*common, "--resume")
    assert code == 0
    assert told.count("was done before") == len(made)
    assert len(visible(out)) == left


def test_several_processes_that_do_not_meet(gendr, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = gendr("upscale", folder)
    assert code == 1
    assert "torchrun" in err
    assert "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="gloo's rendezvous is not for this test there")
def test_two_processes_share_a_folder(folder, tmp_path, tiny_checkpoint):
    (folder / "zero.png").write_bytes(b"")
    port = random.Random(os.getpid()).randrange(20000, 60000)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_port", str(port)]
    words = ["-m", "gendr", "upscale", str(folder), "-o", str(tmp_path / "out"), "--json"]
    options = ["--model", str(tiny_checkpoint), "--dtype", "fp32"]
    done = subprocess.run(
        [*launch, *words, *options], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["summary"]["pictures"] for line in lines if "summary" in line] == [4]
    assert sorted(line["status"] for line in lines if "status" in line) == [
        *["done"] * 3,
        "failed",
    ]
    assert len(visible(tmp_path / "out")) == 3
    assert done.returncode != 0


def test_every_line_of_json_is_one_write(folder, tmp_path, tiny_checkpoint, monkeypatch):
    """Without a buffer, as torchrun starts processes, two writes of one line let another's between."""

    class Pipe(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    writes: list[str] = []
    monkeypatch.setattr(sys, "stdout", Pipe())
    words = ["upscale", str(folder), "-o", str(tmp_path / "out"), "--json"]
    cli.main([*words, "--model", str(tiny_checkpoint), "--dtype", "fp32"])
    lines = [text for text in writes if text]
    assert len(lines) == 4  # three pictures and the summary
    assert all(json.loads(line) for line in lines)
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)


def test_a_team_of_one_shares_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    crew = team.join("cpu")
    assert crew.share([1, 2]) == crew.gather([1, 2]) == [1, 2]


# ---- the other commands ----


def test_info(gendr, tiny_checkpoint, tmp_path):
    code, out, _ = gendr("info", tiny_checkpoint)
    assert code == 0
    assert "parameters" in out
    code, out, _ = gendr("info", tiny_checkpoint, "--json")
    assert code == 0
    assert json.loads(out)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    code, _, err = gendr("info", tmp_path / "x.safetensors")
    assert code == 1
    assert len(err.splitlines()) <= 3


def test_fold_gives_the_same_pictures(gendr, tiny_checkpoint, folder, tmp_path):
    folded = tmp_path / "folded.safetensors"
    code, _, err = gendr("fold", tiny_checkpoint, "-o", folded)
    assert code == 0, err
    gendr("upscale", folder / "p1.png", "-o", tmp_path / "a.png")
    options = ["--model", folded, "--device", "cpu", "--dtype", "fp32"]
    assert (
        gendr("upscale", folder / "p1.png", "-o", tmp_path / "b.png", *options, model=False)[0] == 0
    )
    one, two = (np.asarray(Image.open(tmp_path / n)).astype(int) for n in ("a.png", "b.png"))
    assert abs(one - two).max() <= 1
    assert gendr("fold", tiny_checkpoint, "-o", folded)[0] == 2


def test_compare(gendr, folder, tmp_path):
    gendr("upscale", folder / "p1.png")
    code, _, err = gendr("compare", folder / "p1.png", folder / "p1_x4.png")
    assert code == 0, err
    width, height = size(folder / "p1_x4_compare.png")
    assert width > 2 * 320
    assert height > 320
    code, _, err = gendr("compare", folder / "p1.png", folder / "p1_x4.png")
    assert code == 1
    assert "--overwrite" in err or "exists" in err
    target = tmp_path / "c.png"
    words = ["compare", folder / "p1.png", folder / "p1_x4.png", "-o", target, "--crop"]
    assert gendr(*words, "2,3,4")[0] == 0
    code, _, err = gendr(*words, "10,3,4", "--overwrite")
    assert code == 1
    assert "not inside" in err
    code, _, err = gendr(*words[:3], "-o", folder / "p1.png", "--overwrite")
    assert code == 1
    assert size(folder / "p1.png") == (12, 9)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (700, 3)])
def test_compare_any_shape(gendr, tmp_path, shape):
    noise(*shape).save(tmp_path / "a.png")
    noise(shape[0] * 4, shape[1] * 4, "RGBA").save(tmp_path / "b.png")
    assert (
        gendr("compare", tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "c.png")[0] == 0
    )


def test_doctor(gendr, tiny_checkpoint, tmp_path):
    words = ["doctor", "--model", tiny_checkpoint, "--device", "cpu", "--dtype", "fp32"]
    code, out, _ = gendr(*words)
    assert code == 0, out
    for word in ("torch", "device", "bf16", "SHA-256", "reference", "all is well"):
        assert word in out
    code, out, _ = gendr(*words, "--json")
    assert json.loads(out)["ok"] is True
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    code, out, _ = gendr("doctor", "--model", tmp_path / "x.safetensors")
    assert code == 1
    assert "FAIL" in out


@pytest.mark.skipif(not EMBEDDED.exists(), reason="no weights in this checkout")
def test_embedded_model_gives_the_stored_result():
    model = load(device="cpu", dtype="fp32")
    stored = doctor.golden(model)
    assert stored is not None, "new weights: run `python -m gendr.commands.doctor`"
    ours = doctor.fingerprint(model)
    assert max(abs(a - b) for a, b in zip(ours, stored, strict=True)) < doctor.TOLERANCE["fp32"]
