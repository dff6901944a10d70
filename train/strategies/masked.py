"""Pre-training of an encoder without labels: it is given a corrupted image, and a decoder must find the clean one in
its embedding. Masked autoencoders, masked frequency modeling and Frepa are this strategy with another corruption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

from train import losses
from train.errors import RunError
from train.strategies import STRATEGIES
from train.strategies.base import (
    CRITIC,
    LOSS,
    PSNR,
    SKIPPED,
    Buffers,
    Losses,
    Measure,
    Measurements,
    Role,
    Strategy,
    Terms,
    batch_psnr,
    step_unless,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models.encoder import Encoder
    from train.strategies.auxiliary import Auxiliary
    from train.strategies.base import Adversarial, Batch


class Method(NamedTuple):
    """A pre-training by name.

    :param task: the corruption.
    :param ip_loss: between the reconstructed and the clean image.
    :param adversarial: what else the encoder learns from, unless the user says otherwise.
    """

    task: str
    ip_loss: str
    adversarial: Adversarial

    @property
    def settings(self) -> dict[str, str]:
        """Of a run that pre-trains an encoder so."""
        return {"strategy": "masked", "optimizer": "adamw", **self._asdict()}


METHODS = {
    # Y. Chu et al., arXiv:2407.14651.
    "frepa": Method("frepa", "frepa", "discriminator"),
    # Of both, the papers' losses are of the masked pixels and frequencies alone. Ours is of all pixels, which by
    # Parseval's theorem is one of all frequencies: the three methods differ in their corruption and in Frepa's losses.
    "mae": Method("zero-mask", "mse", "none"),  # K. He et al., arXiv:2111.06377
    "mfm": Method("frequency-disc", "mse", "none"),  # J. Xie et al., arXiv:2206.07706
}
"""``--method`` of ``train.pretrain``, and ``--vr-start``."""

DECODER = Role("decoder", "auxiliary", "decoder")
ENCODERS = {key: Role("encoder", "auxiliary", key) for key in ("vr", "seg")}

# Neither is stated in what could be read of the paper; both are small beside a reconstruction loss near 0.1.
CRITIC_WEIGHT = 0.01
CONSISTENCY_WEIGHT = 0.1

ADVERSARIAL_LOSS = Measure("adversarial", "adversarial", "{:.3f}")
CRITIC_LOSS = Measure("critic_loss", "critic", "{:.3f}", loss=True)
CONSISTENCY = Measure("consistency", "consistency", "{:.3f}")
SPREAD = Measure("embedding_std", "spread", "{:.3f}")


@STRATEGIES.register("masked")
class Masked(Strategy):
    """Encoder and decoder are stepped with the gradient of the loss between the decoded and the clean image.

    Frepa's "adversarial" part has two readings, and both are here (``--adversarial``). ``discriminator``, as
    descriptions of the paper have it: a critic tells decoded from clean images, and encoder and decoder are also
    stepped to be taken for clean. ``consistency``, as its figure and the abstract of its later version have it: the
    embeddings of two corruptions of one image are to be alike (``1 - cos``, each with the other as a fixed target);
    what keeps them from all being the same is the reconstruction, and their spread is logged. The weights are ours.

    The network is the one of the first auxiliary: VR's with ``--aux dia``, the segmentation's with ``--aux seg``. Its
    last layer, which comes after the embedding, is never reached, and is left out of ``weights.safetensors``.
    """

    trains_ip = False
    uses_auxiliaries = False
    settings = frozenset({"aux", "encoder", "ip_loss", "adversarial", "critic"})

    def __init__(self, auxiliaries: Sequence[Auxiliary] = (), terms: Terms | None = None) -> None:
        super().__init__(auxiliaries, terms)
        self._critical = self.terms.adversarial in ("discriminator", "both")
        self.second = self.terms.adversarial in ("consistency", "both")
        self._encoder = ENCODERS[self.terms.encoder]

    @property
    def roles(self) -> tuple[Role, ...]:
        return (self._encoder, DECODER, *((CRITIC,) if self._critical else ()))

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (
            LOSS,
            PSNR,
            *((ADVERSARIAL_LOSS, CRITIC_LOSS) if self._critical else ()),
            *((CONSISTENCY,) if self.second else ()),
            SPREAD,
            SKIPPED,
        )

    def own_network(self, role: Role, networks: dict[str, nn.Module], *, channels: int) -> nn.Module | None:
        if role == DECODER:
            from models.decoder import Decoder

            encoder = self._checked(networks[self._encoder.key])
            return Decoder(encoder.width, encoder.stride.bit_length() - 1, channels)
        return None

    def _checked(self, network: nn.Module) -> Encoder:
        from models.encoder import Encoder

        if not isinstance(network, Encoder):
            raise RunError(
                f"--strategy masked needs a network with an embedding for --{self._encoder.key} (resnet18, resnet50, "
                "resnet101, swin, vit, unet)"
            )
        return network

    @property
    def untrained(self) -> frozenset[str]:
        network = self.learners[self._encoder.key].network
        heads = tuple(f"{each}." for each in cast("Encoder", network).head)
        return frozenset(f"{self._encoder.key}.{name}" for name in network.state_dict() if name.startswith(heads))

    def losses(self, batch: Batch) -> Losses:
        self._kept = Buffers(each.network for each in self.learners.values())
        embedding = self.precision(self._network.features, batch.enlarged())
        decoded = self.precision(self._decoded, embedding, batch.clean)
        loss = losses.IMAGE_LOSSES[self.terms.ip_loss](decoded, batch.clean)
        found = Losses(
            measured={
                "loss": loss.detach(),
                "psnr": batch_psnr(decoded, batch.clean),
                "embedding_std": embedding.detach().std((0, 2, 3), correction=0).mean(),
            }
        )
        total = loss
        if self._critical:
            critic = self.learners[CRITIC.key].network.requires_grad_(False)
            adversarial = losses.adversarial_loss(self.precision(critic, decoded))
            critic.requires_grad_(True)
            real, made = (self.precision(critic, images) for images in (batch.clean, decoded.detach()))
            found.own = (losses.critic_loss(real, made),)
            found.measured |= {"adversarial": adversarial.detach(), "critic_loss": found.own[0].detach()}
            total = total + CRITIC_WEIGHT * adversarial
        if self.second:
            assert batch.second is not None
            other = self.precision(self._network.features, replace(batch, degraded=batch.second).enlarged())
            apart = losses.embedding_distance(embedding, other) + losses.embedding_distance(other, embedding)
            found.measured["consistency"] = apart.detach() / 2
            total = total + CONSISTENCY_WEIGHT * apart / 2
        found.main = total
        return found

    def update(self, found: Losses) -> Measurements:
        assert found.main is not None
        parts = (found.main, *found.own)
        skipped = self.not_finite(*parts)
        for learner in self.learners.values():
            learner.optimizer.zero_grad()
        for loss in parts:
            self.precision.backward(loss)
        if (overflowed := self.precision.unscale(self.learners.values())) is not None:
            skipped = skipped | overflowed
        for learner in self.learners.values():
            step_unless(skipped, learner)
        self._kept.restore_if(skipped)
        self.precision.update()
        return found.measured | {"skipped": skipped}

    @property
    def _network(self) -> Encoder:
        return cast("Encoder", self.learners[self._encoder.key].network)

    def _decoded(self, embedding: Tensor, images: Tensor) -> Tensor:
        """What the decoder makes of the embedding of images of this size."""
        from models.decoder import decoded

        return decoded(self.learners[DECODER.key].network, embedding, (images.shape[2], images.shape[3]))

    def enhance(self, degraded: Tensor) -> Tensor:
        return self._decoded(self._network.features(degraded), degraded)
