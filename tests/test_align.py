"""Units of two tokenizations: by hand, by properties over random texts and real tokenizers, and
where characters are cut."""

import os
from itertools import accumulate
from pathlib import Path

import pytest
from conftest import argv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from methods.simct import align
from opd import records
from worlds import sums

TEXTS = [
    "the quick brown fox jumps over the lazy dog 12 34 567 8901",
    "happy day, happier days; naïve café 北京 東京 🙂🙃 👩‍👩‍👧 e\u0301 \n\ttabs",
    "12+34=46\n46-7=39\n#39",
    "It's 3.14159, isn't it?  Two  spaces.",
    "ありがとう ございます 12345",
] * 30


def wrap(core, **special):
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def trained(kind):
    """A tokenizer of one of the families, trained on the texts above."""
    if kind == "byte-level":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        core.train_from_iterator(
            TEXTS,
            trainers.BpeTrainer(
                vocab_size=400,
                special_tokens=["<end>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
    # as Llama 2 and Gemma: ▁ for a space, <0x..> for what has no token
    elif kind == "byte-fallback":
        pieces = [
            "<unk>",
            "<end>",
            *(f"<0x{b:02X}>" for b in range(256)),
            "▁",
            *"abcdefghijklmnopqrstuvwxyz0123456789+-=#,.",
            "▁d",
            "ay",
            "ha",
            "pp",
            "▁t",
            "he",
            "12",
            "34",
            "▁da",
        ]
        merges = [
            ("▁", "d"),
            ("a", "y"),
            ("h", "a"),
            ("p", "p"),
            ("▁", "t"),
            ("h", "e"),
            ("1", "2"),
            ("3", "4"),
            ("▁d", "a"),
        ]
        core = Tokenizer(
            models.BPE(
                vocab={p: i for i, p in enumerate(pieces)},
                merges=merges,
                byte_fallback=True,
                unk_token="<unk>",
                fuse_unk=True,
            )
        )
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        core.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    elif kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer, core.decoder = (
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            decoders.Metaspace(prepend_scheme="first"),
        )
        core.train_from_iterator(
            TEXTS,
            trainers.UnigramTrainer(
                vocab_size=200,
                special_tokens=["<unk>", "<end>"],
                unk_token="<unk>",
                show_progress=False,
            ),
        )
    elif kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        core.pre_tokenizer, core.decoder = (
            pre_tokenizers.WhitespaceSplit(),
            decoders.WordPiece(cleanup=False),
        )
        core.train_from_iterator(
            TEXTS,
            trainers.WordPieceTrainer(
                vocab_size=300, special_tokens=["[UNK]", "<end>"], show_progress=False
            ),
        )
    return wrap(core, eos_token="<end>")


KINDS = (
    "byte-level",
    "byte-fallback",
    "unigram",
    "wordpiece",
    "characters",
    "merged digits",
    "SmolLM2",
)


@pytest.fixture(scope="module")
def tokenizers():
    found = {kind: trained(kind) for kind in KINDS[:4]}
    found |= {
        "characters": sums.build_tokenizer(),
        "merged digits": sums.build_tokenizer(merges=sums.TWO_DIGITS),
    }
    real = Path(os.environ.get("OPD_REAL_MODEL", "/nonexistent"))
    return found | ({"SmolLM2": AutoTokenizer.from_pretrained(real)} if real.is_dir() else {})


# ---- units


def ends(text):
    """ "hap|py" -> [3, 5]"""
    return list(accumulate(len(piece.encode()) for piece in text.split("|")))


@pytest.mark.parametrize(
    "student, teacher, want",
    [
        # two units, not one span of all
        ("hap|py| d|ay", "ha|ppy| da|y", [(0, 2, 0, 2), (2, 4, 2, 4)]),
        (
            "7|+|12|=|19",
            "7|+|1|2|=|1|9",
            [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 4), (3, 4, 4, 5), (4, 5, 5, 7)],
        ),
        # the match after a mismatch is not swallowed
        (
            "x|=|123| ok",
            "x|=|1|2|3| ok",
            [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 5), (3, 4, 5, 6)],
        ),
        ("abc", "a|b|c", [(0, 1, 0, 3)]),
        ("ab|c", "a|bc", [(0, 2, 0, 2)]),
        ("a|b", "a|b", [(0, 1, 0, 1), (1, 2, 1, 2)]),
    ],
)
def test_units_by_hand(student, teacher, want):
    assert align.aligned_units(ends(student), ends(teacher)) == want and align.aligned_units(
        ends(teacher), ends(student)
    ) == [(t0, t1, s0, s1) for s0, s1, t0, t1 in want]


def test_tokens_without_bytes_join_a_unit():
    assert (
        align.aligned_units([0, 2, 2, 5], [2, 5]) == [(0, 3, 0, 1), (3, 4, 1, 2)]
        and align.aligned_units([], []) == []
        and align.aligned_units([3], [4]) == []
    )


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=20),
    st.lists(st.integers(1, 4), min_size=1, max_size=20),
)
def test_units_are_the_finest_division_that_cuts_no_token(a, b):
    """Against the definition: connected components of tokens that share a byte."""
    n = min(sum(a), sum(b))
    a, b = ([e for e in accumulate(x) if e < n] + [n] for x in (a, b))
    # token of either side at every byte
    owner = [(sum(e <= i for e in a), sum(e <= i for e in b)) for i in range(n)]
    groups, last = [[0]], None
    for i in range(1, n):
        linked = owner[i][0] == owner[i - 1][0] or owner[i][1] == owner[i - 1][1]
        groups[-1].append(i) if linked else groups.append([i])
    want = [
        (owner[g[0]][0], owner[g[-1]][0] + 1, owner[g[0]][1], owner[g[-1]][1] + 1)
        for g in groups
    ]
    assert align.aligned_units(a, b) == want and last is None


# ---- tokenizers

PLAIN = st.text(alphabet=st.sampled_from("abdehpty 0123456789+-=#\n,."), max_size=40)
ANY = st.text(max_size=24)
FAST = dict(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize(
    "kind",
    [k for k in KINDS if k not in ("wordpiece", "unigram", "characters", "merged digits")],
)
@settings(**FAST)
@given(text=ANY)
def test_token_bytes_spell_any_text(tokenizers, kind, text):
    """The tokens' bytes are the text's, wherever the tokenizer gives it back (SmolLM2 has no
    token for some bytes); surrogates are no text."""
    if kind not in tokenizers:
        pytest.skip("no real model here: OPD_REAL_MODEL is not set")
    tokenizer = tokenizers[kind]
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return
    if any(special in text for special in tokenizer.all_special_tokens) or "▁" in text:
        return
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids, skip_special_tokens=False) != text:
        return
    pieces = [align.token_bytes(tokenizer)[i] for i in ids]
    spelt = b"".join(piece or b"" for piece in pieces)
    assert spelt in (raw, b" " + raw)


@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("student", KINDS)
def test_units_of_real_tokenizers(tokenizers, student, teacher):
    if not {student, teacher} <= set(tokenizers):
        pytest.skip("no real model here: OPD_REAL_MODEL is not set")
    a, b = tokenizers[student], tokenizers[teacher]

    @settings(**FAST | dict(max_examples=30))
    @given(text=st.one_of(PLAIN, ANY), ended=st.booleans())
    def check(text, ended):
        try:
            text.encode()
        except UnicodeEncodeError:
            return
        ids = [
            i for i in a(text, add_special_tokens=False)["input_ids"] if i != a.eos_token_id
        ] + [a.eos_token_id] * ended
        got = align.align(a, b, ids)
        mine, theirs = align.token_bytes(a), align.token_bytes(b)

        def spelt(spelling, some):
            return b"".join(spelling[i] or b"" for i in some)

        at = [(0, 0), *((s1, t1) for _, s1, _, t1 in got.units)]
        assert (
            at == [(0, 0), *((s0, t0) for s0, _, t0, _ in got.units[1:]), *at[-1:]][: len(at)]
        ), "in order and without gaps"
        for n, (s0, s1, t0, t1) in enumerate(got.units):
            one, two = spelt(mine, ids[s0:s1]), spelt(theirs, got.teacher_ids[t0:t1])
            assert one == two or (n == 0 and b" " + one == two), (
                "the same bytes on either side, but for a space that a tokenizer put before "
                "the text"
            )
            inner_s, inner_t = (
                set(list(accumulate(len(m[i] or b"") for i in some))[:-1])
                for m, some in ((mine, ids[s0:s1]), (theirs, got.teacher_ids[t0:t1]))
            )
            assert n == 0 or not (inner_s & inner_t) - {0, len(one)}, (
                "no common end strictly inside"
            )
        if ended and got.covered == got.bytes and got.units and got.units[-1][1] == len(ids):
            assert (
                got.units[-1]
                == (len(ids) - 1, len(ids), len(got.teacher_ids) - 1, len(got.teacher_ids))
                and got.teacher_ids[-1] == b.eos_token_id
            )
        assert 0 <= got.strict <= got.covered <= got.bytes

    check()


@pytest.mark.parametrize(
    "student, teacher",
    [
        ("byte-level", "byte-fallback"),
        ("byte-fallback", "byte-level"),
        ("byte-level", "SmolLM2"),
        ("SmolLM2", "byte-fallback"),
    ],
)
@pytest.mark.parametrize(
    "text",
    ["🙂 ok", "北京 12", "naïve café", "e\u0301a", "👩‍👩‍👧", "  two spaces", "\n\n12", "a\tb"],
)
def test_whole_texts_are_covered_whatever_their_characters(tokenizers, student, teacher, text):
    if not {student, teacher} <= set(tokenizers):
        pytest.skip("no real model here: OPD_REAL_MODEL is not set")
    a, b = tokenizers[student], tokenizers[teacher]
    got = align.align(a, b, a(text, add_special_tokens=False)["input_ids"])
    assert (
        got.covered == got.bytes
        and got.text.lstrip(" ") == text.lstrip(" ")
        and got.units[-1][3] == len(got.teacher_ids)
    )


def test_an_answer_cut_inside_a_character_keeps_what_stands_before(tokenizers):
    a, b = tokenizers["byte-fallback"], tokenizers["byte-level"]
    ids = a("day 🙂", add_special_tokens=False)["input_ids"]
    got = align.align(a, b, ids[:-2])  # two of the emoji's four bytes are missing
    assert (
        got.text.strip() == "day"
        and 0 < got.covered == got.bytes - 2
        and all(s1 <= len(ids) - 4 for _, s1, _, _ in got.units)
    )
    # bytes that are no text, in the middle
    garbage = ids[:-1] + a("day", add_special_tokens=False)["input_ids"] + [a.eos_token_id]
    got = align.align(a, b, garbage)
    assert (
        got.text.strip() == "day"
        and got.covered < got.bytes
        and got.units[-1][1] < len(garbage)
    ), "no end of turn beyond what was not understood"


def test_the_students_own_ids_are_aligned_and_not_those_of_its_text(tokenizers):
    """1 and 2 sampled one by one, where the tokenizer would have written 12."""
    a, b = tokenizers["merged digits"], tokenizers["characters"]
    one_by_one = [a.convert_tokens_to_ids(c) for c in "12"]
    assert a("12", add_special_tokens=False)["input_ids"] != one_by_one
    assert align.align(a, b, one_by_one).units == [(0, 1, 0, 1), (1, 2, 1, 2)]
    assert align.align(a, b, a("12", add_special_tokens=False)["input_ids"]).units == [
        (0, 1, 0, 2)
    ]


def test_an_explicit_pair_of_ends(tokenizers):
    a, b = tokenizers["characters"], tokenizers["merged digits"]
    ids = a("7", add_special_tokens=False)["input_ids"]
    user = a.convert_tokens_to_ids("<|user|>")
    got = align.align(a, b, ids + [user], ends=(user, 1))
    assert got.units == [(0, 1, 0, 1), (1, 2, 1, 2)] and got.teacher_ids[-1] == 1
    assert align.align(a, b, ids).units == [(0, 1, 0, 1)], "what did not end has no end"


# ---- vocabularies


def test_the_shared_vocabulary_is_matched_on_bytes(tokenizers):
    """A space is Ġ here and ▁ there, a line break Ċ here and <0x0A> there."""
    a, b = tokenizers["byte-level"], tokenizers["byte-fallback"]
    both = align.shared_vocabulary(a, b)
    assert all(align.token_bytes(a)[i] == align.token_bytes(b)[j] for i, j in both.items())
    assert both[a.convert_tokens_to_ids("Ċ")] == b.convert_tokens_to_ids("<0x0A>") and both[
        a.convert_tokens_to_ids("Ġd")
    ] == b.convert_tokens_to_ids("▁d")
    assert a.eos_token_id not in both, "ends are a pair of their own, not bytes"


def test_ambiguous_tokens_leave_the_shared_vocabulary(tokenizers):
    """byte-fallback writes an a as `a` and could write it as <0x61>."""
    a, b = tokenizers["characters"], tokenizers["byte-fallback"]
    assert b.convert_tokens_to_ids("1") != b.convert_tokens_to_ids(
        "<0x31>"
    ) and a.convert_tokens_to_ids("1") not in align.shared_vocabulary(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_shares_everything_with_itself(tokenizers, kind):
    if kind not in tokenizers:
        pytest.skip("no real model here: OPD_REAL_MODEL is not set")
    both = align.shared_vocabulary(tokenizers[kind], tokenizers[kind])
    assert both and all(i == j for i, j in both.items())


# ---- the command


def test_the_command_shows_units_and_shares(world, capsys):
    done = align.main(
        argv(
            student=world.toy / "student",
            teacher=world.toy / "teacher_merged_digits",
            text="7+5=12",
        )
    )
    assert (
        done["covered"] == 1
        and done["strict"] == pytest.approx(4 / 6)
        and "'1|2'(2:1)" in capsys.readouterr().out
    )
    done = align.main(
        argv(
            student=world.toy / "student",
            teacher=world.toy / "teacher_merged_digits",
            rollouts=world.rollouts,
        )
    )
    assert (
        done["answers"] == 32
        and 0 < done["strict"] <= done["covered"] <= 1
        and done["shared_vocabulary"] == 19
    )
    flags = argv(student=world.toy / "student", teacher=world.toy / "teacher")
    with pytest.raises(SystemExit):
        align.main(flags)
    assert "one of the arguments --text --rollouts is required" in capsys.readouterr().err


def test_an_unknown_decoder_is_refused():
    core = Tokenizer(models.BPE(vocab={"a": 0, "<end>": 1}, merges=[]))
    core.decoder = decoders.CTC()
    with pytest.raises(
        records.BadInput, match="decoder: expected steps whose bytes are known, got CTC"
    ):
        align.token_bytes(wrap(core, eos_token="<end>"))
