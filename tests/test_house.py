"""The layout: who may import whom, no circles, which files know no torch, and how dense the files that are read may be."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

LESSON = {"mora", "selora", "vit", "unet", "vae", "diffusion"}
SHARED = {"words", "wordpiece", "prepare", "metrics", "data", "phantoms"}
# What each file may import of the package, beside what those files may import themselves.
ALLOWED = {
    "__init__": set(),
    **{name: set() for name in LESSON},
    "words": set(),
    "wordpiece": set(),
    "metrics": set(),
    "prepare": {"words"},
    "data": {"prepare"},
    "phantoms": {"data"},
    "processes": {"data"},
    "checkpoint": {"processes", "data"},
    "loop": {"checkpoint"},
    "cli": {"loop"},
    "rates": {"loop"},
    "models": {"checkpoint", "words", "wordpiece", *LESSON},
    "pretrained": {"checkpoint", "wordpiece"},
    "baselines": SHARED,
    "task": {"models", "pretrained", "baselines", *SHARED},
    "ranks": {"selora", "rates"},
    "allocate": {"ranks", "diffusion"},
    "judge": {"metrics", "data"},
    "report": {"metrics", "data"},
    "report_selora": {"report"},
    "samples": {"judge", "report_selora", "processes", *LESSON},
    "graphs": {"models", "serve"},
    "export_mora": {"graphs", *SHARED},
    "export_selora": {"graphs", *SHARED},
    "pictures": SHARED,
    "tables": SHARED,
    "studies": {"pictures", "tables", *SHARED},
    "serve": SHARED,
    "compare": SHARED,
    "serve_cli": {"serve", "pictures", "compare"},
    "interchange": {"selora"},
}
NO_TORCH = {*SHARED, "pictures", "tables", "studies", "serve", "compare", "serve_cli"}
SCRIPTS = {"train_mora", "train_selora", "export"}
FILES = {path.stem: path for path in [*(ROOT / "minilora").glob("*.py"), *(ROOT / f"{name}.py" for name in SCRIPTS)]}


def imports(path):
    """Every module that a file imports, wherever the statement stands: 'minilora.data', 'torch.nn', 'export', ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: imports of the package are written in full"
            found |= {f"minilora.{a.name}" for a in node.names if a.name in ALLOWED} if node.module == "minilora" else {node.module}
    return found


def own(path):
    """The names of the package's files that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("minilora.")}


def reach(name):
    """A file's allowed imports and theirs."""
    return set().union(ALLOWED[name], *map(reach, ALLOWED[name]))


def test_every_file_has_its_place():
    assert {*FILES} == {*ALLOWED} | SCRIPTS


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_file_imports_only_what_stands_below_it(name):
    assert own(FILES[name]) <= reach(name)
    assert name not in reach(name), "the table itself has a circle"


def test_scripts_import_down_and_never_each_other():
    for name, path in FILES.items():
        assert not {module.split(".")[0] for module in imports(path)} & SCRIPTS, name


@pytest.mark.parametrize("name", sorted(LESSON))
def test_a_lesson_file_can_be_copied(name):
    outside = {module.split(".")[0] for module in imports(FILES[name])} - sys.stdlib_module_names
    assert outside <= {"torch"}


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_a_file_that_knows_no_torch_loads_none(name):
    assert "torch" not in {module.split(".")[0] for module in imports(FILES[name])}
    code = f"import sys, minilora.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def statistics(path):
    """(syntax nodes per line, share of lines over 100 columns), blank lines left out."""
    text = path.read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    nodes = sum(1 for _ in ast.walk(ast.parse(text)))
    return nodes / len(lines), sum(len(line) > 100 for line in lines) / len(lines)


@pytest.mark.parametrize("name", sorted({*FILES} - {"__init__"}))
def test_files_are_read(name):
    density, wide = statistics(FILES[name])
    lesson = name in LESSON | SCRIPTS
    assert density <= (10 if lesson else 11) and wide <= (0.05 if lesson else 0.08)
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def method_part(path):
    """A lesson file up to the divider behind which no method stands."""
    text = path.read_text()
    return text[: text.index("# ==== 2. MERGING AND SAVING")] if path.stem == "selora" else text


@pytest.mark.parametrize("names,nodes,lines", [(("mora", "vit", "train_mora"), 7500, 800), (("selora", "unet", "train_selora"), 11500, 1250)])
def test_a_training_step_is_followed_in_three_files(names, nodes, lines):
    texts = [method_part(FILES[name]) for name in names]
    assert sum(sum(1 for _ in ast.walk(ast.parse(text))) for text in texts) <= nodes
    assert sum(text.count("\n") for text in texts) <= lines


@pytest.mark.parametrize("script,limit", [("train_mora", 40), ("train_selora", 65)])
def test_the_loops_that_are_the_lesson_are_short(script, limit):
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(ast.parse(FILES[script].read_text())) if isinstance(n, ast.FunctionDef)}
    assert lengths["adapt"] <= limit
    assert all(lengths[name] <= 35 for name in ("pretrain", "train_vae") if name in lengths)
