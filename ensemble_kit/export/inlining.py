"""Imported graphs: what their matrices are, and how they become part of another graph.

Imports ``foreign``.
"""

import onnx_ir as ir

from ensemble_kit.networks.foreign import DOMAIN, MEMBER, OPERATOR


def inline_foreign(model: ir.Model, imported: ir.Model, member: str, *, prefix: str) -> None:
    """Put an imported graph in the place of the operator that stands for it.

    Args:
        model: The graph with the operator; of the same opset.
        imported: The graph; taken apart.
        member: What the operator is marked with, and what the names of nodes then begin with.
        prefix: What the names of its weights begin with; they become initialisers without values.
    """
    graph, inner = model.graph, imported.graph
    (call,) = (
        node
        for node in graph
        if (node.domain, node.op_type) == (DOMAIN, OPERATOR)
        and node.attributes.get_string(MEMBER) == member
    )
    _rename(inner, member)
    given = list(call.inputs)
    for index, value in enumerate(list(inner.inputs)):
        if index < len(given):
            fed = given[index]
            assert fed is not None
            value.replace_all_uses_with(fed)
            continue
        name = prefix + str(value.name).removeprefix(f"{member}/")
        weight = ir.Value(name=name, shape=value.shape, type=value.type)
        graph.initializers.add(weight)
        value.replace_all_uses_with(weight)
    for value in list(inner.initializers.values()):
        del inner.initializers[str(value.name)]
        graph.register_initializer(value)
    nodes = list(inner)
    inner.remove(nodes)
    graph.insert_before(call, nodes)
    call.outputs[0].replace_all_uses_with(inner.outputs[0])
    graph.remove(call, safe=True)


def _rename(graph: ir.Graph, member: str) -> None:
    """Put the member before every name, so that no two graphs share one."""
    for value in graph.inputs:
        value.name = f"{member}/{value.name}"
    for value in list(graph.initializers.values()):
        value.name = f"{member}/{value.name}"
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.name:
            node.name = f"{member}/{node.name}"
        for value in node.outputs:
            if value.name:
                value.name = f"{member}/{value.name}"
