"""Every notebook runs from top to bottom, and is committed as it ran."""

import shutil
from itertools import groupby
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from benchmarks.real_models import SMOLLM2
from tests import families

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SMALLER = (f'NAMES = ("{SMOLLM2.on_hub}",)', 'NAMES = ("base", "instruct")')
"""The line of 01_the_paper that chooses the model: the embedded pair takes a minute."""
PICTURES = 'pio.renderers.default = "png"'
BROWSERS = ("chromium", "google-chrome", "chrome", "chromium-browser")

pytestmark = pytest.mark.skipif(
    not families.HAS_HOOKED_TRANSFORMER, reason="the notebooks hold output of HookedTransformer"
)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook):
    """The kinds of output below each cell, but for progress bars and warnings.

    In how many pieces a text arrives depends on the time between its lines.
    """
    kinds = ([o.output_type for o in cell.outputs if o.get("name") != "stderr"] for cell in code_cells(notebook))
    return [[kind for kind, _ in groupby(of_cell)] for of_cell in kinds]


def test_all_are_there():
    names = [path.stem for path in NOTEBOOKS]
    assert names == [
        "01_the_paper",
        "02_find_and_clamp",
        "03_patching_with_clamps",
        "04_compare_models",
        "05_your_own_directions",
        "06_what_neurons_do",
        "07_from_a_prompt",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_as_it_ran(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    notebook = read(path)
    for cell in code_cells(notebook):
        cell.source = cell.source.replace(*SMALLER)
    pretrained = [cell for cell in code_cells(notebook) if SMOLLM2.on_hub in cell.source]
    if pretrained and not SMOLLM2.ready():
        pytest.skip(f"{SMOLLM2.name} is not in .models; `make models` fetches it")
    for cell in pretrained:
        cell.source = cell.source.replace(SMOLLM2.on_hub, SMOLLM2.folder.absolute().as_posix())
    if not any(map(shutil.which, BROWSERS)):
        for cell in code_cells(notebook):
            cell.source = cell.source.replace(PICTURES, "")
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
    assert shown(notebook) == shown(read(path))
