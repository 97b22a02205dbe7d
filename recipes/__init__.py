"""Recipes: one file per system, each a list of stage commands with arms, controls and seeds.  `python -m recipes.NAME`.

A recipe computes nothing itself.  `Run.stage("rollout.py --model M ...")` writes the line a person could paste into
OUT/commands.sh, then calls that stage's `main` in this process, so that torch and transformers are imported once."""
import contextlib
import importlib
import json
import platform
import shlex
import time
from pathlib import Path

import records

STAGES = ("toy.py", "rollout.py", "teacher.py", "rubric.py", "train.py", "eval.py")


class Run:
    """Issues stage commands, keeps their output in OUT/stages.log, and adds up what they cost."""

    def __init__(self, out, settings):
        """settings: what every run in this folder must share, or arms would be compared under different conditions."""
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        kept = self.out / "recipe.json"
        if kept.exists() and (difference := records.first_difference(json.loads(kept.read_text()), settings)):
            raise records.BadInput(f"{self.out}: was begun with {difference}: give another --out")
        records.write_atomically(kept, json.dumps(settings, indent=1) + "\n")
        self.commands = open(self.out / "commands.sh", "a", encoding="utf-8")
        self.log = open(self.out / "stages.log", "a", encoding="utf-8")

    def stage(self, line):
        """Runs `stage.py --flags` and returns the stage's summary dict plus its wall time in `seconds`."""
        name, *argv = shlex.split(line)
        if name not in STAGES:
            raise ValueError(f"recipe: expected a command of {', '.join(STAGES)}, came {name!r}")
        self.commands.write(f"python {line}\n")
        self.commands.flush()
        started = time.time()
        with contextlib.redirect_stdout(self.log):
            summary = importlib.import_module(name.removesuffix(".py")).main(argv)
        return dict(summary) | {"seconds": time.time() - started}


def append_result(path, row):
    """Adds one line to a results file, validated, whole or not at all."""
    problem = records.validate(row, "results")
    if problem:
        raise ValueError(f"result: {problem}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as f:
        f.write(json.dumps(row).encode() + b"\n")


def versions():
    """What a run's numbers were made with."""
    import torch
    import transformers
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
