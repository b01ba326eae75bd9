"""Attacks inside an L-inf or L2 ball: `project`, `fgsm`, `pgd`.

All take `(model, x, y, *, eps, ...)` and return `x_adv`: detached, inside the ball of radius eps round x and inside
[0, 1]. The model is run in evaluation mode on constants: its mode, `requires_grad` flags, `.grad` fields and
batch-normalisation buffers are afterwards as they were before, whatever happens in between.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.func import functional_call

from .compute import fast_dtype

NORMS = ("linf", "l2")


def project(delta, *, eps, norm="linf"):
    """The point of the ball of radius eps that is nearest to delta, image by image.

    Args:
        delta: perturbations (B, ...), floating.
        eps: radius, a float >= 0.
        norm: "linf" or "l2", over everything but the first dimension.
    Returns:
        A tensor like delta.
    Raises:
        ValueError: unknown norm, eps negative or NaN.
    """
    _check_norm(norm)
    if not eps >= 0:
        raise ValueError(f"eps must not be negative or NaN, got {eps}")
    if norm == "linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / _l2(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)


def fgsm(model, x, y, *, eps, norm="linf"):
    """Fast gradient (sign) method (Goodfellow et al. 2015, arXiv:1412.6572): one step of length eps from x itself.

    Arguments, result and errors as for `pgd`.
    """
    return pgd(model, x, y, eps=eps, step_size=eps, num_steps=1, norm=norm, random_start=False)


def pgd(
    model, x, y, *, eps, step_size, num_steps, norm="linf", num_restarts=1, random_start=True, loss="ce",
    generator=None, precision="auto",
):  # fmt: skip
    """L-inf or L2 projected gradient ascent on the loss (Madry et al. 2018, arXiv:1706.06083).

    Args:
        model: an nn.Module, (B, C, H, W) -> logits (B, classes).
        x: inputs (B, C, H, W), floating, in [0, 1].
        y: labels (B,), int64.
        eps: radius; as a fraction of the pixel range (8/255, not 8) for "linf", in the same units for "l2".
        step_size: length of a step, in the units of eps.
        num_steps: steps from each start.
        num_restarts: starts; of the end points, each image keeps one that is misclassified if there is any, and
            among those the one of largest loss.
        random_start: begin at a uniform point of the ball of radius min(step_size, eps) (the paper's start),
            else at x.
        loss: "ce" (cross entropy) or "margin" (largest other logit minus the true one).
        generator: torch.Generator on x's device for the starts; without one, the global generator.
        precision: "auto" runs the model in bfloat16 where this machine gains by it (perturbation and loss stay in
            x's type); "full" never does.
    Returns:
        x_adv (B, C, H, W), detached, ||x_adv - x|| <= eps, in [0, 1].
    Raises:
        ValueError: eps or step_size negative, NaN or (linf) above 1; x not floating, not in [0, 1] or not
            (B, C, H, W); labels that do not match; unknown norm, loss or precision; a model that returns NaN,
            infinities or the wrong shape.
    """
    _check(x, y, eps, step_size, norm)
    for name, value, least in (("num_steps", num_steps, 0), ("num_restarts", num_restarts, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}")
    best = None
    with frozen(model, x, precision) as logits_of:
        if eps == 0:
            return x.detach().clone()
        for _ in range(num_restarts):
            x_adv = _ascend(logits_of, x, y, eps, step_size, num_steps, norm, random_start, LOSSES[loss], generator)
            if num_restarts == 1:
                return x_adv
            # The choice among the end points is made in full precision, as the evaluation will be.
            with torch.no_grad(), frozen(model, x, "full") as exact_logits_of:
                logits = exact_logits_of(x_adv)
            _check_labels(logits, y)
            new = (x_adv, logits.argmax(1) != y, LOSSES[loss](logits, y))
            best = new if best is None else _stronger(best, new)
    return best[0]


def _ascend(logits_of, x, y, eps, step_size, num_steps, norm, random_start, loss, generator):
    x = channels_last(x.detach())
    x_adv = x.clone()
    if random_start:
        x_adv = _into(x_adv + _start(x, min(step_size, eps), norm, generator), x, eps, norm)
    for _ in range(num_steps):
        x_adv.requires_grad_(True)
        with torch.enable_grad():
            logits = logits_of(x_adv)
            _check_labels(logits, y)
            (g,) = torch.autograd.grad(loss(logits, y).sum(), x_adv)
        if not torch.isfinite(g).all():  # asked here, because the sign of NaN is 0
            raise ValueError("the gradient of the model's loss is NaN or infinite at some input")
        with torch.no_grad():
            g = g.sign_() if norm == "linf" else _unit(g)
            x_adv = _into(x_adv.detach().add_(g, alpha=step_size), x, eps, norm)
    return x_adv.contiguous()


def _into(x_adv, x, eps, norm):
    """Back into the ball and the box. Both sets are convex; for L2 the clamp after the projection stays in the ball
    because x itself is in the box, so clamping moves no coordinate away from x."""
    if norm == "linf":
        return torch.min(torch.max(x_adv, x - eps), x + eps).clamp_(0, 1)
    return (x + project(x_adv - x, eps=eps, norm=norm)).clamp_(0, 1)


def _unit(g):
    """g of length 1, image by image, or 0. Scaled by its largest entry first: squares of small gradients underflow."""
    g = g / g.abs().amax(tuple(range(1, g.dim())), keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    return g / _l2(g).clamp_min(1)


def _start(x, radius, norm, generator):
    """Uniform in the ball of this radius."""
    if norm == "linf":
        return torch.empty_like(x).uniform_(-radius, radius, generator=generator)
    direction = torch.empty_like(x).normal_(generator=generator)
    shrink = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype) ** (1 / x[0].numel())
    return _unit(direction) * radius * _wide(shrink, x)


def _stronger(old, new):
    """Image by image the better of two (x_adv, misclassified, loss): misclassified first, then the larger loss."""
    better = (new[1] & ~old[1]) | ((new[1] == old[1]) & (new[2] > old[2]))
    return tuple(torch.where(_wide(better, n), n, o) for o, n in zip(old, new, strict=True))


def _margin(logits, y):
    true = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], float("-inf")).amax(1) - true


LOSSES = {"ce": lambda logits, y: F.cross_entropy(logits, y, reduction="none"), "margin": _margin}


@contextmanager
def frozen(model, x, precision="auto"):
    """The model as a function of its input alone: evaluation mode, constant parameters, the fastest exact-enough type.

    Yields a function x -> logits in x's type. The parameters enter as detached copies, converted once and not at
    every call, so no flag of the model has to be touched; only the mode is, and it is put back.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    if precision not in ("auto", "full"):
        raise ValueError(f"unknown precision {precision!r}: choose auto or full")
    low = fast_dtype(x.device) if precision == "auto" and x.dtype == torch.float32 else None
    constants = {k: _constant(p, low) for k, p in model.named_parameters()}

    def logits_of(inputs):
        with torch.autocast(x.device.type, dtype=low, enabled=low is not None):
            return functional_call(model, constants, (inputs,)).to(x.dtype)

    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield logits_of
    finally:
        for module, mode in modes:
            module.training = mode


def _constant(p, low):
    # Weights of layers go to the low type; the vectors (biases, batch normalisation) stay, as autocast wants them.
    p = p.detach()
    return channels_last(p if low is None or p.dim() < 2 else p.to(low))


def channels_last(t):
    """t with its channels last in memory, if it has 4 dimensions: the layout that CPUs and GPUs convolve fastest.

    With one channel both layouts are the same memory, and PyTorch takes it for the slow one unless the strides say
    otherwise: pooling what comes out of the first convolution of digits is then several times slower.
    """
    if t.dim() != 4:
        return t
    t = t.contiguous(memory_format=torch.channels_last)
    _, c, h, w = t.shape
    return t.as_strided(t.shape, (h * w, 1, w, 1)) if c == 1 else t


def _wide(t, x):
    return t.view(-1, *[1] * (x.dim() - 1))


def _l2(t):
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True)


def check_eps(eps, *, name="eps", norm="linf"):
    """Raise ValueError unless eps is a number >= 0 and, for "linf", at most 1."""
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise ValueError(f"{name} must be a number, got {type(eps).__name__}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{name} must be finite and not negative, got {eps}")
    if norm == "linf" and eps > 1:
        raise ValueError(f"{name} is a fraction of the pixel range, so at most 1: write 8/255, not 8 (got {eps})")


def _check_norm(norm):
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}: choose linf or l2")


def _check(x, y, eps, step_size, norm):
    _check_norm(norm)
    check_eps(eps, norm=norm)
    check_eps(step_size, name="step_size", norm=norm)
    if not isinstance(x, torch.Tensor) or x.dim() != 4 or len(x) == 0:
        raise ValueError(f"x must be a tensor (B, C, H, W) with B >= 1, got {getattr(x, 'shape', type(x).__name__)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating with pixels in [0, 1], got {x.dtype}: divide by 255 first")
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"x must lie in [0, 1], got values from {low:.4g} to {high:.4g}")
    if not isinstance(y, torch.Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(
            f"y must be int64 labels of shape ({len(x)},), got {getattr(y, 'dtype', type(y).__name__)} "
            f"{tuple(getattr(y, 'shape', ()))}"
        )


def _check_labels(logits, y):
    if logits.dim() != 2 or len(logits) != len(y):
        raise ValueError(f"the model must return logits ({len(y)}, classes), got {tuple(logits.shape)}")
    low, high = y.aminmax()
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"labels run from {low} to {high}, but the model has {logits.shape[1]} classes")
    if not torch.isfinite(logits).all():
        raise ValueError("the model returned NaN or infinite logits")
