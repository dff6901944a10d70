"""Networks: image processing (IP, the main model) and visual recognition (VR, the auxiliary models).

Plain ``nn.Module`` classes behind three registries; nothing here knows about GradProm. A new network is one new file
with a registered factory, imported below, and its options (if it has any) as a frozen dataclass in that file. The
command line reads the options before PyTorch is imported: layers of one's own go into a file that the factory imports.

* IP: ``f(options, *, channels, scale)``, ``[N, C, H, W] -> [N, C, H * scale, W * scale]``
* VR (diagnosis): ``f(options, *, channels, num_classes)``, ``[N, C, H, W] -> logits [N, num_classes]``
* SEG (segmentation): ``f(options, *, channels, num_classes)``, ``[N, C, H, W] -> logits [N, num_classes, H, W]``
"""

from __future__ import annotations

from models.registry import Networks, NoOptions, Registry, UnknownNameError

IP = Networks("IP network")
VR = Networks("VR network")
SEG = Networks("segmentation network")

from models import resnet, srresnet, swin, unet, vit  # noqa: E402  (the files register themselves in the registries above)

__all__ = [
    "IP",
    "SEG",
    "VR",
    "Networks",
    "NoOptions",
    "Registry",
    "UnknownNameError",
    "resnet",
    "srresnet",
    "swin",
    "unet",
    "vit",
]
