"""What is said when one of the processes that load data fails, or dies."""

import contextlib
import re
from collections.abc import Iterator

from transformers import TrainingArguments

from hf_aegis.training.checkpoints import how_to_go_on
from hf_aegis.training.termination import SaveOnTermination
from hf_aegis.training.training_ended import TrainingEndedError


# What PyTorch says, of a process that died and of one that raised an error.
_DIED = re.compile(r"DataLoader worker \(pid(\(s\))? .*(killed by signal|exited unexpectedly)")
_RAISED = re.compile(r"Caught (?P<kind>\w+) in DataLoader worker process \d+\.\nOriginal Traceback", re.MULTILINE)

_SHORT_OF_MEMORY = (
    "The system kills one where memory is short, and a bus error ends one where shared memory is: set "
    "dataloader_num_workers lower"
)
_ASKED_TO_END = (
    "The training got SIGTERM, and what sent it may have ended that process before the step under way was done"
)


class DataLoadingError(TrainingEndedError, RuntimeError):
    """A process that loads data has died; the message says what may have ended it, and how the training goes on."""


@contextlib.contextmanager
def explaining_loading_errors(args: TrainingArguments, termination: SaveOnTermination) -> Iterator[None]:
    """
    A block that trains. What a loading process has raised comes as the error that it was, without the traceback that
    PyTorch makes its message; that is what it came from.

    Args:
        args (`TrainingArguments`): Of the training.
        termination ([`SaveOnTermination`]): Says whether the training was asked to end, which may end its processes
            that load data first.

    Raises:
        DataLoadingError: In the place of PyTorch's error about a process that died.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        text = str(error)
        if _DIED.match(text):
            reason = _ASKED_TO_END if termination.asked else _SHORT_OF_MEMORY
            raise DataLoadingError(
                f"{text.strip().rstrip('.')}: of {args.dataloader_num_workers} processes that load data one has died. "
                f"{reason}. {how_to_go_on(str(args.output_dir))}"
            ) from error
        if raised := _RAISED.match(text):
            # The last line of a traceback, which a message of several lines goes on from.
            lines = list(re.finditer(rf"^[\w.]*{raised['kind']}(: |\n*\Z)", text, re.MULTILINE))
            if lines:
                # NumPy's cannot be made of a text, so that PyTorch makes it another.
                kind = MemoryError if raised["kind"] == MemoryError.__name__ else type(error)
                raise kind(text[lines[-1].end() :].strip()) from error
        raise
