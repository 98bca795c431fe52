"""Which tokens of a conversation are its answers."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Any

from .conversation import MARKERS, Conversation
from .marks import Spelled
from .template import media_tokens

#: How many tokens at the end of a cut text may differ from those of the whole text.
TOKENS_AT_A_CUT = 8


def special_tokens(processor: Any) -> dict[int, str]:
    """{id: text} of the tokens that a tokenizer never splits and that are no words."""
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder.items()
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {**{number: str(token) for number, token in added if token.special}, **dict(named)}


def check_words(processor: Any, conversation: Conversation, text: str) -> None:
    """Raise ValueError that names the conversation if its words hold what the template controls.

    Such a token would end a turn, or stand for a picture, in the middle of the words of a question,
    an answer or the system prompt. The markers `<image>` and `<video>` of a question are no words.

    text: what the template makes of the conversation.
    """
    tokenizer = processor.tokenizer
    markers = "|".join(MARKERS.values())
    words = [("system prompt", conversation.system or "")]
    for question, answer in conversation.turns:
        words += [("question", piece) for piece in re.split(markers, question)]
        words.append(("answer", answer))
    media = set(media_tokens(processor).values())
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} | media
    # What a processor keeps beside its template, it writes around pictures or in their place.
    kept = [x for name, x in vars(processor).items() if "template" not in name]
    own = "\n".join(x for x in kept if isinstance(x, str))
    for token in filter(None, special_tokens(processor).values()):
        holds = [(what, said) for what, said in words if token in said]
        written = text.count(token) - sum(said.count(token) for _, said in holds)
        if holds and (token in named or token in own or written > 0):
            what, said = holds[0]
            near = said[max(0, said.index(token) - 30) :][:60]
            instead = "write <image> or <video> where one stands" if token in media else ""
            raise ValueError(
                f"{conversation.source}: the {what} {near!r} holds {token!r}, which the model "
                f"reads as a sign of its own and not as words: {instead or 'take it out'}"
            )


def answer_tokens(
    processor: Any, conversation: Conversation, spelled: Spelled | None, tokens: list[int]
) -> list[int]:
    """The places in `tokens` of all that holds a character of an answer, and of its ending.

    An answer starts at the first token in which the text before it and the whole text differ. So
    no tokenizer needs to know its offsets. The ending is the special token right after it, if
    there is one.

    spelled: the text that became `tokens`, and where the answers are in it.
    Raises ValueError that names the conversation if the tokens are not those of that text.
    """
    special = special_tokens(processor)
    found = _places(processor.tokenizer, spelled, tokens, special) if spelled else None
    if found is None:
        raise ValueError(
            f"{conversation.source}: {type(processor).__name__} does not hand a conversation to "
            "its tokenizer as one text, so the answers cannot be found among its tokens"
        )
    media = processor.tokenizer.convert_tokens_to_ids([*media_tokens(processor).values()])
    endings = set(special) - set(media)
    places: list[int] = []
    for start, stop in found:
        ends = stop < len(tokens) and tokens[stop] in endings
        places += range(start, stop + ends)
    return places


def _places(
    tokenizer: Any, spelled: Spelled, tokens: list[int], special: dict[int, str]
) -> list[tuple[int, int]] | None:
    """(start, stop) of the tokens of each answer; None if the tokens are of another text.

    The text before each answer is cut into tokens. Of the many tokens of a picture, one is enough
    for that.
    """
    short, repeats = _without_runs(spelled, special)
    cuts = [short.text, *(short.text[:place] for pair in short.answers for place in pair)]
    whole, *before = tokenizer(cuts, add_special_tokens=False)["input_ids"]
    # How often each token of the short text stands in the whole one.
    left = {number: iter(counts) for number, counts in repeats.items()}
    counts = [next(left[t], 1) if t in left else 1 for t in whole]
    spread = [t for t, count in zip(whole, counts, strict=True) for _ in range(count)]
    shifts = range(len(tokens) - len(spread) + 1)
    shift = next((n for n in shifts if tokens[n : n + len(spread)] == spread), None)
    if shift is None:
        return None
    ends = [shift, *(shift + total for total in accumulate(counts))]
    found = []
    for starts, stops in zip(before[::2], before[1::2], strict=True):
        start, stop = _same(starts, whole), _same(stops, whole)
        # Words may be cut into other tokens at the end of a text, but not long before it.
        if max(len(starts) - start, len(stops) - stop) > TOKENS_AT_A_CUT:
            return None
        # The next token lies across the end of the answer.
        stop += stop < len(stops)
        found.append((ends[start], ends[stop]))
    return found


def _same(one: list[int], other: list[int]) -> int:
    """How many tokens two lists share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _without_runs(
    spelled: Spelled, special: dict[int, str]
) -> tuple[Spelled, dict[int, list[int]]]:
    """The text with each special token once where it is repeated.

    Second result: of each that is repeated, how often it stood at each of its places.
    """
    words = "|".join(re.escape(word) for word in special.values() if word)
    if not words:
        return spelled, {}
    runs = list(re.finditer(rf"({words})\1*", spelled.text))
    counts: dict[str, list[int]] = {}
    for run in runs:
        counts.setdefault(run[1], []).append(len(run[0]) // len(run[1]))

    def moved(place: int) -> int:
        return place - sum(len(run[0]) - len(run[1]) for run in runs if run.end() <= place)

    text = re.sub(rf"({words})\1+", r"\1", spelled.text)
    repeats = {n: counts[word] for n, word in special.items() if max(counts.get(word, [1])) > 1}
    return Spelled(text, tuple((moved(a), moved(b)) for a, b in spelled.answers)), repeats
