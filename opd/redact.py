"""Texts from elsewhere, made fit to be shown and kept: without the key in $OPENAI_API_KEY, and
with every character that nobody can see written out.

A server can quote the key it was given, in any field and in any spelling.  So replies are
cleaned before they are read, and messages before they are cut short: half a key is one, too.
"""

import json
import os
import re
from functools import lru_cache

# printable to Python, and yet nothing is seen: fillers, joiners, variation selectors
IGNORABLE = "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
_SUSPECT = re.compile(r"[^\x20-\x7e]")
_IGNORABLE = re.compile(f"[{IGNORABLE}\U000e0100-\U000e01ef]")


def escaped(character):
    """\\uXXXX for one character; as in JSON, two of them beyond U+FFFF."""
    if character > "\x7f":
        return json.dumps(character)[1:-1]
    return f"\\u{ord(character):04x}"


def is_seen(character):
    """Whether a character shows: no control, no mark of direction, no tag, no filler."""
    return character.isprintable() and not _IGNORABLE.match(character)


def printable(text):
    """A text as one line for a terminal, whose cursor, colours and direction it cannot change:
    what does not show is written \\uXXXX."""
    return _SUSPECT.sub(lambda c: c[0] if is_seen(c[0]) else escaped(c[0]), text)


def api_key():
    """The key in $OPENAI_API_KEY, or ""."""
    return os.environ.get("OPENAI_API_KEY", "").strip()


def without_key(text):
    """A text with *** in place of the key, also of one with escapes of JSON or of URLs."""
    key = api_key()
    return _spellings(key).sub("***", text) if is_secret(key) else text


def is_secret(key):
    """Local servers take any word: EMPTY, dummy, ollama are no keys, and occur in texts."""
    return len(key) >= 12 or len(key) >= 6 and not key.isalpha()


@lru_cache(8)
def _spellings(key):
    """An expression for what spells the key:  k, \\k, \\u006b, \\\\x6b or %6B for a k."""

    def spellings(character):
        plain = re.escape(character)
        code = f"(?i:{ord(character):02x})"
        return rf"(?:{plain}|\\{{1,8}}(?:{plain}|u00{code}|x{code})|%(?:25)*{code})"

    return re.compile("".join(map(spellings, key)))
