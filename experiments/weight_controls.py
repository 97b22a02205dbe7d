"""Token weights of controls: file to file, without a model.

    python -m experiments.weight_controls --rule suffix --rollouts R --weights W --out C
    python -m experiments.weight_controls --rule fixed --rollouts R --tokens 16 --out C

shuffled, suffix and boost are made of the weights W that `methods.prefix weigh` gave to the
same rollouts:

    shuffled   its cuts, as shares of a rollout, dealt out at random among the rollouts of the
               file: truncation without its reason
    suffix     what it drops is kept, and the other way round; a rollout without a cut stays
    boost      its weight on the prefix, 1 on the suffix: the larger step without the truncation

fixed and no-end need rollouts only:

    fixed      the first --tokens loss tokens
    no-end     all but the end token, which the method nearly always drops by the way (then
               nothing teaches when to stop)

shuffled, suffix and fixed are rescaled as the method is, capped at its default of 20.
"""

import numpy as np

from experiments import controls
from experiments.series import kept_shares
from methods.prefix import summarise, tell, token_weights, weights_record
from opd import cli, files, records
from opd.records import BadInput

OF_WEIGHTS = ("shuffled", "suffix", "boost")
RULES = (*OF_WEIGHTS, "fixed", "no-end")


def nearest_cut(share, sizes):
    """The number of blocks (>= 1) whose end is nearest to `share` of the loss tokens; None for
    no cut, or where that is all of them.

    nearest_cut(0.3, [2, 6]) -> 1;  nearest_cut(0.8, [2, 6]) -> None."""
    if share is None or not len(sizes):
        return None
    kept = int(np.abs(kept_shares(sizes) - share).argmin()) + 1
    return kept if kept < len(sizes) else None


def release_record(weights, rollout, rollouts):
    """What methods.prefix weigh says of a rollout."""
    record = files.record_for(weights, rollout, rollouts)
    if record["rule"] != "release":
        where = weights.where(records.key_of(rollout, "rollouts"))
        raise BadInput(
            f"{where}: rule: expected release, of methods.prefix weigh, got {record['rule']!r}"
        )
    return record


def deal_shares(rollouts, weights, seed):
    """{key: share of the loss tokens before another rollout's cut, None for no cut}."""
    shares = []
    for rollout in rollouts:
        record = release_record(weights, rollout, rollouts)
        shares.append(None if record["cut"] is None else record["kept"])
    order = np.random.default_rng(seed).permutation(len(shares))
    return {key: shares[i] for key, i in zip(rollouts.keys(), order)}


def shuffled(rollout, record, share):
    """The record of `weigh` with another rollout's share in place of its own cut."""
    mask = rollout["loss_mask"]
    cut = nearest_cut(share, [sum(mask[start:end]) for start, end in record["blocks"]])
    end = len(mask) if cut is None else record["blocks"][cut - 1][1]
    found = token_weights(mask, np.arange(len(mask)) < end)
    return record | weights_record(rollout, "shuffled", *found) | {"cut": cut}


def suffix(rollout, record):
    kept = np.array(record["weights"]) == 0
    return token_weights(rollout["loss_mask"], kept if kept.any() else ~kept)


def boost(record):
    weights = np.array(record["weights"])
    return np.where(weights > 0, weights, 1.0), record["kept"], record["scale"]


def fixed(rollout, tokens):
    mask = rollout["loss_mask"]
    before = np.cumsum(mask) - mask  # loss tokens before each one
    return token_weights(mask, before < tokens)


def no_end(rollout):
    mask = rollout["loss_mask"]
    weights = np.ones(len(mask))
    kept = 1.0
    if mask and rollout["finish_reason"] == "stop":
        weights[-1] = 0
        kept = 1 - mask[-1] / max(1, sum(mask))
    return weights, kept, 1.0


def control(rule, rollout, record, share, tokens):
    """The weights record of a rollout; record: that of methods.prefix, which the rules
    OF_WEIGHTS change; share: what `shuffled` deals to it; tokens: of `fixed`."""
    if rule == "shuffled":
        return shuffled(rollout, record, share)
    if rule == "suffix":
        return record | weights_record(rollout, rule, *suffix(rollout, record))
    if rule == "boost":
        return record | weights_record(rollout, rule, *boost(record))
    found = fixed(rollout, tokens) if rule == "fixed" else no_end(rollout)
    return weights_record(rollout, rule, *found)


def main(argv=None):
    p = controls.parser(__doc__, "rollouts")
    p.add_argument("--rule", required=True, choices=RULES, help="see above")
    p.add_argument("--weights", help="shuffled, suffix, boost: those of methods.prefix weigh")
    p.add_argument("--tokens", type=int, default=0, help="fixed: loss tokens to keep")
    args = p.parse_args(argv)
    rule, tokens = args.rule, args.tokens
    if rule == "fixed" and tokens < 1:
        raise BadInput(f"--tokens: expected at least 1, got {tokens}")
    rollouts = files.Table(args.rollouts, "rollouts")
    settings = {"rule": rule, "tokens": tokens}
    inputs = [args.rollouts]
    weights = None
    shares = {}
    if rule in OF_WEIGHTS:
        if not args.weights:
            raise BadInput(f"--weights: --rule {rule} needs it, but it is missing")
        weights = files.Table(args.weights, "weights")
        inputs.append(args.weights)
    if rule == "shuffled":
        # with more rollouts the order would be another one
        settings |= {"seed": args.seed, "of_rollouts": len(rollouts)}
        shares = deal_shares(rollouts, weights, args.seed)
    rows = []
    for rollout in rollouts:
        record = weights and release_record(weights, rollout, rollouts)
        share = shares.get(records.key_of(rollout, "rollouts"))
        rows.append(control(rule, rollout, record, share, tokens))
    controls.write(args.out, "weights", rows, settings, inputs, args.overwrite)
    summary = summarise(files.read(args.out, "weights"))
    tell("experiments.weight_controls", args.out, summary)
    return {"out": args.out} | summary


if __name__ == "__main__":
    cli.run(main)
