"""Training of the small model: start, exact resume, export straight into the loader."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gendr
from gendr.networks.vae import TINY_VAE, VAE
from gendr.schedule import alpha_bar, beta_bar
from train import autoencoder, layers, restorer
from train.data.shards import Pairs
from train.pixels import grid_loss, pixel_loss, psnr
from train.run import DIVERGED_STEPS, Run, TrainingError
from train.tiny.adversary import (
    Discriminator,
    FeatureDiscriminator,
    discriminator_loss,
    feature_matching,
    generator_loss,
)
from train.tiny.networks import tiny_config


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Eight smooth crops with reduced copies, as `train.pairs` writes them."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    rough = torch.from_numpy(rng.random((8, 3, 12, 12)).astype(np.float32))
    hr = nn.functional.interpolate(rough, size=(64, 64), mode="bicubic").clamp(0, 1)
    lr = nn.functional.avg_pool2d(hr, 4)
    for part, picture in (("hr", hr), ("lr", lr), ("teacher", hr)):
        array = (picture * 255).byte().permute(0, 2, 3, 1).numpy()
        np.save(folder / f"pairs-00000.{part}.npy", array)
    return folder


@pytest.fixture(scope="module")
def trained_autoencoder(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "autoencoder"
    autoencoder.main(words(pairs, out, steps=1))
    return out


def words(pairs, out, *, steps: int, **more) -> list[str]:
    options = {"data": pairs, "out": out, "steps": steps, "batch": 1, "crop": 64, **more}
    options = {"warmup": 1, "save-every": 2, "device": "cpu", "precision": "fp32", **options}
    return [str(w) for k, v in options.items() for w in (f"--{k}", v)]


def states(folder) -> dict[str, torch.Tensor]:
    found = torch.load(folder / "state.pt", weights_only=True)
    return found["network"] | {"step": torch.tensor(found["step"])}


def test_resume_equals_uninterrupted(pairs, trained_autoencoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(restorer, "LOOKED_AT", 2)
    options = {"steps": 2, "autoencoder": trained_autoencoder}
    restorer.main(words(pairs, tmp_path / "whole", **options))
    real = Run.steps
    with monkeypatch.context() as patch:
        patch.setattr(
            Run, "steps", lambda run, first, last, images: real(run, first, 1, images=images)
        )
        restorer.main(words(pairs, tmp_path / "parts", **options))
    # What a kill in the middle of writing leaves behind must not matter.
    (tmp_path / "parts" / "state.pt.part").write_bytes(b"cut")
    restorer.main(words(pairs, tmp_path / "parts", **options))
    whole, parts = states(tmp_path / "whole"), states(tmp_path / "parts")
    assert int(whole["step"]) == int(parts["step"]) == 2
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    model = gendr.load(tmp_path / "whole" / "model.safetensors", device="cpu")
    assert model.restore(torch.rand(1, 3, 16, 16), 4).shape == (1, 3, 64, 64)
    assert model.header.training_step == 2
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert any("psnr_to_teacher" in json.loads(line) for line in lines)

    assert restorer.main(words(pairs, tmp_path / "whole", **options, **{"teacher-share": 0.1})) == 1
    assert "another teacher_share" in capsys.readouterr().err


def test_autoencoder_starts_from_principal_components(pairs, trained_autoencoder):
    vae = VAE(TINY_VAE)
    vae.load_state_dict(load_file(trained_autoencoder / "vae.safetensors"))
    vae.requires_grad_(False)
    x = Pairs(pairs).batch(torch.Generator().manual_seed(0), 8, 64)["hr"]
    z = vae.encode(x)
    assert 0.5 < float(z.std()) < 2
    # No linear map to 16 values can be better than the best one for these very patches.
    patches = nn.functional.unfold(x, 8, stride=8).transpose(1, 2).reshape(-1, 192)
    mean = patches.mean(0)
    u, s, v = torch.linalg.svd(patches - mean, full_matrices=False)
    best = psnr((u[:, :16] * s[:16]) @ v[:16] + mean, patches)
    assert best - 0.5 < psnr(vae.decode(z), x) < best + 0.1


def test_a_silent_network_gives_its_latent_back():
    config = tiny_config()
    skip, _ = config.coefficients
    assert skip == pytest.approx(1, abs=1e-12)
    assert config.alpha == pytest.approx(1 / (1 + float(beta_bar(500))))
    assert float(alpha_bar(500)) == pytest.approx(0.52567, abs=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_quick_weight_gradient_is_the_library_s(kernel, stride):
    torch.manual_seed(0)
    mine = layers.Conv2d(6, 10, kernel, stride=stride, padding=kernel // 2).bfloat16()
    theirs = nn.Conv2d(6, 10, kernel, stride=stride, padding=kernel // 2).bfloat16()
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 6, 12, 12).bfloat16()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [conv(i) for conv, i in zip((mine, theirs), inputs, strict=True)]
    assert "_Convolution" in type(outputs[0].grad_fn).__name__
    grad = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(grad)
    pairs = [
        (mine.weight.grad, theirs.weight.grad),
        (mine.bias.grad, theirs.bias.grad),
        (inputs[0].grad, inputs[1].grad),
    ]
    for a, b in pairs:
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 0.01


def test_crops_of_a_pair_belong_together(pairs):
    reader = Pairs(pairs, ("hr", "lr", "teacher"))
    batch = reader.batch(torch.Generator().manual_seed(1), 4, 32)
    assert torch.equal(batch["hr"], batch["teacher"])
    assert batch["lr"].shape == (4, 3, 8, 8)
    assert psnr(nn.functional.avg_pool2d(batch["hr"], 4), batch["lr"]) > 35
    again = reader.batch(torch.Generator().manual_seed(1), 4, 32)
    assert torch.equal(batch["hr"], again["hr"])
    with pytest.raises(ValueError, match="multiple of 4"):
        reader.batch(torch.Generator(), 1, 30)
    with pytest.raises(FileNotFoundError, match=r"train\.pairs"):
        Pairs(pairs.parent)


def test_pixel_loss_sees_edges():
    x = torch.zeros(1, 3, 8, 8)
    assert float(pixel_loss(x + 0.1, x, gradient=1.0)) == pytest.approx(0.1, abs=1e-6)
    step = x.clone()
    step[..., 4:] = 1
    assert float(pixel_loss(step, x, gradient=1.0)) > float(pixel_loss(step, x, gradient=0.0))


def test_grid_loss_sees_a_pattern_of_cells_and_nothing_else():
    target = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    for cell in (4, 8):
        tile = torch.randn(cell, cell, generator=torch.Generator().manual_seed(1))
        tile = tile - tile.mean()
        grid = tile.repeat(128 // cell, 128 // cell)
        # A pattern is measured by its own mean height, whatever the picture below it.
        height = float(tile.abs().mean())
        assert float(grid_loss(target + grid, target)) == pytest.approx(height, 1e-5)
    # A change that is the same at every place of a cell is none: here one step per window of 64 px.
    flat = torch.randn(2, 3, 2, 2).repeat_interleave(64, 2).repeat_interleave(64, 3)
    assert float(grid_loss(target + flat, target)) < 1e-6


def test_divergence_stops_with_its_reason(tmp_path):
    run = Run(tmp_path, {})
    assert run.accept(torch.tensor(1.0))
    assert not run.accept(torch.tensor(float("nan")))
    assert run.skipped == 1
    for _ in range(DIVERGED_STEPS - 2):
        run.accept(torch.tensor(1e9))
    with pytest.raises(TrainingError, match="diverged"):
        run.accept(torch.tensor(1e9))


def test_adversary_pulls_towards_the_target():
    zero = torch.zeros(2, 1, 4, 4)
    assert float(discriminator_loss(zero, zero)) == 1
    assert float(discriminator_loss(zero + 2, zero - 2)) == 0
    logits = zero.clone().requires_grad_()
    generator_loss(logits).backward()
    assert bool((logits.grad < 0).all())


def test_feature_discriminator_learns_to_tell_blur_from_edges():
    torch.manual_seed(0)
    frozen = nn.Conv2d(3, 8, 3, 2, 1).requires_grad_(False)
    judge = FeatureDiscriminator([8], width=8)
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3, betas=(0.5, 0.99))
    for _ in range(80):
        sharp = (torch.rand(4, 3, 8, 8) > 0.5).float().repeat_interleave(4, 2)
        sharp = sharp.repeat_interleave(4, 3) * 2 - 1
        soft = nn.functional.avg_pool2d(sharp, 5, 1, 2)
        real, fake = [frozen(sharp)], [frozen(soft)]
        (real,), (fake,) = judge(real, fake), judge(fake, fake)
        assert real.shape == (4, 1, 8, 8)
        loss = discriminator_loss(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7


def test_features_of_the_discriminator_match_where_pictures_do():
    torch.manual_seed(0)
    judge = Discriminator(8).eval()  # in training every look refines the spectral norms
    x, y = torch.rand(2, 1, 3, 32, 32)
    seen = judge.features(y.requires_grad_(), x)
    assert torch.equal(seen[-1], judge(y, x)[0])
    assert [f.shape[-1] for f in seen] == [16, 8, 4, 4, 4]
    assert float(feature_matching(seen, seen)) == 0
    feature_matching(judge.features(x, x), seen).backward()
    assert float(y.grad.abs().max()) > 0


def test_discriminator_learns_to_tell_blur_from_edges():
    torch.manual_seed(0)
    judge = Discriminator(8)
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3, betas=(0.5, 0.99))
    for _ in range(60):
        sharp = (torch.rand(4, 3, 8, 8) > 0.5).float().repeat_interleave(4, 2)
        sharp = sharp.repeat_interleave(4, 3) * 2 - 1
        soft = nn.functional.avg_pool2d(sharp, 5, 1, 2)
        loss = discriminator_loss(judge(sharp, soft)[0], judge(soft, soft)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5
