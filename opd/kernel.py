"""The fused log-prob kernel: hidden states x language-model head -> log-probs, entropy, KL to a
teacher, without the logits.

A language model ends in logits = hidden @ head.T, an array of [tokens, vocabulary] numbers:
2048 tokens of a 49,152-word vocabulary are 400 MB in float32, and the usual
`log_softmax(logits).gather(ids)` holds several of them for the backward pass.  A distillation
loss wants only a few numbers a token.  So this file walks the vocabulary in chunks that stay in
the cache, keeps some running sums a token, and forms the gradients of hidden states and head
chunk by chunk.

    linear_logp         log-probs of chosen tokens and the entropy; chunks are computed again in
                        the backward pass: 4 matrix products
    linear_reverse_kl   KL to a teacher over the whole vocabulary, from its hidden states and
                        head: 6 products
    linear_token_loss   any sum over tokens of a loss of these numbers, and its gradient, in one
                        pass: 3 products, with a teacher 4.  It walks slices of tokens and keeps
                        the logits of one, so a loss must not mix tokens of two slices.

Logits stay float32 from the matrix product to the subtraction of the maximum, also for bfloat16
weights: rounding them first costs a fifth of a KL's gradient when student and teacher are close
(bench/kernel.py).  Only dz, the logits' gradient, is rounded.

The mathematics, for one token: logits z_j = softcap(scale hidden . head_j) / temperature, p =
softmax(z); z', q, m', s' are the teacher's; d_j = (z_j - m) - (z'_j - m').

    forward    m = max z     s = sum_j e^(z_j - m)     a = sum_j e^(z_j - m) (z_j - m)
               log p_y = (z_y - m) - log s             entropy H = log s - a / s
               b = sum_j e^(z_j - m) d_j               KL(p||q) = b / s - log s + log s'
               c = -sum_j e^(z'_j - m') d_j            KL(q||p) = c / s' - log s' + log s

    next       the maxima move to m_new; with t = m - m_new and t' = m' - m'_new, before the
    chunk      chunk's own terms are added:
               s <- e^t s                              a <- e^t (a + t s)
               b <- e^t (b + (t - t') s)               c <- e^t' (c + (t' - t) s')

    backward   upstream gradients g_k on log p_(id_k), e on H, u on KL(p||q), v on KL(q||p),
               g = sum_k g_k:
               dz_j = sum_k g_k [j = id_k] - v q_j
                      + p_j (-g - e (log p_j + H) + u (log p_j - log q_j - KL(p||q)) + v)
               dx = dz scale / temperature             (times 1 - tanh^2 with a softcap)
               dhidden = dx @ head                     dhead = dx.T @ hidden

m and log s are kept apart: added up, at |z| = 300 they would have lost half of their digits.

Simplifications: 1. one device, the head is not sharded; 2. no double backward; 3. no
Jensen-Shannon divergence: its mixture needs both normalisers before the first term, so it does
not come out of the same pass.
"""

import math
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch.linalg import vecdot

KERNELS = ("auto", "torch", "triton", "naive")
HALF = (torch.bfloat16, torch.float16)
# logits that linear_token_loss stores: 64 MB in float32
STORED = 16 << 20
# numbers in one chunk: what a CPU's cache holds, what keeps a GPU busy
CHUNK = {"cpu": 1 << 20, "cuda": 16 << 20}


class TokenNumbers(NamedTuple):
    """What a loss may want to know of each token, float32 (float64 for float64 operands), in
    nats, all differentiable but `teacher_logp`.  The last three are None without a teacher."""

    logp: torch.Tensor  # [N, K] log p at the ids
    entropy: torch.Tensor  # [N]
    teacher_logp: torch.Tensor = None  # [N, K] log q at the ids
    reverse_kl: torch.Tensor = None  # [N] KL(p || q), student || teacher
    forward_kl: torch.Tensor = None  # [N] KL(q || p)


class Head(NamedTuple):
    """z = outer cap tanh(inner x / cap), x = hidden @ weight[:vocabulary].T; without a cap z =
    outer inner x."""

    weight: torch.Tensor
    vocabulary: int
    inner: float
    cap: float
    outer: float

    def squash_(self, x):
        if self.cap:
            return x.mul_(self.inner / self.cap).tanh_().mul_(self.cap * self.outer)
        return x.mul_(self.inner * self.outer) if self.inner * self.outer != 1 else x

    def chain_(self, dz, z):
        """The gradient of the logits becomes that of x, in place."""
        if self.cap:
            dz.mul_(torch.square(z / (self.cap * self.outer)).neg_().add_(1))
        return dz.mul_(self.inner * self.outer) if self.inner * self.outer != 1 else dz


def _sums_leave_in_float32(x):
    """Whether a matrix product of x's kind can hand out its float32 sums: of 16-bit numbers, on
    CUDA (torch.mm's out_dtype)."""
    return x.is_cuda and x.dtype in HALF


class Logits:
    """The logits of some tokens, a chunk of the vocabulary at a time: computed on every call,
    or once and `store`d.

    Forward and backward both come here, so they see the same numbers to the last bit."""

    def __init__(self, hidden, head, store=None):
        self.hidden = hidden
        self.head = head
        self.store = store
        self.stored = 0  # columns of the store that are filled
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.lifted = hidden if _sums_leave_in_float32(hidden) else hidden.to(self.dtype)

    def chunk(self, start, stop, scratch):
        """z [N, stop - start], in the store or else in `scratch`."""
        z = scratch
        if self.store is not None:
            z = self.store[len(scratch) * start : len(scratch) * stop].view_as(scratch)
        if stop <= self.stored:
            return z
        rows = self.head.weight[start:stop]
        if _sums_leave_in_float32(rows):
            torch.mm(self.lifted, rows.T, out_dtype=self.dtype, out=z)
        else:
            # a CPU product of bfloat16 matrices rounds its result: lift one chunk of the head,
            # never all of it
            torch.mm(self.lifted, rows.to(self.dtype).T, out=z)
        if self.store is not None:
            self.stored = stop
        return self.head.squash_(z)


def _chunks(logits, chunk, arrays, dtype=None):
    """Yields (start, stop, scratch arrays [N, stop - start]) over the vocabulary; all chunks
    share the arrays' memory."""
    n, vocabulary = len(logits.hidden), logits.head.vocabulary
    if chunk is None:
        numbers = CHUNK["cuda" if logits.hidden.is_cuda else "cpu"]
        chunk = max(256, numbers // max(1, n))
    chunk = min(chunk, vocabulary)
    options = {"dtype": dtype or logits.dtype, "device": logits.hidden.device}
    memory = [torch.empty(n * chunk, **options) for _ in range(arrays)]
    for start in range(0, vocabulary, chunk):
        stop = min(start + chunk, vocabulary)
        yield start, stop, [flat[: n * (stop - start)].view(n, stop - start) for flat in memory]


def _exp(x, out):
    """e^x into `out`; as a power of 2, because torch's exp on a CPU takes five times longer,
    fifty where it underflows."""
    return torch.mul(x, 1 / math.log(2), out=out).exp2_()


def _inside(ids, start, stop):
    """(ids as columns of the chunk, which of them fall into it)."""
    return (ids - start).clamp(0, stop - start - 1), (ids >= start) & (ids < stop)


def _forward(student, teacher, ids, chunk):
    """One walk over the vocabulary -> (TokenNumbers, the normalisers m, log s, m', log s').
    student, teacher: Logits (or None)."""
    m = torch.full((len(ids),), -torch.inf, dtype=student.dtype, device=ids.device)
    t_m, (s, a, b, c, t_s) = m, torch.zeros(5, len(ids), dtype=student.dtype, device=ids.device)
    at_ids, t_at_ids = torch.zeros(2, *ids.shape, dtype=student.dtype, device=ids.device)
    for start, stop, (z, x, e, *more) in _chunks(student, chunk, 5 if teacher else 3):
        columns, inside = _inside(ids, start, stop)
        z = student.chunk(start, stop, z)
        at_ids += torch.where(inside, z.gather(1, columns), 0.0)
        m_new = torch.maximum(m, z.amax(1))
        t = torch.where(s > 0, m - m_new, 0.0)  # 0 in the first chunk, where m is -inf
        torch.sub(z, m_new[:, None], out=x)
        _exp(x, e)
        if teacher:
            t_z, d = teacher.chunk(start, stop, more[0]), more[1]
            t_at_ids += torch.where(inside, t_z.gather(1, columns), 0.0)
            t_m_new = torch.maximum(t_m, t_z.amax(1))
            t_t = torch.where(t_s > 0, t_m - t_m_new, 0.0)
            torch.sub(t_z, t_m_new[:, None], out=d).neg_().add_(x)
            b = t.exp() * (b + (t - t_t) * s) + vecdot(e, d)
        a = t.exp() * (a + t * s) + vecdot(e, x)
        s = t.exp() * s + e.sum(1)
        m = m_new
        if teacher:
            _exp(x.sub_(d), e)
            c = t_t.exp() * (c + (t_t - t) * t_s) - vecdot(e, d)
            t_s = t_t.exp() * t_s + e.sum(1)
            t_m = t_m_new
    log_s, t_log_s = s.log(), t_s.log()
    numbers = TokenNumbers(at_ids - m[:, None] - log_s[:, None], log_s - a / s)
    if teacher:
        numbers = numbers._replace(
            teacher_logp=t_at_ids - t_m[:, None] - t_log_s[:, None],
            reverse_kl=b / s - log_s + t_log_s,
            forward_kl=c / t_s - t_log_s + log_s,
        )
    return numbers, (m, log_s, t_m, t_log_s)


def _backward(student, teacher, ids, numbers, normalisers, grads, chunk, d_hidden, d_weight):
    """Adds the gradients for upstream `grads` (a TokenNumbers; None where there is none) to
    d_hidden and d_weight, if given."""
    g, e, _, u, v = grads
    m, log_s, t_m, t_log_s = (x[:, None] for x in normalisers)
    # the part of p_j's factor that is the same in every column
    row = torch.zeros_like(log_s[:, 0])
    for part in (
        None if g is None else -g.sum(1),
        None if e is None else -e * numbers.entropy,
        None if u is None else -u * numbers.reverse_kl,
        v,
    ):
        row = row if part is None else row + part
    for start, stop, (z, x, dz, *more) in _chunks(student, chunk, 5 if teacher else 3):
        z = student.chunk(start, stop, z)
        torch.sub(z, m, out=x).sub_(log_s)  # log p
        _exp(x, dz)
        if u is not None or v is not None:
            # log q
            y = torch.sub(teacher.chunk(start, stop, more[0]), t_m, out=more[1]).sub_(t_log_s)
        if u is not None:  # log p - log q comes first: for an equal teacher it is 0 to the bit
            factor = (x - y).mul_(u[:, None])
            if e is not None:
                factor.addcmul_(x, e[:, None], value=-1)
            dz.mul_(factor.add_(row[:, None]))
        elif e is not None:
            dz.mul_(x.mul_(-e[:, None]).add_(row[:, None]))
        else:
            dz.mul_(row[:, None])
        if v is not None:
            dz.sub_(_exp(y, x).mul_(v[:, None]))
        if g is not None:
            columns, inside = _inside(ids, start, stop)
            dz.scatter_add_(1, columns, torch.where(inside, g, 0.0))  # ids may repeat
        student.head.chain_(dz, z)
        if d_hidden is not None:
            _add_product(d_hidden, dz, student.head.weight[start:stop])
        if d_weight is not None:
            _add_product(d_weight[start:stop], dz.T, student.hidden)


def _add_product(out, dz, operand):
    """out += dz @ operand, summed in float32; dz is rounded to the operand's dtype where such
    products are fast."""
    if operand.dtype not in HALF:
        out.addmm_(dz, operand)
    elif _sums_leave_in_float32(operand):
        out += torch.mm(dz.to(operand.dtype), operand, out_dtype=out.dtype)
    elif operand.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        out += torch.mm(dz.to(operand.dtype), operand)
    else:
        out += torch.mm(dz, operand.to(dz.dtype)).to(out.dtype)


class _Recompute(torch.autograd.Function):
    """hidden, weight -> the five fields of TokenNumbers; nothing of the vocabulary's size is
    kept for backward."""

    @staticmethod
    def forward(ctx, hidden, weight, ids, head, teacher, chunk, triton):
        walk = triton.forward if triton else _forward
        numbers, normalisers = walk(
            Logits(hidden, head), Logits(*teacher) if teacher else None, ids, chunk
        )
        ctx.save_for_backward(
            hidden, weight, ids, *normalisers, *(x for x in numbers if x is not None)
        )
        ctx.constants = head, teacher, chunk, triton
        # an unused output arrives as None in backward and costs nothing
        ctx.set_materialize_grads(False)
        if teacher:
            ctx.mark_non_differentiable(numbers.teacher_logp)
        return tuple(numbers)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        hidden, weight, ids, *normalisers = ctx.saved_tensors[:7]
        head, teacher, chunk, triton = ctx.constants
        head = head._replace(weight=weight)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if all(g is None for g in grads):
            return (None,) * 7
        d_hidden = None
        if needs_hidden:
            d_hidden = torch.zeros_like(hidden, dtype=normalisers[0].dtype)
        # a frozen head costs nothing; every row is written once
        d_weight = torch.zeros_like(weight) if needs_weight else None
        walk = triton.backward if triton else _backward
        walk(
            Logits(hidden, head),
            Logits(*teacher) if teacher else None,
            ids,
            TokenNumbers(*ctx.saved_tensors[7:]),
            normalisers,
            TokenNumbers(*grads),
            chunk,
            d_hidden,
            d_weight,
        )
        if needs_hidden:
            d_hidden = d_hidden.to(hidden.dtype)
        return d_hidden, d_weight, *[None] * 5


class _TokenLoss(torch.autograd.Function):
    """hidden, weight -> sum of loss_fn over slices of tokens; its gradient is formed in the
    same pass."""

    @staticmethod
    def forward(ctx, hidden, weight, ids, head, teacher, chunk, rows, loss_fn):
        dtype = Logits(hidden[:0], head).dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = None
        d_weight = None
        if needs_hidden:
            d_hidden = torch.zeros_like(hidden, dtype=dtype)
        if needs_weight:
            one_slice = rows >= len(ids)
            # several slices add up in float32
            d_weight = torch.zeros_like(weight, dtype=weight.dtype if one_slice else dtype)
        size = min(rows, len(ids)) * head.vocabulary
        stores = [hidden.new_empty(size, dtype=dtype) for _ in range(2 if teacher else 1)]
        total = hidden.new_zeros((), dtype=dtype)
        for start in range(0, len(ids), rows):
            cut = slice(start, min(start + rows, len(ids)))
            student = Logits(hidden[cut], head, stores[0])
            slice_teacher = Logits(teacher[0][cut], teacher[1], stores[1]) if teacher else None
            numbers, normalisers = _forward(student, slice_teacher, ids[cut], chunk)
            leaves = [x.requires_grad_() for x in numbers if x is not None]
            with torch.enable_grad():
                loss = loss_fn(cut, numbers)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            total += loss.detach()
            _backward(
                student,
                slice_teacher,
                ids[cut],
                numbers,
                normalisers,
                TokenNumbers(*grads),
                chunk,
                d_hidden[cut] if needs_hidden else None,
                d_weight,
            )
        ctx.grads = [
            None if d is None else d.to(x.dtype)
            for d, x in ((d_hidden, hidden), (d_weight, weight))
        ]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError(
                "linear_token_loss: its gradient is formed once and given away: call "
                "backward once"
            )
        grads, ctx.grads = ctx.grads, None
        if grad.is_cuda or grad != 1:
            grads = [None if d is None else d.mul_(grad) for d in grads]
        return *grads, *[None] * 6


# ---- the calls


def _refuse(expected, got):
    raise ValueError(f"linear_logp: expected {expected}, got {got}")


def _checked_head(hidden, weight, vocabulary, temperature, scale=1.0, softcap=None):
    """The Head of one model; refuses shapes, dtypes and numbers that do not fit."""
    shapes = f"{tuple(hidden.shape)} {hidden.dtype} and {tuple(weight.shape)} {weight.dtype}"
    wanted = "hidden [N, D] and weight [V, D] of one dtype"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.dtype != weight.dtype:
        _refuse(wanted, shapes)
    if hidden.shape[1] != weight.shape[1]:
        _refuse(wanted, shapes)
    scaled = math.isfinite(scale) and scale != 0
    if temperature <= 0 or not scaled or (softcap is not None and softcap <= 0):
        _refuse(
            "temperature and softcap above 0 and a scale that is not 0",
            f"{temperature}, {softcap} and {scale}",
        )
    return Head(weight, vocabulary, float(scale), float(softcap or 0), 1 / temperature)


def _check_ids(ids, tokens, vocabulary):
    """ids are int64 [tokens, K] in [0, vocabulary); a GPU's are not looked at, as that would
    stop its queue."""
    if ids.dim() != 2 or len(ids) != tokens or ids.dtype != torch.int64:
        _refuse(f"int64 ids [{tokens}] or [{tokens}, K]", f"{tuple(ids.shape)} {ids.dtype}")
    if ids.is_cuda or not ids.numel():
        return
    least = int(ids.min())
    largest = int(ids.max())
    if least < 0 or largest >= vocabulary:
        _refuse(f"ids in [0, {vocabulary})", f"{least} to {largest}")


def _choose_kernel(kernel, hidden, teacher):
    """The kernel that "auto" means here; refuses one that cannot do what is asked."""
    if kernel not in KERNELS:
        _refuse(f"a kernel of {', '.join(KERNELS)}", f"{kernel!r}")
    if kernel == "triton" and teacher is not None:
        _refuse("kernel 'auto' or 'torch' for the KL to a teacher", "'triton'")
    if kernel != "auto":
        return kernel
    if not hidden.is_cuda or teacher is not None or not find_spec("triton"):
        return "torch"
    return "triton" if _triton().trusted(hidden.device) else "torch"


def _prepare(
    hidden,
    weight,
    ids,
    rows=None,
    *,
    temperature=1.0,
    scale=1.0,
    softcap=None,
    vocabulary=None,
    teacher=None,
    chunk=None,
    kernel="auto",
):
    """Options as token_numbers explains them -> (Head, teacher as (hidden, Head) or None,
    chunk, kernel); bad ones raise ValueError."""
    vocabulary = len(weight) if vocabulary is None else vocabulary
    if not 0 < vocabulary <= len(weight):
        _refuse(f"a vocabulary of 1 to {len(weight)} tokens, the rows of weight", vocabulary)
    if teacher is not None:
        t_hidden, t_weight, t_options = teacher
        if len(t_hidden) != len(hidden):
            _refuse(f"teacher hidden states of {len(hidden)} tokens", len(t_hidden))
        vocabulary = min(vocabulary, len(t_weight))
        t_head = _checked_head(
            t_hidden, t_weight.detach(), vocabulary, temperature, **t_options
        )
        teacher = (t_hidden.detach(), t_head)
    _check_ids(ids, len(hidden), vocabulary)
    if any(size is not None and size < 1 for size in (chunk, rows)):
        _refuse("chunk and rows of at least 1", f"{chunk} and {rows}")
    kernel = _choose_kernel(kernel, hidden, teacher)
    head = _checked_head(hidden, weight, vocabulary, temperature, scale, softcap)
    return head, teacher, chunk, kernel


def _triton():
    try:
        from opd import kernel_triton
    except ImportError as error:
        raise ImportError(f"kernel triton: `pip install triton` first ({error})") from None
    return kernel_triton


def token_numbers(hidden, weight, ids, **options):
    """TokenNumbers, recomputed in backward.  `linear_logp` and `linear_reverse_kl` are its two
    common cases.

    hidden [N, D], weight [V, D]: float32, bfloat16, float16 or float64, of one dtype.  ids [N,
    K] int64, in [0, vocabulary). temperature, scale, softcap: logits are softcap * tanh(scale *
    hidden @ weight.T / softcap) / temperature, of a teacher too. vocabulary: rows of `weight`
    from here on are padding and take no probability (default: all V are tokens). teacher:
    (hidden [N, D'], weight [V', D'], {"scale": ..., "softcap": ...}), constant; both
    vocabularies are cut to the shorter. chunk: vocabulary columns held at a time (default: some
    MB). kernel: one of KERNELS; "auto" is "triton" on a GPU where it works and there is no
    teacher, else "torch". Raises ValueError on what does not fit (ids are looked at on a CPU
    only: on a GPU that would stop the queue)."""
    head, teacher, chunk, kernel = _prepare(hidden, weight, ids, **options)
    if kernel == "naive":
        return naive(hidden, head, ids, teacher)
    triton = _triton() if kernel == "triton" else None
    return TokenNumbers(*_Recompute.apply(hidden, weight, ids, head, teacher, chunk, triton))


def linear_logp(hidden, weight, ids, **options):
    """Log-probs of chosen tokens and the entropy of the whole distribution, both
    differentiable: (logp of ids' shape, entropy [N]).

    ids: int64, [N] (the sampled token) or [N, K] (say a teacher's top K; repeats are allowed);
    options as for token_numbers.

    Worked example: hidden [[1]], weight [[0], [log 3]] gives p = (1/4, 3/4); ids [1] gives
    logp = log 3/4 = -0.2877 and entropy = 0.5623."""
    numbers = token_numbers(hidden, weight, ids if ids.dim() == 2 else ids[:, None], **options)
    return (numbers.logp if ids.dim() == 2 else numbers.logp[:, 0]), numbers.entropy


def linear_reverse_kl(
    hidden, weight, teacher_hidden, teacher_weight, *, teacher_options=None, **options
):
    """KL(student || teacher) of every token over the whole shared vocabulary, [N]; for equal
    operands exactly 0, and so is its gradient.  (token_numbers gives the other direction from
    the same pass.)

    Worked example: hidden [[1]], weight [[0], [0]] and the teacher's [[0], [log 3]] give
    KL((1/2, 1/2) || (1/4, 3/4)) = 0.1438."""
    ids = torch.zeros(len(hidden), 0, dtype=torch.int64, device=hidden.device)
    return token_numbers(
        hidden,
        weight,
        ids,
        teacher=(teacher_hidden, teacher_weight, teacher_options or {}),
        **options,
    ).reverse_kl


def linear_token_loss(hidden, weight, ids, loss_fn, *, rows=None, **options):
    """sum over slices of loss_fn(tokens, numbers): a scalar, whose gradient is ready when it
    returns.

    loss_fn takes a slice of the N tokens and their TokenNumbers and returns the sum of their
    weighted losses, by plain autograd. What a token adds must not depend on the numbers of a
    token in another slice, and nothing else in it may need a gradient. rows: tokens a slice
    (default: 64 MB of logits, but at least 256); other options as for token_numbers.  Of the
    kernels, "triton" and "naive" do not work in slices: with them loss_fn is called once, on
    all tokens."""
    head, cut_teacher, chunk, kernel = _prepare(hidden, weight, ids, rows, **options)
    differentiable = hidden.requires_grad or weight.requires_grad
    if kernel != "torch" or not torch.is_grad_enabled() or not differentiable:
        return loss_fn(slice(0, len(ids)), token_numbers(hidden, weight, ids, **options))
    rows = rows or slice_rows(len(ids), head.vocabulary)
    return _TokenLoss.apply(hidden, weight, ids, head, cut_teacher, chunk, rows, loss_fn)


def slice_rows(tokens, vocabulary):
    """Tokens a slice of linear_token_loss: 64 MB of logits, at least 256 (each slice walks over
    the gradient of the head once), and all of about one size."""
    slices = math.ceil(tokens / max(256, STORED // vocabulary))
    return math.ceil(tokens / max(1, slices)) or 1


def naive(hidden, head, ids, teacher=None):
    """The definition of TokenNumbers: plain autograd on all logits, which leave the matrix
    product in the operands' dtype as those of a model do."""

    def log_softmax(hidden, head):
        z = hidden @ head.weight[: head.vocabulary].T * head.inner
        z = (torch.tanh(z / head.cap) * head.cap if head.cap else z) * head.outer
        return torch.log_softmax(z.to(Logits(hidden, head).dtype), -1)

    logp = log_softmax(hidden, head)
    numbers = TokenNumbers(logp.gather(1, ids), -(logp.exp() * logp).sum(-1))
    if teacher is None:
        return numbers
    with torch.no_grad():
        logq = log_softmax(*teacher)
    return numbers._replace(
        teacher_logp=logq.gather(1, ids),
        reverse_kl=(logp.exp() * (logp - logq)).sum(-1),
        forward_kl=(logq.exp() * (logq - logp)).sum(-1),
    )


def lifted(weight):
    """A head in the type that its products are computed in: where that is not its own, all of
    it, for a caller of many small products, which would each lift it chunk by chunk."""
    if _sums_leave_in_float32(weight) or weight.dtype == torch.float64:
        return weight
    return weight.detach().float()


@torch.no_grad()
def all_logits(hidden, weight, **options):
    """All logits [N, vocabulary] of a few tokens in float32, not differentiable: for sampling,
    and for finding the likeliest."""
    no_ids = torch.zeros(len(hidden), 0, dtype=torch.int64, device=hidden.device)
    head, _, chunk, _ = _prepare(hidden, weight, no_ids, **options)
    some = Logits(hidden, head)
    out = torch.empty(len(hidden), head.vocabulary, dtype=some.dtype, device=hidden.device)
    for start, stop, (scratch,) in _chunks(some, chunk, 1):
        out[:, start:stop] = some.chunk(start, stop, scratch)
    return out
