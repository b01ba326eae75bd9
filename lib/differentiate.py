"""Derivatives whatever the caller's autograd is doing: every function of this library that differentiates does it here.

A caller may have switched gradients off, be in inference mode or under autocast, or bring tensors and models that were
made there, and a model may ignore some of its parameters or even its input. None of it changes a result: a function
that differentiates runs inside `differentiating()`, on constants made by `own`, and takes its derivatives by
`gradient`.
"""

from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize


@contextmanager
def differentiating(*, twice=False):
    """Inside, gradients are on, inference mode and autocast are off; a context and a decorator.

    Args:
        twice: attention by the plain formula, since PyTorch's fused kernels have no second derivative.
    """
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as more:
        if twice:
            more.enter_context(sdpa_kernel(SDPBackend.MATH))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                more.enter_context(torch.autocast(kind, enabled=False))
        yield


def own(t):
    """The tensor as a constant of ours: detached, and copied if it was made in inference mode, since derivatives cannot
    save it then. Its layout stays; `requires_grad` of the caller's tensor is not touched."""
    with torch.inference_mode(False):
        t = t.detach()
        return t.clone() if t.is_inference() else t


def gradient(value, inputs, v=None, *, again=False, keep=None):
    """The derivatives of `value` with respect to each of `inputs`: a tuple, zero where value does not depend on one.

    Args:
        value: a tensor made inside `differentiating()`, from inputs with requires_grad.
        inputs: a list of tensors.
        v: the direction, shaped like value, of a vector-Jacobian product; needed unless value is one number.
        again: keep a graph of the result, to differentiate it again.
        keep: keep the graph of value (default: as `again`).
    Raises:
        ValueError: a part of the model has no derivative of this order, or it throws activations away and cannot make
            them again here (with PyTorch's reason).
    """
    if not value.requires_grad:  # it depends on none of them
        return tuple(torch.zeros_like(t) for t in inputs)
    if v is not None:  # not as PyTorch's grad_outputs: their check imports a computer algebra system, for seconds
        with torch.inference_mode(False), torch.enable_grad():
            value = (value * own(v)).sum()
    try:
        return torch.autograd.grad(value, inputs, create_graph=again, retain_graph=keep, materialize_grads=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "torch.utils.checkpoint" in reason:  # what is made again there is not what was frozen or copied here
            raise ValueError(f"switch activation checkpointing off, as when the model is used: {reason}") from error
        if not any(words in str(error) for words in ("is not implemented", "double backward")):
            raise
        raise ValueError(f"the model has no derivative of this order: {reason}") from error


def as_module(model):
    """The model, without the wrappers of torch.compile and of parallel training (same values).

    Raises ValueError if it is no nn.Module, or TorchScript, the weights of which are its own; if hooks are on the
    wrapper, which would be lost; or inside `parametrize.cached()`: what is computed from parametrised weights would
    stay in its cache, and would not follow their parameters.
    """
    if parametrize._cache_enabled:
        raise ValueError("leave parametrize.cached(): what is computed here would stay in its cache")
    # By name, since to import the class of torch.compile's takes seconds.
    inner = model._orig_mod if type(model).__name__ == "OptimizedModule" else None
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        if type(model) not in (DataParallel, DistributedDataParallel) or "forward" in vars(model):
            raise ValueError(f"{type(model).__name__} has a forward of its own: put that in a module inside")
        inner = model.module
    if inner is not None:
        if model._forward_hooks or model._forward_pre_hooks:
            raise ValueError(f"register the hooks of {type(model).__name__} on the module inside, without this wrapper")
        return as_module(inner)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("TorchScript keeps its weights to itself: give the nn.Module that it was made of")
    return model


def alike(a, b):
    """Whether two tensors hold the same numbers, NaN among them; they may be sparse."""
    return torch.equal(*(t.detach().to_dense().nan_to_num() for t in (a, b)))


def held(attributes):
    """(name, tensor) of all that there is in attributes, a dict: by itself, or in dicts and lists."""
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)):
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{name}[{key!r}]", t) for key, t in entries if isinstance(t, torch.Tensor))


INTERNAL = set(vars(torch.nn.Module()))


def _own_attributes(module):
    return {k: v for k, v in vars(module).items() if k not in INTERNAL}


def _tensors(module):
    return [*module._buffers.values(), *(t for _, t in held(_own_attributes(module)))]


def _restore(entries, before):
    for key in set(entries.keys()) - before.keys():
        del entries[key]
    for key, value in before.items():
        if key not in entries or entries[key] is not value:
            entries[key] = value


@contextmanager
def unchanged(model):
    """Afterwards modes, flags and tensors that are attributes (a pruned weight) of the model are as before, whatever
    was done inside. What a module has kept there meanwhile is gone, and with it what else it and those around it have
    set, such as a note that it has. Modes are put back by the modules' own `train`, which may do more than set a flag
    (layers of low rank merge their weights)."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for _, p in model.named_parameters()]
    before = []
    for m in model.modules():
        mine, dicts = _own_attributes(m), [(d, dict(d.items())) for d in (m._buffers, m._parameters)]
        caches = {k: dict(v) for k, v in mine.items() if isinstance(v, dict)}
        before.append((m, mine, dicts, caches, _tensors(m)))
    try:
        yield
    finally:
        for module, mode in modes:  # the outer ones first: they speak to the inner ones
            if module.training != mode:
                module.train(mode)
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
        keep = {m for m, *_, tensors in before if {id(t) for t in _tensors(m)} != {id(t) for t in tensors}}
        for module, mine, dicts, caches, _ in before:
            if keep and not keep.isdisjoint(module.modules()):
                _restore(vars(module), {k: v for k, v in vars(module).items() if k in INTERNAL} | mine)
            for entries, were in dicts:
                _restore(entries, were)
            for name, were in caches.items():
                now = vars(module).get(name)
                for key in list(now if isinstance(now, dict) else ()):
                    if key not in were and isinstance(now[key], torch.Tensor):
                        del now[key]
