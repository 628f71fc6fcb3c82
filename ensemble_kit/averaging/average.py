"""An average of checkpoints before it is written: its model, its GAP and its file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ensemble_kit._version import __version__
from ensemble_kit.averaging.mean import MeanOfFiles
from ensemble_kit.averaging.recalibration import recalibrate
from ensemble_kit.data.dataset import Batch, Records
from ensemble_kit.errors import CheckpointError, InputError
from ensemble_kit.files import sha256_of
from ensemble_kit.networks.building import TrainedModel
from ensemble_kit.networks.loading import build_trained
from ensemble_kit.networks.running import measure, runner
from ensemble_kit.store.provenance import BatchNormSource, CheckpointMetadata, FileMetadata
from ensemble_kit.store.tensor_files import TensorFile, TensorSpec, spec_of, write_tensors

Observer = Callable[[Batch, NDArray[np.float32]], None]
RECALIBRATION_VIDEOS = 8192


@dataclass(frozen=True)
class Average:
    """The uniform mean of some checkpoints of one run, and the source of its statistics.

    Attributes:
        sources: The checkpoints, open, by step.
        batch_norm: ``recalibrate`` estimates statistics on ``training``, and ``last`` takes those
            of ``newest``. Otherwise they are averaged, which leaves a single checkpoint as it was
            trained.
        newest: The checkpoint of the last step; one of the sources unless the source is an
            exponential moving average.
        training: Training records; None where there is nothing to estimate.
        device: Where to run the model, ``cpu`` or ``cuda``.
    """

    sources: Sequence[TensorFile]
    batch_norm: BatchNormSource
    newest: TensorFile
    training: Records | None
    device: str

    @property
    def mean(self) -> MeanOfFiles:
        """The mean's tensors, before any statistics are estimated."""
        return MeanOfFiles(
            self.sources, statistics=self.newest if self.batch_norm == "last" else None
        )

    @property
    def is_estimated(self) -> bool:
        """Whether its statistics are estimated on records."""
        return self.batch_norm == "recalibrate" and self.training is not None

    def model(self) -> TrainedModel:
        """Return it as a model on the device, in evaluation mode, with its statistics estimated."""
        path = self.sources[-1].path
        model = build_trained(self._metadata, self.mean, path=path).to(self.device)
        if self.is_estimated and self.training is not None:
            recalibrate(model, self.training, num_videos=RECALIBRATION_VIDEOS, device=self.device)
        return model

    def gap(self, model: TrainedModel, records: Records, observe: Observer | None = None) -> float:
        """Return the GAP@20 of its model as training measures it: with one fixed draw of frames.

        Args:
            model: What ``model`` returned.
            records: The records to measure on.
            observe: Called with each batch and its probabilities, ``(B, C)`` float32.
        """
        run = runner(model, model.draws_for(self._metadata.name, repeats=1), self.device)

        def observed(batch: Batch) -> NDArray[np.float32]:
            probabilities = run(batch)
            if observe is not None:
                observe(batch, probabilities)
            return probabilities

        return measure(observed, records).gap

    def write(
        self, output: Path, model: TrainedModel | None, *, gap: float | None, force: bool
    ) -> None:
        """Write it, from its model if there is one, and else block by block from its sources.

        Args:
            output: The file to write.
            model: What ``model`` returned, or None.
            gap: Its validation GAP@20, for its metadata; None where nothing was compared.
            force: Whether an existing file may be replaced.

        Raises:
            CheckpointError: A source holds NaN or infinity, or is removed meanwhile.
            OutputError: ``output`` exists and ``force`` is False, or the disk refuses the file.
        """
        parents = [file.path for file in self.sources]
        if self.batch_norm == "last" and self.newest.path not in parents:
            parents.append(self.newest.path)

        def metadata(hashes: Sequence[str]) -> CheckpointMetadata:
            averaged_from = tuple(
                FileMetadata.of(path, output.parent, sha256=digest)
                for path, digest in zip(parents, hashes, strict=True)
            )
            return self._metadata.model_copy(
                update={
                    "kit_version": __version__,
                    "averaged_from": averaged_from,
                    "validation_gap": gap,
                    "batch_norm": self.batch_norm,
                }
            )

        # hashing takes longer than averaging, so threads do it meanwhile
        with ThreadPoolExecutor(cpu_count()) as pool:
            hashes = pool.map(_hash_of, parents)
            unknown = metadata(["0" * 64] * len(parents))
            specs, produce = self._contents(model)
            write_tensors(
                output,
                specs,
                produce,
                unknown,
                force=force,
                final_metadata=lambda: metadata(list(hashes)),
            )

    def _contents(
        self, model: TrainedModel | None
    ) -> tuple[Mapping[str, TensorSpec], Callable[[str], Tensor | Iterator[Tensor]]]:
        if model is None:
            return self.mean.specs, self.mean.blocks
        state = model.state_dict()
        return {name: spec_of(tensor) for name, tensor in state.items()}, state.__getitem__

    @property
    def _metadata(self) -> CheckpointMetadata:
        return self.sources[-1].metadata_as(CheckpointMetadata)


def _hash_of(path: Path) -> str:
    try:
        return sha256_of(path)
    except InputError as error:
        raise CheckpointError(
            error.problem, hint="Average again, from the checkpoints that are left."
        ) from error
