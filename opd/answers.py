"""Final answers: how one is read from a text, and when two are equal."""

import re
from decimal import Decimal

from opd import files, records

# ---- reading an answer

# commas between thousands only: 1,2 is a pair
NUMBER = r"[-+]?(?:[0-9]{1,31}|[0-9]{1,3}(?:,[0-9]{3}){1,10})(?:\.[0-9]{1,30})?"


def final_answer(text):
    """The final answer a text commits to, or None: the last \\boxed{...}, else what follows the
    last `####` of a line, else the last `#`s.

    final_answer("7+5=12\\n#12") -> "12";   final_answer("... so \\\\boxed{\\\\frac{1}{2}}") ->
                                            "\\\\frac{1}{2}";   final_answer("12") -> None.
    The text is an answer without thoughts (records.final_text)."""
    text = text.strip()
    start = len(text)
    while (start := text.rfind("\\boxed{", 0, start)) >= 0:
        depth = 0
        for at in range(start + 6, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if not depth:
                return text[start + 7 : at].strip()
    marked = re.findall(r"^#### *(.+?)\s*$", text, re.M) or re.findall(
        r"^#+ *(.+?)\s*$", text, re.M
    )
    return marked[-1] if marked else None


def is_correct(text, answer):
    """Whether the text's final answer equals `answer`, as numbers when both are numbers
    ("1,024" == "1024.0"; "1,2" is none)."""
    given, wanted = final_answer(text), str(answer).strip()
    if given is None:
        return False
    if re.fullmatch(NUMBER, given) and re.fullmatch(NUMBER, wanted):
        return Decimal(given.replace(",", "")) == Decimal(wanted.replace(",", ""))
    return given == wanted


def question_of(prompt):
    """What the judge is shown as the question: the prompt's text, or its messages other than
    the system's."""
    if "prompt" in prompt:
        return prompt["prompt"]
    return "\n\n".join(m["content"] for m in prompt["messages"] if m["role"] != "system")


def read_answerable(path):
    """The Table of prompts in a file, each of which must have an answer."""
    prompts = files.Table(path, "prompts")
    for prompt in prompts:
        if prompt.get("answer") in (None, ""):
            where = prompts.where(records.key_of(prompt, "prompts"))
            raise records.BadInput(
                f"{where}: answer: expected the right final answer, but there is none"
            )
    return prompts
