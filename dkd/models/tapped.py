"""Wrap a model so that its forward returns features too.

Taps are dotted module paths. Features are returned as outputs, so that every engine that wraps the model (DDP, FSDP2,
ZeRO) sees them.

Adapters are modules beside the model that read what it yields, such as the regressor of a loss. They are trained with
the model, by the same engine, and are no part of it: `model` is the plain student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from dkd.errors import InputError
from dkd.library_internals.torch import change_count
from dkd.models.weight_casts import WeightCasts
from dkd.text import did_you_mean


class TapError(InputError):
    """A tap does not exist, does not fire exactly once, yields no tensor, or is changed in place after it was read."""


class _LastTapReached(Exception):
    """Stop a forward whose logits are not needed. Never leaves this module."""


class Adapter(NamedTuple):
    """Hold a module that is trained with the model, and what it is called with."""

    module: nn.Module
    """Returns one tensor, or a sequence of tensors."""
    read: Callable[[torch.Tensor | None, Mapping[str, torch.Tensor], Mapping[str, Any]], Sequence[Any]]
    """(logits, features, what the forward was given) -> the arguments of the module."""


ADAPTERS = "losses/"
"""The beginning of the names of adapters and of what they yield: no path of a module has a slash."""


_PREFIX = "loss_"


def adapter_name(name: str) -> str | None:
    """Return, for the name of a tensor of a TappedModel, what an adapter's tensor is called beside a plain model's;
    None: it is the model's own."""
    beginning = f"adapters.{_PREFIX}"
    return ADAPTERS + name.removeprefix(beginning) if name.startswith(beginning) else None


def adapted_key(name: str, number: int = 0) -> str:
    """Return the key among a model's features of an adapter's output."""
    return f"{ADAPTERS}{name}/{number}"


def adapted_keys(features: Mapping[str, torch.Tensor], name: str) -> list[str]:
    """Return the keys of all that an adapter has yielded, in order."""
    return [key for key in features if key.startswith(f"{ADAPTERS}{name}/")]


def run_adapter(
    name: str,
    adapter: Adapter,
    logits: torch.Tensor | None,
    features: Mapping[str, torch.Tensor],
    given: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """Return what an adapter yields, each tensor by its key."""
    outputs = adapter.module(*adapter.read(logits, features, given))
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    if not isinstance(outputs, list | tuple) or not all(isinstance(output, torch.Tensor) for output in outputs):
        raise TapError(f"the module that the loss {name!r} trains returned {type(outputs).__name__}, not tensors")
    return {adapted_key(name, number): output for number, output in enumerate(outputs)}


class TappedModel(nn.Module):
    """Wrap `model`, so that forward(images) returns (logits, {path: feature}).

    Args:
        model: any module whose forward returns the logits, or a mapping that holds them as `logits`, as the models of
            transformers do. The model is not changed: hooks only read.
        taps: dotted paths of submodules whose outputs are wanted, such as `layer4` or `blocks.11`.
        needs_logits: False stops the forward after the last tap, and the logits are None. In a compiled model, the rest
            is dead code, which the compiler removes.
        autocast: the type that the forward computes in where torch.autocast allows; None: the model's own. Autocast is
            inside the module, so that it is the same under every engine.
        eval_modules: modules of `model` that stay in eval mode while the rest trains, such as frozen BatchNorm.
        adapters: by name. Their outputs are among the features, by `adapted_key`, in forwards that are given something.

    Raises:
        TapError: on construction, for a path that does not exist, with the nearest names; in forward, for a tap that
            does not fire exactly once, whose output is no tensor, or whose tensor is changed in place afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[str],
        needs_logits: bool = True,
        autocast: torch.dtype | None = None,
        eval_modules: Sequence[nn.Module] = (),
        adapters: Mapping[str, Adapter] | None = None,
    ) -> None:
        super().__init__()
        self.autocast = autocast
        self.model = model
        self._eval_modules = tuple(eval_modules)
        # The names of losses are the user's, and may be those of a ModuleDict's own attributes.
        self.adapters = nn.ModuleDict({_PREFIX + name: adapter.module for name, adapter in (adapters or {}).items()})
        self._read = {name: adapter.read for name, adapter in (adapters or {}).items()}
        self.taps = tuple(dict.fromkeys(taps))
        self.needs_logits = needs_logits or not taps
        self._casts: WeightCasts | None = None
        self._fired: dict[str, list[tuple[torch.Tensor, int]]] = {}
        paths = dict(model.named_modules())
        for tap in self.taps:
            if tap not in paths or not tap:
                raise TapError(
                    f"{tap!r} is not a module of {type(model).__name__}" + did_you_mean(tap, paths, most=3, cutoff=0.4)
                )
            paths[tap].register_forward_hook(self._make_reader(tap))

    def _make_reader(self, tap: str) -> Any:
        """Return the hook that reads a tap."""

        def read(module: nn.Module, inputs: Any, output: Any) -> None:
            feature = feature_of(output)
            if feature is None:
                raise TapError(f"{tap!r} yields {type(output).__name__}, not a tensor; tap a module inside it")
            self._fired.setdefault(tap, []).append((feature, _version(feature)))
            if not self.needs_logits and len(self._fired) == len(self.taps) and not torch.compiler.is_compiling():
                raise _LastTapReached

        return read

    def cast_together(self, together: bool = True) -> None:
        """Cast the weights by one operation in training, and not layer by layer, where the forward is under autocast:
        for a student whose gradients no engine waits for, and which is not compiled."""
        self._casts = None if self.autocast is None or not together else WeightCasts(self.model, self.autocast)

    def named_adapters(self) -> dict[str, nn.Module]:
        """Return the adapters by name."""
        return {name.removeprefix(_PREFIX): module for name, module in self.adapters.items()}

    def train(self, mode: bool = True) -> TappedModel:
        """Set training or eval mode, but for the modules that stay in eval mode."""
        super().train(mode)
        for module in self._eval_modules:
            module.eval()
        return self

    def forward(
        self, images: torch.Tensor, given: Mapping[str, Any] | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Return logits (b, K) or None, and the feature of each tap, for images (b, 3, H, W).

        Args:
            images: of a batch.
            given: what adapters read beside logits and features, such as the teacher's features; `rows`, where there,
                is the number of images that they are for, from the first one on, and `adapters` the names of those that
                run. None: none does, as in an evaluation.

        Raises:
            TapError: as the class states.
        """
        self._fired = {}
        logits = None
        try:
            with self._autocast(images):
                called = self._casts if self._casts is not None and self.training else self.model
                logits = called(images)
        except _LastTapReached:
            # Hooks after the last tap did not run; FSDP2's hook would have freed the weights gathered for that block.
            for module in self.model.modules():
                getattr(module, "reshard", _do_nothing)()
        finally:
            fired, self._fired = self._fired, {}
        logits = logits_in(logits)
        if logits is not None and not isinstance(logits, torch.Tensor):
            raise TapError(f"{type(self.model).__name__} returns {type(logits).__name__}, not the logits as one tensor")
        features = {}
        for tap in self.taps:
            readings = fired.get(tap, [])
            if len(readings) != 1:
                raise TapError(f"{tap!r} fired {len(readings)} times in one forward; a tap must fire exactly once")
            feature, version = readings[0]
            if _version(feature) != version:
                raise TapError(
                    f"{tap!r} is changed in place after it was read (is an in-place activation after it?); tap the "
                    "module after it"
                )
            features[tap] = feature
        if given is not None and self._read:
            features |= self._adapt(images, logits, features, given)
        return (logits if self.needs_logits else None), features

    def _adapt(
        self,
        images: torch.Tensor,
        logits: torch.Tensor | None,
        features: Mapping[str, torch.Tensor],
        given: Mapping[str, Any],
    ) -> dict[str, torch.Tensor]:
        """Return what the adapters yield, each tensor by its key."""
        rows = given.get("rows", len(images))
        logits = None if logits is None else logits[:rows]
        features = {path: feature[:rows] for path, feature in features.items()}
        found: dict[str, torch.Tensor] = {}
        with self._autocast(images):
            for name in filter(self._read.__contains__, given.get("adapters", self._read)):
                adapter = Adapter(self.adapters[_PREFIX + name], self._read[name])
                found |= run_adapter(name, adapter, logits, features, given)
        return found

    def _autocast(self, images: torch.Tensor) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(images.device.type, dtype=self.autocast)


class LogitsOnly(nn.Module):
    """Wrap a model, so that forward(images) returns the logits (b, K) alone, also for a model of transformers.

    Args:
        model: as for TappedModel.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Any:
        """Return the logits for images (b, 3, H, W)."""
        return logits_in(self.model(images))


def logits_in(output: Any) -> Any:
    """Return the logits of a model's output: the output itself, or `logits` of a mapping, as transformers' models
    yield."""
    return output["logits"] if isinstance(output, Mapping) and "logits" in output else output


def feature_of(output: Any) -> torch.Tensor | None:
    """Return the feature that a module's output is or begins with: blocks of transformers' models yield tuples that
    begin with the hidden states, or mappings that hold `last_hidden_state`. None: there is none."""
    if isinstance(output, Mapping):
        output = output.get("last_hidden_state")
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


def _do_nothing() -> None:
    pass


def _version(tensor: torch.Tensor) -> int:
    # Tensors of a traced graph have no version; the check has run in eager mode before anything is compiled.
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else change_count(tensor)
