"""How large each batch is: a few stages, then one size for good.

In: stages of a number of steps and an amount (tokens or rows), and the amount after them. Out: the amount of any
step, all before it, and how many steps an amount takes; pure functions of the step, in whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ramp:
    """`stages` are (steps, amount of each), one after the other from step 1 on; every later step takes `full`."""

    stages: tuple[tuple[int, int], ...]
    full: int

    def of(self, step: int) -> int:
        """What step `step` takes; 1 is the first."""
        for steps, amount in self.stages:
            if step <= steps:
                return amount
            step -= steps
        return self.full

    def before(self, step: int) -> int:
        """What steps 1 to `step` - 1 take together."""
        left, total = step - 1, 0
        for steps, amount in self.stages:
            taken = min(left, steps)
            total, left = total + taken * amount, left - taken
        return total + left * self.full

    def steps(self, amount: int) -> int:
        """The smallest number of steps that take at least `amount` together."""
        passed = 0
        for steps, each in self.stages:
            if amount <= steps * each:
                return passed - (-amount // each)
            passed, amount = passed + steps, amount - steps * each
        return passed - (-amount // self.full)
