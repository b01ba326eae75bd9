"""What every function asks of its arguments: each question stands here once, and a refusal names what was given."""

from numbers import Integral, Real

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.parameter import is_lazy

from .differentiate import as_module, own

NORMS = ("linf", "l2")
STARTS = (True, False, "step", "ball")


def as_numbers(values):
    """Values as floats; what a masked array hides is NaN, as NumPy would bring it to light again. Raises ValueError for
    complex ones, of which it would take the real parts."""
    if np.ma.isMaskedArray(values):
        values = values.astype(float).filled(np.nan)
    if np.iscomplexobj(values):
        raise ValueError("values must be real, and there are complex ones")
    return np.asarray(values, float)


def check_choice(what, value, choices):
    """Raise ValueError unless value is one of the choices."""
    if value not in list(choices):
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(map(str, choices))}")


def check_count(least, **values):
    """The values as plain integers (a tuple, if several), since those of numpy overflow and are refused by PyTorch.

    Raises ValueError unless all are whole numbers of at least `least`, and of 64 bits, as PyTorch takes them.
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if value >= 2**64:
            raise ValueError(f"{name} must be below 2**64, got {value}")
    first, *others = map(int, values.values())
    return (first, *others) if others else first


def check_eps(eps, *, name="eps", norm="linf"):
    """eps as a float. Raises ValueError unless it is a number >= 0, at most 1 for "linf", and norm one of NORMS."""
    check_choice("norm", norm, NORMS)
    if not isinstance(eps, Real) or isinstance(eps, bool):
        raise ValueError(f"{name} must be a number, got {type(eps).__name__}")
    if not 0 <= eps <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite and not negative, got {eps}")
    if norm == "linf" and eps > 1:
        raise ValueError(f"{name} is a fraction of the pixel range, so at most 1: write 8/255, not 8 (got {eps})")
    return float(eps)


def check_data(x):
    """Raise ValueError unless x is a tensor, or stands for one (`data.Images`), of N >= 1 inputs."""
    if not hasattr(x, "split") or isinstance(x, str) or not getattr(x, "shape", (1,)):
        raise ValueError(f"x must be a tensor, got {type(x).__name__}: torch.as_tensor makes one")
    if len(x) == 0:
        raise ValueError("no data: there is not a single input")


def check_targets(x, y):
    """Raise ValueError unless y is a tensor (N,) of int64, one label for each of N >= 1 inputs."""
    check_data(x)
    if not isinstance(y, torch.Tensor) or y.dtype != torch.int64 or tuple(y.shape) != (len(x),):
        got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
        raise ValueError(f"y must be int64 labels of shape ({len(x)},), got {got}")


def check_inputs(x, y, eps=0, norm="linf", generator=None):
    """x and y as constants of ours: detached, contiguous, usable whatever mode they were made in; and eps, a float.

    Raises ValueError unless x is a batch of images in [0, 1], y its labels (int64), eps a radius of the norm, and
    generator None or one of PyTorch's on the device of x.
    """
    eps = check_eps(eps, norm=norm)
    if not isinstance(x, torch.Tensor) or x.dim() != 4 or not x.numel():
        raise ValueError(f"x must be a tensor (B, C, H, W) with B >= 1, got {getattr(x, 'shape', type(x).__name__)}")
    if x.layout != torch.strided or x.is_meta:
        raise ValueError(f"x must hold its pixels, one by one, got {x.layout} on {x.device}")
    if x.dtype not in (torch.float32, torch.float64):  # coarser types round x + eps by more than a small eps
        advice = "convert it, and the model" if x.is_floating_point() else "divide by 255 first"
        raise ValueError(f"x must be float32 or float64 with pixels in [0, 1], got {x.dtype}: {advice}")
    try:
        x.new_empty(0, dtype=torch.float64)
    except (TypeError, RuntimeError) as error:  # Apple's GPUs; the last digit of eps is kept in it
        raise ValueError(f"{x.device} has no float64, in which attacks keep to eps: take the CPU ({error})") from error
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"x must lie in [0, 1], got values from {low:.9g} to {high:.9g}")
    check_targets(x, y)
    if y.device != x.device:
        raise ValueError(f"the labels are on {y.device}, and the images on {x.device}")
    if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != x.device.type):
        made = f"torch.Generator({str(x.device)!r}).manual_seed(...)"
        raise ValueError(f"generator must be None or {made}, got {generator!r}")
    # Of no subclass: those of two libraries may refuse to meet.
    return *(own(t).as_subclass(torch.Tensor).contiguous() for t in (x, y)), eps


def check_parameters(model):
    """Raise ValueError, naming it, if a parameter is not of real floating-point numbers, or (lazy) has none yet."""
    for name, p in as_module(model).named_parameters():
        if is_lazy(p):
            raise ValueError(f"parameter {name!r} has no numbers yet: run the model once")
        if not p.is_floating_point():
            what = "complex" if p.is_complex() else f"of {p.dtype}"
            raise ValueError(f"parameter {name!r} is {what}: those here are real floating-point ones (a constant is a "
                             "buffer)")  # fmt: skip


def check_statistics(model):
    """Raise ValueError if the model normalises by the statistics of the batch, in evaluation mode, too."""
    for name, m in as_module(model).named_modules():
        if isinstance(m, BatchNorm) and m.running_mean is None:
            what = f"module {name!r} ({type(m).__name__})"
            raise ValueError(f"{what} has no running statistics: what it makes of one image depends on the others")


def check_logits(logits, count):
    """Raise ValueError unless a model's output is a tensor (count, classes): neither tuple, dict nor other object, and
    of plain numbers."""
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != count:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"{type(logits).__name__}: unpack it first"
        raise ValueError(f"the model must return logits ({count}, classes), got {got}")
    if logits.is_complex() or logits.layout != torch.strided:
        raise ValueError(f"the model must return logits, one real number each, got {logits.dtype}, {logits.layout}")


def check_labels(logits, y):
    """Raise ValueError unless the logits (`check_logits`) are finite and belong to these labels."""
    check_logits(logits, len(y))
    if logits.shape[1] < 2:
        raise ValueError("the model has a single logit, which is no choice: two classes need two")
    low, high = y.aminmax()
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"labels run from {low} to {high}, but the model has {logits.shape[1]} classes")
    if not torch.isfinite(logits).all():
        raise ValueError("the model returned NaN or infinite logits")


def check_no_probabilities(logits):
    """Raise ValueError for what a softmax has made, whose loss would be of a softmax of that."""
    if ((logits >= 0) & (logits < 1)).all() and ((logits.double().sum(1) - 1).abs() < 1e-3).all():
        raise ValueError("the model returns probabilities, and the loss takes the softmax of logits: leave out its own")
