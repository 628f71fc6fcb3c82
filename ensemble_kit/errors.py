"""The errors that a user can fix, and how a message quotes a value that a file holds.

EnsembleKitError
├── InputError         a file that was named and is not there
├── OutputError        a file that would be overwritten or cannot be written
├── RecordError        records on disk, their schema, their label names
├── RecipeError        recipes and the values set over them
├── CheckpointError    tensor files: checkpoints, predictions, fused files
├── TrainingError      a run that cannot start or go on
├── JobError           a job among several that has failed, or cannot be started
├── AveragingError     an average that loses to a checkpoint alone, or cannot be compared
├── PredictionsError   predictions and label files, and what does not match between them
├── SelectionError     candidates that cannot be chosen from, a selection that no longer holds
├── SizeLimitError     an artefact over its byte limit, or a size that cannot be read
├── FusionError        members that cannot become one graph, a graph that disagrees with them
├── ExportError        an ONNX file that fails one of its proofs
├── ForeignModelError  an ONNX file made elsewhere that cannot be a member
├── VerificationError  a file that does not hold what it claims of itself
├── HubError           a file on the Hugging Face Hub that cannot be had, or put there
└── ProviderError      a file cannot be run, or not on the device that was asked for
"""

from typing import Any

from ensemble_kit.wording import printable

LONGEST_MESSAGE, LONGEST_VALUE = 2_000, 80  # characters; a file can hold a name of megabytes


def shown(value: object) -> str:
    """Return a value of a file as messages quote it: as Python writes it, cut after 80 characters.

    Python itself refuses to write a number of more than 4,300 digits, or lists within lists
    without an end.
    """
    try:
        text = repr(value[: LONGEST_VALUE + 1] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):
        return f"a value too long to show ({type(value).__name__})"
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _presentable(text: str) -> str:
    """Return a message that neither steers a terminal nor fills it."""
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE - 200]} [...] {text[-200:]}"
    return printable(text)


class EnsembleKitError(Exception):
    """An error that the user can fix; ``hint`` is required and says how.

    Both come to hold names and values from files that anybody may have made, so what is not
    printable is shown as its escape, and what is too long is cut.

    Args:
        problem: What is wrong: the file, the key, the value, what was expected.
        hint: One imperative sentence.
    """

    def __init__(self, problem: str, *, hint: str) -> None:
        self.problem = _presentable(problem)
        self.hint = _presentable(hint)
        super().__init__(f"{self.problem}\n{self.hint}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Let an error cross from one process to another with its hint, which pickle would drop."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[EnsembleKitError], arguments: tuple[Any, ...], attributes: dict[str, Any]
) -> EnsembleKitError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(attributes)
    return error


class InputError(EnsembleKitError):
    """A file that was named and is not there."""


class OutputError(EnsembleKitError):
    """A file that would be overwritten, or cannot be written."""


class RecordError(EnsembleKitError):
    """Records on disk, their schema or their label names are not what they should be."""


class RecipeError(EnsembleKitError):
    """A recipe, or a value set over it, cannot be used."""


class CheckpointError(EnsembleKitError):
    """A tensor file is missing, damaged, or not of the kind or run that was expected."""


class TrainingError(EnsembleKitError):
    """A run that cannot start or go on."""


class JobError(EnsembleKitError):
    """A job among several has failed, or cannot be started."""


class AveragingError(EnsembleKitError):
    """An average loses to a checkpoint alone, or there is nothing to compare it on."""


class PredictionsError(EnsembleKitError):
    """Predictions or labels cannot be read, or do not belong together."""


class SelectionError(EnsembleKitError):
    """Candidates that cannot be chosen from, or a selection that no longer holds."""


class CalibrationError(EnsembleKitError):
    """An ensemble cannot be calibrated on some predictions."""


class SizeLimitError(EnsembleKitError):
    """An artefact is over its byte limit, or a size cannot be read."""


class FusionError(EnsembleKitError):
    """Members that cannot become one graph, or a graph that disagrees with its members."""


class ExportError(EnsembleKitError):
    """An ONNX file fails one of its proofs."""


class ForeignModelError(EnsembleKitError):
    """An ONNX file that another framework made cannot be a member, or not as it was mapped."""


class VerificationError(EnsembleKitError):
    """A file does not hold what it claims of itself."""


class HubError(EnsembleKitError):
    """A file on the Hugging Face Hub that cannot be had, or put there."""


class ProviderError(EnsembleKitError):
    """A file cannot be run, or not on the device that was asked for."""
