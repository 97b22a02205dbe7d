"""Servers and judges as users have them: slow, sparing, of other makes.  opd/served.py,
opd/served_reply.py, opd/judge.py and the stages that ask them."""

import json

import pytest
from conftest import argv, dump, load, refusal

pytest.importorskip("openai")

from fake_server import FakeServer, event, events  # noqa: E402

import teacher  # noqa: E402
from opd import served  # noqa: E402
from opd.records import BadInput  # noqa: E402
from opd.served import ServedFailure, Server  # noqa: E402

ASK = [{"role": "user", "content": "2+2=?"}]
SAMPLING = dict(max_tokens=7, temperature=0.7, top_p=0.9, seed=11)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(served, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(served, "LONGEST_PAUSE", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-1234567890")


def connect(fake, max_retries=2, timeout=5.0, **options):
    return Server(fake.base_url, "m", max_retries=max_retries, timeout=timeout, **options)


def sample(server, prompt=ASK, need_tokens=False):
    return server.sample(prompt, need_tokens=need_tokens, **SAMPLING)


def plain(content="4", finish="stop", **more):
    """A plain chat reply."""
    message = {"role": "assistant", "content": content}
    return {"choices": [{"message": message, "finish_reason": finish}]} | more


def delta(content=None, finish=None, **message):
    """A chunk of a streamed chat reply."""
    said = message if content is None else message | {"content": content}
    return event({"choices": [{"delta": said, "finish_reason": finish}]})


# ---- streams


def test_a_reply_may_take_longer_than_the_timeout_but_not_be_silent_for_so_long():
    def drips(body):
        for digit in "0123456789":
            yield delta(digit)
            yield 0.1
        yield delta(finish="stop")

    def falls_silent(body):
        yield delta("4")
        yield 30

    with FakeServer(raw=drips) as fake:
        assert sample(connect(fake, timeout=0.5))["text"] == "0123456789"
        assert fake.bodies()[0]["stream_options"] == {"include_usage": True}
    with FakeServer(raw=falls_silent) as fake:
        with pytest.raises(ServedFailure, match="within 0.3 s, 2 times.*--timeout"):
            sample(connect(fake, max_retries=1, timeout=0.3))
        assert len(fake.requests) == 2


BROKEN = {
    "no end": [delta("4")],
    "no finish reason": [delta("4"), b"data: [DONE]\n\n"],
    "half an event": [delta("4"), b'data: {"choices": [{"del'],
    "nothing": [],
}


@pytest.mark.parametrize("pieces", BROKEN.values(), ids=BROKEN)
def test_a_stream_that_breaks_off_is_asked_for_again_and_then_a_failure(pieces):
    tries = []

    def mends(body):
        tries.append(body)
        return iter(pieces if len(tries) == 1 else [delta("4"), delta(finish="stop")])

    with FakeServer(raw=mends) as fake:
        assert sample(connect(fake))["text"] == "4"
    with FakeServer(raw=lambda body: iter(pieces)) as fake:
        with pytest.raises(ServedFailure, match="broke off, 3 times"):
            sample(connect(fake))
        assert len(fake.requests) == 3


def test_odd_streams_are_read():
    """Comments, named events, thoughts, U+2028, no space after `data:`, no last line break."""
    pieces = [
        b": keep-alive\n\nevent: message\n",
        delta("", role="assistant"),
        delta(reasoning_content="hm", reasoning="hm"),
        b'data:{"choices":[{"delta":{"content":"a\xe2\x80\xa8b"},"finish_reason":""}]}\r\n\r\n',
        event({"choices": []}),
        delta([{"type": "thinking", "thinking": []}, {"type": "text", "text": "c"}]),
        delta(finish="stop").rstrip(),
    ]
    with FakeServer(raw=lambda body: iter(pieces)) as fake:
        got = sample(connect(fake))
    assert got == {"text": "a\u2028bc", "finish_reason": "stop"}


@pytest.mark.parametrize("prompt", [ASK, "2+2=?"])
def test_streamed_ids_and_logprobs_are_those_of_a_plain_reply(prompt):
    with FakeServer(chat=lambda body: "= 4.") as fake:
        server = connect(fake)
        streamed = sample(server, prompt, True)
        server._streams = False
        assert sample(server, prompt, True) == streamed
        assert len(streamed["response_ids"]) == len(streamed["logprobs"]) == 5
        assert (server.usage.calls, server.usage.completion_tokens) == (2, 5)


def test_tokens_that_a_server_holds_back_are_missed():
    def held_back(body):
        reply = fake._answer(body, "normal", True)
        return (e for i, e in enumerate(events(reply)) if i != 2)

    with FakeServer(chat=lambda body: "= 4.", raw=held_back) as fake:
        with pytest.raises(ServedFailure, match="5 that `usage` counts, got 4"):
            sample(connect(fake), need_tokens=True)


@pytest.mark.parametrize("refused", ["stream", "stream_options"])
def test_a_server_that_cannot_stream_is_asked_plainly_from_then_on(refused, capsys):
    def stubborn(body):
        said = {"error": {"message": f"{refused} is not supported", "type": "x", "code": None}}
        return (400, said) if refused in body else plain()

    with FakeServer(raw=stubborn) as fake:
        server = connect(fake)
        assert [sample(server)["text"] for _ in range(3)] == ["4"] * 3
        assert ["stream" in body for body in fake.bodies()] == [True, False, False, False]
    assert capsys.readouterr().out.count("refuses to stream") == 1


# ---- replies of other makes


@pytest.mark.parametrize(
    "given, finish",
    [
        *((word, "stop") for word in ("eos", "eos_token", "end_turn", "STOP", "END_TURN")),
        *((word, "stop") for word in ("stop_sequence", "COMPLETE")),
        *((word, "length") for word in ("max_tokens", "MAX_TOKENS", "model_length")),
    ],
)
def test_finish_reasons_have_synonyms(given, finish):
    with FakeServer(raw=lambda body: plain(finish=given)) as fake:
        assert sample(connect(fake)) == {"text": "4", "finish_reason": finish}


TEXT = {"type": "text", "text": "4"}
THOUGHT = {"type": "thinking", "thinking": [TEXT]}


@pytest.mark.parametrize(
    "reply, text",
    [
        (plain([THOUGHT, TEXT, TEXT]), "44"),
        (plain(None), ""),
        (plain([]), ""),
        (plain("4", error=None), "4"),
    ],
)
def test_contents_in_parts_and_null_are_read(reply, text):
    with FakeServer(raw=lambda body: reply) as fake:
        assert sample(connect(fake))["text"] == text


BAD_PROBS = {"content": [{"logprob": 0.5}]}


@pytest.mark.parametrize(
    "reply, words",
    [
        (plain(finish="tool_calls"), "tool_calls"),
        (plain(finish="content_filter"), "content_filter: the provider's filter"),
        (plain(finish=None), "finish_reason"),
        (plain([{"type": "image_url"}]), "got image_url"),
        (plain(7), "expected choices with text"),
        (plain(None, "length"), "spent on reasoning"),
        ({"choices": [{"finish_reason": "stop"}]}, "no whole JSON"),
        (
            {"choices": [{"message": {"refusal": "I'd rather not"}, "finish_reason": "stop"}]},
            "rather not",
        ),
        ({"error": {"message": "your key sk-very-secret-1234567890", "code": 400}}, r"\*\*\*"),
        ({"error": "context length"}, "again|3 times|context"),
        ({"object": "error", "message": "bad", "code": 422}, r"bad \(422\)"),
    ],
)
def test_what_is_no_answer_fails_one_request_and_is_named(reply, words):
    with FakeServer(raw=lambda body: reply) as fake:
        with pytest.raises(ServedFailure, match=words) as raised:
            sample(connect(fake))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"token_ids": [-4]}, "token_ids: expected integers"),
        ({"token_ids": ["4"]}, "token_ids: expected integers"),
        ({"token_ids": [4, 4]}, "got 1"),
        ({"logprobs": {"content": [{"logprob": 0.5}]}}, "logprobs: expected finite"),
        ({"logprobs": {"content": [{"logprob": None}]}}, "logprobs: expected finite"),
        ({"logprobs": {"content": [None]}}, "expected choices"),
    ],
)
def test_tokens_that_are_none_fail_one_request(change, words):
    choice = plain()["choices"][0] | {"token_ids": [4], "prompt_token_ids": [2]}
    choice |= {"logprobs": {"content": [{"logprob": -0.5}]}}
    with FakeServer(raw=lambda body: {"choices": [choice | change]}) as fake:
        failure = BadInput if words == "got 1" else ServedFailure
        with pytest.raises(failure, match=words):
            sample(connect(fake), need_tokens=True)
        server = connect(fake)
        choice |= {"usage": "none"}
        fake.raw = lambda body: {"choices": [choice], "usage": ["?"]}
        assert sample(server, need_tokens=True)["response_ids"] == [4]
        assert server.usage.unreported == 1


BUSY = {"message": "Provider returned error: Rate limit exceeded", "code": 429}


@pytest.mark.parametrize(
    "first, tries",
    [
        (lambda: {"error": BUSY}, 2),
        (lambda: plain(None) | {"error": BUSY}, 2),
        (lambda: {"error": BUSY | {"code": "502"}}, 2),
        (lambda: iter([delta("half"), event({"error": BUSY})]), 2),
        (lambda: iter([event({"object": "error", **BUSY})]), 2),
        (lambda: {"error": BUSY | {"code": 400}}, 1),
    ],
)
def test_an_error_in_a_success_is_what_its_code_says(first, tries):
    asked = []

    def reply(body):
        asked.append(body)
        return first() if len(asked) == 1 else plain()

    with FakeServer(raw=reply) as fake:
        server = connect(fake)
        if tries == 1:
            with pytest.raises(ServedFailure, match="Rate limit exceeded"):
                sample(server)
        else:
            assert sample(server)["text"] == "4"
    assert len(asked) == tries


# ---- fields that a server does not know


@pytest.fixture
def prompts(tmp_path):
    rows = [{"id": f"q{i}", "messages": ASK} for i in range(2)]
    return dump(tmp_path / "p.jsonl", rows)


def answer_words(fake, prompts, **flags):
    asked = dict(model="m", base_url=fake.base_url, prompts=prompts, n=1, max_retries=1)
    return argv("answer", **asked | dict(out=prompts.with_name("a.jsonl")) | flags)


def refuses(*fields):
    """A server that knows all but these fields together."""

    def reply(body):
        if not all(field in body for field in fields):
            return plain()
        names = " and ".join(f"`{field}`" for field in fields)
        return 422, {"error": {"message": f"{names} cannot be specified", "code": None}}

    return reply


@pytest.mark.parametrize("fields", [("seed",), ("temperature", "top_p"), ("n",)])
def test_a_refused_field_is_named_with_the_flag_that_leaves_it_out(fields, prompts, capsys):
    with FakeServer(raw=refuses(*fields)) as fake:
        message = refusal(teacher.main, answer_words(fake, prompts), capsys)
    left_out = json.dumps({fields[-1]: None})
    assert ", ".join(fields) in message and f"--request-json '{left_out}'" in message


@pytest.mark.parametrize(
    "fields, claimed",
    [
        ({"seed": None}, {"temperature": 1.0, "top_p": 1.0}),
        ({"temperature": None}, {"top_p": 1.0}),
        ({"top_p": 0.5, "reasoning_effort": "low"}, {"temperature": 1.0, "top_p": 0.5}),
    ],
)
def test_request_fields_are_sent_and_records_claim_what_was_sent(
    fields, claimed, prompts, capsys
):
    with FakeServer(raw=lambda body: plain()) as fake:
        words = answer_words(fake, prompts, request_json=json.dumps(fields))
        teacher.main(words)
        for body in fake.bodies():
            assert {name: body.get(name) for name in fields} == fields
        rows = load(prompts.with_name("a.jsonl"))
        names = ("temperature", "top_p")
        assert [{n: r[n] for n in names if n in r} for r in rows] == [claimed] * 2
        assert "request" in refusal(teacher.main, answer_words(fake, prompts), capsys)


def test_fields_that_a_stage_or_a_record_depends_on_are_not_changed(prompts, capsys):
    with FakeServer() as fake:
        for text, words in {
            "{": "a JSON object",
            "[]": "a JSON object",
            '{"a": NaN}': "a JSON object",
            '{"model": "x"}': "model: expected another field",
            '{"n": 4}': "n: expected null or 1",
            '{"temperature": "hot"}': "temperature: expected a number or null",
        }.items():
            flags = answer_words(fake, prompts, request_json=text)
            assert words in refusal(teacher.main, flags, capsys)
        for fields in ({"top_p": None}, {"top_k": 20}, {"repetition_penalty": 1.1}):
            server = connect(fake, fields=fields)
            with pytest.raises(BadInput, match="shapes"):
                sample(server, need_tokens=True)
            with pytest.raises(BadInput, match="shapes"):
                server.score([5, 8, 9], 1)
        assert not fake.requests


def test_advice_fits_the_failure():
    long = {"error": {"message": "maximum context length is 8 tokens", "code": 400}}
    filtered = {"error": {"message": "content management policy", "code": "content_filter"}}
    for status, said, words in (
        (400, long, "shorten the prompt"),
        (400, filtered, "filter"),
        (413, long, "shorten the prompt"),
        (429, long, "3 times: a lower --concurrency"),
        (503, long, "3 times: see the server's log"),
    ):
        with FakeServer(raw=lambda body: (status, said)) as fake:  # noqa: B023
            with pytest.raises(ServedFailure, match=words):
                sample(connect(fake))
