"""The whole pipeline: the main job's experiment in seconds, and every stage against a server
that misbehaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_server import FakeServer

import rollout
import rubric
import teacher
from experiments.ropd import ARMS
from experiments.study import finished
from opd import policy as policies
from opd import records
from opd.files import Table, guess_kind, main, read, record_for
from worlds import sums

ROOT = Path(__file__).parent.parent


def run(*words, **options):
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    done = run("-m", "experiments.ropd", "--smoke", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done


def test_smoke_runs_every_arm_and_ends_in_a_table_and_a_picture(smoke):
    out, done = smoke
    rows = list(read(out / "results.jsonl", "results"))
    assert {r["arm"] for r in rows if r["final"]} == set(ARMS)
    for r in rows:
        assert (
            0 <= r["accuracy"] <= 1
            and r["command"].startswith("python -m experiments.ropd")
            and r["versions"]["torch"]
        )
    ropd = [r for r in rows if r["arm"] == "ropd"]
    assert (
        ropd[-1]["trained_tokens"] > 0
        and ropd[-1]["teacher_tokens"] > 0
        and ropd[-1]["generated_tokens"] >= ropd[-1]["trained_tokens"]
    )
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG") and "| ropd |" in (
        out / "table.md"
    ).read_text()
    assert "| ropd |" in done.stdout


def test_every_file_the_recipe_left_is_valid_and_joins(smoke):
    out, _ = smoke
    files = [f for f in out.rglob("*.jsonl") if ".run" not in f.name]
    assert len(files) > 40
    for f in files:
        assert sum(
            1
            for _ in read(
                f,
                "prompts"
                if f.parent.name == "toy"
                and f.name in ("train.jsonl", "dev.jsonl", "heldout.jsonl")
                else guess_kind(f),
            )
        )
    place = out / "seed0" / "ropd" / "round1"
    rollouts, rewards = (
        Table(place / "rollouts.jsonl", "rollouts"),
        Table(place / "rewards.jsonl", "rewards"),
    )
    for r in rollouts:
        assert record_for(rewards, r, rollouts)["status"] == "ok"


def test_commands_can_be_pasted_and_say_that_they_are_done(smoke):
    out, _ = smoke
    lines = (out / "commands.sh").read_text().splitlines()
    assert all(line.startswith(sys.executable) for line in lines)
    pasted = next(
        line for line in lines if "rollout.py" in line and "/ropd/round1/" in line
    ).split()
    # round 1 sampled from round 0's weights, which the experiment has tidied away: the stage
    # says
    # so instead of guessing
    gone = run(*pasted[1:])
    assert gone.returncode == 2 and "neither a folder" in gone.stderr
    pasted = next(
        line for line in lines if "rubric.py grade" in line and "/ropd/round1/" in line
    ).split()
    before = Path(pasted[-1]).read_bytes()
    again = run(*pasted[1:])
    assert again.returncode == 0, again.stderr
    assert Path(pasted[-1]).read_bytes() == before


def test_a_second_call_finds_everything_done(smoke):
    out, _ = smoke
    before = (out / "results.jsonl").read_bytes()
    again = run("-m", "experiments.ropd", "--smoke", "--out", str(out))
    assert again.returncode == 0 and again.stdout.count("done before") == len(ARMS)
    assert (out / "results.jsonl").read_bytes() == before


# while worlds.sums, train.py, an arm is at work
@pytest.mark.parametrize(
    "moment", ["ROPD on running sums", "pre-training the teacher", "sft: heldout"]
)
def test_a_killed_recipe_goes_on(tmp_path, moment):
    command = [sys.executable, "-m", "experiments.ropd", "--smoke", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if moment in line:
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run("-m", "experiments.ropd", "--smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = list(read(tmp_path / "results.jsonl", "results"))
    keys = [(r["arm"], r["seed"], r["step"]) for r in rows]
    assert len(keys) == len(set(keys)) and sum(r["final"] for r in rows) == len(ARMS)


def test_results_of_other_settings_are_refused(smoke, tmp_path):
    out, _ = smoke
    for flags in (
        ["--eval-split", "dev", "--out", str(out)],
        [
            "--verifier-noise",
            "0.5",
            "--out",
            str(tmp_path),
            "--results",
            str(out / "results.jsonl"),
        ],
    ):
        refused = run("-m", "experiments.ropd", "--smoke", *flags)
        assert refused.returncode == 2 and "now it is" in refused.stderr


def test_a_torn_results_line_is_made_again(smoke, tmp_path):
    out, _ = smoke
    torn = tmp_path / "results.jsonl"
    whole = (out / "results.jsonl").read_bytes()
    torn.write_bytes(whole[:-20])
    settings = next(read(out / "results.jsonl", "results"))["settings"]
    assert len(finished(torn, settings)) == len(ARMS) - 1
    assert whole.startswith(torn.read_bytes())


# ---- served student, teacher and judge


def reply(body):
    """A student or teacher that answers "#9"; a rubricator with four criteria; a verifier that
    approves of everything."""
    document = body["messages"][-1]["content"] if "messages" in body else ""
    if not document.startswith("{"):
        return "#9"
    data = json.loads(document)
    if "criteria" not in data:
        return json.dumps(
            {
                "criteria": [
                    {
                        "id": f"c{i}",
                        "category": "Task Completion",
                        "criterion": f"merit {i}",
                        "points": i,
                    }
                    for i in (1, 2, 3, 4)
                ]
            }
        )
    answers = next(v for k, v in data.items() if k.startswith("answers"))
    return json.dumps(
        {
            "verdicts": [
                {"answer_index": i + 1, "judgement": [True] * 4} for i in range(len(answers))
            ]
        }
    )


def test_the_served_pipeline_survives_429_500_timeouts_and_broken_bodies(tmp_path):
    sums.main(
        [
            "--out",
            str(tmp_path / "toy"),
            "--train-prompts",
            "3",
            "--eval-prompts",
            "2",
            "--clean",
            "4",
            "--mixed",
            "4",
        ]
    )
    student, prompts = str(tmp_path / "toy" / "student"), str(tmp_path / "toy" / "train.jsonl")
    paths = {
        n: str(tmp_path / f"{n}.jsonl")
        for n in ("rollouts", "answers", "scores", "rubrics", "rewards")
    }

    def served(fake):
        return [
            "--model",
            student,
            "--base-url",
            fake.base_url,
            "--max-retries",
            "2",
            "--timeout",
            "1",
            "--concurrency",
            "3",
        ]

    tokenizer = policies.load_tokenizer(student)
    with FakeServer(
        chat=reply, script=["429", "normal", "500", "torn", "hang"], tokenizer=tokenizer
    ) as fake:
        made = rollout.main(
            [
                "--prompts",
                prompts,
                "--n",
                "2",
                "--max-tokens",
                "8",
                "--out",
                paths["rollouts"],
                *served(fake),
            ]
        )
        assert made["records"] == 6
        assert all(
            b["temperature"] == 1.0 and b["top_p"] == 1.0 and "seed" in b for b in fake.bodies()
        )
    with FakeServer(chat=reply) as fake:
        assert (
            teacher.main(
                [
                    "answer",
                    "--prompts",
                    prompts,
                    "--n",
                    "2",
                    "--max-tokens",
                    "8",
                    "--out",
                    paths["answers"],
                    *served(fake),
                ]
            )["duplicates"]
            == 0.5
        )
    with FakeServer(
        script=["500"],
        distribution=lambda prefix: [-3.2 - (len(prefix) + t) % 7 / 10 for t in range(24)],
    ) as fake:
        scored = teacher.main(
            [
                "score",
                "--rollouts",
                paths["rollouts"],
                "--top-k",
                "3",
                "--out",
                paths["scores"],
                *served(fake),
            ]
        )
        assert scored["records"] == 6 and scored["noise_floor"] == 0
    with FakeServer(chat=reply, script=["429", "not_json"]) as fake:
        judge_flags = ["--max-failure-rate", "0.5", *served(fake)]
        made = rubric.main(
            [
                "create",
                "--rubricator",
                "llm",
                "--prompts",
                prompts,
                "--answers",
                paths["answers"],
                "--m",
                "2",
                "--rollouts",
                paths["rollouts"],
                "--out",
                paths["rubrics"],
                *judge_flags,
            ]
        )
        assert made["records"] + made["failed"] == 3
    with FakeServer(chat=reply) as fake:
        rubric.main(
            [
                "create",
                "--rubricator",
                "llm",
                "--prompts",
                prompts,
                "--answers",
                paths["answers"],
                "--m",
                "2",
                "--rollouts",
                paths["rollouts"],
                "--out",
                paths["rubrics"],
                *served(fake)[:2],
                "--base-url",
                fake.base_url,
                "--overwrite",
            ]
        )
        graded = rubric.main(
            [
                "grade",
                "--grader",
                "judge",
                "--prompts",
                prompts,
                "--answers",
                paths["answers"],
                "--rubrics",
                paths["rubrics"],
                "--rollouts",
                paths["rollouts"],
                "--out",
                paths["rewards"],
                *served(fake),
            ]
        )
        assert graded["reward_mean"] == 1.0 and graded["failed"] == 0
    assert main(["check", *paths.values()])
    assert os.environ.get("OPENAI_API_KEY", "EMPTY") not in "".join(
        Path(p).read_text() for p in paths.values()
    ).replace("EMPTY", "")


@pytest.fixture
def small(tmp_path):
    """(flags of a served student on one prompt, its tokenizer, the output file)."""
    sums.main(
        [
            "--out",
            str(tmp_path / "toy"),
            "--train-prompts",
            "4",
            "--eval-prompts",
            "1",
            "--clean",
            "1",
            "--mixed",
            "1",
        ]
    )
    student, out = str(tmp_path / "toy" / "student"), tmp_path / "r.jsonl"
    flags = [
        "--prompts",
        str(tmp_path / "toy/train.jsonl"),
        "--max-tokens",
        "8",
        "--out",
        str(out),
        "--max-retries",
        "0",
        "--timeout",
        "5",
        "--concurrency",
        "2",
    ]
    return [*flags, "--model", student], policies.load_tokenizer(student), out


def test_a_served_student_of_unknown_vocabulary_is_refused_before_anything_is_asked(small):
    flags, tokenizer, out = small
    with FakeServer(chat=reply, tokenizer=tokenizer) as fake:
        with pytest.raises(records.BadInput, match="--tokenizer"):
            rollout.main([*flags[:-1], "served-name", "--base-url", fake.base_url])
        assert not fake.requests


def test_a_server_with_another_template_is_refused(small):
    flags, tokenizer, out = small
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", "").replace(
        "'<|' + m['role'] + '|>' + ", ""
    )
    with (
        FakeServer(chat=reply, tokenizer=tokenizer) as fake,
        pytest.raises(records.BadInput, match="another tokenizer or chat template"),
    ):
        rollout.main([*flags, "--base-url", fake.base_url])


def test_a_server_may_move_between_two_runs(small):
    flags, tokenizer, out = small
    for n in ("1", "3"):
        with FakeServer(chat=reply, tokenizer=tokenizer) as fake:  # another port each time
            assert rollout.main([*flags, "--n", n, "--base-url", fake.base_url])[
                "records"
            ] == 4 * int(n)


def test_failures_beyond_the_allowed_rate_stop_early_and_a_few_are_left_for_the_next_run(small):
    flags, tokenizer, out = small
    with FakeServer(chat=reply, always="500", tokenizer=tokenizer) as fake:
        with pytest.raises(records.BadInput, match="--max-failure-rate"):
            # all of the first few fail
            rollout.main(
                [*flags, "--n", "50", "--max-failure-rate", "1", "--base-url", fake.base_url]
            )
        assert len(fake.requests) < 40
    with FakeServer(chat=reply, script=["normal", "500"], tokenizer=tokenizer) as fake:
        summary = rollout.main([*flags, "--n", "5", "--base-url", fake.base_url])
        assert (summary["records"], summary["failed"]) == (19, 1)
        assert rollout.main([*flags, "--n", "5", "--base-url", fake.base_url])["records"] == 20


def test_an_answer_of_nothing_is_a_failure_and_no_empty_answer(small):
    flags, tokenizer, out = small
    with FakeServer(chat=reply, script=["normal", "null_text"]) as fake:
        summary = teacher.main(["answer", *flags, "--n", "5", "--base-url", fake.base_url])
    assert summary["failed"] == 1 and all(r["text"] for r in read(out, "answers"))


def test_a_served_student_that_shows_no_tokens_is_refused_for_training(tmp_path):
    sums.main(
        [
            "--out",
            str(tmp_path / "toy"),
            "--train-prompts",
            "1",
            "--eval-prompts",
            "1",
            "--clean",
            "1",
            "--mixed",
            "1",
        ]
    )
    for behaviour in ("no_token_ids", "few_logprobs", "no_logprobs"):
        with (
            FakeServer(chat=reply, always=behaviour) as fake,
            pytest.raises(records.BadInput, match="token ids|log-probs"),
        ):
            rollout.main(
                [
                    "--model",
                    str(tmp_path / "toy/student"),
                    "--base-url",
                    fake.base_url,
                    "--prompts",
                    str(tmp_path / "toy/train.jsonl"),
                    "--n",
                    "1",
                    "--out",
                    str(tmp_path / f"{behaviour}.jsonl"),
                    "--max-retries",
                    "0",
                    "--timeout",
                    "2",
                ]
            )
