"""The mirror that brings host tensors to another device, with clones in host memory as the other device. Every test of
the library's semantics runs on such a mirror too (target ``mirror-of-cpu``)."""

from __future__ import annotations

import pytest
import torch

import gradprom_ext as gp
from gradprom_ext import backends

from . import mirror
from .problems import bits

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif("cpu" not in gp.available_backends(), reason="the compiled module is not built")


def test_views_keep_their_place_and_their_neighbours():
    buffer = torch.arange(100.0)
    views = [buffer[1:5], buffer[3:99].view(8, 12).t()[::2, 1:], buffer[7].expand(4), buffer[50:50], buffer[99]]
    copies = mirror.Copies(CPU)
    sent = [copies.send(view) for view in views]
    for view, copy in zip(views, sent, strict=True):
        assert (copy.dtype, copy.storage_offset(), copy.shape, copy.stride()) == (
            view.dtype,
            view.storage_offset(),
            view.shape,
            view.stride(),
        )
        assert torch.equal(copy, view)
        assert copy.untyped_storage().data_ptr() == sent[0].untyped_storage().data_ptr() != buffer.data_ptr()
    # A write through one view is seen through the others, on the device, and in the host's memory when it comes back.
    sent[0].as_strided((1,), (1,), 7).fill_(-1.0)
    assert sent[2].tolist() == [-1.0] * 4
    assert buffer[7] == 7
    copies.bring_back([views[3]])
    assert buffer.tolist() == [*range(7), -1.0, *range(8, 100)]


def test_other_types_share_a_storage_too():
    words = torch.tensor([1.0, 2.0, 3.0])
    halves = words.view(torch.bfloat16)[1:]
    copies = mirror.Copies(CPU)
    copy = copies.send(halves)
    assert copies.send(words).untyped_storage().data_ptr() == copy.untyped_storage().data_ptr()
    assert copy.tolist() == halves.tolist()


def test_a_storage_keeps_its_copy_from_step_to_step():
    kept, dropped = torch.zeros(8), torch.ones(4)
    copies = mirror.Copies(CPU)
    copies.begin()
    first = copies.send(kept)
    copies.send(dropped)
    kept += 5
    assert first.tolist() == [0.0] * 8
    assert copies.send(kept).tolist() == [0.0] * 8, "within a step, what was sent first counts"
    copies.begin()
    second = copies.send(kept)
    assert second.tolist() == [5.0] * 8
    assert second.data_ptr() == first.data_ptr()
    with pytest.raises(KeyError):
        copies.bring_back([dropped])
    kept.untyped_storage().resize_(kept.nbytes * 1000)
    copies.begin()
    assert copies.send(kept).untyped_storage().nbytes() == kept.nbytes * 1000


class Witness:
    """The CPU backend, remembering which memory it was given and spoiling what lies beside it."""

    name, device_type = "witness", "cpu"

    def __init__(self) -> None:
        self.addresses: set[int] = set()
        self.missing, self.rejects = backends.CpuBackend().missing, backends.CpuBackend().rejects

    def plan(self, spec):
        plan = backends.CpuBackend().plan(spec)
        bind, params = plan.bind_gradients, spec.params

        def bind_and_spoil(main, aux):
            self.addresses |= {t.data_ptr() for t in (*params, *main, *aux[0])}
            params[0].as_strided((1,), (1,), params[0].storage_offset() - 1).fill_(-7.0)
            bind(main, aux)

        plan.bind_gradients = bind_and_spoil
        return plan


class Everything(gp.GatePolicy):
    """Runs as the Gram matrix and the update apart."""

    def __call__(self, gram, aux_weight):
        return torch.ones_like(gram[..., 0, 0]), torch.ones_like(gram[..., 0, 1:])


@pytest.mark.parametrize("gate", [gp.HardGate(), Everything()])
def test_the_work_is_done_on_the_copies(gate):
    witness, buffer = Witness(), torch.ones(5)
    param = torch.nn.Parameter(buffer[2:4])
    main, aux = torch.ones(2), torch.tensor([2.0, 1.0])
    opt = gp.GradPromSGD([param], lr=0.5, momentum=0.5, gate=gate, backend=mirror.Mirror(witness, CPU))
    for _ in range(2):
        param.grad, opt.aux_grads = main, [[aux]]
        opt.step()
    assert not witness.addresses & {t.data_ptr() for t in (param, main, aux)}
    # The buffer becomes (3, 2), then (4.5, 3); what was written beside the parameter has come back as well.
    assert buffer.tolist() == [1.0, -7.0, 1 - 1.5 - 2.25, 1 - 1.0 - 1.5, 1.0]
    assert opt.state[param]["momentum_buffer"].tolist() == [4.5, 3.0]
    assert float(opt.state[param]["step"]) == 2
    assert opt.stats.packed.device == CPU


def test_skipped_steps_are_counted_where_the_test_looks():
    param = torch.nn.Parameter(torch.ones(3))
    opt = gp.GradPromAdam(
        [param], lr=torch.tensor(0.5, dtype=torch.float64), backend=mirror.Mirror(backends.CpuBackend(), CPU)
    )
    for value in (1.0, float("nan"), float("inf")):
        before = bits(param)
        param.grad, opt.aux_grads = torch.full((3,), value), [[torch.ones(3)]]
        opt.step()
        assert (bits(param) == before) == (value != 1.0)
    assert float(opt.skipped_steps) == 2
