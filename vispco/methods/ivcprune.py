"""IVC-Prune: tokens that carry positions, and tokens that the question's values are like."""

from __future__ import annotations

import torch

from ..pruning.context import column_sum, masked_softmax, take
from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method
from .groups import rounded
from .shared import masked_mean, question, share


@register_method("ivcprune")
class IVCPrune(Method):
    """Tokens of extreme positions, which others tell places by, and tokens like the question's.

        A_tj  = 1/G sum_g softmax_{j visual}(u_t^g . u_j^g / sqrt(E))
        seeds = the 1 % (one at least) of largest mean of A over the question's rows
        s_j   = mean of A_tj over the rows of question and seeds
        kept  = the largest mean cosine and the largest mean sine of the rotary embedding,
                round(positions k / 2) each, then those of largest s_j

    of layer K, pruning before layer K; u: values, g: its key-value heads. question: the prompt's
    text after the image's first token. Source: the authors' code (MIT). There: 20 % of the tokens
    by s, and 5 % each by cosine and sine, which is the default share, `positions` = 1/3. At which
    layer is not known to us, so there is no preset.

    Departs from it: exactly the count, so that budgets hold; tokens among both of cosine and sine
    count once, and make room for the next of s. Our choice: the softmax is over visual tokens, E is
    of one head, and without text after the image the first tokens are the seeds, and s is of their
    rows.
    """

    first_layer = 0
    reads_next = True
    reads = "values, positions"

    def __init__(self, positions: float = 1 / 3):
        self.positions = share("positions", positions)

    def score(self, ctx):
        """(B, n_visual): those of extreme positions first, each by s."""
        text, after = question(ctx)
        values = ctx.values  # (B, G, N, E)
        asked = _rows(values, text[1], ctx)  # (B, T, V)
        total = column_sum(asked.masked_fill(~after[..., None], 0.0), 1)
        tokens = ctx.valid.sum(1)
        number = _seeds(tokens)  # (B,)
        width = max(1, int(number.max()))
        order = descending_ranks(total, ctx.valid).argsort(dim=1, stable=True)[:, :width]
        seeds = torch.arange(width, device=number.device) < torch.minimum(number, tokens)[:, None]
        planted = _rows(values, ctx.visual[1].gather(1, order), ctx)  # (B, S, V)
        rows = torch.cat([asked, planted], 1)
        score = masked_mean(rows, torch.cat([after, seeds], 1))
        count = rounded(self.positions * ctx.keep / 2)[:, None]
        cosine, sine = ctx.rotary_means.unbind(-1)
        first = descending_ranks(cosine, ctx.valid) < count
        first = first | (descending_ranks(sine, ctx.valid) < count)
        place = descending_ranks(score, ctx.valid)
        return -(place + place.shape[1] * (~first).long()).float()

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of the next layer up to its attention, and of the rows of question and seeds."""
        n, heads = n_visual + n_text, dimensions.kv_heads * dimensions.head_dim
        seeds = _seeds(n_visual)
        ahead = dimensions.ahead(n) - 2 * n * dimensions.heads * dimensions.head_dim
        return ahead + 2 * heads * n_visual * (n_text + seeds)


def _seeds(tokens):
    """How many of so many tokens are seeds: one in a hundred, halves up, and one at least."""
    number = (2 * tokens + 100) // 200
    return number + (number == 0)


def _rows(values, at, ctx):
    """Rows of A of `IVCPrune`, (B, R, V), of the tokens at the places `at` (B, R)."""
    x = values.transpose(1, 2)  # (B, N, G, E)
    rows, columns = take(x, at).transpose(1, 2), x[ctx.visual].transpose(1, 2)
    product = (rows @ columns.transpose(-1, -2)).float() * values.shape[-1] ** -0.5
    attention = masked_softmax(product, ~ctx.valid[:, None, None])  # (B, G, R, V)
    return column_sum(attention, 1) / attention.shape[1]
