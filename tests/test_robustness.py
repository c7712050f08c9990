"""Nothing lost, nothing let in: kills, damaged and foreign files, odd requests, load, full disks, interrupts, NaN.

`make test` runs this with smaller counts; `make test-long` sets LONG=1. Each test prints what it counted."""

import copy
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, TINY

import export
import train_mora
import train_selora
from minilora import checkpoint, data, export_selora, interchange, report, selora, serve, serve_cli, studies
from minilora.phantoms import phantoms
from minilora.data import Refused

LONG = bool(os.environ.get("LONG"))


def say(capsys, text):
    with capsys.disabled():
        print(f"\n  {text}", end=" ")


DRAW = ["--seeds", "1", "--steps", "6", "--every", "2", "--pretrain-steps", "4", "--vae-steps", "4", "--phantoms", "120", "--batch", "8", "--width", "8", "--text-width", "8",
        "--vae-width", "8", "--heads", "2", "--sample-steps", "2", "--buckets", "64", "--positions", "10", "--device", "cpu", "--lr", "0.01", "full:0.001"]  # fmt: skip


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """One of every artefact: `mora` (a run and its onnx), `draw` (the same of SeLoRA), `swap` (hot-swap), `study.npz`."""
    folder = tmp_path_factory.mktemp("built")
    before = os.getcwd()
    os.chdir(folder)
    try:
        shutil.copytree(tiny[1], "mora")
        shutil.copy(next((tiny[0] / "runs/base").glob("vit-*.pt")), ".")
        report.pyplot, drawing = (lambda: None), report.pyplot
        train_selora.main([*DRAW, "--out", "draw"])
        report.pyplot = drawing
        export.main(["selora", "draw"])
        export.main(["selora", "draw", "--hot-swap", "swap"])
        data.save_study("study.npz", phantoms(30, 0))
    finally:
        os.chdir(before)
    return folder


# ------------------------------------------------------------------------------------------------------------------ kills


def test_killed_runs_go_on_to_the_same_bytes(capsys, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tests/kill.py", "50" if LONG else "5"], cwd=tmp_path, capture_output=True, text=True)
    say(capsys, "\n  ".join(done.stdout.splitlines()))
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------- damaged files


def same(a, b):
    """Whether two loaded contents hold the same values."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (torch.Tensor, np.ndarray)):
        a, b = np.asarray(a), np.asarray(b)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and (a == b or a != a and b != b)


def configured(folder, study=None):
    """What a resumed run takes from its config.json: everything, or it is refused. With a study, a run on that file."""
    cfg = train_mora.Config(out=folder)
    for key, value in KEPT["config"].items():
        setattr(cfg, key, value)
    cfg.resume, cfg.data = True, study
    try:
        return checkpoint.open_run(cfg)
    finally:
        while checkpoint.HELD:
            checkpoint.HELD.pop().close()


def studied(folder):
    """A study as it is read; one that says something else can only be another run's data, which a resumed run refuses."""
    content = vars(data.load_study(folder / "study.npz"))
    if not same(content, KEPT.setdefault("study", content)):
        configured(folder / "run", folder / "study.npz")
    return content


KEPT = {}  # the configuration that config.json in `built` belongs to, and the study


def loaders(folder):
    """{artefact: how it is read, all of what it says}."""
    opened = lambda name, kind: lambda: [(served := kind(folder / name, "cpu")).manifest, [served.session(g) for g in served.manifest["graphs"]] and 0
                                         if kind is serve.Diagnoser else [served.options(a) for a in served.adapters] and 0]  # fmt: skip
    split = SimpleNamespace(split=folder / "mora/split-s0.npz", missing="any:0.7", data="phantoms.npz")
    phantoms = data.load_study(folder / "mora/phantoms.npz")
    found = {f"mora/onnx/{p.name}": opened("mora/onnx", serve.Diagnoser) for p in (folder / "mora/onnx").iterdir()}
    found |= {f"{name}/{p.name}": opened(name, serve.Synthesizer) for name in ("draw/onnx", "swap") for p in (folder / name).iterdir()}
    found |= {"mora/model.pt": lambda: checkpoint.load(folder / "mora/model.pt", "mora"), "draw/model.pt": lambda: checkpoint.load(folder / "draw/model.pt", "selora"),
              "study.npz": lambda: studied(folder), "mora/split-s0.npz": lambda: serve_cli.chosen_rows(phantoms, serve_cli.read_split(phantoms, split), split),
              "mora/config.json": lambda: configured(folder / "mora")}  # fmt: skip
    for p in (folder / "mora/adapters").glob("*.pt"):
        found[f"mora/adapters/{p.name}"] = lambda p=p: checkpoint.load(p, "mora adapter", f"{p.stem}-0.01")
    for p in folder.glob("vit-*.pt"):
        found[p.name] = lambda p=p: checkpoint.load(p, "base", p.stem)
    return found


def mutate(content, chance, others):
    """(name of what was done, changed bytes)."""
    kind = chance.choice(["bit", "bit", "bit", "cut", "zeros", "swap", "empty"])
    if kind == "bit":
        at, changed = chance.randrange(len(content)), bytearray(content)
        changed[at] ^= 1 << chance.randrange(8)
        return kind, bytes(changed)
    if kind == "cut":
        return kind, content[: chance.randrange(len(content))]
    if kind == "zeros":
        at = chance.randrange(len(content))
        return kind, content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :]
    return kind, chance.choice(others).read_bytes() if kind == "swap" and others else b""


def test_damaged_files_are_refused_or_hold_the_same(built, tmp_path, capsys):
    folder, chance, counts = tmp_path / "b", random.Random(1), {}
    shutil.copytree(built, folder)
    KEPT["config"] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads((folder / "mora/config.json").read_text()).items()}
    configured(folder / "run", folder / "study.npz")
    found = loaders(folder)
    wanted = {name: copy.deepcopy(read()) for name, read in found.items()}
    for _ in range(10_000 if LONG else 1000):
        name = chance.choice([*found])
        path = folder / name
        original = path.read_bytes()
        others = [p for p in folder.rglob(f"*{path.suffix}") if p != path]
        kind, changed = mutate(original, chance, others)
        if changed == original:
            continue
        path.write_bytes(changed)
        try:
            outcome = "same content" if same(found[name](), wanted[name]) else "ACCEPTED"
        except Refused as error:
            outcome = "refused"
            assert path.name in str(error) or "manifest.json" in str(error), f"{kind} in {name}: {error}"
            assert len(str(error).splitlines()) == 1, error
        finally:
            path.write_bytes(original)
        assert outcome != "ACCEPTED", f"{kind} in {name}"
        row = counts.setdefault(path.suffix, {"refused": 0, "same content": 0})
        row[outcome] += 1
    say(capsys, f"{sum(sum(c.values()) for c in counts.values())} damaged files: {counts}")
    assert all(same(read(), wanted[name]) for name, read in found.items())


def test_every_byte_of_a_checkpoint_counts(tmp_path, capsys):
    """Flipped bits in each byte of a small file: torch itself reads an entry that is marked a folder as zeros, silently."""
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"format": 1, "kind": "x", "w": torch.randn(3, 4), "v": {"a": [1.0, "text"], "b": torch.arange(5)}})
    wanted, original, refused = checkpoint.load(path, "x"), path.read_bytes(), 0
    for at in range(len(original)):
        for bit in range(8) if LONG else (4,):
            changed = bytearray(original)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            try:
                assert same(checkpoint.load(path, "x"), wanted), (at, bit)
            except Refused:
                refused += 1
    say(capsys, f"{len(original)} bytes of a checkpoint, {refused} flips refused, the others change nothing")


# ------------------------------------------------------------------------------------------------------ strangers' files


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_pickles_never_run(tmp_path, monkeypatch, built):
    monkeypatch.chdir(tmp_path)
    Path("raw.pt").write_bytes(pickle.dumps(Code()))
    torch.save({"format": 1, "kind": "mora", "code": Code()}, "zip.pt")
    np.save("array.npy", np.array([Code()], dtype=object), allow_pickle=True)
    np.savez("objects.npz", labels=np.array([Code()], dtype=object), allow_pickle=True)
    Path("config").mkdir()
    peft = Path("peft")
    peft.mkdir()
    (peft / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    torch.save({"code": Code()}, peft / "adapter_model.bin")
    for read in (lambda: checkpoint.load("raw.pt"), lambda: checkpoint.load("zip.pt", "mora"), lambda: data.load_study("objects.npz"),
                 lambda: studies.read_picture("array.npy"), lambda: interchange.load_peft(torch.nn.Linear(2, 2), peft)):  # fmt: skip
        with pytest.raises(ValueError) as refused:
            read()
        assert len(str(refused.value).splitlines()) == 1
    assert not Path("ran").exists()


def test_weights_are_loaded_without_code_everywhere():
    calls = [line.strip() for p in [*ROOT.glob("*.py"), *(ROOT / "minilora").glob("*.py")] for line in p.read_text().splitlines() if re.search(r"torch\.load\(|np\.load\(|pickle", line)]
    assert len(calls) >= 4 and not any("import pickle" in c for c in calls)
    assert all("weights_only=True" in c or "allow_pickle=False" in c for c in calls if ".load(" in c), calls


def test_bombs_are_refused_before_they_unpack(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as z, z.open("images.npy", "w", force_zip64=True) as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (400, 1000, 1000)})
        for _ in range(400):
            f.write(bytes(10**6))
    assert (tmp_path / "bomb.npz").stat().st_size < 10**6
    with pytest.raises(Refused, match="bomb.npz: .* bytes would unpack to 400,000,"):
        data.read_npz(tmp_path / "bomb.npz")
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as z, z.open("images.npy", "w") as f:  # a header that promises 10^15 bytes
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (10**15,)})
    with pytest.raises(Refused, match="lie.npz: not a readable"):
        data.read_npz(tmp_path / "lie.npz")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", bytes(10**8))
    with pytest.raises(Refused, match="bomb.pt: not a checkpoint"):
        checkpoint.load(tmp_path / "bomb.pt")
    (tmp_path / "deep.json").write_text("[" * 10**6)
    with pytest.raises(Refused, match="deep.json: not readable as JSON"):
        checkpoint.read_json(tmp_path / "deep.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 10**5  # KiB


def signed(folder, manifest):
    """Write a manifest whose own hash fits, as a stranger can."""
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    (folder / "manifest.json").write_text(json.dumps(body | {"sha256": data.digest(body)}))


def test_foreign_manifests_are_refused(built, tmp_path, capsys):
    """Every entry replaced by values of other types, with a hash that fits: one line, or a folder that opens."""
    odd = [None, True, -1, 0, 10**30, 1.5, "", "../x", "/etc/passwd", [], ["a", "a"], [None], {}, {"a": 1}, {"mask": "../x", "sampler": "/x"}, "x" * 10**5, float("nan")]
    tried = 0
    for name, kind in (("mora/onnx", serve.Diagnoser), ("swap", serve.Synthesizer)):
        folder = tmp_path / kind.__name__
        shutil.copytree(built / name, folder)
        original = json.loads((folder / "manifest.json").read_text())
        cases = [original | {key: value} for key in {*original} - {"sha256"} for value in odd] + [{k: v for k, v in original.items() if k != key} for key in {*original} - {"sha256"}]
        for inner in ("numeric", "adapters"):
            for k in original.get(inner) or ():
                cases += [original | {inner: original[inner] | {k: value}} for value in odd]
        for manifest in cases if LONG else random.Random(5).sample(cases, 120):
            signed(folder, manifest)
            tried += 1
            try:
                served = kind(folder, "cpu")
                served.predict(notes=["a"]) if kind is serve.Diagnoser else served.sample(["a"], 1)
            except Refused as error:
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, error
        signed(folder, original)
        kind(folder, "cpu")
    say(capsys, f"{tried} foreign manifests")


def test_graphs_that_reach_out_or_bring_their_own_operators_are_refused(built, tmp_path):
    folder = tmp_path / "f"

    def foreign(change):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(built / "mora/onnx", folder)
        graph = onnx.load(folder / "mask.onnx", load_external_data=False)
        change(graph)
        (folder / "mask.onnx").write_bytes(graph.SerializeToString())
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["mask.onnx"] = data.sha256(folder / "mask.onnx")
        signed(folder, manifest)
        with pytest.raises(Refused) as refused:
            serve.Diagnoser(folder, "cpu")
        return str(refused.value)

    def outside(where):
        def change(graph):
            weight = graph.graph.initializer[0]
            weight.ClearField("raw_data")
            weight.data_location = onnx.TensorProto.EXTERNAL
            entry = weight.external_data.add()
            entry.key, entry.value = "location", where
        return change

    for where in ("../secret", "/etc/passwd", "beside"):
        assert "mask.onnx: keeps weights in another file" in foreign(outside(where))

    def operators(graph):
        graph.opset_import.add(domain="evil", version=1)
        graph.graph.node[0].domain, graph.graph.node[0].op_type = "evil", "Evil"

    assert "mask.onnx: onnxruntime cannot load it" in foreign(operators)


# --------------------------------------------------------------------------------------------------------- odd requests


NOTES = ["fever", "", " ", None, 5, b"fever", "x" * 10**6, "word " * 10**5, "\ud800 lone", "\u202e\u05d0\u05d1", "\x00", "🫁" * 50, "[MASK]", ["fever"], float("nan"), True]
IMAGES = [np.full((32, 32), 9, np.uint8), np.zeros((32, 32), np.uint8), np.full((1, 1), 7, np.uint8), np.full((3, 900), 7, np.uint8), np.full((8, 8, 3), 9, np.uint8), None, np.zeros((0, 4), np.uint8),
          np.full((8, 8), np.nan), np.full((8, 8), 3, np.int64), "image", 5, [[1, 2], [3]], np.zeros((2, 2, 2, 2), np.uint8), np.array(None), np.full((8, 8), 1, bool)]  # fmt: skip
VITALS = [[37.0, 98.0, 70.0], None, [np.nan] * 3, [np.inf, 1, 2], [1, 2], {"temperature": 38}, {"no": 1}, {}, "abc", 5, [10**300, 0, 0], [1e38] * 3, [None, 1, None], ["a", "b", "c"], [[1, 2, 3]]]


def answered(call, check):
    """'answer' or 'refused'; anything else fails the test."""
    try:
        check(call())
        return "answer"
    except Refused as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 5000, str(error)[:300]
        return "refused"


def test_odd_requests_are_answered_or_refused(built, capsys):
    chance, counts = random.Random(2), {"answer": 0, "refused": 0}
    diagnoser, synthesizer = serve.Diagnoser(built / "mora/onnx", "cpu"), serve.Synthesizer(built / "swap", "cpu")
    good = {diagnoser: lambda: diagnoser.predict(images=IMAGES[:1], notes=["fever"], vitals=[VITALS[0]]), synthesizer: lambda: synthesizer.sample(["fever"], 2, seed=3, adapter="draw")}
    before = {served: ask() for served, ask in good.items()}

    def probabilities(p):
        assert p.dtype == np.float32 and np.isfinite(p).all() and abs(p.sum(1) - 1).max() < 1e-5

    def pictures(x):
        assert x.dtype == np.uint8 and x.shape[1:] == (32, 32)

    some = lambda pool, n: [chance.choice(pool) if chance.random() < oddity else pool[0] for _ in range(n)]
    for k in range(total := 5000 if LONG else 500):
        oddity = chance.choice([0, 0.01, 0.2, 0.7])
        n = chance.choice([0, 1, 1, 1, 2, 3, 300])
        if k % 4:
            request = {"images": some(IMAGES, n), "notes": some(NOTES, n), "vitals": some(VITALS, n), "sound": [1]}
            request["filled"] = some([set(), [], {"image"}, ["note", "vitals"], {"sound"}, "image", None, [5], [[]]], n)
            request = {key: chance.choice([v] * 20 + [None, v[1:], 5, "x"]) for key, v in request.items() if chance.random() < (0.02 if key == "sound" else 0.3 if key == "filled" else 0.7)}
            call = lambda request=request: diagnoser.predict(**request)
            counts[answered(call, probabilities)] += 1
        else:
            steps, guidance = chance.choice([1, 2, 3, 0, -1, 10**9, 2.5, "3", None, True, np.int64(2)]), chance.choice([2.0, 0, 1, -1, np.nan, np.inf, "2", None, 10**6, True])
            seed, adapter = chance.choice([0, 1, -1, 2**63, 1.5, None, "0"]), chance.choice([None, "draw", "base", "other", 5, "../x"])
            notes, grain = chance.choice([some(NOTES, min(n, 5)), "fever", None, 5, ["fever"]]), chance.choice([True, True, False, False, 1, None, "no", np.ones(2)])
            counts[answered(lambda a=(notes, steps, guidance, seed, adapter, grain): synthesizer.sample(*a), pictures)] += 1
        if k % 25 == 0:
            for served, ask in good.items():
                np.testing.assert_array_equal(ask(), before[served])
    say(capsys, f"{total} odd requests: {counts}")
    assert counts["answer"] > 100 and counts["refused"] > 200


def test_odd_command_lines_end_in_one_line(built, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "open_run", lambda cfg: sys.exit(0))  # after all checks, before anything is written
    shutil.copytree(built, "b")
    np.save("grey.npy", IMAGES[0])
    chance, counts, codes = random.Random(3), {}, {}
    odd = ["-1", "0", "nan", "inf", "1e400", "", " ", "abc", "../..", "/proc/self/mem", "/dev/null", "x" * 5000, "🫁", "\u202eabc", "b", "b/study.npz", "b/mora", "b/mora/onnx", "99999999999999999999", "1.5", "1", "2", "8", "16", "0.5", "[1]", "None", "--", "mora:1", "any:0.5",
           "b/draw", "b/mora/config.json", "b/draw/model.pt"]  # fmt: skip
    trained = {train_mora: ["--data", "--source", "--missing", "--methods", "--seeds", "--lr", "--image-size", "--patch", "--width", "--depth", "--heads", "--steps", "--batch", "--buckets", "--device", "--augment", "--train-share", "--rank", "--absent", "--keep"],
               train_selora: ["--data", "--source", "--rule", "--seeds", "--lr", "--every", "--lam", "--budget", "--targets", "--capacity", "--width", "--heads", "--steps", "--batch", "--replay", "--judge", "--preset", "--fisher", "--ratio-of", "--latent", "--factor"]}  # fmt: skip
    lines = []
    for script, flags in trained.items():
        for _ in range(300 if LONG else 60):
            line = ["--out", chance.choice(["o", "b/study.npz", "/dev/null/x", "b/mora"]), "--phantoms", "60", "--device", "cpu"] if chance.random() < 0.9 else []
            for flag in chance.sample(flags, chance.choice([1, 1, 2])):
                line += [flag, chance.choice(odd)]
            lines.append((script, line if "--phantoms" in line else [*line, "--phantoms", "0"]))
    folders = ["b/mora/onnx", "b/draw/onnx", "b/swap", "b/mora", "b", "nowhere"]
    for _ in range(400 if LONG else 80):
        module, commands = chance.choice([(export, ["mora", "selora", "check", "predict", "sample", "peft"]), (serve_cli, ["check", "predict", "sample"]), (studies, ["inspect", "from-csv"])])
        line = [chance.choice(commands), chance.choice(folders if module is not studies else ["b/study.npz", "b", "b/mora/config.json", *odd])]
        for flag in chance.sample(["--note", "--image", "--filled", "--data", "--split", "--missing", "--out", "--n", "--seed", "--steps", "--guidance", "--adapter", "--temperature", "--device", "--size", "--format", "--method"], 2):
            line += [flag, chance.choice(["grey.npy", "fever", "p.csv", "1", "2", "cpu", *odd])]
        if line[0] in ("mora", "selora", "peft") and chance.random() < 0.8:
            line[1] = chance.choice(["b", "nowhere", "grey.npy"])  # a whole export takes a second
        lines.append((module, line))
    for script, line in lines:
        try:
            script.main(line)
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        said = capsys.readouterr()
        assert code in (0, 1, 2), (script.__name__, line, code)
        assert "Traceback" not in said.err and (code == 0 or said.err.strip() or "FAILED" in said.out), (script.__name__, line, said.err[-500:])
        if said.err.startswith("error: "):
            assert len(said.err.strip().splitlines()) == 1, said.err
        counts[script.__name__] = counts.get(script.__name__, 0) + 1
        codes[code] = codes.get(code, 0) + 1
    say(capsys, f"{len(lines)} odd command lines: {counts}, exit codes {codes}")
    assert not Path("o").exists() and same(data.read_npz("b/study.npz"), data.read_npz(built / "study.npz"))


# ------------------------------------------------------------------------------------------------------------------ load


def test_threads_get_the_answers_of_one(built, capsys):
    diagnoser, chance = serve.Diagnoser(built / "mora/onnx", "cpu"), random.Random(4)
    rng = np.random.default_rng(0)
    pool = []
    for _ in range(60):
        n = chance.choice([1, 1, 1, 2, 5])
        images = [rng.integers(1, 255, (32, 32), dtype=np.uint8) if chance.random() < 0.6 else None for _ in range(n)]
        notes = [chance.choice(["fever and cough", "night sweats", "smoker"]) if chance.random() < 0.6 or images[i] is None else None for i in range(n)]
        pool.append({"images": images, "notes": notes, "vitals": [[37.0 + k, 95.0, 70.0] if chance.random() < 0.5 else None for k in range(n)]})
    wanted = [diagnoser.predict(**request) for request in pool]
    fresh, wrong, total = serve.Diagnoser(built / "mora/onnx", "cpu"), [], 5000

    def client(k):
        order = random.Random(k)
        for _ in range(total // 8):
            i = order.randrange(len(pool))
            if not np.array_equal(fresh.predict(**pool[i]), wanted[i]):
                wrong.append(i)

    def held():  # resident memory; where the system does not say, its peak
        statm = Path("/proc/self/statm")
        return int(statm.read_text().split()[1]) if statm.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run():
        threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]

    total = 1000
    run()  # warm-up: sessions are made, arenas grow
    before, total, began = held(), 5000, time.monotonic()
    run()
    growth = held() / before - 1
    say(capsys, f"5000 requests from 8 threads in {time.monotonic() - began:.1f} s, {len(wrong)} differ, memory {growth:+.1%}")
    assert not wrong and growth < 0.05


# ------------------------------------------------------------------------------------------------------ disk and folders


def forked(function):
    """(exit code, stderr) of a function in a process of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(write, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        code = 1
        try:
            function()
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException as error:
            os.write(2, repr(error).encode())
        sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with open(read, "rb") as f:
        said = f.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.strip()


SHORT = [*TINY, "--methods", "head", "mora"]


def test_a_full_disk_leaves_the_older_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"format": 1, "kind": "x", "w": torch.zeros(3)})
    before = path.read_bytes()

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with data.one_line_errors():
            checkpoint.save(path, {"format": 1, "kind": "x", "w": torch.zeros(10**5)})

    code, said = forked(write)
    assert code == 2 and "x.pt" in said and "File too large" in said and "\n" not in said
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.pt"]

    def train():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        train_mora.main([*SHORT, "--out", "run"])

    code, said = forked(train)
    assert code == 2 and said.startswith("error: runs/base/") and "File too large" in said and "\n" not in said


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    (tmp_path / "locked").mkdir(mode=0o555)

    def as_nobody():
        if os.getuid() == 0:  # root may write anywhere
            os.setuid(65534)
        train_mora.main([*SHORT, "--out", "locked/run"])

    code, said = forked(as_nobody)
    assert code == 2 and said == "error: locked/run: Permission denied", said
    code, said = forked(lambda: train_mora.main([*SHORT, "--out", "/dev/null/run"]))
    assert code == 2 and said.startswith("error: /dev/null") and "Not a directory" in said


def test_a_run_folder_in_use_says_by_whom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint.hold(tmp_path / "run")
    try:
        code, said = forked(lambda: (checkpoint.HELD.clear(), train_mora.main([*SHORT, "--out", "run"])))
    finally:
        checkpoint.HELD.pop().close()
    assert code == 2 and re.fullmatch(rf"error: run: in use by process {os.getpid()} on \S+, since [\d: -]+; wait until it ends, or choose another --out", said), said
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]  # nothing half-written
    train_mora.main([*SHORT, "--out", "run"])  # the lock is gone with its holder, however that ended
    capsys.readouterr()


def test_odd_paths_other_file_systems_and_a_clock_that_goes_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_mora.main([*SHORT, "--out", "plain"])
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    shm = Path("/dev/shm")
    outs = [Path("a folder") / "ein Lauf – 肺.run"]
    if shm.is_dir() and os.stat(shm).st_dev != os.stat(tmp_path).st_dev:
        outs.append(shm / f"minilora-{os.getpid()}")
    try:
        for out in outs:
            train_mora.main([*SHORT, "--out", str(out)])
            export.main(["mora", str(out)])
            assert [(out / n).read_bytes() == (tmp_path / "plain" / n).read_bytes() for n in ("model.pt", "metrics.json", "log.jsonl")] == [True] * 3
            assert serve.Diagnoser(out / "onnx", "cpu").predict(notes=["fever"]).shape == (1, 4)
    finally:
        for out in outs[1:]:
            shutil.rmtree(out, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------- stops and numbers


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_while_data_are_read_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys, number, code):
    monkeypatch.chdir(tmp_path)
    draw = train_mora.read_target
    monkeypatch.setattr(train_mora, "read_target", lambda cfg: (os.kill(os.getpid(), number), draw(cfg))[1])
    with pytest.raises(SystemExit) as stopped:
        train_mora.main([*SHORT, "--out", "run"])
    assert stopped.value.code == code and "--resume" in capsys.readouterr().out
    assert [p.suffixes for p in (tmp_path / "runs/base").iterdir()] == [[".last", ".pt"]]


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_stop_is_at_once(tmp_path, monkeypatch, capsys, number, code):
    monkeypatch.chdir(tmp_path)

    def twice(cfg):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(train_mora, "read_target", twice)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        train_mora.main([*SHORT, "--out", "run"])
    assert stopped.value.code == code and "stopped at once" in capsys.readouterr().out and time.monotonic() - began < 4


def test_ctrl_c_in_export_is_one_line_and_leaves_nothing(built, tmp_path, monkeypatch, capsys):
    shutil.copytree(built / "draw", tmp_path / "draw")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(export_selora, "torch_answers", lambda *a: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stopped:
        export.main(["selora", "draw", "--out", "new"])
    assert stopped.value.code == 130 and capsys.readouterr().err.strip() == "stopped"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("fault", ["loss", "gradient", "fisher"])
def test_numbers_that_are_none_stop_and_leave_the_last_save(tmp_path, monkeypatch, capsys, fault):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_selora, "SAVE_EVERY", 2)
    monkeypatch.setattr(train_selora, "LOG_EVERY", 2)
    monkeypatch.setattr("minilora.report.pyplot", lambda: None)
    loss, scores, calls = train_selora.diffusion.denoising_loss, selora.FisherProbe.scores, []

    def broken(model, *args, **kwargs):
        each = loss(model, *args, **kwargs)
        if kwargs.get("per_sample") and model.training and each.requires_grad and selora.adapters(model):
            calls.append(1)
            if len(calls) == 5 and fault == "loss":
                return each * float("nan")
            if len(calls) == 5 and fault == "gradient":  # a finite loss with an infinite gradient
                model.unet.first.B.register_hook(lambda g: g * float("inf"))
        return each

    monkeypatch.setattr(train_selora.diffusion, "denoising_loss", broken)
    if fault == "fisher":
        monkeypatch.setattr(selora.FisherProbe, "scores", lambda probe: scores(probe) | ({"unet.first": selora.Score(float("nan"), 1.0, 1.0, 1.0)} if len(calls) == 5 else {}))
    with pytest.raises(SystemExit) as stopped:
        train_selora.main([*DRAW, "--out", "run", "--steps", "8"])
    said = capsys.readouterr().err.strip()
    words = {"loss": "the loss is nan", "gradient": "the gradient of unet.first.B is not finite", "fisher": "the Fisher information of layer unet.first is nan"}[fault]
    assert stopped.value.code == 2 and re.fullmatch(rf"error: ratio s0 lr 0.01: {words} at step 4, samples \[[\d, ]+\]; .*", said), said
    kept = checkpoint.load(tmp_path / "run/last.pt", "resume")
    assert kept["step"] == 4 and all(v.isfinite().all() for v in kept["state"].values())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minilora.report.pyplot", lambda: None)
    train_selora.main([*DRAW, "--out", "run", "--steps", "8", "--resume"])  # and it can go on from there


FOLDED = [  # {modality: columns}, and a flag for each of them in their order
    ({"labs": ["WBC %", "WBC #", "WBC"]}, ["WBC-percent-sign", "WBC-number-sign", "WBC"]),
    ({"labs": ["WBC %", "pO2 saturation", "temperature (C)"]}, ["WBC-", "pO2-saturation", "temperature-C-"]),  # alone in it
    ({"labs": ["out", "note", "help", "labs-out", "h", "device"]}, ["labs-out-2", "labs-note", "labs-help", "labs-out", "h", "labs-device"]),
    ({"vitals": ["age", "WBC %"], "labs": ["age", "WBC %"], "more": ["labs-age"]}, ["age", "WBC-", "labs-age-2", "labs-WBC-", "labs-age"]),
    ({"labs": ["%", "-", " ", "  ", "\x00"]}, ["percent-sign", "hyphen-minus", "labs-", "labs--2", "u0"]),
    ({"labs": ["a  b", "a b", "a%b", "a-b"]}, ["labs-a-b", "labs-a-b-2", "a-percent-sign-b", "a-b"]),
]


@pytest.mark.parametrize("numeric,flags", FOLDED)
def test_every_column_has_a_flag_of_its_own(numeric, flags, monkeypatch, capsys, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr(serve_cli, "own_manifest", lambda folder: {"numeric": {name: {"columns": columns} for name, columns in numeric.items()}})
    line = [word for i, flag in enumerate(flags) for word in (f"--{flag}", str(-i))]
    args, columns = serve_cli.command_line(["predict", str(tmp_path), *line])
    assert columns == dict(zip(flags, [(name, column) for name, group in numeric.items() for column in group]))
    assert [getattr(args, f"column {flag}") for flag in columns] == [str(-i) for i in range(len(flags))]
    with pytest.raises(SystemExit):
        serve_cli.command_line(["predict", str(tmp_path), "--help"])
    words = " ".join(capsys.readouterr().out.split())
    for flag, (name, column) in columns.items():
        assert f"--{flag} NUMBER {name}: {' '.join(column.split())}".rstrip() in words


def test_columns_that_fold_to_one_flag_are_served(built, tmp_path, monkeypatch, capsys):
    shutil.copytree(built / "mora/onnx", tmp_path / "m")
    manifest = json.loads((tmp_path / "m/manifest.json").read_text())
    columns = manifest["numeric"]["vitals"]["columns"]
    columns[:2] = ["WBC %", "WBC #"]
    signed(tmp_path / "m", manifest)
    diagnoser = serve.Diagnoser(tmp_path / "m", "cpu")
    for flag, column in (("--WBC-percent-sign", "WBC %"), ("--WBC-number-sign", "WBC #")):
        serve_cli.main(["predict", str(tmp_path / "m"), "--device", "cpu", flag, "7.5"])
        wanted = diagnoser.predict(vitals=[{column: 7.5}])[0]
        said = capsys.readouterr().out
        assert all(f"{name:20s} {p:.3f} " in said for name, p in zip(diagnoser.classes, wanted)), said
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        serve_cli.main(["predict", "m", "--WBC-", "7.5"])
    assert stopped.value.code == 2 and "unrecognized arguments: --WBC-" in capsys.readouterr().err
