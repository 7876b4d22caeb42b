"""`dkd cache list | verify | prune`: arguments and examples."""

from __future__ import annotations

import argparse
from pathlib import Path

from dkd.commands.arguments import IMPORTS_CODE, add_overrides, positive
from dkd.commands.command import Command
from dkd.errors import InputError

_EXAMPLES = """
examples:
  dkd cache list /data/taught                             what is stored: teachers, epochs, sizes
  dkd cache verify /data/taught                           read everything, and compare it with its digests
  dkd cache verify /data/taught --recipe recipe.yaml      and compare losses of a few steps with the live teacher:
                                                          what teacher.cache.store: bf16 or topk:N changes
  dkd cache prune /data/taught                            remove damaged parts and what killed processes have left
  dkd cache prune /data/taught --key 1f0c2b...            remove what one teacher has stored
  dkd cache prune /data/taught --unused-for 30            remove keys that nothing was added to for 30 days
"""
_ACTIONS = ("list", "verify", "prune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd cache`."""
    parser.add_argument("action", choices=_ACTIONS, help="what to do")
    parser.add_argument("folder", metavar="DIR", help="the folder that recipes name in teacher.cache")
    parser.add_argument("--recipe", metavar="RECIPE", help=f"verify: a recipe that reads this cache. {IMPORTS_CODE}")
    parser.add_argument("--steps", type=positive, metavar="N", help="verify --recipe: steps to compare (default: 5)")
    parser.add_argument("--key", metavar="KEY", help="prune: remove this key, as `dkd cache list` names it")
    parser.add_argument("--unused-for", type=positive, metavar="DAYS", help="prune: remove keys that are older")
    parser.add_argument("--dry-run", action="store_true", help="prune: show what would be removed")
    add_overrides(parser, "verify --recipe: keys of the recipe to override")


def run(options: argparse.Namespace) -> int:
    """Run the action, and return the exit code: 0, or 1 where something is damaged or differs."""
    folder = Path(options.folder)
    for name, actions in (("recipe", "verify"), ("key", "prune"), ("unused_for", "prune"), ("dry_run", "prune")):
        if getattr(options, name) and options.action != actions:
            raise InputError(f"--{name.replace('_', '-')} belongs to: dkd cache {actions}")
    if options.steps is not None and options.recipe is None:
        raise InputError("--steps belongs to: dkd cache verify DIR --recipe RECIPE")
    if options.overrides and options.recipe is None:
        raise InputError(f"{options.overrides[0]!r}: keys of a recipe belong to: dkd cache verify DIR --recipe RECIPE")
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no folder")

    from dkd.commands.cache import listing, pruning, verifying

    if options.action == "list":
        return listing.show(folder)
    if options.action == "prune":
        return pruning.prune(folder, options.key, options.unused_for, options.dry_run)
    return verifying.verify(folder, options)


COMMAND = Command(
    "cache",
    "List, verify or prune the stored outputs of teachers.",
    _EXAMPLES,
    add_arguments,
    run,
    "Look at a folder of teacher.cache: list what is stored, verify that it is intact and what its approximations "
    "change, or prune what is damaged or no longer wanted. Trainings may use the folder meanwhile.",
)
