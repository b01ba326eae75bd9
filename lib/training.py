"""Adversarial training with a budget schedule: one run is one folder, and a killed run goes on where it was.

The loop is the paper's (Section 5): for each mini-batch the attack maximises the loss inside the ball of the current
budget, in evaluation mode, and one optimiser step follows at the attacked inputs. The step size of the attack scales
with the budget. Everything random in an epoch comes from one generator seeded by (seed, epoch), so a run that is cut
off and resumed ends in the same bits as one that is not.
"""

import hashlib
import json
import math
import warnings
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from . import models, schedules
from .attacks import begin, pgd
from .captured import Captured, loss_at, measured
from .certify import worst_margins
from .checks import NORMS, STARTS, check_choice, check_count, check_eps
from .compute import clock, device, exact_products, made
from .differentiate import differentiating
from .evaluation import evaluate, in_batches, predict
from .fast import channels_last
from .files import as_json, as_path, read_json, write_bytes, write_json

# What a run of a config means. Raised by hand when training changes its meaning, so that runs made before are left
# alone; tests/test_training.py notices when it should be.
VERSION = 1
STEP_COLUMNS = ("eps", "loss", "robust_error", "gradient_norm")
MODEL = "model-{}.safetensors"  # of the epoch after which it was kept
WHOLE = {"run.json": {"config", "history", "steps"}, "made.json": {"device", "date"}}  # what they hold at least


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides a run, apart from the data. Errors are raised at once, not after an hour.

    model, width, activation: see `models`.
    objective: what the loss is taken of. "attack": attacked inputs. "interval": clean inputs, with weight kappa, and
        the worst margins of `certify`, with weight 1 - kappa; kappa falls from 1 to 1/2 as the budget rises from 0 to
        eps (Gowal et al. 2018, arXiv:1810.12715), and the attack serves the evaluation only.
    eps, norm, step_size, num_steps, start: the attack at the full budget (`attacks.pgd`, whose random_start is
        `start`); step_size scales with the current budget. eps=0 is ordinary training; num_steps=1 with step_size
        1.25 eps is fast adversarial training (Wong et al. 2020, arXiv:2001.03994).
    schedule, schedule_start, schedule_stop: the budget over epochs (`schedules.by_name`); it rises over the whole
        period towards schedule_stop and is clipped at eps.
    restarts: epochs at which a new period begins: budget and learning rate start again, the optimiser's state does
        not, as in the paper's code. Each period's end is kept.
    keep_every: the model is also kept after each such number of epochs (0: not).
    optimizer: "adam" or "sgd" (then with momentum); lr, weight_decay as in torch.optim.
    lr_drops: the learning rate falls tenfold at these fractions of each period.
    augment: random crops from a border of 4 pixels, and flips.
    eval_every, eval_images: errors on the first test images, after each such number of epochs (and the last).
    """

    model: str = "lenet"
    width: int = 16
    activation: str = "relu"
    objective: str = "attack"
    eps: float
    norm: str = "linf"
    step_size: float
    num_steps: int
    start: bool | str = True
    schedule: str = "constant"
    schedule_start: float = 0.0
    schedule_stop: float | None = None
    restarts: tuple = ()
    keep_every: int = 0
    epochs: int
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_drops: tuple = ()
    augment: bool = False
    eval_every: int = 1
    eval_images: int = 1000
    seed: int = 0

    def __post_init__(self):
        for field in fields(self):
            value = _plain(field.name, getattr(self, field.name))
            if field.type is tuple and not isinstance(value, tuple):
                raise ValueError(f"{field.name} must be a list, got {value!r}")
            whole = type(value) is int and field.type in (float, float | None)  # 1 names the run that 1.0 names
            object.__setattr__(self, field.name, float(value) if whole else value)
        for name, choices in (("norm", NORMS), ("objective", ("attack", "interval")), ("optimizer", OPTIMIZERS)):
            check_choice(name, getattr(self, name), choices)
        check_choice("random_start", self.start, STARTS)
        object.__setattr__(self, "start", bool(self.start) if type(self.start) is int else self.start)  # as for 1
        for name in ("eps", "step_size", "momentum", "weight_decay"):
            check_eps(getattr(self, name), name=name, norm=self.norm if name in ("eps", "step_size") else "l2")
        if self.objective == "interval" and self.model != "lenet":
            raise ValueError(f"interval training is for lenet: batch normalisation mixes the inputs of {self.model}")
        if self.objective == "interval" and (self.norm != "linf" or self.eps == 0):
            raise ValueError(f"interval training is for a linf ball of eps > 0, got {self.norm} and eps {self.eps}")
        for name in ("epochs", "batch_size", "eval_every", "eval_images", "num_steps", "width", "keep_every", "seed"):
            check_count(0 if name in ("keep_every", "seed") else 1, **{name: getattr(self, name)})
        if self.seed > 2**40:
            raise ValueError(f"seed must be at most 2**40, got {self.seed}: each epoch draws from a seed of its own")
        if type(self.lr) is not float or not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number, got {self.lr!r}")
        if not isinstance(self.augment, bool):
            raise ValueError(f"augment must be True or False, got {self.augment!r}")
        if not all(isinstance(drop, float) and 0 < drop < 1 for drop in self.lr_drops):
            raise ValueError(f"lr_drops must be numbers between 0 and 1, the ends of a period, got {self.lr_drops}")
        if not all(type(r) is int for r in self.restarts):
            raise ValueError(f"restarts must be whole epochs, got {self.restarts}")
        if self.restarts and self.restarts[-1] >= self.epochs:
            raise ValueError(f"the last restart, {self.restarts[-1]}, is not before the end, {self.epochs}")
        last = self.budget()(self.epochs)
        if not math.isclose(last, self.eps):
            warnings.warn(f"the budget ends at {last:.4g}, but the evaluation is at eps {self.eps:.4g}", stacklevel=3)
        with torch.device("meta"):  # a dry run of the builder: its errors belong here too
            models.build(self.model, seed=0, **self.model_settings())

    def model_settings(self, **more):
        return {"width": self.width, "activation": self.activation, **more}

    @property
    def kept(self):
        """The epochs after which the model is kept, in order: 0, each period's end, by keep_every, and the last."""
        return sorted({*range(0, self.epochs, self.keep_every or self.epochs), *self.restarts, self.epochs})

    def period(self, epoch):
        """Beginning and end, in epochs, of the period that an epoch, which may be fractional, lies in."""
        edges = [*schedules.check_restarts(self.restarts), self.epochs]
        return next((a, b) for a, b in pairwise(edges) if epoch < b or b == self.epochs)

    def budget(self):
        """The budget as a function of the epoch."""
        parts = [
            schedules.by_name(self.schedule, self.eps, start=self.schedule_start, stop=self.schedule_stop,
                              epochs=self.period(begin)[1] - begin, norm=self.norm)
            for begin in schedules.check_restarts(self.restarts)
        ]  # fmt: skip
        return schedules.periodic(parts, self.restarts)

    def learning_rate(self, epoch):
        """The learning rate at an epoch, which may be fractional."""
        begin, end = self.period(epoch)
        # 0.1 * 30 epochs is more than 3 in floating point, and the rate would fall a step late.
        return self.lr * 0.1 ** sum(epoch - begin >= drop * (end - begin) - 1e-9 for drop in self.lr_drops)

    def describe(self):
        """A few words, for progress lines and lists."""
        again = f", again at {', '.join(map(str, self.restarts))}" if self.restarts else ""
        rate = f"{self.optimizer} {self.lr:g}"
        return f"{self.model} w={self.width} eps={self.eps:.3g} {self.schedule}{again}, {rate}, seed {self.seed}"


def _plain(name, value):
    """A setting as plain Python has it: numpy's numbers, 0.1 + 0.2 and lists name the run that 0.3 and tuples name."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(name, v) for v in value)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, np.generic):  # a float32 by its own digits, as people write it
        value = float(str(value)) if isinstance(value, np.floating) else value.item()
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.12g}")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"{name} must be a number, a text or a list of them, got {value!r}")


OPTIMIZERS = {
    "adam": lambda p, c: torch.optim.Adam(p, lr=c.lr, weight_decay=c.weight_decay),
    "sgd": lambda p, c: torch.optim.SGD(p, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay),
}


@dataclass(frozen=True)
class Run:
    """A finished run: config, `history` (a row per evaluated epoch), `steps` (a row per mini-batch), `made` (where)."""

    config: TrainConfig
    folder: Path
    history: pd.DataFrame
    steps: pd.DataFrame
    made: dict

    def __repr__(self):
        return f"Run({self.config.describe()}, {len(self.history)} evaluations, {len(self.steps)} steps)"

    @property
    def last_loss(self):
        """The mean loss of the mini-batches of the last epoch."""
        return self.steps.loss[-(len(self.steps) // self.config.epochs) :].mean()

    def model(self, epoch=None):
        """The model after the given number of epochs (the end when None; else one that was kept), on the CPU.

        Raises ValueError for an epoch that was not kept, a corrupted checkpoint or one of another architecture.
        """
        path = self.folder / MODEL.format(self.config.epochs if epoch is None else epoch)
        if not path.exists():
            kept = sorted(p.stem for p in self.folder.glob(MODEL.format("*")))
            raise ValueError(f"the run kept no model after epoch {epoch}: it has {', '.join(kept)}; see keep_every")
        tensors, about = _load(path)
        model = models.build(self.config.model, seed=0, **about["model"])
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{path} holds another architecture than {self.config.model} {about['model']}") from error
        return model.eval()


@differentiating()
@exact_products()
def train(config, data, *, folder, quiet=False):
    """Train by the config, or go on with a run that was cut off, or read a finished one.

    Args:
        config: TrainConfig.
        data: data.Data.
        folder: the run's own folder; made if missing. Holds checkpoint.safetensors while it runs (replaced after each
            epoch, in one step), model-<epoch>.safetensors for the epochs of `config.kept`, made.json and run.json.
        quiet: no line of progress.
    Returns:
        Run. Same config, data, machine and thread count: same weights, bit for bit.
    Raises:
        ValueError: a loss that is not finite (the run diverged), a corrupted file that cannot be made again, or a
            folder that belongs to another config.
    """
    folder = as_path(folder)
    if (folder / "run.json").exists():
        return read(folder, config, data)
    state = _State(config, data)
    start = clock()
    if (folder / "checkpoint.safetensors").exists():
        state.restore(folder / "checkpoint.safetensors")
    else:
        state.keep(folder)
    bar = {"desc": config.describe(), "initial": state.epoch, "total": config.epochs, "leave": False, "mininterval": 1}
    for _ in tqdm(range(state.epoch, config.epochs), **bar, disable=quiet):
        try:
            state.train_epoch()
        except ValueError as error:
            raise ValueError(f"training failed in epoch {state.epoch}, {config.describe()}: {error}") from error
        if state.epoch in config.kept:
            state.keep(folder)
        state.seconds += clock() - start
        start = clock()
        state.save(folder / "checkpoint.safetensors")
    write_json(folder / "made.json", made(state.seconds))
    found = {"data": data.source, "history": state.history, "steps": state.steps}
    write_json(folder / "run.json", state.asked | found)
    (folder / "checkpoint.safetensors").unlink()
    return read(folder, config, data)


def read(folder, config, data=None):
    """The finished run in a folder. Raises ValueError if its record is corrupted, or of another config or data."""
    record = read_json(folder / "run.json")
    _check_same(folder, record, config, data)
    steps = pd.DataFrame(record["steps"], columns=STEP_COLUMNS)
    return Run(config, folder, pd.DataFrame(record["history"]), steps, read_json(folder / "made.json"))


def _check_same(folder, record, config, data):
    """Raise ValueError unless a record is of this config, meaning and pixels. An older one says nothing of a setting
    that came later, which then had its default, of its version (1) or of its pixels."""
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    if as_json(defaults | record["config"]) != as_json(asdict(config)):
        raise ValueError(f"{folder} holds a run of another config: choose another folder")
    if record.get("version", 1) != VERSION:
        raise ValueError(f"{folder} holds a run of version {record['version']}, not {VERSION}: choose another folder")
    if data is not None and record.get("pixels", data.fingerprint) != data.fingerprint:
        raise ValueError(f"{folder} holds a run on other data: choose another folder")


def damage(folder, config):
    """What is wrong with the files of a finished run, in words; None where all can be read, or it is not finished."""
    if not (folder / "run.json").exists():
        return None
    for path in map(folder.joinpath, (*WHOLE, *map(MODEL.format, config.kept))):
        try:
            found = read_json(path) if path.name in WHOLE else _load(path)
            if path.name in WHOLE and not (isinstance(found, dict) and WHOLE[path.name] <= found.keys()):
                return f"{path.name} is not whole"
        except FileNotFoundError:
            return f"{path.name} is missing"
        except ValueError as error:
            return f"{path.name} is truncated or corrupted, {error.__cause__}"
    return None


class _State:
    """Everything that changes during a run."""

    KEPT = ("epoch", "history", "steps", "seconds")  # in a checkpoint, beside model and optimizer

    def __init__(self, config, data):
        self.config, self.data, self.device = config, data, device()
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
            in_batches(x, y, config.batch_size)  # for what it refuses at once; no batch is made yet
            if y.min() < 0:
                raise ValueError(f"labels run from {y.min()}, below 0")
        shape, shown = data.x_train.shape, data.x_test.shape
        if shape[1:] != shown[1:]:
            raise ValueError(f"training images are {tuple(shape[1:])}, test images {tuple(shown[1:])} ({data.source})")
        self.model_settings = config.model_settings(in_channels=shape[1], num_classes=data.num_classes)
        if config.model == "lenet":
            self.model_settings["image_size"] = shape[2]
        model = models.build(config.model, seed=config.seed, **self.model_settings)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.x, self.y = data.x_train.to(self.device), data.y_train.to(self.device)
        self.test = [t[: config.eval_images].to(self.device) for t in (data.x_test, data.y_test)]
        self.budget = config.budget()
        self.asked = {"config": asdict(config), "version": VERSION, "pixels": data.fingerprint}  # for files
        self.epoch, self.history, self.steps, self.seconds = 0, [], [], 0.0
        self.optimizer = OPTIMIZERS[config.optimizer](self.model.parameters(), config)
        self.captured = Captured(self.model, config.num_steps) if capturable(config, self.device) else None
        try:
            predict(self.model, self.test[0][:1])
        except (ValueError, RuntimeError) as error:
            size = "x".join(map(str, shape[1:]))
            raise ValueError(f"{config.model} cannot take images of {size} ({data.source}): {error}") from error

    def train_epoch(self):
        config = self.config
        generator = torch.Generator(self.device).manual_seed(1_000_003 * config.seed + self.epoch)
        order = torch.randperm(len(self.y), generator=generator, device=self.device)
        batches = order.split(config.batch_size)
        if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation needs more than one
            batches = (*batches[:-2], torch.cat(batches[-2:]))
        self.model.train()
        budgets, found = [], []
        for i, batch in enumerate(batches):
            x, y = self.x[batch], self.y[batch]
            if config.augment:
                x = augment(x, generator)
            now = self.epoch + i / len(batches)
            budgets.append(self.budget(now))
            lr = self.optimizer.param_groups[0]["lr"] = config.learning_rate(now)
            found.append(self.step(x, y, budgets[-1], generator))
            if self.device.type == "cpu" or i == len(batches) - 1:  # what a GPU does is read once an epoch
                self.note(budgets, found)
        self.epoch += 1
        if self.epoch % config.eval_every == 0 or self.epoch == config.epochs:
            errors = evaluate(self.model, *self.test, eps=config.eps, step_size=config.step_size, norm=config.norm,
                              num_steps=config.num_steps, seed=config.seed, batch_size=config.batch_size)  # fmt: skip
            self.history.append({"epoch": self.epoch, "eps": self.budget(self.epoch), "lr": lr, **errors})

    def note(self, budgets, found):
        """Move what is known of the latest mini-batches to the run's record. Raises ValueError if one diverged."""
        for eps, (loss, wrong, norm) in zip(budgets, torch.stack(found).tolist(), strict=True):
            if not math.isfinite(loss + norm):
                raise ValueError(f"it diverged: loss {loss}, gradient norm {norm}")
            self.steps.append([eps, loss, wrong, norm])
        budgets.clear(), found.clear()

    def step(self, x, y, eps, generator):
        """One mini-batch: worst case, gradient, update. Returns loss, robust error and gradient norm, a tensor.

        Under interval training the robust error is the share of inputs that are not proved robust.
        """
        config = self.config
        if self.captured:
            start, step_size = config.start if eps else False, config.step_size * eps / config.eps
            x_adv, limits = begin(x.contiguous(), eps, step_size, config.norm, start, generator)
            found = self.captured(x_adv, y, *limits, step_size)
        else:
            loss, logits = (self.interval if config.objective == "interval" else self.attack)(x, y, eps, generator)
            self.optimizer.zero_grad()
            loss.backward()
            found = measured(self.model, loss, logits, y)
        self.optimizer.step()
        return found

    def attack(self, x, y, eps, generator):
        """The loss at attacked inputs, and the logits there."""
        c = self.config
        if eps > 0:
            x = pgd(self.model, x, y, eps=eps, step_size=c.step_size * eps / c.eps, norm=c.norm, num_steps=c.num_steps,
                    random_start=c.start, generator=generator)  # fmt: skip
        return loss_at(self.model, x, y)

    def interval(self, x, y, eps, _generator):
        """The loss at clean inputs mixed with that of the worst margins, and these margins."""
        kappa = 1 - eps / (2 * self.config.eps)
        worst = worst_margins(self.model, channels_last(x), y, eps=eps)
        return kappa * loss_at(self.model, x, y)[0] + (1 - kappa) * F.cross_entropy(worst, y), worst

    def keep(self, folder):
        """Keep the model of this moment for good."""
        _save(folder / MODEL.format(self.epoch), self.model.state_dict(), {"model": self.model_settings})

    def save(self, path):
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items() if v is not None}
        _save(path, tensors, self.asked | {name: getattr(self, name) for name in self.KEPT})

    def restore(self, path):
        try:
            tensors, about = _load(path)
        except ValueError as error:
            warnings.warn(f"{error}: the run begins again", stacklevel=3)
            return
        _check_same(path.parent, about, self.config, self.data)
        for name in self.KEPT:
            setattr(self, name, about[name])
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        state = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def capturable(config, where):
    """Whether a step of this training can be captured there: not l2 (its projection uses eps), and not bounds."""
    return where.type != "cpu" and config.eps > 0 and config.norm == "linf" and config.objective == "attack"


def augment(x, generator, border=4):
    """Random crop out of a border of black pixels, and a horizontal flip for one image in two: x (B, C, H, W)."""
    b, _, h, w = x.shape
    top, left = torch.randint(2 * border + 1, (2, b, 1), generator=generator, device=x.device)
    flip = torch.rand(b, 1, generator=generator, device=x.device, dtype=torch.float32) < 0.5
    columns = torch.arange(w, device=x.device)
    columns = torch.where(flip, columns.flip(0), columns) + left
    rows = torch.arange(h, device=x.device) + top
    images = torch.arange(b, device=x.device)[:, None, None]
    return F.pad(x, [border] * 4).permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _save(path, tensors, about):
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    text = json.dumps(about, sort_keys=True)
    # The format has no checksum; one key, because the order of several is not fixed.
    write_bytes(path, save(tensors, metadata={"about": f"{_sha256(tensors, text)} {text}"}))


def _sha256(tensors, text):
    h = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].numpy().tobytes())
    return h.hexdigest()


def _load(path):
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            digest, text = file.metadata()["about"].split(" ", 1)
        if digest != _sha256(tensors, text):
            raise ValueError("its checksum is wrong")
        return tensors, json.loads(text)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is truncated or corrupted: delete its folder and run again ({error})") from error
