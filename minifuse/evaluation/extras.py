"""Libraries that only the evaluation needs: imported by name, and named where they are missing."""

import importlib
from types import ModuleType

from minifuse.errors import MinifuseError


def import_extra(name: str) -> ModuleType:
    """The module of that name, such as `scipy.stats`.

    raises: MinifuseError with the command that installs what is missing
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if missing.split(".")[0] != name.split(".")[0]:
            raise  # the library is there, and one of its own parts is not
        raise MinifuseError(
            f"{missing} is not installed, and the evaluation needs it; "
            "run: pip install 'minifuse[eval]'"
        ) from None
