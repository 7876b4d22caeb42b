"""Inspect a model: paths, output shapes, parameter counts, operations. Meta tensors are used where the model allows
them, so that nothing is computed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dkd.library_internals.torch import FakeTensorMode
from dkd.models.freezing import FreezingError, freeze
from dkd.models.registry import ModelSpec, UnknownModelError, build_model, runs_user_code
from dkd.models.tapped import TapError, TappedModel, feature_of
from dkd.user_code import describe_error


@dataclass(frozen=True)
class ModuleRow:
    """Describe one submodule."""

    path: str
    """Dotted path."""
    kind: str
    """Name of the class."""
    shape: tuple[int, ...] | None
    """Shape of the output for one image; None: the output is not one tensor."""
    parameters: int
    """Number of parameters, those of submodules included."""
    calls: int
    """Number of calls in one forward."""


P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def _ignored_no_ops() -> Iterator[None]:
    """Leave out torch's warning that weights are not copied to the meta device: a model that loads its own weights
    raises it, and is built there only for its shapes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is a no-op.*", category=UserWarning)
        yield


def run_on_meta(run: Callable[[], T]) -> T:
    """Call `run` with meta tensors; for a model that cannot be built or run with them (it reads values), call `run` on
    the CPU."""
    try:
        with torch.device("meta"), torch.no_grad(), _ignored_no_ops():
            return run()
    except (NotImplementedError, RuntimeError, UnknownModelError):
        with torch.no_grad():
            return run()


def build_on_meta(spec: ModelSpec) -> nn.Module:
    """Build the architecture on the meta device, which takes no memory and hardly any time; on the CPU where the model
    cannot be built there. Raises UnknownModelError."""
    return run_on_meta(lambda: build_model(spec))


@contextmanager
def naming_errors(spec: ModelSpec, images: str) -> Iterator[None]:
    """Turn whatever a model's forward raises into an UnknownModelError of one sentence."""
    try:
        yield
    except (UnknownModelError, TapError, FreezingError):
        raise
    except (Exception, SystemExit) as error:  # a model's own code may raise anything
        raise UnknownModelError(f"{spec.name!r} fails on {images}: {describe_error(error)}") from error


def _remember(function: Callable[P, T]) -> Callable[P, T]:
    """Remember the results of a function of a ModelSpec, since a check, a plan and a tap table call it with the same
    model again and again. Results for the user's own code are not remembered: the code may change."""
    known: dict[str, T] = {}

    @functools.wraps(function)
    def asked(*args: P.args, **kwargs: P.kwargs) -> T:
        spec = args[0]
        if not isinstance(spec, ModelSpec) or runs_user_code(spec.name):
            return function(*args, **kwargs)
        key = repr((args, kwargs))
        if key not in known:
            known[key] = function(*args, **kwargs)
        return known[key]

    return asked


@_remember
def unreached_parameters(
    spec: ModelSpec,
    batch: int,
    image_size: int,
    frozen: Sequence[str] = (),
    taps: Sequence[str] = (),
    reads_logits: bool = True,
) -> list[str]:
    """Return the names of the parameters that are to be trained and get no gradient, by a forward and a backward in
    training mode on meta tensors. None are returned for a model that cannot run there.

    Args:
        spec: the model.
        batch: the micro-batch; BatchNorm may need more than one sample.
        image_size: side of an image, pixels.
        frozen: paths of modules and parameters that are not trained.
        taps: dotted paths of the features that losses read.
        reads_logits: whether a loss reads the logits.

    Raises:
        FreezingError: as `freeze`.
        UnknownModelError: the forward fails.
        TapError: as TappedModel.
    """
    with naming_errors(spec, f"a training batch of {batch} images of {image_size}×{image_size}"):
        try:
            with _ignored_no_ops():
                plain = build_on_meta(spec).to("meta")
                freeze(plain, frozen)
                model = TappedModel(plain, taps).train()
            with torch.device("meta"):
                logits, features = model(torch.zeros(batch, 3, image_size, image_size))
                read = [*([logits] if reads_logits else []), *features.values()]
                for tensor in read:
                    if tensor.requires_grad:
                        tensor.sum().backward(retain_graph=True)
        except NotImplementedError:  # a model that reads values cannot run on meta; its first step shows the error
            return []
    return [
        name.removeprefix("model.")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]


Shape = tuple[int, ...]

_shapes_of: dict[str, tuple[Shape, dict[str, Shape]]] = {}
"""By model and image size: the shape of the logits, and of each tap that was asked for so far."""


def output_shapes(spec: ModelSpec, taps: Sequence[str], image_size: int) -> tuple[Shape, dict[str, Shape]]:
    """Return the shapes of the logits and of each tapped feature for one image, without the batch dimension. One
    forward computes all shapes that are not known yet. Checks the taps as TappedModel does.

    Args:
        spec: the model.
        taps: dotted paths.
        image_size: side of an image, pixels.

    Raises:
        UnknownModelError, TapError: there is no such model or tap.
    """

    def run() -> tuple[Shape, dict[str, Shape]]:
        logits, features = TappedModel(build_model(spec), unknown).eval()(torch.zeros(1, 3, image_size, image_size))
        return tuple(logits.shape[1:]), {tap: tuple(feature.shape[1:]) for tap, feature in features.items()}

    key = repr((spec, image_size))
    known = None if runs_user_code(spec.name) else _shapes_of.get(key)
    unknown = [tap for tap in taps if known is None or tap not in known[1]]
    if known is None or unknown:
        with naming_errors(spec, f"one image of {image_size}×{image_size}"):
            found = run_on_meta(run)
        known = (found[0], {**(known[1] if known else {}), **found[1]})
        if not runs_user_code(spec.name):
            _shapes_of[key] = known
    return known[0], {tap: known[1][tap] for tap in taps}


class _CudaAutocast(TorchFunctionMode):
    """Compute in float32 those functions at the end of a vision model's block that CUDA's autocast computes in float32
    and the CPU's does not."""

    _FLOAT32 = (F.layer_norm, F.group_norm, F.softmax, torch.softmax)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._FLOAT32:
            args = tuple(a.float() if isinstance(a, torch.Tensor) else a for a in args)
            with torch.autocast("cpu", enabled=False):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@_remember
def tap_dtypes(
    spec: ModelSpec, taps: Sequence[str], image_size: int, autocast: torch.dtype | None, device_type: str = "cuda"
) -> dict[str, torch.dtype]:
    """Return the dtype of each tapped feature of a float32 model in eval mode, by fake tensors: nothing is computed.

    Args:
        spec: the model.
        taps: dotted paths.
        image_size: side of an image, pixels.
        autocast: the type of autocast; None: no autocast.
        device_type: the kind of device whose autocast is meant.

    Raises:
        UnknownModelError, TapError: there is no such model or tap.
    """
    model = build_on_meta(spec)

    def run() -> dict[str, torch.dtype]:
        lists = _CudaAutocast() if device_type == "cuda" else nullcontext()
        with (
            lists,
            torch.no_grad(),
            torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None),
        ):
            _, features = TappedModel(model, taps).eval()(torch.zeros(1, 3, image_size, image_size))
        return {tap: feature.dtype for tap, feature in features.items()}

    with naming_errors(spec, f"one image of {image_size}×{image_size}"):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                model.to_empty(device="cpu")
                return run()
        except (NotImplementedError, RuntimeError):  # a model that reads values
            model = build_model(spec)
            return run()


@dataclass(frozen=True)
class ModelCost:
    """Hold the cost of a model.

    Args:
        parameters: number of parameters.
        tensor_bytes: bytes of parameters and buffers, in float32.
        forward: floating-point operations of a forward of one image (a multiplication and an addition are two); up to
            the last tap, where the logits are not needed.
        backward: floating-point operations of the backward, for weights and features.
    """

    parameters: int
    tensor_bytes: int
    forward: int
    backward: int


def model_cost(
    spec: ModelSpec, taps: Sequence[str], image_size: int, needs_logits: bool = True, training: bool = True
) -> ModelCost:
    """Count the cost of a model on meta tensors, for two images. No operations are counted for a model that cannot run
    on meta tensors.

    Args:
        spec, taps, image_size: the model, its taps, and the side of an image in pixels.
        needs_logits: as for TappedModel.
        training: training mode, with a backward; else eval mode without a backward.

    Raises:
        UnknownModelError: there is no such model.
    """
    # With logits, every layer is passed once, forward and backward, whichever features are tapped.
    return _count_cost(spec, () if needs_logits else tuple(taps), image_size, training)


@_remember
def _count_cost(spec: ModelSpec, taps: tuple[str, ...], image_size: int, training: bool) -> ModelCost:
    """Count the cost up to the last of `taps`, or up to the logits where there are no taps."""
    model = build_on_meta(spec)
    parameters = sum(p.numel() for p in model.parameters())
    nbytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    try:
        with torch.device("meta"), torch.set_grad_enabled(training):
            tapped = TappedModel(model.to("meta"), taps, needs_logits=not taps).train(training)
            images = torch.zeros(2, 3, image_size, image_size)
            with FlopCounterMode(display=False) as forward:
                logits, features = tapped(images)
            ends = [e for e in (logits, *features.values()) if e is not None and e.requires_grad]
            with FlopCounterMode(display=False) as backward:
                torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
    except Exception:  # a model's own code, which has run before: only the count is lost
        return ModelCost(parameters, nbytes, 0, 0)
    return ModelCost(parameters, nbytes, forward.get_total_flops() // 2, backward.get_total_flops() // 2)


def module_rows(spec: ModelSpec, image_size: int) -> list[ModuleRow]:
    """Return every submodule of the model, in the order of definition.

    Args:
        spec: which model.
        image_size: side of the square input image, pixels.

    Raises:
        UnknownModelError: there is no such model.
    """

    def run() -> list[ModuleRow]:
        model = build_model(spec).eval()
        shapes: dict[str, tuple[int, ...] | None] = {}
        calls: dict[str, int] = {}

        def note(path: str, output: object) -> None:
            feature = feature_of(output)
            shapes[path] = None if feature is None else tuple(feature.shape[1:])
            calls[path] = calls.get(path, 0) + 1

        for path, module in model.named_modules():
            module.register_forward_hook(lambda _module, _inputs, output, path=path: note(path, output))
        model(torch.zeros(1, 3, image_size, image_size))
        return [
            ModuleRow(
                path,
                type(module).__name__,
                shapes.get(path),
                sum(p.numel() for p in module.parameters()),
                calls.get(path, 0),
            )
            for path, module in model.named_modules()
        ]

    with naming_errors(spec, f"one image of {image_size}×{image_size}"):
        return run_on_meta(run)
