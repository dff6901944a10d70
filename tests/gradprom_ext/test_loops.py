"""In other people's training loops: closures, wrappers, checkpoints of other versions, arguments of torch.optim."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp
from gradprom_ext import settings

from .problems import CASES, feed, twins

STEPS = 5


class Task(torch.nn.Module):
    """A small IP and VR, and the losses of a numbered batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ip = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
        self.vr = torch.nn.Linear(6, 3)

    def losses(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(batch)
        x, clean = (torch.randn(5, 6, generator=g) for _ in range(2))
        y = self.ip(x)
        return mse_loss(y, clean), cross_entropy(self.vr(y), torch.randint(3, (5,), generator=g))

    def optimizers(self):
        return gp.GradPromAdamW(self.ip.parameters(), lr=0.01), torch.optim.AdamW(self.vr.parameters(), lr=0.01)


def plain_loop() -> tuple[list[torch.Tensor], list[float]]:
    """Parameters and cosines after a handful of steps, without any framework."""
    task = Task()
    opt, vr_opt = task.optimizers()
    cosines = []
    for batch in range(STEPS):
        opt.backward(*task.losses(batch))
        for o in (opt, vr_opt):
            o.step()
            o.zero_grad()
        cosines.append(float(opt.stats.cosine))
    assert min(cosines) < 0 < max(cosines), "the run must see the gate open and closed"
    return [p.detach() for p in task.parameters()], cosines


def assert_same(task: Task, cosines: list[float]) -> None:
    parameters, expected = plain_loop()
    assert cosines == expected
    for a, b in zip(task.parameters(), parameters, strict=True):
        assert torch.equal(a, b)


# Closures ------------------------------------------------------------------------------------------------------------


def test_a_closure_that_calls_backward(backend):
    """As torch.optim has it: clear, back-propagate, return the loss."""
    opt, a, _, _ = twins("adam", backend, aux_weight=0.7)
    other, c, _, _ = twins("adam", backend, aux_weight=0.7)
    with torch.no_grad():
        for p, q in zip(c, a, strict=True):
            p.copy_(q)

    def losses(params):
        return sum(p.square().sum() for p in params), sum(p.sum() for p in params)

    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        main, aux = losses(a)
        opt.backward(main, aux)
        return main

    for _ in range(3):
        with torch.no_grad():
            assert float(opt.step(closure)) == pytest.approx(float(losses(c)[0].detach()))
        other.zero_grad()
        other.backward(*losses(c))
        assert other.step() is None
    for p, q in zip(a, c, strict=True):
        assert torch.equal(p, q)


def test_a_closure_that_does_nothing(backend):
    """What PyTorch Lightning's manual optimization passes."""
    opt, a, other, b = twins("sgd", backend, aux_weight=0.7)
    step = opt.step
    opt.step = lambda: step(closure=lambda: 7.0)  # type: ignore[method-assign]
    feed(opt, a, other, b)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q)
    for p in a:
        p.grad = torch.ones_like(p)
    assert step(lambda: 7.0) == 7.0, "an ordinary backward before, too"


def test_a_closure_that_back_propagates_on_its_own_is_refused(backend):
    opt, a, *_ = twins("sgd", backend)
    before = [p.detach().clone() for p in a]

    def closure():
        opt.zero_grad()
        loss = sum(p.sum() for p in a)
        loss.backward()
        return loss

    opt.backward(sum(p.sum() for p in a), sum(p.sum() for p in a))
    for _ in range(2):
        with pytest.raises(TypeError, match=r"back-propagated a loss on its own.*automatic_optimization = False"):
            opt.step(closure)
    for p, q in zip(a, before, strict=True):
        assert torch.equal(p, q)


# Frameworks ----------------------------------------------------------------------------------------------------------


def lightning_trainer(tmp_path, **kwargs):
    lightning = pytest.importorskip("lightning.pytorch")
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **kwargs,
    )  # fmt: skip
    return lightning, trainer


@pytest.mark.filterwarnings("ignore")
def test_lightning_manual_optimization(tmp_path):
    lightning, trainer = lightning_trainer(tmp_path)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.task = Task()
            self.cosines: list[float] = []

        def configure_optimizers(self):
            return list(self.task.optimizers())

        def training_step(self, batch, index):
            opt, vr_opt = self.optimizers()
            opt.backward(*self.task.losses(int(batch)))
            for o in (opt, vr_opt):
                o.step()
                o.zero_grad()
            self.cosines.append(float(opt.stats.cosine))

    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(range(STEPS), batch_size=None))
    assert_same(module.task, module.cosines)


@pytest.mark.filterwarnings("ignore")
def test_lightning_automatic_optimization_is_refused_clearly(tmp_path):
    lightning, trainer = lightning_trainer(tmp_path)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.task = Task()

        def configure_optimizers(self):
            return self.task.optimizers()[0]

        def training_step(self, batch, index):
            return self.task.losses(int(batch))[0]

    module = Module()
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(TypeError, match="automatic_optimization = False"):
        trainer.fit(module, torch.utils.data.DataLoader(range(STEPS), batch_size=None))
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    task = Task()
    task, opt, vr_opt = accelerator.prepare(task, *task.optimizers())
    cosines = []
    for batch in range(STEPS):
        opt.optimizer.backward(*task.losses(batch))
        for o in (opt, vr_opt):
            o.step()
            o.zero_grad()
        cosines.append(float(opt.optimizer.stats.cosine))
    assert_same(task, cosines)


def test_accelerate_accumulates_micro_batches():
    """Its wrapper leaves out ``step`` and ``zero_grad`` until the last one."""
    accelerate = pytest.importorskip("accelerate")
    outcomes = []
    for wrapped in (True, False):
        task = Task()
        opt, _ = task.optimizers()
        if wrapped:
            accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
            task, opt = accelerator.prepare(task, opt)
            for batch in range(6):
                with accelerator.accumulate(task):
                    opt.optimizer.backward(*task.losses(batch))
                    opt.step()
                    opt.zero_grad()
        else:
            for batch in range(6):
                opt.backward(*task.losses(batch))
                if batch % 3 == 2:
                    opt.step()
                    opt.zero_grad()
        outcomes.append([p.detach() for p in task.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


# Arguments and checkpoints of torch.optim ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arguments", [{"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}])
def test_implementations_of_torch_optim_are_accepted_and_ignored(case, arguments):
    make, _, options = CASES[case]
    outcomes = []
    for kwargs in ({}, arguments):
        p = torch.nn.Parameter(torch.ones(3))
        opt = make([p], lr=0.1, **options, **kwargs)
        opt.backward(p.sum(), p.sum())
        opt.step()
        outcomes.append(p.tolist())
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("make", [gp.GradPromSGD, gp.GradPromAdam, gp.GradPromAdamW])
def test_unknown_arguments_are_refused_under_the_right_name(make):
    with pytest.raises(TypeError, match=rf"{make.__name__}\(\) got an unexpected keyword argument 'learning_rate'"):
        make([torch.nn.Parameter(torch.ones(3))], learning_rate=0.1)


def test_unknown_arguments_of_the_functions():
    with pytest.raises(TypeError, match=r"gradprom_\(\) got an unexpected keyword argument 'gates'"):
        gp.gradprom_([torch.ones(3)], [torch.ones(3)], [torch.ones(3)], gates="hard")


@pytest.mark.parametrize("function", [gp.GradPromSGD, gp.GradPromAdam, gp.GradPromAdamW, gp.gradprom_])
def test_help_shows_every_argument(function):
    parameters = inspect.signature(function).parameters
    assert set(settings.DEFAULTS) <= set(parameters)
    assert set(settings.DEFAULTS) == set(gp.StepSettings.__annotations__)
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    assert parameters["gate"].default == "hard"


def test_signatures_begin_as_those_of_torch_optim():
    """Positional arguments can stay as they are."""
    for make, theirs, _ in CASES.values():
        positional = [
            [p.name for p in inspect.signature(f).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
            for f in (make, theirs)
        ]
        assert positional[0] == positional[1][: len(positional[0])]


def test_a_checkpoint_with_momentum_buffer_none(backend):
    """As PyTorch saved it for SGD without momentum."""
    opt, a, other, b = twins("sgd-momentum", backend, aux_weight=0.7)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"] = {i: {"momentum_buffer": None} for i in range(len(a))}
    opt.load_state_dict(saved)
    other.load_state_dict(copy.deepcopy(saved) | {"param_groups": other.state_dict()["param_groups"]})
    for seed in range(3):
        feed(opt, a, other, b, seed=seed)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)


def test_a_checkpoint_with_momentum_buffer_none_and_masters(backend):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = gp.GradPromSGD([p], lr=0.5, momentum=0.5, master_weights=True, backend=backend)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"] = {0: {"momentum_buffer": None}}
    opt.load_state_dict(saved)
    p.grad = torch.ones_like(p)
    opt.step()
    assert p.tolist() == [0.5] * 3


@pytest.mark.parametrize("how", ["load_state_dict", "deepcopy"])
def test_skipped_steps_are_not_forgotten(backend, how):
    p = torch.nn.Parameter(torch.ones(3))
    opt = gp.GradPromAdam([p], lr=0.1, backend=backend)
    for value in (1.0, float("nan"), float("inf")):
        p.grad = torch.full((3,), value)
        opt.step()
    if how == "load_state_dict":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        opt = copy.deepcopy(opt)
    assert float(opt.skipped_steps) == 2
    (p,) = opt.param_groups[0]["params"]
    p.grad = torch.full((3,), float("nan"))
    opt.step()
    assert float(opt.skipped_steps) == 3


def test_a_loaded_optimizer_has_the_keys_of_a_new_one():
    opt = gp.GradPromAdam([torch.nn.Parameter(torch.ones(3))])
    before = set(opt.param_groups[0])
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert set(opt.param_groups[0]) == before
    assert set(copy.deepcopy(opt).param_groups[0]) == before


def test_loading_between_backward_and_step_keeps_the_gradients(backend):
    """As it keeps ``.grad``."""
    p = torch.nn.Parameter(torch.zeros(2))
    opt = gp.GradPromSGD([p], lr=1.0, backend=backend)
    opt.backward(p.sum(), 2 * p.sum())
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step()
    assert p.tolist() == [-3.0, -3.0]
