"""A compiled program: the model's own tensors, any size, gradients, and one file that holds it all."""

import io
import math
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler import archive
from dsmoe_compiler.models.zoo import build
from tests.tiny_models import Experts, relative, tiny, tokens

MODEL = tiny()


@pytest.fixture(scope="module")
def program() -> dsmoe.Program:
    """Captured from the smallest example there is."""
    return dsmoe.compile(MODEL, (tokens(1, 1),), require_fused=True)


@pytest.fixture(scope="module")
def saved(program: dsmoe.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tiny.pt2"
    program.save(path)
    return path


@pytest.mark.parametrize("size", [(3, 9), (1, 300), (0, 5), (3, 0), (1, 1), (200, 100)])
def test_any_batch_and_length(program: dsmoe.Program, size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert relative(program(tokens(*size)), MODEL(tokens(*size))) < 1e-4


def test_strides_and_integer_widths(program: dsmoe.Program) -> None:
    ids = tokens(9, 4)
    with torch.no_grad():
        expected = MODEL(ids)
        assert relative(program(ids.t().contiguous().t()), expected) < 1e-4
        assert relative(program(ids.int()), expected) < 1e-4


def test_the_program_aliases_the_models_tensors() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Experts()
            self.register_buffer("scale", torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.scale  # type: ignore[no-any-return]

    model, x = Scaled(), torch.randn(7, 16)
    program = dsmoe.compile(model, (x,), require_fused=True)
    with torch.no_grad():
        model.layer.down.mul_(2)
        model.scale.add_(1)  # type: ignore[operator]
        assert relative(program(x), model(x)) < 1e-5
        model.load_state_dict(Scaled().state_dict())
        assert relative(program(x), Scaled()(x)) < 1e-5
        dict(program.module.named_parameters())["layer.down"].zero_()
    assert not model.layer.down.any(), "a change in the program shows in the model"


def test_gradients_are_the_models() -> None:
    """fp32: sums of a few hundred products in another order, through three layers and back, stay below
    1e-4.
    """
    model, ids = tiny().requires_grad_(True), tokens(3, 9)
    program = dsmoe.compile(model, (tokens(1, 1),), require_fused=True)

    def gradients(function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        torch.autograd.backward(function(ids).square().mean())
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(model), gradients(program)
    assert found.keys() == expected.keys() and len(found) > 30
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-4


def test_two_programs_do_not_disturb_each_other() -> None:
    x, layers = torch.randn(5, 16), (Experts(), Experts())
    with torch.no_grad():
        layers[1].down.mul_(3)
        programs = [dsmoe.compile(layer, (x,)) for layer in layers]
        for program, layer in zip(programs, layers, strict=True):
            assert relative(program(x), layer(x)) < 1e-5


def test_a_new_process_gives_the_same_bits(program: dsmoe.Program, saved: Path, tmp_path: Path) -> None:
    """Without the model's source: the zoo is not importable there."""
    ids = tokens(3, 9)
    torch.save(ids, tmp_path / "ids.pt")
    script = (
        "import sys, torch; sys.modules['dsmoe_compiler.models'] = None\n"
        "import dsmoe_compiler as dsmoe\n"
        "torch.set_num_threads(int(sys.argv[4]))\n"
        "program = dsmoe.load(sys.argv[1])\n"
        "with torch.no_grad(): torch.save(program(torch.load(sys.argv[2])), sys.argv[3])\n"
        "print(program.report.to_json())"
    )
    files = [str(saved), str(tmp_path / "ids.pt"), str(tmp_path / "out.pt")]
    command = [sys.executable, "-c", script, *files, str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert dsmoe.Report.from_json(done.stdout) == program.report
    with torch.no_grad():
        assert torch.load(tmp_path / "out.pt").equal(program(ids))


def test_the_file_is_the_weights(program: dsmoe.Program, saved: Path) -> None:
    assert saved.stat().st_size <= 1.02 * sum(p.nbytes for p in MODEL.parameters())


def test_the_file_of_a_layer_of_the_demo_is_its_weights(tmp_path: Path) -> None:
    layer = (
        build("deepseek-moe-demo", device="meta").get_submodule("model.layers.0.mlp").to_empty(device="cpu")
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    dsmoe.compile(layer, (torch.randn(2, 3, 768),), verify="off").save(tmp_path / "layer.pt2")
    size = sum(p.nbytes for p in layer.parameters())
    assert size > 100e6
    assert (tmp_path / "layer.pt2").stat().st_size <= 1.02 * size


def test_the_file_names_no_folder_and_holds_no_example(program: dsmoe.Program, saved: Path) -> None:
    assert program.exported.example_inputs is not None, "what is left out of the file stays in memory"
    with archive.opened(saved) as file:
        whole, graph = (zlib.decompress(file.read(name)) for name in ("record", "graph"))
    with zipfile.ZipFile(io.BytesIO(graph)) as inner:
        whole += b"".join(inner.read(name) for name in inner.namelist())
    assert b"dsmoe" in whole
    for folder in (str(Path(__file__).parents[1]), str(Path.home()), "site-packages", "/tmp"):
        assert folder.encode() not in whole
    assert dsmoe.load(saved).exported.example_inputs is None


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 1000, bias=False))
    model[1].weight = model[0].weight
    program = dsmoe.compile(model, (tokens(2, 3),))
    program.save(tmp_path / "tied.pt2")
    assert (tmp_path / "tied.pt2").stat().st_size <= 1.02 * 4 * 64 * 1000
    assert dsmoe.load(tmp_path / "tied.pt2")(tokens(1, 1)).equal(program(tokens(1, 1)))


@pytest.mark.parametrize("model", [nn.Linear(16, 4), Experts(), nn.ReLU()])
def test_a_layer_alone_and_no_layer_at_all(model: nn.Module, tmp_path: Path) -> None:
    program = dsmoe.compile(model, (torch.randn(3, 16),))
    program.save(tmp_path / "p.pt2")
    loaded, x = dsmoe.load(tmp_path / "p.pt2"), torch.randn(5, 16)
    assert loaded.report == program.report and len(loaded.report.layers) == isinstance(model, Experts)
    assert loaded(x).equal(program(x))
    with pytest.raises(dsmoe.ShapeError):
        loaded(x[None, None].expand(1, 2, 5, 16))


def test_a_loaded_program_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    loaded = dsmoe.load(saved)
    loaded.save(tmp_path / "again.pt2")
    assert dsmoe.load(tmp_path / "again.pt2")(tokens(2, 2)).equal(loaded(tokens(2, 2)))


def test_sizes_that_are_rounded(tmp_path: Path) -> None:
    """A capacity of so many percent, up or down."""

    def rooms(x: Tensor) -> Tensor:
        return x.new_ones(math.ceil(x.shape[0] / 3 * 1.25), math.floor(x.shape[1] * 0.7))

    program = dsmoe.compile(rooms, (torch.ones(5, 7),))
    program.save(tmp_path / "p.pt2")
    loaded = dsmoe.load(tmp_path / "p.pt2")
    for sizes in ((5, 7), (1, 1), (3, 10), (0, 4), (100, 9)):
        x = torch.ones(sizes)
        assert loaded(x).shape == program(x).shape == rooms(x).shape


def test_what_torch_cannot_write_is_one_line(tmp_path: Path) -> None:
    program = dsmoe.compile(lambda x: x.new_ones(round(x.shape[0] * 0.3)), (torch.ones(5),))
    assert program(torch.ones(20)).shape == (6,)
    with pytest.raises(dsmoe.InputError, match=r"cannot be saved.*round") as error:
        program.save(tmp_path / "p.pt2")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_loaded_program_keeps_its_conditions(tmp_path: Path) -> None:
    program = dsmoe.compile(lambda x: x * 2 if x.shape[0] % 2 == 0 else x, (torch.ones(4, 3),))
    program.save(tmp_path / "p.pt2")
    with pytest.raises(dsmoe.ShapeError, match=r"x.shape\[0\] % 2 == 0"):
        dsmoe.load(tmp_path / "p.pt2")(torch.ones(3, 3))


def test_permissions_are_those_of_any_file(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_saving_follows_a_link(program: dsmoe.Program, tmp_path: Path) -> None:
    (tmp_path / "link.pt2").symlink_to(tmp_path / "real.pt2")
    program.save(tmp_path / "link.pt2")
    assert (tmp_path / "link.pt2").is_symlink() and (tmp_path / "real.pt2").is_file()


@pytest.mark.parametrize("error", [RuntimeError("full"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file(
    program: dsmoe.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(_exported: object, file: object, **_options: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise error

    path = tmp_path / "p.pt2"
    path.write_text("old")
    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(type(error)):
        program.save(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert any("stack_trace" in node.meta for node in program.exported.graph.nodes)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys, torch, dsmoe_compiler as dsmoe\n"
        "program = dsmoe.compile(torch.nn.Linear(512, 512), (torch.ones(2, 512),))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: program.save(sys.argv[1])\n"
        "except dsmoe.InputError as e: print(e)"
    )
    path = tmp_path / "p.pt2"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.stdout.startswith(f"{path}: cannot be written"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(program: dsmoe.Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, says in (
        (tmp_path, "is a folder; give a file name"),
        (tmp_path / "missing" / "p.pt2", "cannot be written"),
        (tmp_path / "file" / "p.pt2", "cannot be written"),
    ):
        with pytest.raises(dsmoe.InputError, match=says) as caught:
            program.save(place)
        assert "\n" not in str(caught.value) and str(place) in str(caught.value)


def test_an_interrupted_process_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while the weights are being written."""
    script = (
        "import sys, torch, dsmoe_compiler as dsmoe\n"
        "program = dsmoe.compile(torch.nn.Linear(4096, 4096), (torch.ones(2, 4096),), verify='off')\n"
        "print('ready', flush=True)\n"
        "while True: program.save(sys.argv[1])"
    )
    path = tmp_path / "p.pt2"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert {p.name for p in tmp_path.iterdir()} <= {"p.pt2"}
    if path.exists():
        assert dsmoe.load(path)(torch.ones(1, 4096)).shape == (1, 4096)
