"""Servers that quote the key they were given, and servers that fail: through every stage that
asks one."""

import contextlib
import io
import itertools
import json
from urllib.parse import quote

import pytest
from conftest import argv, dump

pytest.importorskip("openai")

from fake_server import FakeServer, event  # noqa: E402

from bench import faults_server  # noqa: E402
from bench.faults_server import Stages, reply, short_pauses, words  # noqa: E402
from opd import cli, files, redact, served  # noqa: E402
from opd.judge import document  # noqa: E402
from opd.records import BadInput  # noqa: E402
from opd.served import Server  # noqa: E402

KEY = r"sk-a/0j+'Very\Secret-1234567890_abcdefZZ"
ASK = [{"role": "user", "content": "2+2=?"}]


def as_codes(text):
    return "".join(f"\\u{ord(character):04x}" for character in text)


ESCAPED = json.dumps(KEY)[1:-1]
SPELLINGS = [KEY, ESCAPED, json.dumps(ESCAPED)[1:-1], quote(KEY, safe=""), as_codes(KEY)]
SPELLINGS += [quote(quote(KEY, safe=""), safe="")]
# messages are cut short at places between these
CUT = ["a" * n + KEY for n in (30, 55, 70, 190, 290)]


def leaked(text):
    """The first twelve characters of the key, in any spelling, that stand in a text."""
    for spelling in (KEY, ESCAPED, quote(KEY, safe=""), as_codes(KEY)):
        size = 72 if spelling.startswith("\\u") else 12
        parts = (spelling[i : i + size] for i in range(len(spelling) - size + 1))
        if found := next((part for part in parts if part in text), None):
            return found
    return None


@pytest.fixture(autouse=True)
def the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with short_pauses():
        yield


# ---- keys


def choice(key, content, finish="stop", message=None, **more):
    """A reply with the key in every field that nobody reads, and more of these."""
    said = {"role": key, "content": content, "reasoning_content": key, "tool_calls": [key]}
    return {
        **dict.fromkeys(("id", "model", "object", "system_fingerprint", "service_tier"), key),
        "usage": {"prompt_tokens": key, "completion_tokens": key, key: key},
        "choices": [
            {"text": content, "message": said | (message or {}), "finish_reason": finish} | more
        ],
    }


def pieces(text, field="content", size=7):
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    parts = [{"delta": {field: part}, "text": part} for part in parts]
    parts.append({"delta": {}, "text": "", "finish_reason": "stop"})
    return [event({"choices": [part]}) for part in parts]


class Stream:
    """Events, which are sent one by one (a list would be a JSON array)."""

    def __init__(self, events):
        self.events = events

    def __iter__(self):
        return iter(self.events)


def refusals(key):
    """What a server says with another status."""
    error = {"message": key, "code": key, "type": key, "param": key, key: key}
    for status in (301, 307, 400, 401, 403, 404, 413, 418, 422, 429, 500, 503):
        where = {"Retry-After": "0", "Location": f"http://x:{key}@127.0.0.1:9/?k={key}"}
        yield status, {"error": error, "detail": key}, where
    yield 400, {"error": {"message": f"context length {key}", "code": key}}
    yield 429, {"error": error | {"code": f"insufficient_quota {key}"}}, {"Retry-After": "0"}
    yield 500, f"<html>{key}</html>".encode(), {"Retry-After": key}


def failures(key, good):
    """Replies that are none, or not whole."""
    yield f"<html>{key}</html>".encode()
    yield [key]
    yield {key: key}
    for code in (key, 400, 429, None):
        yield {"error": {"message": key, "code": code, "status": key}}
    yield {"error": key}
    yield {"object": "error", "message": key, "code": 400}
    yield choice(key, good, key)
    yield choice(key, good, f"content_filter {key}")
    yield choice(key, good, message={"refusal": key})
    yield choice(key, [{"type": key, "text": key}])
    ids = dict(token_ids=[key], prompt_token_ids=[key], prompt_logprobs=[{key: key}] * 3)
    yield choice(key, good, logprobs={"content": [{"logprob": key}]}, **ids)
    ids = dict(token_ids=[1], prompt_token_ids=[1], prompt_logprobs=[{"8": {"logprob": key}}])
    yield choice(key, good, logprobs={"token_logprobs": [key]}, **ids)
    yield choice(key, good, logprobs={key: key}, **ids)
    yield Stream(pieces(key, "refusal"))
    yield Stream([event({"choices": []}), event({"error": {"message": key, "code": 400}})])


def answers(key, good):
    """Replies that a stage may take."""
    yield choice(key, good)
    yield choice(key, key)
    yield choice(key, good.replace("thing 1", key))
    yield choice(key, [{"type": "text", "text": good}, {"type": "text", "text": key}])
    yield Stream(pieces(good + key))
    yield Stream(pieces(good.replace("thing 1", key), size=1))


def test_no_reply_brings_the_key_into_a_message_or_an_answer():
    calls = [
        lambda: server.chat_text(ASK, temperature=0, max_tokens=9),
        lambda: server.sample(ASK, need_tokens=True, **SAMPLING),
        lambda: server.score([5, 8, 9], 1, 2),
    ]
    with FakeServer(raw=lambda body: said) as fake:
        server = Server(fake.base_url, "m", max_retries=0)
        for key in SPELLINGS + CUT:
            said_of = (refusals(key), failures(key, "x"), answers(key, "x"))
            for said, call in itertools.product(itertools.chain(*said_of), calls):
                server._streams = True
                try:
                    text = str(call())
                except (BadInput, served.ServedFailure) as error:
                    text = str(error)
                assert not leaked(text), text


SAMPLING = dict(max_tokens=7, temperature=0.7, top_p=0.9, seed=11)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    stages = Stages(tmp_path_factory.mktemp("stages"), 3, 2)
    with stages.fake() as fake:
        for name in stages.plan(stages.folder):
            stages.run(name, stages.folder / "clean", fake)
    return stages


NAMES = ["rollouts", "answers", "scores", "rubrics", "rewards", "single", "scalar", "evals"]


def asked_through(stages, name, out, raw):
    """All that a stage prints and writes when the server replies by `raw`."""
    main, given, _, in_tokens = stages.plan(out)[name]
    out.mkdir()
    shown = io.StringIO()
    with stages.fake(raw=raw) as fake:
        fake.tokenizer = stages.tokenizer if in_tokens else None
        flags = {"base-url": fake.base_url, "max-retries": 1, "max-failure-rate": 1.0}
        flags |= {"timeout": 2, "concurrency": 2, "out": out / f"{name}.jsonl"}
        if name in ("rubrics", "rewards", "single", "scalar"):
            flags |= {"cache": out / "cache.jsonl", "re-asks": 1}
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            with contextlib.suppress(SystemExit):
                cli.run(lambda: main([*given, *words(**flags)]))
    written = [path.read_text(encoding="utf-8") for path in out.rglob("*") if path.is_file()]
    return shown.getvalue() + "".join(written)


@pytest.mark.parametrize("name", NAMES)
def test_no_stage_prints_or_writes_the_key(name, stages, tmp_path):
    """Each server quotes the key in another way with every request."""

    def good(body):
        if "prompt_logprobs" in body:
            return "x"
        return reply(body)

    def cycle(make):
        script = iter(())

        def raw(body):
            nonlocal script
            said = next(script, None)
            if said is None:
                script = make(good(body))
                said = next(script)
            return said

        return raw

    ways = [lambda text: failures(KEY, text), lambda text: answers(KEY, text)]
    ways += [lambda text, r=r: iter([r]) for r in [*refusals(KEY)][:2] + [*refusals(KEY)][8:]]
    for number, make in enumerate(ways):
        text = asked_through(stages, name, tmp_path / str(number), cycle(make))
        assert text and not leaked(text), text


def test_a_key_is_not_taken_on_a_command_line_that_files_keep():
    for flags in (
        dict(base_url=f"http://host/{quote(KEY, safe='')}/v1"),
        dict(model=KEY),
        dict(fields={"api_key": KEY}),
        dict(base_url=f"user:{KEY}@host/v1"),
        dict(base_url=f"http://host:{KEY}/v1"),
        dict(base_url=f"ftp://host/{KEY}"),
        dict(base_url=f"http://host/v1#{KEY}"),
        dict(base_url="http://" + "a" * 70 + "/v1"),
        dict(base_url="http://host/\x00v1"),
    ):
        with pytest.raises(BadInput) as raised:
            Server(**{"base_url": "http://host/v1", "model": "m"} | flags)
        assert not leaked(str(raised.value))


@pytest.mark.parametrize("key", ["EMPTY", "ollama", "dummy", "abc", ""])
def test_a_word_that_a_local_server_takes_is_no_secret(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert redact.without_key(f"the {key} set") == f"the {key} set"


# ---- what is shown

UNSEEN = (
    "\x1b\x07\x9b\u200b\u202e\u2066\ufeff\u00ad\u2800\u3164\ufe0f\u034f\U000e0041\U000e0100"
)


def test_characters_that_nobody_sees_are_written_out(tmp_path, capsys):
    seen = "é 數 🙂 x² \u0301"
    assert redact.printable(seen) == seen
    for shown in (redact.printable(f"a{UNSEEN}b"), document({"answer": f"a{UNSEEN}b"})):
        assert not set(shown) & set(UNSEEN)
    assert json.loads(document({"answer": UNSEEN})) == {"answer": UNSEEN}
    row = {"id": f"p{UNSEEN}", "messages": [{"role": f"r{UNSEEN}", "content": "x"}]}
    with pytest.raises(SystemExit):
        cli.run(lambda: files.main(argv("check", dump(tmp_path / "p.jsonl", [row, row]))))
    assert not set(capsys.readouterr().err) & set(UNSEEN)
    assert not set(files.named([(f"p{UNSEEN}", 0)])) & set(UNSEEN)


# ---- bad replies


def test_every_stage_survives_servers_that_fail_lie_die_and_return():
    counted = 0
    for row in faults_server.run(short=True):
        counted += row["injected"]
        bad = {n: row[n] for n in ("lost", "doubled", "mixed", "tracebacks") if row[n]}
        assert not bad, f"{bad} of {row}"
        assert row["survived"] == row["injected"]
    assert counted > 20


LIES = {
    "rollouts": ("few_logprobs", "no_token_ids", "high_logprobs", "unknown_ids", "other_text"),
    "scores": ("short_prompt_logprobs", "no_prompt_logprobs", "high_logprobs", "unknown_ids"),
    "answers": ("not_json", "broken_stream", "cut", "filtered"),
    "rewards": ("not_json", "broken_stream", "no_choices"),
}


@pytest.mark.parametrize("name, lie", [(n, lie) for n, lies in LIES.items() for lie in lies])
def test_a_lie_fails_its_own_request_and_is_named(name, lie, stages, tmp_path, capsys):
    """The request in the middle is answered by a lie, and by nothing else when asked again."""
    first = 2 if name == "scores" else 0  # its self-test asks twice
    script = ["normal"] * (first + 1) + [lie] * 2
    with stages.fake(script=script) as fake:
        flags = {"max-retries": 0, "concurrency": 1, "max-failure-rate": 0.7}
        if name == "rewards":
            flags["re-asks"] = 0
        stages.run(name, tmp_path, fake, **flags)
    assert len(faults_server.missing(stages, name, tmp_path)) == (4 if name == "rewards" else 2)
    sidecar = json.loads((tmp_path / f"{name}.jsonl.run.json").read_text())
    assert name == "rewards" or len(sidecar["failed"]) == 2
