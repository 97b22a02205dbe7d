"""Final answers: which writings are equal, which are not, how one is read, and when a truth is
refused."""

import random

import pytest
from conftest import argv, dump, load

import eval as evaluation
import rubric
from opd.answers import equal, equality_named, final_answer, is_correct, read_answerable
from opd.records import BadInput, visible

EQUAL = [
    # numbers
    ("18", "18.0"),
    ("18", "18."),
    ("18", "+18"),
    ("018", "18"),
    (".5", "0.50"),
    ("- 5", "-5"),
    ("-0", "0"),
    ("1/2", "0.5"),
    ("-1/2", r"-\frac{1}{2}"),
    (r"\dfrac{1}{2}", r"\frac12"),
    (r"\tfrac{3}{4}", "3 / 4"),
    (r"\frac{-10}{4}", "-2.5"),
    (r"\frac{3}{1}", "3"),
    ("1.2e3", "1200"),
    (r"1.2 \times 10^3", "1,200"),
    (r"1.2\cdot10^{-3}", "0.0012"),
    ("1.2 × 10^{3}", "1.2E+3"),
    # marks of thousands
    ("1,234", "1234.0"),
    ("1{,}234", "1234"),
    (r"1\,234", "1234"),
    (r"1,\!234", "1234"),
    ("1 234 567", "1,234,567"),
    ("1_234", "1234"),
    ("1\u2009234", "1234"),
    ("1\u202f234", "1\u00a0234"),
    # signs beyond ASCII
    ("\u22125", "-5"),
    ("\u20135", "-5"),
    ("１８", "18"),
    ("١٨", "18"),
    ("𝟏𝟖", "18"),
    ("\u200b18", "18"),
    ("x²", "x^{2}"),
    ("2π", r"2 \pi"),
    ("(-∞, 3)", r"(-\infty,3)"),
    ("√3", r"\sqrt{3}"),
    # wrappers
    ("**18**", "18"),
    ("**18** apples", "18 apples"),
    ("$18$", "18"),
    ("$$18$$.", "18"),
    (r"\(18\)", r"\[18\]"),
    (r"\text{18}", "18"),
    (r"\mathrm{yes}", "Yes"),
    ("The answer is 18.", "18"),
    ("**Answer:** $x = 18$", "18"),
    # money, percent, units
    ("$18", "18"),
    (r"\$18", "18 dollars"),
    (r"$\$18.00$", "18"),
    ("€18", "USD 18"),
    ("-$5", "-5"),
    ("18$", "$18 dollars"),
    ("US$1,234", "1234 USD"),
    ("50%", r"50 \%"),
    ("50%", "50 percent"),
    ("50", r"50\%"),
    ("18 apples", "18"),
    ("18 apple", "18 apples"),
    (r"18\text{ cm}", "18cm"),
    (r"18 \mathrm{~cm}", "18"),
    (r"5\text{ m}", "5"),
    (r"12 \text{ cm}^2", "12 cm²"),
    (r"45^\circ", "45 degrees"),
    (r"45^{\circ}", "45"),
    ("45°", r"45\degree"),
    ("60 miles per hour", "60"),
    ("1/2 cup", r"\frac{1}{2}"),
    # left-hand sides, brackets, expressions
    ("x = 5", "5"),
    (r"\theta=\frac{1}{2}", "0.5"),
    ("x_1 = 5", "x_{1}=5"),
    ("(1, 2)", "(1,2)"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    (r"(\frac{1}{2}, 3.0)", "(0.5,3)"),
    ("[1, 2)", r"\left[1,2\right)"),
    ("1, 2", "1,2"),
    (r"\{1, 2\}", r"\{1,2\}"),
    (r"\sqrt {3}", r"\sqrt3"),
    (r"2 \sqrt{10}", r"2\sqrt{10}"),
    ("x + 1", "x+1"),
    ("2 x", "2x"),
    (r"\frac{x + 1}{2}", r"\dfrac{x+1}{2}"),
    ("yes", "Yes."),
    ("(A)", "A"),
    (r"\text{(B)}", "B"),
    ("New  York", "new york"),
]
DISTINCT = [
    ("18", "-18"),
    ("18", "81"),
    ("18", "18.01"),
    ("12345678901234567890", "12345678901234567891"),
    ("0.333", "1/3"),
    ("1/0", "2/0"),
    ("1/2/3", "1/6"),
    ("12", "1,2"),
    ("1,234", "1, 234"),
    ("1234", "1.234"),
    ("12345", "1,2345"),
    ("12", "1 2"),
    ("1 2 3", "123"),
    ("1.2.3", "1.2"),
    ("1.2.3", "1.20.3"),
    ("3:30", "330"),
    ("1.2e3", "1.2e4"),
    ("1e999999999", "2e999999999"),
    ("50%", "0.5"),
    ("18 cm", "18 kg"),
    ("$18", "18 cm"),
    ("25 am", "25 pm"),
    ("2 million", "2"),
    ("2 dozen", "2"),
    ("18 or 19", "18"),
    ("18 but wrong", "18"),
    ("2x", "2"),
    ("2 x", "2"),
    ("2m", "2"),
    ("2xyz", "2"),
    ("2 pi", "2"),
    ("2 sin x", "2"),
    ("3i", "3"),
    (r"3\sqrt{2}", "3"),
    (r"\sqrt{18}", "18"),
    (r"3\frac{1}{2}", "31/2"),
    (r"\frac{1}{2}3", "1/23"),
    (r"\frac{x+1}{2}", "x+1/2"),
    ("2**3", "23"),
    ("5²", "52"),
    ("½", "12"),
    ("x²", "x2"),
    ("2+3", "5"),
    ("[1,2)", "(1,2)"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "1,2"),
    ("(1,2)", r"\{1,2\}"),
    ("(5)", "5"),
    ("x = 5", "y = 5"),
    ("x = 5", "x = -5"),
    ("x = 1, y = 5", "5"),
    ("x > 5", "5"),
    ("yes", "no"),
    ("A", "B"),
    ("nowhere", "no where"),
    ("2X", "2x"),
    ("", ""),
    ("", "0"),
    (" ", " "),
    (r"\text{}", "**"),
    ("$", "."),
]


def test_writings_of_one_answer_are_equal():
    assert [pair for pair in EQUAL if not equal(*pair)] == []


def test_different_answers_stay_distinct():
    assert [pair for pair in DISTINCT if equal(*pair)] == []


def test_equality_is_reflexive_and_symmetric():
    rng = random.Random(0)
    pieces = [*r"0123456789.,/%$^_{}()[]=-+ x\*", "\\frac", "\\text{", " cm", "e3", "−", "²"]
    answers = ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(3000)]
    answers += [a for pair in EQUAL + DISTINCT for a in pair]
    for a in answers:
        b = rng.choice(answers)
        assert equal(a, a) is (a.strip() != "") and equal(a, b) is equal(b, a), (a, b)


@pytest.mark.parametrize(
    "unit",
    r"\boxed{ { } \boxed{} \frac{ \text{ # ( $ * ** 9 1, 1,000 − １ <think> </think>".split()
    + ["####\n", "#\n", "# ", " ", "\n", "a ", "answer is ", "answer:\n"],
)
def test_a_megabyte_of_anything_ends(unit):
    text = unit * (10**6 // len(unit))
    text = f"\\boxed{{{text}}}\n#### 1{text}x"
    assert not is_correct(text, "18") and not is_correct("#18", text)


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("#17\n#18", "18", True),
        ("#17\n#18", "17", False),
        ("17", "17", False),
        ("# 17 ", 17, True),
        ("# 17 ", 17.0, True),
        ("#17", ["16", 17], True),
        ("#18", ["16", 17], False),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{3} and \boxed{\frac{4}{1}}", "3", False),
        (r"\boxed{4} and \boxed{5", "4", True),
        (r"\boxed{\boxed{4}}", "4", True),
        (r"\boxed{\left\{4\right.} {", r"\{4.", True),
        ("\\boxed{}\n#5", "5", True),
        ("#### 18\n\n# Note", "18", True),
        ("# 18\n## Note", "18", True),
        ("### Solution\n9 + 9 = 18. The answer is 18.", "18", True),
        ("### Solution\n9 + 9", "Solution", False),
        ("## 1. Set up\n9 + 9\n## 2. Solve\nThe answer is 18.", "18", True),
        ("#### Step 2: conclude\nThe answer is 18.", "18", True),
        ("The answer is below.\n#### yes", "yes", True),
        ("### 1 Set up\n#### yes", "yes", True),
        ("#### Dr. Smith", "#### Dr. Jones", False),
        ("#### St. Louis", "St. Louis", True),
        ("#yes", "yes", True),
        ("The answer is not 17. The answer is 18. I hope it is correct.", "18", True),
        ("Answer: **18**\nbye", "18", True),
        (r"<think>maybe \boxed{5}? no wait", "5", False),
        (r"<think>\boxed{5}</think> #7", "7", True),
        ("#5\n<think>#7</think>", "5", False),
        ("#### 45", "30/2 = <<30/2=15>>15.\n30+15 = 45.\n#### 45", True),
        ("#### 15", "30/2 = <<30/2=15>>15.\n30+15 = 45.\n#### 45", False),
        ("#### 18", r"So it is \boxed{18}.", True),
    ],
)
def test_the_final_answer_is_read_from_both_sides(text, answer, right):
    assert is_correct(visible(text), answer) is right
    assert final_answer("") is None


# ---- the stages


@pytest.fixture
def graded(tmp_path):
    """Two prompts, "2+3" and 18, with a rollout each, and the two stages on them."""
    ask = [{"id": "a", "prompt": "?", "answer": "5"}, {"id": "b", "prompt": "?", "answer": 18}]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("prompts", "rollouts", "out")}
    dump(files["prompts"], ask)
    tokens = {"prompt_ids": [1], "response_ids": [1], "loss_mask": [1], "logprobs": [-1.0]}
    policy = {
        "policy": {"model": "m"},
        "temperature": 1.0,
        "top_p": 1.0,
        "finish_reason": "stop",
    }
    rows = [("a", "#2+3"), ("b", "#### $18.00")]
    dump(files["rollouts"], [tokens | policy | dict(id=i, sample=0, text=t) for i, t in rows])
    return files


def grade(files, **flags):
    rubric.main(argv("grade", grader="answer", **files | flags))
    return [(r["reward"], r["grader"]) for r in load(files["out"])]


def evaluate(files, **flags):
    evaluation.main(argv(**files | flags))
    return [r["correct"] for r in load(files["out"])]


def test_a_prompt_without_a_truth_is_refused_by_line(graded):
    for truth in ({}, {"answer": None}, {"answer": " "}, {"answer": []}, {"answer": ["1", ""]}):
        dump(
            graded["prompts"],
            load(graded["prompts"])[:1] + [{"id": "b", "prompt": "?"} | truth],
        )
        for stage in (grade, evaluate):
            with pytest.raises(BadInput, match=r"prompts\.jsonl:2: answer: expected .*, got "):
                stage(graded)
        assert not graded["out"].exists()
    dump(
        graded["prompts"],
        load(graded["prompts"])[:1] + [{"id": "b", "prompt": "?", "answer": 0}],
    )
    assert len(read_answerable(graded["prompts"])) == 2


def test_rewards_of_another_equality_are_refused(graded):
    pytest.importorskip(
        "math_verify", reason="math-verify is optional: pip install math-verify"
    )
    assert grade(graded) == [(0.0, "answer"), (1.0, "answer")]
    with pytest.raises(BadInput, match="was begun with equality"):
        grade(graded, equality="math-verify")
    name = "answer by math-verify"
    assert grade(graded, equality="math-verify", overwrite=True) == [(1.0, name), (1.0, name)]
    graded["out"] = graded["out"].with_name("evals.jsonl")
    assert evaluate(graded) == [False, True]
    with pytest.raises(BadInput, match="was begun with equality"):
        evaluate(graded, equality="math-verify")
    assert evaluate(graded, equality="math-verify", overwrite=True) == [True, True]


def test_math_verify_adds_to_the_table(caplog):
    pytest.importorskip(
        "math_verify", reason="math-verify is optional: pip install math-verify"
    )
    same = equality_named("math-verify")
    assert all(same(*pair) for pair in EQUAL)
    assert same("2+3", "5") and same(r"2\sqrt{2}", r"\sqrt{8}") and not same("2+3", "6")
    assert not same("9" * 10**6, "5")


def test_a_missing_math_verify_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(BadInput, match="pip install math-verify"):
        equality_named("math-verify")
