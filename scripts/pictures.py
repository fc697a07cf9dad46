"""Write the pictures of the README and the docs: a report page, a heat map of substitution scores, an attention map.

    ./start_fresh_training.sh            # trains runs/demo
    python -m scripts.pictures           # writes report.png, heatmap.png and attention.png in docs/pictures
    python -m scripts.pictures runs/mine --output pictures
    python -m scripts.pictures --only attention

The report page needs Chromium on the PATH. The maps show the first held-out bundled protein of 60 to 100 residues.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.data.prepare.bundled import SAMPLE_FOLDER
from protlig_dd.inference.contacts import contact_map, to_png
from protlig_dd.inference.inspect import attention
from protlig_dd.inference.model import load_trained

PICTURES = ("report", "heatmap", "attention")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WINDOW = (1100, 1500)  # width and height of the screenshot in CSS pixels; it shows the top of the page
SHORTEST, LONGEST = 60, 100  # residues; the heat map of such a protein has one row
LARGEST = 300_000  # maximum size of a picture in bytes


def screenshot(browser: str, page: Path, picture: Path) -> None:
    """Write a PNG of the top of an HTML page to `picture`. WINDOW is the size of the PNG.

    Raises:
        subprocess.CalledProcessError: the browser fails.
    """
    with tempfile.TemporaryDirectory(prefix="pictures.") as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        size = f"--window-size={WINDOW[0]},{WINDOW[1]}"
        command = [browser, *flags, size, f"--screenshot={picture.resolve()}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def held_out_protein() -> FastaRecord:
    records = read_fasta(SAMPLE_FOLDER / "test.fasta.gz")
    return next(record for record in records if SHORTEST <= len(record.sequence) <= LONGEST)


def heat_map(run: Path, picture: Path) -> None:
    """Score every single substitution of a held-out protein, and write the heat map to `picture`.

    Raises:
        subprocess.CalledProcessError: `python -m protlig_dd.variants` fails; that command has printed the reason.
    """
    record = held_out_protein()
    with tempfile.TemporaryDirectory(prefix="pictures.") as folder:
        target, output = Path(folder, "target.fasta"), Path(folder, "scan.csv")
        target.write_text(f">{record.id}\n{record.sequence}\n")
        arguments = [f"from={run}", f"target={target}", f"output={output}"]
        subprocess.run([sys.executable, "-m", "protlig_dd.variants", *arguments], check=True)
        shutil.copyfile(output.with_name("scan_heatmap.png"), picture)


def attention_map(run: Path, picture: Path) -> None:
    """Write a picture of the attention weights in a held-out protein, averaged over all blocks and heads.

    The average gets the average-product correction of contact maps (APC, see contact_map).

    Raises:
        ValueError: the run has no valid checkpoint, or its network has a block without attention.
    """
    record = held_out_protein()
    trained = load_trained(str(run), device="cpu", precision="fp32")
    (weights,) = attention(trained.score_fn, [record.sequence], max_len=trained.max_len)
    heads = f"{weights.shape[0]} blocks x {weights.shape[1]} heads"
    title = f"{record.id}, {run.name}, step {trained.step}\nmean attention of {heads}, APC"
    picture.write_bytes(to_png(contact_map(weights), record.sequence, title))


def shrink(picture: Path) -> None:
    """Reduce a PNG to 128 colours.

    Raises:
        ValueError: the reduced PNG is still larger than LARGEST.
    """
    with Image.open(picture) as image:
        image.convert("RGB").quantize(128).save(picture, optimize=True)
    if picture.stat().st_size > LARGEST:
        raise ValueError(f"{picture} has {picture.stat().st_size:,} bytes; the README allows {LARGEST:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"), help="folder (default: docs/pictures)")
    parser.add_argument("--only", choices=PICTURES, nargs="+", default=PICTURES, help="pictures to make (default: all)")
    arguments = parser.parse_args()
    page = arguments.run / "report.html"
    if "report" in arguments.only and not page.is_file():
        parser.exit(1, f"error: {page}: no such file; ./start_fresh_training.sh writes runs/demo\n")
    browser = next((name for name in BROWSERS if shutil.which(name)), None)
    if browser is None and "report" in arguments.only:
        parser.exit(1, f"error: no browser on the PATH; install one of {', '.join(BROWSERS)}\n")
    arguments.output.mkdir(parents=True, exist_ok=True)
    pictures = {name: arguments.output / f"{name}.png" for name in arguments.only}
    try:
        if browser is not None and "report" in pictures:
            screenshot(browser, page, pictures["report"])
        if "heatmap" in pictures:
            heat_map(arguments.run, pictures["heatmap"])
        if "attention" in pictures:
            attention_map(arguments.run, pictures["attention"])
    except (subprocess.CalledProcessError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    for picture in pictures.values():
        shrink(picture)
        print(f"{picture}: {picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
