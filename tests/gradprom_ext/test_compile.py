"""Under ``torch.compile``: the functions are operators of one graph, the optimizers run between graphs."""

from __future__ import annotations

import pytest
import torch

import gradprom_ext as gp
from gradprom_ext import _torch

from . import targets
from .problems import HalfGate, bits, problem

SETTINGS = [
    {"gate": "soft", "max_grad_norm": 1.0},
    {"gate": "project", "aux_cap": 0.5, "granularity": "tensor"},
    {"granularity": "tensor", "aux_weight": [0.5, 2.0]},
    {"aux_weight": torch.tensor([0.5, 2.0], dtype=torch.float64), "lr": torch.tensor(0.25)},
]


@pytest.fixture(params=[name for name in ("cpu", "reference") if targets.usable_on_host(name)])
def backend(request):
    """A schema carries a backend's name."""
    return request.param


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_is_part_of_the_graph(backend, settings):
    """With PyTorch operations before and behind it that would notice if a mutation were not declared."""

    def step(params, main, aux):
        main = [g * 2 for g in main]
        before = params[0] + 1
        stats = gp.gradprom_(params, main, aux, backend=backend, **{"lr": 0.1, **settings})
        return before, params[0] * 3, stats.cosine + 1, stats.packed

    outcomes = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        params, main, aux = problem(2, seed=1, shapes=[(5, 3), (7,), ()])
        main[1], aux[0][1], aux[1][1] = None, None, None
        params[0] = params[0].t().contiguous().t()
        main[1] = torch.ones(7)
        outcomes.append([*function(params, main, aux), *params])
    assert [bits(t) for t in outcomes[1]] == [bits(t) for t in outcomes[0]]


def test_measuring_is_part_of_the_graph(backend):
    _, main, aux = problem(1, seed=2, shapes=[(5, 3), (7,)])
    main[1] = None
    measure = torch.compile(lambda m, a: gp.gradient_stats(m, a, backend=backend).packed * 2, fullgraph=True,
                            backend="aot_eager")  # fmt: skip
    torch.testing.assert_close(measure(main, aux[0]), gp.gradient_stats(main, aux, backend=backend).packed * 2)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_operators_are_what_their_schemas_say(backend, settings):
    """Mutations, aliases, fake implementation, tracing: PyTorch's own checks."""
    params, main, aux = problem(2, seed=3, shapes=[(5, 3), (7,)])
    aux_weight = settings.get("aux_weight", 1.0)
    numbers = [] if isinstance(aux_weight, torch.Tensor) else aux_weight if isinstance(aux_weight, list) else [1.0, 1.0]
    rest = {
        "gate": settings.get("gate", "hard"),
        "threshold": 0.0,
        "aux_weight": numbers,
        "aux_weight_tensor": aux_weight if isinstance(aux_weight, torch.Tensor) else None,
        "per_tensor": settings.get("granularity") == "tensor",
        "aux_cap": settings.get("aux_cap"),
        "max_grad_norm": settings.get("max_grad_norm"),
        "backend": backend,
    }
    grads = [*main, *aux[0], None, aux[1][1]]
    torch.library.opcheck(
        torch.ops.gradprom_ext.gradprom_.default, (params, grads, 0.1, settings.get("lr")), kwargs=rest
    )
    torch.library.opcheck(torch.ops.gradprom_ext.gradient_stats.default, (grads, 2), kwargs=rest)


@pytest.mark.filterwarnings("ignore")  # dynamo's own, about the breaks between the graphs
@pytest.mark.parametrize("kwargs", [{}, {"capturable": True, "max_grad_norm": 0.1}, {"gate": HalfGate()}])
def test_a_training_step_with_an_optimizer(backend, kwargs):
    def train(ip, vr, opt, x, clean):
        y = ip(x)
        opt.backward((y - clean).square().mean(), vr(y).logsumexp(1).mean())
        opt.step()
        opt.zero_grad()

    outcomes = []
    for compiled in (False, True):
        torch.manual_seed(0)
        ip, vr = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)
        opt = gp.GradPromAdamW(ip.parameters(), lr=1e-2, backend=backend, **kwargs)
        function = torch.compile(train, backend="aot_eager") if compiled else train
        for _ in range(3):
            function(ip, vr, opt, torch.randn(4, 6), torch.randn(4, 6))
        outcomes.append([*ip.parameters(), opt.stats.packed])
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_a_model_compiled_for_one_backward_is_told_how_to_have_two(backend):
    """One that was trained with one loss before; what torch.compile then does is a private matter of PyTorch's."""
    ip = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.Linear(4, 4), torch.nn.Sigmoid())
    compiled = torch.compile(ip, backend="aot_eager")
    opt = gp.GradPromSGD(ip.parameters(), lr=0.1, backend=backend)
    x = torch.randn(3, 4)

    def losses():
        y = compiled(x)
        return (y - x).square().mean(), y.logsumexp(1).mean()

    opt.backward(losses()[0])
    opt.step()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"Call torch\.compiler\.reset\(\) before the first backward") as raised:
        opt.backward(*losses())
    assert _torch.is_compiled_for_one_backward(raised.value.__cause__)
    torch.compiler.reset()
    opt.zero_grad()
    opt.backward(*losses())
    found = [p.grad.clone() for p in ip.parameters()], opt.aux_grads[0]
    compiled = ip
    for gradients, loss in zip(found, losses(), strict=True):
        for g, expected in zip(
            gradients, torch.autograd.grad(loss, list(ip.parameters()), retain_graph=True), strict=True
        ):
            torch.testing.assert_close(g, expected)
