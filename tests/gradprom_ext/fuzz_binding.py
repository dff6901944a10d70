"""Attacks the compiled module: wrong objects, tensors that are freed, shrunk, resized and swapped between two calls,
lists that change while they are read, several threads. Everything may be refused; nothing may end the process.

Run in a process of its own, since that is what a mistake costs: by tests/gradprom_ext/test_fuzz.py, in CI under
AddressSanitizer (.ci/sanitize), and by hand::

    python -m tests.gradprom_ext.fuzz_binding --seed 7 --cases 1000
    python -m tests.gradprom_ext.fuzz_binding --module cuda-on-host
    python -m tests.gradprom_ext.fuzz_binding --coverage -max_total_time=600   # guided by coverage: needs atheris

The number of a case is printed before it begins, so that the last one printed is the one to look at:
``--seed 7 --first 381 --cases 1`` repeats it. What is not attacked: memory that another thread frees *while* a kernel
works on it. PyTorch's own operations end the process there too.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


class Choices:
    """What a case is made of: random numbers, or the bytes that a fuzzer hands over."""

    def __init__(self, source: random.Random | bytes) -> None:
        self._random = source if isinstance(source, random.Random) else None
        self._bytes = iter(source if isinstance(source, bytes) else b"")

    def below(self, n: int) -> int:
        return self._random.randrange(n) if self._random is not None else next(self._bytes, 0) % n

    def of(self, items: Any) -> Any:
        return items[self.below(len(items))]

    def one_in(self, n: int) -> bool:
        return self.below(n) == n - 1


# Wrong objects -------------------------------------------------------------------------------------------------------


class Evil(torch.Tensor):
    """A subclass whose attributes change the list that it is in."""

    victims: ClassVar[list[Any]] = []

    @property
    def grad(self) -> Any:
        for victim in self.victims:
            victim.clear()
        return None


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, (3,))

    def __init__(self) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


class Liar:
    """Says that it is a tensor."""

    __class__ = torch.Tensor  # type: ignore[assignment]
    shape, dtype, grad = (3,), torch.float32, None

    def stride(self) -> tuple[int, ...]:
        return (1 << 60,)

    def data_ptr(self) -> int:
        return 8


def freed() -> torch.Tensor:
    t = torch.ones(64)
    t.untyped_storage().resize_(0)
    return t


def shrunk() -> torch.Tensor:
    t = torch.ones(4096)
    t.untyped_storage().resize_(8)
    return t


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(3)


WRONG: list[Callable[[], Any]] = [
    lambda: None, lambda: 1, lambda: -1, lambda: 2**70, lambda: 0.5, lambda: float("nan"), lambda: "x", lambda: b"",
    list, lambda: [None], lambda: (), dict, lambda: object(), lambda: torch.Tensor, lambda: np.ones(3),
    lambda: iter([]), lambda: range(3), Liar, Wrapper, fake, freed, shrunk,
    lambda: Evil([1.0]), lambda: torch.ones(3, dtype=torch.int64), lambda: torch.ones(3, dtype=torch.complex64),
    lambda: torch.ones(3, device="meta"), lambda: torch.ones(3).to_sparse(), lambda: torch.ones(1).expand(7, 5),
    lambda: torch._neg_view(torch.ones(3)), lambda: torch._efficientzerotensor((3,)), lambda: torch.empty(0),
    lambda: torch.ones((1,) * 20), lambda: torch.empty(0, 3).expand(5, 0, 3),
]  # fmt: skip

SHAPES: list[tuple[int, ...]] = [(3,), (7, 5), (), (0,), (4096,), (2, 1, 3)]
TYPES = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]


def tensor(c: Choices, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    return torch.rand(c.of(SHAPES) if shape is None else shape).to(c.of(TYPES))


# What happens to good ones -------------------------------------------------------------------------------------------


def can_be_resized(t: torch.Tensor) -> bool:
    """PyTorch itself ends the process where shared memory is resized, or a zero tensor (2.13)."""
    return not (t.is_shared() or t._is_zerotensor())


def mutate(c: Choices, t: Any) -> None:
    """Does something to a tensor that stays the same object."""
    if not isinstance(t, torch.Tensor):
        return
    with torch.no_grad():
        way = c.below(10)
        if way == 0:
            t.data = tensor(c, tuple(t.shape))
        elif way == 1:
            t.data = tensor(c)
        elif way == 2 and can_be_resized(t):
            t.untyped_storage().resize_(c.of([0, 1, 8, 16384]))
        elif way == 3 and can_be_resized(t):
            t.resize_(c.of(SHAPES))
        elif way == 4:
            t.set_(tensor(c).to(t.dtype))
        elif way == 5:
            torch.utils.swap_tensors(t, tensor(c))
        elif way == 6:
            t.data = torch.ones(1, dtype=t.dtype).expand(t.shape)
        elif way == 7:
            t.data = torch._neg_view(t.data)
        elif way == 8 and t.ndim > 1:
            t.data = t.data.transpose(0, -1)
        elif not t._is_zerotensor():  # PyTorch ends the process there, too
            t.share_memory_()


class Case:
    """One plan, and all that goes with it; any of it may be wrong."""

    def __init__(self, c: Choices, module: Any) -> None:
        self.c, self.m = c, module
        self.num_aux = c.below(module.MAX_AUX + 1)
        shapes = [c.of(SHAPES) for _ in range(1 + c.below(4))]
        self.params = [tensor(c, s) for s in shapes]
        self.grads = [[None if c.one_in(6) else tensor(c, s) for s in shapes] for _ in range(self.num_aux + 1)]
        self.states: list[Any] = [{} for _ in shapes]
        self.groups: list[Any] = [c.below(2) for _ in shapes]
        self.lr: Any = torch.tensor(0.1) if c.one_in(4) else 0.1
        self.aux_weight: Any = torch.ones(self.num_aux) if c.one_in(3) else (0.5,) * self.num_aux
        self.rule = c.of([module.Rule.sgd, module.Rule.adam])
        self.stats = torch.empty(module.STATS_HEADER + 8 * module.stats_row_size(self.num_aux), dtype=torch.float64)
        self.skipped = torch.zeros((), dtype=torch.float64)
        self.plan: Any = None

    def bad(self, good: Any) -> Any:
        """The good argument, or a wrong one instead of it or of a part of it."""
        if not self.c.one_in(12):
            return good
        if isinstance(good, list) and good and self.c.one_in(2):
            copy = list(good)
            copy[self.c.below(len(copy))] = self.c.of(WRONG)()
            return copy if self.c.one_in(2) else copy[:-1]
        return self.c.of(WRONG)()

    def hypers(self) -> Any:
        numbers = {"momentum": self.c.of([0.0, 0.9]), "amsgrad": self.c.of([True, False])}
        groups = [self.m.Group(lr=self.bad(self.lr), **{k: self.bad(v) for k, v in numbers.items()}) for _ in range(2)]
        if self.c.one_in(20):
            groups[0] = self.m.Group.__new__(self.m.Group)  # without its constructor
        return self.bad(groups)

    def gate(self) -> Any:
        gate = self.m.Gate(self.c.below(7)) if self.c.one_in(8) else self.m.Gate.hard
        numbers = {"threshold": 0.0, "max_grad_norm": 0.0, "aux_cap": 0.5}
        return self.m.GateSettings(
            gate=self.bad(gate), aux_weight=self.bad(self.aux_weight), **{k: self.bad(v) for k, v in numbers.items()}
        )

    def make(self) -> None:
        rule = self.m.Rule(self.c.below(9)) if self.c.one_in(10) else self.rule
        options = {}
        if self.c.one_in(3):
            sizes = [0, 1, -1, -(2**31), 2**31 - 1]
            options["cuda"] = self.m.CudaOptions(
                cooperative=self.c.one_in(2), max_blocks=self.c.of(sizes), max_shared_bytes=self.c.of(sizes)
            )
        self.plan = self.m.Plan(
            rule=self.bad(rule),
            params=self.bad(self.params),
            groups=self.bad(self.groups),
            states=self.bad(self.states),
            num_aux=self.bad(self.num_aux),
            per_tensor=self.bad(self.c.one_in(2)),
            master_weights=self.bad(self.c.one_in(2)),
            **options,
        )

    def fill_states(self, missing: Any) -> None:
        for i in missing:
            for name in (*self.m.moment_names(self.rule), "master"):
                like = torch.zeros_like(self.params[i])
                self.states[i][name] = self.bad(like.float() if name == "master" else like)
            self.states[i]["step"] = self.bad(torch.tensor(1.0))

    def call(self) -> None:
        """One call of the module."""
        c, plan = self.c, self.plan
        what = c.below(15)
        if plan is None or what == 0:
            self.make()
        elif what == 1:
            plan.matches(self.bad(self.params))
        elif what in (2, 3):
            plan.bind_gradients(self.bad(self.grads[0]), self.bad(self.grads[1:]))
        elif what in (4, 5):
            self.fill_states(plan.bind_states(self.hypers()))
        elif what in (6, 7, 8):
            plan.step(self.hypers(), self.gate(), self.bad(self.stats), self.bad(self.skipped))
        elif what == 9:
            plan.gram(self.bad(self.stats))
        elif what == 10:
            plan.update(self.hypers(), self.bad(torch.ones(64, dtype=torch.float64)), self.bad(self.skipped))
        elif what == 11:
            plan.measure(self.gate(), self.bad(self.stats))
        elif what == 12:
            plan.release()
        elif what == 13:
            plan.rebind(self.bad(self.params))
        else:
            self.call_function()

    def call_function(self) -> None:
        c, m = self.c, self.m
        what = c.below(8)
        if what == 0:
            victims = [Evil([1.0]), *self.params]
            Evil.victims = [victims]
            m.grads_of(victims)
        elif what == 1:
            m.grads_of(self.bad(self.params))
        elif what == 2:
            m.same_objects(self.bad(self.params), self.bad(self.params))
        elif what == 3:
            m.tensor_path(c.of(WRONG)())
        elif what == 4:
            m.cuda_unusable(self.bad(0))
        elif what == 5:
            m.stats_row_size(self.bad(3))
        elif what == 6:
            m.moment_names(m.Rule(c.below(5)))
        else:
            plan = m.Plan.__new__(m.Plan)
            getattr(plan, c.of(["matches", "bind_states", "gram"]))([])

    def everything(self) -> list[Any]:
        states = [t for s in self.states for t in s.values()]
        return [*self.params, *(g for gs in self.grads for g in gs), *states, self.stats, self.skipped, self.lr]

    def disturb(self) -> None:
        """Something happens to what the plan was given."""
        c = self.c
        what = c.below(5)
        if what < 2:
            mutate(c, c.of(self.everything()))
        elif what == 2:
            c.of(self.grads).clear()  # the lists' tensors are freed
        elif what == 3:
            c.of(self.states).clear()
        else:
            self.grads[c.below(len(self.grads))] = [self.bad(tensor(c, tuple(p.shape))) for p in self.params]


def guarded(call: Callable[[], None]) -> None:
    """A refusal is right; an error that says that the interpreter itself was misused is not."""
    try:
        call()
    except SystemError:
        raise
    except Exception:
        return


def run_case(c: Choices, module: Any) -> None:
    case = Case(c, module)
    guarded(case.make)
    for _ in range(3 + c.below(12)):
        guarded(case.disturb if c.one_in(4) else case.call)
    if c.one_in(8):
        in_threads(case)


def in_threads(case: Case) -> None:
    """Several threads call the same plan, and drop what it was given. They do not move memory: see above."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        other = Case.__new__(Case)
        vars(other).update(vars(case), c=Choices(random.Random(seed)))
        try:
            for _ in range(20):
                guarded(other.call)
                other.plan = case.plan
                if other.c.one_in(3):
                    other.grads = [[tensor(other.c, tuple(p.shape)) for p in case.params] for _ in case.grads]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(case.c.below(256),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def fuzzed_by_coverage(module_of: Callable[[], Any], arguments: list[str]) -> None:
    """libFuzzer, in Python: https://pypi.org/project/atheris"""
    import atheris

    module = module_of()

    def one(data: bytes) -> None:
        run_case(Choices(data), module)

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description="attack the compiled module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--module", choices=("cpu", "cuda-on-host"), default="cpu")
    parser.add_argument("--coverage", action="store_true", help="guided by coverage; what follows goes to libFuzzer")
    given, rest = parser.parse_known_args()

    def module() -> Any:
        if given.module == "cpu":
            from gradprom_ext import _C

            return _C
        from . import targets

        return targets.cuda_on_host()

    torch.set_num_threads(2)
    # An argument of a wrong class is printed in pybind11's message, and PyTorch's printing of a tensor whose storage
    # was shrunk ends the process.
    torch.Tensor.__repr__ = lambda self, **_: "a tensor"  # type: ignore[method-assign, assignment]
    if given.coverage:
        fuzzed_by_coverage(module, rest)
        return
    compiled = module()
    for number in range(given.first, given.first + given.cases):
        print(f"case {number}", flush=True)
        torch.manual_seed(number)
        run_case(Choices(random.Random(f"{given.seed}/{number}")), compiled)
    print(f"{given.cases} attacks were survived", flush=True)


if __name__ == "__main__":
    main()
