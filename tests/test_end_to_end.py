"""The whole pipeline: the main job's experiment in seconds, and every stage against a server
that misbehaves."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, argv, killed, load, refusal
from fake_server import FakeServer

import rollout
import teacher
from experiments import ropd, study
from opd import files, policy
from opd.files import Table, guess_kind, read
from opd.records import BadInput
from worlds import sums

ARMS = ["before", "sft", "ropd", "teacher"]


def recipe(out, *words):
    return ropd.main(["--smoke", "--out", str(out), *words])


@pytest.fixture(scope="module")
def smoke(few_problems, tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    recipe(out)
    return out


def test_smoke_runs_every_arm_and_ends_in_a_table_and_a_picture(smoke):
    rows = list(read(smoke / "results.jsonl", "results"))
    assert [r["arm"] for r in rows if r["final"]] == list(ropd.ARMS)
    for r in rows:
        assert 0 <= r["accuracy"] <= 1 and r["versions"]["torch"]
        assert r["command"].startswith("python -m experiments.ropd --smoke")
    last = [r for r in rows if r["arm"] == "ropd"][-1]
    assert last["generated_tokens"] >= last["trained_tokens"] > 0 < last["teacher_tokens"]
    assert (smoke / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "| ropd |" in (smoke / "table.md").read_text()


def test_every_file_the_recipe_left_is_valid_and_joins(smoke):
    paths = [path for path in smoke.rglob("*.jsonl") if ".run" not in path.name]
    assert len(paths) > 40
    for path in paths:
        asked = path.parent.name == "toy" and path.stem in ("train", "dev", "heldout")
        assert any([True for _ in read(path, "prompts" if asked else guess_kind(path))])
    place = smoke / "seed0" / "ropd" / "round1"
    rollouts = Table(place / "rollouts.jsonl", "rollouts")
    rewards = Table(place / "rewards.jsonl", "rewards")
    for r in rollouts:
        assert files.record_for(rewards, r, rollouts)["status"] == "ok"


def test_commands_can_be_pasted(smoke, capsys):
    """A finished one finds its work done; one whose model was tidied away says so."""

    def pasted(stage):
        lines = (smoke / "commands.sh").read_text().splitlines()
        python, script, *words = next(
            line for line in lines if stage in line and "/ropd/round1/" in line
        ).split()
        assert (python, script) == (sys.executable, stage.split()[0])
        return [script, *words]

    assert "neither a model folder" in refusal(rollout.main, pasted("rollout.py")[1:], capsys)
    words = pasted("rubric.py grade")
    before = Path(words[-1]).read_bytes()
    again = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert Path(words[-1]).read_bytes() == before


def test_a_second_call_finds_everything_done(smoke, capsys):
    before = (smoke / "results.jsonl").read_bytes()
    recipe(smoke)
    assert capsys.readouterr().out.count("done before") == len(ropd.ARMS)
    assert (smoke / "results.jsonl").read_bytes() == before


# while worlds.sums, train.py, an arm is at work
@pytest.mark.parametrize(
    "moment", ["ROPD on running sums", "pre-training the teacher", "sft: heldout"]
)
def test_a_killed_recipe_goes_on(few_problems, tmp_path, moment):
    words = ["--arms", ",".join(ARMS)]

    def work():
        say, kill = study.say, lambda: os.kill(os.getpid(), signal.SIGKILL)

        def dying(text):
            say(text)
            if moment in text:
                threading.Timer(0.1, kill).start()

        study.say = dying
        recipe(tmp_path, *words)

    killed(work)
    recipe(tmp_path, *words)
    rows = list(read(tmp_path / "results.jsonl", "results"))
    keys = {(r["arm"], r["seed"], r["step"]) for r in rows}
    assert len(keys) == len(rows) and [r["arm"] for r in rows if r["final"]] == ARMS


def test_results_of_other_settings_are_refused(smoke, tmp_path, capsys):
    results = ["--results", str(smoke / "results.jsonl")]
    for out, words in (
        (smoke, ["--eval-split", "dev"]),
        (tmp_path, ["--verifier-noise", "0.5", *results]),
    ):
        call = lambda more: recipe(out, *more)  # noqa: B023, E731
        assert "now it is" in refusal(call, words, capsys)


def test_a_torn_results_line_is_made_again(smoke, tmp_path):
    torn = tmp_path / "results.jsonl"
    whole = (smoke / "results.jsonl").read_bytes()
    torn.write_bytes(whole[:-20])
    settings = load(smoke / "results.jsonl")[0]["settings"]
    assert len(study.finished(torn, ropd.Settings(**settings))) == len(ropd.ARMS) - 1
    assert whole.startswith(torn.read_bytes())


# ---- served student, teacher and judge


class Small:
    """Four problems and a student that a server serves: flags of the stages that ask it."""

    def __init__(self, folder):
        self.folder = folder
        toy = folder / "toy"
        sums.main(argv(out=toy, train_prompts=4, eval_prompts=1, clean=4, mixed=4))
        self.prompts = {"prompts": toy / "train.jsonl"}
        self.model = toy / "student"
        self.tokenizer = policy.load_tokenizer(self.model)

    def path(self, name):
        return self.folder / f"{name}.jsonl"

    def fake(self, **options):
        return FakeServer(chat=lambda body: "#9", tokenizer=self.tokenizer, **options)

    def run(self, main, fake, *words, **flags):
        served = dict(base_url=fake.base_url, model=self.model, concurrency=3)
        served |= dict(max_retries=0, timeout=1)
        return main(argv(*words, **served | flags))

    def rollout(self, fake, **flags):
        flags = self.prompts | dict(max_tokens=8, out=self.path("rollouts")) | flags
        return self.run(rollout.main, fake, **flags)


@pytest.fixture
def small(tmp_path):
    return Small(tmp_path)


def test_a_served_student_of_unknown_vocabulary_is_not_asked(small):
    with small.fake() as fake:
        with pytest.raises(BadInput, match="--tokenizer"):
            small.rollout(fake, model="served-name")
        assert not fake.requests


def test_a_server_with_another_template_is_refused(small):
    template = small.tokenizer.chat_template.replace("'<|' + m['role'] + '|>' + ", "")
    small.tokenizer.chat_template = template.replace("<|user|>", "")
    with small.fake() as fake, pytest.raises(BadInput, match="another tokenizer or chat"):
        small.rollout(fake)


def test_a_server_may_move_between_two_runs(small):
    for n in (1, 3):
        with small.fake() as fake:  # another port each time
            assert small.rollout(fake, n=n)["records"] == 4 * n


def test_failures_beyond_the_allowed_rate_stop_early_and_a_few_are_left_for_the_next_run(small):
    with small.fake(always="500") as fake:
        with pytest.raises(BadInput, match="max-failure-rate"):  # all of the first few fail
            small.rollout(fake, n=50, max_failure_rate=1)
        assert len(fake.requests) < 40
    with small.fake(script=["normal", "500"]) as fake:
        summary = small.rollout(fake, n=5)
        assert (summary["records"], summary["failed"]) == (19, 1)
        assert small.rollout(fake, n=5)["records"] == 20


def test_an_answer_of_nothing_is_a_failure_and_no_empty_answer(small):
    out = small.path("answers")
    with small.fake(script=["normal", "null_text"]) as fake:
        flags = small.prompts | dict(n=5, max_tokens=8, out=out)
        assert small.run(teacher.main, fake, "answer", **flags)["failed"] == 1
    assert all(r["text"] for r in read(out, "answers"))
