"""Scores a student's rollouts with a teacher of another vocabulary (SimCT, arXiv 2605.07711).

    python -m methods.simct score --model TEACHER --student STUDENT --prompts prompts.jsonl \\
        --rollouts rollouts.jsonl --out scores.jsonl

Where the vocabularies are large, bound the file with the student's own likeliest tokens:

    python teacher.py score --model STUDENT --rollouts rollouts.jsonl --out own.jsonl --top-k 16
    python -m methods.simct score ... --top-k-of own.jsonl --out scores.jsonl

The teacher reads the prompt in its own chat template and the student's text in its own tokens.
methods/simct/align.py finds the units that both spell.  A record holds, beside the fields of
every score, for U units:

    units          [[s0, s1, t0, t1]]: tokens s0..s1-1 of the student, t0..t1-1 of the teacher
    unit_logprobs  [U] the teacher's log-prob of the unit's whole spelling
    unit_logits    [U] the same sum of its raw logits (only --set span=logit reads it)
    unit_logz      [U] the log of the logits' normaliser at the unit's first token (likewise)
    unit_topk      [U, K] student ids and the teacher's log-probs of these shared tokens at the
                   unit's first token: all shared tokens, or those of --top-k-of (-inf: not
                   shared)
    prefixes       [U, K] 1 where a candidate spells a proper beginning of the unit's text
    sorted         [T, K] with --sorted K: the teacher's K largest log-probs at its tokens
                   0..T-1, T at most the student's length (ULD pairs them by place)
    bytes          [bytes of the answer, of these in units, of these in one-to-one units]
    logprobs       each unit's log-prob, split among the student's tokens in proportion to their
                   own (DPCA, arXiv 2606.09456), for `--method opd`.  A token outside of units
                   keeps the student's log-prob: no advantage

Size: 7 bytes a candidate and unit, 9 for ids above 65,535, and a third more as text.  16
candidates of 500 units take 100 kB a rollout, 150,000 shared tokens would take 900 MB.

Simplifications: 1. local teachers only; 2. of a prompt with several turns only the last answer
is scored; 3. episodes with tools are refused.
"""

from dataclasses import dataclass

import numpy as np
import torch

from methods.simct.align import (
    align,
    byte_shares,
    describe_shares,
    pieces_of,
    shared_vocabulary,
    token_bytes,
)
from opd import cli, files, records
from opd.chat import render
from opd.kernel import linear_logp
from opd.policy import (
    Policy,
    add_model_flags,
    check_tokens,
    identity_of,
    lasting_identity,
    likeliest,
    load_policy,
    load_tokenizer,
    vocabulary_size,
)
from opd.records import BadInput
from opd.scoring import proposal_of
from opd.shared import add_share_flag, answer_batches, answer_states, share_prompts


def raw_logits(hidden, head, ids, scale=1.0, softcap=None, vocabulary=None):
    """Logits of one token a state, [N], differentiable, without the others: hidden [N, D], head
    [V, D], ids [N]."""
    z = (hidden.float() * head[ids].float()).sum(-1) * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


# ---- what the teacher says of units


@dataclass(frozen=True)
class Pair:
    """A teacher and the tokenizer of its student."""

    student: object
    teacher: Policy
    ends: tuple  # (student's id, teacher's id) of the end of a turn
    shared: dict  # {student's id: teacher's id}, the ends included


@torch.no_grad()
def score_units(teacher, prompts, alignments, candidates, largest=0):
    """[(log-probs [T], logits [T], candidates' log-probs [U, K], `largest` log-probs [T, L])]
    of answers with T teacher tokens and U units.

    prompts: the teacher's ids of each prompt; candidates: of each answer [U, K] ids in the
    teacher's vocabulary, -1 for none."""
    answers = [a.teacher_ids for a in alignments]
    # [all teacher tokens, D]
    hidden = answer_states(teacher, prompts, answers, [[1] * len(ids) for ids in answers])

    def logps_of(states, ids):
        return linear_logp(states, teacher.head, ids, **teacher.head_options)[0]

    own = torch.tensor([i for ids in answers for i in ids], dtype=torch.int64)
    own = own.to(hidden.device)
    logp = logps_of(hidden, own).double().cpu().numpy()
    logit = raw_logits(hidden, teacher.head, own, **teacher.head_options)
    logit = logit.double().cpu().numpy()
    best = np.zeros((len(own), 0), np.float32)
    if largest:
        best = logps_of(hidden, likeliest(teacher, hidden, largest)).cpu().numpy()

    starts = np.cumsum([0] + [len(ids) for ids in answers])
    first = [start + t0 for start, a in zip(starts, alignments) for _, _, t0, _ in a.units]
    wanted = torch.from_numpy(np.concatenate(candidates)).to(hidden.device)
    top = logps_of(hidden[first], wanted.clamp_min(0))
    top = top.masked_fill(wanted < 0, -torch.inf).cpu().numpy()

    by_token = starts[1:-1]
    by_unit = np.cumsum([len(a.units) for a in alignments])[:-1]
    by_answer = [np.split(values, by_token) for values in (logp, logit, best)]
    return list(zip(*by_answer[:2], np.split(top, by_unit), by_answer[2]))


def split_unit_logprob(unit_logps, units, own):
    """Every unit's log-prob among its student tokens, in proportion to their own log-probs;
    equal parts where those are all 0.

    split_unit_logprob([-3.0], [(0, 2, 0, 1)], [-1.0, -0.5, -9.0]) -> [-2.0, -1.0, -9.0]"""
    out = list(own)
    for total, (s0, s1, _, _) in zip(unit_logps, units):
        mine = sum(own[s0:s1])
        for i in range(s0, s1):
            out[i] = total * own[i] / mine if mine < 0 else total / (s1 - s0)
    return out


# ---- records


def mark_prefixes(candidates, texts, table):
    """[U, K] of 0 and 1: which candidates spell a proper beginning of their unit's text.

    candidates: [U, K] student ids; texts: the bytes of each unit; table: `token_bytes`.
    Candidates 1|12|2 of the unit "12" -> [[1, 0, 0]]."""
    marks = np.zeros(candidates.shape, np.uint8)
    for row, (ids, text) in enumerate(zip(candidates.tolist(), texts)):
        for column, i in enumerate(ids):
            piece = table[i]
            marks[row, column] = bool(piece) and piece != text and text.startswith(piece)
    return marks


def unit_record(pair, rollout, alignment, candidates, scores):
    """The score record of one rollout; candidates: [U, K] student ids; scores: of
    `score_units`."""
    logp, logit, top, largest = scores
    ids = rollout["response_ids"]
    units = alignment.units
    unit_logps = [logp[t0:t1].sum() for _, _, t0, t1 in units]
    split = split_unit_logprob(unit_logps, units, rollout["logprobs"])
    texts = [b"".join(pieces_of(pair.student, ids[s0:s1])) for s0, s1, _, _ in units]
    small = np.uint16 if candidates.max(initial=0) < 65536 else np.int32
    record = {
        "id": rollout["id"],
        "sample": rollout["sample"],
        "policy": pair.teacher.identity,
        "rollout": records.fingerprint(rollout),
        "logprobs": records.floats(np.minimum(split, 0)),
        "units": [list(u) for u in units],
        "unit_logprobs": records.floats(unit_logps),
        "unit_logits": records.floats([logit[t0:t1].sum() for _, _, t0, t1 in units]),
        "unit_logz": records.floats([logit[t0] - logp[t0] for _, _, t0, _ in units]),
        "unit_topk": {
            "ids": records.pack(candidates.astype(small)),
            "logprobs": records.pack(top.astype(np.float32)),
        },
        "prefixes": records.pack(mark_prefixes(candidates, texts, token_bytes(pair.student))),
        "bytes": [alignment.bytes, alignment.covered, alignment.strict],
    }
    if largest.shape[1]:
        record["sorted"] = records.pack(largest[: len(ids)])
    return record


def candidate_ids(units, shared, topk_ids=None):
    """[U, K] student ids whose log-probs are wanted where each unit begins: all shared tokens,
    or those of the student's top-k [T, K] at the unit's first token."""
    if topk_ids is None:
        return np.tile(np.array(sorted(shared)), (len(units), 1))
    first = np.array([s0 for s0, _, _, _ in units], np.int64)
    return topk_ids[first].astype(np.int64)


def score_rollouts(pair, rollouts, prompts, topk_ids, largest=0):
    """Score records of a batch of rollouts.

    prompts: their prompt records; topk_ids: for each rollout [T, K], or None for all shared
    tokens."""
    teacher = pair.teacher
    alignments = []
    candidates = []  # student ids
    wanted = []  # the same in the teacher's vocabulary
    for rollout, proposed in zip(rollouts, topk_ids):
        found = align(pair.student, teacher.tokenizer, rollout["response_ids"], pair.ends)
        ids = candidate_ids(found.units, pair.shared, proposed)
        theirs = [pair.shared.get(i, -1) for i in ids.flatten().tolist()]
        alignments.append(found)
        candidates.append(ids)
        wanted.append(np.array(theirs, np.int64).reshape(ids.shape))
    prompt_ids = [render(teacher.tokenizer, p, teacher.template_options) for p in prompts]
    for rollout, ids, found in zip(rollouts, prompt_ids, alignments):
        where = f"id {rollout['id']!r}, sample {rollout['sample']}"
        teacher.check_length(len(ids) + len(found.teacher_ids), where)
    scores = score_units(teacher, prompt_ids, alignments, wanted, largest)
    return [
        unit_record(pair, *parts) for parts in zip(rollouts, alignments, candidates, scores)
    ]


# ---- the command


def pair_of_ends(text, student, teacher):
    """ "<|end|>=<|im_end|>" -> their ids; by default both end tokens."""
    if not text:
        return student.eos_token_id, teacher.eos_token_id
    mine, _, other = text.partition("=")
    if mine not in student.get_vocab() or other not in teacher.get_vocab():
        raise BadInput(
            f"--ends {text}: expected A=B, a token of the student's vocabulary and one of "
            f"the teacher's"
        )
    return student.get_vocab()[mine], teacher.get_vocab()[other]


def load_pair(model, student, ends, dtype, device, template_options):
    """Pair of a teacher's and a student's folder; ends: what --ends says."""
    teacher = load_policy(model, dtype, device, template_options)
    tokenizer = load_tokenizer(student)
    end_ids = pair_of_ends(ends, tokenizer, teacher.tokenizer)
    shared = shared_vocabulary(tokenizer, teacher.tokenizer)
    if None not in end_ids:
        shared[end_ids[0]] = end_ids[1]
    return Pair(tokenizer, teacher, end_ids, shared)


def check_rollout(rollout, where, identity, vocabulary):
    """Refuses a rollout in other tokens than the student's, and an episode with tools."""
    check_tokens(rollout, where, identity, vocabulary, ("vocabulary",))
    if len(rollout.get("steps", ())) > 1:
        raise BadInput(
            f"{where}: steps: expected an answer in one piece, got an episode with tools: its "
            f"turns have no common spelling in two chat templates"
        )


def check_prompt(rollout, where, prompts):
    """Refuses a rollout without a prompt."""
    key = records.key_of(rollout, "rollouts")
    if key[:1] not in prompts:
        raise BadInput(
            f"{where}: id: expected one of the ids in {prompts.path}, got {key[0]!r}"
        )


def summarise(out, shared):
    """What a finished file holds, and a line that says so."""
    tokens = 0
    counts = []
    for record in files.read(out, "scores"):
        if not {"units", "bytes"} <= record.keys():
            where = f"{out}: id {record['id']!r}, sample {record['sample']}"
            raise BadInput(
                f"{where}: units, bytes: expected what methods.simct score writes, got a "
                f"record without: --overwrite begins anew"
            )
        tokens += record["units"][-1][3] if record["units"] else 0
        counts.append(record["bytes"])
    shares = byte_shares(counts)
    print(
        f"methods.simct score: {out}: {len(counts)} rollouts, {describe_shares(shares)}; "
        f"{shared} shared tokens"
    )
    return {
        "out": out,
        "records": len(counts),
        "teacher_tokens": tokens,
        **shares,
        "shared_vocabulary": shared,
    }


def add_flags(p):
    p.add_argument("--model", required=True, help="the teacher: folder or Hugging Face id")
    p.add_argument("--student", required=True, help="whose tokenizer wrote the rollouts")
    p.add_argument(
        "--prompts", required=True, help="JSONL; the teacher reads them in its own template"
    )
    p.add_argument("--rollouts", required=True, help="JSONL of rollouts to score")
    p.add_argument(
        "--out", required=True, help="JSONL to write; run again to complete an interrupted file"
    )
    p.add_argument(
        "--top-k-of",
        metavar="FILE",
        help="candidates: the tokens that these scores by the student hold (teacher.py score "
        "--top-k) in place of all shared ones",
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
    add_share_flag(p)
    p.add_argument(
        "--batch-tokens",
        type=int,
        default=16384,
        help="rows x longest row in one forward pass: memory against speed",
    )
    add_model_flags(p)
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")


def main(argv=None):
    p = cli.parser(__doc__)
    add_flags(p)
    args = p.parse_args(argv)
    pair = load_pair(
        args.model, args.student, args.ends, args.dtype, args.device, args.template_options
    )
    if args.share_prompts:
        share_prompts(pair.teacher, args.batch_tokens)
    identity = identity_of(args.student, None, pair.student, {})
    vocabulary = vocabulary_size(pair.student)
    prompts = files.Table(args.prompts, "prompts")
    rollouts = files.Table(args.rollouts, "rollouts")
    proposals = files.Table(args.top_k_of, "scores") if args.top_k_of else None
    sizes = {}  # of the prompt and, at a guess, of the answer in the teacher's tokens
    for key in rollouts.keys():
        rollout = rollouts[key]
        where = rollouts.where(key)
        check_rollout(rollout, where, identity, vocabulary)
        check_prompt(rollout, where, prompts)
        if proposals:
            proposal_of(rollout, proposals, rollouts, vocabulary, identity)
        sizes[key] = len(rollout["prompt_ids"]), 2 * len(rollout["response_ids"])
    settings = {
        "policy": lasting_identity(pair.teacher.identity),
        "student": identity["vocabulary"],
        "ends": pair.ends,
        "sorted": args.sorted,
        "dtype": args.dtype,
    }

    def score_missing(missing):
        names = [key[0] for key in missing]
        missing_sizes = [sizes[key] for key in missing]
        batches = answer_batches(pair.teacher, names, missing_sizes, args.batch_tokens)
        for keys in ([missing[i] for i in batch] for batch in batches):
            topk_ids = [None] * len(keys)
            if proposals:
                topk_ids = [records.unpack(proposals[key]["topk"]["ids"]) for key in keys]
            yield score_rollouts(
                pair,
                [rollouts[key] for key in keys],
                [prompts[key[:1]] for key in keys],
                topk_ids,
                args.sorted,
            )

    inputs = [args.rollouts, args.prompts] + [args.top_k_of] * bool(proposals)
    files.fill(args.out, "scores", sizes, score_missing, settings, inputs, args.overwrite)
    return summarise(args.out, len(pair.shared))
