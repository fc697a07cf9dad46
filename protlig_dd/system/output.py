"""What cannot be printed never ends the work: a reader that is gone, a full disk, a locale without the character."""

import os
import sys
from typing import Any


class Unfailing:
    """A stream that has `?` for what its encoding lacks, and goes silent where it can no longer be written, after one
    line on stderr."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """As any stream's."""
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except OSError as error:
            self.silence(error)
            return len(text)

    def flush(self) -> None:
        """As any stream's."""
        try:
            self.stream.flush()
        except OSError as error:
            self.silence(error)

    def silence(self, error: OSError) -> None:
        """What is to come, and what the stream holds still, goes nowhere."""
        name = self.stream.name.strip("<>")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        if name == "stdout":
            print(
                f"stdout cannot be written ({error.strerror}): the work goes on without it", file=sys.stderr, flush=True
            )


def let_output_fail() -> None:
    """Make this process's stdout and stderr such streams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Unfailing):
            setattr(sys, name, Unfailing(stream))
