"""Every call to an OpenAI-compatible server: a served student samples, a served teacher scores,
a judge replies.

    vllm serve Qwen/Qwen3-0.6B --generation-config vllm --logprobs-mode processed_logprobs
    python rollout.py --model Qwen/Qwen3-0.6B --tokenizer FOLDER \\
        --base-url http://localhost:8000/v1 --prompts P --out R

Two kinds of trouble are kept apart everywhere:
- `ServedFailure`: this one request has no answer (timeouts, 429 or 5xx after all retries, a
  broken body, a prompt that is too long, a filtered answer).  The item is counted as failed,
  the others go on; it is never given a made-up value.
- `BadInput`: no request can succeed until a person changes something (wrong key, unknown model,
  nobody listening, a server that returns no token ids).  It stops the stage.

Simplifications:
1. Waiting and retrying are the openai client's: exponential back-off from 0.5 s to 8 s with
   jitter, Retry-After obeyed up to two minutes, at most max_retries times (--patience).
2. timeout (--patience) is the longest silence.  A server that never answers is given up after
   timeout * (max_retries + 1) and the back-off; one that drips a byte now and then is waited
   for.
3. A reply is not streamed, so timeout must cover the longest answer on a busy server.
"""

import itertools
import json
import math
import os
import queue
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

from opd import files
from opd.records import BadInput

# a server fills missing fields from the model's generation_config.json, and then samples from
# a distribution nobody recorded
PLAIN = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0}
# vLLM's own fields; an OpenAI server refuses them
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
OF_ONE_REQUEST = (
    "context length",
    "context_length",
    "context window",
    "too long",
    "max_model_len",
    "content_filter",
    # a refusal that names one of these is not everybody's
    "content management policy",
    "invalid_prompt",
)


class ServedFailure(Exception):
    """This one request has no usable answer.  Other requests may succeed."""


class _Refused(BadInput):
    """HTTP 400 or 422: the server does not accept a field of the request."""


@dataclass(frozen=True)
class Patience:
    """When a request is given up, and when a stage: --patience NAME=VALUE."""

    max_retries: int = 5
    timeout: float = 120.0
    max_failure_rate: float = 0.1


def patience_from_flags(args):
    patience = Patience()
    for text in args.patience:
        patience = files.changed_field(patience, "--patience", text)
    return patience


def add_flags(parser):
    """The flags of every stage that can talk to a server; `Server.from_flags` reads them (and
    --model)."""
    parser.add_argument(
        "--base-url",
        help="OpenAI-compatible server, e.g. http://localhost:8000/v1 (vllm serve); needs no "
        "GPU here, but the sampler is then a program this code does not control",
    )
    parser.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the key, so that no key is on a command line "
        "or in a file; "
        "if it is unset, EMPTY is sent, which local servers accept",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=8,
        help="requests in flight; more fills the server's batch, until it answers 429 or "
        "queues past the timeout",
    )
    parser.add_argument(
        "--patience",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="max_retries (5) after 429, 5xx and timeouts, timeout (120 seconds without a "
        "reply; a busy server's longest answer must fit) and max_failure_rate (0.1 of all "
        "requests; more failures stop the stage, fewer are left for the next run)",
    )


SCORE_ADVICE = "score with a recent vllm serve MODEL, or locally without --base-url"
SERVER_ADVICE = "look at the server's log, then run again"


def failure_limit(args, advice=SERVER_ADVICE):
    """How many requests may fail: a share of all, or every one of the first few."""
    rate = patience_from_flags(args).max_failure_rate
    return files.FailureLimit(rate, 2 * args.concurrency, advice)


class Server:
    """One model behind one base URL.  Thread-safe.

    server = Server("http://localhost:8000/v1", "Qwen/Qwen3-0.6B")
    server.sample("2+2=", max_tokens=4, temperature=1.0, top_p=1.0, seed=0, need_tokens=True)
    -> {"text": "4", "finish_reason": "stop", "prompt_ids": [17, 10, 17, 28],
        "response_ids": [19, 151643], "logprobs": [-0.2, -0.9]}"""

    def __init__(
        self,
        base_url,
        model,
        api_key_env="OPENAI_API_KEY",
        concurrency=8,
        max_retries=5,
        timeout=120.0,
    ):
        try:
            import openai
        except ImportError:
            raise BadInput(
                "a server (--base-url) needs the openai package: pip install openai"
            ) from None
        parts = urlsplit(base_url or "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(
                f"--base-url: expected an address like http://localhost:8000/v1, got "
                f"{base_url!r}"
            )
        # the address is written into run files; a key in it would be too
        if "@" in parts.netloc or parts.query:
            raise BadInput(
                "--base-url: expected an address without user, password or query: give the "
                "key by --api-key-env"
            )
        if concurrency < 1 or max_retries < 0 or not timeout > 0:
            raise BadInput(
                f"expected --concurrency of at least 1, max_retries of at least 0 and more "
                f"than 0 seconds of timeout, got {concurrency}, {max_retries} and {timeout}"
            )
        self._key = os.environ.get(api_key_env, "").strip() or "EMPTY"
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            raise BadInput(f"${api_key_env}: expected a key of printable ASCII characters")
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.api_key_env = api_key_env
        self.concurrency = concurrency
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=self.base_url, api_key=self._key, max_retries=max_retries, timeout=timeout
        )
        self._max_tokens = "max_tokens"  # newer OpenAI models only know max_completion_tokens
        self._json_format = True  # False once the server has refused response_format

    @classmethod
    def from_flags(cls, args):
        patience = patience_from_flags(args)
        return cls(
            args.base_url,
            args.model,
            args.api_key_env,
            args.concurrency,
            patience.max_retries,
            patience.timeout,
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
        extra = {}
        if need_tokens:
            extra = {**NEUTRAL, "return_token_ids": True}
            request["logprobs"] = 1 if isinstance(prompt, str) else True
        if isinstance(prompt, str):
            request |= {"prompt": prompt, "max_tokens": max_tokens}
            reply = self._call("completions", request, extra)
        else:
            if template_options:
                extra["chat_template_kwargs"] = template_options
            # go on with this answer, do not begin another one (vLLM's fields)
            if prompt[-1]["role"] == "assistant":
                extra |= {"add_generation_prompt": False, "continue_final_message": True}
            reply = self._chat(request | {"messages": prompt}, max_tokens, extra)
        choice, answer = _choice(reply)
        return answer | self._tokens(reply, choice) if need_tokens else answer

    def _tokens(self, reply, choice):
        """The token ids and log-probs of a sampled answer."""
        ids = choice.get("token_ids")
        prompt_ids = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
        if not _are_ids(ids) or not _are_ids(prompt_ids):
            raise BadInput(
                f"{self.base_url} returns no token ids: training needs the sampled ids, not "
                f"a re-tokenised text. Start a recent server: vllm serve MODEL "
                f"--generation-config vllm --logprobs-mode processed_logprobs"
            )
        try:
            given = choice["logprobs"]
            if "token_logprobs" in given:
                logprobs = given["token_logprobs"]
            else:
                logprobs = [entry["logprob"] for entry in given["content"]]
            got = sum(map(_is_logprob, logprobs))
        except (KeyError, TypeError):
            logprobs, got = [], "none"
        if not len(ids) == len(logprobs) == got:
            raise BadInput(
                f"{self.base_url}: expected {len(ids)} log-probs, one per response token, got "
                f"{got}: start the server with --logprobs-mode processed_logprobs and without "
                f"anything that strips log-probs (a proxy)"
            )
        return {"prompt_ids": prompt_ids, "response_ids": ids, "logprobs": logprobs}

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
        extra = {**NEUTRAL, "prompt_logprobs": max(top_k, 1)}
        reply = self._call("completions", PLAIN | one | {"prompt": ids}, extra)
        entries = _choice(reply)[0].get("prompt_logprobs")
        if type(entries) is not list or len(entries) != len(ids):
            got = len(entries) if type(entries) is list else "none"
            raise BadInput(
                f"{self.base_url}: expected {len(ids)} prompt_logprobs, one per token, got "
                f"{got}: {SCORE_ADVICE}"
            )
        logprobs, top = [], []
        for position in range(prompt_length, len(ids)):
            here = self._entry(entries, position, ids[position], top_k)
            logprobs.append(here[ids[position]])
            top.append(sorted(here.items(), key=lambda pair: (-pair[1], pair[0]))[:top_k])
        if not top_k:
            return logprobs, None, None
        topk_ids = [[token for token, _ in row] for row in top]
        return logprobs, topk_ids, [[value for _, value in row] for row in top]

    def _entry(self, entries, position, token, top_k):
        """{token id: log-prob} at one position of prompt_logprobs, found by id."""
        where = f"{self.base_url}: prompt_logprobs[{position}]"
        try:
            here = {int(i): value["logprob"] for i, value in entries[position].items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            here = {}
        if token not in here or not all(map(_is_logprob, here.values())):
            raise BadInput(
                f"{where}: expected finite log-probs that include token {token}, got "
                f"{str(entries[position])[:80]}: {SCORE_ADVICE}"
            )
        if len(here) < top_k:
            raise BadInput(
                f"{where}: expected --top-k {top_k} tokens, got {len(here)}: start the server "
                f"with a larger --max-logprobs, or ask for fewer"
            )
        return here

    def chat_text(self, messages, *, temperature, max_tokens):
        """A judge's reply as a string.  The server is asked to decode nothing but JSON, if it
        can."""
        request = PLAIN | {"messages": messages, "temperature": temperature, "top_p": 1.0}
        if not self._json_format:
            return _choice(self._chat(request, max_tokens, {}))[1]["text"]
        json_only = request | {"response_format": {"type": "json_object"}}
        try:
            reply = self._chat(json_only, max_tokens, {})
        except _Refused:  # perhaps that field, perhaps another: the plain request tells
            reply = self._chat(request, max_tokens, {})
            self._json_format = False
        return _choice(reply)[1]["text"]

    def _chat(self, request, max_tokens, extra):
        spelling = self._max_tokens
        try:
            return self._call("chat", request | {spelling: max_tokens}, extra)
        except _Refused as refusal:
            if spelling != "max_tokens" or "max_completion_tokens" not in str(refusal):
                raise
        self._max_tokens = "max_completion_tokens"
        return self._call("chat", request | {self._max_tokens: max_tokens}, extra)

    def _call(self, kind, request, extra):
        """Sends one request, retries included, and returns the reply's JSON object.  The one
        place that sees HTTP."""
        openai, client = self._openai, self._client
        endpoint = client.chat.completions if kind == "chat" else client.completions
        create = endpoint.with_raw_response.create
        tries = client.max_retries + 1
        try:
            reply = create(model=self.model, extra_body=extra or None, **request)
            value = json.loads(reply.http_response.content)
        except openai.APIConnectionError as error:  # timeouts are among them
            cause = type(error.__cause__).__name__
            if cause in ("ConnectError", "ConnectTimeout"):
                raise BadInput(
                    f"{self.base_url}: no connection: is the server running and is "
                    f"--base-url right?"
                ) from None
            if isinstance(error, openai.APITimeoutError):
                said = f"no answer within {client.timeout:g} s, {tries} times (--patience)"
            else:
                said = f"connection lost {tries} times ({cause})"
            raise ServedFailure(said) from None
        except openai.APIStatusError as error:
            # without the cause: its request carries the key
            raise self._trouble(error) from None
        except UnicodeEncodeError:
            raise ServedFailure(
                "the prompt holds half a surrogate pair, which UTF-8 cannot carry"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise ServedFailure("the reply is not JSON (cut off on the way?)") from None
        if type(value) is not dict:
            raise ServedFailure(f"the reply is a JSON {type(value).__name__}, not an object")
        return value

    def _trouble(self, error):
        """The exception for a status the client gave up on: whose problem is it?"""
        status = error.status_code
        said = error.message
        if " - " not in said:
            said = f"{said} - {error.response.text}"
        said = " ".join(said.replace(self._key, "***").split())[:300]
        said += f" ({error.code})" if error.code else ""
        # the server's own words can quote parts of the key: leave them out
        if status in (401, 403):
            return BadInput(
                f"{self.base_url}: {status}, the key in ${self.api_key_env} is not accepted "
                f"for model {self.model}: set that variable, or name another with "
                f"--api-key-env"
            )
        if status == 404:
            return BadInput(
                f"{self.base_url}: no model {self.model!r} there, or the address lacks its "
                f"/v1: {said}"
            )
        if status == 429 and "insufficient_quota" in said:
            return BadInput(f"{self.base_url}: the account has no credit left: {said}")
        passing = status in (408, 409, 413, 429) or status >= 500
        if passing or any(words in said.lower() for words in OF_ONE_REQUEST):
            return ServedFailure(f"{said} (--patience max_retries={self._client.max_retries})")
        kind = _Refused if status in (400, 422) else BadInput
        return kind(f"{self.base_url}: the server refuses the request: {said}")


def _choice(reply):
    """(the first choice, {"text", "finish_reason"}) of a chat or completions reply."""
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        finish = choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        raise ServedFailure("the reply has no choices with text and finish_reason") from None
    if finish not in ("stop", "length") or not (text is None or type(text) is str):
        raise ServedFailure(f"finish_reason: expected stop or length, got {str(finish)[:40]}")
    # a model that spent its whole budget on reasoning says nothing
    if text is None and not choice.get("token_ids"):
        raise ServedFailure(
            f"no text (finish_reason {finish}): spent on reasoning? raise --max-tokens"
        )
    if any("\ud800" <= character <= "\udfff" for character in text or ""):
        raise ServedFailure("the text holds half of a surrogate pair, which no file can carry")
    return choice, {"text": text or "", "finish_reason": finish}


def _are_ids(ids):
    return type(ids) is list and bool(ids) and all(type(i) is int for i in ids)


def _is_logprob(value):
    return type(value) in (int, float) and math.isfinite(value)
