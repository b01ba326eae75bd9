"""Is a measured robust error real? Attacks on the images still standing, and the usual signs of gradient masking.

A result is a mask: one boolean per image, True where the image or its attacked version is misclassified, so that masks
of several attacks on the same images can be put together and compared image by image. Robust error is a mask's mean.

A model whose gradients are useless looks robust to every attack that follows them. The signs of it are listed by
Athalye et al. (2018, arXiv:1802.00420) and Carlini et al. (2019, arXiv:1902.06705); `signs` looks for them.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from . import runs
from .attacks import LEAST_CLASSES, LOSSES, autoattack, fgsm, frozen, input_gradient, pgd, simba
from .checks import as_numbers, check_choice, check_count
from .differentiate import differentiating
from .evaluation import attacked, check_answers, in_batches, wrong


def first_falls(model, x, y, attack, *, num_restarts=1, batch_size=500):
    """Which restart of an attack is the first to break each image. Images that fell are not attacked again.

    Args:
        model, x, y: as for `attacks.pgd`.
        attack: a function (model, x, y) -> x_adv that draws new random numbers at each call, such as
            `functools.partial(pgd, eps=..., generator=...)`.
        num_restarts: at most so many attacks on each image.
        batch_size: images attacked together; when few still stand, several restarts of them are.
    Returns:
        A list of N integers: 0 for an image that is misclassified as it is, r for one that fell to restart r,
        num_restarts + 1 for one that stands.
    Raises:
        ValueError: num_restarts or batch_size below 1, no images, and whatever the attack raises.
    """
    num_restarts, batch_size = check_count(1, num_restarts=num_restarts, batch_size=batch_size)
    falls = torch.where(wrong(model, x, y, batch_size=batch_size), 0, num_restarts + 1)
    check_answers(model, x)
    done = 0
    while done < num_restarts and len(left := (falls > done).nonzero().squeeze(1)):
        copies = min(max(1, batch_size // len(left)), num_restarts - done)
        for part in left.repeat(copies).view(copies, -1).split(max(1, batch_size // copies), dim=1):
            i = part.flatten()
            made = attacked(model, x[i], y[i], attack, batch_size=len(i))
            fell = wrong(model, made, y[i], batch_size=batch_size)
            restart = torch.arange(done + 1, done + copies + 1, device=x.device)[:, None]
            falls[part[0]] = torch.where(fell.view(copies, -1), restart, num_restarts + 1).amin(0)
        done += copies
    return falls.tolist()


# Of what attacks find: raised by hand when one finds otherwise (3: SimBA goes by log odds), so that nothing remembered
# is taken for it; tests/test_audit.py notices when it should be.
VERSION = 3


@dataclass(frozen=True)
class Subject:
    """A network on trial, and the images it is tried on; its results are remembered (`runs.remember`).

    facts: a JSON dict of all that decides network and images, such as the name of the run's folder.
    """

    network: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    facts: dict

    def __post_init__(self):
        if taken := self.facts.keys() & {"attack", "restarts", "seed", "settings", "source"}:
            raise ValueError(f"facts must not name {', '.join(sorted(taken))}: these are what is asked of the network")

    def falls(self, attack, *, restarts=1, seed=0, source=None, **settings):
        """`first_falls` under an attack (`attack_by_name`), run `restarts` times; source: another Subject, on whose
        network the attacks are made."""
        if restarts > 1 and attack in ("fgsm", *LEAST_CLASSES):
            raise ValueError(f"{attack} draws the same numbers at each call: its own num_restarts begins it anew")
        facts = self.facts | {"attack": attack, "restarts": restarts, "seed": seed, "settings": settings}

        def compute():
            made = attack_by_name(attack, seed=seed, device=self.x.device, **settings)
            network = (source or self).network  # the attacks are made on it
            return first_falls(self.network, self.x, self.y, lambda _, x, y: made(network, x, y), num_restarts=restarts)

        found = runs.remember("attacks", facts | {"source": source and source.facts}, compute, version=VERSION)
        if len(found) != len(self.x):
            raise ValueError(f"these facts name {len(found)} images, and here are {len(self.x)}: {self.facts}")
        return found

    def mask(self, attack, **settings):
        """The mask of an attack, arguments as for `falls`: an array of N booleans."""
        return np.array(self.falls(attack, **settings)) <= settings.get("restarts", 1)


def attack_by_name(name, *, seed=0, device="cpu", **settings):
    """A function (model, x, y) -> x_adv, with a generator of its own.

    name: "pgd", "fgsm", "simba", "noise" (a uniform point of the ball), or one of `autoattack`'s, such as "apgd-ce".
    settings: those of the attack. Raises ValueError for an unknown name.
    """
    check_choice("attack", name, ("pgd", "fgsm", "simba", "noise", *LEAST_CLASSES))
    seed = check_count(-(2**63), seed=seed)
    if name in LEAST_CLASSES:
        return partial(autoattack, attacks=(name,), seed=seed, **settings)
    if name == "fgsm":
        return partial(fgsm, **settings)
    if name == "noise":
        settings |= {"step_size": 0.0, "num_steps": 0, "random_start": "ball"}
    generator = torch.Generator(device).manual_seed(seed)
    return partial(simba if name == "simba" else pgd, **settings, generator=generator)


@differentiating()
def flat(model, x, y, *, batch_size=500):
    """The mask of images at which what `pgd` ascends has a gradient of exactly zero, so that it cannot be followed."""
    mask = []
    for a, b in in_batches(x, y, batch_size):
        with frozen(model, a, "full") as logits_of:
            g, _ = input_gradient(logits_of, a, b, LOSSES["ce"])
        mask += (g.flatten(1) == 0).all(1).tolist()
    return mask


def worst_case(masks):
    """Image by image the worst of several masks (a dict or a DataFrame of them): an array of N booleans.

    Raises ValueError for no masks at all, or masks of unequal length.
    """
    if not hasattr(masks, "keys"):
        raise ValueError(f"masks must have names, as in {{attack: mask}}, got {type(masks).__name__}")
    if not len(masks):
        raise ValueError("no attacks: a worst case needs at least one mask")
    return np.logical_or.reduce(_masks(masks[name] for name in masks))


def _masks(several):
    """Masks as arrays of N booleans. Raises ValueError for anything else, such as numbers of restarts."""
    masks = [as_numbers(mask) if np.ma.is_masked(mask) else np.asarray(mask) for mask in several]
    for mask in masks:
        if mask.dtype != bool or mask.ndim != 1:
            raise ValueError(f"a mask holds booleans, one per image, got {mask.dtype} of shape {mask.shape}")
    if len({len(mask) for mask in masks}) > 1:
        raise ValueError(f"masks of unequal length: {[len(mask) for mask in masks]}")
    return masks


def signs(reported, rivals, by_eps, flat, tried=None):
    """The usual signs of gradient masking, each as the images that show it: `inference.at_most` judges their share.

    A rival that should be weaker breaks an image that the reported attack leaves. An image that falls at one eps
    stands at the next one. An image stands at the largest eps. The loss is flat at an image.

    Args:
        reported: the mask of the attack whose robust error is reported, an iterated gradient attack.
        rivals: masks by name: attacks without gradients, of a single step, from another model; on the same images.
        by_eps: masks of the gradient attack by eps; at the largest eps the ball should hold the whole box.
        flat: the mask of `flat`.
        tried: {rival: mask of the images that it was tried on}, for those that were not tried on all.
    Returns:
        {sign: mask}, over all images but for the rivals: theirs is over those that they were tried on and the reported
        attack leaves. Of the steps from one eps to the next, only that with the most images.
    Raises:
        ValueError: masks of unequal length, no rivals, or fewer than two eps.
    """
    if not len(rivals) or len(by_eps) < 2:
        raise ValueError(f"needs at least one rival and two eps, got {len(rivals)} and {len(by_eps)}")
    grid, tried, found = sorted(by_eps), tried or {}, {}
    flat, reported, *curve = _masks([flat, reported, *(by_eps[e] for e in grid)])
    for name, mask in rivals.items():
        _, mask, where = _masks([reported, mask, tried.get(name, ~reported)])
        found[f"only {name} breaks it"] = mask[where & ~reported]
    found["it stands again at a larger eps"] = max((a & ~b for a, b in pairwise(curve)), key=np.sum)
    return found | {f"it stands at eps {grid[-1]:g}": ~curve[-1], "its loss is flat": flat}


class Masked(nn.Module):
    """A model with useless gradients but the predictions it had, nearly: for trying the audit on.

    Args:
        model: an nn.Module (B, C, H, W) -> logits.
        levels: the pixels are rounded to so many levels, a step function of slope zero; None leaves them.
        scale: the logits are multiplied by it, and what comes out are probabilities, as of a network that ends in a
            softmax; a large one saturates it, and its gradient then is zero in floating point. None leaves the logits.
    """

    def __init__(self, model, *, levels=None, scale=None):
        super().__init__()
        self.model, self.levels, self.scale = model, levels, scale

    def forward(self, x):
        if self.levels is not None:
            x = (x * (self.levels - 1)).round() / (self.levels - 1)
        logits = self.model(x)
        return logits if self.scale is None else (self.scale * logits).softmax(1)
