"""The choice of a learning rate: a grid that is widened until its best rate lies inside. Skip it
when you read for a method."""

from minilora.loop import NotFinite

RATES = tuple(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3))
WIDEST = 4  # how many rates may be added to a grid


def pick(grid, score_of):
    """(best rate, {rate: score}) of a grid, part of `RATES`; score_of: a function of a rate, higher
    is better.

    While the best is the lowest or the highest that was tried, the next one is tried too, at most
    `WIDEST` times. A rate at which the training does not stay finite scores minus infinity."""
    scores = {}

    def attempt(rate):
        try:
            scores[rate] = score_of(rate)
        except NotFinite as error:
            print(f"learning rate {rate:g} is left out: {error}")
            scores[rate] = -float("inf")

    for rate in grid:
        attempt(rate)
    for _ in range(WIDEST):
        best = max(sorted(scores), key=scores.get)  # of equal ones the lowest
        place = RATES.index(best)
        if best == min(scores):
            place -= 1
        elif best == max(scores):
            place += 1
        if RATES[place % len(RATES)] in scores or not 0 <= place < len(RATES):
            break
        attempt(RATES[place])
    return max(sorted(scores), key=scores.get), dict(sorted(scores.items()))


def described(best, scores):
    """'0.03 (0.01: 0.700, 0.03: 0.720, 0.1: 0.710)', and where the best lies at an edge, that."""
    each = ", ".join(f"{rate:g}: {score:.4g}" for rate, score in scores.items())
    edge = ", at the edge of what was tried" if best in (min(scores), max(scores)) else ""
    return f"{best:g} ({each}{edge})"
