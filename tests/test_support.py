"""methods/unified.py: against every sequence scored one by one, against dicts worked out by
hand, and its refusals."""

import itertools
import math
import types

import pytest
from conftest import argv, dump, load, naive_logps, naive_model, refusal, variant
from test_flags import flags_and_reads

import eval as evaluation
import rollout
from methods import unified
from opd import policy as policies
from opd import records
from opd.answers import is_correct
from worlds import sums

LENGTH, END = 3, 4  # <|end|> is the fifth of the special tokens


def loud(seed):
    """Makes an untrained model's distributions far from uniform."""

    def change(model):
        import torch

        with torch.no_grad():
            model.lm_head.weight.add_(
                torch.randn(
                    model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed)
                ),
                alpha=0.5,
            )

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
    return unified.main(
        argv(
            *more,
            **(
                dict(
                    before=tiny.before,
                    after=tiny.after,
                    prompts=tiny.prompts,
                    max_tokens=LENGTH,
                    floor=0,
                    out=out,
                )
                | flags
            ),
        )
    )


def text_of(y):
    return "".join("1#?"[i - 5] for i in y if i >= 5)


def pairs_by_hand(answers, weight, only=lambda x, y: True):
    """d, asked pair by pair: which answers go through it?"""
    pairs = {(x, y[: t + 1]) for x, y in answers for t in range(len(y))}
    return {
        (x, s): sum(
            weight[x] * p / len(y)
            for (other, y), p in answers.items()
            if other == x and y[: len(s)] == s and only(x, y)
        )
        for x, s in pairs
    }


# ---- exact, against brute force


@pytest.mark.parametrize("name", ["before", "after"])
def test_enumeration_is_every_sequence_with_its_probability(tiny, name):
    policy = policies.load_policy(str(getattr(tiny, name)))
    for x, prompt in enumerate(tiny.ids):
        answers, stubs = unified.enumerate_answers(policy, prompt, LENGTH, 0.0, 10_000)
        expected = {y: p for (of, y), p in tiny.truth[name].items() if of == x}
        assert len(expected) == 1 + 7 + 49 * 8 and answers.keys() == expected.keys()
        assert answers == pytest.approx(expected, rel=2e-5) and max(
            expected.values()
        ) > 10 * min(expected.values())
        assert not stubs and sum(answers.values()) == pytest.approx(1, abs=1e-9)


def test_every_number_of_the_exact_mode_is_that_of_brute_force(tiny, tmp_path, capsys):
    eps = [0.03, 0.01, 0.001]
    summary = measure(tiny, tmp_path / "s.jsonl", "--eps", *eps)
    wanted, d, close = ["1", "11"], {}, lambda x: pytest.approx(x, rel=1e-4, abs=1e-9)

    def right(x, y):
        return is_correct(text_of(y), wanted[x])

    for when in ("before", "after"):
        truth = tiny.truth[when]
        d[when] = pairs_by_hand(truth, tiny.weight)
        p = [sum(v for (of, y), v in truth.items() if of == x and right(x, y)) for x in (0, 1)]
        assert 0.001 < p[1] < p[0] < 0.9, "both prompts can be answered, neither surely"
        assert (
            summary[f"accuracy_{when}"]
            == close((2 * p[0] + p[1]) / 3)
            == summary[f"pass@1_{when}"]
        )
        assert summary[f"pass@16_{when}"] == close(
            (2 * (1 - (1 - p[0]) ** 16) + 1 - (1 - p[1]) ** 16) / 3
        )
        assert summary[f"entropy_{when}"] == close(
            sum(tiny.weight[x] * v * -math.log(v) for (x, _), v in truth.items())
        )
        assert sum(d[when].values()) == pytest.approx(1)
    assert summary["prompts"] == 2 and summary["missed_mass"] == 0
    assert summary["total_variation"] == close(
        sum(abs(d["after"][k] - d["before"][k]) for k in d["after"]) / 2
    )
    after_right = pairs_by_hand(tiny.truth["after"], tiny.weight, right)
    for e in eps:
        had, has = ({k for k, v in d[when].items() if v >= e} for when in ("before", "after"))
        assert (summary[f"support_before@{e}"], summary[f"support_after@{e}"]) == (
            len(had),
            len(has),
        )
        assert (
            summary[f"expansion@{e}"],
            summary[f"attrition@{e}"],
            summary[f"common@{e}"],
        ) == (len(has - had), len(had - has), len(had & has))
        assert len(has - had) > 0 and len(had - has) > 0 and len(had & has) > 0, (
            "the test would see an exchange of the two models"
        )
        assert summary[f"expansion_mass@{e}"] == close(sum(d["after"][k] for k in has - had))
        assert summary[f"attrition_mass@{e}"] == close(sum(d["before"][k] for k in had - has))
        assert summary[f"common_mass_before@{e}"] == close(
            sum(d["before"][k] for k in had & has)
        )
        assert summary[f"common_mass_after@{e}"] == close(sum(d["after"][k] for k in had & has))
        assert summary[f"moved@{e}"] == close(
            sum(abs(d["after"][k] - d["before"][k]) for k in had & has) / 2
        )
        assert summary[f"expansion_right@{e}"] == close(
            sum(after_right[k] for k in has - had) / sum(d["after"][k] for k in has - had)
        )
        for when in ("before", "after"):
            assert summary[f"right_answers_{when}@{e}"] == close(
                sum(
                    tiny.weight[x]
                    for (x, y), v in tiny.truth[when].items()
                    if v >= e and right(x, y)
                )
            )
    assert (
        len({summary[f"expansion_right@{e}"] for e in eps} - {0}) > 1
        and len({summary[f"right_answers_after@{e}"] for e in eps} - {0}) > 1
    )
    first, *lines = load(tmp_path / "s.jsonl")
    assert (
        first["mode"] == "exact"
        and first["before"]["weights"] != first["after"]["weights"]
        and first["accuracy_after"] == summary["accuracy_after"]
    )
    assert [line["eps"] for line in lines] == eps and all(
        line["moved"] == summary[f"moved@{line['eps']}"] for line in lines
    )
    last = capsys.readouterr().out.strip()
    assert (
        last.count("\n") == 1
        and "at eps 0.03 / 0.01 / 0.001" in last
        and f"expansion {summary['expansion@0.03']} / " in last
    )


def test_a_model_compared_with_itself_has_neither_expanded_nor_shrunk_nor_moved(tiny, tmp_path):
    summary = measure(tiny, tmp_path / "s.jsonl", after=tiny.before)
    assert summary["total_variation"] == 0 and summary["support_before@0.0001"] > 100
    for e in ("0.01", "0.001", "0.0001"):
        assert [
            summary[f"{name}@{e}"]
            for name in ("expansion", "expansion_mass", "attrition", "attrition_mass", "moved")
        ] == [0] * 5
        assert (
            summary[f"expansion_right@{e}"] is None
            and summary[f"common@{e}"] == summary[f"support_before@{e}"]
        )


@pytest.mark.parametrize("floor", [0.002, 0.02])
def test_what_the_floor_cuts_is_reported_as_missed(tiny, floor):
    policy = policies.load_policy(str(tiny.before))
    truth = {y: p for (x, y), p in tiny.truth["before"].items() if x == 0}
    prefix = {
        y[:t]: sum(p for other, p in truth.items() if other[:t] == y[:t])
        for y in truth
        for t in range(1, len(y) + 1)
    }
    kept = {
        y: p
        for y, p in truth.items()
        if all(prefix[y[:t]] >= floor for t in range(1, len(y) + 1))
    }
    answers, stubs = unified.enumerate_answers(policy, tiny.ids[0], LENGTH, floor, 10_000)
    missed = sum(stubs.values())
    assert answers == pytest.approx(kept, rel=2e-5) and 0 < len(kept) < len(truth)
    assert missed == pytest.approx(1 - sum(kept.values()), rel=1e-4) and missed > 0.005
    # a pair above the cut has all of its mass, up to the length of what was cut; without the
    # stubs it would lack that mass
    got = unified.occupancy(
        {(0, y): p for y, p in answers.items()},
        [1.0],
        {(0, y): p for y, p in stubs.items()},
        LENGTH,
    )
    want = {s: sum(p / len(y) for y, p in truth.items() if y[: len(s)] == s) for s in prefix}
    bare = unified.occupancy({(0, y): p for y, p in answers.items()}, [1.0])
    for (_, s), d in got.items():
        longer = sum(
            p * (1 / (len(s) + 1) - 1 / LENGTH) for y, p in stubs.items() if y[: len(s)] == s
        )
        assert want[s] - longer - 1e-6 <= d <= want[s] + 1e-6
    assert max(want[s] - d for (_, s), d in bare.items()) > 2 * max(
        want[s] - d for (_, s), d in got.items()
    )


def test_missed_mass_of_the_summary_is_the_mean_over_prompts_of_the_worse_model(tiny, tmp_path):
    lost = {}
    for name in ("before", "after"):
        policy = policies.load_policy(str(getattr(tiny, name)))
        lost[name] = sum(
            w * sum(unified.enumerate_answers(policy, ids, LENGTH, 2e-5, 10_000)[1].values())
            for w, ids in zip(tiny.weight, tiny.ids)
        )
    assert lost["before"] != lost["after"] and 0 < max(lost.values()) < 1e-3
    assert measure(tiny, tmp_path / "s.jsonl", floor=2e-5, eps=0.01)[
        "missed_mass"
    ] == pytest.approx(max(lost.values()))


def test_the_sampler_draws_from_the_listed_distribution(tiny, tmp_path):
    rollout.main(
        argv(
            model=tiny.before,
            prompts=tiny.prompts,
            slice=":1",
            n=400,
            max_tokens=LENGTH,
            out=tmp_path / "r.jsonl",
        )
    )
    rows = load(tmp_path / "r.jsonl")
    for r in rows:
        assert math.exp(sum(r["logprobs"])) == pytest.approx(
            tiny.truth["before"][0, tuple(r["response_ids"])], rel=1e-4
        )
    stopped = sum(r["finish_reason"] == "stop" for r in rows) / 400
    assert stopped == pytest.approx(
        sum(p for (x, y), p in tiny.truth["before"].items() if x == 0 and y[-1] == END), abs=0.1
    )


# ---- the measures by hand


def test_occupancy_shares_an_answer_among_its_tokens():
    assert unified.occupancy({(0, (1, 9)): 0.75, (0, (9,)): 0.25}, [1.0]) == {
        (0, (1,)): 0.375,
        (0, (1, 9)): 0.375,
        (0, (9,)): 0.25,
    }
    # answers that share a beginning add up there; the same tokens after another prompt are
    # another pair
    d = unified.occupancy(
        {(0, (1, 2)): 0.5, (0, (1, 3)): 0.5, (1, (1, 2, 3, 4)): 1.0}, [0.75, 0.25]
    )
    assert d == pytest.approx(
        {
            (0, (1,)): 0.375,
            (0, (1, 2)): 0.1875,
            (0, (1, 3)): 0.1875,
            (1, (1,)): 0.0625,
            (1, (1, 2)): 0.0625,
            (1, (1, 2, 3)): 0.0625,
            (1, (1, 2, 3, 4)): 0.0625,
        }
    )


def test_change_by_hand():
    before, after = {"A": 0.6, "B": 0.4}, {"A": 0.3, "B": 0.05, "C": 0.65}
    assert unified.change(before, after, {"A": 0.2, "C": 0.13}, 0.1) == pytest.approx(
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
    assert (lower["attrition"], lower["common"], lower["expansion_right"]) == (
        0,
        2,
        0,
    ) and lower["moved"] == pytest.approx((0.3 + 0.35) / 2)
    # the other way round what was gained is lost
    back = unified.change(after, before, {}, 0.1)
    assert (
        back["expansion"],
        back["expansion_mass"],
        back["attrition"],
        back["attrition_mass"],
    ) == (1, 0.4, 1, 0.65)
    assert unified.change(before, before, {}, 0.4)["support_before"] == 2, (
        "eps itself is inside"
    )
    assert unified.total_variation(before, after, "ABC") == pytest.approx(
        (0.3 + 0.35 + 0.65) / 2
    )


def test_answer_numbers_by_hand():
    numbers = unified.answer_numbers({(0, (1,)): 0.25, (0, (2,)): 0.75}, {(0, (1,))}, [1.0])
    assert numbers["accuracy"] == numbers["pass@1"] == 0.25 and numbers[
        "pass@4"
    ] == pytest.approx(1 - 0.75**4)
    assert numbers["entropy"] == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    one_solved = unified.answer_numbers(
        {(0, (1,)): 1.0, (1, (1,)): 1.0}, {(0, (1,))}, [0.25, 0.75]
    )
    assert (
        one_solved["accuracy"] == one_solved["pass@256"] == 0.25 and one_solved["entropy"] == 0
    )


# ---- sampled


def test_styles_and_one_prompt_by_hand():
    assert (
        unified.style("17+5=22\n#22")
        == unified.style("7+5=12\n#1")
        == "0+0=0\n#0"
        != unified.style("0+0=0 #0")
    )
    assert unified.prompt_change(
        [("a#4", True), ("b#7", False)], [("a#4", True), ("c#4", True)]
    ) == {
        "right_before": 1,
        "right_after": 2,
        "answers_before": 1,
        "answers_after": 2,
        "new_answers": ["c#4"],
        "lost_answers": [],
        "styles_before": 1,
        "styles_after": 2,
        "new_styles": ["c#0"],
        "lost_styles": [],
    }
    renumbered = unified.prompt_change([("1+3\n#4", True)], [("2+2\n#4", True)])
    assert (renumbered["new_answers"], renumbered["lost_answers"]) == (
        ["2+2\n#4"],
        ["1+3\n#4"],
    ) and not renumbered["new_styles"] + renumbered["lost_styles"]


def evals(path, rows):
    """rows {id: [text ...]}: a text is right when it ends in "!"."""
    return dump(
        path,
        [
            {"id": i, "sample": s, "text": text, "correct": text[-1] == "!"}
            for i, texts in rows.items()
            for s, text in enumerate(texts)
        ],
    )


def compare(tmp_path, before, after, **flags):
    return unified.main(
        argv(
            before_evals=evals(tmp_path / "b.jsonl", before),
            after_evals=evals(tmp_path / "a.jsonl", after),
            out=tmp_path / "s.jsonl",
            **flags,
        )
    )


def test_sampled_mode_by_hand(tmp_path, capsys):
    before = {
        1: ["7!", "7!", "8!", "no"],
        "b": ["x", "x", "x", "x"],
        "c": ["l\n9!", "x", "x", "x"],
        "d": ["x"] * 4,
    }
    after = {
        "1": ["7!", "z7!", "z8!", "7!"],
        "b": ["k!", "x", "x", "x"],
        "c": ["x"] * 4,
        "d": ["x", "y", "z", "w"],
    }
    summary = compare(tmp_path, before, after)
    assert (summary["prompts"], summary["n"]) == (4, 4)
    assert (
        summary["accuracy_before"] == summary["pass@1_before"] == (3 + 1) / 16
        and summary["pass@1_after"] == (4 + 1) / 16
    )
    assert summary["pass@4_before"] == summary["pass@4_after"] == 0.5
    assert summary["solved_only_after"] == summary["solved_only_before"] == 0.25
    assert (summary["right_answers_before"], summary["right_answers_after"]) == (
        (2 + 1) / 4,
        (3 + 1) / 4,
    )
    assert (summary["new_answers"], summary["lost_answers"]) == ((2 + 1) / 4, (1 + 1) / 4)
    assert (summary["right_styles_before"], summary["right_styles_after"]) == (
        (1 + 1) / 4,
        (2 + 1) / 4,
    )
    assert (summary["new_styles"], summary["lost_styles"]) == ((1 + 1) / 4, 1 / 4)
    lines = load(tmp_path / "s.jsonl")
    assert (
        [line["id"] for line in lines] == ["1", "b", "c", "d"]
        and lines[0]["new_answers"] == ["z7!", "z8!"]
        and lines[2]["lost_styles"] == ["l\n0!"]
    )
    assert "pass@1 0.250 -> 0.312" in capsys.readouterr().out


def test_the_same_samples_show_no_change(tmp_path):
    rows = {i: ["7!", "8!", "x"] for i in range(3)}
    summary = compare(tmp_path, rows, rows)
    assert all(
        summary[name] == 0
        for name in (
            "new_answers",
            "lost_answers",
            "new_styles",
            "lost_styles",
            "solved_only_after",
            "solved_only_before",
        )
    )
    assert summary["right_answers_before"] == summary["right_answers_after"] == 2


def test_other_prompts_and_other_counts_are_refused(tmp_path):
    two = {"a": ["x", "y!"], "b": ["x", "y!"]}
    with pytest.raises(records.BadInput, match="a.jsonl: id: .* id 'c'"):
        compare(tmp_path, two, two | {"c": ["x", "y!"]})
    with pytest.raises(
        records.BadInput, match="expected 2 samples a prompt, as in .*b.jsonl, got 1"
    ):
        compare(tmp_path, two, {"a": ["x"], "b": ["x"]})
    with pytest.raises(records.BadInput, match="as many samples of every prompt, got 1 and 2"):
        compare(tmp_path, two, two | {"b": ["x"]})
    assert not (tmp_path / "s.jsonl").exists()


def test_the_same_ids_in_another_prompts_file_are_refused(tmp_path):
    files = []
    for name, answer in (("one", "4"), ("two", "5")):
        prompts = dump(
            tmp_path / f"{name}.prompts.jsonl", [{"id": "a", "prompt": "?", "answer": answer}]
        )
        answers = dump(
            tmp_path / f"{name}.answers.jsonl",
            [
                {
                    "id": "a",
                    "sample": 0,
                    "policy": {"model": "m"},
                    "text": "#4",
                    "finish_reason": "stop",
                }
            ],
        )
        files.append(tmp_path / f"{name}.jsonl")
        evaluation.main(argv(rollouts=answers, prompts=prompts, out=files[-1]))
    assert (
        unified.main(
            argv(before_evals=files[0], after_evals=files[0], out=tmp_path / "s.jsonl")
        )["accuracy_after"]
        == 1
    )
    with pytest.raises(
        records.BadInput, match="two.jsonl: expected answers to the prompts file"
    ):
        unified.main(
            argv(
                before_evals=files[0],
                after_evals=files[1],
                out=tmp_path / "s2.jsonl",
            )
        )


# ---- refusals


def test_what_cannot_be_exact_is_refused_and_names_the_way_out(tiny, tmp_path, capsys):
    flags = dict(
        before=tiny.before,
        after=tiny.after,
        prompts=tiny.prompts,
        max_tokens=LENGTH,
        out=tmp_path / "s.jsonl",
    )
    message = refusal(unified.main, argv(floor=0.05, **flags, eps=0.06), capsys)
    assert (
        "missed_mass: expected at most 0.01" in message
        and "--floor" in message
        and "--before-evals" in message
    )
    message = refusal(unified.main, argv(max_prefixes=500, **flags), capsys)
    assert (
        "at most 500 live prefixes" in message
        and "prompt 2 of 2" in message
        and "--before-evals" in message
    )
    for wrong in (
        dict(max_tokens=0),
        dict(eps=0),
        dict(eps=1.5),
        dict(floor=-1),
        dict(floor=0.1),
    ):
        assert "must be" in refusal(unified.main, argv(**flags | wrong), capsys)
    assert "512 positions" in refusal(
        unified.main, argv(**flags | dict(max_tokens=600)), capsys
    )
    assert not (tmp_path / "s.jsonl").exists()


def test_prompts_without_an_answer_or_with_two_are_refused(tiny, tmp_path, capsys):
    ask = [{"role": "user", "content": "1?"}]
    for rows, expected in (
        ([{"id": "a", "messages": ask}], "p.jsonl:1: answer: expected the right final answer"),
        (
            [
                {"id": "a", "messages": ask, "answer": 1},
                {"id": "b", "messages": ask, "answer": "2"},
            ],
            "p.jsonl:2: answer: expected 1",
        ),
    ):
        prompts = dump(tmp_path / "p.jsonl", rows)
        assert expected in refusal(
            unified.main,
            argv(
                before=tiny.before,
                after=tiny.after,
                prompts=prompts,
                max_tokens=2,
                out=tmp_path / "s.jsonl",
            ),
            capsys,
        )


def test_models_of_two_vocabularies_or_templates_are_refused(tiny, tmp_path, capsys):
    sums.write_model(tmp_path / "other", sums.build_tokenizer("#1?"), (16, 1, 2), 0)

    def strict(tokenizer):
        tokenizer.chat_template += " "

    variant(tiny.before, tmp_path / "template", tokenizer=strict)
    for name, field in (("other", "vocabulary"), ("template", "template")):
        message = refusal(
            unified.main,
            argv(
                before=tiny.before,
                after=tmp_path / name,
                prompts=tiny.prompts,
                max_tokens=2,
                out=tmp_path / "s.jsonl",
            ),
            capsys,
        )
        assert f"policy.{field}: expected" in message


def test_flags_of_the_other_mode_and_missing_ones_are_refused(tmp_path, capsys):
    exact, sampled = (
        ["--before", "a", "--after", "b", "--prompts", "p", "--max-tokens", "3"],
        ["--before-evals", "a", "--after-evals", "b"],
    )
    cases = [
        (exact[2:], "--before: is missing"),
        (exact[:6], "--max-tokens: is missing"),
        (sampled[:2], "--after-evals: is missing"),
        (exact + sampled, "--before: belongs to the exact mode"),
        (sampled + ["--eps", "0.1"], "--eps: belongs"),
        (sampled + ["--max-prefixes", "5"], "--max-prefixes: belongs"),
        ([], "--before: is missing"),
        (exact + ["--no-such", "1"], "--no-such"),
    ]
    for flags, expected in cases:
        with pytest.raises(SystemExit) as stopped:
            unified.main([*flags, "--out", str(tmp_path / "s.jsonl")])
        assert stopped.value.code == 2 and expected in capsys.readouterr().err
    (tmp_path / "s.jsonl").write_text("mine")
    assert "exists already" in refusal(
        unified.main, [*sampled, "--out", str(tmp_path / "s.jsonl")], capsys
    )
    assert (tmp_path / "s.jsonl").read_text() == "mine"


def test_every_flag_is_read_and_help_opens_with_a_runnable_example(capsys):
    flags, reads = flags_and_reads("methods/unified.py")
    assert flags and not flags - reads
    with pytest.raises(SystemExit):
        unified.main(["--help"])
    assert "    python -m methods.unified --before " in capsys.readouterr().out
