"""Two tokenizers over one text: where both end a token, and what lies between (SimCT, arXiv
2605.07711, sections on alignment).

    python methods/simct/align.py --student M1 --teacher M2 --text "happy day"       # the units
    of a text,
    and how much of it both spell alike
    python methods/simct/align.py --student M1 --teacher M2 --rollouts R             # shares
    over the
    rollouts of M1

A teacher with another vocabulary says nothing of a student's token, but both spell the same
bytes.  Their tokens end at byte offsets; between two neighbouring offsets at which both end a
token lies a minimal aligned unit, and no finer division is possible without cutting a token
(theorem 1):

    student   hap|py| d|ay          ends  3 5 7 9
    teacher   ha|ppy| da|y          ends  2 5 8 9          common: 5 9          units: happy
                                                           (2:2), _day (2:2)
    student   7|+|12|=|19           teacher  7|+|1|2|=|1|9           units: 7 (1:1), + (1:1), 12
                                             (1:2), = (1:1), 19 (1:2)

Everything is counted in bytes of tokens, never in decoded strings: a token may end inside a
character (emoji, Chinese, accents), where a decoder shows a replacement character and two
strings never become equal again.  What bytes a token stands for is read off the tokenizer's own
decoder (byte-level alphabets, `▁` for a space, `<0x0A>` bytes, `##` continuations, plain
characters), and special tokens stand for none.  A space that a tokenizer puts before a text of
its own accord is no byte of the text.  The student's ids are those that it sampled; only the
teacher's are made here.

The end of a turn is a pair of its own: the student's end token is the teacher's, whatever they
are called, if the answer ended.

Shared vocabulary: tokens of the same bytes, one on either side.  Two tokens of the same bytes
in one vocabulary are ambiguous and leave it.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from opd import files
from opd.policy import load_tokenizer
from opd.records import BadInput


def byte_alphabet():
    """{character: byte} of byte-level tokenizers: printable bytes stand for themselves, the
    others for characters from 256 on (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _parts(node):
    """A decoder's steps, flat."""
    if not node:
        return []
    return (
        [step for part in node["decoders"] for step in _parts(part)]
        if node["type"] == "Sequence"
        else [node]
    )


@lru_cache(maxsize=8)
def spelling(tokenizer):
    """[bytes of every token id], None for special tokens and for ids without a token."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    steps, model, alphabet = _parts(core["decoder"]), core["model"], byte_alphabet()
    kinds = [step["type"] for step in steps]
    space = next(
        (
            step["pattern"]["String"]
            for step in steps
            if step["type"] == "Replace" and step.get("content") == " "
        ),
        "▁" if "Metaspace" in kinds else None,
    )
    prefix = next((step["prefix"] for step in steps if step["type"] == "WordPiece"), None)
    suffix = next((step["suffix"] for step in steps if step["type"] == "BPEDecoder"), None)
    unknown = [
        kind
        for kind in kinds
        if kind
        not in (
            "ByteLevel",
            "Metaspace",
            "Replace",
            "ByteFallback",
            "Fuse",
            "Strip",
            "WordPiece",
            "BPEDecoder",
        )
    ]
    if unknown:
        raise BadInput(
            f"tokenizer {tokenizer.name_or_path!r}: decoder: expected steps whose bytes are "
            f"known, got {', '.join(unknown)}"
        )
    added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.get_vocab()
    out = [None] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if i in added:
            out[i] = None if added[i].special else added[i].content.encode()
        elif "ByteLevel" in kinds:
            out[i] = (
                bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else None
            )
        elif (
            "ByteFallback" in kinds
            and len(token) == 6
            and token.startswith("<0x")
            and token.endswith(">")
        ):
            out[i] = bytes([int(token[3:5], 16)])
        elif prefix is not None:
            out[i] = (
                token[len(prefix) :].encode()
                if token.startswith(prefix)
                else b" " + token.encode()
            )
        else:
            for mark in filter(None, (space, suffix)):
                token = token.replace(mark, " ")
            out[i] = token.encode()
    unk = model.get("unk_token") if isinstance(model.get("unk_token"), str) else None
    if model.get("unk_id") is not None:
        out[model["unk_id"]] = None
    if unk in vocabulary:
        out[vocabulary[unk]] = None  # it stands for any text, so for none
    return out


def shared_vocabulary(student, teacher):
    """{student's id: teacher's id} of tokens that stand for the same bytes, each alone in its
    vocabulary.  One and the same vocabulary is shared whole, with its special tokens."""
    if student.get_vocab() == teacher.get_vocab():
        return {i: i for i in sorted(student.get_vocab().values())}

    def alone(tokenizer):
        ids = {}
        for i, piece in enumerate(spelling(tokenizer)):
            if piece:
                ids.setdefault(piece, []).append(i)
        return {piece: found[0] for piece, found in ids.items() if len(found) == 1}

    mine, theirs = alone(student), alone(teacher)
    return {i: theirs[piece] for piece, i in mine.items() if piece in theirs}


def units(student_ends, teacher_ends):
    """[(s0, s1, t0, t1)]: tokens s0..s1-1 of the student spell what tokens t0..t1-1 of the
    teacher spell; in order, without gaps.

    ends: byte offsets at which the tokens end, never falling (a token may stand for no bytes:
    it joins the unit before it, or the first).

    units([3, 5, 7, 9], [2, 5, 8, 9]) -> [(0, 2, 0, 2), (2, 4, 2, 4)]"""
    out, s, t, common = [], 0, 0, sorted(set(student_ends) & set(teacher_ends) - {0})
    for offset in common:
        s1, t1 = s, t
        while s1 < len(student_ends) and student_ends[s1] <= offset:
            s1 += 1
        while t1 < len(teacher_ends) and teacher_ends[t1] <= offset:
            t1 += 1
        out.append((s, s1, t, t1))
        s, t = s1, t1
    return out


@dataclass(frozen=True)
class Alignment:
    """One answer in both tokenizations."""

    # the answer in the teacher's tokens, its end token included where the student's is
    teacher_ids: list
    units: list  # (s0, s1, t0, t1), of student_ids and teacher_ids
    text: str  # what both spell
    bytes: int  # of the student's answer
    covered: int  # bytes in units
    strict: int  # bytes in units of one token on either side


def longest_text(raw):
    """The longest beginning of some bytes that is UTF-8: an answer cut inside a character, or a
    student that writes none."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return raw[: error.start].decode()


def common_prefix(a, b):
    """Bytes at the beginning that are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def align(student, teacher, student_ids, ends=None):
    """Alignment of a student's sampled ids with what the teacher makes of their text.

    ends: (student's id, teacher's id) of the end of a turn; by default both tokenizers' end
    tokens."""
    end, teacher_end = ends or (student.eos_token_id, teacher.eos_token_id)
    ended = student_ids[-1:] == [end]
    body, spelt, theirs = (
        student_ids[:-1] if ended else student_ids,
        spelling(student),
        spelling(teacher),
    )
    pieces = [spelt[i] or b"" if i < len(spelt) else b"" for i in body]
    raw = b"".join(pieces)
    text = longest_text(raw)
    teacher_ids = teacher(text, add_special_tokens=False)["input_ids"] if text else []
    teacher_pieces = [theirs[i] or b"" for i in teacher_ids]
    spelt_there = b"".join(teacher_pieces)
    # a space that the tokenizer put there
    virtual = int(
        spelt_there[:1] == b" "
        and common_prefix(raw, spelt_there[1:]) > common_prefix(raw, spelt_there)
    )
    same = common_prefix(raw, spelt_there[virtual:])
    student_ends = [e for e in accumulate(map(len, pieces)) if e <= same]
    teacher_ends = [
        e
        for e in (max(0, e - virtual) for e in accumulate(map(len, teacher_pieces)))
        if e <= same
    ]
    found = units(student_ends, teacher_ends)
    offsets = [0, *accumulate(map(len, pieces))]
    covered = offsets[found[-1][1]] if found else 0
    strict = sum(
        offsets[s1] - offsets[s0] for s0, s1, t0, t1 in found if (s1 - s0, t1 - t0) == (1, 1)
    )
    understood = covered == len(raw) and (found[-1][1:4:2] if found else (0, 0)) == (
        len(body),
        len(teacher_ids),
    )
    if ended and understood and teacher_end is not None:  # only where all before it has been
        found = found + [(len(body), len(body) + 1, len(teacher_ids), len(teacher_ids) + 1)]
        teacher_ids = teacher_ids + [teacher_end]
    return Alignment(teacher_ids, found, text, len(raw), covered, strict)


def show(student, teacher, alignment, student_ids):
    """The units as a person reads them: text (tokens:tokens)."""
    spelt = spelling(student)

    def piece(i):
        return (
            spelt[i].decode(errors="backslashreplace")
            if spelt[i]
            else student.convert_ids_to_tokens(i)
        )

    return " ".join(
        f"{'|'.join(piece(i) for i in student_ids[s0:s1]).replace(' ', '_')!r}"
        f"({s1 - s0}:{t1 - t0})"
        for s0, s1, t0, t1 in alignment.units
    )


def main(argv=None):

    p = files.parser(__doc__)
    p.add_argument(
        "--student",
        required=True,
        help="folder or Hugging Face id whose tokenizer wrote the answers",
    )
    p.add_argument(
        "--teacher", required=True, help="folder or Hugging Face id of the other tokenizer"
    )
    p.add_argument("--text", help="show the units of this text")
    p.add_argument(
        "--rollouts", help="JSONL of the student's rollouts: shares over all of them"
    )
    args = p.parse_args(argv)
    if bool(args.text) == bool(args.rollouts):
        raise BadInput("--text, --rollouts: expected one of them")
    student, teacher = load_tokenizer(args.student), load_tokenizer(args.teacher)
    answers = (
        [student(args.text, add_special_tokens=False)["input_ids"]]
        if args.text
        else [r["response_ids"] for r in files.read(args.rollouts, "rollouts")]
    )
    found = [align(student, teacher, ids) for ids in answers]
    if args.text:
        print(show(student, teacher, found[0], answers[0]))
    total = max(1, sum(a.bytes for a in found))
    both, mine = (
        shared_vocabulary(student, teacher),
        sum(piece is not None for piece in spelling(student)),
    )
    theirs = sum(piece is not None for piece in spelling(teacher))
    summary = {
        "answers": len(found),
        "covered": sum(a.covered for a in found) / total,
        "strict": sum(a.strict for a in found) / total,
        "whole": sum(a.covered == a.bytes for a in found) / max(1, len(found)),
        "shared_vocabulary": len(both),
        "jaccard": len(both) / max(1, mine + theirs - len(both)),
    }
    print(
        f"methods/simct/align.py: {len(found)} answers, {summary['covered']:.1%} of their "
        f"bytes in units, "
        f"{summary['strict']:.1%} in units of one token on either side, "
        f"{summary['whole']:.1%} of answers whole; "
        f"{len(both)} tokens shared of {mine} and {theirs} (Jaccard {summary['jaccard']:.1%})"
    )
    return summary


if __name__ == "__main__":
    files.run(main)
