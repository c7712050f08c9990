"""Files of a run: checkpoints that are written whole and read without trust, JSON, the run folder
and its lock.

Skip this file when you read for a method.
"""

import io
import json
import os
import platform
import sys
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from minilora.data import Refused, as_json, sha256, write_atomic
from minilora.processes import first, leader, wait
from minilora.words import TOKENIZER

FORMATS = {"resume": 2, "mora": 2, "selora": 2}  # every other kind of checkpoint is of format 1
# Kinds of which format 1 is read too, and the entries that it lacks: notes were cut otherwise then.
EARLIER = {"mora": ("prepared", "tokenizer"), "selora": ("prepared", "tokenizer")}
# Of a pretrained base in the layout of transformers, the weights: the first of these that is there.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
RETIRED = {"sample_every"}  # settings of earlier versions, which changed no result
# What a run's results depend on of another run that a setting names.
FILES = {"judge": "model.pt", "replay": "metrics.json", "augment": "model.pt"}
CONTROLS = ("random", "class", "own")  # whose images --augment can take without another run
HELD = []  # the lock of the run folder in use; the system drops it however the process ends

# What is read of a file of each kind. A type stands for itself (a float may be whole), a number for
# a whole number that is at least that, {str: x} for any names with x, [x] for a list of x, [x, y]
# for a list of these two, a tuple for alternatives. A name with "?" may be missing.
WEIGHTS = {str: torch.Tensor}
LAYERS = {str: {"A": torch.Tensor, "B": torch.Tensor, "scale": float}}
RANKS = {str: 0}
DATA = ({"name": str, "sha256": str}, str)
SCORES = {"macro_f1": float, "auroc": float, "accuracy": float, "without_positive?": 0}
TESTS = {str: SCORES | {"by_pattern": {str: {"n": 0, "accuracy": float}}, "probabilities": [[float]]}}
COUNTS = {"adapter_params": 0, "trainable_params": 0, "total_params": 0}
BRANCH = {
    "method": str,
    "seed": 0,
    "rank": 1,
    "state": WEIGHTS,
    "scales": {str: [[float], [float]]},
    "base_hash?": str,
}
ADAPTER = {
    "method": str,
    "rule": str,
    "seed": 0,
    "state": {str: (LAYERS[str], torch.Tensor)},
    "words": {"ids": torch.Tensor, "vectors": torch.Tensor},
    "base_hash": str,
}
MOMENTS = dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), torch.Tensor)
GROUP = dict.fromkeys(("lr", "initial_lr", "eps", "weight_decay"), float)
GROUP |= {"params": [0], "betas": [float, float]}
VIT = dict.fromkeys(("classes", "image_size", "channels", "patch", "width", "depth", "heads"), 1)
VIT |= {"buckets": 1, "positions": 1, "modalities": [str], "columns": {str: [0]}, "absent": str}
VIT |= {"eps?": float, "image_token?": bool, "vocabulary?": str}
DENOISER = dict.fromkeys(("latent", "size", "width", "heads", "buckets", "positions"), 1)
DENOISER |= {"text_width": 1, "text_depth": 0}
VAE = dict.fromkeys(("image_size", "channels", "latent", "factor", "width"), 1)
FORMS = {
    "mora": {
        "config": VIT,
        "base": WEIGHTS,
        "base_hash": str,
        "adapter": BRANCH,
        "patterns": [[0]],
        "class_names": [str],
        "multilabel": bool,
        "columns": {str: [str]},
        "data": DATA,
        "synthetic": bool,
        "synthetic_notes": bool,
        "fit?": str,
        "prepared": dict,
        "tokenizer": str,
        "source_images?": torch.Tensor,
    },
    "mora adapter": BRANCH | {"counts": COUNTS, "result": {"val": SCORES, "by_test": TESTS}},
    "selora": {
        "config": DENOISER,
        "base": WEIGHTS,
        "base_hash": str,
        "vae_config": VAE,
        "vae": WEIGHTS,
        "noisier": float,
        "targets": str,
        "capacity": 1,
        "adapter": ADAPTER,
        "data": DATA,
        "study?": str,
        "prepared": dict,
        "tokenizer": str,
        "synthetic": bool,
        "synthetic_notes": bool,
    },
    "selora adapter": ADAPTER
    | {
        "ranks": RANKS,
        "history": [[0, RANKS]],
        "result": {str: float},
        "trainable_params": 0,
        "adapter_params": 0,
        "word_params": 0,
    },
    "base": {"state": WEIGHTS, "readers": WEIGHTS},
    "vae": {"state": WEIGHTS},
    "denoiser": {"state": WEIGHTS},
    "resume": {
        "of": str,
        "step": 0,
        "state": WEIGHTS,
        "optimizer": {"state": {int: MOMENTS}, "param_groups": [GROUP]},
        "schedule": {"last_epoch": 0, "base_lrs": [float]},
        "seconds": float,
        "losses": torch.Tensor,
        "kept": {"history?": [[0, RANKS]]},
        "log": 0,
    },
}


def _canonical(value):
    """A copy without shared objects: pickle would write two equal strings or dicts otherwise if
    they are one object."""
    if isinstance(value, dict):
        return {_canonical(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_canonical(v) for v in value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        # torch saves the whole memory of a view; a copy of every weight would double a large model.
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        return value if whole else value.clone()
    return sys.intern(value) if type(value) is str else value


def save(path, content):
    """Write tensors and plain values atomically, in rank 0. Equal content gives equal bytes
    (torch.save to a path would store the file's name)."""
    if leader():
        buffer = io.BytesIO()
        torch.save(_canonical(content), buffer)
        write_atomic(path, buffer.getbuffer())


def link(path, kept):
    """Give a finished file a second name, in rank 0: one copy on the disk, where it can."""
    if leader():
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, kept)
        except OSError:  # a file system without links
            write_atomic(kept, path.read_bytes())


def drop_weights(path):
    """Keep of an adapter's file all but its weights, in rank 0."""
    if leader():
        content = load(path)
        if content["state"]:
            save(path, content | {"state": {}})


def load(path, kind=None, of=None):
    """Read what `save` wrote, to the CPU. `Refused` if it is missing, cut, has a flipped bit, holds
    code, is not of `kind`, lacks an entry of that kind or has another type there, or its own 'of'
    says that it belongs elsewhere: files that changed places."""
    path = Path(path)
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    try:
        content = read_archive(path)
    except Refused:
        raise
    except Exception as error:  # zip and pickle errors come as many types, which all mean the same here
        reason = (str(error).splitlines() or [""])[0].split(". This file can")[0]
        raise Refused(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {reason})"
        ) from None
    if kind:
        _check_kind(path, content, kind)
        form = FORMS.get(kind, dict)
        if kind in EARLIER and content["format"] == 1:
            form = {key: value for key, value in form.items() if key not in EARLIER[kind]}
        check_form(path, content, form)
    if of and content.get("of") != of:
        raise Refused(
            f"{path}: holds '{content.get('of')}', not '{of}'; it was changed, or made by another version"
        )
    return content


def read_archive(path):
    """The content of a file of torch whose archive is as torch leaves it: nothing in it is run."""
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
    readable = (1, wanted) if kind in EARLIER else (wanted,)
    if same_kind and content.get("format") in readable:
        return
    if same_kind and kind == "resume":
        raise Refused(
            f"{path}: a stopped training of another version of minilora (format {content.get('format')}; "
            f"this one reads {wanted}); go on with that version, or remove the file to train this part again"
        )
    raise Refused(f"{path}: holds '{content.get('kind')}', not a '{kind}' of format {wanted}")


def check_form(place, value, form):
    """`Refused` with the place, a file, and the first entry of a value that has not its form."""
    for text in misfits(value, form, ""):
        text = text.replace("'.", "'", 1)
        raise Refused(f"{place}: entry {text}; the file was changed, or is of another version")


def misfits(value, form, entry):
    """For each entry of a value that has not its form, see `FORMS`: its name, what it is, what it
    has to be."""
    if isinstance(form, tuple):
        texts = [list(misfits(value, each, entry)) for each in form]
        if all(texts):
            yield texts[0][0]
    elif isinstance(form, dict) and isinstance(value, dict):
        kind = next(iter(form))
        if isinstance(kind, type):
            for name, part in value.items():
                if type(name) is not kind:
                    yield f"'{entry}' has the name {described(name)}; must be {needed(kind)}"
                yield from misfits(part, form[kind], f"{entry}.{name}")
            return
        for name, each in form.items():
            key = name.rstrip("?")
            if key in value:
                yield from misfits(value[key], each, f"{entry}.{key}")
            elif key == name:
                yield f"'{entry}.{key}' is missing"
    elif isinstance(form, list) and isinstance(value, (list, tuple)) and len(form) in (1, len(value)):
        forms = form * len(value) if len(form) == 1 else form
        for i, (part, each) in enumerate(zip(value, forms)):
            yield from misfits(part, each, f"{entry}.{i}")
    elif not fits(value, form):
        yield f"'{entry}' is {described(value)}; must be {needed(form)}"


def fits(value, form):
    """Whether a value has a form that has no parts."""
    if isinstance(form, (dict, list)):
        return False
    if isinstance(form, int):
        return type(value) is int and value >= form
    return isinstance(value, form) or (form is float and type(value) is int)


def needed(form):
    """A form in words."""
    if isinstance(form, int):
        return f"a whole number of at least {form}"
    if isinstance(form, list) and len(form) > 1:
        return f"a list of {len(form)}"
    return f"a {(form if isinstance(form, type) else type(form)).__name__}"


def described(value):
    """A value in a few characters."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r:.40}"


def check_weights(place, weights, expected):
    """`Refused` unless weights {name: tensor} have exactly the names, shapes and types of the
    expected ones, and are finite; `place`: the file and the entry."""
    alien = sorted(weights.keys() - expected.keys())
    missing = sorted(expected.keys() - weights.keys())
    if alien or missing:
        fault = f"weight '{alien[0]}' fits nothing" if alien else f"weight '{missing[0]}' is missing"
        names = ", ".join(missing[:3]) or "no other"
        raise Refused(f"{place}: {fault}; expected here: {names} (of {len(expected)} weights)")
    for name, like in expected.items():
        if weights[name].shape != like.shape or weights[name].dtype != like.dtype:
            raise Refused(
                f"{place}: weight '{name}' is {described(weights[name])}; must be {described(like)}"
            )
        if not weights[name].isfinite().all():
            raise Refused(f"{place}: weight '{name}' holds numbers that are not finite")


def trained_state(model):
    """What a stopped training keeps of its model: what trains, and all buffers."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def check_resume(path, saved, model, optimizer):
    """`Refused` unless the saved state of a training fits the model and the optimizer that are to
    go on with it."""
    check_weights(f"{path}: entry 'state'", saved["state"], trained_state(model))
    moments = saved["optimizer"]["state"]
    groups = [group["params"] for group in saved["optimizer"]["param_groups"]]
    own = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = saved["schedule"]
    steps = {saved["step"], saved["losses"].numel(), schedule["last_epoch"]}
    same = groups == own and len(schedule["base_lrs"]) == len(own) and len(steps) == 1
    if not same or not moments.keys() <= {*range(len(parameters))}:
        raise Refused(f"{path}: its optimizer, schedule or losses are those of another training")
    for i, each in moments.items():
        like = {"step": torch.zeros(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
        check_weights(f"{path}: entry 'optimizer.state.{i}'", each, like)


def write_json(path, value):
    """Write a value as JSON, atomically, in rank 0; NaN becomes null, since JSON has no NaN."""
    if leader():
        write_atomic(path, json.dumps(as_json(value), indent=1, allow_nan=False) + "\n")


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
    identity["splits"] = 2  # 1: each seed had validation rows of its own
    if identity["data"] or identity["source"]:
        identity["tokenizer"] = TOKENIZER  # another way to cut notes gives words other ids
    for key in ("data", "source"):
        path = identity[key]
        identity[key] = {"name": path.name, "sha256": sha256(path)} if path else None
    if identity.get("base"):
        folder = identity["base"]
        names = ("config.json", *WEIGHT_FILES, "vocab.txt")
        hashes = {name: sha256(folder / name) for name in names if (folder / name).is_file()}
        identity["base"] = {"name": folder.name, "sha256": hashes}
    if identity.get("table"):
        run = identity["table"]
        missing = read_json(run / "config.json")["missing"]
        names = [f"split-s{seed}.npz" for seed in range(cfg.seeds)]
        hashes = {name: sha256(run / name) for name in names}
        identity["table"] = {"run": run, "missing": missing, "sha256": hashes}
    for key, file in FILES.items():
        run = identity.get(key)
        if key == "augment":
            run = str(run or "").rpartition(":")[0]  # RUN:COUNT
            run = "" if run in CONTROLS else run
        if run and key == "augment":  # each seed draws with an adapter of its own
            hashes = {file: sha256(Path(run) / file)}
            for seed in range(cfg.seeds):
                for path in sorted(Path(run).glob(f"adapters/*-s{seed}.pt")):
                    hashes[path.name] = sha256(path)
            identity[key] = {"run": identity[key], "sha256": hashes}
        elif run:
            identity[key] = {"run": identity[key], "sha256": sha256(Path(run) / file)}
    return json.loads(json.dumps(identity, default=str))


def open_run(cfg):
    """Make the run folder `cfg.out`, or go on in it; returns what config.json holds, the run's
    identity. A run may go on with more seeds than it had.

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
    seeds = before.get("seeds")
    more = type(seeds) is int and 0 < seeds < cfg.seeds
    same = identity_of(replace(cfg, seeds=seeds)) if more else identity  # with the seeds that it had
    keys = [k for k in {**same, **before} if same.get(k) != before.get(k) and k not in RETIRED]
    if keys:
        keys += ["seeds"] * more
        differs = ", ".join(change(k, before.get(k), identity.get(k)) for k in keys[:3])
        raise Refused(
            f"{cfg.out} holds a run of another configuration ({differs}; see {path}); choose another --out"
        )
    if not cfg.resume:
        raise Refused(
            f"{cfg.out} holds this run already; go on with --resume, or choose another --out"
        )
    wait()  # all have read what rank 0 writes anew
    if more:
        if leader():  # the results of fewer seeds go first
            (cfg.out / "metrics.json").unlink(missing_ok=True)
        write_json(path, identity)
    return identity


def change(key, before, now):
    """How a setting was changed, in words: of a file that has another hash, its name."""
    values = []
    for value in (before, now):
        if isinstance(value, dict):
            value = " ".join(str(part) for name, part in value.items() if name != "sha256")
        values.append(value)
    if values[0] != values[1] or not isinstance(before, dict):
        return f"{key} {values[0]} there, {values[1]} here"
    hashes = [value.get("sha256") for value in (before, now)]
    file = FILES.get(key, "")
    if all(isinstance(each, dict) for each in hashes):
        there, here = hashes
        file = next((name for name in here | there if there.get(name) != here.get(name)), "")
    return f"{key} {values[0]}: {file or 'the file'} has changed"


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
