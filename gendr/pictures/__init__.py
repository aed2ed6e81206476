"""Files to tensors and back, without losing what a file knows: 16 bits, alpha, grey, EXIF, ICC."""

from .kinds import (
    FORMATS,
    MAX_PIXELS,
    CutShortError,
    Format,
    Picture,
    PictureError,
    TooLargeError,
)
from .reading import measure, read
from .writing import write

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "CutShortError",
    "Format",
    "Picture",
    "PictureError",
    "TooLargeError",
    "measure",
    "read",
    "write",
]
