"""Public weights in our networks, made here by diffusers and read from disk: no network is used."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import random_network
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from gendr.files import checkpoint, layouts
from train.stage1 import pretrained
from train.stage1.pretrained import PretrainedError


def tiny_unet(**changes):
    torch.manual_seed(1)
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 12,
        "use_linear_projection": True,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**settings, **changes})


def tiny_vae(**changes):
    torch.manual_seed(2)
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 16,
        "norm_num_groups": 4,
        "scaling_factor": 0.3,
        "shift_factor": 0.1,
    }
    return AutoencoderKL(**{**settings, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in diffusers' layout, as the mirrors of SD2.1 are."""
    folder = tmp_path_factory.mktemp("sd")
    tiny_unet().save_pretrained(folder / "unet")
    tiny_vae(latent_channels=4, scaling_factor=0.18215, shift_factor=None).save_pretrained(
        folder / "vae"
    )
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
    ).save_pretrained(folder / "scheduler")
    return folder


def same(a, b):
    return float((a - b).abs().max() / b.abs().max()) < 1e-5


@torch.no_grad()
def test_a_unet_of_diffusers_gives_the_same_output(folder):
    part = pretrained.read_unet(str(folder))
    assert part.prediction == "v_prediction"
    assert part.config.head_dim == 8
    assert part.config.norm_num_groups == 8
    ours = pretrained.new_unet(part, 4, 0)
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet")
    z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 12)
    assert same(ours(z, 300, context), theirs(z, 300, context).sample)
    # The folder of the UNet alone is taken as well, and facts hold no path of this machine.
    alone = pretrained.read_unet(str(folder / "unet"))
    assert alone.prediction is None
    assert alone.facts["id"] == "unet"
    assert all(torch.equal(alone.state[k], v) for k, v in part.state.items())


@torch.no_grad()
def test_moving_to_16_channels_keeps_all_but_the_ends(folder):
    part = pretrained.read_unet(str(folder))
    unet = pretrained.new_unet(part, 16, 3)
    state = unet.state_dict()
    ends = ("conv_in.", "conv_out.")
    assert all(torch.equal(state[k], v) for k, v in part.state.items() if not k.startswith(ends))
    assert state["conv_in.weight"].shape == (16, 16, 3, 3)
    assert not state["conv_out.weight"].any()
    assert not state["conv_out.bias"].any()
    bound = 1 / (16 * 9) ** 0.5
    assert 0.9 * bound < float(state["conv_in.weight"].abs().max()) <= bound
    torch.manual_seed(99)
    again, other = (pretrained.new_unet(part, 16, seed).state_dict() for seed in (3, 4))
    assert torch.equal(again["conv_in.weight"], state["conv_in.weight"])
    assert not torch.equal(other["conv_in.weight"], state["conv_in.weight"])
    out = unet(torch.randn(1, 16, 8, 8), 300, torch.randn(1, 3, 12))
    assert not out.any()


@torch.no_grad()
@pytest.mark.parametrize("inside", [True, False])
def test_a_vae_comes_with_its_own_scaling(tmp_path, inside):
    theirs = tiny_vae()
    theirs.save_pretrained(tmp_path / "vae" if inside else tmp_path)
    part = pretrained.read_vae(str(tmp_path))
    assert (part.config.scaling_factor, part.config.shift_factor) == (0.3, 0.1)
    ours = pretrained.new_vae(part)
    assert not any(p.requires_grad for p in ours.parameters())
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    mode = theirs.encode(x).latent_dist.mode()
    z = ours.encode(x)
    assert same(z, (mode - 0.1) * 0.3)
    assert same(ours.decode(z), theirs.decode(mode).sample)
    values = json.loads((tmp_path / ("vae" if inside else "") / "config.json").read_text())
    del values["scaling_factor"]
    (tmp_path / ("vae" if inside else "") / "config.json").write_text(json.dumps(values))
    with pytest.raises(PretrainedError, match="gives no scaling_factor"):
        pretrained.read_vae(str(tmp_path))


def test_single_files_under_ldm_names(tmp_path, folder):
    part = pretrained.read_unet(str(folder / "unet"))
    table = {new: old for old, new in layouts.ldm_unet_table(part.config).items()}
    renamed = {
        layouts.LDM_UNET + k: v.contiguous() for k, v in layouts.rename(part.state, table).items()
    }
    save_file(renamed, tmp_path / "sd.safetensors")
    read = pretrained.read_unet(str(tmp_path / "sd.safetensors"))
    assert set(read.state) == set(part.state)
    assert all(torch.equal(read.state[k], v) for k, v in part.state.items())


def test_gendr_checkpoints_are_sources_too(tiny_checkpoint, tmp_path):
    part, vae = (
        pretrained.read_unet(str(tiny_checkpoint)),
        pretrained.read_vae(str(tiny_checkpoint)),
    )
    network = random_network(prompts=("positive", "negative"))
    assert part.config == network.config.unet
    assert vae.config == network.config.vae
    assert part.prediction == "epsilon"
    unet = pretrained.new_unet(part, 16, 0).state_dict()
    assert all(torch.equal(unet[k], v) for k, v in network.unet.state_dict().items())
    own = pretrained.new_vae(vae).state_dict()
    assert all(torch.equal(own[k], v) for k, v in network.vae.state_dict().items())
    assert part.facts["revision"] == checkpoint.describe(tiny_checkpoint)["sha256"]


def test_what_does_not_fit_is_a_sentence(folder, tmp_path, monkeypatch):
    with pytest.raises(PretrainedError, match=r"there is no .*nowhere: name a folder"):
        pretrained.read_unet(str(tmp_path / "nowhere"))
    import huggingface_hub

    def offline(*args, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand more")

    # Both ways to the hub; the library itself would try for 23 s.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    with pytest.raises(
        PretrainedError, match=r"^somebody/model can't be fetched .*hf download"
    ) as e:
        pretrained.read_unet("somebody/model")
    assert "\n" not in str(e.value)

    tiny_unet(cross_attention_dim=768).save_pretrained(tmp_path / "sd15" / "unet")
    with pytest.raises(checkpoint.CheckpointError, match=r"SD1\.5 UNet with 4 latent channels"):
        pretrained.read_unet(str(tmp_path / "sd15"))
    tiny_unet(use_linear_projection=False).save_pretrained(tmp_path / "conv" / "unet")
    with pytest.raises(PretrainedError, match=r"not built as SD2\.1 is"):
        pretrained.read_unet(str(tmp_path / "conv"))
    with pytest.raises(PretrainedError, match="AutoencoderKL, not a UNet"):
        pretrained.read_unet(str(folder / "vae"))
    (tmp_path / "empty" / "unet").mkdir(parents=True)
    with pytest.raises(PretrainedError, match=r"config\.json is missing"):
        pretrained.read_unet(str(tmp_path / "empty"))
    part = pretrained.read_unet(str(folder))
    del part.state["mid_block.resnets.0.conv1.weight"]
    with pytest.raises(PretrainedError, match="is incomplete: 1 tensors"):
        pretrained.new_unet(part, 16, 0)
    part = pretrained.read_vae(str(folder))
    part.config = replace(part.config, layers_per_block=3)
    with pytest.raises(PretrainedError, match="of another shape than ostris/vae-kl-f8-d16"):
        pretrained.new_vae(part)


def test_another_noise_schedule_is_refused(folder, tmp_path):
    tiny_unet().save_pretrained(tmp_path / "unet")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(PretrainedError, match="another noise schedule"):
        pretrained.read_unet(str(tmp_path))


def test_latents_of_four_channels_have_the_scale_that_diffusers_assumes(folder, tmp_path):
    """SD2.1's own vae/config.json names none."""
    shutil.copytree(folder, tmp_path / "sd")
    path = tmp_path / "sd" / "vae" / "config.json"
    values = json.loads(path.read_text())
    del values["scaling_factor"]
    path.write_text(json.dumps(values))
    assert pretrained.read_vae(str(tmp_path / "sd")).config.scaling_factor == 0.18215
    assert AutoencoderKL.from_pretrained(tmp_path / "sd" / "vae").config.scaling_factor == 0.18215


def test_weights_in_shards_are_one_network(folder, tmp_path):
    tiny_unet().save_pretrained(tmp_path / "unet", max_shard_size="30KB")
    names = sorted(p.name for p in (tmp_path / "unet").glob("*.safetensors"))
    assert len(names) > 1
    assert names[0].startswith("diffusion_pytorch_model-00001-of-")
    expected = pretrained.read_unet(str(folder)).state
    found = pretrained.read_unet(str(tmp_path)).state
    assert set(found) == set(expected)
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    (tmp_path / "unet" / names[-1]).unlink()
    with pytest.raises(PretrainedError, match=f"lacks {names[-1]}"):
        pretrained.read_unet(str(tmp_path))


@pytest.mark.parametrize(
    "weights",
    [
        ["unet/diffusion_pytorch_model.fp16.safetensors"],
        ["unet/diffusion_pytorch_model.bin"],
        [
            "unet/diffusion_pytorch_model.safetensors.index.json",
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        ],
        ["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"],
    ],
)
def test_of_the_hub_only_the_best_form_of_the_weights_is_fetched(folder, monkeypatch, weights):
    import fnmatch

    import huggingface_hub

    there = ["unet/config.json", "scheduler/scheduler_config.json", "unet/flax_model.msgpack"]
    asked = []

    def fetch(source, *, allow_patterns, **options):
        asked.extend(
            n for n in there + weights if any(fnmatch.fnmatch(n, p) for p in allow_patterns)
        )
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *a, **o: there + weights)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    pretrained.read_unet("somebody/model")
    wanted = weights if "index" in weights[0] else weights[:1]
    assert set(asked) == {*there[:2], *wanted}
