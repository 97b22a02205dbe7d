"""methods.sod weigh and experiments.sod_drift: how much the teacher counts at each step of an
episode with tools.  SOD (arXiv 2605.07725), its ablations, and a look.

    python -m methods.sod weigh --rollouts R --scores S --rule sod --out weights.jsonl
    python -m experiments.sod_drift --rollouts R --scores S --out drift.json --plot drift.png
    --model
    STUDENT

A wrong call drops foreign text into the context, the following steps drift away from what the
teacher knows, and its numbers there are no longer worth as much.  SOD measures the drift of
step k by the sampled tokens alone and fades the teacher where it is larger than at the first
step:

    d_k = mean over the tokens of step k of |log mu(y_t) - log p_T(y_t)|
    eq. 6, nats a token
    w_k = min( prod_{u < k} (d_u + eps) / (d_{u+1} + eps),  1 + delta )  =  min( (d_1 + eps) /
    (d_k + eps), 1 + delta )      eq. 7, eps 1e-6, delta 0.2

The product telescopes and the bound is put on its end, so no step's weight remembers the way to
it; w_1 = 1. d [0.22, 0.44, 1.1, 0.11] -> w [1, 0.5, 0.2, 1.2].  log mu are the rollout's own
log-probs or, where they were computed in another precision than the teacher's, those that
`teacher.py score --model STUDENT` computes: --own-scores.

Rules: `sod` is that.  `uniform` is 1 everywhere.  `no-cap` leaves the bound out.  `mask` is 0
from the step after the first mistake on, `decay` 0.9^(steps since then): the paper's ablations.
Controls: `shuffled` deals sod's weights out among the steps of the same episode, `mean` gives
every token the mean of sod's over the file's tokens: is it only a smaller coefficient?
`amount` gives every token the share of the teacher's term that sod leaves of it, sum w_k d_k
n_k / sum d_k n_k over the file, n_k tokens: is it only less of the teacher?  For w_k d_k =
min(d_1, (1 + delta) d_k): under sod no step's term is larger than the first step's.  `batch`
measures d_k against the mean first step of the file, for an episode's own may be a few tokens
of luck.  A mistake is a call that the tool could not read; one that met an outage is none.

train.py --method sod multiplies the teacher's term, not the reward's.  A masked token counts
neither in d_k nor in the loss; a step of masked tokens alone has no d_k (NaN) and counts
nowhere: d_1 is then that of the next.

`drift --model STUDENT` asks what the weights are for.  Prop. 2: in contexts where the teacher
would never have come, the signal-to-noise ratio of its gradient goes to 0.  Prop. 3 bounds what
the weights leave of its size.  Of the gradients g_i of (log p_T - log pi) log pi(y_t), its
first factor held fixed, summed over the tokens of a step or an episode:

    signal |E g|^2 = mean of g_i . g_j over i != j        noise E|g|^2 - |E g|^2        snr
                                                          signal / noise, of one step or episode

The ratio also goes to 0 where student and teacher agree, for there the signal does: a small one
is no proof of a lost teacher.

Simplifications, and differences from the released code: 1. a malformed call is answered by an
error, there it ends the episode; 2. a tool's text is cut at its end, there in its middle, at
256 characters; 3. no penalty on overlong episodes; 4. log mu is the sampler's, there the actor
computes it anew; 5. a number a step is held in memory.
"""

from typing import NamedTuple

import numpy as np

from opd import files, records
from opd.records import BadInput

EPS = 1e-6
DELTA = 0.2
DECAY = 0.9
RULES = ("sod", "uniform", "no-cap", "mask", "decay", "shuffled", "mean", "amount", "batch")


def divergences(own, teacher, mask, steps):
    """d_k of every step, [K]: own, teacher, mask [T]; steps [[start, end, ok]].  NaN for a step
    without a loss token.

    divergences([-1, -1, -2], [-2, -1, -2], [1, 1, 1], [[0, 2, True], [2, 3, None]]) -> [0.5,
    0]"""
    return step_means(np.abs(np.subtract(own, teacher)), mask, steps)


def step_means(values, mask, steps):
    """Mean of [T] values over the loss tokens of every step, [K]; NaN where there are none."""
    values, mask = np.asarray(values, np.float64), np.asarray(mask, bool)
    return np.array(
        [
            values[start:end][mask[start:end]].mean() if mask[start:end].any() else np.nan
            for start, end, _ in steps
        ]
    )


def first_of(d):
    """d_1: that of the first step that has one, NaN if none has."""
    return next((x for x in d if np.isfinite(x)), np.nan)


def step_weights(d, first=None, delta=DELTA):
    """w_k from d_k, [K] (eq. 7), 1 where there is none; first: what d_1 is replaced by; delta:
    None for no bound."""
    d = np.asarray(d, np.float64)
    w = np.where(
        np.isfinite(d), ((first_of(d) if first is None else first) + EPS) / (d + EPS), 1.0
    )
    return w if delta is None else np.minimum(w, 1 + delta)


def outcomes(rollout):
    """What came of every step: "result", "mistake" or "outage" of its call, "answer", or "cut":
    a call that was not answered, or no end."""
    calls = iter(rollout.get("calls", ()))
    last = "answer" if rollout["finish_reason"] == "stop" else "cut"
    return [
        last
        if ok is None
        else {True: "result", False: "outage" if next_call.get("outage") else "mistake"}[ok]
        for _, _, ok in steps_or_whole(rollout)
        for next_call in [{} if ok is None else next(calls)]
    ]


def steps_or_whole(rollout):
    """The steps of a rollout; without tools an answer is one step."""
    return rollout.get("steps") or [[0, len(rollout["response_ids"]), None]]


def since_mistake(got):
    """Steps since the first mistake, 0 up to and with it.   ["result", "mistake", "result",
    "answer"] -> [0, 0, 1, 2]"""
    return np.maximum(
        np.arange(len(got)) - (got.index("mistake") if "mistake" in got else len(got)), 0
    )


class File(NamedTuple):
    """What a rule may ask of the whole file: its mean d_1; the mean of sod's weights over its
    tokens; the share of the teacher's term that they leave."""

    first: float
    mean: float
    amount: float


def of_file(episodes):
    """`File` of (d [K], loss tokens of each step [K]) pairs; None without a loss token.

    d [1, 3] of [1, 1] tokens: sod's weights [1, 1/3], so mean 2/3 and amount (1 + 1) / (1 + 3)
    = 1/2"""
    firsts, weight, term, left, tokens = [], 0.0, 0.0, 0.0, 0
    for d, sizes in episodes:
        w, each = step_weights(d), np.nan_to_num(d) * sizes
        firsts.append(first_of(d))
        weight, left, term, tokens = (
            weight + w @ sizes,
            left + w @ each,
            term + each.sum(),
            tokens + sizes.sum(),
        )
    return (
        File(
            float(np.nanmean(firsts)),
            float(weight / tokens),
            float(left / term) if term else 1.0,
        )
        if tokens
        else None
    )


def weigh(rule, d, got, rng, file):
    """w_k of a rule, [K]; got: `outcomes`; file: `File`."""
    after = since_mistake(got)
    return {
        "sod": lambda: step_weights(d),
        "shuffled": lambda: rng.permutation(step_weights(d)),
        "uniform": lambda: np.ones(len(d)),
        "no-cap": lambda: step_weights(d, delta=None),
        "mask": lambda: np.where(after > 0, 0.0, 1.0),
        "decay": lambda: DECAY**after,
        "mean": lambda: np.full(len(d), file.mean),
        "amount": lambda: np.full(len(d), file.amount),
        "batch": lambda: step_weights(d, file.first),
    }[rule]()


def reader(args, rollouts):
    """measure(rollout) -> (steps, d [K], loss tokens of each step [K], its score); raises
    BadInput at file:line."""
    scores, own = (
        files.Table(args.scores, "scores"),
        files.Table(args.own_scores, "scores") if args.own_scores else None,
    )

    def measure(rollout):
        key = records.key_of(rollout, "rollouts")
        score, mine = (
            files.record_for(scores, rollout, rollouts),
            files.record_for(own, rollout, rollouts) if own else rollout,
        )
        if own and mine["policy"].get("weights") != rollout["policy"].get("weights"):
            raise BadInput(
                f"{own.where(key)}: policy.weights: expected "
                f"{rollout['policy'].get('weights')}, the weights that wrote the "
                f"rollout, got {mine['policy'].get('weights')}"
            )
        if not own and rollout["temperature"] != 1:
            raise BadInput(
                f"{rollouts.where(key)}: temperature: expected 1, as scores are, got "
                f"{rollout['temperature']}: its log-probs are of another "
                f"distribution; give --own-scores"
            )
        steps, mask = steps_or_whole(rollout), rollout["loss_mask"]
        return (
            steps,
            divergences(mine["logprobs"], score["logprobs"], mask, steps),
            np.array([sum(mask[start:end]) for start, end, _ in steps]),
            score,
        )

    return measure


def add_flags(p):
    p.add_argument(
        "--rollouts", required=True, help="JSONL of rollouts, of episodes with tools"
    )
    p.add_argument(
        "--scores", required=True, help="the teacher's scores of them (teacher.py score)"
    )
    p.add_argument(
        "--own-scores",
        help="scores by the model that wrote them, in place of the log-probs that stand in "
        "the rollouts",
    )
    p.add_argument("--out", required=True, help="file to write")
    p.add_argument("--overwrite", action="store_true", help="replace what is there")


def steps(argv):
    p = files.parser(__doc__)
    add_flags(p)
    p.add_argument("--rule", required=True, choices=RULES, help="see above")
    p.add_argument(
        "--seed", type=int, default=0, help="--rule shuffled: how the weights are dealt out"
    )
    args = p.parse_args(argv)
    rollouts = files.Table(args.rollouts, "rollouts")
    measure = reader(args, rollouts)
    # of all: what only the whole file can tell
    drifts = {key: measure(rollouts[key])[1:3] for key in rollouts.keys()}
    if not (file := of_file(drifts.values())):
        raise BadInput(
            f"{args.rollouts}: loss_mask: expected rollouts with loss tokens, got none"
        )
    settings = (
        {"rule": args.rule}
        | file._asdict()
        | {"of_rollouts": len(rollouts)}
        | ({"seed": args.seed} if args.rule == "shuffled" else {})
    )
    with files.Writer(
        args.out,
        "weights",
        settings,
        [args.rollouts, args.scores] + [args.own_scores] * bool(args.own_scores),
        args.overwrite,
    ) as writer:
        for number, key in enumerate(
            files.progress(rollouts.keys(), desc="weigh", unit="rollout")
        ):
            if key in writer:
                continue
            rollout, d = rollouts[key], drifts[key][0]
            w, weights = (
                weigh(
                    args.rule,
                    d,
                    outcomes(rollout),
                    np.random.default_rng([args.seed, number]),
                    file,
                ),
                np.zeros(len(rollout["response_ids"])),
            )
            for (start, end, _), each in zip(steps_or_whole(rollout), w):
                weights[start:end] = each
            writer.write(
                {
                    "id": rollout["id"],
                    "sample": rollout["sample"],
                    "rollout": records.fingerprint(rollout),
                    "rule": args.rule,
                    "weights": [float(f"{x:.9g}") for x in weights],
                    "d": [x if np.isfinite(x) else None for x in records.floats(d)],
                    "w": records.floats(w),
                }
            )
    d, w = (
        np.concatenate([r[name] for r in files.read(args.out, "weights")]).astype(float)
        for name in ("d", "w")
    )
    d, w = d[np.isfinite(d)], w[np.isfinite(d)]
    summary = {
        "out": args.out,
        "records": len(rollouts),
        "d_first": file.first,
        "d_mean": float(d.mean()),
        "w_mean": float(w.mean()),
        "w_max": float(w.max()),
        "w_low": float(np.mean(w < 0.5)),
        "w_bound": float(np.mean(w >= (1 + DELTA) * (1 - 1e-6))),
    }
    print(
        f"methods.sod weigh: {args.out}: {len(rollouts)} rollouts, rule {args.rule}: d_1 "
        f"{file.first:.3f}, d {summary['d_mean']:.3f}; weight mean "
        f"{summary['w_mean']:.3f}, "
        f"below a half in {summary['w_low']:.1%} of the steps, {1 + DELTA:g} and more in "
        f"{summary['w_bound']:.1%}"
    )
    return summary
