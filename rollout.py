"""Stage 1: the student answers the prompts.  On-policy data is what this file writes.

    python rollout.py --model M --prompts P.jsonl --n 8 --max-tokens 512 --out rollouts.jsonl
    python rollout.py --model NAME --tokenizer FOLDER --base-url http://localhost:8000/v1 \
        --prompts P.jsonl --n 8 --out rollouts.jsonl

Reads prompts (`id`, `messages` or `prompt`).  Writes a rollout a line: the sampled token ids,
their log-probs under the distribution they were sampled from, a loss mask, the text, and the
policy: model, hashes of weights, template and vocabulary.  These are recorded, not guessed
later, because decoding and encoding again changes tokens, and because where pad and end are one
token a mask from `ids == pad` would hide the end, and the model would forget how to stop.  An
end token is part of the response iff it was sampled.  The loop itself is
`opd.sampling.sample_batch`.  Log-probs are of softmax(logits / temperature) in
float32; methods on own samples, those without importance weights excepted, refuse rollouts
with `--top-p` below 1.

With --tools an answer is an episode (opd/tools.py): `response_ids` holds all of it, `loss_mask`
is 0 on the tools' outputs, `steps` are [start, end, whether its call had a result], `calls`
what was asked and said, `final` is the text of the last step, which is the answer.

Simplifications: 1. the answers of a batch read a prompt once, but each keeps a cache of it;
2. no paged cache or speculative decoding: serve large models with vLLM and use --base-url.
"""

import opd.quiet  # noqa: F401

# isort: split

import numpy as np

from opd import cli, files, records
from opd.sampling import ROLLOUT_STREAM, add_sampling_flags, fill_from_flags
from opd.tools import call_use


def summarise(path):
    """Numbers of a whole file, also of what an earlier run has written."""
    lengths = []
    finish = []
    calls = []
    for r in files.read(path, "rollouts"):
        lengths.append(records.sampled_length(r))
        finish.append(r["finish_reason"])
        calls.append([call["ok"] for call in r.get("calls", ())])
    summary = {
        "generated_tokens": sum(lengths),
        "length_mean": float(np.mean(lengths)),
        "truncated": finish.count("length") / len(lengths),
    }
    return summary, call_use(calls, [reason == "tool_limit" for reason in finish])


def main(argv=None):
    p = cli.parser(__doc__)
    add_sampling_flags(p, n=8)
    args = p.parse_args(argv)

    written, failures = fill_from_flags(args, "rollouts", ROLLOUT_STREAM)

    summary, use = summarise(args.out)
    summary |= {"out": args.out, "records": written, "failed": len(failures)}
    print(
        f"rollout.py: {args.out}: {written} rollouts, mean length "
        f"{summary['length_mean']:.1f} tokens, {summary['truncated']:.1%} cut at "
        f"{args.max_tokens}"
    )
    if args.tools:
        summary |= use
        print(
            f"rollout.py: {args.out}: {use['calls']:.2f} calls an episode, "
            f"{use['call_errors']:.1%} of them failed, {use['tool_limit']:.1%} of the episodes "
            f"ended at the last call"
        )
    return summary


if __name__ == "__main__":
    cli.run(main)
