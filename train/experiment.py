"""A run from its settings to its results: what the command line prints, and what programs and tests call."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradprom_ext import __version__
from train.data import DATASETS, load
from train.data.base import ImageData
from train.data.cache import ArrayCache, default_cache_dir
from train.data.fingerprint import fingerprint
from train.degradations import Degradation, parse
from train.degradations.bm3d import require_bm3d
from train.degradations.parsing import ALIASES
from train.errors import RunError
from train.evaluation.evaluate import Evaluation, evaluate, examples
from train.files import locked, read_json
from train.inference import choose_device
from train.interruption import status_of, stop_on_signal
from train.outputs.figures import save_gate, save_panel
from train.outputs.provenance import commit
from train.outputs.report import Metrics, collect, count_parameters, finite, introduction
from train.outputs.run_folder import RunFolder, new_folder
from train.precision import slowness
from train.settings import Settings, to_json
from train.settings.command_line import stored
from train.settings.naming import identity, run_name
from train.settings.sections import Data, known
from train.strategies.auxiliary import AUXILIARIES, Auxiliary
from train.strategies.base import IP
from train.team import ALONE, Team, gathered
from train.training.build import Experiment, build, build_auxiliaries, build_network
from train.training.engine import Cadence, Engine
from train.training.prepared import READER_SEED, alone_weights, clean_weights, pretrained_weights
from train.training.progress import Display, summary_writer
from train.training.validation import Validation

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class RunResult:
    """What became of a run.

    :param folder: all that it has written.
    :param metrics: the content of ``metrics.json``; ``None`` where it was asked to stop before the end.
    :param was_finished: whether there was nothing left to do.
    :param step: how many steps are done.
    :param steps: of how many; both are 0 where nothing was left to do.
    :param helped: whether another process leads the run, and does what is left when the training is over.
    :param status: the exit status that says which signal asked the run to stop; 0 where none did.
    """

    folder: Path
    metrics: Metrics | None
    was_finished: bool = False
    step: int = 0
    steps: int = 0
    helped: bool = False
    status: int = 0


@dataclass(frozen=True)
class About:
    """What stands in names, titles and metrics.

    :param name: of the run.
    :param identity: a digest of what it computes.
    """

    name: str
    identity: str

    @classmethod
    def made(cls, settings: Settings, data: ImageData, degrade: Degradation, facts: dict[str, Any]) -> About:
        """Of a new run.

        :param facts: the fingerprint of the data.
        :raises RunError: a file of first weights cannot be read.
        """
        digest = identity(settings, facts, degradation=str(degrade))
        task = task_word(settings, degrade)
        return cls(run_name(settings, title=data.title, source=data.source, task=task, identity=digest), digest)

    @classmethod
    def of(cls, folder: RunFolder) -> About | None:
        """Of a run that goes on; ``None`` where an earlier version began it, which did not write it down."""
        content = read_json(folder.config) or {}
        name, digest = content.get("name"), content.get("identity")
        return cls(name, digest) if isinstance(name, str) and isinstance(digest, str) else None


def do_run(settings: Settings, *, display: Display | None = None) -> RunResult:
    """Does one run, or what is left of it (``output.resume``, with its folder in ``output.out``); together with the
    other processes that ``torchrun`` has started, if it has.

    :param display: what shows the progress; nothing is shown without one.
    :raises RunError: something the user can put right; a run that could not begin has left no folder.
    """
    begun = time.monotonic()
    degrade = look_up(settings)
    device = choose_device(settings.training.device)
    resume, out = settings.output.resume, settings.output.out
    with contextlib.ExitStack() as held:
        team = held.enter_context(gathered(device))
        if display is None or not team.leads:
            display = Display(_silent())
        if resume:
            assert out is not None  # parse() has put the run's folder there
            folder = RunFolder(out)
            metrics = team.told(take_possession(folder, held) if team.leads else None)
            if metrics is not None:
                return RunResult(out, metrics, was_finished=True, helped=not team.leads)
        with team.leader_first():
            data = load_data(settings, progress=display.console.is_terminal)
        settings = settings.change({"source": data.source})
        facts = fingerprint(data)
        if settings.evaluation.evaluate_on == "val":
            data = on_validation(data)
        about = (resume and About.of(folder)) or About.made(settings, data, degrade, facts)
        # A checkpoint holds all weights: the files that the first ones came from need not be there any more.
        first = settings.change({"ip_weights": None, "vr_weights": None}) if resume else settings
        prepared = Prepared(settings, data, facts, degrade, device, display, team.alone())
        with team.leader_first():
            weights = {} if resume else prepared.first()
        experiment = build(first, data, degrade, device=device, first=weights, team=team)
        if settings.output.tensorboard:
            summary_writer()  # complains now, not after the folder is made
        if not team.leads:
            own = RunFolder(Path(held.enter_context(tempfile.TemporaryDirectory())))
            return _help(_engine(experiment, own, settings, about, begun), folder if resume else None, own)
        if not resume:
            folder = RunFolder(held.enter_context(new_folder(out, about.name)))
            settings = settings.change(
                {
                    "device": "cuda" if device.type == "cuda" else "cpu",
                    "out": folder.path,
                    "data_root": settings.data.data_root if data.folder is None else data.folder.absolute(),
                }
            )
        data = experiment.data
        output = settings.output
        events = folder.tensorboard if output.tensorboard else None
        display.begin(experiment.strategy.measures, batch_size=experiment.batch_size, events=events)
        engine = _engine(experiment, folder, settings, about, begun)
        if resume:
            folder.refuse_other_data(facts, data.folder)
            engine.resume()
        else:
            folder.write_data(facts)
            folder.write_config(vars(about) | to_json(settings))
        display.say(_introduction(settings, data, experiment, engine, folder))
        with stop_on_signal() as stop:
            finished = engine.train(display, stop)
        result = RunResult(folder.path, None, step=engine.step, steps=engine.steps)
        if not finished:
            return dataclasses.replace(result, status=stop.status)
        if settings.evaluation.select == "best":
            engine.take_best(display)
        try:
            metrics = finish(settings, data, experiment, engine, folder, about, prepared.readers())
        except KeyboardInterrupt as error:
            return dataclasses.replace(result, status=status_of(error))
        return dataclasses.replace(result, metrics=metrics)


def _engine(experiment: Experiment, folder: RunFolder, settings: Settings, about: About, begun: float) -> Engine:
    """
    :param folder: that this process writes to.
    :param begun: ``time.monotonic()`` when it began.
    """
    output = settings.output
    cadence = Cadence(
        output.log_every,
        output.checkpoint_every,
        settings.training.num_workers,
        output.checkpoint_minutes,
        output.keep_checkpoints,
    )
    validation = None
    if experiment.validation is not None:
        validation = Validation(
            experiment,
            every=settings.evaluation.validate_every,
            folder=folder,
            settings=vars(about) | to_json(settings.without_paths),
        )
    return Engine(experiment, folder, cadence, begun=begun, validation=validation)


def _help(engine: Engine, begun_in: RunFolder | None, own: RunFolder) -> RunResult:
    """The part of a run that a process does which does not lead it: to train along.

    :param begun_in: the folder of a run that goes on.
    :param own: a folder of this process's, for what it notes down besides.
    """
    if begun_in is not None:
        engine.resume(begun_in)
    with stop_on_signal() as stop:
        finished = engine.train(Display(_silent()), stop)
    status = 0 if finished else stop.status  # that of SIGINT where the signal reached another process
    return RunResult(own.path, None, step=engine.step, steps=engine.steps, helped=True, status=status)


def on_validation(data: ImageData) -> ImageData:
    """The data with their validation images in the place of the test images, which nothing can look at then.

    :raises RunError: there are no validation images.
    """
    if not len(data.val):
        raise RunError(f"--evaluate-on val: {data.title} has no validation images")
    return dataclasses.replace(data, test=data.val)


@dataclass(frozen=True)
class Prepared:
    """What other trainings have prepared for a run, done now where the cache has not got it.

    :param facts: the fingerprint of the data.
    :param degrade: what IP has to undo.
    :param display: shows the trainings.
    :param team: this process by itself, where there are others.
    """

    settings: Settings
    data: ImageData
    facts: dict[str, Any]
    degrade: Degradation
    device: torch.device
    display: Display
    team: Team = ALONE

    def first(self) -> dict[str, dict[str, torch.Tensor]]:
        """What networks begin with, by the keys of their roles; those that begin with random weights are missing."""
        settings, found = self.settings, {}
        if settings.ip_starts_alone:
            found[IP.key] = alone_weights(
                settings,
                self.data,
                self.facts,
                self.degrade,
                device=self.device,
                cache=ArrayCache(default_cache_dir()),
                display=self.display,
                team=self.team,
            )
        if settings.starts_clean or settings.starts_pretrained:
            for name in settings.auxiliary.names:
                weights = self._weights(name, self._seed) if settings.starts_clean else self._pretrained(name)
                found[AUXILIARIES[name].role.key] = weights  # type: ignore[attr-defined]
        return found

    def _pretrained(self, auxiliary: str) -> dict[str, torch.Tensor]:
        cache = ArrayCache(default_cache_dir())
        return pretrained_weights(
            self.settings,
            self.data,
            self.facts,
            auxiliary,
            device=self.device,
            cache=cache,
            display=self.display,
            team=self.team,
        )

    def readers(self) -> list[tuple[Auxiliary, torch.nn.Module]]:
        """The independent readers with their tasks; none where none was asked for."""
        settings = self.settings
        if not settings.evaluation.reader:
            return []
        tasks = {each.role.key: each for each in build_auxiliaries(settings, self.data)}
        found = []
        for task in tasks.values():
            network = build_network(settings, task.role, tasks, channels=self.data.channels, scale=1)
            network.load_state_dict(self._weights(task.name, self._seed + READER_SEED))
            found.append((task, network.requires_grad_(False).to(self.device)))
        return found

    @property
    def _seed(self) -> int:
        own = self.settings.clean.clean_seed
        return self.settings.training.seed if own is None else own

    def _weights(self, auxiliary: str, seed: int) -> dict[str, torch.Tensor]:
        cache = ArrayCache(default_cache_dir())
        return clean_weights(
            self.settings,
            self.data,
            self.facts,
            auxiliary,
            seed=seed,
            device=self.device,
            cache=cache,
            display=self.display,
            team=self.team,
        )


def _silent() -> Console:
    from rich.console import Console

    return Console(quiet=True)


def take_possession(folder: RunFolder, held: contextlib.ExitStack) -> Metrics | None:
    """Keeps other processes out of the folder of a run that goes on, until ``held`` is closed.

    :returns: the metrics of a finished run, which is not taken possession of.
    :raises RunError: another process is at work on the run, or ``metrics.json`` is damaged.
    """
    metrics = folder.read_metrics()
    if metrics is None:
        held.enter_context(locked(folder.path))
        metrics = folder.read_metrics()  # another process may have finished the run just before
    return metrics


def look_up(settings: Settings) -> Degradation:
    """Looks up the names that the settings could not, before anything costs time.

    :returns: what IP has to undo.
    :raises RunError: a name or an argument is not understood; the message lists those that are.
    """
    for name in ("dataset", "test_dataset"):
        if settings.values[name] is not None:
            known(name, DATASETS, settings.values[name])
    degrade = parse(settings.degradation.task, sigma=settings.degradation.sigma)
    if settings.evaluation.bm3d:
        require_bm3d(degrade)
    return degrade


def task_word(settings: Settings, degrade: Degradation) -> str:
    """The task in a run's name: with every argument.

    What has a name of its own keeps it, with its noise (``denoise0.1``, ``sr2``).
    """
    task = settings.degradation.task
    if task not in ALIASES:
        return str(degrade)
    return task if degrade.noise_level is None else f"{task}{degrade.noise_level:g}"


def load_data(settings: Settings, *, progress: bool) -> ImageData:
    """
    :raises RunError: there are no such data, or they are damaged.
    """
    given, output = settings.data, settings.output
    # A run that goes on knows where its data were. They may have moved; what it gets is compared with what it had.
    before = stored(output.out).data if output.resume and output.out else None
    data = _load(given, given.dataset, given.data_root, before.data_root if before else None, progress=progress)
    if given.test_dataset is None:
        return data
    other = _load(given, given.test_dataset, given.test_root, before.test_root if before else None, progress=progress)
    if other.source != data.source:
        raise RunError(
            f"{data.title} is {data.source} and {other.title} is {other.source}; give --source real or --source phantom"
        )
    foreign = dataclasses.replace(other.test, labels=None, masks=None)
    return dataclasses.replace(data, test=foreign, title=f"{data.title}-to-{other.title}")


def _load(given: Data, name: str, root: Path | None, formerly: Path | None, *, progress: bool) -> ImageData:
    try:
        return load(
            name,
            root=None if root == formerly else root,
            formerly=formerly,
            source=given.source,
            size=given.size,  # type: ignore[arg-type]
            channels=given.channels,
            window=given.window,
            progress=progress,
        )
    except ValueError as error:
        raise RunError(str(error)) from error


def _introduction(
    settings: Settings, data: ImageData, experiment: Experiment, engine: Engine, folder: RunFolder
) -> str:
    training = settings.training
    names = {}
    for role in experiment.strategy.roles:
        options = settings.values.get(f"{role.key}_options")
        told = ", ".join(f"{name} {value}" for name, value in vars(options).items()) if options else ""
        names[role.key] = settings.values.get(role.key, role.name) + (f" with {told}" if told else "")
    said = introduction(
        data,
        experiment.strategy,
        names,
        f"strategy {settings.method.strategy}, preset {settings.preset}, {engine.steps} steps "
        f"of {training.batch_size} crops of {training.crop} px, on {experiment.device.type} in {training.precision}",
        folder.path,
    )
    slow = slowness(training.precision, experiment.device)
    notes = [f"first weights: {note}" for note in experiment.notes] + ([f"precision: {slow}"] if slow else [])
    return "\n".join([said, *notes])


def finish(
    settings: Settings,
    data: ImageData,
    experiment: Experiment,
    engine: Engine,
    folder: RunFolder,
    about: About,
    readers: Sequence[tuple[Auxiliary, torch.nn.Module]],
) -> Metrics:
    """Evaluates a trained run and writes all that its folder holds at the end; the metrics last.

    :param readers: networks that took no part in the training, with their tasks.
    :raises RunError: a file cannot be written.
    """
    experiment.settle()
    strategy, degrade = experiment.strategy, experiment.crops.degrade
    cache = ArrayCache(default_cache_dir())
    remedies = settings.evaluation.remedies
    evaluation = evaluate(
        strategy,
        data.test,
        degrade,
        device=experiment.device,
        cache=cache,
        readers=readers,
        remedies=remedies,
        reference_free=settings.evaluation.reference_free,
        guides=data.guides,
    )
    folder.write_images(data.test.names, evaluation.table())
    folder.write_weights(strategy.networks, vars(about) | to_json(settings.without_paths), without=strategy.untrained)
    draw(data, experiment, engine, evaluation, folder, about.name)
    values = settings.values
    said = {
        "run": about.name,
        "identity": about.identity,
        "data": data.source,
        "dataset": settings.data.dataset,
        "title": data.title,
        "task": settings.degradation.task,
        "degradation": str(degrade),
        "sigma": degrade.noise_level,
        "strategy": settings.method.strategy,
        "evaluated_on": settings.evaluation.evaluate_on,
        "aux": [each.name for each in strategy.auxiliaries],
        "seed": settings.training.seed,
        "precision": settings.training.precision,
        "preset": settings.preset,
    }
    networks: Metrics = dict.fromkeys(("ip", "ip_parameters", "vr", "vr_parameters"))
    for role in strategy.roles:
        networks |= {
            role.key: values.get(role.key, role.name),  # a network of the strategy's own has no name but its role's
            f"{role.key}_parameters": count_parameters(strategy.networks[role.key]),
        }
    metrics = collect(said, data, strategy, engine.log.read(), evaluation)
    for each in strategy.auxiliaries:
        metrics |= each.baseline(data.test)
    if engine.validation is not None:
        metrics |= engine.validation.metrics
    metrics |= networks | {
        "backend": strategy.learners["ip"].optimizer.backend if strategy.trains_ip else None,  # type: ignore[attr-defined]
        "device": experiment.device.type,
        "processes": experiment.team.size,
        "version": __version__,
        "commit": commit(),
        "seconds": round(engine.seconds, 1),
    }
    metrics = finite(metrics)
    folder.write_metrics(metrics)
    return metrics


def draw(
    data: ImageData, experiment: Experiment, engine: Engine, evaluation: Evaluation, folder: RunFolder, name: str
) -> None:
    """Writes ``panel.png`` (three test images: a badly, a typically and a well enhanced one) and ``gate.png``.

    :raises RunError: a file cannot be written.
    """
    strategy, labels = experiment.strategy, data.test.labels
    titled: dict[str, Any] = {"title": name, "source": data.source}

    def diagnosis(row: int) -> str:
        return "" if labels is None or labels[row] < 0 else f"{data.class_names[labels[row]]}, "

    # An image of NaN is the worst one; where scores are equal, as at the cap, the order is that of the data set.
    quality = evaluation.enhanced or evaluation.degraded
    if quality is None:  # without a truth none is better than another
        ranking = torch.arange(len(data.test))
    else:
        ranking = quality.psnr.nan_to_num(nan=-math.inf).argsort(stable=True)
    places = {percent: int(ranking[percent * (len(ranking) - 1) // 100]) for percent in (10, 50, 90)}
    where = {percent: f"{percent}th percentile" if quality else data.test.names[i] for percent, i in places.items()}
    chosen = {where[percent]: place for percent, place in places.items()}
    rows = examples(strategy, data.test, experiment.crops.degrade, list(chosen.values()), device=experiment.device)
    save_panel(
        folder.panel,
        clean=[each.clean[0] for each in rows] if quality else None,
        degraded=[each.degraded[0] for each in rows],
        enhanced=[each.enhanced[0] for each in rows if each.enhanced is not None] or None,
        labels=[f"{diagnosis(row)}{where}" for where, row in chosen.items()],
        **titled,
    )
    steps = engine.log.read()
    gates = [each.name.removeprefix("gate") for each in strategy.measures if each.name.split("_")[0] == "gate"] or [""]
    advised = strategy.trains_ip and bool(strategy.auxiliaries or strategy.ip_aux)
    for suffix in gates:
        several = {"title": f"{name}, {suffix[1:]}"} if suffix else {}
        save_gate(
            folder.gate_of(suffix[1:]) if suffix else folder.gate,
            step=steps["step"],
            cosine=steps[f"cosine{suffix}"] if advised else None,
            gate=steps[f"gate{suffix}"] if advised else None,
            **titled | several,
        )
