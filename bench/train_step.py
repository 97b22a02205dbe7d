"""One train.py step on a real model with this repository's kernel and with naive logits: time
and peak memory of the process.

    python -m bench.train_step --model FOLDER --out results/train_step.jsonl           #
    SmolLM2-135M: about a minute a run

Makes 8 rollouts of random tokens (512 each, so 4096 loss tokens) and scores for them, then runs
`train.py --method opd` as a person would, once a kernel and turn, the kernels taking turns.  A
line of JSON a kernel: medians of the step's seconds (reading the records, forward, backward,
AdamW), of the whole process, and of its peak resident memory."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from opd import policy as policies
from opd import records

ROOT = Path(__file__).resolve().parents[1]


def make_records(model, folder, rollouts, length):
    """rollouts.jsonl and scores.jsonl as rollout.py and teacher.py would write them, from
    random token ids."""
    policy = policies.load_policy(model)
    rng = np.random.default_rng(0)
    with open(folder / "rollouts.jsonl", "w") as r, open(folder / "scores.jsonl", "w") as s:
        for i in range(rollouts):
            ids = rng.integers(10, policy.vocabulary, 16 + length).tolist()
            row = {
                "id": f"r{i}",
                "sample": 0,
                "policy": policy.identity,
                "text": "",
                "finish_reason": "length",
                "temperature": 1.0,
                "top_p": 1.0,
                "prompt_ids": ids[:16],
                "response_ids": ids[16:],
                "loss_mask": [1] * length,
                "logprobs": [-8.0] * length,
            }
            r.write(json.dumps(row) + "\n")
            s.write(
                json.dumps(
                    {
                        "id": row["id"],
                        "sample": 0,
                        "policy": policy.identity,
                        "rollout": records.fingerprint(row),
                        "logprobs": rng.normal(-8, 1, length).clip(max=0).tolist(),
                    }
                )
                + "\n"
            )
    return policy.identity["model"]


def run(model, folder, kernel, micro):
    """(seconds of the step, seconds of the process, its peak resident megabytes)."""
    out = folder / f"out-{kernel}"
    command = [
        sys.executable,
        "train.py",
        "--method",
        "opd",
        "--model",
        model,
        "--rollouts",
        folder / "rollouts.jsonl",
        "--scores",
        folder / "scores.jsonl",
        "--batch-size",
        "8",
        "--micro-batch-tokens",
        str(micro),
        "--learning-rate",
        "1e-6",
        "--kernel",
        kernel,
        "--out",
        out,
        "--overwrite",
    ]
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"train.py --kernel {kernel}: exit code {process.returncode}")
    return (
        json.loads((out / "trainer" / "state.json").read_text())["summary"]["seconds"],
        seconds,
        usage.ru_maxrss / 1024,
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="folder of a model")
    p.add_argument("--kernels", nargs="+", default=["naive", "torch"])
    p.add_argument("--turns", type=int, default=5)
    p.add_argument("--out", help="also append the lines here")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_records(args.model, folder, 8, 512)
        runs = {kernel: [] for kernel in args.kernels}
        for _ in range(args.turns):
            for kernel in args.kernels:
                runs[kernel].append(run(args.model, folder, kernel, 4 * 528))
        for kernel, values in runs.items():
            step, process, rss = (statistics.median(column) for column in zip(*values))
            row = {
                "bench": "train_step",
                "model": Path(args.model).name,
                "kernel": kernel,
                "loss_tokens": 4096,
                "micro_batch_loss_tokens": 2048,
                "step_seconds": step,
                "process_seconds": round(process, 2),
                "peak_mb": round(rss),
                "turns": args.turns,
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            }
            print(json.dumps(row))
            if args.out:
                with open(args.out, "a") as f:
                    f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
