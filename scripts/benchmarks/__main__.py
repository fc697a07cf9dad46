"""Measure training on real proteins against padded batches and a concatenated stream, sampling, and how costs grow:

    python -m scripts.benchmarks throughput cost profile presets sampling growth --fasta FILE

The baseline is the same network on batches padded to max_len, in float32, eager, with AdamW; beside it stands SEDD's,
all proteins end to end as one stream that is cut into blocks of max_len + 2 tokens. Every figure is a ratio of
steps that were made in turn in this one process; only real residues count. Prints Markdown tables and writes JSON.
"""

import argparse
import json
from pathlib import Path

from scripts.benchmarks.growth import growth
from scripts.benchmarks.presets import presets
from scripts.benchmarks.sampling import sampling
from scripts.benchmarks.steps import cost, profiled, throughput
from scripts.benchmarks.variants import MODELS

PARTS = {
    "throughput": throughput,
    "cost": cost,
    "profile": profiled,
    "presets": presets,
    "sampling": sampling,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["throughput"], help=f"of {', '.join(PARTS)}")
    parser.add_argument("--fasta", type=Path, help="proteins; without it the bundled ones")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="for the store that is made of them")
    parser.add_argument("--models", nargs="+", default=list(MODELS)[1:], choices=list(MODELS))
    parser.add_argument("--max-len", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--tokens", type=int, default=4096, help="in a pack, and the most slots of a padded batch")
    parser.add_argument("--steps", type=int, default=3, help="that a variant makes in its turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each variant")
    parser.add_argument("--sampling-steps", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of what is not a baseline"
    )
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="file to write")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if arguments.fasta is not None and not arguments.fasta.is_file():
        parser.error(f"{arguments.fasta}: no such file")
    result = {part: PARTS[part](arguments) for part in arguments.parts}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
