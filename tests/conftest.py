"""A tiny world for the tests: problems, two models pre-trained for seconds, rollouts of one,
scores by the other.

Helpers here are the independent side of the tests: plain transformers in float64, one unpadded
sequence at a time."""

import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

# before torch is imported, here and in the stages run as programs
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# before triton is imported: without a GPU its kernels run in the interpreter
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rollout  # noqa: E402
import teacher  # noqa: E402
import train  # noqa: E402
from opd import files, records  # noqa: E402
from worlds import agents as agent_world  # noqa: E402
from worlds import sums  # noqa: E402


def load(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def dump(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def by_key(rows):
    """{(id, sample): record}; a doubled key fails."""
    out = {(r["id"], r["sample"]): r for r in rows}
    assert len(out) == len(rows), "a key stands twice"
    return out


def argv(*parts, **flags):
    """argv("score", model=M, top_k=3, allow_stale=True) -> ["score", "--model", M, "--top-k",
    "3", "--allow-stale"]"""
    out = [str(p) for p in parts]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        out.append("--" + name.strip("_").replace("_", "-"))
        if value is not True:
            out.append(str(value))
    return out


def refusal(main, arguments, capsys):
    """The one-line message with which a stage, run as a program, refuses: exit code 2, no
    traceback."""

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        files.run(lambda: main(arguments))
    message = capsys.readouterr().err
    assert stop.value.code == 2, message
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


def program(stage, arguments):
    """A stage as a person runs it: `python stage.py ...` in the repository."""
    return [sys.executable, stage, *map(str, arguments)]


def run_program(stage, arguments):
    return subprocess.run(
        program(stage, arguments), cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def kill_while_writing(stage, arguments, after):
    """Runs a stage that kills itself (SIGKILL) half-way through a line, once `after` records
    are on disk."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import json
from opd import files
import {stage} as stage
written, write = [0], files.Writer.write
def dying(self, *rows):
    for row in rows:
        if written[0] == {after}:
            self._file.write(json.dumps(row).encode()[:50])
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, row)
        written[0] += 1
files.Writer.write = dying
files.run(lambda: stage.main({[str(a) for a in arguments]!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -9, done.stderr


# ---- references


def naive_model(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def naive_logps(model, prompt_ids, response_ids, temperature=1.0):
    """log_softmax(logits / temperature) at every response position, [T, V] float64: no padding,
    no cache, no kernel."""
    import torch

    logits = model(torch.tensor([prompt_ids + response_ids])).logits[0]
    return torch.log_softmax(logits / temperature, -1)[
        len(prompt_ids) - 1 : len(prompt_ids) + len(response_ids) - 1
    ]


def naive_own(model, rollout, temperature=1.0):
    """log-probs of the response tokens, [T] as a list of floats."""
    import torch

    with torch.no_grad():
        table = naive_logps(model, rollout["prompt_ids"], rollout["response_ids"], temperature)
    return [float(table[t, i]) for t, i in enumerate(rollout["response_ids"])]


def weights(folder):
    """{name: tensor} of a saved model's parameters."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_bits(a, b):
    import torch

    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def make_rewards(rollouts, path, reward=None):
    """Rewards for a rollouts file: reward(record), by default a number in [0, 1] drawn from the
    key's hash."""

    rows = []
    for r in load(rollouts):
        value = (
            (hashlib.sha256(f"{r['id']}/{r['sample']}".encode()).digest()[0] / 255)
            if reward is None
            else reward(r)
        )
        rows.append(
            {
                "id": r["id"],
                "sample": r["sample"],
                "reward": value,
                "status": "failed" if value is None else "ok",
                "rollout": records.fingerprint(r),
                "grader": "test",
            }
        )
    return dump(path, rows)


# ---- the world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Paths: toy (folder), prompts, base and teacher (models whose distributions are not
    uniform), and of base: rollouts (8 prompts x 4, T = 1), scores (teacher, whole vocabulary),
    rewards."""
    import torch

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("world")
    sums.main(argv(out=root / "toy", train_prompts=24, eval_prompts=8, clean=1500, mixed=300))
    sft = dict(
        method="sft",
        rollouts=root / "toy" / "clean.jsonl",
        batch_size=32,
        warmup_steps=5,
        adam_beta2=0.95,
    )
    train.main(
        argv(
            model=root / "toy" / "student",
            out=root / "base",
            steps=35,
            learning_rate=4e-3,
            **sft,
        )
    )
    train.main(
        argv(
            model=root / "toy" / "teacher",
            out=root / "teacher",
            steps=35,
            learning_rate=6e-3,
            seed=1,
            **sft,
        )
    )
    w = types.SimpleNamespace(
        root=root,
        toy=root / "toy",
        prompts=root / "toy" / "train.jsonl",
        base=root / "base",
        teacher=root / "teacher",
        rollouts=root / "rollouts.jsonl",
        scores=root / "scores.jsonl",
        rewards=root / "rewards.jsonl",
    )
    rollout.main(
        argv(model=w.base, prompts=w.prompts, slice=":8", n=4, max_tokens=28, out=w.rollouts)
    )
    teacher.main(argv("score", model=w.teacher, rollouts=w.rollouts, out=w.scores, top_k=1000))
    make_rewards(w.rollouts, w.rewards)
    return w


@pytest.fixture(scope="session")
def base64bit(world):
    """The base model in plain transformers, float64."""
    return naive_model(world.base)


@pytest.fixture(scope="session")
def teacher64bit(world):
    return naive_model(world.teacher)


def variant(source, folder, tokenizer=None, model=None):
    """A copy of a model folder with its tokenizer and / or model changed in place by the given
    functions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    t, m = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    if tokenizer:
        t = tokenizer(t) or t
    if model:
        m = model(m) or m
    m.save_pretrained(folder)
    t.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def drifted(world, tmp_path_factory):
    """The base model after some more training: log pi differs from the log-probs the rollouts
    were sampled with."""

    out = tmp_path_factory.mktemp("drifted") / "m"
    train.main(
        argv(
            method="sft",
            model=world.base,
            rollouts=world.toy / "mixed.jsonl",
            out=out,
            steps=4,
            learning_rate=3e-3,
            fresh_optimizer=True,
        )
    )
    return out


@pytest.fixture(scope="session")
def agents(tmp_path_factory):
    """A world with a calculator: toy, prompts, student (pre-trained for seconds: some calls are
    right, some malformed, some are none), teacher, and of the student: rollouts (8 prompts x 4,
    a third of the calls in outage), scores (teacher, whole vocabulary), rewards."""

    root = tmp_path_factory.mktemp("agents")
    agent_world.main(
        argv(
            out=root / "toy",
            train_prompts=24,
            eval_prompts=8,
            clean=2600,
            mixed=640,
            terms="1:3",
        )
    )
    sft = dict(method="sft", batch_size=32, warmup_steps=5, adam_beta2=0.95)
    train.main(
        argv(
            model=root / "toy" / "student",
            out=root / "base",
            steps=60,
            learning_rate=6e-3,
            rollouts=root / "toy" / "clean.jsonl",
            **sft,
        )
    )
    train.main(
        argv(
            model=root / "base",
            out=root / "student",
            steps=10,
            learning_rate=2e-3,
            fresh_optimizer=True,
            rollouts=root / "toy" / "mixed.jsonl",
            **sft,
        )
    )
    train.main(
        argv(
            model=root / "base",
            out=root / "teacher",
            steps=20,
            learning_rate=3e-3,
            seed=1,
            rollouts=root / "toy" / "clean.jsonl",
            **sft,
        )
    )
    tools = dict(
        tools='{"calculator": {"outage": 0.3}}',
        call_format="brackets",
        max_calls=3,
        max_tokens=120,
    )
    w = types.SimpleNamespace(
        root=root,
        toy=root / "toy",
        prompts=root / "toy" / "train.jsonl",
        student=root / "student",
        teacher=root / "teacher",
        tools=tools,
        rollouts=root / "rollouts.jsonl",
        scores=root / "scores.jsonl",
        rewards=root / "rewards.jsonl",
    )
    rollout.main(
        argv(model=w.student, prompts=w.prompts, slice=":8", n=4, out=w.rollouts, **tools)
    )
    teacher.main(argv("score", model=w.teacher, rollouts=w.rollouts, out=w.scores, top_k=1000))
    make_rewards(w.rollouts, w.rewards)
    return w
