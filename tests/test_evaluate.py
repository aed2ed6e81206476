"""The evaluation: metrics by value, and whole runs over tiny pictures."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import gendr
from train import evaluate
from train.evaluation import judges, methods, metrics, records, shown, testset, tilecheck
from train.evaluation.niqe import Niqe
from train.evaluation.testset import InputError
from train.stage2.validation import Validation


def scene(height: int = 72, width: int = 96) -> np.ndarray:
    """A picture with edges and gradients, the same every time."""
    y, x = np.mgrid[0:height, 0:width]
    channels = ((x * 7 + y * 3) % 256, (x * x // 9 + 5 * y) % 256, (x * y // 5) % 256)
    return np.stack(channels, axis=2).astype(np.uint8)


def blurred(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    half = Image.fromarray(picture).resize((width // 2, height // 2), Image.Resampling.BOX)
    return np.asarray(half.resize((width, height), Image.Resampling.BICUBIC))


def test_values_of_pyiqa():
    """pyiqa 0.1.16 (test_y_channel, ycbcr) gives 25.411964 and 0.887625 for this pair."""
    found, notes = metrics.against_reference(blurred(scene()), scene())
    assert found["psnr"] == pytest.approx(25.411964, abs=1e-3)
    assert found["ssim"] == pytest.approx(0.8876249, abs=1e-3)
    assert found["sharp"] < 1
    assert notes == []


def test_parity_with_an_installed_pyiqa():
    pyiqa = pytest.importorskip("pyiqa")
    pair = blurred(scene()), scene()
    found, _ = metrics.against_reference(*pair)
    for name in ("psnr", "ssim"):
        network = pyiqa.create_metric(name, test_y_channel=True, color_space="ycbcr")
        expected = float(network(*(metrics.as_tensor(p) for p in pair)))
        assert found[name] == pytest.approx(expected, abs=1e-3)


def test_psnr_in_closed_form():
    flat = np.full((16, 16, 3), 100, np.uint8)
    # 48.1308 dB, less what pyiqa's floor under the error takes.
    assert metrics.psnr(flat + 1, flat) == pytest.approx(48.1308, abs=4e-3)
    assert metrics.psnr(flat, flat) == pytest.approx(80.0)


def test_ssim_of_equal_and_of_too_small_pictures():
    y = metrics.luma(scene())
    assert metrics.ssim(y, y) == pytest.approx(1.0)
    assert metrics.ssim(y[:10], y[:10]) is None


def test_other_scale_is_a_mismatch_and_a_few_pixels_are_cropped():
    with pytest.raises(metrics.Mismatch, match=r"96x72.*48x36"):
        metrics.against_reference(scene(), scene(36, 48))
    found, notes = metrics.against_reference(scene(72, 98), scene(70, 96))
    assert found["psnr"] == pytest.approx(80.0)
    assert "96x70" in notes[0]


def test_drift_sees_a_cast_and_not_detail():
    source = np.full((32, 32, 3), 120, np.uint8)
    noise = np.random.default_rng(0).choice([-20, 20], (128, 128, 1))
    detail = (120 + noise).repeat(3, 2).astype(np.uint8)
    cast = np.full((128, 128, 3), (140, 120, 120), np.uint8)
    noisy, _ = metrics.against_input(detail, source)
    tinted, _ = metrics.against_input(cast, source)
    assert noisy["drift"] < 0.4 * noisy["lr_delta_e"]
    assert tinted["drift"] == pytest.approx(tinted["lr_delta_e"], rel=1e-3)
    assert metrics.against_input(source[:8, :8], source)[0]["drift"] is None


def test_cells_are_means():
    picture = scene(20, 7)
    assert metrics.cells(picture, 1)[0, 0] == pytest.approx(picture.mean((0, 1)))
    assert metrics.cells(picture).shape == (8, 7, 3)


@pytest.fixture
def niqe_file(tmp_path):
    """A parameter file of the right layout with made-up values."""
    k = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    window = np.outer(k, k) / np.outer(k, k).sum()
    np.savez(
        tmp_path / "niqe.npz",
        mu_pris_param=np.linspace(0.5, 2, 36)[None],
        cov_pris_param=np.diag(np.linspace(1, 3, 36)),
        gaussian_window=window,
    )
    return tmp_path / "niqe.npz"


def test_niqe(niqe_file, tmp_path):
    niqe = Niqe(niqe_file)
    noise = np.random.default_rng(3).integers(0, 256, (200, 290, 3), dtype=np.uint8)
    # The value of an independent implementation with the same parameters.
    assert niqe(noise) == pytest.approx(8.785522, abs=1e-4)
    assert niqe(noise[:100, :190]) is None
    (tmp_path / "other.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"other\.npz is not a NIQE parameter file"):
        Niqe(tmp_path / "other.npz")


def store(path, stems):
    return records.Records(path, stems)


def test_records_survive_a_torn_line_and_forget_what_changed(tmp_path):
    path = tmp_path / "m.jsonl"
    line = {
        "stem": "a",
        "signature": "s",
        "size": [4, 3],
        "sha256": "h",
        "values": {"psnr/1": 30.0},
    }
    first = store(path, ["a", "b"])
    first.add(line)
    first.close()
    with path.open("a") as file:
        file.write('{"stem": "b", "sign')
    again = store(path, ["a", "b"])
    assert again.done("a", "s", ["psnr/1"])
    assert not again.measured("b")
    again.add(line | {"stem": "b"})
    again.add({"stem": "a", "values": {"niqe/1": None}, "why": {"niqe/1": "too small"}})
    again.close()
    last = store(path, ["a", "b"])
    assert last.done("b", "s", ["psnr/1"])
    assert last.done("a", "s", ["psnr/1", "niqe/1"])
    assert not last.done("a", "other", ["psnr/1"])
    last.add(line | {"signature": "other", "values": {}})
    assert not last.has("a", "psnr/1")
    last.close()


def test_summary_is_over_the_common_pictures(tmp_path):
    found = {}
    for name, values in {"base": [1.0, 2.0, 3.0, None], "new": [2.0, 3.0, None, 9.0]}.items():
        found[name] = store(tmp_path / f"{name}.jsonl", list("abcd"))
        for stem, value in zip("abcd", values, strict=True):
            if value is not None:
                found[name]._apply(
                    {
                        "stem": stem,
                        "signature": "s",
                        "size": [1, 1],
                        "sha256": "",
                        "values": {"k": value},
                    }
                )
    summary = records.summarise(found, "k", "higher", "base")
    assert summary["base"].mean == 1.5
    assert summary["new"].mean == 2.5
    assert (summary["new"].difference, summary["new"].better, summary["new"].count) == (1.0, 2, 2)
    assert summary["new"].low is None  # two pictures have no interval


def test_interval_and_direction():
    low, high = records.interval(np.random.default_rng(1).normal(1, 1, 400))
    assert low < 1.1 < high + 0.2
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert records.cost(2.0, "one") == pytest.approx(records.cost(0.5, "one"))
    assert records.cost(3.0, "higher") < records.cost(2.0, "higher")


# What the paper's tables print for GenDR.
PAPER = {
    "imagenet_test": {"psnr": 24.14, "ssim": 0.6878, "lpips": 0.2652, "musiq": 74.68},
    "realsr": {"psnr": 23.18, "ssim": 0.7135, "lpips": 0.2859, "musiq": 68.36},
    "realset80": {"musiq": 71.57, "liqe": 4.5248, "clipiqa": 0.7424, "qalign": 4.4525},
    "reallr200": {"musiq": 72.36, "maniqa": 0.4882},
}


@pytest.mark.skipif(testset.tomllib is None, reason="Python 3.10 without tomli")
def test_recipes_hold_the_paper():
    assert testset.recipe_names() == sorted(PAPER)
    known = {entry.name for entry in judges.PAPER} | {m.name for m in metrics.NATIVE}
    for name, expected in PAPER.items():
        recipe = testset.read_recipe(name)
        gendr = recipe.paper[-1]
        assert gendr["method"].startswith("GenDR")
        assert expected.items() <= gendr.items()
        assert set(recipe.models) <= known
        # Every number of the paper has a row in the report.
        assert set(gendr) - {"method", "base", "parameters", "time"} <= known
        assert recipe.color_fix == ("wavelet" if recipe.paired else "none")
    with pytest.raises(testset.InputError, match="one of imagenet_test"):
        testset.read_recipe("div2k")


@pytest.mark.skipif(testset.tomllib is None, reason="Python 3.10 without tomli")
def test_realsr_as_it_is_unpacked(tmp_path):
    for camera in ("Canon", "Nikon"):
        folder = tmp_path / camera / "Test" / "4"
        folder.mkdir(parents=True)
        for ending in ("LR4", "HR"):
            Image.new("RGB", (8, 8)).save(folder / f"{camera}_001_{ending}.png")
    items, problems = testset.pair(tmp_path, tmp_path, testset.read_recipe("realsr"))
    assert [i.stem for i in items] == ["Canon_001", "Nikon_001"]
    assert items[0].reference.name == "Canon_001_HR.png"
    assert problems == []


def test_named():
    assert methods.named("runs/best.safetensors") == ("best", "runs/best.safetensors", {})
    name, path, changes = methods.named("a=dir/x=y.safetensors?fidelity=1&color_fix=none")
    assert (name, path) == ("a", "dir/x=y.safetensors")
    assert changes == {"fidelity": 1, "color_fix": "none"}
    with pytest.raises(ValueError, match="no setting"):
        methods.named("a=b?speed=3")
    with pytest.raises(ValueError, match="can't name a method"):
        methods.named("a:b=c")


@pytest.fixture
def pairs(tmp_path):
    """Four pictures with references, and results of some other program."""
    for folder in ("lr", "hr", "theirs"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        hr = np.roll(scene(48, 64), 5 * i, axis=1)
        lr = Image.fromarray(hr).resize((16, 12), Image.Resampling.BICUBIC)
        Image.fromarray(hr).save(tmp_path / "hr" / f"p{i}.png")
        lr.save(tmp_path / "lr" / f"p{i}.png")
        lr.resize((64, 48), Image.Resampling.NEAREST).save(tmp_path / "theirs" / f"p{i}_out.png")
    return tmp_path


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    """An installed pyiqa must not reach for its weights in a test."""
    monkeypatch.setattr(judges, "installed", lambda: None)


def run(folder, *more: str) -> int:
    places = ("--data", folder / "lr", "--ref", folder / "hr", "--out", folder / "out")
    return evaluate.main([*map(str, places), "--pictures", "2", *more])


def results(folder) -> dict:
    return json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))


def means(folder, metric: str) -> dict[str, float]:
    rows = {m["name"]: m for m in results(folder)["metrics"]}
    return {name: s["mean"] for name, s in rows[metric]["methods"].items()}


def test_a_whole_run_and_its_continuation(pairs, tiny_checkpoint, capsys):
    model = f"ours={tiny_checkpoint}"
    theirs = f"theirs={pairs / 'theirs'}"
    assert run(pairs, "--results", theirs, "--model", model, "--tile-pictures", "1") == 0
    found = results(pairs)
    assert [m["name"] for m in found["methods"]] == ["bicubic", "lanczos", "theirs", "ours"]
    assert "'_out'" in found["methods"][2]["remark"]
    assert len(found["methods"][3]["sha256"]) == 64
    assert found["methods"][3]["settings"]["color_fix"] == "wavelet"
    expected = np.mean(
        [
            metrics.against_reference(
                methods.read_rgb(pairs / "theirs" / f"p{i}_out.png"),
                methods.read_rgb(pairs / "hr" / f"p{i}.png"),
            )[0]["psnr"]
            for i in range(4)
        ]
    )
    assert means(pairs, "psnr")["theirs"] == pytest.approx(expected)
    assert [r["tile"] for r in found["tile_sizes"]] == [64]
    with (pairs / "out" / "pictures.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert float(rows[3]["psnr"]) == pytest.approx(means_of(rows, "ours", "p0"), rel=1e-5)
    # The same again: nothing is restored or measured, and the numbers stay.
    before = (pairs / "out" / "results" / "ours" / "p0.png").stat().st_mtime_ns
    lines = (pairs / "out" / "records" / "ours.jsonl").read_text()
    capsys.readouterr()
    assert run(pairs, "--results", theirs, "--model", model, "--tile-pictures", "1") == 0
    told = capsys.readouterr().err
    assert "ours: 100%" in told
    assert "4 from before" in told
    assert (pairs / "out" / "records" / "ours.jsonl").read_text() == lines
    assert results(pairs)["pictures_sha256"] == found["pictures_sha256"]
    # Another setting is another result; a changed reference needs no new one.
    Image.fromarray(scene(48, 64)[::-1]).save(pairs / "hr" / "p3.png")
    assert run(pairs, "--model", model, "--tile-pictures", "0") == 0
    assert (pairs / "out" / "results" / "ours" / "p0.png").stat().st_mtime_ns == before
    assert means(pairs, "psnr")["bicubic"] != found["metrics"][0]["methods"]["bicubic"]["mean"]
    assert run(pairs, "--model", model + "?fidelity=1", "--tile-pictures", "0") == 0
    assert (pairs / "out" / "results" / "ours" / "p0.png").stat().st_mtime_ns != before
    assert means(pairs, "lr_psnr")["ours"] > 40


def test_three_tile_sizes_and_their_borders(tmp_path, tiny_checkpoint):
    (tmp_path / "lr").mkdir()
    Image.fromarray(scene(40, 72)).save(tmp_path / "lr" / "p.png")
    places = ("--data", str(tmp_path / "lr"), "--out", str(tmp_path / "out"))
    model = ("--model", str(tiny_checkpoint), "--baselines", "none", "--metrics", "native")
    sizes = ("--tile-pictures", "1", "--tile-sizes", "320,128,64")
    assert evaluate.main([*places, *model, *sizes]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    whole, middle, small = found["tile_sizes"]
    assert whole["tiles"] == 1
    assert 1 < middle["tiles"] < small["tiles"]
    assert "seam" in whole
    assert "psnr_to_first" not in whole
    for row in (middle, small):
        assert row["seam"] > 0
        assert row["seam_of_first"] > 0
        assert row["delta_e_to_first"] > 0
        assert (tmp_path / "out" / row["file"]).exists()
    assert tilecheck.tile_sizes(512, 500) == (512, 256, 128)
    assert tilecheck.tile_sizes(90, 60) == (128,)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "tile edge 64: difference to the largest tile" in page
    # The automatic plan has tiles too (the model was trained on 64): its borders are scored.
    seam = {m["name"]: m for m in found["metrics"]}["seam"]
    assert seam["methods"]["random"]["mean"] > 0


def means_of(rows, method, picture):
    (row,) = [r for r in rows if (r["method"], r["picture"]) == (method, picture)]
    return float(row["psnr"])


def test_broken_and_mismatching_files_are_named_and_the_rest_is_done(pairs, capsys):
    (pairs / "lr" / "p0.png").write_bytes(b"no picture")
    Image.new("RGB", (200, 48)).save(pairs / "hr" / "p1.png")
    (pairs / "hr" / "p2.png").unlink()
    (pairs / "theirs" / "p3_out.png").unlink()
    assert run(pairs, "--results", f"theirs={pairs / 'theirs'}") == 1
    found = results(pairs)
    assert "1 without a reference: p2" in found["problems"]
    assert set(found["failed"]["bicubic"]) == {"p0", "p1"}
    assert "200x48" in found["failed"]["bicubic"]["p1"]
    assert set(found["failed"]["theirs"]) == {"p0", "p1", "p3"}
    assert not {"p2", "p3"} & set(found["failed"]["bicubic"])
    assert found["failed"]["bicubic"]["p0"].startswith("PictureError: p0.png: ")
    page = (pairs / "out" / "report.html").read_text(encoding="utf-8")
    for text in ("p0", "200x48", "no result of this name", "Read this first"):
        assert text in page
    # Repaired, only they are done.
    shutil.copy(pairs / "lr" / "p1.png", pairs / "lr" / "p0.png")
    Image.fromarray(scene(48, 64)).save(pairs / "hr" / "p1.png")
    capsys.readouterr()
    assert run(pairs) == 0
    assert re.search(r"bicubic: 100%.* 2 from before", capsys.readouterr().err)


def test_a_model_that_cannot_be_loaded_leaves_the_others(pairs, tiny_checkpoint, monkeypatch):
    def load(*args, **kwargs):
        raise gendr.CheckpointError("damaged")

    monkeypatch.setattr(methods.gendr, "load", load)
    assert run(pairs, "--model", f"ours={tiny_checkpoint}") == 1
    found = results(pairs)
    assert "ours could not be loaded: damaged" in found["problems"]
    assert set(found["metrics"][0]["methods"]) == {"bicubic", "lanczos"}


def test_every_metric_is_there_or_has_its_reason(pairs):
    assert run(pairs) == 0
    found = {m["name"]: m for m in results(pairs)["metrics"]}
    assert {e.name for e in judges.PAPER} | {m.name for m in metrics.NATIVE} <= set(found)
    for metric in found.values():
        assert bool(metric["methods"]) != bool(metric["missing"])
    assert "pip install pyiqa" in found["lpips"]["missing"]
    assert "own repository" in found["depictqa"]["missing"]
    places = ["--data", str(pairs / "lr"), "--out", str(pairs / "alone")]
    assert evaluate.main([*places, "--metrics", "native"]) == 0
    alone = json.loads((pairs / "alone" / "results.json").read_text())
    assert {m["missing"] for m in alone["metrics"] if m["name"] in ("psnr", "ssim")} == {
        "needs references (--ref)"
    }


class FakeNetwork:
    lower_better = True

    def __init__(self, name):
        self.metric_mode = "FR" if name == "lpips" else "NR"

    def __call__(self, result, reference=None):
        assert (reference is None) == (self.metric_mode == "NR")
        assert result.shape == (1, 3, 48, 64)
        return torch.tensor(0.25 if reference is None else float((result - reference).abs().mean()))


def test_learned_metrics_are_added_without_restoring_again(pairs, tiny_checkpoint, monkeypatch):
    model = ("--model", f"ours={tiny_checkpoint}", "--tile-pictures", "0", "--baselines", "bicubic")
    assert run(pairs, *model, "--metrics", "native") == 0
    made = []

    def create_metric(name, device):
        made.append(name)
        if name == "musiq":
            raise OSError("no network\nsecond line")
        return FakeNetwork(name)

    fake = types.SimpleNamespace(create_metric=create_metric)
    monkeypatch.setitem(sys.modules, "pyiqa", fake)
    monkeypatch.setattr(judges, "installed", lambda: "9.9")
    monkeypatch.setattr(methods.Checkpoint, "make", None)
    assert run(pairs, *model, "--metrics", "lpips,niqe,musiq,qalign") == 0
    found = {m["name"]: m for m in results(pairs)["metrics"]}
    assert set(found["lpips"]["methods"]) == {"bicubic", "ours"}
    assert found["lpips"]["version"] == "pyiqa-9.9:lpips"
    assert found["niqe"]["methods"]["ours"]["mean"] == 0.25
    assert found["musiq"]["missing"] == "OSError: no network"
    assert run(pairs, *model, "--metrics", "lpips,niqe") == 0
    assert made.count("lpips") == 1


def test_report_needs_nothing_from_outside(pairs):
    nasty = "a<b> & 'c'"
    for folder in ("lr", "hr"):
        (pairs / folder / "p1.png").rename(pairs / folder / f"{nasty}.png")
    assert run(pairs, "--show", nasty, "--title", "<i>x</i>") == 0
    page = (pairs / "out" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=.?(https?:)?//", page)
    assert "{{" not in page.split("<script")[0]
    assert "<i>x" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert next(iter(data["shown"])) == nasty
    assert len(data["shown"]) == 2
    images = data["shown"][nasty]["images"]
    assert len(images) == 4
    assert all(uri.startswith("data:image/webp;base64,") for uri in images)
    assert len(data["values"]["bicubic"]["psnr"]) == len(data["stems"]) == 4


def test_large_pictures_are_shown_at_full_resolution():
    part = shown.window(800, 300, 4.0)
    assert part == (272 / 800, 22 / 300, 528 / 800, 278 / 300)
    assert shown.cut(np.zeros((3200, 1200, 3)), part).shape == (1024, 1024, 3)
    assert shown.window(100, 100, 4.0) == (0, 0, 1, 1)


def test_results_are_only_reused_for_the_same_signature(tmp_path):
    result = methods.Result(scene(8, 9), seconds=1.5, tiles=3, notes=["x"])
    result.save(tmp_path / "r.png", "s")
    again = methods.Result.saved(tmp_path / "r.png", "s")
    assert (again.pixels == result.pixels).all()
    assert (again.seconds, again.tiles, again.notes) == (1.5, 3, ["x"])
    assert methods.Result.saved(tmp_path / "r.png", "t") is None
    (tmp_path / "r.png").write_bytes((tmp_path / "r.png").read_bytes()[:60])
    assert methods.Result.saved(tmp_path / "r.png", "s") is None


def test_options_are_published_without_folders():
    clean = evaluate.publishable
    assert (
        clean("a=/home/me/b.pth?fidelity=1&color_fix=none") == "a=b.pth?fidelity=1&color_fix=none"
    )
    assert clean(["n=dir/d", "C:\\x\\y.pth"]) == ["n=d", "y.pth"]
    assert (clean("psnr,ssim"), clean(4)) == ("psnr,ssim", 4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 3), (1, 4)])
def test_any_channels_become_rgb(shape):
    pixels = torch.full((*shape, 2, 2), 0.5)
    assert methods.rgb8(pixels).shape == (2, 2, 3)
    assert methods.rgb8(pixels).max() == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ref", "nowhere"], "not a folder"),
        (["--limit", "0"], "--limit"),
        (["--baselines", "nearest"], "bicubic, lanczos"),
        (["--baselines", "none"], "nothing to measure"),
        (["--protocol", "div2k"], "div2k"),
        (["--model", "no.safetensors"], "no.safetensors"),
        (["--results", "bicubic=theirs"], "two methods"),
        (["--show", "p9"], "no such picture"),
        (["--scale", "99"], "scale must be between"),
        (["--tile-sizes", "100000"], "tile must be between"),
        (["--niqe-params", "no.npz"], "not a NIQE parameter file"),
    ],
)
def test_wrong_commands_are_told_in_one_line(pairs, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(pairs)
    places = ["--data", "lr", "--ref", "hr", "--out", "out"]
    assert evaluate.main([*places, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (pairs / "out").exists()


@pytest.mark.skipif(testset.tomllib is None, reason="Python 3.10 without tomli")
def test_the_sets_tell_where_they_are(capsys):
    with pytest.raises(SystemExit) as left:
        evaluate.main(["--sets"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for word in ("3000 pairs", "csjcai/RealSR", "RealSet80", "cswry/SeeSR", "wavelet"):
        assert word in text


def test_spandrel_is_named_where_it_is_missing(pairs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    assert run(pairs, "--spandrel", "x.pth") == 2
    assert "pip install --no-deps spandrel" in capsys.readouterr().err


def test_choice_of_pictures_goes_from_worst_to_best(pairs):
    assert run(pairs) == 0
    page = (pairs / "out" / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    gains = {
        stem: data["values"]["lanczos"]["psnr"][i] - data["values"]["bicubic"]["psnr"][i]
        for i, stem in enumerate(data["stems"])
    }
    assert list(data["shown"]) == [min(gains, key=gains.get), max(gains, key=gains.get)]
    assert all(math.isfinite(g) for g in gains.values())


def test_validation_says_at_once_where_niqe_can_not_be_measured(niqe_file):
    niqe, small, large = (
        Niqe(niqe_file),
        np.zeros((32, 47, 3), np.uint8),
        np.zeros((48, 48, 3), np.uint8),
    )
    Validation([small], [None]).check(4)  # not asked for
    Validation([large], [None], niqe).check(4)
    with pytest.raises(InputError, match="largest to validate on has 188x128: give larger"):
        Validation([small, small], [None, np.zeros((96, 96, 3), np.uint8)], niqe).check(4)
    with pytest.warns(UserWarning, match="measured on 1 of 2 pictures"):
        Validation([small, large], [None, None], niqe).check(4)
