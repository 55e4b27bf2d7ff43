"""Print this interpreter's version and path if pyproject.toml supports it; else exit with 1, under any Python."""

import pathlib
import re
import sys
import sysconfig

pyproject = pathlib.Path(__file__).resolve().parent.parent / "pyproject.toml"
oldest, beyond = re.search(r'requires-python = ">=([\d.]+),<([\d.]+)"', pyproject.read_text()).groups()
version = sys.version_info[:3]
in_range = tuple(map(int, oldest.split("."))) <= version < tuple(map(int, beyond.split(".")))
# torch is built neither for PyPy nor for a Python without the global lock
if not in_range or sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(1)
# of an active environment the interpreter beneath: the environment may be the one that is made anew
print(".".join(map(str, version)), getattr(sys, "_base_executable", sys.executable))
