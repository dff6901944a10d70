"""Memory that moves under a tensor that stays the same Python object: state tensors, parameters, gradients, numbers.

PyTorch has many ways to do this (``.data = ...`` is what the widely copied ``optimizer_to`` does), and none of them
moves ``Tensor._version``. A kernel that remembers an address would write to memory that is no longer the optimizer's.
"""

from __future__ import annotations

import pytest
import torch

import gradprom_ext as gp
from gradprom_ext import backends

from .broken import Around
from .problems import HALF, bits, feed, twins
from .test_backends import needs_kernels, python
from .test_master_weights import make as make_masters


def assign_data(t: torch.Tensor) -> None:
    t.data = t.data.clone()


def copy_to_device(t: torch.Tensor) -> None:
    t.data = t.data.to("cpu", copy=True)


def set_storage(t: torch.Tensor) -> None:
    with torch.no_grad():
        t.set_(t.detach().clone())


def swap(t: torch.Tensor) -> None:
    torch.utils.swap_tensors(t, t.detach().clone())


def share(t: torch.Tensor) -> None:
    """What sending a tensor to another process does to the sender's."""
    t.share_memory_()


def offload(t: torch.Tensor) -> None:
    """Free the memory, allocate other memory, bring the values back, as offloading and sharding do."""
    values, storage = t.detach().clone(), t.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    keep_busy.append(torch.full((max(size // 4, 1),), 7.0))  # takes the place that has become free
    storage.resize_(size)
    t.detach().copy_(values)


def other_layout(t: torch.Tensor) -> None:
    if t.ndim > 1:
        t.data = t.data.transpose(0, -1).clone().transpose(0, -1)
    else:
        t.data = torch.stack([t.data, t.data], dim=-1)[..., 0] if t.ndim else t.data.clone()


MOVES = [assign_data, copy_to_device, set_storage, swap, share, offload, other_layout]
keep_busy: list[torch.Tensor] = []

STATES = {
    "sgd-momentum": ["momentum_buffer"],
    "sgd-nesterov": ["momentum_buffer"],
    "adam": ["exp_avg", "exp_avg_sq"],
    "adamw-decay-amsgrad": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("case", STATES)
def test_moved_states(backend, case, move):
    """Everything moves, one kind of tensor at a time; torch.optim, whose tensors stay, is the oracle."""
    opt, a, other, b = twins(case, backend, shapes=[(7, 5), (), (301,)], aux_weight=0.7)
    feed(opt, a, other, b, seed=0)
    old = []
    for seed, name in enumerate([*STATES[case], "step"], start=1):
        for p in a:
            tensor = opt.state[p][name]
            if move not in (offload, swap):  # where the old memory is not free
                old.append((tensor.detach().view_as(tensor), tensor.detach().clone()))
            move(tensor)
        feed(opt, a, other, b, seed=2 * seed)
        feed(opt, a, other, b, seed=2 * seed + 1)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)
        for name in STATES[case]:
            torch.testing.assert_close(opt.state[p][name], other.state[q][name], rtol=1e-10, atol=1e-11)
        assert float(opt.state[p]["step"]) == 1 + 2 * (len(STATES[case]) + 1)
    if move in (assign_data, copy_to_device):
        for memory, values in old:
            assert bits(memory) == bits(values), "the kernel went on writing to the old memory"


def expand(t: torch.Tensor) -> None:
    t.data = torch.full((1,), 0.5, dtype=t.dtype).expand(t.shape)


def shrink(t: torch.Tensor) -> None:
    t.untyped_storage().resize_(8)


def lose_elements(t: torch.Tensor) -> None:
    with torch.no_grad():
        t.resize_(3)


REFUSED = {expand: "several elements share one memory", shrink: "has no memory", lose_elements: "has shape"}


@pytest.mark.not_mirrored
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("break_it", REFUSED)
def test_states_that_cannot_be_written_to_are_refused(backend, break_it, name):
    """PyTorch's own operations refuse the first and the last, and write beyond a storage that was shrunk."""
    params = [torch.nn.Parameter(torch.ones(7, 5)) for _ in range(2)]
    opt = gp.GradPromAdam(params, lr=0.1, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    before = [bits(p) for p in params], [bits(opt.state[params[0]][n]) for n in ("exp_avg", "exp_avg_sq", "step")]
    kept = opt.state[params[1]][name].clone()
    break_it(opt.state[params[1]][name])
    for _ in range(2):  # and it stays refused
        with pytest.raises((TypeError, ValueError), match=rf"state of params\[1\]\['{name}'\] .*{REFUSED[break_it]}"):
            opt.step()
    assert before == (
        [bits(p) for p in params],
        [bits(opt.state[params[0]][n]) for n in ("exp_avg", "exp_avg_sq", "step")],
    )
    opt.state[params[1]][name] = kept
    opt.step()
    assert float(opt.state[params[1]]["step"]) == 2


@pytest.mark.not_mirrored
@pytest.mark.parametrize("which", ["param", "main", "aux"])
def test_a_storage_that_was_shrunk_is_refused(backend, which):
    params = [torch.nn.Parameter(torch.ones(4096)) for _ in range(2)]
    opt = gp.GradPromSGD(params, lr=0.1, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.aux_grads = [[torch.ones_like(p) for p in params]]
    opt.step()
    shrink({"param": params[1], "main": params[1].grad, "aux": opt.aux_grads[0][1]}[which])
    before = bits(params[0])
    with pytest.raises(TypeError, match="has no memory"):
        opt.step()
    assert bits(params[0]) == before


def test_the_smallest_case(backend):
    """``optimizer_to`` between the second and the third step of momentum SGD, by hand: 1, 1.9, 2.71, 3.439."""
    p = torch.nn.Parameter(torch.zeros(1))
    opt = gp.GradPromSGD([p], lr=0.1, momentum=0.9, backend=backend)
    for step in range(4):
        p.grad = torch.ones(1)
        opt.step()
        if step == 1:
            for state in opt.state.values():
                for value in state.values():
                    value.data = value.data.clone()
    assert float(opt.state[p]["momentum_buffer"]) == pytest.approx(3.439)


@pytest.mark.parametrize("move", [assign_data, set_storage, share, offload, other_layout])
def test_moved_parameters_and_gradients(backend, move):
    opt, a, other, b = twins("adamw", backend, shapes=[(7, 5), (), (301,)], aux_weight=0.7)
    feed(opt, a, other, b, seed=0)
    for p in a:
        move(p)
    feed(opt, a, other, b, seed=1)
    g = torch.Generator().manual_seed(2)
    main, aux = ([torch.randn(p.shape, generator=g, dtype=p.dtype) for p in a] for _ in range(2))
    for p, q, m, x in zip(a, b, main, aux, strict=True):
        p.grad, q.grad = m.clone(), m + 0.7 * x * (sum((u * v).sum() for u, v in zip(main, aux, strict=True)) >= 0)
    opt.aux_grads = [[x.clone() for x in aux]]
    for _ in range(2):
        for p, x in zip(a, opt.aux_grads[0], strict=True):
            move(p.grad)
            move(x)
        opt.step()
        other.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)


def test_moved_numbers(backend):
    """The learning rate, lambda and the count of skipped steps may be tensors, too."""
    p = torch.nn.Parameter(torch.zeros(3))
    lr, aux_weight = torch.tensor(1.0), torch.tensor(1.0)
    opt = gp.GradPromSGD([p], lr=lr, aux_weight=aux_weight, backend=backend)
    for value in (1.0, 0.5, 0.25):
        p.grad = torch.ones(3)
        opt.aux_grads = [[torch.ones(3)]]
        opt.step()
        p.grad = torch.full((3,), float("nan"))
        opt.step()
        for number in (lr, aux_weight):
            number.data = torch.tensor(value / 2)
        opt.skipped_steps.data = opt.skipped_steps.data.clone()
    # lr * (main + lambda * aux): 1 * (1 + 1), then with both at 0.5 and 0.25
    assert p.tolist() == pytest.approx([-(2.0 + 0.5 * 1.5 + 0.25 * 1.25)] * 3)
    assert float(opt.skipped_steps) == 3


# Parameters on another device ----------------------------------------------------------------------------------------


@needs_kernels
def test_a_plan_whose_parameters_are_on_another_device_says_so_and_writes_nothing():
    """Without another device: where tensors are read by their attributes, these say where they are."""
    out = python(
        """
import torch
import gradprom_ext as gp
from gradprom_ext._extension import parameters_moved

class Elsewhere(torch.nn.Parameter):
    device = torch.device("cuda", 1)

params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
opt = gp.GradPromAdam(params, lr=0.1, backend="cpu")
for p in params: p.grad = torch.ones(3)
opt.step()
before = [p.detach().clone() for p in params]
stepper = opt._work.stepper
params[1].__class__ = Elsewhere
assert stepper.fits(params, 0, opt._work.config)
try:
    stepper.step([p.grad for p in params], [], opt._hypers())
except ValueError as error:
    print(parameters_moved(error), error)
params[1].__class__ = torch.nn.Parameter
print(all(map(torch.equal, before, params)), [float(s["step"]) for s in opt.state.values()])
""",
        GRADPROM_TENSORS="attributes",
    )
    assert out.splitlines() == ["True params[1] has been moved to another device", "True [1.0, 1.0]"]


class Moved(Around):
    """A plan whose parameters are found to have been moved at its second step."""

    steps = 0

    def step(self, request):
        self.steps += 1
        if self.steps == 2:
            raise backends.extension()[0].ParametersMoved("params[0] has been moved to another device")
        return super().step(request)


@needs_kernels
def test_the_step_that_finds_moved_parameters_is_done_by_a_new_plan():
    made = []

    class Backend(backends.CpuBackend):
        def plan(self, spec):
            made.append(Moved(super().plan(spec)))
            return made[-1]

    opt, a, other, b = twins("adamw", Backend(), shapes=[(7, 5), (), (301,)], aux_weight=0.7)
    for seed in range(2):
        feed(opt, a, other, b, seed=seed)
    assert [plan.steps for plan in made] == [2, 1]
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)
        assert float(opt.state[p]["step"]) == 2
    made[-1].steps = 1
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="another device"):
        patch.setattr(Moved, "steps", 1)  # every new plan finds it again: it is not tried for ever
        feed(opt, a, other, b, seed=2)
    assert len(made) == 3


# Masters -------------------------------------------------------------------------------------------------------------


def clamp(p):
    p.data.clamp_(-0.25, 0.25)


def copy_into(p):
    p.data.copy_(torch.full_like(p, 0.5))


def assign(p):
    p.data = torch.full_like(p, -0.75)


def fill_in_place(p):
    with torch.no_grad():
        p.fill_(2.0)


def write_through_numpy(p):
    p.detach().view(torch.int16).numpy()[...] = 0x3C00


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("write", [clamp, copy_into, assign, fill_in_place, write_through_numpy])
def test_whatever_writes_to_a_parameter_writes_to_its_master(backend, write, dtype):
    """The master follows where the parameter is no longer its rounded value, and keeps its finer value elsewhere."""
    opt, a, _, _ = make_masters("sgd-momentum", backend, dtype)
    for p in a:
        p.grad = torch.full_like(p, 0.3)
    opt.step()
    masters = [opt.state[p]["master"].clone() for p in a]
    for p in a:
        write(p)
    expected = []
    for p, master in zip(a, masters, strict=True):
        kept = torch.where(master.to(dtype) == p, master, p.detach().float())
        buffer = 0.9 * opt.state[p]["momentum_buffer"] + (1 - 0.3) * (0.3 + 0.01 * kept)
        expected.append(kept - 0.05 * buffer)
        p.grad = torch.full_like(p, 0.3)
    with torch.no_grad():
        g = float(a[0].grad.float().flatten()[0])  # 0.3 in this type
    opt.step()
    for p, master, value in zip(a, masters, expected, strict=True):
        torch.testing.assert_close(opt.state[p]["master"], value, rtol=1e-3, atol=abs(g - 0.3) + 1e-6)
        assert bits(p) == bits(opt.state[p]["master"].to(dtype))
        assert not torch.equal(opt.state[p]["master"], master)


@pytest.mark.parametrize("dtype", HALF)
def test_a_parameter_that_becomes_one_of_16_bits_gets_a_master(backend, dtype):
    """Which parameters have one is known by the types that they have at the step: 1 - 1/2 - 2**-12, by hand."""
    p = torch.nn.Parameter(torch.ones(3))
    opt = gp.GradPromSGD([p], lr=0.5, master_weights=True, backend=backend)
    p.grad = torch.ones(3)
    opt.step()
    assert "master" not in opt.state[p]
    p.data, p.grad = p.data.to(dtype), torch.full((3,), 2.0**-11, dtype=dtype)
    opt.step()
    assert opt.state[p]["master"].tolist() == [0.5 - 2.0**-12] * 3
    assert bits(p) == bits(torch.full((3,), 0.5 - 2.0**-12).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_masters_keep_their_finer_values_and_nan_and_signs_of_zero_are_values(backend, dtype):
    p = torch.nn.Parameter(torch.tensor([1.0, 0.0, float("nan"), float("inf"), -3.0]).to(dtype))
    opt = gp.GradPromSGD([p], lr=0.0, master_weights=True, backend=backend)
    p.grad = torch.zeros_like(p)
    opt.step()
    master = opt.state[p]["master"]
    master[0] += 1e-5  # finer than the parameter can say
    master[4] -= 1e-5
    p.data[1] = -0.0
    opt.step()
    assert master[0] == torch.tensor(1.0) + 1e-5
    assert master[4] == torch.tensor(-3.0) - 1e-5
    assert torch.signbit(master[1])
    assert torch.isnan(master[2])
    assert torch.isinf(master[3])
    assert torch.isnan(p[2])
    assert bits(p[[0, 1, 3, 4]]) == bits(master[[0, 1, 3, 4]].to(dtype))


def test_a_skipped_step_lets_no_master_follow(backend):
    """Nothing changes, bit for bit; the next step that happens takes the written value over."""
    p = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    opt = gp.GradPromSGD([p], lr=1.0, master_weights=True, backend=backend)
    p.grad = torch.zeros_like(p)
    opt.step()
    p.data.fill_(2.0)
    p.grad = torch.full_like(p, float("nan"))
    opt.step()
    assert opt.state[p]["master"].tolist() == [1.0] * 5
    p.grad = torch.ones_like(p)
    opt.step()
    assert opt.state[p]["master"].tolist() == p.tolist() == [1.0] * 5
    assert float(opt.skipped_steps) == 1
