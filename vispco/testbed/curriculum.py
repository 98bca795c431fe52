"""Which question families to train on next: from how well each one is answered so far."""

from __future__ import annotations

import numpy as np

from .questions import FAMILIES

# The order in which families are taken up. Unlearned ones compete for the small model, so only a few at a time.
ORDER = (
    "place_colour", "place_shape", "digit", "count_one", "exist", "twin_colour", "twin_shape", "digit_shared",
    "place_colour_step", "place_shape_step", "count_colour", "count_shape", "digit_step", "exist_shared", "count_both",
    "relation_colour", "relation_shape", "digit_relation", "more", "more_shared", "same_colour", "same_shape",
    "twin_colour_step", "twin_shape_step", "digit_shared_step", "count_colour_step", "count_shape_step",
    "exist_shared_step", "more_shared_step", "same_colour_step", "same_shape_step",
    "relation_colour_shared", "relation_shape_shared",
)  # fmt: skip
_CHANCE = {"exist": 0.5, "compare": 0.5}  # tasks answered by yes or no; the others have four answers or more


class Curriculum:
    """Running accuracy of every family; a family opens when the ones it builds on are answered well."""

    def __init__(self, opens_at: float = 0.6, floor: float = 0.12, memory: float = 0.97,
                 width: int = 6, learned_at: float = 0.85):  # fmt: skip
        self.opens_at, self.floor, self.memory, self.width, self.learned_at = opens_at, floor, memory, width, learned_at
        self.names = list(FAMILIES)
        self.rank = np.array([self.names.index(name) for name in ORDER])
        self.chance = np.array([_CHANCE.get(family.task, 0.25) for family in FAMILIES.values()])
        self.accuracy = self.chance.copy()
        self.open = np.array([not family.after for family in FAMILIES.values()])

    def skill(self) -> np.ndarray:
        """Accuracy above chance, from 0 to 1."""
        return np.clip((self.accuracy - self.chance) / (1 - self.chance), 0, 1)

    def draw(self, rng: np.random.Generator, n: int) -> list[int]:
        """Indices of `n` families, the badly answered ones more often; `floor` keeps the good ones in practice."""
        share = np.array([family.share for family in FAMILIES.values()]) ** 0.5
        active = self.open & (self.skill() >= self.learned_at)
        waiting = [index for index in self.rank if self.open[index] and not active[index]]
        active[waiting[: self.width]] = True
        weight = active * share * (self.floor + 1 - self.skill())
        return list(rng.choice(len(self.names), size=n, p=weight / weight.sum()))

    def update(self, families: list[int], correct: list[float]) -> None:
        """Take in the accuracy of each asked slot, then open families whose ground is laid."""
        for index, value in zip(families, correct, strict=True):
            self.accuracy[index] = self.memory * self.accuracy[index] + (1 - self.memory) * value
        ready = dict(zip(self.names, self.open & (self.skill() >= self.opens_at), strict=True))
        for index, family in enumerate(FAMILIES.values()):
            self.open[index] |= all(ready[name] for name in family.after)

    def state(self) -> dict:
        """JSON-ready state."""
        return {"accuracy": self.accuracy.tolist(), "open": self.open.tolist()}

    def restore(self, state: dict) -> None:
        """The inverse of `state`."""
        self.accuracy, self.open = np.array(state["accuracy"]), np.array(state["open"])

    def by_task(self) -> dict[str, float]:
        """Running accuracy by task, its families weighted by their share."""
        out: dict[str, float] = {}
        for family, value in zip(FAMILIES.values(), self.accuracy, strict=True):
            out[family.task] = out.get(family.task, 0.0) + family.share * float(value)
        return out
