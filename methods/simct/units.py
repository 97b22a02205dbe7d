"""A teacher of another vocabulary scores a student's rollouts unit by unit (SimCT, arXiv
2605.07711; `python -m methods.simct score`).

    python -m methods.simct score --model TEACHER --student STUDENT --prompts P --rollouts R
    --out
    scores.jsonl
    python teacher.py score --model STUDENT --rollouts R --out own.jsonl --top-k 16
    python -m methods.simct score --model TEACHER --student STUDENT --prompts P --rollouts R
    --top-k-of own.jsonl --out scores.jsonl
    python -m experiments.simct_regroup --scores scores.jsonl --drop-spans 0.5 --out half.jsonl
    #
    controls: spans dropped, coarsened, shuffled

The teacher reads the prompt in its own chat template, and the student's text in its own tokens;
methods/simct/align.py says which of them spell the same.  A line holds, beside the fields of
every score,

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

from methods.simct.align import align, shared_vocabulary, spelling
from opd import files, records
from opd.kernel import linear_logp
from opd.policy import (
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
from opd.records import BadInput


def raw_logits(hidden, head, ids, scale=1.0, softcap=None, vocabulary=None):
    """Logits of one token a state, [N], differentiable, without the others: hidden [N, D], head
    [V, D], ids [N]."""
    z = (hidden.float() * head[ids].float()).sum(-1) * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def split_unit_logprob(unit_logps, units, own):
    """Every unit's log-prob among its student tokens, in proportion to their own log-probs;
    alike where those are all 0.

    split_unit_logprob([-3.0], [(0, 2, 0, 1)], [-1.0, -0.5, -9.0]) -> [-2.0, -1.0, -9.0]"""
    out = list(own)
    for total, (s0, s1, _, _) in zip(unit_logps, units):
        mine = sum(own[s0:s1])
        for i in range(s0, s1):
            out[i] = total * own[i] / mine if mine < 0 else total / (s1 - s0)
    return out


@torch.no_grad()
def score_units(policy, prompts, alignments, candidates, largest=0):
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
    p = files.parser(__doc__)
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
    prompts = {str(r["id"]): r for r in files.read(args.prompts, "prompts")}
    rollouts, others = (
        files.Table(args.rollouts, "rollouts"),
        files.Table(args.top_k_of, "scores") if args.top_k_of else None,
    )
    lengths = []
    for key in rollouts.keys():
        rollout = rollouts[key]
        check_tokens(
            rollout, rollouts.where(key), identity, vocabulary_size(student), ("vocabulary",)
        )
        if len(rollout.get("steps", ())) > 1:
            raise BadInput(
                f"{rollouts.where(key)}: steps: expected an answer in one piece, got an "
                f"episode with tools: its turns have no common spelling in two "
                f"chat templates"
            )
        if key[0] not in prompts:
            raise BadInput(
                f"{rollouts.where(key)}: id: expected one of the ids in {args.prompts}, got "
                f"{key[0]!r}"
            )
        if others and "topk" not in files.record_for(others, rollout, rollouts):
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
    with files.Writer(
        args.out,
        "scores",
        settings,
        [args.rollouts, args.prompts] + [args.top_k_of] * bool(others),
        args.overwrite,
    ) as writer:
        todo = [pair for pair in lengths if pair[0] not in writer]
        for batch in files.progress(
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
                some, found, ids, score_units(policy, asked, found, theirs, args.sorted)
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
                            np.minimum(
                                split_unit_logprob(logps, a.units, rollout["logprobs"]), 0
                            )
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
    for line in files.read(args.out, "scores"):
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
        f"methods.simct score: {args.out}: {len(lengths)} rollouts, {summary['covered']:.1%} "
        f"of "
        f"their bytes in units, {summary['strict']:.1%} in units of one token on "
        f"either side, "
        f"{len(shared)} shared tokens, {summary['whole']:.1%} of rollouts understood to "
        f"their end"
    )
    return summary


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
