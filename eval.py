"""Stage 5: how good is a model?  Accuracy, pass@k, length, truncation, repetition; then tables
and plots of results.

    python eval.py --model runs/toy/student --prompts runs/toy/heldout.jsonl --n 16 --out
    runs/eval.jsonl
    python eval.py --rollouts runs/rollouts.jsonl --prompts runs/toy/train.jsonl --out
    runs/eval.jsonl
    python eval.py --rollouts R --prompts P --rewards W --partial --out E      # does a reward
    rank right answers above wrong ones?
    python -m experiments.report table results/ropd.jsonl --out results/ropd.md
    python -m experiments.report plot results/ropd.jsonl --x generated_tokens --out
    results/ropd.png
    python -m experiments.report gaps results/simct.jsonl --arms simct,masked --against simple
    --at strict
    --out results/simct_gap.png
    python -m methods.unified --before M0 --after M1 --prompts runs/forks/heldout.jsonl
    --max-tokens 5 --out support.jsonl

Reads prompts that have an `answer`, and rollouts or answers: those of --rollouts, or those it
samples from --model with rollout.py (kept beside --out as `*.rollouts.jsonl`; flags that are
not listed below go to rollout.py, see its --help). Writes one line an answer: `id`, `sample`,
`text`, `correct`, `length` (tokens; null for an API that shows none), `truncated`,
`repetition`.  `table` and `plot` read what experiments append to results/, a line per (arm,
seed, checkpoint). `support` (methods/unified.py) tells what a training run added to, lost from
and moved within what a model can write.

Accuracy is avg@n: the mean over prompts of the share of right answers.  pass@k is the unbiased
estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1).  Truncated and repetition rates are
TruncRate and RepRate of Stable-OPD (2604.08527).

Simplifications:
1. An answer is right or wrong by its final value; the way to it is not judged.
2. The 95 % interval treats prompts as the independent draws (t-interval of the per-prompt
   means).  Answers to one prompt
   are alike: to count all prompts x n of them would make it too narrow.  Without any spread
   (all wrong) there is none.
3. Repetition is looked for in the last 256 characters at a ratio of 4, for short answers; the
   paper takes 10,000 and 10.
   An answer shorter than the tail is never counted, so the rate is a lower bound, as in the
   paper.
"""

from collections import Counter

import numpy as np

import rollout
from opd import files, records
from opd.answers import is_correct
from opd.records import BadInput
from opd.stats import auc, interval, pass_at_k, repetition_ratio
from opd.tools import call_use

# ---- grading answers


def grade(rollout, answer, tail):
    """One line of the output: the rollout (or API answer) held against the right final
    answer."""
    # of an episode with tools the last step: what tools say is no loop of the model's
    text = records.final_text(rollout)
    row = {
        "id": rollout["id"],
        "sample": rollout["sample"],
        "text": rollout["text"],
        "correct": bool(is_correct(text, answer)),
        "length": records.sampled_length(rollout) if "response_ids" in rollout else None,
        "truncated": rollout["finish_reason"] == "length",
        "repetition": round(repetition_ratio(text, tail), 3),
    }
    if "calls" in rollout:
        row |= {
            "calls": [call["ok"] for call in rollout["calls"]],
            "tool_limit": rollout["finish_reason"] == "tool_limit",
        }
    return row


def summarise(evals, tail, threshold):
    """The summary of graded answers (any iterable, walked once).

    Two prompts with right answers [1, 0, 0, 0] and [1, 1, 1, 1]: accuracy (0.25 + 1) / 2 =
    0.625, pass@1 the same, pass@2 (0.5 + 1) / 2 = 0.75, pass@4 1.0 (the share of prompts solved
    at least once)."""
    right, lengths, truncated, repetitive, episodes = {}, [], 0, 0, []
    for r in evals:
        if "calls" in r:
            episodes.append((r["calls"], r["correct"], r["tool_limit"]))
        right.setdefault(str(r["id"]), []).append(r["correct"])
        lengths += [] if r["length"] is None else [r["length"]]
        truncated += r["truncated"]
        repetitive += len(r["text"]) >= tail and r["repetition"] > threshold
    answers, n = sum(map(len, right.values())), min(map(len, right.values()))
    accuracy, half = interval([np.mean(r) for r in right.values()])
    summary = {
        "prompts": len(right),
        "n": n,
        "answers": answers,
        "accuracy": accuracy,
        "accuracy_low": max(0.0, accuracy - half) if half else None,
        "accuracy_high": min(1.0, accuracy + half) if half else None,
    }
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        summary[f"pass@{k}"] = float(
            np.mean([pass_at_k(len(r), sum(r), k) for r in right.values()])
        )
    summary |= tool_use(episodes) if episodes else {}
    # an API may show no tokens: then no length is better than half of them
    known = len(lengths) == answers
    return summary | {
        "length_mean": float(np.mean(lengths)) if known else None,
        "length_max": max(lengths) if known else None,
        "generated_tokens": sum(lengths) if known else None,
        "truncated_fraction": truncated / answers,
        "repetition_rate": repetitive / answers,
    }


def tool_use(episodes):
    """Of (how each call ended, whether the answer was right, whether the calls ran out): calls
    an episode, share of calls that failed, of episodes with a failed call, accuracy of these
    and of the others (None where there are none), share that ran out of calls."""

    with_error, without = (
        [right for calls, right, _ in episodes if all(calls) != kind] for kind in (True, False)
    )
    return call_use(
        [calls for calls, *_ in episodes], [limited for *_, limited in episodes]
    ) | {
        "error_episodes": len(with_error) / len(episodes),
        "accuracy_after_error": float(np.mean(with_error)) if with_error else None,
        "accuracy_without_error": float(np.mean(without)) if without else None,
    }


def reward_quality(rewards, evals, rollouts):
    """How well rewards tell right from wrong (ROPD section 4.3): AUC over all answers, and the
    mean AUC within a prompt's group, which is all that a group advantage sees.  Failed
    judgements are left out."""
    groups = {}
    for e in evals:
        key = records.key_of(e, "evals")
        reward = files.record_for(rewards, rollouts[key], rollouts)["reward"]
        if reward is not None:
            groups.setdefault(key[0], []).append((reward, e["correct"]))
    pairs = [pair for group in groups.values() for pair in group]
    if not pairs:
        raise BadInput(f"{rewards.path}: every judgement failed, there is no reward to look at")
    within = [a for a in (auc(*zip(*group)) for group in groups.values()) if a is not None]
    return {
        "reward_auc": auc(*zip(*pairs)),
        "reward_auc_within": float(np.mean(within)) if within else None,
        "reward_mean": float(np.mean([reward for reward, _ in pairs])),
    }


def main(argv=None):
    p = files.parser(__doc__)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", help="sample from this folder or Hugging Face id, with rollout.py"
    )
    source.add_argument(
        "--rollouts", help="grade these rollouts or answers instead of sampling"
    )
    p.add_argument("--prompts", required=True, help="JSONL of prompts with an `answer`")
    p.add_argument(
        "--out", required=True, help="JSONL of graded answers; an interrupted one is continued"
    )
    p.add_argument(
        "--n",
        type=int,
        help="answers a prompt with --model (16 if not given): more of them, narrower pass@k",
    )
    p.add_argument(
        "--rewards",
        help="with --rollouts: also report how well these rewards tell right from wrong "
        "answers",
    )
    p.add_argument(
        "--partial",
        action="store_true",
        help="accept prompts with fewer answers than others, or none: not comparable",
    )
    p.add_argument(
        "--tail",
        type=int,
        default=256,
        help="characters at the end that are searched for repetition (paper: 10000)",
    )
    p.add_argument(
        "--threshold",
        type=float,
        default=4.0,
        help="compression ratio that counts as repetitive (paper: 10)",
    )
    p.add_argument(
        "--overwrite", action="store_true", help="begin the output (and the sampling) anew"
    )
    args, sampling = p.parse_known_args(argv)
    if args.rollouts and (sampling or args.n is not None):
        p.error(
            f"without --model there is nothing to sample: {' '.join(sampling) or '--n'} has "
            f"no effect"
        )
    if args.rewards and args.model:
        p.error("--rewards: belong to rollouts that exist already; give --rollouts")
    if args.tail < 1:
        p.error(f"--tail: expected at least 1 character, got {args.tail}")
    prompts = files.Table(args.prompts, "prompts")
    for prompt in prompts:
        if prompt.get("answer") in (None, ""):
            raise BadInput(
                f"{prompts.where(records.key_of(prompt, 'prompts'))}: answer: expected the "
                f"right "
                "final answer, but there is none"
            )
    if args.model:
        if (
            any(word.startswith(("--slice", "--shard")) for word in sampling)
            and not args.partial
        ):
            raise BadInput(
                "--slice, --shard: leave prompts out, which another accuracy is: say "
                "--partial if it is meant"
            )
        args.rollouts = args.out.removesuffix(".jsonl") + ".rollouts.jsonl"
        rollout.main(
            [
                "--model",
                args.model,
                "--prompts",
                args.prompts,
                "--n",
                str(16 if args.n is None else args.n),
                "--out",
                args.rollouts,
                *["--overwrite"] * args.overwrite,
                *sampling,
            ]
        )
    rollouts = files.Table(args.rollouts, "answers")  # a rollout has every field of an answer
    counts = Counter(key[:1] for key in rollouts.keys())
    most = max(counts.values())
    for key in counts.keys() - prompts.keys():
        raise BadInput(
            f"{rollouts.path}: id: expected the ids of {args.prompts}, got {key[0]!r}"
        )
    for key in prompts.keys():
        # other prompts, or easier ones, are another accuracy
        if counts[key] < most and not args.partial:
            raise BadInput(
                f"{rollouts.path}: expected {most} answers to every prompt, got "
                f"{counts[key]} to id {key[0]!r} "
                f"({prompts.where(key)}): complete the file, or --partial to measure what "
                f"there is"
            )
    with files.Writer(
        args.out, "evals", {"tail": args.tail}, (args.prompts, args.rollouts), args.overwrite
    ) as out:
        for key in files.progress(rollouts.keys(), desc="grade", unit="answer"):
            if key not in out:
                out.write(grade(rollouts[key], prompts[key[:1]]["answer"], args.tail))
    summary = {"out": args.out} | summarise(
        files.read(args.out, "evals"), args.tail, args.threshold
    )
    if args.rewards:
        quality = reward_quality(
            files.Table(args.rewards, "rewards"), files.read(args.out, "evals"), rollouts
        )
        summary |= quality
    span = (
        ""
        if summary["accuracy_low"] is None
        else f" (95 % {summary['accuracy_low']:.3f}-{summary['accuracy_high']:.3f})"
    )
    pass_at = ", ".join(
        f"{name} {value:.3f}" for name, value in summary.items() if name.startswith("pass@")
    )
    length = (
        "unknown"
        if summary["length_mean"] is None
        else f"{summary['length_mean']:.1f}, max {summary['length_max']}"
    )
    print(
        f"eval.py: {args.out}: accuracy {summary['accuracy']:.3f}{span}, "
        f"{summary['answers']} answers to {len(counts)} of "
        f"{len(prompts)} prompts, {pass_at}, mean length {length} tokens, truncated "
        f"{summary['truncated_fraction']:.1%}, "
        f"repetitive {summary['repetition_rate']:.1%}"
    )
    if "calls" in summary:
        after = summary["accuracy_after_error"]
        print(
            f"eval.py: {args.out}: {summary['calls']:.2f} calls an episode, "
            f"{summary['call_errors']:.1%} of them failed; "
            f"{summary['error_episodes']:.1%} of the episodes have a failed call"
            + (f", accuracy there {after:.3f}" if after is not None else "")
        )
    if args.rewards:
        shown = {
            name: "none" if value is None else f"{value:.3f}" for name, value in quality.items()
        }
        print(
            f"eval.py: {args.rewards}: AUC for correctness {shown['reward_auc']}, within a "
            f"prompt {shown['reward_auc_within']}, "
            f"mean reward {shown['reward_mean']}"
        )
    return summary


if __name__ == "__main__":
    files.run(main)
