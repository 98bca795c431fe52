"""What training and evaluation ask of each testbed model, besides its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from vispco.testbed.model import build_config


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    aux_layer: the auxiliary heads read the visual states after so many layers; perception goes on
    in the decoder. hint_layer: after so many layers the model should know what a question refers
    to, and use it in the layers above.
    opens: first layers in which the text may see the image; one is drawn a step, with probabilities
    0.35, 0.3 and 0.35. closes: first layers in which it may no longer, with 0.5, 0.1 and 0.4.
    margins: share of the steps in which the board lies on a larger picture.
    half: whether the weights are stored in float16.
    aux_steps: steps until the auxiliary objectives weigh nothing.
    decay: last part of the steps, in which the learning rate goes to zero.
    """

    name: str
    aux_layer: int
    hint_layer: int
    opens: tuple[int, ...]
    closes: tuple[int, ...]
    margins: float = 0.0
    half: bool = False
    steps: int = 2200
    aux_steps: int = 1500
    decay: float = 1 / 3

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return build_config(self.name).text_config.num_hidden_layers

    @property
    def hidden(self) -> int:
        """Hidden size of the decoder."""
        return build_config(self.name).text_config.hidden_size


_RECIPES = (
    Recipe("testbed-llava", aux_layer=2, hint_layer=3, opens=(0, 1, 2), closes=(8, 7, 6)),
    Recipe(
        "testbed-qwen",
        aux_layer=4,
        hint_layer=6,
        opens=(0, 2, 4),
        closes=(16, 14, 12),
        margins=0.2,
        half=True,
        steps=2300,
        aux_steps=2300,
        decay=0.15,
    ),
)
RECIPES = {recipe.name: recipe for recipe in _RECIPES}


def name_of(model) -> str:
    """Which testbed model this is, by its architecture."""
    return "testbed-qwen" if model.config.model_type == "qwen2_5_vl" else "testbed-llava"
