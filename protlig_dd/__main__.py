"""`python -m protlig_dd` lists what there is to run."""

import ast
import difflib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def verbs() -> dict[str, str]:
    """The name of each command and the first line of what it says of itself, read off the sources."""
    found = {}
    for path in sorted([*FOLDER.glob("*.py"), *FOLDER.glob("*/__main__.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path == Path(__file__) or "run_verb" not in path.read_text(encoding="utf-8"):
            continue
        name = path.parent.name if path.name == "__main__.py" else path.stem
        found[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main() -> None:
    """Print them; of a verb behind a space, say how it is run, with exit code 1."""
    given = [one for one in sys.argv[1:] if one not in ("-h", "--help")]
    if given:
        (near, *_) = [*difflib.get_close_matches(given[0], verbs(), 1), "VERB"]
        print(
            f"error: there is no `python -m protlig_dd {given[0]}`: it is python -m protlig_dd.{near}", file=sys.stderr
        )
        sys.exit(1)
    print("python -m protlig_dd.VERB key=value ...; --help says which keys there are\n")
    for name, told in verbs().items():
        print(f"{name:10} {told}")


if __name__ == "__main__":
    main()
