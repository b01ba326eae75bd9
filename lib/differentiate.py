"""Derivatives whatever the caller's autograd is doing: every function of this library that differentiates does it here.

A caller may have switched gradients off, be in inference mode, or bring tensors and models that were made there, and a
model may ignore some of its parameters or even its input. None of it changes a result: a function that differentiates
runs inside `differentiating()`, on constants made by `own`, and takes its derivatives by `gradient`.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def differentiating(*, twice=False):
    """Inside, gradients are on and inference mode is off; a context and a decorator.

    Args:
        twice: attention by the plain formula, since PyTorch's fused kernels have no second derivative.
    """
    plain = sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), plain:
        yield


def own(t):
    """The tensor as a constant of ours: detached, and copied if it was made in inference mode, since derivatives cannot
    save it then. Its layout stays; `requires_grad` of the caller's tensor is not touched."""
    with torch.inference_mode(False):
        return t.detach().clone() if t.is_inference() else t.detach()


def gradient(value, inputs, v=None, *, again=False, keep=None):
    """The derivatives of `value` with respect to each of `inputs`: a tuple, zero where value does not depend on one.

    Args:
        value: a tensor made inside `differentiating()`, from inputs with requires_grad.
        inputs: a list of tensors.
        v: the direction, shaped like value, of a vector-Jacobian product; needed unless value is one number.
        again: keep a graph of the result, to differentiate it again.
        keep: keep the graph of value (default: as `again`).
    Raises:
        ValueError: a part of the model has no derivative of this order (with PyTorch's reason).
    """
    if not value.requires_grad:  # it depends on none of them
        return tuple(torch.zeros_like(t) for t in inputs)
    if v is not None:  # not as PyTorch's grad_outputs: their check imports a computer algebra system, for seconds
        with torch.inference_mode(False), torch.enable_grad():
            value = (value * own(v)).sum()
    try:
        return torch.autograd.grad(value, inputs, create_graph=again, retain_graph=keep, materialize_grads=True)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("is not implemented", "double backward")):
            raise
        raise ValueError(f"the model has no derivative of this order: {str(error).splitlines()[0]}") from error


def as_module(model):
    """The model, without torch.compile's wrapper (same values, second derivatives too).

    Raises ValueError if it is no nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    return getattr(model, "_orig_mod", model)
