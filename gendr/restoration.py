"""One call of `GenDR.restore`: pictures through the plan, tile by tile."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import color, devices
from .alpha import fill_transparent, split_alpha
from .damage import LUMA
from .devices import Precision
from .fidelity import Found, automatic, back_project, psnr, reduce
from .networks.onestep import OneStep, Prompt, Step
from .networks.strips import Strips
from .networks.work import stages
from .plan import Plan
from .preview import LatentColours, Preview
from .report import Cancelled, OnProgress, Progress, Report
from .resizing import pad, resize, roll_up, unroll
from .settings import AUTO, Settings
from .speed.runners import Eager
from .speed.transfer import Transfer
from .steady import Steady
from .tiles import Box, Fn, finished, recovering, seam_score, tiled

# Of what follows the network, per pixel of the result, in multiply-adds that take as long: the
# colours, and back-projection.
COLOUR_WORK, FIDELITY_WORK = 2_000, 4_000


class NotFinite(RuntimeError):
    """The model gave NaN or infinity in every precision; the message says what to do."""


@dataclass(kw_only=True)
class Restoration:
    """One call of `restore`: the plan in force and what has happened so far.

    network, runner: what computes, and the way it is run. casts: as of `GenDR`.
    name, licence: the model's.
    guidance: the one in force. prompt: instead of the network's own, in the form that it takes.
    clip: what the frames before say of the next one, where the pictures are frames.
    events: what the report is to say besides what happens here.
    """

    network: Step
    runner: Eager
    precision: Precision
    casts: bool
    name: str
    licence: str
    guidance: float
    plan: Plan
    settings: Settings
    device: torch.device
    progress: OnProgress | None
    cancelled: Callable[[], bool] | None
    is_oom: Callable[[BaseException], bool]
    prompt: Prompt | None = None
    clip: Steady | None = None
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.done = self.index = 0
        self.found: list[Found] = []
        self.seam_scores: list[float] = []
        extra = 2 if self.plan.mode == "latent_tiles" else 0
        self.total = (self.plan.tiles + extra) * self.plan.images
        # Multiply-adds: of a pixel in each stage, of the present picture so far, of its strips since
        # the last pass. And the share of all work that was told last: it never goes back.
        self.work = stages(self.network, passes=2 if self.guidance > 1 else 1)
        self.worked = self.strip_work = 0.0
        self.share = 0.0
        self.preview: Preview | None = None
        self.exact: Step | None = None
        self.ahead = self.runner.ahead
        self.transfer = Transfer(self.device, ahead=self.ahead)
        config = self.network.config
        # Made once: what one picture teaches about the memory holds for those after it.
        self.forward = self.recovering("forward", config.multiple)
        self.step = self.recovering("step", config.unet.multiple)

    def run(self, image: Tensor) -> tuple[Tensor, Report]:
        """Pictures b c h w of 1 to 4 channels in [0, 1] -> b c H W, and what was done."""
        devices.reset_peak(self.device)
        started = time.perf_counter()
        batch, channels = image.shape[:2]
        result = torch.empty(
            batch, channels, *self.plan.output_size, memory_format=torch.channels_last
        )
        report = Report(
            model=self.name,
            settings=self.settings,
            plan=self.plan,
            dtype=self.precision.name,
            licence=self.licence,
            input_size=self.plan.input_size,
            output_size=self.plan.output_size,
            events=self.events,
            found=self.found,
        )
        with torch.inference_mode():
            for self.index in range(batch):
                one = slice(self.index, self.index + 1)
                result[one], delta_e, lr_psnr = self.restore_channels(image[one])
                report.delta_e += delta_e / batch
                report.lr_psnr += lr_psnr / batch
                self.finish_picture(result[one])
            report.plan = self.plan
            if self.seam_scores:
                report.seam_score = sum(self.seam_scores) / batch
        report.passes = self.runner.told()
        report.seconds = time.perf_counter() - started
        report.peak_bytes = devices.peak_bytes(self.device)
        return result, report

    def restore_channels(self, image: Tensor) -> tuple[Tensor, float, float]:
        """One picture 1 c h w -> 1 c H W, colour difference and dB of the reduced result."""
        image = image.float().clamp(0, 1)
        if self.plan.on_device:
            image = image.to(self.device)
        colours, alpha = split_alpha(image)
        if alpha is not None:
            colours = fill_transparent(colours, alpha)
        result = self.restore_rgb(colours.expand(-1, 3, -1, -1))
        if colours.shape[1] == 1:
            weights = result.new_tensor(LUMA)[:, None, None]
            result = (result * weights).sum(1, keepdim=True)
        result = result.clamp(0, 1)
        distance = distance_to(result, colours)
        if alpha is not None:
            # Transparency is zero where the picture is opaque, and stays exactly zero there.
            clear = resize(1 - alpha, self.plan.output_size, wrap=self.settings.seamless)
            result = torch.cat([result, 1 - clear], dim=1)
        return result, *distance

    def restore_rgb(self, image: Tensor) -> Tensor:
        """The whole method on three channels: 1 3 h w -> 1 3 H W."""
        plan, settings = self.plan, self.settings
        image, measured = (image, None) if self.clip is None else self.clip(image)
        enlarged = resize(image, plan.work_size, wrap=settings.seamless)
        x = enlarged
        if settings.seamless:
            x = unroll(x, plan.margin, plan.padded_size)
        x = pad(x, plan.padded_size)
        y = (self.network_pass(2 * x - 1) + 1) / 2
        if settings.seamless:
            y = color.apply(settings.color_fix, y, x)
            y = roll_up(y, plan.margin, plan.work_size)
        else:
            y = y[..., : plan.work_size[0], : plan.work_size[1]]
            y = color.apply(settings.color_fix, y, enlarged)
        y = y.clamp(0, 1)
        as_computed = plan.work_size == plan.output_size
        if not as_computed:
            y = reduce(y, plan.output_size)
            enlarged = resize(image, plan.output_size, wrap=settings.seamless)
        if settings.fidelity == AUTO:
            y, found = automatic(y, image, enlarged, measured)
            self.found.append(found)
        else:
            y = back_project(y, image, settings.fidelity)
        if plan.tiles > 1 and as_computed and not settings.seamless:
            self.seam_scores.append(seam_score(y, plan.grid, enlarged))
        return y

    def network_pass(self, x: Tensor) -> Tensor:
        """1 3 H W in [-1, 1] -> the same, by the plan's mode."""
        if self.progress is not None:
            (height, width), margin = self.plan.output_size, self.plan.margin
            self.preview = Preview(x, Box(margin, margin, margin + height, margin + width))
            self.tell_progress()
        if self.plan.mode == "latent_tiles":
            try:
                return self.latent_tiles_pass(x)
            except Exception as error:
                if not self.is_oom(error):
                    raise
            self.ran_out("out of memory with the autoencoder over the whole: going on in tiles")
            self.plan = replace(self.plan, mode="tiles", strips=False, tile_batch=1)
        boxes = list(self.plan.grid.boxes())

        def after(i: int, n: int, out: Tensor) -> None:
            if self.preview is not None:
                self.preview.lay(out[:1], boxes[i], self.plan.padded_size)
            self.advance("encode", "step", "decode")

        return tiled(
            self.forward,
            x,
            self.plan.grid,
            batch=self.plan.tile_batch,
            ahead=self.ahead,
            before=lambda i, n: self.check(),
            after=after,
        )

    def latent_tiles_pass(self, x: Tensor) -> Tensor:
        """The autoencoder over the whole picture, the UNet in tiles of the latent."""
        latent = finished(self.finite("encode", x))
        self.advance("encode")
        grid = self.plan.grid.reduced(self.network.config.vae.factor)
        boxes = list(grid.boxes())
        colours = None if self.preview is None else LatentColours(latent, x)

        def after(i: int, n: int, out: Tensor) -> None:
            if self.preview is not None:
                self.preview.lay(colours(out[:1]), boxes[i], (grid.height, grid.width))
            self.advance("step")

        latent = tiled(
            self.step,
            latent,
            grid,
            batch=self.plan.tile_batch,
            ahead=self.ahead,
            before=lambda i, n: self.check(),
            after=after,
        )
        y = finished(self.finite("decode", latent))
        self.advance("decode")
        return y

    def recovering(self, stage: str, multiple: int) -> Fn:
        """A stage for `tiled`, in smaller tiles when memory runs out."""
        return recovering(
            lambda x: self.finite(stage, x),
            minimum=multiple,
            multiple=multiple,
            is_oom=self.is_oom,
            on_event=self.ran_out,
        )

    def finite(self, stage: str, x: Tensor) -> Tensor | Callable[[], Tensor]:
        """A stage of the network on the device; what isn't finite is computed again in float32.

        stage: "encode", "step", "decode", or "forward" for all three.
        Where tiles may be under way, what waits for the result instead of the result.
        """
        here = self.transfer.bring(x)
        y = self.run_stage(stage, here)
        wait = self.transfer.take(y, torch.isfinite(y).all(), x.device)
        del y

        def finish() -> Tensor:
            result, fine = wait()
            return result if fine else self.again(stage, here, x.device)

        return finish if self.ahead else finish()

    def run_stage(self, stage: str, x: Tensor) -> Tensor:
        """The way the model's speed says.

        Strips may stop between two, and what was recorded holds the network's own prompt: both run
        as they are.
        """
        if self.prompt is not None or (self.plan.strips and stage != "step"):
            return self.compute(self.network, stage, x)
        key = (stage, self.settings.detail, self.guidance, self.network.compute)
        return self.runner.run(key, lambda z: self.compute(self.network, stage, z), x, self.tell)

    def compute(self, network: Step, stage: str, x: Tensor) -> Tensor:
        """A stage of this network, its autoencoder by strips where the plan says so."""
        if self.plan.strips and isinstance(network, OneStep):
            network = Strips(network, check=self.check, worked=self.strip_done)
        if stage in ("step", "forward"):
            return getattr(network, stage)(
                x, detail=self.settings.detail, guidance=self.guidance, prompt=self.prompt
            )
        return getattr(network, stage)(x)

    def again(self, stage: str, x: Tensor, to: torch.device) -> Tensor:
        """In float32, eagerly; `NotFinite` if that doesn't help."""
        if self.precision.name != "fp32":
            self.events.append(
                f"the model gave values that are not finite in {self.precision.name}: this "
                "part was computed again in fp32"
            )
            y = self.in_float32(stage, x)
            if bool(torch.isfinite(y).all()):
                return y.to(to)
        raise NotFinite(
            f"{self.name} gives values that are not finite even in fp32: the file is "
            "damaged or was not trained to the end; use another one"
        )

    def in_float32(self, stage: str, x: Tensor) -> Tensor:
        """Without changing the network for the tiles that follow."""
        network = self.network
        if self.casts:
            before = network.compute
            network.compute = (torch.float32, torch.float32)
            try:
                return self.compute(network, stage, x)
            finally:
                network.compute = before
        if self.exact is None:
            self.exact = copy.deepcopy(network).float()
            self.exact.compute = (torch.float32, torch.float32)
        return self.compute(self.exact, stage, x)

    def check(self) -> None:
        """Stop here if the person asked for it."""
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("stopped between two tiles; nothing was written")

    def advance(self, *passed: str) -> None:
        """A pass of these stages is done."""
        self.done = min(self.done + 1, self.total)
        self.worked += sum(self.pass_work(stage) for stage in passed)
        self.strip_work = 0.0
        self.tell_progress()

    def strip_done(self, work: float) -> None:
        """A strip within a pass is done."""
        self.strip_work += work
        self.tell_progress()

    def pass_work(self, stage: str) -> float:
        """Of one pass of this stage over what it sees of the picture."""
        whole = self.plan.mode == "latent_tiles" and stage != "step"
        height, width = self.plan.padded_size if whole else self.plan.tile
        return self.work[stage] * height * width

    def picture_work(self) -> float:
        """Of one picture, with what follows the network."""
        tiles = self.plan.tiles
        once = self.plan.mode == "latent_tiles"
        network = sum(
            self.pass_work(stage) * (1 if once and stage != "step" else tiles)
            for stage in self.work
        )
        height, width = self.plan.output_size
        after = COLOUR_WORK + (FIDELITY_WORK if self.settings.fidelity else 0)
        return network + after * height * width

    def finish_picture(self, result: Tensor) -> None:
        """A picture is done, its colours and all."""
        self.worked = self.picture_work()
        if self.progress is not None:
            colours = split_alpha(result)[0].expand(-1, 3, -1, -1)
            self.preview = Preview(2 * colours - 1)
        self.tell_progress()
        self.worked = self.strip_work = 0.0

    def tell_progress(self) -> None:
        part = min(1.0, (self.worked + self.strip_work) / self.picture_work())
        self.share = max(self.share, (self.index + part) / self.plan.images)
        if self.progress is not None:
            self.progress(Progress(self.done, self.total, self.index, self.share, self.preview))

    def tell(self, event: str) -> None:
        """For the report, once."""
        if event not in self.events:
            self.events.append(event)

    def ran_out(self, event: str) -> None:
        self.events.append(event)
        self.runner.forget()
        devices.release(self.device)


def distance_to(result: Tensor, image: Tensor) -> tuple[float, float]:
    """Mean colour difference and dB between the result, reduced to the input's size, and it."""
    back = reduce(result, tuple(image.shape[-2:]))
    three = (-1, 3, -1, -1)
    delta_e = float(color.delta_e(back.expand(three), image.expand(three)).mean())
    return delta_e, psnr(back, image)
