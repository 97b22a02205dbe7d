"""Injects faults into the stages and counts what is lost.

    python -m bench.faults --out results/faults.jsonl       # minutes: JSON lines, then a table
    python -m bench.faults --short                          # seconds: a few of each

Sections (--sections NAME ... picks some).  After every fault the same command line is run again
until it ends; what it has written then is compared with what an undisturbed run writes:

    kills    SIGKILL at a random moment, or at one of the changes it makes to its files (open,
             rename, remove, mkdir, truncate, fsync, half of an appended line)
    power    bench/power_cut.py: only what was fsynced is sure to be on the disk
    races    two processes write one folder or file, with the same settings or with others, or
             with --overwrite
    disk     no room: a file may not grow beyond a limit; a file system (tmpfs) is full
    server   a fifth of a server's replies fail or lie; a server that dies and returns

A fault is `survived` if nothing is `lost` (a record that is missing), `doubled` (a key that
stands twice) or `mixed` (a record, or weights, that no undisturbed run makes), and no process
ended with a traceback or in another way than exit code 0 or one line and exit code 2.

Processes are forked from one that has imported everything, so a kill costs milliseconds."""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import eval as evaluation
import rollout
import rubric
import teacher
import train
from bench import faults_server
from bench.power_cut import CHANGES, Recorder
from methods import gad
from opd import cli, disk, files
from worlds import sums

RECORDS = 120  # of the stage that is nothing but a Writer
HANGS = 60  # seconds after which a process is taken to hang; these need one or two


def write_records(argv):
    """A stage that only writes: records of a seed, as fast as it can."""
    out, seed = argv

    def work(missing):
        for i, _ in missing:
            row = {"id": i, "sample": 0, "reward": 0.5, "status": "ok", "grader": "test"}
            yield row | {"rollout": f"{seed} " * 20}

    keys = [(str(i), 0) for i in range(RECORDS)]
    files.fill(out, "rewards", keys, work, {"seed": seed})


TRAIN = (
    "--method sft --model {toy}/student --rollouts {toy}/clean.jsonl --steps 6 --save-every 1 "
    "--batch-size 8 --learning-rate 1e-3 --seed {seed} --out {out}"
)
# {out} is what it writes; every command is small enough to be run hundreds of times
COMMANDS = {
    "opd.files.fill": (write_records, "{out} {seed}"),
    "rollout.py": (
        rollout.main,
        "--model {toy}/student --prompts {toy}/train.jsonl --n 2 --max-tokens 12 "
        "--batch-tokens 100 --seed {seed} --out {out}",
    ),
    "teacher.py answer": (
        teacher.main,
        "answer --model {toy}/teacher --prompts {toy}/train.jsonl --n 1 --max-tokens 12 "
        "--batch-tokens 100 --seed {seed} --out {out}",
    ),
    "teacher.py score": (
        teacher.main,
        "score --model {toy}/teacher --rollouts {rollouts} --batch-tokens 64 --out {out}",
    ),
    "rubric.py grade": (
        rubric.main,
        "grade --grader answer --prompts {toy}/train.jsonl --rollouts {rollouts} --out {out}",
    ),
    "eval.py": (
        evaluation.main,
        "--prompts {toy}/train.jsonl --rollouts {rollouts} --out {out}",
    ),
    "train.py": (train.main, TRAIN),
    "methods.gad train": (
        gad.main,
        "train --model {toy}/student --rollouts {rollouts} --data {answers} --save-every 1 "
        "--batch-size 4 --learning-rate 1e-3 --seed {seed} --out {out}",
    ),
}


# ---- the world, and what a command writes


class World:
    """The inputs of all commands, and what each writes undisturbed."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.paths = {name: self.folder / name for name in ("toy", "rollouts", "answers")}
        self.case = self.folder / "case"
        self.references = {}
        small = "--train-prompts 12 --eval-prompts 4 --clean 100 --mixed 20 --out"
        sums.main([*small.split(), str(self.paths["toy"])])
        for name, command in (("rollouts", "rollout.py"), ("answers", "teacher.py answer")):
            self.call(command, self.paths[name])

    def words(self, command, out, seed=0):
        return COMMANDS[command][1].format(**self.paths, out=out, seed=seed).split()

    def call(self, command, out, seed=0, more=()):
        return COMMANDS[command][0]([*self.words(command, out, seed), *more])

    def new_case(self):
        """An empty folder, and what a command shall write in it."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        return self.case / "out"

    def reference(self, command, seed=0):
        """What the command writes when nothing disturbs it."""
        if (command, seed) not in self.references:
            out = self.new_case()
            with contextlib.redirect_stdout(io.StringIO()):
                self.call(command, out, seed)
            self.references[command, seed] = content(out)
        return self.references[command, seed]


def content(out):
    """{key: record} of a file, {name: bytes} of a model folder; and how many keys stand
    twice."""
    if out.is_dir():
        paths = [p for p in out.rglob("*") if p.suffix in (".safetensors", ".jsonl")]
        return {str(p.relative_to(out)): p.read_bytes() for p in paths}, 0
    if not out.exists():
        return {}, 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    found = {(str(row["id"]), row["sample"]): row for row in rows}
    return found, len(rows) - len(found)


def same(a, b):
    """Equal, but for the last bits of numbers that come out of a batched matrix product."""
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) < 1e-4
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return a == b


def compare(out, references):
    """{"lost", "doubled", "mixed"}: records, or files of a model folder, against the nearest
    of the references."""
    found, doubled = content(out)
    counts = []
    for wanted, _ in references:
        lost = len(wanted.keys() - found.keys())
        mixed = sum(key not in wanted or not same(found[key], wanted[key]) for key in found)
        counts.append({"lost": lost, "doubled": doubled, "mixed": mixed})
    return min(counts, key=lambda c: sum(c.values()))


# ---- processes


class Ended(NamedTuple):
    code: int | str  # -9: killed; "hangs"
    errors: str

    @property
    def wrong(self):
        """Neither done, nor killed, nor refused in one line."""
        line = self.errors.startswith("error: ") and self.errors.count("\n") == 1
        return not (self.code in (0, -signal.SIGKILL) or self.code == 2 and line)


class Process:
    """A command in a forked process.  prepare: what is done there first."""

    def __init__(self, world, command, out, seed=0, more=(), prepare=None):
        self.log = tempfile.TemporaryFile("w+")
        self.id = os.fork()
        if not self.id:
            code = 1
            try:
                sys.stdout = open(os.devnull, "w")
                sys.stderr = self.log
                if prepare:
                    prepare()
                cli.run(lambda: world.call(command, out, seed, more))
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                self.log.flush()
                os._exit(code)

    def wait(self):
        deadline = time.time() + HANGS
        status = None
        while status is None:
            pid, found = os.waitpid(self.id, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(found)
            elif time.time() > deadline:
                os.kill(self.id, signal.SIGKILL)
                os.waitpid(self.id, 0)
                status = "hangs"
            else:
                time.sleep(0.001)
        self.log.seek(0)
        with self.log:
            return Ended(status, self.log.read())


def die_at(count, folder, tell=None):
    """Arranges that this process dies at its count-th change (from 1) below a folder; tell: a
    file that says how many there were."""
    seen = [0]

    def change():
        seen[0] += 1
        if tell:
            tell.write_text(str(seen[0]))
        if seen[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event in CHANGES and str(folder) in str(args[0]):
            change()

    def fsync(descriptor, real=os.fsync):
        change()
        real(descriptor)

    def append_whole(file, lines, real=disk.append_whole):
        if seen[0] + 1 == count:
            file.write(lines[: len(lines) // 2])
        change()
        real(file, lines)

    os.fsync = fsync
    disk.append_whole = append_whole
    if tell:  # counting must not count itself
        tell.touch()
    sys.addaudithook(hook)


# ---- sections: (world, trials, random numbers) -> rows


def row_of(world, fault, command, injected, counts, ended, begun):
    """A line of the results.  counts: a `compare` for each time it came to an end."""
    totals = {name: sum(c[name] for c in counts) for name in ("lost", "doubled", "mixed")}
    tracebacks = sum("Traceback" in e.errors for e in ended)
    wrong = sum(e.wrong for e in ended)
    harmed = sum(any(c.values()) for c in counts) + max(tracebacks, wrong)
    row = {"fault": fault, "command": command, "injected": injected}
    row |= {"survived": max(0, injected - harmed)} | totals
    row |= {"tracebacks": tracebacks, "wrong_ends": wrong}
    return row | {"seconds": round(time.time() - begun, 1)}


def kills(world, trials, draw):
    """Up to five kills of a command, one after the other, then it may end."""
    shares = {"opd.files.fill": 0.7, "train.py": 0.1, "methods.gad train": 0.05}
    for command in COMMANDS:
        begun = time.time()
        reference = world.reference(command)
        tell = world.folder / "changes"
        out = world.new_case()
        Process(world, command, out, prepare=lambda: die_at(0, world.case, tell)).wait()
        changes = int(tell.read_text())
        started = time.time()
        Process(world, command, world.new_case()).wait()
        lasts = time.time() - started
        wanted = max(1, round(trials * shares.get(command, 0.03)))
        ended = []
        counts = []
        killed = 0
        while killed < wanted:
            out = world.new_case()
            for _ in range(draw.randint(1, 5)):
                ended.append(killed_once(world, command, out, changes, lasts, draw))
                killed += ended[-1].code == -signal.SIGKILL
            ended.append(Process(world, command, out).wait())
            counts.append(compare(out, [reference]))
        yield row_of(world, "kill", command, killed, counts, ended, begun)


def killed_once(world, command, out, changes, lasts, draw):
    if draw.random() < 0.5:
        count = draw.randint(1, changes)
        prepare = lambda: die_at(count, world.case)  # noqa: E731
        return Process(world, command, out, prepare=prepare).wait()
    process = Process(world, command, out)
    time.sleep(draw.uniform(0, lasts))
    os.kill(process.id, signal.SIGKILL)
    return process.wait()


def power_cuts(world, trials, draw):
    """Every command is recorded once; each cut restores what the disk may hold."""
    shares = {"train.py": 0.4, "methods.gad train": 0.2}
    for command in COMMANDS:
        begun = time.time()
        reference = world.reference(command)
        out = world.new_case()
        kept = world.folder / "cuts"
        shutil.rmtree(kept, ignore_errors=True)
        cuts = max(1, round(trials * shares.get(command, 0.1)))
        promised = record_cuts(world, command, out, kept, cuts, draw.random())
        ended = []
        counts = []
        for number in range(cuts):
            out = world.new_case()
            shutil.rmtree(world.case)
            (kept / str(number)).rename(world.case)
            if number in promised:  # it had said that it was done
                counts.append(compare(out, [reference]))
            ended.append(Process(world, command, out).wait())
            counts.append(compare(out, [reference]))
        yield row_of(world, "power cut", command, cuts, counts, ended, begun)


def record_cuts(world, command, out, kept, count, seed):
    """Leaves in kept/0, kept/1, ... what a disk may hold; returns the numbers of those cuts
    that came after the end.  In a process of its own: an audit hook stays for ever."""
    child = os.fork()
    if not child:
        try:
            with contextlib.redirect_stdout(io.StringIO()), Recorder(world.case) as recorder:
                world.call(command, out)
            ended = []
            for number, cut in enumerate(recorder.cuts(count, seed)):
                cut.restore(kept / str(number))
                if cut.ended:
                    ended.append(number)
            (kept / "ended").write_text(json.dumps(ended))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return json.loads((kept / "ended").read_text())


def races(world, trials, draw):
    """Two processes and one output; then the one that was first in line is run again."""
    for command in ("train.py", "methods.gad train", "opd.files.fill", "rollout.py"):
        begun = time.time()
        lasts = 0.02 if command == "opd.files.fill" else 0.5
        ended = []
        counts = []
        rounds = max(1, round(trials * (0.4 if command == "train.py" else 0.2)))
        references = [world.reference(command, seed) for seed in (0, 1)]
        for number in range(rounds):
            out = world.new_case()
            seed = number % 2  # the same settings, or others
            more = ["--overwrite"] if number % 3 == 2 and command != "opd.files.fill" else []
            first = Process(world, command, out)
            time.sleep(draw.choice([0, draw.uniform(0, lasts)]))
            second = Process(world, command, out, seed, more)
            both = [first.wait(), second.wait()]
            ended += both
            if all(e.code for e in both):
                counts.append({"lost": 1, "doubled": 0, "mixed": 0})  # one may go on
            else:
                counts.append(compare(out, references))
        yield row_of(world, "race of two", command, rounds, counts, ended, begun)


def full_disks(world, trials, draw):
    """A limit is met, then there is room."""
    for command in COMMANDS:
        begun = time.time()
        reference = world.reference(command)
        largest = max(p.stat().st_size for p in world.case.rglob("*") if p.is_file())
        ended = []
        counts = []
        injected = max(1, round(trials * (0.3 if command == "train.py" else 0.1)))
        for _ in range(injected):
            out = world.new_case()
            limit = draw.randint(1, largest)

            def prepare():
                # the log is no file on the disk that is full
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            ended.append(limited(world, command, out, prepare))
            ended.append(Process(world, command, out).wait())
            counts.append(compare(out, [reference]))
        yield row_of(world, "full disk", command, injected, counts, ended, begun)
    yield from full_file_systems(world, trials, draw)


def limited(world, command, out, prepare):
    """A process whose standard error is a pipe, which has no size."""
    reader, writer = os.pipe()

    def all_of_it():
        sys.stderr = os.fdopen(writer, "w", buffering=1)
        prepare()

    ended = Process(world, command, out, prepare=all_of_it).wait()
    os.close(writer)
    with os.fdopen(reader) as f:
        return Ended(ended.code, f.read())


def full_file_systems(world, trials, draw):
    """train.py into a tmpfs that is too small, then is not."""
    begun = time.time()
    reference = world.reference("train.py")
    place = world.folder / "small"
    place.mkdir(exist_ok=True)
    ended = []
    counts = []
    injected = max(1, trials // 5)
    for _ in range(injected):
        size = f"size={draw.randint(20, 1500)}k"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "tmpfs", place], capture_output=True
        )
        if mounted.returncode:
            yield {"fault": "full tmpfs", "command": "train.py", "skipped": "needs root"}
            return
        try:
            ended.append(Process(world, "train.py", place / "out").wait())
            subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
            ended.append(Process(world, "train.py", place / "out").wait())
            counts.append(compare(place / "out", [reference]))
        finally:
            subprocess.run(["umount", place], check=True)
    yield row_of(world, "full tmpfs", "train.py", injected, counts, ended, begun)


def servers(world, trials, draw):
    """Every stage that asks a server, against one that fails or dies."""
    yield from faults_server.run(short=trials < 60, seed=draw.randrange(1000))


# name: (function, trials, trials with --short)
SECTIONS = {
    "kills": (kills, 1000, 8),
    "power": (power_cuts, 64, 6),
    "races": (races, 52, 3),
    "disk": (full_disks, 30, 3),
    "server": (servers, 60, 4),
}


# ---- the command line


def table(rows):
    """The rows as Markdown, summed over the commands of a fault."""
    names = ("injected", "survived", "lost", "doubled", "mixed", "tracebacks")
    lines = [
        "| fault | commands | " + " | ".join(names) + " |",
        "|---|---" + "|---" * len(names) + "|",
    ]
    for fault in dict.fromkeys(row["fault"] for row in rows):
        some = [row for row in rows if row["fault"] == fault and "skipped" not in row]
        sums_of = [str(sum(row[name] for row in some)) for name in names]
        commands = ", ".join(row["command"] for row in some)
        lines.append(f"| {fault} | {commands} | " + " | ".join(sums_of) + " |")
    return "\n".join(lines)


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    p.add_argument("--short", action="store_true", help="a few faults of each kind")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", help="also append the lines here")
    args = p.parse_args(argv)
    torch.set_num_threads(1)  # threads do not survive a fork
    tqdm.set_lock(threading.RLock())  # its own is shared by all processes, killed ones too
    tqdm.monitor_interval = 0
    rows = []
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # an fsync costs nothing there
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            world = World(folder)
        for name in args.sections:
            section, full, short = SECTIONS[name]
            draw = random.Random(f"{name} {args.seed}")
            with contextlib.redirect_stdout(sys.stderr):
                for row in section(world, short if args.short else full, draw):
                    rows.append({"section": name} | row)
                    print(json.dumps(rows[-1]), flush=True)
                    if args.out:
                        with open(args.out, "a", encoding="utf-8") as f:
                            f.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))
    return int(any(row.get("survived") != row.get("injected") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
