"""Reads, joins, appends and resumes JSONL files.

    python -m opd.files check runs/ropd/rollouts.jsonl    # validates, names the first bad line

Four rules keep data safe:
1. A reader validates every line and stops with `file:line: field: expected ..., got ...`, exit
   code 2.
2. A writer appends whole lines, and puts them on the disk every few seconds and in the end.  A
   killed stage, run again, drops a torn last line and makes only the records that are missing.
3. A resumed file must have been begun with the same settings, from the same inputs: the writer
   keeps both in `FILE.run.json` and refuses a mixture.  An input may have grown since; it may
   not have changed.  How many records are wanted stands there too, and which of them failed: a
   reader refuses a file that a killed stage has left short.
4. Rewards, scores and weights carry the fingerprint of the rollout they belong to, so that
   those of another round with the same ids can never be joined by mistake.

Files are walked, not loaded.  A `Table` keeps the place of every record, 40 bytes, and the ids
of prompts: about 145 bytes a record where each has a prompt of its own.
"""

import hashlib
import json
import os
import re
import threading
import time
from array import array
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opd import cli, disk
from opd.records import (
    KINDS,
    BadInput,
    fingerprint,
    foreign_format,
    key_of,
    kind_of,
    show,
    validate,
)
from opd.redact import printable

# ---- reading


def _object(pairs):
    """A JSON object; ValueError where a name stands twice, of which one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {show(twice)} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
# an escape of half a character beyond U+FFFF
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def _is_text(value):
    """Whether UTF-8 can hold a JSON value."""
    try:
        return bool(json.dumps(value, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def _parse(line, place):
    """One line as a JSON value, or BadInput."""
    try:
        record = _DECODER.decode(line.decode("utf-8-sig"))
        if _HALF_PAIR.search(line) and not _is_text(record):
            raise ValueError("half a surrogate pair is no text")
        return record
    # not JSON, not UTF-8, too deep, a number of 5000 digits
    except (ValueError, RecursionError) as error:
        foreign = foreign_format(line)
        if not (foreign or line.endswith(b"\n")):
            raise BadInput(
                f"{place}: the last line is torn (a stage was stopped while writing it): run "
                f"the stage that writes the file again, it will complete the file"
            ) from None
        text = line.decode("utf-8", "replace").rstrip()
        got = foreign or f"{show(text)} ({error})"
        raise BadInput(f"{place}: expected one JSON object a line, got {got}") from None


def _problem(line, record, kind):
    """What is wrong with a record, or None."""
    problem = validate(record, kind)
    if problem or not (b"NaN" in line or b"Infinity" in line):
        return problem
    constants = []  # in a key not listed, where no writer could write it
    json.loads(line, parse_constant=constants.append)
    return f"expected JSON, which has no {constants[0]}" if constants else None


def _asked(record):
    """64 bits that tell what a record answers from other prompts, or None where it does not
    say."""
    if "prompt_ids" in record:
        return hash(tuple(record["prompt_ids"]))
    asked = record.get("messages") or record.get("prompt")
    return hash(str(asked)) if asked else None


class KeySet:
    """A set of keys that can only grow.  A number holds 64 samples of a prompt, a bit each:
    about 20 bytes a key where a prompt has 8."""

    def __init__(self):
        self.bits = {}
        self.count = 0

    @staticmethod
    def _place(key):
        name, sample = key if len(key) > 1 else (*key, 0)
        return hash((name, sample >> 6)), 1 << (sample & 63)

    def __len__(self):
        return self.count

    def __contains__(self, key):
        block, bit = self._place(key)
        return bool(self.bits.get(block, 0) & bit)

    def add(self, key):
        block, bit = self._place(key)
        before = self.bits.get(block, 0)
        self.count += not before & bit
        self.bits[block] = before | bit


def _lines(path, kind, unfinished=False):
    """Yields (line number, byte offset, validated record); the shared walk of `read` and
    `Table`.  unfinished: a file that lacks records is read all the same."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: expected a JSONL file of {kind}, but there is no such file")
    seen = KeySet()
    asked = {}  # prompt id: what was asked under it
    end = 0
    found = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            start = end
            end += len(line)
            if not line.strip():
                continue
            place = f"{path}:{number}"
            record = _parse(line, place)
            problem = _problem(line, record, kind)
            if problem:
                raise BadInput(f"{place}: {problem}")
            if KINDS[kind].key:
                key = key_of(record, kind)
                if key in seen:
                    shown = ", ".join(f"{name} {record[name]!r}" for name in KINDS[kind].key)
                    raise BadInput(
                        f"{place}: duplicate key: {shown} stands on an earlier line too"
                    )
                seen.add(key)
            if "sample" in record and (question := _asked(record)):
                if asked.setdefault(hash(str(record["id"])), question) != question:
                    field = "prompt_ids" if "prompt_ids" in record else "messages"
                    raise BadInput(
                        f"{place}: {field}: expected one prompt for the id {record['id']!r}, "
                        f"got another than on an earlier line"
                    )
            found += 1
            yield number, start, record
    if not found:
        raise BadInput(f"{path}: expected at least one record of {kind}, but the file is empty")
    if not unfinished:
        check_finished(path, kind, found)


def read(path, kind, unfinished=False):
    """Yields the validated records of a file, one at a time.  Raises BadInput naming file, line
    and field, and in the end, unless `unfinished`, if a killed stage has left the file
    short."""
    for _, _, record in _lines(path, kind, unfinished):
        yield record


def sidecar_of(path):
    """Where the writer of a file keeps what it was made with."""
    return Path(path).with_name(Path(path).name + ".run.json")


def wanted_and_failed(path):
    """(how many records a file shall hold, the keys of those that a stage could not make), as
    its sidecar says; (0, none) of a file from elsewhere, or of an earlier version."""
    try:
        state = json.loads(sidecar_of(path).read_text())
        return int(state["wanted"]), {tuple(key) for key in state["failed"]}
    except (OSError, ValueError, KeyError, TypeError):
        return 0, set()


def check_finished(path, kind, found):
    """Refuses a file with fewer records than its writer was asked for, those left out that
    failed by name."""
    wanted, failed = wanted_and_failed(path)
    if found + len(failed) < wanted:
        raise BadInput(
            f"{path}: unfinished: expected {wanted} records of {kind} "
            f"({sidecar_of(path).name}), got {found}: run the stage that writes it again, or "
            f"copy the file to another place to use what is there"
        )


class Table:
    """A validated file with random access by key that leaves the records on disk.

    `len(table)`, `key in table`, `table[key]`, `table.keys()`, iteration; `where(key)` is
    `file:line` for messages."""

    def __init__(self, path, kind):
        self.path = Path(path)
        self.kind = kind
        names = {}  # of prompts: their place among them
        hashes = array("q")
        self._name = array("I")  # of every record
        self._sample = array("q")
        self._line = array("I")
        self._offset = array("q")
        for number, offset, record in _lines(path, kind):
            key = key_of(record, kind)
            hashes.append(hash(key))
            self._name.append(names.setdefault(key[0], len(names)))
            self._sample.append(key[-1] if len(key) > 1 else 0)
            self._line.append(number)
            self._offset.append(offset)
        self._names = list(names)
        order = np.argsort(hashes, kind="stable")
        self._hashes = array("q", np.asarray(hashes)[order].tobytes())
        self._order = array("q", order.tobytes())
        self._file = open(self.path, "rb")
        self._lock = threading.Lock()

    def __len__(self):
        return len(self._line)

    def _find(self, key):
        place = bisect_left(self._hashes, hash(key))
        found = place < len(self) and self._hashes[place] == hash(key)
        return self._order[place] if found else None

    def __contains__(self, key):
        return self._find(key) is not None

    def row(self, key):
        """The place of a record among all, from 0; for arrays that stand beside the table."""
        row = self._find(key)
        if row is None:
            raise BadInput(
                f"{self.path}: expected a record of{named([key])}, but there is none"
            )
        return row

    def __getitem__(self, key):
        return self._read(self.row(key))

    def _read(self, row):
        with self._lock:  # worker threads share the file's position
            self._file.seek(self._offset[row])
            line = self._file.readline()
        return json.loads(line)

    def __iter__(self):
        return map(self._read, range(len(self)))

    def keys(self):
        """In the order of the file."""
        return map(self.key, range(len(self)))

    def key(self, row):
        name = self._names[self._name[row]]
        return (name, self._sample[row]) if len(KINDS[self.kind].key) > 1 else (name,)

    def where(self, key):
        return f"{self.path}:{self._line[self.row(key)]}"


def record_for(table, rollout, rollouts):
    """The record of `table` (scores, weights or rewards) that belongs to `rollout`, or BadInput
    when it is missing or was made for another text.  `rollouts` is the Table that the rollout
    is from, for the message."""
    key = key_of(rollout, "rollouts")
    if key not in table:
        raise BadInput(
            f"{table.path}: expected a record for id {rollout['id']!r}, sample "
            f"{rollout['sample']} ({rollouts.where(key)}), but there is none: run the stage "
            f"that writes it again"
        )
    record = table[key]
    where = table.where(key)
    if record["rollout"] != fingerprint(rollout):
        raise BadInput(
            f"{where}: rollout: expected {fingerprint(rollout)}, the rollout at "
            f"{rollouts.where(key)}, got {record['rollout']}: these {table.kind} were made for "
            f"other rollouts"
        )
    field = {"scores": "logprobs", "weights": "weights"}.get(table.kind)
    length = len(rollout.get("response_ids", ()))
    if field and len(record[field]) != length:
        raise BadInput(
            f"{where}: {field}: expected {length} values, one per response token, got "
            f"{len(record[field])}"
        )
    return record


def without(groups, gone, reason):
    """groups, a dict by prompt id, less the prompts of `gone`, which are named on the screen;
    BadInput if none is left."""
    kept = {name: group for name, group in groups.items() if name not in gone}
    missing = [(name,) for name in groups if name in gone]
    if missing:
        text = f"{len(missing)} of {len(groups)} prompts are left out: {reason}{named(missing)}"
        if not kept:
            raise BadInput(text)
        print(f"WARNING: {text}")
    return kept


def named(keys, most=3):
    """The first keys in brackets, for messages:  [("t7", 0)] -> " [t7 0]"."""
    if not keys:
        return ""
    shown = printable(", ".join(" ".join(map(str, key)) for key in keys[:most]))
    return f" [{shown}{', ...' if len(keys) > most else ''}]"


# ---- writing

SYNC_SECONDS = 5  # as much of its work a stage may lose when the power goes


def _dump(record):
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace") + b"\n"  # half a surrogate pair is no text


def first_difference(before, now):
    """The first setting that two JSON objects do not share, in words, or None.

    first_difference({"flags": {"n": 2}}, {"flags": {"n": 4}}) -> "n = 2, now it is 4"."""
    before, now = (json.loads(json.dumps(x, default=str)) or {} for x in (before, now))
    names = sorted((before.keys() | now.keys()) - {"config"})
    if "config" in before:  # a model's, which an earlier version did not write
        names.append("config")
    for name in names:
        old = before.get(name)
        new = now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            if found := first_difference(old, new):
                return found
        elif old != new:
            return f"{name} = {show(old)}, now it is {show(new)}"
    return None


def hash_file(path, limit=None):
    """{"bytes", "sha256"} of the first `limit` bytes of a file (of all of it by default)."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: expected a file, but there is no such file")
    digest = hashlib.sha256()
    left = Path(path).stat().st_size if limit is None else limit
    total = 0
    with open(path, "rb") as f:
        while block := f.read(min(left - total, 1 << 20)):
            digest.update(block)
            total += len(block)
    return {"bytes": total, "sha256": digest.hexdigest()}


class Writer:
    """Appends records to `path`; `key in writer` tells what an earlier, interrupted run has
    finished.

    settings: whatever determines the records (model, seed, temperature ...); inputs: the files
    they are made from.  Both are kept in `path.run.json` and must match when a file is resumed.
    retry: a predicate; finished records for which it holds are dropped and made again.  wanted:
    how many records the file shall hold in the end."""

    def __init__(
        self, path, kind, settings, inputs=(), overwrite=False, retry=None, wanted=None
    ):
        self.path = Path(path)
        self.kind = kind
        self.state = {"settings": settings, "inputs": {}, "wanted": wanted, "failed": []}
        self.done = KeySet()
        # one file may be given for two flags
        inputs = list({Path(p).resolve(): p for p in inputs}.values())
        try:
            disk.make_folder(self.path.parent)
        except OSError as error:
            raise BadInput(
                f"{path}: cannot be written: {self.path.parent}: {error.strerror}"
            ) from None
        self._check_inputs(inputs)
        self._open()
        try:
            if overwrite:
                self._file.truncate(0)
                # or a power cut could leave the old records beside the new settings
                os.fsync(self._file.fileno())
            self._resume(settings, inputs, retry)
        except BaseException:
            self._file.close()
            raise

    def _check_inputs(self, inputs):
        for source in map(Path, inputs):
            if not source.is_file():
                raise BadInput(
                    f"{source}: expected a file to make {self.path} from, but there is no such "
                    f"file"
                )
            if self.path.exists() and self.path.samefile(source):
                raise BadInput(
                    f"{self.path}: is an input of this command, it cannot be the output too: "
                    f"give another --out"
                )

    def _open(self):
        try:
            self._file = disk.open_locked(self.path)
        except BlockingIOError:
            raise BadInput(
                f"{self.path}: another process is writing this file: wait for it, or give "
                f"another --out"
            ) from None
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be written: {error.strerror}") from None
        self._synced = time.monotonic()

    def _resume(self, settings, inputs, retry):
        if self.path.stat().st_size:
            self._check_same_run(sidecar_of(self.path), settings, inputs)
            disk.cut_torn_line(self.path)
        if self.path.stat().st_size:
            self._load_done(retry)
        self.state["inputs"] = {str(p): hash_file(p) for p in inputs}
        self._keep_state()

    def _keep_state(self):
        text = json.dumps(self.state, indent=1, default=str)
        disk.write_atomically(sidecar_of(self.path), text + "\n")

    def finish(self, failed):
        """Says in the sidecar which records could not be made (keys): a reader goes on without
        them."""
        os.fsync(self._file.fileno())
        self.state["failed"] = sorted(failed)
        self._keep_state()

    def _check_same_run(self, sidecar, settings, inputs):
        fresh = f"give another --out, or --overwrite to begin {self.path.name} anew"
        if not sidecar.exists():
            raise BadInput(
                f"{self.path}: expected {sidecar.name} beside it to continue this file, but "
                f"there is none: {fresh}"
            )
        try:
            before = json.loads(sidecar.read_text())
            old_settings = dict(before["settings"])
            old_inputs = {
                name: {"bytes": int(old["bytes"]), "sha256": str(old["sha256"])}
                for name, old in before["inputs"].items()
            }
        except (ValueError, TypeError, KeyError, AttributeError):
            raise BadInput(
                f"{sidecar}: expected the settings {self.path.name} was begun with, but it "
                f"is damaged: {fresh}"
            ) from None
        if difference := first_difference(old_settings, settings):
            raise BadInput(f"{self.path}: was begun with {difference}: {fresh}")
        if len(old_inputs) != len(inputs):
            raise BadInput(
                f"{self.path}: was made from {', '.join(old_inputs) or 'no file'}: {fresh}"
            )
        # by place: a moved file is the same input
        for (name, old), path in zip(old_inputs.items(), inputs):
            if hash_file(path, old["bytes"]) != old:
                raise BadInput(
                    f"{self.path}: was made from {name}, which has changed since, or {path} "
                    f"is another file: {fresh}"
                )

    def _load_done(self, retry):
        again = 0
        for _, _, record in _lines(self.path, self.kind, unfinished=True):
            if retry and retry(record):
                again += 1
            else:
                self.done.add(key_of(record, self.kind))
        if again:
            lines = _lines(self.path, self.kind, unfinished=True)
            kept = (record for _, _, record in lines if not retry(record))
            disk.write_atomically(self.path, (_dump(r).decode() for r in kept))
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
        keys = [key_of(r, self.kind) for r in records] if KINDS[self.kind].key else []
        if len({*keys}) < len(keys) or any(key in self.done for key in keys):
            raise ValueError(f"{self.path}: refusing to write a key twice: {keys}")
        disk.append_whole(self._file, lines)
        for key in keys:
            self.done.add(key)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._file:
            os.fsync(self._file.fileno())


FEW = 2  # failures that are no rate yet: one of eight says nothing of the others


class FailureLimit(NamedTuple):
    """How many failures a stage bears: a share of all records, or `first` of them while none
    has succeeded."""

    rate: float = 0.0
    first: int = 1
    advice: str = "look at what is said of the last one, then run again"


def stop_if_failing(out, failures, done, total, limit):
    """Raises BadInput when more failed than `limit` allows; what was written is kept."""
    allowed = max(limit.rate * total, FEW) if limit.rate else 0
    nothing_works = not done and len(failures) >= min(limit.first, total)
    if len(failures) > allowed or nothing_works:
        raise BadInput(
            f"{out}: {len(failures)} of {total} records failed, {done} succeeded and are "
            f"kept; more than --max-failure-rate {limit.rate} allows "
            f"(last: {failures[-1]}): {limit.advice}"
        )


def fill(
    out,
    kind,
    keys,
    work,
    settings,
    inputs=(),
    overwrite=False,
    failure_of=None,
    limit=FailureLimit(),
):
    """Makes the records that a file lacks; returns (records in the file, failures).

    keys: the keys of all records that the file shall hold.  work(missing) gets those that it
    does not hold yet, in order, and yields a record, a list of records (a batch), or an
    exception in place of a record that could not be made.  Every result is appended at once,
    in whole lines, so a killed run loses one batch.  settings and inputs: see Writer.

    A failure is never turned into a value.  It is counted; more than `limit` allows stop the
    stage, fewer are named in FILE.run.json, and the stages that read the file go on without
    them; the next run tries them again.  failure_of(record): why a record that is written
    all the same counts as failed (a null judgement), or None; the next run makes it again.

        fill("evals.jsonl", "evals", rollouts.keys(), lambda missing: map(grade, missing), {})
    """
    keys = list(keys)
    failures = []
    how = dict(retry=failure_of, wanted=len(keys))
    with Writer(out, kind, settings, inputs, overwrite, **how) as writer:
        missing = [key for key in keys if key not in writer]
        done = len(writer.done)
        tokens = 0  # of this call
        bar = cli.progress(
            total=len(keys), initial=len(keys) - len(missing), desc=Path(out).name
        )
        with bar:
            for result in work(missing) if missing else ():
                if isinstance(result, Exception):
                    failures.append(result)
                else:
                    batch = result if isinstance(result, list) else [result]
                    writer.write(*batch)
                    tokens += sum(len(r.get("logprobs") or ()) for r in batch)
                    if tokens:
                        speed = tokens / max(bar.format_dict["elapsed"], 1e-3)
                        bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
                    bar.update(len(batch))
                    reasons = map(failure_of, batch) if failure_of else ()
                    failed = [reason for reason in reasons if reason]
                    failures += failed
                    done += len(batch) - len(failed)
                if failures:
                    stop_if_failing(out, failures, done, len(keys), limit)
        written = len(writer.done)
        left = [key for key in keys if key not in writer]
        if left:
            writer.finish(left)
    if failures:
        print(
            f"{out}: {len(failures)} of {len(keys)} {kind} failed{named(left)} (first: "
            f"{failures[0]}); the next stages go on without them; run the same command again "
            f"to try them again"
        )
    return written, failures


# ---- python -m opd.files check


def guess_kind(path):
    """The kind of a file from its first record's fields."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: expected a JSONL file, but there is no such file")
    with open(path, "rb") as f:
        first = next((line for line in f if line.strip()), b"")
    try:
        return kind_of(set(json.loads(first)))
    except (ValueError, TypeError, RecursionError):
        return "prompts"


def main(argv=None):
    p = cli.parser(__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check",
        help="validate JSONL files",
        description="Validate JSONL files.\n\n    python -m opd.files check FILE ...",
    )
    check.add_argument("files", nargs="+", metavar="FILE")
    check.add_argument(
        "--kind",
        choices=KINDS,
        help="what the files hold; guessed from the first record by default",
    )
    args = p.parse_args(argv)
    counts = {}
    for path in args.files:
        kind = args.kind or guess_kind(path)
        counts[path] = sum(1 for _ in read(path, kind))
        print(f"{path}: {counts[path]} {kind}, all valid")
    return counts


if __name__ == "__main__":
    cli.run(main)
