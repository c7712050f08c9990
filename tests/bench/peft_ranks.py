"""How good is uniform LoRA, and who beats it? Ranks that are chosen, ours and PEFT's, on the linear layers of one frozen
denoiser, at the parameters of uniform LoRA.

    python tests/bench/peft_ranks.py                                    # phantoms (synthetic), 10 seeds, rank 2
    python tests/bench/peft_ranks.py --data chest.npz --ranks 1 2 3     # prints tables, writes runs/peft-ranks/results.json

Base, splits, batches, AdamW, warm-up and cosine are those of train_selora.py. In every row nothing but the adapters of the
nn.Linear layers trains: vectors of words and convolutions stay frozen. Each row has its own rate, of the best loss on seed
0's validation rows, from a grid that is widened at an edge. What starts at 0 decays by .01, what starts at random by none.

neyman stays within the parameters of uniform LoRA. So does probe-svd, whose probe is charged a tenth of the steps, and each
batch that either looks at before the first step counts as one; while it probes, every layer has rank 4, or a rank more than uniform LoRA. AdaLoRA keeps as many singular triplets as uniform LoRA has
ranks, from half as many more at the start; which layers they end in decides what they cost. Its phases have about the
shares of its paper: a tenth of the steps before pruning, half of them after it, one pruning in each hundredth between.
"""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_selora
from minilora import allocate, checkpoint, data, diffusion, metrics, rates, selora
from minilora.cli import Positive, guarded
from minilora.loop import NotFinite, Stopped, Stopper, warm_cosine
from minilora.processes import pick_device
from minilora.ranks import PROBE, Job, cost_of, highest, plan, probe_steps, ranks_of, set_ranks, steps_of
from minilora.samples import heldout_loss
from minilora.task import buckets, read_studies
from minilora.unet import Denoiser
from minilora.words import positions_for

GRID = (3e-3, 1e-2, 3e-2)
CAPACITY = 8  # highest rank of a layer of ours
SCALE = 2.0  # of every adapter
SIZES = {}  # settings of train_selora.py that are not its defaults


@dataclass
class Config:
    """Compare uniform LoRA with ranks that are chosen, ours and PEFT's, on the same linear layers."""

    out: Path = Path("runs/peft-ranks")  # Folder of the results; finished rows stay there.
    data: Path | None = None  # Study file with images and notes; default: phantoms of the target domain.
    source: Path | None = None  # Study file that the base is pretrained on; default: phantoms of the source domain.
    synthetic_notes: bool = False  # Attach templated notes to files that have none.
    ranks: tuple[int, ...] = (2,)  # Budgets: what uniform LoRA of these ranks costs.
    # The first is what the others are compared with.
    rows: tuple[str, ...] = ("uniform", "neyman", "probe-svd", "peft-lora", "adalora")
    seeds: Positive = 10  # Runs of each row; a seed sets split, initial adapter and batches.
    steps: Positive = 300  # Adaptation steps.
    batch: Positive = 32  # Samples per step.
    device: str = "auto"  # auto, cpu, cuda or cuda:N.
    resume: bool = False  # Go on in --out, also with more ranks, rows or seeds.
    preset = "small"  # of train_selora.py


@dataclass
class Setting:
    """What all rows share."""

    base: train_selora.Config
    pairs: train_selora.Pairs
    config: dict  # keyword arguments of the `Denoiser`
    state: dict  # its pretrained weights
    parts: dict  # {seed: split}
    names: list  # of its linear layers
    device: torch.device
    stop: Stopper

    def model(self):
        """A fresh copy of the pretrained denoiser."""
        model = Denoiser(**self.config)
        model.load_state_dict(self.state)
        return model.to(self.device)


@dataclass
class Adapted:
    """What a row put on a model. ranks: () -> {layer: rank} as they are now; spent: steps that choosing them took; per_rank:
    parameters of a rank beside its two vectors; penalty: () -> what is added to the loss; after: called with each step,
    after the optimizer's."""

    ranks: Callable
    spent: int = 0
    per_rank: int = 0
    penalty: Callable = lambda: 0.0
    after: Callable = lambda step: None


# ---- the rows: each puts its adapters on a fresh model


def uniform(setting, model, rank, rate, seed):
    """Our LoRA, the same rank in every layer."""
    torch.manual_seed(seed)
    selora.inject(model, "|".join(map(re.escape, setting.names)), rank, CAPACITY, SCALE)
    return Adapted(partial(ranks_of, model))


def neyman(setting, model, rank, rate, seed):
    """Our LoRA with ranks by Neyman allocation, from gradients before the first step; each counts as a step."""
    adapted = uniform(setting, model, 0, rate, seed)
    adapted.spent = setting.base.steps - steps_of(setting.base, Job("neyman", "neyman"))
    budget = cost_of(model, dict.fromkeys(setting.names, rank))
    train = setting.parts[seed]["train"]
    gradients = allocate.neyman_gradients(setting.base, setting.pairs, model, seed, train)
    set_ranks(model, plan(model, "neyman", budget, gradients))
    return adapted


def probe_svd(setting, model, rank, rate, seed):
    """Our LoRA with ranks by what the components of a short training are worth; its steps are charged."""
    adapted = uniform(setting, model, 0, rate, seed)
    budget = cost_of(model, dict.fromkeys(setting.names, rank))
    probe = setting.model()
    probed = uniform(setting, probe, 0, rate, seed)
    set_ranks(probe, {name: min(max(PROBE, rank + 1), highest(layer)) for name, layer in selora.adapters(probe).items()})
    adapted.spent = setting.base.steps - steps_of(setting.base, Job("probe-svd", "probe-svd"))
    optimize(setting, probe, probed, rate, seed, probe_steps(setting.base))
    train = setting.parts[seed]["train"]
    values = allocate.values_of("probe-svd", setting.base, setting.pairs, probe, seed, train)
    set_ranks(model, plan(model, "probe-svd", budget, values=values))
    return adapted


def peft_lora(setting, model, rank, rate, seed):
    """PEFT's LoRA, the same rank in every layer."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=setting.names)
    torch.manual_seed(seed)
    peft.get_peft_model(model, config)
    return Adapted(lambda: {name: len(layer.lora_A["default"].weight) for name, layer in foreign(model)})


def adalora(setting, model, rank, rate, seed):
    """PEFT's AdaLoRA (Zhang et al., arXiv 2303.10512): B diag(E) A, whose least important entries of E are pruned."""
    import peft

    steps = setting.base.steps
    first = -(-3 * rank // 2)
    config = peft.AdaLoraConfig(
        init_r=first, target_r=rank, lora_alpha=SCALE * first, target_modules=setting.names, total_step=steps,
        tinit=steps // 10, tfinal=steps // 2, deltaT=max(1, steps // 100),
    )  # fmt: skip
    torch.manual_seed(seed)
    tuner = peft.get_peft_model(model, config).base_model
    layers = dict(foreign(model))
    vectors = [layer.lora_A["default"] for layer in layers.values()]  # [r,d_in]
    vectors += [layer.lora_B["default"].T for layer in layers.values()]  # [r,d_out]

    def penalty():
        """How far the singular vectors are from orthonormal ones, as PEFT adds it to a loss that it knows of."""
        apart = [torch.linalg.norm(p @ p.T - torch.eye(len(p), device=p.device)) for p in vectors]
        return config.orth_reg_weight * torch.stack(apart).mean()

    def kept():
        pattern = tuner.peft_config["default"].rank_pattern
        whole = {f"{name}.lora_E.default": [True] * first for name in layers}
        by_layer = {name: (pattern or whole)[f"{name}.lora_E.default"] for name in layers}
        return {name: sum(entries) for name, entries in by_layer.items()}

    return Adapted(kept, 0, 1, penalty, tuner.update_and_allocate)


def foreign(model):
    """(name, layer) of the layers that PEFT adapted."""
    return [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "lora_A")]


ROWS = {"uniform": uniform, "neyman": neyman, "probe-svd": probe_svd, "peft-lora": peft_lora, "adalora": adalora}
TITLES = {"uniform": "uniform LoRA", "peft-lora": "PEFT LoRA", "adalora": "PEFT AdaLoRA"}


# ---- a run


def parameters_of(names, model, adapted):
    """How many parameters the adapters have; `names`: the layers that must have one, and no others."""
    shapes = {name.removesuffix(".base_layer").removesuffix(".base"): layer.weight.shape
              for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    ranks = adapted.ranks()
    if sorted(ranks) != sorted(names):
        raise RuntimeError(f"adapted are {sorted(ranks)}, not the linear layers {sorted(names)}")
    return sum(rank * (sum(shapes[name]) + adapted.per_rank) for name, rank in ranks.items())


def optimize(setting, model, adapted, rate, seed, steps):
    """So many steps of train_selora.py on whatever trains. NotFinite if a loss is not."""
    rows = setting.parts[seed]["train"]
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if not p.any()], "weight_decay": 0.01},  # what starts at 0
              {"params": [p for p in trained if p.any()], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=setting.pairs.z.is_cuda)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
    losses = torch.zeros(steps, device=setting.device)
    for step in range(steps):
        batch, t, noise, words = setting.pairs.batch_at(seed, step, rows, setting.base.batch)
        optimizer.zero_grad()
        loss = diffusion.denoising_loss(model, setting.pairs.z[batch], words, t, noise, setting.pairs.alphas)
        losses[step] = loss.detach()
        (loss + adapted.penalty()).backward()
        optimizer.step()
        adapted.after(step)
        schedule.step()
        if setting.stop.code:  # rows that are finished stay
            raise Stopped(setting.stop.code)
    if not losses.isfinite().all():
        raise NotFinite(f"the loss is not finite from step {int((~losses.isfinite()).nonzero()[0])} on")


def trained_row(setting, row, rank, rate, seed):
    """{'val', 'test': held-out losses, 'trained', 'parameters': at the start and at the end, 'seconds', 'ranks'}, from its
    file where it is finished."""
    path = setting.base.out / f"rows/{row}-r{rank}-{rate:g}-s{seed}.json"
    result = checkpoint.read_json(path)
    if result:
        return result
    model = setting.model()
    began = time.monotonic()
    adapted = ROWS[row](setting, model, rank, rate, seed)
    trained = parameters_of(setting.names, model, adapted)
    optimize(setting, model, adapted, rate, seed, setting.base.steps - adapted.spent)
    seconds = time.monotonic() - began
    part = setting.parts[seed]
    result = {key: heldout_loss(model.eval(), setting.pairs, part[key]) for key in ("val", "test")}
    if not np.isfinite([*result.values()]).all():
        raise NotFinite("the held-out loss is not finite")
    result |= {"trained": trained, "parameters": parameters_of(setting.names, model, adapted)}
    result |= {"seconds": round(seconds, 2), "ranks": adapted.ranks()}
    checkpoint.write_json(path, result)
    print(f"{row} r{rank}, rate {rate:g}, seed {seed}: validation {1e5 * result['val']:.0f}, {seconds:.0f} s", flush=True)
    return result


def compare(cfg, setting, rank):
    """{row: {'rate', 'tried', and what `trained_row` gives, each a list over seeds}} at one budget."""
    rows = {}
    for row in cfg.rows:
        result = partial(trained_row, setting, row, rank)
        rate, tried = rates.pick(GRID, lambda rate: -result(rate=rate, seed=0)["val"])
        runs = [result(rate=rate, seed=seed) for seed in range(cfg.seeds)]
        rows[row] = {key: [run[key] for run in runs] for key in runs[0]}
        rows[row] |= {"rate": rate, "tried": {f"{rate:g}": -score for rate, score in tried.items()}}
    return rows


# ---- what is printed


def scaled(losses):
    return 1e5 * np.array(losses)


def table(results, unadapted):
    """The comparison in Markdown; losses are means over seeds and their sample standard deviations, times 100,000."""
    yield "| row | held-out loss x 1e5 | parameters | while it trains | rate | seconds a run |"
    yield "|---|---|---|---|---|---|"
    yield f"| unadapted | {metrics.spread(scaled(unadapted), 0)} | 0 | 0 | | |"
    for rank, rows in results.items():
        for name, row in rows.items():
            counts = f"{np.mean(row['parameters']):,.0f} | {np.mean(row['trained']):,.0f}"
            tried = [*map(float, row["tried"])]
            edge = ", at the edge" if row["rate"] in (min(tried), max(tried)) else ""
            seconds = f"{np.mean(row['seconds']):.0f}"
            title = f"{TITLES.get(name, name)}, r{rank}"
            loss = metrics.spread(scaled(row["test"]), 0)
            yield f"| {title} | {loss} | {counts} | {row['rate']:g}{edge} | {seconds} |"


def sentences(results):
    """What paired differences to the first row show."""
    yield "Differences of held-out loss x 1e5 on the test rows; below 0 is better."
    for rank, rows in results.items():
        first, *others = rows
        for name in others:
            titles = [f"{TITLES.get(row, row)} r{rank}" for row in (name, first)]
            losses = [scaled(rows[row]["test"]) for row in (name, first)]
            yield metrics.verdict(*losses, titles, less=True, digits=0)


# ---- main


def check(cfg):
    """Refuse what cannot be run, before data is read."""
    for row in cfg.rows:
        if row not in ROWS:
            raise data.Refused(f"--rows '{row}' is not known; use {', '.join(ROWS)}")
    for rank in cfg.ranks:
        if not 1 <= rank <= CAPACITY:
            raise data.Refused(f"--ranks {rank} must be from 1 to {CAPACITY}")
    if not cfg.ranks or not cfg.rows:
        raise data.Refused("--ranks and --rows need at least one each")
    if cfg.steps < 10:
        raise data.Refused(f"--steps {cfg.steps} must be at least 10, for the phases of AdaLoRA")
    if {"peft-lora", "adalora"} & {*cfg.rows}:
        try:
            import peft  # noqa: F401
        except ImportError:
            raise data.Refused("no PEFT: pip install -c constraints.txt -e '.[bench]', or leave its --rows out") from None


def prepared(cfg, stop):
    """The `Setting`: studies and frozen base as train_selora.py has them."""
    given = {name: getattr(cfg, name) for name in ("out", "data", "source", "synthetic_notes", "steps", "batch", "resume")}
    base = train_selora.Config(**given, rule="fixed", word_notes=0, device=cfg.device, **SIZES)
    config = train_selora.check(base)
    device = pick_device(cfg.device)
    torch.backends.cudnn.allow_tf32 = False
    studies, drawable = read_studies(base)
    target = studies["target"]
    positions = base.positions or (positions_for(target.notes, 16) if base.data else 16)
    base = replace(base, buckets=buckets(base, target), positions=positions)
    config |= {"buckets": base.buckets, "positions": base.positions}
    parts = {}
    for seed in range(cfg.seeds):
        split = {name: np.intersect1d(rows, drawable) for name, rows in data.split(target, seed).items()}
        parts[seed] = data.none_empty(target, split)
    checkpoint.open_run(base)
    pairs, _, state, _, _ = train_selora.prepare(base, config, studies, device, stop)
    names = [name for name, layer in Denoiser(**config).named_modules() if isinstance(layer, torch.nn.Linear)]
    return Setting(base, pairs["target"], config, state, parts, names, device, stop)


def run(cfg, stop):
    check(cfg)
    setting = prepared(cfg, stop)
    model = setting.model().eval()
    unadapted = [heldout_loss(model, setting.pairs, part["test"]) for part in setting.parts.values()]
    results = {}
    for rank in cfg.ranks:
        results[rank] = compare(cfg, setting, rank)
    lines = [*sentences(results)]
    content = {"unadapted": unadapted, "budgets": results, "sentences": lines, "torch": torch.__version__,
               "device": str(setting.device)}  # fmt: skip
    checkpoint.write_json(cfg.out / "results.json", content)
    rows = {path.stem: checkpoint.read_json(path)["seconds"] for path in sorted((cfg.out / "rows").glob("*.json"))}
    checkpoint.write_json(cfg.out / "timings.json", rows)
    print(*table(results, unadapted), "", *lines, sep="\n")


def main(argv=None):
    guarded(run, tyro.cli(Config, args=argv, description=Config.__doc__), {"small": {}})


if __name__ == "__main__":
    main()
