"""The side-by-side measurements still run: on toy models, in seconds, without the peers."""

import json

import pytest
from conftest import argv, load, run_program

import bench.faults
import bench.gpu
import bench.round
import rollout  # noqa: F401
import teacher  # noqa: F401
import train  # noqa: F401
from bench import sampler


def run(module, *words, **flags):
    done = run_program("-m", [module, *words, *argv(**flags)])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_round_is_measured_part_by_part_and_tabulated(world, tmp_path):
    out = tmp_path / "round.jsonl"
    flags = dict(model=world.base, prompts=world.prompts, max_tokens=8, repeats=1, out=out)
    run("bench.round", "--trl", "--forms", "one-process", **flags)
    rows = load(out)
    assert [(r["round"], r["contender"]) for r in rows] == [(n, "one-process") for n in (1, 2)]
    counted = {"startup", "load", "generate", "gradient", "optimiser", "jsonl", "save"}
    for r in rows:
        parts = r["parts"]
        assert counted <= parts.keys() and r["tokens"] > 0
        assert min(parts.values()) >= 0 and sum(parts.values()) <= r["seconds"] + 0.05
        assert min(parts[name] for name in ("startup", "generate", "gradient", "save")) > 0, (
            "a stage's function was renamed and is no longer timed"
        )
        assert str(world.base) not in json.dumps(r)
    assert "| one-process | 1 |" in run("bench.round", "table", out)


@pytest.mark.parametrize("name", [name for part in bench.round.PARTS.values() for name in part])
def test_what_a_round_is_measured_by_is_there(name):
    """...in the modules that the three stages load: another name would not be timed."""
    home, attribute = bench.round.place_of(name)
    assert callable(getattr(home, attribute))


def test_kernels_are_measured_and_claims_printed(tmp_path):
    out = tmp_path / "kernel.jsonl"
    small = dict(shapes="64x16x512", dtypes="bfloat16", kinds="logp", repeats=1)
    run("bench.kernel", out=out, **small)
    text = run("bench.kernel", "table", out)
    assert "64x16x512, bfloat16 | logp | ours_slices" in text
    claims = [line for line in text.splitlines() if "bfloat16: log-probs within 1e-4" in line]
    assert claims[0].endswith("| holds |")


def test_a_train_step_is_measured_round_by_round(world, tmp_path):
    out = tmp_path / "step.jsonl"
    small = dict(kernels="torch", dtypes="bfloat16", rollouts=2, length=20, micro_batch=1)
    run("bench.train_step", model=world.base, out=out, **small, rounds=2, turns=1)
    assert [row["round"] for row in load(out)] == [1, 2]
    assert all(row["peak_mb"] > 50 for row in load(out))


def test_the_gpu_checks_run_in_miniature_where_there_is_no_gpu(tmp_path, capsys):
    out = tmp_path / "gpu.jsonl"
    bench.gpu.main(["--smoke", "--sections", "triton", "kernel", "--out", str(out)])
    rows = load(out)
    assert {row["section"] for row in rows} == {"triton", "kernel"}
    assert not any("error" in row for row in rows)
    ours = [row for row in rows if row.get("contender", "").startswith("ours_s")]
    assert ours[0]["error_logp"] < 1e-4
    assert "| 64x16x512 | ours_slices |" in capsys.readouterr().out


def test_a_few_faults_are_survived(tmp_path, capsys):
    out = tmp_path / "faults.jsonl"
    assert (
        bench.faults.main(["--short", "--sections", "kills", "races", "--out", str(out)]) == 0
    )
    rows = load(out)
    assert {row["fault"] for row in rows} == {"kill", "race of two"}
    assert all(row["survived"] == row["injected"] > 0 for row in rows)
    assert "| kill | opd.files.fill, rollout.py," in capsys.readouterr().out


@pytest.mark.parametrize("contender", sampler.CONTENDERS)
def test_both_samplers_make_all_tokens_and_ours_says_the_trainers_log_probs(
    world, capsys, contender
):
    sampler.run(str(world.base), "float32", "cpu", contender, 5)
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == sampler.ROWS * 5
    assert found.get("gap", 0) < 2e-5
    row = sampler.row_of(
        contender, [found, found | {"seconds": 2 * found["seconds"]}], "m", "f"
    )
    assert row["tokens_a_second"] == pytest.approx(
        0.75 * found["tokens"] / found["seconds"], 1e-3
    )
