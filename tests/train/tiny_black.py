"""The command line of :mod:`tests.train.tiny` with a black first test image."""

from __future__ import annotations

import dataclasses
import sys

import torch

from . import tiny


def phantom(self: tiny.Tiny, *, channels: int, **options: object) -> tiny.ImageData:
    data = tiny.image_data(channels)
    images = data.test.images.copy()
    images[0] = 0
    return dataclasses.replace(data, test=dataclasses.replace(data.test, images=images))


if __name__ == "__main__":
    from train.run import main

    tiny.Tiny.phantom = phantom  # type: ignore[method-assign]
    torch.set_num_threads(1)
    sys.exit(main())
