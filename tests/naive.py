"""Each built-in method once more, naively.

Eager attention weights, Python loops, one sample at a time.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from oracles import by_hand, decoder_inputs
from tiny import IMAGE


@dataclass
class Step:
    """One sample at the input of a layer. All places are original positions.

    now, before: traces up to this layer and to the one just run, each with its attention.
    visual, text: places of the tokens present. keep: how many visual ones will be.
    """

    model: torch.nn.Module
    layer: int
    inputs: dict
    embeddings: torch.Tensor
    now: object
    before: object
    visual: list
    text: list
    keep: int

    @property
    def weights(self):
        """Attention (H, N, N) of the layer just run."""
        return self.before.attention[-1][0]

    @property
    def place(self):
        """{original position: place in the tensors of this layer}."""
        return {p: i for i, p in enumerate(self.now.places[-1].tolist())}

    def cell(self, p):
        """[image, row, column] of a visual token, of pictures of 4 x 4 tokens."""
        number = self.numbers[p]
        return [number // 16, number % 16 // 4, number % 4]

    @property
    def question(self):
        """Text after the image's first token."""
        return [t for t in self.text if t > min(self.visual)]

    @property
    def numbers(self):
        """{original position: running number} of the sample's visual tokens."""
        tokens = self.inputs["input_ids"][0].tolist()
        return {p: j for j, p in enumerate(p for p, t in enumerate(tokens) if t == IMAGE)}


def dot(a, b):
    """Inner product, in float64."""
    return (a.double() * b.double()).sum().item()


def cosine(a, b):
    """Of two vectors."""
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def ranked(scores):
    """Keys by falling score, ties by position."""
    return sorted(scores, key=lambda p: (-scores[p], p))


def in_order(places):
    """Scores of places that are given best first."""
    return {p: -i for i, p in enumerate(places)}


# ---- one function a method: {original position: score} of the visual tokens present --------------
def naive_fastv(step):
    """Row of the last token in layer K - 1, mean over heads."""
    return last_row(step.weights, step.place, step)


def naive_pdrop(step):
    """The same in layer K, as it would be without dropping before it."""
    return last_row(step.now.attention[-1][0], step.place, step)


def last_row(weights, place, step):
    last = place[max(step.text)]
    return {
        p: sum(head[last, place[p]].item() for head in weights) / len(weights) for p in step.visual
    }


def naive_feather(step, stride=3):
    """FastV's row from queries and keys as projected, and an even grid before all else."""
    q, k, _ = projected(step, step.layer - 1, step.before.hidden[-1])
    last, scores = step.place[max(step.text)], {}
    weights = [
        softmax([dot(row[last], x) / math.sqrt(len(x)) for x in k_h])
        for row, k_h in zip(q, k, strict=True)
    ]
    for p in step.visual:
        _, row, column = step.cell(p)
        even = stride and row % stride == 0 and column % stride == 0
        scores[p] = bool(even) + sum(w[step.place[p]] for w in weights) / len(weights)
    return scores


def projected(step, layer, hidden):
    """Queries, keys and values of a layer before rotary embedding: lists of H heads (N, E)."""
    layer = step.model.get_decoder().layers[layer]
    x, a = layer.input_layernorm(hidden)[0], layer.self_attn
    heads = [
        list(f(x).unflatten(-1, (-1, a.head_dim)).unbind(1)) for f in (a.q_proj, a.k_proj, a.v_proj)
    ]
    times = len(heads[0]) // len(heads[1])
    return heads[0], *([h for h in some for _ in range(times)] for some in heads[1:])


def softmax(x):
    """Of a list of numbers."""
    powers = [math.exp(each - max(x)) for each in x]
    return [each / math.fsum(powers) for each in powers]


def naive_ivcprune(step, positions=1 / 3):
    """Extreme rotary embeddings first; then values like those of the question, and of its seeds."""
    _, _, v = projected(step, step.layer, step.now.hidden[-1])
    place, visual, rows = step.place, step.visual, {}

    def row(t):
        if t not in rows:
            weights = [
                softmax([dot(h[place[t]], h[place[p]]) / math.sqrt(h.shape[1]) for p in visual])
                for h in v
            ]
            rows[t] = [sum(some) / len(v) for some in zip(*weights, strict=True)]
        return rows[t]

    def mean(places):
        columns = zip(*[row(t) for t in places], strict=True)
        return dict(zip(visual, (math.fsum(c) / len(places) for c in columns), strict=True))

    seeds = ranked(mean(step.question))[: max(1, math.floor(0.01 * len(visual) + 0.5))]
    order = ranked(mean([*step.question, *seeds]))
    extreme = set()
    for x in decoder_inputs(step.model, step.inputs)[1][0]["position_embeddings"]:
        x = x.expand(1, *x.shape[-2:])[0].mean(-1)
        by_mean = ranked({p: x[p].item() for p in visual})
        extreme |= set(by_mean[: math.floor(positions * step.keep / 2 + 0.5 + 1e-9)])
    return in_order([p for p in order if p in extreme] + [p for p in order if p not in extreme])


def naive_framefusion(step, similarity=0.6, least=0.1):
    """Attention; tokens that repeat the frame before go first."""
    repeated, scores = naive_repeated(step, similarity, least), naive_fastv(step)
    return {p: -repeated[p][0] if p in repeated else scores[p] for p in scores}


def naive_repeated(step, similarity, least):
    """{token: (cosine, the token it repeats)}; none if they are too few."""
    hidden, found = step.now.hidden[-1][0], {}
    for p in step.visual:
        frame, *cell = step.cell(p)
        earlier = [q for q in step.visual if step.cell(q)[1:] == cell and step.cell(q)[0] < frame]
        if earlier:
            alike = cosine(hidden[step.place[p]], hidden[step.place[max(earlier)]])
            if alike >= similarity:
                found[p] = alike, max(earlier)
    return found if len(found) >= least * len(step.visual) else {}


def naive_pact(step, important=0.55, cutoff=0.21):
    """Density peaks among the important tokens, the centres by importance."""
    pool, centres, reach, importance, _ = naive_clusters(step, important, cutoff)
    more = sorted(set(pool) - set(centres), key=lambda p: (-reach[p], pool.index(p)))
    return in_order(centres + more + [p for p in ranked(importance) if p not in pool])


def naive_clusters(step, important, cutoff):
    """Pool, centres (both by importance), reach, importance, and distances of the pool's keys."""
    hidden = step.now.hidden[-1]
    q, k, _ = projected(step, step.layer, hidden)
    place, importance = step.place, dict.fromkeys(step.visual, 0.0)
    for q_h, k_h in zip(q, k, strict=True):
        mean = q_h[[place[p] for p in step.visual]].double().mean(0)
        weights = softmax([dot(mean, x) / math.sqrt(len(x)) for x in k_h])
        for p in step.visual:
            importance[p] += weights[place[p]] / len(q) * hidden[0, place[p]].norm().item()
    size = max(step.keep, math.floor(important * len(step.visual) + 1e-6))
    pool = ranked(importance)[:size]
    keys = torch.cat(k[:: max(1, len(q) // step.model.config.text_config.num_key_value_heads)], 1)
    far = {
        (p, i): 1 - cosine(keys[place[p]], keys[place[i]]) if p != i else 0.0
        for p in pool
        for i in pool
    }
    density = {
        p: math.fsum(math.exp(-far[p, i] / cutoff) for i in pool if far[p, i] <= cutoff)
        for p in pool
    }
    reach = {}
    for j, p in enumerate(pool):
        denser = [i for n, i in enumerate(pool) if (density[i], -n) > (density[p], -j)]
        reach[p] = min((far[p, i] for i in denser), default=4.0)
    return pool, [p for p in pool if reach[p] > cutoff], reach, importance, far


def naive_sparsevlm(step):
    """Attention averaged over heads and raters."""
    raters, mean, place = naive_raters(step), step.weights.mean(0), step.place
    return {
        p: sum(mean[place[t], place[p]].item() for t in raters) / len(raters) for p in step.visual
    }


def naive_raters(step):
    """Text after the image that is related to it at least as the mean is.

    Text before the image cannot rate it.
    """
    share, v, x = dict.fromkeys(step.question, 0.0), step.visual, step.embeddings
    for p in v:
        relation = {t: dot(x[p], x[t]) for t in share}
        top = max(relation.values())
        total = sum(math.exp(r - top) for r in relation.values())
        for t, r in relation.items():
            share[t] += math.exp(r - top) / total / len(v)
    return [t for t in share if share[t] >= sum(share.values()) / len(share) - 1e-9]


def naive_fitprune(step):
    """Strongest head's attention: from the text times from the image.

    Each is a mean over all its rows.
    """
    most, place = step.weights.amax(0), step.place
    cross = {
        p: math.fsum(most[place[t], place[p]].item() for t in step.question) for p in step.visual
    }
    own = {p: math.fsum(most[place[i], place[p]].item() for i in step.visual) for p in step.visual}
    return {p: cross[p] / len(step.question) * own[p] / len(step.visual) for p in step.visual}


def naive_dart(step, visual=4, text=4):
    """Pivots of large keys; each in turn takes its part of the k tokens, those least like it."""
    layer, place = step.model.get_decoder().layers[step.layer - 1], step.place
    keys = layer.self_attn.k_proj(layer.input_layernorm(step.before.hidden[-1]))[0]
    hidden = step.now.hidden[-1][0]

    def largest(places, count):
        return ranked({p: keys[place[p]].abs().sum().item() for p in places})[:count]

    chosen = largest(step.visual, visual)
    pivots = chosen + largest(step.question, text)
    wanted = max(0, step.keep - len(chosen))
    parts = [wanted // len(pivots) + (i < wanted % len(pivots)) for i in range(len(pivots))]
    alike = {
        q: {p: cosine(hidden[place[q]], hidden[place[p]]) for p in step.visual} for q in pivots
    }
    for q, part in zip(pivots, parts, strict=True):
        chosen = chosen + ranked({p: -alike[q][p] for p in step.visual if p not in chosen})[:part]
    rest = {p: -sum(alike[q][p] for q in pivots) for p in step.visual if p not in chosen}
    return in_order(chosen + ranked(rest))


def naive_divprune(step):
    """Next is the token whose nearest picked one is farthest.

    First is the token with the farthest neighbour.
    """
    x = {p: step.embeddings[p] for p in step.visual}
    far = {(p, q): 1 - cosine(x[p], x[q]) for p in x for q in x}
    picked = []
    while len(picked) < len(x):
        picked.append(
            ranked(
                {
                    p: min((far[p, q] for q in picked or x if q != p), default=0.0)
                    for p in x
                    if p not in picked
                }
            )[0]
        )
    return in_order(picked)


def naive_cdpruner(step):
    """Next is the token that makes the determinant largest.

    If all make it vanish, next is the most relevant.
    """
    x, words = step.embeddings.double(), step.text
    r = {p: sum(cosine(x[p], x[t]) for t in words) / len(words) for p in step.visual}
    low, high = min(r.values()), max(r.values())
    r = {p: (r[p] - low) / (high - low) if high > low else 1.0 for p in r}
    alike = {p: {q: cosine(x[p], x[q]) for q in r} for p in r}

    def volume(places):
        return (
            torch.tensor([[alike[p][q] for q in places] for p in places], dtype=torch.float64)
            .det()
            .item()
        )

    picked, base, left = [], [], set(r)
    while left:
        rest = {p: volume([*base, p]) / (volume(base) if base else 1.0) for p in left}
        gains = {p: rest[p] * r[p] ** 2 for p in left if rest[p] > 1e-4 and r[p] > 0}
        picked.append(ranked(gains or {p: r[p] for p in left})[0])
        base, left = base + picked[-1:] * bool(gains), left - {picked[-1]}
    return in_order(picked)


def naive_vtw(step):
    """No ranking: the first tokens stay."""
    return dict.fromkeys(step.visual, 0)


def naive_random(step, seed=0):
    """The "lowbias32" hash of the running number, in Python's integers."""
    scores = {}
    for p in step.visual:
        x = (step.numbers[p] + (seed + 1) * 0x9E3779B9) % 2**32
        x = (x ^ x >> 15) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        scores[p] = x ^ x >> 15
    return scores


def naive_strided(step):
    """Minus the running number with its binary digits mirrored."""
    return {p: -int(f"{step.numbers[p]:024b}"[::-1], 2) for p in step.visual}


NAIVE = {
    name.removeprefix("naive_"): globals()[name]
    for name in (
        "naive_cdpruner",
        "naive_dart",
        "naive_divprune",
        "naive_fastv",
        "naive_fitprune",
        "naive_framefusion",
        "naive_ivcprune",
        "naive_pact",
        "naive_pdrop",
        "naive_random",
        "naive_sparsevlm",
        "naive_strided",
        "naive_vtw",
    )
}


# ---- options of SparseVLM ------------------------------------------------------------------------
def naive_rank(step):
    """Rank of the raters' rows of attention to the image."""
    place = step.place
    rows, columns = [place[t] for t in naive_raters(step)], [place[p] for p in step.visual]
    return int(torch.linalg.matrix_rank(step.weights.mean(0)[rows][:, columns]))


def naive_recycled(step, share):
    """({place of a kept token}, {place of a merged one: its centre}).

    By DPC-kNN over Python lists.
    """
    order, hidden, place = (
        ranked(naive_sparsevlm(step)),
        step.now.hidden[-1][0].double(),
        step.place,
    )
    count = math.floor(share * (len(order) - step.keep) + 1e-6)
    centres = min(math.ceil(count / 10), step.keep)
    stay, pool = order[: step.keep - centres], order[step.keep - centres :][: count * (centres > 0)]
    x = {p: (hidden[place[p]] / math.sqrt(hidden.shape[1])).tolist() for p in pool}
    far = {(p, q): math.dist(x[p], x[q]) for p in pool for q in pool}
    density, gain = {}, {}
    for p in pool:
        near = sorted(far[p, q] for q in pool if q != p)[:5]
        density[p] = math.exp(-sum(d * d for d in near) / max(1, len(near)))
    for i, p in enumerate(pool):
        denser = [q for j, q in enumerate(pool) if (density[q], -j) > (density[p], -i)]
        gain[p] = density[p] * (min(far[p, q] for q in denser) if denser else max(far.values()))
    chosen = sorted(pool, key=lambda p: (-gain[p], pool.index(p)))[:centres]
    homes = {
        p: min(pool, key=lambda q: (q not in chosen, far[p, q])) for p in pool if p not in chosen
    }
    return {*stay, *chosen}, homes


# ---- the whole model -----------------------------------------------------------------------------
def naive_kept(model, inputs, config, naive, limit=None):
    """{layer: (S,) bool}: the tokens that enter each layer.

    Rank by the naive scores at each step, then drop by hand before the next.
    """
    ids = inputs["input_ids"][0]
    present, kept, n = torch.ones_like(ids, dtype=torch.bool), {}, int((ids == IMAGE).sum())
    for layer in range(config.num_layers):
        count = math.floor(config.keep_ratios[layer] * n + 1e-6)
        count = max(count, 1) if config.keep_ratios[layer] > 0 and n else count
        if count >= int(present[ids == IMAGE].sum()):
            continue
        step = step_at(model, inputs, layer, kept, count)
        stay = ranked(naive(step))[: min(count, limit(step)) if limit else count]
        present = present.clone()
        present[[p for p in step.visual if p not in stay]] = False
        kept[layer] = present
    return kept


def step_at(model, inputs, layer, kept, keep):
    """What a naive method looks at, after the drops `kept`."""
    ids = inputs["input_ids"][0]
    now = by_hand(model, inputs, kept, upto=layer)
    before = by_hand(model, inputs, kept, upto=layer - 1) if layer else SimpleNamespace()
    places = now.places[-1].tolist()
    return Step(
        model,
        layer,
        inputs,
        decoder_inputs(model, inputs)[0]["inputs_embeds"][0],
        now,
        before,
        [p for p in places if ids[p] == IMAGE],
        [p for p in places if ids[p] != IMAGE],
        keep,
    )
