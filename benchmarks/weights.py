"""Which model is measured: a file of one's own, the embedded one, or random weights on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gendr.files import checkpoint, stored
from gendr.files.header import Header
from gendr.networks.onestep import StepConfig
from gendr.networks.unet import TINY_UNET, UNet
from gendr.networks.vae import TINY_VAE, VAE
from gendr.schedule import alpha_bar, beta_bar

from .compositions import Plain, has_text_encoder, text_encoder

# Files on the hub are in this dtype; every variant reads the same one and casts as it needs.
STORED = torch.float16
SEED = 0


@dataclass(frozen=True)
class Model:
    """What is measured. file: a full GenDR checkpoint; text: the text encoder, or None.

    own_prompt: whether the text encoder's output is the prompt that the file holds.
    """

    title: str
    config: StepConfig
    tokens: int
    file: Path | None
    text: Path | None = None
    own_prompt: bool = True


def full_config() -> StepConfig:
    """The full-size model. Its constants are the schedule's, so that a scheduler's step can be A's."""
    plain = StepConfig()
    return replace(
        plain, alpha=float(alpha_bar(plain.t_start)), beta=float(beta_bar(plain.t_start))
    )


def choose(name: str, cache: Path | None, *, texts: bool = True) -> Model:
    """The model by name or path. Without a cache folder nothing is written, and only counts work.

    texts: False where nothing runs a text encoder; the prompt is then random, too.
    """
    if name == "full":
        config, title, tokens = full_config(), "full size, random weights", 77
    elif name == "tiny" and not checkpoint.EMBEDDED.exists():
        config = StepConfig(unet=TINY_UNET, vae=TINY_VAE)
        title, tokens = "GenDR-Tiny's shape, random weights", TINY_UNET.tokens
    else:
        return from_file(checkpoint.EMBEDDED if name == "tiny" else Path(name), cache, texts)
    if cache is None:
        return Model(title, config, tokens, None)
    cache.mkdir(parents=True, exist_ok=True)
    text = random_text(cache) if texts and has_text_encoder(config.unet, tokens) else None
    kind = "" if texts else "-no-text"
    file = cache / f"{name}-random{kind}-{SEED}.safetensors"
    if not file.exists():
        state = random_step(config)
        state["embeds.positive"] = prompt(text, config, tokens).to(STORED)
        header = Header(config=config, name=title, licence="none: random")
        write(file, state, header)
    return Model(title, config, tokens, file, text)


def from_file(path: Path, cache: Path | None, texts: bool) -> Model:
    """A checkpoint; its text encoder is not part of it, so A runs a random one for its cost."""
    header, tensors = checkpoint.read(path)
    checkpoint.check_full(header, path, "can't run in plain diffusers as well")
    config, tokens = header.config, tensors["embeds.positive"].shape[1]
    text = None
    if texts and cache is not None and has_text_encoder(config.unet, tokens):
        cache.mkdir(parents=True, exist_ok=True)
        text = random_text(cache)
    return Model(header.name, config, tokens, path, text, own_prompt=False)


def random_text(cache: Path) -> Path:
    """A text encoder with random weights, written once."""
    file = cache / f"text-random-{SEED}.safetensors"
    if not file.exists():
        with torch.device("meta"):
            empty = text_encoder()
        write(file, dict(random_state(empty, "")), None)
    return file


def random_step(config: StepConfig) -> dict[str, Tensor]:
    """UNet and autoencoder with random weights, under the names of a GenDR checkpoint."""
    with torch.device("meta"):
        parts = {"unet.": UNet(config.unet), "vae.": VAE(config.vae)}
    return {k: v for prefix, part in parts.items() for k, v in random_state(part, prefix)}


def random_state(empty: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Torch's own initial distributions, one tensor at a time: no float32 copy of the whole."""
    generator = torch.Generator().manual_seed(SEED)
    shapes = {k: tuple(v.shape) for k, v in empty.state_dict().items()}
    for name, shape in shapes.items():
        weight = shapes.get(name.removesuffix("bias") + "weight", shape)
        if len(weight) == 1:
            tensor = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        elif "embedding.weight" in name:
            tensor = torch.randn(shape, generator=generator) * 0.02
        else:
            bound = torch.Size(weight[1:]).numel() ** -0.5
            tensor = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        yield prefix + name, tensor.to(STORED)


def load_text(file: Path) -> nn.Module:
    """The text encoder in float32."""
    text = text_encoder()
    text.load_state_dict(load_file(file))
    return text.float().requires_grad_(False).eval()


@torch.no_grad()
def prompt(text: Path | None, config: StepConfig, tokens: int) -> Tensor:
    """The prompt's embedding 1 m d: the text encoder's, or random where none fits."""
    if text is None:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(1, tokens, config.unet.cross_attention_dim, generator=generator)
    dtypes = (torch.float32, torch.float32)
    nothing = torch.empty(0)
    run = Plain(config, nn.Identity(), nn.Identity(), nothing, dtypes=dtypes, text=load_text(text))
    run.prompt(nothing)
    return run.context


def write(file: Path, state: dict[str, Tensor], header: Header | None) -> None:
    """One safetensors file, whole or not at all; of a text encoder where there is no header."""
    if header is not None:
        shapes = {name: tensor.shape for name, tensor in state.items()}
        stored.write(file, shapes, state.__getitem__, STORED, header)
        return
    part = file.with_name(f"{file.name}.part")
    save_file(state, part)
    part.replace(file)
