"""How a training step scales with processes on the CPU: ``torchrun --nproc-per-node N benchmarks/scaling.py``.

An SR-ResNet with two losses. Weak scaling: each process has a whole batch; strong: a part of one. Of each way to train,
the median over rounds in which all ways take turns, the slowest process counts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

import gradprom_ext as gp
from gradprom_ext.bench.networks import SRResNet


def losses(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = model(images)
    return (out - images).square().mean(), out.mean((2, 3)).tanh().square().mean()


def ways(images: torch.Tensor, model: nn.Module) -> dict[str, Callable[[], None]]:
    """One step each, by the name of the way."""
    found: dict[str, Callable[[], None]] = {}

    def ours(name: str, group: dist.ProcessGroup | None, last: bool) -> None:
        own = copy.deepcopy(model)
        opt = gp.GradPromAdamW(own.parameters(), lr=1e-4, process_group=group)

        def step() -> None:
            opt.backward(*losses(own, images), last=last)
            opt.step()
            opt.zero_grad()

        found[name] = step

    ours("GradProm, nobody talks", None, False)
    ours("GradProm, sent in step", dist.group.WORLD, False)
    ours("GradProm, last=True", dist.group.WORLD, True)
    joint = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    adamw = torch.optim.AdamW(joint.parameters(), lr=1e-4, fused=True)

    def joint_step() -> None:
        main, aux = losses(joint, images)
        (main + 0.1 * aux).backward()
        adamw.step()
        adamw.zero_grad()

    found["joint training, DistributedDataParallel"] = joint_step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--size", type=int, default=48, help="their side in pixels")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, number = dist.get_rank(), dist.get_world_size()
    warnings.filterwarnings("ignore", "several processes train together")
    torch.manual_seed(0)
    model = SRResNet(scale=1, blocks=args.blocks, width=args.width, channels=1)
    parameters = sum(p.numel() for p in model.parameters())
    if rank == 0:
        print(f"{number} processes, {parameters:,} parameters, {args.rounds} rounds, PyTorch {torch.__version__}")
    for scaling, batch in (("weak", args.batch), ("strong", args.batch // number)):
        steps = ways(torch.rand(batch, 1, args.size, args.size), model)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.rounds + 2):
            for name, step in steps.items():
                dist.barrier()
                begun = time.perf_counter()
                step()
                seconds = torch.tensor(time.perf_counter() - begun)
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                times[name].append(float(seconds))
        if rank == 0:
            print(f"\n{scaling} scaling, {batch} images of {args.size} px in each process")
            for name, each in times.items():
                print(f"  {name:42} {statistics.median(each[2:]) * 1e3:8.1f} ms")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
