"""Stage 1: the student answers the prompts.  On-policy data is what this file writes.

    python rollout.py --model runs/toy/student --prompts runs/toy/train.jsonl --n 8 --out
    rollouts.jsonl
    python rollout.py --model NAME --tokenizer FOLDER --base-url http://localhost:8000/v1
    --prompts P --n 8 --out rollouts.jsonl
    python rollout.py --model M --prompts P --tools calculator --out rollouts.jsonl          #
    an agent: opd/tools.py

Reads prompts (`id`, `messages` or `prompt`), writes one rollout a line: the sampled token ids,
their log-probs under the distribution they were sampled from, a loss mask, the text, and the
policy (model, hash of weights and template).

What makes a rollout fit for training, and why each of these is recorded here and not guessed
later:
- ids, not text: decoding and encoding again changes tokens.  An end token is part of the answer
  iff it was sampled.
- the mask comes from lengths, never from `ids == pad`: models whose pad token is their end
  token must learn to stop.
- log-probs are of softmax(logits / temperature) in float32.  `--top-p` below 1 samples from
  less than that, which
  is fine for evaluation; train.py refuses such rollouts for methods that divide by these
  probabilities.

Every sample draws its own random numbers from (--seed, prompt id, sample number).  So the
answers do not depend on batching, sharding, or on how often the run was interrupted (up to the
last bit of a batched matrix product).

With --tools an answer is an episode of several steps, with what the tools said between them.
`response_ids` then holds all of it, `loss_mask` is 0 on what the model has not written, `steps`
says where it wrote and whether the call there had a result ([start, end, true | false | null:
no call, or none that was answered]), `calls` what was asked and said, `final` is the text of
the last step, which is the answer.

Simplifications: 1. no prefix sharing between the n samples of a prompt; 2. no speculative
decoding, no paged cache: for large models serve them with vLLM and use --base-url; 3. every
step of an episode reads its whole context anew.
"""

import numpy as np

from opd import files, records
from opd.sampling import add_sampling_flags, answer_prompts
from opd.tools import call_use


def main(argv=None):
    p = files.parser(__doc__)
    add_sampling_flags(p, n=8)
    args = p.parse_args(argv)
    summary = answer_prompts(args, "rollouts", need_tokens=True)
    # of the whole file, also what an earlier run has written
    lengths, cut, calls, limited = [], 0, [], []
    for r in files.read(args.out, "rollouts"):
        lengths.append(records.sampled_length(r))
        cut += r["finish_reason"] == "length"
        limited.append(r["finish_reason"] == "tool_limit")
        calls.append([call["ok"] for call in r.get("calls", ())])
    summary |= {
        "generated_tokens": sum(lengths),
        "length_mean": float(np.mean(lengths)),
        "truncated": cut / len(lengths),
    }
    more = ""
    if args.tools:
        summary |= call_use(calls, limited)
        more = (
            f"; {summary['calls']:.2f} calls an episode, {summary['call_errors']:.1%} of "
            f"them failed, {summary['tool_limit']:.1%} of the episodes ended at the "
            f"last call"
        )
    print(
        f"rollout.py: {args.out}: {summary['records']} rollouts, mean length "
        f"{summary['length_mean']:.1f} tokens, "
        f"{summary['truncated']:.1%} cut at {args.max_tokens}{more}"
    )
    return summary


if __name__ == "__main__":
    files.run(main)
