"""A backend that is wrong on a device is not used there: kernels broken on purpose (broken.py), what becomes of a
verdict, and what a check must leave alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import gradprom_ext as gp
from gradprom_ext import _torch, backends, doctor, self_check
from gradprom_ext.plan import PlanBase, PlanSpec
from gradprom_ext.self_check import Needs, Record

from . import broken, targets

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SGD = Needs("sgd", False, 1, False, "hard", frozenset({torch.float32}))
ALL = frozenset(self_check.TOLERANCE)


@pytest.fixture(autouse=True)
def nothing_is_known(tmp_path, monkeypatch):
    """An empty cache on disk, and nothing in this process."""
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRADPROM_SELF_CHECK", raising=False)
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(backends, "_proven", {})
    monkeypatch.setattr(backends, "_warned", set())


def wrong(backend: backends.Backend, needs: Needs, elements: int = 33_003) -> list[str]:
    with targets.quick_interpreter():
        return [str(row) for row in self_check.examine(backend, CPU, needs, elements) if row.wrong]


# ----------------------------------------------------------------------------------------------------------------------
# What is caught


@pytest.mark.parametrize(
    "needs",
    [
        SGD._replace(dtypes=ALL),
        SGD._replace(rule="adam", master_weights=True, num_aux=2, per_tensor=True, gate="soft", dtypes=ALL),
        SGD._replace(rule="adam", gate=None),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", ["cpu", "cuda-on-host", "triton-interpreter"])
def test_what_is_right_passes(target, needs):
    if target == "triton-interpreter":
        needs = needs._replace(dtypes=frozenset({torch.bfloat16}))  # a kernel for each type
    with targets.running(target) as backend:
        assert wrong(backends.CpuBackend() if target == "cpu" else backend, needs) == []


CAUGHT = {
    broken.CudaWrongSum: "statistics of step 1 off by",
    broken.CudaNoGridBarrier: "statistics of step 1 off by",
    broken.CudaNoBlockBarrier: "statistics of step 1 off by",
    broken.CudaWrongDtype: "statistics of step 1 off by",
    broken.CudaStaleTable: "inner products of step 2 off by",
    broken.TritonWrongSum: "statistics of step 1 off by",
    broken.TritonNoBarrier: "statistics of step 1 off by",
    broken.TritonWrongDtype: "statistics of step 1 off by",
    broken.TritonCutsOff: "bfloat16 parameters and states in the mean off by",
    broken.TritonStaleTable: "statistics of step 2 off by",
}


@pytest.mark.parametrize("kind", CAUGHT, ids=lambda kind: kind.__name__)
def test_what_is_broken_is_caught(kind):
    dtype = {broken.CudaWrongDtype: torch.float16, broken.TritonCutsOff: torch.bfloat16}.get(kind, torch.float32)
    found = wrong(kind(), SGD._replace(dtypes=frozenset({dtype})))
    assert found[0].startswith(CAUGHT[kind])


class Scribbler(backends.CpuBackend):
    """Writes one element beside a parameter."""

    def plan(self, spec: PlanSpec) -> PlanBase:
        class Plan(broken.Around):
            def step(self, request):
                param = self.spec.params[1]
                param.as_strided((1,), (1,), param.storage_offset() + param.numel()).fill_(0.0)
                return super().step(request)

        return Plan(super().plan(spec))


class Updates(backends.CpuBackend):
    """Takes the step in spite of a NaN, with zeros in its place."""

    def plan(self, spec: PlanSpec) -> PlanBase:
        class Plan(broken.Around):
            def bind_gradients(self, main, aux):
                self.kept = [[None if g is None else g.nan_to_num() for g in gs] for gs in (main, *aux)]
                super().bind_gradients(self.kept[0], self.kept[1:])

        return Plan(super().plan(spec))


class Forgets(backends.CpuBackend):
    """Does not see that states have moved."""

    def plan(self, spec: PlanSpec) -> PlanBase:
        class Plan(broken.Around):
            seen = None

            def step(self, request):
                # The memory of the first step, in the place of today's.
                self.seen = self.seen or [{k: t.detach() for k, t in s.items()} for s in self.spec.states]
                for state, old in zip(self.spec.states, self.seen, strict=True):
                    for name in state:
                        state[name], old[name] = old[name], state[name]
                self.inner.missing_states(request.hypers)
                out = super().step(request)
                for state, old in zip(self.spec.states, self.seen, strict=True):
                    for name in state:
                        state[name], old[name] = old[name], state[name]
                return out

        return Plan(super().plan(spec))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Scribbler, "float32 parameters and states off by 0.88"),
        (Updates, "the flag of a step with NaN off by 1"),
        (Forgets, "float32 parameters and states off by"),
    ],
)
def test_other_faults(kind, said):
    if "cpu" not in gp.available_backends():
        pytest.skip("the compiled module is not built")
    assert said in "; ".join(wrong(kind(), SGD))


# ----------------------------------------------------------------------------------------------------------------------
# The long form


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> dict[str, list[doctor.Finding]]:
    """What the doctor finds of several backends, each in a process of its own, side by side."""
    targets.cuda_on_host()
    targets.interpreted()
    names = ["cpu", *(f"tests.gradprom_ext.broken:{n}" for n in ("CudaEndless", "TritonEndless", "Dies"))]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(names)) as pool:
        patch.setenv("GRADPROM_CACHE", str(tmp_path_factory.mktemp("apart")))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        found = pool.map(lambda name: doctor.examine_apart(name, CPU, 5.0 if "Endless" in name else 600.0), names)
        return dict(zip((name.rpartition(":")[2] for name in names), found, strict=True))


def test_the_long_form_goes_through_all(apart):
    found = apart["cpu"]
    assert [f.fault for f in found] == [None] * len(found)
    said = " ".join(f.what for f in found)
    for word in (
        *gp.policy.GATES,
        "own",
        *self_check.RULES,
        "masters",
        "1 aux",
        "2 aux",
        "4 aux",
        "a cosine per tensor",
    ):
        assert word in said
    assert all(str(dtype).removeprefix("torch.") in said for dtype in self_check.TOLERANCE)
    assert "float16 parameters and states" in doctor.table(found)


@pytest.mark.parametrize("kind", ["CudaEndless", "TritonEndless"])
def test_a_hang_is_a_sentence(apart, kind):
    last = apart[kind][-1]
    assert last.fault.startswith("did not finish within 5 s")
    assert "wrong" in doctor.table(apart[kind])


def test_a_dead_process_is_a_sentence(apart):
    (found,) = apart["Dies"]
    assert found.fault.startswith("the process ended with status -6, SIGABRT")
    assert found.what.startswith("sgd, 1 aux, hard gate, one cosine, float64")


def test_the_doctor_ends_with_status_1_where_something_is_wrong(monkeypatch, capsys):
    row = self_check.Row("inner products of step 1", 0.5, 1e-11)
    for fault in (None, str(row)):
        findings = [doctor.Finding("cpu", "cpu", "sgd", fault, row)]
        monkeypatch.setattr(doctor, "examine_apart", lambda name, device, limit, findings=findings: findings)
        assert doctor.main(["--check", "--backend", "cpu"]) == int(fault is not None)
    said = capsys.readouterr().out
    assert "all 1 agree with the reference" in said
    assert "1 of 1 are wrong: please report" in said
    assert doctor.main(["--check", "--backend", "reference"]) == 1
    assert "nothing to compare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--check", "--backend", "cpv"], "unknown backend 'cpv'"),
        (["--check", "--backend", "tests.nowhere:Mine"], "--backend tests.nowhere:Mine: there is no such class"),
        (["--backend", "cpu"], "--backend and --device are for --check"),
    ],
)
def test_what_the_doctor_is_asked_for_and_does_not_have(arguments, said, capsys):
    with pytest.raises(SystemExit):
        doctor.main(arguments)
    assert said in capsys.readouterr().err


def test_what_the_long_form_finds_is_known_to_auto(monkeypatch):
    monkeypatch.setattr(self_check, "long_form", lambda device: [(SGD, 3_000)])
    monkeypatch.setattr(self_check, "examine", lambda *_: [self_check.Row("a sum", 1.0, 0.0)])
    assert [f.fault for f in doctor.examine_here("cpu", CPU)] == ["a sum off by 1, where 0 is allowed"]
    assert self_check.fault(backends.BACKENDS[1], CPU, SGD) == "a sum off by 1, where 0 is allowed"
    monkeypatch.setattr(self_check, "examine", lambda *_: [self_check.Row("a sum", 0.0, 0.0)])
    monkeypatch.setattr(self_check, "_known", {})
    assert [f.fault for f in doctor.examine_here("cpu", CPU)] == [None]
    assert self_check.fault(backends.BACKENDS[1], CPU, SGD) is None


# ----------------------------------------------------------------------------------------------------------------------
# What becomes of a verdict


class Suspect(backends.CpuBackend):
    """A backend before all others, which fails for what it is told to."""

    name = "suspect"

    def __init__(self, fails=lambda needs: True) -> None:
        self.fails, self.examined = fails, []

    def missing(self) -> str | None:
        return None

    def identity(self) -> str:
        return "1"


@pytest.fixture
def suspect(monkeypatch) -> Suspect:
    if "cpu" not in gp.available_backends():
        pytest.skip("the compiled module is not built")
    suspect = Suspect()
    examine = self_check.examine

    def examined(backend, device, needs, elements=None):
        if backend is not suspect:
            return examine(backend, device, needs, elements)
        suspect.examined.append(needs)
        return [self_check.Row("a sum", 0.5 if suspect.fails(needs) else 0.0, 0.25)]

    monkeypatch.setattr(self_check, "examine", examined)
    monkeypatch.setattr(backends, "BACKENDS", (suspect, *backends.BACKENDS))
    return suspect


def optimizer(dtype=torch.float32, kind=gp.GradPromSGD, **kwargs):
    return kind([torch.nn.Parameter(torch.ones(3, dtype=dtype))], lr=0.1, **kwargs)


def step(opt) -> None:
    y = opt.param_groups[0]["params"][0].sum()
    opt.backward(y, y * 2)
    opt.step()
    opt.zero_grad()


def test_auto_takes_the_next_one_and_warns_once(suspect):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            opt = optimizer()
            step(opt)
            assert opt.backend == "cpu"
    (message,) = [str(w.message) for w in caught]
    assert message == (
        "gradprom_ext runs cpu on cpu, because the self-check of what comes before it failed (sgd, 1 aux, hard gate, "
        "one cosine, float32): suspect: a sum off by 0.5, where 0.25 is allowed. Please report the output of `python "
        "-m gradprom_ext.doctor --check`"
    )
    assert suspect.examined == [SGD]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer(gate="soft").backend == "cpu"  # another kind of plan, the same news


def test_where_nothing_else_is_left_there_is_one_warning_too(suspect, monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", (suspect, backends.ReferenceBackend()))
    with pytest.warns(UserWarning, match="runs its slow reference on cpu, because .* suspect: a sum off") as caught:
        assert optimizer().backend == "reference"
    assert len(caught) == 1


def test_only_what_a_plan_needs_is_asked_for(suspect):
    suspect.fails = lambda needs: torch.bfloat16 in needs.dtypes
    assert optimizer().backend == "suspect"
    with pytest.warns(UserWarning, match=r"bfloat16\): suspect"):
        assert optimizer(torch.bfloat16).backend == "cpu"
    assert optimizer(kind=gp.GradPromAdamW, gate="soft", granularity="tensor").backend == "suspect"
    assert suspect.examined == [
        SGD,
        SGD._replace(dtypes=frozenset({torch.bfloat16})),
        SGD._replace(rule="adam", gate="soft", per_tensor=True),
    ]


def test_a_backend_that_was_asked_for_by_name_is_refused(suspect):
    with pytest.raises(RuntimeError, match=r"backend 'suspect' failed its self-check on cpu .*: a sum off by 0\.5"):
        step(optimizer(backend="suspect"))
    step(optimizer(backend=suspect))  # an object is its owner's affair
    assert suspect.examined == [SGD]


def test_it_can_be_switched_off(suspect, monkeypatch):
    monkeypatch.setenv("GRADPROM_SELF_CHECK", "off")
    assert optimizer().backend == "suspect"
    assert suspect.examined == []
    assert "off (GRADPROM_SELF_CHECK)" in doctor.report()


def test_the_reference_has_nothing_to_prove(monkeypatch):
    monkeypatch.setattr(self_check, "examine", None)
    assert optimizer(backend="reference").backend == "reference"


def test_the_first_step_checks_the_real_kernels(monkeypatch):
    if "cpu" not in gp.available_backends():
        pytest.skip("the compiled module is not built")
    step(optimizer())
    (record,) = self_check.cache_folder().glob("*.json")
    assert json.loads(record.read_text())["faults"] == {str(SGD): None}
    monkeypatch.setattr(self_check, "examine", None)  # later steps and optimizers need it no more
    step(optimizer())


# ----------------------------------------------------------------------------------------------------------------------
# What is remembered


def forget(monkeypatch) -> None:
    """As in the next process."""
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(backends, "_proven", {})
    monkeypatch.setattr(backends, "_warned", set())


def test_another_process_knows(suspect, monkeypatch):
    for _ in range(2):
        forget(monkeypatch)
        with pytest.warns(UserWarning, match="suspect: a sum off"):
            assert optimizer().backend == "cpu"
    assert len(suspect.examined) == 1


@pytest.mark.parametrize("change", ["kernels", "device", "version"])
def test_what_has_changed_is_checked_again(suspect, monkeypatch, change):
    suspect.fails = lambda needs: False
    assert optimizer().backend == "suspect"
    if change == "kernels":
        monkeypatch.setattr(suspect, "identity", lambda: "2")
    elif change == "device":
        monkeypatch.setattr(self_check, "_device_identity", lambda device: {"driver": "580.1"})
    else:
        monkeypatch.setattr(self_check, "__version__", "0.2")
    forget(monkeypatch)
    assert optimizer().backend == "suspect"
    assert len(suspect.examined) == 2


def test_builds_of_a_file_are_told_apart(tmp_path):
    file = tmp_path / "_C.so"
    file.write_bytes(b"one")
    first = self_check.file_identity(str(file))
    file.write_bytes(b"two")
    self_check.file_identity.cache_clear()
    assert self_check.file_identity(str(file)) != first


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"about": 1}', b'{"about": null, "faults": {}}', b"[" * 100_000, b"null"],
    ids=lambda content: repr(content[:12]),
)
def test_a_damaged_record_is_none(suspect, monkeypatch, content):
    suspect.fails = lambda needs: False
    record = Record(suspect, CPU)
    record.path.parent.mkdir(parents=True)
    record.path.write_bytes(content)
    assert optimizer().backend == "suspect"
    assert Record(suspect, CPU).read() == {str(SGD): None}


def test_a_record_of_something_else_is_none(suspect):
    """Two that share a file's name, or one that was copied there."""
    record = Record(suspect, CPU)
    record.write({str(SGD): "a fault"})
    other = json.loads(record.path.read_text())
    other["about"]["kernels"] = "another build"
    record.path.write_text(json.dumps(other))
    assert record.read() == {}


def test_no_folder_to_write_to_is_no_error(suspect, monkeypatch, tmp_path):
    suspect.fails = lambda needs: False
    file = tmp_path / "file"
    file.write_text("")
    for place in (str(file), "/proc/nowhere", "~nobody-of-that-name/cache"):
        monkeypatch.setenv("GRADPROM_CACHE", place)
        forget(monkeypatch)
        assert optimizer().backend == "suspect"
    assert file.read_text() == ""


def test_where_records_lie(monkeypatch, tmp_path):
    assert self_check.cache_folder() == tmp_path / "cache" / "self-check"
    monkeypatch.delenv("GRADPROM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert self_check.cache_folder() == tmp_path / "xdg" / "gradprom_ext" / "self-check"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # is to be ignored, says the specification
    monkeypatch.setenv("HOME", str(tmp_path))
    assert self_check.cache_folder() == tmp_path / ".cache" / "gradprom_ext" / "self-check"


def _write_often(record: Record, number: int) -> None:
    for i in range(25):
        record.write({f"needs {number}": "x" * (10 * i)})


def test_many_processes_may_write_at_once(suspect):
    record = Record(suspect, CPU)
    record.write({"at first": None})
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(record, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        found = record.read()
        assert len(found) == 1, "a file that was not whole"
        seen += 1
    assert seen
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert [path.name for path in record.path.parent.iterdir()] == [record.path.name]


# ----------------------------------------------------------------------------------------------------------------------
# What a check leaves alone


def test_nothing_is_checked_during_a_capture(suspect, monkeypatch):
    monkeypatch.setattr(self_check, "is_capturing", lambda: True)
    monkeypatch.setattr(backends, "is_capturing", lambda: True)
    assert optimizer().backend == "suspect"
    assert suspect.examined == []
    monkeypatch.setattr(self_check, "is_capturing", lambda: False)
    monkeypatch.setattr(backends, "is_capturing", lambda: False)
    with pytest.warns(UserWarning, match="suspect: a sum off"):
        assert optimizer().backend == "cpu"
    forget(monkeypatch)
    monkeypatch.setattr(self_check, "is_capturing", lambda: True)
    with pytest.warns(UserWarning, match="suspect: a sum off"):  # what is known counts
        assert optimizer().backend == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_gpu_is_asked_without_a_synchronization(name):
    """The caller may have forbidden those, and what it has enqueued comes first."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no NVIDIA GPU here")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = backends.explain(device)[name]
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    backend = next(b for b in backends.BACKENDS if b.name == name)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            _torch.keep_busy(100_000_000)
            assert self_check.fault(backend, device, SGD) is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert Record(backend, device).read() == {str(SGD): None}


@pytest.mark.gpu
def test_a_first_step_in_a_capture_is_checked_later():
    """Plain SGD has no state that would be created there, so nothing else refuses it."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no NVIDIA GPU here")
    p = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    gp.gradprom_([torch.ones(3, device="cuda")], [torch.ones(3, device="cuda")], [torch.ones(3, device="cuda")])
    opt = gp.GradPromSGD([p], lr=0.5)
    p.grad, opt.aux_grads = torch.ones_like(p), [[torch.ones_like(p)]]
    self_check._known.clear()
    backends._proven.clear()
    for record in self_check.cache_folder().glob("*.json"):
        record.unlink()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    assert not self_check._known
    graph.replay()
    assert p.tolist() == [0.0] * 1000
    assert gp.GradPromSGD([p], lr=0.5).backend == opt.backend
    assert list(self_check._known.values()) == [None]


@pytest.mark.parametrize("mode", ["inference", "fake", "autocast", "meta", "vmap"])
def test_modes_of_the_caller_do_not_reach_it(mode):
    if "cpu" not in gp.available_backends():
        pytest.skip("the compiled module is not built")
    found = []

    def ask(x=None):
        found.append(self_check.fault(backends.CpuBackend(), CPU, SGD))
        return x

    if mode == "inference":
        with torch.inference_mode():
            ask()
    elif mode == "fake":
        with FakeTensorMode():
            ask()
    elif mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            ask()
    elif mode == "meta":
        with torch.device("meta"):
            ask()
    else:
        torch.vmap(ask)(torch.ones(2))
    assert found == [None]
    assert Record(backends.CpuBackend(), CPU).read() == {str(SGD): None}


def test_random_numbers_of_the_caller_are_its_own():
    if "cpu" not in gp.available_backends():
        pytest.skip("the compiled module is not built")
    before = torch.get_rng_state()
    assert self_check.fault(backends.CpuBackend(), CPU, SGD) is None
    assert torch.equal(torch.get_rng_state(), before)


class Stuck(backends.CpuBackend):
    released = threading.Event()

    def plan(self, spec: PlanSpec) -> PlanBase:
        self.released.wait()
        raise RuntimeError("released")


def test_what_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(self_check, "LIMIT", 0.2)
    try:
        assert self_check.fault(Stuck(), CPU, SGD) == "it did not finish within 0 s"
    finally:
        Stuck.released.set()


def test_too_little_memory_says_nothing_about_kernels():
    class Full(backends.CpuBackend):
        def plan(self, spec: PlanSpec) -> PlanBase:
            raise torch.OutOfMemoryError("CUDA out of memory")

    full = Full()
    assert self_check.fault(full, CPU, SGD) is None
    assert Record(full, CPU).read() == {}


def test_a_device_that_is_lost_is_an_error_that_the_next_process_knows_of(suspect, monkeypatch):
    """As after an illegal address: nothing can be launched any more, on any backend."""
    monkeypatch.setattr(self_check, "is_alive", lambda device: False)
    with pytest.raises(RuntimeError, match=r"'suspect' failed its self-check on cpu .* Start again"):
        optimizer().backend  # noqa: B018
    forget(monkeypatch)
    with pytest.warns(UserWarning, match="suspect: a sum off"):
        assert optimizer().backend == "cpu"


FORKED = """
import multiprocessing, torch, gradprom_ext as gp
opt = gp.GradPromSGD([torch.nn.Parameter(torch.empty(300_000))], lr=0.1)
assert opt.backend == "cpu"
def step():
    opt.param_groups[0]["params"][0].grad = torch.empty(300_000)
    opt.aux_grads = [[torch.empty(300_000)]]
    opt.step()
child = multiprocessing.get_context("fork").Process(target=step, daemon=True)
child.start()
child.join(60)
print(child.exitcode)
"""


def test_a_forked_process_goes_on():
    """A process forked from one whose main thread has used OpenMP hangs in its first parallel region; a check in the
    main thread would do that to every optimizer that is made before a fork."""
    if "cpu" not in gp.available_backends():
        pytest.skip("the compiled module is not built")
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", FORKED], env=env, capture_output=True, text=True, check=False)
    assert run.stdout == "0\n", run.stderr
