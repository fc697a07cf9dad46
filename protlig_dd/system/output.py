"""Keep a command running when its output cannot be printed.

The reason may be a closed pipe, a full disk, or a character that the encoding of the locale lacks.
"""

import os
import sys
from typing import Any


class TolerantStream:
    """A text stream that does not raise when it cannot be written.

    The stream writes `?` for characters that its encoding lacks. After an OSError it discards all further output. If
    the stream is stdout, one line on stderr reports the error.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write the text and return its length, like any text stream."""
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except OSError as error:
            self.silence(error)
            return len(text)

    def flush(self) -> None:
        """Flush, like any text stream."""
        try:
            self.stream.flush()
        except OSError as error:
            self.silence(error)

    def silence(self, error: OSError) -> None:
        """Discard all further output, and what the stream has buffered."""
        name = self.stream.name.strip("<>")
        null_device = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_device, self.stream.fileno())
        os.close(null_device)
        if name == "stdout":
            print(
                f"stdout cannot be written ({error.strerror}): the command continues without it",
                file=sys.stderr,
                flush=True,
            )


def tolerate_output_errors() -> None:
    """Replace this process's stdout and stderr with `TolerantStream`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, TolerantStream):
            setattr(sys, name, TolerantStream(stream))
