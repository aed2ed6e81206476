"""The quality benchmark: what it makes of originals, and that its table says what was measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import quality


@pytest.fixture
def originals(tmp_path):
    folder = tmp_path / "originals"
    folder.mkdir()
    for n, side in enumerate((40, 48, 20)):
        waves = np.add.outer(np.arange(side), np.arange(side) * (n + 1)) * 7 % 256
        Image.fromarray(np.repeat(waves[..., None], 3, -1).astype(np.uint8)).save(
            folder / f"{n}.png"
        )
    return folder


def test_every_kind_of_damage_changes_a_picture_and_always_alike(originals):
    picture = quality.read(originals / "0.png")
    for kind in quality.KINDS[1:]:
        damaged = quality.damaged(picture, kind)
        assert damaged.shape == picture.shape
        assert not np.array_equal(damaged, picture), kind
        assert np.array_equal(damaged, quality.damaged(picture, kind)), kind
    assert quality.damaged(picture, "clean") is picture


def test_a_run_measures_what_it_writes_and_goes_on(originals, tiny_checkpoint, tmp_path, capsys):
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import numpy as np\nNAME = lambda: lambda a, b: float(np.abs(a - b).mean())\n"
    )
    words = ["--out", tmp_path / "out", "--originals", originals, "--least", "40"]
    words += ["--only", "noise 5", "--as", "", "--as", "fidelity=0", "--model", tiny_checkpoint]
    words += ["--alone", f"small={originals}", "--dtype", "fp32", "--judge", f"{judge}:NAME"]
    assert quality.main([*map(str, words)]) == 0
    values = json.loads((tmp_path / "out/scores.json").read_text())
    assert set(values) == {"noise 5 x2", "noise 5 x1", "small"}
    assert set(values["noise 5 x2"]) == {"Lanczos", "as it comes", "fidelity=0"}
    assert set(values["noise 5 x2"]["Lanczos"]) == {"0", "1"}
    assert set(values["small"]["Lanczos"]) == {"0", "1", "2"}
    assert set(values["noise 5 x1"]["as it comes"]["0"]) == {"psnr", "ssim", "sharp", "distance"}
    kept = tmp_path / "out/noise 5 x2/as it comes/0.png"
    assert Image.open(kept).size == (40, 40)
    assert "| noise 5 x2, as it comes |" in (tmp_path / "out/table.md").read_text()
    before = kept.stat().st_mtime_ns
    assert quality.main([*map(str, words)]) == 0
    assert kept.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "out/scores.json").read_text()) == values


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing to measure"),
        (["--pairs", "name=folder"], "is not NAME=FOLDER:ORIGINALS"),
        (["--as", "fidelity=7", "--alone", "a=b"], "fidelity must be between"),
        (["--as", "magic=1", "--alone", "a=b"], "no setting"),
    ],
)
def test_mistakes_are_told(words, told, tiny_checkpoint, tmp_path, capsys):
    assert quality.main(["--out", str(tmp_path), "--model", str(tiny_checkpoint), *words]) == 2
    assert told in capsys.readouterr().err
