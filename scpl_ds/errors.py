"""Every error this package raises on purpose, one class per cause.

A message says what was asked, what was found (with numbers and where), and what to do.
Each class also derives from the builtin that people catch, so ``except ValueError`` works.
"""


class ScplError(Exception):
    """Base of all errors that ``scpl_ds`` raises on purpose; the CLI prints them without a
    traceback."""


class OtherRankFailed(ScplError):
    """Another rank found the problem and says so itself; this one only stops."""


class RecipeError(ScplError, ValueError):
    """A recipe, config file or command line that cannot be run as written."""


class PartitionError(ScplError, ValueError):
    """A model that cannot be cut into the stages asked for."""


class ScheduleError(ScplError, ValueError):
    """A schedule that would deadlock or compute something twice or never."""


class DataError(ScplError, ValueError):
    """A data set that is missing, empty or does not fit the model."""


class BoundaryError(ScplError, RuntimeError):
    """Something went wrong between two stages: a peer is gone, late, or sent what was not
    expected."""


class DivergenceError(ScplError, ArithmeticError):
    """A loss or a gradient that is no number any more: the run would go on with broken weights."""


class CheckpointError(ScplError, RuntimeError):
    """A checkpoint that is missing, incomplete, damaged, or belongs to another model."""


class SaveError(CheckpointError):
    """A checkpoint, an export or a file of a run that could not be written; the checkpoints before
    are whole."""


class HubError(ScplError, RuntimeError):
    """An export that could not be uploaded to the hub; the export itself is whole."""


FAILED_RUN = (BoundaryError, DivergenceError, SaveError, HubError)
"""Of a run that had begun: exit code 1. The others are found before anything is trained: 2."""
