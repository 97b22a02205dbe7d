"""methods.unified support: against every sequence scored one by one, against dicts worked out
by hand, and its refusals."""

import itertools
import math
import types

import pytest
import torch
from conftest import argv, dump, load, naive_logps, naive_model, refusal, variant

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


def every_answer():
    """Token lists that end at <|end|> or at LENGTH."""
    for length in range(1, LENGTH + 1):
        for y in itertools.product(range(8), repeat=length):
            if END not in y[:-1] and (y[-1] == END or length == LENGTH):
                yield list(y)


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
    prompts = []
    for name, question, answer in (("a", "1?", "1"), ("b", "#?", "11"), ("c", "1?", "1")):
        messages = [{"role": "user", "content": question}]
        prompts.append({"id": name, "messages": messages, "answer": answer})
    prompts = dump(root / "prompts.jsonl", prompts)
    # <|user|> ... <|assistant|>
    ids = [[2, *(5 + "1#?".index(c) for c in q), 3] for q in ("1?", "#?")]
    truth = {}
    for name, folder in models.items():
        model, truth[name] = naive_model(folder), {}
        for (x, prompt), y in itertools.product(enumerate(ids), every_answer()):
            table = naive_logps(model, prompt, y).detach()
            logp = sum(float(table[t, i]) for t, i in enumerate(y))
            truth[name][x, tuple(y)] = math.exp(logp)
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


ALL_EPS = [0.03, 0.01, 0.001]


@pytest.fixture(scope="module")
def measured(tiny):
    """(summary, lines) of the command."""
    return measure(tiny, tiny.root / "s.jsonl", "--eps", *ALL_EPS), load(tiny.root / "s.jsonl")


def right(x, y):
    return is_correct(text_of(y), ["1", "11"][x])


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_numbers_of_answers_are_those_of_brute_force(tiny, measured, when):
    truth, expected = tiny.truth[when], {}
    p = [sum(v for (of, y), v in truth.items() if of == x and right(x, y)) for x in (0, 1)]
    assert 0.001 < p[1] < p[0] < 0.9, "both prompts can be answered, neither surely"
    for name, k in (("accuracy", 1), ("pass@1", 1), ("pass@16", 16)):
        solved = [1 - (1 - q) ** k for q in p]
        expected[f"{name}_{when}"] = (2 * solved[0] + solved[1]) / 3
    surprise = [tiny.weight[x] * v * -math.log(v) for (x, _), v in truth.items()]
    expected[f"entropy_{when}"] = sum(surprise)
    for e in ALL_EPS:
        kept = [x for (x, y), v in truth.items() if v >= e and right(x, y)]
        expected[f"right_answers_{when}@{e}"] = sum(tiny.weight[x] for x in kept)
    assert {name: measured[0][name] for name in expected} == close(expected)


def test_the_numbers_of_the_support_are_those_of_brute_force(tiny, measured):
    old, new = (pairs_by_hand(tiny.truth[when], tiny.weight) for when in ("before", "after"))
    assert sum(old.values()) == pytest.approx(1)
    after_right = pairs_by_hand(tiny.truth["after"], tiny.weight, right)
    moved = sum(abs(new[k] - old[k]) for k in new) / 2
    expected = {"prompts": 2, "missed_mass": 0, "total_variation": moved}
    for e in ALL_EPS:
        had, has = ({k for k, v in d.items() if v >= e} for d in (old, new))
        gained, lost, common = has - had, had - has, had & has
        assert gained and lost and common, "the test would see an exchange of the two models"
        mass = sum(new[k] for k in gained)
        at_eps = {
            "support_before": len(had),
            "support_after": len(has),
            "expansion": len(gained),
            "attrition": len(lost),
            "common": len(common),
            "expansion_mass": mass,
            "attrition_mass": sum(old[k] for k in lost),
            "common_mass_before": sum(old[k] for k in common),
            "common_mass_after": sum(new[k] for k in common),
            "moved": sum(abs(new[k] - old[k]) for k in common) / 2,
            "expansion_right": sum(after_right[k] for k in gained) / mass,
        }
        expected |= {f"{name}@{e}": value for name, value in at_eps.items()}
    summary, (first, *lines) = measured
    assert {name: summary[name] for name in expected} == close(expected)
    assert first["mode"] == "exact" and first["before"]["weights"] != first["after"]["weights"]
    assert [(r["eps"], r["moved"]) for r in lines] == [
        (e, summary[f"moved@{e}"]) for e in ALL_EPS
    ]
    # eps itself is inside
    assert unified.change({"A": 0.6, "B": 0.4}, {}, {}, 0.4)["support_before"] == 2


@pytest.mark.parametrize("floor", [0.002, 0.02])
def test_what_the_floor_cuts_is_reported_as_missed(tiny, floor):
    truth = {(x, y): p for (x, y), p in tiny.truth["before"].items() if x == 0}
    through = dict.fromkeys(((y[:t] for _, y in truth for t in range(1, len(y) + 1))), 0.0)
    for (_, y), p in truth.items():
        for t in range(len(y)):
            through[y[: t + 1]] += p
    kept = {y: p for (_, y), p in truth.items() if through[y] >= floor}
    answers, stubs = list_answers(tiny.before, tiny.ids[0], floor)
    missed = sum(stubs.values())
    assert answers == pytest.approx(kept, rel=2e-5) and 0 < len(kept) < len(truth)
    assert missed == pytest.approx(1 - sum(kept.values()), rel=1e-4) and missed > 0.005
    # a pair above the cut has all of its mass, up to the length of what was cut; without the
    # stubs it would lack that mass
    want = pairs_by_hand(truth, [1.0])
    listed, cut = ({(0, y): p for y, p in part.items()} for part in (answers, stubs))
    got = unified.occupancy(listed, [1.0], cut, LENGTH)
    bare = unified.occupancy(listed, [1.0])
    for (x, s), d in got.items():
        below = sum(p for y, p in stubs.items() if y[: len(s)] == s)
        longer = below * (1 / (len(s) + 1) - 1 / LENGTH)
        assert want[x, s] - longer - 1e-6 <= d <= want[x, s] + 1e-6
    lack, more = (max(want[k] - d for k, d in each.items()) for each in (got, bare))
    assert more > 2 * lack


def test_missed_mass_is_the_mean_over_prompts_of_the_worse_model(tiny, tmp_path):
    lost = []
    for folder in (tiny.before, tiny.after):
        cut = [sum(list_answers(folder, ids, 2e-5)[1].values()) for ids in tiny.ids]
        lost.append(sum(w * missed for w, missed in zip(tiny.weight, cut)))
    assert lost[0] != lost[1] and 0 < max(lost) < 1e-3
    summary = measure(tiny, tmp_path / "s.jsonl", floor=2e-5, eps=0.01)
    assert summary["missed_mass"] == pytest.approx(max(lost))


# ---- refusals


def test_what_cannot_be_exact_or_compared_is_refused(tiny, tmp_path, capsys):
    def space(tokenizer):
        tokenizer.chat_template += " "

    other, template = tmp_path / "other", tmp_path / "template"
    sums.write_model(other, sums.build_tokenizer("#1?"), (16, 1, 2), 0)
    variant(tiny.before, template, tokenizer=space)
    ask = {"id": "a", "messages": [{"role": "user", "content": "1?"}]}
    bare = dump(tmp_path / "bare.jsonl", [ask])
    both = [ask | {"answer": 1}, ask | {"id": 2, "answer": "2"}]
    twice = dump(tmp_path / "twice.jsonl", both)
    out = tmp_path / "s.jsonl"
    flags = dict(before=tiny.before, after=tiny.after, prompts=tiny.prompts)
    for change, words in (
        (dict(floor=0.05, eps=0.06), "missed_mass: expected at most 0.01"),
        (dict(max_prefixes=500), "prompt 2 of 2"),
        (dict(max_tokens=0), "must be"),
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
