"""A pretrained ViLT as the base of MoRA: a folder in the layout of transformers -> a `vit.ViT`.

ViLT (Kim et al., arXiv 2102.03334) is our `ViT` but for names and constants. The text's [CLS] always
stands at position 0, so what it enters the blocks with is one vector: our classification token.
Query, key and value are one matrix here. The image's own [CLS] has no patch, only a place. What
remains of the positions and token types are sums. Skip this file when you read for a method.

Letters: V words, P word positions, D width, G patches along an edge of the image, p patch size.
"""

import json
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from minilora.checkpoint import WEIGHT_FILES, read_archive
from minilora.data import Refused, refusing
from minilora.wordpiece import WordPiece

# The settings that are sizes here, with the values that transformers takes where one is not given.
SIZES = {
    "vocab_size": 30522, "max_position_embeddings": 40, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "image_size": 384, "patch_size": 32,
    "num_channels": 3,
}  # fmt: skip
# Settings that change what is computed, and the values with which it is what `ViT` computes. Every
# other setting, of today or of tomorrow, has to be off ...
GOOD = {
    "model_type": ("vilt",),
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "max_image_length": (-1, None),
    "pad_token_id": (0, None),
}
OFF = (None, False, "", [], {})
# ... but for those that say how a model was made or trains, or belong to heads that are not read.
HARMLESS = {
    "architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype",
    "initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob", "num_images",
    "type_vocab_size", "modality_type_vocab_size", "tie_word_embeddings", "id2label", "label2id",
    "problem_type", "return_dict", "layer_norm_eps",
}  # fmt: skip
# Files that a folder may have, and what they may say of the images and words that a model has seen.
PREPARATION = {
    "preprocessor_config.json": {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_normalize": True,
        "do_rescale": True,
    },
    "tokenizer_config.json": {"do_lower_case": True, "strip_accents": True},
}
# Of a block: our names and theirs.
BLOCK = {
    "norm1": "layernorm_before",
    "attention.out": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.0": "intermediate.dense",
    "mlp.2": "output.dense",
}


def read_vilt(folder, modalities=("image", "note"), image_size=None):
    """(keyword arguments of a `vit.ViT`, its state but for the head) of a ViltModel in a folder, or
    of a model that holds one: weights are read, and nothing of it is run.

    modalities: image, note or both; image_size: the checkpoint's own, or another one, to which the
    patches' positions are interpolated. `Refused` if a file is missing or damaged, a setting is not
    known to mean the same here, or a weight is missing, of another shape or fits nothing."""
    others = [name for name in modalities if name not in ("image", "note")]
    if others:
        raise Refused(f"{folder}: a ViLT reads image and note; it has no place for {others[0]}")
    config = read_config(folder)
    check_preparation(folder)
    D = config["hidden_size"]
    patch = config["patch_size"]
    image_size = image_size or config["image_size"]
    with refusing(folder):
        if image_size % patch or config["image_size"] % patch:
            raise ValueError(f"image size {image_size} is not divisible by the patch size {patch}")
    vocabulary = read_vocabulary(folder, config["vocab_size"])
    weights = Weights(folder)
    tokens = weights.embeddings(config, image_size // patch, vocabulary.ids["[CLS]"])
    kinds = torch.stack([tokens["kind"][modality] for modality in modalities])  # [M,D]
    state = {"cls": tokens["cls"], "kind": kinds[:, None]}
    for modality in modalities:
        state |= tokens[modality]
    for i in range(config["num_hidden_layers"]):
        state |= weights.block(i, D, config["intermediate_size"])
    for ours, theirs, shape in (("norm", "layernorm", (D,)), ("pooler", "pooler.dense", (D, D))):
        state[f"{ours}.weight"], state[f"{ours}.bias"] = weights.pair(theirs, *shape)
    weights.all_taken()
    arguments = dict(
        modalities=list(modalities),
        image_size=image_size,
        channels=config["num_channels"],
        patch=patch,
        width=D,
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        buckets=config["vocab_size"],
        positions=config["max_position_embeddings"] - 1,
        eps=config["layer_norm_eps"],
        image_token=True,
    )
    return arguments, {name: value.contiguous() for name, value in state.items()}


def read_vocabulary(folder, size=None):
    """The `WordPiece` of a folder's vocab.txt; `Refused` if it has not `size` pieces."""
    path = Path(folder) / "vocab.txt"
    try:
        # newline: a piece may hold what Python takes for the end of a line.
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: not readable ({type(error).__name__})") from None
    with refusing(path):
        vocabulary = WordPiece(text)
    if size is not None and vocabulary.size != size:
        raise Refused(f"{path}: has {vocabulary.size} pieces; config.json says {size}")
    return vocabulary


def read_json(path):
    """The dictionary of settings in a JSON file; `Refused` if it holds none."""
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path}: not readable as JSON ({type(error).__name__})") from None
    if not isinstance(settings, dict):
        raise Refused(f"{path}: holds a {type(settings).__name__}; needs a dictionary of settings")
    return settings


def check_preparation(folder):
    """`Refused` if a file beside the weights says that images or words were prepared otherwise than
    here: pixels in [-1,1], words in lower case without accents."""
    for name, good in PREPARATION.items():
        path = Path(folder) / name
        settings = read_json(path) if path.is_file() else {}
        for key, value in good.items():
            if settings.get(key) not in (None, value):
                raise Refused(f"{path}: {key} is {settings[key]!r:.40}; only {value!r} can be read")


def read_config(folder):
    """The settings of a folder's config.json, those of `SIZES` and layer_norm_eps always among
    them; `Refused` with the first that is not known to mean the same here."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise Refused(f"{path}: no such file; --base takes a folder with config.json, "
                      f"{' or '.join(WEIGHT_FILES)}, and vocab.txt")
    config = SIZES | {"model_type": None, "layer_norm_eps": 1e-12} | read_json(path)
    for key, value in config.items():
        # As text, for 1 == True.
        good = [repr(value) for value in GOOD.get(key, OFF)]
        if key in SIZES:
            if type(value) is not int or value < 1:
                raise Refused(f"{path}: {key} is {value!r:.40}; must be a whole number from 1 on")
        elif key not in HARMLESS and repr(value) not in good:
            raise Refused(f"{path}: {key} is {value!r:.40}; only a ViLT with {key} "
                          f"{' or '.join(good)} can be read")
    eps = config["layer_norm_eps"]
    if type(eps) is not float or not 0 < eps < 1:
        raise Refused(f"{path}: layer_norm_eps is {eps!r:.40}; must be a number in (0,1)")
    if config["intermediate_size"] != 4 * config["hidden_size"]:
        raise Refused(f"{path}: intermediate_size is {config['intermediate_size']}; "
                      f"must be 4 times hidden_size, {4 * config['hidden_size']}")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise Refused(f"{path}: hidden_size {config['hidden_size']} is not divisible by "
                      f"num_attention_heads {config['num_attention_heads']}")
    if config["max_position_embeddings"] < 2:
        raise Refused(f"{path}: max_position_embeddings is 1; must be at least 2")
    return config


class Weights:
    """The weights of a ViltModel in a folder, taken one by one: `Refused` with the name of one that
    is missing, of another shape, not finite or left over."""

    def __init__(self, folder):
        self.path, weights = read_weights(folder)
        inside = {key: value for key, value in weights.items() if key.startswith("vilt.")}
        self.prefix = "vilt." if inside else ""
        # What stands beside a model inside another one are heads, which have no use here.
        self.left = inside or weights

    def take(self, name, *shape):
        """The weight of a name, float32; None in the shape is any length."""
        key = self.prefix + name
        if key not in self.left:
            raise Refused(f"{self.path}: weight '{key}' is missing; a ViltModel has it")
        value = self.left.pop(key)
        same = [*value.shape] == [n if n else m for n, m in zip(shape, value.shape)]
        if len(value.shape) != len(shape) or not same or not value.is_floating_point():
            raise Refused(f"{self.path}: weight '{key}' is {[*value.shape]} of {value.dtype}; "
                          f"must be {[n or 'any' for n in shape]} of floats")
        value = value.float()
        if not value.isfinite().all():
            raise Refused(f"{self.path}: weight '{key}' holds numbers that are not finite")
        return value

    def pair(self, name, *shape):
        """(weight of the shape, bias as long as its first axis) of a layer."""
        return self.take(f"{name}.weight", *shape), self.take(f"{name}.bias", shape[0])

    def embeddings(self, config, grid, cls_id):
        """What makes the tokens: 'cls' [1,1,D], 'kind' {modality: [D]}, and for each modality its
        part of the state. grid: patches along an edge; cls_id: the id of [CLS]."""
        D = config["hidden_size"]
        patch = config["patch_size"]
        text = "embeddings.text_embeddings"
        words = self.take(f"{text}.word_embeddings.weight", config["vocab_size"], D)
        P = config["max_position_embeddings"]
        position = self.take(f"{text}.position_embeddings.weight", P, D)
        # All words are of the first type.
        position = position + self.take(f"{text}.token_type_embeddings.weight", None, D)[0]
        norm = self.pair(f"{text}.LayerNorm", D)
        kinds = self.take("embeddings.token_type_embeddings.weight", None, D)
        if len(kinds) < 2:
            raise Refused(f"{self.path}: has {len(kinds)} kinds of tokens; words and patches are two")
        first = words[cls_id] + position[0]  # [D]
        first = F.layer_norm(first, (D,), *norm, config["layer_norm_eps"]) + kinds[0]
        projection = "embeddings.patch_embeddings.projection"
        weight, bias = self.pair(projection, D, config["num_channels"], patch, patch)
        place = self.place(config["image_size"] // patch, grid, D)
        note = {"words.weight": words, "position": position[None, 1:]}
        note |= {"word_norm.weight": norm[0], "word_norm.bias": norm[1]}
        return {
            "cls": first[None, None],
            "kind": {"note": kinds[0], "image": kinds[1]},
            "note": note,
            "image": {"place": place, "patches.weight": weight, "patches.bias": bias},
        }

    def place(self, grid, wanted, D):
        """What is added to the image's tokens, [1,1+G^2,D], for a grid of `wanted` patches an edge:
        first its [CLS], then the patches, interpolated from the checkpoint's grid."""
        token = self.take("embeddings.cls_token", 1, 1, D)
        place = self.take("embeddings.position_embeddings", 1, 1 + grid**2, D)
        patches = place[:, 1:].reshape(1, grid, grid, D).permute(0, 3, 1, 2)  # [1,D,G,G]
        if wanted != grid:
            patches = F.interpolate(patches, (wanted, wanted), mode="bilinear", align_corners=True)
        return torch.cat([token + place[:, :1], patches.flatten(2).transpose(1, 2)], 1)

    def block(self, i, D, hidden):
        """The state of block i of a `ViT`."""
        theirs = f"encoder.layer.{i}"
        shapes = {"mlp.0": (hidden, D), "mlp.2": (D, hidden), "attention.out": (D, D)}
        state = {}
        for ours, name in BLOCK.items():
            pair = self.pair(f"{theirs}.{name}", *shapes.get(ours, (D,)))
            state[f"blocks.{i}.{ours}.weight"], state[f"blocks.{i}.{ours}.bias"] = pair
        qkv = [self.pair(f"{theirs}.attention.attention.{part}", D, D)
               for part in ("query", "key", "value")]
        state[f"blocks.{i}.attention.qkv.weight"] = torch.cat([weight for weight, _ in qkv])
        state[f"blocks.{i}.attention.qkv.bias"] = torch.cat([bias for _, bias in qkv])
        return state

    def all_taken(self):
        """`Refused` if a weight was not taken: the settings are those of another model."""
        left = sorted(key for key in self.left if not key.endswith(".position_ids"))
        if left:
            raise Refused(f"{self.path}: weight '{left[0]}' fits nothing; config.json is of "
                          "another model")


def read_weights(folder):
    """(path, {key: tensor}) of the weights in a folder; `Refused` if there are none, or they cannot
    be read."""
    paths = [Path(folder) / name for name in WEIGHT_FILES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise Refused(f"{folder}: has no {' or '.join(WEIGHT_FILES)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return path, load_file(path)
        if zipfile.is_zipfile(path):
            weights = read_archive(path)
        else:  # as torch wrote files before 1.6
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Refused:
        raise
    except ImportError:
        raise Refused(f"{path}: reading it needs safetensors: pip install "
                      "'minilora[pretrained]'") from None
    except Exception as error:
        # Errors of header, zip and pickle come as many types, all of which mean the same here.
        reason = (str(error).splitlines() or [""])[0][:80]
        raise Refused(f"{path}: not readable ({type(error).__name__}: {reason})") from None
    tensors = isinstance(weights, dict) and all(isinstance(v, torch.Tensor) for v in weights.values())
    if not tensors:
        raise Refused(f"{path}: holds no dictionary of tensors")
    return path, weights
