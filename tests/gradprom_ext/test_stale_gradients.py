"""Auxiliary gradients belong to the batch of the main ones: every idiom by which loops clear, recompute, change and
share gradients, against the method written out by hand."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import gradprom_ext as gp


class Line:
    """One parameter whose gradients are what a test says: the main gradient 1 per unit, the auxiliary 100 or -100."""

    def __init__(self, backend: str, n: int = 2, **kwargs) -> None:
        self.module = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(3)) for _ in range(n)])
        self.opt = gp.GradPromSGD(self.module.parameters(), lr=1.0, gate="always", backend=backend, **kwargs)

    def loss(self, slope: float) -> torch.Tensor:
        return slope * sum(p.sum() for p in self.module)

    def backward(self, main: float, aux: float) -> None:
        self.opt.backward(self.loss(main), self.loss(aux))

    @property
    def value(self) -> float:
        (value,) = {v for p in self.module for v in p.tolist()}
        return value


CLEARS = {
    "optimizer": lambda line: line.opt.zero_grad(),
    "optimizer, to zeros": lambda line: line.opt.zero_grad(set_to_none=False),
    "module": lambda line: line.module.zero_grad(),
    "module, to zeros": lambda line: line.module.zero_grad(set_to_none=False),
    "None": lambda line: [setattr(p, "grad", None) for p in line.module],
    "del": lambda line: [p.__delattr__("grad") for p in line.module],
    "zero_": lambda line: [p.grad.zero_() for p in line.module],
    "detach_, zero_": lambda line: [p.grad.detach_().zero_() for p in line.module],
    "foreach": lambda line: torch._foreach_zero_([p.grad for p in line.module]),
    "other zeros": lambda line: [setattr(p, "grad", torch.zeros(3)) for p in line.module],
    "another optimizer": lambda line: torch.optim.SGD(line.module.parameters(), lr=1.0).zero_grad(),
}


@pytest.mark.parametrize("clear", CLEARS)
def test_an_ordinary_backward_after_a_gated_step_is_ordinary(backend, clear):
    """-1 - 100, then the plain gradient alone: -2."""
    line = Line(backend)
    line.backward(1.0, 100.0)
    line.opt.step()
    CLEARS[clear](line)
    line.loss(1.0).backward()
    line.opt.step()
    assert line.value == -102.0
    assert line.opt.aux_grads == []


@pytest.mark.parametrize("clear", CLEARS)
def test_every_way_of_clearing_starts_anew(backend, clear):
    line = Line(backend)
    for main, aux in ((1.0, 100.0), (2.0, 200.0), (3.0, 300.0)):
        line.backward(main, aux)
        line.opt.step()
        CLEARS[clear](line)
    assert line.value == -606.0


def data_zero(line):
    for p in line.module:
        p.grad.data.zero_()


def data_copy(line):
    for p in line.module:
        p.grad.data.copy_(torch.zeros(3))


def data_assign(line):
    for p in line.module:
        p.grad.data = torch.zeros(3)


@pytest.mark.parametrize("clear", [data_zero, data_copy, data_assign])
def test_clearing_that_leaves_no_trace_is_right_or_refused(backend, clear):
    """``p.grad.data.zero_()``, the idiom before ``zero_grad``, moves no version: -6 or an error, never -9."""
    line = Line(backend)
    line.backward(1.0, 2.0)
    line.opt.step()
    assert line.value == -3.0
    clear(line)
    try:
        line.backward(1.0, 2.0)
    except RuntimeError as error:
        assert "call zero_grad() after each step" in str(error)
        line.opt.zero_grad()
        line.backward(1.0, 2.0)
    line.opt.step()
    assert line.value == -6.0


@pytest.mark.parametrize("clear", [data_zero, data_copy])
def test_an_ordinary_backward_after_such_clearing(backend, clear):
    line = Line(backend)
    line.backward(1.0, 2.0)
    line.opt.step()
    clear(line)
    line.loss(1.0).backward()
    line.opt.step()
    assert line.value == -4.0


def test_forgetting_to_clear_is_refused(backend):
    line = Line(backend)
    line.backward(1.0, 2.0)
    line.opt.step()
    with pytest.raises(RuntimeError, match=r"the gradients of the last step\(\) are still in \.grad"):
        line.backward(1.0, 2.0)
    for p in list(line.module)[:1]:
        p.grad = None
    with pytest.raises(RuntimeError, match=r"the gradients of the last step\(\) are still in \.grad"):
        line.backward(1.0, 2.0)
    line.opt.zero_grad()
    line.backward(1.0, 2.0)
    line.opt.step()
    assert line.value == -6.0


def test_two_steps_with_the_same_gradients(backend):
    """As in torch.optim: nothing has been cleared."""
    line = Line(backend)
    line.backward(1.0, 2.0)
    for _ in range(3):
        line.opt.step()
    assert line.value == -9.0


def test_a_batch_that_is_thrown_away(backend):
    """Its loss was not finite, say: the gradients are cleared without a step."""
    for clear in (lambda line: line.module.zero_grad(), lambda line: line.opt.zero_grad()):
        line = Line(backend)
        line.backward(50.0, 500.0)
        clear(line)
        line.backward(1.0, 2.0)
        line.opt.step()
        assert line.value == -3.0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_batch_that_is_thrown_away_and_an_ordinary_backward(backend, set_to_none):
    """Which of two batches the auxiliary gradients are of cannot be seen: an error, or right."""
    line = Line(backend)
    line.backward(50.0, 500.0)
    line.module.zero_grad(set_to_none=set_to_none)
    line.loss(1.0).backward()
    if set_to_none:
        with pytest.raises(RuntimeError, match=r"\.grad was replaced since backward\(\), and aux_grads was not"):
            line.opt.step()
        assert line.value == 0.0
    else:
        with pytest.warns(UserWarning, match="written to between backward"):
            line.opt.step()


def test_micro_batches_with_a_change_in_between_are_refused(backend):
    line = Line(backend)
    line.backward(1.0, 2.0)
    for p in line.module:
        p.grad.mul_(0.5)
    with pytest.raises(RuntimeError, match="was written to in place since the last backward"):
        line.backward(1.0, 2.0)


@pytest.mark.parametrize("clip", ["norm", "value", "by hand"])
def test_clipping_the_main_gradient_alone_is_warned_about_once(backend, clip):
    line = Line(backend)
    for attempt in range(3):
        line.backward(100.0, 200.0)
        if clip == "norm":
            torch.nn.utils.clip_grad_norm_(line.module.parameters(), 1.0)
        elif clip == "value":
            torch.nn.utils.clip_grad_value_(line.module.parameters(), 1.0)
        else:
            for p in line.module:
                p.grad.mul_(0.1)
        if attempt == 0:
            with pytest.warns(UserWarning, match=r"max_grad_norm=\.\.\. clips the combined gradient"):
                line.opt.step()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                line.opt.step()
        line.opt.zero_grad()


def test_changing_both_is_not_warned_about(backend):
    """As a reduction over processes does, in place or not."""
    line = Line(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line.backward(2.0, 4.0)
        for i, p in enumerate(line.module):
            p.grad.div_(2)
            line.opt.aux_grads[0][i].div_(2)
        line.opt.step()
        assert line.value == -3.0
        line.opt.zero_grad()
        line.backward(2.0, 4.0)
        for i, p in enumerate(line.module):
            p.grad = p.grad / 2
            line.opt.aux_grads[0][i] = line.opt.aux_grads[0][i] / 2
        line.opt.step()
        assert line.value == -6.0
        line.opt.zero_grad()
        line.backward(2.0, 4.0)
        for p in line.module:
            p.grad = p.grad / 2
        line.opt.aux_grads = [[g / 2 for g in gs] for gs in line.opt.aux_grads]
        line.opt.step()
        assert line.value == -9.0


def test_gradients_set_to_none_leave_their_parameters_alone(backend):
    """DINO freezes its last layer so, between backward and step."""
    line = Line(backend)
    line.backward(1.0, 2.0)
    first, second = line.module
    second.grad = None
    line.opt.step()
    assert first.tolist() == [-3.0] * 3
    assert second.tolist() == [0.0] * 3


def test_assigned_gradients_stay_until_they_are_cleared(backend):
    """They are the user's: an auxiliary gradient that is computed every second step only, say."""
    line = Line(backend)
    for _ in range(2):
        line.loss(1.0).backward()
        if not line.opt.aux_grads:
            line.opt.aux_grads = [[torch.full((3,), 2.0) for _ in line.module]]
        line.opt.step()
        line.module.zero_grad()
    assert line.value == -6.0
    with pytest.raises(RuntimeError, match="aux_grads were assigned"):
        line.backward(1.0, 2.0)


# Who owns a parameter ------------------------------------------------------------------------------------------------


def split_model(backend):
    torch.manual_seed(0)
    encoder, decoder, helper = (torch.nn.Linear(3, 3).double() for _ in range(3))
    x = torch.randn(4, 3, dtype=torch.float64)

    def losses():
        y = decoder(torch.tanh(encoder(x)))
        return y.square().mean(), helper(y).exp().mean()

    return encoder, decoder, helper, losses


def test_two_optimizers_on_one_model_are_refused_by_name(backend):
    """Each would get the other's main and auxiliary gradients, summed without a gate."""
    encoder, decoder, _, losses = split_model(backend)
    first = gp.GradPromSGD(encoder.parameters(), lr=0.1, backend=backend)
    second = gp.GradPromAdam(decoder.parameters(), lr=0.1, backend=backend)
    main, aux = losses()
    (expected,) = torch.autograd.grad(main, [encoder.weight], retain_graph=True)
    with pytest.raises(RuntimeError, match="reach parameters of another GradPromAdam"):
        first.backward(main, aux)
    torch.testing.assert_close(encoder.weight.grad, expected)  # as after any error in an auxiliary backward
    assert first.aux_grads == second.aux_grads == []


def test_two_optimizers_as_two_groups_of_one(backend):
    """What the message advises, against torch.autograd.grad."""
    encoder, decoder, helper, losses = split_model(backend)
    opt = gp.GradPromSGD(
        [{"params": encoder.parameters(), "lr": 0.1}, {"params": decoder.parameters(), "lr": 0.2}], backend=backend
    )
    params = [*encoder.parameters(), *decoder.parameters()]
    main, aux = (torch.autograd.grad(loss, params, retain_graph=True) for loss in losses())
    opt.backward(*losses())
    torch.testing.assert_close([p.grad for p in params], list(main))
    torch.testing.assert_close(opt.aux_grads[0], list(aux))
    assert helper.weight.grad is not None


def test_a_recognition_network_with_such_an_optimizer_gets_its_ordinary_gradient(backend):
    """Only auxiliary losses reach it."""
    encoder, decoder, helper, losses = split_model(backend)
    opt = gp.GradPromSGD([*encoder.parameters(), *decoder.parameters()], lr=0.1, backend=backend)
    other = gp.GradPromSGD(helper.parameters(), lr=0.1, backend=backend)
    (expected,) = torch.autograd.grad(losses()[1], [helper.weight])
    opt.backward(*losses())
    torch.testing.assert_close(helper.weight.grad, expected)
    before = helper.weight.detach().clone()
    other.step()
    torch.testing.assert_close(helper.weight.detach(), before - 0.1 * expected)


def test_two_optimizers_with_the_same_parameters(backend):
    line = Line(backend)
    twin = gp.GradPromSGD(line.module.parameters(), lr=1.0, backend=backend)
    line.backward(1.0, 2.0)
    with pytest.raises(RuntimeError, match=r"\.grad of params\[0\] holds the main gradient .* of another GradPromSGD"):
        twin.backward(line.loss(1.0), line.loss(2.0))
    line.opt.step()
    line.opt.zero_grad()
    twin.backward(line.loss(1.0), line.loss(2.0))
    twin.step()
    assert line.value == -6.0


def test_an_optimizer_that_is_gone_owns_nothing(backend):
    encoder, decoder, _, losses = split_model(backend)
    first = gp.GradPromSGD(encoder.parameters(), lr=0.1, backend=backend)
    second = gp.GradPromSGD(decoder.parameters(), lr=0.1, backend=backend)
    clone = copy.deepcopy(second)
    del second, clone
    first.backward(*losses())
    assert decoder.weight.grad is not None


@pytest.mark.parametrize("when", ["between backward and step", "between backward and backward", "after assigning"])
@pytest.mark.parametrize("how", ["into an earlier group", "a new group", "out of a group"])
def test_groups_that_change_between(backend, how, when):
    """Gradients follow their parameters, not their places."""
    a, b, new = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    opt = gp.GradPromSGD([{"params": [a]}, {"params": [b]}], lr=1.0, gate="always", backend=backend)
    losses = lambda: ((a + 2 * b).sum(), (10 * a + 20 * b).sum())  # noqa: E731
    if when == "after assigning":
        for p, g in ((a, 1.0), (b, 2.0)):
            p.grad = torch.full((2,), g)
        opt.aux_grads = [[torch.full((2,), 10.0), torch.full((2,), 20.0)]]
    else:
        opt.backward(*losses())
    if how == "into an earlier group":
        opt.param_groups[0]["params"].append(new)
    elif how == "a new group":
        opt.add_param_group({"params": [new]})
    else:
        opt.param_groups[0]["params"].remove(a)
    times = 1
    if when == "between backward and backward":
        times = 2
        opt.backward(*losses())
    opt.step()
    assert b.tolist() == [-22.0 * times] * 2
    assert a.tolist() == [0.0 if how == "out of a group" else -11.0 * times] * 2
    assert new.tolist() == [0.0] * 2
