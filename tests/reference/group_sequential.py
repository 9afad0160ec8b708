"""Group-sequential tests of normal data with known variance (Armitage, McPherson and Rowe 1969).

S is the sum at information I: independent normal increments of variance I_k - I_{k-1}. Its density where no
boundary was crossed is integrated from look to look with Simpson's rule (Jennison and Turnbull 2000, Group
Sequential Methods, chapter 19).
"""

import math

import numpy as np
from scipy import integrate, optimize, special, stats

POINTS = 801


class _Undecided:
    """The density of S where no boundary has been crossed, |S| / sqrt(I) < bound or S / sqrt(I) < bound."""

    def __init__(self, information, bound, sides, before=None):
        reach = bound * math.sqrt(information)
        low = -reach if sides == 2 else -8 * math.sqrt(information)
        self.information, self.sides = information, sides
        self.s = np.linspace(low, reach, POINTS)
        if before is None:
            self.density = stats.norm.pdf(self.s, scale=math.sqrt(information))
        else:
            scale = math.sqrt(information - before.information)
            steps = np.exp(-0.5 * ((self.s[:, None] - before.s) / scale) ** 2)
            integral = integrate.simpson(steps * before.density, x=before.s, axis=1)
            self.density = integral / (scale * math.sqrt(2 * math.pi))

    def crossing(self, information, bound):
        scale, reach = math.sqrt(information - self.information), bound * math.sqrt(information)
        tail = special.ndtr((self.s - reach) / scale)
        if self.sides == 2:
            tail = tail + special.ndtr((-reach - self.s) / scale)
        return integrate.simpson(tail * self.density, x=self.s)


def crossing_probabilities(information, bounds, sides=2):
    """The probability of crossing each boundary of z for the first time, without an effect."""
    found, undecided = [sides * stats.norm.sf(bounds[0])], None
    for k in range(1, len(bounds)):
        undecided = _Undecided(information[k - 1], bounds[k - 1], sides, undecided)
        found.append(undecided.crossing(information[k], bounds[k]))
    return np.array(found)


def spending_bounds(information, spent, sides=2):
    """The boundaries of z that spend the error rates `spent`, cumulative."""
    bounds, undecided = [stats.norm.isf(spent[0] / sides)], None
    for k in range(1, len(spent)):
        undecided = _Undecided(information[k - 1], bounds[k - 1], sides, undecided)
        target = spent[k] - spent[k - 1]
        bounds.append(
            optimize.brentq(
                lambda bound, undecided=undecided, k=k, target=target: (
                    undecided.crossing(information[k], bound) - target
                ),
                0,
                9,
            )
        )
    return np.array(bounds)
