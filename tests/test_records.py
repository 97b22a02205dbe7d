"""opd/records.py and opd/files.py: every kind's validation, damaged files, resume after kill -9
and on a full disk, packing, memory."""

import base64
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load, refusal

import methods.prefix  # noqa: F401  declares fields
import methods.simct  # noqa: F401
import methods.sod.weights  # noqa: F401
import methods.sparse_to_dense  # noqa: F401  declares a kind
from opd import cli, disk, files, records
from opd.files import Table, Writer, read
from opd.records import BadInput

POLICY = {"model": "m", "weights": "abc"}
PACKED = records.pack(np.zeros((2, 3), dtype=np.float32))
TOPK = {
    "ids": records.pack(np.int32([[0, 1, 2], [9, 7, 8]])),
    "logprobs": records.pack(np.float32([[-1, -2, -3], [-1, -np.inf, -5]])),
}
UNIT_TOPK = {name: records.pack(records.unpack(p)[:1]) for name, p in TOPK.items()}
ROLLOUT = {
    "id": "p1",
    "sample": 0,
    "policy": POLICY,
    "text": "#2",
    "finish_reason": "stop",
    "prompt_ids": [5, 6],
    "response_ids": [7, 8],
    "loss_mask": [1, 1],
    "logprobs": [-0.5, 0.0],
    "temperature": 1.0,
    "top_p": 1,
}
GOOD = {
    "prompts": {
        "id": 7,
        "messages": [{"role": "user", "content": "1+1?"}],
        "answer": 2,
        "solution": "#2",
    },
    "answers": {"id": 7, "sample": 0, "policy": POLICY, "text": "", "finish_reason": "length"},
    "rollouts": ROLLOUT
    | {
        "steps": [[0, 1, True], [1, 2, None]],
        "calls": [{"name": "calculator", "output": "2", "ok": True}],
        "final": "#2",
        "end_mass": 0,
    },
    "scores": {
        "id": "p1",
        "sample": 0,
        "policy": POLICY,
        "rollout": "0123456789ab",
        "logprobs": [-1, -2.5],
        "topk": TOPK,
        "topk_of": "abc",
        "end_mass": 0.5,
        "units": [[0, 2, 0, 1]],
        "unit_logprobs": [-2.0],
        "unit_logits": [3.5],
        "unit_logz": [5],
        "unit_topk": UNIT_TOPK,
        "prefixes": UNIT_TOPK["ids"],
        "sorted": TOPK["logprobs"],
        "bytes": [3, 3, 0],
    },
    "weights": {
        "id": "p1",
        "sample": 0,
        "rollout": "0123456789ab",
        "rule": "release",
        "weights": [2.5, 0],
        "kept": 0.5,
        "scale": 2.5,
    },
    "rubrics": {
        "id": "p1",
        "criteria": [
            {"id": "c1", "category": "answer", "criterion": "ends in #2", "points": 5}
        ],
        "rubricator": "contrast",
    },
    "rewards": {
        "id": "p1",
        "sample": 0,
        "reward": 0.5,
        "status": "ok",
        "rollout": "0123456789ab",
        "grader": "check",
        "verdicts": {},
    },
    "labels": {
        "id": "p1",
        "question": "1f0c9be2a4d7",
        "spent_on": "teacher-rl",
        "again": False,
    },
    "evals": {
        "id": "p1",
        "sample": 0,
        "text": "#2",
        "correct": True,
        "length": None,
        "truncated": False,
        "repetition": 1.5,
    },
    "metrics": {"step": 0, "train/loss": 1.5},
    "results": {"arm": "ropd", "seed": 0, "step": 40, "accuracy": 0.5},
}
CRITERION = GOOD["rubrics"]["criteria"][0]
BAD_CRITERIA = [CRITERION | {"points": points} for points in (0, 6, 2.0, True)]
BAD_CRITERIA += [CRITERION | bad for bad in ({"id": 1}, {"criterion": ""}, {"category": None})]
BAD_CRITERIA += [CRITERION | {"check": check} for check in ("ends", [], [1], [["ends"]])]
BAD = {  # name of a type in records -> values that are not of it
    "ID": ["", None, 1.5, True],
    "BOOL": [None, 0, 1, "true"],
    "COUNT": [-1, 1.0, True, 2**60],
    "TEXT": [None, 3],
    "NUMBER": ["1", True, float("nan"), float("inf")],
    "MESSAGES": [[], "hello", [{"role": "user"}], ["x"]],
    "POLICY": [None, {}, {"model": None}, {"model": "m", "weights": {}}],
    "FINISH": [None, "eos"],
    "IDS": ["12", [1.0], [-1], [True], [2**31], [[1]]],
    "MASK": [[2], [True], ["1"], 1],
    "LOGPROBS": [[0.5], [-1, float("nan"), -2], [float("-inf")], [False], -1.0, [-1e30]],
    "WEIGHTS": [[-0.5], [float("nan")], [float("inf")], [True], 1.0, [1e30]],
    "NUMBERS": [["1"], [float("nan")], [True], 1.0, [1e308]],
    "SHARE": [None, -0.5, 1.5, True, float("nan")],
    "TEMPERATURE": [None, -1, 1e-320, 1e9, True, float("nan")],
    "BOOLS": [None, [1], True],
    "REPEATS": [None, [], [1], [[None]]],
    "LENGTH": [-1, 0.5, True, 2**31],
    "DRAWN_FROM": [None, {}, {"answers": []}, {"answers": [1], "rollouts": []}],
    "PACKED": [None, {"dtype": "float32"}],
    "STEPS": [[[0, 1]], [1], {}, [["0", 1, True]], [[0, 1, 1]]],
    "CALLS": [{}, ["x"], [{"ok": True}], [{"output": 2, "ok": True}]],
    "TOPK": [None, {"ids": PACKED}, {"ids": [1], "logprobs": [2]}],
    "CRITERIA": [None, [], ["c"], [{"id": "c"}], *([bad] for bad in BAD_CRITERIA)],
    "REWARD": ["1", True, float("nan"), float("inf"), -1e30],
    "STATUS": [None, "OK"],
}


def write_lines(path, lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def reward(i, **more):
    return GOOD["rewards"] | {"id": i} | more


def failed(i):
    return reward(i, reward=None, status="failed")


def ids(path, kind="rewards"):
    return [r["id"] for r in read(path, kind)]


def problem_of(path, kind):
    with pytest.raises(BadInput) as caught:
        list(read(path, kind))
    return str(caught.value)


def write(path, *rows, settings=(), **options):
    """One run of a stage that writes the rows its file lacks."""
    with Writer(path, "rewards", dict(settings), **options) as out:
        out.write(*(r for r in rows if records.key_of(r, "rewards") not in out))
        return out.done


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.jsonl"


# ---- validation


@pytest.mark.parametrize("kind", GOOD)
def test_good_records_are_read_back_as_they_are(path, kind):
    assert set(GOOD) == set(records.KINDS)
    odd = GOOD[kind] | {"of_somebody_else": {"deep": [None, 1e300, "ü"]}, "": 0}
    assert list(read(write_lines(path, [odd]), kind)) == [odd], "unlisted keys pass through"
    assert files.guess_kind(path) == kind


UNIT = records.KINDS["scores"].optional["units"]
WRONG = {getattr(records, name): values for name, values in BAD.items()}
WRONG[UNIT] = [[[0, 1]], [[0, 1, 0, -1]], [[0, 1, 0, 1.0]], {}]
WRONG[records.KINDS["scores"].optional["bytes"]] = [[1, 2], [1, 2, -3], "123"]
WRONG |= {
    records.KINDS["weights"].optional[name]: values
    for name, values in {
        "scale": [None, 0, True],
        "blocks": [None, [1], [[-1, 2]]],
        "cut": [0, "1"],
        "gain": ["1", float("nan")],
        "d": [None, [-1], ["1"]],
    }.items()
}


@pytest.mark.parametrize("kind", GOOD)
def test_wrong_and_missing_fields_are_named_with_file_and_line(path, kind):
    good = GOOD[kind]
    for field in (required := records.KINDS[kind].required):
        write_lines(path, [{k: v for k, v in good.items() if k != field}])
        wanted = f"{path}:1: {field}: expected {required[field].expected}, but the field is mis"
        assert problem_of(path, kind).startswith(wanted)
    other = {"id": "other"} if "id" in good else {}
    for field, type_ in (required | records.KINDS[kind].optional).items():
        assert type_ is records.ANY or WRONG[type_], "a type without bad examples"
        for value in WRONG.get(type_, []):
            write_lines(path, [good, good | other | {field: value}])
            wanted = f"{path}:2: {field}: expected {type_.expected}, got "
            assert problem_of(path, kind).startswith(wanted), value


EVAL = json.dumps(GOOD["evals"] | {"extra": float("nan")})
TOKEN_LISTS = [
    ({"steps": [[0, 3, None]]}, "steps"),
    ({"steps": [[0, 2, True], [1, 2, None]]}, "steps"),
    ({"steps": [[-1, 2, None]]}, "steps"),
    ({"steps": []}, "steps"),
    ({"steps": [[1, 2, None]]}, "loss_mask"),
    ({"logprobs": [-1.0] * 3}, "logprobs"),
    ({"prompt_ids": []}, "prompt_ids"),
    ({"response_ids": []}, "loss_mask"),
    ({"text": ["x" * 100_000]}, "text"),
]


def topk(ids=None, logprobs=None):
    """A score with another distribution."""
    given = {"ids": ids, "logprobs": logprobs}
    packed = {name: records.pack(array) for name, array in given.items() if array is not None}
    return GOOD["scores"] | {"topk": TOPK | packed}


IDS = records.unpack(TOPK["ids"])
LOGPS = records.unpack(TOPK["logprobs"])
NAN = np.where(IDS == 1, np.nan, LOGPS)
TOPKS = [
    topk(IDS.astype(np.float32)),
    topk(IDS - 1),
    topk(IDS * 0),
    topk(IDS[:1], LOGPS[:1]),
    topk(IDS[:, :2]),
    topk(IDS[0], LOGPS[0]),
    topk(logprobs=np.zeros((2, 3), np.int32)),
    topk(logprobs=LOGPS + 5),
    topk(logprobs=NAN),
    topk(logprobs=np.full_like(LOGPS, -1e30)),
    topk(logprobs=np.zeros_like(LOGPS)),  # three tokens, all of them certain
]
UNITS = [
    ({"units": [[0, 2, 0, 0]]}, "units"),
    ({"units": [[1, 3, 0, 1]]}, "units"),
    ({"unit_logz": [1, 2]}, "unit_logz"),
    ({"unit_topk": TOPK}, "prefixes"),
    ({"unit_topk": TOPK, "prefixes": TOPK["ids"]}, "unit_topk"),
    ({"sorted": UNIT_TOPK["ids"]}, "sorted"),
    ({"sorted": records.pack(LOGPS + 5)}, "sorted"),
]
MESSAGES = "messages: expected exactly one of `messages` and `prompt`"
NULL = "reward: expected null exactly when"


@pytest.mark.parametrize(
    "kind, line, words",
    [("metrics", line, "expected a JSON object, got ") for line in ("[]", "7", "null", "[{}]")]
    + [("rollouts", ROLLOUT | change, field + ": expected ") for change, field in TOKEN_LISTS]
    + [("scores", line, "topk: expected ") for line in TOPKS]
    + [("scores", GOOD["scores"] | line, f"{field}: expected ") for line, field in UNITS]
    + [("weights", GOOD["weights"] | {"d": [1]}, "w: expected ")]
    + [("prompts", line, MESSAGES) for line in ({"id": 1}, GOOD["prompts"] | {"prompt": "x"})]
    + [("rewards", reward(1, reward=None), NULL), ("rewards", reward(1, status="failed"), NULL)]
    # a reader that lets NaN in hands it to a writer that cannot write it
    + [("evals", EVAL, "expected JSON, which has no NaN")]
    + [
        ("results", '{"arm": "a", "seed": 0, "step": 0, "accuracy": ' + number + "}", "")
        for number in ("1" + "0" * 400, "1e999", "NaN", "-Infinity", "1" * 5000)
    ],
)
def test_what_must_hold_of_a_whole_record_is_checked(path, kind, line, words):
    message = problem_of(write_lines(path, [line]), kind)
    assert message.startswith(f"{path}:1: {words}")
    assert len(message) < 300 + len(str(path)), "long values are shortened"


# ---- damaged files


def test_missing_and_empty_files_and_folders_are_named(path, tmp_path):
    for absent in (path, tmp_path):
        assert "there is no such file" in problem_of(absent, "prompts")
    for text in ("", "\n \n\n"):
        path.write_text(text)
        assert "the file is empty" in problem_of(path, "metrics")


def test_blank_lines_crlf_and_bom_are_read_and_counted(path):
    first, second = (
        json.dumps(reward(i, note="ü\u2028"), ensure_ascii=False).encode() for i in (1, 2)
    )
    path.write_bytes(b"\xef\xbb\xbf" + first + b"\r\n\r\n   \n" + second + b"\r\n")
    assert ids(path) == [1, 2]
    table = Table(path, "rewards")
    assert table[("1", 0)]["note"] == "ü\u2028"
    assert table[("2", 0)]["id"] == 2 and table.where(("2", 0)) == f"{path}:4"


BROKEN = {
    "latin": b'{"id": 1, "text": "\xff\xfe"}',
    "utf-32 mark": b"\xff\xfe\x00\x00",
    "quotes": b"{'id': 1}",
    "comma": b'{"id": 1,}',
    "two": b'{"id": 1} {"id": 2}',
    "twice": b'{"id": 1, "deep": {"id": 2, "id": 2}}',
    "half a pair": b'{"id": 1, "text": "\\ud83d"}',
    "half a pair in bytes": b'{"id": 1, "text": "\xed\xa0\xbd"}',
    "half a pair as a name": b'{"id": 1, "\\uDE00": 2}',
    "zeros": b"\x00\x00\x00",
    "brackets": b"[" * 100_000,
    "deep": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
def test_lines_that_are_not_json_are_named_and_never_mended(path, line):
    write(path, reward(1), reward(2))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + second)
    before = path.read_bytes()
    message = problem_of(path, "rewards")
    assert message.startswith(f"{path}:2: expected one JSON object a line, got ")
    assert len(message) < 1000 + len(str(path))
    with pytest.raises(BadInput, match=":2: expected one JSON object"):
        write(path)
    assert path.read_bytes() == before


def test_a_torn_last_line_stops_the_reader_and_is_mended_by_the_writer(path):
    """A kill between any two bytes: cut a finished file at every length, go on, compare; and a
    tail of zeros, or one longer than a buffer."""
    rows = [reward(i, note="é\u2028") for i in range(2)]
    write(path, *rows)
    whole = path.read_bytes()
    cuts = [whole[:length] for length in range(len(whole) + 1)]
    for cut in (*cuts, whole + b"\x00" * 4, whole + b'{"x": "' + b"y" * 99_999):
        path.write_bytes(cut)
        if cut[-1:] not in (b"", b"}", b"\n"):
            assert "the last line is torn" in problem_of(path, "rewards")
        write(path, *rows)
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    assert ids(path) == [0, 1], "a whole last line without its newline is read"


@pytest.mark.parametrize(
    "kind, second", [("rewards", {"id": "7"}), ("rewards", {}), ("prompts", {"id": "7"})]
)
def test_duplicates_are_refused_and_7_is_the_string_7(path, kind, second):
    first = GOOD[kind] | {"id": 7}
    write_lines(path, [first, first | second])
    assert problem_of(path, kind).startswith(f"{path}:2: duplicate key: id ")
    with pytest.raises(BadInput, match="duplicate"):
        Table(path, kind)


def test_other_samples_and_unlike_ids_are_no_duplicates(path):
    rows = [reward(7), reward(7, sample=1), reward("07"), reward(-1), reward("7 ")]
    assert len(ids(write_lines(path, rows))) == 5
    assert len(list(read(write_lines(path, [{"step": 1}] * 2), "metrics"))) == 2


# ---- packed arrays, floats


@pytest.mark.parametrize("dtype", records.PACKABLE)
def test_pack_round_trip(dtype):
    array = (np.random.default_rng(0).normal(size=(5, 4)) * 50).astype(dtype)
    big = array.astype(array.dtype.newbyteorder(">"))
    for view in (array, array.T, array[::-2, 1::2], big, array[:, :0]):
        back = records.unpack(json.loads(json.dumps(records.pack(view))))
        assert back.dtype == np.dtype(dtype) and back.shape == view.shape
        assert np.array_equal(back, view) and back.flags.writeable


def test_pack_is_little_endian_keeps_nan_infinity_and_the_sign_of_zero_or_refuses():
    packed = records.pack(np.array([[1]], dtype=">i4"))
    assert base64.b64decode(packed["data"]) == b"\x01\x00\x00\x00"
    for dtype in ("bool", "int16", "object", "U1", "complex64"):
        with pytest.raises(ValueError):
            records.pack(np.zeros((1, 1), dtype=dtype))
    array = np.array([[np.nan, np.inf, -np.inf, -0.0]], dtype=np.float32)
    assert records.unpack(records.pack(array)).tobytes() == array.tobytes()


DATA = PACKED["data"]
DAMAGED = [("dtype", x) for x in ("object", None, "float33", ["float32"], "float64")]
DAMAGED += [("shape", x) for x in ([3, 3], [2], None, [-2, -3], [2.0, 3.0])]
DAMAGED += [("data", x) for x in (DATA[:-4], DATA[:-1], "*" * 32, "é" * 32, None)]


@pytest.mark.parametrize("field, value", DAMAGED, ids=str)
def test_damaged_packs_are_bad_input(field, value):
    with pytest.raises(BadInput, match="packed array"):
        records.unpack(PACKED | {field: value})


def test_floats_are_exact_float32():
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint64)
    values = bits.astype(np.uint32).view(np.float32)
    edges = np.float32([0, -0.0, 1e-45, -1e-45, 3.4028235e38, 1 / 3, -1e-8])
    values = np.concatenate([values[np.isfinite(values)], edges])
    back = np.array(json.loads(json.dumps(records.floats(values))), dtype=np.float32)
    assert back.tobytes() == values.tobytes()
    assert len(json.dumps(records.floats([-1 / 3]))) <= 16, "not the 17 digits of a float64"


# ---- fingerprint, Table, record_for


def test_fingerprint_changes_with_text_and_tokens_only():
    """Terse answers repeat across prompts; a regenerated prompt file has the same ids and other
    questions."""
    same = records.fingerprint(ROLLOUT)
    others = {"id": 9, "logprobs": [-9, -9], "temperature": 2}
    assert len(same) == 12 and records.fingerprint(ROLLOUT | others) == same
    changes = ({"text": "#3"}, {"response_ids": [8, 7]}, {"prompt_ids": [6, 5]})
    changed = {records.fingerprint(ROLLOUT | change) for change in changes}
    changed.add(records.fingerprint({k: v for k, v in ROLLOUT.items() if k != "response_ids"}))
    assert len(changed | {same}) == 5


def test_table_reads_any_record_in_any_order(path):
    rows = [reward(f"ü{i}" if i % 2 else i, note="é" * (i % 17)) for i in range(500)]
    table = Table(write_lines(path, rows), "rewards")
    assert len(table) == 500 and list(table) == rows
    for i in np.random.default_rng(0).permutation(500):
        key = records.key_of(rows[i], "rewards")
        assert key in table and table[key] == rows[i] and table.where(key) == f"{path}:{i + 1}"
    assert ("nobody", 0) not in table and (0, 0) not in table, "keys hold the id as a string"
    walk = iter(table)
    within = [next(walk)["id"], table[("498", 0)]["id"], next(walk)["id"]]
    assert within == [0, 498, "ü1"], "reading within a walk"


def test_a_key_set_is_a_set_of_keys():
    rng = np.random.default_rng(0)
    drawn = [(f"p{i % 7}", int(rng.choice([0, 1, 63, 64, 65, 2**52]))) for i in range(200)]
    found, wanted = files.KeySet(), set()
    for key in drawn:
        assert (key in found) == (key in wanted)
        found.add(key)
        wanted.add(key)
        assert len(found) == len(wanted)
    names = files.KeySet()
    names.add(("p",))
    assert ("p",) in names and ("q",) not in names


def test_table_may_be_read_by_many_threads(path, request):
    """The stages that ask a server look records up in worker threads: a shared file position
    would mix records up."""
    rows = [reward(i, note="x" * (i % 3000)) for i in range(400)]
    table = Table(write_lines(path, rows), "rewards")

    def look_up(seed):
        order = np.random.default_rng(seed).permutation(400)
        return sum(table[records.key_of(rows[i], "rewards")] != rows[i] for i in order)

    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(look_up, range(16))) == 0


def score(of, **more):
    row = {"id": of["id"], "sample": of["sample"], "policy": POLICY}
    row |= {"rollout": records.fingerprint(of), "logprobs": [-1.0] * len(of["response_ids"])}
    return row | more


FIRST, SECOND = ROLLOUT, ROLLOUT | {"id": "p2", "text": "#3"}
OTHER = score(SECOND, rollout=records.fingerprint(FIRST))
ABSENT = r"jsonl: expected a record for id 'p2', sample 0 .*rollouts\.jsonl:2"


@pytest.mark.parametrize(
    "kind, rows, words",
    [
        ("scores", [score(FIRST), score(SECOND)], None),
        ("rewards", [reward("p2", rollout=records.fingerprint(SECOND))], None),
        ("scores", [score(FIRST)], ABSENT),
        ("scores", [score(FIRST), OTHER], ":2: rollout: expected .* made for other rollouts"),
        ("rewards", [reward("p2")], ":1: rollout: expected"),
        ("scores", [score(SECOND, logprobs=[-1])], ":1: logprobs: expected 2 values.* got 1"),
    ],
)
def test_records_are_joined_by_fingerprint(tmp_path, path, kind, rows, words):
    rollouts = write_lines(tmp_path / "rollouts.jsonl", [FIRST, SECOND])
    rollouts, table = Table(rollouts, "rollouts"), Table(write_lines(path, rows), kind)
    if words is None:
        assert files.record_for(table, SECOND, rollouts) == rows[-1]
        return
    with pytest.raises(BadInput, match=words):
        files.record_for(table, SECOND, rollouts)


MEASURE = """
import sys, tracemalloc
from opd.files import Table, read
def peak(use):
    use()  # what is loaded at first use counts for no record
    tracemalloc.start()
    kept = use()
    print(*tracemalloc.get_traced_memory())
    tracemalloc.stop()
peak(lambda: sum(r["reward"] for r in read(sys.argv[1], "rewards")))
peak(lambda: Table(sys.argv[1], "rewards"))
"""


def test_memory_stays_far_below_a_list_of_records(path):
    """In a process of its own: what other tests have left is measured too."""
    count = 20_000
    write_lines(path, [reward(f"prompt-{i:07d}", verdicts={"c1": True}) for i in range(count)])
    words = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    reading, table = (line.split() for line in done.stdout.splitlines())
    assert int(reading[1]) / count < 200
    said = int(re.search(r"about (\d+) bytes a\s+record", files.__doc__)[1])
    assert said / 1.5 < int(table[0]) / count < 1.2 * said


# ---- Writer


def test_writer_refuses_bad_records_and_keys_it_has_and_leaves_the_file_alone(path):
    refused = [reward(3, status="perhaps")], [reward(4, extra=float("nan"))]
    # a double record would make the file unreadable for every later stage
    refused += ([reward(5, extra=np.float32(1))], [reward("1")], [reward(8), reward(8)])
    with Writer(path, "rewards", {}) as out:
        out.write(reward(1))
        for rows in refused:
            with pytest.raises((TypeError, ValueError)):
                out.write(reward(2), *rows)
        assert len(out.done) == 1 and ("1", 0) in out.done
    assert ids(path) == [1]


def test_any_text_is_written_as_one_line_and_read_back_but_for_half_a_surrogate_pair(path):
    texts = ['ü 語 😀 \u2028 \u0085 \x00 \n \r " \\', "half \ud83d"]
    rows = [GOOD["evals"] | {"id": i, "text": text} for i, text in enumerate(texts)]
    with Writer(path, "evals", {}) as out:
        out.write(*rows)
    rows[1]["text"] = "half ?"
    assert list(read(path, "evals")) == rows
    assert path.read_bytes().count(b"\n") == 2


SETTINGS = {"model": "m", "seed": 0, "shape": (1, 2), "path": Path("x")}


def begin(path):
    """Writes a record from two; returns the file of those."""
    source = write_lines(path.with_name("in.jsonl"), [reward(1), reward(2)])
    write(path, reward(1), settings=SETTINGS, inputs=[source])
    return source


def test_resume_with_the_same_settings_and_inputs_that_moved_or_grew(path, tmp_path):
    source = begin(path).rename(tmp_path / "moved.jsonl")
    with open(source, "a") as f:
        f.write(json.dumps(reward(3)) + "\n")
    turned = dict(reversed(SETTINGS.items()))
    write(path, reward(1), reward(2), settings=turned, inputs=[source])
    assert ids(path) == [1, 2]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seed": 1}, "was begun with seed = 0, now it is 1"),
        ({"new": 1}, "was begun with new = null, now it is 1"),
    ],
)
def test_resume_with_other_settings_is_refused(path, settings, message):
    source = begin(path)
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(BadInput, match=message + ".*--overwrite"):
        write(path, settings=SETTINGS | settings, inputs=[source])
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


def test_resume_from_other_inputs_changed_ones_or_without_the_sidecar_is_refused(path):
    source, sidecar = begin(path), path.with_name("x.jsonl.run.json")
    other = write_lines(path.with_name("other.jsonl"), [reward(8), reward(9)])

    def refused(inputs, words=None):
        with pytest.raises(BadInput, match=words):
            write(path, settings=SETTINGS, inputs=inputs)

    for inputs in ([other], [source, other], []):
        refused(inputs)
    text = source.read_text()
    for changed in (text.replace("0.5", "0.6", 1), text[:-1], ""):
        source.write_text(changed)
        refused([source], r"made from .*in\.jsonl, which has changed since")
    source.write_text(text)
    for content in ("", "{", "[]", "{}"):
        sidecar.write_text(content)
        refused([source], "x.jsonl.run.json")
    sidecar.unlink()
    refused([source], "x.jsonl.run.json")
    assert ids(path) == [1]


def test_overwrite_begins_anew_but_deletes_no_input_and_nothing_for_a_missing_one(path):
    source = begin(path)
    again = partial(write, settings={"seed": 5}, overwrite=True)
    for out, given in ((source, source), (source.parent / "." / source.name, source)):
        with pytest.raises(BadInput, match="is an input of this command"):
            again(out, inputs=[given])
    with pytest.raises(BadInput, match="no such file"):
        again(path, inputs=[path.with_name("absent.jsonl")])
    assert ids(source) == [1, 2] and ids(path) == [1]
    again(path, reward(9))
    assert ids(path) == [9]


def test_retry_drops_failed_records_and_makes_them_again(tmp_path):
    path = tmp_path / "new" / "folder" / "x.jsonl"
    write(path, reward(1), failed(2), reward(3, note="é"), failed(4))
    kept = path.read_bytes().splitlines(keepends=True)
    assert len(write(path)) == 4, "without retry a failure is a result"
    with Writer(path, "rewards", {}, retry=lambda r: r["status"] == "failed") as out:
        assert (
            len(out.done) == 2
            and ("3", 0) in out.done
            and path.read_bytes() == kept[0] + kept[2]
        )
        out.write(reward(4), failed(2))
    assert ids(path) == [1, 3, 4, 2]


def test_two_writers_of_one_file_are_refused(path):
    with Writer(path, "rewards", {}):
        for overwrite in (False, True):
            with pytest.raises(BadInput, match="another process"):
                write(path, overwrite=overwrite)
    write(path)


WRITE_MANY = """
import resource, signal, sys
from opd import cli, files
def main():
    path, count, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if limit:  # a file may not grow beyond this: the same failure as a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with files.Writer(path, "rewards", {"seed": 0}) as out:
        for i in range(0, count, 5):
            rest = {"sample": 0, "reward": 0.5, "status": "ok"}
            rest |= {"rollout": "x" * 50, "grader": "check"}
            new = [{"id": j} | rest for j in range(i, i + 5)]
            out.write(*(r for r in new if (str(r["id"]), 0) not in out))
            if i == 0:
                print("begun", flush=True)
cli.run(main)
"""


def writing(path, count, limit=0):
    words = [sys.executable, "-c", WRITE_MANY, str(path), str(count), str(limit)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(words, cwd=ROOT, **pipes)


def complete(path, count):
    process = writing(path, count)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert ids(path) == list(range(count))


@pytest.mark.parametrize("limit", [5, 10_000, 10_137])
def test_a_full_disk_leaves_whole_lines_and_a_rerun_completes(path, limit):
    process = writing(path, 500, limit)
    _, errors = process.communicate()
    assert process.returncode == 2 and re.fullmatch("error: .*could not .*\n", errors), errors
    data = path.read_bytes()
    assert data.endswith(b"\n") or limit == 5
    assert limit - 2000 < len(data) <= limit
    assert data.count(b"\n") % 5 == 0, "a write is whole or absent"
    complete(path, 500)


def test_kill_9_loses_and_doubles_nothing(path):
    count, in_the_middle = 20_000, 0
    for pause in (0, 0.01, 0.03, 0.06):
        with writing(path, count) as process:
            process.stdout.readline()
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        in_the_middle += 0 < path.read_bytes().count(b"\n") < count
    assert in_the_middle, "every kill came too late: this machine needs a larger count"
    complete(path, count)


def test_write_atomically_leaves_the_old_file_when_it_fails(path):
    disk.write_atomically(path, "old")

    def parts():
        yield "new"
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        disk.write_atomically(path, parts())
    assert path.read_text() == "old"
    disk.write_atomically(path, iter(["ne", "w ü"]))
    assert path.read_text(encoding="utf-8") == "new ü"


# ---- command lines


def test_check_says_what_a_file_holds_or_exits_with_2(tmp_path, path, capsys):
    paths = [write_lines(tmp_path / f"{kind}.jsonl", [record]) for kind, record in GOOD.items()]
    files.main(["check", *map(str, paths)])
    told = "".join(f"{p}: 1 {kind}, all valid\n" for p, kind in zip(paths, GOOD))
    assert capsys.readouterr().out == told
    for content in ("", "{", '{"id": 1}\n', "[" * 100_000 + "\n"):
        path.write_text(content)
        assert refusal(files.main, ["check", str(path)], capsys).startswith(f"error: {path}")


def raising(error):
    raise error


def test_run_turns_bad_input_into_exit_code_2(capsys):
    assert refusal(raising, BadInput("x.jsonl:3: id"), capsys) == "error: x.jsonl:3: id\n"
    # a message may quote a file
    assert refusal(raising, BadInput("a\nb \x1b ü"), capsys) == "error: a\\u000ab \\u001b ü\n"
    with pytest.raises(SystemExit, match="130"):
        cli.run(partial(raising, KeyboardInterrupt()))
    with pytest.raises(RuntimeError):  # a bug is not bad input: it keeps its traceback
        cli.run(partial(raising, RuntimeError("bug")))


def test_guess_kind_looks_past_blanks_and_says_prompts_when_it_cannot_tell(path):
    unknown = ("", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\ufeff{}", "[[]]")
    for text in unknown:
        assert files.guess_kind(write_lines(path, [text])) == "prompts"
    for mark in ("\n", "\ufeff"):
        assert files.guess_kind(write_lines(path, [mark + json.dumps(reward(1))])) == "rewards"


# ---- fill


def test_fill_makes_what_is_missing_once_and_in_order(path):
    keys = [(str(i), 0) for i in range(5)]
    asked = []

    def work(missing):
        asked.append(missing)
        made = [reward(int(i)) for i, _ in missing]
        yield made[0]
        yield made[1:3]  # a batch
        if len(missing) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.fill(path, "rewards", keys, work, {})
    assert [r["id"] for r in load(path)] == [0, 1, 2], "every result is on disk"
    with pytest.raises(BadInput, match="unfinished: expected 5 .*x.jsonl.run.json.*, got 3"):
        list(files.read(path, "rewards"))
    copy = shutil.copy(path, path.with_name("copy.jsonl"))
    assert len(list(files.read(copy, "rewards"))) == 3
    for _ in range(2):
        assert files.fill(path, "rewards", keys, work, {}) == (5, [])
    assert asked == [keys, keys[3:]], "a finished file asks for nothing"


def test_fill_counts_failures_and_stops_beyond_the_limit(path, tmp_path):
    keys = [(str(i), 0) for i in range(10)]

    def fill(path, rate, failed):
        def work(missing):
            return (RuntimeError(i) if int(i) in failed else reward(int(i)) for i, _ in missing)

        limit = files.FailureLimit(rate=rate, first=2, advice="look")
        return files.fill(path, "rewards", keys, work, {}, limit=limit)

    odd = range(1, 10, 2)
    written, failures = fill(path, 0.5, odd)
    assert written == 5 and [str(f) for f in failures] == ["1", "3", "5", "7", "9"]
    assert len(list(files.read(path, "rewards"))) == 5, "what failed is named, not missed"
    assert files.wanted_and_failed(path)[1] == {(str(i), 0) for i in odd}
    # two failures are no rate yet, three of ten are
    for out, rate, failed, words in (
        (path, 0.1, odd, r"3 of 10 records failed, 5 succeeded .*last: 5\): look"),
        (path, 0, odd, "1 of 10 records failed"),
        (tmp_path / "y.jsonl", 1, range(10), "2 of 10 records failed, 0 succeeded"),
    ):
        with pytest.raises(BadInput, match=words):
            fill(out, rate, failed)
