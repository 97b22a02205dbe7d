"""methods.unified support: against every sequence scored one by one, against dicts worked out
by hand, and its refusals."""

import itertools
import math
import types

import pytest
import torch
from conftest import argv, dump, load, naive_logps, naive_model, refusal, variant

import rollout
from methods import unified
from opd import policy as policies
from opd.answers import is_correct
from worlds import sums

LENGTH, END = 3, 4  # <|end|> is the fifth of the special tokens


def loud(seed):
    """Makes an untrained model's distributions far from uniform."""

    def change(model):
        head = model.lm_head.weight
        noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            head.add_(noise, alpha=0.5)

    return change


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two models of 8 tokens; three prompts of which two are the same; of each model {(x, y):
    P(y|x)} by brute force."""
    root = tmp_path_factory.mktemp("support")
    sums.write_model(root / "untrained", sums.build_tokenizer("1#?"), (16, 1, 2), 0)
    models = {
        name: variant(root / "untrained", root / name, model=loud(seed))
        for name, seed in (("before", 1), ("after", 7))
    }
    ask = [("a", "1?", "1"), ("b", "#?", "11"), ("c", "1?", "1")]
    prompts = dump(
        root / "prompts.jsonl",
        [
            {"id": i, "messages": [{"role": "user", "content": q}], "answer": a}
            for i, q, a in ask
        ],
    )
    # <|user|> ... <|assistant|>
    ids = [[2, *(5 + "1#?".index(c) for c in q), 3] for q in ("1?", "#?")]
    truth = {}
    for name, folder in models.items():
        model, truth[name] = naive_model(folder), {}
        for x, prompt in enumerate(ids):
            for y in itertools.chain.from_iterable(
                itertools.product(range(8), repeat=t) for t in range(1, LENGTH + 1)
            ):
                if END not in y[:-1] and (y[-1] == END or len(y) == LENGTH):
                    table = naive_logps(model, prompt, list(y)).detach()
                    truth[name][x, y] = math.exp(
                        sum(float(table[t, i]) for t, i in enumerate(y))
                    )
    return types.SimpleNamespace(
        root=root, prompts=prompts, ids=ids, weight=[2 / 3, 1 / 3], truth=truth, **models
    )


def measure(tiny, out, *more, **flags):
    flags = dict(prompts=tiny.prompts, max_tokens=LENGTH, floor=0, out=out) | flags
    flags = dict(before=tiny.before, after=tiny.after) | flags
    return unified.main(argv("support", *more, **flags))


def list_answers(folder, ids, floor=0.0):
    limits = unified.Limits(LENGTH, floor, 10_000)
    return unified.enumerate_answers(policies.load_policy(str(folder)), ids, limits)


def text_of(y):
    return "".join("1#?"[i - 5] for i in y if i >= 5)


def pairs_by_hand(answers, weight, only=lambda x, y: True):
    """d, asked pair by pair: which answers go through it?"""
    d = {}
    for x, s in {(x, y[: t + 1]) for x, y in answers for t in range(len(y))}:
        through = [(y, p) for (of, y), p in answers.items() if of == x and y[: len(s)] == s]
        d[x, s] = sum(weight[x] * p / len(y) for y, p in through if only(x, y))
    return d


def close(x):
    return pytest.approx(x, rel=1e-4, abs=1e-9)


# ---- against brute force


@pytest.mark.parametrize("name", ["before", "after"])
def test_enumeration_is_every_sequence_with_its_probability(tiny, name):
    for x, prompt in enumerate(tiny.ids):
        answers, stubs = list_answers(getattr(tiny, name), prompt)
        expected = {y: p for (of, y), p in tiny.truth[name].items() if of == x}
        assert len(expected) == 1 + 7 + 49 * 8 and answers.keys() == expected.keys()
        assert answers == pytest.approx(expected, rel=2e-5)
        assert max(expected.values()) > 10 * min(expected.values())
        assert not stubs and sum(answers.values()) == pytest.approx(1, abs=1e-9)


def test_every_number_is_that_of_brute_force(tiny, tmp_path, capsys):
    all_eps = [0.03, 0.01, 0.001]
    summary = measure(tiny, tmp_path / "s.jsonl", "--eps", *all_eps)
    wanted = ["1", "11"]
    expected = {"prompts": 2, "missed_mass": 0}

    def right(x, y):
        return is_correct(text_of(y), wanted[x])

    d = {when: pairs_by_hand(tiny.truth[when], tiny.weight) for when in ("before", "after")}
    old, new = d["before"], d["after"]
    for when, truth in tiny.truth.items():
        p = [sum(v for (of, y), v in truth.items() if of == x and right(x, y)) for x in (0, 1)]
        assert 0.001 < p[1] < p[0] < 0.9, "both prompts can be answered, neither surely"
        for name, k in (("accuracy", 1), ("pass@1", 1), ("pass@16", 16)):
            solved = [1 - (1 - q) ** k for q in p]
            expected[f"{name}_{when}"] = (2 * solved[0] + solved[1]) / 3
        surprise = [tiny.weight[x] * v * -math.log(v) for (x, _), v in truth.items()]
        expected[f"entropy_{when}"] = sum(surprise)
        assert sum(d[when].values()) == pytest.approx(1)
        for e in all_eps:
            kept = [x for (x, y), v in truth.items() if v >= e and right(x, y)]
            expected[f"right_answers_{when}@{e}"] = sum(tiny.weight[x] for x in kept)
    expected["total_variation"] = sum(abs(new[k] - old[k]) for k in new) / 2
    after_right = pairs_by_hand(tiny.truth["after"], tiny.weight, right)
    for e in all_eps:
        had, has = ({k for k, v in d[when].items() if v >= e} for when in ("before", "after"))
        gained, lost, common = has - had, had - has, had & has
        assert gained and lost and common, "the test would see an exchange of the two models"
        at_eps = {
            "support_before": len(had),
            "support_after": len(has),
            "expansion": len(gained),
            "attrition": len(lost),
            "common": len(common),
            "expansion_mass": sum(new[k] for k in gained),
            "attrition_mass": sum(old[k] for k in lost),
            "common_mass_before": sum(old[k] for k in common),
            "common_mass_after": sum(new[k] for k in common),
            "moved": sum(abs(new[k] - old[k]) for k in common) / 2,
            "expansion_right": sum(after_right[k] for k in gained)
            / sum(new[k] for k in gained),
        }
        expected |= {f"{name}@{e}": value for name, value in at_eps.items()}
    assert {name: summary[name] for name in expected} == close(expected)
    for name in ("expansion_right", "right_answers_after"):
        assert len({summary[f"{name}@{e}"] for e in all_eps} - {0}) > 1
    first, *lines = load(tmp_path / "s.jsonl")
    assert first["mode"] == "exact" and first["before"]["weights"] != first["after"]["weights"]
    assert first["accuracy_after"] == summary["accuracy_after"]
    assert [line["eps"] for line in lines] == all_eps
    assert all(line["moved"] == summary[f"moved@{line['eps']}"] for line in lines)
    shown = capsys.readouterr().out
    assert f"at eps 0.03: support {summary['support_before@0.03']} -> " in shown


def test_a_model_compared_with_itself_has_neither_expanded_nor_shrunk_nor_moved(tiny, tmp_path):
    summary = measure(tiny, tmp_path / "s.jsonl", after=tiny.before)
    assert summary["total_variation"] == 0 and summary["support_before@0.0001"] > 100
    for e in ("0.01", "0.001", "0.0001"):
        for name in ("expansion", "expansion_mass", "attrition", "attrition_mass", "moved"):
            assert summary[f"{name}@{e}"] == 0
        assert summary[f"expansion_right@{e}"] is None
        assert summary[f"common@{e}"] == summary[f"support_before@{e}"]


@pytest.mark.parametrize("floor", [0.002, 0.02])
def test_what_the_floor_cuts_is_reported_as_missed(tiny, floor):
    truth = {y: p for (x, y), p in tiny.truth["before"].items() if x == 0}
    starts = {y: [y[:t] for t in range(1, len(y) + 1)] for y in truth}
    prefix = dict.fromkeys(itertools.chain(*starts.values()), 0.0)
    want = dict(prefix)  # occupancy
    for y, p in truth.items():
        for s in starts[y]:
            prefix[s] += p
            want[s] += p / len(y)
    kept = {y: p for y, p in truth.items() if all(prefix[s] >= floor for s in starts[y])}
    answers, stubs = list_answers(tiny.before, tiny.ids[0], floor)
    missed = sum(stubs.values())
    assert answers == pytest.approx(kept, rel=2e-5) and 0 < len(kept) < len(truth)
    assert missed == pytest.approx(1 - sum(kept.values()), rel=1e-4) and missed > 0.005
    # a pair above the cut has all of its mass, up to the length of what was cut; without the
    # stubs it would lack that mass
    listed, cut = ({(0, y): p for y, p in part.items()} for part in (answers, stubs))
    got = unified.occupancy(listed, [1.0], cut, LENGTH)
    bare = unified.occupancy(listed, [1.0])
    for (_, s), d in got.items():
        below = sum(p for y, p in stubs.items() if y[: len(s)] == s)
        longer = below * (1 / (len(s) + 1) - 1 / LENGTH)
        assert want[s] - longer - 1e-6 <= d <= want[s] + 1e-6
    lack, more = (max(want[s] - d for (_, s), d in each.items()) for each in (got, bare))
    assert more > 2 * lack


def test_missed_mass_is_the_mean_over_prompts_of_the_worse_model(tiny, tmp_path):
    lost = []
    for folder in (tiny.before, tiny.after):
        cut = [sum(list_answers(folder, ids, 2e-5)[1].values()) for ids in tiny.ids]
        lost.append(sum(w * missed for w, missed in zip(tiny.weight, cut)))
    assert lost[0] != lost[1] and 0 < max(lost) < 1e-3
    summary = measure(tiny, tmp_path / "s.jsonl", floor=2e-5, eps=0.01)
    assert summary["missed_mass"] == pytest.approx(max(lost))


def test_the_sampler_draws_from_the_listed_distribution(tiny, tmp_path):
    flags = dict(prompts=tiny.prompts, slice=":1", n=400, max_tokens=LENGTH)
    rollout.main(argv(model=tiny.before, out=tmp_path / "r.jsonl", **flags))
    rows, truth = load(tmp_path / "r.jsonl"), tiny.truth["before"]
    for r in rows:
        listed = truth[0, tuple(r["response_ids"])]
        assert math.exp(sum(r["logprobs"])) == pytest.approx(listed, rel=1e-4)
    stopped = sum(r["finish_reason"] == "stop" for r in rows) / 400
    ends = sum(p for (x, y), p in truth.items() if x == 0 and y[-1] == END)
    assert stopped == pytest.approx(ends, abs=0.1)


# ---- the measures by hand


def test_occupancy_shares_an_answer_among_its_tokens():
    d = unified.occupancy({(0, (1, 9)): 0.75, (0, (9,)): 0.25}, [1.0])
    assert d == {(0, (1,)): 0.375, (0, (1, 9)): 0.375, (0, (9,)): 0.25}
    # answers that share a beginning add up there; the same tokens after another prompt are
    # another pair
    answers = {(0, (1, 2)): 0.5, (0, (1, 3)): 0.5, (1, (1, 2)): 1.0}
    assert unified.occupancy(answers, [0.75, 0.25]) == pytest.approx(
        {
            (0, (1,)): 0.375,
            (0, (1, 2)): 0.1875,
            (0, (1, 3)): 0.1875,
            (1, (1,)): 0.125,
            (1, (1, 2)): 0.125,
        }
    )


def test_change_by_hand():
    before, after = {"A": 0.6, "B": 0.4}, {"A": 0.3, "B": 0.05, "C": 0.65}
    found = unified.change(before, after, {"A": 0.2, "C": 0.13}, 0.1)
    assert found == pytest.approx(
        {
            "support_before": 2,
            "support_after": 2,
            "support_mass_before": 1.0,
            "support_mass_after": 0.95,
            "expansion": 1,
            "expansion_mass": 0.65,
            "expansion_right": 0.2,
            "attrition": 1,
            "attrition_mass": 0.4,
            "common": 1,
            "common_mass_before": 0.6,
            "common_mass_after": 0.3,
            "moved": 0.15,
        }
    )
    # a lower threshold takes B for common: no attrition, more moved
    lower = unified.change(before, after, {}, 0.05)
    assert (lower["attrition"], lower["common"], lower["expansion_right"]) == (0, 2, 0)
    assert lower["moved"] == pytest.approx((0.3 + 0.35) / 2)
    # eps itself is inside
    assert unified.change(before, before, {}, 0.4)["support_before"] == 2
    moved = unified.total_variation(before, after, "ABC")
    assert moved == pytest.approx((0.3 + 0.35 + 0.65) / 2)


def test_answer_numbers_by_hand():
    numbers = unified.answer_numbers({(0, (1,)): 0.25, (0, (2,)): 0.75}, {(0, (1,))}, [1.0])
    assert numbers["accuracy"] == numbers["pass@1"] == 0.25
    assert numbers["pass@4"] == pytest.approx(1 - 0.75**4)
    assert numbers["entropy"] == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    solved = {(0, (1,)): 1.0, (1, (1,)): 1.0}
    numbers = unified.answer_numbers(solved, {(0, (1,))}, [0.25, 0.75])
    assert (numbers["accuracy"], numbers["pass@256"], numbers["entropy"]) == (0.25, 0.25, 0)


# ---- refusals


def test_what_cannot_be_exact_or_compared_is_refused(tiny, tmp_path, capsys):
    def space(tokenizer):
        tokenizer.chat_template += " "

    other, template = tmp_path / "other", tmp_path / "template"
    sums.write_model(other, sums.build_tokenizer("#1?"), (16, 1, 2), 0)
    variant(tiny.before, template, tokenizer=space)
    ask = {"id": "a", "messages": [{"role": "user", "content": "1?"}]}
    bare = dump(tmp_path / "bare.jsonl", [ask])
    twice = dump(
        tmp_path / "twice.jsonl", [ask | {"answer": 1}, ask | {"id": 2, "answer": "2"}]
    )
    out = tmp_path / "s.jsonl"
    flags = dict(before=tiny.before, after=tiny.after, prompts=tiny.prompts)
    for change, words in (
        (dict(floor=0.05, eps=0.06), "missed_mass: expected at most 0.01"),
        (dict(max_prefixes=500), "at most 500 live prefixes"),
        (dict(max_prefixes=500), "prompt 2 of 2"),
        (dict(max_tokens=0), "must be"),
        (dict(eps=0), "must be"),
        (dict(eps=1.5), "must be"),
        (dict(floor=-1), "must be"),
        (dict(floor=0.1), "must be"),
        (dict(max_tokens=600), "512 positions"),
        (dict(prompts=bare), "bare.jsonl:1: answer: expected the right final answer"),
        (dict(prompts=twice), "twice.jsonl:2: answer: expected 1"),
        (dict(after=other), "policy.vocabulary: expected"),
        (dict(after=template), "policy.template: expected"),
    ):
        given = flags | dict(max_tokens=LENGTH, out=out) | change
        assert words in refusal(unified.main, argv("support", **given), capsys)
    assert not out.exists()
    out.write_text("mine")
    command = argv("support", **flags, max_tokens=LENGTH, out=out)
    assert "exists already" in refusal(unified.main, command, capsys)
    assert out.read_text() == "mine"
