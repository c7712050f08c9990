"""What train_mora.py shows: metrics.json, tables, sentences computed from them, and figures; and
what both scripts draw with.

A figure needs the `pictures` extra; without it, text or an array takes its place. Skip this file
when you read for a method."""

import io
import textwrap

import numpy as np

from minilora import data, metrics
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


def resized(study, size):
    """A line where the study's images are not of the size that is used, or none."""
    if study.images is not None and study.images.shape[1:3] != (size, size):
        high, wide = study.images.shape[1:3]
        yield (f"images: {wide}x{high} pixels in the file, resized to {size}x{size}; "
               "--image-size sets another size")


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
                ax.set_xlabel(captions[column], fontsize=7)
        line[0].set_ylabel(textwrap.fill(label, 18), fontsize=8)
    for ax, text in zip(axes[0], tops):
        ax.set_title(textwrap.fill(text[:90], 20), fontsize=8)
    fig.suptitle(title, fontsize=9)
    save_figure(fig, path)


# ---- MoRA


FEW = 100  # test samples below which a run says that they are few


def describe(study, draws, config):
    """What a run of train_mora.py works on, as lines; draws {seed: what `task.draw_task` gives};
    config: the ViT's."""
    unlabelled = int((~study.labelled).sum())
    yield (
        f"{study.name}{provenance(study)}: {len(study)} samples ({unlabelled} unlabelled, left out); "
        f"{', '.join(study.modalities)}; classes {', '.join(study.class_names)}"
    )
    yield from resized(study, config["image_size"])
    if study.notes is not None and "vocabulary" not in config:
        yield f"words: {coverage(study.notes, config['buckets'], config['positions'])}"
    for seed, draw in draws.items():
        yield f"seed {seed}: " + ", ".join(f"{k} {len(rows)}" for k, rows in draw["parts"].items())
        for text, present in draw["tables"].items():
            patterns = [data.pattern_name(row, study.modalities) for row in present]
            names, counts = np.unique(patterns, return_counts=True)
            yield f"  {text}: " + ", ".join(f"{n} {c}" for n, c in zip(names, counts))
    fewest = min(len(draw["parts"]["test"]) for draw in draws.values())
    if fewest < FEW:
        yield f"few test samples: {fewest}, each answer changes accuracy by {1 / fewest:.3f}"


def mora_metrics(cfg, study, results, picked, ranks, simple):
    """The content of metrics.json. results {method: [content of its adapter file per seed]}, picked
    {method: (learning rate, {rate: validation macro-F1})}, ranks {method: [{layer: rank} per
    seed]}, simple {baseline: [result per seed]}."""
    methods = {}
    for method, runs in results.items():
        methods[method] = over_tests([run["result"] for run in runs])
        rate, tried = picked[method]
        methods[method] |= {k: [r["counts"][k] for r in runs] for k in runs[0]["counts"]}
        methods[method] |= {
            "val_macro_f1": [r["result"]["val"]["macro_f1"] for r in runs],
            "lr": rate,
            "lr_grid": {f"{k:g}": v for k, v in tried.items()},
            "ranks": ranks[method],
        }
    content = {
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
        "baselines": {name: over_tests(runs) for name, runs in simple.items()},
    }
    if study.fixed_split is not None and "mora" in results:
        rows = {method: [run["result"] for run in runs] for method, runs in results.items()}
        content["over_samples"] = over_samples(study, rows | simple)
    return content


def over_tests(results):
    """The scores of one row of the table over seeds: those of the first missing table, and all in
    'by_test'."""
    texts = results[0]["by_test"]
    tests = {text: by_seed([result["by_test"][text] for result in results]) for text in texts}
    first = next(iter(tests.values()))
    return {k: v for k, v in first.items() if k != "by_pattern"} | {"by_test": tests}


def over_samples(study, rows):
    """{row: `metrics.paired_samples` of MoRA and the row}: where there is one split, seeds do not
    show how much depends on which samples it tests."""
    test = np.flatnonzero((study.fixed_split == 2) & study.labelled)
    labels = study.labels[test]
    groups = data.groups(study)[test]

    def probabilities(results):
        first = [next(iter(result["by_test"].values())) for result in results]
        return np.array([scores["probabilities"] for scores in first])  # [seeds,n,C]

    ours = probabilities(rows["mora"])
    others = {name: probabilities(results) for name, results in rows.items() if name != "mora"}
    return {name: metrics.paired_samples(labels, ours, p, groups=groups) for name, p in others.items()}


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


def mora_table(content, timings):
    """The comparison as text, a block per test row: mean ± sample standard deviation over seeds, and
    the difference to head-only with its 95% interval."""
    lines = []
    for text in next(iter(content["methods"].values()))["by_test"]:
        lines += ["", mora_title(content, text), *mora_block(content, timings, text)]
    return "\n".join([*lines, "", *mora_conclusion(content)])


def mora_title(content, text):
    """What a block of the table is about."""
    title = (
        f"{content['data']}, {data.origin(content)}: trained with {content['missing']} missing, "
        f"tested with {text}; absent: {content['absent']}; head: {content['head']}; "
        f"seeds: {len(content['seeds'])}"
    )
    if content["train_share"] < 1:
        title += f"; {content['train_share']:.0%} of the training split"
    if content["augment"]:
        title += f"; added studies {content['augment']}"
    return title


def mora_block(content, timings, text):
    """The lines of one test row of the table, its header first."""
    rows = content["methods"] | content["baselines"]
    blocks = {name: row["by_test"][text] for name, row in rows.items()}
    patterns = next(iter(blocks.values()))["by_pattern"]
    header = f"{'method':24s}{'macro-F1':>14s}{'AUROC':>14s}  accuracy with"
    header += "".join(f" {p:>7s}" for p in patterns)
    header += f"{'adapter':>9s}{'trainable':>11s}{'lr':>7s}{'seconds':>9s}"
    if "head" in blocks:
        header += "  macro-F1 minus head's [95% interval]"
    lines = [header]
    for name, row in rows.items():
        block = blocks[name]
        scores = [metrics.spread(block[key]) for key in ("macro_f1", "auroc")]
        line = f"{name:24s}{scores[0]:>14s}{scores[1]:>14s}{'':15s}"
        for p in patterns:
            width = max(7, len(p))
            accuracies = block["by_pattern"].get(p, {"accuracy": []})["accuracy"]
            accuracies = [a for a in accuracies if a is not None]
            line += f" {np.mean(accuracies):{width}.3f}" if accuracies else f" {'-':>{width}s}"
        if "lr" in row:
            jobs = [f"{name}-s{seed}-{row['lr']:g}" for seed in content["seeds"]]
            seconds = np.mean([timings.get(job, 0.0) for job in jobs])
            line += f"{row['adapter_params'][0]:9,d}{row['trainable_params'][0]:11,d}"
            line += f"{row['lr']:7g}{seconds:9.1f}"
        else:
            line += f"{'-':>9s}{'-':>11s}{'-':>7s}{'-':>9s}"
        if "head" in blocks and name != "head":
            line += f"  {difference(block['macro_f1'], blocks['head']['macro_f1'])}"
        lines.append(line.rstrip())
    return lines


def difference(ours, theirs, digits=3):
    """'+0.068 [+0.055, +0.081]' of paired scores, without the interval for one seed."""
    result = metrics.paired(ours, theirs)
    text = f"{result['mean']:+.{digits}f}"
    if result["n"] > 1:
        text += f" [{result['low']:+.{digits}f}, {result['high']:+.{digits}f}]"
    return text


CONTROLS = {
    "head": "head-only",
    "lora": "lora, the plain LoRA branch with the same number of parameters",
    "mora-open": "mora-open, which is told that all is present",
    "mora-shuffled": "mora-shuffled, which is told another sample's pattern",
    "full": "full fine-tuning",
    "linear: words, numbers": "a linear model on words and numbers",
    "linear: and pixels": "a linear model on words, numbers and small pictures",
    "linear: absent left out": "the same, with what is absent left out instead of filled",
    "prompt": "prompts that are told the pattern, with as many parameters or slightly more",
    "larger class": "always the larger class",
}


def mora_conclusion(content):
    """Sentences from the first test row: what adapting gains, and whether knowing the pattern does."""
    rows = content["methods"] | content.get("baselines", {})
    scores = {name: row["macro_f1"] for name, row in rows.items()}
    seeds = len(content["seeds"])
    lines = []
    for name, description in CONTROLS.items():
        if "mora" not in scores or name not in scores:
            continue
        if np.isnan([scores["mora"], scores[name]]).any():
            continue  # no finding of a seed's test split has a positive
        if seeds == 1:
            gap = difference(scores["mora"], scores[name])
            lines.append(f"MoRA minus {description}: {gap} macro-F1.")
        else:
            names = ("MoRA", description)
            lines.append(metrics.verdict(scores["mora"], scores[name], names, " macro-F1"))
        if name in content.get("over_samples", {}):
            r = content["over_samples"][name]
            lines.append(f"  Over the {r['n']} test samples of the one split: 95% interval "
                         f"{r['low']:+.3f} to {r['high']:+.3f}.")
    if seeds == 1:
        lines.append("One seed: an illustration, not evidence.")
    left_out = next(iter(content["methods"].values())).get("without_positive")
    if left_out:
        each = ", ".join(map(str, left_out))
        lines.append(f"Macro-F1 leaves out the findings without a positive in the test split "
                     f"({each} by seed).")
    if content["synthetic_notes"]:
        lines.append(
            "The notes are synthetic notes, made from the labels: this says nothing about real reports."
        )
    return lines


def mora_figure(content, path):
    """Macro-F1 per method, each seed a dot; with several test rows a line per method, banded from
    seed to seed."""
    plt = pyplot()
    if plt is None:
        return print(f"no figure: pip install 'minilora[pictures]' draws {path.name}")
    methods = dict(content["methods"])
    for name, row in content["baselines"].items():
        if name != "larger class":  # so low that the others could not be told apart
            methods[name] = row
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
        ax.set_xticks(range(len(methods)), list(methods), rotation=20, ha="right", fontsize=8)
        ax.set_xlim(-0.6, len(methods) - 0.4)
    ax.set_ylabel("macro-F1 on the test split")
    title = f"{content['data']}, {data.origin(content)}; trained with {content['missing']} missing"
    seeds = len(content["seeds"])
    ax.set_title(f"{title}; {seeds} seed{'s' if seeds > 1 else ''}", fontsize=9)
    ax.grid(axis="y", alpha=0.3)
    save_figure(fig, path)


def table_order(text):
    """Where TYPE:RATE stands in a figure: by type, then by rate."""
    kind, _, rate = text.partition(":")
    return kind, float(rate)
