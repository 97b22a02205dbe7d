"""Rubrics by contrast, rewards from verdicts, what happens when a judge fails, and the controls
on rubrics and rewards."""

import json

import numpy as np
import pytest
from conftest import argv, by_key, dump, load
from fake_server import FakeServer

import rubric
from experiments import controls
from opd.records import BadInput
from worlds import predicates, sums

TERMS = [7, 5, -3]
RIGHT = [sums.write_work(TERMS, sums.running_totals(TERMS), style) for style in sums.STYLES]
WRONG = ["#12", "7+5=13\n13-3=10\n#10", "#7", "7,12,8\n#8"]
OWN = WRONG + RIGHT[:2]


def passes(name, question, text, *arguments):
    return bool(predicates.CHECKS[name].test(question, text, *arguments))


def answer(prompt_id, sample, text):
    policy = {"model": "teacher"}
    line = {"id": prompt_id, "sample": sample, "policy": policy, "text": text}
    return line | {"finish_reason": "stop"}


def rollout(prompt_id, sample, text):
    ids = [ord(c) for c in text]
    tokens = {"prompt_ids": [1], "response_ids": ids, "loss_mask": [1] * len(ids)}
    sampled = {"logprobs": [-1.0] * len(ids), "temperature": 1.0, "top_p": 1.0}
    return answer(prompt_id, sample, text) | tokens | sampled


class World:
    """Two prompts with four teacher answers and six rollouts each, and the stage on them."""

    def __init__(self, folder):
        self.folder = folder
        self.prompts = folder / "p.jsonl"
        self.answers = folder / "a.jsonl"
        self.rollouts = folder / "r.jsonl"
        dump(self.prompts, [self.prompt("a"), self.prompt("b")])
        dump(self.answers, [answer(i, s, t) for i in "ab" for s, t in enumerate(RIGHT)])
        dump(self.rollouts, [rollout(i, s, t) for i in "ab" for s, t in enumerate(OWN)])

    def prompt(self, prompt_id, answer="9"):
        return {"id": prompt_id, "messages": sums.question(TERMS), "answer": answer}

    def create(self, out="c.jsonl", **flags):
        files = dict(prompts=self.prompts, answers=self.answers, rollouts=self.rollouts)
        if flags.get("rubricator") != "llm":
            flags = dict(predicates="worlds.predicates") | flags
        return rubric.main(argv("create", out=self.folder / out, **files | flags))

    def grade(self, out="w.jsonl", **flags):
        if flags.get("grader") in (None, "judge"):
            flags = {"rubrics": self.folder / "c.jsonl"} | flags
        if "grader" not in flags:
            flags = dict(predicates="worlds.predicates") | flags
        files = dict(prompts=self.prompts, rollouts=self.rollouts)
        return rubric.main(argv("grade", out=self.folder / out, **files | flags))

    def control(self, verb, out, **flags):
        return controls.main(argv(verb, out=self.folder / out, **flags))

    def rubrics(self, name="c.jsonl"):
        return {r["id"]: r for r in load(self.folder / name)}

    def rewards(self, name="w.jsonl"):
        return by_key(load(self.folder / name))

    def names(self, name="c.jsonl"):
        return {c["check"][0] for r in self.rubrics(name).values() for c in r["criteria"]}


@pytest.fixture
def w(tmp_path):
    return World(tmp_path)


# ---- the predicates


@pytest.mark.parametrize("style", sums.STYLES)
def test_merits_hold_for_right_work_in_every_style_and_name_the_slip(style):
    def failed(question, text):
        return {m for m in predicates.MERITS if not passes(m, question, text)}

    source = sums.problems(np.random.default_rng(3), "train", terms=(3, 6))
    for terms in (next(source) for _ in range(50)):
        question, totals = sums.expression_of(terms) + "=?", sums.running_totals(terms)
        assert failed(question, sums.write_work(terms, totals, style)) == set()
        # the last step wrong, the end consistent with it
        slip = sums.write_work(terms, totals[:-1] + [totals[-1] + 1], style)
        both = {"total_right", "arithmetic_right"}
        assert both <= failed(question, slip) <= both | {"first_step_right"}
        guess = {"arithmetic_right", "all_terms", "first_step_right"}
        guess |= {"conclusion_follows", "shows_work"}
        assert failed(question, f"#{totals[-1]}") == guess
        skipped = sums.write_work(terms[:-1], totals[:-1], style, final=totals[-1])
        assert {"all_terms", "conclusion_follows"} <= failed(question, skipped)


def test_no_predicate_raises_on_any_text():
    texts = ["", "#", "\n\n", "#-", "+:", "7+", "🙂" * 50, "9" * 5000, "²", "#²", "٣"]
    texts += ["9" * 5000 + "+1=" + "9" * 5000, "1,2,3\n" * 40, "=" * 30, "#a\n#b", "\x00"]
    for text in texts:
        for question in ("7+5=?", "What is love?", ""):
            for name, check in predicates.CHECKS.items():
                for arguments in check.propose([text or "x", "7+5=12\n#12"]):
                    assert passes(name, question, text, *arguments) in (True, False)


# ---- create


def test_contrast_puts_the_points_on_what_the_teacher_has_and_the_student_lacks(w):
    summary = w.create()
    assert summary["records"] == 2 and summary["failed"] == 0
    assert summary["distinct_answers"] == 4
    for r in w.rubrics().values():
        criteria = r["criteria"]
        assert 4 <= len(criteria) <= 12 and len(r["drawn_from"]["rollouts"]) == 6
        # four styles: no decoy holds for all of them and for few students
        assert {c["check"][0] for c in criteria[:2]} <= set(predicates.MERITS)
        points = [c["points"] for c in criteria]
        assert points[0] == 5 and points == sorted(points, reverse=True)
        for c in criteria:
            name, *arguments = c["check"]
            teacher, student = (
                np.mean([passes(name, "7+5-3=?", t, *arguments) for t in texts])
                for texts in (RIGHT, OWN)
            )
            assert teacher >= 0.75 and c["gap"] == pytest.approx(teacher - student, abs=1e-3)


def test_the_rubricator_never_sees_the_answer_field(w):
    w.create()
    dump(w.prompts, [w.prompt("a", "-999"), w.prompt("b", "-999")])
    w.create("c2.jsonl")
    assert w.rubrics() == w.rubrics("c2.jsonl")


def test_the_library_is_named_by_its_module(w):
    unchecked = dict(predicates="worlds.predicates:UNCHECKED")
    w.create(**unchecked)
    assert w.names() and "total_right" not in w.names()
    w.create("all.jsonl")
    assert "total_right" in w.names("all.jsonl")
    # graded by a library that lacks total_right
    with pytest.raises(BadInput, match="expected a predicate of --predicates"):
        w.grade(rubrics=w.folder / "all.jsonl", **unchecked)


JUDGED = dict(rubricator="llm", model="j", base_url="http://127.0.0.1:9/v1")


def test_bad_input_is_named(w):
    w.create("m1.jsonl", m=1)
    assert {len(r["drawn_from"]["answers"]) for r in w.rubrics("m1.jsonl").values()} == {1}
    create, grade, made = w.create, w.grade, w.folder / "m1.jsonl"
    dump(w.folder / "more.jsonl", [*load(w.rollouts), rollout("zzz", 0, "#1")])
    more = dict(rollouts=w.folder / "more.jsonl")
    for stage, flags, words in (
        (create, dict(m=5), "fewer than 5 answers"),
        (create, dict(m=0), "--m: expected at least 1, got 0"),
        (create, dict(predicates="nonsense"), "nonsense"),
        (create, dict(predicates=None), "--predicates: expected MODULE"),
        (grade, dict(predicates=None, rubrics=made), "--predicates: expected MODULE"),
        (create, dict(model="j"), "--model, --base-url: expected --rubricator llm"),
        (create, JUDGED | dict(re_asks=-1), "--re-asks: expected at least 0"),
        (create, JUDGED | dict(predicates="worlds.predicates"), "expected no library"),
        (grade, dict(base_url="http://localhost"), "expected --grader judge or scalar"),
        (create, more, "'zzz'"),
        (grade, more | dict(grader="answer"), r"more.jsonl:13: id: .*'zzz'"),
        (grade, dict(rubrics=None), "expected --rubrics"),
    ):
        with pytest.raises(BadInput, match=words):
            stage("x.jsonl", **flags)


# ---- grade


def test_rewards_are_the_weighted_pass_rate_recomputed_by_hand(w):
    w.create()
    summary = w.grade(answers=w.answers)
    rubrics, got = w.rubrics(), w.rewards()
    for (i, s), r in got.items():
        criteria = rubrics[i]["criteria"]
        checks = [(c["check"][0], c["check"][1:]) for c in criteria]
        verdicts = [passes(n, "7+5-3=?", OWN[s], *arguments) for n, arguments in checks]
        met = sum(c["points"] for c, v in zip(criteria, verdicts) if v)
        assert r["verdicts"] == verdicts
        assert r["reward"] == pytest.approx(met / sum(c["points"] for c in criteria))
    assert summary["teacher_reward_mean"] > summary["reward_mean"] and summary["failed"] == 0


def test_rubrics_of_other_rollouts_are_refused_unless_frozen_ones_are_meant(w):
    w.create()
    rows = load(w.rollouts)
    dump(w.rollouts, [rows[0] | {"text": "#99"}, *rows[1:]])
    with pytest.raises(BadInput, match="drawn_from"):
        w.grade()
    assert w.grade(frozen_rubrics=True)["records"] == 12


def test_a_rubric_is_drawn_anew_when_its_prompt_has_got_more_rollouts(w):
    w.create()
    before = w.rubrics()
    dump(w.rollouts, [*load(w.rollouts), rollout("b", len(OWN), "#1")])
    assert w.create()["records"] == 2
    after = w.rubrics()
    assert after["a"] == before["a"]
    assert len(after["b"]["drawn_from"]["rollouts"]) == len(OWN) + 1
    assert w.grade()["records"] == 13


# ---- controls


def test_shuffled_rewards_stay_in_their_group_and_lose_their_rollout(w):
    w.grade(grader="answer")
    assert [w.rewards()["a", s]["reward"] for s in range(6)] == [0, 0, 0, 0, 1, 1]
    moved = 0
    for seed in range(20):
        w.control("shuffle-rewards", f"{seed}.jsonl", rewards=w.folder / "w.jsonl", seed=seed)
        dealt = w.rewards(f"{seed}.jsonl")
        assert all(r["rollout"] == w.rewards()[key]["rollout"] for key, r in dealt.items())
        for i in "ab":
            assert sorted(dealt[i, s]["reward"] for s in range(6)) == [0, 0, 0, 0, 1, 1]
        moved += dealt["a", 4]["reward"] + dealt["a", 5]["reward"]
    assert 4 < moved < 24  # chance gives 20 * 2 / 3 = 13.3


def test_flipped_verdicts_have_the_reward_of_what_they_say_now(w):
    flips = [controls.flipped(0.05, "x", i) for i in range(20000)]
    assert np.mean(flips) == pytest.approx(0.05, abs=0.006)
    w.create()
    w.grade()
    files = dict(rewards=w.folder / "w.jsonl", rubrics=w.folder / "c.jsonl")
    w.control("flip-verdicts", "none.jsonl", rate=0, **files)
    assert w.rewards("none.jsonl") == w.rewards()
    w.control("flip-verdicts", "all.jsonl", rate=1, **files)
    w.grade("right.jsonl", grader="answer")
    with pytest.raises(BadInput, match="expected rewards by a rubric"):
        others = files | dict(rewards=w.folder / "right.jsonl")
        w.control("flip-verdicts", "other.jsonl", rate=0.5, **others)
    for key, r in w.rewards("all.jsonl").items():
        assert r["verdicts"] == [not v for v in w.rewards()[key]["verdicts"]]
        assert r["reward"] == pytest.approx(1 - w.rewards()[key]["reward"])


def test_flat_points_change_nothing_else(w):
    w.create()
    w.control("flat-points", "flat.jsonl", rubrics=w.folder / "c.jsonl")
    for key, r in w.rubrics("flat.jsonl").items():
        was = w.rubrics()[key]
        assert r == was | {"criteria": [c | {"points": 3} for c in was["criteria"]]}


def test_the_impression_is_told_which_properties_are_merits_or_not(w):
    w.control("impression", "i.jsonl", view="all", prompts=w.prompts, rollouts=w.rollouts)
    got = w.rewards("i.jsonl")
    assert all(0 <= r["reward"] <= 1 for r in got.values())
    assert got["a", 4]["reward"] > got["a", 0]["reward"]
    question, plain = "7+5-3=?", "7,12,9\n#9"  # all eight merits; lacks = and :
    merits = controls.impression_of(question, plain, "merits", 0)
    assert merits == round(8 + 2 * len(plain) / 40) / 10
    assert controls.impression_of(question, plain, "all", 0) < merits


# ---- the served judge, end to end

CRITERIA = [
    {"id": f"c{k}", "category": "Task Completion", "criterion": f"claim {k}", "points": p}
    for k, p in enumerate((5, 2, 1, 1), 1)
]


def shown(body):
    return json.loads(body["messages"][1]["content"])


def honest_judge(body):
    """Rubricator: four criteria.  Verifier: criterion 1 is met by an answer that ends in #9,
    the others always."""
    document = shown(body)
    if "criteria" not in document:
        return json.dumps({"criteria": CRITERIA})
    verdicts = []
    for a in document["answers"]:
        others = [True] * (len(document["criteria"]) - 1)
        index = int(a["label"].removeprefix("Answer "))
        judgement = [a["text"].endswith("#9"), *others]
        verdicts.append({"answer_index": index, "judgement": judgement})
    return json.dumps({"verdicts": verdicts})


def served(fake, **more):
    return dict(model="judge", base_url=fake.base_url, max_retries=1, timeout=5) | more


def test_llm_rubric_and_judge_end_to_end(w):
    with FakeServer(chat=honest_judge) as fake:
        assert w.create(rubricator="llm", **served(fake))["records"] == 2
        summary = w.grade(grader="judge", answers=w.answers, **served(fake))
        assert [b["temperature"] for b in fake.bodies()] == [0.7, 0.7, 0, 0]
    got = [w.rewards()["a", s]["reward"] for s in range(6)]
    assert got == pytest.approx([4 / 9] * 4 + [1, 1])
    assert summary["teacher_reward_mean"] == 1.0
    with pytest.raises(BadInput, match="graded with --grader judge"):
        w.grade("x.jsonl")


def test_failed_judgements_are_null_counted_stopped_and_asked_again(w):
    w.create()
    broken = True

    def judge(body):
        if broken and "7+5-3=?" in shown(body).values():
            return "I would rather not."
        return honest_judge(body)

    # the two prompts differ in text so that the judge can fail on one only
    other = {"id": "b", "messages": [{"role": "user", "content": "second?"}]}
    dump(w.prompts, [w.prompt("a"), other])
    with FakeServer(chat=judge) as fake:
        flags = dict(grader="judge", re_asks=1, **served(fake))
        with pytest.raises(BadInput, match="max-failure-rate"):
            w.grade(**flags)
        summary = w.grade(**flags | served(fake, max_failure_rate=0.6))
        assert summary["failed"] == 6 and summary["failure_rate"] == 0.5
        for (prompt_id, _), r in w.rewards().items():
            failed = prompt_id == "a"
            assert (r["reward"] is None) == failed == (r["status"] == "failed")
            assert ("no usable reply" in r.get("reason", "")) == failed
        broken = False
        before = len(fake.requests)
        # only the failed group is asked again
        assert w.grade(**flags)["failed"] == 0 and len(fake.requests) == before + 1
    assert len(w.rewards()) == 12


def test_the_scalar_judge_fails_an_answer_at_a_time(w):
    def judge(body):
        return "hm" if shown(body)["answer"] == "#7" else '{"score": 4}'

    with FakeServer(chat=judge) as fake:
        flags = dict(grader="scalar", re_asks=0, **served(fake, max_failure_rate=0.5))
        assert w.grade(**flags)["failed"] == 2
    assert [w.rewards()["a", s]["reward"] for s in range(4)] == [0.4, 0.4, None, 0.4]
