"""What is wrong with a file that is no picture, in sentences for the person who has it."""

from __future__ import annotations

from pathlib import Path

from .kinds import PictureError

PICTURE_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"8BPS": "Photoshop file",
}
# Pictures of kinds that are not read here.
NOT_READ = {
    b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cJXL ": "a JPEG XL picture",
    b"\x76\x2f\x31\x01": "an OpenEXR picture",
    b"#?RADIANCE": "a Radiance HDR picture",
    b"#?RGBE": "a Radiance HDR picture",
    b"gimp xcf": "a GIMP picture",
    b"II\xbc\x01": "a JPEG XR picture",
    b"FLIF": "a FLIF picture",
    b"BPG\xfb": "a BPG picture",
}
OTHER_STARTS = {
    b"%PDF": "a PDF document; export its page as PNG",
    b"PK\x03\x04": "a ZIP archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"\x1f\x8b": "a compressed file; unpack it first",
    b"<svg": "an SVG drawing; export it as PNG",
    b"<?xml": "an XML file, perhaps an SVG drawing; export it as PNG",
    b"<": "a web page; the download went wrong, save the picture itself",
    b"{": "a text file (JSON)",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
}


def what_is(path: Path) -> str:
    """Why Pillow does not know a file, from its first bytes."""
    with path.open("rb") as file:
        start = file.read(64)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "this WebP file is cut short or damaged; get it again"
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return (
            "this TIFF is damaged, or of a kind that is not read here (such as a camera's raw "
            "data); save it as an 8 or 16-bit PNG or TIFF"
        )
    if start[4:8] == b"ftyp":
        return (
            "is a picture or video of the HEIC, AVIF or MP4 family that Pillow cannot read here; "
            "convert it to JPEG or PNG"
        )
    for magic, name in NOT_READ.items():
        if start.startswith(magic):
            return f"is {name}, which is not read here; export it as PNG, with 16 bits where it has them"
    for magic, name in PICTURE_STARTS.items():
        if start.startswith(magic):
            return f"this {name} is cut short or damaged; get it again"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, name in OTHER_STARTS.items():
        if start.startswith(magic) or text.startswith(magic.lower()):
            return f"is not a picture but {name}"
    return "is not a picture that can be read; JPEG, PNG, WebP, TIFF, GIF and BMP can, among others"


def expect_file(path: Path) -> None:
    """PictureError for what is no regular file with something in it. Nothing is opened."""
    if path.is_dir():
        raise PictureError(f"{path}: is a folder, a picture file was expected")
    if not path.exists():
        raise PictureError(f"{path}: there is no such file; check the name and the folder")
    if not path.is_file():
        raise PictureError(f"{path}: is not a regular file; copy the picture to one first")
    if path.stat().st_size == 0:
        raise PictureError(f"{path}: is empty (0 bytes); the copy or download failed, repeat it")
