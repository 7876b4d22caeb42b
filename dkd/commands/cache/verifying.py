"""`dkd cache verify`: whether what is stored is intact, and the same as what the teacher yields now."""

from __future__ import annotations

import argparse
from pathlib import Path

from dkd import console
from dkd.commands.cache.listing import describe
from dkd.commands.errors import read_launch
from dkd.preflight.refusals import input_errors_as_recipe_errors
from dkd.teacher_cache.folder import summaries

_STEPS = 5


def verify(root: Path, options: argparse.Namespace) -> int:
    """Read everything, compare with the live teacher where a recipe is given, print what was found, and return the exit
    code: 0, or 1 where something is damaged or differs."""
    problems = 0
    for summary in summaries(root, contents=True):
        console.show(*describe(summary))
        console.show(f"  {'damaged: ' + str(len(summary.problems)) + ' files' if summary.problems else 'intact'}")
        problems += len(summary.problems)
    if options.recipe is not None:
        problems += _compare(root, options)
    return 1 if problems else 0


def _compare(root: Path, options: argparse.Namespace) -> int:
    """Compare losses of a few steps with the live teacher and with the cache. Returns how many differ that should
    not."""
    launch = read_launch()

    from dkd.config import RecipeError, load_recipe
    from dkd.config.derived import caches
    from dkd.preflight.check import check
    from dkd.preflight.completion import complete
    from dkd.training.cache_check import compare_with_teacher

    with input_errors_as_recipe_errors():
        recipe = load_recipe(options.recipe, options.overrides)
        named = {Path(section.dir).resolve() for section in caches(recipe).values()}
        if root.resolve() not in named:
            raise RecipeError.at("teacher.cache", f"is not {str(root)!r}: give teacher.cache={root}")
        recipe, _ = complete(recipe)
        check(recipe, launch, None)
        found = compare_with_teacher(recipe, launch, options.steps or _STEPS)
    if not found.steps:
        console.show("no step of this recipe is stored")
        return 1
    steps = ", ".join(str(step + 1) for step in found.steps)
    console.show(f"losses of the untrained student, as means over the steps {steps}:")
    console.show(f"  {'loss':<24}{'live teacher':>16}{'cache':>16}{'largest difference':>22}")
    for name, term in found.terms.items():
        difference = "none, bit for bit" if term.largest == 0 else f"{term.largest:.3g}"
        console.show(f"  {name:<24}{term.live:>16.8g}{term.stored:>16.8g}{difference:>22}")
    if found.left_out:
        console.show(f"  not compared, since they keep a state: {', '.join(found.left_out)}")
    if found.other_images:
        numbers = ", ".join(str(step + 1) for step in found.other_images)
        console.show(f"the images of the steps {numbers} are not those that the teacher saw: the data have changed")
        return len(found.other_images)
    differing = [name for name, term in found.terms.items() if term.largest > 0]
    if differing and found.is_exact:
        console.show(
            f"{', '.join(differing)}: the cache was filled on another kind of device or by another version of torch, "
            "whose last bits differ; or it is wrong"
        )
        return len(differing)
    return 0
