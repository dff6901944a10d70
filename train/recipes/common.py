"""Arms and settings that several recipes share."""

from __future__ import annotations

from train.recipes.base import Arm, Overrides, Tuning

ALONG: Overrides = {"vr_update": "train"}
"""VR learns along with IP, from random weights: the paper's way."""

FIXED: Overrides = {"vr_update": "fixed", "vr_start": "clean"}
"""VR has learned from clean images and stays as it is."""

SLOW: Overrides = {"vr_update": "ema", "vr_start": "clean"}
"""VR has learned from clean images and learns on; IP is advised by the moving average of its weights."""

IP_ONLY = Arm("ip-only", {"strategy": "ip-only"})
JOINT = Arm("joint", {"strategy": "joint", **ALONG})
FROZEN = Arm("frozen", {"strategy": "frozen", "vr_start": "clean"})
GRADPROM = Arm("gradprom", {"strategy": "gradprom", **ALONG})
SOFT = Arm("gradprom-soft", {"strategy": "gradprom-soft", **ALONG})

CAPPED = Arm("capped", {"strategy": "gradprom-capped", **ALONG})
CAPPED_SOFT = Arm("capped soft", {"strategy": "gradprom-capped-soft", **ALONG})

ISIC: Overrides = {"dataset": "isic2018", "channels": 3}

WHOLE_IMAGES: Overrides = {"crop": 128, "batch_size": 2}
"""Of 128 px. A diagnosis is of an image: a crop of it need not show the finding."""

GOOD_IP: Overrides = {"ip": "drunet", "ip_start": "alone", "lr": 5e-4, "epochs": 1000}
"""A DRUNet that has learned to restore alone, and is better than the classical remedies when VR joins: what VR can add
to a network that still learns the first things is of no use to anybody. The number of steps ends the training, not that
of epochs."""

SHARED_VRS: Overrides = {"clean_seed": 0}
"""All seeds share one VR of clean images to begin with, and one reader: each costs minutes."""

QUICK: Overrides = {**WHOLE_IMAGES, **GOOD_IP, **SHARED_VRS, "max_steps": 200}
QUICK_CT: Overrides = {**QUICK, "clean_epochs": 10}
QUICK_SEG: Overrides = {**QUICK, "seg.features": 8, "clean_epochs": 3}
"""Of thousands of images, of which each epoch has more."""

LAMBDAS = Tuning("aux_weight", ((1e-3,), (1e-2,), (1e-1,)), share=0.3)


def fixed(arm: Arm) -> Arm:
    """The arm with a VR that has learned from clean images and stays as it is."""
    return Arm(f"{arm.name} (fixed VR)", {**arm.settings, **FIXED})
