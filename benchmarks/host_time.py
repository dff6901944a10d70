"""The host's share of a step: a warm ``opt.step()`` on 140 tensors of 64 elements, in microseconds.

    python benchmarks/host_time.py [CHECKOUT]

CHECKOUT: another one, built, to be compared with.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

TENSORS, ELEMENTS, STEPS = 140, 64, 4000


def main() -> int:
    sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).resolve().parents[1]))
    import torch

    import gradprom_ext as gp

    torch.set_num_threads(1)
    rules = {
        "SGD": lambda params: gp.GradPromSGD(params, lr=1e-9),
        "SGD, momentum": lambda params: gp.GradPromSGD(params, lr=1e-9, momentum=0.9),
        "AdamW": lambda params: gp.GradPromAdamW(params, lr=1e-9),
    }
    print(f"{Path(gp.__file__).parents[1]}, PyTorch {torch.__version__}: least and median of {STEPS} steps, us")
    for name, make in rules.items():
        params = [torch.nn.Parameter(torch.randn(ELEMENTS)) for _ in range(TENSORS)]
        opt = make(params)
        for p in params:
            p.grad = torch.randn(ELEMENTS)
        opt.aux_grads = [[torch.randn(ELEMENTS) for _ in params]]
        for _ in range(50):
            opt.step()
        times = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            opt.step()
            times.append(time.perf_counter() - begin)
        times.sort()
        print(f"{name:<14} {1e6 * times[0]:6.1f} {1e6 * times[STEPS // 2]:6.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
