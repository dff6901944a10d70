"""What a strategy is, and what the strategies with an IP and with auxiliaries share.

Notation as in the paper: IP has the parameters theta, VR has phi. ``L_IP`` compares the enhanced with the clean image,
``L_VR`` is the loss of a task (diagnosis, segmentation) that VR does on the enhanced image. Nothing here imports
PyTorch when it is imported, as the command line asks strategies what they need.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, NamedTuple, TypeVar

from models.training import TrainingLoss
from train import losses
from train.errors import RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler

    import gradprom_ext as gp
    from train.precision import MixedPrecision
    from train.strategies.auxiliary import Auxiliary
    from train.team import Team

    GradPromOptimizer = gp.GradPromSGD | gp.GradPromAdam

Gate = Literal["hard", "soft", "always", "never", "project"]
Granularity = Literal["global", "tensor"]
TrainOn = Literal["degraded", "clean"]
VRUpdate = Literal["train", "fixed", "ema"]
VRStart = Literal["fresh", "clean", "frepa", "mae", "mfm"]
Adversarial = Literal["discriminator", "consistency", "both", "none"]
VRLoss = Literal["supervised", "unsupervised"]
Keeps = Literal["details", "brightness"]
Hyper = Literal["first-order", "unrolled"]
Precision = Literal["fp32", "bf16", "fp16"]
Optimizer = TypeVar("Optimizer", bound="torch.optim.Optimizer")


class Role(NamedTuple):
    """What a network is for.

    :param name: in words ("diagnosis").
    :param kind: ``"main"``: trained by one of our optimizers, which gates; ``"auxiliary"``: by one of PyTorch's.
    :param key: in flags, files and checkpoints ("vr").
    """

    name: str
    kind: Literal["main", "auxiliary"]
    key: str


IP = Role("image processing", "main", "ip")
CRITIC = Role("critic", "auxiliary", "critic")


class Measure(NamedTuple):
    """Something that is measured at every iteration: the step log, the display, the report and TensorBoard read this.

    :param name: the column of ``steps.csv``.
    :param word: what it is called on a line of progress; empty: it is not shown there.
    :param form: how a value is written, for :meth:`str.format`, with its unit.
    :param loss: whether a training in which it is never finite has diverged.
    """

    name: str
    word: str = ""
    form: str = "{:.4g}"
    loss: bool = False


LOSS = Measure("loss", "loss", "{:.4f}", loss=True)
PSNR = Measure("psnr", "PSNR", "{:.2f} dB")
SKIPPED = Measure("skipped")  # 1 where a gradient was not finite and nothing was moved, else 0
SCALE = Measure("scale")  # of the losses in float16, for the next iteration

Measurements = dict[str, "Tensor"]
"""What an iteration measured, by the measures' names: 0-dim tensors on the device, so that nothing waits for them
before they are read back. What a phase has not got is missing."""


@dataclass(frozen=True)
class Batch:
    """What an iteration is given.

    :param clean: ``float32 [N, C, crop, crop]`` in [0, 1].
    :param degraded: ``float32 [N, C, crop / scale, crop / scale]``.
    :param labels: ``int64 [N]``; -1 where the data set has none.
    :param masks: ``int64 [N, crop, crop]``; ``None`` where no auxiliary reads them.
    :param guide: crops of other images, of high quality, ``float32 [N, C, crop, crop]`` in [0, 1]; ``None`` where the
        strategy is not guided. Where it is, ``clean`` is for nothing but its shape.
    :param second: the clean images degraded once more, with other seeds; ``None`` where the strategy does not ask for
        them.
    """

    clean: Tensor
    degraded: Tensor
    labels: Tensor
    masks: Tensor | None = None
    guide: Tensor | None = None
    second: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``, images in channels_last order (the faster one for convolutions on every device)."""
        import torch

        clean, degraded = (
            images.to(device, memory_format=torch.channels_last) for images in (self.clean, self.degraded)
        )
        masks = None if self.masks is None else self.masks.to(device)
        guide, second = (
            None if images is None else images.to(device, memory_format=torch.channels_last)
            for images in (self.guide, self.second)
        )
        return Batch(clean, degraded, self.labels.to(device), masks, guide, second)

    def enlarged(self) -> Tensor:
        """The degraded images, enlarged bicubically to the size of the clean ones where they are smaller."""
        from train.inference import enlarged

        return enlarged(self.degraded, self.clean.shape[-1] // self.degraded.shape[-1])


class Phase(NamedTuple):
    """A stretch of a training.

    :param name: in ``steps.csv``; it also decides the order of the images, their crops and their noise.
    :param title: in words, for the display.
    :param iterations: its length.
    :param moves: keys of the roles whose networks it trains: their learning rates run over these phases.
    """

    name: str
    title: str
    iterations: int
    moves: tuple[str, ...]


class Unpaired(NamedTuple):
    """What a strategy that learns from unpaired images is asked for: the weights of its losses, and how it is solved.

    :param keeps: what of the degraded image the wavelet loss holds on to: its details (uneven light, blur), or its
        brightness (noise, which is in the details).
    :param hyper: whether the gradient of a task's loss regards VR's last step as fixed, or as a function of the images.
    :param inner_steps: steps of VR per iteration.
    """

    adversarial_weight: float = 1.0
    r1_weight: float = 1.0
    wavelet_weight: float = 1.0
    feature_weight: float = 1.0
    consistency_weight: float = 1.0
    kl_weight: float = 0.01
    keeps: Keeps = "details"
    hyper: Hyper = "first-order"
    inner_steps: int = 1


class Terms(NamedTuple):
    """What a run asks of its strategy.

    :param epochs: passes over the training images.
    :param max_steps: iterations of the main phase at most.
    :param pretrain_epochs: passes over the clean images before IP's training begins, where VR must know its task by
        then and does not.
    :param train_on: what a VR without an IP is trained on.
    :param vr_update: ``"train"``: VR learns along with IP. ``"fixed"``: VR stays as it is. ``"ema"``: VR learns along,
        and IP is advised by a slow copy of it, the exponential moving average of its weights.
    :param vr_loss: ``"supervised"``: against labels and masks. ``"unsupervised"``: against what VR says of the clean
        image.
    :param vr_start: ``"fresh"``: VR begins with random weights. ``"clean"``: with those of a VR that was trained on
        clean images already. The name of a pre-training: with those of an encoder, which does not know its task yet.
    :param ema_decay: share of the slow copy that a step leaves.
    :param ip_aux: names of those losses of IP's own (:class:`models.training.TrainingLoss`) that are auxiliaries.
    :param unpaired: what concerns unpaired images.
    :param ip_loss: a name in :data:`train.losses.IMAGE_LOSSES`.
    :param adversarial: what an encoder that is pre-trained learns from besides the reconstruction.
    :param encoder: the key of the role whose network is pre-trained.
    :param precision: in which numbers networks compute while they are trained; evaluations are in float32.
    """

    epochs: int = 1
    max_steps: int | None = None
    pretrain_epochs: int = 0
    train_on: TrainOn = "degraded"
    vr_update: VRUpdate = "train"
    vr_loss: VRLoss = "supervised"
    vr_start: VRStart = "fresh"
    ema_decay: float = 0.99
    ip_aux: tuple[str, ...] = ()
    unpaired: Unpaired = Unpaired()
    ip_loss: str = "mse"
    adversarial: Adversarial = "discriminator"
    encoder: str = "vr"
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Learner(Generic[Optimizer]):
    """A network with what moves it."""

    network: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler


@dataclass
class Losses:
    """What a forward pass has made of a batch.

    :param main: ``L_IP``, ``[]`` with its graph; ``None`` in a phase without IP.
    :param auxiliary: those losses of IP's own that are auxiliaries, then ``L_VR``, one per auxiliary.
    :param own: what VRs learn from where ``auxiliary`` does not reach them; one per auxiliary, or none.
    :param measured: what is known already (losses, PSNR, accuracy).
    """

    main: Tensor | None = None
    auxiliary: tuple[Tensor, ...] = ()
    own: tuple[Tensor, ...] = ()
    measured: Measurements = field(default_factory=dict)


class Strategy(ABC):
    """One way to train networks. It owns the networks and what an iteration does with them; the engine owns time.

    A strategy is made without networks, says which it needs (:attr:`roles`) and for how long (:meth:`phases`), and is
    given them by :meth:`equip`.

    :cvar trains_ip: whether there is an IP.
    :cvar uses_auxiliaries: whether there is a VR.
    :cvar guided: whether it learns from unpaired images: its training images have no clean partner, and a batch has a
        guide.
    :cvar validated_by: what its networks are worth while they are trained. ``"images"``: how near what they make of
        degraded images is to the clean ones. ``"tasks"``: what the VRs score on such images as they are trained on.
        ``None``: there is nothing to compare with.
    :cvar settings: names of the settings that it reads besides those of its networks; ``--help`` shows no others.
    :cvar gate: the gate of IP's optimizer: one of the library's names, or what makes a gate.
    :cvar gate_is_free: whether the user may choose another one.
    :cvar aux_cap: how long an auxiliary gradient may be at most, in lengths of the main one; ``None``: any length.
    :cvar aux_weight: lambda, where the strategy fixes it.
    :cvar vr_update: what becomes of VR, where the strategy fixes it.
    :ivar second: whether a batch must hold its images degraded a second time.
    :ivar team: of the processes that train together; :meth:`equip` is given it.
    :ivar precision: what networks are called through in training; :meth:`equip` makes it.
    :param auxiliaries: the tasks of the VRs; ignored where ``uses_auxiliaries`` is false.
    :param terms: lengths, and what else a run asks.
    :raises RunError: the strategy cannot do with these auxiliaries.
    """

    trains_ip: ClassVar[bool] = True
    uses_auxiliaries: ClassVar[bool] = True
    guided: ClassVar[bool] = False
    validated_by: ClassVar[Literal["images", "tasks"] | None] = "images"
    settings: ClassVar[frozenset[str]] = frozenset()
    gate: ClassVar[Gate | Callable[[], gp.GatePolicy]] = "never"
    gate_is_free: ClassVar[bool] = False
    aux_cap: ClassVar[float | None] = None
    aux_weight: ClassVar[float | None] = None
    vr_update: ClassVar[VRUpdate | None] = None
    second: bool = False
    team: Team
    precision: MixedPrecision

    def __init__(self, auxiliaries: Sequence[Auxiliary] = (), terms: Terms | None = None) -> None:
        self.auxiliaries = tuple(auxiliaries) if self.uses_auxiliaries else ()
        self.terms = terms or Terms()
        if self.vr_update is not None:
            self.terms = self.terms._replace(vr_update=self.vr_update)
        self.learners: Mapping[str, Learner] = {}
        self.phase: Phase | None = None
        if self.uses_auxiliaries and not self.auxiliaries:
            raise RunError("this strategy needs an auxiliary (--aux), or use ip-only")

    @classmethod
    def of_trained(cls, ip: nn.Module) -> Strategy:
        """The strategy when all training is over, with nothing but the IP: what is left to it is :meth:`enhance`.

        :param ip: with its weights, in evaluation mode.
        """
        strategy = cls.__new__(cls)  # not made as usual: there are no data that tell what auxiliaries it would have
        strategy.auxiliaries, strategy.terms, strategy.phase = (), Terms(), None
        strategy.learners = {IP.key: Learner(ip, None, None)}  # type: ignore[arg-type]
        return strategy

    @property
    def roles(self) -> tuple[Role, ...]:
        """Of the networks that it trains or asks, the main one first."""
        return (*((IP,) if self.trains_ip else ()), *(each.role for each in self.auxiliaries))

    @property
    def ip_aux(self) -> tuple[str, ...]:
        """Names of those losses of IP's own that are auxiliaries; none in a strategy without IP."""
        return self.terms.ip_aux if self.trains_ip else ()

    @property
    def advising(self) -> tuple[str, ...]:
        """The names of all auxiliaries, in the order in which IP's optimizer is given their losses."""
        return (*self.ip_aux, *(each.name for each in self.auxiliaries))

    @property
    def among(self) -> int:
        """Among how many auxiliaries the columns of one have to be told apart."""
        return told_apart(self.ip_aux, self.auxiliaries)

    @property
    @abstractmethod
    def measures(self) -> tuple[Measure, ...]:
        """All that :meth:`losses` and :meth:`update` may measure, in the order of ``steps.csv``."""

    @property
    def score(self) -> Measure:
        """What validation images are scored by; more is better."""
        return PSNR

    def own_network(self, role: Role, networks: dict[str, nn.Module], *, channels: int) -> nn.Module | None:
        """A network of the strategy's own, which no flag chooses, with fresh weights from PyTorch's global generator.

        :param role: one of :attr:`roles`.
        :param networks: those of the roles before it, by their keys.
        :param channels: of the images.
        :returns: ``None`` where the settings name the network of this role.
        :raises RunError: the other networks do not fit it.
        """
        return None

    @property
    def untrained(self) -> frozenset[str]:
        """Tensors (``KEY.name``) that the training never reaches: ``weights.safetensors`` leaves them out."""
        return frozenset()

    def phases(self, per_epoch: int) -> list[Phase]:
        """What the training consists of.

        :param per_epoch: iterations in which every training image is seen once.
        """
        iterations = self.terms.epochs * per_epoch
        iterations = min(iterations, self.terms.max_steps or iterations)
        return [Phase("train", "training", iterations, tuple(role.key for role in self.roles))]

    def equip(self, learners: Mapping[str, Learner], team: Team | None = None) -> None:
        """Hands over the networks, by the keys of :attr:`roles`.

        :param team: of the processes that train them together; by default this one is alone.
        """
        from train.precision import MixedPrecision
        from train.team import ALONE

        self.learners, self.team = learners, team or ALONE
        parameter = next(learners[self.roles[0].key].network.parameters())
        self.precision = MixedPrecision(self.terms.precision, parameter.device, self.team)

    def begin(self, phase: Phase) -> None:  # noqa: B027 (most strategies have nothing to do here)
        """Called once, when a phase begins, with the networks as the phase before has left them."""

    def enter(self, phase: Phase) -> None:
        """Sets the networks' modes; called when a phase begins, and when a run is resumed within it."""
        self.phase = phase
        for learner in self.learners.values():
            learner.network.train()

    @abstractmethod
    def losses(self, batch: Batch) -> Losses:
        """The forward pass of an iteration of the current phase."""

    @abstractmethod
    def update(self, losses: Losses) -> Measurements:
        """The backward pass and the step: networks, optimizers and schedules have moved on when it returns.

        Where a loss or a gradient is not finite, no parameter, buffer or optimizer state has changed; the schedules,
        which count iterations, go on.
        """

    @abstractmethod
    def enhance(self, degraded: Tensor) -> Tensor:
        """What the trained networks make of degraded images, for evaluation and figures: ``float [N, C, h, w] ->
        float [N, C, h * scale, w * scale]``, on their device, not clamped."""

    def settle(self, guides: Sequence[Tensor]) -> None:  # noqa: B027 (as above)
        """Called once, when a guided training is over and before anything is evaluated or written.

        :param guides: training images of high quality, ``float32 [C, H, W]`` each, on the networks' device.
        """

    def not_finite(self, *found: Tensor) -> Tensor:
        """Whether a loss is not finite, in whichever of the processes that train together: ``bool []``, on the device.

        :param found: ``[]`` each.
        """
        import torch

        flag = (~torch.stack([loss.detach() for loss in found]).isfinite()).any()
        return self.team.any_of(flag)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """By the keys of their roles."""
        return {key: learner.network for key, learner in self.learners.items()}

    @property
    def companions(self) -> dict[str, nn.Module]:
        """Networks that no optimizer moves and that the learners alone do not determine, by names that no role has:
        a run that goes on needs them as they were."""
        return {}

    @property
    def judges(self) -> list[tuple[Auxiliary, nn.Module]]:
        """Every auxiliary with its network."""
        return [(each, self.learners[each.role.key].network) for each in self.auxiliaries]

    @property
    def lr(self) -> float:
        """The learning rate of the main network, as the next iteration will use it."""
        return float(self.learners[self.roles[0].key].schedule.get_last_lr()[0])


def told_apart(ip_aux: Sequence[object], auxiliaries: Sequence[object]) -> int:
    """Among how many auxiliaries the columns of one have to be told apart. A loss of IP's own is never alone: a column
    without a name is that of a VR.

    >>> told_apart((), ["dia"]), told_apart(["rec"], ["dia"]), told_apart(["rec"], ())
    (1, 2, 2)
    """
    among = len(ip_aux) + len(auxiliaries)
    return max(2, among) if ip_aux else among


def columns(measures: Sequence[Measure], auxiliary: str, among: int) -> tuple[Measure, ...]:
    """The measures of one auxiliary among several: their names and words say which one's they are.

    >>> [each.name for each in columns([Measure("gate", "gate")], "seg", among=2)]
    ['gate_seg']
    >>> [each.name for each in columns([Measure("gate", "gate")], "seg", among=1)]
    ['gate']
    """
    if among == 1:
        return tuple(measures)
    return tuple(
        each._replace(name=f"{each.name}_{auxiliary}", word=each.word and f"{each.word} {auxiliary}")
        for each in measures
    )


def column(name: str, auxiliary: str, among: int) -> str:
    """The name that :func:`columns` gives."""
    return columns([Measure(name)], auxiliary, among)[0].name


def batch_psnr(enhanced: Tensor, clean: Tensor) -> Tensor:
    """PSNR of a whole batch in dB, ``[]``, on its device, capped as those of test images are."""
    from train.evaluation.metrics import psnr_of

    return psnr_of(enhanced.detach(), clean)


class WithIP(Strategy):
    """A strategy that trains IP."""

    @property
    def ip(self) -> Learner[GradPromOptimizer]:
        return self.learners[IP.key]

    def image_losses(self, batch: Batch) -> tuple[Tensor, Losses]:
        """The enhanced batch with its graph, and what is known of it. An IP that owns its loss (``training_loss``) is
        trained with that; its further losses are a part of ``L_IP``, except those that are auxiliaries."""
        network = self.ip.network
        training_loss: Callable[[Tensor, Tensor], TrainingLoss] | None = getattr(network, "training_loss", None)
        if training_loss is not None:
            own = self.precision(training_loss, batch.degraded, batch.clean)
        else:
            enhanced = self.precision(network, batch.degraded)
            own = TrainingLoss(enhanced, losses.IMAGE_LOSSES[self.terms.ip_loss](enhanced, batch.clean))
        main = own.total(without=self.ip_aux)
        found = Losses(main, measured={"loss": main.detach(), "psnr": batch_psnr(own.enhanced, batch.clean)})
        for name in self.ip_aux:
            loss = own.terms[name].loss
            found.auxiliary += (loss,)
            found.measured[column("aux_loss", name, self.among)] = loss.detach()
        return own.enhanced, found

    def move_ip(self, found: Losses, others: Iterable[Learner] = ()) -> gp.GateStats:
        """Steps theta with the gradients that the gate lets through; the VRs' parameters get their ``.grad``.

        :param others: that get one, too: where it overflows in float16, theta's step is skipped.
        """
        assert found.main is not None
        self.ip.optimizer.zero_grad()
        self.ip.optimizer.backward(found.main, *found.auxiliary, scaler=self.precision.scaler)
        for loss in found.own:  # a loss that does not reach IP has left no gradient yet
            self.precision.backward(loss)
        self.precision.step(self.ip.optimizer, self.precision.overflowed(others))
        self.ip.schedule.step()
        assert self.ip.optimizer.stats is not None  # there has been a step
        return self.ip.optimizer.stats

    def gates(self, stats: gp.GateStats) -> Measurements:
        """What the gate of each auxiliary did, and how long the gradients were. With a gate for each tensor, cosines
        and gates are the means of theirs."""
        import torch

        length = torch.linalg.vector_norm
        found = {MAIN_NORM.name: length(stats.main_norm)}
        for k, name in enumerate(self.advising):
            own = {"cosine": stats.cosine[..., k].mean(), "gate": stats.gate[..., k].mean()}
            own[AUX_NORM.name] = length(stats.aux_norm[..., k])
            found |= {column(what, name, self.among): value for what, value in own.items()}
        return found

    def enhance(self, degraded: Tensor) -> Tensor:
        return self.ip.network(degraded)


class WithVR(Strategy):
    """A strategy that trains or asks VRs."""

    def vr(self, auxiliary: Auxiliary) -> Learner[torch.optim.Optimizer]:
        """The network of an auxiliary, with what moves it."""
        return self.learners[auxiliary.role.key]

    def recognize(self, images: Tensor, batch: Batch, found: Losses) -> Losses:
        """Adds to ``found`` what every VR makes of ``images``.

        :param images: ``float [N, C, H, W]``: the enhanced ones, with their graph, or the clean or degraded ones.
        """
        for each in self.auxiliaries:
            output = self.precision(self.vr(each).network, images)
            loss = each.loss(output, batch)
            found.auxiliary += (loss,)
            measured = {"aux_loss": loss.detach(), **each.measure(output.detach(), batch)}
            found.measured |= {column(name, each.name, self.among): v for name, v in measured.items()}
        return found

    def recognize_alone(self, images: Tensor, batch: Batch) -> Losses:
        """The forward pass of an iteration without IP."""
        self._kept = Buffers(each.network for each in self.learners.values())
        return self.recognize(images, batch, Losses())

    def update_alone(self, found: Losses) -> Measurements:
        """Steps every phi with the gradient of its own loss, IP aside.

        :returns: what was measured, and whether the step was skipped.
        """
        skipped = self.not_finite(*found.auxiliary)
        learners = [self.vr(each) for each in self.auxiliaries]
        for learner, loss in zip(learners, found.auxiliary, strict=True):
            learner.optimizer.zero_grad()
            self.precision.backward(loss)
        if (overflowed := self.precision.unscale(learners)) is not None:
            skipped = skipped | overflowed
        for learner in learners:
            step_unless(skipped, learner)
        self._kept.restore_if(skipped)
        self.precision.update()
        return found.measured | {"skipped": skipped}


AUX_LOSS = Measure("aux_loss", "VR loss", "{:.2f}", loss=True)
IP_AUX_LOSS = Measure("aux_loss", "loss", "{:.4f}", loss=True)
COSINE = Measure("cosine", "cosine", "{:+.2f}")
GATE = Measure("gate", "gate", "{:.0%}")
AUX_NORM = Measure("aux_norm")  # length of an auxiliary's gradient with respect to theta, before its weight
MAIN_NORM = Measure("main_norm")  # and that of the main one
GATED = (COSINE, GATE, AUX_NORM)

PRETRAIN = "pretrain"


class Advised(WithIP, WithVR):
    """IP advised by one VR or several: what joint training, frozen parameters and GradProm share. They differ in the
    gate, which each auxiliary has to itself, and in what becomes of VR.

    A VR that stays fixed, or whose opinion of the clean image is the target, must know its task before it advises. It
    learns that on clean images, in a phase of its own, unless it begins with weights that were learned so.

    In the unsupervised loss (ESTR, arXiv:1910.09185) the clean-image branch is a fixed network: were it VR itself, VR
    could bring the two branches together by saying the same of every image. Where VR learns along, that branch is a
    copy of VR as it was when IP's training began.
    """

    settings = frozenset({"aux_weight", "vr_update", "vr_loss", "vr_start"})

    def __init__(self, auxiliaries: Sequence[Auxiliary] = (), terms: Terms | None = None) -> None:
        super().__init__(auxiliaries, terms)
        self._teachers: dict[str, nn.Module] = {}

    @property
    def measures(self) -> tuple[Measure, ...]:
        return advised_measures([(each.name, each.measures) for each in self.auxiliaries], self.ip_aux)

    @property
    def _unsupervised(self) -> bool:
        return self.terms.vr_loss == "unsupervised"

    @property
    def _has_teachers(self) -> bool:
        """Whether there are networks besides VR: its slow copy, or what it was like before."""
        return self.terms.vr_update == "ema" or (self.terms.vr_update == "train" and self._unsupervised)

    def phases(self, per_epoch: int) -> list[Phase]:
        (train,) = super().phases(per_epoch)
        advisors = tuple(each.role.key for each in self.auxiliaries)
        if self.terms.vr_update == "fixed":
            train = train._replace(moves=(IP.key,))
        must_know = self.terms.vr_update != "train" or self._unsupervised
        if not must_know or self.terms.vr_start == "clean":
            return [train]
        return [Phase(PRETRAIN, "pre-training VR", self.terms.pretrain_epochs * per_epoch, advisors), train]

    def equip(self, learners: Mapping[str, Learner], team: Team | None = None) -> None:
        super().equip(learners, team)
        self._teachers = {}
        if self._has_teachers:
            # Copies of the right shapes: what is in them is decided when IP's training begins.
            self._teachers = {
                each.role.key: copy.deepcopy(self.vr(each).network).requires_grad_(False) for each in self.auxiliaries
            }

    @property
    def companions(self) -> dict[str, nn.Module]:
        return {f"{key}_teacher": network for key, network in self._teachers.items()}

    def begin(self, phase: Phase) -> None:
        if phase.name != PRETRAIN:
            for key, teacher in self._teachers.items():
                teacher.load_state_dict(self.learners[key].network.state_dict())

    def enter(self, phase: Phase) -> None:
        super().enter(phase)
        for teacher in self._teachers.values():
            teacher.eval()
        if phase.name != PRETRAIN and self.terms.vr_update == "fixed":
            for each in self.auxiliaries:
                self.vr(each).network.eval().requires_grad_(False)

    def losses(self, batch: Batch) -> Losses:
        if self._pretrains:
            return self.recognize_alone(batch.clean, batch)
        self._kept = Buffers(each.network for each in self.learners.values())
        enhanced, found = self.image_losses(batch)
        if self._unsupervised or self.terms.vr_update == "ema":
            return self._be_advised(enhanced, batch, found)
        return self.recognize(enhanced, batch, found)

    def _be_advised(self, enhanced: Tensor, batch: Batch, found: Losses) -> Losses:
        """The losses where the network that advises IP is not VR, or its target is not a label."""
        import torch

        own = []
        for each in self.auxiliaries:
            vr = self.vr(each).network
            advisor = self._teachers[each.role.key] if self.terms.vr_update == "ema" else vr
            output = self.precision(advisor, enhanced)
            target = None
            if self._unsupervised:
                with torch.no_grad():
                    target = self.precision(self._teachers.get(each.role.key, vr), batch.clean)
            found.auxiliary += (self._vr_loss(each, output, batch, target),)
            measured = {"aux_loss": found.auxiliary[-1].detach(), **each.measure(output.detach(), batch)}
            found.measured |= {column(name, each.name, self.among): v for name, v in measured.items()}
            if self.terms.vr_update == "ema":
                own.append(self._vr_loss(each, self.precision(vr, enhanced.detach()), batch, target))
        found.own = tuple(own)
        return found

    @staticmethod
    def _vr_loss(auxiliary: Auxiliary, output: Tensor, batch: Batch, target: Tensor | None) -> Tensor:
        return auxiliary.loss(output, batch) if target is None else losses.agreement_loss(output, target)

    def update(self, found: Losses) -> Measurements:
        if self._pretrains:
            measured = self.update_alone(found)
            del measured["skipped"]  # the column counts what happened to theta
            return measured
        for each in self.auxiliaries:
            self.vr(each).optimizer.zero_grad()
        stats = self.move_ip(found, self._learning)
        self.move_vr(stats.skipped)
        self._kept.restore_if(stats.skipped)
        self._follow(stats.skipped)
        self.precision.update()
        return found.measured | self.gates(stats) | {"skipped": stats.skipped}

    def move_vr(self, skipped: Tensor) -> None:
        """Steps phi with the gradient of its loss, unless ``skipped`` is 1."""
        for each in self._learning:
            step_unless(skipped, each, self.precision.scale)

    @property
    def _learning(self) -> list[Learner]:
        """The VRs that learn along."""
        return [] if self.terms.vr_update == "fixed" else [self.vr(each) for each in self.auxiliaries]

    def _follow(self, skipped: Tensor) -> None:
        """Moves the slow copies towards VR."""
        import torch

        if self.terms.vr_update != "ema":
            return
        with torch.no_grad():
            rate = (1 - self.terms.ema_decay) * (1 - skipped.float())
            for key, teacher in self._teachers.items():
                new = self.learners[key].network.state_dict()
                for name, slow in teacher.state_dict().items():
                    if slow.is_floating_point():
                        slow.lerp_(new[name], rate.to(slow.dtype))
                    else:
                        slow.copy_(new[name])  # a count of batches, which skips with VR's own

    @property
    def _pretrains(self) -> bool:
        return self.phase is not None and self.phase.name == PRETRAIN


def advised_measures(
    auxiliaries: Sequence[tuple[str, Sequence[Measure]]], ip_aux: Sequence[str] = ()
) -> tuple[Measure, ...]:
    """The columns of a strategy with these auxiliaries.

    :param auxiliaries: their names, and what each measures on a batch besides its loss.
    :param ip_aux: names of those losses of IP's own that are auxiliaries.
    """
    among = told_apart(ip_aux, auxiliaries)
    own = [columns((IP_AUX_LOSS, *GATED), name, among) for name in ip_aux]
    own += [columns((AUX_LOSS, *measures, *GATED), name, among) for name, measures in auxiliaries]
    return (LOSS, PSNR, *(measure for each in own for measure in each), MAIN_NORM, SKIPPED)


def step_unless(skipped: Tensor, learner: Learner, scale: Tensor | None = None) -> None:
    """A step of one of PyTorch's fused optimizers that moves neither parameters nor state where ``skipped`` is 1.

    PyTorch's fused kernels take that decision on the device, which is what a gradient scaler uses them for; a step that
    is not skipped has the digits of one that was never asked.

    :param skipped: 0 or 1, ``[]``, on the device of the parameters.
    :param scale: of the gradients, float32 ``[]``, which the kernel divides them by; ``None``: they have none.
    """
    fused_step(learner.optimizer, skipped.float(), scale)
    learner.schedule.step()


def fused_step(optimizer: torch.optim.Optimizer, skipped: Tensor | None, scale: Tensor | None) -> None:
    """A step of one of PyTorch's fused optimizers, as a gradient scaler has it taken.

    :param skipped: 0 or 1, float32 ``[]``; ``None``: it is taken.
    :param scale: of the gradients, float32 ``[]``; ``None``: they have none.
    """
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()


class Buffers:
    """The buffers of networks (batch statistics) as they were before a forward pass, which moves them."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._pairs = [(each, each.clone()) for network in networks if network.training for each in network.buffers()]

    def restore_if(self, skipped: Tensor) -> None:
        """Undoes the forward pass where ``skipped`` is 1, without waiting for the device."""
        for buffer, before in self._pairs:
            buffer.copy_(before.where(skipped.bool(), buffer))
