"""SimCT: a teacher of another vocabulary.  The fields that its scores hold beside the usual."""

from opd.records import IDS, LOGPROBS, NUMBERS, PACKED, TOPK, Type, declare, is_count, list_of


def is_unit(x):
    return list_of(is_count)(x) and len(x) == 4


declare(
    "scores",
    units=Type("a list of [s0, s1, t0, t1]", list_of(is_unit)),
    unit_logprobs=LOGPROBS,
    unit_logits=NUMBERS,
    unit_logz=NUMBERS,
    unit_topk=TOPK,
    prefixes=PACKED,
    sorted=PACKED,
    bytes=IDS,
)
