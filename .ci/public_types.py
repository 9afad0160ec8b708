"""Checks how much of the public API has known types: pyright's `--verifytypes`, all of it.

Runs the pyright of the Python that runs this file, on the package as it is installed there (editable or not):
`python .ci/public_types.py`. Prints what has no known type.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

REQUIRED = 1.0

bin_folder = Path(sys.executable).parent
found = subprocess.run(
    [sys.executable, "-m", "pyright", "--verifytypes", "adaptive_optax", "--ignoreexternal", "--outputjson"],
    # Here pyright looks for the package in the Python that is first on the path, and nowhere else.
    env=os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
    capture_output=True,
    text=True,
)
report = json.loads(found.stdout)["typeCompleteness"]
for symbol in report["symbols"]:
    if symbol["isExported"] and not symbol["isTypeKnown"]:
        for diagnostic in symbol["diagnostics"] or [{"message": "of unknown or ambiguous type"}]:
            print(f"{symbol['name']}: {diagnostic['message']}")
score = report["completenessScore"]
folder = report["packageRootDirectory"]
print(f"{score:.2%} of the public API has known types, {REQUIRED:.0%} are required ({folder})")
sys.exit(score < REQUIRED)
