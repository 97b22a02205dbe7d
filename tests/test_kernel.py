"""opd/kernel.py and opd/kernel_triton.py against float64 on the same operands, finite
differences, and the bugs others have had.

BUGS is the list of them: a check that every implementation here must pass, beside a small
variant that has the bug and must fail the very same check.  Three implementations are held to
it: `recompute` (four products), `slices` (linear_token_loss, three products) and `triton` (in
Triton's interpreter, where there is no GPU)."""

import json
import math
import os
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from opd import kernel
from opd.kernel import linear_logp, linear_reverse_kl, linear_token_loss, token_numbers

try:
    from opd import kernel_triton
except ImportError:
    kernel_triton = None
needs_triton = pytest.mark.skipif(
    kernel_triton is None, reason="triton is not installed: pip install triton"
)


# ---- what is compared


def recompute(hidden, weight, ids, g, e, chunk=64, **options):
    """(logp, entropy, dhidden, dweight) for upstream gradients g [N, K] and e [N]."""
    logp, entropy = linear_logp(hidden, weight, ids, chunk=chunk, **options)
    return (
        logp.detach(),
        entropy.detach(),
        *torch.autograd.grad((logp * g).sum() + (entropy * e).sum(), (hidden, weight)),
    )


def slices(hidden, weight, ids, g, e, chunk=64, rows=3, **options):
    seen = []

    def loss(cut, numbers):
        seen.append((numbers.logp.detach(), numbers.entropy.detach()))
        return (numbers.logp * g[cut]).sum() + (numbers.entropy * e[cut]).sum()

    value = linear_token_loss(hidden, weight, ids, loss, chunk=chunk, rows=rows, **options)
    return (
        torch.cat([s[0] for s in seen]),
        torch.cat([s[1] for s in seen]),
        *torch.autograd.grad(value, (hidden, weight)),
    )


def triton(hidden, weight, ids, g, e, chunk=64, **options):
    return recompute(hidden, weight, ids, g, e, chunk=chunk, kernel="triton", **options)


def oracle(
    hidden, weight, ids, g, e, temperature=1.0, scale=1.0, softcap=None, vocabulary=None
):
    """The same in float64 on the very same operands, by plain autograd."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = scale * (h @ w[:vocabulary].T)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, -1)
    chosen, entropy = logp.gather(1, ids), -(logp.exp() * logp).sum(-1)
    return (
        chosen.detach(),
        entropy.detach(),
        *torch.autograd.grad(
            (chosen * g.double()).sum() + (entropy * e.double()).sum(), (h, w)
        ),
    )


def plain(
    hidden,
    weight,
    ids,
    g,
    e,
    logits=lambda h, w: h @ w.T,
    logp_of=lambda z: torch.log_softmax(z, -1),
    detach_entropy=False,
):
    """A naive implementation with replaceable parts, from which the buggy variants are made."""
    logp = logp_of(logits(hidden, weight))
    chosen, entropy = logp.gather(1, ids), -(logp.exp() * logp).sum(-1)
    entropy = entropy.detach() if detach_entropy else entropy
    return (
        chosen.detach(),
        entropy.detach(),
        *torch.autograd.grad((chosen * g).sum() + (entropy * e).sum(), (hidden, weight)),
    )


IMPLEMENTATIONS = [recompute, slices, pytest.param(triton, marks=needs_triton)]


def operands(n, d, v, k=1, dtype=torch.float64, scale=1.0, seed=0):
    """hidden, weight, ids, and upstream gradients that differ for every token."""
    r = torch.Generator().manual_seed(seed)
    hidden = (
        (scale * torch.randn(n, d, generator=r, dtype=torch.float64)).to(dtype).requires_grad_()
    )
    weight = torch.randn(v, d, generator=r, dtype=torch.float64).to(dtype).requires_grad_()
    upstream = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        hidden,
        weight,
        torch.randint(0, v, (n, k), generator=r),
        torch.randn(n, k, generator=r, dtype=upstream),
        torch.randn(n, generator=r, dtype=upstream),
    )


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


def close(got, want, tolerance):
    """logp and entropy within `tolerance`, gradients within `tolerance` of their norm, and
    nothing infinite."""
    for x, y in zip(got[:2], want[:2]):
        assert torch.isfinite(x).all() and (x.double() - y).abs().max() <= tolerance
    for x, y in zip(got[2:], want[2:]):
        assert relative(x, y) <= tolerance


# ---- bugs of other kernels


def phantom_columns(f):
    """V is one more than a tile, with peaked and with all-negative logits: padding columns must
    not add e^0 to the sum."""
    for offset in (0.0, -30.0):
        hidden, weight, ids, g, e = operands(5, 8, 129, dtype=torch.float32, scale=3.0)
        with torch.no_grad():
            hidden[:, 0], weight[:, 0] = 1.0, offset
        close(f(hidden, weight, ids, g, e), oracle(hidden, weight, ids, g, e), 2e-5)


def pads_with_zero_rows(hidden, weight, ids, g, e):
    return plain(
        hidden,
        weight,
        ids,
        g,
        e,
        logits=lambda h, w: h @ torch.cat([w, w.new_zeros(-len(w) % 128, w.shape[1])]).T,
    )


def far_below_zero(f):
    """All logits near -120: a running maximum that starts at 0 leaves e^-120 = 0 in float32."""
    hidden, weight, ids, g, e = operands(5, 8, 65, dtype=torch.float32, scale=0.3)
    with torch.no_grad():
        hidden[:, 0], weight[:, 0] = 1.0, -120.0
    close(f(hidden, weight, ids, g, e), oracle(hidden, weight, ids, g, e), 1e-4)


def maximum_from_zero(hidden, weight, ids, g, e):
    def logp_of(z):
        m = z.detach().amax(-1, keepdim=True).clamp(min=0)
        return z - m - (z - m).exp().sum(-1, keepdim=True).log()

    return plain(hidden, weight, ids, g, e, logp_of=logp_of)


def own_gradient_for_every_token(f):
    hidden, weight, ids, g, e = operands(6, 8, 40, k=2)
    close(f(hidden, weight, ids, g, e), oracle(hidden, weight, ids, g, e), 1e-11)


def first_tokens_gradient_for_all(hidden, weight, ids, g, e):
    right, wrong = (
        plain(hidden, weight, ids, g, e),
        plain(hidden, weight, ids, g[:1].expand_as(g), e),
    )
    return *right[:3], wrong[3]  # dhidden right, dweight wrong


def entropy_has_a_gradient(f):
    hidden, weight, ids, g, e = operands(6, 8, 40)
    close(f(hidden, weight, ids, 0 * g, e), oracle(hidden, weight, ids, 0 * g, e), 1e-11)


def entropy_detached(hidden, weight, ids, g, e):
    return plain(hidden, weight, ids, g, e, detach_entropy=True)


def bfloat16_operands(f):
    """Log-probs within 1e-4 nats and gradients within half a percent of float64 on the same
    bfloat16 operands."""
    hidden, weight, ids, g, e = operands(48, 96, 700, dtype=torch.bfloat16, scale=0.4)
    got, want = f(hidden, weight, ids, g, 0 * e), oracle(hidden, weight, ids, g, 0 * e)
    assert (
        got[0].dtype == got[1].dtype == torch.float32
        and got[2].dtype == got[3].dtype == torch.bfloat16
    )
    for x, y in zip(got[:2], want[:2]):
        assert (x.double() - y).abs().max() < 1e-4
    assert max(relative(x, y) for x, y in zip(got[2:], want[2:])) < 5e-3


def logits_rounded_to_bfloat16(hidden, weight, ids, g, e):
    return plain(hidden, weight, ids, g, e, logits=lambda h, w: (h @ w.T).float())


def rows_of_dz_sum_to_zero(f):
    """A head with a column of ones makes the last hidden gradient the sum of dz over the
    vocabulary, which is 0."""
    hidden, weight, ids, g, e = operands(32, 64, 300, dtype=torch.bfloat16, scale=2.5)
    with torch.no_grad():
        weight[:, -1] = 1.0
    sums = f(hidden, weight, ids, torch.ones_like(g), 0 * e)[2][:, -1]
    assert sums.abs().max() < 0.01


def normaliser_from_rounded_logits(hidden, weight, ids, g, e):
    """Forward takes log-sum-exp of bfloat16 logits, backward computes the logits again in
    float32."""
    z = hidden.float() @ weight.float().T
    lse = torch.logsumexp((hidden @ weight.T).float(), -1, keepdim=True)
    dz = -(z - lse).exp() * g.sum(1, keepdim=True)
    dz.scatter_add_(1, ids, g)
    return z.gather(1, ids) - lse, lse[:, 0], dz @ weight.float(), dz.T @ hidden.float()


def confident_targets(f):
    """p of the target is 0.998: dz there is p - 1 = -0.002, which must not come from a p that
    was rounded to 1 before."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16).requires_grad_()
    weight = torch.tensor([[6.25], [0.0]], dtype=torch.bfloat16).requires_grad_()
    args = (
        hidden,
        weight,
        torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1, 1),
        torch.zeros(1),
    )
    got, want = f(*args)[3], oracle(*args)[3]
    assert abs(got[0, 0].item() / want[0, 0].item() - 1) < 0.01


def one_taken_from_a_rounded_probability(hidden, weight, ids, g, e):
    logp, entropy, d_hidden, _ = plain(
        hidden, weight, ids, g, e, logits=lambda h, w: h.float() @ w.float().T
    )
    dz = -torch.softmax(hidden.float() @ weight.float().T, -1).to(torch.bfloat16)
    dz[0, ids[0, 0]] += 1
    return logp, entropy, d_hidden, dz.T @ hidden


def never_above_zero(f):
    """Near one-hot rows: log p of the certain token is 0, not more, or a ratio to it
    explodes."""
    hidden, weight, ids, g, e = operands(64, 16, 50, dtype=torch.bfloat16, scale=12.0)
    ids = (hidden.double() @ weight.double().T).argmax(-1, keepdim=True)
    logp, entropy = f(hidden, weight, ids, g, e)[:2]
    assert (logp <= 0).all() and (logp > -1e-3).any() and (entropy >= -1e-6).all()


def target_logit_from_another_product(hidden, weight, ids, g, e):
    z = hidden.detach().double() @ weight.detach().double().T
    lse = torch.logsumexp((hidden.detach() @ weight.detach().T).float(), -1, keepdim=True)
    return (z.gather(1, ids) - lse).float(), lse[:, 0], None, None


def common_offset(f):
    """Logits 1000 + k/1024, exact in float32: the offset leaves no trace, also not in the last
    digits."""
    r = torch.Generator().manual_seed(0)
    hidden = torch.tensor([[1.0, 1 / 1024]]).expand(4, 2).clone().requires_grad_()
    weight = torch.stack(
        [torch.full((60,), 1000.0), torch.randint(-2000, 2000, (60,), generator=r).float()], 1
    ).requires_grad_()
    args = (
        hidden,
        weight,
        torch.randint(0, 60, (4, 1), generator=r),
        torch.ones(4, 1),
        torch.zeros(4),
    )
    assert (f(*args)[0].double() - oracle(*args)[0]).abs().max() < 4e-6


def rebuilt_from_log_sum_exp(hidden, weight, ids, g, e):
    return plain(
        hidden, weight, ids, g, e, logp_of=lambda z: z - torch.logsumexp(z, -1, keepdim=True)
    )


def tail_gets_its_gradient(f):
    """The 290 unlikely tokens, each below 2.4e-4, get exact gradients: no filter on small
    probabilities."""
    hidden, weight, ids, g, e = operands(1, 16, 300, dtype=torch.float32)
    with torch.no_grad():
        hidden[:, 0], weight[:, 0], weight[:10, 0] = 1.0, 0.0, 14.0
        weight[:10, 1:] = 0
    got, want = (
        f(hidden, weight, ids % 10, g, e)[3][10:],
        oracle(hidden, weight, ids % 10, g, e)[3][10:],
    )
    assert want.abs().max() > 0 and relative(got, want) < 1e-3


def small_probabilities_dropped(hidden, weight, ids, g, e):
    logp, entropy, d_hidden, d_weight = plain(hidden, weight, ids, g, e)
    dropped = torch.softmax(hidden @ weight.T, -1).amax(0) < 2.4e-4
    return logp, entropy, d_hidden, d_weight.masked_fill(dropped[:, None], 0.0)


def repeated_ids(f):
    hidden, weight, ids, g, e = operands(4, 6, 23, k=3)
    ids[:, 1] = ids[:, 0]
    close(f(hidden, weight, ids, g, e), oracle(hidden, weight, ids, g, e), 1e-11)


def gradient_of_the_last_repeat_only(hidden, weight, ids, g, e):
    logp, entropy, d_hidden, d_weight = plain(hidden, weight, ids, g, e)
    kept = g.clone()
    kept[:, 0] = 0
    return logp, entropy, *plain(hidden, weight, ids, kept, e)[2:]


BUGS = {
    "verl#2656": (phantom_columns, pads_with_zero_rows),
    "maximum from 0": (far_below_zero, maximum_from_zero),
    "Liger#968": (own_gradient_for_every_token, first_tokens_gradient_for_all),
    "trl#6625": (entropy_has_a_gradient, entropy_detached),
    "Liger#1432": (bfloat16_operands, logits_rounded_to_bfloat16),
    "marin#8217": (rows_of_dz_sum_to_zero, normaliser_from_rounded_logits),
    "Liger#1329": (confident_targets, one_taken_from_a_rounded_probability),
    "CCE#55": (never_above_zero, target_logit_from_another_product),
    "pytorch#195829": (common_offset, rebuilt_from_log_sum_exp),
    "CCE#14": (tail_gets_its_gradient, small_probabilities_dropped),
    "scatter without add": (repeated_ids, gradient_of_the_last_repeat_only),
}


@pytest.mark.parametrize("f", IMPLEMENTATIONS)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_others_had_is_not_here(bug, f):
    BUGS[bug][0](f)


@pytest.mark.parametrize("bug", BUGS)
def test_the_check_notices_the_bug(bug):
    with pytest.raises(AssertionError):
        BUGS[bug][0](BUGS[bug][1])


# ---- gradients


def outputs(numbers):
    return [
        x for name, x in numbers._asdict().items() if x is not None and name != "teacher_logp"
    ]


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.7),
        dict(scale=-1.3),
        dict(softcap=2.5, scale=0.5, temperature=1.7),
        dict(vocabulary=20),
    ],
)
@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
def test_gradcheck_of_every_output_alone_and_together(chunk, options):
    """Finite differences in float64, chunks that do not divide V, repeated ids, with a teacher
    whose head has two rows more."""
    hidden, weight, ids, _, _ = operands(3, 6, 23, k=3)
    ids = ids.clamp(max=19)
    ids[:, 1] = ids[:, 0]
    teacher_hidden, teacher_weight = (x.detach() for x in operands(3, 5, 25, seed=1)[:2])
    for teacher in (None, (teacher_hidden, teacher_weight, {"softcap": 3.0})):

        def every(h, w):
            return outputs(token_numbers(h, w, ids, teacher=teacher, chunk=chunk, **options))

        assert torch.autograd.gradcheck(every, (hidden, weight))
        for i in range(len(every(hidden, weight))):
            assert torch.autograd.gradcheck(lambda h, w: every(h, w)[i], (hidden, weight))


@needs_triton
@pytest.mark.parametrize(
    "k, options",
    [(1, {}), (3, dict(softcap=2.5, scale=0.5, temperature=0.7)), (2, dict(vocabulary=13))],
)
def test_gradcheck_of_triton(monkeypatch, k, options):
    """V prime, D no multiple of the tile, several tiles and stretches, repeated ids; both
    outputs."""
    monkeypatch.setattr(kernel_triton, "TILE", (4, 8, 4))
    hidden, weight, ids, _, _ = operands(3, 5, 17, k=k)
    ids = ids.clamp(max=12)
    ids[:, -1] = ids[:, 0]
    assert torch.autograd.gradcheck(
        lambda h, w: token_numbers(h, w, ids, kernel="triton", chunk=9, **options)[:2],
        (hidden, weight),
    )


@pytest.mark.parametrize("f", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "n, d, v, k", [(1, 7, 31, 1), (9, 16, 101, 2), (4, 80, 130, 20), (5, 3, 6, 6)]
)
@pytest.mark.parametrize(
    "options", [dict(), dict(temperature=0.5), dict(softcap=4.0, scale=0.5), dict(vocabulary=5)]
)
def test_equals_float64_log_softmax(f, n, d, v, k, options):
    hidden, weight, ids, g, e = operands(n, d, v, k)
    ids = ids % (options.get("vocabulary") or v)
    got, want = (
        f(hidden, weight, ids, g, e, **options),
        oracle(hidden, weight, ids, g, e, **options),
    )
    # Triton passes scale, softcap and temperature as float32
    close(got, want, 1e-6 if f is triton else 1e-11)
    if "vocabulary" in options:
        # padding rows of the head are no tokens: no mass, no gradient
        assert (got[3][5:] == 0).all()


@pytest.mark.parametrize("f", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_chunks_and_slices_change_nothing(f, dtype, tolerance):
    hidden, weight, ids, g, e = operands(7, 32, 300, k=2, dtype=dtype, scale=0.3)
    whole = [x.double() for x in f(hidden, weight, ids, g, e, chunk=300)]
    for options in (
        dict(chunk=1),
        dict(chunk=7),
        dict(chunk=256),
        dict(chunk=None),
        *((dict(rows=1), dict(rows=7), dict(rows=None)) if f is slices else ()),
    ):
        close(f(hidden, weight, ids, g, e, **options), whole, tolerance)


def test_slices_and_recomputing_are_one_function_for_any_loss():
    """A loss that is curved in all five numbers, with a teacher: same value, same gradient,
    whatever is multiplied on afterwards."""
    hidden, weight, ids, _, _ = operands(10, 6, 23, k=2)
    teacher = *(x.detach() for x in operands(10, 5, 25, seed=1)[:2]), {}
    weights = torch.rand(10, dtype=torch.float64)

    def loss(cut, n):
        per_token = (
            n.logp.pow(2).sum(1)
            + n.entropy.sin()
            + n.reverse_kl.pow(2)
            - (n.forward_kl * n.teacher_logp.sum(1)).exp()
        )
        return (per_token * weights[cut]).sum()

    recomputed = loss(slice(None), token_numbers(hidden, weight, ids, teacher=teacher))
    for rows in (1, 3, 10):
        sliced = linear_token_loss(
            hidden, weight, ids, loss, teacher=teacher, rows=rows, chunk=5
        )
        torch.testing.assert_close(sliced, recomputed, atol=1e-12, rtol=0)
        for got, want in zip(
            *(
                torch.autograd.grad(2.5 * x, (hidden, weight), retain_graph=x is recomputed)
                for x in (sliced, recomputed)
            )
        ):
            torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


def test_slices_give_their_gradient_away_once_and_need_none_for_evaluation():
    hidden, weight, ids, g, e = operands(4, 6, 23)
    value = linear_token_loss(hidden, weight, ids, lambda cut, n: n.logp.sum())
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        value.backward()
    with torch.no_grad():
        assert not linear_token_loss(
            hidden, weight, ids, lambda cut, n: n.logp.sum()
        ).requires_grad


# ---- KL to a teacher


def exact_kl(hidden, weight, teacher_hidden, teacher_weight, vocabulary):
    """(KL(p||q), KL(q||p)) [N] in float64 from the first `vocabulary` rows of both heads,
    differentiable in hidden and weight."""
    p, q = (
        torch.log_softmax(h.double() @ w[:vocabulary].double().T, -1)
        for h, w in ((hidden, weight), (teacher_hidden, teacher_weight))
    )
    return (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)


def sliced_kl(hidden, weight, teacher_hidden, teacher_weight, **options):
    """linear_reverse_kl by linear_token_loss: (values, gradient of their sum by hidden and
    weight)."""
    seen = []
    ids = torch.zeros(len(hidden), 1, dtype=torch.int64)
    value = linear_token_loss(
        hidden,
        weight,
        ids,
        lambda cut, n: (seen.append(n.reverse_kl.detach()), n.reverse_kl.sum())[1],
        teacher=(teacher_hidden, teacher_weight, {}),
        rows=5,
        chunk=64,
        **options,
    )
    return torch.cat(seen), torch.autograd.grad(value, (hidden, weight))


def recomputed_kl(hidden, weight, teacher_hidden, teacher_weight, **options):
    value = linear_reverse_kl(
        hidden, weight, teacher_hidden, teacher_weight, chunk=64, **options
    )
    return value.detach(), torch.autograd.grad(value.sum(), (hidden, weight))


def rounded_kl(hidden, weight, teacher_hidden, teacher_weight):
    """The bug: logits rounded to bfloat16, float32 only after that."""
    p, q = (
        torch.log_softmax((h @ w.T).float(), -1)
        for h, w in ((hidden, weight), (teacher_hidden, teacher_weight))
    )
    value = (p.exp() * (p - q)).sum(-1)
    return value.detach(), torch.autograd.grad(value.sum(), (hidden, weight))


def near_teacher():
    hidden, weight, *_ = operands(40, 64, 500, dtype=torch.bfloat16, scale=0.4)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7))
    return (
        hidden,
        weight,
        (hidden.detach().float() + 0.01 * noise).to(torch.bfloat16),
        weight.detach(),
    )


def check_near_teacher(f):
    """A teacher close to the student, where rounding hurts most: the gradient within one
    percent."""
    hidden, weight, teacher_hidden, teacher_weight = near_teacher()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    want = torch.autograd.grad(
        exact_kl(h, w, teacher_hidden, teacher_weight, 500)[0].sum(), (h, w)
    )
    assert (
        max(
            relative(x, y)
            for x, y in zip(f(hidden, weight, teacher_hidden, teacher_weight)[1], want)
        )
        < 0.01
    )


def check_never_negative(f):
    assert f(*near_teacher())[0].min() > -1e-6


def bfloat16_softmax_kl(hidden, weight, teacher_hidden, teacher_weight):
    p, q = (
        torch.log_softmax(h @ w.T, -1)
        for h, w in ((hidden, weight), (teacher_hidden, teacher_weight))
    )
    return (p.exp() * (p - q)).sum(-1).detach(), None


def check_shared_vocabulary(f):
    """Heads of 300 and 292 rows: both are cut to 292; the missing columns are not zero logits,
    which are real probability."""
    hidden, weight, *_ = operands(6, 16, 300)
    teacher_hidden, teacher_weight = (x.detach() for x in operands(6, 12, 292, seed=1)[:2])
    for student, teacher in (
        ((hidden, weight), (teacher_hidden, teacher_weight)),
        (
            tuple(x.clone().requires_grad_() for x in (teacher_hidden, teacher_weight)),
            (hidden.detach(), weight.detach()),
        ),
    ):
        value, gradient = f(*student, *teacher)
        exact = exact_kl(*student, *teacher, 292)[0]
        torch.testing.assert_close(value, exact.detach(), atol=1e-11, rtol=0)
        for x, y in zip(gradient, torch.autograd.grad(exact.sum(), student)):
            torch.testing.assert_close(x, y, atol=1e-11, rtol=0)


def zero_logits_for_missing_rows(hidden, weight, teacher_hidden, teacher_weight):
    rows = max(len(weight), len(teacher_weight))
    longer = [
        torch.cat([w, w.new_zeros(rows - len(w), w.shape[1])]) for w in (weight, teacher_weight)
    ]
    value = exact_kl(hidden, longer[0], teacher_hidden, longer[1], rows)[0]
    return value.detach(), torch.autograd.grad(value.sum(), (hidden, weight))


KL_BUGS = {
    "Liger#1432": (check_near_teacher, rounded_kl),
    "speculators#788": (check_never_negative, bfloat16_softmax_kl),
    "Liger#634": (check_shared_vocabulary, zero_logits_for_missing_rows),
}


@pytest.mark.parametrize("f", [recomputed_kl, sliced_kl])
@pytest.mark.parametrize("bug", KL_BUGS)
def test_a_kl_bug_others_had_is_not_here(bug, f):
    KL_BUGS[bug][0](f)


@pytest.mark.parametrize("bug", KL_BUGS)
def test_the_check_notices_the_kl_bug(bug):
    with pytest.raises(AssertionError):
        KL_BUGS[bug][0](KL_BUGS[bug][1])


@pytest.mark.parametrize("f", [recomputed_kl, sliced_kl])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(temperature=0.7), dict(vocabulary=290)])
def test_an_equal_teacher_gives_zero_and_a_gradient_of_zero_to_the_bit(f, dtype, options):
    hidden, weight, *_ = operands(20, 32, 300, dtype=dtype, scale=2.0)
    value, gradient = f(hidden, weight, hidden.detach(), weight.detach(), **options)
    assert (value == 0).all() and all((x == 0).all() for x in gradient)
    rounded = (
        rounded_kl(hidden, weight, hidden.detach(), weight.detach())[0]
        if dtype != torch.bfloat16
        else None
    )
    # the naive path is 0 here too: the near teacher is what tells them apart
    assert rounded is None or rounded.abs().max() < 1e-5


def test_both_directions_and_the_teachers_own_log_probs():
    hidden, weight, ids, _, _ = operands(6, 16, 300, k=2)
    teacher_hidden, teacher_weight = (x.detach() for x in operands(6, 12, 300, seed=1)[:2])
    numbers = token_numbers(
        hidden, weight, ids, teacher=(teacher_hidden, teacher_weight, {}), chunk=64
    )
    for got, want in zip(
        (numbers.reverse_kl, numbers.forward_kl),
        exact_kl(hidden, weight, teacher_hidden, teacher_weight, 300),
    ):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)
    torch.testing.assert_close(
        numbers.teacher_logp,
        torch.log_softmax(teacher_hidden @ teacher_weight.T, -1).gather(1, ids),
        atol=1e-11,
        rtol=0,
    )
    assert not numbers.teacher_logp.requires_grad


# ---- memory


class Memory(TorchDispatchMode):
    """The largest tensor any operation returns, and the most bytes of them alive at once."""

    def __init__(self):
        self.largest, self.live, self.peak, self.known = 0, 0, 0, set()
        super().__init__()

    def _forget(self, key, size):
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.known:
                    self.known.add(key)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._forget, key, storage.nbytes())
                self.peak = max(self.peak, self.live)
        return out


def chunks_under_autograd(hidden, weight, ids, g, e, chunk=64):
    """The bug: a loop over token chunks in plain autograd, whose every chunk is kept for
    backward."""
    logp = torch.cat(
        [
            torch.log_softmax(h @ weight.T, -1).gather(1, i)
            for h, i in zip(hidden.split(16), ids.split(16))
        ]
    )
    return logp.detach(), None, *torch.autograd.grad((logp * g).sum(), (hidden, weight))


def measured(f, hidden, weight, ids, g, e, **options):
    with Memory() as memory:
        f(hidden, weight, ids, g, e, **options)
    return memory


@pytest.mark.parametrize("n, d, v", [(256, 8, 4096), (64, 32, 5000), (1000, 16, 2048)])
@pytest.mark.parametrize(
    "f, options, held",
    [
        (recompute, dict(chunk=512), lambda n, v: n * 512),
        (slices, dict(chunk=512, rows=32), lambda n, v: 32 * v),
    ],
)
def test_no_tensor_is_larger_than_the_head_or_one_chunk(f, options, held, n, d, v):
    hidden, weight, ids, g, e = operands(n, d, v, 1, torch.float32)
    memory = measured(f, hidden, weight, ids, g, e, **options)
    assert memory.largest <= max(v * d, held(n, v))
    naive = measured(plain, hidden, weight, ids, g, e)
    assert naive.largest >= n * v
    assert memory.peak < naive.peak / 2


@pytest.mark.parametrize(
    "shape", [(2048, 576, 49152), (512, 1024, 151936), (4096, 1024, 32000)]
)
def test_default_chunks_stay_below_the_head_at_real_shapes(shape):
    n, d, v = shape
    head = kernel.Head(torch.empty(v, d, device="meta"), v, 1.0, 0.0, 1.0)
    chunks = [
        stop - start
        for start, stop, _ in kernel._chunks(
            kernel.Logits(torch.empty(n, d, device="meta"), head), None, 1
        )
    ]
    # with Triton dz, in the operands' dtype, is the only array of that size
    assert sum(chunks) == v and n * max(chunks) < v * d
    rows = kernel.slice_rows(n, v)
    assert rows * v < v * d + 1 and rows >= 256 and rows * v * 4 <= max(64 << 20, 256 * v * 4)


def test_chunks_under_plain_autograd_free_nothing():
    hidden, weight, ids, g, e = operands(256, 8, 4096, 1, torch.float32)
    kept = measured(chunks_under_autograd, hidden, weight, ids, g, e).peak
    assert kept > 256 * 4096 * 4
    for f in (recompute, slices):
        assert measured(f, hidden, weight, ids, g, e).peak < kept / 4


@pytest.mark.parametrize("f", [recompute, slices])
def test_a_frozen_head_costs_nothing(f):
    """LoRA on the body, or a frozen head: no gradient of the head is formed, and no tensor of
    its size."""
    hidden, weight, ids, g, e = operands(3, 40, 900, 1, torch.float32)

    def largest(w):
        with Memory() as memory:
            if f is recompute:
                (linear_logp(hidden, w, ids, chunk=64)[0] * g).sum().backward()
            else:
                linear_token_loss(
                    hidden, w, ids, lambda cut, n: (n.logp * g[cut]).sum(), chunk=64
                ).backward()
        return memory.largest

    assert largest(weight.detach()) < 900 * 40 <= largest(weight)
    assert weight.grad is not None and hidden.grad is not None


def test_a_frozen_body_and_no_tokens_work():
    hidden, weight, ids, g, e = operands(3, 4, 9)
    (only_head,) = torch.autograd.grad(
        linear_logp(hidden.detach(), weight, ids)[0].sum(), weight
    )
    torch.testing.assert_close(
        only_head, oracle(hidden, weight, ids, torch.ones_like(g), 0 * e)[3]
    )
    empty = hidden[:0].detach().requires_grad_()
    logp, entropy = linear_logp(empty, weight, ids[:0, 0])
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert (linear_reverse_kl(empty, weight, empty.detach(), weight.detach())).shape == (0,)
    value = linear_token_loss(empty, weight, ids[:0], lambda cut, n: n.logp.sum())
    value.backward()
    assert value == 0 and (weight.grad == 0).all()


@needs_triton
def test_triton_without_tokens():
    hidden, weight, ids, g, e = operands(3, 4, 9)
    logp, entropy = linear_logp(hidden[:0], weight, ids[:0, 0], kernel="triton")
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == (0,) and (weight.grad == 0).all()


# ---- GPUs that are not here


def test_the_cuda_products_exist_with_these_types():
    """On fake CUDA tensors, which have shapes and types but no GPU: bfloat16 products that
    leave in float32."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, weight = (
            torch.empty(n, 32, device="cuda", dtype=torch.bfloat16) for n in (64, 1000)
        )
        z = torch.empty(64, 1000, device="cuda")
        assert torch.mm(hidden, weight.T, out_dtype=torch.float32, out=z) is z
        assert torch.mm(hidden, weight.T, out_dtype=torch.float32).dtype == torch.float32
        assert torch.mm(hidden, weight.T, out_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("f", [recompute, slices])
def test_the_lines_for_cuda_compute_the_same(f, monkeypatch):
    """Runs them on a CPU, with a stand-in for the one product a CPU lacks: 16-bit operands,
    sums that leave in out_dtype."""
    mm, used = torch.mm, []

    def product(a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return mm(a, b, out=out) if out is not None else mm(a, b)
        assert a.dtype == b.dtype == torch.bfloat16
        used.append(out_dtype)
        exact = mm(a.float(), b.float()).to(out_dtype)
        return exact if out is None else out.copy_(exact)

    monkeypatch.setattr(kernel, "_sums_leave_in_float32", lambda x: x.dtype in kernel.HALF)
    monkeypatch.setattr(torch, "mm", product)
    bfloat16_operands(f)
    assert set(used) == {torch.float32, torch.bfloat16} if f is recompute else {torch.float32}


@needs_triton
def test_triton_puts_tokens_on_the_axis_that_has_room():
    for n, v in ((1 << 22, 151936), (1 << 17, 32), (1, 1), (3, 151936)):
        (tokens, stretches), stretch = kernel_triton.grid(n, v)
        assert tokens * kernel_triton.TILE[0] >= n and 1 <= stretches <= 65535
        assert (
            stretches - 1
        ) * stretch < v <= stretches * stretch and stretch % kernel_triton.TILE[1] == 0


@needs_triton
def test_triton_with_more_tokens_than_grid_axis_1_has_room_for(monkeypatch):
    monkeypatch.setattr(kernel_triton, "TILE", (1024, 16, 16))
    hidden, weight, ids, g, e = operands(70000, 4, 9, dtype=torch.float32)
    close(triton(hidden, weight, ids, g, e), oracle(hidden, weight, ids, g, e), 1e-4)


@needs_triton
def test_triton_compiles_for_ampere_and_hopper_without_spilling():
    """Registers, spills and shared memory as ptxas reports them; row offsets 64 bits wide.
    Compiled, not run: there is no GPU here."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cross_compile"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(r["kernel"], r["capability"], r["dtype"], r["softcap"]) for r in rows} == {
        (name, capability, *kind)
        for name in ("statistics", "dlogits")
        for capability in (80, 90)
        for kind in (("bf16", False), ("bf16", True), ("fp32", False))
    }
    for r in rows:
        assert (
            r["registers"] <= 255
            and r["spill_bytes"] < 256
            and r["shared"] <= {80: 163 << 10, 90: 227 << 10}[r["capability"]]
        ), r
        assert (
            "arith.extsi" in r["ttir"]
            and r["ttir"].count("arith.muli")
            and "xi64>" in r["ttir"]
        )


@needs_triton
def test_an_untrustworthy_gpu_falls_back_to_torch_and_says_so(monkeypatch):
    with torch.no_grad():
        assert kernel_triton.trusted.__wrapped__(torch.device("cpu"))
    wrong = kernel_triton.forward
    monkeypatch.setattr(
        kernel_triton,
        "forward",
        lambda *a: (lambda out: (out[0]._replace(entropy=out[0].entropy * 1.1), out[1]))(
            wrong(*a)
        ),
    )
    with pytest.warns(UserWarning, match="disagree"):
        assert not kernel_triton.trusted.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(kernel_triton, "forward", lambda *a: 1 / 0)
    with pytest.warns(UserWarning, match="does not work"):
        assert not kernel_triton.trusted.__wrapped__(torch.device("cpu"))


# ---- the calls


def test_worked_examples():
    logp, entropy = linear_logp(
        torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]]), torch.tensor([1])
    )
    assert logp.item() == pytest.approx(math.log(3 / 4)) and entropy.item() == pytest.approx(
        0.5623, abs=1e-4
    )
    kl = linear_reverse_kl(
        torch.ones(1, 1),
        torch.zeros(2, 1),
        torch.ones(1, 1),
        torch.tensor([[0.0], [math.log(3)]]),
    )
    assert kl.item() == pytest.approx(0.1438, abs=1e-4)


def test_the_definition_and_all_logits_agree_with_the_oracle():
    hidden, weight, ids, g, e = operands(6, 8, 40, k=2)
    for options in (dict(), dict(softcap=2.0, scale=0.3, temperature=1.4), dict(vocabulary=33)):
        ids = ids % 33
        want = oracle(hidden, weight, ids, g, e, **options)
        close(recompute(hidden, weight, ids, g, e, kernel="naive", **options), want, 1e-11)
        z = kernel.all_logits(hidden, weight, chunk=7, **options)
        torch.testing.assert_close(
            torch.log_softmax(z, -1).gather(1, ids), want[0], atol=1e-12, rtol=0
        )
    lifted = kernel.all_logits(hidden.detach().bfloat16(), weight.detach().bfloat16())
    assert lifted.dtype == torch.float32
    torch.testing.assert_close(
        lifted,
        hidden.detach().bfloat16().float() @ weight.detach().bfloat16().float().T,
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize(
    "bad",
    [
        dict(hidden=torch.zeros(3, 3)),
        dict(ids=torch.full((3, 1), 9)),
        dict(ids=torch.full((3, 1), -1)),
        dict(ids=torch.zeros(2, 1, dtype=torch.int64)),
        dict(ids=torch.zeros(3, 1)),
        dict(hidden=torch.zeros(3, 4)),
        dict(temperature=0.0),
        dict(softcap=-1.0),
        dict(scale=0.0),
        dict(vocabulary=10),
        dict(vocabulary=0),
        dict(ids=torch.full((3, 1), 8), vocabulary=8),
        dict(chunk=0),
        dict(kernel="cuda"),
        dict(teacher=(torch.zeros(2, 4), torch.zeros(9, 4), {})),
        dict(teacher=(torch.zeros(3, 5), torch.zeros(9, 4), {})),
        dict(teacher=(torch.zeros(3, 4), torch.zeros(9, 4), {}), kernel="triton"),
    ],
)
def test_what_does_not_fit_is_refused(bad):
    hidden, weight, ids, _, _ = operands(3, 4, 9)
    arguments = dict(hidden=hidden, weight=weight, ids=ids) | bad
    with pytest.raises(ValueError, match="linear_logp: expected"):
        linear_logp(
            arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("ids"), **arguments
        )


def test_triton_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opd.kernel_triton", None)
    monkeypatch.delattr("opd.kernel_triton", raising=False)
    hidden, weight, ids, _, _ = operands(3, 4, 9)
    with pytest.raises(ImportError, match="pip install triton"):
        linear_logp(hidden, weight, ids, kernel="triton")
