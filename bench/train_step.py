"""One train.py step on a real model: time and peak memory of the process, by log-prob kernel,
dtype, gradient checkpointing, rank of LoRA, and round (the second continues the optimiser of
the first).

    python -m bench.train_step --model FOLDER --out results/train_step.jsonl
    python -m bench.train_step --model FOLDER --kernels auto --dtypes float32 bfloat16 \\
        --checkpointing 0 1 --lora-ranks 0 8 --rounds 2 --turns 1

Makes rollouts of random tokens (by default 8 of 512) and scores for them, then runs `train.py
--method opd` as a person would, the contenders taking turns: a minute a run of SmolLM2-135M.  A
line of JSON a contender and round: medians of the step's seconds (forward, backward,
AdamW), of the whole process, and of its peak resident memory."""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.round import versions
from bench.sampler import processor
from opd import records
from opd.policy import served_policy, vocabulary_size

ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS = 16


def make_records(model, folder, rollouts, length):
    """rollouts.jsonl and scores.jsonl as rollout.py and teacher.py would write them, from
    random token ids."""
    tokenizer, identity = served_policy(model)
    rng = np.random.default_rng(0)
    with open(folder / "rollouts.jsonl", "w") as r, open(folder / "scores.jsonl", "w") as s:
        for i in range(rollouts):
            ids = rng.integers(10, vocabulary_size(tokenizer), PROMPT_TOKENS + length).tolist()
            response = ids[PROMPT_TOKENS:]
            row = {
                "id": f"r{i}",
                "sample": 0,
                "policy": identity,
                "text": tokenizer.decode(response, skip_special_tokens=True),
                "finish_reason": "length",
                "temperature": 1.0,
                "top_p": 1.0,
                "prompt_ids": ids[:PROMPT_TOKENS],
                "response_ids": response,
                "loss_mask": [1] * length,
                "logprobs": [-8.0] * length,
            }
            score = {
                "id": row["id"],
                "sample": 0,
                "policy": identity,
                "rollout": records.fingerprint(row),
                "logprobs": rng.normal(-8, 1, length).clip(max=0).tolist(),
            }
            r.write(json.dumps(row) + "\n")
            s.write(json.dumps(score) + "\n")


def run(model, folder, out, micro, kernel, dtype, checkpointing, rank):
    """(seconds of the step, seconds of the process, its peak resident megabytes)."""
    flags = {
        "method": "opd",
        "model": model,
        "rollouts": folder / "rollouts.jsonl",
        "scores": folder / "scores.jsonl",
        "allow": "stale",  # a second round has other weights than those of the rollouts
        "batch-size": 1 << 20,
        "micro-batch-tokens": micro,
        "learning-rate": 1e-6,
        "optimizer": f"lora_rank={rank}",
        "dtype": dtype,
        "out": out,
    }
    command = [sys.executable, "train.py", "--overwrite"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    for value in (f"kernel={kernel}", f"gradient_checkpointing={checkpointing}"):
        command += ["--compute", value]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    summary = json.loads((out / "trainer" / "state.json").read_text())["summary"]
    return summary["seconds"], seconds, usage.ru_maxrss / 1024


def parse(argv):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="folder of a model")
    p.add_argument("--kernels", nargs="+", default=["naive", "torch"])
    p.add_argument("--dtypes", nargs="+", default=["float32"])
    p.add_argument("--checkpointing", nargs="+", type=int, default=[0], choices=(0, 1))
    p.add_argument("--lora-ranks", nargs="+", type=int, default=[0], help="0: without LoRA")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--rollouts", type=int, default=8)
    p.add_argument("--length", type=int, default=512, help="tokens of a rollout")
    p.add_argument("--micro-batch", type=int, default=4, help="rollouts a micro-batch")
    p.add_argument("--turns", type=int, default=5)
    p.add_argument("--out", help="also append the lines here")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    model = Path(args.model).resolve()
    ways = (args.kernels, args.dtypes, args.checkpointing, args.lora_ranks)
    contenders = [*itertools.product(*ways)]
    rounds = range(1, args.rounds + 1)
    runs = {key: [] for key in itertools.product(contenders, rounds)}
    micro = args.micro_batch * (PROMPT_TOKENS + args.length)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_records(str(model), folder, args.rollouts, args.length)
        for _ in range(args.turns):
            for contender in contenders:
                start = model
                for number in rounds:
                    out = folder / f"round{number}"
                    measured = run(start, folder, out, micro, *contender)
                    runs[contender, number].append(measured)
                    start = out
    for ((kernel, dtype, checkpointing, rank), number), values in runs.items():
        step, process, peak = (statistics.median(column) for column in zip(*values))
        row = {
            "bench": "train_step",
            "model": model.name,
            "kernel": kernel,
            "dtype": dtype,
            "gradient_checkpointing": checkpointing,
            "lora_rank": rank,
            "round": number,
            "loss_tokens": args.rollouts * args.length,
            "micro_batch_loss_tokens": args.micro_batch * args.length,
            "step_seconds": step,
            "process_seconds": round(process, 2),
            "peak_mb": round(peak),
            "turns": args.turns,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "processor": processor(),
            "versions": versions("torch", "transformers"),
        }
        print(json.dumps(row))
        if args.out:
            with open(args.out, "a") as f:
                f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
