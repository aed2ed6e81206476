"""The losses against closed forms. Numbers in the names are those of the method's list of tests.

The toy: data N(mu_r, s^2), generator N(mu_g, s^2) in three independent dimensions, both scores
optimal. D is then k (mu_r - mu_g) whatever the noise, and every gradient is known.
"""

import math
from itertools import pairwise

import pytest
import torch
from conftest import UNET
from stage2 import distillation as rule
from stage2 import objective, weights

from gendr import schedule
from gendr.networks.onestep import StepConfig
from gendr.networks.unet import UNet
from train import losses
from train.data.stream import Purpose, draw
from train.losses import distillation

S = 0.7
MU_R, MU_G = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, -0.5, 2.0], [0.2, 0.3, -0.4]))
DELTA = MU_R - MU_G
PLAIN = {"reference": "none", "reduction": "sum"}


def rows(x):
    """n 3 -> n 3 1 1, the layout of latents."""
    return x[:, :, None, None]


def gain(a, b):
    """k: how far apart the two optimal scores are, in units of the distance of the means."""
    return b**2 / (a**2 * S**2 + b**2)


def optimal(mu, z_t, a, b):
    """E[z | z_t] where z ~ N(mu, S^2)."""
    return mu + a * S**2 / (a**2 * S**2 + b**2) * (z_t - a * mu)


def toy(count, a=0.8, b=0.6, mu_g=MU_G, seed=0):
    """z_g with a graph, z_h, and both scores of z_t, all n 3 1 1."""
    generator = torch.Generator().manual_seed(seed)
    n, eps = torch.randn(2, count, 3, generator=generator, dtype=torch.float64)
    z_g, z_h = (mu_g + S * n).requires_grad_(), MU_R + S * n
    z_t = schedule.add_noise(z_g, eps, a, b)
    f_real, f_fake = optimal(MU_R, z_t, a, b), optimal(mu_g.detach(), z_t, a, b)
    return z_g, *(rows(x) for x in (f_real, f_fake, z_g, z_h))


def gradient_in_deltas(a, b, **settings):
    """Gradient of the loss at each z_g, in units of DELTA: one number, the same for every sample."""
    z_g, *tensors = toy(64, a, b)
    config = rule(**PLAIN, **settings)
    (grad,) = torch.autograd.grad(distillation(*tensors, config) * len(z_g), z_g)
    ratio = grad / DELTA
    assert (ratio - ratio.mean()).abs().max() < 1e-12
    return ratio.mean().item()


@pytest.mark.parametrize(
    ("t", "a", "b"), [(20, 0.99061, 0.13670), (500, 0.52567, 0.85069), (979, 0.07690, 0.99704)]
)
def test_01_levels_of_the_schedule(t, a, b):
    # Five digits, the last of them rounded; to 1e-6 held by the definition, computed on its own.
    assert float(schedule.alpha_bar(t)) == pytest.approx(a, abs=1e-5)
    assert float(schedule.beta_bar(t)) == pytest.approx(b, abs=1e-5)
    roots = [0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999 for i in range(t + 1)]
    signal = math.prod(1 - x * x for x in roots)
    found = schedule.levels(torch.tensor([t]), torch.zeros(1, dtype=torch.float64))
    assert found[0].item() == pytest.approx(signal**0.5, abs=1e-6)
    assert found[1].item() == pytest.approx((1 - signal) ** 0.5, abs=1e-6)
    assert found[0].shape == (1, 1, 1, 1)


def test_02_one_step_is_exact():
    z, eps = torch.randn(2, 2, 16, 4, 4, dtype=torch.float64)
    assert torch.equal(schedule.x0_from_eps(z, torch.zeros_like(z), 0.5, 0.5), 2 * z)
    assert torch.equal(schedule.x0_from_eps(z, z, 0.5, 0.5), z)
    assert StepConfig().coefficients == (2.0, -1.0)
    for a, b in ((0.8, 0.6), (0.0769, 0.99704)):
        back = schedule.x0_from_eps(schedule.add_noise(z, eps, a, b), eps, a, b)
        assert (back - z).abs().max() < 1e-12


def test_03_conversions_are_inverse():
    z, eps = torch.randn(2, 2, 16, 4, 4, dtype=torch.float64)
    a, b = schedule.levels(torch.tensor([20, 500]), z)
    z_t = schedule.add_noise(z, eps, a, b)
    v = schedule.velocity(z, eps, a, b)
    assert (schedule.eps_from_v(z_t, v, a, b) - eps).abs().max() < 1e-12
    x0 = schedule.x0_from_eps(z_t, schedule.eps_from_v(z_t, v, a, b), a, b)
    assert (x0 - z).abs().max() < 1e-12


def test_08_a_silent_last_layer_starts_at_loss_one():
    torch.manual_seed(0)
    unet = UNet(UNET)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    z, eps = torch.randn(2, 8, 16, 8, 8)
    t, context = torch.randint(0, 1000, (8,)), torch.randn(8, 5, 12)
    a, b = schedule.levels(t, z)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        noise = unet(schedule.add_noise(z, eps, a, b), t, context)
        loss = losses.score_matching(noise, eps, a, b)
        loss.backward()
        return loss.item()

    assert abs(step() - 1) < 5 * math.sqrt(2 / eps.numel())
    for name, p in unet.named_parameters():
        assert bool(p.grad.any()) == name.startswith("conv_out."), name
    optimizer.step()
    step()
    assert all(p.grad.any() for p in unet.parameters())


def test_09_alignment_of_known_features():
    h = torch.randn(2, 12, 8, dtype=torch.float64)
    assert losses.alignment(h, h).item() == pytest.approx(-1, abs=1e-12)
    assert losses.alignment(-h, h).item() == pytest.approx(1, abs=1e-12)
    x, y = torch.zeros_like(h), torch.zeros_like(h)
    x[..., :4], y[..., 4:] = h[..., :4], h[..., 4:]
    assert losses.alignment(x, y).item() == 0
    other = torch.randn_like(h)
    scales = torch.rand(2, 12, 1, dtype=torch.float64) + 0.1
    expected = losses.alignment(h, other).item()
    assert losses.alignment(scales * h, other / scales).item() == pytest.approx(expected, abs=1e-12)


def test_09_alignment_sees_transposed_grids():
    grid = torch.randn(2, 4, 4, 8, dtype=torch.float64)
    tokens, transposed = grid.flatten(1, 2), grid.transpose(1, 2).flatten(1, 2)
    assert losses.alignment(tokens, tokens).item() == pytest.approx(-1, abs=1e-12)
    assert losses.alignment(transposed, tokens).item() > -0.5


def test_09_alignment_refuses_other_grids():
    with pytest.raises(ValueError, match=r"tap the UNet"):
        losses.alignment(torch.zeros(1, 16, 8), torch.zeros(1, 64, 8))


def test_10_difference_of_optimal_scores():
    _, f_real, f_fake, _, _ = toy(100)
    k = gain(0.8, 0.6)
    assert k == pytest.approx(0.5344418, abs=1e-7)
    d = f_real - f_fake
    assert (d - rows((k * DELTA)[None])).abs().max() < 1e-12
    squared = losses.inner(d, d, "sum").item()
    assert squared == pytest.approx(2.0108214, abs=1e-7)
    assert squared == pytest.approx(k**2 * DELTA.square().sum().item(), abs=1e-12)


def test_11_projected_score_identity():
    _, f_real, f_fake, z_g, z_h = (x.detach() for x in toy(400_000))
    per_sample = ((f_real - f_fake) * (f_fake - z_g)).flatten(1).sum(1)
    error = per_sample.std() / math.sqrt(len(per_sample))
    assert per_sample.mean().abs() < 4 * error
    # Hence both forms of SiD have the value of |D|^2.
    sid = distillation(f_real, f_fake, z_g, z_h, rule(**PLAIN, xi=0))
    assert sid.item() == pytest.approx(2.0108214, abs=float(4 * error))


@pytest.mark.parametrize(
    ("levels", "target", "xis", "expected"),
    [
        ((0.8, 0.6), "vsd", (1.0,), -0.5344418),
        ((0.8, 0.6), "sr", (0.0, 0.5, 1.0, 1.2), -0.2856280),
        ((0.8, 0.6), "hr", (0.0, 1.0), 0.2488138),
        ((0.8, 0.6), "hr_st", (0.0, 0.5, 1.0, 1.2), -0.2856280),
        ((0.3, 0.954), "vsd", (1.0,), -0.9537840),
        ((0.3, 0.954), "sr", (0.0, 1.0), -0.9097040),
        ((0.3, 0.954), "hr", (1.0,), 0.0440800),
    ],
)
def test_12_gradients_at_the_toy_mean(levels, target, xis, expected):
    for xi in xis:
        found = gradient_in_deltas(*levels, target=target, xi=xi)
        assert found == pytest.approx(expected, abs=1e-6)


def test_12_the_squared_difference_alone_has_no_gradient():
    z_g, f_real, f_fake, *_ = toy(8)
    d = f_real - f_fake
    (grad,) = torch.autograd.grad(losses.inner(d, d, "sum"), z_g)
    assert grad.abs().max() < 1e-12


def test_12_half_of_it_with_a_detached_fake_score():
    """<D, f_real - z_h> - xi |D|^2 at xi 0.5 with psi detached: -(1-k)^2."""
    k = gain(0.8, 0.6)
    z_g, f_real, f_fake, z, z_h = toy(200_000)
    config = rule(**PLAIN, target="hr", xi=0.5, score_grad="real_only")
    (grad,) = torch.autograd.grad(distillation(f_real, f_fake, z, z_h, config), z_g)
    ratio = (grad.sum(0) / DELTA).mean().item()
    assert ratio == pytest.approx(-((1 - k) ** 2), abs=0.02)


def test_13_noise_form_of_the_difference():
    z_g, f_real, f_fake, *_ = (x.detach() for x in toy(20))
    z_t = schedule.add_noise(z_g, torch.randn_like(z_g), 0.8, 0.6)[:, :, None, None]
    eps_real, eps_fake = ((z_t - 0.8 * f) / 0.6 for f in (f_real, f_fake))
    assert (eps_real - eps_fake + 0.8 / 0.6 * (f_real - f_fake)).abs().max() < 1e-12
    # Eq. 4 follows the difference of noises downhill: towards the data.
    assert ((eps_fake - eps_real)[..., 0, 0] * DELTA > 0).all()


@pytest.mark.parametrize(
    ("settings", "lambda_mse", "low", "high"),
    [
        ({"target": "vsd"}, 0, 0, 1e-8),
        ({"target": "sr"}, 0, 0, 1e-4),
        ({"target": "hr_st"}, 0, 0, 1e-4),
        ({"target": "sr"}, 0.1, 0, 1e-8),
        # The literal Eq. 8 runs away: known, and the reason for the default.
        ({"target": "hr"}, 0, 1e3, math.inf),
    ],
    ids=["vsd", "sid", "hr_st", "default", "literal"],
)
def test_14_descent_of_the_toy_mean(settings, lambda_mse, low, high):
    mu, config = MU_G.clone(), rule(**PLAIN, **settings)
    for step in range(500):
        z_g, f_real, f_fake, z, z_h = toy(1, mu_g=mu, seed=step)
        loss = distillation(f_real, f_fake, z, z_h, config)
        loss = loss + lambda_mse * losses.consistency(z, z_h, "sum")
        mu = mu - 0.1 * torch.autograd.grad(loss, z_g)[0][0]
    assert low <= (mu - MU_R).norm().item() <= high


def four(shape=(3, 4, 2, 2)):
    torch.manual_seed(1)
    return torch.randn(4, *shape, dtype=torch.float64).unbind(0)


def test_18_omega_is_a_constant_and_scales():
    f_real, f_fake, z_g, z_h = four()
    f_real.requires_grad_()
    w = losses.omega(z_h, f_real)
    assert w.shape == (3, 1, 1, 1)
    assert not w.requires_grad
    assert torch.allclose(w.flatten(), 1 / (z_h - f_real).abs().mean((1, 2, 3)))
    assert torch.allclose(losses.omega(3 * z_h, 3 * f_real), w / 3)
    loss = distillation(f_real, f_fake, z_g, z_h, rule())
    tripled = distillation(3 * f_real, 3 * f_fake, 3 * z_g, 3 * z_h, rule())
    assert tripled.item() == pytest.approx(3 * loss.item(), rel=1e-12)
    # With the same weight given from outside the gradient is the same: none went through it.
    found = torch.autograd.grad(loss, f_real)[0]
    given = distillation(f_real, f_fake, z_g, z_h, rule(), w)
    assert torch.equal(found, torch.autograd.grad(given, f_real)[0])


def test_18_omega_of_a_perfect_score_is_finite():
    z = torch.randn(2, 4, 2, 2)
    assert torch.equal(losses.omega(z, z).flatten(), torch.full((2,), 1e5))


@pytest.mark.parametrize("reference", ["hr", "sr", "none"])
def test_18_omega_measures_against_its_reference(reference):
    f_real, f_fake, z_g, z_h = four()
    w = {
        "hr": losses.omega(z_h, f_real),
        "sr": losses.omega(z_g, f_real),
        "none": torch.ones(3, 1, 1, 1, dtype=torch.float64),
    }[reference]
    config = rule(reference=reference)
    found = distillation(f_real, f_fake, z_g, z_h, config)
    assert torch.equal(found, distillation(f_real, f_fake, z_g, z_h, config, w))


@pytest.mark.parametrize(("reduction", "count"), [("mean", 3 * 16), ("sum", 3)])
def test_19_vsd_pseudo_loss(reduction, count):
    f_real, f_fake, z_g, z_h = four()
    leaves = [x.requires_grad_() for x in (z_g, f_real, f_fake)]
    config = rule(target="vsd", reduction=reduction)
    loss = distillation(f_real, f_fake, z_g, z_h, config)
    grad, *scores = torch.autograd.grad(loss, leaves, allow_unused=True)
    expected = losses.omega(z_h, f_real) * (f_fake - f_real) / count
    assert (grad - expected).abs().max() < 1e-12
    assert scores == [None, None]
    assert config.through == ()


def test_20_xi_one_is_the_fake_score_against_z_g():
    f_real, f_fake, z_g, z_h = four()
    w = losses.omega(z_h, f_real)
    found = distillation(f_real, f_fake, z_g, z_h, rule(xi=1))
    expected = (w * (f_real - f_fake) * (f_fake - z_g)).mean()
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(
    ("target", "score_grad"),
    [
        ("sr", "both"),
        ("sr", "real_only"),
        ("sr", "none"),
        ("hr", "both"),
        ("hr", "real_only"),
        ("hr_st", "both"),
        ("hr_st", "none"),
    ],
)
def test_cotangents_are_the_gradients(target, score_grad):
    f_real, f_fake, z_g, z_h = four()
    config = rule(target=target, score_grad=score_grad, xi=0.8)
    found = losses.cotangents(f_real, f_fake, z_g, z_h, config)
    w, d = losses.omega(z_h, f_real) / z_g.numel(), f_real - f_fake
    second = f_real - (z_g if target == "sr" else z_h)
    expected = {
        "real": w * (d + second - 2 * 0.8 * d) if "real" in config.through else None,
        "fake": w * (-second + 2 * 0.8 * d) if "fake" in config.through else None,
        "generated": torch.zeros_like(d) if target == "hr" else -w * d,
    }
    for name, value in expected.items():
        got = getattr(found, name)
        if value is None:
            assert got is None
        else:
            assert (got - value).abs().max() < 1e-12
    assert found.loss.item() == distillation(f_real, f_fake, z_g, z_h, config).item()


def test_reductions_differ_by_the_number_of_elements():
    tensors = four()
    mean = distillation(*tensors, rule())
    total = distillation(*tensors, rule(reduction="sum"))
    assert total.item() == pytest.approx(16 * mean.item(), rel=1e-12)
    _, _, z_g, z_h = tensors
    assert losses.consistency(z_g, z_h).item() == pytest.approx(
        (z_g - z_h).square().mean().item(), rel=1e-12
    )


def test_low_precision_is_left_before_differences_are_taken():
    f_real, f_fake, z_g, z_h = (x.bfloat16() for x in four())
    loss = distillation(f_real, f_fake, z_g, z_h, rule())
    assert loss.dtype == torch.float32
    exact = distillation(*(x.float() for x in (f_real, f_fake, z_g, z_h)), rule())
    assert torch.equal(loss, exact)


def test_settings_without_a_meaning_are_named():
    with pytest.raises(ValueError, match=r"target must be one of vsd, sr, hr, hr_st, not lr"):
        rule(target="lr")
    with pytest.raises(ValueError, match=r"leaves it without a gradient"):
        rule(target="hr", score_grad="none")


def test_score_matching_in_both_weightings():
    eps_hat, eps, z, _ = four()
    a, b = schedule.levels(torch.tensor([20, 500, 979]), z)
    z_t = schedule.add_noise(z, eps, a, b)
    assert losses.score_matching(eps_hat, eps, a, b).item() == pytest.approx(
        (eps_hat - eps).square().mean().item(), rel=1e-12
    )
    literal = losses.score_matching(eps_hat, eps, a, b, weighting="x0").item()
    clean = schedule.x0_from_eps(z_t, eps_hat, a, b)
    assert literal == pytest.approx((clean - z).square().mean().item(), rel=1e-9)
    factors = ((b / a) ** 2).flatten().tolist()
    assert factors[0] == pytest.approx(0.019, abs=5e-4)
    assert factors[2] == pytest.approx(168, abs=0.5)


def test_24_gan_at_zero_logits():
    logits = torch.zeros(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    real = torch.zeros_like(logits)
    assert losses.discriminator([real], [logits]).item() == pytest.approx(1.386294, abs=1e-6)
    loss = losses.adversarial([logits])
    assert loss.item() == pytest.approx(0.693147, abs=1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad + 0.5 / 64).abs().max() < 1e-12
    assert losses.adversarial([logits + 1]).item() < loss.item()


def test_24_signs_of_the_discriminator():
    real = torch.zeros(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    fake = torch.zeros_like(real).requires_grad_()
    grads = torch.autograd.grad(losses.discriminator([real], [fake]), (real, fake))
    assert (grads[0] < 0).all()
    assert (grads[1] > 0).all()


def test_24_heads_of_different_sizes_count_alike():
    maps = [torch.full((1, 1, n, n), x, dtype=torch.float64) for n, x in ((8, 1.0), (2, 3.0))]
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2
    assert losses.adversarial(maps).item() == pytest.approx(expected, abs=1e-12)


def test_28_lambda1_falls_at_step_ten_thousand():
    factors = weights()
    assert (factors.lambda1_at(0), factors.lambda1_at(9_999)) == (10, 10)
    assert (factors.lambda1_at(10_000), factors.lambda1_at(50_000)) == (1, 1)
    one = torch.ones((), dtype=torch.float64)
    for step, lambda1 in ((9_999, 10), (10_000, 1)):
        total = objective(factors, step, cid=one, adv=2 * one, repa=3 * one, mse=4 * one)
        assert total.item() == pytest.approx(lambda1 + 0.02 + 0.3 + 0.4, rel=1e-12)
    assert objective(factors, 0, cid=one).item() == 10


def test_28_timesteps_reach_both_ends():
    t = draw(list(range(20_000)), (1, 1, 1), seed=0, purpose=Purpose.PULL, first=20, last=979).t
    assert (t.min().item(), t.max().item()) == (20, 979)
    assert t.dtype == torch.int64
    # Uniform: no tenth of the range holds more than five standard deviations too many.
    edges = torch.linspace(20, 980, 11)
    for low, high in pairwise(edges):
        share = ((t >= low) & (t < high)).double().mean().item()
        assert share == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 20_000))
