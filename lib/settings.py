"""Values that people write into parameters cells and profiles: taken as they are meant, or refused in one sentence."""

import json
import math

PLAIN = "write numbers plainly, such as 10000, 1.0e-4 or 8/255"


class SettingError(ValueError):
    """A value, name or cell of a person's that cannot be used. A notebook shows the sentence and no traceback."""

    def _render_traceback_(self):  # asked for by IPython
        return [f"{self}"]


def kind(value):
    """What people call the type of a value: number, text, list, ..."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str, tuple)):
        return type(value).__name__
    return {str: "text", tuple: "list"}.get(type(value), "number")


OWN = {"plan", "stops"}  # settings of a recipe that hold names of their own
FREE = {"images", "lr_drops"}  # lists in which a number may stand twice; of images null is all, at any place


def fit(where, value, like, name=""):
    """A value for a setting that is `like` in the notebook or recipe; text that is a number becomes one.

    Args:
        where: what the sentence begins with.
        name: the setting's own.
    Raises:
        SettingError: another type, a name that neither like nor the recipes have (at any depth), a name missing in
            an item of a list that all items of like fill, an empty list, a fraction where like has whole numbers,
            a number twice in a list where like has none twice.
    """
    if like is None:
        return value
    if kind(like) == "number" and isinstance(value, str):
        value = _number(where, value)
    if kind(value) != kind(like):
        hint = {"number": f"; {PLAIN}", "text": "; quote it: YAML reads off, no and on as truth values"}
        raise SettingError(f"{where} is {value!r}, but should be a {kind(like)}{hint.get(kind(like), '')}")
    if value != value:  # NaN
        raise SettingError(f"{where} is {value!r}, but should be a number; {PLAIN}")
    if isinstance(value, dict):
        from .recipes import KNOWN  # takes seconds: only where it is needed

        if unknown := [key for key in value if key not in like and (name in OWN or key not in KNOWN)]:
            raise SettingError(f"{where}: no name {unknown[0]!r}: there are {', '.join(map(str, like))}")
        return {key: fit(f"{where}: {key}", one, like.get(key), key) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        if like and not value:
            raise SettingError(f"{where} is empty")
        item = _item([one for one in like if one is not None])
        found = [None if one is None and (name == "images" or None in like) else fit(f"{where}, item {n}", one, item)
                 for n, one in enumerate(value, 1)]  # fmt: skip
        needed = [key for key in item if all(one.get(key) for one in like if one)] if isinstance(item, dict) else []
        for n, one in enumerate(found, 1):
            if missing := [key for key in needed if key not in one]:
                raise SettingError(f"{where}, item {n} has no {missing[0]!r}")
        alone = name not in FREE and kind(item) == "number" and len(set(like)) == len(like)
        if alone and len(set(found)) < len(found):
            raise SettingError(f"{where} has a number twice: {value!r}")
        return found
    if type(like) is int and isinstance(value, float):
        if not value.is_integer():
            raise SettingError(f"{where} is {value!r}, but should be a whole number")
        return int(value)
    return value


def exactly(where, value, like, name=""):
    """What `fit` gives. Raises SettingError, as it does, also for what only a profile may write: numbers as text."""
    found = fit(where, value, like, name)
    if _plain(found) != _plain(value):
        raise SettingError(f"{where} is {value!r}: write numbers without quotes")
    return found


def differing(where, values, known):
    """Names of a notebook's parameters that are not as they are known, in their order.

    Raises:
        SettingError: as `exactly`; a name that is new or gone. (`changes` are checked where recipes are.)
    """
    for name in sorted(set(values) ^ set(known)):
        raise SettingError(f"{where}: {name!r} is {'new' if name in values else 'gone'}; if that is meant: "
                           "./run_all.sh --python tools/profiles.py --define")  # fmt: skip
    names = [name for name in known if _plain(values[name]) != _plain(known[name])]
    for name in names:
        if name != "changes":
            exactly(f"{where}: {name}", values[name], known[name], name)
    return names


def _plain(value):
    """A value as JSON gives it back, where tuples are lists."""
    return json.loads(json.dumps(value, default=repr))


def _item(values):
    """What stands for any item of a list: all their names if they are dicts, None where they differ in kind."""
    if not values or len({kind(value) for value in values}) > 1:
        return None
    if isinstance(values[0], dict):
        return {key: _item([value[key] for value in values if key in value]) for value in values for key in value}
    if kind(values[0]) == "list":
        return [one for value in values for one in value]
    return next((value for value in values if isinstance(value, float)), values[0])  # whole numbers where all are


def _number(where, text):
    try:
        above, slash, below = text.partition("/")
        value = float(above) / float(below if slash else 1)
        if not math.isfinite(value):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise SettingError(f"{where} is {text!r}, but should be a number; {PLAIN}") from None
    return value
