"""What a million records cost: processor time and memory of each command that walks them.

    python -m bench.records --records 1000000

Each command runs as a program of its own; `mb` is how far its peak resident memory lies above
that of the same command on a thousand records, `us` its microseconds a record.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from opd import cli, records

SAMPLES = 8  # of a prompt

MEASURED = """
import resource, sys, time
begun = time.process_time()
{work}
seconds = time.process_time() - begun
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""
COMMANDS = {
    "read": "from opd import files; sum(1 for _ in files.read('rollouts', 'rollouts'))",
    "table": "from opd import files; files.Table('rollouts', 'rollouts')",
    "grade": "import rubric; rubric.main('grade --grader answer --prompts prompts --rollouts "
    "rollouts --out rewards.out'.split())",
    "eval": "import eval as e; e.main('--prompts prompts --rollouts rollouts --out "
    "evals'.split())",
    "trainer": "import types, numpy as np, opd.batches as b; from methods.rows import METHODS; "
    "b.check_text = lambda *_: None; id = dict.fromkeys(('weights', 'template', 'vocabulary', "
    "'renders', 'model'), 'm'); p = types.SimpleNamespace(identity=id, vocabulary=99, "
    "positions=999, tokenizer=None, check_length=lambda *_: None); "
    "b.Data(b.Inputs('rollouts', rewards='rewards'), METHODS['ropd'], p)",
}


def write(folder, count):
    """Prompts, rollouts of 16 tokens, and their rewards."""
    policy = dict.fromkeys(("model", "weights", "template", "vocabulary", "renders"), "m")
    opened = {name: open(folder / name, "w") for name in ("prompts", "rollouts", "rewards")}
    for i in range(count):
        name = f"t{i // SAMPLES:07d}"
        rollout = {"id": name, "sample": i % SAMPLES, "policy": policy}
        rollout |= {"text": f"3+4=7\n#{i % SAMPLES}", "finish_reason": "stop"}
        rollout |= {"temperature": 1.0, "top_p": 1.0, "prompt_ids": [2, 11, 16, 10, 15, 8, 3]}
        rollout |= {"response_ids": list(range(5, 21)), "loss_mask": [1] * 16}
        rollout["logprobs"] = [-0.144440651 * t for t in range(16)]
        reward = {"id": name, "sample": i % SAMPLES, "reward": i % 2, "status": "ok"}
        reward |= {"rollout": records.fingerprint(rollout), "grader": "check"}
        rows = {"rollouts": rollout, "rewards": reward}
        if i % SAMPLES == 0:
            rows["prompts"] = {"id": name, "prompt": "3+4=?", "answer": "7"}
        for kind, row in rows.items():
            opened[kind].write(json.dumps(row) + "\n")
    for file in opened.values():
        file.close()


def measure(folder, work):
    """(seconds, peak resident memory in MB) of Python code in a folder."""
    code = MEASURED.format(work=work)
    root = Path(__file__).parents[1]
    how = dict(cwd=folder, env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"})
    done = subprocess.run([sys.executable, "-c", code], **how, capture_output=True, text=True)
    seconds, memory = done.stderr.splitlines()[-1].split()
    return float(seconds), float(memory) / 1024


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--records", type=int, default=1_000_000)
    p.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=COMMANDS)
    args = p.parse_args(argv)
    found = {name: [] for name in args.commands}
    for count in (1000, args.records):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), count)
            for name in args.commands:
                found[name].append(measure(folder, COMMANDS[name]))
    for name, ((short, low), (long, high)) in found.items():
        us = (long - short) / (args.records - 1000) * 1e6
        line = {"command": name, "records": args.records, "us": round(us, 1)}
        print(json.dumps(line | {"mb": round(high - low)}), flush=True)


if __name__ == "__main__":
    main()
