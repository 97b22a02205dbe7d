"""Final answers: how one is read from a text, and when two are equal.

The truth (a prompt's `answer`) and the response are read and rewritten by the same rules.

| rule | equal | distinct |
|---|---|---|
| numbers are exact | 18, 18.0, +18, 18. and 1/2, 0.5, \\frac12 | 18, -18 and 0.333, 1/3 |
| powers of ten | 1200, 1.2e3, 1.2 \\times 10^3 | 1.2e3, 1.2e4 |
| marks of thousands | 1234, 1,234, 1{,}234, 1\\,234, 1 234 | 12, 1,2 and 1234, 1.234 |
| signs beyond ASCII | -5, −5, –5 and 18, １８, ١٨ | 5², 52 |
| wrappers go | 18, **18**, $18$, \\(18\\), \\text{18}, "The answer is 18." | \\sqrt{18}, 18 |
| left-hand sides count if both have one | 5, x = 5 | x = 5, y = 5 |
| units count if both have one | 18, 18 cm and 50, 50% | 18 cm, 18 kg and 0.5, 50% |
| all money is one unit | 18, $18, 18 dollars, €18, USD 18 | $18, 18 cm |
| spaces count in words and between digits | (1, 2), (1,2) and 2 x, 2x | 1 2, 12 |
| brackets count, but (A) is option A | (1,2), \\left(1,2\\right) | (1,2), [1,2) |
| case counts, but not in words | yes, Yes | 2x, 2X |

Nothing is evaluated: 2+3 is not 5.  Nothing equals an empty answer, and one of over 1,000
characters equals only itself.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

from opd import files, records
from opd.records import BadInput

LONGEST = 1000  # characters of an answer that is rewritten

# ---- reading an answer


def last_boxed(text):
    """What the last closed \\boxed{...} holds, or None."""
    first = text.find("\\boxed{")
    if first < 0:
        return None
    found = None
    last = -1
    opened = []
    for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, first):
        if brace[0] == "{":
            opened.append(brace.end())
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start > last and text.endswith("\\boxed{", 0, start):
                last = start
                found = slice(start, brace.start())
    return text[found].strip() if found else None


# what stands behind the `#`s of "## Step 1" and "## 2. Solve"
HEADING = r"(?:\d+[.):][^\S\n]*)?[^\W\d_]"


def last_marked(text):
    """(what follows the last `####` of a line, else the last `#`s that begin no heading; the
    text after that line), or (None, text): "## Step 1" is a heading, "#12" and "# 12" are
    answers."""
    for mark in ("####", rf"#+(?!#|[^\S\n]+{HEADING})"):
        if found := list(re.finditer(rf"^{mark}[^\S\n]*(\S.*)$", text, re.M)):
            return found[-1][1].strip(), text[found[-1].end() :]
    return None, text


def last_stated(text):
    """What follows the last "answer is" or "answer:" in its sentence, or None."""
    ends = [
        m.end() for m in re.finditer(r"\banswer(?:\*\*)?(?: is\b:?|:(?:\*\*)?)", text, re.I)
    ]
    return re.split(r"\n|\. ", text[ends[-1] :].strip(), maxsplit=1)[0] if ends else None


def final_answer(text):
    """The final answer a text commits to, or None: the last \\boxed{...}, else what follows the
    last `####` of a line ("#### Step 2" with "answer is" after it is a heading), else the last
    `#`s that begin no heading, else "answer is".

    final_answer("7+5=12\\n#12") -> "12";   final_answer("... so \\\\boxed{\\\\frac{1}{2}}") ->
                                            "\\\\frac{1}{2}";   final_answer("12") -> None.
    The text is an answer without thoughts (records.final_text)."""
    text = text.strip()
    if boxed := last_boxed(text):
        return boxed
    marked, rest = last_marked(text)
    if marked and re.match(HEADING, marked):
        marked = last_stated(rest) or marked
    return marked or last_stated(text) or None


@lru_cache(1 << 12)
def truth_of(text):
    """The final answer of a whole solution (GSM8K: "... #### 18"), or the text itself."""
    return final_answer(text) or text.strip()


def accepted_answers(answer):
    """The right answers that a prompt's `answer` names, a text, a number or a list of them; ""
    for what is none of these."""
    answers = answer if isinstance(answer, list) else [answer]
    return [truth_of(str(a)) if type(a) in (str, int, float) else "" for a in answers]


# ---- one form for all writings of an answer

SYMBOLS = {
    "\N{MINUS SIGN}": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "√": r"\sqrt ",
    "²": "^2",
    "³": "^3",
}
REWRITINGS = (  # in this order
    (r"\\(?:left|right)(?![a-zA-Z])|\\[!()\[\]]|\$\$", ""),
    (r"(?:(?<!\\)\\[,;: ]|~|\s)+", " "),
    (r"\{,\}", ","),
    (r"\\%", "%"),
    (r"(?:\bUS)?\\\$|\bUS\$", "USD "),
    (r"\$([^$]+)\$", r"\1"),
    (r"(?<![\w)])\*\*([^*]+)\*\*", r"\1"),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r" \1 "),
    (r"\\[dt]frac", r"\\frac"),
    (r" *\^ *", "^"),
    (r"\^\{? ?\\circ ?\}?| *\\degree", "°"),
    (r"(?<!\\)\{ *(\w) *\}", r"\1"),
    (r"(?<=[\d.]) *(?:\\times|\\cdot|[*x]) *10\^\{? *(-?\d{1,3}) *\}?(?!\d)", r"e\1"),
    (r"(\\[a-zA-Z]+) +", r"\1"),
    (r" +", " "),
)
DIGITS = r"(?:(?:[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+|(?:_\d{3})+)|\d+)(?:\.\d*)?|\.\d+)"
NUMBER = rf"([-+]? ?{DIGITS})(?:[eE]([-+]?\d{{1,3}}))?(?: ?/ ?({DIGITS}))?(.*)"
FRACTION = (
    r"^([-+]?) ?\\frac ?(?:\{([-+]?[\d.]+)\}|(\d)) ?(?:\{([\d.]+)\}|(\d))(?![\w.^])",
    r"\1\2\3/\4\5",
)
MONEY_FIRST = (
    r"^([-+]?) ?(?:[$€£¥]|(?:USD|EUR|GBP)\b) ?(.*?)(?: (?:dollars|euros))?$",
    r"\1\2 USD",
)
SHORT_UNIT = r"(?:mm|cm|km|mg|kg|ml|in|ft|mi|lbs?|oz|hrs?|mph|[ap]m|usd|eur|gbp)"
# words that change the number, or say something else of it
NO_UNIT = (
    r"hundred|thousand|million|billion|trillion|dozen|and|or|but|not|is|if|than|infinity|"
    r"sqrt|sin|cos|tan|log|exp"
)
# a bare letter is a unit only after a space: 2m is a product
UNIT = (
    rf" ?(?:%|°[cf]?|[$€£¥]|{SHORT_UNIT}(?:\^[23])?)|"
    rf" (?!.*\b(?:{NO_UNIT})\b)(?:[mgshl]|{SHORT_UNIT}|[a-z]{{3,}})"
    r"(?:[ /][a-z]+){0,2}(?:\^[23])?"
)
SAME_UNIT = {"percent": "%", "degr": "°"} | dict.fromkeys(
    ("dollar", "euro", "usd", "eur", "gbp", "€", "£", "¥"), "$"
)
VARIABLE = r"(?:([a-zA-Z](?:_\w)?|\\[a-z]+) ?= ?)?([^=]+)"
# not between two letters or two digits
IDLE_SPACE = r"(?<!\w) | (?!\w)|(?<=\d) (?=[^\W\d])|(?<=[^\W\d]) (?=\d)"


def plain_character(c):
    """Digits of all scripts, dashes, spaces, full-width and some mathematical signs in
    ASCII."""
    category = unicodedata.category(c)
    if category == "Nd":
        return str(unicodedata.decimal(c))
    if unicodedata.decomposition(c).startswith("<wide>"):
        return unicodedata.normalize("NFKC", c)
    # spaces, dashes, marks without width
    return {"Zs": " ", "Pd": "-", "Cf": ""}.get(category, SYMBOLS.get(c, c))


def rewritten(answer):
    """An answer without its wrappers, with one spelling of each sign."""
    text = last_stated(answer) or answer
    if not text.isascii():
        text = text.translate({ord(c): plain_character(c) for c in set(text)})
    for pattern, replacement in REWRITINGS:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"^\(([a-zA-Z])\)$", r"\1", text.strip(" ").rstrip(" ."))


def unit_of(rest):
    """The unit that what follows a number names, "" for none; None if it is no unit.
    Singular and plural are one: " inches" -> "inch", " degrees" -> "°"."""
    rest = rest.lower()
    if rest and not re.fullmatch(UNIT, rest):
        return None
    rest = rest.strip()
    unit = rest.rstrip("es") or rest
    return SAME_UNIT.get(unit, unit)


def quantity(text):
    """(number, unit), or None:  "-1,234.50 cm" -> (Fraction(-2469, 2), "cm")"""
    for pattern, replacement in (MONEY_FIRST, FRACTION):
        text = re.sub(pattern, replacement, text)
    found = re.fullmatch(NUMBER, text)
    unit = unit_of(found[4]) if found else None
    if unit is None:
        return None
    top, bottom = (Fraction(re.sub("[, _]", "", part or "1")) for part in found.group(1, 3))
    return (top * Fraction(10) ** int(found[2] or 0) / bottom, unit) if bottom else None


def piece(text):
    """What stands between brackets and commas: a number, words, or an expression."""
    found = quantity(text.strip())
    if found and not found[1]:
        return found[0]
    text = re.sub(IDLE_SPACE, "", text)
    return text.casefold() if text.replace(" ", "").isalpha() else text


@lru_cache(1 << 14)
def normal_form(answer):
    """(value, left-hand side, unit):  "x = 18 cm" -> ((Fraction(18),), "x", "cm");
    "(1/2, b]" -> (("(", Fraction(1, 2), ",", "b", "]"), "", "")"""
    text = rewritten(answer)
    assigned = re.fullmatch(VARIABLE, text)
    variable, text = assigned.groups("") if assigned else ("", text)
    if found := quantity(text):
        return found[:1], variable, found[1]
    pieces = map(piece, re.split(r"([()\[\],])", text))
    return tuple(p for p in pieces if p != ""), variable, ""


def equal(given, wanted):
    """Whether two answers are equal by the table above."""
    given = given.strip()
    wanted = wanted.strip()
    if given == wanted or max(len(given), len(wanted)) > LONGEST:
        return given == wanted != ""
    value, *marks = normal_form(given)
    other, *other_marks = normal_form(wanted)
    alike = (a == b or not (a and b) for a, b in zip(marks, other_marks))
    return value == other != () and all(alike)


# ---- the two equalities


def math_verify_equal(given, wanted):
    """`equal`, or equal by the package math-verify, which also knows 2+3 = 5 and \\sqrt{8} =
    2\\sqrt{2}, but takes 50% for 0.5, 18 cm for 18 kg, and (1,2) for {1,2}.

    It is far slower, as `python -m timeit -s "from opd.answers import math_verify_equal as f"
    "f('2+3', '5')"` shows.  It stops after 5 seconds by signal.alarm, so it runs in
    the main thread only; what it cannot decide is not equal."""
    from math_verify import parse, verify

    if equal(given, wanted):
        return True
    if max(len(given), len(wanted)) > LONGEST:
        return False
    gold, answer = (parse(f"\\boxed{{{text}}}") for text in (wanted, given))
    return verify(gold, answer)


def equality_named(name):
    """The test of equality of a flag --equality; raises BadInput where its package is
    missing."""
    if name == "normalised":
        return equal
    try:
        import math_verify  # noqa: F401
    except ImportError:
        raise BadInput(
            "--equality math-verify: expected the package math-verify, got none: "
            "pip install math-verify"
        ) from None
    return math_verify_equal


def add_equality_flag(p):
    p.add_argument(
        "--equality",
        default="normalised",
        choices=("normalised", "math-verify"),
        help="when a final answer is right: opd/answers.py has the table",
    )


def is_correct(text, answer, same=equal):
    """Whether the text's final answer is the one that a prompt's `answer` names."""
    given = final_answer(text)
    if given is None:
        return False
    return any(same(given, wanted) for wanted in accepted_answers(answer))


# ---- prompts and responses


def question_of(prompt):
    """What the judge is shown as the question: the prompt's text, or its messages other than
    the system's."""
    if "prompt" in prompt:
        return prompt["prompt"]
    return "\n\n".join(m["content"] for m in prompt["messages"] if m["role"] != "system")


def read_answerable(path):
    """The Table of prompts in a file, each of which must have an answer."""
    prompts = files.Table(path, "prompts")
    for prompt in prompts:
        accepted = accepted_answers(prompt.get("answer"))
        if not accepted or "" in accepted:
            where = prompts.where(records.key_of(prompt, "prompts"))
            got = records.show(prompt["answer"]) if "answer" in prompt else "no such field"
            raise BadInput(
                f"{where}: answer: expected the right final answer, a text, a number or a list "
                f"of them, got {got}"
            )
    return prompts
