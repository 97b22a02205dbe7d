"""A teacher of another vocabulary scores a student's rollouts unit by unit (SimCT, arXiv
2605.07711; `python teacher.py units`).

    python teacher.py units --model TEACHER --student STUDENT --prompts P --rollouts R --out
    scores.jsonl
    python teacher.py score --model STUDENT --rollouts R --out own.jsonl --top-k 16
    python teacher.py units --model TEACHER --student STUDENT --prompts P --rollouts R
    --top-k-of own.jsonl --out scores.jsonl
    python teacher.py regroup --scores scores.jsonl --drop-spans 0.5 --out half.jsonl     #
    controls: spans dropped, coarsened, shuffled

The teacher reads the prompt in its own chat template, and the student's text in its own tokens;
align.py says which of them spell the same.  A line holds, beside the fields of every score,

    units           [[s0, s1, t0, t1], ...]: tokens of the student, tokens of the teacher
    unit_logprobs   the teacher's log-prob of each unit's whole spelling;  unit_logits: the sum
                    of its raw logits in its place;  unit_logz: the
                    log of their normaliser where the unit begins (only the released form of the
                    loss reads these two)
    unit_topk       where each unit begins, the teacher's log-probs of shared tokens, under the
                    student's ids: of all of them, or, with
                    --top-k-of, of those among the student's own likeliest (others: -inf), which
                    bounds the file
    prefixes        which of these tokens are a proper beginning of the unit's text: the
                    teacher's first step into it, spelt its way
    sorted          with --sorted K: the teacher's K largest log-probs, best first, at its place
                    i for every token i of the student that has
                    such a place (ULD, which aligns nothing)
    logprobs        each unit's log-prob dealt out among the student's tokens in proportion to
                    the student's own (DPCA, arXiv 2606.09456): what
                    `--method opd` reads.  A token outside of any unit gets the student's own
                    number: no advantage

Size: a unit costs 7 bytes a candidate; 16 candidates and 500 units make 75 kB a rollout in
base64, 150,000 shared tokens would make 700 MB: so use --top-k-of where the vocabularies are
large.

Simplifications: 1. local teachers only; 2. a rollout with messages of several turns is scored
in its last answer.
"""

from pathlib import Path

import numpy as np
import torch

import records
from align import align, shared_vocabulary, spelling
from kernel import linear_logp
from records import BadInput
from rollout import (
    add_model_flags,
    check_tokens,
    hidden_at,
    identity_of,
    likeliest,
    load_policy,
    load_tokenizer,
    render,
    response_positions,
    token_batches,
    vocabulary_size,
)


def raw_logits(hidden, head, ids, scale=1.0, softcap=None, vocabulary=None):
    """Logits of one token a state, [N], differentiable, without the others: hidden [N, D], head
    [V, D], ids [N]."""
    z = (hidden.float() * head[ids].float()).sum(-1) * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def deal(unit_logps, units, own):
    """Every unit's log-prob among its student tokens, in proportion to their own log-probs;
    alike where those are all 0.

    deal([-3.0], [(0, 2, 0, 1)], [-1.0, -0.5, -9.0]) -> [-2.0, -1.0, -9.0]"""
    out = list(own)
    for total, (s0, s1, _, _) in zip(unit_logps, units):
        mine = sum(own[s0:s1])
        for i in range(s0, s1):
            out[i] = total * own[i] / mine if mine < 0 else total / (s1 - s0)
    return out


@torch.no_grad()
def score_batch(policy, prompts, alignments, candidates, largest=0):
    """[(unit log-probs [U], unit logits [U], unit logz [U], candidates' log-probs [U, K], K
    largest log-probs [T, K])] of a batch of answers.

    prompts: the teacher's ids of each prompt; candidates: [U, K] ids in its vocabulary, -1 for
    none."""
    found = [a.teacher_ids for a in alignments]
    hidden = hidden_at(
        policy.model,
        [p + ids for p, ids in zip(prompts, found)],
        [response_positions(p, [1] * len(ids)) for p, ids in zip(prompts, found)],
    )
    own = torch.tensor(
        [t for ids in found for t in ids], dtype=torch.int64, device=hidden.device
    )
    logp, _ = linear_logp(hidden, policy.head, own, **policy.head_options)
    logit = raw_logits(hidden, policy.head, own, **policy.head_options)
    starts, offset = [], 0
    for a, ids in zip(alignments, found):
        starts += [offset + t0 for _, _, t0, _ in a.units]
        offset += len(ids)
    wanted = torch.from_numpy(np.concatenate(candidates).astype(np.int64)).to(hidden.device)
    top, _ = linear_logp(
        hidden[starts], policy.head, wanted.clamp_min(0), **policy.head_options
    )
    top = top.masked_fill(wanted < 0, -torch.inf).cpu().numpy()
    best = (
        linear_logp(
            hidden, policy.head, likeliest(policy, hidden, largest), **policy.head_options
        )[0]
        .cpu()
        .numpy()
        if largest
        else np.zeros((len(own), 0), np.float32)
    )
    logp, logit, out, offset, row = (
        logp.double().cpu().numpy(),
        logit.double().cpu().numpy(),
        [],
        0,
        0,
    )
    for a, ids in zip(alignments, found):
        spans = [(offset + t0, offset + t1) for _, _, t0, t1 in a.units]
        out.append(
            (
                [logp[i:j].sum() for i, j in spans],
                [logit[i:j].sum() for i, j in spans],
                [logit[i] - logp[i] for i, _ in spans],
                top[row : row + len(spans)],
                best[offset : offset + len(ids)],
            )
        )
        offset, row = offset + len(ids), row + len(spans)
    return out


def main(argv):
    p = records.parser(__doc__)
    p.add_argument("--model", required=True, help="the teacher: folder or Hugging Face id")
    p.add_argument(
        "--student",
        required=True,
        help="folder or Hugging Face id whose tokenizer wrote the rollouts",
    )
    p.add_argument(
        "--prompts",
        required=True,
        help="JSONL of prompts, which the teacher reads in its own template",
    )
    p.add_argument("--rollouts", required=True, help="JSONL of rollouts to score")
    p.add_argument(
        "--out", required=True, help="JSONL to write; run again to complete an interrupted file"
    )
    p.add_argument(
        "--top-k-of",
        metavar="FILE",
        help="candidates: the student's own likeliest tokens (teacher.py score --top-k by "
        "the student) in place of all shared ones",
    )
    p.add_argument(
        "--sorted",
        type=int,
        default=0,
        metavar="K",
        help="also keep the K largest log-probs of every place, for --method uld",
    )
    p.add_argument(
        "--ends",
        metavar="A=B",
        help="the student's token A ends a turn as the teacher's B does (default: both "
        "tokenizers' end tokens)",
    )
    p.add_argument(
        "--batch-tokens",
        type=int,
        default=16384,
        help="rows x longest row in one forward pass: memory against speed",
    )
    add_model_flags(p)
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    args = p.parse_args(argv)
    policy, student = (
        load_policy(args.model, args.dtype, args.device, args.template_options),
        load_tokenizer(args.student),
    )
    ends = pair_of_ends(args.ends, student, policy.tokenizer)
    shared = shared_vocabulary(student, policy.tokenizer) | (
        {ends[0]: ends[1]} if None not in ends else {}
    )
    everything, mine, identity = (
        np.array(sorted(shared)),
        spelling(student),
        identity_of(args.student, None, student, {}),
    )
    pieces = {i: mine[i] for i in shared}
    prompts = {str(r["id"]): r for r in records.read(args.prompts, "prompts")}
    rollouts, others = (
        records.Table(args.rollouts, "rollouts"),
        records.Table(args.top_k_of, "scores") if args.top_k_of else None,
    )
    lengths = []
    for key in rollouts.keys():
        rollout = rollouts[key]
        check_tokens(
            rollout, rollouts.where(key), identity, vocabulary_size(student), ("vocabulary",)
        )
        if len(rollout.get("steps", ())) > 1:
            raise BadInput(
                f"{rollouts.where(key)}: steps: expected an answer in one piece, came an "
                f"episode with tools: its turns have no common spelling in two "
                f"chat templates"
            )
        if key[0] not in prompts:
            raise BadInput(
                f"{rollouts.where(key)}: id: expected one of the ids in {args.prompts}, came "
                f"{key[0]!r}"
            )
        if others and "topk" not in records.partner(others, rollout, rollouts):
            raise BadInput(
                f"{others.where(key)}: topk: expected ids to score, but the field is "
                f"missing: run teacher.py score with --top-k"
            )
        lengths.append((key, len(rollout["prompt_ids"]) + 2 * len(rollout["response_ids"])))
    total, covered, strict, tokens, whole = 0, 0, 0, 0, 0
    settings = {
        "policy": policy.identity,
        "student": identity["vocabulary"],
        "ends": ends,
        "sorted": args.sorted,
        "dtype": args.dtype,
    }
    with records.Writer(
        args.out,
        "scores",
        settings,
        [args.rollouts, args.prompts] + [args.top_k_of] * bool(others),
        args.overwrite,
    ) as writer:
        todo = [pair for pair in lengths if pair[0] not in writer]
        for batch in records.progress(
            [
                [todo[i][0] for i in b]
                for b in token_batches([n for _, n in todo], args.batch_tokens)
            ],
            desc=Path(args.out).name,
        ):
            some = [rollouts[key] for key in batch]
            found = [align(student, policy.tokenizer, r["response_ids"], ends) for r in some]
            ids = []  # candidates of every unit, under the student's ids
            for key, a in zip(batch, found):
                proposed = records.unpack(others[key]["topk"]["ids"]) if others else None
                ids.append(
                    np.array(
                        [proposed[s0] if others else everything for s0, _, _, _ in a.units],
                        np.int64,
                    ).reshape(len(a.units), -1 if a.units else 0)
                )
            width = max((x.shape[1] for x in ids), default=0)
            ids = [x if len(x) else np.zeros((0, width), np.int64) for x in ids]
            theirs = [
                np.array(
                    [[shared.get(int(i), -1) for i in row] for row in x], np.int64
                ).reshape(x.shape)
                for x in ids
            ]
            asked = [
                render(policy.tokenizer, prompts[key[0]], policy.template_options)
                for key in batch
            ]
            for rollout, a, x, (logps, logits, logz, top, best) in zip(
                some, found, ids, score_batch(policy, asked, found, theirs, args.sorted)
            ):
                texts = [
                    b"".join(mine[i] or b"" for i in rollout["response_ids"][s0:s1])
                    for s0, s1, _, _ in a.units
                ]
                prefixes = np.array(
                    [
                        [
                            bool(pieces.get(int(i)))
                            and len(pieces[int(i)]) < len(text)
                            and text.startswith(pieces[int(i)])
                            for i in row
                        ]
                        for row, text in zip(x, texts)
                    ],
                    np.uint8,
                ).reshape(x.shape)
                small = np.uint16 if x.max(initial=0) < 65536 else np.int32
                writer.write(
                    {
                        "id": rollout["id"],
                        "sample": rollout["sample"],
                        "policy": policy.identity,
                        "rollout": records.fingerprint(rollout),
                        "logprobs": records.floats(
                            np.minimum(deal(logps, a.units, rollout["logprobs"]), 0)
                        ),
                        "units": [list(u) for u in a.units],
                        "unit_logprobs": records.floats(logps),
                        "unit_logits": records.floats(logits),
                        "unit_logz": records.floats(logz),
                        "unit_topk": {
                            "ids": records.pack(x.astype(small)),
                            "logprobs": records.pack(top.astype(np.float32)),
                        },
                        "prefixes": records.pack(prefixes),
                        "bytes": [a.bytes, a.covered, a.strict],
                        **(
                            {"sorted": records.pack(best[: len(rollout["response_ids"])])}
                            if args.sorted
                            else {}
                        ),
                    }
                )
    for line in records.read(args.out, "scores"):
        n, some, one = line["bytes"]
        total, covered, strict, tokens, whole = (
            total + n,
            covered + some,
            strict + one,
            tokens + line["units"][-1][3] if line["units"] else tokens,
            whole + (n == some),
        )
    summary = {
        "out": args.out,
        "records": len(lengths),
        "teacher_tokens": tokens,
        "covered": covered / max(1, total),
        "strict": strict / max(1, total),
        "whole": whole / max(1, len(lengths)),
        "shared_vocabulary": len(shared),
    }
    print(
        f"teacher.py units: {args.out}: {len(lengths)} rollouts, {summary['covered']:.1%} of "
        f"their bytes in units, {summary['strict']:.1%} in units of one token on "
        f"either side, "
        f"{len(shared)} shared tokens, {summary['whole']:.1%} of rollouts understood to "
        f"their end"
    )
    return summary


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


def regroup(argv):
    """teacher.py regroup: what a units file is worth when part of it is taken away."""
    p = records.parser(
        "Controls for text units: spans (units that are not one token on both sides) "
        "dropped, made where there were none, or with each "
        "other's scores.\n\n    python teacher.py regroup --scores units.jsonl --rollouts R "
        "--coarsen 0.3 --out coarse.jsonl"
    )
    p.add_argument("--scores", required=True, help="JSONL of teacher.py units")
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
                f"--{flag.replace('_', '-')}: expected a share from 0 to 1, came "
                f"{getattr(args, flag)}"
            )
    rng, rollouts, lines = (
        np.random.default_rng(args.seed),
        records.Table(args.rollouts, "rollouts"),
        [],
    )
    scores = records.Table(args.scores, "scores")
    for line in scores:
        key = records.key_of(line, "scores")
        if "units" not in line:
            raise BadInput(
                f"{scores.where(key)}: units: expected text units, but the field is missing: "
                f"run teacher.py units"
            )
        if key not in rollouts or records.fingerprint(rollouts[key]) != line["rollout"]:
            raise BadInput(
                f"{scores.where(key)}: rollout: expected that of {args.rollouts}, came "
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
    with records.Writer(
        args.out, "scores", settings, [args.scores, args.rollouts], args.overwrite
    ) as writer:
        writer.write(*(line for line in lines if records.key_of(line, "scores") not in writer))
    total = sum(len(line["units"]) for line in lines)
    print(
        f"teacher.py regroup: {args.out}: {len(lines)} rollouts, {total} units, {len(spans)} "
        f"of them spans"
    )
    return {"out": args.out, "records": len(lines), "units": total, "spans": len(spans)}


def pair_of_ends(text, student, teacher):
    """ "<|end|>=<|im_end|>" -> their ids; by default both end tokens."""
    if not text:
        return student.eos_token_id, teacher.eos_token_id
    names = text.split("=")
    if (
        len(names) != 2
        or names[0] not in student.get_vocab()
        or names[1] not in teacher.get_vocab()
    ):
        raise BadInput(
            f"--ends {text}: expected A=B, a token of the student's vocabulary and one of "
            f"the teacher's"
        )
    return student.get_vocab()[names[0]], teacher.get_vocab()[names[1]]
