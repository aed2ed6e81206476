"""Two score networks, real (phi) and fake (psi), as LoRA adapters on one frozen UNet.

peft makes the adapters; the choice between them is made here. peft's own `set_adapter` takes the
gradient away from the adapter that is not chosen, and a block that is recomputed in the backward
pass would run with whatever is chosen by then: both are silent and wrong. `Scores.use` changes
neither, and the contexts given to `recompute_blocks` bring the choice of the forward pass back.
"""

from __future__ import annotations

import json
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gendr import schedule
from gendr.networks.unet import UNet
from gendr.schedule import Prediction
from train import losses
from train.atomic import replacing, write_text
from train.checkpointing import recompute_blocks
from train.losses import full

Adapter = Literal["real", "fake"]
ADAPTERS: tuple[Adapter, ...] = ("real", "fake")
# OSEDiff's set: every attention and feed-forward projection and every convolution, the first and
# the last included. 258 modules of SD2.1; at rank 64 64.9 M parameters in each adapter.
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out",
)  # fmt: skip
PEFT_PREFIX = "base_model.model."


class Pull(NamedTuple):
    """Distillation loss, its gradient at z_g (b c h w) and both scores, all without a graph."""

    loss: Tensor
    gradient: Tensor
    f_real: Tensor
    f_fake: Tensor


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Parameters take no gradient inside; afterwards those take it again that did before.

    A backward pass that recomputes blocks belongs inside as well.
    """
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def _in_full(module: nn.Module) -> None:
    """Let a module compute in float32 at least, under autocast too."""
    plain = type(module).forward
    module.to(torch.promote_types(module.get_parameter(_weight(module)).dtype, torch.float32))

    def run(self: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return plain(self, full(x))

    module.forward = types.MethodType(run, module)


def _weight(module: nn.Module) -> str:
    return next(name for name, _ in module.named_parameters())


class Scores(nn.Module):
    """A frozen UNet and its two adapters; in float32 and without one it is the UNet, bit by bit.

    The UNet given is taken over, not copied: copy it before if it is needed elsewhere. It may be
    in bf16; the adapters and the last two layers are in float32 at least, because an error of the
    noise estimate is multiplied by up to 13 on the way to a clean latent.

    forward(z_t, t, prompt, adapter) is the noise estimate, so that the whole can be wrapped for
    several processes; everything else goes through it.
    """

    def __init__(
        self,
        unet: UNet,
        *,
        lora_rank: int,
        lora_alpha: float,
        prediction: Prediction,
        recompute: bool = False,
    ):
        """prediction: what the UNet predicts; recompute: gradient checkpointing."""
        super().__init__()
        self.recompute = recompute
        self.lora_rank, self.lora_alpha, self.prediction = lora_rank, lora_alpha, prediction
        self.dtype = unet.conv_in.weight.dtype
        self.unet = unet.requires_grad_(False)
        self.config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=list(TARGETS))
        with warnings.catch_warnings():
            # peft warns of what is wanted here: more than one adapter.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            for name in ADAPTERS:
                inject_adapter_in_model(self.config, unet, name)
        self.layers = [m for m in unet.modules() if isinstance(m, LoraLayer)]
        if not all(hasattr(layer, "_active_adapter") for layer in self.layers):
            raise RuntimeError(
                "this version of peft keeps its active adapter elsewhere: install a version that "
                "the lock file names"
            )
        for name in ADAPTERS:
            for p in self.parameters_of(name):
                p.data = full(p.data)
                p.requires_grad_(True)
        for module in (unet.conv_norm_out, unet.conv_out):
            _in_full(module)
        if recompute:
            recompute_blocks(unet, lambda: (nullcontext(), self.use(self.selected)))
        self.casts = True
        self.selected: Adapter | None = None
        self._select(None)

    def parameters_of(self, adapter: Adapter) -> list[nn.Parameter]:
        """The parameters of one adapter, for its optimiser."""
        return [p for _, p in self._named(adapter)]

    def _named(self, adapter: Adapter) -> Iterator[tuple[str, nn.Parameter]]:
        for name, p in self.unet.named_parameters():
            if f".lora_A.{adapter}." in name or f".lora_B.{adapter}." in name:
                yield name, p

    def _select(self, adapter: Adapter | None) -> None:
        for layer in self.layers:
            # Not `set_adapter`, which would change requires_grad.
            layer._active_adapter = [] if adapter is None else [adapter]
        self.selected = adapter

    @contextmanager
    def use(self, adapter: Adapter | None) -> Iterator[None]:
        """The UNet with this adapter, or with none; afterwards as before. Gradients are left alone."""
        before = self.selected
        self._select(adapter)
        try:
            yield
        finally:
            self._select(before)

    def forward(self, z_t: Tensor, t: Tensor, prompt: Tensor, adapter: Adapter | None) -> Tensor:
        """Noise estimate of z_t (b c h w) at timesteps t (b) under a prompt (1 or b, m d): b c h w."""
        prompt = prompt.expand(z_t.shape[0], -1, -1)
        # peft turns every input into the adapter's float32, which autocast then turns back.
        if (casts := not torch.is_autocast_enabled(z_t.device.type)) != self.casts:
            self.casts = casts
            for layer in self.layers:
                layer.cast_input_dtype_enabled = casts
        with self.use(adapter):
            out = full(self.unet(z_t.to(self.dtype), t, prompt.to(self.dtype)))
        if self.prediction == "epsilon":
            return out
        return schedule.eps_from_v(full(z_t), out, *schedule.levels(t, z_t))

    def guided(
        self,
        z_t: Tensor,
        t: Tensor,
        prompt: Tensor,
        adapter: Adapter | None,
        *,
        null: Tensor | None = None,
        kappa: float = 1.0,
    ) -> Tensor:
        """Clean latent f_kappa(z_t; t, prompt) of Eq. 7 in float32 at least: b c h w.

        kappa other than 1 evaluates the prompt and the empty prompt `null` in one batch of two.
        """
        if kappa == 1:
            eps = self(z_t, t, prompt, adapter)
        else:
            if null is None:
                raise ValueError(f"guidance {kappa} needs the embedding of the empty prompt")
            b = z_t.shape[0]
            prompts = torch.cat([c.expand(b, -1, -1) for c in (prompt, null)])
            pair = self(torch.cat([z_t, z_t]), torch.cat([t, t]), prompts, adapter)
            conditional, empty = pair.chunk(2)
            # Guidance of the noise estimates is guidance of the clean latents: one is affine in the
            # other with the same coefficients for both prompts.
            eps = empty + kappa * (conditional - empty)
        return schedule.x0_from_eps(full(z_t), eps, *schedule.levels(t, z_t))

    def pull(
        self,
        z_g: Tensor,
        z_h: Tensor,
        eps: Tensor,
        t: Tensor,
        config: losses.Distillation,
        prompt: Tensor,
        *,
        null: Tensor | None = None,
        kappa_real: float = 2.0,
        kappa_fake: float = 2.0,
    ) -> Pull:
        """`losses.distillation` and its gradient at z_g, without a graph from one to the other.

        z_g, z_h, eps: b c h w; t: b. z_t = a z_g + b eps goes to both networks; from their values come
        the loss's cotangents, which are then pulled back through each network by itself. With
        gradient checkpointing, where a graph holds little, both are kept meanwhile. Without it only
        one is alive at a time: the fake score is evaluated for its value first, and again with a
        graph once that of the real one is gone. Finish with `z_g.backward(factor * gradient)`.
        """
        z_g, (a, b) = full(z_g).detach(), schedule.levels(t, z_g)
        z_t = schedule.add_noise(z_g, full(eps), a, b)
        kappas = {"real": kappa_real, "fake": kappa_fake}

        def evaluate(adapter: Adapter, *, graph: bool) -> tuple[Tensor, Tensor]:
            z = z_t.clone().requires_grad_(graph)
            with torch.set_grad_enabled(graph):
                f = self.guided(z, t, prompt, adapter, null=null, kappa=kappas[adapter])
            return z, f

        with frozen(self):
            once = self.recompute and "fake" in config.through
            z_fake, fake_of = evaluate("fake", graph=once)
            z, f = evaluate("real", graph="real" in config.through)
            f_real, f_fake = f.detach(), fake_of.detach()
            loss, real, fake, gradient = losses.cotangents(f_real, f_fake, z_g, z_h, config)
            if real is not None:
                gradient = gradient + a * torch.autograd.grad(f, z, real)[0]
            del z, f
            if fake is not None:
                if not once:
                    z_fake, fake_of = evaluate("fake", graph=True)
                gradient = gradient + a * torch.autograd.grad(fake_of, z_fake, fake)[0]
        return Pull(loss, gradient, f_real, f_fake)

    def adapter_state(self, adapter: Adapter) -> dict[str, Tensor]:
        """The tensors of one adapter under peft's names in a file."""
        return {
            PEFT_PREFIX + name.replace(f".{adapter}.", "."): p.detach()
            for name, p in self._named(adapter)
        }

    @torch.no_grad()
    def load_adapter_state(self, adapter: Adapter, state: dict[str, Tensor]) -> None:
        """The inverse of `adapter_state`. ValueError where the tensors are another network's."""
        own = {PEFT_PREFIX + n.replace(f".{adapter}.", "."): p for n, p in self._named(adapter)}
        if wrong := sorted(own.keys() ^ state.keys()):
            raise ValueError(
                f"the LoRA was made for another network: {wrong[0]} is only in "
                f"{'the network' if wrong[0] in own else 'the file'}"
            )
        for name, p in own.items():
            if p.shape != state[name].shape:
                raise ValueError(
                    f"the LoRA is of another network or rank: {name} is "
                    f"{tuple(state[name].shape)}, expected {tuple(p.shape)}"
                )
            p.copy_(state[name])

    def save(self, folder: Path | str) -> None:
        """Write both adapters as peft's folders `real` and `fake`, each file atomically."""
        facts = {
            k: sorted(v) if isinstance(v, set) else v for k, v in self.config.to_dict().items()
        }
        facts["inference_mode"] = True
        for adapter in ADAPTERS:
            place = Path(folder) / adapter
            place.mkdir(parents=True, exist_ok=True)
            config = json.dumps(facts, indent=1, sort_keys=True) + "\n"
            write_text(place / "adapter_config.json", config)
            state = {k: v.cpu().contiguous() for k, v in self.adapter_state(adapter).items()}
            metadata = {"format": "pt", "lora_alpha": str(self.lora_alpha), "adapter": adapter}
            with replacing(place / "adapter_model.safetensors") as part:
                save_file(state, part, metadata=metadata)

    def load(self, folder: Path | str) -> None:
        """Read what `save` wrote. ValueError where rank, alpha or network differ."""
        for adapter in ADAPTERS:
            place = Path(folder) / adapter
            facts = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
            if (facts["r"], facts["lora_alpha"]) != (self.lora_rank, self.lora_alpha):
                raise ValueError(
                    f"{place} has rank {facts['r']} and alpha {facts['lora_alpha']}, expected "
                    f"{self.lora_rank} and {self.lora_alpha}: give the run the settings it began with"
                )
            self.load_adapter_state(adapter, load_file(place / "adapter_model.safetensors"))
