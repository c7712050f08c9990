"""The choice of a learning rate: a grid that is widened until its best rate lies inside. Skip it
when you read for a method."""

import math

from minilora import checkpoint
from minilora.data import Refused
from minilora.loop import NotFinite

RATES = tuple(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3))
WIDEST = 4  # how many rates may be added to a grid


def pick(grid, score_of):
    """(best rate, {rate: score}) of a grid, part of `RATES`; score_of: a function of a rate, higher
    is better. Of equal scores the one in the middle is taken.

    While the best is the lowest or the highest that was tried, the next one is tried too, at most
    `WIDEST` times. A rate at which the training does not stay finite, or the score is NaN, scores
    minus infinity; `NotFinite` if all do."""
    scores = {}
    for rate in grid:
        scores[rate] = attempt(rate, score_of)
    for _ in range(WIDEST):
        best = best_of(scores)
        place = RATES.index(best)
        if best == min(scores):
            place -= 1
        elif best == max(scores):
            place += 1
        if not 0 <= place < len(RATES) or RATES[place] in scores:
            break
        scores[RATES[place]] = attempt(RATES[place], score_of)
    return best_of(scores), dict(sorted(scores.items()))


def attempt(rate, score_of):
    """The score of a rate; minus infinity, and a line, where it is not finite."""
    try:
        score = score_of(rate)
    except NotFinite as error:
        print(f"learning rate {rate:g} is left out: {error}")
        return -math.inf
    return -math.inf if math.isnan(score) else score


def best_of(scores):
    """The rate of the highest score; of several, the middle one."""
    top = max(scores.values())
    if top == -math.inf:
        raise NotFinite(f"no learning rate of {', '.join(f'{rate:g}' for rate in scores)} gives a "
                        "finite score")
    best = [rate for rate in sorted(scores) if scores[rate] == top]
    return best[len(best) // 2]


def chosen(out, name, grid, score_of):
    """What `pick` gives, where score_of(rate, path) scores a training of seed 0 and leaves it in a
    file of the run folder `out`. The best is seed 0's run: it is not trained again. Of the others
    the scores are kept, without weights."""

    def file_of(rate):
        return out / f"picks/{name}-{rate:g}.pt"

    best, scores = pick(grid, lambda rate: score_of(rate, file_of(rate)))
    kept = out / f"adapters/{name}-s0.pt"
    if not kept.exists():
        checkpoint.link(file_of(best), kept)
    for rate in scores:
        if rate != best and file_of(rate).exists():  # without a file it did not stay finite
            checkpoint.drop_weights(file_of(rate))
    return best, scores


def given(texts, names, kind, tenth=""):
    """{name: rate} of --lr, each RATE or NAME:RATE of the `kind` (METHOD, RULE) of names that run here.
    RATE is for all of these that have none of their own; the one called `tenth` gets a tenth of it.

    `Refused`: another text, a name that does not run, two rates for one name or for all."""
    rates = {}
    for text in texts:
        name, _, number = text.rpartition(":")
        try:
            rate = float(number)
        except ValueError:
            rate = -1.0
        if not 0 < rate < 10:
            raise Refused(
                f"learning rate '{text}' must be RATE or {kind}:RATE with a rate in (0,10)"
            )
        if name not in ("", *names):
            raise Refused(f"learning rate '{text}': {name} does not run here, only {', '.join(names)}")
        if name in rates:
            raise Refused(f"--lr gives two rates for {name or 'all'}: {rates[name]:g} and {rate:g}")
        rates[name] = rate
    if "" in rates:
        shared = rates.pop("")
        rates = {name: shared / 10 if name == tenth else shared for name in names} | rates
    return rates


def described(best, scores):
    """'0.03 (0.01: 0.700, 0.03: 0.720, 0.1: 0.710)', and where the best lies at an edge, that."""
    each = ", ".join(f"{rate:g}: {score:.4g}" for rate, score in scores.items())
    edge = ", at the edge of what was tried" if best in (min(scores), max(scores)) else ""
    return f"{best:g} ({each}{edge})"
