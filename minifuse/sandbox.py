"""Renders a chat template in a process of its own, with little time and memory.

A template is code from strangers, and Jinja's sandbox bounds what it can reach, not how long it
runs. `chat` starts this file as a script, writes one JSON request to its standard input and reads
one JSON answer from its standard output; nothing else of minifuse is imported here.

request: {"paths": folders to import jinja2 from, "template": text, "contexts": list of variables,
          "max_chars": of one rendering, "cpu_seconds": ..., "memory_bytes": ...}
answer:  {"texts": one rendering per context} or {"error": kind, "message": text}
"""

import contextlib
import datetime
import json
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.parser import Parser

# Answers must not depend on the day; Llama 3's template falls back on the same date.
TODAY = datetime.datetime(2024, 7, 26)
MESSAGE_CHARS = 1000


def main() -> None:
    request = json.load(sys.stdin)
    _set_limits(request["cpu_seconds"], request["memory_bytes"])
    sys.path.extend(request["paths"])
    json.dump(_answer(request), sys.stdout)


def _set_limits(cpu_seconds: int, memory_bytes: int) -> None:
    """Lower what the platform can limit; elsewhere the caller's clock is all there is."""
    try:
        import resource
    except ImportError:
        return
    limits = {
        # A second between the two: the first sends a signal that says why the process died.
        "RLIMIT_CPU": (cpu_seconds, cpu_seconds + 1),
        "RLIMIT_AS": (memory_bytes, memory_bytes),
        "RLIMIT_FSIZE": (0, 0),
        "RLIMIT_CORE": (0, 0),
    }
    for name, wanted in limits.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        _, most = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            wanted = (min(wanted[0], most), min(wanted[1], most))
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, wanted)


def _answer(request: dict) -> dict:
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    try:
        return {"texts": _render(request)}
    except TemplateSyntaxError as error:
        kind, message = "syntax", f"line {error.lineno}: {error.message}"
    except SecurityError as error:
        kind, message = "security", str(error)
    except MemoryError:
        kind, message = "memory", ""
    except RecursionError:
        kind, message = "recursion", ""
    except _TooLongError:
        kind, message = "size", ""
    except Exception as error:
        if getattr(error, "is_refusal", False):
            kind, message = "refused", str(error)
        else:
            kind, message = "failed", f"{type(error).__name__}: {error}"
    return {"error": kind, "message": message[:MESSAGE_CHARS]}


class _TooLongError(Exception):
    """A rendering has more characters than it may."""


def _render(request: dict) -> list[str]:
    template = _make_environment().from_string(request["template"])
    texts = []
    for context in request["contexts"]:
        pieces, num_chars = [], 0
        for piece in template.generate(context):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > request["max_chars"]:
                raise _TooLongError
        texts.append("".join(pieces))
    return texts


def _make_environment() -> "Environment":
    """The environment in which templates are written to run: that of transformers."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Refusal(TemplateError):
        is_refusal = True

    class Generation(Extension):
        """`{% generation %}` marks what a model wrote, for training; here it marks nothing."""

        tags = {"generation"}  # noqa: RUF012  # the type that jinja2 gives it

        def parse(self, parser: "Parser") -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PlainNamespace(Namespace):
        """A namespace that holds nothing that looks like Python's own attributes."""

        def __setitem__(self, name: str, value: object) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace may not hold {name!r}")
            super().__setitem__(name, value)

    class PlainDict:
        """Makes dicts, and gives no way to the type."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict:
            return dict.fromkeys(*args)

    def make_namespace(*args: Any, **kwargs: Any) -> Namespace:
        made = PlainNamespace()
        for name, value in dict(*args, **kwargs).items():
            made[name] = value
        return made

    def raise_exception(message: object) -> NoReturn:
        raise Refusal(str(message))

    def strftime_now(format: str) -> str:
        return TODAY.strftime(format)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=strftime_now,
        namespace=make_namespace,
        dict=PlainDict(),
    )
    return environment


if __name__ == "__main__":
    main()
