"""From an ONNX file to a file of the kit, proved before it is written."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ensemble_kit._version import __version__
from ensemble_kit.choices import OPSET
from ensemble_kit.errors import EnsembleKitError, ForeignModelError
from ensemble_kit.foreign.mapping import check_inputs, explicit_layouts, map_inputs
from ensemble_kit.foreign.onnx_source import Foreign, read_foreign, root_of
from ensemble_kit.foreign.plan import ImportPlan
from ensemble_kit.foreign.proof import prove, sizes_of_proof
from ensemble_kit.networks.foreign import GRAPH, WEIGHTS, ForeignModel
from ensemble_kit.networks.storage import is_finite
from ensemble_kit.networks.weights import not_finite
from ensemble_kit.store.provenance import FileMetadata, ForeignMetadata, MappingMetadata
from ensemble_kit.store.tensor_files import save_tensors


@dataclass(frozen=True)
class ForeignFile:
    """The file of a foreign model that has passed its proofs.

    Attributes:
        path: The file.
        name: The name of the model in predictions and selections.
        num_values: How many numbers ``fuse`` will store for it in its precision.
        worst_difference: The largest difference of any probability from the original file's.
    """

    path: Path
    name: str
    num_values: int
    worst_difference: float


def convert(plan: ImportPlan) -> ForeignFile:
    """Read, check, prove and write a foreign model in this process; see ``import_onnx``."""
    foreign, model, metadata = _built(plan)
    tensors = {WEIGHTS + name: tensor for name, tensor in model.weights.items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise not_finite(plan.model, name.removeprefix(WEIGHTS))
    worst = prove(model, foreign, plan.model, plan.lengths)
    num_values = sum(tensor.numel() for tensor in tensors.values())
    graph = np.frombuffer(foreign.graph.SerializeToString(), np.uint8).copy()
    tensors[GRAPH] = torch.from_numpy(graph)
    save_tensors(plan.output, tensors, metadata, force=plan.force)
    return ForeignFile(plan.output, plan.name, num_values, worst)


def _built(plan: ImportPlan) -> tuple[Foreign, ForeignModel, ForeignMetadata]:
    """Return the model with its weights; whatever a damaged file does is one error."""
    path, schema = plan.model, plan.data_schema
    try:
        foreign = read_foreign(path, output=plan.probabilities, opset=OPSET)
        mapped = map_inputs(
            path,
            foreign.inputs,
            schema,
            inputs=plan.inputs,
            num_frames=plan.num_frames,
            is_frame=plan.is_frame,
        )
        metadata = ForeignMetadata(
            kit_version=__version__,
            name=plan.name,
            mapping=MappingMetadata(
                frames=plan.frames,
                inputs=mapped,
                activation=plan.activation,
                max_frames=max(length for _, length in sizes_of_proof(plan.lengths)),
            ),
            data_schema=schema,
            onnx=FileMetadata.of(path, plan.output.parent, sha256=foreign.sha256),
        )
        model = ForeignModel(foreign.graph, metadata.mapping, schema, name=str(path))
        check_inputs(model, path, explicit_layouts(plan.inputs))
        model.weights = {name: foreign.tensor(name) for name in foreign.weights}
    except EnsembleKitError:
        raise
    except Exception as error:  # those of protobuf, onnx_ir and NumPy have no common class
        raise ForeignModelError(
            f"{path} cannot be read as an ONNX model: {root_of(error)}.",
            hint="Export the model again from the framework that made it.",
        ) from error
    return foreign, model, metadata
