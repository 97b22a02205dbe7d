"""The numbers of experiments/real_signals.py, by hand; its smoke run does the rest."""

from itertools import product

import pytest
from conftest import by_key, dump, load

from experiments import real_signals
from experiments.study import Run
from opd import records
from opd.answers import final_answer, is_correct
from opd.policy import load_tokenizer


def test_prompts_weigh_alike_however_many_rollouts_they_have():
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 8.0, ("c", 0): None}
    found = real_signals.over_prompts(values)
    assert found == {"mean": 5.0, "half": pytest.approx(12.7062 * 3), "prompts": 2}
    assert real_signals.over_prompts({("c", 0): None})["mean"] is None


def test_quarters_hold_every_value_once():
    places = {(str(i), 0): i // 2 for i in range(10)}
    rows = real_signals.quartiles({key: 1.0 for key in places}, places)
    assert sum(row["prompts"] for row in rows) == 10
    assert (rows[0]["low"], rows[-1]["high"]) == (0, 4)


def test_a_signal_is_judged_inside_each_prompt():
    """A prompt whose answers are all right says nothing, nor do judgements that failed."""
    right = {("a", 0): True, ("a", 1): False, ("a", 2): True, ("b", 0): True, ("b", 1): True}
    values = {("a", 0): 2.0, ("a", 1): 1.0, ("a", 2): None, ("b", 0): 5.0, ("b", 1): 0.0}
    assert real_signals.within_prompts(values, right) == {("a",): 1.0, ("b",): None}
    values[("a", 2)] = 1.0
    pairs = [(2.0, 1.0), (1.0, 1.0)]
    wins = sum((x > y) + (x == y) / 2 for x, y in pairs) / 2
    assert real_signals.within_prompts(values, right)[("a",)] == wins


def test_the_teacher_goes_on_from_the_cut_and_from_half_of_the_rest():
    for n, blocks in product(range(1, 8), range(0, 8)):
        places = real_signals.two_places([[i, i + 1] for i in range(n)], blocks)
        if not places:
            assert blocks == 0 or n - blocks < 2
            continue
        assert places["cut"] == blocks
        assert places["later"] == blocks + (n - blocks) // 2 < n


@pytest.fixture
def pair(world, tmp_path):
    """A Pair with rollouts of the world, half of them cut after their first block."""
    rollouts = [r for r in load(world.rollouts) if len(r["response_ids"]) > 8]
    weights = []
    for i, r in enumerate(rollouts):
        length = len(r["response_ids"])
        spans = [[t, min(t + 2, length)] for t in range(0, length, 2)]
        row = {"id": r["id"], "sample": r["sample"], "rollout": records.fingerprint(r)}
        row |= {"rule": "release", "kept": 0.5, "scale": 1.0, "cut": 1 if i % 2 else None}
        weights.append(row | {"weights": [1.0] * length, "blocks": spans})
    dump(tmp_path / "rollouts.jsonl", rollouts)
    dump(tmp_path / "cuts_faithful.jsonl", weights)
    settings = real_signals.Settings(goes_on=3, max_tokens=28)
    run = Run(tmp_path, settings, [], None, None)
    return real_signals.Pair(run, world.base, world.teacher, world.prompts, {})


def test_a_beginning_is_that_of_a_rollout_before_its_final_answer(world, pair):
    tokenizer = load_tokenizer(world.base)
    whole = {
        (r["id"], r["sample"]): r["prompt_ids"] + r["response_ids"]
        for r in load(world.rollouts)
    }
    found = real_signals.beginnings(pair)
    assert {group for _, group, _ in found} == {"cut", "uncut"}
    for (key, group, place), ids in found.items():
        assert whole[key][: len(ids)] == ids
        assert final_answer(tokenizer.decode(ids)) is None
        short, long = (found[key, group, p] for p in ("cut", "later"))
        assert long[: len(short)] == short and len(long) > len(short)


def test_the_teacher_goes_on_from_the_very_ids(world, pair):
    """Its answers are graded by what they end with; a second run makes nothing."""
    prompts = pair.asked()
    key, ids = next(iter(real_signals.beginnings(pair).items()))
    begun = {"a": (prompts[key[0][0]], ids), "b": (prompts[key[0][0]], ids[:-1])}
    hits = real_signals.go_on(pair, "on", begun)
    rows = load(pair.path("on.jsonl"))
    assert [r["prompt_ids"] for r in by_key(rows).values()] == [ids] * 3 + [ids[:-1]] * 3
    for name, right in hits.items():
        texts = [r["text"] for r in by_key(rows).values() if r["id"] == name]
        assert right == [is_correct(t, prompts[key[0][0]]["answer"]) for t in texts]
    assert real_signals.go_on(pair, "on", begun) == hits
    assert load(pair.path("on.jsonl")) == rows


def test_steps_that_were_gone_on_from_have_their_drift_and_the_next(world, pair):
    """Three steps, of which the second call failed: mu and p_T differ by 1, 2, 3 nats."""
    r = next(r for r in load(world.rollouts) if len(r["response_ids"]) >= 9)
    end = len(r["response_ids"])
    r |= {"steps": [[0, 2, True], [3, 5, False], [6, end, None]], "logprobs": [-1.0] * end}
    r["loss_mask"] = [1, 1, 0, 1, 1, 0] + [1] * (end - 6)
    call = {"name": "calculator", "arguments": {}, "output": "2", "ok": True}
    r["calls"] = [call, call | {"ok": False}]
    score = {"id": r["id"], "sample": r["sample"], "rollout": records.fingerprint(r)}
    gaps = [1] * 3 + [2] * 3 + [3] * (end - 6)
    score |= {"policy": r["policy"], "logprobs": [-1.0 - gap for gap in gaps]}
    dump(pair.path("episodes.jsonl"), [r])
    dump(pair.path("episode_scores.jsonl"), [score])
    found = [call[1:] for call in real_signals.steps_of_calls(pair)]
    assert found == [(0, True, 1.0, 2.0), (1, False, 2.0, 3.0)]
