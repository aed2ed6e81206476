"""Settings of a stage 2 run: the one home of their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train import losses
from train.losses import Distillation, Weights
from train.recipe import setting

# May differ when a run is resumed: they change where things lie and what is shown, not the result.
FREE = ("data", "base", "generator", "projector", "workers", "log_every", "save_every")
FREE += ("hours", "save_minutes", "export_every", "validate_every", "validate", "originals", "niqe")
FREE += ("micro_batch", "ema_on_cpu", "compile", "like", "text_encoder")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What an iteration computes. kappa: guidance of each score; drop: share of empty prompts.

    train_real: whether phi follows z_h (CiD) or stays the base (VSD, SiD). weighting: of the score
    losses. first_step, last_step: range of timesteps. clean_judge: heads see latents without noise.
    """

    distillation: Distillation
    weights: Weights
    kappa_real: float
    kappa_fake: float
    drop: float
    train_real: bool
    weighting: losses.Weighting
    first_step: int
    last_step: int
    clean_judge: bool

    @property
    def scores(self) -> bool:
        """Whether the score networks are needed at all."""
        return bool(self.weights.lambda1 or self.weights.lambda1_late)

    @property
    def judge(self) -> bool:
        """Whether the discriminator is."""
        return bool(self.weights.lambda2)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a stage 2 run; the defaults are the paper's where it gives them."""

    base: str = setting("", "GenDR checkpoint of the base: what stage 1 exports")
    generator: str = setting("", "checkpoint that the generator begins from; empty = the base")
    projector: str = setting("", "stage 1's projector.safetensors; empty = a new one")
    data: tuple[str, ...] = setting((), "folders or tars of pictures, or one folder of ready pairs")
    weights: tuple[float, ...] = setting(
        (), "chance of each of `data`; empty = by their numbers of pictures"
    )
    prompts: Literal["fixed", "captions"] = setting(
        "fixed", "what the scores are told: the base's prompt, or each picture's caption"
    )
    text_encoder: str = setting("", "for captions: Stable Diffusion 2.1, a hub id or a folder")
    crop: int = setting(512, "pixels of the clean crop")
    scale: int = setting(4, "how many times smaller the damaged copy is")
    mix: str = setting("paper", "mixture of degradations, see train.data.degradations")
    codecs: Literal["all", "present"] = setting(
        "all", "whether every codec of the mixture must work here, or the others take its share"
    )
    workers: int = setting(8, "processes that read and damage pictures")
    steps: int = setting(50_000, "generator steps")
    batch: int = setting(1024, "pictures per step, over all processes and micro-batches")
    micro_batch: int = setting(16, "pictures at a time in one process")
    seed: int = setting(0, "of data, noise and new weights")
    lr: float = setting(1e-5, "learning rate of the generator")
    lr_scores: float = setting(1e-5, "of both adapters")
    lr_heads: float = setting(1e-5, "of the discriminator's heads")
    schedule: Literal["constant_with_warmup", "cosine"] = setting(
        "constant_with_warmup", "of the generator's learning rate"
    )
    warmup: int = setting(500, "steps of linear warm-up")
    beta1: float = setting(0.9, "AdamW")
    beta2: float = setting(0.999, "AdamW")
    weight_decay: float = setting(1e-2, "of the generator; adapters and heads have none")
    clip: float = setting(1.0, "largest gradient norm of each network")
    ema: float = setting(0.999, "decay of the averaged weights; 0 = none")
    ema_every: int = setting(1, "steps between two updates of the average")
    ema_on_cpu: bool = setting(False, "keep the average in the CPU's memory")
    lora_rank: int = setting(64, "of the adapters")
    lora_alpha: float = setting(128.0, "of the adapters; their scale is lora_alpha / lora_rank")
    target: losses.Target = setting("sr", "what Eq. 8 compares the real score with")
    xi: float = setting(1.0, "share of |D|^2 that Eq. 9 takes off")
    score_grad: losses.ScoreGrad = setting(
        "both", "score networks the generator's gradient flows through"
    )
    reduction: losses.Reduction = setting("mean", "mean or sum over a sample's elements")
    reference: losses.Reference = setting("hr", "what omega(t) measures the real score against")
    kappa_real: float = setting(2.0, "guidance of the real score in the generator's loss")
    kappa_fake: float = setting(2.0, "guidance of the fake score there")
    lambda1: float = setting(10.0, "weight of the distillation, before step `late`")
    lambda1_late: float = setting(1.0, "and from there on")
    late: int = setting(10_000, "generator step at which lambda1 changes")
    lambda2: float = setting(0.01, "weight of the adversarial term; 0 = no discriminator")
    lambda3: float = setting(0.1, "weight of the alignment with DINOv2; 0 = none")
    lambda_mse: float = setting(0.1, "weight of |z_g - z_h|^2, Eq. 6")
    train_real: bool = setting(True, "let the real score follow the clean latents (CiD)")
    weighting: losses.Weighting = setting("eps", "of the score losses; x0 = as printed in Eq. 7")
    drop: float = setting(0.1, "share of empty prompts in the score losses")
    score_steps: int = setting(1, "score steps per generator step, each on its own pictures")
    first_step: int = setting(20, "smallest timestep drawn")
    last_step: int = setting(979, "largest timestep drawn")
    heads: tuple[str, ...] = setting(("mid",), "where the discriminator looks: down0 ... mid")
    head_width: int = setting(256, "channels inside a head")
    clean_judge: bool = setting(False, "show the discriminator latents without noise")
    encoder: str = setting("dinov2-b", "DINOv2 for the alignment: a name, hub id or folder")
    precision: Literal["bf16", "fp32"] = setting("bf16", "autocast; weights in training stay fp32")
    recompute: bool = setting(True, "gradient checkpointing: less memory, a third more time")
    compile: bool = setting(False, "torch.compile of the frozen autoencoder and DINOv2")
    drift: float = setting(5.0, "stop when mean|z_g - z_h| is this many times what it was")
    validate: str = setting("", "folder of damaged pictures to restore now and then")
    originals: str = setting("", "folder of their originals, by name")
    niqe: str = setting("", "BasicSR's niqe_pris_params.npz, to measure NIQE as well")
    validate_every: int = setting(1000, "steps")
    export_every: int = setting(5000, "steps between numbered copies of the model; 0 = none")
    save_every: int = setting(500, "steps")
    save_minutes: float = setting(0.0, "save after so many minutes as well; 0 = by steps alone")
    hours: float = setting(0.0, "stop after so many hours, saved and to be resumed; 0 = at the end")
    log_every: int = setting(10, "steps")
    name: str = setting("GenDR", "written into the exported file")
    like: Literal["sd21", "tiny"] = setting("sd21", "what --dry-run counts where no base is given")

    def __post_init__(self) -> None:
        if not 0 <= self.first_step <= self.last_step <= 999:
            raise ValueError("first_step and last_step are timesteps: 0 <= first <= last <= 999")
        if self.lambda3 and not self.encoder:
            raise ValueError("lambda3 aligns with DINOv2: name an encoder, or set lambda3 to 0")
        if self.prompts == "captions" and not self.text_encoder:
            raise ValueError(
                "captions need the text encoder that the base was trained with: give --text-encoder"
            )
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(
                f"weights needs one number for each of data: {len(self.data)}, not "
                f"{len(self.weights)}"
            )
        _ = self.rules  # whose parts refuse what does not go together

    @property
    def rules(self) -> Rules:
        """What an iteration takes from the settings."""
        return Rules(
            distillation=Distillation(
                target=self.target,
                xi=self.xi,
                score_grad=self.score_grad,
                reduction=self.reduction,
                reference=self.reference,
            ),
            weights=Weights(
                lambda1=self.lambda1,
                lambda1_late=self.lambda1_late,
                late=self.late,
                lambda2=self.lambda2,
                lambda3=self.lambda3,
                lambda_mse=self.lambda_mse,
            ),
            kappa_real=self.kappa_real,
            kappa_fake=self.kappa_fake,
            drop=self.drop,
            train_real=self.train_real,
            weighting=self.weighting,
            first_step=self.first_step,
            last_step=self.last_step,
            clean_judge=self.clean_judge,
        )
