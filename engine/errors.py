"""Every error a caller may meet.  Each message names the value, the limit and the remedy."""


class NudgingError(Exception):
    """Base class of the package's errors."""


class BadRequest(NudgingError, ValueError):
    """The caller asked for something that cannot be done as asked."""


class CheckpointError(NudgingError):
    """A checkpoint directory is missing, incomplete, damaged or of an unsupported kind."""


class OutOfBlocks(NudgingError):
    """A key-value block pool has no free block left."""


class NumericalError(NudgingError):
    """There are no logits to pick a token of a request from: they are not finite, or no token is left."""


class DeadlineExceeded(NudgingError, TimeoutError):
    """A request was not finished within its timeout."""


class EngineClosed(NudgingError):
    """The engine was closed before or while the request ran."""
