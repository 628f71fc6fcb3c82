"""The six-member system of S5 at full size, with random weights: from checkpoints to one ONNX file.

521 million parameters are fused in bf16, exported with repeats, opened, and run on videos of 300
frames. Beside the one file stand the same members with their input tiled ten times, as S5 averaged
repeats, and six ONNX files run one after the other. Every step is its own process. Costs are
ratios of processor seconds, into which other work on the machine does not count.

    python benchmarks/nonlocal_system.py [--quick] [--json] [--rounds N] [--threads N]

It wants 10 GB of disk for temporary files and 12 GB of memory. ``--quick`` takes small members.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from statistics import median

import numpy as np
from common import (
    MIB,
    Figures,
    alone,
    copy_bandwidth,
    in_turn,
    machine,
    parser_of,
    print_json,
    print_steps,
    print_table,
    ratio,
    spread,
    versions,
)

SYSTEM = ("lfnl-netvlad", "lfnl-netrvlad", "efnl-netvlad", "soft-bof-4k", "soft-bof-8k", "gru")
WILLOW = (
    "gated-net-vlad",
    "gated-net-rvlad",
    "gated-net-fv",
    "gated-bow",
    "bow-8000",
    "gru",
    "lstm",
)
SMALL = ("pooling.num_clusters=4", "pooling.hidden_size=5", "hidden.size=6")
MOST = 10  # repeats
REPEATS = (1, 5, MOST)
BATCHES = (1, 32)
FRAMES = 300
PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "GRU"}


# What the steps work on


def build(
    folder: Path, paper: str, members: Sequence[str], is_quick: bool, is_half: bool
) -> Figures:
    """Write a checkpoint of each member, in bfloat16 if ``is_half``, and selections of them.

    Selections of each alone and one of all, whose GAPs are made up.
    """
    import torch

    from ensemble_kit.data.published import PUBLISHED
    from ensemble_kit.networks.sub_model import SubModel
    from ensemble_kit.recipes.reading import load_recipe
    from ensemble_kit.store.provenance import CheckpointMetadata
    from ensemble_kit.store.tensor_files import save_tensors

    folder.mkdir()
    schema = PUBLISHED["youtube8m-2018"]
    for seed, name in enumerate(members):
        recipe = load_recipe(f"{paper}/{name}")
        if is_quick:
            sizes = [size for size in SMALL if _has(recipe, size.partition("=")[0])]
            recipe = load_recipe(f"{paper}/{name}", sizes)
        record = CheckpointMetadata(
            kit_version="0", name=name, run=name, recipe=recipe.metadata, data_schema=schema,
            step=1, examples=1, seed=seed, training_files=(),
        )  # fmt: skip
        torch.manual_seed(seed)
        model = SubModel(recipe, schema)
        tensors = (model.bfloat16() if is_half else model).state_dict()
        save_tensors(folder / f"{name}.safetensors", tensors, record, force=False)
        _select(folder, f"{name}.json", [name])
    _select(folder, "selection.json", members)
    return {}


def _has(recipe: object, key: str) -> bool:
    table, _, name = key.partition(".")
    return hasattr(getattr(recipe, table), name)


def _select(folder: Path, output: str, members: Sequence[str]) -> None:
    """Write a selection as if ``ensemble-kit select`` had chosen the members."""
    from ensemble_kit.files import sha256_of
    from ensemble_kit.networks.fused_member import model_metadata
    from ensemble_kit.store.provenance import FileMetadata
    from ensemble_kit.store.selection_file import (
        BootstrapMetadata,
        FrontierMetadata,
        SearchMetadata,
        SelectedMetadata,
        SelectionMetadata,
        write_selection,
    )
    from ensemble_kit.store.tensor_files import open_tensors

    selected = []
    for name in members:
        path = folder / f"{name}.safetensors"
        with open_tensors(path) as file:
            model = model_metadata(file, folder, repeats=1)
        found = FileMetadata(path=path.name, sha256=sha256_of(path))
        selected.append(
            SelectedMetadata(
                name=name, dtype="bf16", coefficient=1 / len(members),
                bytes=model.bytes_by_dtype["bf16"], score=0.5, score_without=0.5, predictions=found,
                model=model,
            )
        )  # fmt: skip
    record = SelectionMetadata(
        kit_version="0", metric="gap", k=20, dtypes=("bf16",), max_size=2**30, mixing="uniform",
        rule="All.",
        search=SearchMetadata(
            strategy="greedy", criterion="gain", max_members=None, beam_width=None, start=(),
            excluded=(), evaluations=0, greedy_score=None,
        ),
        dataset_sha256="0" * 64, vocabulary_sha256=None, labels=None, videos=1, positives=1,
        score=0.5, bytes=model.shared_bytes + sum(member.bytes for member in selected),
        shared_bytes=model.shared_bytes, members=tuple(selected), path=(),
        frontier=tuple(
            FrontierMetadata(
                members=tuple(members[: count + 1]), dtypes=("bf16",) * (count + 1),
                score=0.5 + 0.01 * count, confirmed_score=None,
                bytes=model.shared_bytes
                + sum(member.bytes for member in selected[: count + 1]),
            )
            for count in range(len(members))
        ),
        frontiers={}, candidates=(), confirm=None,
        bootstrap=BootstrapMetadata(resamples=0, level=0.95, seed=0), optimised=None,
        truncation=None,
    )  # fmt: skip
    write_selection(folder / output, record, force=False)


# The steps


def fuse(selection: Path, output: Path, dtype: str = "bf16") -> Figures:
    from ensemble_kit import fuse as fuse_members

    start = time.perf_counter()
    fused = fuse_members(selection, output, dtype=dtype)
    return {"seconds": time.perf_counter() - start, "bytes": fused.num_bytes}


def refuse(selection: Path, output: Path) -> str:
    """Fuse a system that is too large; return the message."""
    from ensemble_kit import fuse as fuse_members
    from ensemble_kit.errors import SizeLimitError

    try:
        fuse_members(selection, output, dtype="bf16")
    except SizeLimitError as error:
        return str(error)
    raise AssertionError("a system of 2.5 GB was not refused")


def export(fused: Path, output: Path, repeats: int) -> Figures:
    from ensemble_kit import export_onnx

    start = time.perf_counter()
    exported = export_onnx(fused, output, repeats=repeats)
    return {"seconds": time.perf_counter() - start, "bytes": exported.num_bytes}


def export_tiled(fused: Path, output: Path, repeats: int) -> Figures:
    """Export the members with all that they read tiled along the batch, float32 weights beside."""
    import torch
    from torch import Tensor

    from ensemble_kit.layers.frame_preparation import PreparedFrames, prepare_frames
    from ensemble_kit.layers.frame_sampling import AllFrames
    from ensemble_kit.layers.recurrent import Recurrence
    from ensemble_kit.networks.ensemble import FusedEnsemble, example_frames
    from ensemble_kit.networks.loading import load_fused
    from ensemble_kit.store.tensor_files import open_tensors

    class Tiled(torch.nn.Module):
        def __init__(self, ensemble: FusedEnsemble) -> None:
            super().__init__()
            self.ensemble = ensemble
            self.samplings = {}
            for name in ensemble.names:
                member = ensemble.member(name)
                draws = member.draws_for(name, repeats=repeats)
                if draws is not None:
                    self.samplings[name] = member.sampling, draws
                    member.sampling = AllFrames()

        def forward(self, rgb: Tensor, audio: Tensor, num_frames: Tensor) -> Tensor:
            prepared = prepare_frames({"rgb": rgb, "audio": audio}, num_frames)
            parts = (part.repeat_interleave(repeats, dim=0) for part in prepared[:3])
            tiled = PreparedFrames(*parts, {})
            mixed = 0
            for name, share in zip(self.ensemble.names, self.ensemble.coefficients, strict=True):
                taken = self.drawn(name, tiled, rgb.shape[0]) if name in self.samplings else tiled
                mixed = mixed + share * self.ensemble.member(name).classify(taken)
            return mixed.unflatten(0, (rgb.shape[0], repeats)).mean(dim=1)

        def drawn(self, name: str, tiled: PreparedFrames, batch_size: int) -> PreparedFrames:
            sampling, draws = self.samplings[name]
            rows = draws.repeat(batch_size, 1).unsqueeze(1)
            indices = sampling.indices(tiled.is_frame, rows)[:, 0].unsqueeze(-1)
            width = tiled.normalised.shape[-1]
            frames = tiled.normalised.gather(1, indices.expand(-1, -1, width))
            is_frame = tiled.is_frame[:, :1].expand(-1, len(draws[0]))
            return PreparedFrames(frames, frames, is_frame, {})

    with open_tensors(fused) as file:
        tiled = Tiled(load_fused(file, repeats=repeats)).eval()
    for module in list(tiled.modules()):
        if isinstance(module, Recurrence):
            module.arrange_for_onnx()
    frames, num_frames = example_frames(tiled.ensemble.schema, 3, 7)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("frames")
    torch.onnx.export(
        tiled,
        (*frames.values(), num_frames),
        output,
        dynamo=True,
        external_data=True,
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}, {0: batch}),
        input_names=["rgb", "audio", "num_frames"],
        verbose=False,
    )
    return {}


def compare(ours: Path, tiled: Path, threads: int) -> Figures:
    """Return the largest difference of a probability on two videos."""
    first, second = (_session(path, threads).run(None, _videos(2))[0] for path in (ours, tiled))
    return {"difference": float(np.abs(first - second).max())}


def run(paths: Sequence[Path], batch_size: int, threads: int, rounds: int) -> Figures:
    """Open files and run them one after the other on the same videos, warm."""
    start = time.perf_counter()
    sessions = [_session(path, threads) for path in paths]
    opening, resident = time.perf_counter() - start, _resident_bytes()
    feed = _videos(batch_size)
    seconds, processor = [], []
    for _ in range(rounds + 1):
        start = time.perf_counter(), time.process_time()
        for session in sessions:
            session.run(None, feed)
        seconds.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return {
        "open": opening, "resident": resident, "seconds": median(seconds[1:]),
        "processor": median(processor[1:]),
    }  # fmt: skip


def products(path: Path, batch_size: int, threads: int) -> Figures:
    """Return the share of a run's time that matrix products take, and their FLOP/s over it all."""
    with tempfile.TemporaryDirectory() as folder:
        session = _session(path, threads, profile=Path(folder) / "profile")
        for _ in range(2):
            session.run(None, _videos(batch_size))
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [
        (event["args"]["op_name"], event["dur"] / 1e6, event["args"])
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    ]
    total = sum(seconds for _, seconds, _ in kernels)
    flops = sum(_flops(*_shapes(args), op) for op, _, args in kernels if op in PRODUCTS)
    inside = sum(seconds for op, seconds, _ in kernels if op in PRODUCTS)
    return {"share": inside / total, "flops": flops / total}


def _shapes(args: dict[str, list[dict[str, list[int]]]]) -> tuple[list[int], list[int]]:
    first, out = args["input_type_shape"][0], args["output_type_shape"][0]
    return next(iter(first.values())), next(iter(out.values()))


def _flops(taken: list[int], made: list[int], op: str) -> int:
    """Return a product's operations, from the shapes of its first input and its first output."""
    if op == "GRU":  # (T, B, D) -> (T, directions, B, H): three gates of input and of state
        steps, batch, width = taken
        return 2 * steps * batch * made[1] * 3 * made[3] * (width + made[3])
    return 2 * prod(made) * taken[-1]


def best_product(threads: int, size: int = 3072) -> Figures:
    """Return the FLOP/s of one large product in ONNX Runtime, the best of several."""
    from onnx import TensorProto, helper

    def value(name: str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size])

    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "product", [value("a"), value("b")], [value("c")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = _session(model.SerializeToString(), threads)
    matrix = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        session.run(None, {"a": matrix, "b": matrix})
        seconds.append(time.perf_counter() - start)
    return {"flops": 2 * size**3 / min(seconds)}


def _session(model: Path | bytes, threads: int, *, profile: Path | None = None) -> object:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # not work
    options.enable_mem_pattern = False  # as ``ensemble_kit.serving.session`` opens files
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _videos(batch_size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    widths = {"rgb": 1024, "audio": 128}
    return {
        name: random.integers(0, 256, (batch_size, FRAMES, width), dtype=np.uint8)
        for name, width in widths.items()
    } | {"num_frames": np.full(batch_size, FRAMES, np.int64)}


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# What is said of them


def measure(folder: Path, *, is_quick: bool, threads: int, rounds: int) -> dict[str, object]:
    """Do every step; return what each gave by its name."""
    steps: dict[str, Figures] = {}
    system = folder / "system"

    def step(function: Callable[..., Figures], *arguments: object) -> Figures:
        figures = alone(function, *arguments)
        print(f"{function.__name__}: {figures}", file=sys.stderr, flush=True)
        return figures

    step(build, system, "nonlocal", SYSTEM, is_quick, False)
    fused = system / "fused.safetensors"
    steps["fuse"] = step(fuse, system / "selection.json", fused)
    six = []
    for name in SYSTEM:
        part = system / f"{name}.fused.safetensors"
        step(fuse, system / f"{name}.json", part)
        six.append(folder / name / "ensemble.onnx")
        step(export, part, six[-1], MOST)
        part.unlink()
        (system / f"{name}.safetensors").unlink()
    files = {repeats: folder / str(repeats) / "ensemble.onnx" for repeats in REPEATS}
    for repeats, path in reversed(files.items()):
        steps[f"export, {repeats} repeats"] = step(export, fused, path, repeats)
    tiled = system / "tiled.onnx"
    step(export_tiled, fused, tiled, MOST)
    fused.unlink()
    difference = step(compare, files[MOST], tiled, threads)["difference"]
    work = {
        (f"{repeats} repeats", batch): partial(step, run, [path], batch, threads, 2)
        for batch in BATCHES
        for repeats, path in files.items()
    }
    for batch in BATCHES:
        work[f"{MOST} repeats, tiled", batch] = partial(step, run, [tiled], batch, threads, 1)
        work[f"{MOST} repeats, six files", batch] = partial(step, run, six, batch, threads, 2)
    limit = step(best_product, threads)["flops"]
    runs = in_turn(work, rounds=rounds)
    reached = step(products, files[MOST], max(BATCHES), threads)
    willow = folder / "willow"
    shutil.rmtree(system)
    step(build, willow, "willow", WILLOW, False, True)
    refusal = refuse(willow / "selection.json", willow / "fused.safetensors")
    return {
        "steps": steps, "runs": runs, "limit": limit, "reached": reached, "refusal": refusal,
        "difference": difference,
    }  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    described = f"{machine()}, {options.threads} threads"
    packages, _ = versions("onnxruntime-gpu", "torch", "onnx", "numpy")
    bandwidth = copy_bandwidth()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            Path(folder), is_quick=options.quick, threads=options.threads, rounds=options.rounds
        )
    steps, runs, most = found["steps"], found["runs"], max(BATCHES)
    one, ten, tiled, six = (
        runs[name, most]["processor"]
        for name in (
            "1 repeats", f"{MOST} repeats", f"{MOST} repeats, tiled", f"{MOST} repeats, six files"
        )
    )  # fmt: skip
    figures = {
        "fused_bytes": steps["fuse"]["bytes"],
        "onnx_bytes": steps[f"export, {MOST} repeats"]["bytes"],
        "repeats_cost": ratio(ten, one),
        "tiled_cost": ratio(tiled, one),
        "tiled_difference": found["difference"],
        "share_in_products": found["reached"]["share"],
        "share_of_limit": found["reached"]["flops"] / found["limit"],
    }
    if options.as_json:
        print_json(
            ratios={"tiled": ratio(tiled, ten), "six files": ratio(six, ten)},
            **figures,
            machine=described,
            versions=packages,
            steps=steps,
            runs=[
                {"work": work, "batch": batch, **values} for (work, batch), values in runs.items()
            ],
            product_flops=found["limit"],
            copy_bandwidth=bandwidth,
            refusal=found["refusal"],
        )
        return
    print(f"{described}; {packages}")
    print(f"one product {found['limit'] / 1e9:.0f} GFLOP/s, copy {bandwidth / 1e9:.1f} GB/s")
    print_steps(steps)
    print_table(
        [
            "run",
            "batch",
            "videos/s",
            "s a batch",
            "processor s",
            "s to open",
            "MiB open",
            "peak MiB",
        ],
        [
            [
                name,
                str(batch),
                f"{batch / median(values['seconds']):.2f}",
                spread(values["seconds"]),
                spread(values["processor"]),
                spread(values["open"], digits=1),
                spread(values["resident"], digits=0, unit=MIB),
                spread(values["peak_bytes"], digits=0, unit=MIB),
            ]
            for (name, batch), values in runs.items()
        ],
    )
    print(
        f"\nTen repeats cost {figures['repeats_cost']:.2f} times one at batch {most}; tiled, "
        f"{figures['tiled_cost']:.2f} times, with probabilities that differ by "
        f"{figures['tiled_difference']:.1g}. Products take {figures['share_in_products']:.0%} of "
        f"the run, which reaches {figures['share_of_limit']:.0%} of the speed of one product."
        f"\n\nWILLOW's seven members: {found['refusal']}"
    )


if __name__ == "__main__":
    main()
