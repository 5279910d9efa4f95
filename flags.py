"""Command lines: types of values with their ranges, and a parser that refuses the rest in one
sentence.

A range is declared where the flag is, `add_argument("--lr", type=flags.positive)`, or with a
policy's config field, `policy.flag(0.7, "...", high=1)`. The same declaration checks a checkpoint's
config.
"""

import argparse
import dataclasses
import math
import os
import re
import shlex
from pathlib import Path

from runtime import UserError, started_as

LARGEST = 10**9  # of counts and seeds: what NumPy, torch and a day have room for


class Formatter(argparse.RawDescriptionHelpFormatter):
    """argparse's help, with short words for values and the default behind each text."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=26)

    def _get_default_metavar_for_optional(self, action):
        # N a whole number, X any other, PATH, or the flag's name
        if isinstance(action.type, Number):
            return "N" if action.type.kind is int else "X"
        return "PATH" if action.type in (Path, new_folder) else action.dest.upper()

    def _get_help_string(self, action):
        # a text that ends with a bracket names its default, or what stands in for it
        silent = action.help.endswith(")") or action.default is argparse.SUPPRESS
        if silent or action.default is None or isinstance(action.default, bool):
            return action.help
        return f"{action.help} (%(default)s)"


class HelpAll(argparse.Action):
    """--help_all: every flag, group by group."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_all(), end="")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one sentence, not 70 names of flags first.

    first: names of the flags that a user needs first, as "dataset out seed". --help shows these, in
    this order; --help_all shows every flag under the group (`add_argument_group`) it was added to.
    """

    def __init__(self, description, first="", **options):
        options.setdefault("formatter_class", Formatter)
        if len(started_as()) == 2:
            options.setdefault("prog", shlex.join(["python", *started_as()]))
        super().__init__(description=description, **options)
        self.first = first.split()
        if self.first:
            text = "show every flag, in groups, and exit"
            hidden = argparse.SUPPRESS  # among the values that were parsed
            self.add_argument("--help_all", action=HelpAll, nargs=0, default=hidden, help=text)

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def format_help(self):
        """The text of --help."""
        if not self.first:
            return super().format_help()
        # argparse keeps all flags of all groups in one list
        by_name = {action.dest: action for action in self._actions}
        shown = [by_name[name] for name in self.first]
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        formatter.start_section("flags that are needed first")
        formatter.add_arguments(shown)
        formatter.end_section()
        n_flags = sum(action.help is not argparse.SUPPRESS for action in self._actions)
        formatter.add_text(f"--help_all shows all {n_flags} flags, in groups.")
        return formatter.format_help()

    def format_all(self):
        """The text of --help_all: no usage line first, which would name every flag once more."""
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        return formatter.format_help()


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number of a range, as the type of a flag.

    low, high: inclusive bounds; above, below: exclusive ones.
    """

    kind: type
    low: float = None
    high: float = None
    above: float = None
    below: float = None

    def __call__(self, text):
        """The number that a text says. Raises ArgumentTypeError."""
        try:
            value = self.kind(text)
        except (ValueError, TypeError, OverflowError):
            value = None
        if value is None or not self.holds(value):
            raise argparse.ArgumentTypeError(f"{text} is not {self}")
        return value

    def holds(self, value):
        """True if a value is of this type and inside the range."""
        # a whole number may stand for a float; True, which Python counts as 1, for neither
        kinds = (int,) if self.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            return False
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self):
        named = (
            ("of at least", self.low),
            ("above", self.above),
            ("below", self.below),
            ("of at most", self.high),
        )
        bounds = [f"{word} {bound:g}" for word, bound in named if bound not in (None, LARGEST)]
        return (
            f"a {'whole' if self.kind is int else 'finite'} number {' and '.join(bounds)}".strip()
        )


def at_least(low, high=LARGEST):
    """Whole numbers from `low` to `high`."""
    return Number(int, low, high)


count = at_least(1)
whole = at_least(0)
pixels = at_least(16, 4096)
finite = Number(float)
positive = Number(float, above=0)
not_negative = Number(float, low=0)
share = Number(float, low=0, high=1)
fraction = Number(float, above=0, below=1)
held_out = Number(float, above=0, high=0.5)  # every second demonstration at most


@dataclasses.dataclass(frozen=True)
class IntList:
    """Whole numbers of a range, with commas between them.

    The value stays text, as a config holds it.
    """

    each: Number

    def __call__(self, text):
        if not self.holds(text):
            raise argparse.ArgumentTypeError(f"{text!r} is not {self}")
        return text

    def holds(self, text):
        try:
            words = text.split(",") if isinstance(text, str) else ["no text"]
            return all(self.each.holds(int(word)) for word in words)
        except ValueError:
            return False

    def __str__(self):
        return f"a list as 1,2,4, each {self.each}"


int_list = IntList(at_least(1, 512))


def several(text):
    """The type of a flag: "all", or the numbers [int] of a text such as 0,3,5."""
    if text == "all":
        return text
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor numbers as 0,3,5")
    return sorted({int(word) for word in text.split(",")})


def new_file(*suffixes):
    """The type of a flag: a file to write, with one of these suffixes.

    A suffix is asked for so that no file of another kind is replaced.
    """

    def parse(text):
        # checked while flags are parsed, hours before the file is written
        path = Path(text)
        if not path.name or path.is_dir():
            raise argparse.ArgumentTypeError(
                f"{text or '(nothing)'} is a folder, a file is expected"
            )
        if path.suffix.lower() not in suffixes:
            wanted = " or ".join(suffixes)
            raise argparse.ArgumentTypeError(f"{text} is no name that ends in {wanted}")
        return _writable(path)

    return parse


def new_folder(text):
    """The type of a flag: a folder to write into, made where it is not there."""
    path = Path(text)
    if not path.name or path.name == "..":
        raise argparse.ArgumentTypeError(f"{text or '(nothing)'} has no name; give a folder")
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file, a folder is expected")
    return _writable(path)


def _writable(path):
    """`path`, if it can be made in the nearest folder above it that is there."""
    try:
        # the folder itself may be made later: what counts is the nearest one that exists
        above = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:  # a name that is too long
        raise argparse.ArgumentTypeError(f"{path} cannot be written ({error.strerror})") from None
    if above != path and not above.is_dir():
        raise argparse.ArgumentTypeError(f"{path} lies below {above}, which is a file")
    if not os.access(above, os.W_OK):
        raise argparse.ArgumentTypeError(f"{above} is read-only; give another path")
    return path


# -- config fields of policies ------------------------------------------------------------------


def field_type(kind, low, high, above, below):
    """The type of a config field. Without a bound, whole numbers start at 1 and others at 0."""
    if kind not in (int, float):
        return kind
    if low is None and above is None:
        low = 1 if kind is int else 0
    if high is None and below is None and kind is int:
        high = 4096  # sizes of networks, grids and images: more than that fits in no memory
    return Number(kind, low, high, above, below)


def check_fields(config):
    """Raise UserError unless every field of a config holds what its declaration allows."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind, choices = field.metadata["type"], field.metadata["choices"]
        # a checkpoint's config comes from a file, so it is held to what the flags allow
        ranged = hasattr(kind, "holds")
        good = kind.holds(value) if ranged else isinstance(value, kind)
        if not good or choices and value not in choices:
            wanted = str(kind) if ranged else f"a {kind.__name__}"
            wanted = f"one of {', '.join(choices)}" if choices else wanted
            raise UserError(f"--{field.name} {value!r}: is not {wanted}")
