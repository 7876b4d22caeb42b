"""From a recipe to what its losses read of a teacher that has a cache, and to the cache."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dkd.build.compared_tensors import compared_tensors
from dkd.build.data import DataParts, build_image_pipeline
from dkd.build.feature_losses import Shapes, tapped_shapes
from dkd.build.models import teacher_spec
from dkd.build.objective import build_objective
from dkd.config import Recipe, RecipeError
from dkd.config.derived import caches, data_seed, teacher_key, teacher_views
from dkd.config.losses import ENSEMBLE
from dkd.config.teacher_cache import CacheSection
from dkd.data import GlobalBatchSampler, StreamedBatchSampler
from dkd.distillation import FeatureTerm, LogitTerm, Objective
from dkd.distillation.stored_teacher import (
    IMAGE_SUMS,
    Reads,
    RelationsRead,
    SamplesRead,
    Share,
    StoredTeacher,
    compares_relations,
    reader_of,
)
from dkd.engines.arithmetic import Arithmetic
from dkd.global_batch import GramTensor, ranks_per_group
from dkd.global_batch.collectives import all_gather_objects
from dkd.losses import RelationalLoss
from dkd.models.code_version import code_version
from dkd.provenance import packages
from dkd.teacher_cache import CacheKey, StepCache, Turn, Value
from dkd.teacher_cache.key import CacheError


def cache_key(
    view: Recipe, fingerprint: str, data: Mapping[str, Any], sampler: GlobalBatchSampler, normalize: Any
) -> CacheKey:
    """Return what everything in a teacher's cache depends on.

    Args:
        view: the recipe as if this teacher were the only one, settled.
        fingerprint: of its weights.
        data: number and fingerprints of the training images.
        sampler: the order of samples.
        normalize: of the teacher's input.
    """
    teacher, train, images = view.teacher, view.train, view.data
    assert teacher is not None
    order, mixing = _order_facts(view, sampler)
    size = build_image_pipeline(view).train_size
    return CacheKey(
        {
            "teacher": {
                "name": teacher.name,
                "fingerprint": fingerprint,
                "code": code_version(teacher.name, teacher_spec(view).classes, teacher.options),
                "classes": teacher_spec(view).classes,
                "norm": teacher.norm,
                "options": teacher.options,
                "input_size": teacher.input_size or size,
            },
            "input": {
                "transforms": images.transforms,
                "image_size": size,
                "mean": list(normalize.mean),
                "std": list(normalize.std),
            },
            "data": dict(data),
            "order": order,
            "mixing": mixing,
            "arithmetic": {
                "precision": train.precision,
                "weights_dtype": teacher.weights_dtype,
                "channels_last": train.channels_last,
                "compiled": train.compile.teacher,
            },
        }
    )


def _order_facts(view: Recipe, sampler: GlobalBatchSampler) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return on what the order of samples depends, and on what their mixing."""
    images = view.data
    order: dict[str, Any] = {"seed": data_seed(view), "period": images.augmentation_period, "kind": "shuffled"}
    if sampler.repeats > 1:  # which copy an image is depends on B/R
        order |= {"repeats": sampler.repeats, "global_batch": sampler.global_batch}
    if isinstance(sampler, StreamedBatchSampler):
        lanes, window = sampler.lanes, sampler.window
        order |= {"kind": "streamed", "global_batch": sampler.global_batch, "lanes": lanes, "window": window}
    mixing: dict[str, Any] = {"mixup": images.mixup, "cutmix": images.cutmix}
    if images.mixup or images.cutmix:
        mixing |= {"global_batch": sampler.global_batch, "micro_batch": sampler.micro_batch}
    return order, mixing


@dataclass(frozen=True)
class _Forms:
    """Makes the values of one teacher."""

    section: CacheSection
    full: torch.dtype
    own: torch.dtype

    def value(
        self, name: str, facts: Mapping[str, Any], shape: tuple[int, ...], promoted: bool = True, logits: bool = False
    ) -> Value:
        """Return a value in the form that the recipe asks for."""
        dtype = self.full if promoted else self.own
        form = "exact"
        if self.section.store == "bf16" and dtype in (torch.float32, torch.float64):
            form = "bf16"
        if self.section.top is not None and logits:
            form = self.section.store
        return Value(name.replace(" ", "_"), facts, shape, dtype, form)


def build_reads(
    view: Recipe,
    name: str,
    objective: Objective,
    shapes: tuple[Shapes, Mapping[str, Shapes]],
    share: Share,
    device: torch.device,
) -> Reads:
    """Return what the losses read of a teacher that has a cache. A collective, where losses compare samples.

    Args:
        view: the recipe as if this teacher were the only one, settled.
        name: of the teacher; of one alone, the name is empty.
        objective: of the recipe.
        shapes: of the features, as `tapped_shapes`.
        share: of this rank.
        device: of the features.
    """
    forms, logits = _forms_of(view), _logits_read(view, name, objective)
    samples, relations = [], []
    for term in objective.terms:
        if not isinstance(term, FeatureTerm) or term.teacher != name:
            continue
        if compares_relations(term):
            relations.append(_relations_read(view, term, share, device, forms))
        else:
            samples.append(_samples_read(term, shapes[0], shapes[1][name], forms))
    return Reads(logits, samples, relations, share, IMAGE_SUMS)


def _forms_of(view: Recipe) -> _Forms:
    assert view.teacher is not None
    assert view.teacher.cache is not None
    arithmetic = Arithmetic.of(view)
    return _Forms(view.teacher.cache, arithmetic.dtype, arithmetic.autocast or arithmetic.dtype)


def _logits_read(view: Recipe, name: str, objective: Objective) -> Value | None:
    """Return the logits of a teacher, where a loss reads them."""
    if not any(isinstance(term, LogitTerm) and term.teacher in (name, ENSEMBLE) for term in objective.terms):
        return None
    outputs = teacher_spec(view).classes
    return _forms_of(view).value("logits", {"what": "logits"}, (outputs,), promoted=False, logits=True)


def _samples_read(term: FeatureTerm, student: Shapes, teacher: Shapes, forms: _Forms) -> SamplesRead:
    reader = reader_of(term)
    assert reader is not None, "preflight refuses it"
    shapes = [(tuple(student[s]), tuple(teacher[t])) for s, t in term.pairs]
    values = [
        forms.value(f"{form.what}.{path}", {"what": form.what, "tap": path, **form.facts}, form.shape, form.promoted)
        for (_, path), form in zip(term.pairs, reader.sample_forms(shapes), strict=True)
    ]
    return SamplesRead(term, reader, shapes, values)


def _relations_read(
    view: Recipe, term: FeatureTerm, share: Share, device: torch.device, forms: _Forms
) -> RelationsRead:
    whole = term.relational and share.micro_steps > 1
    loss: Any = term.loss
    tensors: list[GramTensor] = []
    if isinstance(loss, RelationalLoss):
        size, half = build_image_pipeline(view).train_size, loss.comm_dtype is not None
        tensors = compared_tensors(view, term.pairs, half, loss.shift_invariant, size, device.type)
    place = loss.settle(tensors, share.layout(None if whole else 0), device)
    values = _relation_values(term, share, place.layout.world_size, forms)
    return RelationsRead(term, whole, place, share, values)


def _relation_values(term: FeatureTerm, share: Share, ranks: int, forms: _Forms) -> list[Value]:
    """Return the rows of relations of each pair, of the samples of so many ranks."""
    loss: Any = term.loss
    whole = term.relational and share.micro_steps > 1
    compared = ranks * share.micro_batch * (share.micro_steps if whole else 1)
    batch = share.micro_batch * share.micro_steps * share.world_size
    facts = {"what": "relations", **loss.relation_facts(), "batch": batch}
    if compared != batch:  # which samples these are depends on how they are spread over ranks and micro-steps
        facts |= {
            "compared": compared,
            "of": "step" if whole else "micro-step",
            "ranks": ranks,
            "micro_batch": share.micro_batch,
            "world_size": share.world_size,
        }
    return [forms.value(f"relations.{path}", {**facts, "tap": path}, (compared,)) for _, path in term.pairs]


def planned_values(recipe: Recipe, share: Share, local_world_size: int) -> dict[str, list[Value]]:
    """Return, by the name of each teacher that has a cache, what is stored, without models, data or ranks.

    Args:
        recipe: settled.
        share: of a rank.
        local_world_size: ranks of a machine.

    Raises:
        UserCodeError: a loss of the user's own cannot be made.
    """
    sections = caches(recipe)
    if not sections:
        return {}
    batch = share.micro_batch * share.micro_steps * share.world_size
    sampler = GlobalBatchSampler(batch, 0, batch, share.micro_batch, 0, share.world_size)
    objective, shapes = build_objective(recipe, sampler, 1, torch.device("meta")), tapped_shapes(recipe)
    views, found = dict(teacher_views(recipe)), dict[str, list[Value]]()
    for name in sections:
        forms, logits = _forms_of(views[name]), _logits_read(views[name], name, objective)
        values = [IMAGE_SUMS] if logits is None else [IMAGE_SUMS, logits]
        for term in objective.terms:
            if not isinstance(term, FeatureTerm) or term.teacher != name:
                continue
            if compares_relations(term):
                loss: Any = term.loss
                ranks = ranks_per_group(loss.scope.scope, share.world_size, local_world_size)
                values += _relation_values(term, share, ranks, forms)
            elif reader_of(term) is not None:
                values += _samples_read(term, shapes[0], shapes[1][name], forms).values
        found[name] = list(dict.fromkeys(values))
    return found


def made_by(device: torch.device) -> dict[str, Any]:
    """Return what describes the process that computes, for people."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found = packages()
    return {"device": f"{device.type} {kind}", "torch": found["torch"], "dkd": found["dkd"]}


def open_caches(
    recipe: Recipe,
    objective: Objective,
    data: DataParts,
    fingerprints: Mapping[str, str],
    content: Mapping[str, str],
    device: torch.device,
    last_step: int,
) -> dict[str, StoredTeacher]:
    """Return, by name, what gives the outputs of each teacher that has a cache. A collective.

    Args:
        recipe: settled.
        objective: of the recipe.
        data: of this rank.
        fingerprints: of the weights of each teacher, by name.
        content: as `sampled_content`.
        device: of this rank.
        last_step: of the run.

    Raises:
        RecipeError: on every rank: a cache cannot be opened.
    """
    sampler, found = data.sampler, {}
    views = [(name, view) for name, view in teacher_views(recipe) if view.teacher is not None and view.teacher.cache]
    if not views:
        return {}
    share = Share(sampler.rank, sampler.world_size, sampler.micro_batch, sampler.micro_steps)
    shapes = tapped_shapes(recipe)
    turn = Turn(sampler.global_batch, sampler.steps_per_epoch, sampler.period, last_step)
    for name, view in views:
        assert view.teacher is not None
        section = view.teacher.cache
        assert section is not None
        key = cache_key(view, fingerprints[name], {**data.facts, **content}, sampler, data.teacher_normalize[name])
        reads = build_reads(view, name, objective, shapes, share, device)
        cache, problem = None, None
        try:
            cache = StepCache(Path(section.dir), key, reads.needs(), turn, section.fill, made_by(device))
        except OSError as error:
            problem = f"{section.dir!r} cannot be used: {error.strerror or error}"
        except CacheError as error:
            problem = str(error)
        problems = [each for each in all_gather_objects(problem) if each is not None]
        if problems or cache is None:
            raise RecipeError.at(f"{teacher_key(name)}.cache", problems[0])
        found[name] = StoredTeacher(reads, cache)
    return found
