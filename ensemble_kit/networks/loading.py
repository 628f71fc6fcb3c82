"""Models from files, ready to tag videos. Imports ``checkpoints``, ``submodel``, ``ensemble``.

``load`` opens a checkpoint, an imported model, a fused file or an ONNX file; what it returns turns
a batch of records into probabilities, whichever it was.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from safetensors import SafetensorError
from torch import Tensor

from ensemble_kit.data.dataset import Batch, Records
from ensemble_kit.data.schema import Schema
from ensemble_kit.errors import CheckpointError, PredictionsError, ProviderError
from ensemble_kit.metrics import Metrics, MetricsAccumulator
from ensemble_kit.networks.ensemble import FusedEnsemble, module_name
from ensemble_kit.networks.foreign import GRAPH, WEIGHTS, ImportedModel, MemberModel
from ensemble_kit.networks.onnx_model import OnnxModel
from ensemble_kit.networks.storage import SCALE, Stored, is_finite
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.recipes.reading import parse_recipe
from ensemble_kit.store.provenance import (
    CheckpointRecord,
    FusedRecord,
    ImportedRecord,
    MappingRecord,
    MemberRecord,
    ModelKind,
)
from ensemble_kit.store.tensor_files import FLOATING, TensorFile, TensorSpec, open_tensors

BATCH_SIZE = 128  # videos at a time where nothing else is asked for; changes no result


class LoadedModel:
    """A model that tags videos, whatever file it came from.

    Attributes:
        path: The file.
        kind: ``checkpoint``, ``imported``, ``fused`` or ``onnx``.
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
            fused = file.record(FusedRecord)
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
        record = member_file_record(file)
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


def require_device(device: str) -> None:
    """Raise ``ProviderError`` unless PyTorch can run on a device, ``cpu`` or ``cuda``."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ProviderError(
            "PyTorch finds no CUDA device.",
            mend="Use --device cpu, or install a driver and a PyTorch built for CUDA.",
        )


class Tensors(Protocol):
    """Tensors by name: an open file, or what is computed from several."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The type and shape of every tensor."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the type that its spec says."""


def load_sub_model(file: TensorFile) -> SubModel:
    """Build the sub-model of an open checkpoint, in float32 and evaluation mode."""
    return build_sub_model(file.record(CheckpointRecord), file, path=file.path)


def build_sub_model(record: CheckpointRecord, tensors: Tensors, *, path: Path) -> SubModel:
    """Build the sub-model of a record, in float32 and evaluation mode; faults name ``path``."""
    with torch.device("meta"):
        model = SubModel(parse_recipe(record.recipe), record.data_schema)
    fill(model, tensors, prefix="", path=path)
    return model.eval()


def member_file_record(file: TensorFile) -> CheckpointRecord | ImportedRecord:
    """Return what an open file says of itself that can be a member: trained, or imported.

    Raises:
        CheckpointError: The file is of another kind.
    """
    if file.kind == "imported":
        return file.record(ImportedRecord)
    return file.record(CheckpointRecord)


def load_member(file: TensorFile, tensors: Tensors | None = None) -> MemberModel:
    """Build the model of an open checkpoint or imported file, in evaluation mode.

    Args:
        file: The file.
        tensors: What to take in place of the file's own tensors, if anything.
    """
    record = member_file_record(file)
    if isinstance(record, CheckpointRecord):
        return build_sub_model(record, tensors or file, path=file.path)
    model = empty_imported(file, record.mapping, record.data_schema, name=record.name)
    model.weights = _weights_of(model, tensors or file, path=file.path)
    return model.eval()


def load_fused(file: TensorFile, *, repeats: int) -> FusedEnsemble:
    """Build the ensemble of an open fused file, its weights in float32, in evaluation mode."""
    record = file.record(FusedRecord)
    members = {m.name: load_fused_member(file, m, record.data_schema) for m in record.members}
    coefficients = [member.coefficient for member in record.members]
    return FusedEnsemble(members, coefficients, record.data_schema, repeats=repeats).eval()


def load_fused_member(file: TensorFile, member: MemberRecord, schema: Schema) -> MemberModel:
    """Build one member of an open fused file, its weights in float32, in evaluation mode."""
    prefix = member_prefix(member.name)
    with torch.device("meta"):
        model = empty_member(file, member, schema)
    if isinstance(model, ImportedModel):
        model.weights = _weights_of(model, file, prefix=prefix, path=file.path)
    else:
        fill(model, file, prefix=prefix, path=file.path)
    return model.eval()


def empty_member(file: TensorFile, member: MemberRecord, schema: Schema) -> MemberModel:
    """Build one member of an open fused file without its weights."""
    if member.mapping is not None:
        prefix = member_prefix(member.name)
        return empty_imported(file, member.mapping, schema, prefix=prefix, name=member.name)
    assert member.recipe is not None
    return SubModel(parse_recipe(member.recipe), schema)


def empty_imported(
    file: TensorFile, mapping: MappingRecord, schema: Schema, *, prefix: str = "", name: str
) -> ImportedModel:
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
            mend="Import the model again from its ONNX file.",
        ) from error
    return ImportedModel(graph, mapping, schema, name=name)


def _weights_of(
    model: ImportedModel, tensors: Tensors, *, prefix: str = "", path: Path
) -> dict[str, Tensor]:
    """Return an imported model's weights in the types that its graph has them in."""
    return {
        name: read_weight(tensors, prefix + WEIGHTS + name, shape, path=path).to(dtype)
        for name, (dtype, shape) in model.weight_specs.items()
    }


def member_prefix(name: str) -> str:
    """Return what a member's tensor names begin with in a fused file."""
    return f"{module_name(name)}."


def fill(model: torch.nn.Module, file: Tensors, *, prefix: str, path: Path) -> None:
    """Give a model built on the meta device its tensors, floating ones in float32.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or holds NaN or infinity.
    """
    state: dict[str, Tensor] = {}
    for name, empty in model.state_dict().items():
        state[name] = read_weight(file, prefix + name, tuple(empty.shape), path=path)
    model.load_state_dict(state, assign=True)


def read_weight(file: Tensors, name: str, shape: tuple[int, ...], *, path: Path) -> Tensor:
    """Return a tensor of a file, in float32 if it is a floating one or has a scale.

    Raises:
        CheckpointError: It is missing, has another shape, or holds NaN or infinity.
    """
    _require_shape(file, name, [shape], path)
    tensor, scale = file.tensor(name), None
    if name + SCALE in file.specs:
        _require_shape(file, name + SCALE, [(shape[0], 1), (1, shape[-1])], path)
        scale = file.tensor(name + SCALE)
    if scale is not None or file.specs[name].dtype in FLOATING:
        tensor = Stored(tensor, scale).restored()
        if not is_finite(tensor):
            raise not_finite(path, name)
    return tensor


def _require_shape(file: Tensors, name: str, shapes: Sequence[tuple[int, ...]], path: Path) -> None:
    spec = file.specs.get(name)
    if spec is None or spec.shape not in shapes:
        found = "is missing" if spec is None else f"has shape {spec.shape}"
        needed = " or ".join(map(str, shapes))
        raise CheckpointError(
            f"{path}: tensor {name} {found}; its recipe needs {needed}.",
            mend="Make the file again with this version of ensemble-kit.",
        )


def not_finite(path: Path, name: str) -> CheckpointError:
    """Return the fault of a file one of whose tensors holds NaN or infinity."""
    return CheckpointError(
        f"{path}: tensor {name} holds NaN or infinity.",
        mend="Use a checkpoint from before the run diverged.",
    )


def count_stored(file: TensorFile) -> int:
    """Return how many numbers a file stores."""
    return sum(spec.num_values for spec in file.specs.values())


def to_torch(batch: Batch, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch's frames and frame counts as tensors on a device."""
    frames = {name: torch.from_numpy(values).to(device) for name, values in batch.frames.items()}
    return frames, torch.from_numpy(batch.num_frames).to(device)


def runner(
    model: torch.nn.Module, draws: Tensor | None, device: str
) -> Callable[[Batch], np.ndarray[Any, Any]]:
    """Return a function from a batch of records to probabilities ``(B, C)``, float32.

    Args:
        model: A sub-model or an ensemble, in evaluation mode, on ``device``.
        draws: A sub-model's uniform numbers ``(R, N)``, or None.
        device: ``cpu`` or ``cuda``.
    """
    extra = () if draws is None else (draws.to(device),)

    @torch.inference_mode()
    def run(batch: Batch) -> np.ndarray[Any, Any]:
        probabilities: Tensor = model(*to_torch(batch, device), *extra)
        return probabilities.float().cpu().numpy()

    return run


def measure(
    run: Callable[[Batch], np.ndarray[Any, Any]], records: Records, *, k: int = 20
) -> Metrics:
    """Return the metrics of a model on some records; ties rank by the records' order."""
    accumulator = MetricsAccumulator(num_classes=records.schema.num_classes, k=k)
    for batch in records.batches(BATCH_SIZE):
        accumulator.add(run(batch), batch.labels)
    return accumulator.result()


def check_fits(model: Schema, records: Schema, *, path: Path) -> None:
    """Raise unless records have the modalities and the vocabulary that a model was made for.

    Raises:
        PredictionsError: They differ.
    """
    if model.interface != records.interface:
        raise PredictionsError(
            f"{path} has {_describe(model)}, but these records have {_describe(records)}.",
            mend="Use records with the same modalities, widths and value types.",
        )
    if model.num_classes != records.num_classes:
        raise PredictionsError(
            f"{path} has {model.num_classes} classes, but these records have "
            f"{records.num_classes}.",
            mend="Use records of the same vocabulary, or give their schema with --schema.",
        )
    if None not in (model.label_names, records.label_names) and (
        model.vocabulary_sha256 != records.vocabulary_sha256
    ):
        index = next(
            i for i, pair in enumerate(zip(model.names, records.names, strict=True))
            if pair[0] != pair[1]
        )  # fmt: skip
        raise PredictionsError(
            f"{path} calls class {index} {model.names[index]!r}, but these records call it "
            f"{records.names[index]!r}.",
            mend="Use records of the same vocabulary, or their own --label-names.",
        )


def _describe(schema: Schema) -> str:
    return ", ".join(f"{m.name} ({m.width} {m.value_type})" for m in schema.modalities)


def _load_onnx(path: Path, repeats: int | None, device: str) -> LoadedModel:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.", mend="Name a file that exists.")
    onnx_model = OnnxModel(path, repeats=repeats, device=device)
    schema, repeats = onnx_model.schema, onnx_model.repeats
    return LoadedModel(path, "onnx", path.stem, schema, repeats, 0, onnx_model.probabilities)
