"""An arm of experiments/real_pair.py goes on with the round that it was in."""

import json
import re

import numpy as np
import pytest
from conftest import load, same_bits, weights

from experiments import real_pair


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
