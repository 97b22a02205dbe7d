"""The side-by-side measurements still run: on toy models, in seconds, without the peers."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def bench(*words):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_round_is_measured_part_by_part_and_tabulated(world, tmp_path):
    out = tmp_path / "round.jsonl"
    bench(
        "bench.round",
        "--model",
        world.base,
        "--prompts",
        world.prompts,
        "--max-tokens",
        8,
        "--repeats",
        1,
        "--forms",
        "one-process",
        "--trl",
        "--out",
        out,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["round"] for r in rows] == [1, 2] and all(
        r["contender"] == "one-process" and r["tokens"] > 0 for r in rows
    )
    for r in rows:
        parts = r["parts"]
        assert (
            parts["exit"] >= 0
            and parts["other"] >= 0
            and sum(parts.values()) <= r["seconds"] + 0.05
            and {"startup", "load", "generate", "gradient", "optimiser", "jsonl", "save"}
            <= parts.keys()
        )
        assert min(parts[name] for name in ("startup", "generate", "gradient", "save")) > 0, (
            "a stage's function was renamed and is no longer timed"
        )
        assert str(world.base) not in json.dumps(r)
    table = bench("bench.round", "table", out)
    assert "| one-process | 1 |" in table


def test_kernels_are_measured_and_claims_printed(tmp_path):
    out = tmp_path / "kernel.jsonl"
    bench(
        "bench.kernel",
        "--shapes",
        "64x16x512",
        "--dtypes",
        "bfloat16",
        "--repeats",
        1,
        "--out",
        out,
    )
    text = bench("bench.kernel", "table", out)
    assert "64x16x512, bfloat16 | kl | ours_slices" in text
    accuracy = next(
        line for line in text.splitlines() if "bfloat16: log-probs within 1e-4" in line
    )
    assert accuracy.endswith("| holds |")


def test_the_gpu_checks_run_in_miniature_where_there_is_no_gpu(tmp_path):
    out = tmp_path / "gpu.jsonl"
    sections = ("--sections", "triton", "kernel", "step")
    text = bench("bench.gpu", "--smoke", *sections, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["section"] for row in rows} == {"triton", "kernel", "step"}
    assert not any("error" in row for row in rows)
    ours = [row for row in rows if row.get("contender", "").startswith("ours_s")]
    assert ours[0]["error_logp"] < 1e-4 < rows[-1]["process_seconds"]["cpu"]
    assert "| 64x16x512 | ours_slices |" in text
