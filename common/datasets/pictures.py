"""One picture file of any size and mode, as 8-bit pixels of the size that a network takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.datasets.base import UInt8Array
from common.datasets.identity import picture_digest
from common.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
# Only these decoders run: Pillow knows some forty formats, among them ones that start programs.
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM")
# A single-cell or radiology picture has a few megapixels; a small file that unpacks to more is a
# whole slide or a decompression bomb, and either would exhaust a hospital's memory.
MAX_PIXELS = 50_000_000
MAX_BYTES = 8 * MAX_PIXELS
"""Of a file: four channels of 16 bits a pixel, not compressed at all."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as the network takes it, and which one it is.

    ``pixels`` is uint8 (image_size, image_size, 3), three equal channels where not ``colour``;
    ``digest`` is the :func:`~common.datasets.identity.picture_digest` of its 8-bit pixels in full
    resolution, before crop and resize.
    """

    pixels: UInt8Array
    colour: bool
    digest: bytes


def read_picture(path: Path, image_size: int, crop: int = 0) -> Picture:
    """Return the picture at ``image_size`` square.

    The centre square is cut out (``crop`` pixels wide; 0: as large as fits) and resized. A crop,
    since squeezing a rectangle would change cell shapes, which are what the classes are about;
    bilinear with area support, MedMNIST's own way, which neither rings nor leaves out pixels.
    Camera rotation is undone, transparency lies on white (the empty field of a microscope), and
    16-bit values are divided by 256: one rule for all, since stretching each picture's contrast
    would erase differences in stain. The digest is of the decoder's pixels: for JPEG those of
    libjpeg-turbo, which all of Pillow's wheels use; a test holds their value.

    Raises :class:`DataError`, naming the file, when it is no readable picture, has more than
    ``MAX_PIXELS`` or ``MAX_BYTES``, several pages, floating-point pixels, or fewer pixels than
    ``crop``.
    """
    from PIL import Image, ImageOps

    if image_size < 1 or crop < 0:
        raise DataError(
            f"The image size is {image_size} and the crop {crop}.",
            "Give a size of 1 or more and a crop of 0 (none) or more pixels.",
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(
                f"{path} has more than {MAX_BYTES // 1_000_000} MB.",
                "Cut the regions of interest out of it, or take it out of the folder.",
            )
        with Image.open(path, formats=_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise _too_large(path, f"{opened.width} x {opened.height}")
            pages = getattr(opened, "n_frames", 1)
            if pages > 1 and opened.format != "MPO":  # MPO: a camera's JPEG with a preview
                raise DataError(
                    f"{path} holds {pages} pages.", "Save each page as a picture of its own."
                )
            plain = _eight_bit(path, ImageOps.exif_transpose(opened))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, "too many") from error
    except DataError:
        raise
    except Exception as error:  # a decoder fed with damaged bytes may raise anything at all
        raise DataError(
            f"{path} cannot be read as a picture ({error}).",
            "Open it in a viewer; replace it, or take it out of the folder.",
        ) from error
    side = crop or min(plain.size)
    if side > min(plain.size):
        raise DataError(
            f"{path} is {plain.width} x {plain.height}, smaller than the crop of {crop} pixels.",
            "Choose a smaller crop, or 0 for the largest centre square.",
        )
    left, top = (plain.width - side) // 2, (plain.height - side) // 2
    square = plain.crop((left, top, left + side, top + side))
    small = square.resize((image_size, image_size), Image.Resampling.BILINEAR)
    whole = np.asarray(plain, dtype=np.uint8)
    digest = picture_digest(whole if whole.ndim == 3 else whole[..., np.newaxis])
    return Picture(np.asarray(small.convert("RGB"), dtype=np.uint8), small.mode == "RGB", digest)


def _too_large(path: Path, pixels: str) -> DataError:
    return DataError(
        f"{path} has {pixels} pixels; the limit is {MAX_PIXELS // 1_000_000} million.",
        "Cut the regions of interest out of it, or take it out of the folder.",
    )


def _eight_bit(path: Path, picture: Image) -> Image:
    """Return the picture in mode L (grey) or RGB."""
    from PIL import Image

    mode = picture.mode
    transparent = mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in picture.info
    if mode in ("L", "RGB") and not transparent:
        picture.load()
        return picture
    if mode == "1":
        return picture.convert("L")
    if mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"{path} has pixel values from {values.min()} to {values.max()}.",
                "Save it with 8 or 16 bits a pixel.",
            )
        return Image.fromarray((values // 256).astype(np.uint8))
    if mode == "F":
        raise DataError(f"{path} has floating-point pixels.", "Save it with 8 or 16 bits a pixel.")
    if transparent:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        flat = Image.alpha_composite(white, layer)
        return flat.convert("L" if mode in ("L", "LA", "La") else "RGB")
    return picture.convert("RGB")  # palette, CMYK, YCbCr, Lab, HSV
