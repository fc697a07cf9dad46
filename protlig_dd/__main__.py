"""`python -m protlig_dd` lists the commands."""

import ast
import difflib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def verbs() -> dict[str, str]:
    """Return {command: first line of its module's docstring}. The modules are parsed, not imported."""
    summaries = {}
    for path in sorted([*FOLDER.glob("*.py"), *FOLDER.glob("*/__main__.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path == Path(__file__) or "run_verb" not in path.read_text(encoding="utf-8"):
            continue
        name = path.parent.name if path.name == "__main__.py" else path.stem
        summaries[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return summaries


def main() -> None:
    """Print the commands. If there is an argument other than -h and --help, print an error instead, which names the
    nearest command, and exit with code 1.
    """
    arguments = [argument for argument in sys.argv[1:] if argument not in ("-h", "--help")]
    if arguments:
        nearest = (difflib.get_close_matches(arguments[0], verbs(), 1) or ["VERB"])[0]
        print(
            f"error: `python -m protlig_dd {arguments[0]}` is not a command; use python -m protlig_dd.{nearest}",
            file=sys.stderr,
        )
        sys.exit(1)
    print("python -m protlig_dd.VERB key=value ...; --help lists the keys\n")
    for name, summary in verbs().items():
        print(f"{name:10} {summary}")


if __name__ == "__main__":
    main()
