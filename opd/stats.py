"""Estimators and intervals: pass@k, t-intervals, AUC, repetition."""

import math
import zlib

import numpy as np

TAIL = 256  # characters at the end of a text that are searched for repetition
REPETITIVE = 4.0  # their compression ratio beyond which a text counts as repetitive
# 97.5 % points of Student's t with 1 to 10 degrees of freedom
T_TABLE = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def pass_at_k(n, c, k):
    """Probability that k answers, drawn without replacement from n of which c are right, hold a
    right one: 1 - C(n-c, k) / C(n, k)   (Chen et al. 2021, eq. 1).

    Averaged over prompts it estimates pass@k without bias, which 1 - (1 - c/n)^k does not.
    n=4, c=1, k=2: 3 of the 6 pairs miss the right answer, so 0.5."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def powers_up_to(n):
    """[1, 2, 4, ..., n]: the k of pass@k; n itself also where it is no power of two."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def repetition_ratio(text, tail):
    """How far zlib shrinks the last `tail` characters: UTF-8 bytes / compressed bytes.

    Prose stays near 1.5 (and short text below 1, for the header); "2+2=4\\n" fifty times over
    has more than 12."""
    data = text[-tail:].encode("utf-8", "replace")
    return len(data) / len(zlib.compress(data))


def t_quantile(freedom):
    """97.5 % point of Student's t: a table up to 10 degrees of freedom, then the expansion in
    1 / freedom (within 0.1 %)."""
    if freedom <= len(T_TABLE):
        return T_TABLE[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval(values):
    """(mean, half-width of the 95 % t-interval of the mean); the half-width of a single value
    is None, not 0.

    [0.2, 0.4, 0.6]: mean 0.4, standard deviation 0.2, t = 4.303 with 2 degrees of freedom, so
    0.4 +- 0.497."""
    mean = float(np.mean(values))
    n = len(values)
    if n < 2:
        return mean, None
    return mean, float(t_quantile(n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def auc(values, right):
    """Probability that a right answer has the larger value than a wrong one, ties counting
    half; None without both kinds.

    auc([0.9, 0.4, 0.4], [True, True, False]) -> (1 + 0.5) / 2 = 0.75.  0.5 is no
    information."""
    _, level = np.unique(values, return_inverse=True)
    right = np.asarray(right, bool)
    hits = np.bincount(level[right], minlength=level.max() + 1)
    misses = np.bincount(level[~right], minlength=level.max() + 1)
    if not hits.sum() or not misses.sum():
        return None
    return float((hits * (misses.cumsum() - misses / 2)).sum() / (hits.sum() * misses.sum()))


def auc_by_prompt(values, right):
    """{(prompt,): AUC of a signal {key: number} for the right answers {key: true or false},
    None of a prompt without both kinds}: all that an advantage within a group sees."""
    groups = {}
    for key, value in values.items():
        numbers, hits = groups.setdefault(key[:1], ([], []))
        numbers.append(value)
        hits.append(right[key])
    return {prompt: auc(*group) for prompt, group in groups.items()}


def mean_or_none(values):
    """The mean of a list, None of an empty one."""
    return float(np.mean(values)) if len(values) else None


def shown(x, form=".3f"):
    """A number for a printed line; "none" for None."""
    return "none" if x is None else format(x, form)
