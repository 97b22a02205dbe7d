"""Rubrics by contrast, rewards from verdicts, and what happens when a judge fails."""

import json

import numpy as np
import pytest
from fake_server import FakeServer

import rubric
from opd.answers import is_correct
from opd.files import read
from opd.records import BadInput
from worlds import predicates, sums

RNG = np.random.default_rng(0)
POLICY = {"model": "m", "weights": "w", "template": "t", "vocabulary": "v"}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def rollout(prompt_id, sample, text):
    ids = [ord(c) for c in text]
    return {
        "id": prompt_id,
        "sample": sample,
        "policy": POLICY,
        "text": text,
        "finish_reason": "stop",
        "prompt_ids": [1],
        "response_ids": ids,
        "loss_mask": [1] * len(ids),
        "logprobs": [-1.0] * len(ids),
        "temperature": 1.0,
        "top_p": 1.0,
    }


def answer(prompt_id, sample, text):
    return {
        "id": prompt_id,
        "sample": sample,
        "policy": {"model": "teacher"},
        "text": text,
        "finish_reason": "stop",
    }


TERMS = [7, 5, -3]
RIGHT = [sums.write_work(TERMS, sums.running_totals(TERMS), style) for style in sums.STYLES]
WRONG = ["#12", "7+5=13\n13-3=10\n#10", "#7", "7,12,8\n#8"]


@pytest.fixture
def files(tmp_path):
    return {
        "prompts": write(
            tmp_path / "p.jsonl",
            [{"id": i, "messages": sums.question(TERMS), "answer": "9"} for i in ("a", "b")],
        ),
        "answers": write(
            tmp_path / "a.jsonl",
            [answer(i, s, t) for i in ("a", "b") for s, t in enumerate(RIGHT)],
        ),
        "rollouts": write(
            tmp_path / "r.jsonl",
            [rollout(i, s, t) for i in ("a", "b") for s, t in enumerate(WRONG + RIGHT[:2])],
        ),
        "dir": tmp_path,
    }


def create(files, *extra, out="c.jsonl"):
    return rubric.main(
        [
            "create",
            "--prompts",
            str(files["prompts"]),
            "--answers",
            str(files["answers"]),
            "--rollouts",
            str(files["rollouts"]),
            "--out",
            str(files["dir"] / out),
            *extra,
        ]
    )


def grade(files, *extra, out="w.jsonl"):
    return rubric.main(
        [
            "grade",
            "--prompts",
            str(files["prompts"]),
            "--rollouts",
            str(files["rollouts"]),
            "--out",
            str(files["dir"] / out),
            *extra,
        ]
    )


def rewards(files, out="w.jsonl"):
    return {(r["id"], r["sample"]): r for r in read(files["dir"] / out, "rewards")}


# ---- the predicates


@pytest.mark.parametrize("style", sums.STYLES)
def test_merits_hold_for_right_work_in_every_style_and_name_the_slip(style):
    source = sums.problems(np.random.default_rng(3), "train", terms=(3, 6))
    for terms in (next(source) for _ in range(50)):
        question, totals = sums.expression_of(terms) + "=?", sums.running_totals(terms)
        good = sums.write_work(terms, totals, style)
        assert {
            m for m in predicates.MERITS if not predicates.passes([m], question, good)
        } == set()
        # the last step wrong, the end consistent with it
        slip = sums.write_work(terms, totals[:-1] + [totals[-1] + 1], style)
        failed = {m for m in predicates.MERITS if not predicates.passes([m], question, slip)}
        assert (
            {"total_right", "arithmetic_right"}
            <= failed
            <= {"total_right", "arithmetic_right", "first_step_right"}
        )
        guess = f"#{totals[-1]}"
        assert {
            m for m in predicates.MERITS if not predicates.passes([m], question, guess)
        } == {
            "arithmetic_right",
            "all_terms",
            "first_step_right",
            "conclusion_follows",
            "shows_work",
        }
        skipped = sums.write_work(terms[:-1], totals[:-1], style, final=totals[-1])
        assert not predicates.passes(
            ["all_terms"], question, skipped
        ) and not predicates.passes(["conclusion_follows"], question, skipped)


def test_no_predicate_raises_on_any_text():
    for text in (
        "",
        "#",
        "\n\n",
        "#-",
        "+:",
        "7+",
        "🙂" * 50,
        "9" * 5000,
        "²",
        "#²",
        "٣",
        "9" * 5000 + "+1=" + "9" * 5000,
        "1,2,3\n" * 40,
        "=" * 30,
        "#a\n#b",
        "\x00",
    ):
        for question in ("7+5=?", "What is love?", ""):
            for name, check in predicates.CHECKS.items():
                for arguments in check.propose([text or "x", "7+5=12\n#12"]):
                    assert predicates.passes([name, *arguments], question, text) in (
                        True,
                        False,
                    )


@pytest.mark.parametrize(
    "text, answer_, right",
    [
        ("so\n#17", "17", True),
        ("#17\n#18", "18", True),
        ("#17\n#18", "17", False),
        ("17", "17", False),
        ("#### 1,024", "1024", True),
        ("it is \\boxed{3.50}", "3.5", True),
        ("#x+1", "x+1", True),
        ("#17.", "17", False),
        ("", "17", False),
        ("#170", "17", False),
        ("# 17 ", 17, True),
    ],
)
def test_final_answers(text, answer_, right):
    assert is_correct(text, answer_) is right


# ---- create


def test_contrast_puts_the_points_on_what_the_teacher_has_and_the_student_lacks(files):
    summary = create(files)
    assert summary["records"] == 2 and summary["failed"] == 0
    for r in read(files["dir"] / "c.jsonl", "rubrics"):
        assert (
            4 <= len(r["criteria"]) <= 12
            and len(set(r["drawn_from"]["answers"])) == 4
            and len(r["drawn_from"]["rollouts"]) == 6
        )
        names = [c["check"][0] for c in r["criteria"]]
        # four styles: no decoy holds for all of them and for few students
        assert set(names[:2]) <= set(predicates.MERITS)
        assert r["criteria"][0]["points"] == 5 and all(
            a["points"] >= b["points"] for a, b in zip(r["criteria"], r["criteria"][1:])
        )
        for c in r["criteria"]:
            teacher = np.mean([predicates.passes(c["check"], "7+5-3=?", t) for t in RIGHT])
            student = np.mean(
                [predicates.passes(c["check"], "7+5-3=?", t) for t in WRONG + RIGHT[:2]]
            )
            assert teacher >= 0.75 and c["gap"] == pytest.approx(teacher - student, abs=1e-3)


def test_one_reference_anchors_the_rubric_to_its_style():
    """m = 1: properties of one style qualify.  m = 4 answers in four styles: they do not.
    (ROPD's largest ablation.)"""
    one = rubric.contrast("7+5-3=?", RIGHT[:1], WRONG)
    four = rubric.contrast("7+5-3=?", RIGHT, WRONG)
    decoys = [
        sum(c["points"] for c in r if c["check"][0] in predicates.DECOYS)
        / sum(c["points"] for c in r)
        for r in (one, four)
    ]
    assert decoys[0] > decoys[1] and decoys[0] >= 0.3


def test_the_rubricator_never_sees_the_answer_field(files):
    create(files)
    secret = [{"id": i, "messages": sums.question(TERMS), "answer": "-999"} for i in ("a", "b")]
    write(files["prompts"], secret)
    create(files, out="c2.jsonl")
    assert (files["dir"] / "c.jsonl").read_bytes() == (files["dir"] / "c2.jsonl").read_bytes()


def test_flat_points_and_m(files):
    create(files, "--flat-points", out="flat.jsonl")
    assert {
        c["points"] for r in read(files["dir"] / "flat.jsonl", "rubrics") for c in r["criteria"]
    } == {3}
    create(files, "--m", "1", out="m1.jsonl")
    assert all(
        len(r["drawn_from"]["answers"]) == 1 for r in read(files["dir"] / "m1.jsonl", "rubrics")
    )
    with pytest.raises(BadInput, match="expected 5 answers"):
        create(files, "--m", "5", out="m5.jsonl")


def test_a_rollout_without_prompt_is_named(files):
    with open(files["rollouts"], "a") as f:
        f.write(json.dumps(rollout("zzz", 0, "#1")) + "\n")
    with pytest.raises(BadInput, match="'zzz'"):
        create(files)
    with pytest.raises(BadInput, match=r"r.jsonl:13: id: .*'zzz'"):
        grade(files, "--grader", "answer")


# ---- grade


def test_rewards_are_the_weighted_pass_rate_recomputed_by_hand(files):
    create(files)
    summary = grade(
        files, "--rubrics", str(files["dir"] / "c.jsonl"), "--answers", str(files["answers"])
    )
    rubrics = {r["id"]: r["criteria"] for r in read(files["dir"] / "c.jsonl", "rubrics")}
    for (i, s), r in rewards(files).items():
        text = (WRONG + RIGHT[:2])[s]
        verdicts = [predicates.passes(c["check"], "7+5-3=?", text) for c in rubrics[i]]
        points = [c["points"] for c in rubrics[i]]
        assert r["verdicts"] == verdicts
        assert r["reward"] == pytest.approx(
            sum(p for p, v in zip(points, verdicts) if v) / sum(points)
        )
    got = rewards(files)
    assert min(got["a", 4]["reward"], got["a", 5]["reward"]) > max(
        got["a", s]["reward"] for s in range(4)
    )
    assert summary["teacher_reward_mean"] > summary["reward_mean"] and summary["failed"] == 0


def test_answer_grader_shuffle_and_noise(files):
    grade(files, "--grader", "answer", out="ans.jsonl")
    plain = rewards(files, "ans.jsonl")
    assert [plain["a", s]["reward"] for s in range(6)] == [0, 0, 0, 0, 1, 1]
    moved = 0
    for seed in range(20):
        grade(
            files, "--grader", "answer", "--shuffle", "--seed", str(seed), out=f"s{seed}.jsonl"
        )
        dealt = rewards(files, f"s{seed}.jsonl")
        for i in ("a", "b"):  # a group keeps its rewards
            assert sorted(dealt[i, s]["reward"] for s in range(6)) == [0, 0, 0, 0, 1, 1]
        moved += dealt["a", 4]["reward"] + dealt["a", 5]["reward"]
    assert 4 < moved < 24  # chance gives 20 * 2 / 3 = 13.3
    flips = [rubric.noisy(True, 0.05, "x", i) for i in range(20000)]
    assert 1 - np.mean(flips) == pytest.approx(0.05, abs=0.006)


def test_scalar_stand_in_needs_no_server_and_lies_in_the_unit_interval(files):
    grade(files, "--grader", "scalar", out="sc.jsonl")
    got = rewards(files, "sc.jsonl")
    assert (
        all(0 <= r["reward"] <= 1 for r in got.values())
        and got["a", 4]["reward"] > got["a", 0]["reward"]
    )
    grade(files, "--grader", "scalar", "--scalar-view", "merits", out="sm.jsonl")
    assert all(0 <= r["reward"] <= 1 for r in rewards(files, "sm.jsonl").values())
    question, plain = "7+5-3=?", "7,12,9\n#9"
    # all eight merits
    assert (
        rubric.impression(question, plain, "merits", 0) == round(8 + 2 * len(plain) / 40) / 10
    )
    # lacks = and :
    assert rubric.impression(question, plain, "all", 0) < rubric.impression(
        question, plain, "merits", 0
    )


def test_predicates_can_be_left_out_and_unknown_names_are_refused(files):
    create(files, "--without", "total_right,length_band")
    names = {
        c["check"][0] for r in read(files["dir"] / "c.jsonl", "rubrics") for c in r["criteria"]
    }
    assert names and not names & {"total_right", "length_band"}
    with pytest.raises(BadInput, match="nonsense"):
        create(files, "--without", "nonsense", out="c2.jsonl")


def test_rubrics_of_other_rollouts_are_refused_unless_frozen_ones_are_meant(files):
    create(files)
    rows = [json.loads(line) for line in files["rollouts"].read_text().splitlines()]
    rows[0]["text"] = "#99"
    write(files["rollouts"], rows)
    with pytest.raises(BadInput, match="drawn_from"):
        grade(files, "--rubrics", str(files["dir"] / "c.jsonl"))
    assert (
        grade(files, "--rubrics", str(files["dir"] / "c.jsonl"), "--frozen-rubrics")["records"]
        == 12
    )


# ---- the served judge, end to end

CRITERIA = [
    {"id": f"c{k}", "category": "Task Completion", "criterion": f"claim {k}", "points": p}
    for k, p in enumerate((5, 2, 1, 1), 1)
]


def question_in(body):
    return json.loads(body["messages"][1]["content"])


def honest_judge(body):
    """Rubricator: four criteria.  Verifier: meets criterion 1 iff the answer ends in #9, the
    others always."""
    document = question_in(body)
    if "criteria" not in document:
        return json.dumps({"criteria": CRITERIA})
    answers = find_answers(document)
    return json.dumps(
        {
            "verdicts": [
                {"answer_index": i, "judgement": [text.endswith("#9"), True, True, True]}
                for i, text in answers
            ]
        }
    )


def find_answers(document):
    """(index, text) of every answer in a batch request, whatever the surrounding names."""
    listed = next(v for k, v in document.items() if k.startswith("answers"))
    out = []
    for entry in listed:
        label = next(
            v for v in entry.values() if isinstance(v, (int,)) or str(v).startswith("Answer ")
        )
        text = next(v for v in entry.values() if v != label)
        out.append((int(str(label).removeprefix("Answer ")), text))
    return out


def served_flags(fake, *extra):
    return [
        "--model",
        "judge",
        "--base-url",
        fake.base_url,
        "--max-retries",
        "1",
        "--timeout",
        "5",
        *extra,
    ]


def test_llm_rubric_and_judge_end_to_end(files):
    with FakeServer(chat=honest_judge) as fake:
        created = create(files, "--rubricator", "llm", *served_flags(fake))
        assert created["records"] == 2
        summary = grade(
            files,
            "--grader",
            "judge",
            "--rubrics",
            str(files["dir"] / "c.jsonl"),
            "--answers",
            str(files["answers"]),
            *served_flags(fake),
        )
        assert all(b["temperature"] == 0.0 for b in fake.bodies()[2:]) and all(
            b["temperature"] == 0.7 for b in fake.bodies()[:2]
        )
    got = rewards(files)
    assert [round(got["a", s]["reward"], 4) for s in range(6)] == [round(4 / 9, 4)] * 4 + [
        1.0,
        1.0,
    ]
    assert summary["teacher_reward_mean"] == 1.0


def test_failed_judgements_are_null_counted_stopped_and_asked_again(files):
    create(files, "--rubricator", "contrast")
    broken = True

    def judge(body):
        if broken and "7+5-3=?" in question_in(body).values():
            return "I would rather not."
        return honest_judge_n(body)

    def honest_judge_n(body):
        answers = find_answers(question_in(body))
        k = len(question_in(body)["criteria"])
        return json.dumps(
            {"verdicts": [{"answer_index": i, "judgement": [True] * k} for i, _ in answers]}
        )

    # the two prompts differ in text so that the judge can fail on one only
    write(
        files["prompts"],
        [
            {"id": "a", "messages": sums.question(TERMS)},
            {"id": "b", "messages": [{"role": "user", "content": "second?"}]},
        ],
    )
    with FakeServer() as fake:
        fake.chat = judge
        arguments = [
            "--grader",
            "judge",
            "--rubrics",
            str(files["dir"] / "c.jsonl"),
            "--re-asks",
            "1",
        ]
        with pytest.raises(BadInput, match="--max-failure-rate"):
            grade(files, *arguments, *served_flags(fake))
        summary = grade(files, *arguments, *served_flags(fake, "--max-failure-rate", "0.6"))
        assert summary["failed"] == 6 and summary["failure_rate"] == 0.5
        got = rewards(files)
        assert all(
            got["a", s]["reward"] is None and got["a", s]["status"] == "failed"
            for s in range(6)
        )
        assert all(got["b", s]["reward"] == 1.0 for s in range(6))
        broken = False
        before = len(fake.requests)
        summary = grade(files, *arguments, *served_flags(fake))
        # only the failed group was asked again
        assert summary["failed"] == 0 and len(fake.requests) == before + 1
    assert len(rewards(files)) == 12


def test_cache_saves_the_second_run(files):
    with FakeServer(chat=honest_judge) as fake:
        flags = ["--rubricator", "llm", "--cache", str(files["dir"] / "cache.jsonl")]
        create(files, *flags, *served_flags(fake))
        first = len(fake.requests)
        create(files, *flags, *served_flags(fake), out="again.jsonl")
        assert first >= 1 and len(fake.requests) == first
    first, again = (
        sorted((files["dir"] / name).read_text().splitlines())
        for name in ("c.jsonl", "again.jsonl")
    )
    assert first == again  # records land in the order in which replies come


@pytest.mark.parametrize(
    "extra",
    [
        ["--grader", "check"],
        ["--grader", "answer", "--rubrics", "x"],
        ["--grader", "judge", "--rubrics", "x"],
        ["--grader", "answer", "--verifier-noise", "0.1"],
    ],
)
def test_combinations_that_make_no_sense_are_refused(files, extra):
    with pytest.raises(BadInput):
        grade(files, *extra)


@pytest.mark.parametrize(
    "text, answer, right",
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{3} and \boxed{\frac{3}{1}}", "3", False),
        (r"\boxed{4} and \boxed{5", "4", True),
        (r"\boxed{12}", "1,2", False),
        ("#1,024", "1024.0", True),
        (r"\boxed{12345678901234567891}", "12345678901234567890", False),
        ("#12\r\n", "12", True),
        ("#### 18\n\n# Note", "18", True),
        (r"<think>maybe \boxed{5}? no wait", "5", False),
        (r"<think>\boxed{5}</think> #7", "7", True),
        ("#5\n<think>#7</think>", "5", False),
        ("# 012", "12", True),
    ],
)
def test_answers_as_real_models_write_them(text, answer, right):
    assert is_correct(text, answer) is right
