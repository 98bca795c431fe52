"""Naive encoder-side methods: Python loops, one sample, its tokens in the order of the prompt.

Each takes what the method may look at (`other`: attention of a second layer of the tower), and the
number k to keep. It returns {kept token: [all
tokens averaged into it, itself included]}; other tokens are dropped.
"""

import math


def cosine(x, y):
    """Of two lists of numbers."""
    product = math.fsum(a * b for a, b in zip(x, y, strict=True))
    return product / math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y))


def naive_visionzip(attention, keys, features, grid, k, other, contextual=5 / 32):
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


def naive_vispruner(attention, keys, features, grid, k, other, important=0.5, step=8):
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


def naive_pool(attention, keys, features, grid, k, other):
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


def best(scores, count, among=None):
    """The `count` tokens of largest score, ties to the first."""
    among = range(len(scores)) if among is None else among
    return sorted(among, key=lambda j: (-scores[j], j))[:count]


def mean(numbers):
    """Of a list; 0 of an empty one."""
    return math.fsum(numbers) / max(1, len(numbers))


def seats(members, weights, k):
    """k tokens, one after the other, each of the group whose next one is worth most.

    members: {group: its tokens, best first}. weights: {group: number}. By Sainte-Lague; of equal
    groups, that whose next token is better placed in the prompt.
    """
    taken = dict.fromkeys(members, 0)
    for _ in range(k):
        left = [g for g in members if taken[g] < len(members[g])]
        group = max(left, key=lambda g: (weights[g] / (taken[g] + 0.5), -members[g][taken[g]]))
        taken[group] += 1
    return [j for g in members for j in members[g][: taken[g]]]


def earlier(grid):
    """{token: the one at its place in the nearest earlier frame}."""
    found = {}
    for j, (frame, *cell) in enumerate(grid):
        same = [i for i, (f, *c) in enumerate(grid) if c == cell and f < frame]
        if same:
            found[j] = max(same, key=lambda i: grid[i][0])
    return found


def naive_evs(attention, keys, features, grid, k, other, numbers):
    """Least like the frame before; what has none comes first, in mirrored order."""
    before = earlier(grid)
    scores = [
        1 - cosine(features[j], features[before[j]])
        if j in before
        else 4 - int(f"{number:024b}"[::-1], 2) / 2**24
        for j, number in enumerate(numbers)
    ]
    return {j: [j] for j in best(scores, k)}


def naive_vidcom2(attention, keys, features, grid, k, other):
    """Frames unlike the film get more; tokens unlike film and frame stay."""
    if not features:
        return {}
    columns = list(zip(*features, strict=True))
    spread = [mean([(v - mean(c)) ** 2 for v in c]) for c in columns]
    least = sorted(sorted(range(len(spread)), key=lambda d: (spread[d], d))[: len(spread) // 2])
    x = [[f[d] for d in least] for f in features]
    x = [[v / math.sqrt(math.fsum(w * w for w in f)) for v in f] for f in x]

    def close(j, members):
        middle = [mean([x[i][d] for i in members]) for d in range(len(least))]
        square = math.dist(x[j], middle) ** 2
        return math.fsum(math.exp(-square / (2 * 2.0**a)) for a in range(-3, 2))

    frames = {}
    for j, (frame, *_) in enumerate(grid):
        frames.setdefault(frame, []).append(j)
    of_film = [close(j, range(len(x))) for j in range(len(x))]
    both = {j: round(2**14 * (of_film[j] + close(j, s))) for s in frames.values() for j in s}
    odd = {f: -mean([of_film[j] for j in some]) / 0.01 for f, some in frames.items()}
    top = max(odd.values())
    power = {f: math.exp(v - top) for f, v in odd.items()}
    share = {f: p / math.fsum(power.values()) for f, p in power.items()}
    weights = {f: len(frames[f]) * (1 + share[f] - 1 / len(frames)) for f in frames}
    members = {f: sorted(some, key=lambda j: (both[j], j)) for f, some in frames.items()}
    return {j: [j] for j in seats(members, weights, k)}


def naive_holov(attention, keys, features, grid, k, other, crops=16):
    """Crops share by what they score; within one, attention."""
    n, groups = len(attention), {}
    for j in range(n):
        groups.setdefault(j * crops // n, []).append(j)
    spread = {}
    for some in groups.values():
        for j in some:
            alike = [cosine(features[j], features[i]) for i in some]
            spread[j] = mean([(c - mean(alike)) ** 2 for c in alike])
    scale = mean(attention) / max(mean(list(spread.values())), 1e-30)
    weights = {
        g: max(mean([attention[j] + 0.09 * spread[j] * scale for j in some]), 1e-30)
        for g, some in groups.items()
    }
    members = {g: best(attention, len(some), some) for g, some in groups.items()}
    return {j: [j] for j in seats(members, weights, k)}


def naive_hiprune(attention, keys, features, grid, k, other, alpha=0.1):
    """Anchors of the other layer, and what is next to them; then attention."""
    anchors = best(other, math.floor(alpha * k / 5 + 0.5 + 1e-9))
    cross = [
        j
        for j, (f, r, c) in enumerate(grid)
        if any(f == g[0] and abs(r - g[1]) + abs(c - g[2]) <= 1 for g in (grid[a] for a in anchors))
    ]
    cross = best(attention, k, cross)
    rest = [j for j in range(len(grid)) if j not in cross]
    return {j: [j] for j in cross + best(attention, k - len(cross), rest)}


def naive_vscan(attention, keys, features, grid, k, other, local=0.5, window=6):
    """Windows in turn by the other layer, then the most attended to; all others merge."""
    windows = {}
    for j, (f, r, c) in enumerate(grid):
        windows.setdefault((f, r // window, c // window), []).append(j)
    queues, chosen = [best(other, len(some), some) for some in windows.values()], []
    for turn in range(len(grid)):
        heads = [queue[turn] for queue in queues if turn < len(queue)]
        chosen += best(other, len(heads), heads)
    chosen = chosen[: math.floor(local * k + 0.5 + 1e-9)]
    rest = [j for j in range(len(grid)) if j not in chosen]
    kept = sorted(chosen + best(attention, k - len(chosen), rest))
    groups = {j: [j] for j in kept}
    for j in range(len(grid)):
        if j not in groups and kept:
            into = max(kept, key=lambda i: (cosine(features[i], features[j]), -i))
            groups[into].append(j)
    return groups


def naive_prumerge(attention, keys, features, grid, k, other, spaced=0.0, neighbours=32):
    """The most attended to, some evenly spaced; each takes in the dropped ones nearest to it."""
    even = min(k, math.floor(spaced * k + 0.5 + 1e-9))
    kept = best(attention, k - even)
    rest = [j for j in range(len(attention)) if j not in kept]
    kept = sorted(kept + rest[:: max(1, len(rest) // max(1, even))][:even])
    dropped = [j for j in range(len(attention)) if j not in kept]
    near = {i: sorted(dropped, key=lambda j: -cosine(keys[i], keys[j]))[:neighbours] for i in kept}
    groups = {i: [i] for i in kept}
    for j in dropped:
        if kept:
            into = max(kept, key=lambda i: (cosine(keys[i], keys[j]), -i))
            groups[into] += [j] * (j in near[into])
    return groups


NAIVE_VISION = {
    name.removeprefix("naive_"): f for name, f in globals().items() if name.startswith("naive_")
}
