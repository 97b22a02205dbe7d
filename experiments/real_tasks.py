"""Problems with exact answers for real models, and a pilot: who can do which?

    python -m experiments.real_tasks make --task chain_sum --out runs/sum
    python -m experiments.real_tasks make --from gsm8k.jsonl --out runs/gsm8k
    python -m experiments.real_tasks grade --prompts runs/sum/train.jsonl --rollouts R \\
        --out rewards.jsonl
    python -m experiments.real_tasks pilot --models student=FOLDER teacher=FOLDER \\
        --work runs/pilot --out results/real_pilot.jsonl
    python -m experiments.real_tasks table results/real_pilot.jsonl

`make` writes train, dev and heldout.jsonl, in which no question stands twice: of reasoning-gym
(`pip install reasoning-gym`), or of a file of {"question", "answer": "... #### 42"}.  `grade`
asks the scorer of reasoning-gym whether the final answer of a rollout is right (opd/answers.py
finds it), of other problems `answer` is compared; its reward is 1 or 0.  `pilot` appends a line
a task and model; --base-url and the other flags of rollout.py pass through.  `table` puts first
what a student can learn from a teacher: see FITS.

Simplifications: 1. two questions are one only if their words are; 2. only tasks of TASKS are
scored: some other scorers of reasoning-gym run an answer as Python.
"""

import opd.quiet  # noqa: F401

# isort: split

import dataclasses
import hashlib
import importlib.metadata
import json
import random
import re
import sys
import time
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from eval import accuracy
from experiments.claims import markdown
from experiments.study import append_result, result_lines, say, versions, words_of
from opd import cli, disk, files, records, rewards, served
from opd.answers import (
    equal,
    final_answer,
    is_correct,
    last_marked,
    read_answerable,
    rewritten,
)
from opd.records import BadInput
from opd.sampling import (
    EVAL_STREAM,
    add_sampling_flags,
    fill_with,
    jobs_by_key,
    sampler_from_flags,
)
from rollout import summarise
from rubric import read_groups
from worlds import sums
from worlds.build import new_folder, user, write_rows

INSTRUCTION = (
    "Think in at most two short sentences, then put the final answer within \\boxed{}."
)
# NAME or NAME-VARIANT of a reasoning-gym dataset: its settings, for a model of 0.5 B
TASKS = {
    "chain_sum": {"max_terms": 3, "min_digits": 2, "max_digits": 2},
    "chain_sum-1": {"max_terms": 3, "min_digits": 1, "max_digits": 1},
    "chain_sum-5": {"min_terms": 4, "max_terms": 5, "min_digits": 2, "max_digits": 2},
    "basic_arithmetic": {"max_terms": 3, "max_digits": 2, "allow_negation": False},
    "products": {"min_digits": 2, "max_digits": 2},
    "gcd": {"max_value": 100},
    "lcm": {"max_value": 50},
    "simple_equations": {"max_terms": 2, "max_value": 20},
    "decimal_chain_sum": {"max_terms": 2, "max_digits": 2, "max_decimal_places": 2},
    "fraction_simplification": {
        "max_value": 50,
        "min_factor": 2,
        "max_factor": 10,
        "styles": ["plain"],
    },
    "base_conversion": {"max_base": 10, "max_value": 100},
    "leg_counting": {"min_animals": 2, "max_animals": 3, "max_instances": 5},
    "letter_counting": {"min_words": 3, "max_words": 5},
    "spell_backward": {"max_word_len": 6},
    "word_sorting": {"max_words": 4},
    "word_sequence_reversal": {"max_words": 5},
    "calendar_arithmetic": {"tasks": ["weekday_offset"]},
    "time_intervals": {"task_types": ["time"]},
    "simple_geometry": {"max_sides": 4},
    "family_relationships": {"min_family_size": 3, "max_family_size": 4},
    "needle_haystack": {"min_num_statements": 5, "max_num_statements": 10},
    "gsm_symbolic": {},
}
# graded by `answer`: its own scorer takes the first number of an answer, without its sign
BY_ANSWER = {"gsm_symbolic"}
NUMBER = re.compile(r"(?<!\d)-?\d+(?:,\d{3})*(?:\.\d+)?")
# of an entry's metadata: tuples, and the day on which it was made
LEFT_OUT = {"difficulty", "start_time", "end_time"}
STRIDE = 10**6  # entry i of seed s is that of seed s + i: seeds must lie apart
REPEATS = 2000  # so many known questions one after another: there are no more
FITS = {"student": (0.1, 0.4), "teacher": 0.6, "tokens": 80}

# ---- problems


def gym():
    """The optional package."""
    try:
        import reasoning_gym
    except ImportError:
        raise BadInput(
            "expected the package reasoning-gym, got none: pip install reasoning-gym"
        ) from None
    return reasoning_gym


def normalised(question):
    """What two questions are compared by."""
    return " ".join(question.split()).casefold()


def problem(name, question, answer, **more):
    """A record of prompts, whose id depends on the question alone."""
    digest = hashlib.sha256(normalised(question).encode()).hexdigest()[:12]
    shown = user(f"{question.strip()}\n\n{INSTRUCTION}")
    return {"id": f"{name}-{digest}", "messages": shown, "answer": answer} | more


def gym_problems(task, seed):
    """Problems of a reasoning-gym task, with what its scorer needs, without end."""
    name = task.partition("-")[0]
    scored = {"name": name, "config": TASKS[task]}
    data = gym().create_dataset(name, seed=seed * STRIDE, size=STRIDE, **TASKS[task])
    for i in range(STRIDE):
        entry = data[i]
        kept = {k: v for k, v in entry["metadata"].items() if k not in LEFT_OUT}
        if json.loads(json.dumps(kept, default=str)) != kept and name not in BY_ANSWER:
            raise BadInput(f"{task}: metadata: expected JSON, got {records.show(kept)}")
        more = {"task": scored | {"question": entry["question"], "metadata": kept}}
        more = {} if name in BY_ANSWER else more
        yield problem(task, entry["question"], entry["answer"], **more)


def file_problems(path, seed):
    """Problems of a file like GSM8K's, in random order; the whole answer is the `solution`."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: expected a task ({', '.join(TASKS)}) or a JSONL file")
    found = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            solution = row["answer"]
            answer, _ = last_marked(solution)
            found.append(problem(name_of(path), row["question"], answer, solution=solution))
        except (ValueError, TypeError, KeyError, AttributeError):
            answer = None
        if answer is None:
            got = records.show(line.decode("utf-8", "replace"))
            raise BadInput(
                f'{path}:{number}: expected {{"question": text, "answer": "... #### 42"}}, '
                f"got {got}"
            )
    random.Random(seed).shuffle(found)
    return found


def name_of(source):
    """The name of a task, or of a file of problems."""
    return source if source in TASKS else re.sub(r"[^\w.]+", "_", Path(source).stem)


def distinct(source, seed, count):
    """The first `count` problems of a task or file; none has the question of another."""
    found = {}
    repeats = 0
    for record in (gym_problems if source in TASKS else file_problems)(source, seed):
        repeats = repeats + 1 if record["id"] in found else 0
        found.setdefault(record["id"], record)
        if len(found) == count:
            return list(found.values())
        if repeats == REPEATS:
            break
    raise BadInput(
        f"{source}: expected {count} different questions, got {len(found)}: ask for fewer"
    )


def make(argv):
    p = cli.parser(__doc__)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--task", choices=TASKS, help="a task of reasoning-gym")
    source.add_argument("--from", dest="task", metavar="FILE", help="problems like GSM8K's")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--train", type=int, default=1000, help="problems to train on")
    p.add_argument("--dev", type=int, default=100, help="problems to choose settings by")
    p.add_argument("--held-out", type=int, default=500, help="problems to measure on")
    p.add_argument("--seed", type=int, default=0, help="of the problems")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    args = p.parse_args(argv)
    cli.check_at_least(1, train=args.train, dev=args.dev, held_out=args.held_out)
    # in this order, so that more to train on changes no other file
    sizes = {"heldout": args.held_out, "dev": args.dev, "train": args.train}
    found = iter(distinct(args.task, args.seed, sum(sizes.values())))
    with new_folder(args.out, args.overwrite) as folder:
        for split, size in sizes.items():
            write_rows(folder / f"{split}.jsonl", islice(found, size))
    print(f"experiments.real_tasks make: {args.out}: {sizes}")
    return {"out": args.out} | sizes


# ---- grades


@lru_cache
def scorer_of(name, config):
    """score_answer of a reasoning-gym dataset; config: JSON."""
    try:
        return gym().create_dataset(name, seed=0, size=1, **json.loads(config)).score_answer
    except (AssertionError, TypeError, ValueError) as error:
        raise BadInput(
            f"task: config: expected settings of reasoning-gym's {name}, got {config} ({error})"
        ) from None


def is_right(prompt, text):
    """Whether the final answer of a text is right, as it stands or without \\text{} and the
    like; only a full score counts."""
    task = prompt.get("task")
    given = final_answer(text)
    if task is None or given is None:
        return is_correct(text, prompt["answer"])
    score = scorer_of(task["name"], json.dumps(task["config"]))
    entry = {name: task[name] for name in ("question", "metadata")}
    entry["answer"] = prompt["answer"]
    return any(score(each, entry) == 1.0 for each in (given, rewritten(given)))


def right_somehow(prompt, text, right):
    """Whether an answer is right, or the last number of its text is: skill without form (as
    `flexible-extract` of other harnesses), with some chance hits; None where the truth is no
    number."""
    answer = str(prompt["answer"])
    if not NUMBER.fullmatch(answer):
        return None
    found = NUMBER.findall(text)
    return bool(right) or bool(found and equal(found[-1], answer))


def mean_of_known(values):
    """The mean of those that are not None, or None."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def read_problems(path):
    """The Table of prompts that can be graded."""
    prompts = read_answerable(path)
    names = {task.partition("-")[0] for task in TASKS} - BY_ANSWER
    fields = {"name", "config", "question", "metadata"}
    for prompt in prompts:
        task = prompt.get("task", dict.fromkeys(fields))
        made = records.has()(task) and task.keys() >= fields and type(prompt["answer"]) is str
        if "task" in prompt and not (made and task["name"] in sorted(names)):
            where = prompts.where(records.key_of(prompt, "prompts"))
            raise BadInput(
                f"{where}: task: expected what `make` writes beside a text `answer`, a name of "
                f"{', '.join(sorted(names))}, got {records.show(task)}"
            )
    return prompts


def grade(argv):
    """Writes rewards; returns their summary with `answered`, the share of rollouts that have a
    final answer, `flexible`, the share that is right in whatever form (None: no answer is
    a number), and `agreement`, how often eval.py's grader says the same."""
    p = cli.parser(__doc__)
    p.add_argument("--prompts", required=True, help="problems of `make`")
    p.add_argument("--rollouts", required=True, help="rollouts of them")
    p.add_argument("--out", required=True, help="JSONL of rewards; an interrupted one goes on")
    p.add_argument("--overwrite", action="store_true", help="begin --out anew")
    args = p.parse_args(argv)
    prompts = read_problems(args.prompts)
    table = files.Table(args.rollouts, "rollouts")
    read_groups(table, prompts, args.prompts, "answer")  # refuses rollouts of other prompts
    by_gym = any("task" in prompt for prompt in prompts)
    name = f"reasoning-gym {gym_version()}" if by_gym else "answer"

    def work(missing):
        for key in missing:
            right = is_right(prompts[key[:1]], records.final_text(table[key]))
            yield rewards.reward_record(table[key], rewards.Reward(float(right)), name)

    how = {"grader": name}, (args.prompts, args.rollouts), args.overwrite
    files.fill(args.out, "rewards", table.keys(), work, *how)
    agreed = []
    answered = []
    flexible = []
    for reward in files.read(args.out, "rewards"):
        key = records.key_of(reward, "rewards")
        text = records.final_text(table[key])
        agreed.append(reward["reward"] == is_correct(text, prompts[key[:1]]["answer"]))
        answered.append(final_answer(text) is not None)
        flexible.append(right_somehow(prompts[key[:1]], text, reward["reward"]))
    summary = rewards.summarise(args.out)
    summary |= {"agreement": float(np.mean(agreed)), "answered": float(np.mean(answered))}
    summary["flexible"] = mean_of_known(flexible)
    print(
        f"experiments.real_tasks grade: {args.out}: {rewards.describe(summary)}; "
        f"{summary['answered']:.1%} have a final answer; eval.py's grader agrees on "
        f"{summary['agreement']:.1%}"
    )
    return summary


def gym_version():
    """The version of reasoning-gym, or None."""
    try:
        return importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- the pilot

# how a model is asked: temperature, and the stem of its files
ASKED = {"sampled": 1.0, "greedy": 0.0}


def pilot_parser():
    p = cli.parser(__doc__)
    p.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    p.add_argument(
        "--tasks", nargs="+", default=list(TASKS), help="names of TASKS, files like GSM8K's"
    )
    p.add_argument("--problems", type=int, default=50, help="problems a task")
    p.add_argument("--samples", type=int, default=4, help="answers a problem, beside a greedy")
    p.add_argument("--max-tokens", type=int, default=200, help="longest answer")
    p.add_argument("--seed", type=int, default=1000, help="other problems than `make` makes")
    p.add_argument("--out", required=True, help="lines to append; those there are not repeated")
    p.add_argument("--work", required=True, help="folder for problems, rollouts and rewards")
    return p


def sampling_flags(args, folder, more):
    """The parsed flags of rollout.py for a model."""
    p = cli.parser("The flags of rollout.py that the pilot passes on.")
    add_sampling_flags(p, n=args.samples)
    for flag in ("--model", "--prompts", "--n", "--out", "--temperature", "--overwrite"):
        if any(word.split("=")[0] == flag for word in more):
            p.error(f"{flag}: expected no such flag: the pilot sets it")
    own = ["--max-tokens", str(args.max_tokens), "--seed", str(args.seed)]
    return p.parse_args(["--model", folder, "--prompts", "", "--out", "", *own, *more])


def finished(path, wanted):
    """{(task, model): result line} of a file.  wanted: {task: settings}; a line of such a task
    that was made with other settings is refused."""
    found = {}
    for row in result_lines(path):
        name = row.get("task")
        difference = files.first_difference(row.get("settings"), wanted.get(name))
        if name in wanted and difference:
            raise BadInput(f"{path}: {name} was made with {difference}: give another --out")
        found[name, row["arm"]] = row
    return found


def ask(sampler, settings, prompts, at, samples, limit):
    """Samples a model's answers to a file of prompts into the folder `at`; returns seconds, or
    None where some were there, and how many failed."""
    began = time.time()
    fresh = not at.exists()
    failed = 0
    for kind, temperature in ASKED.items():
        sampler.settings = dataclasses.replace(sampler.settings, temperature=temperature)
        jobs = jobs_by_key(files.read(prompts, "prompts"), samples if temperature else 1)
        how = settings | {"temperature": temperature}
        out = at / f"{kind}.jsonl"
        failed += len(fill_with(sampler, jobs, out, "rollouts", how, [prompts], limit=limit)[1])
    return round(time.time() - began, 2) if fresh else None, failed


def measured(prompts, at):
    """The numbers of a result line, from the rollouts in the folder `at`."""
    graded = {}
    for kind in ASKED:
        paths = dict(rollouts=at / f"{kind}.jsonl", out=at / f"{kind}.rewards.jsonl")
        graded[kind] = grade(words_of({"prompts": prompts} | paths))
    right = {}
    for reward in files.read(at / "sampled.rewards.jsonl", "rewards"):
        right.setdefault(reward["id"], []).append(reward["reward"] == 1.0)
    lengths, _ = summarise(at / "sampled.jsonl")
    shares = {name: graded["sampled"][name] for name in ("answered", "flexible", "agreement")}
    greedy = {"greedy": graded["greedy"]["reward_mean"]}
    greedy["greedy_flexible"] = graded["greedy"]["flexible"]
    return accuracy(list(right.values())) | greedy | lengths | shares


def named_models(texts):
    """["student=FOLDER"] -> {"student": "FOLDER"}"""
    for text in texts:
        if not re.fullmatch(r"[\w.-]+=.+", text):
            raise BadInput(f"--models: expected NAME=FOLDER, got {text}")
    return dict(text.split("=", 1) for text in texts)


def write_problems(args):
    """({task: its file of prompts}, {task: what its result lines depend on})."""
    same = {name: getattr(args, name) for name in ("problems", "samples", "max_tokens", "seed")}
    same["instruction"] = INSTRUCTION
    prompts = {}
    settings = {}
    for source in args.tasks:
        task = name_of(source)
        prompts[task] = Path(args.work) / task / "prompts.jsonl"
        disk.make_folder(prompts[task].parent)
        write_rows(prompts[task], distinct(source, args.seed, args.problems))
        config = TASKS[source] if source in TASKS else files.hash_file(source)
        settings[task] = same | {"config": config}
    return prompts, settings


def load_sampler(flags, name, done, out):
    """As sampler_from_flags; refuses a model that is not the one of its earlier lines."""
    sampler, how = sampler_from_flags(flags, True, EVAL_STREAM)
    for (_, other), row in done.items():
        difference = files.first_difference(row["sampling"], how)
        if other == name and difference:
            raise BadInput(f"{out}: {name} was measured with {difference}: give another --out")
    return sampler, how


def pilot(argv):
    args, more = pilot_parser().parse_known_args(argv)
    cli.check_at_least(1, problems=args.problems, samples=args.samples)
    models = named_models(args.models)
    prompts, settings = write_problems(args)
    failed = 0
    for name, folder in models.items():
        flags = sampling_flags(args, folder, more)
        done = finished(args.out, settings)
        left = [task for task in settings if (task, name) not in done]
        if not left:
            continue
        sampler, how = load_sampler(flags, name, done, args.out)
        for task in left:
            at = prompts[task].with_name(name)
            limit = served.failure_limit(flags)
            seconds, missing = ask(sampler, how, prompts[task], at, args.samples, limit)
            failed += missing
            if missing:
                continue  # the next run completes it
            row = {"arm": name, "task": task, "seed": args.seed, "step": 0}
            row |= {"model": Path(folder).name} | measured(prompts[task], at)
            row |= {"seconds": seconds, "settings": settings[task], "sampling": how}
            row["versions"] = versions() | {"reasoning-gym": gym_version()}
            append_result(args.out, row)
            say(f"{task} {name}: accuracy {row['accuracy']:.1%}, greedy {row['greedy']:.1%}")
    return {"out": args.out, "failed": failed}


# ---- the table


def distance(student, teacher):
    """How far two result lines of a task lie from FITS: 0 where it fits, inf where one is
    missing."""
    if not student or not teacher:
        return float("inf")
    low, high = FITS["student"]
    tokens = max(student["length_mean"], teacher["length_mean"])
    outside = max(low - student["accuracy"], student["accuracy"] - high, 0)
    weak = max(FITS["teacher"] - teacher["accuracy"], 0)
    return outside + weak + max(tokens / FITS["tokens"] - 1, 0)


def cell(row):
    if row is None:
        return "-"
    best = row[f"pass@{row['n']}"]
    shares = f"{row['accuracy']:.2f} / {row['greedy']:.2f} / {best:.2f}"
    length = f"{row['length_mean']:.0f} tokens, {row['truncated']:.0%} cut"
    loose = ""
    if row["flexible"] is not None:
        loose = f" (any form {row['flexible']:.2f} / {row['greedy_flexible']:.2f})"
    return f"{shares}{loose}, {length}, {row['answered']:.0%} answered"


def table(argv):
    p = cli.parser(__doc__)
    p.add_argument("files", nargs="+", metavar="FILE", help="lines of `pilot`")
    p.add_argument("--student", default="student", help="its name in the files")
    p.add_argument("--teacher", default="teacher", help="its name in the files")
    args = p.parse_args(argv)
    rows = {}
    for path in args.files:
        for row in files.read(path, "results"):
            rows.setdefault(row["task"], {})[row["arm"]] = row
    models = list(dict.fromkeys(arm for found in rows.values() for arm in found))
    for name in (args.student, args.teacher):
        if name not in models:
            raise BadInput(
                f"{', '.join(args.files)}: arm: expected {name!r}, got {', '.join(models)}: "
                f"name them with --student and --teacher"
            )
    far = {t: distance(r.get(args.student), r.get(args.teacher)) for t, r in rows.items()}
    order = sorted(rows, key=far.get)
    lines = [["task", "fits", *models]]
    for task in order:
        cells = [cell(rows[task].get(model)) for model in models]
        lines.append([task, "-" if far[task] else "yes", *cells])
    low, high = FITS["student"]
    print(
        f"{markdown(lines)}\nAccuracy at temperature 1 / greedy / pass@k of all samples; "
        f"right in any form (or by the last number) at temperature 1 / greedy; at "
        f"temperature 1 mean length, share cut, share with a final answer.  A task fits if "
        f"{args.student} has {low} to {high}, {args.teacher} {FITS['teacher']} or more, both "
        f"at most {FITS['tokens']} tokens; the others follow by how far they are from that."
    )
    return {"tasks": order}


# ---- the commands


def smoke(argv):
    """Every command on untrained models, with a file like GSM8K's and, if reasoning-gym is
    there, with a task of it."""
    p = cli.parser(__doc__)
    p.add_argument("--smoke", action="store_true", help="a tiny run of every command")
    p.add_argument("--out", default="runs/real_tasks-smoke", help="folder for everything")
    args = p.parse_args(argv)
    out = Path(args.out)
    world = out / "world"
    few = dict(train_prompts=12, eval_prompts=2, clean=2, mixed=2, overwrite=True)
    sums.main(words_of({"out": world} | few))
    source = out / "sums.jsonl"
    rows = files.read(world / "train.jsonl", "prompts")
    asked = ((r["messages"][0]["content"], f"#### {r['answer']}") for r in rows)
    write_rows(source, (dict(question=q, answer=a) for q, a in asked))
    few = dict(train=4, dev=2, held_out=2, overwrite=True)
    make(words_of({"from": source, "out": out / "problems"} | few))
    models = [f"{name}={world / name}" for name in ("student", "teacher")]
    tasks = [source, "chain_sum"][: 1 + bool(gym_version())]
    few = dict(problems=2, samples=2, max_tokens=8, work=out / "work")
    pilot(words_of({"models": models, "tasks": tasks, "out": out / "pilot.jsonl"} | few))
    return table([str(out / "pilot.jsonl")])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--smoke" in argv:
        return smoke(argv)
    commands = {"make": make, "grade": grade, "pilot": pilot, "table": table}
    return cli.dispatch(__doc__, commands, argv)


if __name__ == "__main__":
    cli.run(main)
