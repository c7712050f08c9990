"""The pages: their commands are ones that the scripts take, their Python names what the package has, their links lead somewhere."""

import ast
import importlib
import inspect
import re
import textwrap
import shlex
from dataclasses import replace

import pytest
import torch
import tyro
from conftest import ROOT

import export
import train_mora
import train_selora
from minilora import cli, data, ranks, selora, serve_cli, studies, task

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WIDE_TABLES = {"results.md"}  # pages whose tables may be wider than 120 characters
# Commands that are not parsed here, by how they begin, and why.
NOT_RUN = {
    "pip ": "another program's, and it needs a network",
    "hf download": "another program's, and it needs a network",
    "git clone": "another program's, and it needs a network",
    "cd ": "of the shell",
    "for ": "of the shell; the commands inside are parsed",
    "done": "of the shell",
    "python covid_chestxray.py": "the reader makes this file; tests/test_studies.py runs it",
    "python tests/bench/": "measures for minutes; has a test of its own, or is started by make bench",
    "python docs/results.py": "trains for hours; see tests/test_results.py",
}
NUMERIC = {"tabular": {"columns": ["age", "temperature"]}}  # of the exported folders in the examples
MODALITIES = ("image", "note", "tabular")


def blocks(page, *languages):
    """The fenced blocks of a page in one of the languages, '' for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [text for language, text in found if language in languages]


def commands(page):
    """The commands of a page, continued lines joined, comments and variables left out."""
    for block in blocks(page, "", "sh", "bash"):
        lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
        lines = [line for line in lines if line]
        if page.name == "README.md" and not is_program(lines[0]):
            continue  # what a command prints
        for line in lines:
            while re.fullmatch(r"[A-Z_]+=\S*", line[0]):
                line = line[1:]
            yield shlex.join(line)


def is_program(line):
    return shlex.join(line).startswith(("python ", "make", "torchrun ", *NOT_RUN))


def check_values(cfg, script):
    """What a training script checks of its settings before it reads data."""
    cfg = cli.with_preset(cfg, script.PRESETS)
    cli.check_bounds(cfg)
    if script is train_selora:
        ranks.check_rules(cfg)
        return ranks.given_rates(cfg)
    task.check(replace(cfg, image_size=cfg.image_size or 32))
    for text in (cfg.missing, *cfg.test_missing):
        data.parse_missing(text, MODALITIES)


def parse(command, monkeypatch):
    """Give a command to its script's own parser, which raises SystemExit or Refused where it does not know something."""
    program, *argv = shlex.split(command)
    if program == "make":
        assert {*argv} <= {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)}, command
        return
    assert program in ("python", "torchrun"), f"{command}: no such program in the list NOT_RUN"
    first = next(i for i, word in enumerate(argv) if word.endswith(".py") or word.startswith("minilora."))
    script, argv = argv[first], argv[first + 1 :]
    if script == "minilora.studies":
        for name in ("write_study", "write_phantoms", "inspect"):
            monkeypatch.setattr(studies, name, lambda args: None)
        studies.main(argv)
    elif script == "minilora.serve" or (script == "export.py" and argv[0] in serve_cli.COMMANDS):
        monkeypatch.setattr(serve_cli, "exported_folder", lambda argv: argv[1])
        monkeypatch.setattr(serve_cli, "own_manifest", lambda folder: {"numeric": NUMERIC})
        serve_cli.command_line(argv)
    elif script == "export.py":
        export.command_line().parse_args(argv)
    else:
        module = {"train_mora.py": train_mora, "train_selora.py": train_selora}[script]
        check_values(tyro.cli(module.Config, args=argv), module)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_scripts_take_the_commands(page, monkeypatch):
    for command in commands(page):
        if command.startswith(tuple(NOT_RUN)):
            for path in re.findall(r"^python ((?:tests|docs)/\S+)", command):
                assert (ROOT / path).is_file(), command
            continue
        try:
            parse(command, monkeypatch)
        except (SystemExit, ValueError) as error:
            pytest.fail(f"{page.name}: {command}: {error}")


def test_a_wrong_command_is_seen(monkeypatch):
    for command in ("python train_mora.py --date x", "python train_mora.py --seeds many", "python train_mora.py --missing sound:0.1", "python export.py predict o --colour red",
                    "python train_mora.py --absent hidden", "python train_selora.py --rule best", "torchrun train_selora.py --lam high", "python -m minilora.studies from-csv a.csv --fit best"):  # fmt: skip
        with pytest.raises((SystemExit, ValueError)):
            parse(command, monkeypatch)
    with pytest.raises(AssertionError):
        parse("make everything", monkeypatch)


def package_names(trees):
    """{local name: module, class or function} of what some listings import of the package."""
    names = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minilora":
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                parent = importlib.import_module(node.module)
                found = getattr(parent, alias.name, None) or importlib.import_module(path)
                names[alias.asname or alias.name] = found
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_listings_name_only_what_the_package_has(page):
    trees = [ast.parse(textwrap.dedent(text)) for text in blocks(page, "python")]
    names = package_names(trees)
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and inspect.ismodule(names.get(node.value.id)):
            assert hasattr(names[node.value.id], node.attr), f"{page.name}: {node.value.id}.{node.attr}"
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                called = getattr(names.get(function.value.id), function.attr, None)
            else:
                called = names.get(getattr(function, "id", None))
            if called:  # the arguments are ones that it takes
                inspect.signature(called).bind(*node.args, **{word.arg: word for word in node.keywords})


def test_the_loops_of_the_first_page_are_those_of_the_scripts():
    source = "".join((ROOT / f"{name}.py").read_text() for name in ("train_mora", "train_selora"))
    pasted = [text for text in blocks(ROOT / "README.md", "python") if text.startswith("  ")]
    assert len(pasted) == 2 and all(text.strip("\n") in source for text in pasted)


class Net(torch.nn.Module):
    """A model of somebody else's: a token for each modality, a block with attention, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"attention": torch.nn.Linear(16, 16)})])
        self.head = torch.nn.Linear(16, 3)

    def forward(self, *inputs):
        tokens = torch.stack(inputs, 1)  # [B,M,16]
        block = self.blocks[0]
        return self.head((block["attention"](tokens) if isinstance(block, torch.nn.ModuleDict) else block(tokens)).mean(1))


def own_listing(start):
    """A listing of the first page for the reader's own model, at the width of `Net`."""
    return next(text for text in blocks(ROOT / "README.md", "python") if text.startswith(start)).replace("dim=768", "dim=16")


def test_the_listing_of_mora_trains_branch_and_head(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Net()
    model.blocks[0] = model.blocks[0]["attention"]
    scope = {"torch": torch, "model": model, "images": torch.randn(2, 16), "notes": torch.randn(2, 16)}
    before = model(scope["images"], scope["notes"])
    head = model.head.weight.detach().clone()
    exec(own_listing("from minilora.mora"), scope)
    torch.testing.assert_close(scope["logits"], before)
    torch.nn.functional.cross_entropy(scope["logits"], torch.tensor([0, 1])).backward()
    scope["optimizer"].step()
    assert (model.head.weight != head).any() and scope["mora"].up.abs().max() > 0
    assert {*torch.load("mora.pt")} == {"mora", "head"}


def test_the_listing_of_selora_learns_grows_and_merges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Net()
    x = torch.randn(64, 16)
    batches = [(x, (x @ torch.randn(16, 3, generator=torch.Generator().manual_seed(1))).argmax(1))] * 200
    scope = {"torch": torch, "model": model, "batches": batches, "criterion": torch.nn.CrossEntropyLoss()}
    first = scope["criterion"](model(x), batches[0][1])
    frozen = model.head.weight.detach().clone()
    exec(own_listing("from contextlib"), scope)
    assert scope["loss"] < first and (model.head.weight == frozen).all() and not selora.adapters(model)
    fresh = Net()
    selora.inject(fresh, r".*attention.*", capacity=8)
    selora.load_adapter(fresh, torch.load("adapter.pt"))
    assert max(layer.rank for layer in selora.adapters(fresh).values()) > 1


def prose(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    headings = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in WIDE_TABLES], ids=lambda page: page.name)
def test_tables_fit_the_width_of_a_page(page):
    wide = [line for line in prose(page).splitlines() if line.startswith("|") and len(line) > 120]
    assert not wide, wide[0]


def test_the_first_page_stays_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2200
