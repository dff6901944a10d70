"""What a network has made of images before its last layer: the features that tasks, losses and distances share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def penultimate(network: nn.Module) -> Iterator[list[Tensor]]:
    """Listens to the input of a network's last layer: the last of its modules, in the order in which they were made,
    that has parameters and no modules in it. In a ResNet that is the average over the last feature map, ``[N, F]``; in
    a UNet the feature map of full size, ``[N, F, H, W]``.

    :param network: a call of it within the block adds what its last layer was given.
    :raises ValueError: the network has no layer with parameters.
    """
    layers = [each for each in network.modules() if not any(each.children()) and any(True for _ in each.parameters())]
    if not layers:
        raise ValueError("the network has no layer with parameters, and so no features before the last one")
    seen: list[Tensor] = []
    hook = layers[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()
