"""Which subsets of the members are evaluated: all of them, or a stated sample where there are too many. Imports no torch."""

from __future__ import annotations

import random
from itertools import combinations
from math import comb


def choose(members: int, most: int, seed: int) -> list[tuple[int, ...]]:
    """Subsets of the members 0 .. `members` - 1, by size, then in lexicographic order.

    All 2^K - 1 where that is at most `most`. Else every single member, the nested chain (the first k, for every k) and,
    of each size in between, an equal number of others that are drawn without repetition, up to `most` in all; singles and
    chain are there even if they are more than that.
    """
    everyone = range(members)
    if 2**members - 1 <= most:
        return [subset for size in range(1, members + 1) for subset in combinations(everyone, size)]
    found = {(member,) for member in everyone} | {tuple(range(size)) for size in range(1, members + 1)}
    share = max(0, most - len(found)) // max(1, members - 2)
    generator = random.Random(seed)
    for size in range(2, members):
        wanted = min(share, comb(members, size) - 1)  # the chain has one already
        drawn: set[tuple[int, ...]] = set()
        while len(drawn) < wanted:
            subset = tuple(sorted(generator.sample(everyone, size)))
            if subset not in found:
                drawn.add(subset)
        found |= drawn
    return sorted(found, key=lambda subset: (len(subset), subset))
