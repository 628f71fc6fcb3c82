"""Select the members whose averaged probabilities have the best validation GAP under a limit."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from os.path import exists, isfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import (
    BEAM_WIDTH,
    BLOCK_DTYPES,
    CRITERION,
    DTYPE,
    DTYPES_OF_AUTO,
    ENOUGH_VIDEOS,
    HELD_OUT_SHARE,
    MAX_SIZE,
    METRIC,
    MIXING,
    MOST_EXACT,
    RESAMPLES,
    SEED,
    TOP_K,
    AnyPath,
    Auto,
    Criterion,
    Dtype,
    Given,
    Metric,
    Mixing,
    Strategy,
)
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.segments import read_ratings
from ensemble_kit.errors import SelectionError
from ensemble_kit.files import each_path, refuse_overwrite, require_suffix
from ensemble_kit.predictions.candidates import Candidates, read_candidates, refuse_unknown
from ensemble_kit.predictions.videos import labelled_parts
from ensemble_kit.selection.class_scoring import ClassJudge
from ensemble_kit.selection.class_table import read_class_table
from ensemble_kit.selection.judging import GapJudge, Judge
from ensemble_kit.selection.mixing import given_weights, optimised, search_weights
from ensemble_kit.selection.outcome import Outcome, Writer, distinct
from ensemble_kit.selection.scoring import Term, pool_size
from ensemble_kit.selection.search import Rules, Search, num_ensembles
from ensemble_kit.selection.segment_scoring import SegmentJudge, read_segments
from ensemble_kit.selection.storage import Storage, default_memory, storage_folder
from ensemble_kit.selection.table import NUM_THREADS, read_tables
from ensemble_kit.selection.top_class_scoring import TopClassJudge
from ensemble_kit.store.dtypes import finest_first
from ensemble_kit.store.selection_file import SelectionMetadata, read_selection, write_selection
from ensemble_kit.store.workspace import RUNS, validation_name
from ensemble_kit.wording import counted, metric_name

POOL_SHARE = 4  # of the memory, at most a quarter is for the pools of mixtures measured together
POOLS_OF_RANKING = 6  # pools that take as much as what a thread needs to rank one
MAX_ADDITIONS = 25  # with replacement, unless another number is given; AutoGluon's default


def find_predictions(dtype: Dtype | Auto | Sequence[Dtype] = DTYPE) -> list[Path]:
    """Return the validation predictions of the runs in the current folder, by run name.

    Args:
        dtype: The precisions to select in, as in ``select``.

    Raises:
        SelectionError: There are none.
    """
    wanted = wanted_dtypes(dtype)
    names = [validation_name(None), *map(validation_name, wanted)]
    if set(wanted) <= set(BLOCK_DTYPES):
        del names[0]  # of weights as they were trained
    paths = [
        folder / name
        for folder in sorted(RUNS.glob("*"))
        for name in names
        if isfile(folder / name)
    ]
    if not paths:
        pattern = RUNS / "*" / names[0]
        train = "`ensemble-kit train`"
        if pattern.name != validation_name(None):
            train = f"`ensemble-kit train --predict-dtype {wanted[0]}`"
        raise SelectionError(
            f"There are no predictions: {pattern} matches nothing in {Path.cwd()}.",
            hint=f"Name predictions files, or change to a folder where {train} ran.",
        )
    return paths


def select(
    predictions_paths: AnyPath | Sequence[AnyPath],
    *,
    output: AnyPath,
    max_size: int | None = None,
    dtype: Dtype | Auto | Sequence[Dtype] = DTYPE,
    metric: Metric = METRIC,
    ratings: Records | None = None,
    mixing: Mixing = MIXING,
    coefficients: Mapping[str, float] | None = None,
    strategy: Strategy | None = None,
    criterion: Criterion = CRITERION,
    max_members: int | None = None,
    beam_width: int = BEAM_WIDTH,
    start: Sequence[str] = (),
    exclude: Sequence[str] = (),
    confirm: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    labels_path: AnyPath | None = None,
    top_k: int = TOP_K,
    sizes: Mapping[str, int] | None = None,
    intersect: bool = False,
    force: bool = False,
    keep_same: bool = False,
    memory: int | None = None,
) -> SelectionMetadata:
    """Choose members and write the selection.

    Of up to 12 candidates, every ensemble that fits is measured and the best is chosen; in several
    precisions, of as many as have no more ensembles. Of more, unless another ``strategy`` is named,
    the rule is WILLOW's (arXiv:1706.06905) under a limit: start from the best single candidate that
    fits, and add the candidate that gives the best GAP@k of the mean of all members' probabilities;
    each candidate at most once. A candidate whose bytes do not fit in what is left of the limit is
    skipped. The search ends when no addition raises the GAP. Of equal GAPs (nearer than 1e-12) the
    ensemble with fewer bytes wins, then the first by name.

    The mean is uniform; or S3's, whose coefficients are ``GAP_i / sum_j GAP_j`` of the members' own
    GAPs (uniform where all of those are 0); or members are chosen by the uniform mean and then its
    coefficients are optimised. Probabilities are summed in float64. In CSV files a class that a
    video does not list counts as 0; a class that no member lists is not pooled.

    Where there are several precisions, a candidate stands in each, with the bytes that it takes
    and the probabilities that it has in it, and is a member in one of them at most. Strategies that
    add one after the other then also search among the candidates of each precision alone, and the
    best of all these is chosen.

    With ``coefficients`` nothing is searched for: the members are those that have one.

    Args:
        predictions_paths: The candidates: predictions files of the kit, CSV files in the
            challenge's format, ``.npy`` or ``.npz``, of the same videos in any order.
        output: The ``selection.json`` to write.
        max_size: Maximum size of the fused file, in bytes; None means 1 GiB, and that a candidate
            of unknown size counts 0 bytes unless ``sizes`` are given.
        dtype: The precision that members will be stored in, or several, in each of which every
            candidate must have been measured; ``auto`` takes bf16, int8 and int4 as far as
            candidates were.
        metric: What ensembles are compared by: ``gap``, GAP@k; ``map``, the challenge's mAP@k,
            which is the ``map`` of ``evaluate``; or ``macro-map``, AudioSet's mAP, which is its
            ``macro_map``. Both are means over the classes that some video has; see
            ``metrics.mean_average_precision`` and ``ranking_metrics.RankingMetrics``. Or
            ``map-at-k``, the MAP@100,000 of segments, see ``segment_metrics``.
        ratings: The records that hold the ratings of segments, for ``map-at-k``; the predictions
            are then those of segments, from ``predict_rated_segments``.
        mixing: ``uniform``, ``gap`` or ``optimised``; ``gap`` weights by the members' own scores,
            whatever the metric.
        coefficients: The mixing coefficient of each member by name, in place of a search; above 0,
            with a sum of 1, 0.01 more or less, and scaled to that. Only ``mixing``, ``strategy``,
            ``criterion``, ``max_members``, ``start`` and ``confirm`` do not go with them.
        strategy: See ``SearchMetadata``; None is ``exhaustive`` with up to 12 candidates, unless
            ``criterion`` is ``gain-per-byte``, and else ``greedy``.
        criterion: What an addition is chosen by: ``gain``, or ``gain-per-byte``, which only
            ``greedy`` and ``replacement`` can use.
        max_members: The most members; with ``replacement``, the most additions, 25 where None.
        beam_width: How many ensembles ``beam`` follows. The 2017 runner-up followed 2.
        start: Names of candidates that are members before the search begins.
        exclude: Names of candidates to leave out.
        confirm: The share of the videos that are held out to confirm the choice, by a hash of their
            ids; None takes a half where there are 2,000 videos or more, else 0.
        resamples: How often videos are drawn for bootstrap intervals; 0 makes none.
        seed: The seed of these draws.
        labels_path: A CSV file of labels; None takes those in the predictions files.
        top_k: The k of GAP@k.
        sizes: Bytes by name, for candidates that no model of the kit made.
        intersect: Whether videos that some file lacks are left out; else they are refused.
        force: Whether an existing file may be replaced.
        keep_same: Whether an existing file is kept if it holds the very selection that was made, as
            a command leaves it that is stopped between this file and its next.
        memory: Maximum bytes of what is kept of the candidates; None takes half of the machine's
            memory. More lies in a file without a name, in ``TMPDIR`` where that is set and else
            beside ``output``, which is gone however the process ends. It changes nothing that is
            chosen. Beside it come the interpreter, some 2 MiB for each candidate and core while
            files are read, 256 MiB at most of rows that are read again, and ids and labels, once.

    Returns:
        What ``output`` holds.

    Raises:
        OutputError: ``output`` exists and ``force`` is False, or has another suffix than ``.json``,
            or a disk is too small for what does not fit in ``memory``.
        CheckpointError: A predictions file of the kit is damaged.
        PredictionsError: Another file is damaged, or the videos are not the same.
        SelectionError: The candidates do not belong together, see ``read_candidates``; a part of
            the videos has no labels; or the options do not go together.
        SizeLimitError: No candidate fits.
        ValueError: No predictions were named.
    """
    if not predictions_paths:
        raise ValueError("there are no predictions to select from")
    output = Path(output)
    labels_path = None if labels_path is None else Path(labels_path)
    require_suffix(output, ".json")
    keep_same = keep_same and exists(output) and not force
    if not keep_same:
        refuse_overwrite(output, force=force)
    _refuse_ratings(metric, ratings)
    _refuse_criterion(strategy, criterion)
    if coefficients is not None:
        _refuse_search(mixing, strategy, criterion, max_members, start, confirm)
        coefficients, start, confirm = given_weights(coefficients), tuple(coefficients), 0.0
    known = read_candidates(
        [Path(path) for path in each_path(predictions_paths)],
        labels_path=labels_path,
        dtypes=wanted_dtypes(dtype),
        needs_all=dtype != "auto",
        sizes=sizes or {},
        has_limit=max_size is not None or bool(sizes) or criterion == "gain-per-byte",
        exclude=exclude,
        intersect=intersect,
    )
    _refuse_truncated(known, metric)
    rules = _rules(
        known,
        strategy=strategy or _usual_strategy(known, criterion) if coefficients is None else "given",
        criterion=criterion,
        limit=MAX_SIZE if max_size is None else max_size,
        max_members=max_members,
        beam_width=beam_width,
        start=start,
    )
    confirm = _usual_share(known) if confirm is None else confirm
    parts = _parts(known, confirm, are_segments=ratings is not None)
    storage = Storage(default_memory() if memory is None else memory, storage_folder(output))
    with closing(storage):
        judge = _judge(known, parts, metric, top_k, storage, ratings)
        outcome = _search(judge, known, mixing if coefficients is None else coefficients, rules)
        selection = Writer(
            known, judge, outcome, output.parent, metric, top_k, resamples, seed
        ).selection(confirm=confirm, labels_path=labels_path, excluded=tuple(exclude))
    if not keep_same or read_selection(output) != selection:
        write_selection(output, selection, force=force)
    return selection


def _usual_strategy(known: Candidates, criterion: Criterion) -> Strategy:
    """Return the strategy where none was named: all ensembles of a few candidates."""
    names = [candidate.name for candidate in known.candidates]
    is_small = num_ensembles(names, len(names)) <= 2**MOST_EXACT
    return "exhaustive" if is_small and criterion == "gain" else "greedy"


def _usual_share(known: Candidates) -> float:
    """Return the share of the videos that is held out where none was named."""
    return HELD_OUT_SHARE if len(known.ids) >= ENOUGH_VIDEOS else 0.0


def wanted_dtypes(dtype: Dtype | Auto | Sequence[Dtype]) -> tuple[Dtype, ...]:
    """Return the precisions that candidates may stand in."""
    if dtype == "auto":
        return DTYPES_OF_AUTO
    asked = (dtype,) if isinstance(dtype, str) else dtype
    return finest_first(asked)


def _refuse_criterion(strategy: Strategy | None, criterion: Criterion) -> None:
    if criterion == "gain-per-byte" and strategy in ("beam", "exhaustive"):
        raise SelectionError(
            f"The strategy {strategy} compares whole ensembles, but gain-per-byte compares "
            "additions.",
            hint="Use --strategy greedy or replacement with --criterion gain-per-byte.",
        )


def _refuse_search(
    mixing: Mixing,
    strategy: Strategy | None,
    criterion: Criterion,
    max_members: int | None,
    start: Sequence[str],
    confirm: float | None,
) -> None:
    """Raise if something says how to search, where members and coefficients are given."""
    given = {
        "--mixing": mixing != MIXING,
        "--strategy": strategy is not None,
        "--criterion": criterion != CRITERION,
        "--max-members": max_members is not None,
        "--start": bool(start),
        "--confirm": bool(confirm),
    }
    for option, is_given in given.items():
        if is_given:
            raise SelectionError(
                f"{option} says how members are chosen, but --weight names them.",
                hint=f"Leave out {option}, or every --weight.",
            )


def _rules(
    known: Candidates,
    *,
    strategy: Strategy | Given,
    criterion: Criterion,
    limit: int,
    max_members: int | None,
    beam_width: int,
    start: Sequence[str],
) -> Rules:
    """Return the rules of a search, in which candidates are places and not names."""
    if max_members is None and strategy == "replacement":
        max_members = MAX_ADDITIONS
    if max_members is not None and len(start) > max_members:
        raise SelectionError(
            f"There are {counted(len(start), 'member')} to start with, but an ensemble may have "
            f"only {max_members}.",
            hint="Raise --max-members, or start with fewer.",
        )
    places = {candidate.name: index for index, candidate in enumerate(known.candidates)}
    names = [candidate.name for candidate in known.candidates]
    role = "{} is given a coefficient" if strategy == "given" else "{} is a member to start with"
    refuse_unknown(start, list(places), role)
    unclear = next((name for name in start if names.count(name) > 1), None)
    if unclear is not None:
        raise SelectionError(
            f"{role.format(repr(unclear))}, but stands in several precisions.",
            hint="Name one precision with --dtype.",
        )
    if len(set(start)) < len(start):
        twice = next(name for name in start if start.count(name) > 1)
        raise SelectionError(
            f"{twice!r} is given twice as a member to start with.",
            hint="Give each --start once.",
        )
    return Rules(
        strategy=strategy,
        criterion=criterion,
        limit=limit,
        max_members=max_members,
        beam_width=beam_width,
        start=tuple(places[name] for name in start),
    )


def _parts(known: Candidates, confirm: float, *, are_segments: bool) -> list[NDArray[np.bool_]]:
    """Return which videos to choose by, and which are held out, if any are.

    All segments of a video are in one part, for they are much alike.
    """
    if not confirm:
        return [np.ones(len(known.ids), np.bool_)]
    return labelled_parts(
        [each.rpartition(":")[0] for each in known.ids] if are_segments else known.ids,
        known.labels,
        confirm,
        purposes=("to choose by", "to confirm the choice"),
        refusal=lambda problem: SelectionError(
            f"--confirm {confirm:g} {problem}",
            hint="Predict more videos, or choose by all of them with --confirm 0.",
        ),
    )


def _refuse_truncated(known: Candidates, metric: Metric) -> None:
    """Raise if a candidate leaves out classes, but the metric needs the ranking of each class."""
    for candidate in known.candidates:
        if metric != "gap" and candidate.predictions.is_sparse:
            raise SelectionError(
                f"{candidate.predictions.path} lists only some classes of each video, but "
                f"{metric_name(metric)} needs all.",
                hint="Predict again without --top-k into a .safetensors file, or select with "
                "--metric gap.",
            )


def _refuse_ratings(metric: Metric, ratings: Records | None) -> None:
    """Raise unless there are ratings of segments for the metric that needs them, and only then."""
    if metric == "map-at-k" and ratings is None:
        raise SelectionError(
            "MAP counts segments that people have rated, and no ratings are named.",
            hint="Name the records that hold them with --ratings.",
        )
    if metric != "map-at-k" and ratings is not None:
        raise SelectionError(
            f"--ratings are of segments, and {metric_name(metric)} does not count them.",
            hint="Leave out --ratings, or select with --metric map-at-k.",
        )


def _judge(
    known: Candidates,
    parts: Sequence[NDArray[np.bool_]],
    metric: Metric,
    top_k: int,
    storage: Storage,
    ratings: Records | None,
) -> Judge:
    """Read the candidates, and return what measures them within the memory of a storage."""
    if ratings is not None:
        return SegmentJudge.of(read_segments(known, read_ratings(ratings)), parts)
    if metric == "macro-map":
        return ClassJudge(read_class_table(known, parts, storage=storage))
    num_pools = len(known.candidates) + POOLS_OF_RANKING * NUM_THREADS
    wanted = num_pools * pool_size(len(known.ids), top_k)
    pool_bytes = min(wanted, storage.memory // POOL_SHARE)
    storage.reserve(pool_bytes)
    judge = GapJudge.of(
        read_tables(known, parts, k=top_k, storage=storage),
        top_k,
        pool_bytes=pool_bytes * len(known.candidates) // num_pools,
    )
    return judge if metric == "gap" else TopClassJudge.of(judge)


def _search(
    judge: Judge, known: Candidates, mixing: Mixing | Mapping[str, float], rules: Rules
) -> Outcome:
    """Search for the members, and for what greedy would have chosen.

    Args:
        judge: What measures ensembles.
        known: The candidates.
        mixing: How members are mixed, or the coefficients that some candidates are given.
        rules: The rules of the search.
    """
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        singles = list(
            threads.map(
                lambda index: judge.scores([Term(index, 1.0)]), range(len(known.candidates))
            )
        )
    room = rules.limit - known.shared_bytes
    fits = [candidate.num_bytes <= room for candidate in known.candidates]
    scores = [single.chosen_by for single in singles]
    if isinstance(mixing, str):
        weights = search_weights(mixing, scores, fits)
    else:  # the weight of one that is no member changes nothing, but may not be 0
        weights = [mixing.get(candidate.name, 1.0) for candidate in known.candidates]
    search = Search(judge.chosen_by, known.candidates, weights, rules, known.shared_bytes)
    search.know(scores)
    chosen = search.run()
    greedy = None
    if rules.strategy not in ("greedy", "given"):
        greedy = replace(search, rules=replace(rules, strategy="greedy")).run()
    if rules.strategy == "exhaustive":
        chosen = search.in_order_of_gain(chosen)
    members = distinct(chosen.terms)
    if mixing == "optimised":
        members = optimised(judge.chosen_by, members, chosen.score)
    measured = tuple(search.measured.values())
    kind = mixing if isinstance(mixing, str) else "given"
    return Outcome(rules, kind, tuple(singles), measured, chosen, tuple(members), greedy)
