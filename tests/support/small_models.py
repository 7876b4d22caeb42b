"""Networks of a few thousand parameters, to be named by recipes as small_models:NAME."""

import os
import time
from datetime import timedelta

import torch
from launched import pause

from dkd import RelationalLoss, SimilarityPreserving, gather_rows
from dkd.data import open_source


class Relational(SimilarityPreserving):
    """A loss as a user would write it, of which a recipe knows nothing but that it compares samples."""

    relational = True


class Asking(torch.nn.Module):
    """A relational loss that asks for labels and indices, and looks whether these belong together."""

    relational = True

    def forward(self, student, teacher, layout=None, indices=None, labels=None):
        known = open_source("digits", training=True).labels[indices.numpy()]
        assert labels.tolist() == known.tolist()
        everyone, everywhere, classes = (gather_rows(x, layout) for x in (student[0].flatten(1), indices, labels))
        assert len(set(everywhere.tolist())) == layout.total
        weights = (labels[:, None] == classes) * (1 + everywhere % 7)
        return layout.mean((student[0].flatten(1) @ everyone.T * weights).square().mean(1))


class LocalMean(torch.nn.Module):
    """Compares with a mean over the rows of the rank alone."""

    def forward(self, student, teacher, layout=None):
        rows = student[0].flatten(1)
        return layout.mean((rows - rows.mean(0)).square().sum(1))


class Stored(torch.nn.Module):
    """Compares features whole, and asks for them to be stored."""

    store = True

    def forward(self, student, teacher, layout=None):
        return layout.mean((student[0].mean((2, 3)).sum(1) - teacher[0].mean((2, 3)).sum(1)).square())


class GatheredWithoutGradient(torch.nn.Module):
    """Gathers by torch.distributed.all_gather, as many published losses do."""

    relational = True

    def forward(self, student, teacher, layout=None):
        rows = student[0].flatten(1)
        parts = [rows]
        if layout.world_size > 1:
            parts = [torch.empty_like(rows) for _ in layout.rows]
            torch.distributed.all_gather(parts, rows.detach())
            parts[layout.rank] = rows
        return layout.mean((rows @ torch.cat(parts).T).square().mean(1))


class Pooled(torch.nn.Module):
    """Compares means over places. Its last bits depend on the order in which they lie in memory."""

    store = True

    def forward(self, student, teacher, layout=None):
        pairs = zip(student, teacher, strict=True)
        return layout.mean(sum((s.mean((1, 2, 3)) - t.mean((1, 2, 3))).square() for s, t in pairs))


class Summed(torch.nn.Module):
    """Sums over the rows of a rank."""

    def forward(self, student, teacher, layout=None):
        return (student[0] - teacher[0]).square().sum()


class SummedGradient(torch.nn.Module):
    """Sums its gradient over ranks, which the training averages."""

    def forward(self, student, teacher, layout=None):
        value = layout.mean(student[0].flatten(1).square().sum(1))
        return value.detach() + layout.world_size * (value - value.detach())


class Unstated(torch.nn.Module):
    """Compares samples, rightly, and does not state it."""

    def forward(self, student, teacher, layout=None):
        rows = student[0].flatten(1)
        return layout.mean((rows @ gather_rows(rows, layout).T).square().mean(1))


class FailsOnRank1(torch.nn.Module):
    """Raises on rank 1, while rank 0 waits for it."""

    def forward(self, student, teacher, layout=None):
        if layout.rank == 1:
            raise LookupError("only here")
        return gather_rows(student[0], layout).square().mean()


class Regularized(torch.nn.Module):
    """A small network with BatchNorm and dropout."""

    def __init__(self, num_classes):
        super().__init__()
        self.layer1, self.layer2, self.layer3 = (self.layer(*sizes) for sizes in ((3, 8, 1), (8, 12, 2), (12, 16, 2)))
        self.fc = torch.nn.Linear(16, num_classes)

    def layer(self, channels, width, stride):
        convolution = torch.nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        return torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(width), torch.nn.ReLU(), torch.nn.Dropout(0.2))

    def forward(self, x):
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class Dropped(torch.nn.Module):
    """A small network with dropout."""

    def __init__(self, num_classes):
        super().__init__()
        self.layer3 = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, 2), torch.nn.Dropout(0.5), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, 2)
        )
        self.fc = torch.nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.layer3(x).mean((2, 3)))


class Stopping(torch.nn.Module):
    """On rank 1, the fifth forward in training never returns. The others then wait for 5 seconds, however long they
    would have before."""

    def __init__(self, num_classes):
        super().__init__()
        self.layer3 = torch.nn.Conv2d(3, 4, 3, 4)
        self.fc = torch.nn.Linear(4, num_classes)
        self.calls = 0

    def forward(self, x):
        # Not on the meta device, on which models are checked before they train.
        self.calls += self.training and x.device.type != "meta"
        if self.calls == 5:
            torch.distributed.group.WORLD.set_timeout(timedelta(seconds=pause(5)))
            if os.environ.get("RANK") == "1":
                time.sleep(3600)
        return self.fc(self.layer3(x).mean((2, 3)))


class Awkward(torch.nn.Module):
    """Weights that are tied, weights that do not train, a buffer of whole numbers, and one that is another tensor after
    each forward."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, 2, padding=1).requires_grad_(False)
        self.layer3 = torch.nn.Conv2d(8, 9, 3, 2, padding=1)
        self.first, self.second = torch.nn.Linear(9, 9), torch.nn.Linear(9, 9)
        self.second.weight = self.first.weight
        self.fc = torch.nn.Linear(9, num_classes)
        self.register_buffer("numbers", torch.arange(5))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen = self.seen + 1
        x = self.layer3(self.stem(x).relu()).relu().mean((2, 3))
        return self.fc(self.second(self.first(x).relu()) + 0.001 * self.seen)


class NotFinite(Regularized):
    """On rank 0, the fourth forward in training yields a NaN."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training and x.device.type != "meta"
        broken = self.calls == 4 and os.environ.get("RANK", "0") == "0" and self.training
        return super().forward(x) * (float("nan") if broken else 1.0)


class NotFiniteInEvaluation(Regularized):
    """Trains as any other, and yields NaN where it is evaluated, but for one image alone, such as that on which a
    recipe is checked."""

    def forward(self, x):
        return super().forward(x) * (1.0 if self.training or len(x) == 1 else float("nan"))


class FillsTheMemory(Regularized):
    """On rank 1, the fourth forward in training asks for more memory than any device has. Without a GPU, it raises what
    a GPU would raise."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training and x.device.type != "meta"
        if self.calls == 4 and self.training and os.environ.get("RANK") == "1":
            if x.device.type != "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1048576.00 GiB.")
            torch.empty(2**50, dtype=torch.uint8, device=x.device)
        return super().forward(x)


class Late(Regularized):
    """On rank 1, the first forward in training takes twice as long as the others would wait later, as a compilation
    may."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training and x.device.type != "meta"
        if self.calls == 1 and self.training and os.environ.get("RANK") == "1":
            time.sleep(pause(8))
        return super().forward(x)


class FailsOnce(Regularized):
    """The third forward in training raises, unless a launcher has started its ranks again."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training and x.device.type != "meta"
        if self.calls == 3 and self.training and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            raise RuntimeError("fails once")
        return super().forward(x)


class Slow(Regularized):
    """A step takes at least a quarter of a second: time for something to happen to it. From the 20th step of a start on
    it takes two seconds more, until the file of SLOWER_UNTIL is there."""

    steps = 0

    def forward(self, x):
        if self.training and x.device.type != "meta":
            self.steps += 1
            file = os.environ.get("SLOWER_UNTIL")
            time.sleep(2.25 if file and self.steps >= 20 and not os.path.exists(file) else 0.25)
        return super().forward(x)


def Transformer(num_classes):
    """A vision transformer of torchvision's blocks, for images of 224 pixels: 7×7 tokens and one for the class."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=224, patch_size=32, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=num_classes
    )


class WrongSlope(RelationalLoss):
    """The mean of (S_ij − T_ij)², with half of its derivative."""

    relation = "cosine"

    def value(self, s, t, at):
        return (s - t).square().sum() / at.batch**2

    def slope(self, s, t, at):
        return 2 / at.batch**2 * (s - t)


class DependsOnScale(WrongSlope):
    """The same of products, which are no function of directions, with the whole derivative."""

    relation = "product"

    def slope(self, s, t, at):
        return 4 / at.batch**2 * (s - t)
