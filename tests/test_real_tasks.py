"""Problems for real models: what is made, how it is graded, that a killed pilot goes on."""

import functools
import json
import random
import re
import sys

import pytest
from conftest import argv, dump, kill_while_writing, load, refusal
from fake_server import FakeServer

import eval as evaluation
from experiments import real_tasks
from experiments.real_tasks import BY_ANSWER, INSTRUCTION, TASKS
from opd import files
from opd.answers import final_answer
from opd.policy import load_tokenizer
from opd.records import BadInput

SPLITS = ("train", "dev", "heldout")


def questions_of(folder):
    """{split: its questions, without the instruction, case and spaces}."""
    found = {}
    for split in SPLITS:
        rows = list(files.read(folder / f"{split}.jsonl", "prompts"))
        texts = [r["messages"][0]["content"].removesuffix(INSTRUCTION) for r in rows]
        found[split] = ["".join(text.split()).lower() for text in texts]
    return found


def make(out, **flags):
    real_tasks.main(argv("make", out=out, **flags))
    return out


@pytest.fixture
def sums(tmp_path):
    """A file like GSM8K's with 20 questions, each twice in other words for the same."""
    rows = []
    for i in range(20):
        for text in (f"What is {i} + 7?", f" what IS  {i} +\n7? "):
            rows.append({"question": text, "answer": f"{i}+7={i + 7}\n#### {i + 7}"})
    random.Random(0).shuffle(rows)
    return dump(tmp_path / "sums.jsonl", rows)


def test_no_question_stands_twice_and_more_to_train_on_changes_nothing_else(sums, tmp_path):
    few = make(tmp_path / "few", **{"from": sums}, train=8, dev=3, held_out=4)
    more = make(tmp_path / "more", **{"from": sums}, train=13, dev=3, held_out=4)
    for folder, sizes in ((few, (8, 3, 4)), (more, (13, 3, 4))):
        found = questions_of(folder)
        assert tuple(len(found[split]) for split in SPLITS) == sizes
        assert len(set(sum(found.values(), []))) == sum(sizes)
    for split in SPLITS:
        rows = load(more / f"{split}.jsonl")
        assert rows[: len(load(few / f"{split}.jsonl"))] == load(few / f"{split}.jsonl")
        for row in rows:
            first = int(row["messages"][0]["content"].split()[2])
            assert row["answer"] == str(first + 7) and row["solution"].endswith(row["answer"])
    other = make(tmp_path / "other", **{"from": sums}, train=13, dev=3, held_out=4, seed=1)
    assert questions_of(other) != questions_of(more)


def test_bad_input_is_refused(sums, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    sizes = dict(out=out, train=15, dev=3, held_out=3)
    wrong = argv("make", **{"from": sums}, **sizes)
    assert "expected 21 different questions, got 20" in refusal(real_tasks.main, wrong, capsys)
    for line in (
        '{"question": "?"}',
        '{"question": 1, "answer": "#### 1"}',
        "[",
        '"x"',
        "\xff",
    ):
        sums.write_text(json.dumps({"question": "1?", "answer": "#### 1"}) + f"\n{line}\n")
        assert f"{sums}:2: expected" in refusal(real_tasks.main, wrong, capsys)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert "pip install" in refusal(real_tasks.main, argv("make", task="gcd", **sizes), capsys)
    assert not out.exists()


# ---- grades


def graded(world, tmp_path, prompts, texts):
    """(rewards, summary) of [(prompt, text), ...]."""
    like = load(world.rollouts)[0]
    rows = [like | {"id": p["id"], "sample": i, "text": t} for i, (p, t) in enumerate(texts)]
    flags = dict(prompts=dump(tmp_path / "prompts.jsonl", prompts), out=tmp_path / "rewards")
    flags["rollouts"] = dump(tmp_path / "rollouts.jsonl", rows)
    summary = real_tasks.main(argv("grade", overwrite=True, **flags))
    return [r["reward"] for r in load(flags["out"])], summary


def test_answers_to_a_file_are_compared_with_the_truth(sums, world, tmp_path):
    folder = make(tmp_path / "out", **{"from": sums}, train=8, dev=1, held_out=1)
    prompts = load(folder / "train.jsonl")
    right = prompts[0]["answer"]
    writings = [f"\\boxed{{{right}}}", f"So\n#### {right}.0", f"The answer is ${right}$."]
    wrong = [f"\\boxed{{1{right}}}", right, ""]
    texts = [(prompts[0], text) for text in writings + wrong]
    rewards, summary = graded(world, tmp_path, prompts, texts)
    assert rewards == [1, 1, 1, 0, 0, 0]
    assert (summary["agreement"], summary["answered"]) == (1, 4 / 6)
    assert summary["flexible"] == 4 / 6, "a bare number counts, one behind it would not"


@pytest.mark.parametrize(
    "answer, text, right, somehow",
    [
        ("-34", "The final answer to 57 - 91 is -34.", False, True),
        ("-34", "57 - 91 = -34, and \\boxed{34}", False, False),
        ("5", "25-5", False, True),
        ("1234.5", "so it costs $1,234.50", False, True),
        ("1234", "12, 34", False, False),
        ("18", "\\boxed{\\frac{126}{7}}", True, True),
        ("7", "no number", False, False),
        ("7", "", False, False),
        (7, "seven: 7", False, True),
        ("3/4", "3/4", True, None),
        ("word", "word 5", False, None),
    ],
)
def test_right_in_whatever_form(answer, text, right, somehow):
    assert real_tasks.right_somehow({"answer": answer}, text, right) is somehow


@pytest.mark.parametrize("task", TASKS)
def test_a_scorer_of_reasoning_gym_takes_the_right_answer_only(task, world, tmp_path):
    pytest.importorskip(
        "reasoning_gym", reason="reasoning-gym is optional: pip install reasoning-gym"
    )
    folder = make(tmp_path / "out", task=task, train=20, dev=5, held_out=5)
    found = questions_of(folder)
    assert len(set(sum(found.values(), []))) == 30
    prompts = load(folder / "train.jsonl")
    assert all(("task" in prompt) == (task not in BY_ANSWER) for prompt in prompts)
    truth = prompts[0]["answer"]
    other = next(p["answer"] for p in prompts if p["answer"].lower() != truth.lower())
    texts = [f"\\boxed{{{p['answer']}}}" for p in prompts]
    texts = list(zip(prompts, texts)) + [(prompts[0], f"... is \\boxed{{\\text{{{truth}}}}}.")]
    junk = [other, f"{truth} or {other}", "1e999999999", "nan", "1/0", "(", "[1", "a,b", "::"]
    texts += [(prompts[0], f"\\boxed{{{text}}}") for text in junk] + [(prompts[0], truth)]
    rewards, summary = graded(world, tmp_path, prompts, texts)
    assert rewards == [1] * 21 + [0] * 10
    assert summary["agreement"] == 1


def test_spellings_that_only_one_of_the_graders_takes_are_counted(world, tmp_path):
    pytest.importorskip(
        "reasoning_gym", reason="reasoning-gym is optional: pip install reasoning-gym"
    )
    folder = make(tmp_path / "out", task="time_intervals", train=1, dev=1, held_out=1)
    prompt = load(folder / "train.jsonl")[0]
    hours, minutes = prompt["answer"].split(":")
    texts = [(prompt, f"\\boxed{{{int(hours)}:{minutes}:00}}"), (prompt, "\\boxed{x}")]
    rewards, summary = graded(world, tmp_path, [prompt], texts)
    assert rewards == [1, 0] and summary["agreement"] == 0.5
    for name in ("no_such", "number_sorting"):  # whose scorer runs an answer as Python
        prompt["task"]["name"] = name
        with pytest.raises(BadInput, match=r"prompts\.jsonl:1: task: expected .*chain_sum"):
            graded(world, tmp_path, [prompt], texts)


# ---- the pilot


def as_pilot(world, tmp_path, name, answers=None, **flags):
    """The command line of a pilot of two models of the tiny world on its own problems, with the
    answers to them or, by question, others."""
    rows = []
    for r in load(world.prompts):
        question = r["messages"][0]["content"]
        answer = (answers or {}).get(question, r["answer"])
        rows.append({"question": question, "answer": f"#### {answer}"})
    source = dump(tmp_path / "running.jsonl", rows)
    models = ["--models", f"student={world.base}", f"teacher={world.teacher}"]
    paths = dict(work=tmp_path / name, out=tmp_path / f"{name}.jsonl")
    sizes = dict(problems=8, samples=3, max_tokens=24)
    return argv("pilot", *models, tasks=source, **(paths | sizes | flags))


def stable(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in load(path)]


def test_a_pilot_measures_what_eval_measures_and_goes_on_after_a_kill(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(real_tasks, "INSTRUCTION", "")  # the models know no letters
    real_tasks.main(as_pilot(world, tmp_path, "first"))
    at = tmp_path / "first/running"
    questions = {
        p["id"]: p["messages"][0]["content"].strip() for p in load(at / "prompts.jsonl")
    }
    said = {
        questions[r["id"]]: final_answer(r["text"])
        for r in load(at / "teacher/greedy.jsonl")
        if final_answer(r["text"])
    }  # right from here on, for these models solve next to nothing
    pilot = functools.partial(as_pilot, world, tmp_path, answers=said)
    real_tasks.main(pilot("whole"))
    lines = load(tmp_path / "whole.jsonl")
    assert [line["arm"] for line in lines] == ["student", "teacher"]
    for line in lines:
        at = tmp_path / "whole/running" / line["arm"]
        flags = dict(prompts=at.with_name("prompts.jsonl"), out=tmp_path / f"{line['arm']}.e")
        whole = evaluation.main(argv(rollouts=at / "sampled.jsonl", **flags))
        for name in ("accuracy", "accuracy_low", "pass@1", "pass@3", "length_mean"):
            assert line[name] == whole[name]
        assert line["truncated"] == whole["truncated_fraction"] and line["n"] == 3
        greedy = evaluation.main(argv(rollouts=at / "greedy.jsonl", overwrite=True, **flags))
        assert line["greedy"] == greedy["accuracy"] and line["agreement"] == 1
        assert all(r["temperature"] == 0 for r in load(at / "greedy.jsonl"))
    assert sum(line["greedy"] for line in lines) > 0

    kill_while_writing("experiments.real_tasks", pilot("cut"), after=37)
    real_tasks.main(pilot("cut"))
    assert stable(tmp_path / "cut.jsonl") == stable(tmp_path / "whole.jsonl")
    with open(tmp_path / "cut.jsonl", "ab") as f:
        f.write(b'{"arm": "stu')
    monkeypatch.setattr(real_tasks, "sampler_from_flags", None)  # nothing is loaded again
    real_tasks.main(pilot("cut"))
    assert stable(tmp_path / "cut.jsonl") == stable(tmp_path / "whole.jsonl")

    other = pilot("whole", samples=2)
    assert "made with samples = 3, now it is 2" in refusal(real_tasks.main, other, capsys)


def test_a_failed_request_delays_the_line_of_a_served_model(world, tmp_path):
    def chat(body):  # right when it samples
        terms = re.findall(r"[+-]?\d+", body["messages"][0]["content"].partition("=")[0])
        return f"#{sum(map(int, terms)) + (body['temperature'] == 0)}"

    (tmp_path / "served.jsonl").write_text('{"arm": "stu')  # of a run that was killed
    tokenizer = load_tokenizer(str(world.base))
    with FakeServer(chat=chat, tokenizer=tokenizer, script=["high_logprobs"]) as fake:
        command = as_pilot(world, tmp_path, "served", base_url=fake.base_url)
        del command[3]  # the teacher
        assert real_tasks.main(command)["failed"] == 1 and not load(tmp_path / "served.jsonl")
        assert real_tasks.main(command)["failed"] == 0
    (line,) = load(tmp_path / "served.jsonl")
    assert (line["accuracy"], line["greedy"], line["answered"]) == (1, 0, 1)
    assert line["sampling"]["served"] and line["seconds"] is None


def test_a_name_stands_for_one_model_and_the_pilot_sets_its_flags(world, tmp_path, capsys):
    small = dict(problems=2, samples=1, max_tokens=2)
    real_tasks.main(as_pilot(world, tmp_path, "one", **small))
    row = load(tmp_path / "one.jsonl")[0]
    dump(tmp_path / "one.jsonl", [row | {"task": "other"}])
    swapped = as_pilot(world, tmp_path, "one", **small)
    swapped[1:3] = ["--models", f"student={world.teacher}"]
    assert "student was measured with" in refusal(
        real_tasks.main, swapped[:3] + swapped[4:], capsys
    )
    with pytest.raises(SystemExit):
        real_tasks.main(as_pilot(world, tmp_path, "two", temperature=0.5))
    assert "--temperature: expected no such flag" in capsys.readouterr().err


def test_the_table_puts_first_what_a_student_can_learn(tmp_path, capsys):
    rows = []

    def add(task, student, teacher, tokens=40):
        for arm, accuracy in (("student", student), ("teacher", teacher)):
            row = {"arm": arm, "task": task, "seed": 0, "step": 0, "accuracy": accuracy, "n": 4}
            row |= {"greedy": accuracy, "pass@4": accuracy, "length_mean": tokens}
            loose = {"flexible": accuracy, "greedy_flexible": accuracy} if tokens > 40 else {}
            rows.append(row | {"truncated": 0.0, "answered": 1.0, "flexible": None} | loose)

    add("easy", 0.9, 0.95)
    add("weak teacher", 0.2, 0.3)
    add("long", 0.2, 0.8, tokens=200)
    add("near", 0.45, 0.8)
    add("fits", 0.4, 0.6)
    add("alone", 0.2, 0.8)
    path = dump(tmp_path / "pilot.jsonl", rows[:-1])
    found = real_tasks.main(["table", str(path)])["tasks"]
    assert found == ["fits", "near", "weak teacher", "easy", "long", "alone"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:8]] == ["yes", *["-"] * 5]
    assert lines[7].endswith("| - |")
    assert ["any form" in line for line in lines[2:8]] == [
        line[2:6] == "long" for line in lines[2:8]
    ]
    wrong = ["table", str(path), "--student", "pupil"]
    assert "arm: expected 'pupil', got student, teacher" in refusal(
        real_tasks.main, wrong, capsys
    )
