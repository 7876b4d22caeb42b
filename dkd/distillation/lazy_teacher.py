"""A frozen teacher that is built when something first runs it: where its outputs are read from a cache, never."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dkd.distillation.teacher import FrozenTeacher
from dkd.errors import InputError, TrainingError
from dkd.global_batch.collectives import all_gather_objects
from dkd.models.compiling import Compiled


class LazyTeacher(torch.nn.Module):
    """Has FrozenTeacher's call. All ranks run it for the first time together.

    Args:
        build: returns the teacher on its device; a collective where it is cut into shards.
        facts: what identifies it, as `FrozenTeacher.facts`.
    """

    def __init__(self, build: Callable[[], FrozenTeacher], facts: Mapping[str, Any]) -> None:
        super().__init__()
        self._build, self._facts = build, dict(facts)
        self._built: FrozenTeacher | None = None
        self._compiled: Compiled = False

    @property
    def is_built(self) -> bool:
        """Return whether the teacher is there."""
        return self._built is not None

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of its weights."""
        return str(self._facts["fingerprint"])

    def facts(self) -> dict[str, Any]:
        """Return what identifies the teacher."""
        return dict(self._facts)

    def build(self) -> FrozenTeacher:
        """Return the teacher; the first call builds it. A collective.

        Raises:
            TrainingError: on every rank: it cannot be built, or its weights are no longer what they were.
        """
        if self._built is None:
            problem, built = None, None
            try:
                devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
                with torch.random.fork_rng(devices):  # a teacher that is drawn must not change what the student draws
                    built = self._build()
                if built.fingerprint != self.fingerprint:
                    problem = (
                        f"its weights are {built.fingerprint[:12]} now, and were {self.fingerprint[:12]} at the start"
                    )
            except (InputError, OSError) as error:
                problem = str(error)
            problems = [each for each in all_gather_objects(problem) if each is not None]
            if problems or built is None:
                raise TrainingError(f"the teacher cannot be built, which is needed now: {problems[0]}")
            built.compile(self._compiled)
            self._built = built
        return self._built

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Return what FrozenTeacher returns."""
        found: tuple[torch.Tensor | None, dict[str, torch.Tensor]] = self.build()(images)
        return found

    def train(self, mode: bool = True) -> LazyTeacher:
        """Stays in eval mode, as FrozenTeacher."""
        return super().train(False)

    def compile(self, how: Compiled = True) -> None:
        """Compile the teacher's forward once it is built, as `compile_model`."""
        self._compiled = how

    @contextmanager
    def with_logits(self) -> Iterator[None]:
        """Inside, its forward yields logits, as FrozenTeacher's. Builds the teacher."""
        with self.build().with_logits():
            yield
