"""One round of on-policy distillation on a real model, as our stages over JSONL and as TRL's
DistillationTrainer: seconds and memory.

    python -m bench.round --model FOLDER --trl-python PYTHON --out results/round.jsonl
    python -m bench.round table results/round.jsonl

SmolLM2-135M takes about 8 minutes a turn on 2 cores.

The work of both: 16 prompts, one answer each of at most 64 tokens sampled at temperature 1,
reverse KL to a teacher over the whole vocabulary, one AdamW step on the 16 answers, float32, on
the CPU.  The teacher is a copy of the model: the cost is what is measured, not the learning.
Contenders take turns, every one in fresh processes.

    stages        rollout.py, then train.py --teacher: a process each, as a person runs them
    one-process   the same two stages in one process, as an experiment runs them
    disk          rollout.py, teacher.py score --top-k 20, train.py --scores: a process each; 20
                  tokens and a tail instead of all
    trl-RxA       DistillationTrainer, A micro-batches of R answers; -checkpointing: activations
                  are computed twice, its default

What is counted.  Ours runs two rounds and the second is compared, for it loads the optimiser's
moments that the first has saved; TRL runs three steps and those after the first are compared,
from the end of one step to the end of the next.  TRL's step has no start-up, no loading and no
saving in it: beside it stands our round without start-up and loading, yet with saving weights
and moments; the whole round, processes and all, is the column before it.  `first update` is
from nothing to the end of the first step or round.

One line of JSON a round, with the seconds of each part (a part inside another is taken out of
it):

    startup    from the call of the process until Python, torch, transformers and the stage are
               imported
    load       models, tokenizer, hash of the weights, moments      generate, score   sampling;
               the teacher's scores for the disk form
    gradient   forward passes of student and teacher, loss, backward, clipping      optimiser
               AdamW
    jsonl      reading, checking, hashing and writing records       save              weights,
               moments, tokenizer
    other      the rest of the stage: rendering, metrics       exit     from the stage's last
               line to the end of the process

and `peak_mb`, the largest VmHWM (Linux) of any of its processes, `peak_in` the part that
reached it; `others`, the share of the machine's cores that other processes used meanwhile.
`table` leaves out rounds in which that was above 5 %."""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# ours, TRL's, and the largest share of others in a round that counts
ROUNDS, STEPS, QUIET = 2, 3, 0.05
ASKED = (
    "Write a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "Describe a walk through a forest in autumn.",
    "Tell me how bread is made, step by step.",
    "Explain what causes the seasons.",
    "Write a letter to a friend who has moved abroad.",
    "Describe how a computer stores information.",
    "Tell the story of the first flight of an aeroplane.",
    "Explain why the sky is blue.",
    "Give advice to someone who learns to play the piano.",
    "Describe the life of a honey bee.",
    "Explain how vaccines work.",
    "Write a speech for the opening of a library.",
    "Describe the water cycle in detail.",
    "Explain how to plan a small vegetable garden.",
    "Tell a fable about a fox and a crow, with a moral at its end.",
)
PARTS = {  # part -> what belongs to it: module, or module.class, and the function
    "load": (
        "opd.policy load_policy",
        "opd.policy hash_weights",
        "opd.trainer.Trainer load_optimiser",
    ),
    "generate": ("opd.sampling sample_batch",),
    "score": ("opd.scoring score_batch",),
    "gradient": ("train optimise",),
    "save": ("opd.trainer.Trainer save",),
    "jsonl": (
        "opd.files _lines",
        "opd.records fingerprint",
        "opd.files hash_file",
        "opd.records pack",
        "opd.records unpack",
        "opd.files.Table __getitem__",
        "opd.files.Writer __init__",
        "opd.files.Writer write",
    ),
}


# ---- inside a measured process


def peak_mb():
    """Peak resident megabytes of this process; getrusage would count what the parent held when
    this one was forked."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


class Clock:
    """Seconds of named parts, each without the parts inside it, and the part that reached the
    peak of memory."""

    def __init__(self):
        self.seconds = {}
        self.running = ["other"]  # the part, and those that it is inside of
        self.since = time.monotonic()
        self.peak = 0
        self.peak_in = None

    def charge(self):
        """Gives the time since the last call to the part that is running."""
        now, part = time.monotonic(), self.running[-1]
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.since
        self.since = now
        if (peak := peak_mb()) > self.peak:
            self.peak, self.peak_in = peak, part

    @contextlib.contextmanager
    def part(self, name):
        self.charge()
        self.running.append(name)
        try:
            yield
        finally:
            self.charge()
            self.running.pop()

    def timed(self, name, f):
        @functools.wraps(f)
        def call(*args, **kwargs):
            with self.part(name):
                out = f(*args, **kwargs)
            return self.items(name, out) if isinstance(out, types.GeneratorType) else out

        return call

    def items(self, name, generator):
        """A generator works while it is asked, not while it is called."""
        while True:
            with self.part(name):
                try:
                    item = next(generator)
                except StopIteration:
                    return
            yield item


def versions(*packages):
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def place_of(name):
    """("opd.files.Table __getitem__") -> (the class, "__getitem__"); (None, ...) if its module
    is not loaded."""
    path, attribute = name.split()
    inner = path.split(".")
    outer = []
    while inner and ".".join([*outer, inner[0]]) in sys.modules:
        outer.append(inner.pop(0))
    module = sys.modules.get(".".join(outer))
    if module is None or len(inner) > 1 or (inner and not hasattr(module, inner[0])):
        return None, attribute
    return functools.reduce(getattr, inner, module), attribute


def child_stages(job):
    """Runs stages one after the other in this process, with clocks around what PARTS names."""
    stages = [importlib.import_module(name.removesuffix(".py")) for name, *_ in job["lines"]]
    import torch

    started, clock = time.monotonic(), Clock()
    ours = [
        module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in ("opd", "methods", "rollout", "teacher", "train")
    ]
    for part, names in PARTS.items():
        for name in names:
            home, attribute = place_of(name)
            if home is None:
                continue
            plain = getattr(home, attribute)
            timed = clock.timed(part, plain)
            # `from opd.policy import load_policy` has made names of its own
            for place in (home, *ours):
                if getattr(place, attribute, None) is plain:
                    setattr(place, attribute, timed)
    torch.optim.AdamW.step = clock.timed("optimiser", torch.optim.AdamW.step)
    summaries = [stage.main(argv) for stage, (_, *argv) in zip(stages, job["lines"])]
    clock.charge()
    tokens = [s["generated_tokens"] for s in summaries if "generated_tokens" in s]
    return {
        "parts": {"startup": started - job["called"]} | clock.seconds,
        "peak_mb": peak_mb(),
        "peak_in": clock.peak_in,
        "tokens": sum(tokens),
        "versions": versions("torch", "transformers"),
        "ended": time.monotonic(),
    }


def child_trl(job):
    """Runs DistillationTrainer for STEPS steps; the callback looks at clock and memory at the
    end of each."""
    import datasets
    import torch
    import trl
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    clock = Clock()
    startup = clock.since - job["called"]
    rounds = []
    rows, accumulate = map(int, job["setting"].removesuffix("-checkpointing").split("x"))
    dtype = {"dtype": "float32"}  # the teacher would be loaded as its folder stores it
    config = DistillationConfig(
        output_dir=job["folder"],
        model_init_kwargs=dtype,
        teacher_model_init_kwargs=dtype,
        bf16=False,
        use_cpu=True,
        beta=1.0,
        temperature=1.0,
        max_completion_length=job["max_tokens"],
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulate,
        max_steps=STEPS,
        gradient_checkpointing=job["setting"].endswith("-checkpointing"),
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=job["seed"],
    )
    prompts = [json.loads(line) for line in Path(job["prompts"]).read_text().splitlines()]
    column = [row.get("messages") or row["prompt"] for row in prompts]

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.charge()
            before = {k: sum(r["parts"].get(k, 0.0) for r in rounds) for k in clock.seconds}
            rounds.append(
                {
                    "parts": {k: v - before[k] for k, v in clock.seconds.items()},
                    "peak_mb": peak_mb(),
                    "peak_in": clock.peak_in,
                }
            )

    with clock.part("load"):
        trainer = DistillationTrainer(
            model=job["model"],
            teacher_model=job["model"],
            args=config,
            callbacks=[Watch()],
            train_dataset=datasets.Dataset.from_list([{"prompt": p} for p in column]),
        )
    for part, name in (("generate", "_generate_single_turn"), ("gradient", "training_step")):
        setattr(trainer, name, clock.timed(part, getattr(trainer, name)))
    torch.optim.AdamW.step = clock.timed("optimiser", torch.optim.AdamW.step)
    trainer.train()
    lengths = [
        log["completions/mean_length"]
        for log in trainer.state.log_history
        if "completions/mean_length" in log
    ]
    for row, length in zip(rounds, lengths, strict=True):
        row["tokens"] = round(length * len(column))
    rounds[0]["parts"]["startup"] = startup
    return {
        "rounds": rounds,
        "versions": versions("torch", "transformers") | {"trl": trl.__version__},
    }


def child(job):
    job = json.loads(job)
    found = child_trl(job) if "setting" in job else child_stages(job)
    Path(job["report"]).write_text(json.dumps(found))


# ---- the measuring process


def busy_seconds():
    """Core-seconds that this machine has worked since it was booted, those that its host took
    away included."""
    numbers = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    # all but idle and waiting for the disk
    return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")


def call(python, job, folder, args):
    """The report of a child process, with its seconds and the share of the cores that others
    used meanwhile."""
    report, errors = folder / "report.json", folder / "errors.txt"
    os.sync()  # what the one before has written is not to be flushed during this one
    environment = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    busy = busy_seconds()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    job_line = json.dumps(job | {"report": str(report), "called": start})
    line = [python, "-m", "bench.round", "child", job_line]
    with open(errors, "w") as log:
        streams = dict(stdout=subprocess.DEVNULL, stderr=log)
        done = subprocess.run(line, **streams, env=environment, cwd=folder)
    seconds = time.monotonic() - start
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(
            f"{errors.read_text()}\nbench/round.py: {job.get('setting', job.get('lines'))}: "
            f"exit code {done.returncode}"
        )
    own = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return json.loads(report.read_text()) | {
        "seconds": seconds,
        "others": max(0.0, busy_seconds() - busy - own) / seconds / os.cpu_count(),
    }


def command(*words, **flags):
    """A stage's name and its arguments."""
    pairs = (("--" + name.replace("_", "-"), str(value)) for name, value in flags.items())
    return [*words, *(word for pair in pairs for word in pair)]


def stages_of(form, model, prompts, at, seed, args):
    """The stages of a round that starts with `model`; their files' names begin with `at`.
    Returns (commands, folder of the new weights)."""
    rollouts, scores, out = f"{at}.rollouts.jsonl", f"{at}.scores.jsonl", f"{at}.weights"
    sampling = dict(prompts=prompts, n=1, max_tokens=args.max_tokens, dtype="float32")
    sample = command("rollout.py", model=model, **sampling, seed=seed, out=rollouts)
    given = dict(model=args.model, rollouts=rollouts, dtype="float32", top_k=20)
    score = command("teacher.py", "score", **given, out=scores)
    teacher = dict(teacher=args.model, teacher_dtype="float32")
    if form == "disk":
        teacher = dict(scores=scores)
    update = command(
        "train.py",
        method="opd-full",
        model=model,
        rollouts=rollouts,
        batch_size=16,
        out=out,
        micro_batch_tokens=args.micro_batch_tokens,
        **teacher,
    )
    return [sample, score, update] if form == "disk" else [sample, update], out


def ours(form, prompts, folder, args, turn):
    """Rows of ROUNDS rounds, each continuing the weights and moments of the one before."""
    model = args.model
    for number in range(1, ROUNDS + 1):
        at = folder / str(number)
        lines, out = stages_of(form, model, prompts, at, 10 * turn + number, args)
        processes = [lines] if form == "one-process" else [[line] for line in lines]
        names = ["+".join(line[0] for line in some) for some in processes]
        runs = {
            name: call(sys.executable, {"lines": some}, folder, args)
            for name, some in zip(names, processes)
        }
        about = {"contender": form, "round": number}
        yield about | row_of(runs) | {"micro_batch_tokens": args.micro_batch_tokens}
        model = out


def row_of(runs):
    """A round's numbers from its processes' reports, {name: report}."""
    reports = list(runs.values())
    for report in reports:
        report["parts"]["exit"] = report["seconds"] - sum(report["parts"].values())
    parts = dict.fromkeys(part for report in reports for part in report["parts"])
    largest = max(runs, key=lambda name: runs[name]["peak_mb"])
    kept = ("seconds", "parts", "peak_mb", "peak_in")
    return {
        "tokens": reports[0]["tokens"],
        "seconds": sum(report["seconds"] for report in reports),
        "parts": {part: sum(r["parts"].get(part, 0.0) for r in reports) for part in parts},
        "peak_mb": runs[largest]["peak_mb"],
        "peak_in": f"{largest} {runs[largest]['peak_in']}",
        "others": max(report["others"] for report in reports),
        "stages": {name: {k: report[k] for k in kept} for name, report in runs.items()},
        "versions": reports[0]["versions"],
    }


def trl(setting, prompts, folder, args, turn):
    """Rows of STEPS steps of one process; the first has start-up and loading in its parts."""
    job = {
        "setting": setting,
        "model": args.model,
        "prompts": prompts,
        "max_tokens": args.max_tokens,
        "seed": turn,
        "folder": str(folder),
    }
    run = call(args.trl_python, job, folder, args)
    for number, row in enumerate(run["rounds"], 1):
        yield row | {
            "contender": f"trl-{setting}",
            "round": number,
            "seconds": sum(row["parts"].values()),
            "others": run["others"],
            "versions": run["versions"],
        }


def tidy(x):
    """Numbers to a millisecond, and nothing of where this machine keeps things."""
    if isinstance(x, dict):
        return {k: tidy(v) for k, v in x.items()}
    return round(x, 3) if isinstance(x, float) else x


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="folder of the model: student and teacher")
    p.add_argument("--prompts", help="JSONL of prompts (default: 16 that ask for long answers)")
    p.add_argument("--max-tokens", type=int, default=64, help="longest answer")
    p.add_argument("--repeats", type=int, default=5, help="turns of every contender")
    p.add_argument(
        "--forms",
        nargs="*",
        default=["stages", "one-process", "disk"],
        choices=["stages", "one-process", "disk"],
        help="of ours",
    )
    p.add_argument("--micro-batch-tokens", type=int, default=1024, help="of train.py: memory")
    p.add_argument(
        "--trl",
        nargs="*",
        default=["16x1", "4x4-checkpointing"],
        metavar="RxA[-checkpointing]",
        help="settings of TRL; R x A = 16 answers",
    )
    p.add_argument(
        "--trl-python",
        default=sys.executable,
        metavar="PYTHON",
        help="the interpreter that has trl; without trl only ours is measured",
    )
    p.add_argument(
        "--attempts",
        type=int,
        default=1,
        help="above 1: wait up to half an hour for a quiet machine, and measure what others "
        "have disturbed again, so many times in all",
    )
    p.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of every process")
    p.add_argument("--out", help="also append the lines here")
    args = p.parse_args()
    args.model = str(Path(args.model).expanduser().resolve())
    args.trl_python = str(Path(args.trl_python).expanduser())
    asked = [args.trl_python, "-c", "import trl, datasets"]
    found = args.trl and subprocess.run(asked, capture_output=True).returncode == 0
    if args.trl and not found:
        print(
            "bench/round.py: trl cannot be imported: only our stages are measured "
            "(--trl-python names an interpreter that has it)",
            file=sys.stderr,
        )
    contenders = [functools.partial(ours, form) for form in args.forms]
    contenders += [functools.partial(trl, setting) for setting in args.trl if found]
    kept = []
    if args.out and Path(args.out).exists():
        kept = Path(args.out).read_text().splitlines()
    # more turns for a file that has some
    first = 1 + max((json.loads(line)["turn"] for line in kept), default=-1)
    for turn in range(first, first + args.repeats):
        shift = turn % len(contenders)  # no one has always the same one before it
        for contender in contenders[shift:] + contenders[:shift]:
            for _ in range(args.attempts):
                rows = measure(contender, args, turn)
                if max(r["others"] for r in rows) <= QUIET:
                    break
            for row in rows:
                line = json.dumps(tidy(row))
                print(line, flush=True)
                if args.out:
                    with open(args.out, "a") as f:
                        f.write(line + "\n")


def measure(contender, args, turn):
    """The rows of one contender in one turn, from a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prompts = folder / "prompts.jsonl"
        chats = [[{"role": "user", "content": text}] for text in ASKED]
        rows = ({"id": f"p{i:02}", "messages": chat} for i, chat in enumerate(chats))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        prompts.write_text(Path(args.prompts).read_text() if args.prompts else text)
        common = {
            "bench": "round",
            "model": Path(args.model).name,
            "prompts": len(prompts.read_text().splitlines()),
            "max_tokens": args.max_tokens,
            "threads": args.threads,
            "turn": turn,
        }
        limit = time.monotonic() + 1800
        while args.attempts > 1 and time.monotonic() < limit:  # until the machine is quiet
            before = busy_seconds()
            time.sleep(5)
            if busy_seconds() - before < QUIET * 5 * os.cpu_count():
                break
        return [common | row for row in contender(str(prompts), folder, args, turn)]


ROUND_PARTS = ["generate", "score", "gradient", "optimiser", "jsonl", "save", "other"]
PROCESS_PARTS = ["startup", "load", *ROUND_PARTS, "exit"]


def table(path):
    """Medians over turns as Markdown: the rounds that are compared, then what each process of
    ours does in them."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    rows = [r for r in lines if r["others"] <= QUIET] or lines
    names = list(dict.fromkeys(r["contender"] for r in lines))
    print_rounds(rows, names)
    print()
    print_processes(rows, names)
    loud = sum(r["others"] > QUIET for r in lines)
    ending = " and are left out." if loud else "."
    if loud == len(lines):
        ending = ": all are shown, for there are no others."
    print(
        f"\n{loud} of {len(lines)} rounds had other processes on more than {QUIET:.0%} of "
        f"the cores{ending}"
    )


def print_rounds(rows, names):
    """A line a contender; the best setting of TRL by time, and by memory, is the measure."""
    fastest = best_of_trl(rows, names, without_start)
    smallest = best_of_trl(rows, names, peak_of)
    print_head(
        ["contender", "turns", "tokens an answer", "whole round, s"]
        + ["without start-up and loading, s", f"/ {fastest}", *ROUND_PARTS]
        + ["peak, MB", f"/ {smallest}", "reached in", "first update, s"]
    )
    for name in names:
        some = [r for r in rows if r["contender"] == name and r["round"] > 1]
        whole = by_turn(rows, name, lambda r: r["seconds"])
        parts = [by_turn(rows, name, seconds_of(part)) for part in ROUND_PARTS]
        first = by_turn(rows, name, lambda r: r["seconds"], first=True)
        print_row(
            [
                name,
                str(len({r["turn"] for r in some})),
                middle([r["tokens"] / r["prompts"] for r in some], ".1f"),
                "-" if name.startswith("trl-") else middle(whole.values(), ".1f"),
                middle(by_turn(rows, name, without_start).values(), ".1f"),
                ratio(rows, name, fastest, without_start),
                *(middle(seconds.values(), ".2f") for seconds in parts),
                middle(by_turn(rows, name, peak_of).values(), ".0f"),
                ratio(rows, name, smallest, peak_of),
                statistics.mode(r["peak_in"] for r in some) if some else "-",
                middle(first.values(), ".1f"),
            ]
        )


def print_processes(rows, names):
    """A line a process of ours."""
    print_head(["form", "process", "seconds", *PROCESS_PARTS, "peak, MB"])
    for name in names:
        compared = [r for r in rows if r["contender"] == name and r["round"] > 1]
        rounds = [r["stages"] for r in compared if "stages" in r]
        for process in rounds[0] if rounds else ():
            runs = [r[process] for r in rounds]
            print_row(
                [
                    name,
                    process,
                    middle([run["seconds"] for run in runs], ".1f"),
                    *(middle(map(seconds_of(part), runs), ".2f") for part in PROCESS_PARTS),
                    middle([run["peak_mb"] for run in runs], ".0f"),
                ]
            )


def by_turn(rows, name, value, first=False):
    """{turn: median of `value` over the compared rounds of a turn}, or over the first ones."""
    found = {}
    for r in rows:
        if r["contender"] == name and (r["round"] == 1) == first:
            found.setdefault(r["turn"], []).append(value(r))
    return {turn: statistics.median(values) for turn, values in found.items()}


def best_of_trl(rows, names, value):
    """The setting of TRL with the smallest median: the strictest comparison."""
    measured = {name: by_turn(rows, name, value) for name in names if name.startswith("trl-")}
    medians = {name: statistics.median(x.values()) for name, x in measured.items() if x}
    return min(medians, key=medians.get, default="trl")


def ratio(rows, name, other, value):
    """Median over the turns that both have."""
    here, there = by_turn(rows, name, value), by_turn(rows, other, value)
    return middle([here[turn] / there[turn] for turn in here if turn in there], ".2f")


def without_start(row):
    return sum(row["parts"].get(part, 0.0) for part in ROUND_PARTS)


def seconds_of(part):
    """What reads the seconds of a part off a round or a process."""
    return lambda row: row["parts"].get(part, 0.0)


def peak_of(row):
    return row["peak_mb"]


def middle(values, form):
    return format(statistics.median(values), form) if values else "-"


def print_head(cells):
    print_row(cells)
    print("| --- " * len(cells) + "|")


def print_row(cells):
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2])
    elif sys.argv[1:2] == ["table"]:
        table(sys.argv[2])
    else:
        main()
