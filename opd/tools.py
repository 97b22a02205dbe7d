"""Tools for agents: what a call looks like in a model's text, what runs it, and what the model
then reads.

    python rollout.py --tools calculator --call-format hermes --model M --prompts P --out
    rollouts.jsonl
    python rollout.py --tools calculator --tool-options '{"outage": 0.2}' --call-format brackets
    --model M --prompts P --out rollouts.jsonl
    python rollout.py --tools mytools:Dictionary --model M --prompts P --out rollouts.jsonl

A step is what the model writes until its end token.  If there is a call in it, the tool runs,
the chat template's words around its output are appended with loss mask 0, and the model goes
on; if there is none, that was the answer.  Sampled ids and template ids are put one after
another and never decoded and encoded again.

    hermes    <tool_call>{"name": "calculator", "arguments": {"expression": "37*4"}}</tool_call>
              as Qwen, Hermes and others write it
    brackets  [37*4]
              what stands inside is the first tool's only argument

Only the first call of a step runs, and none that stands in a model's <think>.  A malformed one
is answered by an error that the model can read, like a wrong expression.

A tool is any object with `schema` (a function in transformers' tool format) and
`__call__(arguments, key) -> (output, ok)`.  It answers whatever a model asks: ok is true for a
result, false where the model was wrong, None where it was not and there is no result all the
same (an outage). It must depend on nothing but its two arguments: `key` names the call (seed,
prompt, sample, number), for tools that want randomness.  One that raises is broken, which is no
fault of the model's: the stage stops and nothing is written of that batch, so that a finished
file never holds an answer to a tool that did not work.  MODULE must be importable: beside the
stages, or on PYTHONPATH.

The calculator parses with the grammar below: no eval, exact fractions, powers and lengths
bounded, so that no text takes more than a moment.  Its options: `outage`, the share of calls
that have no result without being wrong; `pad` and `pad_errors`, a least number of characters of
its results and of its errors, for controls.

Simplifications: 1. tools run one after another in this process, without a time limit; 2. a tool
has no memory; 3. no tools beside a served model.
"""

import hashlib
import importlib
import json
import re
from decimal import Context, Decimal
from fractions import Fraction

from opd.records import BadInput

MOST_CHARACTERS, MOST_DEPTH, MOST_BITS, MOST_OUTPUT = 200, 50, 256, 1000
TOKEN = re.compile(r" *([0-9]+(?:\.[0-9]+)?|\*\*|[-+*/^()])| +$")


# ---- the calculator


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
        self.text, self.tokens, self.at, self.depth = text, [], 0, 0
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
            raise Mistake(
                f"expected the end or an operator at place {self.tokens[self.at][1]}, came "
                f"{self.tokens[self.at][0]!r}"
            )
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
        return (
            "the end"
            if self.at >= len(self.tokens)
            else f"{self.tokens[self.at][0]!r} at place {self.tokens[self.at][1]}"
        )


def format_number(number):
    """A fraction as a model reads it: whole, or 12 significant digits.

    format_number(Fraction(1, 3)) -> "0.333333333333" """
    if number.denominator == 1:
        return str(number.numerator)
    return format(
        Context(prec=12)
        .divide(Decimal(number.numerator), Decimal(number.denominator))
        .normalize(),
        "f",
    )


def chance(*names):
    """A number in [0, 1) that depends on nothing but these names."""
    return (
        int.from_bytes(hashlib.sha256("|".join(map(str, names)).encode()).digest()[:7], "big")
        / 2**56
    )


class Calculator:
    """The tool; see above.   Calculator()({"expression": "37*4"}, "") -> ("148", True)"""

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
        if (
            not all(type(x) in (int, float) for x in (outage, pad, pad_errors))
            or not 0 <= outage <= 1
            or not 0 <= min(pad, pad_errors) <= max(pad, pad_errors) <= MOST_OUTPUT
        ):
            raise BadInput(
                f"calculator: expected an outage from 0 to 1, pad and pad_errors from 0 to "
                f"{MOST_OUTPUT}, got {outage}, {pad}, {pad_errors}"
            )
        self.outage, self.pad, self.pad_errors = outage, int(pad), int(pad_errors)

    def __call__(self, arguments, key):
        expression = arguments.get("expression")
        if self.outage and chance("outage", key) < self.outage:
            output, ok = "error: no answer, try again", None
        elif type(expression) is not str:
            output, ok = "error: expected a string named expression", False
        else:
            try:
                output, ok = format_number(Expression(expression).value()), True
            except Mistake as mistake:
                output, ok = f"error: {mistake}", False
        return output.ljust(self.pad if ok else self.pad_errors, "."), ok


# ---- calls in text


def hermes(text, _):
    """{"name", "arguments"} or {"problem"} of the first call of a text, None without one."""
    start = text.find("<tool_call>")
    if start < 0:
        return None
    body, closed, _ = text[start + len("<tool_call>") :].partition("</tool_call>")
    if not closed:
        return {"problem": "expected </tool_call> at the end of the call"}
    try:
        call = json.loads(body)
        # NaN and 1e999 are no JSON, and could not be recorded
        json.dumps(call, allow_nan=False)
    except (ValueError, RecursionError):
        return {"problem": "expected the call as JSON"}
    call = call[0] if type(call) is list and len(call) == 1 else call
    if (
        type(call) is not dict
        or type(call.get("name")) is not str
        or type(call.get("arguments")) is not dict
    ):
        return {"problem": 'expected {"name": ..., "arguments": {...}}'}
    return {"name": call["name"], "arguments": call["arguments"]}


def brackets(text, tools):
    """The same for [37*4]."""
    start = text.find("[")
    if start < 0:
        return None
    body, closed, _ = text[start + 1 :].partition("]")
    if not closed:
        return {"problem": "expected ] at the end of the call"}
    name = next(iter(tools))
    return {
        "name": name,
        "arguments": {
            next(iter(tools[name].schema["function"]["parameters"]["properties"])): body
        },
    }


FORMATS = {"hermes": hermes, "brackets": brackets}
TOOLS = {"calculator": Calculator}
TOLD = """You can call functions. Their signatures are:
{schemas}
To call one, write its name and arguments as JSON between these marks, and nothing after them:
<tool_call>{example}</tool_call>
You will then be given what it returns."""


class Toolbox:
    """The tools of a run, and how calls of them are written.

    names "calculator,mytools:Dictionary"; options: keyword arguments of the first tool; form: a
    key of FORMATS; most_calls: an episode that calls more often ends in finish_reason
    `tool_limit`."""

    def __init__(self, names, options, form, most_calls):
        if most_calls < 1:
            raise BadInput(f"--max-calls: expected at least 1, got {most_calls}")
        self.tools, self.form, self.most_calls, self.frames = {}, form, most_calls, {}
        for name in names.split(","):
            make = TOOLS.get(name) or found(name)
            try:
                tool = make(**options if not self.tools else {})
                known_as = tool.schema["function"]["name"]
                next(iter(tool.schema["function"]["parameters"]["properties"]))
            except (TypeError, KeyError, AttributeError, StopIteration) as error:
                raise BadInput(
                    f"--tools {name}: expected a tool with a `schema` in transformers' "
                    f"format, made with {options}, got {type(error).__name__}: "
                    f"{error}"
                ) from None
            if known_as in self.tools:
                raise BadInput(
                    f"--tools {name}: expected tools of different names, got {known_as} twice"
                )
            self.tools[known_as] = tool

    def find(self, text):
        """The first call of a step's text outside of <think>, or None: then the step was the
        answer."""
        return FORMATS[self.form](
            text.rpartition("</think>")[2].partition("<think>")[0], self.tools
        )

    def run(self, call, key):
        """The call with its `output` and `ok`, and `outage` where the tool says so; raises
        BadInput if the tool itself breaks."""
        if "problem" in call:
            return call | {"output": f"error: {call['problem']}", "ok": False}
        if call["name"] not in self.tools:
            return call | {
                "output": f"error: expected one of the functions {', '.join(self.tools)}",
                "ok": False,
            }
        try:
            output, ok = self.tools[call["name"]](call["arguments"], key)
            if type(output) is not str or not (ok is None or type(ok) is bool):
                raise TypeError(
                    f"expected (text, true, false or None), got {output!r:.60}, {ok!r:.60}"
                )
        except Exception as error:  # whatever it is, the model did not do it
            raise BadInput(
                f"tool {call['name']}: broke on {json.dumps(call['arguments'])[:200]} "
                f"({type(error).__name__}: {error}): nothing of this batch was "
                f"written"
            ) from error
        output = output.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
        return (
            call
            | {
                "output": output
                if len(output) <= MOST_OUTPUT
                else output[:MOST_OUTPUT] + " (cut)",
                "ok": bool(ok),
            }
            | ({"outage": True} if ok is None else {})
        )

    def prompt(self, render, tokenizer, prompt, options):
        """The ids of a prompt that tells of the tools: in the chat template's own way or, where
        it has none, in a system message. In brackets nothing is told: that is for models that
        have learnt it."""
        plain = render(tokenizer, prompt, options)
        if "messages" not in prompt:
            raise BadInput(
                f"prompt {prompt['id']!r}: tools need `messages` and a chat template, got a "
                f"plain `prompt`"
            )
        if self.form == "brackets":
            return plain
        schemas = [tool.schema for tool in self.tools.values()]
        told = render(tokenizer, prompt, options | {"tools": schemas})
        if told != plain:
            return told
        function = schemas[0]["function"]
        example = {
            "name": function["name"],
            "arguments": {name: "..." for name in function["parameters"]["properties"]},
        }
        told, messages = (
            TOLD.format(
                schemas="\n".join(map(json.dumps, schemas)), example=json.dumps(example)
            ),
            prompt["messages"],
        )
        if messages and messages[0]["role"] == "system":
            messages = [
                messages[0] | {"content": messages[0]["content"] + "\n\n" + told},
                *messages[1:],
            ]
        else:
            messages = [{"role": "system", "content": told}, *messages]
        return render(tokenizer, prompt | {"messages": messages}, options)

    def turn(self, policy, call):
        """The ids between a step and the next: what the chat template writes around a tool's
        output, and the output, in which nothing is taken for one of the tokenizer's marks.  The
        end token of the step is not among them, the model has written it."""
        tokenizer = policy.tokenizer
        # a name that the model made up is not written into a template
        name = call["name"] if call.get("name") in self.tools else next(iter(self.tools))
        frame = id(tokenizer), name
        if frame not in self.frames:
            said, came = "(what it said)", '(what "came"\nof it)'  # must come out as it is
            messages = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": said},
                {"role": "tool", "name": name, "content": came},
            ]
            try:
                text = tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=True,
                    tokenize=False,
                    **policy.template_options,
                )
                before, after = text.split(said)[1].split(came)
            except Exception as error:  # templates raise what they like
                raise BadInput(
                    f"{policy.identity['model']}: its chat template has no place for a "
                    f"tool's output ({type(error).__name__}: {error})"
                ) from None
            before, after = (
                tokenizer(part, add_special_tokens=False)["input_ids"]
                for part in (before, after)
            )
            marks = "|".join(
                sorted(
                    (
                        re.escape(token.content)
                        for token in tokenizer.added_tokens_decoder.values()
                    ),
                    key=len,
                    reverse=True,
                )
            )
            self.frames[frame] = (
                before[1:] if before and before[0] in policy.stop_ids else before,
                re.compile(marks or "(?!)"),
                after,
            )
        before, marks, after = self.frames[frame]
        ids, rest = list(before), call["output"]
        while rest:  # a mark is cut behind its first character, and neither part is one
            found = marks.search(rest)
            piece = rest[: found.start() + 1] if found else rest
            ids, rest = (
                ids
                + tokenizer(piece, add_special_tokens=False, split_special_tokens=True)[
                    "input_ids"
                ],
                rest[len(piece) :],
            )
        return ids + after


def call_use(calls, limited):
    """calls: of each episode, whether its calls had results; limited: of each, whether the
    calls ran out.  Calls an episode, share that failed, share that ran out.

    call_use([[True, False], []], [False, True]) -> calls 1.0, call_errors 0.5, tool_limit
    0.5"""
    every = [ok for each in calls for ok in each]
    return {
        "calls": len(every) / len(calls),
        "call_errors": every.count(False) / max(1, len(every)),
        "tool_limit": sum(limited) / len(calls),
    }


def found(name):
    """The class `module:Name`."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(
            f"--tools {name}: expected {', '.join(TOOLS)}, or MODULE:CLASS of your own, got "
            f"{type(error).__name__}: {error}"
        ) from None
