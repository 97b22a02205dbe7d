"""opd/served.py against a fake server: what is sent, what is believed, what is retried, and how
it fails."""

import logging
import os
import sys
import threading
from argparse import ArgumentParser
from pathlib import Path

import pytest

from opd import served

pytest.importorskip("openai")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from fake_server import END, VOCABULARY, FakeServer, distribution  # noqa: E402

from opd.records import BadInput
from opd.served import ServedFailure, Server

ASK = [{"role": "user", "content": "2+2=?"}]
SAMPLING = dict(max_tokens=7, temperature=0.7, top_p=0.9, seed=11)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    import openai._base_client as client

    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(client, "MAX_RETRY_DELAY", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("FAKE_KEY", "sk-very-secret-1234567890")


def connect(fake, max_retries=2, timeout=5.0, concurrency=3):
    return Server(
        fake.base_url,
        "m",
        "FAKE_KEY",
        concurrency=concurrency,
        max_retries=max_retries,
        timeout=timeout,
    )


# ---- what is sent


def test_every_sampling_field_is_sent_and_vllm_fields_only_with_tokens():
    with FakeServer() as fake:
        server = connect(fake)
        for prompt in (ASK, "2+2="):
            for need_tokens in (True, False):
                server.sample(prompt, need_tokens=need_tokens, **SAMPLING)
                body = fake.requests[-1]["body"]
                assert {
                    k: body[k]
                    for k in (
                        "model",
                        "max_tokens",
                        "temperature",
                        "top_p",
                        "seed",
                        "n",
                        "presence_penalty",
                        "frequency_penalty",
                    )
                } == {
                    "model": "m",
                    "max_tokens": 7,
                    "temperature": 0.7,
                    "top_p": 0.9,
                    "seed": 11,
                    "n": 1,
                    "presence_penalty": 0,
                    "frequency_penalty": 0,
                }
                vllm = {
                    k: body[k]
                    for k in ("top_k", "min_p", "repetition_penalty", "return_token_ids")
                    if k in body
                }
                assert vllm == (
                    {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "return_token_ids": True}
                    if need_tokens
                    else {}
                )
                assert bool(body.get("logprobs")) == need_tokens
        assert [r["path"] for r in fake.requests] == ["/v1/chat/completions"] * 2 + [
            "/v1/completions"
        ] * 2
        assert (
            fake.requests[0]["headers"]["authorization"] == "Bearer sk-very-secret-1234567890"
        )


def test_template_options_reach_the_chat_template():
    with FakeServer() as fake:
        connect(fake).sample(
            ASK, need_tokens=False, template_options={"enable_thinking": False}, **SAMPLING
        )
        assert fake.requests[0]["body"]["chat_template_kwargs"] == {"enable_thinking": False}


def test_flags_reach_the_server_and_an_unset_key_is_EMPTY(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    parser = ArgumentParser()
    parser.add_argument("--model")
    served.add_flags(parser)
    with FakeServer(always="500") as fake:
        args = parser.parse_args(
            [
                "--model",
                "m2",
                "--base-url",
                fake.base_url + "/",
                "--api-key-env",
                "NO_SUCH_KEY",
                "--concurrency",
                "2",
                "--max-retries",
                "1",
                "--timeout",
                "3",
            ]
        )
        server = Server.from_flags(args)
        assert (
            server.base_url == fake.base_url
            and server.concurrency == 2
            and server._client.timeout == 3
        )
        with pytest.raises(ServedFailure):
            server.chat_text(ASK, temperature=0, max_tokens=5)
        assert len(fake.requests) == 2 and fake.requests[0]["body"]["model"] == "m2"
        assert fake.requests[0]["headers"]["authorization"] == "Bearer EMPTY"
    defaults = parser.parse_args([])
    assert (
        defaults.base_url,
        defaults.api_key_env,
        defaults.concurrency,
        defaults.max_retries,
        defaults.timeout,
    ) == (None, "OPENAI_API_KEY", 8, 5, 120.0)


# ---- what is believed


@pytest.mark.parametrize("prompt", [ASK, "2+2=?"])
def test_sampled_ids_and_logprobs_come_back_as_they_are(prompt):
    with FakeServer(chat=lambda body: "=4") as fake:
        assert connect(fake).sample(prompt, need_tokens=True, **SAMPLING) == {
            "text": "=4",
            "finish_reason": "stop",
            "prompt_ids": [ord(c) for c in "2+2=?"],
            "response_ids": [ord("="), ord("4"), END],
            "logprobs": [-0.5, -0.51, -0.52],
        }


def test_a_cut_answer_has_no_end_token_and_a_black_box_answer_no_tokens():
    with FakeServer(chat=lambda body: {"text": "=4", "finish_reason": "length"}) as fake:
        answer = connect(fake).sample(ASK, need_tokens=True, **SAMPLING)
        assert answer["finish_reason"] == "length" and answer["response_ids"] == [
            ord("="),
            ord("4"),
        ]
        assert connect(fake).sample(ASK, need_tokens=False, **SAMPLING) == {
            "text": "=4",
            "finish_reason": "length",
        }


@pytest.mark.parametrize("prompt", [ASK, "2+2=?"])
@pytest.mark.parametrize(
    "behaviour, words",
    [
        ("few_logprobs", "expected 3 log-probs, one per response token, got 2"),
        ("no_logprobs", "got none"),
        ("no_token_ids", "no token ids"),
    ],
)
def test_an_answer_without_its_tokens_or_logprobs_is_refused(prompt, behaviour, words):
    with FakeServer(always=behaviour) as fake, pytest.raises(BadInput, match=words):
        connect(fake).sample(prompt, need_tokens=True, **SAMPLING)


def test_prompt_logprobs_are_found_by_id_not_by_place():
    ids = [5, 8, 9, 1, 3]
    with FakeServer() as fake:
        server = connect(fake)
        logprobs, topk_ids, topk_logprobs = server.score(ids, 2, 4)
        rows = [distribution(ids[:i]) for i in (2, 3, 4)]
        assert logprobs == [row[i] for row, i in zip(rows, ids[2:])]
        assert topk_ids == [
            sorted(range(VOCABULARY), key=lambda t: -row[t])[:4] for row in rows
        ]
        assert topk_logprobs == [sorted(row, reverse=True)[:4] for row in rows]
        assert server.score(ids, 2, 0) == (logprobs, None, None)
        assert server.score(ids, 2, VOCABULARY)[2] == [
            sorted(row, reverse=True) for row in rows
        ]
        body = fake.requests[0]["body"]
        assert (
            body["prompt"] == ids
            and body["max_tokens"] == 1
            and body["temperature"] == 1
            and body["top_p"] == 1
        )
        assert body["prompt_logprobs"] == 4 and fake.requests[1]["body"]["prompt_logprobs"] == 1


@pytest.mark.parametrize(
    "behaviour, words",
    [
        ("no_prompt_logprobs", "expected 3 prompt_logprobs, one per token, got none"),
        ("short_prompt_logprobs", "got 1"),
        ("wrong_prompt_logprobs", "include token 8"),
    ],
)
def test_a_server_that_cannot_score_is_refused(behaviour, words):
    with FakeServer(always=behaviour) as fake, pytest.raises(BadInput, match=words):
        connect(fake).score([5, 8, 9], 1, 2)


def test_fewer_top_k_than_asked_is_refused():
    with FakeServer() as fake, pytest.raises(BadInput, match="max-logprobs"):
        connect(fake).score([5, 8], 1, VOCABULARY + 1)


# ---- trouble


def test_429_500_and_a_torn_body_are_retried_then_succeed():
    with FakeServer(script=["429", "500", "torn"]) as fake:
        assert (
            connect(fake, max_retries=3).sample(ASK, need_tokens=False, **SAMPLING)["text"]
            == "ok"
        )
        assert len(fake.requests) == 4
    with FakeServer(script=["429"], retry_after="0") as fake:
        assert connect(fake, max_retries=1).chat_text(ASK, temperature=0, max_tokens=5) == "ok"


@pytest.mark.parametrize("behaviour", ["429", "500", "torn"])
def test_retries_are_bounded(behaviour):
    with FakeServer(always=behaviour) as fake:
        with pytest.raises(ServedFailure):
            connect(fake, max_retries=2).sample(ASK, need_tokens=False, **SAMPLING)
        assert len(fake.requests) == 3


def test_a_server_that_never_answers_is_given_up():
    with FakeServer(always="hang") as fake:
        with pytest.raises(ServedFailure, match="0.1 s, 3 times"):
            connect(fake, max_retries=2, timeout=0.1).sample(ASK, need_tokens=False, **SAMPLING)
        assert len(fake.requests) == 3


@pytest.mark.parametrize(
    "behaviour", ["cut", "not_json", "array", "no_choices", "filtered", "long"]
)
def test_one_bad_reply_fails_one_request(behaviour):
    for call in (
        lambda s: s.sample(ASK, need_tokens=True, **SAMPLING),
        lambda s: s.sample("x", need_tokens=False, **SAMPLING),
        lambda s: s.chat_text(ASK, temperature=0, max_tokens=5),
    ):
        with FakeServer(always=behaviour) as fake, pytest.raises(ServedFailure):
            call(connect(fake))
    if behaviour != "filtered":
        with FakeServer(always=behaviour) as fake, pytest.raises(ServedFailure):
            connect(fake).score([5, 8, 9], 1)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        None,
        "x",
        [],
        {"message": None, "finish_reason": "stop"},
        {"message": {"content": 7}, "finish_reason": "stop"},
        {"message": {"content": "\ud83d"}, "finish_reason": "stop"},
        {"message": {"content": "x"}, "finish_reason": ["stop"]},
        {"message": {"content": "x"}, "finish_reason": "tool_calls"},
    ],
)
def test_no_shape_of_reply_is_a_traceback(choice, monkeypatch):
    server = Server("http://127.0.0.1:9/v1", "m", "FAKE_KEY")
    monkeypatch.setattr(server, "_call", lambda *_: {"choices": [choice]})
    with pytest.raises(ServedFailure):
        server.sample(ASK, need_tokens=False, **SAMPLING)


@pytest.mark.parametrize(
    "logprobs",
    [
        [],
        "xy",
        {},
        {"content": None},
        {"content": [None]},
        {"token_logprobs": [float("nan")]},
        {"token_logprobs": ["-1"]},
        {"token_logprobs": None},
    ],
)
def test_no_shape_of_logprobs_is_a_traceback(logprobs, monkeypatch):
    server = Server("http://127.0.0.1:9/v1", "m", "FAKE_KEY")
    choice = {
        "text": "x",
        "finish_reason": "length",
        "token_ids": [1],
        "prompt_token_ids": [2],
        "logprobs": logprobs,
    }
    monkeypatch.setattr(server, "_call", lambda *_: {"choices": [choice]})
    with pytest.raises(BadInput, match="expected 1 log-probs"):
        server.sample("y", need_tokens=True, **SAMPLING)


@pytest.mark.parametrize(
    "behaviour, words",
    [
        ("401", "FAKE_KEY"),
        ("404", "no model 'm'"),
        ("400", "unknown field"),
        ("quota", "credit"),
        ("leak", "bad bad"),
    ],
)
def test_what_only_a_person_can_mend_stops_at_once(behaviour, words, caplog):
    caplog.set_level(logging.DEBUG)
    with FakeServer(always=behaviour) as fake:
        with pytest.raises(BadInput, match=words) as raised:
            connect(fake, max_retries=0 if behaviour == "quota" else 2).sample(
                ASK, need_tokens=False, **SAMPLING
            )
        assert len(fake.requests) == 1
    assert raised.value.__suppress_context__ and raised.value.__cause__ is None
    assert "secret" not in str(raised.value) and "secret" not in caplog.text


def test_nobody_listening_stops():
    with FakeServer() as fake:
        server = connect(fake, max_retries=1)
    with pytest.raises(BadInput, match="is the server running"):
        server.sample(ASK, need_tokens=False, **SAMPLING)


@pytest.mark.parametrize(
    "base_url",
    [None, "", "localhost:8000/v1", "http://user:secret@host/v1", "http://host/v1?key=secret"],
)
def test_a_bad_address_is_refused_without_repeating_its_secrets(base_url):
    with pytest.raises(BadInput, match="--base-url") as raised:
        Server(base_url, "m")
    assert "secret" not in str(raised.value)


def test_a_key_that_cannot_be_a_header_is_refused_without_being_shown(monkeypatch):
    for key in ("secret\nkey", "secret k\u00e9y"):
        monkeypatch.setenv("FAKE_KEY", key)
        with pytest.raises(BadInput, match="FAKE_KEY") as raised:
            Server("http://127.0.0.1:9/v1", "m", "FAKE_KEY")
        assert "secret" not in str(raised.value)
    monkeypatch.setenv("FAKE_KEY", "trailing-newline\n")
    assert Server("http://127.0.0.1:9/v1", "m", "FAKE_KEY")._key == "trailing-newline"


def test_half_a_surrogate_pair_in_a_prompt_fails_one_request():
    with FakeServer() as fake, pytest.raises(ServedFailure, match="surrogate"):
        connect(fake).sample("x\ud83d", need_tokens=False, **SAMPLING)


def test_openai_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(BadInput, match="pip install openai"):
        Server("http://127.0.0.1:9/v1", "m")


# ---- judges


def test_a_refused_response_format_is_dropped_and_remembered():
    with FakeServer(always="no_response_format") as fake:
        server = connect(fake)
        assert [server.chat_text(ASK, temperature=0, max_tokens=5) for _ in range(2)] == [
            "ok",
            "ok",
        ]
        assert ["response_format" in body for body in fake.bodies()] == [True, False, False]
        assert fake.bodies()[-1]["top_p"] == 1 and fake.bodies()[-1]["n"] == 1
    with FakeServer() as fake:
        connect(fake).chat_text(ASK, temperature=0, max_tokens=5)
        assert fake.bodies()[0]["response_format"] == {"type": "json_object"}


def test_another_refusal_is_not_taken_for_the_response_format():
    with FakeServer(always="400") as fake:
        server = connect(fake)
        with pytest.raises(BadInput, match="unknown field"):
            server.chat_text(ASK, temperature=0, max_tokens=5)
        assert server._json_format and len(fake.requests) == 2


def test_the_newer_spelling_of_max_tokens_is_learnt():
    with FakeServer(always="no_max_tokens") as fake:
        server = connect(fake)
        for _ in range(2):
            assert server.sample(ASK, need_tokens=False, **SAMPLING)["text"] == "ok"
        assert [
            (body.get("max_tokens"), body.get("max_completion_tokens"))
            for body in fake.bodies()
        ] == [(7, None), (None, 7), (None, 7)]


# ---- many at a time


def test_map_yields_every_item_once_with_its_own_result_and_failures_in_place():
    server = Server("http://127.0.0.1:9/v1", "m", "FAKE_KEY", concurrency=4)

    def call(item):
        if item % 7 == 0:
            raise ServedFailure(f"no {item}")
        return item * 10

    results = dict(server.map(call, range(50)))
    assert sorted(results) == list(range(50))
    assert all(
        str(results[i]) == f"no {i}" if i % 7 == 0 else results[i] == i * 10 for i in range(50)
    )
    assert list(server.map(call, [])) == []


def test_map_keeps_to_its_concurrency_and_does_not_run_ahead():
    server = Server("http://127.0.0.1:9/v1", "m", "FAKE_KEY", concurrency=3)
    lock, running, most, taken = threading.Lock(), 0, 0, 0

    def call(item):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.002)
        with lock:
            running -= 1

    def million():
        nonlocal taken
        for taken in range(1, 1_000_001):
            yield taken

    for done, _ in enumerate(server.map(call, million()), 1):
        assert taken <= done + 2 * 3
        if done == 30:
            break
    assert most == 3


def test_map_sends_at_most_concurrency_requests_at_once():
    with FakeServer() as fake:
        server = connect(fake, concurrency=2)
        assert (
            len(
                list(
                    server.map(
                        lambda i: server.sample(ASK, need_tokens=False, **SAMPLING), range(12)
                    )
                )
            )
            == 12
        )
        assert len(fake.requests) == 12 and fake.most_in_flight <= 2


def test_map_stops_on_a_wrong_key_without_asking_for_everything():
    with FakeServer(always="401") as fake:
        server = connect(fake, concurrency=2)
        with pytest.raises(BadInput, match="FAKE_KEY"):
            list(
                server.map(
                    lambda i: server.sample(ASK, need_tokens=False, **SAMPLING), range(1000)
                )
            )
        assert len(fake.requests) < 20


def test_map_runs_nothing_after_an_error():
    calls = []

    def call(item):
        calls.append(item)
        raise BadInput("stop")

    with pytest.raises(BadInput, match="stop"):
        list(
            Server("http://127.0.0.1:9/v1", "m", "FAKE_KEY", concurrency=1).map(call, range(9))
        )
    assert calls == [0]


def test_map_can_be_interrupted_while_the_server_hangs():
    """Ctrl-C in the middle of a hanging call: the process ends instead of joining its
    threads."""
    import signal
    import subprocess

    with FakeServer(always="hang") as fake:
        code = (
            "import signal\nfrom opd import served\n"
            # a test run in the background would pass on that it is ignored
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"server = served.Server({fake.base_url!r}, 'm', 'FAKE_KEY', timeout=600)\n"
            "call = lambda i: server.sample('x', max_tokens=1, temperature=1, top_p=1, "
            "seed=0, need_tokens=False)\n"
            "print('ready', flush=True)\n"
            "list(server.map(call, range(9)))\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(served.__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "NO_PROXY": "127.0.0.1"},
        )
        try:
            assert child.stdout.readline() == b"ready\n"
            while not fake.requests and child.poll() is None:
                threading.Event().wait(0.01)
            child.send_signal(signal.SIGINT)
            assert (
                b"KeyboardInterrupt" in child.communicate(timeout=15)[1]
                and child.returncode != 0
            )
        finally:
            child.kill()
