"""Reads an image file of any of Pillow's modes as the colours a person sees."""

from __future__ import annotations

from typing import Any

from .dataset import DataError

ORIENTATION = 0x0112  # of EXIF, and of TIFF, whose numbers the others are too
BITS, PHOTOMETRIC, MIN_IS_WHITE = 258, 262, 0
WHITE_16 = 65535
# Whose "I" Pillow has read from 16 bits, the grey levels scaled to all of their range.
SIXTEEN_BITS = ("PNG", "PPM")


def read(path: str) -> Any:
    """The file's image as a PIL image in RGB, 8 bits per channel.

    Transparent parts show white, whatever colour their pixels hold. Photos stand upright, as
    EXIF says. 16-bit grey levels are divided by 257 and rounded. Of several frames the first
    is taken. Colour profiles are left alone.

    Raises:
        DataError: it can't be read, is damaged, or holds numbers that nothing says the white
            of: 32-bit integers, or floats.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return _upright(_rgb(image), image)
    except Exception as error:  # a damaged file can fail anywhere in Pillow
        problem = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: can't be read as an image ({problem})") from error


def _rgb(image: Any) -> Any:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_numbers(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    return _on_white(image.convert("RGB"), image.getchannel("A"))


def _from_numbers(image: Any) -> Any:
    import numpy
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BITS):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(
            f"its pixels are {kind}, and nothing says which number is white; convert it to 8 or "
            "16 bits"
        )
    # Fewer bits than 16 are stored as they are.
    white = WHITE_16 if image.mode == "I" else 2 ** min(tags.get(BITS, (16,))[0], 16) - 1
    numbers = numpy.asarray(image).astype(numpy.uint32)
    levels = (numbers * 255 + white // 2) // white
    if tags.get(PHOTOMETRIC) == MIN_IS_WHITE:
        levels = 255 - levels
    grey = Image.fromarray(levels.astype(numpy.uint8))
    if "transparency" not in image.info:
        return grey
    opaque = numpy.where(numbers == image.info["transparency"], 0, 255).astype(numpy.uint8)
    return _on_white(grey, Image.fromarray(opaque))


def _on_white(image: Any, alpha: Any) -> Any:
    from PIL import Image

    result = Image.new(image.mode, image.size, "white")
    result.paste(image, mask=alpha)
    return result


def _upright(image: Any, source: Any) -> Any:
    from PIL import ImageOps

    try:
        orientation = source.getexif().get(ORIENTATION, 1)
        exif = image.getexif()  # of an image that was made of another, it may be another's
        exif.clear()
        exif[ORIENTATION] = orientation
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are whole, whatever is wrong with what is said about them
        return image
