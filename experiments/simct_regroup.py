"""Controls of SimCT over its scores: units merged or left out."""

import numpy as np

from opd import files, records
from opd.records import BadInput


def merge_units(line, rng, share):
    """`line` with neighbouring one-token units joined into one of two tokens, each pair with
    probability `share`: the text is the same, the teacher's opinion coarser.  The end of a turn
    stays alone."""
    rows, i, n = [], 0, len(line["units"])
    ids, logps, prefixes = (
        records.unpack(x)
        for x in (line["unit_topk"]["ids"], line["unit_topk"]["logprobs"], line["prefixes"])
    )
    prefixes = prefixes.copy()

    def single(u):
        return u[1] - u[0] == u[3] - u[2] == 1

    while i < n:
        joined = (
            i + 2 < n
            and single(line["units"][i])
            and single(line["units"][i + 1])
            and line["units"][i][1] == line["units"][i + 1][0]
            and rng.random() < share
        )
        rows.append((i, i + 1 + joined))
        if joined:  # the first token now begins the unit's text
            prefixes[i] |= ids[i] == line["token_ids"][line["units"][i][0]]
        i += 1 + joined
    first = [i for i, _ in rows]
    return line | {
        "units": [
            [
                line["units"][i][0],
                line["units"][j - 1][1],
                line["units"][i][2],
                line["units"][j - 1][3],
            ]
            for i, j in rows
        ],
        **{
            name: [sum(line[name][i:j]) for i, j in rows]
            for name in ("unit_logprobs", "unit_logits")
        },
        "unit_logz": [line["unit_logz"][i] for i in first],
        "unit_topk": {"ids": records.pack(ids[first]), "logprobs": records.pack(logps[first])},
        "prefixes": records.pack(prefixes[first]),
    }


def keep_units(line, kept):
    """`line` with the units at these places only."""
    some = {
        name: [line[name][i] for i in kept]
        for name in ("units", "unit_logprobs", "unit_logits", "unit_logz")
    }
    ids, logps, prefixes = (
        records.unpack(x)[kept]
        for x in (line["unit_topk"]["ids"], line["unit_topk"]["logprobs"], line["prefixes"])
    )
    return (
        line
        | some
        | {
            "unit_topk": {"ids": records.pack(ids), "logprobs": records.pack(logps)},
            "prefixes": records.pack(prefixes),
        }
    )


def main(argv=None):
    """experiments.simct_regroup: what a units file is worth when part of it is taken away."""
    p = files.parser(
        "Controls for text units: spans (units that are not one token on both sides) "
        "dropped, made where there were none, or with each "
        "other's scores.\n\n    python -m experiments.simct_regroup --scores units.jsonl "
        "--rollouts R "
        "--coarsen 0.3 --out coarse.jsonl"
    )
    p.add_argument("--scores", required=True, help="JSONL of methods.simct score")
    p.add_argument(
        "--rollouts", required=True, help="JSONL of the rollouts that they belong to"
    )
    p.add_argument("--out", required=True, help="JSONL to write")
    p.add_argument(
        "--drop-spans",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave out this share of the spans, each by a coin of its own",
    )
    p.add_argument(
        "--coarsen",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="join neighbouring one-token units, each pair with this probability",
    )
    p.add_argument(
        "--shuffle-spans",
        action="store_true",
        help="deal the spans' scores a token out at random among all spans of the file",
    )
    p.add_argument("--seed", type=int, default=0, help="of coins and permutation")
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    args = p.parse_args(argv)
    for flag in ("drop_spans", "coarsen"):
        if not 0 <= getattr(args, flag) <= 1:
            raise BadInput(
                f"--{flag.replace('_', '-')}: expected a share from 0 to 1, got "
                f"{getattr(args, flag)}"
            )
    rng, rollouts, lines = (
        np.random.default_rng(args.seed),
        files.Table(args.rollouts, "rollouts"),
        [],
    )
    scores = files.Table(args.scores, "scores")
    for line in scores:
        key = records.key_of(line, "scores")
        if "units" not in line:
            raise BadInput(
                f"{scores.where(key)}: units: expected text units, but the field is missing: "
                f"run methods.simct score"
            )
        if key not in rollouts or records.fingerprint(rollouts[key]) != line["rollout"]:
            raise BadInput(
                f"{scores.where(key)}: rollout: expected that of {args.rollouts}, got "
                f"{line['rollout']}, of another one"
            )
        line = (
            merge_units(line | {"token_ids": rollouts[key]["response_ids"]}, rng, args.coarsen)
            if args.coarsen
            else line
        )
        if args.drop_spans:
            line = keep_units(
                line,
                [
                    i
                    for i, (s0, s1, t0, t1) in enumerate(line["units"])
                    if (s1 - s0, t1 - t0) == (1, 1) or rng.random() >= args.drop_spans
                ],
            )
        lines.append({k: v for k, v in line.items() if k != "token_ids"})
    spans = [
        (line, i, t1 - t0)
        for line in lines
        for i, (s0, s1, t0, t1) in enumerate(line["units"])
        if (s1 - s0, t1 - t0) != (1, 1)
    ]
    if args.shuffle_spans:
        for name in ("unit_logprobs", "unit_logits"):
            means = [line[name][i] / n for line, i, n in spans]
            for (line, i, n), j in zip(
                spans, np.random.default_rng([args.seed, 1]).permutation(len(spans))
            ):
                line[name][i] = means[j] * n
    settings = {
        "drop": args.drop_spans,
        "coarsen": args.coarsen,
        "shuffle": args.shuffle_spans,
        "seed": args.seed,
    }
    with files.Writer(
        args.out, "scores", settings, [args.scores, args.rollouts], args.overwrite
    ) as writer:
        writer.write(*(line for line in lines if records.key_of(line, "scores") not in writer))
    total = sum(len(line["units"]) for line in lines)
    print(
        f"experiments.simct_regroup: {args.out}: {len(lines)} rollouts, {total} units, "
        f"{len(spans)} "
        f"of them spans"
    )
    return {"out": args.out, "records": len(lines), "units": total, "spans": len(spans)}


if __name__ == "__main__":
    files.run(main)
