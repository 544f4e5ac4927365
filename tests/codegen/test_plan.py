"""A plan comes from the user's cache, else from the committed table, else from the model."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsmoe_compiler.codegen import candidates, plan, tuned
from dsmoe_compiler.codegen.gpu import H200
from dsmoe_compiler.codegen.plan import Decode, Grouped, Problem, bucket, choose, choose_shared
from dsmoe_compiler.codegen.tuned import Measured
from tests.codegen.shapes import layer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_buckets_are_the_powers_of_two_at_or_above() -> None:
    assert [bucket(t) for t in (0, 1, 2, 3, 4, 5, 64, 65, 4096, 4097)] == [
        1,
        1,
        2,
        4,
        4,
        8,
        64,
        128,
        4096,
        8192,
    ]


def test_a_problem_that_makes_no_sense_is_refused() -> None:
    good = layer("olmoe", 64)
    for wrong in (
        {"tokens": 0},
        {"tokens": 65},
        {"hidden": 0},
        {"top_k": 65},
        {"taps": 3},
        {"dtype": "float64"},
        {"shared_width": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong)) + "|selects"):
            replace(good, **wrong)


def test_a_problems_line_tells_it_from_every_other() -> None:
    problem = layer("deepseek-moe-16b", 64)
    others = [
        replace(problem, tokens=128),
        replace(problem, dtype="float16"),
        replace(problem, shared_width=0),
        replace(problem, tma=False),
        replace(problem, interleaved=True),
        replace(problem, up_transposed=True),
        replace(problem, down_transposed=True),
        replace(problem, biased=True),
    ]
    assert len({each.text for each in (problem, *others)}) == 1 + len(others)
    assert problem.text == (
        "tokens=64,hidden=2048,width=1408,experts=64,top_k=6,taps=2,dtype=bfloat16,shared_width=2816"
    )


def test_without_measurements_the_model_chooses() -> None:
    assert choose(layer("olmoe", 1), H200, "3.9.0") == candidates.best(layer("olmoe", 1), H200)
    assert isinstance(choose(layer("olmoe", 1), H200, "3.9.0"), Decode)
    assert isinstance(choose(layer("olmoe", 4096), H200, "3.9.0"), Grouped)


def test_a_measurement_comes_before_the_model_and_the_users_before_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = layer("olmoe", 64)
    modelled = candidates.best_grouped(problem, H200)
    ours, theirs = replace(modelled, programs=7), replace(modelled, programs=8)

    table = tuned.store({problem: Measured(ours, 2.0)}, H200, "3.9.0")
    assert table is not None
    committed = table.read_text()
    table.unlink()
    assert choose(problem, H200, "3.9.1") == modelled

    monkeypatch.setattr(tuned, "_committed_text", lambda gpu: committed)
    assert choose(problem, H200, "3.9.1") == ours
    assert choose(problem, H200, "3.8.0") == modelled

    tuned.store({problem: Measured(theirs, 1.0)}, H200, "3.9.0")
    assert choose(problem, H200, "3.9.1") == theirs


def test_shared_experts_beside_a_grouped_layer_are_one_expert_for_all_tokens() -> None:
    problem = layer("deepseek-moe-16b", 64)
    assert problem.shared == Problem(64, 2048, 2816, 1, 1, 2, "bfloat16")
    beside = choose_shared(problem, H200, "3.9.0")
    assert isinstance(beside, Grouped)

    # 64 tokens of one expert fill a tile that six tokens of each of 64 experts would leave empty.
    routed = choose(problem, H200, "3.9.0")
    assert isinstance(routed, Grouped)
    assert beside.up.rows > routed.up.rows

    measured = replace(beside, programs=5)
    tuned.store({problem.shared: Measured(measured, 1.0)}, H200, "3.9.0")
    assert choose_shared(problem, H200, "3.9.0") == measured
    with pytest.raises(ValueError, match="without shared experts"):
        choose_shared(layer("olmoe", 64), H200, "3.9.0")


def test_planning_needs_neither_torch_nor_triton() -> None:
    """A plan can be asked for where neither is installed, and costs no import of either."""
    code = (
        f"import sys; import {plan.__name__} as plan, dsmoe_compiler.codegen.gpu as gpu\n"
        "plan.choose(plan.Problem(64, 2048, 1024, 64, 8, 2, 'bfloat16'), gpu.H200, '3.9.0')\n"
        "sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
