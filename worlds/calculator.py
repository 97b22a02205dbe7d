"""A calculator as a tool: `--tools calculator`, or `worlds.calculator:Calculator`.

    python rollout.py --tools calculator --model M --prompts P --out rollouts.jsonl
    python rollout.py --tools '{"calculator": {"outage": 0.2}}' \
        --tool-options call_format=brackets --model M --prompts P --out rollouts.jsonl

It parses with the grammar below: no eval, exact fractions, powers and lengths bounded, so that
no text takes more than a moment.  `outage` is the share of calls that have no result without
being wrong.  `pad` and `pad_errors` are least numbers of characters of results and of errors,
for controls.  A model reads the texts of errors: another wording is another tool.
"""

import hashlib
import re
from decimal import Context, Decimal
from fractions import Fraction

from opd.records import BadInput
from opd.tools import MOST_OUTPUT

MOST_CHARACTERS = 200
MOST_DEPTH = 50
MOST_BITS = 256
TOKEN = re.compile(r" *([0-9]+(?:\.[0-9]+)?|\*\*|[-+*/^()])| +$")


class Mistake(ValueError):
    """What is wrong with an expression, in words for the model."""


class Expression:
    """A recursive-descent parser that computes as it goes, in exact fractions.

        sum = product (("+" | "-") product)*        product = factor (("*" | "/") factor)*
                                                    factor = ("+" | "-") factor | power
        power = atom (("^" | "**") factor)?         atom = digits ("." digits)? | "(" sum ")"
                                                    digits: 0 to 9 only

    Expression("2*(3+4)").value() -> Fraction(14);   Expression("2*").value() raises Mistake"""

    def __init__(self, text):
        if len(text) > MOST_CHARACTERS:
            raise Mistake(f"expected at most {MOST_CHARACTERS} characters, came {len(text)}")
        self.tokens = []  # (text, place), places counted from 1
        self.at = 0
        self.depth = 0
        place = 0
        while place < len(text):
            found = TOKEN.match(text, place)
            if not found:
                raise Mistake(
                    f"expected a number or one of + - * / ^ ( ) at place {place + 1}, came "
                    f"{text[place:].lstrip(' ')[:1]!r}"
                )
            if found[1]:
                self.tokens.append((found[1], found.start(1) + 1))
            place = found.end()

    def value(self):
        result = self.sum()
        if self.at < len(self.tokens):
            token, place = self.tokens[self.at]
            raise Mistake(f"expected the end or an operator at place {place}, came {token!r}")
        return result

    def take(self, *wanted):
        """The next token if it is one of these, or None."""
        if self.at < len(self.tokens) and self.tokens[self.at][0] in wanted:
            self.at += 1
            return self.tokens[self.at - 1][0]

    def bounded(self, number):
        if max(abs(number.numerator), number.denominator).bit_length() > MOST_BITS:
            raise Mistake("the result has too many digits")
        return number

    def sum(self):
        total = self.product()
        while sign := self.take("+", "-"):
            other = self.product()
            total = self.bounded(total + other if sign == "+" else total - other)
        return total

    def product(self):
        total = self.factor()
        while sign := self.take("*", "/"):
            other = self.factor()
            if sign == "/" and other == 0:
                raise Mistake("division by zero")
            total = self.bounded(total * other if sign == "*" else total / other)
        return total

    def factor(self):
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise Mistake(f"expected at most {MOST_DEPTH} levels of brackets and signs")
        sign = self.take("+", "-")
        result = self.factor() if sign else self.power()
        self.depth -= 1
        return -result if sign == "-" else result

    def power(self):
        base = self.atom()
        if not self.take("^", "**"):
            return base
        exponent = self.factor()
        if exponent.denominator != 1 or abs(exponent) > MOST_BITS:
            raise Mistake(f"expected a whole exponent of at most {MOST_BITS}")
        if base == 0 and exponent < 0:
            raise Mistake("division by zero")
        size = max(abs(base.numerator), base.denominator)
        # before it is computed
        if size > 1 and (size.bit_length() - 1) * abs(exponent) > MOST_BITS:
            raise Mistake("the result has too many digits")
        return self.bounded(base ** int(exponent))

    def atom(self):
        if self.take("("):
            result = self.sum()
            if not self.take(")"):
                raise Mistake(f"expected a closing bracket, came {self.came()}")
            return result
        if self.at < len(self.tokens) and self.tokens[self.at][0][0] in "0123456789":
            self.at += 1
            return self.bounded(Fraction(self.tokens[self.at - 1][0]))
        raise Mistake(f"expected a number, came {self.came()}")

    def came(self):
        if self.at == len(self.tokens):
            return "the end"
        token, place = self.tokens[self.at]
        return f"{token!r} at place {place}"


def format_number(number):
    """A fraction as a model reads it: whole, or 12 significant digits.

    format_number(Fraction(1, 3)) -> "0.333333333333" """
    if number.denominator == 1:
        return str(number.numerator)
    quotient = Context(prec=12).divide(Decimal(number.numerator), Decimal(number.denominator))
    return format(quotient.normalize(), "f")


def chance(*names):
    """A number in [0, 1) that depends on nothing but these names."""
    digest = hashlib.sha256("|".join(names).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


class Calculator:
    """The tool.   Calculator()({"expression": "37*4"}, "") -> ("148", True)"""

    schema = {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Evaluates an arithmetic expression.",
            "parameters": {
                "type": "object",
                "required": ["expression"],
                "properties": {
                    "expression": {
                        "type": "string",
                        "description": "numbers with + - * / ^ and brackets, such as 2*(3+4)",
                    }
                },
            },
        },
    }

    def __init__(self, outage=0.0, pad=0, pad_errors=0):
        numbers = all(type(x) in (int, float) for x in (outage, pad, pad_errors))
        if not numbers or not (
            0 <= outage <= 1 and 0 <= pad <= MOST_OUTPUT and 0 <= pad_errors <= MOST_OUTPUT
        ):
            raise BadInput(
                f"calculator: expected an outage from 0 to 1, pad and pad_errors from 0 to "
                f"{MOST_OUTPUT}, got {outage}, {pad}, {pad_errors}"
            )
        self.outage = outage
        self.pad = int(pad)
        self.pad_errors = int(pad_errors)

    def __call__(self, arguments, key):
        output, ok = self.evaluate(arguments.get("expression"), key)
        return output.ljust(self.pad if ok else self.pad_errors, "."), ok

    def evaluate(self, expression, key):
        if self.outage and chance("outage", key) < self.outage:
            return "error: no answer, try again", None
        if type(expression) is not str:
            return "error: expected a string named expression", False
        try:
            return format_number(Expression(expression).value()), True
        except Mistake as mistake:
            return f"error: {mistake}", False
