"""Which question families to train on next: from how well each one is answered so far."""

from __future__ import annotations

import numpy as np

from .questions import FAMILIES

_CHANCE = {"exist": 0.5, "compare": 0.5}  # tasks answered by yes or no; the others have four answers or more


class Curriculum:
    """Running accuracy of every family; a family opens when the ones it builds on are answered well."""

    def __init__(self, opens_at: float = 0.6, floor: float = 0.12, memory: float = 0.97,
                 width: int = 8, learned_at: float = 0.85):  # fmt: skip
        self.opens_at, self.floor, self.memory, self.width, self.learned_at = opens_at, floor, memory, width, learned_at
        self.names = list(FAMILIES)
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
        # unlearned families compete for the small model, so only the first few are asked at a time
        waiting = [index for index in range(len(self.names)) if self.open[index] and not active[index]]
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
        """The inverse of `state`. Raises ValueError for anything else."""
        try:
            accuracy, opened = np.array(state["accuracy"], dtype=float), np.array(state["open"])
        except (KeyError, TypeError, ValueError):
            raise ValueError("expected the accuracy of each question family, and which are open") from None
        if accuracy.shape != self.accuracy.shape or opened.shape != self.open.shape or opened.dtype != bool or not (
                (accuracy >= 0) & (accuracy <= 1)).all():
            raise ValueError(f"expected the accuracy of {len(self.names)} question families, and which are open")
        self.accuracy, self.open = accuracy, opened

    def by_task(self) -> dict[str, float]:
        """Running accuracy by task, its families weighted by their share."""
        out: dict[str, float] = {}
        for family, value in zip(FAMILIES.values(), self.accuracy, strict=True):
            out[family.task] = out.get(family.task, 0.0) + family.share * float(value)
        return out
