"""`vispco.apply`: hooks in, hooks out. One pruner, two modes.

deploy: dropped tokens leave the hidden states, the rotary embeddings, the masks and the KV cache.
search: tokens stay; masked keys are renormalised away, and gradients reach the keep ratios straight through.

Only hooks are used: no model file is changed, no attention implementation is forced. Text tokens and the
positions of all tokens stay as they were. The output has its original length: zeros where tokens were dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Bound, SoftMask
from .config import PruningConfig
from .context import take, take_rotary
from .hooks import Eagerly, Handle, Replaced, named
from .masks import Packed, decode_mask, pack, prefill_mask
from .models import cache as kv
from .prefill import Prefill, merged
from .registry import METHODS, adapter_for, build_method
from .relaxation import hard_mask
from .ste import Estimator, build_estimator
from .vision import Tower


def apply(model: nn.Module, config: PruningConfig, *, mode: str = "deploy") -> Pruner:
    """Prune `model`'s visual tokens as `config` says, until the `with` block ends or `.remove()` is called.

    model: any model with a registered adapter, compiled or not: inside, it runs as plain PyTorch. So does one that PEFT or
    DistributedDataParallel wraps. mode: "deploy" (tokens physically dropped, KV cache shorter) or "search" (tokens
    masked; the same logits at the kept positions).
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
    model = unwrapped(model)
    adapter = adapter_for(model)(model)
    check_fits(config, adapter)
    method = build_method(config.method, config.method_options)
    return Pruner(adapter, method, torch.tensor(config.keep_ratios, dtype=torch.float64), mode).install()


def unwrapped(model: Any) -> Any:
    """The model inside what `torch.compile`, PEFT or DistributedDataParallel made of it.

    Raises ValueError for a DataParallel one, whose copies would share one pruner.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError("a DataParallel model runs copies of itself in threads, and cannot be pruned: prune its .module on "
                         "one device, or run one process per device")
    if hasattr(model, "_orig_mod"):  # torch.compile
        return unwrapped(model._orig_mod)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    if type(model).__module__.startswith("peft.") and hasattr(model, "get_base_model"):
        return unwrapped(model.get_base_model())
    return model


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


class Pruner(Handle):
    """The handle that `apply` returns: a context manager, or call `.remove()` when you are done.

    `ratios` (L,), or (B, L) with a schedule for each sample, may be replaced between forward passes; where it requires
    gradients (search), they flow. A `with` block on a handle that was removed prunes again.
    """

    def __init__(self, adapter, method, ratios: Tensor, mode: str = "deploy", estimator: str | Mapping | Estimator | None = None):
        super().__init__(adapter.model)
        self.adapter, self.method, self._ratios, self.mode = adapter, method, ratios, mode
        self.estimator = build_estimator(estimator)
        self.labels: Tensor | None = None
        self._bound = Bound()
        self.encoded: dict = {}  # what `generate` has the vision tower make: accelerate's copies forget what was heard
        self.prefill: Any = None  # the last prompt's `Prefill`
        self.decoding = False
        self.tower = Tower(adapter)
        self._memo: dict = {}  # masks and rotary embeddings shared by the layers of one forward pass
        self._layer_hooks: list = []  # of prefill, or of decoding
        self._attached: tuple | None = None
        self._running = False  # the backbone
        self._memory: Any = None  # of the KV cache in use

    # ---- life -------------------------------------------------------------------------------------------
    def _register(self, add) -> None:
        adapter = self.adapter
        if not self._prunes():
            return
        add(Eagerly())
        add(Replaced(adapter.model, "forward", self._around_model))
        add(Replaced(adapter.backbone, "forward", self._around_backbone))
        add(adapter.decoder.register_forward_pre_hook(self._on_decoder, with_kwargs=True))
        add(adapter.decoder.register_forward_hook(self._on_output))
        self._attach(decoding=False)
        if self.method.reads_vision or self.method.reads_grid:
            self.tower.register(add, attention=self.method.reads_vision, turn=self.turn)

    def remove(self) -> None:
        """Take the hooks out; the model is as before. Calling it twice is harmless."""
        while self._layer_hooks:
            self._layer_hooks.pop().remove()
        self._attached = None
        super().remove()

    @property
    def ratios(self) -> Tensor:
        """The schedule in use."""
        return self._ratios

    @ratios.setter
    def ratios(self, ratios: Tensor) -> None:
        self._ratios = ratios
        if self.installed and not self.hooks:  # the one before kept all
            self._register(self.hooks.append)

    @property
    def bound(self) -> Tensor | None:
        """(B,), set before the backward pass: of the gradient by each token's mask (`vispco.attention.Bound`)."""
        return self._bound.value

    @bound.setter
    def bound(self, bound: Tensor | None) -> None:
        self._bound.value = bound

    def kept(self) -> dict[int, Tensor]:
        """{layer: (B, S) bool} of the last prompt: the tokens that entered, at each layer where some were dropped."""
        steps = self.prefill.steps if self.prefill else {}
        return {i: (s.kept() if isinstance(s, Packed) else s.bool()).to(self.prefill.real.device) & self.prefill.real
                for i, s in steps.items()}

    def _prunes(self) -> bool:
        return (self.mode == "search" and self.ratios.requires_grad) or bool((self.ratios < 1).any())

    # ---- once per forward pass --------------------------------------------------------------------------
    def _around_model(self, forward):
        arguments = named(forward)

        def run(*args, **kwargs):
            with self.turn():
                given = arguments(args, kwargs)
                labels = given.get("labels")
                self.labels = self.labels if labels is None else labels
                self.encoded = {name: given[name] for name in ("mm_encoder_outputs",) if given.get(name)}
                try:
                    return forward(*args, **kwargs)
                finally:
                    self.labels = None

        return run

    def _around_backbone(self, forward):
        arguments = named(forward)

        def run(*args, **kwargs):
            if not self.installed:  # any more, but somebody has put a method of his own around this one
                return forward(*args, **kwargs)
            with self.turn():
                if self._running:
                    raise ValueError("a pruned model cannot run within its own forward pass: not in a method's `score`, nor in a hook")
                self._running = True
                try:
                    self._begin(arguments(args, kwargs))
                    return forward(*args, **kwargs)
                finally:
                    self._end()
                    self._running = False

        return run

    def _begin(self, inputs: dict) -> None:
        """inputs: what the backbone is called with."""
        self._memo, cache = {}, inputs.get("past_key_values")
        kv.check(cache)
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        self.decoding = cache is not None and cache.get_seq_length() > 0
        if not self.decoding:
            visual = self.adapter.visual_mask(ids, embeds)
            self._check_attention()
            self._attach(decoding=False)
            self.prefill = Prefill.start(inputs, visual, self.labels, self.adapter.causal, self.ratios)
            self.tower.clear()
            self.prefill.sources = self._sources(inputs, self.prefill.visual)
            return
        self._memory = getattr(cache, "vispco", None)
        if self._memory:
            if self._memory.pruned and not self._memory.packed:
                raise ValueError("search mode only masks tokens, and the KV cache still holds them: to generate, apply the "
                                 "configuration with mode='deploy'")
            self._memory.running = True
        self._attach(decoding=True)
        given = embeds if ids is None else ids
        if given is not None and given.shape[1] > 1 and bool(self.adapter.visual_mask(ids, embeds).any()):
            raise ValueError("visual tokens after the first forward pass (a second image in a running conversation, "
                             "or chunked prefill) cannot be pruned: start again from the whole prompt")

    def _check_attention(self) -> None:
        name = getattr(self.adapter.decoder.config, "_attn_implementation", "sdpa")
        if name not in ("sdpa", "eager", None):
            raise ValueError(f"attention implementation {name!r} takes no mask, or finds one in position_ids, and would not see "
                             "which tokens are left: model.set_attn_implementation('sdpa') has fast kernels too")

    def _end(self) -> None:
        """Whether the backbone came to an end, or not."""
        if self._memory:
            self._memory.running = False
        if not self.decoding and self.prefill:
            if self._memory:
                self._memory.pruned = bool(self.prefill.steps)
            self.prefill.release()
        self._memory = None
        self.tower.clear()

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
        if not self._running:
            raise ValueError(f"the decoder of a pruned model was called by itself, where no token is known to be visual: call "
                             f"the whole {type(self.adapter.model).__name__}")
        if not self.decoding:
            self.prefill.embeddings = kwargs["inputs_embeds"]
            kwargs, self.prefill.late = self.adapter.take_late(kwargs)
        return args, kwargs

    def _on_output(self, module, args, output):
        if not self.decoding:
            self.prefill.check()
            if self.prefill.packed is not None:
                output["last_hidden_state"] = self.prefill.packed.restore(output["last_hidden_state"])
        return output

    # ---- once per layer ---------------------------------------------------------------------------------
    def _attach(self, decoding: bool, masks: bool = False) -> None:
        """Put the hooks of prefill or of decoding on the layers, in place of the others.

        Decoding mostly needs none: one layer's looks whether there are `masks` to change, and only then all have one.
        """
        layers = range(len(self.adapter.layers))
        projections = [] if decoding else [self.adapter.projections(i) for i in layers]  # PEFT may have put others there
        if self._attached in ((decoding, masks, projections), (decoding, True, projections)):
            return
        while self._layer_hooks:
            self._layer_hooks.pop().remove()
        self._attached, add = (decoding, masks, projections), self._layer_hooks.append
        if decoding and not masks:
            add(self.adapter.layers[0].register_forward_pre_hook(self._on_watch, with_kwargs=True))
            return
        run = self._decode if decoding else self._prefill
        for i, layer in enumerate(self.adapter.layers):
            add(layer.register_forward_pre_hook(functools.partial(self._on_layer, i, run), with_kwargs=True))
        for i, modules in enumerate(projections):
            for kind, module in modules.items():
                add(module.register_forward_hook(functools.partial(self._on_projection, i, kind)))

    def _on_watch(self, module, args, kwargs):
        packed = self._memory.packed.values() if self._memory else ()
        hidden, mask = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")
        if packed and (mask is not None or hidden.shape[1] > 1 or not all(p.dense for p in packed)):
            self._attach(decoding=True, masks=True)
            return self._on_layer(0, self._decode, module, args, kwargs)

    def _on_projection(self, i: int, kind: str, module, args, output):
        running = bool(self.prefill.inputs)  # else a layer runs again, for its gradient
        if running and (self.mode == "search" or self.prefill.cut(i + 1)):
            self.prefill.captured[kind] = output

    def _on_layer(self, i: int, run, module, args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden, changed = run(i, hidden, kwargs)
        return (hidden, *args[1:]), {**kwargs, **changed}

    def _prefill(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        if not self._running:
            raise ValueError("a layer of a pruned model ran outside of the model's forward pass; gradient checkpointing does so "
                             "before transformers 5.23: update it, or switch checkpointing off")
        run, cache = self._search if self.mode == "search" else self._deploy, kwargs.get("past_key_values")
        if i == 0 and cache is not None and (any(self.prefill.n_visual) or hasattr(cache, "vispco")):
            self._memory = kv.claim(cache)
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
        if target is not None:
            hidden = self._drop(i, hidden, kwargs, target)
        if state.packed is None:
            state.rotary = kwargs["position_embeddings"]
            return hidden, {}
        if cache is not None:
            kv.shorten(cache, i, state.packed)
        changed = self._packed_inputs(kwargs)
        state.rotary = changed["position_embeddings"]
        return hidden, changed

    def _drop(self, i: int, hidden: Tensor, kwargs: dict, target: list[int]) -> Tensor:
        """Rank, choose, merge and gather: the hidden states of the tokens that remain."""
        state, method = self.prefill, self.method
        context = state.context(i, hidden, kwargs, target, self.adapter, exhaustive=False)
        scores, target = state.rank(method, context, target)
        chosen = hard_mask(scores, context.keep, context.valid, check=False)  # (B, V)
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
        mask = kwargs.get("attention_mask")
        packed = self._memory.packed.get(i) if self._memory else None
        if packed is None:
            return hidden, {}
        key = (id(packed), id(mask))
        if key not in self._memo:
            queries, mask = hidden.shape[1], None if mask is None else mask.to(packed.order.device)
            width = kwargs["past_key_values"].layers[i].keys.shape[-2] + queries  # from the keys: survives crop()
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
            m = self.estimator(scores, keep, context.keep, context.valid, weight)  # (B, V)
            if m.requires_grad and self.estimator.clip:
                m.register_hook(self._bound)
            m = m.where(state.visual[context.visual], 1.0)  # filler slots point at text, which stays
            policy = torch.ones_like(m[:, :1]).expand(hidden.shape[:2]).scatter(1, context.visual[1], m)
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
