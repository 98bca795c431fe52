"""Models that are split over two processes keep the tokens, and give the logits, of one process."""

import copy
import os
import traceback

import pytest
import torch
from torch import distributed, multiprocessing

import vispco
from oracles import error, pruned_with
from tiny import batch, tiny_llava, without_labels
from vispco import PruningConfig
from vispco.registry import METHODS

CLOSE = 1e-4
MANY = without_labels(batch(images=(2, 1, 0, 3), text=(7, 9, 12, 3), before=(1, 2, 5, 0)))


class Reader(vispco.Method):
    """Asks for all that is split: queries, keys, projected keys, rows of two layers."""

    reads_next = True

    def score(self, ctx):
        own, coming = ctx.attention(at=ctx.visual[1]), ctx.attention(layer=ctx.layer)
        seen = own.amax(1).sum(1) + coming.mean(1)[:, 0]
        size = ctx.queries().norm(dim=-1).amax(1) * ctx.keys().norm(dim=-1).amax(1)
        sums = ctx.projected_keys.abs().sum(-1)
        return (seen * size * sums)[ctx.visual]


def in_two(check, folder, *arguments):
    """Run `check(rank, *arguments)` in two processes of one group."""
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    workers = [
        context.Process(target=worker, args=(rank, check, folder, failures, arguments))
        for rank in range(2)
    ]
    for process in workers:
        process.start()
    for process in workers:
        process.join(300)
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in workers] == [0, 0]


def worker(rank, check, folder, failures, arguments):
    """One of the two."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    store = f"file://{folder}/store"
    try:
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        check(rank, *arguments)
        distributed.destroy_process_group()
    except BaseException:
        failures.put(f"process {rank}: {traceback.format_exc()}")


def tensor_parallel(model):
    """Attention and MLP of each decoder layer, split as transformers' plan splits them."""
    from torch.distributed.tensor import parallel

    mesh = distributed.init_device_mesh("cpu", (2,))
    columns, rows = parallel.ColwiseParallel(), parallel.RowwiseParallel()
    first = [*(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
    last = ["self_attn.o_proj", "mlp.down_proj"]
    for layer in model.get_decoder().layers:
        parallel.parallelize_module(
            layer, mesh, dict.fromkeys(first, columns) | dict.fromkeys(last, rows)
        )
    return model


def fully_sharded(model):
    """FSDP2: each layer of the decoder, and the model without what `generate` runs before it."""
    from torch.distributed.fsdp import fully_shard

    before = [model.model.vision_tower, model.model.multi_modal_projector]
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    return fully_shard(model, ignored_params={w for m in before for w in m.parameters()})


def configs():
    """Every method, with drops at several layers."""
    yield Reader(), [1, 0.6, 0.6, 0.4, 0.3, 0.2]
    for name in vispco.list_methods():
        first = METHODS.get(name).first_layer
        yield METHODS.get(name)(), [1] * first + [0.5, 0.5, 0.3, 0.3, 0.2, 0.2][first:]


def run(model, method, ratios, inputs=MANY):
    """Logits and kept tokens."""
    with pruned_with(model, method, ratios) as handle:
        logits = model(**inputs).logits
        kept = handle.kept()
    return logits[inputs["attention_mask"].bool()], kept


@torch.no_grad()
def check_methods(rank, shard):
    """Every method: tokens and logits of the whole model."""
    whole = tiny_llava()
    split = shard(copy.deepcopy(whole))
    for method, ratios in configs():
        expected, kept = run(whole, method, ratios)
        found, mine = run(split, method, ratios)
        name = type(method).__name__
        assert kept and all(torch.equal(mask, mine[i]) for i, mask in kept.items()), name
        assert error(found, expected) <= CLOSE, name


@torch.no_grad()
def check_generation(rank, shard):
    """Greedy decoding with the cache."""
    whole = tiny_llava()
    split = shard(copy.deepcopy(whole))
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [2, 5]}
    answers = []
    for model in (whole, split):
        with vispco.apply(model, PruningConfig("fastv", [1, 1, 0.5, 0.5, 0.25, 0.25])):
            answers.append(model.generate(**MANY, **options))
    assert torch.equal(*answers)


@pytest.mark.parametrize("shard", [tensor_parallel, fully_sharded])
def test_every_method_keeps_what_one_process_keeps(shard, tmp_path):
    in_two(check_methods, tmp_path, shard)


@pytest.mark.parametrize("shard", [tensor_parallel, fully_sharded])
def test_sharded_generation(shard, tmp_path):
    in_two(check_generation, tmp_path, shard)


def check_search_is_refused(rank):
    split = tensor_parallel(tiny_llava())
    config = PruningConfig("fastv", [1, 1, 0.5, 0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match="has the gradient of its own heads alone"):
        vispco.apply(split, config, mode="search")


def test_a_search_under_tensor_parallelism_is_refused(tmp_path):
    in_two(check_search_is_refused, tmp_path)


def check_search(rank):
    """Losses and gradients in the keep ratios, and a whole search."""
    whole = tiny_llava()
    split = fully_sharded(copy.deepcopy(whole))
    frontiers = [
        vispco.search(
            model,
            [batch()],
            method="fastv",
            budgets=[0.5],
            start=vispco.Gradient(steps=3),
            refinement=1,
        )
        for model in (whole, split)
    ]
    one, two = ([p.config.keep_ratios for p in f.points] for f in frontiers)
    assert one == two


@pytest.mark.slow
def test_a_search_under_fsdp2(tmp_path):
    in_two(check_search, tmp_path)


@torch.no_grad()
def check_uneven(rank):
    """Three heads over two processes: whoever splits them, they cannot be put together."""
    from vispco.reading.sharding import all_heads

    group = distributed.group.WORLD
    x = torch.arange(12.0).view(1, 2, 6) + 100 * rank
    assert torch.equal(all_heads(x, 1, group)[:, 2 * rank : 2 * rank + 2], x)
    assert torch.equal(all_heads(x, 2, group)[..., 6 * rank : 6 * rank + 6], x)
    split = tensor_parallel(tiny_llava())
    with vispco.apply(split, PruningConfig("fastv", [1, 1, 0.5, 0.5, 0.25, 0.25])) as handle:
        handle.adapter.heads = lambda layer: 3
        with pytest.raises(ValueError, match="has 3 attention heads, of which a process has 2"):
            split(**MANY)


def test_heads_that_do_not_divide(tmp_path):
    in_two(check_uneven, tmp_path)


@torch.no_grad()
def check_plan(rank, folder):
    """As `from_pretrained` splits it."""
    from transformers import AutoModelForImageTextToText

    split = AutoModelForImageTextToText.from_pretrained(folder, tp_plan="auto")
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    for method, ratios in configs():
        expected, kept = run(whole, method, ratios)
        found, mine = run(split, method, ratios)
        assert all(torch.equal(mask, mine[i]) for i, mask in kept.items()), type(method).__name__
        assert error(found, expected) <= CLOSE


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_plan_of_transformers(tmp_path):
    pytest.importorskip("accelerate", reason="transformers loads by a plan with accelerate")
    tiny_llava().save_pretrained(tmp_path / "model")
    in_two(check_plan, tmp_path, tmp_path / "model")
