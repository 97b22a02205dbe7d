"""The fused log-prob kernel: hidden states x language-model head -> log-probs and entropy, without the logits.

A language model ends in logits = hidden @ head.T, an array of [tokens, vocabulary] numbers: 2048 tokens of a
49,152-word vocabulary are 400 MB in float32, and the usual `log_softmax(logits).gather(ids)` holds several of them for
the backward pass.  A distillation loss wants only a few numbers a token, so `linear_logp` walks the vocabulary in
chunks, keeps three running numbers a token, and computes every chunk again in the backward pass.

Logits stay float32 from the matrix product to the subtraction of the maximum, also for bfloat16 weights: rounding them
first costs 20-70 % of the gradient once student and teacher are close.

The mathematics (z = hidden . head_j / temperature, p = softmax(z)), for one token:

    forward    m = max z     s = sum_j e^(z_j - m)     a = sum_j e^(z_j - m) (z_j - m)
               log p_y = (z_y - m) - log s             entropy H = log s - a / s
    two chunks merge with m' = max(m_1, m_2):  s' = sum_i e^(m_i - m') s_i,  a' = sum_i e^(m_i - m') (a_i + (m_i - m') s_i)
    backward   for upstream gradients g_k on log p_(id_k) and e on H, with g = sum_k g_k:
               dz_j = sum_k g_k [j = id_k]  -  p_j (g + e (log p_j + H))
               dhidden = dz @ head / temperature       dhead = dz.T @ hidden / temperature
"""
import torch


def _logits(hidden, rows, scale, out):
    """out[:, :] = scale * hidden @ rows.T in float32 (float64 for float64 operands), never rounded below that.

    Forward and backward both come here, so they see the same numbers to the last bit."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        torch.mm(hidden, rows.T, out_dtype=torch.float32, out=out)
    else:  # a CPU matrix product rounds its output to bfloat16: lift one chunk of the head, never all of it
        torch.mm(hidden.to(out.dtype), rows.T.to(out.dtype), out=out)
    return out.mul_(scale) if scale != 1.0 else out


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, scale, chunk):
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        m = hidden.new_full((tokens,), -torch.inf, dtype=dtype)
        s, a = torch.zeros_like(m), torch.zeros_like(m)
        at_ids = hidden.new_zeros(ids.shape, dtype=dtype)
        buffer = hidden.new_empty(tokens * min(chunk, vocabulary), dtype=dtype)
        for start in range(0, vocabulary, chunk):
            rows = weight[start:start + chunk]
            z = _logits(hidden, rows, scale, buffer[:tokens * len(rows)].view(tokens, len(rows)))
            inside = (ids >= start) & (ids < start + len(rows))
            at_ids += torch.where(inside, z.gather(1, (ids - start).clamp(0, len(rows) - 1)), 0.0)
            m_new = torch.maximum(m, z.amax(1))
            shift = torch.where(s > 0, m - m_new, 0.0)  # 0 in the first chunk, where m is -inf
            z.sub_(m_new[:, None])
            e = z.exp()
            a = shift.exp() * (a + shift * s) + z.mul_(e).sum(1)
            s = shift.exp() * s + e.sum(1)
            m = m_new
        log_s = s.log()
        entropy = log_s - a / s
        ctx.save_for_backward(hidden, weight, ids, m, log_s, entropy)
        ctx.scale, ctx.chunk = scale, chunk
        ctx.set_materialize_grads(False)  # an unused output arrives as None in backward and costs nothing
        return at_ids - m[:, None] - log_s[:, None], entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, ids, m, log_s, entropy = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return None, None, None, None, None
        tokens, vocabulary, chunk = hidden.shape[0], weight.shape[0], ctx.chunk
        grad_logp = m.new_zeros(ids.shape) if grad_logp is None else grad_logp
        g = grad_logp.sum(1)
        d_hidden = m.new_zeros(hidden.shape) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # a frozen head costs nothing
        buffer = m.new_empty(tokens * min(chunk, vocabulary))
        for start in range(0, vocabulary, chunk):
            rows = weight[start:start + chunk]
            log_p = _logits(hidden, rows, ctx.scale, buffer[:tokens * len(rows)].view(tokens, len(rows)))
            log_p.sub_(m[:, None]).sub_(log_s[:, None])
            dz = log_p.exp()
            if grad_entropy is None:
                dz.mul_(-g[:, None])
            else:
                dz.mul_(log_p.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(g[:, None])).neg_()
            inside = (ids >= start) & (ids < start + len(rows))
            dz.scatter_add_(1, (ids - start).clamp(0, len(rows) - 1), torch.where(inside, grad_logp, 0.0))  # ids may repeat
            dz.mul_(ctx.scale)
            if d_hidden is not None:
                d_hidden.addmm_(dz, rows.to(dz.dtype))
            if d_weight is not None:  # the sum over tokens is accumulated in float32 and rounded once
                d_weight[start:start + chunk] = dz.T @ hidden.to(dz.dtype)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None, None


def linear_logp(hidden, weight, ids, *, temperature=1.0, chunk=None):
    """Log-probs of chosen tokens and the entropy of the whole distribution, both differentiable.

    hidden [N, D] and weight [V, D]: float32, bfloat16, float16 or float64, of one dtype.
    ids: int64, [N] (the sampled token) or [N, K] (say a teacher's top K; repeats are allowed), all in [0, V).
    chunk: vocabulary rows held at a time; by default as many as keep the [N, chunk] buffer near 64 MB.
    Returns (logp of ids' shape, entropy [N]) in nats, float32 (float64 for float64 input).

    Worked example: hidden [[1]], weight [[0], [log 3]] gives p = (1/4, 3/4); ids [1] gives
    logp = log 3/4 = -0.2877 and entropy = 0.5623.

    Raises ValueError on shapes that do not fit, on ids outside the vocabulary (CPU only: on a GPU the check would
    stop the queue) and on a temperature that is not positive."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(f"linear_logp: expected hidden [N, D] and weight [V, D] of one dtype, came "
                         f"{tuple(hidden.shape)} {hidden.dtype} and {tuple(weight.shape)} {weight.dtype}")
    if ids.dim() not in (1, 2) or ids.shape[0] != hidden.shape[0] or ids.dtype != torch.int64:
        raise ValueError(f"linear_logp: expected int64 ids [{hidden.shape[0]}] or [{hidden.shape[0]}, K], came "
                         f"{tuple(ids.shape)} {ids.dtype}")
    if not temperature > 0:
        raise ValueError(f"linear_logp: expected a temperature above 0, came {temperature}")
    if not ids.is_cuda and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(weight):
        raise ValueError(f"linear_logp: expected ids in [0, {len(weight)}), came {int(ids.min())} to {int(ids.max())}")
    if chunk is None:
        chunk = min(len(weight), max(256, (16 << 20) // max(1, len(hidden))))
    two_dimensional = ids if ids.dim() == 2 else ids[:, None]
    logp, entropy = _LinearLogp.apply(hidden, weight, two_dimensional, 1.0 / temperature, chunk)
    return (logp if ids.dim() == 2 else logp[:, 0]), entropy
