"""An arm of experiments/real_pair.py goes on with the round that it was in."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import argv, by_key, dump, load, same_bits, weights
from test_rubric import rollout

import rubric
from experiments import real_checks, real_pair
from experiments.study import Run
from opd import disk, records
from opd.policy import load_tokenizer
from opd.records import BadInput
from worlds import sums
from worlds.predicates import Check


class Killed(Exception):
    pass


WORDS = "--smoke --arms opd --out".split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    real_pair.main([*WORDS, str(out)])
    return out


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("place", ["measure", "train", "trained"])
def test_a_killed_arm_ends_as_an_undisturbed_one(whole, tmp_path, monkeypatch, place, number):
    """Killed in the first or second round of two: before its training, after it, before it is
    measured.  It goes on in a folder that was moved."""
    first, moved = tmp_path / "first", tmp_path / "moved"
    method = getattr(real_pair.Trial, place)

    def dies(trial, *args, **options):
        before_any = place == "measure" and args[0] == 0
        if trial.arm == "opd" and trial.number == number and not before_any:
            if place == "trained":
                method(trial, *args, **options)
            raise Killed
        return method(trial, *args, **options)

    monkeypatch.setattr(real_pair.Trial, place, dies)
    with pytest.raises(Killed):
        real_pair.main([*WORDS, str(first)])
    monkeypatch.undo()
    first.rename(moved)
    if number:  # a kill after a round's state was written leaves the model before
        (moved / "seed0" / "opd" / "round0" / "model").mkdir(exist_ok=True)
    real_pair.main([*WORDS, str(moved)])
    changing = {"seconds", "command"}
    rows = [
        [
            {k: v for k, v in row.items() if k not in changing}
            for row in load(at / "results.jsonl")
        ]
        for at in (whole, moved)
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0] if row["arm"] == "opd"] == [0, 1, 2]
    folders = [at / "seed0" / "opd" / "round1" / "model" for at in (whole, moved)]
    assert same_bits(*map(weights, folders))
    assert len(list(moved.glob("seed0/opd/round*/model"))) == 1


def test_a_study_is_run_once_at_a_time(tmp_path):
    (tmp_path / "results.jsonl").touch()
    with disk.open_locked(tmp_path / "results.jsonl.lock"):
        with pytest.raises(BadInput, match="results.jsonl: another process is running"):
            real_pair.main([*WORDS, str(tmp_path)])
    assert list(tmp_path.glob("*/*")) == []  # nothing was begun


def test_a_run_goes_on_with_the_models_and_problems_that_it_began_with(world, tmp_path):
    """...whatever lies at their paths by now."""
    row = {"id": "p", "prompt": "1+1=?", "answer": "2"}
    for split in ("train", "heldout"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    given = dict(student=str(world.base), teacher=str(world.teacher), problems=str(tmp_path))
    settings = real_pair.Settings(**given, rounds=1, prompts=1)
    run = Run(tmp_path / "out", settings, ["opd"], None, None)
    real_pair.build(run)
    real_pair.build(run)
    (tmp_path / "heldout.jsonl").write_text(json.dumps(row | {"answer": "3"}) + "\n")
    with pytest.raises(BadInput, match="out: was begun with heldout.jsonl = "):
        real_pair.build(run)


def test_differences_are_paired_by_problem(tmp_path):
    """Over problems, not over answers; a mean over seeds first."""
    rights = {
        "before": [[0, 0, 1, 0], [0, 1, 1, 0]],
        "opd": [[1, 0, 1, 0.5], [1, 1, 1, 0]],
    }
    path = tmp_path / "results.jsonl"
    with open(path, "w") as f:
        for arm, seeds in rights.items():
            for seed, right in enumerate(seeds):
                row = dict(arm=arm, seed=seed, step=1, final=True, accuracy=0.0)
                row |= dict(right=right, greedy_right=right[::-1])
                row |= dict(any_form=right, greedy_any_form=[None, *right[1:]])
                f.write(json.dumps(row) + "\n")
    differences = np.array([1, 0, 0, 0.25])
    half = 3.182446 * differences.std(ddof=1) / 2
    cell = f"{differences.mean():.3f} ± {half:.3f}"
    text = real_pair.by_problem(path)
    assert text.splitlines()[2] == f"| opd − before | {cell} | {cell} | {cell} | - |"
    assert "sft" not in text


def test_outcomes_are_those_of_the_evaluation(whole):
    rows = [row for row in load(whole / "results.jsonl") if row.get("final")]
    assert [row["arm"] for row in rows] == ["before", "opd"]
    for row in rows:
        assert np.mean(row["right"]) == pytest.approx(row["accuracy"])
        assert np.mean(row["greedy_right"]) == pytest.approx(row["greedy"])
        greedy = load(whole / "seed0" / row["arm"] / "eval.jsonl")
        ended = [re.search(r"^#+ *\S", r["text"], re.M) is not None for r in greedy]
        assert row["greedy_answered"] == pytest.approx(np.mean(ended))
        assert row["greedy_flexible"] >= row["greedy"], "an answer there is the last number"


def test_the_teacher_is_asked_once_for_all_arms_of_a_seed(tmp_path):
    """...and each arm bears the cost."""
    real_pair.main([*WORDS[:2], "sft,ropd", *WORDS[3:], str(tmp_path)])
    found = sorted((tmp_path / "seed0").rglob("*answers*/*.jsonl"))
    assert [path.name for path in found] == ["round0x4.jsonl", "round1x4.jsonl"]
    tokens = sum(len(r["response_ids"]) for path in found for r in load(path))
    ended = [r for r in load(tmp_path / "results.jsonl") if r.get("course")]
    assert [(r["arm"], r["teacher_tokens"]) for r in ended] == [
        ("sft", tokens),
        ("ropd", tokens),
    ]
    for number, row in enumerate(ended[0]["course"]):
        texts = load(found[number])
        assert row["tokens"] == pytest.approx(np.mean([len(r["response_ids"]) for r in texts]))
        rubrics = load(tmp_path / f"seed0/ropd/round{number}/rubrics.jsonl")
        drawn = {x for r in rubrics for x in r["drawn_from"]["answers"]}
        assert drawn == set(map(records.fingerprint, texts))


def test_the_course_of_an_arm_is_that_of_its_rounds_records(whole):
    """All log-probs of the round, and how many tokens."""
    course = load(whole / "results.jsonl")[-1]["course"]
    assert len(course) == 2
    for row, at in zip(course, sorted((whole / "seed0" / "opd").glob("round*"))):
        answers, scores = (
            by_key(load(at / name)) for name in ("rollouts.jsonl", "scores.jsonl")
        )
        sums = [sum(r["logprobs"]) - sum(scores[key]["logprobs"]) for key, r in answers.items()]
        tokens = sum(len(r["logprobs"]) for r in answers.values())
        assert row["gap"] == pytest.approx(sum(sums) / tokens, abs=1e-3)
        assert row["tokens"] == pytest.approx(tokens / len(answers), abs=1e-3)
        assert 0 <= row["right"] <= 1


def test_what_is_told_of_rewards(tmp_path):
    """p: the right answer has the larger reward, q: all are right, and one judgement failed."""
    outcomes = {("p", 0): True, ("p", 1): False, ("q", 0): True, ("q", 1): True}
    rewards = {("p", 0): 0.8, ("p", 1): 0.2, ("q", 0): 0.5, ("q", 1): None}
    rows = [{"id": k[0], "sample": k[1], "reward": x} for k, x in rewards.items()]
    for row in rows:
        row |= {"status": "failed" if row["reward"] is None else "ok"}
        row |= {"rollout": "f", "grader": "check"}
    dump(tmp_path / "rewards.jsonl", rows)
    assert real_pair.about_rewards(tmp_path, outcomes) == {
        "reward_mean": 0.5,
        "reward_auc_within": 1.0,
        "problems_with_both": 1,
    }
    criterion = {"id": "c1", "category": "Task Completion", "criterion": "It is brief."}
    checks = [("brief", 5), ("boxed", 2), ("boxed", 1)]
    criteria = [criterion | {"points": n, "check": [name]} for name, n in checks]
    made = {"rubricator": "contrast", "drawn_from": {"answers": ["f"], "rollouts": ["f"]}}
    other = [criterion | {"points": 4, "check": ["boxed"]}]
    rubrics = [{"id": "p", "criteria": criteria}, {"id": "q", "criteria": other}]
    dump(tmp_path / "rubrics.jsonl", [rubric | made for rubric in rubrics])
    found = real_pair.about_rewards(tmp_path, outcomes)
    assert found["points"] == {"boxed": (3 / 8 + 1) / 2, "brief": 5 / 16}


# ---- the predicates that stand in for a judge

QUESTION = (
    "State the final answer to the following arithmetic problem: 30 + 81 - 95 =\n\nThink."
)
WRONG = {"work_right", "nothing_wrong"}
ENDS = {"total_right", "follows"}
LISTED = {"no_steps", "one_line"}


@pytest.mark.parametrize(
    "text, failed",
    [
        (r"30 + 81 = 111, 111 - 95 = 16, so \boxed{16}.", {"restates"}),
        (r"\(30 + 81 - 95 = 16\), so \boxed{16}.", set()),
        (r"30 + 81 - 95 = 111 - 95 = 16, so \boxed{16}.", set()),
        (r"30 + 81 = 111 - 95 = 16, so \boxed{16}.", {"restates"}),
        (r"30 + 81 = 111 - 95 = 17, so \boxed{16}.", {"restates", *WRONG, "follows"}),
        (r"30 + 81 - 95 = **16**, so \boxed{16}.", set()),
        (r"\(30 + 81 = 111\)\(111 - 95 = 16\), so \boxed{16}.", {"restates"}),
        (r"\[ 30+81-95 = \boxed{16} \]", {"no_formula"}),
        (r"\boxed{16}", {"restates", "work_right", "follows"}),
        (r"30 + 81 - 95 = 17, so \boxed{17}.", {"total_right", *WRONG}),
        (r"30 + 81 - 95 = 16.5, so \boxed{16}.", {*WRONG, "follows"}),
        (r"1,030 + 81 = 1,111 and 2 * 30 + 81 = 141, so \boxed{16}.", {"restates", "follows"}),
        (r"30 + 81 = 112, 112 - 95 = 16, so \boxed{16}.", {"restates", *WRONG}),
        (r"30 + 81 - 95 = 16. The answer is 16.", {"boxed"}),
        (r"30 + 81 - 95 = 16", {"answered", "boxed", "total_right", "follows"}),
        (r"130 + 81 - 95 = 116, so \boxed{}", {"restates", "boxed", "answered", *ENDS}),
        ("- 30 + 81 = 112\n- so \\boxed{16}", {*WRONG, "follows", "restates", *LISTED}),
        ("1. 30 + 81 − 95\n2. is 16, \\boxed{16}", {"work_right", "follows", *LISTED}),
    ],
)
def test_predicates_name_what_an_answer_lacks(text, failed):
    general = {n: c for n, c in real_checks.CHECKS.items() if c.propose is Check.propose}
    assert {n for n, c in general.items() if not c.test(QUESTION, text)} == failed


def test_predicates_bear_any_text():
    texts = [
        "",
        "\\boxed{",
        "9" * 5000 + " + 1 = " + "9" * 5000,
        "² + ٣ = ٣",
        "- - = -",
        "\x00",
    ]
    for text in texts:
        for question in (QUESTION, "What is love?", ""):
            for check in real_checks.CHECKS.values():
                for arguments in check.propose([text or "x"]):
                    assert check.test(question, text, *arguments) in (True, False)


def test_the_sum_asked_for_is_known_or_refused(tmp_path):
    assert real_checks.sum_asked(QUESTION) == "30 + 81 - 95"
    assert real_checks.sum_asked("... problem: -3 + -2 =") == "-3 + -2"
    assert real_checks.sum_asked("What is 3 + 2?") is None
    assert real_checks.value("-3 + -2 - 0.5") == -5.5
    row = {
        "id": "p",
        "messages": [{"role": "user", "content": "What is 3 + 2?"}],
        "answer": "5",
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    words = f"--student s --teacher t --problems {tmp_path} --out {tmp_path}/out --rounds 1 "
    with pytest.raises(BadInput, match="train.jsonl: id 'p': expected a sum .* got 'What is 3"):
        real_pair.main((words + "--prompts 1 --arms ropd").split())


def test_a_student_of_another_vocabulary_learns(tmp_path):
    """From the teacher's texts, and from its scores."""
    toy, out = tmp_path / "toy", tmp_path / "out"
    sizes = dict(train_prompts=2, eval_prompts=2, clean=8, mixed=8, student_merges="16")
    sums.main(argv(out=toy, **sizes))
    how = dict(student=toy / "student_merged", teacher=toy / "teacher", problems=toy, out=out)
    how |= dict(rounds=1, prompts=2, n=2, max_tokens=12, eval_n=1, final_n=1)
    real_pair.main(argv(arms="sft,opd", **how))
    rows = load(out / "results.jsonl")
    trained = {row["arm"]: row["trained_tokens"] for row in rows if row["final"]}
    assert trained["sft"] > 0 and trained["opd"] > 0


def test_a_teacher_of_another_template_is_refused_before_anything_runs(world, tmp_path):
    """...where teacher.py would refuse it only after the first arm."""
    other = tmp_path / "other"
    shutil.copytree(world.teacher, other)
    tokenizer = load_tokenizer(str(other))
    tokenizer.chat_template = "Well: " + tokenizer.chat_template
    tokenizer.save_pretrained(other)
    for split in ("train", "heldout"):
        dump(tmp_path / f"{split}.jsonl", [{"id": "p", "prompt": "1+1=?", "answer": "2"}])
    how = dict(student=world.base, problems=tmp_path, out=tmp_path / "out")
    how |= dict(rounds=1, prompts=1)
    with pytest.raises(BadInput, match="--teacher .*/other: opd: expected the chat template"):
        real_pair.main(argv(arms="opd", teacher=other, **how))
    assert list((tmp_path / "out").glob("seed*")) == []


def test_a_rubric_of_real_predicates_grades_what_it_was_drawn_from(tmp_path):
    """Through the stages: the right answer of a group is paid most."""
    prompt = {"id": "p", "messages": [{"role": "user", "content": QUESTION}], "answer": "16"}
    texts = ["It is 14.", r"30 + 81 - 95 = 16, so \boxed{16}.", r"\boxed{26}", "1. Add 30."]

    def answers(name, texts):
        rows = [rollout("p", i, text) for i, text in enumerate(texts)]
        dump(tmp_path / name, rows)
        return tmp_path / name

    dump(tmp_path / "prompts.jsonl", [prompt])
    common = dict(prompts=tmp_path / "prompts.jsonl", predicates="experiments.real_checks")
    common["rollouts"] = answers("rollouts.jsonl", texts)
    drawn = dict(answers=answers("answers.jsonl", [texts[1], r"\boxed{16}"] * 2), m=4)
    rubrics = tmp_path / "rubrics.jsonl"
    rubric.main(argv("create", **common, **drawn, out=rubrics))
    rubric.main(argv("grade", **common, rubrics=rubrics, out=tmp_path / "rewards.jsonl"))
    rewards = [row["reward"] for row in load(tmp_path / "rewards.jsonl")]
    assert rewards[1] == 1 and max(rewards[0], *rewards[2:]) < 1
