"""What options may be and what they are unless something else is asked for.

The library's functions and the command line share these, so that neither repeats the other. The
module imports nothing heavy: ``--help`` reads it.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

AnyPath: TypeAlias = str | os.PathLike[str]  # what every public function takes for a path
Activation: TypeAlias = Literal["none", "sigmoid", "softmax"]
Auto: TypeAlias = Literal["auto"]  # every precision that predictions were measured in
BatchNormRule: TypeAlias = Literal["recalibrate", "average", "last"]
CalibrationMethod: TypeAlias = Literal["auto", "none", "temperature", "platt", "isotonic"]
Computes: TypeAlias = Literal["packed", "float32"]
Criterion: TypeAlias = Literal["gain", "gain-per-byte"]
Device: TypeAlias = Literal["cpu", "cuda"]
DrawSource: TypeAlias = Literal["fixed", "random", "input"]
Dtype: TypeAlias = Literal["fp32", "fp16", "bf16", "int8", "int4"]
FrameForm: TypeAlias = Literal["raw", "dequantised", "normalised"]
Given: TypeAlias = Literal["given"]  # of members and coefficients that nothing has chosen
InputType: TypeAlias = Literal["uint8", "float32"]
Layout: TypeAlias = Literal["frames-first", "channels-first"]
Level: TypeAlias = Literal["frame", "video"]
Method: TypeAlias = Literal["uniform", "greedy", "ema"]
Metric: TypeAlias = Literal["gap", "map", "macro-map", "map-at-k"]
Mirror: TypeAlias = Literal["us", "eu", "asia"]
Mixing: TypeAlias = Literal["uniform", "gap", "optimised"]
Opset: TypeAlias = Literal[20, 21]
Precision: TypeAlias = Literal["fp32", "bf16"]
Published: TypeAlias = Literal["youtube8m-2018", "youtube8m-2017", "audioset"]  # data sets
Strategy: TypeAlias = Literal["greedy", "replacement", "beam", "exhaustive"]
Tracker: TypeAlias = Literal["tensorboard", "mlflow", "wandb"]

ACTIVATION: Activation = "none"
AUTO: Auto = "auto"
BATCH_NORM_RULE: BatchNormRule = "recalibrate"
BLOCK_DTYPES: tuple[Dtype, ...] = ("int8", "int4")  # matrices in blocks, the rest in bf16
CALIBRATION_METHOD: CalibrationMethod = "auto"  # the one that is measured best
CRITERION: Criterion = "gain"
DEVICE: Device = "cpu"
DRAW_SOURCE: DrawSource = "fixed"
DTYPE: Dtype = "bf16"
DTYPES_OF_AUTO: tuple[Dtype, ...] = ("bf16", "int8", "int4")  # that ``select --dtype auto`` offers
FRAME_FORM: FrameForm = "dequantised"
LAYOUT: Layout = "frames-first"
LEVEL: Level = "frame"
METHOD: Method = "uniform"
METRIC: Metric = "gap"  # that ``select`` chooses by
MIRROR: Mirror = "us"
MIXING: Mixing = "uniform"
PRECISION: Precision = "fp32"
PUBLISHED_NAME: Published = "youtube8m-2018"  # that recipes are sized for

ON_HUB = "hf:"  # how the names of files on the Hugging Face Hub begin

ACCUMULATE = 1  # parts of a batch
AUDIOSET_SPLITS = ("bal_train", "unbal_train", "eval")
BATCH_SIZE = 128  # videos at a time where a model only runs; it changes no result
BLOCK_OPSET: Opset = 21  # the first of ONNX's operator sets with matrices in blocks
BEAM_WIDTH = 2  # ensembles that a beam search follows, as the 2017 runner-up did
CACHE_BYTES = 64 * 2**30  # of the folder that holds records of URLs
CONFIDENCE = 0.95  # the share of resamples within an interval
CPUS_EACH = 1  # of a job on a cluster
DOWNLOAD_JOBS = 4  # files fetched at a time
DOWNLOAD_PART = (1, 1)  # of how many: all files
ENOUGH_VIDEOS = 2000  # from this many on, selection holds some out unless told otherwise
GPUS_EACH: float = 0  # of a job on a cluster
HELD_OUT_SHARE = 0.5  # of the videos, where selection or calibration holds some out
MAX_GAP_LOSS = 0.001
MOST_EXACT = 12  # candidates up to which selection measures every ensemble unless told otherwise
OPSET: Opset = 20  # of ONNX's operators that files without such matrices are written in
MAX_SIZE = 2**30  # bytes: 1 GiB, the limit of the second YouTube-8M challenge
REPEATS = 10  # random frame samples that an exported file averages
RESAMPLES = 200  # bootstrap samples that an interval is computed from
SEED = 0  # of whatever is drawn
SEGMENTS_PER_CLASS = 100_000  # that the challenge of 2019 counts
SEGMENT_SECONDS = 5  # of each segment of that challenge
SPLIT = "train=0.8,validate=0.1,test=0.1"  # the shares of a conversion's videos
# Of any records: beyond every data set, and small enough that a mistyped number fills no memory.
MAX_CLASSES, MAX_WIDTH, MAX_LENGTH = 1_000_000, 1_000_000, 1_000_000  # classes, features, frames
SYNTHETIC_CLASSES = 50
SYNTHETIC_FRAMES = (20, 60)  # the fewest and the most of a video
SYNTHETIC_LABEL_SKEW = 1.0
SYNTHETIC_SHARDS = 4
SYNTHETIC_VIDEOS: Mapping[str, int] = MappingProxyType(
    {"train": 2000, "validate": 500, "test": 500}
)
SYNTHETIC_WIDTHS: Mapping[str, int] = MappingProxyType({"rgb": 64, "audio": 16})
TEACHER_SHARE = 0.5
TOP_K = 20  # classes of a video that GAP@k looks at, as both challenges did
TRITON_DELAY = 0  # microseconds that a request waits for others
TRITON_INSTANCES = 1  # copies of a model that run at a time
WORKERS = 0  # processes that read records ahead; 0 reads between steps
