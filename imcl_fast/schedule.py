"""Ways on a schedule: computed in every k-th training call only, with k times their weight."""

from __future__ import annotations

import math

LONGEST = 100_000  # calls of a period, each of which has a place in memory


class Turn:
    """A training call in a period, and the one after it.

    Attributes:
        position: of the call in the period, from 0.
        representation, kernel: what the weight of the way is multiplied with in this call: 0,
            so that it is not computed, or its interval.
        next: the turn after this one.
    """

    def __init__(self, position: int, representation: int, kernel: int) -> None:
        self.position = position
        self.representation, self.kernel = representation, kernel
        self.next = self


class Schedule:
    """Whose turn it is: a place in a ring of all calls of a period.

    ``torch.compile`` guards on every number that it reads. A counter would be one, and make a
    graph for each call of the period; from a place in a ring it reads what is computed, and
    there are as many graphs as different sets of ways.

    Representation similarity is computed in calls 0, k, 2k, ... for its interval k, kernel
    similarity in calls s, s + k, ..., s being half of the intervals' greatest common divisor,
    rounded down: where they have one above 1, no call computes both.

    Args:
        representation, kernel: the intervals k, at least 1.
        position: of the first call; only its remainder in the period counts.

    Raises:
        ValueError: the period, their least common multiple, is longer than ``LONGEST``.
    """

    def __init__(self, representation: int, kernel: int, position: int = 0) -> None:
        self.representation, self.kernel = representation, kernel
        shift = math.gcd(representation, kernel) // 2
        period = math.lcm(representation, kernel)
        if period > LONGEST:
            raise ValueError(
                "representation_interval, kernel_interval: expected a least common multiple of at "
                f"most {LONGEST}, got {representation} and {kernel}; to switch a way off set its "
                "weight to 0"
            )
        turns = [
            Turn(
                i,
                representation if i % representation == 0 else 0,
                kernel if i % kernel == shift else 0,
            )
            for i in range(period)
        ]
        for turn, following in zip(turns, turns[1:] + turns[:1], strict=True):
            turn.next = following
        self.turn = turns[position % len(turns)]

    def __reduce__(self) -> tuple[type[Schedule], tuple[int, int, int]]:
        # Copying and pickling go from turn to turn otherwise, one recursion deeper at each.
        return Schedule, (self.representation, self.kernel, self.turn.position)
