"""Rubrics without a judge: criteria mined from a library of predicates, and their verdicts.

Criteria are ranked by the gap between the teacher's and the students' pass rate.  The first two
get 5 and 4 points where their gap is at least 0.5; others get 2 where it is at least 0.2, and
else 1.

A library is a dict {name: check}.  A check has `category`, `criterion`,
`test(question, text, *arguments) -> bool` and `propose(references) -> argument tuples worth
trying`, as in worlds/predicates.py."""

import hashlib
import importlib

import numpy as np

from opd import files, records
from opd.records import BadInput


def load_library(name):
    """The library MODULE (its CHECKS) or MODULE:NAME."""
    if not name:
        raise BadInput(
            "--predicates: expected MODULE, a library for your task, got none: "
            "worlds.predicates knows running sums; a served model needs no library: "
            "--rubricator llm, --grader judge"
        )
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute or "CHECKS")
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(
            f"--predicates {name}: expected a module with CHECKS, or MODULE:NAME, got "
            f"{type(error).__name__}: {error}"
        ) from None


def points_for(rank, gap):
    """Points as ROPD's prompt asks: 5 for the decisive bottleneck, 4 for a second criterion
    that separates well, 2 for supporting merits, 1 for what nearly everyone passes."""
    if rank < 2 and gap >= 0.5:
        return 5 - rank
    return 2 if gap >= 0.2 else 1


def contrast(library, question, references, attempts, most=8):
    """A rubric by contrast, or None when fewer than 4 predicates hold for the teacher.

    A predicate qualifies when at least 3/4 of the teacher's answers pass it.  They are ranked
    by the gap between the teacher's and the students' pass rate; ties are broken by a hash, not
    by the library's order.  Where fewer than four have a gap above 0, others fill up to four.

    references ["7+5=12\\n#12"] * 4, attempts ["#11", "#13"] on "7+5=?" put `total_right` (gap
    1) among the first."""
    found = []
    for name, check in library.items():
        for arguments in check.propose(references):
            teacher = np.mean([bool(check.test(question, t, *arguments)) for t in references])
            student = np.mean([bool(check.test(question, t, *arguments)) for t in attempts])
            if teacher >= 0.75:
                tie = hashlib.sha256(f"{question}|{name}".encode()).hexdigest()
                found.append((-(teacher - student), tie, name, arguments))
    found.sort()
    kept = [f for f in found if f[0] < 0][:most]
    kept += [f for f in found if f[0] >= 0][: max(0, 4 - len(kept))]
    if len(kept) < 4:
        return None
    return [
        {
            "id": f"c{rank + 1}",
            "category": library[name].category,
            "criterion": library[name].criterion.format(*arguments),
            "points": points_for(rank, -minus_gap),
            "check": [name, *arguments],
            "gap": round(float(-minus_gap), 3),
        }
        for rank, (minus_gap, _, name, arguments) in enumerate(kept)
    ]


def check_verdicts(question, criteria, answers, library):
    """Verdicts by the predicates that the criteria name; one list of booleans an answer."""
    for criterion in criteria:
        name = (criterion.get("check") or [None])[0]
        if name not in library:
            raise BadInput(
                f"criterion {criterion['criterion']!r}: check: expected a predicate of "
                f"--predicates ({', '.join(library)}), got {name}: a rubric written by a model "
                f"is graded with --grader judge"
            )
    checks = [criterion["check"] for criterion in criteria]
    return [[holds(library, check, question, text) for check in checks] for text in answers]


def holds(library, check, question, text):
    """The verdict of one predicate, [name, its arguments ...]; BadInput where it cannot take
    them."""
    name, *arguments = check
    try:
        return bool(library[name].test(question, text, *arguments))
    except Exception as error:  # whatever somebody's predicate makes of a strange argument
        raise BadInput(
            f"check: expected arguments that the predicate {name} takes, got "
            f"{records.show(arguments)} ({type(error).__name__}: {error})"
        ) from None


def summarise(path):
    """Criteria a rubric, the share with a decisive one, and distinct teacher answers behind
    one."""
    rubrics = list(files.read(path, "rubrics"))
    decisive = [max(c["points"] for c in r["criteria"]) >= 4 for r in rubrics]
    distinct = []
    for rubric in rubrics:
        if "drawn_from" not in rubric:
            raise BadInput(
                f"{path}: id {rubric['id']!r}: drawn_from: expected the answers behind the "
                f"rubric, but the field is missing: --overwrite begins anew"
            )
        distinct.append(len(set(rubric["drawn_from"]["answers"])))
    return {
        "criteria_mean": float(np.mean([len(r["criteria"]) for r in rubrics])),
        "decisive": float(np.mean(decisive)),
        "distinct_answers": float(np.mean(distinct)),
    }
