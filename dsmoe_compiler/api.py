"""compile, inspect: the doors of the package."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from dsmoe_compiler import pipeline as passes
from dsmoe_compiler.capture import Captured, CaptureMode, as_module, capture as capture_model, resized
from dsmoe_compiler.inputs import Inputs
from dsmoe_compiler.ir.errors import CaptureError, DsmoeError, InputError, NotFused, Refusal
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.passes import Pass
from dsmoe_compiler.program import Program
from dsmoe_compiler.report.report import LayerReport, PassReport, Report
from dsmoe_compiler.runtime.lower import choose
