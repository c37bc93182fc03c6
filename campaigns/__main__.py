"""Campaigns of damaged input and disturbed runs: python -m campaigns [--only=NAME,...] [--seed=N] [--count=N].

Each campaign generates its cases from the seed and prints the number of cases per outcome. The exit status is 1 if a
case hangs or ends in a traceback, or if a file is lost or written in the wrong place.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import torch

from campaigns.chaos import disturb, fill_disk, kill, make_unwritable, set_clock_back, take_data_away
from campaigns.checkpoints import run_checkpoints
from campaigns.files import run_configs, run_labels, run_predictions
from campaigns.images import run_images
from campaigns.names import run_names
from campaigns.soak import run_soak
from utils.runtime.cli import run

# Each campaign with its default number of cases.
CAMPAIGNS = {
    "images": (run_images, 1000),
    "labels": (run_labels, 1000),
    "predictions": (run_predictions, 1000),
    "configs": (run_configs, 1000),
    "checkpoints": (run_checkpoints, 500),
    "names": (run_names, 40),
    "kills": (disturb(kill), 20),
    "kills_of_several": (disturb(kill, several=True), 20),
    "full_disk": (disturb(fill_disk), 5),
    "unwritable": (disturb(make_unwritable), 5),
    "vanishing_data": (disturb(take_data_away), 5),
    "soak": (run_soak, 100_000),
    "clock": (disturb(set_clock_back), 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"names separated by commas, of {', '.join(CAMPAIGNS)}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random cases (default: 0)")
    parser.add_argument("--count", type=int, help="number of cases (default: that of each campaign)")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(CAMPAIGNS)
    if unknown := sorted(set(names) - set(CAMPAIGNS)):
        parser.error(f"--only={unknown[0]}: choose from {', '.join(CAMPAIGNS)}")
    torch.set_num_threads(1)  # so that processes can be forked
    cv2.setNumThreads(1)
    faults = 0
    for name in names:
        campaign, default_count = CAMPAIGNS[name]
        start = time.perf_counter()
        with TemporaryDirectory(prefix=f"campaign-{name}-") as folder:
            tally = campaign(arguments.seed, arguments.count or default_count, Path(folder))
        print(f"{name}, seed {arguments.seed}: {tally}, {time.perf_counter() - start:.0f} s", flush=True)
        for fault in tally.faults:
            print(f"  fault: {fault}", flush=True)
        faults += len(tally.faults)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    run(main)
