"""Comparisons: what is run, what is run again, and what is said about it."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from models import IP
from train import compare
from train.comparison import cost, execute, tables
from train.comparison.collect import Record, read_records, results
from train.comparison.collect import _differences as differences_of
from train.comparison.execute import best
from train.comparison.plan import TUNING_SEED, Job, Plan, read_changes
from train.errors import RunError
from train.recipes import RECIPES, Arm, Condition, Recipe, Tuning
from train.settings import preset_settings

from . import tiny

SETTINGS = {
    **{name: value for name, value in tiny.SETTINGS.items() if name != "preset"},
    "clean_epochs": 1,
    "clean_batch_size": 4,
    "clean_crop": 8,
}


@RECIPES.register("tiny")
def tiny_recipe() -> Recipe:
    return Recipe(
        title="Tiny images",
        question="Does it work?",
        settings=SETTINGS,
        arms=(
            Arm("ip-only", {"strategy": "ip-only"}),
            Arm("joint", {"strategy": "joint"}),
            Arm("gradprom (fixed VR)", {"strategy": "gradprom", "vr_update": "fixed", "vr_start": "clean"}),
        ),
        conditions=(Condition("low", {"sigma": 0.05}), Condition("high", {"sigma": 0.2}, paper_only=True)),
        seeds=(0, 1),
        tuning=Tuning("aux_weight", ((0.01,), (0.1,))),
    )


@RECIPES.register("tiny-throughout")
def tiny_recipe_for_processes() -> Recipe:
    """Two runs that other processes can do. They know of the tiny data set because the settings hold options of the
    tiny IP, which are of the module that registers both."""
    settings = {name: value for name, value in SETTINGS.items() if not name.startswith("ip.")}
    settings |= {"ip": "tiny", "ip.width": 2, "aux_weight": (0.01,), "reader": False}
    recipe = tiny_recipe()
    return dataclasses.replace(recipe, settings=settings, arms=recipe.arms[:2], seeds=(0,), tuning=None)


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of one's own, and no pictures: they take seconds, and the first comparison (``done``) has them."""
    from train.comparison import write

    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(write, "draw", lambda *_: ([], []))
    monkeypatch.setattr(execute, "cores", lambda: 1)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that is finished; to be copied before anything is changed in it."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADPROM_CACHE", str(out.parent / "cache"))
        patch.setattr(execute, "cores", lambda: 1)
        assert compare.main(["--recipe", "tiny", "--out", str(out)]) == 0
    return out


def plan(**more: object) -> Plan:
    return Plan.made("tiny", tiny_recipe(), "quick", **more)  # type: ignore[arg-type]


def runs(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("metrics.json")}


# --- what is run ---


def test_the_networks_of_recipe_iconet_are_those_it_tells_of() -> None:
    """All begin with random weights, and have as many parameters as the docstring says."""
    made = Plan.made("iconet", RECIPES.build("iconet"), "quick")
    counts = {}
    for job in made.jobs({}):
        settings = job.settings
        assert (settings.network.ip_start, settings.training.crop, settings.training.max_steps) == ("fresh", 128, 200)
        network = IP.build(settings.network.ip, settings.network.ip_options, channels=1, scale=2)
        counts[job.arm] = sum(each.numel() for each in network.parameters())
    told = RECIPES["iconet"].__doc__ or ""
    for arm in ("srresnet", "iconet", "iconet without fusion"):
        assert f"{counts[arm]:,}" in told, (arm, counts[arm])


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("tiny")])
@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_every_recipe_is_a_plan(name: str, preset: str) -> None:
    """All settings fit each other, and every arm computes something else than every other."""
    made = Plan.made(name, RECIPES.build(name), preset)  # type: ignore[arg-type]
    jobs = made.jobs({})
    assert len(jobs) == len(made.seeds) * len(made.conditions) * len(made.arms)
    assert len({job.folder for job in jobs}) == len(jobs)
    first = [job for job in jobs if job.seed == made.seeds[0]]
    assert len({repr(job.settings.values) for job in first}) == len(first), "two arms are the same"
    advised = any(job.settings.method.kind.uses_auxiliaries for job in jobs)
    for job in jobs:
        assert job.settings.evaluation.evaluate_on == "test"
        assert job.settings.evaluation.reader == advised, "what no auxiliary has a part in needs no reader"
    trials = [trial for condition in made.conditions for arm in made.arms for trial in made.trials(condition, arm)]
    assert all(trial.settings.evaluation.evaluate_on == "val" and trial.seed == TUNING_SEED for trial in trials)
    numbers = {sum((t.condition, t.arm) == (trial.condition, trial.arm) for t in trials) for trial in trials}
    assert len(numbers) <= 1, "one arm gets more trials than another"


def test_all_seeds_and_arms_and_the_conditions_of_the_preset() -> None:
    jobs = plan().jobs({})
    assert [(job.condition, job.arm, job.seed) for job in jobs] == [
        ("low", arm, seed) for seed in (0, 1) for arm in ("ip-only", "joint", "gradprom (fixed VR)")
    ]
    assert {job.settings.degradation.sigma for job in jobs} == {0.05}
    paper = Plan.made("tiny", tiny_recipe(), "paper", seeds=[5], arms=["joint"])
    assert [(job.condition, job.arm, job.seed) for job in paper.jobs({})] == [("low", "joint", 5), ("high", "joint", 5)]


def test_trials_are_of_arms_that_read_the_setting() -> None:
    made = plan()
    (condition,) = made.conditions
    assert {arm.name: len(made.trials(condition, arm)) for arm in made.arms} == {
        "ip-only": 0,
        "joint": 2,
        "gradprom (fixed VR)": 2,
    }
    assert not any(plan(base={"aux_weight": (1.0,)}).trials(condition, arm) for arm in made.arms)


def test_chosen_values_reach_the_runs() -> None:
    weights = {job.arm: job.settings.auxiliary.aux_weight for job in plan().jobs({"low / joint": (0.1,)})}
    assert weights == {"ip-only": (1e-3,), "joint": (0.1,), "gradprom (fixed VR)": (1e-3,)}


def test_best_is_what_the_reader_says_among_those_of_nearly_the_best_psnr() -> None:
    trials = [
        (1, {"psnr": 28.0, "reader_accuracy": 0.6}),
        (2, {"psnr": 27.95, "reader_accuracy": 0.7}),
        (3, {"psnr": 27.85, "reader_accuracy": 0.9}),
    ]
    assert best(trials) == 2
    assert best([(1, {"psnr": 27.0}), (2, {"psnr": 27.5})]) == 2
    assert best([(1, {"psnr": None, "reader_accuracy": 1.0}), (2, {"psnr": 20.0, "reader_accuracy": 0.1})]) == 2


def test_settings_of_the_command_line() -> None:
    assert read_changes(["sigma=0.2", "ip.blocks=2", "aux_weight=0.5", "--batch-size=3", "task=sr2"]) == {
        "sigma": 0.2,
        "ip.blocks": 2,
        "aux_weight": (0.5,),
        "batch_size": 3,
        "task": "sr2",
    }
    for text, said in (
        ("sigma", "write KEY=VALUE"),
        ("sigam=1", "did you mean sigma"),
        ("seed=3", "no setting 'seed'"),
        ("out=x", "no setting 'out'"),
    ):
        with pytest.raises(RunError, match=said):
            read_changes([text])


# --- a comparison as a whole ---


def test_a_comparison_leaves_its_results(done: Path) -> None:
    found = json.loads((done / "results.json").read_text())
    (condition,) = found["conditions"]
    assert found["data"] == "phantom"
    assert set(condition["arms"]) == {"ip-only", "joint", "gradprom (fixed VR)"}
    assert set(found["chosen"]) == {"low / joint", "low / gradprom (fixed VR)"}
    for arm in condition["arms"].values():
        folders = [
            RunFolderOf(done, arm, condition, name, seed)
            for name, a in condition["arms"].items()
            if a is arm
            for seed in (0, 1)
        ]
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
        for key in ("psnr", "ssim", "reader_accuracy"):
            values = [each[key] for each in metrics]
            assert arm[key]["values"] == values
            assert arm[key]["mean"] == pytest.approx(np.mean(values))
    fixed = condition["arms"]["gradprom (fixed VR)"]
    assert set(fixed["against"]) == {"ip-only", "joint"}
    own, other = (
        np.stack([image_psnr(done / "runs" / "low" / f"{name}-s{seed}") for seed in (0, 1)])
        for name in ("gradprom-fixed-VR", "joint")
    )
    assert fixed["against"]["joint"]["psnr"]["mean"] == pytest.approx((own - other).mean(), abs=1e-6)
    assert fixed["against"]["joint"]["psnr"]["p"] is None, "two seeds are not tested"

    table = (done / "table.md").read_text()
    assert "PHANTOM" in table and "gradprom (fixed VR)" in table and "Chosen for each arm by validation images" in table
    assert "PHANTOM" in (done / "verdict.md").read_text()
    with (done / "table.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["score"] == "psnr"]
    assert len(rows) == 6 and {row["seed"] for row in rows} == {"0", "1"}


def RunFolderOf(out: Path, arm: dict, condition: dict, name: str, seed: int) -> Path:
    folder = {"ip-only": "ip-only", "joint": "joint", "gradprom (fixed VR)": "gradprom-fixed-VR"}[name]
    return out / "runs" / condition["name"] / f"{folder}-s{seed}"


def image_psnr(folder: Path) -> np.ndarray:
    with (folder / "images.csv").open() as file:
        return np.array([float(row["psnr"]) for row in csv.DictReader(file)])


def test_a_finished_run_is_never_repeated(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    before, table = runs(out), (out / "table.md").read_text()
    assert compare.main(["--recipe", "tiny", "--out", str(out)]) == 0
    assert runs(out) == before
    assert (out / "table.md").read_text() == table
    assert "6 of 6 are done already" in capsys.readouterr().out


def test_more_seeds_and_fewer_arms_of_the_same_comparison(done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    before = runs(out)
    assert compare.main(["--recipe", "tiny", "--out", str(out), "--seeds", "0,2", "--strategies", "ip-only,joint"]) == 0
    after = runs(out)
    assert before.items() <= after.items()
    assert {path.parent.name for path in set(after) - set(before)} == {"ip-only-s2", "joint-s2"}
    (condition,) = json.loads((out / "results.json").read_text())["conditions"]
    assert condition["arms"]["joint"]["seeds"] == [0, 2]


def test_a_stopped_comparison_goes_on_to_the_same_results(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the midst of its second trial, before that has a checkpoint, and of a run that has one."""
    from train.interruption import Stop
    from train.training.engine import Engine

    out = tmp_path / "out"
    real, calls = Engine.train, []

    def stopping(after: int):
        def train(self: Engine, display, stop: Stop) -> bool:
            calls.append(self)
            if len(calls) != after:
                return real(self, display, stop)

            class StopAt(Stop):
                @property
                def requested(own) -> bool:  # type: ignore[override]
                    return self.step >= 2

            return real(self, display, StopAt())

        return train

    for after in (3, 5):
        calls.clear()
        monkeypatch.setattr(Engine, "train", stopping(after))
        assert compare.main(["--recipe", "tiny", "--out", str(out)]) == 130
        assert "To go on, give the same command again" in capsys.readouterr().out
    unfinished = [path.parent for path in out.rglob("config.json") if not (path.parent / "metrics.json").exists()]
    assert unfinished
    (unfinished[0] / "checkpoint.pt").unlink()  # as if it had been killed before its first checkpoint
    monkeypatch.setattr(Engine, "train", real)
    assert compare.main(["--recipe", "tiny", "--out", str(out)]) == 0
    own, whole = (json.loads((each / "results.json").read_text()) for each in (out, done))
    for found in (own, whole):
        for arm in found["conditions"][0]["arms"].values():
            arm.pop("seconds")
    assert own == whole


def test_runs_side_by_side_are_the_same_runs(tmp_path: Path) -> None:
    found = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        assert compare.main(["--recipe", "tiny-throughout", "--jobs", jobs, "--out", str(out)]) == 0
        (condition,) = json.loads((out / "results.json").read_text())["conditions"]
        found.append({name: arm["psnr"]["mean"] for name, arm in condition["arms"].items()})
    assert list(found[0]) == ["ip-only", "joint"]
    assert found[0] == pytest.approx(found[1], rel=1e-4)  # another number of threads sums in another order


# --- bad input: an error that says what to do, and nothing lost ---


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--recipe", "tyni"], "did you mean tiny"),
        (["--recipe", "zzz"], "choose from: camus-denoise"),
        (["--recipe", "tiny", "--strategies", "join"], "did you mean joint"),
        (["--recipe", "tiny", "--conditions", "lo"], "did you mean low"),
        (["--recipe", "tiny", "--seeds", "a"], "whole numbers"),
        (["--recipe", "tiny", "--seeds", "0,0"], "different numbers"),
        (["--recipe", "tiny", "--seeds", "100"], "which settings are chosen by"),
        (["--recipe", "tiny", "--set", "lr=-1"], "--lr must be"),
        (["--recipe", "tiny", "--set", "ip.blokcs=1"], "no such option"),
        (["--recipe", "tiny", "--max-steps", "0"], "--max-steps must be at least 1"),
        (["--recipe", "tiny", "--jobs", "0"], "--jobs must be"),
    ],
)
def test_what_does_not_fit(argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert compare.main([*argv, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not out.exists()


def test_a_folder_of_something_else(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.docx").write_text("ten years of work")
    assert compare.main(["--recipe", "tiny", "--out", str(other)]) == 2
    assert "holds other things (thesis.docx)" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["thesis.docx"]

    out = shutil.copytree(done, tmp_path / "out")
    before = runs(out)
    assert compare.main(["--recipe", "covidct-denoise", "--out", str(out)]) == 2
    assert "holds a comparison of recipe tiny, not covidct-denoise" in capsys.readouterr().err
    assert compare.main(["--recipe", "tiny", "--set", "lr=0.01", "--out", str(out)]) == 2
    assert "would not be comparable" in capsys.readouterr().err
    about = json.loads((out / "comparison.json").read_text())
    assert about["recipe"] == "tiny" and runs(out) == before


def test_a_folder_in_which_another_process_is_at_work(done: Path, tmp_path: Path, capsys) -> None:
    from train.files import locked

    out = shutil.copytree(done, tmp_path / "out")
    with locked(out):
        assert compare.main(["--recipe", "tiny", "--out", str(out)]) == 2
    assert "is at work in another process" in capsys.readouterr().err


def test_a_recipe_that_has_changed_since(done: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    changed = dataclasses.replace(tiny_recipe(), settings={**SETTINGS, "lr": 0.5})
    monkeypatch.setitem(RECIPES._factories, "tiny", lambda: changed)
    assert compare.main(["--recipe", "tiny", "--out", str(out)]) == 2
    assert "holds a run with other settings (--lr)" in capsys.readouterr().err


def test_data_that_have_changed_between_runs(done: Path, tmp_path: Path, capsys) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    facts = out / "runs" / "low" / "joint-s1" / "data.json"
    content = json.loads(facts.read_text())
    content["splits"]["test"]["pixels"] = "other"
    facts.write_text(json.dumps(content))
    assert compare.main(["--recipe", "tiny", "--out", str(out)]) == 2
    assert "were made from different data" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["images.csv", "metrics.json", "steps.csv"])
def test_a_damaged_file_of_a_run(done: Path, tmp_path: Path, file: str, capsys) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    (out / "runs" / "low" / "joint-s1" / file).write_text("image,psnr\nx,y,z")
    assert compare.main(["--recipe", "tiny", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert file in error and "Traceback" not in error


# --- what is said ---


def found_of(differences: dict[str, dict]) -> dict:
    arm = {"strategy": "gradprom", "against": differences, "cosine": {}}
    other = {"strategy": "joint", "against": {}, "cosine": {}}
    return {"conditions": [{"name": "", "arms": {"gradprom": arm, "joint": other}}]}


def test_the_verdict_says_what_is_different_and_what_is_not() -> None:
    better = {"mean": 0.21, "low": 0.1, "high": 0.3, "p": 0.001, "p_corrected": 0.002, "comparisons": 4, "seeds": 5}
    same = {"mean": -0.01, "low": -0.05, "high": 0.03, "p": 0.5, "p_corrected": 0.7, "comparisons": 4, "seeds": 5}
    worse = {"mean": -0.05, "low": -0.08, "high": -0.02, "p": 0.01, "p_corrected": 0.02, "comparisons": 4, "seeds": 1}
    found = found_of({"joint": {"psnr": better}, "ip-only": {"psnr": same, "reader_accuracy": worse}})
    assert tables.verdict(found) == [
        "gradprom, in PSNR: 0.21 dB above joint (95 % CI +0.10 to +0.30 dB, p = 0.002); not distinguishable from "
        "ip-only (-0.01 dB, 95 % CI -0.05 to +0.03 dB, p = 0.7). (corrected for 4 comparisons; 5 seeds)",
        "gradprom, for the independent reader (share of right diagnoses): 5.0% worse than ip-only (95 % CI -8.0% to "
        "-2.0%, p = 0.02). (corrected for 4 comparisons; 1 seed)",
    ]


def test_the_verdict_where_networks_are_compared_and_not_strategies() -> None:
    """All arms are ip-only: a sentence about each that others are not compared with, and the cosine of its own loss."""
    test = {"mean": 0.21, "low": 0.1, "high": 0.3, "p": 0.001, "p_corrected": 0.002, "seeds": 3}
    rec = {"mean": 0.3, "low": 0.2, "high": 0.4, "steps": 400}
    none = {"mean": None, "low": None, "high": None, "steps": 0}
    arms = {
        "srresnet": {"against": {"bare": {"psnr": test}}, "cosine": {"": none}},
        "bare": {"against": {"srresnet": {"psnr": test}}, "cosine": {"": none}},
        "iconet": {"against": {"srresnet": {"psnr": test}, "bare": {"psnr": test}}, "cosine": {"rec": rec}},
    }
    arms = {name: {"strategy": "ip-only", **arm} for name, arm in arms.items()}
    said, cosine = tables.verdict({"conditions": [{"name": "joint2", "arms": arms}]})
    assert said.startswith("joint2: iconet, in PSNR: 0.21 dB above srresnet")
    assert cosine.startswith("joint2: iconet: the mean cosine of rec is +0.3000")


def test_three_seeds_are_tested_and_two_are_not() -> None:
    """Seed by seed and image by image, whatever the order of the runs is."""
    rng = np.random.default_rng(0)
    scores = {seed: rng.normal(27, 1, 40) for seed in range(3)}

    def record(arm: str, seed: int) -> Record:
        job = Job("", arm, preset_settings("quick").change({"seed": seed}), Path(arm))
        images = {"psnr": scores[seed] + 0.2 * (arm == "a") + rng.normal(0, 0.05, 40)}
        return Record(job, Path(f"{arm}-{seed}"), {}, tuple(map(str, range(40))), images, {})

    one, other = [record("a", seed) for seed in (2, 0, 1)], [record("b", seed) for seed in (0, 1, 2)]
    found = differences_of(one, other)["psnr"]
    assert found["mean"] == pytest.approx(0.2, abs=0.03)
    assert found["low"] < found["mean"] < found["high"] and found["p"] < 0.01
    pair = differences_of(one[:2], other)["psnr"]
    assert pair["mean"] == pytest.approx(0.2, abs=0.03) and pair["seeds"] == 2
    assert pair["p"] is pair["low"] is pair["high"] is None
    (said,) = tables.verdict(found_of({"joint": {"psnr": pair}}))
    assert "against joint, not tested, as that takes three seeds. (2 seeds)" in said


def test_the_verdict_on_the_cosine() -> None:
    found = found_of({})
    found["conditions"][0]["arms"]["gradprom"]["cosine"] = {
        "dia": {"mean": 0.001, "low": -0.01, "high": 0.012, "steps": 400},
        "seg": {"mean": 0.03, "low": 0.02, "high": 0.04, "steps": 400},
    }
    none, some = tables.verdict(found)
    assert none.endswith("not distinguishable from 0.") and "of dia is" in none
    assert some.endswith("above 0.") and "of seg" in some


def test_one_seed_has_no_interval(done: Path) -> None:
    made = plan(seeds=[0])
    chosen = json.loads((done / "tuned.json").read_text())
    jobs = made.jobs({key: tuple(value) for key, value in chosen.items()})
    found = results(made, read_records(jobs, done), chosen)
    arm = found["conditions"][0]["arms"]["joint"]
    assert arm["psnr"]["low"] is None
    assert "None" not in tables.markdown(found)
    json.loads(json.dumps(found, allow_nan=False))


@pytest.mark.parametrize(("cores", "gpu", "at_once"), [(1, False, 1), (2, False, 2), (64, False, 4), (64, True, 1)])
def test_runs_side_by_side_where_nobody_says(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpu: bool, at_once: int
) -> None:
    monkeypatch.setattr(execute, "cores", lambda: cores)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert execute.default_at_once() == at_once


def test_what_runs_share_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a machine that does 1 GFLOP per second: the second of two runs takes the time of its own steps, and side by
    side the VR of clean images, which one of them trains for both, takes as long as ever."""
    monkeypatch.setattr(cost, "speed", lambda threads: 1e9)
    made = Plan.made(
        "covidct-denoise", RECIPES.build("covidct-denoise"), "quick", seeds=[0], base={"ip_start": "fresh"}
    )
    job = next(job for job in made.jobs({}) if job.settings.starts_clean)
    one, two = (cost.estimate([job] * number, 1) for number in (1, 2))
    own = two - one
    shared = one - own
    assert shared > own > 0
    assert cost.estimate([job, job], 2) == pytest.approx(shared + own)


def test_list_and_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert compare.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert compare.main(["--recipe", "tiny", "--dry-run", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "4 trials choose aux_weight by validation images" in shown
    assert shown.count("runs/low/") == 6
    assert not (tmp_path / "out").exists()


def test_the_recipes_of_the_paper_are_there() -> None:
    assert {
        "covidct-denoise", "isic-denoise", "isic-sr", "camus-denoise", "lizard-denoise", "mixed-degradation",
        "multi-aux", "cross-domain", "vr-depth", "gates", "lambda", "iconet",
    } <= set(RECIPES)  # fmt: skip


def test_presets_hold_nothing_that_a_recipe_cannot_override() -> None:
    quick = Plan.made("covidct-denoise", RECIPES.build("covidct-denoise"), "quick", base={"size": 64, "crop": 64})
    assert {job.settings.data.size for job in quick.jobs({})} == {64}
    assert preset_settings("quick").data.size == 128
