"""The numbers of experiments/real_simct.py, by hand; its smoke run does the rest."""

import math

import numpy as np
import pytest
import torch
from conftest import argv, load, naive_own, refusal
from safetensors.torch import save_file

from experiments import real_simct
from opd import records
from opd.policy import load_tokenizer
from opd.trainer import MOMENTS


def test_bytes_are_counted_by_kind_and_by_whether_both_spell_them_alike(world):
    tokenizer = load_tokenizer(world.base)
    ids = tokenizer("7+5\n", add_special_tokens=False).input_ids
    assert len(ids) == 4
    scores = {("a", 0): {"units": [[0, 1, 0, 1], [1, 3, 1, 2]]}}
    found = real_simct.coverage(tokenizer, {("a", 0): {"response_ids": ids}}, scores)
    assert found == {
        "digits": {"bytes": 2, "strict": 0.5},
        "symbols": {"bytes": 1, "strict": 0.0},
        "spaces": {"bytes": 1, "strict": 0.0},
    }


def test_bits_a_byte_are_those_of_the_model(world, teacher64bit):
    rows = load(world.rollouts)
    settings = real_simct.Settings("student", "teacher", "prompts")
    found = real_simct.bits_a_byte(world.teacher, world.rollouts, world.prompts, settings)
    for prompt, bits in found.items():
        mine = [r for r in rows if r["id"] == prompt]
        nats = -sum(sum(naive_own(teacher64bit, r)) for r in mine)
        size = sum(len(r["text"].encode()) for r in mine)
        assert bits == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_a_character_of_two_tokens_is_one_character(monkeypatch):
    """Three bytes of a sign, of which the last token is a unit; then a byte of no character."""
    pieces = ["\u20ac".encode()[:1], "\u20ac".encode()[1:], b"\xff", b"7"]
    monkeypatch.setattr(real_simct, "pieces_of", lambda tokenizer, ids: pieces)
    scores = {("a", 0): {"units": [[1, 2, 0, 1], [3, 4, 1, 2]]}}
    found = real_simct.coverage(None, {("a", 0): {"response_ids": []}}, scores)
    assert found == {
        "digits": {"bytes": 1, "strict": 1.0},
        "other": {"bytes": 1, "strict": 0.0},
        "symbols": {"bytes": 3, "strict": 2 / 3},
    }


def test_what_is_seen_is_a_mean_over_units():
    p = np.array([[0.5, 0.25], [0.25, 0.25]]), np.array([[1.0, 0.0]])
    with np.errstate(divide="ignore"):
        packed = [records.pack(np.maximum(np.log(x), -1e9).astype(np.float32)) for x in p]
    scores = [{"unit_topk": {"logprobs": x}} for x in packed]
    assert real_simct.seen(scores) == pytest.approx((0.75 + 0.5 + 1) / 3)


def test_changes_are_of_the_same_prompts():
    bits = {"simple": {"a": 1.0, "b": 4.0}, "simct": {"a": 1.0, "b": 2.0}}
    found = real_simct.changes(bits | {"before": {"a": 2.0, "b": 4.0}})
    assert [found[arm]["mean"] for arm in ("before", "simple", "simct")] == [3.0, -0.5, -1.5]
    assert found["simct"]["minus simple"]["mean"] == -1.0


def test_too_few_prompts_are_refused(world, tmp_path, capsys):
    asked = len(load(world.prompts))
    paths = dict(student=world.base, teacher=world.teacher, prompts=world.prompts)
    sizes = dict(train_prompts=asked, test_prompts=3, out=tmp_path / "out")
    message = refusal(real_simct.main, argv(**paths, **sizes), capsys)
    assert f"expected {asked + 3} prompts" in message and f"got {asked}" in message


def test_the_cosine_is_over_all_first_moments(tmp_path):
    rng = np.random.default_rng(0)
    flat = []
    for name in "ab":
        arrays = {key: rng.normal(size=(3, 2)).astype(np.float32) for key in ("w", "v")}
        flat.append(np.concatenate([arrays[key].ravel() for key in ("w", "v")]))
        tensors = {f"exp_avg/{key}": torch.from_numpy(x) for key, x in arrays.items()}
        tensors["exp_avg_sq/w"] = torch.full((3, 2), 9.0)
        (tmp_path / name / MOMENTS).parent.mkdir(parents=True)
        save_file(tensors, tmp_path / name / MOMENTS)
    a, b = flat
    want = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert real_simct.cosine(tmp_path / "a", tmp_path / "b") == pytest.approx(want, rel=1e-5)
