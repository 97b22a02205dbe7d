"""The numbers of experiments/real_signals.py, by hand; its smoke run does the rest."""

from itertools import product

import pytest
from conftest import by_key, dump, load

from experiments import real_signals
from experiments.study import Run
from opd import records
from opd.answers import final_answer, is_correct
from opd.policy import load_tokenizer
from opd.stats import auc_by_prompt


def test_prompts_weigh_alike_however_many_rollouts_they_have():
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 8.0, ("c", 0): None}
    found = real_signals.over_prompts(values)
    assert found == {"mean": 5.0, "half": pytest.approx(12.7062 * 3), "prompts": 2}
    assert real_signals.over_prompts({("c", 0): None})["mean"] is None


def test_quarters_hold_every_value_once_also_where_many_lie_at_the_cap():
    values = {(str(i), 0): float(i) for i in range(12)}
    rows = real_signals.quarters(values, {key: min(x, 5) for key, x in values.items()})
    assert [row["prompts"] for row in rows] == [3] * 4
    assert [(row["low"], row["high"]) for row in rows] == [(0, 2), (3, 5), (5, 5), (5, 5)]


def test_a_contrast_is_within_the_prompts_that_have_both():
    ones = {("a", 0): 3.0, ("a", 1): 5.0, ("b", 0): 9.0, ("c", 0): 7.0}
    others = {("a", 2): 1.0, ("c", 1): 2.0, ("d", 0): 0.0}
    found = real_signals.contrast(ones, others)
    assert (found["mean"], found["prompts"]) == (4.0, 2)


def test_a_signal_is_judged_inside_each_prompt():
    """A prompt whose answers are all right says nothing."""
    right = {("a", 0): True, ("a", 1): False, ("a", 2): True, ("b", 0): True, ("b", 1): True}
    values = {("a", 0): 2.0, ("a", 1): 1.0, ("b", 0): 5.0, ("b", 1): 0.0}
    assert auc_by_prompt(values, right) == {("a",): 1.0, ("b",): None}
    values[("a", 2)] = 1.0
    pairs = [(2.0, 1.0), (1.0, 1.0)]
    wins = sum((x > y) + (x == y) / 2 for x, y in pairs) / 2
    assert auc_by_prompt(values, right)[("a",)] == wins


def test_the_teacher_goes_on_from_the_cut_and_from_half_of_the_rest():
    for n, blocks in product(range(1, 8), range(0, 8)):
        places = real_signals.two_places([[i, i + 1] for i in range(n)], blocks)
        if not places:
            assert blocks == 0 or n - blocks < 2
            continue
        assert places["cut"] == blocks
        assert places["later"] == blocks + (n - blocks) // 2 < n


def test_the_picture_shows_the_parts_that_are_there():
    row = {"mean": 0.5, "half": None, "prompts": 1}
    spans = [{"low": 0, "high": 4} | row, {"low": 4, "high": 8} | row]
    positions = {"by_position": spans, "by_position, long answers": spans[:1]}
    auc = {"shorter": row | {"mean": 0.25}, "rubric": row, "judge": row | {"mean": None}}
    assert real_signals.figure({"prefix": {}}) is None
    picture = real_signals.figure({"positions": positions, "ropd": {"auc": auc}})
    at, aucs = picture.axes
    assert [line.get_xydata().tolist() for line in at.lines[:1]] == [[[0, 0.5], [1, 0.5]]]
    assert [label.get_text() for label in at.get_xticklabels()] == ["0", "4"]
    assert [label.get_text() for label in aucs.get_yticklabels()] == ["shorter", "rubric"]


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
    paths = world.base, world.teacher, world.prompts
    settings = real_signals.Settings(*map(str, paths), continuations=3, max_tokens=28)
    return real_signals.Pair(Run(tmp_path, settings, [], None, None), *paths)


def test_a_beginning_is_that_of_a_rollout_before_its_final_answer(world, pair):
    tokenizer = load_tokenizer(world.base)
    ids = {(r["id"], r["sample"]): r["response_ids"] for r in load(world.rollouts)}
    found = real_signals.beginnings(pair)
    assert {group for _, group, _ in found} == {"cut", "uncut"}
    for (key, group, place), end in found.items():
        assert found[key, group, "cut"] < found[key, group, "later"] < len(ids[key])
        assert final_answer(tokenizer.decode(ids[key][:end])) is None


def test_the_teacher_continues_from_the_very_ids(world, pair):
    """What it makes is graded with its beginning; a second run makes nothing."""
    (key, _, _), end = next(iter(real_signals.beginnings(pair).items()))
    prompt = pair.read_prompts()[key[0]]
    r = pair.rows("rollouts.jsonl", "rollouts")[key]
    begun = {"a": (prompt, r, end), "b": (prompt, r, len(r["response_ids"]) - 1)}
    hits = real_signals.continue_from(pair, "on", begun)
    rows = by_key(load(pair.path("on.jsonl"))).values()
    ids = {
        name: r["prompt_ids"] + r["response_ids"][:end] for name, (_, _, end) in begun.items()
    }
    assert [row["prompt_ids"] for row in rows] == [ids[row["id"]] for row in rows]
    # all of the rollout but its end stands: its answer counts, whatever is written behind it
    tokenizer = load_tokenizer(world.base)
    for name, (_, _, end) in begun.items():
        stands = tokenizer.decode(r["response_ids"][:end])
        texts = [stands + row["text"] for row in rows if row["id"] == name]
        assert hits[name] == [is_correct(text, prompt["answer"]) for text in texts]
    assert real_signals.continue_from(pair, "on", begun) == hits
    assert list(by_key(load(pair.path("on.jsonl"))).values()) == list(rows)


def test_a_failed_call_is_held_against_results_of_the_same_step():
    r = {"id": "p"}
    calls = {"e": (r, 1, False, 2.0, 0.5), "f": (r, 0, False, 1.0, 0.1)}
    calls |= {"x": (r, 1, True, 1.0, 0.2), "y": (r, 1, True, 3.0, 0.9)}
    hits = {"e": [True, False], "f": [True, True], "x": [True, True], "y": [True, False]}
    found = real_signals.after_calls(calls, hits)
    assert found["result - failed call, same step"]["mean"] == 0.75 - 0.5
    assert found["after a result"]["teacher right"]["mean"] == 0.75
    # drifts 2, 2, 1, 1 with one miss at 2: it is above the right one at 2 and both at 1
    assert found["after a failed call"]["AUC of a small d of the step"] == (0.5 + 1 + 1) / 3


def test_the_reward_of_one_judgement_is_that_of_the_first():
    rubrics = {("a",): {"criteria": [{"points": 3}, {"points": 1}]}}
    rewards = {("a", 0): {"reward": 0.5, "repeats": [[True, False], [False, True]]}}
    rewards[("a", 1)] = {"reward": None, "repeats": [[True, False]]}
    assert real_signals.first_verdicts(rewards, rubrics) == {("a", 0): 0.75}


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
