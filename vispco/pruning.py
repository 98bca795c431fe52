"""`vispco.apply`: hooks in, hooks out. One pruner, two modes.

deploy: dropped tokens leave the hidden states, the rotary embeddings, the masks and the KV cache.
search: tokens stay; masked keys are renormalised away, and gradients reach the keep ratios straight through.

Only hooks are used: no model file is changed, no attention implementation is forced. Text tokens and the
positions of all tokens stay as they were. The output has its original length: zeros where tokens were dropped.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .attention import SoftMask
from .config import PruningConfig
from .context import take, take_rotary
from .masks import Packed, decode_mask, pack, prefill_mask
from .prefill import Prefill, merged
from .registry import METHODS, adapter_for, build_method
from .relaxation import hard_mask
from .ste import Estimator, build_estimator
from .vision import Tower

_applied: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> its Pruner


def apply(model: nn.Module, config: PruningConfig, *, mode: str = "deploy") -> Pruner:
    """Prune `model`'s visual tokens as `config` says, until the `with` block ends or `.remove()` is called.

    model: any model with a registered adapter, compiled or not: inside, it runs as plain PyTorch. mode: "deploy" (tokens
    physically dropped, KV cache shorter) or "search" (tokens masked; the same logits at the kept positions).
    Raises ValueError if the configuration does not fit the model, or the model is pruned already.

    >>> import vispco
    >>> from vispco.testbed import load, batches
    >>> model, processor = load("testbed-llava")
    >>> config = vispco.PruningConfig.from_fastv(k=2, drop=0.5, num_layers=model.config.text_config.num_hidden_layers)
    >>> with vispco.apply(model, config):
    ...     logits = model(**batches("test", n=8, batch_size=8)[0]).logits
    """
    if mode not in ("deploy", "search"):
        raise ValueError(f"mode must be 'deploy' or 'search', got {mode!r}")
    model = getattr(model, "_orig_mod", model)  # of what `torch.compile` returned
    adapter = adapter_for(model)(model)
    check_fits(config, adapter)
    method = build_method(config.method, config.method_options)
    return Pruner(adapter, method, torch.tensor(config.keep_ratios, dtype=torch.float64), mode).install()


def check_fits(config: PruningConfig, adapter) -> None:
    """Raise ValueError unless `config` can be applied to the adapter's model."""
    layers, model_type = len(adapter.layers), adapter.config.model_type
    if config.num_layers != layers:
        raise ValueError(f"the configuration has {config.num_layers} keep_ratios, but {type(adapter.model).__name__} "
                         f"has {layers} decoder layers; search one for this model, or give one ratio per layer")
    if config.model_type is not None and config.model_type != model_type:
        raise ValueError(f"the configuration was made for model type {config.model_type!r}, this is {model_type!r}; "
                         "search one for this model, or set model_type to None to apply it all the same")
    first = METHODS.get(config.method).first_layer
    if min(config.keep_ratios[:first], default=1.0) < 1:
        raise ValueError(f"method {config.method!r} reads the attention of the layer before, so it cannot prune before "
                         f"layer {first}: set keep_ratios[:{first}] to 1.0, or use a method that needs no attention")


class Pruner:
    """The handle that `apply` returns: a context manager, or call `.remove()` when you are done.

    `ratios` (L,), or (B, L) with a schedule for each sample, may be replaced between forward passes; where it requires
    gradients (search), they flow.
    """

    def __init__(self, adapter, method, ratios: Tensor, mode: str = "deploy", estimator: str | dict | Estimator | None = None):
        self.adapter, self.method, self.ratios, self.mode = adapter, method, ratios, mode
        self.estimator = build_estimator(estimator)
        self.labels: Tensor | None = None
        self.encoded: dict = {}  # what `generate` has the vision tower make: accelerate's copies forget what was heard
        self.bound: Tensor | None = None  # (B,), set before the backward pass: see `_bounded`
        self.prefill: Any = None  # the last prompt's `Prefill`
        self.decoding = False
        self.tower = Tower(adapter) if method.reads_vision or method.reads_grid else None
        self._memo: dict = {}  # masks and rotary embeddings shared by the layers of one forward pass
        self._hooks: list = []
        self._layer_hooks: list = []  # of prefill, or of decoding
        self._attached: tuple[bool, bool] | None = None

    # ---- life -------------------------------------------------------------------------------------------
    def install(self) -> Pruner:
        """Register the hooks; if nothing is to be pruned, there are none."""
        model = self.adapter.model
        if model in _applied:
            raise ValueError(f"this {type(model).__name__} is pruned already: leave that `with` block or call "
                             ".remove() on its handle first")
        _applied[model] = self
        try:
            self._register(self._hooks.append)
        except BaseException:
            self.remove()
            raise
        return self

    def _register(self, add) -> None:
        model, adapter = self.adapter.model, self.adapter
        if not self._prunes():
            return
        add(Eagerly())
        add(model.register_forward_pre_hook(self._on_model, with_kwargs=True))
        add(adapter.backbone.register_forward_pre_hook(self._on_backbone, with_kwargs=True))
        add(adapter.decoder.register_forward_pre_hook(self._on_decoder, with_kwargs=True))
        add(adapter.decoder.register_forward_hook(self._on_output))
        self._attach(decoding=False)
        if self.tower:
            self.tower.register(add, attention=self.method.reads_vision)

    def remove(self) -> None:
        """Take the hooks out; the model is as before. Calling it twice is harmless."""
        for hooks in (self._hooks, self._layer_hooks):
            while hooks:
                hooks.pop().remove()
        if _applied.get(self.adapter.model) is self:
            del _applied[self.adapter.model]

    def __enter__(self) -> Pruner:
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def kept(self) -> dict[int, Tensor]:
        """{layer: (B, S) bool} of the last prompt: the tokens that entered, at each layer where some were dropped."""
        steps = self.prefill.steps if self.prefill else {}
        return {i: (s.kept() if isinstance(s, Packed) else s.bool()).to(self.prefill.real.device) & self.prefill.real
                for i, s in steps.items()}

    def _prunes(self) -> bool:
        return (self.mode == "search" and self.ratios.requires_grad) or bool((self.ratios < 1).any())

    # ---- once per forward pass --------------------------------------------------------------------------
    def _on_model(self, module, args, kwargs):
        if kwargs.get("labels") is not None:
            self.labels = kwargs["labels"]
        self.encoded = {name: kwargs[name] for name in ("mm_encoder_outputs",) if kwargs.get(name)}

    def _on_backbone(self, module, args, kwargs):
        labels, self.labels = self.labels, None
        self._memo = {}
        cache = kwargs.get("past_key_values")
        if cache is not None and getattr(cache, "is_compileable", False):
            raise ValueError("a static KV cache has one length for all layers and cannot hold pruned ones: use the "
                             "default cache (leave cache_implementation out)")
        inputs = {"input_ids": args[0], **kwargs} if args else kwargs
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        self.decoding = cache is not None and cache.get_seq_length() > 0
        if not self.decoding:
            visual = self.adapter.visual_mask(ids, embeds)
            self._attach(decoding=False)
            self.prefill = Prefill.start(inputs, visual, inputs.get("attention_mask"), labels, self.adapter.causal, self.ratios)
            self.prefill.sources = self._sources(inputs, self.prefill.visual)
            return
        if self.mode == "search" and self.prefill is not None and self.prefill.steps:
            raise ValueError("search mode only masks tokens, and the KV cache still holds them: to generate, apply the "
                             "configuration with mode='deploy'")
        self._attach(decoding=True)
        if (embeds if ids is None else ids).shape[1] > 1 and bool(self.adapter.visual_mask(ids, embeds).any()):
            raise ValueError("visual tokens after the first forward pass (a second image in a running conversation, "
                             "or chunked prefill) cannot be pruned: start again from the whole prompt")

    def _sources(self, inputs: dict, visual: Tensor) -> dict:
        """What methods may ask of the vision side: made when first asked for, then kept for this prompt."""
        encoded, self.encoded = self.encoded, {}

        def source(flag: str, make):
            def made():
                if not getattr(self.method, flag):
                    raise ValueError(f"{type(self.method).__name__} looks at the vision side: set {flag} = True in the class")
                return make({**inputs, **self.tower.inputs, **encoded}, visual)

            return functools.cache(made)

        return {"tower": source("reads_vision", lambda *prompt: self.tower.read(*prompt)),
                "grid": source("reads_grid", self.adapter.grid)}

    def _on_decoder(self, module, args, kwargs):
        if not self.decoding:
            self.prefill.embeddings = kwargs["inputs_embeds"]
            kwargs, self.prefill.late = self.adapter.take_late(kwargs)
        return args, kwargs

    def _on_output(self, module, args, output):
        if not self.decoding:
            self.prefill.finish()
            if self.tower:
                self.tower.clear()
            if self.prefill.packed is not None:
                output["last_hidden_state"] = self.prefill.packed.restore(output["last_hidden_state"])
        return output

    # ---- once per layer ---------------------------------------------------------------------------------
    def _attach(self, decoding: bool, masks: bool = False) -> None:
        """Put the hooks of prefill or of decoding on the layers, in place of the others.

        Decoding mostly needs none: one layer's looks whether there are `masks` to change, and only then all have one.
        """
        if self._attached in ((decoding, masks), (decoding, True)):
            return
        while self._layer_hooks:
            self._layer_hooks.pop().remove()
        self._attached, add = (decoding, masks), self._layer_hooks.append
        if decoding and not masks:
            add(self.adapter.layers[0].register_forward_pre_hook(self._on_watch, with_kwargs=True))
            return
        run = self._decode if decoding else self._prefill
        for i, layer in enumerate(self.adapter.layers):
            add(layer.register_forward_pre_hook(self._on_layer(i, run), with_kwargs=True))
            for kind, module in () if decoding else self.adapter.projections(i).items():
                add(module.register_forward_hook(self._on_projection(i, kind)))

    def _on_watch(self, module, args, kwargs):
        packed = getattr(kwargs.get("past_key_values"), "vispco_packed", {}).values()
        hidden, mask = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")
        if packed and (mask is not None or hidden.shape[1] > 1 or not all(p.dense for p in packed)):
            self._attach(decoding=True, masks=True)
            return self._on_layer(0, self._decode)(module, args, kwargs)

    def _on_projection(self, i: int, kind: str):
        def hook(module, args, output):
            running = bool(self.prefill.inputs)  # else a layer runs again, for its gradient
            if running and (self.mode == "search" or self.prefill.cut(i + 1)):
                self.prefill.captured[kind] = output

        return hook

    def _on_layer(self, i: int, run):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs.pop("hidden_states")
            hidden, changed = run(i, hidden, kwargs)
            return (hidden, *args[1:]), {**kwargs, **changed}

        return hook

    def _prefill(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        run = self._search if self.mode == "search" else self._deploy
        if self.prefill.visual.device != hidden.device:
            self._memo = {}
        kwargs = self.prefill.follow(hidden, kwargs)
        hidden, changed = run(i, self._add_late(i, hidden), kwargs)
        self.prefill.mask = kwargs.get("attention_mask")
        return hidden, changed

    def _add_late(self, i: int, hidden: Tensor) -> Tensor:
        late = None if self.prefill.late is None else self.adapter.late(self.prefill.late, i, hidden)
        if late is None:
            return hidden
        packed = self.prefill.packed
        return hidden + (late if packed is None else take(late, packed.order))

    # ---- deploy: dropped tokens leave -------------------------------------------------------------------
    def _deploy(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        state, cache = self.prefill, kwargs.get("past_key_values")
        target = state.target(i)
        if i == 0 and cache is not None and any(state.n_visual):
            self.adapter.lengthen(cache)
        if target is not None:
            hidden = self._drop(i, hidden, kwargs, target)
        if state.packed is None:
            state.rotary = kwargs["position_embeddings"]
            return hidden, {}
        if cache is not None:
            if i == 0:
                cache.layers[:1] = [self.adapter.shortened_cache_layer(state.packed.length - hidden.shape[1])]
            cache.vispco_packed = {**getattr(cache, "vispco_packed", {}), i: state.packed}
        changed = self._packed_inputs(kwargs)
        state.rotary = changed["position_embeddings"]
        return hidden, changed

    def _drop(self, i: int, hidden: Tensor, kwargs: dict, target: list[int]) -> Tensor:
        """Rank, choose, merge and gather: the hidden states of the tokens that remain."""
        state, method = self.prefill, self.method
        context = state.context(i, hidden, kwargs, target, self.adapter, exhaustive=False)
        scores, target = state.rank(method, context, target)
        chosen = hard_mask(scores, context.keep, context.valid, check=False)  # (B, V)
        state.faulty.append((scores.isnan() & context.valid).any())
        hidden = merged(hidden, context, chosen, method.merge(context, chosen))
        keep = context.present & ~context.visual_mask  # text stays, padding goes
        keep = keep | torch.zeros_like(keep).scatter(1, context.visual[1], chosen)
        if any(state.tail):  # but generation reads the last column, padding or not
            keep[:, -1] = True
        lengths = [n - v + t + tail for n, v, t, tail in zip(state.n_real, state.n_visual, target, state.tail)]
        index, dense = pack(keep, max(lengths)), len(set(lengths)) == 1
        state.packed = Packed(take(context.order, index), take(keep, index), state.visual.shape[1], dense,
                              plain=dense and state.plain and not any(state.tail))
        state.steps[i], state.left = state.packed, target
        self._memo = {}
        return take(hidden, index)

    def _packed_inputs(self, kwargs: dict) -> dict:
        """Rotary embeddings, mask and position ids of the packed tokens; each layer is given the originals."""
        packed = self.prefill.packed
        rotary, mask, ids = kwargs["position_embeddings"], kwargs.get("attention_mask"), kwargs.get("position_ids")
        key = (id(rotary[0]), id(mask))
        if key not in self._memo:
            self._memo[key] = {"position_embeddings": take_rotary(rotary, packed.order),
                               "attention_mask": prefill_mask(mask, packed),
                               "position_ids": None if ids is None else take(ids, packed.order)}
        return self._memo[key]

    def _decode(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        packed = getattr(cache, "vispco_packed", {}).get(i)
        if packed is None:
            return hidden, {}
        key = (id(packed), id(mask))
        if key not in self._memo:
            queries, mask = hidden.shape[1], None if mask is None else mask.to(packed.order.device)
            width = cache.layers[i].keys.shape[-2] + queries  # from the keys: survives crop()
            self._memo[key] = {"attention_mask": decode_mask(mask, packed, queries, width)}
        return hidden, self._memo[key]

    # ---- search: dropped tokens are masked, gradients flow ----------------------------------------------
    def _search(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        state, method = self.prefill, self.method
        flows = self.ratios.requires_grad and torch.is_grad_enabled()
        target = state.target(i)
        if (target is not None or flows) and i >= method.first_layer and any(state.n_visual):
            with torch.no_grad():
                context = state.context(i, hidden, kwargs, target or state.left, self.adapter, exhaustive=True)
                scores, state.left = state.rank(method, context, target or state.left)
                chosen = hard_mask(scores, context.keep, context.valid)
                into = method.merge(context, chosen) if target is not None else None
            hidden = merged(hidden, context, chosen, into)
            keep = self.ratios[..., i].to(hidden.device) * context.n_visual
            weight = None if state.policy is None else state.policy[context.visual]
            mask = self.estimator(scores, keep, context.keep, context.valid, weight)  # (B, V)
            if mask.requires_grad and self.estimator.clip:
                mask.register_hook(self._bounded)
            mask = mask.where(state.visual[context.visual], 1.0)  # filler slots point at text, which stays
            policy = torch.ones_like(mask[:, :1]).expand(hidden.shape[:2]).scatter(1, context.visual[1], mask)
            state.policy = policy if state.policy is None else state.policy * policy
            state.steps[i] = state.policy.detach()
            self._memo = {}
        state.rotary = kwargs["position_embeddings"]
        if state.policy is None:
            return hidden, {}
        mask = kwargs.get("attention_mask")
        if id(mask) not in self._memo:
            self._memo[id(mask)] = {"attention_mask": SoftMask.of(mask, state.policy, hidden.dtype, state.plain)}
        return hidden, self._memo[id(mask)]

    def _bounded(self, gradient: Tensor) -> Tensor:
        """Clip the loss's gradient by each token's mask (B, V) to +-`bound` of its sample.

        At m = 0 the slope of softmax with policy is the token's weight over the weight of all that is kept. That is
        unbounded (a dropped token may have been attended to e^20 times as much), but keeping the token cannot
        take away more divergence than its sample has.
        """
        bound = None if self.bound is None else self.bound[:, None].to(gradient)
        return gradient if bound is None else gradient.clamp(-bound, bound)


class Eagerly:
    """While any of these has not been removed, what `torch.compile` made runs as plain PyTorch.

    Compiled code does not look whether hooks have come: what was compiled before `apply` would silently not prune.
    """

    _count, _stance = 0, None

    def __init__(self):
        if not Eagerly._count:
            Eagerly._stance = torch.compiler.set_stance("force_eager")
        Eagerly._count += 1

    def remove(self) -> None:
        """As a hook's handle does."""
        Eagerly._count -= 1
        if not Eagerly._count:
            Eagerly._stance.__exit__(None, None, None)
