"""The command line where things go wrong: names, folders, signals, terminals, other disks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gendr import cli, devices
from gendr.commands import finding, jobs, masks, stopping, trouble, upscale
from gendr.commands.journal import NAME, Journal
from gendr.pictures import placing

ROOT = Path(__file__).resolve().parent.parent


def picture(path, seed=0, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gendr(tiny_checkpoint, capsys):
    """Run the command line in this process: exit code, stdout, stderr."""

    def command(*words):
        options = ["--model", tiny_checkpoint, "--device", "cpu", "--dtype", "fp32", "--scale", "1"]
        # Before what was asked for, where `--` may end the options.
        words = [str(w) for w in (words[0], *options, *words[1:])]
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
        told = capsys.readouterr()
        return code, told.out, told.err

    return command


def visible(place):
    return {p.name for p in place.iterdir() if not p.name.startswith(".")}


def named(words, output=None, suffix="_x1", recursive=False, owned=lambda target: False):
    """source -> target of what `words` find, and the notes."""
    inputs = jobs.collect([str(word) for word in words], recursive)
    notes = inputs.notes + jobs.assign(inputs, output, suffix, None, owned)
    return {job.source: job.target for job in inputs.jobs if not job.problem}, notes


# Names


@pytest.mark.parametrize(
    "names",
    [
        ["IMG_1.png", "img_1.png", "Img_1.PNG"],
        ["Straße.png", "Strasse.png"],
        ["ﬁsh.png", "fish.png"],
        ["e\u0301.png", "\u00e9.png"],
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_names_that_fold_alike_are_all_restored(tmp_path, names, by_name):
    place = tmp_path / "in"
    for seed, name in enumerate(names):
        picture(place / name, seed)
    present = sorted(place.iterdir())
    if len(present) < len(names):
        pytest.skip("this disk takes these names for one")
    found, notes = named(present if by_name else [place], tmp_path / "out")
    assert sorted(found) == present
    assert len({finding.folded(target) for target in found.values()}) == len(names)
    assert len(notes) == len(names)


def test_one_file_is_restored_once_whatever_it_is_called(tmp_path):
    path = picture(tmp_path / "a.png")
    link = tmp_path / "link.png"
    try:
        link.symlink_to(path)
    except OSError:
        pytest.skip("no links here")
    assert len(named([path, link, tmp_path / "." / "a.png"])[0]) == 1
    os.link(path, tmp_path / "b.png")  # two names, two pictures
    assert len(named([path, tmp_path / "b.png"])[0]) == 2


@pytest.mark.parametrize("folder", ["set [1]", "[ab]", "what?", "a*b", "[!x]"])
def test_brackets_in_a_folders_name_are_its_name(tmp_path, folder):
    if os.name == "nt" and set(folder) & set("*?"):
        pytest.skip("no such names there")
    right = picture(tmp_path / folder / "p.png")
    for other in ("set 1", "a", "whatx", "aXb", "y"):
        picture(tmp_path / other / "wrong.png")
    assert list(named([tmp_path / folder / "*.png"])[0]) == [right]


def test_patterns_with_folders(tmp_path):
    paths = {picture(tmp_path / name) for name in ("a/1.png", "b/2.png", "b/c/3.png")}
    picture(tmp_path / "b/.hidden.png")
    assert set(named([tmp_path / "?" / "*.png"])[0]) == {p for p in paths if p.name != "3.png"}
    assert set(named([tmp_path / "**" / "*.png"])[0]) == paths
    assert set(named([tmp_path / "**"])[0]) == paths
    assert set(named([tmp_path / "[b]" / "**" / "?.png"])[0]) == {
        p for p in paths if p.name != "1.png"
    }


def test_links_in_a_circle_end(tmp_path):
    path = picture(tmp_path / "t" / "a.png")
    try:
        (tmp_path / "t" / "up1").symlink_to("..")
        (tmp_path / "t" / "up2").symlink_to("..")
    except OSError:
        pytest.skip("no links here")
    assert list(named([tmp_path / "t" / "**" / "*.png"])[0]) == [path]
    assert list(named([tmp_path / "t"], recursive=True)[0]) == [path]


@pytest.mark.parametrize("name", ["①", "2002³", "1②3", "٣", "Ⅷ", "½"])
def test_digits_that_are_no_numbers(tmp_path, name):
    paths = [picture(tmp_path / name / "a.png"), picture(tmp_path / f"{name}.png")]
    assert sorted(named([tmp_path], recursive=True)[0]) == sorted(paths)


def test_page_nine_comes_before_page_ten(tmp_path):
    for number in (10, 9, 1):
        picture(tmp_path / f"p{number}.png")
    assert [p.name for p in named([tmp_path])[0]] == ["p1.png", "p9.png", "p10.png"]


def test_a_tilde_is_the_home_folder_unless_it_is_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    at_home = picture(tmp_path / "home" / "pics" / "a.png")
    picture(tmp_path / "~tmp.png")
    assert list(named(["~/pics"])[0]) == [at_home]
    assert list(named(["~/pics/*.png"])[0]) == [at_home]
    assert list(named(["~tmp.png"])[0]) == [Path("~tmp.png")]
    assert named(["~nobody-of-that-name.png"])[0] == {}
    args = cli.parser().parse_args(
        ["upscale", "a", "-o", "~/out", "-m", "~/m", "--base", "~/b", "--mask", "~/k.png"]
    )
    home = tmp_path / "home"
    assert [args.output, args.model, args.base, args.mask] == [
        *(home / "out", home / "m", home / "b", home / "k.png")
    ]
    assert cli.parser().parse_args(["info", "~/m"]).checkpoint == home / "m"
    assert cli.parser().parse_args(["compare", "~/m", "b"]).input == home / "m"
    assert cli.parser().parse_args(["fold", "~/m", "-o", "~/n"]).output == home / "n"


def test_pictures_of_other_kinds_are_counted(tmp_path):
    picture(tmp_path / "a.png")
    for name in ("IMG_1.HEIC", "b.jxl", "c.dng", "d.ico", "e.heic", "f.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    for word in (tmp_path, tmp_path / "*"):
        found, notes = named([word])
        assert len(found) == 1
        assert "6 files of other kinds" in notes[0]
        assert "2 .heic" in notes[0]
    (tmp_path / "a.png").unlink()
    problem = jobs.collect([str(tmp_path)]).jobs[0].problem
    assert "6 files of other kinds" in problem
    assert len(named([tmp_path / "*.heic"])[0]) == 1  # asked for by name


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_stop_the_others(gendr, tmp_path):
    place = tmp_path / "in"
    picture(place / "a.png")
    os.mkfifo(place / "pipe.png")
    assert list(named([place])[0]) == [place / "a.png"]
    code, _, err = gendr("upscale", place / "pipe.png", "--plan")
    assert (code, "not a regular file" in err) == (1, True)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_a_locked_folder_is_not_called_empty(tmp_path):
    place = tmp_path / "locked"
    picture(place / "a.png")
    place.chmod(0)
    try:
        for word in (place, place / "*.png"):
            (job,) = jobs.collect([str(word)]).jobs
            assert "permission denied" in job.problem
    finally:
        place.chmod(0o700)


def test_a_folder_that_cannot_be_listed_is_not_called_empty(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")

    def refuse(path="."):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    for word in (tmp_path, tmp_path / "*.png"):
        (job,) = jobs.collect([str(word)]).jobs
        assert "permission denied" in job.problem


# Runs


def test_two_passes(gendr, tmp_path):
    picture(tmp_path / "in" / "a.png")
    assert gendr("upscale", tmp_path / "in", "-o", tmp_path / "one")[0] == 0
    assert gendr("upscale", tmp_path / "one", "-o", tmp_path / "two")[0] == 0
    assert visible(tmp_path / "two") == {"a_x1_x1.png"}
    # And where results lie among the pictures, they are left out as before.
    code, told, err = gendr("upscale", tmp_path / "one")
    assert code == 1
    assert "earlier result" in told
    assert "nothing to restore" in err


def test_results_in_a_folder_of_the_input_are_left_out(gendr, tmp_path):
    picture(tmp_path / "in" / "a.png")
    out = tmp_path / "in" / "out"
    assert gendr("upscale", tmp_path / "in", "-o", out)[0] == 0
    assert gendr("upscale", tmp_path / "in", "-o", out, "-r", "--resume")[0] == 0
    assert visible(out) == {"a_x1.png"}


def test_a_killed_run_knows_its_own_picture(gendr, tmp_path, monkeypatch):
    place, out = tmp_path / "in", tmp_path / "out"
    picture(place / "a.png")
    replace = os.replace

    class Killed(BaseException):
        pass

    def killed_after(source, target):
        replace(source, target)
        raise Killed

    monkeypatch.setattr(os, "replace", killed_after)
    with pytest.raises(Killed):
        gendr("upscale", place, "-o", out)
    monkeypatch.undo()
    before = (out / "a_x1.png").read_bytes()
    code, told, _ = gendr("upscale", place, "-o", out, "--resume")
    assert (code, told.count("was done before")) == (0, 1)
    assert (out / "a_x1.png").read_bytes() == before


def test_a_run_killed_before_its_picture_is_placed_does_it_again(gendr, tmp_path, monkeypatch):
    place, out = tmp_path / "in", tmp_path / "out"
    picture(place / "a.png")
    out.mkdir()
    mine = out / "a_x1.png"

    class Killed(BaseException):
        pass

    def killed(source, target):
        mine.write_bytes(b"\0" * Path(source).stat().st_size)  # of the same length, and another
        raise Killed

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        gendr("upscale", place, "-o", out)
    monkeypatch.undo()
    assert gendr("upscale", place, "-o", out, "--resume")[0] == 1
    assert mine.read_bytes().strip(b"\0") == b""
    mine.unlink()
    assert gendr("upscale", place, "-o", out, "--resume")[0] == 0
    with Image.open(mine) as image:
        assert image.size == (12, 9)


def test_records_of_an_older_version_count(tmp_path):
    path = picture(tmp_path / "a.png")
    line = {"target": "a.png", "bytes": path.stat().st_size, "key": "k"}
    (tmp_path / NAME).write_text(json.dumps(line) + "\n")
    assert Journal().finished(path, "k")


def test_an_overwritten_picture_is_known_by_either_record(tmp_path):
    path = picture(tmp_path / "a.png")
    journal = Journal()
    journal.add(path, "one")
    other = picture(tmp_path / "part.png", 1)
    journal.add(path, "two", other)  # recorded, and killed before it took its place
    assert Journal().finished(path, "one")
    assert not Journal().finished(path, "two")
    os.replace(other, path)
    assert Journal().finished(path, "two")


def start(tmp_path, tiny_checkpoint, count, more=()):
    for index in range(count):
        picture(tmp_path / "in" / f"p{index}.png", index, (96, 96))
    words = ["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *more]
    options = ["--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "fp32"]
    return subprocess.Popen(
        [sys.executable, "-m", "gendr", *words, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background deaf to Ctrl-C, nohup what it starts deaf to
        # SIGHUP, and children inherit that.
        preexec_fn=listening,
    )


def listening() -> None:
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)


@pytest.mark.skipif(os.name == "nt", reason="no such signals there")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_request_to_end_is_as_ctrl_c(tmp_path, tiny_checkpoint, name):
    process = start(tmp_path, tiny_checkpoint, 40)
    out = tmp_path / "out"
    try:
        limit = time.monotonic() + 240
        while process.poll() is None and not (out.is_dir() and visible(out)):
            assert time.monotonic() < limit, "waited in vain"
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == upscale.STOPPED, err
    assert "--resume" in err
    assert "Traceback" not in err
    assert not list(out.glob("*.part"))
    assert not list(out.glob(".*.part"))
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            image.load()


@pytest.mark.skipif(os.name == "nt", reason="no such signals there")
@pytest.mark.parametrize("delay", [0.3, 1.0])
def test_ctrl_c_during_imports_prints_no_traceback(delay):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "gendr", "doctor"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Once the first part of torch is there, the command's own handler is.
    for line in process.stderr:
        if "torch" in line:
            break
    time.sleep(delay / 10)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert "Traceback" not in err
    assert process.returncode == 130


def test_what_the_caller_ignores_stays_ignored():
    if os.name == "nt":
        pytest.skip("no such signals there")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.as_interrupts():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_does_not_wait():
    asked = []

    def twice():
        with stopping.delayed(lambda: asked.append(1)):
            signal.raise_signal(signal.SIGINT)
            assert asked == [1]
            signal.raise_signal(signal.SIGINT)

    # Whatever this process was started with: a shell's background is deaf to Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            twice()
    finally:
        signal.signal(signal.SIGINT, before)


def test_public_names_are_there_without_being_imported_first():
    code = (
        "import sys, gendr\n"
        "assert 'torch' not in sys.modules\n"
        "import gendr.restoration\n"
        "assert callable(gendr.resize) and gendr.pictures.read\n"
        "assert all(hasattr(gendr, n) for n in gendr.__all__)\n"
        "assert set(gendr.__all__) == set(gendr.HOMES)\n"
        "assert not hasattr(gendr, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_stale_parts_are_swept(gendr, tmp_path):
    out = tmp_path / "out"
    picture(tmp_path / "in" / "a.png")
    out.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = out / f".gendr-{placing._machine()}-{dead.pid}-{'a' * 16}.part"
    stale.write_bytes(b"half a picture")
    assert gendr("upscale", tmp_path / "in", "-o", out)[0] == 0
    assert not stale.exists()


# Words


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["upscale", "a.png"], ["upscale", "--resume", "a.png"]),
        (["upscale", "--", "-x.png"], ["upscale", "--resume", "--", "-x.png"]),
        (["upscale", "--resume", "a"], ["upscale", "--resume", "a"]),
        (
            ["upscale", "-s", "2", "--", "-x", "--resume"],
            ["upscale", "--resume", "-s", "2", "--", "-x", "--resume"],
        ),
    ],
)
def test_the_way_to_go_on_is_one(typed, expected):
    words = upscale.resuming(typed).split()
    assert words == expected
    args = cli.parser().parse_args(words)
    assert args.resume
    assert (
        args.pictures
        == [w for w in typed if w in ("a.png", "a", "-x.png", "-x", "--resume")][
            -len(args.pictures) :
        ]
    )


def test_advice_is_in_the_command_lines_words(gendr, tmp_path):
    whole = picture(tmp_path / "a.png", size=(60, 60)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    code, _, err = gendr("upscale", tmp_path / "cut.png")
    assert (code, "--truncated" in err, "truncated=True" in err) == (1, True, False)
    assert gendr("upscale", tmp_path / "cut.png", "--truncated")[0] == 0
    code, _, err = gendr("upscale", tmp_path / "a.png", "--max-pixels", "100")
    assert (code, "--max-pixels" in err, "max_pixels" in err) == (1, True, False)
    code, _, err = gendr("upscale", tmp_path / "a.png", "--max-pixels", "0")
    assert code == 2


@pytest.mark.parametrize("masked", [False, True])
def test_what_memory_cannot_hold_is_refused_before_it_is_decoded(
    gendr, tmp_path, monkeypatch, masked
):
    small = picture(tmp_path / "in" / "small.png", size=(40, 30))
    large = tmp_path / "in" / "large.png"
    Image.new("1", (4000, 3000)).save(large)
    mask = tmp_path / "mask.png"
    Image.new("1", (40, 30), 1).save(mask)
    decoded = []
    read = upscale.pictures.read

    def noted(path, **reading):
        decoded.append(path)
        return read(path, **reading)

    monkeypatch.setattr(upscale.pictures, "read", noted)
    monkeypatch.setattr(devices, "_free_host_bytes", lambda: 2**28)
    more = ["--mask", mask] if masked else []
    code, _, err = gendr("upscale", tmp_path / "in", "-o", tmp_path / "out", *more)
    assert (code, decoded[masked:]) == (1, [small])
    assert visible(tmp_path / "out") == {"small_x1.png"}
    assert f"failed: {large}: 4000x3000 enlarged to 4000x3000 (12.0 MP) take about" in err
    assert "GiB are free: even scale 1 does not fit; use a smaller picture" in err


def test_a_comparison_that_memory_cannot_hold_is_refused(capsys, tmp_path, monkeypatch):
    Image.new("1", (4000, 3000)).save(tmp_path / "a.png")
    monkeypatch.setattr(devices, "_free_host_bytes", lambda: 2**28)
    assert cli.main(["compare", str(tmp_path / "a.png"), str(tmp_path / "a.png")]) == 1
    told = capsys.readouterr().err
    assert "a.png and a.png take about 1.1 GiB of main memory, and 0.2 GiB are free" in told


def test_a_large_picture_is_measured_without_being_decoded(gendr, tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # what Pillow refuses to open

    def refuse(*args, **kwargs):
        raise AssertionError("was decoded")

    monkeypatch.setattr(Image.Image, "load", refuse)
    (job,) = jobs.collect([str(tmp_path / "a.png")]).jobs
    assert jobs.result_pixels(job, cli.Settings(scale=1)) == 12 * 9


def test_the_plan_of_a_turned_tiff(gendr, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 36)).save(tmp_path / "a.tif", exif=exif)
    code, out, _ = gendr("upscale", tmp_path / "a.tif", "--plan")
    assert code == 0
    assert "36x48 -> 36x48" in out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb.png", "a\\x1b[31mb.png"),
        ("a\nb.png", "a\\nb.png"),
        ("a\x9bb", "a\\x9bb"),
        ("gnp.\u202ea", "gnp.\\u202ea"),
        ("Straße 中文 🎉 é\u0301.png", "Straße 中文 🎉 é\u0301.png"),
        ("a\u3000b", "a\u3000b"),
        ("👩\u200d👧", "👩\u200d👧"),
    ],
)
def test_names_do_not_steer_the_terminal(text, shown):
    assert trouble.plain(text) == shown


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_no_escape_code_of_a_name_reaches_the_terminal(gendr, tmp_path):
    picture(tmp_path / "in" / "e\x1b[31mred\n2.png")
    (tmp_path / "in" / "x\x1b[2J.png").write_bytes(b"no picture")
    code, out, err = gendr("upscale", tmp_path / "in", "-o", tmp_path / "o\x1b[1m")
    assert code == 1
    assert "\x1b" not in out + err
    code, out, err = gendr("upscale", tmp_path / "in", "-o", tmp_path / "o\x1b[1m", "--plan")
    assert "\x1b" not in out + err


@pytest.mark.parametrize("missing", [["stderr"], ["stdout", "stderr"]])
def test_without_a_terminal_the_work_is_done(tmp_path, tiny_checkpoint, monkeypatch, missing):
    picture(tmp_path / "in" / "a.png")
    for name in missing:
        monkeypatch.setattr(sys, name, None)
    words = ["upscale", str(tmp_path / "in"), str(tmp_path / "gone.png"), "--scale", "1"]
    words += ["-o", str(tmp_path / "out"), "--model", str(tiny_checkpoint)]
    code = cli.main([*words, "--device", "cpu", "--dtype", "fp32"])
    assert code == 1  # of the one that is gone
    assert visible(tmp_path / "out") == {"a_x1.png"}


# Metadata and masks


def test_strip_leaves_the_pixels_alone(gendr, tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    Image.new("RGB", (12, 9), "red").save(tmp_path / "a.png", exif=exif, dpi=(300, 300))
    assert gendr("upscale", tmp_path / "a.png", "-o", tmp_path / "kept")[0] == 0
    assert gendr("upscale", tmp_path / "a.png", "-o", tmp_path / "bare", "--strip")[0] == 0
    with Image.open(tmp_path / "kept" / "a_x1.png") as kept:
        kept.load()
        assert kept.getexif()[0x010F] == "Maker"
        assert kept.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    with Image.open(tmp_path / "bare" / "a_x1.png") as bare:
        bare.load()
        assert not bare.info
        assert bare.tobytes() == kept.tobytes()


def test_a_mask_restores_where_it_is_white(gendr, tmp_path):
    picture(tmp_path / "a.png", size=(200, 40))
    mask = np.zeros((20, 100), np.uint8)
    mask[:, :10] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["upscale", tmp_path / "a.png", "--scale", "2"]
    assert gendr(*words, "-o", tmp_path / "all")[0] == 0
    assert gendr(*words, "-o", tmp_path / "part", "--mask", tmp_path / "mask.png")[0] == 0
    black = tmp_path / "black.png"
    Image.new("L", (200, 40)).save(black)
    assert gendr(*words, "-o", tmp_path / "none", "--mask", black)[0] == 0
    part, none = (np.asarray(Image.open(tmp_path / n / "a_x2.png")) for n in ("part", "none"))
    assert np.array_equal(part[:, 100:], none[:, 100:])
    assert not np.array_equal(part[:, :20], none[:, :20])
    # Another mask is another result.
    code, _, _ = gendr(*words, "-o", tmp_path / "part", "--mask", black, "--resume")
    assert code == 1
    Image.new("L", (7, 9)).save(tmp_path / "odd.png")
    code, _, err = gendr(*words, "-o", tmp_path / "odd", "--mask", tmp_path / "odd.png")
    assert code == 1
    assert "mask is 7x9" in err
    code, _, err = gendr(*words, "-o", tmp_path / "gone", "--mask", tmp_path / "gone.png")
    assert code == 1
    assert "no such file" in err


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA", "1"])
def test_a_mask_is_how_light_a_picture_is(tmp_path, mode):
    Image.new("RGB", (4, 3), "white").convert(mode).save(tmp_path / "white.png")
    assert torch.allclose(masks.read(tmp_path / "white.png"), torch.ones(3, 4))
    Image.new("RGBA", (4, 3), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert not masks.read(tmp_path / "clear.png").any()


# Memory limits


def groups(tmp_path, files):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


MOUNT2 = "30 23 0:26 / {0} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT1 = "35 31 0:32 / {0}/memory rw - cgroup cgroup rw,memory\n36 31 0:33 / {0}/cpu rw - cgroup cgroup rw,cpu\n"


def test_a_limit_of_a_group_above_counts(tmp_path):
    groups(
        tmp_path,
        {
            "a/memory.max": "1000\n",
            "a/memory.current": "400\n",
            "a/memory.stat": "anon 300\ninactive_file 100\n",
            "a/b/memory.max": "max\n",
            "a/b/memory.current": "10\n",
        },
    )
    assert devices.free_in_groups("0::/a/b\n", MOUNT2.format(tmp_path)) == 700
    assert devices.free_in_groups("0::/elsewhere\n", MOUNT2.format(tmp_path)) == sys.maxsize
    assert devices.free_in_groups("0::/\n", MOUNT2.format(tmp_path / "a")) == 700


def test_limits_of_version_one(tmp_path):
    groups(
        tmp_path,
        {
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "100\n",
            "memory/job/memory.limit_in_bytes": "5000\n",
            "memory/job/memory.usage_in_bytes": "3000\n",
            "memory/job/memory.stat": "cache 50\ntotal_inactive_file 500\n",
        },
    )
    told = "4:memory:/job\n1:cpu:/other\n0::/\n"
    assert devices.free_in_groups(told, MOUNT1.format(tmp_path)) == 2500
    # Inside a container the mount begins at the container's own group.
    inside = MOUNT1.format(tmp_path).replace("0:32 / ", "0:32 /docker/x ")
    inside = inside.replace(f"{tmp_path}/memory", f"{tmp_path}/memory/job")
    assert devices.free_in_groups("4:memory:/docker/x\n", inside) == 2500


def test_without_groups_there_is_no_limit():
    assert devices.free_in_groups("", "") == sys.maxsize
    mounts = "22 1 8:1 / / rw - ext4 /dev/sda rw\n"
    assert devices.free_in_groups("12:cpuset:/\n0::/\n", mounts) == sys.maxsize


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["a.png", "--suffix", "../x"],
            "--suffix: '../x' is to be part of a name, which '/' is not",
        ),
        (["a.png", "-o", ""], "--output/-o: the name is empty: give a folder or a file"),
        (["a.png", "-o", "-"], "results go to files, not to standard output: give a folder"),
        (["a.png", "-o", "out.heic"], "results can be written as .png, .jpg"),
        (["-x.png"], "names that begin with -, as -x.png does, come last, after --"),
    ],
)
def test_wrong_use_says_what_to_do(gendr, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    picture(tmp_path / "-x.png")
    code, out, err = gendr("upscale", *words)
    assert (code, out) == (2, "")
    assert told in err
    assert visible(tmp_path) == {"a.png", "-x.png"}


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("", "a name is empty, perhaps a variable that is not set"),
        ("-", "pictures are read from files, not from standard input"),
        ("https://example.org/a.png", "is an address; download the picture first"),
        ("file:///a.png", "give the file's name without file://"),
        ("loop.png", "is a link that leads nowhere"),
    ],
)
def test_a_word_that_is_no_file_says_what_to_do(tmp_path, monkeypatch, word, told):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    os.symlink("loop.png", "loop.png")
    (job,) = jobs.collect([word]).jobs
    assert told in job.problem


def test_a_name_that_gets_too_long_says_what_to_do(gendr, tmp_path):
    source = picture(tmp_path / "a.png")
    code, _, err = gendr("upscale", source, "--suffix", "_" * 260)
    assert code == 1
    assert "the result's name is too long; choose a shorter --suffix or name" in err


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, tiny_checkpoint, capsys):
    place = picture(tmp_path / "a.png")
    assert cli.main(["fold", str(tiny_checkpoint), "-o", str(place / "x" / "f.safetensors")]) == 1
    assert f"a file is where a folder is needed: {place}" in capsys.readouterr().err


def test_a_device_without_numbers_is_refused():
    with pytest.raises(ValueError, match="device 'meta' can't be used here: choose auto or cpu"):
        devices.choose_device("meta")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_words_that_find_no_room_stop_no_work(tmp_path, tiny_checkpoint, monkeypatch, name):
    pictures = [tmp_path / "missing.png", *(picture(tmp_path / f"{n}.png", n) for n in (1, 2))]
    words = ["upscale", *map(str, pictures), "-o", str(tmp_path / "out"), "--scale", "1"]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, name, full)
        words += ["--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "fp32"]
        assert cli.main(words) == 1
    assert visible(tmp_path / "out") == {"1_x1.png", "2_x1.png"}


def test_a_switch_that_is_off_is_no_part_of_a_key():
    settings = upscale.Settings(scale=2, seamless=False)
    assert upscale.asked(settings)["scale"] == 2
    assert not {"seamless", "steady", "long_side"} & upscale.asked(settings).keys()
    assert upscale.asked(upscale.Settings(seamless=True))["seamless"] is True


def test_free_memory_is_known_without_proc(monkeypatch):
    def closed(*_, **__):
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr("builtins.open", closed)
    assert devices._free_in_system() > 2**20


def test_what_a_format_cannot_hold_is_told_by_the_plan(gendr, tmp_path):
    source = tmp_path / "long.png"
    Image.new("L", (9000, 2)).save(source)
    code, out, err = gendr("upscale", source, "--scale", "8", "--plan", "--format", "jpg")
    assert (code, out) == (1, "")
    assert "JPEG ends at 65500 pixels a side, the result has 72000x16: choose --format png" in err
    code, _, err = gendr("upscale", source, "--plan", "--max-pixels", "100")
    assert code == 1
    assert "more than the limit of 0.0001; reduce it first, or raise --max-pixels" in err


@pytest.mark.parametrize(("ending", "bits"), [("tif", 16), ("bmp", 8)])
def test_four_gigabytes_are_told_before_the_work(ending, bits):
    # Pixels that take no memory.
    pixels = torch.ones(1).expand(1, 3, 6000, 8000)
    held = jobs.pictures.Picture(pixels, bits=bits)
    with pytest.raises(ValueError, match="ends at 4 GB, which the result exceeds"):
        jobs.expect_room(Path(f"a.{ending}"), held, upscale.Settings(scale=6))
    jobs.expect_room(Path("a.png"), held, upscale.Settings(scale=6))
