"""What a run is: its typed settings, in sections that belong to the rooms that read them.

Nothing here imports torch, so that ``python -m train.run --help`` answers at once.
"""

# ruff: noqa: RUF009 (`setting` makes a field, as dataclasses.field does)

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models import CRITIC, IP, SEG, VR, Networks, Registry, UnknownNameError
from train.errors import RunError
from train.losses import IMAGE_LOSSES
from train.strategies import STRATEGIES, Strategy, strategy_class
from train.strategies.auxiliary import AUXILIARIES
from train.strategies.base import (
    Adversarial,
    Gate,
    Granularity,
    Hyper,
    Keeps,
    Precision,
    TrainOn,
    VRLoss,
    VRStart,
    VRUpdate,
)
from train.strategies.masked import METHODS

NETWORKS: dict[str, Networks] = {"ip": IP, "vr": VR, "seg": SEG, "critic": CRITIC}
"""The roles' keys, which are also their flags, and where their networks are looked up."""


def flag(name: str) -> str:
    """A setting's name as the command line spells it.

    >>> flag("batch_size"), flag("ip_options")
    ('--batch-size', '--ip')
    """
    return "--" + name.removesuffix("_options").replace("_", "-")


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    concerns: str = "",
    computes: bool = True,
) -> Any:
    """A field of a section.

    :param help: what ``--help`` says.
    :param least: the least value, of numbers.
    :param above: what a value must exceed, of numbers.
    :param most: the greatest value, of numbers.
    :param concerns: the key of a role, a name in ``Strategy.settings`` or in ``Settings.concerned``: without it, the
        setting changes nothing.
    :param computes: whether it decides what a run computes; else a run that goes on may have another value.
    """
    about = {"help": help, "least": least, "above": above, "most": most, "concerns": concerns, "computes": computes}
    return field(default=default, metadata=about)


class Section:
    """Refuses values out of range, when it is made."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            values = getattr(self, each.name)
            for value in values if isinstance(values, tuple) else (values,):
                _check(each.name, value, each.metadata)


def _check(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    least, above, most = (limits.get(which) for which in ("least", "above", "most"))
    if (least is None and above is None) or value is None:
        return
    what = "a finite number" if isinstance(value, float) else ""
    bound = f"at least {least:g}" if least is not None else f"above {above:g}"
    fits = value >= least if least is not None else value > above
    if most is not None:
        bound, fits = f"{bound} and at most {most:g}", fits and value <= most
    if not (math.isfinite(value) and fits):
        phrase = bound if not what else f"{what}, {bound}" if least is not None else f"{what} {bound}"
        raise RunError(f"{flag(name)} must be {phrase}, not {value}")


def known(name: str, registry: Registry[Any], value: str) -> None:
    """
    :raises RunError: there is nothing of that name; the message lists what there is.
    """
    try:
        registry[value]
    except UnknownNameError as error:
        raise RunError(f"{flag(name)}: {error}") from error


@dataclass(frozen=True)
class Data(Section):
    """The clean images."""

    dataset: str = setting("covidct", "Data set.")
    data_root: Path | None = setting(
        None,
        "Where the data set is. By default $GRADPROM_DATA and ./data are searched, then it is downloaded.",
        computes=False,
    )
    source: Literal["auto", "real", "phantom"] = setting(
        "auto",
        "real: the data set or an error. phantom: generated images. auto: phantoms only where there is nothing real.",
    )
    size: int | None = setting(128, "Side of the square images, in pixels; None: images as they are.", least=1)
    channels: Literal[1, 3] = setting(1, "1: gray images. 3: color.")
    window: str | None = setting(
        None,
        "Which values become 0 and 1: CENTER/WIDTH in the unit of the images (-600/1500: lungs in CT), or percentiles "
        "of the training images (P1-P99). By default the limits of 8 or 16 bits, or the extremes of all images.",
    )
    test_dataset: str | None = setting(
        None, "Another data set, whose test images are enhanced in the place of this one's; its labels do not matter."
    )
    test_root: Path | None = setting(None, "Where that one is, as --data-root.", computes=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            from train.data.window import Window  # with it come all data sets, which take longer than --help should

            try:
                Window.parse(self.window)
            except ValueError as error:
                raise RunError(f"--window: {error}") from error


@dataclass(frozen=True)
class Degradation(Section):
    """What IP has to undo."""

    task: str = setting(
        "denoise",
        "What IP has to undo: denoise, sr2, sr3, sr4, mixture, kspace2, kspace4, joint2, joint4, none (images are poor "
        "as they are), or degradations with their arguments, joined by +, such as poisson:30+blur:1.5. (--task list "
        "shows them all.)",
    )
    sigma: float = setting(0.1, "Standard deviation of the noise of task denoise, for images in [0, 1].", least=0)


@dataclass(frozen=True)
class Network(Section):
    """IP. ``ip_options`` are those of the network's file; ``None`` becomes their defaults."""

    ip: str = setting("srresnet", "Image processing network.", concerns="ip")
    ip_options: Any = setting(None, "", concerns="ip")
    ip_weights: Path | None = setting(
        None, "First weights of IP: a safetensors file, such as weights.safetensors of a run.", concerns="ip"
    )
    ip_start: Literal["fresh", "alone"] = setting(
        "fresh",
        "fresh: IP begins with random weights. alone: with those of an IP that was trained without VR and is kept in "
        "the cache.",
        concerns="ip",
    )
    ip_loss: str = setting(
        "mse",
        "Loss between the enhanced and the clean image. mse: mean squared error. frepa: root mean squared error, "
        "gradients and high frequencies.",
        concerns="ip_loss",
    )
    ip_aux: str | None = setting(
        None,
        "Losses of IP's own, such as rec of iconet, that become auxiliary losses with a gate each (several: joined by "
        "commas). By default they are added to its main loss.",
        concerns="ip_aux",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _complete_options(self, "ip")
        known("ip_loss", IMAGE_LOSSES, self.ip_loss)
        own = IP.terms(self.ip)
        for name in self.ip_aux_names:
            if name not in own:
                others = [f"{each} ({', '.join(IP.terms(each))})" for each in IP if IP.terms(each)]
                has = f"it has {', '.join(own)}" if own else f"networks that have any: {', '.join(others)}"
                raise RunError(f"--ip-aux {self.ip_aux}: {self.ip} has no loss {name!r} of its own; {has}")
        if len(set(self.ip_aux_names)) != len(self.ip_aux_names):
            raise RunError(f"--ip-aux {self.ip_aux}: a loss is named twice")

    @property
    def ip_aux_names(self) -> tuple[str, ...]:
        """The losses of IP's own that are auxiliaries, in their order."""
        return () if self.ip_aux is None else tuple(self.ip_aux.split(","))


@dataclass(frozen=True)
class Auxiliary(Section):
    """The VRs: one network per task."""

    aux: str = setting("dia", "What VR does: dia (diagnosis), seg (segmentation), or dia,seg.", concerns="aux")
    vr: str = setting("resnet18", "Diagnosis network.", concerns="vr")
    vr_options: Any = setting(None, "", concerns="vr")
    seg: str = setting("unet", "Segmentation network.", concerns="seg")
    seg_options: Any = setting(None, "", concerns="seg")
    vr_weights: Path | None = setting(
        None, "First weights of the VRs: a safetensors file, such as weights.safetensors of a run.", concerns="aux"
    )
    aux_weight: tuple[float, ...] = setting(
        (1e-3,),
        "Weight lambda of the auxiliary loss (a cross-entropy near 0.7, beside a mean squared error near 0.002), or "
        "one per auxiliary.",
        least=0,
        concerns="aux_weight",
    )
    vr_update: VRUpdate = setting(
        "train",
        "What becomes of VR while IP is trained. train: it learns along. fixed: it stays as it is. ema: it learns "
        "along, and IP is advised by the moving average of its weights.",
        concerns="vr_update",
    )
    ema_decay: float = setting(
        0.99, "Share of the moving average that a step leaves (--vr-update ema).", least=0, most=1, concerns="ema_decay"
    )
    vr_loss: VRLoss = setting(
        "supervised",
        "supervised: against labels or masks. unsupervised: against what VR says of the clean image.",
        concerns="vr_loss",
    )
    vr_start: VRStart = setting(
        "fresh",
        "fresh: VR begins with random weights; where it has to know its task, it learns that in a first phase of the "
        "run (--pretrain-epochs). clean: with the weights of a VR that was trained on clean images, which is kept in "
        "the cache. frepa, mae, mfm: with those of an encoder that was pre-trained so on the training images, without "
        "labels; it is kept in the cache, too.",
        concerns="vr_start",
    )
    label_smoothing: float = setting(
        0.0, "Share of a diagnosis's target that is spread over all classes.", least=0, most=0.99, concerns="vr"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("vr", "seg"):
            _complete_options(self, key)
        for name in self.names:
            known("aux", AUXILIARIES, name)
        if len(set(self.names)) != len(self.names):
            raise RunError(f"--aux {self.aux}: an auxiliary is named twice")
        if len(self.aux_weight) not in (1, len(self.names)):
            raise RunError(
                f"--aux-weight takes one number, or one for each of --aux {self.aux}, not {len(self.aux_weight)}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The auxiliaries, in their order."""
        return tuple(self.aux.split(","))


def _complete_options(section: Section, key: str) -> None:
    """
    :raises RunError: the network does not exist, or the options are those of another one.
    """
    name, options = getattr(section, key), getattr(section, f"{key}_options")
    known(key, NETWORKS[key], name)
    kind = NETWORKS[key].options(name)
    if options is None:
        object.__setattr__(section, f"{key}_options", kind())
    elif type(options) is not kind:
        raise RunError(f"{flag(key)} {name} takes {kind.__name__}, not {type(options).__name__}")


@dataclass(frozen=True)
class Method(Section):
    """How IP and VR are trained."""

    strategy: str = setting("gradprom", "How IP and VR are trained.")
    gate: Gate | None = setting(None, "Gate of strategies gradprom and hqg; the others fix their own.", concerns="gate")
    threshold: float = setting(
        0.0, "Cosine at which a hard or a soft gate opens.", least=-1, most=1, concerns="threshold"
    )
    granularity: Granularity = setting(
        "global", "global: one gate for all of IP. tensor: one for each of its tensors.", concerns="granularity"
    )
    aux_cap: float | None = setting(
        None,
        "Length kappa that VR's gradient may have at most, in lengths of IP's own. By default 1 for the capped "
        "strategies, and no limit for the others.",
        above=0,
        concerns="aux_cap",
    )
    pretrain_epochs: int = setting(
        5,
        "Passes over the clean images for a VR that has to know its task before IP's training begins, and does not "
        "(--vr-update fixed or ema, --vr-loss unsupervised, strategy frozen).",
        least=0,
        concerns="pretrain_epochs",
    )
    adversarial: Adversarial = setting(
        "discriminator",
        "What an encoder learns from besides the reconstruction (strategy masked only). discriminator: a critic tells "
        "decoded from clean images. consistency: two corruptions of an image are to have one embedding.",
        concerns="adversarial",
    )
    train_on: TrainOn = setting("degraded", "What VR alone is trained on (strategy vr-only only).", concerns="train_on")

    def __post_init__(self) -> None:
        super().__post_init__()
        known("strategy", STRATEGIES, self.strategy)
        if self.threshold != 0 and self.gate not in (None, "hard", "soft"):
            raise RunError(f"--threshold {self.threshold:g} has no meaning for --gate {self.gate}; leave one out")
        if self.gate is not None and not self.kind.gate_is_free:
            free = ", ".join(name for name in STRATEGIES if strategy_class(name).gate_is_free)
            raise RunError(f"--strategy {self.strategy} fixes its own gate; --gate {self.gate} goes with: {free}")

    @property
    def kind(self) -> type[Strategy]:
        """The strategy's class."""
        return strategy_class(self.strategy)


@dataclass(frozen=True)
class Unpaired(Section):
    """Learning from images of low and of high quality that are no pairs: the critic, and the weights of the losses."""

    critic: str = setting("patch", "Network that tells images of high quality from enhanced ones.", concerns="critic")
    critic_options: Any = setting(None, "", concerns="critic")
    critic_lr: float = setting(2e-4, "Learning rate of the critic, same course.", above=0, concerns="critic")
    adversarial_weight: float = setting(1.0, "Weight of IP's loss against the critic.", least=0, concerns="unpaired")
    r1_weight: float = setting(
        1.0,
        "Weight of the critic's penalty for a steep answer about images of high quality.",
        least=0,
        concerns="unpaired",
    )
    wavelet_weight: float = setting(
        1.0,
        "Weight of the difference of enhanced and degraded images in Haar wavelets. A large one, such as 10, holds "
        "them to be equal.",
        least=0,
        concerns="unpaired",
    )
    keeps: Keeps = setting(
        "details",
        "What of the degraded image the wavelet loss holds on to. details: for uneven light and blur. brightness: for "
        "noise.",
        concerns="unpaired",
    )
    feature_weight: float = setting(
        1.0,
        "Weight of the difference of enhanced and degraded images in the features of IP's encoder and of VR.",
        least=0,
        concerns="unpaired",
    )
    consistency_weight: float = setting(
        1.0,
        "Weight of the difference of enhanced images and guides in what the guidance encoder says of them.",
        least=0,
        concerns="unpaired",
    )
    kl_weight: float = setting(
        0.01, "Weight of the divergence of guides' descriptions (--ip.variational).", least=0, concerns="unpaired"
    )
    hyper: Hyper = setting(
        "first-order",
        "unrolled: the gradient of a task's loss also goes through VR's last step, which costs a second derivative.",
        concerns="unpaired",
    )
    inner_steps: int = setting(1, "Steps of VR in each of IP's.", least=1, concerns="unpaired")

    def __post_init__(self) -> None:
        super().__post_init__()
        _complete_options(self, "critic")


@dataclass(frozen=True)
class Training(Section):
    """The course of the training."""

    optimizer: Literal["adam", "adamw", "sgd"] = setting("adam", "Update rule of all networks (sgd: momentum 0.9).")
    lr: float = setting(
        2e-3,
        "Highest learning rate of IP: a linear rise over the first 3 per cent of the steps, then a cosine down to 0.",
        above=0,
        concerns="ip",
    )
    vr_lr: float = setting(1e-3, "Learning rate of VR, same course.", above=0, concerns="aux")
    batch_size: int = setting(8, "Crops per step.", least=1)
    crop: int = setting(64, "Side of the random crops IP and VR are trained on, in pixels.", least=1)
    epochs: int = setting(8, "Passes over the training images.", least=1)
    max_steps: int | None = setting(None, "Stop after so many steps, if the epochs have more.", least=1)
    seed: int = setting(
        0,
        "Decides the networks' first weights, the order of the data, crops and training noise; never the test noise.",
        least=0,
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Where to compute; auto takes a GPU if there is one.", computes=False
    )
    precision: Precision = setting(
        "fp32",
        "In which numbers networks are trained. bf16: bfloat16 where PyTorch's autocast takes it, which is faster on "
        "GPUs and on processors with AMX or AVX512_BF16. fp16: float16, with a scale that a gradient scaler adapts. "
        "Weights, losses and optimizers stay in float32, and so does the evaluation.",
    )
    sync_batchnorm: bool = setting(
        False,
        "Under torchrun, on GPUs: batch statistics are those of the whole batch, not of each process's part.",
    )
    augment: bool = setting(
        False,
        "Turn, enlarge, shift and brighten training crops a little at random, besides mirroring them.",
    )
    num_workers: int = setting(
        0, "Processes that prepare the batches; 0: the training process itself.", least=0, computes=False
    )


@dataclass(frozen=True)
class Alone(Section):
    """How the IP of ``--ip-start alone`` was trained, whatever becomes of it in this run."""

    alone_steps: int = setting(1500, "Steps.", least=1, concerns="alone")
    alone_lr: float = setting(2e-3, "Its highest learning rate, same course.", above=0, concerns="alone")
    alone_batch_size: int = setting(8, "Crops per step.", least=1, concerns="alone")
    alone_crop: int = setting(64, "Side of its crops in pixels.", least=1, concerns="alone")


@dataclass(frozen=True)
class Clean(Section):
    """How a VR learns from clean images, whatever IP is trained on: that of ``--vr-start clean``, and the reader."""

    clean_epochs: int = setting(40, "Passes over the training images.", least=1, concerns="clean")
    clean_lr: float = setting(1e-3, "Its highest learning rate, same course.", above=0, concerns="clean")
    clean_batch_size: int = setting(16, "Images per step.", least=1, concerns="clean")
    clean_crop: int | None = setting(
        None,
        "Side of its crops in pixels; None: whole images (of which --size is the side).",
        least=1,
        concerns="clean",
    )
    clean_augment: bool = setting(True, "As --augment.", concerns="clean")
    clean_seed: int | None = setting(
        None,
        "Seed of these trainings; None: the run's own, so that every run has a start and a reader of its own. With a "
        "number, all runs share them.",
        least=0,
        concerns="clean",
    )
    clean_smoothing: float = setting(0.1, "As --label-smoothing.", least=0, most=0.99, concerns="clean")


@dataclass(frozen=True)
class Pretraining(Section):
    """How an encoder is pre-trained, whatever IP is trained on: that of ``--vr-start frepa``, ``mae`` and ``mfm``."""

    masked_epochs: int = setting(6, "Passes over the training images.", least=1, concerns="masked")
    masked_steps: int | None = setting(
        None, "Stop after so many steps, if the epochs have more.", least=1, concerns="masked"
    )
    masked_lr: float = setting(3e-4, "Its highest learning rate (AdamW), same course.", above=0, concerns="masked")
    masked_batch_size: int = setting(8, "Images per step.", least=1, concerns="masked")
    masked_crop: int | None = setting(
        None,
        "Side of its crops in pixels; None: whole images (of which --size is the side).",
        least=1,
        concerns="masked",
    )
    masked_seed: int | None = setting(
        None,
        "Seed of the pre-training; None: the run's own. With a number, all runs share it.",
        least=0,
        concerns="masked",
    )
    masked_adversarial: Adversarial | None = setting(
        None, "As --adversarial; None: what the method has (frepa: discriminator, the others: none).", concerns="masked"
    )


@dataclass(frozen=True)
class Evaluation(Section):
    """What the trained networks are tried on, and by whom."""

    reader: bool = setting(
        False,
        "Also ask an independent reader: a VR that was trained on clean images and took no part in this training. It "
        "is kept in the cache.",
    )
    bm3d: bool = setting(
        False,
        "Also try BM3D, a classical remedy of noise that is stronger than non-local means and takes seconds per image "
        "(pip install bm3d; its license allows non-commercial use alone).",
        computes=False,
    )
    reference_free: bool = setting(
        False,
        "Also measure what needs no clean image: how blurred images are and, with --reader, how far they are as a "
        "whole from images of high quality in the reader's features (Frechet and kernel distance, not of Inception).",
    )
    evaluate_on: Literal["test", "val"] = setting(
        "test", "val: score the validation images, to choose settings by, and leave the test images alone."
    )
    validate_every: int = setting(
        0,
        "Epochs between two looks at the validation images while the networks are trained, with one at the end: the "
        "scores go to validation.csv, the best networks so far to best.safetensors. 0: never.",
        least=0,
        concerns="validation",
    )
    validation_images: int = setting(
        64, "How many of them are looked at, at most; always the same ones.", least=1, concerns="validation"
    )
    select: Literal["last", "best"] = setting(
        "last",
        "Which networks are evaluated in the end, and written to weights.safetensors: the last ones, or those with the "
        "best score on the validation images (--validate-every).",
        concerns="validation",
    )

    @property
    def remedies(self) -> tuple[str, ...]:
        """The names of the classical remedies that are tried."""
        from train.degradations import CLASSICAL
        from train.degradations.bm3d import BM3D
        from train.degradations.kspace import BICUBIC

        return (CLASSICAL, BICUBIC, BM3D) if self.bm3d else (CLASSICAL, BICUBIC)


@dataclass(frozen=True)
class Output(Section):
    """What is kept and shown."""

    out: Path | None = setting(
        None,
        "Run folder. By default runs/DATASET-TASK-STRATEGY-sSEED with what else differs from the preset, and a number "
        "appended if that exists.",
    )
    resume: str | None = setting(
        None,
        "Continue the run in this folder, or the 'latest' one under runs/ (that has the settings given with it), bit "
        "for bit, with its own settings.",
        computes=False,
    )
    checkpoint_every: int = setting(100, "Steps between two checkpoints.", least=1, computes=False)
    checkpoint_minutes: float = setting(
        10.0, "Minutes between two checkpoints at most, however long the steps take.", above=0, computes=False
    )
    keep_checkpoints: int = setting(
        2,
        "Checkpoints to keep: the newest, and those before it, one of which takes its place should it be damaged. Each "
        "is about three times as large as the networks under Adam.",
        least=1,
        computes=False,
    )
    log_every: int = setting(
        10,
        "Steps between two looks at the device: the progress line and steps.csv are behind by as many.",
        least=1,
        computes=False,
    )
    tensorboard: bool = setting(False, "Also write TensorBoard events (pip install tensorboard).", computes=False)


@dataclass(frozen=True)
class Settings:
    """Train an image processing network (IP) with a recognition network (VR) as its auxiliary.

    :param preset: whose values stand where nothing else was said.
    :raises RunError: a value is out of range or does not fit the others; the message names the flag.
    """

    preset: Literal["quick", "paper"] = "quick"
    data: Data = field(default_factory=Data)
    degradation: Degradation = field(default_factory=Degradation)
    network: Network = field(default_factory=Network)
    auxiliary: Auxiliary = field(default_factory=Auxiliary)
    method: Method = field(default_factory=Method)
    unpaired: Unpaired = field(default_factory=Unpaired)
    training: Training = field(default_factory=Training)
    alone: Alone = field(default_factory=Alone)
    clean: Clean = field(default_factory=Clean)
    pretraining: Pretraining = field(default_factory=Pretraining)
    evaluation: Evaluation = field(default_factory=Evaluation)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        alone = self.alone.alone_crop if self.ip_starts_alone else None
        crops = {
            "crop": self.training.crop,
            "alone_crop": alone,
            "clean_crop": self.clean.clean_crop,
            "masked_crop": self.pretraining.masked_crop,
        }
        for name, crop in crops.items():
            if self.data.size is not None and crop is not None and crop > self.data.size:
                raise RunError(f"{flag(name)} {crop} does not fit into images of --size {self.data.size}")
        if self.needs_clean_vr and self.data.size is None and self.clean.clean_crop is None:
            raise RunError(
                "--clean-crop is needed where images have no common --size: a VR learns from crops of one size"
            )
        if "encoder" in self.method.kind.settings and len(self.auxiliary.names) > 1:
            raise RunError(
                f"--strategy {self.method.strategy} pre-trains one network, and --aux {self.auxiliary.aux} names "
                f"{len(self.auxiliary.names)}; give one of them"
            )
        if self.starts_pretrained and self.data.size is None and self.pretraining.masked_crop is None:
            raise RunError(
                "--masked-crop is needed where images have no common --size: an encoder is pre-trained on crops of one "
                "size"
            )
        if (self.starts_clean or self.starts_pretrained) and self.auxiliary.vr_weights is not None:
            start = self.auxiliary.vr_start
            raise RunError(f"--vr-start {start} and --vr-weights both say what VR begins with; leave one out")
        if self.network.ip_aux_names and self.method.kind.guided:
            raise RunError(
                f"--ip-aux {self.network.ip_aux}: strategy {self.method.strategy} has no pairs, which losses of IP's "
                "own compare; leave it out"
            )
        if self.ip_starts_alone and self.method.kind.guided:
            raise RunError(
                "--ip-start alone: an IP that is trained alone learns from pairs, and strategy "
                f"{self.method.strategy} has none; leave it out"
            )
        every, select = self.evaluation.validate_every, self.evaluation.select
        if self.method.kind.validated_by is None and (every or select == "best"):
            given = f"--validate-every {every}" if every else "--select best"
            raise RunError(
                f"{given}: strategy {self.method.strategy} learns from images that have no clean partners, so there is "
                "nothing to score validation images by; leave it out"
            )
        if select == "best" and not every:
            raise RunError("--select best has no scores to select by; give --validate-every 1, too")
        if self.ip_starts_alone and self.network.ip_weights is not None:
            raise RunError("--ip-start alone and --ip-weights both say what IP begins with; leave one out")

    @property
    def vr_update(self) -> VRUpdate:
        """What becomes of VR under this strategy."""
        return self.method.kind.vr_update or self.auxiliary.vr_update

    @property
    def starts_clean(self) -> bool:
        """Whether VR begins with weights that were learned on clean images."""
        return "vr_start" in self.method.kind.settings and self.auxiliary.vr_start == "clean"

    @property
    def ip_starts_alone(self) -> bool:
        """Whether IP begins with weights that were learned without VR."""
        return self.method.kind.trains_ip and self.network.ip_start == "alone"

    @property
    def starts_pretrained(self) -> bool:
        """Whether VR begins with the weights of an encoder that was pre-trained without labels."""
        return "vr_start" in self.method.kind.settings and self.auxiliary.vr_start in METHODS

    @property
    def needs_clean_vr(self) -> bool:
        """Whether a VR that was trained on clean images takes part."""
        return self.evaluation.reader or self.starts_clean

    @property
    def values(self) -> dict[str, Any]:
        """All settings by their names, without the preset's; options of networks as ``ip_options`` and so on."""
        return {name: getattr(getattr(self, section), name) for name, section in SECTION_OF.items()}

    def change(self, changes: Mapping[str, Any]) -> Settings:
        """The settings with some of them changed.

        :param changes: values by the settings' names; ``ip.blocks`` is an option of the chosen IP. A network that is
            chosen anew begins with the options that the preset gives it.
        :raises RunError: a value is out of range, or there is no such setting.
        """
        from train.settings.presets import preset_options

        values, networks = self.values, self.values
        plain = {name: value for name, value in changes.items() if "." not in name}
        if unknown := sorted(set(plain) - set(values)):
            raise RunError(f"there is no setting {', '.join(unknown)}")
        values |= plain
        for key, registry in NETWORKS.items():
            known(key, registry, values[key])
            kind = registry.options(values[key])
            if values[key] != networks[key] and f"{key}_options" not in plain:
                values[f"{key}_options"] = preset_options(self.preset, values[key], kind)
            own = {name.removeprefix(f"{key}."): value for name, value in changes.items() if name.startswith(f"{key}.")}
            if own:
                values[f"{key}_options"] = change_options(key, values[key], values[f"{key}_options"], own)
        return from_values(values, self.preset)

    @property
    def concerned(self) -> set[str]:
        """The names of those settings that change something in a run with this strategy and these auxiliaries."""
        kind = self.method.kind
        about = set(kind.settings)
        if kind.trains_ip:
            about |= {"ip", "ip_loss"}
            if IP.terms(self.network.ip):
                about.add("ip_aux")
        if kind.validated_by is not None:
            about.add("validation")
        if self.ip_starts_alone:
            about.add("alone")
        if "vr_loss" in about:
            must_know = self.vr_update != "train" or self.auxiliary.vr_loss == "unsupervised"
            if must_know and not self.starts_clean:
                about.add("pretrain_epochs")
            if self.vr_update == "ema":
                about.add("ema_decay")
        if self.needs_clean_vr:
            about.add("clean")
        if self.starts_pretrained:
            about.add("masked")
        if "encoder" in about:
            about.add(AUXILIARIES[self.auxiliary.names[0]].role.key)  # type: ignore[attr-defined]
        if kind.uses_auxiliaries or self.evaluation.reader:
            about |= {"aux", *(AUXILIARIES[name].role.key for name in self.auxiliary.names)}  # type: ignore[attr-defined]
        return {name for name, each in FIELDS.items() if each.metadata["concerns"] in {"", *about}}

    @property
    def without_paths(self) -> Settings:
        """The settings as they may be handed to other people: without names of folders (and thereby of users)."""
        return self.change(dict.fromkeys(("data_root", "test_root", "out", "resume", "ip_weights", "vr_weights")))


def change_options(key: str, network: str, options: Any, own: Mapping[str, Any]) -> Any:
    """Options of a network with some of them changed.

    :param key: of the role, for the message.
    :raises RunError: there is no such option, or its value is out of range.
    """
    names = [each.name for each in dataclasses.fields(options)]
    if unknown := sorted(set(own) - set(names)):
        has = f"it has {', '.join(names)}" if names else "it has none"
        raise RunError(f"--{key}.{unknown[0].replace('_', '-')}: {network} has no such option; {has}")
    try:
        return dataclasses.replace(options, **own)
    except (ValueError, TypeError) as error:
        raise RunError(f"--{key}.{error}") from error


SECTIONS: dict[str, type[Any]] = {
    "data": Data,
    "degradation": Degradation,
    "network": Network,
    "auxiliary": Auxiliary,
    "method": Method,
    "unpaired": Unpaired,
    "training": Training,
    "alone": Alone,
    "clean": Clean,
    "pretraining": Pretraining,
    "evaluation": Evaluation,
    "output": Output,
}
FIELDS: dict[str, dataclasses.Field[Any]] = {
    each.name: each for section in SECTIONS.values() for each in dataclasses.fields(section)
}
"""Every setting, in the order of ``--help``."""
SECTION_OF = {each.name: name for name, section in SECTIONS.items() for each in dataclasses.fields(section)}
CHANGEABLE = {name for name, each in FIELDS.items() if not each.metadata["computes"]}
"""What may change when a run is continued: where it runs and what it shows, but not what it computes."""


def from_values(values: Mapping[str, Any], preset: Any) -> Settings:
    """Settings of values by their names; the way back is :attr:`Settings.values`.

    :raises RunError: a value is out of range.
    """
    made = {
        section: kind(**{each.name: values[each.name] for each in dataclasses.fields(kind)})
        for section, kind in SECTIONS.items()
    }
    return Settings(preset, **made)
