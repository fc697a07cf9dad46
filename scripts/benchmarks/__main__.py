"""Run the selected benchmarks (parts), print their results as Markdown tables, and write the results as JSON.

    python -m scripts.benchmarks throughput cost profile presets sampling growth mixers --fasta FILE

    throughput   speed of training on packs and on the batches of two baselines
    cost         speed of training with other networks and optimizers than SEDD's
    profile      fraction of a training step's time that each operator takes
    presets      estimated cost of training each model preset
    sampling     speed of sampling
    growth       time and memory of a forward and backward pass, for several sizes of network and pack
    mixers       speed of each mixer for several sequence lengths

The first baseline of `throughput` trains on batches whose sequences are padded to max_len residues. The second trains
as SEDD does: it concatenates all proteins into one stream, and cuts the stream into blocks of max_len + 2 tokens. The
baselines are eager (not compiled), and use the same SEDD network and AdamW as training on packs. Training on packs is
also measured with the default network. Ratios are relative to the first baseline in float32.

In `throughput` and `cost`, a variant is one combination of network, optimizer, batches and precision. All variants are
measured in one process. One round measures a few steps of each variant, and each ratio compares two variants within
one round. Residues/s count amino acids only, not <bos>, <eos> or <pad>.
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
    parser.add_argument("--fasta", type=Path, help="proteins; default: the bundled proteins")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="folder for the store built from --fasta")
    parser.add_argument("--models", nargs="+", default=list(MODELS)[1:], choices=list(MODELS))
    parser.add_argument("--max-len", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--tokens", type=int, default=4096, help="maximum number of tokens in a pack or batch")
    parser.add_argument("--steps", type=int, default=3, help="steps of each variant in each round")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each variant before the first round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; each round measures all variants")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[256, 1024, 4096], help="`mixers`: lengths of the sequences in tokens"
    )
    parser.add_argument("--sampling-steps", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="precision; `throughput` also measures its baselines in fp32, `growth` uses fp32, `presets` assumes bf16",
    )
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="file for the results")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if arguments.fasta is not None and not arguments.fasta.is_file():
        parser.error(f"{arguments.fasta}: no such file")
    result = {part: PARTS[part](arguments) for part in arguments.parts}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
