"""Nodes for the tests alone, put into the server's custom nodes: exact pictures in and out."""

import os

import folder_paths
import torch


class ProbePicture:
    """Repeatable noise of any size, depth and type, b h w c."""

    CATEGORY = "tests"
    FUNCTION = "make"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        number = ("INT", {"default": 1, "min": 0, "max": 4096})
        names = ("batch", "height", "width", "channels", "seed")
        kind = (["float32", "float16", "bfloat16", "float64"],)
        return {"required": {**dict.fromkeys(names, number), "kind": kind}}

    def make(self, batch, height, width, channels, seed, kind):
        generator = torch.Generator().manual_seed(seed)
        picture = torch.rand(batch, height, width, channels, generator=generator)
        return (picture.to(getattr(torch, kind)),)


class ProbeMask:
    """White in a rectangle, b h w."""

    CATEGORY = "tests"
    FUNCTION = "make"
    RETURN_TYPES = ("MASK",)

    @classmethod
    def INPUT_TYPES(cls):
        number = ("INT", {"default": 1, "min": 0, "max": 4096})
        return {
            "required": dict.fromkeys(
                ("batch", "height", "width", "top", "bottom", "left", "right"), number
            )
        }

    def make(self, batch, height, width, top, bottom, left, right):
        mask = torch.zeros(batch, height, width)
        mask[:, top:bottom, left:right] = 1
        return (mask,)


class ProbeNumber:
    """A number that comes over a wire, past the widget's bounds."""

    CATEGORY = "tests"
    FUNCTION = "make"
    RETURN_TYPES = ("FLOAT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("FLOAT", {"default": 1.0, "min": -1e9, "max": 1e9})}}

    def make(self, value):
        return (value,)


class ProbePrompt:
    """Noise as a text encoder would send it: an embedding 1 n d and facts beside it."""

    CATEGORY = "tests"
    FUNCTION = "make"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        number = ("INT", {"default": 1, "min": 0, "max": 4096})
        return {"required": dict.fromkeys(("tokens", "width", "seed"), number)}

    def make(self, tokens, width, seed):
        generator = torch.Generator().manual_seed(seed)
        return ([[torch.randn(1, tokens, width, generator=generator), {"pooled_output": None}]],)


class ProbeKeep:
    """Writes a picture as it is, without the rounding of Save Image, and the model's own words."""

    CATEGORY = "tests"
    FUNCTION = "keep"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"image": ("IMAGE",), "name": ("STRING", {"default": "picture"})},
            "optional": {"model": ("GENDR_MODEL",)},
        }

    def keep(self, image, name, model=None):
        torch.save(image.clone(), os.path.join(folder_paths.get_output_directory(), f"{name}.pt"))
        facts = [str(image.dtype), str(image.device), str(image.is_contiguous()), repr(model)]
        return {"ui": {"text": facts}}


class ProbeKeepPrompt:
    """Writes the embedding of a CONDITIONING of one text."""

    CATEGORY = "tests"
    FUNCTION = "keep"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"prompt": ("CONDITIONING",), "name": ("STRING", {})}}

    def keep(self, prompt, name):
        ((embedding, _),) = prompt
        path = os.path.join(folder_paths.get_output_directory(), f"{name}.pt")
        torch.save(embedding.cpu().clone(), path)
        return {}


NODES = (ProbePicture, ProbeMask, ProbeNumber, ProbePrompt, ProbeKeep, ProbeKeepPrompt)
NODE_CLASS_MAPPINGS = {c.__name__: c for c in NODES}
