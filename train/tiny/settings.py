"""Settings of GenDR-Tiny's own trainings in pixels: the one home of their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.data.degradations import MIXES
from train.pairs import parse_weights
from train.recipe import setting
from train.tiny.fresh import Scales

# May differ when a run is resumed: they change where things lie, not the result.
FREE = ("data", "pictures", "autoencoder", "init", "workers", "save_every", "hours")
PRECISION = "autocast; fp32 for CPUs that only emulate bf16 (without avx512_bf16)"


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """Settings of train.autoencoder."""

    data: str = setting("", "folder of shards made by train.pairs")
    steps: int = setting(3000, "of the whole run")
    batch: int = setting(8, "crops per step")
    crop: int = setting(128, "pixels, a multiple of 8")
    # Without normalisation 1e-3 drove the activations to 1e5 and the networks silent.
    lr: float = setting(2e-4, "learning rate at its highest")
    warmup: int = setting(250, "steps of linear warm-up")
    precision: Literal["bf16", "fp32"] = setting("bf16", PRECISION)
    ema: float = setting(0.999, "decay of the averaged weights")
    seed: int = setting(0, "of data and new weights")
    save_every: int = setting(500, "steps")

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("give --data: a folder of shards made by train.pairs")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of train.restorer."""

    data: str = setting("", "folder of shards made by train.pairs")
    pictures: str = setting("", "folder of pictures instead: pairs are made as training goes")
    scales: str = setting(
        "4=.5,2=.2,1-4=.3",
        "of fresh pairs: scale=weight or low-high=weight, separated by commas",
    )
    clean: float = setting(0.35, "share of fresh pairs that are only reduced")
    teacher: str = setting(
        "", "a restorer that spandrel can read, for damaged fresh pairs of large scales"
    )
    teacher_later: bool = setting(
        False,
        "run the teacher on --device, a batch at a time, for fresh pairs of x4 alone: where a "
        "graphics card trains and processes make the pairs",
    )
    mix: str = setting("tiny", f"of the others' degradations: {', '.join(MIXES)}")
    drawn: float = setting(0.06, "share of text and line art among fresh pairs")
    flat: float = setting(0.03, "share of empty paper among fresh pairs")
    weights: str = setting("", "chance of each source of pictures: SOURCE=FACTOR,...")
    workers: int = setting(0, "processes that make fresh pairs")
    reuse: int = setting(
        1,
        "steps for each batch of fresh pairs: more than 1 where a card is quicker than the processes; "
        "steps then draw from the last --held batches and turn and mirror what they get",
    )
    held: int = setting(64, "batches that lie on the device for that")
    autoencoder: str = setting("", "run folder of train.autoencoder to begin from")
    init: str = setting(
        "",
        "run folder of train.restorer to begin from instead, its discriminator included, or a "
        "GenDR-Tiny checkpoint",
    )
    name: str = setting("GenDR-Tiny", "written into the exported file")
    steps: int = setting(8000, "of the whole run")
    batch: int = setting(8, "crops per step")
    crop: int = setting(128, "pixels of the result")
    lr: float = setting(5e-4, "learning rate of the UNet at its highest")
    lr_vae: float = setting(
        3e-4,
        "of the autoencoder, which has no normalisation: 6e-4 drove its activations to 1e5",
    )
    freeze_encoder: bool = setting(
        False, "keep the latent: a base that was trained in it still fits"
    )
    warmup: int = setting(250, "steps of linear warm-up")
    schedule: Literal["cosine", "cosine_by_time", "constant_with_warmup"] = setting(
        "cosine",
        "cosine_by_time: over --hours instead of --steps, where the end is known and the speed is "
        "not; constant for a stretch whose end is not known yet",
    )
    precision: Literal["bf16", "fp32"] = setting("bf16", PRECISION)
    precision_features: Literal["bf16", "fp32"] = setting(
        "fp32", "of the perceptual network and the discriminators"
    )
    teacher_share: float = setting(0.85, "of the pixel loss; the rest is to the clean crop")
    gradient: float = setting(0.5, "weight of the edge term")
    grid: float = setting(
        0.0, "weight of the pattern of 8 px that the decoder's cells leave in the error: 2"
    )
    perceptual: float = setting(0.0, "weight of the distance of EfficientNet-Lite0's features: 1")
    perceptual_to: Literal["hr", "teacher", "both"] = setting(
        "hr", "what that distance is measured to; both: the mean of the two"
    )
    autoencode: float = setting(0.25, "share of the batch that goes through the autoencoder alone")
    adversarial: float = setting(
        0.0,
        "pull of the discriminators relative to the regression's, at the last layer: 0.5",
    )
    real: Literal["", "teacher", "hr"] = setting(
        "",
        "what the discriminator takes for real; empty = the teacher's results, where they are "
        "targets, or else hr",
    )
    matching: float = setting(0.0, "weight of the discriminator's features: 1")
    adversarial_from: float = setting(
        0.0, "share of the run, of its steps or its hours, before any discriminator begins"
    )
    clean_pull: float = setting(
        1.0, "part of the discriminator's pull that reaches clean fresh pairs, which need it least"
    )
    judge: Literal["patch", "features", "both"] = setting(
        "patch", "the discriminator sees pixels, or the features of --perceptual; both: one of each"
    )
    judge_width: int = setting(32, "of the discriminator")
    alone: int = setting(100, "steps that the discriminator learns alone first")
    ema: float = setting(0.999, "decay of the averaged weights")
    seed: int = setting(0, "of data and new weights")
    save_every: int = setting(250, "steps")
    hours: float = setting(0.0, "stop and save after so many; 0 = at the last step")

    def __post_init__(self) -> None:
        if bool(self.data) == bool(self.pictures):
            raise ValueError("give --data (shards) or --pictures (fresh pairs), one of the two")
        if self.mix not in MIXES:
            raise ValueError(f"there is no mix {self.mix!r}: choose one of {', '.join(MIXES)}")
        Scales.parse(self.scales)
        parse_weights(self.weights)
        if self.pictures and self.taught != bool(self.teacher):
            raise ValueError(
                "fresh pairs need --teacher for --teacher-share above 0 or --real teacher, and only "
                "then"
            )
        if self.judge != "patch" and self.adversarial and not self.perceptual:
            raise ValueError(
                f"--judge {self.judge} looks at what --perceptual computes: give it a weight"
            )
        if self.schedule == "cosine_by_time" and not self.hours:
            raise ValueError("--schedule cosine_by_time needs --hours: it falls to zero over them")
        if self.reuse < 1 or self.held < 1:
            raise ValueError("--reuse and --held are at least 1")
        if self.reuse > 1 and not self.pictures:
            raise ValueError("--reuse is for fresh pairs: give --pictures, or leave it at 1")
        if self.judge == "features" and self.matching:
            raise ValueError(
                "--matching compares features of --judge patch or both; --perceptual does it here"
            )
        if bool(self.autoencoder) == bool(self.init):
            raise ValueError(
                "give --autoencoder or --init, one of the two: the latent must come from somewhere"
            )

    @property
    def taught(self) -> bool:
        """Whether batches must hold a teacher's results."""
        return bool(self.teacher_share) or self.real == "teacher"

    @property
    def judges(self) -> tuple[Literal["patch", "features"], ...]:
        """The discriminators that there are."""
        if not self.adversarial:
            return ()
        return ("patch", "features") if self.judge == "both" else (self.judge,)

    @property
    def compared(self) -> tuple[Literal["hr", "teacher"], ...]:
        """The parts of a batch that the features of a result are compared with."""
        return ("hr", "teacher") if self.perceptual_to == "both" else (self.perceptual_to,)

    @property
    def truth(self) -> Literal["teacher", "hr"]:
        """The part of a batch that the discriminator takes for real."""
        return self.real or ("teacher" if self.teacher_share else "hr")
