"""SimCT: a teacher of another vocabulary.  The fields that its scores hold beside the usual."""

from opd.records import (
    IDS,
    LOGPROBS,
    NUMBERS,
    PACKED,
    TOPK,
    Type,
    declare,
    is_length,
    list_of,
    problem_of_logprobs,
    problem_of_topk,
    show,
    unpack,
)


def is_unit(x):
    return list_of(is_length)(x) and len(x) == 4


def check_units(score):
    """What does not fit between the fields of units.py, or None."""
    if "units" not in score:
        return None
    units = score["units"]
    length = len(score["logprobs"])
    mine = [edge for s0, s1, _, _ in units for edge in (s0, s1)]
    theirs = [edge for _, _, t0, t1 in units for edge in (t0, t1)]
    empty = any(s0 == s1 or t0 == t1 for s0, s1, t0, t1 in units)
    if empty or mine != sorted(mine) or theirs != sorted(theirs) or mine[-1:] > [length]:
        return f"units: expected one after another within {length} tokens, got {show(units)}"
    for name in ("unit_logprobs", "unit_logits", "unit_logz"):
        if name in score and len(score[name]) != len(units):
            return f"{name}: expected {len(units)} values, one a unit, got {len(score[name])}"
    if "unit_topk" not in score:
        return None
    shape = score["unit_topk"]["ids"]["shape"]
    if "prefixes" in score and score["prefixes"]["shape"] != shape:
        return f"prefixes: expected the shape {shape}, got {score['prefixes']['shape']}"
    return problem_of_topk("unit_topk", score["unit_topk"], len(units))


def check_sorted(score):
    """What is wrong with the largest log-probs of every place, or None."""
    if "sorted" not in score:
        return None
    best = unpack(score["sorted"])
    if best.ndim != 2 or len(best) > len(score["logprobs"]):
        return f"sorted: expected [up to {len(score['logprobs'])}, K], got {list(best.shape)}"
    return problem_of_logprobs("sorted", best)


def is_byte_counts(x):
    return IDS.test(x) and len(x) == 3


declare(
    "scores",
    check_units,
    check_sorted,
    units=Type("a list of [s0, s1, t0, t1], each in [0, 10^7]", list_of(is_unit)),
    unit_logprobs=LOGPROBS,
    unit_logits=NUMBERS,
    unit_logz=NUMBERS,
    unit_topk=TOPK,
    prefixes=PACKED,
    sorted=PACKED,
    bytes=Type("three integers >= 0", is_byte_counts),
)
