"""What is known of each public restorer: its keys, counts, scaling and constants. No network is built."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import gendr
from gendr import CheckpointError, cli
from gendr.files import base, checkpoint, sources
from gendr.networks.onestep import StepConfig

RANK = 4


def adapters(count: int, ending: str = "", *, prefix: str = "") -> dict[str, torch.Tensor]:
    """peft's tensors of so many modules, as small as they can be."""
    tensors = {}
    for n in range(count):
        tensors[f"{prefix}m{n}.lora_A{ending}.weight"] = torch.ones(RANK, 2)
        tensors[f"{prefix}m{n}.lora_B{ending}.weight"] = torch.ones(2, RANK)
    return tensors


def pisa(folder, unet=258):
    state = {}
    for which in ("pix", "sem"):
        state |= adapters(unet, f".default_encoder_{which}")
    ranks = {"lora_rank_unet_pix": RANK, "lora_rank_unet_sem": RANK}
    torch.save({"state_dict_unet": state, **ranks}, folder / "a.pkl")
    return folder / "a.pkl"


def osediff(folder, unet=258, vae=32):
    whole = {"conv_in.base_layer.weight": torch.ones(1), "conv_in.base_layer.bias": torch.ones(1)}
    saved = {
        "state_dict_unet": adapters(unet, ".default_encoder") | whole,
        "state_dict_vae": adapters(vae, ".default_encoder"),
        "rank_unet": RANK,
        "rank_vae": RANK,
    }
    torch.save(saved, folder / "a.pkl")
    return folder / "a.pkl"


def hypir(folder, unet=257):
    torch.save(adapters(unet, ".default"), folder / "a.pkl")
    return folder / "a.pkl"


def omgsr(folder, unet=194, vae=31, alpha=2 * RANK):
    for name, count in (("unet_lora_adapter", unet), ("vae_encoder_lora_adapter", vae)):
        place = folder / "a" / name
        place.mkdir(parents=True)
        save_file(adapters(count, prefix="base_model.model."), place / "adapter_model.safetensors")
        settings = {"lora_alpha": alpha, "r": RANK}
        (place / "adapter_config.json").write_text(json.dumps(settings))
    return folder / "a"


@pytest.mark.parametrize(
    ("make", "name", "scaling"),
    [
        (pisa, "PiSA-SR", 2),
        (osediff, "OSEDiff", 2),
        (hypir, "HYPIR", 1),
        (omgsr, "OMGSR-S", 2),
    ],
)
def test_a_file_is_known_by_its_keys_and_its_adapters_are_scaled_as_published(
    make, name, scaling, tmp_path
):
    source = sources.read(make(tmp_path))
    assert source.restorer.name == name
    pairs = [
        p for part in (source.unet, source.vae) for m in part.pairs.values() for p in m.values()
    ]
    assert {pair.scaling for pair in pairs} == {scaling}


@pytest.mark.parametrize(
    ("make", "fewer", "words"),
    [
        (pisa, {"unet": 257}, "changes 257 modules of the UNet, the published one 258"),
        (osediff, {"unet": 257}, "changes 257 modules of the UNet, the published one 258"),
        (osediff, {"vae": 31}, "changes 31 modules of the autoencoder, the published one 32"),
        (hypir, {"unet": 256}, "changes 256 modules of the UNet, the published one 257"),
        (omgsr, {"unet": 193}, "changes 193 modules of the UNet, the published one 194"),
        (omgsr, {"vae": 30}, "changes 30 modules of the autoencoder, the published one 31"),
    ],
)
def test_another_number_of_modules_is_refused_with_the_number(make, fewer, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        sources.read(make(tmp_path, **fewer))


# skip and out of z_g = skip z_l + out F(z_l), from the tables of each one's own inference.
@pytest.mark.parametrize(
    ("restorer", "t_start", "skip", "out"),
    [
        (sources.PISA, 1, 1, -1),
        (sources.OSEDIFF, 999, 14.649, -14.615),
        (sources.HYPIR, 200, 1.152, -0.572),
        (sources.OMGSR, 273, 1.254, -0.757),
    ],
)
def test_the_constants_of_one_step(restorer, t_start, skip, out):
    config = StepConfig(**restorer.constants())
    assert config.t_start == t_start
    assert config.prediction_type == "epsilon"
    assert config.coefficients == pytest.approx((skip, out), abs=1e-3)


@pytest.mark.parametrize(
    ("restorer", "tile", "color_fix", "precision"),
    [
        (sources.PISA, 768, "adain", None),
        (sources.OSEDIFF, 768, "adain", "fp16"),
        (sources.HYPIR, 512, "wavelet", None),
        (sources.OMGSR, 512, "adain", None),
    ],
)
def test_the_hints_of_each(restorer, tile, color_fix, precision):
    found = (restorer.tile, restorer.color_fix, restorer.precision, restorer.min_side)
    assert found == (tile, color_fix, precision, 512)


@pytest.mark.parametrize("inner", ["unet_lora_adapter", "vae_encoder_lora_adapter"])
def test_one_folder_of_two_says_which_to_give(inner, tmp_path):
    whole = omgsr(tmp_path)
    for path in (whole / inner, whole / inner / "adapter_model.safetensors"):
        with pytest.raises(
            CheckpointError, match=r"one part of OMGSR-S: give the folder a to gendr"
        ):
            sources.read(path)


def test_a_hypir_file_given_as_a_lora_says_what_to_do(tmp_path):
    """Its scaling stands nowhere, so it can't be merged into a base as other LoRAs are."""
    with pytest.raises(CheckpointError, match="this is a HYPIR adapter, not yet a model"):
        gendr.load(hypir(tmp_path), base=checkpoint.EMBEDDED)


def test_a_gendr_file_is_neither_source_nor_base(tmp_path):
    ours = checkpoint.EMBEDDED
    with pytest.raises(CheckpointError, match="is a GenDR file already"):
        sources.read(ours)
    with pytest.raises(CheckpointError, match="is a GenDR file, not a whole Stable Diffusion"):
        base.read(ours)


def test_a_folder_that_is_no_restorer_is_said(tmp_path):
    (tmp_path / "unet").mkdir()
    with pytest.raises(CheckpointError, match=r"is none of the models .* get one of them"):
        sources.read(tmp_path)


@pytest.mark.parametrize("taken", ["source", "base"])
def test_a_file_is_not_written_over_what_is_read(taken, tmp_path, capsys):
    names = {"source": "other.safetensors", "base": "other.safetensors"} | {taken: "o.safetensors"}
    (tmp_path / "o.safetensors").write_text("mine")
    words = ["convert", names["source"], "--base", names["base"], "-o", "o.safetensors"]
    with pytest.raises(SystemExit):
        cli.main([str(tmp_path / w) if "." in w else w for w in words] + ["--overwrite"])
    assert "is what is read: choose another name" in capsys.readouterr().err
    assert (tmp_path / "o.safetensors").read_text() == "mine"


def test_a_name_with_spaces_can_be_copied_from_the_advice(tmp_path):
    path = pisa(tmp_path).rename(tmp_path / "pisa sr.pkl")
    advice = gendr.describe(path)["kind"]
    assert 'gendr convert "pisa sr.pkl" --base SD21_FOLDER -o "pisa sr-gendr.safetensors"' in advice


def test_another_lora_of_peft_is_not_taken_for_hypir(tmp_path):
    assert sources.name_of(hypir(tmp_path)) == "HYPIR"
    assert sources.name_of(hypir(tmp_path, unet=3)) is None


def test_the_advice_is_english(tmp_path):
    assert "this is an OSEDiff adapter" in gendr.describe(osediff(tmp_path))["kind"]
