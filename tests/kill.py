"""Kill -9 both training scripts at random moments, go on with --resume, and compare the end with an uninterrupted run.

    python tests/kill.py 50        # kills of each script; prints what was done, exits 1 on any difference

Half of the kills strike at a random time, half at a random write: before or after a file takes its place. A run that
gets through is compared byte by byte and begun again from nothing, base included, until the kills are spent."""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import train_mora
import train_selora
from minilora import report

TINY = {
    train_mora: ["--seeds", "1", "--steps", "12", "--pretrain-steps", "10", "--phantoms", "240", "--width", "16", "--depth", "2", "--heads", "2", "--batch", "16",
                 "--buckets", "128", "--lr", "0.01", "--methods", "head", "mora"],
    train_selora: ["--seeds", "1", "--steps", "14", "--every", "4", "--pretrain-steps", "6", "--vae-steps", "4", "--phantoms", "120", "--batch", "8", "--width", "8",
                   "--text-width", "8", "--vae-width", "8", "--heads", "2", "--sample-steps", "2", "--buckets", "64", "--positions", "10", "--lam", "1.01", "--lr", "0.01", "full:0.001"]}  # fmt: skip
NAMES = ("config.json", "metrics.json", "model.pt", "log.jsonl", "split-s0.npz", "adapters/*.pt")


def child(script, strike, after):
    """The script in a process of its own, which kills itself at write number `strike`, or never, before or `after` the
    file takes its place. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        script.SAVE_EVERY, script.LOG_EVERY, report.pyplot = 3, 5, lambda: None
        place, done = os.replace, 0

        def replace(*paths):
            nonlocal done
            done += 1
            if done == strike:
                if after:
                    place(*paths)
                os.kill(os.getpid(), signal.SIGKILL)
            place(*paths)

        os.replace = replace
        script.main([*TINY[script], "--device", "cpu", "--out", "run", "--resume"])
        os._exit(0)
    except SystemExit as error:
        os._exit(error.code or 0)
    except BaseException as error:  # a traceback must be seen, and not run what the parent has on its stack
        print(f"{script.__name__}: {error!r}", file=sys.stderr)
        os._exit(1)


def kill(script, kills, chance):
    """Kill the script so many times; returns how often it got through, and how many files were compared each time."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        began = time.monotonic()
        assert os.waitpid(child(script, None, False), 0)[1] == 0, f"{script.__name__} does not run"
        whole = time.monotonic() - began
        wanted = {p.relative_to("run"): p.read_bytes() for name in NAMES for p in Path("run").glob(name)}
        shutil.rmtree("run")
        shutil.rmtree("runs")
        through, struck = 0, 0
        while True:
            writes = chance.randint(1, 12) if struck < kills and chance.random() < 0.5 else None
            pid, until = child(script, writes, chance.random() < 0.5), time.monotonic() + chance.uniform(0.02, whole)
            status = None
            while status is None:
                found, code = os.waitpid(pid, os.WNOHANG)
                if found:
                    status = code
                elif writes is None and struck < kills and time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
                    status = os.waitpid(pid, 0)[1]
                else:
                    time.sleep(0.002)
            if os.WIFSIGNALED(status):
                struck += 1
                continue
            assert status == 0, f"{script.__name__}: exit code {os.WEXITSTATUS(status)} after {struck} kills"
            found = {p.relative_to("run"): p.read_bytes() for name in NAMES for p in Path("run").glob(name)}
            differ = [str(n) for n in {*wanted, *found} if wanted.get(n) != found.get(n)]
            assert not differ, f"{script.__name__}: {', '.join(differ)} differ after {struck} kills"
            assert not [*Path("run").rglob("*.tmp")], "temporary files are left"
            through += 1
            if struck == kills:
                os.chdir("/")
                return through, len(wanted)
            shutil.rmtree("run")
            shutil.rmtree("runs")


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(sys.argv[1])
    for script in TINY:
        through, files = kill(script, count, random.Random(count))
        print(f"{script.__name__}: killed {count} times, {through} runs went through, each of their {files} files as of an uninterrupted run", flush=True)
