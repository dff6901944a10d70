"""What an encoder has learned, judged without training it: its embeddings are computed once, and small heads learn from
them. Frozen means frozen: neither parameters nor batch statistics move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from models.decoder import Decoder, decoded
from models.slices import SliceHead
from train.data.base import ImageData, Subset
from train.evaluation.evaluate import groups
from train.evaluation.metrics import accuracy, confusion, majority_share, overlap, psnr_of
from train.evaluation.spectrum import spectrum
from train.inference import BATCH, forward
from train.losses import HIGH_PASS, high_passed, image_loss, segmentation_loss
from train.seeds import stable_seed
from train.training.schedule import course

if TYPE_CHECKING:
    from models.encoder import Encoder

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""Of the squared weights of a linear probe, beside a mean cross-entropy: what is tried on validation images."""


def freeze(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, without gradients: the same object."""
    return network.eval().requires_grad_(False)


def embeddings(network: nn.Module, subset: Subset, *, device: torch.device) -> Tensor:
    """The embedding of every image, ``float32 [N, D, h, w]``, on the CPU.

    :param network: an :class:`models.encoder.Encoder` on ``device``; it is frozen here.
    :param subset: images of one size.
    """
    encoder = cast("Encoder", freeze(network))
    return torch.cat([forward(encoder.features, subset.tensor(list(index)), device=device) for index in groups(subset)])


class Probe(nn.Module):
    """A linear layer on standardized features: ``float [N, D] -> logits [N, K]``."""

    mean: Tensor
    spread: Tensor

    def __init__(self, features: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("spread", features.std(0, correction=0).clamp(min=1e-6))
        self.linear = nn.Linear(features.shape[1], classes)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear((features - self.mean) / self.spread)


def linear_probe(features: Tensor, labels: Tensor, classes: int, *, penalty: float) -> Probe:
    """Multinomial logistic regression, solved to its end (L-BFGS): nothing random is in it.

    :param features: ``float [N, D]``.
    :param labels: ``int64 [N]`` in [0, classes), or -1 where they are not known, which do not count.
    :param penalty: of half the sum of the squared weights, beside the mean cross-entropy; the bias is free.
    :raises ValueError: no label is known.
    """
    known = labels >= 0
    if not known.any():
        raise ValueError("a linear probe needs at least one image whose label is known")
    features, labels = features[known].double(), labels[known]
    probe = Probe(features, classes).double()
    optimizer = torch.optim.LBFGS(
        probe.parameters(), max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(probe(features), labels)
        value = value + penalty / 2 * probe.linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return probe


def train_head(
    head: nn.Module,
    given: Tensor,
    loss: Callable[[Tensor, Sequence[int]], Tensor],
    *,
    steps: int,
    device: torch.device,
    batch_size: int = 8,
    lr: float = 1e-3,
    seed: int = 0,
) -> nn.Module:
    """Trains a head on embeddings that were computed before (AdamW, our course of the learning rate).

    :param head: with fresh weights.
    :param given: the embeddings, ``float32 [N, D, h, w]``, on the CPU.
    :param loss: of the head's output for some images, and their places among the embeddings.
    :param seed: decides the order of the images.
    :returns: the head, frozen.
    """
    head.to(device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: course(steps, step))
    generator = torch.Generator().manual_seed(stable_seed("head", seed))
    order: list[int] = []
    for _ in range(steps):
        if len(order) < min(batch_size, len(given)):
            order = torch.randperm(len(given), generator=generator).tolist()
        index, order = order[:batch_size], order[batch_size:]
        optimizer.zero_grad()
        loss(head(given[index].to(device)), index).backward()
        optimizer.step()
        schedule.step()
    return freeze(head)


def judge(network: nn.Module, data: ImageData, *, device: torch.device, steps: int, seed: int) -> dict[str, Any]:
    """What can be read from the embeddings of a frozen encoder, on test images.

    :param network: the encoder.
    :param steps: of each small decoder.
    :param seed: of the decoders' first weights and of their order of images.
    :returns: JSON-able: ``frequencies``, ``ring_correlation`` and ``energy_ratio`` (means over images, per band),
        ``psnr`` and ``psnr_high`` (of decoded images, and of their high-passed ones); ``accuracy`` where there are
        labels, ``accuracy_patients`` where patients have several images with one label, ``miou`` where there are masks.
    """
    train, test = (embeddings(network, each, device=device) for each in (data.train, data.test))
    found = _decoded(network, data, train, test, device=device, steps=steps, seed=seed)
    if data.train.labels is not None and data.test.labels is not None and data.num_classes > 1:
        val = embeddings(network, data.val, device=device) if len(data.val) else None
        found |= _diagnosed(data, train, val, test)
        found |= _patients_diagnosed(network, data, train, test, device=device, steps=steps, seed=seed)
    if data.train.has_masks and data.test.has_masks:
        found |= _segmented(network, data, train, test, device=device, steps=steps, seed=seed)
    return found


def _head(network: nn.Module, channels: int, seed: int) -> nn.Module:
    """A decoder with fresh weights: the same ones for every encoder of one width."""
    encoder = cast("Encoder", network)
    torch.manual_seed(stable_seed("DECODER", seed))
    return Decoder(encoder.width, encoder.stride.bit_length() - 1, channels)


def _decoded(
    network: nn.Module, data: ImageData, train: Tensor, test: Tensor, *, device: torch.device, steps: int, seed: int
) -> dict[str, Any]:
    """How much of the image a small decoder finds."""
    size = data.size
    assert size is not None

    def loss(output: Tensor, index: Sequence[int]) -> Tensor:
        return image_loss(output[..., : size[0], : size[1]], data.train.tensor(list(index)).to(device))

    head = train_head(_head(network, data.channels, seed), train, loss, steps=steps, device=device, seed=seed)
    images = forward(lambda each: decoded(head, each, size), test, device=device)
    clean = data.test.tensor(list(range(len(data.test))))
    bands = spectrum(images, clean, bands=min(16, min(size) // 4))
    # High-passed images are around 0; the error is what counts.
    high = (high_passed(images, HIGH_PASS[0]) - high_passed(clean, HIGH_PASS[0])).square().mean((1, 2, 3))
    return {
        "frequencies": bands.frequencies.tolist(),
        "ring_correlation": bands.correlation.nanmean(0).tolist(),
        "energy_ratio": bands.energy.nanmean(0).tolist(),
        "psnr": float(psnr_of(images, clean, dim=(1, 2, 3)).mean()),
        "psnr_high": float((-10 * torch.log10(high)).mean()),
    }


def _diagnosed(data: ImageData, train: Tensor, val: Tensor | None, test: Tensor) -> dict[str, Any]:
    """A linear layer on the mean embedding; its penalty is chosen by validation images."""

    def labels(subset: Subset) -> Tensor:
        return torch.tensor(subset.labels)

    def right(penalty: float, features: Tensor, subset: Subset) -> float:
        probe = linear_probe(train.mean((2, 3)), labels(data.train), data.num_classes, penalty=penalty)
        return accuracy(probe(features.mean((2, 3)).double()).detach(), labels(subset))

    chosen = PENALTIES[1]
    if val is not None and data.val.labels is not None and (data.val.labels >= 0).any():
        chosen = max(PENALTIES, key=lambda penalty: right(penalty, val, data.val))
    share = right(chosen, test, data.test)
    known = int((labels(data.test) >= 0).sum())
    return {
        "accuracy": share,
        "accuracy_half_width": 1.96 * (share * (1 - share) / known) ** 0.5,
        "accuracy_majority": majority_share(data.test.labels),
        "penalty": chosen,
    }


@dataclass(frozen=True)
class Stacks:
    """Embeddings by patient, as volumes are diagnosed.

    :param embeddings: ``float32 [P, S, D, h, w]``; NaN behind the slices of a patient who has fewer than others.
    :param labels: ``int64 [P]``.
    """

    embeddings: Tensor
    labels: Tensor


def stacks(subset: Subset, embeddings: Tensor) -> Stacks | None:
    """The images of each patient whose images all have one label that is known.

    :param embeddings: of the images, ``float32 [N, D, h, w]``.
    :returns: ``None`` where patients or labels are not known, or no patient has a second image.
    """
    if subset.patients is None or subset.labels is None:
        return None
    places: dict[str, list[int]] = {}
    for place, patient in enumerate(subset.patients):
        places.setdefault(patient, []).append(place)
    labels = {patient: {int(subset.labels[place]) for place in own} for patient, own in places.items()}
    known = [patient for patient, own in labels.items() if len(own) == 1 and min(own) >= 0]
    most = max((len(places[patient]) for patient in known), default=0)
    if most < 2:
        return None
    padded = embeddings.new_full((len(known), most, *embeddings.shape[1:]), float("nan"))
    for row, patient in enumerate(known):
        padded[row, : len(places[patient])] = embeddings[places[patient]]
    return Stacks(padded, torch.tensor([min(labels[patient]) for patient in known]))


def _patients_diagnosed(
    network: nn.Module, data: ImageData, train: Tensor, test: Tensor, *, device: torch.device, steps: int, seed: int
) -> dict[str, Any]:
    """A transformer layer over the slices of each patient (:class:`models.slices.SliceHead`)."""
    own, others = stacks(data.train, train), stacks(data.test, test)
    if own is None or others is None:
        return {}
    labels = own.labels
    torch.manual_seed(stable_seed("SLICES", seed))
    fresh = SliceHead(cast("Encoder", network).width, data.num_classes)

    def loss(output: Tensor, index: Sequence[int]) -> Tensor:
        return nn.functional.cross_entropy(output, labels[index].to(device))

    head = train_head(fresh, own.embeddings, loss, steps=steps, device=device, seed=seed)
    with torch.no_grad():
        logits = torch.cat([head(some.to(device)).cpu() for some in others.embeddings.split(BATCH)])
    return {
        "accuracy_patients": accuracy(logits, others.labels),
        "accuracy_patients_majority": majority_share(others.labels.numpy()),
        "patients": len(others.labels),
    }


def _segmented(
    network: nn.Module, data: ImageData, train: Tensor, test: Tensor, *, device: torch.device, steps: int, seed: int
) -> dict[str, Any]:
    """A small decoder to logits per pixel."""
    size, classes = data.size, data.num_mask_classes
    assert size is not None

    def loss(output: Tensor, index: Sequence[int]) -> Tensor:
        return segmentation_loss(output[..., : size[0], : size[1]], data.train.masks_tensor(list(index)).to(device))

    head = train_head(_head(network, classes, seed), train, loss, steps=steps, device=device, seed=seed)
    answers = forward(lambda each: decoded(head, each, size), test, device=device)
    score = overlap(confusion(answers, data.test.masks_tensor(list(range(len(data.test))))))
    return {"miou": score.iou.item(), "dice": score.dice.item()}
