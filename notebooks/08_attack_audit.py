# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 8. Attack audit: is the robustness real?
#
# The robust error in Table 1 of Liu et al. (2020) is the share of images that an attack breaks. It is a lower bound:
# the attack may have been too weak, or the network may have learnt to hide its gradients from it (*gradient masking*).
# The [reviewers](https://papers.nips.cc/paper_files/paper/2020/file/f56d8183992b6c54c92c16a8519a6e2b-Review.html)
# asked for a step size chosen by grid, restarts, black-box attacks, another norm and the usual recipes as rivals. Each
# question is put here to networks of three kinds: trained under a *constant* budget, under a budget that rises along a
# *cosine*, and the *ensemble* of the networks at the ends of the periods of one run, which has as many epochs as the
# others. At the paper's eps of 0.4 the constant budget may end in a constant classifier (notebook 3), which says
# nothing of attacks. So a rising budget is tried there, and all three at a smaller eps, at which most train.
#
# If the robustness is real, then no stronger, longer or blinder attack breaks many digits more than the one reported,
# none of the usual signs of masking shows, and the better training stays better whatever the attack.
#
# *Change this, expect that:* give SimBA 4 queries, and its power check fails. Add `["ensemble", 0.4]` to the trials: in
# so few epochs its last period is too short for this eps, and PGD breaks nine of ten digits. Make `test_images` 40, and
# of the networks on trial no sign of masking can be excluded any more.
#
# A digit is *broken* if it is misclassified as it is, or after the attack. All attacks see the same digits.

# %% tags=["parameters"]
profile = "quick"
recipe = "lenet on mnist5k"
changes = {}
seeds = [0, 1]  # the first on trial; the second lends examples
trials = [["constant", 0.2], ["cosine", 0.2], ["ensemble", 0.2], ["cosine", 0.4]]  # kind of training, eps
periods = [0.6]  # where the ensemble's budget begins anew, as fractions of the epochs
test_images = 500
control_images = 150  # for networks that are masked on purpose
control_eps = 0.1  # of an undefended network, at which PGD leaves digits of it
reported = {"num_steps": 20, "step_fraction": 0.4}  # the attack whose error is reported; step size as a share of eps
step_fractions = [0.05, 0.1, 0.2, 0.8]
step_counts = [1, 5, 50]
restarts = {"each": 100, "claimed": 1000, "num_steps": 10, "step_fraction": 0.4}
restart_images = 50  # at most so many of the digits that all other attacks leave
other_steps = {"apgd-ce": 20, "apgd-dlr": 20, "apgd-t": 4}
square_queries = 200
simba = {"num_queries": 1000, "images": 100}  # at most so many of the digits that the reported attack leaves
eps_curve = [0.1, 0.2, 0.4, 1.0]
bound = 0.1  # a larger share of the digits that the reported attack leaves matters
margin = 0.02  # so does a larger difference of robust errors
order = ["lenet on mnist5k", 0.2]  # recipe and eps of the cells that show the order of budgets: there most train
euclidean = ["lenet on mnist5k in l2", 3.0]  # and of those that show the method under l2
rivals = {"the challenge's loop": "lenet by the challenge loop on mnist5k",
          "fast training": "lenet by fast training on mnist5k"}  # fmt: skip
rival_eps = {"the challenge's loop": [0.2], "fast training": [0.2, 0.4]}
shown_steps = [0, 1, 2, 5, 10, 20]

# %%
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch

from lib import audit, cells, evaluation, figures, inference, recipes, runs
from lib.compute import device
from lib.figures import Book
from lib.models import Ensemble

book = Book("08_attack_audit", globals())
settings = book.recipe(recipe)
digits, _ = recipes.load(settings)
x, y = (part[:test_images].to(device()) for part in (digits.x_test, digits.y_test))

# %% [markdown]
# ## The networks on trial
#
# Beside them: a network trained without any attack; networks of another seed, from which examples are carried over;
# and two that are **masked on purpose**. These answer as the undefended network does, but their gradients are useless:
# one rounds the pixels to 256 levels (a step function has slope zero), the other answers in probabilities, of its
# logits times 100,000 (the softmax saturates, and its gradient is zero in floating point). An audit that does not flag
# them is worth nothing.


# %%
def configure(kind, eps, seed):
    more = {} if kind in ("constant", "undefended") else {"schedule": "cosine"}
    if kind == "ensemble":
        more["restarts"] = sorted({round(p * settings["epochs"]) for p in periods} - {0, settings["epochs"]})
    return recipes.configure(settings, eps=eps, seed=seed, **more)


first, other = seeds[0], [*seeds[1:], seeds[0] + 1][0]
claimed = max(eps for _, eps in trials)
lender = {eps: next(kind for kind, e in trials if e == eps) for _, eps in trials}
keys = [("undefended", 0.0, first), *((kind, eps, first) for kind, eps in trials)]
keys += [(kind, eps, other) for eps, kind in lender.items()]
keys = list(dict.fromkeys(keys))
trained = dict(zip(keys, runs.grid([configure(*key) for key in keys], digits)))


# %%
def on_trial(run, count=test_images, left=None, **mask):
    """A run's network, or the ensemble of its periods' ends, with the first digits, or those of a mask; masked on
    purpose if asked."""
    ends = [*run.config.restarts, None]
    networks = [run.model(epoch).to(device()) for epoch in ends]
    network = Ensemble(networks) if len(networks) > 1 else networks[0]
    which = slice(count) if left is None else np.flatnonzero(left).tolist()
    named = len(x[:count]) if left is None else which
    facts = {"run": run.folder.name, "ends": ends, "images": [digits.fingerprint, named]} | mask
    return audit.Subject(audit.Masked(network, **mask) if mask else network, x[which], y[which], facts)


def hardly(mask):
    """Why nothing follows for a network, given its errors without an attack; empty if it classifies."""
    return f"hardly classifies: {mask.mean():.1%} wrong without an attack" if mask.mean() > 0.5 else ""


called = {(kind, eps): f"{kind} {eps:g}" for kind, eps in trials}
run_of = {called[key]: trained[(*key, first)] for key in called}
subjects = {name: on_trial(run) for name, run in run_of.items()}
eps_of = {name: eps for (_, eps), name in called.items()}
clean = {name: subject.mask("fgsm", eps=0.0) for name, subject in subjects.items()}
stalled = {name: hardly(mask) for name, mask in clean.items()}
on_digits = f"{len(x):,} test digits, one network of each kind"
print("Clean error:", ", ".join(f"{name} {mask.mean():.3f}" for name, mask in clean.items()))


# %%
def as_reported(eps, *, stop_early=True, **change):
    """The reported attack, with changes; by default a digit that fell is attacked no further."""
    how = reported | change
    return {"attack": "pgd", "eps": eps, "step_size": min(how["step_fraction"] * eps, 1.0), "norm": "linf",
            "num_steps": how["num_steps"], "random_start": "ball", "stop_early": stop_early}  # fmt: skip


def judged(rule, broken, left):
    """The rule applied to masks of the digits broken, by network, among those that were left; a network that hardly
    classifies leaves it undecided."""
    return inference.together({k: rule((m & left[k]).sum(), left[k].sum(), unless=stalled.get(k, ""))
                               for k, m in broken.items()})  # fmt: skip


def in_words(what, finding, by="the reported attack leaves"):
    """A finding of `judged` as an answer to: do more than so many digits count?"""
    said = {True: "no", False: "yes", "partly": "for some networks", None: "it cannot be told"}[finding.holds]
    return f"More than {bound:.0%} of the digits that {by}: {said}. {what}: {finding.measured}." + (
        f" Undecided: {finding.why}." if finding.why else "")  # fmt: skip


def on_left(run, left, most, *, restarts=1, masked=(), **how):
    """An attack on the first of the digits left, at most so many: the mask of these, and which restart breaks each."""
    where, falls = left & (np.cumsum(left) <= most), np.full(len(left), restarts + 1)
    if where.any():
        falls[where] = on_trial(run, left=where, **dict(masked)).falls(restarts=restarts, **how)
    return where, falls


# %%
def noise(*counts):
    return "two standard errors are at most " + " and ".join(f"{k**-0.5:.3f} on {k:,} digits" for k in counts)


base = {name: subject.mask(**as_reported(eps_of[name])) for name, subject in subjects.items()}
stand = {name: ~mask for name, mask in base.items()}  # what the reported attack leaves

# %% [markdown]
# ## What the attacks do to a digit
#
# Two digits, each attack, at the network's eps. Below, the perturbation: the colours run from -eps to eps.


# %%
def label(network, image):
    """The label a network gives, and its probability."""
    p, digit = evaluation.predict(network, image[None]).softmax(1)[0].max(0)
    return digit.item(), p.item()


def strip(axes, image, truth, eps, shown):
    """Two rows of panels: what networks call attacked images, and the perturbations. Returns the rows drawn.

    shown: {what: (network, attacked image)}.
    """
    for (what, (network, adversarial)), *pair in zip(shown.items(), *axes):
        digit, p = label(network, adversarial)
        title = f"{what}\n{truth} called {digit}\n{p:.0%}"
        largest = figures.draw_attacked(pair, image, adversarial, eps, title, wrong=digit != truth)
        mean = (adversarial - image).abs().mean().item()
        yield {"attack": what, "label": digit, "p": p, "largest": largest, "mean": mean}


# %%
attacks = {
    "FGSM": {"attack": "fgsm"}, "PGD": as_reported(0), "APGD-CE": {"attack": "apgd-ce"},
    "APGD-DLR": {"attack": "apgd-dlr"}, "APGD-T": {"attack": "apgd-t"},
    "Square": {"attack": "square", "num_queries": square_queries},
    "SimBA": {"attack": "simba", "num_queries": simba["num_queries"]},
}  # fmt: skip


def settings_of(name, eps):
    """The settings of an attack at an eps."""
    how = as_reported(eps) if name == "PGD" else attacks[name] | {"eps": eps}
    gradient = how["attack"] in other_steps
    return how | ({"num_steps": other_steps[how["attack"]], "num_restarts": 1} if gradient else {})


def example(subject, i, name, eps):
    """Digit i as an attack leaves it, on the network of a subject; remembered, since SimBA is slow."""
    if name == "digit":
        return x[i]
    how = as_reported(eps, stop_early=False) if name == "PGD" else settings_of(name, eps)
    settings = {key: value for key, value in how.items() if key != "attack"}
    attack = audit.attack_by_name(how["attack"], device=x.device, **settings)
    facts = subject.facts | how | {"digit": i}

    def compute():
        return attack(subject.network, x[i : i + 1], y[i : i + 1])[0].tolist()

    return torch.tensor(runs.remember("examples", facts, compute, version=audit.VERSION), device=x.device)


# %%
shown = called.get(("cosine", claimed), next(iter(subjects)))  # the network in the pictures
network, shown_eps, truth = subjects[shown].network, eps_of[shown], y.tolist()
known = np.flatnonzero(~clean[shown])
picked = (known if len(known) else np.arange(len(x)))[[0, -1]].tolist()  # the first and the last digit it knows
fig, axes = plt.subplots(2 * len(picked), 1 + len(attacks), figsize=(7, 2.3 * len(picked)))
rows = []
for i, pair in zip(picked, axes.reshape(len(picked), 2, -1)):
    made = {k: (network, example(subjects[shown], i, k, shown_eps)) for k in ("digit", *attacks)}
    rows += [{"digit": i, "truth": truth[i]} | row for row in strip(pair, x[i], truth[i], shown_eps, made)]
book.save(
    fig, "08_attacked_digits", pd.DataFrame(rows), source=digits.source, seeds=[first],
    caption=f"Two test digits, a {truth[picked[0]]} and a {truth[picked[-1]]}, attacked at eps {shown_eps:g} on the "
    f"network {shown}; above each what it is called (orange: wrong), and with which probability. Below, the "
    "perturbation: red +eps, blue -eps. Square and SimBA stop as soon as the label changes; APGD and Square give the "
    "digit back, with an empty panel below, where they fail.",
)  # fmt: skip

# %% [markdown]
# PGD as reported, on one network after each schedule, at the smaller eps: of the digits that all of them know, the
# first that the attack has broken on every one, and the first that it has broken on some (here from another start).

# %%
least = min(eps_of.values())
after = [name for name, eps in eps_of.items() if eps == least]  # a network for each schedule
known_to_all = ~audit.worst_case({name: clean[name] for name in after})
broken_on = np.sum([base[name] for name in after], axis=0) * known_to_all
some = (broken_on > 0) & (broken_on < len(after))
fig, axes = plt.subplots(2, 2 * (1 + len(after)), figsize=(7, 2.4))
rows = []
for mask, pair in zip((broken_on == len(after), some), np.split(axes, 2, axis=1)):
    i = int(mask.argmax())  # the first digit of all, if there is none
    made = {"digit": (subjects[after[0]].network, x[i])}
    made |= {name: (subjects[name].network, example(subjects[name], i, "PGD", least)) for name in after}
    rows += [{"digit": i, "truth": truth[i]} | row for row in strip(pair, x[i], truth[i], least, made)]
book.save(
    fig, "08_schedules", pd.DataFrame(rows).rename(columns={"attack": "network"}), source=digits.source, seeds=[first],
    caption=f"Two test digits, attacked on {', '.join(after)} by PGD-{reported['num_steps']} at eps {least:g}: the "
    "first that it has broken on each, and on some; above each what the network calls it (orange: wrong; the digit "
    f"itself: {after[0]}), and with which probability. Below, the perturbation: red +eps, blue -eps.",
)  # fmt: skip

# %% [markdown]
# PGD step by step: the same digit on the undefended network and on the one above. Each picture continues the one before
# it.

# %%
pairs = {"undefended": on_trial(trained["undefended", 0.0, first]).network, shown: network}
fig, axes = plt.subplots(2 * len(pairs), len(shown_steps), figsize=(7, 2.7 * len(pairs)))
rows, by_steps = [], {}
for (title, attacked), pair in zip(pairs.items(), axes.reshape(len(pairs), 2, -1)):
    made = by_steps[title] = {}
    for steps in shown_steps:
        how = as_reported(shown_eps, num_steps=steps, stop_early=False)
        attack = audit.attack_by_name(how.pop("attack"), seed=first, device=x.device, **how)
        made[f"{steps} step{'s' * (steps != 1)}"] = (attacked, attack(attacked, x[picked[:1]], y[picked[:1]])[0])
    rows += [{"network": title} | row for row in strip(pair, x[picked[0]], truth[picked[0]], shown_eps, made)]
    pair[0, 0].set_ylabel(title, fontsize=8)
book.save(
    fig, "08_step_by_step", pd.DataFrame(rows), source=digits.source, seeds=[first],
    caption=f"PGD at eps {shown_eps:g} from one random start in the ball, after so many steps, on two networks; "
    "above each picture what the digit is called (orange: wrong), and with which probability. Below, the perturbation: "
    "red +eps, blue -eps.",
)  # fmt: skip

# %%
figs = []
for steps in by_steps[shown]:
    fig, axes = plt.subplots(2, len(pairs), figsize=(3.4, 3.8))
    for title, column in zip(pairs, axes.T):
        list(strip(column.reshape(2, 1), x[picked[0]], truth[picked[0]], shown_eps, {title: by_steps[title][steps]}))
    figs.append(fig)
figures.stepper(figs, list(by_steps[shown]), what=f"PGD at eps {shown_eps:g} on a {truth[picked[0]]}")

# %% [markdown]
# ## 1. "Was the attack tuned?" Step size, steps, restarts
#
# *Reviewer 1 asked for a fixed number of steps with the step size chosen by grid, and for a hundred random restarts.*
# A digit counts against the reported attack if any of the others breaks it and the reported one does not. Restarts come
# last, on the digits that all else in this notebook leaves, the attacks of section 2 among it, and count against all of
# it. Each digit, of at most so many as the parameters say, is attacked until it falls: a hundred times at most, and a
# thousand on one network at the eps that is claimed.

# %%
more = inference.at_most("of the digits that an attack, or all of them, leave, the share that another breaks",
                         bound=bound)  # fmt: skip
more


# %%
def under(subject, eps, names, lent):
    """Masks by attack. The examples carried over are made on the network of another Subject, `lent`."""
    masks = {name: subject.mask(**settings_of(name, eps)) for name in names}
    masks["transfer"] = subject.mask(**as_reported(eps), source=lent)
    return masks | {"noise": subject.mask("noise", eps=eps, restarts=reported["num_steps"])}


everywhere = [name for name in attacks if name != "SimBA"]
tried, tuned, curves, queried = {}, {}, {}, {}  # by network
for name, subject in subjects.items():
    eps = eps_of[name]
    tried[name] = under(subject, eps, everywhere, on_trial(trained[lender[eps], eps, other]))
    by_size = {f: subject.mask(**as_reported(eps, step_fraction=f)) for f in step_fractions}
    by_number = {k: subject.mask(**as_reported(eps, num_steps=k, step_fraction=min(1.0, 2.5 / k))) for k in step_counts}
    tuned[name] = {"step size": by_size | {reported["step_fraction"]: base[name]}, "steps": by_number}
    curves[name] = {e: subject.mask(**as_reported(e)) for e in sorted({*eps_curve, eps})}
    queried[name] = on_left(run_of[name], stand[name], simba["images"], **settings_of("SimBA", eps))


# %%
def all_but_restarts(name):
    """Masks of all that was run on a network at its eps, or a smaller one, which are in the ball, too."""
    masks = tried[name] | {(what, k): m for what, of in tuned[name].items() for k, m in of.items()}
    return masks | {e: m for e, m in curves[name].items() if e <= eps_of[name]} | {"SimBA": queried[name][1] <= 1}


rows, worst, last, fell = [], {}, {}, {}
again = {k: restarts[k] for k in ("num_steps", "step_fraction")}
for name in subjects:
    number = restarts["claimed"] if name == called.get(("cosine", claimed)) else restarts["each"]
    before = all_but_restarts(name)
    last[name], falls = on_left(run_of[name], ~audit.worst_case(before), restart_images, restarts=number,
                                **as_reported(eps_of[name], **again))  # fmt: skip
    fell[name] = falls <= number
    worst[name] = audit.worst_case(before | {"restarts": fell[name]})
    rows += [{"network": name, "what": what, "number": k, "share": of[k].mean()}
             for what, of in tuned[name].items() for k in sorted(of)]  # fmt: skip
    counted = sorted({*np.geomspace(1, number, 30).round().astype(int).tolist(), *(k for k in (10, 100) if k < number)})
    rows += [{"network": name, "what": "restarts", "number": k, "share": (falls[last[name]] <= k).mean()}
             for k in counted if last[name].any()]  # fmt: skip
tuning = pd.DataFrame(rows)

# %%
fig, axes = plt.subplots(1, 3, figsize=(7, 2.8))
palette = sns.color_palette("colorblind")
shades = [*(palette[i] for i in (0, 2, 3)), "black", *palette[5:]]  # constant and cosine as everywhere
colours = dict(zip(subjects, shades))
for ax, (what, group) in zip(axes, tuning.groupby("what", sort=False)):
    for i, (name, part) in enumerate(group.groupby("network", sort=False)):
        size = 2 if what == "restarts" else 4
        ax.plot(part.number, part.share, "o-", ms=size, lw=max(1, 4 - i), color=colours[name], label=name)
    ax.set(xscale="log", ylim=(0, 1), xlabel="step size / eps" if what == "step size" else f"number of {what}")
    if what == "restarts":
        ax.axhline(bound, color="0.6", ls=":")
        ax.set(ylim=(-0.1 * bound, max(2 * bound, 1.05 * group.share.max())))
    ticks = sorted({1, 10, 100, 1000} & set(group.number)) if what == "restarts" else sorted(set(group.number))
    ax.set_xticks(ticks, [f"{k:g}" for k in ticks])
    ax.minorticks_off()
    ax.set_ylabel("broken of those left" if what == "restarts" else "robust error")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(subjects))
book.save(
    fig, "08_tuning", tuning, source=digits.source, seeds=[first],
    caption=f"Robust error by step size ({reported['num_steps']} steps) and by number of steps (of 2.5 eps divided by "
    f"it, at most eps), on {len(x):,} digits; by restarts of PGD-{restarts['num_steps']}, cumulative, the share broken "
    f"of the digits that all other attacks of this notebook leave (the first {restart_images}; dotted: the bound). One "
    f"network each; {noise(len(x))}. Where lines coincide, the last one is the thinnest.",
)  # fmt: skip

# %%
gains = {what: {name: audit.worst_case(of[what]) for name, of in tuned.items()} for what in ("step size", "steps")}
for what, question in {
    "step size": f"Do other step sizes ({', '.join(map(str, step_fractions))} eps) break more?",
    "steps": f"Do other numbers of steps ({', '.join(map(str, step_counts))}) break more?",
}.items():
    book.answer(question, in_words("Broken in addition", judged(more, gains[what], stand)), reviewer="Reviewer 1",
                n=on_digits, source=digits.source)  # fmt: skip
longest = f"{restarts['each']} restarts ({restarts['claimed']:,} for the cosine budget at {claimed:g})"
book.answer(
    f"Do {longest} of PGD-{restarts['num_steps']} break more?",
    in_words("Broken in addition", judged(more, fell, last), by="all other attacks of this notebook leave"),
    reviewer="Reviewer 1", n=f"the first {restart_images} digits left, one network of each kind", source=digits.source,
)  # fmt: skip

# %% [markdown]
# ## 2. "Other attacks? Black boxes?"
#
# With gradients: FGSM (one step), PGD as reported, APGD on two losses and on targets. Without: Square and SimBA, which
# see outputs only; examples made on a network of another seed; and uniform noise, the worst of as many draws as PGD has
# steps. The worst case is taken digit by digit over all that was run in the ball: these, the step sizes, steps and
# restarts of section 1, PGD at smaller eps, and SimBA, which is slow, on the first digits that the reported attack
# leaves.
#
# A black-box attack with few queries breaks nothing and proves nothing. So its power is shown first: what it breaks of
# a network without any defence. For the signs in section 3 that network is attacked at an eps still smaller, at which
# PGD leaves digits of it: where nothing is left, nothing can show that the rule lets an honest network pass.

# %%
control = trained["undefended", 0.0, first]
controls = {"undefended": {}, "rounded": {"levels": 256}, "saturated": {"scale": 1e5}}
control_at = {name: least if mask else control_eps for name, mask in controls.items()}
at = {name: name for name in subjects} | {name: f"{name} at {eps:g}" for name, eps in control_at.items()}
everyone = subjects | {name: on_trial(control, control_images, **mask) for name, mask in controls.items()}
lent = on_trial(trained[lender[least], least, other], control_images)
for name, mask in controls.items():
    eps = control_at[name]
    tried[name] = under(everyone[name], eps, ["FGSM", "PGD", "Square"], lent)
    curves[name] = {e: everyone[name].mask(**as_reported(e)) for e in sorted({*eps_curve, eps})}
    queried[name] = on_left(control, ~tried[name]["PGD"], simba["images"], masked=mask, **settings_of("SimBA", eps))

# %%
power = inference.at_most("the share of digits that a black box leaves of an undefended network", bound=0.5)
power


# %%
def mark_missing(ax, values):
    """Grey cells, and words in them, where a heatmap has no value."""
    ax.set_facecolor("0.92")
    ax.grid(False)
    for i, j in np.argwhere(values.isna().to_numpy()):
        text = "none" if values.columns[j] == "worst case" else "not run"
        ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", color="0.35", fontsize=7)


all_of = {name: of | ({"worst case": worst[name]} if name in worst else {}) for name, of in tried.items()}
table = pd.DataFrame({name: {k: m.mean() for k, m in of.items()} for name, of in all_of.items()}).T
table = table[[*everywhere, "transfer", "noise", "worst case"]]
fig, ax = plt.subplots(figsize=(7, 3.3))
sns.heatmap(table.astype(float), annot=True, fmt=".2f", cmap="rocket_r", vmin=0, vmax=1, ax=ax, annot_kws={"size": 8},
            cbar_kws={"label": "robust error"})  # fmt: skip
ax.set(xlabel="", ylabel="")
ax.set_yticks(ax.get_yticks(), [at[name] for name in table.index], rotation=0)
ax.set_xticks(ax.get_xticks(), [k.replace(" ", "\n").replace("-", "-\n") for k in table.columns], rotation=0)
mark_missing(ax, table)
book.save(
    fig, "08_all_attacks", table.rename_axis("network").reset_index(), source=digits.source, seeds=[first, other],
    caption=f"Robust error by network (with its eps) and attack; the last two networks are masked on purpose. Worst "
    f"case: of all attacks here, and of step sizes, numbers of steps, smaller eps and restarts of PGD, and SimBA, on "
    f"their digits. {len(x):,} digits; {control_images} for the last three networks; Square has {square_queries} "
    f"queries; {noise(len(x), control_images)}. Not run: APGD on the last three, the controls, which so have no worst "
    "case over all attacks.",
)  # fmt: skip

# %%
for name, count in {"Square": control_images, "SimBA": simba["images"]}.items():
    left = ~on_trial(control, count).mask(**settings_of(name, least))
    book.check(f"{name} is no toothless attack: at eps {least:g} it breaks most of an undefended network",
               measured=f"{left.sum()} of {len(left)} digits left standing",
               holds=power(left.sum(), len(left)), figure="")  # fmt: skip

# %% [markdown]
# What do they find beyond the reported attack? Square is judged on all digits that it leaves, SimBA on the first of
# them. (These are single networks, of few digits. Of many networks of all of MNIST notebook 7 asks the same.)

# %%
blindly = {"Square": judged(more, {k: tried[k]["Square"] for k in subjects}, stand)}
blindly["SimBA"] = judged(more, {k: queried[k][1] <= 1 for k in subjects}, {k: queried[k][0] for k in subjects})
book.claim(
    f"No black box (Square, SimBA) breaks more than {bound:.0%} of the digits that the reported attack leaves "
    f"(networks of {len(digits.x_train):,} digits)",
    section="5, Table 1", paper="the robust error is given under Square, too", holds=inference.together(blindly),
    ours=True, n=on_digits, source=digits.source, figure="08_signs_of_masking",
)  # fmt: skip
book.answer(
    "Do black-box attacks (Square, SimBA) break what the reported attack does not, as if gradients were masked?",
    in_words("Broken by a black box only", inference.together(blindly)), reviewer="Reviewer 1", n=on_digits,
    source=digits.source, figure="08_signs_of_masking",
)  # fmt: skip

# %%
short = {k: judged(more, {k: worst[k]}, stand) for k in subjects}
refuted, kept = ([k for k, f in short.items() if f.holds is holds] for holds in (False, True))
prediction = "That none breaks many digits more, as was expected at the head of this notebook, " + (
    f"fails for {', '.join(refuted)}: there the reported attack was too weak" if refuted
    else "holds" if len(kept) == len(short) else "is open") + "."  # fmt: skip
book.claim(
    f"All other attacks together, restarts among them, break at most {bound:.0%} of the digits that the reported one "
    "leaves",
    section="5, Table 1", holds=judged(more, worst, stand), ours=True, n=on_digits, source=digits.source,
)  # fmt: skip
book.answer(
    "How far is the reported robust error from the worst case over all attacks?",
    ", ".join(f"{base[k].mean():.3f} reported and {worst[k].mean():.3f} at worst ({k})" for k in subjects)
    + f". {prediction} " + in_words("Missed by the reported attack", judged(more, worst, stand))
    + " The worst case is that of all attacks here: the table's, other step sizes, numbers of steps and restarts, PGD "
    "at smaller eps, and SimBA on its digits.",
    reviewer="Reviewer 1", n=on_digits, source=digits.source,
)  # fmt: skip

# %% [markdown]
# Table 1 of the paper gives a rising budget the lower robust error under PGD, APGD and Square alike (whether it has is
# asked in notebook 7). Does the order depend on the attack? Both budgets, over many seeds, on the same digits, at an
# eps at which most networks of the constant one train, too: one that guesses errs alike under every attack. They stand
# in committed cells, since twice 24 of them take a quarter of an hour: the profile `overnight` of notebook 7 makes
# them. (Their number was set when ten seeds had been seen, and before the others were
# trained: of eight other ones three of the five differences were open. It is an answer, and no claim.)
#
# It does depend if the findings under two attacks differ in sign, or if one is *smaller* or *larger* and another *no
# difference* or *not smaller* beyond the margin (this second case, which masking would make, was added after the figure
# had been seen). It does not if all findings say the same, by less than the margin or not. Else it cannot be told.

# %%
lower = inference.difference("robust error, cosine minus constant, under each attack", margin=margin)
lower


# %%
def masks_of(row, arm):
    """{seed: {attack: mask}} of the last networks of an arm, on the images that all attacks have seen."""
    ends = row[(row["network"] == "end") & (row["arm"] == arm)]
    return {seed: cells.by_attack(cell)[1] for seed, cell in ends.groupby("seed")}


def over_seeds(arms):
    """Of {arm: {seed: {attack: mask}}}: {arm: {attack: masks (seeds, images)}}, with the worst case among the attacks
    that are run on all; and the seeds that all arms have."""
    common = sorted(set.intersection(*map(set, arms.values())))
    attacks = ["clean", "PGD", "APGD CE", "APGD DLR", "Square"]
    of = {arm: {k: np.array([by[seed][k] for seed in common]) for k in attacks} for arm, by in arms.items()}
    return {arm: by | {"worst": np.any(list(by.values()), axis=0)} for arm, by in of.items()}, common


# %%
def by_seed(arms, of_seeds):
    """{arm: {attack: masks}} as a table of errors."""
    return pd.DataFrame(
        {"arm": arm, "attack": k, "seed": seed, "error": m.mean()}
        for arm, of in arms.items() for k, many in of.items() for seed, m in zip(of_seeds, many)
    )  # fmt: skip


def dots(ax, errors, colours):
    """Draw a point for each seed, by attack, in the colour of the arm."""
    names, arms = list(errors.attack.unique()), list(errors.arm.unique())
    for i, (arm, part) in enumerate(errors.groupby("arm", sort=False)):
        places = part.attack.map(names.index) + 0.18 * (i - (len(arms) - 1) / 2)
        ax.plot(places, part.error, "o", ms=4, alpha=0.6, color=colours[arm], label=arm)
    ax.set(ylim=(0, 1.03), ylabel="error", xticks=range(len(names)),
           xticklabels=[k.replace(" ", "\n") for k in names])  # fmt: skip
    ax.tick_params(labelsize=8)


def budgets(row):
    """Both budgets of a row, as of `over_seeds`, the table of their errors, and a figure of it."""
    arms, of_seeds = over_seeds({arm: masks_of(row, arm) for arm in ("constant", "cosine")})
    fig, ax = plt.subplots(figsize=(5, 2.6))
    dots(ax, errors := by_seed(arms, of_seeds), figures.SCHEDULE_COLOURS)
    fig.legend(loc="outside right center", title="budget")
    return arms, of_seeds, errors, fig


# %%
committed, _ = cells.read()


def row_of(recipe, eps):
    """The cells of a recipe at an eps and its own learning rate; where several profiles have them, those with the most
    seeds."""
    of = committed[(committed["recipe"] == recipe) & np.isclose(committed["eps"], eps)]
    of = of[of["lr"] == recipes.get(recipe)["lr"]]
    if of.empty:
        there = committed[["recipe", "eps"]].drop_duplicates().itertuples(index=False)
        raise ValueError(
            f"no cells of {recipe} at eps {eps:g}: there are {'; '.join(f'{r} at {e:g}' for r, e in there)}"
        )
    return max((part for _, part in of.groupby("row")), key=lambda part: part["seed"].nunique())


def extent(row, of_seeds, masks, question="attacks"):
    """Seeds, images and what was read before, as a text."""
    n = f"{len(of_seeds)} seeds of each, {masks.shape[1]:,} test digits"
    return n + cells.looked(row, len(of_seeds), question)


row = row_of(*order)
arms, order_seeds, errors, fig = budgets(row)
book.save(
    fig, "08_order_of_budgets", errors, source=row["source"].iloc[0], seeds=order_seeds,
    caption=f"{cells.title(row)}: error after a constant budget and one that rises along the cosine, without an attack "
    f"and by attack (worst: a digit counts if any of these breaks it); a point for each of {len(order_seeds)} seeds, "
    f"{arms['cosine']['worst'].shape[1]:,} test digits. An error of 0.9 is that of guessing.",
)  # fmt: skip


# %%
def depends(findings):
    """Whether the order depends on the attack, by the rule above, of findings by attack: Yes, No or Cannot be told."""
    outcomes = {f.outcome for f in findings.values()}
    kinds = {outcome.split(",")[0] for outcome in outcomes}
    seen_and_not = {"smaller", "larger"} & outcomes and any(kind.startswith("no") for kind in kinds)
    if {"smaller", "larger"} <= kinds or seen_and_not:
        return "Yes"
    return "No" if len(kinds) == 1 and "undecided" not in kinds else "Cannot be told"


def that_guess(arms, arm="constant", whose="constant budget"):
    """How many networks of an arm hardly classify, as a sentence; empty if all do."""
    clean = arms[arm]["clean"]
    guess = sum(bool(hardly(mask)) for mask in clean)
    return f" Of the {whose}'s networks {guess} of {len(clean)} hardly classify." * bool(guess)


orders = {k: lower(arms["cosine"][k], arms["constant"][k]) for k in arms["cosine"] if k != "clean"}
book.answer(
    "Does it depend on the attack which budget ends in the lower robust error?",
    f"{depends(orders)}. Cosine minus constant, {cells.title(row)}: "
    + "; ".join(f"{k}: {f.words}" for k, f in orders.items())
    + "." + that_guess(arms),
    reviewer="Reviewer 1", n=extent(row, order_seeds, arms["cosine"]["worst"]), source=row["source"].iloc[0],
)  # fmt: skip

# %% [markdown]
# ## 3. "Is it gradient masking?" Its usual signs
#
# From the lists of Athalye et al. (2018) and Carlini et al. (2019). A rival that should be weaker (a black box, a
# single step, an example carried over, noise) breaks digits that the reported attack does not. A digit falls at one eps
# and stands at a larger one. At eps = 1 the ball holds every image there is, so an attack that works must break every
# digit. The loss is flat at the digit: its gradient is exactly zero in floating point.

# %%
sign = inference.at_most("the share of digits that show a sign of masking (of those left, where another attack breaks "
                         "them)", bound=bound)  # fmt: skip
sign

# %%
weak = ("Square", "SimBA", "transfer", "FGSM", "noise")
rows = []
for name, subject in everyone.items():
    flat = np.array(runs.remember("attacks", subject.facts | {"attack": "flat"},
                                  lambda s=subject: audit.flat(s.network, s.x, s.y), version=2))  # fmt: skip
    where, falls = queried[name]
    shows = audit.signs(tried[name]["PGD"], {k: (tried[name] | {"SimBA": falls <= 1})[k] for k in weak}, curves[name],
                        flat, {"SimBA": where})  # fmt: skip
    rows += [{"network": name, "sign": k, "digits": m.sum(), "n": len(m), "finding": sign(m.sum(), len(m))}
             for k, m in shows.items()]  # fmt: skip
signs = pd.DataFrame(rows)
signs["seen"] = signs.finding.map(lambda found: {True: "no", False: "yes", None: "?"}[found.holds])
curve = pd.DataFrame({"network": name, "eps": e, "robust error": m.mean()} for name, of in curves.items()
                     for e, m in of.items())  # fmt: skip

# %%
signs["text"] = signs.digits.astype(str) + "/" + signs.n.astype(str)
counts, seen = (signs.pivot(index="network", columns="sign", values=v).loc[list(everyone), list(shows)]
                for v in ("text", "seen"))  # fmt: skip
fig, ax = plt.subplots(figsize=(7, 3.4))
sns.heatmap(seen.map({"no": 0, "?": 1, "yes": 2}.get).astype(float), annot=counts, fmt="", vmin=0, vmax=2, cbar=False,
            linewidths=1, ax=ax, cmap=["#dfe8df", "#f1efe6", "#e08a78"],
            annot_kws={"color": "black", "size": 8})  # fmt: skip
ax.set(xlabel="", ylabel="")
ax.grid(False)
ax.set_xticks(ax.get_xticks(), [fill(k, 11) for k in shows], rotation=0)
ax.set_yticks(ax.get_yticks(), [at[name] for name in seen.index], rotation=0)
ax.tick_params(labelsize=8)
book.save(
    fig, "08_signs_of_masking", signs.drop(columns="finding"), source=digits.source, seeds=[first, other],
    caption=f"Digits that show a sign of gradient masking, of how many (of those that PGD leaves, where another attack "
    f"breaks them; of these SimBA was run on the first); red: surely more than {bound:.0%} do, green: surely not, "
    "between: too few digits to tell. The last two networks are masked on purpose.",
)  # fmt: skip

# %%
fig, axes = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True)
for ax, group, title in zip(axes, (subjects, controls), ("on trial", "no defence; masked on purpose")):
    for i, name in enumerate(group):
        part, shift = curve[curve.network == name], 1.06 ** (i - (len(group) - 1) / 2)  # side by side where they tie
        colour = colours.get(name, ("0.55", palette[5], palette[9])[i % 3])
        ax.semilogx(part.eps * shift, part["robust error"], "osD^v"[i % 5] + "-", ms=4, lw=1, color=colour, label=name)
    ax.set(ylim=(0, 1.03), xlabel="eps of the attack", title=title)
    ticks = sorted(set(curve.eps))
    ax.set_xticks(ticks, [f"{e:g}" for e in ticks])
    ax.minorticks_off()
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
axes[0].set_ylabel("robust error")
book.save(
    fig, "08_error_by_eps", curve, source=digits.source, seeds=[first],
    caption=f"Robust error under PGD-{reported['num_steps']} by the eps of the attack, at {len(ticks)} eps; points of "
    f"one eps are set side by side. One network each; left: {len(x):,} digits, right: {control_images} digits.",
)  # fmt: skip

# %%
seen_in = {name: ", ".join(part[part.seen == "yes"].sign) for name, part in signs.groupby("network")}
unsure = {name: ", ".join(part[part.seen == "?"].sign) for name, part in signs.groupby("network")}


def masking(name):
    if stalled[name]:
        return f"{name} {stalled[name]}"
    return f"{name}: {seen_in[name] or 'no sign of it'}" + f" (cannot be told: {unsure[name]})" * bool(unsure[name])


book.answer(
    "Is gradient masking ruled out?",
    "; ".join(map(masking, subjects)) + ". Networks that are masked on purpose are flagged: "
    + "; ".join(f"{k}: {seen_in[k] or 'nothing'}" for k in controls if k != "undefended") + ".",
    reviewer="Reviewer 1", n=on_digits, source=digits.source, figure="08_signs_of_masking",
)  # fmt: skip
alarms, unclear = ({k: int((signs[signs.network == k].seen == v).sum()) for k in controls} for v in ("yes", "?"))
book.check(
    "The audit flags both networks that are masked on purpose, and clears of every sign the one they were made of",
    measured=", ".join(f"{k}: {v} signs ({unclear[k]} cannot be told)" for k, v in alarms.items()),
    holds=bool(alarms["rounded"] and alarms["saturated"] and not alarms["undefended"] + unclear["undefended"]),
    figure="08_signs_of_masking",
)
whole = {k: m[max(m)] for k, m in curves.items() if k in subjects}
book.check(f"At eps {max(eps_curve):g} every digit is broken on every network on trial",
           holds=inference.exact("digits that stand", tolerance=0)([(~m).sum() for m in whole.values()]))  # fmt: skip

# %% [markdown]
# ## 4. "And in another norm?" The method under l2
#
# Does a rising budget help because the ball is a cube? Both budgets are trained and attacked in an l2 ball, everything
# else being equal. (As many seeds as above, set when ten had been seen, whose interval ended near zero.)

# %%
lower_l2 = inference.difference("robust error under l2 (worst of PGD, APGD and Square), cosine minus constant",
                                margin=margin)  # fmt: skip
lower_l2

# %%
l2_row = row_of(*euclidean)
l2_arms, l2_seeds, errors, fig = budgets(l2_row)
book.save(
    fig, "08_euclidean", errors, source=l2_row["source"].iloc[0], seeds=l2_seeds,
    caption=f"Error without an attack and under attacks in an l2 ball of radius {euclidean[1]:g}, after training in it "
    f"under a constant budget and one that rises along the cosine (worst: a digit counts if any of these breaks it); a "
    f"point for each of {len(l2_seeds)} seeds, {l2_arms['cosine']['worst'].shape[1]:,} test digits.",
)  # fmt: skip

# %%
in_l2 = lower_l2(l2_arms["cosine"]["worst"], l2_arms["constant"]["worst"])
means = errors.groupby(["arm", "attack"]).error.mean()
book.answer(
    "Does the method help in l2, too?",
    {True: "Yes", False: "No", "partly": "By less than the margin", None: "Cannot be told"}[in_l2.holds]
    + f". Robust error at radius {euclidean[1]:g}, cosine minus constant: {in_l2.words}; on average "
    f"{means['cosine', 'worst']:.1%} against {means['constant', 'worst']:.1%}, without an attack "
    f"{means['cosine', 'clean']:.1%} against {means['constant', 'clean']:.1%}." + that_guess(l2_arms),
    reviewer="A reviewer", n=extent(l2_row, l2_seeds, l2_arms["cosine"]["worst"]), source=l2_row["source"].iloc[0],
)  # fmt: skip

# %% [markdown]
# ## 5. "Against the usual recipes?" The MNIST challenge's loop, and fast training
#
# The MNIST challenge (Madry et al. 2018) trains under a constant budget, with more steps (here five), begun anywhere in
# the ball. Fast adversarial training (Wong et al. 2020) takes a single step of 1.25 eps from anywhere in the ball. Both
# are run at the same rate and for as many epochs as the others, under as many seeds, which stand in cells, too. (One
# seed of each had been seen when their number was set.) The single step can be overfitted (*catastrophic
# overfitting*): PGD breaks nine digits in ten, one step at most half as many.
#
# A network that errs on more than half of the digits without an attack hardly classifies. Where more than one in four
# networks of a recipe hardly classify, it is no rival, and nothing follows.

# %%
beats = inference.difference("robust error (worst of PGD, APGD and Square), cosine minus the rival", margin=margin)
beats


# %%
def overfits(one_step, pgd):
    """Whether a network has overfitted its one step, given the masks of one step and of PGD."""
    return bool(pgd.mean() >= 0.9 and one_step.mean() <= pgd.mean() / 2)


def no_rival(name, clean):
    """Why nothing follows, given the masks of a recipe's networks without an attack; empty if they classify."""
    weak = sum(bool(hardly(mask)) for mask in clean)
    many = weak > (1 - inference.THROUGH) * len(clean)
    return f"{weak} of {len(clean)} networks of {name} hardly classify" * many


contests = {}  # {eps: {name: {seed: {attack: mask}}}}
for name, e in [(name, e) for name, of_rival in rival_eps.items() for e in of_rival]:
    contests.setdefault(e, {"cosine": masks_of(row_of(order[0], e), "cosine")})
    contests[e][name] = masks_of(row_of(rivals[name], e), "constant")
judged_at = {e: over_seeds(of) for e, of in sorted(contests.items())}
contest = pd.concat(by_seed(*of).assign(eps=e) for e, of in judged_at.items())

# %%
fig, axes = plt.subplots(1, len(judged_at), figsize=(7, 3), sharey=True, squeeze=False)
shade = {"cosine": figures.SCHEDULE_COLOURS["cosine"]} | dict(zip(rivals, ("tab:brown", "tab:purple", *palette[6:])))
for ax, (e, part) in zip(axes[0], contest.groupby("eps")):
    dots(ax, part, shade)
    ax.set_title(f"eps {e:g}")
    ax.label_outer()
handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels())}
fig.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
count = {e: f"{len(of_seeds)} seeds at {e:g}" for e, (_, of_seeds) in judged_at.items()}
book.save(
    fig, "08_recipes", contest, source=row["source"].iloc[0], seeds=sorted(set(contest.seed)),
    caption=f"Error of networks after a budget that rises along the cosine and after the usual recipes, by attack "
    f"(worst: a digit counts if any of these breaks it); a point for each seed ({', '.join(count.values())}). An error "
    "of 0.9 is that of guessing.",
)  # fmt: skip

# %%
for (e, (of, of_seeds)), name in [(at, name) for at in judged_at.items() for name in list(at[1][0])[1:]]:
    ours, theirs, there = of["cosine"], of[name], row_of(rivals[name], e)
    weak = " and ".join(filter(None, (no_rival(k, of[k]["clean"]) for k in ("cosine", name))))
    found = beats(ours["worst"], theirs["worst"], unless=weak)
    steps = [overfits(by["FGSM"], by["PGD"]) for by in contests[e][name].values() if "FGSM" in by]
    book.answer(
        f"How does a rising budget compare with {name} at eps {e:g}?",
        f"{found.outcome.capitalize()}, {found.measured}{found.because}. The worst of PGD, APGD and Square breaks "
        f"{ours['worst'].mean():.1%} of the digits under the cosine budget and {theirs['worst'].mean():.1%} under this "
        f"rival; without an attack {ours['clean'].mean():.1%} and {theirs['clean'].mean():.1%} are wrong."
        + that_guess(of, name, "rival")
        + f" Of the rival's networks {sum(steps)} of {len(steps)} overfit their one step." * bool(steps),
        reviewer="A reviewer", n=extent(there, of_seeds, theirs["worst"], "rival"), source=there["source"].iloc[0],
    )  # fmt: skip

# %%
book.close()
