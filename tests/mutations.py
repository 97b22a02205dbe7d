"""One line of a valid file, changed in every way that it can be wrong, against every command
that reads such a file; test_mutations.py runs a part of it.

A changed line is either refused, by `opd.files.read` or by name in the stage, or the stage goes
on with it and every number that it prints is finite and of a sane size.  Everything else is
told: a traceback, or nonsense that trains in silence.
"""

import base64
import collections
import contextlib
import io
import json
import math
import shutil
import tempfile
import traceback
from pathlib import Path

import numpy as np
from conftest import argv, dump, load

import eval as eval_stage
import rollout
import rubric
import teacher
import train
from experiments import report, weight_controls
from methods import gad, prefix, sparse_to_dense
from methods.simct import __main__ as simct
from methods.sod import __main__ as sod
from opd import files, records

# ---- what can be wrong with a line

NUMERALS = ("1e400", "-1e400", "1" + "0" * 400, "NaN", "-Infinity")  # as a file may spell them
VALUES = {
    **{f"numeral {text[:5]}": f"@{text}@" for text in NUMERALS},
    **{f"{x!r:.12}": x for x in (None, True, False, 0, 1, 2, -1, 0.5, 1.5, 5.0, -0.0, -1e30)},
    **{f"{x!r}": x for x in (99, 10**6, 2**31, 2**63, 10**30, -(2**63), 1e-320, 1e30, 1e308)},
    **{f"{x!r}": x for x in ("", "x", "\0", "\ud800", "ok\n", [], {}, [[]], [None], {"x": 1})},
    "deep": [[[[{"x": [[[]]]}]]]],
    "long": "y" * 1_000_000,
    "braces": "{0.__class__} %s \\boxed{ <think>",
    "numbers": [-1.0, -2.0],
}


def places(value, path=()):
    """The paths of all fields of a record, of lists the first and the last element."""
    if path:
        yield path
    if type(value) is dict:
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    if type(value) is list:
        for index in {0, len(value) - 1} if value else ():
            yield from places(value[index], (*path, index))


def changed(record, path, change):
    """A copy of the record with change(container, key) done at a path."""
    record = json.loads(json.dumps(record))
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return record


def setting(value):
    def change(inner, key):
        inner[key] = value

    return change


def removal(inner, key):
    del inner[key]


def of_list(value):
    """Lists near one."""
    yield "shorter", value[:-1]
    yield "longer", value + value[-1:]
    yield "twice", value + value
    yield "nested", [value]
    yield "turned", value[::-1]
    yield "first again", value[:1] * len(value)
    if value and all(type(x) in (int, float) for x in value):
        yield "floats", [x + 0.5 for x in value]
        yield "plus five", [x + 5 for x in value]
        yield "minus", [-x - 1 for x in value]
        yield "low", [-1e30] * len(value)
        yield "zero", [0] * len(value)
        yield "one", [1] * len(value)


def of_packed(packed):
    """Packed arrays near one."""
    array = records.unpack(packed)
    for dtype in records.PACKABLE:
        yield f"as {dtype}", records.pack(array.astype(dtype))
    for name in ("object", "int8", "complex64", "<f4", "U1"):
        yield f"dtype {name}", packed | {"dtype": name}
    rows, *rest = packed["shape"]
    for shape in ([], [rows], [rows, -1], [rows, 10**12], [rows, *rest, 1], [rest[0], rows]):
        yield f"shape {shape}", packed | {"shape": shape}
    yield "huge shape", packed | {"shape": [10**30, 0]}
    for cut in (array[:-1], array[:, :-1], array[:, :1], array[:, :0], array[:0]):
        yield f"cut to {cut.shape}", records.pack(cut)
    yield "flat", records.pack(array.reshape(-1))
    yield "one column", records.pack(np.repeat(array[:, :1], array.shape[1], 1))
    yield "turned", records.pack(array[:, ::-1])
    for x in (5, -5, 100, 30_000):
        yield f"plus {x}", records.pack((array.astype(float) + x).astype(array.dtype))
    if array.dtype.kind == "f":
        for x in (np.nan, np.inf, -np.inf, -1e30, 0, 1e-3):
            yield f"all {x}", records.pack(np.full_like(array, x))
            one = array.copy()
            one[:1, -1:] = x
            yield f"one {x}", records.pack(one)
    data = packed["data"]
    for text in (data[:-4], data[:-1], data + "AAAA", "*" * len(data), "é", " " + data):
        yield f"data {text[:3]}{len(text)}", packed | {"data": text}
    yield "noise", packed | {"data": base64.b64encode(b"\xff" * (array.nbytes)).decode()}


def mutations(record):
    """Yields (name, changed record) systematically."""
    for path in places(record):
        name = ".".join(map(str, path))
        yield f"{name} gone", changed(record, path, removal)
        inner = record
        for key in path:
            inner = inner[key]
        near = list(VALUES.items())
        if type(inner) is list:
            near += of_list(inner)
        if type(inner) is dict and "dtype" in inner:
            near += of_packed(inner)
        if type(inner) is str:
            near += [("more", inner + "!"), ("less", inner[:-1]), ("spaced", f" {inner} ")]
        if type(inner) in (int, float):
            near += [("more", inner + 1), ("float", float(inner)), ("text", str(inner))]
        for how, value in near:
            yield f"{name}: {how}", changed(record, path, setting(value))


def spelt(record):
    """The record as a line, with numerals as a file may spell them."""
    text = json.dumps(record)
    for numeral in NUMERALS:
        text = text.replace(f'"@{numeral}@"', numeral)
    return text


def spellings(record):
    """Yields (name, line) of lines that are spelt wrongly."""
    text = json.dumps(record)
    for key, value in record.items():
        yield f"{key} doubled", f"{text[:-1]}, {json.dumps(key)}: {json.dumps(value)}}}"
        yield f"{key} doubled as null", f"{text[:-1]}, {json.dumps(key)}: null}}"
    for name, line in {
        "torn": text[: len(text) // 2],
        "two": text + text,
        "list": f"[{text}]",
        "latin": text[:-1] + ', "x": "\udcff"}',
        "zeros": "\0" * 9,
        "NaN": text[:-1] + ', "x": NaN}',
        "deep": text[:-1] + ', "x": ' + "[" * 9999 + "]" * 9999 + "}",
        "surrogate key": text[:-1] + ', "\\ud800": 1}',
        "control": text[:-1] + ', "x": "\x01"}',
    }.items():
        yield name, line


def lines(record):
    """Yields (name, line) of everything above."""
    for name, new in mutations(record):
        yield name, spelt(new)
    yield from spellings(record)


# ---- the world: a valid file of every kind, and who reads it

GRADED = {"prompts": "prompts", "rollouts": "rollouts"}
TRAINED = {"rollouts": "rollouts"}
SUMS = "worlds.predicates"
CREATE = dict(predicates=SUMS, m=2, max_failure_rate=1)


class World:
    """Valid files of every kind in `root`, made from a world of conftest.py."""

    def __init__(self, world, root):
        self.root = root
        self.models = {"base": world.base, "teacher": world.teacher}
        self.models["foreign"] = world.toy / "teacher_merged_digits"
        self.paths = {}
        rollouts = [r for r in load(world.rollouts) if r["sample"] < 2][:4]
        self.add("rollouts", "rollouts", rollouts)
        asked = {r["id"] for r in rollouts}
        self.add("prompts", "prompts", [p for p in load(world.prompts) if p["id"] in asked])
        self.add("episodes", "rollouts", [episode(r) for r in rollouts])
        for name in ("rollouts", "episodes"):
            self.grade(name)
        self.make()

    def add(self, name, kind, rows=None):
        path = self.root / f"{name}.jsonl"
        if rows is not None:
            dump(path, rows)
        self.paths[name] = (path, kind)
        return path

    def __getitem__(self, name):
        return self.paths[name][0]

    def grade(self, name):
        rows = []
        for i, r in enumerate(load(self[name])):
            row = {"id": r["id"], "sample": r["sample"], "reward": i % 2 / 2, "status": "ok"}
            row |= {"rollout": records.fingerprint(r), "grader": "check"}
            rows.append(row | {"verdicts": [True, False], "repeats": [[True, False]] * 2})
        self.add(f"{name}_rewards", "rewards", rows)

    def make(self):
        """The files that stages write."""
        base, big = self.models["base"], self.models["teacher"]
        on = dict(rollouts=self["rollouts"])
        out = self.add("answers", "answers")
        teacher.main(
            argv("answer", model=big, prompts=self["prompts"], n=4, max_tokens=28, out=out)
        )
        words = ("id", "sample", "text", "finish_reason", "policy")
        solved = {p["id"]: p for p in load(self["prompts"])}
        rows = [{k: r[k] for k in words} for r in load(out)]
        for row in rows:
            row["messages"] = solved[row["id"]]["messages"]
            row["policy"] = {"model": "api"}
        self.add("texts", "answers", rows)
        for name, model, flags in (
            ("scores", big, dict(top_k=4)),
            ("reference", base, dict(top_k=1000)),
            ("own", base, dict(top_k=4)),
        ):
            out = self.add(name, "scores")
            teacher.main(argv("score", model=model, out=out, **on, **flags))
        out = self.add("of_own", "scores")
        teacher.main(argv("score", model=big, out=out, top_k_of=self["own"], **on))
        out = self.add("episode_scores", "scores")
        teacher.main(argv("score", model=big, rollouts=self["episodes"], out=out))
        flags = dict(student=base, prompts=self["prompts"], sorted=3, **on)
        out = self.add("units", "scores")
        simct.main(argv("score", model=self.models["foreign"], out=out, **flags))
        out = self.add("weights", "weights")
        flags = dict(scores=self["of_own"], model=base, **on)
        prefix.main(argv("weigh", out=out, **flags))
        out = self.add("step_weights", "weights")
        flags = dict(scores=self["episode_scores"], rollouts=self["episodes"])
        sod.main(argv("weigh", out=out, **flags))
        flags = dict(prompts=self["prompts"], answers=self["answers"], **on)
        out = self.add("rubrics", "rubrics")
        rubric.main(argv("create", out=out, **CREATE, **flags))
        out = self.add("evals", "evals")
        eval_stage.main(argv(prompts=self["prompts"], out=out, **on))
        out = self.add("rewards", "rewards")
        rubric.main(argv("grade", grader="answer", prompts=self["prompts"], out=out, **on))
        flags = dict(prompts=self["prompts"], purpose="rl", **on)
        sparse_to_dense.main(argv("spend", ledger=self.add("labels", "labels"), **flags))
        rows = [
            dict(arm=a, seed=s, step=9, accuracy=0.5, final=True) for a in "ab" for s in (0, 1)
        ]
        self.add("results", "results", rows)
        self.models["critic"] = self.root / "critic"
        flags = dict(data=self["texts"], rollouts=self["rollouts"], out=self.root / "critic")
        gad.main(argv("train", model=base, **flags))


def episode(rollout):
    """The rollout as if its tokens 1 to 3 had come from a tool."""
    end = len(rollout["response_ids"])
    steps = [[0, 1, True], [3, end, None]] if end > 3 else [[0, end, None]]
    mask = [int(any(s <= i < e for s, e, _ in steps)) for i in range(end)]
    calls = [{"name": "calculator", "arguments": {}, "output": "2", "ok": True}]
    return rollout | {"steps": steps, "calls": calls, "loss_mask": mask}


class Reader:
    """A command that reads files of the world: {flag: name of a file}.  resumed: the name of
    the file that it wrote, and goes on with."""

    def __init__(self, main, words=(), reads=None, models=None, resumed=None, **flags):
        self.main = main
        self.words = words
        self.reads = reads or {}
        self.models = models or {}
        self.resumed = resumed
        self.flags = flags

    def names(self):
        return {*self.reads.values()} | ({self.resumed} if self.resumed else set())


def training(method, **reads):
    """train.py with a method."""
    flags = dict(reads=TRAINED | reads, models={"model": "base"}, method=method, epochs=1)
    return Reader(train.main, fresh_optimizer=True, **flags)


def readers():
    """{name: Reader} of every command that reads records."""
    rewards, scores = {"rewards": "rollouts_rewards"}, {"scores": "scores"}
    data = {"data": "texts"}
    of_own = {"rollouts": "rollouts", "scores": "of_own"}
    steps = {"rollouts": "episodes", "scores": "episode_scores"}
    small = dict(max_tokens=4, n=1)
    student, big = {"model": "base"}, {"model": "teacher"}
    created = GRADED | {"answers": "answers"}
    unit_reads = {"rollouts": "rollouts", "prompts": "prompts", "top-k-of": "own"}
    pair = {"model": "foreign", "student": "base"}
    return {
        "rollout": Reader(rollout.main, (), {"prompts": "prompts"}, student, **small),
        "answer": Reader(teacher.main, ["answer"], {"prompts": "prompts"}, big, **small),
        "answer resumed": Reader(
            teacher.main, ["answer"], {"prompts": "prompts"}, big, "answers", n=4, max_tokens=28
        ),
        "score": Reader(teacher.main, ["score"], TRAINED, big, top_k=3),
        "score resumed": Reader(teacher.main, ["score"], TRAINED, big, "scores", top_k=4),
        "score of": Reader(teacher.main, ["score"], TRAINED | {"top-k-of": "own"}, big),
        "score of resumed": Reader(
            teacher.main, ["score"], TRAINED | {"top-k-of": "own"}, big, "of_own"
        ),
        "score hint": Reader(
            teacher.main, ["score"], GRADED, big, hint="{question} {answer} {solution}"
        ),
        "create": Reader(rubric.main, ["create"], created, **CREATE),
        "create resumed": Reader(rubric.main, ["create"], created, None, "rubrics", **CREATE),
        "check": Reader(
            rubric.main,
            ["grade"],
            created | {"rubrics": "rubrics"},
            grader="check",
            predicates=SUMS,
        ),
        "frozen": Reader(
            rubric.main,
            ["grade"],
            GRADED | {"rubrics": "rubrics"},
            grader="check",
            predicates=SUMS,
            frozen_rubrics=True,
        ),
        "grade": Reader(rubric.main, ["grade"], GRADED, None, "rewards", grader="answer"),
        "eval": Reader(eval_stage.main, (), GRADED | rewards, partial=True),
        "eval resumed": Reader(eval_stage.main, (), GRADED, None, "evals"),
        "eval texts": Reader(eval_stage.main, (), {"rollouts": "texts", "prompts": "prompts"}),
        "sft": training("sft", rollouts="texts"),
        "sft prompts": training("sft", rollouts="prompts"),
        "sft answers": training("sft", rollouts="answers", prompts="prompts"),
        "ropd": training("ropd", **rewards),
        "opd": training("opd", **scores),
        "opd-full": training("opd-full", scores="reference"),
        "dagger": training("dagger", **scores),
        "dpo": training("dpo", reference="reference", **rewards),
        "release": training("release", token_weights="weights", **scores),
        "stable-opd": training("stable-opd", reference="reference", **scores, **data),
        "gkd": training("gkd", data="rollouts", data_scores="scores", **scores),
        "simct": training("simct", scores="units"),
        "uld": training("uld", scores="units"),
        "sod": training(
            "sod",
            rollouts="episodes",
            rewards="episodes_rewards",
            scores="episode_scores",
            token_weights="step_weights",
        ),
        "prefix": Reader(prefix.main, ["weigh"], of_own, student, "weights"),
        "spread": Reader(prefix.main, ["weigh"], of_own, student, signal="spread"),
        "sod weigh": Reader(sod.main, ["weigh"], steps, None, "step_weights"),
        "controls": Reader(
            weight_controls.main,
            (),
            {"weights": "weights", "rollouts": "rollouts"},
            rule="suffix",
        ),
        "gad train": Reader(gad.main, ["train"], TRAINED | data, student),
        "gad grade": Reader(
            gad.main,
            ["grade"],
            {"rollouts": "rollouts", "answers": "texts"},
            {"discriminator": "critic"},
        ),
        "units": Reader(simct.main, ["score"], unit_reads, pair, sorted=3),
        "units resumed": Reader(simct.main, ["score"], GRADED, pair, "units", sorted=3),
        "align": Reader(
            simct.main, ["align"], TRAINED, {"student": "base", "teacher": "foreign"}, out=None
        ),
        "spend": Reader(
            sparse_to_dense.main,
            ["spend"],
            GRADED | {"ledger": "labels"},
            purpose="rl",
            out=None,
        ),
        "report": Reader(report.main, ["table"], {"": "results"}, out=None, baseline="a"),
    }


# ---- a run


def numbers(value):
    """All numbers in a summary."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, (int, float)):
        yield value


def outcome(world, reader, name, line, row, place):
    """What a command makes of a file whose line `row` has been changed: "refused", "works", or
    what is wrong in words.  place: an empty folder."""
    path = world[name]
    given = place / path.name
    rows = path.read_bytes().splitlines(keepends=True)
    rows[row] = line.encode("utf-8", "surrogateescape") + b"\n"
    given.write_bytes(b"".join(rows))
    flags = {
        flag: given if file == name else world[file] for flag, file in reader.reads.items()
    }
    flags |= {flag: world.models[model] for flag, model in reader.models.items()}
    out = place / "out"
    if reader.resumed:
        out = given if reader.resumed == name else place / world[reader.resumed].name
        for suffix in ("", ".run.json"):
            source = Path(f"{world[reader.resumed]}{suffix}")
            if not Path(f"{out}{suffix}").exists():
                shutil.copy(source, f"{out}{suffix}")
    words = [*reader.words, *filter(None, [flags.pop("", None)])]
    flags |= {"out": out} | reader.flags
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            summary = reader.main(argv(*words, **flags))
    except records.BadInput:
        return "refused"
    except SystemExit as stop:
        return "refused" if stop.code == 2 else f"exit {stop.code}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if str(Path(__file__).parents[1]) in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"{where} {type(error).__name__}: {str(error)[:120]}"
    found = list(numbers(summary))
    metrics = out / "metrics.jsonl"
    if metrics.exists():
        found += numbers(load(metrics))
    wild = [x for x in found if not math.isfinite(x) or abs(x) > 1e8]
    return f"absurd: {wild[:3]}" if wild else "works"


def readable(path, kind):
    """Whether `check` takes a file: (yes, None) or (no, None); a traceback in words."""
    try:
        collections.deque(files.read(path, kind, unfinished=True), 0)
        return True, None
    except records.BadInput:
        return False, None
    except Exception as error:
        return False, f"check: {type(error).__name__}: {str(error)[:120]}"


def check(world, name, line, row, place):
    path, kind = world.paths[name]
    rows = path.read_bytes().splitlines(keepends=True)
    rows[row] = line.encode("utf-8", "surrogateescape") + b"\n"
    given = place / "check.jsonl"
    given.write_bytes(b"".join(rows))
    return readable(given, kind)


class Trial:
    """Keeps one example of each defect."""

    def __init__(self, world, root):
        self.world = world
        self.root = root
        self.readers = readers()
        self.defects = {}

    def check(self, name, line, row=0):
        """Whether `check` takes the line."""
        with tempfile.TemporaryDirectory(dir=self.root) as place:
            taken, wrong = check(self.world, name, line, row, Path(place))
        if wrong:
            self.note(wrong, name, line)
        return taken

    def run(self, command, name, how, line, row=0):
        with tempfile.TemporaryDirectory(dir=self.root) as place:
            reader = self.readers[command]
            found = outcome(self.world, reader, name, line, row, Path(place))
        if found not in ("works", "refused"):
            self.note(f"{command}: {found}", name, how)
        return found

    def note(self, wrong, name, how):
        if wrong not in self.defects:
            self.defects[wrong] = [0, f"{name}: {how[:100]}"]
            print(f"  {wrong}   <- {name}: {how[:100]}", flush=True)
        self.defects[wrong][0] += 1

    def of(self, name):
        """Names of the commands that read a file."""
        return [c for c, reader in self.readers.items() if name in reader.names()]
