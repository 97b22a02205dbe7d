"""A few of the changed lines of tests/mutations.py, against the commands that read them."""

from pathlib import Path

import mutations
import pytest
from conftest import argv, dump, load, refusal

import rubric
import teacher
import train
from opd import files, records


@pytest.fixture(scope="module")
def trial(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("mutations")
    return mutations.Trial(mutations.World(world, root), root)


READERS = mutations.readers()
NAMES = sorted(set().union(*(reader.names() for reader in READERS.values())))


@pytest.mark.parametrize("command", READERS)
def test_the_files_are_valid_as_they_are(trial, command):
    name = min(READERS[command].names())
    line = trial.world[name].read_text().splitlines()[0]
    assert trial.run(command, name, "unchanged", line) == "works"


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_line_is_refused_or_works(trial, name):
    """Each 23rd way to change a line; of those that `check` takes, one command after another
    reads one."""
    (record, *_) = load(trial.world[name])
    commands = trial.of(name)
    taken = 0
    for how, line in list(mutations.lines(record))[::23]:
        if trial.check(name, line):
            command = commands[taken % len(commands)]
            assert trial.run(command, name, how, line) in ("works", "refused"), (how, command)
            taken += 1
        else:
            command = commands[len(how) % len(commands)]
            if len(how) % 5 == 0:
                assert trial.run(command, name, how, line) == "refused", (how, command)
    assert taken and not trial.defects


SILENT = {
    "text": lambda rows: rows[0].update(text="5+7=12\n#12"),
    "final": lambda rows: rows[0].update(final="12"),
    "prompt_ids": lambda rows: rows[1].update(prompt_ids=rows[2]["prompt_ids"]),
}


@pytest.mark.parametrize("field", SILENT)
def test_what_would_train_in_silence_is_named(trial, tmp_path, capsys, field):
    rows = load(trial.world["rollouts"])
    SILENT[field](rows)
    path = dump(tmp_path / "r.jsonl", rows)
    base = trial.world.models["base"]
    commands = [
        (train.main, argv(method="sft", model=base, rollouts=path, out=tmp_path / "m")),
        (teacher.main, argv("score", model=base, rollouts=path, out=tmp_path / "s.jsonl")),
    ]
    if field == "prompt_ids":
        grade = dict(grader="answer", prompts=trial.world["prompts"], rollouts=path)
        commands.append((rubric.main, argv("grade", **grade, out=tmp_path / "w.jsonl")))
        commands.append((files.main, ["check", str(path)]))
    for main, words in commands:
        message = refusal(main, words, capsys)
        assert message.startswith(f"error: {path}:{1 + (field == 'prompt_ids')}: {field}: exp")
    assert not Path(tmp_path / "m").exists()


def without(name):
    return lambda record: {k: v for k, v in record.items() if k != name}


def ids_beyond(record):
    ids = records.unpack(record["topk"]["ids"]) + 10_000
    return record | {"topk": record["topk"] | {"ids": records.pack(ids)}}


def narrower(record):
    return record | {"sorted": records.pack(records.unpack(record["sorted"])[:, :1])}


@pytest.mark.parametrize(
    "command, name, change",
    [
        ("score of", "own", ids_beyond),
        ("units", "own", ids_beyond),
        ("units resumed", "units", without("units")),
        ("units resumed", "units", without("bytes")),
        ("uld", "units", narrower),
        ("create resumed", "rubrics", without("drawn_from")),
    ],
)
def test_what_a_kind_allows_and_a_command_cannot_use_is_refused(trial, command, name, change):
    (record, *_) = load(trial.world[name])
    line = mutations.spelt(change(record))
    assert trial.check(name, line)
    assert trial.run(command, name, "changed", line) == "refused"
