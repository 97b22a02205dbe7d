"""Power cuts, damaged checkpoints, two trainers in one folder, and the ends a program can come
to: nothing is lost, doubled, mixed or taken for finished."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import ROOT, argv, load, refusal

import train
from bench.power_cut import Recorder
from opd import cli, disk, files, judge, trainer
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

    def die(old, new, real=disk.rename_durably):
        if old.name == "final":
            raise Killed
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "rename_durably", die)
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


def test_folders_of_an_earlier_version_have_no_list_and_are_gone_on_from(
    world, interrupted, undisturbed, monkeypatch, capsys
):
    resumed = []

    def note(run, folder, *rest, real=trainer.Run._resume):
        resumed.append(folder.name)
        real(run, folder, *rest)

    monkeypatch.setattr(trainer.Run, "_resume", note)
    for path in interrupted.with_name("m.partial").glob("*/trainer/files.json"):
        path.unlink()
    train.main(flags(world, interrupted))
    assert resumed == ["step-4"] and content(interrupted) == undisturbed
    (interrupted / "trainer" / "files.json").unlink()
    train.main(flags(world, interrupted))
    assert "complete already" in capsys.readouterr().out


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
    lock = disk.open_locked(tmp_path / "m.lock")
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
    before = (out / "model.safetensors").read_bytes()
    for _ in range(2):
        killed(monkeypatch, flags(world, out, overwrite=True))
        kept = out.with_name("m.partial") / "replaced" / "model.safetensors"
        assert kept.read_bytes() == before and not out.exists()
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


# ---- the ends of a program


def test_left_over_failures_are_exit_code_3():
    for summary in ({"failed": 0}, {}, None):
        cli.run(lambda: summary)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: {"failed": 2})
    assert end.value.code == 3


def started(code, **more):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    words = [sys.executable, *(code if isinstance(code, list) else ["-c", code])]
    # what a shell starts with & ignores Ctrl-C
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(words, cwd=ROOT, preexec_fn=heed, **pipes, **more)


TALK = """
import time
from opd import cli
def main():
    for i in range(100_000):
        print("é", i, flush=True)
        time.sleep(0.001)
cli.run(main)
"""


@pytest.mark.parametrize("code, number", [(130, signal.SIGINT), (143, signal.SIGTERM)])
def test_a_signal_says_how_to_go_on(code, number):
    with started(TALK) as process:
        process.stdout.readline()
        process.send_signal(number)
        errors = process.stderr.read()
    assert process.returncode == code
    assert errors == "stopped; run the same command again to go on\n"


def test_a_closed_pipe_and_an_ascii_terminal_are_no_traceback():
    with started(TALK, env=os.environ | {"PYTHONIOENCODING": "ascii"}) as process:
        assert process.stdout.readline() == "\\xe9 0\n"
        process.stdout.close()  # | head -1
        errors = process.stderr.read()
    assert process.returncode == 141
    assert errors.count("\n") == 1 and errors.startswith("stopped: nobody reads"), errors


def test_ctrl_c_while_a_stage_is_loading_is_no_traceback():
    with started(["train.py", "--help"]) as process:
        maps = f"/proc/{process.pid}/maps"
        while process.poll() is None and "libtorch" not in open(maps).read():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == -signal.SIGINT
    assert errors == "stopped before anything began\n"


WRITERS = {
    "train": lambda out, words: train.main(words),
    "writer": lambda out, words: files.Writer(out, "rewards", {}),
    "cache": lambda out, words: judge.Cache(out).put("key", "reply"),
}


# not even root makes a file in /sys; 250: longer than a name may be with what stands beside it
@pytest.mark.parametrize("place", ["/sys/m", "x" * 250, "x" * 500])
@pytest.mark.parametrize("name", WRITERS)
def test_a_place_that_cannot_be_written_is_one_line(world, tmp_path, capsys, name, place):
    out = tmp_path / place
    if (name, len(place)) != ("cache", 250):
        refusal(lambda words: WRITERS[name](out, words), flags(world, out), capsys)


def test_a_full_disk_while_saving_is_one_line_and_loses_nothing(
    world, interrupted, undisturbed, tmp_path
):
    """A file may not grow beyond a limit: the same failure as a full disk."""
    words = flags(world, interrupted)
    for limit in (1000, 3000, 30_000):
        log = tmp_path / "stderr"
        child = os.fork()
        if not child:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 2)
                sys.stderr = file
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                try:
                    cli.run(lambda: train.main(words))
                except SystemExit as end:
                    file.flush()
                    os._exit(end.code)
                finally:
                    os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        assert log.read_text().startswith("error: ") and log.read_text().count("\n") == 1
    train.main(words)
    assert content(interrupted) == undisturbed
