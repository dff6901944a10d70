"""HQG-Net's training (arXiv:2307.07829): enhancement without pairs, and a task network that learns along.

The abstract names the losses and the bi-level scheme in words; its formulas could not be read. What is below is the
plainest reading: :mod:`train.losses` has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from train import losses
from train.features import penultimate
from train.strategies import STRATEGIES
from train.strategies.base import (
    AUX_LOSS,
    CRITIC,
    GATED,
    LOSS,
    MAIN_NORM,
    SKIPPED,
    Buffers,
    Gate,
    Learner,
    Losses,
    Measure,
    Measurements,
    Role,
    WithIP,
    WithVR,
    column,
    columns,
    fused_step,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from train.strategies.auxiliary import Auxiliary
    from train.strategies.base import Batch

PARTS = ("adversarial", "wavelet", "feature", "consistency", "kl")
"""Of the loss of the enhancement, in the order of ``steps.csv``."""


@STRATEGIES.register("hqg")
class HQG(WithIP, WithVR):
    """Bi-level: theta is stepped with the gradient of the enhancement's loss and, as the gate decides, with that of a
    task whose network has just moved to where the enhanced images send it.

    In an iteration, with y the degraded images, z the guides (other images, of high quality) and x the enhanced ones:

    1. ``x = E(y, z)``, once.
    2. The critic is stepped on z and on x without its graph.
    3. VR is stepped on x without its graph, ``inner_steps`` times.
    4. theta is stepped: the enhancement's loss is the main one, the task's loss at the moved VR the auxiliary. Critic,
       VR and the encoders that compare features are fixed functions in this step, and get no gradient.

    That VR's step depends on theta is ignored in 4 (first order), as alternating schemes do; with ``hyper`` *unrolled*
    the task's loss is that at ``phi - beta grad``, a function of theta, beta being VR's learning rate.

    ``--gate always`` is the plain bi-level scheme, ``--gate never`` enhancement alone. Nothing reads the clean images
    of a batch. IP may be any network: one that takes no guide has no loss of consistency, and no features of its own.
    """

    guided = True
    validated_by = None
    gate: ClassVar[Gate] = "hard"
    gate_is_free = True
    settings = frozenset({"aux_weight", "gate", "threshold", "granularity", "aux_cap", "critic", "unpaired"})

    @property
    def roles(self) -> tuple[Role, ...]:
        return (*super().roles, CRITIC)

    @property
    def measures(self) -> tuple[Measure, ...]:
        own = [columns((AUX_LOSS, *each.measures, *GATED), each.name, self.among) for each in self.auxiliaries]
        parts = (*map(Measure, PARTS), Measure("critic_loss", "critic", "{:.3f}", loss=True), Measure("r1"))
        return (LOSS, *parts, *(measure for each in own for measure in each), MAIN_NORM, SKIPPED)

    @property
    def critic(self) -> Learner[torch.optim.Optimizer]:
        return self.learners[CRITIC.key]

    def losses(self, batch: Batch) -> Losses:
        """The enhanced images with their graph; all other losses need what :meth:`update` has moved."""
        assert batch.guide is not None
        self._batch = batch
        self._kept = Buffers([self.ip.network])
        self._description = None
        network = self.ip.network
        if not getattr(network, "takes_guide", False):
            self._enhanced = self.precision(network, batch.degraded)
        else:
            describe: Any = network.describe
            enhance: Any = network.enhance
            self._description = self.precision(describe, batch.guide)
            self._enhanced = self.precision(enhance, batch.degraded, self._description.sample())
        return Losses()

    def update(self, found: Losses) -> Measurements:
        import torch

        batch, enhanced = self._batch, self._enhanced
        self._overflowed: list[Tensor] = []
        before = Snapshot([self.critic, *(self.vr(each) for each in self.auxiliaries)])
        found.measured |= self._move_critic(batch.guide, enhanced.detach())
        # The unrolled loss starts from where VR was, so the graph of its step is made before VR moves.
        unrolled = [self._unrolled(each) for each in self.auxiliaries] if self._unrolls else []
        for each in self.auxiliaries:
            found.measured |= self._move_vr(each, enhanced.detach())
        outputs, own_features = self._recognized(enhanced)
        parts = self._parts(own_features)
        found.main = torch.stack(list(parts.values())).sum()
        found.auxiliary = tuple(
            unrolled or (each.loss(output, batch) for each, output in zip(self.auxiliaries, outputs, strict=True))
        )
        for each, loss in zip(self.auxiliaries, found.auxiliary, strict=True):
            found.measured[column("aux_loss", each.name, self.among)] = loss.detach()
        found.measured |= {"loss": found.main.detach(), **{name: part.detach() for name, part in parts.items()}}
        # A factor of 1, or of NaN where another loss is not finite: then theta's gradient is, and the step is skipped.
        known = torch.stack([found.measured["critic_loss"], *(loss.detach() for loss in found.auxiliary)])
        if self._overflowed:
            known = torch.where(torch.stack(self._overflowed).any(), torch.nan, known)
        found.main = found.main * (1 + 0 * known.sum())
        stats = self.move_ip(found)
        before.restore_if(stats.skipped)
        self._kept.restore_if(stats.skipped)
        self.precision.update()
        return found.measured | self.gates(stats) | {"skipped": stats.skipped}

    def settle(self, guides: Sequence[Tensor]) -> None:
        remember = getattr(self.ip.network, "remember", None)
        if remember is not None:
            remember(guides)

    def _move_critic(self, real: Tensor | None, made: Tensor) -> Measurements:
        """Steps the critic, with what it is penalized for the steepness of its answer about ``real``."""
        assert real is not None
        network, learner = self.critic.network, self.critic
        real = real.detach().requires_grad_()
        logits = network(real)  # in float32, as all that is differentiated twice
        penalty = losses.r1_penalty(logits, real)
        loss = losses.critic_loss(logits, self.precision(network, made))
        learner.optimizer.zero_grad()
        self.precision.backward(loss + self.terms.unpaired.r1_weight * penalty)
        self._step(learner)
        learner.schedule.step()
        return {"critic_loss": (loss + 0 * penalty).detach(), "r1": penalty.detach()}

    def _move_vr(self, auxiliary: Auxiliary, images: Tensor) -> Measurements:
        """The inner problem: VR's steps on enhanced images that do not move.

        :returns: what is measured of its answers to images of which it has not just learned.
        """
        learner = self.vr(auxiliary)
        measured: Measurements = {}
        for _ in range(self.terms.unpaired.inner_steps):
            output = self.precision(learner.network, images)
            measured = measured or auxiliary.measure(output.detach(), self._batch)
            learner.optimizer.zero_grad()
            self.precision.backward(auxiliary.loss(output, self._batch))
            self._step(learner)
        learner.schedule.step()
        return {column(name, auxiliary.name, self.among): value for name, value in measured.items()}

    def _step(self, learner: Learner) -> None:
        """Of a network that is not theta's. Where its gradient overflows it stays as it is, and theta's step will be
        skipped for it, which undoes whatever else has moved."""
        overflowed = self.precision.overflowed([learner])
        if overflowed is None:
            learner.optimizer.step()
            return
        self._overflowed.append(overflowed)
        fused_step(learner.optimizer, overflowed.float(), self.precision.scale)

    @property
    def _unrolls(self) -> bool:
        return self.terms.unpaired.hyper == "unrolled"

    def _unrolled(self, auxiliary: Auxiliary) -> Tensor:
        """The task's loss at ``phi - beta grad_phi L``, as a function of theta twice: through the enhanced images, and
        through the step. Of one step of gradient descent, whatever VR's own optimizer is; under plain SGD with
        ``inner_steps=1`` it is VR's own. In float32, as all that is differentiated twice."""
        import torch

        learner = self.vr(auxiliary)
        beta = float(learner.optimizer.param_groups[0]["lr"])
        # Copies: VR moves in place before the graph is walked back.
        phi = {name: value.detach().clone().requires_grad_() for name, value in learner.network.named_parameters()}
        loss = auxiliary.loss(called(learner.network, phi, self._enhanced), self._batch)
        gradients = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        moved = {name: value - beta * slope for (name, value), slope in zip(phi.items(), gradients, strict=True)}
        return auxiliary.loss(called(learner.network, moved, self._enhanced), self._batch)

    def _recognized(self, enhanced: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What every VR says of the enhanced images, and its features of them."""
        from train.precision import widened

        outputs, features = [], []
        for each in self.auxiliaries:
            network = self.vr(each).network
            with penultimate(network) as seen:
                outputs.append(self.precision(fixed, network, enhanced))
            features.append(widened(seen[0]))
        return outputs, features

    def _parts(self, own_features: Sequence[Tensor]) -> dict[str, Tensor]:
        """The terms of the enhancement's loss, weighted.

        :param own_features: of the enhanced images, by the VRs.
        """
        import torch

        from train.precision import widened

        batch, enhanced, weights = self._batch, self._enhanced, self.terms.unpaired
        given = batch.enlarged()
        compared = list(own_features)
        targets: list[Tensor] = []
        with torch.no_grad():
            for each in self.auxiliaries:
                network = self.vr(each).network
                with penultimate(network) as seen:
                    self.precision(fixed, network, given)
                targets.append(widened(seen[0]))
        parts = {
            "adversarial": weights.adversarial_weight
            * losses.adversarial_loss(self.precision(fixed, self.critic.network, enhanced)),
            "wavelet": weights.wavelet_weight * losses.wavelet_loss(enhanced, given, keeps=weights.keeps),
        }
        if self._description is not None:
            network = self.ip.network
            encoder: Any = network.enhancer.encoder  # type: ignore[union-attr]
            guidance: Any = network.guidance
            compared += self.precision(fixed, encoder, enhanced)
            with torch.no_grad():
                targets += self.precision(encoder, given)
            parts["consistency"] = weights.consistency_weight * losses.consistency_loss(
                self.precision(fixed, guidance, enhanced).mean, self._description.mean
            )
            if self._description.log_variance is not None:
                parts["kl"] = weights.kl_weight * losses.kl_loss(*self._description)
        if compared:
            parts["feature"] = weights.feature_weight * losses.feature_loss(compared, targets)
        return parts


@STRATEGIES.register("hqg-only")
class HQGOnly(HQG):
    """The same enhancement without any VR, for images that nothing else is known of."""

    uses_auxiliaries = False
    gate = "never"
    gate_is_free = False
    settings = frozenset({"critic", "unpaired"})


def called(network: nn.Module, parameters: dict[str, Tensor], images: Tensor) -> Any:
    """What a network with other parameters makes of images. Its own buffers (batch statistics) stay as they are."""
    import torch

    buffers = {name: value.clone() for name, value in network.named_buffers()}
    return torch.func.functional_call(network, parameters | buffers, (images,))


def fixed(network: nn.Module, images: Tensor) -> Any:
    """What a network makes of images as a fixed function: a gradient reaches the images and not its parameters, and
    its buffers (batch statistics) stay as they are."""
    return called(network, {name: value.detach() for name, value in network.named_parameters()}, images)


class Snapshot:
    """Networks and the states of their optimizers as they were, to be had back where a step turns out to be skipped.

    :param learners: their optimizers' states are tensors, and begin at zero.
    """

    def __init__(self, learners: Iterable[Learner]) -> None:
        self._learners = list(learners)
        self._networks = [
            (now, now.detach().clone())
            for learner in self._learners
            for now in (*learner.network.parameters(), *learner.network.buffers())
        ]
        self._states = {
            (id(parameter), name): value.clone()
            for learner in self._learners
            for parameter, state in learner.optimizer.state.items()
            for name, value in state.items()
        }

    def restore_if(self, skipped: Tensor) -> None:
        """Puts everything back where ``skipped`` is 1, without waiting for the device."""
        import torch

        undo = skipped.bool()
        with torch.no_grad():
            for now, before in self._networks:
                now.copy_(before.where(undo, now))
            for learner in self._learners:
                for parameter, state in learner.optimizer.state.items():
                    for name, value in state.items():
                        start = self._states.get((id(parameter), name), torch.zeros_like(value))
                        value.copy_(start.where(undo.to(value.device), value))
