"""Build a model by its name.

wrn_16_2, resnet8x4, ...   the CIFAR models of this package
torchvision/resnet34       torchvision's classification models
timm/vit_tiny_...          timm's, when it is installed
hf/NAME-OR-FOLDER          transformers' models for image classification, by their configuration
my_package.nets:build      your own callable, called with num_classes=... and the options
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from dkd.errors import InputError
from dkd.installation import command_for
from dkd.models.hugging_face import HuggingFaceError, is_hugging_face
from dkd.models.hugging_face import build as build_hugging_face
from dkd.models.zoo import (
    cifar_bottleneck,
    cifar_resnet,
    mobilenet_v1,
    mobilenet_v2,
    network_in_network,
    shufflenet,
    vgg,
    wide_resnet,
)
from dkd.models.zoo.normalization_layers import NORMS
from dkd.user_code import UserCodeError, describe_error, load_callable


class UnknownModelError(InputError):
    """There is no model of a name, or it cannot be built or run with its options."""


@dataclass(frozen=True)
class ModelSpec:
    """Hold everything that is needed to build an architecture.

    Args:
        name: as above.
        classes: outputs of the head.
        norm: `batch` or `group`, for the CIFAR models of this package; None: the model's own.
        options: further keyword arguments of the model.
        config: values of the configuration of a model of transformers; None: they are read from the name's place.
    """

    name: str
    classes: int
    norm: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def runs_user_code(name: str) -> bool:
    """Return whether building `name` imports a module that the name itself chooses."""
    return ":" in name


def _list_zoo() -> dict[str, Callable[..., nn.Module]]:
    return {
        **{name: partial(cifar_resnet.CifarResNet, *size) for name, size in cifar_resnet.DEPTHS_AND_WIDTHS.items()},
        **{name: partial(wide_resnet.WideResNet, *size) for name, size in wide_resnet.DEPTHS_AND_WIDTHS.items()},
        **{
            name: partial(cifar_bottleneck.CifarBottleneckResNet, blocks)
            for name, blocks in cifar_bottleneck.BLOCKS.items()
        },
        **{name: partial(vgg.CifarVgg, convolutions) for name, convolutions in vgg.CONVOLUTIONS.items()},
        **{name: partial(mobilenet_v2.CifarMobileNetV2, width) for name, width in mobilenet_v2.WIDTHS.items()},
        "mobilenetv1": mobilenet_v1.MobileNetV1,
        "shufflenetv1": shufflenet.CifarShuffleNetV1,
        **{name: partial(shufflenet.CifarShuffleNetV2, widths) for name, widths in shufflenet.V2_WIDTHS.items()},
        **{
            name: partial(network_in_network.NetworkInNetwork, widths)
            for name, widths in network_in_network.WIDTHS.items()
        },
    }


def known_names() -> list[str]:
    """Return the names of the CIFAR models of this package and of torchvision's classification models."""
    import torchvision

    return [
        *_list_zoo(),
        *(f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models)),
    ]


def build_model(spec: ModelSpec) -> nn.Module:
    """Build a model, initialised from torch's default generator, on torch's default device.

    Raises:
        UnknownModelError: with the nearest names, the missing package, or the error of the model's constructor.
    """
    builder = _find_builder(spec)
    options = dict(spec.options)
    if spec.norm is not None:
        if spec.name not in _list_zoo():
            raise UnknownModelError(
                f"norm={spec.norm!r} is for the CIFAR models of this package; {spec.name!r} takes its own options"
            )
        if spec.norm not in NORMS and not (spec.norm == "none" and spec.name in network_in_network.WIDTHS):
            raise UnknownModelError(
                f"norm={spec.norm!r}: must be one of {', '.join(NORMS)}; none is for nin_wide and nin_thin"
            )
        options["norm"] = spec.norm
    try:
        model = builder(num_classes=spec.classes, **options)
    except HuggingFaceError as error:
        raise UnknownModelError(str(error)) from error
    except (Exception, SystemExit) as error:  # a model's own code may raise anything
        described = f"num_classes={spec.classes}" + (f" and options {options}" if options else "")
        raise UnknownModelError(f"{spec.name!r} cannot be built with {described}: {describe_error(error)}") from error
    if not isinstance(model, nn.Module):
        raise UnknownModelError(f"{spec.name!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _find_builder(spec: ModelSpec) -> Callable[..., nn.Module]:
    name, zoo = spec.name, _list_zoo()
    if name in zoo:
        return zoo[name]
    if name.startswith("torchvision/"):
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        plain = name.removeprefix("torchvision/")
        if plain in known:
            return lambda **options: torchvision.models.get_model(plain, weights=None, **options)
    elif is_hugging_face(name):
        return lambda num_classes, **options: build_hugging_face(name, num_classes, options, spec.config)
    elif name.startswith("timm/"):
        return _find_timm_builder(name.removeprefix("timm/"))
    elif ":" in name:
        return _find_user_builder(name)
    raise UnknownModelError(_describe_unknown(name, known_names()))


def _find_timm_builder(name: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise UnknownModelError(f"'timm/{name}' needs timm: {command_for('timm')}") from error
    if not timm.is_model(name):  # an exact name: no hub, no path
        raise UnknownModelError(_describe_unknown(f"timm/{name}", [f"timm/{known}" for known in timm.list_models()]))

    def build(**options: Any) -> nn.Module:
        if {"checkpoint_path", "pretrained"} & set(options):
            raise ValueError("weights are named by the recipe's `weights`, not by options")
        return timm.create_model(name, pretrained=False, **options)

    return build


def _find_user_builder(name: str) -> Callable[..., nn.Module]:
    try:
        return load_callable(name)
    except UserCodeError as error:
        raise UnknownModelError(str(error)) from error


def _describe_unknown(name: str, known: list[str]) -> str:
    # Equal names without a prefix come first, so that `resnet34` leads to `torchvision/resnet34`.
    near = [k for k in known if k.rpartition("/")[2] == name] or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; see `dkd inspect --list`"
    return f"{name!r} is not a known model{hint}"
