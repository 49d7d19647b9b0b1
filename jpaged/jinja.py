# SPDX-License-Identifier: Apache-2.0
"""Chat templates as programs: Jinja in a sandbox, with what transformers gives to templates.

A template comes with a model, from strangers: it sees the conversation as plain data, and nothing
of this process. It may take long, or all memory; that no sandbox of Jinja's prevents.
"""

import datetime
import json
import traceback
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils


class _Refusal(jinja2.TemplateError):
    """What a template raises by itself."""


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, which marks what is learnt in training: here, its body.

    Called as a block of its own, as transformers does, so that variables have the same scope.
    """

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, which would store names that lead to the insides of Python."""

    # Without self among the names, so that a template can have it.
    def __init__(*args: Any, **kwargs: Any):  # pyright: ignore[reportSelfClsParameterName]
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """The name `dict` of templates, without what else hangs on Python's class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Program:
    """A template that was compiled."""

    def __init__(self, source: str, name: str):
        """Compiles it.

        Args:
          source: the template.
          name: what messages call it.

        Raises:
          ValueError: if it is no template.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self._name = name
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise ValueError(f"{name}, line {e.lineno}: {_line(e)}") from e
        except Exception as e:  # nested deeper than Python goes, for instance
            raise ValueError(f"{name} cannot be compiled: {_line(e)}") from e

    def run(self, variables: dict[str, Any]) -> str:
        """Renders it.

        Args:
          variables: plain data, by the names that the template knows them by.

        Raises:
          ValueError: if it fails, or refuses what it was given; a line that says where and why.
        """
        try:
            return self._template.render(variables)
        except _Refusal as e:
            raise ValueError(f"{self._name} refuses the conversation: {_line(e)}") from e
        except Exception as e:  # whatever a stranger's program raises
            frames = traceback.extract_tb(e.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
            where = f", line {lines[-1]}," if lines else ""
            raise ValueError(f"{self._name}{where} fails: {type(e).__name__}: {_line(e)}") from e


def _raise(message: object) -> None:
    raise _Refusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's filter escapes what HTML has a meaning for; prompts are no HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace takes no name with an underscore: {name}"
        )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
