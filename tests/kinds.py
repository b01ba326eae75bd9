"""What callers bring: batches in every memory layout, every state of autograd, and modules of many kinds."""

import warnings
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lib.copies import copied

LAYOUTS = {  # the same numbers, laid out otherwise; x is (N, C, H, W)
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "permuted": lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "every second": lambda x: x.repeat_interleave(2, 0)[::2],
    "a part of more": lambda x: F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    "expanded": lambda x: x[:1].expand_as(x),
    "requires grad": lambda x: x.clone().requires_grad_(),
}
STATES = {"as usual": nullcontext, "no gradients": torch.no_grad, "inference": torch.inference_mode,
          "autocast": partial(torch.autocast, "cpu", torch.bfloat16)}  # fmt: skip


def data(seed=0, n=9):
    """(x, y): n images (1, 4, 4) in float64, labels of 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 4, 4, generator=generator).double(), torch.randint(3, (n,), generator=generator)


class Views(nn.Module):
    """The textbook CNN, which flattens by a view."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)

    def forward(self, x):
        h = F.softplus(self.conv(x))
        return self.linear(h.view(h.size(0), -1))


class Unused(Views):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(2, 2)


class Keeps(Views):
    """It stores an activation, with its graph."""

    def forward(self, x):
        self.seen = super().forward(x)
        return self.seen


class Tied(nn.Module):
    """One parameter under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(16, 5), nn.Linear(5, 16), nn.Linear(16, 3)
        self.second.weight = nn.Parameter(torch.randn(16, 5) / 4)
        self.third = nn.Linear(5, 16)
        self.third.weight = self.second.weight

    def forward(self, x):
        h = F.softplus(self.first(x.flatten(1)))
        return self.last(F.softplus(self.second(h)) * self.third(h))


class Listed(nn.Module):
    """A parameter that is reached through a list, behind PyTorch's back."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3)
        self.again = [self.linear.weight]

    def forward(self, x):
        x = x.flatten(1)
        return self.linear(x) + F.softplus(F.linear(x, self.again[0]))


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(16, 3), nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.scale * self.linear(x.flatten(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 3, activation=F.softplus, batch_first=True)
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.layer(x.squeeze(1)).flatten(1))


def _weight_norm():
    model = Views()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model.conv)
    return model


def _two_weight_norms():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus(), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model[0])
        torch.nn.utils.weight_norm(model[2])
    return model


def _parametrised():
    model = Views()
    torch.nn.utils.parametrizations.weight_norm(model.linear)
    return model


def _kept():
    model = Keeps()
    model(torch.rand(2, 1, 4, 4))
    return model


def _made_in_inference_mode():
    with torch.inference_mode():
        return Views()


def _mixed_layers():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.InstanceNorm2d(2), nn.Softplus(), nn.Dropout(),
                         nn.Flatten(), nn.Linear(8, 3))  # fmt: skip


MODULES = {
    "views": Views,
    "channels last": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)).to(
        memory_format=torch.channels_last
    ),
    "mixed layers": _mixed_layers,
    "unused parameter": Unused,
    "stored activation": _kept,
    "tied": Tied,
    "listed": Listed,
    "scalar": Scalar,
    "attention": Attention,
    "old weight_norm": _weight_norm,
    "two old weight_norms": _two_weight_norms,
    "parametrised": _parametrised,
    "compiled": lambda: torch.compile(Views(), backend="aot_eager"),
    "made in inference mode": _made_in_inference_mode,
}


def module(kind, seed=0):
    """A module of this kind, in float64 and evaluation mode: (N, 1, 4, 4) -> (N, 3)."""
    torch.manual_seed(seed)
    model = MODULES[kind]()
    with torch.inference_mode(kind == "made in inference mode"):
        return model.double().eval()


def check_rounding(logits, model, x):
    """Assert that logits are the model's at x up to the rounding of their type, whatever order it sums in.

    The reference is the model in evaluation mode and float64. A sum of n terms is rounded n times, each time by half a
    unit in the last place at most of what was summed so far. So as many units of the largest logit are allowed as terms
    are summed on the way to one: the fan-in of every layer, and the batch, where normalisation takes a mean over it.
    """
    with torch.no_grad():
        exact = copied(model).eval().double()(x.double())
    terms = sum(p[0].numel() for p in model.parameters() if p.dim() > 1) + x[:, 0].numel()
    allowed = terms * torch.finfo(logits.dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=allowed)
