"""What a record is: stages exchange JSONL files, one object a line, UTF-8.

Records of different files are joined by their key: (`id`, `sample`), or `id` alone for prompts
and rubrics.  `KINDS` lists the fields of each kind.  Keys that are not listed pass through
untouched; a method that adds fields of its own names them with `declare`.  opd/files.py reads
and writes the files.
"""

import base64
import hashlib
import json
import math
import re
import sys
from typing import Callable, NamedTuple

import numpy as np


class BadInput(ValueError):
    """Something a person must change: a file, a flag, a model folder.  Printed without a
    traceback, exit code 2."""


# ---- field types

HASHES = ("weights", "template", "vocabulary", "renders")


class Type(NamedTuple):
    expected: str  # what an error message calls it
    test: Callable


# a larger integer is no longer exact where it meets a float
LARGEST_INT = 2**53
LARGEST_ID = 2**31 - 1
# numbers that are trained on become float32, and their squares must do so as well
LARGEST = 1e6
# of a log-prob; below it lie stand-ins for "not known"
LOWEST = -1e5
ROUNDING = 1e-4  # a float32 log-prob of a certain token can lie a rounding above 0
MASS_ROUNDING = 0.01  # of the sum of a whole vocabulary's float16 probabilities


def is_int(x):
    return type(x) is int


def is_count(x):
    return type(x) is int and 0 <= x < LARGEST_INT


def is_bool(x):
    return type(x) is bool


def is_text(x):
    return type(x) is str


def is_name(x):
    return type(x) is str and x != ""


def is_length(x):
    """A number of tokens, longer than any text."""
    return is_int(x) and 0 <= x <= 10**7


def is_number(x):
    """A finite number: false for NaN and for 10**400."""
    return type(x) in (int, float) and -sys.float_info.max <= x <= sys.float_info.max


def number_in(low, high):
    return lambda x: type(x) in (int, float) and low <= x <= high


is_logprob = number_in(LOWEST, ROUNDING)


def numbers_in(low, high, *types):
    """A test for a list of numbers of these types in [low, high].  It walks long lists without
    a Python call an element."""
    types = frozenset(types or (int, float))

    def test(x):
        if type(x) is not list or not types.issuperset(map(type, x)):
            return False
        # comparisons pass over a NaN, a sum does not
        return not x or low <= min(x) and max(x) <= high and not math.isnan(sum(x))

    return test


def list_of(test):
    return lambda x: type(x) is list and all(map(test, x))


def has(**tests):
    """A test for an object with these fields:  has(role=is_text)({"role": "user"}) -> True"""
    return lambda x: type(x) is dict and all(test(x.get(k)) for k, test in tests.items())


def is_step(x):
    """[start, end, whether its call had a result]."""
    if type(x) is not list or len(x) != 3:
        return False
    start, end, ok = x
    return is_int(start) and is_int(end) and (ok is None or is_bool(ok))


def is_policy(x):
    if type(x) is not dict or type(x.get("model")) is not str:
        return False
    return all(type(x.get(name, "")) in (str, type(None)) for name in HASHES)


def or_none(test):
    return lambda x: x is None or test(x)


def is_packed(x):
    """Whether `unpack` takes it."""
    try:
        unpack(x)
    except BadInput:
        return False
    return True


is_message = has(role=is_text, content=is_text)
is_criterion = has(
    id=is_name,
    category=is_name,
    criterion=is_name,
    points=lambda x: is_int(x) and 1 <= x <= 5,
    check=lambda x: x is None or type(x) is list and x != [] and is_name(x[0]),
)

ANY = Type("any value", lambda x: True)
ID = Type("a non-empty string or an integer", lambda x: is_int(x) or is_name(x))
COUNT = Type("an integer >= 0", is_count)
TEXT = Type("a string", is_text)
BOOL = Type("true or false", is_bool)
NUMBER = Type("a finite number", is_number)
SHARE = Type("a number in [0, 1]", number_in(0, 1 + ROUNDING))
TEMPERATURE = Type(
    "0 or a number in [0.001, 1000]",
    lambda x: number_in(0.001, 1000)(x) or is_number(x) and x == 0,
)
NUMBERS = Type(f"a list of numbers up to {LARGEST:g}", numbers_in(-LARGEST, LARGEST))
IDS = Type("a list of integers >= 0 (of 31 bits)", numbers_in(0, LARGEST_ID, int))
MASK = Type("a list of 0 and 1", numbers_in(0, 1, int))
LOGPROBS = Type(f"a list of numbers in [{LOWEST:g}, 0]", numbers_in(LOWEST, ROUNDING))
WEIGHTS = Type(f"a list of numbers in [0, {LARGEST:g}]", numbers_in(0, LARGEST))
PACKED = Type('a packed array of "dtype", "shape" and as many bytes of "data"', is_packed)
TOPK = Type(
    'an object with packed "ids" and "logprobs"', has(ids=is_packed, logprobs=is_packed)
)
POLICY = Type(
    f'an object with a string "model", and strings for {", ".join(HASHES)}', is_policy
)
MESSAGES = Type(
    'a non-empty list of {"role", "content": a string} objects',
    lambda x: bool(x) and list_of(is_message)(x),
)
FINISH = Type(
    '"stop", "length" or "tool_limit"', lambda x: x in ("stop", "length", "tool_limit")
)
STEPS = Type("a list of [start, end, true, false or null]", list_of(is_step))
CALLS = Type(
    'a list of {..., "output": text, "ok": true or false}',
    list_of(has(output=is_text, ok=is_bool)),
)
BOOLS = Type("a list of true or false", list_of(is_bool))
REPEATS = Type(
    "a non-empty list of lists of true or false",
    lambda x: bool(x) and list_of(list_of(is_bool))(x),
)
LENGTH = Type("an integer in [0, 10^7] or null", or_none(is_length))
DRAWN_FROM = Type(
    'an object with lists of fingerprints, "answers" and "rollouts"',
    has(answers=list_of(is_text), rollouts=list_of(is_text)),
)
CRITERIA = Type(
    'a non-empty list of {"id", "category", "criterion", "points" (integer 1-5)} and, where '
    'there is one, "check" (a predicate\'s name and arguments)',
    lambda x: bool(x) and list_of(is_criterion)(x),
)
REWARD = Type(f"a number up to {LARGEST:g} or null", or_none(number_in(-LARGEST, LARGEST)))
STATUS = Type('"ok" or "failed"', lambda x: x in ("ok", "failed"))


# ---- kinds of records


class Kind(NamedTuple):
    key: tuple  # fields that name a record; () for a log
    mark: str  # a field by which `files.guess_kind` knows the kind, the first that fits
    required: dict
    optional: dict


SAMPLE = {"id": ID, "sample": COUNT}
ANSWER = SAMPLE | {"policy": POLICY, "text": TEXT, "finish_reason": FINISH}
# the token ids are the truth; `text` is for people and judges
TOKENS = {
    "prompt_ids": IDS,
    "response_ids": IDS,
    "loss_mask": MASK,
    "logprobs": LOGPROBS,
    "temperature": TEMPERATURE,
    "top_p": SHARE,
}
EPISODE = {"steps": STEPS, "calls": CALLS, "final": TEXT, "end_mass": SHARE}
SCORE = SAMPLE | {"policy": POLICY, "rollout": TEXT, "logprobs": LOGPROBS}
SCORE_MORE = {"topk": TOPK, "topk_of": TEXT, "context": TEXT, "end_mass": SHARE}
RUBRIC = {"id": ID, "criteria": CRITERIA, "rubricator": TEXT}
GRADE = SAMPLE | {"reward": REWARD, "status": STATUS, "rollout": TEXT, "grader": TEXT}
WEIGHT = SAMPLE | {"rollout": TEXT, "rule": TEXT, "weights": WEIGHTS}
GRADE_MORE = {"verdicts": ANY, "discriminator": TEXT, "reason": TEXT, "repeats": REPEATS}
EVAL = SAMPLE | {
    "text": TEXT,
    "correct": BOOL,
    "length": LENGTH,
    "truncated": BOOL,
    "repetition": NUMBER,
}
EVAL_MORE = {"final": TEXT, "calls": BOOLS, "tool_limit": BOOL}
LABEL = {"id": ID, "question": TEXT, "spent_on": TEXT, "again": ANY}
RESULT = {"arm": TEXT, "seed": COUNT, "step": COUNT, "accuracy": SHARE}
QUESTION = {
    "messages": MESSAGES,
    "prompt": TEXT,
    "answer": ANY,
    "solution": TEXT,
    "continue_final_message": BOOL,
}

KINDS = {
    "rollouts": Kind(("id", "sample"), "loss_mask", ANSWER | TOKENS, EPISODE),
    "rubrics": Kind(("id",), "criteria", RUBRIC, {"drawn_from": DRAWN_FROM}),
    "rewards": Kind(("id", "sample"), "reward", GRADE, GRADE_MORE),
    "evals": Kind(("id", "sample"), "correct", EVAL, EVAL_MORE),
    "results": Kind((), "arm", RESULT, {}),
    "labels": Kind((), "spent_on", LABEL, {}),
    "weights": Kind(("id", "sample"), "weights", WEIGHT, {}),
    # of a black box: an API may show no tokens
    "answers": Kind(("id", "sample"), "text", ANSWER, TOKENS | EPISODE | QUESTION),
    "scores": Kind(("id", "sample"), "logprobs", SCORE, SCORE_MORE),
    "metrics": Kind((), "step", {"step": COUNT}, {}),
    "prompts": Kind(("id",), "messages", {"id": ID}, QUESTION),
}


# ---- foreign spellings

ROLES = ("system", "developer", "user", "assistant", "tool")
# what other formats call them
OUR_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
OUR_FIELDS = {
    "id": ("uid", "_id", "qid", "idx", "index", "prompt_id"),
    "prompt": ("question", "problem", "query", "instruction", "input", "text"),
    "messages": ("conversations", "conversation", "dialog"),
}
# what a file is that does not begin with an object, and what to do
FORMATS = {
    rb"\x1f\x8b": "a gzip file: gunzip it",
    rb"PK\x03|PAR1": "a zip or parquet file: write it as JSON lines",
    rb"\xff\xfe|\xfe\xff": "UTF-16 or UTF-32 text: save it as UTF-8",
    rb"\[": "a JSON array: write one object a line (jq -c '.[]' FILE)",
    rb"\{\s*\n": "an object over several lines: write each on one line (jq -c . FILE)",
    rb'[\w" ]+([,\t][\w" ]+)+\r?\n': "a table: write its rows as JSON objects, one a line",
}


def foreign_format(line):
    """What a file is by a line that is no JSON; None for one that is merely damaged."""
    return next((what for start, what in FORMATS.items() if re.match(start, line)), None)


def renaming(record, *fields):
    """Advice where one of our fields has another name:  ": rename `question` to `prompt`"."""
    for field in fields:
        for name in OUR_FIELDS.get(field, ()):
            if name in record:
                return f": rename `{name}` to `{field}`"
    return ""


def advice_on(field, value):
    """What to do with a value that other formats have in a field of ours."""
    if value is None:
        return ": leave the field out"
    if field == "prompt" and type(value) is list:
        return ": a list of messages is called `messages`"
    return ""


def kind_of(record):
    """The kind of a record by its fields.  A prompt may carry any others, but no sample."""
    if "sample" not in record and ("messages" in record or "prompt" in record):
        return "prompts"
    return next((kind for kind, k in KINDS.items() if k.mark in record), "prompts")


def declare(kind, *rules, **fields):
    """Optional fields that a method adds to a kind: they are checked wherever they stand.
    rules: functions of a record whose fields are right one by one that return what is wrong
    between them, or None."""
    KINDS[kind].optional.update(fields)
    RULES[kind] += rules


def validate(record, kind):
    """The first thing wrong with `record` as a sentence `field: expected ..., got ...`, or
    None."""
    if type(record) is not dict:
        return f"expected a JSON object, got {show(record)}"
    required = KINDS[kind].required
    fields = required | KINDS[kind].optional
    if "messages" in fields and (problem := _validate_messages(record.get("messages"))):
        return problem
    for field, type_ in fields.items():
        if field not in record:
            if field in required:
                advice = renaming(record, field)
                return f"{field}: expected {type_.expected}, but the field is missing{advice}"
        elif not type_.test(record[field]):
            got = show(record[field]) + advice_on(field, record[field])
            return f"{field}: expected {type_.expected}, got {got}"
    if kind == "prompts" and ("messages" in record) == ("prompt" in record):
        got = "both" if "prompt" in record else "none" + renaming(record, "messages", "prompt")
        return f"messages: expected exactly one of `messages` and `prompt`, got {got}"
    if "messages" in fields and "messages" in record:
        begun = record["messages"][-1]["role"] == "assistant"
        if begun != record.get("continue_final_message", False):
            return (
                "messages: expected the assistant's as the last one exactly if the model is to "
                'go on with it and the record says "continue_final_message": true; a golden '
                "answer is called `solution`"
            )
    if "prompt_ids" in fields and record.get("prompt_ids") == []:
        return "prompt_ids: expected at least one token, got an empty list"
    return next(filter(None, (rule(record) for rule in RULES[kind])), None)


def _validate_messages(messages):
    """What is wrong with messages that are spelled as other formats do, or None."""
    if not list_of(has())(messages):
        return None  # told by their type
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role")
        if "from" in message and role is None:
            return (
                f"{where}.role: expected {', '.join(ROLES)}, but the field is missing: rename "
                f"`from` to `role` (human is user, gpt is assistant) and `value` to `content`"
            )
        if is_text(role) and role not in ROLES:
            advice = f': write "{OUR_ROLES[role]}"' if role in OUR_ROLES else ""
            return f"{where}.role: expected {', '.join(ROLES)}, got {show(role)}{advice}"
    return None


def _validate_reward(record):
    """Null is a failure, and only a discriminator scores beyond [0, 1]."""
    reward = record["reward"]
    if (reward is None) != (record["status"] == "failed"):
        return (
            f'reward: expected null exactly when status is "failed", got {reward} with '
            f'"{record["status"]}"'
        )
    if reward is not None and not 0 <= reward <= 1 and "discriminator" not in record:
        return (
            f"reward: expected a number in [0, 1] or null, got {reward}: only a "
            f"`discriminator` scores beyond that"
        )
    return None


def _validate_tokens(record):
    """What must hold between the fields of a response with token ids."""
    if "response_ids" not in record:
        return None
    for field in ("prompt_ids", "loss_mask"):
        if field not in record:
            return f"{field}: expected it beside `response_ids`, but the field is missing"
    length = len(record["response_ids"])
    for field in ("loss_mask", "logprobs"):
        if field in record and len(record[field]) != length:
            return (
                f"{field}: expected {length} values, one per response token, got "
                f"{len(record[field])}"
            )
    if "steps" not in record:
        return None
    edges = [edge for start, end, _ in record["steps"] for edge in (start, end)]
    if not edges or edges != sorted(edges) or edges[0] < 0 or edges[-1] > length:
        return (
            f"steps: expected at least one, one after another within {length} response "
            f"tokens, got {show(record['steps'])}"
        )
    outside = list(record["loss_mask"])
    for start, end, _ in record["steps"]:
        outside[start:end] = [0] * (end - start)
    if any(outside):
        return (
            "loss_mask: expected 0 outside of `steps`, where the model has written nothing, "
            "got 1"
        )
    return None


def _validate_topk(record):
    if "topk" not in record:
        return None
    return problem_of_topk("topk", record["topk"], len(record["logprobs"]))


def problem_of_topk(name, topk, rows):
    """What is wrong with the field `name`, log-probs of a few tokens at `rows` places, or
    None.  -inf is the log-prob of what cannot be."""
    ids = unpack(topk["ids"])
    logprobs = unpack(topk["logprobs"])
    if ids.ndim != 2 or ids.shape != logprobs.shape or len(ids) != rows:
        got = " and ".join(str(list(a.shape)) for a in (ids, logprobs))
        return (
            f"{name}: expected {rows} rows, one per response token or unit, of as many ids as "
            f"log-probs, got {got}"
        )
    if ids.dtype.kind not in "iu" or ids.min(initial=0) < 0 or ids.max(initial=0) > LARGEST_ID:
        return f"{name}: expected ids as integers >= 0, got {ids.dtype} {ids[:1].tolist()}"
    ordered = np.sort(ids, 1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return f"{name}: expected every id of a row once, got one twice"
    return problem_of_logprobs(name, logprobs)


def problem_of_logprobs(name, logprobs):
    """What is wrong with the field `name`, rows [T, K] of log-probs of different tokens."""
    if logprobs.dtype.kind != "f":
        return f"{name}: expected log-probs as floats, got {logprobs.dtype}"
    known = logprobs[logprobs != -np.inf]
    low = float(known.min(initial=0))
    high = float(known.max(initial=0))
    if not LOWEST <= low <= high <= ROUNDING:  # false for a NaN too
        return f"{name}: expected log-probs in [{LOWEST:g}, 0], or -inf, got {low} to {high}"
    mass = np.exp(logprobs, dtype=np.float64).sum(-1).max(initial=0)
    if mass > 1 + MASS_ROUNDING:
        return f"{name}: expected rows that add up to 1 at most, got {mass:.4f}"
    return None


# between the fields of a record; a method adds its own with `declare`
RULES = {kind: [] for kind in KINDS}
RULES["rollouts"] += [_validate_tokens]
RULES["answers"] += [_validate_tokens]
RULES["rewards"] += [_validate_reward]
RULES["scores"] += [_validate_topk]


def show(value):
    """A value as short JSON, for messages."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def key_of(record, kind):
    """The record's key as a tuple; ids 7 and "7" are the same prompt.  Its records share one
    string."""
    fields = KINDS[kind].key
    return tuple(sys.intern(str(record[f])) if f == "id" else record[f] for f in fields)


# ---- small values


def fingerprint(record):
    """12 hex digits that change when a rollout's text or tokens change: what a reward or score
    was made for."""
    made = [record["text"], record.get("prompt_ids"), record.get("response_ids")]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:12]


# around a thought, (opening, closing), as model families write them
THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
    ("<unused94>thought", "<unused95>"),
)


def visible(text):
    """The part of a text that is an answer: what follows the last thought, and nothing of a
    thought that has no end.

    "<think>7+5</think> #12" -> "#12"    "<think>7+5" -> ""    "7+5 #12 " -> unchanged"""
    for opening, closing in THOUGHTS:
        if opening in text or closing in text:
            text = text.rpartition(closing)[2].partition(opening)[0].strip()
    return text


def final_text(answer):
    """The text that holds the answer: without thoughts and, of an episode with tools, of the
    last step.  rollout.py records it where it differs from `text`; a record from elsewhere
    shows its thoughts by their marks."""
    return answer["final"] if "final" in answer else visible(answer["text"])


def searched_for_loops(answer):
    """The text in which repetition counts: thoughts too, but no outputs of tools."""
    return answer.get("final", answer["text"]) if "calls" in answer else answer["text"]


def sampled_length(rollout):
    """How many tokens the model wrote: the whole response without the tools' outputs."""
    if "steps" not in rollout:
        return len(rollout["response_ids"])
    return sum(end - start for start, end, _ in rollout["steps"])


def weights_record(rollout, rule, weights):
    """A record of kind "weights": a number for each response token of a rollout."""
    return {
        "id": rollout["id"],
        "sample": rollout["sample"],
        "rollout": fingerprint(rollout),
        "rule": rule,
        "weights": [float(f"{x:.9g}") for x in weights],
    }


def floats(values):
    """Float32 values as JSON numbers, with the 9 digits that give exactly the same float32
    back."""
    return [float(f"{v:.9g}") for v in np.asarray(values, dtype=np.float32).tolist()]


# no type that could hold an object
PACKABLE = ("float16", "float32", "float64", "int32", "int64", "uint16", "uint8")


def pack(array):
    """A 2-D array as JSON: {"dtype", "shape", "data" (base64 of the row-major little-endian
    bytes)}."""
    array = np.ascontiguousarray(array)
    if array.dtype.name not in PACKABLE:
        raise ValueError(f"pack: expected one of {', '.join(PACKABLE)}, got {array.dtype}")
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "data": base64.b64encode(array.tobytes()).decode(),
    }


def unpack(packed):
    """The array that `pack` packed (a writable copy)."""
    if type(packed) is not dict or packed.get("dtype") not in PACKABLE:
        raise BadInput(
            f"packed array: dtype: expected one of {', '.join(PACKABLE)}, got {show(packed)}"
        )
    shape = packed.get("shape")
    dtype = np.dtype(packed["dtype"]).newbyteorder("<")
    if not IDS.test(shape) or len(shape) > 2:
        raise BadInput(
            f"packed array: shape: expected one or two integers >= 0, got {show(shape)}"
        )
    try:
        data = base64.b64decode(packed.get("data"), validate=True)
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"packed array: data: expected base64, got {show(packed.get('data'))} ({error})"
        ) from None
    if len(data) != dtype.itemsize * math.prod(shape):
        raise BadInput(
            f"packed array: expected {shape} of {packed['dtype']}, got {len(data)} bytes"
        )
    return np.frombuffer(data, dtype=dtype).reshape(shape).copy()
