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
# # 2. Gradient scattering
#
# Section 3.2 of Liu et al. (2020): the gradient of the adversarial loss is taken at the worst input, the worst input
# moves with the parameters, and it may *jump*. Two nearby points of parameter space can therefore have gradients that
# are far apart: the gradients are scattered. Proposition 2 bounds by how much, Theorem 2 says what that does to SGD.
#
# Write $g(x,\theta)$ for the loss at an input and $L_\epsilon(\theta)=\max_{\|x'-x\|_p\le\epsilon}g(x',\theta)$.
# Assumption 1 asks for three Lipschitz constants: $L_\theta$ of $g$ in $\theta$, $L_{\theta\theta}$ of
# $\nabla_\theta g$ in $\theta$, and $L_{\theta x}$ of $\nabla_\theta g$ in $x$ (in the norm of the ball).
# Proposition 2 then says
#
# $$|L_\epsilon(\theta_1)-L_\epsilon(\theta_2)|\le L_\theta\|\theta_1-\theta_2\|,\qquad
# \|\nabla L_\epsilon(\theta_1)-\nabla L_\epsilon(\theta_2)\|\le
# L_{\theta\theta}\|\theta_1-\theta_2\|+2\epsilon L_{\theta x}.$$
#
# What should be seen if this holds: gradient differences that stay under a line with an intercept of
# $2\epsilon L_{\theta x}$, and cases that reach it; under SGD, gradients that are seldom larger than a multiple of
# $\epsilon L_{\theta x}$ (an upper bound; in the example none is smaller than eps, by construction); in a network,
# gradients that change abruptly, and perturbations that turn, the more so the larger eps is.
#
# Two [reviewers](https://papers.neurips.cc/paper_files/paper/2020/file/f56d8183992b6c54c92c16a8519a6e2b-Review.html)
# doubted it: one because ReLU has no second derivative, one because two worst inputs might have equal gradients.
#
# *Change this, expect that.* `sgd_lengths = [100, 1000]`: the frequencies at the smallest eps are above the lines of
# Theorem 2, and its verdict is undecided: T is too small for them. `activations = ["softplus"]`: at this eps these
# networks learn nothing, and the verdicts on networks are undecided for that reason. `tight_cases = 50`: still equal,
# to rounding.

# %% tags=["parameters"]
profile = "quick"
recipe = "lenet on mnist5k"
changes = {}
seeds = [0, 1, 2]
num_pairs = 2000  # pairs of parameters in the test of Proposition 2
tight_cases = 1000
sgd_lengths = [1000, 10000, 100000]
sgd_runs = 100  # per seed
train_eps = 0.1
activations = ["relu"]
network_eps = {"linf": [0.05, 0.1, 0.2, 0.3], "l2": [0.5, 1.0, 2.0, 3.0]}
distances = [0.001, 0.01]  # relative to the norm of the parameters
num_directions = 4
num_images = 50
tie_images = 250  # for the pairs of worst inputs
tie_steps = 40  # of PGD there
attack_steps = 5

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from IPython.display import display
from matplotlib.ticker import LogLocator
from scipy.special import erfc, expit

from lib import cells, inference, landscape, linear, recipes, runs
from lib.attacks import pgd
from lib.figures import Book, stepper

book = Book("02_gradient_scattering", globals())
exact = "closed form, no data"
simulated = "the tight example, simulated"


def of(n, what):
    n = n if isinstance(n, int) else len(n)
    return f"{n} {what}{'s' * (n != 1)}"


# %% [markdown]
# ## The sketch, computed
#
# Three classes, a linear classifier, two inputs, the max norm: the whole ball is a square, and its worst point is known
# exactly. The parameters move along a line, $W(t)=W_0+tV$, and the ball is shown at five places. For a class j that is
# not the label the gradient of row j of W is the worst input times the probability of j there: drawn from the origin,
# it points at it.

# %%
START = np.array([[0.0, 0.0], [1.3, 0.4], [-1.3, 0.4]])  # a row per class
MOVE = np.array([[0.0, 0.0], [1.0, 0.2], [1.0, -0.2]])
POINT, CLASS = np.array([[0.0, 0.5]]), np.array([0])


def worst_and_gradient(t, eps):
    """Worst point of the ball and gradient of the adversarial loss with respect to W, at W(t)."""
    W = START + t * MOVE
    worst = linear.worst_case(W, POINT, CLASS, eps=eps, norm="linf")[0]
    scores = np.exp(W @ worst - np.logaddexp.reduce(W @ worst))
    return worst, np.outer(scores - np.eye(3)[0], worst)


def ball(t, ax, eps=1.0):
    """Draw the loss over the ball at W(t), its worst point and, from the origin, the gradients of rows 1 and 2."""
    side = np.linspace(-eps, eps, 61)
    square = POINT + np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    loss = linear.robust_loss(START + t * MOVE, square, np.zeros(len(square), int), eps=0.0, norm="linf")[0]
    worst, gradient = worst_and_gradient(t, eps)
    levels = np.linspace(0.3, 3.0, 28)
    ax.contourf(side, side + POINT[0, 1], loss.reshape(61, 61), levels=levels, cmap="Greys", extend="both")
    for row, colour, width in ((1, "C0", 0.05), (2, "C1", 0.025)):
        ax.quiver(0, 0, *gradient[row], color=colour, angles="xy", scale_units="xy", scale=1, width=width)
    ax.plot(*worst, "*", color="C2", markersize=12, clip_on=False)
    ax.set(title=f"t = {t:g}", xlabel="$x_1$", aspect="equal", xticks=[-1, 0, 1])


# %%
sequence = [-0.5, -0.1, 0.0, 0.1, 0.5]
fig, axes = plt.subplots(1, 5, figsize=(7, 2.3), sharey=True)
for ax, t in zip(axes, sequence):
    ball(t, ax)
axes[0].set_ylabel("$x_2$")
handles = [plt.Line2D([], [], color=c, linewidth=w) for c, w in (("C0", 5), ("C1", 2.5))]
handles.append(plt.Line2D([], [], color="C2", marker="*", linestyle="", markersize=10))
names = ["gradient of row 1", "gradient of row 2", "worst point of the ball"]
fig.legend(handles, names, loc="outside lower center", ncols=3)
table = pd.DataFrame([(t, *w, *g[1:].ravel()) for t in sequence for w, g in [worst_and_gradient(t, 1.0)]],
                     columns=["t", "worst x1", "worst x2", "g11", "g12", "g21", "g22"])  # fmt: skip
book.save(
    fig, "02_sketch", table, source=exact,
    caption="Loss over the ball (darker: larger) as the parameters move: the worst point jumps from one corner to the "
    "other, and with it the gradient (at t = 0 they tie; the left one is drawn). Linear classifier, three classes, max "
    "norm, eps = 1.",
)  # fmt: skip

# %% [markdown]
# The model is linear: it has no activation, and no second derivative of one. That answers an objection raised in the
# reviews, that ReLU networks have no second derivative and the argument must be void for them. By Danskin's theorem
# $\nabla L_\epsilon(\theta)=\nabla_\theta g(x'(\theta),\theta)$, so a move from $\theta_1$ to $\theta_2$ changes it by
# a smooth part plus $\nabla_\theta g(x_2',\theta)-\nabla_\theta g(x_1',\theta)$. Only the dependence of the parameter
# gradient on $x$ enters, and $x'$, being an argmax, jumps when two local maxima tie. The next figure follows the
# gradient along the line, for several eps.

# %%
ts = np.linspace(-0.6, 0.6, 241)
rows, sketch_eps = [], [0.0, 0.25, 0.5, 1.0]
for eps in sketch_eps:
    gradients = np.array([worst_and_gradient(t, eps)[1] for t in ts])
    moved = np.linalg.norm(gradients - gradients[0], axis=(1, 2))
    steps = np.linalg.norm(np.diff(gradients, axis=0), axis=(1, 2))
    rows += [(eps, t, m) for t, m in zip(ts, moved)]
    print(f"eps {eps:4}: largest step {steps.max():.3f} at t = {ts[steps.argmax()]:.3f}, median {np.median(steps):.1e}")
path = pd.DataFrame(rows, columns=["eps", "t", "moved"])


def draw_path(ax, grid):
    for i, eps in enumerate(grid):
        part = path[path.eps == eps]
        ax.plot(part.t, part.moved, color=plt.colormaps["viridis"](0.8 * i / 3))
        ax.annotate(f"eps {eps:g}", (0.6, part.moved.iloc[-1]), xytext=(3, -3), textcoords="offset points")
    ax.set(xlabel="t (parameters W(t))", ylabel="||gradient(t) - gradient(-0.6)||", xlim=(-0.62, 0.8))


fig, ax = plt.subplots(figsize=(5.5, 2.8))
draw_path(ax, sketch_eps)
book.save(
    fig, "02_jump", path, source=exact,
    caption="How far the gradient has moved along the line of the previous figure: smooth without an attack, with "
    "one a jump that grows with eps.",
)  # fmt: skip

# %% [markdown]
# Step through it: the parameters move evenly, the gradient waits, jumps, and waits again.

# %%
figs, texts = [], []
for t in np.round(np.linspace(-0.5, 0.5, 11), 2):
    fig, (left, right) = plt.subplots(1, 2, figsize=(6, 2.8), width_ratios=[1, 1.5])
    ball(t, left)
    draw_path(right, [1.0])
    right.plot(t, np.interp(t, ts, path[path.eps == 1].moved), "o", color="C3")
    figs.append(fig)
    texts.append(f"t = {t:g}: {'the left corner is worst' if t < 0 else 'the right one is' if t > 0 else 'a tie'}")
stepper(figs, texts, what="The ball, its worst point and the gradient as the parameters move")

# %% [markdown]
# ## Proposition 2
#
# First in logistic regression on ten points in the plane, where all constants can be bounded by hand for weights in the
# box $|w_i|\le r$: with $\hat x=|x|+\epsilon$ coordinate by coordinate, and means over the points,
# $L_\theta=\overline{\|\hat x\|_2}$, $L_{\theta\theta}=\overline{\|\hat x\|_2^2}/4$, and $L_{\theta x}=\overline{\sqrt
# m\,\sigma(r\|\hat x\|_1)+\tfrac14 rm\|\hat x\|_2}$ from the max norm to the Euclidean norm. (With $z=y\,w\cdot x$ the
# gradient is $-y\sigma(-z)x$, at most $\|x\|_2$ long. Its derivative in $w$ is $\sigma(z)\sigma(-z)\,xx^\top$, and
# $\sigma(z)\sigma(-z)\le\tfrac14$. Its derivative in $x$ is $-y\sigma(-z)I+\sigma(z)\sigma(-z)\,xw^\top$: $I$ has norm
# $\sqrt m$ between these norms, and $xw^\top$ has $\|x\|_2\|w\|_1\le rm\|x\|_2$.) Pairs of weights are drawn at
# distances over nearly four decades.

# %%
rules = {
    "bound": inference.exact("by how much a difference is above its bound, relative to it", tolerance=1e-9),
    "tight": inference.exact("relative distance of the two sides in the example where they are equal", tolerance=1e-12),
    "local": inference.exact("1 minus jump / bound of logistic regression, for the smallest box", tolerance=0.01),
}
for each in rules.values():
    display(each)

# %%
rng = np.random.default_rng(seeds[0])
r, m = 0.05, 2
points = rng.normal(size=(10, m))
signs = np.where(np.arange(10) % 2, 1, -1)


def logistic(w, eps):
    """Adversarial loss and its gradient at weights w (n, m): (n,) and (n, m)."""
    worst = points[None] - eps * signs[None, :, None] * np.sign(w)[:, None]
    z = signs * np.einsum("nm,nkm->nk", w, worst)
    return np.logaddexp(0, -z).mean(1), -np.einsum("nk,nkm->nm", signs * expit(-z), worst) / len(signs)


def constants(eps):
    reach = np.abs(points) + eps
    one, two = reach.sum(1), np.linalg.norm(reach, axis=1)
    return two.mean(), (two**2).mean() / 4, (np.sqrt(m) * expit(r * one) + r * m * two / 4).mean()


# %%
direction = rng.normal(size=(num_pairs, m))
length = 10 ** rng.uniform(-5, np.log10(r), size=(num_pairs, 1))
middle = rng.uniform(-r, r, size=(num_pairs, m)) * 10 ** rng.uniform(-4, 0, size=(num_pairs, 1))
step = length * direction / np.linalg.norm(direction, axis=1, keepdims=True) / 2
first, second = np.clip(middle - step, -r, r), np.clip(middle + step, -r, r)
distance = np.linalg.norm(first - second, axis=1)
rows = []
for eps in (0.0, 0.1, 0.3):
    (loss1, g1), (loss2, g2) = logistic(first, eps), logistic(second, eps)
    rows.append(pd.DataFrame({"eps": eps, "distance": distance, "gradient difference": np.linalg.norm(g1 - g2, axis=1),
                              "loss difference": np.abs(loss1 - loss2)}))  # fmt: skip
scatter = pd.concat(rows, ignore_index=True)
bounds = pd.DataFrame([constants(e) for e in scatter.eps], columns=["L_t", "L_tt", "L_tx"])
scatter["bound"] = bounds.L_tt * scatter.distance + 2 * scatter.eps * bounds.L_tx
used = {"loss": scatter["loss difference"] / (bounds.L_t * scatter.distance),
        "gradient": scatter["gradient difference"] / scatter.bound}  # fmt: skip
print("share of the bound that is used at most:", ", ".join(f"{k} {v.max():.3f}" for k, v in used.items()))

# %% [markdown]
# **Tight.** In one dimension let $g(x,\theta)=\tfrac c2\theta^2+\theta x$. Then $L_{\theta\theta}=c$, $L_{\theta x}=1$,
# $\nabla L_\epsilon(\theta)=c\,\theta+x+\epsilon\,\mathrm{sign}\,\theta$, and for all $\theta_1<0<\theta_2$ both sides
# of the second inequality are $c(\theta_2-\theta_1)+2\epsilon$. The cell finds the worst input by looking at both
# ends of the ball, and compares.
#
# **Local, not global.** In logistic regression with one weight, $x=0$ and $\epsilon=1$, the jump at $w=0$ is exactly
# $\epsilon=2\epsilon\cdot\tfrac12$, and $\tfrac12$ is $L_{\theta x}$ *at* $w=0$. With one constant for all $|w|\le r$,
# as Assumption 1 wants it, the bound is larger than the jump; it becomes tight as r shrinks.

# %%
c, x, eps = rng.uniform(0.1, 5, (3, tight_cases))
low, high = -rng.uniform(0, 3, tight_cases), rng.uniform(0, 3, tight_cases)


def tight_gradient(theta):
    ends = x + eps, x - eps
    worst = np.where(theta * ends[0] >= theta * ends[1], *ends)
    return c * theta + worst


right = c * (high - low) + 2 * eps
off = np.abs(np.abs(tight_gradient(high) - tight_gradient(low)) / right - 1)
radii = 10.0 ** -np.arange(-1, 4)
u = np.linspace(-1, 1, 20001)[:, None] * radii  # w x', |w| <= r, |x'| <= eps = 1
mixed = np.abs(-expit(-u) + u * expit(u) * expit(-u)).max(0)
local = pd.DataFrame({"r": radii, "L_tx on |w| <= r": mixed, "jump / bound": 0.5 / mixed})
print(f"tight example: both sides agree to {off.max():.1e}, relative, in {tight_cases:,} cases")
local.round(4)

# %%
fig, axes = plt.subplot_mosaic([[0, 0, 1, 1, 2, 2], ["tight"] * 3 + ["local"] * 3], figsize=(7, 5))
for i, (eps_, part) in enumerate(scatter.groupby("eps")):
    line = part.sort_values("distance")
    axes[i].plot(part.distance, part["gradient difference"], ".", markersize=2, label="pairs", rasterized=True)
    axes[i].plot(line.distance, line.bound, "k--", linewidth=1, label="bound")
    axes[i].set(xscale="log", yscale="log", ylim=(5e-8, 2), xlabel="||w1 - w2||", title=f"logistic, eps {eps_:g}")
    axes[i].tick_params(labelleft=i == 0)
axes[0].set_ylabel("||gradient difference||")
axes[0].legend(loc="upper left", markerscale=4)
axes["tight"].plot(right, np.abs(tight_gradient(high) - tight_gradient(low)), ".", markersize=2)
axes["tight"].axline((0, 0), slope=1, color="k", linestyle="--", linewidth=1)
axes["tight"].text(0.95, 0.08, "dashed: difference = bound", ha="right", transform=axes["tight"].transAxes)
axes["tight"].set(xlabel="bound", ylabel="|gradient difference|", title="tight example")
axes["local"].semilogx(local.r, local["jump / bound"], "o-")
axes["local"].set(xlabel="r (the constants hold for |w| ≤ r)", ylabel="jump / bound", ylim=(0, 1.05),
                  title="logistic, jump at w = 0")  # fmt: skip
book.save(
    fig, "02_proposition", scatter, source="synthetic points in the plane; closed forms", seeds=seeds[:1],
    caption=f"Top: {num_pairs:,} pairs per eps (a point each) and the bound of Proposition 2 (dashed), whose intercept "
    f"is 2 eps L_tx: with an attack, pairs on two sides of the jump come close to it. Bottom left: "
    f"{tight_cases:,} cases of the example where it is an equality. Bottom right: how much of the bound the jump of "
    "logistic regression uses.",
)  # fmt: skip

# %%
for name, text, paper in (
    ("loss", "The adversarial loss is Lipschitz in the parameters, with the constant of the loss",
     "the adversarial loss has the Lipschitz constant of the loss"),
    ("gradient", "Gradients differ by at most L_tt times the distance plus 2 eps L_tx",
     "gradients differ by at most L_tt times the distance, and 2 eps L_tx"),
):
    book.claim(
        text, section="3.2, Proposition 2", paper=paper, holds=rules["bound"](np.maximum(used[name] - 1, 0)),
        measured=f"at most {used[name].max():.3f} of the bound is used, {(used[name] > 1).sum()} pairs above it",
        n=f"{num_pairs:,} pairs x 3 eps, logistic regression", source="synthetic points",
    )  # fmt: skip
book.check("The second bound is an equality in the tight example", holds=rules["tight"](off))
book.check("It is nearly one in logistic regression, for constants taken near w = 0",
           holds=rules["local"](1 - local["jump / bound"].iloc[-1]))  # fmt: skip

# %% [markdown]
# ## ReLU, softplus, ELU
#
# With an activation $s$ take $f(x)=s(u_1x+c_1)+s(-u_2x+c_2)$ at $x=0$, label $-1$, so that the loss $\log(1+e^f)$ grows
# with $f$. As $u_1$ crosses $u_2$ the worst input flips from $-\epsilon$ to $+\epsilon$. For ReLU the gradient in
# $(u_1,u_2)$ then jumps by $\sqrt2\,\epsilon\,\sigma(\epsilon)$ at $u=1$. Softplus, which has all derivatives, jumps as
# well: the kink is not the cause.
#
# The biases tell another story. The ReLU gradient in $(c_1,c_2)$ is $\sigma(f)$ times an indicator of the sign of the
# input of each unit. It is *discontinuous in x*, so $L_{\theta x}$ is infinite: **Assumption 1 itself fails for
# ReLU**, and the jump of the bias gradient, $\sqrt2\,\sigma(\epsilon)$, does not go away as eps goes to zero.

# %%
ACTIVATIONS = {"relu": F.relu, "softplus": F.softplus, "elu": F.elu}


def two_units(s, u1, u2, eps):
    """Gradient in (u1, u2, c1, c2) of the adversarial loss at u1, u2 and c = 0; worst input among 401."""
    x = torch.linspace(-eps, eps, 401, dtype=torch.float64)
    p = torch.tensor([u1, u2, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss = F.softplus(s(p[0] * x + p[2]) + s(-p[1] * x + p[3]))
    (gradient,) = torch.autograd.grad(loss[loss.argmax()], p)
    return gradient.numpy()


rows = []
for name, s in ACTIVATIONS.items():
    for eps_ in 10.0 ** np.linspace(-3, 0, 7):
        before, after = (two_units(s, 1 + h, 1.0, eps_) for h in (-1e-9, 1e-9))
        rows.append((name, eps_, np.linalg.norm((after - before)[:2]), np.linalg.norm((after - before)[2:])))
jumps = pd.DataFrame(rows, columns=["activation", "eps", "weights", "biases"])
relu = jumps[jumps.activation == "relu"]
formula = np.sqrt(2) * expit(relu.eps)
off_relu = max((relu.weights / (relu.eps * formula) - 1).abs().max(), (relu.biases / formula - 1).abs().max())
book.check("The jumps of the two ReLU units are those of the formulas",
           figure="02_activations", holds=inference.exact("relative error", tolerance=1e-6)(off_relu))  # fmt: skip

# %%
fig, axes = plt.subplots(1, 3, figsize=(7, 2.9))
for name, s in ACTIVATIONS.items():
    us = np.linspace(0.9, 1.1, 101)
    axes[0].plot(us, [two_units(s, u1, 1.0, 0.5)[0] for u1 in us], label=cells.spelt(name))
axes[0].set(xlabel="$u_1$ ($u_2$ = 1)", ylabel="d loss / d $u_1$, eps = 0.5", title="one gradient")
for ax, column in zip(axes[1:], ["weights", "biases"]):
    sns.lineplot(jumps, x="eps", y=column, hue="activation", style="activation", markers=True, dashes=False, ax=ax,
                 legend=False)  # fmt: skip
    ax.set(xscale="log", yscale="log", ylim=(3e-4, 3), ylabel="size of the jump", title=f"jump, {column}")
fig.legend(loc="outside lower center", ncols=3)
book.save(
    fig, "02_activations", jumps, source=exact,
    caption="Two units at the tie u1 = u2 = 1. The gradient of the weights jumps nearly in proportion to eps for "
    "every activation, as long as eps is small; that of the biases does so but for ReLU, where it is there at any eps.",
)  # fmt: skip

# %%
small = jumps[jumps.eps == jumps.eps.min()].set_index("activation")
share = {a: small.biases[a] / small.eps[a] for a in ACTIVATIONS}
relative = jumps.pivot(index="eps", columns="activation", values="weights")
against = relative[["softplus", "elu"]].div(relative.relu, axis=0).to_numpy()
book.answer(
    "ReLU has no second derivative: does the theory explain scattering in ReLU networks?",
    "Scattering needs no second derivative: a linear classifier scatters, and with softplus and ELU, whose derivative "
    f"is continuous, the weights' gradient jumps {against.min():.2f} to {against.max():.2f} times as far as with ReLU. "
    "But Assumption 1 itself fails for ReLU, whose biases' gradient jumps in x: its jump divided by eps is "
    f"{share['relu']:.0f} at eps "
    f"{small.eps.iloc[0]:g} (softplus {share['softplus']:.2f}, ELU {share['elu']:.2f}). So for ReLU the bound of "
    "Proposition 2 says nothing: there is more scattering than it speaks of, not less.",
    reviewer="Reviewer 1", n="two units, 7 eps, 3 activations", source=exact,
)  # fmt: skip

# %% [markdown]
# ## Theorem 2: what SGD sees
#
# SGD with step $1/(L_{\theta\theta}\sqrt T)$ for $T$ steps. Let
# $Z=\|\nabla L_\epsilon(\theta_t)\|/e$ with $e=\epsilon L_{\theta x}$, at a random step $t$. The paper's bound, for
# large $T$ and $\gamma\ge2$, is $P(Z>\gamma)<4/(\gamma^2-2\gamma+4)$.
#
# *Without gradient noise* the proof gives $E[Z^2-2Z]\le 0$ in the limit, hence $E(Z-1)^2\le1$ and the smaller bound
# $P(Z>\gamma)\le1/(\gamma-1)^2$; the paper's follows from it.
#
# *With noise* of variance $\sigma^2$ the same route leaves a term $2\sigma/e$ that does not go away as $T$ grows.
# Another route leaves no such term. $L_\epsilon$ is a maximum of functions with $\beta$-Lipschitz gradients
# ($\beta=L_{\theta\theta}$), so it is $\beta$-weakly convex. Its Moreau envelope $\varphi(\theta)=\min_u
# L_\epsilon(u)+\beta\|u-\theta\|^2$, attained at $\hat\theta$, has under SGD with steps $\alpha$ (Davis & Drusvyatskiy
# 2019, arXiv:1803.06523, Theorem 3.1)
# $$E\|\nabla\varphi\|^2\le2\,\frac{D_0+\beta M^2\sum\alpha^2}{\sum\alpha}=\frac{2(\beta D_0+M^2)}{\sqrt T}$$
# with $D_0$ the initial gap of the loss and $M^2$ the mean squared stochastic gradient. Now
# $\|\hat\theta-\theta\|=\|\nabla\varphi\|/(2\beta)$, some subgradient at $\hat\theta$ is at most $\|\nabla\varphi\|$
# long, and by Proposition 2 the gradient at $\theta$ is at most $\beta\|\hat\theta-\theta\|+2e$ away from it: so
# $\|\nabla L_\epsilon\|\le\tfrac32\|\nabla\varphi\|+2e$, and by Markov's inequality, for $\gamma>2$,
# $$P(Z>\gamma)\le\frac{4.5\,(\beta D_0+M^2)}{(\gamma-2)^2\,e^2\sqrt T}.$$
# It goes to zero: with noise, too, the theorem holds for every $\gamma>2$, once T is large enough.
#
# *How large?* In the tight example ($c=1$, $x=0$, noise 1) small steps make SGD a diffusion with the stationary law
# $\exp(-2\sqrt T L_\epsilon(\theta))$, $L_\epsilon=\epsilon|\theta|+\theta^2/2$, whose tail is
# $P(Z>\gamma)=\mathrm{erfc}(\gamma\kappa)/\mathrm{erfc}(\kappa)$ with $\kappa=(T\epsilon^4)^{1/4}$: all eps and
# T lie on one curve over $T\epsilon^4$ (in general $T(e/\sigma)^4$).

# %%
gammas = [2.5, 4.0, 8.0]
theorem = {g: 4 / (g**2 - 2 * g + 4) for g in gammas}
largest_T, asked_T = max(sgd_lengths), 100_000  # an asymptotic bound is judged at a T named beforehand
late = inference.difference(f"frequency / bound of Theorem 2 at T = {largest_T:,} (of {asked_T:,} or more), the "
                            "largest over eps and γ, minus 1", margin=0.05, over="seeds")  # fmt: skip
late


# %%
def exceed(eps, thresholds, T):
    """How often |gradient of L_eps| is above each threshold (k, eps) in SGD on the tight example, from its minimiser.

    Returns frequencies (k, eps, seeds) and the mean squared gradient (eps, seeds); sgd_runs runs per seed.
    """
    generators = [np.random.default_rng([s, T]) for s in seeds]
    eps, limits = np.asarray(eps)[:, None, None], np.asarray(thresholds)[:, :, None, None]
    theta = np.zeros((len(eps), len(seeds), sgd_runs))
    counts, squares = np.zeros((len(limits), *theta.shape), np.int32), np.zeros(theta.shape)
    for t in range(T):
        if t % 1000 == 0:
            noise = np.stack([g.normal(size=(min(1000, T - t), sgd_runs)) for g in generators], axis=1)
        gradient = theta + np.copysign(eps, theta)
        size = np.abs(gradient)
        counts += size > limits
        squares += size * size
        theta = theta - (gradient + noise[t % 1000]) / np.sqrt(T)
    return (counts.mean(3) / T).tolist(), (squares.mean(2) / T).tolist()


# %%
grid = 10 ** np.arange(-1.75, -0.2, 0.25)
fractions = np.array([0.15, 0.2, 0.3, 0.4, 0.5])  # eps as a fraction of a fixed threshold 2 T^(-1/4): γ = 2 and more
tails, growth = [], []
for T in sgd_lengths:
    threshold = 2 * T**-0.25
    at = np.vstack([np.outer(gammas, [*grid, *threshold * fractions]), np.full(len(grid) + 5, threshold)])
    tried = [*grid, *threshold * fractions]
    facts = {"eps": tried, "thresholds": at.tolist(), "T": T, "seeds": seeds, "sgd_runs": sgd_runs}
    p, squares = map(np.array, runs.remember("tails", facts, partial(exceed, tried, at, T)))
    for i, s in enumerate(seeds):
        growth += [(T, threshold, f, s, v) for f, v in zip(fractions, p[-1, len(grid) :, i])]
        for j, e in enumerate(grid):
            envelope = 4.5 * (squares[j, i] + 1) / ((np.array(gammas) - 2) * e) ** 2 / np.sqrt(T)  # D0 = 0: the minimum
            tails += [(T, e, g, s, v, b) for g, v, b in zip(gammas, p[:-1, j, i], envelope)]
tails = pd.DataFrame(tails, columns=["T", "eps", "gamma", "seed", "P", "envelope bound"])
tails["T eps^4"], tails["theorem"] = tails["T"] * tails.eps**4, tails.gamma.map(theorem)
growth = pd.DataFrame(growth, columns=["T", "threshold", "eps / threshold", "seed", "P"])

# %%
kappa = np.geomspace(0.08, 3, 5000)
curves = {g: erfc(g * kappa) / erfc(kappa) for g in gammas}
enough = {g: (kappa[np.argmax(curves[g] < theorem[g])]) ** 4 for g in gammas}  # T eps^4 where the curve meets the line
fig, ax = plt.subplots(figsize=(7, 3.6))
for i, g in enumerate(gammas):
    ax.plot(kappa**4, curves[g], color=f"C{i}", linewidth=1)
    ax.plot([enough[g], 81], [theorem[g]] * 2, color=f"C{i}", linestyle="--")
    ax.annotate(f"Theorem 2, γ = {g:g}", (81, theorem[g]), xytext=(-4, 3), textcoords="offset points", ha="right",
                color=f"C{i}")  # fmt: skip
    for T, mark in zip(sgd_lengths, "os^vD"):
        means = tails[(tails.gamma == g) & (tails["T"] == T)].groupby("T eps^4").P.mean()
        ax.plot(means.index, means.where(means > 0), mark, color=f"C{i}", markersize=5, markerfacecolor="none")
ax.axvspan(5e-5, min(enough.values()), color="0.92", zorder=0)
ax.text(6e-5, 2e-4, "T is too\nsmall for\nTheorem 2", va="bottom", fontsize="small")
marks = [
    plt.Line2D([], [], color="k", marker=m, linestyle="", markerfacecolor="none") for _, m in zip(sgd_lengths, "os^vD")
]
ax.legend(marks, [f"T = {T:,}" for T in sgd_lengths], loc="center right")
ax.set(xscale="log", yscale="log", xlim=(5e-5, 100), ylim=(1e-4, 1.5), xlabel="T eps$^4$",
       ylabel="P( ||gradient|| > γ eps )")  # fmt: skip
book.save(
    fig, "02_tails", tails, source=simulated, seeds=seeds,
    caption=f"SGD with unit noise on the tight example, {len(seeds)} x {sgd_runs} runs a point, {len(grid)} eps per T. "
    "Lines through the points: the diffusion. Dashed: Theorem 2, drawn where the diffusion is below it; grey: where it "
    "is above all three (no point: fewer than 1 in 10,000).",
)  # fmt: skip

# %%
ratio = tails[tails["T"] == largest_T].assign(ratio=lambda t: t.P / t.theorem).groupby("seed").ratio.max()
smallest = tails[tails["T"] == min(sgd_lengths)].groupby(["eps", "gamma"])[["P", "theorem"]].mean()
worst = (smallest.P / smallest.theorem).idxmax()
short = f"the largest T is {largest_T:,}, and the rule asks for {asked_T:,}" if largest_T < asked_T else ""
domain = late(ratio.to_numpy(), np.ones(len(ratio)), unless=short)
book.claim(
    "For T large enough the tail of the gradient norm under SGD is below 4 / (γ² - 2γ + 4)",
    section="3.2, Theorem 2", paper="an asymptotic bound for γ ≥ 2", holds=domain,
    measured=f"frequency / bound at most {ratio.max():.2f} at T = {largest_T:,} (minus 1: {domain.measured}); large "
    f"enough means T (e/σ)^4 above {min(enough.values()):.2g} to {max(enough.values()):.2g}: at T = "
    f"{min(sgd_lengths):,}, eps {worst[0]:.2g}, γ {worst[1]:g} it is {smallest.P[worst]:.2f} against "
    f"{smallest.theorem[worst]:.2f}",
    n=f"{len(seeds)} x {sgd_runs} runs x {len(grid)} eps x {len(gammas)} γ", source=simulated,
)  # fmt: skip
informative = tails[tails["envelope bound"] < 1]
unseen = (informative.P == 0).sum()
print(f"The bound by the Moreau envelope is below 1 in {len(informative)} cases; in {unseen} of them no gradient was "
      "so large, so that these are no test of it.")  # fmt: skip

# %% [markdown]
# **Growth with eps.** At a fixed threshold $\tau$ the bound of the theorem is $4e^2/(\tau^2-2\tau e+4e^2)$: for small
# eps it grows with the square of eps. It is a bound; what do the gradients do? The threshold is $2T^{-1/4}$,
# and eps stays inside the theorem's domain, $\gamma=\tau/e\ge2$.

# %%
rule = inference.trend("the frequency of gradients above a fixed threshold along eps", expect="rises")
rule

# %%
law = erfc(2) / erfc(2 * fractions)  # of the diffusion: the threshold is 2 T^(-1/4), so that T drops out
shown = growth.assign(bound=lambda t: 4 / (t["eps / threshold"] ** -2 - 2 / t["eps / threshold"] + 4),
                      diffusion=growth["eps / threshold"].map(dict(zip(fractions, law))))  # fmt: skip
line = shown.groupby("eps / threshold").bound.first()
fig, (ax, ratio) = plt.subplots(1, 2, figsize=(7, 3))
for i, (T, mark) in enumerate(zip(sgd_lengths, "os^vD")):
    values = growth[growth["T"] == T].pivot(index="eps / threshold", columns="seed", values="P")
    ax.loglog(fractions, values.mean(axis=1).where(lambda v: v > 0), mark, markersize=5, mfc="none")
    ratio.semilogx(fractions * 1.02 ** (i - 1), values.div(law, axis=0), mark, color=f"C{i}", markersize=3)
    ratio.semilogx(fractions, values.mean(axis=1) / law, color=f"C{i}", linewidth=1)
    ratio.plot([], [], mark + "-", color=f"C{i}", markersize=4, label=f"T = {T:,}")
ax.loglog(fractions, law, color="grey", linewidth=1, zorder=0)
ax.loglog(line.index, line, "k")
ax.loglog(line.index, 1.2 * line.index**2, "k:")
for text, y_ in (("bound of Theorem 2", 1.3 * line.iloc[2]), ("slope 2", 0.13), ("SGD; grey: diffusion", 1.3 * law[2])):
    ax.text(fractions[2], y_, text, ha="right", va="bottom", fontsize="small")
for each in (ax, ratio):
    each.set(xlabel="eps / threshold (= 1 / γ)")
    each.set_xticks(fractions, [f"{f:g}" for f in fractions])
    each.minorticks_off()
ax.set(ylabel="P( ||gradient|| > threshold )")
ratio.axhline(1, color="grey", linewidth=1, zorder=0)
ratio.set(ylabel="P in SGD / P of the diffusion")
fig.legend(loc="outside lower center", ncols=len(sgd_lengths))
book.save(
    fig, "02_growth", shown, source=simulated, seeds=seeds,
    caption=f"Chance of a gradient above a fixed threshold against eps, {len(seeds)} x {sgd_runs} runs of SGD on the "
    "tight example, all inside the theorem's domain γ ≥ 2. Left: means; all T lie on one curve, the diffusion's. "
    f"Right: divided by it, a point for each of {of(seeds, 'seed')}, line: mean.",
)  # fmt: skip

# %%
found, slopes = {}, []
for T, part in growth.groupby("T"):
    values = part.pivot(index="seed", columns="eps / threshold", values="P").to_numpy()
    found[f"T = {T:,}"] = rule(values)
    fits = np.polyfit(np.log(fractions), np.log(np.maximum(values, 1e-12)).T, 1)[0]
    half = inference.stats.t.isf(0.005, len(fits) - 1) * inference.stats.sem(fits) if len(fits) > 1 else np.nan
    slopes.append(
        f"{fits.mean():.2f}" + (f" [{fits.mean() - half:.2f}, {fits.mean() + half:.2f}]" if half == half else "")
    )
finding = inference.together(found)
book.claim(
    "At a fixed threshold large gradients become more frequent with eps", section="3.2, Theorem 2", holds=finding,
    paper="the bound at a fixed threshold grows with eps", measured=f"{finding.measured}; slope of log P on log eps "
    f"(99 % interval) {'; '.join(slopes)} at T = {', '.join(f'{T:,}' for T in sgd_lengths)}, where the bound's is "
    f"{np.polyfit(np.log(fractions), np.log(line), 1)[0]:.2f}", n=f"{of(seeds, 'seed')} x {sgd_runs} runs x 5 eps x "
    f"{len(sgd_lengths)} T", source=simulated, ours=True,
)  # fmt: skip

# %% [markdown]
# ## A network on real digits
#
# The same in LeNet: move the parameters by a small distance in a random direction, attack again, and see how far the
# gradient of the adversarial loss and the perturbations have moved. The change of the gradient has a smooth part (the
# attacks kept) and the part that comes from the new attacks: the *scattering*. All eps are tried at the same networks,
# trained at one eps, so that only the attack differs. The usual attack takes signs of gradients, and signs jump even
# where the worst input does not; so there is a control, an attack in the Euclidean ball, whose steps have no signs.
# The random directions are filter-normalised (each filter's part is as long as the filter), distances are relative to
# the norm of the parameters. Attack and gradients are in full precision, since the changes are small.

# %%
scattered = inference.trend(f"scattering at distance {max(distances):g} along eps", expect="rises")
aligned = inference.trend(f"1 minus the cosine between the perturbations at distance {max(distances):g}, along eps",
                          expect="rises")  # fmt: skip
display(scattered, aligned)

# %%
settings = book.recipe(recipe)
digits, _ = recipes.load(settings)
x, y = digits.x_test[:num_images], digits.y_test[:num_images]
keys = [(activation, s) for activation in activations for s in seeds]
configs = [recipes.configure(settings, eps=train_eps, schedule="constant", activation=a, seed=s) for a, s in keys]
trained = dict(zip(keys, runs.grid(configs, digits)))
errors = {key: run.history.clean_error.iloc[-1] for key, run in trained.items()}
print("clean errors:", ", ".join(f"{a} {s}: {e:.3f}" for (a, s), e in errors.items()))
idle = [key for key, e in errors.items() if e > 0.5]  # they have learnt nothing, and are left out


def attack_of(kind, e, **more):
    settings_of = dict(eps=e, step_size=e / 4, num_steps=attack_steps, norm=kind, random_start=False, precision="full")
    return partial(pgd, **settings_of | more)


def scatter_of(key, kind, e, k):
    model = trained[key].model()
    v, size = landscape.random_directions(model, k + 1, seed=key[1])[k], landscape.flat(model).norm()
    moved = landscape.scatter(model, v, size * torch.tensor(distances), x, y, attack_of(kind, e))
    moved = moved._replace(cosine=np.nan_to_num(moved.cosine, nan=1.0))  # where no attack moves any: they are alike
    return [list(map(float, values)) for values in zip(*moved)]


# %%
rows = []
for key in keys:
    for kind, radii in network_eps.items():
        for e in radii:
            for k in range(num_directions):
                facts = {"run": trained[key].folder.name, "norm": kind, "eps": e, "direction": [key[1], k],
                         "distances": distances, "images": num_images, "steps": attack_steps,
                         "data": digits.fingerprint}  # fmt: skip
                moved = runs.remember("scatter", facts, partial(scatter_of, key, kind, e, k))
                rows += [(*key, kind, e, k, d, *values) for d, values in zip(distances, moved)]
names = ["activation", "seed", "norm", "eps", "direction", "distance", "gradient", "fixed", "scattering", "cosine"]
network = pd.DataFrame(rows, columns=names)

# %%
CONTROL = {"linf": "sign steps (max norm)", "l2": "control: no signs (Euclidean)"}
fig, axes = plt.subplots(2, len(network_eps), figsize=(7, 4.6), squeeze=False)
near = network[network.distance == max(distances)].assign(turned=lambda rows: 1 - rows.cosine)
for ax, (kind, radii) in zip(axes.T, network_eps.items()):
    part = near[near.norm == kind]
    ax[0].sharey(axes[0, 0])
    for i, a in enumerate(activations):
        for panel, column in zip(ax, ["scattering", "cosine"]):
            lines = part[part.activation == a].groupby(["seed", "eps"])[column].mean().unstack()
            panel.plot(radii, lines.T, "-", color=f"C{i}", alpha=0.4, linewidth=0.8)
            panel.plot(radii, lines.mean(), "os"[i % 2] + "-", color=f"C{i}", markersize=4,
                       label=f"{cells.spelt(a)}: by the new attacks (scattering)")  # fmt: skip
        smooth = part[part.activation == a].groupby("eps").fixed.mean()
        label = f"{cells.spelt(a)}: attacks kept (smooth part)"
        ax[0].plot(radii, smooth, "--", color=f"C{i}", linewidth=1, label=label)
    ax[0].set(title=CONTROL[kind], yscale="log")
    ax[0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax[0].yaxis.set_major_formatter("{x:g}")
    ax[0].minorticks_off()
    ax[1].set(xlabel="eps" + (" (fraction of the pixel range)" if kind == "linf" else " (Euclidean length)"))
axes[0, 0].set_ylabel("change of the gradient")
axes[1, 0].set_ylabel("cosine of perturbations")
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
book.save(
    fig, "02_network", network, source=digits.source, seeds=seeds,
    caption=f"Networks moved by {max(distances):g} of their length in random directions. Top: change of the gradient "
    "that comes from the new attacks, and (dashed) the smooth rest. Bottom: cosine between old and new perturbations. "
    f"Pale: {of(seeds, 'seed')}, mean of {of(num_directions, 'direction')}; {num_images} test digits, "
    f"PGD-{attack_steps}.",
)  # fmt: skip


# %%
def along_eps(rule, column):
    """The rule's findings for each norm and activation, from the values (seeds, eps) at the largest distance."""
    findings = {}
    for (a, kind), part in near.groupby(["activation", "norm"], sort=False):
        learnt = part[[(a, s) not in idle for s in part.seed]]
        few = len(learnt) < inference.THROUGH * len(part)
        values = (part if few else learnt).groupby(["seed", "eps"])[column].mean().unstack()
        findings[f"{a}, {kind}"] = rule(values, unless="too few networks have learnt anything" if few else "")
    return inference.together(findings)


n_text = f"{of(seeds, 'seed')} x {of(num_directions, 'direction')} x {num_images} digits, trained at eps {train_eps}"
n_text += f", {len(idle)} of {len(keys)} networks left out" * bool(idle)
book.claim(
    "In a network the gradients are more scattered the larger eps is, with sign steps and without", section="3.2, 4.2",
    paper="gradients are more scattered under larger budgets", holds=along_eps(scattered, "scattering"), n=n_text,
    source=digits.source, believe=True,
)  # fmt: skip
turned = along_eps(aligned, "turned")
book.claim(
    "Perturbations at nearby parameters are less aligned the larger eps is, with sign steps and without",
    section="3.2, 4.2", paper="the perturbations' cosine falls with the budget", holds=turned, n=n_text,
    measured=f"1 minus the cosine: {turned.measured}", source=digits.source,
)  # fmt: skip

# %% [markdown]
# ## Do two worst inputs have different gradients?
#
# The jump needs two inputs that are (nearly) equally bad and whose parameter gradients differ. A reviewer asked
# whether the second can be taken for granted. Here each digit is attacked from two random starts, at the largest eps
# and by more steps than above; a pair counts if the two end points have losses within 5 % of each other and
# perturbations that point more than 37 degrees apart (cosine below 0.8). A larger loss alone lengthens a gradient, so
# their directions are compared. A digit has pairs on several networks, under two attacks: it counts once, by its
# closest pair. (The first rule took all pairs with a cosine below 0.99 and asked whether their gradients agree to 1
# %: few steps leave two ends of *one* worst input so far apart, and nearly any loss that is not linear passes. These
# marks were set when the distances had been seen: the nearer the two inputs, the nearer their gradients.)

# %%
alike = 0.1
rule = inference.at_most("share of the digits of such pairs that have one whose parameter gradients are less than "
                         f"{alike} apart (as unit vectors: six degrees)", bound=0.05)  # fmt: skip
rule


# %%
def maximisers(key, kind, e):
    """Of the pairs of nearly equal losses: the digit, and how far apart its two parameter gradients point."""
    model = trained[key].model().requires_grad_(True)
    images, labels = digits.x_test[:tie_images], digits.y_test[:tie_images]
    ends = [attack_of(kind, e, num_steps=tie_steps, step_size=e / 10, random_start="ball",
                      generator=torch.Generator().manual_seed(s))(model, images, labels) for s in (0, 1)]  # fmt: skip
    losses = [F.cross_entropy(model(z), labels, reduction="none") for z in ends]
    close = (losses[0] / losses[1]).log().abs() < 0.05
    cosine = F.cosine_similarity(*((z - images).flatten(1) for z in ends))
    values = []
    for i in torch.nonzero(close & (cosine < 0.8)).flatten():
        g1, g2 = (torch.cat([g.flatten() for g in torch.autograd.grad(loss[i], list(model.parameters()),
                  retain_graph=True)]) for loss in losses)  # fmt: skip
        values.append((i.item(), (F.normalize(g1, dim=0) - F.normalize(g2, dim=0)).norm().item()))
    return values


# %%
rows, learnt = [], [key for key in keys if errors[key] <= 0.5]
for key in learnt:
    for kind, radii in network_eps.items():
        e = max(radii)
        facts = {"run": trained[key].folder.name, "norm": kind, "eps": e, "images": tie_images, "tie": 0.05,
                 "of": "directions", "apart": 0.8, "steps": tie_steps, "data": digits.fingerprint}  # fmt: skip
        rows += [(*key, kind, e, *v) for v in runs.remember("maximisers", facts, partial(maximisers, key, kind, e))]
pairs = pd.DataFrame(rows, columns=["activation", "seed", "norm", "eps", "digit", "difference"])
if len(pairs):
    closest = pairs.groupby("digit").difference.min()
    equal = rule(int((closest < alike).sum()), len(closest))
    low, middle = pairs.difference.quantile([0.01, 0.5])
    book.answer(
        "Do the gradients at two maximisers really differ, as the argument assumes?",
        {True: "Yes", False: "Not always", None: "Not settled here"}[equal.holds]
        + f": of the digits with two equally bad inputs {equal.measured}, have two whose gradients are less than "
        f"{alike} apart ({equal.outcome}); of the pairs, the distance of the unit gradients is {middle:.2f} in the "
        f"middle and above {low:.2f} in 99 %{equal.because}.",
        reviewer="Reviewer 2", source=digits.source, figure="",
        n=f"{len(closest)} digits with {len(pairs)} pairs, {of(learnt, 'network')}, both attacks",
    )  # fmt: skip
pairs.groupby(["activation", "norm"]).difference.describe().round(3)

# %%
book.close()
