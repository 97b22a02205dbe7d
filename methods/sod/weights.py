"""Weights the teacher's term at each step of an episode with tools (SOD, arXiv 2605.07725).

    python -m methods.sod weigh --rollouts rollouts.jsonl --scores scores.jsonl --out w.jsonl
    python train.py --method sod ... --scores scores.jsonl --token-weights w.jsonl
    python -m experiments.sod_drift --rollouts rollouts.jsonl --scores scores.jsonl --out d.json

After a wrong call the context holds foreign text, the next steps drift away from what the
teacher knows, and its log-probs there are worth less.  SOD measures the drift of step k on the
sampled tokens alone and weights the teacher down where the drift exceeds that of step 1:

    d_k = mean over the tokens of step k of |log mu(y_t) - log p_T(y_t)|     (eq. 6, nats)
    w_k = min( prod_{u<k} (d_u + eps) / (d_{u+1} + eps), 1 + delta )         (eq. 7)
        = min( (d_1 + eps) / (d_k + eps), 1 + delta )        eps = 1e-6, delta = 0.2

The product telescopes and the bound is put on its result, so w_k depends only on d_1 and d_k,
and w_1 = 1.   d [0.22, 0.44, 1.1, 0.11] -> w [1, 0.5, 0.2, 1.2].

log mu are the rollout's own log-probs.  If they were computed in another precision than the
teacher's, give --own-scores, the file of `teacher.py score --model STUDENT`.

A masked token counts neither in d_k nor in the loss.  A step of masked tokens alone has no d_k
(NaN) and weight 1; d_1 is then that of the next step.  The paper's ablations and other controls
are in experiments/sod_controls.py.

Differences from the released code: 1. a malformed call is answered by an error, there it ends
the episode; 2. a tool's text is cut at its end, there in its middle at 256 characters; 3. no
penalty on overlong episodes; 4. log mu is the sampler's, there the actor computes it again.
"""

from dataclasses import dataclass

import numpy as np

from opd import cli, files, records
from opd.records import LARGEST, NUMBERS, BadInput, Type, declare, list_of, number_in, or_none

DRIFTS = Type("a list of numbers >= 0 or null", list_of(or_none(number_in(0, LARGEST))))


def check_steps(record):
    """What does not fit between the weights of the steps and their drifts, or None."""
    if record["rule"] != "sod" and not {"d", "w"} & record.keys():
        return None
    counts = [len(record.get(name, ())) for name in ("d", "w")]
    if counts[0] == counts[1]:
        return None
    return f"w: expected as many as in `d`, {counts[0]}, got {counts[1]}"


declare("weights", check_steps, d=DRIFTS, w=NUMBERS)

EPS = 1e-6
DELTA = 0.2

# ---- drift and weights of one episode of K steps and T response tokens


def steps_or_whole(rollout):
    """[[start, end, ok]]: the steps of an episode; an answer without tools is one step."""
    return rollout.get("steps") or [[0, len(rollout["response_ids"]), None]]


def step_means(values, mask, steps):
    """Mean of [T] values over the loss tokens of every step, [K]; NaN for a step without."""
    values = np.asarray(values, np.float64)
    mask = np.asarray(mask, bool)
    parts = [values[start:end][mask[start:end]] for start, end, _ in steps]
    return np.array([part.mean() if len(part) else np.nan for part in parts])


def divergences(own, teacher, mask, steps):
    """d_k of every step, [K] (eq. 6): own, teacher log-probs [T], mask [T].

    divergences([-1, -1, -2], [-2, -1, -2], [1, 1, 1], [[0, 2, True], [2, 3, None]]) -> [0.5,
    0]"""
    return step_means(np.abs(np.subtract(own, teacher)), mask, steps)


def first_of(d):
    """d_1: that of the first step that has one, NaN if none has."""
    return next((x for x in d if np.isfinite(x)), np.nan)


def step_weights(d, first=None, delta=DELTA):
    """w_k from d_k, [K] (eq. 7), 1 where d_k is NaN.

    first: takes the place of d_1; delta: None for no bound."""
    d = np.asarray(d, np.float64)
    reference = first_of(d) if first is None else first
    w = np.where(np.isfinite(d), (reference + EPS) / (d + EPS), 1.0)
    return w if delta is None else np.minimum(w, 1 + delta)


# ---- files


@dataclass(frozen=True)
class Drift:
    d: np.ndarray  # [K]
    tokens: np.ndarray  # [K] loss tokens of each step


def measure(rollout, rollouts, scores, own=None):
    """Drift of one rollout.  rollouts, scores, own: the Tables; own: scores by the student."""
    key = records.key_of(rollout, "rollouts")
    score = files.record_for(scores, rollout, rollouts)
    mine = files.record_for(own, rollout, rollouts) if own else rollout
    writer = rollout["policy"].get("weights")
    if mine["policy"].get("weights") != writer:
        raise BadInput(
            f"{own.where(key)}: policy.weights: expected {writer}, the weights that wrote the "
            f"rollout, got {mine['policy'].get('weights')}"
        )
    if not own and rollout["temperature"] != 1:
        raise BadInput(
            f"{rollouts.where(key)}: temperature: expected 1, as scores are, got "
            f"{rollout['temperature']}: its log-probs are of another distribution; give "
            f"--own-scores"
        )
    steps = steps_or_whole(rollout)
    mask = rollout["loss_mask"]
    d = divergences(mine["logprobs"], score["logprobs"], mask, steps)
    return Drift(d, np.array([sum(mask[start:end]) for start, end, _ in steps]))


def measure_file(rollouts, scores, own=None):
    """{key: Drift} of all rollouts; the arguments are Tables."""
    drifts = {key: measure(rollouts[key], rollouts, scores, own) for key in rollouts.keys()}
    if not any(drift.tokens.any() for drift in drifts.values()):
        raise BadInput(
            f"{rollouts.path}: loss_mask: expected rollouts with loss tokens, got none"
        )
    return drifts


def weight_record(rollout, rule, d, w):
    """The weights record of one rollout: tokens between steps, a tool's, have weight 0."""
    weights = np.zeros(len(rollout["response_ids"]))
    for (start, end, _), step_weight in zip(steps_or_whole(rollout), w):
        weights[start:end] = step_weight
    return records.weights_record(rollout, rule, weights) | {
        "d": [x if np.isfinite(x) else None for x in records.floats(d)],
        "w": records.floats(w),
    }


def summarise(out, rule, drifts):
    """What a weights file holds, and a line that says so."""
    rows = list(files.read(out, "weights"))
    d = np.concatenate([row["d"] for row in rows]).astype(float)
    w = np.concatenate([row["w"] for row in rows])[np.isfinite(d)]
    d = d[np.isfinite(d)]
    summary = {
        "out": out,
        "records": len(rows),
        "d_first": float(np.nanmean([first_of(drift.d) for drift in drifts])),
        "d_mean": float(d.mean()),
        "w_mean": float(w.mean()),
        "w_max": float(w.max()),
        "w_low": float(np.mean(w < 0.5)),
        "w_bound": float(np.mean(w >= (1 + DELTA) * (1 - 1e-6))),
    }
    print(
        f"{out}: {len(rows)} rollouts, rule {rule}: d_1 {summary['d_first']:.3f}, d "
        f"{summary['d_mean']:.3f}; weight mean {summary['w_mean']:.3f}, below 0.5 in "
        f"{summary['w_low']:.1%} of the steps, at least {1 + DELTA:g} in "
        f"{summary['w_bound']:.1%}"
    )
    return summary


def write_weights(out, rule, rollouts, drifts, weights, settings, inputs, overwrite=False):
    """Writes what `out` lacks of drifts {key: Drift} and weights {key: w [K]}; returns the
    summary."""
    files.fill(
        out,
        "weights",
        drifts,
        lambda missing: (
            weight_record(rollouts[key], rule, drifts[key].d, weights[key]) for key in missing
        ),
        {"rule": rule} | settings,
        inputs,
        overwrite,
    )
    return summarise(out, rule, drifts.values())


# ---- the command


def add_flags(p):
    p.add_argument("--rollouts", required=True, help="JSONL of episodes with tools")
    p.add_argument("--scores", required=True, help="the teacher's scores (teacher.py score)")
    p.add_argument(
        "--own-scores",
        help="the student's scores of its rollouts, in place of the log-probs stored in them",
    )
    p.add_argument("--out", required=True, help="file to write")
    p.add_argument("--overwrite", action="store_true", help="replace what is there")


def open_tables(rollouts, scores, own):
    """The Tables of three paths; `own` may be None."""
    own_scores = files.Table(own, "scores") if own else None
    return files.Table(rollouts, "rollouts"), files.Table(scores, "scores"), own_scores


def main(argv=None):
    p = cli.parser(__doc__)
    add_flags(p)
    args = p.parse_args(argv)
    rollouts, scores, own = open_tables(args.rollouts, args.scores, args.own_scores)
    drifts = measure_file(rollouts, scores, own)
    weights = {key: step_weights(drift.d) for key, drift in drifts.items()}
    inputs = [path for path in (args.rollouts, args.scores, args.own_scores) if path]
    return write_weights(args.out, "sod", rollouts, drifts, weights, {}, inputs, args.overwrite)
