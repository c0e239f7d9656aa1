"""getopt_long(3): options in any place, letters together, long names cut short; and the word that is blamed.

The `getopt` of Python's library reads all words before the first of them can be looked at, and does not know where in
the line it was when it gave up; and has other words, as argparse has: scripts know those of QEMU's tools. The
environment variable POSIXLY_CORRECT is not looked at. Knows nothing about which options there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence


class OptionError(Exception):
    """An option that there is not, or whose value is missing or unwanted; the text is what getopt_long prints itself.

    Attributes:
        word: the one before the place where reading stopped.
        lacks_value: what is wrong is that there is no value.
    """

    def __init__(self, message: str, word: str, *, lacks_value: bool = False) -> None:
        super().__init__(message)
        self.word = word
        self.lacks_value = lacks_value


class OptionReader:
    """Iterates over the options, as pairs of `-x` or `--name` and value.

    Args:
        name: of the program, or the subcommand; what is blamed where nothing else is.
        letters: as getopt(3) has them: a colon behind each that takes a value.
        names: long ones, and whether they take a value.
        in_order: stop at the first word that is no option.

    Attributes:
        rest: words that are no options, complete after the last option.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        letters: str,
        names: Mapping[str, bool],
        *,
        in_order: bool = False,
    ) -> None:
        self.rest: list[str] = []
        self._words = list(words)
        self._letters = letters
        self._names = names
        self._in_order = in_order
        self._at = 0
        # What an option before left in front of this one; others' words are moved behind.
        self._last = name

    def __iter__(self) -> Iterator[tuple[str, str]]:
        while self._at < len(self._words):
            word = self._words[self._at]
            if word == "--":
                self._at += 1
                break
            if word == "-" or not word.startswith("-"):
                if self._in_order:
                    break
                self.rest.append(word)
                self._at += 1
            elif word.startswith("--"):
                self._at += 1
                yield self._long(word)
                self._last = self._words[self._at - 1]
            else:
                yield from self._short(word)
                self._last = self._words[self._at - 1]
        self.rest += self._words[self._at :]

    def _short(self, word: str) -> Iterator[tuple[str, str]]:
        for index, letter in enumerate(word[1:], 1):
            is_last = index == len(word) - 1
            if is_last:
                self._at += 1
            place = self._letters.find(letter)
            if place < 0 or letter in ":;":
                blamed = word if is_last else self.rest[-1] if self.rest else self._last
                raise OptionError(f"invalid option -- '{letter}'", blamed)
            if self._letters[place + 1 : place + 2] != ":":
                yield f"-{letter}", ""
                continue
            if not is_last:
                self._at += 1
                yield f"-{letter}", word[index + 1 :]
                return
            if self._at == len(self._words):
                raise OptionError(
                    f"option requires an argument -- '{letter}'", word, lacks_value=True
                )
            self._at += 1
            yield f"-{letter}", self._words[self._at - 1]

    def _long(self, word: str) -> tuple[str, str]:
        given, equals, value = word[2:].partition("=")
        if given in self._names:
            name = given
        else:
            found = [name for name in self._names if name.startswith(given)]
            if not found:
                raise OptionError(f"unrecognized option '{word}'", word)
            if len(found) > 1:
                ways = "".join(f" '--{name}'" for name in found)
                raise OptionError(f"option '{word}' is ambiguous; possibilities:{ways}", word)
            name = found[0]
        if not self._names[name]:
            if equals:
                raise OptionError(f"option '--{name}' doesn't allow an argument", word)
            return f"--{name}", ""
        if not equals:
            if self._at == len(self._words):
                raise OptionError(f"option '--{name}' requires an argument", word, lacks_value=True)
            value = self._words[self._at]
            self._at += 1
        return f"--{name}", value
