"""Predicates on a language model's answers to sums such as "30 + 81 - 95": rubrics of a real
pair where no judge can be had.

    python rubric.py create --predicates experiments.real_checks --prompts P --answers A \\
        --rollouts R --out rubrics.jsonl

For problems of reasoning-gym's chain_sum, asked as experiments/real_tasks.py asks them.  No
predicate sees the `answer` field; `total_right` redoes the sum of the question.
"""

import re
from fractions import Fraction

from opd.answers import equal, final_answer, last_boxed
from worlds.predicates import DECOYS as WORLD_DECOYS
from worlds.predicates import QUALITY, REASONING, TASK, Check

NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
SUM = rf"-? ?{NUMBER}(?: ?[+-] ?-?{NUMBER})*"
# no part of a product, of a power or of a longer number
CHAIN = re.compile(
    rf"(?<![\w.+*/^-])(?<![)+*/^-] ){SUM}(?: ?= ?{SUM})+(?![\w^]|[.,]\d| ?[+*/-] ?[\d(])"
)
REWRITINGS = (  # to plain text, in this order
    (r"(?m)^\s*(?:[-*•]|\d+[.)]|Step \d+[.:]?)\s+", " "),
    ("[\N{MINUS SIGN}\N{EN DASH}]", "-"),
    (r"(?<=\d)(?:\{,\}|,|\\,)(?=\d{3}(?!\d))", ""),
    (r"\\times|\\cdot|×", "*"),
    (r"\\[a-zA-Z]+|\\.|\*\*|[${}&]", " "),
    (r"\s+", " "),
)


def plain(text):
    """Arithmetic without markup, on one line."""
    for pattern, new in REWRITINGS:
        text = re.sub(pattern, new, text)
    return text.strip()


def value(expression):
    """The value of "30 + 81 - 95"."""
    compact = expression.replace(" ", "").replace("+-", "-").replace("--", "+")
    return sum(Fraction(term) for term in re.findall(r"[+-]?[\d.]+", compact))


def sum_asked(question):
    """The sum that a question asks for, "30 + 81 - 95", or None."""
    found = re.search(rf"problem: ({SUM}) =", question)
    return found[1] if found else None


def chains(text):
    """Every equation of sums, as (whether it is right, the value of its end).  In a running
    one, 30 + 81 = 111 - 95 = 16, a side may equal the first number of the next."""
    found = []
    for match in CHAIN.finditer(plain(text)):
        sides = re.split(" ?= ?", match[0])
        if all(re.fullmatch(f"-? ?{NUMBER}", side) for side in sides):
            continue  # 16 = 16
        right = all(
            value(a) in (value(b), value(re.match(f"-? ?{NUMBER}", b)[0]))
            for a, b in zip(sides, sides[1:])
        )
        found.append((right, value(sides[-1])))
    return found


def all_right(text):
    return all(right for right, _ in chains(text))


def total_right(question, text):
    total, final = sum_asked(question), final_answer(text)
    return None not in (total, final) and equal(final, str(value(total)))


def follows(question, text):
    found, final = chains(text), final_answer(text)
    return bool(found) and final is not None and equal(final, str(found[-1][1]))


def restates(question, text):
    total = sum_asked(question)
    words = re.escape(total or "").replace(r"\ ", " ?")
    return bool(total and re.search(rf"(?<![\d.]){words}(?!\d)", plain(text)))


MERITS = {
    "answered": Check(
        TASK,
        "The answer commits to a final result.",
        lambda q, t: final_answer(t) is not None,
    ),
    "boxed": Check(
        TASK, "The final result stands within \\boxed{{}}.", lambda q, t: bool(last_boxed(t))
    ),
    "total_right": Check(
        TASK, "The final result is the value of the sum that was asked for.", total_right
    ),
    "work_right": Check(
        REASONING,
        "At least one equation is written out, and every one of them is right.",
        lambda q, t: bool(chains(t)) and all_right(t),
    ),
    "nothing_wrong": Check(
        REASONING, "No equation is written out that is wrong.", lambda q, t: all_right(t)
    ),
    "follows": Check(
        REASONING, "The final result is that of the last equation written out.", follows
    ),
}
DECOYS = {
    "no_steps": Check(
        QUALITY,
        "The answer has no list.",
        lambda q, t: not re.search(r"(?m)^\s*(?:[-*•]|\d+[.)]|Step \d)", t),
    ),
    "no_code": Check(QUALITY, "No program is written.", lambda q, t: "```" not in t),
    "no_formula": Check(
        QUALITY,
        "No formula stands on a line of its own.",
        lambda q, t: not re.search(r"(?<!\\)\\\[|\$\$|\\begin\{", t),
    ),
    "brief": Check(
        QUALITY, "The answer has fewer than 200 characters.", lambda q, t: len(t) < 200
    ),
    "one_line": Check(QUALITY, "The answer is one line.", lambda q, t: "\n" not in t.strip()),
    "restates": Check(QUALITY, "The answer repeats the sum that was asked for.", restates),
    "length_band": WORLD_DECOYS["length_band"],
}
CHECKS = MERITS | DECOYS
