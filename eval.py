"""Stage 5: how good is a model?  Accuracy, pass@k, length, truncation, repetition.

    python eval.py --model M --prompts heldout.jsonl --n 16 --max-tokens 512 --out evals.jsonl
    python eval.py --rollouts R --prompts P --rewards rewards.jsonl --partial --out E

Reads prompts that have an `answer`, and answers to them: the file --rollouts, or those it
samples from --model (kept beside --out as `*.rollouts.jsonl`; --n, 16 answers per prompt by
default, and every other sampling flag of rollout.py goes with --model).  Writes one line an
answer: `id`, `sample`, `text`, `correct`, `length` (tokens; null where an API shows none),
`truncated`, `repetition`, `final` where the answer is not all of the text, of an episode with
tools also `calls` and `tool_limit`.  With --rewards it also says how well these rewards tell
right from wrong answers (ROPD, arXiv 2605.07396, section 4.3).

Accuracy is avg@n, the mean over prompts of the share of right answers.  pass@k is the unbiased
estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1).  Truncated and repetition rates are
TruncRate and RepRate of arXiv 2604.08527.

Simplifications:
1. An answer is right or wrong by its final value (opd/answers.py: when two are equal); its
   reasoning is not judged.
2. The 95 % interval is the t-interval of the prompts' means: answers to one prompt are alike.
   Where all prompts have the same mean there is no interval.
3. Repetition is looked for in the last 256 characters, at a ratio of 4; the paper takes 10,000
   and 10.  A shorter answer is never counted, so the rate is a lower bound, as in the paper.
"""

import opd.quiet  # noqa: F401

# isort: split

from collections import Counter

import numpy as np

from opd import cli, files, records
from opd.answers import add_equality_flag, equal, equality_named, is_correct, read_answerable
from opd.records import BadInput
from opd.sampling import EVAL_STREAM, add_sampling_flags, fill_from_flags
from opd.stats import (
    REPETITIVE,
    TAIL,
    auc,
    auc_by_prompt,
    interval,
    mean_or_none,
    pass_at_k,
    powers_up_to,
    repetition_ratio,
    shown,
)
from opd.tools import call_use

# ---- reading


def sample(model, prompts, out, overwrite, flags):
    """Samples answers of a model into the file `out`, with flags as of rollout.py; returns how
    many failed."""
    p = cli.parser("The flags that eval.py --model takes beside its own.")
    add_sampling_flags(p, n=16)
    words = ["--model", model, "--prompts", prompts, "--out", out, *flags]
    if overwrite:
        words.append("--overwrite")
    return len(fill_from_flags(p.parse_args(words), "rollouts", EVAL_STREAM)[1])


def read_answers(path, prompts, partial):
    """The Table of rollouts or answers: as many to every prompt, less those that failed when
    they were sampled, and to no other prompt."""
    answers = files.Table(path, "answers")  # a rollout has every field of an answer
    counts = Counter(key[:1] for key in answers.keys())
    most = max(counts.values())
    failed = Counter(key[:1] for key in files.wanted_and_failed(path)[1])
    for key in counts.keys() - prompts.keys():
        raise BadInput(f"{path}: id: expected the ids of {prompts.path}, got {key[0]!r}")
    for key in prompts.keys():
        # other prompts, or easier ones, are another accuracy
        if counts[key] + failed[key] < most and not partial:
            raise BadInput(
                f"{path}: expected {most} answers to every prompt, got {counts[key]} to id "
                f"{key[0]!r} ({prompts.where(key)}): complete the file, or --partial to "
                f"measure what there is"
            )
    return answers


# ---- grading


def grade(rollout, answer, tail, same=equal):
    """One line of the output: a rollout (or an API's answer) against the right final answer."""
    row = {
        "id": rollout["id"],
        "sample": rollout["sample"],
        "text": rollout["text"],
        "correct": is_correct(records.final_text(rollout), answer, same),
        "length": records.sampled_length(rollout) if "response_ids" in rollout else None,
        "truncated": rollout["finish_reason"] == "length",
        "repetition": round(repetition_ratio(records.searched_for_loops(rollout), tail), 3),
    }
    if "final" in rollout:
        row["final"] = rollout["final"]
    if "calls" in rollout:
        row["calls"] = [call["ok"] for call in rollout["calls"]]
        row["tool_limit"] = rollout["finish_reason"] == "tool_limit"
    return row


# ---- summaries


def summarise(evals, tail, threshold):
    """The summary of graded answers (any iterable, walked once)."""
    right = {}  # id -> whether each of its answers is right
    episodes = []
    lengths = []
    truncated = 0
    repetitive = 0
    for row in evals:
        right.setdefault(str(row["id"]), []).append(row["correct"])
        lengths.append(row["length"])
        truncated += row["truncated"]
        long = len(records.searched_for_loops(row)) >= tail
        repetitive += long and row["repetition"] > threshold
        if "calls" in row:
            episodes.append((row["calls"], row["tool_limit"], row["correct"]))
    summary = accuracy(list(right.values()))
    if episodes:
        summary |= tool_use(*zip(*episodes))
    # an API may show no tokens: then no length is better than half of them
    known = None not in lengths
    return summary | {
        "length_mean": float(np.mean(lengths)) if known else None,
        "length_max": max(lengths) if known else None,
        "generated_tokens": sum(lengths) if known else None,
        "truncated_fraction": truncated / len(lengths),
        "repetition_rate": repetitive / len(lengths),
    }


def accuracy(right):
    """Accuracy with its interval and pass@k, from lists of right or wrong, one a prompt.

    [1, 0, 0, 0] and [1, 1, 1, 1]: accuracy (0.25 + 1) / 2 = 0.625, pass@1 the same, pass@2
    (0.5 + 1) / 2 = 0.75, pass@4 1.0 (the share of prompts solved at least once)."""
    n = min(map(len, right))
    mean, half = interval([np.mean(answers) for answers in right])
    summary = {
        "prompts": len(right),
        "n": n,
        "answers": sum(map(len, right)),
        "accuracy": mean,
        "accuracy_low": max(0.0, mean - half) if half else None,
        "accuracy_high": min(1.0, mean + half) if half else None,
    }
    for k in powers_up_to(n):
        passes = [pass_at_k(len(answers), sum(answers), k) for answers in right]
        summary[f"pass@{k}"] = float(np.mean(passes))
    return summary


def tool_use(calls, limited, right):
    """What episodes did with their tools.  calls: of each, whether its calls had results;
    limited: whether its calls ran out; right: whether its answer was.  Accuracies are None
    where there is no such episode."""
    failed = [not all(each) for each in calls]
    after_error = [r for r, bad in zip(right, failed) if bad]
    without_error = [r for r, bad in zip(right, failed) if not bad]
    return call_use(calls, limited) | {
        "error_episodes": sum(failed) / len(failed),
        "accuracy_after_error": mean_or_none(after_error),
        "accuracy_without_error": mean_or_none(without_error),
    }


def reward_quality(rewards, evals, answers):
    """How well rewards tell right from wrong: AUC over all answers, and the mean AUC within a
    prompt's group, which is all that a group advantage sees.  Failed judgements are left out,
    and answers without a record, which `unrewarded` counts."""
    values = {}
    right = {}
    unrewarded = 0
    for row in evals:
        key = records.key_of(row, "evals")
        if key not in rewards:  # of a prompt that rubric.py went on without
            unrewarded += 1
            continue
        reward = files.record_for(rewards, answers[key], answers)["reward"]
        if reward is not None:
            values[key] = reward
            right[key] = row["correct"]
    if not values:
        raise BadInput(
            f"{rewards.path}: expected rewards of these answers, but there is none: "
            f"{unrewarded} are not in it, the judgements of the others failed"
        )
    within = auc_by_prompt(values, right).values()
    return {
        "reward_auc": auc(list(values.values()), list(right.values())),
        "reward_auc_within": mean_or_none([x for x in within if x is not None]),
        "reward_mean": float(np.mean(list(values.values()))),
        "unrewarded": unrewarded,
    }


# ---- the stage


def tell(out, summary, asked):
    """Prints the summary in a line or two; asked: how many prompts there are."""
    s = summary
    span = ""
    if s["accuracy_low"] is not None:
        span = f" (95 % {s['accuracy_low']:.3f}-{s['accuracy_high']:.3f})"
    passes = ", ".join(f"{name} {x:.3f}" for name, x in s.items() if name.startswith("pass@"))
    print(
        f"eval.py: {out}: accuracy {s['accuracy']:.3f}{span}, {s['answers']} answers to "
        f"{s['prompts']} of {asked} prompts, {passes}, mean length "
        f"{shown(s['length_mean'], '.1f')} tokens, max {shown(s['length_max'], 'd')}, "
        f"truncated {s['truncated_fraction']:.1%}, repetitive {s['repetition_rate']:.1%}"
    )
    if "calls" in s:
        print(
            f"eval.py: {out}: {s['calls']:.2f} calls an episode, {s['call_errors']:.1%} of "
            f"them failed; {s['error_episodes']:.1%} of the episodes have a failed call, "
            f"accuracy there {shown(s['accuracy_after_error'])}"
        )
    if "reward_auc" in s:
        print(
            f"eval.py: {out}: of rewards, AUC for correctness {shown(s['reward_auc'])}, "
            f"within a prompt {shown(s['reward_auc_within'])}, mean {s['reward_mean']:.3f}"
            + (f"; {s['unrewarded']} answers have none" if s["unrewarded"] else "")
        )


def add_flags(p):
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="sample from this folder or Hugging Face id")
    source.add_argument("--rollouts", help="grade these rollouts or answers")
    p.add_argument("--prompts", required=True, help="JSONL of prompts with an `answer`")
    p.add_argument(
        "--out", required=True, help="JSONL of graded answers; an interrupted one is continued"
    )
    p.add_argument("--rewards", help="rewards of --rollouts, to hold against correctness")
    p.add_argument(
        "--partial",
        action="store_true",
        help="accept prompts with fewer answers than others, or none: not comparable",
    )
    p.add_argument(
        "--tail",
        type=int,
        default=TAIL,
        help="characters at the end that are searched for repetition (paper: 10000)",
    )
    p.add_argument(
        "--threshold",
        type=float,
        default=REPETITIVE,
        help="compression ratio that counts as repetitive (paper: 10)",
    )
    add_equality_flag(p)
    p.add_argument("--overwrite", action="store_true", help="begin output and sampling anew")


def main(argv=None):
    p = cli.parser(__doc__)
    add_flags(p)
    args, sampling = p.parse_known_args(argv)
    if args.rollouts and sampling:
        p.error(f"{' '.join(sampling)}: no flags of eval.py; those of rollout.py need --model")
    if args.rewards and args.model:
        p.error("--rewards: belong to rollouts that exist already: expected --rollouts")
    if args.tail < 1:
        p.error(f"--tail: expected at least 1 character, got {args.tail}")
    same = equality_named(args.equality)
    prompts = read_answerable(args.prompts)
    source = args.rollouts
    failed = 0
    if args.model:
        source = args.out.removesuffix(".jsonl") + ".rollouts.jsonl"
        failed = sample(args.model, args.prompts, source, args.overwrite, sampling)
    answers = read_answers(source, prompts, args.partial)

    def work(missing):
        for key in missing:
            yield grade(answers[key], prompts[key[:1]]["answer"], args.tail, same)

    settings = {"tail": args.tail, "equality": args.equality}
    inputs = (args.prompts, source)
    files.fill(args.out, "evals", answers.keys(), work, settings, inputs, args.overwrite)
    summary = summarise(files.read(args.out, "evals"), args.tail, args.threshold)
    if args.rewards:
        rewards = files.Table(args.rewards, "rewards")
        summary |= reward_quality(rewards, files.read(args.out, "evals"), answers)
    tell(args.out, summary, len(prompts))
    return {"out": args.out, "failed": failed} | summary


if __name__ == "__main__":
    cli.run(main)
