"""From image files to arrays: whatever the mode, the size and the file name's ending, the content decides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from train.data.base import DataError

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"}


def decode_image(path: Path, *, size: int, channels: int) -> np.ndarray:
    """Reads one image file and resizes the whole image to a square.

    Transparent pixels are composited over black, the background of a CT slice. Grey is ITU-R 601 luma. The filter is
    Pillow's Lanczos: its support grows with the reduction, so it does not alias, it keeps more of the fine detail that
    a denoiser is asked to restore than a box does, and images smaller than ``size`` do not turn into blocks. The whole
    image is squeezed into the square, as is usual for these data: cropping would cut off lungs.

    :param path: PNG, JPEG or anything else Pillow reads, 8 bits per channel.
    :param size: side of the result in pixels.
    :param channels: 1 (grey) or 3 (RGB).
    :returns: ``uint8 [size, size, channels]``.
    :raises DataError: the file is missing, damaged or not an 8-bit image.
    """
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            if image.mode not in _MODES:
                raise DataError(f"{path}: mode {image.mode!r} is not an 8-bit image; convert it to grey or RGB first")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            image = image.convert("L" if channels == 1 else "RGB")
            pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
    except DataError:
        raise
    # Pillow's readers fail in many ways on damaged files (OSError, SyntaxError, ValueError, struct.error, ...).
    except Exception as error:
        raise DataError(f"{path} cannot be read as an image ({error}); restore the file from the data set") from error
    return pixels.reshape(size, size, channels)


def decode_images(
    paths: Sequence[Path], *, size: int, channels: int, progress: bool = False, what: str = "images"
) -> np.ndarray:
    """Reads many image files, on every core.

    :param progress: show a progress bar on stderr.
    :param what: what the bar says is being decoded.
    :returns: ``uint8 [N, size, size, channels]``, in the order of ``paths``.
    :raises DataError: of the first file that :func:`decode_image` refuses.
    """
    from rich.console import Console
    from rich.progress import track

    images = np.empty((len(paths), size, size, channels), dtype=np.uint8)
    # Threads suffice: Pillow lets go of the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(lambda path: decode_image(path, size=size, channels=channels), paths)
        bar = track(decoded, f"Decoding {what}", len(paths), console=Console(stderr=True), disable=not progress)
        try:
            for image, pixels in zip(images, bar, strict=True):
                image[...] = pixels
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a damaged file is reported now, not after all others are read
            raise
    return images
