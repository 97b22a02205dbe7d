"""Tools for agents: what a call looks like in a model's text, what runs it, and what the model
then reads.

    python rollout.py --tools calculator --model M --prompts P --out rollouts.jsonl
    python rollout.py --tools mytools:Dictionary --model M --prompts P --out rollouts.jsonl

A step is what the model writes until its end token.  If there is a call in it, the tool runs,
the chat template's words around its output are appended with loss mask 0, and the model goes
on; if there is none, that was the answer.  Sampled ids and template ids are put one after
another and never decoded and encoded again.

    hermes    <tool_call>{"name": "calculator", "arguments": {"expression": "37*4"}}</tool_call>
              as Qwen, Hermes and others write it
    json      {"name": "calculator", "arguments": {"expression": "37*4"}}
              without marks or within any: so Qwen2.5-Coder writes, whatever its template says
    brackets  [37*4]
              what stands inside is the first tool's only argument

Only the first call of a step runs, and none that stands in a model's <think>.  A malformed one
is answered by an error that the model can read, like a wrong expression.

A tool is any object with `schema` (a function in transformers' tool format) and
`__call__(arguments, key) -> (output, ok)`.  ok is true for a result, false where the model was
wrong, None where it was not and there is no result all the same (an outage).  The answer must
depend on nothing but the two arguments: `key` names the call (seed, prompt, sample, number),
for tools that want randomness.  A call without an argument that the schema requires does not
reach the tool: the model reads an error.  A tool that raises is broken: the stage stops and
writes nothing of that batch, so that a finished file never holds an answer to a tool that did
not work.  MODULE must be importable: beside the stages, or on PYTHONPATH.

Simplifications: 1. tools run one after another in this process, without a time limit; 2. a tool
has no memory; 3. no tools beside a served model.
"""

import copy
import importlib
import itertools
import json
import re
from dataclasses import dataclass, field

from opd.chat import apply, plain_ids, render, token_names
from opd.records import BadInput, visible

MOST_OUTPUT = 1000
MOST_OBJECTS = 8  # that are tried
OBJECT = re.compile(r'\{\s*"name"\s*:\s*"([^"]*)"')
DECODER = json.JSONDecoder()
ALIASES = {"calculator": "worlds.calculator:Calculator"}

# ---- calls in text


def hermes(text, _):
    """{"name", "arguments"} or {"problem"} of the first call of a text, None without one."""
    _, opened, rest = text.partition("<tool_call>")
    if not opened:
        return None
    body, closed, _ = rest.partition("</tool_call>")
    if not closed:
        return {"problem": "expected </tool_call> at the end of the call"}
    return read_call(json.loads, body)


def json_call(text, tools):
    """The same without marks: the first JSON object that begins with a name and has arguments.
    A malformed one is a problem where it names one of the tools, or arguments follow."""
    problem = None
    for opened in itertools.islice(OBJECT.finditer(text), MOST_OBJECTS):
        rest = text[opened.start() :]
        call = read_call(lambda x: DECODER.raw_decode(x)[0], rest)
        if "problem" not in call:
            return call
        if opened[1] in tools or '"arguments"' in rest:
            problem = problem or call
    return problem


def read_call(read, text):
    """The call that `read` makes of a text, or its problem."""
    try:
        call = read(text)
        # NaN and 1e999 are no JSON, and could not be recorded
        json.dumps(call, allow_nan=False)
    except (ValueError, RecursionError):
        return {"problem": "expected the call as JSON"}
    if type(call) is list and len(call) == 1:
        call = call[0]
    call = call if type(call) is dict else {}
    name = call.get("name")
    arguments = call.get("arguments")
    if type(name) is not str or type(arguments) is not dict:
        return {"problem": 'expected {"name": ..., "arguments": {...}}'}
    return {"name": name, "arguments": arguments}


def brackets(text, tools):
    """The same for [37*4]."""
    _, opened, rest = text.partition("[")
    if not opened:
        return None
    body, closed, _ = rest.partition("]")
    if not closed:
        return {"problem": "expected ] at the end of the call"}
    name, tool = next(iter(tools.items()))
    argument = next(iter(tool.schema["function"]["parameters"]["properties"]))
    return {"name": name, "arguments": {argument: body}}


FORMATS = {"hermes": hermes, "json": json_call, "brackets": brackets}

# ---- an answer in steps


@dataclass
class Episode:
    """An answer in steps, with the tools' outputs between them; lists are a value a token."""

    response_ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    loss_mask: list = field(default_factory=list)
    steps: list = field(default_factory=list)  # [start, end, whether its call had a result]
    calls: list = field(default_factory=list)
    final: str = ""
    finish_reason: str = ""
    end_mass: float | None = None

    def add_step(self, ids, logprobs, mask=1):
        """What the model wrote."""
        start = len(self.response_ids)
        self.response_ids += ids
        self.logprobs += logprobs
        self.loss_mask += [mask] * len(ids)
        self.steps.append([start, len(self.response_ids), None])

    def add_output(self, call, ids):
        """What the model then reads: loss mask 0."""
        self.response_ids += ids
        self.logprobs += [0.0] * len(ids)
        self.loss_mask += [0] * len(ids)
        self.steps[-1][2] = call["ok"]
        self.calls.append(call)


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


# ---- the tools of a run

TOLD = """You can call functions. Their signatures are:
{schemas}
To call one, write its name and arguments as JSON between these marks, and nothing after them:
<tool_call>{example}</tool_call>
You will then be given what it returns."""


def tool_options(text):
    """{tool: its options} of --tools: "calculator,mytools:Dictionary", or JSON with options,
    '{"calculator": {"outage": 0.2}}'."""
    if not text.startswith("{"):
        return {name: {} for name in text.split(",")}
    try:
        tools = json.loads(text)
    except ValueError as error:
        raise BadInput(
            f"--tools: expected names or a JSON object, got {text} ({error})"
        ) from None
    if not tools or not all(type(options) is dict for options in tools.values()):
        raise BadInput(f"--tools: expected an object of options for each tool, got {text}")
    return tools


def load_tool(name, options):
    """A tool from `module:Class` or an alias."""
    module, _, attribute = ALIASES.get(name, name).partition(":")
    try:
        tool_class = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(
            f"--tools {name}: expected {', '.join(ALIASES)}, or MODULE:CLASS of your own, got "
            f"{type(error).__name__}: {error}"
        ) from None
    try:
        tool = tool_class(**options)
        next(iter(tool.schema["function"]["parameters"]["properties"]))
        tool.schema["function"]["name"]
    except (TypeError, KeyError, AttributeError, StopIteration) as error:
        raise BadInput(
            f"--tools {name}: expected a tool with a `schema` in transformers' format, made "
            f"with {options}, got {type(error).__name__}: {error}"
        ) from None
    return tool


@dataclass(frozen=True)
class ToolOptions:
    """--tool-options NAME=VALUE: how the model writes a call (a key of FORMATS), and how many
    calls an episode has; one more ends it in finish_reason `tool_limit`."""

    call_format: str = "hermes"
    max_calls: int = 16

    def __post_init__(self):
        if self.call_format not in FORMATS or self.max_calls < 1:
            raise BadInput(
                f"--tool-options: expected call_format {' or '.join(FORMATS)} and max_calls of "
                f"at least 1, got {self.call_format} and {self.max_calls}"
            )


class Toolbox:
    """The tools of a run, and how calls of them are written.

    names: see `tool_options`; form: a key of FORMATS; most_calls: an episode that calls more
    often ends in finish_reason `tool_limit`."""

    def __init__(self, names, form="hermes", most_calls=16):
        options = tool_options(names)
        self.settings = [options, form, most_calls]
        self.form = form
        self.most_calls = most_calls
        self.tools = {}
        self.frames = {}
        for name in options:
            tool = load_tool(name, options[name])
            known_as = tool.schema["function"]["name"]
            if known_as in self.tools:
                raise BadInput(
                    f"--tools {name}: expected tools of different names, got {known_as} twice"
                )
            self.tools[known_as] = tool

    def find(self, text):
        """The first call of a step's text outside of thoughts, or None: then the step was the
        answer."""
        return FORMATS[self.form](visible(text), self.tools)

    def run(self, call, key):
        """The call with its `output` and `ok`, and `outage` where the tool says so; raises
        BadInput if the tool itself breaks."""
        if "problem" in call:
            return call | {"output": f"error: {call['problem']}", "ok": False}
        if call["name"] not in self.tools:
            names = ", ".join(self.tools)
            output = f"error: expected one of the functions {names}"
            return call | {"output": output, "ok": False}
        tool = self.tools[call["name"]]
        for name in tool.schema["function"].get("parameters", {}).get("required", []):
            if name not in call["arguments"]:
                return call | {"output": f"error: expected an argument {name}", "ok": False}
        try:
            output, ok = tool(copy.deepcopy(call["arguments"]), key)
            if type(output) is not str or not (ok is None or type(ok) is bool):
                raise TypeError(
                    f"expected (text, true, false or None), got {output!r:.60}, {ok!r:.60}"
                )
        except Exception as error:  # whatever it is, the model did not do it
            raise BadInput(
                f"tool {call['name']}: broke on {json.dumps(call['arguments'])[:200]} "
                f"({type(error).__name__}: {error}): nothing of this batch was written"
            ) from error
        output = output.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
        if len(output) > MOST_OUTPUT:
            output = output[:MOST_OUTPUT] + " (cut)"
        outage = {"outage": True} if ok is None else {}
        return call | {"output": output, "ok": bool(ok)} | outage

    def answer_call(self, policy, episode, name, max_tokens):
        """Answers the call of an episode's last step.  False when the episode is over: no call,
        no calls left, or no room for the output."""
        if episode.finish_reason != "stop":
            return False
        start, end, _ = episode.steps[-1]
        call = self.find(policy.tokenizer.decode(episode.response_ids[start:end]))
        if not call:
            return False
        if len(episode.calls) == self.most_calls:
            episode.finish_reason = "tool_limit"
            return False
        call = self.run(call, f"{name}|{len(episode.calls)}")
        turn = self.turn(policy, call)
        if len(episode.response_ids) + len(turn) >= max_tokens:
            episode.finish_reason = "length"
            return False
        episode.add_output(call, turn)
        return True

    def prompt(self, tokenizer, prompt, options):
        """The ids of a prompt that tells of the tools: in the chat template's own way or, where
        it has none, in a system message.  In brackets nothing is told: that is for models that
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
        arguments = dict.fromkeys(function["parameters"]["properties"], "...")
        content = TOLD.format(
            schemas="\n".join(map(json.dumps, schemas)),
            example=json.dumps({"name": function["name"], "arguments": arguments}),
        )
        messages = prompt["messages"]
        if messages and messages[0]["role"] == "system":
            content = messages[0]["content"] + "\n\n" + content
            messages = messages[1:]
        messages = [{"role": "system", "content": content}, *messages]
        return render(tokenizer, prompt | {"messages": messages}, options)

    def turn(self, policy, call):
        """The ids between a step and the next: what the chat template writes around a tool's
        output, and the output, in which nothing is taken for one of the tokenizer's marks.  The
        end token of the step is not among them, the model has written it."""
        # a name that the model made up is not written into a template
        name = call["name"] if call.get("name") in self.tools else next(iter(self.tools))
        key = id(policy.tokenizer), name
        if key not in self.frames:
            self.frames[key] = (*frame(policy, name), token_names(policy.tokenizer))
        before, after, names = self.frames[key]
        return before + plain_ids(policy.tokenizer, call["output"], names) + after


def frame(policy, name):
    """(ids before, ids after) that the chat template writes around a tool's output."""
    said = "(what it said)"
    output = '(what "came"\nof it)'  # must come out as it is
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": said},
        {"role": "tool", "name": name, "content": output},
    ]
    tokenizer = policy.tokenizer
    options = {"add_generation_prompt": True} | policy.template_options
    try:
        text = apply(tokenizer, messages, **options)
        before, after = text.split(said)[1].split(output)
    except Exception as error:  # templates raise what they like
        raise BadInput(
            f"{policy.identity['model']}: its chat template has no place for a tool's output "
            f"({type(error).__name__}: {error})"
        ) from None
    before = tokenizer(before, add_special_tokens=False)["input_ids"]
    after = tokenizer(after, add_special_tokens=False)["input_ids"]
    if before and before[0] in policy.stop_ids:
        before = before[1:]
    return before, after
