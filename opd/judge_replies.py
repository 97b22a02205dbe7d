"""The forms of a judge's reply.  Each is one pydantic model: its JSON schema is sent with the
request, and `read` reads the reply by it, whether or not the server kept to the schema.

One JSON object with exactly the keys that were asked for, no coercion ("3" and "true" are no
integer and no verdict), no key twice.  Needs pydantic, which comes with openai.
"""

import json
import re
import unicodedata
from typing import Any, Literal

import pydantic
from pydantic import Field, field_validator
from pydantic.json_schema import SkipJsonSchema

from opd.judge_prompts import CATEGORIES
from opd.records import visible

# a criterion that holds a key of another one, as JSON: its quotes were lost
ANOTHERS_KEY = re.compile(r"""["'](id|category|criterion|points)\\?["']\s{0,9}:""")
CUT_SHORT = (",", ";", ":", "(", "[", "{", "...", "…", " and", " or", " the", " of", " with")


class Strict(pydantic.BaseModel, extra="forbid", strict=True):
    pass


class Criterion(Strict):
    id: str = Field(pattern="^c[0-9]+$")
    category: Literal[CATEGORIES]
    criterion: str
    points: int = Field(ge=1, le=5)

    @field_validator("criterion")
    @classmethod
    def undamaged(cls, text):
        if problem := damage(text):
            raise ValueError(f"expected one whole sentence, got {problem}")
        return text


def damage(text):
    """What is wrong with a criterion that JSON accepts, or None."""
    if not any(character.isalnum() for character in text):
        return "no word"
    controls = [c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    if controls or "\ufffd" in text:
        return "control characters"
    if ANOTHERS_KEY.search(text):
        return "the JSON of another criterion"
    opened = sum(map(text.count, "([{")) - sum(map(text.count, ")]}"))
    if opened > 0 or text.count('"') % 2 or text.rstrip().endswith(CUT_SHORT):
        return "a text that is cut short"
    return None


FEWEST = 4  # criteria of a rubric (appendix D)


class Rubric(Strict):
    # up to 12 are read (appendix D); a schema that is enforced ends at the usual 8
    criteria: list[Criterion] = Field(
        min_length=FEWEST, max_length=12, json_schema_extra={"maxItems": 8}
    )

    def value(self):
        """The criteria as dicts; one that says the same as an earlier one is left out, or it
        would count twice.  Where ids are not their own they are numbered."""
        found = {}
        for criterion in self.criteria:
            said = " ".join(criterion.criterion.casefold().split()).rstrip(".")
            found.setdefault(said, criterion.model_dump())
        criteria = list(found.values())
        if len(criteria) < FEWEST:
            raise ValueError(f"expected {FEWEST} different criteria, got {len(criteria)}")
        if len({c["id"] for c in criteria}) < len(criteria):
            for number, criterion in enumerate(criteria, 1):
                criterion["id"] = f"c{number}"
        return criteria


class Reasoned(Strict):
    reason: str
    met: bool


class Score(Strict):
    score: int = Field(ge=0, le=10)

    def value(self):
        """{"score": 7} -> 0.7"""
        return self.score / 10


def judgement_model(criteria, reasons=False, base=Strict):
    """The model of one answer's verdicts, as many as there are criteria, after what `base`
    holds.  Its value is a list of booleans."""

    class Judgement(base):
        judgement: list[Reasoned if reasons else bool] = Field(
            min_length=criteria, max_length=criteria
        )
        # ignored: rubric.py adds the points up itself
        final_score: SkipJsonSchema[Any] = None

        def value(self):
            return [v.met if reasons else v for v in self.judgement]

    return Judgement


def batch_model(answers, criteria, reasons=False):
    """The model of the verdicts on Answer 1..N.  Its value has them by label:

    {"verdicts": [{"answer_index": 2, "judgement": [true]}, {"answer_index": 1, "judgement":
    [false]}]} -> [[False], [True]]"""

    class Indexed(Strict):
        answer_index: int = Field(ge=1, le=answers)

    verdict = judgement_model(criteria, reasons, Indexed)

    class Batch(Strict):
        verdicts: list[verdict] = Field(min_length=answers, max_length=answers)

        def value(self):
            indices = [verdict.answer_index for verdict in self.verdicts]
            if len(set(indices)) < answers:
                raise ValueError(f"verdicts: expected every answer_index once, got {indices}")
            return [verdict.value() for _, verdict in sorted(zip(indices, self.verdicts))]

    return Batch


# ---- reading JSON


def without_twins(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("one of its objects has the same key twice")
    return dict(pairs)


def unfenced(text):
    """The text within one fence ```json ... ``` around it, or all of it."""
    if len(text) < 6 or not text.startswith("```") or not text.endswith("```"):
        return text
    return text[3:-3].removeprefix("json")


def read(reply, model):
    """The value of a reply in the form of `model`, without thoughts before it or one fence
    around it; raises ValueError with a sentence on what is wrong, which the judge is shown."""
    text = reply.strip()
    # a thinking judge: only then may a </think> in the reply be its own
    if not text.startswith(("{", "```")):
        text = visible(text).strip()
    try:
        value = json.loads(unfenced(text), object_pairs_hook=without_twins)
        # half a surrogate pair is JSON, but no file could hold it
        json.dumps(value, ensure_ascii=False).encode()
        reply = model.model_validate(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not one JSON object: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:40] for part in first["loc"]) or "the reply"
        raise ValueError(f"{place}: {first['msg']}") from None
    return reply.value()
