"""Makes small faults in a random sample of places of the package, and reports those that no test finds.

python tools/mutants.py [--sample NUMBER] [--seed NUMBER] [--jobs NUMBER] [--limit SECONDS] [--measure] [FILE ...]

cosmic-ray makes the faults. Each is made in a copy of the checkout, in what is written by hand; what is derived from
that is derived again. It is put to the tests that run the changed lines, and to the tests of the package's folder if
those lines run on import only. Which tests run which line is measured first, by coverage, and kept until `--measure`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from queue import Queue

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from coverage import CoverageData

ROOT = Path(__file__).parent.parent
HOME = ROOT / "build" / "mutants"
MEASURED = HOME / "coverage"
CORE = (
    "mesh_storage/aio",
    "mesh_storage/backup/refill.py",
    "mesh_storage/errors.py",
    "mesh_storage/postgres",
    "mesh_storage/repositories",
    "mesh_storage/schema/tables.py",
    "mesh_storage/storage.py",
)
COPIED = ("mesh_storage", "alembic", "alembic.ini", "benchmarks", "docs", "examples", "tests", "tools", "typings")
COPIED_TOO = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "properdocs.yml")
# Slow, and about the package's surroundings.
NOT_RUN = ("tests/benchmarks", "tests/docs", "tests/packaging", "tests/tools", "tests/typing")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Place:
    """A piece of code, and the operators of cosmic-ray that change it, each with the number of its occurrence."""

    path: str
    line: int
    column: int
    changes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Mutant:
    """A changed file."""

    path: str
    line: int
    operator: str
    code: str


@dataclass(frozen=True)
class Verdict:
    """What the tests said."""

    mutant: Mutant
    tests: int
    killer: str | None
    difference: str


def derived() -> dict[str, str]:
    """Return the files that unasyncd writes, by the file that each is derived from."""
    files: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["unasyncd"]["files"]
    return files


def hand_written(paths: Sequence[str]) -> list[str]:
    """Return the files at and below these paths that nothing derives."""
    below = [ROOT / path for path in paths]
    files = [file for path in below for file in ([path] if path.is_file() else path.rglob("*.py"))]
    return sorted({str(file.relative_to(ROOT)) for file in files} - set(derived().values()))


def places(path: str) -> Iterator[Place]:
    """Find all code of a file that an operator changes."""
    nodes = list(ast_nodes(get_ast((ROOT / path).read_text())))
    found: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name in operator_names():
        if get_operator(name).arguments():
            continue
        operator = get_operator(name)()
        starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            found.setdefault(start, []).append((name, occurrence))
    for (line, column), changes in sorted(found.items()):
        yield Place(path, line, column, tuple(changes))


def meaning(code: str) -> str | None:
    """Return what is executed of a file, for a comparison: annotations and comments are not; None if nothing can be."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def sampled(paths: Sequence[str], number: int, seed: int) -> Iterator[Mutant]:
    """Choose places at random, and one change of each that differs when it is executed."""
    chance = random.Random(seed)
    everywhere = [place for path in hand_written(paths) for place in places(path)]
    chance.shuffle(everywhere)
    for place in everywhere:
        if number == 0:
            return
        name, occurrence = chance.choice(place.changes)
        before = (ROOT / place.path).read_text()
        try:
            after = mutate_code(before, get_operator(name)(), occurrence)
        except AttributeError:  # cosmic-ray knows exceptions by plain names only
            continue
        if after is not None and meaning(after) not in (None, meaning(before)):
            number -= 1
            yield Mutant(place.path, place.line, name.removeprefix("core/"), after)


def measure() -> None:
    """Run all tests once and record which lines each of them runs; one that fails judges nothing later either."""
    HOME.mkdir(parents=True, exist_ok=True)
    left_out = [f"--ignore={path}" for path in NOT_RUN]
    run = subprocess.run(
        [*PYTEST, "-n", "2", "--dist", "worksteal", "--cov", "--cov-context=test", "--cov-report=", *left_out],
        cwd=ROOT,
        env={**os.environ, "COVERAGE_FILE": str(MEASURED)},
        check=False,
    )
    if run.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        run.check_returncode()


def copy_of_the_checkout(number: int) -> Path:
    """Make a directory with what the tests need, in which mutants live."""
    copy = HOME / f"copy-{number}"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for name in (*COPIED, *COPIED_TOO):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, copy / name)
    return copy


def changed_lines(path: str, copy: Path) -> set[int]:
    """Return the lines of the statements of a file of the checkout that differ in the copy."""
    text = (ROOT / path).read_text()
    before, after = text.splitlines(), (copy / path).read_text().splitlines()
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    changed = {
        line
        for tag, start, end, _, _ in matcher.get_opcodes()
        if tag != "equal"
        for line in range(start + 1, max(end, start + 1) + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno
            statement = range(node.lineno, (last or node.lineno) + 1)
            if changed.intersection(statement):
                changed.update(statement)
    return changed


class Runs:
    """Which tests run which lines, as measured, of the tests that there still are."""

    def __init__(self) -> None:
        there = subprocess.run(
            [*PYTEST, "--collect-only", "--no-header"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        tests = {*there.stdout.splitlines()}
        data = CoverageData(str(MEASURED))
        data.read()
        self._tests = {
            path: {
                line: {test for context in contexts if (test := context.rpartition("|")[0]) in tests}
                for line, contexts in data.contexts_by_lineno(str(ROOT / path)).items()
            }
            for path in (str(Path(name).relative_to(ROOT)) for name in data.measured_files())
        }
        lines = [tests for by_line in self._tests.values() for tests in by_line.values()]
        self._weights = Counter(test for tests in lines for test in tests)

    def tests_of(self, lines: dict[str, set[int]]) -> list[str]:
        """Return the tests that run one of these lines: those first that run little, for they are short and close."""
        found = {
            test
            for path, numbers in lines.items()
            for number in numbers
            for test in self._tests.get(path, {}).get(number, ())
        }
        return sorted(found, key=lambda test: (self._weights[test], test))


def nearest_tests(path: str) -> list[str]:
    """Return the tests that are named as a file of the package, those of the contract, and those of its folders."""
    own = Path(path).relative_to("mesh_storage")
    folders = [ROOT / "tests" / name for name in ("contract", *reversed(own.parts[:-1]))]
    nearest = [*sorted((ROOT / "tests").rglob(f"test_{own.stem}.py")), *filter(Path.exists, folders)]
    return [str(place.relative_to(ROOT)) for place in nearest]


def runs_on_import(path: str, lines: set[int]) -> bool:
    """Return whether lines of a file are in no function, so that it is chance which test runs them."""
    functions = (
        range(node.body[0].lineno, (node.end_lineno or 0) + 1)
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return not lines.intersection(chain.from_iterable(functions))


@contextmanager
def faulty(mutant: Mutant, copy: Path) -> Generator[dict[str, set[int]]]:
    """Make the fault in a copy for a block, and yield the lines that it changes, by file."""
    touched = [mutant.path, *filter(None, [derived().get(mutant.path)])]
    try:
        (copy / mutant.path).write_text(mutant.code)
        if len(touched) > 1:
            unasyncd = Path(sys.executable).with_name("unasyncd")
            command = [str(unasyncd), "--force", "--quiet", ":".join(touched)]
            subprocess.run(command, cwd=copy, capture_output=True, check=False)  # it fails where it writes
        yield {path: changed_lines(path, copy) for path in touched}
    finally:
        for path in touched:
            shutil.copy2(ROOT / path, copy / path)


class Judge:
    """Puts mutants to the tests; one is killed by a test that fails with the fault and passes without it."""

    def __init__(self, runs: Runs, limit: float) -> None:
        self._runs = runs
        self._limit = limit
        self._passing = set[str]()
        self._unfit = set[str]()
        """Tests that fail without a fault too, here and now."""

    def verdict(self, mutant: Mutant, copy: Path) -> Verdict:
        """Run the tests of a mutant until one fails that passes without it."""
        while True:
            with faulty(mutant, copy) as lines:
                tests = [] if runs_on_import(mutant.path, lines[mutant.path]) else self._runs.tests_of(lines)
                tests = tests or nearest_tests(mutant.path)
                killer = self._failing(tests, copy)
            if killer is None or killer in self._passing:
                break
            tried = killer or tests[0]
            if self._failing([tried], copy) is None:
                self._passing.update({killer} - {""})
                break
            print(f"{tried} fails without a fault too", flush=True)
            self._unfit.add(tried)
        old, new = (text.splitlines(keepends=True) for text in ((ROOT / mutant.path).read_text(), mutant.code))
        difference = difflib.unified_diff(old, new, mutant.path, mutant.operator, n=1)
        return Verdict(mutant, len(tests), killer, "".join(difference))

    def _failing(self, tests: Sequence[str], copy: Path) -> str | None:
        """Run tests in a copy until one fails; return its name, or an empty one if none can be loaded.

        None is for tests that all pass, or of which none fails within the limit.
        """
        given, output = copy / "tests.txt", copy / "output.txt"
        # A root of its own: each run of pytest closes that of all others to other accounts, and thus to servers.
        temporary = Path(tempfile.gettempdir(), f"mesh_storage-mutants-{copy.name}")
        temporary.mkdir(exist_ok=True)
        given.write_text("\n".join([*tests, *(f"--deselect={test}" for test in self._unfit)]))
        process = subprocess.Popen(
            [*PYTEST, "-x", "-rfE", "--tb=line", f"--timeout={self._limit / 2:g}", f"@{given}"],
            cwd=copy,
            env=os.environ
            | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DEBUG_TEMPROOT": str(temporary)},
            stdout=output.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(self._limit)
        except subprocess.TimeoutExpired:
            status = 0
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            return None
        said = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output.read_text(), re.MULTILINE)
        return said[0] if said and "::" in said[0] else ""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=300, metavar="NUMBER", help="of mutants (default: 300)")
    parser.add_argument("--seed", type=int, default=1, metavar="NUMBER", help="of the random choice (default: 1)")
    parser.add_argument("--jobs", type=int, default=2, metavar="NUMBER", help="mutants at the same time (default: 2)")
    parser.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="for one mutant (default: 120)")
    parser.add_argument("--measure", action="store_true", help="measure anew which tests run which lines")
    parser.add_argument("paths", nargs="*", default=CORE, metavar="FILE", help="what to change instead of the core")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would tests
    if given.measure or not MEASURED.exists():
        measure()
    judge = Judge(Runs(), given.limit)
    mutants = list(sampled(given.paths, given.sample, given.seed))
    copies: Queue[Path] = Queue()
    for number in range(given.jobs):
        copies.put(copy_of_the_checkout(number))

    def judged(mutant: Mutant) -> Verdict:
        copy = copies.get()
        try:
            return judge.verdict(mutant, copy)
        finally:
            copies.put(copy)

    survivors = 0
    with ThreadPoolExecutor(given.jobs) as workers:
        for number, verdict in enumerate(workers.map(judged, mutants), 1):
            mutant = verdict.mutant
            killer = verdict.killer
            said = f"SURVIVED {verdict.tests} tests" if killer is None else f"killed by {killer or 'all tests'}"
            print(f"{number}/{len(mutants)} {mutant.path}:{mutant.line} {mutant.operator}: {said}", flush=True)
            if killer is None:
                survivors += 1
                print(verdict.difference, flush=True)
    killed = len(mutants) - survivors
    print(f"{killed} of {len(mutants)} killed, {100 * killed / max(1, len(mutants)):.1f} %; {survivors} survived")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
