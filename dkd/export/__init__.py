"""Finished students in the formats of others, each checked against the original's logits before it is called done."""

from dkd.export.formats import FORMATS, ExportError, OtherLogitsError, export_student

__all__ = ["FORMATS", "ExportError", "OtherLogitsError", "export_student"]
