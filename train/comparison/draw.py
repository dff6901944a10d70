"""The pictures of a comparison: what the arms make of an image, what a reader looks at, and how the trainings went."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import IP
from train.comparison.collect import Record
from train.comparison.plan import Plan, safe
from train.data.base import ImageData
from train.evaluation.attention import class_activation, class_score, guided_backpropagation
from train.evaluation.evaluate import Shown, examples
from train.evaluation.statistics import interval
from train.experiment import Prepared, choose_device, load_data, look_up, on_validation
from train.outputs.figures import (
    Course,
    Point,
    save_attention,
    save_course,
    save_strategies,
    save_tradeoff,
)
from train.outputs.run_folder import RunFolder
from train.settings.command_line import stored
from train.strategies.auxiliary import Auxiliary
from train.training.progress import Display
from train.training.weights import load_weights

FIGURES = "figures"


@dataclass(frozen=True)
class Drawn:
    """A picture.

    :param path: of the file.
    :param title: heads it on a page.
    :param caption: says what is to be seen.
    """

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Seen:
    """One test image under a condition.

    :param condition: its name.
    :param name: of the image.
    :param clean: ``float32 [C, H, W]``; the others likewise.
    :param enhanced: by the names of the arms.
    """

    condition: str
    name: str
    clean: Tensor
    degraded: Tensor
    enhanced: Mapping[str, Tensor]


class Enhancer:
    """The IP of a run, as an evaluation knows it.

    :param record: of the run.
    :param data: tell the number of channels.
    :param scale: by what factor it enlarges.
    """

    trains_ip = True
    judges: Sequence[Any] = ()

    def __init__(self, record: Record, data: ImageData, *, scale: int, device: torch.device) -> None:
        network = record.job.settings.network
        self.ip = IP.build(network.ip, network.ip_options, channels=data.channels, scale=scale)
        load_weights(RunFolder(record.folder).weights, {"ip": self.ip}, flag="the weights")
        self.ip.to(device).eval()
        self.networks = {"ip": self.ip}

    def enhance(self, degraded: Tensor) -> Tensor:
        return self.ip(degraded)


def draw(plan: Plan, records: Sequence[Record], out: Path, display: Display) -> tuple[list[Drawn], list[Seen]]:
    """Draws all pictures into ``out/figures``.

    :param records: of the finished runs.
    :param display: shows the training of a reader that the cache has lost.
    :returns: the pictures, and one image of each condition.
    :raises RunError: a file cannot be read or written.
    """
    folder = out / FIGURES
    folder.mkdir(exist_ok=True)
    drawn: list[Drawn] = []
    images: list[Seen] = []
    for condition in plan.conditions:
        own = [record for record in records if record.job.condition == condition.name]
        if own:
            painter = _Painter(plan, condition.name, own, folder, display)
            images += painter.examples()
            drawn += painter.drawn
    return drawn, images


class _Painter:
    """The pictures of one condition."""

    def __init__(self, plan: Plan, condition: str, records: Sequence[Record], folder: Path, display: Display) -> None:
        self.plan, self.condition, self.records, self.folder = plan, condition, records, folder
        self.display = display
        self.drawn: list[Drawn] = []
        self.seed = min(record.job.seed for record in records)
        self.first = [record for record in records if record.job.seed == self.seed]
        self.arms = list(dict.fromkeys(record.job.arm for record in records))
        self.source = self.first[0].metrics["data"]
        where = f", {condition}" if condition else ""
        self.heading = f"{plan.recipe.title}{where}"

    def _path(self, what: str) -> Path:
        return self.folder / f"{'-'.join(filter(None, (what, safe(self.condition))))}.png"

    def _keep(self, path: Path, title: str, caption: str) -> None:
        self.drawn.append(Drawn(path, f"{title}{f', {self.condition}' if self.condition else ''}", caption))

    def examples(self) -> list[Seen]:
        """Draws everything; what the arms make of one image is returned, too."""
        self._courses()
        self._tradeoff()
        enhancing = [record for record in self.first if record.metrics["ip"] is not None]
        if not enhancing:
            return []
        settings = stored(enhancing[0].folder)
        data = load_data(settings, progress=False)
        if settings.evaluation.evaluate_on == "val":
            data = on_validation(data)
        device = choose_device("auto")
        degrade = look_up(settings)
        # The image whose PSNR is the median under the first arm: neither the best one nor the worst.
        place = int(np.argsort(enhancing[0].images["psnr"], kind="stable")[len(data.test) // 2])
        shown: dict[str, Shown] = {}
        networks = {}
        for record in enhancing:
            enhancer = Enhancer(record, data, scale=degrade.scale, device=device)
            (shown[record.job.arm],) = examples(enhancer, data.test, degrade, [place], device=device)
            networks[record.job.arm] = enhancer.ip
        seen = next(iter(shown.values()))
        enhanced = {arm: each.enhanced[0] for arm, each in shown.items() if each.enhanced is not None}
        name = data.test.names[place]
        path = self._path("strategies")
        titled: dict[str, Any] = {"source": self.source}
        save_strategies(
            path, clean=seen.clean[0], degraded=seen.degraded[0], enhanced=enhanced, title=self.heading, **titled
        )
        self._keep(
            path,
            "One image",
            f"The test image {name}, of median PSNR under {enhancing[0].job.arm}, as each arm (seed {self.seed}) "
            "enhances it; below, the framed part enlarged, and the absolute error on one scale.",
        )
        readers = Prepared(settings, data, self._facts(enhancing[0]), degrade, device, self.display).readers()
        if readers and all(task.can_score(data.test) for task, _ in readers):
            self._attention(readers, data, place, seen, enhanced, device)
        self._guided(readers, data, place, seen, networks, device)
        return [Seen(self.condition, name, seen.clean[0], seen.degraded[0], enhanced)]

    @staticmethod
    def _facts(record: Record) -> dict[str, Any]:
        from train.files import read_json

        return read_json(RunFolder(record.folder).data) or {}

    def _attention(
        self,
        readers: Sequence[tuple[Auxiliary, torch.nn.Module]],
        data: ImageData,
        place: int,
        seen: Shown,
        enhanced: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        """Class activation maps of the independent reader (paper, figure 5)."""
        images = {"clean": seen.clean[0], "degraded": seen.degraded[0], **enhanced}
        stack = torch.stack(list(images.values())).to(device)
        for task, network in readers:
            target = _class_of(task, data, place)
            maps = class_activation(network, stack, [target] * len(stack))
            path = self._path(f"attention-{task.name}")
            words = _class_name(task, data, target)
            save_attention(
                path,
                images=images,
                maps=dict(zip(images, maps, strict=True)),
                title=self.heading,
                source=self.source,
                note=f"Grad-CAM of the independent reader ({task.role.name}) for {words}.",
            )
            self._keep(
                path,
                f"What the reader looks at ({task.role.name})",
                f"Class activation maps (Grad-CAM) of the independent reader for {words}, on the clean, the degraded "
                "and every enhanced image. Where a map differs from that of the clean image, the reader sees something "
                "else.",
            )

    def _guided(
        self,
        readers: Sequence[tuple[Auxiliary, torch.nn.Module]],
        data: ImageData,
        place: int,
        seen: Shown,
        networks: Mapping[str, torch.nn.Module],
        device: torch.device,
    ) -> None:
        """Guided back-propagation of every task on one image (paper, figure 2)."""
        maps: dict[str, Tensor] = {}
        images: dict[str, Tensor] = {}
        before = seen.degraded.to(device)

        def change(output: Tensor) -> Tensor:
            # An IP hands its input on and adds to it: of the output itself every pixel would depend on its own alone.
            return (output - before).square().flatten(1).sum(1)

        for arm in [arm for arm in networks if arm in ("ip-only", "gradprom")] or list(networks)[:1]:
            maps[f"enhancing: {arm}"] = guided_backpropagation(networks[arm], seen.given.to(device), change)[0]
            images[f"enhancing: {arm}"] = seen.given[0].clamp(0, 1)
        for task, network in readers:
            target = class_score([_class_of(task, data, place)])
            maps[task.role.name] = guided_backpropagation(network, seen.clean.to(device), target)[0]
            images[task.role.name] = seen.clean[0]
        path = self._path("guided")
        save_attention(
            path,
            images=images,
            maps=maps,
            title=self.heading,
            source=self.source,
            note="Guided back-propagation: the pixels that each task depends on most.",
        )
        self._keep(
            path,
            "What each task depends on",
            "Guided back-propagation: where the gradient of each network's answer by its input is largest. The answer "
            "of an IP is how much it changes the degraded image, that of a reader how sure it is of the class.",
        )

    def _courses(self) -> None:
        for quantity, label, zero in (
            ("cosine", "cosine of the gradients", True),
            ("gate", "gate", False),
            ("psnr", "PSNR of training batches (dB)", False),
        ):
            courses = dict(self._course(quantity))
            if not courses:
                continue
            path = self._path(quantity)
            save_course(path, courses=courses, ylabel=label, title=self.heading, source=self.source, zero=zero)
            self._keep(
                path,
                f"{label[0].upper()}{label[1:]} over training",
                "Means over seeds; the band is their 95 % interval.",
            )

    def _course(self, quantity: str) -> Iterator[tuple[str, Course]]:
        for arm in self.arms:
            logs = [record.steps for record in self.records if record.job.arm == arm]
            columns = [name for name in logs[0] if name == quantity or name.startswith(f"{quantity}_")]
            for column in columns:
                values = [log[column] for log in logs]
                length = min(map(len, values))
                stack = np.stack([each[:length] for each in values])
                if length and np.isfinite(stack).any():
                    suffix = column.removeprefix(quantity).removeprefix("_")
                    yield f"{arm} ({suffix})" if suffix else arm, Course(np.arange(1, length + 1), stack)

    def _tradeoff(self) -> None:
        if not self.plan.recipe.curve:
            return
        key = next((k for k in ("reader_accuracy", "reader_miou") if self.first[0].metrics.get(k) is not None), None)
        if key is None:
            return
        curves: dict[str, list[Point]] = {}
        for arm in self.arms:
            own = [record.metrics for record in self.records if record.job.arm == arm]
            if any(each.get("psnr") is None or each.get(key) is None for each in own):
                continue
            curve, _, value = arm.partition(" @ ")
            weight = None
            with contextlib.suppress(ValueError):
                weight = float(value.split()[-1]) if value else None
            point = Point(interval([m["psnr"] for m in own]), interval([m[key] for m in own]), weight)
            curves.setdefault(curve, []).append(point)
        path = self._path("tradeoff")
        what = {"reader_accuracy": "share of right diagnoses", "reader_miou": "mean IoU"}[key]
        save_tradeoff(
            path,
            curves=curves,
            xlabel="PSNR (dB)",
            ylabel=f"independent reader: {what}",
            title=self.heading,
            source=self.source,
        )
        self._keep(
            path,
            "Image quality against what a reader sees",
            "A curve per strategy over the weight of the auxiliary (lambda; kappa for the capped ones). Up and to the "
            "right is better; a strategy that protects IP keeps to the right as its weight grows.",
        )


def _class_of(task: Auxiliary, data: ImageData, place: int) -> int:
    """The class that is looked for: that of the image where it is known, else the first that is not background."""
    labels = data.test.labels
    if not task.masks and labels is not None and labels[place] >= 0:
        return int(labels[place])
    return 1


def _class_name(task: Auxiliary, data: ImageData, target: int) -> str:
    names = data.mask_names if task.masks else data.class_names
    return names[target] if target < len(names) else f"class {target}"
