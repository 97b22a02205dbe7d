"""methods.prefix: cuts are those of the published rule and of no noise, weights keep what they
promise, nulls tell a drop from chance."""

import json
import math
import re

import numpy as np
import pytest
from conftest import argv, dump, kill_while_writing, load, refusal

from methods.prefix import (
    NULLS,
    RULES,
    about_slips,
    against_nulls,
    bic_cut,
    block_shuffled,
    block_signal,
    block_spans,
    first_slip,
    kept_shares,
    main,
    margins,
    nearest_cut,
    token_weights,
)
from opd import files, records
from opd import policy as policies
from worlds import sums

STUDENT = "5ca1ab1e0000"  # hash of the weights that wrote the rollouts
NEWLINE = re.compile(r"\n+")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    sums.write_model(
        folder, sums.build_tokenizer(merges=[("\n", "\n"), ("\n", "#")]), (16, 1, 2), 0
    )
    return folder


def pair(student, text, margins, number=0, mask=None, finish="stop", logprobs=None):
    """(rollout, score) of a text with its end token; margins [T] are what the teacher's two
    best of the student's four differ by."""
    tokenizer = policies.load_tokenizer(student)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * (
        finish == "stop"
    )
    assert len(ids) == len(margins)
    r = {
        "id": f"p{number:04d}",
        "sample": 0,
        "policy": policies.identity_of("student", STUDENT, tokenizer, {}),
        "text": text,
        "finish_reason": finish,
        "prompt_ids": [2, 3],
        "response_ids": ids,
        "loss_mask": mask or [1] * len(ids),
        "logprobs": [-1.0] * len(ids),
        "temperature": 1.0,
        "top_p": 1.0,
    }
    m = np.array(margins, np.float32).reshape(-1, 1)
    # neither sorted nor with the student's favourite first
    top = np.hstack([-3 - m, -1 - m, np.full_like(m, -1.0), -2 - m])
    s = {
        "id": r["id"],
        "sample": 0,
        "policy": r["policy"],
        "rollout": records.fingerprint(r),
        "logprobs": logprobs or [-2.0] * len(ids),
        "topk": {
            "ids": records.pack(np.zeros(top.shape, np.uint16)),
            "logprobs": records.pack(top),
        },
        "topk_of": STUDENT,
    }
    return r, s


def write(student, tmp_path, pairs):
    """{flags} of methods.prefix for these (rollout, score) pairs."""
    return {
        "rollouts": dump(tmp_path / "r.jsonl", [r for r, _ in pairs]),
        "scores": dump(tmp_path / "s.jsonl", [s for _, s in pairs]),
        "model": student,
    }


def planted(student, series, sizes, number):
    """A rollout whose blocks have the signal `series` (>= 0), sizes[i] >= 2 tokens each, the
    last line break replaced by the end token."""
    text = "".join("1" * (size - 1) + "\n" for size in sizes)[:-1]
    return pair(student, text, np.repeat(np.expm1(series), sizes), number)


def some(student, count, seed=0):
    """Pairs of random series, about two thirds with a cut: a large drop, a small one or none, 1
    to 14 blocks."""
    rng, out = np.random.default_rng(seed), []
    for i in range(count):
        n = int(rng.integers(1, 15))
        s = rng.normal(2, 0.2, n)
        s[: rng.integers(1, n + 1)] += rng.choice([0, 0.4, 2])
        out.append(planted(student, s, rng.integers(2, 7, n), i))
    return out


def cut(flags, out, rule="release", **more):
    reads = RULES[rule]
    given = {k: v for k, v in flags.items() if k == "rollouts" or k in reads}
    return main(argv("cut", **given, rule=rule, out=out, **more)), load(out)


# ---- the change point


def naive_cut(series, guard=False, eps=1e-12):
    """The rule written out: every split, two-pass sums."""
    n, best = len(series), (None, math.inf)

    def rss(part):
        return sum((x - sum(part) / len(part)) ** 2 for x in part)

    bic0 = n * math.log((rss(series) + eps) / n) + math.log(n)
    for t in range(1, n):
        a, b = series[:t], series[t:]
        if sum(a) / len(a) > sum(b) / len(b) and not (guard and (n < 8 or t < 2 or n - t < 2)):
            bic = n * math.log((rss(a) + rss(b) + eps) / n) + 3 * math.log(n)
            if bic < best[1]:
                best = (t, bic)
    return best[0] if best[1] < bic0 else None, bic0, None if best[0] is None else best[1]


@pytest.mark.parametrize(
    "series, kept, guarded",
    [
        ([2, 2, 2, 1, 1, 1, 1, 1], 3, 3),
        ([1, 1, 1, 2, 2, 2], None, None),
        ([0.1] * 12, None, None),
        ([5], None, None),
        ([2, 1], 1, None),
        ([1, 2], None, None),
        ([9] + [1] * 9, 1, None),
        ([], None, None),
    ],
)
def test_check_values(series, kept, guarded):
    assert bic_cut(series)[0] == kept
    # there the guard forbids the split at the drop, and what it says of others is not obvious
    if series != [9] + [1] * 9:
        assert bic_cut(series, guard=True)[0] == guarded


def test_an_upward_best_split_does_not_hide_a_downward_one():
    # the best split of all is before the nines
    series = [3, 3.1, 3, 1, 1.1, 1, 1, 1.1, 1, 9, 9.1, 9, 9]
    assert bic_cut(series) == (None, *naive_cut(series)[1:])
    series = [3, 3.1, 3, 1, 1.1, 1, 1, 1.1, 1, 2.4, 2.5, 2.4]
    assert bic_cut(series)[0] == naive_cut(series)[0] == 3


@pytest.mark.parametrize("guard", [False, True])
def test_the_cut_is_that_of_a_loop_over_all_splits(guard):
    rng, cuts = np.random.default_rng(1), 0
    for _ in range(300):
        n = int(rng.integers(1, 25))
        # a large mean: running sums must not lose the differences
        series = rng.normal(1000, 1, n)
        series[: rng.integers(0, n)] += rng.choice([0, 1, 3])
        (kept, bic0, bic1), want = (
            bic_cut(series, guard),
            naive_cut(series.tolist(), guard),
        )
        cuts += kept is not None
        assert kept == want[0] and (bic1 is None) == (want[2] is None)
        np.testing.assert_allclose(
            [bic0, bic1 or 0], [want[1], want[2] or 0], rtol=1e-4, atol=1e-4
        )
    assert 50 < cuts < 250


def rate(series, guard=False):
    return np.mean([bic_cut(s, guard)[0] is not None for s in series])


def test_false_cuts_of_three_blocks_are_the_angle_they_must_be():
    """Residuals of 3 blocks are a direction in a plane; a split is taken within asin(3 **
    (-1/3)) of its own, and the two are 60 degrees apart."""
    exact = (60 + 2 * math.degrees(math.asin(3 ** (-1 / 3)))) / 360
    assert rate(np.random.default_rng(2).normal(size=(4000, 3))) == pytest.approx(
        exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000)
    )


@pytest.mark.parametrize("n, known", [(5, 0.293), (10, 0.171), (20, 0.101), (50, 0.0535)])
def test_noise_is_cut_as_often_as_it_must_be(n, known):
    """Known from 40,000 series and sums over every split in two passes."""
    noise = np.random.default_rng(n).normal(size=(2500, n))
    assert rate(noise) == pytest.approx(known, abs=4 * math.sqrt(known * (1 - known) / 2500))
    assert rate(noise, guard=True) <= rate(noise) and (n >= 8 or rate(noise, guard=True) == 0)


def ar1(rng, rows, n, phi):
    noise, x = rng.normal(size=(rows, n + 100)), np.zeros((rows, n + 100))
    for t in range(1, n + 100):
        x[:, t] = phi * x[:, t - 1] + noise[:, t]
    return x[:, 100:]


@pytest.mark.parametrize("n", [20, 50, 100])
def test_autocorrelated_noise_is_cut_half_of_the_time(n):
    assert 0.38 < rate(ar1(np.random.default_rng(n), 1500, n, 0.8)) < 0.56


def test_power_at_a_true_drop():
    noise = np.random.default_rng(3).normal(size=(2000, 50))
    for sigma, known in ((1, 0.479), (2, 0.975)):  # of 20,000 series, as above
        dropped = noise + sigma * (np.arange(50) < 6)
        assert rate(dropped) == pytest.approx(
            known, abs=4 * math.sqrt(known * (1 - known) / 2000)
        )
        assert np.median([k for k in (bic_cut(s)[0] for s in dropped) if k]) in (6, 7)


# ---- blocks and signals


def test_margins_do_not_depend_on_the_level_or_the_order():
    top = -np.random.default_rng(4).exponential(size=(30, 4))
    np.testing.assert_allclose(margins(top + 1.7), margins(top), atol=1e-12)
    assert (margins(top[:, [2, 0, 3, 1]]) == margins(top)).all()
    assert margins([[-4, -1, -1.5]]).tolist() == [0.5]


@pytest.mark.parametrize(
    "pieces, mask, want",
    [
        (["7", "\n", "#7", "<|end|>"], [1] * 4, [[0, 2], [2, 4]]),
        (["7", "+5=12", "\n", "\n#", "12", "<|end|>"], [1] * 6, [[0, 4], [4, 6]]),
        # no line break at all
        (["7", "+", "5"], [1] * 3, [[0, 3]]),
        # several in a token: one end; in neighbours: the last
        (["7\n\n5\n8", "\n", "\n", "9\n"], [1] * 4, [[0, 1], [1, 3], [3, 4]]),
        (["\n", "7"], [1, 1], [[0, 1], [1, 2]]),
        # a token of no characters holds no end
        (["", "7\n", "", "8"], [1] * 4, [[0, 2], [2, 4]]),
        # a masked block joins its predecessor ...
        (["7\n", "x\n", "8\n"], [1, 0, 1], [[0, 2], [2, 3]]),
        # ... the first ones their successor
        (["x\n", "y\n", "8\n"], [0, 0, 1], [[0, 3]]),
        (["7\n", "x\n"], [0, 0], []),
        ([], [], []),
    ],
)
def test_blocks(pieces, mask, want):
    assert block_spans(pieces, mask, NEWLINE) == want


def test_blocks_partition_the_response_and_each_ends_where_a_match_does():
    rng = np.random.default_rng(5)
    for _ in range(200):
        pieces = [
            "".join(rng.choice(list("ab\n"), rng.integers(0, 4), p=[0.4, 0.4, 0.2]))
            for _ in range(rng.integers(1, 20))
        ]
        spans = block_spans(pieces, [1] * len(pieces), NEWLINE)
        assert [a for a, _ in spans] + [len(pieces)] == [0] + [b for _, b in spans]
        # the token of every character
        text, token = "".join(pieces), [i for i, piece in enumerate(pieces) for _ in piece]
        ends = {
            token[at] + 1
            for at in range(len(text))
            if text[at] == "\n" and text[at + 1 : at + 2] != "\n"
        }
        assert {b for _, b in spans} == ends | {len(pieces)}


def test_signals_see_loss_tokens_only():
    values, mask, spans = [1.0, 3.0, 9.0, 5.0], [1, 1, 0, 1], [[0, 3], [3, 4]]
    np.testing.assert_allclose(block_signal(values, mask, spans), np.log([3, 6]))
    np.testing.assert_allclose(block_signal(values, mask, spans, "spread"), [1, 0])


# ---- weights


def test_a_rollout_keeps_its_units_of_loss_below_the_cap():
    rng, below = np.random.default_rng(6), 0
    for _ in range(200):
        mask = rng.integers(0, 2, rng.integers(2, 60))
        mask[[0, -1]] = 1
        prefix = int(rng.integers(1, len(mask) + 1))
        for rule in ("release", "suffix"):
            weights, kept, scale = token_weights(mask, prefix, rule, cap=8)
            assert (
                kept == pytest.approx((mask * (weights > 0)).sum() / mask.sum())
                and scale <= 8
                and len(set(weights.tolist()) - {0.0}) == 1
            )
            if 1 / kept <= 8:
                below += 1
                assert (mask * weights).sum() == pytest.approx(mask.sum())
            else:
                assert scale == 8 and (mask * weights).sum() < mask.sum()
            assert (mask * token_weights(mask, prefix, rule, cap=0)[0]).sum() == pytest.approx(
                mask.sum()
            )
            bare = token_weights(mask, prefix, rule, rescale=False)
            assert (
                bare[2] == 1
                and ((bare[0] > 0) == (weights > 0)).all()
                and set(bare[0]) <= {0.0, 1.0}
            )
        released, suffix, boosted = (
            token_weights(mask, prefix, rule)[0] for rule in ("release", "suffix", "boost")
        )
        if prefix < len(mask):
            assert ((released > 0) ^ (suffix > 0)).all()
        assert (boosted[:prefix] == released[:prefix]).all() and (boosted[prefix:] == 1).all()
    assert 100 < below < 400


def test_release_cuts_where_the_margin_drops(student, tmp_path):
    high, low = [2.0, 2.1, 1.9], [0.1, 0.12, 0.1, 0.11, 0.1]
    pairs = [
        planted(student, high + low, [3, 2, 4, 5, 2, 2, 6, 3], 0),
        planted(student, low + high, [3] * 8, 1),
        planted(student, [2.0], [5], 2),
    ]
    summary, rows = cut(write(student, tmp_path, pairs), tmp_path / "w.jsonl")
    assert [r["cut"] for r in rows] == [3, None, None]
    assert (
        rows[0]["weights"] == pytest.approx([3.0] * 9 + [0.0] * 18)
        and rows[1]["weights"] == [1.0] * 24
        and rows[2]["weights"] == [1.0] * 5
    )
    np.testing.assert_allclose(rows[0]["signal"], high + low, atol=1e-5)
    assert rows[0]["gain"] == rows[0]["bic0"] - rows[0]["bic1"] > 6 and rows[2]["gain"] is None
    assert rows[0]["blocks"] == [
        [0, 3],
        [3, 5],
        [5, 9],
        [9, 14],
        [14, 16],
        [16, 18],
        [18, 24],
        [24, 27],
    ]
    want = {
        "records": 3,
        "cut_rate": 1 / 3,
        "kept_median": 1 / 3,
        "kept_mean": 7 / 9,
        "scale_max": 3,
        "scale_mean": 5 / 3,
        "capped": 0,
        "first_block": 0,
        "strong": 1 / 3,
    }
    assert {name: summary[name] for name in want} == pytest.approx(want)
    table, rollouts = (
        files.Table(tmp_path / "w.jsonl", "weights"),
        files.Table(tmp_path / "r.jsonl", "rollouts"),
    )
    for r in rollouts:
        # refuses weights of other rollouts, or of another length
        files.record_for(table, r, rollouts)
    summary, rows = cut({**write(student, tmp_path, pairs)}, tmp_path / "capped.jsonl", cap=2)
    assert rows[0]["weights"] == [2.0] * 9 + [0.0] * 18 and summary["capped"] == 1
    summary, rows = cut(
        {**write(student, tmp_path, pairs)}, tmp_path / "bare.jsonl", no_rescale=True
    )
    assert rows[0]["weights"] == [1.0] * 9 + [0.0] * 18 and summary["capped"] == 0


def test_merged_line_breaks_and_masked_tokens_are_read_from_the_tokens(student, tmp_path):
    """ "\\n\\n" and "\\n#" are one token each here; a masked token's margin counts nowhere."""
    # 1, 2, line breaks, 3, break with #, 3, end
    text, margins = "12\n\n3\n#3", [4, 4, 4, 1, 1, 99, 1]
    mask = [1, 1, 1, 1, 1, 0, 1]
    _, rows = cut(
        write(student, tmp_path, [pair(student, text, margins, mask=mask)]),
        tmp_path / "w.jsonl",
    )
    assert rows[0]["blocks"] == [[0, 3], [3, 5], [5, 7]]
    np.testing.assert_allclose(rows[0]["signal"], np.log1p([4, 1, 1]), atol=1e-5)
    # 6 loss tokens, 3 kept
    assert rows[0]["cut"] == 1 and rows[0]["weights"] == [2.0] * 3 + [0.0] * 4


def test_spread_is_of_the_sampled_path_and_needs_no_support(student, tmp_path):
    flat, wild = [-2.0] * 4, [-1.0, -3.0, -1.0, -3.0]
    r, s = pair(student, "111\n111\n111", [0.0] * 12, logprobs=wild + flat + flat)
    del s["topk"], s["topk_of"]
    _, rows = cut(write(student, tmp_path, [(r, s)]), tmp_path / "w.jsonl", signal="spread")
    assert rows[0]["signal"] == [1, 0, 0] and rows[0]["cut"] == 1


def test_guard_refuses_what_the_faithful_rule_accepts(student, tmp_path):
    pairs = [
        planted(student, [2, 1], [3, 3], 0),
        planted(student, [2.0] * 4 + [1.0] * 5, [2] * 9, 1),
    ]
    flags = write(student, tmp_path, pairs)
    assert [r["cut"] for r in cut(flags, tmp_path / "a.jsonl")[1]] == [1, 4]
    assert [r["cut"] for r in cut(flags, tmp_path / "b.jsonl", guard=True)[1]] == [None, 4]


def test_suffix_and_boost_follow_release(student, tmp_path):
    flags = write(student, tmp_path, some(student, 30))
    release, suffix, boost = (
        cut(flags, tmp_path / f"{rule}.jsonl", rule)[1]
        for rule in ("release", "suffix", "boost")
    )
    assert 5 < sum(r["cut"] is not None for r in release) < 30
    for r, s, b in zip(release, suffix, boost):
        assert r["cut"] == s["cut"] == b["cut"] and b["kept"] == r["kept"]
        w, v, u = (np.array(x["weights"]) for x in (r, s, b))
        if r["cut"] is None:
            assert (w == 1).all() and (v == 1).all() and (u == 1).all()
        else:
            assert (
                ((w > 0) ^ (v > 0)).all()
                and w.sum() == pytest.approx(len(w)) == pytest.approx(v.sum())
                and (u == np.where(w > 0, w, 1)).all()
            )


def test_rules_that_need_no_teacher(student, tmp_path):
    pairs = [
        pair(student, "7+5=12", [1] * 7, 0, mask=[1, 0, 1, 1, 1, 0, 1]),
        pair(student, "7+", [1] * 2, 1, finish="length"),
        pair(student, "", [], 2, finish="length"),
        pair(student, "", [1], 3),
    ]
    flags = write(student, tmp_path, pairs)
    assert [r["weights"] for r in cut(flags, tmp_path / "all.jsonl", "all")[1]] == [
        [1.0] * 7,
        [1.0] * 2,
        [],
        [1.0],
    ]
    summary, rows = cut(flags, tmp_path / "no-end.jsonl", "no-end")
    assert [r["weights"] for r in rows] == [[1.0] * 6 + [0.0], [1.0] * 2, [], [0.0]]
    assert [r["kept"] for r in rows] == [pytest.approx(4 / 5), 1, 1, 0] and summary[
        "cut_rate"
    ] == 0.5
    _, rows = cut(flags, tmp_path / "fixed.jsonl", "fixed", tokens=2)
    # the third token is the second that bears loss
    assert rows[0]["weights"] == [2.5] * 3 + [0.0] * 4
    assert [r["weights"] for r in rows[1:]] == [[1.0] * 2, [], [1.0]]
    assert [r["kept"] for r in cut(flags, tmp_path / "long.jsonl", "fixed", tokens=50)[1]] == [
        1,
        1,
        1,
        1,
    ]


def test_shuffled_deals_out_the_cuts_of_release(student, tmp_path):
    flags = write(student, tmp_path, some(student, 60))
    release = cut(flags, tmp_path / "release.jsonl")[1]
    dealt, again, other = (
        cut(flags, tmp_path / f"{name}.jsonl", "shuffled", seed=seed, cap=0)[1]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert dealt == again and [r["kept"] for r in other] != [r["kept"] for r in dealt] != [
        r["kept"] for r in release
    ]
    shares = [None if r["cut"] is None else r["kept"] for r in release]
    order = np.random.default_rng(1).permutation(len(shares))
    assert sorted(order.tolist()) == list(range(60))  # every share is dealt out once
    moved = 0
    for r, share in zip(dealt, (shares[i] for i in order)):
        ends = [b / r["blocks"][-1][1] for _, b in r["blocks"]]
        if share is None:
            assert r["cut"] is None and r["kept"] == 1
        else:
            assert abs(r["kept"] - share) == pytest.approx(
                min(abs(e - share) for e in ends)
            ) and (r["cut"] is None) == (r["kept"] == 1)
            moved += r["cut"] is not None
        assert sum(r["weights"]) == pytest.approx(len(r["weights"]))
    assert moved > 10
    kept, dealt_kept = (np.sort([r["kept"] for r in rows]) for rows in (release, dealt))
    assert np.abs(kept - dealt_kept).mean() < 0.15


def test_shuffled_is_not_continued_with_more_rollouts(student, tmp_path, capsys):
    pairs = some(student, 12)
    cut(write(student, tmp_path, pairs[:8]), tmp_path / "w.jsonl", "shuffled")
    cut(write(student, tmp_path, pairs[:8]), tmp_path / "release.jsonl")
    flags = write(student, tmp_path, pairs)  # the files have grown
    message = refusal(
        main, argv("cut", **flags, rule="shuffled", out=tmp_path / "w.jsonl"), capsys
    )
    assert "of_rollouts = 8, now it is 12" in message
    assert len(cut(flags, tmp_path / "release.jsonl")[1]) == 12


# ---- refusals and resume


def support(r, k, value):
    return {
        name: records.pack(np.full((len(r["response_ids"]), k), value, np.float32))
        for name in ("ids", "logprobs")
    }


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda r, s: s.pop("topk"), ["s.jsonl:2: topk: expected", "missing"]),
        (lambda r, s: s.pop("topk_of"), ["s.jsonl:2: topk_of: expected " + STUDENT, "missing"]),
        (
            lambda r, s: s.update(topk_of="0ther"),
            ["s.jsonl:2: topk_of: expected " + STUDENT, "got 0ther"],
        ),
        (
            lambda r, s: s.update(topk=support(r, 1, -1)),
            ["s.jsonl:2: topk: expected at least 2 tokens", "got 1"],
        ),
        (
            lambda r, s: s.update(topk=support(r, 4, -np.inf)),
            [
                "s.jsonl:2: topk: expected at least 2 tokens a position with finite log-probs",
                "not all of them finite",
            ],
        ),
        (
            lambda r, s: s.update(rollout="0ther"),
            ["s.jsonl:2: rollout: expected", "got 0ther"],
        ),
        (
            lambda r, s: r["policy"].update(vocabulary="0ther"),
            ["r.jsonl:2: policy.vocabulary: expected", "got 0ther"],
        ),
        (
            lambda r, s: r["policy"].update(weights=None),
            ["s.jsonl:2: topk_of: expected None", f"got {STUDENT}"],
        ),
    ],
)
def test_scores_of_something_else_are_refused(student, tmp_path, capsys, break_it, words):
    pairs = some(student, 3)
    pairs[1][0]["policy"] = dict(pairs[1][0]["policy"])
    break_it(*pairs[1])
    for command in (
        argv("cut", rule="release", out=tmp_path / "w.jsonl"),
        argv("null", out=tmp_path / "n.json"),
    ):
        message = refusal(main, command + argv(**write(student, tmp_path, pairs)), capsys)
        assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "rule, flags, words",
    [
        ("release", {"tokens": 3}, "--tokens"),
        ("release", {"seed": 3}, "--seed"),
        ("boost", {"no_rescale": True}, "--no-rescale"),
        ("all", {"cap": 3}, "--cap"),
        ("fixed", {"tokens": 3, "guard": True}, "--guard"),
        ("fixed", {"tokens": 3, "signal": "margin"}, "--signal"),
        ("no-end", {"scores": "S"}, "--scores"),
        ("no-end", {"model": "M"}, "--model"),
        ("all", {"block_end": "x"}, "--block-end"),
        ("fixed", {}, "--tokens: --rule fixed needs it"),
        ("release", {"model": "M"}, "--scores: --rule release needs it"),
        ("fixed", {"tokens": 0}, "--tokens: expected at least 1"),
        ("fixed", {"tokens": 3, "cap": 0.5}, "--cap: expected 0 or"),
        ("fixed", {"tokens": 3, "cap": 20, "no_rescale": True}, "--cap: bounds the scale"),
    ],
)
def test_a_flag_belongs_to_the_rules_that_read_it(
    student, tmp_path, capsys, rule, flags, words
):
    rollouts = write(student, tmp_path, some(student, 2))["rollouts"]
    message = refusal(
        main,
        argv("cut", rollouts=rollouts, rule=rule, out=tmp_path / "w.jsonl", **flags),
        capsys,
    )
    assert words in message and not (tmp_path / "w.jsonl").exists()


def test_a_damaged_expression_and_another_rule_are_refused(student, tmp_path, capsys):
    flags = write(student, tmp_path, some(student, 3))
    assert "--block-end (: expected a regular expression" in refusal(
        main,
        argv("cut", **flags, rule="release", out=tmp_path / "w", block_end="("),
        capsys,
    )
    cut(flags, tmp_path / "w.jsonl")
    assert "guard = false, now it is true" in refusal(
        main,
        argv("cut", **flags, rule="release", guard=True, out=tmp_path / "w.jsonl"),
        capsys,
    )


def test_a_killed_run_is_completed_to_the_same_bytes(student, tmp_path):
    flags = write(student, tmp_path, some(student, 10))
    cut(flags, tmp_path / "whole.jsonl", "shuffled", seed=3)
    command = dict(rule="shuffled", seed=3, out=tmp_path / "killed.jsonl")
    kill_while_writing("weigh", argv("cut", **flags, **command), after=4)
    torn = (tmp_path / "killed.jsonl").read_bytes()
    assert torn.count(b"\n") == 4 and not torn.endswith(b"\n")
    main(argv("cut", **flags, **command))
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ---- nulls


def test_null_orders_are_permutations_and_runs_stay_together():
    rng = np.random.default_rng(7)
    for n in (1, 2, 5, 16, 30):
        for order in NULLS.values():
            assert sorted(order(n, rng).tolist()) == list(range(n))
    run, together = 4, [block_shuffled(16, rng) for _ in range(20)]
    assert (
        all(
            (o.reshape(-1, run) == o.reshape(-1, run)[:, :1] + np.arange(run)).all()
            for o in together
        )
        and len({tuple(o) for o in together}) > 5
    )


def test_block_shuffling_keeps_autocorrelation_that_permuting_destroys():
    series = list(ar1(np.random.default_rng(8), 150, 49, 0.8))
    found = against_nulls(series, [np.ones(49)] * 150, 3, 0)["faithful"]
    assert (
        found["real"]["lag1"] > found["block_shuffled"]["lag1"] > 0.5
        and abs(found["permuted"]["lag1"]) < 0.06
    )
    # one null holds what the other does not see
    assert found["permuted"]["cut_rate"] < 0.12 < found["block_shuffled"]["cut_rate"]


def test_a_true_drop_is_told_from_chance_and_noise_is_not():
    rng, sizes = np.random.default_rng(9), [np.full(25, 2)] * 200
    noise = list(rng.normal(2, 0.3, (200, 25)))
    dropped = [s + 0.6 * (np.arange(25) < 8) for s in noise]
    for rule in ("faithful", "guarded"):
        real, chance = (against_nulls(series, sizes, 8, 0)[rule] for series in (dropped, noise))
        for null in NULLS:
            assert (
                real["real"]["cut_rate"] > real[null]["cut_rate_high"] + 0.2
                and real[null]["reach_real"] == 0
            )
            assert (
                real["real"]["strong"] > real[null]["strong"]
                and real["real"]["gain_mean"] > real[null]["gain_mean"]
            )
            assert abs(chance["real"]["cut_rate"] - chance[null]["cut_rate"]) < 0.07
        assert (
            real["real"]["position_tokens"]
            == pytest.approx(8 / 25, abs=0.05)
            == real["real"]["position_blocks"]
        )


@pytest.mark.parametrize(
    "text, slip",
    [
        ("7+5=12\n12-3=9\n9+8=17\n#17", None),
        ("7+5=12\n12-3=8\n8+8=16\n#16", 1),
        ("7+5=13\n13-3=10\n#10", 0),
        ("7+5=12\n12-3=9\n#8", None),
        ("7+5=12\n13-3=10\n", 1),
        ("7+5=12\n12+8=20\n", 1),
        ("8+5=13\n", 0),
        ("7+5=12\n12-3=9\n9+8=17\n17+1=18\n", 3),
        ("7\n+5:12\n-3:8\n", 2),
        ("7\n+5:12\n-3:9\n", None),
        ("7,12,9,16\n#16", 0),
        ("7,12,9,17\n#17", None),
        ("7+5=12-3=9+8=18\n#18", 0),
        ("#17", None),
        ("", None),
    ],
)
def test_first_slip(text, slip):
    assert first_slip("7+5-3+8=?", text.splitlines(keepends=True)) == slip


def test_cuts_at_slips_are_told_from_cuts_anywhere():
    rng, n = np.random.default_rng(10), 20
    slips = rng.integers(2, 16, 150).tolist()
    sizes = [rng.integers(2, 6, n) for _ in slips]
    follow = [rng.normal(2, 0.1, n) + (np.arange(n) < slip) for slip in slips]
    elsewhere = [
        rng.normal(2, 0.1, n) + (np.arange(n) < place) for place in rng.permutation(slips)
    ]
    found = about_slips(follow, sizes, slips, True, 0)
    assert (
        found["slips"] == 150
        and found["cuts"] > 140
        and found["real"] > 0.95
        and found["low"] > 0.2
        and found["low"] < found["difference"] < found["high"]
    )
    found = about_slips(elsewhere, sizes, slips, True, 0)
    assert found["low"] < 0 < found["high"] and found["high"] - found["low"] < 0.4
    none = about_slips(follow, sizes, [None] * 150, True, 0)
    assert (none["slips"], none["cuts"], none["real"], none["low"]) == (0, 0, None, None)


def test_dealt_cuts_land_as_the_rule_shuffled_lands_them():
    """The two comparisons of about_slips against dealing shares out with nearest_cut."""
    rng, series, sizes, slips = np.random.default_rng(11), [], [], []
    for _ in range(25):
        n = int(rng.integers(1, 9))
        series.append(rng.normal(2, 0.1, n) + (np.arange(n) < rng.integers(1, n + 1)))
        sizes.append(rng.integers(2, 9, n))
        slips.append(int(rng.integers(0, n)))
    shares = [
        kept_shares(size)[k - 1] for s, size in zip(series, sizes) if (k := bic_cut(s)[0])
    ]
    # every deal at once
    landed = [(nearest_cut(p, size), slip) for size, slip in zip(sizes, slips) for p in shares]
    want = np.mean([k >= slip for k, slip in landed if k])
    assert len(shares) > 5 and about_slips(series, sizes, slips, False, 0, draws=2)[
        "shuffled"
    ] == pytest.approx(want, abs=0.04)


def test_the_null_command(student, tmp_path, capsys):
    rng, pairs, prompts = np.random.default_rng(12), [], []
    terms = [7, 5, -3, 8, -2, 4, 1, -6, 3, 2]
    for i in range(24):
        slip = int(rng.integers(1, 8)) if i % 4 else None
        totals = (np.cumsum(terms) + (0 if slip is None else np.arange(10) > slip)).tolist()
        text = sums.write_work(terms, totals, "lines")
        lines = text.replace("\n#", "#").replace("#", "\n#").split("\n")
        # "\n#" is one token and ends the block before
        sizes = [len(line) + 1 for line in lines[:-2]] + [len(lines[-2]) + 1, len(lines[-1])]
        series = rng.normal(1, 0.05, len(lines)) + (np.arange(len(lines)) < (slip or 99))
        pairs.append(pair(student, text, np.repeat(np.expm1(series), sizes), i))
        prompts.append({"id": f"p{i:04d}", "messages": sums.question(terms)})
    flags = write(student, tmp_path, pairs) | {"prompts": dump(tmp_path / "p.jsonl", prompts)}
    result = main(
        argv("null", **flags, out=tmp_path / "n.json", plot=tmp_path / "n.png", repeats=3)
    )
    shown = capsys.readouterr().out
    assert (
        json.loads((tmp_path / "n.json").read_text()) == result
        and (tmp_path / "n.png").read_bytes()[:4] == b"\x89PNG"
    )
    assert (
        f"faithful: real {result['detector']['faithful']['real']['cut_rate']:.1%} cut" in shown
        and result["rollouts"] == 24
    )
    assert [row["count"] for row in result["by_block"]] == [24] * 10 and result["by_block"][0][
        "mean"
    ] == pytest.approx(2, abs=0.1)
    assert (
        result["slip"]["faithful"]["slips"] == 18
        and result["slip"]["faithful"]["real"] > 0.9 > result["slip"]["faithful"]["shuffled"]
    )
    offsets = {row["at"]: row for row in result["slip"]["by_offset"]}
    assert (
        offsets[-1]["mean"] == pytest.approx(2, abs=0.1)
        and offsets[0]["mean"] == pytest.approx(1, abs=0.1)
        and offsets[0]["count"] == 18
    )
    assert offsets[0]["no_slip"] == pytest.approx(2, abs=0.1)
    assert "exists already" in refusal(
        main, argv("null", **flags, out=tmp_path / "n.json"), capsys
    )
    again = main(argv("null", **flags, out=tmp_path / "n.json", repeats=3, overwrite=True))
    assert again == result
    dump(tmp_path / "p.jsonl", prompts[:3] + [{"id": "p0003", "prompt": "Why?"}] + prompts[4:])
    assert "p.jsonl:4: expected a running sum" in refusal(
        main, argv("null", **flags, out=tmp_path / "m.json"), capsys
    )
    dump(tmp_path / "p.jsonl", prompts[:3])
    assert (
        "p.jsonl: expected a running sum such as 7+5-3=? for id 'p0003', got 'no such prompt'"
        in refusal(main, argv("null", **flags, out=tmp_path / "m.json"), capsys)
    )
