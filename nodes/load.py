"""Load GenDR: a model file becomes a GENDR_MODEL."""

from __future__ import annotations

from ..gendr.settings import DTYPES
from . import host


class LoadGenDR:
    """Choose a model file. ComfyUI keeps the result until an input or the file changes."""

    CATEGORY = "image/upscaling"
    FUNCTION = "load"
    RETURN_TYPES = ("GENDR_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The restoration model, for GenDR Upscale and Tiled GenDR.",)
    DESCRIPTION = "Loads a GenDR model. GenDR-Tiny comes with the pack; nothing is downloaded."
    SEARCH_ALIASES = (
        *("load upscale model", "upscale model", "super resolution", "restore", "gendr"),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """Read anew on every refresh, so that a file added to the folder appears."""
        return {
            "required": {
                "model": (
                    host.model_names(),
                    {
                        "default": host.EMBEDDED,
                        "tooltip": "GenDR-Tiny comes with the pack: small, and quick even without "
                        "a graphics card. Other files are read from models/gendr; put one there "
                        "and press R to see it here.",
                    },
                ),
                "dtype": (
                    list(DTYPES),
                    {
                        "default": DTYPES[0],
                        "tooltip": "Number format of the computation. auto takes what your card "
                        "is good at. Choose fp32 if results look wrong on an old card: slower, "
                        "and twice the memory.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, model: str, dtype: str) -> str:
        """A replaced file is loaded again; so is one under another dtype, by ComfyUI itself."""
        return host.file_stamp(model)

    def load(self, model: str, dtype: str) -> tuple:
        """Name from the list, number format -> GENDR_MODEL."""
        with host.plain_errors():
            return (host.load(host.model_path(model), dtype),)
