"""Every error that a user can cause: one line that says what was got, what was wanted, what to do.

Command lines print the message and leave with the exit status that the class carries.
"""

# Room for the names of every tensor of a model; what a file holds may be any length.
MAX_MESSAGE_CHARS = 20_000


class MinifuseError(Exception):
    """Base of all errors that minifuse raises on purpose; the message is fit for a user.

    Whatever foreign text a message quotes, it is one printable line that ends: of one that is too
    long, the middle is left out, so that it still says what to do.
    """

    exit_status = 1

    def __init__(self, message: object = ""):
        text = "".join(c if c.isprintable() else " " for c in str(message))
        if len(text) > MAX_MESSAGE_CHARS:
            half = MAX_MESSAGE_CHARS // 2 - 3
            text = f"{text[:half]} ... {text[-half:]}"
        super().__init__(text)


class UsageError(MinifuseError):
    """The call itself is wrong: an unknown name, a bad number, a prompt that cannot fit."""

    exit_status = 2


class ConfigError(MinifuseError):
    """A model's config contradicts itself, or asks for what minifuse does not implement."""


class CheckpointError(MinifuseError):
    """Weights or tokenizer files are missing, corrupt, or do not match the config."""


class ModelNotFoundError(MinifuseError):
    """A model name leads nowhere; the message lists what was tried."""


def one_line(said: BaseException | str, max_chars: int = 200) -> str:
    """Foreign text fit for a message: printable, on one line, not endless.

    Of an exception its text, or its type where it has none.
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in str(said)).split())
    if not text and isinstance(said, BaseException):
        return type(said).__name__
    return text if len(text) <= max_chars else text[:max_chars].rstrip() + "..."
