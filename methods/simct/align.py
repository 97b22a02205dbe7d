"""Aligns two tokenizations of one text (SimCT, arXiv 2605.07711, theorem 1).

    python -m methods.simct align --student M1 --teacher M2 --text "happy day"
    python -m methods.simct align --student M1 --teacher M2 --rollouts rollouts.jsonl

The first command shows the units of a text, the second prints which shares of the rollouts'
bytes lie in units.

A teacher with another vocabulary gives no log-prob to a student's token, but both models spell
the same bytes.  Their tokens end at byte offsets.  Between two neighbouring offsets at which
both end a token lies a minimal aligned unit; every finer division would cut a token:

    student   hap|py| d|ay    ends 3 5 7 9
    teacher   ha|ppy| da|y    ends 2 5 8 9    common 5 9    happy (2:2), _day (2:2)

    student   12|=|19
    teacher   1|2|=|1|9                       12 (1:2), = (1:1), 19 (1:2)

Offsets count bytes of tokens and never characters of decoded text: a token may end inside a
character (emoji, Chinese, accents), where a decoder shows a replacement character and the two
texts would never be equal again.  A token's bytes are read off the tokenizer's own decoder.
Special tokens have none, and text that looks like one is text.  A space that a tokenizer adds
before a text is not part of the text.

A teacher's tokenizer may spell a character differently: Qwen's writes a composed accent for a
decomposed one, an omega for the ohm sign.  A sampled byte that is no text reaches the teacher
as U+FFFD.  Such characters lie in no unit; the text before and after them is aligned as ever.
Nor does a token without bytes, with the text whose unit it would join: the loss raises the
log-probs of all tokens of a unit where the teacher likes its text.

The student's ids are those that it sampled; only the teacher's ids are computed here.  If the
answer ended, the student's end token and the teacher's form the last unit.
"""

import json
import re
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import regex
from transformers.convert_slow_tokenizer import bytes_to_unicode

from opd import cli, files
from opd.policy import load_tokenizer
from opd.records import BadInput

# ---- the bytes of a token

DECODER_STEPS = {
    "ByteLevel",
    "Metaspace",
    "Replace",
    "ByteFallback",
    "Fuse",
    "Strip",
    "WordPiece",
    "BPEDecoder",
}


BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # as GPT-2


def decoder_steps(node):
    """[{"type": ..., ...}]: the steps of a tokenizer's decoder, with sequences flattened."""
    if not node:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [step for part in node["decoders"] for step in decoder_steps(part)]


def piece_bytes(piece, steps):
    """The bytes that the decoder's steps make of one vocabulary entry; None for an entry that
    no text produces.

    "Ġday" (ByteLevel), "▁day" (Metaspace) -> b" day";  "<0x0A>" (ByteFallback) -> b"\\n"."""
    kinds = {step["type"]: step for step in steps}
    if "ByteLevel" in kinds:
        known = all(c in BYTE_OF for c in piece)
        return bytes(BYTE_OF[c] for c in piece) if known else None
    if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    if "WordPiece" in kinds:
        prefix = kinds["WordPiece"]["prefix"]
        if piece.startswith(prefix):
            return piece.removeprefix(prefix).encode()
        return b" " + piece.encode()
    for step in steps:
        if step["type"] == "Replace" and step["content"] == " ":
            piece = piece.replace(step["pattern"]["String"], " ")
        elif step["type"] == "Metaspace":
            piece = piece.replace(step["replacement"], " ")
        elif step["type"] == "BPEDecoder":
            piece = piece.replace(step["suffix"], " ")
    return piece.encode()


@lru_cache(maxsize=8)
def token_bytes(tokenizer):
    """[bytes of every token id]; None for special tokens, the unknown token and unused ids."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = decoder_steps(core["decoder"])
    unknown = [step["type"] for step in steps if step["type"] not in DECODER_STEPS]
    if unknown:
        raise BadInput(
            f"tokenizer {tokenizer.name_or_path!r}: decoder: expected steps whose bytes are "
            f"known, got {', '.join(unknown)}"
        )
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    out = [None] * (max(vocabulary.values()) + 1)
    for piece, i in vocabulary.items():
        if i not in added:
            out[i] = piece_bytes(piece, steps)
        elif not added[i].special:
            out[i] = added[i].content.encode()
    # the unknown token stands for any text, so for none
    if core["model"].get("unk_id") is not None:
        out[core["model"]["unk_id"]] = None
    if core["model"].get("unk_token") in vocabulary:
        out[vocabulary[core["model"]["unk_token"]]] = None
    return out


def pieces_of(tokenizer, ids):
    """[bytes of each token], empty for tokens without bytes."""
    table = token_bytes(tokenizer)
    return [(table[i] or b"") if i < len(table) else b"" for i in ids]


def ids_of_bytes(tokenizer):
    """{bytes: id} of the tokens whose bytes no other token of the vocabulary has."""
    ids = {}
    for i, piece in enumerate(token_bytes(tokenizer)):
        if piece:
            ids.setdefault(piece, []).append(i)
    return {piece: found[0] for piece, found in ids.items() if len(found) == 1}


def shared_vocabulary(student, teacher):
    """{student's id: teacher's id} of tokens with the same bytes.  Two tokenizers with one
    vocabulary share all of it, special tokens included."""
    if student.get_vocab() == teacher.get_vocab():
        return {i: i for i in sorted(student.get_vocab().values())}
    theirs = ids_of_bytes(teacher)
    return {i: theirs[piece] for piece, i in ids_of_bytes(student).items() if piece in theirs}


# ---- the same characters in two texts

# bytes that are no text, as errors="surrogateescape" decodes them
NO_TEXT = re.compile("[\udc80-\udcff]")
CUT_CHARACTER = re.compile("[\udc80-\udcff]+\\Z")
CHARACTER = regex.compile(r"\X")  # with its accents, an emoji with all its parts
AGREE = 8  # so many equal characters, or the ends of both texts, show that two places agree
FURTHEST = 32  # characters to skip in search of such places


@lru_cache(maxsize=4096)
def normal_form(character):
    """The same for all spellings of a character, in both cases: U+2126 and U+03A9 -> U+03C9."""
    shown = NO_TEXT.sub("\ufffd", character)
    return unicodedata.normalize("NFKD", shown).casefold()


def next_places(a, b, i, j):
    """Where two lists of normal forms agree again behind a[:i] and b[:j], as far as can be
    told; else their ends."""
    if a[i : i + 1] == b[j : j + 1]:
        return i + 1, j + 1
    for skipped in range(1, FURTHEST):
        for here in range(i, i + skipped + 1):
            there = i + j + skipped - here
            if a[here : here + AGREE] == b[there : there + AGREE]:
                return here, there
    return len(a), len(b)


def paired_parts(a, b):
    """Two texts cut into as many parts, equal where their characters are: [(bytes, bytes)].

    "10\u2126.", "10\u03a9." -> "1" "1", "0" "0", "\u2126" "\u03a9", "." "." as bytes"""
    a = CHARACTER.findall(a)
    b = CHARACTER.findall(b)
    forms = [[normal_form(character) for character in text] for text in (a, b)]
    pairs = []
    i = 0
    j = 0
    while i < len(a) or j < len(b):
        here, there = next_places(*forms, i, j)
        parts = ("".join(a[i:here]), "".join(b[j:there]))
        pairs.append([part.encode(errors="surrogateescape") for part in parts])
        i = here
        j = there
    return pairs


def places(pairs):
    """The offset in the first text of every byte offset of the second; inside of a part that
    differs half a byte after its beginning, where no token of the first text ends.

    places([(b"ab", b"ab"), (b"cd", b"xyz")]) -> [0, 1, 2, 2.5, 2.5, 4]"""
    found = [0]
    start = 0
    for x, y in pairs:
        end = start + len(x)
        if x == y:
            found += range(start + 1, end + 1)
        elif y:
            found += [min(start + 0.5, end)] * (len(y) - 1) + [end]
        start = end
    return found


# ---- alignment


def aligned_units(student_ends, teacher_ends):
    """[(s0, s1, t0, t1)]: student tokens s0..s1-1 stand for what teacher tokens t0..t1-1 stand
    for; in order, without gaps.

    ends: places at which the tokens end, never falling.  A token without bytes joins the unit
    before it, or the first.

    aligned_units([3, 5, 7, 9], [2, 5, 8, 9]) -> [(0, 2, 0, 2), (2, 4, 2, 4)]"""
    units = []
    s0 = 0
    t0 = 0
    for offset in sorted(set(student_ends) & set(teacher_ends) - {0}):
        s1 = bisect_right(student_ends, offset)
        t1 = bisect_right(teacher_ends, offset)
        units.append((s0, s1, t0, t1))
        s0 = s1
        t0 = t1
    return units


@dataclass(frozen=True)
class Alignment:
    """One answer in both tokenizations."""

    teacher_ids: list  # with an end token iff the student's is in a unit
    units: list  # (s0, s1, t0, t1) into the student's ids and teacher_ids, of the same bytes
    text: str  # what the teacher reads
    bytes: int  # of the student's answer
    covered: int  # of these, in units
    strict: int  # of these, in units of one token on either side


def leading_spaces(raw):
    return len(raw) - len(raw.lstrip(b" "))


def one_to_one(unit):
    """Whether a unit is one token on either side."""
    s0, s1, t0, t1 = unit
    return s1 - s0 == 1 and t1 - t0 == 1


def align(student, teacher, student_ids, ends=None):
    """Alignment of a student's sampled ids with the teacher's tokens of their text.

    ends: (student's id, teacher's id) of the end of a turn; by default the end tokens of both
    tokenizers."""
    end, teacher_end = ends or (student.eos_token_id, teacher.eos_token_id)
    ended = student_ids[-1:] == [end]
    body = student_ids[:-1] if ended else student_ids
    pieces = pieces_of(student, body)
    raw = b"".join(pieces)
    spelt = raw.decode(errors="surrogateescape")
    # an answer that is cut inside a character ends before it
    text = NO_TEXT.sub("\ufffd", CUT_CHARACTER.sub("", spelt))
    encoding = teacher(text, add_special_tokens=False, split_special_tokens=True)
    teacher_ids = encoding["input_ids"] if text else []
    teacher_pieces = pieces_of(teacher, teacher_ids)
    if leading_spaces(b"".join(teacher_pieces)) > leading_spaces(raw):
        teacher_pieces[0] = teacher_pieces[0][1:]  # the tokenizer's own
    teacher_spelt = b"".join(teacher_pieces).decode(errors="surrogateescape")
    offset_of = places(paired_parts(spelt, teacher_spelt))
    teacher_ends = [offset_of[e] for e in accumulate(map(len, teacher_pieces))]
    stretches = aligned_units(list(accumulate(map(len, pieces))), teacher_ends)

    units = []
    covered = 0
    strict = 0
    for unit in stretches:
        s0, s1, t0, t1 = unit
        spelling = b"".join(pieces[s0:s1])
        # a token without bytes would be made likelier for the text that stands beside it; only
        # the teacher's first may be one: the tokenizer's own space
        spelt_by_all = all(pieces[s0:s1]) and all(teacher_pieces[max(t0, 1) : t1])
        if spelt_by_all and spelling == b"".join(teacher_pieces[t0:t1]):
            units.append(unit)
            covered += len(spelling)
            strict += len(spelling) * one_to_one(unit)
    _, s_last, _, t_last = stretches[-1] if stretches else (0, 0, 0, 0)
    complete = s_last == len(body) and t_last == len(teacher_ids)
    # an end token means the same only after the whole text
    if ended and complete and teacher_end is not None:
        units.append((s_last, s_last + 1, t_last, t_last + 1))
        teacher_ids = teacher_ids + [teacher_end]
    return Alignment(teacher_ids, units, text, len(raw), covered, strict)


def byte_shares(counts):
    """{"covered", "strict", "whole"} of answers: the shares of their bytes in units and in
    one-to-one units, and the share of answers covered to their end.

    counts: [[bytes, covered, strict]].   [[4, 4, 2], [4, 0, 0]] -> 0.5, 0.25, 0.5"""
    total = max(1, sum(n for n, _, _ in counts))
    return {
        "covered": sum(covered for _, covered, _ in counts) / total,
        "strict": sum(strict for _, _, strict in counts) / total,
        "whole": sum(n == covered for n, covered, _ in counts) / max(1, len(counts)),
    }


def describe_shares(shares):
    return (
        f"{shares['covered']:.1%} of their bytes in units, {shares['strict']:.1%} in units of "
        f"one token on either side, {shares['whole']:.1%} of them covered to their end"
    )


# ---- the command


def describe_units(student, units, student_ids):
    """The units as a person reads them: "'hap|py'(2:2) '_d|ay'(2:2)"."""
    words = []
    for s0, s1, t0, t1 in units:
        pieces = zip(pieces_of(student, student_ids[s0:s1]), student_ids[s0:s1])
        spelt = [
            piece.decode(errors="backslashreplace") or student.convert_ids_to_tokens(i)
            for piece, i in pieces
        ]
        words.append(f"{'|'.join(spelt).replace(' ', '_')!r}({s1 - s0}:{t1 - t0})")
    return " ".join(words)


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--student", required=True, help="whose tokenizer wrote the answers")
    p.add_argument("--teacher", required=True, help="whose tokenizer they are aligned with")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="show the units of this text")
    source.add_argument("--rollouts", help="JSONL of the student's rollouts: print shares")
    args = p.parse_args(argv)
    student = load_tokenizer(args.student)
    teacher = load_tokenizer(args.teacher)
    if args.rollouts:
        answers = [r["response_ids"] for r in files.read(args.rollouts, "rollouts")]
    else:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        answers = [student(args.text, **options)["input_ids"]]
    alignments = [align(student, teacher, ids) for ids in answers]
    if not args.rollouts:
        print(describe_units(student, alignments[0].units, answers[0]))
    shares = byte_shares([(a.bytes, a.covered, a.strict) for a in alignments])
    shared = len(shared_vocabulary(student, teacher))
    sizes = [sum(b is not None for b in token_bytes(t)) for t in (student, teacher)]
    print(
        f"methods.simct align: {len(answers)} answers, {describe_shares(shares)}; {shared} "
        f"tokens shared of {sizes[0]} and {sizes[1]}"
    )
    return {"answers": len(answers), **shares, "shared_vocabulary": shared}
