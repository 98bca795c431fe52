"""Naive encoder-side methods: Python loops, one sample, its tokens in the order of the prompt.

Each takes what the method may look at, and the number k to keep. It returns {kept token: [all
tokens averaged into it, itself included]}; other tokens are dropped.
"""

import math


def cosine(x, y):
    """Of two lists of numbers."""
    product = math.fsum(a * b for a, b in zip(x, y, strict=True))
    return product / math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y))


def naive_visionzip(attention, keys, features, grid, k, contextual=5 / 32):
    """The most attended to, and every n-th of the others, which take in all else."""
    count = math.floor(k * contextual + 0.5)
    by_attention = sorted(range(len(attention)), key=lambda j: (-attention[j], j))
    dominant = by_attention[: k - count]
    others = [j for j in range(len(attention)) if j not in dominant]
    targets = others[:: max(1, len(others) // max(1, count))][:count]
    groups = {j: [j] for j in dominant + targets}
    for j in others:
        if j not in targets and targets:
            groups[max(targets, key=lambda t: (cosine(keys[j], keys[t]), -t))].append(j)
    return groups


def naive_vispruner(attention, keys, features, grid, k, important=0.5, step=8):
    """The most attended to, and the others without those that are most like another."""
    by_attention = sorted(range(len(attention)), key=lambda j: (-attention[j], j))
    count = int(k * important)
    kept, rest = by_attention[:count], by_attention[count:]
    if count == k:
        rest = []
    while len(rest) > k - count:
        even, odd = rest[::2], rest[1::2]
        likeness = {
            j: max([cosine(features[j], features[i]) for i in odd], default=0) for j in even
        }
        # The sort is stable.
        even.sort(key=lambda j: -likeness[j])
        removed = even[: min(step, len(rest) - (k - count))]
        rest = [j for j in rest if j not in removed]
    return {j: [j] for j in kept + rest}


def naive_pool(attention, keys, features, grid, k):
    """Places in the order of their mirrored digits; each token to the nearest kept one."""

    def order(j):
        frame, row, column = (f"{x:012b}"[::-1] for x in grid[j])
        return "".join(c + r for c, r in zip(column, row, strict=True)), frame, j

    kept = sorted(sorted(range(len(grid)), key=order)[:k])
    groups = {j: [j] for j in kept}
    for j in range(len(grid)):
        near = [i for i in kept if grid[i][0] == grid[j][0]]
        if j not in kept and near:
            groups[min(near, key=lambda i: (math.dist(grid[i][1:], grid[j][1:]), i))].append(j)
    return groups


NAIVE_VISION = {
    name.removeprefix("naive_"): f for name, f in globals().items() if name.startswith("naive_")
}
