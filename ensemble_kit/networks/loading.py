"""Models from files, ready to tag videos.

``load`` opens a checkpoint, an imported model, a fused file or an ONNX file; what it returns turns
a batch of records into probabilities, whichever it was.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from safetensors import SafetensorError

from ensemble_kit.data.dataset import Batch, Records
from ensemble_kit.data.schema import Schema, check_fits
from ensemble_kit.errors import CheckpointError
from ensemble_kit.metrics import Metrics
from ensemble_kit.networks.ensemble import FusedEnsemble, module_name
from ensemble_kit.networks.foreign import GRAPH, ForeignModel
from ensemble_kit.networks.member import MemberModel
from ensemble_kit.networks.onnx_model import OnnxModel
from ensemble_kit.networks.running import measure, require_device, runner
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.networks.weights import Tensors, count_stored, fill, foreign_weights
from ensemble_kit.recipes.reading import parse_recipe
from ensemble_kit.store.provenance import (
    CheckpointMetadata,
    ForeignMetadata,
    FusedMetadata,
    MappingMetadata,
    MemberMetadata,
    ModelKind,
)
from ensemble_kit.store.tensor_files import TensorFile, open_tensors


class LoadedModel:
    """A model that tags videos, whatever file it came from.

    Attributes:
        path: The file.
        kind: ``checkpoint``, ``foreign``, ``fused`` or ``onnx``.
        name: The run's name, or the file's stem.
        schema: What its inputs and classes are.
        repeats: Draws whose probabilities are averaged; 1 where nothing is drawn.
        num_values: Numbers stored: parameters and statistics. 0 for an ONNX file.
    """

    def __init__(
        self,
        path: Path,
        kind: ModelKind,
        name: str,
        schema: Schema,
        repeats: int,
        num_values: int,
        run: Callable[[Batch], np.ndarray[Any, Any]],
    ) -> None:
        self.path = path
        self.kind = kind
        self.name = name
        self.schema = schema
        self.repeats = repeats
        self.num_values = num_values
        self._run = run

    def probabilities(self, batch: Batch) -> np.ndarray[Any, Any]:
        """Return the probability of every class, ``(B, C)`` float32, for a batch of records."""
        return self._run(batch)

    def measure(self, records: Records, *, k: int = 20) -> Metrics:
        """Return the model's metrics on some records.

        Raises:
            PredictionsError: The records are not of the model's modalities or vocabulary.
        """
        check_fits(self.schema, records.schema, path=self.path)
        return measure(self._run, records, k=k)


def load(path: Path, *, repeats: int | None = None, device: str = "cpu") -> LoadedModel:
    """Open a checkpoint, an imported model, a fused file or an ONNX file.

    Args:
        path: A ``.safetensors`` or ``.onnx`` file of the kit.
        repeats: R for test-time draws; None means 1, or what an ONNX file was exported with.
        device: ``cpu`` or ``cuda``.

    Raises:
        CheckpointError: The file is missing, damaged or of another kind, or ``repeats`` was given
            for an ONNX file, whose number is fixed.
        ProviderError: There is no such device, or ONNX Runtime cannot open the file on it.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        return _load_onnx(path, repeats, device)
    require_device(device)
    with open_tensors(path) as file:
        if file.kind == "fused":
            fused = file.metadata_as(FusedMetadata)
            ensemble = load_fused(file, repeats=repeats or 1).to(device)
            return LoadedModel(
                path,
                "fused",
                path.stem,
                fused.data_schema,
                ensemble.repeats,
                sum(member.num_values for member in fused.members),
                runner(ensemble, None, device),
            )
        record = member_file_metadata(file)
        model: MemberModel = load_member(file).to(device)
    draws = model.draws_for(record.name, repeats=repeats or 1)
    return LoadedModel(
        path,
        record.kind,
        record.name,
        record.data_schema,
        1 if draws is None else draws.shape[0],
        count_stored(file),
        runner(model, draws, device),
    )


def load_sub_model(file: TensorFile) -> SubModel:
    """Build the sub-model of an open checkpoint, in float32 and evaluation mode."""
    return build_sub_model(file.metadata_as(CheckpointMetadata), file, path=file.path)


def build_sub_model(record: CheckpointMetadata, tensors: Tensors, *, path: Path) -> SubModel:
    """Build the sub-model of a record, in float32 and evaluation mode; faults name ``path``."""
    with torch.device("meta"):
        model = SubModel(parse_recipe(record.recipe), record.data_schema)
    fill(model, tensors, prefix="", path=path)
    return model.eval()


def member_file_metadata(file: TensorFile) -> CheckpointMetadata | ForeignMetadata:
    """Return what an open file says of itself that can be a member: trained, or imported.

    Raises:
        CheckpointError: The file is of another kind.
    """
    if file.kind == "foreign":
        return file.metadata_as(ForeignMetadata)
    return file.metadata_as(CheckpointMetadata)


def load_member(file: TensorFile, tensors: Tensors | None = None) -> MemberModel:
    """Build the model of an open checkpoint or imported file, in evaluation mode.

    Args:
        file: The file.
        tensors: What to take in place of the file's own tensors, if anything.
    """
    record = member_file_metadata(file)
    if isinstance(record, CheckpointMetadata):
        return build_sub_model(record, tensors or file, path=file.path)
    model = empty_foreign(file, record.mapping, record.data_schema, name=record.name)
    model.weights = foreign_weights(model, tensors or file, path=file.path)
    return model.eval()


def load_fused(file: TensorFile, *, repeats: int) -> FusedEnsemble:
    """Build the ensemble of an open fused file, its weights in float32, in evaluation mode."""
    record = file.metadata_as(FusedMetadata)
    members = {m.name: load_fused_member(file, m, record.data_schema) for m in record.members}
    coefficients = [member.coefficient for member in record.members]
    return FusedEnsemble(members, coefficients, record.data_schema, repeats=repeats).eval()


def load_fused_member(file: TensorFile, member: MemberMetadata, schema: Schema) -> MemberModel:
    """Build one member of an open fused file, its weights in float32, in evaluation mode."""
    prefix = member_prefix(member.name)
    with torch.device("meta"):
        model = empty_member(file, member, schema)
    if isinstance(model, ForeignModel):
        model.weights = foreign_weights(model, file, prefix=prefix, path=file.path)
    else:
        fill(model, file, prefix=prefix, path=file.path)
    return model.eval()


def empty_member(
    file: TensorFile, member: MemberMetadata, schema: Schema
) -> SubModel | ForeignModel:
    """Build one member of an open fused file without its weights."""
    if member.mapping is not None:
        prefix = member_prefix(member.name)
        return empty_foreign(file, member.mapping, schema, prefix=prefix, name=member.name)
    assert member.recipe is not None
    return SubModel(parse_recipe(member.recipe), schema)


def empty_foreign(
    file: TensorFile, mapping: MappingMetadata, schema: Schema, *, prefix: str = "", name: str
) -> ForeignModel:
    """Build an imported model without its weights.

    Raises:
        CheckpointError: Its graph is missing or damaged.
    """
    graph = onnx.ModelProto()
    try:
        graph.ParseFromString(file.array(prefix + GRAPH).tobytes())
    except (SafetensorError, DecodeError) as error:
        raise CheckpointError(
            f"{file.path}: tensor {prefix + GRAPH} is missing or holds no ONNX graph.",
            hint="Import the model again from its ONNX file.",
        ) from error
    return ForeignModel(graph, mapping, schema, name=name)


def member_prefix(name: str) -> str:
    """Return what a member's tensor names begin with in a fused file."""
    return f"{module_name(name)}."


def _load_onnx(path: Path, repeats: int | None, device: str) -> LoadedModel:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.", hint="Name a file that exists.")
    onnx_model = OnnxModel(path, repeats=repeats, device=device)
    schema, repeats = onnx_model.schema, onnx_model.repeats
    return LoadedModel(path, "onnx", path.stem, schema, repeats, 0, onnx_model.probabilities)
