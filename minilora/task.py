"""The tasks that the two scripts adapt to: the studies, and for train_mora.py splits, missing
tables, and the tensors of a seed.

`cfg` is the configuration of the script. Skip this file when you read for a method.

Letters: N samples, M modalities, C classes, F numeric columns.
"""

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from minilora import checkpoint, data, diffusion, metrics
from minilora.baselines import scores_of
from minilora.checkpoint import CONTROLS
from minilora.data import Refused
from minilora.models import check_base, check_entries, count, image_digests
from minilora.models import kept_weights, load_selora, make_vit, note_encoder, ranks_in
from minilora.models import without_head
from minilora.pretrained import read_config, read_vilt, read_vocabulary
from minilora.mora import METHODS, attach, gates
from minilora.phantoms import phantoms
from minilora.words import TOKENIZER, buckets_for, positions_for, tokenize, word_id

# ---- settings with a syntax of their own

# Settings that have no use with --base.
OF_THE_BASE = ("source", "pretrain_steps", "preset", "patch", "width", "depth", "heads", "buckets",
               "positions")


def check(cfg):
    """Refuse what cannot be run, before data is read; returns (kept method, seed)."""
    for method in cfg.methods:
        if method not in METHODS:
            raise Refused(f"method '{method}' is not known; use {', '.join(METHODS)}")
    if not cfg.methods or len(set(cfg.methods)) < len(cfg.methods):
        names = " ".join(cfg.methods)
        raise Refused(f"--methods '{names}' must name at least one method, and none twice")
    if cfg.head not in ("trained", "locked"):
        raise Refused(f"--head '{cfg.head}' is not known; use trained or locked")
    if cfg.head == "locked" and cfg.methods[0] != "head":
        raise Refused(
            "--head locked takes the head that method 'head' trained: name head first in --methods, "
            f"before {cfg.methods[0]}"
        )
    run, _, number = cfg.augment.rpartition(":")
    if cfg.augment and not (run and number.isdecimal() and int(number)):
        raise Refused(
            f"--augment '{cfg.augment}' must be SELORA_RUN:COUNT, random:COUNT, class:COUNT or own:COUNT "
            "with a count of at least 1"
        )
    check_words(cfg)
    if cfg.base:
        default = type(cfg)()
        for key in OF_THE_BASE:
            if getattr(cfg, key) != getattr(default, key):
                flag = key.replace("_", "-")
                raise Refused(f"--{flag} {getattr(cfg, key)}: --base {cfg.base} is pretrained and "
                              f"has sizes of its own; leave --{flag} out")
    sizes = {"image_size": cfg.image_size, "patch": cfg.patch, "width": cfg.width}
    sizes |= {"depth": 1, "heads": cfg.heads}
    with data.refusing():  # sizes that do not fit together
        make_vit({"absent": cfg.absent, **({} if cfg.base else sizes)})
    return kept_job(cfg)


def kept_job(cfg):
    """(method, seed) of --keep; the default falls back on the last method where there is no
    mora."""
    method, _, seed = cfg.keep.rpartition(":")
    if cfg.keep == "mora:0" and "mora" not in cfg.methods:
        method = cfg.methods[-1]
    if method not in cfg.methods or not seed.isdecimal() or int(seed) >= cfg.seeds:
        raise Refused(
            f"--keep '{cfg.keep}' must be METHOD:SEED of this run, with a method of "
            f"{', '.join(cfg.methods)} and a seed in 0..{cfg.seeds - 1}"
        )
    return method, int(seed)


# ---- studies


def read_target(cfg):
    """The study to adapt to, with the modalities that are asked for."""
    modalities = cfg.modalities
    if cfg.data:
        target = data.load_study(cfg.data, cfg.synthetic_notes)
    elif cfg.synthetic_notes:
        raise Refused(
            "--synthetic-notes is for a --data file without notes; the phantoms have reports"
        )
    else:
        target = phantoms(cfg.phantoms, 2, "target", cfg.image_size)
        modalities = modalities or ("image", "note")
    return target.select(modalities) if modalities else target


def read_source(cfg, target):
    """The study to pretrain on, with the target's modalities and what can be read off a sample in
    `attributes`."""
    return _source_file(cfg, target) if cfg.source else _source_phantoms(cfg, target)


def check_apart(cfg, source, target, secret):
    """`Refused` if the base's study shares samples with the one to adapt to, in whatever file and
    order; `secret`: what the base would see.

    Samples are known by their pixels. Words and numbers coincide by chance: where one study has no
    image, it is refused only if one lies whole in the other."""
    if not cfg.source and not cfg.data:
        return  # phantoms of two domains
    images = image_digests(source)
    targets = image_digests(target)
    shared = int(np.isin(images, targets).sum())
    if not len(images) or not len(targets):
        ours = _facts(source, target)
        theirs = _facts(target, source)
        if ours and (ours <= theirs or theirs <= ours):
            shared = min(len(source), len(target))
    if shared:
        raise Refused(
            f"--source {cfg.source or source.name}: {shared} of its {len(source)} samples are in "
            f"--data {cfg.data or target.name}: the base would see the {secret}"
        )


def _facts(study, other):
    """A Counter of what the samples say in words and numbers that the other study has too."""
    columns = [study.numeric[m] for m in sorted({*study.numeric} & {*other.numeric})]
    columns = [[row.tobytes() for row in values] for values in columns]
    if not any(s.notes is None or s.synthetic_notes for s in (study, other)):
        columns.append(study.notes.tolist())
    return Counter(zip(*columns))


def _whole(cfg, target):
    """The target with the modalities that were not asked for, too."""
    return read_target(replace(cfg, modalities=())) if cfg.modalities else target


def _source_file(cfg, target):
    """The complete, labelled samples of --source; each label is an attribute."""
    whole = data.load_study(cfg.source)
    if cfg.synthetic_notes and whole.notes is None:
        whole = data.attach_notes(whole)
    source = whole.select([m for m in target.modalities if m in whole.modalities])
    wanted = ", ".join(target.modalities)
    if set(source.modalities) != set(target.modalities):
        modalities = ", ".join(source.modalities) or "none"
        raise Refused(
            f"{cfg.source}: has {modalities} of the target's modalities {wanted}; it needs all"
        )
    source.numeric = {m: source.numeric[m] for m in target.numeric}  # in the target's order
    rows = source.labelled & source.have().all(1)
    if not rows.any():
        raise Refused(f"{cfg.source}: no labelled sample has all of {wanted}")
    source = source.take(rows)
    check_apart(cfg, whole.take(rows), _whole(cfg, target), "test labels")
    labels = np.atleast_2d(source.labels.T)  # [1 or C,N]
    source.attributes = {f"label {i}": c for i, c in enumerate(labels) if c.max() > 0}
    return source


def _source_phantoms(cfg, target):
    """Phantoms of the source domain; their numbers take the names of the target's modalities."""
    source = phantoms(cfg.phantoms, 1, "source", cfg.image_size)
    check_apart(cfg, source, target, "test labels")
    spare = itertools.cycle(source.numeric)
    groups = {m: m if m in source.numeric else next(spare) for m in target.numeric}
    source.numeric = {m: source.numeric[group] for m, group in groups.items()}
    source.columns = {m: source.columns[group] for m, group in groups.items()}
    source = source.select(target.modalities)
    image = "image" in target.modalities
    note = "note" in target.modalities
    readable = []
    if image:
        readable += ["kind", "side"]
    if note or not image:
        readable += ["symptom", "history"]
    if image and note:
        readable += ["agree"]
    source.attributes = {name: source.attributes[name] for name in readable}
    return source


# ---- sizes


def image_size(cfg):
    """The size of the images: as asked for, or what the base was pretrained at."""
    if cfg.image_size or not cfg.base:
        return cfg.image_size or 32
    return read_config(cfg.base)["image_size"]


def check_words(cfg):
    """`Refused` unless --buckets and --positions are 0 or large enough."""
    if 0 < cfg.buckets < 16:
        raise Refused(f"--buckets is {cfg.buckets}; must be 0 or at least 16")
    if cfg.positions == 1:
        raise Refused("--positions is 1; must be 0 or at least 2")


def buckets(cfg, study):
    """Hash buckets for words: as asked for, 2,048, or for a file what its words need."""
    if cfg.buckets:
        return cfg.buckets
    if not cfg.data or study.notes is None:
        return 2048
    return buckets_for(study.notes)


def vit_sizes(cfg, target, source):
    """The keyword arguments of the `ViT` that is pretrained: the source's columns, and a head that
    nobody uses."""
    positions = cfg.positions
    if not positions and "note" in target.modalities:
        positions = positions_for([*target.notes, *source.notes])
    colour = any(s.images is not None and s.images.ndim == 4 for s in (target, source))
    return dict(
        modalities=target.modalities,
        classes=2,
        columns=column_ids(source, cfg.buckets),
        image_size=cfg.image_size,
        channels=3 if colour else 1,
        patch=cfg.patch,
        width=cfg.width,
        depth=cfg.depth,
        heads=cfg.heads,
        buckets=cfg.buckets,
        positions=positions or 1,
    )


def pretrained_base(cfg, study):
    """(configuration of the `ViT` that --base holds, what `pretrain` would have given) for a
    study."""
    config, state = read_vilt(cfg.base, study.modalities, cfg.image_size)
    if "note" in study.modalities:
        vocabulary = read_vocabulary(cfg.base)
        config["vocabulary"] = vocabulary.text
        needed = [vocabulary.longest([note]) for note in study.notes]
        cut = sum(n > config["positions"] for n in needed)
        if cut:
            print(f"{cut} of {len(study)} notes are longer than the base's {config['positions']} "
                  "word positions and are cut")
    return config, {"state": state, "readers": {}}


def hash_of_base(cfg, study, source, config, identity):
    """A name for all that a base depends on. identity: what config.json of the run holds."""
    if cfg.source:
        config = config | {"tokenizer": TOKENIZER}  # ids of a file's words; phantoms' are as before
    if cfg.base:
        fixed = {"vilt": identity["base"], "image_size": cfg.image_size}
        fixed |= {"modalities": study.modalities}
    else:
        fixed = {"vit": config, "source": data.fingerprint(source)}
        fixed |= {"batch": cfg.batch, "steps": cfg.pretrain_steps}
    return data.digest({"format": 3} | fixed)[:16]


def column_ids(study, buckets):
    """{numeric modality: word id of each column's name}."""
    return {m: [word_id(c.lower(), buckets) for c in names] for m, names in study.columns.items()}


def input_sizes(vit_config):
    """The arguments of `data.model_inputs` that a run's configuration of a ViT knows."""
    return vit_config["image_size"], vit_config["channels"], note_encoder(vit_config)


def numeric_scales(study, rows, present=None):
    """{numeric modality: (mean [F], scale [F])} over the given rows, where `present` [N,M] leaves
    them their numbers."""
    scales = {}
    for name, values in study.numeric.items():
        seen = values[rows]
        if present is not None:
            seen = np.where(present[rows][:, [study.modalities.index(name)]], seen, np.nan)
        scales[name] = data.numeric_scale(seen)
    return scales


def tests_of(cfg):
    """The missing tables of the test rows, each a TYPE:RATE."""
    return list(dict.fromkeys(cfg.test_missing or (cfg.missing,)))


def work_ahead(cfg, vit_config, rates, grid):
    """A line per method: what its adapter and head hold, and how many runs follow, one for each
    learning rate of the grid where none is given."""
    for method in cfg.methods:
        tries = 1 if method in rates else len(grid)
        number = cfg.seeds - 1 + tries
        runs = "1 run" if number == 1 else f"{'' if tries == 1 else 'at least '}{number} runs"
        with torch.device("meta"):  # sizes only: nothing is allocated or drawn
            counts = count(attach(make_vit(vit_config), method, cfg.rank))
        trainable = counts["trainable_params"]
        total = counts["total_params"]
        yield (
            f"{method:14s} adapter {counts['adapter_params']:,} parameters, trainable {trainable:,} of "
            f"{total:,} ({trainable / total:.2%}); {runs} of {cfg.steps} steps"
        )


# ---- the draws of a seed


def draw_task(cfg, study, seed):
    """Split, missing tables and scales of one seed, shared by all methods: numpy, as stored in
    split-sN.npz."""
    parts = data.split(study, seed, cfg.train_share)
    have = study.have()  # [N,M]
    texts = dict.fromkeys((cfg.missing, *tests_of(cfg)))
    draw = {
        "parts": parts,
        "tables": {t: data.missing_table(have, study.modalities, t, seed, study.labels) for t in texts},
        "order": np.random.default_rng((seed, 14)).permutation(len(study)),
    }
    draw["scales"] = numeric_scales(study, parts["train"], draw["tables"][cfg.missing])
    if cfg.absent == "fill":
        draw["donors"] = draw_donors(study, parts["train"], draw["tables"][cfg.missing], seed)
    return draw


def draw_donors(study, train, present, seed):
    """[N,M] of whose content stands for what a sample lacks, with --absent fill: for each modality
    a random training sample that the training table `present` [N,M] left it."""
    rng = np.random.default_rng((seed, 23))
    columns = []
    for name, column in zip(study.modalities, present.T):
        having = train[column[train]]
        if not len(having):
            raise Refused("--absent fill: the missing table leaves no training sample of seed "
                          f"{seed} its {name}")
        columns.append(rng.choice(having, len(present)))
    return np.stack(columns, 1)


def split_arrays(study, draw):
    """What split-sN.npz holds of a seed's draw: {name: array}."""
    arrays = {"modalities": np.array(study.modalities), **draw["parts"]}
    if "donors" in draw:
        arrays["donors"] = draw["donors"]
    arrays |= {f"present {text}": present for text, present in draw["tables"].items()}
    arrays |= {f"synthetic {k}": draw[k] for k in ("source", "images", "present") if k in draw}
    return arrays


def on(device, arrays):
    """{name: array} -> {name: tensor on the device}."""
    return {k: torch.from_numpy(np.ascontiguousarray(v)).to(device) for k, v in arrays.items()}


def batch_at(inputs, rows, content=None):
    """{modality: tensor} of some rows of a study's inputs: images are kept as uint8, and become
    numbers in [-1,1] here. content [N,M]: whose content each row shows, where that is not its
    own."""
    batch = {}
    for m, (name, x) in enumerate(inputs.items()):
        batch[name] = x[rows if content is None else content[rows, m]]
    if "image" in batch:
        batch["image"] = batch["image"].float() / 127.5 - 1  # [B,ch,S,S]
    return batch


def load_task(study, draw, missing, vit_config, device):
    """The tensors of one seed, on the device; synthetic studies stand behind the others, in the
    training split only.

    inputs {modality: [N,...]}, labels [N] or [N,C], train: row numbers, present and shuffled [N,M]
    (each sample's own presence and another's), tables {TYPE:RATE: [N,M]}, order: whose presence a
    row has in `shuffled`, content {TYPE:RATE: [N,M] whose content a row shows, or None: its own}."""
    train = draw["parts"]["train"]
    tables = draw["tables"]
    order = draw["order"]
    if "source" in draw:
        real = len(study)
        source = draw["source"]
        images = data.resize(study.images, draw["images"].shape[1])
        study = study.take(np.concatenate([np.arange(real), source]))
        study.images = np.concatenate([images, draw["images"]])
        train = np.concatenate([train, np.arange(real, len(study))])
        tables = {k: np.concatenate([v, draw["present"]]) for k, v in tables.items()}
        # Synthetic rows are shuffled among themselves.
        others = np.random.default_rng(22).permutation(len(source))
        order = np.concatenate([order, real + others])
    inputs = data.model_inputs(study, *input_sizes(vit_config), draw["scales"])
    content = dict.fromkeys(tables)
    if "donors" in draw:
        own = np.arange(len(study))[:, None]
        donors = draw["donors"]
        content = {k: np.where(have, own, donors[own[:, 0] % len(donors)]) for k, have in tables.items()}
        content = on(device, content)
    tables = on(device, {k: v.astype(np.float32) for k, v in tables.items()})
    present = tables[missing]
    return {
        "inputs": on(device, inputs),
        "content": content,
        "labels": torch.from_numpy(study.labels).to(device),
        "train": train,
        "present": present,
        "shuffled": present[order],
        "order": order,
        "tables": tables,
    }


def finished_job(cfg, ctx, method, seed, path, name):
    """The content of a finished job's file, `ctx` as in train_mora.py; `Refused` if it does not
    hold what that job would write."""
    content = checkpoint.load(path, "mora adapter", name)
    check_base(path, content, ctx.base_hash)
    with torch.device("meta"):  # names and shapes only
        model = make_vit(ctx.vit)
        checkpoint.check_weights(ctx.base_place, ctx.base, without_head(model))
        attach(model, method, cfg.rank)
    if content["state"] or path.parent.name != "picks":  # a rate that lost keeps its scores alone
        checkpoint.check_weights(f"{path}: entry 'state'", content["state"], kept_weights(model))
    draw = ctx.draws[seed]
    counts = {}  # {TYPE:RATE: {pattern: number of test samples}}
    for text in tests_of(cfg):
        present = draw["tables"][text][draw["parts"]["test"]]
        counts[text] = Counter(data.pattern_name(row, ctx.study.modalities) for row in present)
    tests = {}
    shapes = {}
    for text, scores in content["result"]["by_test"].items():
        tests[text] = {name: pattern["n"] for name, pattern in scores["by_pattern"].items()}
        rows = scores["probabilities"]
        shapes[text] = (len(rows), {len(row) for row in rows})
    shape = (len(draw["parts"]["test"]), {ctx.vit["classes"]})
    check_entries(path, {
        "method": (content["method"], method),
        "seed": (content["seed"], seed),
        "rank": (content["rank"], cfg.rank),
        "scales": (content["scales"], listed(draw["scales"])),
        "result.by_test": (tests, counts),
        "result.by_test.probabilities": (shapes, dict.fromkeys(tests, shape)),
    })
    return content


def listed(scales):
    """Scales {numeric modality: (mean [F], scale [F])} as a file holds them."""
    return {m: [s.tolist() for s in pair] for m, pair in scales.items()}


def draw_studies(cfg, study, draw, seed, device):
    """Studies to add for --augment: which training sample each takes words, numbers and label from
    (`source`), its image, its presence.

    The image is drawn from the words by a run of SeLoRA; `random`: it is another patient's; `class`:
    another patient's who has the same labels; `own`: the sample's own. Nothing is used that the training table withheld: neither words,
    numbers and images here, nor pairs that taught SeLoRA."""
    run, _, count = cfg.augment.rpartition(":")
    if not {"image", "note"} <= set(study.modalities):
        modalities = ", ".join(study.modalities)
        raise Refused(f"--augment needs image and note; the modalities are {modalities}")
    train = draw["parts"]["train"]
    table = draw["tables"][cfg.missing]  # [N,M]
    has_image = table[:, study.modalities.index("image")]
    has_note = table[:, study.modalities.index("note")]
    worded = train[has_note[train]]
    usable = has_image if run == "own" else has_note
    if not usable[worded].any():
        needed = "note and image" if run == "own" else "note"
        raise Refused(f"--augment {cfg.augment}: --missing {cfg.missing} leaves no training sample of "
                      f"seed {seed} its {needed}")
    source = source_rows(worded, usable, int(count), seed)
    if run == "own":
        images = study.images[source]
    elif run in CONTROLS:
        labels = study.labels if run == "class" else None
        imaged = train[has_image[train]]
        with data.refusing(f"--augment {run}, seed {seed}"):
            donors = data.others(data.groups(study), imaged, source, seed, labels=labels)
        images = study.images[donors]
    else:
        whole = train[(has_image & has_note)[train]]
        images = drawn_images(cfg, run, study, source, train, whole, seed, device)
    complete = table[source]
    complete[:, study.modalities.index("image")] = True
    labels = study.labels[source]
    present = data.missing_table(complete, study.modalities, cfg.missing, seed + 10**6, labels)
    print(f"seed {seed}: {count} studies added by --augment {cfg.augment} to {len(train)} real ones")
    return {
        "source": source,
        "images": data.resize(images, cfg.image_size),
        "present": present,
    }


def source_rows(worded, usable, count, seed):
    """[count] of the rows `worded`, drawn with replacement. Those not `usable` [N] are drawn too and
    passed over, so that two draws with other usable rows share what they can."""
    rng = np.random.default_rng((seed, 18))
    rows = np.empty(0, int)
    while len(rows) < count:
        more = worded[rng.integers(0, len(worded), count)]
        rows = np.concatenate([rows, more[usable[more]]])
    return rows[:count]


def drawn_images(cfg, run, study, source, train, whole, seed, device):
    """uint8 images that the run's adapter of this seed draws from the words of the source rows.

    `Refused` if that run is of another study, or saw a sample that this seed does not train on, or
    a pair that is not among `whole`, those that the training table left."""
    saved, model, vae = load_selora(run, None, seed)
    checkpoint.check_form(Path(run) / "model.pt", saved, {"study": str})
    if saved["study"] != data.fingerprint(study.select(("image", "note"), False)):
        raise Refused(
            f"{run}: was trained on {saved['data']}, another study than this run's {study.name}"
        )
    path = Path(run) / f"split-s{seed}.npz"
    seen = data.read_npz(path).get("train")
    if seen is None or seen.ndim != 1 or seen.dtype.kind not in "iu":
        raise Refused(f"{path}: entry 'train' is missing or not a list of rows")
    outside = int((~np.isin(seen, train)).sum())
    if outside:
        raise Refused(
            f"{run}: at seed {seed} it saw {outside} samples outside this run's training split; train "
            "it with the same --train-share"
        )
    withheld = int((~np.isin(seen, whole)).sum())
    if withheld:
        raise Refused(
            f"{run}: at seed {seed} it saw {withheld} samples of which --missing {cfg.missing} "
            "withholds the image or the note here; train it with --table RUN, a run of train_mora.py "
            "on the same data with the same seeds, --missing and --train-share"
        )
    config = saved["config"]
    ids = tokenize(study.notes[source], config["buckets"], config["positions"])
    images = diffusion.draw_images(
        model.to(device),
        vae.to(device),
        torch.from_numpy(ids).to(device),
        10**6 * (seed + 1) + np.arange(len(source)),
        alphas=diffusion.alphas_cumprod(noisier=saved["noisier"], device=device),
    )
    if images.ndim != study.images.ndim:
        raise Refused(
            f"{run}: draws images of shape {list(images.shape[1:])}; {study.name} has images of shape "
            f"{list(study.images.shape[1:])}"
        )
    return images


# ---- jobs


@dataclass
class Context:
    """What the jobs of a run share."""

    study: data.Study
    draws: dict  # {seed: what `draw_task` gives}
    vit: dict  # the keyword arguments of the adapted `ViT`
    base: dict  # the pretrained state
    base_hash: str
    base_place: Path  # where the state is from, for an error message
    device: torch.device
    log: object  # the `Log`
    stop: object  # the `Stopper`
    task: tuple = ()  # (seed, its tensors): one seed's at a time

    def task_of(self, cfg, seed):
        """The tensors of a seed."""
        if not self.task or self.task[0] != seed:
            draw = self.draws[seed]
            self.task = (seed, load_task(self.study, draw, cfg.missing, self.vit, self.device))
        return self.task[1]


@torch.no_grad()
def predict(model, method, task, rows, text, size=64):
    """Probabilities [n,C] float64 of the rows under a missing table, `size` rows at once."""
    present = task["tables"][text]
    shuffled = present[task["order"]]
    parts = []
    for part in torch.from_numpy(rows).split(size):
        batch = batch_at(task["inputs"], part, task["content"][text])
        gate = gates(method, present[part], shuffled[part])
        logits = model(batch, present[part], gate).double()
        multilabel = task["labels"].ndim == 2
        parts.append(logits.sigmoid() if multilabel else logits.softmax(1))
    return torch.cat(parts).cpu().numpy()


def evaluate(cfg, ctx, model, method, task, draw):
    """{'val': scores, 'by_test': {TYPE:RATE: `baselines.scores_of` the test rows}}."""
    rows = draw["parts"]["val"]
    p = predict(model, method, task, rows, cfg.missing, cfg.batch)
    result = {"by_test": {}, "val": metrics.scores(ctx.study.labels[rows], p)}
    for text in tests_of(cfg):
        p = predict(model, method, task, draw["parts"]["test"], text, cfg.batch)
        result["by_test"][text] = scores_of(ctx.study, draw, text, p)
    return result


# ---- SeLoRA's studies; `cfg` is the configuration of train_selora.py


def read_pairs(cfg, path, domain, seed):
    """A study with images and words."""
    if path is None:
        return phantoms(cfg.phantoms, seed, domain, cfg.image_size).select(("image", "note"))
    study = data.load_study(path)
    if cfg.synthetic_notes and study.notes is None:
        study = data.attach_notes(study)
    return study.select(("image", "note"), need_every_sample=False)


def read_studies(cfg):
    """({'source', 'target': study}, rows of the target that have their image)."""
    target = read_pairs(cfg, cfg.data, "target", 2)
    source = read_pairs(cfg, cfg.source, "source", 3)
    source = source.take(source.have()[:, 0])
    drawable = np.flatnonzero(target.have()[:, 0])  # a sample without its image teaches nothing
    if not len(source) or not len(drawable):
        path = cfg.data if len(source) else cfg.source
        raise Refused(f"{path}: every image is missing (all black)")
    check_apart(cfg, source, target, "held-out images")
    return {"source": source, "target": target}, drawable


def left_by_table(run, study, seed, split):
    """{'train', 'val'}: the rows of a split of which the missing table of a run of train_mora.py left
    image and note, and which it trained on or validated with at this seed. `Refused` if it is no
    such run, or of another study."""
    config = checkpoint.read_json(run / "config.json")
    text = config.get("missing") if isinstance(config, dict) else None
    if not isinstance(text, str):
        raise Refused(f"--table {run}: not a run of train_mora.py")
    path = run / f"split-s{seed}.npz"
    if not path.exists():
        raise Refused(f"--table {run}: has no seed {seed}; it needs all seeds of this run")
    arrays = data.read_npz(path)
    table = arrays.get(f"present {text}")
    names = arrays.get("modalities")
    if table is None or names is None or table.shape[1:] != names.shape:
        raise Refused(f"{path}: has no missing table '{text}'")
    names = names.tolist()
    if not {"image", "note"} <= {*names}:
        raise Refused(f"--table {run}: its modalities are {', '.join(names)}; it needs image and note")
    own = data.split(study, seed)
    same = [np.array_equal(arrays.get(part), own[part]) for part in ("val", "test")]
    inside = np.isin(arrays.get("train", -1), own["train"])
    if len(table) != len(study) or not all(same) or not inside.all():
        raise Refused(f"--table {run}: splits another study of {len(table)} samples than this run's "
                      f"{study.name} of {len(study)}")
    whole = table[:, [names.index("image"), names.index("note")]].all(1)  # [N]
    left = {}
    for part, name in (("train", "training"), ("val", "validation")):
        seen = np.intersect1d(split[part], arrays[part])
        left[part] = seen[whole[seen]]
        if not len(left[part]):
            raise Refused(f"--table {run}: leaves no {name} sample of seed {seed} both image and note")
    return left


def finished_rule(cfg, ctx, job, seed, lr, path, name):
    """The content of a finished job's file, `ctx` as in train_selora.py; `Refused` if it does not
    hold what that job would write."""
    content = checkpoint.load(path, "selora adapter", name)
    check_base(path, content, ctx.base_hash)
    final = {}
    if path.parent.name == "picks" and not content["state"]:
        final = content["ranks"]  # a rate that lost keeps its scores alone
    elif job.rule not in ("unadapted", "full"):
        final = ranks_in(path, content["state"])
    steps = [step for step, _ in content["history"]]
    ranks = [ranks for _, ranks in content["history"]]
    layers = [{*each} for each in ranks]
    results = {"heldout_loss", "val_loss"}
    if ctx.judges:
        judge = ctx.judges[seed]
        results |= {"frechet", "nearest", *judge.truths}
        if not cfg.rules_table:
            results |= {f"{fact}, words ignored" for fact in judge.facts()}
    check_entries(path, {
        "method": (content["method"], job.name),
        "rule": (content["rule"], job.rule),
        "seed": (content["seed"], seed),
        "lr": (content.get("lr"), lr),
        "ranks": (content["ranks"], final),
        "history": ((steps[:1], layers, ranks[-1:]), ([0], [{*final}] * len(layers), [final])),
        "result": ({*content["result"]}, results),
    })
    return content


@torch.no_grad()
def latents(vae, images):
    """Posterior means [N,L,s,s] of images [N,ch,S,S]."""
    return torch.cat([vae.encode(part)[0] for part in images.split(256)])


@torch.no_grad()
def reconstruction_error(vae, z, images):
    """Mean squared error of images [N,ch,S,S] decoded from their latents."""
    decoded = torch.cat([vae.decode(part) for part in z.split(256)])
    return decoded.sub(images).square().mean().item()
