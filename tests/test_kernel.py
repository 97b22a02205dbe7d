"""linear_logp against float64 log_softmax, against finite differences, and in memory."""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernel import linear_logp


def naive(hidden, weight, ids, temperature=1.0):
    logp = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return logp.gather(1, ids if ids.dim() == 2 else ids[:, None]), -(logp.exp() * logp).sum(-1)


def operands(n, d, v, k, dtype=torch.float64, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (n, k), generator=g)


@pytest.mark.parametrize("chunk", [1, 5, 8, 23, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck_with_repeated_ids_and_ragged_chunks(chunk, temperature):
    hidden, weight, ids = operands(4, 6, 23, 3)
    ids[:, 1] = ids[:, 0]
    for output in (lambda a: a[0], lambda a: a[1], lambda a: (a[0], a[1])):  # alone and together
        assert torch.autograd.gradcheck(lambda h, w: output(linear_logp(h, w, ids, temperature=temperature, chunk=chunk)), (hidden, weight))


@pytest.mark.parametrize("chunk", [7, 64, None])
def test_equals_log_softmax_with_a_gradient_of_its_own_for_every_token(chunk):
    hidden, weight, ids = operands(9, 16, 101, 2)
    upstream, upstream_entropy = torch.randn(9, 2, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    got, want = linear_logp(hidden, weight, ids, chunk=chunk), naive(hidden, weight, ids)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad((lp * upstream).sum() + (h * upstream_entropy).sum(), (hidden, weight)) for lp, h in (got, want)]
    for g, w in zip(*grads):
        torch.testing.assert_close(g, w, atol=1e-11, rtol=0)


@pytest.mark.parametrize("shift", [-120.0, 1000.0, 0.0])
def test_far_away_logits(shift):
    """A running maximum that starts at 0, or a log-sum-exp that is rebuilt, fails here."""
    hidden, weight, ids = operands(5, 4, 33, 1)
    with torch.no_grad():  # a constant input feature moves every logit of every token alike
        hidden[:, 0], weight[:, 0] = 1.0, shift
    for chunk in (4, 33):
        got, want = linear_logp(hidden, weight, ids, chunk=chunk), naive(hidden, weight, ids)
        assert all(torch.isfinite(x).all() for x in got)
        torch.testing.assert_close(got[0], want[0], atol=1e-10, rtol=0)
        torch.testing.assert_close(got[1], want[1], atol=1e-10, rtol=0)


def test_one_hot_rows_never_exceed_zero():
    hidden = torch.tensor([[60.0], [-60.0]])
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    logp, entropy = linear_logp(hidden, weight, torch.tensor([0, 1]), chunk=2)
    assert (logp <= 0).all() and (entropy >= 0).all() and (entropy < 1e-6).all()


def test_bfloat16_operands_stay_within_half_a_percent_where_rounded_logits_do_not():
    """The oracle is float64 on the very same bfloat16 operands.  Rounding the logits first fails the bound."""
    hidden, weight, ids = operands(64, 128, 1000, 1, torch.bfloat16, scale=0.3)
    logp, _ = linear_logp(hidden, weight, ids, chunk=256)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact, _ = naive(exact_hidden, exact_weight, ids)
    assert logp.dtype == torch.float32
    assert (logp.double() - exact).abs().max() < 1e-4
    upstream = torch.randn(64, 1, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((logp * upstream).sum(), (hidden, weight))
    want = torch.autograd.grad((exact * upstream.double()).sum(), (exact_hidden, exact_weight))
    for g, w in zip(got, want):
        assert (g.double() - w).norm() / w.norm() < 5e-3
    rounded = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, ids)
    assert (rounded.double() - exact).abs().max() > 1e-3


def test_frozen_head_gets_no_gradient_and_empty_input_works():
    hidden, weight, ids = operands(3, 4, 9, 1)
    weight.requires_grad_(False)
    linear_logp(hidden, weight, ids)[0].sum().backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0
    logp, entropy = linear_logp(hidden[:0].detach().requires_grad_(), weight, ids[:0, 0])
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        self.elements = 0
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_is_as_large_as_the_logits():
    n, d, v, chunk = 256, 8, 4096, 512
    hidden, weight, ids = operands(n, d, v, 1, torch.float32)
    sizes = {}
    for name, function in (("fused", lambda: linear_logp(hidden, weight, ids, chunk=chunk)), ("naive", lambda: naive(hidden, weight, ids))):
        with LargestTensor() as seen:
            logp, entropy = function()
            (logp.sum() + entropy.sum()).backward()
        sizes[name] = seen.elements
    assert sizes["naive"] >= n * v
    assert sizes["fused"] <= max(v * d, n * chunk)


def test_worked_example_and_refusals():
    logp, entropy = linear_logp(torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]]), torch.tensor([1]))
    assert logp.item() == pytest.approx(math.log(3 / 4)) and entropy.item() == pytest.approx(0.5623, abs=1e-4)
    hidden, weight, ids = operands(3, 4, 9, 1)
    for bad in (dict(hidden=hidden[:, :3]), dict(ids=ids + 9), dict(ids=ids - 9), dict(ids=ids[:2]), dict(hidden=hidden.float()), dict(temperature=0.0)):
        arguments = dict(hidden=hidden, weight=weight, ids=ids, temperature=1.0) | bad
        with pytest.raises(ValueError, match="linear_logp"):
            linear_logp(arguments["hidden"], arguments["weight"], arguments["ids"], temperature=arguments["temperature"])
