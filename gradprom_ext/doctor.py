"""``python -m gradprom_ext.doctor``: what was built, what can run here, and why the rest cannot."""

from __future__ import annotations

import platform
import sys

import torch

from . import backends
from .version import TESTED_TORCH, __version__


def devices() -> list[torch.device]:
    """The CPU and every GPU PyTorch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(count))]


def standing_of(version: str) -> str:
    """What is known about a version of PyTorch.

    >>> standing_of("2.13.0+cpu")
    'tested with 2.10 to 2.14, which 2.13.0+cpu is one of'
    >>> standing_of("3.0.0")
    'tested with 2.10 to 2.14; 3.0.0 is newer: run the tests (pip install -e ".[test]" && pytest)'
    """
    known = " to ".join(".".join(map(str, pair)) for pair in TESTED_TORCH)
    own = tuple(map(int, version.split(".")[:2]))
    if TESTED_TORCH[0] <= own <= TESTED_TORCH[1]:
        return f"tested with {known}, which {version} is one of"
    relation = "newer" if own > TESTED_TORCH[1] else "older"
    return f'tested with {known}; {version} is {relation}: run the tests (pip install -e ".[test]" && pytest)'


def report() -> str:
    """The text that ``main`` prints."""
    extension, problem = backends.extension()
    lines = [
        f"gradprom_ext {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}",
    ]
    lines.append(f"PyTorch: {standing_of(torch.__version__)}")
    if extension is None:
        lines.append(f"compiled module: no ({problem})")
    else:
        cuda = extension.CUDA_ARCHITECTURES
        path = extension.tensor_path(torch.empty(0))
        lines += [
            f"compiled module: {extension.__file__}",
            f"  compiler          {extension.COMPILER}",
            f"  CPU kernels       {extension.cpu_isa()}, "
            + (
                f"OpenMP, {torch.get_num_threads()} threads"
                if extension.OPENMP
                else "one thread (built without OpenMP)"
            ),
            f"  CUDA kernels      {cuda or 'not built (no nvcc was found when the package was installed)'}",
            "  tensors read by   "
            + {"exchange": "the DLPack exchange API", "attributes": "attributes (this PyTorch has no exchange API)"}[
                path
            ],
        ]
    lines.append("backends, in order of preference:")
    for backend in backends.BACKENDS:
        reason = backend.missing()
        lines.append(f"  {backend.name:<11}{'yes' if reason is None else 'no: ' + reason}")
    lines.append("what runs where:")
    for device in devices():
        chosen = next(name for name, reason in backends.explain(device).items() if reason is None)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        lines.append(f"  {str(device) + ' (' + name + ')':<32}{chosen}")
        for other, reason in backends.explain(device).items():
            if reason is not None:
                lines.append(f"    not {other}: {reason}")
    return "\n".join(lines)


def main() -> int:
    """Prints the report. Returns 1 where only the reference can run, else 0."""
    print(report())
    return 0 if backends.extension()[0] is not None else 1


if __name__ == "__main__":
    sys.exit(main())
