"""What a step of ``python -m train.run --dataset covidct`` costs on the CPU: the share of its log, and bf16 : fp32.

    python benchmarks/training_step.py [ROUNDS]

Rounds of ten steps, in fp32 with the log, in fp32 without it, and in bf16, one after the other, so that whatever else
the machine does meets all three. CPU time of the process, so that other processes' turns do not count.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROUND = 10


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    from train.data import load
    from train.degradations import Gaussian
    from train.settings.presets import preset_settings
    from train.strategies.base import Batch
    from train.training.build import Experiment, build
    from train.training.step_log import StepLog
    from train.training.watch import Watch

    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    settings = preset_settings("quick")
    data = load("covidct", size=128, channels=1)
    trained: list[tuple[Experiment, Iterator[Batch]]] = []
    for precision in ("fp32", "bf16"):
        experiment = build(settings.change({"precision": precision}), data, Gaussian(0.1), device=torch.device("cpu"))
        (phase,) = experiment.phases
        experiment.strategy.begin(phase)
        experiment.strategy.enter(phase)
        trained.append((experiment, map(experiment.crops.__getitems__, iter(experiment.order(phase)))))
    experiment = trained[0][0]
    found: dict[str, list[float]] = {"log": [], "no log": [], "bf16": [], "of the log": []}
    with tempfile.TemporaryDirectory() as folder:
        log = StepLog(Path(folder) / "steps.csv", experiment.strategy.measures, batch_size=experiment.batch_size)
        watch = Watch(experiment.strategy, experiment.gate)
        step = 0
        for number in range(rounds + 1):
            for name in ("log", "no log", "bf16"):
                own, batches = trained[name == "bf16"]
                begin, spent = time.process_time(), 0.0
                for _ in range(ROUND):
                    measured = own.strategy.update(own.strategy.losses(next(batches).to(own.device)))
                    if name == "log":
                        before = time.process_time()
                        step += 1
                        log.add(step, "train", measured, own.strategy.lr)
                        if step % ROUND == 0:
                            watch.look(log.flush(wait=False))
                        spent += time.process_time() - before
                if number:  # the first round warms up
                    found[name].append((time.process_time() - begin) / ROUND)
                    if name == "log":
                        found["of the log"].append(spent / ROUND)
    ms = {name: 1000 * median(values) for name, values in found.items()}
    print(
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} thread(s), medians of {rounds} rounds of {ROUND} steps"
    )
    print(
        f"step in fp32 {ms['no log']:.1f} ms, with the log {ms['log']:.1f} ms, in bf16 {ms['bf16']:.1f} ms of CPU time"
    )
    share = median(a / (b - a) for a, b in zip(found["of the log"], found["log"], strict=True))
    ratios = [a / b for a, b in zip(found["log"], found["no log"], strict=True)]
    print(f"the log takes {1000 * ms['of the log']:.0f} us of it, {share:.2%}; with : without it {median(ratios):.3f}")
    print(f"bf16 : fp32 {median(a / b for a, b in zip(found['bf16'], found['no log'], strict=True)):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
