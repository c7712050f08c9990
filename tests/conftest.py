"""Shared by the tests: a tiny run of train_mora.py, and runs of the scripts inside a temporary folder."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DATA = ROOT.parent / "shared" / "data"  # real X-rays, where they are at hand; never part of the project

TINY = ["--seeds", "1", "--steps", "12", "--pretrain-steps", "10", "--phantoms", "240", "--width", "16", "--depth", "2",
        "--heads", "2", "--batch", "16", "--buckets", "128", "--device", "cpu", "--lr", "0.01"]


torch.set_num_threads(1)  # sums are then the same in every test, whoever ran first


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A finished tiny run of every method on three modalities, with its exported folder: (folder, run)."""
    import export
    import train_mora

    folder = tmp_path_factory.mktemp("tiny")
    before = os.getcwd()
    os.chdir(folder)
    try:
        train_mora.main([*TINY, "--out", "run", "--modalities", "image", "note", "vitals", "--test-missing", "any:0.7",
                         "image:0.5", "--methods", "head", "lora", "mora", "mora-open", "mora-shuffled", "mora-all",
                         "prompt", "full"])
        export.main(["mora", "run"])
    finally:
        os.chdir(before)
    return folder, folder / "run"


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Call a script's main(argv) in an empty folder: exit code 2, one line on stderr, nothing written; returns the line."""
    monkeypatch.chdir(tmp_path)

    def call(main, *argv):
        before = sorted(p for p in tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in argv])
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 2, said
        assert "\n" not in said and said.startswith("error: "), said
        assert sorted(p for p in tmp_path.rglob("*")) == before, "something was written"
        return said

    return call
