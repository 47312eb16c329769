"""PEFT knows the tuner in whichever order the two are imported, and importing the package stays cheap."""

import subprocess
import sys

import pytest

from hf_aegis.tuners.gse import GSEConfig, GSEModel
from hf_aegis.tuners.registration import register_tuner


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# A stand-in, for the real one takes seconds to import: what is tested is when the tuners are.
STAND_IN = """
import sys, types, importlib, pathlib, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "peft").mkdir()
(folder / "peft" / "__init__.py").write_text("done = True")
sys.path.insert(0, str(folder))
import hf_aegis.tuners.registration as registration
(folder / "stand_in_tuner.py").write_text("import peft; assert peft.done")
registration._TUNERS = ("stand_in_tuner",)
"""


def test_tuners_are_imported_after_peft():
    run(
        STAND_IN
        + """
import importlib.util
before = list(sys.meta_path)
import hf_aegis
assert "peft" not in sys.modules and "torch" not in sys.modules and "stand_in_tuner" not in sys.modules
registration.register_with_peft()
assert sum(type(f).__name__ == "_PeftFinder" for f in sys.meta_path) == 1
# Looking for it is not importing it.
assert importlib.util.find_spec("peft") is not None and importlib.util.find_spec("peft.none") is None
assert "stand_in_tuner" in sys.modules
"""
    )
    run(
        STAND_IN
        + """
import importlib.util
import hf_aegis
spec = importlib.util.find_spec("peft")
assert spec is not None and "peft" not in sys.modules and "stand_in_tuner" not in sys.modules
import inspect, peft
assert "done = True" in inspect.getsource(peft)
assert "stand_in_tuner" in sys.modules
assert not any(type(f).__name__ == "_PeftFinder" for f in sys.meta_path)
"""
    )


def test_tuners_are_imported_at_once_where_peft_is():
    run(STAND_IN + "import peft\nimport hf_aegis\nassert 'stand_in_tuner' in sys.modules\n")


def test_a_peft_that_fails_to_import_may_be_imported_again():
    run(
        STAND_IN
        + """
import hf_aegis
init = folder / "peft" / "__init__.py"
init.write_text("raise ImportError('not yet')")
try:
    import peft
except ImportError as error:
    assert str(error) == "not yet"
assert "stand_in_tuner" not in sys.modules
init.write_text("done = 'really done'")
importlib.invalidate_caches()
import peft
assert "stand_in_tuner" in sys.modules
"""
    )


def test_a_missing_peft_is_still_missing():
    run(
        """
import sys
class Nothing:
    def find_spec(self, name, path, target=None):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
sys.meta_path.insert(0, Nothing())
import hf_aegis
try:
    import peft
except ModuleNotFoundError as error:
    assert error.name == "peft"
else:
    raise AssertionError
"""
    )


def test_registering_again_changes_nothing_and_another_by_that_name_is_refused():
    register_tuner(GSEConfig, GSEModel)

    class Other(GSEModel):
        pass

    with pytest.raises(ValueError, match=r"PEFT has a method with the name .*GSE"):
        register_tuner(GSEConfig, Other)
