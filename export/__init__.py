"""From a checkpoint to a bundle: trace, lower, stream the weights, verify, write."""

from vl2.export.bundle import export_checkpoint
from vl2.export.choice import ExportOptions
from vl2.export.plan import ExportPlan, plan_export
from vl2.export.source import resolve_source

__all__ = ["ExportOptions", "ExportPlan", "export_checkpoint", "plan_export", "resolve_source"]
