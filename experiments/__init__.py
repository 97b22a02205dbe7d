"""Recipes: one file per system, each a list of stage commands with arms, controls and seeds.
`python -m experiments.NAME`.

Being replaced by experiments/study.py (settings, run, trial, conduct) and experiments/claims.py;
what is below goes when the last study uses them.

A experiment computes nothing itself.  `Run.stage("rollout.py --model M ...")` writes the line a
person could paste into OUT/commands.sh, then calls that stage's `main` in this process, so that
torch and transformers are imported once."""

import contextlib
import importlib
import importlib.util
import json
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import transformers
from tqdm import tqdm

from opd import files, records
from opd.stats import interval


class Run:
    """Issues stage commands and keeps them, with what they print, in OUT/commands.sh and
    OUT/stages.log."""

    def __init__(self, out, settings):
        """settings: what every run in this folder must share, or arms would be compared under
        different conditions."""
        self.out, self.settings, self.started = Path(out), settings, time.time()
        self.out.mkdir(parents=True, exist_ok=True)
        kept = self.out / "experiment.json"
        if kept.exists() and (
            difference := files.first_difference(json.loads(kept.read_text()), settings)
        ):
            raise records.BadInput(
                f"{self.out}: was begun with {difference}: give another --out"
            )
        files.write_atomically(kept, json.dumps(settings, indent=1) + "\n")
        self.commands = open(self.out / "commands.sh", "a", encoding="utf-8")
        self.log = open(self.out / "stages.log", "a", encoding="utf-8")

    def stage(self, line):
        """Runs `stage.py --flags` or `package.module --flags`; returns its summary dict."""
        name, *argv = shlex.split(line)
        python = shlex.quote(sys.executable) + ("" if name.endswith(".py") else " -m")
        self.commands.write(f"{python} {line}\n")
        self.commands.flush()
        module = name.removesuffix(".py")
        if importlib.util.find_spec(module).submodule_search_locations:
            module += ".__main__"
        with contextlib.redirect_stdout(self.log):
            return importlib.import_module(module).main(argv)

    def result(self, args, row):
        """Adds a line to the results file, with what it was made by and with."""
        append_result(
            args.results,
            row
            | {"settings": self.settings, "versions": versions(), "command": args.invocation},
        )

    def concatenate(self, parts, out):
        """One file of several, as `cat` does it; returns its path."""
        self.commands.write(f"cat {' '.join(map(str, parts))} > {out}\n")
        files.write_atomically(
            out, (line for part in parts for line in open(part, encoding="utf-8"))
        )
        return out


def imitate(run, model, corpus, steps, rate, seed, out, more=""):
    """A model of the world: `steps` of 64 texts of a corpus, from `model`, unless `out` is
    there already."""
    if not out.exists():
        run.stage(
            f"train.py --method sft --model {model} --rollouts {corpus} --out {out} "
            f"--batch-size 64 --steps {steps} --learning-rate {rate} --adam-beta2 "
            f"0.95 --seed {seed} "
            f"--micro-batch-tokens 4096 {more}"
        )


def train_round(run, args, method, model, start, at, seed, rate, flags="", first=False):
    """The end of a round: train.py on AT/rollouts.jsonl, into AT/model; the weights that it
    went on from are removed, but for `start`, the arm's.  first: the optimiser begins anew.
    Returns (the new model, the stage's summary)."""
    done = run.stage(
        f"train.py --method {method} --model {model} --rollouts {at}/rollouts.jsonl {flags} "
        f"--out {at}/model --batch-size {args.prompts // args.updates} "
        f"--learning-rate {rate} "
        f"--seed {seed}" + " --fresh-optimizer" * first
    )
    if model != start:
        shutil.rmtree(model)
    return at / "model", done


def append_result(path, row):
    """Adds one line to a results file, validated, whole or not at all."""
    problem = records.validate(row, "results")
    if problem:
        raise ValueError(f"result: {problem}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as f:
        files.append_whole(f, json.dumps(row).encode() + b"\n")


def finished(path, settings):
    """(arm, seed) pairs that have their final line in a results file.  Half-done lines of a
    killed run are removed; lines made under other settings are refused, for they would be
    compared with these."""
    if not Path(path).exists() or not Path(path).stat().st_size:
        return set()
    files.cut_torn_line(path)
    if not Path(path).stat().st_size:
        return set()
    rows = list(files.read(path, "results"))
    for row in rows:
        if difference := files.first_difference(row.get("settings"), settings):
            raise records.BadInput(
                f"{path}: arm {row['arm']!r} was made with {difference}: give another --results"
            )
    done = {(r["arm"], r["seed"]) for r in rows if r.get("final")}
    files.write_atomically(
        path, (json.dumps(r) + "\n" for r in rows if (r["arm"], r["seed"]) in done)
    )
    return done


def run_arms(run, args, arms, prepare, run_arm, tell):
    """Every arm of every seed whose end the results file lacks.  prepare(seed) -> the seed's
    folder; run_arm(folder, seed, arm) -> its last result line; tell(line) -> what a reader at
    the screen wants of it."""
    done = finished(args.results, run.settings)
    for seed in range(args.seeds):
        folder = prepare(seed)
        for arm in arms:
            if (arm, seed) in done:
                say(f"seed {seed} {arm}: done before")
                continue
            line = run_arm(folder, seed, arm)
            say(f"seed {seed} {arm}: {tell(line)} ({time.time() - run.started:.0f} s so far)")


class Claim(NamedTuple):
    """A sentence and the number, one a seed, that it stands or falls with.

    value(arms) -> float, arms = {arm: its result lines, in order of steps}; the sentence holds
    when the 95 % interval of the mean over seeds lies above `bound` (test "above"), below it
    ("below"), or between -bound and +bound ("within")."""

    text: str
    formula: str
    value: Callable
    test: str = "above"
    bound: float = 0.0


def last(metric, arm, other=None):
    """value of a Claim: an arm's last `metric`, or what it is more than another arm's."""
    return lambda arms: arms[arm][-1][metric] - (arms[other][-1][metric] if other else 0)


def gap(arm, other, metric="accuracy"):
    """value of a Claim: what an arm's last accuracy, or another metric, is more than another
    arm's."""
    return last(metric, arm, other)


def verdict(low, high, test, bound):
    """holds | does not hold | not resolvable here, from an interval.   verdict(0.01, 0.2,
    "above", 0) -> holds"""
    if test == "within":
        inside, outside = -bound < low and high < bound, low > bound or high < -bound
    else:
        inside, outside = (
            (low > bound, high < bound) if test == "above" else (high < bound, low > bound)
        )
    return "holds" if inside else "does not hold" if outside else "not resolvable here"


def resample(values, draws=10000):
    """Percentile interval of a mean: (2.5 %, 97.5 %) of the means of `draws` resamples of the
    seeds' values, a fixed generator."""

    means = np.random.default_rng(0).choice(np.asarray(values), (draws, len(values))).mean(1)
    return tuple(float(x) for x in np.quantile(means, (0.025, 0.975)))


def claims_table(path, claims, resampled=False):
    """Markdown: every claim with its number, its interval over seeds and its verdict, which is
    the t-interval's.  resampled: also the bootstrap interval over seeds, narrower with few of
    them, for papers that decide by it."""

    seeds = {}
    for row in files.read(path, "results"):
        seeds.setdefault(row["seed"], {}).setdefault(row["arm"], []).append(row)
    for seed, arms in seeds.items():  # only what was run to its end
        seeds[seed] = {
            arm: sorted(rows, key=lambda r: r["step"])
            for arm, rows in arms.items()
            if any(r.get("final") for r in rows)
        }
    extra = "bootstrap | " if resampled else ""
    lines = [
        f"| claim | measured, mean over seeds ± half of the 95 % t-interval | {extra}bound | "
        f"each seed | verdict |",
        "| --- |" + " --- |" * (5 if resampled else 4),
    ]
    for claim in claims:
        try:
            values = [claim.value(arms) for _, arms in sorted(seeds.items())]
        except KeyError as missing:  # an arm that was not run to its end in every seed
            lines.append(
                f"| {claim.text} | {claim.formula} | {'| ' * resampled}| | not measured: "
                f"{missing.args[0]} |"
            )
            continue
        mean, half = interval(values)
        decision = (
            "one seed decides nothing"
            if half is None
            else verdict(mean - half, mean + half, claim.test, claim.bound)
        )
        drawn = "{:.3f} to {:.3f} | ".format(*resample(values)) if resampled else ""
        sign = {"above": ">", "below": "<", "within": "within ±"}[claim.test]
        lines.append(
            f"| {claim.text} | {claim.formula} = {mean:.3f}"
            + ("" if half is None else f" ± {half:.3f}")
            + f" | {drawn}{sign} {claim.bound:g} | "
            + " ".join(f"{v:.3f}" for v in values)
            + f" | **{decision}** |"
        )
    return "\n".join(lines) + "\n"


def say(text):
    tqdm.write(text)  # above a progress bar, if there is one
    sys.stdout.flush()


def add_run_flags(p, name, default="all"):
    """Flags that every experiment has; `default`: the arms it runs when none are named, for
    --help."""
    p.add_argument(
        "--out",
        help=f"folder for everything (default: runs/{name}, with --smoke runs/{name}-smoke)",
    )
    p.add_argument(
        "--results",
        help="result lines to append to (default: OUT/results.jsonl); arms and seeds in it "
        "are not run again",
    )
    p.add_argument(
        "--report", metavar="FILE", help="print the claims of a results file and run nothing"
    )
    p.add_argument("--arms", help=f"comma-separated arms instead of {default}")
    p.add_argument("--seeds", type=int, default=1, help="seeds 0..N-1")
    p.add_argument(
        "--smoke",
        action="store_true",
        help="a tiny run of every arm: proves that the commands work, nothing else",
    )


def add_eval_flags(p, every, n, final_n):
    """When and with how many samples an arm is measured."""
    p.add_argument("--eval-every", type=int, default=every, help="rounds between evaluations")
    p.add_argument("--eval-n", type=int, default=n, help="samples a problem on the way")
    p.add_argument(
        "--final-n", type=int, default=final_n, help="samples a problem at the end of an arm"
    )
    p.add_argument(
        "--eval-split",
        default="heldout",
        choices=("heldout", "dev"),
        help="dev is for choosing settings",
    )


def parse(p, argv, claims, smoke, resampled=False, more=None):
    """Arguments of a experiment, with the values of `smoke` under --smoke; None after --report,
    which prints the claims of a results file (and more(file))."""
    argv = sys.argv[1:] if argv is None else argv
    args = p.parse_args(argv)
    args.argv = argv
    if args.report:
        print(
            claims_table(args.report, claims, resampled)
            + ("\n" + more(args.report) if more else "")
        )
        return None
    if args.smoke:
        vars(args).update(smoke)
    return args


def begin(args, about, arms, shared):
    """The Run of a experiment, its settings those arguments that all arms share, and a line of
    what is to come."""
    run = Run(args.out, {name: getattr(args, name) for name in shared})
    named = f"arms {', '.join(arms)}" if len(arms) <= 16 else f"{len(arms)} arms"
    say(
        f"{about}; {named}; {args.seeds} seed{'s' * (args.seeds > 1)}; every command goes to "
        f"{args.out}/commands.sh"
    )
    return run


def settle(args, name, arms, parents=None, default=None):
    """Defaults that depend on other flags; returns the arms to run, in the experiment's order:
    those asked for (or `default`, or all), those whose result they start from (`parents`: {arm:
    other ones}, and theirs), and `before`, which tables compare with."""
    chosen = {"before", *args.arms.split(",")} if args.arms else set(default or arms)
    if unknown := chosen - set(arms):
        raise records.BadInput(
            f"--arms: expected some of {', '.join(arms)}, got {', '.join(sorted(unknown))}"
        )
    while (
        more := {parent for arm in chosen for parent in (parents or {}).get(arm, ())} - chosen
    ):
        chosen |= more
    args.out = args.out or f"runs/{name}" + "-smoke" * args.smoke
    if len(shlex.split(args.out)) != 1:
        raise records.BadInput(
            f"--out {args.out!r}: expected a path without spaces or quotes, for it stands in "
            f"command lines"
        )
    args.results = args.results or f"{args.out}/results.jsonl"
    args.invocation = f"python -m experiments.{name} {' '.join(args.argv)}".strip()
    if args.prompts % args.updates:
        raise records.BadInput(
            f"--updates {args.updates}: expected a divisor of --prompts {args.prompts}: "
            f"every update takes the same number of problems"
        )
    return [arm for arm in arms if arm in chosen]


def report(
    run, args, claims, columns, pictures=(("step", "accuracy.png"),), resampled=False, more=None
):
    """Table, pictures (what is on the horizontal axis, file name) and claims of what is in the
    results file, into OUT and onto the screen."""
    table = run.stage(
        f"experiments.report table {args.results} --partial --out {args.out}/table.md "
        f"--overwrite "
        f"--columns {' '.join(columns)}"
    )
    for x, name in pictures:
        run.stage(
            f"experiments.report plot {args.results} --x {x} --out {args.out}/{name} "
            f"--overwrite"
        )
    text = (
        (run.out / "table.md").read_text()
        + "\n"
        + claims_table(args.results, claims, resampled)
        + ("\n" + more(args.results) if more else "")
    )
    files.write_atomically(run.out / "report.md", text)
    say("\n" + text)
    return table


def add_world_flags(p, teacher_steps):
    p.add_argument(
        "--base-steps",
        type=int,
        default=600,
        help="pre-training steps of the base model the students come from",
    )
    p.add_argument(
        "--teacher-steps",
        type=int,
        default=teacher_steps,
        help="pre-training steps of the teacher, which goes on from the base",
    )
    p.add_argument(
        "--spoil-steps",
        type=int,
        default=100,
        help="steps of 64 careless texts for the student",
    )
    p.add_argument("--spoil-lr", type=float, default=1e-3, help="learning rate of those steps")


def build_world(run, args, problems, more="", corpus="clean"):
    """Problems (so many to train on; `more` flags for worlds.sums), corpora and two checkpoints
    of one pre-training run: the base (the student's) and, later, the teacher."""
    world = run.out / "world"
    if not (world / "toy").exists():
        run.stage(
            f"worlds.sums --out {world}/toy --train-prompts {problems} --clean "
            f"{64 * args.teacher_steps} --mixed {64 * args.spoil_steps * 4} {more}"
        )
    common = (
        f"--method sft --rollouts {world}/toy/{corpus}.jsonl --batch-size 64 --learning-rate "
        f"4e-3 --warmup-steps 20 --schedule linear "
        f"--total-steps {args.teacher_steps} --adam-beta2 0.95 --micro-batch-tokens 4096 "
        f"--save-every 200"
    )
    for name, start, steps, seed in (
        ("base", "toy/student", args.base_steps, 0),
        ("teacher", "base", args.teacher_steps - args.base_steps, 1),
    ):
        if not (world / name).exists():
            say(f"pre-training the {name}: {steps} steps of 64 clean texts")
            run.stage(
                f"train.py --model {world}/{start} --steps {steps} --seed {seed} --out "
                f"{world}/{name} {common}"
            )
    return world


def spoil_student(run, args, world, seed):
    """This seed's folder with its student: the base, spoiled by careless text."""
    folder = run.out / f"seed{seed}"
    imitate(
        run,
        world / "base",
        world / "toy" / "mixed.jsonl",
        args.spoil_steps,
        args.spoil_lr,
        seed,
        folder / "student",
        "--fresh-optimizer",
    )
    return folder


def versions():
    """What a run's numbers were made with."""

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
