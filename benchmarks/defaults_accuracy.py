"""What the defaults for speed (bf16 autocast, channels_last) do to accuracy: the quickstart's student, distilled with
each setting.

    python -m benchmarks.defaults_accuracy             3 seeds, digits
    python -m benchmarks.defaults_accuracy --seeds 5

Needs the quickstart's teacher (`make quickstart`, or it is trained first).
"""

from __future__ import annotations

import argparse
from statistics import mean, stdev

from benchmarks.quickstart import ROOT, train

SETTINGS = {
    "float32": ["train.precision=fp32", "train.channels_last=false"],
    "float32, channels_last": ["train.precision=fp32"],
    "bf16": ["train.channels_last=false"],
    "bf16, channels_last (the defaults)": [],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 … N−1")
    options = parser.parse_args()
    if not (ROOT / "runs/quickstart_teacher/student.safetensors").exists():
        train("configs/quickstart_teacher.yaml", "runs/quickstart_teacher")
    top1 = {
        title: [
            100
            * train("configs/quickstart.yaml", "runs/defaults_accuracy", f"run.seed={seed}", *overrides)["evaluation"][
                "top1"
            ]
            for seed in range(options.seeds)
        ]
        for title, overrides in SETTINGS.items()
    }
    print(f"\n{'':<38}{'mean top-1':>12}{'against float32, same seed':>30}")
    for title, values in top1.items():
        differences = [value - plain for value, plain in zip(values, top1["float32"], strict=True)]
        spread = f" ± {stdev(differences):.2f}" if len(differences) > 1 else ""
        print(f"{title:<38}{mean(values):>10.2f} %{mean(differences):>+22.2f}{spread} points")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
