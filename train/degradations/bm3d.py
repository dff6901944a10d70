"""BM3D, for those who have installed it: stronger against white noise than non-local means, and far slower.

K. Dabov, A. Foi, V. Katkovnik, K. Egiazarian, "Image denoising by sparse 3-D transform-domain collaborative filtering",
IEEE TIP 16(8), 2007; Y. Mäkinen, L. Azzari, A. Foi, "Collaborative filtering of correlated noise", IEEE TIP 29, 2020.

The program is the package ``bm3d`` of Tampere University. Its license allows informational and non-commercial use
alone, and asks for a reference to its authors wherever results are made public. So it is no requirement of this
project and no part of it, and runs only where a person has installed it and asks for it.

It runs in processes of its own. Its compiled library cannot be called from two threads at a time, and where it fails
it ends the process: a training of hours would be gone. With one thread in each process, its results are the same ones
every time.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from train.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

    from train.degradations.base import Degradation

BM3D = "bm3d"
"""The remedy's name in metrics, and what has to be installed for it."""


def bm3d_settings() -> Mapping[str, Any]:
    """JSON-able facts that :func:`bm3d` depends on."""
    try:
        return {name: version(name) for name in ("bm3d", "bm4d")}  # bm4d holds the compiled library
    except PackageNotFoundError:
        return {}


def require_bm3d(degrade: Degradation) -> None:
    """
    :raises RunError: BM3D is not installed, or no remedy of ``degrade`` is made of it.
    """
    if BM3D not in degrade.remedies:
        raise RunError(f"--bm3d: BM3D removes noise, and --task {degrade} has none that it is made for; leave it out")
    if find_spec(BM3D) is None:
        raise RunError(
            "--bm3d needs the package bm3d of Tampere University, which is not installed: pip install bm3d. Its "
            "license allows non-commercial use alone"
        )


def bm3d(images: Tensor, sigma: float) -> Tensor:
    """Against white noise, on every core. Color in luminance and chrominance, as the package has it; in other images
    of several channels the first one decides which blocks are alike.

    :param images: ``float32 [N, C, H, W]``, not clipped.
    :param sigma: standard deviation of the noise, in the images' units; 0 returns the images as they are.
    :returns: ``float32 [N, C, H, W]`` on the CPU, not clipped.
    :raises RunError: the program fails, as it does on sides of less than 9 pixels; the message says how.
    """
    import torch

    images = images.cpu()
    if sigma == 0:
        return images
    pixels = images.permute(0, 2, 3, 1).double().numpy()
    processes = min(len(pixels), os.cpu_count() or 1)
    with ThreadPoolExecutor(processes) as pool:
        parts = pool.map(lambda part: _elsewhere(part, sigma), np.array_split(pixels, processes))
        restored = np.concatenate(list(parts))
    return torch.from_numpy(restored).float().permute(0, 3, 1, 2).contiguous()


def _elsewhere(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """:func:`_work` in another process, which finds the modules where this one does."""
    sent = io.BytesIO()
    np.save(sent, pixels)
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import _work; _work()", repr(sigma)],
        input=sent.getvalue(),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        died = f"{signal.Signals(-done.returncode).name}: " if done.returncode < 0 else ""
        height, width = pixels.shape[1:3]
        raise RunError(
            f"--bm3d: BM3D fails on images of {height} x {width} px ({died}{said[-1]}); leave it out, in a run that is "
            "resumed by --no-bm3d"
        )
    return np.load(io.BytesIO(done.stdout))


def _work() -> None:
    """Reads images ``float64 [N, H, W, C]`` as ``.npy`` from the standard input and writes them restored."""
    import bm3d as package

    profile = package.BM3DProfile()
    profile.num_threads = 1
    pixels, sigma = np.load(io.BytesIO(sys.stdin.buffer.read())), float(sys.argv[1])
    run = package.bm3d_rgb if pixels.shape[-1] == 3 else package.bm3d
    restored = [np.reshape(run(image, sigma, profile), image.shape) for image in pixels]
    np.save(sys.stdout.buffer, np.stack(restored))
