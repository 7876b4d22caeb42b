"""Loss values and gradients of the public implementations, reproduced."""

import pytest
import torch
from reference_material import require_reference_losses

from dkd import AttentionTransfer, SimilarityPreserving, SoftTargets

# Which settings of ours each public implementation is, and the factor its value carries against ours.
IMPLEMENTATIONS = {
    "mdistiller_at_p2": (AttentionTransfer(p=2, resize="features"), 1),
    "mdistiller_at_p4": (AttentionTransfer(p=4, resize="features"), 1),
    "repdistiller_at": (AttentionTransfer(p=2, resize="features"), 1),
    "torchdistill_at_code": (AttentionTransfer(p=2), 1),
    "torchdistill_at_paper": (AttentionTransfer(p=2, reduction="paper"), 2),  # leaves the ½ of equation 2 out
    "mdistiller_sp": (SimilarityPreserving(), 1),
    "repdistiller_sp": (SimilarityPreserving(), 1),
    "mdistiller_kd_T4": (SoftTargets(temperature=4), 1),
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_values_and_gradients_of_public_implementations(dtype):
    reference = require_reference_losses()
    cases = sorted(key.removesuffix("/loss") for key in reference if key.endswith("/loss"))
    assert len(cases) == 77
    for case in cases:
        inputs, implementation = case.split("/")
        loss, factor = IMPLEMENTATIONS[implementation]
        student = reference[f"{inputs}/student"].to(dtype).requires_grad_()
        value = factor * loss(student, reference[f"{inputs}/teacher"].to(dtype))
        (gradient,) = torch.autograd.grad(value, student)
        assert value.dtype == dtype
        for name, ours, theirs in (
            ("loss", value, reference[f"{case}/loss"][0]),
            ("gradient", gradient, reference[f"{case}/grad"]),
        ):
            error = (ours.double() - theirs).norm() / theirs.norm()
            assert error < TOLERANCE[dtype], f"{case}: {name} differs by {error:.1e}"


def test_attention_of_tokens_is_that_of_their_grid():
    """(b, 1 + H·W, C) with one class token in front, against the map (b, C, H, W) that the other tokens make, row by
    row."""
    tokens, maps = torch.randn(3, 17, 5, dtype=torch.float64), torch.randn(3, 7, 4, 4, dtype=torch.float64)
    grid = torch.stack([tokens[:, 1 + 4 * row : 5 + 4 * row].transpose(1, 2) for row in range(4)], dim=2)
    torch.testing.assert_close(
        AttentionTransfer(class_tokens=1)(maps, tokens), AttentionTransfer()(maps, grid), rtol=1e-12, atol=0
    )
    with pytest.raises(ValueError, match="set class_tokens, the number of them at the front"):
        AttentionTransfer()(maps, tokens)
    with pytest.raises(ValueError, match="17 tokens without 0 class tokens: no square grid"):
        AttentionTransfer(class_tokens=0)(maps, tokens)
