"""A small OpenAI-compatible server for tests, on 127.0.0.1 and a free port, that misbehaves on
request.

    with FakeServer(chat=lambda body: "hello", script=["429", "500"]) as fake:      # two bad
    answers, then normal ones
        served.Server(fake.base_url, "m").chat_text([{"role": "user", "content": "hi"}],
        temperature=0, max_tokens=8) fake.requests[0]["body"]["temperature"],
        fake.requests[0]["headers"]["authorization"]

chat(body) makes the text of a chat or plain completion (a string, or {"text",
"finish_reason"}).  Tokens are characters: id = code point mod 1000, and END closes an answer
that stops.  distribution(prefix) -> the log-probs of VOCABULARY tokens after those ids; it
scores prompts given as ids.  tokenizer: a transformers tokenizer to speak in instead of
characters.

What a script entry does to one request: "normal"; "429", "500", "400", "401", "404", "quota",
"long" (context length); "leak" (a 400 that quotes the key far into its message); "hang" (no
answer before the server closes); "cut" (a shorter body than its JSON); "torn" (a shorter body
than its Content-Length); "not_json"; "array"; "no_choices"; "filtered"; "null_text";
"few_logprobs"; "no_logprobs"; "no_token_ids"; "no_prompt_logprobs"; "short_prompt_logprobs";
"wrong_prompt_logprobs"; "high_logprobs" (above 0); "unknown_ids"; "other_text" (than the ids
spell); "broken_stream" (it ends in the middle of an event). "no_response_format" and
"no_max_tokens" refuse that one field.  `always` does the same to every request.

A request for a stream gets one, a token an event, if it is served as "normal".  raw(body): what
is sent instead of all that, pieces of server-sent events (bytes) with pauses (seconds) between,
or a reply (a dict or bytes, or (status, these), or (status, these, {header: value})).
"""

import hashlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

END, VOCABULARY = 2, 16
REFUSALS = {  # behaviour: status, message, code
    "429": (429, "slow down", None),
    "quota": (429, "no credit", "insufficient_quota"),
    "500": (500, "engine died", None),
    "400": (400, "unknown field", None),
    "long": (400, "This model's maximum context length is 8 tokens", None),
    "no_response_format": (400, "response_format is not supported", None),
    "no_max_tokens": (400, "use max_completion_tokens instead of max_tokens", None),
}
MALFORMED = {
    "not_json": b"<html>proxy error</html>",
    "array": [],
    "no_choices": {"choices": []},
}


def distribution(prefix):
    """Some fixed log-probs over VOCABULARY tokens for every prefix of ids."""
    logits = [
        byte / 32 for byte in hashlib.sha256(json.dumps(prefix).encode()).digest()[:VOCABULARY]
    ]
    total = math.log(sum(map(math.exp, logits)))
    return [z - total for z in logits]


def event(value):
    """One server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def events(reply):
    """A plain reply as vLLM streams it: the role, an event a token, the end, the usage."""
    choice = reply["choices"][0]
    chat = "message" in choice
    text = choice["message"]["content"] if chat else choice["text"]
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
    steps = max(len(text), len(ids or ()))
    yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]} if chat else {})
    for i in range(steps):
        said = text[i : i + 1] if i < steps - 1 else text[i:]
        part = {"delta": {"content": said}} if chat else {"text": said}
        if ids:
            part["token_ids"] = ids[i : i + 1]
        if logprobs:
            part["logprobs"] = {k: v[i : i + 1] for k, v in logprobs.items()}
        one = {"choices": [part]}
        if not i:
            place = one if chat else part
            place["prompt_token_ids"] = (reply if chat else choice).get("prompt_token_ids")
        yield event(one)
    yield event({"choices": [{"delta": {}, "finish_reason": choice["finish_reason"]}]})
    tokens = {"prompt_tokens": 9, "completion_tokens": len(ids) if ids else len(text)}
    yield event({"choices": [], "usage": tokens})
    yield b"data: [DONE]\n\n"


class FakeServer:
    def __init__(
        self,
        chat=lambda body: "ok",
        script=(),
        always=None,
        distribution=distribution,
        retry_after="0.01",
        tokenizer=None,
        raw=None,
        port=0,
    ):
        self.raw = raw
        self.chat, self.script, self.always, self.distribution = (
            chat,
            iter(script),
            always,
            distribution,
        )
        self.port = port
        self.retry_after, self.tokenizer = retry_after, tokenizer
        self.requests, self.in_flight, self.most_in_flight = [], 0, 0
        self._lock, self._closing = threading.Lock(), threading.Event()

    def __enter__(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or a body waits 40 ms behind its headers

            def do_POST(self):
                fake._serve(self)

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads, self._http.block_on_close = True, False
        self.base_url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def bodies(self):
        return [request["body"] for request in self.requests]

    def _serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append(
                {
                    "path": handler.path,
                    "body": body,
                    "headers": {k.lower(): v for k, v in handler.headers.items()},
                }
            )
            behaviour = self.always or next(self.script, "normal")
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if behaviour == "hang":
                self._closing.wait(30)
                handler.close_connection = True
                return
            status, reply = 200, self.raw(body) if self.raw else None
            headers = {}
            if isinstance(reply, tuple):
                status, reply, *more = reply
                headers = dict(*more)
            if reply is None:
                status, reply = self._reply(handler.path, body, behaviour)
                if body.get("stream") and behaviour == "normal" and status == 200:
                    reply = events(reply)
                if behaviour == "broken_stream":
                    reply = (b"".join(events(reply))[:-200],)
            if not isinstance(reply, (dict, list, bytes)):
                return self._stream(handler, reply)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            if behaviour == "cut":
                data = data[: len(data) // 2]
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header(
                "Content-Length", str(len(data) + (100 if behaviour == "torn" else 0))
            )
            for name, value in headers.items():
                handler.send_header(name, value)
            if status in (429, 500) and self.retry_after and not headers:
                handler.send_header("Retry-After", self.retry_after)
            handler.end_headers()
            handler.wfile.write(data)
            handler.close_connection = behaviour == "torn"
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True  # the client gave up
        finally:
            with self._lock:
                self.in_flight -= 1

    def _stream(self, handler, pieces):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        for piece in pieces:
            if isinstance(piece, bytes):
                handler.wfile.write(piece)
                handler.wfile.flush()
            else:
                self._closing.wait(piece)

    def _reply(self, path, body, behaviour):
        key = self.requests[-1]["headers"].get("authorization", "").removeprefix("Bearer ")
        refusals = REFUSALS | {
            "leak": (400, "bad " * 65 + key, None),
            # a careless server that quotes the key it was given
            "401": (401, f"Incorrect API key provided: {key}", "invalid_api_key"),
            "404": (404, f"The model {body['model']} does not exist", None),
        }
        only = {"no_response_format": "response_format", "no_max_tokens": "max_tokens"}
        if behaviour in refusals and only.get(behaviour, "model") in body:
            status, message, code = refusals[behaviour]
            return status, {"error": {"message": message, "type": "error", "code": code}}
        if behaviour in MALFORMED:
            return 200, MALFORMED[behaviour]
        if "prompt_logprobs" in body:
            return 200, self._score(body, behaviour)
        return 200, self._answer(body, behaviour, chat=path.endswith("/chat/completions"))

    def _answer(self, body, behaviour, chat):
        answer = self.chat(body)
        answer = {"text": answer} if isinstance(answer, str) else answer
        text, finish = answer["text"], answer.get("finish_reason", "stop")
        if behaviour == "filtered":
            finish = "content_filter"
        if behaviour == "null_text":  # all of its tokens were thoughts
            finish = "length"
        ids = [ord(c) % 1000 for c in text] + ([END] if finish == "stop" else [])
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        prompt_ids = [ord(c) % 1000 for c in prompt] if isinstance(prompt, str) else prompt
        if self.tokenizer:  # a real vocabulary and template
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [
                self.tokenizer.eos_token_id
            ] * (finish == "stop")
            if chat:
                prompt = self.tokenizer.apply_chat_template(
                    body["messages"],
                    tokenize=False,
                    add_generation_prompt=body.get("add_generation_prompt", True),
                    continue_final_message=body.get("continue_final_message", False),
                )
            prompt_ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if behaviour == "unknown_ids":
            ids = [10**9 + i for i in ids]
        if behaviour == "other_text":
            text += "#8"
        logprobs = [-0.5 - 0.01 * i for i in range(len(ids) - (behaviour == "few_logprobs"))]
        if behaviour == "high_logprobs":
            logprobs = [-logprob for logprob in logprobs]
        choice = {"index": 0, "finish_reason": finish, "logprobs": None}
        reply = {"id": "x", "created": 0, "model": body["model"], "choices": [choice]}
        content = None if behaviour == "null_text" else text
        choice |= (
            {"message": {"role": "assistant", "content": content}} if chat else {"text": text}
        )
        if body.get("logprobs") and behaviour != "no_logprobs":
            listed = {"content": [{"token": "?", "logprob": v} for v in logprobs]}
            flat = {"tokens": ["?"] * len(logprobs), "token_logprobs": logprobs}
            choice["logprobs"] = listed if chat else flat
        if body.get("return_token_ids") and behaviour != "no_token_ids":
            choice["token_ids"] = ids
            (reply if chat else choice)["prompt_token_ids"] = prompt_ids
        return reply

    def _score(self, body, behaviour):
        """prompt_logprobs as vLLM writes them: the best k and the token itself, here with the
        token last."""
        ids, k = body["prompt"], body["prompt_logprobs"]
        entries = [None]
        for i in range(1, len(ids)):
            row = self.distribution(ids[:i])
            rank = sorted(range(len(row)), key=lambda token: -row[token])
            shown = [token for token in reversed(rank[:k]) if token != ids[i]] + [ids[i]]
            if behaviour == "wrong_prompt_logprobs":
                shown = [token for token in range(len(row)) if token != ids[i]][:k]
            entries.append(
                {
                    str(t): {"logprob": row[t], "rank": rank.index(t) + 1, "decoded_token": "?"}
                    for t in shown
                }
            )
        if behaviour == "short_prompt_logprobs":
            entries = [None]
        if behaviour == "high_logprobs":
            entries[-1] = {i: value | {"logprob": 5.0} for i, value in entries[-1].items()}
        if behaviour == "unknown_ids":
            entries[-1] |= {str(10**9): {"logprob": -0.1}}
        choice = {
            "index": 0,
            "text": "?",
            "finish_reason": "length",
            "prompt_logprobs": entries,
        }
        if behaviour == "no_prompt_logprobs":
            del choice["prompt_logprobs"]
        return {"id": "x", "created": 0, "model": body["model"], "choices": [choice]}
