"""Tiny models for the evaluator's unit tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_TINY = "evaluator_tiny_onnx"


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny_onnx.py beside this file: test folders are not packages, so it is loaded by its path."""
    if _TINY not in sys.modules:
        spec = importlib.util.spec_from_file_location(_TINY, Path(__file__).parent / "tiny_onnx.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[_TINY] = module
        spec.loader.exec_module(module)
    return sys.modules[_TINY]
