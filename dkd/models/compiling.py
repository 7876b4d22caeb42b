"""Compile models by torch.compile: whole, or block by block."""

from __future__ import annotations

from typing import Literal

from torch import nn

from dkd.models.blocks import blocks
from dkd.models.tapped import TappedModel

Compiled = bool | Literal["blocks"]
"""Whether a model is compiled; `blocks`: each of its blocks by itself."""


def compile_model(tapped: TappedModel, how: Compiled) -> None:
    """Compile a model's forward in place. Block by block, one compilation serves all blocks of a class and of equal
    shapes, as a transformer has them: the whole model takes as many times longer as it has blocks.

    Args:
        tapped: the model.
        how: False: it stays as it is.
    """
    if how is True:
        tapped.compile()
    elif how == "blocks":
        for _, block in blocks(tapped.model):
            compile_module(block)


def compile_module(module: nn.Module) -> None:
    """Compile one module in place, without a graph break."""
    module.compile(fullgraph=True)
