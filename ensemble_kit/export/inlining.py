"""Make foreign graphs part of an exported graph."""

import onnx_ir as ir

from ensemble_kit.networks.foreign import DOMAIN, MEMBER, OPERATOR


def inline_foreign(model: ir.Model, foreign: ir.Model, member: str, *, prefix: str) -> None:
    """Replace the operator that stands for a foreign graph by the graph itself.

    Args:
        model: The model with the operator; its opset is that of ``foreign``.
        foreign: The foreign model; its nodes are moved out of it.
        member: The member's name, which marks the operator and becomes a prefix of node names.
        prefix: Prefix of the names of its weights, which become initialisers without values.
    """
    graph, inner = model.graph, foreign.graph
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
    """Prefix every name with the member's, so that no two graphs share a name."""
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
