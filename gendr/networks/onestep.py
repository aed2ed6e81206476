"""One step of GenDR as a network: encode, z_g = skip z_l + out F(z_l), decode.

`Unfolded` keeps timestep and prompt free. `OneStep` is the same map with everything folded in that
one step makes constant: timestep embeddings become biases, the prompt's keys and values constants;
the encoder yields the mean alone; scales and Eq. 2 sit in the first and last convolution; nearest
2x + 3x3 is computed by parity kernels. Section 1.6 of the method.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..schedule import Prediction, one_step
from .blocks import Unset
from .unet import (
    SD21_16,
    ConstantAttention,
    KeysValues,
    UNet,
    UNetConfig,
    timestep_embedding,
)
from .vae import VAE, VAE16, Decoder, Encoder, VAEConfig

# A prompt that a caller brings: an embedding 1 m d, or what a folded network made of one.
Prompt = Tensor | KeysValues


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Everything that defines one step: both networks and the constants of Eq. 2.

    alpha, beta: the constants of Eq. 2, not the schedule's values at `t_start`.
    """

    unet: UNetConfig = field(default=SD21_16)
    vae: VAEConfig = field(default=VAE16)
    t_start: int = 500
    alpha: float = 0.5
    beta: float = 0.5
    prediction_type: Prediction = "epsilon"

    def __post_init__(self) -> None:
        if self.unet.latent_channels != self.vae.latent_channels:
            raise ValueError(
                f"the UNet works on {self.unet.latent_channels} latent channels, the autoencoder "
                f"on {self.vae.latent_channels}: they don't belong together"
            )

    @property
    def coefficients(self) -> tuple[float, float]:
        """(skip, out) of z_g = skip z_l + out F(z_l)."""
        return one_step(self.alpha, self.beta, self.prediction_type, self.t_start)

    @property
    def multiple(self) -> int:
        """Sides of pictures must be multiples of this many pixels."""
        return self.vae.factor * self.unet.multiple

    def as_dict(self) -> dict[str, Any]:
        """Plain values as JSON has them, for a file's header."""

        def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {k: list(v) if isinstance(v, tuple) else v for k, v in items}

        return asdict(self, dict_factory=plain)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StepConfig:
        """The inverse of `as_dict`. Unknown names are an error: they would change the result."""
        return cls(
            **{
                **values,
                "unet": UNetConfig(**values["unet"]),
                "vae": VAEConfig(**values["vae"]),
            }
        )


class Step(nn.Module):
    """What both forms share. Latents here are what `encode` yields, in the form's own units.

    compute: dtypes of the autoencoder and of the UNet; None = whatever the input has.
    """

    config: StepConfig

    def __init__(self) -> None:
        super().__init__()
        self.compute: tuple[torch.dtype | None, torch.dtype | None] = (None, None)

    @property
    def prompts(self) -> int:
        """How many prompts the network holds: 1, or 2 with the negative one."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Picture b 3 h w in [-1, 1] -> latent b c h/f w/f."""
        raise NotImplementedError

    def predict(self, z: Tensor, prompts: int | Prompt) -> Tensor:
        """out * F(z), of a batch that holds `prompts` prompts one after another, or of another one."""
        raise NotImplementedError

    def prompt(self, embedding: Tensor) -> Prompt:
        """A prompt 1 m d, any m, in the form that `predict` takes it instead of the fixed one.

        ValueError for a network that keeps no way from prompts to keys and values.
        """
        raise NotImplementedError

    def negative(self) -> Prompt:
        """The fixed negative prompt in that form."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Latent b c h w -> picture b 3 fh fw, about [-1, 1]."""
        raise NotImplementedError

    def step(
        self,
        z: Tensor,
        *,
        detail: float = 1.0,
        guidance: float = 1.0,
        prompt: Prompt | None = None,
    ) -> Tensor:
        """z_l -> z_g, Eq. 2; `detail` moves linearly from z_l (0) to z_g (1) and beyond.

        guidance above 1: F = F_negative + guidance (F_positive - F_negative), in one batch of two.
        prompt: instead of the fixed positive one, see `Step.prompt`.
        """
        if detail == 0:
            return z
        skip, _ = self.config.coefficients
        work = z.to(self.compute[1] or z.dtype)
        if guidance == 1:
            out = self.predict(work, 1 if prompt is None else prompt).to(z.dtype)
        elif prompt is not None:
            # One after the other: prompts of different lengths don't fit into one batch.
            positive, negative = (
                self.predict(work, p).to(z.dtype) for p in (prompt, self.negative())
            )
            out = negative + guidance * (positive - negative)
        else:
            positive, negative = self.predict(torch.cat([work, work]), 2).to(z.dtype).chunk(2)
            out = negative + guidance * (positive - negative)
        # With skip = 1 + (skip - 1) the input's share never passes through the network.
        return z + detail * ((skip - 1) * z + out)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """Picture b 3 h w in [-1, 1] -> restored picture of the same shape and range.

        options: of `step`.
        """
        return self.decode(self.step(self.encode(x), **options))


class Unfolded(Step):
    """UNet, autoencoder and prompt embeddings as they are trained; any timestep, any prompt.

    embeds: `positive`, and optionally `negative` and `null`, each 1 m d.
    """

    def __init__(self, config: StepConfig, vae: VAE, unet: UNet, embeds: dict[str, Tensor]):
        super().__init__()
        self.config, self.vae, self.unet = config, vae, unet
        self.embeds = nn.ParameterDict(
            {k: nn.Parameter(v, requires_grad=False) for k, v in embeds.items()}
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the prompts that one step uses, in order."""
        return prompt_names(self.embeds.keys())

    @property
    def prompts(self) -> int:
        return len(self.names)

    def encode(self, x: Tensor) -> Tensor:
        return self.vae.encode(x.to(self.compute[0] or x.dtype)).to(x.dtype)

    def predict(self, z: Tensor, prompts: int | Prompt) -> Tensor:
        if isinstance(prompts, int):
            context = torch.cat([self.embeds[n] for n in self.names[:prompts]]).to(z)
        else:
            context, prompts = prompts.to(z), 1
        context = context.repeat_interleave(z.shape[0] // prompts, 0)
        return self.config.coefficients[1] * self.unet(z, self.config.t_start, context)

    def prompt(self, embedding: Tensor) -> Tensor:
        return embedding

    def negative(self) -> Tensor:
        return self.embeds[self.names[1]]

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z.to(self.compute[0] or z.dtype)).to(z.dtype)


class OneStep(Step):
    """The folded network. Latents are in the autoencoder's units with its shift removed.

    projections: see `prompt_projections`; no parameters, because a run without another prompt needs
    none of them.
    """

    projections: KeysValues | None = None

    def __init__(self, config: StepConfig, *, operations: Any = nn):
        """config: of the folded network, see `folded_config`."""
        super().__init__()
        self.config = config
        c = config.vae.latent_channels
        self.encoder = Encoder(config.vae, c, operations=operations)
        self.unet = UNet(config.unet, operations=operations)
        self.post_quant_conv = operations.Conv2d(c, c, 1) if config.vae.quant_conv else None
        self.decoder = Decoder(config.vae, phases=True, operations=operations)

    @property
    def prompts(self) -> int:
        return self.config.unet.prompts

    def encode(self, x: Tensor) -> Tensor:
        mean = self.encoder(x.to(self.compute[0] or x.dtype)).to(x.dtype)
        return mean - (self.config.vae.shift_factor or 0.0)

    def predict(self, z: Tensor, prompts: int | Prompt) -> Tensor:
        return self.unet(z, None, prompts)

    def prompt(self, embedding: Tensor) -> KeysValues:
        if self.projections is None:
            raise ValueError(
                "this is a folded export, which holds its own prompt alone: use the checkpoint it "
                "was made from, or give no prompt"
            )
        return {
            place: (project(embedding, key), project(embedding, value))
            for place, (key, value) in self.projections.items()
        }

    def negative(self) -> KeysValues:
        layers = (m for m in self.unet.modules() if isinstance(m, ConstantAttention))
        return {layer.place: (layer.key[1:2], layer.value[1:2]) for layer in layers}

    def latent_in(self, z: Tensor) -> Tensor:
        """What the decoder itself starts from."""
        z = (z + (self.config.vae.shift_factor or 0.0)).to(self.compute[0] or z.dtype)
        return z if self.post_quant_conv is None else self.post_quant_conv(z)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.latent_in(z)).to(z.dtype)


def prompt_names(available: Any) -> tuple[str, ...]:
    """Prompts of one step in order: positive, then what guidance moves away from."""
    names = [n for n in ("negative", "null") if n in available]
    return ("positive", *names[:1])


def folded_config(config: StepConfig, prompts: int, tokens: int) -> StepConfig:
    """The configuration of a folded network that holds `prompts` prompts of `tokens` tokens."""
    unet = replace(config.unet, prompts=prompts, tokens=tokens, phases=True)
    return replace(config, unet=unet)


@torch.no_grad()
def fold_state(
    config: StepConfig, unet: dict[str, Tensor], vae: dict[str, Tensor], embeds: dict[str, Tensor]
) -> tuple[StepConfig, dict[str, Tensor]]:
    """Fold the constants of one step into tensors: (configuration, state of `OneStep`).

    unet, vae: state dicts of `UNet` and `VAE`. Sums are taken in float64 and returned in float32
    at least, whatever they were made of; tensors that folding leaves alone are passed on as they are.
    """
    names = prompt_names(embeds)
    context = torch.cat([embeds[n] for n in names]).double()
    folded = folded_config(config, len(names), context.shape[1])
    scale = config.vae.scaling_factor
    state: dict[str, Tensor] = {}

    def linear(x: Tensor, name: str) -> Tensor:
        bias = unet.get(f"{name}.bias")
        return F.linear(x, unet[f"{name}.weight"].double(), None if bias is None else bias.double())

    t = torch.tensor([config.t_start])
    sinusoids = timestep_embedding(t, config.unet.block_out_channels[0]).double()
    temb = F.silu(linear(sinusoids, "time_embedding.linear_1"))
    temb = F.silu(linear(temb, "time_embedding.linear_2"))
    for name, tensor in unet.items():
        if name.startswith("time_embedding.") or ".time_emb_proj." in name:
            continue
        if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")):
            stem, which = name.rsplit(".", 2)[0], {"to_k": "key", "to_v": "value"}
            state[f"unet.{stem}.{which[name.split('.')[-2]]}"] = project(context, tensor)
            continue
        if name.endswith(".conv1.bias"):
            block = name.removesuffix(".conv1.bias")
            shift = linear(temb, f"{block}.time_emb_proj")[0]
            tensor = (tensor.double() + shift).to(_at_least_float32(tensor))
        elif name == "conv_in.weight":
            tensor = (tensor.double() * scale).to(_at_least_float32(tensor))
        elif name in ("conv_out.weight", "conv_out.bias"):
            factor = config.coefficients[1] / scale
            tensor = (tensor.double() * factor).to(_at_least_float32(tensor))
        state[f"unet.{name}"] = tensor

    channels = config.vae.latent_channels
    for name, tensor in vae.items():
        if name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
            tensor = _mean_only(tensor, name.endswith("bias"), vae, channels)
        elif name.startswith("quant_conv."):
            continue
        state[name] = tensor
    return folded, state


def project(context: Tensor, weight: Tensor) -> Tensor:
    """Keys or values of prompts: b m d and c d -> b m c, summed in float64."""
    return (context.double() @ weight.double().T).to(_at_least_float32(weight))


def prompt_projections(unet: dict[str, Tensor]) -> KeysValues:
    """to_k and to_v (c d each) of every layer that attends to the prompt, by the layers' names.

    25.6 M parameters at full size, kept beside a folded network for prompts that come later.
    unet: the state dict of a `UNet`. Copies: the file that they come from can be closed.
    """
    end = ".to_k.weight"
    layers = [name.removesuffix(end) for name in unet if name.endswith(f".attn2{end}")]
    return {
        layer: (unet[f"{layer}.to_k.weight"].clone(), unet[f"{layer}.to_v.weight"].clone())
        for layer in layers
    }


def _mean_only(tensor: Tensor, bias: bool, vae: dict[str, Tensor], channels: int) -> Tensor:
    """The encoder's last convolution followed by the mean's rows of quant_conv, as one."""
    if "quant_conv.weight" not in vae:
        return tensor[:channels].clone()
    rows = vae["quant_conv.weight"][:channels, :, 0, 0].double()
    merged = torch.einsum("oi,i...->o...", rows, tensor.double())
    if bias:
        merged = merged + vae["quant_conv.bias"][:channels].double()
    return merged.to(_at_least_float32(tensor))


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def build(config: StepConfig, state: dict[str, Tensor], *, operations: Any = Unset) -> OneStep:
    """A folded network around existing tensors, without a second copy of them."""
    with torch.device("meta"):
        network = OneStep(config, operations=operations)
    network.load_state_dict(state, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def fold(network: Unfolded, *, operations: Any = Unset) -> OneStep:
    """The folded form of an unfolded network, in its dtype; unchanged tensors are shared."""
    embeds = {k: v.detach() for k, v in network.embeds.items()}
    unet, vae = network.unet.state_dict(), network.vae.state_dict()
    config, state = fold_state(network.config, unet, vae, embeds)
    inside, outside = unet["conv_in.weight"].dtype, vae["decoder.conv_in.weight"].dtype
    state = {k: v.to(inside if k.startswith("unet.") else outside) for k, v in state.items()}
    return build(config, state, operations=operations)
