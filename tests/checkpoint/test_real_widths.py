"""A checkpoint as wide as DeepSeek-MoE-16B and two layers deep: 2.2 GB, and hardly more to load it."""

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dsmoe_compiler as dsmoe
from dsmoe_compiler.cli.deepseek_folder import load_deepseek_moe
from tests.checkpoint.deepseek_files import WIDE, plainly_loaded, shapes, write
from tests.cli.fakes import run

pytestmark = pytest.mark.slow

# The peak of the resident set, whatever it consists of: mapped pages of files would count, and there are
# none. It is counted from where torch has loaded what it needs for any model.
_MEASURED = """
import sys
from pathlib import Path
from dsmoe_compiler.cli.config_json import read_config
from dsmoe_compiler.cli.deepseek_folder import deepseek_outline, load_deepseek_moe

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

folder = Path(sys.argv[1])
deepseek_outline(folder, read_config(folder))
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load_deepseek_moe(folder)
print(status("VmHWM") - before, sum(tensor.nbytes for tensor in model.state_dict().values()))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = write(tmp_path_factory.mktemp("wide") / "moe", WIDE, shard_bytes=500_000_000)
    assert len(list(folder.glob("*.safetensors"))) == 5
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_the_weights(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _MEASURED, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, weights = map(int, done.stdout.split())
    assert weights == 2 * sum(math.prod(shape) for _, shape in shapes(WIDE))
    assert peak <= 1.05 * weights, f"{peak / weights:.3f} of the weights"


def test_the_logits_are_those_of_the_model_stacked_by_hand(folder: Path) -> None:
    ids = torch.arange(22).view(2, 11) * 4000
    with torch.no_grad():
        logits = load_deepseek_moe(folder)(ids)
        assert logits.equal(plainly_loaded(folder)(ids))


def test_compiled_it_gives_the_models_logits(folder: Path) -> None:
    output = folder / "out.pt2"
    result = run("compile", f"hf:{folder}", "-o", str(output), "--require-fused")
    assert result.exit_code == 0, result.output
    ids = torch.arange(22).view(2, 11) * 4000
    with torch.no_grad():
        expected = load_deepseek_moe(folder)(ids).float()
        found = dsmoe.load(output)(ids).float()
    # Logits of size one, in bfloat16: eight bits, a rounding for each of some hundred steps.
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
