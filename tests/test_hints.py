"""What a model's file asks for where the person leaves it open, and a prompt of one's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import header, random_network
from torch import Tensor

import gendr
from gendr import CheckpointError, Settings, devices
from gendr.files import checkpoint
from gendr.networks.onestep import Unfolded
from gendr.resizing import resize

PROMPTS = ("positive", "negative")


@pytest.fixture
def picture() -> Tensor:
    return torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(1))


def hinting(tiny, **facts):
    """The tiny model with these facts in its header."""
    tiny.header = replace(tiny.header, **facts)
    return tiny


# ---- the smallest side ----


def test_a_small_result_is_computed_larger_and_reduced(tiny, picture):
    exact = {"color_fix": "none", "tile": 256}
    expected = resize(tiny.restore(picture, long_side=168, **exact), (40, 56))
    result, report = hinting(tiny, min_side=120).restore_with_report(picture, 2, **exact)
    assert report.plan.work_size == (120, 168)
    assert "computed at 168x120" in str(report)
    assert torch.allclose(result, expected, atol=1e-6)


def test_a_result_that_is_large_enough_is_computed_as_it_is(tiny, picture):
    expected = tiny.restore(picture, 3)
    assert torch.equal(hinting(tiny, min_side=60).restore(picture, 3), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 3), (17, 23)])
@pytest.mark.parametrize("seamless", [False, True])
def test_the_size_stays_exact_whatever_the_model_wants(tiny, size, seamless):
    model = hinting(tiny, min_side=96)
    image = torch.rand(1, 4, *size)
    result, report = model.restore_with_report(image, 1.5, seamless=seamless)
    assert result.shape[-2:] == Settings(scale=1.5).target_size(*size)
    assert bool(torch.isfinite(result).all())
    assert max(report.plan.work_size) <= 4 * 96


# ---- the colour fix ----


@pytest.mark.parametrize(
    ("named", "used"), [("adain", "adain"), ("none", "none"), (None, "wavelet")]
)
def test_the_colour_fix_on_auto_is_the_models(tiny, picture, named, used):
    expected = tiny.restore(picture, 2, color_fix=used)
    assert torch.equal(hinting(tiny, color_fix=named).restore(picture, 2), expected)


def test_a_colour_fix_that_was_chosen_is_kept(tiny, picture):
    expected = tiny.restore(picture, 2, color_fix="lab")
    model = hinting(tiny, color_fix="adain")
    assert torch.equal(model.restore(picture, 2, color_fix="lab"), expected)


# ---- the precision ----

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "requested", "model", "usual", "name", "vae"),
    [
        (CUDA, "auto", None, "auto", "bf16", torch.bfloat16),
        (CUDA, "auto", "fp16", "auto", "fp16", torch.float32),
        (CUDA, "auto", "fp16", "bf16", "fp16", torch.float32),
        (CUDA, "auto", "fp16", "fp32", "fp32", torch.float32),
        (CUDA, "auto", "fp32", "bf16", "fp32", torch.float32),
        (CUDA, "auto", None, "fp16", "fp16", torch.bfloat16),
        (CUDA, "bf16", "fp16", "auto", "bf16", torch.bfloat16),
        (CPU, "auto", "fp16", "auto", "fp32", torch.float32),
    ],
)
def test_auto_takes_the_dtype_that_the_model_bears(
    device, requested, model, usual, name, vae, monkeypatch
):
    monkeypatch.setattr(devices, "probe", lambda device, name: (True, 3.0))
    chosen = devices.choose_precision(device, requested, model=model, usual=usual)
    assert (chosen.name, chosen.vae) == (name, vae)


def test_a_file_that_names_a_precision_is_loaded_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "probe", lambda device, name: (True, 3.0))
    network = random_network()
    for precision, name in ((None, "bf16"), ("fp16", "fp32")):
        path = tmp_path / f"{name}.safetensors"
        checkpoint.save(path, network, header(network, precision=precision), dtype="fp32")
        assert gendr.load(path, device="cpu").precision.name == name


# ---- a prompt ----


def with_prompt(embedding):
    """The same random network whose fixed prompt is this one, unfolded."""
    network = random_network(prompts=PROMPTS)
    embeds = {**{k: v.data for k, v in network.embeds.items()}, "positive": embedding}
    return Unfolded(network.config, network.vae, network.unet, embeds).eval()


@pytest.fixture
def embedding() -> Tensor:
    return torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5, 15])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_prompt_of_any_length_stands_in_for_the_fixed_one(tiny, tokens, guidance):
    embedding = torch.randn(1, tokens, 12)
    z = torch.randn(2, tiny.network.config.unet.latent_channels, 8, 8)
    folded = tiny.network.step(z, guidance=guidance, prompt=tiny.prompt(embedding, CPU))
    unfolded, scale = random_network(prompts=PROMPTS), tiny.network.config.vae.scaling_factor
    expected = unfolded.step(z * scale, guidance=guidance, prompt=embedding) / scale
    assert torch.allclose(folded, expected, atol=1e-4)
    if tokens == 5:
        fixed = with_prompt(embedding).step(z * scale, guidance=guidance) / scale
        assert torch.allclose(expected, fixed, atol=1e-5)


def test_the_models_own_prompt_given_is_the_same_bit_for_bit(tiny, picture):
    own = random_network(prompts=PROMPTS).embeds["positive"].data
    result, report = tiny.restore_with_report(picture, 2, prompt=own)
    assert torch.equal(result, tiny.restore(picture, 2))
    assert "prompt: 5 tokens instead of the model's own" in str(report)


def test_another_prompt_changes_the_result_and_nothing_after_it(tiny, picture, embedding):
    before = tiny.restore(picture, 2)
    other = tiny.restore(picture, 2, prompt=embedding)
    assert float((other - before).abs().max()) > 1e-3
    assert torch.equal(tiny.restore(picture, 2), before)
    assert torch.equal(tiny.restore(picture, 2, prompt=embedding), other)


def test_a_prompt_is_used_in_tiles_as_well(tiny, picture, embedding):
    tiles = tiny.restore(picture, 4, prompt=embedding, tile=64)
    assert torch.equal(tiles, tiny.restore(picture, 4, prompt=embedding, tile=64))
    assert float((tiles - tiny.restore(picture, 4, tile=64)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (torch.zeros(1, 77, 768), r"is \(1, 77, 768\), Random reads \(1, n, 12\)"),
        (torch.zeros(77, 12), r"is \(77, 12\)"),
        (torch.zeros(2, 77, 12), r"is \(2, 77, 12\)"),
        (torch.full((1, 77, 12), torch.nan), "holds NaN"),
    ],
)
def test_a_prompt_of_another_encoder_is_refused(tiny, picture, prompt, words):
    with pytest.raises(ValueError, match=words):
        tiny.restore(picture, 2, prompt=prompt)


def test_a_folded_export_holds_its_own_prompt_alone(tiny, picture, embedding, tmp_path):
    checkpoint.save(tmp_path / "f.safetensors", tiny.network, tiny.header, dtype="fp32")
    folded = gendr.load(tmp_path / "f.safetensors", device="cpu", dtype="fp32")
    with pytest.raises(ValueError, match="Random can't take a prompt: this is a folded export"):
        folded.restore(picture, 2, prompt=embedding)


# ---- what is not a model yet ----


def test_an_adapter_of_a_public_restorer_is_named_with_what_to_do(tmp_path):
    saved = {"lora_rank_unet_pix": 4, "lora_rank_unet_sem": 4, "state_dict_unet": {}}
    torch.save(saved, tmp_path / "one.pkl")
    words = r"this is a PiSA-SR adapter, not yet a model: gendr convert one\.pkl --base"
    with pytest.raises(CheckpointError, match=words):
        gendr.load(tmp_path / "one.pkl")
    assert "PiSA-SR adapter" in gendr.describe(tmp_path / "one.pkl")["kind"]
