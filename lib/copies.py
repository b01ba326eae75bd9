"""Copies of models that may be differentiated and moved: each is tried, and refused by name if it would be wrong.

A measurement works on a copy and leaves the model as it was. What autograd says of a copy is true only if it computes
with its own parameters, gives each image an answer of its own, and has derivatives that are those of its values.
Networks of this library's own layers do; any other is asked, on two images.

Curvature, surfaces, curves and certificates work on such copies, since they move the parameters or differentiate by
them. Attacks and errors ask for the input alone: they take `attacks.frozen`, the model itself with constant parameters.
"""

import copy
from contextlib import ExitStack
from itertools import chain

import torch

from .checks import check_no_probabilities, check_parameters
from .differentiate import as_module, differentiating, gradient, held
from .evaluation import predict
from .fast import channels_last
from .models import any_layout


def copied(model, x=None, name="the model", *, order=0):
    """A deep copy of the model, ready to be differentiated, with its channels last where that is free (`any_layout`).

    Tensors that it keeps with a graph (an activation, a normalised weight) are cut off from it. torch.compile's
    wrapper is left out. Raises ValueError, naming the module, for what cannot be copied; and, where x (inputs) are
    given to try it, for inputs of another type than the model, probabilities in place of logits, parameters that are
    one in memory alone, and a copy that computes with something else than its own parameters, that mixes the inputs of
    a batch, or whose derivatives up to this order (1 or 2) are not autograd's.
    """
    model = as_module(model)
    check_parameters(model)
    kept = {f"{inner}.{name}".lstrip("."): t for inner, m in model.named_modules() for name, t in held(vars(m))
            if not t.is_leaf}  # fmt: skip
    cut = {id(t): t.detach().clone() for t in kept.values()}
    with torch.inference_mode(False):
        try:
            result = copy.deepcopy(model, dict(cut)).requires_grad_(True)
        except Exception as error:
            for inner, child in model.named_children():
                copied(child, name=f"module {inner!r}")  # the innermost speaks
            raise ValueError(f"{name} ({type(model).__name__}) cannot be copied: {error}") from error
        if any_layout(result):
            for p in result.parameters():
                p.data = channels_last(p.data)
        if x is not None:
            _check_memory(model)
            check_no_probabilities(predict(result, x[:2]))  # and for its refusal of inputs of another type
        if x is not None and not any_layout(result):  # our layers need no more
            made = {name: cut[id(t)] for name, t in kept.items() if t.is_floating_point()}
            _check_copy(result, dict(model.named_parameters()) | made, x[:2])
            _check_kept(result, copied(model), x[:2])
            _check_mixing(result, x[:2])
            if order:
                _check_derivatives(result, x[:2], order)
    return result


def _check_memory(model):
    """Raise ValueError if a parameter begins where another, or a buffer, does: they are changed together, and are one,
    but autograd and a copy take them for two."""
    names = {}
    for name, t in chain(model.named_parameters(), model.named_buffers()):
        if t.layout == torch.strided and (place := t.data_ptr()):
            first, other = names.setdefault(place, (name, t))
            if other is not t and isinstance(other, torch.nn.Parameter):
                raise ValueError(f"{name} and {first} share their memory but are two tensors: make them one parameter "
                                 "(a.weight = b.weight), or two of their own")  # fmt: skip


@differentiating()
def _check_copy(result, others, x):
    """Raise ValueError if logits of a copy depend on other tensors than its own parameters: a function that was put
    into the model (a lambda) still has the given one, and what was made from a parameter beforehand stays as it is."""
    changing = {name: t for name, t in others.items() if not t.is_inference()}
    with ExitStack() as afterwards:
        for t in changing.values():
            afterwards.callback(t.requires_grad_, t.requires_grad)
            t.requires_grad_(True)
        logits = result(x.detach().requires_grad_(x.is_floating_point()).clone())
        names, seen = {id(t): name for name, t in changing.items()}, {None}
        todo = [logits.grad_fn] if isinstance(logits, torch.Tensor) else []  # what is no tensor is refused elsewhere
        while todo:
            if (node := todo.pop()) in seen:
                continue
            seen.add(node)
            if (found := names.get(id(getattr(node, "variable", None)))) is not None:
                raise ValueError(
                    f"a copy of the model still computes with {found} of the given one: a lambda or closure in it, or "
                    "a tensor that it keeps beside its parameters, cannot follow them"
                )
            todo += [following for following, _ in node.next_functions]


@torch.no_grad()
def _check_kept(result, fresh, x):
    """Raise ValueError if a copy that has been run does not follow its parameters as a fresh one does, naming the first
    module of which that is seen: in evaluation the model keeps what it computed from them."""
    fresh.train().eval()  # what the given model has kept already
    generator, before = torch.Generator().manual_seed(0), [p.clone() for p in result.parameters()]
    for p, q, number in zip(result.parameters(), fresh.parameters(), before, strict=True):
        if p.numel():
            q.data.copy_(p.data.copy_(number + 0.1 * (number.std(correction=0) + number.abs().mean()) *
                                      torch.randn(p.shape, generator=generator, device="cpu").to(p)))  # fmt: skip
    runs = zip(*(outputs_of(m, x) for m in (result, result, fresh)), strict=False)
    names = [name for (name, a), (_, again), (_, b) in runs
             if a.is_floating_point() and a.shape == again.shape == b.shape and differ(a, b, again)]  # fmt: skip
    for p, number in zip(result.parameters(), before, strict=True):
        p.data.copy_(number)
    if names:
        raise ValueError(
            "in evaluation the model keeps what it has computed from its parameters, and does not follow them (the "
            f"output of {names[0]} shows it): take that cache out"
        )


def _named(model):
    return {m: f"layer {k!r} ({type(m).__name__})" if k else f"the model itself ({type(m).__name__})"
            for k, m in model.named_modules()}  # fmt: skip


def outputs_of(model, x):
    """A list (name, output) of what the modules return, a tensor or the first of several, the innermost first; but none
    without numbers."""
    names, run = _named(model), []
    with ExitStack() as hooks:
        for m in names:
            hooks.enter_context(m.register_forward_hook(lambda m, _, out: run.append((names[m], out))))
        model(x.clone())
    run = [(name, out[0] if isinstance(out, tuple) and out else out) for name, out in run]
    return [(name, out.detach().clone()) for name, out in run if isinstance(out, torch.Tensor) and out.numel()]


def differ(a, b, again):
    """Whether a and b differ by more than rounding, where a does not differ from itself, made again."""
    noise, scale = (a - again).abs().max(), 1e-3 * a.abs().max()
    return bool(noise <= scale and (a - b).abs().max() > scale)


@differentiating()
def _check_mixing(model, x):
    """Raise ValueError if logits depend on the other inputs of a batch. Pairs, since some take no batch of one."""
    if len(x) < 2:
        return
    order, mixed = [0, 1, 1, 0], [None]
    runs = [outputs_of(model, x[list(rows)]) for rows in (order, order, (0, 0), (1, 1))]
    for (name, a), (_, again), (_, first), (_, second) in zip(*runs, strict=False):
        whole = a.is_floating_point() and a.shape == again.shape and len(a) == 4 and len(first) == len(second) == 2
        mixed.append(name if whole and differ(a, torch.cat([first, second])[[0, 2, 3, 1]], again) else None)
    if mixed[-1]:  # the logits, after which nothing comes
        raise ValueError(
            f"{next(filter(None, mixed))} mixes the images of a batch, so the loss of one depends on the others: let "
            "each stand for itself (for attention, batch_first=True; for a normalisation, fixed statistics)"
        )


@differentiating()
def _check_derivatives(model, x, order):
    """Raise ValueError, naming the module, if autograd's derivatives of this order and below are not those of the
    model's values. In float64; a model that does not compute in that type is not checked."""
    double, x = copied(model).double(), x.double() if x.is_floating_point() else x
    try:
        found = _deviation(double, (x,), {}, order, inputs=False)
    except RuntimeError:
        return
    if not found:
        return
    names, calls, where = _named(double), {}, "the model"

    def note(m, args, kwargs):  # gives nothing back: that would be taken for the module's input
        calls.setdefault(m, (args, kwargs))

    with ExitStack() as hooks:
        for m in names:
            hooks.enter_context(m.register_forward_pre_hook(note, with_kwargs=True))
        double(x)
    for m in reversed(names):  # the innermost first
        try:
            inner = _deviation(m, *calls[m], order) if m in calls else None
        except (RuntimeError, ValueError):
            continue
        if inner:
            found, where = inner, names[m]
            break
    advice = {
        "first": "it has a no_grad, a detach or a backward of its own. Write it with PyTorch's functions alone; of a "
        "frozen part, give the rest as the model and that part's output as x",
        "second": "its backward uses what it saved, or cannot be differentiated. Write it with PyTorch's functions "
        "alone, and take weight_norm off, whose second derivative PyTorch has wrong",
    }
    raise ValueError(f"autograd's {found} derivative of {where} is not that of its values: {advice[found]}")


def _deviation(module, args, kwargs, order, inputs=True):
    """Which derivatives of a module, by its parameters (and inputs), are wrong: "first", "second" or None.

    Derivatives of a smooth function of its output along a random direction are compared with differences. These are
    believed only where two steps, a hundredfold apart, give the same: so neither a kink between them nor rounding to a
    coarser type inside is taken for a fault. All numbers are moved a little beforehand, off the kinks that lie where
    weights or pixels are zero.
    """
    generator, near, far = torch.Generator().manual_seed(0), 1e-10, 1e-8
    args = [t.detach().clone().requires_grad_() if _real(t) else t for t in args]
    every = [*module.parameters(), *filter(_real, args)]  # all are asked for, as `loss_gradient` does
    tensors = every if inputs else [*module.parameters()]
    before, sizes = [t.detach().clone() for t in tensors], [t.detach().square().mean().sqrt() or 1 for t in tensors]
    v, off = ([s * _normal_like(t, generator) for s, t in zip(sizes, tensors, strict=True)] for _ in range(2))

    def look(step, again=False):
        for t, *parts in zip(tensors, before, v, off, strict=True):
            t.data.copy_(parts[0] + step * parts[1] + 1e-3 * parts[2])
        out = module(*(t.clone() if _real(t) else t for t in args), **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        if out.dtype != torch.float64:
            raise RuntimeError("it rounds to a coarser type")
        scale.append(_sizes(out.detach().abs()))
        weights = _normal_like(out, torch.Generator().manual_seed(1))
        value = (weights * torch.tanh(out / scale[0])).sum()
        return value.detach(), joined(gradient(value, every, again=again)[: len(tensors)])

    scale, direction = [], joined(v)
    _, g = look(0, again=order == 2)
    product = joined(gradient(g, every, direction)[: len(tensors)]) if order == 2 else None
    if (look(0)[1] - g).norm() > 1e-6 * g.norm():  # it draws numbers
        return None
    ends = [[(a - b) / (2 * h) for a, b in zip(look(h), look(-h), strict=True)] for h in (near, far)]
    for t, numbers in zip(tensors, before, strict=True):
        t.data.copy_(numbers)
    slopes, bends = zip(*ends, strict=True)
    if _wrong(g @ direction, *slopes, (g * direction).norm()):
        return "first"
    return "second" if order == 2 and _wrong(product, *bends, product.norm()) else None


def _sizes(t):
    """The scale of each number: its own, but not less than that of most; a mask of -1e9 is on a scale of its own."""
    return t.clamp_min(t.flatten().float().quantile(0.1).to(t) or t.max() or 1)


def _wrong(given, near, far, size):
    error = (far - given).norm()
    return bool(error > 1e-3 * torch.maximum(size, far.norm()) and (near - far).norm() < 0.1 * error)


def _real(t):
    return isinstance(t, torch.Tensor) and t.dtype == torch.float64


def _normal_like(t, generator):
    return torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.device)


def joined(pieces):
    return torch.cat([t.to_dense().reshape(-1) for t in pieces])  # of embeddings they may be sparse
