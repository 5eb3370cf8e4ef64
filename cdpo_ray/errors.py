"""Errors for users; each message is one string: `where: what, got X; what to do`."""


def printable(text: object, max_chars: int = 200) -> str:
    """Make external text safe for a message or a terminal: one line, shortened, control characters escaped.

    Escape sequences, bidirectional overrides and line breaks are shown as ``\\x1b``, ``\\u202e`` and ``\\n``.
    """
    whole = str(text)
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in whole[:max_chars]
    )
    return shown if len(whole) <= max_chars else f"{shown}... ({len(whole):,} characters)"


class CdpoError(Exception):
    """Base of all errors that a user can cause or fix; the command line prints them without a traceback."""


class ConfigError(CdpoError):
    """The configuration, or a value given on the command line, cannot be used."""


class PromptError(CdpoError):
    """A prompt source is missing, empty or invalid."""


class ModelError(CdpoError):
    """A model cannot be found, loaded or run."""


class GenerationError(CdpoError):
    """Images cannot be generated for too many prompts."""


class RewardError(CdpoError):
    """A reward cannot be loaded, or failed on a batch of images."""


class PreferenceError(CdpoError):
    """A set of preferences is missing or invalid."""


class CurriculumError(CdpoError):
    """The scores do not yield the pairs that the curriculum requires."""


class TrainingError(CdpoError):
    """Training cannot start or continue."""


class EvaluationError(CdpoError):
    """A candidate cannot be tried beside the others."""


class SearchError(CdpoError):
    """Trials of a search cannot be compared: the first, the paper's, failed, or none was judged."""


class ExportError(CdpoError):
    """The trained weights cannot be written in the requested format or to the requested path."""


class StoreError(CdpoError):
    """A run folder is missing, damaged, locked, or was made with another configuration."""


class LockHeldError(StoreError):
    """Another process holds the lock of a run folder."""


class ClusterError(CdpoError):
    """Ray cannot be reached, refuses our token, or is open to everyone."""


class ResourceError(CdpoError):
    """A step's actors do not fit the cluster."""
