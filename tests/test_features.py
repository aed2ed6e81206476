"""DINOv2 as a function, and what meets it. Numbers in the names are those of the method's tests."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import NARROW
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig
from transformers import Dinov2WithRegistersModel as Registers

from gendr.networks.unet import UNet, UNetConfig
from train import losses
from train.checkpointing import recompute_blocks
from train.features import CELL, Aligned, DinoV2, FeaturesError, Projector, tokens

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 28,
    "patch_size": 14,
}
TINY = replace(NARROW, latent_channels=4)


def encoder(dtype=torch.float32, **settings):
    torch.manual_seed(3)
    model = Dinov2Model(Dinov2Config(**{**SMALL, **settings})).to(dtype)
    # As made, the layers hardly speak (LayerScale) and positions have no influence worth seeing.
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    return DinoV2(model)


@pytest.fixture(scope="module")
def dino():
    return encoder()


def aligned(width=16, dtype=torch.float32):
    torch.manual_seed(4)
    return Aligned(UNet(TINY), Projector(8, width, hidden=12)).to(dtype)


def test_09_grids_of_512_pixels_are_32_by_32(dino):
    network = aligned().requires_grad_(False)
    with torch.no_grad():
        target = dino(torch.rand(1, 3, 512, 512) * 2 - 1)
        out, found = network(torch.randn(1, 4, 64, 64), 500, torch.randn(1, 3, 6))
    assert out.shape == (1, 4, 64, 64)
    assert target.shape == found.shape == (1, 32 * 32, 16)


def test_09_a_token_is_where_its_pixels_are(dino):
    """Row by row on both sides: a change in one place moves the token of that place most."""
    rows, columns = 3, 5
    x = torch.rand(1, 3, rows * CELL, columns * CELL) * 2 - 1
    z = torch.randn(1, 8, rows, columns)
    for row in range(rows):
        for column in range(columns):
            y, m = x.clone(), z.clone()
            y[..., row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] *= -1
            m[..., row, column] *= -1
            seen = (dino(y) - dino(x)).norm(dim=-1)[0]
            made = (tokens(m) - tokens(z)).norm(dim=-1)[0]
            assert seen.argmax().item() == made.argmax().item() == row * columns + column


def test_09_transposing_the_tokens_changes_the_loss(dino):
    x = torch.linspace(-1, 1, 64)[None, None, :, None].expand(1, 3, 64, 64) + 0.1 * torch.randn(
        1, 3, 64, 64
    )
    target = dino(x.clamp(-1, 1))
    grid = target.unflatten(1, (4, 4))
    assert losses.alignment(target, target).item() == pytest.approx(-1, abs=1e-6)
    assert losses.alignment(grid.transpose(1, 2).flatten(1, 2), target).item() > -0.99


def test_pictures_are_normalised_as_the_encoder_expects():
    """[-1, 1] becomes ImageNet's normalisation of [0, 1], at 7/8 of the side."""
    seen = []
    dino = encoder()
    dino.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    colour = torch.tensor([0.2, 0.5, 0.9])
    dino((2 * colour - 1)[None, :, None, None].expand(2, 3, 64, 32))
    assert seen[0].shape == (2, 3, 56, 28)
    expected = (colour - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(seen[0], expected[None, :, None, None].expand_as(seen[0]), atol=1e-5)


def test_the_encoder_is_frozen_and_stays_in_evaluation_mode():
    dino = encoder(torch.bfloat16, hidden_dropout_prob=0.5)
    holder = torch.nn.ModuleList([dino]).train()
    assert not any(m.training for m in holder[0].modules())
    assert not any(p.requires_grad for p in dino.parameters())
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    first, second = dino(x), dino(x)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert dino.width == 16


def test_class_token_and_registers_are_dropped():
    torch.manual_seed(3)
    model = Registers(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4))
    dino, x = DinoV2(model), torch.rand(1, 3, 32, 48)
    seen = []
    model.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state))
    found = dino(x)
    assert seen[0].shape == (1, 1 + 4 + 6, 16)
    assert torch.equal(found, seen[0][:, 5:])


def test_sizes_and_encoders_that_do_not_fit_are_named(dino):
    with pytest.raises(ValueError, match=r"multiples of 16 pixels for REPA, not 32x40"):
        dino(torch.rand(1, 3, 32, 40))
    with pytest.raises(ValueError, match=r"patches of 16 pixels, expected 14"):
        encoder(patch_size=16, image_size=32)
    one = UNet(UNetConfig(**{**TINY.__dict__, "block_out_channels": (8,), "attention": (True,)}))
    with pytest.raises(ValueError, match=r"one level has none"):
        Aligned(one, Projector(8, 16))


def test_an_encoder_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(FeaturesError, match=r"can't be loaded from .*nowhere.*give its folder"):
        DinoV2.load(str(tmp_path / "nowhere"), local_files_only=True)


def test_a_saved_encoder_is_loaded_from_its_folder(dino, tmp_path):
    dino.model.save_pretrained(tmp_path)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(DinoV2.load(str(tmp_path), local_files_only=True)(x), dino(x))


def test_projector_has_the_published_size():
    with torch.device("meta"):
        projector = Projector(320, 768)
    assert sum(p.numel() for p in projector.parameters()) == 6_427_392
    small = Projector(4, 4, hidden=6)
    assert not any(p.any() for n, p in small.named_parameters() if n.endswith("bias"))
    assert all(p.any() for n, p in small.named_parameters() if n.endswith("weight"))


def test_the_tap_is_behind_the_first_downsampler():
    network, expected = aligned(dtype=torch.float64), []
    z, context = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 3, 6).double()
    last = network.unet.down_blocks[0].downsamplers[0]
    last.register_forward_hook(lambda *args: expected.append(args[2]))
    out, found = network(z, 500, context)
    assert torch.equal(out, network.unet(z, 500, context))
    assert torch.equal(found, network.projector(tokens(expected[0])))
    assert found.shape == (2, 16, 16)
    assert sorted({n.split(".")[0] for n in network.state_dict()}) == ["projector", "unet"]


def test_the_tap_survives_gradient_checkpointing_and_copies():
    network = aligned(dtype=torch.float64)
    z, context = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 3, 6).double()
    target = torch.randn(1, 16, 16).double()

    def gradients(network):
        _, found = network(z, 500, context)
        wanted = [network.projector[0].weight, network.unet.conv_in.weight]
        return torch.autograd.grad(losses.alignment(found, target), wanted)

    expected = gradients(network)
    twin = copy.deepcopy(network)
    recompute_blocks(twin.unet)
    with torch.no_grad():
        network.unet.conv_in.weight.zero_()
    for found, value in zip(gradients(twin), expected, strict=True):
        assert (found - value).abs().max() < 1e-12
        assert value.abs().max() > 0


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_files_of_torch_hub_give_the_same_features(tmp_path, registers, gated):
    """The authors' names, made from transformers' own by the inverse of the published conversion."""
    options = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 28,
        "patch_size": 14, "use_swiglu_ffn": gated,
    }  # fmt: skip
    torch.manual_seed(4)
    if registers:
        config = Dinov2WithRegistersConfig(**options, num_register_tokens=registers)
        model = Registers(config)
    else:
        model = Dinov2Model(Dinov2Config(**options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path / "published")
    state, theirs = load_file(tmp_path / "published" / "model.safetensors"), {}
    for name, tensor in state.items():
        name = name.replace("encoder.layer.", "blocks.").replace(
            "embeddings.patch_embeddings.projection", "patch_embed.proj"
        )
        name = name.replace("embeddings.position_embeddings", "pos_embed").replace(
            "embeddings.", ""
        )
        name = name.replace("layernorm.", "norm.").replace("attention.output.dense", "attn.proj")
        name = name.replace("layer_scale1.lambda1", "ls1.gamma").replace(
            "layer_scale2.lambda1", "ls2.gamma"
        )
        name = name.replace("weights_in", "w12").replace("weights_out", "w3")
        if ".attention.attention.query." in name:
            parts = [state[k] for k in (
                name.replace("blocks.", "encoder.layer.").replace("query", part) for part in ("query", "key", "value")
            )]  # fmt: skip
            theirs[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
        elif ".attention.attention." not in name:
            theirs[name] = tensor
    assert theirs["blocks.1.attn.qkv.weight"].shape == (192, 64)
    assert ("blocks.0.mlp.w12.weight" if gated else "blocks.0.mlp.fc1.weight") in theirs
    torch.save(theirs, tmp_path / "dinov2_vitx14_pretrain.pth")
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    found = DinoV2.load(str(tmp_path / "dinov2_vitx14_pretrain.pth"))
    assert torch.equal(found(picture), DinoV2(model)(picture))


def test_another_pickle_is_no_encoder(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(FeaturesError, match=r"other\.pth is no DINOv2 of torch\.hub's"):
        DinoV2.load(str(tmp_path / "other.pth"))
