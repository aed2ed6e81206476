"""The loss of stage 1, its prompts and its previews. Numbers in the names are those of the method's list."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import random_network
from stage1 import UNET, VAE_, cut, gradients, pictures, rules, small

from gendr import schedule
from train.checkpointing import recompute_blocks
from train.data.stream import Batch
from train.stage1.networks import Foundation
from train.stage1.previews import Preview
from train.stage1.step import Objective, Sample

# ---- the loss ----


def test_08_a_silent_network_has_a_loss_of_one():
    """E|eps|^2 = 1 per element; and only conv_out has a gradient before it says anything."""
    denoiser, objective = small(rules(lambda_repa=0.0), silent=True, encoder=False)
    values, _ = gradients(denoiser, objective, [pictures(8)])
    elements = 8 * 16 * 4 * 4
    assert float(values["diffusion"]) == pytest.approx(1, abs=5 * math.sqrt(2 / elements))
    speaking = {n for n, p in denoiser.named_parameters() if p.grad is not None and p.grad.any()}
    assert speaking == {"network.unet.conv_out.weight", "network.unet.conv_out.bias"}
    torch.optim.SGD(denoiser.parameters(), lr=0.1).step()
    gradients(denoiser, objective, [pictures(8)])
    assert all(p.grad.any() for n, p in denoiser.named_parameters() if "attn2.to_" not in n)


def test_a_perfect_network_has_no_loss():
    """What is learnt is eps or v of the very z_t that is shown, at the very t."""
    for prediction in ("epsilon", "v_prediction"):
        _, objective = small(rules(prediction=prediction, lambda_repa=0.0), encoder=False)
        sample = objective.sample(pictures())
        seen = []

        def oracle(z_t, t, context, prediction=prediction, sample=sample, seen=seen):
            a, b = schedule.levels(t, z_t)
            eps = (z_t - a * sample.z) / b
            seen.append(float(eps.std()))
            return (eps if prediction == "epsilon" else a * eps - b * sample.z), None

        loss, _ = objective.loss(oracle, sample)
        assert float(loss) < 1e-12
        assert seen[0] == pytest.approx(1, abs=0.1)


def test_timesteps_are_all_of_the_schedule_s():
    _, objective = small(rules(lambda_repa=0.0), encoder=False)
    keys = list(range(8000))
    z = torch.zeros(len(keys), 1, 1, 1, dtype=torch.float64)
    sample = Sample(z, torch.zeros(len(keys), 1, 1).double(), None, keys)
    found = []
    objective.loss(lambda z_t, t, c: (found.append(t) or z_t, None), sample)
    assert int(found[0].min()) == 0
    assert int(found[0].max()) == 999
    counts = torch.histc(found[0].double(), 10, 0, 1000)
    assert float((counts - 800).abs().max()) < 5 * math.sqrt(800)


def test_latents_are_samples_of_the_posterior():
    """Mean and spread over many keys are the posterior's; `mode` is its mean; units are the VAE's."""
    _, objective = small(encoder=False)
    batch = pictures(1)
    mean, logvar = objective.vae.moments(batch.hr)
    many = Batch(batch.hr.expand(4000, -1, -1, -1), None, [""] * 4000, list(range(4000)))
    z, _ = objective.encode(many.hr, many.keys)
    expected = (mean - VAE_.shift_factor) * VAE_.scaling_factor
    spread = (0.5 * logvar).exp() * VAE_.scaling_factor
    assert float((z.mean(0) - expected).abs().div(spread).max()) < 5 / math.sqrt(4000)
    assert float((z.std(0) / spread - 1).abs().max()) < 0.08
    still = Objective(objective.vae, None, objective.prompts, rules(posterior="mode"))
    assert torch.allclose(still.encode(batch.hr, [0])[0], expected, atol=1e-12)
    assert torch.allclose(still.encode(batch.hr, [0])[0], objective.vae.encode(batch.hr))


def test_noise_of_the_posterior_and_of_the_step_are_unrelated():
    """Were they the same numbers, z would give away what is to be told."""
    _, objective = small(encoder=False)
    batch, seen = pictures(16), []
    mean, logvar = objective.vae.moments(batch.hr)
    sample = objective.sample(batch)
    own = (sample.z / VAE_.scaling_factor + VAE_.shift_factor - mean) / (0.5 * logvar).exp()

    def listen(z_t, t, context):
        a, b = schedule.levels(t, z_t)
        seen.append((z_t - a * sample.z) / b)
        return z_t, None

    objective.loss(listen, sample)
    both = torch.stack([own.flatten(), seen[0].flatten()])
    assert float(own.std()) == pytest.approx(1, abs=0.05)
    assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / math.sqrt(own.numel())


def test_09_alignment_pulls_towards_the_encoder():
    """The sign, the weight and the picture: L falls where the cosine rises, by lambda exactly."""
    denoiser, objective = small(rules(lambda_repa=0.5))
    sample = objective.sample(pictures())
    assert sample.features.shape == (4, 4, 16)
    assert torch.equal(sample.features, objective.encoder(pictures().hr).float())
    loss, values = objective.loss(denoiser, sample)
    expected = values["diffusion"] - 0.5 * values["repa_cosine"]
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-9)

    def perfect(z_t, t, context):
        return z_t * 0, sample.features.double()

    assert float(objective.loss(perfect, sample)[1]["repa_cosine"]) == pytest.approx(1, abs=1e-6)
    optimizer = torch.optim.Adam(denoiser.projector.parameters(), lr=1e-2)
    before = float(values["repa_cosine"])
    for _ in range(20):
        optimizer.zero_grad()
        loss, values = objective.loss(denoiser, sample)
        loss.backward()
        optimizer.step()
    assert float(values["repa_cosine"]) > before + 0.2


def test_09_tokens_of_both_sides_lie_in_the_same_order():
    """A picture that is not square: what changes in one place changes in that place's token."""
    denoiser, objective = small()
    count, rows, columns = 8, 4, 6
    g = torch.Generator().manual_seed(8)
    x = torch.rand(count, 3, 16 * rows, 16 * columns, generator=g, dtype=torch.float64) * 2 - 1
    z = torch.randn(count, 16, 2 * rows, 2 * columns, generator=g, dtype=torch.float64)
    context = objective.prompts.embeds["positive"].double().expand(count, -1, -1)
    t = torch.full((count,), 500)

    @torch.no_grad()
    def sides(x, z):
        return objective.encode(x, list(range(count)))[1], denoiser(z, t, context)[1]

    plain = sides(x, z)
    assert plain[0].shape == plain[1].shape == (count, rows * columns, 16)
    for row, column in ((1, 1), (1, 4), (2, 4), (2, 1)):
        y, m = x.clone(), z.clone()
        y[..., row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] *= -1
        m[..., row * 2 : row * 2 + 2, column * 2 : column * 2 + 2] *= -1
        # The UNet's convolutions look around; the encoder's patches do not.
        for found, before, slack in zip(sides(y, m), plain, (0, 1), strict=True):
            at = (found - before).norm(dim=-1).mean(0).argmax().item()
            assert abs(at // columns - row) <= slack
            assert abs(at % columns - column) <= slack


def test_29_accumulation_equals_one_batch():
    for refine in (False, True):
        denoiser, objective = small()
        batch = pictures(4, damaged=True, first=20)
        values, whole = gradients(denoiser, objective, [batch], refine=refine)
        parts_values, parts = gradients(denoiser, objective, cut(batch, 1), refine=refine)
        for a, b in zip(parts, whole, strict=True):
            assert float((a - b).abs().max()) <= 1e-10 * float(b.abs().max().clamp_min(1e-3))
        for name, value in values.items():
            assert float(parts_values[name]) == pytest.approx(float(value), rel=1e-9)


def test_gradient_checkpointing_changes_nothing():
    denoiser, objective = small()
    slim = copy.deepcopy(denoiser)
    recompute_blocks(slim.unet)
    _, expected = gradients(denoiser, objective, [pictures()])
    _, found = gradients(slim, objective, [pictures()])
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * float(b.abs().max() + 1)


def test_halves_are_means_over_their_own_samples():
    values = {"share_high": 0.25, "part_high": 0.2, "part_low": 0.3, "loss": 1.0}
    found = Objective.halves(values)
    assert found == {
        "loss": 1.0, "diffusion_high": pytest.approx(0.8), "diffusion_low": pytest.approx(0.4),
    }  # fmt: skip
    assert "diffusion_high" not in Objective.halves({**values, "share_high": 0.0})


# ---- prompts ----


def test_prompts_are_dropped_as_often_as_asked():
    _, objective = small(rules(drop=0.1), encoder=False)
    objective.encode = lambda x, keys: (None, None)
    embeds = objective.prompts.embeds
    context = objective.sample(pictures(3000, side=1)).context
    empty = (context == embeds["null"]).flatten(1).all(1)
    full = (context == embeds["positive"]).flatten(1).all(1)
    assert bool((empty ^ full).all())
    assert float(empty.float().mean()) == pytest.approx(0.1, abs=0.025)


def test_refinement_shows_the_right_pictures_with_the_right_prompts():
    _, objective = small(encoder=False)
    seen = []
    objective.encode = lambda x, keys: (seen.append(x), None)
    embeds, batch = objective.prompts.embeds, pictures(3000, side=4, damaged=True)
    context = objective.sample(batch, refine=True).context
    which = {n: (context == v).flatten(1).all(1) for n, v in embeds.items()}
    shares = {n: float(w.float().mean()) for n, w in which.items()}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["positive"] == pytest.approx(0.8, abs=0.03)
    assert shares["negative"] == pytest.approx(0.1, abs=0.025)
    assert shares["null"] == pytest.approx(0.1, abs=0.025)
    # The negative prompt stands beside the enlarged damaged copy, all others beside the clean one.
    clean = (seen[0] == batch.hr).flatten(1).all(1)
    assert torch.equal(clean, ~which["negative"])
    damaged = torch.nn.functional.interpolate(batch.lr, scale_factor=4, mode="bicubic")
    assert torch.allclose(seen[0][~clean], damaged.clamp(-1, 1)[~clean])


def test_refinement_follows_the_stream_s_damage():
    """Of pictures the stream decides who is damaged: those whose copy has its steps noted."""
    _, objective = small(encoder=False)
    objective.encode = lambda x, keys: (x, None)
    batch = pictures(4, side=4, damaged=True)._replace(damage=["", "jpeg 40", "", "gauss 3.0"])
    roles = objective.roles(batch)
    assert [role == "negative" for role in roles] == [False, True, False, True]
    with pytest.raises(ValueError, match="refinement needs damaged copies"):
        objective.roles(pictures(2))


def test_quality_terms_are_told_apart_once_they_are_learnt():
    """The number that previews log is above 0 on both sides for a network that knows the terms."""
    denoiser, objective = small(rules(), encoder=False, dtype=torch.float32)
    batch = pictures(2, damaged=True)
    batch = batch._replace(hr=batch.hr.float(), lr=batch.lr.float())
    config = random_network(VAE_, UNET).config
    foundation = Foundation(denoiser, objective.vae, objective.prompts, objective, config, [], None)
    preview = Preview(foundation, batch)
    preview.prepare()
    good, bad = (objective.prompts.embeds[n] for n in ("positive", "negative"))

    def knows(z_t, t, context):
        """Estimates the noise as if the latent were what the prompt says."""
        a, b = schedule.levels(t, z_t)
        z = torch.stack(
            [preview.z[0 if torch.equal(c, good[0]) else 1][n] for n, c in enumerate(context)]
        )
        assert torch.equal(context[0], good[0]) or torch.equal(context[0], bad[0])
        return (z_t - a * z) / b, None

    foundation.denoiser = knows
    values, sheets = preview.look()
    assert not sheets
    assert values["noise"] == pytest.approx(0, abs=1e-6)
    assert values["terms_clean"] > 1e-3
    assert values["terms_damaged"] > 1e-3


def test_autocast_keeps_weights_and_losses_in_float32():
    denoiser, objective = small(rules(), dtype=torch.float32)
    half = copy.deepcopy(denoiser)
    half.dtype = torch.bfloat16
    batch = pictures(2)
    batch = batch._replace(hr=batch.hr.float())
    exact, _ = gradients(denoiser, objective, [batch])
    objective.dtype = torch.bfloat16
    values, found = gradients(half, objective, [batch])
    assert values["loss"].dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in found)
    assert float(values["loss"]) == pytest.approx(float(exact["loss"]), rel=0.05)
    assert float(values["loss"]) != float(exact["loss"])
