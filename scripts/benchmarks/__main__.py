"""Benchmark training steps, the cost of settings, sampling, mixers, and how time and memory grow.

    python -m scripts.benchmarks throughput cost profile presets sampling growth mixers --fasta FILE

Packed training is compared with two baselines: the same network on batches padded to max_len, in float32, eager, with
AdamW; and SEDD's concatenated stream of all proteins, cut into blocks of max_len + 2 tokens. The steps of all variants
are interleaved in one process, and ratios compare steps of the same round. Only real residues count. Prints Markdown
tables and writes JSON.
"""

import argparse
import json
from pathlib import Path

from scripts.benchmarks.growth import growth
from scripts.benchmarks.mixers import mixers
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
    "mixers": mixers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", default=["throughput"], help=f"choose from {', '.join(PARTS)}; default: throughput"
    )
    parser.add_argument("--fasta", type=Path, help="proteins; default: the bundled ones")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="folder for the store built from --fasta")
    parser.add_argument("--models", nargs="+", default=list(MODELS)[1:], choices=list(MODELS))
    parser.add_argument("--max-len", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a pack, and at most in a padded batch")
    parser.add_argument("--steps", type=int, default=3, help="steps of a variant in each round")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each variant before the first round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, in which all variants are interleaved")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[256, 1024, 4096], help="tokens of the sequences for `mixers`"
    )
    parser.add_argument("--sampling-steps", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="precision of the variants that are not baselines",
    )
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="file to write")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if arguments.fasta is not None and not arguments.fasta.is_file():
        parser.error(f"{arguments.fasta}: no such file")
    result = {part: PARTS[part](arguments) for part in arguments.parts}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
