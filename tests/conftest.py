"""A tiny world for the tests: problems, two models pre-trained for seconds, rollouts of one,
scores by the other.

Helpers here are the independent side of the tests: plain transformers in float64, one unpadded
sequence at a time."""

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

# before torch is imported, here and in the stages run as programs
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the tests are of CPU numbers, bit by bit, and fork; `python -m bench.gpu` is what checks a GPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# before triton is imported: its kernels run in the interpreter
os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import rollout  # noqa: E402
import teacher  # noqa: E402
import train  # noqa: E402
from opd import cli, files, records  # noqa: E402
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


def lines_of(path, part):
    """A file beside `path` of its lines `part`, as in Python: ":8", "1:8:4"."""
    chosen = slice(*(int(x) if x else None for x in part.split(":")))
    out = Path(f"{path}.{part.replace(':', '-')}")
    out.write_text("".join(Path(path).read_text().splitlines(True)[chosen]))
    return out


def argv(*parts, **flags):
    """argv("score", top_k=3, overwrite=True, set={"clip_low": 0}) -> ["score", "--top-k", "3",
    "--overwrite", "--set", "clip_low=0"].  slice=":8" gives only these lines of `prompts`."""
    out = [str(p) for p in parts]
    if part := flags.pop("slice", None):
        flags["prompts"] = lines_of(flags["prompts"], part)
    for name, value in flags.items():
        flag = "--" + name.strip("_").replace("_", "-")
        if isinstance(value, dict):
            for key in value:
                out += [flag, f"{key}={value[key]}"]
        elif value is True:
            out.append(flag)
        elif value is not None and value is not False:
            out += [flag, str(value)]
    return out


def refusal(main, arguments, capsys):
    """The one-line message with which a stage, run as a program, refuses: exit code 2, no
    traceback."""

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main(arguments))
    message = capsys.readouterr().err
    assert stop.value.code == 2, message
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


def program(stage, arguments):
    """A stage as a person runs it: `python stage.py ...` in the repository."""
    return [sys.executable, stage, *map(str, arguments)]


def run_program(stage, arguments):
    how = dict(cwd=ROOT, capture_output=True, text=True, timeout=120)
    return subprocess.run(program(stage, arguments), **how)


def killed(work):
    """Runs work() in a child process that is expected to kill itself (SIGKILL)."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def kill_while_writing(stage, arguments, after):
    """Runs a stage that is killed half-way through a line, once `after` records are on disk."""
    main, write, written = importlib.import_module(stage).main, files.Writer.write, []

    def dying(writer, *rows):
        for row in rows:
            if len(written) == after:
                writer._file.write(json.dumps(row).encode()[:50])
                os.kill(os.getpid(), signal.SIGKILL)
            write(writer, row)
            written.append(row)

    def work():
        files.Writer.write = dying
        main(list(map(str, arguments)))

    killed(work)


# ---- references


def naive_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def naive_logps(model, prompt_ids, response_ids, temperature=1.0):
    """log_softmax(logits / temperature) at every response position, [T, V] float64: no padding,
    no cache, no kernel."""
    logits = model(torch.tensor([prompt_ids + response_ids])).logits[0]
    return torch.log_softmax(logits / temperature, -1)[
        len(prompt_ids) - 1 : len(prompt_ids) + len(response_ids) - 1
    ]


def naive_own(model, rollout, temperature=1.0):
    """log-probs of the response tokens, [T] as a list of floats."""
    with torch.no_grad():
        table = naive_logps(model, rollout["prompt_ids"], rollout["response_ids"], temperature)
    return [float(table[t, i]) for t, i in enumerate(rollout["response_ids"])]


def weights(folder):
    """{name: tensor} of a saved model's parameters."""
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def make_rewards(rollouts, path, reward=None):
    """Rewards for a rollouts file: reward(record), by default a number in [0, 1] drawn from the
    key's hash."""
    rows = []
    for r in load(rollouts):
        drawn = hashlib.sha256(f"{r['id']}/{r['sample']}".encode()).digest()[0] / 255
        value = reward(r) if reward else drawn
        row = {"id": r["id"], "sample": r["sample"], "reward": value, "grader": "test"}
        row["status"] = "failed" if value is None else "ok"
        rows.append(row | {"rollout": records.fingerprint(r)})
    return dump(path, rows)


# ---- the world

SFT = dict(method="sft", batch_size=32, optimizer=dict(warmup_steps=5, adam_beta2=0.95))


def sampled(root, student, **flags):
    """The paths of a world in `root`; samples its rollouts (8 prompts x 4) from `student`,
    scores them by the teacher (whole vocabulary), grades them."""
    w = types.SimpleNamespace(root=root, toy=root / "toy", teacher=root / "teacher")
    w.prompts = w.toy / "train.jsonl"
    for name in ("rollouts", "scores", "rewards"):
        setattr(w, name, root / f"{name}.jsonl")
    flags |= dict(model=student, prompts=w.prompts, slice=":8", n=4, out=w.rollouts)
    rollout.main(argv(**flags))
    teacher.main(argv("score", model=w.teacher, rollouts=w.rollouts, out=w.scores, top_k=1000))
    make_rewards(w.rollouts, w.rewards)
    return w


def make_world(root):
    """Running sums in the folder `root`: `base` and `teacher` are models whose distributions
    are not uniform; the rollouts are those of base, T = 1."""
    torch.set_num_threads(1)
    toy, base = root / "toy", root / "base"
    sums.main(argv(out=toy, train_prompts=24, eval_prompts=8, clean=1500, mixed=300))
    sft = SFT | dict(rollouts=toy / "clean.jsonl", steps=35)
    train.main(argv(model=toy / "student", out=base, learning_rate=4e-3, **sft))
    teacher_of = dict(model=toy / "teacher", out=root / "teacher", learning_rate=6e-3, seed=1)
    train.main(argv(**teacher_of, **sft))
    w = sampled(root, base, max_tokens=28)
    w.base = base
    return w


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


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
    t, m = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    if tokenizer:
        t = tokenizer(t) or t
    if model:
        m = model(m) or m
    m.save_pretrained(folder)
    t.save_pretrained(folder)
    return folder


def with_positions(source, folder, positions):
    """A copy of a model folder whose config has so few positions."""
    config = json.loads((Path(source) / "config.json").read_text())
    shutil.copytree(source, folder)
    config["max_position_embeddings"] = positions
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def drifted(world, tmp_path_factory):
    """The base model after some more training: log pi differs from the log-probs the rollouts
    were sampled with."""
    out = tmp_path_factory.mktemp("drifted") / "m"
    flags = dict(method="sft", model=world.base, rollouts=world.toy / "mixed.jsonl", steps=4)
    train.main(argv(out=out, learning_rate=3e-3, fresh_optimizer=True, **flags))
    return out


@pytest.fixture(scope="session")
def agents(tmp_path_factory):
    """A world with a calculator.  The `student`: some calls are right, some malformed, some are
    none; a third of the calls falls in an outage."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("agents")
    toy, base, student = root / "toy", root / "base", root / "student"
    made = dict(train_prompts=24, eval_prompts=8, clean=2600, mixed=640, terms="1:3")
    agent_world.main(argv(out=toy, **made))
    clean, more = dict(SFT, rollouts=toy / "clean.jsonl"), dict(SFT, fresh_optimizer=True)
    train.main(argv(model=toy / "student", out=base, steps=60, learning_rate=6e-3, **clean))
    more |= dict(model=base, rollouts=toy / "mixed.jsonl")
    train.main(argv(out=student, steps=10, learning_rate=2e-3, **more))
    clean |= dict(model=base, fresh_optimizer=True)
    train.main(argv(out=root / "teacher", steps=20, learning_rate=3e-3, seed=1, **clean))
    calls = dict(tool_options=dict(call_format="brackets", max_calls=3), max_tokens=120)
    tools = dict(tools='{"calculator": {"outage": 0.3}}', **calls)
    w = sampled(root, student, **tools)
    w.student, w.tools = student, tools
    return w


@pytest.fixture(scope="module")
def few_problems():
    """Studies measure their arms on 8 held-out problems."""
    from experiments.study import Run

    stage = Run.stage

    def small(run, command, **options):
        if command in ("worlds.sums", "worlds.agents"):
            options["eval_prompts"] = 8
        return stage(run, command, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "stage", small)
        yield


# ---- variants of the world's models and rollouts


def padded(extra):
    """More embedding rows than the vocabulary has tokens, as checkpoints padded to a multiple
    of 64 have."""

    def grow(model):
        old = {k: v.clone() for k, v in model.state_dict().items()}
        tokens = len(model.get_input_embeddings().weight)
        model.resize_token_embeddings(tokens + extra)
        for name, p in model.named_parameters():
            if p.shape[0] == tokens + extra:
                p.data[:tokens] = old[name]
                p.data[tokens:] = torch.randn(p[tokens:].shape)

    return grow


def permuted(tokenizer):
    """The same tokens with `1` and `2` trading ids."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = core["model"]["vocab"]
    ids["1"], ids["2"] = ids["2"], ids["1"]
    tokenizer._tokenizer = tokenizer._tokenizer.from_str(json.dumps(core))


def edge_rollouts(world, path, base64bit):
    """Rollouts with an answer of one token, an empty answer, and a usual one."""
    rows = load(world.rollouts)[:3]
    end = next(
        r["response_ids"][-1] for r in load(world.rollouts) if r["finish_reason"] == "stop"
    )
    for r, ids, reason in ((rows[0], [end], "stop"), (rows[1], [], "length")):
        r.update(response_ids=ids, loss_mask=[1] * len(ids), finish_reason=reason, text="")
        r["logprobs"] = naive_own(base64bit, r)
    return dump(path, rows)
