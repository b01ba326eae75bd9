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
# # 6. Periodic adversarial scheduling: raise the budget while training, and again
#
# Section 5 of Liu et al. (2020) proposes a remedy for the plateau of Section 4.1 (notebook 3): begin with a small
# budget eps, where the loss is still easy, and raise it during training. *Periodic adversarial scheduling* does so
# several times over: after each period the budget and the learning rate start again, the network at the end of each
# period is kept, and these networks together are the classifier, by the mean of their probabilities. Here it meets the
# hardest case of the paper's Table 1: LeNet on MNIST digits at eps 0.4, where a constant budget ends as a constant
# classifier.
#
# What should be seen if the claims hold:
#
# 1. under the *constant* budget all networks stay at an error of about 0.9, while the *linear* and the *cosine*
#    schedule end with networks that classify, clean and attacked digits alike;
# 2. the ensemble has a smaller robust error than a single run of equally many epochs;
# 3. without the ensemble (a reviewer asked), a schedule is still better than a constant budget;
# 4. a schedule trains at more learning rates than a constant budget.

# %% tags=["parameters"]
profile = "quick"
dataset = "mnist5k"
train_images = None  # all
model = "lenet"
width = 4
eps = 0.4
schedule_stops = {"constant": None, "linear": 2.0, "cosine": 1.5}  # where a rise would end, were it not clipped: x eps
seeds = [0, 1, 2]
epochs = 8
restarts = [4, 6]  # of the periodic runs: the paper's 100 and 150 of 200
batch_size = 64
num_steps = 3
step_fraction = 0.5  # the attack's step size, as a fraction of the budget
optimizer = "adam"
lr = 3e-3
lr_drops = []  # the rate falls tenfold at these fractions of each period
eval_every = 1
eval_images = 500
test_steps = 20  # the attack of the final evaluation
test_step_fraction = 0.1
test_restarts = 1
test_images = 300
size_epochs = [4, 8]  # lengths of training at which the ensemble is compared with the single run
rate_grid = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]  # the learning rates of the last section, there with:
rate_eps = 0.2
rate_width = 2
rate_images = 2000
rate_epochs = 4

# %%
import math
from functools import partial
from itertools import pairwise, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from tqdm import tqdm

from lib import data, runs
from lib.attacks import pgd
from lib.compute import device
from lib.figures import Book
from lib.models import Ensemble
from lib.tables import attack_errors, conclude, conclude_all, paired

book = Book("06_periodic_scheduling", globals())
digits = data.load(dataset).first(train_images)
n = f"{len(seeds)} seeds"
warm = [s for s in schedule_stops if s != "constant"]
print(digits.source)

# %% [markdown]
# ## Budget and learning rate
#
# The budget as a function of the epoch, in one rise and in periods. Both rises aim beyond eps and are clipped there, so
# that the last part of each is spent at the full budget. (In the paper: 0 to 0.8 along the line, 0 to 0.6 along the
# cosine, clipped at 0.4; on MNIST the learning rate is constant, on CIFAR-10 it falls within a period and starts again
# with the budget.) The step size of the attack scales with the budget. The optimiser, too, starts anew.


# %%
def config(schedule, seed, restarts=(), eps=eps, **changes):
    stop = schedule_stops[schedule] and schedule_stops[schedule] * eps
    return runs.configure(book.parameters, schedule=schedule, schedule_stop=stop, seed=seed, restarts=restarts, eps=eps,
                          **changes)  # fmt: skip


time, kinds = np.linspace(0, epochs, 400, endpoint=False), {"single run": [], "periodic": restarts}
plans = pd.DataFrame(
    {"schedule": s, "kind": kind, "epoch": t, "eps": c.budget()(t), "learning rate": c.learning_rate(t)}
    for s in schedule_stops for kind, r in kinds.items() for c in [config(s, 0, r)] for t in time
)  # fmt: skip
fig, axes = plt.subplots(1, 3, figsize=(11, 3.2))
for ax, (kind, group) in zip(axes, plans.groupby("kind", sort=False)):
    sns.lineplot(group, x="epoch", y="eps", hue="schedule", style="schedule", legend=kind == "periodic", ax=ax)
    ax.set(title=f"budget, {kind}", ylabel="eps", ylim=(-0.02, 1.25 * eps))
sns.move_legend(axes[1], "upper center", ncols=3, title=None, fontsize=8, columnspacing=1)
sns.lineplot(plans[plans.schedule == "constant"], x="epoch", y="learning rate", hue="kind", style="kind", ax=axes[2])
axes[2].set(title="learning rate", ylim=(0, 1.3 * lr))
sns.move_legend(axes[2], "lower right", title=None)
book.save(
    fig, "06_schedules", plans, source="lib.schedules", caption=f"The three budgets over {epochs} epochs, in one rise "
    f"and with restarts after epochs {' and '.join(map(str, restarts))}, and the learning rates.",
)  # fmt: skip

# %% [markdown]
# ## Training
#
# Same networks, same order of the digits, same optimiser, equally many epochs; only the budget differs. The curves
# show the error on the first test digits, clean and attacked at the *full* eps by the attack of the training; lines are
# means over seeds, bands run from the best to the worst seed.

# %%
keys = list(product(schedule_stops, kinds, seeds))
trained = dict(zip(keys, runs.grid([config(s, seed, kinds[kind]) for s, kind, seed in keys], digits)))
curves = pd.concat(run.history.assign(schedule=s, kind=kind, seed=seed) for (s, kind, seed), run in trained.items())

fig, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, sharey=True)
for row, column in zip(axes, ("clean_error", "robust_error")):
    for ax, kind in zip(row, kinds):
        sns.lineplot(curves[curves.kind == kind], x="epoch", y=column, hue="schedule", style="schedule", markers=True,
                     dashes=False, errorbar=("pi", 100), legend=ax is axes[0, 0], ax=ax)  # fmt: skip
        ax.axhline(0.9, color="grey", linestyle=":")
        for epoch in kinds[kind]:
            ax.axvline(epoch, color="grey", linewidth=0.8)
        ax.set(title=f"{column.replace('_', ' ')}, {kind}", ylabel="error on test digits", ylim=(0, 1.03))
sns.move_legend(axes[0, 0], "center right", title=None)
book.save(
    fig, "06_learning_curves", curves, source=digits.source, seeds=seeds,
    caption=f"Clean and robust error (PGD-{num_steps}, eps {eps:g}) on test digits during training under the three "
    f"budgets; mean and range over {n}. Dotted: guessing among ten classes. Vertical lines: restarts.",
)  # fmt: skip

# %% [markdown]
# ## The end of training, under a stronger attack
#
# An attack as weak as the one of the training could flatter the networks. So the robust error is measured anew with
# more and smaller steps: of the single runs, of the network at the end of each period, and of the ensemble. An
# ensemble is attacked as a whole, through the gradient of its mean probability.

# %%
x, y = digits.x_test[:test_images].to(device()), digits.y_test[:test_images].to(device())
attack_settings = {"eps": eps, "step_size": test_step_fraction * eps, "num_steps": test_steps,
                   "num_restarts": test_restarts}  # fmt: skip


def errors(run, epochs_kept):
    """Errors of the run's network after these epochs, or of the ensemble of them if they are several."""

    def compute():
        net = Ensemble([run.model(e) for e in epochs_kept]) if len(epochs_kept) > 1 else run.model(epochs_kept[0])
        attack = partial(pgd, **attack_settings, generator=torch.Generator(x.device).manual_seed(run.config.seed))
        return attack_errors(net.to(x.device), x, y, {"robust": attack})

    facts = {"run": run.folder.name, "epochs": epochs_kept, "attack": attack_settings, "images": len(x)}
    return runs.remember("periods", facts, compute, code=("tables.py",))


ends = [*restarts, epochs]
looks = {"single run": [epochs]} | {f"period {i}": [e] for i, e in enumerate(ends, 1)} | {"ensemble": ends}
cells = [(s, seed, what) for s, seed, what in product(schedule_stops, seeds, looks)]
rows = []
for s, seed, what in tqdm(cells, desc="attacks"):
    run = trained[s, "single run" if what == "single run" else "periodic", seed]
    rows.append({"schedule": s, "seed": seed, "network": what} | errors(run, looks[what]))
final = pd.DataFrame(rows).drop(columns="worst")

# %%
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), sharey=True)
for ax, column in zip(axes, ("clean", "robust")):
    sns.stripplot(final, x="network", y=column, hue="schedule", dodge=True, jitter=False, legend=False, ax=ax)
    sns.pointplot(final, x="network", y=column, hue="schedule", dodge=0.54, errorbar=None, linestyle="none", marker="_",
                  markersize=14, legend=column == "clean", ax=ax)  # fmt: skip
    ax.axhline(0.9, color="grey", linestyle=":")
    ax.set(title=f"{column} error", xlabel="", ylabel="error on test digits", ylim=(0, 1.03))
    ax.tick_params(axis="x", rotation=20)
sns.move_legend(axes[0], "center right", title=None)
attack_name = f"PGD-{test_steps}, {test_restarts} start{'s' * (test_restarts > 1)}, eps {eps:g}"
book.save(
    fig, "06_final_errors", final, source=digits.source, seeds=seeds,
    caption=f"Clean and robust error ({attack_name}) after {epochs} epochs on {len(x):,} test digits: the single run, "
    f"the network at the end of each period of the periodic run, and their ensemble; a point per seed ({n}), bars: "
    "means.",
)  # fmt: skip

# %% [markdown]
# Means over the seeds:

# %%
table = final.groupby(["network", "schedule"], sort=False)[["clean", "robust"]].mean().unstack("schedule")
table.round(3)

# %% [markdown]
# ### Verdicts
#
# Schedules are compared seed by seed: the difference of the robust errors of two networks that began with the same
# weights and saw the digits in the same order, with Student's 95 % interval over the seeds. Where that interval holds
# zero, the run is too small to tell. A network counts as a *constant classifier* if its robust error equals its clean
# error and is at least 0.8.
#
# Note for the second claim that, with the paper's end points, the line reaches the full budget earlier than the cosine
# (first figure): in a short training it spends more of it at the eps that is tested.


# %%
def differ(network_a, schedule_a, network_b, schedule_b):
    """Robust error of the first minus that of the second, paired by seed."""
    by_seed = final.set_index(["network", "schedule", "seed"]).robust
    return paired(by_seed[network_a, schedule_a][seeds], by_seed[network_b, schedule_b][seeds])


def say(d):
    return f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"


paired_n = f"{n}, paired, {len(x):,} test digits, {attack_name}"
single = final[final.network == "single run"]
stuck = single[(single.clean == single.robust) & (single.clean >= 0.8)].groupby("schedule").size()
stuck = stuck.reindex(list(schedule_stops), fill_value=0)
gains = {s: differ("single run", s, "single run", "constant") for s in warm}
book.claim(
    "Warming the budget up escapes what a constant budget does not",
    section="5",
    measured=f"of {len(seeds)} single runs each, {', '.join(f'{v} ({k})' for k, v in stuck.items())} are constant "
    f"classifiers; robust error minus constant's: {', '.join(f'{say(d)} ({s})' for s, d in gains.items())}",
    holds=None if stuck["constant"] == 0 else conclude_all(gains.values()) if not stuck[warm].any() else "partly",
    n=paired_n,
    source=digits.source,
)

# %%
advantage = differ("single run", "cosine", "single run", "linear")
book.claim(
    "The cosine schedule is better than the linear one",
    section="5",
    measured=f"cosine minus linear in robust error, single runs: {say(advantage)}",
    holds=conclude(advantage),
    n=paired_n,
    source=digits.source,
)
remedy = {s: differ("ensemble", s, "single run", "constant") for s in warm}
book.claim(
    "Periodic scheduling with the ensemble is better than a constant budget",
    section="5, Table 1",
    measured=f"robust error minus constant's: {', '.join(f'{say(d)} ({s})' for s, d in remedy.items())}",
    holds=conclude_all(remedy.values()),
    n=paired_n,
    source=digits.source,
)
against_single = {s: differ("ensemble", s, "single run", s) for s in warm}
book.claim(
    "The periodic ensemble is better than a single run of equally many epochs",
    section="5, Table 1",
    measured=f"ensemble minus single run: {', '.join(f'{say(d)} ({s})' for s, d in against_single.items())}",
    holds=conclude_all(against_single.values()),
    n=paired_n,
    source=digits.source,
)

# %% [markdown]
# **A reviewer asked: how good is it without the ensemble?** Two answers. The single run with one rise is the schedule
# without periods and without the ensemble. The last checkpoint of the periodic run is the periods without the ensemble.
# Both are compared with the constant budget, and the ensemble with the last of its own members: if that difference is
# positive, the earlier members are a burden.

# %%
last = f"period {len(ends)}"
alone = {s: differ(last, s, "single run", "constant") for s in warm}
members = {s: differ("ensemble", s, last, s) for s in warm}
book.claim(
    "Without the ensemble a schedule is still better than a constant budget",
    section="5, a reviewer's question",
    measured=f"robust error minus constant's: single run {', '.join(f'{say(d)} ({s})' for s, d in gains.items())}; "
    f"last checkpoint of the periods {', '.join(f'{say(d)} ({s})' for s, d in alone.items())}",
    holds=conclude_all([*gains.values(), *alone.values()]),
    n=paired_n,
    source=digits.source,
)
book.claim(
    "The ensemble is better than the last of its members",
    section="5, a reviewer's question",
    measured=f"ensemble minus last checkpoint: {', '.join(f'{say(d)} ({s})' for s, d in members.items())}",
    holds=conclude_all(members.values()),
    n=paired_n,
    source=digits.source,
)

# %% [markdown]
# ## At which size does the ensemble pay?
#
# In a short training the first members have seen little of the full budget, and drag the mean down. So single runs and
# ensembles of the cosine budget are compared at several lengths, with the restarts at the same fractions of each.


# %%
def sized(length, kind, seed):
    periods = [round(r * length / epochs) for r in kinds[kind]]
    return config("cosine", seed, periods, epochs=length, eval_every=eval_every if length <= epochs else length // 12)


def compared(length, seed):
    """A row per network: the single run, the first and the last period's, the ensemble."""
    single, periodic = (grown[length, kind, seed] for kind in kinds)
    ends = [*periodic.config.restarts, length]
    networks = {"single run": (single, [length]), "first period": (periodic, ends[:1]),
                "last period": (periodic, ends[-1:]), "ensemble": (periodic, ends)}  # fmt: skip
    return [{"epochs": length, "seed": seed, "network": name} | errors(*which) for name, which in networks.items()]


keys = list(product(size_epochs, kinds, seeds))
grown = dict(zip(keys, runs.grid([sized(*key) for key in keys], digits)))
sizes = pd.DataFrame([row for length, seed in product(size_epochs, seeds) for row in compared(length, seed)])

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
sns.lineplot(sizes, x="epochs", y="robust", hue="network", style="network", markers=True, dashes=False,
             errorbar=("pi", 100), ax=ax)  # fmt: skip
sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), title=None)
ax.set(xscale="log", ylabel="robust error", ylim=(0, 1.03))
ax.set_xticks(size_epochs, [str(length) for length in size_epochs])
ax.minorticks_off()
book.save(
    fig, "06_sizes", sizes.drop(columns="worst"), source=digits.source, seeds=seeds,
    caption=f"Robust error ({attack_name}) on {len(x):,} test digits by the epochs of training under the cosine "
    f"budget: the single run, the first and the last period's network, and the ensemble; mean and range over {n}.",
)  # fmt: skip

# %%
found = sizes.set_index(["epochs", "network", "seed"]).robust
by_length = {length: paired(found[length, "ensemble"][seeds], found[length, "single run"][seeds])
             for length in size_epochs}  # fmt: skip
book.claim(
    "Trained for longer, the periodic ensemble is better than a single run",
    section="5, Table 1",
    measured="ensemble minus single run under the cosine: "
    + ", ".join(f"{say(d)} ({length} epochs)" for length, d in by_length.items()),
    holds=conclude(by_length[max(size_epochs)]),
    n=paired_n,
    source=digits.source,
)
book.show_other_sizes("06_sizes")

# %% [markdown]
# ## Before and after a restart
#
# A restart takes the budget back to its beginning. What does that do to a network that had reached the full budget?
# The robust error at the full eps, by the attack of the training: at the end of the period before, after the first
# epoch of the new period, and at the end of the new period.

# %%
at = curves[(curves.kind == "periodic") & curves.schedule.isin(warm)].set_index(["schedule", "seed", "epoch"])
visits = pd.DataFrame(
    {"schedule": s, "seed": seed, "restart": f"restart after epoch {a}", "moment": moment,
     "clean": at.clean_error[s, seed, e], "robust": at.robust_error[s, seed, e]}
    for s, seed, (a, b) in product(warm, seeds, pairwise(ends))
    for moment, e in (("before", a), ("after", a + eval_every), ("period's end", b))
)  # fmt: skip
fig, axes = plt.subplots(1, len(restarts), figsize=(5 * len(restarts), 3.5), sharey=True, squeeze=False)
for ax, (name, group) in zip(axes[0], visits.groupby("restart", sort=False)):
    sns.lineplot(group, x="moment", y="robust", hue="schedule", units="seed", estimator=None, marker="o", alpha=0.8,
                 palette=["C1", "C2"][: len(warm)], legend=ax is axes[0, 0], ax=ax)  # fmt: skip
    ax.set(title=name, xlabel="", ylabel="robust error")
sns.move_legend(axes[0, 0], "upper left", title=None)
book.save(
    fig, "06_restarts", visits, source=digits.source, seeds=seeds,
    caption=f"Robust error (PGD-{num_steps}, eps {eps:g}, {eval_images:,} test digits) at the end of a period, "
    f"{eval_every} epoch{'s' * (eval_every > 1)} after the restart, and at the end of the next period; a line per seed "
    f"({n}).",
)  # fmt: skip

# %%
wide = visits.pivot_table(index=["schedule", "seed"], columns=["restart", "moment"], values="robust", sort=False)
steps = {name: [paired(wide[name, b], wide[name, a]) for a, b in (("before", "after"), ("before", "period's end"))]
         for name in wide.columns.levels[0]}  # fmt: skip
for name, (jump, gain) in steps.items():
    print(f"{name}: right after it {say(jump)}, at the period's end {say(gain)} in robust error ({jump['n']} runs)")
book.claim(
    "A network is better at the end of the next period than before the restart",
    section="5",
    measured="; ".join(f"{name}: {say(gain)} in robust error" for name, (_, gain) in steps.items()),
    holds=conclude_all([gain for _, gain in steps.values()]),
    n=f"{len(wide)} runs ({n}, {' and '.join(warm)}), {eval_images:,} test digits",
    source=digits.source,
)

# %% [markdown]
# ## How much depends on the learning rate?
#
# A schedule that only shifts the best learning rate would be no remedy. So a constant budget and the cosine are trained
# at rates spanning two orders of magnitude, in runs whose size and eps the figure's caption names. (In small profiles
# this eps is smaller than the one above: where a constant budget trains at no rate, there is no range to compare.) A
# network *trains* if its clean error ends below one half; a rate trains if it does for every seed. The number of those
# rates is compared, and the range they span, in decades. A run that diverges has not trained.


# %%
def final_errors(schedule, rate, seed):
    c = config(schedule, seed, eps=rate_eps, lr=rate, width=rate_width, epochs=rate_epochs, eval_every=rate_epochs)
    try:
        last = runs.run(c, some).history.iloc[-1]
    except ValueError as error:
        if "diverged" not in str(error):
            raise
        return {"clean": 1.0, "robust": 1.0}
    return {"clean": last.clean_error, "robust": last.robust_error}


some = digits.first(rate_images)
pair = ["constant", "cosine"]
sweep = pd.DataFrame(
    {"schedule": s, "learning rate": rate, "seed": seed} | final_errors(s, rate, seed)
    for rate, s, seed in tqdm(list(product(rate_grid, pair, seeds)), desc="rates")
)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for ax, column in zip(axes, ("clean", "robust")):
    for s, marker, color in zip(pair, "os", ("C0", "C2")):
        group = sweep[sweep.schedule == s].groupby("learning rate")[column]
        mean, low, high = group.mean(), group.min(), group.max()
        ax.errorbar(mean.index, mean, [mean - low, high - mean], marker=marker, color=color, capsize=4, label=s)
    ax.axhline(0.5 if column == "clean" else 0.9, color="grey", linestyle=":")
    ax.set(xscale="log", xlabel="learning rate", ylabel=f"{column} error", ylim=(0, 1.03))
axes[0].legend()
book.save(
    fig, "06_learning_rates", sweep, source=some.source, seeds=seeds,
    caption=f"Clean and robust error (PGD-{num_steps}, eps {rate_eps:g}) after {rate_epochs} epochs by learning rate, "
    f"LeNet of width {rate_width}; mean and range over {n}. Dotted: where a network counts as trained; guessing.",
)  # fmt: skip

# %%
trains = sweep.assign(trains=sweep.clean < 0.5).groupby(["schedule", "learning rate"]).trains.sum().unstack()
ranges = {}
for s in pair:
    good = [rate for rate in rate_grid if trains.loc[s, rate] == len(seeds)]
    ranges[s] = {"rates": len(good), "decades": math.log10(max(good) / min(good)) if good else -math.inf}
texts = {s: f"{r['rates']} of {len(rate_grid)} rates train" + (f", {r['decades']:.1f} decades" if r["rates"] else "")
         for s, r in ranges.items()}  # fmt: skip
more = ranges["cosine"]["rates"] - ranges["constant"]["rates"]
book.claim(
    "Scheduling makes training less sensitive to the learning rate",
    section="5",
    measured=f"{texts['constant']} (constant); {texts['cosine']} (cosine), eps {rate_eps:g}",
    holds=None if ranges["cosine"]["rates"] == 0 or more == 0 else more > 0,
    n=f"{n}, {len(rate_grid)} rates from {min(rate_grid):g} to {max(rate_grid):g}, {eval_images:,} test digits",
    source=some.source,
)
trains

# %% [markdown]
# The table counts the seeds that trained.
#
# ## The ledger

# %%
book.close()
