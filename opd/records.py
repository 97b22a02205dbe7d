"""What a record is: stages exchange JSONL files, one object a line, UTF-8.

Records of different files are joined by their key: (`id`, `sample`), or `id` alone for prompts
and rubrics.  `KINDS` lists the fields of each kind.  Keys that are not listed pass through
untouched.  opd/files.py reads and writes the files.
"""

import base64
import hashlib
import json
import math
import sys

import numpy as np


class BadInput(ValueError):
    """Something a person must change: a file, a flag, a model folder.  Printed without a
    traceback, exit code 2."""


# ---- field types


def _is_int(x):
    return type(x) is int


def _is_number(x):
    # false for NaN and for 10**400
    return type(x) in (int, float) and -sys.float_info.max <= x <= sys.float_info.max


def _is_list_of(test):
    return lambda x: type(x) is list and all(map(test, x))


def _is_message(x):
    return type(x) is dict and type(x.get("role")) is str and type(x.get("content")) is str


def _is_packed(x):
    return (
        type(x) is dict
        and type(x.get("dtype")) is type(x.get("data")) is str
        and _is_list_of(_is_int)(x.get("shape"))
    )


def _is_criterion(x):
    return (
        type(x) is dict
        and all(type(x.get(k)) is str and x[k] for k in ("id", "category", "criterion"))
        and _is_int(x.get("points"))
        and 1 <= x["points"] <= 5
    )


TYPES = {  # name -> (what an error message calls it, test)
    "id": (
        "a non-empty string or an integer",
        lambda x: _is_int(x) or (type(x) is str and x != ""),
    ),
    "int": ("an integer >= 0", lambda x: _is_int(x) and x >= 0),
    "text": ("a string", lambda x: type(x) is str),
    "number": ("a finite number", _is_number),
    "messages": (
        'a non-empty list of {"role", "content"} objects',
        lambda x: bool(x) and _is_list_of(_is_message)(x),
    ),
    "policy": (
        'an object with a string "model"',
        lambda x: type(x) is dict and type(x.get("model")) is str,
    ),
    "finish": (
        '"stop", "length" or "tool_limit"',
        lambda x: x in ("stop", "length", "tool_limit"),
    ),
    "ids": ("a list of integers >= 0", _is_list_of(lambda i: _is_int(i) and i >= 0)),
    "mask": ("a list of 0 and 1", _is_list_of(lambda i: _is_int(i) and i in (0, 1))),
    "logprobs": (
        "a list of finite numbers <= 0",
        _is_list_of(lambda v: _is_number(v) and v <= 1e-4),
    ),
    "weights": (
        "a list of finite numbers >= 0",
        _is_list_of(lambda v: _is_number(v) and v >= 0),
    ),
    "steps": (
        "a list of [start, end, true, false or null]",
        _is_list_of(
            lambda s: (
                type(s) is list
                and len(s) == 3
                and _is_int(s[0])
                and _is_int(s[1])
                and (s[2] is None or type(s[2]) is bool)
            )
        ),
    ),
    "calls": (
        'a list of {..., "output": text, "ok": true or false}',
        _is_list_of(
            lambda c: (
                type(c) is dict and type(c.get("output")) is str and type(c.get("ok")) is bool
            )
        ),
    ),
    "units": (
        "a list of [s0, s1, t0, t1]",
        _is_list_of(
            lambda u: type(u) is list and len(u) == 4 and all(_is_int(i) and i >= 0 for i in u)
        ),
    ),
    "numbers": ("a list of finite numbers", _is_list_of(_is_number)),
    "packed": ("a packed array", _is_packed),
    "topk": (
        'an object with packed "ids" and "logprobs"',
        lambda x: (
            type(x) is dict and _is_packed(x.get("ids")) and _is_packed(x.get("logprobs"))
        ),
    ),
    "criteria": (
        'a non-empty list of {"id", "category", "criterion", "points" (integer 1-5)}',
        lambda x: bool(x) and _is_list_of(_is_criterion)(x),
    ),
    "reward": ("a number in [0, 1] or null", lambda x: x is None or _is_number(x)),
    "status": ('"ok" or "failed"', lambda x: x in ("ok", "failed")),
    "object": ("an object", lambda x: type(x) is dict),
    "any": ("any value", lambda x: True),
}

# kind -> (key fields, required fields, optional fields)
_EPISODE = {"steps": "steps", "calls": "calls", "final": "text"}  # of one with tools
_GENERATED = {
    "prompt_ids": "ids",
    "response_ids": "ids",
    "loss_mask": "mask",
    "logprobs": "logprobs",
    "temperature": "number",
    "top_p": "number",
    **_EPISODE,
    "messages": "messages",
    "answer": "any",
}
KINDS = {
    "prompts": (
        ("id",),
        {"id": "id"},
        {"messages": "messages", "prompt": "text", "answer": "any", "solution": "text"},
    ),
    # a black-box answer: text only, as an API that shows no tokens returns it
    "answers": (
        ("id", "sample"),
        {
            "id": "id",
            "sample": "int",
            "policy": "policy",
            "text": "text",
            "finish_reason": "finish",
        },
        _GENERATED,
    ),
    # a rollout: the token ids are the truth, `text` is for people and judges
    "rollouts": (
        ("id", "sample"),
        {
            "id": "id",
            "sample": "int",
            "policy": "policy",
            "text": "text",
            "finish_reason": "finish",
            "prompt_ids": "ids",
            "response_ids": "ids",
            "loss_mask": "mask",
            "logprobs": "logprobs",
            "temperature": "number",
            "top_p": "number",
        },
        _EPISODE,
    ),
    "scores": (
        ("id", "sample"),
        {
            "id": "id",
            "sample": "int",
            "policy": "policy",
            "rollout": "text",
            "logprobs": "logprobs",
        },
        {
            "topk": "topk",
            "topk_of": "text",
            "context": "text",
            "end_mass": "number",
            "units": "units",
            "unit_logprobs": "logprobs",
            "unit_logits": "numbers",
            "unit_logz": "numbers",
            "unit_topk": "topk",
            "prefixes": "packed",
            "sorted": "packed",
            "bytes": "ids",
        },
    ),
    # how much each response token of a rollout counts
    "weights": (
        ("id", "sample"),
        {"id": "id", "sample": "int", "rollout": "text", "rule": "text", "weights": "weights"},
        {},
    ),
    "rubrics": (("id",), {"id": "id", "criteria": "criteria", "rubricator": "text"}, {}),
    "rewards": (
        ("id", "sample"),
        {
            "id": "id",
            "sample": "int",
            "reward": "reward",
            "status": "status",
            "rollout": "text",
            "grader": "text",
        },
        {"verdicts": "any", "discriminator": "text"},
    ),
    "labels": ((), {"id": "id", "question": "text", "spent_on": "text", "again": "any"}, {}),
    "evals": (
        ("id", "sample"),
        {"id": "id", "sample": "int", "text": "text", "correct": "any"},
        {},
    ),
    "metrics": ((), {"step": "int"}, {}),
    "results": ((), {"arm": "text", "seed": "int", "step": "int", "accuracy": "number"}, {}),
}


def validate(record, kind):  # noqa: C901
    """The first thing wrong with `record` as a sentence `field: expected ..., got ...`, or
    None."""
    if type(record) is not dict:
        return f"expected a JSON object, got {_show(record)}"
    _, required, optional = KINDS[kind]
    for fields, must in ((required, True), (optional, False)):
        for field, type_name in fields.items():
            if field not in record:
                if must:
                    return f"{field}: expected {TYPES[type_name][0]}, but the field is missing"
            elif not TYPES[type_name][1](record[field]):
                return f"{field}: expected {TYPES[type_name][0]}, got {_show(record[field])}"
    if kind == "prompts" and ("messages" in record) == ("prompt" in record):
        return "messages: expected exactly one of `messages` and `prompt`"
    if "response_ids" in record:
        for field in ("prompt_ids", "loss_mask"):
            if field not in record:
                return f"{field}: expected it beside `response_ids`, but the field is missing"
        for field in ("loss_mask", "logprobs"):
            if field in record and len(record[field]) != len(record["response_ids"]):
                return (
                    f"{field}: expected {len(record['response_ids'])} values, one per "
                    f"response token, got {len(record[field])}"
                )
        if "steps" in record:
            edges = [edge for start, end, _ in record["steps"] for edge in (start, end)]
            if (
                not edges
                or edges != sorted(edges)
                or not 0 <= edges[0] <= edges[-1] <= len(record["response_ids"])
            ):
                return (
                    f"steps: expected at least one, one after another within "
                    f"{len(record['response_ids'])} response tokens, got "
                    f"{_show(record['steps'])}"
                )
            outside = (
                record["loss_mask"][: edges[0]]
                + [
                    m
                    for (_, a, _), (b, _, _) in zip(record["steps"], record["steps"][1:])
                    for m in record["loss_mask"][a:b]
                ]
                + record["loss_mask"][edges[-1] :]
            )
            if any(outside):
                return (
                    "loss_mask: expected 0 outside of `steps`, where the model has "
                    "written nothing, got 1"
                )
        if kind == "rollouts" and not record["prompt_ids"]:
            return "prompt_ids: expected at least one token, got an empty list"
    if (
        kind == "rewards"
        and "discriminator" not in record
        and not 0 <= (record["reward"] or 0) <= 1
    ):
        return (
            f"reward: expected a number in [0, 1] or null, got "
            f"{_show(record['reward'])}: only a `discriminator` scores beyond that"
        )
    if kind == "rewards" and (record["reward"] is None) != (record["status"] == "failed"):
        return (
            f'reward: expected null exactly when status is "failed", got '
            f'{record["reward"]} with "{record["status"]}"'
        )
    return None


def _show(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def key_of(record, kind):
    """The record's key as a tuple; ids 7 and "7" are the same prompt."""
    return tuple(str(record[f]) if f == "id" else record[f] for f in KINDS[kind][0])


# ---- small values


def fingerprint(record):
    """12 hex digits that change when a rollout's text or tokens change: what a reward or score
    was made for."""
    return hashlib.sha256(
        json.dumps(
            [record["text"], record.get("prompt_ids"), record.get("response_ids")]
        ).encode()
    ).hexdigest()[:12]


def final_text(rollout):
    """The text that an answer is looked for in: all of it or, of an episode with tools, the
    last step."""
    return rollout.get("final", rollout["text"])


def sampled_length(rollout):
    """How many tokens the model wrote: all of a response but what tools said in it."""
    return (
        sum(end - start for start, end, _ in rollout["steps"])
        if "steps" in rollout
        else len(rollout["response_ids"])
    )


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
    if packed.get("dtype") not in PACKABLE:
        raise BadInput(
            f"packed array: dtype: expected one of {', '.join(PACKABLE)}, got "
            f"{_show(packed.get('dtype'))}"
        )
    shape, dtype = packed["shape"], np.dtype(packed["dtype"]).newbyteorder("<")
    if not _is_list_of(lambda n: _is_int(n) and n >= 0)(shape):
        raise BadInput(
            f"packed array: shape: expected a list of integers >= 0, got {_show(shape)}"
        )
    try:
        data = base64.b64decode(packed["data"], validate=True)
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"packed array: data: expected base64, got {_show(packed['data'])} ({error})"
        ) from None
    if len(data) != dtype.itemsize * math.prod(shape):
        raise BadInput(
            f"packed array: expected {shape} of {packed['dtype']}, got {len(data)} bytes"
        )
    return np.frombuffer(data, dtype=dtype).reshape(shape).copy()
