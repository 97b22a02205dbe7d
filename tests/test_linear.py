"""A megabyte of anything that a model or a server can write is read in seconds, wherever it is
read."""

import re
import time

import pytest

from methods.prefix import block_spans
from opd import answers, judge, judge_replies, records, redact, stats, tools
from opd.chat import plain_ids
from opd.served_reply import lines_of
from worlds.calculator import Calculator
from worlds.predicates import CHECKS

SIZE = 10**6
UNITS = ["\n", "```\n", "{", "\\boxed{", "1,", "#### ", "1+1=2\n", "<think>", "<tool_call>"]
UNITS += ['"', "\\", "\u202e", "answer is ", "sk-1", '{"name": "a"', "{ "]
NEWLINE = re.compile(r"\n+")


class Words:
    """A tokenizer of one token a text."""

    def __call__(self, text, **_):
        return {"input_ids": [len(text)]}


def calculate(text):
    return Calculator()({"expression": text}, "key")


def predicates(text):
    text = text[: SIZE // 10]
    for check in CHECKS.values():
        for arguments in check.propose([text[:100], "#4"])[:1]:
            check.test("1+3=?", text, *arguments)


def in_pieces(text):
    data = text.encode()
    list(lines_of(data[i : i + 9] for i in range(0, len(data), 9)))


READERS = {
    "final answer": answers.final_answer,
    "equality": lambda text: answers.equal(text, "18"),
    "the longest that is rewritten": lambda text: answers.normal_form(text[:1000]),
    "thoughts": records.visible,
    "calls": lambda text: tools.hermes(f"<tool_call>{text}</tool_call>{text}", {}),
    "calls without marks": lambda text: tools.json_call('{"name": "a"' + text, {"a": None}),
    "calculator": calculate,
    "blocks": lambda text: block_spans([*text[: SIZE // 5]], [1] * (SIZE // 5), NEWLINE),
    "one block": lambda text: block_spans([text[: SIZE // 2]] * 2, [1, 1], NEWLINE),
    "repetition": lambda text: stats.repetition_ratio(text, 256),
    "predicates": predicates,
    "names of tokens": lambda text: plain_ids(Words(), text[: SIZE // 20], re.compile("9|#")),
    "a judge's reply": lambda text: pytest.raises(ValueError, judge_replies.read, text, FORM),
    "a criterion": judge_replies.damage,
    "what a judge sees": lambda text: judge.document({"answer": text[: SIZE // 4]}),
    "a bad reply": lambda text: judge.defused(text[: SIZE // 4]),
    "keys": redact.without_key,
    "unseen characters": lambda text: redact.printable(text[: SIZE // 4]),
    "a stream in small pieces": in_pieces,
}
FORM = judge_replies.Score


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_megabyte_is_read_in_seconds(read, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1sk-1sk-1sk-1sk-2")
    for unit in UNITS:
        began = time.time()
        read(unit * (SIZE // len(unit)))
        assert time.time() - began < 20, unit
