"""Model files: round trips, foreign layouts, and errors that a person can act on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import UNET, VAE_, header, random_network
from safetensors.torch import load_file, save_file

import gendr
from gendr import CheckpointError
from gendr.files import checkpoint, layouts
from gendr.files.shapes import unet_config, vae_config
from gendr.networks.onestep import OneStep, StepConfig, Unfolded, fold
from gendr.networks.unet import SD21, SD21_16, UNet, UNetConfig
from gendr.networks.vae import SD_VAE, TINY_VAE, VAE, VAE16, VAEConfig

X = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
# Without patches, as Stable Diffusion's own: what foreign layouts can express.
FOREIGN_VAE = VAEConfig(
    block_out_channels=(32, 64), layers_per_block=1, scaling_factor=0.5, norm_num_groups=32
)
FOREIGN_UNET = UNetConfig(
    block_out_channels=(64, 128),
    attention=(True, False),
    cross_attention_dim=24,
    layers_per_block=2,
)


def foreign() -> Unfolded:
    return random_network(FOREIGN_VAE, FOREIGN_UNET, prompts=("positive", "negative", "null"))


def saved(tmp_path, network, name="model.safetensors", **facts):
    path = tmp_path / name
    checkpoint.save(path, network, header(network, **facts), dtype="fp32")
    return path


def result(path, **options) -> torch.Tensor:
    return gendr.load(path, device="cpu", dtype="fp32", **options).restore(X, 2)


def inverse(table: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


def test_round_trip_is_bit_equal(tmp_path):
    network = random_network(prompts=("positive", "negative", "null"))
    path = saved(tmp_path, network, guidance=1.0, training_step=7)
    state = gendr.load(path, device="cpu", dtype="fp32", fold=False).network.state_dict()
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    facts = gendr.describe(path)
    assert facts["training_step"] == 7
    assert facts["sha256"] == checkpoint.digest(network.state_dict())
    assert StepConfig.from_dict(facts["config"]) == network.config
    assert not list(tmp_path.glob("*.part"))


def test_folded_export_runs_the_same(tmp_path):
    network = random_network()
    full = saved(tmp_path, network)
    quick = saved(tmp_path, fold(network), "folded.safetensors")
    assert gendr.describe(quick)["format"] == "gendr-folded"
    assert torch.allclose(result(full), result(quick), atol=1e-6)
    with pytest.raises(CheckpointError, match="folded into one step"):
        gendr.load(quick, fold=False)


def test_folded_and_unfolded_give_the_same_picture(tiny_checkpoint):
    assert torch.allclose(result(tiny_checkpoint), result(tiny_checkpoint, fold=False), atol=1e-4)


def test_half_precision_file_folds_without_rounding_twice(tmp_path):
    network = random_network()
    path = tmp_path / "half.safetensors"
    checkpoint.save(path, network, header(network), dtype="fp16")
    a, b = (
        gendr.load(path, device="cpu", dtype="fp32", fold=f).restore(X, 2, color_fix="none")
        for f in (True, False)
    )
    assert float((a - b).norm() / b.norm()) <= 1e-5


def test_loading_does_not_copy_twice(tiny_checkpoint):
    network = gendr.load(tiny_checkpoint, device="cpu", dtype="fp32").network
    assert isinstance(network, OneStep)
    assert not any(p.is_meta or p.requires_grad for p in network.parameters())


def write_folder(folder, network) -> None:
    for part, name in (("unet", "unet"), ("vae", "vae")):
        (folder / part).mkdir(parents=True)
        state = getattr(network, name).state_dict()
        save_file(state, folder / part / "diffusion_pytorch_model.safetensors")
    config = {"scaling_factor": network.config.vae.scaling_factor, "shift_factor": None}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    save_file({k: v.data for k, v in network.embeds.items()}, folder / "embeds.safetensors")


def test_diffusers_folder(tmp_path):
    network = foreign()
    write_folder(tmp_path / "folder", network)
    assert torch.equal(result(tmp_path / "folder"), result(saved(tmp_path, network)))


@pytest.mark.parametrize("prefix", ["", "unet.", "module.", "_orig_mod.", "generator.module."])
def test_bare_unet_with_a_base(tmp_path, prefix):
    network = foreign()
    base = saved(tmp_path, network)
    other = foreign()
    other.unet.conv_out.weight.mul_(1.5)
    state = {f"{prefix}{k}": v for k, v in other.unet.state_dict().items()}
    save_file(state, tmp_path / "unet.safetensors")
    expected = result(saved(tmp_path, other, "other.safetensors"))
    assert torch.equal(result(tmp_path / "unet.safetensors", base=base), expected)
    with pytest.raises(CheckpointError, match=r"a UNet on its own.*base"):
        gendr.load(tmp_path / "unet.safetensors")


def test_pickled_ema_dictionary_is_read_as_tensors_only(tmp_path):
    network = foreign()
    base = saved(tmp_path, network)
    torch.save({"ema": network.unet.state_dict(), "step": 3}, tmp_path / "model.pt")
    assert torch.equal(result(tmp_path / "model.pt", base=base), result(base))


def test_a_pickle_with_code_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"state_dict": Bomb()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="not executed") as error:
        gendr.load(tmp_path / "evil.ckpt")
    assert "\x1b" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_ldm_names_of_the_unet(tmp_path):
    network = foreign()
    base = saved(tmp_path, network)
    table = inverse(layouts.ldm_unet_table(FOREIGN_UNET))
    state = layouts.rename(network.unet.state_dict(), table)
    assert "input_blocks.1.0.in_layers.2.weight" in state
    assert not any(k.startswith(("down_blocks", "mid_block", "up_blocks")) for k in state)
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in state.items()}, tmp_path / "ldm.safetensors"
    )
    assert torch.equal(result(tmp_path / "ldm.safetensors", base=base), result(base))


def test_ldm_names_of_the_autoencoder():
    network = foreign()
    table = inverse(layouts.ldm_vae_table(FOREIGN_VAE))
    short = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
    state = {}
    for name, tensor in layouts.rename(network.vae.state_dict(), table).items():
        if ".attn_1." in name:
            stem, rest = name.split(".attn_1.")
            module, kind = rest.rsplit(".", 1)
            if kind == "weight" and tensor.dim() == 2:
                tensor = tensor[:, :, None, None]
            name = f"{stem}.attn_1.{short[module]}.{kind}"
        state[name.replace("conv_shortcut", "nin_shortcut")] = tensor
    assert vae_config(state) == replace(FOREIGN_VAE, scaling_factor=VAEConfig().scaling_factor)
    back = layouts.vae(state, FOREIGN_VAE)
    assert back.keys() == network.vae.state_dict().keys()
    assert all(torch.equal(v, back[k]) for k, v in network.vae.state_dict().items())


def test_every_full_size_tensor_has_an_ldm_name():
    """Names as in Stable Diffusion 2.1's published single file."""
    with torch.device("meta"):
        unet, vae = UNet(SD21), VAE(SD_VAE)
    state = layouts.rename(unet.state_dict(), inverse(layouts.ldm_unet_table(SD21)))
    for name in (
        "time_embed.2.bias",
        "input_blocks.3.0.op.weight",
        "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight",
        "input_blocks.10.0.emb_layers.1.weight",
        "middle_block.2.out_layers.3.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.11.1.proj_out.weight",
        "output_blocks.3.0.skip_connection.weight",
        "out.2.weight",
    ):
        assert name in state
    assert unet_config(state, ldm=True) == SD21
    assert layouts.ldm_unet(state, SD21).keys() == unet.state_dict().keys()
    names = layouts.rename(vae.state_dict(), inverse(layouts.ldm_vae_table(SD_VAE)))
    for name in (
        "encoder.down.2.downsample.conv.weight",
        "decoder.up.3.block.2.conv2.weight",
        "decoder.up.1.upsample.conv.weight",
        "encoder.mid.block_2.norm1.weight",
        "decoder.norm_out.weight",
    ):
        assert name in names


@pytest.mark.parametrize("config", [SD21_16, SD21, FOREIGN_UNET])
def test_unet_shape_is_read_from_the_tensors(config):
    with torch.device("meta"):
        assert unet_config(UNet(config).state_dict()) == config


@pytest.mark.parametrize("config", [VAE16, SD_VAE])
def test_vae_shape_is_read_from_the_tensors(config):
    with torch.device("meta"):
        assert vae_config(VAE(config).state_dict()) == config


def test_lora_is_merged_as_peft_would(tmp_path):
    network = foreign()
    base = saved(tmp_path, network)
    lora, changed = {}, foreign()
    generator = torch.Generator().manual_seed(2)
    for module in ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in"):
        weight = network.unet.state_dict()[f"{module}.weight"]
        a = torch.randn(4, *weight.shape[1:], generator=generator) * 0.1
        b = torch.randn(weight.shape[0], 4, *[1] * (weight.dim() - 2), generator=generator) * 0.1
        lora[f"base_model.model.{module}.lora_A.weight"] = a
        lora[f"base_model.model.{module}.lora_B.weight"] = b
        delta = 2.0 * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
        changed.unet.state_dict()[f"{module}.weight"].add_(delta)
    path = tmp_path / "lora.safetensors"
    save_file(lora, path)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        gendr.load(path, base=base)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}')
    expected = result(saved(tmp_path, changed, "changed.safetensors"))
    assert torch.allclose(result(path, base=base), expected, atol=1e-6)


def test_lora_of_another_base_is_named(tmp_path):
    base = saved(tmp_path, foreign())
    lora = {
        "conv_in.lora_A.weight": torch.zeros(4, 8, 3, 3),
        "conv_in.lora_B.weight": torch.zeros(9, 4, 1, 1),
    }
    save_file(lora, tmp_path / "lora.safetensors", metadata={"lora_alpha": "8"})
    with pytest.raises(CheckpointError, match="another base"):
        gendr.load(tmp_path / "lora.safetensors", base=base)


def sd15() -> dict[str, torch.Tensor]:
    config = replace(FOREIGN_UNET, latent_channels=4, cross_attention_dim=768)
    return UNet(config).state_dict()


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: p.write_bytes(b""), "empty"),
        (
            lambda p: p.write_bytes(b"<html>not found</html>" * 9),
            "is a web page: the download went wrong",
        ),
        (lambda p: p.write_bytes(b"something else" * 9), "not a whole safetensors"),
        (lambda p: save_file(sd15(), p), "SD1.5 UNet with 4 latent channels; GenDR needs"),
        (
            lambda p: save_file(
                {"body.0.weight": torch.zeros(1), "conv_first.weight": torch.zeros(1)}, p
            ),
            "ESRGAN",
        ),
        (lambda p: save_file(VAE(FOREIGN_VAE).state_dict(), p), "autoencoder"),
        (lambda p: save_file({"x": torch.zeros(1)}, p), "unknown kind"),
    ],
)
def test_wrong_files_get_a_sentence(tmp_path, write, words):
    path = tmp_path / "file.safetensors"
    write(path)
    with pytest.raises(CheckpointError, match=words):
        gendr.load(path, device="cpu")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model file"):
        gendr.load(tmp_path / "none.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="not a diffusers folder"):
        gendr.load(tmp_path / "folder")


def test_cut_file(tmp_path, tiny_checkpoint):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(tiny_checkpoint.read_bytes()[:-1000])
    for fn in (gendr.load, gendr.describe):
        with pytest.raises(CheckpointError, match="get it again"):
            fn(path)


def test_missing_and_damaged_tensors(tmp_path, tiny_checkpoint):
    path = tmp_path / "changed.safetensors"
    state = load_file(tiny_checkpoint)
    metadata = {"gendr": json.dumps(gendr.describe(tiny_checkpoint))}
    broken = dict(state)
    del broken["unet.conv_norm_out.weight"]
    save_file(broken, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"incomplete.*conv_norm_out"):
        gendr.load(path, device="cpu")
    state["vae.decoder.conv_in.weight"][0, 0] = float("nan")
    save_file(state, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"vae.decoder.conv_in.weight holds NaN"):
        gendr.load(path, device="cpu")


def test_newer_formats_are_refused(tmp_path, tiny_checkpoint):
    facts = {**gendr.describe(tiny_checkpoint), "version": 99}
    path = tmp_path / "new.safetensors"
    save_file(load_file(tiny_checkpoint), path, metadata={"gendr": json.dumps(facts)})
    with pytest.raises(CheckpointError, match="update it"):
        gendr.load(path)


def test_four_channel_variant_runs(tmp_path):
    vae = replace(VAE_, latent_channels=4)
    network = random_network(vae, replace(UNET, latent_channels=4))
    assert result(saved(tmp_path, network)).shape == (1, 3, 48, 48)


def test_tiny_layout_round_trip(tmp_path):
    network = random_network(TINY_VAE, UNET)
    path = saved(tmp_path, network)
    assert torch.equal(result(path), result(path))
