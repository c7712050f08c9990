"""Files of a run: checkpoints that are written whole and read without trust, JSON, the run folder
and its lock.

Skip this file when you read for a method.
"""

import io
import json
import math
import os
import platform
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from minilora.data import Refused, sha256, write_atomic
from minilora.processes import first, leader, wait

FORMATS = {"resume": 2}  # every other kind of checkpoint is of format 1
RETIRED = {"sample_every"}  # settings of earlier versions, which changed no result
HELD = []  # the lock of the run folder in use; the system drops it however the process ends


def _canonical(value):
    """A copy without shared objects: pickle would write two equal strings or dicts otherwise if
    they are one object."""
    if isinstance(value, dict):
        return {_canonical(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_canonical(v) for v in value)
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    return sys.intern(value) if type(value) is str else value


def save(path, content):
    """Write tensors and plain values atomically, in rank 0. Equal content gives equal bytes
    (torch.save to a path would store the file's name)."""
    if leader():
        buffer = io.BytesIO()
        torch.save(_canonical(content), buffer)
        write_atomic(path, buffer.getvalue())


def load(path, kind=None, of=None):
    """Read what `save` wrote, to the CPU. `Refused` if it is missing, cut, has a flipped bit, holds
    code, is not of `kind`, or its own 'of' says that it belongs elsewhere: files that changed
    places."""
    path = Path(path)
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    try:
        content = _read(path)
    except Refused:
        raise
    except Exception as error:  # zip and pickle errors come as many types, which all mean the same here
        reason = (str(error).splitlines() or [""])[0].split(". This file can")[0]
        raise Refused(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {reason})"
        ) from None
    if kind:
        _check_kind(path, content, kind)
    if of and content.get("of") != of:
        raise Refused(
            f"{path}: holds '{content.get('of')}', not '{of}'; it was changed, or made by another version"
        )
    return content


def _read(path):
    """The content of a checkpoint whose archive is as `save` leaves it."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        unpacked = sum(part.file_size for part in parts)
        if any(part.compress_type for part in parts) or unpacked > path.stat().st_size:
            raise Refused(
                f"{path}: not a checkpoint: its parts are compressed and may be larger than they look"
            )
        if any(part.external_attr for part in parts):
            # torch takes what is marked a folder for zeros, and says nothing.
            raise Refused(f"{path}: damaged in its table of contents")
        damaged = archive.testzip()  # torch.load checks no checksum
    if damaged:
        raise Refused(f"{path}: damaged at {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_kind(path, content, kind):
    """`Refused` unless the content says that it is of the kind, in the format that this version
    writes."""
    if not isinstance(content, dict):
        content = {"kind": type(content).__name__}
    same_kind = content.get("kind") == kind
    wanted = FORMATS.get(kind, 1)
    if same_kind and content.get("format") == wanted:
        return
    if same_kind and kind == "resume":
        raise Refused(
            f"{path}: a stopped training of another version of minilora (format {content.get('format')}; "
            f"this one reads {wanted}); go on with that version, or remove the file to train this part anew"
        )
    raise Refused(f"{path}: holds '{content.get('kind')}', not a '{kind}' of format {wanted}")


def write_json(path, value):
    """Write a value as JSON, atomically, in rank 0; NaN becomes null, since JSON has no NaN."""

    def clean(v):
        if isinstance(v, dict):
            return {k: clean(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [clean(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    if leader():
        write_atomic(path, json.dumps(clean(value), indent=1, allow_nan=False) + "\n")


def read_json(path, default=None):
    """The value of a JSON file, or `default` where there is none; `Refused` if it cannot be
    read."""
    if not Path(path).exists():
        return default
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: not readable as JSON ({error})") from None


def cached(path, kind, train):
    """The content of a pretraining's file, which train(last) makes where it does not exist yet: in
    rank 0 alone, while the others wait. `last` is the file in which an interrupted one keeps its
    state."""
    last = path.with_suffix(".last.pt")

    def content():
        if not path.exists():
            save(path, {"format": 1, "kind": kind, "of": path.stem} | train(last))
            last.unlink(missing_ok=True)
        return load(path, kind, path.stem)

    return first(content)


# ---- the run folder


def identity_of(cfg):
    """What config.json holds: all that a run's results depend on. Files stand there by name and
    content, not by place."""
    identity = {k: v for k, v in asdict(cfg).items() if k not in ("out", "resume", "device")}
    for key in ("data", "source"):
        path = identity[key]
        identity[key] = {"name": path.name, "sha256": sha256(path)} if path else None
    for key, file in (("judge", "model.pt"), ("replay", "metrics.json"), ("augment", "model.pt")):
        run = identity.get(key)
        if key == "augment":
            run = str(run or "").rpartition(":")[0]  # RUN:COUNT
        if run:
            identity[key] = {"run": identity[key], "sha256": sha256(Path(run) / file)}
    return json.loads(json.dumps(identity, default=str))


def open_run(cfg):
    """Make the run folder `cfg.out`, or go on in it; returns what config.json holds, the run's
    identity.

    `Refused` if the folder holds another configuration, or the same one and `cfg.resume` is off."""
    identity = identity_of(cfg)
    path = cfg.out / "config.json"
    if leader():
        hold(cfg.out)
    before = read_json(path)
    if before is not None and not isinstance(before, dict):
        raise Refused(f"{path}: not the configuration of a run")
    wait()  # before rank 0 writes what the others would find
    if before is None:
        write_json(path, identity)
        return identity
    keys = [k for k in {**identity, **before} if identity.get(k) != before.get(k)]
    keys = [k for k in keys if k not in RETIRED]
    if keys:
        differs = ", ".join(f"{k} {before.get(k)} there, {identity.get(k)} here" for k in keys[:3])
        raise Refused(
            f"{cfg.out} holds a run of another configuration ({differs}, says {path}); choose another --out"
        )
    if not cfg.resume:
        raise Refused(
            f"{cfg.out} holds this run already; go on with --resume, or choose another --out"
        )
    return identity


def hold(folder):
    """Lock a run folder until `release`; `Refused` with the process that holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        with lock:
            holder = lock.read().strip() or "another process"
        raise Refused(
            f"{folder}: in use by {holder}; wait until it ends, or choose another --out"
        ) from None
    except OSError:  # a file system without locks
        pass
    lock.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    lock.write(f"process {os.getpid()} on {platform.node()}, since {since}")
    lock.flush()
    HELD.append(lock)
    # Temporary files are left by a process that was killed while it wrote.
    for left in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        if left.is_file():
            left.unlink(missing_ok=True)


def release():
    """Give back the lock of the run folder."""
    while HELD:
        with HELD.pop() as lock:
            lock.truncate(0)


def finished(out, path, content, seconds):
    """Save what a job of the run folder `out` came to, with its time, and drop its resume state;
    returns the content as rank 0 has it, which decides for all."""
    write_json(out / "timings.json", read_json(out / "timings.json", {}) | seconds)
    wait()  # all have seen that the file does not exist
    save(path, content)
    if leader():
        (out / "last.pt").unlink(missing_ok=True)
    wait()
    return content if leader() else load(path)
