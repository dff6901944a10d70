"""The Triton kernels without a GPU: their own corners in Triton's interpreter, on host memory (every test of the
library's semantics runs there too, as the target ``triton-interpreter``), and the same launches compiled for GPUs that
are not there, to see what instructions they become."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradprom_ext as gp
from gradprom_ext import backends, triton_plan

pytest.importorskip("triton", minversion="3.9", reason="needs the interpreter of triton 3.9 or later")

from . import problems, test_master_weights, test_semantics
from .problems import FLOATS, GATES, HALF, RULES, bits, make, same_bits, train
from .targets import HostTriton, interpreted, quick_interpreter

ROOT = Path(__file__).resolve().parents[2]
TRITON = HostTriton()


@pytest.fixture(autouse=True)
def _in_the_interpreter() -> Iterator[None]:
    with quick_interpreter():
        yield


#: Cuts small tensors into many chunks and rows into several turns, as large ones are cut on a GPU.
SMALL_TILING = triton_plan.Tiling(
    block=64, warps=1, shortest_chunk=128, longest_chunk=512, chunks=4, rows=4, slots=2, items=4, deciding_warps=1
)


@pytest.fixture
def small_tiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plan, "INTERPRETER_TILING", SMALL_TILING)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("case", problems.CASES)
def test_parity_over_several_steps(case):
    opt, a, other, b = problems.twins(case, TRITON, shapes=[(7, 5), (), (33,)], aux_weight=0.7)
    gates = {problems.feed(opt, a, other, b, seed=i) for i in range(8)}
    assert gates == {0.0, 1.0}, "the run must see the gate open and closed"
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", ["sgd", "sgd-nesterov", "adamw-decay-amsgrad"])
def test_masters_over_several_steps(case, dtype):
    opt, a, other, b = test_master_weights.make(case, TRITON, dtype)
    for seed in range(5):
        test_master_weights.feed(opt, a, other, b, seed)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(opt.state[p]["master"], q.detach(), rtol=2e-6, atol=2e-7)
        assert bits(p) == bits(opt.state[p]["master"].to(dtype))


LAYOUTS = {
    "contiguous": torch.clone,
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t.clone(),
    "sliced": lambda t: problems.sliced(t) if t.ndim else t.clone(),
    "misaligned": problems.misaligned,
}

TENSORS = st.tuples(
    st.lists(st.integers(1, 9), max_size=3).map(tuple) | st.tuples(st.integers(0, 700)),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(sorted(LAYOUTS)),
)


def one_step(tensors, rule, num_aux, missing, seed, backend, **kwargs):
    """Parameters, states and statistics after one step from random values."""
    g = torch.Generator().manual_seed(seed)
    params: list[torch.nn.Parameter] = []
    grads: list[list[Any]] = [[] for _ in range(1 + num_aux)]
    for shape, p_dtype, g_dtype, p_layout, g_layout in tensors:
        params.append(torch.nn.Parameter(LAYOUTS[p_layout](torch.randn(shape, generator=g).to(p_dtype))))
        for k, gs in enumerate(grads):
            value = LAYOUTS[g_layout](torch.randn(shape, generator=g).to(g_dtype if k else p_dtype))
            gs.append(value if float(torch.rand((), generator=g)) >= missing else None)
    opt = make(rule, params, lr=0.1, backend=backend, **kwargs)
    for p, grad in zip(params, grads[0], strict=True):
        p.grad = grad
    opt.aux_grads = grads[1:]
    opt.step()
    states = [opt.state[p][name] for p in params for name in sorted(opt.state[p])]
    return [p.detach() for p in params], states, [opt.stats.packed]


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.lists(TENSORS, min_size=1, max_size=6),
    rule=st.sampled_from(RULES),
    num_aux=st.integers(0, 4),
    per_tensor=st.booleans(),
    clip=st.booleans(),
    master_weights=st.booleans(),
    gate=st.sampled_from(GATES),
    missing=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_any_model_gives_what_the_reference_gives(
    tensors, rule, num_aux, per_tensor, clip, master_weights, gate, missing, seed
):
    kwargs = {
        "granularity": "tensor" if per_tensor else "global",
        "max_grad_norm": 0.5 if clip else None,
        "master_weights": master_weights,
        "gate": gate,
    }
    with mock.patch.object(triton_plan, "INTERPRETER_TILING", SMALL_TILING):
        actual = one_step(tensors, rule, num_aux, missing, seed, TRITON, **kwargs)
    expected = one_step(tensors, rule, num_aux, missing, seed, "reference", **kwargs)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-9, atol=1e-9)
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, e)


# Blocks hold 32 or 64 elements here, and chunks 128 to 512.
SHAPES = [(1701,), (1,), (3, 5), (64,), (0,), (), (129,), (511,)]


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_equal_input_gives_equal_bits(small_tiling, granularity):
    options = {"granularity": granularity, "max_grad_norm": 1.0, "missing": 0.1, "gate": "soft", "steps": 2}
    runs = [train("sgd-momentum", SHAPES, dtypes=FLOATS, num_aux=2, backend=TRITON, **options) for _ in range(2)]
    assert same_bits(*runs)


def test_the_tiling_moves_rounding_errors_only(monkeypatch):
    expected = train("adamw", SHAPES, num_aux=2, gate="soft", backend=TRITON)
    monkeypatch.setattr(triton_plan, "INTERPRETER_TILING", SMALL_TILING)
    actual = train("adamw", SHAPES, num_aux=2, gate="soft", backend=TRITON)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_hundreds_of_small_tensors(small_tiling, granularity):
    shapes = [(1 + i % 23,) for i in range(200)]
    outcomes = [train("sgd", shapes, steps=1, granularity=granularity, backend=b) for b in (TRITON, "reference")]
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 33, 127, 128, 129, 144, 1023, 1025])
def test_sizes_around_runs_blocks_and_chunks(small_tiling, n):
    test_semantics.test_sizes_around_lanes_blocks_and_chunks(TRITON, n)


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("rule", ["sgd-momentum", "adamw-decay-amsgrad"])
def test_nan_in_the_very_last_element(small_tiling, rule, granularity):
    params = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    opt = make(rule, params, granularity=granularity, backend=TRITON)

    def step(value):
        for p in params:
            p.grad = torch.randn(p.shape)
        opt.aux_grads = [[torch.randn(p.shape) for p in params]]
        opt.aux_grads[0][-1].view(-1)[-1] = value
        opt.step()
        return [bits(p) for p in params] + [bits(t) for s in opt.state.values() for t in s.values()]

    before = step(0.0)
    assert step(float("nan")) == before
    assert bool(opt.stats.skipped)
    assert step(0.0) != before
    assert {float(s["step"]) for s in opt.state.values()} == {2.0}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("n", [1, 7, 16, 33, 511])
def test_nothing_beside_a_tensor_is_written(small_tiling, n, offset, dtype):
    """Tensors as views into larger buffers, at addresses that vectors may and may not be loaded from."""
    buffers = [torch.full((n + 32,), 7.0, dtype=dtype) for _ in range(4)]
    param, main, aux, momentum = (b[8 + offset : 8 + offset + n] for b in buffers)
    for t in (main, aux):
        t.copy_(torch.randn(n))
    before, param = param.clone(), torch.nn.Parameter(param)
    opt = gp.GradPromSGD([param], lr=0.5, momentum=0.5, gate="always", backend=TRITON)
    opt.state[param] = {"step": torch.ones(()), "momentum_buffer": momentum}
    param.grad, opt.aux_grads = main, [[aux]]
    opt.step()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    buffer = 0.5 * 7.0 + (main.to(wide) + aux.to(wide))
    torch.testing.assert_close(momentum, buffer.to(dtype))
    torch.testing.assert_close(param.detach(), (before.to(wide) - 0.5 * buffer).to(dtype))
    for b in (buffers[0], buffers[3]):
        assert torch.all(b[: 8 + offset] == 7)
        assert torch.all(b[8 + offset + n :] == 7)


def negated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``0 - values``, carried by a gradient through a step into a parameter of zeros."""
    p = torch.zeros(values.shape, dtype=dtype)
    gp.gradprom_([p], [values], [None], lr=1.0, backend=TRITON)
    return p


@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", HALF)
def test_rounding_is_that_of_pytorch(dtype, source):
    """Every exponent, ties, subnormals and overflow: what a cast in PyTorch gives, bit for bit."""
    words = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    words[::2] &= 0xFFFF8000  # the tie between two bfloat16, or none
    words[1::4] &= 0xFFFFF000  # and between two float16
    values = torch.from_numpy(words.view(np.float32))
    values = torch.cat([values[values.isfinite()], torch.tensor([65519.0, 65520.0, 3.3961775e38])]).to(source)
    # A float64 just above a tie: a tie once it is a float32.
    values = torch.cat([values, torch.tensor([1 + 2**-n + 2**-40 for n in (9, 8, 12, 11)], dtype=source)])
    assert bits(negated(values, dtype)) == bits((0 - values).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_every_16_bit_number_is_read_exactly(dtype):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    assert bits(negated(values, torch.float32)) == bits(0 - values.float())


# ----------------------------------------------------------------------------------------------------------------------
# The plan


def test_launches_are_few(monkeypatch):
    """Three for a model of one kind; measure and update once more for each further kind."""
    launched = []
    for name in ("measure_kernel", "decide_kernel", "update_kernel"):
        kernel = getattr(interpreted(), name)

        def run(*args, _name=name, _run=kernel.run, **kwargs):
            launched.append(_name)
            return _run(*args, **kwargs)

        monkeypatch.setattr(kernel, "run", run)
    train("adam", [(5, 7), (3,), (40,), ()], steps=1, backend=TRITON)
    assert launched == ["measure_kernel", "decide_kernel", "update_kernel"]
    launched.clear()
    train("adam", [(8,), (8,), (8,)], dtypes=[torch.float32, torch.bfloat16], steps=1, backend=TRITON)
    assert sorted(launched) == ["decide_kernel", *["measure_kernel"] * 2, *["update_kernel"] * 2]


def test_an_absent_gradient_makes_no_kind_of_its_own():
    a, b = (0, torch.float32, None), (16, torch.bfloat16, None)
    kinds = [triton_plan.Item(0, a, None, (), 0, (main, aux)).kind() for main, aux in [(b, b), (b, None), (None, b)]]
    assert len(set(kinds)) == 1


def test_vectors_need_flat_tensors_at_multiples_of_16_bytes():
    """The interpreter would not mind."""
    for address, strides, aligned in [(32, None, True), (40, None, False), (32, (6, 2), False)]:
        odd, even = (address, torch.float32, strides), (64, torch.float32, None)
        for item in [
            triton_plan.Item(0, odd, None, (even,), 0, (even, even)),
            triton_plan.Item(0, even, odd, (even,), 0, (even, even)),
            triton_plan.Item(0, even, None, (odd,), 0, (even, even)),
            triton_plan.Item(0, even, None, (even,), 0, (even, odd)),
        ]:
            assert item.kind().aligned == aligned
            assert item.kind().strided == (strides is not None)


class FakeGpu:
    """As much of ``torch.cuda`` as deciding what to send takes; tensors of the device "meta" have no memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing = 1, False
        zeros = torch.zeros
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=self.stream))
        monkeypatch.setattr(torch, "zeros", lambda n, dtype, pin_memory: zeros(n, dtype=dtype))


def test_tables_are_sent_when_something_has_changed(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(triton_plan.Sender, "_captured", [])
    sender = triton_plan.Sender(torch.device("meta"))
    tables = np.arange(3), np.arange(4)
    first = sender.send(tables)
    assert [len(t) for t in first] == [4, 4], "tables begin at multiples of 16 bytes"
    assert sender.send((np.arange(3), np.arange(4))) is first, "equal words are not sent again"
    other = sender.send((np.arange(3), np.arange(4) + 1))
    assert other is not first
    gpu.stream = 2
    assert sender.send((np.arange(3), np.arange(4) + 1)) is not other, "another stream may be ahead of the copy"
    assert not sender._captured


def test_a_captured_graph_has_tables_of_its_own(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(triton_plan.Sender, "_captured", [])
    sender = triton_plan.Sender(torch.device("meta"))
    tables = np.arange(3), np.arange(4)
    eager = sender.send(tables)
    gpu.capturing = True
    captured = [sender.send(tables) for _ in range(2)]
    gpu.capturing = False
    assert sender.send(tables) is eager
    assert captured[0] is not eager
    assert captured[0] is not captured[1]
    assert [t.tolist() for t in sender._captured] == [[0, 1, 2, 0, 0, 1, 2, 3]] * 2, "they outlive the plan"


# ----------------------------------------------------------------------------------------------------------------------
# The backend


def test_why_it_is_not_there(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend = backends.TritonBackend()
    assert backend.missing() is None
    assert "takes tensors in host memory while TRITON_INTERPRET is set, not on cuda:0" in backend.rejects(
        torch.device("cuda:0"), 1
    )
    assert backend.rejects(torch.device("cpu"), 5) == "takes up to 4 auxiliaries, not 5"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert backend.rejects(torch.device("cpu"), 1) == "takes tensors in the memory of a GPU, not on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.missing().startswith("PyTorch finds no GPU (TRITON_INTERPRET=1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.missing() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.missing() == "triton is not installed (pip install triton)"


def test_a_faster_backend_goes_first(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gp.GradPromSGD([torch.nn.Parameter(torch.ones(2))]).backend != "triton"
    names = [backend.name for backend in backends.BACKENDS]
    assert names.index("triton") == len(names) - 2
    assert names[-1] == "reference"


def test_a_state_of_another_shape_is_refused():
    p = torch.nn.Parameter(torch.ones(4))
    opt = gp.GradPromSGD([p], lr=0.1, momentum=0.9, backend=TRITON)
    opt.state[p] = {"step": torch.ones(()), "momentum_buffer": torch.ones(5)}
    p.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"state of params\[0\]\['momentum_buffer'\] has shape \(5,\), but its param"):
        opt.step()
    opt.state[p]["momentum_buffer"] = torch.ones(4)
    opt.state[p]["step"] = torch.ones((), dtype=torch.int64)
    with pytest.raises(TypeError, match=r"state of params\[0\]\['step'\] must be a float32 tensor of no dimensions"):
        opt.step()
    assert p.tolist() == [1.0] * 4


# ----------------------------------------------------------------------------------------------------------------------
# Machine code

#: Makes a plan launch as on a GPU, where every launch compiles its kernel and stops. Prints, per case and kernel, how
#: often each access to memory stands in the PTX.
COMPILE = """
import collections, json, re, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from gradprom_ext import rules, triton_kernels, triton_plan
from gradprom_ext.plan import PlanSpec, StepRequest
from gradprom_ext.policy import HardGate

class NoGpu:
    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # kernels are kept per device

    def get_current_stream(self, device):
        return 0

compiled = {}
run = JITFunction.run
def compile_only(self, *args, warmup, **kwargs):
    compiled[self.fn.__name__] = run(self, *args, warmup=True, **kwargs)
JITFunction.run = compile_only
triton_plan.INTERPRETER_TILING = triton_plan.GPU_TILING  # the tensors are in host memory

def accesses(capability, rule, dtype):
    compiled.clear()
    driver.set_active(NoGpu(capability))
    hyper, state = rules.Hyper(lr=0.1), {}
    param, main, aux = (torch.zeros(4096, dtype=dtype) for _ in range(3))
    rule.init_state(hyper, param, state)
    plan = triton_plan.TritonPlan(triton_kernels, PlanSpec(rule, [param], [0], [state], 1, False))
    plan.bind_gradients([main], [[aux]])
    plan.step(StepRequest([hyper], HardGate(), (1.0,), None, None, torch.zeros((), dtype=torch.float64)))
    ptx = {name: kernel.asm["ptx"] for name, kernel in compiled.items()}
    return {n: collections.Counter(re.findall(r"\\b(?:ld|st)\\.[.\\w]+|\\.local\\b", text)) for n, text in ptx.items()}

masters = rules.Adam(decoupled=True, master_weights=True)
cases = {
    "fp32 SGD": (rules.SGD, torch.float32),
    "fp32 AdamW": (rules.ADAMW, torch.float32),
    "bf16 AdamW with masters": (masters, torch.bfloat16),
}
print(json.dumps([[name, accesses(c, *case)] for c in (80, 90) for name, case in cases.items()]))
"""

#: Bytes per element of the tensors that the update reads, and of those that it writes.
TRAFFIC = {
    "fp32 SGD": ([4] * 3, [4]),
    "fp32 AdamW": ([4] * 5, [4] * 3),
    "bf16 AdamW with masters": ([4] * 3 + [2] * 3, [4] * 3 + [2]),
}


def test_memory_is_accessed_16_bytes_at_a_time(tmp_path):
    """In a process of its own: in this one the language is patched for the interpreter."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert [case for case, _ in seen] == 2 * list(TRAFFIC)
    for case, kernels in seen:
        assert kernels.keys() == {"measure_kernel", "decide_kernel", "update_kernel"}
        assert not any("local" in name for accesses in kernels.values() for name in accesses), f"{case} spills"
        # A thread has 8 elements of each tensor in the update; in the measurement one vector of each gradient.
        read, written = (sum(8 * size // 16 for size in sizes) for sizes in TRAFFIC[case])
        assert kernels["measure_kernel"]["ld.global.v4.b32"] >= 2
        assert kernels["update_kernel"]["ld.global.v4.b32"] >= read
        assert kernels["update_kernel"]["st.global.v4.b32"] >= written
