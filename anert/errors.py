"""Every error that anert raises on purpose: one line for the user, one exit code for the shell (design.md section 11).

A message says what was expected, what came, and what to do next. The CLI prints it and exits with `exit_code`;
anything that is not an AnertError is a bug and keeps its traceback.
"""


class AnertError(Exception):
    """Base of anert's errors. `exit_code`: 1 a check or a run failed, 2 bad input, 3 backend unavailable."""

    exit_code = 1


class InputError(AnertError):
    """A file, option, shape or value that the user gave is not usable."""

    exit_code = 2


class ShapeError(InputError):
    """Operand shapes, dtypes or attributes that an op, kernel or surface cannot take."""


class MILSyntaxError(InputError):
    """MIL text that does not parse; `line` and `column` are 1-based and already part of the message."""

    def __init__(self, message: str, line: int = 0, column: int = 0, source: str = "<mil>") -> None:
        super().__init__(f"{source}:{line}:{column}: {message}")
        self.line, self.column, self.source = line, column, source


class PluginError(InputError):
    """A plugin that does not load, clashes, or lacks what was asked of it."""


class UnsupportedError(AnertError):
    """A valid program that this backend or machine cannot run."""


class Unpackable(UnsupportedError):
    """Inputs or outputs that do not fit the packed wire form; the message names the port and the limit."""


class CompileError(AnertError):
    """A backend refused a program, or the compile budget is spent."""


class BackendUnavailable(AnertError):
    """The asked backend is not on this machine; the message says why. Never answered by running elsewhere."""

    exit_code = 3


class StateError(AnertError):
    """An object used out of order: locked surface, closed runtime, a Binding that is already running."""


class NativeError(AnertError):
    """The native core failed (out of memory, a system call); carries its own sentence."""


class EngineError(AnertError):
    """The Neural Engine answered NO to a call; carries the framework's own text."""


class EngineRefused(EngineError, CompileError):
    """The Neural Engine takes a program in no dialect, or does not load it."""

    exit_code = 3


class NonFiniteError(AnertError):
    """A tensor holds NaN or inf where training cannot go on; names the block and the op."""


class DoesNotFit(InputError):
    """Memory or disk that a run would need exceeds what the machine grants; the message has both figures."""


class ImplausibleError(AnertError):
    """A measured figure that no machine can reach: a bug, not a result."""

    exit_code = 3
