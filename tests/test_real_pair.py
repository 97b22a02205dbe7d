"""An arm of experiments/real_pair.py goes on with the round that it was in."""

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
