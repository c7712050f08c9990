"""Plans and budgets over a run: which ranks the layers get before the first step, the rules and
rows of a run of train_selora.py, and what each may spend.

Skip it when you read for the method, `selora.grow`, which raises ranks during training; plans are
what growing is compared with, at the same number of adapter parameters.
"""

import copy
import math
from dataclasses import dataclass

import torch

from minilora.selora import GROWTH, adapter_cost, adapters, check_names

PLANS = ("inverse-cost", "neyman")  # rules of `plan`, asked once, before the first step


def full_gradients(model, loss):
    """{name: [d_out,fan_in]}, the gradient of `loss()`, a scalar, by the full weight of each
    adapted layer.

    loss: a function without arguments that does the forward, for the frozen weights have to be open
    while it runs. No `.grad` is touched, and they are frozen again after it."""
    weights = [layer.base.weight for layer in adapters(model).values()]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        gradients = torch.autograd.grad(loss(), weights, materialize_grads=True)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {name: G.flatten(1) for name, G in zip(adapters(model), gradients)}


def plan(model, rule, budget, gradients=None):
    """Ranks {name: rank} for a budget of adapter parameters, chosen before the first step;
    `set_ranks` applies them.

    inverse-cost  r ~ 1 / cost: cheap layers get more, without looking at any data
    neyman        r ~ sqrt(D / cost), which minimises sum D / r under sum cost r = budget (Neyman
                  allocation); D is what a rank should save, `savings` of `gradients`, the
                  `full_gradients` of two or more batches, at B = 0

    Rank 0 is allowed. ValueError: unknown rule, fewer than two batches, a budget that buys no
    rank."""
    layers = adapters(model)
    costs = {name: adapter_cost(layer) for name, layer in layers.items()}
    capacities = {name: layer.capacity for name, layer in layers.items()}
    if rule not in PLANS:
        raise ValueError(f"rule '{rule}' is not known; use {', '.join(PLANS)}")
    cheapest = min(costs.values())
    if budget < cheapest:
        raise ValueError(f"a budget of {budget} parameters buys no rank: "
                         f"the cheapest costs {cheapest}")
    if rule == "neyman":
        saved = savings(layers, gradients or ())
        weights = {name: math.sqrt(saved[name] / cost) for name, cost in costs.items()}
    else:
        weights = {name: 1 / cost for name, cost in costs.items()}
    return apportion(weights, costs, budget, capacities)


def savings(layers, gradients):
    """{name: D}, what a rank of each layer should save in Adam's first step, from the full
    gradients of two or more batches.

    With G_a and G_b their means over odd and even batches, m_o = max(0, <G_a[o], G_b[o]>) is
    |E G[o]|^2 of output row o, without the noise that the square of one mean has; v_o is the mean
    over batches of |G[o]|^2; and D = sqrt(2 / fan_in) sum_o m_o / sqrt(v_o)."""
    halves = [{}, {}]  # {name: sum of G over every second batch, [d_out,fan_in]}
    squares = {}  # {name: sum of |G[o]|^2, [d_out]}
    count = 0
    for batch in gradients:  # one at a time: a generator never holds two
        half = halves[count % 2]
        for name, G in batch.items():
            half[name] = half.get(name, 0) + G
            squares[name] = squares.get(name, 0) + G.square().sum(1)
        count += 1
    if count < 2:
        raise ValueError("rule 'neyman' compares batches: it needs the gradients of two or more, "
                         f"not of {count}")
    saved = {}
    for name, layer in layers.items():
        m = (halves[0][name] * halves[1][name]).sum(1).clamp(min=0) / (count**2 // 4)  # [d_out]
        v = squares[name] / count  # [d_out]
        per_row = (m / v.sqrt()).nan_to_num(0)  # 0 / 0: unused
        saved[name] = float(per_row.sum() * math.sqrt(2 / layer.fan_in))
    return saved


def apportion(weights, costs, budget, capacities):
    """Ranks r = clip(round(c weight), 0, capacity), c bisected to sum cost r <= budget, the rest by
    largest remainder.

    All arguments but the budget are {name: number}. A layer of weight 0 gets rank 0."""

    def ranks_at(c):
        return {n: min(math.floor(c * w + 0.5), capacities[n]) for n, w in weights.items()}

    def price(ranks):
        return sum(costs[name] * rank for name, rank in ranks.items())

    low = 0.0
    high = max([capacities[n] / w for n, w in weights.items() if w > 0], default=0.0)  # fills all
    for _ in range(100):
        c = (low + high) / 2
        if price(ranks_at(c)) <= budget:
            low = c
        else:
            high = c
    ranks = ranks_at(low)
    remainders = {name: low * weights[name] - ranks[name] for name in weights}
    for name in sorted(weights, key=remainders.get, reverse=True):
        room = weights[name] > 0 and ranks[name] < capacities[name]
        if room and price(ranks) + costs[name] <= budget:
            ranks[name] += 1
    return ranks


def set_ranks(model, ranks):
    """Raise each layer to its rank: a plan, or another run's final ranks. ValueError, before
    anything is changed, where the layers are others or a rank cannot be reached."""
    layers = adapters(model)
    check_names(layers, ranks)
    for name, layer in layers.items():
        if not layer.rank <= ranks[name] <= layer.capacity:
            raise ValueError(f"layer '{name}': rank {layer.rank} can be raised up to the capacity "
                             f"{layer.capacity}, not set to {ranks[name]}")
    for name, layer in layers.items():
        layer.rank = ranks[name]


# ---- the rules of a run of train_selora.py, whose configuration `cfg` is

RULES = (*GROWTH, *PLANS, "fixed", "replay")
# Rows of --rules-table at each budget.
COMPARED = ("fixed", "neyman", "inverse-cost", "gain", "cheapest", "random")


@dataclass(frozen=True)
class Job:
    """One row of a comparison. budget: adapter parameters that the rule may spend, or 'ratio': what
    the job `ratio` came to cost. rank: of every layer at the start."""

    name: str
    rule: str
    budget: int | str = 0
    rank: int = 0


def jobs_of(cfg, cost):
    """What to run at each seed: the rule between its references, or for --rules-table every rule at
    the budgets of uniform rank 1 and 2 (`cost`: rank 1 in every layer), and the controls again at
    what `ratio` came to cost."""
    unadapted = Job("unadapted", "unadapted")
    full = Job("full", "full")
    if not cfg.rules_table:
        return [unadapted, Job(cfg.rule, cfg.rule, cfg.budget or 2 * cost, cfg.rank), full]
    jobs = [unadapted, full, Job("ratio", "ratio", rank=1)]
    for rank in (1, 2):
        for rule in COMPARED:
            # What grows starts a rank below the budget, so that there is something to choose.
            start = rank if rule == "fixed" else rank - 1
            jobs.append(Job(f"{rule} r{rank}", rule, rank * cost, start))
    for rule in ("replay", *COMPARED):
        if rule != "fixed":
            jobs.append(Job(f"{rule} as ratio", rule, "ratio", 1))
    return jobs


def probe_steps(cfg, rule, rank):
    """Steps at which a rule looks: `ratio` all along, budgeted rules in the first quarter (late
    ranks learn less); from rank 0, with which nothing trains, at once."""
    if rule not in GROWTH:
        return []
    end = cfg.steps if rule == "ratio" else max(cfg.steps // 4, cfg.every + 1)
    return list(range(cfg.every if rank else 0, end, cfg.every))


def budget_at(step, job, probes, start):
    """Adapter parameters that a job may have after the probe of a step; None is without limit. The
    budget is opened evenly from probe to probe, from the parameters at the `start` on."""
    if job.rule == "ratio":
        return None
    share = (probes.index(step) + 1) / len(probes)
    return round(start + share * (job.budget - start))


def ranks_of(model):
    """{layer: rank} of the adapters."""
    return {name: layer.rank for name, layer in adapters(model).items()}


def cost_of(model, ranks):
    """Adapter parameters of the model with the given ranks {layer: rank}."""
    layers = adapters(model)
    return sum(rank * adapter_cost(layers[name]) for name, rank in ranks.items())


def check_rules(cfg):
    """ValueError where the settings of a rule are not known or contradict each other."""
    if cfg.rule not in RULES:
        raise ValueError(f"rule '{cfg.rule}' is not known; use {', '.join(RULES)}")
    if cfg.ratio_of not in ("sampled", "expected") or cfg.fisher not in ("probe", "loop"):
        raise ValueError(
            f"--ratio-of '{cfg.ratio_of}' must be sampled or expected, "
            f"--fisher '{cfg.fisher}' probe or loop"
        )
    if (cfg.rule == "replay") != (cfg.replay is not None):
        raise ValueError("--rule replay and --replay RUN go together")
    if cfg.rules_table and cfg.capacity < 2:
        raise ValueError(f"--rules-table compares ranks 1 and 2; --capacity is {cfg.capacity}")
    if cfg.rule in GROWTH and not probe_steps(cfg, cfg.rule, cfg.rank):
        raise ValueError(
            f"--steps {cfg.steps} ends before the first probe, --every {cfg.every}: "
            "nothing would grow"
        )
    if not 0 <= cfg.rank <= cfg.capacity:
        raise ValueError(f"--rank {cfg.rank} is outside 0..{cfg.capacity}, the capacity")
    if cfg.rank == 0 and cfg.rule == "fixed":
        raise ValueError("--rank 0 with --rule fixed would train nothing; use --rank 1 or more")
    if not 0 <= cfg.lam < 1e9:
        raise ValueError(f"--lam {cfg.lam} must be a number of at least 0")


def check_budget(cfg, cost):
    """ValueError where --budget buys less than the rule needs; `cost`: rank 1 in every layer."""
    if cfg.budget and cfg.budget < cost:
        raise ValueError(
            f"--budget {cfg.budget:,} is below the {cost:,} parameters that rank 1 in every layer costs"
        )
    budget = cfg.budget or 2 * cost
    spent = cfg.rank * cost
    grows = cfg.rule in ("gain", "random", "cheapest") and not cfg.rules_table
    if grows and budget <= spent:
        raise ValueError(
            f"--rank {cfg.rank} in every layer costs {spent:,}, and rule '{cfg.rule}' may spend "
            f"{budget:,}: nothing is left to grow; lower --rank or raise --budget"
        )


def replayed(report, seeds, model):
    """{seed: final ranks {layer: rank}} of another run's metrics.json. ValueError: it is no
    finished run, has fewer seeds, or its ranks do not fit the model, which has adapters of rank
    0."""
    try:
        if report["kind"] != "selora":
            raise KeyError
        methods = report["methods"].items()
        runs = next(m["ranks"] for name, m in methods if name not in ("unadapted", "full"))
    except (AttributeError, KeyError, StopIteration, TypeError):
        raise ValueError("not a finished run of train_selora.py") from None
    if len(runs) < seeds:
        raise ValueError(f"has {len(runs)} seeds; --seeds {seeds} need as many")
    for ranks in runs[:seeds]:
        try:
            set_ranks(copy.deepcopy(model), ranks)
        except ValueError as error:
            raise ValueError(f"a run of another model: {error}") from None
    return dict(enumerate(runs[:seeds]))
