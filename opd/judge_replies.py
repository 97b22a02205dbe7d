"""How a judge's reply is read: one JSON object with exactly the keys that were asked for, no
coercion ("3" and true are not integers), no key twice.

Every parser returns the value or raises ValueError with a sentence on what is wrong, which the
judge is shown (judge.py).  Needs pydantic, which comes with openai.
"""

import json
import re
from typing import Any, Literal

import pydantic
from pydantic import Field

from opd.judge_prompts import CATEGORIES
from opd.records import visible


class Strict(pydantic.BaseModel, extra="forbid", strict=True):
    pass


class Criterion(Strict):
    id: str = Field(pattern="^c[0-9]+$")
    category: Literal[CATEGORIES]
    criterion: str = Field(pattern=r"\S")
    points: int = Field(ge=1, le=5)


class Rubric(Strict):
    criteria: list[Criterion] = Field(min_length=4, max_length=12)


class Judgement(Strict):
    judgement: list[bool]
    final_score: Any = None  # ignored: rubric.py adds the points up itself


class Verdict(Judgement):
    answer_index: int


class Batch(Strict):
    verdicts: list[Verdict]


class Score(Strict):
    score: int = Field(ge=0, le=10)


def without_twins(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("one of its objects has the same key twice")
    return dict(pairs)


def read(reply, schema):
    """The reply as a `schema`.  One fence ```json ... ``` around it is taken off."""
    text = reply.strip()
    # a thinking judge: only then may a </think> in the reply be its own
    if not text.startswith(("{", "```")):
        text = visible(text).strip()
    if fence := re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?\s*```", text, re.DOTALL):
        text = fence[1]
    try:
        value = json.loads(text, object_pairs_hook=without_twins)
        # half a surrogate pair is JSON, but no file could hold it
        json.dumps(value, ensure_ascii=False).encode()
        return schema.model_validate(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not one JSON object: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:40] for part in first["loc"]) or "the reply"
        raise ValueError(f"{place}: {first['msg']}") from None


def parse_rubric(reply):
    """The criteria in a Rubricator's reply."""
    criteria = [criterion.model_dump() for criterion in read(reply, Rubric).criteria]
    if len({c["id"] for c in criteria}) < len(criteria):
        raise ValueError("two criteria have the same id")
    if len({c["criterion"].strip() for c in criteria}) < len(criteria):
        raise ValueError("two criteria say the same, which would count it twice")
    return criteria


def parse_judgement(reply, criteria):
    """[bool] * criteria out of a single Verifier's reply."""
    return one_each(read(reply, Judgement).judgement, criteria)


def parse_batch(reply, answers, criteria):
    """The judgements of Answer 1..N by label.

    {"verdicts": [{"answer_index": 2, "judgement": [true]}, {"answer_index": 1, "judgement":
    [false]}]} -> [[False], [True]]"""
    verdicts = read(reply, Batch).verdicts
    indices = [verdict.answer_index for verdict in verdicts]
    if sorted(indices) != list(range(1, answers + 1)):
        raise ValueError(
            f"verdicts: expected every answer_index from 1 to {answers} once, got {indices}"
        )
    ordered = sorted(verdicts, key=lambda verdict: verdict.answer_index)
    return [one_each(verdict.judgement, criteria) for verdict in ordered]


def one_each(judgement, criteria):
    if len(judgement) != criteria:
        raise ValueError(
            f"judgement: expected a list of {criteria}, one per criterion, got {len(judgement)}"
        )
    return judgement


def parse_score(reply):
    """{"score": 7} -> 0.7"""
    return read(reply, Score).score / 10
