"""Every flag of every stage is read by that stage, unknown flags and abbreviations fail, and
--help opens with a runnable line."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    "toy.py",
    "rollout.py",
    "teacher.py",
    "rubric.py",
    "train.py",
    "eval.py",
    "support.py",
    "recipes/__init__.py",
    "recipes/ropd.py",
    "recipes/opd.py",
    "recipes/unified.py",
    "recipes/lightning.py",
    "recipes/prefix.py",
    "recipes/stable.py",
    "recipes/sparse_to_dense.py",
    "recipes/gad.py",
    "recipes/gad_toy.py",
    "recipes/simct.py",
    "recipes/sod.py",
    "recipes/opsd.py",
    "weigh.py",
    "stepweights.py",
    "align.py",
    "units.py",
]
# a flag may be read in a file that its stage hands `args` to
READERS = {
    "rollout.py": ["served.py"],
    "teacher.py": ["rollout.py", "served.py"],
    "rubric.py": ["served.py"],
    "units.py": ["rollout.py"],
    "train.py": ["data.py"],
    "recipes/__init__.py": ["recipes/opd.py"],
    "recipes/opd.py": ["recipes/ropd.py"],
}


def flags_and_reads(path):
    """({destinations of add_argument}, {attributes read of a name `args`, or through
    vars(args)})."""
    flags, reads = set(), set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "add_argument"
        ):
            name = node.args[0].value
            keyword = {k.arg: k.value for k in node.keywords}
            flags.add(
                keyword["dest"].value
                if "dest" in keyword
                else name.lstrip("-").replace("-", "_")
            )
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "args"
            and isinstance(node.ctx, ast.Load)
        ):
            reads.add(node.attr)
    return flags, reads


@pytest.mark.parametrize("path", FILES + ["served.py"])
def test_every_flag_is_read(path):
    flags, reads = flags_and_reads(path)
    for other in READERS.get(path, []):
        reads |= flags_and_reads(other)[1]
    unread = flags - reads - {"command"}
    assert flags and not unread, f"{path}: flags that nothing reads: {sorted(unread)}"


def test_the_check_notices_a_dead_flag(tmp_path, monkeypatch):
    (tmp_path / "x.py").write_text(
        'p.add_argument("--used")\np.add_argument("--dead-flag")\nprint(args.used)\n'
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    flags, reads = flags_and_reads("x.py")
    assert flags - reads == {"dead_flag"}


@pytest.mark.parametrize(
    "command",
    [
        "toy.py",
        "rollout.py",
        "teacher.py answer",
        "teacher.py score",
        "teacher.py shuffle",
        "weigh.py cut",
        "weigh.py null",
        "weigh.py steps",
        "weigh.py drift",
        "rubric.py create",
        "rubric.py grade",
        "train.py",
        "eval.py",
        "eval.py support",
        "records.py check",
        "recipes/ropd.py",
        "recipes/opd.py",
        "recipes/unified.py",
        "recipes/lightning.py",
        "recipes/prefix.py",
        "recipes/stable.py",
        "recipes/sod.py",
        "recipes/opsd.py",
        "eval.py gaps",
    ],
)
def test_help_opens_with_a_runnable_example_and_unknown_flags_fail(command, capsys):
    file, *words = command.split()
    main = importlib.import_module(file.removesuffix(".py").replace("/", ".")).main
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    name = f"-m recipes.{file[8:-3]}" if file.startswith("recipes") else file
    assert file == "records.py" or re.search(rf"^    python {re.escape(name)} ", shown, re.M)
    for wrong in ("--no-such-flag", "--ou"):  # unknown, and an abbreviation of --out
        with pytest.raises(SystemExit) as stop:
            main([*words, wrong, "x"])
        assert stop.value.code == 2 and "error" in capsys.readouterr().err
