"""Draws docs/corruptions.png, from a phantom: python docs/corruptions.py [FILE]."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from train.data.phantoms.chest_ct import chest_slice  # noqa: E402
from train.degradations import fixed_seeds, parse  # noqa: E402
from train.outputs.figures import style  # noqa: E402

SHOWN = {
    "clean": None,
    "histogram-mask": "histogram-mask:0.6,0.6",
    "histogram-mask (shuffle)": "histogram-mask:0.6,0.6,shuffle",
    "frequency-mask": "frequency-mask:0.6,0.6",
    "low-frequency-noise": "low-frequency-noise:0.15,0.25,0.0015,0",
    "zero-mask (MAE)": "zero-mask",
    "frequency-disc (MFM), kept": "frequency-disc:0.0714,1",
    "frequency-disc (MFM), removed": "frequency-disc:0.0714,0",
}


def main(path: Path) -> None:
    """A row of images, and below each the logarithm of its spectrum's magnitudes, frequency 0 in the middle."""
    from matplotlib import rc_context

    clean = torch.from_numpy(chest_slice(3, diseased=True, size=128))[None, None].float() / 255
    with rc_context(style.STYLE):
        grid = style.Grid(columns=len(SHOWN), side=1.1, ratio=1, left=0.1, right=0.1, above=[0.95, 0.08], bottom=0.1)
        style.title(grid.figure, "Corruptions of pre-trainings", "phantom", left=0.1)
        for column, (name, task) in enumerate(SHOWN.items()):
            degrade = None if task is None else parse(task)
            image = (clean if degrade is None else degrade(clean, fixed_seeds(degrade, ["1"])))[0]
            axes = grid.image(0, column)
            # What has no mean has a gray of its own.
            shift = 0.5 if name.endswith("removed") else 0.0
            axes.imshow(style.shown(image + shift), cmap="gray", vmin=0, vmax=1)
            axes.set_title(style.wrapped(name, 15), fontsize=7.5)
            magnitudes = np.abs(np.fft.fftshift(np.fft.fft2(image[0].numpy())))
            grid.image(1, column).imshow(np.log10(magnitudes + 1e-1), cmap=style.ATTENTION, vmin=-1, vmax=4)
        style.save(grid.figure, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "corruptions.png")
