"""opd/kernel.py and opd/kernel_triton.py against float64 on the same operands, and the bugs
others have had.

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
from functools import partial

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from opd import kernel
from opd.kernel import (
    TokenNumbers,
    linear_logp,
    linear_reverse_kl,
    linear_token_loss,
    token_numbers,
)

try:
    from opd import kernel_triton
except ImportError:
    kernel_triton = None
needs_triton = pytest.mark.skipif(
    kernel_triton is None, reason="triton is not installed: pip install triton"
)


# ---- implementations: (hidden, weight, ids, loss, **options) -> (numbers, dhidden, dweight)


def derived(numbers, value, *operands):
    detached = [None if x is None else x.detach() for x in numbers]
    return TokenNumbers(*detached), *torch.autograd.grad(value, operands)


def recompute(hidden, weight, ids, loss, chunk=64, **options):
    numbers = token_numbers(hidden, weight, ids, chunk=chunk, **options)
    return derived(numbers, loss(slice(None), numbers), hidden, weight)


def slices(hidden, weight, ids, loss, chunk=64, rows=3, **options):
    seen = []

    def observed(cut, numbers):
        seen.append(numbers)
        return loss(cut, numbers)

    options |= dict(chunk=chunk, rows=rows)
    value = linear_token_loss(hidden, weight, ids, observed, **options)
    whole = [None if x[0] is None else torch.cat(x) for x in zip(*seen)]
    return derived(whole, value, hidden, weight)


triton = partial(recompute, kernel="triton")
IMPLEMENTATIONS = [recompute, slices, pytest.param(triton, marks=needs_triton, id="triton")]


def logits_of(hidden, weight, vocabulary=None, temperature=1.0, scale=1.0, softcap=None):
    z = scale * (hidden @ weight[:vocabulary].T)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return z / temperature


def naive(
    hidden,
    weight,
    ids,
    loss,
    teacher=None,
    logits=logits_of,
    log_softmax=partial(torch.log_softmax, dim=-1),
    **options,
):
    """Plain autograd on all logits, with replaceable parts, from which the buggy variants are
    made."""
    log_q = None
    if teacher:
        rows = min(options.pop("vocabulary", None) or len(weight), len(teacher[1]))
        options["vocabulary"] = rows
        how = dict(temperature=options.get("temperature", 1.0), vocabulary=rows)
        log_q = log_softmax(logits(*teacher[:2], **how | teacher[2]))
    log_p = log_softmax(logits(hidden, weight, **options))
    numbers = TokenNumbers(log_p.gather(1, ids), -(log_p.exp() * log_p).sum(-1))
    if teacher:
        numbers = numbers._replace(
            teacher_logp=log_q.gather(1, ids),
            reverse_kl=(log_p.exp() * (log_p - log_q)).sum(-1),
            forward_kl=(log_q.exp() * (log_q - log_p)).sum(-1),
        )
    return derived(numbers, loss(slice(None), numbers), hidden, weight)


def oracle(hidden, weight, ids, loss, teacher=None, **options):
    """The same in float64 on the very same operands."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    if teacher:
        teacher = (teacher[0].double(), teacher[1].double(), teacher[2])
    return naive(h, w, ids, loss, teacher, **options)


# ---- operands and losses


def operands(n, d, v, k=1, dtype=torch.float64, scale=1.0, seed=0, offset=None):
    """hidden, weight and ids, whose logits lie around `offset`."""
    r = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(n, d, generator=r, dtype=torch.float64)
    weight = torch.randn(v, d, generator=r, dtype=torch.float64)
    if offset is not None:
        hidden[:, 0], weight[:, 0] = 1.0, offset
    ids = torch.randint(0, v, (n, k), generator=r)
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight)), ids


def constant(*args, **options):
    """A teacher: hidden states and a head that want no gradient."""
    return *(x.detach() for x in operands(*args, **options)[:2]), {}


def weighted(ids, *names):
    """The sum of these numbers, each token's with a weight of its own."""
    r = torch.Generator().manual_seed(1)
    pulls = {}
    for name in names:
        shape = ids.shape if name == "logp" else ids.shape[:1]
        pulls[name] = torch.randn(shape, generator=r, dtype=torch.float64)

    def loss(cut, numbers):
        return sum((getattr(numbers, n) * pull[cut]).sum() for n, pull in pulls.items())

    return loss


def total(cut, numbers):
    return numbers.logp.sum()


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


def close(got, want, values=None, gradients=None):
    """Numbers within `values`, gradients within `gradients` of their norm; None: any."""
    for x, y in zip(got[0], want[0]):
        if values is not None and y is not None:
            assert torch.isfinite(x).all() and (x.double() - y).abs().max() <= values
    for x, y in zip(got[1:], want[1:]):
        assert gradients is None or relative(x, y) <= gradients


# ---- bugs of other kernels


def agrees(hidden, weight, ids, loss=("logp", "entropy"), teacher=None, **tolerances):
    """The check that an implementation is the oracle on these operands."""
    loss = loss if callable(loss) else weighted(ids, *loss)
    more = dict(teacher=teacher) if teacher else {}

    def check(f):
        want = oracle(hidden, weight, ids, loss, **more)
        close(f(hidden, weight, ids, loss, **more), want, **tolerances)

    check.teacher = teacher
    return check


def confident():
    """p of the target is 0.998: dz there is p - 1 = -0.002, which must not come from a p that
    was rounded to 1 before."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16).requires_grad_()
    weight = torch.tensor([[6.25], [0.0]], dtype=torch.bfloat16).requires_grad_()
    return hidden, weight, torch.zeros(1, 1, dtype=torch.int64)


def thousand_and_a_bit():
    """Logits 1000 + k/1024, exact in float32: the offset leaves no trace, also not in the last
    digits."""
    r = torch.Generator().manual_seed(0)
    hidden = torch.tensor([[1.0, 1 / 1024]]).expand(4, 2).clone().requires_grad_()
    steps = torch.randint(-2000, 2000, (60,), generator=r).float()
    weight = torch.stack([torch.full((60,), 1000.0), steps], 1).requires_grad_()
    return hidden, weight, torch.randint(0, 60, (4, 1), generator=r)


def near_teacher():
    """A teacher close to the student, where rounding hurts most."""
    hidden, weight, ids = operands(40, 64, 500, dtype=torch.bfloat16, scale=0.4)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7))
    near = (hidden.detach().float() + 0.01 * noise).bfloat16()
    return hidden, weight, ids, ("reverse_kl",), (near, weight.detach(), {})


def rows_of_dz_sum_to_zero(f):
    """A head with a column of ones makes the last hidden gradient the sum of dz over the
    vocabulary, which is 0."""
    hidden, weight, ids = operands(32, 64, 300, dtype=torch.bfloat16, scale=2.5)
    with torch.no_grad():
        weight[:, -1] = 1.0
    _, dhidden, _ = f(hidden, weight, ids, total)
    assert dhidden[:, -1].abs().max() < 0.01 and dhidden.dtype == torch.bfloat16


def never_above_zero(f):
    """Near one-hot rows: log p of the certain token is 0, not more, or a ratio to it
    explodes."""
    hidden, weight, ids = operands(64, 16, 50, dtype=torch.bfloat16, scale=12.0)
    ids = (hidden.double() @ weight.double().T).argmax(-1, keepdim=True)
    numbers = f(hidden, weight, ids, weighted(ids, "logp"))[0]
    assert (numbers.logp <= 0).all() and (numbers.logp > -1e-3).any()
    assert (numbers.entropy >= -1e-6).all()
    assert numbers.logp.dtype == numbers.entropy.dtype == torch.float32


def the_tail_gets_its_gradient(f):
    """The 290 unlikely tokens, each below 2.4e-4, get exact gradients: no filter on small
    probabilities."""
    hidden, weight, ids = operands(1, 16, 300, dtype=torch.float32, offset=0.0)
    with torch.no_grad():
        weight[:10, 0], weight[:10, 1:] = 14.0, 0.0
    arguments = hidden, weight, ids % 10, weighted(ids, "logp")
    want = oracle(*arguments)[2][10:]
    assert want.abs().max() > 0 and relative(f(*arguments)[2][10:], want) < 1e-3


def never_negative(f):
    *arguments, names, teacher = near_teacher()
    numbers = f(*arguments, weighted(arguments[2], *names), teacher=teacher)[0]
    assert numbers.reverse_kl.min() > -1e-6


never_negative.teacher = True


def lifted(h, w, **options):
    return h.float() @ w.float().T


def rounded(h, w, **options):
    return (h @ w.T).float()


def maximum_from_zero(z):
    m = z.detach().amax(-1, keepdim=True).clamp(min=0)
    return z - m - (z - m).exp().sum(-1, keepdim=True).log()


def normaliser_from_rounded_logits(z):
    """log s is of rounded logits; backward computes p again from float32 logits and this s."""
    lse = torch.logsumexp(z.detach().bfloat16().float(), -1, keepdim=True)
    s = (z - lse).exp().sum(-1, keepdim=True)
    return z - lse - (s - s.detach())


def with_dz(change):
    """log_softmax with a changed gradient."""

    def log_softmax(z):
        if z.requires_grad:
            z.register_hook(lambda dz: change(z, dz))
        return torch.log_softmax(z, -1)

    return log_softmax


def zero_rows(h, w, **_):
    """Logits of a head that is padded with rows of 0 to a multiple of 128."""
    return torch.nn.functional.pad(h @ w.T, (0, -len(w) % 128))


HALF = dict(dtype=torch.bfloat16)
SINGLE = dict(dtype=torch.float32)
BUGS = {
    # V is one more than a tile: padding columns must not add e^0 to the sum
    "verl#2656": (
        agrees(
            *operands(5, 8, 129, scale=3.0, offset=-30.0, **SINGLE), values=2e-5, gradients=2e-5
        ),
        partial(naive, logits=zero_rows),
    ),
    # a running maximum that starts at 0 leaves e^-120 = 0 in float32
    "maximum from 0": (
        agrees(
            *operands(5, 8, 65, scale=0.3, offset=-120.0, **SINGLE), values=1e-4, gradients=1e-4
        ),
        partial(naive, log_softmax=maximum_from_zero),
    ),
    "Liger#1432": (
        agrees(
            *operands(48, 96, 700, scale=0.4, **HALF),
            loss=["logp"],
            values=1e-4,
            gradients=5e-3,
        ),
        partial(naive, logits=rounded),
    ),
    "marin#8217": (
        rows_of_dz_sum_to_zero,
        partial(naive, logits=lifted, log_softmax=normaliser_from_rounded_logits),
    ),
    "CCE#55": (
        never_above_zero,
        partial(naive, logits=lifted, log_softmax=normaliser_from_rounded_logits),
    ),
    "Liger#1329": (
        agrees(*confident(), loss=total, gradients=0.01),
        partial(
            naive,
            logits=lifted,
            log_softmax=with_dz(lambda z, dz: 1 - (1 - dz).bfloat16().float()),
        ),
    ),
    "pytorch#195829": (
        agrees(*thousand_and_a_bit(), values=4e-6),
        partial(naive, log_softmax=lambda z: z - torch.logsumexp(z, -1, keepdim=True)),
    ),
    "CCE#14": (
        the_tail_gets_its_gradient,
        partial(
            naive,
            log_softmax=with_dz(lambda z, dz: dz.masked_fill(z.softmax(-1) < 2.4e-4, 0.0)),
        ),
    ),
    "Liger#1432, KL": (
        agrees(*near_teacher(), gradients=0.01),
        partial(naive, logits=rounded),
    ),
    "speculators#788": (never_negative, naive),  # all of it in bfloat16
}


@pytest.mark.parametrize("f", IMPLEMENTATIONS)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_others_had_is_not_here(bug, f):
    check, _ = BUGS[bug]
    if f is not triton or getattr(check, "teacher", None) is None:
        check(f)


@pytest.mark.parametrize("bug", BUGS)
def test_the_check_notices_the_bug(bug):
    check, buggy = BUGS[bug]
    with pytest.raises(AssertionError):
        check(buggy)


# ---- every number and gradient


def curved(cut, n):
    """Curved in every number, so each token's upstream gradient depends on all of them."""
    value = n.logp.pow(2).sum(1) + n.entropy.sin()
    if n.reverse_kl is not None:
        value = value + n.reverse_kl.pow(2) - (n.forward_kl * n.teacher_logp.sum(1) / 99).exp()
    return value.sum()


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.7),
        dict(scale=-1.3),
        dict(softcap=2.5, scale=0.5, temperature=1.7),
        dict(vocabulary=70),
    ],
)
@pytest.mark.parametrize(
    "f, how",
    [
        (recompute, dict(chunk=1)),
        (recompute, dict(chunk=60)),
        (recompute, dict(kernel="naive")),
        (slices, dict(chunk=60, rows=30)),
        pytest.param(triton, dict(chunk=100), marks=needs_triton),
    ],
)
def test_every_number_and_gradient_alone_and_together_is_that_of_float64(f, how, options):
    """Chunks, slices and tiles that divide neither N nor V nor D; repeated ids; a teacher whose
    head has two rows more."""
    hidden, weight, ids = operands(70, 80, 130, k=3, scale=0.3)
    ids = ids % 70
    ids[:, 1] = ids[:, 0]
    teacher = *constant(70, 5, 132, seed=1)[:2], {"softcap": 3.0}
    losses = [curved, weighted(ids, "logp"), weighted(ids, "entropy")]
    cases = [(loss, {}) for loss in losses]
    if f is not triton:
        losses += [weighted(ids, "reverse_kl"), weighted(ids, "forward_kl")]
        cases += [(loss, dict(teacher=teacher)) for loss in losses]
    # Triton passes scale, softcap and temperature as float32
    tolerance = 1e-6 if f is triton else 1e-10
    for loss, more in cases:
        got = f(hidden, weight, ids, loss, **how, **options, **more)
        want = oracle(hidden, weight, ids, loss, **options, **more)
        close(got, want, tolerance, tolerance)
        if "vocabulary" in options:
            # padding rows of the head are no tokens: no mass, no gradient
            assert (got[2][70:] == 0).all()


def test_slices_give_their_gradient_away_once_and_need_none_for_evaluation():
    hidden, weight, ids = operands(4, 6, 23)
    value = linear_token_loss(hidden, weight, ids, total)
    (2.5 * value).backward(retain_graph=True)
    want = oracle(hidden, weight, ids, total)
    assert relative(hidden.grad, 2.5 * want[1]) < 1e-11
    with pytest.raises(RuntimeError, match="backward once"):
        value.backward()
    with torch.no_grad():
        assert not linear_token_loss(hidden, weight, ids, total).requires_grad


@pytest.mark.parametrize("f", [recompute, slices])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(temperature=0.7, vocabulary=290)])
def test_an_equal_teacher_gives_zero_and_a_gradient_of_zero_to_the_bit(f, dtype, options):
    hidden, weight, ids = operands(20, 32, 300, dtype=dtype, scale=2.0)
    options |= dict(teacher=(hidden.detach(), weight.detach(), {}))
    loss = weighted(ids, "reverse_kl")
    numbers, *gradients = f(hidden, weight, ids % 290, loss, **options)
    assert all((x == 0).all() for x in (numbers.reverse_kl, *gradients))


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


def chunks_under_autograd(hidden, weight, ids, loss):
    """The bug: a loop over token chunks in plain autograd, whose every chunk is kept for
    backward."""
    chunks = zip(hidden.split(16), ids.split(16))
    parts = [torch.log_softmax(h @ weight.T, -1).gather(1, i) for h, i in chunks]
    numbers = TokenNumbers(torch.cat(parts), None)
    return derived(numbers, loss(slice(None), numbers), hidden, weight)


@pytest.mark.parametrize("n, d, v", [(256, 8, 4096), (1000, 16, 2048)])
def test_no_tensor_is_larger_than_the_head_or_one_chunk(n, d, v):
    arguments = operands(n, d, v, 1, torch.float32)
    loss = weighted(arguments[2], "logp")

    def measured(f, **options):
        with Memory() as memory:
            f(*arguments, loss, **options)
        return memory

    kept = measured(chunks_under_autograd).peak
    assert kept > n * v * 4
    for f, options, held in (
        (recompute, dict(chunk=128), n * 128),
        (slices, dict(chunk=512, rows=32), 32 * v),
    ):
        memory = measured(f, **options)
        assert memory.largest <= max(v * d, held)
        assert memory.peak < kept / 3


@pytest.mark.parametrize(
    "n, d, v", [(2048, 576, 49152), (512, 1024, 151936), (4096, 1024, 32000)]
)
def test_default_chunks_stay_below_the_head_at_real_shapes(n, d, v):
    head = kernel.Head(torch.empty(v, d, device="meta"), v, 1.0, 0.0, 1.0)
    logits = kernel.Logits(torch.empty(n, d, device="meta"), head)
    chunks = [stop - start for start, stop, _ in kernel._chunks(logits, None, 1)]
    # with Triton dz, in the operands' dtype, is the only array of that size
    assert sum(chunks) == v and n * max(chunks) < v * d
    rows = kernel.slice_rows(n, v)
    assert rows >= 256 and rows <= d and rows * v * 4 <= max(64 << 20, 256 * v * 4)


@pytest.mark.parametrize("f", [token_numbers, linear_token_loss])
def test_a_frozen_head_costs_nothing(f):
    """LoRA on the body, or a frozen head: no gradient of the head is formed, and no tensor of
    its size."""
    hidden, weight, ids = operands(3, 40, 900, 1, torch.float32)

    def largest(w):
        with Memory() as memory:
            if f is token_numbers:
                f(hidden, w, ids, chunk=64).logp.sum().backward()
            else:
                f(hidden, w, ids, total, chunk=64).backward()
        return memory.largest

    assert largest(weight.detach()) < 900 * 40 <= largest(weight)
    assert weight.grad is not None and hidden.grad is not None


def test_a_frozen_body_works():
    hidden, weight, ids = operands(3, 4, 9)
    linear_logp(hidden.detach(), weight, ids)[0].sum().backward()
    assert relative(weight.grad, oracle(hidden, weight, ids, total)[2]) < 1e-11


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=needs_triton)])
def test_no_tokens_work(kernel):
    hidden, weight, ids = operands(3, 4, 9)
    empty = hidden[:0].detach().requires_grad_()
    logp, entropy = linear_logp(empty, weight, ids[:0, 0], kernel=kernel)
    assert logp.shape == entropy.shape == (0,)
    value = linear_token_loss(empty, weight, ids[:0], total, kernel=kernel)
    (logp.sum() + entropy.sum() + value).backward()
    assert value == 0 and (weight.grad == 0).all()
    assert linear_reverse_kl(empty, weight, empty.detach(), weight.detach()).shape == (0,)


# ---- GPUs that are not here


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
    check, _ = BUGS["Liger#1432"]
    check(f)
    assert set(used) == {torch.float32, torch.bfloat16} if f is recompute else {torch.float32}


@needs_triton
def test_triton_puts_tokens_on_the_axis_that_has_room():
    for n, v in ((1 << 22, 151936), (1 << 17, 32), (1, 1), (3, 151936)):
        (tokens, stretches), stretch = kernel_triton.grid(n, v)
        assert tokens * kernel_triton.TILE[0] >= n and 1 <= stretches <= 65535
        assert (stretches - 1) * stretch < v <= stretches * stretch
        assert stretch % kernel_triton.TILE[1] == 0


@needs_triton
def test_triton_compiles_for_ampere_and_hopper_without_spilling():
    """Registers, spills and shared memory as ptxas reports them; row offsets 64 bits wide.
    Compiled, not run: there is no GPU here."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    how = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    done = subprocess.run([sys.executable, "-m", "tests.cross_compile"], **how)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    compiled = {(r["kernel"], r["capability"]) for r in rows}
    assert compiled == {(name, c) for name in ("statistics", "dlogits") for c in (80, 90)}
    for r in rows:
        assert r["registers"] <= 255 and r["spill_bytes"] < 256, r
        assert r["shared"] <= {80: 163 << 10, 90: 227 << 10}[r["capability"]], r
        assert "arith.extsi" in r["ttir"] and "xi64>" in r["ttir"]
        assert r["ttir"].count("arith.muli")


@needs_triton
def test_an_untrustworthy_gpu_falls_back_to_torch_and_says_so(monkeypatch):
    trusted = partial(kernel_triton.trusted.__wrapped__, torch.device("cpu"))
    right = kernel_triton.forward

    def wrong(*args):
        numbers, normalisers = right(*args)
        return numbers._replace(entropy=numbers.entropy * 1.1), normalisers

    with torch.no_grad():
        assert trusted()
    for forward, said in ((wrong, "disagree"), (lambda *a: 1 / 0, "does not work")):
        monkeypatch.setattr(kernel_triton, "forward", forward)
        with pytest.warns(UserWarning, match=said):
            assert not trusted()


# ---- the calls


def test_worked_examples():
    one, flat, steep = torch.ones(1, 1), torch.zeros(2, 1), torch.tensor([[0.0], [math.log(3)]])
    numbers = (
        *linear_logp(one, steep, torch.tensor([1])),
        linear_reverse_kl(one, flat, one, steep),
    )
    assert torch.cat(numbers).tolist() == pytest.approx([-0.2877, 0.5623, 0.1438], abs=1e-4)


@pytest.mark.parametrize(
    "bad",
    [
        dict(hidden=torch.zeros(3, 3)),
        dict(ids=torch.full((3, 1), 9)),
        dict(ids=torch.zeros(2, 1, dtype=torch.int64)),
        dict(ids=torch.zeros(3, 1)),
        dict(temperature=0.0),
        dict(softcap=-1.0),
        *({name: 0} for name in ("scale", "vocabulary", "chunk")),
        dict(kernel="cuda"),
        dict(teacher=constant(2, 4, 9)),
        dict(teacher=(torch.zeros(3, 5), torch.zeros(9, 4), {})),
        dict(teacher=constant(3, 4, 9), kernel="triton"),
    ],
)
def test_what_does_not_fit_is_refused(bad):
    hidden, weight, ids = operands(3, 4, 9)
    arguments = dict(hidden=hidden, weight=weight, ids=ids) | bad
    with pytest.raises(ValueError, match="linear_logp: expected"):
        linear_logp(**arguments)
