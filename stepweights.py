"""weigh.py steps and weigh.py drift: how much the teacher counts at each step of an episode
with tools.  SOD (arXiv 2605.07725), its ablations, and a look.

    python weigh.py steps --rollouts R --scores S --rule sod --out weights.jsonl
    python weigh.py drift --rollouts R --scores S --out drift.json --plot drift.png --model
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

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import records
from eval import COLOURS, claim, new_picture, tidy
from kernel import linear_logp
from records import BadInput
from rollout import hidden_at, load_policy, response_positions

EPS, DELTA, DECAY = 1e-6, 0.2, 0.9
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
        for _, _, ok in whole(rollout)
        for next_call in [{} if ok is None else next(calls)]
    ]


def whole(rollout):
    """The steps of a rollout; without tools an answer is one step."""
    return rollout.get("steps") or [[0, len(rollout["response_ids"]), None]]


def since_mistake(came):
    """Steps since the first mistake, 0 up to and with it.   ["result", "mistake", "result",
    "answer"] -> [0, 0, 1, 2]"""
    return np.maximum(
        np.arange(len(came)) - (came.index("mistake") if "mistake" in came else len(came)), 0
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


def weigh(rule, d, came, rng, file):
    """w_k of a rule, [K]; came: `outcomes`; file: `File`."""
    after = since_mistake(came)
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
        records.Table(args.scores, "scores"),
        records.Table(args.own_scores, "scores") if args.own_scores else None,
    )

    def measure(rollout):
        key = records.key_of(rollout, "rollouts")
        score, mine = (
            records.partner(scores, rollout, rollouts),
            records.partner(own, rollout, rollouts) if own else rollout,
        )
        if own and mine["policy"].get("weights") != rollout["policy"].get("weights"):
            raise BadInput(
                f"{own.where(key)}: policy.weights: expected "
                f"{rollout['policy'].get('weights')}, the weights that wrote the "
                f"rollout, came {mine['policy'].get('weights')}"
            )
        if not own and rollout["temperature"] != 1:
            raise BadInput(
                f"{rollouts.where(key)}: temperature: expected 1, as scores are, came "
                f"{rollout['temperature']}: its log-probs are of another "
                f"distribution; give --own-scores"
            )
        steps, mask = whole(rollout), rollout["loss_mask"]
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
    p = records.parser(__doc__)
    add_flags(p)
    p.add_argument("--rule", required=True, choices=RULES, help="see above")
    p.add_argument(
        "--seed", type=int, default=0, help="--rule shuffled: how the weights are dealt out"
    )
    args = p.parse_args(argv)
    rollouts = records.Table(args.rollouts, "rollouts")
    measure = reader(args, rollouts)
    # of all: what only the whole file can tell
    drifts = {key: measure(rollouts[key])[1:3] for key in rollouts.keys()}
    if not (file := of_file(drifts.values())):
        raise BadInput(
            f"{args.rollouts}: loss_mask: expected rollouts with loss tokens, came none"
        )
    settings = (
        {"rule": args.rule}
        | file._asdict()
        | {"of_rollouts": len(rollouts)}
        | ({"seed": args.seed} if args.rule == "shuffled" else {})
    )
    with records.Writer(
        args.out,
        "weights",
        settings,
        [args.rollouts, args.scores] + [args.own_scores] * bool(args.own_scores),
        args.overwrite,
    ) as writer:
        for number, key in enumerate(
            records.progress(rollouts.keys(), desc="weigh", unit="rollout")
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
            for (start, end, _), each in zip(whole(rollout), w):
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
        np.concatenate([r[name] for r in records.read(args.out, "weights")]).astype(float)
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
        f"weigh.py steps: {args.out}: {len(rollouts)} rollouts, rule {args.rule}: d_1 "
        f"{file.first:.3f}, d {summary['d_mean']:.3f}; weight mean "
        f"{summary['w_mean']:.3f}, "
        f"below a half in {summary['w_low']:.1%} of the steps, {1 + DELTA:g} and more in "
        f"{summary['w_bound']:.1%}"
    )
    return summary


# ---- drift


def kind_of(came):
    """What became of an episode's calls: "clean" (all had results), "recovered" (the last one
    had) or "error"."""
    calls = [x for x in came if x in ("result", "mistake", "outage")]
    return (
        "clean"
        if set(calls) <= {"result"}
        else "recovered"
        if calls[-1] == "result"
        else "error"
    )


def entropies(score, mask, steps):
    """Mean entropy of the teacher in every step, [K] nats, from all its log-probs, NaN as in
    `divergences`; None unless the score has the whole distribution."""
    if "topk" not in score:
        return None
    top = records.unpack(score["topk"]["logprobs"]).astype(np.float64)
    if abs(np.exp(top).sum(1) - 1).max(initial=0) > 1e-3:
        return None
    return step_means(-np.where(np.isfinite(top), np.exp(top) * top, 0).sum(1), mask, steps)


EVENTS = ("result", "mistake", "outage", "recovery")


def events(came):
    """What stood between step k + 1 and the next, for k = 0..K-2: the outcome of step k + 1;
    "recovery" for a result right after a mistake or an outage.

    ["result", "mistake", "result", "answer"] -> ["result", "mistake", "recovery"]"""
    return [
        "recovery" if x == "result" and k and came[k - 1] in ("mistake", "outage") else x
        for k, x in enumerate(came[:-1])
    ]


def summary_of(changes):
    """Of [tokens between two steps, change of d, d above that of clean episodes at the same
    step, change of entropy] rows (NaN: not known): their means, and the correlation of the
    first with the third."""
    length, change, above, entropy = np.array(changes, float).reshape(-1, 4).T

    def mean(x):
        return float(x[np.isfinite(x)].mean()) if np.isfinite(x).any() else None

    known = np.isfinite(above)
    related = known.sum() > 2 and length[known].std() and above[known].std()
    return {
        "count": len(change),
        "length": mean(length),
        "change": mean(change),
        "above": mean(above),
        "entropy_change": mean(entropy),
        "length_correlation": float(np.corrcoef(length[known], above[known])[0, 1])
        if related
        else None,
    }


class Spread:
    """Signal and noise of gradients that are added one by one, without keeping them."""

    def __init__(self):
        self.total, self.squares, self.count = 0.0, 0.0, 0

    def add(self, gradient):
        self.total, self.squares, self.count = (
            self.total + gradient,
            self.squares + float(gradient.double() @ gradient.double()),
            self.count + 1,
        )

    def numbers(self):
        """`signal`: squared norm of the mean gradient, without bias: the mean of g_i . g_j over
        i != j, which can come out below 0 where there is little; `noise`: mean squared norm
        minus that; `snr`: their ratio.  None of fewer than two, or where nothing varies."""
        found = {"count": self.count, "signal": None, "noise": None, "snr": None}
        if self.count > 1:
            total = self.total.double()
            signal = (float(total @ total) - self.squares) / (self.count * (self.count - 1))
            noise = self.squares / self.count - signal
            found |= {
                "signal": signal,
                "noise": noise,
                "snr": signal / noise if noise > 0 else None,
            }
        return found


def step_gradients(policy, rollout, score, spans):
    """[K] flat gradients [P] of the teacher's term, one a step: sum over its loss tokens of
    (log p_T - log pi) grad log pi(y_t); zeros where it has none."""
    mask, weights = np.array(rollout["loss_mask"], bool), list(policy.model.parameters())
    hidden = hidden_at(
        policy.model,
        [rollout["prompt_ids"] + rollout["response_ids"]],
        [response_positions(rollout["prompt_ids"], mask)],
    )
    ids = torch.tensor(rollout["response_ids"], device=hidden.device)[mask, None]
    logp = linear_logp(hidden, policy.head, ids, **policy.head_options)[0][:, 0]
    terms = (
        torch.tensor(score["logprobs"], dtype=torch.float32, device=hidden.device)[mask]
        - logp.detach()
    ) * logp
    for start, end, _ in spans:
        first, last = int(mask[:start].sum()), int(mask[:end].sum())
        grads = torch.autograd.grad(
            terms[first:last].sum(), weights, retain_graph=True, allow_unused=True
        )
        yield torch.cat(
            [
                torch.zeros(w.numel()) if g is None else g.flatten().float().cpu()
                for w, g in zip(weights, grads)
            ]
        )


class Episode(NamedTuple):
    """What `drift` keeps of a rollout, of its K steps: outcomes, d_k, loss tokens, the
    teacher's entropy (or None), and the tokens between steps [K - 1]."""

    came: list
    d: np.ndarray
    sizes: np.ndarray
    entropy: np.ndarray | None
    gaps: list


def all_weights(episodes):
    """{rule: w [K]} of every episode."""
    file = of_file((e.d, e.sizes) for e in episodes)
    return [
        {
            rule: weigh(rule, e.d, e.came, np.random.default_rng([0, number]), file)
            for rule in RULES
        }
        for number, e in enumerate(episodes)
    ]


def left_of(episodes, weights):
    """{rule: sum of w_k d_k n_k / sum of d_k n_k}: how much of the teacher's term its weights
    leave; None where there is no term."""
    terms = [np.nan_to_num(e.d) * e.sizes for e in episodes]
    total = sum(term.sum() for term in terms)
    return {
        rule: float(sum(w[rule] @ term for w, term in zip(weights, terms)) / total)
        if total
        else None
        for rule in RULES
    }


def look(episodes, weights, level=None):
    """What `drift` finds in episodes and their `all_weights`; level: `by_step` of the clean
    episodes that d is held against (default: their own)."""
    from weigh import by_offset, means

    places, unsure, outcome, unsure_outcome, changes, ways = (
        {},
        {},
        {},
        {},
        {event: [] for event in EVENTS},
        {},
    )
    for e in episodes:
        entropy = np.full(len(e.d), np.nan) if e.entropy is None else e.entropy
        for k, (came, d, h) in enumerate(zip(e.came, e.d, entropy)):
            for value, by_step, by_outcome in (
                (d, places, outcome),
                (h, unsure, unsure_outcome),
            ):
                if np.isfinite(value):
                    by_step.setdefault(kind_of(e.came), []).append((k + 1, value))
                    by_outcome.setdefault(came, []).append(float(value))
        for before, came, d in zip(events(e.came), e.came[1:], e.d[1:]):
            if np.isfinite(d):
                ways.setdefault(before, {}).setdefault(came, []).append(float(d))
    by_step = {kind: means(pairs) for kind, pairs in sorted(places.items())}
    clean = {
        row["at"]: row["mean"] for row in (by_step.get("clean", ()) if level is None else level)
    }
    for e in episodes:
        for k, event in enumerate(events(e.came)):
            if event in changes and np.isfinite(e.d[k + 1]):
                changes[event].append(
                    (
                        e.gaps[k],
                        e.d[k + 1] - e.d[k],
                        e.d[k + 1] - clean.get(k + 2, np.nan),
                        np.nan if e.entropy is None else e.entropy[k + 1] - e.entropy[k],
                    )
                )
    slips = [e.came.index("mistake") if "mistake" in e.came else None for e in episodes]
    firsts = np.array([first_of(e.d) for e in episodes])
    # the half with the smaller ones
    order = np.argsort(firsts, kind="stable")[: (len(firsts) + 1) // 2]
    return {
        "rollouts": len(episodes),
        "episodes": {
            kind: sum(kind_of(e.came) == kind for e in episodes)
            for kind in ("clean", "recovered", "error")
        },
        "by_step": by_step,
        "entropy": {kind: means(pairs) for kind, pairs in sorted(unsure.items())},
        "since_mistake": by_offset([e.d for e in episodes], slips),
        "by_outcome": {name: float(np.mean(x)) for name, x in sorted(outcome.items())},
        "entropy_by_outcome": {
            name: float(np.mean(x)) for name, x in sorted(unsure_outcome.items())
        },
        "after": {event: summary_of(rows) for event, rows in changes.items()},
        "ways": {
            before: {
                came: {"mean": float(np.mean(x)), "count": len(x)}
                for came, x in sorted(group.items())
            }
            for before, group in sorted(ways.items())
        },
        "first": {"mean": float(np.nanmean(firsts)), "median": float(np.nanmedian(firsts))},
        "left": left_of(episodes, weights),
        "left_quiet": left_of([episodes[i] for i in order], [weights[i] for i in order]),
    }


def signal_to_noise(policy, rollouts, measure, episodes, weights):
    """`Spread.numbers` of the teacher's gradient: of calls by what stood before them ("start",
    else `events`), of all steps by what came of them, and of whole episodes by the rule that
    weights their steps (`mean` and `amount` have the ratio of `uniform`)."""
    after, outcome, rules = {}, {}, {}
    for rollout, e, each in zip(
        records.progress(rollouts, desc="gradients", unit="rollout", total=len(rollouts)),
        episodes,
        weights,
    ):
        (spans, _, _, score), sums = (
            measure(rollout),
            dict.fromkeys([rule for rule in RULES if rule not in ("mean", "amount")], 0.0),
        )
        for k, (event, gradient) in enumerate(
            zip(["start", *events(e.came)], step_gradients(policy, rollout, score, spans))
        ):
            if e.came[k] in ("result", "mistake", "outage"):
                after.setdefault(event, Spread()).add(gradient)
            outcome.setdefault(e.came[k], Spread()).add(gradient)
            for rule in sums:
                sums[rule] = sums[rule] + float(each[rule][k]) * gradient
        for rule, gradient in sums.items():
            rules.setdefault(rule, Spread()).add(gradient)
    return {
        name: {group: spread.numbers() for group, spread in sorted(groups.items())}
        for name, groups in (("after", after), ("outcome", outcome), ("rule", rules))
    }


def read_level(path):
    """`by_step` of the clean episodes of an earlier look."""
    try:
        rows = json.loads(Path(path).read_text())["by_step"]["clean"]
        return [{"at": int(row["at"]), "mean": float(row["mean"])} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"--against {path}: expected what weigh.py drift writes of a file with clean "
            f"episodes, came {type(error).__name__}: {error}"
        ) from None


def drift(argv):
    p = records.parser(
        "How far the teacher and the student are apart, step by step: d_k of clean, "
        "recovered and failed episodes, by steps since the first mistake, and of "
        "the step\n"
        "after a result, a mistake, an outage, or a recovery (a result right after one of "
        "these): how much it is above the same step of clean episodes, and how it\n"
        "has changed from the step before.  With the teacher's whole distribution (score "
        "--top-k V) its entropy beside it.  For the placebo, right outputs of an\n"
        "error's length, sample with --tool-options '{\"pad\": 40}' and look at that file "
        "--against the first look.  Read `by_outcome` first: d is also large where "
        "the student is wrong and\n"
        "the teacher is not.  --model, the student: how much of the teacher's gradient of a "
        "step, or of an episode under each rule, is the same for all, and how much "
        "differs.\n"
        "`left` is how much of the teacher's term sum |log mu - log p_T| each rule leaves, "
        "`left_quiet` the same of the half of the episodes with the smaller "
        "d_1.\n\n"
        "    python weigh.py drift --rollouts R --scores S --out drift.json --plot drift.png"
    )
    add_flags(p)
    p.add_argument("--plot", help="picture to write (.png, .svg, .pdf)")
    p.add_argument(
        "--against",
        metavar="JSON",
        help="an earlier look, whose clean episodes are the level that d is held against "
        "(default: this file's own)",
    )
    p.add_argument(
        "--model",
        metavar="STUDENT",
        help="the model that wrote the rollouts: signal and noise of the teacher's gradient "
        "(one backward pass a step; some 30 copies of its weights in memory: for "
        "small models)",
    )
    p.add_argument("--device", help="of --model (default: a GPU if there is one)")
    args = p.parse_args(argv)
    if not (args.plot or ".png").endswith((".png", ".svg", ".pdf")):
        raise BadInput(f"--plot {args.plot}: expected a name that ends in .png, .svg or .pdf")
    if args.device and not args.model:
        raise BadInput("--device: is that of --model, which is not given")
    level = read_level(args.against) if args.against else None
    for path in (args.out, args.plot):
        claim(path, args.overwrite)
    rollouts = records.Table(args.rollouts, "rollouts")
    measure, episodes = reader(args, rollouts), []
    policy = load_policy(args.model, "float32", args.device) if args.model else None
    for rollout in records.progress(
        rollouts, desc="measure", unit="rollout", total=len(rollouts)
    ):
        spans, d, sizes, score = measure(rollout)
        if policy and rollout["policy"].get("weights") != policy.identity["weights"]:
            raise BadInput(
                f"{rollouts.where(records.key_of(rollout, 'rollouts'))}: policy.weights: "
                f"expected {policy.identity['weights']}, the weights of "
                f"{args.model}, "
                f"came {rollout['policy'].get('weights')}: --model is the model that wrote "
                f"the rollouts"
            )
        episodes.append(
            Episode(
                outcomes(rollout),
                d,
                sizes,
                entropies(score, rollout["loss_mask"], spans),
                [b[0] - a[1] for a, b in zip(spans, spans[1:])],
            )
        )
    if not sum(e.sizes.sum() for e in episodes):
        raise BadInput(
            f"{args.rollouts}: loss_mask: expected rollouts with loss tokens, came none"
        )
    weights = all_weights(episodes)
    result = look(episodes, weights, level)
    if policy:
        result["gradient"] = signal_to_noise(policy, rollouts, measure, episodes, weights)
    records.write_atomically(args.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.plot:
        figure(result).savefig(args.plot)

    def show(x):
        return "none" if x is None else f"{x:+.3f}"

    def share(x):
        return "none" if x is None else f"{x:.0%}"

    print(
        f"weigh.py drift: d_1 mean {result['first']['mean']:.3f}, median "
        f"{result['first']['median']:.3f}; left of the teacher's term, and in the "
        f"half of the episodes with the smaller d_1: "
        + ", ".join(
            f"{rule} {share(x)} and {share(result['left_quiet'][rule])}"
            for rule, x in result["left"].items()
        )
    )
    if policy:
        print(
            "weigh.py drift: signal to noise of an episode's gradient: "
            + ", ".join(
                f"{show(found['snr'])} {rule}"
                for rule, found in result["gradient"]["rule"].items()
            )
        )
    print(
        f"weigh.py drift: {args.out}: "
        f"{', '.join(f'{n} {kind}' for kind, n in result['episodes'].items())} "
        f"episodes; d above that of clean episodes at the same step: "
        + ", ".join(
            f"{show(found['above'])} after {found['count']} "
            f"{event}{'s' * (found['count'] != 1)}"
            for event, found in result["after"].items()
        ).replace("recoverys", "recoveries")
    )
    return result


def figure(result):
    """The matplotlib figure of `drift`: d by step, by steps since the first mistake, and the
    teacher's entropy where it is known."""
    from weigh import band

    nats = "d: |log μ − log p_T|, nats a token"
    panels = [
        ("step", result["by_step"], nats),
        (
            "steps since the first mistake",
            {"episodes with a mistake": result["since_mistake"]},
            nats,
        ),
    ]
    panels += [("step", result["entropy"], "the teacher's entropy, nats")] * bool(
        result["entropy"]
    )
    picture = new_picture(4.6 * len(panels), 3.9)
    for axes, (label, groups, unit) in zip(
        picture.subplots(1, len(panels), squeeze=False)[0], panels
    ):
        since = label != "step"
        for colour, (name, rows) in zip(COLOURS, groups.items()):
            if rows:  # there may be no episode with a mistake
                band(
                    axes,
                    rows,
                    colour,
                    name,
                    "same steps of episodes without one" if since else None,
                )
        if since:
            axes.axvline(0.5, color="0.6", linewidth=1)
        axes.set(xlabel=label, ylabel=unit, ylim=(0, None))
        if any(groups.values()):
            axes.legend(frameon=False, fontsize=8)
        tidy(axes)
    return picture
