"""Write a page of figures about runs, from the files of the runs alone.

This room knows recipes, models, images, attention maps and Gram matrices; it knows nothing of training.
"""

from dkd.report.write import write_report

__all__ = ["write_report"]
