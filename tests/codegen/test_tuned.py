"""Tuned plans come back as they were stored, from many processes at once; what is broken is left aside."""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from dsmoe_compiler.codegen import tuned
from dsmoe_compiler.codegen.candidates import ranked
from dsmoe_compiler.codegen.gpu import A100, GPUS, H200
from dsmoe_compiler.codegen.plan import Decode, GemvTiles, Plan, Problem
from dsmoe_compiler.codegen.tuned import Measured, lookup, store
from tests.codegen.shapes import layer

PROBLEM = layer("olmoe", 64)
PLAN = Decode(GemvTiles(16, 256, 4, 1, 2), GemvTiles(8, 512, 4, 1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache of one's own, and a memory without warnings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned._warn.cache_clear()
    yield tmp_path
    tuned._warn.cache_clear()


def stored(plan: Plan = PLAN, problem: Problem = PROBLEM) -> Path:
    file = store({problem: Measured(plan, 12.5)}, H200, "3.9.0")
    assert file is not None
    return file


def warned(problem: Problem = PROBLEM) -> tuple[Plan | None, list[str]]:
    """What is found, and what is said about it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plan = lookup(problem, H200, "3.9.0")
    return plan, [str(each.message) for each in said]


def test_every_kind_of_plan_comes_back() -> None:
    plans = {type(plan): plan for _, plan in ranked(PROBLEM, H200)}
    assert len(plans) == 2
    for plan in plans.values():
        stored(plan)
        assert warned() == (plan, [])


def test_an_entry_counts_for_its_gpu_its_problem_and_its_minor_version() -> None:
    stored()
    assert lookup(PROBLEM, H200, "3.9.7+git0123abc") == PLAN
    assert lookup(PROBLEM, H200, "3.8.0") is None
    assert lookup(PROBLEM, A100, "3.9.0") is None
    assert lookup(layer("olmoe", 128), H200, "3.9.0") is None


def test_new_entries_join_the_old_and_replace_their_own() -> None:
    other = layer("olmoe", 128)
    stored()
    stored(problem=other)
    newer = Decode(PLAN.down, PLAN.down)
    store({PROBLEM: Measured(newer, 1.0)}, H200, "3.8.0")
    stored(newer)
    assert lookup(PROBLEM, H200, "3.9.0") == newer
    assert lookup(other, H200, "3.9.0") == PLAN
    assert lookup(PROBLEM, H200, "3.8.0") == newer


def test_the_folder_is_where_the_specification_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuned.user_folder() == tmp_path / "dsmoe" / "tuned" / "v1"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert tuned.user_folder() == tmp_path / "home" / ".cache" / "dsmoe" / "tuned" / "v1"


def test_nothing_else_is_left_in_the_folder() -> None:
    file = stored()
    assert {each.name for each in file.parent.iterdir()} == {file.name, file.name + ".lock"}


BROKEN = {
    "empty": b"",
    "cut off": b'{"format": 1, "ent',
    "a list": b"[]",
    "nothing in it": b"{}",
    "another format": b'{"format": 2, "entries": {}}',
    "no entries": b'{"format": 1}',
    "no problems": b'{"format": 1, "entries": {"3.9": 1}}',
    "too deep": b"[" * 100_000,
    "binary": b"\x00\xff",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_corrupt_file_is_left_aside_with_one_warning(content: bytes) -> None:
    file = stored()
    file.write_bytes(content)
    plan, said = warned()
    assert plan is None
    assert len(said) == 1 and str(file) in said[0]
    assert warned() == (None, [])


def test_a_corrupt_file_is_replaced_by_the_next_plan() -> None:
    file = stored()
    file.write_text("{")
    with pytest.warns(UserWarning, match="is not JSON"):
        stored()
    assert warned() == (PLAN, [])


def paths(entry: Any) -> Iterator[tuple[str, ...]]:
    """The keys that lead to each value in an entry."""
    if isinstance(entry, dict):
        for key, value in entry.items():
            yield (key,)
            yield from ((key, *rest) for rest in paths(value))


@pytest.mark.parametrize("value", [None, "x", -1, 0, 1.5, True, [], {}, {"rows": 1}, 10**400])
def test_a_corrupt_entry_is_left_aside_and_the_others_count(value: Any) -> None:
    other = layer("olmoe", 128)
    file = stored(problem=other)
    stored()
    whole = json.loads(file.read_text())
    entry = whole["entries"]["3.9"][PROBLEM.text]
    for path in paths(entry):
        if value in (1.5, True) and path == ("microseconds",):
            continue  # a time may be any positive number
        broken = json.loads(json.dumps(whole))
        at = broken["entries"]["3.9"][PROBLEM.text]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        if broken == whole:
            continue
        file.write_text(json.dumps(broken))
        tuned._warn.cache_clear()
        plan, said = warned()
        if plan is None:
            assert len(said) == 1 and str(file) in said[0], path
        else:  # another number of the right kind is another plan
            assert isinstance(value, int) and value > 0, path
        assert warned(other) == (PLAN, [])


def test_a_folder_that_cannot_be_written_is_no_error(cache: Path) -> None:
    (cache / "dsmoe").write_text("a file, where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written") as said:
        assert store({PROBLEM: Measured(PLAN, 1.0)}, H200, "3.9.0") is None
        assert store({PROBLEM: Measured(PLAN, 1.0)}, H200, "3.9.0") is None
    assert len(said) == 1 and str(cache) in str(said[0].message)
    assert warned() == (None, [])


def test_a_file_that_cannot_be_read_is_no_error() -> None:
    file = stored()
    file.unlink()
    file.mkdir()
    plan, said = warned()
    assert plan is None and len(said) == 1 and str(file) in said[0]


def test_processes_that_tune_at_once_keep_each_others_plans() -> None:
    code = """
import sys
from dsmoe_compiler.codegen.gpu import H200
from dsmoe_compiler.codegen.plan import Decode, GemvTiles, Problem
from dsmoe_compiler.codegen.tuned import Measured, store
who = int(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
plan = Decode(GemvTiles(16, 256, 4, 1), GemvTiles(16, 256, 4, 1))
for hidden in range(1, 41):
    assert store({Problem(1, hidden, who, 8, 2, 2, "float16"): Measured(plan, 1.0)}, H200, "3.9.0")
"""
    tuners = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(who)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for who in (1, 2)
    ]
    for each in tuners:
        assert each.stdout is not None and each.stdout.readline() == "ready\n"
    for each in tuners:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    for each in tuners:
        each.communicate()
        assert each.returncode == 0
    missing = [
        (who, hidden)
        for who in (1, 2)
        for hidden in range(1, 41)
        if lookup(Problem(1, hidden, who, 8, 2, 2, "float16"), H200, "3.9.0") is None
    ]
    assert not missing


def test_the_committed_tables_can_be_read_and_belong_to_known_gpus() -> None:
    known = {tuned._file_name(gpu): gpu for gpu in GPUS}
    tables = [
        each for each in (files("dsmoe_compiler.codegen") / "tuned").iterdir() if each.name.endswith(".json")
    ]
    assert tables
    for each in tables:
        table = json.loads(each.read_text())
        assert (table["format"], table["gpu"]) == (tuned.FORMAT, known[each.name].name)
        for entries in table["entries"].values():
            for entry in entries.values():
                tuned._measured(entry)
