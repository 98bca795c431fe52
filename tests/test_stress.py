"""Hooks under stress.

Whatever goes on around a pruned model works as without pruning, or is refused, and leaves no trace.
"""

import contextlib
import copy
import functools
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    cache_utils,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.streamers import BaseStreamer

import compatibility
import vispco
from compatibility import also, refused, section, works
from oracles import Constant, by_hand, decoder_inputs, error, pruned_with
from tiny import IMAGE, batch, our_hooks, tiny_llava, without_labels
from vispco import PruningConfig
from vispco.utils.version import versions

CLOSE = 2e-5
STEPS, EARLY = (
    PruningConfig("strided", [1, 0.8, 0.8, 0.5, 0.3, 0.1]),
    PruningConfig("random", [0.5] * 6),
)
FASTV, TOWER = (
    PruningConfig("fastv", [1, 1, 0.5, 0.5, 0.25, 0.25]),
    PruningConfig("visionzip", [0.5] * 6),
)
IDS = {"suppress_tokens": [IMAGE, 2], "do_sample": False}
ONE = without_labels(batch(images=(1,), text=(9,), before=(2,)))
MANY = without_labels(batch(images=(2, 1, 0, 3), text=(7, 9, 12, 3), before=(1, 2, 5, 0)))


def logits(model, inputs, **kwargs):
    """Logits, without gradient."""
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def pruned(model, config, inputs=MANY, mode="deploy", **kwargs):
    """Logits under a configuration."""
    with vispco.apply(model, config, mode=mode):
        return logits(model, inputs, **kwargs)


def generate(model, inputs=ONE, new=6, **options):
    """Token ids of the prompt and of greedy decoding."""
    return model.generate(**inputs, **{**IDS, "max_new_tokens": new, **options})


def attributes(model):
    """Everything that hangs on any module.

    Names, the objects themselves, and what the dicts of hooks hold.
    """
    return [
        (
            name,
            type(module),
            {k: list(v.items()) if isinstance(v, dict) else v for k, v in vars(module).items()},
        )
        for name, module in model.named_modules()
    ]


@pytest.fixture
def model():
    """A tiny LLaVA that must be left as it was.

    Attributes, hooks, configuration, and outputs to the bit.
    """
    model = shared()
    before = (
        attributes(model),
        model.config.to_dict(),
        model.generation_config.to_dict(),
        logits(model, MANY),
    )
    threads = threading.active_count()
    yield model
    assert attributes(model) == before[0]
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before[1:3]
    assert torch.equal(logits(model, MANY), before[3])
    assert threading.active_count() == threads


@functools.cache
def shared():
    """One model for all tests. It has run once, which leaves hooks of transformers' own."""
    model = tiny_llava()
    logits(model, ONE)
    return model


@contextlib.contextmanager
def broken(model, error, after=0, layer=3):
    """A layer's MLP that raises, once it has run `after` times."""
    mlp, runs = model.get_decoder().layers[layer].mlp, []
    forward = mlp.forward

    def fails(x):
        runs.append(1)
        if len(runs) > after:
            raise error
        return forward(x)

    mlp.forward = fails
    try:
        yield
    finally:
        del mlp.forward


# ---- exceptions ----------------------------------------------------------------------------------
section("Exceptions and interruptions")
also(
    "an exception, or Ctrl-C, in the `with` block",
    "test_contract.py::test_an_exception_in_the_block_leaves_the_model_as_it_was",
)
also(
    "an exception inside a forward pass",
    "test_contract.py::test_an_exception_in_a_forward_leaves_no_trace",
)


class Stops(BaseStreamer, StoppingCriteria):
    """A streamer, a stopping criterion and a logits processor that raise at the third token."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def put(self, value=None):
        """Of a streamer."""
        self.calls += 1
        if self.calls == 3:
            raise self.error

    def end(self):
        """Of a streamer."""

    def __call__(self, input_ids, scores):
        self.put()
        return torch.zeros(len(input_ids), dtype=torch.bool) if scores is None else scores


@works(
    "an exception, or Ctrl-C, inside `generate`: "
    "in a layer, a streamer, a stopping criterion, a logits processor"
)
@pytest.mark.parametrize("where", ["layer", "streamer", "stopping_criteria", "logits_processor"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt, GeneratorExit])
def test_generation_that_breaks_off_leaves_model_and_handle_as_they_were(model, where, error):
    bare, stops = generate(model), Stops(error)
    options = {where: stops if where == "streamer" else [stops]} if where != "layer" else {}
    with vispco.apply(model, TOWER) as handle:
        expected, kept = generate(model), handle.kept()
        breaking = broken(model, error, after=2) if where == "layer" else contextlib.nullcontext()
        with pytest.raises(error), breaking:
            generate(model, **options)
        assert torch.equal(generate(model), expected)
        assert all(torch.equal(mask, kept[i]) for i, mask in handle.kept().items())
    assert torch.equal(generate(model), bare)


@works("generation that a stopping criterion ends early")
def test_generation_that_is_stopped_early(model):
    class Enough(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((len(ids),), ids.shape[1] >= ONE["input_ids"].shape[1] + 2)

    with vispco.apply(model, STEPS):
        assert torch.equal(
            generate(model, stopping_criteria=StoppingCriteriaList([Enough()])),
            generate(model)[:, :-4],
        )


@works("an exception in a method's `score`, in a forward pass or in `generate`")
@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_method_that_breaks_off(model, mode, error):
    class Breaks(Constant):
        def score(self, ctx):
            if ctx.layer == 3 and broken:
                raise error
            return super().score(ctx)

    broken = False
    with pruned_with(model, Breaks(), STEPS.keep_ratios, mode) as handle:
        expected, broken = logits(model, MANY), True
        for run in (logits, generate):
            with pytest.raises(error):
                run(model, MANY)
        # Nothing is held on to.
        assert handle.state is None
        broken = False
        assert torch.equal(logits(model, MANY), expected)


@refused(
    "running a pruned model within its own forward pass (in a method's `score`, or a hook)",
    "a pruned model cannot run within its own "
    "forward pass: not in a method's `score`, nor in a hook",
)
def test_a_model_within_itself(model, refusal):
    class Asks(Constant):
        def score(self, ctx):
            with refusal():
                logits(model, ONE)
            return super().score(ctx)

    with pruned_with(model, Constant(), STEPS.keep_ratios):
        expected = logits(model, MANY)
    with pruned_with(model, Asks(), STEPS.keep_ratios):
        assert torch.equal(logits(model, MANY), expected)


@works("a generator that holds the `with` block and is closed early, or forgotten")
@pytest.mark.parametrize("how", ["close", "del"])
def test_a_generator_closed_early(model, how):
    def answers():
        with vispco.apply(model, STEPS):
            while True:
                yield generate(model)

    running = answers()
    next(running)
    running.close() if how == "close" else None
    del running
    gc.collect()
    vispco.apply(model, STEPS).remove()


@works("labels of a call that failed: the next call without labels does not see them")
def test_labels_of_a_failed_call_are_forgotten(model):
    inputs = batch(images=(1,), text=(9,), before=(2,), answer=5)
    with vispco.apply(model, FASTV) as handle:
        logits(model, inputs)
        labelled = handle.kept()
        logits(model, ONE)
        kept = handle.kept()
        assert any(not torch.equal(mask, labelled[i]) for i, mask in kept.items())
        hook = model.model.register_forward_pre_hook(lambda module, args: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        hook.remove()
        logits(model, ONE)
        assert all(torch.equal(mask, kept[i]) for i, mask in handle.kept().items())


@refused(
    "ready-made `inputs_embeds` for a method that reads the vision tower, "
    "also after a call that failed",
    "the method reads the vision tower, which did not run for this prompt's image tokens",
)
def test_what_the_tower_said_in_a_failed_call_is_forgotten(model, refusal):
    """Patches of the picture before would fit."""
    embeds = {"inputs_embeds": model.get_input_embeddings()(ONE["input_ids"]).detach()}
    with vispco.apply(model, TOWER):
        with broken(model, ArithmeticError), pytest.raises(ArithmeticError):
            logits(model, ONE)
        with refusal():
            logits(model, embeds)
        model.get_image_features(ONE["pixel_values"])
        with refusal():
            logits(model, embeds)


# ---- nesting -------------------------------------------------------------------------------------
section("Several times, one in another")


@refused(
    "two configurations on one model at once",
    "this LlavaForConditionalGeneration is pruned already: leave that `with` block "
    "or call .remove() on its handle first",
)
def test_a_second_apply_is_refused(model, refusal):
    expected = pruned(model, STEPS)
    with vispco.apply(model, STEPS):
        with refusal():
            vispco.apply(model, EARLY)
        with refusal():
            vispco.search(model, [batch()], budgets=[0.5], start=vispco.Gradient(steps=1))
        assert torch.equal(logits(model, MANY), expected)


also(
    "two models at once, one `with` block in the other", "test_pruning.py::test_two_models_at_once"
)


@works("one configuration after the other, in any order")
def test_one_after_the_other(model):
    configs = [STEPS, FASTV, TOWER, EARLY, PruningConfig("fastv", [1.0] * 6)]
    expected = [pruned(copy.deepcopy(model), config) for config in configs]
    for i in (0, 1, 2, 3, 4, 2, 0, 4, 3, 1, 1):
        assert torch.equal(pruned(model, configs[i]), expected[i])


@works("a `with` block on a handle that was removed: it prunes again")
def test_a_handle_is_entered_again(model):
    handle = vispco.apply(model, STEPS)
    with handle:
        expected = logits(model, MANY)
    for _ in range(2):
        with handle:
            assert torch.equal(logits(model, MANY), expected)


@refused(
    "a `with` block on a handle whose `with` block is open",
    "the `with` block of this handle is open already: one at a time",
)
def test_an_open_handle_is_not_entered(model, refusal):
    expected = pruned(model, STEPS)
    with vispco.apply(model, STEPS) as handle:
        with refusal(), handle:
            pass
        assert torch.equal(logits(model, MANY), expected)


also("`.remove()` twice", "test_pruning.py::test_remove_twice_is_harmless")
also(
    "another schedule on the same handle (`handle.ratios`)",
    "test_pruning.py::test_deploy_ratios_may_be_replaced_too",
)


@works("another schedule on a handle that kept all")
def test_ratios_of_a_handle_that_kept_all(model):
    with vispco.apply(model, PruningConfig("strided", [1.0] * 6)) as handle:
        assert torch.equal(logits(model, MANY), logits(shared(), MANY)) and not handle.hooks
        handle.ratios = torch.tensor(STEPS.keep_ratios)
        got = logits(model, MANY)
    assert torch.equal(got, pruned(model, STEPS))
    # Removed: nothing comes back.
    handle.ratios = torch.tensor(EARLY.keep_ratios)


@works(
    "a pruned model that is let go without `.remove()`: "
    "it is collected, and compiled code is on again"
)
def test_a_model_dropped_while_it_is_pruned():
    model = tiny_llava(layers=2)
    vispco.apply(model, PruningConfig("random", [0.5, 0.5]))
    ghost = weakref.ref(model)
    del model
    gc.collect()
    assert ghost() is None and not vispco.pruning._hooks.Eagerly._count


# ---- threads -------------------------------------------------------------------------------------
section("Threads and processes")


def in_threads(*jobs):
    """Results of functions that start at once, or what they raised."""
    results, start = [None] * len(jobs), threading.Barrier(len(jobs))

    def run(k):
        start.wait()
        try:
            results[k] = jobs[k]()
        except Exception as error:
            results[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@works("two models in two threads")
def test_two_models_in_two_threads(model):
    other = copy.deepcopy(model)
    expected = [[pruned(model, config) for config in (FASTV, TOWER)], generate(model)]

    def job(mine):
        return [
            ([pruned(mine, config) for config in (FASTV, TOWER)], generate(mine)) for _ in range(4)
        ]

    for rounds in in_threads(lambda: job(model), lambda: job(other)):
        for found, answer in rounds:
            assert all(
                torch.equal(*pair) for pair in zip(found, expected[0], strict=True)
            ) and torch.equal(answer, expected[1])
    assert not vispco.pruning._hooks.Eagerly._count


@refused(
    "one pruned model in two threads at once",
    "this pruned model is running already, in another thread: let threads take turns, "
    "or give each a model of its own",
)
def test_one_model_in_two_threads(model, refusal):
    """The first thread waits inside a layer until the second was refused.

    It is right all the same.
    """
    inside, go_on = threading.Event(), threading.Event()
    mlp = model.get_decoder().layers[3].mlp

    def wait(module, args):
        inside.set()
        go_on.wait(60)

    expected = pruned(model, FASTV)
    with vispco.apply(model, FASTV):
        hook = mlp.register_forward_pre_hook(wait)

        def second():
            inside.wait(60)
            try:
                with refusal():
                    logits(model, ONE)
            finally:
                go_on.set()
            return True

        first, second = in_threads(lambda: logits(model, MANY), second)
        hook.remove()
        assert second is True and torch.equal(first, expected)
        assert torch.equal(logits(model, MANY), expected)


@works("one pruned model in threads that take turns")
def test_threads_that_take_turns(model):
    turn, expected = threading.Lock(), [pruned(model, STEPS, inputs) for inputs in (ONE, MANY)]

    def job(inputs):
        found = []
        for _ in range(5):
            with turn:
                found.append(logits(model, inputs))
        return found

    with vispco.apply(model, STEPS):
        results = in_threads(lambda: job(ONE), lambda: job(MANY))
    assert all(
        torch.equal(x, want) for row, want in zip(results, expected, strict=True) for x in row
    )


@works("`apply` on one model from two threads at once: one prunes, the other is refused")
def test_one_of_two_threads_gets_the_model(model):
    for _ in range(20):
        results = in_threads(*[lambda: vispco.apply(model, EARLY)] * 2)
        refusals = [r for r in results if isinstance(r, ValueError)]
        assert len(refusals) == 1 and "is pruned already" in str(refusals[0])
        next(r for r in results if r not in refusals).remove()


class Words:
    """A tokeniser, as far as a streamer needs one: ids as words."""

    def decode(self, ids, **kwargs):
        """Ids, each followed by a space."""
        return "".join(f"{int(i)} " for i in ids)


@works("`generate` in a thread with a `TextIteratorStreamer`")
def test_text_that_is_streamed_from_a_thread(model):
    with vispco.apply(model, STEPS):
        expected = generate(model)[0, ONE["input_ids"].shape[1] :].tolist()
        streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
        thread = threading.Thread(target=generate, args=(model,), kwargs={"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join(60)
    assert [int(word) for word in text.split()] == expected


@refused(
    "a thread that goes on generating after the `with` block has ended",
    "this KV cache was filled while the model was pruned, and now it is not: "
    "go on inside the `with` block of vispco.apply",
)
def test_a_thread_that_outlives_the_block(model, refusal):
    third, go_on, raised = threading.Event(), threading.Event(), []

    class Slow(Stops):
        def put(self, value=None):
            self.calls += 1
            if self.calls == 3:
                third.set()
                go_on.wait(60)

    def job():
        with refusal():
            generate(model, streamer=Slow(None))
        raised.append(True)

    thread = threading.Thread(target=job)
    with vispco.apply(model, STEPS):
        thread.start()
        third.wait(60)
    go_on.set()
    thread.join(60)
    assert raised


@refused(
    "DataParallel",
    "a DataParallel model runs copies of itself in threads, and cannot be pruned: "
    "prune its .module on one device, or run one process per device",
)
def test_data_parallel_is_refused(model, refusal):
    with refusal():
        vispco.apply(nn.DataParallel(model), STEPS)
    vispco.apply(nn.DataParallel(model).module, STEPS).remove()


@contextlib.contextmanager
def one_process(folder):
    """The default group of processes, of this one alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@works("DistributedDataParallel, the wrapper or its `.module`")
def test_distributed_data_parallel(tmp_path):
    model = tiny_llava()
    with one_process(tmp_path):
        wrapped = nn.parallel.DistributedDataParallel(model)
        with vispco.apply(wrapped, STEPS):
            found = logits(wrapped, MANY)
        assert torch.equal(found, pruned(model, STEPS)) and not torch.equal(
            found, logits(wrapped, MANY)
        )


also(
    "tensor parallelism, in deploy, every method: the tokens and logits of one process",
    "test_sharding.py::test_every_method_keeps_what_one_process_keeps",
)
also(
    'tensor parallelism as `from_pretrained(tp_plan="auto")` splits, where accelerate is installed',
    "test_sharding.py::test_the_plan_of_transformers",
)
also(
    "tensor parallelism, in a search",
    "test_sharding.py::test_a_search_under_tensor_parallelism_is_refused",
    "refused: “a search has the gradient of its own heads alone”",
)
also(
    "heads that do not divide by the number of processes",
    "test_sharding.py::test_heads_that_do_not_divide",
    "refused: “they must be split evenly, or not at all”",
)
also(
    "FSDP2 (`fully_shard`), every method",
    "test_sharding.py::test_every_method_keeps_what_one_process_keeps",
)
also("FSDP2, a search by gradient and refinement", "test_sharding.py::test_a_search_under_fsdp2")
also(
    "generation under tensor parallelism, and under FSDP2 (what runs before the decoder left "
    "whole)",
    "test_sharding.py::test_sharded_generation",
)


@refused(
    "pipeline, expert and sequence parallelism",
    "parallelism, which pruning does not know; load it whole in each process, or shard it with "
    "FSDP2 (fully_shard)",
)
@pytest.mark.parametrize(
    "what", [{"pp_size": 2}, {"ep_size": 2}, {"enable_sequence_parallel": True}]
)
def test_other_parallelism_is_refused(refusal, what):
    """As transformers notes it in the configuration, or on the model."""
    model = tiny_llava()
    model.config.distributed_config = SimpleNamespace(**what)
    with refusal():
        vispco.apply(model, STEPS)
    del model.config.distributed_config
    # Of a release that does not say which weights are split.
    model._tp_size = 2
    with refusal():
        vispco.apply(model, STEPS)


@refused("FSDP1, DeepSpeed", "model cannot be pruned: load it whole in each process, or shard it")
def test_fsdp1_and_deepspeed_are_refused(refusal, tmp_path, monkeypatch):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with one_process(tmp_path):
        wrapped = FullyShardedDataParallel(tiny_llava(), device_id=torch.device("cpu"))
        with refusal():
            vispco.apply(wrapped, STEPS)
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})
    with refusal():
        vispco.apply(engine(), STEPS)
    model = tiny_llava()
    # As ZeRO-3 marks what it has split.
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed holds the weights"):
        vispco.apply(model, STEPS)


@works("a process that ends while a model is pruned: quietly")
def test_a_process_that_ends_while_a_model_is_pruned():
    code = (
        "from tiny import *; import vispco; model = tiny_llava(layers=2);"
        "handle = vispco.apply(model, vispco.PruningConfig('random', [.5, .5]));"
        "model(**without_labels(batch()))"
    )
    path = [str(Path(__file__).parent), str(Path(vispco.__file__).parent.parent)]
    code = f"import sys; sys.path[:0] = {path!r}; {code}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "Error" not in done.stderr and "Exception" not in done.stderr


# ---- generation ----------------------------------------------------------------------------------
section("Generation")
also(
    "greedy, with the default KV cache",
    "test_generation.py::test_cached_generation_equals_recomputation",
)
also(
    "sampling, beam search, beam sampling, `num_return_sequences`",
    "test_generation.py::test_strategies_equal_those_without_a_cache",
)
also(
    "beams keep what greedy decoding keeps", "test_generation.py::test_beams_keep_what_greedy_keeps"
)
also(
    "prompt-lookup decoding, by any method", "test_generation.py::test_prompt_lookup_equals_greedy"
)
also(
    "prompt-lookup and assisted decoding whose guesses hold a picture's token",
    "test_generation.py::test_a_guess_may_be_a_picture",
)
also(
    "without a cache (`use_cache=False`, or a checkpoint that was saved so): as with one",
    "test_generation.py::test_without_a_cache_the_prompt_ends_where_it_did",
)
also(
    "assisted decoding with a draft model of text",
    "test_generation.py::test_assisted_generation_equals_greedy",
)


@works("assisted decoding with a vision-language draft model, pruned as well or not")
@pytest.mark.parametrize("both", [False, True])
def test_a_draft_model_that_sees(model, both):
    draft = tiny_llava(layers=2)
    with vispco.apply(model, STEPS):
        expected = generate(model, new=8)
        with (
            vispco.apply(draft, PruningConfig("strided", [1, 0.5]))
            if both
            else contextlib.nullcontext()
        ):
            assert torch.equal(generate(model, new=8, assistant_model=draft), expected)


also(
    "decoding by hand, one token at a time or several",
    "test_generation.py::test_manual_decoding_equals_one_pass",
)
also(
    "one generation after the other, of any shape",
    "test_generation.py::test_several_generations_in_a_row",
)
also("text-only prompts", "test_generation.py::test_text_only_prompts_generate_as_unhooked")
also("a prompt that ends in an image", "test_generation.py::test_a_prompt_that_ends_in_an_image")


@refused(
    "a prompt that ends in an image, under a keep ratio of 0",
    "a prompt ends in a visual token, from which its answer would be "
    "read, and the configuration drops them all",
)
def test_nothing_is_read_off_a_dropped_token(model, refusal):
    with vispco.apply(model, PruningConfig("strided", [1, 1, 0, 0, 0, 0])), refusal():
        logits(model, without_labels(batch(images=(1,), text=(9,), before=(9,))))


@refused(
    "generating in search mode",
    "search mode only masks tokens, and the KV cache still holds them: to generate, apply the "
    "configuration with mode='deploy'",
)
def test_search_mode_does_not_generate(model, refusal):
    with vispco.apply(model, STEPS, mode="search"), torch.no_grad():
        with refusal():
            generate(model)
        cache = model(**ONE).past_key_values
    # Deploy mode does not go on from there either.
    with vispco.apply(model, STEPS), refusal():
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)


@refused(
    "chunked prefill (`prefill_chunk_size`) of a prompt with pictures",
    "the prompt comes in chunks (prefill_chunk_size), of which the last holds the "
    "question that visual tokens are ranked by: leave prefill_chunk_size out",
)
def test_chunked_prefill_is_refused(model, refusal):
    with vispco.apply(model, STEPS), refusal():
        generate(model, prefill_chunk_size=8, past_key_values=DynamicCache())


# ---- caches --------------------------------------------------------------------------------------
section("KV caches")
also("an empty `DynamicCache` of one's own", "test_generation.py::test_a_cache_of_ones_own_is_used")


@works("a `DynamicCache` made without the configuration, or by name (`cache_implementation`)")
@pytest.mark.parametrize("config", [STEPS, EARLY])
def test_other_ways_to_the_same_cache(model, config):
    with vispco.apply(model, config):
        expected = generate(model)
        assert torch.equal(generate(model, past_key_values=DynamicCache()), expected)
        assert torch.equal(generate(model, cache_implementation="dynamic"), expected)
        assert torch.equal(generate(model, use_cache=False), expected)


also(
    "sliding windows, in all layers or in some (Gemma 3, Mistral, Gemma 2)",
    "test_families.py::test_sliding_windows_count_original_positions",
)
also(
    "layers with a recurrent state in place of keys (Qwen3.5, LFM2-VL), and layers that read the "
    "keys of earlier ones (Gemma 4, Gemma 3n)",
    "test_any_model.py::test_generation_with_the_cache_equals_recomputation",
)


@works("the offloaded cache", "not run yet: needs a GPU")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the offloaded cache needs a GPU")
def test_the_offloaded_cache():
    model, inputs = tiny_llava().cuda(), {k: v.cuda() for k, v in ONE.items()}
    for config in (STEPS, EARLY):
        with vispco.apply(model, config):
            assert torch.equal(
                generate(model, inputs, cache_implementation="offloaded"), generate(model, inputs)
            )


also(
    'a static cache (`cache_implementation="static"`, or one\'s own): of what is dropped it keeps '
    "no place",
    "test_static_cache.py::test_a_static_cache_holds_what_entered_each_layer",
)
also(
    "compiled decoding in a static cache, as `generate` does on a GPU: one graph, for prompts of "
    "any length",
    "test_static_cache.py::test_compiled_decoding_is_one_graph_and_equals_eager",
)
also(
    "flex attention in a static cache",
    "test_static_cache.py::test_flex_attention_in_a_static_cache_is_refused",
    "refused: “flex attention with a static KV cache cannot be pruned: use the default cache”",
)


@refused(
    "static caches with sliding windows or recurrent layers, or offloaded",
    "cannot hold a pruned prompt: use the default cache (leave cache_implementation out)",
)
@pytest.mark.parametrize("name", ["sliding", "offloaded"])
def test_other_static_caches_are_refused(model, refusal, name):
    cache = StaticCache(model.config.text_config, max_cache_len=40)
    if name == "sliding":
        cache.layers[3] = cache_utils.StaticSlidingWindowLayer(40, 8)
    else:
        cache.offloading = True
    with vispco.apply(model, STEPS), refusal():
        logits(model, ONE, past_key_values=cache)


class Lossless(cache_utils.QuantizedLayer):
    """A quantised layer that forgets nothing: those of transformers need other packages."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, q_tensor):
        return q_tensor


class Bytes(Lossless):
    """One byte for each number, and a scale for each token and head."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor):
        return q_tensor[0] * q_tensor[1]


@works("quantised caches: with layers that lose nothing, to the bit; with 8 bits, within a step")
@pytest.mark.parametrize("config", [STEPS, EARLY, FASTV])
def test_quantised_caches(model, config):
    """Few new tokens are held in full, the others quantised: both come up here."""
    options = {"return_dict_in_generate": True, "output_logits": True}

    def cache(kind):
        return Cache(layers=[kind(residual_length=4) for _ in range(6)])

    with vispco.apply(model, config):
        for inputs in (ONE, MANY):
            plain = generate(model, inputs, **options)
            same = generate(model, inputs, past_key_values=cache(Lossless), **options)
            beams = [
                generate(model, inputs, num_beams=2, past_key_values=each)
                for each in (None, cache(Lossless))
            ]
            less = generate(model, inputs, past_key_values=cache(Bytes), **options)
            assert torch.equal(torch.stack(same.logits), torch.stack(plain.logits))
            assert torch.equal(same.sequences, plain.sequences) and torch.equal(*beams)
            for one, exact in zip(
                less.past_key_values.layers, plain.past_key_values.layers, strict=True
            ):
                assert one.get_seq_length() == plain.sequences.shape[1] - 1
                seen = torch.cat([one._dequantize(one._quantized_keys), one.keys], -2)
                assert seen.shape == exact.keys.shape
        # Of the prompt alone, so that nothing but the rounding differs.
        exact = model(**ONE).past_key_values
        found = model(**ONE, past_key_values=cache(Bytes)).past_key_values
        for one, other in zip(found.layers, exact.layers, strict=True):
            step = other.keys.abs().amax(-1, keepdim=True) / 127
            close = (one._dequantize(one._quantized_keys) - other.keys).abs() <= step
            assert bool(close.all())


class Unknown(DynamicLayer):
    """A quantised layer that does not say how many tokens it holds."""


Unknown.__name__ = "UnknownQuantizedLayer"


@refused(
    "quantised layers that do not say how many tokens they hold",
    "a KV cache with layers of UnknownQuantizedLayer cannot hold a pruned prompt: use the "
    "default cache (leave cache_implementation out)",
)
def test_unknown_quantised_caches_are_refused(model, refusal):
    with vispco.apply(model, STEPS), refusal():
        logits(model, ONE, past_key_values=Cache(layers=[Unknown() for _ in range(6)]))


also(
    "two conversations in turns, each with its cache",
    "test_generation.py::test_two_caches_side_by_side",
)
also(
    "a second turn of text on the same cache",
    "test_generation.py::test_a_conversation_goes_on_with_text",
)


also(
    "later turns with new images on the same cache, each ranked by its own last token: as the "
    "whole conversation without a cache",
    "test_turns.py::test_later_turns_equal_the_whole_conversation_without_a_cache",
)
also("every method in a later turn", "test_turns.py::test_every_method_in_a_later_turn")
also(
    "a turn of text in between, and a cache that somebody else filled before (a prefix)",
    "test_turns.py::test_a_turn_of_text_and_a_prefix_that_somebody_else_filled",
)
also(
    "new images on a static, quantised or sliding cache that is filled",
    "test_turns.py::test_caches_of_other_kinds_are_refused",
    "refused: “can be pruned only in deploy, and on a KV cache of ordinary layers: start again "
    "from the whole prompt”",
)


@works(
    "several questions to one image, each on a copy of the image's cache: pruned by what came first"
)
def test_several_questions_on_copies_of_a_cache(model):
    """`random` looks at places only, so one pass over prefix and question is exact."""
    more = torch.randint(6, 60, (3, 4), generator=torch.Generator().manual_seed(1))
    with vispco.apply(model, EARLY), torch.no_grad():
        cache = model(**ONE).past_key_values
        for question in more[:, None]:
            got = model(input_ids=question, past_key_values=copy.deepcopy(cache)).logits
            ids = torch.cat([ONE["input_ids"], question], 1)
            whole = logits(model, {**ONE, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
            assert error(got, whole[:, -4:]) <= CLOSE


@refused(
    "a cache filled inside the `with` block and used outside",
    "this KV cache was filled while the model was pruned, and now it is "
    "not: go on inside the `with` block of vispco.apply",
)
@pytest.mark.parametrize("config", [STEPS, EARLY, FASTV])
@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_a_pruned_cache_is_of_no_use_outside(model, refusal, config, mode):
    """It would be silently wrong where a batch needs fillers, so it is refused everywhere.

    Nothing is appended to the cache.
    """
    with vispco.apply(model, config, mode=mode), torch.no_grad():
        cache = model(**ONE).past_key_values
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    step = {"input_ids": torch.tensor([[9]]), "past_key_values": cache}
    for used in (step, {**step, "past_key_values": copy.deepcopy(cache)}):
        with refusal():
            logits(model, used)
    # A configuration that changes nothing.
    with vispco.apply(model, PruningConfig("strided", [1.0] * 6)), refusal():
        logits(model, step)
    assert [layer.keys.shape[-2] for layer in cache.layers] == lengths


@works("a cache filled in one `with` block and used in another")
def test_a_cache_in_another_block(model):
    mask, step = nn.functional.pad(MANY["attention_mask"], (0, 1), value=1), torch.full((4, 1), 9)
    with vispco.apply(model, STEPS), torch.no_grad():
        caches = [model(**MANY).past_key_values for _ in range(2)]
        expected = model(input_ids=step, attention_mask=mask, past_key_values=caches[0]).logits
    with vispco.apply(model, FASTV):
        assert torch.equal(
            logits(
                model, {"input_ids": step, "attention_mask": mask, "past_key_values": caches[1]}
            ),
            expected,
        )


@works("a cache filled before the `with` block and used inside: nothing is pruned")
def test_a_cache_from_before(model):
    step = {"input_ids": torch.tensor([[9]])}
    with torch.no_grad():
        caches = [model(**ONE).past_key_values for _ in range(3)]
    expected = logits(model, {**step, "past_key_values": caches[0]})
    for cache, mode in zip(caches[1:], ("deploy", "search"), strict=True):
        assert torch.equal(pruned(model, STEPS, {**step, "past_key_values": cache}, mode), expected)


@works("a cache that is reset and used for another prompt")
@pytest.mark.parametrize(
    "second",
    [MANY, without_labels(batch(images=(0,), text=(7,), before=(2,)))],
    ids=["images", "text"],
)
def test_a_cache_that_is_used_again(model, second):
    """Of the prompt before, nothing is left."""
    mask = nn.functional.pad(second["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.full((len(mask), 1), 9), "attention_mask": mask}
    with vispco.apply(model, EARLY), torch.no_grad():
        fresh, used = DynamicCache(), DynamicCache()
        model(**ONE, past_key_values=used)
        used.reset()
        for layer in used.layers:
            # Older releases keep zeros.
            layer.keys = layer.values = None
            layer.is_initialized = False
        found = []
        for cache in (fresh, used):
            model(**second, past_key_values=cache)
            found.append(model(**step, past_key_values=cache).logits)
    assert torch.equal(*found)


@works(
    "`cache.crop(-n)`, and where transformers has it (in older releases) "
    "`cache.crop(length)`, of the original length"
)
@pytest.mark.parametrize("config", [STEPS, EARLY])
def test_a_cache_is_cropped(model, config):
    step, guess = {"input_ids": torch.tensor([[9]])}, torch.tensor([[7, 8]])
    with vispco.apply(model, config), torch.no_grad():
        cache = model(**ONE).past_key_values
        expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
        model(input_ids=guess, past_key_values=cache)
        size = ONE["input_ids"].shape[1]
        assert cache.get_seq_length() == size + 2
        absolute = copy.deepcopy(cache)
        cache.crop(-2)
        assert torch.equal(model(**step, past_key_values=cache).logits, expected)
        lengths = [layer.keys.shape[-2] for layer in absolute.layers]
        try:
            absolute.crop(size)
        except ValueError:
            assert [layer.keys.shape[-2] for layer in absolute.layers] == lengths
        else:
            assert torch.equal(model(**step, past_key_values=absolute).logits, expected)


# ---- training ------------------------------------------------------------------------------------
section("Training, precision, gradients")


def weight_gradients(model, config, mode="deploy"):
    """Of the loss of a batch whose answers come after the images."""
    with vispco.apply(model, config, mode=mode):
        loss = model(**batch(images=(1, 2), text=(9, 7), before=(2, 1))).loss
        return [
            g
            for g in torch.autograd.grad(
                loss, list(model.get_decoder().parameters()), allow_unused=True
            )
            if g is not None
        ]


@works("training a pruned model: gradients of the weights are those with the dropped tokens masked")
def test_gradients_of_the_weights(model):
    a, b = (weight_gradients(model, STEPS, mode) for mode in ("deploy", "search"))
    assert all(error(x, y) < 1e-3 for x, y in zip(a, b, strict=True)) and any(
        x.abs().max() > 1e-3 for x in a
    )


also(
    "gradient checkpointing, in search "
    "(`vispco.search(..., checkpoint=True)` has its own, with any)",
    "test_pruning.py::test_gradient_checkpointing_changes_nothing",
    "works; refused before transformers 5.23",
)


@works(
    "gradient checkpointing, in training a pruned model", "works; refused before transformers 5.23"
)
def test_gradient_checkpointing_of_a_pruned_model(model):
    training = copy.deepcopy(model).train()
    expected = weight_gradients(training, FASTV)
    training.gradient_checkpointing_enable()
    if tuple(map(int, versions()["transformers"].split(".")[:2])) < (5, 23):
        with pytest.raises(
            ValueError, match="gradient checkpointing does so before transformers 5.23: update it"
        ):
            weight_gradients(training, FASTV)
    else:
        assert all(
            error(x, y) <= 1e-4
            for x, y in zip(weight_gradients(training, FASTV), expected, strict=True)
        )


@works("`model.train()` and `.eval()` inside")
def test_train_inside(model):
    with vispco.apply(model, FASTV):
        expected = logits(model, MANY)
        # No dropout in this configuration.
        assert torch.equal(logits(model.train(), MANY), expected)
        model.eval()


@works("dropout in attention, in search too")
def test_dropout_in_search():
    """Dropped probabilities average to those that are there."""
    model = tiny_llava(layers=2, attention_dropout=0.3).train()
    config = PruningConfig("strided", [0.5, 0.5])
    layer, expected = model.get_decoder().layers[0].self_attn, []
    hook = layer.register_forward_hook(
        lambda module, args, output: expected.append(output[0].detach())
    )
    with vispco.apply(model, config, mode="search"):
        for _ in range(200):
            logits(model, ONE)
        model.eval()
        logits(model, ONE)
    hook.remove()
    *noisy, plain = expected
    noisy = torch.stack(noisy)
    assert noisy.std(0).max() > 0.1 * plain.abs().max() and error(noisy.mean(0), plain) < 0.1


@works("autocast to bfloat16")
@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_autocast(model, mode):
    """As dropped by hand, under autocast too; the tokens kept are those it chose."""
    with torch.autocast("cpu", torch.bfloat16):
        with vispco.apply(model, FASTV, mode=mode) as handle:
            got, kept = logits(model, ONE), {i: mask[0] for i, mask in handle.kept().items()}
        expected = by_hand(model, ONE, kept).logits
    there = torch.stack(list(kept.values())).all(0)
    assert (
        error(got[0, there].float(), expected[0].float())
        < 0.05
        < error(logits(model, ONE)[0, there], expected[0].float())
    )


@works(
    "`torch.inference_mode`, `no_grad` in it or around it, a handle made inside and used outside"
)
def test_inference_mode(model):
    expected, bare = pruned(model, FASTV), generate(model)
    with torch.inference_mode():
        handle = vispco.apply(model, FASTV)
        with torch.no_grad():
            assert torch.equal(model(**MANY).logits, expected)
        answer = generate(model)
    with torch.no_grad():
        assert torch.equal(model(**MANY).logits, expected)
    assert torch.equal(generate(model), answer) and len(weight_gradients_of(model)) > 0
    handle.remove()
    assert torch.equal(generate(model), bare)


def weight_gradients_of(model):
    """Of any loss."""
    return torch.autograd.grad(model(**ONE).logits.sum(), model.lm_head.weight)


@works("moving or casting the model inside (`.to`, `.double()`, `.bfloat16()`)")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_inside(dtype):
    model, cast = tiny_llava(), tiny_llava().to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in MANY.items()}
    with vispco.apply(model, FASTV):
        logits(model, MANY)
        model.to(dtype)
        assert torch.equal(logits(model, inputs), pruned(cast, FASTV, inputs))


class Int8(nn.Module):
    """A linear layer whose weights are kept as eight-bit whole numbers."""

    def __init__(self, linear):
        super().__init__()
        self.scale = nn.Buffer(linear.weight.detach().abs().amax(1) / 127)
        self.weight = nn.Buffer(
            (linear.weight.detach() / self.scale[:, None]).round().to(torch.int8)
        )

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale[:, None]).T


@works("quantised weights: linear layers replaced by modules with int8 weights")
def test_quantised_weights():
    model = tiny_llava()
    for module in list(model.get_decoder().modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8(child))
    with vispco.apply(model, FASTV) as handle:
        got, kept = logits(model, ONE), {i: mask[0] for i, mask in handle.kept().items()}
    expected = by_hand(model, ONE, kept).logits
    assert error(got[0, torch.stack(list(kept.values())).all(0)], expected[0]) <= CLOSE


# ---- wrappers ------------------------------------------------------------------------------------
section("Compilers, wrappers, copies")
also(
    "`torch.compile`, of the model or in place, before or after: outside the `with` block",
    "test_compile.py::test_a_compiled_model_is_pruned_within_apply_and_compiled_again_outside",
)
also(
    "compiled code inside the `with` block: it runs as plain PyTorch",
    "test_compile.py::test_compiled_code_stays_off_until_the_last_model_is_let_go",
)


@works("`model.compile()` inside the `with` block")
def test_compiling_inside():
    model, runs = tiny_llava(layers=2), []
    config = PruningConfig("strided", [1, 0.5])
    expected = pruned(model, config)
    try:
        with vispco.apply(model, config):
            model.compile(backend=lambda graph, example: runs.append(1) or graph.forward)
            assert torch.equal(logits(model, MANY), expected) and torch.equal(
                torch.compile(model)(**MANY).logits, expected
            )
        assert not runs
    finally:
        torch._dynamo.reset()


@refused(
    "copying or pickling a pruned model, or one of its layers",
    "a model cannot be copied or pickled while it is pruned: leave the `with` "
    "block, or call .remove() on the handle, first "
    "(save_pretrained works, for the weights are as always)",
)
@pytest.mark.parametrize("config", [STEPS, TOWER])
@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_copies_of_a_pruned_model_are_refused(refusal, config, mode):
    # Once they have run, older hooks of transformers itself cannot be pickled.
    model = tiny_llava()
    with vispco.apply(model, config, mode=mode):
        for copied in (copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
            for part in (model, model.get_decoder().layers[2]):
                with refusal():
                    copied(part)
        assert torch.equal(logits(model, MANY), logits(model, MANY))
    assert torch.equal(logits(copy.deepcopy(model), MANY), logits(model, MANY))


@works("`save_pretrained` and `state_dict` of a pruned model: those of the model itself")
@pytest.mark.parametrize("config", [STEPS, TOWER])
def test_saving_a_pruned_model(config, tmp_path):
    model = tiny_llava()
    with vispco.apply(model, config):
        model.save_pretrained(tmp_path)
        assert model.state_dict().keys() == shared().state_dict().keys()
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, MANY), logits(model, MANY))
    assert "vispco" not in (tmp_path / "config.json").read_text()


def lora(model):
    """The model with LoRA on its projections, with weights that do something."""
    peft = pytest.importorskip("peft", reason="needs peft")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return wrapped.eval()


@works("models with LoRA (PEFT), the wrapper or the model inside: as with the weights merged")
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_lora(when, inner):
    merged = lora(tiny_llava()).merge_and_unload()
    inputs = batch(images=(1, 2), text=(9, 7), before=(2, 1), answer=4)
    expected = pruned(merged, FASTV, inputs)
    assert error(pruned(tiny_llava(), FASTV, inputs), expected) > 0.1
    model = tiny_llava()
    wrapped = lora(model) if when == "before" else None
    with vispco.apply(model if inner or wrapped is None else wrapped, FASTV):
        if wrapped is None:
            logits(model, inputs)
        wrapped = wrapped or lora(model)
        assert error(logits(wrapped, inputs), expected) <= 1e-4
        assert torch.equal(generate(wrapped), generate(model))
    assert error(logits(wrapped, inputs), logits(merged, inputs)) <= 1e-4


@works("prompt tuning (PEFT), whose virtual tokens are kept")
def test_prompt_tuning():
    peft = pytest.importorskip("peft", reason="needs peft")
    wrapped = peft.get_peft_model(
        tiny_llava(),
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=3,
            token_dim=32,
            num_transformer_submodules=1,
            num_attention_heads=4,
            num_layers=6,
        ),
    ).eval()
    found = []
    for mode in ("deploy", "search"):
        with vispco.apply(wrapped, STEPS, mode=mode) as handle:
            found.append(logits(wrapped, ONE)[:, -6:])
        assert [int(mask.sum()) for mask in handle.kept().values()] == [
            3 + 10 + n for n in (12, 8, 4, 1)
        ]
    assert error(*found) <= CLOSE < error(logits(wrapped, ONE)[:, -6:], found[0])


@works("prefix tuning (PEFT): its virtual tokens are in the KV cache before the image, and stay")
def test_prefix_tuning():
    """As an unhooked model that may not look at what was dropped, all of it before layer 0."""
    peft = pytest.importorskip("peft", reason="needs peft")
    model = tiny_llava(kv_heads=4)
    wrapped = peft.get_peft_model(
        model,
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=3,
            token_dim=32,
            num_transformer_submodules=1,
            num_attention_heads=4,
            num_layers=6,
        ),
    ).eval()
    bare, size = logits(wrapped, ONE), ONE["input_ids"].shape[1]
    with vispco.apply(wrapped, EARLY) as handle:
        found, kept = logits(wrapped, ONE), handle.kept()[0]
    assert torch.equal(logits(wrapped, ONE), bare)
    seen = torch.nn.functional.pad(kept, (3, 0), value=True)[:, None, None]
    itself = torch.eye(3 + size, dtype=torch.bool)[3:]
    mask = torch.ones(size, 3 + size, dtype=torch.bool).tril(3) & seen | itself
    prefix = wrapped.get_prompt(1)
    expected = logits(model, {**ONE, "attention_mask": mask}, past_key_values=prefix)
    assert error(found[kept], expected[kept]) <= CLOSE < error(bare[kept], expected[kept])


def forwards(model):
    """What is called, and the names of all else; accelerate makes parameters anew."""
    return [(vars(module).get("forward"), sorted(vars(module))) for module in model.modules()]


@works("`accelerate`: `device_map`, `dispatch_model`, offload to the CPU or to disk")
@pytest.mark.parametrize("how", ["dispatch", "cpu", "disk"])
@pytest.mark.parametrize("config", [FASTV, TOWER])
def test_accelerate(how, config, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    expected = pruned(tiny_llava(), config), generate(tiny_llava())
    model, bare = tiny_llava(), logits(tiny_llava(), MANY)
    if how == "dispatch":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    elif how == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    logits(model, MANY)
    before = forwards(model)
    assert torch.equal(pruned(model, config), expected[0]) and torch.equal(
        logits(model, MANY), bare
    )
    assert (
        torch.equal(generate(model), expected[1])
        and forwards(model) == before
        and not our_hooks(model)
    )
    with vispco.apply(model, config, mode="search") as handle:
        handle.ratios = handle.ratios.clone().requires_grad_()
        model(**batch(images=(1, 2), text=(9, 7), before=(2, 1))).loss.backward()
        assert handle.ratios.grad.abs().max() > 0


@works("`accelerate` coming and going inside the `with` block")
def test_accelerate_inside():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model, bare, expected = tiny_llava(), logits(tiny_llava(), MANY), pruned(tiny_llava(), FASTV)
    with vispco.apply(model, FASTV):
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        assert torch.equal(logits(model, MANY), expected)
    assert torch.equal(logits(model, MANY), bare) and hasattr(model, "_hf_hook")
    with vispco.apply(model, FASTV):
        assert torch.equal(logits(model, MANY), expected)


# ---- inputs and outputs --------------------------------------------------------------------------
section("Inputs and outputs")
also(
    "a batch of prompts of any length, padded left or right, with several images or none: "
    "each as alone",
    "test_contract.py::test_a_sample_alone_is_as_in_a_batch",
)
also("`inputs_embeds` instead of `input_ids`", "test_pruning.py::test_embeddings_instead_of_ids")
also(
    "`inputs_embeds` that hold the features of the pictures, with `visual_mask=` of `vispco.apply`",
    "test_visual_mask.py::test_embeddings_with_features_in_place_are_refused_or_told",
    "works; refused without the mask",
)
also(
    "beam search from such `inputs_embeds`: each row's copies are pruned as it is",
    "test_visual_mask.py::test_beam_search_repeats_the_rows",
)
also(
    "a `visual_mask=` of another prompt (set `handle.visual_mask` for each)",
    "test_visual_mask.py::test_a_mask_of_another_prompt_is_refused",
    "refused: “set it on the handle for each prompt”",
)
also(
    "pictures without their tokens in the prompt",
    "test_visual_mask.py::test_pictures_without_their_tokens_are_refused",
    "refused: “no visual token is found in the prompt”",
)
also(
    "`attention_mask` left out, or of four dimensions",
    "test_pruning.py::test_the_mask_may_be_left_out_or_four_dimensional",
)
also(
    "`labels`: the loss is that with the dropped tokens masked",
    "test_pruning.py::test_loss_of_deploy_equals_that_of_search",
)
also(
    "`labels`: no score looks at the answer",
    "test_evaluate.py::test_answers_cannot_be_seen_by_the_scores",
)
also(
    "`logits_to_keep`, `return_dict=False`, `output_hidden_states` (zeros for dropped tokens)",
    "test_pruning.py::test_the_callers_options_work_as_before",
)


@works(
    "arguments by place instead of by name, of the model and of its backbone; `model.forward(...)`"
)
def test_arguments_by_place(model):
    inputs = batch(images=(1, 2), text=(9, 7), before=(2, 1), answer=5)
    ids, pixels, mask = inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    with vispco.apply(model, FASTV) as handle, torch.no_grad():
        expected, kept = model(**inputs), handle.kept()
        for call in (model, model.forward):
            assert torch.equal(call(ids, pixels, mask, labels=inputs["labels"]).loss, expected.loss)
            assert all(torch.equal(mask, kept[i]) for i, mask in handle.kept().items())
        plain = model.model(**without_labels(inputs)).last_hidden_state
        assert torch.equal(model.model(ids, pixels, mask).last_hidden_state, plain)


@works("`output_attentions` (eager): after a drop, of the tokens that are left")
def test_attentions_are_handed_out():
    model = tiny_llava(attention="eager")
    with vispco.apply(model, FASTV) as handle, torch.no_grad():
        got = model(**ONE, output_attentions=True).attentions
        kept = {i: mask[0] for i, mask in handle.kept().items()}
    for ours, expected in zip(got, by_hand(model, ONE, kept).attention, strict=True):
        assert ours.shape == expected.shape and error(ours, expected) <= CLOSE


@refused(
    "several prompts packed into one row",
    "several prompts are packed into one row "
    "(position_ids start again, or cu_seq_lens_q is given), "
    "and would be pruned as one: give each a row of its own, padded",
)
def test_packed_prompts_are_refused(model, refusal):
    ids, size = ONE["input_ids"].repeat(1, 2), ONE["input_ids"].shape[1]
    packed = {
        "input_ids": ids,
        "pixel_values": ONE["pixel_values"].repeat(2, 1, 1, 1),
        "position_ids": torch.arange(size).repeat(1, 2),
        "use_cache": False,
    }
    # Transformers keeps them apart.
    assert error(logits(model, packed)[:, size:], logits(model, ONE)) <= CLOSE
    with vispco.apply(model, STEPS):
        with refusal():
            logits(model, packed)
        with refusal():
            logits(model, {**ONE, "cu_seq_lens_q": torch.tensor([0, 9, size])})


also(
    "FlashAttention 2 and 3, in deploy: as sdpa, in transformers' own code around a reference of "
    "the packages' functions (they need a GPU)",
    "test_flash.py::test_flash_attention_keeps_and_answers_as_sdpa",
)
also(
    "FlashAttention, generation: beams, guesses, with and without a cache",
    "test_flash.py::test_flash_attention_generates_as_sdpa",
)
also(
    "FlashAttention where layers have a sliding window",
    "test_flash.py::test_a_window_of_tokens_that_are_left_is_refused",
    "refused: “counts a sliding window in the tokens that are left, not in original positions”",
)
also(
    "flex attention, in deploy: unfused, as all compiled code inside the `with` block",
    "test_flash.py::test_flex_attention_keeps_and_answers_as_sdpa",
)
also(
    "FlashAttention and flex attention, in a search",
    "test_flash.py::test_a_search_needs_a_mask_of_numbers",
    "refused: “search with model.set_attn_implementation('sdpa'), then deploy with any”",
)


@refused(
    "paged attention, continuous batching",
    "may take no mask, and would not see which tokens are left: "
    "model.set_attn_implementation('sdpa')",
)
def test_other_attention_implementations_are_refused(model, refusal):
    expected, config = pruned(model, STEPS), model.get_decoder().config
    with vispco.apply(model, STEPS):
        config._attn_implementation = "paged|eager"
        try:
            with refusal():
                logits(model, ONE)
        finally:
            config._attn_implementation = "sdpa"
        assert torch.equal(logits(model, MANY), expected)


also("eager attention and sdpa", "test_pruning.py::test_eager_attention_equals_sdpa")


@refused(
    "the decoder of a pruned model, called by itself",
    "the decoder of a pruned model was called by itself, where no token is known to be "
    "visual: call the whole LlavaForConditionalGeneration",
)
@pytest.mark.parametrize("before", [False, True])
def test_the_decoder_alone_is_refused(model, refusal, before):
    embeds = decoder_inputs(model, ONE)[0]["inputs_embeds"]
    with vispco.apply(model, STEPS):
        if before:
            logits(model, ONE)
        with refusal():
            model.get_decoder()(inputs_embeds=embeds)
    with refusal(), vispco.apply(model, STEPS):
        model.get_decoder()(inputs_embeds=embeds)


# ---- kinds of models -----------------------------------------------------------------------------
section("Kinds of models")
ANY, SAME = "test_any_model.py::", "test_exact_counts_and_search_equals_deploy"
also("hybrid decoders: linear attention, Mamba or convolution in some layers", f"{ANY}{SAME}")
also("sparse attention, whose indexer chooses the keys", f"{ANY}{SAME}")
also("latent attention; experts; heads that differ by layer; windows, chunks", f"{ANY}{SAME}")
also(
    "hidden states of several streams; inputs of each layer; rotary embeddings of any form",
    f"{ANY}{SAME}",
)
also("keys shared between layers", f"{ANY}{SAME}")
also(
    "the gradient of a search: through layers of ordinary attention, in any of these",
    f"{ANY}test_gradients_reach_the_ratios_through_attention",
)
also(
    "a search where no layer takes a mask (Qwen4-exp, GLM5-next, Inkling, Mistral Large 4)",
    "test_no_gradient.py::test_a_search_says_so_and_refines",
    "works without gradient steps, and says so",
)
also(
    'the same with `start="shared"`, which learns by the gradient',
    "test_no_gradient.py::test_shared_is_refused",
    "refused: “start='shared' learns by it: use start='ramp'”",
)
also(
    "models whose own `generate` makes the embeddings and calls the decoder (BLIP-2, InstructBLIP, "
    "Kosmos-2, Janus)",
    f"{ANY}test_generation_with_the_cache_equals_recomputation",
)
also(
    "models without visual tokens in the prompt of a decoder",
    "test_support.py::test_refused_by_config_json_alone",
    "refused: “cannot prune 'mllama' models: cross-attention, its decoder never holds visual "
    "tokens”, or another reason",
)


# ---- serving: vLLM -------------------------------------------------------------------------------
section("Serving with vLLM")
IN_VLLM = "test_vllm.py::"
also(
    "LLaVA-1.5 and Qwen2.5-VL in vLLM: batches, chunked prefill, methods that read features, grid "
    "or the tower's attention, methods that merge",
    f"{IN_VLLM}test_the_answers_are_those_of_apply",
)
also("the same with vLLM's compiled decoder", f"{IN_VLLM}test_a_compiled_model")
also(
    "`vllm serve`, 16 requests at a time, through its HTTP interface; under tensor parallelism "
    "with methods that do not read the tower",
    f"{IN_VLLM}test_vllm_serve",
)
also(
    "prefix caching, where the prefix ends within a picture",
    f"{IN_VLLM}test_a_prefix_that_ends_within_a_picture_is_taken_from_the_cache",
)
also(
    "several pictures in a prompt: each keeps its own share",
    f"{IN_VLLM}test_each_of_several_pictures_keeps_its_own_share",
)
also("films of Qwen2.5-VL in vLLM", f"{IN_VLLM}test_videos_of_qwen2_5_vl")
also("pictures of Qwen3-VL in vLLM", f"{IN_VLLM}test_qwen3_vl")
also(
    "methods that read the language model or the question, in vLLM",
    "test_serving.py::test_the_methods_that_can_rank_a_picture_are_those_that_read_the_vision_side",
    "refused: “cannot rank a picture before the language model”",
)
also(
    "other models in vLLM, while the plug-in is configured",
    f"{IN_VLLM}test_other_models_are_refused",
    "refused: “is no model that is pruned”",
)
also(
    "vLLM's own pruning of videos, beside it",
    f"{IN_VLLM}test_what_cannot_be_served_is_refused",
    "refused: “pruning does not go with vLLM's own pruning (--video-pruning-rate)”",
)


# ---- the page ------------------------------------------------------------------------------------
def test_the_page_is_current():
    written = Path(__file__).parent.parent / "docs" / "compatibility.md"
    assert written.read_text(encoding="utf-8") == compatibility.page(), (
        "PYTHONPATH=tests python tests/compatibility.py > docs/compatibility.md"
    )


@pytest.mark.parametrize("case", compatibility.CASES, ids=lambda case: case.test)
def test_every_row_names_a_test(case):
    assert compatibility.defined(case) and "|" not in case.use + case.verdict
