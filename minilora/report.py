"""What the two training scripts show: metrics.json, tables, sentences computed from them, and
figures.

A figure needs the `pictures` extra; without it, text or an array takes its place. Skip this file
when you read for a method."""

import io
import textwrap

import numpy as np

from minilora import data
from minilora.words import coverage


def pyplot():
    """matplotlib's, or None where the `pictures` extra is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(fig, path):
    """Write a figure and free it."""
    fig.tight_layout()
    fig.savefig(path)
    pyplot().close(fig)
    print(f"figure: {path}")


def provenance(study):
    """How a study is synthetic, in brackets, or ''."""
    if study.synthetic_notes:
        return " with synthetic notes"
    return ", synthetic" if study.synthetic else ""


# ---- MoRA


def describe(study, draws, config):
    """What a run of train_mora.py works on, as lines; draws {seed: what `task.draw_task` gives};
    config: the ViT's."""
    unlabelled = int((~study.labelled).sum())
    yield (
        f"{study.name}{provenance(study)}: {len(study)} samples ({unlabelled} unlabelled, left out); "
        f"{', '.join(study.modalities)}; classes {', '.join(study.class_names)}"
    )
    if study.notes is not None and "vocabulary" not in config:
        yield f"words: {coverage(study.notes, config['buckets'], config['positions'])}"
    for seed, draw in draws.items():
        yield f"seed {seed}: " + ", ".join(f"{k} {len(rows)}" for k, rows in draw["parts"].items())
        for text, present in draw["tables"].items():
            patterns = [data.pattern_name(row, study.modalities) for row in present]
            names, counts = np.unique(patterns, return_counts=True)
            yield f"  {text}: " + ", ".join(f"{n} {c}" for n, c in zip(names, counts))


def mora_metrics(cfg, study, results, picked, ranks):
    """The content of metrics.json. results {method: [content of its adapter file per seed]}, picked
    {method: (learning rate, {rate: validation macro-F1})}, ranks {method: [{layer: rank} per
    seed]}."""
    methods = {}
    for method, runs in results.items():
        texts = runs[0]["result"]["by_test"]
        tests = {text: by_seed([r["result"]["by_test"][text] for r in runs]) for text in texts}
        rate, tried = picked[method]
        first = next(iter(tests.values()))
        methods[method] = {k: v for k, v in first.items() if k != "by_pattern"}
        methods[method] |= {k: [r["counts"][k] for r in runs] for k in runs[0]["counts"]}
        methods[method] |= {
            "val_macro_f1": [r["result"]["val"]["macro_f1"] for r in runs],
            "lr": rate,
            "lr_grid": {f"{k:g}": v for k, v in tried.items()},
            "ranks": ranks[method],
            "by_test": tests,
        }
    return {
        "format": 1,
        "kind": "mora",
        "data": study.name,
        "synthetic": study.synthetic,
        "synthetic_notes": study.synthetic_notes,
        "absent": cfg.absent,
        "head": cfg.head,
        "missing": cfg.missing,
        "seeds": list(range(cfg.seeds)),
        "train_share": cfg.train_share,
        "augment": cfg.augment,
        "methods": methods,
    }


def by_seed(rows):
    """The scores of one test row: lists over seeds instead of a list of dictionaries."""
    result = {k: [r[k] for r in rows] for k in ("macro_f1", "auroc", "accuracy")}
    left_out = [r.get("without_positive", 0) for r in rows]
    if any(left_out):
        result["without_positive"] = left_out
    result["by_pattern"] = {}
    for name in sorted({n for r in rows for n in r["by_pattern"]}):
        each = [r["by_pattern"].get(name, {"n": 0, "accuracy": None}) for r in rows]
        result["by_pattern"][name] = {k: [e[k] for e in each] for k in ("n", "accuracy")}
    return result


def spread(values):
    """'mean±standard deviation' over seeds, or '-' where a value is not a number."""
    if np.isnan(values).any():
        return "-"
    text = f"{np.mean(values):.3f}"
    return f"{text}±{np.std(values):.3f}" if len(values) > 1 else text


def mora_table(report, timings):
    """The comparison as text, a block per test row: mean ± standard deviation over seeds, and
    differences per seed."""
    lines = []
    for text in next(iter(report["methods"].values()))["by_test"]:
        lines += ["", mora_title(report, text), *mora_block(report, timings, text)]
    return "\n".join([*lines, "", *mora_conclusion(report)])


def mora_title(report, text):
    """What a block of the table is about."""
    title = (
        f"{report['data']}, {data.origin(report)}: trained with {report['missing']} missing, "
        f"tested with {text}; absent: {report['absent']}; head: {report['head']}; "
        f"seeds: {len(report['seeds'])}"
    )
    if report["train_share"] < 1:
        title += f"; {report['train_share']:.0%} of the training split"
    if report["augment"]:
        title += f"; synthetic studies {report['augment']}"
    return title


def mora_block(report, timings, text):
    """The lines of one test row of the table, its header first."""
    methods = report["methods"]
    blocks = {name: method["by_test"][text] for name, method in methods.items()}
    patterns = next(iter(blocks.values()))["by_pattern"]
    header = f"{'method':14s}{'macro-F1':>12s}{'AUROC':>12s}  accuracy with"
    header += "".join(f" {p:>7s}" for p in patterns)
    header += f"{'adapter':>9s}{'trainable':>11s}{'lr':>7s}{'seconds':>9s}"
    if "head" in blocks:
        header += "  macro-F1 minus head's, per seed"
    lines = [header]
    for name, method in methods.items():
        block = blocks[name]
        line = f"{name:14s}{spread(block['macro_f1']):>12s}{spread(block['auroc']):>12s}{'':15s}"
        for p in patterns:
            width = max(7, len(p))
            accuracies = block["by_pattern"].get(p, {"accuracy": []})["accuracy"]
            accuracies = [a for a in accuracies if a is not None]
            line += f" {np.mean(accuracies):{width}.3f}" if accuracies else f" {'-':>{width}s}"
        jobs = [f"{name}-s{seed}-{method['lr']:g}" for seed in report["seeds"]]
        seconds = np.mean([timings.get(job, 0.0) for job in jobs])
        line += f"{method['adapter_params'][0]:9,d}{method['trainable_params'][0]:11,d}"
        line += f"{method['lr']:7g}{seconds:9.1f}  "
        if "head" in blocks and name != "head":
            pairs = zip(block["macro_f1"], blocks["head"]["macro_f1"])
            line += " ".join(f"{a - b:+.3f}" for a, b in pairs)
        lines.append(line.rstrip())
    return lines


CONTROLS = {
    "head": "head-only",
    "lora": "lora, the plain LoRA branch with the same number of parameters",
    "mora-open": "mora-open, which is told that all is present",
    "mora-shuffled": "mora-shuffled, which is told another sample's pattern",
    "full": "full fine-tuning",
}


def mora_conclusion(report):
    """Sentences from the first test row: what adapting gains, and whether knowing the pattern does."""
    scores = {name: np.array(method["macro_f1"]) for name, method in report["methods"].items()}
    seeds = len(report["seeds"])
    lines = []
    for name, description in CONTROLS.items():
        if "mora" not in scores or name not in scores:
            continue
        difference = scores["mora"] - scores[name]
        if np.isnan(difference).any():
            continue  # no finding of a seed's test split has a positive
        wins = int((difference > 0).sum())
        count = f"{wins} of {seeds} seeds, mean"
        if seeds == 1:
            verdict = "is above" if wins else "is NOT above"
            count = "one seed"
        elif wins == seeds:
            verdict = "beats"
        else:
            verdict = "does NOT beat" if difference.mean() <= 0 else "does NOT reliably beat"
        mean = f"{difference.mean():+.3f} macro-F1"
        lines.append(f"MoRA {verdict} {description} ({count} {mean}).")
    if seeds == 1:
        lines.append("One seed: an illustration, not evidence.")
    left_out = next(iter(report["methods"].values())).get("without_positive")
    if left_out:
        each = ", ".join(map(str, left_out))
        lines.append(f"Macro-F1 leaves out the findings without a positive in the test split "
                     f"({each} by seed).")
    if report["synthetic_notes"]:
        lines.append(
            "The notes are synthetic notes, made from the labels: this says nothing about real reports."
        )
    return lines


def mora_figure(report, path):
    """Macro-F1 per method, each seed a dot; with several test rows a line per method, banded from
    seed to seed."""
    plt = pyplot()
    if plt is None:
        return print(f"no figure: pip install 'minilora[pictures]' draws {path.name}")
    methods = report["methods"]
    tests = sorted(next(iter(methods.values()))["by_test"], key=table_order)
    fig, ax = plt.subplots(figsize=(6.4, 3.8), dpi=120)
    for i, (name, method) in enumerate(methods.items()):
        values = np.array([method["by_test"][t]["macro_f1"] for t in tests])  # [tests, seeds]
        color = f"C{i}"
        if len(tests) > 1:
            ax.plot(tests, values.mean(1), marker="o", color=color, label=name)
            ax.fill_between(tests, values.min(1), values.max(1), color=color, alpha=0.15, lw=0)
        else:
            # Dots, for bars would have to start at 0.
            ax.plot(i, values.mean(), "_", ms=34, color=color)
            ax.plot([i] * values.shape[1], values[0], "o", ms=5, color=color)
    if len(tests) > 1:
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        ax.set_xlabel("missing at test time")
    else:
        ax.set_xticks(range(len(methods)), list(methods), rotation=20)
        ax.set_xlim(-0.6, len(methods) - 0.4)
    ax.set_ylabel("macro-F1 on the test split")
    title = f"{report['data']}, {data.origin(report)}; trained with {report['missing']} missing"
    ax.set_title(f"{title}; {len(report['seeds'])} seed(s)", fontsize=9)
    ax.grid(axis="y", alpha=0.3)
    save_figure(fig, path)


def table_order(text):
    """Where TYPE:RATE stands in a figure: by type, then by rate."""
    kind, _, rate = text.partition(":")
    return kind, float(rate)


# ---- SeLoRA


def describe_pairs(studies, drawable, config):
    """What a run of train_selora.py works on, as lines; drawable: rows of the target that have
    their image; config: the denoiser's."""
    for role, study in studies.items():
        worded = int(study.have()[:, 1].sum())
        yield f"{role}: {study.name}{provenance(study)}, {len(study)} samples, {worded} with words"
        yield f"  words: {coverage(study.notes, config['buckets'], config['positions'])}"
    missing = len(studies["target"]) - len(drawable)
    if missing:
        yield f"left out: {missing} samples of the target that lack their image"


REFERENCES = ("unadapted", "full")  # rows without an adapter, between which the others stand


def selora_metrics(cfg, target, judges, results, on_source):
    """The content of metrics.json. judges {seed: what `judge.described` gives} or {}, results
    {method: [content of its adapter file per seed]}, on_source: what the judge says of the base on
    its own domain, or {}."""
    methods = {}
    for name, runs in results.items():
        methods[name] = over_seeds([run["result"] for run in runs])
        for key in ("adapter_params", "word_params", "trainable_params", "ranks", "history"):
            methods[name][key] = [r[key] for r in runs]
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


def selora_table(report, timings):
    """Held-out denoising loss per method, x 1e5, mean ± standard deviation over seeds; the gap
    closed between the unadapted base and full fine-tuning; and what the judge finds."""
    judge = report["judge"]
    columns = []
    if judge:
        columns = ["frechet", "nearest", *(k for k in judge["ceiling"] if "," not in k)]
    header = f"{'method':22s}{'held-out':>14s}{'adapter':>10s}{'gap closed':>12s}{'seconds':>9s}"
    header += "".join(f"{c:>10s}" for c in columns)
    title = f"{report['data']}, {data.origin(report)}; held-out denoising loss x 1e5"
    lines = ["", f"{title}, seeds: {len(report['seeds'])}", header]
    unadapted, full = (np.array(report["methods"][k]["heldout_loss"]) for k in REFERENCES)
    for name, method in report["methods"].items():
        loss = np.array(method["heldout_loss"])
        closed = "-"
        if (full < unadapted).all():
            closed = f"{(unadapted - loss).mean() / (unadapted - full).mean():.0%}"
        parameters = spent(method)
        seconds = np.mean([timings.get(f"{name}-s{s}", 0.0) for s in report["seeds"]])
        line = f"{name:22s}{loss.mean() * 1e5:9.0f} ±{loss.std() * 1e5:3.0f}{parameters:10,.0f}"
        line += f"{closed:>11s} {seconds:9.1f}"
        lines.append(line + "".join(f"{np.mean(method[c]):10.3f}" for c in columns))
    if judge:
        lines += judge_lines(judge, columns, report["methods"])
    return "\n".join([*lines, "", *selora_conclusion(report)])


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
        yield f"{row:67s}" + "".join(f"{number(values.get(c)):>10s}" for c in columns)
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


def selora_conclusion(report):
    """Sentences computed from the table: what adapting and growing gained, paired by seed."""
    methods = report["methods"]
    budgets = [b for b in ("r1", "r2", "as ratio") if f"neyman {b}" in methods]
    if budgets:
        return [line for budget in budgets for line in budget_conclusion(report, budget)]
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
    if any(len(history) > 1 for history in method.get("history", [])):
        lines.append(
            "Whether growing was worth it, only a comparison at equal parameters can say: --rules-table."
        )
    if len(report["seeds"]) == 1:
        lines.append("One seed: an illustration, not evidence.")
    return lines


def budget_conclusion(report, budget):
    """The lines on one budget of the rules table: the validation half's choice, and differences."""
    methods = report["methods"]
    loss = {name: np.array(method["heldout_loss"]) * 1e5 for name, method in methods.items()}
    names = [name for name in methods if name.endswith(f" {budget}")]
    best = min(names, key=lambda name: np.mean(methods[name]["val_loss"]))
    parameters = np.mean(methods[f"neyman {budget}"]["adapter_params"])
    least = min(loss[name].mean() for name in names)
    yield (
        f"At {parameters:,.0f} parameters the validation half chooses {best} "
        f"({loss[best].mean():.0f} on the test half; least there: {least:.0f})"
    )
    pairs = [("neyman", other) for other in ("fixed", "cheapest", "inverse-cost")]
    if budget == "as ratio":
        pairs += [("ratio", other) for other in ("replay", "neyman", "random")]
    else:
        pairs += [("gain", other) for other in ("fixed", "cheapest", "neyman")]
    for rule, other in pairs:
        ours = rule if rule == "ratio" else f"{rule} {budget}"
        other = f"{other} {budget}"
        if other not in methods:
            continue
        difference = loss[ours] - loss[other]
        each = " ".join(f"{x:+.0f}" for x in difference)
        better = int((difference < 0).sum())
        yield (
            f"  {ours} minus {other}: {each}, mean {difference.mean():+.0f}, "
            f"better on {better} of {len(report['seeds'])} seeds"
        )


SORTS = {
    "text.": "text encoder",
    "to_pixels": "attention, pixels",
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


def mean_ranks(report):
    """{method: {sort of layer: mean final rank over layers and seeds}}."""
    means = {}
    for name, method in report["methods"].items():
        sorts = {}
        for ranks in method["ranks"]:
            for layer, rank in ranks.items():
                sorts.setdefault(sort_of(layer), []).append(rank)
        if sorts:
            means[name] = {sort: float(np.mean(ranks)) for sort, ranks in sorts.items()}
    return means


def rank_figure(report, steps, path):
    """Rank per layer over the steps of the first rule at seed 0, and final ranks by sort of layer;
    without matplotlib the latter as text."""
    means = mean_ranks(report)
    plt = pyplot()
    if plt is None:
        for name, sorts in means.items():
            print(f"{name}: mean rank by kind of layer")
            for sort, rank in sorts.items():
                print(f"  {sort:20s} {rank:4.1f} {'█' * round(4 * rank)}")
        return print("no figures: pip install 'minilora[pictures]' draws them")
    name = next(iter(means))
    history = report["methods"][name]["history"][0]
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 6.2), dpi=120, width_ratios=(1.5, 1))
    draw_history(fig, left, history, steps)
    left.set(xlabel="step", title=f"{name}, seed 0: rank of each layer")
    draw_bars(right, means)
    fig.suptitle(f"{report['data']}, {data.origin(report)}", fontsize=9)
    save_figure(fig, path)


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


def grid(path, title, tops, rows):
    """A picture of pictures; without matplotlib an .npy array of them.

    rows [(label, uint8 images [n,S,S] or [n,S,S,3], n captions or None)]; tops: n texts above the
    columns."""
    plt = pyplot()
    if plt is None:
        path = path.with_suffix(".npy")
        buffer = io.BytesIO()
        np.save(buffer, np.stack([images for _, images, _ in rows]))
        data.write_atomic(path, buffer.getvalue())
        return print(f"pictures: {path}")
    n = len(rows[0][1])
    size = (1.5 * n + 1.2, 1.55 * len(rows) + 0.9)
    fig, axes = plt.subplots(len(rows), n, figsize=size, dpi=110, squeeze=False)
    for line, (label, images, captions) in zip(axes, rows):
        for column, (ax, image) in enumerate(zip(line, images)):
            ax.imshow(image, cmap="gray", vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
            if captions:
                ax.set_xlabel(captions[column], fontsize=6)
        line[0].set_ylabel(textwrap.fill(label, 18), fontsize=8)
    for ax, text in zip(axes[0], tops):
        ax.set_title(textwrap.fill(text[:90], 22), fontsize=6)
    fig.suptitle(title, fontsize=9)
    save_figure(fig, path)
