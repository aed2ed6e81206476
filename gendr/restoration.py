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
from .alpha import fill_transparent, split_alpha
from .fidelity import back_project, psnr, reduce
from .networks.onestep import OneStep, Step
from .networks.strips import Strips
from .plan import Plan, latent_grid
from .report import Cancelled, OnProgress, Progress
from .resize import pad, resize, roll_up, unroll
from .settings import Settings
from .speed.transfer import Transfer
from .tiles import finished, fit_grid, recovering, tiled

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
        self.runner = self.model.runner
        self.ahead = self.runner.ahead
        self.transfer = Transfer(self.device, ahead=self.ahead)
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
        if self.plan.on_device:
            image = image.to(self.device)
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
            ahead=self.ahead,
            before=lambda i, n: self.check(),
            after=lambda i, n, out: self.advance(lambda: small((out[:1] + 1) / 2)),
        )

    def strips_pass(self, x: Tensor) -> Tensor:
        """The autoencoder over the whole picture, the UNet in tiles of the latent."""
        latent = finished(self.finite("encode", self.encode_of, x))
        self.advance(None)
        plan, config = self.plan, self.model.network.config
        grid = latent_grid(config, plan.padded_size, plan.target, plan.overlap)
        step = recovering(
            lambda z: self.finite("step", self.step_of, z),
            minimum=config.unet.multiple,
            multiple=config.unet.multiple,
            is_oom=self.is_oom,
            on_event=self.ran_out,
        )
        latent = tiled(
            step,
            latent,
            grid,
            batch=plan.tile_batch,
            ahead=self.ahead,
            before=lambda i, n: self.check(),
            after=lambda i, n, out: self.advance(None),
        )
        y = finished(self.finite("decode", self.decode_of, latent))
        self.advance(lambda: small((y + 1) / 2))
        return y

    def one_pass(self, x: Tensor) -> Tensor | Callable[[], Tensor]:
        """Encode, step, decode of tiles b 3 h w in [-1, 1]."""
        return self.finite("pass", self.pass_of, x)

    def encode_of(self, network: Step) -> Callable[[Tensor], Tensor]:
        """The encoder over the whole picture, by strips where the plan says so."""
        by_strips = self.plan.strips and isinstance(network, OneStep)
        return Strips(network, check=self.check).encode if by_strips else network.encode

    def decode_of(self, network: Step) -> Callable[[Tensor], Tensor]:
        """The decoder over the whole latent, likewise."""
        by_strips = self.plan.strips and isinstance(network, OneStep)
        return Strips(network, check=self.check).decode if by_strips else network.decode

    def pass_of(self, network: Step) -> Callable[[Tensor], Tensor]:
        """The whole step by this network, by strips where the plan says so."""
        encode, step, decode = (f(network) for f in (self.encode_of, self.step_of, self.decode_of))
        return lambda x: decode(step(encode(x)))

    def step_of(self, network: Step) -> Callable[[Tensor], Tensor]:
        """z_l -> z_g by this network."""
        return lambda z: network.step(z, detail=self.settings.detail, guidance=self.guidance)

    def finite(
        self, stage: str, of: Callable[[Step], Callable[[Tensor], Tensor]], x: Tensor
    ) -> Tensor | Callable[[], Tensor]:
        """`of(network)(x)` on the device; what isn't finite is computed again in float32.

        Where tiles may be under way, what waits for the result instead of the result.
        """
        here = self.transfer.bring(x)
        y = self.run(stage, of(self.model.network), here)
        wait = self.transfer.take(y, torch.isfinite(y).all(), x.device)
        del y

        def finish() -> Tensor:
            result, fine = wait()
            return result if fine else self.again(of, here, x.device)

        return finish if self.ahead else finish()

    def run(self, stage: str, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """fn(x) the way the model's speed says. Strips may stop between two, so they run as they are."""
        if self.plan.strips and stage != "step":
            return fn(x)
        key = (stage, self.settings.detail, self.guidance, self.model.network.compute)
        return self.runner.run(key, fn, x, self.tell)

    def again(
        self, of: Callable[[Step], Callable[[Tensor], Tensor]], here: Tensor, to: torch.device
    ) -> Tensor:
        """In float32, eagerly; `NotFinite` if that doesn't help."""
        if self.model.precision.name != "fp32":
            self.events.append(
                f"the model gave values that are not finite in {self.model.precision.name}: this "
                "part was computed again in fp32"
            )
            y = self.in_float32(of, here)
            if bool(torch.isfinite(y).all()):
                return y.to(to)
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

    def tell(self, event: str) -> None:
        """For the report, once."""
        if event not in self.events:
            self.events.append(event)

    def ran_out(self, event: str) -> None:
        self.events.append(event)
        self.runner.forget()
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
