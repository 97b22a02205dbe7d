"""Stage 2: the teacher.  It answers prompts (black box: text) or scores the student's rollouts
(white box: log-probs).

    python teacher.py answer --model runs/toy/teacher --prompts runs/toy/train.jsonl --n 4 --out
    answers.jsonl
    python teacher.py score  --model runs/toy/teacher --rollouts rollouts.jsonl --out
                             scores.jsonl
    python teacher.py score  --model runs/toy/teacher --rollouts rollouts.jsonl --out
                             scores.jsonl --top-k 24
    python teacher.py score  --model STUDENT --rollouts rollouts.jsonl --out scores.jsonl
                             --prompts P.jsonl --hint '{question} The answer is {answer}.'

`answer` writes the m answers a prompt that rubrics are drawn from (ROPD section 3; m = 4
there).  They are sampled at a temperature above 0: m copies of one answer teach a rubric
nothing, so the share of repeated answers is reported. `score` writes, for every response token,
the teacher's log-prob of exactly that token id after exactly that prefix, at temperature 1, and
with --top-k the teacher's K likeliest tokens (K = vocabulary size: the whole distribution);
with --top-k-of its log-probs of another model's likeliest tokens.  `end_mass` is its
probability of ending where the last token stands.  With --prompts the teacher reads other
prompts than the student did, the answer in them, say: then a model can teach itself (OPSD,
arXiv 2601.18734), and what it teaches is the difference that the answer makes. `shuffle` deals
a file's log-probs out at random: a null control.  `units` is for a teacher of another
vocabulary (methods/simct/units.py).

Scoring starts with a self-test: one rollout is scored alone and again inside a padded batch.
The difference is the noise floor; a teacher-student gap below it is no signal.

Token ids mean the same only if both models share a token -> id map, and a template: both are
compared by hash with the rollouts.  Another vocabulary is refused; another template is refused
unless --allow-template-mismatch says it is meant.

Simplifications: 1. one teacher a file; 2. no sequence packing.
"""

import numpy as np
import torch

from opd import files, records, served
from opd.kernel import linear_logp
from opd.policy import (
    add_model_flags,
    check_tokens,
    hidden_at,
    likeliest,
    load_policy,
    render,
    response_positions,
    resume_identity,
    served_policy,
    token_batches,
    vocabulary_size,
)
from opd.records import BadInput
from opd.sampling import add_sampling_flags, answer_prompts

# ---- answer


def answer(argv):
    p = files.parser(__doc__)
    add_sampling_flags(p, n=4)
    args = p.parse_args(argv)
    summary = answer_prompts(args, "answers", need_tokens=False)
    seen, distinct, prompts, tokens = set(), 0, set(), 0
    for r in files.read(args.out, "answers"):
        text = (str(r["id"]), hash(r["text"]))
        distinct += text not in seen
        seen.add(text)
        prompts.add(text[0])
        tokens += records.sampled_length(r) if "response_ids" in r else 0
    summary |= {"duplicates": 1 - distinct / summary["records"], "generated_tokens": tokens}
    print(
        f"teacher.py answer: {args.out}: {summary['records']} answers to {len(prompts)} "
        f"prompts, {summary['duplicates']:.1%} repeat "
        "another answer to the same prompt"
    )
    return summary


# ---- score


@torch.no_grad()
def score_batch(policy, rollouts, top_k=0, given=None, same=()):
    """[(logprobs [T], top ids [T, K] or None, top log-probs [T, K] or None, end mass)] for a
    batch of rollouts, at temperature 1.

    given: ids [T, K] a rollout whose log-probs are wanted in place of the teacher's likeliest
    ones.  same: pairs (a, b) of ids that mean the same: the teacher's mass on a counts as b's.
    end mass: probability of any stop token where the last token stands. Every response token is
    scored, also those a loss mask hides: masks may change, scores are dear."""
    hidden = hidden_at(
        policy.model,
        [r["prompt_ids"] + r["response_ids"] for r in rollouts],
        [response_positions(r["prompt_ids"], [1] * len(r["response_ids"])) for r in rollouts],
    )
    own = torch.tensor(
        [t for r in rollouts for t in r["response_ids"]],
        dtype=torch.int64,
        device=hidden.device,
    )
    lengths = [len(r["response_ids"]) for r in rollouts]
    ids = (
        likeliest(policy, hidden, top_k)
        if top_k
        else torch.from_numpy(np.concatenate(given).astype(np.int64)).to(hidden.device)
        if given
        else own[:, None][:, :0]
    )
    wanted = torch.cat(
        [own[:, None], ids, own.new_tensor([[a for a, _ in same]]).expand(len(own), -1)], 1
    )
    logps, _ = linear_logp(hidden, policy.head, wanted, **policy.head_options)
    for i, (a, b) in enumerate(same, start=wanted.shape[1] - len(same)):
        logps[:, 0] = torch.where(
            own == b, torch.logaddexp(logps[:, 0], logps[:, i]), logps[:, 0]
        )
    last = torch.tensor(
        [end - 1 for end, n in zip(np.cumsum(lengths), lengths) if n],
        dtype=torch.int64,
        device=hidden.device,
    )
    stops = own.new_tensor([[i for i in policy.stop_ids if i < policy.vocabulary]]).expand(
        len(last), -1
    )
    masses = iter(
        linear_logp(hidden[last], policy.head, stops, **policy.head_options)[0]
        .logsumexp(-1)
        .exp()
        .tolist()
    )
    ends = [next(masses) if n else None for n in lengths]  # an empty answer has no last token
    own_logps, top = (
        logps[:, 0].cpu().numpy(),
        (logps[:, 1 : 1 + ids.shape[1]].cpu().numpy(), ids.cpu().numpy()),
    )
    cuts = np.cumsum(lengths)[:-1]
    parts = zip(np.split(own_logps, cuts), np.split(top[1], cuts), np.split(top[0], cuts), ends)
    return [part if ids.shape[1] else (part[0], None, None, part[3]) for part in parts]


def score_record(rollout, identity, logprobs, top_ids, top_logprobs, end_mass=None):
    record = {
        "id": rollout["id"],
        "sample": rollout["sample"],
        "policy": identity,
        "rollout": records.fingerprint(rollout),
        "logprobs": records.floats(np.minimum(logprobs, 0)),
    }
    if end_mass is not None:
        record["end_mass"] = float(f"{end_mass:.6g}")
    if top_ids is not None:
        # a server gives lists
        top_ids, top_logprobs = np.asarray(top_ids), np.asarray(top_logprobs, np.float32)
        small = np.uint16 if top_ids.max(initial=0) < 65536 else np.int32
        record["topk"] = {
            "ids": records.pack(top_ids.astype(small)),
            "logprobs": records.pack(top_logprobs),
        }
    return record


def token_pair(text, tokenizer):
    """ "<|eot|>=<|end|>" -> their ids."""
    names, vocabulary = text.split("="), tokenizer.get_vocab()
    if len(names) != 2 or any(name not in vocabulary for name in names):
        raise BadInput(f"--same-token {text}: expected A=B, two tokens of the vocabulary")
    return vocabulary[names[0]], vocabulary[names[1]]


def hinted(prompt, hint, where):
    """A prompts record whose question, the last message of the user's or the text, is `hint`
    filled in: {question}, {answer}, {solution}.

    {"messages": [{"role": "user", "content": "2+2=?"}], "answer": "4"} and "{question}
    ({answer})" -> 2+2=? (4)"""
    turn = next(
        (
            i
            for i, m in reversed(list(enumerate(prompt.get("messages", ()))))
            if m["role"] == "user"
        ),
        None,
    )
    if turn is None and "messages" in prompt:
        raise BadInput(
            f"{where}: messages: expected one of the user's for --hint to stand in, got none"
        )
    fields = {name: prompt[name] for name in ("answer", "solution") if name in prompt} | {
        "question": prompt["prompt"] if turn is None else prompt["messages"][turn]["content"]
    }
    try:
        text = hint.format(**fields)
    except KeyError as missing:
        raise BadInput(
            f"{where}: {missing.args[0]}: expected, for --hint asks for it, but the field is "
            f"missing (there is: {', '.join(fields)})"
        ) from None
    except (ValueError, IndexError, AttributeError) as error:
        raise BadInput(
            f"--hint: expected text with {{question}}, {{answer}} or {{solution}}, and {{{{ "
            f"and }}}} for braces, got {hint!r} ({error})"
        ) from None
    if turn is None:
        return prompt | {"prompt": text}
    return prompt | {
        "messages": [
            m | {"content": text} if i == turn else m for i, m in enumerate(prompt["messages"])
        ]
    }


def other_prompts(args, tokenizer, rollouts):
    """{prompt id: token ids} of what the teacher reads in place of the student's prompts; {}
    without --prompts."""
    prompts, found = files.Table(args.prompts, "prompts") if args.prompts else None, {}
    for name, _ in rollouts.keys() if prompts else ():
        if name not in found:  # keys are strings, whatever the ids
            if (name,) not in prompts:
                raise BadInput(
                    f"{args.prompts}: expected a prompt {name!r}, which {args.rollouts} "
                    f"answers, but there is none"
                )
            prompt = prompts[name,]
            found[name] = render(
                tokenizer,
                hinted(prompt, args.hint, prompts.where((name,))) if args.hint else prompt,
                args.template_options,
            )
    return found


def noise_floor(policy, rollouts):
    """Largest difference in nats between scoring the shortest rollout alone and inside a padded
    batch."""
    alone = score_batch(policy, [rollouts[0]])[0][0]
    together = score_batch(policy, rollouts)[0][0]
    return float(np.abs(alone - together).max(initial=0.0))


def served_noise_floor(server, rollouts):
    """Largest difference in nats between two requests for the same scores: a server's replicas
    and batches differ."""
    for rollout in rollouts:
        try:
            first, second = (
                server.score(
                    rollout["prompt_ids"] + rollout["response_ids"], len(rollout["prompt_ids"])
                )[0]
                for _ in range(2)
            )
            return float(np.abs(np.subtract(first, second)).max(initial=0.0))
        except served.ServedFailure as failure:
            last = failure
    raise BadInput(f"the self-test failed on {len(rollouts)} rollouts (last: {last})")


def score(argv):  # noqa: C901
    p = files.parser(__doc__)
    p.add_argument(
        "--model", required=True, help="the teacher: folder, Hugging Face id, or a served name"
    )
    p.add_argument("--rollouts", required=True, help="JSONL of rollouts to score")
    p.add_argument(
        "--out", required=True, help="JSONL to write; run again to complete an interrupted file"
    )
    p.add_argument(
        "--top-k",
        type=int,
        default=0,
        help="also keep the K likeliest tokens; the vocabulary's size keeps all",
    )
    p.add_argument(
        "--top-k-of",
        metavar="FILE",
        help="keep the log-probs of the tokens that these scores hold (the student's own, "
        "with --top-k) in place of the likeliest ones",
    )
    p.add_argument(
        "--same-token",
        action="append",
        default=[],
        metavar="A=B",
        help="token A means what B does: its mass counts as B's, for models that end with "
        "other tokens",
    )
    p.add_argument(
        "--batch-tokens",
        type=int,
        default=16384,
        help="rows x longest row in one forward pass: memory against speed",
    )
    p.add_argument(
        "--prompts",
        help="JSONL of prompts, with the rollouts' ids, that the teacher reads in place of "
        "the student's",
    )
    p.add_argument(
        "--hint",
        help="with --prompts: what stands in the question's place, e.g. '{question} The "
        "answer is {answer}.'; also {solution}",
    )
    add_model_flags(p)
    p.add_argument(
        "--allow-template-mismatch",
        action="store_true",
        help="score prompts rendered with another chat template",
    )
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    served.add_flags(p)
    args = p.parse_args(argv)
    if args.top_k < 0:
        raise BadInput(f"--top-k: expected 0 or more, got {args.top_k}")
    if args.top_k_of and (args.top_k or args.base_url):
        reason = "and a server gives only its own likeliest ones"
        if args.top_k:
            reason = "so --top-k has no place beside it"
        raise BadInput(f"--top-k-of: says which tokens are wanted, {reason}")
    if args.same_token and (args.top_k or args.top_k_of or args.base_url):
        raise BadInput(
            "--same-token: changes the log-prob of the sampled tokens only: goes without "
            "--top-k, --top-k-of and --base-url"
        )

    if args.hint and not args.prompts:
        raise BadInput("--hint: needs --prompts, the records whose fields it names")

    rollouts, others = (
        files.Table(args.rollouts, "rollouts"),
        files.Table(args.top_k_of, "scores") if args.top_k_of else None,
    )
    if args.base_url:
        policy, (tokenizer, identity) = None, served_policy(args)
        if tokenizer is None:
            raise BadInput(
                f"--model {args.model}: the served teacher's tokenizer is not known: give "
                f"its folder with --tokenizer"
            )
        vocabulary = vocabulary_size(tokenizer)
    else:
        policy = load_policy(args.model, args.dtype, args.device, args.template_options)
        tokenizer, identity, vocabulary = policy.tokenizer, policy.identity, policy.vocabulary
    context = other_prompts(args, tokenizer, rollouts)

    def read(rollout):  # as the teacher reads it
        return rollout | {"prompt_ids": context[str(rollout["id"])]} if context else rollout

    same, lengths, proposer = (
        [token_pair(text, policy.tokenizer) for text in args.same_token],
        [],
        None,
    )
    for rollout in rollouts:
        key = records.key_of(rollout, "rollouts")
        check_tokens(rollout, rollouts.where(key), identity, vocabulary, ("vocabulary",))
        if (
            rollout["policy"].get("template") != identity["template"]
            and not args.allow_template_mismatch
        ):
            raise BadInput(
                f"{rollouts.where(key)}: policy.template: expected {identity['template']}, "
                f"the teacher's chat template, got "
                f"{rollout['policy'].get('template')}: a teacher off its own template scores "
                f"badly; pass --allow-template-mismatch "
                "if this is meant"
            )
        if others:
            proposal = files.record_for(others, rollout, rollouts)
            if "topk" not in proposal:
                raise BadInput(
                    f"{others.where(key)}: topk: expected ids to score, but the field is "
                    f"missing: run teacher.py score with --top-k"
                )
            proposer = proposer or proposal["policy"].get("weights")
            if proposal["policy"].get("weights") != proposer:
                raise BadInput(
                    f"{others.where(key)}: policy.weights: expected {proposer} as in the "
                    f"lines before, got {proposal['policy'].get('weights')}"
                )
        lengths.append((key, len(read(rollout)["prompt_ids"]) + len(rollout["response_ids"])))

    few = sorted(lengths[:8], key=lambda pair: pair[1])
    few = [
        read(rollouts[key])
        for place, (key, _) in enumerate(few)
        if place == 0 or (place + 1) * few[place][1] <= args.batch_tokens
    ]
    server = served.Server.from_flags(args) if args.base_url else None
    floor = served_noise_floor(server, few) if server else noise_floor(policy, few)

    tokens, gap_sum, gap_max = 0, 0.0, 0.0
    settings = {
        "policy": resume_identity(identity),
        "top_k": args.top_k,
        "dtype": args.dtype,
        "served": bool(args.base_url),
        **({"same_token": args.same_token} if args.same_token else {}),
        **({"hint": args.hint} if args.hint else {}),
    }
    lengths = dict(lengths)

    def work(missing):
        batches = token_batches(
            [lengths[key] for key in missing], args.batch_tokens if policy else 1
        )
        batches = [[missing[i] for i in batch] for batch in batches]
        if policy:
            return map(score_keys, batches)
        return (result for _, result in server.map(score_keys, batches))

    def score_keys(keys):
        batch = [rollouts[key] for key in keys]
        asked = list(map(read, batch))
        if policy:
            given = None
            if others:
                given = [records.unpack(others[key]["topk"]["ids"]) for key in keys]
            values = score_batch(policy, asked, args.top_k, given, same)
        else:
            values = [
                server.score(
                    r["prompt_ids"] + r["response_ids"], len(r["prompt_ids"]), args.top_k
                )
                for r in asked
            ]
        return [
            score_record(r, identity, *value)
            | ({"topk_of": proposer} if others else {})
            | ({"context": records.fingerprint(read(r))} if context else {})
            for r, value in zip(batch, values)
        ]

    _, failures = files.fill(
        args.out,
        "scores",
        lengths,
        work,
        settings,
        [args.rollouts] + [args.top_k_of] * bool(others) + [args.prompts] * bool(context),
        args.overwrite,
        limit=served.failure_limit(args),
    )

    # log mu - log p_T on the sampled tokens: its mean estimates the reverse KL
    for record in files.read(args.out, "scores"):
        rollout = rollouts[records.key_of(record, "scores")]
        gap = np.subtract(rollout["logprobs"], record["logprobs"])
        if "steps" in rollout:  # what a tool said, nobody sampled
            gap = np.concatenate([gap[start:end] for start, end, _ in rollout["steps"]])
        tokens, gap_sum, gap_max = (
            tokens + len(gap),
            gap_sum + gap.sum(),
            max(gap_max, np.abs(gap).max(initial=0.0)),
        )
    summary = {
        "out": args.out,
        "records": len(lengths) - len(failures),
        "failed": len(failures),
        "teacher_tokens": tokens,
        "noise_floor": floor,
        "kl_mean": float(gap_sum / max(1, tokens)),
        "gap_max": float(gap_max),
    }
    print(
        f"teacher.py score: {args.out}: {summary['records']} rollouts, {tokens} tokens, "
        f"student - teacher log-prob "
        f"{summary['kl_mean']:+.4f} nats a token (largest gap {summary['gap_max']:.1e}), "
        f"noise floor {floor:.1e}"
    )
    return summary


def main(argv=None):
    return files.dispatch(__doc__, {"answer": answer, "score": score}, argv)


if __name__ == "__main__":
    files.run(main)
