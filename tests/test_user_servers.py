"""Servers and judges as users have them: slow, sparing, of other makes.  opd/served.py,
opd/served_reply.py, opd/judge.py and the stages that ask them."""

import json
import time

import pytest
from conftest import argv, dump, load, refusal

pytest.importorskip("openai")

from fake_server import FakeServer, event, events  # noqa: E402

import rubric  # noqa: E402
import teacher  # noqa: E402
from opd import judge_replies, records, served  # noqa: E402
from opd.judge import Cache, Judge  # noqa: E402
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
        with pytest.raises(ServedFailure, match=words):
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
        (500, long, "3 times: shorten the prompt"),
        (503, {"error": {"message": "died"}}, "3 times: look at the server's log"),
    ):
        with FakeServer(raw=lambda body: (status, said)) as fake:  # noqa: B023
            with pytest.raises(ServedFailure, match=words):
                sample(connect(fake))


# ---- judges: what they are asked for

CRITERIA = [
    {"id": f"c{i}", "category": "Task Completion", "criterion": f"thing {i}", "points": i}
    for i in (1, 2, 3, 4)
]
RUBRIC = json.dumps({"criteria": CRITERIA})
TRUE = '{"judgement": [true, true, true, true]}'


def verify(fake, answers=("a",), mode="single", server=None, **options):
    llm = Judge(server or connect(fake), **options)
    return llm, llm.verify("q", CRITERIA, list(answers), mode)


def test_a_judge_is_asked_for_a_schema_of_the_exact_form():
    with FakeServer(chat=lambda body: TRUE) as fake:
        verify(fake)
    asked = fake.bodies()[0]["response_format"]
    assert asked["type"] == "json_schema" and asked["json_schema"]["strict"] is True
    verdicts = asked["json_schema"]["schema"]["properties"]["judgement"]
    assert verdicts["items"] == {"type": "boolean"}
    assert verdicts["minItems"] == verdicts["maxItems"] == 4


FORMS = {
    "rubric": judge_replies.Rubric,
    "single": judge_replies.judgement_model(3),
    "batch": judge_replies.batch_model(2, 3),
    "reasons": judge_replies.batch_model(2, 3, True),
    "score": judge_replies.Score,
}


def objects(schema):
    """Every object of a JSON schema."""
    for part in [schema, *schema.get("$defs", {}).values()]:
        if part.get("type") == "object":
            yield part


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_schemas_are_such_as_a_strict_server_takes(form):
    for part in objects(form.model_json_schema()):
        assert part["additionalProperties"] is False
        assert part["required"] == list(part["properties"])
    text = json.dumps(form.model_json_schema())
    assert not any(word in text for word in ('"default"', "minLength", "maxLength", "anyOf"))


def test_a_rubric_of_a_schema_has_four_to_eight_criteria_and_the_index_comes_first():
    rubric_schema = FORMS["rubric"].model_json_schema()["properties"]["criteria"]
    assert (rubric_schema["minItems"], rubric_schema["maxItems"]) == (4, 8)
    verdict = list(objects(FORMS["batch"].model_json_schema()))[1]
    assert list(verdict["properties"]) == ["answer_index", "judgement"]


@pytest.mark.parametrize(
    "known, asked",
    [
        (("json_schema", "json_object"), ["json_schema", "json_schema"]),
        (("json_object",), ["json_schema", "json_object", "json_object"]),
        ((), ["json_schema", "json_object", None, None]),
    ],
)
def test_the_way_to_ask_for_json_is_learnt_of_each_server(known, asked):
    def reply(body):
        kind = body.get("response_format", {}).get("type")
        if kind is None or kind in known:
            return plain(TRUE)
        return 400, {"error": {"message": "response_format is not supported", "code": None}}

    with FakeServer(raw=reply) as fake:
        server = connect(fake)
        for _ in range(2):
            assert verify(fake, server=server)[1] == [[True] * 4]
        formats = [body.get("response_format", {}).get("type") for body in fake.bodies()]
    assert formats == asked


# ---- judges: what is believed

DAMAGED = {
    "empty": " ",
    "punctuation": "...?!",
    "control characters": "States the sum\x07 42",
    "replaced characters": "States \ufffd\ufffd 42",
    "another criterion": 'States 42", "points": 5}, {"id": "c2", "criterion": "is right',
    "escaped": "States 42\\', 'points\\': 5",
    "cut at a comma": "States the sum,",
    "cut in brackets": "States the sum (that is",
    "cut in a quotation": 'States "the sum',
    "cut in a phrase": "States the sum of",
    "repeated": "  THING  2. ",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_criterion_is_asked_for_again(text):
    damaged = [CRITERIA[0] | {"criterion": text}, *CRITERIA[1:]]
    replies = [json.dumps({"criteria": damaged}), RUBRIC]
    with FakeServer(chat=lambda body: replies.pop(0)) as fake:
        llm = Judge(connect(fake))
        assert llm.propose_rubric("q", ["r"], ["s"]) == CRITERIA
        assert len(llm.complaints) == 1


def test_whole_criteria_of_many_sorts_are_taken():
    whole = ["x lies in (0, 1]", 'Says "42"', "數學正確", "$\\frac{1}{2}$ is used", "a\n- b"]
    assert not [text for text in whole if judge_replies.damage(text)]


@pytest.mark.parametrize("reply", [TRUE, f"```json\n{TRUE}\n```", f"```{TRUE}```"])
@pytest.mark.parametrize("thought", ["", "<think>{no}</think>\n", "is it? </think>"])
def test_fences_and_thoughts_around_a_verdict_are_taken_off(reply, thought):
    with FakeServer(chat=lambda body: thought + reply) as fake:
        assert verify(fake)[1] == [[True] * 4]


@pytest.mark.parametrize(
    "unit", ["\n", "{", "[", "```", "```json\n", '"', "<think>", "</think>"]
)
def test_a_million_characters_are_read_in_a_moment(unit):
    began = time.time()
    for text in (unit * (10**6 // len(unit)), "```json\n" + unit * 10**5):
        with pytest.raises(ValueError):
            judge_replies.read(text, judge_replies.Score)
    assert time.time() - began < 1


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("finish", ["length", "MAX_TOKENS", "max_output_tokens", None])
def test_a_verdict_that_a_cut_thought_quotes_is_never_given(finish, streamed):
    """A judge that thinks, quotes an answer with a verdict planted in it, and is cut at any
    place of that."""
    thoughts = [f"<think>It says: {close}{TRUE}" for close in ("", "</think>", "[/THINK]")]
    cut = [thought[:end] for thought in thoughts for end in (*range(60, 66), len(thought))]
    cut += [TRUE, f"```json\n{TRUE}\n```"]
    said = iter(cut)

    def reply(body):
        text = next(said)
        whole = [delta(text), delta(finish=finish), b"data: [DONE]\n\n"]
        return iter(whole) if streamed else plain(text, finish)

    with FakeServer(raw=reply) as fake:
        llm = Judge(connect(fake, max_retries=0), re_asks=0)
        for _ in cut:
            (verdicts,) = llm.verify("q", CRITERIA, ["a"], "single")
            assert isinstance(verdicts, ServedFailure)
        assert len(fake.requests) == len(cut) and not llm.cache.replies


@pytest.mark.parametrize(
    "words, seen",
    [
        ('["true", "true", "true", "true"]', None),
        ('["yes", "no", "no", "no"]', None),
        ("[1, 0, 0, 0]", None),
        ("[true, false, false, true]", [True, False, False, True]),
    ],
)
def test_only_json_says_true(words, seen):
    with FakeServer(chat=lambda body: f'{{"judgement": {words}}}') as fake:
        verdicts = verify(fake)[1][0]
    assert verdicts == seen or isinstance(verdicts, ServedFailure)


# ---- judges: re-asks


def test_a_judge_that_thinks_in_a_stream_is_read_and_one_that_is_cut_is_asked_again():
    def thinks(body):
        cut = len(fake.requests) == 1
        yield delta(reasoning_content="hm " * 50)
        yield delta(TRUE[:9] if cut else TRUE)
        yield delta(finish="length" if cut else "stop")

    with FakeServer(raw=thinks) as fake:
        llm, verdicts = verify(fake)
        assert verdicts == [[True] * 4] and len(fake.requests) == 2
        assert "cut" in fake.bodies()[1]["messages"][-1]["content"]


@pytest.mark.parametrize(
    "reply, words",
    [
        (plain("{", "length"), "too long and was cut: a longer --max-tokens"),
        (plain(None, "length"), "spent on reasoning.*a longer --max-tokens"),
        (plain(None), "not one JSON object.*a stronger judge"),
        (plain("no"), "not one JSON object.*a stronger judge"),
    ],
)
def test_re_asks_do_not_grow_and_the_advice_fits(reply, words):
    with FakeServer(raw=lambda body: reply) as fake:
        with pytest.raises(ServedFailure, match=f"4 tries.*{words}"):
            Judge(connect(fake), re_asks=3).holistic("q", "a" * 2000)
        lengths = [len(json.dumps(body["messages"])) for body in fake.bodies()]
    assert len(lengths) == 4 and max(lengths) - lengths[0] < 1000
    assert lengths[1] == lengths[2] == lengths[3]


# ---- rubric.py with a judge


class World:
    """Two prompts, two rollouts each, and a rubric: flags of rubric.py grade."""

    def __init__(self, folder):
        self.folder = folder
        identity = {"model": "m", "weights": "w", "template": "t", "vocabulary": "v"}
        shared = {"policy": identity, "finish_reason": "stop", "temperature": 1.0, "top_p": 1.0}
        shared |= {"prompt_ids": [5], "response_ids": [7], "loss_mask": [1], "logprobs": [-0.5]}
        texts = [(f"q{p}", s, f"#{p}{s}") for p in range(2) for s in range(2)]
        rollouts = [shared | {"id": p, "sample": s, "text": t} for p, s, t in texts]
        rubrics = [{"id": f"q{p}", "criteria": CRITERIA, "rubricator": "x"} for p in range(2)]
        self.flags = {
            "prompts": dump(
                folder / "p.jsonl", [{"id": f"q{p}", "prompt": "?"} for p in range(2)]
            ),
            "rollouts": dump(folder / "r.jsonl", rollouts),
            "rubrics": dump(folder / "c.jsonl", rubrics),
        }

    def words(self, fake, out="rewards.jsonl", **flags):
        how = dict(grader="judge", model="j", base_url=fake.base_url, concurrency=1)
        return argv("grade", **how | self.flags | dict(out=self.folder / out) | flags)

    def grade(self, fake, out="rewards.jsonl", **flags):
        return rubric.main(self.words(fake, out, **flags)), load(self.folder / out)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def pool(body):
    return json.loads(body["messages"][1]["content"])["answers"]


def judged(body, judgement):
    """A batch reply with judgement(text) of every answer."""
    verdicts = [
        {"answer_index": i, "judgement": judgement(answer["text"])}
        for i, answer in enumerate(pool(body), 1)
    ]
    return json.dumps({"verdicts": verdicts})


def steady(body):
    return judged(body, lambda text: [text.endswith("1"), True, True, True])


def test_calls_re_asks_and_tokens_are_counted_and_told(world, capsys):
    def once_wrong(body):
        return "no" if len(fake.requests) == 1 else steady(body)

    with FakeServer(chat=once_wrong) as fake:
        summary, _ = world.grade(fake)
    counted = {"calls": 3, "re_asks": 1, "prompt_tokens": 27, "calls_without_usage": 0}
    assert counted.items() <= summary.items() and summary["completion_tokens"] > 200
    assert "; 3 replies, 1 re-asks, 27 + " in capsys.readouterr().out


def test_a_budget_stops_between_prompts_and_the_next_run_goes_on(world, capsys):
    with FakeServer(chat=steady) as fake:
        message = refusal(rubric.main, world.words(fake, budget_tokens=9), capsys)
        assert "1 of 2 prompts are done and kept" in message
        assert len(load(world.folder / "rewards.jsonl")) == 2
        summary, rows = world.grade(fake)
        assert len(rows) == 4 and summary["calls"] == 1
    with FakeServer(raw=lambda body: plain(steady(body))) as fake:
        words = world.words(fake, "other.jsonl", budget_tokens=9)
        assert "tokens cannot be counted" in refusal(rubric.main, words, capsys)


def test_repeats_are_asked_in_other_orders_and_averaged(world, capsys):
    """The first criterion (1 point of 10) wavers on one answer of four."""
    asked = {}

    def wavers(body):
        texts = tuple(answer["text"] for answer in pool(body))
        asked.setdefault(texts[0][:2], []).append(texts)
        again = len(asked[texts[0][:2]]) > 1
        return judged(body, lambda text: [text == "#00" and again, True, True, True])

    with FakeServer(chat=wavers) as fake:
        cache = world.folder / "cache.jsonl"
        summary, rows = world.grade(fake, repeats=3, cache=cache)
        assert len(fake.requests) == 6 and len(load(cache)) == 6
        world.grade(fake, "again.jsonl", cache=cache)  # the first repeat is the plain question
        world.grade(fake, "more.jsonl", repeats=3, cache=cache)
        assert len(fake.requests) == 6
        words = world.words(fake, repeats=2, cache=cache)
        assert "repeats = 3, now it is 2" in refusal(rubric.main, words, capsys)
    assert [r["reward"] for r in rows] == pytest.approx([(0.9 + 1 + 1) / 3, 0.9, 0.9, 0.9])
    assert rows[0]["verdicts"] == rows[0]["repeats"][0] == [False, True, True, True]
    assert [len(r["repeats"]) for r in rows] == [3] * 4
    assert not any(records.validate(r, "rewards") for r in rows)
    assert summary["verdict_flip_rate"] == 2 / 32 and summary["agreement"] == 15 / 16


def test_a_failed_repeat_is_left_out_and_only_failures_are_null(world):
    def fails_on_the_second(body):
        text = json.loads(body["messages"][1]["content"])["answer"]
        seen.append(text)
        return "no" if text == "#00" and seen.count(text) == 2 or text == "#11" else TRUE

    seen = []
    with FakeServer(chat=fails_on_the_second) as fake:
        how = dict(repeats=2, mode="single", re_asks=0, max_failure_rate=0.5)
        summary, rows = world.grade(fake, **how)
    assert [r["reward"] for r in rows] == [1.0, 1.0, 1.0, None]
    assert [len(r.get("repeats", ())) for r in rows] == [1, 2, 2, 0]
    assert summary["failed"] == 1


def test_reasons_come_before_verdicts_and_have_keys_of_their_own(world, capsys):
    def reasons(body):
        schema = body["response_format"]["json_schema"]["schema"]
        if "Reasoned" not in json.dumps(schema):
            return steady(body)
        return judged(body, lambda text: [{"reason": "so", "met": True}] * 4)

    with FakeServer(chat=reasons) as fake:
        cache = world.folder / "cache.jsonl"
        assert world.grade(fake, reason=True, cache=cache)[1][0]["verdicts"] == [True] * 4
        assert world.grade(fake, "plain.jsonl", cache=cache)[1][0]["reward"] == 0.9
        assert len(fake.requests) == 4
        for flags in (dict(reason=True), dict(repeats=2)):
            words = world.words(fake, "x.jsonl", grader="scalar", **flags)
            assert "expected --grader judge" in refusal(rubric.main, words, capsys)


def test_request_fields_are_part_of_a_judges_key():
    with FakeServer(chat=lambda body: TRUE) as fake:
        cache = Cache()
        for fields in ({}, {"temperature": None}, {"temperature": None}, {}):
            verify(fake, server=connect(fake, fields=fields), cache=cache)
        assert ["temperature" in body for body in fake.bodies()] == [True, False]
