"""How a server's reply is read: streamed or plain, of a chat or a completion, of any make.

A plain JSON body is a stream of one event, so `Reply.add` reads both.  opd/served.py sends the
requests.
"""

import json
import math
from dataclasses import dataclass

from opd.records import IDS, LOGPROBS, MASS_ROUNDING, is_count, is_logprob
from opd.redact import without_key

# of a refusal that is not everybody's
TOO_LONG = (
    *("context length", "context_length", "context window", "context size", "context_size"),
    *("too long", "max_model_len", "exceeds the maximum"),
)
FILTERED = ("content_filter", "content management policy", "invalid_prompt")
# what servers call the two ends of an answer, in lower case
FINISH = {
    **dict.fromkeys(("stop", "stop_sequence", "stop_token", "eos", "eos_token"), "stop"),
    **dict.fromkeys(("end", "end_turn", "endoftext", "complete", "completed"), "stop"),
    **dict.fromkeys(("length", "max_length", "model_length", "limit"), "length"),
    **dict.fromkeys(("max_tokens", "max_output_tokens", "token_limit"), "length"),
}


SCORE_ADVICE = "score with a recent vllm serve MODEL, or locally without --base-url"
LARGEST = 1 << 28  # bytes of a reply


class ServedFailure(Exception):
    """This one request has no usable answer.  Other requests may succeed."""


class Cut(ServedFailure):
    """The reply ended at --max-tokens before it was usable."""


def cure(words):
    """What may help a request that is refused for its own sake; empty for any other."""
    words = words.lower()
    if any(sign in words for sign in FILTERED):
        return "the provider's filter refuses this text: leave it out, or ask another server"
    if any(sign in words for sign in TOO_LONG):
        return (
            "shorten the prompt (a judge's: fewer answers, or --mode single), lower "
            "--max-tokens, or serve with a larger --max-model-len"
        )
    return ""


def is_stream(response):
    return "event-stream" in response.headers.get("content-type", "")


def events_of(response):
    """The JSON values of a body: one of a plain reply, many of a stream of server-sent
    events."""
    pieces = bounded(response.iter_bytes())
    if not is_stream(response):
        yield json_of(b"".join(pieces))
        return
    for line in lines_of(pieces):
        if not line.startswith(b"data:"):
            continue  # a comment that keeps the connection alive, or an event's name
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        if data:
            yield json_of(data)


def json_of(data):
    return json.loads(without_key(data.decode("utf-8-sig")))


def bounded(pieces):
    """The pieces of a body, as long as they fit into memory together."""
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > LARGEST:
            raise ServedFailure(f"the reply is longer than {LARGEST >> 20} MiB")
        yield piece


def lines_of(pieces):
    """The lines of a body that comes in pieces.  A text's splitlines would also cut at U+2028,
    which a JSON string may hold."""
    line = []
    for piece in pieces:
        first, *others = piece.split(b"\n")
        line.append(first)
        for other in others:
            yield b"".join(line)
            line = [other]
    yield b"".join(line)


def text_of(content):
    """The text of a message's or a delta's content: a string, null, or a list of parts."""
    if content is None or type(content) is str:
        return content or ""
    texts = []
    for part in content:
        if part["type"] in ("text", "output_text"):
            texts.append(part["text"])
        elif part["type"] not in ("thinking", "reasoning"):
            raise ServedFailure(f"content: expected parts of type text, got {part['type']}")
    return "".join(texts)


def logprobs_of(given):
    """The log-probs of a completion's or a chat's `logprobs`, or None."""
    if not given:
        return None
    if "token_logprobs" in given:
        return given["token_logprobs"]
    return [entry["logprob"] for entry in given["content"] or ()]


def error_of(event):
    """(code, words) of an error inside a reply that HTTP calls a success, or None."""
    error = event if event.get("object") == "error" else event.get("error")
    if not error:
        return None
    if type(error) is not dict:
        error = {"message": error}
    code = str(error.get("code") or error.get("status") or "")
    return code, f"{error.get('message', error)} ({code})"


@dataclass
class Reply:
    """What a model has said, gathered from the events of a stream.  None: nothing was sent.

    {"choices": [{"delta": {"content": "4"}, "token_ids": [19]}]} and then
    {"choices": [{"delta": {}, "finish_reason": "eos"}]}
    -> text "4", finish "stop", token_ids [19]"""

    text: str = ""  # once the reply is checked
    pieces: list | None = None
    refusal: str = ""
    finish: str | None = None
    token_ids: list | None = None
    prompt_ids: list | None = None
    logprobs: list | None = None
    prompt_logprobs: list | None = None
    usage: dict | None = None

    def add(self, event):
        """Takes in one event; raises ServedFailure for one of no known shape."""
        try:
            self.usage = event.get("usage") or self.usage
            self.prompt_ids = event.get("prompt_token_ids") or self.prompt_ids
            choices = event.get("choices") or ()  # none beside the usage
            if len(choices) > 1:
                raise ServedFailure(f"expected one choice, got {len(choices)}")
            for choice in choices:
                self.add_choice(choice)
        except (AttributeError, KeyError, TypeError):
            raise ServedFailure(
                f"expected choices with text and finish_reason, got other fields or types "
                f"({', '.join(map(str, event))})"
            ) from None

    def add_choice(self, choice):
        message = choice.get("delta") or choice.get("message")
        if message or "text" in choice:
            message = message or {"content": choice["text"]}
            self.pieces = self.pieces or []
            self.pieces.append(text_of(message.get("content")))
            self.refusal += message.get("refusal") or ""
        self.prompt_ids = choice.get("prompt_token_ids") or self.prompt_ids
        self.prompt_logprobs = choice.get("prompt_logprobs") or self.prompt_logprobs
        if choice.get("token_ids") is not None:
            self.token_ids = self.token_ids or []
            self.token_ids += choice["token_ids"]
        logprobs = logprobs_of(choice.get("logprobs"))
        if logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += logprobs
        finish = choice.get("finish_reason")
        if not finish:
            return
        self.finish = FINISH.get(str(finish).lower())
        if self.finish is None:
            raise ServedFailure(
                f"finish_reason: expected stop, length or a synonym, got {str(finish)[:40]}: "
                f"{cure(str(finish)) or 'ask another server'}"
            )

    def check(self):
        """Raises ServedFailure unless this is an answer.  Null that ends by itself is one."""
        if self.finish is None or self.pieces is None and not self.token_ids:
            raise ServedFailure("the reply is no whole JSON with choices and finish_reason")
        self.text = without_key("".join(self.pieces or ()))  # whose events may hold a part each
        if refusal := without_key(self.refusal):
            raise ServedFailure(f"the model refuses to answer: {refusal[:200]}")
        silent = not (self.text or self.token_ids or self.prompt_logprobs)
        if silent and self.finish == "length":
            raise Cut("no text before --max-tokens: spent on reasoning? raise --max-tokens")
        if any("\ud800" <= character <= "\udfff" for character in self.text):
            raise ServedFailure(
                "the text holds half of a surrogate pair, which no file can carry"
            )

    def tokens(self, vocabulary):
        """The token ids and log-probs of a sampled answer.  vocabulary: ids are below it."""
        ids = self.token_ids
        if ids is None or self.prompt_ids is None:
            raise ServedFailure(
                "no token ids: training needs the sampled ids, not a re-tokenised text. Start "
                "a recent server: vllm serve MODEL --generation-config vllm --logprobs-mode "
                "processed_logprobs"
            )
        for name, given in (("token_ids", ids), ("prompt_token_ids", self.prompt_ids)):
            if not given or not IDS.test(given) or max(given) >= vocabulary:
                raise ServedFailure(
                    f"{name}: expected integers from 0 to below {vocabulary}, the vocabulary, "
                    f"got {str(given)[:80]}"
                )
        counted = self.usage.get("completion_tokens") if type(self.usage) is dict else None
        if counted not in (None, len(ids)):
            raise ServedFailure(
                f"token_ids: expected the {counted} that `usage` counts, got {len(ids)}: start "
                f"the server without --reasoning-parser and --tool-call-parser"
            )
        got = "none" if self.logprobs is None else len(self.logprobs)
        if got != len(ids):
            raise ServedFailure(
                f"expected {len(ids)} log-probs, one per response token, got {got}: start the "
                f"server with --logprobs-mode processed_logprobs and without anything that "
                f"strips log-probs (a proxy)"
            )
        if not LOGPROBS.test(self.logprobs):
            raise ServedFailure(
                f"logprobs: expected finite numbers <= 0, got {str(self.logprobs)[:80]}"
            )
        return {"prompt_ids": self.prompt_ids, "response_ids": ids, "logprobs": self.logprobs}


def entry_of(entries, position, token, top_k, vocabulary):
    """{token id: log-prob} at one position of prompt_logprobs, found by id."""
    where = f"prompt_logprobs[{position}]"
    got = f"got {str(entries[position])[:80]}"
    try:
        here = {int(i): value["logprob"] for i, value in entries[position].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        here = {}
    if token not in here:
        raise ServedFailure(
            f"{where}: expected log-probs that include token {token}, {got}: {SCORE_ADVICE}"
        )
    if not all(map(is_logprob, here.values())):
        raise ServedFailure(f"{where}: expected finite log-probs <= 0, {got}")
    if sum(map(math.exp, here.values())) > 1 + MASS_ROUNDING:
        raise ServedFailure(f"{where}: expected log-probs of one distribution, {got}")
    if min(here) < 0 or max(here) >= vocabulary:
        raise ServedFailure(
            f"{where}: expected ids from 0 to below {vocabulary}, the vocabulary, {got}"
        )
    if len(here) < top_k:
        raise ServedFailure(
            f"{where}: expected --top-k {top_k} tokens, got {len(here)}: start the server "
            f"with a larger --max-logprobs, or ask for fewer"
        )
    return here


@dataclass
class Usage:
    """What was asked and what it cost, in tokens as the server counts them."""

    calls: int = 0
    unreported: int = 0  # replies without `usage`
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self):
        return self.prompt_tokens + self.completion_tokens

    def add(self, usage):
        """usage: as the server sent it, so anything."""
        self.calls += 1
        usage = usage if type(usage) is dict else {}
        prompt = usage.get("prompt_tokens")
        completion = usage.get("completion_tokens")
        if not is_count(prompt) or not is_count(completion):
            self.unreported += 1
            return
        self.prompt_tokens += prompt
        self.completion_tokens += completion
