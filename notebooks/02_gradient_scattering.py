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
# $2\epsilon L_{\theta x}$, and cases that reach it; under SGD, gradients of size $\epsilon L_{\theta x}$ that do not
# vanish; in a network, gradients and perturbations that change abruptly, the more so the larger eps is.

# %% tags=["parameters"]
profile = "quick"
seed = 0
num_pairs = 2000  # pairs of parameters in the test of Proposition 2
tight_cases = 1000
sgd_lengths = [1000, 10000, 100000]
sgd_runs = 100
sgd_eps = [0.03, 0.1, 0.3, 1.0]
noise = 1.0
dataset = "mnist5k"
train_images = 2000
train_epochs = 6
train_eps = 0.1
width = 2
activations = ["relu", "softplus", "elu"]
network_seeds = [0, 1]
network_eps = [0.0, 0.1, 0.2, 0.3]
distances = [1e-4, 1e-3, 1e-2, 3e-2, 1e-1]  # relative to the norm of the parameters
num_directions = 1
num_images = 100

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from scipy.special import expit

from lib import data, landscape, linear, runs
from lib.attacks import pgd
from lib.figures import Book
from lib.training import TrainConfig

book = Book("02_gradient_scattering", globals())
rng = np.random.default_rng(seed)
exact = "closed form, no data"

# %% [markdown]
# ## The sketch, computed
#
# Three classes, a linear classifier, two inputs, the max norm: the whole ball is a square, and its worst point is known
# exactly. The parameters move along a line, $W(t)=W_0+tV$, and the ball is shown at five places. Call `ball(t)` with
# any other t.

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


def ball(t, eps=1.0, ax=None):
    """Draw the loss over the ball at W(t), its worst point and the gradients of the rows of classes 1 and 2."""
    ax = ax or plt.figure(figsize=(3.4, 3.4)).gca()
    side = np.linspace(-eps, eps, 61)
    square = POINT + np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    loss = linear.robust_loss(START + t * MOVE, square, np.zeros(len(square), int), eps=0.0, norm="linf")[0]
    worst, gradient = worst_and_gradient(t, eps)
    levels = np.linspace(0.3, 3.0, 28)
    ax.contourf(side, side + POINT[0, 1], loss.reshape(61, 61), levels=levels, cmap="Blues", extend="both")
    ax.plot(*worst, "k*", markersize=13, clip_on=False)
    for row, colour in ((1, "C1"), (2, "C3")):
        ax.quiver(*POINT[0], *gradient[row], color=colour, angles="xy", scale_units="xy", scale=1.5, width=0.025)
    ax.set(title=f"t = {t:g}", xlabel="$x_1$", aspect="equal", xticks=[-1, 0, 1])
    return ax


# %%
sequence = [-0.5, -0.1, 0.0, 0.1, 0.5]
fig, axes = plt.subplots(1, 5, figsize=(12, 3.4), sharey=True)
for ax, t in zip(axes, sequence):
    ball(t, ax=ax)
axes[0].set_ylabel("$x_2$")
handles = [plt.Line2D([], [], color=c, linewidth=3) for c in ("C1", "C3")]
handles.append(plt.Line2D([], [], color="k", marker="*", linestyle=""))
names = ["gradient of row 1", "gradient of row 2", "worst point of the ball"]
fig.legend(handles, names, loc="outside lower center", ncols=3)
table = pd.DataFrame([(t, *w, *g[1:].ravel()) for t in sequence for w, g in [worst_and_gradient(t, 1.0)]],
                     columns=["t", "worst x1", "worst x2", "g11", "g12", "g21", "g22"])  # fmt: skip
book.save(
    fig, "02_sketch", table, source=exact,
    caption="Loss over the ball (darker: larger) as the parameters move: the worst point jumps from one corner to the "
    "other, and with it the gradient (at t = 0 they tie). Linear classifier, three classes, max norm, eps = 1.",
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
rows = []
for eps in (0.0, 0.25, 0.5, 1.0):
    gradients = np.array([worst_and_gradient(t, eps)[1] for t in ts])
    moved = np.linalg.norm(gradients - gradients[0], axis=(1, 2))
    steps = np.linalg.norm(np.diff(gradients, axis=0), axis=(1, 2))
    rows += [(eps, t, m) for t, m in zip(ts, moved)]
    print(f"eps {eps:4}: largest step {steps.max():.3f} at t = {ts[steps.argmax()]:.3f}, median {np.median(steps):.1e}")
path = pd.DataFrame(rows, columns=["eps", "t", "moved"])
fig, ax = plt.subplots(figsize=(6, 3.4))
sns.lineplot(path, x="t", y="moved", hue="eps", style="eps", palette="viridis", ax=ax)
ax.set(xlabel="t (parameters W(t))", ylabel="||gradient(t) - gradient(-0.6)||")
book.save(
    fig, "02_jump", path, source=exact,
    caption="How far the gradient has moved along the line of the previous figure: smooth without an attack, with "
    "one a jump that grows with eps.",
)  # fmt: skip

# %% [markdown]
# ## Proposition 2
#
# First in logistic regression on ten points in the plane, where all constants can be bounded by hand for weights in
# the box $|w_i|\le r$: with $\hat x=|x|+\epsilon$ coordinate by coordinate, and means over the points,
# $L_\theta=\overline{\|\hat x\|_2}$, $L_{\theta\theta}=\overline{\|\hat x\|_2^2}/4$, and
# $L_{\theta x}=\overline{\sqrt m\,\sigma(r\|\hat x\|_1)+\tfrac14 rm\|\hat x\|_2}$ from the max norm to the Euclidean
# norm. Pairs of weights are drawn at distances over four decades.

# %%
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
used = {"loss": (scatter["loss difference"] / (bounds.L_t * scatter.distance)).max(),
        "gradient": (scatter["gradient difference"] / scatter.bound).max()}  # fmt: skip
print(f"share of the bound that is used at most: loss {used['loss']:.3f}, gradient {used['gradient']:.3f}")

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
fig, axes = plt.subplots(1, 3, figsize=(12, 3.6))
for eps_, part in scatter.groupby("eps"):
    colour = f"C{list(scatter.eps.unique()).index(eps_)}"
    axes[0].plot(part.distance, part["gradient difference"], ".", markersize=2, color=colour, label=f"eps = {eps_:g}",
                 rasterized=True)  # fmt: skip
    line = part.sort_values("distance")
    axes[0].plot(line.distance, line.bound, color=colour)
axes[0].set(xscale="log", yscale="log", ylim=(1e-6, 1), xlabel="||w1 - w2||", ylabel="||gradient difference||",
            title="logistic regression")  # fmt: skip
axes[0].legend(markerscale=5)
axes[1].plot(right, np.abs(tight_gradient(high) - tight_gradient(low)), ".", markersize=3)
axes[1].plot([0, right.max()], [0, right.max()], "k:", linewidth=1)
axes[1].set(xlabel="bound", ylabel="|gradient difference|", title="the tight example")
axes[2].semilogx(local.r, local["jump / bound"], "o-")
axes[2].set(xlabel="r: constant taken on |w| ≤ r", ylabel="jump / bound", ylim=(0, 1.05), title="logistic, at w = 0")
book.save(
    fig, "02_proposition", scatter, source="synthetic points in the plane; closed forms",
    caption=f"Left: {num_pairs:,} pairs per eps and the bounds of Proposition 2 (lines), whose intercept is "
    f"2 eps L_tx. Middle: {tight_cases:,} cases of the example where it is an equality. Right: how much of the bound "
    "the jump of logistic regression uses.",
)  # fmt: skip

# %%
book.claim(
    "The adversarial loss is Lipschitz in the parameters, with the constant of the loss", section="3.2, Proposition 2",
    measured=f"at most {used['loss']:.3f} of the bound used",
    holds=bool(used["loss"] <= 1), n=f"{num_pairs:,} pairs x 3 eps, logistic regression", source="synthetic points",
)  # fmt: skip
book.claim(
    "Gradients differ by at most L_tt times the distance plus 2 eps L_tx", section="3.2, Proposition 2",
    measured=f"at most {used['gradient']:.3f} of the bound used, "
    f"{(scatter['gradient difference'] > scatter.bound).sum()} pairs above it",
    holds=bool(used["gradient"] <= 1), n=f"{num_pairs:,} pairs x 3 eps, logistic regression", source="synthetic points",
)  # fmt: skip
at = dict(zip(local.r, local["jump / bound"]))
book.claim(
    "The bound is tight", section="3.2, Proposition 2",
    measured=f"equality to {off.max():.0e} in the example; in logistic regression {at[1.0]:.3f}, {at[0.1]:.3f}, "
    f"{at[0.01]:.3f} of it for constants taken on |w| up to 1, 0.1, 0.01",
    holds=bool(off.max() < 1e-12 and local["jump / bound"].iloc[-1] > 0.99), n=f"{tight_cases:,} cases", source=exact,
)  # fmt: skip

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
print(f"ReLU: both formulas met to {off_relu:.1e}, relative")

# %%
fig, axes = plt.subplots(1, 3, figsize=(12, 3.6))
for name, s in ACTIVATIONS.items():
    us = np.linspace(0.9, 1.1, 201)
    axes[0].plot(us, [two_units(s, u1, 1.0, 0.5)[0] for u1 in us], label=name)
axes[0].set(xlabel="$u_1$ ($u_2$ = 1)", ylabel="d loss / d $u_1$, eps = 0.5", title="one gradient")
for ax, column in zip(axes[1:], ["weights", "biases"]):
    sns.lineplot(jumps, x="eps", y=column, hue="activation", style="activation", markers=True, dashes=False, ax=ax)
    ax.set(xscale="log", yscale="log", ylim=(3e-4, 3), ylabel="size of the jump", title=f"jump, {column}")
axes[0].legend()
axes[1].get_legend().remove()
axes[2].get_legend().remove()
book.save(
    fig, "02_activations", jumps, source=exact,
    caption="Two units at the tie u1 = u2 = 1. The gradient of the weights jumps in proportion to eps for every "
    "activation; that of the biases does so for smooth ones only: for ReLU it is there at any eps.",
)  # fmt: skip

# %%
small = jumps[jumps.eps == jumps.eps.min()].set_index("activation")
share = {a: small.biases[a] / small.eps[a] for a in ACTIVATIONS}
relative = jumps.pivot(index="eps", columns="activation", values="weights")
ratios = relative[["softplus", "elu"]].div(relative.relu, axis=0).to_numpy()
book.claim(
    "Scattering needs no second derivative of the activation (a reviewer's objection)", section="3.2",
    measured="a linear classifier jumps; weight jump of softplus and ELU "
    f"{ratios.min():.2f} to {ratios.max():.2f} times that of ReLU",
    holds=bool(relative.div(jumps.eps.unique(), axis=0).min().min() > 0.1), n="7 eps, 3 activations", source=exact,
)  # fmt: skip
book.claim(
    "Assumption 1 covers ReLU networks", section="3.2, Assumption 1",
    measured=f"jump of the bias gradient / eps at eps = {small.eps.iloc[0]:g}: ReLU {share['relu']:.0f}, softplus "
    f"{share['softplus']:.2f}, ELU {share['elu']:.2f}",
    holds=bool(share["relu"] < 10), n="two units, 7 eps", source=exact,
)  # fmt: skip

# %% [markdown]
# ## Theorem 2: what SGD sees
#
# SGD with step $1/(L_{\theta\theta}\sqrt T)$ for $T$ steps. Let
# $Z=\|\nabla L_\epsilon(\theta_t)\|/(\epsilon L_{\theta x})$ at a random step $t$. The paper's bound, for large $T$,
# is $P(Z>\gamma)<4/(\gamma^2-2\gamma+4)$.
#
# *Without gradient noise* the proof gives $E[Z^2-2Z]\le 0$ in the limit, hence $E(Z-1)^2\le1$ and the smaller bound
# $P(Z>\gamma)\le1/(\gamma-1)^2$; the paper's follows from it.
#
# *With noise* of variance $\sigma^2$ the same route leaves a term $2\sigma/(\epsilon L_{\theta x})$ that does not go
# away as $T$ grows, so bounded variance alone does not give the bound this way. Another route does: $L_\epsilon$ is
# $L_{\theta\theta}$-weakly convex, and with the Moreau envelope, for $\gamma>2$,
# $$P(Z>\gamma)\le\frac{4.5\,(L_{\theta\theta}D_0+M^2)}{(\gamma-2)^2\,(\epsilon L_{\theta x})^2\sqrt T},$$
# with $D_0$ the initial gap of the loss and $M^2$ a bound on the mean squared stochastic gradient. So the statement
# holds *asymptotically*, but only once $T\gg(\sigma/(\epsilon L_{\theta x}))^4$. The experiment: the tight example
# ($c=1$, $x=0$), unit noise, several eps and T.


# %%
def sgd_norms(eps, T, start):
    """|gradient of L_eps| at every step of SGD on the tight example from `start`: (len(eps), sgd_runs, T)."""
    eps, g = np.asarray(eps)[:, None], np.random.default_rng(seed)
    theta, out = np.full((len(eps), sgd_runs), start), np.empty((T, len(eps), sgd_runs), dtype=np.float32)
    for t in range(T):
        gradient = theta + eps * np.where(theta >= 0, 1, -1)
        out[t] = np.abs(gradient)
        theta = theta - (gradient + noise * g.normal(size=sgd_runs)) / np.sqrt(T)
    return out.transpose(1, 2, 0)


gammas = np.linspace(2, 8, 25)
rows = []
for T in sgd_lengths:
    for e, z in zip(sgd_eps, sgd_norms(sgd_eps, T, start=1.0)):
        means = [(z > gamma * e).mean(1) for gamma in gammas]  # a value per run
        bound = 4.5 * (0.5 + e + (z**2).mean() + noise**2) / ((np.maximum(gammas - 2, 1e-9) * e) ** 2 * np.sqrt(T))
        rows += [(e, T, k, p.mean(), p.std() / np.sqrt(sgd_runs), min(b, 1)) for k, p, b in zip(gammas, means, bound)]
tails = pd.DataFrame(rows, columns=["eps", "T", "gamma", "P", "standard error", "finite-T bound"])
tails["paper"] = 4 / (tails.gamma**2 - 2 * tails.gamma + 4)
tails["noiseless"] = 1 / (tails.gamma - 1) ** 2
print(f"frequencies above the finite-T bound: {(tails['finite-T bound'] < tails.P).sum()} of {len(tails)}")

# %%
fig, axes = plt.subplots(1, len(sgd_lengths), figsize=(12, 3.6), sharey=True, squeeze=False)
for ax, (T, part) in zip(axes[0], tails.groupby("T")):
    for i, (e, line) in enumerate(part.groupby("eps")):
        ax.plot(line.gamma, line.P, "os^v"[i % 4] + "-", markersize=3, label=f"eps = {e:g}")
    ax.plot(line.gamma, line.paper, "k", label="Theorem 2")
    ax.plot(line.gamma, line.noiseless, "k--", label="noiseless: 1/(γ-1)²")
    ax.set(yscale="log", ylim=(1e-4, 1.2), xlabel="γ", title=f"T = {T:,}")
axes[0, 0].set_ylabel("P( ||gradient|| > γ eps L_tx )")
axes[0, 0].legend(fontsize="small")
book.save(
    fig, "02_tails", tails, source=exact, seeds=[seed],
    caption=f"Tails of the gradient norm over {sgd_runs} runs of SGD with unit noise, and the two asymptotic bounds. "
    "Small eps violate them until T is large compared with 1 / eps^4. (No line: never seen.)",
)  # fmt: skip

# %% [markdown]
# The rows at gamma = 3. The bound of the last column is valid at every T, and says little at these.

# %%
three = tails[np.isclose(tails.gamma, 3)].assign(excess=lambda t: t.P - t.paper)
three["T (eps / noise)^4"] = three["T"] * (three.eps / noise) ** 4
three.drop(columns="gamma").round(4)

# %%
beyond = tails.assign(late=tails["T"] * (tails.eps / noise) ** 4 >= 10, excess=tails.P - tails.paper)
early, late = beyond[~beyond.late], beyond[beyond.late]
worst = three.loc[three.excess.idxmax()]
book.claim(
    "The tail of the gradient norm under SGD is below 4 / (γ² - 2γ + 4)", section="3.2, Theorem 2",
    measured=f"for T ≥ 10 (noise / (eps L_tx))^4 in {(late.excess < 0).sum()} of {len(late)} cases, before that in "
    f"{(early.excess < 0).sum()} of {len(early)}; e.g. eps {worst.eps:g}, T {worst['T']:.0f}, γ 3: "
    f"{worst.P:.3f} against {worst.paper:.3f}",
    holds=False if (late.excess >= 0).any() else ("partly" if (early.excess >= 0).any() else True),
    n=f"{sgd_runs} runs x {len(sgd_eps)} eps x {len(sgd_lengths)} lengths x {len(gammas)} γ", source=exact,
)  # fmt: skip

# %% [markdown]
# **Growth with eps.** At a fixed threshold $\tau$ the bound of the theorem is $4e^2/(\tau^2-2\tau e+4e^2)$ with
# $e=\epsilon L_{\theta x}$: for small eps it grows with the square of eps. It is a bound; what do the gradients do?
# Here SGD starts at the minimiser, so that what is counted is noise and scattering, not the way down.

# %%
grid, threshold = np.geomspace(0.01, 0.25, 8), 0.3
growth = [(T, e, (z > threshold).mean()) for T in sgd_lengths for e, z in zip(grid, sgd_norms(grid, T, start=0.0))]
grown = pd.DataFrame(growth, columns=["T", "eps", "P"])
grown["bound"] = 4 * grown.eps**2 / (threshold**2 - 2 * threshold * grown.eps + 4 * grown.eps**2)
fig, ax = plt.subplots(figsize=(6, 3.6))
for i, (T, line) in enumerate(grown.groupby("T")):
    ax.loglog(line.eps, line.P.where(line.P > 0), "os^v"[i % 4] + "-", markersize=4, label=f"SGD, T = {T:,}")
ax.loglog(line.eps, line.bound, "k", label="bound of Theorem 2")
ax.set(xlabel="eps", ylabel=f"P( ||gradient|| > {threshold:g} )", ylim=(1e-4, 1.3))
ax.legend()
book.save(
    fig, "02_growth", grown, source=exact, seeds=[seed],
    caption=f"Chance of a gradient above a fixed threshold against eps, {sgd_runs} runs of SGD on the tight example "
    "(no point: never seen).",
)  # fmt: skip

# %%
tiny = np.array([1e-4, 1e-3]) / threshold
power = np.diff(np.log(4 * tiny**2 / (1 - 2 * tiny + 4 * tiny**2)))[0] / np.log(10)
rises = all(np.all(np.diff(line.P) >= 0) for _, line in grown.groupby("T"))
seen = grown[grown.P > 1e-4].assign(log_p=lambda t: np.log(t.P), log_eps=lambda t: np.log(t.eps))
steepness = [d.log_p.diff() / d.log_eps.diff() for _, d in seen.groupby("T")]
steepness = pd.concat(steepness).dropna()
book.claim(
    "At a fixed threshold large gradients become more frequent with eps, quadratically", section="3.2, Theorem 2",
    measured=f"the bound has slope {power:.3f} on log-log axes; the frequency of SGD "
    f"{'rises at every T' if rises else 'does not rise throughout'}, with slopes from {steepness.min():.1f} to "
    f"{steepness.max():.1f}: no fixed power",
    holds="partly" if rises and abs(power - 2) < 0.02 else False, n=f"{sgd_runs} runs x {len(grid)} eps", source=exact,
)  # fmt: skip

# %% [markdown]
# ## A network on real digits
#
# The same in LeNet: move the parameters by a small distance in a random direction, attack again, and see how far the
# gradient of the adversarial loss and the perturbations have moved. All eps are tried at the same networks (trained
# against a moderate attack that grows from nothing), so that only the attack differs; the networks differ in their
# activation. The random directions are filter-normalised, distances are relative to the norm of the parameters. Attack
# and gradients are in full precision here: at the smallest distance the changes are small.

# %%
digits = data.load(dataset)
x, y = digits.x_test[:num_images], digits.y_test[:num_images]
errors = {}


def network(activation, seed):
    config = TrainConfig(
        model="lenet", width=width, activation=activation, eps=train_eps, step_size=train_eps, num_steps=1,
        schedule="linear", epochs=train_epochs, batch_size=32, lr=3e-3, eval_every=train_epochs, seed=seed,
    )  # fmt: skip
    run = runs.run(config, digits.first(train_images))
    errors[activation, seed] = run.history.clean_error.iloc[-1]
    return run.model()


rows = []
for activation in activations:
    for s in network_seeds:
        model = network(activation, s)
        size = landscape.flat(model).norm()
        for e in network_eps:
            attack = partial(pgd, eps=e, step_size=e / 4, num_steps=10, random_start=False, precision="full")
            for k, v in enumerate(landscape.random_directions(model, num_directions, seed=s)):
                moved = landscape.scatter(model, v, size * torch.tensor(distances), x, y, attack)
                rows += [(activation, s, e, k, d, *values) for d, *values in zip(distances, *moved)]
columns = ["activation", "seed", "eps", "direction", "distance", "gradient", "fixed", "scattering", "cosine"]
network_table = pd.DataFrame(rows, columns=columns)
print("clean errors:", ", ".join(f"{a} {s}: {e:.2f}" for (a, s), e in errors.items()))

# %%
fig, axes = plt.subplots(2, len(activations), figsize=(12, 6), sharex=True, sharey="row", squeeze=False)
for ax, column, low in zip(axes, ["gradient", "cosine"], [0.0, 0.01]):
    for a, name in zip(ax, activations):
        part = network_table[(network_table.activation == name) & (network_table.eps >= low)]
        sns.lineplot(part, x="distance", y=column, hue="eps", style="eps", style_order=network_eps, ax=a,
                     palette="viridis", hue_norm=(0, max(network_eps)), markers=True, dashes=False,
                     errorbar=("pi", 100))  # fmt: skip
        a.set(xscale="log", title=name if column == "gradient" else None, xlabel="distance / ||θ||")
        a.get_legend().remove()
axes[0, 0].set(yscale="log", ylabel="||gradient difference||")
axes[1, 0].set_ylabel("cosine of perturbations")
fig.legend(*axes[0, 0].get_legend_handles_labels(), title="eps", loc="outside right center")
book.save(
    fig, "02_network", network_table, source=digits.source, seeds=network_seeds,
    caption=f"LeNet (width {width}) moved by a relative distance in random directions: change of the adversarial "
    "gradient (top) and cosine between the perturbations (bottom). Mean and range over "
    f"{len(network_seeds)} seeds x {num_directions} direction(s), {num_images} test digits.",
)  # fmt: skip

# %%
means = network_table.groupby(["activation", "eps", "distance"])[["gradient", "scattering", "cosine"]].mean()
near = means.xs(min(distances), level="distance")
mid = means.xs(distances[1], level="distance")
excess = near.gradient.unstack("eps")
increasing = (excess.diff(axis=1).iloc[:, 1:] > 0).all(axis=1)
falling = (mid.cosine.unstack("eps").dropna(axis=1).diff(axis=1).iloc[:, 1:] < 0).all(axis=1)


def verdict(by_activation):
    """None if some network has learnt nothing: then there is nothing to tell."""
    if max(errors.values()) > 0.5:
        return None
    return bool(by_activation.all()) or ("partly" if by_activation.any() else False)


spread = f"per activation {len(network_seeds)} seeds x {num_directions} random direction(s) x {num_images} digits"
book.claim(
    "In a network the gradients are more scattered the larger eps is", section="3.2, 4.2",
    measured=f"gradient change at distance {min(distances):g}, eps {min(network_eps):g} to {max(network_eps):g}: "
    + ", ".join(f"{a} {excess.loc[a].iloc[0]:.1e} to {excess.loc[a].iloc[-1]:.1e}" for a in activations),
    holds=verdict(increasing), n=spread, source=digits.source,
)  # fmt: skip
cosines = mid.cosine.unstack("eps").dropna(axis=1)
book.claim(
    "Perturbations at nearby parameters are less aligned the larger eps is", section="3.2, 4.2",
    measured=f"cosine at distance {distances[1]:g}, eps {cosines.columns[0]:g} to {cosines.columns[-1]:g}: "
    + ", ".join(f"{a} {cosines.loc[a].iloc[0]:.3f} to {cosines.loc[a].iloc[-1]:.3f}" for a in activations),
    holds=verdict(falling), n=spread, source=digits.source,
)  # fmt: skip
excess.round(5)

# %%
book.close()
