"""A small training, slow enough to be disturbed, and its run directory, looked at while others train in it."""

import hashlib
import json
from pathlib import Path

from launched import until


def write_recipe(path, steps, timeout):
    """BatchNorm, worker processes, momentum; a step takes a quarter of a second, and every tenth leaves a checkpoint.

    Args:
        timeout: seconds, run.collective_timeout.
    """
    path.write_text(f"""
run: {{trackers: [], start_timeout: 60, collective_timeout: {timeout}}}
data: {{train: digits, validation: digits, classes: 10, transforms: digits, image_size: 8, workers: 1}}
student: {{name: "small_models:Slow"}}
train: {{global_batch: 32, epochs: 2, max_steps: {steps}, precision: fp32}}
optimizer: {{name: sgd, lr: 0.05, momentum: 0.9}}
schedule: {{name: cosine}}
checkpoint: {{every_epochs: null, every_steps: 10}}
evaluation: {{every_epochs: 10}}
""")
    return path


class Run:
    def __init__(self, folder):
        self.folder = Path(folder)

    def step(self):
        """The last one logged."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)

    def until_step(self, step, launch, seconds=90):
        until(lambda: self.step() >= step, seconds, launch)

    def is_finished(self):
        return (self.folder / "FINISHED").exists()

    def student(self):
        """SHA-256."""
        return hashlib.sha256((self.folder / "student.safetensors").read_bytes()).hexdigest()

    def starts(self):
        """After how many steps each start went on."""
        return [start["step"] for start in json.loads((self.folder / "provenance.json").read_text())]
