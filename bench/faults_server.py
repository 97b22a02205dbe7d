"""Faults of servers: every stage that asks one meets a server that fails, lies, dies and
returns.

    python -m bench.faults_server            # minutes; --short: seconds
    -> {"fault": "server: 20% of replies", "command": "rollouts", "injected": 412,
        "survived": 412, "lost": 0, "doubled": 0, "mixed": 0, "tracebacks": 0, "runs": 2}

A stage is run, and run again as a person would, until its file is complete.  Then the file is
compared with that of a server without faults: `lost` are keys without a record (or with a null
reward), `doubled` keys on two lines, `mixed` records that differ, `tracebacks` exceptions other
than the one-line refusal.  `survived` counts the faults, if nothing is lost, doubled or mixed
and there is no traceback.
"""

import contextlib
import hashlib
import io
import json
import math
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fake_server import FakeServer, distribution  # noqa: E402

import eval as evaluation  # noqa: E402
import rollout  # noqa: E402
import rubric  # noqa: E402
import teacher  # noqa: E402
from opd import cli, served  # noqa: E402
from opd.policy import load_tokenizer, vocabulary_size  # noqa: E402
from opd.records import BadInput  # noqa: E402
from worlds import sums  # noqa: E402

ANY = ("429", "500", "hang", "torn", "cut", "not_json", "array", "no_choices")
ANY += ("broken_stream", "filtered")
SAMPLED = ANY + ("few_logprobs", "no_logprobs", "no_token_ids", "high_logprobs")
SAMPLED += ("unknown_ids", "other_text")
SCORED = ("429", "500", "hang", "torn", "cut", "not_json", "array", "no_choices")
SCORED += ("no_prompt_logprobs", "short_prompt_logprobs", "wrong_prompt_logprobs")
SCORED += ("high_logprobs", "unknown_ids")
MOST_RUNS = 30

# ---- what a server without faults says


def digit(*values):
    return hashlib.sha256(json.dumps(values).encode()).digest()[0] % 10


def reply(body):
    """A student, a teacher or a judge, whose words depend on what it is asked."""
    if "messages" not in body:
        return "#1"
    asked = body["messages"][1 if len(body["messages"]) > 1 else 0]["content"]
    if not asked.startswith("{"):
        return f"#{digit(asked, body['seed'])}"
    data = json.loads(asked)
    if "attempts" in data:
        criteria = [
            {"id": f"c{i}", "category": "Task Completion", "points": i}
            | {"criterion": f"thing {i} of {digit(asked)}"}
            for i in (1, 2, 3, 4)
        ]
        return json.dumps({"criteria": criteria})
    if "answers" in data:
        verdicts = [
            {"answer_index": i, "judgement": judgement(answer["text"])}
            for i, answer in enumerate(data["answers"], 1)
        ]
        return json.dumps({"verdicts": verdicts})
    if "criteria" in data:
        return json.dumps({"judgement": judgement(data["answer"])})
    return json.dumps({"score": digit(data["answer"])})


def judgement(text):
    return [digit(text, i) % 2 == 0 for i in range(4)]


# ---- the stages that ask a server


class Stages:
    """A small world in `folder`, and each stage with the flags that it asks a server with.
    Inputs of a stage are the outputs of those before it in `clean`."""

    def __init__(self, folder, problems, n):
        self.folder = folder
        toy = folder / "toy"
        sizes = {"train-prompts": problems, "eval-prompts": 1, "clean": 4, "mixed": 4}
        with contextlib.redirect_stdout(io.StringIO()):
            sums.main(words(out=toy, **sizes))
        self.student = toy / "student"
        self.tokenizer = load_tokenizer(self.student)
        self.prompts = toy / "train.jsonl"
        self.n = n

    def fake(self, **options):
        """A server that speaks this world's vocabulary."""
        size = vocabulary_size(self.tokenizer)

        def rows(prefix):
            logprobs = (distribution(prefix) * size)[:size]
            total = math.log(sum(map(math.exp, logprobs)))
            return [value - total for value in logprobs]

        return FakeServer(reply, distribution=rows, **options)

    def plan(self, out):
        """{name: (main, words without the server's, file, faults, whether the server speaks in
        tokens)} of each stage, which writes to `out`."""
        clean = self.folder / "clean"
        student = dict(model=self.student, prompts=self.prompts, n=self.n)
        student["max-tokens"] = 8
        judge = dict(model="j", prompts=self.prompts, rollouts=clean / "rollouts.jsonl")
        grade = ["grade", *words(**judge, rubrics=clean / "rubrics.jsonl")]
        create = judge | dict(answers=clean / "answers.jsonl", m=1, rubricator="llm")
        score = dict(model=self.student, rollouts=clean / "rollouts.jsonl")
        score["top-k"] = 3
        return {
            "rollouts": (rollout.main, words(**student), SAMPLED, True),
            "answers": (teacher.main, ["answer", *words(**student)], ANY, False),
            "scores": (teacher.main, ["score", *words(**score)], SCORED, False),
            "rubrics": (rubric.main, ["create", *words(**create)], ANY, False),
            "rewards": (rubric.main, [*grade, "--grader", "judge"], ANY, False),
            "single": (rubric.main, [*grade, "--grader=judge", "--mode=single"], ANY, False),
            "scalar": (rubric.main, [*grade, "--grader", "scalar"], ANY, False),
            "evals": (evaluation.main, words(**student), SAMPLED, True),
        }

    def run(self, name, out, fake, **more):
        """Runs one stage once; `more`: the server's flags."""
        main, given, _, in_tokens = self.plan(out)[name]
        fake.tokenizer = self.tokenizer if in_tokens else None
        flags = {"base-url": fake.base_url, "timeout": 30, "max-failure-rate": 0.3} | more
        out.mkdir(exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            main([*given, *words(out=out / f"{name}.jsonl", **flags)])


def words(**flags):
    return [f"--{name}={value}" for name, value in flags.items()]


# ---- faults


def faults(kinds, rate, seed):
    """An endless script for a FakeServer: a fault with this rate, of a random kind."""
    draw = random.Random(seed)
    while True:
        yield draw.choice(kinds) if draw.random() < rate else "normal"


def counted(script, seen):
    for behaviour in script:
        if behaviour != "normal":
            seen.append(behaviour)
        yield behaviour


class Dying:
    """A server that is gone for `away` seconds after every `after` requests."""

    def __init__(self, stages, after, away):
        self.stages = stages
        self.after = after
        self.away = away
        self.deaths = 0

    def __enter__(self):
        self.closing = threading.Event()
        self.up = self.stages.fake().__enter__()
        self.base_url = self.up.base_url
        self.watch = threading.Thread(target=self.live, daemon=True)
        self.watch.start()
        return self

    def live(self):
        while not self.closing.wait(0.005):
            if len(self.up.requests) >= self.after:
                tokenizer = self.up.tokenizer
                self.up.__exit__()
                time.sleep(self.away)
                port = int(self.base_url.split(":")[2].split("/")[0])
                self.up = self.stages.fake(port=port).__enter__()
                self.up.tokenizer = tokenizer
                self.deaths += 1

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "tokenizer":
            self.up.tokenizer = value

    def __exit__(self, *_):
        self.closing.set()
        self.watch.join()
        self.up.__exit__()


def until_complete(stages, name, out, fake, **flags):
    """Runs a stage again until nothing is missing: (runs, tracebacks)."""
    tracebacks = 0
    for run in range(1, MOST_RUNS + 1):
        try:
            stages.run(name, out, fake, **flags)
        except BadInput:
            continue
        except Exception as error:
            tracebacks += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        if not missing(stages, name, out):
            break
    return run, tracebacks


def rows_of(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def key_of(row):
    return row["id"], row.get("sample")


def missing(stages, name, out):
    """Keys of a clean file that the other lacks, or has as a null reward."""
    wanted = {key_of(row) for row in rows_of(stages.folder / "clean" / f"{name}.jsonl")}
    rows = rows_of(out / f"{name}.jsonl")
    return wanted - {key_of(row) for row in rows if row.get("reward", 0) is not None}


def compare(stages, name, out):
    """{lost, doubled, mixed} against the clean file."""
    clean = {key_of(row): row for row in rows_of(stages.folder / "clean" / f"{name}.jsonl")}
    rows = rows_of(out / f"{name}.jsonl")
    return {
        "lost": len(missing(stages, name, out)),
        "doubled": len(rows) - len({key_of(row) for row in rows}),
        "mixed": sum(row != clean.get(key_of(row)) for row in rows),
    }


def result(stages, name, out, fault, injected, runs, tracebacks):
    row = {"fault": f"server: {fault}", "command": name, "injected": injected}
    found = compare(stages, name, out) | {"tracebacks": tracebacks}
    row["survived"] = 0 if any(found.values()) else injected
    return row | found | {"runs": runs}


# ---- the section


@contextlib.contextmanager
def short_pauses():
    """Retries come at once, as those of a server that answers Retry-After: 0."""
    before = served.FIRST_PAUSE, served.LONGEST_PAUSE
    served.FIRST_PAUSE, served.LONGEST_PAUSE = 0.01, 0.3
    try:
        yield
    finally:
        served.FIRST_PAUSE, served.LONGEST_PAUSE = before


def run(short=False, rate=0.2, seed=0):
    """Yields a row for every stage and fault."""
    problems, n = (4, 2) if short else (60, 4)
    with tempfile.TemporaryDirectory() as folder, short_pauses():
        stages = Stages(Path(folder), problems, n)
        names = list(stages.plan(stages.folder))
        with stages.fake() as fake:
            for name in names:
                stages.run(name, stages.folder / "clean", fake)
        for number, name in enumerate(names):
            seen = []
            script = counted(faults(stages.plan(folder)[name][2], rate, seed + number), seen)
            out = stages.folder / "faulty"
            with stages.fake(script=script) as fake:
                done = until_complete(
                    stages, name, out, fake, **{"max-retries": 1, "timeout": 1}
                )
            yield result(stages, name, out, f"{rate:.0%} of replies", len(seen), *done)
        for name in names:
            out = stages.folder / "dying"
            with Dying(stages, 5 if short else 40, 0.1) as dying:
                done = until_complete(stages, name, out, dying, concurrency=4)
            yield result(stages, name, out, "dies and returns", dying.deaths, *done)


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--short", action="store_true", help="seconds instead of minutes")
    args = p.parse_args(argv)
    for row in run(args.short):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
