"""JSON as QEMU reads it: strings may be in single quotes, keys occur once, and what is wrong is said in QEMU's words.

RFC 8259 but for that; what is nested deeper than anybody writes is refused. Knows nothing about what the values mean.
"""

from __future__ import annotations

import re
from typing import Any

from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import ConfigError

_TOKEN = re.compile(
    r"""[ \t\r\n]*(?:
        (?P<mark>[\[\]{}:,])
      | (?P<string>"(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*"|'(?:[^'\\\x00-\x1f]|\\[^\x00-\x1f])*')
      | (?P<float>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+))
      | (?P<integer>-?(?:0|[1-9][0-9]*))
      | (?P<keyword>[a-z]+)
      | (?P<end>\Z)
      | (?P<stray>.)
    )""",
    re.VERBOSE | re.DOTALL,
)
# A pair of surrogates is one character.
_PAIR = r"u[dD][89abAB][0-9A-Fa-f]{2}\\u[dD][c-fC-F][0-9A-Fa-f]{2}"
_ESCAPE = re.compile(rf"\\({_PAIR}|u[0-9A-Fa-f]{{4}}|.)", re.DOTALL)
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"} | {c: c for c in "\"'\\/"}
_KEYWORDS = {"true": True, "false": False, "null": None}

# Nobody writes such; but what is nested is walked recursively.
_MAX_DEPTH = 64
# Python refuses to read thousands of digits; QEMU makes a floating-point number of them, too.
_INTEGER_BITS = 64


def parse_json_text(text: str) -> Any:
    """The value.

    Raises:
        ConfigError: it is not JSON; the message is QEMU's.
    """
    parser = _Parser(_tokens(text))
    if parser.peek() is None:
        raise ConfigError("Expecting a JSON value")
    value = parser.value()
    if parser.peek() is not None:
        raise ConfigError("Expecting at most one JSON value")
    return value


@lean_dataclass(frozen=True, slots=True)
class _Token:
    """What a text is made of."""

    kind: str
    text: str


def _tokens(text: str) -> list[_Token]:
    found = []
    position = depth = 0
    while match := _TOKEN.match(text, position):
        kind = match.lastgroup or "end"
        if kind == "end":
            break
        if kind == "stray":
            raise _error(f"stray '{match['stray']}'")
        position = match.end()
        word = match[kind]
        depth += (word in ("[", "{")) - (word in ("]", "}"))
        if depth > _MAX_DEPTH:
            raise ConfigError("JSON nesting depth limit exceeded")
        found.append(_Token(kind, word))
    return found


def _error(what: str) -> ConfigError:
    return ConfigError(f"JSON parse error, {what}")


class _Parser:
    """One value after the other from a list of tokens."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._next = 0

    def peek(self) -> _Token | None:
        """The next token, which stays."""
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def value(self) -> Any:
        token = self._take()
        if token.kind == "string":
            return _unquote(token.text)
        if token.kind == "integer":
            digits = token.text
            if len(digits) <= 20 and -(1 << 63) <= int(digits) < 1 << _INTEGER_BITS:
                return int(digits)
            return float(digits)
        if token.kind == "float":
            return float(token.text)
        if token.kind == "keyword":
            if token.text not in _KEYWORDS:
                raise _error(f"invalid keyword '{token.text}'")
            return _KEYWORDS[token.text]
        if token.text == "{":
            return self._object()
        if token.text == "[":
            return self._array()
        raise _error("expecting value")

    def _take(self) -> _Token:
        token = self.peek()
        if token is None:
            raise _error("premature EOI")
        self._next += 1
        return token

    def _take_if(self, mark: str) -> bool:
        token = self.peek()
        if token is None:
            raise _error("premature EOI")
        self._next += token.kind == "mark" and token.text == mark
        return token.kind == "mark" and token.text == mark

    def _object(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._take_if("}"):
            return found
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise _error("key is not a string in object")
            if not self._take_if(":"):
                raise _error("missing : in object pair")
            value = self.value()
            if key in found:
                raise _error("duplicate key")
            found[key] = value
            if self._take_if("}"):
                return found
            if not self._take_if(","):
                raise _error("expected separator in dict")

    def _array(self) -> list[Any]:
        found: list[Any] = []
        if self._take_if("]"):
            return found
        while True:
            found.append(self.value())
            if self._take_if("]"):
                return found
            if not self._take_if(","):
                raise _error("expected separator in list")


def _unquote(literal: str) -> str:
    def replace(match: re.Match[str]) -> str:
        escape = match[1]
        if not escape.startswith("u"):
            if escape not in _ESCAPES:
                raise _error("invalid escape sequence in string")
            return _ESCAPES[escape]
        if len(escape) == 1:
            raise _error("invalid escape sequence in string")
        code = int(escape[1:5], 16)
        if len(escape) > 5:
            code = 0x10000 + ((code & 0x3FF) << 10) + (int(escape[7:], 16) & 0x3FF)
        elif 0xD800 <= code < 0xE000:
            raise _error(f"{match[0]} is not a valid Unicode character")
        return chr(code)

    return _ESCAPE.sub(replace, literal[1:-1])
