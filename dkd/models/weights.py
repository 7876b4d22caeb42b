"""Load weights from a local file or by torchvision's names, and compute a fingerprint of weights.

Files are read without running code that they hold: as safetensors, or by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from dkd.errors import InputError
from dkd.models.foreign_names import our_names

FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
_NESTED_KEYS = ("state_dict", "model", "model_state_dict")


class WeightsError(InputError):
    """Weights are missing, cannot be read, or do not fit the model."""


def is_file_name(weights: str) -> bool:
    """Return whether `weights` names a file, rather than one of torchvision's weight sets."""
    return weights.endswith(FILE_SUFFIXES) or "/" in weights or Path(weights).exists()


def load_weights(model: nn.Module, name: str, weights: str) -> None:
    """Fill `model` from `weights`, which must hold every tensor of the model and no other.

    Args:
        model: the model.
        name: the name that the model was built by.
        weights: a file (.safetensors, or a torch file of tensors), or for `torchvision/...` models the name of a weight
            set such as IMAGENET1K_V1, which torchvision downloads and checks.

    Raises:
        WeightsError: the file cannot be read, or keys are missing, unexpected or of another shape.
    """
    # Old files lack BatchNorm's counters; `stream_weights` has checked that everything else is there.
    state = model.state_dict()
    with torch.no_grad():
        for key, tensor in stream_weights(model, name, weights):
            state[key].copy_(tensor)


def stream_weights(model: nn.Module, name: str, weights: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key, tensor) of everything that `load_weights` would fill `model` with, one whole tensor at a time: a
    safetensors file is never in memory as a whole. The model may be on the meta device. All keys and shapes are checked
    before the first tensor is yielded. Arguments and errors as for `load_weights`."""
    path = Path(weights)
    if path.is_dir() and (path / "student.safetensors").is_file():
        path = path / "student.safetensors"
    if not is_file_name(weights) or path.suffix != ".safetensors":
        state = _rename(read_file(path) if is_file_name(weights) else _download(name, weights), model)
        _check_fit(model, name, weights, state)
        return iter(state.items())
    _check_fit(model, name, weights, _rename(read_file(path, device="meta"), model))
    return _stream_safetensors(path, list(model.state_dict()))


def _stream_safetensors(path: Path, wanted: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        names = our_names(file.keys(), wanted)
    for key, ours in names.items():
        # The file is opened for each tensor: the parts of a mapped file that were read count as memory of the process
        # until the file is closed.
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(key)
        yield ours, tensor
        del tensor


def check_weights(model: nn.Module, name: str, weights: str) -> None:
    """Check whether `load_weights` would succeed, without reading or downloading tensors. Raises WeightsError."""
    if is_file_name(weights):
        _check_fit(model, name, weights, _rename(read_file(Path(weights), device="meta"), model))
        return
    categories = _find_weight_set(name, weights).meta.get("categories", [])
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    if categories and last and last[0].out_features != len(categories):
        raise WeightsError(f"{weights!r} of {name} has {len(categories)} classes, the model {last[0].out_features}")


def _check_fit(model: nn.Module, name: str, weights: str, state: Mapping[str, torch.Tensor]) -> None:
    wanted = model.state_dict()
    other_shape = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    problems = []
    for title, keys in (
        ("missing", [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]),
        ("unexpected", [key for key in state if key not in wanted]),
        (
            "of another shape",
            [f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}" for key in other_shape],
        ),
    ):
        if keys:
            problems.append(f"{len(keys)} {title}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}")
    if problems:
        raise WeightsError(f"{weights!r} does not fit {name!r}: {'; '.join(problems)}")


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


def _find_weight_set(name: str, weights: str) -> Any:
    if not name.startswith("torchvision/"):
        raise WeightsError(f"no such file: {weights!r} (only torchvision/... models have weights by name)")
    import torchvision

    sets = torchvision.models.get_model_weights(name.removeprefix("torchvision/"))
    if weights not in sets.__members__:
        raise WeightsError(
            f"{weights!r} is neither a file nor a weight set of {name}, which has {', '.join(sets.__members__)}"
        )
    return sets[weights]


def _download(name: str, weights: str) -> Mapping[str, torch.Tensor]:
    weight_set = _find_weight_set(name, weights)
    try:
        return weight_set.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"{weights!r} of {name} could not be downloaded ({error}); fetch {weight_set.url} where there is a network "
            "and give the file's path as weights"
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
