"""The same model with more layers: how searches scale with depth, without training anything."""

from __future__ import annotations

from copy import deepcopy

from torch import nn

from vispco.registry import adapter_for


def deepen(model: nn.Module, factor: int) -> nn.Module:
    """A copy of `model` with `factor` times the decoder layers and the same answers, to the bit.

    Layer i becomes layer `factor * i`. After it come `factor - 1` copies of it that change nothing,
    for the last projections of their attention and of their MLP are 0:

        h + 0 attention(h) + 0 mlp(h) = h

    A copy costs what a layer costs. It has an attention map, by the weights of the layer before it,
    of that layer's output instead of its input. So a schedule of `model` with each ratio repeated
    `factor` times prunes the same hidden states before the same layers. Methods that rank tokens by
    these alone (strided, divprune) choose the same tokens. FastV and others that read the attention
    of the layer before read the copy's, and may not.

    It is for decoders of Llama's form (`self_attn.o_proj`, `mlp.down_proj`). The configuration, the
    layers' indices in the cache and their types follow. Raises ValueError for another form, or a
    factor that is no whole number of 1 or more.

    >>> from vispco import testbed
    >>> model, _ = testbed.load("testbed-llava")
    >>> deep = deepen(model, 4)
    >>> deep.config.text_config.num_hidden_layers
    32
    """
    if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
        raise ValueError(f"factor must be a whole number of 1 or more, got {factor!r}")
    deep = deepcopy(model)
    adapter = adapter_for(deep)(deep)
    config = adapter.config.get_text_config(decoder=True)
    layers = []
    for layer in adapter.decoder.layers:
        layers += [layer, *(_idle(layer, config) for _ in range(factor - 1))]
    adapter.decoder.layers = nn.ModuleList(layers)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for kind in config.layer_types for _ in range(factor)]
    for i, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    return deep


def _idle(layer: nn.Module, config) -> nn.Module:
    """A copy of a layer that returns its input; it shares the decoder's configuration."""
    idle = deepcopy(layer, {id(config): config})
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        try:
            projection = idle.get_submodule(path)
        except AttributeError:
            raise ValueError(
                f"{type(layer).__name__} has no {path}: "
                "only decoders of Llama's form can be deepened"
            ) from None
        for weight in projection.parameters():
            nn.init.zeros_(weight)
    return idle
