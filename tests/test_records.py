"""opd/records.py: every kind's validation, damaged files, resume after kill -9 and on a full
disk, packing, memory."""

import base64
import json
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import methods.simct  # noqa: F401  declares fields
import methods.sparse_to_dense  # noqa: F401  declares a kind
from opd import files, records

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from conftest import refusal

from opd.files import Table, Writer, read
from opd.records import BadInput

POLICY = {"model": "m", "weights": "abc"}
PACKED = records.pack(np.zeros((2, 3), dtype=np.float32))
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
    },
    "scores": {
        "id": "p1",
        "sample": 0,
        "policy": POLICY,
        "rollout": "0123456789ab",
        "logprobs": [-1, -2.5],
        "topk": {"ids": PACKED, "logprobs": PACKED},
        "topk_of": "abc",
        "end_mass": 0.5,
        "units": [[0, 2, 0, 1]],
        "unit_logprobs": [-2.0],
        "unit_logits": [3.5],
        "unit_logz": [5],
        "unit_topk": {"ids": PACKED, "logprobs": PACKED},
        "prefixes": PACKED,
        "sorted": PACKED,
        "bytes": [3, 3, 0],
    },
    "weights": {
        "id": "p1",
        "sample": 0,
        "rollout": "0123456789ab",
        "rule": "release",
        "weights": [2.5, 0],
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
    "evals": {"id": "p1", "sample": 0, "text": "#2", "correct": True},
    "metrics": {"step": 0, "train/loss": 1.5},
    "results": {"arm": "ropd", "seed": 0, "step": 40, "accuracy": 0.5},
}
BAD = {  # name of a type in records -> values that are not of it
    "ID": ["", None, 1.5, True, ["p1"]],
    "COUNT": [-1, 1.0, "1", None, True],
    "TEXT": [None, 3, ["a"], {}],
    "NUMBER": ["1", None, True, float("nan"), float("inf"), [1]],
    "MESSAGES": [
        [],
        "hello",
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": None}],
        ["x"],
        None,
        {},
    ],
    "POLICY": [None, "m", {}, {"model": None}, []],
    "FINISH": [None, "eos", "", 1, ["stop"]],
    "IDS": [None, "12", [1.0], [-1], [True], [None], [[1]], {}],
    "MASK": [None, [2], [True], [0.5], ["1"], 1],
    "LOGPROBS": [None, [0.5], [float("nan")], [float("-inf")], ["-1"], [None], [False], -1.0],
    "WEIGHTS": [None, [-0.5], [float("nan")], [float("inf")], ["1"], [None], [True], 1.0],
    "NUMBERS": [None, ["1"], [float("nan")], [None], [True], 1.0],
    "PACKED": [None, {}, {"dtype": "float32"}, [1], "x"],
    "STEPS": [
        None,
        [[0, 1]],
        [1],
        "x",
        {},
        [["0", 1, True]],
        [[0, None, True]],
        [[0, 1, 1]],
        [[0, 1, "ok"]],
    ],
    "CALLS": [
        None,
        {},
        ["x"],
        [{"output": "2"}],
        [{"ok": True}],
        [{"output": 2, "ok": True}],
        [{"output": "2", "ok": 1}],
    ],
    "TOPK": [
        None,
        {},
        {"ids": PACKED},
        {"ids": [1], "logprobs": [2]},
        {"ids": PACKED, "logprobs": {"dtype": "float32"}},
    ],
    "CRITERIA": [None, [], {}, ["c"], [{"id": "c", "category": "a", "criterion": "b"}]]
    + [
        [GOOD["rubrics"]["criteria"][0] | change]
        for change in (
            {"points": 0},
            {"points": 6},
            {"points": 2.0},
            {"points": True},
            {"points": -1},
            {"id": ""},
            {"id": 1},
            {"criterion": ""},
            {"category": None},
        )
    ],
    "REWARD": ["1", True, float("nan"), float("inf"), [0.5]],
    "STATUS": [None, "OK", "", 0, ["ok"]],
}


def write_lines(path, lines):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def reward(i, **more):
    return {
        "id": i,
        "sample": 0,
        "reward": 0.5,
        "status": "ok",
        "rollout": "0123456789ab",
        "grader": "check",
    } | more


def failed(i):
    return reward(i, reward=None, status="failed")


def problem_of(path, kind):
    with pytest.raises(BadInput) as caught:
        list(read(path, kind))
    return str(caught.value)


def python(code, *argv, **kwargs):
    """Runs code that may import records; its stdout, stderr and exit code."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        **kwargs,
    )


# ---- validation


@pytest.mark.parametrize("kind", GOOD)
def test_good_records_are_read_back_as_they_are(tmp_path, kind):
    assert set(GOOD) == set(records.KINDS)
    odd = GOOD[kind] | {"of_somebody_else": {"deep": [None, 1e300, "ü"]}, "": 0}
    path = write_lines(tmp_path / "x.jsonl", [odd])
    assert list(read(path, kind)) == [odd], "keys that are not listed pass through"
    assert files.guess_kind(path) == kind


FIELDS = [
    (kind, field, type_, field in records.KINDS[kind].required)
    for kind in GOOD
    for field, type_ in (records.KINDS[kind].required | records.KINDS[kind].optional).items()
]
UNIT = next(type_ for _, field, type_, _ in FIELDS if field == "units")
WRONG = {getattr(records, name): values for name, values in BAD.items()}
WRONG[UNIT] = [None, [[0, 1]], [[0, 1, 0, -1]], [[0, 1, 0, 1.0]], [1], "x", {}]


@pytest.mark.parametrize("kind,field,type_,required", FIELDS)
def test_wrong_and_missing_fields_are_named_with_file_and_line(
    tmp_path, kind, field, type_, required
):
    good = GOOD[kind]
    if required:
        without = {k: v for k, v in good.items() if k != field}
        path = write_lines(tmp_path / "x.jsonl", [without])
        assert problem_of(path, kind) == (
            f"{path}:1: {field}: expected {type_.expected}, but the field is missing"
        )
    second = {"id": "other"} if "id" in good else {}
    for value in WRONG.get(type_, []):
        path = write_lines(tmp_path / "x.jsonl", [good, good | second | {field: value}])
        message = problem_of(path, kind)
        assert message.startswith(f"{path}:2: {field}: expected {type_.expected}, got "), (
            value,
            message,
        )


def test_every_type_has_bad_examples():
    assert {type_ for _, _, type_, _ in FIELDS} - {records.ANY} == set(WRONG)


@pytest.mark.parametrize("line", ["[]", "7", "null", '"text"', "true", "[{}]"])
def test_a_line_must_be_an_object(tmp_path, line):
    path = write_lines(tmp_path / "x.jsonl", [line])
    assert f"{path}:1: expected a JSON object, got {line}" == problem_of(path, "metrics")


@pytest.mark.parametrize(
    "change,field",
    [
        ({"steps": [[0, 3, None]]}, "steps"),
        ({"steps": [[1, 2, True], [0, 1, None]]}, "steps"),
        ({"steps": [[0, 2, True], [1, 2, None]]}, "steps"),
        ({"steps": [[-1, 2, None]]}, "steps"),
        ({"steps": []}, "steps"),
        ({"steps": [[0, 1, None]]}, "loss_mask"),
        ({"steps": [[1, 2, None]]}, "loss_mask"),
        ({"loss_mask": [1]}, "loss_mask"),
        ({"logprobs": [-1.0] * 3}, "logprobs"),
        ({"prompt_ids": []}, "prompt_ids"),
        ({"response_ids": []}, "loss_mask"),
    ],
)
def test_per_token_lists_have_one_value_a_token(tmp_path, change, field):
    path = write_lines(tmp_path / "x.jsonl", [ROLLOUT | change])
    assert problem_of(path, "rollouts").startswith(f"{path}:1: {field}: expected ")


def test_an_empty_response_is_a_rollout(tmp_path):
    empty = ROLLOUT | {"response_ids": [], "loss_mask": [], "logprobs": [], "text": ""}
    assert list(read(write_lines(tmp_path / "x.jsonl", [empty]), "rollouts")) == [empty]


def test_a_prompt_has_messages_or_a_prompt(tmp_path):
    for bad in ({"id": 1}, GOOD["prompts"] | {"prompt": "x"}):
        assert "exactly one of `messages` and `prompt`" in problem_of(
            write_lines(tmp_path / "x.jsonl", [bad]), "prompts"
        )
    assert (
        len(list(read(write_lines(tmp_path / "x.jsonl", [{"id": 1, "prompt": ""}]), "prompts")))
        == 1
    )


def test_a_reward_is_null_exactly_when_it_failed(tmp_path):
    for bad in ({"reward": None}, {"status": "failed"}, {"status": "failed", "reward": 0}):
        assert ":1: reward: expected null exactly when" in problem_of(
            write_lines(tmp_path / "x.jsonl", [reward(1) | bad]), "rewards"
        )
    assert len(list(read(write_lines(tmp_path / "x.jsonl", [failed(1)]), "rewards"))) == 1


def test_long_values_are_shortened_in_messages(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [ROLLOUT | {"text": ["x" * 100_000]}])
    assert len(problem_of(path, "rollouts")) < 300 + len(str(path))


# ---- damaged files


def test_missing_empty_and_folder(tmp_path):
    assert "there is no such file" in problem_of(tmp_path / "absent.jsonl", "prompts")
    assert "there is no such file" in problem_of(tmp_path, "prompts")
    (tmp_path / "empty.jsonl").touch()
    assert "the file is empty" in problem_of(tmp_path / "empty.jsonl", "prompts")


def test_a_file_of_blank_lines_is_empty(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n \n\n")
    assert "empty" in problem_of(tmp_path / "x.jsonl", "metrics")


def test_blank_lines_crlf_and_bom_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    first, second = (
        json.dumps(reward(i, note="ü\u2028"), ensure_ascii=False).encode() for i in (1, 2)
    )
    path.write_bytes(b"\xef\xbb\xbf" + first + b"\r\n\r\n   \n" + second + b"\r\n")
    assert [r["id"] for r in read(path, "rewards")] == [1, 2]
    table = Table(path, "rewards")
    assert (
        table[("2", 0)]["id"] == 2
        and table[("1", 0)]["note"] == "ü\u2028"
        and table.where(("2", 0)) == f"{path}:4"
    )


def test_line_numbers_count_blank_lines(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [reward(1), "", reward(2, status="bad")])
    assert problem_of(path, "rewards").startswith(f"{path}:3: status: ")


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": 1, "text": "\xff\xfe"}',
        b"\xff\xfe\x00\x00",
        b"{'id': 1}",
        b'{"id": 1,}',
        b'{"id": 1} {"id": 2}',
        b"\x00\x00\x00",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    ],
    ids=[
        "latin",
        "utf-32 mark",
        "quotes",
        "comma",
        "two",
        "zeros",
        "braces",
        "brackets",
        "deep",
    ],
)
def test_lines_that_are_not_json_are_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(reward(1)).encode() + b"\n" + line + b"\n")
    message = problem_of(path, "rewards")
    assert message.startswith(f"{path}:2: expected one JSON object a line, got ") and len(
        message
    ) < 1000 + len(str(path))


@pytest.mark.parametrize(
    "number", ["1" + "0" * 400, "-1" + "0" * 400, "1e999", "NaN", "-Infinity", "1" * 5000]
)
def test_numbers_no_float_can_hold_are_bad_input(tmp_path, number):
    path = write_lines(
        tmp_path / "x.jsonl", ['{"arm": "a", "seed": 0, "step": 0, "accuracy": ' + number + "}"]
    )
    assert problem_of(path, "results").startswith(f"{path}:1: ")


@pytest.mark.parametrize(
    "tail",
    [b'{"id": 2, "sam', b'{"id": 2, "sample": 0, "grader": "\xc3', b"{", b"\x00\x00\x00\x00"],
)
def test_a_torn_last_line_stops_the_reader_and_is_mended_by_the_writer(tmp_path, tail):
    path = tmp_path / "x.jsonl"
    with Writer(path, "rewards", {}) as out:
        out.write(reward(1))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert f"{path}:2: the last line is torn" in problem_of(path, "rewards")
    with Writer(path, "rewards", {}) as out:
        assert out.done == {("1", 0)}
        assert path.read_bytes() == whole
        out.write(reward(2))
    assert [r["id"] for r in read(path, "rewards")] == [1, 2]


def test_a_torn_only_line_leaves_an_empty_file_to_go_on_with(tmp_path):
    path = tmp_path / "x.jsonl"
    with Writer(path, "rewards", {}) as out:
        out.write(reward(1))
    path.write_bytes(path.read_bytes()[:-9])
    with Writer(path, "rewards", {}) as out:
        assert out.done == set()
        out.write(reward(1))
    assert [r["id"] for r in read(path, "rewards")] == [1]


def test_a_torn_line_longer_than_a_block_is_cut_at_its_start(tmp_path):
    path = tmp_path / "x.jsonl"
    with Writer(path, "rewards", {}) as out:
        out.write(reward(1))
    whole = path.read_bytes()
    for length in (65_535, 65_536, 65_537, 200_000):
        path.write_bytes(whole + b'{"x": "' + b"y" * (length - 7))
        Writer(path, "rewards", {})._file.close()
        assert path.read_bytes() == whole, length


def test_a_complete_last_line_without_newline_is_read_and_never_glued(tmp_path):
    path = tmp_path / "x.jsonl"
    with Writer(path, "rewards", {}) as out:
        out.write(reward(1), reward(2))
    path.write_bytes(path.read_bytes()[:-1])
    assert [r["id"] for r in read(path, "rewards")] == [1, 2]
    with Writer(path, "rewards", {}) as out:
        out.write(*(reward(i) for i in (1, 2, 3) if (str(i), 0) not in out))
    assert sorted(r["id"] for r in read(path, "rewards")) == [1, 2, 3]


def test_damage_in_the_middle_is_never_mended_silently(tmp_path):
    path = tmp_path / "x.jsonl"
    with Writer(path, "rewards", {}) as out:
        out.write(*(reward(i) for i in range(3)))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:30] + b"\n" + lines[2])
    with pytest.raises(BadInput, match=":2: expected one JSON object"):
        Writer(path, "rewards", {})
    assert path.read_bytes() == lines[0] + lines[1][:30] + b"\n" + lines[2]


@pytest.mark.parametrize(
    "kind,second", [("rewards", {"id": "7"}), ("rewards", {}), ("prompts", {"id": "7"})]
)
def test_duplicates_are_refused_and_7_is_the_string_7(tmp_path, kind, second):
    path = write_lines(
        tmp_path / "x.jsonl", [GOOD[kind] | {"id": 7}, GOOD[kind] | {"id": 7} | second]
    )
    assert problem_of(path, kind).startswith(f"{path}:2: duplicate key: id ")
    with pytest.raises(BadInput, match="duplicate"):
        Table(path, kind)


def test_other_samples_and_unlike_ids_are_no_duplicates(tmp_path):
    rows = [reward(7), reward(7, sample=1), reward("07"), reward(-1), reward(-2), reward("7 ")]
    assert len(list(read(write_lines(tmp_path / "x.jsonl", rows), "rewards"))) == 6
    assert (
        len(
            list(read(write_lines(tmp_path / "m.jsonl", [{"step": 1}, {"step": 1}]), "metrics"))
        )
        == 2
    )


# ---- packed arrays, floats

DTYPES = ["float16", "float32", "float64", "int32", "int64", "uint16", "uint8"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_round_trip(dtype):
    array = (np.random.default_rng(0).normal(size=(5, 4)) * 50).astype(dtype)
    for view in (
        array,
        array.T,
        array[::2, 1::2],
        array[::-1],
        np.asfortranarray(array),
        array.astype(array.dtype.newbyteorder(">")),
        array[:0],
        array[:, :0],
        array[:1, :1],
        np.broadcast_to(array[0], (3, 4)),
    ):
        packed = json.loads(json.dumps(records.pack(view)))
        back = records.unpack(packed)
        assert (
            back.dtype == np.dtype(dtype)
            and back.shape == view.shape
            and np.array_equal(back, view)
        )
        assert back.flags.writeable and back.flags.c_contiguous
    assert (
        base64.b64decode(records.pack(np.array([[1]], dtype=">i4"))["data"])
        == b"\x01\x00\x00\x00"
    ), "little-endian on disk"


def test_pack_keeps_nan_infinity_and_the_sign_of_zero():
    array = np.array([[np.nan, np.inf, -np.inf, -0.0]], dtype=np.float32)
    assert records.unpack(records.pack(array)).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((1, 1), dtype=bool),
        np.zeros((1, 1), dtype=np.int16),
        np.array([[{}]]),
        np.array([["a"]]),
        np.zeros((1, 1), complex),
    ],
    ids=["bool", "int16", "object", "string", "complex"],
)
def test_pack_refuses_what_unpack_cannot_read(array):
    with pytest.raises(ValueError):
        records.pack(array)


GOOD_PACK = {"dtype": "float32", "shape": [2, 3], "data": PACKED["data"]}


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "object"},
        {"dtype": "O"},
        {"dtype": None},
        {"dtype": "float33"},
        {"dtype": ["float32"]},
        {"dtype": "float64"},
        {"shape": [3, 3]},
        {"shape": [2]},
        {"data": PACKED["data"][:-4]},
        {"data": PACKED["data"][:-1]},
        {"data": ""},
        {"data": "*" * 32},
        {"data": "é" * 32},
        {"data": None},
        {"data": 7},
        {"shape": None},
        {"shape": 6},
        {"shape": ["2", "3"]},
        {"shape": [-2, -3]},
        {"shape": [2.0, 3.0]},
        {"shape": [2, 3, -1]},
    ],
    ids=str,
)
def test_damaged_packs_are_bad_input(change):
    with pytest.raises(BadInput, match="packed array"):
        records.unpack(GOOD_PACK | change)


def test_floats_are_exact_float32():
    bits = (
        np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    )
    values = bits.view(np.float32)
    values = np.concatenate(
        [
            values[np.isfinite(values)],
            np.float32([0, -0.0, 1e-45, -1e-45, 3.4028235e38, 1 / 3, -1e-8]),
        ]
    )
    back = np.array(json.loads(json.dumps(records.floats(values))), dtype=np.float32)
    assert back.tobytes() == values.tobytes()
    assert len(json.dumps(records.floats([-1 / 3]))) <= 16, "not the 17 digits of a float64"
    assert records.floats([]) == []


# ---- fingerprint, Table, record_for


def test_fingerprint_changes_with_text_and_tokens_only():
    same = records.fingerprint(ROLLOUT)
    assert (
        len(same) == 12
        and records.fingerprint(ROLLOUT | {"id": 9, "logprobs": [-9, -9], "temperature": 2})
        == same
    )
    assert (
        len(
            {
                same,
                records.fingerprint(ROLLOUT | {"text": "#3"}),
                records.fingerprint(ROLLOUT | {"response_ids": [8, 7]}),
                records.fingerprint({k: v for k, v in ROLLOUT.items() if k != "response_ids"}),
            }
        )
        == 4
    )


def test_fingerprint_tells_the_same_short_answer_to_another_prompt():
    """Terse answers repeat across prompts; a regenerated prompt file has the same ids and other
    questions."""
    assert records.fingerprint(ROLLOUT | {"prompt_ids": [6, 5]}) != records.fingerprint(ROLLOUT)


def test_table_reads_any_record_in_any_order(tmp_path):
    rows = [reward(f"ü{i}" if i % 2 else i, note="é" * (i % 17)) for i in range(500)]
    path = write_lines(tmp_path / "x.jsonl", rows)
    table = Table(path, "rewards")
    assert len(table) == 500 and list(table) == rows
    for i in np.random.default_rng(0).permutation(500):
        key = records.key_of(rows[i], "rewards")
        assert key in table and table[key] == rows[i] and table.where(key) == f"{path}:{i + 1}"
    assert ("nobody", 0) not in table and (0, 0) not in table, "keys hold the id as a string"
    with pytest.raises(KeyError):
        table[("nobody", 0)]
    iterator = iter(table)
    assert [next(iterator)["id"], table[("498", 0)]["id"], next(iterator)["id"]] == [
        0,
        498,
        "ü1",
    ], "reading within a walk"


def test_table_may_be_read_by_many_threads(tmp_path):
    """The stages that ask a server look records up in worker threads: a shared file position
    would mix records up."""
    rows = [reward(i, note="x" * (i % 3000)) for i in range(400)]
    table = Table(write_lines(tmp_path / "x.jsonl", rows), "rewards")

    def look_up(seed):
        order = np.random.default_rng(seed).permutation(400)
        return sum(table[records.key_of(rows[i], "rewards")] != rows[i] for i in order)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(look_up, range(16))) == 0
    finally:
        sys.setswitchinterval(switch)


def score(of, **more):
    return {
        "id": of["id"],
        "sample": of["sample"],
        "policy": POLICY,
        "rollout": records.fingerprint(of),
        "logprobs": [-1.0] * len(of["response_ids"]),
    } | more


def test_partner_joins_by_fingerprint(tmp_path):
    first, second = ROLLOUT, ROLLOUT | {"id": "p2", "text": "#3"}
    rollouts = Table(write_lines(tmp_path / "rollouts.jsonl", [first, second]), "rollouts")

    def join(kind, *rows):
        return files.record_for(
            Table(write_lines(tmp_path / f"{kind}.jsonl", rows), kind), second, rollouts
        )

    assert join("scores", score(first), score(second))["id"] == "p2"
    assert join("rewards", reward("p2", rollout=records.fingerprint(second)))["reward"] == 0.5
    with pytest.raises(
        BadInput,
        match=r"scores\.jsonl: expected a record for id 'p2', sample 0 .*rollouts\.jsonl:2",
    ):
        join("scores", score(first))
    with pytest.raises(
        BadInput, match=r"scores\.jsonl:2: rollout: expected .* were made for other rollouts"
    ):
        join("scores", score(first), score(second, rollout=records.fingerprint(first)))
    with pytest.raises(BadInput, match=r"rewards\.jsonl:1: rollout: expected"):
        join("rewards", reward("p2"))
    with pytest.raises(
        BadInput,
        match=r"scores\.jsonl:1: logprobs: expected 2 values, one per response token, got 1",
    ):
        join("scores", score(second, logprobs=[-1.0]))
    three_tokens = records.pack(np.zeros((3, 4), dtype=np.int32))
    with pytest.raises(BadInput, match=r"scores\.jsonl:1: topk: expected"):
        join("scores", score(second, topk={"ids": three_tokens, "logprobs": three_tokens}))


def test_memory_stays_far_below_a_list_of_records(tmp_path):
    path, count = tmp_path / "rewards.jsonl", 200_000
    with open(path, "w") as f:
        f.writelines(
            json.dumps(reward(f"prompt-{i:07d}", verdicts={"c1": True, "c2": False})) + "\n"
            for i in range(count)
        )

    def peak(use):
        tracemalloc.start()
        use()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most / count

    assert 2 < peak(lambda: sum(r["reward"] for r in read(path, "rewards"))) < 150, (
        "bytes a record"
    )
    count = 20_000
    with open(path) as f:
        assert peak(lambda: [json.loads(line) for line, _ in zip(f, range(count))]) > 600, (
            "what the bound is held against"
        )


def test_table_memory_is_what_the_header_says(tmp_path):
    count = 50_000
    path = write_lines(
        tmp_path / "rewards.jsonl", [reward(f"prompt-{i:07d}") for i in range(count)]
    )
    tracemalloc.start()
    table = Table(path, "rewards")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    said = int(re.search(r"about (\d+) bytes a record", files.__doc__)[1])
    assert len(table) == count and said / 1.5 < kept / count < 1.2 * said


# ---- Writer


def test_writer_refuses_bad_records_and_leaves_the_file_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    with Writer(path, "rewards", {}) as out:
        out.write(reward(1))
        with pytest.raises(ValueError, match="refusing to write a bad record: status"):
            out.write(reward(2), reward(3, status="perhaps"))
        with pytest.raises(ValueError):
            out.write(reward(4, extra=float("nan")))
        with pytest.raises((TypeError, ValueError)):
            out.write(reward(5, extra=np.float32(1)))
        assert ("2", 0) not in out and ("4", 0) not in out
    assert [r["id"] for r in read(path, "rewards")] == [1]


def test_writer_refuses_a_key_it_has_written(tmp_path):
    """A double record would make the file unreadable for every later stage, and for the resume
    itself."""
    path = tmp_path / "x.jsonl"
    with Writer(path, "rewards", {}) as out:
        out.write(reward(7))
        with pytest.raises(ValueError):
            out.write(reward("7"))
        with pytest.raises(ValueError):
            out.write(reward(8), reward(8))
    assert [r["id"] for r in read(path, "rewards")] == [7]


def test_writer_keeps_non_ascii_text_and_line_separators(tmp_path):
    text = 'ü 語 😀 \u2028 \u0085 \x00 \n \r " \\'
    with Writer(tmp_path / "x.jsonl", "evals", {}) as out:
        out.write({"id": 1, "sample": 0, "text": text, "correct": False})
    assert next(read(tmp_path / "x.jsonl", "evals"))["text"] == text
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 1


def test_half_a_surrogate_pair_survives_reading_and_writing(tmp_path):
    """JSON can carry it ("\\ud83d"), UTF-8 cannot; a file a reader accepts must not stop the
    next writer."""
    source = write_lines(
        tmp_path / "in.jsonl", [r'{"id": 1, "sample": 0, "text": "\ud83d", "correct": false}']
    )
    record = next(read(source, "evals"))
    with Writer(tmp_path / "x.jsonl", "evals", {}) as out:
        out.write(record)
    assert next(read(tmp_path / "x.jsonl", "evals")) == record


def test_not_a_number_in_unlisted_keys_cannot_travel(tmp_path):
    """A reader that lets NaN in hands it to a writer that cannot write it."""
    path = write_lines(
        tmp_path / "x.jsonl",
        ['{"id": 1, "sample": 0, "text": "", "correct": false, "extra": NaN}'],
    )
    assert problem_of(path, "evals").startswith(f"{path}:1: ")


SETTINGS = {"model": "m", "seed": 0, "shape": (1, 2), "path": Path("x")}


def begin(tmp_path, **kwargs):
    path, source = (
        tmp_path / "x.jsonl",
        write_lines(tmp_path / "in.jsonl", [reward(1), reward(2)]),
    )
    with Writer(path, "rewards", SETTINGS, [source], **kwargs) as out:
        out.write(reward(1))
    return path, source


def test_resume_with_the_same_settings(tmp_path):
    path, source = begin(tmp_path)
    with Writer(path, "rewards", dict(reversed(SETTINGS.items())), [source]) as out:
        assert ("1", 0) in out and ("2", 0) not in out
        out.write(reward(2))
        assert ("2", 0) in out
    assert [r["id"] for r in read(path, "rewards")] == [1, 2]


@pytest.mark.parametrize(
    "settings,message",
    [
        (SETTINGS | {"seed": 1}, "was begun with seed = 0, now it is 1"),
        (SETTINGS | {"new": 1}, "was begun with new = null, now it is 1"),
        ({"model": "m", "seed": 0}, "was begun with path = "),
        (SETTINGS | {"model": None}, 'model = "m", now it is null'),
    ],
)
def test_resume_with_other_settings_is_refused(tmp_path, settings, message):
    path, source = begin(tmp_path)
    before = path.read_bytes(), (tmp_path / "x.jsonl.run.json").read_bytes()
    with pytest.raises(BadInput) as caught:
        Writer(path, "rewards", settings, [source])
    assert message in str(caught.value) and "--overwrite" in str(caught.value)
    assert (path.read_bytes(), (tmp_path / "x.jsonl.run.json").read_bytes()) == before


def test_an_input_may_grow_but_not_change(tmp_path):
    path, source = begin(tmp_path)
    with open(source, "a") as f:
        f.write(json.dumps(reward(3)) + "\n")
    Writer(path, "rewards", SETTINGS, [source])._file.close()
    grown = source.read_text()
    for changed in (
        grown.replace("0.5", "0.6", 1),
        grown[:-1],
        grown[:40],
        "",
        grown.replace("check", "judge"),
    ):
        source.write_text(changed)
        with pytest.raises(
            BadInput, match=r"was made from .*in\.jsonl, which has changed since"
        ):
            Writer(path, "rewards", SETTINGS, [source])


def test_another_input_is_refused(tmp_path):
    """Rule 3 of the header: a resumed file must be made from the same inputs."""
    path, source = begin(tmp_path)
    other = write_lines(tmp_path / "other.jsonl", [reward(8), reward(9)])
    for inputs in ([other], [source, other], []):
        with pytest.raises(BadInput):
            Writer(path, "rewards", SETTINGS, inputs)


def test_the_same_input_in_another_place_is_accepted(tmp_path):
    path, source = begin(tmp_path)
    moved = source.rename(tmp_path / "moved.jsonl")
    Writer(path, "rewards", SETTINGS, [moved])._file.close()


def test_an_output_that_is_its_own_input_is_refused(tmp_path):
    """`--out` typed as the input's name: --overwrite must not delete the data it was to be made
    from."""
    source = write_lines(tmp_path / "in.jsonl", [reward(1)])
    for out in (source, tmp_path / "." / "in.jsonl"):
        with pytest.raises(BadInput):
            Writer(out, "rewards", {}, [source], overwrite=True)
        assert len(list(read(source, "rewards"))) == 1


def test_overwrite_deletes_nothing_when_an_input_is_missing(tmp_path):
    path, _ = begin(tmp_path)
    with pytest.raises(BadInput):
        Writer(path, "rewards", SETTINGS, [tmp_path / "absent.jsonl"], overwrite=True)
    assert len(list(read(path, "rewards"))) == 1


def test_a_missing_sidecar_is_refused(tmp_path):
    path, source = begin(tmp_path)
    (tmp_path / "x.jsonl.run.json").unlink()
    with pytest.raises(BadInput, match=r"expected x\.jsonl\.run\.json beside it"):
        Writer(path, "rewards", SETTINGS, [source])
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_sidecar_is_bad_input(tmp_path, content):
    path, source = begin(tmp_path)
    (tmp_path / "x.jsonl.run.json").write_text(content)
    with pytest.raises(BadInput):
        Writer(path, "rewards", SETTINGS, [source])


def test_overwrite_begins_anew(tmp_path):
    path, source = begin(tmp_path)
    with Writer(path, "rewards", {"seed": 5}, [], overwrite=True) as out:
        assert ("1", 0) not in out
        out.write(reward(9))
    assert [r["id"] for r in read(path, "rewards")] == [9]
    Writer(path, "rewards", {"seed": 5}, [])._file.close()


def test_writer_makes_the_folder(tmp_path):
    with Writer(tmp_path / "a" / "b" / "x.jsonl", "rewards", {}) as out:
        out.write(reward(1))
    assert len(list(read(tmp_path / "a" / "b" / "x.jsonl", "rewards"))) == 1


def test_retry_drops_failed_records_and_makes_them_again(tmp_path):
    path = tmp_path / "x.jsonl"
    with Writer(path, "rewards", {}) as out:
        out.write(reward(1), failed(2), reward(3, note="é"), failed(4))
    kept = path.read_bytes().splitlines(keepends=True)
    with Writer(path, "rewards", {}) as out:
        assert len(out.done) == 4, "without retry a failure is a result"
    with Writer(path, "rewards", {}, retry=lambda r: r["status"] == "failed") as out:
        assert out.done == {("1", 0), ("3", 0)} and path.read_bytes() == kept[0] + kept[2]
        out.write(reward(4), failed(2))
    assert [(r["id"], r["status"]) for r in read(path, "rewards")] == [
        (1, "ok"),
        (3, "ok"),
        (4, "ok"),
        (2, "failed"),
    ]
    with Writer(path, "rewards", {}, retry=lambda r: True) as out:
        assert out.done == set() and path.read_bytes() == b""


WRITE_MANY = """
import resource, signal, sys
from opd import files
def main():
    path, count, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with files.Writer(path, "rewards", {"seed": 0}) as out:
        if limit:  # a file may not grow beyond this: the same failure as a full disk
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for i in range(0, count, 5):
            rest = {"sample": 0, "reward": 0.5, "status": "ok"}
            rest |= {"rollout": "x" * 50, "grader": "check"}
            new = [{"id": j} | rest for j in range(i, i + 5)]
            out.write(*(r for r in new if (str(r["id"]), 0) not in out))
            if i == 0:
                print("begun", flush=True)
files.run(main)
"""


@pytest.mark.parametrize("limit", [10_000, 10_001, 10_137])
def test_a_full_disk_leaves_whole_lines_and_a_rerun_completes(tmp_path, limit):
    path = tmp_path / "x.jsonl"
    stopped = python(WRITE_MANY, path, 500, limit)
    assert stopped.returncode == 2, stopped.stderr
    assert (
        stopped.stderr.startswith("error: ")
        and stopped.stderr.count("\n") == 1
        and "could not append" in stopped.stderr
    )
    data = path.read_bytes()
    assert data.endswith(b"\n") and 8000 < len(data) <= limit
    ids = [r["id"] for r in read(path, "rewards")]
    assert ids == list(range(len(ids))) and len(ids) % 5 == 0, "a write is whole or absent"
    assert python(WRITE_MANY, path, 500, 0).returncode == 0
    assert [r["id"] for r in read(path, "rewards")] == list(range(500))


def test_a_disk_that_is_full_from_the_start_is_bad_input_too(tmp_path):
    full = (
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n    "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5, 5))\n"
    )
    code = WRITE_MANY.replace("    with files.Writer", full + "    with files.Writer")
    stopped = python(code, tmp_path / "x.jsonl", 500, 0)
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr, stopped.stderr
    assert python(WRITE_MANY, tmp_path / "x.jsonl", 500, 0).returncode == 0


def test_kill_9_loses_and_doubles_nothing(tmp_path):
    path, count, in_the_middle = tmp_path / "x.jsonl", 20_000, 0
    for pause in (0, 0.01, 0.03, 0.06):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITE_MANY, str(path), str(count), "0"],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        in_the_middle += 0 < path.read_bytes().count(b"\n") < count
    assert in_the_middle, "every kill came too late: this machine needs a larger count"
    assert python(WRITE_MANY, path, count, 0).returncode == 0
    ids = [r["id"] for r in read(path, "rewards")]
    assert ids == list(range(count))


def test_a_cut_at_every_byte_resumes_to_the_same_file(tmp_path):
    """A kill between any two bytes: cut a finished file at every length, go on, compare."""
    path = tmp_path / "x.jsonl"
    wanted = [reward(i, note="é\u2028") for i in range(3)]

    def go_on():
        with Writer(path, "rewards", {}) as out:
            for record in wanted:
                if records.key_of(record, "rewards") not in out:
                    out.write(record)
        return path.read_bytes()

    whole = go_on()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        assert go_on() == whole, length


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "x.json"
    files.write_atomically(path, "old")

    def parts():
        yield "new"
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        files.write_atomically(path, parts())
    assert path.read_text() == "old"
    files.write_atomically(path, iter(["ne", "w ü"]))
    assert path.read_text(encoding="utf-8") == "new ü"


# ---- command lines


def test_check_says_what_a_file_holds(tmp_path, capsys):
    paths = [write_lines(tmp_path / f"{kind}.jsonl", [record]) for kind, record in GOOD.items()]
    files.main(["check", *map(str, paths)])
    assert capsys.readouterr().out == "".join(
        f"{path}: 1 {kind}, all valid\n" for path, kind in zip(paths, GOOD)
    )


@pytest.mark.parametrize(
    "content",
    ["", "{", "7\n", '{"id": 1}\n', (json.dumps(reward(1)) + "\n") * 2, "[" * 100_000 + "\n"],
    ids=["empty", "torn", "number", "no prompt", "duplicate", "deep"],
)
def test_check_exits_with_2_and_one_line(tmp_path, capsys, content):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    assert refusal(files.main, ["check", str(path)], capsys).startswith(f"error: {path}")


def test_check_of_a_missing_file_and_of_another_kind(tmp_path, capsys):
    refusal(files.main, ["check", str(tmp_path / "absent.jsonl")], capsys)
    path = str(write_lines(tmp_path / "x.jsonl", [reward(1)]))
    message = refusal(files.main, ["check", "--kind", "scores", path], capsys)
    assert ":1: policy: expected an object" in message


def test_parser_refuses_abbreviations_and_unknown_flags():
    p = files.parser("Text.\n\n    python x.py --model M")
    p.add_argument("--max-tokens", type=int, default=512, help="longest answer")
    p.add_argument("--overwrite", action="store_true", help="begin anew")
    p.add_argument("--note", help="a 5 %% note")
    for argv in (["--max", "3"], ["--max-token", "3"], ["--over"], ["--nothing"], ["stray"]):
        with pytest.raises(SystemExit) as stopped:
            p.parse_args(argv)
        assert stopped.value.code == 2
    assert p.parse_args(["--max-tokens", "3"]).max_tokens == 3
    shown = p.format_help()
    assert "    python x.py --model M" in shown and "longest answer (default: 512)" in shown
    assert "begin anew\n" in shown and "a 5 % note\n" in shown, (
        "no default where there is nothing to say"
    )


def test_subcommands_of_parser_refuse_abbreviations_too():
    p = files.parser("Text.")
    sub = p.add_subparsers(dest="command").add_parser("answer")
    sub.add_argument("--max-tokens", type=int)
    with pytest.raises(SystemExit):
        p.parse_args(["answer", "--max", "3"])


def test_run_turns_bad_input_into_exit_code_2(capsys):
    def bad():
        raise BadInput("x.jsonl:3: id: expected a, got b")

    def interrupted():
        raise KeyboardInterrupt

    for main, code, text in (
        (bad, 2, "error: x.jsonl:3: id: expected a, got b\n"),
        (interrupted, 130, "stopped"),
    ):
        with pytest.raises(SystemExit) as stopped:
            files.run(main)
        assert stopped.value.code == code and capsys.readouterr().err.startswith(text)
    with pytest.raises(RuntimeError):  # a bug is not bad input: it keeps its traceback
        files.run(lambda: (_ for _ in ()).throw(RuntimeError("bug")))


@pytest.mark.parametrize(
    "first",
    ["", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\ufeff{}", "7", '"x"', "[[]]"],
    ids=["blank", "deep", "digits", "bom", "number", "string", "list"],
)
def test_guess_kind_guesses_prompts_when_it_cannot_tell(tmp_path, first):
    assert files.guess_kind(write_lines(tmp_path / "x.jsonl", [first])) == "prompts"


def test_guess_kind_looks_past_blank_lines_and_a_bom(tmp_path):
    path = tmp_path / "x.jsonl"
    for mark in (b"\n", b"\xef\xbb\xbf"):
        path.write_bytes(mark + json.dumps(reward(1)).encode() + b"\n")
        assert files.guess_kind(path) == "rewards"


def test_guess_kind_tells_a_black_box_answer_with_logprobs_from_a_score(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [GOOD["answers"] | {"logprobs": [-1.0]}])
    assert list(read(path, "answers")) and files.guess_kind(path) == "answers"


def test_two_writers_of_one_file_are_refused(tmp_path):
    with files.Writer(tmp_path / "w.jsonl", "rewards", {}):
        with pytest.raises(BadInput, match="another process"):
            files.Writer(tmp_path / "w.jsonl", "rewards", {})
        with pytest.raises(BadInput, match="another process"):
            files.Writer(tmp_path / "w.jsonl", "rewards", {}, overwrite=True)
    files.Writer(tmp_path / "w.jsonl", "rewards", {}).__exit__()


# ---- fill


def test_fill_makes_what_is_missing_once_and_in_order(tmp_path):
    path = tmp_path / "x.jsonl"
    keys = [(str(i), 0) for i in range(5)]
    asked = []

    def work(missing):
        asked.append(missing)
        yield reward(int(missing[0][0]))
        yield [reward(int(i)) for i, _ in missing[1:3]]  # a batch
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.fill(path, "rewards", keys, work, {})
    assert [r["id"] for r in read(path, "rewards")] == [0, 1, 2], "every result is on disk"

    def rest(missing):
        asked.append(missing)
        return (reward(int(i)) for i, _ in missing)

    for _ in range(2):
        assert files.fill(path, "rewards", keys, rest, {}) == (5, [])
    assert asked == [keys, keys[3:]], "a finished file asks for nothing"
    with pytest.raises(BadInput, match="was begun with"):
        files.fill(path, "rewards", keys, rest, {"seed": 1})


def test_fill_counts_failures_and_stops_beyond_the_limit(tmp_path):
    path = tmp_path / "x.jsonl"
    keys = [(str(i), 0) for i in range(10)]

    def half(missing):
        return [RuntimeError(i) if int(i) % 2 else reward(int(i)) for i, _ in missing]

    limit = files.FailureLimit(rate=0.5, first=2, advice="look")
    written, failures = files.fill(path, "rewards", keys, half, {}, limit=limit)
    assert written == 5 and [str(f) for f in failures] == ["1", "3", "5", "7", "9"]
    with pytest.raises(
        BadInput, match=r"2 of 10 requests failed, 5 succeeded .*last: 3\): look"
    ):
        files.fill(path, "rewards", keys, half, {}, limit=limit._replace(rate=0.1))
    none = lambda missing: (RuntimeError(i) for i in missing)  # noqa: E731
    with pytest.raises(BadInput, match="2 of 10 requests failed, 0 succeeded"):
        files.fill(
            tmp_path / "y.jsonl", "rewards", keys, none, {}, limit=limit._replace(rate=1)
        )


def test_fill_writes_null_judgements_counts_them_and_asks_again(tmp_path):
    path = tmp_path / "x.jsonl"
    keys = [(str(i), 0) for i in range(4)]
    make = {"failed": lambda i: failed(i) if i == 2 else reward(i), "ok": reward}
    for kind, wanted in (("failed", ["failed"]), ("ok", [])):
        written, failures = files.fill(
            path,
            "rewards",
            keys,
            lambda missing: [make[kind](int(i)) for i, _ in missing],
            {},
            failure_of=lambda r: r["status"] == "failed" and r["status"],
            limit=files.FailureLimit(rate=0.5),
        )
        assert (written, failures) == (4, wanted)
