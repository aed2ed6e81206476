"""The door through which ComfyUI loads this pack. Anywhere else it stays shut."""

import importlib.util

# Test runners import a root __init__.py as well, sometimes as a package of its own. Only where
# ComfyUI's `folder_paths` can be found is there anything behind this door.
if __package__ and importlib.util.find_spec("folder_paths"):
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    WEB_DIRECTORY = "./web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
