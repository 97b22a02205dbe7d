"""Every call to an OpenAI-compatible server: a served student samples, a served teacher scores,
a judge replies.

    vllm serve Qwen/Qwen3-0.6B --generation-config vllm --logprobs-mode processed_logprobs
    python rollout.py --model Qwen/Qwen3-0.6B --tokenizer FOLDER \\
        --base-url http://localhost:8000/v1 --prompts P --out R

Two kinds of trouble are kept apart everywhere:
- `ServedFailure`: this one request has no answer (silence, 429 or 5xx after all retries, a
  broken body, a prompt that is too long, a filtered answer).  The item is counted as failed,
  the others go on; it is never given a made-up value.  Its words say what may help.
- `BadInput`: no request can succeed until a person changes something (wrong key, unknown model,
  nobody listening, a server that returns no token ids).  It stops the stage.

Replies are streamed, so --timeout is the longest silence, not the longest answer.
opd/served_reply.py reads them.

Simplifications:
1. A server that sends a byte now and then is waited for, however long its answer takes.
2. Before a retry: 0.5 s, doubled up to 8 s, with jitter; Retry-After, where it is a number of
   seconds, is obeyed up to two minutes.
3. Prompt scoring is not streamed: its reply is one pass over the prompt.
"""

import itertools
import json
import math
import queue
import random
import re
import sys
import threading
import time
from urllib.parse import urlsplit

from opd import files
from opd.records import BadInput, is_number
from opd.redact import api_key, printable, without_key
from opd.served_reply import (
    SCORE_ADVICE,
    Cut,
    Reply,
    ServedFailure,
    Usage,
    cure,
    entry_of,
    error_of,
    events_of,
    is_stream,
)

# a server fills missing fields from the model's generation_config.json, and then samples from
# a distribution nobody recorded
PLAIN = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0}
# vLLM's own fields; an OpenAI server refuses them
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 8.0
# --request-json cannot touch what the stage itself decides
FIXED = ("model", "messages", "prompt")
# nor, where token ids and log-probs count, the distribution that a record claims
DISTRIBUTION = {*PLAIN, *NEUTRAL, "temperature", "top_p", "logit_bias", "logprobs"}


class _Refused(BadInput):
    """HTTP 400 or 422: the server does not accept a field of the request.  words: what it
    says, uncut, so not for printing."""

    words = ""


class _Passing(Exception):
    """Trouble that may pass: the request is sent again.  after: the server's Retry-After;
    final: what it becomes when it stays."""

    def __init__(self, said, advice, after=None, final=ServedFailure):
        super().__init__(said)
        self.advice = advice
        self.after = after
        self.final = final


def add_flags(parser):
    """The flags of every stage that can talk to a server; `Server.from_flags` reads them (and
    --model)."""
    parser.add_argument(
        "--base-url",
        help="OpenAI-compatible server, e.g. http://localhost:8000/v1 (vllm serve); needs no "
        "GPU here, but the sampler is then a program this code does not control.  Its key is "
        "read from $OPENAI_API_KEY, so that none is on a command line; local servers need none",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=8,
        help="requests in flight; more fills the server's batch, until it answers 429 or "
        "queues past the timeout",
    )
    parser.add_argument(
        "--max-retries",
        type=int,
        default=5,
        help="after 429, 5xx, silence and lost connections",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        help="longest silence of the server in seconds; replies are streamed",
    )
    parser.add_argument(
        "--max-failure-rate",
        type=float,
        default=0.1,
        help="share of all requests; more failures stop the stage, fewer are left for the next "
        "run",
    )
    parser.add_argument(
        "--request-json",
        metavar="JSON",
        help="fields of every request to add, to change or, by null, to leave out, e.g. "
        """'{"seed": null, "reasoning_effort": "low"}'; records name the temperature and """
        "top_p that were sent, if any",
    )


def request_fields(text):
    """The object of --request-json; {} where the flag is not given."""
    try:
        fields = json.loads(text or "{}")
        json.dumps(fields, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"--request-json: expected a JSON object, got {text} ({error})"
        ) from None
    if type(fields) is not dict:
        raise BadInput(f"--request-json: expected a JSON object, got {text}")
    for name in FIXED:
        if name in fields:
            raise BadInput(f"--request-json: {name}: expected another field: the stage sets it")
    if fields.get("n") not in (None, 1):
        raise BadInput(f"--request-json: n: expected null or 1, got {fields['n']!r}")
    for name in ("temperature", "top_p"):
        value = fields.get(name)
        if value is not None and not is_number(value):
            raise BadInput(f"--request-json: {name}: expected a number or null, got {value!r}")
    return fields


def failure_limit(args):
    """How many requests may fail: a share of all, or every one of the first few."""
    return files.FailureLimit(args.max_failure_rate, 2 * args.concurrency)


class Server:
    """One model behind one base URL.  Thread-safe.

    server = Server("http://localhost:8000/v1", "Qwen/Qwen3-0.6B")
    server.sample("2+2=", max_tokens=4, temperature=1.0, top_p=1.0, seed=0, need_tokens=True)
    -> {"text": "4", "finish_reason": "stop", "prompt_ids": [17, 10, 17, 28],
        "response_ids": [19, 151643], "logprobs": [-0.2, -0.9]}

    timeout: longest silence in seconds; fields: see --request-json."""

    def __init__(
        self, base_url, model, concurrency=8, max_retries=5, timeout=120.0, fields=None
    ):
        try:
            import openai
        except ImportError:
            raise BadInput(
                "a server (--base-url) needs the openai package: pip install openai"
            ) from None
        check_address(base_url or "")
        # what is written into run files; a key in it would be too
        kept = {"--base-url": base_url, "--model": model, "--request-json": fields or {}}
        for flag, value in kept.items():
            if without_key(json.dumps(value)) != json.dumps(value):
                raise BadInput(f"{flag}: expected no key in it: $OPENAI_API_KEY holds the key")
        if concurrency < 1 or max_retries < 0 or not timeout > 0:
            raise BadInput(
                f"expected --concurrency of at least 1, --max-retries of at least 0 and more "
                f"than 0 seconds of --timeout, got {concurrency}, {max_retries} and {timeout}"
            )
        # local servers accept any key, but want one
        key = api_key() or "EMPTY"
        if not key.isascii() or not key.isprintable() or " " in key:
            raise BadInput("$OPENAI_API_KEY: expected a key of printable ASCII characters")
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.concurrency = concurrency
        self.max_retries = max_retries
        self.fields = fields or {}
        self.vocabulary = math.inf  # token ids of a reply are below it
        self.usage = Usage()
        self._openai = openai
        # retries are ours: a stream can break off after the client has handed it over; and a
        # prompt goes to no other place than the one that was given
        self._client = openai.OpenAI(
            base_url=self.base_url,
            api_key=key,
            max_retries=0,
            timeout=timeout,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )
        # httpx or its successor: while a body is read, its errors come as they are
        transport = sys.modules[openai.DefaultHttpxClient.__base__.__module__.split(".")[0]]
        self._connection_errors = (openai.APIConnectionError, transport.RequestError)
        self._lock = threading.Lock()
        # what the server has refused so far
        self._streams = True
        self._max_tokens = "max_tokens"  # newer OpenAI models only know max_completion_tokens
        self._refused_formats = set()

    @classmethod
    def from_flags(cls, args):
        return cls(
            args.base_url,
            args.model,
            args.concurrency,
            args.max_retries,
            args.timeout,
            request_fields(args.request_json),
        )

    def map(self, function, items):
        """Yields (item, function(item)) as answers arrive, with `concurrency` calls at a time,
        in any order.

        A ServedFailure raised by `function` is yielded in place of its result; any other
        exception is raised here, and nothing more is sent.  An item is taken from `items` when
        its turn comes, so a generator of a million prompts is never held in memory.  The
        threads are daemons, which those of concurrent.futures are not: Ctrl-C does not wait for
        a server that hangs."""
        waiting = iter(items)
        done = queue.SimpleQueue()

        def call(item):
            try:
                done.put((item, function(item)))
            except BaseException as error:
                done.put((item, error))

        def start(most):
            started = list(itertools.islice(waiting, most))
            for item in started:
                threading.Thread(target=call, args=(item,), daemon=True).start()
            return len(started)

        running = start(self.concurrency)
        while running:
            item, result = done.get()
            if isinstance(result, BaseException) and not isinstance(result, ServedFailure):
                raise result
            running += start(1) - 1
            yield item, result

    def sent(self, **claimed):
        """Those of the claimed fields that a request holds, as --request-json leaves them."""
        changed = {name: self.fields.get(name, value) for name, value in claimed.items()}
        return {name: value for name, value in changed.items() if value is not None}

    def sample(
        self,
        prompt,
        *,
        max_tokens,
        temperature,
        top_p,
        seed,
        need_tokens,
        template_options=None,
    ):
        """One answer.  prompt: a list of messages (chat completions) or a string (plain
        completions).

        Returns {"text", "finish_reason": "stop" | "length"}, and with need_tokens also
        "prompt_ids", "response_ids" (an end token that was sampled is the last one) and
        "logprobs", one per response token.

        Every sampling field is sent.  Without need_tokens the server may be any make, and
        vLLM's own fields (NEUTRAL) cannot be sent: start vLLM with --generation-config vllm.
        The log-probs are those of the sampling distribution only if the server runs with
        --logprobs-mode processed_logprobs, or temperature and top_p are 1; a reply does not
        tell."""
        request = PLAIN | {"temperature": temperature, "top_p": top_p, "seed": seed}
        if need_tokens:
            self._check_distribution()
            request |= {**NEUTRAL, "return_token_ids": True}
            request["logprobs"] = 1 if isinstance(prompt, str) else True
        if isinstance(prompt, str):
            request |= {"prompt": prompt, "max_tokens": max_tokens}
            reply = self._call("completions", request)
        else:
            if template_options:
                request["chat_template_kwargs"] = template_options
            # go on with this answer, do not begin another one (vLLM's fields)
            if prompt[-1]["role"] == "assistant":
                request |= {"add_generation_prompt": False, "continue_final_message": True}
            reply = self._chat(request | {"messages": prompt}, max_tokens)
        answer = {"text": reply.text, "finish_reason": reply.finish}
        return answer | reply.tokens(self.vocabulary) if need_tokens else answer

    def _check_distribution(self):
        """Log-probs are of the distribution that a record names: nothing may change it."""
        if touched := DISTRIBUTION & self.fields.keys():
            raise BadInput(
                f"--request-json: {min(touched)}: expected other fields, for log-probs are of "
                f"the distribution that this one shapes: use the stage's own flags"
            )

    def score(self, ids, prompt_length, top_k=0):
        """The model's log-probs of ids[prompt_length:], each given all ids before it, at
        temperature 1.

        Returns (logprobs [T], topk_ids [T][top_k] or None, topk_logprobs or None), top-k by
        descending log-prob.

        ids [5, 8, 9], prompt_length 1, top_k 1; the server's prompt_logprobs are
            [null, {"7": {"logprob": -0.2}, "8": {"logprob": -1.7}}, {"9": {"logprob": -0.1}}]
        -> ([-1.7, -0.1], [[7], [9]], [[-0.2], [-0.1]])
        The first entry, 7, is not the token that stands there."""
        if not 1 <= prompt_length < len(ids):
            raise ValueError(
                f"prompt_length {prompt_length}: expected 1 to {len(ids) - 1}, at least one "
                f"token on either side"
            )
        # vLLM generates at least one token; prompt log-probs are of the raw distribution, the
        # neutral fields make sure
        one = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "seed": 0}
        scored = {**NEUTRAL, "prompt": ids, "prompt_logprobs": max(top_k, 1)}
        self._check_distribution()
        entries = self._call("completions", PLAIN | one | scored).prompt_logprobs
        if type(entries) is not list or len(entries) != len(ids):
            got = len(entries) if type(entries) is list else "none"
            raise ServedFailure(
                f"expected {len(ids)} prompt_logprobs, one per token, got {got}: {SCORE_ADVICE}"
            )
        logprobs, top = [], []
        for position in range(prompt_length, len(ids)):
            here = entry_of(entries, position, ids[position], top_k, self.vocabulary)
            logprobs.append(here[ids[position]])
            top.append(sorted(here.items(), key=lambda pair: (-pair[1], pair[0]))[:top_k])
        if not top_k:
            return logprobs, None, None
        topk_ids = [[token for token, _ in row] for row in top]
        return logprobs, topk_ids, [[value for _, value in row] for row in top]

    def chat_text(self, messages, *, temperature, max_tokens, schema=None):
        """A judge's reply as a string; raises Cut if it ended at max_tokens.

        The server is asked to decode nothing but JSON, of the JSON `schema` if there is one.
        A server that refuses that is asked for any JSON object, then for text, from then on."""
        request = PLAIN | {"messages": messages, "temperature": temperature, "top_p": 1.0}
        refused = set()
        for way in response_formats(schema):
            if way["type"] in self._refused_formats:
                continue
            try:
                reply = self._chat(request | {"response_format": way}, max_tokens)
                break
            except _Refused:  # perhaps that field, perhaps another: the next request tells
                refused.add(way["type"])
        else:
            reply = self._chat(request, max_tokens)
        self._refused_formats |= refused
        if reply.finish == "length":
            raise Cut("it was too long and was cut")
        return reply.text

    def _chat(self, request, max_tokens):
        spelling = self._max_tokens
        try:
            return self._call("chat", request | {spelling: max_tokens})
        except _Refused as refusal:
            if spelling != "max_tokens" or "max_completion_tokens" not in refusal.words:
                raise
        self._max_tokens = "max_completion_tokens"
        return self._call("chat", request | {self._max_tokens: max_tokens})

    def _call(self, kind, request):
        """The Reply to one request, streamed unless the server refuses that."""
        plainly = "prompt_logprobs" in request or not self._streams
        try:
            return self._persist(kind, request if plainly else request | STREAMED)
        except _Refused as refusal:
            if plainly or "stream" not in refusal.words:
                raise
        with self._lock:
            if self._streams:
                print(f"{self.base_url}: refuses to stream: --timeout must cover a whole reply")
            self._streams = False
        return self._persist(kind, request)

    def _persist(self, kind, request):
        """Sends a request again while its trouble may pass, at most max_retries times.  The
        words of a server that an exception quotes have no key and no unseen character."""
        body = {k: v for k, v in (request | self.fields).items() if v is not None}
        for tries in itertools.count(1):
            try:
                return self._once(kind, body)
            except _Passing as trouble:
                if tries > self.max_retries:
                    said = f"{trouble}, {tries} times: {trouble.advice}"
                    raise trouble.final(shown(said)) from None
                time.sleep(pause(tries, trouble.after))
            except (BadInput, ServedFailure) as error:
                error.args = (shown(str(error)),)
                raise error from None

    def _once(self, kind, body):
        """Sends one request and reads its reply.  The one place that sees HTTP."""
        openai, client = self._openai, self._client
        endpoint = client.chat.completions if kind == "chat" else client.completions
        given = "messages" if kind == "chat" else "prompt"
        more = {name: value for name, value in body.items() if name != given}
        create = endpoint.with_streaming_response.create
        asked = {"model": self.model, given: body[given], "extra_body": more}
        try:
            with create(**asked) as response:
                return self._read(response)
        except self._connection_errors as error:
            raise self._lost(error) from None
        except openai.APIStatusError as error:
            # without the cause: its request carries the key
            raise self._trouble(error, body) from None
        except UnicodeEncodeError:
            raise ServedFailure(
                "the prompt holds half a surrogate pair, which UTF-8 cannot carry"
            ) from None

    def _read(self, response):
        """The Reply in an HTTP response; a body that breaks off may be whole next time."""
        reply = Reply()
        broken = "the stream broke off" if is_stream(response) else "the reply is no whole JSON"
        trouble = _Passing(broken, "look at the server's log")
        try:
            for event in events_of(response):
                self._check_event(event)
                reply.add(event)
        except (ValueError, RecursionError):
            raise trouble from None
        if reply.finish is None and is_stream(response):
            raise trouble
        with self._lock:
            self.usage.add(reply.usage)
        reply.check()
        return reply

    def _check_event(self, event):
        """Raises what an error inside a reply, which HTTP calls a success, amounts to."""
        if type(event) is not dict:
            raise ServedFailure(f"the reply is a JSON {type(event).__name__}, not an object")
        error = error_of(event)
        if not error:
            return
        code, words = error
        said = f"error in a reply: {shown(words)[:300]}"
        # a gateway without a code passes on its provider's trouble
        if passes(int(code) if code.isdecimal() else 503):
            raise _Passing(said, "a lower --concurrency may help")
        advice = cure(words) or "look at the server's log"
        raise ServedFailure(f"{said}: {advice}")

    def _lost(self, error):
        """What to make of a connection that failed or fell silent."""
        cause = type(error.__cause__ or error).__name__
        if cause in ("ConnectError", "ConnectTimeout"):
            return _Passing(
                f"{self.base_url}: no connection",
                "is the server running and is --base-url right?",
                final=BadInput,
            )
        if "Timeout" in cause:
            silence = f"no answer within {self._client.timeout:g} s"
            return _Passing(silence, "a longer --timeout or a lower --concurrency may help")
        return _Passing(
            f"connection lost ({cause})",
            "look at the server's log; a field that it cannot bear, such as seed, is left out "
            "by --request-json",
        )

    def _trouble(self, error, body):
        """The exception for a status that is no success: whose problem is it?"""
        status = error.status_code
        words = error.message
        if " - " not in words:
            words = f"{words} - {error.response.text}"
        words += f" ({error.code})" if error.code else ""
        said = shown(" ".join(words.split()))[:300]
        # the server's own words can quote parts of the key: leave them out
        if 300 <= status < 400:
            to = shown(error.response.headers.get("location", "nowhere"))[:200]
            return BadInput(
                f"{self.base_url}: {status}, it sends us to {to}: redirects are not followed: "
                f"give the right --base-url"
            )
        if status in (401, 403):
            return BadInput(
                f"{self.base_url}: {status}, the key in $OPENAI_API_KEY is not accepted for "
                f"model {self.model}: set that variable"
            )
        if status == 404:
            return BadInput(
                f"{self.base_url}: no model {self.model!r} there, or the address lacks its "
                f"/v1: {said}"
            )
        if status == 429 and "insufficient_quota" in words:
            return BadInput(f"{self.base_url}: the account has no credit left: {said}")
        advice = cure(words)
        if passes(status):
            if status == 429:
                advice = "a lower --concurrency may help"
            after = error.response.headers.get("retry-after")
            return _Passing(said, advice or "look at the server's log", after)
        if status == 413 or advice:
            return ServedFailure(f"{said}: {advice or 'shorten the prompt'}")
        if status not in (400, 422):
            return BadInput(f"{self.base_url}: the server refuses the request: {said}")
        refused = _Refused(
            f"{self.base_url}: the server refuses the request: {said}: {left_out(body, words)}"
        )
        refused.words = words
        return refused


def shown(words):
    """What a server says, for a message.  To be cut only then: half a key is one, too."""
    return printable(without_key(words))


def check_address(base_url):
    """Refuses what is no address of a server, without repeating secrets that may be in it."""
    try:
        parts = urlsplit(base_url)
        parts.port  # raises ValueError, as does a host that no name can be
        (parts.hostname or "").encode("idna")
        if not (base_url.isascii() and base_url.isprintable()):
            raise ValueError
    except ValueError:
        raise BadInput(
            "--base-url: expected an address, got one with a bad host or port"
        ) from None
    # the address is written into run files
    if "@" in base_url or parts.query or parts.fragment:
        raise BadInput(
            "--base-url: expected an address without user, password, query or fragment: give "
            "the key in $OPENAI_API_KEY"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(
            f"--base-url: expected an address like http://localhost:8000/v1, got "
            f"{shown(base_url)!r}"
        )


def response_formats(schema):
    """Ways to ask for JSON, the strictest first."""
    any_object = {"type": "json_object"}
    if schema is None:
        return [any_object]
    named = {"name": "reply", "schema": schema, "strict": True}
    return [{"type": "json_schema", "json_schema": named}, any_object]


def pause(tries, after):
    """Seconds before the next try: what Retry-After says, or 0.5, 1, 2, 4, 8 with jitter."""
    try:
        seconds = float(after)
    except (TypeError, ValueError):
        seconds = -1.0
    if seconds >= 0:
        return min(seconds, 120.0)
    return min(FIRST_PAUSE * 2 ** (tries - 1), LONGEST_PAUSE) * random.uniform(0.75, 1.0)


def passes(status):
    """Whether a request with this status may succeed when it is sent again."""
    return status in (408, 409, 429) or status >= 500


def left_out(body, words):
    """How to leave out the fields of a request that a refusal names."""
    named = [f for f in body if f not in FIXED and re.search(rf"\b{re.escape(f)}\b", words)]
    example = json.dumps({(named or ["FIELD"])[-1]: None})
    about = f"it names {', '.join(named)}; " if named else ""
    return f"{about}--request-json '{example}' leaves a field out"
