"""One call of `GenDR.restore`: pictures through the plan, tile by tile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import color, devices
from .fidelity import back_project, psnr, reduce
from .inputs import fill_transparent, split_alpha
from .onestep import OneStep, Step
from .plan import Plan, latent_grid
from .report import Cancelled, OnProgress, Progress
from .resize import pad, resize, roll_up, unroll
from .settings import Settings
from .strips import Strips
from .tiles import fit_grid, recovering, tiled

if TYPE_CHECKING:
    from .model import GenDR

# ITU-R BT.601, for a grey result.
LUMA = (0.299, 0.587, 0.114)
PREVIEW = 256


class NotFinite(RuntimeError):
    """The model gave NaN or infinity in every precision; the message says what to do."""


@dataclass
class Restoration:
    """One call of `restore`: the plan in force and what has happened so far."""

    model: GenDR
    plan: Plan
    settings: Settings
    device: torch.device
    progress: OnProgress | None
    cancelled: Callable[[], bool] | None
    is_oom: Callable[[BaseException], bool]

    def __post_init__(self) -> None:
        self.events: list[str] = []
        self.done = self.index = 0
        extra = 2 if self.plan.mode == "strips" else 0
        self.total = (self.plan.tiles + extra) * self.plan.images
        self.guidance = self.model.guidance(self.settings)
        self.exact: Step | None = None
        self.delta_e = self.lr_psnr = 0.0
        self.guarded = recovering(
            self.one_pass,
            minimum=self.model.multiple,
            multiple=self.model.multiple,
            is_oom=self.is_oom,
            on_event=self.ran_out,
        )

    def picture(self, image: Tensor, index: int) -> Tensor:
        """One picture of any channels, 1 c h w -> 1 c H W."""
        self.index = index
        colours, alpha = split_alpha(image)
        grey = colours.shape[1] == 1
        if alpha is not None:
            colours = fill_transparent(colours, alpha)
        colours = colours.expand(-1, 3, -1, -1)
        size, wrap = self.plan.output_size, self.settings.seamless
        result = self.colours(colours)
        if grey:
            weights = result.new_tensor(LUMA)[:, None, None]
            result = (result * weights).sum(1, keepdim=True)
        result = result.clamp(0, 1)
        self.measure(result, colours[:, : result.shape[1]])
        if alpha is None:
            return result
        # Transparency is zero where the picture is opaque, and stays exactly zero there.
        return torch.cat([result, 1 - resize(1 - alpha, size, wrap=wrap)], dim=1)

    def colours(self, image: Tensor) -> Tensor:
        """The method on three channels: 1 3 h w -> 1 3 H W."""
        plan, settings = self.plan, self.settings
        enlarged = resize(image, plan.output_size, wrap=settings.seamless)
        if settings.seamless:
            enlarged = unroll(enlarged, plan.margin, plan.padded_size)
        x = pad(enlarged, plan.padded_size)
        y = (self.network_pass(2 * x - 1) + 1) / 2
        if settings.seamless:
            y = color.apply(settings.color_fix, y, x)
            y = roll_up(y, plan.margin, plan.output_size)
        else:
            y = y[..., : plan.output_size[0], : plan.output_size[1]]
            y = color.apply(settings.color_fix, y, enlarged)
        return back_project(y.clamp(0, 1), image, settings.fidelity)

    def network_pass(self, x: Tensor) -> Tensor:
        """1 3 H W in [-1, 1] -> the same, by the plan's mode."""
        plan = self.plan
        if plan.mode == "strips":
            try:
                return self.strips_pass(x)
            except Exception as error:
                if not self.is_oom(error):
                    raise
            self.ran_out("out of memory with the autoencoder in strips: going on in tiles")
        grid = fit_grid(*plan.padded_size, plan.target, plan.overlap, self.model.multiple)
        return tiled(
            self.guarded,
            x,
            grid,
            batch=plan.tile_batch,
            before=lambda i, n: self.check(),
            after=lambda i, n, out: self.advance(lambda: small((out[:1] + 1) / 2)),
        )

    def strips_pass(self, x: Tensor) -> Tensor:
        """The autoencoder over the whole picture, the UNet in tiles of the latent."""
        latent = self.finite(lambda network: Strips(network, check=self.check).encode, x)
        self.advance(None)
        plan, config = self.plan, self.model.network.config
        grid = latent_grid(config, plan.padded_size, plan.target, plan.overlap)
        step = recovering(
            lambda z: self.finite(self.step_of, z),
            minimum=config.unet.multiple,
            multiple=config.unet.multiple,
            is_oom=self.is_oom,
            on_event=self.ran_out,
        )
        latent = tiled(
            step,
            latent,
            grid,
            before=lambda i, n: self.check(),
            after=lambda i, n, out: self.advance(None),
        )
        y = self.finite(lambda network: Strips(network, check=self.check).decode, latent)
        self.advance(lambda: small((y + 1) / 2))
        return y

    def one_pass(self, x: Tensor) -> Tensor:
        """Encode, step, decode of tiles b 3 h w in [-1, 1]."""
        return self.finite(self.pass_of, x)

    def pass_of(self, network: Step) -> Callable[[Tensor], Tensor]:
        """The whole step by this network, by strips where the plan says so."""
        step = self.step_of(network)
        if not self.plan.strips or not isinstance(network, OneStep):
            return lambda x: network.decode(step(network.encode(x)))
        strips = Strips(network, check=self.check)
        return lambda x: strips.decode(step(strips.encode(x)))

    def step_of(self, network: Step) -> Callable[[Tensor], Tensor]:
        """z_l -> z_g by this network."""
        return lambda z: network.step(z, detail=self.settings.detail, guidance=self.guidance)

    def finite(self, of: Callable[[Step], Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """`of(network)(x)` on the device; what isn't finite is computed again in float32."""
        network = self.model.network
        here = x.to(self.device)
        y = of(network)(here)
        if bool(torch.isfinite(y).all()):
            return y.to(x.device)
        if self.model.precision.name != "fp32":
            self.events.append(
                f"the model gave values that are not finite in {self.model.precision.name}: this "
                "part was computed again in fp32"
            )
            y = self.in_float32(of, here)
            if bool(torch.isfinite(y).all()):
                return y.to(x.device)
        raise NotFinite(
            f"{self.model.name} gives values that are not finite even in fp32: the file is "
            "damaged or was not trained to the end; use another one"
        )

    def in_float32(self, of: Callable[[Step], Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """`of(network)(x)` in float32, without changing the network for the tiles that follow."""
        network = self.model.network
        if self.model.casts:
            before = network.compute
            network.compute = (torch.float32, torch.float32)
            try:
                return of(network)(x)
            finally:
                network.compute = before
        if self.exact is None:
            self.exact = copy.deepcopy(network).float()
            self.exact.compute = (torch.float32, torch.float32)
        return of(self.exact)(x)

    def check(self) -> None:
        """Stop here if the person asked for it."""
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("stopped between two tiles; nothing was written")

    def advance(self, preview: Callable[[], Tensor] | None) -> None:
        self.done = min(self.done + 1, self.total)
        if self.progress is not None:
            self.progress(Progress(self.done, self.total, self.index, preview))

    def ran_out(self, event: str) -> None:
        self.events.append(event)
        devices.release(self.device)

    def measure(self, result: Tensor, image: Tensor) -> None:
        """Distance of the reduced result from the input."""
        back = reduce(result, tuple(image.shape[-2:]))
        three = (-1, 3, -1, -1)
        self.delta_e = float(color.delta_e(back.expand(three), image.expand(three)).mean())
        self.lr_psnr = psnr(back, image)


def small(image: Tensor) -> Tensor:
    """A preview, 3 h w on the CPU, at most `PREVIEW` pixels wide or high."""
    factor = PREVIEW / max(image.shape[-2:])
    image = image[0].float().clamp(0, 1)
    if factor < 1:
        size = [max(1, round(side * factor)) for side in image.shape[-2:]]
        image = F.interpolate(image[None], size=size, mode="area")[0]
    return image.cpu()
