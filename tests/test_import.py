import subprocess
import sys

HEAVY = ("transformer_lens", "plotly", "pandas", "transformers")


def imported_by(statement):
    code = f"import sys; {statement}; print(*[name for name in {HEAVY} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_import_is_light():
    assert imported_by("import tl_flash, tl_flash.cli") == []


def test_that_the_test_above_can_fail():
    assert "plotly" in imported_by("import tl_flash, plotly")
