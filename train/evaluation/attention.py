"""What a network looks at: maps of the places of an image that its answer depends on.

Both functions work on a copy of the network. What they need (its mode of evaluation, hooks, gradients of every
parameter) leaves the network as it was, whatever happens in between, and frozen networks are no special case.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_POOLINGS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d)
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU)


def class_activation(network: nn.Module, images: Tensor, classes: Tensor | Sequence[int]) -> Tensor:
    """Grad-CAM: which places of an image speak for a class.

    R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV
    2017, computed by MONAI. The features are those of the last layer that still knows places (:func:`feature_layer`):
    in a ResNet what its global pooling averages, for which Grad-CAM is the class activation map of B. Zhou et al., CVPR
    2016; in a UNet the bottleneck, as K. Vinogradova et al. recommend for segmentations (Seg-Grad-CAM, AAAI 2020). The
    score of a segmentation is the sum of the class's logits over all pixels.

    :param network: ``[N, C, H, W] -> logits [N, K]`` or ``[N, K, H, W]``; it stays as it is, with its mode, hooks,
        ``requires_grad`` and gradients.
    :param images: ``float32 [N, C, H, W]``, on the network's device.
    :param classes: of each image, ``int64 [N]`` in [0, K).
    :returns: ``float32 [N, H, W]`` in [0, 1] on the CPU: the map of each image by its largest value; 0 everywhere where
        nothing speaks for the class.
    :raises ValueError: the numbers of images and classes differ, or the network has no convolution.
    """
    from monai.visualize import GradCAM

    if len(classes) != len(images):
        raise ValueError(f"class activation needs a class for each image, not {len(classes)} for {len(images)} images")
    maps = []
    with _copied(network) as own:
        # MONAI's hooks see no gradient where nothing in front of the layer wants one: frozen networks have none.
        own.requires_grad_(True)
        layer = feature_layer(own, images[:1].detach().clone()) if len(images) else ""
        # MONAI's own last step maps the largest value to 0, and the smallest one to 1.
        activation = GradCAM(own, layer, postprocessing=lambda values: values)
        # One by one: for several images MONAI adds the scores of all their classes.
        for number, each in enumerate(classes):
            image = images[number : number + 1].detach().clone()
            maps.append(_scaled(activation(image, class_idx=int(each)).detach()[0, 0].cpu()))
    return torch.stack(maps) if maps else torch.empty(0, *images.shape[2:])


def feature_layer(network: nn.Module, image: Tensor) -> str:
    """The name of the layer whose output are the last features that still know places.

    That is the input of the last global pooling, where a layer of the network gives it (the outermost such layer: what
    a ResNet's last stage hands on, after its skip connection and its rectifier). Elsewhere it is the last convolution
    among those with the fewest pixels: in front of a pooling that is no layer, or at the bottleneck of a UNet.

    :param image: ``float32 [1, C, H, W]`` to try the network with.
    :raises ValueError: there is no convolution.
    """
    names = {module: name for name, module in network.named_modules()}
    outputs: dict[int, tuple[Tensor, str]] = {}  # by identity; the tensors are kept, so that no identity is used twice
    pooled: list[str] = []
    convolutions: list[tuple[int, str]] = []

    def look(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        given = inputs[0] if inputs else None
        if not isinstance(given, Tensor) or not isinstance(output, Tensor) or output.ndim != 4:
            return
        pixels = output.shape[2] * output.shape[3]
        if isinstance(module, _POOLINGS) and pixels == 1 and id(given) in outputs:
            pooled.append(outputs[id(given)][1])
        elif isinstance(module, nn.Conv2d):
            convolutions.append((pixels, names[module]))
        if module is not network:
            outputs[id(output)] = output, names[module]

    hooks = [module.register_forward_hook(look) for module in network.modules()]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    if pooled:
        return pooled[-1]
    if not convolutions:
        raise ValueError(f"{type(network).__name__} has no convolution, and so no features that know places")
    fewest = min(pixels for pixels, _ in convolutions)
    return [name for pixels, name in convolutions if pixels == fewest][-1]


def guided_backpropagation(network: nn.Module, images: Tensor, target: Callable[[Tensor], Tensor]) -> Tensor:
    """Guided backpropagation: which pixels of an image raise what a network says.

    J. T. Springenberg et al., "Striving for Simplicity: The All Convolutional Net", ICLR 2015 workshop: the gradient of
    a score by the pixels, of which each rectifier lets only the positive part through. It equals MONAI's
    ``GuidedBackpropGrad`` where that works: MONAI exchanges the layers that are *called* relu (Project-MONAI/MONAI
    issue 6057), and so gives the plain gradient of its own ResNet and UNet and of SR-ResNet, whose rectifiers have
    other names and kinds. Here every rectifier is guided: the positive part of the gradient goes on, times its own
    derivative.

    :param network: anything that takes ``images``; it stays as it is, with its mode, hooks, ``requires_grad`` and
        gradients.
    :param images: ``float32 [N, C, H, W]``, on the network's device.
    :param target: from the output ``[N, ...]`` to a score per image, ``[N]``: :func:`class_score`,
        :func:`summed_output`.
    :returns: ``float32 [N, H, W]`` in [0, 1] on the CPU: the largest absolute gradient among the channels of each
        pixel, by the largest one of the image; 0 everywhere where the score does not depend on the image.
    :raises ValueError: the target gives something else than a score per image.
    """
    with _copied(network) as own:
        own.requires_grad_(False)
        for module in own.modules():
            if isinstance(module, _RECTIFIERS):
                module.register_forward_hook(_guided)
        pixels = images.detach().clone().requires_grad_()
        scores = target(own(pixels))
        if scores.shape != (len(images),):
            raise ValueError(f"the target must give a score per image, [{len(images)}], not {list(scores.shape)}")
        # The images are independent of each other in evaluation mode: the gradient of the sum has that of each one.
        (gradient,) = torch.autograd.grad(scores.sum(), pixels, allow_unused=True)
    if gradient is None:
        gradient = torch.zeros_like(images)
    maps = [_scaled(each) for each in gradient.abs().amax(1).float().cpu()]
    return torch.stack(maps) if maps else torch.empty(0, *images.shape[2:])


def _guided(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    # A hook of the tensor, not of the module: those of modules fail where a rectifier works in place.
    output.register_hook(F.relu)


def class_score(classes: Tensor | Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The target of a network that recognizes something: how sure it is of a class.

    The logit of a diagnosis; of a segmentation, the mean of the class's logits over the pixels that the network gives
    to the class, and over all pixels where there is no such pixel.

    :param classes: of each image, ``int64 [N]``.
    """

    def score(output: Tensor) -> Tensor:
        own = torch.stack([logits[int(each)] for logits, each in zip(output, classes, strict=True)])
        if own.ndim == 1:
            return own
        wanted = torch.as_tensor(classes, device=output.device)[:, None, None]
        given = (output.argmax(1) == wanted).to(own.dtype)
        given = torch.where(given.sum((1, 2), keepdim=True) > 0, given, torch.ones_like(given))
        return (own * given).sum((1, 2)) / given.sum((1, 2))

    return score


def summed_output(output: Tensor) -> Tensor:
    """The target of a network that enhances images: the sum of all pixels that it gives.

    Of all targets it is the one whose map is about the whole image, like that of a class: the pixels that change the
    enhanced image most. That of a single pixel shows the field around it that the network takes into account.
    """
    return output.flatten(1).sum(1)


@contextmanager
def _copied(network: nn.Module) -> Iterator[nn.Module]:
    """A copy in evaluation mode, and gradients even where the caller has switched them off.

    Leaving inference mode happens to switch gradients on as well, which PyTorch does not promise.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield copy.deepcopy(network).eval()


def _scaled(values: Tensor) -> Tensor:
    most = values.max()
    return torch.zeros_like(values) if most == 0 else values / most
