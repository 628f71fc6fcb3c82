"""A folder of predictions as one file."""

import pytest

from ensemble_kit.errors import PredictionsError
from ensemble_kit.inference import predict
from ensemble_kit.predictions.merging import merge
from ensemble_kit.shards import predict_shards


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_folder_is_merged_into_what_one_command_would_write(
    shards, shard_records, tmp_path, top_k
):
    model = shards / "model.safetensors"
    predict_shards(model, shard_records, tmp_path / "out", top_k=top_k, batch_size=10)

    merged = merge(tmp_path / "out", tmp_path / "merged.safetensors")

    whole = predict(model, shard_records, tmp_path / "p.safetensors", top_k=top_k, batch_size=10)
    assert merged.read_bytes() == whole.read_bytes()
    lines = merge(tmp_path / "out", tmp_path / "merged.csv", top_k=2)
    expected = predict(model, shard_records, tmp_path / "p.csv", top_k=2, batch_size=10)
    assert lines.read_bytes() == expected.read_bytes()


def test_a_csv_does_not_list_more_than_the_folder_keeps(shards, shard_records, tmp_path):
    predict_shards(shards / "model.safetensors", shard_records, tmp_path / "out", top_k=2)

    with pytest.raises(PredictionsError) as caught:
        merge(tmp_path / "out", tmp_path / "merged.csv")

    assert str(caught.value) == (
        f"{tmp_path / 'out'} keeps 2 classes of each video, and 20 were asked for.\n"
        "Give --top-k 2, or predict again and keep more."
    )
