"""`GenDR.restore`: the whole method, and the promises it keeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import devices, plan
from .alpha import check_image
from .devices import Precision
from .networks.onestep import Step
from .plan import Plan
from .report import OnProgress, Report
from .restoration import Restoration
from .settings import SPEEDS, Settings
from .speed import runners as speeds
from .tiles import seam_score


class GenDR:
    """A restorer: one network that does the whole step, and what its file says about it.

    network: the folded (`OneStep`) or unfolded (`Unfolded`) step.
    precision: dtypes to compute in. casts: the network's layers cast their weights per call to
    what they are given (a host's own layers), so that precision is a matter of the input alone.
    speed: one of `SPEEDS`; what can't be had on this device runs eagerly, and the report says why.
    """

    def __init__(
        self,
        network: Step,
        *,
        header: dict[str, Any],
        precision: Precision,
        device: torch.device | str = "cpu",
        casts: bool = False,
        speed: str = SPEEDS[0],
    ):
        self.network, self.header, self.precision = network, header, precision
        self.device, self.casts = torch.device(device), casts
        self.network.compute = (precision.vae, precision.unet)
        self.speed = speeds.choose(speed, self.device, network, casts=casts)
        self.runner = speeds.runner(self.speed, network, self.device)

    @property
    def name(self) -> str:
        """The model's name, as its file gives it."""
        return str(self.header.get("name", "GenDR"))

    @property
    def licence(self) -> str:
        """The licence of the weights."""
        return str(self.header.get("licence") or "unknown licence")

    @property
    def scale(self) -> float:
        """The enlargement that the model was trained for."""
        return float(self.header.get("scale", 4))

    @property
    def parameters(self) -> int:
        """Number of parameters, in the form that runs."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def dtype(self) -> str:
        """Name of the precision in use."""
        return self.precision.name

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.parameters / 1e6:.1f}M parameters, x{self.scale:g}, "
            f"{self.licence}, {self.precision.name}"
        )

    def restore(self, image: Tensor, scale: float | None = None, **options: Any) -> Tensor:
        """Restore and enlarge: b c h w in [0, 1] -> b c H W, float32, on the CPU.

        image: 1 (grey), 2 (grey, alpha), 3 or 4 channels, any float dtype; from 1x1 up.
        scale and any other field of `Settings` by name; `progress`, `cancelled`, `device`,
        `free_bytes`, `is_oom` as in `restore_with_report`.

        H, W are exactly round(h * scale), or the target size. Values are in [0, 1], never NaN.
        The same input gives the same output, and a picture the same result alone as in a batch.
        ValueError for an input that can't be used, `Cancelled` when stopped, `NotFinite` when the
        model fails in every precision.
        """
        return self.restore_with_report(image, scale, **options)[0]

    def restore_with_report(
        self,
        image: Tensor,
        scale: float | None = None,
        *,
        progress: OnProgress | None = None,
        cancelled: Callable[[], bool] | None = None,
        device: torch.device | str | None = None,
        free_bytes: int | None = None,
        is_oom: Callable[[BaseException], bool] = devices.is_oom,
        **settings: Any,
    ) -> tuple[Tensor, Report]:
        """As `restore`, with a `Report` of what was done.

        progress: called after every pass; what it raises passes through and ends the run.
        cancelled: asked before every pass and every strip.
        device: where to compute, when something else than this object put the weights there.
        free_bytes: memory the plan may count on; None = ask the device.
        """
        check_image(image)
        if scale is not None:
            settings["scale"] = scale
        chosen = Settings(**settings)
        batch, channels, height, width = image.shape
        place = self.device if device is None else torch.device(device)
        planned = self.plan(height, width, chosen, batch=batch, free_bytes=free_bytes, device=place)
        devices.reset_peak(place)
        started = time.perf_counter()
        run = Restoration(self, planned, chosen, place, progress, cancelled, is_oom)
        result = torch.empty(
            batch, channels, *planned.output_size, memory_format=torch.channels_last
        )
        report = Report(
            model=self.name,
            input_size=planned.input_size,
            output_size=planned.output_size,
            images=batch,
            mode=planned.mode,
            tiles=planned.tiles,
            tile=planned.tile,
            overlap=planned.overlap,
            dtype=self.precision.name,
            device=str(place),
            speed=self.speed.name,
            events=run.events,
        )
        if self.speed.reason:
            run.tell(self.speed.reason)
        with torch.inference_mode():
            for index in range(batch):
                one = image[index : index + 1].float().clamp(0, 1)
                result[index : index + 1] = run.picture(one, index)
                report.delta_e += run.delta_e / batch
                report.lr_psnr += run.lr_psnr / batch
            if planned.tiles > 1 and not chosen.seamless:
                grid = plan.pixel_grid(self.network.config, planned)
                report.seam_score = seam_score(result[:, : min(3, channels)], grid)
        report.passes = self.runner.told()
        report.seconds = time.perf_counter() - started
        report.peak_bytes = devices.peak_bytes(place)
        return result, report

    @property
    def multiple(self) -> int:
        """Sides of what the network sees are multiples of this many pixels."""
        return self.network.config.multiple

    def plan(
        self,
        height: int,
        width: int,
        settings: Settings | None = None,
        *,
        batch: int = 1,
        free_bytes: int | None = None,
        device: torch.device | str | None = None,
    ) -> Plan:
        """What `restore` will do with pictures of this size, without running."""
        settings = settings or Settings()
        place = self.device if device is None else torch.device(device)
        guidance = self.guidance(settings)
        return plan.make(
            self.network.config,
            settings,
            height,
            width,
            images=batch,
            train_tile=int(self.header.get("tile", 512)),
            free=devices.free_bytes(place) if free_bytes is None else free_bytes,
            bytes_each=max(self.precision.vae.itemsize, self.precision.unet.itemsize),
            dtype=str(self.precision),
            device=str(place),
            batched=place.type not in ("cpu", "mps"),
            guidance=guidance,
            speed=self.speed.name,
            on_device=self.runner.on_device,
        )

    def guidance(self, settings: Settings) -> float:
        """The guidance in force: the person's, else the file's. ValueError where it can't be had."""
        asked = settings.guidance
        value = float(self.header.get("guidance", 1.0)) if asked is None else float(asked)
        if value > 1 and self.network.prompts < 2:
            raise ValueError(
                f"{self.name} holds no negative prompt, so guidance must be 1, got {value:g}: "
                "raise `detail` instead for a stronger effect"
            )
        return value
