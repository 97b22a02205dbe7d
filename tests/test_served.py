"""opd/served.py against a fake server: what is sent, what is believed, what is retried, and how
it fails."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from types import SimpleNamespace

import pytest
from conftest import ROOT, argv
from fake_server import END, VOCABULARY, FakeServer, distribution

from opd import records, sampling, served
from opd.records import BadInput
from opd.scoring import Scorer
from opd.served import ServedFailure, Server
from opd.served_reply import Reply

pytest.importorskip("openai")
ASK = [{"role": "user", "content": "2+2=?"}]
SAMPLING = dict(max_tokens=7, temperature=0.7, top_p=0.9, seed=11)
NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(served, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(served, "LONGEST_PAUSE", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-1234567890")


def connect(fake, max_retries=2, timeout=5.0, concurrency=3):
    how = dict(concurrency=concurrency, max_retries=max_retries, timeout=timeout)
    return Server(fake.base_url, "m", **how)


def sample(server, prompt=ASK, need_tokens=False, **options):
    return server.sample(prompt, need_tokens=need_tokens, **SAMPLING, **options)


def chat(server):
    return server.chat_text(ASK, temperature=0, max_tokens=5)


def offline(monkeypatch, choice):
    """A server that replies with this choice."""
    server = Server(NOWHERE, "m")

    def reply(*_):
        said = Reply()
        said.add({"choices": [choice]})
        said.check()
        return said

    monkeypatch.setattr(server, "_call", reply)
    return server


# ---- what is sent


@pytest.mark.parametrize("prompt, path", [(ASK, "chat/completions"), ("2+2=", "completions")])
@pytest.mark.parametrize("need_tokens", [True, False])
def test_every_sampling_field_is_sent_and_vllm_fields_only_with_tokens(
    prompt, path, need_tokens
):
    with FakeServer() as fake:
        sample(connect(fake), prompt, need_tokens)
        request = fake.requests[0]
    body = request["body"]
    wanted = SAMPLING | {"model": "m", "n": 1, "presence_penalty": 0, "frequency_penalty": 0}
    assert wanted.items() <= body.items()
    vllm = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "return_token_ids": True}
    assert {k: body[k] for k in vllm if k in body} == (vllm if need_tokens else {})
    assert bool(body.get("logprobs")) == need_tokens
    assert request["path"] == f"/v1/{path}"
    assert request["headers"]["authorization"] == "Bearer sk-very-secret-1234567890"


def test_template_options_reach_the_chat_template():
    options = {"enable_thinking": False}
    with FakeServer() as fake:
        sample(connect(fake), template_options=options)
        assert fake.bodies()[0]["chat_template_kwargs"] == options


def test_flags_reach_the_server_and_an_unset_key_is_EMPTY(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    parser = ArgumentParser()
    parser.add_argument("--model")
    served.add_flags(parser)
    with FakeServer(always="500") as fake:
        flags = dict(model="m2", base_url=fake.base_url + "/")
        flags |= dict(concurrency=2, max_retries=1, timeout=3)
        server = Server.from_flags(parser.parse_args(argv(**flags)))
        got = (server.base_url, server.concurrency, server._client.timeout)
        assert got == (fake.base_url, 2, 3)
        with pytest.raises(ServedFailure):
            chat(server)
        assert [body["model"] for body in fake.bodies()] == ["m2"] * 2
        assert fake.requests[0]["headers"]["authorization"] == "Bearer EMPTY"


# ---- what is believed


@pytest.mark.parametrize("prompt", [ASK, "2+2=?"])
def test_sampled_ids_and_logprobs_come_back_as_they_are(prompt):
    """A cut answer has no end token, a black box's no tokens at all."""
    cut = {"text": "=4", "finish_reason": "length"}
    tokens = {"prompt_ids": list(map(ord, "2+2=?")), "response_ids": [ord("="), ord("4")]}
    with FakeServer(chat=lambda body: "=4") as fake:
        whole = sample(connect(fake), prompt, True)
    ended = {"finish_reason": "stop", "response_ids": tokens["response_ids"] + [END]}
    assert whole == cut | tokens | ended | {"logprobs": [-0.5, -0.51, -0.52]}
    with FakeServer(chat=lambda body: cut) as fake:
        assert sample(connect(fake), prompt, True) == cut | tokens | {"logprobs": [-0.5, -0.51]}
        assert sample(connect(fake), prompt) == cut


def test_prompt_logprobs_are_found_by_id_not_by_place():
    ids = [5, 8, 9, 1, 3]
    rows = [distribution(ids[:i]) for i in (2, 3, 4)]
    best = [sorted(range(VOCABULARY), key=lambda t: -row[t])[:4] for row in rows]
    whole = [sorted(row, reverse=True) for row in rows]
    with FakeServer() as fake:
        server = connect(fake)
        logprobs, topk_ids, topk_logprobs = server.score(ids, 2, 4)
        assert logprobs == [row[i] for row, i in zip(rows, ids[2:])]
        assert topk_ids == best and topk_logprobs == [row[:4] for row in whole]
        assert server.score(ids, 2, 0) == (logprobs, None, None)
        sent = {"prompt": ids, "max_tokens": 1, "temperature": 1, "top_p": 1}
        assert (sent | {"prompt_logprobs": 4}).items() <= fake.bodies()[0].items()
        assert fake.bodies()[1]["prompt_logprobs"] == 1


def sample_tokens(server):
    return sample(server, need_tokens=True)


def complete_tokens(server):
    return sample(server, "2+2=?", need_tokens=True)


def score(server):
    return server.score([5, 8, 9], 1, 2)


NO_PLACE = "expected 3 prompt_logprobs, one per token, got none"
FEW = "expected 3 log-probs, one per response token, got 2"


@pytest.mark.parametrize(
    "call, behaviour, words",
    [
        *((call, "few_logprobs", FEW) for call in (sample_tokens, complete_tokens)),
        *((call, "no_logprobs", "got none") for call in (sample_tokens, complete_tokens)),
        *((call, "no_token_ids", "no token ids") for call in (sample_tokens, complete_tokens)),
        (score, "no_prompt_logprobs", NO_PLACE),
        (score, "short_prompt_logprobs", "got 1"),
        (score, "wrong_prompt_logprobs", "include token 8"),
        (lambda server: server.score([5, 8], 1, VOCABULARY + 1), "normal", "max-logprobs"),
    ],
)
def test_a_reply_without_the_tokens_or_logprobs_fails_one_request(call, behaviour, words):
    with FakeServer(chat=lambda body: "=4", always=behaviour) as fake:
        with pytest.raises(ServedFailure, match=words):
            call(connect(fake))


def test_an_empty_answer_is_scored_without_a_request():
    row = {"id": "a", "sample": 0, "prompt_ids": [5], "response_ids": [], "text": ""}
    for k in (0, 3):
        scorer = Scorer({("a", 0): row}, {"model": "m"}, server=object(), top_k=k)
        record = scorer.score_served(("a", 0))
        assert record["logprobs"] == [] and records.validate(record, "scores") is None
        assert ("topk" in record) == bool(k)


# ---- trouble


def test_429_500_and_a_torn_body_are_retried_then_succeed():
    with FakeServer(script=["429", "500", "torn"]) as fake:
        assert sample(connect(fake, max_retries=3))["text"] == "ok"
        assert len(fake.requests) == 4


@pytest.mark.parametrize("behaviour", ["429", "500", "torn", "hang"])
def test_retries_are_bounded(behaviour):
    timeout = 0.1 if behaviour == "hang" else 5
    with FakeServer(always=behaviour) as fake:
        with pytest.raises(ServedFailure, match="0.1 s, 3 times" if timeout < 1 else None):
            sample(connect(fake, max_retries=2, timeout=timeout))
        assert len(fake.requests) == 3


@pytest.mark.parametrize(
    "behaviour", ["cut", "not_json", "array", "no_choices", "long", "filtered"]
)
def test_one_bad_reply_fails_one_request(behaviour):
    calls = [sample_tokens, lambda server: sample(server, "x"), chat, score]
    with FakeServer(always=behaviour) as fake:
        server = connect(fake)
        for call in calls[:-1] if behaviour == "filtered" else calls:
            with pytest.raises(ServedFailure):
                call(server)
    with FakeServer() as fake, pytest.raises(ServedFailure, match="surrogate"):
        sample(connect(fake), "half a pair: \ud83d")


@pytest.mark.parametrize(
    "choice",
    [
        {},
        None,
        [],
        {"message": None, "finish_reason": "stop"},
        {"message": {"content": 7}, "finish_reason": "stop"},
        {"message": {"content": "\ud83d"}, "finish_reason": "stop"},
        {"message": {"content": "x"}, "finish_reason": ["stop"]},
        {"message": {"content": "x"}, "finish_reason": "tool_calls"},
    ],
)
def test_no_shape_of_reply_is_a_traceback(choice, monkeypatch):
    with pytest.raises(ServedFailure):
        sample(offline(monkeypatch, choice))


def test_no_shape_of_logprobs_is_a_traceback(monkeypatch):
    contents = [{"content": content} for content in (None, [None])]
    values = [{"token_logprobs": v} for v in ([float("nan")], ["-1"], None)]
    choice = {"text": "x", "finish_reason": "length", "token_ids": [1], "prompt_token_ids": [2]}
    for logprobs in ([], "xy", {}, *contents, *values):
        with pytest.raises(ServedFailure):
            sample(offline(monkeypatch, choice | {"logprobs": logprobs}), "y", True)


@pytest.mark.parametrize(
    "behaviour, words",
    [
        ("401", "OPENAI_API_KEY"),
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
            sample(connect(fake, max_retries=0 if behaviour == "quota" else 2))
        assert len(fake.requests) == 1
    assert raised.value.__suppress_context__ and raised.value.__cause__ is None
    assert "secret" not in str(raised.value) and "secret" not in caplog.text


def test_a_server_that_cannot_be_asked_is_refused_without_repeating_secrets(monkeypatch):
    with FakeServer() as fake:
        gone = connect(fake, max_retries=1)
    with pytest.raises(BadInput, match="is the server running"):
        sample(gone)
    addresses = [None, "", "localhost:8000/v1", "http://user:secret@host/v1"]
    for address in (*addresses, "http://host/v1?key=secret"):
        with pytest.raises(BadInput, match="--base-url") as raised:
            Server(address, "m")
        assert "secret" not in str(raised.value)
    for key in ("secret\nkey", "secret k\u00e9y"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(BadInput, match="OPENAI_API_KEY") as raised:
            Server(NOWHERE, "m")
        assert "secret" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(BadInput, match="pip install openai"):
        Server(NOWHERE, "m")


# ---- what servers do not know


def test_a_refused_response_format_is_dropped_and_remembered():
    for always, tries in (("no_response_format", [True, False, False]), (None, [True, True])):
        with FakeServer(always=always) as fake:
            server = connect(fake)
            assert [chat(server), chat(server)] == ["ok", "ok"]
        formats = [body.get("response_format") for body in fake.bodies()]
        assert formats == [{"type": "json_object"} if asked else None for asked in tries]


def test_the_newer_spelling_of_max_tokens_is_learnt():
    with FakeServer(always="no_max_tokens") as fake:
        server = connect(fake)
        assert [sample(server)["text"] for _ in range(2)] == ["ok", "ok"]
        spelt = [(b.get("max_tokens"), b.get("max_completion_tokens")) for b in fake.bodies()]
        assert spelt == [(7, None), (None, 7), (None, 7)]


# ---- many at a time


def test_map_yields_every_item_once_with_its_own_result_and_failures_in_place():
    server = Server(NOWHERE, "m", concurrency=4)

    def call(item):
        if item % 7 == 0:
            raise ServedFailure(f"no {item}")
        return item * 10

    results = {item: str(result) for item, result in server.map(call, range(50))}
    assert results == {i: str(i * 10) if i % 7 else f"no {i}" for i in range(50)}
    assert list(server.map(call, [])) == []


def test_map_keeps_to_its_concurrency_and_does_not_run_ahead():
    taken = 0

    def million():
        nonlocal taken
        for taken in range(1, 1_000_001):
            yield taken

    with FakeServer(chat=lambda body: time.sleep(0.01) or "ok") as fake:
        server = connect(fake, concurrency=3)
        for done, _ in enumerate(server.map(lambda _: sample(server), million()), 1):
            assert taken <= done + 2 * 3
            if done == 30:
                break
        assert fake.most_in_flight == 3


@pytest.mark.parametrize("concurrency", [1, 2])
def test_map_runs_nothing_after_an_error(concurrency):
    with FakeServer(always="401") as fake:
        server = connect(fake, concurrency=concurrency)
        with pytest.raises(BadInput, match="OPENAI_API_KEY"):
            list(server.map(lambda _: sample(server), range(1000)))
        assert len(fake.requests) == 1 if concurrency == 1 else len(fake.requests) < 20


INTERRUPTED = """
import signal, sys
from opd import served
# a test run in the background would pass on that it is ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
server = served.Server(sys.argv[1], "m", timeout=600)
list(server.map(lambda _: server.chat_text([], temperature=0, max_tokens=1), range(9)))
"""


def test_map_can_be_interrupted_while_the_server_hangs():
    """Ctrl-C in the middle of a hanging call: the process ends instead of joining its
    threads."""
    with FakeServer(always="hang") as fake:
        words = [sys.executable, "-c", INTERRUPTED, fake.base_url]
        child = subprocess.Popen(words, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE)
        try:
            while not fake.requests and child.poll() is None:
                threading.Event().wait(0.01)
            child.send_signal(signal.SIGINT)
            assert b"KeyboardInterrupt" in child.communicate(timeout=15)[1]
            assert child.returncode != 0
        finally:
            child.kill()


def test_a_prompt_that_the_clock_changes_is_shown_as_it_was_first(monkeypatch):
    shown = iter([[1, 2], [1, 3]])
    monkeypatch.setattr(sampling, "render", lambda *_: next(shown))
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "ok")
    sampler = sampling.ServedSampler(None, None, {"model": "m"}, tokenizer, {})
    answer = {"response_ids": [5], "text": "ok"}
    assert sampler.mismatch({"id": 7}, answer | {"prompt_ids": [1, 2]}) is None
    assert sampler.mismatch({"id": 7}, answer | {"prompt_ids": [1, 2]}) is None
    later = sampler.mismatch({"id": 7}, answer | {"prompt_ids": [1, 3]})
    assert isinstance(later, ServedFailure), "a file has one prompt for an id"
