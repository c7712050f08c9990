"""The judge of sampled images: a frozen ViT of train_mora.py looks at them beside real ones.

Frechet distance between features, and how often a linear reader finds in an image what its words
state. Skip this file when you read for the method.

Letters: N images, T tokens, D width of the ViT.
"""

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


@torch.no_grad()
def agreement(reader, tokens, truth):
    """Share of the images in which the reader finds the attribute, of those whose words state
    it."""
    right = reader(tokens.flatten(1)) == truth
    return float(right[truth >= 0].float().mean())


def prepare(vit, target, parts, seed):
    """What `verdict` compares with at a seed: real held-out features, readers of finding and side,
    floor and ceiling.

    Nothing here has seen a held-out image: the readers are fitted on the training split. Rows:
    held-out, test first."""
    limit = min(400, len(parts["train"]))  # as many as for the floor
    rows = np.concatenate([parts["test"], parts["val"]])[:limit]
    n = len(rows)
    if n < 2:
        count = len(parts["train"])
        raise Refused(f"--judge needs 2 samples to train on or more; seed {seed} has {count}")
    train = np.random.default_rng((seed, 21)).permutation(parts["train"])
    tokens = last_tokens(vit, target.images[rows])  # [n,T,D]
    train_tokens = last_tokens(vit, target.images[train])
    real = features(tokens)
    readers = {}
    truths = {}
    ceiling = {}
    for name in ("kind", "side") if "agree" in target.attributes else ():
        attribute = target.attributes[name]
        # -1 where the words do not state it, or state something else.
        stated = np.where(target.attributes["agree"] == 1, attribute, -1)
        labels = torch.from_numpy(attribute[train]).to(tokens.device)
        readers[name] = linear_reader(train_tokens.flatten(1), labels)
        truths[name] = torch.from_numpy(stated[rows]).to(tokens.device)
        ceiling[name] = agreement(readers[name], tokens, truths[name])
    return {
        "rows": rows,
        "real": real,
        "readers": readers,
        "truths": truths,
        "n": n,
        "floor": metrics.frechet(real, features(train_tokens[:n])),
        "ceiling": ceiling,
    }


def verdict(vit, judge, images):
    """{'frechet', 'agreement_kind', 'agreement_side'} of uint8 images, one per row of the judge."""
    tokens = last_tokens(vit, images)
    result = {"frechet": metrics.frechet(judge["real"], features(tokens))}
    for name, truth in judge["truths"].items():
        result[f"agreement_{name}"] = agreement(judge["readers"][name], tokens, truth)
    return result
