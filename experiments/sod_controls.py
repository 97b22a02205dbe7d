"""Step weights by other rules than SOD's: the paper's ablations and further controls.

    python -m experiments.sod_controls --rule shuffled --rollouts rollouts.jsonl \\
        --scores scores.jsonl --out w.jsonl

Writes the same records as `python -m methods.sod weigh`.  Rules:

    uniform    1 everywhere
    no-cap     SOD without the bound 1 + delta
    mask       0 from the step after the first mistake on
    decay      0.9^(steps since the first mistake)
    shuffled   SOD's weights in random order within each episode: do places matter?
    mean       the mean of SOD's weights over the file's tokens, everywhere: is SOD only a
               smaller coefficient?
    amount     sum w_k d_k n_k / sum d_k n_k over the file, n_k loss tokens: the share of the
               teacher's term that SOD leaves, everywhere.  Is SOD only less of the teacher?
    batch      d_k against the file's mean d_1: an episode's own d_1 may be a few tokens of luck

A mistake is a call that the tool could not read; a call that met an outage is none.
"""

from typing import NamedTuple

import numpy as np

from methods.sod.weights import (
    add_flags,
    first_of,
    measure_file,
    open_tables,
    step_weights,
    steps_or_whole,
    write_weights,
)
from opd import cli

DECAY = 0.9
RULES = ("uniform", "no-cap", "mask", "decay", "shuffled", "mean", "amount", "batch")


def outcome_of(call):
    """ "result", "mistake" or "outage" of a call."""
    if call["ok"]:
        return "result"
    return "outage" if call.get("outage") else "mistake"


def outcomes(rollout):
    """What came of every step, [K]: the outcome of its call, "answer", or "cut" for a last step
    that did not end."""
    calls = iter(rollout.get("calls", ()))
    last = "answer" if rollout["finish_reason"] == "stop" else "cut"
    return [
        last if ok is None else outcome_of(next(calls)) for _, _, ok in steps_or_whole(rollout)
    ]


def since_mistake(got):
    """Steps since the first mistake, 0 up to and with it.

    ["result", "mistake", "result", "answer"] -> [0, 0, 1, 2]"""
    first = got.index("mistake") if "mistake" in got else len(got)
    return np.maximum(np.arange(len(got)) - first, 0)


class FileMeans(NamedTuple):
    """What the rules need of a whole file."""

    first: float  # mean d_1
    mean: float  # mean of SOD's weights over the tokens
    amount: float  # share of the teacher's term that SOD's weights leave


def file_means(drifts):
    """FileMeans of `Drift`s.

    d [1, 3] of [1, 1] tokens: SOD's weights [1, 1/3], so mean 2/3 and amount (1 + 1) / (1 + 3)
    = 1/2"""
    weight = 0.0
    left = 0.0
    term = 0.0
    tokens = 0
    for drift in drifts:
        w = step_weights(drift.d)
        terms = np.nan_to_num(drift.d) * drift.tokens
        weight += w @ drift.tokens
        left += w @ terms
        term += terms.sum()
        tokens += drift.tokens.sum()
    first = float(np.nanmean([first_of(drift.d) for drift in drifts]))
    return FileMeans(first, float(weight / tokens), float(left / term) if term else 1.0)


def weigh(rule, d, got, rng, file):
    """w_k of a rule, [K], from d [K], outcomes [K] and FileMeans."""
    if rule == "sod":
        return step_weights(d)
    if rule == "no-cap":
        return step_weights(d, delta=None)
    if rule == "batch":
        return step_weights(d, file.first)
    if rule == "shuffled":
        return rng.permutation(step_weights(d))
    if rule == "mask":
        return np.where(since_mistake(got) > 0, 0.0, 1.0)
    if rule == "decay":
        return DECAY ** since_mistake(got)
    constant = {"uniform": 1.0, "mean": file.mean, "amount": file.amount}
    return np.full(len(d), constant[rule])


def weights_of(rule, drifts, gots, seed=0):
    """[w [K]] of all episodes of a file by a rule, from their Drifts and outcomes."""
    file = file_means(drifts)
    episodes = enumerate(zip(drifts, gots))
    return [
        weigh(rule, drift.d, got, np.random.default_rng([seed, n]), file)
        for n, (drift, got) in episodes
    ]


def main(argv=None):
    p = cli.parser(__doc__)
    add_flags(p)
    p.add_argument("--rule", required=True, choices=RULES, help="see above")
    p.add_argument("--seed", type=int, default=0, help="of --rule shuffled")
    args = p.parse_args(argv)
    rollouts, scores, own = open_tables(args.rollouts, args.scores, args.own_scores)
    drifts = measure_file(rollouts, scores, own)
    gots = [outcomes(rollout) for rollout in rollouts]
    found = weights_of(args.rule, list(drifts.values()), gots, args.seed)
    # with more rollouts these would be other weights
    settings = {"of_rollouts": len(rollouts), "seed": args.seed}
    settings |= file_means(list(drifts.values()))._asdict()
    return write_weights(
        args.out,
        args.rule,
        rollouts,
        drifts,
        dict(zip(drifts, found)),
        settings,
        [path for path in (args.rollouts, args.scores, args.own_scores) if path],
        args.overwrite,
    )


if __name__ == "__main__":
    cli.run(main)
