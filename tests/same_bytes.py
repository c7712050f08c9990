"""Do two versions of minilora write the same bytes? Tiny runs of both scripts and all exports, by each version, compared.

    python tests/same_bytes.py REVISION        # that commit against the files of this folder

For a change of shape that must not change what is computed: several methods, every rule, both forms of Fisher, bfloat16,
a stop and a resume, every kind of export. Takes about four minutes; prints the count and every file that differs, and
exits 1 if there is one. Times, configurations and locks are left out."""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZES = "--phantoms 240 --batch 16 --width 16 --heads 2 --buckets 128 --device cpu --pretrain-steps 10"
MORA = f"train_mora.py {SIZES} --steps 12 --depth 2 --out"
SELORA = f"train_selora.py {SIZES} --steps 14 --every 4 --vae-steps 4 --text-width 8 --vae-width 8 --sample-steps 2 --positions 10 --lr 0.01 full:0.001 --out"
RUNS = [
    f"{MORA} m-all --seeds 2 --lr 0.01 --modalities image note vitals --test-missing any:0.7 image:0.5 --methods head lora mora mora-open mora-shuffled mora-all prompt full",
    f"{MORA} m-dummy --seeds 1 --absent dummy --methods head lora mora",
    f"{MORA} m-locked --seeds 1 --lr 0.01 --head locked --methods head mora",
    f"{MORA} m-amp --seeds 1 --lr 0.01 --amp --methods head mora",
    f"{MORA} m-file --seeds 1 --lr 0.01 --data m-all/phantoms.npz --modalities image vitals --train-share 0.5",
    f"{MORA} m-base --seeds 1 --lr 0.01 --source m-all/phantoms.npz --methods mora --phantoms 200",
    f"stop {MORA} m-stopped --seeds 1 --lr 0.01 --methods head mora --steps 300",
    f"{SELORA} s-ratio --seeds 2 --lam 1.01 --judge m-all",
    *[f"{SELORA} s-{rule} --seeds 1 --rule {rule}" for rule in ("gain", "random-grown", "cheapest", "neyman", "inverse-cost", "uniform", "random", "probe-svd", "fixed")],
    f"{SELORA} s-replay --seeds 1 --rule replay --replay s-neyman",
    f"{SELORA} s-loop --seeds 1 --fisher loop --lam 1.5",
    f"{SELORA} s-expected --seeds 1 --ratio-of expected --amp",
    f"{SELORA} s-table --seeds 1 --rules-table --every 2 --capacity 4",
    f"stop {SELORA} s-stopped --seeds 1 --lam 1.01 --steps 200",
    f"{MORA} m-augment --seeds 1 --lr 0.01 --methods mora --missing any:0 --augment s-neyman:30",
    "export.py mora m-all",
    "export.py mora m-all --out half --fp16 --method lora --seed 1",
    "export.py mora m-dummy",
    "export.py selora s-ratio",
    "export.py selora s-gain --fp16",
    "export.py selora s-ratio --hot-swap swap",
    "export.py selora s-neyman --hot-swap swap --name other",
    "export.py peft s-ratio --out peft",
    "export.py peft s-ratio --out diffusers --format diffusers",
    "export.py predict m-all/onnx --data m-all/phantoms.npz --split m-all/split-s0.npz --missing any:0.7 --out m-all/p.csv",
    "export.py sample s-ratio/onnx --note fever --out s-ratio/sheet.png",
]
LEFT_OUT = ("config.json", "timings.json", ".lock", "last.pt")  # settings may go, times differ


def call(version, folder, line):
    """Run one command line of a version in its folder; a line that begins with `stop` is stopped and gone on with."""
    stopped = line.startswith("stop ")
    script, *argv = line.removeprefix("stop ").split()
    command = [sys.executable, str(version / script), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(version)}
    if stopped:
        run = Path(folder, argv[argv.index("--out") + 1])
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (run / "last.pt").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143, f"{line}: not stopped in the middle"
        command.append("--resume")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{version}: {line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def hashes(folder):
    """{path: sha256} of what a version wrote."""
    paths = [p for p in Path(folder).rglob("*") if p.is_file() and p.name not in LEFT_OUT]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="a commit, or a folder that holds another version")
    parser.add_argument("--only", default="", help="only command lines with this in them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(args.revision).resolve()
        if not other.is_dir():
            other = Path(scratch, "version")
            other.mkdir()
            archive = subprocess.run(["git", "archive", args.revision], cwd=ROOT, capture_output=True, check=True).stdout
            subprocess.run(["tar", "-x", "-C", other], input=archive, check=True)
        written = []
        for name, version in (("before", other), ("after", ROOT)):
            folder = Path(scratch, name)
            folder.mkdir()
            for line in RUNS:
                if args.only in line:
                    print(f"{name}: {line}", flush=True)
                    call(version, folder, line)
            written.append(hashes(folder))
    before, after = written
    differ = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    print(*(f"differs: {path}" for path in differ), sep="\n")
    print(f"{len(before.keys() | after.keys()) - len(differ)} files are the same, {len(differ)} differ")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
