"""Pictures and pages of runs, from their files alone.

Knows recipes, models, images and what an attention map or a Gram matrix is; knows nothing of training.
"""

from dkd.report.write import write_report

__all__ = ["write_report"]
