"""Errors for people: each carries one string that says where, what, what came, and what to do."""


def printable(text: object, max_chars: int = 200) -> str:
    """Text from elsewhere for a message or a terminal: on one line, shortened, control characters escaped.

    Escape sequences, bidirectional overrides and line breaks are shown as ``\\x1b``, ``\\u202e`` and ``\\n``.
    """
    whole = str(text)
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in whole[:max_chars]
    )
    return shown if len(whole) <= max_chars else f"{shown}... ({len(whole):,} characters)"


class CdpoError(Exception):
    """Base of every error that a user can cause or mend; the command line prints it without a traceback."""


class ConfigError(CdpoError):
    """The configuration, or a value given on the command line, cannot be used."""


class PromptError(CdpoError):
    """A prompt source is missing, empty or broken."""


class ModelError(CdpoError):
    """A model cannot be found, loaded or run."""


class GenerationError(CdpoError):
    """Too many prompts cannot be made into images."""


class RewardError(CdpoError):
    """A reward cannot be loaded, or failed on a batch of images."""


class PreferenceError(CdpoError):
    """A set of preferences is missing or broken."""


class CurriculumError(CdpoError):
    """The scores do not yield the pairs that the curriculum asks for."""


class TrainingError(CdpoError):
    """Training could not start or go on."""


class SearchError(CdpoError):
    """Trials of a search cannot be compared: the first, the paper's, failed, or none was judged."""


class ExportError(CdpoError):
    """What was trained cannot be written in the format asked for, or where it was asked for."""


class StoreError(CdpoError):
    """A run folder is missing, damaged, in use, or was made with another configuration."""


class ClusterError(CdpoError):
    """Ray cannot be reached, does not let us in, or lets everyone in."""


class ResourceError(CdpoError):
    """A step's actors do not fit the cluster."""
