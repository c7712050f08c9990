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
