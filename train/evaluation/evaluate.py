"""What a trained run achieves on the test images, whose degradation is the same for every run.

Images are read, degraded, enhanced and scored a few at a time: memory grows with the size of an image, but not with
their number. What is kept of every image is its scores.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from train.data.base import Subset
from train.data.cache import ArrayCache, file_sha256
from train.degradations import CLASSICAL, Degradation, Remedy, fixed_seeds
from train.evaluation.metrics import PSNR_CAP, Quality, image_quality
from train.evaluation.reference_free import ReferenceFree
from train.evaluation.scores import Score, Scorer
from train.inference import Tiling, enlarged, forward

TOGETHER = 64  # images of one size that are scored at once: bounds the memory that SSIM's windows take
PIXELS = TOGETHER * 512 * 512  # the same bound for large images, of which fewer are scored at once
KINDS = ("clean", "degraded", "enhanced")
SUFFIXES = {"enhanced": "", "degraded": "_degraded", "clean": "_clean"}
"""The ends that keys have in ``metrics.json``, by the kind of images."""
READER = "reader_"  # in front of the keys of what an independent reader scores


class Judge(Protocol):
    """A task of a VR, as far as an evaluation knows it."""

    @property
    def name(self) -> str:
        """Of the task; no other one has it."""

    @property
    def scores(self) -> tuple[Score, ...]:
        """What a scorer finds out, the first of them what counts most."""

    @property
    def masks(self) -> bool:
        """Whether an answer is an image."""

    def can_score(self, subset: Subset) -> bool:
        """Whether the images have what answers are compared with."""

    def scorer(self, subset: Subset) -> Scorer:
        """What gathers the answers about one kind of images."""


class Trained(Protocol):
    """A strategy, as far as an evaluation knows it."""

    @property
    def trains_ip(self) -> bool: ...

    @property
    def networks(self) -> Mapping[str, nn.Module]: ...

    @property
    def judges(self) -> Sequence[tuple[Judge, nn.Module]]: ...

    def enhance(self, degraded: Tensor) -> Tensor: ...


class Scored(NamedTuple):
    """What a task of a VR scored on one kind of images.

    :param result: over all images, by the scores' keys.
    :param per_image: of every image by itself, ``float64 [N]`` each.
    """

    result: Mapping[str, float]
    per_image: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, scorer: Scorer) -> Scored:
        """What a scorer has gathered."""
        return cls(scorer.result(), scorer.per_image())


class Restored(NamedTuple):
    """What a classical remedy achieves.

    :param title: what the remedy is called.
    :param quality: of the images that it has restored.
    """

    title: str
    quality: Quality


@dataclass(frozen=True)
class Evaluation:
    """What the images are worth.

    :param degraded: quality of what IP was given, enlarged bicubically where it was smaller than the clean image;
        ``None`` where the clean images are not known.
    :param enhanced: quality of what IP made of it, clamped to [0, 1]; ``None`` where there is no IP, or no clean image.
    :param remedies: what the classical remedies achieve, by the names that they have in metrics.
    :param scores: for each kind of images (``clean``, ``degraded``, ``enhanced``), what the VRs' tasks scored on them;
        those of the readers as ``reader_*``.
    :param per_image: the same of every image by itself, ``float64 [N]`` each.
    :param reference_free: what was measured without clean images, by the keys of ``metrics.json``.
    """

    degraded: Quality | None
    enhanced: Quality | None
    remedies: dict[str, Restored]
    scores: dict[str, dict[str, float]]
    per_image: dict[str, dict[str, np.ndarray]]
    reference_free: dict[str, float] = field(default_factory=dict)

    @property
    def qualities(self) -> dict[str, Quality | None]:
        """The quality of every kind of images, by the ends of their keys in ``metrics.json``; ``None``: there are none
        of this kind."""
        remedies = {f"_{name}": restored.quality for name, restored in self.remedies.items()}
        return {"_degraded": self.degraded, f"_{CLASSICAL}": None, **remedies, "": self.enhanced}

    def table(self) -> dict[str, np.ndarray]:
        """All that is known of every image, ``float64 [N]`` each, under the keys that the means have in
        ``metrics.json``."""
        images = {
            f"{what}{of}": getattr(each, what).double().numpy()
            for what in ("psnr", "ssim")
            for of, each in self.qualities.items()
            if each is not None
        }
        return images | {
            f"{key}{SUFFIXES[kind]}": values for kind, found in self.per_image.items() for key, values in found.items()
        }


@dataclass(frozen=True)
class Shown:
    """Some images together.

    :param index: their places in the subset.
    :param clean: ``float32 [N, C, H, W]`` in [0, 1], like all others on the CPU.
    :param given: ``float32 [N, C, H / scale, W / scale]``: what IP is given.
    :param degraded: that, enlarged bicubically to the size of the clean images.
    :param enhanced: what IP made of it, clamped to [0, 1]; ``None`` where there is no IP.
    """

    index: Sequence[int]
    clean: Tensor
    given: Tensor
    degraded: Tensor
    enhanced: Tensor | None


@torch.no_grad()
def evaluate(
    trained: Trained,
    subset: Subset,
    degrade: Degradation,
    *,
    device: torch.device,
    tiling: Tiling | None = None,
    cache: ArrayCache | None = None,
    readers: Sequence[tuple[Judge, nn.Module]] = (),
    remedies: Sequence[str] = (CLASSICAL,),
    reference_free: bool = False,
    guides: Subset | None = None,
) -> Evaluation:
    """Scores all networks on all images of ``subset``. Where the degradation leaves no truth to compare with, nothing
    has a quality, and there is no kind *clean*.

    :param tiling: how large images are cut for IP and for segmentations (a diagnosis sees the whole image).
    :param cache: keeps for the next run what does not depend on this one: the scores of degraded images and of the
        classical remedies, and those that networks which no optimizer moves have on clean and on degraded images.
    :param readers: networks that took no part in the training, with their tasks.
    :param remedies: the names of those classical remedies that are tried, as far as the degradation has them.
    :param reference_free: whether what needs no truth is measured too (:mod:`train.evaluation.reference_free`).
    :param guides: images of high quality, which are what enhanced images should be like where there is no truth.
    """
    judges = [("", *each) for each in trained.judges] + [(READER, *each) for each in readers]
    judges = [each for each in judges if each[1].can_score(subset)]
    for network in (*trained.networks.values(), *(network for _, network in readers)):
        network.eval()
    tiling = tiling or Tiling()
    kinds = [kind for kind in KINDS if kind != "clean" or degrade.has_truth]
    kinds = [kind for kind in kinds if kind != "enhanced" or trained.trains_ip]
    own = ReferenceFree([network for _, network in readers], device) if reference_free else None
    found: dict[str, dict[str, Scored]] = {kind: {} for kind in kinds}
    content = None
    if cache is not None:
        content = digest(subset, degrade)
        for prefix, judge, network in judges:
            if not any(parameter.requires_grad for parameter in network.parameters()):
                for kind in kinds:
                    if kind != "enhanced":
                        found[kind][prefix + judge.name] = known_scores(
                            judge, network, subset, degrade, kind, content, device=device, tiling=tiling, cache=cache
                        )
    scorers = {
        (kind, prefix + judge.name): (judge, network, judge.scorer(subset))
        for prefix, judge, network in judges
        for kind in kinds
        if prefix + judge.name not in found[kind]
    }
    enhanced: list[Quality] = []
    for shown in views(trained, subset, degrade, device=device, tiling=tiling):
        if degrade.has_truth and shown.enhanced is not None:
            enhanced.append(image_quality(shown.enhanced, shown.clean))
        if own is not None:
            for kind in kinds:
                own.add(kind, getattr(shown, kind))
        for (kind, _), (judge, network, scorer) in scorers.items():
            scorer.add(answer(judge, network, getattr(shown, kind), device, tiling), shown.index)
    for (kind, name), (_, _, scorer) in scorers.items():
        found[kind][name] = Scored.of(scorer)
    if own is not None and guides is not None and not degrade.has_truth:
        for i in range(len(guides)):
            own.add("clean", guides.image(i)[None])

    def gathered(which: Callable[[Scored], Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return {
            kind: {
                f"{prefix}{key}": value
                for prefix, judge, _ in judges
                for key, value in which(found[kind][prefix + judge.name]).items()
            }
            for kind in kinds
        }

    return Evaluation(
        degraded=_quality(subset, degrade, partial(enlarged, scale=degrade.scale), ["bicubic"], content, cache)
        if degrade.has_truth
        else None,
        enhanced=_joined(enhanced) if enhanced else None,
        remedies={
            name: Restored(remedy.title, classical_quality(subset, degrade, remedy, content, cache=cache))
            for name, remedy in degrade.remedies.items()
            if name in remedies
        },
        scores=gathered(lambda scored: scored.result) if judges else {},
        per_image=gathered(lambda scored: scored.per_image) if judges else {},
        reference_free={} if own is None else own.result(SUFFIXES),
    )


def answer(judge: Judge, network: nn.Module, images: Tensor, device: torch.device, tiling: Tiling) -> Tensor:
    """What a VR says of images; only a segmentation can be had in tiles."""
    return forward(network, images, device=device, tiling=tiling if judge.masks else None)


def known_scores(
    judge: Judge,
    network: nn.Module,
    subset: Subset,
    degrade: Degradation,
    kind: str,
    content: str,
    *,
    device: torch.device,
    tiling: Tiling,
    cache: ArrayCache,
) -> Scored:
    """What a network that no run moves scores on images that no run changes: from the cache, or found out now.

    A reader or a fixed VR would otherwise say the same of the same images in every run of a comparison, which is most
    of what an evaluation takes.

    :param kind: ``"clean"`` or ``"degraded"``.
    :param content: what :func:`digest` says of the images.
    """

    def score() -> dict[str, np.ndarray]:
        scorer = judge.scorer(subset)
        for index in groups(subset):
            clean, given = pairs(subset, degrade, index)
            images = clean if kind == "clean" else enlarged(given, degrade.scale)
            scorer.add(answer(judge, network, images, device, tiling), index)
        found = Scored.of(scorer)
        return {f"result-{key}": np.array(value) for key, value in found.result.items()} | {
            f"image-{key}": value for key, value in found.per_image.items()
        }

    weights = hashlib.sha256()
    for name, values in network.state_dict().items():
        weights.update(name.encode())
        _digest(weights, values.cpu())
    key = {
        "images": content,
        "kind": kind,
        "task": judge.name,
        "network": repr(network),
        "weights": weights.hexdigest(),
        "tiles": repr(tiling),
        "code": [
            file_sha256(Path(str(inspect.getsourcefile(each))))
            for each in (type(judge), type(network), image_quality, forward)
        ],
        "torch": torch.__version__,
    }
    arrays = cache.arrays(f"scores-{judge.name}", key, score)

    def named(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}

    return Scored({name: float(value) for name, value in named("result-").items()}, named("image-"))


def digest(subset: Subset, degrade: Degradation) -> str:
    """Of all that is scored, and of what answers are compared with: clean and degraded images, labels and masks."""
    content = hashlib.sha256()
    for index in groups(subset):
        for images in pairs(subset, degrade, index):
            _digest(content, images)
        if subset.has_masks:
            _digest(content, subset.masks_tensor(list(index)))
    if subset.labels is not None:
        _digest(content, torch.tensor(subset.labels))
    return content.hexdigest()


@torch.no_grad()
def views(
    trained: Trained,
    subset: Subset,
    degrade: Degradation,
    *,
    device: torch.device,
    tiling: Tiling | None = None,
    wanted: Sequence[int] | None = None,
) -> Iterator[Shown]:
    """The images a few at a time, always the same ones together.

    :param wanted: only those among which one of these is; by default all of them.
    """
    for index in groups(subset):
        if wanted is not None and not set(index) & set(wanted):
            continue
        clean, given = pairs(subset, degrade, index)
        enhanced = None
        if trained.trains_ip:
            enhanced = forward(trained.enhance, given, device=device, tiling=tiling or Tiling()).clamp(0, 1)
        yield Shown(index, clean, given, enlarged(given, degrade.scale), enhanced)


def groups(subset: Subset) -> Iterator[Sequence[int]]:
    """The places of successive images of one size, as many as are scored together."""
    begin = 0
    while begin < len(subset):
        height, width = size = subset.size(begin)
        most = max(1, min(TOGETHER, PIXELS // (height * width)))
        end = begin + 1
        while end < len(subset) and end - begin < most and subset.size(end) == size:
            end += 1
        yield range(begin, end)
        begin = end


def examples(
    trained: Trained, subset: Subset, degrade: Degradation, index: Sequence[int], *, device: torch.device
) -> list[Shown]:
    """Some images as an evaluation saw them, one by one, in the order of ``index``."""
    found: dict[int, Shown] = {}
    for shown in views(trained, subset, degrade, device=device, wanted=index):
        for row, place in enumerate(shown.index):
            if place in index:
                own = slice(row, row + 1)
                enhanced = None if shown.enhanced is None else shown.enhanced[own].clone()
                clean, given, degraded = (each[own].clone() for each in (shown.clean, shown.given, shown.degraded))
                found[place] = Shown([place], clean, given, degraded, enhanced)
    return [found[place] for place in index]


def classical_quality(
    subset: Subset,
    degrade: Degradation,
    remedy: Remedy,
    content: str | None = None,
    *,
    cache: ArrayCache | None = None,
) -> Quality:
    """Scores of one of the degradation's classical remedies.

    :param content: a digest of the clean and the degraded images; needed with a cache.
    :param cache: keeps the scores, which take seconds to minutes, for the next run on exactly these images.
    """

    return _quality(
        subset, degrade, remedy.restore, [remedy.title, str(degrade), dict(remedy.settings)], content, cache
    )


def _quality(
    subset: Subset,
    degrade: Degradation,
    restore: Callable[[Tensor], Tensor],
    remedy: Sequence[Any],
    content: str | None,
    cache: ArrayCache | None,
) -> Quality:
    """Scores of what ``restore`` makes of the degraded images.

    :param remedy: JSON-able facts that say what ``restore`` does.
    """

    def score() -> dict[str, np.ndarray]:
        parts: list[Quality] = []
        for index in groups(subset):
            clean, given = pairs(subset, degrade, index)
            parts.append(image_quality(restore(given), clean))
        whole = _joined(parts)
        return {"psnr": whole.psnr.numpy(), "ssim": whole.ssim.numpy()}

    scores: Mapping[str, np.ndarray]
    if cache is None:
        scores = score()
    else:
        key: dict[str, Any] = {"images": content, "psnr cap": PSNR_CAP, "remedy": remedy}
        scores = cache.arrays("classical", key, score)
    return Quality(torch.tensor(scores["psnr"]), torch.tensor(scores["ssim"]))


def pairs(subset: Subset, degrade: Degradation, index: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Some clean images of one size, and what is given in their place: always the same."""
    clean = subset.tensor(list(index))
    return clean, degrade(clean, fixed_seeds(degrade, [subset.names[i] for i in index]))


def _joined(parts: Sequence[Quality]) -> Quality:
    return Quality(torch.cat([each.psnr for each in parts]), torch.cat([each.ssim for each in parts]))


def _digest(content: Any, images: Tensor) -> None:
    pixels = images.contiguous().numpy()
    content.update(repr((pixels.shape, pixels.dtype)).encode() + pixels.tobytes())
