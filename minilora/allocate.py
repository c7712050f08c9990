"""What the components of a trained adapter are worth, for the plans probe-svd and oracle: singular
vectors, the gradients by their multipliers, and how much the loss rises without them.

    Delta W / s = U S V^T  ->  row j of B = sigma_j u_j, column j of A = v_j

Skip it when you read for the method. Letters: C capacity, r rank, d_in and d_out widths, fan_in
inputs of one output, s scale of a layer.
"""

from functools import partial

import torch

from minilora import checkpoint, diffusion
from minilora.data import Refused
from minilora.ranks import full_gradients, looked_at
from minilora.selora import adapters

CUTS = 8  # batches for the oracle


def fixed_losses(cfg, pairs, model, seed, train, count):
    """Denoising losses of `count` batches that no step of the training draws: functions without
    arguments, with fixed rows, timesteps, noise and words."""
    for k in range(count):
        rows, t, noise, words = pairs.batch_at(seed, 10**6 + k, train, cfg.batch)
        batch = (pairs.z[rows], words, t, noise, pairs.alphas)
        yield partial(diffusion.denoising_loss, model, *batch)


def neyman_gradients(cfg, pairs, model, seed, train):
    """Gradients by the full weights, {layer: [d_out,fan_in]}, of some batches, at B = 0."""
    for loss in fixed_losses(cfg, pairs, model, seed, train, looked_at(cfg, "neyman")):
        yield full_gradients(model, loss)


@torch.no_grad()
def to_components(model):
    """Rewrite the open rows of every adapter, in place, as singular components, the largest first;
    what the model computes stays."""
    for layer in adapters(model).values():
        r = layer.rank
        A = layer.A.narrow(layer.axis, 0, r)  # [d_in,r] or [r,c_in,k,k]
        columns = A if layer.axis == 1 else A.flatten(1).T  # [fan_in,r]
        rows = layer.B[:r].T  # [d_out,r]
        # The product of two thin matrices: its singular vectors lie in the spans of the two.
        right, inner = torch.linalg.qr(columns.double())
        left, outer = torch.linalg.qr(rows.double())
        U, S, Vh = torch.linalg.svd(outer @ inner.T)  # [r,r]
        layer.B[:r] = ((left @ U) * S).T.to(layer.B)
        v = (right @ Vh.T).to(A)  # [fan_in,r]
        A.copy_(v if layer.axis == 1 else v.T.reshape(A.shape))


def multiplier_scores(model, losses):
    """{layer: [r] mean over the losses of <B_j, dL/dB_j>^2}: the mean square of the gradient by a
    multiplier of row j, at 1, which does not change when A and B are rescaled against each other.

    losses: functions without arguments. Each is the mean of a batch, so this is no Fisher
    information, which is a mean over samples."""
    layers = adapters(model)
    parameters = [layer.B for layer in layers.values()]
    sums = [torch.zeros(len(B), dtype=torch.float64, device=B.device) for B in parameters]
    count = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss(), parameters, materialize_grads=True)
        for total, B, G in zip(sums, parameters, gradients):
            total += (B.detach() * G).sum(1).double() ** 2  # [C]
        count += 1
    means = (torch.stack(sums) / count).tolist()
    return {name: mean[: layers[name].rank] for name, mean in zip(layers, means)}


@torch.no_grad()
def rises(model, losses):
    """{layer: [r] rise of the mean loss when component j is cut too, of those after it already cut},
    one layer at a time, the others whole. losses: functions without arguments, asked again for
    every cut."""
    losses = list(losses)

    def mean_loss():
        return sum(float(loss()) for loss in losses) / len(losses)

    whole = mean_loss()
    found = {}
    for name, layer in adapters(model).items():
        kept = layer.B.clone()
        each = [whole]
        for rank in range(layer.rank - 1, -1, -1):
            layer.B[rank:] = 0
            each.append(mean_loss())
        layer.B.copy_(kept)
        found[name] = [above - below for below, above in zip(each, each[1:])][::-1]
    return found


def values_of(rule, cfg, pairs, model, seed, train):
    """{layer: [value of each component]} of a trained adapter, for a plan."""
    to_components(model)
    if rule == "oracle":
        return rises(model, fixed_losses(cfg, pairs, model, seed, train, CUTS))
    return multiplier_scores(model, fixed_losses(cfg, pairs, model, seed, train, looked_at(cfg, rule)))


def read_values(path, layers):
    """The values in a plan's file; `Refused` unless it has numbers for exactly these layers."""
    content = checkpoint.read_json(path)
    checkpoint.check_form(path, {"plan": content}, {"plan": dict.fromkeys(layers, [float])})
    if content.keys() != {*layers}:
        raise Refused(f"{path}: holds other layers than those that are adapted")
    return content
