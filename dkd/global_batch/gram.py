"""Compute blocks of global Gram matrices, when the samples are spread over ranks, and take gradients back to them.

A rank at place (i, j, l) of a grid of r × c × k ranks computes, of G = Q Qᵀ, the rows of the samples I_i and the
columns of the samples J_j; of that block it keeps one k-th of the rows:

    features   Along the k slices, an all-to-all gives each rank its slice of the features of k ranks. All-gathers along
               the columns and along the rows of the grid make Q[I_i, D_l] and Q[J_j, D_l] of it.
    block      Q[I_i, D_l] Q[J_j, D_l]ᵀ is added over the k slices by a reduce-scatter.
    gradient   M, the derivative of a loss by the elements of the block, is all-gathered along the slices.
               M Q[J_j, D_l] is added over the columns by a reduce-scatter, and an all-to-all along the slices takes it
               home.

No step needs a B × B matrix anywhere, unless the grid has one block. cost.py counts what moves. The communication lower
bound for products Q Qᵀ is that of Al Daas, Ballard, Grigori, Kumar & Rouse, "Parallel Memory-Independent Communication
Bounds for SYRK", SPAA 2023.

Features can be sent and multiplied in chunks of columns, one after another, where memory asks for it: the next chunk
travels while one is multiplied.

Several tensors of one type share their messages: they lie side by side. Features are sent in their own type, and
promoted on arrival: a bfloat16 feature loses nothing by that. Products and their derivatives are sent in float32 or
float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dkd.global_batch import collectives
from dkd.global_batch.collectives import Pending
from dkd.global_batch.placement import Axis, Placement


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """Promote float16 and bfloat16 to float32; float32 and float64 stay as they are."""
    return x.to(promoted_dtype(x.dtype))


def promoted_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that numbers of `dtype` are computed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class Panels:
    """Hold the features of several tensors on their way to the ranks that multiply them.

    Making the object begins the first collective, so that the caller can compute until it asks for the panels.

    Args:
        features: (b, d) of each tensor, one type.
        placement: of this rank.
        transport: the type in which features are sent.
    """

    def __init__(self, features: Sequence[torch.Tensor], placement: Placement, transport: torch.dtype) -> None:
        self._at = placement
        slices = placement.axes.slices
        # Features of zero add nothing to a Gram matrix: d is padded to a multiple of k.
        cut = [_cut(f.to(transport), placement.most_rows, slices.size) for f in features]
        self.widths = [part.shape[2] for part in cut]
        message = concatenate(cut).transpose(0, 1)  # (k, b, columns of a slice)
        self._pending: Pending | torch.Tensor | None
        if slices.size > 1:
            self._pending = collectives.begin_all_to_all_blocks(message, slices.group)
        elif placement.axes.rows.size > 1 and placement.axes.columns.size == 1:
            self._pending = collectives.begin_all_gather_rows(message[0], placement.axes.rows.group)
        else:
            self._pending = message[0]

    def wait(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return for each tensor the features (m, d/k) of the rows and (n, d/k) of the columns of this rank's block.
        A collective."""
        at, pending, self._pending = self._at, self._pending, None
        assert pending is not None
        arrived = pending.wait() if isinstance(pending, Pending) else pending
        del pending  # what was sent, and what arrived, are not to live on
        if at.axes.slices.size == 1 and at.axes.rows.size > 1 and at.axes.columns.size == 1:
            columns = arrived
            own = at.layout.rank * at.most_rows
            rows = columns[own : own + at.most_rows]
        else:
            here = arrived.flatten(0, 1) if at.axes.slices.size > 1 else arrived
            rows, columns = _gather(here, at.axes.columns), _gather(here, at.axes.rows)
        rows, columns = _keep(rows, at.rows_to_keep), _keep(columns, at.columns_to_keep)
        return list(rows.split(self.widths, dim=1)), list(columns.split(self.widths, dim=1))


def _gather(rows: torch.Tensor, axis: Axis) -> torch.Tensor:
    return rows if axis.size == 1 else collectives.all_gather_rows(rows, axis.group)


def _keep(panel: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    return panel if places is None else panel.index_select(0, places)


def _cut(features: torch.Tensor, rows: int, slices: int) -> torch.Tensor:
    """Return (rows, k, d/k) with zeros at the end of both dimensions."""
    b, d = features.shape
    width = -(-d // slices) * slices
    padded = features if rows == b and width == d else F.pad(features, (0, width - d, 0, rows - b))
    return padded.view(rows, slices, width // slices)


def concatenate(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return several tensors, equal but for the last dimension, side by side in one message."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


def multiply(rows: torch.Tensor, columns: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the products (m, n) of rows (m, d) and (n, d), in full precision; in `out` where it is given."""
    full = promoted_dtype(rows.dtype)
    if full != rows.dtype and rows.device.type == "cuda":
        # The products of bfloat16 numbers are exact in float32: tensor cores need no promoted copies.
        return torch.mm(rows, columns.T, out_dtype=full, out=out)
    return torch.mm(rows.to(full), columns.to(full).T, out=out)


def add_slices(products: list[torch.Tensor], placement: Placement) -> list[torch.Tensor]:
    """Add products (m, n) of several tensors over the slices, and return the rows of them that this rank keeps. The
    list is emptied, so that what is added takes no more memory than it must. A collective."""
    slices = placement.axes.slices
    if slices.size == 1:
        return list(products)
    height, columns = slices.size * placement.part_rows, products[0].shape[1]
    message = concatenate([_pad_rows(each, height) for each in products])
    products.clear()
    kept = collectives.reduce_scatter_rows(message, slices.group)[: placement.part.stop - placement.part.start]
    return list(kept.split(columns, dim=1))


def gather_derivatives(derivatives: Sequence[torch.Tensor], placement: Placement) -> list[torch.Tensor]:
    """Return M (m, n) of the whole block, of the rows that each rank keeps, for each tensor. A collective."""
    slices = placement.axes.slices
    if slices.size == 1:
        return list(derivatives)
    message = concatenate([_pad_rows(m, placement.part_rows) for m in derivatives])
    gathered = collectives.all_gather_rows(message, slices.group)[: len(placement.row_samples)]
    return list(gathered.split(len(placement.column_samples), dim=1))


def send_home(
    derivatives: Sequence[torch.Tensor],
    columns: Sequence[torch.Tensor],
    widths: Sequence[int],
    placement: Placement,
    transport: torch.dtype,
) -> list[torch.Tensor]:
    """Return Σ_j M_ij q_j for each sample i that this rank holds. A collective.

    Args:
        derivatives: of each tensor, M of the whole block.
        columns: of each tensor, the features (n, d/k) of the columns of the block.
        widths: d of each tensor.
        placement: of this rank.
        transport: the type in which complete sums are sent home; what is still to be added is sent in full precision.
    """
    at, axes = placement, placement.axes
    sums = _spread(concatenate(multiply_columns(derivatives, columns, at)), at)
    full = sums.dtype
    if axes.columns.size > 1:
        sums = collectives.reduce_scatter_rows(sums, axes.columns.group)
    if axes.slices.size > 1:
        parts = sums.view(axes.slices.size, at.most_rows, -1).to(transport)
        sums = collectives.all_to_all_blocks(parts, axes.slices.group).transpose(0, 1)
    else:
        sums = sums.view(1, at.most_rows, -1).transpose(0, 1)
    own = at.layout.rows[at.layout.rank]
    by_tensor = sums[:own].split([q.shape[1] for q in columns], dim=2)
    return [part.flatten(1)[:, :width].to(full) for part, width in zip(by_tensor, widths, strict=True)]


def multiply_columns(
    derivatives: Sequence[torch.Tensor], columns: Sequence[torch.Tensor], at: Placement
) -> list[torch.Tensor]:
    """Return Σ_j M_ij q_j (m, d/k) over the columns j of this rank's block, for each tensor."""
    return [m @ q.to(m.dtype) for m, q in zip(derivatives, columns, strict=True)]


def chunk(features: torch.Tensor, number: int, chunks: int) -> torch.Tensor:
    """Return the columns of one of several chunks of features (b, d): d/chunks of them, fewer in the last."""
    width = chunk_width(features.shape[1], chunks)
    return features[:, number * width : (number + 1) * width]


def chunk_width(width: int, chunks: int) -> int:
    """Return the columns of a chunk."""
    return -(-width // chunks)


def _spread(sums: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Return the rows of a block at the places where they travel, with zeros where a rank has fewer samples."""
    places = placement.rows_to_keep
    if places is None:
        return sums
    ranks = placement.grid.column_blocks * placement.grid.slices
    return sums.new_zeros(ranks * placement.most_rows, sums.shape[1]).index_copy_(0, places, sums)


def _pad_rows(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    return matrix if len(matrix) == rows else F.pad(matrix, (0, 0, 0, rows - len(matrix)))
