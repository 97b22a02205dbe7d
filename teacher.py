"""Stage 2: the teacher.  It answers prompts (black box: text) or scores the student's rollouts
(white box: log-probs).

    python teacher.py answer --model TEACHER --prompts P.jsonl --n 4 --out answers.jsonl
    python teacher.py score --model TEACHER --rollouts rollouts.jsonl --out scores.jsonl
    python teacher.py score --model STUDENT --rollouts rollouts.jsonl --out scores.jsonl \
        --prompts P.jsonl --hint '{question} The answer is {answer}.'

`answer` writes the m answers per prompt that rubrics are drawn from (ROPD section 3; m = 4), at
a temperature above 0: m copies of one answer teach a rubric nothing, so repeats are reported.
`score` writes, for every response token, the teacher's log-prob of exactly that token id after
exactly that prefix, at temperature 1; with --top-k also the teacher's K likeliest tokens; with
--top-k-of its log-probs of another model's likeliest tokens.  `end_mass` is its probability of
ending where the last token stands.  With --prompts the teacher reads other prompts than the
student did: a model with the answer in its prompt can teach itself (OPSD, arXiv 2601.18734).

Scoring starts with a self-test: one rollout is scored alone and inside a padded batch (with
--share-prompts behind a shared prompt, if several of the first rollouts have one).  The
difference is the noise floor; a teacher-student gap below it is no signal.  Token ids mean the
same only if both models share a token -> id map and a template: both are compared by hash with
the rollouts.  Another vocabulary is refused, another template unless it is meant.

Simplifications: 1. one teacher a file.
"""

import opd.quiet  # noqa: F401

# isort: split

import numpy as np

from opd import cli, files, records, served
from opd.chat import check_text, render
from opd.policy import (
    add_model_flags,
    add_tokenizer_flag,
    check_ids,
    check_tokenizer_flag,
    check_tokens,
    load_policy,
    resume_identity,
    same_template,
    served_policy,
    vocabulary_size,
)
from opd.records import BadInput
from opd.sampling import ANSWER_STREAM, add_sampling_flags, fill_from_flags
from opd.scoring import Scorer, proposal_of
from opd.shared import add_share_flag, share_prompts
from opd.stats import shown

# ---- answer


def count_answers(path):
    """(prompts answered, answers that differ, sampled tokens) of a file."""
    texts = set()
    tokens = 0
    for r in files.read(path, "answers"):
        texts.add((str(r["id"]), hash(r["text"])))
        if "response_ids" in r:
            tokens += records.sampled_length(r)
    return len({prompt for prompt, _ in texts}), len(texts), tokens


def answer(argv):
    p = cli.parser(__doc__)
    add_sampling_flags(p, n=4)
    args = p.parse_args(argv)
    written, failures = fill_from_flags(args, "answers", ANSWER_STREAM)
    prompts, distinct, tokens = count_answers(args.out)
    summary = {
        "out": args.out,
        "records": written,
        "failed": len(failures),
        "duplicates": 1 - distinct / written,
        "generated_tokens": tokens,
    }
    print(
        f"teacher.py answer: {args.out}: {written} answers to {prompts} prompts, "
        f"{summary['duplicates']:.1%} repeat another answer to the same prompt"
    )
    return summary


# ---- what the teacher reads


def hinted(prompt, hint, where):
    """A prompts record whose question, the last message of the user's or the text, is `hint`
    filled in: {question}, {answer}, {solution}.

    {"messages": [{"role": "user", "content": "2+2=?"}], "answer": "4"} and "{question}
    ({answer})" -> 2+2=? (4)"""
    messages = [dict(message) for message in prompt.get("messages", ())]
    asked = [message for message in messages if message["role"] == "user"]
    if messages and not asked:
        raise BadInput(
            f"{where}: messages: expected one of the user's for --hint to stand in, got none"
        )
    fields = {name: prompt[name] for name in ("answer", "solution") if name in prompt}
    if isinstance(fields.get("answer"), list) and fields["answer"]:
        fields["answer"] = fields["answer"][0]  # one of the writings that are right
    fields["question"] = asked[-1]["content"] if asked else prompt["prompt"]
    try:
        text = hint.format(**fields)
    except KeyError as missing:
        raise BadInput(
            f"{where}: {missing.args[0]}: expected, for --hint asks for it, but the field is "
            f"missing (there is: {', '.join(fields)})"
        ) from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise BadInput(
            f"--hint: expected text with {{question}}, {{answer}} or {{solution}}, and {{{{ "
            f"and }}}} for braces, got {hint!r} ({error})"
        ) from None
    if not asked:
        return prompt | {"prompt": text}
    asked[-1]["content"] = text
    return prompt | {"messages": messages}


def read_other_prompts(path, hint, tokenizer, template_options, rollouts):
    """{prompt id: token ids} of what the teacher reads in place of the student's prompts."""
    prompts = files.Table(path, "prompts")
    found = {}
    for rollout in rollouts:
        if "calls" in rollout:
            raise BadInput(
                f"{rollouts.where(records.key_of(rollout, 'rollouts'))}: calls: expected an "
                f"answer without tools: --prompts would not show the teacher their descriptions"
            )
    for name in dict.fromkeys(name for name, _ in rollouts.keys()):  # strings, whatever the ids
        if (name,) not in prompts:
            raise BadInput(
                f"{path}: expected a prompt {name!r}, which {rollouts.path} answers, but there "
                f"is none"
            )
        prompt = prompts[name,]
        if hint:
            prompt = hinted(prompt, hint, prompts.where((name,)))
        found[name] = render(tokenizer, prompt, template_options)
    return found


def check_rollouts(rollouts, tokenizer, identity, vocabulary, allow_template_mismatch):
    """Raises BadInput unless the teacher reads the rollouts' ids as the tokens they are."""
    for rollout in rollouts:
        where = rollouts.where(records.key_of(rollout, "rollouts"))
        check_tokens(rollout, where, identity, vocabulary, ("vocabulary",))
        check_text(tokenizer, rollout, where)
        template = rollout["policy"].get("template")
        same = same_template(rollout["policy"], identity, "calls" in rollout)
        if not (same or allow_template_mismatch):
            raise BadInput(
                f"{where}: policy.template: expected {identity['template']}, the teacher's "
                f"chat template, got {template}: a teacher off its own template scores badly; "
                f"pass --allow-template-mismatch if this is meant"
            )


def check_proposals(proposals, rollouts, policy):
    """The weights of the one model whose likeliest tokens a scores file holds; `policy` is to
    score these."""
    proposer = None
    for rollout in rollouts:
        proposal = proposal_of(rollout, proposals, rollouts, policy.vocabulary, policy.identity)
        where = proposals.where(records.key_of(rollout, "rollouts"))
        weights = proposal["policy"].get("weights")
        proposer = proposer or weights
        if weights != proposer:
            raise BadInput(
                f"{where}: policy.weights: expected {proposer} as in the lines before, got "
                f"{weights}"
            )
    return proposer


def token_pair(text, tokenizer):
    """ "<|eot|>=<|end|>" -> their ids."""
    names = text.split("=")
    vocabulary = tokenizer.get_vocab()
    if len(names) != 2 or any(name not in vocabulary for name in names):
        raise BadInput(f"--same-token {text}: expected A=B, two tokens of the vocabulary")
    return vocabulary[names[0]], vocabulary[names[1]]


# ---- score


def add_score_flags(p):
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
    add_share_flag(p)
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
    add_tokenizer_flag(p)
    p.add_argument(
        "--allow-template-mismatch",
        action="store_true",
        help="score prompts rendered with another chat template",
    )
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    served.add_flags(p)


def check_flags(args):
    check_tokenizer_flag(args.tokenizer, args.base_url)
    cli.check_at_least(0, top_k=args.top_k)
    if args.top_k_of and args.top_k:
        raise BadInput(
            "--top-k-of: says which tokens are wanted, so --top-k has no place beside it"
        )
    if args.top_k_of and args.base_url:
        raise BadInput("--top-k-of: a server gives only its own likeliest tokens")
    if args.same_token and (args.top_k or args.top_k_of or args.base_url):
        raise BadInput(
            "--same-token: changes the log-prob of the sampled tokens only: goes without "
            "--top-k, --top-k-of and --base-url"
        )
    if args.share_prompts and args.base_url:
        raise BadInput("--share-prompts: a server reads as it likes")
    if args.hint and not args.prompts:
        raise BadInput("--hint: needs --prompts, the records whose fields it names")


def summarise(path, rollouts):
    """log mu - log p_T on the sampled tokens; its mean, `kl_mean`, estimates the reverse KL.
    None where a temperature or top_p other than 1 makes mu another distribution."""
    tokens = 0
    plain = True
    gap_sum = 0.0
    gap_max = 0.0
    for record in files.read(path, "scores"):
        rollout = rollouts[records.key_of(record, "scores")]
        gap = np.subtract(rollout["logprobs"], record["logprobs"])
        if "steps" in rollout:  # without the tools' outputs
            gap = np.concatenate([gap[start:end] for start, end, _ in rollout["steps"]])
        plain &= rollout["temperature"] == rollout["top_p"] == 1
        tokens += len(gap)
        gap_sum += gap.sum()
        gap_max = max(gap_max, np.abs(gap).max(initial=0.0))
    return {
        "teacher_tokens": tokens,
        "kl_mean": float(gap_sum / max(1, tokens)) if plain else None,
        "gap_max": float(gap_max) if plain else None,
    }


def scorer_from_flags(args):
    """The Scorer, after every rollout has been checked against the teacher's tokens."""
    rollouts = files.Table(args.rollouts, "rollouts")
    policy = None
    if args.base_url:
        tokenizer, identity = served_policy(args.model, args.tokenizer, args.template_options)
        if tokenizer is None:
            raise BadInput(
                f"--model {args.model}: the served teacher's tokenizer is not known: give its "
                f"folder with --tokenizer"
            )
    else:
        policy = load_policy(args.model, args.dtype, args.device, args.template_options)
        if args.share_prompts:
            share_prompts(policy, args.batch_tokens)
        tokenizer = policy.tokenizer
        identity = policy.identity
    vocabulary = policy.vocabulary if policy else vocabulary_size(tokenizer)
    check_rollouts(rollouts, tokenizer, identity, vocabulary, args.allow_template_mismatch)
    scorer = Scorer(
        rollouts, identity, policy, top_k=args.top_k, batch_tokens=args.batch_tokens
    )
    if args.prompts:
        scorer.prompts = read_other_prompts(
            args.prompts, args.hint, tokenizer, args.template_options, rollouts
        )
        for name, ids in scorer.prompts.items():
            check_ids(ids, f"{args.prompts}: id {name!r}", vocabulary, identity)
    scorer.check_lengths()
    if args.top_k_of:
        scorer.proposals = files.Table(args.top_k_of, "scores")
        scorer.proposer = check_proposals(scorer.proposals, rollouts, policy)
    if args.base_url:
        scorer.server = served.Server.from_flags(args)
        scorer.server.vocabulary = vocabulary
    scorer.same = [token_pair(text, tokenizer) for text in args.same_token]
    return scorer


def score(argv):
    p = cli.parser(__doc__)
    add_score_flags(p)
    args = p.parse_args(argv)
    check_flags(args)

    scorer = scorer_from_flags(args)
    rollouts = scorer.rollouts
    floor = scorer.self_test()
    settings = {
        "policy": resume_identity(scorer.identity),
        "top_k": args.top_k,
        "dtype": args.dtype,
        "served": bool(args.base_url),
    }
    if scorer.server and scorer.server.fields:
        settings["request"] = scorer.server.fields
    inputs = [args.rollouts]
    if args.same_token:
        settings["same_token"] = args.same_token
    if args.hint:
        settings["hint"] = args.hint
    if args.top_k_of:
        inputs.append(args.top_k_of)
    if args.prompts:
        inputs.append(args.prompts)
    written, failures = files.fill(
        args.out,
        "scores",
        rollouts.keys(),
        scorer,
        settings,
        inputs,
        args.overwrite,
        limit=served.failure_limit(args),
    )

    summary = {"out": args.out, "records": written, "failed": len(failures)}
    summary |= summarise(args.out, rollouts) | {"noise_floor": floor}
    print(
        f"teacher.py score: {args.out}: {written} rollouts, {summary['teacher_tokens']} "
        f"tokens, student - teacher log-prob {shown(summary['kl_mean'], '+.4f')} nats a token "
        f"(largest gap {shown(summary['gap_max'], '.1e')}), noise floor {shown(floor, '.1e')}"
    )
    return summary


def main(argv=None):
    return cli.dispatch(__doc__, {"answer": answer, "score": score}, argv)


if __name__ == "__main__":
    cli.run(main)
