"""The pruner: hooks that go through one model with each forward pass, and come out again.

Only hooks are used: no model file is changed, no attention implementation is forced. Text tokens
and the positions of all tokens stay as they were. The output has its original length, with zeros
where tokens were dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..config import whole_tokens
from . import _cache as kv
from ._attention import check_implementation
from ._hooks import Eagerly, Handle, Replaced
from ._masks import Packed
from ._tower import Tower
from .forward import answer_logits
from .prompt import Prompt
from .state import PassState


class Pruner(Handle):
    """The handle that `apply` returns: a context manager, or call `.remove()` when you are done.

    It listens to the model. Subclasses prune: they say what enters a layer, and what leaves it.

    ratios: (L,), or (B, L) with a schedule for each sample. Another one may be assigned between
    forward passes. Where it requires gradients (search), they flow.
    A `with` block on a handle that was removed prunes again.
    """

    #: Whether tokens are ranked at layers that drop none, too, and all of them.
    exhaustive = False

    def __init__(self, adapter: Any, method: Any, ratios: Tensor):
        super().__init__(adapter.model)
        self.adapter, self.method, self._ratios = adapter, method, ratios
        # Of the call of `run` that is going on.
        self._labels: Tensor | None = None
        self._seed = 0
        # What `generate` has the vision tower make. Accelerate's copies forget what was heard.
        self._encoded: dict = {}
        self.tower = Tower(adapter)
        # Of the last prompt: what is known of it, and the tokens left at each layer with a drop.
        self.prompt: Any = None
        self.steps: dict[int, Packed | Tensor] = {}
        # Of the forward pass of a prompt that is going on, else None.
        self.state: Any = None
        # Whether the backbone is running, and `_cache.Memory` of its KV cache.
        self._running = False
        self._memory: Any = None
        # The hooks on the layers, and what they were made for.
        self._layer_hooks: list = []
        self._attached: tuple | None = None

    def _register(self, add: Callable) -> None:
        adapter, method = self.adapter, self.method
        if not self._prunes():
            return
        add(Eagerly())
        add(Replaced(adapter.model, "forward", self._around_model))
        add(Replaced(adapter.backbone, "forward", self._around_backbone))
        add(adapter.decoder.register_forward_pre_hook(self._on_decoder, with_kwargs=True))
        add(adapter.decoder.register_forward_hook(self._on_output))
        self._attach(decoding=False)
        if method.reads_vision or method.reads_grid:
            self.tower.register(add, attention=method.reads_vision, turn=self.turn)

    def remove(self) -> None:
        """Take the hooks out; the model is as before. Calling it twice is harmless."""
        self._detach()
        super().remove()

    @property
    def ratios(self) -> Tensor:
        """The schedule in use."""
        return self._ratios

    @ratios.setter
    def ratios(self, ratios: Tensor) -> None:
        self._ratios = ratios
        if self.installed and not self.hooks:
            # The schedule before kept all.
            self._register(self.hooks.append)

    def _prunes(self) -> bool:
        return bool((self.ratios < 1).any())

    # ---- one forward pass -----------------------------------------------------------------------
    def run(self, batch: Any, ratios: Tensor | None = None, seed: int = 0) -> Tensor:
        """One forward pass over a batch: logits (A, vocabulary), float32, at its answer tokens.

        batch: a `vispco.calibration.PreparedBatch` of A answer tokens; no score looks at them.
        ratios: the schedule of this pass, (L,) or (B, L); None: the one that the handle has.
        seed: of the estimator's noise, if it has any.
        Raises FloatingPointError, naming the layer, for numbers that are not finite.
        """
        hears_tower = self.method.reads_vision or self.method.reads_grid
        with self.turn():
            before = self._ratios
            self._labels, self._seed = batch.labels, seed
            try:
                if ratios is not None:
                    self.ratios = ratios
                return answer_logits(self.model, batch, "pruned", reuse_features=not hears_tower)
            finally:
                self._ratios, self._labels, self._seed = before, None, 0

    def kept(self) -> dict[int, Tensor]:
        """Tokens that entered each layer where the last prompt lost some: {layer: (B, S) bool}."""
        masks = {i: s.kept() if isinstance(s, Packed) else s.bool() for i, s in self.steps.items()}
        return {i: mask.to(self.prompt.real.device) & self.prompt.real for i, mask in masks.items()}

    def _around_model(self, forward: Callable[[], Any], given: dict) -> Any:
        with self.turn():
            before = self._labels
            if given.get("labels") is not None:
                self._labels = given["labels"]
            self._encoded = {n: given[n] for n in ("mm_encoder_outputs",) if given.get(n)}
            try:
                return forward()
            finally:
                self._labels = before

    def _around_backbone(self, forward: Callable[[], Any], given: dict) -> Any:
        if not self.installed:
            # Any more, but somebody has put a method of their own around this one.
            return forward()
        with self.turn():
            if self._running:
                raise ValueError(
                    "a pruned model cannot run within its own forward pass: not in a method's "
                    "`score`, nor in a hook"
                )
            self._running = True
            try:
                self._begin(given)
                return forward()
            finally:
                self._end()

    def _begin(self, inputs: dict) -> None:
        """inputs: what the backbone is called with."""
        cache = inputs.get("past_key_values")
        kv.check(cache)
        if cache is None or not cache.get_seq_length():
            self._start(inputs)
            return
        self._memory = getattr(cache, "vispco", None)
        if self._memory:
            self._memory.resume()
        self._attach(decoding=True)
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        given = embeds if ids is None else ids
        several = given is not None and given.shape[1] > 1
        if several and bool(self.adapter.visual_mask(ids, embeds).any()):
            raise ValueError(
                "visual tokens after the first forward pass (a second image in a running "
                "conversation, or chunked prefill) cannot be pruned: start again from the whole "
                "prompt"
            )

    def _start(self, inputs: dict) -> None:
        """Begin with a prompt."""
        adapter = self.adapter
        visual = adapter.visual_mask(inputs.get("input_ids"), inputs.get("inputs_embeds"))
        check_implementation(getattr(adapter.decoder.config, "_attn_implementation", "sdpa"))
        self._attach(decoding=False)
        self.tower.clear()
        self.prompt = prompt = Prompt.read(inputs, visual, self._labels, adapter.causal)
        schedule = self.ratios.detach().expand(len(prompt.n_visual), -1).T.tolist()  # (L, B)
        counts = [list(map(whole_tokens, row, prompt.n_visual)) for row in schedule]
        # `generate` has the tower run before the model, and gives its output to the model alone.
        inputs, self._encoded = {**inputs, **self._encoded}, {}
        sources = self.tower.sources(self.method, inputs, prompt.visual)
        self.steps, given = {}, (adapter, self.method, self.exhaustive, prompt, counts)
        self.state = PassState(*given, left=prompt.n_visual, sources=sources)

    def _end(self) -> None:
        """The backbone has come to an end, or was broken off."""
        if self._memory:
            self._memory.running = False
            if self.state is not None:
                self._memory.pruned = bool(self.steps)
        self._memory, self.state, self._running = None, None, False
        self.tower.clear()

    def _on_decoder(self, module, args, kwargs):
        if not self._running:
            raise ValueError(
                "the decoder of a pruned model was called by itself, where no token is known to be "
                f"visual: call the whole {type(self.adapter.model).__name__}"
            )
        if self.state is not None:
            self.state.embeddings = kwargs["inputs_embeds"]

    def _on_output(self, module, args, output):
        if self.state is None:
            return
        self.state.check()
        if self.state.packed is not None:
            # Zeros go through the last norm as they are, unless it has a bias.
            hidden, kept = output["last_hidden_state"], self.state.packed.kept()
            output["last_hidden_state"] = hidden * kept[..., None].to(hidden.device)

    # ---- one layer ------------------------------------------------------------------------------
    def enter(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """What goes into layer i of a prompt, of the decoder's states (B, S, D).

        Second result: those of the layer's other arguments `kwargs` that change.
        """
        raise NotImplementedError

    def leave(self, hidden: Tensor) -> Tensor:
        """What the decoder gets (B, S, D), of a layer's output."""
        return hidden

    def _detach(self) -> None:
        while self._layer_hooks:
            self._layer_hooks.pop().remove()
        self._attached = None

    def _attach(self, decoding: bool, masks: bool = False) -> None:
        """Put the hooks of a prompt's pass, or of decoding, on the layers.

        Decoding mostly needs one hook only. It looks whether there are `masks` to change, and only
        then all layers have one.
        """
        layers, add = self.adapter.layers, self._layer_hooks.append
        # PEFT may have put others there.
        projections = [{} if decoding else self.adapter.projections(i) for i in range(len(layers))]
        if self._attached in ((decoding, masks, projections), (decoding, True, projections)):
            return
        self._detach()
        self._attached = (decoding, masks, projections)
        if decoding and not masks:
            add(layers[0].register_forward_pre_hook(self._on_watch, with_kwargs=True))
            return
        run = self._decode if decoding else self._prefill
        for i, layer in enumerate(layers):
            on_layer = partial(self._on_layer, i, run)
            add(layer.register_forward_pre_hook(on_layer, with_kwargs=True))
            if not decoding:
                # First of all hooks, so that others see the original length.
                add(layer.register_forward_hook(self._on_left, prepend=True))
            for kind, module in projections[i].items():
                add(module.register_forward_hook(partial(self._on_projection, i, kind)))

    def _on_watch(self, module, args, kwargs):
        hidden, mask = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")
        if self._memory and self._memory.changes_masks(hidden.shape[1], mask):
            self._attach(decoding=True, masks=True)
            return self._on_layer(0, self._decode, module, args, kwargs)
        return None

    def _on_projection(self, i: int, kind: str, module, args, output):
        if self.state is None:
            # A layer runs again, for its gradient.
            return
        if self.exhaustive or self.state.target(i + 1) is not None:
            self.state.captured[kind] = output

    def _on_layer(self, i: int, run: Callable, module, args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden, kwargs = run(i, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def _on_left(self, module, args, output):
        if isinstance(output, tuple):
            # In older releases of transformers.
            return (self.leave(output[0]), *output[1:])
        return self.leave(output)

    def _prefill(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        if self.state is None:
            raise ValueError(
                "a layer of a pruned model ran outside of the model's forward pass; gradient "
                "checkpointing does so before transformers 5.23: update it, or switch "
                "checkpointing off"
            )
        state, cache = self.state, kwargs.get("past_key_values")
        visual = any(state.prompt.n_visual)
        if i == 0 and cache is not None and (visual or hasattr(cache, "vispco")):
            self._memory = kv.claim(cache)
        kwargs = state.follow(hidden.device, kwargs)
        hidden, changed = self.enter(i, hidden, kwargs)
        state.mask, kwargs = kwargs.get("attention_mask"), {**kwargs, **changed}
        state.rotary = kwargs["position_embeddings"]
        return hidden, kwargs

    def _decode(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        changed = self._memory.decoding(i, hidden.shape[1], kwargs) if self._memory else {}
        return hidden, {**kwargs, **changed}
