"""Error and robust error of a classifier, in batches and in full precision.

Both are means of a mask (`wrong`), one boolean per image. error: the image is classified wrongly. robust error: it is,
or an attack finds an x' with ||x' - x|| <= eps that is; a lower bound of the true robust error, since an attack can
fail.
"""

from contextlib import ExitStack

import torch
import torch.nn.functional as F

from .attacks import frozen, misclassified, pgd
from .checks import check_count, check_data, check_inputs, check_statistics, check_targets
from .differentiate import alike, as_module, differentiating, own, unchanged
from .models import ACTIVATIONS, any_layout

ROUNDING = 1e-6  # by so much an attack may leave [0, 1]: there and back to normalised pixels it loses some digits


@differentiating()
def predict(model, x, *, batch_size=500):
    """Logits (N, classes) of the model in evaluation mode, without gradient, in x's type, or their own if that is finer
    or x holds whole numbers.

    Raises ValueError for no inputs at all, and for a model that returns no logits.
    """
    batch_size = check_count(1, batch_size=batch_size)
    check_data(x)
    with torch.no_grad(), frozen(model, x, "full") as logits_of:
        return torch.cat([logits_of(own(part).contiguous()) for part in x.split(batch_size)])


@differentiating()
def wrong(model, x, y, attack=None, *, batch_size=500):
    """The mask (N,) of images that are not given their label, as they are or by an attack.

    Args:
        x, y: as for `attacks.pgd`; x may be `data.Images`, of which one batch is held at a time.
        attack: None, or a function (model, x, y) -> x_adv, such as `functools.partial(pgd, eps=..., stop_early=True)`.
            It is shown only the images that are classified rightly.
    Raises:
        ValueError: labels that do not match, logits that are not finite, an attack that leaves [0, 1] and what it
            raises, or a model to attack that answers the same images differently each time, or in another batch, or
            that seeds PyTorch's generator.
    """
    batches, masks = in_batches(x, y, batch_size), []
    if attack is not None:
        check_answers(model, x)
    for a, b in batches:
        mask = misclassified(predict(model, a), b)
        i = (~mask).nonzero().squeeze(1)
        if attack is not None and len(i):
            mask[i] = misclassified(predict(model, _made(attack, model, a[i], b[i])), b[i])
        masks.append(mask)
    return torch.cat(masks)


def check_answers(model, x):
    """Raise ValueError if the model answers the first images differently when it is asked again, by more than rounding,
    or in other places of another batch: of one that tosses a coin, keeps a state or mixes images, an attack finds the
    worst of its answers, at the same image."""
    check_statistics(model)
    if any_layout(as_module(model)):
        return
    few = x[torch.arange(min(10, len(x)))]
    answers, ends = [], []
    with torch.random.fork_rng(devices=[]):
        for _ in range(8):
            torch.rand(1, device="cpu")  # the generator's states differ then, unless the model sees to it
            answers.append(predict(model, few).double())
            ends.append(torch.get_rng_state())
    if torch.equal(*ends[:2]):
        what = "the model seeds PyTorch's generator, from which attacks draw, too: their starts would all be the same"
        raise ValueError(f"{what}. Let it draw from a torch.Generator of its own")
    first, *again = answers
    apart = (first.amax(0) - first.amin(0) if len(few) > 1 else first.abs()).max()  # what a mask puts in is alike
    if any(((a - first).abs() > 1e-3 * apart + 1e-5 * first.abs()).any() for a in again):
        raise ValueError("the model answers the same images differently when it is asked again: fix what it draws")
    moved = torch.cat([predict(model, part).double() for part in few.flip(0).split(-(-len(few) // 2))]).flip(0)
    if ((moved - first).abs() > 0.05 * apart + 1e-3 * first.abs()).any():  # other sums of numbers of a coarse type
        raise ValueError("the model's answer to an image hangs on its place in the batch, or on the other images in it")


def in_batches(x, y, batch_size):
    """Batches (a, b) of images and labels, all checked before the first; but `data.Images` only when their turn comes.

    Raises ValueError as `wrong`."""
    batch_size = check_count(1, batch_size=batch_size)
    check_targets(x, y)
    if isinstance(x, torch.Tensor):
        check_inputs(x, y)
    return (check_inputs(a, b)[:2] for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True))


def error(model, x, y, *, batch_size=500):
    """Share of the inputs (N, C, H, W) that are not given their label (N,): a float in [0, 1]."""
    return share(wrong(model, x, y, batch_size=batch_size))


def robust_error(model, x, y, attack, *, batch_size=500):
    """Share of the inputs that are not given their label, as they are or by an attack (as for `wrong`)."""
    if not callable(attack):
        raise ValueError(f"attack must be a function (model, x, y) -> x_adv, got {attack!r}; `error` is without one")
    return share(wrong(model, x, y, attack, batch_size=batch_size))


def share(mask):
    """The mean of a mask, a float."""
    return mask.double().mean().item()


@differentiating()
def attacked(model, x, y, attack, *, batch_size=500):
    """The attacked inputs (N, C, H, W), made batch by batch."""
    return torch.cat([_made(attack, model, a, b) for a, b in in_batches(x, y, batch_size)])


def _put_back(t, before):
    if t.dtype != before.dtype:  # a parameter stays itself when its model is cast
        t.data = before
    elif not alike(t, before):  # some cannot be written to
        t.detach().copy_(before)


def _made(attack, model, x, y):
    """What an attack makes of copies; what it does to the model's modes, flags, gradients, parameters and buffers is
    undone."""
    inner = as_module(model)
    with ExitStack() as afterwards:
        for _, t in (*inner.named_parameters(), *inner.named_buffers()):
            afterwards.callback(_put_back, t, own(t).clone())
        for _, p in inner.named_parameters():
            afterwards.callback(setattr, p, "grad", p.grad)
            p.grad = None
        afterwards.enter_context(unchanged(inner))
        made = attack(model, x.clone(), y.clone())
    if not isinstance(made, torch.Tensor) or made.shape != x.shape:
        got = tuple(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
        raise ValueError(f"an attack must return images {tuple(x.shape)}, got {got}")
    low, high = made.detach().aminmax()
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise ValueError(f"an attack must stay in [0, 1], got values from {low:.9g} to {high:.9g}")
    return own(made if low >= 0 and high <= 1 else made.clamp(0, 1))


def evaluate(model, x, y, *, eps, step_size, num_steps, norm="linf", seed=0, batch_size=500):
    """Clean error, robust error and mean adversarial loss under `pgd` from one seeded random start.

    Returns:
        {"clean_error", "robust_error", "robust_loss"}, floats; the loss, over all images, in nats.
    """
    generator = torch.Generator(x.device).manual_seed(check_count(-(2**63), seed=seed))
    settings = {"eps": eps, "step_size": step_size, "num_steps": num_steps, "norm": norm, "generator": generator}
    clean, robust, losses = [], [], []
    for a, b in in_batches(x, y, batch_size):
        logits = predict(model, pgd(model, a, b, **settings))
        clean.append(misclassified(predict(model, a), b))
        robust.append(clean[-1] | misclassified(logits, b))
        losses.append(F.cross_entropy(logits.double(), b, reduction="none"))
    return {
        "clean_error": share(torch.cat(clean)),
        "robust_error": share(torch.cat(robust)),
        "robust_loss": torch.cat(losses).mean().item(),
    }


def unit_activity(model, x, *, batch_size=500):
    """How alive the layers are: per activation layer and for the logits, what its units do over all inputs.

    Args:
        model: an nn.Module whose activations are modules of their own (as in `models`).
        x: inputs (N, C, H, W).
    Returns:
        A list of dicts {"layer", "units", "dead", "constant"}, in the order of use: dead is the share of units (channel
        and place) that are 0 for every input, constant the share whose value is the same for every input, to 1e-6. A
        layer with constant share 1 is degenerate: nothing of the input gets past it. A module that is used several
        times in a pass is several layers ("2", "2 again", ...), one that is not used is none.
    """
    low, high, used = {}, {}, []

    def note(name, values):
        used.append(name)
        name += " again" * (used.count(name) - 1)
        low[name] = torch.minimum(low.get(name, values), values).amin(0, keepdim=True)
        high[name] = torch.maximum(high.get(name, values), values).amax(0, keepdim=True)

    model = as_module(model)
    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(lambda *_: used.clear()))
        for name, m in model.named_modules():
            if isinstance(m, tuple(ACTIVATIONS.values())):
                hooks.enter_context(m.register_forward_hook(lambda _m, _x, out, name=name: note(name, out.detach())))
        hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled parts pass hooks over
        note("logits", predict(model, x, batch_size=batch_size))
    found = []
    for name in low:
        dead, constant = (low[name] == 0) & (high[name] == 0), high[name] - low[name] <= 1e-6
        found.append({"layer": name, "units": dead.numel(), "dead": share(dead), "constant": share(constant)})
    return found
