"""The ledger of labels: a label is one question, and a second purpose is refused it unless it
says so."""

import json

import pytest

import rubric
from methods import sparse_to_dense
from opd import files, records


def prompt(i, text=None, **more):
    return {
        "id": f"t{i}",
        "messages": [{"role": "user", "content": text or f"{i}+1=?"}],
        "answer": str(i + 1),
        **more,
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_purpose_takes_its_labels_as_often_as_it_likes(tmp_path):
    ledger = tmp_path / "labels.jsonl"
    assert sparse_to_dense.spend(ledger, [prompt(1), prompt(2)], "teacher-rl") == {
        "labels": 2,
        "labels_new": 2,
        "labels_spent": 2,
    }
    assert sparse_to_dense.spend(ledger, [prompt(2), prompt(3)], "teacher-rl") == {
        "labels": 2,
        "labels_new": 1,
        "labels_spent": 3,
    }
    assert [(line["id"], line["spent_on"], line["again"]) for line in lines(ledger)] == [
        (f"t{i}", "teacher-rl", False) for i in (1, 2, 3)
    ]


def test_another_purpose_is_refused_and_nothing_is_written(tmp_path):
    ledger = tmp_path / "labels.jsonl"
    sparse_to_dense.spend(ledger, [prompt(1), prompt(2)], "teacher-rl")
    before = ledger.read_bytes()
    with pytest.raises(
        records.BadInput,
        match=r"labels\.jsonl:2: spent_on: expected 'student-rl' .* label 't2', got "
        r"'teacher-rl'.*--spend-again",
    ):
        sparse_to_dense.spend(ledger, [prompt(7), prompt(2)], "student-rl")
    assert ledger.read_bytes() == before


def test_spending_again_is_said_in_the_ledger(tmp_path):
    ledger = tmp_path / "labels.jsonl"
    sparse_to_dense.spend(ledger, [prompt(1)], "teacher-rl")
    assert sparse_to_dense.spend(ledger, [prompt(1), prompt(2)], "student-rl", again=True) == {
        "labels": 2,
        "labels_new": 1,
        "labels_spent": 2,
    }
    assert [line["again"] for line in lines(ledger)] == [False, True, False]
    # this purpose has it now
    assert sparse_to_dense.spend(ledger, [prompt(1)], "student-rl")["labels_new"] == 0


def test_the_question_makes_a_label_not_its_id(tmp_path):
    ledger = tmp_path / "labels.jsonl"
    sparse_to_dense.spend(ledger, [prompt(1)], "teacher-rl")
    with pytest.raises(records.BadInput, match="copy"):
        sparse_to_dense.spend(ledger, [prompt(1) | {"id": "copy"}], "student-rl")
    # `prompt` is short for one message of a user
    with pytest.raises(records.BadInput, match="plain"):
        sparse_to_dense.spend(
            ledger, [{"id": "plain", "prompt": "1+1=?", "answer": "2"}], "student-rl"
        )
    assert (
        sparse_to_dense.spend(ledger, [prompt(1, "1 + 1 = ?")], "student-rl")["labels_new"] == 1
    )


def test_a_torn_last_line_is_dropped_and_a_bad_one_named(tmp_path):
    ledger = tmp_path / "labels.jsonl"
    sparse_to_dense.spend(ledger, [prompt(1)], "teacher-rl")
    with open(ledger, "a") as f:
        f.write('{"id": "t2", "quest')
    assert sparse_to_dense.spend(ledger, [prompt(2)], "teacher-rl")["labels_spent"] == 2
    with open(ledger, "a") as f:
        f.write('{"id": "t3", "question": "abc"}\n')
    with pytest.raises(
        records.BadInput,
        match=r"labels\.jsonl:3: spent_on: expected a string, but the field is missing",
    ):
        sparse_to_dense.spend(ledger, [prompt(4)], "teacher-rl")


def grade(tmp_path, prompts, *more):
    rollouts = tmp_path / "rollouts.jsonl"
    with open(tmp_path / "prompts.jsonl", "w") as f:
        f.writelines(json.dumps(p) + "\n" for p in prompts)
    with open(rollouts, "w") as f:
        for p in prompts[:2]:  # the third is not asked: its label stays unspent
            for sample, text in enumerate((f"#{p['answer']}", "#0")):
                f.write(
                    json.dumps(
                        {
                            "id": p["id"],
                            "sample": sample,
                            "policy": {"model": "m"},
                            "text": text,
                            "finish_reason": "stop",
                            "prompt_ids": [1],
                            "response_ids": [2],
                            "loss_mask": [1],
                            "logprobs": [-1.0],
                            "temperature": 1.0,
                            "top_p": 1.0,
                        }
                    )
                    + "\n"
                )
    return rubric.main(
        [
            "grade",
            "--grader",
            "answer",
            "--prompts",
            str(tmp_path / "prompts.jsonl"),
            "--rollouts",
            str(rollouts),
            "--out",
            str(tmp_path / "rewards.jsonl"),
            *more,
        ]
    )


def test_grade_spends_the_labels_it_reads_and_no_others(tmp_path):
    ledger = tmp_path / "labels.jsonl"
    done = grade(
        tmp_path,
        [prompt(i) for i in (1, 2, 3)],
        "--ledger",
        str(ledger),
        "--spend",
        "teacher-rl",
    )
    assert (
        done["labels"] == done["labels_new"] == 2
        and done["reward_mean"] == 0.5
        and [line["id"] for line in lines(ledger)] == ["t1", "t2"]
    )
    assert files.main(["check", str(ledger)]) == {str(ledger): 2}


def test_grade_refused_a_label_writes_no_reward(tmp_path):
    ledger = tmp_path / "labels.jsonl"
    sparse_to_dense.spend(ledger, [prompt(1)], "teacher-rl")
    with pytest.raises(records.BadInput, match="got 'teacher-rl'"):
        grade(
            tmp_path, [prompt(1), prompt(2)], "--ledger", str(ledger), "--spend", "student-rl"
        )
    assert not (tmp_path / "rewards.jsonl").exists() and len(lines(ledger)) == 1
    assert (
        grade(
            tmp_path,
            [prompt(1), prompt(2)],
            "--ledger",
            str(ledger),
            "--spend",
            "student-rl",
            "--spend-again",
        )["labels_new"]
        == 1
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--ledger", "l"],
        ["--spend", "x"],
        ["--spend-again"],
        ["--ledger", "l", "--spend", "x", "--grader", "scalar"],
    ],
)
def test_half_a_ledger_is_refused(tmp_path, flags):
    with pytest.raises(
        records.BadInput, match="--ledger, --spend: expected both, with --grader answer"
    ):
        grade(tmp_path, [prompt(1)], *flags)
    assert not (tmp_path / "l").exists()
