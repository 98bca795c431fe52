"""Attention with policy in blocks.

The numbers of the dense mask, forward and backward, without its memory.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tiny import batch, make
from tiny_families import prompts
from vispco.calibration import frozen, prepare, run_teacher
from vispco.pruning import Masking
from vispco.pruning._attention import SoftMask
from vispco.pruning._masks import log_policy, soft_bias
from vispco.registry import METHODS, adapter_for
from vispco.ste import ESTIMATORS

torch.set_num_threads(1)


@contextmanager
def saved_sizes(sizes):
    """Inside, note down the size of each tensor that is kept for the backward pass."""

    def pack(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield


# Around the blocks of 64 queries.
SIZES = [1, 63, 64, 65, 150]


def case(size, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(2, 3, size, 8, generator=g, dtype=dtype) for _ in range(4))
    policy = torch.rand(2, size, generator=g, dtype=dtype)
    return q, k, v, policy.where(policy > 0.4, 0), grad


def own_mask(kind, size):
    """(the model's mask, whether no token sees ahead)"""
    causal = torch.ones(size, size, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    padded = causal & (torch.arange(size) >= torch.tensor([[0], [size // 3]]))[:, None, None]
    padded = padded | torch.eye(size, dtype=torch.bool)
    prefix = causal | (torch.arange(size) < size // 2)
    additive = torch.zeros(2, 1, size, size, dtype=torch.float64).masked_fill(
        ~padded, torch.finfo(torch.float64).min
    )
    return {
        "none": (None, True),
        "padded": (padded, True),
        "prefix": (prefix, False),
        "additive": (additive, True),
    }[kind]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["none", "padded", "prefix", "additive"])
def test_values_and_all_gradients_are_those_of_the_dense_bias(kind, size):
    *inputs, grad = case(size)
    mask, causal = own_mask(kind, size)
    results = []
    for way in (
        lambda p: soft_bias(mask, log_policy(p), p.dtype),
        lambda p: SoftMask.of(mask, p, p.dtype, causal),
    ):
        q, k, v, policy = (x.clone().requires_grad_() for x in inputs)
        out = scaled_dot_product_attention(q, k, v, attn_mask=way(policy), scale=0.3)
        results.append([out, *torch.autograd.grad(out, [q, k, v, policy], grad)])
    for dense, blocks in zip(*results, strict=True):
        assert torch.allclose(blocks, dense, rtol=1e-9, atol=1e-10)


def test_where_only_the_policy_has_a_gradient_it_is_the_same():
    q, k, v, policy, grad = case(100)
    results = []
    for others in (True, False):
        p = policy.clone().requires_grad_()
        q_, k_, v_ = (x.clone().requires_grad_(others) for x in (q, k, v))
        out = scaled_dot_product_attention(q_, k_, v_, SoftMask.of(None, p, p.dtype, True))
        results.append(torch.autograd.grad(out, p, grad)[0])
    assert torch.equal(*results) and results[0].abs().max() > 0


def test_queries_that_share_keys_and_half_precision():
    q, k, v, policy, _ = case(80, dtype=torch.float32)
    # 6 heads on 3
    q = torch.cat([q, q + 1], 1)
    mask = SoftMask.of(None, policy, q.dtype, True)
    shared = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    assert torch.equal(shared, scaled_dot_product_attention(q, k, v, attn_mask=mask))
    policy.requires_grad_()
    half = scaled_dot_product_attention(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), SoftMask.of(None, policy, torch.bfloat16, True)
    )
    (rough,) = torch.autograd.grad(half.float().square().sum(), policy)
    (exact,) = torch.autograd.grad(
        scaled_dot_product_attention(q, k, v, SoftMask.of(None, policy, q.dtype, True))
        .square()
        .sum(),
        policy,
    )
    assert half.dtype == torch.bfloat16 and (half - shared).abs().max() < 0.05
    assert (rough - exact).norm() < 0.05 * exact.norm()


def test_anything_but_sdpa_sees_the_dense_mask():
    policy = torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)
    mask, dense = (
        SoftMask.of(None, policy, torch.float32, True),
        soft_bias(None, log_policy(policy), torch.float32),
    )
    assert mask.shape == dense.shape and mask.dtype == dense.dtype and mask.device == dense.device
    assert torch.equal(mask + 0, dense) and torch.equal(mask[:, :, 1:], dense[:, :, 1:])
    one, two = (
        torch.autograd.grad((m + 1).softmax(-1)[0, 0, 2, 1], policy)[0] for m in (mask, dense)
    )
    assert torch.equal(one, two) and two[0, 1] > 0


def test_nothing_quadratic_is_kept_for_the_backward_pass():
    q, k, v, policy, _ = case(300)
    kept = []
    for way in (
        lambda p: SoftMask.of(None, p, p.dtype, True),
        lambda p: soft_bias(None, log_policy(p), p.dtype),
    ):
        sizes = []
        with saved_sizes(sizes):
            scaled_dot_product_attention(
                q.requires_grad_(), k, v, attn_mask=way(policy.requires_grad_())
            )
        kept.append(max(sizes))
    assert kept[0] == q.numel() and kept[1] >= 300**2


# ---- checkpointing -------------------------------------------------------------------------------
def gradient(model, prepared_batch, estimator, checkpoint):
    ratios = torch.tensor([1, 0.75, 0.75, 0.5, 0.5, 0.25], dtype=torch.float64, requires_grad=True)
    held = []
    masking = Masking(adapter_for(model)(model), METHODS.get("fastv")(), ratios, estimator)
    with frozen(model, checkpoint), saved_sizes(held), masking.install() as pruner:
        loss = pruner.losses(prepared_batch).mean()
        count = sum(held)
        (found,) = torch.autograd.grad(loss, ratios)
        # Layers that ran again have left nothing behind.
        assert pruner.state is None
    return found, count


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_checkpointing_gives_the_gradient_of_every_estimator_to_the_bit(family):
    model = make(family)
    inputs = batch(images=(1, 2), text=(9, 6), before=(2, 0))
    if family != "llava":
        inputs, _ = prompts(model, [[2, ("image", 0), 7], [("image", 2), 4]])
        inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
        inputs["labels"][:, -2:] = inputs["input_ids"][:, -2:]
    (prepared_batch,) = run_teacher(model, prepare(model, [inputs]))
    for estimator in ESTIMATORS:
        (kept, many), (again, few) = (
            gradient(model, prepared_batch, estimator, checkpoint) for checkpoint in (False, True)
        )
        assert torch.equal(kept, again) and kept[1:].abs().max() > 0, estimator
        assert few < many / 2
    assert not any("forward" in vars(layer) for layer in adapter_for(model)(model).layers)


def test_a_forward_that_others_have_put_on_a_layer_is_put_back():
    model = make("llava")
    layer = adapter_for(model)(model).layers[2]
    layer.forward = before = layer.forward
    try:
        with pytest.raises(KeyError), frozen(model, checkpoint=True):
            assert layer.forward is not before
            raise KeyError
        assert vars(layer)["forward"] is before
    finally:
        del layer.forward
