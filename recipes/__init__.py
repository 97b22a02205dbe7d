"""Recipes: one file per system, each a list of stage commands with arms, controls and seeds.  `python -m recipes.NAME`.

A recipe computes nothing itself.  `Run.stage("rollout.py --model M ...")` writes the line a person could paste into
OUT/commands.sh, then calls that stage's `main` in this process, so that torch and transformers are imported once."""
import contextlib
import importlib
import json
import platform
import shlex
import sys
from pathlib import Path

import records

STAGES = ("toy.py", "rollout.py", "teacher.py", "rubric.py", "train.py", "eval.py")


class Run:
    """Issues stage commands and keeps them, with what they print, in OUT/commands.sh and OUT/stages.log."""

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
        """Runs `stage.py --flags` and returns the stage's summary dict."""
        name, *argv = shlex.split(line)
        if name not in STAGES:
            raise ValueError(f"recipe: expected a command of {', '.join(STAGES)}, came {name!r}")
        self.commands.write(f"{shlex.quote(sys.executable)} {line}\n")
        self.commands.flush()
        with contextlib.redirect_stdout(self.log):
            return importlib.import_module(name.removesuffix(".py")).main(argv)


def append_result(path, row):
    """Adds one line to a results file, validated, whole or not at all."""
    problem = records.validate(row, "results")
    if problem:
        raise ValueError(f"result: {problem}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as f:
        records.append_whole(f, json.dumps(row).encode() + b"\n")


def finished(path, settings):
    """(arm, seed) pairs that have their final line in a results file.  Half-done lines of a killed run are removed; lines made
    under other settings are refused, for they would be compared with these."""
    if not Path(path).exists() or not Path(path).stat().st_size:
        return set()
    records.cut_torn_line(path)
    if not Path(path).stat().st_size:
        return set()
    rows = list(records.read(path, "results"))
    for row in rows:
        if difference := records.first_difference(row.get("settings"), settings):
            raise records.BadInput(f"{path}: arm {row['arm']!r} was made with {difference}: give another --results")
    done = {(r["arm"], r["seed"]) for r in rows if r.get("final")}
    records.write_atomically(path, (json.dumps(r) + "\n" for r in rows if (r["arm"], r["seed"]) in done))
    return done


def versions():
    """What a run's numbers were made with."""
    import torch
    import transformers
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
