"""Comparisons by one command: ``python -m train.compare --recipe NAME``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from train.errors import RunError
from train.interruption import same_command
from train.recipes import RECIPES
from train.run import guarded
from train.text import printable, shell_word

ABOUT = """Run the strategies and seeds of a recipe, and say whether GradProm helped: a table with confidence intervals,
figures, a page and a verdict in plain words. A finished run is never repeated, and a stopped comparison goes on where
it was: give the same command again."""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.compare", description=ABOUT, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the recipes, with what each costs on this machine")
    parser.add_argument("--recipe", metavar="NAME", help="which comparison")
    parser.add_argument(
        "--preset", choices=("quick", "paper"), default="quick", help="quick: two CPU cores; paper: a GPU"
    )
    parser.add_argument("--seeds", metavar="0,1,2", help="seeds in the place of the recipe's")
    parser.add_argument("--strategies", metavar="A,B", help="only these arms of the recipe")
    parser.add_argument("--conditions", metavar="A;B", help="only these conditions of the recipe")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="changes",
        help="a setting of all runs, as python -m train.run --help lists them; may be given several times",
    )  # fmt: skip
    parser.add_argument("--max-steps", type=int, help="steps of IP's training at most")
    parser.add_argument("--dry-run", action="store_true", help="show what would be run, and run nothing")
    parser.add_argument("--out", type=Path, help="folder of the comparison (default: results-of/RECIPE)")
    parser.add_argument(
        "--jobs", type=int, help="runs side by side (default: one per CPU core, up to 4; with a GPU one)"
    )
    given = parser.parse_args(argv)
    if not given.list and given.recipe is None:
        parser.error("give --recipe NAME, or --list to see which there are")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    :returns: the exit status: 0, 2 (an error of the user's, explained on stderr), 130 (SIGINT) or 143 (SIGTERM).
    """
    return guarded(lambda: run(arguments(sys.argv[1:] if argv is None else argv)))


def run(given: argparse.Namespace) -> int:
    """Does what the command line asks.

    :raises RunError: something the user can put right.
    """
    from train.comparison.execute import default_at_once
    from train.comparison.plan import Plan, read_changes, unknown

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise RunError(
            "torchrun starts several processes for one run, and a comparison is many runs: give python -m "
            "train.compare with --jobs, or torchrun -m train.run for a single run"
        )
    if given.jobs is not None and given.jobs < 1:
        raise RunError(f"--jobs must be at least 1, not {given.jobs}")
    if given.list:
        from train.comparison.cost import listing

        print(listing(given.preset, at_once=given.jobs or default_at_once()))
        return 0
    if given.recipe not in RECIPES:
        raise RunError(unknown("--recipe", given.recipe, list(RECIPES), what="there is no recipe"))
    base = read_changes(given.changes)
    if given.max_steps is not None:
        base["max_steps"] = given.max_steps
    recipe = RECIPES.build(given.recipe)
    strategies = None if given.strategies is None else [each.strip() for each in given.strategies.split(",")]
    conditions = None if given.conditions is None else [each.strip() for each in given.conditions.split(";")]
    plan = Plan.made(
        given.recipe,
        recipe,
        given.preset,
        seeds=_seeds(given.seeds),
        arms=strategies,
        conditions=conditions,
        base=base,
    )
    if given.dry_run:
        from train.comparison.cost import dry_run

        print(dry_run(plan, at_once=given.jobs or default_at_once()))
        return 0
    from rich.console import Console

    from train.comparison.execute import Interrupted, carry_out, choose, opened
    from train.comparison.write import write
    from train.training.progress import Display

    out = given.out or Path("results-of") / given.recipe

    at_once = given.jobs or default_at_once()

    def say(text: str) -> None:
        print(printable(text), flush=True)

    with opened(out, plan):
        try:
            chosen = choose(plan, out, at_once=at_once, say=say)
            jobs = plan.jobs(chosen)
            carry_out(jobs, out, at_once=at_once, say=say, what="run")
        except Interrupted as stopped:
            say(f"Stopped; {shell_word(out)} has what is done. To go on, give the same command again:")
            say(f"  {same_command()}")
            return stopped.status
        for line in write(plan, jobs, chosen, out, Display(Console(markup=False, emoji=False, highlight=False))):
            say(line)
    return 0


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise RunError(f"--seeds {text}: write whole numbers, such as --seeds 0,1,2") from None


if __name__ == "__main__":
    sys.exit(main())
