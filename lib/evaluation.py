"""Error and robust error of a classifier, in batches and in full precision.

error: the share of inputs x that are classified wrongly. robust error: the share of inputs for which an attack finds
a wrongly classified x' with ||x' - x|| <= eps; a lower bound of the true robust error, since an attack can fail.
"""

import torch
import torch.nn.functional as F

from .attacks import frozen, pgd


def predict(model, x, *, batch_size=500):
    """Logits (N, classes) of the model in evaluation mode, without gradient, in x's type.

    Raises ValueError for no inputs at all.
    """
    if len(x) == 0:
        raise ValueError("no inputs to evaluate")
    with torch.no_grad(), frozen(model, x, "full") as logits_of:
        return torch.cat([logits_of(part) for part in x.split(batch_size)])


def error(model, x, y, *, batch_size=500):
    """Share of the inputs (N, C, H, W) that are not given their label (N,): a float in [0, 1]."""
    return _share_wrong(predict(model, x, batch_size=batch_size), y)


def robust_error(model, x, y, attack, *, batch_size=500):
    """Share of the inputs whose attacked version is not given their label: a float in [0, 1].

    Args:
        attack: a function (model, x, y) -> x_adv, such as `functools.partial(pgd, eps=..., ...)`.
    """
    return _share_wrong(
        predict(model, attacked(model, x, y, attack, batch_size=batch_size), batch_size=batch_size), y
    )


def attacked(model, x, y, attack, *, batch_size=500):
    """The attacked inputs (N, C, H, W), made batch by batch."""
    if len(x) == 0:
        raise ValueError("no inputs to attack")
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return torch.cat([attack(model, a, b) for a, b in batches])


def evaluate(model, x, y, *, eps, step_size, num_steps, seed=0, batch_size=500):
    """Clean error, robust error and mean adversarial loss under `pgd` from one seeded random start.

    Returns:
        {"clean_error", "robust_error", "robust_loss"}, floats; the loss in nats.
    """
    generator = torch.Generator(x.device).manual_seed(seed)

    def attack(model, x, y):
        return pgd(model, x, y, eps=eps, step_size=step_size, num_steps=num_steps, generator=generator)

    logits = predict(model, attacked(model, x, y, attack, batch_size=batch_size), batch_size=batch_size)
    return {
        "clean_error": error(model, x, y, batch_size=batch_size),
        "robust_error": _share_wrong(logits, y),
        "robust_loss": F.cross_entropy(logits.double(), y).item(),
    }


def _share_wrong(logits, y):
    return (logits.argmax(1) != y).double().mean().item()
