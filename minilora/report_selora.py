"""What train_selora.py shows: metrics.json, the table, sentences computed from it, and the ranks.

Skip this file when you read for a method."""

import textwrap

import numpy as np

from minilora import data, metrics, report
from minilora.words import coverage


def describe_pairs(studies, drawable, parts, config, size):
    """What a run of train_selora.py works on, as lines; drawable: rows of the target that have
    their image; parts {seed: split}; config: the denoiser's; size: of the images."""
    for role, study in studies.items():
        worded = int(study.have()[:, 1].sum())
        yield f"{role}: {study.name}{report.provenance(study)}, {len(study)} samples, {worded} with words"
        yield f"  words: {coverage(study.notes, config['buckets'], config['positions'])}"
        yield from report.resized(study, size)
    missing = len(studies["target"]) - len(drawable)
    if missing:
        yield f"left out: {missing} samples of the target that lack their image"
    for seed, split in parts.items():
        yield f"seed {seed}: pairs to " + ", ".join(f"{k} {len(rows)}" for k, rows in split.items())


REFERENCES = ("unadapted", "full")  # rows without an adapter, between which the others stand


def selora_metrics(cfg, ctx, judges, results, on_source):
    """The content of metrics.json. ctx: the `Context` of train_selora.py, judges {seed: what
    `judge.described` gives} or {}, results {method: [content of its adapter file per seed]},
    on_source: what the judge says of the base on its own domain, or {}."""
    target = ctx.target
    methods = {}
    for name, runs in results.items():
        methods[name] = over_seeds([run["result"] for run in runs])
        for key in ("adapter_params", "word_params", "trainable_params", "ranks", "history"):
            methods[name][key] = [r[key] for r in runs]
        rate, tried = ctx.rates[name]
        methods[name]["rule"] = runs[0]["rule"]
        methods[name]["lr"] = rate
        methods[name]["lr_grid"] = {f"{k:g}": loss for k, loss in tried.items()}
    verdict = None
    if judges:
        each = [judges[seed] for seed in range(cfg.seeds)]
        verdict = {
            "run": str(cfg.judge),
            "features": "mean last token of the frozen ViT of train_mora.py",
            "n": each[0]["n"],
            "floor": [one["floor"] for one in each],
            "nearest": [one["nearest"] for one in each],
            "base on its source": on_source,
        }
        for row in ("ceiling", "chance", "autoencoder"):
            verdict[row] = over_seeds([one[row] for one in each])
    return {
        "format": 1,
        "kind": "selora",
        "data": target.name,
        "synthetic": target.synthetic,
        "synthetic_notes": target.synthetic_notes,
        "seeds": list(range(cfg.seeds)),
        "budgets": list(cfg.budgets) if cfg.rules_table else [],
        "guidance": cfg.guidance,
        "methods": methods,
        "judge": verdict,
    }


def over_seeds(each):
    """{measure: [its value per seed]} of a dictionary per seed; a measure that a seed lacks is left
    out."""
    return {name: [one[name] for one in each] for name in each[0] if all(name in o for o in each)}


def base_table(result):
    """What the judge says of the base on held-out images of its own domain, beside what bounds it:
    where quality is lost before anything is adapted."""
    rows = {
        "real images": result["ceiling"] | {"frechet": result["floor"]},
        "through the autoencoder": result["autoencoder"],
        "drawn by the base": result["base"],
        "the same, words ignored": ignored(result["base"]),
        "most common answer": result["chance"],
    }
    names = ["frechet", *result["ceiling"]]
    lines = [f"the base on its own domain, {result['n']} held-out images"]
    lines.append(f"{'':26s}" + "".join(f"{name:>10s}" for name in names))
    for row, values in rows.items():
        lines.append(f"{row:26s}" + "".join(f"{number(values.get(k)):>10s}" for k in names))
    return "\n".join(lines)


def ignored(verdict):
    """{fact: agreement of images that were drawn without the words}."""
    suffix = ", words ignored"
    return {k.removesuffix(suffix): v for k, v in verdict.items() if k.endswith(suffix)}


def number(value):
    """A number as a table shows it, '-' for none; the mean of a list."""
    return "-" if value is None else f"{np.mean(value):.3f}"


def selora_table(content, timings):
    """Held-out denoising loss per method, x 1e5, mean ± sample standard deviation over seeds; the gap
    closed between the unadapted base and full fine-tuning; and what the judge finds."""
    judge = content["judge"]
    columns = []
    if judge:
        columns = ["frechet", "nearest", *(k for k in judge["ceiling"] if "," not in k)]
    header = f"{'method':22s}{'held-out':>14s}{'adapter':>10s}{'gap closed':>12s}{'lr':>8s}{'seconds':>9s}"
    header += "".join(f"{c:>10s}" for c in columns)
    title = f"{content['data']}, {data.origin(content)}; held-out denoising loss x 1e5"
    lines = ["", f"{title}, seeds: {len(content['seeds'])}", header]
    references = [content["methods"].get(name, {}).get("heldout_loss") for name in REFERENCES]
    unadapted, full = map(np.array, references)
    for name, method in content["methods"].items():
        loss = np.array(method["heldout_loss"])
        closed = "-"
        if references[1] and (full < unadapted).all():
            closed = f"{(unadapted - loss).mean() / (unadapted - full).mean():.0%}"
        parameters = spent(method)
        runs = [f"{name}-s{s}-{method['lr']:g}" for s in content["seeds"]]
        seconds = np.mean([timings.get(run, 0.0) for run in runs])
        line = f"{name:22s}{metrics.spread(loss * 1e5, 0):>14s}{parameters:10,.0f}{closed:>12s}"
        line += f"{method['lr']:8g}{seconds:9.1f}"
        lines.append(line + "".join(f"{np.mean(method[c]):10.3f}" for c in columns))
    if judge:
        lines += judge_lines(judge, columns, content["methods"])
    return "\n".join([*lines, "", *selora_conclusion(content)])


def spent(method):
    """Parameters of the adapters and of the words that were trained with them, mean over seeds."""
    return np.mean(method["adapter_params"]) + np.mean(method["word_params"])


def judge_lines(judge, columns, methods):
    """The rows below the methods that bound what the judge can say, what the columns are, and
    agreement by words that the base knew or not, and with no words at all."""
    real = judge["ceiling"] | {"frechet": judge["floor"], "nearest": judge["nearest"]}
    bounds = {
        "through the autoencoder": judge["autoencoder"],
        "real images": real,
        "most common answer": judge["chance"],
    }
    for row, values in bounds.items():
        yield f"{row:75s}" + "".join(f"{number(values.get(c)):>10s}" for c in columns)
    yield (
        f"judge: {judge['n']} held-out rows. frechet: of the {judge['features']} (not Inception FID: "
        "compare rows here);"
    )
    yield (
        "nearest: distance to the nearest training image, grey levels; the others: how often a "
        "linear reader finds what the words state."
    )
    yield "new words: the base was not pretrained on one of them; ignored: the same noise, guidance 0."
    for measure in next(iter(methods.values())):
        if "," in measure:
            each = [f"{name} {number(method.get(measure))}" for name, method in methods.items()]
            if measure in real:
                each.append(f"real {number(real[measure])}")
            line = f"{measure}: {', '.join(each)}"
            yield textwrap.fill(line, 120, subsequent_indent="    ")


def selora_conclusion(content):
    """Sentences computed from the table: what adapting and growing gained, paired by seed."""
    methods = content["methods"]
    if content["budgets"]:
        return table_conclusion(content)
    name = next(k for k in methods if k not in REFERENCES)
    method = methods[name]
    unadapted, full = (np.array(methods[k]["heldout_loss"]) for k in REFERENCES)
    gap = unadapted - full
    lines = []
    if (gap > 0).all():
        closed = (unadapted - np.array(method["heldout_loss"])).mean() / gap.mean()
        lines.append(
            f"{name} closes {closed:.0%} of the gap between the frozen base and full fine-tuning "
            f"with {spent(method):,.0f} parameters instead of "
            f"{methods['full']['trainable_params'][0]:,}."
        )
    else:
        lines.append(
            "Full fine-tuning does not beat the frozen base on every seed: there is no gap to close."
        )
    lines += [compared(content, (name, other)) for other in REFERENCES]
    if any(len(history) > 1 for history in method.get("history", [])):
        lines.append(
            "Whether growing was worth it, only a comparison at equal parameters can say: --rules-table."
        )
    return lines


def compared(content, names, measure="heldout_loss", label=""):
    """The verdict on a measure of two methods; losses are x 1e5."""
    values = [np.array(content["methods"][name][measure]) for name in names]
    if not measure.endswith("loss"):
        less = measure in ("frechet", "nearest")
        return label + metrics.verdict(*values, names, less=less)
    return label + metrics.verdict(*(v * 1e5 for v in values), names, less=True, digits=0)


# Pairs of rows of --rules-table that are compared at each budget; pictures too of the first ones.
PAIRS = (
    ("probe-svd", "uniform"),
    ("probe-svd", "shuffled"),
    ("ratio", "uniform"),
    ("probe-svd", "inverse-cost"),
    ("ratio", "replay"),
    ("ratio", "random-grown"),
    ("neyman", "uniform"),
    ("neyman", "inverse-cost"),
    ("random", "uniform"),
    ("oracle", "uniform"),
)
PICTURED = 3


def table_conclusion(content):
    """The lines on every budget of the rules table."""
    methods = content["methods"]
    lines = [
        "Differences of held-out loss x 1e5, on the test rows. Every row has its own rate, picked by "
        "validation rows that test nothing.",
        "A tenth of the steps of probe-svd and shuffled goes to a probe, and each batch that a plan "
        "looks at counts as a step. The oracle, which trains twice, is charged nothing: no rule "
        "could afford it.",
    ]
    if 1 in content["budgets"]:
        lines.append(
            "ratio starts at rank 1 in every layer, so at that budget it is uniform: it has no row."
        )
    endings = [f" r{rank}" if rank else " as ratio" for rank in content["budgets"]]
    for ending in endings:
        rows = {name.removesuffix(ending): name for name in methods if name.endswith(ending)}
        if ending == " as ratio" and "ratio" in methods:
            rows["ratio"] = "ratio"
        if rows:
            spent_here = np.mean(methods[next(iter(rows.values()))]["adapter_params"])
            lines.append(f"Budget{ending}, {spent_here:,.0f} parameters:")
        for k, pair in enumerate(PAIRS):
            if all(rule in rows for rule in pair):
                names = [rows[rule] for rule in pair]
                lines += pair_conclusion(content, names, pictured=k < PICTURED)
        if {"probe-svd", "uniform", "shuffled"} <= {*rows}:
            lines.append("  " + confirmation(content, rows))
    return lines


def confirmation(content, rows):
    """The criterion that was set before: probe-svd has to be below uniform ranks, and below its own
    ranks shuffled, on nine seeds of ten. rows {rule: name of its row}."""
    loss = {rule: np.array(content["methods"][name]["heldout_loss"]) for rule, name in rows.items()}
    wins = [int((loss["probe-svd"] < loss[other]).sum()) for other in ("uniform", "shuffled")]
    n = len(loss["uniform"])
    if n - min(wins) > max(1, n // 10):
        passed = "not passed"
    else:
        passed = "passed" if n >= 10 else "not decided with fewer than 10 seeds"
    return (f"The criterion for {rows['probe-svd']}, below uniform and below shuffled on at least 9 "
            f"of 10 seeds: {wins[0]} and {wins[1]} of {n}, {passed}.")


def pair_conclusion(content, names, pictured):
    """The lines on two rows: test loss, and what the judge finds."""
    yield "  " + compared(content, names)
    if pictured and content["judge"]:
        for measure in ("frechet", *content["judge"]["ceiling"]):
            if "," not in measure:
                yield compared(content, names, measure, f"    {measure}: ")


SORTS = {
    "text.": "text encoder",
    "to_tokens": "attention, pixels",
    "to_words": "attention, words",
    "mlp": "MLP",
    "time": "timestep",
    "prompt": "timestep",
    "gate": "timestep",
    "skip": "convolution 1x1",
}


def sort_of(layer):
    """What sort of layer a name belongs to."""
    for part, sort in SORTS.items():
        if part in layer:
            return sort
    return "convolution 3x3"


def mean_ranks(content):
    """{method: {sort of layer: mean final rank over layers and seeds}}."""
    means = {}
    for name, method in content["methods"].items():
        sorts = {}
        for ranks in method["ranks"]:
            for layer, rank in ranks.items():
                sorts.setdefault(sort_of(layer), []).append(rank)
        if sorts:
            means[name] = {sort: float(np.mean(ranks)) for sort, ranks in sorts.items()}
    return means


def rank_figure(content, steps, path):
    """Rank per layer over the steps of the first rule that grows at seed 0, if there is one, and
    final ranks by sort of layer; without matplotlib the latter as text."""
    means = mean_ranks(content)
    plt = report.pyplot()
    if plt is None:
        for name, sorts in means.items():
            print(f"{name}: mean rank by kind of layer")
            for sort, rank in sorts.items():
                print(f"  {sort:20s} {rank:4.1f} {'█' * round(4 * rank)}")
        return print("no figures: pip install 'minilora[pictures]' draws them")
    histories = {name: content["methods"][name]["history"][0] for name in means}
    grown = [name for name, history in histories.items() if len(history) > 1]
    if grown:
        fig, (left, right) = plt.subplots(1, 2, figsize=(12, 6.2), dpi=120, width_ratios=(1.5, 1))
        draw_history(fig, left, histories[grown[0]], steps)
        left.set(xlabel="step", title=f"{grown[0]}, seed 0: rank of each layer")
    else:
        fig, right = plt.subplots(figsize=(7, 6.2), dpi=120)
    draw_bars(right, means)
    fig.suptitle(f"{content['data']}, {data.origin(content)}", fontsize=9)
    report.save_figure(fig, path)


def draw_history(fig, ax, history, steps):
    """A row per layer, coloured by its rank at each step; history [[step, {layer: rank}], ...]."""
    layers = list(history[0][1])
    over = np.zeros((len(layers), steps), int)
    for step, ranks in history:
        over[:, step:] = np.array([ranks[layer] for layer in layers])[:, None]
    top = max(2, over.max())
    image = ax.imshow(
        over, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=top
    )
    labels = [layer.replace("unet.", "") for layer in layers]
    ax.set_yticks(range(len(layers)), labels, fontsize=5)
    fig.colorbar(image, ax=ax, ticks=range(top + 1))


def draw_bars(ax, means):
    """Mean ranks by sort of layer, a bar for each of the first seven methods."""
    sorts = list(next(iter(means.values())))
    methods = list(means)[:7]
    height = 0.8 / len(methods)
    for i, method in enumerate(methods):
        place = np.arange(len(sorts)) + (i - (len(methods) - 1) / 2) * 0.8 / len(methods)
        ax.barh(place, [means[method][sort] for sort in sorts], height, label=method)
    ax.set_yticks(range(len(sorts)), sorts, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="rank, mean over layers and seeds", title="final ranks by kind of layer")
    if len(methods) > 1:
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
