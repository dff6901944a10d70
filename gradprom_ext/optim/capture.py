"""One gradient per loss: how they are captured, whom they belong to, and when they are stale.

The main gradients lie in ``.grad``, where all other code expects them and clears them. The auxiliary ones lie in the
optimizer, where ``module.zero_grad()`` does not reach them. So every use asks first whether both are still of the same
batch.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING

from torch import Tensor

from .._extension import grads_of, same_objects
from .._torch import is_compiled_for_one_backward, version_of
from ..distributed import Average
from ..plan import Gradients

if TYPE_CHECKING:
    from .optimizer import GradPromOptimizer

__all__ = ["Capture", "Freshness", "back_propagate", "check_owners", "register"]

#: All optimizers of this kind that are alive: a loss reaches the parameters of each of them.
_alive: weakref.WeakSet[GradPromOptimizer] = weakref.WeakSet()


def register(optimizer: GradPromOptimizer) -> None:
    """Makes an optimizer known to the others."""
    _alive.add(optimizer)


class Freshness(Enum):
    """What has happened to the captured main gradients since they were last looked at."""

    UNTOUCHED = "untouched"
    WRITTEN = "written to in place"
    CLEARED = "cleared"  # every one of them is None
    REPLACED = "replaced"  # at least one is another tensor


def _versions(grads: Gradients) -> list[int]:
    return [-1 if g is None else version_of(g) for g in grads]


class Capture:
    """The gradients that ``backward`` has left behind.

    :param params: in whose order the gradients are.
    :param main: what is in ``.grad``.
    :param aux: one list per auxiliary loss; the optimizer's ``aux_grads`` themselves, which the user may change.
    """

    def __init__(self, params: list[Tensor], main: list[Tensor | None], aux: list[list[Tensor | None]]) -> None:
        self.params, self.main, self.aux = params, main, aux
        self.spent = False  #: a step has used them
        self._main_versions = _versions(main)
        self._aux = [list(grads) for grads in aux]
        self._aux_versions = [_versions(grads) for grads in aux]
        # One gradient that stands for all of them where looking at each would take as long as reading it.
        self._sample = next((i for i, g in enumerate(main) if g is not None), None)

    def main_freshness(self) -> Freshness:
        """Looks at every ``.grad``."""
        now = grads_of(self.params)
        if same_objects(now, self.main):
            return Freshness.UNTOUCHED if _versions(now) == self._main_versions else Freshness.WRITTEN
        if all(g is None for g in now):
            return Freshness.CLEARED
        return Freshness.REPLACED

    def every_main_gradient_changed(self) -> bool:
        """Whether each has been cleared, replaced or written to."""
        return all(
            p.grad is not g or version_of(g) != version
            for p, g, version in zip(self.params, self.main, self._main_versions, strict=True)
            if g is not None
        )

    def main_looks_untouched(self, now: list[Tensor | None]) -> bool:
        """Whether ``now`` are the same tensors, and the first of them has not been written to: what clips or clears
        gradients does so to all of them."""
        if not same_objects(now, self.main):
            return False
        i = self._sample
        return i is None or version_of(now[i]) == self._main_versions[i]  # type: ignore[arg-type]

    def aux_untouched(self) -> bool:
        """Whether the auxiliary gradients are those that were captured, with the values that were captured."""
        return len(self.aux) == len(self._aux) and all(
            same_objects(now, then) and _versions(now) == versions
            for now, then, versions in zip(self.aux, self._aux, self._aux_versions, strict=True)
        )

    def look_again(self) -> None:
        """Takes the gradients as they are now for what was captured."""
        self.__init__(self.params, grads_of(self.params), self.aux)  # type: ignore[misc]


def in_order_of(
    old: Sequence[Tensor], grads: list[list[Tensor | None]], params: Sequence[Tensor]
) -> list[list[Tensor | None]]:
    """``grads``, one list per loss for the parameters ``old``, as lists for ``params``; ``None`` for new ones."""
    index = {id(p): i for i, p in enumerate(old)}
    where = [index.get(id(p)) for p in params]
    return [[None if i is None else gs[i] for i in where] for gs in grads]


def _others(optimizer: GradPromOptimizer) -> Iterator[GradPromOptimizer]:
    # A wrapper around an optimizer is not another one: both have the same workspace.
    return (other for other in list(_alive) if other._work is not optimizer._work)


def check_owners(optimizer: GradPromOptimizer, params: list[Tensor]) -> None:
    """
    :raises RuntimeError: ``.grad`` of a parameter holds the main gradient that another optimizer has captured.
    """
    for other in _others(optimizer):
        if other._work.capture is None:
            continue
        theirs = {id(g) for g in other._work.capture.main if g is not None}
        for i, p in enumerate(params):
            if id(p.grad) in theirs:
                raise RuntimeError(
                    f".grad of params[{i}] holds the main gradient of the last backward() of another "
                    f"{type(other).__name__}, which has this parameter too; let that one step and call its zero_grad() "
                    "first"
                )


def _backward(loss: Tensor, retain_graph: bool) -> None:
    """
    :raises RuntimeError: a compiled model in the graph can be gone through backwards once only.
    """
    try:
        loss.backward(retain_graph=retain_graph)
    except RuntimeError as error:
        if not is_compiled_for_one_backward(error):
            raise
        raise RuntimeError(
            "torch.compile has compiled a model for one backward per forward, since its first backward was for one "
            "loss; several losses need one each. Call torch.compiler.reset() before the first backward() with an "
            "auxiliary loss, so that the model is compiled anew"
        ) from error


@contextlib.contextmanager
def _sending(averages: Sequence[Average], k: int) -> Iterator[None]:
    """Sends the gradients of loss ``k`` while they are made, if they are to be sent."""
    if not averages:
        yield
        return
    average = averages[k]
    with average.during_backward():
        yield
    average.send_rest([p.grad for p in average.params])


def back_propagate(
    optimizer: GradPromOptimizer,
    params: list[Tensor],
    losses: Sequence[Tensor],
    aux_grads: list[list[Tensor | None]],
    retain_graph: bool,
    averages: Sequence[Average] = (),
) -> None:
    """Adds the gradient of ``losses[0]`` to ``.grad`` of ``params``, and those of the other losses to ``aux_grads``.

    Every other leaf of the graphs gets its ordinary ``.grad`` from whichever losses reach it.

    :param averages: one per loss; they send each loss's gradients to the other processes as they become known. None:
        nothing is sent.
    :raises RuntimeError: a parameter of another optimizer of this kind is reached by the main loss and an auxiliary
        one. Its ``.grad`` then holds the main loss's part alone. Or a model was compiled for one backward.
    """
    own = set(map(id, params))
    foreign = [(p, other) for other in _others(optimizer) for p in other._params() if id(p) not in own]
    before = [(p.grad, -1 if p.grad is None else version_of(p.grad)) for p, _ in foreign]
    main_loss, *aux_losses = losses
    with _sending(averages, 0):
        _backward(main_loss, retain_graph or bool(aux_losses))
    if not aux_losses:
        return
    reached = [
        (p, p.grad, other)
        for (p, other), (g, version) in zip(foreign, before, strict=True)
        if p.grad is not None and (p.grad is not g or version_of(p.grad) != version)
    ]
    main_grads = [p.grad for p in params]
    mixed: GradPromOptimizer | None = None
    try:
        for k, loss in enumerate(aux_losses):
            for p, g in zip(params, aux_grads[k], strict=True):
                p.grad = g
            for p, _, _ in reached:
                p.grad = None
            with _sending(averages, k + 1):
                _backward(loss, retain_graph or k + 1 < len(aux_losses))
            aux_grads[k] = [p.grad for p in params]
            mixed = next((other for p, _, other in reached if p.grad is not None), mixed)
    finally:
        for p, g in zip(params, main_grads, strict=True):
            p.grad = g
        for p, g, _ in reached:
            p.grad = g
    if mixed is not None:
        raise RuntimeError(
            f"the main loss and an auxiliary loss both reach parameters of another {type(mixed).__name__}: their "
            "gradients would be summed there without a gate. Put all parameters that the main loss reaches into one "
            "optimizer, as parameter groups (or give the recognition network an optimizer of torch.optim)"
        )
