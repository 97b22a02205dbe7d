"""The ledger of labels: a label is one question, and a second purpose is refused it unless it
says so."""

import pytest
from conftest import argv, dump, load

from methods import sparse_to_dense
from methods.sparse_to_dense import spend
from opd import files, records


def prompt(i, text=None, **more):
    messages = [{"role": "user", "content": text or f"{i}+1=?"}]
    return {"id": f"t{i}", "messages": messages, "answer": str(i + 1), **more}


def counts(new, *, of, spent):
    return {"labels": of, "labels_new": new, "labels_spent": spent}


@pytest.fixture
def ledger(tmp_path):
    """Labels 1 and 2 are spent on the teacher."""
    path = tmp_path / "labels.jsonl"
    assert spend(path, [prompt(1), prompt(2)], "teacher-rl") == counts(2, of=2, spent=2)
    return path


def test_one_purpose_takes_its_labels_as_often_as_it_likes(ledger):
    again = spend(ledger, [prompt(2), prompt(3)], "teacher-rl")
    assert again == counts(1, of=2, spent=3)
    assert [(line["id"], line["spent_on"], line["again"]) for line in load(ledger)] == [
        (f"t{i}", "teacher-rl", False) for i in (1, 2, 3)
    ]
    assert files.main(["check", str(ledger)]) == {str(ledger): 3}


def test_another_purpose_is_refused_and_nothing_is_written(ledger):
    before = ledger.read_bytes()
    message = (
        r"labels\.jsonl:2: spent_on: expected 'student-rl' .* label 't2', got 'teacher-rl'"
    )
    with pytest.raises(records.BadInput, match=message + ".*--again"):
        spend(ledger, [prompt(7), prompt(2)], "student-rl")
    assert ledger.read_bytes() == before


def test_spending_again_is_said_in_the_ledger(ledger):
    again = spend(ledger, [prompt(1), prompt(3)], "student-rl", again=True)
    assert again == counts(1, of=2, spent=3)
    assert [line["again"] for line in load(ledger)] == [False, False, True, False]
    # this purpose has it now
    assert spend(ledger, [prompt(1)], "student-rl")["labels_new"] == 0


def test_the_question_makes_a_label_not_its_id(ledger):
    # `prompt` is short for one message of a user
    plain = {"id": "plain", "prompt": "1+1=?", "answer": "2"}
    for same in (prompt(1) | {"id": "copy"}, plain):
        with pytest.raises(records.BadInput, match=same["id"]):
            spend(ledger, [same], "student-rl")
    assert spend(ledger, [prompt(1, "1 + 1 = ?")], "student-rl")["labels_new"] == 1


def test_a_torn_last_line_is_dropped_and_a_bad_one_named(ledger):
    whole = ledger.read_text()
    ledger.write_text(whole + '{"id": "t2", "quest')
    assert spend(ledger, [prompt(3)], "teacher-rl")["labels_spent"] == 3
    ledger.write_text(whole + '{"id": "t3", "question": "abc"}\n')
    with pytest.raises(records.BadInput, match=r"labels\.jsonl:3: spent_on: expected a string"):
        spend(ledger, [prompt(4)], "teacher-rl")


def test_the_command_spends_the_labels_of_prompts_that_have_rollouts(ledger, tmp_path):
    rollout = {"sample": 0, "policy": {"model": "m"}, "text": "#0", "finish_reason": "stop"}
    rollout |= {"prompt_ids": [1], "response_ids": [2], "loss_mask": [1], "logprobs": [-1.0]}
    rollout |= {"temperature": 1.0, "top_p": 1.0}
    prompts = dump(tmp_path / "p.jsonl", [prompt(i) for i in (1, 2, 3, 4)])
    rollouts = dump(tmp_path / "r.jsonl", [rollout | {"id": f"t{i}"} for i in (4, 2)])
    flags = dict(ledger=ledger, prompts=prompts, rollouts=rollouts, purpose="student-rl")
    with pytest.raises(records.BadInput, match="got 'teacher-rl'"):
        sparse_to_dense.main(argv("spend", **flags))
    done = sparse_to_dense.main(argv("spend", **flags, again=True))
    assert done == counts(1, of=2, spent=3)
    assert [line["id"] for line in load(ledger)] == ["t1", "t2", "t4", "t2"]
    dump(rollouts, [rollout | {"id": "t9"}])
    with pytest.raises(records.BadInput, match="'t9'"):
        sparse_to_dense.main(argv("spend", **flags))
