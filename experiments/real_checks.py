"""Predicates on a language model's answers to sums such as "30 + 81 - 95": rubrics of a real
pair where no judge can be had.

    python rubric.py create --predicates experiments.real_checks --prompts P --answers A \\
        --rollouts R --out rubrics.jsonl

For problems of reasoning-gym's chain_sum, asked as experiments/real_tasks.py asks them.  No
predicate sees the `answer` field; `total_right` redoes the sum of the question.
"""

import re

from opd.answers import equal, final_answer
from worlds.predicates import DECOYS as LAYOUT
from worlds.predicates import QUALITY, REASONING, TASK, Check

TERM = r"\d{1,9}"
SUM = rf"-?{TERM}(?: [+-] {TERM})*"
EQUATION = re.compile(rf"(?<![\d+-] )(?<!\d)(-?{TERM}(?: ?[+-] ?{TERM})+) ?= ?(-?{TERM})(?!\d)")


def value(expression):
    """The value of "30 + 81 - 95"."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expression.replace(" ", "")))


def asked(question):
    """The value of the sum that a question asks for, or None."""
    found = re.search(rf"problem: ({SUM}) =", question)
    return value(found[1]) if found else None


def equations(text):
    """Every equation with a sum on its left, as (value of the left, right)."""
    plain = re.sub(r"\\[()\[\]]|\\boxed|[${}]", "", text).replace("\N{MINUS SIGN}", "-")
    return [(value(left), int(right)) for left, right in EQUATION.findall(plain)]


def total_right(question, text):
    total, final = asked(question), final_answer(text)
    return total is not None and final is not None and equal(final, str(total))


def follows(question, text):
    found, final = equations(text), final_answer(text)
    return bool(found) and final is not None and equal(final, str(found[-1][1]))


def all_right(text):
    return all(left == right for left, right in equations(text))


CHECKS = {
    "answered": Check(
        TASK,
        "The answer commits to a final result.",
        lambda q, t: final_answer(t) is not None,
    ),
    "boxed": Check(
        TASK, "The final result stands within \\boxed{{}}.", lambda q, t: "\\boxed{" in t
    ),
    "one_result": Check(
        QUALITY, "Exactly one result is boxed.", lambda q, t: t.count("\\boxed{") == 1
    ),
    "total_right": Check(
        TASK, "The final result is the value of the sum that was asked for.", total_right
    ),
    "work_right": Check(
        REASONING,
        "At least one equation is written out, and every one of them is right.",
        lambda q, t: bool(equations(t)) and all_right(t),
    ),
    "nothing_wrong": Check(
        REASONING, "No equation that is written out is wrong.", lambda q, t: all_right(t)
    ),
    "follows": Check(
        REASONING, "The final result is that of the last equation written out.", follows
    ),
    "no_steps": Check(QUALITY, "No list of steps is written.", lambda q, t: "1. " not in t),
    "no_code": Check(QUALITY, "No program is written.", lambda q, t: "```" not in t),
    "no_formula": Check(QUALITY, "No formula stands on its own.", lambda q, t: "\\[" not in t),
    "brief": Check(
        QUALITY, "The answer has fewer than 200 characters.", lambda q, t: len(t) < 200
    ),
    "one_line": Check(QUALITY, "The answer is one line.", lambda q, t: "\n" not in t),
    "restates": Check(
        QUALITY,
        "The answer repeats the sum that was asked for.",
        lambda q, t: bool(found := re.search(rf"problem: ({SUM}) =", q)) and found[1] in t,
    ),
} | {name: LAYOUT[name] for name in ("length_band", "opens_with", "starts_bare")}
