"""Facts that more than one language needs: each has one home, and here the others are held against it. (Gates have
their test in test_gate.py.)"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from gradprom_ext import backends, plan, rules, stats, triton_plan

from . import targets
from .problems import CASES

RULES = {rule.name: rule for rule in (rules.SGD, rules.ADAM)}


@pytest.fixture
def module():
    module, problem = backends.extension()
    if module is None:
        pytest.skip(problem)
    return module


def test_hyper_parameters(module):
    """csrc/gradprom/update.h lists them; the keyword arguments of the binding are made from that list."""
    assert set(module.HYPER_NAMES) == {field.name for field in dataclasses.fields(rules.Hyper)}
    defaults = {f.name: f.default for f in dataclasses.fields(rules.Hyper) if f.name != "lr"}
    module.Group(lr=0.1, **defaults)
    with pytest.raises(TypeError, match="Group has no hyper-parameter 'learning_rate'"):
        module.Group(lr=0.1, learning_rate=0.1)


def test_rules_and_their_moments(module):
    assert set(module.Rule.__members__) == set(RULES)
    every = rules.Hyper(lr=0.1, momentum=0.9, amsgrad=True)
    for name, rule in RULES.items():
        assert tuple(module.moment_names(getattr(module.Rule, name))) == rule.moment_names(every)
    source = Path(triton_plan.__file__).with_name("triton_kernels.py").read_text()
    assert set(re.findall(r'\bRULE == "(\w+)"', source)) == set(RULES)
    assert {case.ours._rule.name for case in CASES.values()} == set(RULES), "a rule without a case in problems.py"


def test_layout_of_the_statistics(module):
    """csrc/gradprom/policy.h owns it."""
    assert module.STATS_HEADER == stats.HEADER
    assert all(module.stats_row_size(k) == stats.row_size(k) for k in range(plan.MAX_AUX + 1))
    with targets.quick_interpreter():
        kernels = targets.interpreted()
        header = (kernels.SKIPPED, kernels.COMBINED_NORM, kernels.CLIP, kernels.STATS_HEADER)
        assert tuple(c.value for c in header) == (0, 1, 2, stats.HEADER)
        assert all(kernels.stats_row_size(k) == stats.row_size(k) for k in range(plan.MAX_AUX + 1))
    packed = torch.arange(float(stats.packed_size(2, 3)), dtype=torch.float64)
    seen = stats.GateStats(packed, num_aux=3, rows=2)
    rows = torch.stack([seen.main_norm, seen.main_weight], 1), seen.cosine, seen.gate, seen.aux_norm, seen.cap
    assert torch.equal(torch.cat(rows, 1).flatten(), packed[stats.HEADER :])


def test_limits(module):
    assert module.MAX_AUX == plan.MAX_AUX


def test_numbers_of_a_group_in_triton():
    with targets.quick_interpreter():
        kernels = targets.interpreted()
        backend = targets.HostTriton()
        spec = plan.PlanSpec(rules.SGD, [torch.ones(2)], [0], [{}], 1, False)
        words = backend.plan(spec)._describe_groups([rules.Hyper(lr=0.5)] * 3)
        assert len(words) == 3 * kernels.GROUP_WIDTH.value
