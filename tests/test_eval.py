"""eval.py: the estimators against enumeration and simulation, grading and its resume, tables
paired by seed, plots."""

import importlib.util
import itertools
import json
import random
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import argv, refusal

import eval as evaluation
from experiments import report
from opd import files, records, stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from opd.records import BadInput

if importlib.util.find_spec("rubric") is None:  # eval.py needs this one function of rubric.py
    stub = types.ModuleType("rubric")
    stub.is_correct = lambda text, answer: (
        text.rpartition("#")[2].split("\n")[0].strip() == str(answer)
    )
    sys.modules["rubric"] = stub


def write_lines(path, lines):
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


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


def result(arm, seed, accuracy, step=40, final=True, **more):
    return {
        "arm": arm,
        "seed": seed,
        "step": step,
        "final": final,
        "accuracy": accuracy,
        "generated_tokens": 1000 * step,
        "teacher_tokens": 0,
        "trained_tokens": 10 * step,
        "seconds": 2.0 * step,
        "command": "python -m experiments.x",
    } | more


@pytest.fixture
def small(tmp_path):
    """Two prompts, four answers each: one right answer to the first, four to the second, three
    truncated."""
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        [
            {"id": 1, "prompt": "1+1=?", "answer": 2},
            {"id": "b", "prompt": "2+2=?", "answer": "4"},
        ],
    )
    rollouts = write_lines(
        tmp_path / "rollouts.jsonl",
        [
            rollout(
                1, s, "1+1=2\n#2" if s == 0 else "#7", "length" if s else "stop", tokens=s + 1
            )
            for s in range(4)
        ]
        + [rollout("b", s, "2+2=4\n#4", tokens=10) for s in range(4)],
    )
    return prompts, rollouts, str(tmp_path / "eval.jsonl")


def evaluate(small, *flags):
    prompts, rollouts, out = small
    return evaluation.main(["--prompts", prompts, "--rollouts", rollouts, "--out", out, *flags])


# ---- estimators


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_counts_the_subsets_that_hold_a_right_answer(n):
    for c in range(n + 1):
        right = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            assert stats.pass_at_k(n, c, k) == pytest.approx(
                sum(map(any, subsets)) / len(subsets), abs=1e-12
            )


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    n, k, p = 6, 4, 0.3  # expectation over the binomial number of right answers, exactly
    weight = [evaluation.math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(w * stats.pass_at_k(n, c, k) for c, w in enumerate(weight)) == pytest.approx(
        truth, abs=1e-12
    )
    assert sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weight)) < truth - 0.03


def test_t_quantile_matches_the_integral_of_the_density():
    for freedom in (1, 2, 3, 10, 11, 15, 30, 200):
        t = stats.t_quantile(freedom)
        x = np.linspace(0, t, 400_001)
        scale = np.exp(
            evaluation.math.lgamma((freedom + 1) / 2) - evaluation.math.lgamma(freedom / 2)
        ) / np.sqrt(freedom * np.pi)
        inside = 2 * scale * np.trapezoid((1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
        assert inside == pytest.approx(0.95, abs=3e-4), freedom


def test_interval_worked_example_and_single_value():
    mean, half = stats.interval([0.2, 0.4, 0.6])
    assert mean == pytest.approx(0.4) and half == pytest.approx(4.3027 * 0.2 / 3**0.5)
    assert stats.interval([0.7]) == (0.7, None)


def test_interval_covers_95_percent_and_one_over_all_answers_does_not():
    """Prompts of unlike difficulty, 16 answers each: prompts are the independent draws, answers
    are not."""
    random_numbers = np.random.default_rng(0)
    trials, prompts, n, covered, covered_flat = 2000, 50, 16, 0, 0
    difficulty = random_numbers.beta(0.5, 0.5, (trials, prompts))
    share = random_numbers.binomial(n, difficulty) / n
    for row in share:
        mean, half = stats.interval(row)
        covered += abs(mean - 0.5) <= half
        covered_flat += abs(mean - 0.5) <= 1.96 * (mean * (1 - mean) / (prompts * n)) ** 0.5
    assert 0.935 < covered / trials < 0.965
    assert covered_flat / trials < 0.6


# ---- repetition


def prose(characters):
    words = (
        "add the next term to the running sum then write what it makes and go on until "
        "no term is left seven nine four"
    ).split()
    rng = random.Random(1)
    return " ".join(rng.choice(words) + str(rng.randrange(100)) for _ in range(characters))[
        :characters
    ]


def test_a_looping_string_raises_the_repetition_ratio_and_prose_does_not():
    for tail in (256, 512):
        assert stats.repetition_ratio("so 2+2=4\n" * 100, tail) > 4
        assert stats.repetition_ratio(prose(2000), tail) < 2.5
    assert stats.repetition_ratio(prose(2000) + "so 2+2=4\n" * 50, 256) > 4, (
        "only the tail counts"
    )
    assert stats.repetition_ratio("so 2+2=4\n" * 50 + prose(2000), 256) < 2.5, (
        "only the tail counts"
    )
    assert stats.repetition_ratio("", 256) == 0
    assert stats.repetition_ratio("2+2=4\n" * 50, 1000) > 12, "the docstring's example"
    assert stats.repetition_ratio("\ud800é" * 500, 256) > 4, (
        "half a surrogate pair is not a crash"
    )


def test_the_papers_setting_flags_a_long_loop_only():
    assert stats.repetition_ratio("wait, let me check again. " * 1000, 10_000) > 10
    assert stats.repetition_ratio(prose(20_000), 10_000) < 10


def test_short_answers_are_never_repetitive():
    loop = "4\n" * 127  # 254 characters: the ratio is high, the length is below the tail
    line = {
        "id": 1,
        "correct": False,
        "length": 9,
        "truncated": True,
        "text": loop,
        "repetition": 19.0,
    }
    longer = dict(line, text="4\n" * 128)
    assert evaluation.summarise([line], 256, 4.0)["repetition_rate"] == 0
    assert evaluation.summarise([line, longer], 256, 4.0)["repetition_rate"] == 0.5
    assert evaluation.summarise([line, longer], 256, 20.0)["repetition_rate"] == 0


# ---- grading


def test_summary_of_a_fixture_is_exact(small, capsys):
    s = evaluate(small)
    assert (s["prompts"], s["n"], s["answers"]) == (2, 4, 8)
    assert (
        s["accuracy"] == s["pass@1"] == pytest.approx(0.625)
        and s["pass@2"] == pytest.approx(0.75)
        and s["pass@4"] == 1.0
    )
    assert s["truncated_fraction"] == 3 / 8 and s["repetition_rate"] == 0
    assert (
        s["length_mean"] == (1 + 2 + 3 + 4 + 40) / 8
        and s["length_max"] == 10
        and s["generated_tokens"] == 50
    )
    assert s["accuracy_low"] == 0 and s["accuracy_high"] == 1, (
        "two prompts say next to nothing; clipped to [0, 1]"
    )
    line = capsys.readouterr().out.strip()
    assert "\n" not in line and "accuracy 0.625" in line and "truncated 37.5%" in line
    lines = list(files.read(small[2], "evals"))
    assert [r["correct"] for r in lines] == [True, False, False, False] + [True] * 4
    assert lines[0] | {"repetition": 0} == {
        "id": 1,
        "sample": 0,
        "text": "1+1=2\n#2",
        "correct": True,
        "length": 1,
        "truncated": False,
        "repetition": 0,
    }


def test_k_runs_over_powers_of_two_and_n(small):
    line = {
        "id": 1,
        "correct": True,
        "length": 9,
        "truncated": False,
        "text": "",
        "repetition": 0,
    }
    summary = evaluation.summarise([line] * 6, 256, 4)
    assert [name for name in summary if name.startswith("pass@")] == [
        "pass@1",
        "pass@2",
        "pass@4",
        "pass@6",
    ]
    assert summary["accuracy_low"] is None, "one prompt has no spread to estimate"
    summary = evaluation.summarise([dict(line, id=i) for i in range(9)], 256, 4)
    assert summary["accuracy"] == 1 and summary["accuracy_high"] is None, (
        "nor have nine that agree: that is not certainty"
    )


def test_accuracy_is_the_mean_of_prompt_means():
    lines = [
        {"id": i, "correct": c, "length": 1, "truncated": False, "text": "", "repetition": 0}
        for i, c in [(1, True)] * 2 + [("1", False)] * 2 + [(2, True)]
    ]
    assert evaluation.summarise(lines, 256, 4)["accuracy"] == pytest.approx((0.5 + 1) / 2), (
        '1 and "1" are one prompt'
    )


def test_black_box_answers_have_no_token_lengths(small, tmp_path):
    prompts, _, out = small
    answers = write_lines(
        tmp_path / "answers.jsonl",
        [
            {k: r[k] for k in ("id", "sample", "policy", "text", "finish_reason")}
            for r in (rollout(1, 0, "#2"), rollout("b", 0, "#5"))
        ],
    )
    s = evaluation.main(["--prompts", prompts, "--rollouts", answers, "--out", out])
    assert s["accuracy"] == 0.5 and s["length_mean"] is None and s["generated_tokens"] is None


def test_lengths_known_for_half_of_the_answers_are_not_averaged():
    line = {
        "id": 1,
        "correct": True,
        "length": 9,
        "truncated": False,
        "text": "",
        "repetition": 0,
    }
    summary = evaluation.summarise([line, dict(line, length=None)], 256, 4)
    assert (
        summary["length_mean"] is summary["length_max"] is summary["generated_tokens"] is None
    )


def test_an_answer_stopped_by_the_tool_limit_is_not_truncated(small):
    assert not evaluation.grade(rollout(1, 0, "#2", "tool_limit"), 2, 256)["truncated"]
    assert evaluation.grade(rollout(1, 0, "#2", "length"), 2, 256)["truncated"]


def test_resume_neither_doubles_nor_loses(small):
    evaluate(small)
    out = Path(small[2])
    whole = out.read_bytes()
    evaluate(small)
    assert out.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed in the middle of the fourth
    assert evaluate(small)["answers"] == 8
    assert out.read_bytes() == whole


def test_resume_grades_only_what_is_missing(small, monkeypatch):
    evaluate(small)
    prompts, rollouts, out = small
    monkeypatch.setattr(evaluation, "grade", lambda *_: pytest.fail("graded an answer again"))
    evaluate(small)
    monkeypatch.undo()
    with open(rollouts, "a") as f:  # the input may grow
        f.writelines(json.dumps(rollout(i, 4, "#4")) + "\n" for i in (1, "b"))
    assert evaluate(small)["n"] == 5


def test_resume_refuses_another_tail_and_changed_rollouts(small):
    evaluate(small)
    with pytest.raises(BadInput, match="tail"):
        evaluate(small, "--tail", "512")
    assert evaluate(small, "--tail", "512", "--overwrite")["answers"] == 8
    Path(small[1]).write_text(Path(small[1]).read_text().replace("#7", "#8"))
    with pytest.raises(BadInput, match="changed"):
        evaluate(small, "--tail", "512")


@pytest.mark.parametrize("answer", [{}, {"answer": None}, {"answer": ""}])
def test_a_prompt_without_an_answer_is_refused(small, answer):
    write_lines(
        small[0],
        [{"id": 1, "prompt": "1+1=?", "answer": 2}, {"id": "b", "prompt": "?", **answer}],
    )
    with pytest.raises(BadInput, match=r"prompts\.jsonl:2: answer: expected"):
        evaluate(small)
    assert not Path(small[2]).exists()


def test_an_answer_of_zero_is_an_answer(small):
    write_lines(
        small[0],
        [{"id": 1, "prompt": "1-1=?", "answer": 0}, {"id": "b", "prompt": "?", "answer": 4}],
    )
    assert evaluate(small)["accuracy"] == 0.5


def test_missing_prompts_and_unequal_samples_are_refused_unless_partial(small):
    prompts, rollouts, out = small
    lines = Path(rollouts).read_text().splitlines(keepends=True)
    Path(rollouts).write_text("".join(lines[:4]))
    with pytest.raises(BadInput, match="4 answers to every prompt, got 0 to id 'b'"):
        evaluate(small)
    Path(rollouts).write_text("".join(lines[:7]))
    with pytest.raises(BadInput, match="got 3 to id 'b'"):
        evaluate(small)
    s = evaluate(small, "--partial")
    assert s["n"] == 3 and s["answers"] == 7 and s["accuracy"] == pytest.approx(0.625)
    assert s["pass@3"] == pytest.approx((stats.pass_at_k(4, 1, 3) + 1) / 2)


def test_rollouts_of_other_prompts_and_other_files_are_refused(small, tmp_path):
    prompts, rollouts, out = small
    with open(rollouts, "a") as f:
        f.write(json.dumps(rollout("zzz", 0, "#4")) + "\n")
    with pytest.raises(BadInput, match="zzz"):
        evaluate(small)
    for wrong in (prompts, str(tmp_path / "absent.jsonl")):
        with pytest.raises(BadInput):
            evaluation.main(["--prompts", prompts, "--rollouts", wrong, "--out", out])


def test_sampling_calls_rollout_with_its_flags(small, monkeypatch):
    prompts, rollouts, out = small
    calls = []

    def sample(argv):
        calls.append(argv)
        Path(argv[argv.index("--out") + 1]).write_text(Path(rollouts).read_text())

    monkeypatch.setitem(sys.modules, "rollout", types.SimpleNamespace(main=sample))
    s = evaluation.main(
        [
            "--model",
            "M",
            "--prompts",
            prompts,
            "--n",
            "4",
            "--out",
            out,
            "--max-tokens",
            "9",
            "--seed",
            "3",
            "--overwrite",
        ]
    )
    expected = out.replace(".jsonl", ".rollouts.jsonl")
    assert calls == [
        [
            "--model",
            "M",
            "--prompts",
            prompts,
            "--n",
            "4",
            "--out",
            expected,
            "--overwrite",
            "--max-tokens",
            "9",
            "--seed",
            "3",
        ]
    ]
    assert s["accuracy"] == pytest.approx(0.625)


def test_flags_that_would_do_nothing_are_refused(small):
    for flags in (
        ["--seed", "3"],
        ["--n", "4"],
        ["--no-such-flag"],
        ["--part"],
        ["--model", "M"],
        ["--tail", "0"],
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate(small, *flags)
        assert stopped.value.code == 2


# ---- table

# seeds differ a lot, the arms within a seed by 0.10, 0.11, 0.12: paired certain, unpaired not
PAIRED = [result("before", s, a, step=0) for s, a in enumerate((0.1, 0.4, 0.7))] + [
    result("ropd", s, a, length_mean=30 + s) for s, a in enumerate((0.2, 0.51, 0.82))
]


def table(tmp_path, rows, *flags):
    path = write_lines(tmp_path / "results.jsonl", rows)
    return report.main(["table", path, *flags])[path]


def test_table_pairs_by_seed(tmp_path, capsys):
    before, ropd = table(tmp_path, list(reversed(PAIRED)))[::-1]
    assert ropd["difference"] == pytest.approx(0.11) and ropd[
        "difference_half"
    ] == pytest.approx(4.3027 * 0.01 / 3**0.5)
    assert ropd["half"] > 0.5 and before["half"] > 0.5, "the arms themselves are uncertain"
    assert before["difference"] is None
    text = capsys.readouterr().out
    assert "| ropd | 3 | 0.510 ± 0.770 | +0.110 ± 0.025 |" in text
    assert "0:0.200 1:0.510 2:0.820" in text
    assert ropd["columns"]["length_mean"] == 31 and before["columns"]["length_mean"] is None
    assert ropd["columns"]["seconds"] == 80


def test_pairing_goes_by_seed_number_not_by_order(tmp_path):
    shuffled = [PAIRED[i] for i in (2, 0, 1, 4, 5, 3)]
    line = next(line for line in table(tmp_path, shuffled) if line["arm"] == "ropd")
    assert line["difference_half"] == pytest.approx(4.3027 * 0.01 / 3**0.5)
    assert list(line["values"]) == [0, 1, 2]


def test_only_final_checkpoints_count_and_arms_keep_their_order(tmp_path):
    rows = [
        result("z", 0, 0.9, step=10, final=False),
        result("z", 0, 0.5, step=20),
        result("before", 0, 0.1),
        result("a", 0, 0.3),
    ]
    lines = table(tmp_path, rows)
    assert [line["arm"] for line in lines] == ["z", "before", "a"]
    assert (
        lines[0]["mean"] == 0.5
        and lines[0]["half"] is None
        and lines[0]["difference"] == pytest.approx(0.4)
    )


@pytest.mark.parametrize(
    "rows",
    [PAIRED[:-1], PAIRED[:-1] + [dict(PAIRED[-1], final=False)]],
    ids=["never begun", "stopped"],
)
def test_missing_seeds_are_refused_or_marked(tmp_path, rows, capsys):
    with pytest.raises(BadInput, match="arm 'ropd' has no line with `final` true for seed 2"):
        table(tmp_path, rows)
    line = table(tmp_path, rows, "--partial")[1]
    assert (
        line["missing"] == [2]
        and line["pairs"] == 2
        and line["difference"] == pytest.approx(0.105)
    )
    assert "| ropd | 2 (misses 2) |" in capsys.readouterr().out


def test_a_baseline_that_misses_seeds_is_paired_on_what_both_have(tmp_path, capsys):
    line = table(tmp_path, PAIRED[1:], "--partial")[1]
    assert line["pairs"] == 2 and line["difference"] == pytest.approx(0.115)
    assert "(2 pairs)" in capsys.readouterr().out


def test_an_arm_without_any_final_line_is_an_empty_row(tmp_path):
    lines = table(tmp_path, PAIRED + [result("begun", 0, 0.3, final=False)], "--partial")
    assert lines[-1]["mean"] is None and lines[-1]["missing"] == [0, 1, 2]


def test_table_refuses_doubled_runs_and_unknown_arms(tmp_path):
    with pytest.raises(BadInput, match="one line, got another"):
        table(tmp_path, PAIRED + PAIRED[-1:])
    with pytest.raises(BadInput, match="one final line"):
        table(tmp_path, PAIRED + [dict(PAIRED[-1], step=80)])
    with pytest.raises(BadInput, match="no_such_arm"):
        table(tmp_path, PAIRED, "--baseline", "no_such_arm")
    with pytest.raises(BadInput, match="no_such_metric: expected a finite number, got None"):
        table(tmp_path, PAIRED, "--metric", "no_such_metric")
    with pytest.raises(BadInput, match="(?i)nan"):
        table(tmp_path, [dict(row, kl=float("nan")) for row in PAIRED], "--metric", "kl")


def test_table_writes_markdown_once(tmp_path):
    out = tmp_path / "new folder" / "table.md"
    table(tmp_path, PAIRED, "--out", str(out), "--columns", "length_mean", "--baseline", "ropd")
    text = out.read_text()
    assert (
        "| arm | seeds | accuracy | vs ropd | length_mean | each seed |" in text
        and "| -0.110 ± 0.025 |" in text
    )
    with pytest.raises(BadInput, match="exists already"):
        table(tmp_path, PAIRED, "--out", str(out))
    table(tmp_path, PAIRED, "--out", str(out), "--overwrite")


def test_tables_of_two_files_do_not_mix(tmp_path, capsys):
    one = write_lines(tmp_path / "one.jsonl", PAIRED)
    two = write_lines(
        tmp_path / "two.jsonl", [dict(row, accuracy=row["accuracy"] / 2) for row in PAIRED]
    )
    tables = report.main(["table", one, two])
    assert tables[one][1]["mean"] == pytest.approx(0.51) and tables[two][1][
        "mean"
    ] == pytest.approx(0.255)
    assert "## one" in capsys.readouterr().out


# ---- plot

CURVES = (
    [result("before", s, 0.1 + s / 10, step=0) for s in range(3)]
    + [result("teacher", s, 0.97, step=0) for s in range(3)]
    + [
        result(arm, s, 0.1 + s / 10 + gain * step / 40, step=step, final=step == 40)
        for arm, gain in (("ropd", 0.5), ("sft", 0.4))
        for s in range(3)
        for step in (0, 20, 40)
    ]
)


def test_plot_writes_a_png_with_a_line_an_arm(tmp_path):
    path, out = write_lines(tmp_path / "x.jsonl", CURVES), tmp_path / "x.png"
    summary = report.main(["plot", path, "--out", str(out)])
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = report.figure(summary["lines"], "accuracy", "step", "x")
    axes = picture.axes[0]
    assert [(line.get_label().split()[0], line.get_linestyle()) for line in axes.lines] == [
        ("before", "--"),
        ("teacher", ":"),
        ("ropd", "-"),
        ("sft", "-"),
    ]
    assert len(axes.collections) == 2, "a band for each curve"
    assert list(axes.lines[2].get_xdata()) == [0, 20, 40] and list(
        axes.lines[2].get_ydata()
    ) == pytest.approx([0.2, 0.45, 0.7])
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.2, 0.2])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.1) and band[:, 1].max() == pytest.approx(0.8)
    assert (
        len(picture.legends[0].get_texts()) == 4
        and axes.get_xlabel()
        and axes.get_ylabel()
        and axes.get_title(loc="left")
    )
    with pytest.raises(BadInput, match="exists already"):
        report.main(["plot", path, "--out", str(out)])


def test_plot_draws_the_arms_that_are_named(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", CURVES)
    arms = sorted({row["arm"] for row in CURVES})
    summary = report.main(["plot", path, "--out", str(tmp_path / "x.png"), "--arms", arms[0]])
    assert len(arms) > 1 and set(summary["lines"]) == {arms[0]}
    with pytest.raises(BadInput, match="expected arms of"):
        report.main(
            ["plot", path, "--out", str(tmp_path / "y.png"), "--arms", f"{arms[0]},nobody"]
        )


def test_plot_over_generated_tokens_and_another_metric(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", CURVES)
    lines = report.main(
        [
            "plot",
            path,
            "--out",
            str(tmp_path / "y.png"),
            "--x",
            "generated_tokens",
            "--metric",
            "seconds",
        ]
    )["lines"]
    assert [at for at, *_ in lines["ropd"]] == [0, 20_000, 40_000] and [
        mean for _, mean, *_ in lines["ropd"]
    ] == [0, 40, 80]


def test_plot_leaves_out_checkpoints_that_some_seed_has_not_reached(tmp_path, capsys):
    rows = [
        row
        for row in CURVES
        if (row["arm"], row["seed"], row["step"])
        not in {("ropd", 1, 40), ("sft", 0, 20), ("sft", 0, 40)}
    ]
    summary = report.main(
        ["plot", write_lines(tmp_path / "x.jsonl", rows), "--out", str(tmp_path / "x.png")]
    )
    assert [at for at, *_ in summary["lines"]["ropd"]] == [0, 20]
    assert "left out: arm 'ropd', step 40: no line for seed 1" in capsys.readouterr().out
    axes = report.figure(summary["lines"], "accuracy", "step", "x").axes[0]
    assert axes.lines[3].get_linestyle() == "-", (
        "one checkpoint left of a curve is a point, not a level"
    )


def test_plot_leaves_out_lines_without_the_metric_and_says_so(tmp_path, capsys):
    rows = [
        row if row["arm"] != "ropd" or row["step"] == 0 else row | {"proxy": row["step"] / 10}
        for row in CURVES
    ]
    path = write_lines(tmp_path / "x.jsonl", rows)
    summary = report.main(
        [
            "plot",
            path,
            "--metric",
            "proxy",
            "--arms",
            "ropd,sft",
            "--out",
            str(tmp_path / "x.png"),
        ]
    )
    assert [(at, mean) for at, mean, *_ in summary["lines"]["ropd"]] == [
        (20, 2),
        (40, 4),
    ] and "sft" not in summary["lines"]
    assert "left out: arm 'ropd', step 0: no proxy" in capsys.readouterr().out
    for metric, changed in (
        ("nothing", rows),
        ("proxy", [row | {"proxy": "high"} for row in rows]),
    ):
        with pytest.raises(BadInput, match=f"{metric}: expected a finite number"):
            report.main(
                [
                    "plot",
                    write_lines(tmp_path / "y.jsonl", changed),
                    "--metric",
                    metric,
                    "--out",
                    str(tmp_path / "y.png"),
                ]
            )


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "x.jsonl", CURVES)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match="pip install matplotlib"):
        report.main(["plot", path, "--out", str(tmp_path / "x.png")])


# ---- as a program


@pytest.mark.parametrize("argv", [["--help"], ["table", "--help"], ["plot", "--help"]])
def test_help_opens_with_a_command(argv):
    shown = subprocess.run(
        [sys.executable, ROOT / "eval.py", *argv], capture_output=True, text=True
    )
    assert shown.returncode == 0 and "    python eval.py" in shown.stdout


def test_bad_input_exits_with_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.report", "table", tmp_path / "absent.jsonl"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
    )


def test_importing_eval_loads_neither_torch_nor_matplotlib():
    code = (
        "import sys, eval; print(sorted({'torch', 'transformers', 'matplotlib'} & "
        "set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        ).stdout
        == "[]\n"
    )


# ---- rewards against correctness


def test_auc_is_the_share_of_pairs_ranked_right():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values, right = rng.integers(0, 4, 12) / 3, rng.random(12) < 0.4
        pairs = [
            (a > b) + 0.5 * (a == b)
            for a, r in zip(values, right)
            if r
            for b, q in zip(values, right)
            if not q
        ]
        assert stats.auc(values, right) == (pytest.approx(np.mean(pairs)) if pairs else None)
    assert stats.auc([0.9, 0.4, 0.4], [True, True, False]) == 0.75


def test_rewards_are_joined_by_rollout_and_failed_ones_left_out(tmp_path):
    rows = [
        {"id": i, "sample": s, "policy": {"model": "m"}, "text": text, "finish_reason": "stop"}
        for i in ("a", "b")
        for s, text in enumerate(("#1", "#2", "#1"))
    ]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": i, "prompt": "?", "answer": "1"}) + "\n" for i in ("a", "b"))
    )
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    values = {
        ("a", 0): 0.9,
        ("a", 1): 0.8,
        ("a", 2): None,
        ("b", 0): 0.2,
        ("b", 1): 0.1,
        ("b", 2): 0.1,
    }
    rewards = [
        {
            "id": r["id"],
            "sample": r["sample"],
            "reward": values[r["id"], r["sample"]],
            "grader": "g",
            "rollout": records.fingerprint(r),
            "status": "failed" if values[r["id"], r["sample"]] is None else "ok",
        }
        for r in rows
    ]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rewards))
    arguments = [
        "--rollouts",
        str(tmp_path / "r.jsonl"),
        "--prompts",
        str(prompts),
        "--rewards",
        str(tmp_path / "w.jsonl"),
    ]
    summary = evaluation.main([*arguments, "--out", str(tmp_path / "e.jsonl")])
    # a: 0.9 above 0.8; b: one above, one tied
    assert summary["reward_auc_within"] == pytest.approx((1 + 0.75) / 2)
    assert summary["reward_auc"] == pytest.approx(np.mean([1, 1, 0, 1, 0, 0.5]))
    rows[0]["text"] = "#7"
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(BadInput, match="other rollouts"):
        evaluation.main([*arguments, "--out", str(tmp_path / "e2.jsonl")])


def test_gaps_are_paired_by_seed_within_a_prefix(tmp_path):
    """a - b is 0.1 and 0.3 at 0.5, x-a - x-b is -0.2 in the one seed both have, at the mean of
    x-b in that seed; seeds differ by more than the arms."""
    rows = [
        {
            "arm": arm,
            "seed": seed,
            "step": step,
            "final": step == 4,
            "accuracy": value if step == 4 else 0.0,
            "share": share,
        }
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
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = report.main(
        [
            "gaps",
            str(path),
            "--arms",
            "a",
            "--against",
            "b",
            "--at",
            "share",
            "--out",
            str(tmp_path / "g.png"),
        ]
    )
    (name, at, mean, half), (other, far, gap, none) = found["a"]
    assert (
        (name, other, none) == ("", "x", None)
        and (at, mean, far, gap) == pytest.approx((0.5, 0.2, 0.9, -0.2))
        and half == pytest.approx(12.7062 * np.std([0.1, 0.3], ddof=1) / 2**0.5)
    )
    assert (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG"
    for wrong, words in (
        (["--arms", "z", "--against", "b"], "'z'"),
        (["--arms", "a", "--against", "z"], "'z'"),
    ):
        with pytest.raises(BadInput, match=words):
            report.main(
                ["gaps", str(path), *wrong, "--at", "share", "--out", str(tmp_path / "h.png")]
            )


def test_a_slice_of_the_prompts_is_measured_only_when_meant(world, tmp_path, capsys):
    flags = dict(model=world.base, prompts=world.prompts, n=1, slice="0:2", max_tokens=8)
    assert "--slice, --shard: leave prompts out" in refusal(
        evaluation.main, argv(out=tmp_path / "e.jsonl", **flags), capsys
    )
    assert not (tmp_path / "e.rollouts.jsonl").exists()
    assert (
        evaluation.main(argv(out=tmp_path / "e.jsonl", partial=True, **flags))["answers"] == 2
    )
