"""Power cuts, damaged checkpoints, two trainers in one folder, and the ends a program can come
to: nothing is lost, doubled, mixed or taken for finished."""

import json
import shutil

import pytest
from conftest import argv, load, refusal

import train
from bench.power_cut import Recorder
from opd import files, trainer
from opd.records import BadInput

STEPS = 5


def flags(world, out, **more):
    how = dict(method="sft", model=world.toy / "student", rollouts=world.toy / "clean.jsonl")
    how |= dict(steps=STEPS, save_every=1, batch_size=4, learning_rate=1e-3, out=out)
    return argv(**how | more)


def content(out):
    """The files of a run that must be equal, bit by bit."""
    paths = [p for p in sorted(out.rglob("*")) if p.suffix in (".safetensors", ".jsonl")]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in paths}


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "m"
    train.main(flags(world, out))
    found = content(out)
    assert len(found) == 3
    return found


class Killed(BaseException):
    pass


@pytest.fixture
def interrupted(world, tmp_path, monkeypatch):
    """A run that was killed while it wrote the finished model: step-3 and step-4 are there."""
    out = tmp_path / "m"
    killed(monkeypatch, flags(world, out))
    assert sorted(p.name for p in (tmp_path / "m.partial").glob("step-*")) == [
        "step-3",
        "step-4",
    ]
    return out


def killed(monkeypatch, words):
    """Runs train.py until it moves the finished model to its place."""

    def die(old, new, real=files.rename_durably):
        if old.name == "final":
            raise Killed
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(files, "rename_durably", die)
        with pytest.raises(Killed):
            train.main(words)


# ---- power cuts


def reward(number):
    row = {"id": number, "sample": 0, "reward": 0.5, "status": "ok", "rollout": "x"}
    return row | {"grader": "test"}


@pytest.mark.parametrize("seconds", [files.SYNC_SECONDS, 0])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_power_cut_loses_no_record_that_was_promised(
    tmp_path, monkeypatch, overwrite, seconds
):
    """seconds 0: every write is on the disk.  overwrite: old records of other settings."""
    monkeypatch.setattr(files, "SYNC_SECONDS", seconds)
    place = tmp_path / "runs"
    path = place / "x.jsonl"
    place.mkdir()

    def stage(first, again=False):
        """Twelve records, numbered from `first`, which is a setting."""
        keys = [(str(i), 0) for i in range(first, first + 12)]
        work = lambda missing: (reward(int(i)) for i, _ in missing)  # noqa: E731
        files.fill(path, "rewards", keys, work, {"first": first}, (), again)

    if overwrite:
        stage(100)
    with Recorder(place) as recorder:
        stage(0, overwrite)
    whole = path.read_bytes()
    for cut in recorder.cuts(30, seed=seconds):
        cut.restore(place)
        if cut.ended:
            assert path.read_bytes() == whole
        try:
            stage(0)
            assert path.read_bytes() == whole
        except BadInput as error:
            assert "was begun with first = 100" in str(error)
            assert [r["id"] for r in load(path)] == list(range(100, 112)), "still whole"


def test_a_power_cut_in_training_ends_in_the_same_bits(world, undisturbed, tmp_path):
    place = tmp_path / "runs"
    place.mkdir()
    words = flags(world, place / "m")
    with Recorder(place) as recorder:
        train.main(words)
    for cut in recorder.cuts(8, seed=0):
        cut.restore(place)
        if cut.ended:
            assert content(place / "m") == undisturbed
        train.main(words)
        assert content(place / "m") == undisturbed
        assert [path.name for path in place.iterdir()] == ["m"]


# ---- damage


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    "damaged, said",
    [
        (["step-4/model.safetensors"], "step-4/model.safetensors"),
        (["step-4/trainer/state.json"], "step-4/trainer/state.json"),
        (["step-4/trainer/files.json"], "step-4/trainer/files.json"),
        (["step-4/model.safetensors", "step-3/config.json"], "step-4/model.safetensors"),
        (["metrics.jsonl"], "step-4/../metrics.jsonl"),
        (["run.json"], ""),
        (["LATEST"], ""),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_an_older_one(
    world, interrupted, undisturbed, capsys, damaged, said
):
    for name in damaged:
        zero(interrupted.with_name("m.partial") / name)
    train.main(flags(world, interrupted))
    lines = [
        line for line in capsys.readouterr().out.splitlines() if "earlier checkpoint" in line
    ]
    assert len(lines) == bool(said) and said in "".join(lines)
    assert content(interrupted) == undisturbed


def test_a_finished_model_that_is_damaged_is_not_complete(
    world, interrupted, undisturbed, capsys, tmp_path
):
    words = flags(world, interrupted)
    partial = interrupted.with_name("m.partial")
    kept = shutil.copytree(partial, tmp_path / "kept")
    train.main(words)
    weights = interrupted / "model.safetensors"
    zero(weights)
    assert f"error: {weights}: expected" in refusal(train.main, words, capsys)
    shutil.copytree(kept, partial)  # as if the power had gone before it was removed
    train.main(words)
    assert f"{weights}: expected" in capsys.readouterr().out
    assert content(interrupted) == undisturbed and not partial.exists()
    (interrupted / "trainer" / "optimizer.safetensors").unlink()  # somebody saves room
    train.main(words)
    assert "complete already" in capsys.readouterr().out


# ---- one run a folder


def test_a_second_trainer_is_refused_until_the_first_has_ended(world, tmp_path, capsys):
    lock = files.open_locked(tmp_path / "m.lock")
    for more in ({}, {"overwrite": True}):
        message = refusal(train.main, flags(world, tmp_path / "m", **more), capsys)
        assert "another process is training into this folder" in message
    lock.close()  # as a kill does
    train.main(flags(world, f"{tmp_path}/m/"))
    assert {p.name for p in tmp_path.iterdir()} == {"m"}, "m/ is m"
    train.main(flags(world, tmp_path / "m"))
    assert "complete already" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_refused(world, interrupted, capsys):
    state = interrupted.with_name("m.partial") / "step-4" / "trainer" / "state.json"
    kept = json.loads(state.read_text())
    kept["run"]["flags"]["learning_rate"] = 1.0
    state.write_text(json.dumps(kept))
    message = refusal(train.main, flags(world, interrupted), capsys)
    assert message.startswith(
        f"error: {state}: holds another training run (learning_rate = 1.0"
    )


def test_overwrite_killed_in_the_middle_may_be_run_again(
    world, undisturbed, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "m"
    train.main(flags(world, out, steps=1))
    for end in (killed, killed):
        end(monkeypatch, flags(world, out, overwrite=True))
        assert not out.exists()
    train.main(flags(world, out, overwrite=True))
    assert content(out) == undisturbed and [p.name for p in tmp_path.iterdir()] == ["m"]
    inside = out.with_name("m.partial") / "step-1"
    shutil.copytree(out, inside)
    words = flags(world, out, overwrite=True, model=inside)
    assert "would delete" in refusal(train.main, words, capsys) and inside.exists()


def test_warnings_and_alarms_after_a_resume_are_those_of_an_undisturbed_run(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(trainer, "collapsed", lambda metrics, before: metrics["step_"] % 2)
    log = trainer.Run.log
    patched = lambda run, metrics: log(run, metrics | {"step_": run.step})  # noqa: E731
    monkeypatch.setattr(trainer.Run, "log", patched)

    def told():
        lines = capsys.readouterr().out.splitlines()
        return [line.partition("WARNING")[2] for line in lines if "WARNING" in line]

    train.main(flags(world, tmp_path / "whole"))
    whole = told()
    killed(monkeypatch, flags(world, tmp_path / "cut"))
    train.main(flags(world, tmp_path / "cut"))
    assert whole == told() and "in 2 of 5 steps" in whole[0]
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
