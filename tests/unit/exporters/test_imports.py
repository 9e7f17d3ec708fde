from __future__ import annotations

import subprocess
import sys


def test_importing_the_package_of_exporters_does_not_import_onnx_or_onnxruntime() -> None:
    code = "import mfcompile.exporters, sys; print(sorted({'onnx', 'onnxruntime', 'onnxscript', 'onnx_ir'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
