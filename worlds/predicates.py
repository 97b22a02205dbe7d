"""Predicates on answers to running sums, merits and decoys: the library that the rubricator
`contrast` mines.

    python rubric.py create --predicates worlds.predicates --prompts P --answers A \\
        --rollouts R --out rubrics.jsonl

No predicate sees the `answer` field; `total_right` redoes the sum of the question.

Simplification: totals below 0 are not read as calculations; a student that writes one can pass
`arithmetic_right` by the others.
"""

import re
from dataclasses import dataclass
from typing import Callable

from opd.answers import final_answer

INTEGER = "[0-9]{1,9}"  # no answer can make code convert a number of a million digits, or a ²


EQUATION = re.compile(f"(?<![0-9])(?=({INTEGER})([+-]{INTEGER})=({INTEGER}))")
ENTRY = re.compile(f"([+-]{INTEGER}):({INTEGER})")
TOTALS = re.compile(f"{INTEGER}(,{INTEGER})+")
TOTAL = re.compile(INTEGER)


def terms_of(question):
    """ "7+5-3=?" -> [7, 5, -3]; [] for a question that is no running sum."""
    match = re.fullmatch(rf"\s*({INTEGER}(?:[+-]{INTEGER})*)=\?\s*", question)
    return [int(t) for t in re.findall(r"[+-]?\d+", match[1])] if match else []


def steps_of(question, text):
    """The calculations an answer writes out, whatever its style, as (total before, term, total
    after).

    "7+5=12-3=9" -> [(7, 5, 12), (12, -3, 9)];  "7\\n+5:12" -> [(7, 5, 12)];  "7,12,9" takes its
    terms from the question."""
    equations = EQUATION.findall(text)
    if equations:
        return [tuple(map(int, e)) for e in equations]
    steps, total, terms = [], None, terms_of(question)
    for line in filter(None, text.split("\n")):
        if entry := ENTRY.fullmatch(line):
            steps.append((total, int(entry[1]), int(entry[2])))
            total = int(entry[2])
        elif TOTALS.fullmatch(line):
            totals = list(map(int, line.split(",")))
            steps += [
                (a, terms[i] if i < len(terms) else None, b)
                for i, (a, b) in enumerate(zip(totals, totals[1:]), 1)
            ]
        elif TOTAL.fullmatch(line):
            total = int(line)
    return steps


# ---- the predicate library


@dataclass(frozen=True)
class Check:
    """A criterion that code can verify.  `propose(references)` lists the argument tuples worth
    trying."""

    category: str
    criterion: str  # with {} for the arguments
    test: Callable  # test(question, text, *arguments) -> bool
    # the default: a general property without arguments
    propose: Callable = lambda references: [()]


def _arithmetic_right(question, text):
    steps = steps_of(question, text)
    return bool(steps) and all(None not in s and s[0] + s[1] == s[2] for s in steps)


def _all_terms(question, text):
    terms = terms_of(question)
    return bool(terms) and [s[1] for s in steps_of(question, text)] == terms[1:]


def _total_right(question, text):
    terms, final = terms_of(question), final_answer(text)
    return (
        bool(terms)
        and final is not None
        and bool(re.fullmatch(INTEGER, final))
        and int(final) == sum(terms)
    )


def _conclusion_follows(question, text):
    steps = steps_of(question, text)
    return bool(steps) and final_answer(text) == str(steps[-1][2])


def _work(text):
    return [line for line in text.split("\n") if line and not line.startswith("#")]


def _same(values):
    """[(value,)] when all references agree on it, else nothing to propose."""
    return [(values[0],)] if len(set(values)) == 1 else []


TASK, QUALITY, REASONING = "Task Completion", "Observable Quality", "General Reasoning"
MERITS = {  # what makes an answer good, in any style
    "final_line": Check(
        TASK,
        "The answer commits to a final result on a line that starts with #.",
        lambda q, t: final_answer(t) is not None,
    ),
    "total_right": Check(
        TASK,
        "The final result is the value of the expression that was asked for.",
        _total_right,
    ),
    "arithmetic_right": Check(
        REASONING,
        "At least one calculation is written out, and every one of them is right.",
        _arithmetic_right,
    ),
    "all_terms": Check(
        REASONING, "Every term of the question is used, one step each, in order.", _all_terms
    ),
    "first_step_right": Check(
        REASONING,
        "The first calculation that is written out is right.",
        lambda q, t: (
            bool(s := steps_of(q, t)) and None not in s[0] and s[0][0] + s[0][1] == s[0][2]
        ),
    ),
    "conclusion_follows": Check(
        REASONING,
        "The final result is the total that the written work arrives at.",
        _conclusion_follows,
    ),
    "shows_work": Check(
        QUALITY, "Work stands before the final result.", lambda q, t: bool(_work(t))
    ),
    "one_result": Check(
        QUALITY,
        "Exactly one final result is given.",
        lambda q, t: len(re.findall("^#", t, re.M)) == 1,
    ),
}
# of layout, or of the problem at hand: a teacher may have them by accident.  None compares with
# a final answer
DECOYS = {
    "length_band": Check(
        QUALITY,
        "The answer is {} to {} characters long.",
        lambda q, t, low, high: low <= len(t) <= high,
        lambda refs: [(int(0.9 * min(map(len, refs))), int(1.1 * max(map(len, refs))) + 1)],
    ),
    "at_least": Check(
        QUALITY,
        "The answer has at least {} characters.",
        lambda q, t, low: len(t) >= low,
        lambda refs: [(int(0.9 * min(map(len, refs))),)],
    ),
    "line_count": Check(
        QUALITY,
        "The answer has exactly {} lines.",
        lambda q, t, n: t.count("\n") + 1 == n,
        lambda refs: _same([r.count("\n") + 1 for r in refs]),
    ),
    "opens_with": Check(
        QUALITY,
        "The answer opens with {!r}.",
        lambda q, t, opening: t.startswith(opening),
        lambda refs: _same([r[:3] for r in refs]),
    ),
    "outweighs_question": Check(
        QUALITY,
        "The answer is at least twice as long as the question.",
        lambda q, t: len(t) >= 2 * len(q),
    ),
    "equals_sign": Check(
        QUALITY, "Steps are written with an equals sign.", lambda q, t: "=" in t
    ),
    "comma_list": Check(QUALITY, "Totals are listed with commas.", lambda q, t: "," in t),
    "colon": Check(
        QUALITY, "Steps are written as entries with a colon.", lambda q, t: ":" in t
    ),
    "one_line_of_work": Check(
        QUALITY, "All work stands on one line.", lambda q, t: len(_work(t)) == 1
    ),
    "one_step_a_line": Check(
        QUALITY,
        "Every line of work holds exactly one equation.",
        lambda q, t: bool(_work(t)) and all(w.count("=") == 1 for w in _work(t)),
    ),
    "signed_lines": Check(
        QUALITY,
        "Lines of work open with a sign.",
        lambda q, t: any(w[0] in "+-" for w in _work(t)),
    ),
    "restates": Check(
        QUALITY,
        "The answer repeats the beginning of the question.",
        lambda q, t: t.startswith(q[:3]),
    ),
    "starts_bare": Check(
        QUALITY, "The first line is a bare number.", lambda q, t: t.split("\n")[0].isdigit()
    ),
    "two_digits": Check(
        QUALITY,
        "The final result has two digits.",
        lambda q, t: len(final_answer(t) or "") == 2,
    ),
    "even_result": Check(
        QUALITY,
        "The final result is even.",
        lambda q, t: (final_answer(t) or "1")[-1] in "02468",
    ),
    "short_lines": Check(
        QUALITY,
        "No line is longer than 8 characters.",
        lambda q, t: max(map(len, t.split("\n"))) <= 8,
    ),
    "many_numbers": Check(
        QUALITY,
        "At least five numbers are written.",
        lambda q, t: len(re.findall(r"\d+", t)) >= 5,
    ),
    "no_zero": Check(QUALITY, "No zero is written.", lambda q, t: "0" not in t),
    "no_minus": Check(QUALITY, "No minus sign is written.", lambda q, t: "-" not in t),
}
CHECKS = MERITS | DECOYS


# for an examiner who cannot do the sum
UNCHECKED = {name: check for name, check in CHECKS.items() if name != "total_right"}
