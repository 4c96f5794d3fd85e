"""How sparse the network should be at each step of training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PolynomialDecay:
    """Sparsity rising from `initial_sparsity` to `final_sparsity`, fast at first and slower towards the end.

    s(t) = s_f + (s_i - s_f) * (1 - (t - begin) / (end - begin)) ** power    for begin <= t <= end

    Zhu & Gupta 2017, "To prune, or not to prune", arXiv:1710.01878, eq. 1. Steps count the optimiser steps done.
    Pruning takes place at `begin`, every `frequency` steps after it and, whatever the frequency, at `end`, which
    lands on `final_sparsity` exactly; `begin == end` prunes once. Raises ValueError for values that make no such
    schedule, among them a frequency longer than the span.

    >>> decay = PolynomialDecay(begin=100, end=110, frequency=2, initial_sparsity=0.2, final_sparsity=0.8)
    >>> [(step, round(decay.sparsity(step), 4)) for step in range(100, 111) if decay.prunes_at(step)]
    [(100, 0.2), (102, 0.4928), (104, 0.6704), (106, 0.7616), (108, 0.7952), (110, 0.8)]
    """

    begin: int
    end: int
    final_sparsity: float
    initial_sparsity: float = 0.0
    frequency: int = 100
    power: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial_sparsity <= self.final_sparsity < 1:
            raise ValueError(
                f"sparsity {self.initial_sparsity} -> {self.final_sparsity}; allowed: 0 <= initial <= final < 1"
            )
        if not 0 <= self.begin <= self.end:
            raise ValueError(f"begin at step {self.begin}, end at step {self.end}; allowed: 0 <= begin <= end")
        if not self.power > 0:
            raise ValueError(f"power {self.power}; allowed: above 0")
        if self.frequency < 1 or self.begin < self.end < self.begin + self.frequency:
            raise ValueError(
                f"frequency {self.frequency}; allowed: 1 to {self.end - self.begin}, the steps from begin to end"
            )

    def sparsity(self, step: int) -> float:
        """The planned sparsity in [0, 1) after `step` steps: 0 before begin, exactly the final one from end on."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final_sparsity
        remaining = 1 - (step - self.begin) / (self.end - self.begin)
        return self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * remaining**self.power

    def prunes_at(self, step: int) -> bool:
        """True at the steps at which the masks are to be brought to `sparsity(step)`."""
        if not self.begin <= step <= self.end:
            return False
        return step == self.end or (step - self.begin) % self.frequency == 0
