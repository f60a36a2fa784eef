"""CPU time of indexing and editing graphs of many nodes.

    python benchmarks/edits.py [--nodes 1000 5000 20000 100000] [--repeat 3]

A quarter of the nodes are Identities to bypass and a quarter are dead; the rest is a
chain with a weight at every second node. Shown are CPU seconds, the best of the
repeats: opening (copy, checks, index), the bypasses, dead code, and all three per
1,000 nodes, which stays the same where the time grows linearly.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt.manager import PassManager
from onnxopt.model import Model
from onnxopt.recipe import parse_pipeline

SIZES = (1_000, 5_000, 20_000, 100_000)
LIMIT_SECONDS = 1.0
"""What 20,000 nodes, 5,000 bypasses and as many dead nodes may take at most."""


@dataclass(frozen=True)
class Times:
    """CPU seconds of the stages, and how many edits were made."""

    nodes: int
    open: float
    bypass: float
    dead: float
    edits: int

    @property
    def total(self) -> float:
        return self.open + self.bypass + self.dead


def make_model(nodes: int) -> ModelProto:
    """x -> (Relu -> Identity -> Add of a weight, with a Neg that nobody reads) -> y."""
    made, weights = [], []
    for index in range(nodes // 4):
        given, weight = f"x{index}", f"w{index}"
        values = np.full(4, index, np.float32)
        weights.append(numpy_helper.from_array(values, weight))
        made += [
            helper.make_node("Relu", [given], [f"r{index}"], name=f"relu{index}"),
            helper.make_node("Identity", [f"r{index}"], [f"i{index}"], name=f"i{index}"),
            helper.make_node("Neg", [f"r{index}"], [f"n{index}"], name=f"n{index}"),
            helper.make_node("Add", [f"i{index}", weight], [f"x{index + 1}"]),
        ]
    graph = helper.make_graph(
        made,
        "large",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info(f"x{nodes // 4}", TensorProto.FLOAT, [4])],
        weights,
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def measure(nodes: int) -> Times:
    """One run over a fresh model."""
    proto = make_model(nodes)
    stages = [time.process_time()]
    model = Model.open(proto)
    stages.append(time.process_time())
    for name in ("identity", "dead-code"):
        PassManager(parse_pipeline(name)).run(model)
        stages.append(time.process_time())
    assert len(model.main.nodes()) == nodes // 2
    seconds = [after - before for before, after in itertools.pairwise(stages)]
    return Times(nodes, *seconds, edits=model.ledger.edits)


def best(nodes: int, repeat: int) -> Times:
    """The fastest of some runs: others only tell how busy the machine was."""
    return min((measure(nodes) for _ in range(repeat)), key=lambda times: times.total)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    print("CPU seconds\n")
    heads = ("nodes", "edits", "open", "bypass", "dead code", "total", "per 1,000")
    print("".join(f"{head:>11}" for head in heads))
    for nodes in given.nodes:
        times = best(nodes, given.repeat)
        seconds = (times.open, times.bypass, times.dead, times.total)
        print(
            f"{nodes:11,}{times.edits:11,}"
            + "".join(f"{value:11.3f}" for value in seconds)
            + f"{times.total * 1000 / nodes:11.4f}"
        )
    print(
        f"\nlimit at 20,000 nodes: {LIMIT_SECONDS} s; again: python benchmarks/edits.py"
    )


if __name__ == "__main__":
    main()
