"""Models from files, ready to tag videos.

``load`` opens a checkpoint, a foreign model, a fused file or an ONNX file. Whichever it was, the
result turns a batch of records into probabilities.
"""

import logging
from collections.abc import Callable
from os.path import isfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from safetensors import SafetensorError

from ensemble_kit.choices import DEVICE, TOP_K, AnyPath, Dtype
from ensemble_kit.data.dataset import Batch, Records
from ensemble_kit.data.schema import Schema, check_fits
from ensemble_kit.errors import CheckpointError, ForeignModelError
from ensemble_kit.metrics import Metrics
from ensemble_kit.networks.building import TrainedModel, build_model, empty_model, without_memory
from ensemble_kit.networks.ensemble import FusedEnsemble, module_name
from ensemble_kit.networks.foreign import GRAPH, ForeignModel
from ensemble_kit.networks.member import MemberModel
from ensemble_kit.networks.onnx_model import OnnxModel
from ensemble_kit.networks.running import measure, require_device, runner
from ensemble_kit.networks.weights import (
    Tensors,
    count_stored,
    fill,
    foreign_weights,
)
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

LOGGER = logging.getLogger(__name__)


class Rounding(Protocol):
    """What rounds the weights of a member's file to a precision."""

    @property
    def dtype(self) -> Dtype:
        """The precision."""

    def tensors(self, file: TensorFile) -> Tensors:
        """Return the tensors of an open checkpoint or foreign model, rounded."""


class LoadedModel:
    """A model that tags videos, from any file.

    Attributes:
        path: The file.
        kind: ``checkpoint``, ``foreign``, ``fused`` or ``onnx``.
        name: The run's name, or the file's stem.
        schema: Its modalities and classes.
        repeats: R, the number of draws whose probabilities are averaged; 1 where nothing is drawn.
        num_values: How many numbers the file stores, parameters and statistics; 0 for an ONNX file.
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
        """Return the probability of every class, ``(B, C)`` float32, for a batch of records.

        Raises:
            ValueError: The batch holds no videos or no frames.
        """
        return self._run(batch)

    def measure(self, records: Records, *, k: int = TOP_K) -> Metrics:
        """Return the model's metrics on some records.

        Raises:
            PredictionsError: The records are not of the model's modalities or vocabulary, or the
                model returns what is no probability, such as NaN.
        """
        check_fits(self.schema, records.schema, path=self.path)
        return measure(self._run, records, k=k, source=self.path)


def load(
    path: AnyPath,
    *,
    repeats: int | None = None,
    device: str = DEVICE,
    rounded: Rounding | None = None,
) -> LoadedModel:
    """Open a checkpoint, a foreign model, a fused file or an ONNX file.

    Args:
        path: A ``.safetensors`` or ``.onnx`` file of the kit.
        repeats: R for test-time draws; None means 1, or as many as an ONNX file was exported with.
        device: ``cpu`` or ``cuda``.
        rounded: What rounds the weights of a checkpoint or foreign model.

    Raises:
        CheckpointError: The file is missing, damaged, changed since it was fused or of another
            kind; or ``repeats`` was given for an ONNX file, whose number is fixed, or ``rounded``
            for a file of an ensemble.
        ProviderError: There is no such device, or ONNX Runtime cannot open the file on it.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        LOGGER.info("load %s", path)
        _refuse_rounding(path, "ONNX", rounded)
        return _load_onnx(path, repeats, device)
    with open_tensors(path) as file:
        return load_opened(file, repeats=repeats, device=device, rounded=rounded)


def load_opened(
    file: TensorFile, *, repeats: int | None, device: str, rounded: Rounding | None
) -> LoadedModel:
    """Build the model of an open checkpoint, foreign model or fused file; see ``load``."""
    LOGGER.info("load %s", file.path)
    require_device(device)
    if file.kind == "fused":
        _refuse_rounding(file.path, "fused", rounded)
        fused = file.metadata_as(FusedMetadata)
        ensemble = load_fused(file, repeats=repeats or 1).to(device)
        file.refuse_changed(fused.content_sha256)
        return LoadedModel(
            file.path,
            "fused",
            file.path.stem,
            fused.data_schema,
            ensemble.repeats,
            sum(member.num_values for member in fused.members),
            runner(ensemble, None, device),
        )
    metadata = member_file_metadata(file)
    tensors = None if rounded is None else rounded.tensors(file)
    model: MemberModel = load_member(file, tensors).to(device)
    draws = model.draws_for(metadata.name, repeats=repeats or 1)
    return LoadedModel(
        file.path,
        metadata.kind,
        metadata.name,
        metadata.data_schema,
        1 if draws is None else draws.shape[0],
        count_stored(file),
        runner(model, draws, device),
    )


def _refuse_rounding(path: Path, kind: str, rounded: Rounding | None) -> None:
    if rounded is not None:
        raise CheckpointError(
            f"{path} is {'an' if kind == 'ONNX' else 'a'} {kind} file, whose weights are rounded "
            f"already; it cannot be run in {rounded.dtype}.",
            hint="Leave out --dtype, or name a checkpoint.",
        )


def build_trained(metadata: CheckpointMetadata, tensors: Tensors, *, path: Path) -> TrainedModel:
    """Build the model that metadata describe, in float32 and evaluation mode.

    Args:
        metadata: The recipe and the schema.
        tensors: Its weights.
        path: The file that errors name.
    """
    model = empty_model(parse_recipe(metadata.recipe), metadata.data_schema)
    fill(model, tensors, prefix="", path=path)
    return model.eval()


def member_file_metadata(file: TensorFile) -> CheckpointMetadata | ForeignMetadata:
    """Return the metadata of an open file that can be a member: a checkpoint or a foreign model.

    Raises:
        CheckpointError: The file is of another kind.
    """
    if file.kind == "foreign":
        return file.metadata_as(ForeignMetadata)
    return file.metadata_as(CheckpointMetadata)


def load_member(file: TensorFile, tensors: Tensors | None = None) -> MemberModel:
    """Build the model of an open checkpoint or foreign model, in evaluation mode.

    Args:
        file: The file.
        tensors: Tensors to use in place of the file's own, if any.
    """
    metadata = member_file_metadata(file)
    if isinstance(metadata, CheckpointMetadata):
        return build_trained(metadata, tensors or file, path=file.path)
    model = empty_foreign(file, metadata.mapping, metadata.data_schema, name=metadata.name)
    model.weights = foreign_weights(model, tensors or file, path=file.path)
    return model.eval()


def load_fused(file: TensorFile, *, repeats: int) -> FusedEnsemble:
    """Build the ensemble of an open fused file, its weights in float32, in evaluation mode."""
    metadata = file.metadata_as(FusedMetadata)
    members = {m.name: load_fused_member(file, m, metadata.data_schema) for m in metadata.members}
    coefficients = [member.coefficient for member in metadata.members]
    return FusedEnsemble(members, coefficients, metadata.data_schema, repeats=repeats).eval()


def load_fused_member(file: TensorFile, member: MemberMetadata, schema: Schema) -> MemberModel:
    """Build one member of an open fused file, its weights in float32, in evaluation mode."""
    prefix = member_prefix(member.name)
    with without_memory(member.name):
        model = empty_member(file, member, schema)
    if isinstance(model, ForeignModel):
        model.weights = foreign_weights(model, file, prefix=prefix, path=file.path)
    else:
        fill(model, file, prefix=prefix, path=file.path)
    return model.eval()


def empty_member(
    file: TensorFile, member: MemberMetadata, schema: Schema
) -> TrainedModel | ForeignModel:
    """Build one member of an open fused file without its weights."""
    if member.mapping is not None:
        prefix = member_prefix(member.name)
        return empty_foreign(file, member.mapping, schema, prefix=prefix, name=member.name)
    assert member.recipe is not None
    return build_model(parse_recipe(member.recipe), schema)


def empty_foreign(
    file: TensorFile, mapping: MappingMetadata, schema: Schema, *, prefix: str = "", name: str
) -> ForeignModel:
    """Build a foreign model without its weights.

    Raises:
        CheckpointError: The graph is missing or damaged.
    """
    graph = onnx.ModelProto()
    try:
        graph.ParseFromString(file.array(prefix + GRAPH).tobytes())
        model = ForeignModel(graph, mapping, schema, name=name)
        is_whole = [each.name for each in mapping.inputs] == [each.name for each in model.inputs]
        is_whole = is_whole and len(graph.graph.output) == 1
    except (SafetensorError, DecodeError, UnicodeDecodeError, ValueError, ForeignModelError):
        is_whole = False
    if not is_whole:
        raise CheckpointError(
            f"{file.path}: tensor {prefix + GRAPH} is missing, or is not the ONNX graph of the "
            "metadata.",
            hint="Import the model again from its ONNX file.",
        )
    return model


def member_prefix(name: str) -> str:
    """Return the prefix of a member's tensor names in a fused file."""
    return f"{module_name(name)}."


def _load_onnx(path: Path, repeats: int | None, device: str) -> LoadedModel:
    if not isfile(path):
        raise CheckpointError(f"{path} does not exist.", hint="Name a file that exists.")
    onnx_model = OnnxModel(path, repeats=repeats, device=device)
    schema, repeats = onnx_model.schema, onnx_model.repeats
    return LoadedModel(path, "onnx", path.stem, schema, repeats, 0, onnx_model.probabilities)
