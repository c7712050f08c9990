"""The judge of sampled images: a frozen ViT of train_mora.py looks at them beside real ones.

Frechet distance between features, and how often a linear reader finds in an image what its words
state. Skip this file when you read for the method.

Letters: N images, T tokens, D width of the ViT.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from minilora import data, metrics
from minilora.data import Refused


@torch.no_grad()
def last_tokens(vit, images):
    """The ViT's normalised last tokens [N,T,D] of uint8 images [N,H,W] or [N,H,W,3]."""
    x = data.prepare_images(images, vit.config["image_size"], vit.config["channels"])
    parts = []
    for part in torch.from_numpy(x).to(vit.cls.device).split(500):
        tokens, bias = vit.embed({"image": part})
        for block in vit.blocks:
            tokens = block(tokens, bias)
        parts.append(vit.norm(tokens))
    return torch.cat(parts)


def features(tokens):
    """One vector per image, [N,D] numpy: the mean of its tokens [N,T,D]."""
    return tokens.mean(1).cpu().numpy()


def linear_reader(x, labels):
    """Logistic regression of labels [N] (-1 = unknown) on features [N,D]: a function features ->
    class [N]."""
    mean = x.mean(0)
    std = x.std(0) + 1e-6
    known = labels >= 0
    x = ((x - mean) / std)[known]
    labels = labels[known]
    linear = torch.nn.Linear(x.shape[1], int(labels.max()) + 1).to(x.device)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)  # nothing is drawn: the same features, the same reader
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=100, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x), labels) + 1e-3 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda features: linear((features - mean) / std).argmax(1)


@dataclass
class Judge:
    """What the images that are drawn from the words of held-out rows are compared with."""

    vit: torch.nn.Module
    rows: np.ndarray  # [n] held-out rows of the study
    real: np.ndarray  # [n,D] features of their images
    readers: dict  # {fact: a function tokens [n,T*D] -> class [n]}
    truths: dict  # {measure: (fact, [n] the class that the words rightly state, or -1)}
    training: np.ndarray  # uint8 [N,S,S] or [N,S,S,3] training images, as the drawn ones are
    floor: float  # Frechet distance of as many training images
    nearest: float  # median distance of the real images to the nearest training image
    ceiling: dict  # {measure: agreement of the real images}
    chance: dict  # {measure: agreement of the most common class}
    autoencoder: dict | None = None  # `verdict` on the real images through the autoencoder

    def facts(self):
        """The facts that the words of some row rightly state."""
        return [fact for fact in self.readers if fact in self.truths]


@torch.no_grad()
def agreement(reader, tokens, truth):
    """Share of the images in which the reader finds the fact, of those whose words state it."""
    right = reader(tokens.flatten(1)) == truth
    return float(right[truth >= 0].float().mean())


def facts_of(study):
    """{fact: ([N] its class, [N] the class where the words rightly state it, else -1)}.

    Of phantoms, the kind and the side of the lesion. Of other studies the label, as if every note
    stated it; of several findings nothing."""
    facts = {}
    if "agree" in study.attributes:
        for name in ("kind", "side"):
            value = study.attributes[name]
            facts[name] = (value, np.where(study.attributes["agree"] == 1, value, -1))
    elif not study.multilabel:
        facts["label"] = (study.labels, study.labels)
    return facts


def prepare(vit, study, train, rows, seed, views, new=None):
    """The `Judge` of images drawn from the words of the rows. views: the images of `train` and of
    the rows, uint8, of the size of drawn ones.

    The readers are fitted on the rows `train`: nothing here has seen a held-out image. new [N] bool:
    which notes have words that the base was not pretrained on; agreement is told for them and for
    the others too. `Refused` if there are fewer than two rows to compare."""
    train = np.random.default_rng((seed, 21)).permutation(train)
    rows = rows[: min(400, len(train))]  # as many as for the floor
    if len(rows) < 2:
        count = len(train)
        raise Refused(f"--judge needs 2 samples to train on or more; seed {seed} has {count}")
    tokens = last_tokens(vit, study.images[rows])  # [n,T,D]
    train_tokens = last_tokens(vit, study.images[train])
    real = features(tokens)
    floor = metrics.frechet(real, features(train_tokens[: len(rows)]))
    training, own = views
    _, distance = nearest(own[: len(rows)], training)
    judge = Judge(vit, rows, real, {}, {}, training, floor, float(np.median(distance)), {}, {})
    for fact, (value, stated) in facts_of(study).items():
        labels = torch.from_numpy(value[train]).to(tokens.device)
        judge.readers[fact] = linear_reader(train_tokens.flatten(1), labels)
        stated = stated[rows]
        measures = {fact: stated}
        if new is not None:
            measures[f"{fact}, new words"] = np.where(new[rows], stated, -1)
            measures[f"{fact}, known words"] = np.where(new[rows], -1, stated)
        for name, truth in measures.items():
            counts = np.bincount(truth[truth >= 0])
            if len(counts):
                truth = torch.from_numpy(truth).to(tokens.device)
                judge.truths[name] = (fact, truth)
                judge.ceiling[name] = agreement(judge.readers[fact], tokens, truth)
                judge.chance[name] = float(counts.max() / counts.sum())
    return judge


def verdict(judge, images):
    """{'frechet', 'nearest', and the agreement by measure} of uint8 images, one per row of the
    judge."""
    tokens = last_tokens(judge.vit, images)
    result = {
        "frechet": metrics.frechet(judge.real, features(tokens)),
        "nearest": float(np.median(nearest(images, judge.training)[1])),
    }
    for name, (fact, truth) in judge.truths.items():
        result[name] = agreement(judge.readers[fact], tokens, truth)
    return result


def described(judge):
    """What stands beside every verdict of a judge: {'n', 'floor', 'nearest', 'ceiling', 'chance',
    'autoencoder'}."""
    return {
        "n": len(judge.rows),
        "floor": judge.floor,
        "nearest": judge.nearest,
        "ceiling": judge.ceiling,
        "chance": judge.chance,
        "autoencoder": judge.autoencoder,
    }


def nearest(images, training):
    """(which of the training images, its distance), each [n], is nearest to each of the images;
    uint8 [n,S,S] or [n,S,S,3], all of one size. Distance: root mean squared difference of pixels,
    in grey levels of 255.

    A copy of a training image lies much nearer to it than held-out images do."""
    a = torch.from_numpy(images).flatten(1).float()  # [n,S*S]
    parts = []
    for part in torch.from_numpy(training).split(1000):  # all at once may not fit
        parts.append(torch.cdist(a, part.flatten(1).float()))  # [n,1000]
    which = torch.cat(parts, 1).argmin(1)
    # cdist rounds by a third of a grey level: a copy would not be at 0.
    difference = a - torch.from_numpy(training)[which].flatten(1)
    return which.numpy(), difference.square().mean(1).sqrt().numpy()
