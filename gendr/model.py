"""`GenDR.restore` and the promises it keeps. The method itself is `restoration.restore_rgb`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import devices, plan, region
from .alpha import check_image, out_of_range
from .devices import Precision
from .files.header import Header
from .networks.onestep import Prompt, Step
from .plan import Plan
from .report import OnProgress, Report
from .restoration import Restoration
from .settings import SPEEDS, Settings, for_model
from .speed import runners as speeds
from .steady import Steady
from .tiles import NO_TILES


class GenDR:
    """A restorer: one network that does the whole step, and what its file says about it.

    network: the folded (`OneStep`) or unfolded (`Unfolded`) step.
    precision: dtypes to compute in. casts: the network's layers cast their weights per call to
    what they are given (a host's own layers), so that precision is a matter of the input alone.
    speed: one of `SPEEDS`; where it is not available, passes run eagerly, and the report says why.
    """

    def __init__(
        self,
        network: Step,
        *,
        header: Header,
        precision: Precision,
        device: torch.device | str = "cpu",
        casts: bool = False,
        speed: str = SPEEDS[0],
    ):
        self.network, self.header, self.precision = network, header, precision
        self.device, self.casts = torch.device(device), casts
        self.network.compute = (precision.vae, precision.unet)
        self._last_size: tuple[int, int] | None = None
        # The last prompt that was given, with what the network made of it.
        self._prompt: tuple[Tensor, Prompt] | None = None
        self.speed = speeds.choose(speed, self.device, network, casts=casts)
        self.runner = speeds.runner(self.speed, network, self.device)

    @property
    def name(self) -> str:
        """The model's name, as its file gives it."""
        return self.header.name

    @property
    def licence(self) -> str:
        """The licence of the weights."""
        return self.header.licence or "unknown licence"

    @property
    def scale(self) -> float:
        """The enlargement that the model was trained for."""
        return float(self.header.scale)

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
        prompt: embedding of a text, 1 n d, instead of the model's fixed prompt.
        mask: h w or b h w in [0, 1]: only where it is white the picture is restored, with a soft
        edge; the rest is enlarged plainly.
        scale and any other field of `Settings` by name; `progress`, `cancelled`, `device`,
        `free_bytes`, `make_room`, `is_oom` as in `restore_with_report`.

        H, W are exactly h * scale and w * scale with halves rounded up, or the target size. Values
        are in [0, 1], never NaN.
        The same input gives the same output on the same machine, with the same versions and number
        of threads and the same plan, to the last bit; a picture the same result alone as in a batch,
        but for frames of a clip with `steady`.
        Other threads round differently: on one CPU by up to 4e-7 of the range in fp32, 8e-3 in bf16.
        Other tiles see less or more: by up to 4e-2 in single pixels, 1e-3 on average.
        ValueError for an input that can't be used, `Cancelled` when stopped, `NotFinite` when the
        model fails in every precision.
        """
        return self.restore_with_report(image, scale, **options)[0]

    def restore_with_report(
        self,
        image: Tensor,
        scale: float | None = None,
        *,
        mask: Tensor | None = None,
        prompt: Tensor | None = None,
        clip: Steady | None = None,
        progress: OnProgress | None = None,
        cancelled: Callable[[], bool] | None = None,
        device: torch.device | str | None = None,
        free_bytes: int | None = None,
        make_room: Callable[[Plan], int | None] | None = None,
        is_oom: Callable[[BaseException], bool] = devices.is_oom,
        **settings: Any,
    ) -> tuple[Tensor, Report]:
        """As `restore`, with a `Report` of what was done.

        prompt: embedding of a text by SD2's text encoder, 1 n d, instead of the model's fixed prompt.
        clip: what the frames of a clip say that were restored in calls before, with `steady`; a new
        `steady.Steady` for the first. None = the pictures of this call are the whole clip.
        progress: called after every pass; what it raises passes through and ends the run.
        cancelled: asked before every pass and every strip.
        device: where to compute, when something else than this object put the weights there.
        free_bytes: memory the plan may count on; None = ask the device.
        make_room: given the plan before the first pass, where a host holds the weights: brings
        them to the device and returns the memory that is free then, for which is planned again.
        """
        check_image(image)
        if scale is not None:
            settings["scale"] = scale
        chosen = for_model(Settings(**settings), self.header.color_fix)
        place = self.device if device is None else torch.device(device)

        events = [self.speed.reason] if self.speed.reason else []
        events += out_of_range(image)
        words = None
        if prompt is not None:
            words = self.prompt(prompt, place)
            events.append(f"prompt: {prompt.shape[1]} tokens instead of the model's own")

        def planned(part: Tensor, free: int | None) -> Plan:
            height, width = part.shape[-2:]
            return self.plan(height, width, chosen, batch=len(part), free_bytes=free, device=place)

        def run(part: Tensor) -> tuple[Tensor, Report]:
            plan = planned(part, free_bytes)
            if make_room is not None:
                plan = planned(part, make_room(plan))
            restoration = Restoration(
                network=self.network,
                runner=self.runner,
                precision=self.precision,
                casts=self.casts,
                name=self.name,
                guidance=self.guidance(chosen),
                plan=plan,
                settings=chosen,
                device=place,
                progress=progress,
                cancelled=cancelled,
                is_oom=is_oom,
                prompt=words,
                clip=(clip or Steady()) if chosen.steady else None,
                licence=self.licence,
                events=[*events],
            )
            try:
                return restoration.run(part)
            finally:
                if plan.padded_size != self._last_size:
                    devices.give_back()
                self._last_size = plan.padded_size

        if mask is None:
            return run(image)
        facts = {"masked": True, "batch": len(image), "free_bytes": free_bytes, "device": place}
        self.expect_memory(*image.shape[-2:], chosen, **facts)
        result, box, report = region.restore_within(mask, image, chosen, run)
        if report is None:
            nothing = replace(planned(image, free_bytes), grid=NO_TILES)
            report = Report(
                model=self.name,
                settings=chosen,
                plan=nothing,
                dtype=self.precision.name,
                licence=self.licence,
                input_size=nothing.input_size,
                output_size=nothing.output_size,
            )
        return result, replace(
            report,
            mask=region.told(box, image.shape[-1], image.shape[-2]),
            input_size=tuple(image.shape[-2:]),
            output_size=tuple(result.shape[-2:]),
        )

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
        """What `restore` will do with pictures of this size, without running. `NotEnoughMemory`."""
        settings = settings or Settings()
        return self._case(height, width, settings, batch, free_bytes, device).made()

    def expect_memory(
        self,
        height: int,
        width: int,
        settings: Settings | None = None,
        *,
        masked: bool = False,
        batch: int = 1,
        free_bytes: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """`NotEnoughMemory` where pictures of this size, as a file's header tells it, and their
        results cannot be held. masked: whether a mask will choose a part of them."""
        case = self._case(height, width, settings or Settings(), batch, free_bytes, device)
        replace(case, masked=masked).expect_memory()

    def _case(
        self,
        height: int,
        width: int,
        settings: Settings,
        batch: int,
        free_bytes: int | None,
        device: torch.device | str | None,
    ) -> plan.Case:
        """What a plan goes by."""
        if not all(isinstance(side, Integral) and side >= 1 for side in (height, width, batch)):
            raise ValueError(
                f"a picture's height and width and how many there are must be whole numbers from 1 up, "
                f"got {height!r}, {width!r} and {batch!r}"
            )
        place = self.device if device is None else torch.device(device)
        guidance = self.guidance(settings)
        return plan.Case(
            config=self.network.config,
            settings=settings,
            height=height,
            width=width,
            images=batch,
            train_tile=self.header.tile,
            free=devices.free_bytes(place) if free_bytes is None else free_bytes,
            bytes_each=max(self.precision.vae.itemsize, self.precision.unet.itemsize),
            dtype=str(self.precision),
            device=str(place),
            batched=place.type not in ("cpu", "mps"),
            guidance=guidance,
            min_side=self.header.min_side,
            speed=self.speed.name,
            on_device=self.runner.on_device,
            main_memory=None if place.type == "cpu" else devices.free_bytes(torch.device("cpu")),
        )

    def prompt(self, embedding: Tensor, device: torch.device) -> Prompt:
        """A prompt's embedding 1 n d in the form that the network takes. ValueError for a wrong one."""
        width = self.network.config.unet.cross_attention_dim
        if not isinstance(embedding, Tensor):
            raise ValueError(f"a prompt must be a tensor 1 n d, got {type(embedding).__name__}")
        if embedding.dim() != 3 or embedding.shape[0] != 1 or embedding.shape[-1] != width:
            raise ValueError(
                f"the prompt is {tuple(embedding.shape)}, {self.name} reads (1, n, {width}): encode it "
                "with the text encoder that the model was trained with, or give none"
            )
        if not bool(torch.isfinite(embedding).all()):
            raise ValueError("the prompt holds NaN or infinity: encode it again")
        kept = self._prompt
        if kept is None or not torch.equal(kept[0], embedding.cpu()):
            try:
                kept = embedding.detach().cpu().clone(), self.network.prompt(embedding.cpu())
            except ValueError as error:
                raise ValueError(f"{self.name} can't take a prompt: {error}") from error
            self._prompt = kept
        dtype = self.network.compute[1] or torch.float32

        def there(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype)

        if isinstance(kept[1], Tensor):
            return there(kept[1])
        return {place: (there(key), there(value)) for place, (key, value) in kept[1].items()}

    def guidance(self, settings: Settings) -> float:
        """The guidance in force: the person's, else the file's. ValueError where it can't be had."""
        asked = settings.guidance
        value = float(self.header.guidance if asked is None else asked)
        if value > 1 and self.network.prompts < 2:
            raise ValueError(
                f"{self.name} holds no negative prompt, so guidance must be 1, got {value:g}: "
                "raise `detail` instead for a stronger effect"
            )
        return value
