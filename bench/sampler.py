"""Sampling from a real model: this repository's sampler beside transformers' `generate`, in
tokens a second, and how far the sampler's log-probs lie from the trainer's.

    python -m bench.sampler --models FOLDER ... --out results/sampler.jsonl

Both answer the same 32 prompts of random tokens (16 to 64 each) at temperature 1 with
--max-tokens tokens each: no end token ends an answer, so the work is the same.  (In real
rollouts answers end; our sampler's batch then shrinks, generate's does not.)  Every run is a
process of its own; the contenders take turns.  A line of JSON a model, dtype and contender:
medians.

`gap` is the largest difference in nats between a sampled token's log-prob as the sampler gave
it, step by step with a cache, and as the trainer computes it from whole sequences."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from bench.round import peak_mb, versions
from opd import cli, sampling, scoring
from opd.policy import load_policy

ROOT = Path(__file__).parents[1]
ROWS = 32
CONTENDERS = ("ours", "generate")


def random_prompts(policy):
    rng = np.random.default_rng(0)
    return [
        rng.integers(10, policy.vocabulary, rng.integers(16, 65)).tolist() for _ in range(ROWS)
    ]


def ours(policy, prompts, max_tokens):
    """(seconds, tokens, the Answers)."""
    draws = np.random.default_rng(1).random((ROWS, max_tokens))
    begun = time.perf_counter()
    answers = sampling.sample_batch(
        policy, prompts, draws, max_tokens=max_tokens, temperature=1.0, top_p=1.0
    )
    seconds = time.perf_counter() - begun
    return seconds, sum(len(answer.response_ids) for answer in answers), answers


def generate(policy, prompts, max_tokens):
    ids, mask = sampling.left_padded(prompts, policy.device)
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        pad_token_id=0,
    )
    policy.model.generation_config = config
    begun = time.perf_counter()
    with torch.no_grad():
        out = policy.model.generate(ids, attention_mask=mask, generation_config=config).cpu()
    return time.perf_counter() - begun, out[:, ids.shape[1] :].numel(), None


def largest_gap(policy, prompts, answers):
    """Largest |sampler's - trainer's log-prob| of a sampled token, in nats."""
    rows = [
        {"prompt_ids": prompt, "response_ids": answer.response_ids}
        for prompt, answer in zip(prompts, answers)
    ]
    gaps = [
        np.abs(np.array(answer.logprobs) - scoring.score_batch(policy, [row])[0][0])
        for row, answer in zip(rows, answers)
    ]
    return float(np.concatenate(gaps).max())


def run(model, dtype, device, contender, max_tokens):
    """One measurement, the work of a process of its own: prints it as JSON."""
    policy = load_policy(model, dtype, device)
    policy.stop_ids = []
    prompts = random_prompts(policy)
    work = {"ours": ours, "generate": generate}[contender]
    work(policy, prompts, 2)  # the first call allocates
    seconds, tokens, answers = work(policy, prompts, max_tokens)
    found = {"seconds": seconds, "tokens": tokens, "peak_mb": peak_mb()}
    if answers:
        found["gap"] = largest_gap(policy, prompts, answers)
    print(json.dumps(found))


def measured(*values):
    """What run(*values) prints in a new process."""
    code = f"from bench import sampler; sampler.run(*{values!r})"
    how = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    done = subprocess.run([sys.executable, "-c", code], **how)
    return json.loads(done.stdout.splitlines()[-1])


def processor():
    """What the products run on: "Intel Xeon, avx2, avx512_f, avx512_bf16, amx_bf16"."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    known = torch.cpu.get_capabilities()
    parts = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "bf16", "sve")
    name = known.get("cpu_name", known.get("architecture", "CPU"))
    return ", ".join([name, *(part for part in parts if known.get(part))])


def row_of(contender, found, model, dtype):
    """The line of a contender's measurements."""
    row = {
        "bench": "sampler",
        "model": Path(model).name,
        "dtype": dtype,
        "contender": contender,
    }
    row |= {"rows": ROWS, "tokens": found[0]["tokens"], "turns": len(found)}
    speeds = [run["tokens"] / run["seconds"] for run in found]
    row["tokens_a_second"] = statistics.median(speeds)
    for name in sorted(found[0].keys() - {"seconds", "tokens"}):
        row[name] = statistics.median(run[name] for run in found)
    row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    row |= {"threads": torch.get_num_threads(), "processor": processor()}
    return row | {"versions": versions("torch", "transformers")}


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--models", nargs="+", required=True, help="folders of models")
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    p.add_argument("--device", help="default: a GPU if there is one")
    p.add_argument("--max-tokens", type=int, default=64)
    p.add_argument("--turns", type=int, default=5)
    p.add_argument("--out", help="also append the lines here")
    args = p.parse_args(argv)
    for model in args.models:
        for dtype in args.dtypes:
            found = {name: [] for name in CONTENDERS}
            for _ in range(args.turns):
                for name in CONTENDERS:
                    how = (dtype, args.device, name, args.max_tokens)
                    found[name].append(measured(str(Path(model).resolve()), *how))
            for name in CONTENDERS:
                row = row_of(name, found[name], model, dtype)
                print(json.dumps(row), flush=True)
                if args.out:
                    with open(args.out, "a", encoding="utf-8") as f:
                        f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
