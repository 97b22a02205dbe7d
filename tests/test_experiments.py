"""What studies make of result lines: verdicts by hand, and every study in seconds."""

import importlib
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import dump

from experiments import gad_toy
from experiments.claims import Claim, claims_table, last, more, resample, verdict
from experiments.gad import in_style
from experiments.sparse_to_dense import check_start, groups
from experiments.study import Measured, choose_arms, setting, settings_of, words_of
from opd import files, records
from opd.policy import hash_weights

# rows of train.py that a study must use; arms left out, like others but for a number
STUDIES = {
    "opd": (
        "sft seqkd fkl opd opd-full gkd dagger ppo-clip",
        "sft5 lambda50 jsd10 jsd90 rl-self",
    ),
    "unified": (
        "sft seqkd fkl rft dpo grpo opd-full dagger gkd",
        "sft-a sft-b-long fkl-long-opd",
    ),
    "lightning": (
        "sft seqkd lightning",
        "a-b-offline a-b-online b-a-offline b-a-online b-b-offline ab-a-offline offline-lr3 "
        "online-lr3 is-token-lr3 refresh4 refresh8 reuse1 reuse8",
    ),
    "prefix": ("sft opd release", "fixed8 fixed32 fixed48 full-lr2"),
    "stable": ("sft stable-opd", "planted-stable eos-opd hot-opd hot-kl hot-gold hot-sft"),
    "sparse_to_dense": ("sft grpo fkl opd-full seqkd", "rl-even rl-opd rl-fkl"),
    "gad": ("sft seqkd gad", ""),
    "simct": (
        "sft seqkd simple-opd simct opd uld opd-full",
        "simple-slow sum masked drop25 drop75 coarse70 m64-before m64-simple m64-simct "
        "m64-masked m4-before m4-simple m4-simct m4-masked m1-before m1-simple m1-simct "
        "m1-masked d20-before d20-simple d20-masked m0-before m0-simple m0-simct m0-masked",
    ),
    "sod": (
        "sft seqkd opd-grpo opd sod",
        "opd no-cap mask decay mean amount batch double large-teacher large-uniform "
        "calm-uniform",
    ),
    "opsd": ("sft opd opd-full grpo rwsft", ""),
}


@pytest.mark.parametrize(
    "low, high, test, bound, want",
    [
        (-0.01, 0.2, "above", 0, "not resolvable here"),
        (-0.2, -0.1, "above", 0, "does not hold"),
        (0.05, 0.15, "below", 0.2, "holds"),
        (0.05, 0.25, "below", 0.2, "not resolvable here"),
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
    cost = dict(generated_tokens=0, teacher_tokens=0, trained_tokens=0, seconds=1.0)
    rows = []
    for arm, each in values.items():
        for seed, value in enumerate(each):
            for step, accuracy in ((8, value), (0, 0.1)):
                row = dict(arm=arm, seed=seed, step=step, final=step == 8)
                rows.append(row | cost | dict(accuracy=accuracy, command="x"))
    return dump(path, rows)


def test_claims_are_paired_by_seed_and_take_the_last_line(tmp_path):
    """0.5, 0.7, 0.9 against 0.4, 0.6, 0.8: +0.1 in every seed, so the interval is a point
    although the arms overlap."""
    path = lines(tmp_path / "r.jsonl", {"a": [0.5, 0.7, 0.9], "b": [0.4, 0.6, 0.8]})

    def growth(arms):
        return arms["a"][-1]["accuracy"] - arms["a"][0]["accuracy"]

    claims = [
        more("a beats b", "a", "b"),
        more("by two tenths", "a", "b", 0.2),
        Claim("a grew", "growth", growth, "above", 0.9),
        Claim("no such arm", "c", last("accuracy", "c")),
    ]
    rows = claims_table(path, claims).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == [
        "**holds**",
        "**does not hold**",
        "**not resolvable here**",
        "not measured: c",
    ]
    assert "a − b = 0.100 ± 0.000" in rows[0]
    one = claims_table(lines(tmp_path / "one.jsonl", {"a": [0.5], "b": [0.4]}), claims[:1])
    assert "one seed decides nothing" in one


def test_bootstrap_interval_by_enumeration():
    """Of two values every resample is one of four: the mean is 0 or 1 a quarter of the time
    each, so both ends of 95 % are the extremes."""
    assert resample([0.0, 1.0]) == (0.0, 1.0)
    assert resample([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))
    # the mean of 100: 49.5, its standard error sqrt((100^2 - 1) / 12 / 100) = 2.887
    low, high = resample(list(range(100)))
    assert (low, high) == pytest.approx((49.5 - 1.96 * 2.887, 49.5 + 1.96 * 2.887), abs=0.2)


def test_arms_bring_what_they_start_from():
    study = SimpleNamespace(
        arms=["before", "a", "b", "c", "d"],
        parents={"d": ("c", "a"), "c": ("b",)},
        default_arms=("before", "c"),
    )
    assert choose_arms(study, "d") == choose_arms(study, None) == study.arms
    assert choose_arms(study, "b") == ["before", "b"]
    assert choose_arms(study, None, everything=False) == ["before", "b", "c"]
    with pytest.raises(records.BadInput, match="got e"):
        choose_arms(study, "a,e")


def test_keywords_become_the_words_of_a_command_line():
    options = dict(n=8, slice=None, overwrite=True, partial=False, set={"a": 1, "b": "x y"})
    words = "--n 8 --overwrite --set a=1 --set".split() + ["b=x y", "--top-k", "1", "2"]
    assert words_of(options | dict(top_k=(1, 2))) == words


def test_settings_shrink_under_smoke_and_keep_what_they_inherit():
    @dataclass(frozen=True)
    class Settings(Measured):
        updates: int = setting(4, "steps", smoke=3)
        rounds: int = 40

    given = {"rounds": 7, "prompts": 8, "updates": 4, "max_tokens": 9, "eval_every": 2}
    given |= {"eval_n": 5, "final_n": 6, "eval_split": "dev"}
    args = SimpleNamespace(smoke=False, **given)
    assert vars(settings_of(args, Settings)) == given
    args.smoke = True
    with pytest.raises(
        records.BadInput, match="--updates 3: expected a divisor of --prompts 4"
    ):
        settings_of(args, Settings)
    args = SimpleNamespace(smoke=False, **given | {"eval_every": 0})
    with pytest.raises(records.BadInput, match="--eval-every: expected at least 1"):
        settings_of(args, Settings)


def test_a_student_that_leaves_nothing_to_compare_is_refused():
    for accuracy in (0.05, 0.15):
        check_start(accuracy, "dev", 3)
    for accuracy in (0.0, 0.049, 0.151):
        with pytest.raises(records.BadInput, match="seed 3: .* expected 5% to 15%"):
            check_start(accuracy, "dev", 3)


def test_groups_without_a_difference(tmp_path):
    """Of the first two answers of each problem: all wrong, all right, mixed, mixed; the third
    answers do not count."""
    rows = []
    for i, marks in enumerate(([0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0])):
        for sample, correct in enumerate(marks):
            row = dict(id=f"h{i}", sample=sample, text="x", correct=bool(correct))
            rows.append(row | dict(length=1, truncated=False, repetition=0.0))
    want = {"flat_groups": 0.5, "all_wrong": 0.25, "all_right": 0.25}
    assert groups(dump(tmp_path / "evals.jsonl", rows), 2) == want


def test_the_teachers_style():
    assert in_style("7+5=12\n12-3=9\n#9") and in_style("7+5=12\n#12")
    for other in (
        "#9",
        "7+5=12-3=9\n#9",
        "7\n+5:12\n#12",
        "7+5=12\n12-3=9",
        "7+5=12\nso\n#12",
        "",
    ):
        assert not in_style(other)


def test_the_ten_class_toy():
    """The student's family, its likelihood optimum and the controls; one seed of the real
    thing."""
    teacher = gad_toy.teacher_of()
    assert float(teacher.sum()) == pytest.approx(1)
    assert float(teacher[:5].sum()) == pytest.approx(0.6, abs=0.01)
    assert gad_toy.measure(teacher, teacher)["reverse"] == pytest.approx(0, abs=1e-9)
    start = torch.tensor([5.5, 0.0], dtype=torch.float64)
    before = gad_toy.student_of(start)
    ends, drift = {}, {}
    for kind in ("seqkd", "gad", "shuffled", "no-update"):
        p = gad_toy.student_of(gad_toy.train(kind, teacher, start, 0, 1500))
        ends[kind] = gad_toy.measure(p, teacher)
        drift[kind] = 0.5 * float((p - before).abs().sum())
    gad, seqkd = ends["gad"], ends["seqkd"]
    assert drift["no-update"] == 0
    assert gad["mode"] > 0.95 > 0.5 > seqkd["mode"]
    assert gad["valley"] < 0.05 < 0.4 < seqkd["valley"]
    assert seqkd["forward"] < gad["forward"] and gad["reverse"] < seqkd["reverse"]
    assert drift["shuffled"] < 0.5 * drift["gad"]


# ---- what else a smoke run must have left behind


def check_labels(out):
    """Which labels are in which model of sparse_to_dense, and which were spent twice."""

    def labels(arm):
        read = files.read(out / "seed0" / arm / "labels.jsonl", "labels")
        return {(line["id"], line["spent_on"], line["again"]) for line in read}

    half, new, replay = (labels(arm) for arm in ("teacher-half", "half-new", "half-replay"))
    assert half == labels("half-bridge") and half < new and half < replay
    assert {purpose for _, purpose, _ in half} == {"teacher-rl"}
    ids = {i for i, _, _ in half}
    for i, purpose, again in new - half:  # labels that the teacher has not had
        assert purpose == "student-rl" and not again and i not in ids
    assert {(i, again) for i, _, again in replay - half} == {(i, True) for i in ids}
    for prompt in files.read(out / "world" / "unlabelled.jsonl", "prompts"):
        assert not {"answer", "solution"} & set(prompt)
    commands = (out / "commands.sh").read_text().splitlines()
    rewarded = "teacher-rl teacher-half teacher-shuffled grpo grpo-long half-new half-replay"
    labelled = {
        re.search(r"/seed0/([\w-]+)/round", line)[1]
        for line in commands
        if "rollout.py" in line and "toy/train.jsonl" in line
    }
    assert labelled and labelled <= set(rewarded.split())
    assert all("unlabelled.jsonl" in line for line in commands if "teacher.py answer" in line)


def check_order(out):
    """In a round of GAD the discriminator that scores is the one of before the round's answers,
    and every reward says which it was."""
    commands = [
        line.split(" ", 1)[1].removeprefix("-m ")
        for line in (out / "commands.sh").read_text().splitlines()
        if "/arm-gad/round" in line and "eval.py" not in line
    ]
    stages = [line.split()[2 if line.startswith("train.py") else 0] for line in commands]
    assert stages == 2 * ["rollout.py", "methods.gad", "methods.gad", "teacher.py", "gad"]
    graders = [re.search(r"--discriminator (\S+)", line) for line in commands]
    first, second = (found[1] for found in graders if found)
    assert first.endswith("warm/judge") and second.endswith("arm-gad/round0/judge")

    def used(arm, number):
        rewards = out / "seed0" / f"arm-{arm}" / f"round{number}" / "rewards.jsonl"
        return {r["discriminator"] for r in files.read(rewards, "rewards")}

    assert used("gad", 0) == {hash_weights(out / "seed0" / "warm" / "judge")} != used("gad", 1)
    # a frozen one stays what it is, and has learnt before
    assert used("frozen", 0) == used("frozen", 1) != used("gad", 0)


# of sod's stage 0: not to be had of four episodes that make no mistake
LOOKS = (
    "mistake outage recovery placebo length_correlation mistake_entropy result_entropy "
    "d_mistake d_result way_mistake_result way_result_result snr_after_mistake "
    "snr_after_result snr_at_mistake snr_at_result"
).split()
ALWAYS = (
    "snr_sod snr_uniform snr_shuffled size_sod left_sod left_quiet_sod left_batch "
    "left_quiet_batch"
).split()
MORE = {"sparse_to_dense": check_labels, "gad": check_order}


@pytest.mark.parametrize("name", STUDIES)
def test_smoke_runs_arms_of_every_kind_and_ends_in_claims(name, few_problems, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}")
    methods, left_out = map(str.split, STUDIES[name])
    assert set(left_out) < set(experiment.ARMS) or not left_out
    arms = [arm for arm in experiment.ARMS if arm not in left_out]
    experiment.main(["--smoke", "--arms", ",".join(arms), "--out", str(tmp_path)])
    rows = list(files.read(tmp_path / "results.jsonl", "results"))
    assert [r["arm"] for r in rows if r["final"]] == arms
    report = (tmp_path / "report.md").read_text()
    unmeasured = set(re.findall(r"not measured: (\S+)", report)) - set(left_out)
    if name == "stable":  # answers of 8 tokens hold no loop whose advantage could be compared
        assert len(unmeasured) == 1
    else:
        assert unmeasured <= ({*LOOKS, "after_error"} if name == "sod" else set())
    assert all(claim.text in report for claim in experiment.CLAIMS)
    assert (tmp_path / "accuracy.png").exists()
    commands = (tmp_path / "commands.sh").read_text()
    for method in methods:  # a smoke run that skips a method proves nothing of it
        assert f"train.py --method {method} " in commands
    if name in MORE:
        MORE[name](tmp_path)


class Line(dict):
    def __missing__(self, key):
        return dict.fromkeys(LOOKS + ALWAYS, 0.5) if key == "drift" else 0.5


@pytest.mark.parametrize("name", ["ropd", *STUDIES])
def test_every_claim_reads_arms_that_exist(name):
    """A typing error in an arm's name would leave the claim out without a word."""
    experiment = importlib.import_module(f"experiments.{name}")
    two_lines = [Line(step=0, accuracy=0.1), Line(step=8, accuracy=0.5)]
    arms = dict.fromkeys(experiment.ARMS, two_lines)
    for claim in experiment.CLAIMS:
        assert isinstance(claim.value(arms), float)
        assert claim.test in ("above", "below", "within")
