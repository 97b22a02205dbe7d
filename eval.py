"""Stage 5: how good is a model?  Accuracy, pass@k, length, truncation, repetition; then tables
and plots of results.

    python eval.py --model runs/toy/student --prompts runs/toy/heldout.jsonl --n 16 --out
    runs/eval.jsonl
    python eval.py --rollouts runs/rollouts.jsonl --prompts runs/toy/train.jsonl --out
    runs/eval.jsonl
    python eval.py --rollouts R --prompts P --rewards W --partial --out E      # does a reward
    rank right answers above wrong ones?
    python eval.py table results/ropd.jsonl --out results/ropd.md
    python eval.py plot results/ropd.jsonl --x generated_tokens --out results/ropd.png
    python eval.py gaps results/simct.jsonl --arms simct,masked --against simple --at strict
    --out results/simct_gap.png
    python eval.py support --before M0 --after M1 --prompts runs/forks/heldout.jsonl
    --max-tokens 5 --out support.jsonl

Reads prompts that have an `answer`, and rollouts or answers: those of --rollouts, or those it
samples from --model with rollout.py (kept beside --out as `*.rollouts.jsonl`; flags that are
not listed below go to rollout.py, see its --help). Writes one line an answer: `id`, `sample`,
`text`, `correct`, `length` (tokens; null for an API that shows none), `truncated`,
`repetition`.  `table` and `plot` read what recipes append to results/, a line per (arm, seed,
checkpoint). `support` (support.py) tells what a training run added to, lost from and moved
within what a model can write.

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

import math
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

import records
from records import BadInput

is_number = records.TYPES["number"][1]

# ---- the measures


def pass_at_k(n, c, k):
    """Probability that k answers, drawn without replacement from n of which c are right, hold a
    right one.

    1 - C(n-c, k) / C(n, k).  Averaged over prompts it estimates pass@k without bias, which 1 -
    (1 - c/n)^k does not. n=4, c=1, k=2: 3 of the 6 pairs miss the right answer, so 0.5."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def repetition_ratio(text, tail):
    """How far zlib shrinks the last `tail` characters: UTF-8 bytes / compressed bytes.  Prose
    stays near 1.5 (and short text below 1, for the header); "2+2=4\\n" fifty times over has
    more than 12."""
    data = text[-tail:].encode("utf-8", "replace")
    return len(data) / len(zlib.compress(data))


def t_quantile(freedom):
    """97.5 % point of Student's t: a table up to 10 degrees of freedom, then the expansion in 1
    / freedom (within 0.1 %)."""
    if freedom <= 10:
        return (
            12.7062,
            4.3027,
            3.1824,
            2.7764,
            2.5706,
            2.4469,
            2.3646,
            2.3060,
            2.2622,
            2.2281,
        )[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval(values):
    """(mean, half-width of the 95 % t-interval of the mean); the half-width of a single value
    is None, not 0.

    [0.2, 0.4, 0.6]: mean 0.4, standard deviation 0.2, t = 4.303 with 2 degrees of freedom, so
    0.4 +- 0.497."""
    mean, n = float(np.mean(values)), len(values)
    return mean, None if n < 2 else float(
        t_quantile(n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    )


# ---- grading answers


def grade(rollout, answer, tail):
    """One line of the output: the rollout (or API answer) held against the right final
    answer."""
    from rubric import is_correct

    # of an episode with tools the last step: what tools say is no loop of the model's
    text = records.answered(rollout)
    row = {
        "id": rollout["id"],
        "sample": rollout["sample"],
        "text": rollout["text"],
        "correct": bool(is_correct(text, answer)),
        "length": records.written(rollout) if "response_ids" in rollout else None,
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
    from tools import call_use

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


def auc(values, right):
    """Probability that a right answer has the larger value than a wrong one, ties counting
    half; None without both kinds.

    auc([0.9, 0.4, 0.4], [True, True, False]) -> (1 + 0.5) / 2 = 0.75.  0.5 is no
    information."""
    _, level = np.unique(values, return_inverse=True)
    right = np.asarray(right, bool)
    hits, misses = (
        np.bincount(level[kind], minlength=level.max() + 1) for kind in (right, ~right)
    )
    if not hits.sum() or not misses.sum():
        return None
    return float((hits * (misses.cumsum() - misses / 2)).sum() / (hits.sum() * misses.sum()))


def reward_quality(rewards, evals, rollouts):
    """How well rewards tell right from wrong (ROPD section 4.3): AUC over all answers, and the
    mean AUC within a prompt's group, which is all that a group advantage sees.  Failed
    judgements are left out."""
    groups = {}
    for e in evals:
        key = records.key_of(e, "evals")
        reward = records.partner(rewards, rollouts[key], rollouts)["reward"]
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


def evaluate(argv):
    p = records.parser(__doc__)
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
        p.error(f"--tail: expected at least 1 character, came {args.tail}")
    prompts = records.Table(args.prompts, "prompts")
    for prompt in prompts:
        if prompt.get("answer") in (None, ""):
            raise BadInput(
                f"{prompts.where(records.key_of(prompt, 'prompts'))}: answer: expected the "
                f"right "
                "final answer, but there is none"
            )
    if args.model:
        import rollout

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
    rollouts = records.Table(args.rollouts, "answers")  # a rollout has every field of an answer
    counts = Counter(key[:1] for key in rollouts.keys())
    most = max(counts.values())
    for key in counts.keys() - prompts.keys():
        raise BadInput(
            f"{rollouts.path}: id: expected the ids of {args.prompts}, came {key[0]!r}"
        )
    for key in prompts.keys():
        # other prompts, or easier ones, are another accuracy
        if counts[key] < most and not args.partial:
            raise BadInput(
                f"{rollouts.path}: expected {most} answers to every prompt, came "
                f"{counts[key]} to id {key[0]!r} "
                f"({prompts.where(key)}): complete the file, or --partial to measure what "
                f"there is"
            )
    with records.Writer(
        args.out, "evals", {"tail": args.tail}, (args.prompts, args.rollouts), args.overwrite
    ) as out:
        for key in records.progress(rollouts.keys(), desc="grade", unit="answer"):
            if key not in out:
                out.write(grade(rollouts[key], prompts[key[:1]]["answer"], args.tail))
    summary = {"out": args.out} | summarise(
        records.read(args.out, "evals"), args.tail, args.threshold
    )
    if args.rewards:
        quality = reward_quality(
            records.Table(args.rewards, "rewards"), records.read(args.out, "evals"), rollouts
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


# ---- results: table


def read_results(path, fields):
    """The lines of a results file, `fields` being numbers in each.  Two lines for one (arm,
    seed, step), or two final ones for one (arm, seed), are refused: a mean over both would
    count a run double."""
    rows, seen = list(records.read(path, "results")), set()
    for row in rows:
        place = f"{path}: arm {row['arm']!r}, seed {row['seed']}, step {row['step']}"
        for last in [row["step"]] + ["final"] * (row.get("final") is True):
            if (row["arm"], row["seed"], last) in seen:
                raise BadInput(
                    f"{place}: expected one {'final line' if last == 'final' else 'line'}, "
                    f"came another: "
                    "remove the lines of the run that does not count"
                )
            seen.add((row["arm"], row["seed"], last))
        for field in fields:
            if not is_number(row.get(field)):
                raise BadInput(
                    f"{place}: {field}: expected a finite number, came {row.get(field)!r}"
                )
    return rows


def compare(rows, metric, baseline, columns):
    """One dict an arm: its mean over seeds at the last checkpoint, and that of its differences
    to `baseline`, seed by seed.

    A seed without a line that has `final` true was stopped: it is missing, like one that was
    never begun. Arms share prompts, starting weights and sampling noise within a seed, so
    differences within seeds vary less than the arms do: [0.5, 0.7, 0.9] against [0.4, 0.6, 0.8]
    is +0.1 +- 0, although either mean is +- 0.5."""
    # arm -> seed -> line; arms in order of appearance
    finals = {row["arm"]: {} for row in rows}
    for row in rows:
        if row.get("final") is True:
            finals[row["arm"]][row["seed"]] = row
    every_seed, table = sorted({row["seed"] for row in rows}), []
    for arm, seeds in finals.items():
        values = {seed: seeds[seed][metric] for seed in sorted(seeds)}
        pairs = [
            value - finals[baseline][seed][metric]
            for seed, value in values.items()
            if seed in finals[baseline]
        ]
        mean, half = interval(list(values.values())) if values else (None, None)
        difference, difference_half = (
            interval(pairs) if pairs and arm != baseline else (None, None)
        )
        missing = [seed for seed in every_seed if seed not in seeds]
        line = {
            "arm": arm,
            "values": values,
            "missing": missing,
            "pairs": len(pairs),
            "mean": mean,
            "half": half,
            "difference": difference,
            "difference_half": difference_half,
            "columns": {},
        }
        # a mean over some of the seeds would be a number of another experiment
        for column in columns:
            numbers = [row.get(column) for row in seeds.values()]
            line["columns"][column] = (
                float(np.mean(numbers)) if numbers and all(map(is_number, numbers)) else None
            )
        table.append(line)
    return table


def markdown(table, metric, baseline):
    """The rows of `compare` as a markdown table with its reading note."""
    columns = list(table[0]["columns"])
    lines = [
        ["arm", "seeds", metric, f"vs {baseline}", *columns, "each seed"],
        ["---"] * (5 + len(columns)),
    ]
    for line in table:
        seeds, difference = (
            str(len(line["values"])),
            _number(line["difference"], line["difference_half"], "+"),
        )
        if line["missing"]:
            seeds += f" (misses {', '.join(map(str, line['missing']))})"
        if line["difference"] is not None and line["pairs"] < len(line["values"]):
            difference += f" ({line['pairs']} pairs)"
        lines.append(
            [
                line["arm"].replace("|", "\\|"),
                seeds,
                _number(line["mean"], line["half"]),
                difference,
                *map(_number, line["columns"].values()),
                " ".join(f"{seed}:{_number(value)}" for seed, value in line["values"].items()),
            ]
        )
    return (
        "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        + f"\n\n{metric} at the last checkpoint, mean over seeds ± half of the 95 % "
        f"t-interval; differences to `{baseline}` "
        "are taken seed by seed; other columns are means over seeds.\n"
    )


def _number(x, half=None, sign=""):
    """0.4123 -> 0.412, 31.62 -> 31.6, 12345 -> 12.3k, 2.5e6 -> 2.50M; with its half-width 0.412
    ± 0.030"""
    if half is not None:
        return f"{_number(x, sign=sign)} ± {_number(half)}"
    if x is None or x == 0 and not sign:
        return "-" if x is None else "0"
    for least, divisor, suffix, digits in (
        (1e6, 1e6, "M", 2),
        (1e4, 1e3, "k", 1),
        (100, 1, "", 0),
        (10, 1, "", 1),
    ):
        if abs(x) >= least:
            return f"{x / divisor:{sign}.{digits}f}{suffix}"
    return f"{x:{sign}.3f}"


def write_table(argv):
    p = records.parser(
        "A markdown table of results, arm by arm, differences paired by seed.\n\n"
        "    python eval.py table results/ropd.jsonl --out results/ropd.md"
    )
    p.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="results JSONL; every file gets a table of its own",
    )
    p.add_argument("--metric", default="accuracy", help="the number to compare")
    p.add_argument("--baseline", default="before", help="the arm to take differences to")
    p.add_argument(
        "--columns",
        nargs="*",
        default="length_mean generated_tokens teacher_tokens trained_tokens seconds".split(),
        help="other numbers to average; - where a line lacks one",
    )
    p.add_argument(
        "--partial",
        action="store_true",
        help="accept arms that miss seeds; the table names the seeds they miss",
    )
    p.add_argument("--out", help="markdown file to write as well")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    args, tables, texts = p.parse_args(argv), {}, []
    claim(args.out, args.overwrite)
    for path in args.files:
        rows = read_results(path, [args.metric])
        if args.baseline not in {row["arm"] for row in rows}:
            raise BadInput(
                f"{path}: expected an arm {args.baseline!r} to compare with, but there is "
                f"none: name one with --baseline"
            )
        tables[path] = compare(rows, args.metric, args.baseline, args.columns)
        for line in tables[path]:
            if line["missing"] and not args.partial:
                raise BadInput(
                    f"{path}: arm {line['arm']!r} has no line with `final` true for seed "
                    f"{', '.join(map(str, line['missing']))}, which others have: finish it, "
                    f"or --partial marks it"
                )
        texts.append(
            f"## {Path(path).stem}\n\n" + markdown(tables[path], args.metric, args.baseline)
        )
    print("\n".join(texts), end="")
    if args.out:
        records.write_atomically(args.out, "\n".join(texts))
    return tables


def claim(out, overwrite):
    if out and Path(out).exists() and not overwrite:
        raise BadInput(
            f"{out}: exists already: give another --out, or --overwrite to replace it"
        )
    Path(out or "").parent.mkdir(parents=True, exist_ok=True)


# ---- results: plot

AXIS = {
    "accuracy": "accuracy on held-out prompts (0-1)",
    "length_mean": "mean answer length (tokens)",
    "seconds": "time (s)",
    "step": "training step",
    "proxy": "mean score of the discriminator",
    "judge_accuracy": "pairs in which the discriminator prefers the teacher's text",
    "route_b": "share of answers by the route that the student lacked",
    "strict": "share of the answers' bytes that both tokenizers spell alike",
    "generated_tokens": "tokens the student has generated",
}
# safe for the colour-blind
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#555555",
    "#8C6D31",
)


def curves(rows, metric, x):
    """{arm: [(x, mean, least, greatest) over seeds, ...]}, and what was left out, as sentences.

    A checkpoint some seed of the arm has not reached is left out: the mean over the others
    would bend the curve. x is None for an arm that was measured at one step only (`before`, a
    teacher): that is a level, not a curve."""
    arms, lines, left_out = {}, {}, []
    for row in rows:
        arms.setdefault(row["arm"], {}).setdefault(row["step"], {})[row["seed"]] = row
    for arm, steps in arms.items():
        lines[arm], seeds = [], {seed for step in steps.values() for seed in step}
        for step in sorted(steps):
            missing = sorted(seeds - steps[step].keys())
            if missing:
                left_out.append(
                    f"arm {arm!r}, step {step}: no line for seed {', '.join(map(str, missing))}"
                )
                continue
            values = [row[metric] for row in steps[step].values()]
            at = (
                None
                if len(steps) == 1
                else float(np.mean([row[x] for row in steps[step].values()]))
            )
            lines[arm].append((at, float(np.mean(values)), min(values), max(values)))
    return lines, left_out


def new_picture(width, height):
    """An empty matplotlib figure, inches."""
    try:
        # no pyplot: a Figure draws with Agg, whatever the machine's display
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise BadInput("plots need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def tidy(axes):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def claim_picture(p, args):
    """Refuses an --out that is no picture's name, or is there already."""
    if not args.out.endswith((".png", ".svg", ".pdf")):
        p.error(f"--out: expected a name that ends in .png, .svg or .pdf, came {args.out}")
    claim(args.out, args.overwrite)


def figure(lines, metric, x, title):
    """The matplotlib figure of `curves`: a line with a band an arm, a dashed level for an arm
    measured once."""
    picture = new_picture(9, 4.8)
    axes = picture.add_subplot()
    levels = [arm for arm, points in lines.items() if points and points[0][0] is None]
    # the ninth arm has the first one's colour, but squares and dashes
    curved = [arm for arm in lines if arm not in levels]
    styles = {
        arm: dict(
            color=COLOURS[i % 8], marker="os"[i // 8 % 2], linestyle=("-", "--")[i // 8 % 2]
        )
        for i, arm in enumerate(curved)
    }
    for arm, points in lines.items():
        if not points:
            continue
        at, mean, least, greatest = zip(*points)
        label = f"{arm} {mean[-1]:.3g}"
        if arm in levels:  # grey, told apart by their dashes
            axes.axhline(
                mean[0],
                color="0.35",
                linestyle=("--", ":", "-.")[levels.index(arm) % 3],
                linewidth=1.5,
                label=label,
            )
        else:
            axes.plot(at, mean, **styles[arm], markersize=4, linewidth=1.8, label=label)
            axes.fill_between(
                at, least, greatest, color=styles[arm]["color"], alpha=0.13, linewidth=0
            )
    if metric == "accuracy":
        axes.set_ylim(bottom=0)
    axes.set(xlabel=AXIS.get(x, x), ylabel=AXIS.get(metric, metric))
    axes.set_title(title, loc="left", fontsize=11)
    if axes.get_xlim()[1] >= 10000:
        from matplotlib.ticker import EngFormatter

        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k
    tidy(axes)
    picture.legend(loc="outside right upper", frameon=False)
    return picture


def write_plot(argv):
    p = records.parser(
        "A picture of results: one line an arm, mean over seeds, band from the least to the "
        "greatest seed.\n\n"
        "    python eval.py plot results/ropd.jsonl --out results/ropd.png"
    )
    p.add_argument("file", metavar="FILE", help="results JSONL")
    p.add_argument("--metric", default="accuracy", help="the number on the vertical axis")
    p.add_argument(
        "--arms", help="comma-separated arms to draw instead of all, in the file's order"
    )
    p.add_argument(
        "--x",
        default="step",
        help="the number on the horizontal axis: step, generated_tokens, seconds ...",
    )
    p.add_argument("--out", required=True, help="picture to write (.png, .svg, .pdf)")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    args = p.parse_args(argv)
    claim_picture(p, args)
    rows = read_results(args.file, [args.x])
    chosen = args.arms.split(",") if args.arms else [row["arm"] for row in rows]
    if missing := [arm for arm in chosen if arm not in {row["arm"] for row in rows}]:
        raise BadInput(f"--arms: expected arms of {args.file}, came {missing[0]!r}")
    rows = [row for row in rows if row["arm"] in chosen]
    # a reward is known after the first round, not before
    without = sorted({(row["arm"], row["step"]) for row in rows if args.metric not in row})
    having = [row for row in rows if args.metric in row]
    if bad := [row for row in having or rows if not is_number(row.get(args.metric))]:
        raise BadInput(
            f"{args.file}: arm {bad[0]['arm']!r}, seed {bad[0]['seed']}, step "
            f"{bad[0]['step']}: {args.metric}: expected a finite number, came "
            f"{bad[0].get(args.metric)!r}"
        )
    lines, left_out = curves(having, args.metric, args.x)
    left_out += [f"arm {arm!r}, step {step}: no {args.metric}" for arm, step in without]
    seeds = len({row["seed"] for row in having})
    title = (
        f"{Path(args.file).stem}: "
        + ("one seed" if seeds == 1 else f"mean over {seeds} seeds, band = min to max")
        + "; legend: last value"
    )
    figure(lines, args.metric, args.x, title).savefig(args.out)
    print(
        f"eval.py: {args.out}: {len(lines)} arms"
        + "".join(f"\nleft out: {sentence}" for sentence in left_out)
    )
    return {"out": args.out, "lines": lines, "left_out": left_out}


def paired_gaps(rows, arms, against, metric, at):
    """{arm: [(prefix, at, mean, half), ...]}: what `PREFIX-arm` has more than `PREFIX-against`
    at the end, seed by seed, with half of its 95 % t-interval (None for one seed), at the mean
    last `at` of the latter; "" is the prefix of `arm` itself.  In order of `at`."""
    last = {}
    for row in sorted((row for row in rows if row.get("final")), key=lambda row: row["step"]):
        last.setdefault(row["arm"], {})[row["seed"]] = row
    found = {arm: [] for arm in arms}
    for name, base in last.items():
        prefix = (
            ""
            if name == against
            else name.removesuffix(f"-{against}")
            if name.endswith(f"-{against}")
            else None
        )
        for arm in arms if prefix is not None else ():
            other = last.get(f"{prefix}-{arm}" if prefix else arm, {})
            if seeds := sorted(base.keys() & other.keys()):
                mean, half = interval(
                    [other[seed][metric] - base[seed][metric] for seed in seeds]
                )
                found[arm].append(
                    (prefix, float(np.mean([base[seed][at] for seed in seeds])), mean, half)
                )
    return {arm: sorted(points, key=lambda point: point[1]) for arm, points in found.items()}


def write_gaps(argv):
    p = records.parser(
        "A picture of paired differences: how much an arm has more than another one, against "
        "a number that differs between groups of arms.\n\n"
        "    python eval.py gaps results/simct.jsonl --arms simct,masked --against simple "
        "--at strict --out results/simct_gap.png\n\n"
        "Groups are prefixes of arm names: m64-simct is held against m64-simple, simct "
        "against simple."
    )
    p.add_argument("file", metavar="FILE", help="results JSONL")
    p.add_argument("--arms", required=True, help="comma-separated arms, a series each")
    p.add_argument("--against", required=True, help="the arm that is subtracted")
    p.add_argument(
        "--at",
        required=True,
        help="the number on the horizontal axis, of the arm that is subtracted",
    )
    p.add_argument("--metric", default="accuracy", help="what is compared")
    p.add_argument(
        "--unprefixed",
        default="no prefix",
        metavar="NAME",
        help="what the group without a prefix is called in the picture",
    )
    p.add_argument("--out", required=True, help="picture to write (.png, .svg, .pdf)")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    args = p.parse_args(argv)
    claim_picture(p, args)
    found = paired_gaps(
        [row for row in records.read(args.file, "results") if args.at in row],
        args.arms.split(","),
        args.against,
        args.metric,
        args.at,
    )
    for arm, points in found.items():
        if not points:
            raise BadInput(
                f"{args.file}: expected final lines with {args.at!r} of arm {arm!r} and of "
                f"{args.against!r} for a common seed, came none"
            )
    picture = new_picture(8, 4.6)
    axes = picture.add_subplot()
    span = (
        max(at for points in found.values() for _, at, _, _ in points)
        - min(at for points in found.values() for _, at, _, _ in points)
        or 1.0
    )
    for i, (arm, points) in enumerate(found.items()):
        names, at, mean, half = zip(*points)
        axes.errorbar(
            np.array(at) + (i - (len(found) - 1) / 2) * 0.012 * span,
            mean,
            yerr=[h or 0 for h in half],
            color=COLOURS[i % 8],
            marker="os^D"[i % 4],
            capsize=3,
            linewidth=1.6,
            label=f"{arm} - {args.against}",
        )
    for name, at, *_ in next(iter(found.values())):
        axes.annotate(
            name or args.unprefixed,
            (at, axes.get_ylim()[1]),
            ha="center",
            va="bottom",
            fontsize=8,
            color="0.35",
            annotation_clip=False,
        )
    axes.axhline(0, color="0.35", linewidth=1)
    axes.set(
        xlabel=AXIS.get(args.at, args.at),
        ylabel=f"difference of {args.metric}, mean and 95 % interval",
    )
    tidy(axes)
    axes.legend(frameon=False)
    picture.savefig(args.out)

    def told(name, at, mean, half):
        return f"{name or args.unprefixed} at {at:.3g} {mean:+.3f}" + (
            "" if half is None else f" ± {half:.3f}"
        )

    print(
        f"eval.py gaps: {args.out}: "
        + "; ".join(
            f"{arm}: " + ", ".join(told(*point) for point in points)
            for arm, points in found.items()
        )
    )
    return found


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["support"]:
        import support

        return support.main(argv[1:])
    command = {"table": write_table, "plot": write_plot, "gaps": write_gaps}.get(
        *argv[:1] or [None]
    )
    return command(argv[1:]) if command else evaluate(argv)


if __name__ == "__main__":
    records.run(main)
