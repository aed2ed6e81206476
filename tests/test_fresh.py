"""Pairs made while training goes on, and what a restorer trained on them starts from."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import gendr
from gendr.files import checkpoint
from gendr.resizing import resize
from train import pairs, peers, restorer
from train.run import Run
from train.tiny.fresh import Fresh, Scales, reused, taught
from train.tiny.networks import initial, tiny_config
from train.tiny.perceptual import Perceptual

ALL = Scales.parse("4=.5,2=.2,1-4=.3")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six smooth pictures of several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(6):
        small = Image.fromarray(rng.integers(0, 256, (9, 7 + i, 3), dtype=np.uint8))
        small.resize((90 + 10 * i, 110), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def fresh(pictures, *, scales: Scales = ALL, clean: float = 0.35, seed: int = 0, **more) -> Fresh:
    options = pairs.Options(crop=64, seed=seed, **more)
    return Fresh(pictures, options, scales, clean)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4", "write scale=weight"),
        ("x=1", "write scale=weight"),
        ("0.5-2=1", "at least 1"),
        ("3-2=1", "at least 1"),
        ("4=-1", "at least 0"),
        ("4=0", "above 0"),
    ],
)
def test_scales_that_mean_nothing_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        Scales.parse(text)


def test_scales_come_in_their_shares():
    rng = np.random.default_rng(0)
    drawn = np.array([ALL.draw(rng) for _ in range(4000)])
    assert drawn.min() >= 1
    assert drawn.max() <= 4
    # Five standard deviations of a share near one half are .04.
    assert abs((drawn == 4).mean() - 0.5) < 0.04
    assert abs((drawn == 2).mean() - 0.2) < 0.04
    assert len(np.unique(drawn)) > 1000


@pytest.mark.parametrize("scale", [1, 1.3, 2, 2.75, 3, 4])
def test_the_input_has_been_enlarged_as_restore_enlarges(pictures, scale):
    data = fresh(pictures, scales=Scales.parse(f"{scale}=1"))
    hr, lr, *_ = data.pair(3)
    item = data[3]
    side = round(64 / scale)
    assert lr.shape == (side, side, 3)
    wide = torch.from_numpy(lr).permute(2, 0, 1)[None] / 255
    assert torch.equal(item["input"], 2 * resize(wide, (64, 64))[0] - 1)
    assert torch.equal(item["hr"], torch.from_numpy(hr).permute(2, 0, 1) / 127.5 - 1)


def test_a_clean_pair_at_scale_1_is_its_own_input(pictures):
    item = fresh(pictures, scales=Scales.parse("1=1"), clean=1.0)[0]
    torch.testing.assert_close(item["input"], item["hr"])


def test_a_teacher_shows_damaged_pictures_at_large_scales_only(pictures):
    teacher = peers.Teacher(lambda x: torch.zeros_like(x), digest="")
    for scale, clean, shows in ((4, 0.0, True), (4, 1.0, False), (2, 0.0, False)):
        options = pairs.Options(crop=64)
        scales = Scales.parse(f"{scale}=1")
        item = Fresh(pictures, options, scales, clean, teacher=teacher)[1]
        expected = torch.full((3, 64, 64), -1.0) if shows else item["hr"]
        assert torch.equal(item["teacher"], expected)


def test_a_deferred_teacher_shows_the_same(pictures):
    """Items made now against a batch made later, clean pairs and other scales among them."""
    teacher = peers.Teacher(lambda x: torch.nn.functional.interpolate(x, scale_factor=4), digest="")
    options, scales = pairs.Options(crop=64), Scales.parse("4=.7,2=.3")
    now, later = (
        Fresh(
            pictures, options, scales, 0.3, teacher=None if deferred else teacher, deferred=deferred
        )
        for deferred in (False, True)
    )
    batch = next(later.batches(0, 12))
    assert batch["is_taught"].any()
    assert not batch["is_taught"].all()
    found, expected = taught(batch, teacher), next(now.batches(0, 12))
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_the_clean_share_is_kept(pictures):
    """At scale 1 a clean pair is the only one without damage."""
    data = fresh(pictures, scales=Scales.parse("1=1"), clean=0.5, mix="paper")
    clean = [np.array_equal(*data.pair(i)[:2]) for i in range(60)]
    assert 15 <= sum(clean) <= 45  # four standard deviations of 60 draws


def test_a_pair_depends_on_its_number_alone(pictures):
    first, again = fresh(pictures), fresh(pictures)
    for i in (5, 2):
        a, b = first[i], again[i]
        assert torch.equal(a["hr"], b["hr"])
        assert torch.equal(a["input"], b["input"])
    assert not torch.equal(first[5]["hr"], fresh(pictures, seed=1)[5]["hr"])
    later = next(fresh(pictures).batches(4, 2))
    assert torch.equal(later["hr"][1], first[5]["hr"])


def test_workers_make_the_same_pairs(pictures):
    here, there = (next(fresh(pictures).batches(0, 3, workers=w)) for w in (0, 1))
    assert torch.equal(here["input"], there["input"])


def test_white_paper_stays_white_whatever_the_damage(pictures):
    """Flat crops are there, and the pure ones are pure."""
    data = fresh(pictures, flat=1.0, drawn=0.0, clean=1.0)
    crops = [data.pair(i)[0] for i in range(60)]
    assert any((crop == 255).all() for crop in crops)
    assert any((crop == 0).all() for crop in crops)
    assert all(np.abs(np.diff(crop.astype(int), axis=0)).max() <= 3 for crop in crops)


def words(pictures, out, *, steps: int = 2, **more) -> list[str]:
    options = {"pictures": pictures, "out": out, "steps": steps, "batch": 1, "crop": 64}
    options |= {"warmup": 1, "save-every": 2, "device": "cpu", "teacher-share": 0, **more}
    options = {"precision": "fp32", **options}
    return [str(w) for k, v in options.items() for w in (f"--{k}", v)]


def test_a_run_goes_on_from_the_embedded_model_and_resumes(pictures, tmp_path, monkeypatch):
    """With an adversary on a perceptual network's maps, which must go on as well."""
    monkeypatch.setattr(restorer, "LOOKED_AT", 2)
    stage = torch.nn.Conv2d(3, 6, 3, 2, 1)
    monkeypatch.setattr(restorer, "efficientnet_lite0", lambda: Perceptual([stage]))
    options = {"init": checkpoint.EMBEDDED, "lr": 1e-5, "lr-vae": 1e-5, "perceptual": 0.1}
    options |= {"adversarial": 0.5, "judge": "features", "judge-width": 4, "alone": 1}
    restorer.main(words(pictures, tmp_path / "whole", **options))
    real = Run.steps
    with monkeypatch.context() as patch:
        patch.setattr(
            Run, "steps", lambda run, first, last, images: real(run, first, 1, images=images)
        )
        restorer.main(words(pictures, tmp_path / "parts", **options))
    restorer.main(words(pictures, tmp_path / "parts", **options))
    whole, parts = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts")
    )
    pairs = [(whole["network"], parts["network"])]
    pairs.append([run["adversary_features"]["discriminator"] for run in (whole, parts)])
    for a, b in pairs:
        assert all(torch.equal(a[name], b[name]) for name in a)

    x = torch.rand(1, 3, 16, 16)
    before, after = (
        gendr.load(path, device="cpu").restore(x, 4)
        for path in (None, tmp_path / "whole" / "model.safetensors")
    )
    # Two steps of 1e-5 move no weight by more than 2e-5.
    assert 0 < float((before - after).abs().max()) < 0.1
    line = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[-1])
    assert {"damaged_x4_psnr", "clean_x2_psnr", "clean_x2_latent_std"} <= set(line)


def test_another_structure_is_no_beginning(tmp_path, tiny_checkpoint):
    with pytest.raises(ValueError, match="GenDR-Tiny's structure"):
        initial(tiny_checkpoint, tiny_config(), 0)


def test_pictures_or_shards_not_both(pictures, tmp_path, capsys):
    for more in ({"data": pictures}, {"teacher-share": 0.5}):
        with pytest.raises(SystemExit):
            restorer.main(words(pictures, tmp_path / "run", **more))
    assert "fresh pairs need --teacher" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_judge_of_features_needs_features(pictures, tmp_path, capsys):
    for more in ({}, {"perceptual": 1, "matching": 1}):
        with pytest.raises(SystemExit):
            restorer.main(words(pictures, tmp_path, adversarial=1, judge="features", **more))
    said = capsys.readouterr().err
    assert "give it a weight" in said
    assert "--judge patch" in said


def test_a_pool_draws_its_pairs_turned_and_mirrored_and_forgets_the_oldest():
    """Every picture of a pair lies the same way, and all eight ways come up."""
    base = torch.arange(9.0).reshape(1, 1, 3, 3)
    batches = (
        {"hr": base + 10 * n, "input": base + 10 * n + 0.5, "scale": torch.tensor([n])}
        for n in range(30)
    )
    drawn = list(itertools.islice(reused(batches, reuse=3, held=2, seed=1, first=0), 80))
    for n, batch in enumerate(drawn, 1):
        assert torch.equal(batch["hr"] + 0.5, batch["input"])
        number = int(batch["scale"])
        assert torch.equal(
            batch["hr"].sort().values.flatten().sort().values, 10 * number + torch.arange(9.0)
        )
        # One batch joins at the first step and at every third; two are held.
        assert n // 3 - 1 <= number <= n // 3
    corners = {tuple(int(v) % 10 for v in b["hr"].flatten()[[0, 2]]) for b in drawn}
    assert len(corners) == 8


def test_a_run_that_reuses_its_pairs_uses_each_as_often(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(restorer, "LOOKED_AT", 1)
    made = []
    real = Fresh.pair
    monkeypatch.setattr(Fresh, "pair", lambda self, i: made.append(i) or real(self, i))
    options = {"init": checkpoint.EMBEDDED, "lr": 1e-5, "reuse": 2, "held": 2}
    restorer.main(words(pictures, tmp_path / "run", **options, steps=4))
    # The first step's, and one each at steps 2 and 4; the two looked at come first.
    assert made[2:] == [0, 1, 2]


def test_hours_are_what_a_cosine_by_time_needs(pictures, tmp_path, capsys):
    with pytest.raises(SystemExit):
        restorer.main(words(pictures, tmp_path, schedule="cosine_by_time"))
    assert "needs --hours" in capsys.readouterr().err
