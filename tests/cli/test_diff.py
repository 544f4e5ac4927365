"""`dsmoe diff`: what it prints, as text and as data, how it ends, and every wrong input in one line."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

pytest.importorskip("onnx")

from onnx import helper, load, save

from dsmoe_compiler.cli.diff_cells import fitted, printable, shortened
from dsmoe_compiler.ir.spec import MoESpec
from dsmoe_compiler.report.grid import Column, Row
from tests.cli.fakes import SPEC, run, wrong
from tests.graph_diff.onnx_models import matrix, model, stack, value, written

MODEL = "tests.cli.small_model:build"  # layers 0 fused, 1 with an unknown router, 2 refused
SPECS = {f"dsmoe.layer.layers.{i}.mlp": SPEC.text for i in range(3)}


def diff(*arguments: str | Path) -> Result:
    """`dsmoe diff ARGUMENTS`, which ends well; its lines fit a page."""
    result = run("diff", *map(str, arguments))
    assert result.exit_code == 0, result.stderr
    pages = [line for line in result.stdout.splitlines() if line[:3] not in ("A: ", "B: ")]
    assert "--json" in arguments or max(map(len, pages)) <= 80
    return result


def record(*arguments: str | Path) -> Any:
    return json.loads(diff(*arguments, "--json").stdout)


@cache
def captured() -> Any:
    """The model before and after its passes."""
    return diff(MODEL).stdout, record(MODEL)


def rows(text: str, title: str) -> list[list[str]]:
    """The table whose first title is this, without its titles, split at gaps."""
    blocks = (block.splitlines() for block in text.split("\n\n"))
    (lines,) = (lines for lines in blocks if lines[0].split("  ")[0] == title)
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[1:]]


def flat(text: str) -> str:
    """The text without the ends of its lines."""
    return " ".join(text.split())


def test_a_model_alone_is_compared_with_what_the_passes_make_of_it() -> None:
    text, data = captured()
    assert f"A: {MODEL} (captured graph)\nB: {MODEL} (after the passes)\n" in text
    assert "they differ in operators and MoE layers\n" in text
    assert ["MoE layers fused", "0", "2", "+2"] in rows(text, "size")
    assert ["dsmoe.moe", "0", "1", "+1"] in rows(text, "operator")
    counts = {each["name"]: (each["a"], each["b"]) for each in data["operators"]}
    assert counts["dsmoe.experts"] == (0, 1) and counts["bmm"] == (6, 2)
    assert not any(data["tensors"][part] for part in ("added", "removed", "changed", "rewritten", "unread"))


def test_layers_are_told_before_and_after() -> None:
    text, data = captured()
    assert rows(text, "MoE layers")[:3] == [
        ["0", "1"],
        ["A", "as written"],
        ["B", "fused: softmax→top-2 | 8 × silu FFN D=16"],
    ]
    assert [(each["name"], each["a"]["fused"], each["b"]["fused"]) for each in data["layers"]] == [
        ("0", False, True),
        ("1", False, True),
    ]
    assert [each["fused"] for each in data["b"]["layers"]] == [True, True, False], (
        "the refused one is not gone"
    )


def test_operators_come_by_how_much_they_changed() -> None:
    changes = [abs(int(row[-1])) for row in rows(captured()[0], "operator")]
    assert changes == sorted(changes, reverse=True) and len(changes) > 5


def test_a_model_is_the_same_as_itself() -> None:
    assert "they are the same in operators, wiring, properties, MoE layers," in diff(MODEL, MODEL).stdout


def test_a_compiled_program_is_what_the_passes_made(tmp_path: Path) -> None:
    program = str(tmp_path / "m.pt2")
    assert run("compile", MODEL, "-o", program).exit_code == 0
    data = record(MODEL, program)
    assert data["layers"] == captured()[1]["layers"] and data["b"]["form"] == "compiled program"
    assert data["tensors"]["same"] == 9 and not data["tensors"]["rewritten"], "numbers are compared, too"
    assert data["b"]["graph_bytes"] > 0
    assert record(program, program)["same"]


def test_the_same_file_is_the_same(tmp_path: Path) -> None:
    path = written(stack(metadata=SPECS), tmp_path / "a.onnx")
    result = diff(path, path, "--exit-code")
    assert result.stderr == ""
    said = "they are the same in operators, wiring, properties, MoE layers, tensors, inputs and outputs"
    assert said in flat(result.stdout)
    assert record(path, path)["same"] is True


def test_renamed_values_and_moved_data_are_no_difference(tmp_path: Path) -> None:
    one, other = stack(), stack()
    other.graph.node[0].output[0] = other.graph.node[1].input[0] = "called_otherwise"
    a = written(one, tmp_path / "a.onnx")
    b = written(other, tmp_path / "b.onnx", beside="b.data")
    text = flat(diff(a, b).stdout)
    assert "they are the same" in text and "names of values, comments, places of data" in text


def test_everything_that_differs_is_shown(tmp_path: Path) -> None:
    a = written(stack((0, 1, 2), metadata={**SPECS, "dsmoe.target": "standard"}), tmp_path / "a.onnx")
    bare = MoESpec(SPEC.top_k, SPEC.experts).text
    changed = stack((0, 3), "Sigmoid", metadata={**dict.fromkeys(SPECS, bare), "dsmoe.target": "ort"})
    changed.graph.output[0].type.tensor_type.elem_type = 10
    changed.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 9
    text = diff(a, written(changed, tmp_path / "b.onnx")).stdout
    assert "they differ in operators, MoE layers, tensors, inputs, outputs and properties" in text
    assert rows(text, "operator") == [
        ["Relu", "3", "0", "-3"],
        ["Sigmoid", "0", "2", "+2"],
        ["MatMul", "3", "2", "-1"],
    ]
    assert rows(text, "MoE layers")[0] == ["layers.{0-2}.mlp", "3"]
    assert rows(text, "tensors") == [
        ["removed", "1", "f32[8, 8]", "256 bytes"],
        ["layers.2.weight"],
        ["other numbers", "1", "f32[8, 8]", "256 bytes"],
        ["layers.1.weight"],
    ]
    assert rows(text, "interface") == [
        ["input", "x", "f32[batch, 8]", "f32[batch, 9]"],
        ["output", "y", "f32[batch, 8]", "f16[batch, 8]"],
    ]
    assert rows(text, "property") == [["dsmoe.target", "standard", "ort"]]


def test_layers_that_read_alike_and_are_not_show_their_specs(tmp_path: Path) -> None:
    other = SPEC.text.replace('"softmax"', '"softmax",score_dtype="float32"')
    a, b = (
        written(stack(metadata={"dsmoe.layer.mlp": text}), tmp_path / f"{i}.onnx")
        for i, text in enumerate((SPEC.text, other))
    )
    assert 'score_dtype="float32"' in "".join(diff(a, b).stdout.split())


def test_wiring_alone_shows_the_first_line(tmp_path: Path) -> None:
    twisted = stack()
    twisted.graph.node[2].input[0] = "h0"
    a, b = written(stack(), tmp_path / "a.onnx"), written(twisted, tmp_path / "b.onnx")
    text = diff(a, b).stdout
    assert "they differ in wiring\n" in text and "line 3 of the graph's text" in text.replace("\n    ", " ")
    assert "    A  %2 = MatMul(%1, @layers.1.weight)\n    B  %2 = MatMul(%0, @layers.1.weight)\n" in text


def test_many_tensors_are_few_lines_and_many_records(tmp_path: Path) -> None:
    names = [f"layers.{i}.experts.{j}.w" for i in range(3) for j in range(16)]
    a = written(model([]), tmp_path / "a.onnx")
    b = written(model([], [matrix(name) for name in names]), tmp_path / "b.onnx")
    assert rows(diff(a, b).stdout, "tensors") == [
        ["added", "48", "f32[8, 8]", "12 kB"],
        ["layers.{0-2}.experts.{0-15}.w"],
    ]
    assert sorted(each["name"] for each in record(a, b)["tensors"]["added"]) == sorted(names)


def test_a_model_and_a_file_are_compared_in_what_both_have(tmp_path: Path) -> None:
    path = written(
        model([], inputs=[value("input", "n", 16)], outputs=[value("y", "n", 16)]), tmp_path / "m.onnx"
    )
    result = diff(MODEL, path)
    data = record(MODEL, path)
    assert data["operators"] is None and data["layers"] is None
    assert data["inputs"] == data["outputs"] == []
    assert len(data["tensors"]["removed"]) == 9
    assert "they differ in tensors\n" in result.stdout
    assert "MoE layers are not compared: B does not say which it has" in result.stdout


@pytest.mark.parametrize(("seeds", "status"), [((0, 1), 0), ((0, 2), 1)])
def test_the_exit_code_says_whether_they_differ(tmp_path: Path, seeds: tuple[int, ...], status: int) -> None:
    a, b = written(stack(), tmp_path / "a.onnx"), written(stack(seeds), tmp_path / "b.onnx")
    for more in ((), ("--json",)):
        assert run("diff", str(a), str(b), *more).exit_code == 0
        result = run("diff", str(a), str(b), "--exit-code", *more)
        assert (result.exit_code, result.stderr) == (status, "")


def test_numbers_beside_a_model_are_compared_where_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "away"
    folder.mkdir()
    a = written(stack(), tmp_path / "a.onnx", beside="a.data")
    b = written(stack((0, 5)), folder / "a.onnx", beside="a.data")
    assert [t["name"] for t in record(a, b)["tensors"]["rewritten"]] == ["layers.1.weight"]
    (folder / "a.data").unlink()
    result = diff(a, b)
    assert result.stderr == f"note: {b}: a.data is missing: the contents of 2 tensors cannot be compared\n"
    assert "the same in operators, wiring, properties, tensors' names and types," in result.stdout
    assert "the numbers of 2 tensors (512 bytes) were not compared: B has none" in result.stdout


def test_two_gigabytes_wait_to_be_asked_for(tmp_path: Path) -> None:
    size = 2**31
    for name in ("a", "b"):
        path = written(stack((0,)), tmp_path / f"{name}.onnx", beside=f"{name}.data")
        made = load(path, load_external_data=False)
        (weight,) = made.graph.initializer
        del weight.external_data[:], weight.dims[:]
        weight.dims.extend([2**15, 2**14])
        for key, text in (("location", f"{name}.data"), ("offset", "0"), ("length", str(size))):
            weight.external_data.add(key=key, value=text)
        path.write_bytes(made.SerializeToString())
        with (tmp_path / f"{name}.data").open("wb") as file:
            file.truncate(size)
    text = flat(diff(tmp_path / "a.onnx", tmp_path / "b.onnx").stdout)
    assert "the numbers of 1 tensor (2.1 GB) were not compared: they are too many; --contents" in text
    with (tmp_path / "b.data").open("r+b") as file:
        file.write(b"1")
    asked = diff(tmp_path / "a.onnx", tmp_path / "b.onnx", "--contents").stdout
    assert "they differ in tensors" in asked and "other numbers" in asked


def test_names_of_any_kind_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    names = ["größe.重み", "evil\x1b[2J\nname", "\u202eright to left", "", "n" * 300]
    nodes = [helper.make_node("Résumé\x07" * 20, ["x"], ["y"], domain="例え.jp")]
    a = written(model([]), tmp_path / "ä.onnx")
    b = written(
        model(nodes, [matrix(name) for name in names], metadata={"dsmoe.layer.层\x1b": "?"}),
        tmp_path / "b.onnx",
    )
    for more in ((), (MODEL,)):
        text = diff(*(more or (a,)), b).stdout
        assert not set("\x1b\x07\u202e") & set(text) and "größe.重み" in text
        assert r"evil\x1b[2J\nname" in text and "(no name)" in text
    assert {t["name"] for t in record(a, b)["tensors"]["added"]} == set(names)


def test_nothing_compared_with_nothing(tmp_path: Path) -> None:
    path = written(model([], inputs=[], outputs=[]), tmp_path / "empty.onnx")
    assert "they are the same" in diff(path, path).stdout
    assert record(path, path)["a"]["nodes"] == 0


def test_wrong_inputs_are_one_line_each(here: Path) -> None:
    save(stack(), "a.onnx")
    Path("folder.onnx").mkdir()
    Path("cut.onnx").write_bytes(Path("a.onnx").read_bytes()[:300])
    shutil.copy("a.onnx", "not.pt2")
    assert wrong("diff", "none.onnx", "a.onnx") == "none.onnx: no such file; give an .onnx file"
    assert wrong("diff", "a.onnx", "folder.onnx").startswith("folder.onnx: is a folder")
    assert wrong("diff", "a.onnx", "cut.onnx").startswith("cut.onnx: is damaged, cut off, or no ONNX file")
    assert wrong("diff", "a.onnx", "not.pt2").startswith("not.pt2: not a saved program")
    assert wrong("diff", "a.onnx", "no-such-model").startswith("unknown model 'no-such-model'")
    assert wrong("diff", "a.onnx").startswith("give a second graph to compare a.onnx with.")
    assert wrong("diff", "not.pt2").startswith("give a second graph to compare not.pt2 with.")
    assert wrong("diff", "a.onnx", "a.onnx", "--input", "x=2").startswith("--input is for a MODEL")
    assert wrong("diff").startswith("Missing argument 'A'.")


def test_without_onnx_the_line_names_the_extra(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(stack(), "a.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert wrong("diff", "a.onnx", "a.onnx") == (
        'a.onnx: reading it needs onnx: pip install "dsmoe-compiler[onnx]"'
    )


def test_files_of_onnx_need_no_torch(tmp_path: Path) -> None:
    path = written(stack(metadata=SPECS), tmp_path / "a.onnx")
    code = (
        "import sys; from dsmoe_compiler.cli import main; "
        f"main(['diff', {str(path)!r}, {str(path)!r}], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_table_that_is_too_wide_loses_the_middle_of_its_cells() -> None:
    columns = (Column("name"), Column("B"))
    cells = [("n" * 100, "short"), ("model.layers.weight", "b")]
    grid = fitted(columns, [Row(row) for row in cells], 0, 40)
    assert grid.width == 40 and grid.rows[1].cells == cells[1] and "…" in grid.rows[0].cells[0]
    assert fitted(columns, [Row(row) for row in cells], 0, 200).rows[0].cells == cells[0]
    assert shortened("abcdefgh", 5) == "ab…gh" and shortened("abcdef", 6) == "abcdef"
    assert printable("a\tb\x00é\ud800") == r"a\tb\x00é\ud800"


def test_help_has_an_example() -> None:
    text = run("diff", "--help").stdout
    assert "Example" in text and "dsmoe diff" in text and "--json" in text
