"""What is read of an `.onnx` file: everything counted, nothing loaded, and whatever is wrong in one line."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper

from dsmoe_compiler.graph_diff.facts import GraphFacts, Layer, Tensor, TensorType
from dsmoe_compiler.graph_diff.onnx_file import onnx_facts
from dsmoe_compiler.graph_diff.onnx_tensors import dtype_name
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.ir.spec import MoESpec
from tests.cli.fakes import SPEC
from tests.graph_diff.onnx_models import (
    WIDTH,
    branch,
    branches,
    matrix,
    model,
    stack,
    sure,
    value,
    written,
)

MATRIX_BYTES = 4 * WIDTH * WIDTH


def facts_of(made: Any, folder: Path) -> GraphFacts:
    return onnx_facts(written(made, folder / "model.onnx"))


def test_a_graph_in_numbers(tmp_path: Path) -> None:
    facts = facts_of(stack(), tmp_path)
    assert facts.operators == {"MatMul": 2, "Relu": 2}
    assert facts.tensors[1] == Tensor("layers.1.weight", TensorType("f32", (8, 8)), MATRIX_BYTES)
    assert [str(x.type) for x in (*facts.inputs, *facts.outputs)] == ["f32[batch, 8]"] * 2
    assert facts.size.nodes == 4 and facts.size.data_bytes == 2 * MATRIX_BYTES
    assert facts.size.graph_bytes == (tmp_path / "model.onnx").stat().st_size - 2 * MATRIX_BYTES
    assert facts.properties["opset ai.onnx"] == "20" and facts.properties["IR version"] == "10"
    assert facts.layers is None, "another exporter's: nobody knows"


def test_wiring_has_no_names_of_computed_values(tmp_path: Path) -> None:
    made = stack()
    facts = facts_of(made, tmp_path)
    assert facts.wiring == (
        "%0 = MatMul(%x, @layers.0.weight)",
        "%1 = Relu(%0)",
        "%2 = MatMul(%1, @layers.1.weight)",
        "%3 = Relu(%2)",
        "return %3",
    )


def test_attributes_are_part_of_the_wiring(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=matrix("unnamed"))
    gemm = helper.make_node("Gemm", ["x", "c"], ["y"], transB=1, alpha=0.5)
    first, second, _ = facts_of(model([constant, gemm]), tmp_path).wiring
    assert first.startswith("%0 = Constant() {value=f32[8, 8]#")
    assert second == "%1 = Gemm(%x, %0) {alpha=0.5, transB=1}"
    other = helper.make_node("Constant", [], ["c"], value=matrix("unnamed", seed=1))
    assert facts_of(model([other, gemm]), tmp_path).wiring[0] != first


def test_layers_come_from_the_metadata_in_their_order(tmp_path: Path) -> None:
    layers = {f"dsmoe.layer.layers.{i}.mlp": SPEC.text for i in (10, 2)}
    told = {**layers, "dsmoe.target": "ort", "theirs": "x"}
    facts = facts_of(stack(metadata=told), tmp_path)
    assert facts.layers is not None
    assert [layer.name for layer in facts.layers] == ["layers.2.mlp", "layers.10.mlp"]
    (layer, _) = facts.layers
    assert layer.fused and layer.router == "softmax→top-4" and layer.experts.startswith("16 × relu FFN")
    assert facts.properties["dsmoe.target"] == "ort" and facts.properties["theirs"] == "x"
    assert not any(key.startswith("dsmoe.layer.") for key in facts.properties)


def test_a_model_of_ours_may_have_no_layers(tmp_path: Path) -> None:
    assert facts_of(stack(metadata={"dsmoe.producer": "dsmoe"}), tmp_path).layers == ()


@pytest.mark.parametrize("text", ["moe(top_k=2)", "nonsense", "", SPEC.text[:-1], "experts(count=1)"])
def test_a_spec_of_another_version_is_a_layer_all_the_same(tmp_path: Path, text: str) -> None:
    facts = facts_of(stack(metadata={"dsmoe.layer.mlp": text}), tmp_path)
    assert facts.layers == (Layer("mlp", True, text, experts=text),)


def test_specs_without_router_or_with_shared_experts_read_well(tmp_path: Path) -> None:
    bare = MoESpec(2, SPEC.experts)
    (layer,) = facts_of(stack(metadata={"dsmoe.layer.": bare.text}), tmp_path).layers or ()
    assert (layer.name, layer.router, layer.shared) == ("", "top-2, as written", "")


def test_branches_are_counted_with_all_that_is_in_them(tmp_path: Path) -> None:
    inner = branches(branch("Abs", [matrix("w", 1)]), branch("Neg"), name="inner")
    inner.output[0] = "unused"
    outer = branches(branch("Relu", [matrix("w")], [inner]), branch("Relu"), name="outer")
    facts = facts_of(model([outer], [matrix("w", 2)], [value("x", "batch", WIDTH), sure()]), tmp_path)
    assert facts.operators == {"If": 2, "Relu": 2, "Abs": 1, "Neg": 1}
    assert (facts.size.nodes, facts.size.in_subgraphs) == (6, 5)
    names = [tensor.name for tensor in facts.tensors]
    assert names == ["w", "outer/then_branch/w", "outer/then_branch/inner/then_branch/w"]
    assert facts.size.data_bytes == 3 * MATRIX_BYTES


def test_a_loop_body_reads_the_values_around_it(tmp_path: Path) -> None:
    numbers = [helper.make_tensor_value_info("i", TensorProto.INT64, [])]
    states = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("on", "still")]
    body_nodes = [
        helper.make_node("Identity", ["on"], ["still"]),
        helper.make_node("Add", ["h", "carried"], ["next"]),
    ]
    body = helper.make_graph(
        body_nodes,
        "body",
        [*numbers, states[0], value("carried", "batch", WIDTH)],
        [states[1], value("next", "batch", WIDTH)],
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("Loop", ["", "sure", "h"], ["y"], body=body),
    ]
    facts = facts_of(model(nodes, (), [value("x", "batch", WIDTH), sure()]), tmp_path)
    assert facts.size.in_subgraphs == 2
    assert facts.wiring == (
        "%0 = Relu(%x)",
        "%1 = Loop(_, %sure, %0) {body=graph}",
        "    body:",
        "    %2 = Identity(%on)",
        "    %3 = Add(%0, %carried)",
        "    return %2, %3",
        "return %1",
    )


def test_functions_are_counted_once_however_often_they_are_called(tmp_path: Path) -> None:
    domain = [helper.make_opsetid("", 20)]
    body = [
        helper.make_node("Relu", ["a"], ["h"]),
        helper.make_node("MatMul", ["h", "b"], ["c"], name="inside"),
    ]
    function = helper.make_function("com.microsoft", "MoE", ["a", "b"], ["c"], body, domain, ["k"])
    calls = [
        helper.make_node("MoE", ["x", "w"], ["h"], domain="com.microsoft"),
        helper.make_node("MoE", ["h", "w"], ["y"], domain="com.microsoft"),
    ]
    facts = facts_of(model(calls, [matrix("w")], functions=[function]), tmp_path)
    assert facts.operators == {"com.microsoft::MoE": 2, "Relu": 1, "MatMul": 1}
    assert (facts.size.nodes, facts.size.in_functions, facts.size.in_subgraphs) == (4, 2, 0)
    assert "function com.microsoft::MoE(a, b, k)" in facts.wiring


def test_initializers_that_are_inputs_too_are_no_inputs(tmp_path: Path) -> None:
    made = stack((0,), inputs=[value("x", "batch", WIDTH), value("layers.0.weight", WIDTH, WIDTH)])
    made.ir_version = 3
    assert [each.name for each in facts_of(made, tmp_path).inputs] == ["x"]


def test_no_nodes_no_values_no_names(tmp_path: Path) -> None:
    facts = facts_of(model([], inputs=[], outputs=[]), tmp_path)
    assert (facts.size.nodes, facts.wiring, facts.operators) == (0, ("return ",), {})


def test_values_of_unknown_and_other_types(tmp_path: Path) -> None:
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)
    unknown = helper.make_empty_tensor_value_info("u")
    no_shape = helper.make_tensor_value_info("n", TensorProto.FLOAT16, None)
    some = helper.make_tensor_value_info("d", TensorProto.INT64, [None, 2])
    facts = facts_of(model([], inputs=[sequence, unknown, no_shape, some], outputs=[]), tmp_path)
    assert [str(x.type) for x in facts.inputs] == ["sequence[…]", "?[…]", "f16[…]", "i64[?, 2]"]


def test_element_types_are_spelled_as_in_the_textual_ir() -> None:
    kinds = TensorProto
    names = [kinds.FLOAT, kinds.BFLOAT16, kinds.INT64, kinds.UINT4, kinds.BOOL, kinds.FLOAT8E4M3FN, 999]
    assert list(map(dtype_name, names)) == ["f32", "bf16", "i64", "u4", "bool", "float8_e4m3fn", "t999"]


def test_numbers_of_half_a_byte_are_packed(tmp_path: Path) -> None:
    packed = helper.make_tensor("q", TensorProto.INT4, [3, 3], [1, -2, 3, -4, 5, -6, 7, -8, 1])
    (tensor,) = facts_of(model([], [packed]), tmp_path).tensors
    assert (str(tensor.type), tensor.bytes) == ("i4[3, 3]", 5)
    assert tensor.content is not None
    assert tensor.content.read(0, 5) == numpy_helper.tobytes_little_endian(
        np.array([0xE1, 0xC3, 0xA5, 0x87, 0x01], dtype=np.uint8)
    )


def test_one_number_spelled_two_ways_has_the_same_bytes(tmp_path: Path) -> None:
    raw, typed = (
        helper.make_tensor("w", TensorProto.FLOAT, [2], data, raw=is_raw)
        for data, is_raw in ((np.array([1, 2], np.float32).tobytes(), True), ([1.0, 2.0], False))
    )
    both = [facts_of(model([], [w]), tmp_path).tensors[0] for w in (raw, typed)]
    assert both[0] == both[1]
    contents = [t.content.read(0, 8) for t in both if t.content is not None]
    assert contents[0] == contents[1] == np.array([1, 2], np.float32).tobytes()


def test_texts_and_sparse_tensors_have_bytes(tmp_path: Path) -> None:
    words = helper.make_tensor("words", TensorProto.STRING, [2], [b"ab", "ü".encode()])  # type: ignore[list-item]
    made = model([], [words])
    sparse = made.graph.sparse_initializer.add()
    sparse.values.CopyFrom(numpy_helper.from_array(np.array([1, 2, 3], np.float32), "s"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([0, 4, 7], np.int64), "s_indices"))
    sparse.dims.extend([9])
    found = {t.name: (str(t.type), t.bytes) for t in facts_of(made, tmp_path).tensors}
    assert found == {"words": ("string[2]", 20), "s": ("sparse f32[9]", 36)}


def test_data_beside_the_model_is_counted_and_not_loaded(tmp_path: Path) -> None:
    path = written(stack(), tmp_path / "model.onnx", beside="model.data")
    facts = onnx_facts(path)
    assert facts.size.graph_bytes == path.stat().st_size
    assert facts.size.data_bytes == (tmp_path / "model.data").stat().st_size == 2 * MATRIX_BYTES
    (tmp_path / "model.data").unlink()
    gone = onnx_facts(path)
    assert (gone.size, gone.tensors) == (facts.size, facts.tensors)
    assert gone.notes == (f"{path}: model.data is missing: the contents of 2 tensors cannot be compared",)
    (tmp_path / "model.data").write_bytes(b"short")
    assert "model.data is shorter than the model says" in onnx_facts(path).notes[0]


def _external(name: str, dims: list[int], **said: str) -> Any:
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL
    )
    for key, text in said.items():
        tensor.external_data.add(key=key, value=text)
    return tensor


def test_two_gigabytes_are_counted_by_what_the_model_says(tmp_path: Path) -> None:
    size = 2**31
    huge = _external("huge", [2**29], location="huge.data", offset="4096", length=str(size))
    with (tmp_path / "huge.data").open("wb") as file:
        file.truncate(size + 4096)
    facts = facts_of(model([], [huge]), tmp_path)
    assert facts.size.data_bytes == facts.tensors[0].bytes == size and not facts.notes


def test_without_a_length_the_type_says_it_and_shared_data_counts_once(tmp_path: Path) -> None:
    tensors = [_external(name, [2, 3], location="d") for name in ("a", "b")]
    facts = facts_of(model([], tensors), tmp_path)
    assert [t.bytes for t in facts.tensors] == [24, 24] and facts.size.data_bytes == 24


@pytest.mark.parametrize("location", ["", "/etc/passwd", "../secret", "a/../../secret"])
def test_data_is_never_looked_for_outside_the_folder(tmp_path: Path, location: str) -> None:
    tensor = _external("w", [2], location=location)
    facts = facts_of(model([], [tensor]), tmp_path)
    assert facts.tensors[0].content is None and "outside its folder" in facts.notes[0]


@pytest.mark.parametrize("location", ["nul\0", "n" * 5000, "folder"])
def test_places_that_no_file_can_have_are_missing(tmp_path: Path, location: str) -> None:
    (tmp_path / "folder").mkdir()
    facts = facts_of(model([], [_external("w", [2], location=location)]), tmp_path)
    assert facts.tensors[0].bytes == 8 and " is missing: " in facts.notes[0]


@pytest.mark.parametrize("said", [{"offset": "-4"}, {"length": "many"}, {"offset": "1.5"}])
def test_impossible_places_are_one_line(tmp_path: Path, said: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"is damaged: the \w+ of w's data is '"):
        facts_of(model([], [_external("w", [2], location="d", **said)]), tmp_path)


def test_names_that_collide_are_all_kept(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["y"], ["y"])]
    facts = facts_of(model(nodes, [matrix("w"), matrix("w", 1), matrix("x")]), tmp_path)
    assert [t.name for t in facts.tensors] == ["w", "w", "x"] and facts.size.nodes == 2
    assert facts.wiring == ("%0 = Relu(@x)", "%1 = Abs(%0)", "return %1")


def test_wrong_files_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("hello\n")
    with (tmp_path / "large.onnx").open("wb") as file:
        file.truncate(2**31)
    expected = {
        "none": "no such file",
        "folder": "is a folder",
        "pipe": "no ordinary file",
        "empty": "it has no graph",
        "text": "damaged, cut off, or no ONNX file",
        "large": "has 2 GB or more",
    }
    for name, line in expected.items():
        with pytest.raises(InputError, match=line):
            onnx_facts(tmp_path / f"{name}.onnx")


def test_a_file_that_is_cut_off_is_told_wherever_that_is(tmp_path: Path) -> None:
    whole = written(stack(), tmp_path / "whole.onnx").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut.onnx").write_bytes(whole[:size])
        with pytest.raises(InputError, match="damaged, cut off"):
            onnx_facts(tmp_path / "cut.onnx")
