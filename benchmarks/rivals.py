"""The other tools that simplify a model: versions, environments, how each is run.

Each tool lives in an environment of its own, with the newest versions that PyPI has
(on 24 November 2026), and is run as its documentation says, at its defaults, from a
file to a file; none of them compares outputs (`check_n=0`, `model_check=False` are
their defaults). Where a tool has a leaner way from file to file, that one is taken.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks import environments

ROOT = Path(__file__).resolve().parent.parent
CACHE = environments.CACHE / "rivals"
ONNX, ORT = "onnx==1.23.2", "onnxruntime==1.32.0"

_ONNXOPT = """
import sys, onnxopt
onnxopt.simplify(sys.argv[1], validate=False).save(sys.argv[2])
"""
_ONNXSIM = """
import sys, onnxsim
model, _ = onnxsim.simplify(sys.argv[1], output_path=sys.argv[2])
"""
_ONNXSLIM = """
import sys, onnx, onnxslim
model = onnxslim.slim(sys.argv[1], model_check=False)
onnx.save(model, sys.argv[2])
"""
_ONNXSLIM_COMMAND = """
import sys, onnxslim
onnxslim.slim(sys.argv[1], sys.argv[2])
"""
_ONNXOPTIMIZER = """
import sys, onnx, onnxoptimizer
model = onnx.load(sys.argv[1])
onnx.save(onnxoptimizer.optimize(model), sys.argv[2])
"""
_ONNXSCRIPT = """
import sys, onnx_ir, onnxscript.optimizer
model = onnx_ir.load(sys.argv[1])
onnxscript.optimizer.optimize(model)
lazy = any(isinstance(value.const_value, onnx_ir.ExternalTensor)
           for value in model.graph.initializers.values())
onnx_ir.save(model, sys.argv[2], external_data="weights.data" if lazy else None)
"""
_ORT = """
import os, sys, onnxruntime as ort
source, target, level = sys.argv[1:]
options = ort.SessionOptions()
options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
options.optimized_model_filepath = target
options.log_severity_level = 4
if any(name.endswith((".bin", ".data")) for name in os.listdir(os.path.dirname(source))):
    key = "session.optimized_model_external_initializers_file_name"
    options.add_session_config_entry(key, "weights.data")
ort.InferenceSession(source, options, ["CPUExecutionProvider"])
"""


@dataclass(frozen=True)
class Tool:
    """One way to simplify a file."""

    name: str
    environment: str
    packages: tuple[str, ...]
    script: str
    arguments: tuple[str, ...] = ()
    leader: bool = False
    """One of those that CPU time and memory are compared with."""
    interpreter: str = ""
    """What runs it in place of its environment's."""

    def python(self) -> str:
        """The interpreter of its environment."""
        return self.interpreter or str(CACHE / self.environment / "bin" / "python")

    def command(self, source: Path, target: Path) -> list[str]:
        """What simplifies `source` into `target`."""
        given = ["-c", self.script, str(source), str(target)]
        return [self.python(), *given, *self.arguments]

    def bare(self) -> list[str]:
        """What only imports onnx there."""
        return [self.python(), "-c", "import onnx"]

    def build(self) -> None:
        """Make its environment, where it is not there with these versions.

        Ours is installed anew, as a user would: from a wheel of this checkout.
        """
        python = environments.build(CACHE / self.environment, self.packages)
        if self.name == "onnxopt":
            install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*install, "--force-reinstall", str(ROOT)], check=True)


_NEEDED = (
    "click==8.5.1",
    "ml_dtypes==0.6.0",
    "msgspec==0.22.0",
    "onnx_graphsurgeon==0.6.1",
    "PyYAML==6.0.3",
    "rich==15.0.0",
)
_SLIM = ("onnxslim==0.1.98", ONNX, ORT)
TOOLS = {
    tool.name: tool
    for tool in (
        Tool("onnxopt", "onnxopt", (*_NEEDED, ONNX, ORT), _ONNXOPT),
        Tool("onnxsim", "onnxsim", ("onnxsim==0.8.1", ONNX, ORT), _ONNXSIM, leader=True),
        Tool("onnxslim", "onnxslim", _SLIM, _ONNXSLIM, leader=True),
        Tool("onnxslim-command", "onnxslim", _SLIM, _ONNXSLIM_COMMAND),
        Tool(
            "onnxscript",
            "onnxscript",
            ("onnxscript==0.7.2", ONNX, ORT),
            _ONNXSCRIPT,
            leader=True,
        ),
        Tool(
            "onnxoptimizer",
            "onnxoptimizer",
            ("onnxoptimizer==0.4.2", ONNX),
            _ONNXOPTIMIZER,
        ),
        Tool("ort-basic", "ort", (ORT, ONNX), _ORT, ("ORT_ENABLE_BASIC",)),
        Tool("ort-extended", "ort", (ORT, ONNX), _ORT, ("ORT_ENABLE_EXTENDED",)),
    )
}
