"""What a pickle says, without running anything of it.

A pickle is a program for a stack machine; what makes it dangerous is that `pickle` calls whatever function it names.
Here the machine is run with the instructions that build data alone: numbers, texts, bytes, lists, tuples, dicts, sets.
A name that the pickle mentions is looked up in the table that the caller gives, whose functions are ours, and every
other name ends the reading. What would be an object becomes a `Record` of its class's name and its state.

Instructions come from the standard library's `pickletools.genops`, which decodes them and does nothing else.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from ..errors import InputError

Names = Mapping[str, Callable[..., Any]]

_MARK = object()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
# Instructions whose argument is the value.
_VALUES = re.compile(r"(BIN)?INT[12]?|(BIN)?FLOAT|LONG[14]?|(SHORT_)?(BIN)?(STRING|BYTES|UNICODE)8?|BYTEARRAY8")


@dataclass(eq=False)
class Record:
    """An object of the pickle as data: the name of its class, and its state."""

    name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Name:
    text: str
    make: Callable[..., Any]


def read_pickle(file: BinaryIO, names: Names) -> Any:
    """Return the value of a pickle.

    Args:
        file: where it lies.
        names: what stands for "module.name" where the pickle calls it; gets the arguments of the call. These functions
            must take any arguments; a wrong number or type of them may raise TypeError or ValueError.

    Raises:
        InputError: it names something else, has another instruction, or is no complete pickle.
    """
    machine = _Machine(names)
    try:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "STOP":
                return machine.pop()
            machine.run(operation.name, argument)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, UnicodeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"it is no complete pickle, perhaps cut off: {error}") from error
    raise InputError("it is no complete pickle, perhaps cut off: its end is missing")


class _Machine:
    """The stack and the memo of a pickle that is read."""

    def __init__(self, names: Names) -> None:
        self.names, self.memo = names, dict[int, Any]()
        self.stack: list[Any] = []

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark stands where a value should")
        return value

    def pop_to_mark(self) -> list[Any]:
        last = len(self.stack) - 1
        while self.stack[last] is not _MARK:  # an IndexError where there is none
            last -= 1
            if last < 0:
                raise ValueError("there is no mark")
        values = self.stack[last + 1 :]
        del self.stack[last:]
        return values

    def run(self, operation: str, argument: Any) -> None:
        if _VALUES.fullmatch(operation):
            self.stack.append(argument)
        elif operation in _CONSTANTS:
            self.stack.append(_CONSTANTS[operation]())
        elif operation not in ("PROTO", "FRAME"):
            step = getattr(self, f"_{operation.lower()}", None)
            if step is None:
                raise InputError(f"it has the instruction {operation}, which no checkpoint needs")
            step(argument)

    # --- the stack and the memo ---------------------------------------------------------------------------------------

    def _mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self.pop_to_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _binput = _long_binput = _put

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _binget = _long_binget = _get

    # --- containers ---------------------------------------------------------------------------------------------------

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def _tuple1(self, _: Any) -> None:
        self._last_as_tuple(1)

    def _tuple2(self, _: Any) -> None:
        self._last_as_tuple(2)

    def _tuple3(self, _: Any) -> None:
        self._last_as_tuple(3)

    def _last_as_tuple(self, n: int) -> None:
        values = [self.pop() for _ in range(n)]
        self.stack.append(tuple(reversed(values)))

    def _list(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def _append(self, _: Any) -> None:
        self._extend([self.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self.pop_to_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items are added to what is no list")
        self.stack[-1].extend(values)

    def _dict(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self._set(values)

    def _setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._set([key, value])

    def _setitems(self, _: Any) -> None:
        self._set(self.pop_to_mark())

    def _set(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(values) % 2:
            raise ValueError("keys and values are added to what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int | float | None):
                raise ValueError(f"a {type(key).__name__} is the key of a dict")
            self.stack[-1][key] = value

    def _additems(self, _: Any) -> None:
        self._join(self.pop_to_mark())

    def _frozenset(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.stack.append(set())
        self._join(values)

    def _join(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not set or not all(isinstance(value, str | int | float) for value in values):
            raise ValueError("what is no set of texts and numbers")
        self.stack[-1].update(values)

    # --- names --------------------------------------------------------------------------------------------------------

    def _global(self, argument: str) -> None:
        self._look_up(argument.replace(" ", ".", 1))

    def _stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a name that is no text")
        self._look_up(f"{module}.{name}")

    def _look_up(self, text: str) -> None:
        if text not in self.names:
            raise InputError(f"it names {text[:200]!r}, which no checkpoint of the known kinds needs")
        self.stack.append(_Name(text, self.names[text]))

    def _reduce(self, _: Any) -> None:
        args, name = self.pop(), self.pop()
        if not (isinstance(name, _Name) and isinstance(args, tuple)):
            raise ValueError("a call of what is no name")
        self.stack.append(name.make(*args))

    _newobj = _reduce

    def _build(self, _: Any) -> None:
        state, record = self.pop(), self.stack[-1]
        if not isinstance(record, Record):
            raise ValueError("a state for what is no object")
        if isinstance(state, dict):
            record.state.update(state)
        else:
            record.state["state"] = state
