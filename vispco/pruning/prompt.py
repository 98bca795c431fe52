"""Prompt: what is known of a batch of prompts before its first layer runs, and stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .context import before_answer


@dataclass
class Generation:
    """A call of `generate`: without a cache, each pass brings the prompt and all that came since.

    told: columns of the prompt, where it is given as ids. first: those of the first pass.
    """

    told: int | None
    first: int | None = None

    def end(self, inputs: dict, columns: int, past: int = 0) -> int:
        """Columns of the prompt, of a pass over `columns` of them; others are guesses or answers.

        inputs: of the pass. In embeddings there may be more than was told, and are no guesses.
        past: columns that the cache holds already.
        More than `columns` where the prompt goes on in another pass.
        """
        if self.first is None:
            told = columns if inputs.get("input_ids") is None or not self.told else self.told
            # A later turn may be told alone, or with all that came before.
            self.first = told if told == columns else told - past
        return self.first


@dataclass(frozen=True)
class Prompt:
    """B samples of S tokens.

    visual: (B, S) bool, visual tokens.
    real: (B, S) bool, no padding.
    question: (B, S) bool, real tokens before the answer, labelled or generated.
    n_visual, n_real: visual tokens and real tokens of each sample.
    tail: of each sample, 1 if its last token is padding.
    ends_visual: of each sample, 1 if its last token is visual. The next one is read off it.
    end: the prompt's own columns; those after them were generated.
    plain: whether the model's mask is nothing but causal and padding.
    """

    visual: Tensor
    real: Tensor
    question: Tensor
    n_visual: list[int]
    n_real: list[int]
    tail: list[int]
    ends_visual: list[int]
    end: int
    plain: bool

    @classmethod
    def read(
        cls,
        inputs: dict,
        visual: Tensor,
        labels: Tensor | None,
        causal: bool,
        end: int | None = None,
        later: bool = False,
    ) -> Prompt:
        """The prompt in a backbone's keyword arguments.

        visual: (B, S) bool, padding included. labels: (B, S), -100 outside the answer.
        causal: whether no token of this model sees ahead. end: None: all columns are the prompt's.
        later: whether it is a later turn, and the mask one of all turns.
        Raises ValueError if several prompts are packed into a row, one after the other.
        """
        mask = inputs.get("attention_mask")
        if isinstance(mask, dict):
            # One for each kind of layers.
            mask = mask.get("full_attention", next(iter(mask.values())))
        plain = mask is None or mask.ndim == 2
        if later and mask is not None and plain:
            mask = mask[:, -visual.shape[1] :]
        if mask is None or not (plain or prepared(inputs)):
            real = torch.ones_like(visual)
        elif plain:
            real = mask.bool()
        else:
            # The last token sees all that are no padding.
            last = mask[:, 0, -1, : visual.shape[1]]
            real = last.bool() if last.dtype == torch.bool else last == 0
            real = real.expand_as(visual)
        end = visual.shape[1] if end is None else end
        asked = torch.arange(visual.shape[1], device=visual.device) < end
        visual = visual & real & asked
        last = visual[:, min(end, visual.shape[1]) - 1]
        counts = [visual.sum(1), real.sum(1), ~real[:, -1], last, starts(inputs, visual)]
        # The one time that the host waits for the device.
        n_visual, n_real, tail, ends_visual, restarts = torch.stack(counts).tolist()
        if any(n_visual) and (any(restarts) or inputs.get("cu_seq_lens_q") is not None):
            raise ValueError(
                "several prompts are packed into one row (position_ids start again, or "
                "cu_seq_lens_q is given), and would be pruned as one: give each a row of its own, "
                "padded"
            )
        question = before_answer(real, labels) & asked
        plain = causal and plain
        return cls(visual, real, question, n_visual, n_real, tail, ends_visual, end, plain)


def prepared(inputs: dict) -> bool:
    """Whether `generate` has made the mask of four dimensions: it does so for static caches."""
    return bool(getattr(inputs.get("past_key_values"), "is_compileable", False))


def starts(inputs: dict, visual: Tensor) -> Tensor:
    """How often positions go back within each row (B,).

    Where no mask is given, Hugging Face knows several prompts in one row by this.
    """
    ids = inputs.get("position_ids")
    sections = ids is not None and ids.ndim == 3
    if ids is None or inputs.get("attention_mask") is not None or (sections and len(ids) == 3):
        return torch.zeros_like(visual[:, 0], dtype=torch.long)
    # Of text, images in time, height and width: the first is of text.
    ids = ids[0] if sections else ids
    return (ids.diff(dim=1) < 0).sum(1).expand(len(visual))
