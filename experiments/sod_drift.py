"""How far student and teacher are apart at each step of an episode, and how noisy the teacher's
gradient is."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from experiments.series import band, by_offset, means
from methods.sod.weights import (
    RULES,
    add_flags,
    first_of,
    of_file,
    outcomes,
    reader,
    step_means,
    weigh,
)
from opd import files, records
from opd.kernel import linear_logp
from opd.pictures import COLOURS, new_picture, refuse_existing, tidy
from opd.policy import hidden_at, load_policy, response_positions
from opd.records import BadInput

# ---- drift


def kind_of(got):
    """What became of an episode's calls: "clean" (all had results), "recovered" (the last one
    had) or "error"."""
    calls = [x for x in got if x in ("result", "mistake", "outage")]
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


def events(got):
    """What stood between step k + 1 and the next, for k = 0..K-2: the outcome of step k + 1;
    "recovery" for a result right after a mistake or an outage.

    ["result", "mistake", "result", "answer"] -> ["result", "mistake", "recovery"]"""
    return [
        "recovery" if x == "result" and k and got[k - 1] in ("mistake", "outage") else x
        for k, x in enumerate(got[:-1])
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

    got: list
    d: np.ndarray
    sizes: np.ndarray
    entropy: np.ndarray | None
    gaps: list


def all_weights(episodes):
    """{rule: w [K]} of every episode."""
    file = of_file((e.d, e.sizes) for e in episodes)
    return [
        {
            rule: weigh(rule, e.d, e.got, np.random.default_rng([0, number]), file)
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


def summarise_drift(episodes, weights, level=None):
    """What `drift` finds in episodes and their `all_weights`; level: `by_step` of the clean
    episodes that d is held against (default: their own)."""

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
        for k, (got, d, h) in enumerate(zip(e.got, e.d, entropy)):
            for value, by_step, by_outcome in (
                (d, places, outcome),
                (h, unsure, unsure_outcome),
            ):
                if np.isfinite(value):
                    by_step.setdefault(kind_of(e.got), []).append((k + 1, value))
                    by_outcome.setdefault(got, []).append(float(value))
        for before, got, d in zip(events(e.got), e.got[1:], e.d[1:]):
            if np.isfinite(d):
                ways.setdefault(before, {}).setdefault(got, []).append(float(d))
    by_step = {kind: means(pairs) for kind, pairs in sorted(places.items())}
    clean = {
        row["at"]: row["mean"] for row in (by_step.get("clean", ()) if level is None else level)
    }
    for e in episodes:
        for k, event in enumerate(events(e.got)):
            if event in changes and np.isfinite(e.d[k + 1]):
                changes[event].append(
                    (
                        e.gaps[k],
                        e.d[k + 1] - e.d[k],
                        e.d[k + 1] - clean.get(k + 2, np.nan),
                        np.nan if e.entropy is None else e.entropy[k + 1] - e.entropy[k],
                    )
                )
    slips = [e.got.index("mistake") if "mistake" in e.got else None for e in episodes]
    firsts = np.array([first_of(e.d) for e in episodes])
    # the half with the smaller ones
    order = np.argsort(firsts, kind="stable")[: (len(firsts) + 1) // 2]
    return {
        "rollouts": len(episodes),
        "episodes": {
            kind: sum(kind_of(e.got) == kind for e in episodes)
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
                got: {"mean": float(np.mean(x)), "count": len(x)}
                for got, x in sorted(group.items())
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
        files.progress(rollouts, desc="gradients", unit="rollout", total=len(rollouts)),
        episodes,
        weights,
    ):
        (spans, _, _, score), sums = (
            measure(rollout),
            dict.fromkeys([rule for rule in RULES if rule not in ("mean", "amount")], 0.0),
        )
        for k, (event, gradient) in enumerate(
            zip(["start", *events(e.got)], step_gradients(policy, rollout, score, spans))
        ):
            if e.got[k] in ("result", "mistake", "outage"):
                after.setdefault(event, Spread()).add(gradient)
            outcome.setdefault(e.got[k], Spread()).add(gradient)
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
            f"--against {path}: expected what experiments.sod_drift writes of a file with "
            f"clean "
            f"episodes, got {type(error).__name__}: {error}"
        ) from None


def main(argv=None):
    p = files.parser(
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
        "    python -m experiments.sod_drift --rollouts R --scores S --out drift.json --plot "
        "drift.png"
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
    for path in filter(None, (args.out, args.plot)):
        refuse_existing(path, args.overwrite)
    rollouts = files.Table(args.rollouts, "rollouts")
    measure, episodes = reader(args, rollouts), []
    policy = load_policy(args.model, "float32", args.device) if args.model else None
    for rollout in files.progress(
        rollouts, desc="measure", unit="rollout", total=len(rollouts)
    ):
        spans, d, sizes, score = measure(rollout)
        if policy and rollout["policy"].get("weights") != policy.identity["weights"]:
            raise BadInput(
                f"{rollouts.where(records.key_of(rollout, 'rollouts'))}: policy.weights: "
                f"expected {policy.identity['weights']}, the weights of "
                f"{args.model}, "
                f"got {rollout['policy'].get('weights')}: --model is the model that wrote "
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
            f"{args.rollouts}: loss_mask: expected rollouts with loss tokens, got none"
        )
    weights = all_weights(episodes)
    result = summarise_drift(episodes, weights, level)
    if policy:
        result["gradient"] = signal_to_noise(policy, rollouts, measure, episodes, weights)
    files.write_atomically(args.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.plot:
        figure(result).savefig(args.plot)

    def show(x):
        return "none" if x is None else f"{x:+.3f}"

    def share(x):
        return "none" if x is None else f"{x:.0%}"

    print(
        f"experiments.sod_drift: d_1 mean {result['first']['mean']:.3f}, median "
        f"{result['first']['median']:.3f}; left of the teacher's term, and in the "
        f"half of the episodes with the smaller d_1: "
        + ", ".join(
            f"{rule} {share(x)} and {share(result['left_quiet'][rule])}"
            for rule, x in result["left"].items()
        )
    )
    if policy:
        print(
            "experiments.sod_drift: signal to noise of an episode's gradient: "
            + ", ".join(
                f"{show(found['snr'])} {rule}"
                for rule, found in result["gradient"]["rule"].items()
            )
        )
    print(
        f"experiments.sod_drift: {args.out}: "
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


if __name__ == "__main__":
    files.run(main)
