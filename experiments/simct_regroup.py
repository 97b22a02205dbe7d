"""Controls of SimCT: what the scores of text units are worth when part of them is taken away.

    python -m experiments.simct_regroup --scores scores.jsonl --rollouts rollouts.jsonl \\
        --drop-spans 0.5 --out half.jsonl

Reads and writes the records of `methods.simct score`.  A span is a unit that is not one token
on both sides.  --drop-spans leaves spans out, --coarsen makes spans of neighbouring one-token
units, --shuffle-spans gives each span another span's score a token.
"""

import numpy as np

from experiments import controls
from methods.simct.align import one_to_one
from opd import cli, records
from opd.records import BadInput


def joined_units(units, join):
    """[(i, j)]: units i..j-1 become one.  Only neighbours of one token on both sides are
    joined, where `join()` says so; the last unit, the end of a turn, stays alone."""
    ranges = []
    i = 0
    while i < len(units):
        pair = units[i : i + 2]
        joinable = (
            i + 2 < len(units) and all(map(one_to_one, pair)) and pair[0][1] == pair[1][0]
        )
        end = i + 2 if joinable and join() else i + 1
        ranges.append((i, end))
        i = end
    return ranges


def select_units(line, ranges):
    """The score record with units i..j-1 joined into one for every (i, j) of `ranges`, and
    without the others.  A joined unit has the sum of its units' scores and the candidates of
    the first."""
    units = line["units"]
    first = [i for i, _ in ranges]

    def sums(name):
        return [sum(line[name][i:j]) for i, j in ranges]

    def rows(packed):
        return records.pack(records.unpack(packed)[first])

    return line | {
        "units": [
            [units[i][0], units[j - 1][1], units[i][2], units[j - 1][3]] for i, j in ranges
        ],
        "unit_logprobs": sums("unit_logprobs"),
        "unit_logits": sums("unit_logits"),
        "unit_logz": [line["unit_logz"][i] for i in first],
        "unit_topk": {name: rows(packed) for name, packed in line["unit_topk"].items()},
        "prefixes": rows(line["prefixes"]),
    }


def coarsen(line, response_ids, rng, share):
    """The record with neighbouring one-token units joined, each pair with probability `share`:
    the same text, fewer scores."""
    ranges = joined_units(line["units"], lambda: rng.random() < share)
    ids = records.unpack(line["unit_topk"]["ids"])
    prefixes = records.unpack(line["prefixes"])
    for i, j in ranges:
        if j - i == 2:  # the first token now begins the unit's text
            prefixes[i] |= ids[i] == response_ids[line["units"][i][0]]
    return select_units(line | {"prefixes": records.pack(prefixes)}, ranges)


def drop_spans(line, rng, share):
    """The record without this share of its spans, each by a coin of its own."""
    kept = [
        (i, i + 1)
        for i, unit in enumerate(line["units"])
        if one_to_one(unit) or rng.random() >= share
    ]
    return select_units(line, kept)


def spans_of(lines):
    """[(record, place of the span, its teacher tokens)]."""
    return [
        (line, i, unit[3] - unit[2])
        for line in lines
        for i, unit in enumerate(line["units"])
        if not one_to_one(unit)
    ]


def shuffle_spans(lines, seed):
    """Deals the spans' scores a token out among all spans of the file, in place."""
    spans = spans_of(lines)
    order = np.random.default_rng([seed, 1]).permutation(len(spans))
    for name in ("unit_logprobs", "unit_logits"):
        means = [line[name][i] / tokens for line, i, tokens in spans]
        for (line, i, tokens), source in zip(spans, order):
            line[name][i] = means[source] * tokens


def share(text):
    """A share from 0 to 1, as argparse reads it."""
    if not 0 <= float(text) <= 1:
        raise ValueError(text)
    return float(text)


def main(argv=None):
    p = controls.parser(__doc__, "scores", "rollouts")
    p.add_argument("--drop-spans", type=share, default=0.0, help="share of spans to leave out")
    p.add_argument("--coarsen", type=share, default=0.0, help="probability to join a pair")
    p.add_argument("--shuffle-spans", action="store_true", help="deal the spans' scores out")
    args = p.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    lines = []
    for line, rollout in controls.with_rollouts(args.scores, args.rollouts):
        if "units" not in line:
            raise BadInput(
                f"{args.scores}: id {line['id']!r}, sample {line['sample']}: units: expected "
                f"text units, but the field is missing: run methods.simct score"
            )
        if args.coarsen:
            line = coarsen(line, rollout["response_ids"], rng, args.coarsen)
        if args.drop_spans:
            line = drop_spans(line, rng, args.drop_spans)
        lines.append(line)
    if args.shuffle_spans:
        shuffle_spans(lines, args.seed)
    settings = {
        "drop": args.drop_spans,
        "coarsen": args.coarsen,
        "shuffle": args.shuffle_spans,
        "seed": args.seed,
    }
    inputs = [args.scores, args.rollouts]
    done = controls.write(args.out, "scores", lines, settings, inputs, args.overwrite)
    units, spans = sum(len(line["units"]) for line in lines), len(spans_of(lines))
    print(f"experiments.simct_regroup: {args.out}: {units} units, {spans} of them spans")
    return done | {"units": units, "spans": spans}


if __name__ == "__main__":
    cli.run(main)
