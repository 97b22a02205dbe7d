"""Every flag of every stage is read by that stage, unknown flags and abbreviations fail, and
--help opens with a runnable line."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    "worlds/sums.py",
    "worlds/forks.py",
    "worlds/agents.py",
    "rollout.py",
    "teacher.py",
    "rubric.py",
    "train.py",
    "eval.py",
    "methods/unified.py",
    "experiments/__init__.py",
    "experiments/ropd.py",
    "experiments/opd.py",
    "experiments/unified.py",
    "experiments/lightning.py",
    "experiments/prefix.py",
    "experiments/stable.py",
    "experiments/sparse_to_dense.py",
    "experiments/gad.py",
    "experiments/gad_toy.py",
    "experiments/simct.py",
    "experiments/sod.py",
    "experiments/opsd.py",
    "methods/prefix.py",
    "methods/sod/weights.py",
    "methods/simct/align.py",
    "methods/simct/units.py",
]
# a flag may be read in a file that its stage hands `args` to
READERS = {
    "rollout.py": ["opd/served.py", "opd/sampling.py", "opd/policy.py"],
    "teacher.py": ["opd/served.py", "opd/sampling.py", "opd/policy.py"],
    "rubric.py": ["opd/served.py"],
    "methods/simct/units.py": ["opd/policy.py"],
    "train.py": ["opd/batches.py"],
    "experiments/__init__.py": ["experiments/opd.py"],
    "experiments/opd.py": ["experiments/ropd.py"],
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


@pytest.mark.parametrize("path", FILES + ["opd/served.py"])
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
        "worlds/sums.py",
        "rollout.py",
        "teacher.py answer",
        "teacher.py score",
        "experiments.shuffle_scores",
        "methods.prefix weigh",
        "experiments.prefix_null",
        "methods.sod weigh",
        "experiments.sod_drift",
        "rubric.py create",
        "rubric.py grade",
        "train.py",
        "eval.py",
        "methods.unified",
        "python -m opd.files check",
        "experiments/ropd.py",
        "experiments/opd.py",
        "experiments/unified.py",
        "experiments/lightning.py",
        "experiments/prefix.py",
        "experiments/stable.py",
        "experiments/sod.py",
        "experiments/opsd.py",
        "experiments.report gaps",
    ],
)
def test_help_opens_with_a_runnable_example_and_unknown_flags_fail(command, capsys):
    file, *words = command.split()
    main = importlib.import_module(file.removesuffix(".py").replace("/", ".")).main
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    name = f"-m experiments.{file[8:-3]}" if file.startswith("experiments") else file
    assert file == "opd/records.py" or re.search(
        rf"^    python {re.escape(name)} ", shown, re.M
    )
    for wrong in ("--no-such-flag", "--ou"):  # unknown, and an abbreviation of --out
        with pytest.raises(SystemExit) as stop:
            main([*words, wrong, "x"])
        assert stop.value.code == 2 and "error" in capsys.readouterr().err
