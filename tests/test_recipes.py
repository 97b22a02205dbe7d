"""What experiments make of result lines: verdicts by hand, and the smaller experiments in
seconds."""

import importlib
import json
import re
from types import SimpleNamespace

import pytest
import torch

from experiments import Claim, claims_table, gad_toy, last, resample, settle, verdict
from experiments.gad import in_style
from experiments.sparse_to_dense import check_start, groups
from opd import files, records
from opd import policy as policies

METHODS = {
    "opd": ("sft", "seqkd", "fkl", "opd", "opd-full", "gkd", "dagger", "ppo-clip"),
    "unified": ("sft", "seqkd", "fkl", "rft", "dpo", "grpo", "opd-full", "dagger", "gkd"),
    "lightning": ("sft", "seqkd", "lightning"),
    "prefix": ("sft", "opd", "release"),
    "stable": ("sft", "stable-opd"),
    "sparse_to_dense": ("sft", "grpo", "fkl", "opd-full", "seqkd"),
    "gad": ("sft", "seqkd", "discriminator", "gad"),
    "simct": ("sft", "seqkd", "simple-opd", "simct", "opd", "uld", "opd-full"),
    "sod": ("sft", "seqkd", "opd-grpo", "opd", "sod"),
    "opsd": ("sft", "opd", "opd-full", "grpo", "rwsft"),
}


@pytest.mark.parametrize(
    "low, high, test, bound, want",
    [
        (0.01, 0.2, "above", 0, "holds"),
        (-0.01, 0.2, "above", 0, "not resolvable here"),
        (-0.2, -0.1, "above", 0, "does not hold"),
        (0.05, 0.15, "below", 0.2, "holds"),
        (0.05, 0.25, "below", 0.2, "not resolvable here"),
        (0.25, 0.3, "below", 0.2, "does not hold"),
        (-0.02, 0.01, "within", 0.03, "holds"),
        (-0.02, 0.05, "within", 0.03, "not resolvable here"),
        (0.04, 0.05, "within", 0.03, "does not hold"),
        (-0.09, -0.05, "within", 0.03, "does not hold"),
    ],
)
def test_verdicts(low, high, test, bound, want):
    assert verdict(low, high, test, bound) == want


def lines(path, values):
    """values: {arm: [accuracy of seed 0, 1, ...]}, each with a first line of 0.1 at step 0."""
    with open(path, "w") as f:
        for arm, each in values.items():
            for seed, value in enumerate(each):
                for step, accuracy in ((8, value), (0, 0.1)):
                    f.write(
                        json.dumps(
                            {
                                "arm": arm,
                                "seed": seed,
                                "step": step,
                                "final": step == 8,
                                "accuracy": accuracy,
                                "generated_tokens": 0,
                                "teacher_tokens": 0,
                                "trained_tokens": 0,
                                "seconds": 1.0,
                                "command": "x",
                            }
                        )
                        + "\n"
                    )
    return path


def test_claims_are_paired_by_seed_and_take_the_last_line(tmp_path):
    """0.5, 0.7, 0.9 against 0.4, 0.6, 0.8: +0.1 in every seed, so the interval is a point
    although the arms overlap."""
    path = lines(tmp_path / "r.jsonl", {"a": [0.5, 0.7, 0.9], "b": [0.4, 0.6, 0.8]})
    claims = [
        Claim("a beats b", "a − b", last("accuracy", "a", "b")),
        Claim("by two tenths", "a − b", last("accuracy", "a", "b"), "above", 0.2),
        Claim(
            "a grew",
            "growth",
            lambda arms: arms["a"][-1]["accuracy"] - arms["a"][0]["accuracy"],
            "above",
            0.9,
        ),
        Claim("no such arm", "c", last("accuracy", "c")),
    ]
    rows = [line for line in claims_table(path, claims).splitlines() if line.startswith("| ")][
        2:
    ]
    assert [row.split("|")[-2].strip() for row in rows] == [
        "**holds**",
        "**does not hold**",
        "**not resolvable here**",
        "not measured: c",
    ] and "0.100 ± 0.000" in rows[0]
    one = claims_table(lines(tmp_path / "one.jsonl", {"a": [0.5], "b": [0.4]}), claims[:1])
    assert "one seed decides nothing" in one


def test_bootstrap_interval_by_enumeration():
    """Of two values every resample is one of four: the mean is 0 or 1 a quarter of the time
    each, so both ends of 95 % are the extremes."""
    assert resample([0.0, 1.0]) == (0.0, 1.0) and resample([0.3, 0.3, 0.3]) == pytest.approx(
        (0.3, 0.3)
    )
    # the mean of 100: 49.5, its standard error sqrt((100^2 - 1) / 12 / 100) = 2.887
    low, high = resample(list(range(100)))
    assert (low, high) == pytest.approx((49.5 - 1.96 * 2.887, 49.5 + 1.96 * 2.887), abs=0.2)


def test_arms_bring_what_they_start_from():
    args = SimpleNamespace(
        argv=[], arms="d", out="x", results=None, smoke=False, prompts=4, updates=2
    )
    assert settle(
        args, "n", ["before", "a", "b", "c", "d"], {"d": ("c", "a"), "c": ("b",)}
    ) == ["before", "a", "b", "c", "d"]
    args.arms = "b"
    assert settle(
        args, "n", ["before", "a", "b", "c", "d"], {"d": ("c", "a"), "c": ("b",)}
    ) == ["before", "b"]


@pytest.mark.parametrize(
    "accuracy, fine", [(0.049, False), (0.05, True), (0.15, True), (0.151, False), (0.0, False)]
)
def test_a_student_that_leaves_nothing_to_compare_is_refused(accuracy, fine):
    if fine:
        return check_start(accuracy, "dev", 3)
    with pytest.raises(
        records.BadInput,
        match="seed 3: the student starts at .* expected 5% to 15%.*cannot be tested",
    ):
        check_start(accuracy, "dev", 3)


def test_groups_without_a_difference(tmp_path):
    """Of the first two answers of each problem: all wrong, all right, mixed, mixed; the third
    answers do not count."""
    with open(tmp_path / "evals.jsonl", "w") as f:
        for i, marks in enumerate(([0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0])):
            for sample, correct in enumerate(marks):
                f.write(
                    json.dumps(
                        {"id": f"h{i}", "sample": sample, "text": "x", "correct": bool(correct)}
                    )
                    + "\n"
                )
    assert groups(tmp_path / "evals.jsonl", 2) == {
        "flat_groups": 0.5,
        "all_wrong": 0.25,
        "all_right": 0.25,
    }


def ledgers(out):
    """Which labels are in which model of sparse_to_dense, and which were spent twice."""

    def of(arm):
        return {
            (line["id"], line["spent_on"], line["again"])
            for line in files.read(out / "seed0" / arm / "labels.jsonl", "labels")
        }

    half, new, replay = of("teacher-half"), of("half-new"), of("half-replay")
    assert (
        half == of("half-bridge")
        and half < new
        and half < replay
        and {purpose for _, purpose, _ in half} == {"teacher-rl"}
    )
    ids = {i for i, _, _ in half}
    assert all(
        purpose == "student-rl" and not again and i not in ids
        for i, purpose, again in new - half
    ), "new labels are labels that the teacher has not had"
    assert {i for i, _, _ in replay - half} == ids and all(
        again for _, _, again in replay - half
    ), "replayed ones are its own, and say so"
    assert not any(
        {"answer", "solution"} & set(prompt)
        for prompt in files.read(out / "world" / "unlabelled.jsonl", "prompts")
    )
    lines = (out / "commands.sh").read_text().splitlines()
    assert all("unlabelled.jsonl" in line for line in lines if "teacher.py answer" in line)
    labelled = [line for line in lines if "rollout.py" in line and "toy/train.jsonl" in line]
    assert labelled and all(
        any(
            f"/{arm}/" in line
            for arm in (
                "teacher-rl",
                "teacher-half",
                "teacher-shuffled",
                "grpo",
                "grpo-long",
                "half-new",
                "half-replay",
            )
        )
        for line in labelled
    )


def order(out):
    """In a round of GAD the discriminator that scores is the one of before the round's answers,
    and every reward says which it was."""
    lines = [
        line.split(" ", 1)[1]
        for line in (out / "commands.sh").read_text().splitlines()
        if "/arm-gad/round" in line
    ]
    stages = [
        line.split()[2] if line.startswith("train.py") else line.split()[0]
        for line in lines
        if "eval.py" not in line
    ]
    assert stages == 2 * ["rollout.py", "rubric.py", "discriminator", "teacher.py", "gad"]
    graded = [
        re.search(r"--discriminator (\S+)", line)[1]
        for line in lines
        if line.startswith("rubric.py grade")
    ]
    assert graded[0].endswith("warm/judge") and graded[1].endswith("arm-gad/round0/judge"), (
        "scored by the discriminator of the round before"
    )
    used = [
        {
            r["discriminator"]
            for r in files.read(
                out / "seed0" / "arm-gad" / f"round{i}" / "rewards.jsonl", "rewards"
            )
        }
        for i in range(2)
    ]
    assert (
        used[0] == {policies.hash_weights(out / "seed0" / "warm" / "judge")}
        and used[0] != used[1]
    )
    frozen = [
        next(
            iter(
                {
                    r["discriminator"]
                    for r in files.read(
                        out / "seed0" / "arm-frozen" / f"round{i}" / "rewards.jsonl", "rewards"
                    )
                }
            )
        )
        for i in range(2)
    ]
    assert frozen[0] == frozen[1] not in used[0], "a frozen one stays what it is"


def test_the_teachers_style():
    assert in_style("7+5=12\n12-3=9\n#9") and in_style("7+5=12\n#12")
    assert not any(
        map(
            in_style,
            (
                "#9",
                "7+5=12-3=9\n#9",
                "7\n+5:12\n#12",
                "7,12,9\n#9",
                "7+5=12\n12-3=9",
                "7+5=12\nso\n#12",
                "",
            ),
        )
    )


def test_the_ten_class_toy():
    """The student's family, its likelihood optimum and the controls; one seed of the real
    thing."""
    teacher = gad_toy.teacher_of()
    assert (
        float(teacher.sum()) == pytest.approx(1)
        and float(teacher[:5].sum()) == pytest.approx(0.6, abs=0.01)
        and gad_toy.measure(teacher, teacher)["reverse"] == pytest.approx(0, abs=1e-9)
    )
    start = torch.tensor([5.5, 0.0], dtype=torch.float64)
    ends = {
        kind: gad_toy.student_of(gad_toy.train(kind, teacher, start, 0, 1500))
        for kind in ("seqkd", "gad", "shuffled", "no-update")
    }
    numbers = {kind: gad_toy.measure(p, teacher) for kind, p in ends.items()}
    assert torch.equal(ends["no-update"], gad_toy.student_of(start))
    assert (
        numbers["gad"]["mode"] > 0.95 > 0.5 > numbers["seqkd"]["mode"]
        and numbers["gad"]["valley"] < 0.05 < 0.4 < numbers["seqkd"]["valley"]
    )
    assert (
        numbers["seqkd"]["forward"] < numbers["gad"]["forward"]
        and numbers["gad"]["reverse"] < numbers["seqkd"]["reverse"]
    )
    drift = {
        kind: 0.5 * float((p - gad_toy.student_of(start)).abs().sum())
        for kind, p in ends.items()
    }
    assert drift["shuffled"] < 0.5 * drift["gad"]


LOOKS = (
    "mistake",
    "outage",
    "recovery",
    "placebo",
    "length_correlation",
    "mistake_entropy",
    "result_entropy",
    "d_mistake",
    "d_result",
    "way_mistake_result",
    "way_result_result",
    # of sod's experiments.sod_drift, and not to be had of four episodes that make no mistake
    "snr_after_mistake",
    "snr_after_result",
    "snr_at_mistake",
    "snr_at_result",
)
ALWAYS = (
    "snr_sod",
    "snr_uniform",
    "snr_shuffled",
    "size_sod",
    "left_sod",
    "left_quiet_sod",
    "left_batch",
    "left_quiet_batch",
)
MORE = {"sparse_to_dense": ledgers, "gad": order}  # what else a smoke run must have left behind


@pytest.mark.parametrize("name", METHODS)
def test_smoke_runs_every_arm_and_ends_in_claims(name, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}")
    experiment.main(["--smoke", "--out", str(tmp_path)])
    rows = list(files.read(tmp_path / "results.jsonl", "results"))
    assert {r["arm"] for r in rows if r["final"]} == set(experiment.ARMS)
    # answers of 8 tokens hold no loop whose advantage could be compared, and agents of four
    # steps no mistake to look at
    report = (tmp_path / "report.md").read_text()
    unmeasured = set(re.findall(r"not measured: (\S+)", report))
    assert (
        len(unmeasured) == 1
        if name == "stable"
        else unmeasured <= ({*LOOKS, "after_error"} if name == "sod" else set())
    ), unmeasured
    assert (
        all(claim.text in report for claim in experiment.CLAIMS)
        and (tmp_path / "accuracy.png").exists()
    )
    assert all(
        f"train.py --method {method}" in (tmp_path / "commands.sh").read_text()
        for method in METHODS[name]
    ), "a smoke run that skips a method proves nothing of it"
    MORE.get(name, lambda out: None)(tmp_path)


@pytest.mark.parametrize("name", ["ropd", *METHODS])
def test_every_claim_reads_arms_that_exist(name):
    """A typing error in an arm's name would leave the claim out without a word."""
    experiment = importlib.import_module(f"experiments.{name}")

    class Line(dict):
        def __missing__(self, key):
            return dict.fromkeys(LOOKS + ALWAYS, 0.5) if key == "drift" else 0.5

    arms = {
        arm: [Line(step=0, accuracy=0.1), Line(step=8, accuracy=0.5)] for arm in experiment.ARMS
    }
    for claim in experiment.CLAIMS:
        assert isinstance(claim.value(arms), float) and claim.test in (
            "above",
            "below",
            "within",
        )
