"""Check that training runs survive real faults: killed and hanging processes, signals, damaged files, full disks.

    python -m scripts.fault_campaign            all faults, as in docs/reliability.md (half an hour on 2 cores)
    python -m scripts.fault_campaign --short    all faults, with shorter runs and fewer trials (a few minutes)
    python -m scripts.fault_campaign damage     only the fault `damage`: damaged checkpoints

Small runs are disturbed, relaunched until they finish, and compared with undisturbed runs. Weights, averaged weights
and optimizer state must be bit-identical, and every step must have read the same sequences. Prints a Markdown table;
the exit code is 1 if a run did not survive a fault, or if a fault was never tried. The script mounts small disks
(tmpfs) in a private mount namespace, which needs root or the right to create user namespaces.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from protlig_dd.runs.checkpoint import COMPLETE, FILES, newest_valid_checkpoint, step_of
from protlig_dd.system.terminal import ProgressBar
from scripts.disturbed_runs import (
    RANKS,
    TWO,
    Campaign,
    Tally,
    flip,
    kill,
    mounted,
    ranks_of,
    start_python,
    truncate,
    wait_for_end,
)


def kill_trainer(campaign: Campaign) -> Tally:
    """Send SIGKILL to the trainer: every third time while it writes a checkpoint, otherwise at a random moment."""
    tally = Tally("SIGKILL of the trainer")
    writing, took = 0, campaign.seconds[campaign.undisturbed(1)]
    for name in campaign.disturbances(campaign.kills, "kill", tally):
        process = campaign.start(name)
        if tally.tried % 3 == 2:
            parent = campaign.run(name) / "checkpoints"
            known = set(parent.glob(".step_*"))
            while process.poll() is None and not (fresh := set(parent.glob(".step_*")) - known):
                time.sleep(0.0005)
            kill(process, signal.SIGKILL)
            writing += any(path.exists() for path in fresh)
        else:
            wait_for_end(process, campaign.random.uniform(0.1, 1) * took)
            kill(process, signal.SIGKILL)
    tally.notes = f"{writing} of them left a partial checkpoint"
    return tally


def kill_rank(campaign: Campaign) -> Tally:
    """Send SIGKILL to one of two ranks, after a new checkpoint; the launcher restarts both ranks."""
    tally = Tally("SIGKILL of one of two ranks, with trainer.max_restarts")
    restarts = 5
    for number, first in enumerate(range(0, campaign.others, restarts)):
        name, kills = f"rank{number}", min(restarts, campaign.others - first)
        process = campaign.start(name, *TWO, f"trainer.max_restarts={kills}")
        killed: set[int] = set()
        for _ in range(kills):
            campaign.wait_for_checkpoint(name, process)
            ranks = [pid for pid in ranks_of(process) if pid not in killed]
            if len(ranks) == 2:
                killed |= set(ranks)
                os.kill(campaign.random.choice(ranks), signal.SIGKILL)
                tally.tried += 1
        process.communicate(timeout=600)
        tally.survived += len(killed) // 2 * (process.returncode == 0 and campaign.matches_undisturbed(name, 2))
    return tally


def terminate(campaign: Campaign) -> Tally:
    """Send SIGTERM to a run in one process and to the launcher of a run with two ranks, and resume both runs.

    A run survives a trial if it stops with exit code 75 and in the end is bit-identical to the undisturbed run.
    """
    tally = Tally("SIGTERM")
    slowest = 0.0
    for ranks, options in RANKS.items():
        name, good = f"term{ranks}", 0
        for _ in range(campaign.others // 2):
            process = campaign.start(name, *options)
            campaign.wait_for_checkpoint(name, process)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=120)
            slowest = max(slowest, time.monotonic() - began)
            good += process.returncode == 75
        campaign.finish(name, *options)
        tally.tried += campaign.others // 2
        tally.survived += good * campaign.matches_undisturbed(name, ranks)
    tally.notes = f"exit within {slowest:.1f} s"
    return tally


def stop_rank(campaign: Campaign) -> Tally:
    """Stop one of two ranks with SIGSTOP for longer than the other rank waits (trainer.timeout)."""
    tally = Tally("SIGSTOP of one of two ranks for longer than trainer.timeout")
    process = campaign.start("hung", *TWO, "trainer.timeout=10")
    campaign.wait_for_checkpoint("hung", process)
    os.kill(ranks_of(process)[-1], signal.SIGSTOP)
    _, errors = process.communicate(timeout=300)
    tally.notes = "exit code 1; the error names step and rank"
    campaign.finish("hung", *TWO)
    reported = process.returncode == 1 and "did not answer within trainer.timeout" in errors
    tally.count(reported and campaign.matches_undisturbed("hung", 2))
    return tally


def damage(campaign: Campaign) -> Tally:
    """Damage one file of the newest checkpoint: truncate the file, flip a bit of it, or delete it."""
    tally = Tally("newest checkpoint damaged: each file truncated, with a flipped bit, or deleted")
    tally.notes = "resumes from the previous checkpoint and prints the damage"
    campaign.finish("stopped", f"trainer.stop_at_step={campaign.steps // 2}")
    files = sorted([*FILES, COMPLETE])
    cases = [(file, how) for file in files for how in (truncate, flip, Path.unlink)]
    cases = cases[1::10] if campaign.short else cases
    with ProgressBar("damaged checkpoints", len(cases)) as bar:
        for number, (file, how) in enumerate(cases):
            name = f"damaged{number}"
            shutil.copytree(campaign.run("stopped"), campaign.run(name))
            newest, _ = newest_valid_checkpoint(campaign.run(name))
            assert newest is not None
            how(newest / file)
            out = campaign.finish(name)
            before = f"step_{step_of(newest) - 5:08d}"
            reported = f"skipped: runs/{name}/checkpoints/{newest.name}" in out and before in out
            tally.count(reported and campaign.matches_undisturbed(name))
            bar.advance()
    return tally


def full_disk(campaign: Campaign) -> Tally:
    """Fill the disk before a run writes a checkpoint; then free the space and resume the run."""
    tally = Tally("disk full while a checkpoint is written", notes="exit code 1; the previous checkpoint is intact")
    disk = campaign.run("full")
    with mounted(disk, 64):
        campaign.finish("full", f"trainer.stop_at_step={campaign.steps // 2}")
        ballast = disk / "ballast"
        with ballast.open("wb") as file:
            file.write(bytes(shutil.disk_usage(disk).free - 200_000))
        code, _, errors = campaign.attempt("full")
        before, skipped = newest_valid_checkpoint(disk)
        reported = code == 1 and "No space left on device" in errors and before is not None and not skipped
        ballast.unlink()
        campaign.finish("full")
        tally.count(reported and campaign.matches_undisturbed("full"))
    return tally


def read_only(campaign: Campaign) -> Tally:
    tally = Tally("run folder that cannot be written", notes="exit code 1 before the first step")
    with mounted(campaign.run("readonly"), 8, "ro"):
        code, out, errors = campaign.attempt("readonly")
    tally.count(code == 1 and "Read-only file system" in errors and "training" not in out)
    return tally


def two_runs(campaign: Campaign) -> Tally:
    tally = Tally(
        "a second run started in the same folder", notes="the second exits with an error; the first continues"
    )
    first = campaign.start("shared")
    campaign.wait_for_checkpoint("shared", first)
    first.send_signal(signal.SIGSTOP)  # so that the first run does not finish before the second has started
    code, _, errors = campaign.attempt("shared")
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=600)
    refused = code == 1 and "runs/shared is in use by another run" in errors
    tally.count(refused and first.returncode == 0 and campaign.matches_undisturbed("shared"))
    return tally


FAULTS: dict[str, Callable[[Campaign], Tally]] = {
    "kill": kill_trainer,
    "kill-rank": kill_rank,
    "terminate": terminate,
    "hang": stop_rank,
    "damage": damage,
    "full-disk": full_disk,
    "read-only": read_only,
    "two-runs": two_runs,
}


def enter_namespace() -> None:
    """Run this program again in a private mount namespace, unless it runs in one already.

    There the program may mount disks, and the kernel removes the mounts when the program ends.
    """
    if os.environ.get("PROTLIG_NAMESPACE") != str(os.getpid()):
        rights = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        os.environ["PROTLIG_NAMESPACE"] = str(os.getpid())  # exec keeps the id, so the new program finds its own id
        os.execvp(
            "unshare", ["unshare", "--mount", *rights, sys.executable, "-m", "scripts.fault_campaign", *sys.argv[1:]]
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"choose from {', '.join(FAULTS)}; default: all")
    parser.add_argument("--short", action="store_true", help="shorter runs, and at most 3 trials of each fault")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments and of the ranks to kill")
    parser.add_argument("--folder", type=Path, default=Path(), help="folder for scratch files, about 100 MB")
    arguments = parser.parse_args()
    if unknown := set(arguments.faults) - FAULTS.keys():
        parser.error(f"no fault {', '.join(sorted(unknown))}; choose from {', '.join(FAULTS)}")
    enter_namespace()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="fault_campaign.") as folder:
        campaign = Campaign(
            Path(folder).resolve(), short=arguments.short, seed=arguments.seed, start_process=start_python
        )
        tallies = [FAULTS[name](campaign) for name in arguments.faults or FAULTS]
    print("\n| fault | tried | survived | lost | |\n| --- | --- | --- | --- | --- |")
    for tally in tallies:
        lost = tally.tried - tally.survived
        print(f"| {tally.fault} | {tally.tried} | {tally.survived} | {lost} | {tally.notes} |")
    return int(any(tally.survived < tally.tried or not tally.tried for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
