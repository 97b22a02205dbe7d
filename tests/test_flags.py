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
    "experiments/weight_controls.py",
    "methods/sod/weights.py",
    "experiments/sod_controls.py",
    "experiments/sod_drift.py",
    "experiments/simct_regroup.py",
    "methods/simct/align.py",
    "methods/simct/units.py",
]
STAGES = ("rollout.py", "teacher.py", "rubric.py", "train.py", "eval.py")
# a flag may be read in a file that its stage hands `args` to
READERS = {
    "rollout.py": ["opd/served.py", "opd/sampling.py", "opd/policy.py"],
    "teacher.py": ["opd/served.py", "opd/sampling.py", "opd/policy.py"],
    "rubric.py": ["opd/served.py", "opd/judge.py"],
    "methods/simct/units.py": ["opd/policy.py"],
    "train.py": ["opd/batches.py"],
    "experiments/opd.py": ["experiments/ropd.py"],
}


def flags_and_reads(path):
    """({destinations of add_argument, settings of a study}, {attributes read of args or
    settings})."""
    flags, reads = set(), set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "add_argument"
            and isinstance(node.args[0], ast.Constant)
        ):
            name = node.args[0].value
            keyword = {k.arg: k.value for k in node.keywords}
            flags.add(
                keyword["dest"].value
                if "dest" in keyword
                else name.lstrip("-").replace("-", "_")
            )
        # a study's settings are fields: `rounds: int = setting(20, ...)`
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node).split(" = ")[-1][:8] == "setting("
        ):
            flags.add(node.target.id)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if ast.unparse(node.value).split(".")[-1] in ("args", "s", "settings"):
                reads.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            reads |= {str(c.value) for c in ast.walk(node) if isinstance(c, ast.Constant)}
    return flags, reads


@pytest.mark.parametrize("path", FILES + ["opd/served.py"])
def test_every_flag_is_read(path):
    flags, reads = flags_and_reads(path)
    shared = ["experiments/study.py"] if path.startswith("experiments/") else []
    for other in [*READERS.get(path, []), *shared]:
        reads |= flags_and_reads(other)[1]
    # getattr(settings, f"{kind}_learning_rate") reads all of that kind
    unread = {f for f in flags - reads if not any(f.endswith(r) for r in reads if r[:1] == "_")}
    unread -= {"command"}
    assert not unread, f"{path}: flags that nothing reads: {sorted(unread)}"


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
        "experiments.controls shuffle-scores",
        "methods.sparse_to_dense spend",
        "methods.prefix weigh",
        "experiments.prefix_null",
        "experiments.weight_controls",
        "methods.sod.__main__ weigh",
        "experiments.sod_controls",
        "experiments.sod_drift",
        "methods.simct.__main__ score",
        "methods.simct.__main__ align",
        "experiments.simct_regroup",
        "rubric.py create",
        "rubric.py grade",
        "train.py",
        "eval.py",
        "methods.unified support",
        "opd.files check",
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
    program = (
        file
        if file in STAGES
        else f"-m {file.removesuffix('.py').removesuffix('.__main__').replace('/', '.')}"
    )
    assert re.search(rf"^    python {re.escape(program)} ", shown, re.M)
    for wrong in ("--no-such-flag", "--ou"):  # unknown, and an abbreviation of --out
        with pytest.raises(SystemExit) as stop:
            main([*words, wrong, "x"])
        assert stop.value.code == 2 and "error" in capsys.readouterr().err
