"""The nodes of the pack. Their ids and the order of their widgets are an API: saved workflows
name the ones and count the others. Append, never insert or rename.
"""

from . import host
from .load import LoadGenDR
from .upscale import GenDRUpscale, TiledGenDR

host.register_folder()

NODE_CLASS_MAPPINGS = {
    "LoadGenDR": LoadGenDR,
    "GenDRUpscale": GenDRUpscale,
    "TiledGenDR": TiledGenDR,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadGenDR": "Load GenDR",
    "GenDRUpscale": "GenDR Upscale",
    "TiledGenDR": "Tiled GenDR",
}
