"""What is measured, and in what order."""

from __future__ import annotations

from .parts import Part

#: Models by the visual tokens of their prompts.
MODELS = {"llava-1.5-7b": (576, 2880), "qwen2.5-vl-7b": (1200, 4800), "qwen3-vl-8b": (1200,)}
#: Models whose decoding is compiled, too.
COMPILED = {"llava-1.5-7b", "qwen2.5-vl-7b"}
#: Rehearsed with these. LLaVA's tiny picture has 16 tokens.
TINY = {576: 16, 2880: 32, 1200: 12, 4800: 48}


def parts(tiny: bool = False) -> list[Part]:
    """All parts, what matters most first.

    Of each model the time to first token and decoding; then the rest of each; then what is
    compiled. A model is loaded again between these, unless it is the one that was measured last.
    """
    first: list[Part] = []
    rest: list[Part] = []
    last: list[Part] = []
    for model, sizes in MODELS.items():
        own = [TINY[n] if tiny else n for n in sizes]
        small, large = own[0], own[-1]
        first += [Part("first-token", model, n, batch) for n in own for batch in (1, 8)]
        first += [Part("decode", model, large, batch) for batch in (1, 8)]
        # Backwards, for the last model is there already.
        rest[:0] = [Part("search", model, small, 4), *(Part("profile", model, n, 1) for n in own)]
        if model in COMPILED:
            last.append(Part("compiled", model, small, 1))
    return first + rest + last
