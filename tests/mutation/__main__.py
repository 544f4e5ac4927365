"""python -m tests.mutation [--kind raise,require,guard] [FILE…]: which obligations no test misses."""

from __future__ import annotations

import argparse
import os
import sys

import pytest
import torch

from tests.mutation.equivalent import EQUIVALENT, UNREACHED
from tests.mutation.mutants import FILES, KINDS, ROOT, mutants
from tests.mutation.runner import Mutation

# Tests that hold one layer, or what looks like one, against eager; each takes less than a second. Those of
# `SLOWLY` let everything pass that a rule is for: a guard is needed where a rule answers too early.
TESTS = (
    "tests/passes/test_refusals.py",
    "tests/passes/test_lookalikes.py",
    "tests/passes/test_loop_lookalikes.py",
    "tests/passes/test_capacity.py",
    "tests/passes/test_mask_counts.py",
    "tests/passes/test_wild_spellings.py",
    "tests/passes/test_broken_once.py",
    "tests/adversarial/test_adversarial.py",
)
SLOWLY = (
    "tests/passes/test_bodies.py",
    "tests/passes/test_loops.py",
    "tests/passes/test_loop_ids.py",
    "tests/passes/test_fused_equals_eager.py",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--kind", default=",".join(KINDS), help="which obligations (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="children at a time (%(default)s)")
    parser.add_argument("--patience", type=float, default=120, help="seconds a child may take (%(default)s)")
    parser.add_argument("--tests", nargs="*", help="test files (those that take less than a second a test)")
    parser.add_argument("files", nargs="*", metavar="FILE", help="files below passes/ (all)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # a child of a process whose OpenMP has started threads waits for them for ever
    kinds = set(chosen.kind.split(","))
    found = [m for f in FILES if not chosen.files or f in chosen.files for m in mutants(f) if m.kind in kinds]
    plugin = Mutation(found, chosen.jobs, chosen.patience)
    os.chdir(ROOT)
    tests = chosen.tests or [
        t for t in (*TESTS, *(SLOWLY if "guard" in kinds else ())) if (ROOT / t).exists()
    ]
    pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *tests], plugins=[plugin])
    survivors = [m for m, by in plugin.killed.items() if not by and m.key not in EQUIVALENT]
    survivors = [m for m in survivors if plugin.killed[m] is None or m.key not in UNREACHED]
    for mutant in survivors:
        print(f"{'not reached' if plugin.killed[mutant] == '' else 'not noticed'}  {mutant}")
    known = sum(m.key in EQUIVALENT for m in found)
    print(f"{len(found)} obligations, {known} equivalent, {len(survivors)} that no test misses")
    for mutant in plugin.endless:
        print(f"not ended    {mutant}")
    return bool(survivors or plugin.broken or plugin.endless)


if __name__ == "__main__":
    sys.exit(main())
