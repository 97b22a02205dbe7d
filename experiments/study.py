"""What all studies share: settings, the run that issues commands, an arm's trial, the report.

A study computes nothing itself.  `run.stage("rollout.py", model=m, n=8, out=o)` writes the line
that a person could paste into OUT/commands.sh, `rollout.py --model m --n 8 --out o`, and then
calls that stage's `main` in this process, so that torch is imported once.  A study file holds

    Settings    its flags, a dataclass      build, prepare    the world; a seed's student
    ARMS        what differs, as data       Trial             one arm of one seed: its rounds
    CLAIMS      sentences and numbers       STUDY, main       all of these, given to `conduct`
"""

import contextlib
import ctypes
import dataclasses
import importlib
import importlib.util
import itertools
import json
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Callable

import torch
import transformers
from tqdm import tqdm

from experiments.claims import claims_table
from opd import cli, disk, files, records

# ---- settings


def setting(default, help, smoke=None, choices=None, free=False):
    """A field of a study's settings: its flag's default and help, its value under --smoke;
    free: runs in one folder may differ in it."""
    about = {"help": help, "smoke": smoke, "choices": choices, "free": free}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Settings of every study.  A subclass may give a field another default with
    `rounds: int = 40`; help and smoke value stay."""

    rounds: int = setting(20, "rounds an arm", smoke=1)
    prompts: int = setting(32, "problems a round", smoke=4)
    max_tokens: int = setting(64, "longest answer", smoke=8)
    eval_every: int = setting(5, "rounds between evaluations", smoke=1)

    def __post_init__(self):
        updates = getattr(self, "updates", 1)
        cli.check_at_least(1, prompts=self.prompts, updates=updates, eval_every=self.eval_every)
        if self.prompts % updates:
            raise records.BadInput(
                f"--updates {updates}: expected a divisor of --prompts {self.prompts}: "
                f"every update takes the same number of problems"
            )


@dataclasses.dataclass(frozen=True)
class Measured(Rounds):
    """And with how many samples an arm is measured, on which problems."""

    eval_n: int = setting(2, "samples a problem on the way", smoke=1)
    final_n: int = setting(8, "samples a problem at the end of an arm", smoke=1)
    eval_split: str = setting(
        "heldout", "dev is for choosing settings", choices=("heldout", "dev")
    )


@dataclasses.dataclass(frozen=True)
class Sampled:
    """And how a round's answers are made and used."""

    n: int = setting(8, "answers a problem", smoke=2)
    updates: int = setting(4, "optimiser steps a round", smoke=2)


@dataclasses.dataclass(frozen=True)
class Spoiled:
    """And how a seed's student is made."""

    spoil_steps: int = setting(100, "steps of 64 careless texts for a student", smoke=1)
    spoil_lr: float = setting(1e-3, "learning rate of those steps")


@dataclasses.dataclass(frozen=True)
class World(Spoiled):
    """And how the models of `build_sums` are made."""

    base_steps: int = setting(
        600, "pre-training steps of the base model the students come from", smoke=2
    )
    teacher_steps: int = setting(
        1300, "pre-training steps of the teacher, which goes on from the base", smoke=4
    )
    spoil_steps: int = setting(100, "steps of 64 careless texts for a student", smoke=2)


def about_setting(settings, name):
    """Metadata of a field, from the class that first described it."""
    for cls in settings.__mro__:
        field = cls.__dataclass_fields__.get(name)
        if field and field.metadata:
            return field.metadata


def add_settings(p, settings):
    """A flag for every field of a settings class."""
    for field in dataclasses.fields(settings):
        about = about_setting(settings, field.name)
        p.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            help=about["help"],
            choices=about["choices"],
        )


def shared_settings(settings):
    """{name: value} of what every run in a folder must have in common."""
    found = dataclasses.asdict(settings)
    for name in list(found):
        if about_setting(type(settings), name)["free"]:
            del found[name]
    return found


def settings_of(args, settings):
    """The settings that a parsed command line asks for; under --smoke, the tiny ones."""
    values = {}
    for field in dataclasses.fields(settings):
        smoke = about_setting(settings, field.name)["smoke"]
        tiny = args.smoke and smoke is not None
        values[field.name] = smoke if tiny else getattr(args, field.name)
    return settings(**values)


# ---- commands


def words_of(options):
    """Keyword arguments as the words of a command line; None and False say nothing.

    {"n": 8, "overwrite": True, "set": {"clip_low": 0.2}, "columns": ("a", "b")} ->
    --n 8 --overwrite --set clip_low=0.2 --columns a b"""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, dict):
            for key, each in value.items():
                words += [flag, f"{key}={each}"]
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


class Run:
    """Issues stage commands and keeps them, with what they print, in OUT/commands.sh and
    OUT/stages.log."""

    def __init__(self, out, settings, arms, results, command, smoke=False):
        """settings: unless free, what every run in this folder must share, or arms would be
        compared under different conditions.  arms: those to run.  command: what a result line
        says it is from.  smoke: for worlds with something to shrink that is not a setting."""
        self.out = Path(out)
        self.world = self.out / "world"
        self.settings = settings
        self.arms = arms
        self.results = results
        self.command = command
        self.smoke = smoke
        self.started = time.time()
        self.out.mkdir(parents=True, exist_ok=True)
        self.keep("experiment", shared_settings(settings))
        self.commands = open(self.out / "commands.sh", "a", encoding="utf-8")
        self.log = open(self.out / "stages.log", "a", encoding="utf-8")

    def keep(self, name, conditions):
        """Writes the dict OUT/NAME.json, or refuses a folder that was begun with another."""
        kept = self.out / f"{name}.json"
        if kept.exists():
            difference = files.first_difference(json.loads(kept.read_text()), conditions)
            if difference:
                raise records.BadInput(
                    f"{self.out}: was begun with {difference}: give another --out"
                )
        disk.write_atomically(kept, json.dumps(conditions, indent=1) + "\n")

    @contextlib.contextmanager
    def alone(self):
        """Holds a lock, for two runs would remove each other's half-done lines."""
        path = Path(f"{self.results}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = disk.open_locked(path)
        except BlockingIOError:
            raise records.BadInput(
                f"{self.results}: another process is running this study: wait for it, or give "
                f"another --out"
            ) from None
        with lock:
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def stage(self, command, **options):
        """Runs `stage.py` or `package.module`, with a verb if it has some, and flags; returns
        its summary dict.  slice="64:96" gives it those lines of `prompts` as a file."""
        if problems := options.pop("slice", None):
            options["prompts"] = self.part_of(options["prompts"], problems)
        name, *argv = [*shlex.split(command), *words_of(options)]
        python = [sys.executable] if name.endswith(".py") else [sys.executable, "-m"]
        self.commands.write(shlex.join([*python, name, *argv]) + "\n")
        self.commands.flush()
        module = name.removesuffix(".py")
        if importlib.util.find_spec(module).submodule_search_locations:
            module += ".__main__"
        with contextlib.redirect_stdout(self.log):
            summary = importlib.import_module(module).main(argv)
        give_memory_back()
        return summary

    def part_of(self, prompts, problems):
        """A file beside `prompts` of its lines A to B - 1, counted from 0, for `problems`
        "A:B"; returns its path."""
        first, end = (int(x) if x else 0 for x in problems.split(":"))
        out = Path(f"{prompts}.{first}-{end}")
        if self.out not in out.parents:  # a folder of somebody's
            out = self.out / out.name
        self.commands.write(f"sed -n {first + 1},{end}p {prompts} > {out}\n")
        with open(prompts, encoding="utf-8") as lines:
            disk.write_atomically(out, itertools.islice(lines, first, end))
        return out

    # `once` to `answers`: models, texts and outputs are named by their place in OUT

    def once(self, command, out, **options):
        """A stage, unless what it writes is there."""
        out = self.out / out
        if not out.exists():
            self.stage(command, **options, out=out)

    def pretrain(self, start, corpus, out, steps, rate=4e-3, seed=0, optimizer={}, **options):
        """Trains a model on `steps` batches of 64 texts, unless `out` is there."""
        if (self.out / out).exists():
            return
        say(f"pre-training the {out.rpartition('/')[2]}: {steps} steps of 64 texts")
        paths = dict(model=self.out / start, rollouts=self.out / f"{corpus}.jsonl")
        optimizer = dict(adam_beta2=0.95) | optimizer
        common = dict(batch_size=64, optimizer=optimizer, micro_batch_tokens=4096)
        how = common | dict(steps=steps, learning_rate=rate, seed=seed) | options
        self.stage("train.py", method="sft", **paths, **how, out=self.out / out)

    def spoil(self, seed, start="base", corpus="toy/mixed", name="student"):
        """A seed's student: a model of the world after a little careless text."""
        s = self.settings
        how = dict(rate=s.spoil_lr, seed=seed, fresh_optimizer=True)
        out = f"seed{seed}/{name}"
        self.pretrain(f"world/{start}", f"world/{corpus}", out, s.spoil_steps, **how)

    def answers(self, teacher, out, seed, **options):
        """A teacher's answers to the problems that are trained on; returns how many tokens."""
        common = dict(prompts=self.world / "toy/train.jsonl", seed=seed)
        common["max_tokens"] = self.settings.max_tokens
        paths = dict(model=self.out / teacher, out=self.out / out)
        done = self.stage("teacher.py answer", **common, **options, **paths)
        return done["generated_tokens"]

    def concatenate(self, parts, out):
        """One file of several, as `cat` does it; returns its path."""
        self.commands.write(f"cat {' '.join(map(str, parts))} > {out}\n")
        lines = (line for part in parts for line in open(part, encoding="utf-8"))
        disk.write_atomically(out, lines)
        return out

    def write(self, out, made_of, rows):
        """Records that no stage makes, unless they are there; commands.sh says what of.
        BadInput where others are there."""
        out = self.out / out
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if out.exists():
            if out.read_text(encoding="utf-8") != text:
                raise records.BadInput(
                    f"{out}: expected {made_of}, got other records, which other settings made: "
                    f"give another --out, or remove this file and those made of it"
                )
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        self.commands.write(f"# {out}: {made_of}\n")
        disk.write_atomically(out, [text])

    def record(self, row):
        """Adds a line to the results file, whole or not at all, with what it was made by and
        with."""
        made = {"settings": dataclasses.asdict(self.settings), "versions": versions()}
        append_result(self.results, row | made | {"command": self.command})


def give_memory_back():
    """Tells glibc to: its heap keeps what the models of a stage took, and a study of real
    models grows from round to round."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def append_result(path, row):
    """Adds a line to a results file, whole or not at all."""
    if problem := records.validate(row, "results"):
        raise ValueError(f"result: {problem}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as f:
        disk.append_whole(f, json.dumps(row).encode() + b"\n")
    disk.sync(path)


def versions():
    """What a run's numbers were made with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def say(text):
    tqdm.write(text)  # above a progress bar, if there is one
    sys.stdout.flush()


# ---- the world, and an arm in it

RAMP = dict(warmup_steps=20, schedule="linear")  # the learning rate of pre-training


def build_world(run, maker, models, **options):
    """Problems and corpora by `maker`, and models that learn the clean texts: (untrained model
    of the maker, name, steps)."""
    run.once(maker, "world/toy", **options)
    for untrained, name, steps in models:
        start, out = f"world/toy/{untrained}", f"world/{name}"
        run.pretrain(start, "world/toy/clean", out, steps, optimizer=RAMP, save_every=200)


def build_sums(run, problems, **options):
    """Running sums (so many to train on; `options` of worlds.sums), corpora and two checkpoints
    of one pre-training run: the base (the student's) and, later, the teacher."""
    s = run.settings
    sizes = dict(clean=64 * s.teacher_steps, mixed=256 * s.spoil_steps)
    run.once("worlds.sums", "world/toy", train_prompts=problems, **sizes, **options)
    how = dict(optimizer=RAMP | dict(total_steps=s.teacher_steps), save_every=200)
    more, texts = s.teacher_steps - s.base_steps, "world/toy/clean"
    run.pretrain("world/toy/student", texts, "world/base", s.base_steps, seed=0, **how)
    run.pretrain("world/base", texts, "world/teacher", more, seed=1, **how)


def teach_style(run, world, style, name):
    """A teacher that goes on from the world's, on --style-steps batches of clean work in one
    style."""
    sizes = dict(train_prompts=8, eval_prompts=8, mixed=8, clean=64 * run.settings.style_steps)
    run.once("worlds.sums", f"world/{world}", styles=style, **sizes)
    how = dict(rate=1e-3, fresh_optimizer=True, optimizer=RAMP)
    texts, steps = f"world/{world}/clean", run.settings.style_steps
    run.pretrain("world/teacher", texts, f"world/{name}", steps, **how)


def part(number, size):
    """The problems of a round, for `slice=` of Run.stage.   part(2, 32) -> 64:96"""
    return f"{number * size}:{(number + 1) * size}"


class Trial:
    """One arm of one seed: its folder, the model it has come to, and what that has cost.

    A study's subclass says what a round is (`round`) and, where they differ from the usual,
    where an arm begins (`setup`) and which columns a result line has (`columns`)."""

    keeps_rounds = True  # False: only the records of rounds that end in a result line
    weights = "round{}/model"  # where a round's model is

    def __init__(self, run, seed, arm, how):
        """how: the arm's entry in the study's table."""
        self.run = run
        self.settings = run.settings
        self.seed = seed
        self.arm = arm
        self.how = how
        self.folder = run.out / f"seed{seed}"
        self.data = run.world / "toy"  # train, dev and heldout.jsonl
        self.teacher = run.world / "teacher"
        self.start = self.teacher if arm == "teacher" else self.folder / "student"
        self.rounds = run.settings.rounds  # 0 for an arm that is only measured
        self.place = self.folder / arm
        self.cost = {"generated_tokens": 0, "teacher_tokens": 0, "trained_tokens": 0}
        self.signal = {}  # more columns: what the rounds since the last line showed
        self.number = 0  # of the round
        self.steps = 0  # optimiser steps so far
        self.metrics = []  # of the last call of train.py, a dict a step
        self.row = None
        self.began = time.time()
        self.setup()
        self.model = self.start
        self.clear()
        self.place.mkdir(parents=True, exist_ok=True)

    def setup(self):
        """Changes to the above."""

    def clear(self):
        """An interrupted arm is begun again."""
        shutil.rmtree(self.place, ignore_errors=True)

    def execute(self):
        """Every round, with a result line before the first and whenever one is due; returns the
        last line."""
        first = self.resume()
        if self.row is None:
            self.measure(self.step(0), final=not self.rounds)
        bar = dict(desc=f"seed {self.seed} {self.arm}", unit="round")
        for number in cli.progress(range(first, self.rounds), **bar):
            self.number = number
            self.round()
            done = number + 1
            if done == self.rounds or self.due(done):
                self.measure(self.step(done), done == self.rounds)
            elif not self.keeps_rounds:
                shutil.rmtree(self.at, ignore_errors=True)
        return self.row

    def resume(self):
        """How many rounds of an interrupted arm stand: none, unless a study keeps them."""
        return 0

    def round(self):
        """One round; a study's own."""
        raise NotImplementedError

    def due(self, done):
        """Whether an arm is measured after so many rounds (it is at the end)."""
        return done % self.settings.eval_every == 0

    def step(self, done):
        """The step that a result line names after so many rounds."""
        return done * self.settings.updates

    @property
    def at(self):
        """The folder of the round."""
        return self.place / f"round{self.number}"

    @property
    def prompts(self):
        """The problems that are trained on."""
        return self.data / "train.jsonl"

    @property
    def heldout(self):
        """The problems that arms are measured on."""
        return self.data / f"{self.settings.eval_split}.jsonl"

    def generation(self):
        """How answers are sampled, in rounds and in evaluations."""
        return {"max_tokens": self.settings.max_tokens}

    def sampling(self, number):
        """Which problems a round takes, how often, and with which random numbers."""
        s = self.settings
        return self.generation() | {
            "prompts": self.prompts,
            "slice": part(number, s.prompts),
            "n": getattr(s, "n", 1),
            "seed": self.seed * 1000 + number,
        }

    def rollout(self, at=None, **options):
        """Samples a round's answers from the model of the moment, into its folder or `at`;
        returns their file."""
        out = (at or self.at) / "rollouts.jsonl"
        options = self.sampling(self.number) | options
        done = self.run.stage("rollout.py", model=self.model, **options, out=out)
        self.cost["generated_tokens"] += done["generated_tokens"]
        return out

    def answer(self, name="rollouts", out=None, **options):
        """The teacher's answers to a round's problems, by default in the place of rollouts;
        returns their file."""
        out = out or self.at / f"{name}.jsonl"
        options = self.sampling(self.number) | options
        done = self.run.stage("teacher.py answer", model=self.teacher, **options, out=out)
        self.cost["teacher_tokens"] += done["generated_tokens"]
        return out

    def beside(self, rollouts, name, command, **options):
        """Runs a command that makes NAME.jsonl of rollouts, beside them; returns (that file,
        the command's summary)."""
        out = rollouts.with_name(f"{name}.jsonl")
        return out, self.run.stage(command, rollouts=rollouts, **options, out=out)

    def score(self, model, rollouts, name, **options):
        """Scores rollouts under a model."""
        return self.beside(rollouts, name, "teacher.py score", model=model, **options)

    def teach(self, rollouts, **options):
        """Scores rollouts under the teacher, which costs its tokens."""
        out, done = self.score(self.teacher, rollouts, "scores", **options)
        self.cost["teacher_tokens"] += done["teacher_tokens"]
        return out, done

    def grade(self, rollouts, name="rewards", **options):
        """Rewards for rollouts."""
        prompts = self.prompts
        return self.beside(rollouts, name, "rubric.py grade", prompts=prompts, **options)

    def control(self, verb, rewards, name="rewards", **options):
        """A control of experiments.controls on rewards, with the trial's seed; returns (file
        beside them, its summary)."""
        out = rewards.with_name(f"{name}.jsonl")
        command = f"experiments.controls {verb}"
        done = self.run.stage(command, rewards=rewards, seed=self.seed, **options, out=out)
        return out, done

    def grade_answers(self, rollouts, shuffled=False):
        """Rewards by the final answer; shuffled: dealt out at random in each group."""
        graded = self.grade(rollouts, "graded" if shuffled else "rewards", grader="answer")
        return self.control("shuffle-rewards", graded[0]) if shuffled else graded

    def train(self, method, rollouts, rate=None, out=None, **options):
        """One call of train.py; its model is the model of the moment from then on.  The
        optimiser begins anew when the arm begins.  rate: by default --learning-rate."""
        s, out = self.settings, out or self.place / self.weights.format(self.number)
        common = dict(learning_rate=rate or s.learning_rate, seed=self.seed)
        common["fresh_optimizer"] = self.model == self.start
        if "batch_size" not in options:
            common["batch_size"] = s.prompts // s.updates
        paths = dict(model=self.model, rollouts=rollouts, out=out)
        done = self.run.stage("train.py", method=method, **paths, **(common | options))
        self.cost["trained_tokens"] += done["trained_tokens"]
        self.steps += done["steps"]
        lines = (out / "metrics.jsonl").read_text().splitlines()
        self.metrics = [json.loads(line) for line in lines]
        old, self.model = self.model, out
        self.trained(old)
        return done

    def trained(self, old):
        """The model of the moment is a new one; what it has learnt from is removed."""
        if old != self.start:
            shutil.rmtree(old)

    def evaluate(self, prompts, n, **options):
        """eval.py on the model of the moment; returns its summary."""
        common = self.generation() | {"seed": self.seed}
        common |= dict(out=self.place / "eval.jsonl", overwrite=True)
        asked = dict(model=self.model, prompts=prompts, n=n)
        return self.run.stage("eval.py", **asked, **(common | options))

    def texts(self):
        """The answers of the last evaluation."""
        return [r["text"] for r in files.read(self.place / "eval.jsonl", "evals")]

    def gap_to_teacher(self):
        """KL to the teacher on the answers of the last evaluation."""
        rollouts = self.place / "eval.rollouts.jsonl"
        _, done = self.score(self.teacher, rollouts, "fresh", overwrite=True)
        return done["kl_mean"]

    def measure(self, step, final=False):
        """Evaluates the model of the moment and appends a result line.  Its seconds are those
        from the arm's begin to this call."""
        spent = round(time.time() - self.began, 2)
        row = {
            "arm": self.arm,
            "seed": self.seed,
            "step": step,
            "final": final,
            "seconds": spent,
        }
        self.row = row | self.signal | self.cost | self.examine(final)
        self.run.record(self.row)
        accuracy = f"accuracy {self.row['accuracy']:.1%}"
        say(f"  seed {self.seed} {self.arm}: step {step}, {accuracy}")

    @property
    def problems(self):
        """The problems that this arm is measured on."""
        return self.heldout

    def examine(self, final):
        """What a result line says of the model of the moment."""
        n = self.settings.eval_n
        if final:
            n = getattr(self.settings, "final_n", n)
        score = self.evaluate(self.problems, n)
        common = {
            "accuracy": score["accuracy"],
            "length_mean": score["length_mean"],
            "truncated": score["truncated_fraction"],
        }
        return common | self.columns(score, n, final)

    def columns(self, score, n, final):
        """What it says besides; a study may add to it."""
        if not final:
            return {"samples": n}
        greedy = self.evaluate(self.heldout, 1, temperature=0)["accuracy"]
        return {"samples": n, "greedy": greedy}


# ---- a study


@dataclasses.dataclass(frozen=True)
class Study:
    """What `conduct` needs to know of a study."""

    name: str
    about: str
    settings: type  # a dataclass of `setting`s
    arms: dict  # arm: what a trial of it needs to know
    claims: list
    columns: tuple  # of its table, besides accuracy
    build: Callable  # build(run): the world that all seeds share
    trial: Callable  # trial(run, seed, arm, how): a Trial
    prepare: Callable = Run.spoil  # prepare(run, seed): a seed's models
    parents: dict = dataclasses.field(default_factory=dict)  # arm: those it starts from
    default_arms: tuple = ()  # of a run without --arms or --claims; ()  all
    pictures: tuple = (("step", "accuracy.png"),)  # horizontal axis, file
    resampled: bool = False  # claims also by bootstrap
    more: Callable | None = None  # more(results file): further markdown of the report


def conduct(study, doc, argv=None):
    """The main of a study: every arm of every seed that its results file lacks, then the
    report; with --report, only that.  Returns the table's summary."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(study, doc, argv)
    if args.report:
        print(claims_text(study, args.report))
        return None
    arms = choose_arms(study, args.arms, everything=args.claims or args.smoke)
    out = args.out or f"runs/{study.name}" + "-smoke" * args.smoke
    if len(shlex.split(out)) != 1:
        raise records.BadInput(
            f"--out {out!r}: expected a path without spaces or quotes, for it stands in "
            f"command lines"
        )
    results = args.results or f"{out}/results.jsonl"
    command = f"python -m experiments.{study.name} {' '.join(argv)}".strip()
    settings = settings_of(args, study.settings)
    run = Run(out, settings, arms, results, command, args.smoke)
    say(f"{study.about}: arms {', '.join(arms)}; every command goes to {out}/commands.sh")
    with run.alone():
        done = finished(results, settings)
        study.build(run)
        for seed in range(args.seeds):
            study.prepare(run, seed)
            run_arms(study, run, seed, done)
    return report(study, run, claims=args.claims or not study.default_arms)


def parse(study, doc, argv):
    """The parsed command line of a study."""
    p = cli.parser(doc)
    p.add_argument("--out", help=f"folder for everything (default: runs/{study.name}[-smoke])")
    p.add_argument(
        "--results",
        help="result lines to append to (default: OUT/results.jsonl); arms and seeds in it "
        "are not run again",
    )
    p.add_argument(
        "--report", metavar="FILE", help="print the claims of a results file and run nothing"
    )
    default = "the default ones" if study.default_arms else "all"
    p.add_argument("--arms", help=f"comma-separated arms instead of {default}")
    p.add_argument("--seeds", type=int, default=1, help="seeds 0..N-1")
    p.add_argument(
        "--smoke",
        action="store_true",
        help="a tiny run of every arm: proves that the commands work, nothing else",
    )
    p.set_defaults(claims=False)
    if study.default_arms:
        p.add_argument("--claims", action="store_true", help="run every arm")
    add_settings(p, study.settings)
    return p.parse_args(argv)


def choose_arms(study, named, everything=True):
    """The arms to run, in the study's order: those named, or the default ones, or all; those
    whose result they start from, and theirs; and `before`, which tables compare with."""
    chosen = set(study.arms if everything else study.default_arms or study.arms)
    if named:
        chosen = {"before", *named.split(",")}
    if unknown := chosen - set(study.arms):
        raise records.BadInput(
            f"--arms: expected some of {', '.join(study.arms)}, got "
            f"{', '.join(sorted(unknown))}"
        )
    waiting = list(chosen)
    while waiting:
        parents = set(study.parents.get(waiting.pop(), ())) - chosen
        chosen |= parents
        waiting += parents
    return [arm for arm in study.arms if arm in chosen]


def result_lines(path):
    """The lines of a results file, without one that a kill has torn; [] if there are none."""
    path = Path(path)
    if path.exists():
        disk.cut_torn_line(path)
    if not path.exists() or not path.stat().st_size:
        return []
    return list(files.read(path, "results"))


def finished(path, settings):
    """(arm, seed) pairs that have their final line in a results file.  Half-done lines of a
    killed run are removed; lines made under other settings are refused, for they would be
    compared with these."""
    rows = result_lines(path)
    if not rows:
        return set()
    shared = shared_settings(settings)
    free = dataclasses.asdict(settings).keys() - shared.keys()
    for row in rows:
        made = {k: v for k, v in row.get("settings", {}).items() if k not in free}
        if difference := files.first_difference(made, shared):
            raise records.BadInput(
                f"{path}: arm {row['arm']!r} was made with {difference}: give another --results"
            )
    done = {(r["arm"], r["seed"]) for r in rows if r.get("final")}
    kept = (json.dumps(r) + "\n" for r in rows if (r["arm"], r["seed"]) in done)
    disk.write_atomically(path, kept)
    return done


def run_arms(study, run, seed, done):
    """Every arm of a seed that is not in `done`, with a line on the screen."""
    for arm in run.arms:
        if (arm, seed) in done:
            say(f"seed {seed} {arm}: done before")
            continue
        row = study.trial(run, seed, arm, study.arms[arm]).execute()
        split = getattr(run.settings, "eval_split", "heldout")
        shown = [f"{split} accuracy {row['accuracy']:.1%}"]
        shown += [f"{name} {row[name]:.3g}" for name in study.columns[:3] if row.get(name)]
        spent = time.time() - run.started
        say(f"seed {seed} {arm}: {', '.join(shown)} ({spent:.0f} s so far)")


def report(study, run, claims=True):
    """Table, pictures and claims of what is in the results file, into OUT and onto the
    screen."""
    table = run.stage(
        f"experiments.report table {run.results}",
        partial=True,
        columns=study.columns,
        overwrite=True,
        out=run.out / "table.md",
    )
    for x, name in study.pictures:
        picture = run.out / name
        run.stage(f"experiments.report plot {run.results}", x=x, overwrite=True, out=picture)
    text = (run.out / "table.md").read_text()
    if claims:
        text += "\n" + claims_text(study, run.results)
    disk.write_atomically(run.out / "report.md", text)
    say("\n" + text)
    say(f"report.md, pictures, commands.sh and every record: {run.out}/")
    return table


def claims_text(study, path):
    """The claims of a results file, and what else the study reports."""
    text = claims_table(path, study.claims, study.resampled)
    return text + ("\n" + study.more(path) if study.more else "")
