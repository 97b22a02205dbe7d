"""How far teacher and student are apart at each step of an episode (SOD, arXiv 2605.07725).

    python -m experiments.sod_drift --rollouts rollouts.jsonl --scores scores.jsonl \\
        --out drift.json --plot drift.png
    python -m experiments.sod_drift ... --model STUDENT --out drift.json

Writes the drift d_k (eq. 6) of clean, recovered and failed episodes by step, and of the step
after a result, a mistake, an outage or a recovery (a result right after one of these): how much
it exceeds that of clean episodes at the same step, and how it changed from the step before.
With the teacher's whole distribution (teacher.py score --top-k V) its entropy stands beside it.
Read `by_outcome` first: d is also large where the student is wrong and the teacher is not.

`left` is the share of the teacher's term sum |log mu - log p_T| that each rule leaves (rules:
experiments/sod_controls.py), `left_quiet` the same in the half of the episodes with the smaller
d_1.  For the placebo, results as long as an error, sample with
--tools '{"calculator": {"pad": 40}}' and compare that file --against the first one's JSON.

--model, the student, adds signal and noise of the teacher's gradient.  Prop. 2: in contexts
that the teacher would never reach, its signal-to-noise ratio goes to 0.  Of the gradients g_i
of (log p_T - log pi) log pi(y_t), the first factor constant, summed over the tokens of a step
or an episode:

    signal |E g|^2 = mean of g_i . g_j over i != j    noise E|g|^2 - |E g|^2    snr their ratio

The ratio also goes to 0 where student and teacher agree, for there the signal does: a small
ratio does not prove a lost teacher.  One backward pass a step, and some 30 copies of the
weights in memory: for small models.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments import sod_controls
from experiments.series import band, means
from methods.sod.weights import (
    add_flags,
    first_of,
    measure_file,
    open_tables,
    step_means,
    steps_or_whole,
)
from opd import cli, disk, files, records
from opd.kernel import linear_logp
from opd.pictures import COLOURS, check_picture, new_picture, refuse_existing, tidy
from opd.policy import hidden_at, load_policy, response_positions
from opd.records import BadInput
from opd.stats import mean_or_none

RULES = ("sod", *sod_controls.RULES)
EVENTS = ("result", "mistake", "outage", "recovery")
CALLS = ("result", "mistake", "outage")

# ---- episodes and their steps


@dataclass(frozen=True)
class Episode:
    """A rollout of K steps."""

    got: list  # [K] outcomes
    d: np.ndarray  # [K]
    tokens: np.ndarray  # [K] loss tokens
    entropy: np.ndarray  # [K] of the teacher, nats; NaN: not known
    gaps: list  # [K - 1] tokens between two steps


def kind_of(got):
    """ "clean" (all calls of an episode had results), "recovered" (the last one had) or
    "error"."""
    calls = [x for x in got if x in CALLS]
    if set(calls) <= {"result"}:
        return "clean"
    return "recovered" if calls[-1] == "result" else "error"


def events(got):
    """What stood before steps 2..K: the outcome of the step before; "recovery" for a result
    right after a mistake or an outage.

    ["result", "mistake", "result", "answer"] -> ["result", "mistake", "recovery"]"""
    return [
        "recovery" if x == "result" and k and got[k - 1] in ("mistake", "outage") else x
        for k, x in enumerate(got[:-1])
    ]


def entropies(score, mask, steps):
    """Mean entropy of the teacher in every step, [K] nats; NaN for a step without loss tokens,
    or unless the score holds the whole distribution."""
    unknown = np.full(len(steps), np.nan)
    if "topk" not in score:
        return unknown
    top = records.unpack(score["topk"]["logprobs"]).astype(np.float64)
    if abs(np.exp(top).sum(1) - 1).max(initial=0) > 1e-3:
        return unknown
    return step_means(-np.where(np.isfinite(top), np.exp(top) * top, 0).sum(1), mask, steps)


def read_episode(rollout, drift, score):
    steps = steps_or_whole(rollout)
    gaps = [after[0] - before[1] for before, after in zip(steps, steps[1:])]
    entropy = entropies(score, rollout["loss_mask"], steps)
    return Episode(sod_controls.outcomes(rollout), drift.d, drift.tokens, entropy, gaps)


def step_rows(episodes):
    """One dict a step, in order; `before` is "start" or of `events`, and only the others have
    a change from the step before."""
    rows = []
    for e in episodes:
        before = ["start", *events(e.got)]
        for k, outcome in enumerate(e.got):
            row = {"kind": kind_of(e.got), "step": k + 1, "outcome": outcome}
            row |= {"before": before[k], "d": e.d[k], "entropy": e.entropy[k]}
            if k:
                row["length"] = e.gaps[k - 1]
                row["change"] = e.d[k] - e.d[k - 1]
                row["entropy_change"] = e.entropy[k] - e.entropy[k - 1]
            rows.append(row)
    return rows


# ---- summaries of steps


def finite(rows, field):
    return [row for row in rows if np.isfinite(row[field])]


def mean_of(rows, field):
    """The mean of the known values of a field, None if there are none."""
    return mean_or_none([row[field] for row in finite(rows, field)])


def by_outcome(rows, field):
    """{outcome: mean of a field}."""
    groups = {}
    for row in finite(rows, field):
        groups.setdefault(row["outcome"], []).append(row)
    return {name: mean_of(group, field) for name, group in sorted(groups.items())}


def by_step(rows, field):
    """{kind of episode: rows of `means` by step}."""
    known = finite(rows, field)
    return {
        kind: means((row["step"], row[field]) for row in known if row["kind"] == kind)
        for kind in sorted({row["kind"] for row in known})
    }


def changes(rows):
    """Means over the steps after one event: tokens between two steps, changes of d and entropy,
    and d above that of clean episodes; the correlation of the first with the last."""
    known = finite(rows, "above")
    length = [row["length"] for row in known]
    above = [row["above"] for row in known]
    correlation = None
    if len(known) > 2 and np.std(length) and np.std(above):
        correlation = float(np.corrcoef(length, above)[0, 1])
    fields = ("length", "change", "above", "entropy_change")
    found = {field: mean_of(rows, field) for field in fields}
    return {"count": len(rows), **found, "length_correlation": correlation}


def share_left(episodes, weights):
    """sum w_k d_k n_k / sum d_k n_k: how much of the teacher's term the weights leave; None
    where there is no term."""
    terms = [np.nan_to_num(e.d) * e.tokens for e in episodes]
    total = sum(term.sum() for term in terms)
    return float(sum(w @ term for w, term in zip(weights, terms)) / total) if total else None


def summarise_drift(episodes, weights, level=None):
    """The numbers of the module's docstring; weights: {rule: [w [K]]}; level: rows of `means`
    of clean episodes that d is compared with (default: those of `episodes`)."""
    rows = step_rows(episodes)
    steps = by_step(rows, "d")
    clean = {row["at"]: row["mean"] for row in level or steps.get("clean", ())}
    for row in rows:
        row["above"] = row["d"] - clean.get(row["step"], np.nan)
    known = finite(rows, "d")
    after = {event: [row for row in known if row["before"] == event] for event in EVENTS}
    kinds = [kind_of(e.got) for e in episodes]
    firsts = np.array([first_of(e.d) for e in episodes])
    quiet = np.argsort(firsts, kind="stable")[: (len(firsts) + 1) // 2]

    def left(some):
        taken = [episodes[i] for i in some]
        return {rule: share_left(taken, [w[i] for i in some]) for rule, w in weights.items()}

    return {
        "rollouts": len(episodes),
        "episodes": {kind: kinds.count(kind) for kind in ("clean", "recovered", "error")},
        "by_step": steps,
        "entropy": by_step(rows, "entropy"),
        "by_outcome": by_outcome(rows, "d"),
        "entropy_by_outcome": by_outcome(rows, "entropy"),
        "after": {event: changes(some) for event, some in after.items()},
        "ways": {event: by_outcome(some, "d") for event, some in after.items()},
        "first": {"mean": float(np.nanmean(firsts)), "median": float(np.nanmedian(firsts))},
        "left": left(range(len(episodes))),
        "left_quiet": left(quiet),
    }


# ---- signal and noise of the teacher's gradient


class Spread:
    """Signal and noise of gradients that are added one by one, without keeping them."""

    def __init__(self):
        self.total = 0.0
        self.squares = 0.0
        self.count = 0

    def add(self, gradient):
        self.total = self.total + gradient
        self.squares += float(gradient.double() @ gradient.double())
        self.count += 1

    def numbers(self):
        """`signal`: squared norm of the mean gradient, without bias (it can come out below 0);
        `noise`: mean squared norm minus that; `snr`: their ratio.  None of fewer than two, or
        where nothing varies."""
        if self.count < 2:
            return {"count": self.count, "signal": None, "noise": None, "snr": None}
        total = self.total.double()
        signal = (float(total @ total) - self.squares) / (self.count * (self.count - 1))
        noise = self.squares / self.count - signal
        snr = signal / noise if noise > 0 else None
        return {"count": self.count, "signal": signal, "noise": noise, "snr": snr}


def step_gradients(policy, rollout, score):
    """Yields the K flat gradients [P] of the teacher's term, one a step: sum over its loss
    tokens of (log p_T - log pi) grad log pi(y_t); zeros where it has none."""
    mask = np.array(rollout["loss_mask"], bool)
    parameters = list(policy.model.parameters())
    hidden = hidden_at(
        policy.model,
        [rollout["prompt_ids"] + rollout["response_ids"]],
        [response_positions(rollout["prompt_ids"], mask)],
    )
    ids = torch.tensor(rollout["response_ids"], dtype=torch.int64, device=hidden.device)
    ids = ids[mask, None]
    logp = linear_logp(hidden, policy.head, ids, **policy.head_options)[0][:, 0]
    teacher = torch.tensor(score["logprobs"], dtype=torch.float32, device=hidden.device)[mask]
    terms = (teacher - logp.detach()) * logp
    for start, end, _ in steps_or_whole(rollout):
        loss = terms[mask[:start].sum() : mask[:end].sum()].sum()
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        yield torch.cat(
            [
                torch.zeros(w.numel()) if g is None else g.flatten().float().cpu()
                for w, g in zip(parameters, grads)
            ]
        )


def signal_to_noise(policy, rollouts, scores, episodes, weights):
    """`Spread.numbers` of the teacher's gradient: of calls by what stood before them, of all
    steps by their outcome, and of whole episodes by the rule that weights their steps (`mean`
    and `amount` have the ratio of `uniform`)."""
    spreads = {name: defaultdict(Spread) for name in ("after", "outcome", "rule")}
    rules = [rule for rule in weights if rule not in ("mean", "amount")]
    done = cli.progress(rollouts, desc="gradients", unit="rollout", total=len(rollouts))
    for n, (rollout, e) in enumerate(zip(done, episodes)):
        score = files.record_for(scores, rollout, rollouts)
        before = ["start", *events(e.got)]
        sums = dict.fromkeys(rules, 0.0)
        for k, gradient in enumerate(step_gradients(policy, rollout, score)):
            if e.got[k] in CALLS:
                spreads["after"][before[k]].add(gradient)
            spreads["outcome"][e.got[k]].add(gradient)
            for rule in rules:
                sums[rule] = sums[rule] + float(weights[rule][n][k]) * gradient
        for rule in rules:
            spreads["rule"][rule].add(sums[rule])
    return {
        name: {group: spread.numbers() for group, spread in sorted(groups.items())}
        for name, groups in spreads.items()
    }


# ---- the command


def read_level(path):
    """`by_step` of the clean episodes in the JSON of an earlier run."""
    try:
        rows = json.loads(Path(path).read_text())["by_step"]["clean"]
        return [{"at": int(row["at"]), "mean": float(row["mean"])} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"--against {path}: expected what experiments.sod_drift writes of a file with "
            f"clean episodes, got {type(error).__name__}: {error}"
        ) from None


def check_writer(rollouts, policy):
    """Refuses rollouts that `policy` has not written: its gradient is of other samples."""
    for rollout in rollouts:
        if rollout["policy"].get("weights") != policy.identity["weights"]:
            raise BadInput(
                f"{rollouts.where(records.key_of(rollout, 'rollouts'))}: policy.weights: "
                f"expected {policy.identity['weights']}, got "
                f"{rollout['policy'].get('weights')}: --model is the model that wrote the "
                f"rollouts"
            )


def draw_steps(axes, by_step):
    """d by step: {kind of episode: rows of `means`}."""
    for colour, (kind, rows) in zip(COLOURS, by_step.items()):
        band(axes, rows, colour, kind)
    axes.set(xlabel="step", ylabel="d: |log μ − log p_T|, nats a token", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)


def figure(by_step):
    """The matplotlib figure of d by step, for each kind of episode."""
    picture = new_picture(4.6, 3.9)
    axes = picture.subplots()
    draw_steps(axes, by_step)
    tidy(axes)
    return picture


def main(argv=None):
    p = cli.parser(__doc__)
    add_flags(p)
    p.add_argument("--plot", help="picture to write (.png, .svg, .pdf)")
    p.add_argument(
        "--against",
        metavar="JSON",
        help="an earlier --out, whose clean episodes d is compared with (default: this file's)",
    )
    p.add_argument("--model", metavar="STUDENT", help="the model that wrote the rollouts")
    p.add_argument("--device", help="of --model (default: a GPU if there is one)")
    args = p.parse_args(argv)
    level = read_level(args.against) if args.against else None
    refuse_existing(args.out, args.overwrite)
    if args.plot:
        check_picture(args.plot, args.overwrite)
    rollouts, scores, own = open_tables(args.rollouts, args.scores, args.own_scores)
    policy = load_policy(args.model, "float32", args.device) if args.model else None
    if policy:
        check_writer(rollouts, policy)
    drifts = measure_file(rollouts, scores, own)
    episodes = [
        read_episode(rollouts[key], drift, scores[key]) for key, drift in drifts.items()
    ]
    gots = [e.got for e in episodes]
    drifts = list(drifts.values())
    weights = {rule: sod_controls.weights_of(rule, drifts, gots) for rule in RULES}
    result = summarise_drift(episodes, weights, level)
    if policy:
        result["gradient"] = signal_to_noise(policy, rollouts, scores, episodes, weights)
    disk.write_atomically(args.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.plot:
        figure(result["by_step"]).savefig(args.plot)
    above = {event: found["above"] for event, found in result["after"].items()}
    print(
        f"experiments.sod_drift: {args.out}: episodes {result['episodes']}; d_1 "
        f"{result['first']['mean']:.3f}; d above that of clean episodes, after {above}"
    )
    return result


if __name__ == "__main__":
    cli.run(main)
