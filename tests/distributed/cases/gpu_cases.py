"""What one process computes again and again, on a GPU where there is one."""

import hashlib

import torch
import trainer_cases
from torch.nn import functional as F

from dkd.config.loading import validate
from dkd.engines.arithmetic import Arithmetic, set_arithmetic
from dkd.global_batch.gram import multiply
from dkd.models import ModelSpec, TappedModel, build_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIMES = 100 if DEVICE.type == "cuda" else 3


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def hashes(folder, deterministic):
    """Precision -> how many different results as many equal forwards have, and as many equal gradients."""
    found = {}
    for precision in ("fp32", "tf32", "bf16"):
        run = {**trainer_cases.RECIPE["run"], "deterministic": deterministic}
        train = {**trainer_cases.RECIPE["train"], "precision": precision, "channels_last": True}
        recipe = validate({**trainer_cases.RECIPE, "run": run, "train": train})
        set_arithmetic(recipe)
        arithmetic = Arithmetic.of(recipe)
        torch.manual_seed(0)
        plain = arithmetic.place(build_model(ModelSpec("wrn_16_2", 10)), DEVICE)
        model = TappedModel(plain, ["block1", "block3"], autocast=arithmetic.autocast)
        images = torch.randn(64, 3, 32, 32, device=DEVICE).to(memory_format=arithmetic.memory_format)
        labels = torch.arange(64, device=DEVICE) % 10
        forwards, gradients = set(), set()
        for _ in range(TIMES):
            model.zero_grad()
            logits, features = model(images)
            forwards.add(digest([logits, *features.values()]))
            F.cross_entropy(logits.float(), labels).backward()
            gradients.add(digest([parameter.grad for parameter in model.parameters()]))
        found[precision] = {"forwards": len(forwards), "gradients": len(gradients)}
    return found


def products_of_bfloat16(folder):
    """The largest error of products of bfloat16 features, by the largest product: on a GPU, tensor cores compute them
    without promoted copies."""
    generator = torch.Generator().manual_seed(3)
    rows, columns = (torch.randn(count, 4096, generator=generator).bfloat16() for count in (48, 80))
    exact = rows.double() @ columns.double().T
    found = multiply(rows.to(DEVICE), columns.to(DEVICE))
    return {
        "dtype": str(found.dtype),
        "difference": ((found.cpu().double() - exact).abs().max() / exact.abs().max()).item(),
    }
