"""Runs every experiment's --smoke at one thread and hashes what it leaves behind: nothing that
a refactoring may move.

    python tests/golden.py write golden.json           # before the change
    python tests/golden.py compare golden.json         # after it: exit code 1 and the list of
                                                       files that differ

Hashed are the records (rollouts, scores, rewards, weights, rubrics, metrics, results) without
timings, paths and
command lines, and the bytes of every model.safetensors.  The numbers are those of one machine
                                                          and one set of versions.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
# what may differ from run to run, or names a place or a command
UNSTABLE = {
    "model",
    "policy",
    "seconds",
    "settings",
    "versions",
    "command",
    "train/seconds",
    "train/tokens_per_second",
    "discriminator",
    "rubricator",
    "grader",
}


def experiments():
    """Module names of all experiments, the slowest first."""
    folder = next(name for name in ("experiments", "recipes") if (ROOT / name).is_dir())
    names = [p.stem for p in sorted((ROOT / folder).glob("[a-z]*.py"))]
    texts = {name: (ROOT / folder / f"{name}.py").read_text() for name in names}
    return [
        f"{folder}.{name}"
        for name, text in texts.items()
        if name != "study" and "__main__" in text and ("conduct(" in text or "--smoke" in text)
    ]


def without_unstable(value):
    """The value without keys that may differ from run to run, at any depth."""
    if isinstance(value, dict):
        return {
            k: without_unstable(v)
            for k, v in sorted(value.items())
            if k not in UNSTABLE and "second" not in k
        }
    if isinstance(value, list):
        return [without_unstable(v) for v in value]
    return value


def hash_of(path):
    """Twelve hex digits of what a file says; None for a file that says nothing stable."""
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    if path.suffix == ".jsonl":
        rows = [without_unstable(json.loads(line)) for line in path.read_text().splitlines()]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
    return None


def smoke(module, keep=None):
    """{relative path: hash} of one experiment's smoke run."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(keep) / module.split(".")[1] if keep else Path(scratch) / "out"
        env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONHASHSEED="0", HF_HUB_OFFLINE="1")
        run = subprocess.run(
            [sys.executable, "-m", module, "--smoke", "--out", str(out)],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        if run.returncode:
            return {"FAILED": run.stderr[-3000:]}
        hashes = {
            str(p.relative_to(out)): hash_of(p) for p in sorted(out.rglob("*")) if p.is_file()
        }
        return {name: value for name, value in hashes.items() if value}


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("verb", choices=("write", "compare"))
    p.add_argument("file")
    p.add_argument(
        "--only", nargs="*", help="experiments to run instead of all, by their last name"
    )
    p.add_argument("--keep", help="folder for the runs, to look at them")
    p.add_argument("--jobs", type=int, default=2)
    args = p.parse_args()
    modules = [m for m in experiments() if not args.only or m.split(".")[1] in args.only]
    with ThreadPoolExecutor(args.jobs) as pool:
        hashes = {
            m.split(".")[1]: h
            for m, h in zip(modules, pool.map(lambda m: smoke(m, args.keep), modules))
        }
    failed = [name for name, files in hashes.items() if "FAILED" in files]
    for name in failed:
        print(f"{name}: failed\n{hashes[name]['FAILED']}")
    if args.verb == "write":
        Path(args.file).write_text(json.dumps(hashes, indent=1, sort_keys=True) + "\n")
        return len(failed)
    wanted, different = json.loads(Path(args.file).read_text()), 0
    for name, files in hashes.items():
        for path in sorted(set(files) | set(wanted[name])):
            if files.get(path) != wanted[name].get(path):
                different += 1
                print(
                    f"{name}: {path}: expected {wanted[name].get(path)}, got {files.get(path)}"
                )
    print(
        f"{sum(len(f) for f in hashes.values())} files of {len(hashes)} experiments, "
        f"{different} different"
    )
    return different + len(failed)


if __name__ == "__main__":
    sys.exit(bool(main()))
