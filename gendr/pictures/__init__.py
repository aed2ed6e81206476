"""Files to tensors and back, without losing what a file knows: 16 bits, alpha, grey, EXIF, ICC."""

from .kinds import FORMATS, Format, Picture, PictureError
from .reading import read
from .writing import write

__all__ = ["FORMATS", "Format", "Picture", "PictureError", "read", "write"]
