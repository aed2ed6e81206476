"""Settings of a stage 1 run: the one home of their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gendr import schedule
from train.recipe import setting
from train.stage1 import pretrained

# May differ when a run is resumed: they change where things lie and what is shown, not the result.
FREE = ("data", "base", "vae", "encoder", "workers", "log_every", "save_every", "validate")
FREE += ("validate_every", "samples", "micro_batch", "ema_on_cpu", "recompute", "compile")
FREE += ("save_minutes", "export_every", "captioned", "hours")
KINDS = ("adapt", "full", "refine")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What decides the loss.

    posterior: `mode` for autoencoders whose variance was never trained.
    """

    prediction: schedule.Prediction
    lambda_repa: float
    drop: float
    posterior: Literal["sample", "mode"]
    scale: int
    seed: int


@dataclass(frozen=True)
class Phase:
    """Steps first+1..last of a run, all alike. refine: with quality terms."""

    kind: str
    size: int
    first: int
    last: int
    micro_batch: int
    lr: float

    @property
    def refine(self) -> bool:
        return self.kind == "refine"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a stage 1 run; the defaults are the paper's where it gives them."""

    base: str = setting(
        pretrained.SD21, "SD2.1: hub id, folder or file; a GenDR checkpoint; empty = from nothing"
    )
    revision: str = setting("", "commit or tag of the base on the hub")
    channels: int = setting(16, "of the latent; 4 keeps SD2.1's own")
    vae: str = setting(
        "", f"autoencoder: id, folder, file or GenDR checkpoint; empty = {pretrained.VAE16}, or the "
        "base's own for 4 channels"
    )  # fmt: skip
    prompts: str = setting(
        "captions", "captions = each picture's, by the base's text encoder; a file made by "
        "train.embeddings; random = fixed random vectors, for a network from nothing"
    )  # fmt: skip
    captioned: float = setting(
        0.9, "smallest share of pictures with a caption, where captions are used"
    )
    data: tuple[str, ...] = setting((), "folders or tars of pictures, or one folder of ready pairs")
    weights: tuple[float, ...] = setting(
        (), "chance of each of `data`; empty = by their numbers of pictures"
    )
    span: float = setting(
        1.5, "a picture's short side is reduced to between 1 and this many crops before the crop, so "
        "that its caption fits; 0 = crops of pictures as they are"
    )  # fmt: skip
    phases: tuple[str, ...] = setting(("full", "full", "refine"), "in order: adapt, full, refine")
    sizes: tuple[int, ...] = setting((512, 1024, 512), "pixels of the crop in each phase")
    steps: tuple[int, ...] = setting((70_000, 30_000, 10_000), "of each phase")
    micro_batch: tuple[int, ...] = setting((32, 8, 32), "pictures at a time in one process")
    lr: tuple[float, ...] = setting((1e-5,), "learning rate of each phase")
    batch: int = setting(2048, "pictures per step, over all processes and micro-batches")
    warmup: int = setting(1000, "steps of linear warm-up at the beginning of each phase")
    workers: int = setting(8, "processes that read pictures")
    seed: int = setting(0, "of data, noise and new weights")
    prediction: schedule.Prediction = setting("epsilon", "what the network estimates")
    alpha: float = setting(
        0.5, "alpha = beta of Eq. 2 in the exported file; 0 = 1 / (1 + beta_bar_500): a v-prediction "
        "UNet with a zero last layer then returns its input"
    )  # fmt: skip
    encoder: str = setting("dinov2-b", "DINOv2 for the alignment: a name, hub id or folder")
    lambda_repa: float = setting(0.5, "weight of the alignment; 0 = none")
    drop: float = setting(0.1, "share of empty prompts")
    posterior: Literal["sample", "mode"] = setting(
        "sample", "latents to train on; mode where the autoencoder's variance was never trained"
    )
    mix: str = setting(
        "paper", "mixture of degradations in refinement, see train.data.degradations"
    )
    codecs: Literal["all", "present"] = setting(
        "all", "whether every codec of the mixture must work here, or the others take its share"
    )
    scale: int = setting(4, "how many times smaller the damaged copy is")
    beta1: float = setting(0.9, "AdamW")
    beta2: float = setting(0.999, "AdamW")
    weight_decay: float = setting(1e-2, "AdamW")
    clip: float = setting(1.0, "largest gradient norm")
    ema: float = setting(0.9999, "decay of the averaged weights; 0 = none")
    ema_every: int = setting(1, "steps between two updates of the average")
    ema_on_cpu: bool = setting(False, "keep the average in the CPU's memory")
    precision: Literal["bf16", "fp32"] = setting("bf16", "autocast; weights in training stay fp32")
    recompute: bool = setting(True, "gradient checkpointing: less memory, a third more time")
    compile: bool = setting(False, "torch.compile of the frozen autoencoder and DINOv2")
    validate: str = setting("", "folder of pictures to look at; empty = crops of the training data")
    validate_every: int = setting(1000, "steps")
    samples: int = setting(4, "pictures to look at")
    export_every: int = setting(5000, "steps between numbered copies of the model; 0 = none")
    save_every: int = setting(500, "steps")
    save_minutes: float = setting(0.0, "save after so many minutes as well; 0 = by steps alone")
    hours: float = setting(0.0, "stop after so many hours, saved and to be resumed; 0 = at the end")
    log_every: int = setting(10, "steps")
    name: str = setting("SD2.1-VAE16", "written into the exported file")
    licence: str = setting("", "written into the exported file; empty = the base's")

    def __post_init__(self) -> None:
        if not self.phases or set(self.phases) - set(KINDS):
            found = ", ".join(self.phases) or "none"
            raise ValueError(f"phases are one or more of {', '.join(KINDS)}, not {found}")
        for name in ("sizes", "steps", "micro_batch", "lr"):
            if len(getattr(self, name)) not in (1, len(self.phases)):
                raise ValueError(
                    f"{name} needs one value for all or one for each of the {len(self.phases)} "
                    f"phases, not {len(getattr(self, name))}"
                )
        if self.lambda_repa and not self.encoder:
            raise ValueError("lambda_repa aligns with DINOv2: name an encoder, or set it to 0")
        if self.channels not in (4, 16):
            raise ValueError(f"the latent has 16 channels, or SD2.1's own 4, not {self.channels}")
        if not self.base and (self.prompts == "captions" or not self.vae):
            raise ValueError(
                "a network from nothing has no text encoder and no autoencoder: give --vae a GenDR "
                "checkpoint, and --prompts random or a file"
            )
        if self.span and self.span < 1:
            raise ValueError(
                f"span is at least 1 crop, or 0 for pictures as they are, not {self.span}"
            )
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(
                f"weights needs one number for each of data: {len(self.data)}, not "
                f"{len(self.weights)}"
            )
        if not self.alpha and self.prediction == "epsilon":
            raise ValueError("alpha 0 means the constant for velocities: set it to 0.5 for epsilon")

    def plan(self) -> list[Phase]:
        """The phases with their first and last step."""
        found, at = [], 0
        for n, kind in enumerate(self.phases):
            size, steps, micro, lr = (
                values[n if len(values) > 1 else 0]
                for values in (self.sizes, self.steps, self.micro_batch, self.lr)
            )
            found.append(Phase(kind, size, at, at + steps, micro, lr))
            at += steps
        return found

    @property
    def rules(self) -> Rules:
        """What the loss takes from the settings."""
        return Rules(
            prediction=self.prediction,
            lambda_repa=self.lambda_repa,
            drop=self.drop,
            posterior=self.posterior,
            scale=self.scale,
            seed=self.seed,
        )

    @property
    def constant(self) -> float:
        """alpha = beta of Eq. 2."""
        return self.alpha or 1 / (1 + float(schedule.beta_bar(500)))

    @property
    def refines(self) -> bool:
        """Whether pictures are damaged in any phase."""
        return "refine" in self.phases
