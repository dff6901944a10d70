"""From settings to the objects of a run. What is below this room gets what it needs, and never the settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import gradprom_ext as gp
from train.data.base import ImageData, Subset
from train.data.unpaired import by_name, by_nature
from train.degradations import Degradation
from train.errors import RunError
from train.evaluation.evaluate import evaluate
from train.evaluation.validate import sample, validate
from train.seeds import stable_seed
from train.settings.sections import NETWORKS, Settings
from train.strategies import STRATEGIES, Strategy, strategy_class
from train.strategies.auxiliary import AUXILIARIES, Auxiliary
from train.strategies.base import CRITIC, Learner, Phase, Role, Terms, Unpaired
from train.team import ALONE, Team
from train.training.batches import Crops, Order
from train.training.schedule import course
from train.training.weights import load_state, load_weights

# Update rules by name: IP's (one of ours), VR's (PyTorch's), and what both are given besides the learning rate.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (gp.GradPromAdam, torch.optim.Adam, {}),
    "adamw": (gp.GradPromAdamW, torch.optim.AdamW, {}),
    "sgd": (gp.GradPromSGD, torch.optim.SGD, {"momentum": 0.9}),
}

CRITIC_BETAS = (0.5, 0.999)
"""Of Adam: a critic whose gradients remember less follows images that change (A. Radford et al., arXiv:1511.06434)."""
GUIDES = 16
"""Training images of high quality whose mean description is the guide of inference."""


@dataclass(frozen=True)
class Experiment:
    """What an engine drives.

    :param strategy: with its networks.
    :param phases: of the strategy, in their order.
    :param crops: the training examples.
    :param batch_size: crops per iteration, of all processes together.
    :param seed: of the run.
    :param device: where to compute.
    :param data: its images: those that were asked for or, where they are unpaired, what is left of them.
    :param notes: what a person should know about the first weights, a sentence each.
    :param gate: what IP's optimizer is told about the auxiliaries, see :func:`gate_of`; empty without IP.
    :param team: of the processes that train it together.
    :param validation: images that the training is scored by now and then; ``None``: it never is.
    """

    strategy: Strategy
    phases: list[Phase]
    crops: Crops
    batch_size: int
    seed: int
    device: torch.device
    data: ImageData
    notes: Sequence[str] = ()
    gate: Mapping[str, Any] = field(default_factory=dict)
    team: Team = ALONE
    validation: Subset | None = None

    @property
    def per_epoch(self) -> int:
        """Iterations in which every training image is seen once."""
        return len(self.crops.subset) // self.batch_size

    def settle(self) -> None:
        """Lets the strategy do what it does once the training is over."""
        guides = self.crops.whole_guides(GUIDES)
        if guides:
            self.strategy.settle([image.to(self.device) for image in guides])

    def order(self, phase: Phase, start: int = 0) -> Order:
        """The batches of a phase from iteration ``start`` on."""
        return Order(
            phase.name,
            images=len(self.crops.subset),
            batch_size=self.batch_size,
            steps=phase.iterations,
            seed=self.seed,
            start=start,
            team=self.team,
        )


def build(
    settings: Settings,
    data: ImageData,
    degrade: Degradation,
    *,
    device: torch.device,
    first: Mapping[str, Mapping[str, Tensor]] | None = None,
    team: Team = ALONE,
) -> Experiment:
    """The objects of a run, its networks with fresh weights. What would fail in the run fails here, as :func:`rehearse`
    has found.

    :param degrade: what IP has to undo.
    :param first: weights that networks begin with in the place of random ones, by the keys of their roles.
    :param team: of the processes that train it together; all must call.
    :raises RunError: the settings do not fit the data or each other; nothing is made.
    """
    data = _unpaired(settings, data, degrade)
    per_epoch = len(data.train) // settings.training.batch_size
    if not per_epoch:
        raise RunError(
            f"--batch-size {settings.training.batch_size} exceeds the {len(data.train)} training images of {data.name}"
        )
    if settings.training.batch_size % team.size:
        even = max(1, round(settings.training.batch_size / team.size)) * team.size
        raise RunError(
            f"--batch-size {settings.training.batch_size} is that of all processes together, and {team.size} cannot "
            f"share it evenly; give --batch-size {even}"
        )
    sides = {"--size": settings.data.size, "--crop": settings.training.crop}
    unfit = {name: side for name, side in sides.items() if side is not None and side % degrade.scale}
    if unfit:
        is_none = "is no multiple" if len(unfit) == 1 else "are no multiples"
        nearest = {name: max(1, round(side / degrade.scale)) * degrade.scale for name, side in unfit.items()}
        raise RunError(
            f"{_flags(unfit, ' and ')} {is_none} of {degrade.scale}, which --task {settings.degradation.task} needs; "
            f"give {_flags(nearest, ' ')}"
        )
    strategy = build_strategy(settings, data)
    validation = validation_images(settings, data, strategy)
    for kind, images in ({"test": data.test} | ({} if validation is None else {"validation": validation})).items():
        for i, name in enumerate(images.names):
            height, width = images.size(i)
            if height % degrade.scale or width % degrade.scale:
                raise RunError(
                    f"the {kind} image {name} has {height} x {width} px, no multiples of {degrade.scale}, "
                    f"which --task {settings.degradation.task} needs; give a --size"
                )
    crops = Crops(
        data.train,
        degrade,
        crop=settings.training.crop,
        seed=settings.training.seed,
        masks=any(each.masks for each in strategy.auxiliaries),
        augment=settings.training.augment,
        guides=data.guides if strategy.guided else None,
        second=strategy.second,
    )
    training = settings.training
    phases = strategy.phases(per_epoch)
    notes: list[str] = []
    gate = gate_of(settings, strategy) if strategy.trains_ip else {}
    experiment = Experiment(
        strategy, phases, crops, training.batch_size, training.seed, device, data, notes, gate, team, validation
    )
    equip = partial(
        build_learners,
        settings,
        data,
        strategy,
        experiment.phases,
        scale=degrade.scale,
        device=device,
        first=first or {},
    )
    strategy.equip(equip(notes=notes, team=team.alone()), team.alone())
    rehearse(experiment, settings, data)
    strategy.equip(equip(notes=[], team=team), team)
    return experiment


def validation_images(settings: Settings, data: ImageData, strategy: Strategy) -> Subset | None:
    """What a training is scored by now and then; ``None`` where it is not to be.

    :raises RunError: there are no such images, or they have not got what they are scored by.
    """
    every = settings.evaluation.validate_every
    if not every:
        return None
    images = sample(data.val, settings.evaluation.validation_images)
    if not len(images):
        raise RunError(f"--validate-every {every}: {data.title} has no validation images; leave it out")
    if strategy.validated_by == "tasks":
        for each in strategy.auxiliaries:
            if not each.can_score(images):
                raise RunError(
                    f"--validate-every {every}: the validation images of {data.title} lack what --aux {each.name} is "
                    "compared with; leave it out"
                )
    return images


def _unpaired(settings: Settings, data: ImageData, degrade: Degradation) -> ImageData:
    """The images that a strategy is trained and tried on.

    :raises RunError: the strategy learns from pairs, and there are none, or the other way round.
    """
    method = settings.method
    if method.kind.guided:
        return by_name(data, seed=settings.training.seed) if degrade.has_truth else by_nature(data)
    if method.kind.trains_ip and not degrade.has_truth:
        unpaired = ", ".join(name for name in STRATEGIES if strategy_class(name).guided)
        raise RunError(
            f"--strategy {method.strategy} compares images with clean ones, and --task none has none; it goes with: "
            f"{unpaired}"
        )
    return data


def _flags(values: Mapping[str, int], between: str) -> str:
    return between.join(f"{name} {value}" for name, value in values.items())


def build_strategy(settings: Settings, data: ImageData) -> Strategy:
    """The strategy with its auxiliaries, and without networks.

    :raises RunError: the strategy does not fit the data.
    """
    method, training, kind = settings.method, settings.training, settings.method.kind
    auxiliaries: list[Auxiliary] = []
    try:
        if kind.uses_auxiliaries:
            auxiliaries = build_auxiliaries(settings, data)
    except RunError as error:
        raise RunError(f"--strategy {method.strategy} {error}") from error
    terms = Terms(
        epochs=training.epochs,
        max_steps=training.max_steps,
        pretrain_epochs=method.pretrain_epochs,
        train_on=method.train_on,
        vr_update=settings.auxiliary.vr_update,
        vr_loss=settings.auxiliary.vr_loss,
        vr_start=settings.auxiliary.vr_start,
        ema_decay=settings.auxiliary.ema_decay,
        ip_aux=settings.network.ip_aux_names,
        unpaired=Unpaired(**{name: getattr(settings.unpaired, name) for name in Unpaired._fields}),
        ip_loss=settings.network.ip_loss,
        adversarial=method.adversarial,
        encoder=AUXILIARIES[settings.auxiliary.names[0]].role.key,  # type: ignore[attr-defined]
        precision=training.precision,
    )
    return kind(auxiliaries, terms)


def build_auxiliaries(settings: Settings, data: ImageData) -> list[Auxiliary]:
    """The tasks of the VRs, in their order.

    :raises RunError: the data have not got what a task needs.
    """
    smoothing = settings.auxiliary.label_smoothing
    return [AUXILIARIES.build(name, data=data, smoothing=smoothing) for name in settings.auxiliary.names]


def build_learners(
    settings: Settings,
    data: ImageData,
    strategy: Strategy,
    phases: list[Phase],
    *,
    scale: int,
    device: torch.device,
    first: Mapping[str, Mapping[str, Tensor]],
    notes: list[str],
    team: Team = ALONE,
) -> dict[str, Learner]:
    """A network with fresh weights (which depend on the seed alone) and an optimizer for every role of ``strategy``.

    :param scale: by what factor IP enlarges.
    :param first: weights that networks begin with, by the keys of their roles.
    :param notes: to which is added what the first weights lack.
    :param team: whose gradients are averaged before a step.
    :raises RunError: an option does not fit the data, or a file of weights does not fit a network.
    """
    training = settings.training
    ours, pytorchs, options = OPTIMIZERS[training.optimizer]
    auxiliaries = {each.role.key: each for each in strategy.auxiliaries}
    networks: dict[str, nn.Module] = {}
    for role in strategy.roles:
        # The stream of random numbers is that of the role: whatever else there is, its first weights are the same.
        torch.manual_seed(stable_seed(role.key.upper(), training.seed))
        networks[role.key] = strategy.own_network(role, networks, channels=data.channels) or build_network(
            settings, role, auxiliaries, channels=data.channels, scale=scale
        )
    for name in ("ip_weights", "vr_weights"):
        if (file := settings.values[name]) is not None:
            keys = ["ip"] if name == "ip_weights" else [*auxiliaries, strategy.terms.encoder]
            keys = [key for key in dict.fromkeys(keys) if key in networks]
            notes += load_weights(file, {key: networks[key] for key in keys}, flag="--" + name.replace("_", "-"))
    for key, weights in first.items():
        notes += load_state(networks[key], weights, key=key)
    if "ip" in networks:
        check_crop(settings, networks["ip"])
    if training.sync_batchnorm and team.size > 1:
        if device.type != "cuda":
            raise RunError(
                "--sync-batchnorm works on GPUs alone; leave it out, or take networks without batch statistics"
            )
        networks = {key: nn.SyncBatchNorm.convert_sync_batchnorm(each, team.group) for key, each in networks.items()}
    learners: dict[str, Learner] = {}
    for role in strategy.roles:
        network = networks[role.key]
        network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer: torch.optim.Optimizer
        if role.kind == "main":
            optimizer = ours(  # type: ignore[call-arg]
                network.parameters(), lr=training.lr, process_group=team.group, **gate_of(settings, strategy), **options
            )
        else:
            own: dict[str, Any] = {"lr": training.vr_lr, "fused": True, **options}
            if role == CRITIC:
                own["lr"] = settings.unpaired.critic_lr
                if training.optimizer != "sgd":
                    own["betas"] = CRITIC_BETAS
            optimizer = pytorchs(network.parameters(), **own)
            team.average_gradients_of(optimizer)
        iterations = sum(phase.iterations for phase in phases if role.key in phase.moves)
        learners[role.key] = Learner(network, optimizer, LambdaLR(optimizer, partial(course, iterations)))
    return learners


def check_crop(settings: Settings, ip: nn.Module) -> None:
    """
    :raises RunError: IP wants crops of another size.
    """
    crop, multiple = settings.training.crop, getattr(ip, "crop_multiple", 1)
    if crop % multiple or (multiple > 1 and crop < 2 * multiple):
        nearest = max(2, round(crop / multiple)) * multiple
        raise RunError(
            f"--crop {crop} does not fit --ip {settings.network.ip}, which needs a multiple of {multiple} and at least "
            f"{2 * multiple}; give --crop {nearest}"
        )


def gate_of(settings: Settings, strategy: Strategy) -> dict[str, Any]:
    """What IP's optimizer is told about the auxiliaries."""
    method, weight = settings.method, settings.auxiliary.aux_weight
    concerned = settings.concerned
    own = type(strategy).gate
    made = own if isinstance(own, str) else own()
    gate: dict[str, Any] = {"gate": (method.gate if "gate" in concerned else None) or made}
    if strategy.aux_weight is not None:
        gate["aux_weight"] = strategy.aux_weight
    else:
        gate["aux_weight"] = weight if len(weight) > 1 and strategy.auxiliaries else weight[0]
    if strategy.ip_aux:
        # A loss of IP's own has the weight that the network gives it, gated or not.
        terms, own = NETWORKS["ip"].terms(settings.network.ip), gate["aux_weight"]
        vrs = own if isinstance(own, tuple) else (own,) * len(strategy.auxiliaries)
        gate["aux_weight"] = (*(terms[name] for name in strategy.ip_aux), *vrs)
    if "threshold" in concerned and method.threshold:
        gate["threshold"] = method.threshold
    if "granularity" in concerned:
        gate["granularity"] = method.granularity
    cap = method.aux_cap if "aux_cap" in concerned and method.aux_cap is not None else strategy.aux_cap
    if cap is not None:
        gate["aux_cap"] = cap
    return gate


def build_network(
    settings: Settings, role: Role, auxiliaries: Mapping[str, Auxiliary], *, channels: int, scale: int
) -> nn.Module:
    """The network of a role, with fresh weights from PyTorch's global generator.

    :raises RunError: an option does not fit the data.
    """
    name, options = settings.values[role.key], settings.values[f"{role.key}_options"]
    if role.kind == "main":
        shape: dict[str, int] = {"channels": channels, "scale": scale}
    elif role == CRITIC:
        shape = {"channels": channels}
    else:
        # An encoder that is pre-trained has no task: the smallest head there is, which nothing will reach.
        classes = auxiliaries[role.key].num_classes if role.key in auxiliaries else 2
        shape = {"channels": channels, "num_classes": classes}
    try:
        return NETWORKS[role.key].build(name, options, **shape)
    except ValueError as error:
        raise RunError(f"--{role.key} {name}: {error}") from error


def rehearse(experiment: Experiment, settings: Settings, data: ImageData) -> None:
    """Takes the first step of each phase and evaluates one test image, or the smallest and the largest: what would fail
    in a run fails here, before the run has a folder or has cost hours. All batches of a run have one shape, so one of
    them tells for all.

    Which settings fail depends on the networks: batch statistics of a single value (one crop that the strides of VR
    reduce to one pixel), a kernel that is larger than what is left of a crop, an input of fixed size, too little
    memory. No list of such rules would be complete; a trial is.

    :param experiment: with networks for this purpose alone, as they and their optimizers are moved.
    :raises RunError: a step or the evaluation fails; the message names the settings.
    """
    strategy, training = experiment.strategy, settings.training
    networks = " and ".join(
        f"--{role.key} {settings.values[role.key]}" for role in strategy.roles if role.key in NETWORKS
    )
    what, hint = "", ""
    try:
        for phase in experiment.phases:
            what = (
                f"a step with --batch-size {training.batch_size} and --crop {training.crop} "
                f"(task {settings.degradation.task})"
            )
            hint = "a larger --batch-size or --crop"
            strategy.begin(phase)
            strategy.enter(phase)
            order = experiment.order(phase._replace(iterations=min(phase.iterations, 1)))
            for keys in order:
                strategy.update(strategy.losses(experiment.crops.__getitems__(keys).to(experiment.device)))
        for place in _extremes(data.test, data):
            height, width = data.test.size(place)
            what, hint = f"the evaluation of an image of {height} x {width} px", "another --size"
            evaluate(
                strategy,
                data.test.take([place]),
                experiment.crops.degrade,
                device=experiment.device,
                remedies=settings.evaluation.remedies,
            )
        if (images := experiment.validation) is not None:
            for place in _extremes(images, data):
                height, width = images.size(place)
                what, hint = f"a look at a validation image of {height} x {width} px", "no --validate-every"
                one, seen = images.take([place]), strategy.terms.train_on
                validate(strategy, one, experiment.crops.degrade, device=experiment.device, seen=seen)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in reason:
            hint = "a smaller --batch-size or --crop"
        raise RunError(
            f"{what} does not work with {networks}: {reason}. Nothing was written; give {hint}, or other networks"
        ) from error


def _extremes(images: Subset, data: ImageData) -> tuple[int, ...]:
    """The places of the smallest and the largest image; of one where all images of the data are alike."""
    by_size = sorted(range(len(images)), key=lambda i: math.prod(images.size(i)))
    return (0,) if data.size else (by_size[0], by_size[-1])
