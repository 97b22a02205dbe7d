"""Controls: what a study changes on purpose, one file to another.

    python -m experiments.controls shuffle-rewards --rewards W --seed 0 --out null.jsonl
    python -m experiments.controls flip-verdicts --rewards W --rubrics C --rate 0.05 --out W2
    python -m experiments.controls shape-calls --rewards W --rollouts R --out W2
    python -m experiments.controls flat-points --rubrics C --out flat.jsonl
    python -m experiments.controls impression --prompts P --rollouts R --view all --out W
    python -m experiments.controls shuffle-scores --scores S --seed 0 --out null.jsonl

shuffle-rewards  each group keeps its rewards, every rollout loses its own
flip-verdicts    an unreliable verifier: verdicts are flipped, rewards computed anew
shape-calls      SOD's released code: a wrong answer earns 0.05 a tool call, at most 0.2 (there
                 -1 to -0.6 of +-1), which pays for calling, not for being right
flat-points      every criterion the same points, decisive or not
impression       a judge without a rubric, in place of a model: general properties, one vote
                 each, and a taste for length
shuffle-scores   a teacher that knows nothing: its log-probs dealt out among all tokens
"""

import hashlib

import numpy as np

from opd import cli, files, records, rewards
from opd.answers import question_of
from opd.records import BadInput
from opd.rewards import pass_rate
from worlds import predicates
from worlds.build import share


def parser(doc, *inputs):
    """The flags of a control that reads these files."""
    p = cli.parser(doc)
    for name in inputs:
        p.add_argument(f"--{name}", required=True, help=f"JSONL of {name}")
    p.add_argument("--out", required=True, help="JSONL to write")
    p.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    return p


def write(out, kind, rows, settings, inputs, overwrite):
    """Writes the rows that the output lacks; returns a summary of the output."""
    rows = {records.key_of(row, kind): row for row in rows}
    made = lambda missing: (rows[key] for key in missing)
    files.fill(out, kind, rows, made, settings, inputs, overwrite)
    if kind != "rewards":
        print(f"experiments.controls: {out}: {len(rows)} {kind}")
        return {"out": out, "records": len(rows)}
    summary = rewards.summarise(out)
    print(f"experiments.controls: {out}: {rewards.describe(summary)}")
    return summary


def with_rollouts(scores, rollouts):
    """Yields (score record, its rollout) of two files; refuses scores of anything else."""
    scores = files.Table(scores, "scores")
    rollouts = files.Table(rollouts, "rollouts")
    for key in scores.keys():
        if key not in rollouts:
            raise BadInput(
                f"{scores.where(key)}: id, sample: expected the scores of a rollout of "
                f"{rollouts.path}, got {key}"
            )
        yield files.record_for(scores, rollouts[key], rollouts), rollouts[key]


# ---- rewards


def shuffle_rewards(argv):
    args = parser(__doc__, "rewards").parse_args(argv)
    groups = {}
    for row in files.read(args.rewards, "rewards"):
        groups.setdefault(str(row["id"]), []).append(row)
    rows = []
    for prompt_id, group in groups.items():
        name = hashlib.sha256(f"{args.seed}|{prompt_id}".encode()).hexdigest()
        order = np.random.default_rng(int(name[:8], 16)).permutation(len(group))
        for row, i in zip(group, order):
            kept = {k: v for k, v in row.items() if k not in ("verdicts", "reason")}
            other = {k: group[i][k] for k in ("reward", "status", "reason") if k in group[i]}
            rows.append(kept | other | {"grader": row["grader"] + ", shuffled"})
    # with more records the order would be another one
    settings = {"seed": args.seed, "of_records": len(rows)}
    return write(args.out, "rewards", rows, settings, [args.rewards], args.overwrite)


def flipped(rate, *names):
    """Whether a verdict is wrong: true at this rate, fixed by the names."""
    drawn = hashlib.sha256("|".join(map(str, names)).encode()).digest()[:6]
    return int.from_bytes(drawn, "big") / 2**48 < rate


def flip_verdicts(argv):
    p = parser(__doc__, "rewards", "rubrics")
    p.add_argument("--rate", type=share, required=True, help="share of wrong verdicts")
    args = p.parse_args(argv)
    rubrics = {str(r["id"]): r["criteria"] for r in files.read(args.rubrics, "rubrics")}
    rows = []
    for row in files.read(args.rewards, "rewards"):
        key = records.key_of(row, "rewards")
        if row["reward"] is not None:
            criteria = rubrics.get(key[0])
            if criteria is None or "verdicts" not in row:
                raise BadInput(
                    f"{args.rewards}: id {row['id']!r}: expected rewards by a rubric of "
                    f"{args.rubrics}, got {row['grader']!r} and no such rubric or verdicts"
                )
            verdicts = [
                verdict != flipped(args.rate, args.seed, key, criterion["id"])
                for criterion, verdict in zip(criteria, row["verdicts"])
            ]
            reward = pass_rate([criterion["points"] for criterion in criteria], verdicts)
            row |= {"verdicts": verdicts, "reward": reward}
        rows.append(row)
    settings = {"rate": args.rate, "seed": args.seed}
    inputs = [args.rewards, args.rubrics]
    return write(args.out, "rewards", rows, settings, inputs, args.overwrite)


def impression_of(question, text, view, rate, *names):
    """0-10 over 10: one vote for every general property, plus up to two points for length, a
    known taste of such judges.  view "all": the whole library, merit or mere style, for it has
    no contrast to tell them apart; "merits": a judge that knows what is merit."""
    library = predicates.CHECKS if view == "all" else predicates.MERITS
    general = [
        name for name, check in library.items() if check.propose is predicates.Check.propose
    ]
    votes = sum(
        bool(library[name].test(question, text)) != flipped(rate, *names, name)
        for name in general
    )
    return round(8 * votes / len(general) + 2 * min(1.0, len(text) / 40)) / 10


def impression(argv):
    p = parser(__doc__, "prompts", "rollouts")
    p.add_argument(
        "--view", default="all", choices=("all", "merits"), help="properties it votes on"
    )
    p.add_argument("--rate", type=share, default=0.0, help="share of wrong votes")
    args = p.parse_args(argv)
    asked = {str(r["id"]): question_of(r) for r in files.read(args.prompts, "prompts")}
    rows = []
    for rollout in files.read(args.rollouts, "rollouts"):
        key = records.key_of(rollout, "rollouts")
        names = rollout["text"], args.view, args.rate, args.seed, key
        reward = rewards.Reward(impression_of(asked[key[0]], *names))
        rows.append(rewards.reward_record(rollout, reward, "impression"))
    inputs = [args.prompts, args.rollouts]
    settings = {"view": args.view, "rate": args.rate, "seed": args.seed}
    return write(args.out, "rewards", rows, settings, inputs, args.overwrite)


def shaped(reward, calls):
    """shaped(0.0, 3) -> 0.15, shaped(1.0, 3) -> 1.0"""
    return min(0.2, 0.05 * calls) if reward == 0 else reward


def shape_calls(argv):
    args = parser(__doc__, "rewards", "rollouts").parse_args(argv)
    table = files.Table(args.rewards, "rewards")
    rollouts = files.Table(args.rollouts, "rollouts")
    rows = []
    for rollout in rollouts:
        row = files.record_for(table, rollout, rollouts)
        rows.append(row | {"reward": shaped(row["reward"], len(rollout.get("calls", ())))})
    inputs = [args.rewards, args.rollouts]
    return write(args.out, "rewards", rows, {}, inputs, args.overwrite)


# ---- rubrics


def flat_points(argv):
    args = parser(__doc__, "rubrics").parse_args(argv)
    rows = [
        rubric | {"criteria": [c | {"points": 3} for c in rubric["criteria"]]}
        for rubric in files.read(args.rubrics, "rubrics")
    ]
    return write(args.out, "rubrics", rows, {"points": 3}, [args.rubrics], args.overwrite)


# ---- scores


def shuffle_scores(argv):
    p = parser(__doc__, "scores")
    p.add_argument(
        "--rollouts",
        help="the rollouts of these scores: tokens that their loss mask hides, a tool's, keep "
        "their own",
    )
    args = p.parse_args(argv)
    masks = {}
    if args.rollouts:
        for score, rollout in with_rollouts(args.scores, args.rollouts):
            masks[records.key_of(score, "scores")] = rollout["loss_mask"]
    rows = list(files.read(args.scores, "scores"))
    parts = [row["logprobs"] for row in rows]
    flat = np.concatenate(parts)
    counts = np.ones(len(flat), bool)
    if masks:
        counts = np.concatenate([masks[records.key_of(row, "scores")] for row in rows]) > 0
    flat[counts] = np.random.default_rng(args.seed).permutation(flat[counts])
    for row, part in zip(rows, np.split(flat, np.cumsum(list(map(len, parts)))[:-1])):
        row["logprobs"] = part.tolist()
    # whatever else a score holds knows the teacher
    rows = [{name: row[name] for name in records.SCORE} for row in rows]
    inputs = [path for path in (args.scores, args.rollouts) if path]
    # with more records the order would be another one
    settings = {"seed": args.seed, "of_records": len(rows)}
    return write(args.out, "scores", rows, settings, inputs, args.overwrite)


COMMANDS = {
    "shuffle-rewards": shuffle_rewards,
    "flip-verdicts": flip_verdicts,
    "shape-calls": shape_calls,
    "flat-points": flat_points,
    "impression": impression,
    "shuffle-scores": shuffle_scores,
}


def main(argv=None):
    return cli.dispatch(__doc__, COMMANDS, argv)


if __name__ == "__main__":
    cli.run(main)
