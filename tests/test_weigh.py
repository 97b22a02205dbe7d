"""methods.prefix: cuts are those of the published rule, weights keep what they promise; its
controls; experiments.prefix_null: nulls tell a drop from chance."""

import json
import math
import re

import numpy as np
import pytest
from conftest import argv, dump, load, refusal

from experiments import prefix_null, weight_controls
from experiments.prefix_null import (
    NULLS,
    about_slips,
    against_nulls,
    block_shuffled,
    first_slip,
    linear_trend,
    permuted,
)
from methods import prefix
from methods.prefix import bic_cut, block_spans, margins, token_weights
from opd import policy as policies
from opd import records
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
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if finish == "stop":
        ids.append(tokenizer.eos_token_id)
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
        "topk": pack_support(top),
        "topk_of": STUDENT,
    }
    return r, s


def pack_support(logprobs):
    ids = np.broadcast_to(np.arange(np.shape(logprobs)[1]), np.shape(logprobs))
    ids = ids.astype(np.uint16)
    return {"ids": records.pack(ids), "logprobs": records.pack(np.float32(logprobs))}


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


def some(student, count):
    """Pairs of random series, about two thirds with a cut: a large drop, a small one or none, 1
    to 14 blocks."""
    rng, out = np.random.default_rng(0), []
    for i in range(count):
        n = int(rng.integers(1, 15))
        s = rng.normal(2, 0.2, n)
        s[: rng.integers(1, n + 1)] += rng.choice([0, 0.4, 2])
        out.append(planted(student, s, rng.integers(2, 7, n), i))
    return out


def weigh(flags, out, **more):
    return prefix.main(argv("weigh", **flags, out=out, **more)), load(out)


def control(rule, rollouts, out, **more):
    flags = argv(rule=rule, rollouts=rollouts, out=out, **more)
    return weight_controls.main(flags), load(out)


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


@pytest.mark.parametrize("guard", [False, True])
def test_the_cut_is_that_of_a_loop_over_all_splits(guard):
    rng, cuts = np.random.default_rng(1), 0
    edges = [[2.0, 1.0], [2.0, 1.0] * 6, [5.0]]
    for i in range(300):
        n = int(rng.integers(1, 25))
        # a large mean: running sums must not lose the differences
        series = rng.normal(1000, 1, n)
        series[: rng.integers(0, n)] += rng.choice([0, 1, 3])
        series = edges[i] if i < len(edges) else series.tolist()
        kept, bic0, bic1 = bic_cut(series, guard)
        want = naive_cut(series, guard)
        cuts += kept is not None
        assert kept == want[0] and (bic1 is None) == (want[2] is None)
        numbers = [want[1], want[2] or 0]
        np.testing.assert_allclose([bic0, bic1 or 0], numbers, rtol=1e-4, atol=1e-4)
    assert bic_cut([], guard)[0] is None is bic_cut([0.1] * 12, guard)[0]
    assert 50 < cuts < 250


# ---- blocks and signals


def test_margins_depend_on_no_order():
    assert margins([[-4, -1, -1.5], [-1.5, -4, -1]]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "pieces, mask, want",
    [
        (["7", "\n", "#7", "<|end|>"], [1] * 4, [[0, 2], [2, 4]]),
        (["7", "+5=12", "\n", "\n#", "12", "<|end|>"], [1] * 6, [[0, 4], [4, 6]]),
        # several in a token: one end; in neighbours: the last
        (["7\n\n5\n8", "\n", "\n", "9\n"], [1] * 4, [[0, 1], [1, 3], [3, 4]]),
        # a token of no characters holds no end
        (["", "7\n", "", "8"], [1] * 4, [[0, 2], [2, 4]]),
        # a masked block joins its predecessor ...
        (["7\n", "x\n", "8\n"], [1, 0, 1], [[0, 2], [2, 3]]),
        # ... the first ones their successor
        (["x\n", "y\n", "8\n"], [0, 0, 1], [[0, 3]]),
        (["7\n", "x\n"], [0, 0], []),
    ],
)
def test_blocks(pieces, mask, want):
    assert block_spans(pieces, mask, NEWLINE) == want


# ---- weights


def test_a_rollout_keeps_its_units_of_loss_below_the_cap():
    rng, capped = np.random.default_rng(6), 0
    for _ in range(200):
        mask = rng.integers(0, 2, rng.integers(2, 60))
        mask[[0, -1]] = 1
        kept = np.arange(len(mask)) < rng.integers(1, len(mask) + 1)
        for cap in (8, 1, 0):
            weights, share, scale = token_weights(mask, kept, cap)
            assert share == pytest.approx((mask * kept).sum() / mask.sum())
            assert (weights == np.where(kept, scale, 0)).all()
            units = min(1, (cap or math.inf) * share) * mask.sum()
            assert (mask * weights).sum() == pytest.approx(units)
            capped += cap == 8 == scale
    assert 5 < capped < 100


def test_release_cuts_where_the_margin_drops(student, tmp_path):
    high, low = [2.0, 2.1, 1.9], [0.1, 0.12, 0.1, 0.11, 0.1]
    pairs = [
        planted(student, high + low, [3, 2, 4, 5, 2, 2, 6, 3], 0),
        planted(student, low + high, [3] * 8, 1),
        planted(student, [2.0, 1.0], [3, 2], 2),
    ]
    flags = write(student, tmp_path, pairs)
    summary, rows = weigh(flags, tmp_path / "w.jsonl")
    assert [r["cut"] for r in rows] == [3, None, 1]
    assert rows[0]["weights"] == pytest.approx([3.0] * 9 + [0.0] * 18)
    assert rows[1]["weights"] == [1.0] * 24
    assert rows[0]["signal"] == pytest.approx(high + low, abs=1e-5)
    assert [b for _, b in rows[0]["blocks"]] == [3, 5, 9, 14, 16, 18, 24, 27]
    want = {
        "cut_rate": 2 / 3,
        "kept_median": (1 / 3 + 0.6) / 2,
        "kept_mean": (1 / 3 + 1 + 0.6) / 3,
        "scale_max": 3,
        "scale_mean": (3 + 1 + 5 / 3) / 3,
        "capped": 0,
        "first_block": 0.5,
    }
    assert {name: summary[name] for name in want} == pytest.approx(want)
    summary, rows = weigh(flags, tmp_path / "capped.jsonl", cap=2)
    assert rows[0]["weights"] == [2] * 9 + [0] * 18 and summary["capped"] == 1
    _, rows = weigh(flags, tmp_path / "guarded.jsonl", guard=True)
    assert [r["cut"] for r in rows] == [3, None, None]


def test_merged_line_breaks_and_masked_tokens_are_read_from_the_tokens(student, tmp_path):
    """ "\\n\\n" and "\\n#" are one token each here; a masked token's margin counts nowhere."""
    # 1, 2, line breaks, 3, break with #, 3, end
    masked = pair(student, "12\n\n3\n#3", [4, 4, 4, 1, 1, 99, 1], mask=[1, 1, 1, 1, 1, 0, 1])
    _, rows = weigh(write(student, tmp_path, [masked]), tmp_path / "w.jsonl")
    assert rows[0]["blocks"] == [[0, 3], [3, 5], [5, 7]]
    assert rows[0]["signal"] == pytest.approx(np.log1p([4, 1, 1]), abs=1e-5)
    # 6 loss tokens, 3 kept
    assert rows[0]["cut"] == 1 and rows[0]["weights"] == [2.0] * 3 + [0.0] * 4


def test_spread_is_of_the_sampled_path_and_needs_no_support(student, tmp_path):
    flat, wild = [-2.0] * 4, [-1.0, -3.0, -1.0, -3.0]
    r, s = pair(student, "111\n111\n111", [0.0] * 12, logprobs=wild + flat + flat)
    del s["topk"], s["topk_of"]
    _, rows = weigh(write(student, tmp_path, [(r, s)]), tmp_path / "w.jsonl", signal="spread")
    assert rows[0]["signal"] == [1, 0, 0] and rows[0]["cut"] == 1


# ---- controls


def test_suffix_and_boost_follow_release(student, tmp_path):
    flags = write(student, tmp_path, some(student, 30))
    made = tmp_path / "release.jsonl"
    release = weigh(flags, made)[1]
    suffix, boost = (
        control(rule, flags["rollouts"], tmp_path / rule, weights=made)[1]
        for rule in ("suffix", "boost")
    )
    assert 5 < sum(r["cut"] is not None for r in release) < 30
    for rows in zip(release, suffix, boost):
        w, v, u = (np.array(r["weights"]) for r in rows)
        if rows[0]["cut"] is None:
            assert (w == 1).all() and (v == 1).all() and (u == 1).all()
        else:
            assert ((w > 0) ^ (v > 0)).all() and (u == np.where(w > 0, w, 1)).all()
            assert w.sum() == pytest.approx(len(w)) == pytest.approx(v.sum())


def test_controls_that_need_no_weights(student, tmp_path):
    pairs = [
        pair(student, "7+5=12", [1] * 7, 0, mask=[1, 0, 1, 1, 1, 0, 1]),
        pair(student, "7+", [1] * 2, 1, finish="length"),
        pair(student, "", [], 2, finish="length"),
        pair(student, "", [1], 3),
    ]
    rollouts = write(student, tmp_path, pairs)["rollouts"]
    # fixed: the third token is the second that bears loss
    for rule, flags, first, rest, kept in (
        ("no-end", {}, [1] * 6 + [0], [[1] * 2, [], [0]], [4 / 5, 1, 1, 0]),
        ("fixed", dict(tokens=2), [2.5] * 3 + [0] * 4, [[1] * 2, [], [1]], [2 / 5, 1, 1, 1]),
    ):
        _, rows = control(rule, rollouts, tmp_path / rule, **flags)
        assert [r["weights"] for r in rows] == [first, *rest]
        assert [r["kept"] for r in rows] == pytest.approx(kept)


def test_shuffled_deals_out_the_cuts_of_release(student, tmp_path, capsys):
    flags = write(student, tmp_path, some(student, 60))
    rollouts, made = flags["rollouts"], tmp_path / "release.jsonl"
    release = weigh(flags, made)[1]
    dealt, again = (
        control("shuffled", rollouts, tmp_path / name, seed=1, weights=made)[1] for name in "ab"
    )
    assert dealt == again
    shares = [None if r["cut"] is None else r["kept"] for r in release]
    order = np.random.default_rng(1).permutation(60)  # every share is dealt out once
    moved = 0
    for r, share in zip(dealt, (shares[i] for i in order)):
        if share is None:
            assert r["cut"] is None and r["kept"] == 1
        else:
            ends = [b / r["blocks"][-1][1] for _, b in r["blocks"]]
            gap = min(abs(end - share) for end in ends)
            assert abs(r["kept"] - share) == pytest.approx(gap)
            assert (r["cut"] is None) == (r["kept"] == 1)
            moved += r["cut"] is not None
        assert sum(r["weights"]) == pytest.approx(min(1, 20 * r["kept"]) * len(r["weights"]))
    assert moved > 10
    # not continued with more rollouts; another command's weights are
    assert len(weigh(write(student, tmp_path, some(student, 61)), made)[1]) == 61
    command = argv(rule="shuffled", seed=1, rollouts=rollouts, weights=made, out=tmp_path / "a")
    assert "now it is 61" in refusal(weight_controls.main, command, capsys)


# ---- refusals


def support(r, k, value):
    return pack_support(np.full((len(r["response_ids"]), k), value))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r, s: s.pop("topk"), "s.jsonl:2: topk: expected"),
        (lambda r, s: s.pop("topk_of"), f"s.jsonl:2: topk_of: expected {STUDENT}"),
        (
            lambda r, s: s.update(topk=support(r, 1, -1)),
            "expected at least 2 tokens a position",
        ),
        (lambda r, s: s.update(topk=support(r, 4, -np.inf)), "of which 0.0% are finite"),
        (lambda r, s: s.update(rollout="0ther"), "s.jsonl:2: rollout: expected"),
        (lambda r, s: r["policy"].update(vocabulary="0ther"), "policy.vocabulary: expected"),
    ],
)
def test_scores_of_something_else_are_refused(student, tmp_path, capsys, change, words):
    pairs = some(student, 3)
    pairs[1][0]["policy"] = dict(pairs[1][0]["policy"])
    change(*pairs[1])
    flags = argv(**write(student, tmp_path, pairs))
    weights, null = argv(out=tmp_path / "w.jsonl"), argv(out=tmp_path / "n.json")
    assert words in refusal(prefix.main, ["weigh", *flags, *weights], capsys)
    assert words in refusal(prefix_null.main, flags + null, capsys)


def test_flags_out_of_range_and_another_rule_are_refused(student, tmp_path, capsys):
    flags = write(student, tmp_path, some(student, 3)) | {"out": tmp_path / "w.jsonl"}
    rollouts = argv(rollouts=flags["rollouts"], out=tmp_path / "c.jsonl")
    weighing = argv("weigh", **flags)
    prefix.main(weighing)
    for main, command, more, words in (
        (prefix.main, weighing, dict(block_end="("), "--block-end (: expected a regular"),
        (prefix.main, weighing, dict(cap=0.5), "--cap: expected 0 or"),
        (prefix.main, weighing, dict(guard=True), "guard = false, now it is true"),
        (weight_controls.main, rollouts, dict(rule="fixed"), "--tokens: expected at least 1"),
        (weight_controls.main, rollouts, dict(rule="boost"), "--weights: "),
    ):
        assert words in refusal(main, command + argv(**more), capsys)
    weight_controls.main([*rollouts, *argv(rule="fixed", tokens=2)])
    others = argv(rollouts=flags["rollouts"], weights=tmp_path / "c.jsonl", out=tmp_path / "d")
    for rule in ("shuffled", "boost"):
        message = refusal(weight_controls.main, others + argv(rule=rule), capsys)
        assert "c.jsonl:1: rule: expected release" in message


# ---- nulls


def test_nulls_are_permutations_and_block_shuffling_keeps_neighbours():
    rng = np.random.default_rng(7)
    for n in (1, 2, 5, 16):
        for null in (permuted, block_shuffled):
            s, size = null(np.arange(n), 100 + np.arange(n), rng)
            assert sorted(s.tolist()) == list(range(n)) and (size == 100 + s).all()
    every = np.arange(16)
    together = [block_shuffled(every, every, rng)[0].reshape(-1, 4) for _ in range(20)]
    assert all((runs == runs[:, :1] + np.arange(4)).all() for runs in together)
    assert len({tuple(runs.ravel()) for runs in together}) > 5


def test_the_linear_trend_null_keeps_the_fall_and_deals_the_rest_out():
    rng = np.random.default_rng(8)
    s = 3 - 0.1 * np.arange(12) + rng.normal(0, 0.05, 12)
    fit = np.polyfit(np.arange(12), s, 1)
    for _ in range(3):
        drawn, size = linear_trend(s, every := np.arange(12), rng)
        rest = drawn - np.polyval(fit, np.arange(12))
        np.testing.assert_allclose(sorted(rest), sorted(s - np.polyval(fit, np.arange(12))))
        assert (size == every).all() and not np.allclose(drawn, s)
    assert linear_trend(np.array([2.0]), np.array([1]), rng)[0].tolist() == [2.0]


def test_a_true_drop_is_told_from_chance_and_noise_is_not():
    rng, sizes = np.random.default_rng(9), [np.full(25, 2)] * 100
    noise = list(rng.normal(2, 0.3, (100, 25)))
    dropped = [s + 0.6 * (np.arange(25) < 8) for s in noise]
    found, chances = (against_nulls(series, sizes, 5, 0) for series in (dropped, noise))
    for rule in ("faithful", "guarded"):
        drop, chance = found[rule], chances[rule]
        real = drop["real"]
        for null in ("permuted", "block_shuffled"):
            assert real["cut_rate"] > drop[null]["cut_rate_high"] + 0.2
        for null in NULLS:
            assert real["gain_mean"] > drop[null]["gain_mean"]
            assert abs(chance["real"]["cut_rate"] - chance[null]["cut_rate"]) < 0.1
        assert real["position_tokens"] == pytest.approx(8 / 25, abs=0.05)


def test_a_steady_fall_is_told_from_disorder_but_not_from_a_trend():
    rng, sizes = np.random.default_rng(11), [np.full(25, 2)] * 100
    falling = list(rng.normal(2, 0.3, (100, 25)) - 0.03 * np.arange(25))
    for found in against_nulls(falling, sizes, 5, 0).values():
        real, trend = found["real"], found["linear_trend"]
        assert real["cut_rate"] > found["permuted"]["cut_rate_high"] + 0.2
        assert abs(real["cut_rate"] - trend["cut_rate"]) < 0.1
        assert real["gain_mean"] == pytest.approx(trend["gain_mean"], rel=0.3)


@pytest.mark.parametrize(
    "text, slip",
    [
        ("7+5=12\n12-3=9\n9+8=17\n#17", None),
        ("7+5=12\n12-3=8\n8+8=16\n#16", 1),
        ("7+5=12\n12-3=9\n#8", None),
        ("7+5=12\n13-3=10\n", 1),
        ("7\n+5:12\n-3:8\n", 2),
        ("7,12,9,16\n#16", 0),
        ("7+5=12-3=9+8=18\n#18", 0),
        ("", None),
    ],
)
def test_first_slip(text, slip):
    assert first_slip("7+5-3+8=?", text.splitlines(keepends=True)) == slip


def test_cuts_at_slips_are_told_from_cuts_anywhere():
    rng, n = np.random.default_rng(10), 20
    slips = rng.integers(2, 16, 150).tolist()
    sizes = [rng.integers(2, 6, n) for _ in slips]
    follow, elsewhere = (
        [rng.normal(2, 0.1, n) + (np.arange(n) < place) for place in places]
        for places in (slips, rng.permutation(slips))
    )
    found = about_slips(follow, sizes, slips, True, 0)
    assert found["slips"] == 150 and found["cuts"] > 140 and found["real"] > 0.95
    assert found["difference"] == found["real"] - found["shuffled"] > 0.3
    found = about_slips(elsewhere, sizes, slips, True, 0)
    assert abs(found["difference"]) < 0.15
    none = about_slips([np.ones(3)], [np.ones(3)], [1], True, 0)
    assert (none["slips"], none["cuts"], none["real"], none["difference"]) == (1, 0, None, None)


def slipping(student, rng, number, slip):
    """A rollout of ten lines of a sum whose totals are wrong after block `slip`, where its
    margins fall."""
    terms = [7, 5, -3, 8, -2, 4, 1, -6, 3, 2]
    totals = np.cumsum(terms) + (0 if slip is None else np.arange(10) > slip)
    text = sums.write_work(terms, totals.tolist(), "lines")
    lines = text.replace("\n#", "#").replace("#", "\n#").split("\n")
    # "\n#" is one token and ends the block before
    sizes = [len(line) + 1 for line in lines[:-1]] + [len(lines[-1])]
    series = rng.normal(1, 0.05, len(lines)) + (np.arange(len(lines)) < (slip or 99))
    asked = {"id": f"p{number:04d}", "messages": sums.question(terms)}
    return pair(student, text, np.repeat(np.expm1(series), sizes), number), asked


def test_the_null_command(student, tmp_path, capsys):
    rng = np.random.default_rng(12)
    slips = [int(rng.integers(1, 8)) if i % 4 else None for i in range(24)]
    pairs, prompts = zip(*(slipping(student, rng, i, slip) for i, slip in enumerate(slips)))
    flags = write(student, tmp_path, pairs)
    flags |= {"prompts": dump(tmp_path / "p.jsonl", prompts), "repeats": 3}
    out, plot = tmp_path / "n.json", tmp_path / "n.png"
    result = prefix_null.main(argv(**flags, out=out, plot=plot))
    assert json.loads(out.read_text()) == result and plot.read_bytes()[:4] == b"\x89PNG"
    assert [row["count"] for row in result["by_block"]] == [24] * 10
    assert result["by_block"][0]["mean"] == pytest.approx(2, abs=0.1)
    slip = result["slip"]["faithful"]
    assert slip["slips"] == 18 and slip["real"] > 0.9 > slip["shuffled"]
    offsets = {row["at"]: row for row in result["slip"]["by_offset"]}
    means = [offsets[-1]["mean"], offsets[0]["mean"], offsets[0]["no_slip"]]
    assert means == pytest.approx([2, 1, 2], abs=0.1) and offsets[0]["count"] == 18
    assert "exists already" in refusal(prefix_null.main, argv(**flags, out=out), capsys)
    for fourth, words in (
        ([{"id": "p0003", "prompt": "Why?"}], "p.jsonl:4: expected a running sum"),
        ([], "for id 'p0003', got 'no such prompt'"),
    ):
        dump(flags["prompts"], [*prompts[:3], *fourth])
        command = argv(**flags, out=tmp_path / "m.json")
        assert words in refusal(prefix_null.main, command, capsys)
