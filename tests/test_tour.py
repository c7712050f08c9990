"""The tour, docs/tour.ipynb: what is committed, always; with LONG=1 a new run of it, which takes 2 to 3 minutes and needs the
`docs` and `pictures` extras. Beside it docs/animation.py: a tiny run, and the GIF that is committed.

A cell with the tag `exact` prints what has to be the same in every run; one with a tag `limit-X` ends in a number below X."""

import ast
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
from types import ModuleType

import numpy as np
import pytest
import tyro
from conftest import ROOT

import train_mora
import train_selora

TOUR = ROOT / "docs/tour.ipynb"
PICTURES = 7
CLAIMS = 6


def read(path=TOUR):
    """The code cells of a notebook."""
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def program():
    """The syntax tree of all code cells, without magics; a timed statement stands there untimed."""
    text = "\n".join("".join(cell["source"]) for cell in read())
    text = re.sub(r"%timeit( -\w \d+)* ", "", text)
    return ast.parse(re.sub(r"^%.*$", "", text, flags=re.M))


def printed(cell):
    """What a cell printed."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def check_claims(cells):
    """Assert what tagged cells promise; returns how many there are."""
    claims = [(tag, printed(cell).strip()) for cell in cells for tag in cell["metadata"].get("tags", [])]
    for tag, text in claims:
        if tag == "exact":
            assert text.endswith((": 0.0", ": False")), text
        else:
            assert 0 <= float(text.split()[-1]) < float(tag.removeprefix("limit-")), text
    return len(claims)


# ---- the tour


def test_the_committed_tour_was_run_from_top_to_bottom():
    cells = read()
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}, "an error"
    assert {output["name"] for output in outputs if "name" in output} == {"stdout"}, "a warning"
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES
    assert check_claims(cells) == CLAIMS


def test_the_committed_tour_is_small_and_names_no_machine():
    assert TOUR.stat().st_size < 1.5e6
    for cell in read():
        for output in cell["outputs"]:
            data = {kind: text for kind, text in output.get("data", {}).items() if kind != "image/png"}
            text = json.dumps([output.get("text"), data])
            assert not re.search(rf"\b{re.escape(platform.node())}\b", text), text
            assert not re.search(r"(?<![\w.])/\w|\b[A-Z]:\\", text), "a path from the root of a file system"


def test_what_the_tour_takes_from_the_package_is_there():
    """Modules, what is imported from them, and every attribute of a module that a cell names."""
    nodes = [*ast.walk(program())]
    names = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module.startswith("minilora"):
            importlib.import_module(node.module)
            for alias in node.names:
                if node.module == "minilora":
                    importlib.import_module(f"minilora.{alias.name}")
                names[alias.name] = getattr(sys.modules[node.module], alias.name)
    assert {"selora", "diffusion", "report", "models", "MoRA", "train_mora", "train_selora", "export"} <= {*names}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            assert not isinstance(module, ModuleType) or hasattr(module, node.attr), ast.unparse(node)


def test_the_runs_of_the_tour_are_ones_that_the_scripts_take():
    """Each gives its learning rates, so that none is picked."""
    commands = {}
    for node in ast.walk(program()):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("train_mora.main", "train_selora.main"):
            text = node.args[0].func.value  # of "...".split()
            commands[node.func.value.id] = ast.literal_eval(text).split()
    assert {*commands} == {"train_mora", "train_selora"}
    for name, script in (("train_mora", train_mora), ("train_selora", train_selora)):
        cfg = tyro.cli(script.Config, args=commands[name])
        assert cfg.lr and cfg.seeds == 1 and cfg.device == "cpu" and cfg.out.parts[:2] == ("runs", "tour")


def test_a_new_run_says_the_same(tmp_path):
    """In a folder of its own, as on a fresh clone: no error, and every claim holds again."""
    if not os.environ.get("LONG"):
        pytest.skip("takes 2 to 3 minutes: LONG=1")
    pytest.importorskip("matplotlib", reason="pip install 'minilora[pictures]'")
    pytest.importorskip("ipykernel", reason="pip install 'minilora[docs]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install 'minilora[docs]'")
    import nbformat  # nbclient brings it

    for name in ("train_mora.py", "train_selora.py", "export.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "minilora", tmp_path / "minilora")
    folder = tmp_path / "docs"
    folder.mkdir()
    tour = nbformat.read(TOUR, 4)
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(tour, timeout=900, kernel_name="python3", resources=where).execute()
    nbformat.write(tour, folder / "tour.ipynb")
    again = read(folder / "tour.ipynb")
    assert check_claims(again) == CLAIMS
    assert sum("image/png" in output.get("data", {}) for cell in again for output in cell["outputs"]) == PICTURES


# ---- the animation


@pytest.fixture(scope="module")
def animation():
    pytest.importorskip("PIL", reason="pip install 'minilora[pictures]'")
    spec = importlib.util.spec_from_file_location("animation", ROOT / "docs/animation.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["animation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_animation_is_of_the_demo(animation):
    """The settings of `make demo`, as its Makefile gives them to train_selora.py."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    demo = tyro.cli(train_selora.Config, args=shlex.split(re.search(r"^SELORA = (.*)$", makefile, re.M)[1]))
    cfg = animation.settings(animation.Options())
    for name in ("phantoms", "width", "text_width", "heads", "vae_steps", "pretrain_steps", "steps", "rule", "every", "batch", "rank", "capacity"):
        assert getattr(cfg, name) == getattr(demo, name), name
    assert f"ratio:{animation.RATE:g}" in demo.lr


def test_a_tiny_animation(animation, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    few = ["--steps", "42", "--phantoms", "80", "--vae-steps", "2", "--pretrain-steps", "2"]
    animation.main(["--out", "a/b.gif", "--frames", "3", *few])
    with Image.open("a/b.gif") as gif:
        assert gif.n_frames == 3 and gif.width <= 820
        frames = []
        for k in range(3):
            gif.seek(k)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
    ranks = [(frame == animation.COLORS["open"]).all(2).sum() for frame in frames]
    assert 0 < ranks[0] == ranks[1] < ranks[2], "the ranks grow after 40 steps"
    images = [frame[animation.TOP : animation.TOP + 90, animation.LEFT : animation.LEFT + 90] for frame in frames]
    assert (images[0] != images[1]).any() and (images[1] != images[2]).any()


def test_frames_change_less_than_a_reader_can_see(animation):
    """At most one grey, and neither white paper nor the bars at all."""
    rng = np.random.default_rng(0)
    drift = rng.integers(-2, 3, (30, 20, 20)).cumsum(0) + 15
    frames = drift.clip(0, animation.GREYS + 1).astype(np.uint8)
    calm = animation.calmed(list(frames))
    exact = frames >= animation.GREYS - 1
    for frame, shown, kept in zip(frames, calm, exact, strict=True):
        assert abs(frame.astype(int) - shown).max() <= 1
        assert (frame == shown)[kept].all()
    changes = [(a != b).mean() for a, b in zip(calm, calm[1:])]
    assert np.mean(changes) < 0.9 * (frames[1:] != frames[:-1]).mean()


def test_the_committed_animation():
    image = pytest.importorskip("PIL.Image", reason="pip install 'minilora[pictures]'")
    path = ROOT / "docs/training.gif"
    assert path.stat().st_size < 1e6
    with image.open(path) as gif:
        assert 60 <= gif.n_frames <= 100 and 780 <= gif.width <= 820 and gif.info["loop"] == 0
