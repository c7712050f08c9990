"""Draw docs/training.gif: samples from fixed noise and fixed words while SeLoRA trains, and the rank
of every layer beside them.

    python docs/animation.py              # about 2 minutes; needs the `pictures` extra
    python docs/animation.py --out training.gif --frames 60

The base and the settings are those of `make demo`, whose pretrained base is used where it is there
already. The words are those of the first held-out phantoms of seed 0: nothing is picked.
"""

import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError:
    raise SystemExit("error: the animation needs Pillow: pip install 'minilora[pictures]'") from None

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_selora  # noqa: E402
from minilora import data, ranks, samples, selora  # noqa: E402
from minilora.cli import Positive, check_bounds  # noqa: E402
from minilora.loop import Stopper  # noqa: E402
from minilora.task import read_studies  # noqa: E402
from minilora.unet import Denoiser  # noqa: E402

COLUMNS = 5  # held-out notes
SCALE = 3  # screen pixels of one pixel of an image
GAP = 8
LEFT = 58  # where the images start; to the left stand the names of the rows
TOP = 92  # where the first row starts; above stand the words
BAR = 5  # height of a layer's bar, and one pixel between two
UNIT = 13  # width of one rank
# Parts of the denoiser, in the order of its layers: how their names begin, and a name for readers.
PARTS = {
    "text encoder": ("text.",),
    "time and prompt": ("unet.time", "unet.prompt"),
    "UNet, down": ("unet.first", "unet.down"),
    "UNet, coarse": ("unet.coarse", "unet.middle"),
    "UNet, up": ("unet.up", "unet.last", "unet.gate"),
}
TITLE = "SeLoRA trains: images from the same noise and words (synthetic chest studies)"
RATE = 0.01  # learning rate, as in `make demo`
GREYS = 32  # of the palette
COLORS = {"open": (33, 113, 181), "waiting": (222, 229, 238)}  # ranks


@dataclass
class Options:
    """Draw samples and ranks while SeLoRA trains, as a GIF."""

    out: Path = Path("docs/training.gif")
    frames: Positive = 80  # Pictures; more of them early, when most changes.
    phantoms: Positive = 3000  # Synthetic studies to draw, of each domain.
    vae_steps: Positive = 500  # Steps of pretraining the autoencoder.
    pretrain_steps: Positive = 1700  # Steps of pretraining the denoiser.
    steps: Positive = 900  # Adaptation steps, while the pictures are taken.


def settings(options):
    """The configuration of train_selora.py: that of `make demo` but for what the options say."""
    return train_selora.Config(
        rule="ratio",
        phantoms=options.phantoms,
        vae_steps=options.vae_steps,
        pretrain_steps=options.pretrain_steps,
        steps=options.steps,
        width=28,
        text_width=32,
        heads=2,
        buckets=2048,
        positions=16,
    )


def moments(steps, frames):
    """The steps after which a picture is taken: from 0 to the last, closer together early on."""
    through = np.linspace(0, 1, frames) ** 1.5
    return np.unique((through * steps).round().astype(int)).tolist()


class Camera:
    """Stands where `adapt` expects a `Stopper`: after each step that is due it takes a picture, and
    it neither saves nor stops."""

    def __init__(self, due, draw):
        self.due = set(due)
        self.draw = draw
        self.frames = []

    def after(self, done, every=0, save=None):
        if done in self.due:
            self.frames.append(self.draw(done))


def indices(canvas):
    """uint8 [H,W], the palette's entry of each pixel of an RGB image of greys and `COLORS`."""
    pixels = np.asarray(canvas)  # [H,W,3]
    entries = (pixels[..., 0] / 255 * (GREYS - 1)).round().astype(np.uint8)
    for k, color in enumerate(COLORS.values()):
        entries[(pixels == color).all(2)] = GREYS + k
    return entries


def calmed(frames):
    """The frames [H,W] of `indices`, in which a pixel stays as it was until it has changed by more
    than one grey: what does not move takes no space in a GIF."""
    shown = frames[0]
    result = [shown]
    for entries in frames[1:]:
        grey = (entries < GREYS) & (shown < GREYS)
        near = abs(entries.astype(int) - shown) <= 1
        shown = np.where(grey & near & (entries < GREYS - 1), shown, entries)
        result.append(shown)
    return result


def write(draw, place, text, size=12, width=None):
    """Write text at a place, wrapped at `width` characters."""
    if width:
        text = textwrap.fill(text, width)
    draw.multiline_text(place, text, "black", ImageFont.load_default(size), spacing=2)


def draw_bars(draw, left, layers):
    """A bar for each adapter {name: layer}, from the top row on: open ranks dark, waiting ones
    light."""
    y = TOP
    for part, starts in PARTS.items():
        names = [name for name in layers if name.startswith(starts)]
        write(draw, (left, y - 2), part, 11)
        for name in names:
            layer = layers[name]
            for k in range(layer.capacity):
                x = left + 102 + k * UNIT
                color = COLORS["open" if k < layer.rank else "waiting"]
                draw.rectangle((x, y, x + UNIT - 2, y + BAR - 1), color)
            y += BAR + 1
        y += 4


def frame(step, steps, notes, rows, model):
    """One picture, `indices` [H,W]. rows {name: uint8 images [COLUMNS,S,S]}."""
    side = SCALE * next(iter(rows.values())).shape[1]
    right = LEFT + COLUMNS * (side + GAP) + 10
    layers = selora.adapters(model)
    height = TOP + max(len(rows) * (side + GAP), len(layers) * (BAR + 1) + 4 * len(PARTS)) + 24
    canvas = Image.new("RGB", (right + 102 + 8 * UNIT + 8, height), "white")
    draw = ImageDraw.Draw(canvas)
    write(draw, (GAP, 6), TITLE, 14)
    write(draw, (right, 6), f"step {step} of {steps}", 14)
    write(draw, (right, 30), f"rank of each layer\n{selora.adapter_parameters(model):,} adapter parameters", 12)
    for column, note in enumerate(notes):
        write(draw, (LEFT + column * (side + GAP), 30), note, 11, 17)
    for row, (name, images) in enumerate(rows.items()):
        y = TOP + row * (side + GAP)
        write(draw, (GAP, y + side // 2 - 14), name, 12, 8)
        for column, image in enumerate(images):
            picture = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(picture.convert("RGB"), (LEFT + column * (side + GAP), y))
    draw_bars(draw, right, layers)
    caption = "first held-out notes, nothing picked; drawn images without pixel noise"
    write(draw, (LEFT, height - 20), caption, 11)
    return indices(canvas)


def film(options):
    """The frames of a run, which is trained here."""
    cfg = settings(options)
    config = train_selora.check(cfg) | {"buckets": cfg.buckets, "positions": cfg.positions}
    studies, _ = read_studies(cfg)
    target = studies["target"]
    split = data.split(target, 0)
    with Stopper() as stop:
        both, vae, base, *_ = train_selora.prepare(cfg, config, studies, torch.device("cpu"), stop)
    pairs = both["target"]
    model = Denoiser(**config)
    model.load_state_dict(base)
    job = ranks.Job("ratio", "ratio", rank=1)
    train_selora.inject(cfg, pairs, model, job, 0, split["train"])

    rows = split["test"][:COLUMNS]
    notes = samples.notes_of(target, rows)
    real = samples.look(target, vae, rows)

    def draw(step):
        shown = {}
        for k, name in enumerate(("drawn", "drawn, other noise")):
            seeds = 10**6 * k + rows  # as in samples.png of a run
            shown[name] = samples.draw(cfg, model, vae, pairs, rows, seeds)
        return frame(step, cfg.steps, notes, shown | {"real": real}, model)

    camera = Camera(moments(cfg.steps, options.frames), draw)
    camera.after(0)
    train_selora.adapt(cfg, pairs, model, job, 0, RATE, split["train"], None, camera)
    return camera.frames


def save(frames, path):
    """Write frames [H,W] of `indices` as a GIF: 0.12 seconds each, the first and the last longer."""
    greys = np.linspace(0, 255, GREYS).round().astype(np.uint8)
    palette = np.concatenate([np.stack([greys] * 3, 1), np.array([*COLORS.values()], np.uint8)])
    images = []
    for entries in calmed(frames):
        image = Image.fromarray(entries, "P")
        image.putpalette(palette.tobytes())
        images.append(image)
    durations = [120] * len(images)
    durations[0] = 1500
    durations[-1] = 4000
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0,
                   optimize=True, disposal=1)
    size = path.stat().st_size / 1e6
    print(f"{path}: {len(images)} frames, {images[0].width}x{images[0].height}, {size:.2f} MB")


def main(argv=None):
    options = tyro.cli(Options, args=argv, description=Options.__doc__)
    with data.one_line_errors():
        check_bounds(options)
        save(film(options), options.out)


if __name__ == "__main__":
    main()
