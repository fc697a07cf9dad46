"""Print the NLL bound of 23 training proteins of a store.

The process is one of several that compute the bound together. test_faults.py starts them:

python -m tests.bound_on_rank STORE RENDEZVOUS RANK WORLD_SIZE
"""

import json
import sys

import numpy as np
import torch.distributed as dist

from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import SequenceStore
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.likelihood.held_out import held_out_bound
from protlig_dd.system.distributed import Processes
from tests.conftest import make_model


def main(path: str, rendezvous: str, rank: int, world_size: int) -> None:
    """Join the other processes through the file `rendezvous`, and print the bound's summary over all proteins."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    store, graph = SequenceStore(path), Absorbing(20)
    dataset = PackDataset(store, store.split("train")[:23], max_len=60, tokens_per_pack=130, seed=None)
    found = held_out_bound(
        ScoreFn(make_model(), graph, LogLinearNoise(), "x0"),
        dataset,
        unigram=np.full(20, 0.05),
        draws=2,
        seed=3,
        processes=Processes(rank, world_size, rank),
        description="",
    )
    print(json.dumps(found.summary()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]))
