"""Learned metrics, asked of pyiqa where it is installed; elsewhere each one says why it is missing.

pyiqa is an extra, not a dependency: its code is under non-commercial terms, its weights
CC BY-NC-SA, and they are downloaded on first use. Names are pyiqa's own model names, since one
metric has several weights (LIQE on KonIQ or on a mix; MANIQA on KonIQ, KADID or PIPAL) and a
table without the variant can't be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gendr.errors import first_line
from train.evaluation.metrics import ALONE, REFERENCE, Metric, as_tensor, crop_common


class Unavailable(RuntimeError):
    """A metric that can't be computed here; the message is the report's "n/a" reason."""


@dataclass(frozen=True)
class Judge:
    """A metric of the paper and the pyiqa model behind it (None: pyiqa has none)."""

    name: str
    label: str
    better: str
    group: str
    digits: int
    model: str | None
    meaning: str

    def metric(self, model: str | None = None) -> Metric:
        """As a row of the report; `model` is the variant in use."""
        model = model or self.model
        meaning = f"{self.meaning}; pyiqa's “{model}”" if model else self.meaning
        return Metric(
            self.name, self.label, self.better, self.group, self.digits, meaning,
            f"pyiqa-{installed() or 'none'}:{model}",
        )  # fmt: skip


# The paper's section 5.1, and DISTS, in the order of its tables.
PAPER = (
    Judge("lpips", "LPIPS", "lower", REFERENCE, 4, "lpips", "learned patch distance, AlexNet"),
    Judge("dists", "DISTS", "lower", REFERENCE, 4, "dists", "structure and texture distance, VGG16"),
    Judge("topiq", "TOPIQ", "higher", REFERENCE, 4, "topiq_fr", "top-down quality, KADID"),
    Judge("niqe", "NIQE", "lower", ALONE, 4, "niqe", "distance to pristine statistics"),
    Judge("pi", "PI", "lower", ALONE, 4, "pi", "perceptual index, from Ma and NIQE"),
    Judge("liqe", "LIQE", "higher", ALONE, 4, "liqe", "vision-language quality, 1 to 5"),
    Judge("maniqa", "MANIQA", "higher", ALONE, 4, "maniqa", "transformer quality"),
    Judge("clipiqa", "CLIPIQA", "higher", ALONE, 4, "clipiqa", "CLIP, good against bad photo"),
    Judge("musiq", "MUSIQ", "higher", ALONE, 2, "musiq", "multi-scale transformer, 0 to 100"),
    Judge("arniqa", "ARNIQA", "higher", ALONE, 4, "arniqa", "learned distortion manifold"),
    Judge("qalign", "Q-Align", "higher", ALONE, 4, "qalign", "language model's grade, 1 to 5"),
    Judge(
        "depictqa", "DepictQA", "higher", ALONE, 2, None,
        "a language model's pairwise choices, share in %",
    ),
)  # fmt: skip


def installed() -> str | None:
    """pyiqa's version, None without pyiqa."""
    try:
        from importlib.metadata import version

        return version("pyiqa")
    except ImportError:
        return None


def custom(model: str) -> Judge:
    """A judge for any further pyiqa model, described as pyiqa's own table does.

    Raises ValueError for a name that the installed pyiqa doesn't know.
    """
    if installed() is None:
        return Judge(model, model, "higher", ALONE, 4, model, "asked for by name")
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    if model not in DEFAULT_CONFIGS:
        raise ValueError(f"pyiqa {installed()} has no metric {model!r}: see pyiqa.list_models()")
    entry = DEFAULT_CONFIGS[model]
    better = "lower" if entry.get("lower_better") else "higher"
    group = REFERENCE if entry.get("metric_mode") == "FR" else ALONE
    return Judge(model, model, better, group, 4, model, "asked for by name")


def unavailable(judge: Judge, model: str | None, device: torch.device, forced: bool) -> str | None:
    """Why a judge can't even be tried, None when it can."""
    if judge.name == "depictqa":
        return "not in pyiqa: a pairwise language model with its own repository (DepictQA)"
    if model is None:
        return "pyiqa has no such model"
    if installed() is None:
        return "pyiqa is not installed (pip install pyiqa; its weights are CC BY-NC-SA)"
    if model.startswith(("qalign", "qrealign")) and device.type == "cpu" and not forced:
        return "a language model of billions of weights needs a GPU; name it in --metrics to force"
    return None


def open_judge(
    model: str, device: torch.device
) -> Callable[[np.ndarray, np.ndarray | None], float]:
    """A function from an 8-bit result, and its reference where the metric needs one, to a score.

    Raises Unavailable with the first line of whatever stopped pyiqa: mostly a failed download.
    """
    try:
        import pyiqa

        network = pyiqa.create_metric(model, device=device)
    except Exception as error:  # pyiqa and its many parts raise anything; the report names it
        raise Unavailable(reason_of(error)) from error

    def score(result: np.ndarray, reference: np.ndarray | None = None) -> float:
        pair = (result,) if reference is None else crop_common(result, reference)
        with torch.inference_mode():
            return float(network(*(as_tensor(p).to(device) for p in pair)))

    return score


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong, of bounded length."""
    return f"{type(error).__name__}: {first_line(error)}"
