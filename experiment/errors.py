"""What can go wrong through no fault of the code; the message says it to a person in one line."""


class DataError(Exception):
    """The data set cannot be had; the message says which file and what to do."""


class CheckpointError(Exception):
    """A file is not the checkpoint it should be; the message names it and says what is wrong."""


class JournalError(Exception):
    """The run cannot go on, or not here; the message says why."""


class Diverged(Exception):
    """The training loss is no longer a number; the message says when and what to try."""
