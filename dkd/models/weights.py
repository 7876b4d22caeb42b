"""Load weights from a local file or by torchvision's names, and compute a fingerprint of weights.

Files are read without running code that they hold: as safetensors, or by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from dkd.errors import InputError
from dkd.models.foreign_names import our_names
from dkd.models.hugging_face import HuggingFaceError, is_hugging_face, label_count, pretrained_state
from dkd.text import one_line, shorten

FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
_NESTED_KEYS = ("state_dict_ema", "state_dict", "model", "model_state_dict")
"""Keys under which torch files hold the tensors. timm's training writes the first, its average of the weights, beside
the second, and timm itself loads the average."""


AS_BUILT = "as_built"
"""In place of weights: those that the model's own constructor has loaded."""
PRETRAINED = "pretrained"
"""In place of weights: those that the library of the model has for its name."""


class WeightsError(InputError):
    """Weights are missing, cannot be read, or do not fit the model."""


def is_file_name(weights: str) -> bool:
    """Return whether `weights` names a file, rather than one of torchvision's weight sets."""
    if weights in (AS_BUILT, PRETRAINED):
        return False
    return weights.endswith(FILE_SUFFIXES) or "/" in weights or Path(weights).exists()


@dataclass(frozen=True)
class Head:
    """What becomes of a model's head, where weights were trained on other classes.

    Args:
        keys: of the head's tensors.
        mode: `keep`: they come from the weights. `new`: they stay as the model has them. `auto`: they stay where the
            weights have other shapes for them.
    """

    keys: Collection[str]
    mode: str = "auto"

    def stays(self, wanted: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
        """Return the keys that the weights do not fill.

        Args:
            wanted, state: the tensors of the model and of the weights, by name.
        """
        differs = any(key in state and state[key].shape != wanted[key].shape for key in self.keys)
        return list(self.keys) if self.mode == "new" or (self.mode == "auto" and differs) else []


KEEP_HEAD = Head((), "keep")


def load_weights(
    model: nn.Module, name: str, weights: str, head: Head = KEEP_HEAD, options: Mapping[str, Any] | None = None
) -> list[str]:
    """Fill `model` from `weights`, which must hold every tensor of the model and no other, but for a new head.

    Args:
        model: the model.
        name: the name that the model was built by.
        weights: a file (.safetensors, or a torch file of tensors); for `torchvision/...` models the name of a weight
            set such as IMAGENET1K_V1, which torchvision downloads and checks; `pretrained` for torchvision's default
            set, and for what timm and transformers have for the name; or `as_built`, which leaves the model as it is.
        head: what becomes of a head of other classes.
        options: that the model was built with, for `pretrained`.

    Returns:
        The keys that stay as the model had them: those of a new head.

    Raises:
        WeightsError: the file cannot be read, or keys are missing, unexpected or of another shape.
    """
    if weights == AS_BUILT:
        return []
    # Old files lack BatchNorm's counters; `stream_weights` has checked that everything else is there.
    state = model.state_dict()
    filled = set()
    with torch.no_grad():
        for key, tensor in stream_weights(model, name, weights, head, options):
            state[key].copy_(tensor)
            filled.add(key)
    return [key for key in head.keys if key not in filled]


def stream_weights(
    model: nn.Module, name: str, weights: str, head: Head = KEEP_HEAD, options: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key, tensor) of everything that `load_weights` would fill `model` with, one whole tensor at a time: a
    safetensors file is never in memory as a whole. The model may be on the meta device. All keys and shapes are checked
    before the first tensor is yielded. Arguments and errors as for `load_weights`."""
    path = Path(weights)
    if path.is_dir() and (path / "student.safetensors").is_file():
        path = path / "student.safetensors"
    if not is_file_name(weights) or path.suffix != ".safetensors":
        found = read_file(path) if is_file_name(weights) else _download(name, weights, options or {})
        state = _rename(found, model)
        stays = _check_fit(model, name, weights, state, head)
        return ((key, tensor) for key, tensor in state.items() if key not in stays)
    stays = _check_fit(model, name, weights, _rename(read_file(path, device="meta"), model), head)
    return _stream_safetensors(path, list(model.state_dict()), stays)


def _stream_safetensors(path: Path, wanted: list[str], stays: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        names = {key: ours for key, ours in our_names(file.keys(), wanted).items() if ours not in stays}
    for key, ours in names.items():
        # The file is opened for each tensor: the parts of a mapped file that were read count as memory of the process
        # until the file is closed.
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(key)
        yield ours, tensor
        del tensor


def check_weights(model: nn.Module, name: str, weights: str, head: Head = KEEP_HEAD) -> None:
    """Check whether `load_weights` would succeed, without reading or downloading tensors, as far as can be known
    without them. Raises WeightsError."""
    if is_file_name(weights):
        _check_fit(model, name, weights, _rename(read_file(Path(weights), device="meta"), model), head)
        return
    if weights == AS_BUILT:
        if ":" not in name:
            raise WeightsError(
                f"{AS_BUILT} is for module:callable, whose code loads weights; {name!r} loads none: take {PRETRAINED}"
            )
        return
    if weights == PRETRAINED and (name.startswith("timm/") or is_hugging_face(name)):
        # Everything else is known once the library has fetched them.
        found, own = (
            _library_head_size(name),
            next((t.shape[0] for k, t in model.state_dict().items() if k in head.keys), None),
        )
        if head.mode == "keep" and None not in (found, own) and found != own:
            raise WeightsError(f"{weights!r} of {name} has {found} classes, the model {own}")
        return
    categories = find_weight_set(name, weights).meta.get("categories", [])
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    if head.mode == "keep" and categories and last and last[0].out_features != len(categories):
        raise WeightsError(f"{weights!r} of {name} has {len(categories)} classes, the model {last[0].out_features}")


def head_size(model: nn.Module, name: str, weights: str, head: Collection[str]) -> int | None:
    """Return the number of classes that a file of weights was trained on: the first size of a tensor of the head. None:
    it cannot be known without loading, or the file has no head.

    Args:
        model: of any number of classes; may be on the meta device.
        name, weights: as for `load_weights`.
        head: keys of the head's tensors.

    Raises:
        WeightsError: the file cannot be read.
    """
    if not is_file_name(weights):
        if name.startswith("torchvision/"):
            return len(find_weight_set(name, weights).meta.get("categories", [])) or None
        return _library_head_size(name) if weights == PRETRAINED else None
    state = _rename(read_file(Path(weights), device="meta"), model)
    return next((state[key].shape[0] for key in head if key in state and state[key].dim() > 0), None)


def _library_head_size(name: str) -> int | None:
    if is_hugging_face(name):
        return label_count(name)
    if name.startswith("timm/"):
        from timm.models import get_pretrained_cfg

        found = get_pretrained_cfg(name.removeprefix("timm/"))
        return None if found is None else found.num_classes
    return None


def _check_fit(
    model: nn.Module, name: str, weights: str, state: Mapping[str, torch.Tensor], head: Head = KEEP_HEAD
) -> list[str]:
    """Return the keys that stay as the model has them. Raises WeightsError when the others do not fit."""
    all_wanted = model.state_dict()
    stays = head.stays(all_wanted, state)
    wanted = {key: tensor for key, tensor in all_wanted.items() if key not in stays}
    other_shape = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    problems = []
    for title, keys in (
        ("missing", [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]),
        ("unexpected", [key for key in state if key not in all_wanted]),
        (
            "of another shape",
            [f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}" for key in other_shape],
        ),
    ):
        if keys:
            problems.append(f"{len(keys)} {title}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}")
    if problems:
        raise WeightsError(f"{weights!r} does not fit {name!r}: {'; '.join(problems)}{_advise(wanted, state, head)}")
    return stays


def _advise(wanted: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], head: Head) -> str:
    """Return what helps where the head is all that does not fit, as the end of a message."""
    wrong = {key for key in wanted if key not in state or state[key].shape != wanted[key].shape}
    wrong |= {key for key in state if key not in wanted}
    if not head.keys or not wrong <= set(head.keys):
        return ""
    found = next((state[key].shape[0] for key in head.keys if key in state), None)
    of_teacher = f"; for a teacher set teacher.classes={found}, and compare no logits" if found else ""
    return f"; with student.head=new the head starts at random, and all else comes from the weights{of_teacher}"


def read_file(path: Path, device: str = "cpu") -> Mapping[str, torch.Tensor]:
    """Return the tensors of a weights file by name. On the `meta` device, only their shapes are read.

    A torch file may hold the tensors under `state_dict` or `model`.

    Raises:
        WeightsError: there is no such file, or it cannot be read safely.
    """
    if path.is_dir() and (path / "student.safetensors").is_file():
        path = path / "student.safetensors"
    if not path.is_file():
        raise WeightsError(f"no such file: {str(path)!r}")
    try:
        with path.open("rb"):  # the libraries' errors would hide that this process may not read the file
            pass
    except OSError as error:
        raise WeightsError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    try:
        if path.suffix == ".safetensors":
            return _read_shapes(path) if device == "meta" else load_file(path, device)
        # RepDistiller puts a namespace of options beside the weights, which is data like a dictionary.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # unpickling garbage raises anything; torch's message advises to unpickle it unsafely
        raise WeightsError(
            f"{str(path)!r} cannot be read as a file of tensors ({type(error).__name__}): it is damaged, of another "
            "format, or holds Python objects, which are not loaded"
        ) from error
    for key in _NESTED_KEYS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    named = isinstance(state, Mapping) and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    )
    if not named or not state:
        raise WeightsError(f"{str(path)!r} holds no mapping of names to tensors")
    return state


def _rename(state: Mapping[str, torch.Tensor], model: nn.Module) -> Mapping[str, torch.Tensor]:
    return {ours: state[name] for name, ours in our_names(state, model.state_dict()).items()}


def _read_shapes(path: Path) -> Mapping[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118 - not a mapping


def find_weight_set(name: str, weights: str) -> Any:
    """Return torchvision's weight set of a model, by its name or as `pretrained`. Raises WeightsError."""
    if not name.startswith("torchvision/"):
        raise WeightsError(
            f"no such file: {weights!r} (only torchvision/... models have weights by name; {PRETRAINED} is for "
            "torchvision/..., timm/... and hf/... models)"
        )
    import torchvision

    try:
        sets = torchvision.models.get_model_weights(name.removeprefix("torchvision/"))
    except ValueError as error:
        raise WeightsError(f"torchvision has no model {name.removeprefix('torchvision/')!r}") from error
    if weights == PRETRAINED:
        if not len(sets):
            raise WeightsError(f"torchvision has no weights for {name}")
        return sets.DEFAULT
    if weights not in sets.__members__:
        raise WeightsError(
            f"{weights!r} is neither a file nor a weight set of {name}, which has {', '.join(sets.__members__)}"
        )
    return sets[weights]


def _download(name: str, weights: str, options: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    if weights == PRETRAINED and is_hugging_face(name):
        try:
            return pretrained_state(name)
        except HuggingFaceError as error:
            raise WeightsError(str(error)) from error
    if weights == PRETRAINED and name.startswith("timm/"):
        return _timm_state(name.removeprefix("timm/"), options)
    weight_set = find_weight_set(name, weights)
    try:
        return weight_set.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"{weights!r} of {name} could not be downloaded ({error}); fetch {weight_set.url} where there is a network "
            "and give the file's path as weights"
        ) from error


def _timm_state(name: str, options: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """Return the tensors that timm has for a name, in its cache or on the hub, with their own head. Raises
    WeightsError."""
    import timm

    try:
        return timm.create_model(name, pretrained=True, **options).state_dict()
    except Exception as error:  # timm, the hub's client and urllib have errors of their own
        raise WeightsError(
            f"timm's weights of {name!r} cannot be loaded ({shorten(one_line(error), 300)}); fetch them where there is "
            "a network, and give the file's path as weights"
        ) from error


class Fingerprint:
    """Compute the SHA-256 of named tensors, which may be added in any order. Half-precision values count as the equal
    float32 values. BatchNorm's counters, which old files lack and no forward reads, do not count."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor."""
        if name.endswith("num_batches_tracked"):
            return
        value = tensor.detach().cpu()
        value = (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).contiguous()
        header = f"{value.dtype} {tuple(value.shape)}\n".encode()
        self._digests[name] = hashlib.sha256(header + value.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()

    def adding(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `tensors`, and add each of them."""
        for name, tensor in tensors:
            self.add(name, tensor)
            yield name, tensor

    def hexdigest(self) -> str:
        """Return the fingerprint of all tensors added so far, in hexadecimal."""
        return hashlib.sha256(
            "".join(f"{name} {digest}\n" for name, digest in sorted(self._digests.items())).encode()
        ).hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers, with their names, in hexadecimal. Bit-identical models have the
    same fingerprint."""
    fingerprint = Fingerprint()
    for name, value in model.state_dict().items():
        fingerprint.add(name, value)
    return fingerprint.hexdigest()
