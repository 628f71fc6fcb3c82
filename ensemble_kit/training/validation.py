"""The metrics of a model during training; each process runs its share of the records."""

import torch

from ensemble_kit.choices import BATCH_SIZE
from ensemble_kit.data.dataset import Records
from ensemble_kit.metrics import Metrics, MetricsAccumulator
from ensemble_kit.networks.building import TrainedModel
from ensemble_kit.networks.running import measure, runner
from ensemble_kit.training.processes import Processes


def measure_together(
    model: TrainedModel,
    records: Records,
    *,
    name: str,
    device: str,
    processes: Processes,
    batch_size: int = BATCH_SIZE,
) -> Metrics:
    """Return the metrics of a model on some records, the same in every process.

    With N processes, each runs every N-th batch, and the first one ranks the results of all of them
    in the order of the records. So the metrics are those that a single process would compute.

    Args:
        model: The model; it is left in evaluation mode.
        records: The records, the same in every process.
        name: The run's name, which seeds its one draw of frames: the same at each checkpoint.
        device: ``cpu`` or ``cuda``.
        processes: The processes that measure together.
        batch_size: How many videos a process runs at a time.
    """
    run = runner(model.eval(), model.draws_for(name, repeats=1), device)
    if processes.count == 1:
        return measure(run, records)
    num_classes = records.schema.num_classes
    batches = records.batches(batch_size, rank=processes.rank, num_ranks=processes.count)
    accumulator = MetricsAccumulator(num_classes=num_classes)
    while True:
        batch = next(batches, None)
        # probabilities, then labels
        both = torch.zeros(2, batch_size, num_classes, dtype=torch.float32)
        if batch is not None:
            both[0, : len(batch.ids)] = torch.from_numpy(run(batch))
            both[1, : len(batch.ids)] = torch.from_numpy(batch.labels.dense(num_classes))
        counts = processes.gather_number(0 if batch is None else len(batch.ids))
        if not any(counts):
            break
        for (probabilities, labels), count in zip(processes.gather(both), counts, strict=True):
            if processes.is_first:
                accumulator.add(probabilities[: int(count)].numpy(), labels[: int(count)].numpy())
    return Metrics(**processes.tell(accumulator.result().as_dict()))
