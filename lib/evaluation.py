"""Error and robust error of a classifier, in batches and in full precision.

error: the share of inputs x that are classified wrongly. robust error: the share of inputs for which an attack finds
a wrongly classified x' with ||x' - x|| <= eps; a lower bound of the true robust error, since an attack can fail.
"""

import torch
import torch.nn.functional as F

from .attacks import frozen, pgd
from .differentiate import differentiating, own
from .models import ACTIVATIONS


@differentiating()
def predict(model, x, *, batch_size=500):
    """Logits (N, classes) of the model in evaluation mode, without gradient, in x's type.

    Raises ValueError for no inputs at all.
    """
    if len(x) == 0:
        raise ValueError("no inputs to evaluate")
    with torch.no_grad(), frozen(model, x, "full") as logits_of:
        return torch.cat([logits_of(part.contiguous()) for part in own(x).split(batch_size)])


def error(model, x, y, *, batch_size=500):
    """Share of the inputs (N, C, H, W) that are not given their label (N,): a float in [0, 1]."""
    return _share_wrong(predict(model, x, batch_size=batch_size), y)


def robust_error(model, x, y, attack, *, batch_size=500):
    """Share of the inputs whose attacked version is not given their label: a float in [0, 1].

    Args:
        attack: a function (model, x, y) -> x_adv, such as `functools.partial(pgd, eps=..., ...)`.
    """
    return _share_wrong(_attacked_logits(model, x, y, attack, batch_size), y)


def attacked(model, x, y, attack, *, batch_size=500):
    """The attacked inputs (N, C, H, W), made batch by batch."""
    return torch.cat(list(_attacked_batches(model, x, y, attack, batch_size)))


def _attacked_batches(model, x, y, attack, batch_size):
    if len(x) == 0:
        raise ValueError("no inputs to attack")
    return (attack(model, a, b) for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True))


def _attacked_logits(model, x, y, attack, batch_size):
    """Logits (N, classes) at the attacked inputs, of which only one batch is held at a time."""
    batches = _attacked_batches(model, x, y, attack, batch_size)
    return torch.cat([predict(model, part, batch_size=batch_size) for part in batches])


def evaluate(model, x, y, *, eps, step_size, num_steps, norm="linf", seed=0, batch_size=500):
    """Clean error, robust error and mean adversarial loss under `pgd` from one seeded random start.

    Returns:
        {"clean_error", "robust_error", "robust_loss"}, floats; the loss in nats.
    """
    generator = torch.Generator(x.device).manual_seed(seed)

    def attack(model, x, y):
        settings = {"eps": eps, "step_size": step_size, "num_steps": num_steps, "norm": norm}
        return pgd(model, x, y, **settings, generator=generator)

    logits = _attacked_logits(model, x, y, attack, batch_size)
    return {
        "clean_error": error(model, x, y, batch_size=batch_size),
        "robust_error": _share_wrong(logits, y),
        "robust_loss": F.cross_entropy(logits.double(), y).item(),
    }


def _share_wrong(logits, y):
    if y.shape != logits.shape[:1]:
        raise ValueError(f"y must have shape ({len(logits)},), got {tuple(y.shape)}")
    return (logits.argmax(1) != y).double().mean().item()


def unit_activity(model, x, *, batch_size=500):
    """How alive the layers are: per activation layer and for the logits, what its units do over all inputs.

    Args:
        model: an nn.Module whose activations are modules of their own (as in `models`).
        x: inputs (N, C, H, W).
    Returns:
        A list of dicts {"layer", "units", "dead", "constant"}: dead is the share of units (channel and place) that are
        0 for every input, constant the share whose value is the same for every input, to 1e-6. A layer with constant
        share 1 is degenerate: nothing of the input gets past it.
    """
    low, high = {}, {}

    def watch(name):
        def hook(_module, _inputs, output):
            for store, extreme in ((low, output.amin(0)), (high, output.amax(0))):
                other = store.get(name, extreme)
                store[name] = torch.minimum(other, extreme) if store is low else torch.maximum(other, extreme)

        return hook

    kinds = tuple(ACTIVATIONS.values())
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    hooks.append(model.register_forward_hook(watch("logits")))
    try:
        predict(model, x, batch_size=batch_size)
    finally:
        for hook in hooks:
            hook.remove()
    return [_activity(name, low[name], high[name]) for name in [*names, "logits"]]


def _activity(name, low, high):
    dead = ((low == 0) & (high == 0)).double().mean().item()
    constant = (high - low <= 1e-6).double().mean().item()
    return {"layer": name, "units": low.numel(), "dead": dead, "constant": constant}
