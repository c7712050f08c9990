"""Plans and budgets over a run: which ranks the layers get before the first step, the rules and
rows of a run of train_selora.py, what each may spend, and at which learning rate.

Skip it when you read for the method, `selora.grow`, which raises ranks during training; plans are
what growing is compared with, at the same number of adapter parameters.
"""

import copy
import math
from dataclasses import dataclass, field, replace

import torch

from minilora import checkpoint, rates
from minilora.data import refusing
from minilora.selora import adapter_cost, adapters, check_names, inject

# Rules of `plan`, asked once, before the first step; the last three read the values of components.
PLANS = ("uniform", "random", "inverse-cost", "neyman", "probe-svd", "shuffled", "oracle")
VALUED = ("probe-svd", "shuffled", "oracle")


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


def plan(model, rule, budget, gradients=None, values=None, seed=0):
    """Ranks {name: rank} for a budget of adapter parameters, chosen before the first step;
    `set_ranks` applies them.

    uniform       equal ranks; what is left goes to layers drawn from the seed
    random        a rank more for a layer drawn from the seed, again and again
    inverse-cost  r ~ 1 / cost: cheap layers get more, without looking at any data
    neyman        r ~ sqrt(D / cost), which minimises sum D / r under sum cost r = budget (Neyman
                  allocation); D is what a rank should save, `savings` of `gradients`, the
                  `full_gradients` of two or more batches, at B = 0
    probe-svd     the components of most value per parameter; values {name: [value of each component
                  of the layer]}, as `allocate.py` finds them
    oracle        the same by what the loss of a whole training rises by without a component: a
                  costly control, no upper bound
    shuffled      the ranks of probe-svd, permuted among layers of equal cost by the seed

    Rank 0 is allowed, none is above `highest`. ValueError: unknown rule, fewer than two batches, a
    budget that buys no rank."""
    layers = adapters(model)
    costs = {name: adapter_cost(layer) for name, layer in layers.items()}
    tops = {name: highest(layer) for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    if rule not in PLANS:
        raise ValueError(f"rule '{rule}' is not known; use {', '.join(PLANS)}")
    cheapest = min(costs.values())
    if budget < cheapest:
        raise ValueError(f"a budget of {budget} parameters buys no rank: "
                         f"the cheapest costs {cheapest}")
    if rule in ("uniform", "random"):
        return scatter(costs, budget, tops, generator, even=rule == "uniform")
    if rule in VALUED:
        check_names(layers, values)
        ranks = most_valued(values, costs, budget, tops)
        return shuffled(ranks, costs, tops, generator) if rule == "shuffled" else ranks
    if rule == "neyman":
        saved = savings(layers, gradients or ())
        weights = {name: math.sqrt(saved[name] / cost) for name, cost in costs.items()}
    else:
        weights = {name: 1 / cost for name, cost in costs.items()}
    return apportion(weights, costs, budget, tops)


def highest(layer):
    """The highest rank that is of use in a layer: no change of its weight has a higher one."""
    return min(layer.capacity, layer.fan_in, layer.d_out)


def scatter(costs, budget, tops, generator, even):
    """Ranks, one at a time for a layer drawn from those that still fit; even: from the lowest
    ranks among these."""
    ranks = dict.fromkeys(costs, 0)
    while True:
        fitting = [n for n in costs if ranks[n] < tops[n] and costs[n] <= budget]
        if not fitting:
            return ranks
        if even:
            lowest = min(ranks[name] for name in fitting)
            fitting = [name for name in fitting if ranks[name] == lowest]
        name = fitting[int(torch.randint(len(fitting), (), generator=generator))]
        ranks[name] += 1
        budget -= costs[name]


def most_valued(values, costs, budget, tops):
    """Ranks: how many of its components {name: [value]} a layer keeps, where those of most value
    per parameter are taken first, and what does not fit is passed over."""
    worth = [(-value / costs[name], name) for name in costs for value in values[name]]
    ranks = dict.fromkeys(costs, 0)
    for _, name in sorted(worth):
        if ranks[name] < tops[name] and costs[name] <= budget:
            ranks[name] += 1
            budget -= costs[name]
    return ranks


def shuffled(ranks, costs, tops, generator):
    """The ranks, permuted among the layers of equal cost and equal highest rank."""
    alike = {}
    for name in ranks:
        alike.setdefault((costs[name], tops[name]), []).append(name)
    result = dict(ranks)
    for names in alike.values():
        order = torch.randperm(len(names), generator=generator).tolist()
        result |= {name: ranks[names[i]] for name, i in zip(names, order)}
    return result


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

# `random-grown` adds ranks to random layers early in training; `fixed` has --rank everywhere.
GROWING = ("ratio", "gain", "random-grown", "cheapest")
RULES = (*GROWING, *PLANS, "fixed", "replay")
CONTROLS = ("shuffled", "oracle")  # in --rules-table only
PROBE = 4  # rank of the training that values components
# Rows of --rules-table at each budget; those below at budgets above rank 1, with which they start.
PLANNED = ("uniform", "neyman", "inverse-cost", "random", "probe-svd", "shuffled", "oracle")
GROWN = ("ratio", "random-grown", "replay")
AS_RATIO = ("replay", "uniform", "random-grown", "probe-svd")  # at what `ratio` came to cost
# Learning rates to choose from.
GRID = (3e-3, 1e-2, 3e-2)
GRID_FULL = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Job:
    """One row of a comparison. budget: adapter parameters that the rule may spend, 0 without limit.
    rank: of every layer at the start, where no plan says more. of: the row of which it takes budget
    and history [[step, {layer: rank}], ...]."""

    name: str
    rule: str
    budget: int = 0
    rank: int = 0
    of: str = ""
    history: list = field(default_factory=list)


def jobs_of(cfg, cost):
    """What to run at each seed: the rule between its references, or for --rules-table every rule at
    the budgets of some uniform ranks (`cost`: rank 1 in every layer). The budget 0 stands for the
    paper's `ratio` without one, with its controls at what it came to cost, and full fine-tuning."""
    unadapted = Job("unadapted", "unadapted")
    full = Job("full", "full")
    if not cfg.rules_table:
        budget = cfg.budget or (0 if cfg.rule == "ratio" else 2 * cost)
        return [unadapted, Job(cfg.rule, cfg.rule, budget, cfg.rank), full]
    jobs = []
    for rank in cfg.budgets:
        if not rank:
            jobs.append(Job("ratio", "ratio", rank=1))
            jobs += [Job(f"{rule} as ratio", rule, rank=1, of="ratio") for rule in AS_RATIO]
            continue
        jobs += [Job(f"{rule} r{rank}", rule, rank * cost) for rule in PLANNED]
        if rank > 1:
            ratio = Job(f"ratio r{rank}", "ratio", rank * cost, 1)
            jobs.append(ratio)
            jobs += [Job(f"{rule} r{rank}", rule, rank=1, of=ratio.name) for rule in GROWN[1:]]
    if cfg.rows:
        jobs = [job for job in jobs if job.rule in cfg.rows and (not job.of or "ratio" in cfg.rows)]
    return [unadapted, *([full] if 0 in cfg.budgets else []), *jobs]


def completed(cfg, job, seed, replay):
    """The job with what it takes of another row, whose file is there, or of another run: `replay`
    {seed: ranks}."""
    if job.rule == "replay" and not job.of:
        return replace(job, history=[[0, replay[seed]]])
    if not job.of:
        return job
    stored = checkpoint.load(file_of(cfg, Job(job.of, "ratio"), seed), "selora adapter")
    return replace(job, budget=stored["adapter_params"], history=stored["history"])


def start_of(model, job, seed, gradients=None, values=None):
    """{layer: rank} before the first step; gradients and values as `plan` reads them."""
    layers = adapters(model)
    if job.rule == "probe":
        return {name: min(job.rank, highest(layer)) for name, layer in layers.items()}
    if job.rule == "replay":
        return job.history[-1][1]
    if job.rule in PLANS:
        return plan(model, job.rule, job.budget, gradients, values, seed)
    return dict.fromkeys(layers, job.rank)


def openings(cfg, job, model, start):
    """{step: adapter parameters that the job may have from then on, None without limit}: where it
    looks whether to grow from the ranks `start` {layer: rank}.

    `ratio` without a budget looks every so many steps, all along. A budget is opened evenly in the
    first quarter, for late ranks learn less: over four looks or more for each rank that the layers
    get on average, or every rule would open all layers alike; from rank 0, with which nothing
    trains, the first look is at once. A job with a history opens at its steps what it opened."""
    if job.rule not in GROWING:
        return {}
    if job.history:
        return {step: cost_of(model, ranks) for step, ranks in job.history[1:]}
    if not job.budget:
        return dict.fromkeys(range(cfg.every if job.rank else 0, cfg.steps, cfg.every))
    spent = cost_of(model, start)
    cost = cost_of(model, dict.fromkeys(start, 1))
    looks = 4 * math.ceil((job.budget - spent) / cost)
    every = max(1, min(cfg.every, cfg.steps // 4 // (looks + 1)))
    steps = range(every if job.rank else 0, max(cfg.steps // 4, every + 1), every)
    each = (job.budget - spent) / len(steps)
    return {step: round(spent + (k + 1) * each) for k, step in enumerate(steps)}


def probe_steps(cfg):
    """How many steps of a run the probe of probe-svd takes."""
    return max(1, cfg.steps // 10)


def steps_of(cfg, job):
    """How many steps a job trains: those of a probe, and batches that a plan looks at, are charged."""
    charged = looked_at(cfg, job.rule)
    if job.rule in ("probe-svd", "shuffled"):
        charged += probe_steps(cfg)
    return cfg.steps - charged


def looked_at(cfg, rule):
    """How many batches a plan looks at before the first step, a gradient of each: 16 for probe-svd,
    8 for neyman, and fewer, at least 2, of a short run."""
    most = {"probe-svd": 16, "shuffled": 16, "neyman": 8}.get(rule, 0)
    return min(most, max(2, cfg.steps // 20))


def probe_of(cfg, job, cost):
    """(the training whose components a plan weighs, its steps): of rank `PROBE`, or of a rank more
    than the budget gives to every layer. The oracle's takes all steps, uncharged: it is a control.
    cost: rank 1 in every layer."""
    rank = min(cfg.capacity, max(PROBE, job.budget // cost + 1))
    rule = "oracle" if job.rule == "oracle" else "probe-svd"
    steps = cfg.steps if rule == "oracle" else probe_steps(cfg)
    return Job(f"{rule} probe r{rank}", "probe", rank=rank), steps


def ranks_of(model):
    """{layer: rank} of the adapters."""
    return {name: layer.rank for name, layer in adapters(model).items()}


def cost_of(model, ranks):
    """Adapter parameters of the model with the given ranks {layer: rank}."""
    layers = adapters(model)
    return sum(rank * adapter_cost(layers[name]) for name, rank in ranks.items())


# ---- learning rates


def given_rates(cfg):
    """{rule: rate} of --lr, for the rules that run: of one rate for all, `full` gets a tenth."""
    names = dict.fromkeys(job.rule for job in jobs_of(cfg, 1) if job.rule != "unadapted")
    return rates.given(cfg.lr, names, "RULE", tenth="full")


def file_of(cfg, job, seed):
    """Where a job's content is kept."""
    return cfg.out / f"adapters/{job.name.replace(' ', '-')}-s{seed}.pt"


def pick_rate(cfg, job, train):
    """(learning rate, {rate: validation loss}) of a row: as given for its rule, or the best of a grid
    on the validation rows at seed 0, which test nothing; train: a function (job, seed, rate, path)
    -> content. The best trial is the row's run at seed 0; of the others the scores are kept."""
    given = given_rates(cfg) | {"unadapted": 0.0}
    if job.rule in given:
        return given[job.rule], {}

    def score_of(lr, path):
        return -train(job, 0, lr, path)["result"]["val_loss"]

    grid = GRID_FULL if job.rule == "full" else GRID
    best, scores = rates.chosen(cfg.out, job.name.replace(" ", "-"), grid, score_of)
    losses = {lr: -score for lr, score in scores.items()}
    print(f"{job.name}: learning rate by the loss on the validation rows at seed 0: "
          f"{rates.described(best, losses)}")
    return best, losses


# ---- what is refused


def check_rules(cfg):
    """ValueError where the settings of a rule are not known or contradict each other."""
    if cfg.rule not in RULES:
        raise ValueError(f"rule '{cfg.rule}' is not known; use {', '.join(RULES)}")
    if cfg.rule in CONTROLS:
        raise ValueError(f"rule '{cfg.rule}' is a control of --rules-table; use probe-svd")
    if cfg.ratio_of not in ("sampled", "expected") or cfg.fisher not in ("probe", "loop"):
        raise ValueError(
            f"--ratio-of '{cfg.ratio_of}' must be sampled or expected, "
            f"--fisher '{cfg.fisher}' probe or loop"
        )
    if (cfg.rule == "replay") != (cfg.replay is not None):
        raise ValueError("--rule replay and --replay RUN go together: give both or neither")
    if cfg.rules_table:
        check_table(cfg)
    if cfg.rule == "ratio" and cfg.rank and cfg.steps <= cfg.every:
        raise ValueError(
            f"--steps {cfg.steps} ends before the first probe, --every {cfg.every}: no rank would "
            "grow; raise --steps or lower --every"
        )
    if not 0 <= cfg.rank <= cfg.capacity:
        raise ValueError(f"--rank {cfg.rank} is outside 0..{cfg.capacity} (--capacity {cfg.capacity})")
    if cfg.rank == 0 and cfg.rule == "fixed":
        raise ValueError("--rank 0 with --rule fixed would train nothing; use --rank 1 or more")
    if not 0 <= cfg.lam < 1e9:
        raise ValueError(f"--lam {cfg.lam} must be in [0,1e9)")
    given_rates(cfg)
    check_used(cfg)


def check_used(cfg):
    """ValueError where settings would change nothing, or leave a rule no choice."""
    default = type(cfg)()
    unused = [] if cfg.rules_table else ["rows", "budgets"]
    if cfg.rules_table:
        unused = ["rule", "rank", "budget"]
    elif cfg.rule in ("fixed", "replay"):
        unused += ["budget"]
    elif cfg.rule not in GROWING:
        unused += ["rank"]
    for key in unused:
        value = getattr(cfg, key)
        if value != getattr(default, key):
            place = "--rules-table" if cfg.rules_table else f"--rule {cfg.rule}"
            raise ValueError(f"--{key} {value}: {place} has no use for it")


def check_table(cfg):
    """ValueError where the rows of --rules-table cannot be made."""
    budgets = cfg.budgets
    if not budgets or len({*budgets}) < len(budgets) or min(budgets) < 0:
        raise ValueError(f"--budgets {budgets} must name at least one rank, or 0, and none twice")
    if max(budgets) > cfg.capacity:
        raise ValueError(f"--budgets has rank {max(budgets)}; the limit is --capacity {cfg.capacity}")
    known = {*PLANNED, *GROWN}
    if alien := [row for row in cfg.rows if row not in known]:
        raise ValueError(f"--rows '{alien[0]}' is not known; use {', '.join(sorted(known))}")
    for row, source in (("shuffled", "probe-svd"), ("replay", "ratio"), ("random-grown", "ratio")):
        if row in cfg.rows and source not in cfg.rows:
            raise ValueError(f"--rows {row} needs the row of {source} too")


def check_budget(cfg, cost):
    """ValueError where --budget buys less than the rule needs; `cost`: rank 1 in every layer."""
    if cfg.budget and cfg.budget < cost:
        raise ValueError(
            f"--budget {cfg.budget:,} is below the {cost:,} parameters that rank 1 in every layer costs"
        )
    budget = cfg.budget or 2 * cost
    most = max(cfg.budgets) * cost if cfg.rules_table else budget
    if cfg.rule == "probe-svd" or cfg.rules_table:
        if most >= cfg.capacity * cost:
            raise ValueError(
                f"a budget of {most:,} parameters fills the --capacity {cfg.capacity} of every layer: "
                "nothing is left to choose; raise --capacity"
            )
    spent = cfg.rank * cost
    limited = cfg.rule in GROWING and (cfg.budget or cfg.rule != "ratio")
    if limited and not cfg.rules_table and budget <= spent:
        raise ValueError(
            f"--rank {cfg.rank} in every layer costs {spent:,}, and rule '{cfg.rule}' may spend "
            f"{budget:,}: nothing is left to grow; lower --rank or raise --budget"
        )


def check_adapters(cfg, model):
    """`Refused` where targets, budget or ranks to replay do not fit the denoiser; returns ({layer:
    what a rank costs}, {seed: ranks to replay}, a line that says what is adapted)."""
    total = sum(p.numel() for p in model.parameters())
    with refusing():
        inject(model, cfg.targets or None, 0, cfg.capacity)
        costs = {name: adapter_cost(layer) for name, layer in adapters(model).items()}
        cost = sum(costs.values())
        check_budget(cfg, cost)
    replay = {}
    if cfg.replay:
        finished = checkpoint.read_json(cfg.replay / "metrics.json")
        with refusing(f"--replay {cfg.replay}"):
            replay = replayed(finished, cfg.seeds, model)
    line = (
        f"denoiser: {total:,} parameters, {len(costs)} layers adapted; an adapter of rank 1 has "
        f"{cost:,} parameters, one of rank {cfg.capacity} has {cfg.capacity * cost:,}"
    )
    return costs, replay, line


def work_ahead(cfg, jobs):
    """How many trainings follow, at the least: a line."""
    given = given_rates(cfg)
    trained = [job for job in jobs if job.rule != "unadapted"]
    runs = len(trained) * cfg.seeds
    runs += (len(GRID) - 1) * sum(job.rule not in given for job in trained)
    return f"at least {runs} runs of {cfg.steps} steps"


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
        raise ValueError(f"has {len(runs)} seeds; --seeds {seeds} needs {seeds}")
    for ranks in runs[:seeds]:
        try:
            set_ranks(copy.deepcopy(model), ranks)
        except ValueError as error:
            raise ValueError(f"a run of another model: {error}") from None
    return dict(enumerate(runs[:seeds]))
