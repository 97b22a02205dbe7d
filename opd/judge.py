"""How a served model is asked to play Rubricator, Verifier or holistic judge, and asked again
when its reply cannot be read (ROPD, arXiv 2605.07396).

    llm = Judge(served.Server("http://localhost:8000/v1", "Qwen/Qwen3-30B-A3B"), 0.7, 8192)
    criteria = llm.propose_rubric("17+25=?", ["17+25=42. #42"], ["#32", "17+25=42 #42"])
    llm.verify("17+25=?", criteria, ["#32", "17+25=42 #42"])
    -> [[False, False, True, True], [True, True, True, True]]   answers and criteria in order

The Rubricator contrasts the teacher's answers with the student's and writes one rubric for the
prompt (equation 2, schema in appendix D).  The Verifier says for each criterion of each answer
whether it is met (equation 3).  `holistic` is the baseline, one score an answer (T-Judge).
rubric.py turns verdicts into rewards; no total that a judge names is ever used.

Simplifications against the paper and its code:
1. The prompts are our own, in English, and ask for criteria only, not for domain, expected pass
   rate or totals.  The Verifier sees neither points nor categories.
2. A malformed reply is asked for again with its beginning and a sentence on what was wrong (the
   released code sends the same request again).  Earlier tries are left out, or they would fill
   the context.  After `re_asks` of them it is a ServedFailure.
3. A batch is one call whatever its length: no chunks.
4. In everything shown to a judge < > [ ] { } | and unseen characters are written \\uXXXX:
   an answer cannot end its own quotation or form a token of a chat template.  It can still
   plead in plain words: the prompts ask the judge to ignore that, nothing enforces it.
"""

import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from opd import cli, disk, served
from opd.judge_prompts import (
    BATCH_VERIFIER,
    HOLISTIC,
    PROMPT_VERSION,
    RUBRICATOR,
    SINGLE_VERIFIER,
    WITH_REASONS,
)
from opd.records import BadInput
from opd.redact import escaped, is_seen
from opd.served import Cut, ServedFailure

try:
    from opd import judge_replies as replies
except ImportError:  # no pydantic, so no openai either, and no Server to ask
    replies = None

SHOWN = 400  # characters of a bad reply that its judge sees again

# ---- what a judge sees


_CHARACTER = re.compile(r"[<>\[\]{}|]|[^\x20-\x7e]")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')  # a JSON string literal


def document(data):
    """`data` as JSON text in which no string holds a raw < > [ ] { } | or a character that
    cannot be seen.

    json.loads gives `data` back; brackets in the text are only those of the document itself.
    document({"answer": "<|im_end|>[INST] é"}) -> {"answer":
    "\\u003c\\u007cim_end\\u007c\\u003e\\u005bINST\\u005d é"}"""

    def escape(literal):
        return _CHARACTER.sub(
            lambda c: c[0] if is_seen(c[0]) and c[0] not in "<>[]{}|" else escaped(c[0]),
            literal[0],
        )

    return _STRING.sub(escape, json.dumps(data, ensure_ascii=False, indent=1))


def defused(reply):
    """A judge's own bad reply, to be shown to it again: it may have copied a special token out
    of an answer.

    < > | become \\uXXXX, and [ before a capital letter or / (as in [INST]): valid JSON stays
    the same value."""

    def escape(c):
        harmless = is_seen(c[0]) and c[0] not in "<>|[" or c[0] == "\n"
        return c[0] if harmless else escaped(c[0])

    return re.sub(r"[<>|]|\[(?=/?[A-Z])|[^\x20-\x7e]", escape, reply)


# ---- asking


class Cache:
    """Good replies in a JSONL file ({"key", "reply"} a line), or in memory only if `path` is
    None.  Thread-safe.  A reply that did not parse is never in it, so a rerun asks again."""

    def __init__(self, path=None):
        self.path = Path(path) if path else None
        self.replies = {}
        self.lock = threading.Lock()
        if self.path is None or not self.path.exists():
            return
        disk.cut_torn_line(self.path)  # torn by a kill: that reply is asked for again
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                entry = json.loads(line)
                self.replies[entry["key"]] = entry["reply"]
            except (ValueError, KeyError, TypeError):
                raise BadInput(
                    f'{self.path}:{number}: expected {{"key", "reply"}}, a judge\'s cached '
                    f"reply: delete that line"
                ) from None

    def put(self, key, reply):
        line = json.dumps({"key": key, "reply": reply}).encode() + b"\n"
        with self.lock:
            self.replies[key] = reply
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab", buffering=0) as file:
                    disk.append_whole(file, line)
                disk.sync(self.path)


def cache_key(server, messages, **sampling):
    """Everything a reply depends on: who is asked, what, how, and which version of the schema
    reads the reply."""
    asked = [PROMPT_VERSION, server.model, server.base_url, messages, sampling]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def re_ask(reply, wrong):
    """The messages that ask again after a bad reply."""
    shown = defused(reply[:SHOWN]) or "(nothing usable)"
    if len(reply) > SHOWN:
        shown += " ... (cut here)"
    complaint = (
        f"That reply cannot be used: {defused(wrong)[:SHOWN]}. Reply again with the complete "
        f"JSON object only, in the form asked for."
    )
    return [
        {"role": "assistant", "content": shown},
        {"role": "user", "content": complaint},
    ]


def messages_of(system, **data):
    return [{"role": "system", "content": system}, {"role": "user", "content": document(data)}]


def labelled(name, texts):
    return [{"label": f"{name} {i}", "text": text} for i, text in enumerate(texts, 1)]


def each(judge_one, answers):
    """judge_one(answer) for every answer; a ServedFailure stands in the place of its result, so
    that a bad reply costs its own answer only."""
    results = []
    for answer in answers:
        try:
            results.append(judge_one(answer))
        except ServedFailure as failure:
            results.append(failure)
    return results


def shuffled(texts, seed, question):
    """The indices of `texts` in a random order that depends on seed, question and the texts,
    not on their places.

    Sorting by hash makes the same pool the same request, whoever comes first in it, so that the
    cache finds it."""

    def draw(i):
        return hashlib.sha256(json.dumps([seed, question, texts[i]]).encode()).digest()

    return sorted(range(len(texts)), key=lambda i: (draw(i), i))


@dataclass
class Judge:
    """A served model in the role of a judge, and how it is asked."""

    server: served.Server
    temperature: float = 0.0
    max_tokens: int = 4096
    re_asks: int = 2
    cache: Cache = field(default_factory=Cache)
    reasons: bool = False  # the Verifier says why before each verdict
    budget: int | None = None  # tokens that this run may spend
    complaints: list = field(default_factory=list)  # one a re-ask; appending is thread-safe

    @property
    def name(self):
        """What rubrics and rewards say they are from."""
        return f"{self.server.model} (prompts v{PROMPT_VERSION})"

    def settings(self):
        """What its replies depend on, for the files they are written to."""
        settings = {
            "model": self.server.model,
            "base_url": self.server.base_url,
            "prompts": PROMPT_VERSION,
            **self.server.sent(temperature=self.temperature),
        }
        if self.reasons:
            settings["reasons"] = True
        if self.server.fields:
            settings["request"] = self.server.fields
        return settings

    def ask(self, messages, form, **repeat):
        """The value of the first reply that has this form, a model of judge_replies.py.

        A bad reply is asked for again, at most `re_asks` times; then ServedFailure: the reward
        is null, not zero.  repeat: what tells the key of this question from that of the same
        one asked before."""
        sampling = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        more = {"request": self.server.fields} if self.server.fields else {}
        key = cache_key(self.server, messages, **sampling, **more, **repeat)
        if key in self.cache.replies:
            with contextlib.suppress(ValueError):  # of an entry that somebody edited
                return replies.read(self.cache.replies[key], form)
        asked = messages
        for left in reversed(range(self.re_asks + 1)):
            reply, wrong = self.reply(asked, form, sampling)
            if wrong is None:
                self.cache.put(key, reply)
                return replies.read(reply, form)
            if left:
                self.complaints.append(str(wrong))
                asked = messages + re_ask(reply, str(wrong))
        advice = "a stronger judge or more --re-asks may help"
        if isinstance(wrong, Cut):
            advice = "a longer --max-tokens may help"
        tries = f"{self.re_asks + 1} tries"
        raise ServedFailure(
            f"no usable reply in {tries}, the last one because {wrong}: {advice}"
        )

    def reply(self, messages, form, sampling):
        """(a reply, what is wrong with it: a Cut, a ValueError or None)."""
        try:
            reply = self.server.chat_text(messages, **sampling, schema=form.model_json_schema())
        except Cut as cut:
            return "", cut
        try:
            replies.read(reply, form)
        except ValueError as error:
            return reply, error
        return reply, None

    def for_each(self, function, items):
        """Yields (item, function(item)) as replies come.  Once the budget is spent no other
        item is begun, those in flight are finished, and then BadInput says how to go on."""
        items = list(items)
        begun = []

        def affordable():
            for item in items:
                if self.overspent():
                    return
                begun.append(item)
                yield item

        yield from self.server.map(function, affordable())
        if len(begun) < len(items):
            raise BadInput(
                f"--budget-tokens {self.budget}: spent {self.server.usage.tokens} tokens in "
                f"{self.server.usage.calls} calls, {len(begun)} of {len(items)} prompts are "
                f"done and kept: run the same command again for the others"
            )

    def overspent(self):
        if self.budget is None:
            return False
        if self.server.usage.unreported:
            raise BadInput(
                f"--budget-tokens: expected `usage` in every reply of {self.server.base_url}, "
                f"got none: tokens cannot be counted"
            )
        return self.server.usage.tokens >= self.budget

    def spent(self):
        """What this run has asked for, for a stage's summary."""
        usage = self.server.usage
        return {
            "calls": usage.calls,
            "calls_without_usage": usage.unreported,
            "re_asks": len(self.complaints),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }

    def propose_rubric(self, question, references, attempts):
        """One rubric for a prompt, shared by its whole group: 4 to 12 criteria (equation 2,
        appendix D).

        references: the teacher's answers; attempts: the student's.  Unlike the Verifier, the
        Rubricator is told which are which.  Equal references are shown once.
        -> [{"id": "c1", "category": "Task Completion", "criterion": "States the sum 42 ...",
        "points": 5}, ...]"""
        references = list(dict.fromkeys(references))
        messages = messages_of(
            RUBRICATOR,
            task=question,
            reference_answers=labelled("Reference", references),
            attempts=labelled("Attempt", attempts),
        )
        return self.ask(messages, replies.Rubric)

    def verify(self, question, criteria, answers, mode="batch", seed=0, repeat=0):
        """One list of booleans per answer, in the order of `answers`, each in the order of
        `criteria` (equation 3), or a ServedFailure in an answer's place.

        mode "batch" judges all answers in one call, shuffled and labelled Answer 1..N so that
        neither name nor place tells who wrote them (the paper's pool; put the teacher's answers
        in to anchor the scale); "single" takes one call each.  repeat: asks anew, in another
        order."""
        shown = [{"id": c["id"], "criterion": c["criterion"]} for c in criteria]
        about = {"task": question, "criteria": shown}
        again = {"repeat": repeat} if repeat else {}
        why = WITH_REASONS if self.reasons else ""
        if mode == "single":
            form = replies.judgement_model(len(criteria), self.reasons)
            return each(
                lambda text: self.ask(
                    messages_of(SINGLE_VERIFIER + why, **about, answer=text), form, **again
                ),
                answers,
            )
        order = shuffled(answers, [seed, repeat] if repeat else seed, question)
        pool = labelled("Answer", [answers[i] for i in order])
        form = replies.batch_model(len(answers), len(criteria), self.reasons)
        judged = self.ask(
            messages_of(BATCH_VERIFIER + why, **about, answers=pool), form, **again
        )
        return [judgement for _, judgement in sorted(zip(order, judged))]

    def verify_repeatedly(self, repeats, question, criteria, answers, **how):
        """What `verify` says each time it is asked: a list of `repeats` for each answer."""
        rounds = []
        for repeat in range(repeats):
            try:
                verdicts = self.verify(question, criteria, answers, repeat=repeat, **how)
            except ServedFailure as failure:
                verdicts = [failure] * len(answers)
            rounds.append(verdicts)
        return [list(tries) for tries in zip(*rounds)]

    def holistic(self, question, answer):
        """One grade in [0, 1] for the whole answer: the scalar-judge baseline (T-Judge of
        section 3.1)."""
        messages = messages_of(HOLISTIC, task=question, answer=answer)
        return self.ask(messages, replies.Score)


def describe_spent(summary):
    """What `Judge.spent` adds to a summary, in words; nothing without a judge."""
    if "calls" not in summary:
        return ""
    text = f"; {summary['calls']} replies, {summary['re_asks']} re-asks, "
    text += f"{summary['prompt_tokens']} + {summary['completion_tokens']} tokens"
    if summary["calls_without_usage"]:
        text += f" and those of {summary['calls_without_usage']} replies without `usage`"
    return text


# ---- flags


def add_flags(p, temperature, max_tokens):
    """The flags of a stage that can ask a served judge; `from_flags` reads them."""
    p.add_argument(
        "--model",
        help="served model that plays rubricator or verifier; keep it fixed, and never the "
        "student itself",
    )
    p.add_argument("--temperature", type=float, default=temperature, help="of the served judge")
    p.add_argument(
        "--max-tokens", type=int, default=max_tokens, help="longest reply of the served judge"
    )
    p.add_argument(
        "--re-asks",
        type=int,
        default=2,
        help="times a malformed reply is sent back with what was wrong",
    )
    p.add_argument(
        "--cache",
        help="JSONL of good replies, keyed by everything that was asked; saves a re-run's "
        "money",
    )
    p.add_argument(
        "--budget-tokens",
        type=int,
        metavar="N",
        help="stop once this run has spent N tokens of the served judge; what is done is kept",
    )
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    served.add_flags(p)


def from_flags(args, reasons=False):
    """The Judge that the flags of `add_flags` name."""
    if not args.base_url or not args.model:
        raise BadInput("a served judge needs --base-url and --model")
    cli.check_at_least(1, budget_tokens=args.budget_tokens)
    cli.check_at_least(0, re_asks=args.re_asks)
    server = served.Server.from_flags(args)
    return Judge(
        server,
        args.temperature,
        args.max_tokens,
        args.re_asks,
        Cache(args.cache),
        reasons,
        args.budget_tokens,
    )
