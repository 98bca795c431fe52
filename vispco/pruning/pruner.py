"""The pruner: hooks that go through one model with each forward pass, prompt or decoding, and come out again.

Only hooks are used: no model file is changed, no attention implementation is forced. Text tokens and the
positions of all tokens stay as they were. The output has its original length: zeros where tokens were dropped.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from .context import take
from ._hooks import Eagerly, Handle, Replaced, named
from ._tower import Tower
from . import _cache as kv
from ._masks import Packed, decode_mask
from .forward import answer_logits
from .prompt import Prefill


class Pruner(Handle):
    """The handle that `apply` returns: a context manager, or call `.remove()` when you are done.

    It listens to the model, and knows of its prompt and its KV cache what `enter` needs, where subclasses prune.

    `ratios` (L,), or (B, L) with a schedule for each sample, may be replaced between forward passes; where it requires
    gradients (search), they flow. A `with` block on a handle that was removed prunes again.
    """

    everywhere = False  # whether tokens are ranked at layers that drop none, too

    def __init__(self, adapter, method, ratios: Tensor):
        super().__init__(adapter.model)
        self.adapter, self.method, self._ratios = adapter, method, ratios
        self._labels: Tensor | None = None  # of the batch that `run` runs on
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

    def kept(self) -> dict[int, Tensor]:
        """{layer: (B, S) bool} of the last prompt: the tokens that entered, at each layer where some were dropped."""
        steps = self.prefill.steps if self.prefill else {}
        return {i: (s.kept() if isinstance(s, Packed) else s.bool()).to(self.prefill.real.device) & self.prefill.real
                for i, s in steps.items()}

    def run(self, batch: Any, ratios: Tensor | None = None, seed: int = 0) -> Tensor:
        """One forward pass over a `vispco.calibration.PreparedBatch`: logits (A, vocabulary), float32, at its A answer tokens.

        ratios: the schedule of this pass, (L,) or (B, L); None: the one that the handle has. seed: of the estimator's noise.
        No score looks at the answers. Raises FloatingPointError, naming the layer, for numbers that are not finite.
        """
        hears_tower = self.method.reads_vision or self.method.reads_grid
        with self.turn():
            before, self._labels = self._ratios, batch.labels
            try:
                if ratios is not None:
                    self.ratios = ratios
                return answer_logits(self.model, batch, whose="pruned", reuse_features=not hears_tower)
            finally:
                self._ratios, self._labels = before, None

    def enter(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """What goes into layer i of a prompt in place of `hidden` (B, N, D), and which of the other arguments change.

        kwargs: those that the model gives to the layer.
        """
        raise NotImplementedError

    def _prunes(self) -> bool:
        return bool((self.ratios < 1).any())

    # ---- once per forward pass --------------------------------------------------------------------------
    def _around_model(self, forward):
        arguments = named(forward)

        def run(*args, **kwargs):
            with self.turn():
                given = arguments(args, kwargs)
                before, labels = self._labels, given.get("labels")
                self._labels = before if labels is None else labels
                self.encoded = {name: given[name] for name in ("mm_encoder_outputs",) if given.get(name)}
                try:
                    return forward(*args, **kwargs)
                finally:
                    self._labels = before

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
            self.prefill = Prefill.start(inputs, visual, self._labels, self.adapter.causal, self.ratios)
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
        if running and (self.everywhere or self.prefill.cut(i + 1)):
            self.prefill.captured[kind] = output

    def _on_layer(self, i: int, run, module, args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden, changed = run(i, hidden, kwargs)
        return (hidden, *args[1:]), {**kwargs, **changed}

    def _prefill(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        if not self._running:
            raise ValueError("a layer of a pruned model ran outside of the model's forward pass; gradient checkpointing does so "
                             "before transformers 5.23: update it, or switch checkpointing off")
        cache = kwargs.get("past_key_values")
        if i == 0 and cache is not None and (any(self.prefill.n_visual) or hasattr(cache, "vispco")):
            self._memory = kv.claim(cache)
        if self.prefill.visual.device != hidden.device:
            self._memo = {}
        kwargs = self.prefill.follow(hidden, kwargs)
        hidden, changed = self.enter(i, self._add_late(i, hidden), kwargs)
        self.prefill.mask = kwargs.get("attention_mask")
        return hidden, changed

    def _add_late(self, i: int, hidden: Tensor) -> Tensor:
        late = None if self.prefill.late is None else self.adapter.late(self.prefill.late, i, hidden)
        if late is None:
            return hidden
        packed = self.prefill.packed
        return hidden + (late if packed is None else take(late, packed.order))

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
