"""Every published number, from the command to the page. Skip it when you read for a method.

    python docs/results.py run                 # all that is missing in docs/results/, two at a time; it resumes
    python docs/results.py run mora-phantoms   # some of it
    python docs/results.py write               # docs/results.md, and the tables in README.md, from docs/results/

A run of the list below writes its folder under runs/results/. What the pages need of its metrics goes into
docs/results/NAME.json, with the commands, the version, the machine and the time that it took; a file that is there
already is not made again: delete it first. X-rays are no part of the project: runs that need covid_cxr.npz or
pneumoniamnist.npz are skipped where --data does not hold them (docs/covid_chestxray.md says what they are).
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minilora import data, metrics, report, report_selora  # noqa: E402

FOLDER = ROOT / "docs/results"
RUNS = Path("runs/results")
DIGITS = 5  # significant ones that are kept


@dataclass
class Published:
    """One or more commands, and the file that the last one writes its numbers to."""

    name: str
    commands: list
    file: str = ""  # under runs/results/; '' is a step that others need
    needs: tuple = ()


def mora(name, *settings):
    """A command of train_mora.py."""
    return ["train_mora.py", "--out", f"{RUNS}/{name}", "--resume", *settings]


def selora(name, *settings):
    """A command of train_selora.py."""
    return ["train_selora.py", "--out", f"{RUNS}/{name}", "--resume", *settings]


TEN = ("--seeds", "10")
SIX = ("--seeds", "6")  # of which a sign test can just show a difference: p = .031 where all agree
GENERATOR = ("--lr", "0.01", "full:0.001")  # that of ratio, which draws, is what the default run of train_selora.py picks
SMALL = ("--phantoms", "4000")
SCARCE = (*SMALL, "--train-share", "0.1", "--methods", "mora", "full", *TEN)
JUDGE = [
    "train_mora.py", "--out", f"{RUNS}/judge", "--methods", "head", "--seeds", "1", "--lr", "head:0.03",
    "--phantoms", "4000", "--steps", "400", "--pretrain-steps", "600", "--resume",
]  # fmt: skip
XRAY_JUDGE = [
    "train_mora.py", "--data", "{data}/covid_cxr.npz", "--source", "{data}/pneumoniamnist.npz", "--modalities", "image",
    "--seeds", "1", "--methods", "head", "--lr", "head:0.01", "--out", f"{RUNS}/judge-xrays", "--resume",
]  # fmt: skip
XRAYS = ("--data", "{data}/covid_cxr.npz", "--source", "{data}/pneumoniamnist.npz", "--synthetic-notes", "--no-grain")


def filling(name, fact, *share):
    """The commands of one study in which missing images are filled in: the study, a diagnoser, a generator that sees
    what the diagnoser's missing table left, both exported, and the comparison."""
    study = f"{RUNS}/{name}.npz"
    diagnoser = f"{RUNS}/{name}-mora"
    generator = f"{RUNS}/{name}-selora"
    compare = ["--missing", "any:0.7", "--synthesizer", f"{generator}/onnx", "--scores", f"{RUNS}/{name}.json"]
    return [
        ["-m", "minilora.studies", "phantoms", "--samples", "8000", "--fact", fact, "--out", study],
        mora(f"{name}-mora", "--data", study, "--methods", "mora", "--seeds", "1", *share),
        selora(f"{name}-selora", "--data", study, "--seeds", "1", "--table", diagnoser, *GENERATOR, *share),
        ["export.py", "mora", diagnoser],
        ["export.py", "selora", generator],
        ["export.py", "predict", f"{diagnoser}/onnx", "--data", study, "--split", f"{diagnoser}/split-s0.npz", *compare],
    ]


FIRST = ("--test-missing", "any:0.7", "any:0", "any:0.3", "any:0.5", "any:0.9")
# `prompt` is the other method that is told the pattern, beside MoRA.
FILL = ("--absent", "fill", "--methods", "head", "lora", "mora", "mora-open", "prompt", "full")
LABEL = (*FILL, "--missing", "label:0.7", "--test-missing", "any:0.7", "label:0.7")
PNEUMONIA = ("--data", "{data}/pneumoniamnist.npz", "--synthetic-notes")
COVID = ("--data", "{data}/covid_cxr.npz", "--steps", "200")


def published(name, command, *needs):
    """A result of one training command."""
    return Published(name, [command], f"{name}/metrics.json", needs)


def ranks(name, judge, *settings, rows=()):
    """A table of rules at equal parameters."""
    sizes = ("--width", "32", "--steps", "300", "--judge", f"{RUNS}/{judge}")
    command = selora(name, "--rules-table", *SIX, *rows, *sizes, *settings)
    return published(name, command, judge)


PUBLISHED = [
    Published("judge", [JUDGE]),
    Published("judge-xrays", [XRAY_JUDGE]),
    published("mora-phantoms", mora("mora-phantoms", *TEN, *FIRST)),
    published("mora-fill", mora("mora-fill", *TEN, *FILL)),
    published("mora-label", mora("mora-label", *TEN, *LABEL)),
    published("mora-pneumonia", mora("mora-pneumonia", *SIX, *PNEUMONIA)),
    published("mora-covid", mora("mora-covid", *SIX, *COVID)),
    published("selora-phantoms", selora("selora-phantoms", *SIX, "--judge", f"{RUNS}/judge"), "judge"),
    ranks("ranks-phantoms", "judge",
          rows=("--rows", "uniform", "random", "neyman", "probe-svd", "shuffled", "oracle", "ratio", "replay")),
    # The control of neyman, which looks at no data; on the same splits, from the same base.
    ranks("ranks-phantoms-cost", "judge", "--budgets", "1", "2", "3", "--rows", "inverse-cost"),
    ranks("ranks-xrays-cost", "judge-xrays", *XRAYS, "--buckets", "8192", "--budgets", "1", "2", "3", "--rows", "inverse-cost"),
    ranks("ranks-xrays", "judge-xrays", *XRAYS, "--buckets", "8192", "--budgets", "1", "2", "3", "--rows", "uniform",
          "neyman", "probe-svd", "shuffled", "ratio"),
    published("scarce-none", mora("scarce-none", *SCARCE)),
    Published("scarce-generator", [selora("scarce-generator", *SMALL, "--train-share", "0.1", *TEN, *GENERATOR,
                                          "--table", f"{RUNS}/scarce-none")], needs=("scarce-none",)),
    published("scarce-random", mora("scarce-random", *SCARCE, "--augment", "random:1000")),
    published("scarce-class", mora("scarce-class", *SCARCE, "--augment", "class:1000")),
    published("scarce-own", mora("scarce-own", *SCARCE, "--augment", "own:1000")),
    published("scarce-drawn", mora("scarce-drawn", *SCARCE, "--augment", f"{RUNS}/scarce-generator:1000"),
              "scarce-generator"),
    Published("peft-phantoms", [["tests/bench/peft_ranks.py", "--out", f"{RUNS}/peft-phantoms", *SIX, "--resume", "--rows", "uniform", "neyman", "peft-lora", "adalora"]],
              "peft-phantoms/results.json"),
    Published("fill-usual", filling("fill-usual", "usual"), "fill-usual.json"),
    Published("fill-image", filling("fill-image", "image"), "fill-image.json"),
    Published("fill-both", filling("fill-both", "both", "--train-share", "0.1"), "fill-both.json"),
]


# ---- run


def python(command, settings):
    """The command line of one of our commands."""
    return [sys.executable, *(part.replace("{data}", str(settings.data)) for part in command)]


def shown(command):
    """A command as a reader would type it."""
    return " ".join(["python", *(part.replace("{data}", "DATA") for part in command)])


def machine():
    """What a duration depends on, and what the last digits of a result may depend on."""
    import torch

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return f"{name}, 1 thread a run; Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"


def version():
    """Of the package, and the commit."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return f"minilora 0.1.0, commit {answer.stdout.strip() or 'unknown'}"


def kept(value):
    """Metrics without what no page shows, and numbers rounded."""
    if isinstance(value, dict):
        return {key: kept(v) for key, v in value.items() if key not in ("history", "ranks", "probabilities")}
    if isinstance(value, list):
        return [kept(v) for v in value]
    if isinstance(value, float) and np.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    return value


def seconds_of(command):
    """What a training command took, over all its sittings: the sum of its runs."""
    path = Path(command[command.index("--out") + 1] if "--out" in command else "") / "timings.json"
    return sum(json.loads(path.read_text()).values()) if path.is_file() else 0


def run_one(one, settings):
    """Run the commands of a result and keep its numbers; returns a line that says how it went."""
    target = FOLDER / f"{one.name}.json"
    needed = {f for command in one.commands for f in ("covid_cxr.npz", "pneumoniamnist.npz") if f in str(command)}
    for name in needed:
        if not (settings.data / name).is_file():
            return f"{one.name}: SKIPPED, --data {settings.data} does not hold {name}"
    if "peft_ranks" in str(one.commands) and not find_spec("peft"):
        return f"{one.name}: SKIPPED, no PEFT: pip install -c constraints.txt -e '.[bench]'"
    started = time.monotonic()
    RUNS.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(RUNS / f"{one.name}.log", "a") as log:
        for command in one.commands:
            if command[0] == "-m" and Path(command[-1]).is_file():
                continue  # a study that was drawn before
            line = python(command, settings)
            if not command[0].startswith("-"):
                line[1] = str(ROOT / command[0])
            code = subprocess.run(line, stdout=log, stderr=log, env=environment).returncode
            if code:
                return f"{one.name}: FAILED with code {code}, see {log.name}"
    if one.file and not target.is_file():
        content = {
            "commands": [shown(command) for command in one.commands],
            "version": version(),
            "machine": machine(),
            "training seconds": round(sum(seconds_of(command) for command in one.commands)),
            "result": kept(json.loads((RUNS / one.file).read_text())),
        }
        data.write_atomic(target, json.dumps(content) + "\n")
    return f"{one.name}: done in {time.monotonic() - started:.0f} s"


def run_all(settings):
    """Run what is missing of the results that are asked for, and what these need."""
    by_name = {one.name: one for one in PUBLISHED}
    order = []

    def want(name):
        for other in by_name[name].needs:
            want(other)
        if name not in order:
            order.append(name)

    for name in settings.names:
        if name not in by_name:
            raise data.Refused(f"result '{name}' is not known; there are {', '.join(by_name)}")
    for name in settings.names or by_name:
        if by_name[name].file and not (FOLDER / f"{name}.json").is_file():
            want(name)
    futures = {}
    with ThreadPoolExecutor(settings.at_once) as pool:

        def work(name):
            for other in by_name[name].needs:
                futures[other].result()
            line = run_one(by_name[name], settings)
            print(line, flush=True)
            return line

        for name in order:  # what is needed stands before what needs it, so that nobody waits for ever
            futures[name] = pool.submit(work, name)
    if any("FAILED" in future.result() for future in futures.values()):
        raise SystemExit(1)


# ---- write


def read_results():
    """{name: what docs/results/ holds of it}."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def table(header, rows):
    """Lines of a table in Markdown."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def interval(ours, theirs, digits=3):
    """'+0.068 [+0.055, +0.081]' and p of the sign test, for paired scores."""
    text = report.difference(ours, theirs, digits)
    p = metrics.paired(ours, theirs)["p"]
    return f"{text}, p {p:.2g}" if len(ours) > 1 else text


def mora_rows(result, text=None):
    """The rows of a run of train_mora.py under one of its test tables, the first by default."""
    text = text or next(iter(next(iter(result["methods"].values()))["by_test"]))
    rows = result["methods"] | result["baselines"]
    scores = {name: row["by_test"][text] for name, row in rows.items()}
    for name, row in rows.items():
        score = scores[name]
        patterns = [[a for a in pattern["accuracy"] if a is not None] for pattern in score["by_pattern"].values()]
        accuracy = " / ".join(f"{np.mean(each):.3f}" for each in patterns if each)
        cells = [f"`{name}`" if "lr" in row else name, metrics.spread(score["macro_f1"]), metrics.spread(score["auroc"])]
        cells += [accuracy if len(patterns) <= 3 else ""]
        cells += [f"{row['adapter_params'][0]:,}", f"{row['lr']:g}"] if "lr" in row else ["", ""]
        for other in ("head", "mora"):
            sign = name != other and other in scores
            pair = (score["macro_f1"], scores[other]["macro_f1"]) if sign else None
            if other == "mora" and pair:
                pair = pair[::-1]
            cells.append(interval(*pair) if pair else "")
        yield cells


def mora_table(result, text=None):
    """The table of a run of train_mora.py."""
    first = next(iter(result["methods"].values()))["by_test"]
    patterns = next(iter(first.values()))["by_pattern"]
    names = f"accuracy: {' / '.join(patterns)}" if len(patterns) <= 3 else ""
    header = ["method", "macro-F1", "AUROC", names, "parameters", "rate", "minus head-only", "MoRA minus it"]
    return table(header, mora_rows(result, text))


def about(content):
    """The commands and the place of a result."""
    yield "```"
    yield from content["commands"]
    yield "```"
    yield ""
    seconds = content["training seconds"]
    yield f"*{content['version']}; {content['machine']}; {seconds / 60:,.0f} minutes of training.*"
    yield ""


def mora_section(name, results):
    """The section of a run of train_mora.py: commands, a table for each test table, sentences."""
    content = results[name]
    result = content["result"]
    yield from about(content)
    texts = [*next(iter(result["methods"].values()))["by_test"]]
    for text in texts:
        yield f"Trained with {result['missing']} missing, tested with {text}:"
        yield ""
        yield from mora_table(result, text)
        yield ""
    for line in report.mora_conclusion(result):
        yield f"- {line.strip()}"
    yield ""
    if len(texts) > 2:
        yield "![macro-F1 against the share of samples that lack a modality](mora.png)"
        yield ""
        yield "*Macro-F1 by how many test samples lack the image or the report; band: lowest to highest seed.*"
        yield ""


AWARENESS = {
    "mora-phantoms": "absent tokens are hidden",
    "mora-fill": "absent inputs are filled",
    "mora-label": "filled; in training by the label",
}
LINEAR = {"linear: and pixels": "linear: words, small pictures", "linear: absent left out": "the same, absent left out"}


def awareness_table(results):
    """When knowing the pattern pays: a column for each condition."""
    shown_runs = {name: title for name, title in AWARENESS.items() if name in results}
    scores = {}  # {method: [scores per seed of each condition]}
    for name in shown_runs:
        run = results[name]["result"]
        found = run["methods"] | run["baselines"]
        for method in ("head", "lora", "mora-open", "mora", "full", "prompt", *LINEAR):
            # Where absent tokens are hidden, there is no row of prompts, and linear models leave them out.
            scores.setdefault(method, []).append(found[method]["macro_f1"] if method in found else None)
    rows = []
    for method, each in scores.items():
        rows.append([LINEAR.get(method, f"`{method}`"), *(metrics.spread(v) if v else "" for v in each)])
    for other in ("lora", "mora-open"):
        gaps = [report.difference(ours, theirs) for ours, theirs in zip(scores.get("mora", []), scores.get(other, []))]
        rows.append([f"`mora` minus `{other}`", *gaps])
    hidden = results.get("mora-phantoms")
    if hidden:
        plain = hidden["result"]["methods"]["lora"]["macro_f1"]
        gaps = [report.difference(ours, plain) for ours in scores["mora"]]
        rows.append(["`mora` minus `lora` of column 1", *gaps])
    return table(["macro-F1", *shown_runs.values()], rows)


SCARCE_ROWS = {
    "scarce-none": "nothing added",
    "scarce-random": "1,000 with the real image of a random other patient",
    "scarce-class": "1,000 with the real image of another patient of their class",
    "scarce-drawn": "1,000 with an image drawn from their words",
    "scarce-own": "1,000 with their own real image, withheld anew (of those only that have both)",
}


def scarce_table(results):
    """Synthetic studies beside few real ones, and their controls."""
    rows = []
    for method in ("mora", "full"):
        each = {n: results[n]["result"]["methods"][method] for n in SCARCE_ROWS if n in results}
        for name, row in each.items():
            gaps = ["" if name == other or other not in each else
                    interval(row["macro_f1"], each[other]["macro_f1"]) for other in ("scarce-none", "scarce-random")]
            cells = [f"`{method}`", SCARCE_ROWS[name], metrics.spread(row["macro_f1"]), metrics.spread(row["auroc"])]
            rows.append([*cells, f"{row['lr']:g}", *gaps])
    return table(["method", "added", "macro-F1", "AUROC", "rate", "minus nothing added", "minus random images"], rows)


def selora_table(result, brief=False):
    """The table of a run of train_selora.py: losses x 1e5, and what the judge says. brief: without the rates, what it says
    where the words are ignored, the nearest training images, and real images that no autoencoder has seen."""
    methods = result["methods"]
    judge = result["judge"]
    facts = [name for name in judge["ceiling"] if "," not in name] if judge else []
    # A table of rules has no images that were drawn without words.
    ignored = [f"{fact}, words ignored" for fact in facts if f"{fact}, words ignored" in next(iter(methods.values()))]
    header = ["", "held-out loss x 1e5", "trained parameters", "rate"]
    if judge:
        header += ["Frechet distance", *(f"{fact} found" for fact in facts), *ignored]
        header += ["nearest"]
    rows = []
    for name, method in methods.items():
        row = [f"`{name}`", metrics.spread(np.array(method["heldout_loss"]) * 1e5, 0)]
        row += [f"{np.mean(method['adapter_params']) + np.mean(method['word_params']):,.0f}"]
        if name == "full":
            row[-1] = f"{np.mean(method['trainable_params']):,.0f}"
        row += [f"{method['lr']:g}" if name != "unadapted" else ""]
        if judge:
            row += [judged_cell(method, key) for key in ("frechet", *facts, *ignored)]
            row += [judged_cell(method, "nearest", 1)]
        rows.append(row)
    if judge:
        real = judge["ceiling"] | {"frechet": judge["floor"], "nearest": judge["nearest"]}
        bounds = {"real images through the autoencoder": judge["autoencoder"], "real images": real,
                  "most common answer": judge["chance"]}  # fmt: skip
        for name, values in bounds.items():
            cells = [judged_cell(values, key) for key in ("frechet", *facts)] + [""] * len(ignored)
            rows.append([name, "", "", "", *cells, judged_cell(values, "nearest", 1)])
    if brief:
        places = [k for k, title in enumerate(header) if title not in ("rate", "nearest", *ignored)]
        header = [header[k] for k in places]
        rows = [[row[k] for k in places] for row in rows if row[0] != "real images"]
    return table(header, rows)


def judged_cell(values, key, digits=3):
    """Mean ± deviation of a measure, or ''."""
    return metrics.spread(np.array(values[key]), digits) if key in values else ""


def selora_section(name, results):
    """The section of a run of train_selora.py."""
    content = results[name]
    yield from about(content)
    yield from selora_table(content["result"])
    yield ""
    lines = [line.strip() for line in report_selora.selora_conclusion(content["result"])]
    if content["result"]["budgets"]:
        yield "Of the comparisons of pictures (Frechet distance and what is found), only those that show a difference are listed."
        yield ""
        lines = [line for line in lines if not re.match(r"\w+: No difference", line)]
    yield from (f"- {line}" for line in lines)
    yield ""


def peft_section(name, results):
    """The section of tests/bench/peft_ranks.py."""
    content = results[name]
    yield from about(content)
    result = content["result"]
    rows = [["not adapted", metrics.spread(np.array(result["unadapted"]) * 1e5, 0), "0", "0", ""]]
    for rank, methods in result["budgets"].items():
        for row, values in methods.items():
            counts = [f"{np.mean(values[key]):,.0f}" for key in ("parameters", "trained")]
            loss = metrics.spread(np.array(values["test"]) * 1e5, 0)
            rows.append([f"`{row}` r{rank}", loss, *counts, f"{values['rate']:g}"])
    yield from table(["", "held-out loss x 1e5", "parameters", "parameters at the start", "rate"], rows)
    yield ""
    yield from (f"- {line}" for line in result["sentences"])
    yield ""


def filling_table(result):
    """The rows of one comparison of `export.py predict --synthesizer`, and its sentences."""
    rows = []
    for name, scores in result["rows"].items():
        rows.append([name, *(f"{scores[key]:.3f}" for key in ("macro_f1", "auroc", "accuracy"))])
    yield from table([f"{result['samples']} samples", "macro-F1", "AUROC", "accuracy"], rows)
    yield ""
    for comparison in result["comparisons"]:
        yield f"- {comparison['sentence']}"


def filling_section(names, results):
    """Missing images filled in: rows of scores, and comparisons."""
    for name, about_study in names.items():
        if name not in results:
            continue
        yield f"### {about_study}"
        yield ""
        yield from about(results[name])
        yield from filling_table(results[name]["result"]["filled_in"])
        yield ""


HEAD = """# Results

Every number on this page comes from a command that stands above it. `make results` runs those whose numbers are missing
in `docs/results/` (up to 5 hours on 2 cores; it resumes), and writes this page from that folder: nobody types a number.
The commit that is named is the one at which a result was finished.

- **Mean ± sample standard deviation over seeds.** A seed draws training and test rows, the missing table, the initial
  adapter and the batches. The validation rows are the same for all seeds and test nothing.
- **Differences are paired by seed**: mean [95% interval by Student's t], p of the exact two-sided sign test. A method
  "beats" another where p is below .05, which takes all of 6 seeds, or 9 of 10, and the interval lies on the same side of
  0; else no difference is shown. Seeds share samples: the intervals allow for it (Nadeau and Bengio, 2003), the sign test
  does not, so its p speaks of new seeds on the same data.
- **Many comparisons**: what was asked beforehand is MoRA against `lora` and `mora-open` in each of three conditions, `probe-svd`
  against equal ranks, and drawn studies against none and against random images. All other comparisons are exploratory: at
  10 seeds one in 46 would come out by chance where nothing differs.
- **Rates**: every method has its own learning rate, the best on the validation rows at seed 0 of a grid that is widened
  while the best lies at its edge. It is picked at one seed: neighbouring rates often differ by less than seeds do.
- **Columns**: "parameters" are those of the adapter alone: 0 for `head`, which trains pooler and head as every method does,
  and for `full`, which trains all weights. "Rate" is the learning rate. "Minus head-only" is the row minus `head`, "MoRA
  minus it" is MoRA minus the row. -0.000 is below 0 by less than is shown. Macro-F1 is the mean over classes of the harmonic
  mean of precision and recall, AUROC the area under the curve of true against false positives.
- **Controls**: the larger class, linear models without any transformer, random images, shuffled and random ranks.
- "Phantoms" are synthetic chest studies drawn by a program: what holds there need not hold in a hospital.
"""

WHEN = """MoRA's branch is told which modalities a sample has. That can help by at most the mutual information between
the label and the pattern of presence, given what the adapter sees: where the input shows the pattern by itself, as hidden
or constant tokens do, there is nothing to gain. `lora` is the plain branch with the same number of parameters, and
`mora-open` is MoRA told that everything is present. That MoRA reaches the optimum of a linear model with a closed form,
where both of these cannot, is a unit test (`tests/test_mora.py`)."""

RANKS_TEXT = """Held-out loss x 1e5 of each rule minus that of equal ranks at the same number of adapter parameters: mean
[95% interval], p of the sign test; below 0 is better. `shuffled` are the ranks of `probe-svd`, permuted among layers of
equal cost; `inverse-cost` gives cheap layers more and looks at no data; `replay` starts with the ranks that `ratio` ends
with; `oracle` trains once to find its ranks, and is charged nothing for it. At rank 1's budget `ratio` has nothing to
choose, and of higher budgets it leaves a part unspent: the last column has equal ranks at what it spends without a limit.
What the judge finds in the pictures stands in the tables above. Rates are picked by the loss, which hardly shows whether
pictures follow the words: compare there what is found. Where real images do not beat the most common answer, as on the
X-rays, what is found says nothing."""

SCARCE_TEXT = """A tenth of the training samples of 4,000 phantoms, 70% of which lack their image or report, and 1,000
studies more. Each takes the words and the label of a training sample whose words the missing table left. The generator was
adapted at each seed to pairs that the table left whole, and to nothing else."""

PARTS = [
    ("MoRA", [
        ("mora-phantoms", "Phantoms (synthetic), image and report", mora_section),
        ("mora-fill", "Phantoms, absent inputs filled with another sample's", mora_section),
        ("mora-label", "Missing depends on the label in training, not in the test", mora_section),
        ("mora-pneumonia", "PneumoniaMNIST: real images, synthetic notes", mora_section),
        ("mora-covid", "COVID-19 X-rays: real images, notes and numbers", mora_section),
    ]),
    ("SeLoRA", [
        ("selora-phantoms", "Phantoms (synthetic)", selora_section),
        ("ranks-phantoms", "Which ranks: phantoms", selora_section),
        ("ranks-phantoms-cost", "Which ranks: phantoms, by cost alone", selora_section),
        ("ranks-xrays", "Which ranks: X-rays", selora_section),
        ("ranks-xrays-cost", "Which ranks: X-rays, by cost alone", selora_section),
        ("peft-phantoms", "Which ranks: beside PEFT, on the linear layers of phantoms", peft_section),
    ]),
]  # fmt: skip
FILLED = {
    "fill-usual": "Words and image each say a part",
    "fill-both": "Words and image both show the deciding fact; 10% of the training samples",
    "fill-image": "Only the image shows the deciding fact",
}


def page(results):
    """The text of docs/results.md."""
    lines = [HEAD]
    for part, sections in PARTS:
        lines += [f"## {part}", ""]
        if part == "MoRA":
            lines += ["### When knowing the pattern pays", "", WHEN, "", *awareness_table(results), "",
                      "The commands of its columns stand in the next three sections.", ""]
        for name, title, section in sections:
            if name in results:
                lines += [f"### {title}", "", *section(name, results)]
        if part == "SeLoRA" and {*RANKS} & {*results}:
            picture = "![each rule's loss minus that of equal ranks](ranks.png)"
            lines += ["### Which ranks: all studies", "", RANKS_TEXT, "", picture, "", *ranks_block(results), ""]
    lines += ["## Both together", "", "### Synthetic studies beside few real ones", "", SCARCE_TEXT, ""]
    generator = next(one for one in PUBLISHED if one.name == "scarce-generator")
    for name in SCARCE_ROWS:
        commands = results.get(name, {"commands": []})["commands"]
        if commands and name == "scarce-drawn":
            commands = [shown(generator.commands[0]), *commands]
        lines += [f"`{command}`  " for command in commands]
    lines += ["", *scarce_table(results), ""]
    lines += filling_section(FILLED, results)
    missing = [f"`{one.name}`" for one in PUBLISHED if one.file and one.name not in results]
    if missing:
        lines += ["## Not measured yet", "", f"`make results` runs what is missing here: {', '.join(missing)}.", ""]
    return "\n".join(lines).rstrip() + "\n"


# ---- the tables of README.md


NOT_YET = ["Not measured yet."]


def sentences(lines):
    """A list in Markdown."""
    return ["", *(f"- {line.strip()}" for line in lines)]


def selora_block(results):
    """Table and sentences of the default run of train_selora.py; the page of results has more columns."""
    if "selora-phantoms" not in results:
        return NOT_YET
    result = results["selora-phantoms"]["result"]
    return [*selora_table(result, brief=True), *sentences(report_selora.selora_conclusion(result)[:1])]


RANKS = {"ranks-phantoms": "phantoms", "ranks-xrays": "X-rays"}
RANK_PAIRS = (("neyman", "inverse-cost"), ("probe-svd", "shuffled"), ("probe-svd", "inverse-cost"))  # each and its control
RANKS_SHOWN = ("probe-svd", "shuffled", "inverse-cost", "neyman", "random", "ratio", "random-grown", "replay", "oracle")


def ranks_block(results):
    """Each rule's loss minus that of uniform ranks, for each study and budget."""
    columns = rank_losses(results)
    if not columns:
        return NOT_YET
    header = ["", *(f"{title}, {BUDGETS[budget]}" for title, budget in columns)]
    rows = [["uniform: mean", *(f"{losses['uniform'].mean():.0f}" for losses in columns.values())]]
    for rule in RANKS_SHOWN:
        cells = [interval(x[rule], x["uniform"], 0) if rule in x else "" for x in columns.values()]
        if any(cells):
            rows.append([f"`{rule}`", *cells])
    lines = []
    for ours, theirs in RANK_PAIRS:
        for (title, budget), losses in columns.items():
            if {ours, theirs} <= {*losses}:
                names = (f"{ours} {budget}", f"{theirs} {budget}")
                lines.append(f"{title}: {metrics.verdict(losses[ours], losses[theirs], names, less=True, digits=0)}")
    return [*table(header, rows), *sentences(lines)]


def stands(ours, theirs, less=False):
    """'better than', 'worse than' or 'not shown to differ from', as `metrics.shown` says of paired scores."""
    above = metrics.shown(metrics.paired(ours, theirs))
    if above is None:
        return "not shown to differ from"
    return "better than" if above != less else "worse than"


def found_mora(results):
    """What hiding and filling do, with MoRA and with plain LoRA."""
    hidden, filled = (results[name]["result"]["methods"] for name in ("mora-phantoms", "mora-fill"))
    told, plain = (filled[method]["macro_f1"] for method in ("mora", "lora"))
    told_hidden, plain_hidden = (hidden[method]["macro_f1"] for method in ("mora", "lora"))
    linear = results["mora-phantoms"]["result"]["baselines"]["linear: and pixels"]["macro_f1"]
    advice = ": hide what is missing where you can" if stands(plain_hidden, told) == "better than" else ""
    return (
        f"**MoRA.** Where a missing image or report is replaced by another patient's, MoRA, which is told what is missing, is "
        f"{stands(told, plain)} a plain LoRA adapter of the same size ({report.difference(told, plain)} macro-F1). Where it is "
        f"hidden instead, MoRA is {stands(told_hidden, plain_hidden)} plain LoRA ({report.difference(told_hidden, plain_hidden)}). "
        f"Hiding with plain LoRA is {stands(plain_hidden, told)} filling with MoRA "
        f"({report.difference(plain_hidden, told)}){advice}. A linear model on words and small pictures is "
        f"{stands(linear, plain_hidden)} both ({report.difference(linear, plain_hidden)})."
    )


PLANNED = {"ratio": "`ratio`, the paper's rule,", "probe-svd": "`probe-svd`", "neyman": "`neyman`",
           "inverse-cost": "`inverse-cost`, a control that looks at no data,"}


def found_selora(results):
    """How often which ranks are better than equal ones, and by how much at the parameters of rank 2."""
    columns = rank_losses(results)
    parts = []
    never_worse = {}  # {rule that is never worse: share of cases in which it is better}
    for rule, title in PLANNED.items():
        said = [stands(losses[rule], losses["uniform"], less=True) for losses in columns.values() if rule in losses]
        if not said:
            continue
        better, worse = said.count("better than"), said.count("worse than")
        if better and not worse:
            never_worse[rule] = better / len(said)
        at_two = [f"{report.difference(losses[rule], losses['uniform'], 0)} on {study}"
                  for (study, budget), losses in columns.items() if budget == "r2" and rule in losses]
        parts.append(f"{title} is better in {better} and worse in {worse} of {len(said)} cases ({'; '.join(at_two)})")
    advice = "No rule is to be preferred."
    if never_worse:
        advice = f"`--rule {max(never_worse, key=never_worse.get)}` is better most often, and never shown to be worse."
    return (f"**SeLoRA.** Against equal ranks, in cases of a study and a budget of parameters, {'; '.join(parts)}. Numbers: held-out loss x 1e5 "
            f"at rank 2's budget; below 0 is better. {advice}")


def found_both(results):
    """Whether drawn studies help where data are scarce."""
    none, random, drawn = ({m: results[f"scarce-{name}"]["result"]["methods"][m]["macro_f1"] for m in ("mora", "full")}
                           for name in ("none", "random", "drawn"))
    effects = {"better than": "help", "worse than": "harm", "not shown to differ from": "show no difference for"}
    gaps = {method: [report.difference(added[method], none[method]) for added in (drawn, random)] for method in none}
    effect = {method: effects[stands(drawn[method], none[method])] for method in none}
    return (f"**Both.** 1,000 studies whose images SeLoRA drew, added to a tenth of 3,200 training studies, {effect['mora']} MoRA "
            f"({gaps['mora'][0]} macro-F1) and {effect['full']} full fine-tuning ({gaps['full'][0]}). With real images of random "
            f"other patients instead: {gaps['mora'][1]} and {gaps['full'][1]}.")


def found_block(results):
    """What a first page says at once. Numbers and words between them are computed from paired scores."""
    needed = {
        found_mora: {"mora-phantoms", "mora-fill"},
        found_selora: {*RANKS},
        found_both: {"scarce-none", "scarce-random", "scarce-drawn"},
    }
    return [f"- {line(results)}" for line, names in needed.items() if names <= {*results}] or NOT_YET


SAID = {
    "mora-label": ("Filled, and missing follows the label in training", " lora"),
}


def mora_sentences(results):
    """A sentence on each condition in which absent inputs are filled; `found_mora` has the others."""
    lines = []
    for name, (title, word) in SAID.items():
        if name in results:
            found = report.mora_conclusion(results[name]["result"])
            lines += [f"- {title}: {line}" for line in found if word in line]
    return lines or NOT_YET


def awareness_block(results):
    """Table and sentence of the first page, without the row of prompts and what `found_mora` says."""
    left_out = ("| `prompt`", "| `mora` minus `lora` of column 1")
    lines = [line for line in awareness_table(results) if not line.startswith(left_out)]
    return [*lines, "", *mora_sentences(results)]


BLOCKS = {
    "found": found_block,
    "awareness": awareness_block,
    "selora": selora_block,
}


def rank_methods(name, results):
    """The rows of a table of ranks, with those of its control, which is a run of its own."""
    methods = results[name]["result"]["methods"]
    if f"{name}-cost" in results:
        control = results[f"{name}-cost"]["result"]["methods"]
        if control["unadapted"]["heldout_loss"] != methods["unadapted"]["heldout_loss"]:
            raise data.Refused(f"{name} and {name}-cost were tested on other samples, or from another base")
        methods = methods | control
    return methods


BUDGETS = {"r1": "rank 1's budget", "r2": "rank 2's budget", "r3": "rank 3's budget", "as ratio": "what `ratio` spends"}


def rank_losses(results):
    """{(study, one of `BUDGETS`): {rule: held-out losses x 1e5 per seed}}."""
    columns = {}
    for name, title in RANKS.items():
        for budget in BUDGETS:
            if name in results:
                methods = rank_methods(name, results)
                methods = methods | {"ratio as ratio": methods.get("ratio")}
                rows = {rule: methods.get(f"{rule} {budget}") for rule in ("uniform", *RANKS_SHOWN)}
                if rows["uniform"]:
                    columns[title, budget] = {k: np.array(v["heldout_loss"]) * 1e5 for k, v in rows.items() if v}
    return columns


def ranks_figure(results, path):
    """docs/ranks.png: each rule's loss minus that of equal ranks, with its interval."""
    plt = report.pyplot()
    columns = rank_losses(results)
    if plt is None or not columns:
        return
    titles = list(dict.fromkeys(title for title, _ in columns))
    rules = [rule for rule in RANKS_SHOWN if any(rule in losses for losses in columns.values())]
    fig, axes = plt.subplots(1, len(titles), figsize=(4.6 * len(titles) + 1, 3.8), dpi=120, squeeze=False, sharey=True)
    for ax, title in zip(axes[0], titles):
        budgets = [budget for study, budget in columns if study == title]
        for k, budget in enumerate(budgets):
            losses = columns[title, budget]
            for y, rule in enumerate(rules):
                if rule in losses:
                    gap = metrics.paired(losses[rule], losses["uniform"])
                    place = y + 0.2 * (k - 1.5)
                    ax.plot([gap["low"], gap["high"]], [place, place], color=f"C{k}", lw=1.5)
                    ax.plot(gap["mean"], place, "o", ms=5, color=f"C{k}", label=BUDGETS[budget].replace("`", "") if rule == rules[0] else None)
        ax.axvline(0, color="0.5", lw=1)
        ax.set_title(f"{title}, {len(losses['uniform'])} seeds")
        ax.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(rules)), rules)
    axes[0, 0].invert_yaxis()
    fig.supxlabel("held-out loss x 1e5 minus that of equal ranks, with its 95% interval; left is better", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, -1].legend(handles, labels, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    report.save_figure(fig, path)


def draw(results):
    """The figures of the pages; without matplotlib they stay as they are."""
    if "mora-phantoms" in results:
        report.mora_figure(results["mora-phantoms"]["result"], ROOT / "docs/mora.png")
    ranks_figure(results, ROOT / "docs/ranks.png")


def write(settings=None):
    """docs/results.md, the tables in README.md, and figures."""
    results = read_results()
    draw(results)
    data.write_atomic(ROOT / "docs/results.md", page(results))
    readme = ROOT / "README.md"
    data.write_atomic(readme, filled(readme.read_text(), results))


def filled(text, results):
    """The text of README.md with its blocks `<!-- result NAME -->` ... `<!-- end -->` filled."""

    def block(match):
        lines = "\n".join(BLOCKS[match[2]](results)).strip()
        return f"{match[1]}\n{lines}\n<!-- end -->"

    return re.sub(r"(<!-- result ([\w-]+) -->)\n.*?<!-- end -->", block, text, flags=re.DOTALL)


@dataclass
class Settings:
    """Make and write the published numbers."""

    what: tyro.conf.Positional[str]  # `run` what is missing, or `write` the pages.
    names: tyro.conf.Positional[tuple[str, ...]] = ()  # Results to run; default: all.
    data: Path = Path("data")  # Folder with covid_cxr.npz and pneumoniamnist.npz.
    at_once: int = 2  # Commands that run at once, one thread each.


def main(argv=None):
    settings = tyro.cli(Settings, args=argv, description=Settings.__doc__)
    with data.one_line_errors():
        if settings.what == "run":
            return run_all(settings)
        if settings.what == "write":
            return write()
        raise data.Refused(f"'{settings.what}' is not known; use run or write")


if __name__ == "__main__":
    main()
