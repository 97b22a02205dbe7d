"""The contract: every stage reads and writes JSONL records, and this file says what a record
is.

    python records.py check runs/ropd/rollouts.jsonl          # validates a file, names the
    first bad line

One JSON object a line, UTF-8.  Records of different files meet on their key: (`id`, `sample`),
or `id` alone for prompts and rubrics.  `KINDS` below lists the fields; keys not listed there
are welcome and left alone.

Four rules keep data safe, and all of them live here:
1. A reader validates every line and stops with `file:line: field: expected ..., came ...` (exit
   code 2).
2. A writer appends whole lines.  Run a killed stage again and it drops a torn last line and
   fills in what is missing.
3. A resumed file must have been begun with the same settings, from the same inputs: the writer
   keeps both in
   `FILE.run.json` and refuses a mixture.  An input may have grown since, it may not have
   changed.
4. Rewards and scores carry the fingerprint of the rollout they belong to, so that those of
   another round with the
   same ids can never be joined by mistake.

Memory: files are walked, not loaded.  A `Table` keeps about 300 bytes a record (its key and its
place in the file).
"""

import argparse
import base64
import hashlib
import json
import math
import os
import sys
import threading
from pathlib import Path

import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: no lock, two writers of one file are not noticed there
    fcntl = None


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


def validate(record, kind):
    """The first thing wrong with `record` as a sentence `field: expected ..., came ...`, or
    None."""
    if type(record) is not dict:
        return f"expected a JSON object, came {_show(record)}"
    _, required, optional = KINDS[kind]
    for fields, must in ((required, True), (optional, False)):
        for field, type_name in fields.items():
            if field not in record:
                if must:
                    return f"{field}: expected {TYPES[type_name][0]}, but the field is missing"
            elif not TYPES[type_name][1](record[field]):
                return f"{field}: expected {TYPES[type_name][0]}, came {_show(record[field])}"
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
                    f"response token, came {len(record[field])}"
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
                    f"{len(record['response_ids'])} response tokens, came "
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
                    "written nothing, came 1"
                )
        if kind == "rollouts" and not record["prompt_ids"]:
            return "prompt_ids: expected at least one token, came an empty list"
    if (
        kind == "rewards"
        and "discriminator" not in record
        and not 0 <= (record["reward"] or 0) <= 1
    ):
        return (
            f"reward: expected a number in [0, 1] or null, came "
            f"{_show(record['reward'])}: only a `discriminator` scores beyond that"
        )
    if kind == "rewards" and (record["reward"] is None) != (record["status"] == "failed"):
        return (
            f'reward: expected null exactly when status is "failed", came '
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


def answered(rollout):
    """The text that an answer is looked for in: all of it or, of an episode with tools, the
    last step."""
    return rollout.get("final", rollout["text"])


def written(rollout):
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
        raise ValueError(f"pack: expected one of {', '.join(PACKABLE)}, came {array.dtype}")
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
            f"packed array: dtype: expected one of {', '.join(PACKABLE)}, came "
            f"{_show(packed.get('dtype'))}"
        )
    shape, dtype = packed["shape"], np.dtype(packed["dtype"]).newbyteorder("<")
    if not _is_list_of(lambda n: _is_int(n) and n >= 0)(shape):
        raise BadInput(
            f"packed array: shape: expected a list of integers >= 0, came {_show(shape)}"
        )
    try:
        data = base64.b64decode(packed["data"], validate=True)
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"packed array: data: expected base64, came {_show(packed['data'])} ({error})"
        ) from None
    if len(data) != dtype.itemsize * math.prod(shape):
        raise BadInput(
            f"packed array: expected {shape} of {packed['dtype']}, came {len(data)} bytes"
        )
    return np.frombuffer(data, dtype=dtype).reshape(shape).copy()


# ---- reading


def _lines(path, kind):
    """Yields (line number, byte offset, validated record); the shared walk of `read` and
    `Table`."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: expected a JSONL file of {kind}, but there is no such file")
    seen, offset, found = set(), 0, False
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            # not JSON, not UTF-8, too deep, a number of 5000 digits
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    raise BadInput(
                        f"{path}:{number}: the last line is torn (a stage was stopped while "
                        f"writing it): "
                        f"run the stage that writes {path.name} again, it will complete the "
                        f"file"
                    ) from None
                raise BadInput(
                    f"{path}:{number}: expected one JSON object a line, came "
                    f"{_show(line.decode('utf-8', 'replace').rstrip())} "
                    f"({error})"
                ) from None
            problem = validate(record, kind)
            # in a key not listed, where no writer could write it
            if not problem and (b"NaN" in line or b"Infinity" in line):
                odd = []
                json.loads(line, parse_constant=odd.append)
                problem = f"expected JSON, which has no {odd[0]}" if odd else None
            if problem:
                raise BadInput(f"{path}:{number}: {problem}")
            if KINDS[kind][0]:
                key = hash(key_of(record, kind))  # 64 bits each: a set of ints, not of tuples
                if key in seen:
                    shown = ", ".join(f"{f} {record[f]!r}" for f in KINDS[kind][0])
                    raise BadInput(
                        f"{path}:{number}: duplicate key: {shown} stands on an earlier line too"
                    )
                seen.add(key)
            found = True
            yield number, start, record
    if not found:
        raise BadInput(f"{path}: expected at least one record of {kind}, but the file is empty")


def read(path, kind):
    """Yields the validated records of a file, one at a time.  Raises BadInput naming file, line
    and field."""
    for _, _, record in _lines(path, kind):
        yield record


class Table:
    """A validated file with random access by key that leaves the records on disk.

    `len(table)`, `key in table`, `table[key]`, `table.keys()`, iteration; `where(key)` is
    `file:line` for messages."""

    def __init__(self, path, kind):
        self.path, self.kind, self._place = Path(path), kind, {}
        for number, offset, record in _lines(path, kind):
            self._place[key_of(record, kind)] = (number, offset)
        self._file, self._lock = open(self.path, "rb"), threading.Lock()

    def __len__(self):
        return len(self._place)

    def __contains__(self, key):
        return key in self._place

    def __getitem__(self, key):
        with self._lock:  # worker threads share the file's position
            self._file.seek(self._place[key][1])
            line = self._file.readline()
        return json.loads(line)

    def __iter__(self):
        return (self[key] for key in self._place)

    def keys(self):
        return self._place.keys()

    def where(self, key):
        return f"{self.path}:{self._place[key][0]}"


def partner(table, rollout, rollouts):
    """The record of `table` (scores, weights or rewards) that belongs to `rollout`, or BadInput
    when it is missing or was made for another text.  `rollouts` is the Table the rollout came
    from, for the message."""
    key = key_of(rollout, "rollouts")
    if key not in table:
        raise BadInput(
            f"{table.path}: expected a record for id {rollout['id']!r}, sample "
            f"{rollout['sample']} "
            f"({rollouts.where(key)}), but there is none: run the stage that writes it again"
        )
    record = table[key]
    if record["rollout"] != fingerprint(rollout):
        raise BadInput(
            f"{table.where(key)}: rollout: expected {fingerprint(rollout)}, the rollout at "
            f"{rollouts.where(key)}, "
            f"came {record['rollout']}: these {table.kind} were made for other rollouts"
        )
    field = {"scores": "logprobs", "weights": "weights"}.get(table.kind)
    if field and len(record[field]) != len(rollout["response_ids"]):
        raise BadInput(
            f"{table.where(key)}: {field}: expected {len(rollout['response_ids'])} values, "
            f"one per response "
            f"token, came {len(record[field])}"
        )
    shapes = [packed["shape"] for packed in record.get("topk", {}).values()]
    if any(
        len(shape) != 2 or shape != shapes[0] or shape[0] != len(rollout["response_ids"])
        for shape in shapes
    ):
        raise BadInput(
            f"{table.where(key)}: topk: expected {len(rollout['response_ids'])} rows, one "
            f"per response token, of as many ids as "
            f"log-probs, came {' and '.join(map(str, shapes))}"
        )
    return record


# ---- writing


class Writer:
    """Appends records to `path`; `key in writer` tells what an earlier, interrupted run has
    finished.

    settings: whatever determines the records (model, seed, temperature ...); inputs: the files
    they are made from. Both are kept in `path.run.json` and must match when a file is resumed.
    retry: a predicate; finished records for which it holds are dropped and made again (failed
    judgements)."""

    def __init__(self, path, kind, settings, inputs=(), overwrite=False, retry=None):
        self.path, self.kind, self.done = Path(path), kind, set()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"{self.path}: cannot be written: {self.path.parent}: {error.strerror}"
            ) from None
        sidecar = self.path.with_name(self.path.name + ".run.json")
        for source in map(Path, inputs):
            if not source.is_file():
                raise BadInput(
                    f"{source}: expected a file to make {path} from, but there is no such file"
                )
            if self.path.exists() and self.path.samefile(source):
                raise BadInput(
                    f"{path}: is an input of this command, it cannot be the output too: give "
                    f"another --out"
                )
        self._open()
        try:
            if overwrite:
                self._file.truncate(0)
            if self.path.stat().st_size:
                self._check_same_run(sidecar, settings, inputs)
                cut_torn_line(self.path)
                if self.path.stat().st_size:
                    self._load_done(retry)
            state = {"settings": settings, "inputs": {str(p): hash_file(p) for p in inputs}}
            write_atomically(sidecar, json.dumps(state, indent=1, default=str) + "\n")
        except BaseException:
            self._file.close()
            raise

    def _open(self):
        try:
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be written: {error.strerror}") from None
        try:
            if fcntl:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise BadInput(
                f"{self.path}: another process is writing this file: wait for it, or give "
                f"another --out"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _check_same_run(self, sidecar, settings, inputs):
        fresh = f"give another --out, or --overwrite to begin {self.path.name} anew"
        if not sidecar.exists():
            raise BadInput(
                f"{self.path}: expected {sidecar.name} beside it to continue this file, but "
                f"there is none: {fresh}"
            )
        try:
            before = json.loads(sidecar.read_text())
            before["settings"].keys(), before["inputs"].keys()
        except (ValueError, TypeError, KeyError, AttributeError):
            raise BadInput(
                f"{sidecar}: expected the settings {self.path.name} was begun with, but it "
                f"is damaged: {fresh}"
            ) from None
        if difference := first_difference(before["settings"], settings):
            raise BadInput(f"{self.path}: was begun with {difference}: {fresh}")
        if len(before["inputs"]) != len(inputs):
            raise BadInput(
                f"{self.path}: was made from {', '.join(before['inputs']) or 'no file'}: "
                f"{fresh}"
            )
        # by place: a moved file is the same input
        for (name, old), path in zip(before["inputs"].items(), inputs):
            if hash_file(path, old["bytes"]) != old:
                raise BadInput(
                    f"{self.path}: was made from {name}, which has changed since, or {path} "
                    f"is another file: {fresh}"
                )

    def _load_done(self, retry):
        again = 0
        for record in read(self.path, self.kind):
            if retry and retry(record):
                again += 1
            else:
                self.done.add(key_of(record, self.kind))
        if again:
            kept = (r for r in read(self.path, self.kind) if not retry(r))
            write_atomically(self.path, (_dump(r).decode() for r in kept))
            self._file.close()
            self._open()  # the file has been replaced by a new one

    def __contains__(self, key):
        return key in self.done

    def write(self, *records):
        """Appends the records in one piece.  When the disk is full the file is cut back to
        whole lines."""
        lines = b""
        for record in records:
            problem = validate(record, self.kind)
            if problem:
                raise ValueError(f"{self.path}: refusing to write a bad record: {problem}")
            lines += _dump(record)
        keys = [key_of(r, self.kind) for r in records] if KINDS[self.kind][0] else []
        if len({*keys} - self.done) < len(keys):
            raise ValueError(f"{self.path}: refusing to write a key twice: {keys}")
        append_whole(self._file, lines)
        self.done.update(keys)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def append_whole(file, lines):
    """Appends bytes to an unbuffered file in one piece; on a full disk the file is cut back to
    what it was."""
    before, written = os.fstat(file.fileno()).st_size, 0
    try:
        while written < len(lines):
            written += file.write(lines[written:])
    except OSError as error:
        os.ftruncate(file.fileno(), before)
        raise BadInput(
            f"{file.name}: could not append ({error.strerror}); every record written before "
            f"is whole: "
            "make room and run the same command again"
        ) from None


def cut_torn_line(path):
    """A kill can leave half a line at the end of a JSONL file: cut it off (its record is made
    again)."""
    with open(path, "r+b") as f:
        end = f.seek(0, os.SEEK_END)
        if not end:
            return
        f.seek(end - 1)
        if f.read(1) == b"\n":
            return
        start = end  # walk back to the byte after the last newline
        while start > 0:
            step = min(65536, start)
            f.seek(start - step)
            at = f.read(step).rfind(b"\n")
            if at >= 0:
                start = start - step + at + 1
                break
            start -= step
        f.truncate(start)


def _dump(record):
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode() + b"\n"
    # half a surrogate pair, which UTF-8 cannot hold and JSON's escapes can
    except UnicodeEncodeError:
        return json.dumps(record, allow_nan=False).encode() + b"\n"


def first_difference(before, now):
    """The first setting that two JSON objects do not share, in words, or None.

    first_difference({"lr": 1, "flags": {"n": 2}}, {"lr": 1, "flags": {"n": 4}}) -> "n = 2, now
    it is 4"."""
    before, now = (json.loads(json.dumps(x, default=str)) or {} for x in (before, now))
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            if found := first_difference(old, new):
                return found
        elif old != new:
            return f"{name} = {_show(old)}, now it is {_show(new)}"
    return None


def hash_file(path, limit=None):
    """{"bytes", "sha256"} of the first `limit` bytes of a file (of all of it by default)."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: expected a file, but there is no such file")
    digest, left = hashlib.sha256(), Path(path).stat().st_size if limit is None else limit
    total = 0
    with open(path, "rb") as f:
        while left and (block := f.read(min(left, 1 << 20))):
            digest.update(block)
            total, left = total + len(block), left - len(block)
    return {"bytes": total, "sha256": digest.hexdigest()}


def write_atomically(path, text):
    """Writes a small file (a string, or an iterable of strings) so that a reader sees the old
    one or the new one."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.writelines([text] if isinstance(text, str) else text)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(
            f"{path}: could not write ({error.strerror}): make room and run the same command "
            f"again"
        ) from None
    os.replace(temporary, path)


# ---- command lines


def parser(doc):
    """An ArgumentParser whose --help opens with the stage's docstring and shows every
    default."""

    class Formatter(argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            if action.default in (None, False, argparse.SUPPRESS) or "%(default)" in (
                action.help or ""
            ):
                return action.help
            return (action.help or "") + " (default: %(default)s)"

    # add_parser makes subcommands of the same class, so the rules hold for them too
    class Parser(argparse.ArgumentParser):
        def __init__(self, **options):
            super().__init__(**{"formatter_class": Formatter, "allow_abbrev": False} | options)

    return Parser(description=doc)


def run(main):
    """Runs a stage's `main()` as a program: BadInput becomes one line on stderr and exit code
    2."""
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def dispatch(doc, commands, argv):
    """Runs commands[argv[0]](argv[1:]): the main of a stage that has subcommands, each with a
    parser of its own."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in commands:
        p = parser(doc)
        p.add_argument(
            "command", choices=list(commands), help="COMMAND --help lists the flags of one"
        )
        p.parse_args(argv[:1])
    return commands[argv[0]](argv[1:])


def progress(iterable=None, **options):
    """A progress bar on a terminal, nothing in a log file; the stage's last line says how it
    ended."""
    return tqdm(iterable, disable=not sys.stderr.isatty(), leave=False, **options)


def guess_kind(path):
    """The kind of a file from its first record's fields."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: expected a JSONL file, but there is no such file")
    with open(path, "rb") as f:
        first = next((line for line in f if line.strip()), b"")
    try:
        fields = set(json.loads(first))
    except (ValueError, TypeError, RecursionError):
        return "prompts"
    for kind, mark in (
        ("rollouts", "loss_mask"),
        ("rubrics", "criteria"),
        ("rewards", "reward"),
        ("evals", "correct"),
        ("results", "arm"),
        ("weights", "weights"),
        ("labels", "spent_on"),
        ("answers", "text"),
        ("scores", "logprobs"),
        ("metrics", "step"),
    ):
        if mark in fields:
            return kind
    return "prompts"


def main(argv=None):
    args = parser(__doc__)
    commands = args.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="validate JSONL files")
    check.add_argument("files", nargs="+", metavar="FILE")
    check.add_argument(
        "--kind",
        choices=KINDS,
        help="what the files hold; guessed from the first record by default",
    )
    args = args.parse_args(argv)
    counts = {}
    for path in args.files:
        kind = args.kind or guess_kind(path)
        counts[path] = sum(1 for _ in read(path, kind))
        print(f"{path}: {counts[path]} {kind}, all valid")
    return counts


if __name__ == "__main__":
    run(main)
