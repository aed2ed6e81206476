"""GenDR-Tiny as its own trainings see it: a new network, an earlier one, and the exported file."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gendr.files import checkpoint
from gendr.files.header import Header
from gendr.networks.onestep import StepConfig, Unfolded
from gendr.networks.unet import TINY_UNET, UNet
from gendr.networks.vae import TINY_VAE, VAE
from gendr.schedule import beta_bar
from train import layers
from train.atomic import replacing

# Tiles of the exported model, pixels. Larger than the crops it is trained on: the autoencoder has
# no normalisation and the UNet's attention is local enough (measured at 256, 512 and 1024).
TILE = 512


def tiny_config() -> StepConfig:
    """GenDR-Tiny: velocity prediction, and the alpha = beta at which a silent network is identity.

    With eps = abar v + bbar z in Eq. 2, v = 0 gives z_g = z (1 - beta bbar) / alpha.
    """
    constant = 1 / (1 + float(beta_bar(500)))
    return StepConfig(
        unet=TINY_UNET,
        vae=TINY_VAE,
        prediction_type="v_prediction",
        alpha=constant,
        beta=constant,
    )


def new_network(config: StepConfig, vae: dict[str, Tensor], seed: int) -> Unfolded:
    """A network whose UNet is silent and whose autoencoder is trained."""
    torch.manual_seed(seed)
    network = Unfolded(
        config,
        VAE(config.vae, operations=layers),
        UNet(config.unet, operations=layers),
        {"positive": torch.randn(1, config.unet.tokens, config.unet.cross_attention_dim)},
    )
    network.vae.load_state_dict(vae)
    nn.init.zeros_(network.unet.conv_out.weight)
    nn.init.zeros_(network.unet.conv_out.bias)
    return network


def initial(path: Path, config: StepConfig, seed: int) -> Unfolded:
    """A network with the weights of a run folder of train.restorer, or of a GenDR checkpoint."""
    if path.is_dir():
        network = new_network(config, VAE(config.vae).state_dict(), seed)
        network.load_state_dict(load_file(path / "network.safetensors"))
        return network
    header, tensors = checkpoint.read(path)
    checkpoint.check_full(header, path, "can't be trained")
    if header.config != config:
        raise ValueError(f"{path} is not of GenDR-Tiny's structure: --init can't go on from it")
    network = checkpoint.unfolded(config, tensors, operations=layers)
    return network.float()


def save_weights(path: Path, module: nn.Module) -> None:
    """A network's weights in float32, as the next stretch of training begins from."""
    tensors = {k: v.detach().float().contiguous().cpu() for k, v in module.state_dict().items()}
    with replacing(path) as part:
        save_file(tensors, part)


def export(path: Path, network: Unfolded, name: str, step: int) -> None:
    """Write what `gendr.load` and Load GenDR take as it is."""
    facts = {
        "tile": TILE,
        "licence": "Apache-2.0",
        "training_step": step,
        "prompts": {"positive": "learned, not made from words"},
    }
    header = Header(config=network.config, name=name, **facts)
    checkpoint.save(path, network, header, dtype="fp16")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context in which a network runs in training: `bf16` or `fp32`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
