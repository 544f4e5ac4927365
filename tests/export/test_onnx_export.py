"""The door to ONNX on a whole model: names, files, what they tell, and a check that can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

import dsmoe_compiler as dsmoe
from dsmoe_compiler.export.onnx import model as making
from dsmoe_compiler.export.onnx.lower import plain
from dsmoe_compiler.program import Program
from tests.tiny_models import Experts, tiny, tokens


@dataclass(frozen=True)
class Files:
    model: nn.Module
    program: Program
    exported: dsmoe.Exported

    @property
    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.exported.path, load_external_data=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    model = tiny()
    program = dsmoe.compile(model, (), {"input_ids": tokens(2, 7)})
    folder = tmp_path_factory.mktemp("onnx")
    return Files(model, program, dsmoe.export_onnx(program, path=folder / "tiny.onnx"))


def _run(path: Path, ids: Tensor) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input_ids": ids.numpy()})
    return np.asarray(logits)


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (1, 128), (5, 9), (0, 4)])
def test_any_batch_in_onnxruntime(files: Files, size: tuple[int, int]) -> None:
    ids = tokens(*size, seed=3)
    with torch.no_grad():
        expected = files.model(ids)
    torch.testing.assert_close(
        torch.from_numpy(_run(files.exported.path, ids)), expected, rtol=2e-5, atol=2e-5
    )


def test_onnx_s_own_evaluator_and_checks(files: Files, tmp_path: Path) -> None:
    path = files.exported.path
    onnx.checker.check_model(path, full_check=True)
    onnx.shape_inference.infer_shapes_path(
        str(path), str(tmp_path / "inferred.onnx"), check_type=True, strict_mode=True
    )
    ids = tokens(2, 9, seed=4)
    (found,) = ReferenceEvaluator(str(path)).run(None, {"input_ids": ids.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), files.model(ids), rtol=1e-5, atol=1e-5)


def test_names_are_the_models(files: Files) -> None:
    proto = files.proto
    (given,), (result,) = proto.graph.input, proto.graph.output
    assert (given.name, result.name) == ("input_ids", "output")
    assert [d.dim_param for d in given.type.tensor_type.shape.dim] == ["batch", "sequence"]
    stored = {i.name for i in proto.graph.initializer}
    for name, parameter in files.model.named_parameters():
        if ".experts." in name and "shared" not in name:
            assert {f"{name}.{e}" for e in range(len(parameter))} <= stored
        else:
            assert name in stored, name
    modules = {name for name, _ in files.model.named_modules()}
    named = [node.name for node in proto.graph.node if node.name.rpartition("/")[0] in modules]
    assert len(named) > len(proto.graph.node) / 4
    assert not [node.name for node in proto.graph.node if not node.name]


def test_what_the_files_hold(files: Files) -> None:
    exported, proto = files.exported, files.proto
    parameters = sum(p.numel() * p.element_size() for p in files.model.parameters())
    assert exported.data is not None and exported.data.name == "tiny.onnx.data"
    assert exported.data_bytes <= 1.01 * parameters
    assert exported.graph_bytes < 1 << 20
    assert (exported.opset, proto.ir_version) == (20, 10)
    assert exported.nodes == len(proto.graph.node)
    assert [(layer.form, layer.remark) for layer in exported.layers] == [("Split", "")] * 2
    props = {prop.key: prop.value for prop in proto.metadata_props}
    assert props["dsmoe.target"] == "standard"
    layers = {layer.name: layer.spec for layer in files.program.report.layers}
    for name, spec in layers.items():
        assert spec is not None and props[f"dsmoe.layer.{name}"] == spec.text
    text = exported.path.read_bytes()
    for place in (str(Path(dsmoe.__file__).parents[1]), str(Path(torch.__file__).parent), ".py"):
        assert place.encode() not in text


def test_the_same_bytes_again(files: Files, tmp_path: Path) -> None:
    again = dsmoe.export_onnx(files.program, path=tmp_path / "tiny.onnx", verify=False)
    assert again.data is not None and files.exported.data is not None
    assert again.path.read_bytes() == files.exported.path.read_bytes()
    assert again.data.read_bytes() == files.exported.data.read_bytes()


_ELSEWHERE = """
import sys, torch, dsmoe_compiler as dsmoe
from tests.tiny_models import tiny, tokens
dsmoe.export_onnx(tiny(), (), {"input_ids": tokens(2, 7)}, path=sys.argv[1], verify=False)
"""


@pytest.mark.slow
def test_the_same_bytes_by_another_process(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    environment = {**os.environ, "PYTHONPATH": str(Path(dsmoe.__file__).parents[1]), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", _ELSEWHERE, str(path)], check=True, env=environment)
    assert path.read_bytes() == files.exported.path.read_bytes()


def test_a_loaded_program_without_an_example(files: Files, tmp_path: Path) -> None:
    files.program.save(tmp_path / "tiny.pt2")
    loaded = dsmoe.load(tmp_path / "tiny.pt2")
    exported = dsmoe.export_onnx(loaded, path=tmp_path / "loaded.onnx")
    assert exported.error is not None and exported.error < 1e-5
    ids = tokens(1, 5)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(_run(exported.path, ids)), files.model(ids), rtol=2e-5, atol=2e-5
        )


@pytest.fixture
def broken_second_layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def halved(to: Any, stack: Any, expert: int, transposed: bool) -> Any:
        value = plain(to, stack, expert, transposed)
        if "layers.2" in stack.names[expert] and "down" in stack.names[expert]:
            return to.op("Mul", value, to.constant(np.array(0.5, np.float32)))
        return value

    monkeypatch.setattr(making, "plain", halved)
    yield


@pytest.mark.usefixtures("broken_second_layer")
def test_a_wrong_layer_is_named_and_the_files_stay(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "wrong.onnx"
    with pytest.raises(dsmoe.ExportError, match=r"the first layer that differs is model\.layers\.2\.mlp"):
        dsmoe.export_onnx(files.program, path=path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wrong.onnx", "wrong.onnx.data"]


def test_int4_tells_its_error_and_takes_little_room(files: Files, tmp_path: Path) -> None:
    exported = dsmoe.export_onnx(files.program, path=tmp_path / "int4.onnx", weights="int4")
    assert exported.error is not None and exported.error < 1e-5  # against the program on rounded weights
    assert exported.opset == 21
    assert [e.name for e in exported.quantized] == [
        f"model.layers.{layer}.mlp/{product}" for layer in (1, 2) for product in ("gate_up_proj", "down_proj")
    ]
    assert all(e.bits == 4 and 0.01 < e.relative_l2 < 0.12 for e in exported.quantized)
    experts = sum(p.numel() for n, p in files.model.named_parameters() if ".mlp.experts." in n)
    saved = files.exported.data_bytes - exported.data_bytes
    assert 4 * experts - saved <= 0.17 * 4 * experts


def test_a_function_of_tensors_with_several_outputs(tmp_path: Path) -> None:
    layer = Experts()

    def model(x: Tensor, scale: Tensor) -> dict[str, Any]:
        y = layer(x) * scale
        return {"hidden": y, "pair": (y.sum(-1), y), "x": x}

    example = (torch.randn(5, 16), torch.randn(1, 16))
    exported = dsmoe.export_onnx(model, example, path=tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(exported.path)
    assert [i.name for i in session.get_inputs()] == ["x", "scale"]
    assert [o.name for o in session.get_outputs()] == ["hidden", "pair.0", "pair.1", "x_1"]
    x, scale = torch.randn(3, 16), torch.randn(1, 16)
    hidden, summed, again, same = session.run(None, {"x": x.numpy(), "scale": scale.numpy()})
    wanted = model(x, scale)["hidden"].detach().numpy()
    np.testing.assert_allclose(hidden, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(summed, wanted.sum(-1), rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(again, hidden)
    np.testing.assert_array_equal(same, x.numpy())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_size(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 16), nn.Flatten(0, 1), Experts())
    exported = dsmoe.export_onnx(model, (torch.randint(9, (2, 3), dtype=dtype),), path=tmp_path / "m.onnx")
    (given,) = onnxruntime.InferenceSession(exported.path).get_inputs()
    assert given.type == f"tensor({str(dtype).removeprefix('torch.')})"
    assert given.name == "input"


class TestWrongRequests:
    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"target": "onnx"}, r"target='onnx': choose one of 'standard', 'ort'"),
            ({"weights": "int2"}, r"weights='int2': choose one of None, 'int8', 'int4'"),
            ({"dynamic_shapes": None}, "a compiled program's shapes are settled"),
            ({"path": "/nowhere/at/all/m.onnx"}, "cannot be written"),
        ],
    )
    def test_is_one_line(self, files: Files, tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
        with pytest.raises(dsmoe.InputError, match=said):
            dsmoe.export_onnx(files.program, **{"path": tmp_path / "m.onnx", **wrong})
        assert not list(tmp_path.iterdir())

    def test_a_folder_is_no_file(self, files: Files, tmp_path: Path) -> None:
        with pytest.raises(dsmoe.InputError, match="is no file"):
            dsmoe.export_onnx(files.program, path=tmp_path, verify=False)

    def test_a_missing_package_names_the_extra(
        self, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from dsmoe_compiler import exports

        monkeypatch.setattr(exports, "find_spec", lambda name: None if name == "onnxruntime" else name)
        with pytest.raises(dsmoe.InputError, match=r"needs onnxruntime: pip .*\[onnx\].*verify=False"):
            dsmoe.export_onnx(files.program, path=tmp_path / "m.onnx")


def test_a_layer_that_was_not_fused_is_told(tmp_path: Path) -> None:
    layer = Experts()
    layer.down.data[0] = float("nan")
    exported = dsmoe.export_onnx(layer, (torch.randn(5, 16),), path=tmp_path / "m.onnx", verify=False)
    (form,) = exported.layers
    assert form.form == "as written" and form.remark.startswith("R305")


def test_what_onnxruntime_cannot_load_is_said(tmp_path: Path) -> None:
    layer, x = Experts().bfloat16(), torch.randn(5, 16).bfloat16()
    with pytest.raises(dsmoe.ExportError, match=r"m\.onnx was written, but onnxruntime .* cannot load it"):
        dsmoe.export_onnx(layer, (x,), path=tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").exists()


def test_a_model_that_draws_numbers_is_not_checked(tmp_path: Path) -> None:
    model = nn.Sequential(Experts(), nn.Dropout(0.5)).train()
    exported = dsmoe.export_onnx(model, (torch.randn(5, 16),), path=tmp_path / "m.onnx")
    assert exported.error is None
    assert onnx.load(exported.path, load_external_data=False).graph.output[0].name == "output"
