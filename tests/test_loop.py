"""The loop around a training: what comes back after a stop, what is refused, and that no step goes unseen."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY

import train_mora
from minilora import checkpoint, cli
from minilora.data import Refused
from minilora.loop import Log, Loop, Stopped, Stopper, warm_cosine


class Counter(torch.nn.Module):
    """A weight that trains, one that is frozen, and a buffer that the training changes."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))


def train(folder, name="job", steps=10, stop_after=None, log=None, skip_note=False):
    """Train a Counter; returns it with its loop. It is stopped after so many steps, if any."""
    model = Counter()
    optimizer = torch.optim.AdamW([model.weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
    stop = Stopper()
    loop = Loop(name, steps, model, lambda step: np.array([step]), folder / "last.pt", stop, optimizer=optimizer, schedule=schedule,
                save_every=3, together=True, log=log, log_every=4, fields={"name": name}, counts=lambda: {"seen": int(model.seen)})
    order = loop.kept.setdefault("order", [])
    for step in loop:
        optimizer.zero_grad()
        loss = ((step + 1) * model.weight).square().mean()
        loss.backward()
        if not skip_note:
            loop.note(loss)
        optimizer.step()
        schedule.step()
        model.seen += 1
        order.append(step)
        if step + 1 == stop_after:
            stop.code = 143
    return model, loop


@pytest.mark.parametrize("stop_after", [1, 5, 9])
def test_weights_buffers_kept_values_and_log_come_back(tmp_path, stop_after):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, _ = train(tmp_path / "whole", log=Log(tmp_path / "whole/log.jsonl"))
    with pytest.raises(Stopped):
        train(tmp_path / "cut", stop_after=stop_after, log=Log(tmp_path / "cut/log.jsonl"))
    with open(tmp_path / "cut/log.jsonl", "a") as f:
        f.write("what a killed process wrote after its last save\n")
    model, loop = train(tmp_path / "cut", log=Log(tmp_path / "cut/log.jsonl"))
    assert loop.start == stop_after and loop.kept["order"] == list(range(10))
    assert torch.equal(model.weight, whole.weight) and model.seen == whole.seen == 10
    assert (tmp_path / "cut/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()
    assert [json.loads(line)["step"] for line in (tmp_path / "cut/log.jsonl").read_text().splitlines()] == [4, 8, 10]


def test_a_step_that_does_not_note_its_loss_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"job: step 0 ended without loop.note\(loss\)"):
        train(tmp_path, skip_note=True)


def test_only_what_trains_and_buffers_are_saved(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, stop_after=2)
    assert {*checkpoint.load(tmp_path / "last.pt", "resume")["state"]} == {"weight", "seen"}


def test_the_state_of_another_training_is_not_taken(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    with pytest.raises(Stopped):
        train(tmp_path, "one", stop_after=2, log=log)
    _, loop = train(tmp_path, "two", log=log)  # a run's trainings share one file, which a killed process may have left
    assert loop.start == 0 and loop.kept["order"] == list(range(10))
    with pytest.raises(Refused, match="last.pt: holds 'two', not 'three'"):  # a base has a file of its own: they changed places
        train(tmp_path, "three")


def test_a_stopped_training_of_an_older_version_is_refused_with_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--methods", "head", "--out", "run"]
    train_mora.main(argv)
    (tmp_path / "run/adapters/head-s0.pt").unlink()
    checkpoint.save(tmp_path / "run/last.pt", {"format": 1, "kind": "resume", "step": 5, "job": "head-s0-0.01", "state": {}})
    before = (tmp_path / "run/last.pt").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        train_mora.main([*argv, "--resume"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert "run/last.pt: a stopped training of another version of minilora (format 1; this one reads 2)" in said and "remove the file to train this part again" in said
    assert (tmp_path / "run/last.pt").read_bytes() == before
    (tmp_path / "run/last.pt").unlink()
    train_mora.main([*argv, "--resume"])


def test_a_finished_run_with_a_setting_that_is_gone_is_shown_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--methods", "head", "--out", "run"]
    train_mora.main(argv)
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(config | {"sample_every": 0}))
    capsys.readouterr()
    train_mora.main([*argv, "--resume"])
    assert "run folder: run" in capsys.readouterr().out
    (tmp_path / "run/config.json").write_text(json.dumps(config | {"steps": 13}))
    with pytest.raises(SystemExit):
        train_mora.main([*argv, "--resume"])
    assert "another configuration (steps 13 there, 12 here" in capsys.readouterr().err


@pytest.mark.parametrize("bounds,inside,outside,span", [
    ({"low": 1}, [1, 2], [0, -1, float("nan")], "at least 1"), ({"above": 0, "high": 1}, [0.1, 1], [0, 1.1, float("nan")], "in (0,1]"),
    ({"low": 0, "below": 1e6}, [0, 999999], [-1, 1e6, float("inf")], "in [0,1e+06)"), ({"above": 0, "below": 10}, [0.1, 9.9], [0, 10], "in (0,10)")])
def test_bounds_stand_in_the_annotation(bounds, inside, outside, span):
    bounds = cli.Bounds(**bounds)
    assert all(value in bounds for value in inside) and not any(value in bounds for value in outside) and str(bounds) == span
