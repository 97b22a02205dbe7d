"""An arm of experiments/real_pair.py goes on with the round that it was in."""

import json
import re

import numpy as np
import pytest
from conftest import load, same_bits, weights

from experiments import real_checks, real_pair
from opd.records import BadInput
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
    measured."""
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
        real_pair.main([*WORDS, str(tmp_path)])
    monkeypatch.undo()
    real_pair.main([*WORDS, str(tmp_path)])
    changing = {"seconds", "command"}
    rows = [
        [
            {k: v for k, v in row.items() if k not in changing}
            for row in load(at / "results.jsonl")
        ]
        for at in (whole, tmp_path)
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0] if row["arm"] == "opd"] == [0, 1, 2]
    folders = [at / "seed0" / "opd" / "round1" / "model" for at in (whole, tmp_path)]
    assert same_bits(*map(weights, folders))


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
                f.write(json.dumps(row | dict(right=right, greedy_right=right[::-1])) + "\n")
    differences = np.array([1, 0, 0, 0.25])
    half = 3.182446 * differences.std(ddof=1) / 2
    cell = f"{differences.mean():.3f} ± {half:.3f}"
    text = real_pair.by_problem(path)
    assert text.splitlines()[2] == f"| opd − before | {cell} | {cell} |"
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


# ---- the predicates that stand in for a judge

QUESTION = (
    "State the final answer to the following arithmetic problem: 30 + 81 - 95 =\n\nThink."
)


@pytest.mark.parametrize(
    "text, failed",
    [
        (r"30 + 81 = 111, 111 - 95 = 16, so \boxed{16}.", {"restates"}),
        (r"\(30 + 81 - 95 = 16\), so \boxed{16}.", set()),
        (r"\[ 30+81-95 = \boxed{16} \]", {"restates", "no_formula"}),
        (r"\boxed{16}", {"restates", "work_right", "follows"}),
        (
            r"30 + 81 - 95 = 17, so \boxed{17}.",
            {"total_right", "work_right", "nothing_wrong"},
        ),
        (
            r"30 + 81 = 112, 112 - 95 = 16, so \boxed{16}.",
            {"restates", "work_right", "nothing_wrong"},
        ),
        (r"30 + 81 - 95 = 16. The answer is 16.", {"boxed", "one_result"}),
        (r"30 + 81 - 95 = 16", {"answered", "boxed", "one_result", "total_right", "follows"}),
        (
            "1. 30 + 81 − 95\n2. is = 16, \\boxed{16}",
            {"restates", "work_right", "follows", "no_steps", "one_line"},
        ),
    ],
)
def test_predicates_name_what_an_answer_lacks(text, failed):
    general = {n: c for n, c in real_checks.CHECKS.items() if c.propose is Check.propose}
    del general["starts_bare"]
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
    assert real_checks.asked(QUESTION) == 16
    assert real_checks.asked("... problem: -3 + 2 =") == -1
    assert real_checks.asked("What is 3 + 2?") is None
    row = {
        "id": "p",
        "messages": [{"role": "user", "content": "What is 3 + 2?"}],
        "answer": "5",
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    words = f"--student s --teacher t --problems {tmp_path} --out {tmp_path}/out --rounds 1 "
    with pytest.raises(BadInput, match="train.jsonl: id 'p': expected a sum"):
        real_pair.main((words + "--prompts 1 --arms ropd").split())
