"""The functions keep plans from call to call: that must be seen in nothing but the time they take."""

from __future__ import annotations

import gc
import os
import re
import threading
import weakref

import pytest
import torch

import gradprom_ext as gp
from gradprom_ext import _stateless

from . import targets
from .problems import GATES, bits, problem
from .test_bad_input import GRADIENTS
from .test_moved_memory import MOVES
from .test_unreadable_tensors import LAZY, PHANTOMS

pytestmark = pytest.mark.skipif(not targets.usable_on_host("cpu"), reason="plans are kept by the CPU kernels alone")

SETTINGS = {"lr": 0.5, "aux_weight": 0.7, "max_grad_norm": 2.0, "backend": "cpu"}


@pytest.fixture(autouse=True)
def _nothing_kept():
    _stateless._kept.cache_clear()
    yield
    _stateless._kept.cache_clear()


def kept(tensors: int, num_aux: int = 1, per_tensor: bool = False) -> list:
    cpu = next(b for b in gp.backends.BACKENDS if b.name == "cpu")
    return list(_stateless._kept(cpu, torch.device("cpu"), tensors, num_aux, per_tensor))


def step_by_a_new_plan(params, main, aux, **settings):
    """What a call gives that finds no plan."""
    _stateless._kept.cache_clear()
    outcome = [p.clone() for p in params]
    stats = gp.gradprom_(outcome, main, aux, **{**SETTINGS, **settings})
    return [*outcome, stats.packed]


def test_a_plan_is_kept_and_used_again():
    for function in (lambda *a: gp.gradprom_(*a, **SETTINGS), lambda _, m, a: gp.gradient_stats(m, a, backend="cpu")):
        plans = []
        for seed in range(3):
            params, main, (aux,) = problem(1, seed=seed, shapes=[(5, 3), (7,), ()])
            function(params, main, aux)
            plans += kept(3)
        assert len(plans) == 3
        assert plans[0] is plans[1] is plans[2]


def drawn(g: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of some type and layout."""
    dtype = [torch.float32, torch.float64, torch.bfloat16][int(torch.randint(3, (), generator=g))]
    way = int(torch.randint(4, (), generator=g))
    t = torch.randn(shape, generator=g).to(dtype)
    if way == 1:
        t = t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim else t
    elif way == 2:
        t = torch.stack([t, t], dim=-1)[..., 0]
    elif way == 3:
        t = torch._neg_view(-t)
    return t


def test_whatever_comes_next():
    """Sixty problems of three tensors, one after the other: other shapes, types, layouts, negative bits and Nones. Each
    is solved bit for bit as by a new plan, and as by the reference."""
    g = torch.Generator().manual_seed(0)
    shapes = [(), (1,), (5,), (4, 3), (3, 4), (2, 3, 4), (0,), (17, 9)]
    for case in range(60):
        sizes = [shapes[int(torch.randint(len(shapes), (), generator=g))] for _ in range(3)]
        params = [torch.randn(s, generator=g) for s in sizes]
        params[0] = params[0].double() if case % 3 == 0 else params[0]
        params[1] = params[1].transpose(0, -1).contiguous().transpose(0, -1) if params[1].ndim else params[1]
        main, aux = ([drawn(g, s) for s in sizes] for _ in range(2))
        if case % 4 == 1:
            main[case % 3] = None
        if case % 5 == 2:
            main[0], aux[0] = None, None
        per_tensor = case % 7 == 3
        settings = {**SETTINGS, "granularity": "tensor" if per_tensor else "global"}
        found = [p.clone() for p in params]
        by_reference = [p.clone() for p in params]
        stats = gp.gradprom_(found, main, aux, **settings)
        only_measured = gp.gradient_stats(main, aux, **{k: v for k, v in settings.items() if k != "lr"})
        here = kept(3, per_tensor=per_tensor)
        assert len(here) == 1
        expected = step_by_a_new_plan(params, main, aux, **settings)
        assert [bits(t) for t in (*found, stats.packed)] == [bits(t) for t in expected], case
        torch.testing.assert_close(only_measured.packed, stats.packed, rtol=1e-6, atol=1e-6)  # sums in another order
        gp.gradprom_(by_reference, main, aux, **{**settings, "backend": "reference"})
        for a, b in zip(found, by_reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        _stateless._kept.cache_clear()
        cpu = next(b for b in gp.backends.BACKENDS if b.name == "cpu")
        _stateless._kept(cpu, torch.device("cpu"), 3, 1, per_tensor).extend(here)  # the old plan goes on


@pytest.mark.parametrize("move", MOVES)
def test_memory_that_moves_between_calls(move):
    params, main, (aux,) = problem(1, seed=0, shapes=[(7, 5), (), (301,)])
    gp.gradprom_(params, main, aux, **SETTINGS)
    for t in (*params, *main, *aux):
        move(t)
        expected = [p.clone() for p in params]
        gp.gradprom_(expected, main, aux, **{**SETTINGS, "backend": "reference"})
        gp.gradprom_(params, main, aux, **SETTINGS)
        for a, b in zip(params, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_negative_bit_that_comes_without_moving():
    """The same objects, the same memory, the opposite values."""
    params, main, (aux,) = problem(1, seed=0, shapes=[(7, 5), (3,)])
    before = float(gp.gradient_stats(main, aux, backend="cpu").cosine)
    for g in main:
        address = g.data_ptr()
        g.data = torch._neg_view(g.data)
        assert g.data_ptr() == address
    assert float(gp.gradient_stats(main, aux, backend="cpu").cosine) == pytest.approx(-before)
    gp.gradprom_(params, main, aux, **SETTINGS)
    params[1].data = torch._neg_view(params[1].data)
    with pytest.raises(TypeError, match=r"params\[1\] is a lazily negated view"):
        gp.gradprom_(params, main, aux, **SETTINGS)


def test_addresses_and_identities_that_are_used_again():
    """Tensors die and others take their place in memory, in another type of the same size."""
    identities, addresses, again = set(), set(), [0, 0]
    for case in range(40):
        dtype = [torch.float32, torch.bfloat16, torch.float64][case % 3]
        shape = {torch.float32: (6, 4), torch.bfloat16: (12, 4), torch.float64: (3, 4)}[dtype]
        params, main, aux = ([torch.full(shape, v, dtype=dtype) for _ in range(2)] for v in (1.0, 2.0, 1.0))
        again[0] += id(params[0]) in identities
        again[1] += params[0].data_ptr() in addresses
        identities.add(id(params[0]))
        addresses.add(params[0].data_ptr())
        gp.gradprom_(params, main, aux, lr=0.25, backend="cpu")
        assert all(p.unique().tolist() == [0.25] for p in params)
        del params, main, aux
    assert min(again) > 0, "this test did not test what it is about"


@pytest.mark.parametrize("outcome", ["step", "measure", "error"])
def test_no_tensor_is_kept_alive(outcome):
    params, main, (aux,) = problem(1, seed=0, shapes=[(5, 3), (7,)])
    lr, aux_weight = torch.tensor(0.5), torch.tensor(0.7)
    main[1] = torch._neg_view(main[1])
    everything = [*params, *main, *aux, lr, aux_weight]
    watched = [weakref.ref(t) for t in everything]
    storages = [weakref.ref(t.untyped_storage()) for t in everything]
    if outcome == "step":
        gp.gradprom_(params, main, aux, lr=lr, aux_weight=aux_weight, backend="cpu")
    elif outcome == "measure":
        gp.gradient_stats(main, aux, aux_weight=aux_weight, backend="cpu")
    else:
        gp.gradprom_(params, main, aux, lr=lr, aux_weight=aux_weight, backend="cpu")
        with pytest.raises(ValueError, match="has shape"):
            gp.gradprom_(params, main, [aux[0], torch.ones(8)], lr=lr, aux_weight=aux_weight, backend="cpu")
    assert outcome == "error" or len(kept(2)) == 1
    del params, main, aux, lr, aux_weight, everything
    gc.collect()
    assert [w() for w in watched] == [None] * len(watched)
    assert [s() for s in storages] == [None] * len(storages)


def test_how_many_are_kept():
    for tensors in range(1, 40):
        one = [torch.ones(2)] * tensors
        gp.gradient_stats(one, one, backend="cpu")
    info = _stateless._kept.cache_info()
    assert info.currsize == info.maxsize == 16
    assert [len(kept(n)) for n in range(30, 40)] == [1] * 10


def test_threads_and_calls_within_calls():
    """Each has a plan of its own for as long as it steps."""

    class Curious(gp.GatePolicy):
        def __call__(self, gram, aux_weight):
            inner = [torch.ones(3), torch.ones(2, 2)]
            assert float(gp.gradient_stats(inner, inner, backend="cpu").cosine) == pytest.approx(1.0)
            return torch.ones_like(gram[..., 0, 0]), torch.ones_like(gram[..., 0, 1:])

    problems = [problem(1, seed=seed, shapes=[(40, 5), (900,)]) for seed in range(4)]
    expected = []
    for params, main, aux in problems:
        alone = [p.clone() for p in params]
        for _ in range(30):
            gp.gradprom_(alone, main, aux, lr=1e-3, gate="always", backend="cpu")
        expected.append(alone)
    failures = []

    def work(number):
        params, main, aux = problems[number]
        try:
            for i in range(30):
                gate = Curious() if i % 10 == 5 else "always"
                gp.gradprom_(params, main, aux, lr=1e-3, gate=gate, backend="cpu")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    for (params, _, _), alone in zip(problems, expected, strict=True):
        for a, b in zip(params, alone, strict=True):
            torch.testing.assert_close(a, b)
    assert 1 <= len(kept(2)) <= 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_goes_on_with_them():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        params, main, (aux,) = problem(1, seed=0, shapes=[(5, 3), (7,)])
        expected = step_by_a_new_plan(params, main, aux)
        assert len(kept(2)) == 1
        child = os.fork()
        if child == 0:
            status = 1
            try:
                stats = gp.gradprom_(params, main, aux, **SETTINGS)
                status = 0 if [bits(t) for t in (*params, stats.packed)] == [bits(t) for t in expected] else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_measuring_says_what_a_step_would(gate, granularity):
    """Bit for bit, where parameters and gradients have one layout: both are decided by the same code."""
    params, main, aux = problem(2, seed=3, shapes=[(5, 3), (7,), (2, 3, 4)])
    settings = {"gate": gate, "granularity": granularity, "aux_cap": 0.8, "max_grad_norm": 1.0, "backend": "cpu"}
    measured = gp.gradient_stats(main, aux, **settings).packed
    by_definition = gp.gradient_stats(main, aux, **{**settings, "backend": "reference"}).packed
    stepped = gp.gradprom_(params, main, aux, lr=0.1, **settings).packed
    torch.testing.assert_close(measured, by_definition, rtol=1e-12, atol=1e-12)
    assert bits(measured) == bits(stepped)


@pytest.mark.parametrize("case", GRADIENTS)
def test_bad_gradients_of_a_kept_plan(case):
    """No check in Python stands before it."""
    main, aux, error, message = GRADIENTS[case]
    params = [torch.randn(4), torch.randn(4)]
    good = [torch.ones(4)] * 2
    gp.gradprom_(params, good, [good, good] if case == "one of several" else good, backend="cpu")
    before = [bits(p) for p in params]
    with pytest.raises(error, match=re.escape(message)):
        gp.gradprom_(params, main, aux, backend="cpu")
    assert before == [bits(p) for p in params]
    gp.gradprom_(params, good, good, backend="cpu")
    assert before != [bits(p) for p in params], "and the next call is as if nothing had been"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("where", ["params", "main_grads", "aux_grads"])
@pytest.mark.parametrize("kind", PHANTOMS)
def test_tensors_without_memory_and_a_kept_plan(kind, where):
    make, message = PHANTOMS[kind]
    if where == "params" and kind == "meta":
        message = r"main_grads\[1\] is on cpu, but params\[1\] is on meta"
    message = message.replace("main_grads", where) if where != "params" or kind != "meta" else message
    params, main, aux = ([torch.ones(3), torch.ones(3)] for _ in range(3))
    gp.gradprom_(params, main, aux, backend="cpu", lr=0.0)
    {"params": params, "main_grads": main, "aux_grads": aux}[where][1] = make()
    with pytest.raises((TypeError, ValueError), match=message):
        gp.gradprom_(params, main, aux, gate="always", lr=0.5, backend="cpu")
    assert params[0].tolist() == [1.0] * 3


@pytest.mark.parametrize("lazy", LAZY)
def test_a_lazily_negated_parameter_and_a_kept_plan(lazy):
    params, main, aux = ([torch.ones(3), torch.ones(3)] for _ in range(3))
    gp.gradprom_(params, main, aux, backend="cpu", lr=0.0)
    params[1] = lazy(torch.ones(3))
    with pytest.raises(TypeError, match=r"params\[1\] is a lazily negated view"):
        gp.gradprom_(params, main, aux, backend="cpu", lr=0.5)
    assert params[0].tolist() == [1.0] * 3
