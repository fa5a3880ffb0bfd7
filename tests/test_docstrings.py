"""Runs the examples in the docstrings."""

import doctest
import importlib
import pkgutil
from importlib.util import find_spec

import pytest
import torch

import tl_flash


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for module in pkgutil.walk_packages(tl_flash.__path__, "tl_flash."):
        if module.name.endswith("__main__") or ("triton" in module.name and find_spec("triton") is None):
            continue
        for test in finder.find(importlib.import_module(module.name)):
            if test.examples:
                yield pytest.param(test, id=test.name)


@pytest.mark.parametrize("example", list(examples()))
def test_example(example, bridge):
    example.globs |= {"model": bridge, "torch": torch} | {name: getattr(tl_flash, name) for name in tl_flash.__all__}
    assert doctest.DocTestRunner().run(example).failed == 0
