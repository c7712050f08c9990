"""Freeze a trained run into ONNX graphs, check them, and predict with them.

    python export.py mora runs/mora                  # -> runs/mora/onnx
    python export.py selora runs/selora              # -> runs/selora/onnx: the sampler in one graph
    python export.py selora runs/selora --hot-swap runs/swap   # the base, and a file per adapter
    python export.py peft runs/selora --out adapter  # the adapter for PEFT or diffusers
    python export.py check runs/mora/onnx            # compare the graphs with torch
    python export.py predict runs/mora/onnx --image chest.png --note "fever, recent cold"
    python export.py sample runs/selora/onnx --note "coin lesion sinistral, febrile" --out sheet.png

`minilora/export_mora.py` and `minilora/export_selora.py` turn a run into graphs; skip them when
you read for a method. `predict`, `sample` and `check` are in `minilora/serve_cli.py` and import no
torch.
"""

import argparse
import sys
from pathlib import Path

from minilora import data, serve_cli
from minilora.data import Refused

FORMATS = ("peft", "diffusers")


def export_adapter(run, out, format="peft", method=None, seed=None):
    """Write a run's SeLoRA adapter for other tools into a new folder: `minilora/interchange.py`;
    beside it, as words.npz, the vectors of words that were trained too. Returns the folder.
    """
    from minilora import interchange
    from minilora.graphs import new_folder
    from minilora.models import load_selora

    saved, model, _ = load_selora(run, method, seed)
    words = {name: tensor.numpy() for name, tensor in saved["adapter"]["words"].items()}
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"--out {out}: exists and is not an empty folder")
    with new_folder(out) as work:
        with data.refusing():
            getattr(interchange, f"save_{format}")(model, work)
        if len(words["ids"]):
            data.write_atomic(work / "words.npz", data.npz_bytes(words))
            print(f"{out}/words.npz: the vectors of {len(words['ids'])} words that were trained too. "
                  "An adapter file has no place for them: set these rows of text.words.weight in "
                  "the base")
    return out


def command_line():
    """The parser of all commands; the flags of one are the arguments of its function."""
    parser = argparse.ArgumentParser(
        prog="export.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for kind in ("mora", "selora"):
        p = commands.add_parser(kind, help=f"export a run of train_{kind}.py as ONNX graphs")
        p.add_argument("run", type=Path, help=f"run folder of train_{kind}.py")
        p.add_argument("--method", help="method to export (default: that which the run kept)")
        p.add_argument("--seed", type=int, help="seed to export (default: that which the run kept)")
        p.add_argument("--out", type=Path, help="folder to write (default: RUN/onnx)")
        p.add_argument("--fp16", action="store_true",
                       help="compute in float16; inputs and outputs stay float32")
        if kind == "selora":
            p.add_argument("--hot-swap", type=Path, metavar="FOLDER",
                           help="write the adapter into FOLDER, beside a base that several share")
            p.add_argument("--name",
                           help="with --hot-swap: name of the adapter (default: the run folder's)")
    p = commands.add_parser("peft", help="write a run's SeLoRA adapter for PEFT or diffusers")
    p.add_argument("run", type=Path, help="run folder of train_selora.py")
    p.add_argument("--out", type=Path, required=True, help="new folder to write")
    p.add_argument("--format", choices=FORMATS, default="peft",
                   help="the library whose file format is written (default: peft)")
    p.add_argument("--method", help="method to write (default: that which the run kept)")
    p.add_argument("--seed", type=int, help="seed to write (default: that which the run kept)")
    for name, about in serve_cli.COMMANDS.items():
        commands.add_parser(name, help=f"{about}; see `export.py {name} --help`")
    return parser


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in serve_cli.COMMANDS:
        return serve_cli.main(argv)
    options = vars(command_line().parse_args(argv))
    command = options.pop("command")
    with data.one_line_errors():
        if command == "peft":
            out = export_adapter(**options)
            print(f"{options['format']} adapter: {out}")
        elif command == "mora":
            from minilora.export_mora import export_mora

            out = export_mora(**options)
            print(f"exported to {out}; try: python export.py predict {out} --help")
        else:
            if options["name"] and not options["hot_swap"]:
                raise Refused(f"--name {options['name']} names an adapter in a --hot-swap FOLDER: "
                              "give --hot-swap too")
            if options["hot_swap"] and (options["fp16"] or options["out"]):
                raise Refused("--hot-swap FOLDER says where the files go, and they are float32: "
                              "leave out --out and --fp16")
            from minilora.export_selora import export_selora

            out = export_selora(**options)
            print(f"exported to {out}; try: python export.py sample {out} --help")


if __name__ == "__main__":
    main()
