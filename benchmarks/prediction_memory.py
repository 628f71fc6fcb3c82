"""Peak memory of `predict` by the number of videos, and how long it takes.

    python benchmarks/prediction_memory.py [--videos 10000 200000] [--json]

Each run is a separate process. The records are made up and tiny (8 + 4 features, 2 to 4 frames),
so that what is measured is what is kept of each video: 1,000 classes of it are predicted, which in
memory would take 4,000 bytes a video.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OUTPUTS = {"dense": ["p.safetensors"], "best 100": ["k.safetensors", "100"], "CSV": ["p.csv", "20"]}


def main() -> None:
    """Measure each output at each number of videos, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, nargs="+", default=[10_000, 200_000])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for videos in options.videos:
            prepare(Path(folder, str(videos)), videos)
            for name, output in OUTPUTS.items():
                words = [__file__, "--one", str(Path(folder, str(videos))), *output]
                done = subprocess.run([sys.executable, *words], capture_output=True, check=True)
                rows.append({"output": name, "videos": videos} | json.loads(done.stdout))
    if options.json:
        print(json.dumps({"runs": rows}))
        return
    print(f"{'output':<10}{'videos':>10}{'peak MiB':>10}{'seconds':>9}{'MiB on disk':>13}")
    for row in rows:
        print(
            f"{row['output']:<10}{row['videos']:>10,}{row['peak'] / 2**20:>10.0f}"
            f"{row['seconds']:>9.1f}{row['bytes'] / 2**20:>13.1f}"
        )


def prepare(folder: Path, videos: int) -> None:
    """Write records of so many videos, and a model with weights as they begin."""
    import torch

    from ensemble_kit.data.synthetic import synthesize
    from ensemble_kit.networks.sub_model import SubModel
    from ensemble_kit.recipes.reading import load_recipe
    from ensemble_kit.store.provenance import CheckpointMetadata
    from ensemble_kit.store.tensor_files import save_tensors

    schema = synthesize(
        folder,
        num_videos={"test": videos},
        modalities={"rgb": 8, "audio": 4},
        num_classes=1000,
        frames=(2, 4),
        num_shards=4,
    )
    recipe = load_recipe("willow/average-logistic")
    torch.manual_seed(0)
    model = SubModel(recipe, schema)
    metadata = CheckpointMetadata(
        kit_version="0", name="small", run="0", recipe=recipe.metadata, data_schema=schema, step=1,
        examples=1, seed=0, training_files=("none",),
    )  # fmt: skip
    save_tensors(folder / "model.safetensors", model.state_dict(), metadata, force=False)


def measure(folder: str, output: str, top_k: str | None = None) -> dict[str, float]:
    """Predict, and return the seconds, the process's peak memory and the file's size in bytes."""
    from ensemble_kit import Records, predict

    model, data = Path(folder, "model.safetensors"), Records([Path(folder, "test")])
    start = time.perf_counter()
    path = predict(
        model, data, Path(folder, output), batch_size=256, top_k=int(top_k) if top_k else None
    )
    return {
        "seconds": time.perf_counter() - start,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes": os.path.getsize(path),
    }


if __name__ == "__main__":
    main()
