"""The published numbers: pages are made of the kept files, commands are ones that the scripts take."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import tyro
from conftest import ROOT

import train_mora
import train_selora

spec = importlib.util.spec_from_file_location("results", ROOT / "docs/results.py")
results = importlib.util.module_from_spec(spec)
sys.modules["results"] = results
spec.loader.exec_module(results)


def test_pages_hold_what_the_files_hold():
    kept = results.read_results()
    assert (ROOT / "docs/results.md").read_text() == results.page(kept), "python docs/results.py write"
    readme = (ROOT / "README.md").read_text()
    assert results.filled(readme, kept) == readme, "python docs/results.py write"


def test_every_kept_file_is_of_a_command_of_the_list():
    by_name = {one.name: one for one in results.PUBLISHED}
    for name, content in results.read_results().items():
        assert content["commands"] == [results.shown(command) for command in by_name[name].commands], name
        assert content["version"] and content["machine"]


@pytest.mark.parametrize("one", results.PUBLISHED, ids=lambda one: one.name)
def test_the_scripts_take_the_commands(one):
    for script, *argv in one.commands:
        argv = [part.replace("{data}", "data") for part in argv]
        if script == "train_mora.py":
            assert tyro.cli(train_mora.Config, args=argv).resume
        elif script == "train_selora.py":
            assert tyro.cli(train_selora.Config, args=argv).resume
        else:
            assert script in ("export.py", "-m", "tests/bench/peft_ranks.py")
    assert {*one.needs} <= {other.name for other in results.PUBLISHED}


def test_a_result_is_made_once_and_what_failed_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "kept")
    write = "import json; json.dump({'loss': 1 / 3, 'history': [1], 'x': [float('nan'), 12345678.9]}, open('runs/results/a.json', 'w'))"
    good = results.Published("a", [["-c", write]], "a.json", ("step",))
    step = results.Published("step", [["-c", "open('made', 'a').write('x')"]])
    bad = results.Published("bad", [["-c", "raise SystemExit(3)"]], "bad.json")
    needy = results.Published("needy", [["-c", "{data}/covid_cxr.npz"]], "needy.json")
    monkeypatch.setattr(results, "PUBLISHED", [step, good, bad, needy])
    with pytest.raises(SystemExit):
        results.main(["run"])
    said = capsys.readouterr().out
    assert "bad: FAILED with code 3" in said and "needy: SKIPPED" in said and "a: done" in said
    kept = json.loads((tmp_path / "kept/a.json").read_text())["result"]
    assert kept["loss"] == 0.33333 and "history" not in kept and np.isnan(kept["x"][0]) and kept["x"][1] == 12346000
    results.main(["run", "a"])  # it is there: neither it nor what it needs runs again
    assert (tmp_path / "made").read_text() == "x"
    with pytest.raises(SystemExit):
        results.main(["run", "unknown"])


def test_blocks_of_the_readme_are_filled(monkeypatch):
    monkeypatch.setattr(results, "BLOCKS", {"one": lambda kept: [f"| {kept['x']} |"]})
    text = "a\n<!-- result one -->\nold\nlines\n<!-- end -->\nb\n"
    assert results.filled(text, {"x": 7}) == "a\n<!-- result one -->\n| 7 |\n<!-- end -->\nb\n"


def made_up(shift):
    """Results of six seeds in which `ratio` and drawn studies are off by so much, in losses and in macro-F1."""
    noise = np.random.default_rng(0).normal(size=6) * 1e-6
    loss = {row: {"heldout_loss": list(0.4 + noise)} for row in ("uniform r2", "probe-svd r2", "neyman r2")}
    ranks = {"methods": loss | {"ratio r2": {"heldout_loss": list(0.4 + 2 * noise + shift)}}}
    scarce = {m: {"macro_f1": list(0.5 + noise)} for m in ("mora", "full")}
    drawn = {m: {"macro_f1": list(0.5 + 2 * noise + shift)} for m in ("mora", "full")}
    kept = {name: ranks for name in results.RANKS}
    kept |= {"scarce-none": {"methods": scarce}, "scarce-random": {"methods": scarce}, "scarce-drawn": {"methods": drawn}}
    return {name: {"result": result} for name, result in kept.items()}


@pytest.mark.parametrize("shift,loss,score", [(0, "better in 0 and worse in 0", "show no difference for"), (0.01, "better in 0 and worse in 2", "help"),
                                              (-0.01, "better in 2 and worse in 0", "harm")])
def test_what_was_found_is_said_as_the_numbers_are(shift, loss, score, tmp_path):
    ranks, both = results.found_block(made_up(shift))
    assert f"`ratio`, the paper's rule, is {loss} of 2 cases" in ranks
    assert ("`--rule ratio` is better most often, and never shown to be worse" in ranks) == (shift < 0)
    assert "`probe-svd` is better in 0 and worse in 0 of 2 cases" in ranks
    assert f"studies, {score} MoRA" in both and f"and {score} full fine-tuning" in both
    assert results.found_block({}) == results.NOT_YET


@pytest.mark.pictures
def test_the_figure_of_ranks_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    results.ranks_figure(made_up(0.01), tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 5000
