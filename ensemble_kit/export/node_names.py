"""Names for the nodes of an exported graph: member, part and operator.

PyTorch's exporter calls nodes ``node_MatMul_103``, and notes which modules were being called. Where
several methods of one module are called, it does not note which member a node belongs to, so the
graph is searched for that: a node that only one member's output depends on is that member's.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
SHARED, MIXTURE = "frames", "mixture"  # nodes before and after those of single members


def name_nodes(model: ir.Model, members: Sequence[str], outputs: Sequence[ir.Value]) -> None:
    """Name every node ``member/part/Operator``; later nodes of one name get a number.

    Args:
        model: The graph. The exporter's notes are removed: they take a kilobyte for each node, and
            hold paths of this machine.
        members: The members' names.
        outputs: One value of each member, which only its own nodes and shared ones lead to.
    """
    owners = _owners(members, outputs)
    parts: dict[ir.Node | None, tuple[int, str]] = {}
    counts: Counter[str] = Counter()
    taken = {node.name for node in model.graph if not _is_named_by_exporter(node)}
    for position, node in enumerate(model.graph):
        part = _part(node) or _part_before(node, parts)
        parts[node] = position, part
        if _is_named_by_exporter(node):
            found = owners.get(node, [])
            owner = found[0] if len(found) == 1 else SHARED if found else MIXTURE
            name = "/".join(filter(None, [owner, part if len(found) == 1 else "", node.op_type]))
            counts[name] += 1
            while (wanted := name if counts[name] == 1 else f"{name}_{counts[name]}") in taken:
                counts[name] += 1  # a node of a foreign graph is called so
            node.name = wanted
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    model.graph.metadata_props.clear()


def _is_named_by_exporter(node: ir.Node) -> bool:
    return not node.name or node.name.startswith("node_")


def _owners(members: Sequence[str], outputs: Sequence[ir.Value]) -> dict[ir.Node, list[str]]:
    """Return, for each node, the members whose outputs depend on it."""
    owners: dict[ir.Node, list[str]] = {}
    for member, output in zip(members, outputs, strict=True):
        waiting = [output]
        while waiting:
            node = waiting.pop().producer()
            if node is None or member in owners.setdefault(node, []):
                continue
            owners[node].append(member)
            waiting += [value for value in node.inputs if value is not None]
    return owners


def _part(node: ir.Node) -> str:
    """Return the part of a sub-model whose module was called, such as ``pooling.rgb``."""
    scopes = node.metadata_props.get(SCOPES, "")
    # '', 'ensemble', 'ensemble.member_x.poolings.stream_rgb.assignment', 'matmul'
    for scope in scopes.strip("[]").split(", ")[::-1]:
        _, found, rest = scope.strip("'").partition("ensemble.member_")
        if found:
            words = rest.split(".")[1:3]
            if words[:1] == ["poolings"]:
                return f"pooling.{words[1].removeprefix('stream_')}"
            return words[0] if words else ""
    return ""


def _part_before(node: ir.Node, parts: Mapping[ir.Node | None, tuple[int, str]]) -> str:
    """Return the part that computes the latest of a node's inputs, which the node continues."""
    producers = [value.producer() for value in node.inputs if value is not None]
    known = [parts[producer] for producer in producers if producer in parts]
    return max((found for found in known if found[1]), default=(0, ""))[1]
