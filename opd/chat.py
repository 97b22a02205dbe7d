"""Conversations as token ids: what a model is shown, how a given answer stands behind it, and
which part of a response is thought.

A chat template writes more around an answer than a prompt shows: a thought that is closed, an
end of turn that is not the tokenizer's end token.  A given answer is placed as the template
places an assistant's message.  What is thought is decided once, when an answer is sampled."""

import contextlib
import json
import os
import re
import signal
import time
from functools import lru_cache, partial
from itertools import groupby

from opd.records import THOUGHTS, BadInput, show, visible

try:
    import resource
except ImportError:  # Windows
    resource = None

# stands for an answer where the template's words around it are wanted
ANSWER = "(the answer)"

# a template is a program of the model's folder: it gets these seconds, this memory in bytes
# and this many characters
SECONDS = 10
MEMORY = 1 << 30
LONGEST = 1 << 26
# seconds by the clock, on a machine that is busy with other work
PATIENCE = 120

# ---- templates


class Unbounded(BadInput):
    """A chat template that does not end, or writes without end."""


@lru_cache(maxsize=None)
def tried():
    """What `apply` has called before."""
    return set()


def apply(tokenizer, messages, **options):
    """tokenizer.apply_chat_template as text.  A template that meets roles or options for the
    first time is tried in a process of its own: no loop or power in it can be interrupted
    here."""
    call = partial(tokenizer.apply_chat_template, messages, tokenize=False, **options)
    roles = [message["role"] for message in messages]
    shape = json.dumps([tokenizer.chat_template, roles, options], default=str)
    if shape not in tried():
        try_out(call)
        tried().add(shape)
    text = call()
    if len(text) > LONGEST:
        raise Unbounded(f"the chat template writes more than {LONGEST} characters")
    return text


def try_out(call):
    """Raises Unbounded if call() takes too long or too much memory.  Whatever else it raises
    is for the caller to see.  Without fork (Windows) nothing is tried."""
    if not hasattr(os, "fork"):
        return
    child = os.fork()
    if not child:
        ended = 1
        try:
            limit()
            call()
            ended = 0
        except Exception as error:
            ended = int(isinstance(error, MemoryError))
        finally:
            os._exit(ended)
    deadline = time.monotonic() + PATIENCE
    pause = 0.0005
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not done or status:
        raise Unbounded(
            f"the model's chat template does not end within {SECONDS} s and "
            f"{MEMORY >> 20} MiB: mend its chat_template.jinja or tokenizer_config.json"
        )


def limit():
    """This process, in which a template is tried, gets SECONDS of work and MEMORY more than it
    has (Linux)."""
    if resource:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        with open("/proc/self/statm") as f:
            now = int(f.read().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, most))


# ---- prompts


@contextlib.contextmanager
def naming(prompt):
    """Errors of templates, which raise what they like, and of tokenizers (TypeError on half a
    surrogate pair) as BadInput with the prompt's id."""
    try:
        yield
    except Unbounded:
        raise
    except Exception as error:
        raise BadInput(
            f"prompt {prompt['id']!r}: could not be rendered ({type(error).__name__}: {error})"
        ) from None


def chat_text(tokenizer, prompt, template_options=None, answer=None):
    """What the chat template makes of a prompts record with the generation prompt, or of the
    conversation in which the assistant has said `answer`.

    Messages that end with one of the assistant's are a beginning: the model goes on where it
    stops (and the rollout holds what it adds)."""
    messages = prompt["messages"]
    begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    how = template_options or {}
    if answer is not None:
        asked = messages if begun is None else messages[:-1]
        said = {"role": "assistant", "content": (begun or "") + answer}
        return apply(tokenizer, [*asked, said], **how)
    if begun is None:
        return apply(tokenizer, messages, add_generation_prompt=True, **how)
    return apply(tokenizer, messages, continue_final_message=True, **how)


def text_prompt_ids(tokenizer, text):
    """The ids of a prompt that is plain text, with what the tokenizer puts around a text: a
    beginning, but not twice, and no end, for the answer is still to come."""
    ids = tokenizer(text)["input_ids"]
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    end = tokenizer.eos_token_id
    if len(ids) > 1 and ids[-1] == end and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids


def render(tokenizer, prompt, template_options=None):
    """The token ids the model is shown for a prompts record: chat template plus generation
    prompt, or plain text."""
    if "messages" in prompt and tokenizer.chat_template is None:
        raise BadInput(
            f"prompt {prompt['id']!r}: has messages, but the model's tokenizer has no chat "
            f"template; use `prompt`"
        )
    with naming(prompt):
        if "messages" in prompt:
            text = chat_text(tokenizer, prompt, template_options)
            # the template has placed the special tokens already
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = text_prompt_ids(tokenizer, prompt["prompt"])
    if not ids:
        raise BadInput(f"prompt {prompt['id']!r}: expected at least one token, but it is empty")
    return ids


# ---- thoughts


def open_thought(shown):
    """The marks (opening, closing) of a thought in which a prompt's text ends, or empty ones.

    "<|assistant|><think>\\n" -> ("<think>", "</think>")"""
    for marks in THOUGHTS:
        if shown.rstrip().endswith(marks[0]):
            return marks
    return "", ""


@lru_cache(maxsize=8)
def thought_tokens(tokenizer):
    """Ids of the special tokens that spell thought marks: a decoded text lacks them."""
    marks = " ".join(mark for pair in THOUGHTS for mark in pair)
    added = tokenizer.added_tokens_decoder.items()
    return {i for i, token in added if token.special and token.content in marks}


def final_text(tokenizer, prompt_ids, response_ids):
    """The answer in a response: its text without thoughts, also where their marks are special
    tokens, or where the prompt has opened the thought."""
    opening, _ = open_thought(tokenizer.decode(prompt_ids[-16:]))
    is_mark = thought_tokens(tokenizer).__contains__
    pieces = [
        tokenizer.decode(list(ids), skip_special_tokens=not marks)
        for marks, ids in groupby(response_ids, is_mark)
    ]
    return visible(opening + "".join(pieces))


def bare(text):
    """A text without white space and cut characters, which decoders treat differently."""
    return "".join(text.split()).replace("\ufffd", "")


def check_text(tokenizer, rollout, where):
    """Raises BadInput unless a sampled answer's text, which graders read, is what its ids say,
    which are trained: special tokens, white space and thoughts aside."""
    ids = rollout["response_ids"]
    text = rollout["text"]
    final = rollout.get("final", text)
    said = tokenizer.decode(ids, skip_special_tokens=True)
    if text == said and final in said:
        return
    answer = final_text(tokenizer, rollout["prompt_ids"], ids)
    forms = [bare(form) for form in (said, tokenizer.decode(ids), answer)]
    if bare(text) not in forms or not any(bare(final) in form for form in forms):
        field = "final" if bare(text) in forms else "text"
        raise BadInput(
            f"{where}: {field}: expected what `response_ids` say, {show(said)}, got "
            f"{show(rollout[field])}: one answer would be graded, and another trained"
        )


# ---- given answers


def token_names(tokenizer, spared=()):
    """An expression that finds the names of added tokens in a text, but for the ids `spared`;
    the longest first."""
    added = tokenizer.added_tokens_decoder.items()
    names = [re.escape(token.content) for i, token in added if i not in spared]
    return re.compile("|".join(sorted(names, key=len, reverse=True)) or "(?!)")


def plain_ids(tokenizer, text, names):
    """The ids of a text in which nothing that `names` finds is taken for a token."""
    ids = []
    while text:  # a name is cut behind its first character, and neither part is one
        found = names.search(text)
        piece = text[: found.start() + 1] if found else text
        text = text[len(piece) :]
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def given_ids(policy, text):
    """The ids of a given text.  A special token's name in it is text; marks around a thought of
    its own are what they are."""
    tokenizer = policy.tokenizer
    added = tokenizer.added_tokens_decoder.items()
    spared = {i for i, t in added if not (t.special or i in policy.stop_ids)}
    if visible(text) != text:
        spared |= thought_tokens(tokenizer)
    return plain_ids(tokenizer, text, token_names(tokenizer, spared))


def around_answer(policy, prompt):
    """(shown, opening, closing): the prompt as text, what the chat template writes between it
    and an answer, and behind it.  Where the turn does not begin as the prompt ends, the opening
    is empty."""
    if "messages" not in prompt:
        return prompt["prompt"], "", ""
    shown = chat_text(policy.tokenizer, prompt, policy.template_options)
    whole = chat_text(policy.tokenizer, prompt, policy.template_options, ANSWER)
    before, found, closing = whole.rpartition(ANSWER)
    if not found:
        raise LookupError("the chat template has no place for an assistant's answer")
    opening = before[len(shown) :] if before.startswith(shown) else ""
    return shown, opening, closing


def place(text, shown, opening):
    """(opening, text) of a given answer behind `shown`, which stands in no open thought.

    behind "<think>":  "", "4" -> "\\n</think>\\n\\n", "4"
                       "", "<think>1+3</think>4" -> "", "1+3</think>4" """
    mark, end = open_thought(shown)
    if visible(text) != text:  # a thought of its own
        return "", text.lstrip().removeprefix(mark).lstrip("\n") if mark else text
    if end not in opening:
        opening = f"\n{end}\n\n"
    # spaces belong to the first word's token
    return ("", opening + text) if opening.isspace() else (opening, text)


def end_id(policy, closing):
    """The end token of an answer: the first in the template's closing words at which the model
    stops, else the tokenizer's."""
    ids = policy.tokenizer(closing, add_special_tokens=False)["input_ids"]
    ends = [i for i in ids if i in policy.stop_ids]
    end = ends[0] if ends else policy.tokenizer.eos_token_id
    if end is None:
        raise BadInput(
            f"{policy.identity['model']}: its tokenizer has no end token, so an answer that "
            f"ended cannot say so"
        )
    return end


def turn_ids(policy, prompt, answer):
    """(prompt ids, response ids) of a given answer as the assistant's turn after a prompts
    record, with an end token iff it ended by itself."""
    tokenizer = policy.tokenizer
    prompt_ids = render(tokenizer, prompt, policy.template_options)
    with naming(prompt):
        shown, opening, closing = around_answer(policy, prompt)
        opening, text = place(answer["text"], shown, opening)
        ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
        ids += given_ids(policy, text)
    if answer["finish_reason"] == "stop":
        ids.append(end_id(policy, closing))
    return prompt_ids, ids


# ---- what a template is

CALM = {"role": "system", "content": "Be calm."}
ASKED = {"role": "user", "content": " 2+2? "}
SAID = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4 "}
PROBES = ([ASKED], [CALM, ASKED], [ASKED, SAID, ASKED], [CALM, ASKED, SAID, ASKED])


def probe(tokenizer, template_options):
    """What a chat template makes of a few conversations without tools, as ids; None where it
    refuses.  Templates that agree on them show a model the same, whatever their text is."""
    found = []
    for messages in PROBES:
        try:
            asked = {"id": "probe", "messages": messages}
            whole = chat_text(tokenizer, asked, template_options, ANSWER)
            found.append([render(tokenizer, asked, template_options), whole])
        except Unbounded:
            raise
        except Exception:  # no template, no system's turn: templates raise what they like
            found.append(None)
    return found
