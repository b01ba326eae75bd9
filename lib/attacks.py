"""Attacks inside an L-inf or L2 ball: `project`, `fgsm`, `pgd`; `simba` and `autoattack` for evaluation.

All take `(model, x, y, *, eps, ...)` and return `x_adv`: detached, inside the ball of radius eps round x and inside
[0, 1]. The model is run in evaluation mode on constants: its mode, `requires_grad` flags, `.grad` fields and
batch-normalisation buffers are afterwards as they were before, whatever happens in between.
"""

import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from threading import RLock

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack

from .checks import NORMS, STARTS, check_choice, check_count, check_eps, check_inputs, check_labels, check_logits
from .compute import exact_products, fast_dtype
from .differentiate import as_module, differentiating, gradient, own, unchanged
from .fast import as_function
from .models import any_layout


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
    check_choice("norm", norm, NORMS)
    eps = check_eps(eps, norm="l2")  # perturbations have no range
    if norm == "linf":
        return delta.clamp(-eps, eps)
    length = _l2(delta.double())  # squares of large values are beyond a smaller type
    return delta * (eps / length.clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1).to(delta.dtype)


def fgsm(model, x, y, *, eps, norm="linf"):
    """Fast gradient (sign) method (Goodfellow et al. 2015, arXiv:1412.6572): one step of length eps from x itself.

    Arguments, result and errors as for `pgd`.
    """
    return pgd(model, x, y, eps=eps, step_size=eps, num_steps=1, norm=norm, random_start=False)


@differentiating()
def pgd(
    model, x, y, *, eps, step_size, num_steps, norm="linf", num_restarts=1, random_start=True, loss="ce",
    generator=None, precision="auto", stop_early=False,
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
        random_start: True or "step" begins at a uniform point of the ball of radius min(step_size, eps) (the paper's
            start), "ball" at one of the whole ball, False at x itself.
        loss: "ce" (cross entropy) or "margin" (largest other logit minus the true one). Where the label's probability
            is near 1 the cross entropy and its gradient are lost to rounding; a function of it is followed that is not
            (`LOSSES`).
        generator: torch.Generator on x's device for the starts; without one, the global generator.
        precision: "auto" runs this library's own layers in bfloat16 where this machine gains by it (perturbation and
            loss stay in x's type); "full" never does.
        stop_early: an image that is misclassified is moved no further and started no more. No fewer images fall, in
            fewer steps (now and then one more, that would have recovered); the loss of the fallen is not maximised.
    Returns:
        x_adv (B, C, H, W), detached, in [0, 1], ||x_adv - x|| <= eps (exactly, if it is computed in float64). With a
        warning where autograd knows of no way from the logits to the input, though they depend on it.
    Raises:
        ValueError: eps or step_size negative, NaN or (linf) above 1; x not float32 or float64, not in [0, 1] or not
            (B, C, H, W); labels that do not match; unknown norm, loss or precision; a model that returns NaN,
            infinities or no logits (B, classes), or is of another type than x.
    """
    x, y, eps = check_inputs(x, y, eps, norm, generator)
    step_size = check_eps(step_size, name="step_size", norm=norm)
    num_steps, num_restarts = check_count(0, num_steps=num_steps), check_count(1, num_restarts=num_restarts)
    check_choice("random_start", random_start, STARTS)
    check_choice("loss", loss, LOSSES)
    with frozen(model, x, precision) as logits_of, frozen(model, x, "full") as exact_logits_of:

        def judge(x_adv, y):  # in full precision, as the evaluation will be
            with torch.no_grad():
                logits = exact_logits_of(x_adv)
            return x_adv, misclassified(logits, y), LOSSES[loss](logits, y)

        if not (eps and num_steps):
            judge(x, y)  # labels and model are looked at even where nothing moves
        if eps == 0:
            return x.clone()

        def ascend(x_adv, y, limits):
            out, i = x_adv.clone(), torch.arange(len(y), device=y.device)  # i: the images that are being moved
            for step in range(num_steps):
                g, wrong = input_gradient(logits_of, x_adv, y, LOSSES[loss])
                if step == 0 and not g.any() and _cut_off(logits_of, x_adv):
                    warnings.warn(CUT.format(type(as_module(model)).__name__), stacklevel=4)
                if stop_early and wrong.any():
                    wrong[wrong.clone()] = judge(x_adv[wrong], y[wrong])[1]
                    out[i[wrong]] = x_adv[wrong]
                    i, x_adv, y, g, *limits = (t[~wrong] for t in (i, x_adv, y, g, *limits))
                    if not len(i):
                        break
                x_adv = _into(x_adv.add_(g.sign_() if norm == "linf" else _unit(g), alpha=step_size), limits, eps, norm)
            out[i] = x_adv
            return out

        best = None
        for _ in range(num_restarts):
            x_adv, limits = begin(x, eps, step_size, norm, random_start, generator)
            left = slice(None)
            if stop_early and best:
                x_adv, left = torch.where(best[1].view(-1, 1, 1, 1), best[0], x_adv), (~best[1]).nonzero().squeeze(1)
                if not len(left):
                    break
            x_adv[left] = ascend(x_adv[left], y[left], [t[left] for t in limits])
            if num_restarts == 1:
                return x_adv
            new = judge(x_adv, y)
            best = new if best is None else _stronger(best, new)
    return best[0]


@differentiating()
def simba(model, x, y, *, eps, num_queries, norm="linf", generator=None):
    """SimBA, a black-box attack that sees probabilities only (Guo et al. 2019, arXiv:1905.07121), image by image.

    One value of the image after the other, in random order, is moved up or else down, and stays where the probability
    of the label falls. A step goes from one face of the ball to the other ("linf": 2 eps) or is 0.2 long ("l2", as in
    the paper); what leaves the ball or the box is put back. An image that is misclassified is left alone.

    Args:
        num_queries: model evaluations per image, the first one of x itself included; at least 1.
        generator: torch.Generator on x's device for the order; without one, the global generator.
    Returns:
        x_adv as for `pgd`. More queries with the same generator state never give a larger probability of the label.
    Raises:
        ValueError: as for `pgd`; num_queries below 1.
    """
    x, y, eps = check_inputs(x, y, eps, norm, generator)
    num_queries = check_count(1, num_queries=num_queries)
    x_adv, size, limits = x.clone(), x[0].numel(), _limits(x, eps, norm)
    order = torch.rand(len(x), size, generator=generator, device=x.device, dtype=torch.float32).argsort(1)
    turn = torch.zeros_like(y)  # each image's own place in its order, two turns (up, down) for each value
    with torch.no_grad(), frozen(model, x, "full") as logits_of:

        def look(inputs, labels):
            logits = logits_of(inputs)
            return ~misclassified(logits, labels), -_log_odds(logits, labels)  # ordered as probabilities, not rounded

        standing, best = look(x_adv, y)
        for _ in range(num_queries - 1):
            i = standing.nonzero().squeeze(1)
            if eps == 0 or len(i) == 0:
                break
            where = order[i, turn[i] // 2 % size][:, None]
            step = (1 - 2 * (turn[i] % 2))[:, None] * (2 * eps if norm == "linf" else 0.2)
            moved = x_adv[i].flatten(1).scatter_add(1, where, step.to(x.dtype)).view_as(x[i])
            moved = _into(moved, [t[i] for t in limits], eps, norm)
            right, score = look(moved, y[i])
            falls = score < best[i]
            x_adv[i], best[i] = torch.where(falls.view(-1, 1, 1, 1), moved, x_adv[i]), torch.minimum(score, best[i])
            standing[i] = right | ~falls
            turn[i] += torch.where(falls & (turn[i] % 2 == 0), 2, 1)  # a step up that is kept needs no step down
    return x_adv


@differentiating()
def autoattack(
    model, x, y, *, eps, norm="linf", attacks=("apgd-ce", "apgd-dlr", "square"), num_steps=100, num_restarts=5,
    num_queries=5000, seed=0, batch_size=256,
):  # fmt: skip
    """AutoAttack (Croce & Hein 2020, arXiv:2003.01690) through pyautoattack: each attack on what the others left.

    Args:
        attacks: one of "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square", or a list of them, in its order. APGD
            has rho = 0.75.
        num_steps, num_restarts: of APGD and FAB. The targeted ones have one restart for each of up to 9 classes.
        num_queries: of Square; below 5,000 its schedule of square sizes is rescaled to them.
        seed: of everything random. The global generators are afterwards as they were before.
        batch_size: images attacked together. The result depends on it, since a batch shares its random numbers.
    Returns:
        x_adv as for `pgd`, with its warning; images that withstand every attack come back unchanged.
    Raises:
        ValueError: as for `pgd`; an unknown attack, or too few classes for it ("apgd-dlr" needs 3, "apgd-t" 4).
    """
    x, y, eps = check_inputs(x, y, eps, norm)
    num_steps, num_restarts, num_queries, batch_size = check_count(
        1, num_steps=num_steps, num_restarts=num_restarts, num_queries=num_queries, batch_size=batch_size
    )
    seed = check_count(-(2**63), seed=seed)
    attacks = (attacks,) if isinstance(attacks, str) else tuple(attacks)
    unknown = [a for a in attacks if a not in LEAST_CLASSES]
    if unknown or not attacks:
        raise ValueError(f"unknown attack {unknown}: choose some of {', '.join(LEAST_CLASSES)}")
    limits, x_adv, where = _limits(x, eps, norm), x.clone(), range(torch.cuda.device_count())  # all are seeded
    with (
        frozen(model, x, "full") as logits_of, torch.random.fork_rng(devices=where), torch.no_grad(),
        warnings.catch_warnings(action="ignore"), x.device, ExitStack() as afterwards,
    ):  # fmt: skip
        afterwards.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)  # pyautoattack makes what it needs in it
        run, image = partial(_Guarded.apply, logits_of, x.dtype), x.float()
        logits = torch.cat([logits_of(part) for part in x.split(batch_size)])
        standing, classes = ~misclassified(logits, y), logits.shape[1]
        for attack in attacks:
            if classes < LEAST_CLASSES[attack]:
                raise ValueError(f"{attack} needs at least {LEAST_CLASSES[attack]} classes, the model has {classes}")
        if eps == 0:
            return x_adv
        cut = standing.any() and set(attacks) != {"square"} and _cut_off(logits_of, x)
        ball = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": seed, "device": x.device}
        plain = {"n_iter": num_steps, "n_restarts": num_restarts}
        targeted = {"n_iter": num_steps, "n_restarts": 1, "n_target_classes": min(9, classes - 1)}
        make = {  # all settings at once, since the constructors derive others from them
            "apgd-ce": partial(APGDAttack, loss="ce", rho=0.75, **plain),
            "apgd-dlr": partial(APGDAttack, loss="dlr", rho=0.75, **plain),
            "apgd-t": partial(APGDAttack_targeted, rho=0.75, **targeted),
            "fab": partial(FABAttack_PT, **plain),
            "fab-t": partial(FABAttack_PT, targeted=True, **targeted),
            "square": partial(SquareAttack, p_init=0.8, n_queries=num_queries, resc_schedule=num_queries < 5000),
        }
        for attack in attacks:
            runner = make[attack](run, **ball)
            for i in standing.nonzero().squeeze(1).split(batch_size):
                if len(i):
                    try:
                        found = runner.perturb(image[i], y[i]).to(x.dtype)
                    except torch.OutOfMemoryError:
                        raise
                    except (RuntimeError, ZeroDivisionError) as error:  # the model itself has run on all images above
                        what = f"{attack} under {norm} cannot attack images of {tuple(x.shape[1:])} with such logits"
                        raise ValueError(f"{what}: {error}") from error
                    found = torch.where(found.isfinite(), found, x[i])
                    found = _into(found, [t[i] for t in limits], eps, norm)
                    fell = logits_of(found).argmax(1) != y[i]
                    x_adv[i[fell]], standing[i[fell]] = found[fell], False
    if cut:  # here, where warnings are the caller's again
        warnings.warn(CUT.format(type(as_module(model)).__name__), stacklevel=3)
    return x_adv


LEAST_CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2, "square": 2}


class _Guarded(torch.autograd.Function):
    """A model as pyautoattack needs it, whatever it is: float32 in and out, logits that are finite and its own to
    overwrite, gradients that are contiguous, zero where there are none, and end in nobody's `.grad` but its own. Of
    equal logits the first stays the largest, as it is to `argmax`: Square takes a tie for a fall, and goes no further,
    and those of a coarse type are often equal."""

    @staticmethod
    def forward(ctx, logits_of, dtype, x):
        with torch.set_grad_enabled(ctx.needs_input_grad[2]):
            ctx.x = x.detach().to(dtype).requires_grad_(ctx.needs_input_grad[2])
            ctx.logits = logits_of(ctx.x)
        logits = ctx.logits.detach().to(torch.float32, copy=True)
        if not torch.isfinite(logits).all():
            raise ValueError("the model returned NaN or infinite logits, or such as are beyond float32")
        first = logits.argmax(1, keepdim=True)
        tied = (logits == logits.gather(1, first)).scatter(1, first, False)
        return torch.where(tied, logits.nextafter(logits.new_tensor(float("-inf"))), logits)

    @staticmethod
    def backward(ctx, g):
        (g,) = gradient(ctx.logits, [ctx.x], g.to(ctx.x.dtype), keep=True)
        if not torch.isfinite(g).all():  # AutoAttack would take it for an image that stands
            raise ValueError("the gradient of the model's logits is NaN or infinite at some input")
        return None, None, g.float().contiguous()


def misclassified(logits, y):
    """The mask of images (N,) whose label has not the largest logit. Raises ValueError as `check_labels`."""
    check_labels(logits, y)
    return logits.argmax(1) != y


def input_gradient(logits_of, x_adv, y, loss):
    """The gradient of the loss at x_adv, and which images are misclassified there. While a CUDA graph is being captured
    nothing can be read, and so nothing is checked."""
    leaf = x_adv.detach().requires_grad_()
    logits = logits_of(leaf)
    read = not (x_adv.is_cuda and torch.cuda.is_current_stream_capturing())
    if read:
        check_labels(logits, y)
    (g,) = gradient(loss(logits, y).sum(), [leaf])
    # Asked here, because the sign of NaN is 0; first of the sum, which is the faster question.
    if read and not torch.isfinite(g.sum()) and not torch.isfinite(g).all():
        raise ValueError("the gradient of the model's loss is NaN or infinite at some input")
    return g, logits.detach().argmax(1) != y


CUT = (
    "{}: no gradient leads from the model's output to its input (no_grad, detach, whole numbers), so that attacks by "
    "gradients leave images where they start, which proves nothing"
)


@torch.enable_grad()
def _cut_off(logits_of, x):
    """Whether logits depend on the input, and autograd does not know it; asked of the first image and its negative."""
    leaf = x[:1].clone().requires_grad_()
    logits = logits_of(leaf)
    known = logits.requires_grad and torch.autograd.grad(logits.sum(), leaf, allow_unused=True)[0] is not None
    return not known and not torch.equal(logits, logits_of(1 - leaf))


def begin(x, eps, step_size, norm, random_start, generator):
    """Where `pgd` begins, and the limits that it keeps (`_limits`)."""
    x_adv, limits = x.clone(), _limits(x, eps, norm)
    if random_start:
        radius = eps if random_start == "ball" else min(step_size, eps)
        x_adv = _into(x_adv.add_(_start(x, radius, norm, generator)), limits, eps, norm)
    return x_adv, limits


def _limits(x, eps, norm):
    """What `_into` needs to know of the ball and the box, image by image: tensors like x.

    For linf their smallest and largest points in x's type that are within eps of x, to the last digit.
    """
    if norm == "l2":
        return [x]
    wide = x.double()
    low, high = (wide - eps).clamp_min(0).to(x.dtype), (wide + eps).clamp_max(1).to(x.dtype)
    return [torch.where((t.double() - wide).abs() > eps, t.nextafter(x), t) for t in (low, high)]


def _into(x_adv, limits, eps, norm):
    """Back into the ball and the box; x_adv is changed. Both sets are convex; for L2 the clamp after the projection
    stays in the ball because x itself is in the box, so clamping moves no coordinate away from x."""
    if norm == "linf":
        return x_adv.clamp_(*limits)
    x = limits[0].double()
    rounding = torch.finfo(x_adv.dtype).eps * x[0].numel() ** 0.5  # more than that of the pixels in x_adv's type
    delta = project(x_adv.double().sub_(x), eps=max(eps - rounding, 0.0), norm=norm)
    return x_adv.copy_(delta.add_(x)).clamp_(0, 1)


def _unit(g):
    """g of length 1, image by image, or 0. Scaled by its largest entry first: squares of small gradients underflow."""
    largest = g.abs().amax(tuple(range(1, g.dim())), keepdim=True)
    g = g / largest.where(largest > 0, 1)
    return g / _l2(g).clamp_min(1)


def _start(x, radius, norm, generator):
    """Uniform in the ball of this radius."""
    if norm == "linf":
        return torch.empty_like(x).uniform_(-radius, radius, generator=generator)
    direction = torch.empty_like(x).normal_(generator=generator)
    shrink = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype) ** (1 / x[0].numel())
    return _unit(direction) * radius * shrink.view(-1, 1, 1, 1)


def _stronger(old, new):
    """Image by image the better of two (x_adv, misclassified, loss): misclassified first, then the larger loss."""
    better = (new[1] & ~old[1]) | ((new[1] == old[1]) & (new[2] > old[2]))
    return tuple(torch.where(better.view(-1, *[1] * (n.dim() - 1)), n, o) for o, n in zip(old, new, strict=True))


def _margin(logits, y):
    return _others(logits, y).amax(1) - logits.gather(1, y[:, None]).squeeze(1)


def _log_odds(logits, y):
    """log((1 - p) / p) of the label's probability p, which grows with the cross entropy, log(1 + (1 - p) / p)."""
    return _others(logits, y).logsumexp(1) - logits.gather(1, y[:, None]).squeeze(1)


def _others(logits, y):
    return logits.scatter(1, y[:, None], float("-inf"))


# What attacks ascend, and compare end points by. In float32 the gradient of the cross entropy itself loses the label's
# part, p - 1, from a margin of about 15 on, before the others', and from 100 on all.
LOSSES = {"ce": _log_odds, "margin": _margin}


@contextmanager
def frozen(model, x, precision="auto"):
    """The model as a function of its input alone: evaluation mode, constant parameters.

    Yields a function x -> logits (B, classes) in x's type, or their own if that is finer. While it is in use detached
    copies stand in for the model's parameters and buffers, so no flag of the model has to be touched; they and the mode
    are put back (one thread at a time: they may share the model). Models made of nothing but this library's own layers
    (`models.any_layout`) are evaluated by `fast`, with "auto" in bfloat16 where this machine gains by it; any other
    sees what it would see without us.

    Raises ValueError for what is no nn.Module, an unknown precision, a model of another type or device than x; the
    function, for an output that is not logits.
    """
    model = as_module(model)
    check_choice("precision", precision, ("auto", "full"))
    with ONE_THREAD, unchanged(model), ExitStack() as afterwards:
        try:
            model.eval()  # first: some models put weights together, or fill buffers, when their mode changes
        except NotImplementedError as error:  # torch.export's
            raise ValueError(f"{type(model).__name__} has no evaluation mode: {error}") from error
        slots = [held for m in model.modules() for held in (m._parameters, m._buffers)]
        tensors = [t for held in slots for _, t in held.items() if t is not None]
        kind = "{0.dtype} on {0.device}".format
        others = {kind(t) for t in tensors if t.is_floating_point()} - {kind(x)}
        mismatch = f"a model of {' and '.join(sorted(others))} does not take images of {kind(x)}"
        if ours := any_layout(model):
            if others:
                raise ValueError(mismatch)
            low = fast_dtype(x.device) if precision == "auto" and x.dtype == torch.float32 else None
            fast = cache(partial(as_function, model, low))  # made when it is used first: some attacks use one of two
        else:
            constants = {id(t): _constant(t) for t in tensors}
            may_learn = any(isinstance(v, torch.optim.Optimizer) for m in model.modules() for v in vars(m).values())
            afterwards.callback(_swap, slots, {id(constants[id(t)]): t for t in tensors})
            _swap(slots, constants)

        def logits_of(inputs):
            try:
                with exact_products() if precision == "full" else nullcontext():
                    # Some models write to what they get.
                    logits = fast()(inputs) if ours else model(inputs.clone())
            except RuntimeError as error:
                if "does not require grad" in str(error) and not torch.is_grad_enabled():
                    what = "the model differentiates in its own forward, and gradients are off, as where it is used"
                    raise ValueError(f"{what}: let it switch them on (torch.enable_grad): {error}") from error
                if not others or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise ValueError(f"{mismatch}: {error}") from error  # models may cast by themselves, so only now
            check_logits(logits, len(inputs))
            if not ours and may_learn and any(p.grad is not None for _, p in model.named_parameters()):
                what = "the model learns while it is used, by an optimiser that it holds, which constants do not follow"
                raise ValueError(f"{what}: give it as it is after a step")
            finer = torch.promote_types(x.dtype, logits.dtype) if x.dtype.is_floating_point else logits.dtype
            return logits.to(finer, copy=not ours)  # a copy, since some models give the same tensor again

        yield logits_of


ONE_THREAD = RLock()


def _swap(slots, others):
    """Put others, by the ids of what they stand in for, into the places of a model's tensors. By their places, since by
    names PyTorch's `functional_call` does not find its way back from a module that has two."""
    for held in slots:
        for name, t in list(held.items()):
            if id(t) in others:
                held[name] = others[id(t)]


def _constant(t):
    """A parameter or buffer as a constant of ours, which the model's forward cannot tell from its own: of its class and
    with its attributes. Buffers are copied, since some models count in them."""
    constant = own(t) if isinstance(t, torch.nn.Parameter) else own(t).clone()
    if type(constant) is not type(t):
        constant = constant.as_subclass(type(t))
    if isinstance(t, torch.nn.Parameter):
        constant.requires_grad_(t.requires_grad)
    vars(constant).update(vars(t))
    return constant


def _l2(t):
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True) if t.dim() > 1 else t.abs()
