"""Refusals inside an exported graph, for servers that run it without ``OnnxEnsemble``.

ONNX Runtime's recurrent operators end the process (SIGSEGV) on a batch of no videos, and other
operators fail on no videos or no frames in words about broadcasting. So the graph reads each of its
inputs through a Reshape to the shape that the input has, with every size at least 1. That shares
the input's memory and fails if the input holds nothing; the name of the node says why.
"""

from collections.abc import Sequence

import onnx_ir as ir

REFUSAL = "no_videos_or_no_frames"  # what the nodes' names begin with, which errors show


def refuse_empty_inputs(inputs: Sequence[ir.Value], model: ir.Model) -> None:
    """Have a graph refuse inputs in which the number of videos, frames or repeats is 0.

    Args:
        inputs: The inputs that a server gives.
        model: The graph.
    """
    graph = model.graph
    one = ir.Value(name=f"{REFUSAL}/one", const_value=ir.tensor([1], name=f"{REFUSAL}/one"))
    graph.register_initializer(one)
    for value in inputs:
        shape = ir.node("Shape", [value])
        least = ir.node("Max", [shape.outputs[0], one])
        held = ir.node("Reshape", [value, least.outputs[0]])
        for node in (shape, least, held):
            node.name = f"{REFUSAL}/{value.name}/{node.op_type}"
        (output,) = held.outputs
        output.shape, output.type = value.shape, value.type
        value.replace_all_uses_with(output)
        for node in (shape, held):  # which read the input itself
            node.replace_input_with(0, value)
        graph.insert_before(graph[0], [shape, least, held])
