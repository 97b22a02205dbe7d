"""The numbers of experiments/real_signals.py and real_continue.py, by hand; a smoke run does
the rest."""

import dataclasses
import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import by_key, dump, load
from fake_server import FakeServer

from experiments import by_prompt, real_continue, real_signals
from experiments.real_continue import Call
from experiments.study import Run
from opd import records
from opd.answers import final_answer, is_correct
from opd.policy import load_tokenizer
from opd.stats import auc_by_prompt
from opd.tools import Toolbox


def test_prompts_weigh_alike_however_many_rollouts_they_have():
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 8.0, ("c", 0): None}
    found = by_prompt.over_prompts(values)
    assert found == {"mean": 5.0, "half": pytest.approx(12.7062 * 3), "prompts": 2}
    assert by_prompt.over_prompts({("c", 0): None})["mean"] is None


def test_quarters_hold_every_value_once_also_where_many_lie_at_the_cap():
    values = {(str(i), 0): float(i) for i in range(12)}
    rows = by_prompt.quarters(values, {key: min(x, 5) for key, x in values.items()})
    assert [row["prompts"] for row in rows] == [3] * 4
    assert [(row["low"], row["high"]) for row in rows] == [(0, 2), (3, 5), (5, 5), (5, 5)]


def test_a_difference_is_within_the_prompts_that_have_both():
    ones = {("a", 0): 3.0, ("a", 1): 5.0, ("b", 0): 9.0, ("c", 0): 7.0}
    others = {("a", 2): 1.0, ("c", 1): 2.0, ("d", 0): 0.0}
    found = by_prompt.difference(ones, others)
    assert (found["mean"], found["prompts"]) == (4.0, 2)
    # within (prompt, step), then a number a prompt
    ones = {("a", 0, "x"): 3.0, ("a", 1, "x"): 9.0, ("b", 1, "x"): 5.0}
    others = {("a", 0, "y"): 2.0, ("a", 1, "y"): 4.0, ("b", 0, "y"): 7.0}
    assert by_prompt.difference(ones, others, 2) == by_prompt.over_prompts({("a", 0): 3.0})


def test_the_share_of_the_gap_is_that_of_all_tokens():
    gaps = {("a", 0): np.array([3.0, 1.0, 0.0]), ("b", 0): np.array([2.0])}
    assert real_signals.share_before(gaps, 1) == {"tokens": 2 / 4, "gap": 5 / 6}


def test_what_only_says_that_there_is_an_answer_tells_nothing_among_answers():
    right = {("a", i): x for i, x in enumerate([True, True, False, False])}
    signals = {"has a final answer": {("a", i): x for i, x in enumerate([1, 1, 1, 0])}}
    signals["teacher log-prob"] = {("a", i): x for i, x in enumerate([4.0, 1.0, 3.0, 0.0])}
    signals["rubric, m = 1"] = dict.fromkeys(right, 1.0)
    both = real_signals.aucs(signals, list(right), right)
    assert both["has a final answer"]["mean"] == 0.75
    assert both["has a final answer"]["minus teacher log-prob"]["mean"] == 0.0
    assert both["has a final answer"]["minus rubric, m = 1"]["mean"] == 0.25
    ended = real_signals.aucs(signals, list(right)[:3], right)
    means = {name: row["mean"] for name, row in ended.items()}
    assert means == {"has a final answer": 0.5, "teacher log-prob": 0.5, "rubric, m = 1": 0.5}


def test_a_signal_is_judged_inside_each_prompt():
    """A prompt whose answers are all right says nothing."""
    right = {("a", 0): True, ("a", 1): False, ("a", 2): True, ("b", 0): True, ("b", 1): True}
    values = {("a", 0): 2.0, ("a", 1): 1.0, ("b", 0): 5.0, ("b", 1): 0.0}
    assert auc_by_prompt(values, right) == {("a",): 1.0, ("b",): None}
    values[("a", 2)] = 1.0
    pairs = [(2.0, 1.0), (1.0, 1.0)]
    wins = sum((x > y) + (x == y) / 2 for x, y in pairs) / 2
    assert auc_by_prompt(values, right)[("a",)] == wins


def test_signals_are_held_against_each_other_on_rollouts_that_all_of_them_know(pair):
    right = {("a", 0): True, ("a", 1): False, ("a", 2): False}
    pair.correct = lambda: right
    signals = {"rubric, m = 1": {("a", 0): 0.5, ("a", 1): None, ("a", 2): 0.5}}
    signals["teacher log-prob"] = {("a", i): -float(i) for i in range(3)}
    signals["has a final answer"] = {("a", 0): True, ("a", 1): True, ("a", 2): False}
    found = real_signals.on_known(pair, signals, right)
    assert (found["rollouts"], found["with a final answer"]) == (2, 1)
    means = {name: row["mean"] for name, row in found["auc"].items()}
    expected = {"teacher log-prob": 1.0, "rubric, m = 1": 0.5, "has a final answer": 1.0}
    assert means == expected
    ended = found["auc among answers with a final answer"]
    assert {row["mean"] for row in ended.values()} == {None}  # nothing wrong is left


def test_guesses_are_the_answers_to_other_prompts():
    """Against all draws of two answers that were not given to the prompt."""
    given = {"a": ["4", "5", None], "b": ["6", "4.0", "4"], "c": ["-6", "6", "5"]}
    wanted = {"a": "4", "b": ["6", "-6"], "c": "7"}
    found = real_signals.guess_curve(given, wanted, 2)
    assert list(found) == [1, 2]
    for prompt, answer in wanted.items():
        others = [x for name, row in given.items() if name != prompt for x in row]
        hits = [x is not None and is_correct(f"#### {x}", answer) for x in others]
        assert found[1][(prompt,)] == pytest.approx(np.mean(hits))
        assert found[2][(prompt,)] == pytest.approx(
            np.mean([any(x) for x in product(hits, hits)])
        )
    assert real_signals.guess_curve({"a": ["4"]}, {"a": "4"}, 2) == {1: {}, 2: {}}


def test_pass_at_k_stands_at_n_and_where_there_are_answers_enough():
    found = real_signals.pass_curve({"a": (1, 3), "b": (2, 2)}, 3)
    assert list(found) == [1, 2, 3]
    assert found[1] == pytest.approx({("a",): 1 / 3, ("b",): 1.0})
    assert found[2] == pytest.approx({("a",): 2 / 3, ("b",): 1.0})
    assert found[3] == {("a",): 1.0}


@pytest.mark.parametrize("prompts", [1, 3])
def test_the_support_of_two_models(pair, prompts):
    """One prompt has no guesses, and a prompt outside of the slice needs no answer."""
    rows = [json.loads(line) for line in Path(pair.prompts).read_text().splitlines()]
    path = pair.path("asked.jsonl")
    dump(path, rows[:prompts] + [{"id": "later", "prompt": "?"}])
    settings = dataclasses.replace(pair.settings, support_prompts=prompts, support_n=3)
    run = Run(pair.run.out, settings, [], None, None)
    pair = real_signals.Pair(run, pair.student, pair.teacher, path)
    part = real_signals.support(pair)
    for name in ("student", "teacher"):
        counts = part["right of all, by prompt"][name]
        shares = [right / n for right, n in counts.values()]
        assert len(shares) == prompts
        assert part["pass@k"][name][1]["mean"] == pytest.approx(np.mean(shares))
        assert part["pass@k"][name][3]["mean"] == np.mean([share > 0 for share in shares])
        guesses = part["pass@k"][f"{name}, guessing"][3]
        assert guesses["prompts"] == (prompts if prompts > 1 else 0)
    assert real_signals.figure({"support": json.loads(json.dumps(part))})


def test_the_teacher_goes_on_from_the_cut_and_from_half_of_the_rest():
    for n, blocks in product(range(1, 8), range(0, 8)):
        places = real_continue.two_places([[i, i + 1] for i in range(n)], blocks)
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
    rollouts = {(r["id"], r["sample"]): r for r in load(pair.path("rollouts.jsonl"))}
    evals = [{"id": k[0], "sample": k[1], "correct": k[1] % 2 == 0} for k in rollouts]
    pair.correct = lambda: {(row["id"], row["sample"]): row["correct"] for row in evals}
    found = real_continue.beginnings(pair)
    assert {group for _, group, _ in found} == {"start", "cut", "wrong", "right"}
    of_prompt = {}
    for (key, group, place), end in found.items():
        assert end < len(rollouts[key]["response_ids"])
        assert final_answer(tokenizer.decode(rollouts[key]["response_ids"][:end])) is None
        of_prompt.setdefault((key[0], group), set()).add(key)
        if group == "cut":
            assert found[key, group, "cut"] < found[key, group, "later"]
        elif group == "start":
            assert end == 0
        else:
            assert (group == "right") == (key[1] % 2 == 0)
            assert found[key, group, 0.25] < found[key, group, 0.5] < found[key, group, 0.75]
    assert all(len(keys) == 1 for of, keys in of_prompt.items() if of[1] != "cut")


def test_quarters_are_of_blocks():
    spans = [[0, 5], [5, 6], [6, 20], [20, 21], [21, 30], [30, 31], [31, 40], [40, 41]]
    assert real_continue.quarters_of(spans) == {0.25: 6, 0.5: 21, 0.75: 31}
    assert real_continue.quarters_of(spans[:4]) == {0.25: 5, 0.5: 6, 0.75: 20}
    assert real_continue.quarters_of(spans[:3]) == {}


def test_rates_by_place_and_their_differences_within_prompts():
    a, b = ("p", 0), ("p", 1)
    hits = {(a, "start", 0): [True, True], (a, "wrong", 0.75): [True, False]}
    hits |= {(b, "right", 0.75): [True, True], (("q", 0), "wrong", 0.75): [False, False]}
    hits |= {(a, "cut", "cut"): [True], (a, "cut", "later"): [False]}
    places = dict.fromkeys(hits, 4) | {(a, "wrong", 0.75): 8}
    found = real_continue.by_place(places, hits)
    row = found["teacher right"]["wrong"]["0.75"]
    assert (row["rollouts"], row["tokens"], row["mean"], row["prompts"]) == (2, 6.0, 0.25, 2)
    means = {name: x["mean"] for name, x in found["differences"].items()}
    assert means.pop("right - wrong, at 0.75") == 0.5
    assert means.pop("start - 0.75 of a wrong answer") == 0.5
    assert means.pop("start - 0.75 of a right answer") == 0.0
    assert means.pop("cut - later") == 1.0
    assert set(means.values()) == {None}


def test_places_are_told_apart_by_their_own_block_and_gap(pair):
    """The teacher succeeds from the earlier of two places: where the margin is larger, the gap
    so far smaller."""
    key = next(iter(pair.rows("rollouts.jsonl", "rollouts")))
    weights = pair.rows("cuts_faithful.jsonl", "weights")
    blocks = weights[key]["blocks"]
    signal = list(range(len(blocks), 0, -1))
    dump(pair.path("cuts_faithful.jsonl"), [weights[key] | {"signal": signal}])
    pair.gaps = lambda: {key: np.arange(blocks[-1][1])}
    places = {(key, "wrong", 0.25): blocks[0][1], (key, "wrong", 0.5): blocks[1][1]}
    places |= {(key, "start", 0): 0}
    names = {of: str(of[2]) for of in places}
    hits = {"0.25": [True, True], "0.5": [False, True], "0": [True]}
    found = real_continue.predictors(pair, places, hits, names)
    # one miss against three hits, of which one is at its place
    assert len(found) == 3
    for among in ("of a prompt", "of an answer"):
        assert {row[among]["mean"] for row in found.values()} == {(1 + 1 + 0.5) / 3}


def test_what_tells_answers_apart_need_not_tell_places_apart():
    """Two answers to a prompt: the signal is larger in the right one, whatever the place."""
    values = {("p", 0, 0.25): 2.0, ("p", 0, 0.5): 2.0, ("p", 1, 0.25): 1.0, ("p", 1, 0.5): 1.0}
    right = dict(zip(values, [True, False, False, False]))
    assert by_prompt.auc_within(values, right, 1)["mean"] == (0.5 + 1 + 1) / 3
    assert by_prompt.auc_within(values, right, 2) == by_prompt.over_prompts({("p",): 0.5})


def test_the_teacher_continues_from_the_very_ids(world, pair):
    """What it makes is graded with its beginning; a second run makes nothing."""
    key, r = next(iter(pair.rows("rollouts.jsonl", "rollouts").items()))
    end = 4
    prompt = pair.read_prompts()[key[0]]
    begun = {"a": (prompt, r, end), "b": (prompt, r, len(r["response_ids"]) - 1)}
    hits = real_continue.continue_from(pair, "on", begun)
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
    assert real_continue.continue_from(pair, "on", begun) == hits
    assert list(by_key(load(pair.path("on.jsonl"))).values()) == list(rows)


@pytest.fixture
def agents_pair(agents, tmp_path):
    """What continuing asks of a Pair, of the world with tools."""
    settings = SimpleNamespace(dtype="float32", max_tokens=60, seed=0, continuations=1)
    run = SimpleNamespace(write=lambda name, _, rows: dump(tmp_path / name, rows))
    pair = SimpleNamespace(settings=settings, run=run, teacher=str(agents.teacher))
    pair.path = lambda name: str(tmp_path / name)
    return pair


def test_an_episode_is_continued_behind_an_output_with_the_tool_at_hand(agents, agents_pair):
    prompts = {p["id"]: p for p in load(agents.prompts)}
    begun = {}
    for r in load(agents.rollouts):
        if r["calls"]:
            begun[f"{r['id']}~{r['sample']}"] = (prompts[r["id"]], r, r["steps"][1][0])
    toolbox = Toolbox("calculator", "brackets", 3)
    hits = real_continue.continue_from(agents_pair, "on", begun, toolbox)
    rows = {row["id"]: row for row in load(agents_pair.path("on.jsonl"))}
    assert any(row["calls"] for row in rows.values())
    for name, (prompt, r, end) in begun.items():
        assert rows[name]["prompt_ids"] == r["prompt_ids"] + r["response_ids"][:end]
        assert hits[name] == [is_correct(rows[name]["final"], prompt["answer"])]


def test_what_can_be_saved_is_told_with_the_calls_of_the_teacher(
    agents, agents_pair, monkeypatch
):
    """Two episodes of a prompt whose first calls are taken for a failed one and a result."""
    how = {"call_format": "brackets", "max_calls": 3}
    monkeypatch.setattr(real_continue, "CALLS", how)
    called = {}
    for r in load(agents.rollouts):
        if r["calls"]:
            called.setdefault(r["id"], []).append(r)
    (one, other) = next(found for found in called.values() if len(found) > 1)[:2]
    calls = [Call(one, 0, False, 1.0, 1.0), Call(other, 0, True, 1.0, 1.0)]
    monkeypatch.setattr(real_continue, "calls_of", lambda pair: calls)
    dump(agents_pair.path("episode_prompts.jsonl"), load(agents.prompts))
    found = real_continue.saved(agents_pair)
    rows = by_key(load(agents_pair.path("saved.jsonl"))).values()
    begun = [r["prompt_ids"] + r["response_ids"][: r["steps"][1][0]] for r in (one, other)]
    assert sorted(row["prompt_ids"] for row in rows) == sorted(begun)
    assert [found[f"after a {kind}"]["calls"] for kind in ("failed call", "result")] == [1, 1]
    own = [call["ok"] for row in rows for call in row["calls"]]
    assert own and found["continuations"]["calls"] == len(own) / 2
    assert found["continuations"]["call_errors"] == pytest.approx(1 - np.mean(own))


P, Q = {"id": "p", "sample": 0}, {"id": "q", "sample": 0}


def test_a_failed_call_is_held_against_results_of_the_same_step():
    calls = {"e": Call(P, 1, False, 2.0, 0.5), "f": Call(Q, 0, False, 1.0, 0.1)}
    calls |= {"x": Call(P, 1, True, 1.0, 0.2), "y": Call(P, 1, True, 3.0, 0.9)}
    calls |= {"z": Call(Q, 0, True, 1.0, np.nan)}
    hits = {"e": [True, False], "f": [True, False], "x": [True, True], "y": [True, False]}
    hits["z"] = [False, False]
    found = real_continue.after_calls(calls, hits)
    # p: 0.75 - 0.5, q: 0 - 0.5
    assert found["result - failed call, same step"]["mean"] == (0.25 - 0.5) / 2
    assert found["after a result"]["teacher right"]["mean"] == (0.75 + 0.0) / 2
    aucs = found["AUC among calls of a prompt"]
    # p: hits at drift 1, 1, 2, 3 against misses at 2, 3; q: a hit against misses, all at 1
    p = (1 + 1 + 1 + 1 + 0.5 + 1 + 0 + 0.5) / 8
    assert aucs["small d"]["mean"] == (p + 0.5) / 2
    # p: three of four hits have a result, and one of two misses; q: the hit has none
    p = (3 + 0.5 + 3 * 0.5) / 8
    assert aucs["call had a result"]["mean"] == (p + 0.5 / 3) / 2
    assert aucs["early step"]["mean"] == 0.5
    # the next step's drift is not known of `z`: q has a hit and a miss at 0.1
    assert aucs["small d of the next step"]["prompts"] == 2


def test_drift_after_a_failed_call_is_that_above_results_of_the_same_step():
    calls = [
        Call(P, 0, False, 1.0, 4.0),
        Call(P, 0, True, 2.0, 2.5),
        Call(P, 0, True, 1.0, 1.5),
    ]
    calls += [Call(P, 1, False, 9.0, 9.0), Call(Q, 0, True, 1.0, 1.0)]
    calls += [Call(Q, 0, False, 1.0, np.nan)]
    (found,) = real_continue.drift_after(calls).values()
    assert found["d of the next step"] == {"mean": 2.0, "half": None, "prompts": 1}
    assert found["change of d"]["mean"] == 3.0 - 0.5


def test_only_steps_with_both_kinds_of_calls_are_continued():
    r = [{"id": "p", "sample": i} for i in range(5)]
    calls = [Call(r[i], 0, i != 0, 1.0, 1.0) for i in range(5)]
    calls += [Call(r[0], 1, True, 1.0, 1.0), Call(Q, 0, False, 1.0, 1.0)]
    assert set(real_continue.matched(calls)) == {"p~0~0", "p~1~0"}
    assert set(real_continue.matched(calls, most=2)) == {"p~0~0", "p~1~0", "p~2~0"}


def judge(body):
    """A rubricator with four criteria; a verifier that approves of everything in a pool and of
    short answers alone; a holistic judge of length."""
    document = json.loads(body["messages"][1]["content"])
    if "answers" in document:
        verdicts = [{"judgement": [True] * 4} for _ in document["answers"]]
        return json.dumps(
            {"verdicts": [v | {"answer_index": i} for i, v in enumerate(verdicts, 1)]}
        )
    if "criteria" in document:
        return json.dumps({"judgement": [len(document["answer"]) < 12, True, True, True]})
    if "attempts" in document:
        merit = {"category": "Task Completion", "points": 5}
        named = [{"id": f"c{i}", "criterion": f"merit {i}"} for i in range(1, 5)]
        return json.dumps({"criteria": [merit | each for each in named]})
    return json.dumps({"score": min(10, len(document["answer"]))})


def test_a_served_judge_in_all_its_roles(tmp_path):
    with FakeServer(chat=judge) as fake:
        words = ["--judge", "j", "--judge-url", fake.base_url, "--out", str(tmp_path)]
        real_signals.main(["--smoke", *words, "--parts", "base", "ropd"])
        asked = [json.loads(body["messages"][1]["content"]) for body in fake.bodies()]
    part = json.loads((tmp_path / "signals.json").read_text())["ropd"]
    texts = {k: r["text"] for k, r in by_key(load(tmp_path / "judged.jsonl")).items()}
    assert len({len(text) < 12 for text in texts.values()}) == 2
    paid = {
        "rewards1": lambda text: 1.0,
        "rewards4": lambda text: 1.0,
        "rewards1_single": lambda text: 1.0 if len(text) < 12 else 0.75,
        "rewards4_single": lambda text: 1.0 if len(text) < 12 else 0.75,
        "holistic": lambda text: min(10, len(text)) / 10,
    }
    for name, wanted in paid.items():
        rows = by_key(load(tmp_path / f"{name}.jsonl"))
        assert {k: row["reward"] for k, row in rows.items()} == {
            k: pytest.approx(wanted(text)) for k, text in texts.items()
        }, name
    kinds = {"rubric, m = 1", "rubric, m = 4", "rubric, m = 1, one by one", "holistic judge"}
    assert kinds <= part["auc"].keys() and part["rollouts"] == len(texts)
    one_by_one = [d for d in asked if "criteria" in d and "answer" in d]
    # twice, with each of two rubrics; equal answers to a prompt come from the cache
    assert 2 * len(set(texts.values())) <= len(one_by_one) <= 4 * len(texts)


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
    found = list(real_continue.calls_of(pair))
    assert [(call.place[1], call.ok) for call in found] == [(0, True), (1, False)]
    assert [(call.d, call.d_next) for call in found] == [(1.0, 2.0), (2.0, 3.0)]
