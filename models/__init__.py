"""Networks: image processing (IP, the main model) and visual recognition (VR, the auxiliary model).

Plain ``nn.Module`` classes behind two registries; nothing here knows about GradProm. A new network is one new file with
a registered factory, imported below.

* IP factories: ``f(*, channels, scale=1, **options)``, ``[N, C, H, W] -> [N, C, H * scale, W * scale]``
* VR factories: ``f(*, channels, num_classes, **options)``, ``[N, C, H, W] -> logits [N, num_classes]``
"""

from __future__ import annotations

from torch import nn

from models.registry import Registry, UnknownNameError

IP: Registry[nn.Module] = Registry("IP network")
VR: Registry[nn.Module] = Registry("VR network")

from models import resnet, srresnet  # noqa: E402  (the files register themselves in the registries above)

__all__ = ["IP", "VR", "Registry", "UnknownNameError", "resnet", "srresnet"]
