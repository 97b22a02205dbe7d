"""eval.py: the estimators against enumeration and simulation, grading and its resume; and
experiments/report.py: tables paired by seed, plots."""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import argv, dump, load, refusal, run_program

import eval as evaluation
import experiments.report as report
from opd import records, stats
from opd.records import BadInput


def rollout(prompt_id, sample, text, finish_reason="stop", tokens=3):
    return {
        "id": prompt_id,
        "sample": sample,
        "policy": {"model": "m"},
        "text": text,
        "finish_reason": finish_reason,
        "prompt_ids": [1],
        "response_ids": list(range(tokens)),
        "loss_mask": [1] * tokens,
        "logprobs": [-0.5] * tokens,
        "temperature": 1.0,
        "top_p": 1.0,
    }


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
    for f in (1, 2, 3, 10, 11, 15, 30, 200):
        x = np.linspace(0, stats.t_quantile(f), 400_001)
        scale = math.exp(math.lgamma((f + 1) / 2) - math.lgamma(f / 2)) / math.sqrt(f * np.pi)
        inside = 2 * scale * np.trapezoid((1 + x**2 / f) ** (-(f + 1) / 2), x)
        assert inside == pytest.approx(0.95, abs=3e-4), f
    mean, half = stats.interval([0.2, 0.4, 0.6])
    assert (mean, half) == pytest.approx((0.4, 4.3027 * 0.2 / 3**0.5))
    assert stats.interval([0.7]) == (0.7, None)


def test_interval_covers_95_percent_and_one_over_all_answers_does_not():
    """Prompts of unlike difficulty, 16 answers each: prompts are the independent draws, answers
    are not."""
    rng = np.random.default_rng(0)
    trials, prompts, n, covered, covered_flat = 2000, 50, 16, 0, 0
    for row in rng.binomial(n, rng.beta(0.5, 0.5, (trials, prompts))) / n:
        mean, half = stats.interval(row)
        covered += abs(mean - 0.5) <= half
        covered_flat += abs(mean - 0.5) <= 1.96 * (mean * (1 - mean) / (prompts * n)) ** 0.5
    assert 0.935 < covered / trials < 0.965
    assert covered_flat / trials < 0.6


def test_auc_is_the_share_of_pairs_ranked_right():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values, right = rng.integers(0, 4, 12) / 3, rng.random(12) < 0.4
        pairs = itertools.product(values[right], values[~right])
        won = [(a > b) + 0.5 * (a == b) for a, b in pairs]
        assert stats.auc(values, right) == (pytest.approx(np.mean(won)) if won else None)


def prose(characters):
    words = "add the next term to the running sum then write what it makes and go on".split()
    rng = random.Random(1)
    text = [rng.choice(words) + str(rng.randrange(100)) for _ in range(characters)]
    return " ".join(text)[:characters]


@pytest.mark.parametrize(
    "text, tail, loops",
    [
        ("so 2+2=4\n" * 100, 256, True),
        ("so 2+2=4\n" * 100, 512, True),
        (prose(2000), 256, False),
        # only the tail counts
        (prose(2000) + "so 2+2=4\n" * 50, 256, True),
        ("so 2+2=4\n" * 50 + prose(2000), 256, False),
        ("", 256, False),
        # half a surrogate pair is no crash
        ("\ud800é" * 500, 256, True),
        ("wait, let me check again. " * 1000, 10_000, True),
        (prose(20_000), 10_000, False),
    ],
)
def test_the_repetition_ratio_tells_loops_from_prose(text, tail, loops):
    assert (stats.repetition_ratio(text, tail) > (10 if tail == 10_000 else 4)) == loops


# ---- grading

LINE = {"id": 1, "correct": True, "length": 9, "truncated": False, "text": "", "repetition": 0}


def test_short_answers_are_never_repetitive():
    loop = LINE | {"text": "4\n" * 127, "repetition": 19.0}  # 254 characters: below the tail
    longer = loop | {"text": "4\n" * 128}
    for lines, threshold, rate in (
        ([loop], 4.0, 0),
        ([loop, longer], 4.0, 0.5),
        ([loop, longer], 20.0, 0),
    ):
        assert evaluation.summarise(lines, 256, threshold)["repetition_rate"] == rate


def test_summary_of_a_fixture_is_exact(small, capsys):
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
    line = capsys.readouterr().out.strip()
    assert "\n" not in line and "accuracy 0.625" in line and "truncated 37.5%" in line
    lines = load(small["out"])
    assert [r["correct"] for r in lines] == [True, False, False, False] + [True] * 4
    first = {"id": 1, "sample": 0, "text": "1+1=2\n#2", "correct": True, "length": 1}
    assert lines[0] | {"repetition": 0} == first | {"truncated": False, "repetition": 0}


def test_pass_at_every_power_of_two_and_n_and_no_interval_without_spread():
    summary = evaluation.summarise([LINE] * 6, 256, 4)
    assert [k for k in summary if k.startswith("pass@")] == [f"pass@{k}" for k in (1, 2, 4, 6)]
    assert summary["accuracy_low"] is None, "one prompt has no spread to estimate"
    summary = evaluation.summarise([LINE | {"id": i} for i in range(9)], 256, 4)
    # nor have nine that agree: that is not certainty
    assert summary["accuracy"] == 1 and summary["accuracy_high"] is None


def test_accuracy_is_the_mean_of_prompt_means():
    asked = [(1, True)] * 2 + [("1", False)] * 2 + [(2, True)]  # 1 and "1" are one prompt
    lines = [LINE | {"id": i, "correct": c} for i, c in asked]
    assert evaluation.summarise(lines, 256, 4)["accuracy"] == pytest.approx((0.5 + 1) / 2)


def test_lengths_that_an_api_does_not_show_are_unknown(small, tmp_path):
    rows = [rollout(1, 0, "#2"), rollout("b", 0, "#5")]
    shown = ("id", "sample", "policy", "text", "finish_reason")
    answers = dump(tmp_path / "a.jsonl", [{k: r[k] for k in shown} for r in rows])
    none, half = evaluate(small, rollouts=answers), [LINE, LINE | {"length": None}]
    assert none["accuracy"] == 0.5
    for summary in (none, evaluation.summarise(half, 256, 4)):
        lengths = ("length_mean", "length_max", "generated_tokens")
        assert [summary[name] for name in lengths] == [None] * 3


def test_an_answer_stopped_by_the_tool_limit_is_not_truncated():
    assert not evaluation.grade(rollout(1, 0, "#2", "tool_limit"), 2, 256)["truncated"]
    assert evaluation.grade(rollout(1, 0, "#2", "length"), 2, 256)["truncated"]


def test_resume_neither_doubles_nor_loses_nor_grades_again(small, monkeypatch):
    evaluate(small)
    out, rollouts = small["out"], small["rollouts"]
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed in the middle of the fourth
    assert evaluate(small)["answers"] == 8 and out.read_bytes() == whole
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "grade", lambda *_: pytest.fail("graded an answer again"))
        evaluate(small)
    assert out.read_bytes() == whole
    dump(rollouts, load(rollouts) + [rollout(i, 4, "#4") for i in (1, "b")])  # it may grow
    assert evaluate(small)["n"] == 5


def test_resume_refuses_another_tail_and_changed_rollouts(small):
    evaluate(small)
    with pytest.raises(BadInput, match="tail"):
        evaluate(small, tail=512)
    assert evaluate(small, tail=512, overwrite=True)["answers"] == 8
    small["rollouts"].write_text(small["rollouts"].read_text().replace("#7", "#8"))
    with pytest.raises(BadInput, match="changed"):
        evaluate(small, tail=512)


@pytest.mark.parametrize("answer", [{}, {"answer": None}, {"answer": ""}, {"answer": 0}])
def test_a_prompt_needs_an_answer_and_zero_is_one(small, answer):
    ask = [{"id": 1, "prompt": "?", "answer": 2}, {"id": "b", "prompt": "?", **answer}]
    dump(small["prompts"], ask)
    if answer.get("answer") == 0:
        assert evaluate(small)["accuracy"] == 0.125
        return
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


def test_rollouts_of_other_prompts_and_other_files_are_refused(small, tmp_path):
    for wrong in (small["prompts"], tmp_path / "absent.jsonl"):
        with pytest.raises(BadInput):
            evaluate(small, rollouts=wrong)
    dump(small["rollouts"], load(small["rollouts"]) + [rollout("zzz", 0, "#4")])
    with pytest.raises(BadInput, match="zzz"):
        evaluate(small)


def test_a_model_is_sampled_and_part_of_the_prompts_only_when_meant(world, tmp_path, capsys):
    out = tmp_path / "e.jsonl"
    flags = argv(model=world.base, prompts=world.prompts, out=out, n=1, slice="0:2")
    flags += argv(max_tokens=8, seed=3)
    assert "1 answers to every prompt, got 0" in refusal(evaluation.main, flags, capsys)
    assert evaluation.main([*flags, "--partial"])["answers"] == 2
    sampled = load(tmp_path / "e.rollouts.jsonl")
    assert [r["text"] for r in load(out)] == [r["text"] for r in sampled]
    assert all(len(r["response_ids"]) <= 8 and r["temperature"] == 1 for r in sampled)


@pytest.mark.parametrize(
    "words",
    ["--seed 3", "--n 4", "--no-such-flag", "--part", "--model M", "--tail 0"],
)
def test_flags_that_would_do_nothing_are_refused(small, words):
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(argv(**small) + words.split())
    assert stopped.value.code == 2


def test_rewards_are_joined_by_rollout_and_failed_ones_left_out(tmp_path):
    texts = ("#1", "#2", "#1")
    rows = [rollout(i, s, text) for i in ("a", "b") for s, text in enumerate(texts)]
    rewards = [
        {
            "id": r["id"],
            "sample": r["sample"],
            "reward": value,
            "grader": "g",
            "rollout": records.fingerprint(r),
            "status": "failed" if value is None else "ok",
        }
        for r, value in zip(rows, (0.9, 0.8, None, 0.2, 0.1, 0.1))
    ]
    ask = [{"id": i, "prompt": "?", "answer": "1"} for i in ("a", "b")]
    files = {
        "prompts": dump(tmp_path / "p.jsonl", ask),
        "rollouts": dump(tmp_path / "r.jsonl", rows),
        "rewards": dump(tmp_path / "w.jsonl", rewards),
    }
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
    text = capsys.readouterr().out
    assert "| ropd | 3 | 0.510 ± 0.770 | +0.110 ± 0.025 |" in text
    assert "0:0.200 1:0.510 2:0.820" in text
    assert ropd["columns"]["length_mean"] == 31 and before["columns"]["length_mean"] is None


def test_only_final_checkpoints_count_and_arms_keep_their_order(tmp_path):
    rows = [result("z", 0, 0.9, step=10, final=False), result("z", 0, 0.5, step=20)]
    rows += [result("before", 0, 0.1), result("a", 0, 0.3)]
    lines = table(tmp_path, rows)
    assert list(lines) == ["z", "before", "a"]
    assert (lines["z"]["mean"], lines["z"]["half"]) == (0.5, None)
    assert lines["z"]["difference"] == pytest.approx(0.4)


def test_missing_seeds_are_refused_or_marked(tmp_path, capsys):
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
    text = capsys.readouterr().out
    assert "| ropd | 2 (misses 2) |" in text and "(2 pairs)" in text


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
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    dump(one, PAIRED)
    dump(two, [row | {"accuracy": row["accuracy"] / 2} for row in PAIRED])
    out = tmp_path / "new folder" / "table.md"
    command = argv("table", one, two, out=out, columns="length_mean", baseline="ropd")
    tables = report.main(command)
    assert tables[str(one)][1]["mean"] == pytest.approx(0.51)
    assert tables[str(two)][1]["mean"] == pytest.approx(0.255)
    text = out.read_text()
    assert "| arm | seeds | accuracy | vs ropd | length_mean | each seed |" in text
    assert "## two" in text and "| -0.110 ± 0.025 |" in text
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
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = report.figure(summary["lines"], "accuracy", "step", "x")
    axes = picture.axes[0]
    drawn = [(line.get_label().split()[0], line.get_linestyle()) for line in axes.lines]
    assert drawn == [("before", "--"), ("teacher", ":"), ("ropd", "-"), ("sft", "-")]
    assert len(axes.collections) == 2, "a band for each curve"
    assert list(axes.lines[2].get_xdata()) == [0, 20, 40]
    assert list(axes.lines[2].get_ydata()) == pytest.approx([0.2, 0.45, 0.7])
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.2, 0.2])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.1, 0.8))
    assert len(picture.legends[0].get_texts()) == 4 and axes.get_xlabel()
    with pytest.raises(BadInput, match="exists already"):
        plot(tmp_path, CURVES)
    with pytest.raises(BadInput, match="ends in .png"):
        plot(tmp_path, CURVES, name="x.txt")


def test_plot_of_named_arms_over_another_number(tmp_path):
    flags = dict(x="generated_tokens", metric="seconds", arms="ropd")
    lines = plot(tmp_path, CURVES, **flags)["lines"]
    assert list(lines) == ["ropd"]
    assert [point[:2] for point in lines["ropd"]] == [(0, 0), (20_000, 40), (40_000, 80)]
    with pytest.raises(BadInput, match="expected arms of"):
        plot(tmp_path, CURVES, name="y.png", arms="ropd,nobody")


def test_plot_leaves_out_checkpoints_that_some_seed_has_not_reached(tmp_path, capsys):
    gone = {("ropd", 1, 40), ("sft", 0, 20), ("sft", 0, 40)}
    rows = [r for r in CURVES if (r["arm"], r["seed"], r["step"]) not in gone]
    lines = plot(tmp_path, rows)["lines"]
    assert [at for at, *_ in lines["ropd"]] == [0, 20]
    assert "left out: arm 'ropd', step 40: no line for seed 1" in capsys.readouterr().out
    # one checkpoint left of a curve is a point, not a level
    axes = report.figure(lines, "accuracy", "step", "x").axes[0]
    assert axes.lines[3].get_linestyle() == "-"


def test_plot_leaves_out_lines_without_the_metric_and_says_so(tmp_path, capsys):
    proxy = [r for r in CURVES if r["arm"] == "ropd" and r["step"]]
    rows = [r | {"proxy": r["step"] / 10} if r in proxy else r for r in CURVES]
    lines = plot(tmp_path, rows, metric="proxy", arms="ropd,sft")["lines"]
    assert [point[:2] for point in lines["ropd"]] == [(20, 2), (40, 4)]
    assert "sft" not in lines
    assert "left out: arm 'ropd', step 0: no proxy" in capsys.readouterr().out
    for metric, value in (("nothing", 1), ("proxy", "high")):
        with pytest.raises(BadInput, match=f"{metric}: expected a finite number"):
            plot(tmp_path, [r | {"proxy": value} for r in rows], name="y.png", metric=metric)


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match="pip install matplotlib"):
        plot(tmp_path, CURVES)


def test_gaps_are_paired_by_seed_within_a_prefix(tmp_path):
    """a - b is 0.1 and 0.3 at 0.5, x-a - x-b is -0.2 in the one seed both have, at the mean of
    x-b in that seed; seeds differ by more than the arms."""
    rows = [
        result(arm, seed, value if step == 4 else 0.0, step, step == 4, share=share)
        for arm, seed, value, share in (
            ("b", 0, 0.2, 0.4),
            ("b", 1, 0.6, 0.6),
            ("a", 0, 0.3, 0),
            ("a", 1, 0.9, 0),
            ("x-b", 1, 0.5, 0.9),
            ("x-b", 2, 0.1, 0.1),
            ("x-a", 1, 0.3, 0),
            ("y-a", 1, 0.3, 0),
        )
        for step in (4, 0)
    ]
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


def test_bad_input_exits_with_2_and_one_line(tmp_path):
    absent = tmp_path / "absent.jsonl"
    flags = argv(rollouts=absent, prompts=absent, out=tmp_path / "e.jsonl")
    done = run_program("eval.py", flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and not Path(tmp_path / "e.jsonl").exists()
    assert json.dumps(str(absent))[1:-1] in done.stderr
