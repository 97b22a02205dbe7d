"""opd/kernel.py's two walks over the vocabulary as two Triton kernels, for CUDA: no logits in
memory, no locks, no atomics.

    statistics   a program takes TILE tokens and one of several stretches of the vocabulary,
                 keeps (m, s, a) in registers and
                 writes them with z at the ids; the stretches are merged here by the rule that
                 stands above opd/kernel.py
    dlogits      for one chunk of the vocabulary, computes the tile again and writes dz in the
                 operands' dtype; the two matrix
                 products that make dhidden and dhead of it are torch's

Both loop over D in the same order with the same tiles, so backward sees the logits of forward.
Tokens lie on grid axis 0, which has room for two thousand million programs (axis 1 has 65,535),
and row offsets are int64.  Columns beyond the vocabulary are -inf before the maximum and 0 in
every product.

Needs `pip install triton` (a CUDA build of torch brings it).  On a machine without a GPU the
kernels run in Triton's interpreter, TRITON_INTERPRET=1 set before the import, as the tests do;
there operands are lifted to float32 (UP), because the interpreter multiplies bfloat16 as if it
were integers.  Never run on a GPU here: `trusted` compares with torch at first use.
"""

import functools
import warnings

import torch
import triton
import triton.language as tl

from opd.kernel import TokenNumbers, _add_product, _chunks, linear_logp

# tokens, vocabulary, hidden: fits the registers of sm_80 and sm_90 (tests compile for both)
TILE = 64, 128, 64
WARPS, STAGES = 8, 3
INTERPRETED = triton.knobs.runtime.interpret
FLOAT = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _logits_tile(
    H,
    W,
    rows,
    columns,
    N,
    V_END,
    D,
    inner,
    cap,
    outer,
    FLOAT: tl.constexpr,
    CAP: tl.constexpr,
    UP: tl.constexpr,
    TD: tl.constexpr,
):
    """z of some rows and columns, in FLOAT: the one place where both kernels get it from."""
    z = tl.zeros((rows.shape[0], columns.shape[0]), FLOAT)
    for d0 in range(0, D, TD):
        d = d0 + tl.arange(0, TD)
        h = tl.load(
            H + rows[:, None].to(tl.int64) * D + d[None, :],
            mask=(rows < N)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        w = tl.load(
            W + columns[:, None].to(tl.int64) * D + d[None, :],
            mask=(columns < V_END)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        if UP:
            h, w = h.to(FLOAT), w.to(FLOAT)
        # tf32 would cost a thousandth
        z += tl.dot(h, tl.trans(w), input_precision="ieee", out_dtype=FLOAT)
    if CAP:
        return (2 * tl.sigmoid(2 * inner / cap * z) - 1) * cap * outer  # tanh
    return z * (inner * outer)


@triton.jit
def statistics(
    H,
    W,
    IDS,
    M,
    S,
    A,
    AT,
    N,
    V,
    D,
    K,
    stretch,
    inner,
    cap,
    outer,
    FLOAT: tl.constexpr,
    CAP: tl.constexpr,
    UP: tl.constexpr,
    TN: tl.constexpr,
    TV: tl.constexpr,
    TD: tl.constexpr,
):
    """M, S, A [stretches, N] and AT [N, K] are written."""
    rows = tl.program_id(0) * TN + tl.arange(0, TN)
    part = tl.program_id(1)
    m = tl.full((TN,), -float("inf"), FLOAT)
    s = tl.zeros((TN,), FLOAT)
    a = tl.zeros((TN,), FLOAT)
    end = tl.minimum((part + 1) * stretch, V)
    for v0 in range(part * stretch, end, TV):
        columns = v0 + tl.arange(0, TV)
        real = (columns < end)[None, :]
        z = _logits_tile(H, W, rows, columns, N, end, D, inner, cap, outer, FLOAT, CAP, UP, TD)
        for k in range(K):
            at = rows.to(tl.int64) * K + k
            ids = tl.load(IDS + at, mask=rows < N, other=-1)
            tl.store(
                AT + at,
                tl.sum(tl.where(columns[None, :] == ids[:, None], z, 0.0), 1),
                mask=(ids >= v0) & (ids < tl.minimum(v0 + TV, end)),
            )
        m_new = tl.maximum(m, tl.max(tl.where(real, z, -float("inf")), 1))
        x = tl.where(real, z - m_new[:, None], 0.0)
        e = tl.where(real, tl.exp(x), 0.0)
        t = tl.where(s > 0, m - m_new, 0.0)
        a = tl.exp(t) * (a + t * s) + tl.sum(e * x, 1)
        s = tl.exp(t) * s + tl.sum(e, 1)
        m = m_new
    at = part.to(tl.int64) * N + rows
    tl.store(M + at, m, mask=rows < N)
    tl.store(S + at, s, mask=rows < N)
    tl.store(A + at, a, mask=rows < N)


@triton.jit
def dlogits(
    H,
    W,
    IDS,
    M,
    LOG_S,
    ENTROPY,
    G,
    E,
    DZ,
    N,
    D,
    K,
    start,
    stop,
    inner,
    cap,
    outer,
    FLOAT: tl.constexpr,
    CAP: tl.constexpr,
    UP: tl.constexpr,
    TN: tl.constexpr,
    TV: tl.constexpr,
    TD: tl.constexpr,
):
    """DZ [N, stop - start] is written: the gradient of x, the scores before scale, softcap and
    temperature."""
    rows = tl.program_id(0) * TN + tl.arange(0, TN)
    columns = start + tl.program_id(1) * TV + tl.arange(0, TV)
    z = _logits_tile(H, W, rows, columns, N, stop, D, inner, cap, outer, FLOAT, CAP, UP, TD)
    m = tl.load(M + rows, mask=rows < N, other=0.0)
    log_s = tl.load(LOG_S + rows, mask=rows < N, other=0.0)
    entropy = tl.load(ENTROPY + rows, mask=rows < N, other=0.0)
    e = tl.load(E + rows, mask=rows < N, other=0.0)
    g_sum = tl.zeros((TN,), FLOAT)
    for k in range(K):
        g_sum += tl.load(G + rows.to(tl.int64) * K + k, mask=rows < N, other=0.0)
    log_p = tl.where((columns < stop)[None, :], z - m[:, None] - log_s[:, None], 0.0)
    dz = -tl.exp(log_p) * (g_sum[:, None] + e[:, None] * (log_p + entropy[:, None]))
    for k in range(K):
        at = rows.to(tl.int64) * K + k
        ids = tl.load(IDS + at, mask=rows < N, other=-1)
        g = tl.load(G + at, mask=rows < N, other=0.0)
        dz += tl.where(columns[None, :] == ids[:, None], g[:, None], 0.0)  # ids may repeat
    if CAP:
        tanh = z / (cap * outer)
        dz = dz * (1 - tanh * tanh)
    dz = dz * (inner * outer)
    tl.store(
        DZ + rows[:, None].to(tl.int64) * (stop - start) + (columns - start)[None, :],
        dz.to(DZ.dtype.element_ty),
        mask=(rows < N)[:, None] & (columns < stop)[None, :],
    )


def constants(logits):
    """The compile-time arguments of both kernels."""
    tokens, vocabulary, hidden = TILE
    return dict(
        FLOAT=FLOAT[logits.dtype],
        CAP=bool(logits.head.cap),
        UP=INTERPRETED and logits.hidden.dtype != logits.dtype,
        TN=tokens,
        TV=vocabulary,
        TD=hidden,
        num_warps=WARPS,
        num_stages=STAGES,
    )


def grid(n, vocabulary):
    """((programs over tokens, programs over the vocabulary) of `statistics`, columns a program
    walks).

    Enough stretches that some 500 programs run at once; each is a whole number of tiles, so
    none is empty."""
    tokens, tiles = triton.cdiv(n, TILE[0]), triton.cdiv(vocabulary, TILE[1])
    stretch = triton.cdiv(tiles, min(tiles, triton.cdiv(512, max(1, tokens)))) * TILE[1]
    return (tokens, triton.cdiv(vocabulary, stretch)), stretch


def forward(student, teacher, ids, chunk):
    """As kernel._forward, without a teacher."""
    head, (n, d), k = student.head, student.hidden.shape, ids.shape[1]
    programs, stretch = grid(n, head.vocabulary)
    ms, ss, aa = torch.empty(3, programs[1], n, dtype=student.dtype, device=ids.device)
    at_ids = torch.empty(ids.shape, dtype=student.dtype, device=ids.device)
    if n:
        statistics[programs](
            student.hidden.contiguous(),
            head.weight.contiguous(),
            ids.contiguous(),
            ms,
            ss,
            aa,
            at_ids,
            n,
            head.vocabulary,
            d,
            k,
            stretch,
            head.inner,
            head.cap,
            head.outer,
            **constants(student),
        )
    m = ms.amax(0)
    t = ms - m
    s = (t.exp() * ss).sum(0)
    a = (t.exp() * (aa + t * ss)).sum(0)
    log_s = s.log()
    numbers = TokenNumbers(at_ids - m[:, None] - log_s[:, None], log_s - a / s)
    return numbers, (m, log_s, m, log_s)


def backward(student, teacher, ids, numbers, normalisers, grads, chunk, d_hidden, d_weight):
    """As kernel._backward, without a teacher."""
    head, (n, d), k = student.head, student.hidden.shape, ids.shape[1]
    m, log_s = normalisers[:2]
    g = torch.zeros_like(numbers.logp) if grads.logp is None else grads.logp.contiguous()
    e = torch.zeros_like(m) if grads.entropy is None else grads.entropy.contiguous()
    hidden = student.hidden.contiguous()
    weight = head.weight.contiguous()
    ids = ids.contiguous()
    for start, stop, (dz,) in _chunks(student, chunk, 1, hidden.dtype):
        if n:
            dlogits[triton.cdiv(n, TILE[0]), triton.cdiv(stop - start, TILE[1])](
                hidden,
                weight,
                ids,
                m,
                log_s,
                numbers.entropy,
                g,
                e,
                dz,
                n,
                d,
                k,
                start,
                stop,
                head.inner,
                head.cap,
                head.outer,
                **constants(student),
            )
        if d_hidden is not None:
            _add_product(d_hidden, dz, head.weight[start:stop])
        if d_weight is not None:
            _add_product(d_weight[start:stop], dz.T, student.hidden)


@functools.cache
@torch.enable_grad()  # it may be asked while a teacher scores
def trusted(device):
    """Whether this GPU computes with these kernels what it computes with torch: looked at once
    a process, on a small ragged problem."""
    random = torch.Generator("cpu").manual_seed(0)
    hidden, weight = (
        torch.randn(rows, 80, generator=random).to(device, torch.bfloat16).requires_grad_()
        for rows in (77, 1001)
    )
    ids = torch.randint(0, 999, (77, 2), generator=random).to(device)
    results = []
    try:
        for kernel in ("torch", "triton"):
            options = dict(vocabulary=999, temperature=0.7, kernel=kernel)
            logp, entropy = linear_logp(hidden, weight, ids, **options)
            loss = (logp * logp).sum() + entropy.sum()
            results.append((logp, entropy, *torch.autograd.grad(loss, (hidden, weight))))
    # no compiler, an unknown GPU, not enough shared memory: whatever it is, torch does the work
    except Exception as error:
        warnings.warn(
            f"opd/kernel.py: Triton does not work here ({type(error).__name__}: {error}): the "
            f"torch kernel is used"
        )
        return False
    pairs = [(a.float(), b.float()) for a, b in zip(*results)]
    if not all((a - b).norm() <= 0.01 * a.norm() for a, b in pairs):  # nor is NaN agreement
        warnings.warn(
            "opd/kernel.py: the Triton kernels disagree with torch on this GPU: the torch "
            "kernel is used"
        )
        return False
    return True
