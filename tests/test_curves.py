"""Curves from the logs of runs."""

import json

import pytest
from PIL import Image

from train import curves


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"step": s, "time": 0.0, "loss": float(v)} for s, v in ((1, 4), (2, 2), (3, 9), (3, 1))]
    rows.append({"step": 2, "val_psnr": 20.0, "skipped": None})
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_what_was_logged_twice_counts_once(run):
    assert curves.read(run) == {"loss": ([1, 2, 3], [4.0, 2.0, 1.0]), "val_psnr": ([2], [20.0])}


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert curves.smoothed([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)
    assert curves.smoothed([1.0, 5.0], 0.5) == pytest.approx([1.0, (0.25 + 2.5) / 0.75])
    assert curves.smoothed([1.0, 5.0], 0.0) == [1.0, 5.0]


def test_names_and_mistakes_are_told(run, tmp_path, capsys):
    assert curves.main([str(run)]) == 0
    assert capsys.readouterr().out.split() == ["loss", "val_psnr"]
    out = tmp_path / "x.png"
    assert curves.main([str(run), "--values", "nothing", "--out", str(out)]) == 1
    assert "no run has logged nothing" in capsys.readouterr().err
    assert curves.main([str(tmp_path)]) == 1
    assert "no log.jsonl" in capsys.readouterr().err


def test_a_picture_comes_out(run, tmp_path):
    pytest.importorskip("matplotlib", reason="curves are drawn by matplotlib")
    out = tmp_path / "x.png"
    assert curves.main([str(run), "--values", "loss,val_psnr", "--out", str(out)]) == 0
    assert Image.open(out).size[0] > 400
