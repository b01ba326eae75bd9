"""Files that are either whole or not there: everything is written beside its place first and then moved into it."""

import hashlib
import json
import os
import secrets
import subprocess
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from .settings import SettingError

ROOT = Path(__file__).resolve().parents[1]  # of this checkout


def folder_from_environment(name, default):
    """The folder that the variable `name` gives, with ~ and ~user as a shell expands them; default if unset or empty.

    Raises SettingError for the home folder of a user who does not exist.
    """
    folder = os.path.expanduser(os.environ.get(name) or default)
    if folder.startswith("~"):
        raise SettingError(f"{name}={folder}: there is no such home folder (a folder called so is ./{folder})")
    return Path(folder)


def as_path(path):
    """The path that someone has typed: ~ at its beginning is the home folder, as it is to a shell."""
    return Path(os.path.expanduser(path))


def git(folder, *arguments):
    """What git says of the repository that a folder is in, whichever one GIT_DIR and the like name.

    Raises OSError where there is no git, CalledProcessError where it refuses.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG")}
    command = ["git", "-C", folder, *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True, env=env).stdout


def write_bytes(path, content):
    """Write content (bytes) to path in one step; its folder is made.

    Raises OSError naming the path (a full disk, say); what stood there before is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb", opener=partial(os.open, mode=0o644)) as file:  # some disks refuse to change a mode
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} was not written ({error.strerror}); the old file stands, if any") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def locked(path, variable, wait=True):
    """Hold the lock of this name, in a folder that the environment's `variable` gives; it is made.

    Raises filelock.Timeout where another process holds it and not `wait`, OSError naming folder and variable where
    there can be none: no right to write, or a disk that refuses locks.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path).acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise
    except OSError as error:
        why = f"{Path(path).parent} takes no files or no locks ({error.strerror})"
        raise OSError(error.errno, f"{why}: set {variable} to a folder on another disk, or make it writable") from error
    with lock:
        yield


def as_json(value):
    """A value as JSON gives it back: keys are texts, tuples lists, numpy's numbers and arrays numbers and lists.

    Raises ValueError for NaN and for keys that are one text (1 and "1"), TypeError for what JSON cannot hold.
    """

    def plain(one):
        if hasattr(one, "tolist"):
            return one.tolist()
        raise TypeError(f"{type(one).__name__} cannot be written as JSON: {one!r:.100}")

    def once(pairs):
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError(f"two keys are one text in JSON: {[key for key, _ in pairs]!r:.100}")
        return found

    return json.loads(json.dumps(value, allow_nan=False, default=plain), object_pairs_hook=once)


def write_json(path, value):
    """Write value as JSON with sorted keys: equal values give equal bytes (see `as_json`).

    A dict gets a checksum beside its keys, which `read_json` compares and takes out again.
    """
    value = as_json(value)
    if isinstance(value, dict):
        value.pop("checksum", None)  # of the file that it was read from by other means
        value["checksum"] = checksum(value)
    write_bytes(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def read_json(path):
    """The value in a JSON file. Raises ValueError naming the file if it is truncated or corrupted."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(value, dict) and "checksum" in value and value.pop("checksum") != checksum(value):
            raise ValueError("its checksum is wrong")
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or corrupted: delete it and run again ({error})") from error


def read_if_whole(path):
    """The dict in a JSON file; an empty one where it is missing or corrupted, so that it is made again."""
    try:
        return value if isinstance(value := read_json(path), dict) else {}
    except (OSError, ValueError):
        return {}


def checksum(value):
    """Hash of a JSON value (see `as_json`), 16 hexadecimal digits: equal values have equal ones."""
    return hashlib.sha256(json.dumps(as_json(value), sort_keys=True).encode()).hexdigest()[:16]
