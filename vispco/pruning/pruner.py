"""The pruner: hooks that go through one model with each forward pass, and come out again.

Only hooks are used: no model file is changed, no attention implementation is forced. Text tokens
and the positions of all tokens stay as they were. The output has its original length, with zeros
where tokens were dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..config import whole_tokens
from ..reading.sharding import heads_group
from . import _cache as kv
from ._compiled import Compiled
from ._hooks import Eagerly, Replaced
from ._implementations import check_implementation, implementation, is_flash
from ._masks import Packed
from ._tower import Tower
from ._turns import REFUSAL, goes_on, later_turn
from .forward import answer_logits
from .layers import LayerHooks
from .prompt import Generation, Prompt
from .state import PassState


class Pruner(LayerHooks):
    """The handle that `apply` returns: a context manager, or call `.remove()` when you are done.

    It listens to the model. Subclasses prune: they say what enters a layer, and what leaves it.

    ratios: (L,), or (B, L) with a schedule for each sample. Another one may be assigned between
    forward passes. Where it requires gradients (search), they flow.
    A `with` block on a handle that was removed prunes again.
    """

    #: Whether tokens are ranked at layers that drop none, too, and all of them.
    exhaustive = False

    def __init__(self, adapter: Any, method: Any, ratios: Tensor):
        super().__init__(adapter)
        self.group = heads_group(adapter.model)
        if self.group is not None and self.exhaustive:
            raise ValueError(
                f"{type(adapter.model).__name__} is sharded by tensor parallelism, where a search "
                "has the gradient of its own heads alone: search with the whole model in each "
                "process, or under FSDP2, then deploy"
            )
        self.method, self._ratios = method, ratios
        self.first_layer = adapter.first_layer(method)
        # Of the call of `run` that is going on.
        self._labels: Tensor | None = None
        self._seed = 0
        # What `generate` has the vision tower make. Accelerate's copies forget what was heard.
        self._encoded: dict = {}
        self.tower = Tower(adapter, self.group)
        # Of the last prompt: what is known of it, and the tokens left at each layer with a drop.
        self.prompt: Any = None
        self.steps: dict[int, Packed | Tensor] = {}
        # Which tokens are visual, where the caller says so or `generate` has seen it.
        self.visual_mask: Tensor | None = None
        self._noted: Tensor | None = None
        # The calls of `generate` in this thread.
        self._generating = threading.local()
        # Whether the backbone is running.
        self._running = False
        self._compiled = Compiled(adapter)

    def _register(self, add: Callable) -> None:
        adapter, method = self.adapter, self.method
        if not self._prunes():
            return
        add(Eagerly())
        if adapter.backbone is not adapter.model:
            add(Replaced(adapter.model, "forward", self._around_model))
        add(Replaced(adapter.backbone, "forward", self._around_backbone))
        if hasattr(adapter.model, "generate"):
            add(Replaced(adapter.model, "generate", self._around_generate))
        if hasattr(adapter.model, "get_compiled_call"):
            add(Replaced(adapter.model, "get_compiled_call", self._compiled.around))
        add(Replaced(adapter.decoder, "forward", self._around_decoder))
        add(adapter.decoder.register_forward_pre_hook(self._on_decoder, with_kwargs=True))
        add(adapter.decoder.register_forward_hook(self._on_output))
        self._attach(decoding=False)
        if method.reads_vision or method.reads_grid:
            self.tower.register(add, method.reads_vision, method.vision_depths, self.turn)

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
        """Tokens that entered each layer where the last prompt lost some: {layer: (B, S) bool}.

        What was generated after the prompt is no part of it.
        """
        masks = {i: s.kept() if isinstance(s, Packed) else s.bool() for i, s in self.steps.items()}
        prompt = self.prompt
        asked = {i: mask.to(prompt.real.device) & prompt.real for i, mask in masks.items()}
        return {i: mask[:, : prompt.end] for i, mask in asked.items()}

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

    def _around_generate(self, generate: Callable[[], Any], given: dict) -> Any:
        """The prompt ends where it is told to, not with what is guessed or generated after it."""
        ids = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
        generations = vars(self._generating).setdefault("now", [])
        generations.append(Generation(None if ids is None else ids.shape[1]))
        if self.adapter.generates_apart:
            # It makes the embeddings itself, and has its decoder generate from them.
            self._noted = self._visual(given)
        try:
            return generate()
        finally:
            self._noted = None
            generations.pop()

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
            return self._pass(forward, given)

    def _around_decoder(self, forward: Any, given: dict) -> Any:
        if self._running and self._compiled.on and self.state is None:
            masks = self._compiled.masks_of(forward.keywords, self._memory)
            if masks is not None:
                self._attach_compiled(self._compiled)
                return self._compiled.step(forward.func, masks, forward.keywords)
            self._attach(decoding=True)
        if self._running or not self.installed:
            return forward()
        if self._noted is None:
            raise ValueError(
                "the decoder of a pruned model was called by itself, where no token is known to be "
                f"visual: call the whole {type(self.adapter.model).__name__}"
            )
        with self.turn():
            return self._pass(forward, given)

    def _pass(self, forward: Callable[[], Any], given: dict) -> Any:
        self._running = True
        try:
            self._begin(given)
            return forward()
        finally:
            self._end()

    def _begin(self, inputs: dict) -> None:
        """inputs: what the backbone is called with."""
        cache = inputs.get("past_key_values")
        kv.check(cache, self.exhaustive)
        if cache is None or not cache.get_seq_length():
            self._start(inputs)
            return
        self._memory = getattr(cache, "vispco", None)
        if self._memory:
            self._memory.resume()
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        given: Any = embeds if ids is None else ids
        came = ids is None or self.adapter.pictures(inputs) or self._encoded
        several = given is not None and given.shape[1] > 1 and self._noted is None
        # A guess may be the id of a picture's token.
        if came and several and bool(self.adapter.visual_mask(ids, embeds).any()):
            if self.exhaustive or not goes_on(cache, self.adapter):
                raise ValueError(REFUSAL)
            self._memory, past, before = later_turn(cache, inputs, given)
            self._start(inputs, past, before)
        elif not self._compiled.on:
            self._attach(decoding=True)

    def _start(self, inputs: dict, past: int = 0, before: Any = None) -> None:
        """Begin with a prompt, after `past` tokens of earlier turns. before: see `PassState`."""
        adapter = self.adapter
        visual = self._visual(inputs)
        check_implementation(adapter, self.exhaustive)
        self._attach(decoding=False)
        self.tower.clear()
        labels = inputs.get("labels") if self._labels is None else self._labels
        generations = getattr(self._generating, "now", None)
        columns = visual.shape[1]
        end = generations[-1].end(inputs, columns, past) if generations else None
        causal, later = adapter.causal, before is not None
        self.prompt = prompt = Prompt.read(inputs, visual, labels, causal, end, later)
        if any(prompt.n_visual) and prompt.end > columns:
            raise ValueError(
                "the prompt comes in chunks (prefill_chunk_size), of which the last holds the "
                "question that visual tokens are ranked by: leave prefill_chunk_size out"
            )
        schedule = self.ratios.detach().expand(len(prompt.n_visual), -1).T.tolist()  # (L, B)
        counts = [list(map(whole_tokens, row, prompt.n_visual)) for row in schedule]
        # `generate` has the tower run before the model, and gives its output to the model alone.
        inputs, self._encoded = {**inputs, **self._encoded}, {}
        sources = self.tower.sources(self.method, inputs, prompt.visual)
        self.steps, given = {}, (adapter, self.method, self.exhaustive, prompt, counts)
        more = {"sources": sources, "group": self.group, "before": before}
        more["flash"] = is_flash(implementation(adapter))
        self.state = PassState(*given, left=prompt.n_visual, **more)

    def _visual(self, inputs: dict) -> Tensor:
        """(B, S) bool: which tokens of a prompt are visual."""
        told = self._noted if self.visual_mask is None else self.visual_mask
        if told is None:
            return self.adapter.visual_tokens(inputs)
        given = inputs.get("input_ids")
        given = inputs["inputs_embeds"] if given is None else given
        # Beam search repeats each row.
        copies = max(1, len(given) // max(1, len(told)))
        told = told.bool().repeat_interleave(copies, 0).to(given.device)
        if told.shape != given.shape[:2]:
            raise ValueError(
                f"visual_mask must say of each token of this prompt, {tuple(given.shape[:2])}, "
                f"whether it is visual, got {tuple(told.shape)}: set it on the handle for each "
                "prompt"
            )
        return told

    def _end(self) -> None:
        """The backbone has come to an end, or was broken off."""
        if self._memory:
            self._memory.running = self._memory.inside = False
            if self.state is not None:
                self._memory.pruned = bool(self.steps) or bool(self._memory.packed)
        self._memory, self.state, self._running = None, None, False
        self.tower.clear()

    def _on_decoder(self, module, args, kwargs):
        # Some decoders run their last layers on the tokens alone that get logits. These layers have
        # no keys of their own; a drop there would have to rank tokens that do not enter.
        kept = kwargs.get("logits_to_keep")
        if isinstance(kept, int) and self.state is not None and not self._few_at_the_end():
            kwargs = {**kwargs, "logits_to_keep": 0}
        return args, kwargs

    def _few_at_the_end(self) -> bool:
        """Whether the layers without keys of their own may run on fewer tokens."""
        return False

    def _on_output(self, module, args, output):
        if self._memory:
            self._memory.inside = False
        if self.state is None:
            return
        self.state.check()
        hidden, packed = output["last_hidden_state"], self.state.packed
        if packed is not None and hidden.shape[1] == packed.length:
            # Zeros go through the last norm as they are, unless it has a bias.
            kept = packed.kept()
            output["last_hidden_state"] = hidden * kept[..., None].to(hidden.device)
