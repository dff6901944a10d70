"""``python -m gradprom_ext.bench``: the fused step beside what PyTorch can do without it, and beside the memory.

How it measures, so that the numbers mean something on a noisy machine:

* Every contestant has its own parameters, gradients and state. They take turns (A B C ... A B C ...), in an order that
  rotates, so that drift of the machine hits all of them and nobody finds its tensors in the cache.
* Medians are printed with the middle half of the samples beside them; ratios are medians of the ratios within a round.
* The floor is the time the memory needs for the bytes a step must move (24 per parameter for SGD, 40 for AdamW in
  float32: two gradients read, read again with the parameter and the moments, parameter and moments written), at the
  bandwidth of ``a += b`` on flat buffers of the same size (12 bytes per element), measured as one more contestant.
* Two things keep a step above that floor, and each is measured in the same rounds. A step reads more than it writes,
  and where reads are the bottleneck the time for its reads alone (20 and 28 bytes per parameter, at the bandwidth of a
  dot product) is longer than the floor. And before the kernel starts, Python finds as many gradients as there are
  tensors: the same step on as many tensors of one element is that host work, caches as cold as for everybody else.
* The gate is open: the case with the most traffic.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import gradprom_ext as gp

# ----------------------------------------------------------------------------------------------------------------------
# Shapes of real networks (gradprom_ext never imports models/)


def _conv(cin: int, cout: int, k: int, bias: bool = True) -> list[tuple[int, ...]]:
    return [(cout, cin, k, k), *([(cout,)] if bias else [])]


def srresnet_shapes(blocks: int = 16, width: int = 64) -> list[tuple[int, ...]]:
    """SR-ResNet x4 (arXiv:1609.04802): 1.5 M parameters."""
    body = [*_conv(width, width, 3), (width,), (width,)]
    shapes = [*_conv(3, width, 9), (1,)]
    for _ in range(blocks):
        shapes += [*body, (1,), *body]
    return [*shapes, *body, *(2 * [*_conv(width, 4 * width, 3), (1,)]), *_conv(width, 3, 9)]


def unet_shapes(base: int = 32, levels: int = 4) -> list[tuple[int, ...]]:
    """U-Net (arXiv:1505.04597) with half its widths: 7.8 M parameters."""
    widths = [base * 2**i for i in range(levels + 1)]
    shapes: list[tuple[int, ...]] = []
    for cin, cout in zip([1, *widths], widths, strict=False):
        shapes += [*_conv(cin, cout, 3), *_conv(cout, cout, 3)]
    for high, low in zip(widths[:0:-1], widths[-2::-1], strict=True):
        shapes += [(high, low, 2, 2), (low,), *_conv(high, low, 3), *_conv(low, low, 3)]
    return [*shapes, *_conv(base, 2, 1)]


def resnet50_shapes() -> list[tuple[int, ...]]:
    """ResNet-50 (arXiv:1512.03385): 25.6 M parameters."""
    norm = lambda c: [(c,), (c,)]  # noqa: E731
    shapes = [*_conv(3, 64, 7, bias=False), *norm(64)]
    cin = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            shapes += [
                *_conv(cin, width, 1, bias=False),
                *norm(width),
                *_conv(width, width, 3, bias=False),
                *norm(width),
                *_conv(width, 4 * width, 1, bias=False),
                *norm(4 * width),
            ]
            if block == 0:
                shapes += [*_conv(cin, 4 * width, 1, bias=False), *norm(4 * width)]
            cin = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


NETWORKS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "srresnet": srresnet_shapes,
    "unet": unet_shapes,
    "resnet50": resnet50_shapes,
}
BYTES_PER_PARAMETER = {"sgd": 24, "adamw": 40}
BYTES_READ = {"sgd": 20, "adamw": 28}
YARDSTICKS = ("memory", "reads", "host")  # measured with the contestants, printed above them
LR = 1e-6  # the values must stay ordinary however often a step is repeated


# ----------------------------------------------------------------------------------------------------------------------
# Contestants: each builds its own tensors and returns one step


class Tensors:
    """Parameters with a main and an auxiliary gradient that agree (the gate is open)."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        g = torch.Generator(device).manual_seed(0)
        draw = lambda s: torch.randn(s, generator=g, device=device)  # noqa: E731
        self.params = [torch.nn.Parameter(draw(s)) for s in shapes]
        self.main = [draw(s) for s in shapes]
        self.aux = [m + draw(m.shape) for m in self.main]
        for p, m in zip(self.params, self.main, strict=True):
            p.grad = m


def torch_optimizer(name: str, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """PyTorch's fastest: one fused call over all parameters."""
    kind = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    return kind(params, lr=LR, fused=True)


def gradprom(tensors: Tensors, optimizer: str, backend: str) -> Callable[[], object]:
    """What a user calls, ``opt.step()``, Python included."""
    kind = gp.GradPromSGD if optimizer == "sgd" else gp.GradPromAdamW
    opt = kind(tensors.params, lr=LR, backend=backend)
    opt.aux_grads = [list(tensors.aux)]
    return opt.step


def best_pytorch(tensors: Tensors, optimizer: str) -> Callable[[], object]:
    """The best we could write without kernels: foreach where there is one, no flattening, a fused optimizer.

    There is no ``_foreach_dot``; on the CPU branching on the gate costs nothing, on a GPU it would wait, so there the
    gate stays a tensor.
    """
    opt = torch_optimizer(optimizer, tensors.params)
    main, aux = tensors.main, tensors.aux

    def step() -> Tensor:
        dot = torch.stack([torch.dot(m.view(-1), a.view(-1)) for m, a in zip(main, aux, strict=True)]).sum()
        norms = [torch.stack(torch._foreach_norm(gs)).square().sum().sqrt() for gs in (main, aux)]
        cosine = dot / (norms[0] * norms[1])
        if main[0].device.type == "cpu":
            if cosine >= 0:
                torch._foreach_add_(main, aux, alpha=1e-6)
        else:
            gate = (cosine >= 0).to(dot.dtype) * 1e-6
            torch._foreach_add_(main, torch._foreach_mul(aux, gate))
        opt.step()
        return cosine

    return step


def torchjd(tensors: Tensors, optimizer: str) -> Callable[[], object] | None:
    """TorchJD's PCGrad on Jacobians that are already there, then a fused optimizer; ``None`` where not installed."""
    try:
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import jac_to_grad
    except ImportError:
        return None
    opt = torch_optimizer(optimizer, tensors.params)
    aggregator = PCGrad()
    for p, m, a in zip(tensors.params, tensors.main, tensors.aux, strict=True):
        p.jac = torch.stack([m, a])  # type: ignore[attr-defined]
        p.grad = None

    def step() -> None:
        jac_to_grad(tensors.params, aggregator, retain_jac=True)
        opt.step()
        opt.zero_grad()

    return step


def plain(tensors: Tensors, optimizer: str) -> Callable[[], object]:
    """The optimizer alone, on the main gradient alone: no GradProm at all."""
    return torch_optimizer(optimizer, tensors.params).step


def memory(count: int, device: torch.device) -> Callable[[], object]:
    """``a += b`` on flat buffers as large as the model: 12 bytes per element."""
    a, b = torch.randn(count, device=device), torch.zeros(count, device=device)
    return lambda: a.add_(b)


def reads(count: int, device: torch.device) -> Callable[[], object]:
    """A dot product of two flat buffers as large as the model: 8 bytes per element, nothing written."""
    a, b = torch.randn(count, device=device), torch.randn(count, device=device)
    return lambda: torch.dot(a, b)


def contestants(
    shapes: Sequence[tuple[int, ...]], optimizer: str, device: torch.device, backends: Sequence[str]
) -> dict[str, Callable[[], object]]:
    """Name to step, for everything that can run here."""
    fresh = lambda: Tensors(shapes, device)  # noqa: E731
    count = sum(torch.Size(s).numel() for s in shapes)
    steps: dict[str, Callable[[], object] | None] = {f"gradprom {b}": gradprom(fresh(), optimizer, b) for b in backends}
    steps["best PyTorch"] = best_pytorch(fresh(), optimizer)
    steps["TorchJD PCGrad"] = torchjd(fresh(), optimizer)
    steps["plain optimizer"] = plain(fresh(), optimizer)
    steps["memory"] = memory(count, device)
    steps["reads"] = reads(count, device)
    steps["host"] = gradprom(Tensors([(1,)] * len(shapes), device), optimizer, backends[0])
    return {name: step for name, step in steps.items() if step is not None}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs a step and returns its seconds: by the clock on the CPU, by events on a GPU."""
    if device.type == "cpu":

        def run(step: Callable[[], object]) -> float:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start

        return run

    def run_on_gpu(step: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return run_on_gpu


def interleave(
    steps: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warmup: int = 3,
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round."""
    names = list(steps)
    run = stopwatch(device)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for r in range(warmup + rounds):
        for i in range(len(names)):
            name = names[(i + r) % len(names)]
            seconds = run(steps[name])
            if r >= warmup:
                samples[name].append(seconds)
    return samples


@dataclass
class Result:
    """One contestant at one size."""

    network: str
    parameters: int
    tensors: int
    optimizer: str
    contestant: str
    median_ms: float
    low_ms: float  #: first quartile
    high_ms: float  #: third quartile
    floor_ms: float  #: bytes a step must move / measured bandwidth
    over_floor: float  #: median over rounds of time / floor in the same round
    speed_up: float  #: median over rounds of contestant's time / fastest GradProm's time
    samples_ms: list[float] = field(repr=False, default_factory=list)


def measure(network: str, optimizer: str, device: torch.device, backends: Sequence[str], rounds: int) -> list[Result]:
    """All contestants on one network."""
    shapes = NETWORKS[network]()
    count = sum(torch.Size(s).numel() for s in shapes)
    samples = interleave(contestants(shapes, optimizer, device, backends), device, rounds)
    floors = [t * BYTES_PER_PARAMETER[optimizer] / 12 for t in samples["memory"]]
    fused = samples[f"gradprom {backends[0]}"]
    results = []
    for name, times in samples.items():
        low, median, high = statistics.quantiles(times, n=4)
        results.append(
            Result(
                network,
                count,
                len(shapes),
                optimizer,
                name,
                median * 1e3,
                low * 1e3,
                high * 1e3,
                statistics.median(floors) * 1e3,
                statistics.median(t / f for t, f in zip(times, floors, strict=True)),
                statistics.median(t / f for t, f in zip(times, fused, strict=True)),
                [round(t * 1e3, 4) for t in times],
            )
        )
    return results


def machine(device: torch.device) -> dict[str, object]:
    """What the numbers were measured on, and from which commit."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m gradprom_ext.bench " + " ".join(sys.argv[1:]),
    }


def table(results: Sequence[Result]) -> str:
    """One block per network and optimizer."""
    lines: list[str] = []
    for r in results:
        if r.contestant == results[0].contestant:
            bandwidth = BYTES_PER_PARAMETER[r.optimizer] * r.parameters / r.floor_ms / 1e6
            times = {o.contestant: o.median_ms for o in results if o.contestant in YARDSTICKS}
            read = times["reads"] * BYTES_READ[r.optimizer] / 8
            lines += [
                "",
                f"{r.network}, {r.parameters / 1e6:.2f} M parameters in {r.tensors} tensors, {r.optimizer}: floor "
                f"{BYTES_PER_PARAMETER[r.optimizer]} B/parameter at {bandwidth:.1f} GB/s = {r.floor_ms:.2f} ms; "
                f"its reads alone {read:.2f} ms, host work {times['host']:.2f} ms",
                f"  {'':<20}{'median ms':>10}{'middle half':>17}{'x floor':>9}{'x fused':>9}",
            ]
        if r.contestant in YARDSTICKS:
            continue
        spread = f"{r.low_ms:.2f} .. {r.high_ms:.2f}"
        lines.append(f"  {r.contestant:<20}{r.median_ms:>10.2f}{spread:>17}{r.over_floor:>9.2f}{r.speed_up:>9.2f}")
    return "\n".join(lines[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints a table and, with ``--json FILE``, writes everything measured."""
    parser = argparse.ArgumentParser(prog="python -m gradprom_ext.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--optimizers", nargs="+", choices=list(BYTES_PER_PARAMETER), default=list(BYTES_PER_PARAMETER))
    parser.add_argument("--rounds", type=int, default=31, help="samples of each contestant (default 31)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the samples and the machine there")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    device = torch.device(args.device)
    backends = [name for name, reason in gp.backends.explain(device).items() if reason is None]

    about = machine(device)
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, commit {about['commit']}")
    results: list[Result] = []
    for network in args.networks:
        for optimizer in args.optimizers:
            block = measure(network, optimizer, device, backends, args.rounds)
            print("\n" + table(block), flush=True)
            results += block
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": about, "results": [asdict(r) for r in results]}, indent=1) + "\n")
        print(f"\nwritten: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
