"""eval.py: the estimators against enumeration and simulation, grading and its resume; and
experiments/report.py: tables paired by seed, plots."""

import itertools
import math
import random

import numpy as np
import pytest
from conftest import argv, dump, load, make_rewards

import eval as evaluation
import experiments.report as report
import rubric
from opd import stats
from opd.records import BadInput


def rollout(prompt_id, sample, text, finish_reason="stop", tokens=3):
    asked = {"id": prompt_id, "sample": sample, "policy": {"model": "m"}, "prompt_ids": [1]}
    sampled = {"response_ids": list(range(tokens)), "loss_mask": [1] * tokens}
    sampled |= {"logprobs": [-0.5] * tokens, "temperature": 1.0, "top_p": 1.0}
    return asked | {"text": text, "finish_reason": finish_reason} | sampled


@pytest.fixture
def small(tmp_path):
    """Two prompts, four answers each: one right answer to the first, four to the second, three
    truncated."""
    ask = [{"id": 1, "prompt": "?", "answer": 2}, {"id": "b", "prompt": "?", "answer": "4"}]
    rows = [rollout(1, 0, "1+1=2\n#2", tokens=1)]
    rows += [rollout(1, s, "#7", "length", tokens=s + 1) for s in (1, 2, 3)]
    rows += [rollout("b", s, "2+2=4\n#4", tokens=10) for s in range(4)]
    return {
        "prompts": dump(tmp_path / "prompts.jsonl", ask),
        "rollouts": dump(tmp_path / "rollouts.jsonl", rows),
        "out": tmp_path / "eval.jsonl",
    }


def evaluate(small, **flags):
    return evaluation.main(argv(**small | flags))


# ---- estimators


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_counts_the_subsets_that_hold_a_right_answer(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        share = sum(map(any, subsets)) / len(subsets)
        assert stats.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_t_quantile_matches_the_integral_of_the_density():
    for f in (1, 2, 3, 11, 200):
        x = np.linspace(0, stats.t_quantile(f), 40_001)
        scale = math.exp(math.lgamma((f + 1) / 2) - math.lgamma(f / 2)) / math.sqrt(f * np.pi)
        inside = 2 * scale * np.trapezoid((1 + x**2 / f) ** (-(f + 1) / 2), x)
        assert inside == pytest.approx(0.95, abs=3e-4), f
    mean, half = stats.interval([0.2, 0.4, 0.6])
    assert (mean, half) == pytest.approx((0.4, 4.3027 * 0.2 / 3**0.5))
    assert stats.interval([0.7]) == (0.7, None)


def test_auc_is_the_share_of_pairs_ranked_right():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values, right = rng.integers(0, 4, 12) / 3, rng.random(12) < 0.4
        pairs = itertools.product(values[right], values[~right])
        won = [(a > b) + 0.5 * (a == b) for a, b in pairs]
        assert stats.auc(values, right) == (pytest.approx(np.mean(won)) if won else None)


def prose(characters):
    rng = random.Random(1)
    return "".join(rng.choices("add the next term 0123456789\n", k=characters))


LOOP = "so 2+2=4\n" * 100


@pytest.mark.parametrize(
    "text, tail, loops",
    [
        (LOOP, 512, True),
        (prose(2000), 256, False),
        # only the tail counts
        (prose(2000) + LOOP, 256, True),
        (LOOP + prose(2000), 256, False),
        ("", 256, False),
        # half a surrogate pair is no crash
        ("\ud800é" * 500, 256, True),
        (LOOP * 20, 10_000, True),
        (prose(20_000), 10_000, False),
    ],
)
def test_the_repetition_ratio_tells_loops_from_prose(text, tail, loops):
    assert (stats.repetition_ratio(text, tail) > (10 if tail == 10_000 else 4)) == loops


# ---- grading

LINE = {"id": 1, "correct": True, "length": 9, "truncated": False, "text": "", "repetition": 0}


def summarise(*lines, threshold=4.0):
    return evaluation.summarise([LINE | line for line in lines], 256, threshold)


def test_short_answers_are_never_repetitive():
    loop = {"text": "4\n" * 127, "repetition": 19.0}  # 254 characters: below the tail
    longer = loop | {"text": "4\n" * 128}
    transcript = longer | {"calls": [], "tool_limit": False}
    assert summarise(transcript | {"final": loop["text"]})["repetition_rate"] == 0
    assert summarise(loop)["repetition_rate"] == 0
    assert summarise(loop, longer)["repetition_rate"] == 0.5
    assert summarise(loop, longer, threshold=20.0)["repetition_rate"] == 0


def test_summary_of_a_fixture_is_exact(small):
    s = evaluate(small)
    expected = {
        "prompts": 2,
        "n": 4,
        "answers": 8,
        "accuracy": 0.625,
        "pass@1": 0.625,
        "pass@2": 0.75,
        "pass@4": 1.0,
        "truncated_fraction": 3 / 8,
        "repetition_rate": 0,
        "length_mean": (1 + 2 + 3 + 4 + 40) / 8,
        "length_max": 10,
        "generated_tokens": 50,
        # two prompts say next to nothing; clipped to [0, 1]
        "accuracy_low": 0,
        "accuracy_high": 1,
    }
    assert {name: s[name] for name in expected} == pytest.approx(expected)
    lines = load(small["out"])
    assert [r["correct"] for r in lines] == [True, False, False, False] + [True] * 4
    first = {"id": 1, "sample": 0, "text": "1+1=2\n#2", "correct": True, "length": 1}
    assert lines[0] | {"repetition": 0} == first | {"truncated": False, "repetition": 0}


def test_pass_at_every_power_of_two_and_n_and_no_interval_without_spread():
    summary = summarise(*[{}] * 6)
    assert [k for k in summary if k.startswith("pass@")] == [f"pass@{k}" for k in (1, 2, 4, 6)]
    assert summary["accuracy_low"] is None, "one prompt has no spread to estimate"
    summary = summarise(*({"id": i} for i in range(9)))
    # nor have nine that agree: that is not certainty
    assert summary["accuracy"] == 1 and summary["accuracy_high"] is None
    asked = [(1, True)] * 2 + [("1", False)] * 2 + [(2, True)]  # 1 and "1" are one prompt
    means = summarise(*({"id": i, "correct": c} for i, c in asked))
    assert means["accuracy"] == pytest.approx((0.5 + 1) / 2)


def test_lengths_that_an_api_does_not_show_are_unknown(small, tmp_path):
    rows = [rollout(1, 0, "#2"), rollout("b", 0, "#5")]
    shown = ("id", "sample", "policy", "text", "finish_reason")
    answers = dump(tmp_path / "a.jsonl", [{k: r[k] for k in shown} for r in rows])
    none = evaluate(small, rollouts=answers)
    assert none["accuracy"] == 0.5
    for summary in (none, summarise({}, {"length": None})):
        lengths = ("length_mean", "length_max", "generated_tokens")
        assert [summary[name] for name in lengths] == [None] * 3


def test_resume_neither_doubles_nor_loses_nor_grades_again(small, monkeypatch):
    evaluate(small)
    out, rollouts = small["out"], small["rollouts"]
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed in the middle of the fourth
    assert evaluate(small)["answers"] == 8 and out.read_bytes() == whole
    dump(rollouts, load(rollouts) + [rollout(i, 4, "#4") for i in (1, "b")])  # it may grow
    assert evaluate(small)["n"] == 5
    monkeypatch.setattr(evaluation, "grade", lambda *_: pytest.fail("graded an answer again"))
    evaluate(small)


def test_resume_refuses_another_tail_and_changed_rollouts(small):
    evaluate(small)
    with pytest.raises(BadInput, match="tail"):
        evaluate(small, tail=512)
    assert evaluate(small, tail=512, overwrite=True)["answers"] == 8
    small["rollouts"].write_text(small["rollouts"].read_text().replace("#7", "#8"))
    with pytest.raises(BadInput, match="changed"):
        evaluate(small, tail=512)


def test_a_prompt_needs_an_answer_and_zero_is_one(small):
    for answer in ({}, {"answer": None}, {"answer": ""}, {"answer": 0}):
        ask = {"id": "b", "prompt": "?"} | answer
        dump(small["prompts"], load(small["prompts"])[:1] + [ask])
        if answer == {"answer": 0}:
            assert evaluate(small)["accuracy"] == 0.125
            break
        with pytest.raises(BadInput, match=r"prompts\.jsonl:2: answer: expected"):
            evaluate(small)
        assert not small["out"].exists()


def test_missing_prompts_and_unequal_samples_are_refused_unless_partial(small):
    rows = load(small["rollouts"])
    for left, words in ((4, "4 answers to every prompt, got 0 to id 'b'"), (7, "got 3 to")):
        dump(small["rollouts"], rows[:left])
        with pytest.raises(BadInput, match=words):
            evaluate(small)
    s = evaluate(small, partial=True)
    assert (s["n"], s["answers"], s["accuracy"]) == (3, 7, pytest.approx(0.625))
    assert s["pass@3"] == pytest.approx((stats.pass_at_k(4, 1, 3) + 1) / 2)


def test_answers_without_a_reward_are_counted(small, tmp_path):
    rows = load(small["rollouts"])
    flags = dict(grader="answer", prompts=small["prompts"])
    for name, some in (("some", rows[:4]), ("other", [rollout("b", 9, "#9")])):
        path = dump(tmp_path / f"{name}.jsonl", some)
        rubric.main(argv("grade", **flags, rollouts=path, out=tmp_path / f"{name}.rewards"))
    s = evaluate(small, rewards=tmp_path / "some.rewards")
    assert (s["unrewarded"], s["reward_auc"]) == (4, 1)
    with pytest.raises(BadInput, match="expected rewards of these answers"):
        evaluate(small, rewards=tmp_path / "other.rewards")


def test_rollouts_of_other_prompts_and_other_files_are_refused(small, tmp_path):
    for wrong in (small["prompts"], tmp_path / "absent.jsonl"):
        with pytest.raises(BadInput):
            evaluate(small, rollouts=wrong)
    dump(small["rollouts"], load(small["rollouts"]) + [rollout("zzz", 0, "#4")])
    with pytest.raises(BadInput, match="zzz"):
        evaluate(small)


def test_a_model_is_sampled(world, tmp_path):
    out = tmp_path / "e.jsonl"
    flags = argv(model=world.base, prompts=world.prompts, out=out, n=1, slice="0:2")
    assert evaluation.main([*flags, *argv(max_tokens=8, seed=3)])["answers"] == 2
    sampled = load(tmp_path / "e.rollouts.jsonl")
    assert [r["text"] for r in load(out)] == [r["text"] for r in sampled]
    assert all(len(r["response_ids"]) <= 8 and r["temperature"] == 1 for r in sampled)


def test_flags_that_would_do_nothing_are_refused(small):
    for flags in (dict(seed=3), dict(n=4), dict(model="M"), dict(tail=0)):
        with pytest.raises(SystemExit):
            evaluate(small, **flags)


def test_rewards_are_joined_by_rollout_and_failed_ones_left_out(tmp_path):
    texts = ("#1", "#2", "#1")
    rows = [rollout(i, s, text) for i in ("a", "b") for s, text in enumerate(texts)]
    ask = [{"id": i, "prompt": "?", "answer": "1"} for i in ("a", "b")]
    files = {
        "prompts": dump(tmp_path / "p.jsonl", ask),
        "rollouts": dump(tmp_path / "r.jsonl", rows),
    }
    values = iter((0.9, 0.8, None, 0.2, 0.1, 0.1))
    made = make_rewards(files["rollouts"], tmp_path / "w.jsonl", lambda r: next(values))
    files["rewards"] = made
    summary = evaluation.main(argv(**files, out=tmp_path / "e.jsonl"))
    # a: 0.9 above 0.8; b: one above, one tied
    assert summary["reward_auc_within"] == pytest.approx((1 + 0.75) / 2)
    assert summary["reward_auc"] == pytest.approx(np.mean([1, 1, 0, 1, 0, 0.5]))
    rows[0]["text"] = "#7"
    dump(files["rollouts"], rows)
    with pytest.raises(BadInput, match="other rollouts"):
        evaluation.main(argv(**files, out=tmp_path / "e2.jsonl"))


# ---- tables


def result(arm, seed, accuracy, step=40, final=True, **more):
    row = {"arm": arm, "seed": seed, "step": step, "final": final, "accuracy": accuracy}
    return row | {"generated_tokens": 1000 * step, "seconds": 2.0 * step} | more


# seeds differ a lot, the arms within a seed by 0.10, 0.11, 0.12: paired certain, unpaired not
PAIRED = [result("before", s, a, step=0) for s, a in enumerate((0.1, 0.4, 0.7))]
PAIRED += [result("ropd", s, a, length_mean=30 + s) for s, a in enumerate((0.2, 0.51, 0.82))]


def table(tmp_path, rows, **flags):
    path = str(dump(tmp_path / "results.jsonl", rows))
    return {line["arm"]: line for line in report.main(["table", path, *argv(**flags)])[path]}


def test_table_pairs_by_seed_number_not_by_order(tmp_path, capsys):
    lines = table(tmp_path, [PAIRED[i] for i in (2, 0, 1, 4, 5, 3)])
    before, ropd = lines["before"], lines["ropd"]
    assert ropd["difference"] == pytest.approx(0.11)
    assert ropd["difference_half"] == pytest.approx(4.3027 * 0.01 / 3**0.5)
    assert ropd["half"] > 0.5 and before["half"] > 0.5, "the arms themselves are uncertain"
    assert before["difference"] is None and list(ropd["values"]) == [0, 1, 2]
    assert "| ropd | 3 | 0.510 ± 0.770 | +0.110 ± 0.025 |" in capsys.readouterr().out
    assert ropd["columns"]["length_mean"] == 31 and before["columns"]["length_mean"] is None


def test_only_final_checkpoints_count_and_arms_keep_their_order(tmp_path):
    rows = [result("z", 0, 0.9, 10, False), result("z", 0, 0.5, 20), result("before", 0, 0.1)]
    lines = table(tmp_path, rows)
    assert list(lines) == ["z", "before"]
    assert (lines["z"]["mean"], lines["z"]["half"]) == (0.5, None)
    assert lines["z"]["difference"] == pytest.approx(0.4)


def test_missing_seeds_are_refused_or_marked(tmp_path):
    stopped = PAIRED[:-1] + [PAIRED[-1] | {"final": False}]
    begun = PAIRED + [result("begun", 0, 0.3, final=False)]
    for rows, arm, missing, pairs, difference in (
        (PAIRED[:-1], "ropd", [2], 2, 0.105),
        (stopped, "ropd", [2], 2, 0.105),
        (begun, "begun", [0, 1, 2], 0, None),
        # a baseline that misses seeds is paired on what both have
        (PAIRED[1:], "before", [0], 2, None),
    ):
        with pytest.raises(BadInput, match=f"arm '{arm}' has no line with `final` true for"):
            table(tmp_path, rows)
        line = table(tmp_path, rows, partial=True)[arm]
        assert (line["missing"], line["pairs"]) == (missing, pairs)
        assert line["difference"] == (difference and pytest.approx(difference))


def test_table_refuses_doubled_runs_and_unknown_arms(tmp_path):
    nan = [row | {"kl": float("nan")} for row in PAIRED]
    for rows, flags, words in (
        (PAIRED + PAIRED[-1:], {}, "one line, got another"),
        (PAIRED + [PAIRED[-1] | {"step": 80}], {}, "one final line"),
        (PAIRED, {"baseline": "nobody"}, "nobody"),
        (PAIRED, {"metric": "nothing"}, "nothing: expected a finite number, got None"),
        (nan, {"metric": "kl"}, "(?i)nan"),
    ):
        with pytest.raises(BadInput, match=words):
            table(tmp_path, rows, **flags)


def test_tables_are_written_once_and_do_not_mix(tmp_path):
    one = dump(tmp_path / "one.jsonl", PAIRED)
    half = [row | {"accuracy": row["accuracy"] / 2} for row in PAIRED]
    two = dump(tmp_path / "two.jsonl", half)
    out = tmp_path / "new folder" / "table.md"
    command = argv("table", one, two, out=out, columns="length_mean", baseline="ropd")
    tables = report.main(command)
    means = [tables[str(path)][1]["mean"] for path in (one, two)]
    assert means == pytest.approx([0.51, 0.255]) and "| -0.110 ± 0.025 |" in out.read_text()
    with pytest.raises(BadInput, match="exists already"):
        report.main(command)
    report.main([*command, "--overwrite"])


# ---- plots

CURVES = [result("before", s, 0.1 + s / 10, step=0) for s in range(3)]
CURVES += [result("teacher", s, 0.97, step=0) for s in range(3)]
CURVES += [
    result(arm, s, 0.1 + s / 10 + gain * step / 40, step=step, final=step == 40)
    for arm, gain in (("ropd", 0.5), ("sft", 0.4))
    for s in range(3)
    for step in (0, 20, 40)
]


def plot(tmp_path, rows, name="x.png", **flags):
    path = dump(tmp_path / "x.jsonl", rows)
    return report.main(argv("plot", path, out=tmp_path / name, **flags))


def test_plot_writes_a_png_with_a_line_an_arm(tmp_path):
    summary = plot(tmp_path, CURVES)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    axes = report.figure(summary["lines"], "accuracy", "step", "x").axes[0]
    drawn = [(line.get_label().split()[0], line.get_linestyle()) for line in axes.lines]
    assert drawn == [("before", "--"), ("teacher", ":"), ("ropd", "-"), ("sft", "-")]
    assert list(axes.lines[2].get_xdata()) == [0, 20, 40]
    assert list(axes.lines[2].get_ydata()) == pytest.approx([0.2, 0.45, 0.7])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.1, 0.8))
    flags = dict(x="generated_tokens", metric="seconds", arms="ropd", name="y.png")
    lines = plot(tmp_path, CURVES, **flags)["lines"]
    assert [point[:2] for point in lines["ropd"]] == [(0, 0), (20_000, 40), (40_000, 80)]
    for flags, words in (
        ({}, "exists already"),
        (dict(name="z.png", arms="nobody"), "expected arms of"),
        (dict(name="x"), "ends in"),
        (dict(name="z.png", metric="nothing"), "nothing: expected a finite number"),
        (dict(name="z.png", metric="arm"), "arm: expected a finite number"),
    ):
        with pytest.raises(BadInput, match=words):
            plot(tmp_path, CURVES, **flags)


def test_plot_leaves_out_checkpoints_that_some_seed_or_the_metric_lacks(tmp_path, capsys):
    rows = [dict(r, proxy=r["step"] / 10) for r in CURVES if r["arm"] in ("ropd", "sft")]
    for r in rows:
        if r["arm"] == "ropd" and not r["step"]:
            del r["proxy"]
    gone = {("ropd", 1, 40), ("sft", 0, 20), ("sft", 0, 40)}
    rows = [r for r in rows if (r["arm"], r["seed"], r["step"]) not in gone]
    lines = plot(tmp_path, rows, metric="proxy")["lines"]
    assert [point[:2] for point in lines["ropd"]] == [(20, 2)]
    said = capsys.readouterr().out
    assert "left out: arm 'ropd', step 40: no line for seed 1" in said
    assert "left out: arm 'ropd', step 0: no proxy" in said
    # one checkpoint left of a curve is a point, not a level
    axes = report.figure(lines, "proxy", "step", "x").axes[0]
    assert axes.lines[1].get_linestyle() == "-"


def test_gaps_are_paired_by_seed_within_a_prefix(tmp_path):
    """a - b is 0.1 and 0.3 at 0.5, x-a - x-b is -0.2 in the one seed both have, at the mean of
    x-b in that seed; seeds differ by more than the arms."""
    rows = []
    for arm, seed, value, share in (
        ("b", 0, 0.2, 0.4),
        ("b", 1, 0.6, 0.6),
        ("a", 0, 0.3, 0),
        ("a", 1, 0.9, 0),
        ("x-b", 1, 0.5, 0.9),
        ("x-b", 2, 0.1, 0.1),
        ("x-a", 1, 0.3, 0),
        ("y-a", 1, 0.3, 0),
    ):
        rows += [result(arm, seed, value, 4, share=share), result(arm, seed, 0.0, 0, False)]
    path, out = dump(tmp_path / "r.jsonl", rows), tmp_path / "g.png"
    found = report.main(argv("gaps", path, arms="a", against="b", at="share", out=out))
    (name, at, mean, half), (other, far, gap, none) = found["a"]
    assert (name, other, none) == ("", "x", None)
    assert (at, mean, far, gap) == pytest.approx((0.5, 0.2, 0.9, -0.2))
    assert half == pytest.approx(12.7062 * np.std([0.1, 0.3], ddof=1) / 2**0.5)
    assert out.read_bytes()[:4] == b"\x89PNG"
    for arms, against in (("z", "b"), ("a", "z")):
        flags = dict(arms=arms, against=against, at="share", out=tmp_path / "h.png")
        with pytest.raises(BadInput, match="'z'"):
            report.main(argv("gaps", path, **flags))
