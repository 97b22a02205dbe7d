"""The numbers of experiments/real_signals.py, by hand; its smoke run does the rest."""

import types
from itertools import product

import pytest
from conftest import dump, load

from experiments import real_signals
from opd import records
from opd.answers import final_answer
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


def test_a_begun_text_is_the_beginning_of_a_rollout_without_a_final_answer(world, tmp_path):
    tokenizer = load_tokenizer(world.base)
    rollouts = [r for r in load(world.rollouts) if len(r["response_ids"]) > 8]
    weights = []
    for i, r in enumerate(rollouts):
        length = len(r["response_ids"])
        spans = [[t, min(t + 2, length)] for t in range(0, length, 2)]
        row = {"id": r["id"], "sample": r["sample"], "rollout": records.fingerprint(r)}
        cut = {"rule": "release", "kept": 0.5, "scale": 1.0, "cut": 1 if i % 2 else None}
        weights.append(row | cut | {"weights": [1.0] * length, "blocks": spans})
    dump(tmp_path / "rollouts.jsonl", rollouts)
    dump(tmp_path / "cuts_faithful.jsonl", weights)
    run = types.SimpleNamespace(out=tmp_path, settings=real_signals.Settings())
    pair = real_signals.Pair(run, world.base, world.teacher, world.prompts, {})
    begun = list(real_signals.begun_texts(pair))
    texts = {(r["id"], r["sample"]): tokenizer.decode(r["response_ids"]) for r in rollouts}
    assert {p["begun"]["group"] for p in begun} == {"cut", "uncut"}
    assert len({p["id"] for p in begun}) == len(begun)
    for p in begun:
        assert not records.validate(p, "prompts")
        text = p["messages"][-1]["content"]
        assert texts[tuple(p["begun"]["of"])].startswith(text) and final_answer(text) is None
    for cut, later in zip(begun[::2], begun[1::2]):
        assert cut["begun"] | {"place": "later"} == later["begun"]
        short, long = (p["messages"][-1]["content"] for p in (cut, later))
        assert long.startswith(short) and len(long) > len(short)
