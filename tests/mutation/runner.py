"""Runs the tests that an obligation refuses in without it, each time in a child of this process.

First all tests run on the passes as they are, with a note wherever an obligation is about to refuse. A
mutant's child takes the code of the changed file into the functions that are loaded, whoever imported them,
and runs the tests that it refuses in, the quickest first, until one fails.
"""

from __future__ import annotations

import ast
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import CodeType, FunctionType, ModuleType

import pytest
from _pytest.runner import runtestprotocol

from tests.mutation.mutants import Mutant, module_of, mutated, observed

# Enough tests of a kind to fail.
ASKED = 12
# The same tests at other sizes and types.
AGAIN = ("T = K", "T = E", "K = 1", "two groups", "bf16", "shapes1", "shapes2")


class Mutation:
    """A pytest plugin: in place of the session's tests, one run of them, then some for each mutant.

    `killed` says of each mutant which test noticed; None where none did; "" where it refuses in none.
    `broken` are the tests that fail without any; `endless` the mutants whose child was stopped after
    `patience` seconds.
    """

    def __init__(self, mutants: Sequence[Mutant], jobs: int, patience: float) -> None:
        self.mutants, self.jobs, self.patience = mutants, jobs, patience
        self.killed = dict[Mutant, str | None]()
        self.broken = list[str]()
        self.endless = list[Mutant]()
        self._refused = defaultdict[tuple[str, int], list[tuple[float, pytest.Item]]](list)
        self._failed = False

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if not any(name in item.name for name in AGAIN)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed = self._failed or report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._observe(session.items)
        children = dict[int, tuple[Mutant, list[pytest.Item]]]()
        for mutant in self.mutants:
            quickest = sorted(self._refused[mutant.file, mutant.number], key=lambda found: found[0])[:ASKED]
            if not quickest:
                self.killed[mutant] = ""
                continue
            if len(children) >= self.jobs:
                self._wait(children)
            asked = [item for _, item in quickest]
            pid = os.fork()
            if pid == 0:
                signal.setitimer(signal.ITIMER_REAL, self.patience)  # SIGALRM ends it, whatever it waits for
                os._exit(self._ask(mutant, asked))
            children[pid] = mutant, asked
        while children:
            self._wait(children)
        return True

    def _observe(self, items: Sequence[pytest.Item]) -> None:
        """Which obligations refuse in which tests."""
        now = set[tuple[str, int]]()
        for file in {mutant.file for mutant in self.mutants}:
            put_in(file, observed(file))

            def refuses(number: int, found: object = True, if_: bool = True, file: str = file) -> object:
                if bool(found) == if_:
                    now.add((file, number))
                return found

            vars(sys.modules[module_of(file)])["_refuses"] = refuses
        for item in items:
            now.clear()
            self._failed, started = False, time.perf_counter()
            run(item)
            if self._failed:
                self.broken.append(item.nodeid)
                print(f"\nfails without any mutant: {item.nodeid}", flush=True)
                continue
            for key in now:
                self._refused[key].append((time.perf_counter() - started, item))
        for file in {mutant.file for mutant in self.mutants}:
            put_in(file, None)

    def _wait(self, children: dict[int, tuple[Mutant, list[pytest.Item]]]) -> None:
        pid, status = os.waitpid(-1, 0)
        mutant, asked = children.pop(pid)
        at = os.waitstatus_to_exitcode(status)
        if at == -signal.SIGALRM:
            self.endless.append(mutant)
        self.killed[mutant] = None if at == 0 else asked[at - 1].nodeid if at > 0 else "died"
        print("." if self.killed[mutant] else "S", end="", flush=True)

    def _ask(self, mutant: Mutant, asked: Sequence[pytest.Item]) -> int:
        """The number, from 1, of the test that noticed; 0 for none."""
        for shown in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), shown)
        put_in(mutant.file, mutated(mutant))
        for number, item in enumerate(asked, 1):
            self._failed = False
            run(item)
            if self._failed:
                return number
        return 0


def run(item: pytest.Item) -> None:
    """One test with its fixtures, reported to the plugins."""
    for report in runtestprotocol(item, nextitem=None, log=False):
        item.ihook.pytest_runtest_logreport(report=report)


def put_in(file: str, tree: ast.Module | None) -> None:
    """A tree's code in the functions of a file's module, whoever imported them; None: the file's own."""
    module = import_module(module_of(file))
    assert module.__file__ is not None
    if tree is None:
        with open(module.__file__) as source:
            tree = ast.parse(source.read())
    codes = dict(_codes(compile(tree, module.__file__, "exec")))
    for function in _functions(module):
        if (code := codes.get(function.__qualname__)) is not None:
            function.__code__ = code


def _codes(code: CodeType, within: str = "") -> Iterator[tuple[str, CodeType]]:
    """The code of functions and methods by the names that they are defined under."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            name = f"{within}{constant.co_name}"
            yield name, constant
            yield from _codes(constant, f"{name}.")


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    for found in list(vars(module).values()):
        if getattr(found, "__module__", None) != module.__name__:
            continue
        for member in vars(found).values() if isinstance(found, type) else [found]:
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if isinstance(function, FunctionType):
                yield function
