"""What a plan refuses, before anything is written."""

import pytest
from builders import contents_of, tiny_recipe, tiny_records, train_tiny

from ensemble_kit import Records, RunPlan
from ensemble_kit.data.synthetic import synthesize
from ensemble_kit.errors import InputError, PredictionsError, RecipeError, TrainingError


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("seed", -1, "seed is -1; it has to be at least 0"),
        ("workers", -1, "workers is -1; it has to be at least 0"),
        ("patience", 0, "patience is 0; it has to be at least 1"),
        ("keep", 0, "keep is 0; it has to be at least 1"),
        ("accumulate", 0, "accumulate is 0; it has to be at least 1"),
        ("teacher_share", 1.5, "teacher_share is 1.5; it has to be from 0 to 1"),
        ("ema", -0.1, "ema is -0.1; it has to be from 0 to 1"),
        ("ema", 1, "ema is 1; such an average would never move"),
        ("device", "tpu", "device is 'tpu'; it has to be one of ('cpu', 'cuda')"),
        ("precision", "fp16", "precision is 'fp16'; it has to be one of ('fp32', 'bf16')"),
    ],
)
def test_an_option_out_of_its_range_is_the_callers_mistake(option, value, problem, records):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its whole text follows
        RunPlan(recipe=tiny_recipe(), training=records[0], folder="tiny", **{option: value})

    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"folder": "a b"},
            TrainingError,
            "'a b' cannot name a run.\n"
            "Use at most 200 letters, digits, _ and -, and do not begin with -.",
        ),
        (
            {"patience": 2},
            TrainingError,
            "--patience waits for a better GAP@20, which needs validation records.\n"
            "Name them with --validation, or leave --patience out.",
        ),
        (
            {"recipe": tiny_recipe(overrides=["pooling.num_clusters={rgb=3}"])},
            RecipeError,
            None,
        ),
    ],
)
def test_a_plan_that_cannot_be_trained_is_refused_before_anything_is_written(
    change, error, text, records, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = {"recipe": tiny_recipe(), "training": records[0], "folder": "tiny"} | change

    with pytest.raises(error) as caught:
        RunPlan(**options)

    assert text is None or str(caught.value) == text
    assert not list(tmp_path.iterdir())


def test_validation_records_of_another_kind_are_refused(records, tmp_path):
    synthesize(
        tmp_path, num_videos={"other": 3}, modalities={"rgb": 9}, num_classes=5, num_shards=1
    )

    with pytest.raises(PredictionsError):
        RunPlan(
            recipe=tiny_recipe(),
            training=records[0],
            validation=Records([tmp_path / "other"]),
            folder=tmp_path / "tiny",
        )


def test_the_folder_may_be_a_string(records, tmp_path):
    trained = train_tiny(str(tmp_path / "tiny"), records)

    assert trained.folder.path == tmp_path / "tiny"
    assert trained.checkpoints == tuple(trained.folder.checkpoint_paths())
    assert len(trained.checkpoints) == 2


def test_the_folder_is_looked_at_once(records, tmp_path, monkeypatch):
    looks = []
    find_state = RunPlan.find_state
    monkeypatch.setattr(
        RunPlan, "find_state", lambda self, **o: looks.append(self) or find_state(self, **o)
    )

    train_tiny(tmp_path / "tiny", records)

    assert len(looks) == 1


def test_no_dropout_is_a_dropout_of_0(records, tmp_path):
    weights = [
        train_tiny(tmp_path / name / "tiny", records, tiny_recipe(overrides=overrides))
        .folder.checkpoint(6)
        for name, overrides in (("without", []), ("zero", ["hidden.dropout=0"]))
    ]  # fmt: skip

    without, zero = (contents_of(path) for path in weights)
    assert without.keys() == zero.keys()
    assert all((without[name] == zero[name]).all() for name in without)


def test_readers_are_refused_where_they_could_not_be_ended(records, tmp_path, monkeypatch):
    monkeypatch.delattr("os.killpg")
    options = {"recipe": tiny_recipe(), "training": records[0], "folder": tmp_path / "tiny"}

    with pytest.raises(InputError, match="--workers starts processes that this system"):
        RunPlan(**options, workers=1)

    RunPlan(**options)
