"""Networks: image processing (IP, the main model) and visual recognition (VR, the auxiliary models).

Plain ``nn.Module`` classes behind three registries; nothing here knows about GradProm. A new network is one new file
with a registered factory, imported below, and its options (if it has any) as a frozen dataclass in that file. The
command line reads the options before PyTorch is imported: layers of one's own go into a file that the factory imports.

* IP: ``f(options, *, channels, scale)``, ``[N, C, H, W] -> [N, C, H * scale, W * scale]``; one that owns its loss has
  ``training_loss`` besides (:mod:`models.training`)
* VR (diagnosis): ``f(options, *, channels, num_classes)``, ``[N, C, H, W] -> logits [N, num_classes]``
* SEG (segmentation): ``f(options, *, channels, num_classes)``, ``[N, C, H, W] -> logits [N, num_classes, H, W]``
* CRITIC: ``f(options, *, channels)``, ``[N, C, H, W] -> logits [N, 1, h, w]``, above 0 for images of the domain

An IP may take a second image, a guide (``takes_guide = True``, ``forward(x, guide=None)``, ``remember``), and may want
crops whose sides are multiples of ``crop_multiple``; :class:`models.hqgnet.network.HQGNet` does both. One that reduces
images has the attribute ``multiple``: an image that is shifted by as many pixels has the same answer, shifted.
"""

from __future__ import annotations

from models.registry import Networks, NoOptions, Registry, UnknownNameError

IP = Networks("IP network")
VR = Networks("VR network")
SEG = Networks("segmentation network")
CRITIC = Networks("critic")

# The files register themselves in the registries above.
from models import critic, drunet, hqgnet, iconet, resnet, srresnet, swin, unet, vit  # noqa: E402

__all__ = [
    "CRITIC",
    "IP",
    "SEG",
    "VR",
    "Networks",
    "NoOptions",
    "Registry",
    "UnknownNameError",
    "critic",
    "drunet",
    "hqgnet",
    "iconet",
    "resnet",
    "srresnet",
    "swin",
    "unet",
    "vit",
]
