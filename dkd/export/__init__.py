"""Write finished students in formats of other libraries, and compare the logits of each file with the student's."""

from dkd.export.formats import FORMATS, ExportError, OtherLogitsError, export_student

__all__ = ["FORMATS", "ExportError", "OtherLogitsError", "export_student"]
