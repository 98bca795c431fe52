"""Which question families to train on next: from how well each one is answered so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vispco.testbed.questions import FAMILIES

#: Of tasks that are answered by yes or no; the others have four answers or more.
_CHANCE = {"exist": 0.5, "compare": 0.5}


class Curriculum:
    """Running accuracy of every family; a family opens when those it builds on are answered well.

    opens_at: skill at which the families that build on one open. learned_at: skill from which a
    family is no longer one of the `width` that are learned at a time. floor: how often a family of
    full skill is asked, to keep it in practice. memory: of the running accuracy. after: what must
    be learned before a family; None: as the families say.
    """

    def __init__(
        self,
        opens_at: float = 0.6,
        floor: float = 0.12,
        memory: float = 0.97,
        width: int = 8,
        learned_at: float = 0.85,
        after: Mapping[str, Sequence[str]] | None = None,
    ):
        self.opens_at = opens_at
        self.floor = floor
        self.memory = memory
        self.width = width
        self.learned_at = learned_at
        families = FAMILIES.values()
        self.names = list(FAMILIES)
        self.chance = np.array([_CHANCE.get(family.task, 0.25) for family in families])
        self.accuracy = self.chance.copy()
        by_family = {name: family.after for name, family in FAMILIES.items()}
        self.after = by_family if after is None else {name: () for name in FAMILIES} | dict(after)
        self.open = np.array([not self.after[name] for name in self.names])

    def skill(self) -> np.ndarray:
        """Accuracy above chance, from 0 to 1."""
        return np.clip((self.accuracy - self.chance) / (1 - self.chance), 0, 1)

    def draw(self, rng: np.random.Generator, n: int) -> list[int]:
        """Indices of `n` families, the badly answered ones more often."""
        share = np.array([family.share for family in FAMILIES.values()]) ** 0.5
        active = self.open & (self.skill() >= self.learned_at)
        # Unlearned families compete for the small model: only the first few are asked at a time.
        waiting = np.flatnonzero(self.open & ~active)
        active[waiting[: self.width]] = True
        weight = active * share * (self.floor + 1 - self.skill())
        return list(rng.choice(len(self.names), size=n, p=weight / weight.sum()))

    def update(self, families: list[int], correct: list[float]) -> None:
        """Take in the accuracy of each asked family, then open those whose ground is laid."""
        for index, value in zip(families, correct, strict=True):
            self.accuracy[index] = self.memory * self.accuracy[index] + (1 - self.memory) * value
        ready = self.open & (self.skill() >= self.opens_at)
        by_name = dict(zip(self.names, ready, strict=True))
        for index, name in enumerate(self.names):
            self.open[index] |= all(by_name[other] for other in self.after[name])

    def state(self) -> dict:
        """What `restore` needs, JSON-ready."""
        return {"accuracy": self.accuracy.tolist(), "open": self.open.tolist()}

    def restore(self, state: dict) -> None:
        """Go on from a `state`. Raises ValueError for anything else."""
        try:
            accuracy = np.array(state["accuracy"], dtype=float)
            opened = np.array(state["open"])
        except (KeyError, TypeError, ValueError):
            message = "expected the accuracy of each question family, and which are open"
            raise ValueError(message) from None
        fits = accuracy.shape == self.accuracy.shape and opened.shape == self.open.shape
        if not fits or opened.dtype != bool or not ((accuracy >= 0) & (accuracy <= 1)).all():
            families = f"{len(self.names)} question families"
            raise ValueError(f"expected the accuracy of {families}, and which are open")
        self.accuracy = accuracy
        self.open = opened

    def by_task(self) -> dict[str, float]:
        """Running accuracy by task, its families weighted by their share."""
        out: dict[str, float] = {}
        for family, value in zip(FAMILIES.values(), self.accuracy, strict=True):
            out[family.task] = out.get(family.task, 0.0) + family.share * float(value)
        return out
