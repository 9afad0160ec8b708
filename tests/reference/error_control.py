"""The limit of `error_controlled` in NumPy float64, from its description, for errors that are given."""

import dataclasses


@dataclasses.dataclass
class LimitReference:
    """The longest step L, its relaxation r and the curvature, fed with probes."""

    tolerance: float
    longest: float
    phase: str = "seeking"
    relaxation: float = 1.0
    curvature: float = 0.0
    mean_error: float = 0.0

    def probe(self, error: float, h: float) -> None:
        """Takes the error E(h) of a probe with learning rate h."""
        error = min(max(error, -1.0), 50.0)
        newest = 2 * error / h
        if self.phase == "held":
            self.curvature += 0.7 * (newest - self.curvature)
            self.mean_error = 0.8 * self.mean_error + 0.2 * error
            if self.mean_error > 10:
                self.relaxation *= 0.8
            elif self.mean_error > 1.5:
                self.relaxation = min(1.2 * self.relaxation, 4.0)
            return
        if self.phase == "seeking":
            self.curvature = newest
        else:
            self.curvature += 0.7 * (newest - self.curvature)
        expected = max(self.curvature * self.longest / 2, 0.0)
        if expected < self.tolerance:
            self.longest *= 4 if self.phase == "seeking" else 2
            self.phase = "seeking" if self.phase == "seeking" else "growing"
            return
        target = self.tolerance if self.phase == "growing" else min(0.05, self.tolerance)
        self.longest *= max(target / expected, 0.01)
        self.phase = "held" if self.phase == "growing" else "lowered"
