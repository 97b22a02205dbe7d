"""The null control of dense supervision: log-probs dealt out at random."""

import numpy as np

from opd import files, records
from opd.records import BadInput


def main(argv=None):
    """experiments.shuffle_scores: the null control of dense supervision."""
    p = files.parser(
        "The same log-probs, dealt out at random among all tokens of the file: a teacher "
        "that knows nothing.\n\n"
        "    python -m experiments.shuffle_scores --scores scores.jsonl --out null.jsonl"
    )
    p.add_argument("--scores", required=True, help="JSONL of scores")
    p.add_argument("--out", required=True, help="JSONL to write; top-k fields are left out")
    p.add_argument(
        "--rollouts",
        help="the rollouts of these scores: tokens that their loss mask hides, a tool's, "
        "keep their own",
    )
    p.add_argument("--seed", type=int, default=0, help="of the permutation")
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    args = p.parse_args(argv)
    rows = [
        {k: v for k, v in row.items() if k not in ("topk", "topk_of", "end_mass")}
        for row in files.read(args.scores, "scores")
    ]
    if args.rollouts:
        scores, rollouts = (
            files.Table(args.scores, "scores"),
            files.Table(args.rollouts, "rollouts"),
        )
        masks = {
            key: rollouts[key]["loss_mask"]
            for key in rollouts.keys()
            if files.record_for(scores, rollouts[key], rollouts)
        }
        if missing := [key for key in scores.keys() if key not in masks]:
            raise BadInput(
                f"{scores.where(missing[0])}: expected the scores of a rollout of "
                f"{args.rollouts}, got those of another"
            )
    flat = np.concatenate([row["logprobs"] for row in rows])
    counts = (
        np.concatenate(
            [
                masks[records.key_of(row, "scores")]
                if args.rollouts
                else np.ones(len(row["logprobs"]))
                for row in rows
            ]
        )
        > 0
    )
    flat[counts] = np.random.default_rng(args.seed).permutation(flat[counts])
    with files.Writer(
        args.out,
        "scores",
        {"shuffle": args.seed},
        [args.scores] + [args.rollouts] * bool(args.rollouts),
        args.overwrite,
    ) as writer:
        for row, part in zip(
            rows, np.split(flat, np.cumsum([len(row["logprobs"]) for row in rows])[:-1])
        ):
            if records.key_of(row, "scores") not in writer:
                writer.write(row | {"logprobs": part.tolist()})
    print(
        f"experiments.shuffle_scores: {args.out}: {len(rows)} rollouts, {counts.sum()} "
        f"log-probs "
        f"dealt out"
    )
    return {"out": args.out, "records": len(rows)}


if __name__ == "__main__":
    files.run(main)
