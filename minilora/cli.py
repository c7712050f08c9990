"""What both training scripts do around `run`: presets, bounds, and errors that end in one line.

Skip this file when you read for a method.
"""

from dataclasses import dataclass, replace
from typing import Annotated, get_type_hints

from minilora.checkpoint import release
from minilora.data import Refused, one_line_errors
from minilora.loop import Stopped, Stopper
from minilora.processes import own_part, pick_device, processes

LARGEST = 10**8  # of any whole number on a command line


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, which stand in the annotation of a setting: low <= value or above <
    value, and value <= high or value < below. NaN is never inside."""

    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None

    def __contains__(self, value):
        enough = value >= self.low if self.above is None else value > self.above
        if self.below is not None:
            return enough and value < self.below
        return enough and (self.high is None or value <= self.high)

    def __str__(self):
        if self.high is None and self.below is None:
            return f"at least {self.low}"
        start = f"[{self.low:g}" if self.above is None else f"({self.above:g}"
        end = f"{self.high:g}]" if self.below is None else f"{self.below:g})"
        return f"in {start},{end}"


Positive = Annotated[int, Bounds(low=1)]
Natural = Annotated[int, Bounds(low=0)]
Share = Annotated[float, Bounds(above=0, high=1)]


def check_bounds(cfg):
    """`Refused` with the first setting that is outside of its bounds, its value and the limit."""
    for name, hint in get_type_hints(type(cfg), include_extras=True).items():
        value = getattr(cfg, name)
        flag = name.replace("_", "-")
        if type(value) is int and abs(value) > LARGEST:
            raise Refused(f"--{flag} is {value}; the limit is {LARGEST}")
        for bounds in getattr(hint, "__metadata__", ()):
            if value not in bounds:
                raise Refused(f"--{flag} is {value}; must be {bounds}")


def with_preset(cfg, presets):
    """The configuration with its preset's sizes where the command line left the default."""
    if cfg.preset not in presets:
        raise Refused(f"--preset '{cfg.preset}' is not known; use {', '.join(presets)}")
    default = type(cfg)()
    sizes = presets[cfg.preset].items()
    return replace(cfg, **{k: v for k, v in sizes if getattr(cfg, k) == getattr(default, k)})


def guarded(run, cfg, presets):
    """Call run(cfg, stop). Bad input ends in one line and exit code 2, an interrupt in a saved
    state and a line that says how to go on."""
    with one_line_errors():
        stop = Stopper()
        try:
            cfg = with_preset(cfg, presets)
            check_bounds(cfg)
            with stop, processes(pick_device(cfg.device)):
                own_part([], cfg.batch)  # refused now rather than after the base is pretrained
                run(cfg, stop)
        except Stopped as stopped:
            print(
                "\nstopped; everything is saved. Go on with the same command and --resume "
                f"(run folder {cfg.out})"
            )
            raise SystemExit(stopped.code) from None
        except KeyboardInterrupt:
            print(
                "\nstopped at once; the last save stands. Go on with --resume "
                f"(run folder {cfg.out})"
            )
            raise SystemExit(stop.code or 130) from None
        except (MemoryError, RuntimeError) as error:
            # On the CPU torch has no type of its own for running out of memory.
            if "memory" not in str(error).lower():
                raise
            reason = str(error).splitlines()[0]
            raise Refused(
                f"out of memory ({reason}); use a smaller --batch or model"
            ) from None
        finally:
            release()
