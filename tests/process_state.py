"""What torch and Python keep for the whole process, to be compared before and after."""

import copyreg
import logging
import os
import signal
import sys
import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch.fx import config as fx_config
from torch.fx.experimental import _config as shapes_config
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# Classes and modules in which tracing puts other functions while it lasts.
_PATCHED = (
    nn.Module,
    Tensor,
    nn.Parameter,
    torch,
    torch.Size,
    nn.functional,
    torch.fx.GraphModule,
    torch._ops,
)


def process_state() -> dict[str, Any]:
    """By name; equal if nothing was left behind."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "random": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "exporting": (torch.compiler.is_exporting(), torch.compiler.is_compiling()),
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "levels": {
            name: (log.level, log.disabled, log.filters[:], log.handlers[:]) for name, log in _loggers()
        },
        "logging": logging.root.manager.disable,
        "configs": [
            repr(c.get_config_copy())
            for c in (shapes_config, dynamo_config, functorch_config, fx_config)
            if hasattr(c, "get_config_copy")
        ],
        "attributes": {
            f"{home.__name__}.{name}": id(value)
            for home in _PATCHED
            for name, value in vars(home).items()
            if callable(value)
        },
        "function modes": list(_get_current_function_mode_stack()),  # type: ignore[no-untyped-call]
        "dispatch modes": list(_get_current_dispatch_mode_stack()),
        "environment": dict(os.environ),
        "reducers": dict(copyreg.dispatch_table),
        "handler": signal.getsignal(signal.SIGINT),
        "trace": (sys.gettrace(), sys.getprofile()),
        "hooks": (sys.excepthook, threading.excepthook, sys.meta_path[:], sys.path[:]),
        "folder": os.getcwd(),
    }


def _loggers() -> list[tuple[str, logging.Logger]]:
    found = list(logging.root.manager.loggerDict.items())
    return [("root", logging.root), *((name, log) for name, log in found if isinstance(log, logging.Logger))]


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What differs, each as (before, after); loggers made meanwhile are no difference."""
    after = {**after, "levels": {k: v for k, v in after["levels"].items() if k in before["levels"]}}
    found = dict[str, Any]()
    for name, value in before.items():
        if value != after[name]:
            if isinstance(value, dict):
                keys = value.keys() | after[name].keys()
                found[name] = {
                    k: (value.get(k), after[name].get(k)) for k in keys if value.get(k) != after[name].get(k)
                }
            else:
                found[name] = (value, after[name])
    return found
